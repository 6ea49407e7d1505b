"""Draws the picture of bench.py: speed relative to other implementations, rates, and costs by window length."""

from pathlib import Path

from matplotlib.figure import Figure

from nanometa.common.files import write_atomically
from nanometa.reports.drawing import ARM_COLOURS, COLOURS, GREY, MARKERS, key, legend, length_axis, png, tiled

KNOWN = {  # colors of the implementations; an arm has the same color in all pictures
    "none": ARM_COLOURS["gpt2"],
    "meta": ARM_COLOURS["meta"],
    "gathered": ARM_COLOURS["meta"],
    "meta, one plan": "#56B4E9",
    "dense": "#D55E00",
    "nanogpt": GREY,
    "nanogpt, memory kept": "#BBBBBB",
    "hf": "#E69F00",
}
PEERS = {
    "nanogpt": "nanoGPT", "nanogpt, memory kept": "nanoGPT with nanoMeta's setting of the memory allocator",
    "hf": "Hugging Face's GPT-2",
}  # fmt: skip
BARS = (  # section, columns that name a group of bars, measured column
    ("training", ("shape", "dtype", "mode"), "positions/s"), ("training", ("shape", "dtype"), "peak GB"),
    ("layer", ("what", "T", "dtype"), "ms"), ("decoding", ("batch", "dtype"), "content tokens/s"),
    ("preparing", ("corpus",), "MB/s"),
)  # fmt: skip


def draw(results: dict[str, list[dict]], folder: Path, machine: str = "") -> list[Path]:
    """Writes PNGs to a folder and returns their paths: bench.png compares with other implementations, and details.png
    has all that can be drawn. Writes neither if it would be empty. A profile is only a table."""
    measured = [(section, keys, value, [row for row in results.get(section, ()) if value in row])
                for section, keys, value in BARS]  # fmt: skip
    details = [
        png(bars, f"{section}: {value}", rows, keys, value, width=5.4)
        for section, keys, value, rows in measured
        if rows
    ]
    details += [
        png(lines, results["lengths"], value, width=5.4) for value in ("s a step", "peak GB") if "lengths" in results
    ]
    compared = speedups(results)
    written = {}
    if compared:
        written[folder / "bench.png"] = tiled(machine, [png(peers, compared, width=8.0)])
    if details:
        written[folder / "details.png"] = tiled(machine, details, columns=2)
    for path, picture in written.items():
        write_atomically(path, picture)
    return list(written)


def speedups(results: dict[str, list[dict]]) -> list[tuple[str, str, float]]:
    """Returns how many times as fast as each peer plain GPT-2 is here: (what is measured, peer, ratio of the rates).

    In decoding, nanoGPT is left out: it has no cache, and is many times as slow."""
    found = []
    for section, keys, value in (
        ("training", ("shape", "dtype", "mode"), "positions/s"),
        ("decoding", ("batch", "dtype"), "content tokens/s"),
    ):
        groups: dict[str, dict[str, float]] = {}
        for row in results.get(section, ()):
            what = ", ".join(f"batch {row[name]}" if name == "batch" else str(row[name]) for name in keys)
            groups.setdefault(f"{section}, {what}", {})[row["who"]] = row[value]
        for what, of in groups.items():
            found += [
                (what, peer, of["none"] / of[peer])
                for peer in PEERS
                if peer in of and not (section == "decoding" and "nanogpt" in peer)
            ]
    return found


def peers(figure: Figure, found: list[tuple[str, str, float]]) -> None:
    """Draws the ratios of `speedups` as horizontal bars."""
    axes, labels = figure.subplots(), list(dict.fromkeys(what for what, *_ in found))
    places = {what: [] for what in labels}
    for what, peer, ratio in found:
        places[what].append((peer, ratio))
    figure.set_figheight(1.6 + 0.25 * len(found))
    y, ticks = 0.0, []
    for of in places.values():
        ticks.append(y + (len(of) - 1) / 2)
        for peer, ratio in of:
            axes.barh(y, ratio, 0.9, color=KNOWN[peer])
            axes.annotate(f"{ratio:.2f}", (ratio, y), (3, 0), textcoords="offset points", fontsize=8, va="center")
            y += 1
        y += 0.6
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set(title="Plain GPT-2 in nanoMeta: how many times as fast as the others (higher is better)")
    legend(figure, [key(f"compared with {PEERS[peer]}", color=KNOWN[peer], linewidth=6)
                    for peer in PEERS if peer in {peer for _, peer, _ in found}])  # fmt: skip


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
    axes.set(title=f"lengths: {value}", xlabel="positions of a window (16384 in a step)", ylabel=value)
    legend(figure, handles)
