"""python probe.py ablation: changes the attention around the markers of a run at inference, and measures what it costs.

The same weights read the same texts as trained (intact) and under each condition of probes/interventions.py:

    off             the second attention adds nothing: what the layer is worth to the trained model
    diagonal        each marker attends only to itself in the second attention: what the exchange between markers is
                    worth. If little is lost, the layer works as an adapter on single rows
    hidden_markers  ordinary tokens do not see markers in the causal attention: what reading the markers is worth

Texts. A run that was trained on text reads windows of its validation split, as in training. The loss is in nats per
scored token, apart for predictions that are made at ordinary tokens and at markers (tokens: ordinary, markers). Under
target_rule skip nothing is predicted at markers. A run that was trained on tasks reads the test texts of eval.py tasks.
The loss is then in nats per answer, and the share of exact answers is compared, too. --on chooses the other kind.

Figures. `difference` is the loss under a condition minus the intact loss. Its 95 % interval is that of a ratio
estimator over windows or texts, which are paired. `lost` is the share of exact answers that a condition costs, with
Newcombe's interval and McNemar's test. `norm` is the mean, over positions of a kind, of the norm of what the second
attention adds, divided by the norm of the residual stream that it is added to, in the intact model.

With --every_step all step_ checkpoints that the run kept are measured, and the picture has curves over training steps.
The figures are about these checkpoints; claims about an arm need several seeds."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.statistics import clustered_ratio, wilson
from nanometa.common.terminal import BOLD, write, write_line
from nanometa.config import Task
from nanometa.config.tasks import TASKS
from nanometa.data.layout import Batch, draw_of
from nanometa.data.loader import Windows
from nanometa.data.shards import read_manifest
from nanometa.evals.common import check_finite, check_ranges, read_split, write_lines
from nanometa.evals.tasks import about, answered, cell_name, doubt, texts
from nanometa.inference.generation import knows_meta
from nanometa.inference.scoring import score_batch
from nanometa.probes.interventions import CONDITIONS, INTACT, changed_attention, inapplicable, record_norms
from nanometa.probes.marked_texts import MarkedTextsProbe, batch_size, batches, judged, paired_claim
from nanometa.probes.probe_command import draw_picture, read_earlier_lines
from nanometa.reports.ablation import SECTION
from nanometa.reports.table_sections import latest
from nanometa.tasks.example import Example, Maker
from nanometa.tasks.source import count_right
from nanometa.training.checkpoint import Run
from nanometa.training.run_folders import STATE, checkpoint_folders, suggestion

KINDS = ("ordinary", "markers")  # kinds of positions
CLAIMS = {"lost": "lost_"}  # as in marked_texts.judged
ONLY_TEXT = ("dataset", "windows")
ONLY_TASKS = ("tasks", "lengths", "placements", "level", "question", "n", "margin", "effect")


@dataclass(frozen=True)
class AblationProbe(MarkedTextsProbe):
    """Measures what a run loses if its second attention, the exchange between markers, or the view of markers is
    removed at inference."""

    on: Literal["text", "tasks"] | None = None
    """texts to read: windows of the validation split, or test texts of tasks; None = the kind that the run was trained
    on"""
    conditions: tuple[Literal["off", "diagonal", "hidden_markers"], ...] = ()
    """changes to measure; if empty, all that can change anything in this run"""
    every_step: bool = False
    """measure all step_ checkpoints in the folder of the run, instead of the best or newest one"""
    dataset: str = ""
    """folder of a dataset that was prepared with the run's tokenizer, for its validation windows; if empty, the run's
    own dataset"""
    windows: int | None = 64
    """number of validation windows, evenly spread over the split; None = all"""
    tasks: tuple[Task, ...] = ()
    """tasks to read; if empty, those that the run was trained on, or all"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, windows=(2, 2**40), n=(2, 10**6))  # an interval needs two

    def default_tasks(self, trained: tuple[Task, ...]) -> tuple[Task, ...]:
        return trained or TASKS

    def checkpoints(self) -> list["AblationProbe"]:
        """Returns the settings for each checkpoint to measure, oldest first. Raises UserError if there is none."""
        if not self.every_step:
            return [self]
        if not self.run or (Path(self.run) / STATE).is_file():
            raise UserError(
                f"run={self.run!r} does not name the folder of a run, whose checkpoints --every_step measures: give "
                f"out/NAME, or leave --every_step out."
            )
        folders = checkpoint_folders(Path(self.run), "step")
        if not folders:
            raise UserError(f"there is no step_ checkpoint in {self.run!r}: {suggestion(Path(self.run))}")
        return [dataclasses.replace(self, run=str(folder)) for folder in folders]


