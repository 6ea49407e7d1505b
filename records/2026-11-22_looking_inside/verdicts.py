"""The record's tables and pictures, from its lines.

python records/2026-11-22_looking_inside/verdicts.py"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

COMMIT = "8fa93a5"  # the code that made this record; nothing of today's is imported
then = tempfile.TemporaryDirectory()
code = subprocess.run(["git", "archive", COMMIT], cwd=Path(__file__).parents[2], capture_output=True, check=True).stdout
subprocess.run(["tar", "-x", "-C", then.name], input=code, check=True)
sys.path.insert(0, then.name)

from probes.calls import SECTIONS
from probes.drawing import positions_picture
from probes.look_drawing import attention_picture, patching_picture, residual_picture
from probes.rate_drawing import rate_picture
from reports.probes import latest
from stats import DECIDES

PICTURES = {
    "attention": attention_picture,
    "patching": patching_picture,
    "residual": residual_picture,
    "rate_distortion": rate_picture,
    "positions": positions_picture,
}

RUNS = ("meta_128", "pause_128", "causal2_128")
PLACEMENTS = ("target", "every", "none", "background")


def lines(probe: str, run: str, **asked) -> list[dict]:
    rows = Path(__file__).with_name(f"{probe}_{run}.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, rows) if all(line.get(name) == value for name, value in asked.items())]


def told(value: float, interval: list[float], scale: float = 1, digits: int = 2) -> str:
    value, low, high = (scale * x for x in (value, *interval))
    return f"{value:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f})"


def points(value: float, interval: list[float]) -> str:
    return told(value, interval, 100, 1)


def counted(verdicts: list[str]) -> str:
    return "; ".join(f"{verdicts.count(name)} {name}" for name in sorted(set(verdicts)))


def key(line: dict) -> tuple[str, str]:
    """The placement of a curve, or comparison, and the state that is not the mark's."""
    return line["placement"], line["states"][1] if "states" in line else line["state"]


def row(*cells) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def head(title: str, *cells: str) -> None:
    print(f"\n{title}\n")
    row(*cells)
    row(*["---"] * len(cells))


head(
    "Sharpening: mean over the heads of an attention, as trained against zeroed",
    "run", "attention", "placement", "boost", "verdict", "drop, nats", "verdict", "heads: drop", "boost at the mark",
    "at the answer", "condition holds", "predicted drop",
)  # fmt: skip
for run in RUNS:
    for placement in PLACEMENTS:
        of = lines("attention", run, task="list_recall", placement=placement)
        for pooled in (line for line in of if line["layer"] is None):
            which = pooled["attention"]
            heads = [line["drop_verdict"] for line in of if line["attention"] == which and line["layer"] is not None]
            rest = [pooled.get(name) for name in ("boost_mark", "boost_answer", "applies", "predicted")]
            row(
                run, which, placement, told(pooled["boost"], pooled["boost_interval"]), pooled["boost_verdict"],
                told(pooled["drop"], pooled["drop_interval"]), pooled["drop_verdict"], counted(heads),
                *("" if value is None else f"{value:+.3f}" for value in rest),
            )  # fmt: skip

head(
    "Cache: answers in % where a place has another text's state; the layer in which most become the other text's",
    "run", "placement", "place", "layer", "the text's own", "without a patch", "the other's", "carried, points",
    "verdict", "lost most, points", "in layer", "verdict",
)  # fmt: skip
for run in RUNS:
    for placement in ("target", "none", "background"):
        of = lines("patching", run, task="list_recall", placement=placement)
        for site in dict.fromkeys(line["site"] for line in of):
            here = [line for line in of if line["site"] == site]
            most = max(here, key=lambda line: line["carried"])
            least = max(here, key=lambda line: line["needed"])
            row(
                run, placement, site, most["layer"],
                *(f"{100 * most[name]:.1f}" for name in ("kept", "kept_unpatched", "donor")),
                points(most["carried"], most["carried_interval"]), most["carried_verdict"],
                points(least["needed"], least["needed_interval"]), least["layer"], least["needed_verdict"],
            )  # fmt: skip

