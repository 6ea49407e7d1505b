"""python eval.py compression: measures what a run loses when it forgets a part of its context, by method and ratio.

Three measurements, all on the validation split:

bits          bits per byte of windows of the trained size, by ratio of compression
recall        share of exact repetitions of random words that were forgotten, by their number
continuation  how far a greedy continuation after a compressed prefix is that of the full context

A method says how the run is read: as it was trained, or by another rule without more training.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.statistics import clustered_ratio
from nanometa.config import MarkerConfig
from nanometa.config.marker_settings import SHARES
from nanometa.config.settings import setting
from nanometa.data.layout import FOREVER, draw_of
from nanometa.data.loader import Windows
from nanometa.data.markers import NAMES, Placing, placing_of
from nanometa.data.spans import number_of_spans
from nanometa.evals.common import POSITIONS, Evaluation, check_finite, check_ranges, fits, progress, read_split
from nanometa.evals.forgotten import continuation, recall
from nanometa.inference.scoring import score_batch
from nanometa.layers.loss import Tally
from nanometa.training.checkpoint import Run, content_per_window

Method = Literal["trained", "full", "drop", "segment", "local", "scattered", "window"]
METHODS = get_args(Method)
MEANING = {  # printed below the results
    "trained": "by the rules that the run was trained with",
    "full": "nothing is forgotten, and no markers are placed",
    "drop": "random spans are forgotten without a summary",
    "segment": "text is forgotten behind the marker that closes its segment",
    "local": "every position reads the latest part of the positions before it",
    "scattered": "a random part of all positions is forgotten",
    "window": "a sliding window and the first tokens",
}


@dataclass(frozen=True)
class CompressionEval(Evaluation):
    """Loss, recall and continuations of a run that forgets a part of its context."""

    READS = ("drawn", "limited", "previous")

    dataset: str = ""
    """folder of a dataset that was prepared with the run's tokenizer; if empty, the run's own dataset"""
    methods: tuple[Method, ...] = ("trained",)
    """how the run is read. trained: by its own rules; full: nothing is forgotten; segment: text is forgotten behind the
    marker that closes its segment; drop, local, scattered, window: the baselines of the same names"""
    ratios: tuple[float, ...] = ()
    """shares of the context that are saved, for methods that have a ratio; if empty, those that the run was trained
    with"""
    measure: tuple[Literal["bits", "recall", "continuation"], ...] = ("bits",)
    """what to measure"""
    windows: int | None = 64
    """number of validation windows, spread evenly over the split; None = all"""
    spans: tuple[int, ...] = setting((2, 4, 8, 16, 24), only_with={"measure": ("recall",)})
    """numbers of forgotten tokens that are to be repeated"""
    n: int = setting(200, only_with={"measure": ("recall", "continuation")})
    """number of texts of each cell of recall and continuation"""
    new_tokens: int = setting(32, only_with={"measure": ("continuation",)})
    """number of tokens of a continuation"""
    sinks: int = setting(4, only_with={"methods": ("window",)})
    """number of first tokens that method window keeps"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, windows=(2, 2**40), spans=(2, 256), n=(2, 10**6), new_tokens=(1, 2**16), sinks=(0, 2**16))
        if not self.methods or not self.measure:
            raise UserError(f"{'methods' if not self.methods else 'measure'} is empty: name one at least.")
        if any(not 0 <= ratio < 1 for ratio in self.ratios):
            raise UserError(f"ratios={' '.join(map(str, self.ratios))} is out of range: each must lie in [0, 1).")


