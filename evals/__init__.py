"""What eval.py measures, a file each."""