def main(cfg: AblationProbe) -> None:
    for one in cfg.checkpoints():
        measure_checkpoint(one)


def measure_checkpoint(cfg: AblationProbe) -> None:
    """Measures one checkpoint: prints a table, appends lines to the file, and draws all lines about the same run."""
    run, facts = cfg.open()
    on = cfg.on or ("tasks" if run.config.task.tasks else "text")
    if idle := [name for name in (ONLY_TASKS if on == "text" else ONLY_TEXT) if name in cfg.typed]:
        other = "tasks" if on == "text" else "text"
        raise UserError(f"--{idle[0]} has no effect on {run.folder}, which is read on {on}: leave it out, or add "
                        f"--on={other}.")  # fmt: skip
    measured = of_tasks(cfg, run) if on == "tasks" else of_text(cfg, run)  # checks the settings; measures nothing yet
    output = cfg.lines(run, "ablation")
    before = read_earlier_lines(output, "ablation", {"arm": facts["arm"], "run": facts["run"]})
    write_line(f"{facts['arm']}, {run.folder}", BOLD)
    with cfg.autocast(run):
        lines = [{**facts, "probe": "ablation", **line} for line in measured()]
    judged(lines, CLAIMS, cfg.effect, cfg.margin)
    write("\n".join(["", SECTION.table(lines), ""]))
    write_lines(output, lines)
    drawn = output.with_suffix(".png")
    write_atomically(drawn, draw_picture("ablation", latest(SECTION, before + lines)))
    write_line(str(output))
    write_line(str(drawn))


def chosen(cfg: AblationProbe, run: Run, has_markers: bool) -> list[str]:
    """Returns the conditions to measure, and prints why others are left out. Raises UserError if none can change what
    the run reads, or one that the settings name cannot."""
    reasons = {name: why for name in CONDITIONS if (why := inapplicable(name, run.model.cfg, has_markers))}
    named = [name for name in cfg.conditions if name in reasons]
    if named or len(reasons) == len(CONDITIONS):
        name = (*named, *reasons)[0]
        others = " or ".join(other for other in CONDITIONS if other not in reasons)
        cure = f"use --conditions {others}" if others else "use a run with markers or with a second attention"
        raise UserError(f"condition {name} changes nothing in {run.folder}, which {reasons[name]}: {cure}.")
    for name, why in reasons.items():
        if not cfg.conditions:
            write(f"left out: {name}, because {run.folder} {why}\n")
    return [name for name in cfg.conditions or CONDITIONS if name not in reasons]


# ----------------------------------------------------------------------------- texts


def of_text(cfg: AblationProbe, run: Run) -> Callable[[], list[dict]]:
    """Returns a function that measures windows of the validation split and returns their lines.

    Raises UserError if the dataset does not fit the run, or a condition does not fit both."""
    folder, m = Path(cfg.dataset or run.state["data"]["dataset"]), run.config.model
    manifest = read_manifest(folder)
    has_markers = bool(manifest["chunk_markers"])
    if has_markers and not knows_meta(run):
        raise UserError(
            f"{run.folder} was trained without markers, and {folder} has them: name a --dataset without markers."
        )
    read_split(run, folder, None)  # checks the tokenizer and the text
    data = Windows(folder, "val", m.block_size, run.config.target_rule, draw_of(run.config, "val"))
    if data.n_windows < 2:
        raise UserError(f"{folder} has one validation window of {m.block_size} positions, and an interval needs two: "
                        f"prepare more text, raise --val_fraction, or give more --val_files.")  # fmt: skip
    conditions = chosen(cfg, run, has_markers)
    numbers = data.sample(min(cfg.windows or data.n_windows, data.n_windows))
    cell = {
        "text": "validation", "dataset": str(folder), "content_sha256": manifest["splits"]["val"]["content_sha256"],
        "length": m.block_size, "n": len(numbers),
    }  # fmt: skip

    def read_batches() -> Iterable[tuple[slice, Batch]]:
        size = batch_size(run, m.block_size)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            yield slice(start, start + len(part)), data.batch(part).to(run.model.wte.weight.device)

    return lambda: measure(run, cell, conditions, read_batches, np.full(len(numbers), m.block_size))


