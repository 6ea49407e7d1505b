"""python eval.py longppl: the perplexity of a run on the tokens for which a long context matters.

LongPPL is from "What is Wrong with Perplexity for Long-context Language Modeling?" (arXiv 2410.23771). An evaluator,
another run, reads every token twice: given the whole piece of the document before it, and given a short context. A
token is a key token if the whole context helps the evaluator much, and the evaluator then predicts the token well:

    LSD = nats given the short context - nats given the whole context > alpha,  nats given the whole context < -beta

LongPPL = exp(mean nats of the evaluated run over the key tokens), each given the whole piece before it.

Short contexts. Windows of short_length + short_stride - 1 positions move by short_stride positions. Each serves its
last short_stride predictions, whose contexts have short_length .. short_length + short_stride - 1 positions. The first
tokens of a piece have no other context than the whole one, so they are never key.

Tokenizers. The two runs may have different ones. Both read pieces of documents that cover the same bytes
(evals/shared_text.py). Key tokens are carried over as intervals of bytes, and neighboring ones are one interval: a
token of the evaluated run is key if its bytes lie wholly in an interval.

Every run is read as it was trained: with markers placed by its own rule, drawn anew for every piece, and within its own
limits to what positions may read. The content of a piece is the same in any case.

Intervals take documents as the unit. "document_key_nats" and "document_key_tokens" hold the sums of every document that
has key tokens, for paired comparisons of runs (report.py)."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanometa.common.errors import UserError
from nanometa.config.checks import check
from nanometa.data.shards import read_manifest
from nanometa.evals.blocks import intervals
from nanometa.evals.common import Evaluation, arm_of, check_ranges, fits, progress
from nanometa.evals.perplexity import LARGEST_LOSS
from nanometa.evals.piece_reader import PieceReader
from nanometa.evals.shared_text import SharedPiece, carried, shared_pieces
from nanometa.training.checkpoint import Run, content_per_window, load_run


@dataclass(frozen=True)
class LongpplEval(Evaluation):
    """Perplexity on the tokens for which a long context matters to another run, the evaluator (LongPPL)."""

    READS = ("drawn", "limited", "previous")

    evaluator: str = ""
    """folder of the run that finds the key tokens, or of one of its checkpoints"""
    dataset: str = ""
    """folder of a dataset that was prepared with the run's tokenizer; if empty, the run's own dataset"""
    evaluator_dataset: str = ""
    """folder of a dataset of the same text with the evaluator's tokenizer; if empty, `dataset` if it has this
    tokenizer, or else the evaluator's own dataset"""
    length: int | None = None
    """most content tokens of a piece, under both tokenizers; None = as many as both runs were trained on in a window"""
    short_length: int = 128
    """positions of the shortest short context; no token before it is key"""
    short_stride: int = 32
    """positions from one window of short contexts to the next; the longest short context has short_length +
    short_stride - 1 positions"""
    alpha: tuple[float, ...] = (2.0, 1.0, 0.5)
    """thresholds of the nats that the whole context must save, each with a LongPPL of its own; the paper uses 2"""
    beta: float = -2.0
    """a key token has fewer than -beta nats given the whole context"""
    pieces: int | None = None
    """number of pieces to read, spread evenly over those of the split; None = all"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, length=(8, 2**20), short_length=(1, 2**20), short_stride=(1, 2**20), pieces=(1, 2**40))
        check_ranges(self, alpha=(0, 700), beta=(-700, 0))
        check(self, "alpha", len(set(self.alpha)) == len(self.alpha), "name each threshold once")


def main(cfg: LongpplEval) -> None:
    """Runs the evaluation: writes a JSON line for each alpha, and prints a table."""
    if not cfg.evaluator:
        raise UserError("evaluator is empty: name the run that finds the key tokens, with --evaluator=out/NAME.")
    run, facts = cfg.open()
    evaluator = load_run(cfg.evaluator, run.model.wte.weight.device)
    for one in (run, evaluator):
        if one.config.task.tasks:
            raise UserError(
                f"{one.folder} was trained on tasks ({', '.join(one.config.task.tasks)}), not on text: use another run."
            )
    folders = datasets_of(cfg, run, evaluator)
    size = cfg.length or min(content_per_window(one.state, one.config) for one in (run, evaluator))
    check_sizes(cfg, run, evaluator, size)
    pieces = chosen(cfg, shared_pieces((run, evaluator), folders, size), folders[0], size)
    readers = PieceReader(run, size), PieceReader(evaluator, size)
    documents = len({piece.document for piece in pieces})
    cell = {
        "eval": "longppl", **texts_of(folders), "evaluator": str(evaluator.folder), "evaluator_arm": arm_of(evaluator),
        "evaluator_sha256": evaluator.weights_sha256, "length": size, "short_length": cfg.short_length,
        "short_stride": cfg.short_stride, "beta": cfg.beta, "pieces": len(pieces), "documents": documents,
    }  # fmt: skip

    def measured() -> Iterator[dict | str]:
        started, sums = time.perf_counter(), Sums(cfg, run, evaluator)
        with progress(f"{len(pieces)} pieces", len(pieces)) as advance:
            for number, piece in enumerate(pieces):
                sums.add(piece, *read(cfg, readers, number, piece))
                advance(1)
        lines = [{**cell, **line, "seconds": time.perf_counter() - started} for line in sums.figures()]
        yield from lines
        yield table(lines)

    heading = f", {len(pieces)} pieces of {documents} documents, key tokens from {evaluator.folder}"
    cfg.record(run, facts, "longppl", measured(), heading)


def datasets_of(cfg: LongpplEval, run: Run, evaluator: Run) -> tuple[Path, Path]:
    """Returns the folders of the datasets that the run and the evaluator read."""
    own = cfg.dataset or run.state["data"]["dataset"]
    other = evaluator.state["data"]["dataset"]
    if run.tokenizer.fingerprint == evaluator.tokenizer.fingerprint:
        other = own
    return Path(own), Path(cfg.evaluator_dataset or other)


def texts_of(folders: tuple[Path, Path]) -> dict:
    """Returns the facts about the text that lines repeat."""
    split = read_manifest(folders[0])["splits"]["val"]
    return {
        "dataset": str(folders[0]), "evaluator_dataset": str(folders[1]), "split": "val",
        "content_sha256": split["content_sha256"], "text_sha256": split.get("text_sha256"),
    }  # fmt: skip


def check_sizes(cfg: LongpplEval, run: Run, evaluator: Run, size: int) -> None:
    """Raises UserError if pieces of `size` tokens have no token with a longer context than the short ones, or are
    longer than the evaluator's window."""
    if cfg.short_length + cfg.short_stride >= size:
        raise UserError(
            f"short_length={cfg.short_length} and short_stride={cfg.short_stride} leave no token of a piece of {size} "
            f"with a longer context: use smaller ones, or a larger --length."
        )
    trained = content_per_window(evaluator.state, evaluator.config)
    if size > trained:
        raise UserError(
            f"{evaluator.folder} was trained in windows of {trained} content tokens, so the tokens that it finds in "
            f"pieces of {size} mean nothing: use a --length of at most {trained}, or another evaluator."
        )


