"""Reads the records of training in metrics.jsonl and config.json, draws the curves, and builds their section."""

import bisect
import datetime
import math
import statistics
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from nanometa.common.errors import UserError, printable
from nanometa.common.files import own_file, parse_json, read_json, read_json_lines
from nanometa.config.arms import SECOND_ATTENTIONS, arm_label
from nanometa.config.checks import similar_name
from nanometa.config.tasks import TASKS, cells_of
from nanometa.reports.drawing import COLOURS, DASHES, GREY, arm_looks, key, legend, png, wrapped
from nanometa.reports.lines import NUMBER, apart, check_numbers, told_apart
from nanometa.reports.markup import details, escaped, percent, table

METRICS, CONFIG = "metrics.jsonl", "config.json"
# what is shown of config.json; a run of an earlier version may lack any of it
FACTS = {
    "arm": (str,),
    "config": {
        "seed": (int,),
        "model": {
            "n_embd": (int,), "n_inner": (int,), "block_size": (int,), "second_attention": (str,), "position": (str,),
        },
        "task": {"train_length": (int,), "level": (str,), "question": (str,), "placements": [str]},
    },
    "data": {
        "dataset": (str,), "tokenizer": (str,), "chunk_markers": (int,),
        "content_sha256": {"train": (str,), "val": (str,)},
        "val_text_compressed": {"gzip_9_bits_per_byte": NUMBER, "xz_bits_per_byte": NUMBER},
    },
    "environment": {"processor": (str,), "cores": (int,), "command": (str,)},
}  # fmt: skip
LONGEST = 1e12  # seconds; longer times are damage, and cannot be printed as days


@dataclass(frozen=True)
class Metrics:
    """A run's config.json, and its metrics.jsonl by kinds of lines."""

    folder: Path
    facts: dict  # config.json, as far as FACTS names it: config, data, environment
    train: list[dict]
    val: list[dict]
    final: list[dict]
    guard: list[dict]
    stop_at: list[dict]

    @property
    def name(self) -> str:
        return printable(self.folder.resolve().name)

    @property
    def arm(self) -> str:
        """Returns the arm and its kind of positions, such as "meta + rope"; the run's name if the record lacks them."""
        model = self.facts["config"]["model"]
        if not {"n_embd", "second_attention", "position"} <= model.keys():
            return self.name
        if "arm" in self.facts:
            return f"{self.facts['arm']} + {model['position']}"
        wide = model.get("n_inner") not in (None, 4 * model["n_embd"])
        second = SECOND_ATTENTIONS[model["second_attention"]]
        return f"{arm_label(second, wide, bool(self.facts['data'].get('chunk_markers')))} + {model['position']}"

    @property
    def seed(self) -> int | str:
        return self.facts["config"].get("seed", "unknown")

    @property
    def tasks(self) -> list[str]:
        """Returns the tasks of the run's evaluations, none for a run on text."""
        shown = [name.removeprefix("exact_") for name in (self.val or [{}])[-1] if name.startswith("exact_")]
        return [name for name in shown if name in TASKS]  # the others are figures by placement

    @property
    def last(self) -> dict:
        """Returns the evaluation of the whole split at the end, or else the last one; {} before the first."""
        return (self.final or self.val or [{}])[-1]

    @property
    def text(self) -> tuple:
        """Returns a key that is equal for runs validated on the same text, or on task texts made in the same way."""
        data, task = self.facts["data"], self.facts["config"]["task"]
        if self.tasks:
            names = ("train_length", "level", "placements", "question")
            return data.get("tokenizer"), *(str(task.get(name)) for name in names)
        hashes = data["content_sha256"]
        return tuple(hashes.get(split, data.get("dataset")) for split in ("train", "val"))

    @property
    def used(self) -> dict:
        """Returns the facts of the run for a caption, in the form of a line."""
        where = self.facts["environment"]
        machine = f"{where['processor']}, {where['cores']} cores" if {"processor", "cores"} <= where.keys() else ""
        command = where.get("command", f"train.py, {self.folder}")
        return {"command": command, "seed": self.seed, "machine": machine}

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

    def points(self, kind: str, of: str, name: str) -> list[tuple[float, float]]:
        """Returns a figure of the lines of one kind by step, content_tokens or minutes."""
        lines = [line for line in getattr(self, kind) if name in line]
        if of == "minutes":
            timed = [(self.seconds(line["step"]), line[name]) for line in lines]
            return [(at / 60, value) for at, value in timed if at is not None]
        return [(line[of], line[name]) for line in lines if of in line]


