"""Helpers that every folder may import: errors, keyed random numbers, files, the terminal and statistics.

This package imports no other folder of the repository."""
