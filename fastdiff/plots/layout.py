"""What figures share: the blank page, headings and legends, axes and their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import check_float
from fastdiff.plots.style import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def blank(width: float, height: float) -> Figure:
    from fastdiff.plots.canvas import NotebookFigure

    return NotebookFigure(width, height)


@contextmanager
def one_axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """One axes of `width` by `height` inches, drawn in the style."""
    with styled():
        figure = blank(width, height)
        yield figure, figure.subplots()


def named_by(what: str, sampler: str | None) -> str:
    return what if sampler is None else f"{what}: {sampler}"


def legend(axes: Axes) -> None:
    """Put the legend on the line of the title, at its right end: above the data, never over it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.1,
            ncols=len(handles),
            columnspacing=1.4,
        )


def heading(figure: Figure, title: str, handles: Sequence[Any], labels: Sequence[str]) -> None:
    # No y for the heading: with one given, the layout would leave it no room.
    figure.suptitle(title, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
    figure.legend(handles, labels, loc="upper right", borderpad=0, borderaxespad=0.3, ncols=len(handles))


def horizontal(points: int, rate: float | None) -> tuple[npt.NDArray[np.float64], str]:
    if rate is None:
        return np.arange(points, dtype=np.float64), "point"
    return np.arange(points) / check_float("rate", rate, low=0, low_open=True), "time (s)"


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))


def plain_logarithms(axes: Axes) -> None:
    """Label a log axis 0.2, 0.5, 1 and not 2x10^-1: losses span a decade or two."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.get_ylim()
    ratio = high / low
    steps = (1, 2, 3, 4, 5, 6, 8) if ratio < 8 else (1, 2, 5) if ratio < 300 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def blues() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    # The palest fifth of Blues cannot be told from paper.
    return LinearSegmentedColormap.from_list("fastdiff_blues", colormaps["Blues"](np.linspace(0.2, 1.0, 256)))
