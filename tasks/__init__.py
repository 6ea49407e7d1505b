"""The synthetic tasks of the paper (section 5 and appendix D.1 of arXiv 2509.16278): text with a known answer.

What is public of them is few examples and no templates (formats, knobs and placements below are decisions of ours, said
where they are made). A task module has `draft`, which writes one text, and what can be known of it without reading it
all: `CHANCE` and `shortcuts`. Knows text and tokens, not models.

    python -m nanometa.tasks.list_recall --show 3 --length 128 --placement every
"""

TASKS = ("list_recall", "segment_counting", "parity", "copying")
PLACEMENTS = ("target", "every", "none", "background")
LEVELS = ("easy", "medium", "hard", "extra_hard", "long")
