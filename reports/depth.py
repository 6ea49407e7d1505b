"""Draws the loss by depth in documents, from lines of eval.py perplexity --documents."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import read_json_lines
from nanometa.common.statistics import clustered_ratio
from nanometa.reports import distance
from nanometa.reports.drawing import GREY, arm_looks, key, legend, png, wrapped
from nanometa.reports.lines import NUMBER, apart, check_facts, told_apart
from nanometa.reports.markup import details, table
from nanometa.reports.page import Section

FEWEST = 5  # documents for which a band is drawn; an interval over fewer is too wide to show anything


class Curve(NamedTuple):
    """The loss by depth of one run, with one scaling of positions and one window length."""

    label: str
    trained: bool  # whether the run was trained with this scaling of positions, or only read with it
    window: int  # content tokens in a training window before any extension
    depth: np.ndarray  # (N,) centers of the buckets
    nats: np.ndarray  # (G, N) per token of every document, averaged over the draws of markers


def read(files: list[Path]) -> tuple[list[Curve], np.ndarray, str]:
    """Returns curves() of the JSON lines in the files. Raises UserError if a file cannot be read, or if the lines are
    about several texts, which cannot be compared."""
    names = ", ".join(map(str, files))
    lines = [line for path in files for line in read_json_lines(path, check, "eval.py perplexity")]
    lines = [line for line in lines if "document_nats" in line]
    texts = {text_of(line) for line in lines}
    if not texts:
        raise UserError(f"{names} have no line about documents: measure some with eval.py perplexity --documents.")
    if len(texts) > 1:
        raise UserError(
            f"{names} have lines about {len(texts)} texts or buckets, but only the same tokens can be compared: "
            f"measure all with the same dataset, longest length and --bucket, into a new file, --output=FILE.jsonl."
        )
    try:
        return curves(lines)
    except ValueError as error:
        raise UserError(f"{names} cannot be drawn ({error}): give files that eval.py perplexity wrote.") from error


def text_of(line: dict) -> tuple[str, int]:
    """Returns a key that is equal for lines that score the same tokens in the same buckets."""
    return line["content_sha256"], line["bucket"]


def curves(lines: list[dict]) -> tuple[list[Curve], np.ndarray, str]:
    """Returns the curves of lines about one text, the number of pieces of every document (G,), and a description of the
    text. If lines repeat, the last one counts. Raises ValueError if the lines are not about the same documents."""
    names = ("arm", "weights_sha256", "length", "markers")
    cells = apart(lines, lambda line: tuple(line[name] for name in names))
    cells = [list({line["draw"]: line for line in cell}.values()) for cell in cells]
    firsts = [draws[0] for draws in cells]
    facts = ("windows of {length}", "markers {markers}", "{run}", "step {step}", "weights {weights_sha256:.8}")
    labels = told_apart([line["arm"] for line in firsts], [list(map(of.format_map, firsts)) for of in facts])
    first = firsts[0]
    if len({(len(line["document_nats"][0]), *line["document_pieces"]) for draws in cells for line in draws}) > 1:
        raise ValueError("their documents or buckets differ")
    text = f"{first['tokens']:,} tokens, {first['pieces']} pieces of {first['documents']} documents"
    made = [_curve(label, draws) for label, draws in zip(labels, cells, strict=True)]
    return made, np.array(first["document_pieces"]), text


def _curve(label: str, draws: list[dict]) -> Curve:
    first, nats = draws[0], np.mean([line["document_nats"] for line in draws], axis=0)
    depth = (np.arange(nats.shape[1]) + 0.5) * first["bucket"]
    return Curve(label, first["scaling"] == first["trained_scaling"], first["original_content"], depth, nats)


def draw(figure, curves: list[Curve], pieces: np.ndarray, text: str) -> None:
    """Draws all curves, and below them their differences from the first one. Documents vary much less in these
    differences than in their loss. Bands are drawn for FEWEST documents or more.

    A solid line is of a run trained with its scaling of positions, a dashed line of a run only read with it. The depth
    axis is linear because most of it lies beyond the window."""
    first, panels = curves[0], 2 if len(curves) > 1 else 1
    figure.set_figheight(0.7 + 2.7 * panels)
    level, *below = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    handles = []
    for curve, look in zip(curves, arm_looks([curve.label for curve in curves]).values(), strict=True):
        style = {**look, "linestyle": "-" if curve.trained else (0, (4, 1.5)), "linewidth": 1.4, "markevery": 0.1}
        handles.append(key(curve.label, **style))
        _draw(level, curve.depth, curve.nats, pieces, style, band=curve is first)
        if below:
            _draw(below[0], curve.depth, curve.nats - first.nats, pieces, style, band=curve is not first)
    windows = sorted({curve.window for curve in curves})
    for axes in (level, *below):
        for window in windows:
            axes.axvline(window, color=GREY, linestyle=":", linewidth=1.2)
    name = f"training window, {' and '.join(map(str, windows))} content tokens"
    handles.append(key(name, linestyle=":", linewidth=1.2))
    width = 40 if figure.get_figwidth() < 6 else 90
    banded = len(pieces) >= FEWEST
    level.set(ylabel="nats per token", title=f"loss{'; band: 95 % interval' * banded}")
    if below:
        above = f"loss minus that of {first.label}{'; bands: 95 % intervals' * banded}"
        below[0].set(ylabel="more nats per token", title=wrapped(above, width))
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=width // 8)
    before = "content tokens before the predicted one, in the document or in its piece"
    axes.set_xlabel(f"{wrapped(before, width)}\n{wrapped(text, width)}")
    legend(figure, handles)


def _draw(axes, depth: np.ndarray, nats: np.ndarray, pieces: np.ndarray, style: dict, band: bool) -> None:
    """Draws nats (G, N) as a mean over the pieces of documents (G,), and if `band` its 95 % interval over documents."""
    if band and len(pieces) >= FEWEST:
        low, high = np.array([clustered_ratio(pieces * column, pieces) for column in nats.T]).T
        axes.fill_between(depth, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(depth, pieces @ nats / pieces.sum(), **style)


# ----------------------------------------------------------------------------- the section of a report

FIELDS = {
    "length": (int,), "markers": (str,), "draw": (int,), "loss": (float,), "bits_per_byte": (float,),
    "perplexity": (float,), "tokens": (int,), "dataset": (str,), "content_sha256": (str,),
}  # fmt: skip
OF_DOCUMENTS = {
    "document_nats": (list,), "document_pieces": (list,), "documents": (int,), "pieces": (int,), "bucket": (int,),
    "original_content": (int,), "scaling": (str,), "trained_scaling": (str,),
}  # fmt: skip


OPTIONAL = {"n": (int,), "stride": (int,), "bucket": (int,)}


def check(line: dict) -> None:
    """Raises ValueError, with the reason, for a damaged line of eval.py perplexity."""
    documents = "document_nats" in line
    fields = FIELDS | OF_DOCUMENTS if documents else FIELDS if "impossible" not in line else {}
    check_facts(line, fields, OPTIONAL)
    distance.check(line)
    if not documents:
        return
    rows, pieces = line["document_nats"], line["document_pieces"]
    widths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(rows) != len(pieces) or len(widths) != 1 or 0 in widths:
        raise ValueError("document_nats is not a table with a row of losses for each of document_pieces")
    if not all(type(nats) in NUMBER for row in rows for nats in row):
        raise ValueError("document_nats has a loss that is no number")
    if not all(type(n) is int and n > 0 for n in pieces) or line["bucket"] < 1:
        raise ValueError("document_pieces or bucket is not above 0")


def _key(line: dict) -> tuple:
    names = ("run", "weights_sha256", "arm", "content_sha256", "length", "stride", "markers", "draw", "bucket")
    return tuple(line.get(name) for name in names)


def body(page, lines: list[dict]) -> str:
    """Returns a picture for each text of documents, and a table with the loss of every condition."""
    texts = apart((line for line in lines if "document_nats" in line), text_of)
    measured = [line for line in lines if "impossible" not in line]
    drawn = [curves(of) for of in texts]
    figures = [
        page.picture(f"depth_{number}.png", "loss by depth in documents", png(draw, *what), of)
        for number, (what, of) in enumerate(zip(drawn, texts, strict=True), 1)
    ]
    groups: dict[str, list[list]] = {}
    for of in apart(measured, lambda line: (*_key(line)[:7], "document_nats" in line)):
        first = of[0]
        pieces = f", {first['pieces']} pieces of {first['documents']} documents" if "document_nats" in first else ""
        name = f"{first['dataset']}, {first['tokens']:,} content tokens{pieces} ({first['content_sha256'][:8]})"
        losses, bits = ([line[field] for line in of] for field in ("loss", "bits_per_byte"))
        spread = f"{min(losses):.4f} .. {max(losses):.4f}" if len(of) > 1 else "–"
        groups.setdefault(name, []).append(
            [first["arm"], first["run"], first["length"], first["markers"], f"{np.mean(losses):.4f}", spread,
             f"{np.exp(np.mean(losses)):.2f}", f"{np.mean(bits):.4f}", len(of), first["seed"],
             page.links([line["command"] for line in of])]
        )  # fmt: skip
    head = ["arm", "run", "window", "markers", "nats per token", "over draws", "perplexity", "bits per byte", "draws",
            "seed", "command"]  # fmt: skip
    rows = table(head, groups, (0, 1, 3, 10))
    return f"""<h2 id="lengths">Loss on validation text</h2>
<div>{"".join(figures)}</div>
<p class="small">{" ".join(notes(drawn))}</p>
{details("All windows", rows) if figures else rows}{distance.tables(page, measured)}"""


def notes(drawn: list[tuple[list[Curve], np.ndarray, str]]) -> list[str]:
    """Returns sentences about the table and about the marks in the pictures of these curves."""
    said = ["All conditions below one heading are about the same text."]
    if drawn:
        said.append(
            "Documents were cut into pieces of the longest window, so that all conditions score the same tokens, and "
            "the picture shows their loss by the number of tokens before them in the document."
        )
    several = any(len(of) > 1 for of, _, _ in drawn)
    if several:
        said.append(
            "Documents differ more in their loss than conditions do, so compare the differences in the lower half."
        )
    if any(len(pieces) >= FEWEST for _, pieces, _ in drawn):
        said.append(f"Bands are 95 % intervals over documents, and are drawn for {FEWEST} documents or more.")
        said += ["The upper half has only the band of the first curve."] * several
    return said


SECTION = Section("perplexity", check, _key, body)
