"""The synthetic tasks of the paper (section 5 and appendix D.1 of arXiv 2509.16278): text with a known answer.

What is public of them is few examples and no templates (formats, knobs and placements below are decisions of ours, said
where they are made). Knows text and tokens, not models.

config/tasks.py registers the tasks, placements and levels. To add a task, add its name there and write the module
tasks/NAME.py. The module defines what example.py lists in TASK_MODULE; `load_task` refuses one that lacks a part.

    python -m nanometa.tasks.list_recall --show 3 --length 128 --placement every
"""
