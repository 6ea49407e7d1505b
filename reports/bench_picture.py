"""Draws the picture of bench.py: bars of rates with their quartiles, and lines by window length."""

from pathlib import Path

from matplotlib.figure import Figure

from nanometa.common.files import write_atomically
from nanometa.reports.drawing import ARM_COLOURS, COLOURS, GREY, MARKERS, key, legend, length_axis, png, tiled

KNOWN = {  # colors of the implementations; an arm has the same color in all pictures
    "none": ARM_COLOURS["gpt2"], "meta": ARM_COLOURS["meta"], "gathered": ARM_COLOURS["meta"],
    "meta, one plan": "#56B4E9", "dense": "#D55E00", "nanogpt": GREY, "hf": "#E69F00",
}  # fmt: skip
BARS = (  # section, columns that name a group of bars, measured column
    ("training", ("shape", "dtype", "mode"), "positions/s"), ("training", ("shape", "dtype"), "peak GB"),
    ("layer", ("T", "dtype"), "ms"), ("decoding", ("batch", "dtype"), "content tokens/s"),
    ("preparing", ("corpus",), "MB/s"),
)  # fmt: skip


def draw(results: dict[str, list[dict]], path: Path, machine: str = "") -> None:
    """Writes a PNG of the sections that can be drawn, or nothing if there are none. A profile is only a table."""
    measured = [(section, keys, value, [row for row in results.get(section, ()) if value in row])
                for section, keys, value in BARS]  # fmt: skip
    panels = [
        png(bars, f"{section}: {value}", rows, keys, value, width=5.4)
        for section, keys, value, rows in measured
        if rows
    ]
    panels += [
        png(lines, results["lengths"], value, width=5.4) for value in ("s a step", "peak GB") if "lengths" in results
    ]
    if panels:
        write_atomically(path, tiled(machine, panels, columns=2))


def bars(figure: Figure, title: str, rows: list[dict], keys: tuple[str, ...], value: str) -> None:
    """Draws groups of bars relative to the first contestant of each group, labeled with the absolute numbers. A line
    spans the quartiles if the rows have those of this value."""
    axes = figure.subplots()
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault("\n".join(str(row[name]) for name in keys), []).append(row)
    contestants = list(dict.fromkeys(row["who"] for row in rows))
    colours = {who: KNOWN.get(who, COLOURS[i % len(COLOURS)]) for i, who in enumerate(contestants)}
    width = 0.8 / len(contestants)
    for place, of in enumerate(groups.values()):
        for row in of:
            x, top = place + contestants.index(row["who"]) * width, row[value] / of[0][value]
            axes.bar(x, top, width, color=colours[row["who"]])
            if "quartiles" in row and value not in ("peak GB", "MB/s"):
                ends = [float(end.replace(",", "")) / of[0][value] for end in row["quartiles"].split("..")]
                axes.vlines(x, *ends, color="black", linewidth=1)
                top = max(top, *ends)
            text = f"{row[value]:,.3g}" if row[value] < 1000 else f"{row[value]:,.0f}"
            axes.annotate(text, (x, top), (0, 3), textcoords="offset points", fontsize=8, rotation=90, ha="center")
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], list(groups), fontsize=8)
    axes.set(title=title, ylabel=f"{value}, {contestants[0]} = 1")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.3)
    axes.set_ylim(bottom=0)
    legend(figure, [key(who, color=colour, linewidth=6) for who, colour in colours.items()], columns=4)


def lines(figure: Figure, rows: list[dict], value: str) -> None:
    """Draws a value by window length. Dotted: the time if all FLOPs ran at the speed of a matrix product."""
    axes, handles = figure.subplots(), []
    for number, (who, share) in enumerate(dict.fromkeys((row["who"], row["markers"]) for row in rows)):
        mine = [row for row in rows if (row["who"], row["markers"]) == (who, share)]
        look = {"color": KNOWN[who], "marker": MARKERS[number], "markersize": 4.5}
        x = [row["T"] for row in mine]
        axes.plot(x, [row[value] for row in mine], **look)
        handles.append(key(who if who == "none" else f"{who}, {share:.0%} markers", **look))
        if value == "s a step" and "s at the matmul peak" in mine[0]:
            axes.plot(x, [row["s at the matmul peak"] for row in mine], ":", color=look["color"])
    if value == "s a step":
        handles.append(key("if all FLOPs ran at the speed of a matrix product", linestyle=":"))
    length_axis(axes, {row["T"] for row in rows})
    axes.set_ylim(bottom=0)
    axes.set(title=f"lengths: {value}", xlabel="positions of a window (8192 in a step)", ylabel=value)
    legend(figure, handles)