def of_tasks(cfg: AblationProbe, run: Run) -> Callable[[], list[dict]]:
    """Returns a function that measures task texts and returns their lines. Raises UserError if the run cannot read
    them, or a condition changes nothing in any of them."""
    cells = cfg.cells(run)
    if not knows_meta(run) and (placed := [maker.placement for maker, *_ in cells if maker.markers.has_meta]):
        raise UserError(f"{run.folder} was trained without meta-tokens, and placement {placed[0]} has them: use "
                        f"--placements none.")  # fmt: skip
    marked = any(maker.markers.has_meta for maker, *_ in cells)
    conditions = chosen(cfg, run, marked)
    for cell in cells:
        texts(*cell, 1)  # raises UserError before anything is measured

    def measured() -> list[dict]:
        learned = [answered(run, *cell, cfg.n) for cell in cells]
        found = [(maker, length, answer) for (maker, _, length), answer in zip(cells, learned, strict=True)]
        if warning := doubt(run, found):
            write_line(warning, BOLD)
        lines = []
        for cell, answer in zip(cells, learned, strict=True):
            lines += of_cell(cfg, run, conditions, *cell, answer)
        return lines

    return measured


def of_cell(
    cfg: AblationProbe, run: Run, conditions: list[str], maker: Maker, level: str, length: int, answer: dict
) -> list[dict]:
    """Returns the lines of a cell of task texts. Conditions that need markers are left out where texts have none."""
    examples = texts(maker, level, length, cfg.n)
    cell = {"text": "tasks", **about(maker, level, length), "n": len(examples), "answered": answer}
    here = [name for name in conditions if not inapplicable(name, run.model.cfg, _has_meta(run, examples))]
    write(f"{cell_name(cell)}\n")
    ends = np.array([len(example.ids) for example in examples])
    return measure(run, cell, here, lambda: batches(run, examples), ends) if here else []


def _has_meta(run: Run, examples: list[Example]) -> bool:
    return any((example.ids == run.tokenizer.meta).any() for example in examples)


# ----------------------------------------------------------------------------- measuring


class Reading(NamedTuple):
    """What a model does on N texts. The last axis of size 2 is the kind of position: ordinary, markers."""

    nats: np.ndarray  # (N, 2) summed nats of the targets
    targets: np.ndarray  # (N, 2) number of targets
    right: np.ndarray  # (N,) bool: whether all targets are the most likely id
    norms: np.ndarray  # (L, N, 2) summed relative norms of the second attention's output; L = 0 if there is none
    positions: np.ndarray  # (N, 2) number of positions


def read(run: Run, condition: str, read_batches: Callable[[], Iterable], ends: np.ndarray) -> Reading:
    """Reads texts under a condition. Norms are only recorded in the intact model.

    read_batches: yields Batches, each with the slice of the texts that it holds. ends (N,): length of each text."""
    N, meta, found = len(ends), run.tokenizer.meta, []
    layers = run.model.cfg.n_layer if condition == INTACT and run.model.cfg.second.has_layer else 0
    with changed_attention(run.model, meta, condition), record_norms(run.model) as ratios:
        for rows, batch in read_batches():
            scores = score_batch(run.model, batch)
            B, T = batch.tokens.shape
            is_marker = batch.tokens == meta
            at = batch.scored_index if scores.targets.size(1) < T else torch.arange(T, device=is_marker.device)
            kind = is_marker.gather(1, at.expand(B, -1).clamp(max=T - 1))  # of the predicting position, (B, S)
            real = torch.arange(T) < torch.from_numpy(ends[rows])[:, None]
            real = real.to(is_marker.device)
            found.append((
                by_kind(scores.nats, kind), by_kind(scores.targets >= 0, kind),
                count_right(scores.targets, scores.right)[:, 0].cpu().numpy() > 0,
                np.stack([by_kind(ratio * real, is_marker) for ratio in ratios[:layers]])
                if layers else np.zeros((0, B, 2)),
                by_kind(real, is_marker),
            ))  # fmt: skip
    nats, targets, right, norms, positions = zip(*found, strict=True)
    reading = Reading(*map(np.concatenate, (nats, targets, right)), np.concatenate(norms, 1), np.concatenate(positions))
    assert len(reading.nats) == N
    check_finite(run, reading.nats)
    return reading


