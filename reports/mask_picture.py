"""Draws masks of attention: which positions each position may read."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nanometa.reports.drawing import COLOURS, LIGHT, png

COLUMNS = 4
KINDS = ("hidden", "text that is read", "marker that is read")


def mask_picture(panels: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Returns the masks side by side as PNG.

    panels: by name, which keys (columns) each query (row) may read (T, T) bool, and which positions are markers
    (T,) bool."""
    return png(_draw, panels, width=10)


def _draw(figure: Figure, panels: dict) -> None:
    rows = -(-len(panels) // COLUMNS)
    figure.set_figheight(2.75 * rows + 0.6)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    colors = ListedColormap(["white", COLOURS[0], COLOURS[1]])
    for place, (name, (seen, marker)) in zip(axes, panels.items(), strict=False):
        place.imshow(np.where(seen, 1 + marker[None, :], 0), cmap=colors, vmin=0, vmax=2, interpolation="none")
        place.set_title(name)
        T = len(seen)
        place.fill_between([-0.5, T - 0.5], [-0.5, T - 0.5], -0.5, color=LIGHT, linewidth=0)  # the future
        place.set_xticks(np.flatnonzero(marker), ["m"] * int(marker.sum()), fontsize=6)
        place.set_yticks(np.flatnonzero(marker), ["m"] * int(marker.sum()), fontsize=6)
        place.tick_params(length=0, pad=1)
        place.grid(visible=False)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    keys = [Patch(facecolor=color, edgecolor="#999999", label=kind)
            for color, kind in zip((*colors.colors, LIGHT), (*KINDS, "the future"), strict=True)]  # fmt: skip
    figure.legend(handles=keys, loc="outside upper center", ncols=4)
