"""Reads the records of training in metrics.jsonl and config.json, and builds the section with the curves of the
runs."""

import bisect
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from nanometa.common.errors import UserError
from nanometa.reports.drawing import COLOURS, DASHES, Line2D, legend, png, wrapped
from nanometa.reports.markup import escaped, table

METRICS, CONFIG = "metrics.jsonl", "config.json"


@dataclass(frozen=True)
class Metrics:
    """A run's config.json, and its metrics.jsonl by kinds of lines."""

    folder: Path
    facts: dict  # config.json: config, data, environment
    train: list[dict]
    val: list[dict]
    final: list[dict]
    guard: list[dict]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def tasks(self) -> list[str]:
        """Returns the tasks of the run's evaluations, none for a run on text."""
        return [key.removeprefix("exact_") for key in (self.val or [{}])[-1] if key.startswith("exact_")]

    def text(self) -> tuple:
        """Returns a key that is equal for runs validated on the same text, or on task texts made in the same way."""
        data, task = self.facts["data"], self.facts.get("config", {}).get("task", {})
        if self.tasks:
            names = ("train_length", "level", "placements", "question")
            return data.get("tokenizer"), *(str(task.get(name)) for name in names)
        hashes = data.get("content_sha256") or {}
        return tuple(hashes.get(split, data.get("dataset")) for split in ("train", "val"))

    @cached_property
    def clock(self) -> tuple[list[int], list[float]]:
        """Returns the steps of the log and the seconds from the start, with evaluations but without the time between a
        stop and a resume; both empty if no line records it."""
        timed = [(line["step"], line["elapsed_s"]) for line in self.train if "elapsed_s" in line]
        steps, seconds, total, before = [], [], 0.0, 0.0
        for step, elapsed in timed:
            total += before if elapsed < before else 0.0  # the clock restarts after a resume
            before = elapsed
            steps.append(step)
            seconds.append(total + elapsed)
        return steps, seconds

    def seconds(self, step: int) -> float | None:
        """Returns the seconds from the start to the last log line before or at a step; None if no line records them."""
        steps, seconds = self.clock
        at = bisect.bisect_right(steps, step)
        return None if not steps else seconds[at - 1] if at else 0.0


def read_run(folder: Path) -> Metrics:
    """Returns the record of a run. Leaves out losses that were not finite, and a last line without a newline, which is
    still being written or was cut short by a kill. Raises UserError, naming file and line, for a damaged line."""
    try:
        facts = json.loads((folder / CONFIG).read_text())
        facts["data"].items()
        rows = [row for row in (folder / METRICS).read_text().splitlines(keepends=True) if row.endswith("\n")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} has no readable metrics ({type(error).__name__}: {error}): give folders of runs, as out/NAME."
        ) from error
    metrics: dict[str, list[dict]] = {"train": [], "val": [], "final": [], "guard": []}
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
            numbers = [value for name, value in line.items() if name not in ("kind", "what", "why", "windows")]
            if not all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in numbers):
                raise ValueError("a value is no number")
            if type(line["step"]) is not int:
                raise ValueError(f"step is {line['step']!r}")
            if line.get("loss", 0) is not None:
                metrics[line["kind"]].append(line)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / METRICS}, line {number} was not written by train.py ({type(error).__name__}: {error}): "
                f"remove it."
            ) from error
    return Metrics(folder, facts, **metrics)


def smooth(values: list[float], share: float = 0.05) -> np.ndarray:
    """Returns the mean over a centered window of `share` of the points, which shows the curve behind the noise."""
    width = int(len(values) * share) | 1  # odd, so that the window has a center
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


# ----------------------------------------------------------------------------- curves


def draw_losses(axes, run: Metrics, of: str, look: dict) -> None:
    """Draws the training loss of a run. `of` names the horizontal axis: step, content_tokens or minutes."""
    x, losses = points(run, "train", of, "loss")
    axes.plot(x, losses, **{**look, "alpha": 0.25, "linewidth": 0.8, "label": None})
    axes.plot(x, smooth(losses) if losses else [], **look)


def draw_values(axes, run: Metrics, of: str, key: str, look: dict) -> None:
    """Draws a figure of a run's evaluations, if they have it."""
    x, values = points(run, "val", of, key)
    if values:
        axes.plot(x, values, marker="o", markersize=3, **look)


def draw_packed(axes, run: Metrics) -> None:
    """Draws the bits per byte of gzip and xz on the same text."""
    packed = run.facts["data"].get("val_text_compressed") or {}
    for name, key in (("gzip -9", "gzip_9_bits_per_byte"), ("xz", "xz_bits_per_byte")):
        if key in packed:
            axes.axhline(packed[key], color="grey", linestyle="--", linewidth=0.8)
            axes.text(1, packed[key], f"{name} ", va="bottom", ha="right", color="grey",
                      transform=axes.get_yaxis_transform())  # fmt: skip


def points(run: Metrics, kind: str, of: str, key: str) -> tuple[list[float], list[float]]:
    lines = [line for line in getattr(run, kind) if key in line and (of == "minutes" or of in line)]
    if of == "minutes":
        x = [run.seconds(line["step"]) for line in lines]
        known = [(at / 60, line[key]) for at, line in zip(x, lines, strict=True) if at is not None]
        return [at for at, _ in known], [value for _, value in known]
    return [line[of] for line in lines], [line[key] for line in lines]


# ----------------------------------------------------------------------------- the section

