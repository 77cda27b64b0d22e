"""The figures of `fastdiff.plots`. Importing this imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastdiff.plots.style import write


class NotebookFigure(Figure):
    """A figure that a notebook shows where it is the last value of a cell.

    matplotlib's own are shown by pyplot's machinery, and not at all where that is not at work.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        write(self, out, "png")
        return out.getvalue()
