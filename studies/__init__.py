"""Studies: a plan of many runs, the queue that works through it, and the analysis of its results."""
