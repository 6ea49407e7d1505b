"""What probe.py looks into, a file each, and its pictures."""