def require_folder(folder: Path) -> None:
    """Raises UserError for a folder that does not exist. The error names the run beside it with the most similar
    name."""
    if not folder.is_dir():
        beside = [path.parent.name for path in folder.parent.glob(f"*/{CONFIG}")]
        close = similar_name(folder.name, beside)
        what = f"did you mean {str(folder.parent / close)!r}?" if close else "give folders of runs, such as out/NAME."
        raise UserError(f"there is no folder {folder}: {what}")


def read_run(folder: Path) -> Metrics:
    """Returns the record of a run. Leaves out losses that were not finite, and a last line without a newline. Raises
    UserError, naming file and line, for a damaged file."""
    require_folder(folder)
    try:
        facts = known(read_json(own_file(folder / CONFIG)), FACTS)
        arm = facts["config"]["model"].get("second_attention", "none")
        if arm not in SECOND_ATTENTIONS:
            raise ValueError(f"second_attention is {arm[:40]!r}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no readable metrics ({CONFIG}: {error}): give folders of runs, such as out/NAME."
        ) from error
    kinds = {kind: [] for kind in ("train", "val", "final", "guard", "stop_at")}

    def check(line: dict) -> None:
        numbers = {name: value for name, value in line.items() if name not in ("kind", "what", "why", "windows")}
        if not all(value is None or type(value) in NUMBER for value in numbers.values()):
            raise ValueError("a value is not a number")
        check_numbers(numbers)
        if any(name.endswith("_s") and value is not None and abs(value) > LONGEST for name, value in numbers.items()):
            raise ValueError("a time is too long")
        if not all(name.isidentifier() for name in line):  # some are parts of the names of pictures
            raise ValueError("the name of a value is no word")
        if type(line["step"]) is not int or line["step"] < 0 or line["kind"] not in list(kinds):
            raise ValueError(f"step is {line['step']!r}, kind is {str(line['kind'])[:40]!r}")

    for line in read_json_lines(own_file(folder / METRICS), check, "train.py", growing=True):
        if line.get("loss", 0) is not None:
            kinds[line["kind"]].append({name: value for name, value in line.items() if value is not None})
    return Metrics(folder, facts, **kinds)


def known(value, parts):
    """Returns the known parts of a value from a file. Dictionaries have all known parts that are dictionaries, and
    unprintable characters are escaped.

    parts: the types of a value, or [type] for a list, or a dictionary of parts, each of which may be missing or None.
    Raises ValueError for a value of another type."""
    if isinstance(parts, dict) and isinstance(value, dict):
        found = {name: {} if isinstance(part, dict) else None for name, part in parts.items()}
        found |= {name: value[name] for name in parts if value.get(name) is not None}
        return {name: known(of, parts[name]) for name, of in found.items() if of is not None}
    if isinstance(parts, list) and isinstance(value, list):
        return [known(item, tuple(parts)) for item in value]
    if not isinstance(parts, tuple) or type(value) not in parts:
        raise ValueError(f"{str(value)[:40]!r} has the wrong type")
    check_numbers(value)
    return printable(value) if type(value) is str else value


# ----------------------------------------------------------------------------- curves

FINAL = {"marker": "D", "markersize": 6, "fillstyle": "none", "linestyle": ""}  # the evaluation at the end of a run
AXES = {"content_tokens": "content tokens", "minutes": "minutes, with evaluations", "step": "steps"}


def groups_of(runs: list[Metrics]) -> list[list[Metrics]]:
    """Returns the runs in groups that are validated on the same texts and therefore share their axes."""
    return apart(runs, lambda run: (bool(run.tasks), *run.text))


