"""python eval.py passkey: measures whether a run finds a number that is hidden in a long text.

The text is that of Mohtashami & Jaggi (Landmark Attention, arXiv 2305.16300; generate_prompt in llama/run_test.py of
their repository): a task, filler, the sentence with the key, filler, a question. Its sentences are quoted verbatim,
since results with another wording could not be compared. Three things differ from the original:
1. The filler consists of whole sentences; theirs is cut at a number of characters.
2. Keys have five digits, and all have the same number of tokens, the most common one; theirs are 1 .. 50000.
3. Besides the exact answer, which a small model never gives, the key is ranked by probability among other keys.

Markers, if the run has them, are placed by its rule and at its density from <|endoftext|> to the end of the question.
The answer contains none, so all keys of a text are scored at the same positions."""

import bisect
import functools
import itertools
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.statistics import wilson
from nanometa.data.inject import inject, marker_places
from nanometa.data.layout import batch_of, connected_positions, draw_of, layout_of, targets_of
from nanometa.data.tokenizer import Tokenizer
from nanometa.evals.common import POSITIONS, Evaluation, check_finite, check_markers, check_ranges, fits, progress
from nanometa.inference.scoring import score_batch
from nanometa.tasks.source import MULTIPLE
from nanometa.training.checkpoint import Run

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
HIDDEN = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"
KEYS = range(10_000, 50_001)


@dataclass(frozen=True)
class PasskeyEval(Evaluation):
    """Recall of a pass key that is hidden in filler text, by length and depth."""

    lengths: tuple[int, ...] = (256, 512)
    """maximum positions of the texts of a cell, markers and answer included; the shortest have nine tenths of that"""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """share of the filler that comes before the key"""
    markers: tuple[Literal["trained", "none"], ...] = ()
    """trained: throughout the prompt, by the run's rule and at its density; none: no markers; if empty, trained, or
    none for a run without markers"""
    n: int = 100
    """number of texts in a cell"""
    candidates: int = 50
    """number of keys that are ranked, the true one included"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, lengths=(8, 2**20), depths=(0, 1), n=(1, 10**6), candidates=(2, 1000))


def main(cfg: PasskeyEval) -> None:
    """Runs the evaluation: writes a JSON line and prints a line for each cell."""
    run, facts = cfg.open()
    placements = cfg.markers or ("trained" if run.state["data"]["chunk_markers"] else "none",)
    check_markers(run, placements)
    cells = itertools.product(placements, cfg.lengths, cfg.depths)
    measured = (measure_passkey(run, Prompts(run, *cell), cfg.n, cfg.candidates) for cell in cells)
    cfg.record(run, facts, "passkey", (one for line in measured for one in (line, sentence(line))))


def prompt_text(key: int, sentences: int, depth: float) -> str:
    """Returns the prompt with this many sentences of filler, of which the share `depth` comes before the key.

    The parts are joined as in the paper's code."""
    before = round(depth * sentences)
    parts = (TASK, _filler(before), HIDDEN.format(key), _filler(sentences - before), QUESTION)
    return "\n".join(part for part in parts if part)


def _filler(sentences: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(FILLER), sentences))