def main(cfg: CompressionEval) -> None:
    """Runs the evaluation: writes a JSON line and prints a line for each cell."""
    run, facts = cfg.open()
    folder = Path(cfg.dataset or run.state["data"]["dataset"])
    read_split(run, folder, None)  # checks the tokenizer and the text
    C = content_per_window(run.state, run.config)
    if "recall" in cfg.measure and max(cfg.spans) > C // 4:
        raise UserError(
            f"spans={max(cfg.spans)} is too long for texts of {C} content tokens, which have it twice: use at most "
            f"{C // 4}."
        )
    if "continuation" in cfg.measure and cfg.new_tokens >= C // 2:
        raise UserError(
            f"new_tokens={cfg.new_tokens} is too many: the prefix and its continuation must fit into the {C} content "
            f"tokens of a window, and the prefix has {C // 2} of them: use at most {C // 2 - 1}."
        )
    cells = [(method, ratio) for method in cfg.methods for ratio in ratios_of(cfg, run, method)]
    # all are opened first, so that a UserError comes before anything is measured
    opened = {(method, ratio): open_windows(cfg, run, folder, method, ratio) for method, ratio in cells}

    def measured() -> Iterator[dict | str]:
        for what, (method, ratio) in itertools.product(cfg.measure, cells):
            started, data = time.perf_counter(), opened[method, ratio]
            if what == "recall" and data.scheme.cfg.places_markers:
                if (method, ratio) != next(cell for cell in cells if cell[0] == method):
                    continue
                ratio = None  # the repeated words are the forgotten segment, whatever the ratio
            cell = {"eval": "compression", "measure": what, "method": method, "ratio": ratio, "dataset": str(folder)}
            if why := fits(run, data.content_per_window if data.scheme.previous else data.T):
                yield {**cell, "impossible": why}
                yield f"{what:<13}{method:<10}  impossible: {why}\n"
                continue
            if what == "bits":
                lines = [bits(run, data, cfg.windows)]
            elif what == "recall":
                lines = [recall(run, data, size, cfg.n) for size in cfg.spans]
            else:
                lines = [continuation(run, data, cfg.n, cfg.new_tokens)]
            for line in lines:
                yield {**cell, **line, "seconds": (time.perf_counter() - started) / len(lines)}
                yield sentence({**cell, **line})
        yield from (f"  {method:<10} {MEANING[method]}\n" for method in cfg.methods)

    cfg.record(run, facts, "compression", measured())


def ratios_of(cfg: CompressionEval, run: Run, method: str) -> tuple[float | None, ...]:
    """Returns the ratios at which a method is measured; None for a method whose ratio the text determines."""
    trained = run.config.markers
    if method in (*SHARES, "drop", "window") or (method in ("trained", "segment") and trained.has_ratio):
        return cfg.ratios or trained.compression_ratio
    scheme_of(cfg, run, method, None)  # raises UserError if the run cannot be read by this method
    return (None,)


def scheme_of(cfg: CompressionEval, run: Run, method: str, ratio: float | None) -> MarkerConfig:
    """Returns the settings of markers with which a method reads the run.

    Raises UserError if the run has no markers that the method needs."""
    trained, stored = run.config.markers, run.state["data"]["chunk_markers"]
    given = {} if ratio is None else {"compression_ratio": (ratio,)}
    if method == "full":
        return MarkerConfig()
    if method == "segment":
        if not run.config.has_markers(stored):
            raise UserError(
                f"method segment needs markers that close segments, and {run.folder} was trained without: use drop, "
                f"local, scattered or window."
            )
        return replace(trained, evict="segment", **given)
    if method == "drop":
        if stored:
            raise UserError(
                f"method drop cuts spans of text without markers, and the data of {run.folder} has some: use segment."
            )
        return MarkerConfig(marker_place="span", marks="none", evict="segment", max_span=trained.max_span, **given)
    if method == "trained":
        return replace(trained, **given)
    if method in SHARES:
        return MarkerConfig(evict=method, **given)
    window = max(1, round((1 - ratio) * content_per_window(run.state, run.config)))
    return MarkerConfig(evict="window", eviction_window=window, sinks=min(cfg.sinks, window - 1))


def open_windows(cfg: CompressionEval, run: Run, folder: Path, method: str, ratio: float | None) -> Windows:
    """Opens the validation windows of a run as a method reads them. All of them have the same content."""
    markers, data = scheme_of(cfg, run, method, ratio), run.state["data"]
    size = run.config.model.block_size
    if run.config.markers.places_markers or not data["chunk_markers"]:
        size = content_per_window(run.state, run.config)  # and room for the markers of the method
        if markers.marker_place == "span":
            spans = max(number_of_spans(size, of, markers.max_span)[0] for of in markers.compression_ratio)
            size += len(NAMES[markers.marks]) * spans
        elif markers.places_markers:
            size = run.config.model.block_size
    trained = placing_of(run.config, "val")
    placing = Placing(markers, trained.key, trained.previous)
    return Windows(folder, "val", size, run.config.target_rule, draw_of(run.config, "val"), placing)


