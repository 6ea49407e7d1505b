"""Builds the pages of report.py, and draws the pictures of all commands."""
