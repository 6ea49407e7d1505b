"""Builds the section of probe.py rate_distortion, whose lines are curves and comparisons of two curves."""

from nanometa.reports import table_sections as sections
from nanometa.reports.lines import CELL, NUMBER, check_choices, check_facts, check_fields
from nanometa.reports.page import Page, Section
from nanometa.reports.paper import DISTORTION, GUESSING
from nanometa.reports.rate_pictures import LOOKS, draw_rates
from nanometa.reports.table_sections import WHERE, Column, claim, rows

TITLE = "Rate and distortion of hidden states"
ABOUT = (
    "A variational bottleneck is trained on each state at several prices of its rate, and measured in nats on texts "
    "that no probe has seen. The code tells at most its rate R about the state, and the distortion D is the "
    "cross-entropy of the target. By the converse no code of rate R has a distortion below H(Y) − R. The decisive "
    "figure is the difference of two states of the same texts at equal rates: below 0, the first has less distortion. "
    '"No bottleneck" is the same probe without noise and with a rate that costs nothing; it is not a bound. "Nothing '
    'found" means that no point is below both H(Y) and the constant: this probe did not find the target, which the '
    "state may still contain. The constant is the cross-entropy under the class frequencies of the training texts. "
    f"The paper's bottlenecks, trained on 50 texts, have distortions of {DISTORTION[0]:.1f} to {DISTORTION[1]:.2f} "
    f"nats, where guessing among all ids has ln 50257 = {GUESSING:.2f}. Intervals are over texts and probe seeds. "
    "Verdicts are about this checkpoint, not about its arm."
)
TEXTS = ("task", "placement", "level", "question", "length", "layer", "target")
SHARED = {name: CELL[name] for name in ("task", "placement", "level", "question", "length", "n")} | {
    "kind": (str,), "layer": (int,), "target": (str,), "entropy": NUMBER, "probe_seeds": (int,),
}  # fmt: skip
CURVE = SHARED | {
    "state": (str,), "uniform": NUMBER, "cross_entropy": NUMBER, "floor": NUMBER, "points": (list,),
    "ceiling": (dict,), "shuffled": (dict,), "violations": (int,), "train_texts": (int,),
    "found": (bool,),
}  # fmt: skip
COMPARISON = SHARED | {
    "states": (list,), "up_to": NUMBER, "difference": NUMBER, "difference_interval": (list,), "holm": NUMBER,
    "verdict": (str,),
}  # fmt: skip
POINT = {
    "rate": NUMBER, "distortion": NUMBER, "rate_interval": (list,), "distortion_interval": (list,),
    "violates_converse": (bool,),
}  # fmt: skip
KINDS = {"curve": CURVE, "comparison": COMPARISON}


def check(line: dict) -> None:
    """Raises ValueError, with the reason, for a damaged line."""
    check_choices(line, {"kind": KINDS})
    check_facts(line, KINDS[line["kind"]])
    if line["kind"] == "comparison":
        if len(line["states"]) != 2:
            raise ValueError(f"states is {str(line['states'])[:40]!r}")
        return
    check_choices(line, {"state": LOOKS})
    if not line["points"] or not all(isinstance(point, dict) for point in line["points"]):
        raise ValueError(f"points is {str(line['points'])[:40]!r}")
    for point in line["points"]:
        check_fields(point, POINT)
    for name in ("ceiling", "shuffled"):
        check_fields(line[name], {"distortion": NUMBER})


def key(line: dict) -> tuple:
    return *sections.weights_of(line), *(line[name] for name in TEXTS), str(line.get("states", line.get("state")))


def best(line: dict) -> dict:
    """Returns the point with the least distortion."""
    return min(line["points"], key=lambda point: point["distortion"])


def nats(value: float) -> str:
    return f"{value:.3f}"


def _nats(name: str, value) -> Column:
    return Column(name, lambda line: nats(value(line)))


