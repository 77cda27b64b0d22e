"""Figures of curves: on their way into noise and back, generated ones beside real ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_int
from fastdiff.files import check_ending
from fastdiff.pictures import check_pillow
from fastdiff.plots.layout import blank, blues, heading, horizontal, legend, named_by, one_axes, whole_numbers
from fastdiff.plots.pictures import check_times, write_gif
from fastdiff.plots.style import BLUE, GREY, ORANGE, RED, STYLE, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastdiff.schedule import Schedule

STATES = 12  # of a chain that are drawn
LINES = 5  # of a curve's points that are followed
QUANTILES = (0.05, 0.95)  # of a band
FEWEST = 20  # curves that have a band


def forward_diffusion(
    chain: npt.ArrayLike,
    timesteps: Sequence[int] | None = None,
    *,
    rate: float | None = None,
    schedule: Schedule | None = None,
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
    schedule : Schedule, optional
        Of the chain; then each panel names what is left of the signal, and how much noise there is.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> s = fd.Schedule.cosine(20)
    >>> chain = fd.forward_chain(X[:1], s, backend="numpy")
    >>> len(plots.forward_diffusion(chain[:, 0], [0, 5, 20], schedule=s).axes)
    3
    """
    states = check_array("chain", chain, shape=(None, None))
    steps = len(states) - 1
    if timesteps is None:
        timesteps = np.unique(np.linspace(0, steps, 6).round().astype(int)).tolist()
    shown = [check_int("timesteps", t, low=0, high=steps) for t in timesteps]
    if not shown:
        raise ArgumentError("timesteps", "none", "at least one")
    if schedule is not None and steps != schedule.T:
        raise ArgumentError("schedule", f"T = {schedule.T}", f"T = {steps}, as the chain has")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with styled():
        figure = blank(max(2.7 * columns + 0.4, 4.8), 1.75 * rows + 0.75)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        x, label = horizontal(states.shape[1], rate)
        for axes, t in zip(grid.flat, shown, strict=False):
            axes.plot(x, states[0], color=RED, linewidth=1.2, label="the curve")
            if t:
                axes.plot(x, states[t], color=BLUE, linewidth=1.2, label="with noise")
            title = "the curve" if t == 0 else f"after {t} step{'s' if t > 1 else ''}"
            if t and schedule is not None:
                title = f"{title}: signal {schedule.signal[t - 1]:.2f}, noise {schedule.noise[t - 1]:.2f}"
            axes.set_title(title, fontsize=8.5, fontweight="normal", pad=4)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel(label, fontsize=9)
        figure.supylabel("value", fontsize=9)
        handles, labels = grid.flat[len(shown) - 1].get_legend_handles_labels()
        heading(figure, "A curve dissolves into noise", handles, labels)
    return figure


def reverse_chain(
    path: npt.ArrayLike, target: npt.ArrayLike | None = None, *, rate: float | None = None, sampler: str | None = None
) -> Figure:
    """Draw a dozen steps of one reverse chain over each other, from light (noise) to dark (the result).

    Parameters
    ----------
    path : array_like
        (steps + 1, points), noise first: one curve of a trajectory, ``path[:, k]``. Of more than a dozen states some
        are drawn, evenly spaced.
    target : array_like, optional
        (points,), the curve that was to be reached: a broad red line under the result.
    rate : float, optional
        Points a second: the horizontal axis is in seconds.
    sampler : str, optional
        What drew it, for the colour bar: `Sampler.label`.

    Examples
    --------
    >>> from fastdiff import plots
    >>> s = fd.Schedule.cosine(20)
    >>> law, table = fd.denoisers.Empirical(fd.data.harmonic_curves(8), s), fd.samplers.ddim(s, 10)
    >>> new, path = fd.sample(law, table, n=4, trajectory=True, backend="numpy")
    >>> len(plots.reverse_chain(path[:, 0], new[0], sampler=table.label).axes)
    2
    """
    states = check_array("path", path, shape=(None, None))
    if len(states) < 2:
        raise ArgumentError("path", f"shape {states.shape}", "(steps + 1, points) with at least one step")
    with one_axes(6.4, 3.9) as (figure, axes):
        from matplotlib.collections import LineCollection
        from matplotlib.colors import Normalize

        x, label = horizontal(states.shape[1], rate)
        shown = np.unique(np.linspace(0, len(states) - 1, STATES).round().astype(int))[:-1]
        lines = LineCollection(
            [np.column_stack([x, curve]) for curve in states[shown]],
            cmap=blues(),
            norm=Normalize(0, len(states) - 1),
            linewidths=0.8,
            array=shown,
        )
        axes.add_collection(lines)
        if target is not None:
            wanted = check_array("target", target, shape=(states.shape[1],))
            axes.plot(x, wanted, color=RED, linewidth=4, alpha=0.85, label="target", zorder=3)
        axes.plot(x, states[-1], color=blues()(1.0), linewidth=1.4, label="result", zorder=4)
        axes.autoscale_view()
        axes.set(title="From noise to a curve", xlabel=label, ylabel="value")
        bar = figure.colorbar(lines, ax=axes, pad=0.02, fraction=0.05, aspect=30)
        bar.set_label(named_by("sampling steps done", sampler))
        bar.outline.set_visible(False)
        legend(axes)
    return figure


