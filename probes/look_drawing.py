"""The pictures of the probes that look inside: attention, residual and patching."""

import textwrap

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.lines import Line2D

from probes.heads import FIRST, SECOND, boosted_entropy, entropy, entropy_slope
from reports.drawing import COLOURS, GREY, LIGHT, png

PAPER = {"boost": 1.26, "drop": 1.40}  # the means of its figure 2
LOOKS = {FIRST: {"marker": "o", "dodge": -0.18}, SECOND: {"marker": "D", "dodge": 0.18}}


def attention_picture(lines: list[dict]) -> bytes:
    """The lines of one call of probe.py attention as a PNG."""
    return png(_attention, lines)


def told(lines: list[dict]) -> str:
    """Which run this is of, for the top of a picture."""
    first = lines[0]
    return "\n".join(textwrap.wrap(f"{first['arm']}; {first['run']}, step {first['step']}, seed {first['seed']}", 100))


def cell_of(line: dict) -> tuple:
    return line["task"], line["placement"], line["length"]


def _attention(figure, lines: list[dict]) -> None:
    """A row a cell: boost and drop of every head, weight on the marks, and how often the theorem applies; below, what
    the theorem says, and whether it explains what was measured."""
    cells = list(dict.fromkeys(map(cell_of, lines)))
    heights = [1.5 + 0.55 * len(cells), 3.3]
    figure.set_size_inches(11, sum(heights))
    ours, theory = figure.subfigures(2, 1, height_ratios=heights)
    panels = ours.subplots(1, 4, sharey=True)
    layers = 1 + max(line["layer"] or 0 for line in lines)
    colour = _layer_colours(layers)
    for axes, name, label in zip(
        panels, ("boost", "drop", "on_marks", "applies"),
        ("boost of the largest logit", "drop of entropy, nats", "weight on marks, %", "theorem applies, % of queries"),
        strict=True,
    ):  # fmt: skip
        _heads(axes, lines, cells, name, colour)
        axes.set_xlabel(label)
        if name in PAPER:
            axes.axvline(0, color=GREY, linewidth=1, zorder=1)
            axes.axvline(PAPER[name], color="black", linestyle=":", linewidth=1.2, zorder=1)
    names = [f"{task.replace('_', ' ')}, {placement}, {length}" for task, placement, length in cells]
    panels[0].set_yticks(range(len(cells)), names)
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    handles = [
        *(Line2D([], [], color=colour(i), marker="s", linestyle="", label=f"layer {i}") for i in _some(layers)),
        *(Line2D([], [], color=GREY, marker=LOOKS[which]["marker"], linestyle="", markersize=5,
                 label=f"a head of {which} attention")
          for which in dict.fromkeys(line["attention"] for line in lines)),
        Line2D([], [], color=GREY, marker="o", linestyle="", fillstyle="none", label="hollow: not shown to be above 0"),
        Line2D([], [], color="black", marker="|", markersize=11, markeredgewidth=2, linestyle="",
               label="mean of all heads, 95 %"),
        Line2D([], [], color="black", linestyle=":", linewidth=1.2, label="the paper's mean"),
    ]  # fmt: skip
    ours.legend(handles=handles, loc="outside lower center", ncols=5)
    marks = " and ".join(dict.fromkeys(line["mark"] for line in lines))
    n = max(line["n"] for line in lines)
    read = f"{marks} as trained, against with an embedding of zeros; queries behind the last one; n = {n} texts a row"
    ours.suptitle(f"{told(lines)}\n{read}", fontsize=9)
    left, right = theory.subplots(1, 2)
    theory.set_facecolor(LIGHT)
    _theorem(left)
    _explained(right, lines, colour)


def _layer_colours(layers: int):
    return lambda layer: colormaps["viridis"](0.92 * layer / max(1, layers - 1))


def _some(layers: int) -> list[int]:
    """Layers for a legend: all, or five of many."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, 5))})


def _heads(axes, lines: list[dict], cells: list[tuple], name: str, colour) -> None:
    scale = 1 if name in PAPER else 100
    for line in lines:
        if name not in line:
            continue
        look = LOOKS[line["attention"]]
        y, x = cells.index(cell_of(line)) + look["dodge"], scale * line[name]
        if line["layer"] is None:
            axes.hlines(y, *(scale * end for end in line[f"{name}_interval"]), color="black", linewidth=1.6, zorder=4)
            axes.plot(x, y, "|", color="black", markersize=11, markeredgewidth=2, zorder=5)
            continue
        holds = name not in PAPER or line[f"{name}_verdict"].startswith("holds")
        axes.plot(x, y, marker=look["marker"], color=colour(line["layer"]), markersize=4.5, alpha=0.85,
                  fillstyle="full" if holds else "none")  # fmt: skip


def theorem_curves(N: int = 64) -> dict[str, tuple[torch.Tensor, ...]]:
    """N keys, of which one has two thirds of the weight. If that one, the likely key, is boosted by t, or another one:
    t, the entropy by definition, the same from p and H alone, and its slope by the theorem's formula, (81,) each."""
    logits = torch.linspace(-1, 1, N, dtype=torch.float64)
    logits[0] = 5.0
    t = torch.linspace(0, 8, 81, dtype=torch.float64)
    out = {}
    for name, key in (("likely", 0), ("unlikely", N // 2)):
        boosted = logits.repeat(len(t), 1)
        boosted[:, key] += t
        p, H = boosted.softmax(-1)[:, key], entropy(boosted)
        out[name] = t, H, boosted_entropy(p[0], H[0], t), entropy_slope(p, H)
    return out


def _theorem(axes) -> None:
    for (name, (t, H, _, slope)), colour in zip(theorem_curves().items(), COLOURS, strict=False):
        sign = "falls: ln p > −H" if slope[0] < 0 else "rises: ln p < −H"
        axes.plot(t, H, color=colour, label=f"a key that is {name} without it: H {sign}")
        turn = int(H.argmax())
        if turn:
            axes.plot(t[turn], H[turn], "v", color=colour, markersize=7)
            axes.annotate("ln p = −H", (t[turn], H[turn]), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="boost t of one key's logit, of 64 keys", ylabel="entropy H, nats", ylim=(0, 3.9),
             title="what the theorem says: dH/dt = −p (ln p + H)")  # fmt: skip
    axes.legend(loc="upper right")


def _explained(axes, lines: list[dict], colour) -> None:
    shown = [line for line in lines if line["layer"] is not None and "predicted" in line]
    for line in shown:
        axes.plot(line["predicted"], line["drop"], marker=LOOKS[line["attention"]]["marker"],
                  color=colour(line["layer"]), markersize=4.5, alpha=0.85)  # fmt: skip
    ends = [line[name] for line in shown for name in ("predicted", "drop")]
    low, high = min(ends) - 0.1, max(ends) + 0.1
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=1)
    axes.set(xlabel="drop if only the mark's own logit changed, nats", ylabel="drop measured, nats",
             title="is it the boost of the mark? On the line: yes; a dot a head")  # fmt: skip