PLACE = (
    *WHERE,
    Column("layer", lambda line: line["layer"]),
    Column("target", lambda line: line["target"].replace("_", " "), text=True),
)
ENDS = (Column("probe seeds", lambda line: line["probe_seeds"]), Column("n", lambda line: line["n"]))
CURVES = (
    *PLACE,
    Column("state", lambda line: line["state"], text=True),
    Column("found", lambda line: "yes" if line["found"] else "nothing", text=True),
    _nats("least D", lambda line: best(line)["distortion"]),
    Column("95 %", lambda line: " .. ".join(map(nats, best(line)["distortion_interval"]))),
    _nats("at rate", lambda line: best(line)["rate"]),
    _nats("no bottleneck", lambda line: line["ceiling"]["distortion"]),
    _nats("shuffled", lambda line: line["shuffled"]["distortion"]),
    _nats("constant", lambda line: line["cross_entropy"]),
    _nats("H(Y)", lambda line: line["entropy"]),
    _nats("ln K", lambda line: line["uniform"]),
    Column("points below the converse", lambda line: line["violations"]),
    Column("trained on", lambda line: line["train_texts"]),
    *ENDS,
)
COMPARISONS = (
    *PLACE,
    Column("states", lambda line: " − ".join(map(str, line["states"])), text=True),
    _nats("up to R", lambda line: line["up_to"]),
    *claim("D at equal R, nats", "difference", "{:+.3f}".format, ""),
    *ENDS,
)


def body(page: Page, lines: list[dict]) -> str:
    curves, comparisons = (of_kind(lines, kind) for kind in KINDS)
    tables = rows(page, curves, CURVES)
    if comparisons:
        tables += f"<h3>At equal rates</h3>\n{rows(page, comparisons, COMPARISONS)}"
    return sections.section_body(page, "rate_distortion", TITLE, ABOUT, curves, TEXTS, draw_rates, tables)


def of_kind(lines: list[dict], kind: str) -> list[dict]:
    return [line for line in lines if line["kind"] == kind]


def picture(lines: list[dict]) -> bytes:
    return sections.checkpoint_picture(of_kind(lines, "curve"), TEXTS, draw_rates)


def terminal(lines: list[dict]) -> str:
    """Returns text for a terminal: the table of the curves, the points that no probe can reach, and the comparisons."""
    curves = of_kind(lines, "curve")
    below = [
        f"{line['target']} from {line['state']}, layer {line['layer']}, beta {point['beta']:.4g}: BELOW THE CONVERSE "
        f"by more than {point['converse_tolerance']:.3f}"
        for line in curves for point in line["points"] if point["violates_converse"]
    ]  # fmt: skip
    tables = [sections.terminal_table(curves, CURVES)] if curves else []
    return "\n".join([*tables, *below, *map(compared, of_kind(lines, "comparison")), KEY])


KEY = (
    "All in nats. The code tells at most its rate R about the state; distortion D is the cross-entropy of the "
    "target. constant: by the class frequencies of the training texts. shuffled: trained on other texts' targets. no "
    "bottleneck: the same probe without noise and with a rate that costs nothing; it is not a bound. Intervals are "
    "95 % over texts and probe seeds, and are about this run, not its arm."
)


def compared(line: dict) -> str:
    """Returns the difference between two curves as text for a terminal."""
    first, second = line["states"]
    where = f"{line['task']}, {line['placement']}, {line['length']} positions, layer {line['layer']}"
    head = f"{where}: D of {first} minus D of {second} at equal R"
    if not any(line["found"]):
        return f"{head}\n  {line['verdict']}"
    at = "  ".join(
        f"{rate:g}: not reached" if of is None else "{:g}: {:+.3f} ({:+.3f} .. {:+.3f})".format(rate, *of)
        for rate, of in zip(line["rates"], line["differences"], strict=True)
    )
    low, high = line["difference_interval"]
    return (
        f"{head}\n  {at}\n  mean up to R = {line['up_to']:.2f} of H = {line['entropy']:.2f}: {line['difference']:+.3f} "
        f"({low:+.3f} .. {high:+.3f}), p {line['p']:.3g}, Holm {line['holm']:.3g}; {first} has less distortion by more "
        f"than {line['effect']:g}: {line['verdict']}"
    )


SECTION = Section("rate_distortion", check, key, body, picture, terminal)
