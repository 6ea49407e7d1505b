"""Prepares a small corpus that needs no download: 12 MB of Python's standard library, 461 content tokens a window.

python prepare.py"""

from nanometa.config import PrepareConfig

config = PrepareConfig()
