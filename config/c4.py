"""Prepares English C4 (Raffel et al., arXiv 1910.10683), the paper's corpus, in windows of 1024 positions.

Each window has 922 content tokens and 102 markers.

python prepare.py config/c4.py"""

from nanometa.config import PrepareConfig

config = PrepareConfig(
    source="hf",
    hf_dataset="allenai/c4",
    hf_config="en",
    tokenizer="gpt2",
    chunk_content=922,
    chunk_markers=102,  # k = 0.0996, as close to the paper's 0.1 as a window of 1024 allows
    val_fraction=0.0005,  # 0.15 GB of text
)
