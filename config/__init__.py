"""Holds the settings of the commands, as frozen dataclasses that check their values, and the config files.

command_line.py fills the dataclasses from a config file and the command line. A config file, such as meta_gpt2.py, is
a short recipe for one experiment.
"""

from nanometa.config.marker_settings import MarkerConfig
from nanometa.config.model_settings import GPTConfig, Rescale
from nanometa.config.prepare_settings import PrepareConfig
from nanometa.config.sample_settings import SampleConfig
from nanometa.config.task_settings import TaskConfig
from nanometa.config.tasks import Level, Placement, Question, Task
from nanometa.config.train_settings import TrainConfig, train_config_from_dict
from nanometa.config.weight_settings import WeightConfig

__all__ = [
    "GPTConfig", "Level", "MarkerConfig", "Placement", "PrepareConfig", "Question", "Rescale", "SampleConfig", "Task",
    "TaskConfig", "TrainConfig", "WeightConfig", "train_config_from_dict",
]  # fmt: skip
