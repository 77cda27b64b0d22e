"""Figures: each function takes arrays and returns a matplotlib ``Figure``; `save` writes it.

matplotlib is imported inside the functions only, and never through pyplot: nothing global is touched, no
window opens, and a figure drawn in a thread or on a machine without a display is the same figure. One style,
`STYLE` and the colours below, serves them all; colours and maps are safe for colour-blind readers (Okabe and
Ito 2008; blues, viridis). Legends and colour bars stand outside the axes, so they hide no data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.data import check_ending, writing
from fastdiff.errors import ArgumentError, BackendError, check_array, check_float, check_int

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastdiff.schedule import Schedule

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

# --------------------------------------------------------------------------------------- figures


def schedule_factors(schedule: Schedule) -> Figure:
    """Draw what one jump to timestep t keeps of the signal, and what it adds of noise.

    ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z``: the two factors against t.

    Parameters
    ----------
    schedule : Schedule
        Its `signal` and `noise` are drawn, (T,) each.
    """
    signal = check_array("schedule.signal", schedule.signal, shape=(None,))
    noise = check_array("schedule.noise", schedule.noise, shape=signal.shape)
    with _figure(6.4, 3.6) as (figure, axes):
        t = np.arange(len(signal))
        mark = "o" if len(t) < 12 else None
        axes.plot(t, signal, color=BLUE, marker=mark, markersize=3.5, label=r"signal $\sqrt{\bar\alpha_t}$")
        axes.plot(t, noise, color=ORANGE, marker=mark, markersize=3.5, label=r"noise $\sqrt{1-\bar\alpha_t}$")
        axes.set(title="How much signal, how much noise", xlabel="timestep t", ylabel="factor")
        axes.set_ylim(-0.02, 1.04)
        _whole_numbers(axes)
        _legend(axes)
    return figure


def forward_diffusion(
    chain: npt.ArrayLike, timesteps: Sequence[int] | None = None, *, rate: float | None = None
) -> Figure:
    """Draw one curve on its way into noise, in panels, over the curve itself.

    Parameters
    ----------
    chain : array_like
        (T + 1, points), the curve first: one curve of what `forward_chain` returns, ``chain[:, k]``.
    timesteps : sequence of int, optional
        Rows of `chain` to draw, 0 to T: how many steps of noise each has seen. By default six, evenly spaced.
    rate : float, optional
        Points a second: the horizontal axis is in seconds. Otherwise it counts points.
    """
    states = check_array("chain", chain, shape=(None, None))
    steps = len(states) - 1
    if timesteps is None:
        timesteps = np.unique(np.linspace(0, steps, 6).round().astype(int)).tolist()
    shown = [check_int("timesteps", t, low=0, high=steps) for t in timesteps]
    if not shown:
        raise ArgumentError("timesteps", "none", "at least one")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with _style():
        figure = _blank(max(2.7 * columns + 0.4, 4.8), 1.75 * rows + 0.75)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        x, label = _horizontal(states.shape[1], rate)
        for axes, t in zip(grid.flat, shown, strict=False):
            axes.plot(x, states[0], color=RED, linewidth=1.2, label="the curve")
            if t:
                axes.plot(x, states[t], color=BLUE, linewidth=1.2, label="with noise")
            title = "the curve" if t == 0 else f"after {t} step{'s' if t > 1 else ''}"
            axes.set_title(title, fontsize=9, fontweight="normal", pad=4)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel(label, fontsize=9)
        figure.supylabel("value", fontsize=9)
        handles, labels = grid.flat[len(shown) - 1].get_legend_handles_labels()
        _heading(figure, "A curve dissolves into noise", handles, labels)
    return figure


def loss(history: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the training loss, raw and smoothed, and the validation loss where there is one.

    Parameters
    ----------
    history : mapping
        ``Diffusion.history``: lists "step" and "loss", and "validation_step" and "validation_loss".
        The smoothed line is the mean over a window of a fiftieth of the steps, centred.
    """
    step = check_array("history['step']", history.get("step", []), shape=(None,))
    value = check_array("history['loss']", history.get("loss", []), shape=step.shape, finite=False)
    if not len(step):
        raise ArgumentError("history", "no steps", "the history of a model that was fitted")
    held_step = check_array("history['validation_step']", history.get("validation_step", []), shape=(None,))
    held = check_array(
        "history['validation_loss']", history.get("validation_loss", []), shape=held_step.shape, finite=False
    )
    with _figure(6.4, 3.6) as (figure, axes):
        axes.plot(step, value, color=BLUE, linewidth=0.6, alpha=0.35, label="each batch")
        axes.plot(step, _smoothed(value), color=BLUE, label="smoothed")
        if len(held):
            mark = "o" if len(held) <= 25 else None  # more would cover the line
            axes.plot(held_step, held, color=ORANGE, marker=mark, markersize=4, linewidth=1.3, label="held out")
        axes.set(title="Training loss", xlabel="training step", ylabel="mean squared error")
        if min(value.min(), held.min() if len(held) else 1.0) > 0:  # False for NaN too
            axes.set_yscale("log")
            _plain_logarithms(axes)
        _whole_numbers(axes)
        _legend(axes)
    return figure


