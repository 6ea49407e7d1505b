"""The paper's synthetic tasks (section 5 and appendix D.1 of arXiv 2509.16278): texts whose answers are known.

The paper publishes a few examples and no templates. The formats, options and placements here are therefore our own
decisions, and each module explains its own. This folder works on text and tokens only; it knows nothing of models.

config/tasks.py registers the tasks, placements and levels. To add a task, add its name there and write the module
tasks/NAME.py. The module must define the names that TASK_MODULE in example.py lists; `load_task` refuses it otherwise.
To print examples of a task:

    python -m nanometa.tasks.list_recall --show 3 --length 128 --placement every
"""
