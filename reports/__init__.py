"""Builds the pages and pictures of report.py, and all other pictures."""