AXES = {"content_tokens": "content tokens", "minutes": "minutes, with evaluations", "step": "steps"}


def curves(figure: Figure, runs: list[Metrics], looks: dict, of: str, key: str, title: str, unit: str) -> None:
    """Draws one panel: the training loss, or a figure of the evaluations, of all runs."""
    axes = figure.subplots()
    for run in runs:
        look = {**looks[run.folder], "label": None}
        draw_losses(axes, run, of, look) if key == "loss" else draw_values(axes, run, of, key, look)
    if key == "bits_per_byte":
        draw_packed(axes, runs[0])
    if key.startswith("exact_"):
        axes.set_ylim(-0.03, 1.03)
    axes.set(title=wrapped(title), xlabel=AXES[of], ylabel=unit)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, [Line2D([], [], **looks[run.folder]) for run in runs])


def body(page, runs: list[Metrics]) -> str:
    """Returns the section: for each group of runs validated on the same texts, one picture for each figure, and a table
    of final values."""
    groups: dict[tuple, list[Metrics]] = {}
    for run in runs:
        groups.setdefault((bool(run.tasks), *run.text()), []).append(run)
    out = ""
    for number, of in enumerate(groups.values(), 1):
        tasks = list(dict.fromkeys(task for run in of for task in run.tasks))
        panels = [("step", f"exact_{task}", task.replace("_", " "), "share of exact answers") for task in tasks]
        panels = panels or [(x, "bits_per_byte", "validation", "bits per byte") for x in ("content_tokens", "minutes")]
        panels += [(x, "loss", "training loss", "nats per scored token")
                   for x in (("step",) if tasks else ("content_tokens", "minutes"))]  # fmt: skip
        looks = looks_of(of)
        figures = [_picture(page, number, of, looks, *panel) for panel in panels if _has(of, *panel)]
        out += f"<h3>{escaped(heading(of))}</h3>\n<div>{''.join(figures)}</div>\n{_ends(page, of, tasks)}"
    apart = "<p>Runs whose texts differ have axes of their own.</p>\n" if len(groups) > 1 else ""
    return f"""<h2 id="training">Training</h2>
<p>Curves recorded during training. For runs on text, validation uses windows spread evenly over the split, and
"at the end" the whole split. The training loss is smoothed over a twentieth of the run; the pale line is the loss as
recorded.</p>
{apart}{out}"""


def looks_of(runs: list[Metrics]) -> dict[Path, dict]:
    """Returns the look of each run in all pictures of a group, by its folder."""
    names = Counter(run.name for run in runs)
    return {
        run.folder: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
            "label": run.name if names[run.name] == 1 else str(run.folder),
        }
        for i, run in enumerate(runs)
    }


def heading(runs: list[Metrics]) -> str:
    """Returns a heading that names the validation texts of a group of runs."""
    data, task = runs[0].facts["data"], runs[0].facts.get("config", {}).get("task", {})
    if runs[0].tasks:
        placed = ", ".join(task.get("placements") or ["?"])
        return f"On tasks: texts of at most {task.get('train_length')} positions, level {task.get('level')}, {placed}"
    hashes = data.get("content_sha256") or {}
    known = ", ".join(f"{split} {hashes[split][:8]}" for split in ("train", "val") if split in hashes)
    folders = ", ".join(dict.fromkeys(str(run.facts["data"].get("dataset", "unknown")) for run in runs))
    return f"On text: {folders}{f', of the content {known}' if known else ''}"


def _has(runs: list[Metrics], of: str, key: str, *_) -> bool:
    return any(points(run, "train" if key == "loss" else "val", of, key)[0] for run in runs)


def _picture(page, number: int, runs: list[Metrics], looks: dict, of: str, key: str, title: str, unit: str) -> str:
    content = png(curves, runs, looks, of, key, title, unit)
    what = f"{title} by {AXES[of]}: {', '.join(run.name for run in runs)}; how they ended is in the table below"
    return page.picture(f"training_{number}_{key}_{of}.png", what, content, [used(run) for run in runs])


def used(run: Metrics) -> dict:
    """Returns the facts of a run for a caption, in the form of a line."""
    where = run.facts.get("environment", {})
    return {
        "command": where.get("command", f"train.py, {run.folder}"),
        "seed": run.facts.get("config", {}).get("seed", "unknown"),
        "machine": f"{where['processor']}, {where['cores']} cores" if {"processor", "cores"} <= where.keys() else "",
    }


def _ends(page, runs: list[Metrics], tasks: list[str]) -> str:
    rows = []
    for run in runs:
        last = (run.final or run.val or [{}])[-1]
        whole = "yes" if run.final else "no"
        data = run.facts["data"].get("dataset", "")
        values = [_percent(last.get(f"exact_{task}")) for task in tasks] or [_number(last.get("bits_per_byte"))]
        rows.append([run.name, used(run)["seed"], data, last.get("step", ""), *values, _number(last.get("loss")),
                     f"{last['tokens']:,}" if "tokens" in last else "", whole, len(run.guard) or "",
                     page.links([used(run)["command"]])])  # fmt: skip
    names = [f"{task.replace('_', ' ')}, %" for task in tasks] or ["bits per byte"]
    head = ["run", "seed", "dataset", "step", *names, "nats", "scored tokens", "at the end", "bad steps", "command"]
    return table(head, {"": rows}, (0, 2, len(head) - 3, len(head) - 1))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
