"""Prepares a repeatable corpus that is larger than stdlib.py's: 129 MB of Python source from six pinned packages.

The text is the same on every machine. Install the packages with pip install -e '.[corpus]'.

python prepare.py config/packages.py"""

from nanometa.config import PrepareConfig

config = PrepareConfig(
    source="packages",
    packages=(
        "torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "datasets==5.2.0", "matplotlib==3.11.2",
        "sympy==1.14.0",
    ),
    bpe_vocab_size=8192,
    val_fraction=0.02,
)  # fmt: skip