def panels_of(runs: list[Metrics]) -> dict[str, tuple]:
    """Returns the arguments of `draw` for each picture of a group, by the picture's name."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    # runs on tasks are drawn by steps because tokens of their texts may be padding
    by = "step" if tasks else "content_tokens"
    panels = [(by, f"exact_{task}", task.replace("_", " "), "share of exact answers") for task in tasks]
    panels = panels or [(x, "bits_per_byte", "validation", "bits per byte") for x in (by, "minutes")]
    unit = "nats per scored token" if tasks else "nats per content token"
    found = {}
    for of, name, title, label in [*panels, (by, "loss", "training loss", unit)]:
        if any(run.points("train" if name == "loss" else "val", of, name) for run in runs):
            found[f"{name}_{of}"] = (runs, of, name, title, label)
    return found


def draw(figure: Figure, runs: list[Metrics], of: str, name: str, title: str, unit: str) -> None:
    """Draws one panel: the training loss, or a figure of the evaluations, of all runs. `of` names the horizontal axis:
    step, content_tokens or minutes."""
    axes, looks = figure.subplots(), looks_of(runs)
    for run in runs:
        style = looks[run.folder]
        if not (shown := run.points("train" if name == "loss" else "val", of, name)):
            continue
        x, values = zip(*shown, strict=True)
        if name == "loss":
            if smoothing(len(values)) > 1:
                axes.plot(x, values, color=style["color"], alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth(values), **style)
        else:
            axes.plot(x, values, marker="o", markersize=3, **style)
            for point in run.points("final", of, name):
                axes.plot(*point, color=style["color"], **FINAL)
    keys = [key(**look) for look in {look["label"]: look for look in looks.values()}.values()]
    if name != "loss" and any(run.points("final", of, name) for run in runs):
        keys.append(key("all texts" if runs[0].tasks else "whole split", **FINAL))
    packed = runs[0].facts["data"]["val_text_compressed"]
    for packer, field, style in (("gzip -9", "gzip_9_bits_per_byte", "--"), ("xz", "xz_bits_per_byte", ":")):
        if name == "bits_per_byte" and field in packed:
            axes.axhline(packed[field], color=GREY, linestyle=style, linewidth=1.2)
            keys.append(key(packer, linestyle=style, linewidth=1.2))
    if name.startswith("exact_"):
        axes.set_ylim(-0.03, 1.03)
    axes.set(title=wrapped(title), xlabel=AXES[of], ylabel=unit)
    axes.locator_params(axis="x", nbins=5)
    if of != "minutes":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, keys)


def smoothing(points: int) -> int:
    """Returns the width of the window that smooths so many points: a twentieth of them, and odd, so that the window has
    a center."""
    return points // 20 | 1


def smooth(values: list[float]) -> np.ndarray:
    """Returns the mean over a centered window of `smoothing` points, which removes most of the noise."""
    kernel = np.ones(smoothing(len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def looks_of(runs: list[Metrics]) -> dict[Path, dict]:
    """Returns the look of each run in all pictures of a group, by its folder. The seeds of an arm look alike. Labels
    name the arm, and what distinguishes runs of the same arm and seed."""
    facts = [(f"on {run.facts['data'].get('dataset', 'unknown data')}", run.name, printable(str(run.folder)))
             for run in runs]  # fmt: skip
    labels = told_apart([run.arm for run in runs], zip(*facts, strict=True), [run.seed for run in runs])
    colours = {label: look["color"] for label, look in arm_looks(labels).items()}
    dashes = {label: DASHES[i // len(COLOURS) % len(DASHES)] for i, label in enumerate(colours)}
    return {run.folder: {"color": colours[label], "linestyle": dashes[label], "label": label}
            for run, label in zip(runs, labels, strict=True)}  # fmt: skip


# ----------------------------------------------------------------------------- the section


def curves(page, runs: list[Metrics]) -> str:
    """Returns the pictures of all runs, with one heading for each group of runs validated on the same texts."""
    out = ""
    for number, group in enumerate(groups := groups_of(runs), 1):
        figures = []
        for name, panel in panels_of(group).items():
            what = f"{panel[3]} by {AXES[panel[1]]}: {', '.join(run.name for run in group)}"
            used = [run.used for run in group]
            figures.append(page.picture(f"training_{number}_{name}.png", what, png(draw, *panel), used))
        out += f"<div>{''.join(figures)}</div>\n<p class=small>{escaped(heading(group))}.</p>\n"
    apart = "<p>Runs validated on different texts have separate axes.</p>\n" if len(groups) > 1 else ""
    return f"""<h2 id="training">Training</h2>
{out}{apart}<p class="small">{" ".join(notes(runs))}</p>
{details("Runs in detail: end of training, speed and cost", costs(page, runs))}"""


def notes(runs: list[Metrics]) -> list[str]:
    """Returns sentences that explain the curves. Each is about marks that are drawn for these runs."""
    said = ["Curves were recorded during training."]
    if any(run.val for run in runs):
        said.append("Dots are evaluations on windows or texts spread evenly over the validation split.")
    if any(run.final for run in runs):
        said.append("A hollow diamond is the evaluation of the whole split at the end, which the tables give.")
    if any(smoothing(len(run.train)) > 1 for run in runs):
        said.append("The training loss is smoothed over a twentieth of the run; the pale line is the loss as recorded.")
    return said


def heading(runs: list[Metrics]) -> str:
    """Returns text that names what a group of runs was validated on."""
    task = runs[0].facts["config"]["task"]
    if runs[0].tasks:
        placed = ", ".join(task.get("placements") or ["?"])
        return f"On tasks: texts of at most {task.get('train_length')} positions, level {task.get('level')}, {placed}"
    folders = ", ".join(dict.fromkeys(str(run.facts["data"].get("dataset", "unknown")) for run in runs))
    sha256 = runs[0].facts["data"]["content_sha256"].get("val", "unknown")
    return f"On text: {folders} (content of the validation split: {sha256[:8]})"


def costs(page, runs: list[Metrics]) -> str:
    """Returns a table of what the runs reached and what they cost."""
    rows = []
    for run in runs:
        last, end = (run.train or [{}])[-1], run.last
        content = "texts" if run.tasks else "content_tokens"
        seconds = run.seconds(last.get("step", 0))
        after = sum(line.get("eval_s", 0) for line in run.val + run.final if line["step"] >= last.get("step", 0))
        rows.append([
            run.name, run.seed, run.facts["data"].get("dataset", ""), end.get("step", ""), reached(run),
            f"{end['loss']:.4f}" if "loss" in end else "–", f"{end['tokens']:,}" if "tokens" in end else "",
            len(run.guard) or "", parameters(run),
            f"{last[content]:,} {content.replace('_', ' ')}" if content in last else "",
            *(median(run, f"{name}_per_s") for name in (content, "positions")),
            "" if seconds is None else str(datetime.timedelta(seconds=round(seconds + after))),
            median(run, "mfu", "{:.1%}"), run.used["machine"], page.links([run.used["command"]]),
        ])  # fmt: skip
    head = ["run", "seed", "dataset", "step", "result", "nats", "scored tokens", "bad steps",
            "parameters", "content", "content/s", "positions/s", "wall time", "MFU", "machine", "command"]  # fmt: skip
    return f"""<p class="small">Rates are medians over the log and cover training only. Wall time runs from the first
