"""The settings of every command: frozen dataclasses with their checks, a file for each.

command_line.py fills them from config files and command lines; the config files are the recipes beside this one.
"""

from nanometa.config.model_settings import GPTConfig, Rescale
from nanometa.config.prepare_settings import PrepareConfig
from nanometa.config.sample_settings import SampleConfig
from nanometa.config.task_settings import TaskConfig
from nanometa.config.tasks import Level, Placement, Question, Task
from nanometa.config.train_settings import TrainConfig, train_config_from_dict

__all__ = [
    "GPTConfig", "Level", "Placement", "PrepareConfig", "Question", "Rescale", "SampleConfig", "Task", "TaskConfig",
    "TrainConfig", "train_config_from_dict",
]  # fmt: skip