def by_kind(values: torch.Tensor, is_marker: torch.Tensor) -> np.ndarray:
    """Returns the sums (B, 2) of values (B, S) over ordinary positions and over markers."""
    values, is_marker = values.cpu().double(), is_marker.cpu()
    return torch.stack([(values * ~is_marker).sum(1), (values * is_marker).sum(1)], dim=1).numpy()


def measure(run: Run, cell: dict, conditions: list[str], read_batches: Callable, ends: np.ndarray) -> list[dict]:
    """Returns one line for each condition and kind of tokens, and one for each layer and kind of positions with the
    norm. Prints a row for each condition."""
    started = time.perf_counter()
    intact = read(run, INTACT, read_batches, ends)
    lines = norm_lines(cell, intact)
    for line in lines:
        line["seconds"] = (time.perf_counter() - started) / len(lines)
    for condition in conditions:
        started = time.perf_counter()
        mine = difference_lines(cell, condition, intact, read(run, condition, read_batches, ends))
        seconds = time.perf_counter() - started
        said = "  ".join(f"{line['tokens']} {line['difference']:+.4f}" for line in mine)
        write(f"  {condition:<14}  {said} nats  {seconds:.1f} s\n")
        lines += [{**line, "seconds": seconds / len(mine)} for line in mine]
    return lines


def difference_lines(cell: dict, condition: str, intact: Reading, changed: Reading) -> list[dict]:
    """Returns the lines about the loss under a condition: apart for the kinds of tokens that predict, or in task texts
    one about the answers."""
    lines, N = [], len(intact.nats)
    answers = cell["text"] == "tasks"
    for tokens in ("answers",) if answers else KINDS:
        columns = slice(None) if answers else slice(KINDS.index(tokens), KINDS.index(tokens) + 1)
        before, after = (of.nats[:, columns].sum(1) for of in (intact, changed))
        targets = intact.targets[:, columns].sum(1)
        unit = np.ones(N) if answers else targets
        if not unit.sum():
            continue
        lines.append({
            **cell, "kind": "difference", "condition": condition, "tokens": tokens, "targets": int(targets.sum()),
            "nats_intact": float(before.sum() / unit.sum()), "nats": float(after.sum() / unit.sum()),
            "difference": float((after - before).sum() / unit.sum()),
            "difference_interval": clustered_ratio(after - before, unit),
        })  # fmt: skip
    if answers:
        hits = int(changed.right.sum())
        lines[0] |= {
            "exact_intact": float(intact.right.mean()), "exact": hits / N, "interval": wilson(hits, N),
            **paired_claim("lost", CLAIMS["lost"], intact.right, changed.right),
            "outcomes": "".join(map(str, changed.right.astype(int))),
        }  # fmt: skip
    return lines


def norm_lines(cell: dict, intact: Reading) -> list[dict]:
    """Returns the lines about the norm of the second attention's output, for the kinds of positions that it changes."""
    lines = []
    for layer, norms in enumerate(intact.norms):
        for tokens, sums, counts in zip(KINDS, norms.T, intact.positions.T, strict=True):
            if sums.any():
                lines.append({
                    **cell, "kind": "norm", "layer": layer, "tokens": tokens, "positions": int(counts.sum()),
                    "norm": float(sums.sum() / counts.sum()), "norm_interval": clustered_ratio(sums, counts),
                })  # fmt: skip
    return lines
