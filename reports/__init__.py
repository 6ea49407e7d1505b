"""What report.py is made of: lines of eval.py, comparisons, pictures, the page."""
