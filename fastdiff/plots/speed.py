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

    Examples
    --------
    >>> from fastdiff import plots
    >>> work = {"noise": (0.2, "1 G values a second"), "a product": (0.9, "80 Gflop/s")}
    >>> len(plots.shares(work, "this machine").axes)
    1
    """
    if not work:
        raise ArgumentError("work", "nothing", "at least one piece of work")
    names = list(work)
    share = check_array("work", [value for value, _ in work.values()], shape=(len(names),))
    with one_axes(6.4, 0.9 + 0.24 * len(names)) as (figure, axes):
        at, end = np.arange(len(names)), 1.05 * max(100, 100 * share.max())
        axes.barh(at, 100 * share, height=0.62, color=BLUE)
        for k, (_, rate) in enumerate(work.values()):
            inside = 100 * share[k] > 0.25 * end  # then there is room in the bar, at its end
            text = axes.annotate(
                rate, (100 * share[k], k), xytext=(-4 if inside else 4, 0), textcoords="offset points", va="center"
            )
            text.set(fontsize=7.5, ha="right" if inside else "left", color="white" if inside else "#1f2328")
        axes.axvline(100, color=GREY, linewidth=1, zorder=0.5)
        axes.set_yticks(at, names)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, end))
        axes.set(xlabel="% of what memory or arithmetic allows", ylabel="work")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        figure.suptitle(machine, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
    return figure


def scaling(panels: Mapping[str, Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]], labels: Sequence[str]) -> Figure:
    """Draw time against size, a panel for each sort of work, both axes logarithmic.

    Fewer than three sizes make no line: they are bars with their times.

    Parameters
    ----------
    panels : mapping of str to mapping
        Title of a panel: who computed, to sizes (k,) and seconds (k,), above 0. Who is ours comes first.
    labels : sequence of str
        What is counted along each panel's horizontal axis.

    Examples
    --------
    >>> from fastdiff import plots
    >>> n = [10, 100, 1000]
    >>> found = {"fastdiff": (n, [1e-3, 2e-3, 1e-2]), "another": (n, [2e-3, 5e-3, 4e-2])}
    >>> len(plots.scaling({"sampling": found}, ["samples"]).axes)
    1
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
            axes.set(xlabel=label)
            axes.set_title(title, fontsize=9, fontweight="normal", pad=4)
            checked = {}
            for name, (size, seconds) in lines.items():
                at = check_array(f"panels[{title!r}]", size, shape=(None,))
                checked[name] = at, check_array(f"panels[{title!r}]", seconds, shape=at.shape)
            sizes = sorted({float(x) for at, _ in checked.values() for x in at})
            if len(sizes) < 3:
                _bars(axes, checked, sizes, colours)
                continue
            for name, (at, value) in checked.items():
                (shown[name],) = axes.loglog(at, value, color=colours[name], marker="o", markersize=3)
            _plain_sizes(axes, sizes)
            plain_logarithms(axes)
            axes.yaxis.set_major_formatter(_as_duration)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supylabel("time", fontsize=9)
        for name in sides:  # of bars alone
            shown.setdefault(name, grid[0, 0].plot([], [], color=colours[name], marker="o", markersize=3)[0])
        heading(figure, "Time against size", [shown[name] for name in sides], sides)
    return figure


def _bars(axes: Axes, lines: Mapping[str, tuple[Any, Any]], sizes: Sequence[float], colours: Mapping[str, str]) -> None:
    """One or two sizes: a group of bars for each, from 0, with their times."""
    width = 0.8 / len(lines)
    for k, (name, (at, seconds)) in enumerate(lines.items()):
        places = [sizes.index(x) + (k - (len(lines) - 1) / 2) * width for x in at]
        drawn = axes.bar(places, seconds, width=0.94 * width, color=colours[name])
        axes.bar_label(drawn, [_as_duration(float(f"{value:.2g}")) for value in seconds], fontsize=7.5, padding=2)
    axes.set_xticks(range(len(sizes)), [f"{size:,g}" for size in sizes])
    axes.set_ylim(top=1.12 * max(seconds.max() for _, seconds in lines.values()))
    axes.yaxis.set_major_formatter(_as_duration)
    axes.grid(visible=False, axis="x")


def _plain_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """Label a log axis by the few values that there are."""
    from matplotlib.ticker import NullLocator

    axes.set_xticks(sizes, [f"{size:,g}" if size < 1e6 else f"{size:.0e}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def _as_duration(seconds: float, _: float | None = None) -> str:
    """10 ms for 0.01."""
    if seconds == 0:
        return "0"
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= 0.999 * s), ("µs", 1e-6))
    return f"{seconds / size:g} {unit}"