def chosen(cfg: LongpplEval, found: list[SharedPiece], folder: Path, size: int) -> list[SharedPiece]:
    """Returns the pieces that are read. Raises UserError if there are none."""
    if not found:
        raise UserError(
            f"no document of the validation split of {folder} has pieces of {size} tokens: use a smaller --length, or "
            f"prepare longer documents."
        )
    n = min(cfg.pieces or len(found), len(found))
    return [found[i * len(found) // n] for i in range(n)]


def read(cfg: LongpplEval, readers: tuple[PieceReader, PieceReader], number: int, piece: SharedPiece) -> tuple:
    """Returns the nats of all tokens of a piece but its first: those of the run, those of the evaluator given the whole
    piece before them, and those of the evaluator given a short context, NaN where there is none.

    Raises UserError if the run cannot read as many positions."""
    first, second = (of.batch(number, ids) for of, ids in zip(readers, (piece.first, piece.second), strict=True))
    if why := fits(readers[0].run, 1 + int(first.positions.max())):
        raise UserError(f"{readers[0].run.folder} cannot read the pieces: {why}; use a smaller --length.")
    short = readers[1].short_nats(second, cfg.short_length + cfg.short_stride - 1, cfg.short_stride)
    return readers[0].whole_nats(first), readers[1].whole_nats(second), short


class Sums:
    """Sums by document of the nats, tokens and bytes of a run, over all tokens and the key tokens of each alpha."""

    def __init__(self, cfg: LongpplEval, run: Run, evaluator: Run):
        self.cfg, self.run = cfg, run
        self.lengths = run.tokenizer.token_bytes, evaluator.tokenizer.token_bytes
        self.documents: dict[int, np.ndarray] = {}  # (3, 1 + alphas): nats, tokens, bytes
        self.differences: list[np.ndarray] = []  # the LSDs of the evaluator's tokens that have one
        self.keys: list[list[np.ndarray]] = [[] for _ in cfg.alpha]  # those of its key tokens

    def add(self, piece: SharedPiece, nats: np.ndarray, whole: np.ndarray, short: np.ndarray) -> None:
        """Adds a piece. nats (P - 1,), whole (Q - 1,), short (Q - 1,): as `read` returns them."""
        n_bytes, difference = self.lengths[0][piece.first], short - whole
        sums = self.documents.setdefault(piece.document, np.zeros((3, 1 + len(self.cfg.alpha))))
        self.differences.append(difference[~np.isnan(difference)])
        of_tokens = np.stack([nats, np.ones(len(nats)), n_bytes[1:]])
        sums[:, 0] += of_tokens.sum(axis=1)
        for number, alpha in enumerate(self.cfg.alpha):
            key = is_key(whole, short, alpha, self.cfg.beta)
            self.keys[number].append(difference[key])
            ours = carried(np.append(False, key), self.lengths[1][piece.second], n_bytes)[1:]
            sums[:, 1 + number] += of_tokens[:, ours].sum(axis=1)

    def figures(self) -> Iterator[dict]:
        """Yields the figures for each alpha. A mean over no tokens is None.

        Raises UserError if a loss is too large for a perplexity."""
        nats, tokens, n_bytes = np.stack(list(self.documents.values()), axis=1)  # (documents, 1 + alphas) each
        by_token, by_byte = intervals(nats, tokens), intervals(nats, n_bytes)
        differences = np.concatenate(self.differences)
        for number, alpha in enumerate(self.cfg.alpha, start=1):
            keys, there = np.concatenate(self.keys[number - 1]), tokens[:, number] > 0
            yield {
                "alpha": alpha,
                **self._figures("", by_token[0], by_byte[0]),
                "candidates": len(differences), "median_lsd": median(differences),
                "keys": len(keys), "share": len(keys) / max(1, len(differences)), "key_median_lsd": median(keys),
                **self._figures("key_", by_token[number], by_byte[number]),
                "document_key_nats": nats[there, number].round(4).tolist(),
                "document_key_tokens": tokens[there, number].astype(int).tolist(),
                "document_numbers": np.array(list(self.documents))[there].tolist(),
            }  # fmt: skip

    def _figures(self, which: str, by_token: list, by_byte: list) -> dict:
        """Returns the figures of all tokens, or of the key tokens, from their tokens or bytes, mean and interval."""
        (n, mean, *ends), (n_bytes, of_byte, *byte_ends) = by_token, by_byte
        if mean is not None and mean > LARGEST_LOSS:
            raise UserError(
                f"the loss of {self.run.folder} is {mean:.4g} nats per token, too large for a perplexity: use another "
                f"checkpoint."
            )
        name = "longppl" if which else "perplexity"
        return {
            f"{which}tokens": n, f"{which}bytes": n_bytes, f"{which}loss": mean,
            name: exp(mean), f"{name}_interval": None if None in ends else [exp(end) for end in ends],
            f"{which}nats_per_byte": of_byte,
            f"{which}bits_per_byte": None if of_byte is None else of_byte / math.log(2),
            f"{which}bits_per_byte_interval": None if None in byte_ends else [end / math.log(2) for end in byte_ends],
        }  # fmt: skip


def is_key(whole: np.ndarray, short: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Returns which tokens are key, (N,) bool, from their nats given the whole and a short context, NaN without one."""
    return (short - whole > alpha) & (whole < -beta)


def median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def exp(nats: float | None) -> float | None:
    """Returns exp(nats), of at most LARGEST_LOSS, so that it stays finite."""
    return None if nats is None else math.exp(min(nats, LARGEST_LOSS))


def table(lines: list[dict]) -> str:
    """Returns the printed table: a row for all tokens and one for each alpha, and what they mean."""
    first = lines[0]
    longest = first["short_length"] + first["short_stride"] - 1
    lsd = "" if first["median_lsd"] is None else f", whose median LSD is {first['median_lsd']:.3f} nats"
    return "\n".join([
        row("all tokens", "perplexity", first, ""),
        *(row(f"alpha {line['alpha']:g}", "longppl", line, "key_") for line in lines),
        f"The LSD of a key token (nats given {first['short_length']} to {longest} positions - nats given the whole "
        f"piece) is above alpha, and the latter nats are fewer than {-first['beta']:g}. The evaluator read "
        f"{first['candidates']:,} tokens with both contexts{lsd}.\n",
    ])  # fmt: skip


def row(name: str, figure: str, line: dict, which: str) -> str:
    """Returns the printed row of all tokens, or of the key tokens of an alpha."""
    keys = "" if not which else f"; the evaluator has {line['keys']:,} keys ({line['share']:.2%} of its tokens)"
    if line[figure] is None:
        return f"{name:<11} no token is key, so there is no LongPPL{keys}"
    if which:
        keys += f", median LSD {line['key_median_lsd']:.2f}"
    value = f"{'LongPPL' if which else 'perplexity'} {line[figure]:.3f}{span(line[figure + '_interval'])}"
    loss, nats, bits = (line[which + unit] for unit in ("loss", "nats_per_byte", "bits_per_byte"))
    return (
        f"{name:<11}{line[which + 'tokens']:>9,} tokens  {value}  {loss:.4f} nats per token  {nats:.4f} nats and "
        f"{bits:.4f} bits per byte{keys}"
    )


def span(interval: list[float] | None) -> str:
    """Returns an interval in parentheses, or "" if there is none."""
    return "" if interval is None else " ({:.3f} .. {:.3f})".format(*interval)
