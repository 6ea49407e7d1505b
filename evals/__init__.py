"""The evaluations that eval.py runs, one file for each."""