def bits(run: Run, data: Windows, windows: int | None) -> dict:
    """Returns the loss of windows, and how much of their context was kept.

    realised: share of the content tokens of a window that its cache does not hold at its end, markers counted as held.
    cache: positions in the cache as a share of the content tokens read so far, mean over a window."""
    numbers = data.sample(min(windows or data.n_windows, data.n_windows))
    device, size = run.model.wte.weight.device, max(1, POSITIONS // data.T)
    tally, nats, n_bytes = Tally(torch.from_numpy(run.tokenizer.token_bytes), device), [], []
    saved, held = [], []
    with progress(f"{len(numbers)} windows", len(numbers)) as advance:
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            scores = score_batch(run.model, data.batch(part).to(device))
            tally.add(scores.nats, scores.targets)
            of_text = torch.from_numpy(run.tokenizer.token_bytes).to(device)[scores.targets.clamp(min=0)]
            of_text = torch.where(scores.targets >= 0, of_text, 0)
            nats += (scores.nats * (of_text > 0)).sum(1).double().tolist()
            n_bytes += of_text.sum(1).tolist()
            advance(len(part))
    check_finite(run, np.array(nats))
    for window in numbers[:64].tolist():
        of = kept(data, window)
        saved.append(1 - of[-1] / data.content_per_window)
        held.append(float(np.mean(of / np.arange(1, len(of) + 1))))
    low, high = (end / np.log(2) for end in clustered_ratio(np.array(nats), np.array(n_bytes)))
    return {
        **tally.figures(), "interval": [low, high], "windows": len(numbers), "realised": float(np.mean(saved)),
        "realised_range": [min(saved), max(saved)], "cache": float(np.mean(held)),
    }  # fmt: skip


def kept(data: Windows, window: int) -> np.ndarray:
    """Returns how many positions the cache holds once each content token of a window, and its markers, are read."""
    first = window * data.content_per_window
    ids = data.stream.read(window * data.step, (window + 1) * data.step)
    layout = data.scheme.lay_out(ids, first, most=data.most)
    T = len(layout.tokens)
    change = np.zeros(T + 1, dtype=np.int64)  # of the number of positions that the next place can still read
    change[:T] += 1
    np.subtract.at(change, np.minimum(layout.read_until, T), np.where(layout.read_until == FOREVER, 0, 1))
    held, content = np.cumsum(change[:T]), np.flatnonzero(layout.content >= 0)
    return held[np.append(content[1:] - 1, T - 1)]


def sentence(line: dict) -> str:
    """Returns the printed line of a cell."""
    ratio = "" if line["ratio"] is None else f"{line['ratio']:.3f}"
    head = f"{line['measure']:<13}{line['method']:<10}{ratio:>6}"
    if line["measure"] == "bits":
        low, high = line["interval"]
        return (
            f"{head}  {line['bits_per_byte']:.4f} bits per byte ({low:.4f} .. {high:.4f}, {line['windows']} windows)  "
            f"saved {line['realised']:.3f} at the end, cache {line['cache']:.3f} on average\n"
        )
    if line["measure"] == "recall":
        low, high = line["interval"]
        return (
            f"{head}  {line['size']:>3} tokens  exact {line['exact']:6.1%} ({low:.1%} .. {high:.1%}, n = {line['n']})  "
            f"tokens {line['token_accuracy']:.1%}\n"
        )
    return (
        f"{head}  against the full context: equal ids {line['agreement']:.1%}, F1 {line['f1_full']:.3f}, ROUGE-L "
        f"{line['rouge_full']:.3f}; against the text: F1 {line['f1_text']:.3f}, full context "
        f"{line['f1_text_of_full']:.3f}, loss {line['loss_text']:.4f}, full context "
        f"{line['loss_text_of_full']:.4f} nats per token; n = {line['n']}\n"
    )