head(
    "Summary: tokens decoded in the last layer, in %, and how much more from the mark than from the word in its place",
    "run", "placement", "back", "mark", "word", "ordinary", "commonest", "most more, points", "in layer", "verdict",
    "all layers",
)  # fmt: skip
for run in RUNS:
    for placement in ("target", "background"):
        of = lines("residual", run, task="list_recall", placement=placement)
        last = max(line["layer"] for line in of)
        for distance in dict.fromkeys(line["distance"] for line in of):
            here = [line for line in of if line["distance"] == distance]
            more = [line for line in here if "more" in line]
            most = max(more, key=lambda line: line["more"])
            final = {line["place"]: line for line in here if line["layer"] == last}
            row(
                run, placement, distance,
                *(f"{100 * final[place]['decoded']:.1f}" for place in ("mark", "word", "ordinary")),
                f"{100 * final['mark']['majority']:.1f}", points(most["more"], most["more_interval"]), most["layer"],
                most["more_verdict"], counted([line["more_verdict"] for line in more]),
            )  # fmt: skip

head(
    "Rate-distortion: nats left of the answer, least over ten betas, and the mark less others at equal rates",
    "run", "probe", "placement", "state", "found", "least D", "at rate", "constant", "H(Y)", "mark less this state",
    "up to R", "verdict",
)  # fmt: skip
for run in RUNS:
    for wide in (False, True):
        of = [line for line in lines("rate_distortion", run) if ("--z_dim" in line["command"]) == wide]
        curves = {key(line): line for line in of if line["kind"] == "curve" and line["target"] == "answer"}
        compared = {key(line): line for line in of if line["kind"] == "comparison"}
        for (placement, state), line in curves.items():
            best = min(line["points"], key=lambda point: point["distortion"])
            beside = ("", "", "")
            if pair := compared.get((placement, state)):
                less = told(pair["difference"], pair["difference_interval"], digits=3)
                beside = less, f"{pair['up_to']:.2f}", pair["verdict"]
            row(
                run, "wide" if wide else "default", placement, state, "yes" if line["found"] else "nothing",
                *(f"{x:.3f}" for x in (best["distortion"], best["rate"], line["cross_entropy"], line["entropy"])),
                *beside,
            )  # fmt: skip

head(
    "The same of the token 1 and 4 back from each state, with target", "run", "state", "back", "found", "least D",
    "at rate", "constant", "H(Y)",
)  # fmt: skip
for run in RUNS:
    for line in lines("rate_distortion", run, kind="curve"):
        if line["target"].startswith("back"):
            best = min(line["points"], key=lambda point: point["distortion"])
            row(
                run, line["state"], line["target"][5:], "yes" if line["found"] else "nothing",
                *(f"{x:.3f}" for x in (best["distortion"], best["rate"], line["cross_entropy"], line["entropy"])),
            )  # fmt: skip

head(
    "Position: exact answers in %, and points more than as trained", "run", "placement", "length", "condition", "exact",
    "more, points", "verdict",
)  # fmt: skip
for run in RUNS:
    for line in lines("positions", run, task="list_recall"):
        change = (
            (points(line["difference"], line["difference_interval"]), line["verdict"])
            if "verdict" in line
            else ("", "")
        )
        row(run, line["placement"], line["length"], line["condition"], f"{100 * line['exact']:.1f}", *change)

print(f"\nAll verdicts: n = {DECIDES} texts or more, Holm over the comparisons of one probe on one run.")

for run in RUNS:
    for probe, picture in PICTURES.items():
        shown = [line for line in lines(probe, run, task="list_recall") if "--z_dim" not in line["command"]]
        Path(__file__).with_name(f"{probe}_{run}.png").write_bytes(picture(latest(SECTIONS[probe], shown)))