def reverse_lines(path: npt.ArrayLike, timesteps: npt.ArrayLike | None = None, *, sampler: str | None = None) -> Figure:
    """Draw one reverse chain as one line per dimension against the step, five of them in colour.

    Parameters
    ----------
    path : array_like
        (steps + 1, points), noise first: one curve of a trajectory, ``path[:, k]``.
    timesteps : array_like, optional
        (steps,) int, descending: ``sampler.timesteps``. The horizontal axis then counts the steps of noise
        that are left, ``t + 1``, down to 0. Otherwise it counts the sampling steps done.
    sampler : str, optional
        What drew it, for the horizontal axis: `Sampler.label`.

    Examples
    --------
    >>> from fastdiff import plots
    >>> s = fd.Schedule.cosine(20)
    >>> law, table = fd.denoisers.Empirical(fd.data.harmonic_curves(8), s), fd.samplers.ddim(s, 10)
    >>> new, path = fd.sample(law, table, n=4, trajectory=True, backend="numpy")
    >>> figure = plots.reverse_lines(path[:, 0], table.timesteps, sampler=table.label)
    >>> [len(drawn.get_segments()) for drawn in figure.axes[0].collections]  # a line for each value
    [50]
    """
    states = check_array("path", path, shape=(None, None))
    steps = len(states) - 1
    if steps < 1:
        raise ArgumentError("path", f"shape {states.shape}", "(steps + 1, points) with at least one step")
    with one_axes(6.4, 3.6) as (figure, axes):
        from matplotlib.collections import LineCollection

        if timesteps is None:
            x, label = np.arange(steps + 1), "sampling steps done"
        else:
            left = check_array("timesteps", timesteps, shape=(steps,))
            x, label = np.append(left + 1, 0), "steps of noise left, t + 1"
        lines = [np.column_stack([x, values]) for values in states.T]
        axes.add_collection(LineCollection(lines, colors="#d5dae0", linewidths=0.6))
        followed = np.unique(np.linspace(0, len(lines) - 1, LINES + 2).round().astype(int)[1:-1])
        for k, colour in zip(followed, (BLUE, ORANGE, RED, "#009e73", "#6f42c1"), strict=False):
            axes.plot(x, states[:, k], color=colour, linewidth=1.4, label=f"point {k}")
        axes.autoscale_view()
        if timesteps is not None:
            axes.invert_xaxis()
        axes.set(xlabel=named_by(label, sampler), ylabel="value")
        figure.suptitle("Each point of the curve finds its value", x=0.02, ha="left", fontsize=10.5, fontweight="bold")
        whole_numbers(axes)
        legend(axes)
    return figure


