"""The embedded corpus: 12 MB of Python's own standard library, in windows of 461 content tokens and 51 markers.

python prepare.py"""

from nanometa.config import PrepareConfig

config = PrepareConfig()
