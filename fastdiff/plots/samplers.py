"""Samplers beside each other: how far from the data, for how many evaluations of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array
from fastdiff.plots.layout import blank
from fastdiff.plots.style import BLUE, GREY, ORANGE, RED, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEN, PURPLE, SKY, PINK, BROWN = "#009e73", "#6f42c1", "#56b4e9", "#cc79a7", "#8c564b"
COLOURS = (RED, BLUE, SKY, GREEN, ORANGE, PURPLE, PINK, BROWN, "#1f2328", GREY, "#b3a100", "#2f6f4f")
MARKERS = "osD^vP*Xd.<>"
TICKS = (5, 10, 20, 50, 100, 200, 500, 1000)


def tradeoff(
    panels: Mapping[str, Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]],
    *,
    ylabels: Mapping[str, str] | None = None,
    floors: Mapping[str, float] | None = None,
    title: str = "What a sampler costs",
) -> Figure:
    """Draw the distance of samples to the data against network evaluations, a panel for each kind of data.

    Parameters
    ----------
    panels : mapping of str to mapping of str to ((k,) array_like, (k,) array_like)
        For each panel, by its title, and each sampler: evaluations and distances. Distances are drawn on a logarithmic
        axis; those that are not above 0 are left out. The first two samplers are drawn boldest, the first on top.
    ylabels : mapping of str to str, optional
        What the distance of a panel is; "distance to the data" where nothing is said.
    floors : mapping of str to float, optional
        Below which distance nothing can be told in a panel; it is shaded.
    title : str, optional

    Examples
    --------
    >>> from fastdiff import plots
    >>> found = {"ddim": ([5, 10, 20], [0.5, 0.2, 0.1]), "unipc": ([5, 10, 20], [0.1, 0.05, 0.04])}
    >>> len(plots.tradeoff({"curves": found, "pictures": found}).axes)
    2
    """
    if not panels:
        raise ArgumentError("panels", "none", "at least one")
    columns = 2 if len(panels) > 1 else 1
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    with styled():
        figure = blank(4.1 * columns + 0.4, 3.1 * -(-len(panels) // columns) + 0.8)
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
        handles = {}
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (heading, panel) in zip(grid.flat, panels.items(), strict=False):
            low = np.inf
            for name, (evaluations, distances) in panel.items():
                at = check_array("panels (evaluations)", evaluations, shape=(None,))
                shown = check_array("panels (distances)", distances, shape=at.shape, finite=False).astype(np.float64)
                k = names.index(name)
                style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
                wide, top = ((2.0, 5), (3.4, 4))[k] if k < 2 else (1.2, 3)
                line = axes.plot(at, np.where(shown > 0, shown, np.nan), **style, linewidth=wide, zorder=top)
                line[0].set_markersize(4.5 if k < 2 else 3.5)
                handles[name] = line[0]
                low = min(low, shown[shown > 0].min(initial=np.inf))
            floor = (floors or {}).get(heading)
            if floor is not None:
                axes.axhspan(floor / 100, floor, color=GREY, alpha=0.15, linewidth=0)
                low = min(low, floor * 0.8)
            axes.set(xscale="log", yscale="log", title=heading, xlabel="network evaluations")
            axes.set_ylabel((ylabels or {}).get(heading, "distance to the data"))
            left, right = axes.get_xlim()
            axes.set_xticks([tick for tick in TICKS if left <= tick <= right])
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter("{x:g}")
            if np.isfinite(low):
                axes.set_ylim(bottom=low * 0.75)
        figure.suptitle(title, x=0.02, ha="left", fontsize=11.5, fontweight="bold")
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 6))
    return figure