step to the end, with evaluations and saves but without the time between a stop and a resume. Other load on the machine
is not known. MFU is given where the peak of the accelerator is known.</p>
{table(head, {"": rows}, (0, 2, 4, 9, 14, 15))}"""


def reached(run: Metrics) -> str:
    """Returns the main figures of a run's last evaluation as text."""
    shares = [f"{task.replace('_', ' ')} {percent(run.last[name])} %" for task in run.tasks
              if (name := f"exact_{task}") in run.last]  # fmt: skip
    cells = cells_of(run.last, run.tasks)
    if len(cells) > len(shares):
        lowest = min(cells, key=cells.get)
        shares.append(f"lowest: {lowest.replace('_', ' ')} {percent(cells[lowest])} %")
    bits = [f"{run.last['bits_per_byte']:.4f} bits per byte"] if "bits_per_byte" in run.last else []
    return ", ".join(shares or bits) or "–"


def parameters(run: Metrics) -> str:
    """Returns the number of parameters in the newest weights, with the position table; "" if there are no weights."""
    found = sorted(run.folder.glob("*_*/model.safetensors"))
    if not found:
        return ""
    try:
        with open(own_file(found[-1]), "rb") as file:
            head = parse_json(file.read(struct.unpack("<Q", file.read(8))[0]))
        shapes = [entry["shape"] for name, entry in head.items() if name != "__metadata__"]
        return f"{sum(map(math.prod, shapes)) / 1e6:.2f}M"
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        MemoryError,
        struct.error,
        UserError,
    ):
        return "damaged weights"


def median(run: Metrics, name: str, form: str = "{:,.0f}") -> str:
    values = [line[name] for line in run.train if name in line]
    return form.format(statistics.median(values)) if values else ""
