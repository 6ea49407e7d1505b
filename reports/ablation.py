"""Builds the section of probe.py ablation, whose lines are differences of the loss, and norms by layer."""

from nanometa.common.statistics import too_few
from nanometa.reports.drawing import GREY, interval_line, key, legend, log_axis, look, png, tiled
from nanometa.reports.lines import CELL, NUMBER, apart, check_choices, check_facts, has_learned
from nanometa.reports.markup import details, escaped, points, text_table
from nanometa.reports.page import Page, Section
from nanometa.reports.table_sections import Column, claim, rows, unlearned, weights_of

TITLE = "Second attention and markers removed at inference"
ABOUT = (
    "The same weights read the same texts intact and under a condition. off: the second attention adds nothing. "
    "diagonal: each marker attends only to itself in the second attention, so that markers exchange nothing. hidden "
    "markers: ordinary tokens do not see markers in the causal attention. The difference is the loss under the "
    "condition minus the intact loss, in nats per token, apart for predictions made at ordinary tokens and at markers, "
    "or in nats per answer for task texts. Its interval is over paired windows or texts. Answers lost is the share of "
    "exact answers that the condition costs. The norm is that of what the second attention adds, relative to the "
    "residual stream. The figures are about these checkpoints, not about their arm."
)
CONDITIONS = {
    "off": "second attention off", "diagonal": "markers attend only to themselves",
    "hidden_markers": "markers hidden from ordinary tokens",
}  # fmt: skip
TOKENS = {
    "ordinary": "predictions at ordinary tokens", "markers": "predictions at markers", "answers": "answers",
}  # fmt: skip
ROWS = {"ordinary": "ordinary tokens", "markers": "markers"}
SHARED = {"kind": (str,), "text": (str,), "length": (int,), "n": (int,), "tokens": (str,)}
DIFFERENCE = SHARED | {
    "condition": (str,), "targets": (int,), "nats_intact": NUMBER, "nats": NUMBER, "difference": NUMBER,
    "difference_interval": (list,),
}  # fmt: skip
NORM = SHARED | {"layer": (int,), "positions": (int,), "norm": NUMBER, "norm_interval": (list,)}
VALIDATION = {"dataset": (str,), "content_sha256": (str,)}
ANSWERS = {
    "exact_intact": NUMBER, "exact": NUMBER, "lost": NUMBER, "lost_interval": (list,), "lost_holm": NUMBER,
    "lost_verdict": (str,),
}  # fmt: skip
TASK = ("task", "placement", "level", "question")


def check(line: dict) -> None:
    """Raises ValueError, with the reason, for a damaged line."""
    check_choices(line, {"kind": ("difference", "norm"), "text": ("validation", "tasks")})
    fields = (DIFFERENCE if line["kind"] == "difference" else NORM) | (CELL if line["text"] == "tasks" else VALIDATION)
    if line["kind"] == "difference" and line["text"] == "tasks":
        fields = fields | ANSWERS
    check_facts(line, fields)
    check_choices(line, {"tokens": TOKENS} | ({"condition": CONDITIONS} if line["kind"] == "difference" else {}))
    if line["kind"] == "norm" and line["tokens"] not in ROWS:
        raise ValueError(f"tokens is {line['tokens']!r}, but must be one of {', '.join(ROWS)}")


def place(line: dict) -> tuple:
    """Returns the texts that a line is about, as a key."""
    where = (line[name] for name in TASK) if line["text"] == "tasks" else (line["dataset"], line["content_sha256"])
    return line["text"], line["length"], *where


def cell(line: dict) -> tuple:
    """Returns a key that is equal for lines about the same figure."""
    figure = line.get("condition"), line.get("layer")
    return *weights_of(line), line["step"], *place(line), line["kind"], line["tokens"], *map(str, figure)


def texts_name(line: dict) -> str:
    if line["text"] == "validation":
        return f"validation windows of {line['length']} positions"
    return f"{line['task'].replace('_', ' ')}, {line['placement']}, {line['level']}, {line['length']} positions"