@functools.lru_cache(maxsize=4)
def keys_of(tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Returns the keys that have the most common number of tokens, and that number.

    A key is tokenized together with the space before it."""
    sizes = np.array([len(tokenizer.encode(f" {key}")) for key in KEYS])
    k = int(np.bincount(sizes).argmax())
    return (np.flatnonzero(sizes == k) + KEYS[0]).tolist(), k


class Prompts:
    """The texts of a cell.

    Text i is a function of (i, length, depth, markers, the run's marker rule and tokenizer), so runs that share these
    get the same texts.
    sizes: the numbers of filler sentences with which a text has from nine tenths of `length` to `length` positions, its
    answer included. It can be empty."""

    def __init__(self, run: Run, markers: str, length: int, depth: float):
        self.run, self.markers, self.length, self.depth = run, markers, length, depth
        rule = run.state["data"]
        self.injection = rule["injection"] if markers == "trained" else "none"
        M = rule["chunk_markers"] if markers == "trained" else 0
        self.markers_per_token = M / rule["chunk_content"]
        self.keys, self.k = keys_of(run.tokenizer)
        low = bisect.bisect_left(range(1, length), math.ceil(0.9 * length), key=self.positions) + 1
        self.sizes = list(itertools.takewhile(lambda n: self.positions(n) <= length, itertools.count(low)))

    def positions(self, sentences: int) -> int:
        """Returns the positions of a text with this many filler sentences, its markers and answer included."""
        content = len(self.run.tokenizer.encode(prompt_text(self.keys[0], sentences, self.depth)))
        return 1 + content + self._n_markers(content) + self.k

    def _n_markers(self, content: int) -> int:
        return round(self.markers_per_token * content)

    def prompt(self, index: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns text number `index`: its ids (N,) before the answer, and the candidate answers (candidates, k).

        The true answer comes first."""
        tokenizer = self.run.tokenizer
        draws = Draws(stable_key("passkey", self.length, self.depth, index))
        keys = draws.sample(self.keys, candidates)
        content = tokenizer.encode(prompt_text(keys[0], draws.choice(self.sizes), self.depth)).astype(np.int64)
        M, key = self._n_markers(len(content)), stable_key("passkey markers", draws.below(2**62))
        places = marker_places(self.injection, 0, 1, len(content), M, key)
        ids = np.concatenate([[tokenizer.eot], inject(content[None], places, tokenizer.meta)[0]])
        return ids, np.array([tokenizer.encode(f" {key}") for key in keys]).astype(np.int64)


def score(run: Run, prompt: np.ndarray, answers: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nats of each whole answer (A,), and whether greedy decoding would write it (A,).

    Greedy decoding writes an answer if each of its ids is the most likely one given the ids before it.
    prompt (N,); answers (A, k); index: the number of the text."""
    nats, right, meta, T = [], [], run.tokenizer.meta, len(prompt) + answers.shape[1]
    size, draw = max(1, POSITIONS // T), draw_of(run.config, "passkey")
    for start in range(0, len(answers), size):
        layouts = [layout_of(np.append(prompt, answer), meta) for answer in answers[start : start + size]]
        targets = [targets_of(layout, run.config.target_rule, np.arange(T) >= len(prompt)) for layout in layouts]
        meta_index = connected_positions(layouts, meta, np.full(len(layouts), index), draw, MULTIPLE)
        batch = batch_of(layouts, targets, meta_index)  # every text scores k ids, so the scores have no padding
        scores = score_batch(run.model, batch.to(run.model.wte.weight.device))
        nats.append(scores.nats.sum(dim=1).cpu().numpy())
        right.append(scores.right.all(dim=1).cpu().numpy())
    check_finite(run, np.concatenate(nats))
    return np.concatenate(nats), np.concatenate(right)


def rank(nats: np.ndarray) -> float:
    """Returns the rank of the first answer by the nats (A,) of all answers; 1 is the most likely.

    Among answers with equal nats it takes the middle rank."""
    return 1 + float((nats[1:] < nats[0]).sum() + (nats[1:] == nats[0]).sum() / 2)


def measure_passkey(run: Run, prompts: Prompts, n: int, candidates: int) -> dict:
    """Returns the JSON line of one cell, measured on n texts with this many candidate keys each."""
    cell = {
        "eval": "passkey", "length": prompts.length, "depth": prompts.depth, "markers": prompts.markers,
        "injection": prompts.injection, "markers_per_token": prompts.markers_per_token,
    }  # fmt: skip
    why = fits(run, prompts.length)
    if not prompts.sizes:
        shortest = prompts.positions(1)
        why = f"no number of filler sentences gives this length; with one sentence a text has {shortest} positions"
    if why:
        return {**cell, "n": 0, "impossible": why}
    started, ranks, exact, positions = time.perf_counter(), [], [], 0
    with progress(f"{prompts.length} positions, depth {prompts.depth:.2f}, markers {prompts.markers}", n) as advance:
        for index in range(n):
            prompt, answers = prompts.prompt(index, candidates)
            nats, right = score(run, prompt, answers, index)
            ranks.append(rank(nats))
            exact.append(bool(right[0]))
            positions += len(prompt) + prompts.k
            advance(1)
    top = sum(place == 1 for place in ranks)
    chance = {
        "exact": 1 / len(prompts.keys), "top1": 1 / candidates, "median_rank": (candidates + 1) / 2,
        "mrr": sum(1 / place for place in range(1, candidates + 1)) / candidates,
    }  # fmt: skip
    # ranks, outcomes: one rank and one outcome per text, in the same order, for paired tests
    return {
        **cell, "n": n, "positions": positions / n, "key_tokens": prompts.k, "candidates": candidates,
        "correct": sum(exact), "exact": sum(exact) / n, "interval": wilson(sum(exact), n),
        "top1": top / n, "top1_interval": wilson(top, n),
        "mrr": float(np.mean(1 / np.array(ranks))), "median_rank": float(np.median(ranks)), "chance": chance,
        "ranks": ranks, "outcomes": "".join(map(str, map(int, exact))), "seconds": time.perf_counter() - started,
    }  # fmt: skip


def sentence(cell: dict) -> str:
    """Returns the printed line of a cell."""
    name = f"{cell['length']:>6}  depth {cell['depth']:.2f}  {cell['markers']:<8}"
    if "impossible" in cell:
        return f"{name}  impossible: {cell['impossible']}\n"
    (low, high), (top_low, top_high), chance = cell["interval"], cell["top1_interval"], cell["chance"]
    return (
        f"{name}  exact {cell['exact']:.1%} ({low:.1%} .. {high:.1%}, n = {cell['n']})  "
        f"first of {cell['candidates']} keys {cell['top1']:.1%} ({top_low:.1%} .. {top_high:.1%}, chance "
        f"{chance['top1']:.1%})  reciprocal rank {cell['mrr']:.3f} (chance {chance['mrr']:.3f})  median rank "
        f"{cell['median_rank']:g} (chance {chance['median_rank']:g})  {cell['seconds']:.1f} s\n"
    )
