"""Figures of measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array
from fastdiff.plots.layout import blank, heading, one_axes, plain_logarithms
from fastdiff.plots.style import BLUE, GREY, ORANGE, RED, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def shares(work: Mapping[str, tuple[float, str]], machine: str) -> Figure:
    """Draw which share of what a machine can do at most each piece of work reaches.

    Parameters
    ----------
    work : mapping of str to (float, str)
        What was done: its share, 1 for all that is possible, and its rate in words.
    machine : str
        Where, for the heading.
    """
    if not work:
        raise ArgumentError("work", "nothing", "at least one piece of work")
    names = list(work)
    share = check_array("work", [value for value, _ in work.values()], shape=(len(names),))
    with one_axes(6.4, 0.9 + 0.24 * len(names)) as (figure, axes):
        at = np.arange(len(names))
        axes.barh(at, 100 * share, height=0.62, color=BLUE)
        for k, (_, rate) in enumerate(work.values()):
            text = axes.annotate(rate, (100 * share[k], k), xytext=(4, 0), textcoords="offset points", va="center")
            text.set(fontsize=7.5, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6})
        axes.axvline(100, color=GREY, linewidth=1, zorder=0.5)
        axes.set_yticks(at, names)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.22 * max(100, 100 * share.max())))
        axes.set(xlabel="% of what memory or arithmetic allows", ylabel="work")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        figure.suptitle(machine, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
    return figure


def scaling(panels: Mapping[str, Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]], labels: Sequence[str]) -> Figure:
    """Draw time against size, a panel for each sort of work, both axes logarithmic.

    Parameters
    ----------
    panels : mapping of str to mapping
        Title of a panel: who computed, to sizes (k,) and seconds (k,), above 0. Who is ours comes first.
    labels : sequence of str
        What is counted along each panel's horizontal axis.
    """
    if not panels or len(labels) != len(panels):
        raise ArgumentError("labels", f"{len(labels)} of them", f"one for each of {len(panels)} panels, and a panel")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    sides = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = dict(zip(sides, (BLUE, ORANGE, GREY, RED) * len(sides), strict=False))
    with styled():
        figure = blank(3.5 * columns + 0.4, 2.3 * rows + 0.5)
        grid = figure.subplots(rows, columns, squeeze=False)
        shown: dict[str, Any] = {}
        for axes, (title, lines), label in zip(grid.flat, panels.items(), labels, strict=False):
            for name, (size, seconds) in lines.items():
                at = check_array(f"panels[{title!r}]", size, shape=(None,))
                value = check_array(f"panels[{title!r}]", seconds, shape=at.shape)
                (shown[name],) = axes.loglog(at, value, color=colours[name], marker="o", markersize=3)
            axes.set(xlabel=label)
            axes.set_title(title, fontsize=9, fontweight="normal", pad=4)
            _plain_sizes(axes, sorted({float(x) for size, _ in lines.values() for x in np.asarray(size)}))
            plain_logarithms(axes)
            axes.yaxis.set_major_formatter(_as_duration)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supylabel("time", fontsize=9)
        heading(figure, "Time against size", [shown[name] for name in sides], sides)
    return figure


def _plain_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """Label a log axis by the few values that there are."""
    from matplotlib.ticker import NullLocator

    axes.set_xticks(sizes, [f"{size:,g}" if size < 1e6 else f"{size:.0e}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def _as_duration(seconds: float, _: int | None = None) -> str:
    """10 ms for 0.01."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= 0.999 * s), ("µs", 1e-6))
    return f"{seconds / size:g} {unit}"