# ----------------------------------------------------------------------------- pictures


def panels_of(lines: list[dict]) -> list[list[dict]]:
    """Returns the lines of each small picture: differences by texts and kind of tokens, then norms."""
    kinds = apart(sorted(lines, key=lambda line: line["kind"]), lambda line: (*place(line), line["kind"]))
    return [of for group in kinds for of in apart(group, lambda line: line["tokens"])]


def draw(figure, lines: list[dict]) -> None:
    """Draws a panel by training step, or for a single step by condition or layer."""
    first, steps = lines[0], sorted({line["step"] for line in lines})
    norm = first["kind"] == "norm"
    draw_one = (_norms if norm else _differences) if len(steps) == 1 else _curves
    figure.set_figheight(2.6)
    draw_one(figure, lines)
    count = "windows" if first["text"] == "validation" else "texts"
    what = f"norm at {ROWS[first['tokens']]}" if norm else TOKENS[first["tokens"]]
    numbers = sorted({line["n"] for line in lines})
    n = f"n = {numbers[0]}{f' to {numbers[-1]}' if len(numbers) > 1 else ''} {count}, 95 % intervals"
    figure.suptitle("\n".join([what, texts_name(first), n]))


def _unit(line: dict) -> str:
    if line["kind"] == "norm":
        return "norm of the output / residual stream"
    return f"loss minus intact, nats per {'answer' if line['text'] == 'tasks' else 'token'}"


def _differences(figure, lines: list[dict]) -> None:
    """Draws the differences of one checkpoint, and for task texts the lost answers beside them."""
    answers = "lost" in lines[0]
    figure.set_figheight(1.3 + 0.3 * len(lines))
    grid = figure.subplots(1, 1 + answers, sharey=True, squeeze=False)[0]
    shown = [
        ("difference", 1, "nats per\nanswer" if answers else _unit(lines[0])),
        ("lost", 100, "answers lost,\npoints"),
    ]
    for axes, (name, scale, label) in zip(grid, shown, strict=False):
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
        for y, line in enumerate(lines):
            style = look(list(CONDITIONS).index(line["condition"]))
            axes.hlines(y, *(scale * end for end in line[f"{name}_interval"]), color=style["color"], linewidth=1.6)
            axes.plot(scale * line[name], y, **style)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=4)
    grid[0].set_yticks(range(len(lines)), [line["condition"].replace("_", " ") for line in lines])
    grid[0].set_ylim(len(lines) - 0.5, -0.5)


def _norms(figure, lines: list[dict]) -> None:
    """Draws the norms of one checkpoint by layer."""
    axes, lines = figure.subplots(), sorted(lines, key=lambda line: line["layer"])
    ends = [(line["norm"], *line["norm_interval"]) for line in lines]
    interval_line(axes, [line["layer"] for line in lines], ends, look(0), scale=1)
    axes.set(xlabel="layer", ylabel=_unit(lines[0]).replace(" / ", " /\n"))
    log_axis(axes)
    axes.set_xticks(sorted({line["layer"] for line in lines}))


def _curves(figure, lines: list[dict]) -> None:
    """Draws curves over training steps, one for each condition or layer."""
    norm = lines[0]["kind"] == "norm"
    name, field = ("norm", "layer") if norm else ("difference", "condition")
    axes, handles = figure.subplots(), []
    if norm:
        log_axis(axes)  # the norms of layers differ by orders of magnitude
    else:
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    for of in apart(sorted(lines, key=lambda line: (line.get("layer", 0), line["step"])), lambda line: line[field]):
        number = of[0]["layer"] if norm else list(CONDITIONS).index(of[0]["condition"])
        interval_line(
            axes, [line["step"] for line in of], [(line[name], *line[f"{name}_interval"]) for line in of],
            look(number), scale=1,
        )  # fmt: skip
        handles.append(key(f"layer {number}" if norm else CONDITIONS[of[0]["condition"]], **look(number)))
    axes.set(xlabel="training step", ylabel=_unit(lines[0]).replace(", ", ",\n").replace(" / ", " /\n"))
    legend(figure, handles)


