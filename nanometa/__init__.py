"""Makes every folder of the repository importable as nanometa.NAME, from anywhere.

`from nanometa.model import GPT` and `from nanometa.training.checkpoint import load_run` work in the repository's own
commands, and in any folder after `pip install -e .`. Every module of the repository has a name that starts with
nanometa, so a `config.py` or a `data/` of your own is never confused with it.
"""

from pathlib import Path

__version__ = "0.2.0"

_ROOT = Path(__file__).resolve().parent.parent
if not (_ROOT / "model.py").is_file():
    raise ImportError(
        f"nanometa must be installed in place, but {_ROOT} has no model.py: use pip install -e REPOSITORY."
    )
__path__.append(str(_ROOT))
