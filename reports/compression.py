"""The section of eval.py compression: what runs lose that forget a part of their context, by method and ratio."""

from matplotlib.figure import Figure

from nanometa.reports.drawing import COLOURS, DASHES, GREY, MARKERS, key, legend, png
from nanometa.reports.lines import NUMBER, apart, check_choices, check_facts, check_fields
from nanometa.reports.markup import details, escaped, percent, span, table
from nanometa.reports.page import Page, Section

MEASURES = {
    "bits": {"bits_per_byte": NUMBER, "interval": (list,), "windows": (int,), "realised": NUMBER, "cache": NUMBER},
    "recall": {"size": (int,), "n": (int,), "exact": NUMBER, "interval": (list,), "token_accuracy": NUMBER},
    "continuation": {
        "n": (int,), "agreement": NUMBER, "f1_full": NUMBER, "rouge_full": NUMBER, "f1_text": NUMBER,
        "loss_text": NUMBER,
    },
}  # fmt: skip
ABOUT = """A method says how a run is read: "trained" by its own rules, "full" without forgetting anything, and the
others by rules of their own. Saved is the share of a window's content that the cache does not hold at its
end; cache is the mean size of the cache as a share of the content read so far. Intervals are 95 % over
windows of one run, and mostly show how much windows differ from each other, which all methods share."""


def check(line: dict) -> None:
    """Raises ValueError for a line that the section cannot show."""
    check_facts(line, {"measure": (str,), "method": (str,), "ratio": (int, float, type(None)), "dataset": (str,)})
    check_choices(line, {"measure": MEASURES})
    if "impossible" not in line:
        check_fields(line, MEASURES[line["measure"]])


def cell(line: dict) -> tuple:
    """Returns a key that is equal for lines of the same figure."""
    names = ("run", "weights_sha256", "measure", "method", "ratio", "dataset")
    return *(line[name] for name in names), line.get("size")


def body(page: Page, lines: list[dict]) -> str:
    """Returns the HTML of the section."""
    known = [line for line in lines if "impossible" not in line]
    figures = ""
    for number, of in enumerate(apart((one for one in known if one["measure"] == "bits"), dataset), 1):
        note = f"bits per byte on {of[0]['dataset']}"
        figures += page.picture(f"compression_{number}.png", note, png(draw, of, width=5.4), of, note=note)
    tables = "".join(rows(page, measure, [one for one in known if one["measure"] == measure]) for measure in MEASURES)
    return f"""<h2 id="compression">Forgotten context</h2>
<div>{figures}</div>
<p class="small">{escaped(" ".join(ABOUT.split()))}</p>
{tables}"""


def dataset(line: dict) -> str:
    return line["dataset"]


def rows(page: Page, measure: str, lines: list[dict]) -> str:
    """Returns the folded table of a measure, or "" without lines."""
    if not lines:
        return ""
    show = {
        "bits": (
            ("saved %", "cache %", "bits per byte", "95 %", "windows"),
            lambda line: [
                percent(line["realised"]), percent(line["cache"]), f"{line['bits_per_byte']:.4f}",
                " .. ".join(f"{end:.4f}" for end in line["interval"]), line["windows"],
            ],
        ),
        "recall": (
            ("tokens", "exact %", "95 %", "tokens right %", "n"),
            lambda line: [
                line["size"], percent(line["exact"]), span(*line["interval"]),
                percent(line["token_accuracy"]), line["n"],
            ],
        ),
        "continuation": (
            ("equal ids %", "F1", "ROUGE-L", "F1 with the text", "loss of the text", "n"),
            lambda line: [
                percent(line["agreement"]), f"{line['f1_full']:.3f}", f"{line['rouge_full']:.3f}",
                f"{line['f1_text']:.3f}", f"{line['loss_text']:.4f}", line["n"],
            ],
        ),
    }  # fmt: skip
    names, values = show[measure]
    groups = {}
    for of in apart(lines, lambda line: (line["run"], line["arm"], line["dataset"])):
        groups[f"{of[0]['run']}: {of[0]['arm']}, {of[0]['dataset']}"] = [
            [line["method"], "" if line["ratio"] is None else f"{line['ratio']:g}", *values(line),
             page.links([line["command"]])]
            for line in of
        ]  # fmt: skip
    head = ["method", "ratio", *names, "command"]
    return details(f"All lines: {measure}", table(head, groups, (0, len(head) - 1)))


def draw(figure: Figure, lines: list[dict]) -> None:
    """Draws bits per byte by the share that is saved: a line for each method of each run."""
    axes, run_keys, method_keys = figure.subplots(), [], []
    figure.set_figheight(4.2)
    methods = list(dict.fromkeys(line["method"] for line in lines))
    runs = apart(lines, lambda line: (line["run"], line["arm"]))
    for number, of in enumerate(runs):
        if len(runs) > 1:
            color = COLOURS[number % len(COLOURS)]
            run_keys.append(key(f"{of[0]['arm']} ({of[0]['run']})", color=color))
        for at, method in enumerate(methods):
            if len(runs) == 1:
                color = COLOURS[at % len(COLOURS)]
            look = {"marker": MARKERS[at % len(MARKERS)], "linestyle": DASHES[at % len(DASHES)], "color": color}
            found = sorted((one["realised"], one["bits_per_byte"]) for one in of if one["method"] == method)
            axes.plot([100 * saved for saved, _ in found], [bits for _, bits in found], markersize=4, **look)
            if number == 0:
                method_keys.append(key(method, **(look if len(runs) == 1 else look | {"color": GREY})))
    axes.set(xlabel="content that is saved at the end of a window, %", ylabel="bits per byte")
    legend(figure, run_keys + method_keys)


SECTION = Section("compression", check, cell, body)