def imputed(
    known: npt.ArrayLike,
    draws: npt.ArrayLike,
    *,
    truth: npt.ArrayLike | None = None,
    rate: float | None = None,
    names: Sequence[str] = (),
) -> Figure:
    """Draw curves with missing values, and what was drawn for these: bands that hold 50 and 95 % of the draws.

    Parameters
    ----------
    known : array_like
        (N, points), NaN where a value is missing.
    draws : array_like
        (K, N, points), filled in.
    truth : array_like, optional
        (N, points), drawn as well.
    rate : float, optional
        Points a second: the horizontal axis is in seconds. Otherwise it counts points.
    names : sequence of str, optional
        A title for each curve.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> known = np.where(np.arange(50) < 30, X[:2], np.nan)
    >>> draws = np.where(np.isnan(known), X[None, :2] + np.linspace(-1, 1, 20)[:, None, None], known)
    >>> len(plots.imputed(known, draws, truth=X[:2]).axes)
    2
    """
    filled = check_array("draws", draws, shape=(None, None, None))
    rows = check_array("known", known, shape=filled.shape[1:], finite=False)
    hidden = None if truth is None else check_array("truth", truth, shape=filled.shape[1:])
    if not filled.size:
        raise ArgumentError("draws", f"shape {filled.shape}", "at least one draw of one curve")
    if names and len(names) != len(rows):
        raise ArgumentError("names", f"{len(names)}", f"{len(rows)}, one for each curve")
    with styled():
        columns = min(len(rows), 2)
        height = -(-len(rows) // columns)
        figure = blank(7.8, 2.0 * height + 0.8)
        grid = figure.subplots(height, columns, sharex=True, sharey=bool(names), squeeze=False)
        for axes in grid.flat[len(rows) :]:
            axes.set_visible(False)
        at, label = horizontal(rows.shape[1], rate)
        for k, (axes, row, of_row) in enumerate(zip(grid.flat, rows, filled.swapaxes(0, 1), strict=False)):
            if len(of_row) > 1:
                for low, high, shade in ((0.025, 0.975, 0.2), (0.25, 0.75, 0.4)):
                    band = np.quantile(of_row, (low, high), axis=0)
                    share = f"{high - low:.0%} of draws"
                    axes.fill_between(at, *band, color=BLUE, alpha=shade, linewidth=0, label=share)
            axes.plot(at, of_row[0], color=BLUE, linewidth=0.9, label="one draw")
            if hidden is not None:
                axes.plot(at, hidden[k], color=RED, linewidth=1.2, label="the curve")
            if names:
                axes.set_title(names[k], fontsize=9, fontweight="normal", pad=4)
            axes.plot(at, row, "o", color=ORANGE, markersize=3, label="known")
        figure.supxlabel(label, fontsize=9)
        figure.supylabel("value", fontsize=9)
        heading(figure, "Given what is known", *grid[0, 0].get_legend_handles_labels())
    return figure


def generated(
    curves: npt.ArrayLike,
    reference: npt.ArrayLike | None = None,
    *,
    count: int = 12,
    rate: float | None = None,
    names: tuple[str, str] = ("Generated", "Real"),
) -> Figure:
    """Draw generated curves beside real ones, one small panel each, and below them the bands of both, overlaid.

    A band holds the middle 90 % of all curves of a set at each point: from the 5 % to the 95 % quantile.

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
        Headings of the two halves; the first one may say how they were drawn: `Sampler.label`.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> figure = plots.generated(X[:20], X[20:], count=4)
    >>> len(figure.axes)  # four of each, and the bands
    13
    """
    sets = [check_array("curves", curves, shape=(None, None))]
    if reference is not None:
        sets.append(check_array("reference", reference, shape=(None, sets[0].shape[1])))
    count = check_int("count", count, low=1)
    if not all(len(rows) for rows in sets):
        raise ArgumentError("curves" if not len(sets[0]) else "reference", "no curves", "at least one")
    with styled():
        most = min(count, max(map(len, sets)))
        columns = min(most, 3 if len(sets) == 2 else 4)
        rows = -(-most // columns)
        width, height = max(3.2, 1.45 * columns * len(sets) + 0.9), 0.95 * rows + 1.0
        banded = all(len(half) >= FEWEST for half in sets[-2:]) and len(sets) == 2
        figure = blank(width, height + 2.3 * banded)
        above: Any = figure
        if banded:
            above, below = figure.subfigures(2, 1, height_ratios=(height, 2.3), squeeze=False)[:, 0]
            _bands(below, sets, names, rate)
        halves = above.subfigures(1, len(sets), wspace=0.03, squeeze=False)[0]
        x, label = horizontal(sets[0].shape[1], rate)
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


def _bands(below: Any, sets: Sequence[npt.NDArray[Any]], names: Sequence[str], rate: float | None) -> None:
    """The bands of generated curves and of real ones on the same axes, with their medians."""
    axes = below.subplots()
    x, label = horizontal(sets[0].shape[1], rate)
    for values, colour, name, style in zip(sets[::-1], (GREY, BLUE), names[::-1], ("-", "--"), strict=True):
        low, middle, high = np.quantile(values, (QUANTILES[0], 0.5, QUANTILES[1]), axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0, label=name.partition(":")[0].lower())
        axes.plot(x, middle, color=colour, linewidth=1.3, linestyle=style)
    axes.set(xlabel=label, ylabel="value")
    axes.set_title("5 to 95 % at each point, and medians", fontsize=9, fontweight="normal", pad=4)
    legend(axes)


def around_target(
    curves: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    count: int = 200,
    rate: float | None = None,
    sampler: str | None = None,
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
    sampler : str, optional
        What drew them, for the legend: `Sampler.label`.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> figure = plots.around_target(X[:1] + 0.1 * fd.normal((30, 50), seed=0, backend="numpy"), X[0])
    >>> len(figure.axes)
    2
    """
    made = check_array("curves", curves, shape=(None, None))
    wanted = check_array("target", target, shape=(made.shape[1],))
    count = check_int("count", count, low=1)
    if not len(made):
        raise ArgumentError("curves", "none", "at least one")
    with styled():
        from matplotlib.collections import LineCollection

        figure = blank(6.4, 4.6)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        x, label = horizontal(len(wanted), rate)
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
        top.plot([], [], color=BLUE, linewidth=1, label=named_by(f"{shown} generated", sampler))
        top.plot(x, wanted, color=RED, linewidth=1.4, label="target")
        bottom.axhline(0, color=RED, linewidth=1.4)
        bottom.plot(x, np.sqrt((left**2).mean(0)), color="black", linewidth=1.2, linestyle=(0, (4, 2)))
        for axes in (top, bottom):
            axes.autoscale_view()
        error = float(np.sqrt((left**2).mean()))
        top.set(title="Generated curves", ylabel="value")
        bottom.set(xlabel=label, ylabel="generated − target")
        bottom.set_title(
            f"root mean square error {error:.3g} (dashed: at each point)",
            fontsize=9,
            fontweight="normal",
            pad=4,
        )
        legend(top)
    return figure


def moving_curves(
    path: npt.ArrayLike,
    file: str | os.PathLike[str],
    *,
    rows: int = 2,
    frames: int = 50,
    seconds: float = 4.0,
    hold: float = 2.0,
    title: str = "From noise to curves",
) -> None:
    """Write chains from noise to curve as an animated GIF that repeats for ever; needs Pillow as well.

    Each curve has a panel, on axes that hold the curves at the end and nearly all of the noise.

    Parameters
    ----------
    path : array_like
        (steps + 1, n, points), noise first: a trajectory, whose n chains run side by side.
    file : path
        A file name that ends in .gif. It appears whole or not at all.
    rows : int, optional
        Rows of panels.
    frames : int, optional
        States shown, at least 2, evenly spaced over the steps; all of them where there are fewer.
    seconds, hold : float, optional
        Time for all frames, and how much longer the last one stands.
    title : str, optional
        The heading.

    Examples
    --------
    >>> from fastdiff import plots
    >>> s = fd.Schedule.cosine(20)
    >>> law, table = fd.denoisers.Empirical(fd.data.harmonic_curves(8), s), fd.samplers.ddim(s, 10)
    >>> new, path = fd.sample(law, table, n=4, trajectory=True, backend="numpy")
    >>> plots.moving_curves(path, "curves.gif", frames=3)
    >>> from pathlib import Path
    >>> Path("curves.gif").read_bytes()[:3]
    b'GIF'
    """
    check_pillow()
    check_ending(file, (".gif",))
    states = check_array("path", path, shape=(None, None, None))
    if len(states) < 2 or not states.shape[1] or not states.shape[2]:
        raise ArgumentError("path", f"shape {states.shape}", "(steps + 1, n, points) with at least one step")
    rows = min(check_int("rows", rows, low=1), states.shape[1])
    steps = np.unique(np.linspace(0, len(states) - 1, check_int("frames", frames, low=2)).round().astype(int))
    times = check_times(seconds, hold, len(steps))
    columns = -(-states.shape[1] // rows)
    with styled():
        from PIL import Image

        figure = blank(max(3.2, 1.15 * columns + 0.3), 0.95 * rows + 0.5)
        figure.set_dpi(100)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        x, _ = horizontal(states.shape[2], None)
        lines = [
            axes.plot(x, curve, color=BLUE, linewidth=1.3)[0] for axes, curve in zip(grid.flat, states[0], strict=False)
        ]
        low = min(float(states[-1].min()), float(np.quantile(states[0], 0.005)))
        high = max(float(states[-1].max()), float(np.quantile(states[0], 0.995)))
        margin = 0.06 * (high - low) or 1.0
        for axes in grid.flat:
            axes.set(ylim=(low - margin, high + margin), xticks=[])
            axes.tick_params(labelleft=False, length=0)
        for axes in grid.flat[len(lines) :]:
            axes.set_visible(False)
        figure.suptitle(title, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
        words = figure.text(0.99, 0.985, "", ha="right", va="top", fontsize=8.5)
        images, few = [], Image.new("P", (1, 1))
        few.putpalette(_paints(BLUE, STYLE["text.color"], STYLE["axes.edgecolor"]))
        for step in steps:
            for line, curve in zip(lines, states[step], strict=True):
                line.set_ydata(curve)
            words.set_text(f"step {step:>4} of {steps[-1]}")
            canvas: Any = figure.canvas  # Agg's
            canvas.draw()
            frame = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
            images.append(frame.convert("RGB").quantize(palette=few, dither=Image.Dither.NONE))
            figure.set_layout_engine("none")  # panels stand still from the first frame on
    write_gif(images, file, times)


def _paints(*colours: str) -> bytes:
    """A palette of 16 on white: five tints of each colour, which smooth edges need."""
    dark = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in colours])
    tints = 255 - np.linspace(0.2, 1, 5)[:, None, None] * (255 - dark)
    return np.concatenate([np.full((1, 3), 255), tints.reshape(-1, 3)]).round().astype(np.uint8).tobytes()
