"""The dataset of the tiny runs: the standard library of the Python that runs (python prepare.py config/stdlib.py)."""

from config import PrepareConfig

config = PrepareConfig()