def reverse_chain(path: npt.ArrayLike, target: npt.ArrayLike | None = None, *, rate: float | None = None) -> Figure:
    """Draw all steps of one reverse chain over each other, from light (noise) to dark (the result).

    Parameters
    ----------
    path : array_like
        (steps + 1, points), noise first: one curve of a trajectory, ``path[:, k]``.
    target : array_like, optional
        (points,), the curve that was to be reached: a broad red line under the result.
    rate : float, optional
        Points a second: the horizontal axis is in seconds.
    """
    states = check_array("path", path, shape=(None, None))
    if len(states) < 2:
        raise ArgumentError("path", f"shape {states.shape}", "(steps + 1, points) with at least one step")
    with _figure(6.4, 3.9) as (figure, axes):
        from matplotlib.collections import LineCollection
        from matplotlib.colors import Normalize

        x, label = _horizontal(states.shape[1], rate)
        lines = LineCollection(
            [np.column_stack([x, curve]) for curve in states[:-1]],
            cmap=_blues(),
            norm=Normalize(0, len(states) - 1),
            linewidths=0.7,
            array=np.arange(len(states) - 1),
        )
        axes.add_collection(lines)
        if target is not None:
            wanted = check_array("target", target, shape=(states.shape[1],))
            axes.plot(x, wanted, color=RED, linewidth=4, alpha=0.85, label="target", zorder=3)
        axes.plot(x, states[-1], color=_blues()(1.0), linewidth=1.4, label="result", zorder=4)
        axes.autoscale_view()
        axes.set(title="From noise to a curve", xlabel=label, ylabel="value")
        bar = figure.colorbar(lines, ax=axes, pad=0.02, fraction=0.05, aspect=30)
        bar.set_label("sampling steps done")
        bar.outline.set_visible(False)
        _legend(axes)
    return figure


def reverse_lines(path: npt.ArrayLike, timesteps: npt.ArrayLike | None = None) -> Figure:
    """Draw one reverse chain as one line per dimension against the step.

    Parameters
    ----------
    path : array_like
        (steps + 1, points), noise first: one curve of a trajectory, ``path[:, k]``.
    timesteps : array_like, optional
        (steps,) int, descending: ``sampler.timesteps``. The horizontal axis then counts the steps of noise
        that are left, ``t + 1``, down to 0. Otherwise it counts the sampling steps done.
    """
    states = check_array("path", path, shape=(None, None))
    steps = len(states) - 1
    if steps < 1:
        raise ArgumentError("path", f"shape {states.shape}", "(steps + 1, points) with at least one step")
    with _figure(6.4, 3.6) as (figure, axes):
        from matplotlib.collections import LineCollection

        if timesteps is None:
            x, label = np.arange(steps + 1), "sampling steps done"
        else:
            left = check_array("timesteps", timesteps, shape=(steps,))
            x, label = np.append(left + 1, 0), "steps of noise left, t + 1"
        lines = LineCollection(
            [np.column_stack([x, values]) for values in states.T],
            cmap="viridis",
            linewidths=0.9,
            array=np.arange(states.shape[1]),
        )
        axes.add_collection(lines)
        axes.autoscale_view()
        if timesteps is not None:
            axes.invert_xaxis()
        axes.set(title="Each point of the curve finds its value", xlabel=label, ylabel="value")
        _whole_numbers(axes)
        bar = figure.colorbar(lines, ax=axes, pad=0.02, fraction=0.05, aspect=30)
        bar.set_label("point of the curve")
        bar.outline.set_visible(False)
    return figure


