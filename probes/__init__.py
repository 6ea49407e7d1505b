"""Implements the commands of probe.py, one file each."""
