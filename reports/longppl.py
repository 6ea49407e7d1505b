"""The section of eval.py longppl: perplexity, and perplexity on the tokens for which a long context matters."""

import numpy as np
from matplotlib.figure import Figure

from nanometa.common.statistics import clustered_ratio
from nanometa.reports.drawing import GREY, key, legend, log_axis, look, png, wrapped
from nanometa.reports.lines import NUMBER, apart, check_facts
from nanometa.reports.markup import details, escaped, table
from nanometa.reports.page import Page, Section

FIELDS = {
    "dataset": (str,), "content_sha256": (str,), "text_sha256": (str, type(None)), "evaluator": (str,),
    "evaluator_arm": (str,), "evaluator_sha256": (str,), "length": (int,), "short_length": (int,),
    "short_stride": (int,), "beta": NUMBER, "alpha": NUMBER, "pieces": (int,), "documents": (int,), "tokens": (int,),
    "perplexity": NUMBER, "bits_per_byte": NUMBER, "candidates": (int,), "keys": (int,), "share": NUMBER,
    "key_tokens": (int,), "document_key_nats": (list,), "document_key_tokens": (list,), "document_numbers": (list,),
}  # fmt: skip
# fields that only a line with key tokens has
KEYS = {"longppl": NUMBER, "key_bits_per_byte": NUMBER, "key_median_lsd": NUMBER}
PAIRED = ("content_sha256", "document_numbers", "document_key_tokens")  # equal for lines about the same tokens
INTERVALS = ("perplexity_interval", "longppl_interval")  # null for a single document
SAME = ("evaluator_sha256", "length", "short_length", "short_stride", "beta", "alpha", "pieces")
ABOUT = """LongPPL (arXiv 2410.23771) is the perplexity over key tokens alone. A token is key if the evaluator, another
run, predicts it with less than -beta nats given the whole piece of its document, and with more than alpha nats more
given a short context. Intervals are 95 % over documents of one run. They mostly show how much documents differ from
each other, so runs with one tokenizer are also compared document by document: nats per key token, minus those of the
first run."""


def check(line: dict) -> None:
    """Raises ValueError for a line that the section cannot show."""
    there = {name: (list,) for name in INTERVALS if line.get(name) is not None}
    check_facts(line, FIELDS | there | (KEYS if line.get("key_tokens") else {}))
    for name, kinds in (("document_key_nats", NUMBER), ("document_key_tokens", (int,)), ("document_numbers", (int,))):
        if not all(type(value) in kinds for value in line[name]) or len(line[name]) != len(line["document_numbers"]):
            raise ValueError(f"{name} is {str(line[name])[:40]!r}")
    if min(line["document_key_tokens"], default=1) < 1 or sum(line["document_key_tokens"]) != line["key_tokens"]:
        raise ValueError(f"key_tokens is {line['key_tokens']}, but its documents have other numbers")


def cell(line: dict) -> tuple:
    """Returns a key that is equal for lines of the same figure."""
    return *(line[name] for name in ("run", "weights_sha256", "arm", "dataset")), *evaluation(line)


def evaluation(line: dict) -> tuple:
    """Returns a key that is equal for lines with the same key tokens, whatever the tokenizer of their run."""
    return line["text_sha256"] or line["content_sha256"], *(line[name] for name in SAME)


def difference(line: dict, first: dict) -> str:
    """Returns the nats per key token of a line minus those of another, and the 95 % interval over documents, or "" if
    their key tokens are not the same."""
    if any(line[name] != first[name] for name in PAIRED) or not line["key_tokens"]:
        return ""
    nats = np.subtract(line["document_key_nats"], first["document_key_nats"])
    found = f"{nats.sum() / line['key_tokens']:+.4f}"
    if len(nats) < 2:
        return found
    return found + " ({:+.4f} .. {:+.4f})".format(*clustered_ratio(nats, np.array(line["document_key_tokens"])))


