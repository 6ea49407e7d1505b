"""The paper's data, the English part of C4 (Raffel et al., arXiv 1910.10683), with GPT-2's tokenizer and its window:
922 content tokens and 102 meta-tokens are 1024 positions.

    python prepare.py config/c4.py
    python prepare.py config/c4.py --injection=none     # the controls' data"""

from config import PrepareConfig

config = PrepareConfig(
    source="hf",
    hf_dataset="allenai/c4",
    hf_config="en",
    tokenizer="gpt2",
    chunk_content=922,
    chunk_markers=102,
    val_fraction=0.0005,  # of so much text enough for a steady figure
)
