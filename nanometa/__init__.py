"""Makes every folder of the repository importable as nanometa.NAME, from anywhere.

`from nanometa.model import GPT` and `from nanometa.training.checkpoint import load_run` work for the programs of the
repository, which run in place, and after `pip install -e .` in any folder. No module of the repository has another
name, so a `config.py` or `data/` of your own is never confused with ours.
"""

from pathlib import Path

__version__ = "0.2.0"

_ROOT = Path(__file__).resolve().parent.parent
if not (_ROOT / "model.py").is_file():
    raise ImportError(f"nanometa is not installed in place: {_ROOT} has no model.py; use pip install -e REPOSITORY.")
__path__.append(str(_ROOT))