def body(page: Page, lines: list[dict]) -> str:
    """Returns the HTML of the section."""
    groups: dict[str, list[list]] = {}
    for of in apart(lines, evaluation):
        first = of[0]
        longest = first["short_length"] + first["short_stride"] - 1
        name = (
            f"alpha {first['alpha']:g}, beta {first['beta']:g}; evaluator {first['evaluator']} "
            f"({first['evaluator_arm']}, {first['evaluator_sha256'][:8]}), {first['short_length']} to {longest} "
            f"positions against pieces of {first['length']} tokens; {first['pieces']} pieces of {first['documents']} "
            f"documents of {first['dataset']} ({first['content_sha256'][:8]})"
        )
        groups[name] = [row(page, line, first) for line in of]
    figures = ""
    for number, of in enumerate(apart(lines, lambda line: evaluation({**line, "alpha": 0})), 1):
        note = f"perplexity on {of[0]['dataset']}, key tokens found by {of[0]['evaluator']}"
        picture = png(draw, of, width=5.4)
        figures += page.picture(f"longppl_{number}.png", note, picture, of, note=note)
    head = ["run", "arm", "perplexity", "95 %", "bits per byte", "key tokens", "LongPPL", "95 %", "bits per byte",
            "minus the first, nats", "evaluator's keys", "% of tokens", "median LSD", "command"]  # fmt: skip
    return f"""<h2 id="longppl">LongPPL</h2>
<div>{figures}</div>
<p class="small">{escaped(" ".join(ABOUT.split()))}</p>
{details("All lines: LongPPL", table(head, groups, (0, 1, len(head) - 1)))}"""


def draw(figure: Figure, lines: list[dict]) -> None:
    """Draws the perplexity of every run over all tokens, and over the key tokens at each alpha, with intervals."""
    axes, runs = figure.subplots(), apart(lines, lambda line: (line["run"], line["weights_sha256"]))
    looks = {None: {"color": GREY, "marker": "o", "markersize": 4.5}}
    looks |= {alpha: look(number) for number, alpha in enumerate(sorted({line["alpha"] for line in lines}))}
    step = 1 / (len(looks) + 1)  # between the points of a run, which are below each other
    figure.set_figheight(1 + len(runs) * max(0.5, 0.2 * len(looks)))
    for place, of in enumerate(runs):
        points = {None: (of[0]["perplexity"], of[0].get("perplexity_interval"))}
        points |= {line["alpha"]: (line["longppl"], line.get("longppl_interval")) for line in of if line["key_tokens"]}
        for number, (alpha, style) in enumerate(looks.items()):
            if alpha in points:
                at, (value, interval) = place + (number + 1) * step - 0.5, points[alpha]
                axes.plot(value, at, linestyle="", **style)
                axes.hlines(at, *(interval or (value, value)), color=style["color"], linewidth=1.4)
    axes.set_yticks(range(len(runs)), [wrapped(f"{of[0]['arm']}, {of[0]['run']}", 22) for of in runs])
    axes.set(ylim=(len(runs) - 0.5, -0.5), xlabel="perplexity")
    log_axis(axes, "x", (1, 1.5, 2, 3, 4, 5, 6, 8))
    names = {None: "all tokens"} | {alpha: f"key tokens, alpha {alpha:g}" for alpha in looks if alpha is not None}
    legend(figure, [key(names[alpha], linestyle="-", **style) for alpha, style in looks.items()])


def row(page: Page, line: dict, first: dict) -> list:
    """Returns the cells of a line. first: the line of its group to which it is compared."""
    there = line["key_tokens"] > 0
    return [
        line["run"], line["arm"], f"{line['perplexity']:.3f}", span(line, "perplexity_interval"),
        f"{line['bits_per_byte']:.4f}", line["key_tokens"],
        f"{line['longppl']:.3f}" if there else "no key token", span(line, "longppl_interval"),
        f"{line['key_bits_per_byte']:.4f}" if there else "", "" if line is first else difference(line, first),
        line["keys"], f"{100 * line['share']:.2f}", f"{line['key_median_lsd']:.2f}" if there else "",
        page.links([line["command"]]),
    ]  # fmt: skip


def span(line: dict, name: str) -> str:
    return " .. ".join(f"{end:.3f}" for end in line.get(name) or ())


SECTION = Section("longppl", check, cell, body)
