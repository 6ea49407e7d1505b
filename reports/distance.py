"""Tables of the loss by distance since the last marker and by position, from lines of eval.py perplexity."""

import numpy as np

from nanometa.common.statistics import clustered_ratio
from nanometa.evals.blocks import DISTANCES
from nanometa.reports.lines import NUMBER, apart, check_fields
from nanometa.reports.markup import Markup, details, table

KINDS = {"distance": "By distance since the last marker", "position": "By position in the window"}
# equal for lines whose blocks have the same windows
SAME = ("content_sha256", "target_rule", "length", "window", "stride", "markers", "bucket")


def check(line: dict) -> None:
    """Raises ValueError, with the reason, if the sums by block of a line are damaged. Older lines have none."""
    for name in (f"block_{kind}" for kind in KINDS if f"block_{kind}" in line):
        sums = line[name]
        shapes = []
        for field in ("nats", "tokens"):
            rows = sums.get(field) if isinstance(sums, dict) else None
            if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
                raise ValueError(f"{name} is not a table of {field}")
            if not all(type(value) in NUMBER for row in rows for value in row):
                raise ValueError(f"{name} has {field} that are no numbers")
            shapes.append([len(row) for row in rows])
        if shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
            raise ValueError(f"{name} has nats and tokens of different shapes")
        check_fields(line, {"window": (int,), "bucket": (int,)})
        if not (line["bucket"] > 0 and shapes[0][0] == bins(name.removeprefix("block_"), line)):
            raise ValueError(f"{name} does not have one column for each bin")
        if not all(type(n) is int and n >= 0 for row in sums["tokens"] for n in row):
            raise ValueError(f"{name} has tokens that are no counts")


def sums_of(draws: list[dict], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of nats and tokens (G, bins), added over the draws of markers."""
    return tuple(np.sum([line[f"block_{kind}"][field] for line in draws], axis=0) for field in ("nats", "tokens"))


def paired(first: list[dict], second: list[dict], kind: str) -> list[tuple[float, float, float] | None] | None:
    """Returns for each bin the loss of the first run minus that of the second, in nats per token, and the ends of its
    95 % interval over blocks; None for a bin with tokens in fewer than two blocks.

    first, second: the lines of a run for one cell, one for each draw of markers. Returns None instead of the list if
    the two do not have the same tokens in every block and bin."""
    (a, n), (b, m) = (sums_of(draws, kind) for draws in (first, second))
    if n.shape != m.shape or (n != m).any():
        return None
    out = []
    for difference, count in zip((a - b).T, n.T, strict=True):
        there = count > 0
        ends = clustered_ratio(difference[there], count[there]) if there.sum() > 1 else None
        out.append((float(difference.sum() / count.sum()), *ends) if ends else None)
    return out


def bins(kind: str, line: dict) -> int:
    """Returns the number of bins of a line's sums."""
    return -(-line["window"] // line["bucket"]) if kind == "position" else 1 + len(DISTANCES)


def bin_names(kind: str, line: dict) -> list[str]:
    """Returns the names of the columns, one for each bin of a line's sums."""
    if kind == "position":
        size, T = line["bucket"], line["window"]
        return [f"{start}–{min(start + size, T) - 1}" for start in range(0, T, size)]
    ends = [*(after - 1 for after in DISTANCES[1:]), None]
    names = [f"{first}+" if end is None else str(first) if first == end else f"{first}–{end}"
             for first, end in zip(DISTANCES, ends, strict=True)]  # fmt: skip
    return ["at a marker", *names[1:], "before the first"]


def tables(page, lines: list[dict]) -> Markup:
    """Returns the folded tables. Runs on the same windows are below one heading, and the first of them is subtracted
    from the others; a difference is left empty where they have other markers."""
    out = ""
    for kind, title in KINDS.items():
        groups = apart((line for line in lines if f"block_{kind}" in line), lambda line: tuple(map(line.get, SAME)))
        for of in groups:
            runs = apart(of, lambda line: (line["run"], line["weights_sha256"], line["arm"]))
            first, names = of[0], bin_names(kind, of[0])
            rows = []
            for draws in runs:
                nats, tokens = sums_of(draws, kind)
                means = [f"{a:.4f}" if n else "" for a, n in zip(_means(nats, tokens), tokens.sum(0), strict=True)]
                head = [draws[0]["arm"], draws[0]["run"], "nats"]
                rows.append([*head, *means, page.links([line["command"] for line in draws])])
                if draws is not runs[0] and (found := paired(draws, runs[0], kind)):
                    shown = ["{:+.4f} ({:+.4f} .. {:+.4f})".format(*cell) if cell else "" for cell in found]
                    rows.append([*head[:2], f"minus {runs[0][0]['arm']}", *shown, ""])
            where = f"{first['dataset']}, {first['length']} positions, markers {first['markers']}"
            shown = table(["arm", "run", "figure", *names, "command"], {where: rows}, (0, 1, 2, 3 + len(names)))
            out += details(f"{title}: {where}", shown)
    return Markup(out)


def _means(nats: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return nats.sum(0) / np.maximum(1, tokens.sum(0))
