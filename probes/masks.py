"""Draws what every position may read, for each config with marker settings: python -m nanometa.probes.masks FILE.png"""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.terminal import write_line
from nanometa.config import MarkerConfig, TrainConfig
from nanometa.config.command_line import load_config, run_cli
from nanometa.data.markers import MarkerScheme, Placing
from nanometa.data.tokenizer import Tokenizer
from nanometa.layers.visibility import visible
from nanometa.reports.mask_picture import mask_picture

TEXT = "One cat sat. Two dogs ran far away. Here all is quiet now, and nothing else moves."
CONFIGS = Path(__file__).resolve().parents[1] / "config"
# sizes that suit a text of 20 tokens
SMALL = {"sentence_tokens": 2, "random_marks": 3, "max_span": 6, "eviction_window": 6, "sinks": 2}


@functools.cache
def configs() -> dict[str, TrainConfig]:
    """Returns every config that has settings of markers, by its name."""
    paths = sorted(path for path in CONFIGS.glob("tiny_*.py") if path.stem != "tiny_tasks")
    found = {path.stem: load_config(TrainConfig, [str(path)], config_file=True) for path in paths}
    return {name: cfg for name, cfg in found.items() if cfg.markers != MarkerConfig()}


def panel(markers: MarkerConfig, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns which keys (columns) each query (row) of the text may read (T, T), and which positions are markers."""
    small = {name: value for name, value in SMALL.items() if getattr(markers, name) != getattr(MarkerConfig(), name)}
    small |= {name: SMALL[name] for name in ("sentence_tokens", "max_span")}
    if len(markers.compression_ratio) > 1:
        small["compression_ratio"] = (0.5,)
    ids = tokenizer.encode(TEXT)[:20].astype(np.int64)
    if not markers.places_markers and markers.evict == "segment":
        ids = np.insert(ids, [3, 9, 9, 16], tokenizer.meta)
    scheme = MarkerScheme(Placing(replace(markers, **small), key=3), tokenizer, len(ids), 0)
    layout = scheme.lay_out(ids)
    columns = [torch.from_numpy(column)[None] for column in (layout.reads_from, layout.read_until)]
    return visible(*columns, len(layout.tokens))[0, 0].numpy(), layout.content < 0


def main(argv: list[str]) -> None:
    """Draws all masks into the file that the only argument names."""
    if len(argv) != 1 or not argv[0].endswith(".png"):
        raise UserError("give the name of one .png file, such as docs/masks.png.")
    tokenizer = Tokenizer.gpt2()
    panels = {name: panel(cfg.markers, tokenizer) for name, cfg in configs().items()}
    write_atomically(Path(argv[0]), mask_picture(panels))
    write_line(argv[0])


if __name__ == "__main__":
    run_cli(main)