def picture(lines: list[dict]) -> bytes:
    """Returns one PNG of all lines of a run, with curves over training steps if there are several."""
    first, steps = lines[0], sorted({line["step"] for line in lines})
    when = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    weak = "" if all(map(has_learned, lines)) else "; NOT LEARNED: some answers are no better than chance or a shortcut"
    heading = f"{first['arm']}; {first['run']}, {when}, seed {first['seed']}{weak}"
    return tiled(heading, [png(draw, of) for of in panels_of(lines)])


# ----------------------------------------------------------------------------- tables


def nats(value: float) -> str:
    return f"{value:+.4f}"


def _interval(name: str, show) -> Column:
    return Column("95 %", lambda line: " .. ".join(map(show, line[f"{name}_interval"])))


PLACE = (
    Column("texts", texts_name, text=True),
    Column("step", lambda line: line["step"]),
)
N = Column("n", lambda line: line["n"])
DIFFERENCES = (
    *PLACE,
    Column("condition", lambda line: line["condition"].replace("_", " "), text=True),
    Column("at", lambda line: line["tokens"], text=True),
    Column("intact, nats", lambda line: f"{line['nats_intact']:.4f}"),
    Column("difference", lambda line: nats(line["difference"])),
    _interval("difference", nats),
    Column("intact, exact %", lambda line: f"{100 * line['exact_intact']:.1f}" if "exact_intact" in line else ""),
    *claim("answers lost", "lost", points),
    N,
)
NORMS = (
    *PLACE,
    Column("layer", lambda line: line["layer"]),
    Column("at", lambda line: line["tokens"], text=True),
    Column("norm", lambda line: f"{line['norm']:.4f}"),
    _interval("norm", "{:.4f}".format),
    N,
)
TABLES = {"difference": DIFFERENCES, "norm": NORMS}


def by_kind(lines: list[dict]) -> list[tuple[str, list[dict]]]:
    return [(kind, of) for kind in TABLES if (of := [line for line in lines if line["kind"] == kind])]


def has_verdicts(lines: list[dict]) -> bool:
    return any("lost_verdict" in line for line in lines)


def terminal(lines: list[dict]) -> str:
    """Returns the tables of the lines of one call, for a terminal."""
    out = []
    for kind, of in by_kind(lines):
        texts = tuple(i for i, column in enumerate(TABLES[kind]) if column.text)
        cells = [[column.value(line) for column in TABLES[kind]] for line in of]
        out.append(text_table([column.name for column in TABLES[kind]], cells, texts))
    few = too_few(lines) if has_verdicts(lines) else ""
    return "\n\n".join(filter(None, [*out, KEY, few]))


KEY = (
    "difference: loss under the condition minus the intact loss, in nats per token or per answer, with 95 % intervals "
    "over paired windows or texts. norm: what the second attention adds, relative to the residual stream."
)


def body(page: Page, lines: list[dict]) -> str:
    figures = []
    for of in apart(lines, lambda line: (line["run"], line["arm"])):
        for panel in panels_of(of):
            first, number = panel[0], len(figures) + 1
            which = f"{first['run']}: {first['arm']}; {first['kind']}, {first['tokens']}, {texts_name(first)}"
            figures.append(page.picture(f"ablation_{number}.png", f"{TITLE}: {which}", png(draw, panel), panel, which))
    tables = "".join(rows(page, of, TABLES[kind], verdicts=has_verdicts(of)) for kind, of in by_kind(lines))
    return f"""<h2 id="ablation">{escaped(TITLE)}</h2>
{unlearned([line for line in lines if line["text"] == "tasks"])}<div>{"".join(figures)}</div>
<p class="small">{escaped(ABOUT)}</p>
{details("All lines", tables)}"""


SECTION = Section("ablation", check, cell, body, picture, terminal)
