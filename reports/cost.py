"""Builds the section about the cost of runs: parameters, rates, time."""

import json
import math
import statistics
import struct

from nanometa.reports.markup import table
from nanometa.reports.training import Metrics, used


def body(page, runs: list[Metrics]) -> str:
    rows = []
    for run in runs:
        where, last = run.facts.get("environment", {}), (run.train or [{}])[-1]
        content = "texts" if run.tasks else "content_tokens"
        rate = [median(run, f"{name}_per_s") for name in (content, "positions")]
        evaluating = sum(line.get("eval_s", 0) for line in run.val + run.final)
        after = sum(line.get("eval_s", 0) for line in run.val + run.final if line["step"] >= last.get("step", 0))
        seconds = run.seconds(last.get("step", 0))
        rows.append([
            run.name, parameters(run), last.get("step", ""), count(last.get(content)), content.replace("_", " "),
            count(last.get("positions")), *rate, "" if seconds is None else duration(seconds + after),
            duration(evaluating), median(run, "mfu", "{:.1%}"), used(run)["machine"], where.get("threads", ""),
            where.get("torch", ""), page.links([used(run)["command"]]),
        ])  # fmt: skip
    head = ["run", "parameters", "steps", "content", "of", "positions", "content/s", "positions/s", "wall time",
            "of it evaluation", "MFU", "machine", "threads", "torch", "command"]  # fmt: skip
    return f"""<h2 id="cost">Cost</h2>
<p>Rates are medians over the log and cover training only. Wall time runs from the first step to the end, with
evaluations and saves but without the time between a stop and a resume. Other load on the machine is not known. MFU is
given where the peak of the accelerator is known.</p>
{table(head, {"": rows}, (0, 4, 11, 13, 14))}"""


def parameters(run: Metrics) -> str:
    """Returns the number of parameters in the newest weights, with the position table; "" if there are no weights."""
    found = sorted(run.folder.glob("*_*/model.safetensors"))
    if not found:
        return ""
    try:
        with open(found[-1], "rb") as file:
            head = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except (OSError, ValueError, struct.error, OverflowError, MemoryError):
        return "damaged weights"
    shapes = [entry["shape"] for name, entry in head.items() if name != "__metadata__"]
    return f"{sum(map(math.prod, shapes)) / 1e6:.2f}M"


def median(run: Metrics, name: str, form: str = "{:,.0f}") -> str:
    values = [line[name] for line in run.train if name in line]
    return form.format(statistics.median(values)) if values else ""


def count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
