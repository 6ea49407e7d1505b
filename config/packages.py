"""129 MB of Python source from six pinned packages, the same bytes on every machine: the corpus for what is too large
for the embedded one and has to be repeatable. The packages come with pip install -e '.[corpus]'.

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