def generated(
    curves: npt.ArrayLike,
    reference: npt.ArrayLike | None = None,
    *,
    count: int = 12,
    rate: float | None = None,
    names: tuple[str, str] = ("Generated", "Real"),
) -> Figure:
    """Draw generated curves beside real ones, one small panel each, all on the same axes.

    Parameters
    ----------
    curves : array_like
        (N, points); the first `count` are drawn.
    reference : array_like, optional
        (M, points), the real curves; the first `count` are drawn. None: generated curves only.
    count : int, optional
        Curves of each kind.
    rate : float, optional
        Points a second: the horizontal axis is in seconds.
    names : pair of str, optional
        Headings of the two halves.
    """
    sets = [check_array("curves", curves, shape=(None, None))]
    if reference is not None:
        sets.append(check_array("reference", reference, shape=(None, sets[0].shape[1])))
    count = check_int("count", count, low=1)
    if not all(len(rows) for rows in sets):
        raise ArgumentError("curves" if not len(sets[0]) else "reference", "no curves", "at least one")
    with _style():
        most = min(count, max(map(len, sets)))
        columns = min(most, 3 if len(sets) == 2 else 4)
        rows = -(-most // columns)
        figure = _blank(1.45 * columns * len(sets) + 0.9, 0.95 * rows + 1.0)
        halves = figure.subfigures(1, len(sets), wspace=0.03, squeeze=False)[0]
        x, label = _horizontal(sets[0].shape[1], rate)
        drawn = np.concatenate([half[:most] for half in sets])
        low, high = float(drawn.min()), float(drawn.max())
        margin = 0.06 * (high - low) or 1.0
        for half, values, color, name in zip(halves, sets, (BLUE, GREY), names, strict=False):
            grid = half.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
            for axes, curve in zip(grid.flat, values[:most], strict=False):
                axes.plot(x, curve, color=color, linewidth=1.3)
                axes.set_ylim(low - margin, high + margin)
            drawn_here = min(most, len(values))
            for axes in grid.flat[drawn_here:]:
                axes.set_visible(False)
            for axes in grid.flat[max(0, drawn_here - columns) : drawn_here]:
                axes.tick_params(labelbottom=True)  # the lowest of its column, in an unfilled last row too
            half.suptitle(name, fontsize=10.5, fontweight="bold")
            half.supxlabel(label, fontsize=9)
        halves[0].supylabel("value", fontsize=9)
    return figure


def around_target(
    curves: npt.ArrayLike, target: npt.ArrayLike, *, count: int = 200, rate: float | None = None
) -> Figure:
    """Draw generated curves over each other, with the one curve they should all be, and what is left over.

    Parameters
    ----------
    curves : array_like
        (N, points); the first `count` are drawn, all of them enter the error.
    target : array_like
        (points,).
    count : int, optional
        Curves to draw.
    rate : float, optional
        Points a second: the horizontal axis is in seconds.
    """
    made = check_array("curves", curves, shape=(None, None))
    wanted = check_array("target", target, shape=(made.shape[1],))
    count = check_int("count", count, low=1)
    if not len(made):
        raise ArgumentError("curves", "none", "at least one")
    with _style():
        from matplotlib.collections import LineCollection

        figure = _blank(6.4, 4.6)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        x, label = _horizontal(len(wanted), rate)
        left = made - wanted
        shown = min(count, len(made))
        alpha = min(1.0, 0.15 + 2 / shown)
        for axes, values in ((top, made), (bottom, left)):
            axes.add_collection(
                LineCollection(
                    [np.column_stack([x, curve]) for curve in values[:shown]],
                    colors=BLUE,
                    linewidths=0.6,
                    alpha=alpha,
                )
            )
        top.plot([], [], color=BLUE, linewidth=1, label=f"{shown} generated")
        top.plot(x, wanted, color=RED, linewidth=1.4, label="target")
        bottom.axhline(0, color=RED, linewidth=1.4)
        bottom.plot(x, np.sqrt((left**2).mean(0)), color="black", linewidth=1.2, linestyle=(0, (4, 2)))
        for axes in (top, bottom):
            axes.autoscale_view()
        error = float(np.sqrt((left**2).mean()))
        top.set(title="Generated curves and their target", ylabel="value")
        bottom.set(xlabel=label, ylabel="generated − target")
        bottom.set_title(
            f"root mean square error {error:.3g} (dashed: at each point)",
            fontsize=9,
            fontweight="normal",
            pad=4,
        )
        _legend(top)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all; the ending of `path` says how (.png, .pdf, .svg)."""
    check_available()
    ending = check_ending(path, ENDINGS)
    with _style(), writing(path) as file:
        figure.savefig(file, format=ending[1:])


def check_available() -> None:
    """Raise `BackendError` if matplotlib is missing: asked before long work that ends in a figure."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendError(f'figures need matplotlib: pip install "fastdiff-engine[plot]" ({error})') from error


# --------------------------------------------------------------------------------------- the one style


@contextmanager
def _style() -> Iterator[None]:
    check_available()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def _blank(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """One axes of `width` by `height` inches, drawn in the style."""
    with _style():
        figure = _blank(width, height)
        yield figure, figure.subplots()


def _legend(axes: Axes) -> None:
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


def _heading(figure: Figure, title: str, handles: Sequence[Any], labels: Sequence[str]) -> None:
    # No y for the heading: with one given, the layout would leave it no room.
    figure.suptitle(title, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
    figure.legend(handles, labels, loc="upper right", borderpad=0, borderaxespad=0.3, ncols=len(handles))


def _horizontal(points: int, rate: float | None) -> tuple[npt.NDArray[np.float64], str]:
    if rate is None:
        return np.arange(points, dtype=np.float64), "point"
    return np.arange(points) / check_float("rate", rate, low=0, low_open=True), "time (s)"


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))


def _plain_logarithms(axes: Axes) -> None:
    """Label a log axis 0.2, 0.5, 1 and not 2x10^-1: losses span a decade or two."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.get_ylim()
    ratio = high / low
    steps = (1, 2, 3, 4, 5, 6, 8) if ratio < 8 else (1, 2, 5) if ratio < 300 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _blues() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    # The palest fifth of Blues cannot be told from paper.
    return LinearSegmentedColormap.from_list("fastdiff_blues", colormaps["Blues"](np.linspace(0.2, 1.0, 256)))


def _smoothed(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Mean over a centred window of a fiftieth of the values, cut off at both ends."""
    half = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    means: npt.NDArray[np.float64] = (total[last] - total[first]) / (last - first)
    return means
