"""The one style of all figures, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from fastdiff.errors import BackendError
from fastdiff.files import check_ending, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")

BLUE, RED, ORANGE, GREY = "#0072b2", "#d1242f", "#e69f00", "#6b7280"

STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it: the same picture on every machine
    "font.size": 9,
    "text.color": "#1f2328",
    "axes.labelcolor": "#1f2328",
    "axes.edgecolor": "#8c959f",
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.015,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.7,
    "xtick.color": "#8c959f",
    "ytick.color": "#8c959f",
    "xtick.labelcolor": "#1f2328",
    "ytick.labelcolor": "#1f2328",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@contextmanager
def styled() -> Iterator[None]:
    check_available()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all; the ending of `path` says how (.png, .pdf, .svg).

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> plots.save(plots.generated(X), "new.png")
    >>> from pathlib import Path
    >>> Path("new.png").read_bytes()[1:4]
    b'PNG'
    """
    check_available()
    ending = check_ending(path, ENDINGS)
    with writing(path) as file:
        write(figure, file, ending[1:])


def write(figure: Figure, file: IO[bytes], form: str) -> None:
    """Write a figure into an open file, in the style it was drawn in.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> with open("new.svg", "wb") as file:
    ...     plots.write(plots.generated(X), file, "svg")
    >>> from pathlib import Path
    >>> "<svg" in Path("new.svg").read_text()
    True
    """
    with styled():
        figure.savefig(file, format=form)


def check_available() -> None:
    """Raise `BackendError` if matplotlib is missing: asked before long work that ends in a figure.

    Examples
    --------
    >>> from fastdiff import plots
    >>> plots.check_available()  # an error says what to install
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendError(f'figures need matplotlib: pip install "fastdiff-engine[plot]" ({error})') from error
