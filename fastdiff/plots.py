"""Figures: each function takes arrays and returns a matplotlib ``Figure``; `save` writes it, `animation` a GIF.

A notebook shows a figure that is the last value of a cell.

matplotlib is imported inside the functions only, and never through pyplot: nothing global is touched, no
window opens, and a figure drawn in a thread or on a machine without a display is the same figure. One style,
`STYLE` and the colours below, serves them all; colours and maps are safe for colour-blind readers (Okabe and
Ito 2008; blues, viridis). Legends and colour bars stand outside the axes, so they hide no data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff import covariance
from fastdiff.errors import ArgumentError, BackendError, check_array, check_float, check_int
from fastdiff.files import check_ending, writing
from fastdiff.pictures import as_uint8, check_pillow, to_pillow

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

    ``x_t = signal_t x_0 + noise_t z``: the two factors against t.

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
        preserving = np.allclose(signal**2 + noise**2, 1)
        formulas = (r" $\sqrt{\bar\alpha_t}$", r" $\sqrt{1-\bar\alpha_t}$") if preserving else ("", "")
        axes.plot(t, signal, color=BLUE, marker=mark, markersize=3.5, label="signal" + formulas[0])
        axes.plot(t, noise, color=ORANGE, marker=mark, markersize=3.5, label="noise" + formulas[1])
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


def reverse_chain(
    path: npt.ArrayLike, target: npt.ArrayLike | None = None, *, rate: float | None = None, sampler: str | None = None
) -> Figure:
    """Draw all steps of one reverse chain over each other, from light (noise) to dark (the result).

    Parameters
    ----------
    path : array_like
        (steps + 1, points), noise first: one curve of a trajectory, ``path[:, k]``.
    target : array_like, optional
        (points,), the curve that was to be reached: a broad red line under the result.
    rate : float, optional
        Points a second: the horizontal axis is in seconds.
    sampler : str, optional
        What drew it, for the colour bar: `Sampler.label`.
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
        bar.set_label(_by("sampling steps done", sampler))
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
        Headings of the two halves; the first one may say how they were drawn: `Sampler.label`.
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
        figure = _blank(max(3.2, 1.45 * columns * len(sets) + 0.9), 0.95 * rows + 1.0)
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
        top.plot([], [], color=BLUE, linewidth=1, label=_by(f"{shown} generated", sampler))
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
        _legend(top)
    return figure


def evaluation(
    real: npt.ArrayLike,
    generated: npt.ArrayLike,
    training: npt.ArrayLike | None = None,
    *,
    names: tuple[str, str] = ("real", "generated"),
    measures: Mapping[str, str] | None = None,
    title: str = "Generated beside real",
    count: int = 12,
    rate: float | None = None,
    columns: Sequence[str] | None = None,
    ordered: bool | None = None,
) -> Figure:
    """Draw on one page how generated rows compare with real ones.

    From above: what was measured; a dozen rows of each; percentiles, mean and standard deviation of every column;
    autocorrelation and power spectrum within rows, or, of a table of different things, its correlations; all values;
    the distances to the nearest training rows, and three generated rows over their nearest one.

    Parameters
    ----------
    real : array_like
        (N, d), N at least 1: rows that were not learned from, if there are any.
    generated : array_like
        (M, d), M at least 1.
    training : array_like, optional
        (K, d), the rows learned from. Without them nearest rows are looked for among the real ones.
    names : pair of str, optional
        What the legend calls real and generated rows; the second one may name the sampler: `Sampler.label`.
    measures : mapping of str to str, optional
        Lines for the head of the page: what was measured, and the result.
    title : str, optional
        The heading.
    count : int, optional
        Rows of each kind that are drawn one by one, evenly spaced.
    rate : float, optional
        Points a second: horizontal axes are in seconds and hertz. Otherwise they count points.
    columns : sequence of str, optional
        (d,) names, for tables.
    ordered : bool, optional
        Whether the columns follow one another, as those of curves do. By default they do if there are at least eight,
        and the real rows' deviation seldom jumps from one to the next: at most a fifth by more than three times. If
        they do not, and some deviations are ten times others, columns are drawn, and distances taken, as standard
        scores of the real rows.
    """
    from fastdiff import evaluation_page

    rows = {"real": real, "generated": generated, "training": training}
    given = {name: check_array(name, value, shape=(None, None)) for name, value in rows.items() if value is not None}
    shape = (None, given["real"].shape[1])
    for name, value in given.items():
        given[name] = check_array(name, value, shape=shape, dtype=np.float64)
        if not value.size:
            raise ArgumentError(name, f"shape {value.shape}", "at least one row of at least one value")
    if columns is not None and len(columns) != shape[1]:
        raise ArgumentError("columns", f"{len(columns)} names", f"one for each of {shape[1]} columns")
    with _style():
        page = evaluation_page.page_of(
            given["real"], given["generated"], given.get("training"), ordered=ordered, rate=rate, columns=columns
        )
        return evaluation_page.draw(
            page, names=names, measures=measures or {}, title=title, count=check_int("count", count, low=1)
        )


def covariances(matrices: Mapping[str, npt.ArrayLike]) -> Figure:
    """Draw matrices as heat maps, each over its spectrum: how much of it lies in how few directions.

    Parameters
    ----------
    matrices : mapping of str to (n, n) array_like
        Titles and symmetric matrices, of any sizes. The effective rank (entropy form) stands with the spectrum.
    """
    given = {title: check_array("matrices", matrix, shape=(None, None)) for title, matrix in matrices.items()}
    if not given:
        raise ArgumentError("matrices", "none", "at least one")
    with _style():
        figure = _blank(2.9 * len(given) + 0.2, 4.6)
        top, bottom = figure.subplots(2, len(given), squeeze=False, height_ratios=(3, 2))
        floor = 1e-6  # of the largest eigenvalue: below it there is rounding, or nothing
        for axes, title in zip(top, given, strict=True):
            image = axes.imshow(given[title], cmap="viridis", interpolation="nearest")
            axes.grid(visible=False)
            axes.set(title=title, xticks=[], yticks=[])
            bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7.5)
        for axes, matrix in zip(bottom, given.values(), strict=True):
            values = covariance.spectrum(matrix)
            shown = values[values > floor * values[0]]
            axes.semilogy(np.arange(1, len(shown) + 1), shown, color=BLUE)
            rank = f"effective rank {covariance.effective_rank(matrix):.1f} of {len(values)}"
            axes.set_title(rank, fontsize=9, fontweight="normal", pad=4)
            margin = 0.015 * len(values)
            axes.set(
                xlabel="eigenvalue", ylim=(floor * values[0], 3 * values[0]), xlim=(1 - margin, len(values) + margin)
            )
            _whole_numbers(axes)
        bottom[0].set_ylabel("size")
    return figure


def spectra(source: npt.ArrayLike, target: npt.ArrayLike) -> Figure:
    """Draw the spectra of two covariances and, on the same axes, the gain that turns one into the other.

    Parameters
    ----------
    source, target : (n, n) array_like
        Of `covariance.reshaping`; the gain of a direction is the root of the ratio of its eigenvalues.
    """
    here, there = covariance.spectrum(source), covariance.spectrum(target)
    if len(here) != len(there):
        raise ArgumentError("target", f"size {len(there)}", f"size {len(here)}, as the source has")
    at, shown = np.arange(1, len(here) + 1), there > 1e-10 * there[0]
    with _figure(6.4, 3.6) as (figure, axes):
        axes.semilogy(at, here, color=GREY, label="source")
        axes.semilogy(at[shown], there[shown], color=BLUE, label="target")
        gain = np.sqrt(there[shown] / here[shown])
        axes.semilogy(at[shown], gain, color=ORANGE, linestyle="--", label="gain")
        axes.set(title="What reshaping does to each direction", xlabel="eigenvalue", ylabel="size")
        _whole_numbers(axes)
        _legend(axes)
    return figure


def reshaped(
    before: npt.ArrayLike, after: npt.ArrayLike, signal: npt.ArrayLike, *, rate: float | None = None
) -> Figure:
    """Draw curves before and after a reshaping, coloured by how far from a signal each ends.

    Parameters
    ----------
    before, after : (m, n) array_like
        The same curves in the same order.
    signal : (n,) array_like
    rate : float, optional
        Points a second: the horizontal axis is in seconds.
    """
    first = check_array("before", before, shape=(None, None))
    last = check_array("after", after, shape=first.shape)
    wanted = check_array("signal", signal, shape=first.shape[1:])
    if not first.size:
        raise ArgumentError("before", f"shape {first.shape}", "at least one curve")
    with _style():
        from matplotlib.collections import LineCollection

        figure = _blank(7.4, 3.4)
        panels = figure.subplots(1, 2, sharey=True)
        x, label = _horizontal(first.shape[1], rate)
        distance = np.sqrt(np.mean((last - wanted) ** 2, axis=1))
        order = np.argsort(-distance)  # the nearest on top
        for axes, curves, title in zip(panels, (first, last), ("Noise", "Reshaped noise"), strict=True):
            lines = LineCollection(
                [np.column_stack([x, curve]) for curve in curves[order]],
                cmap=_blues().reversed(), linewidths=0.8, array=distance[order],
            )  # fmt: skip
            axes.add_collection(lines)
            axes.plot(x, wanted, color=RED, linewidth=1.6, label="signal")
            axes.autoscale_view()
            axes.set(title=title, xlabel=label)
        panels[0].set_ylabel("value")
        _legend(panels[1])
        bar = figure.colorbar(lines, ax=panels, pad=0.02, fraction=0.04, aspect=30)
        bar.set_label("distance to the signal in the end")
        bar.outline.set_visible(False)
    return figure


def convergence(steps: npt.ArrayLike, distances: Mapping[str, npt.ArrayLike]) -> Figure:
    """Draw how far samplers end from the data, against their number of steps.

    Parameters
    ----------
    steps : (k,) array_like of int
    distances : mapping of str to (k,) array_like
        For each sampler, above 0: ``exact_chain(...).w2()``. NaN where a sampler cannot take so many steps.
    """
    at = check_array("steps", steps, shape=(None,))
    with _figure(6.4, 3.8) as (figure, axes):
        for (name, values), colour in zip(distances.items(), (GREY, BLUE, ORANGE, RED) * len(distances), strict=False):
            shown = check_array(f"distances[{name!r}]", values, shape=at.shape, finite=False)
            axes.loglog(at, shown, color=colour, marker="o", markersize=3.5, label=name)
        axes.set(title="Exact distance to the data", xlabel="sampling steps", ylabel="2-Wasserstein distance")
        axes.xaxis.set_major_formatter("{x:g}")
        _legend(axes)
    return figure


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
    with _figure(6.4, 0.9 + 0.24 * len(names)) as (figure, axes):
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
    with _style():
        figure = _blank(3.5 * columns + 0.4, 2.3 * rows + 0.5)
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
            _plain_logarithms(axes)
            axes.yaxis.set_major_formatter(_as_duration)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supylabel("time", fontsize=9)
        _heading(figure, "Time against size", [shown[name] for name in sides], sides)
    return figure


def image_grid(
    images: npt.ArrayLike,
    *,
    columns: int = 4,
    labels: Sequence[object] | None = None,
    title: str = "Generated pictures",
    data_range: tuple[float, float] = (0, 255),
) -> Figure:
    """Draw pictures side by side, row by row; small ones enlarged by a whole number, pixel for pixel.

    Parameters
    ----------
    images : array_like
        (N, H, W, C) real numbers, C = 1 (gray) or 3 (RGB).
    columns : int, optional
        Pictures in a row.
    labels : sequence, optional
        A word or number above each picture, or, where there are as many as columns, above each column.
    title : str, optional
        The heading.
    data_range : pair of float, optional
        The values of black and white; what is outside is clipped.
    """
    pixels = as_uint8(images, data_range=data_range)
    columns = min(check_int("columns", columns, low=1), len(pixels))
    if not len(pixels):
        raise ArgumentError("images", "none", "at least one")
    words = [] if labels is None else [str(label) for label in labels]
    if labels is not None and len(words) not in (len(pixels), columns):
        wants = f"one for each of {len(pixels)} pictures or {columns} columns"
        raise ArgumentError("labels", f"{len(words)} words", wants)
    return _pictures(pixels, columns, title, words)


def image_trace(
    path: npt.ArrayLike,
    *,
    frames: int = 11,
    data_range: tuple[float, float] = (0, 255),
    sampler: str | None = None,
) -> Figure:
    """Draw chains from noise to picture, a row each, in frames that are evenly spaced over the steps.

    Parameters
    ----------
    path : array_like
        (steps + 1, n, H, W, C), noise first: a trajectory, every chain of which is drawn. Or that of one chain,
        (steps + 1, H, W, C).
    frames : int, optional
        Pictures of each chain, at least 2; all of them where there are fewer.
    data_range : pair of float, optional
        The values of black and white; what is outside is clipped, so early frames show less contrast than they have.
    sampler : str, optional
        What drew them, for the heading: `Sampler.label`.
    """
    pixels, steps = _frames(path, frames, data_range)
    shown = np.swapaxes(pixels, 0, 1).reshape(-1, *pixels.shape[2:])
    words = [str(step) for step in steps]
    title = _by("From noise to a picture", sampler)
    return _pictures(shown, len(steps), title, words, caption="sampling steps done")


def animation(
    path: npt.ArrayLike,
    file: str | os.PathLike[str],
    *,
    columns: int = 4,
    frames: int = 50,
    seconds: float = 4.0,
    hold: float = 2.0,
    data_range: tuple[float, float] = (0, 255),
) -> None:
    """Write chains from noise to picture as an animated GIF that repeats for ever; needs Pillow, not matplotlib.

    Gray pictures keep every value; in colour each frame has the 255 colours that suit it best, and the gaps are white.

    Parameters
    ----------
    path : array_like
        (steps + 1, n, H, W, C), noise first: a trajectory, whose n chains run side by side. Or that of one chain,
        (steps + 1, H, W, C).
    file : path
        A file name that ends in .gif. It appears whole or not at all.
    columns : int, optional
        Pictures in a row.
    frames : int, optional
        States shown, at least 2, evenly spaced over the steps; all of them where there are fewer.
    seconds, hold : float, optional
        Time for all frames, and how much longer the last one stands.
    data_range : pair of float, optional
        The values of black and white; what is outside is clipped.
    """
    check_pillow()
    check_ending(file, (".gif",))
    pixels, steps = _frames(path, frames, data_range)
    columns = min(check_int("columns", columns, low=1), pixels.shape[1])
    # GIF counts hundredths of a second, and many viewers take less than two of them for ten.
    each = max(20, round(1000 * check_float("seconds", seconds, low=0, low_open=True) / len(steps)))
    last = each + round(1000 * check_float("hold", hold, low=0, high=600))
    scale = _enlargement(pixels.shape[2:4], columns, 96)
    images = [_indexed(frame, columns, scale) for frame in pixels]
    with writing(file) as out:
        images[0].save(
            out, format="GIF", save_all=True, append_images=images[1:], loop=0, optimize=False,
            duration=[each] * (len(images) - 1) + [last],
        )  # fmt: skip


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all; the ending of `path` says how (.png, .pdf, .svg)."""
    check_available()
    ending = check_ending(path, ENDINGS)
    with writing(path) as file:
        write(figure, file, ending[1:])


def write(figure: Figure, file: IO[bytes], form: str) -> None:
    """Write a figure into an open file, in the style it was drawn in."""
    with _style():
        figure.savefig(file, format=form)


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
    from fastdiff.figure import NotebookFigure

    return NotebookFigure(width, height)


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """One axes of `width` by `height` inches, drawn in the style."""
    with _style():
        figure = _blank(width, height)
        yield figure, figure.subplots()


WIDTH, GAP, MARGIN = 960, 6, 24  # pixels: of a usual figure, between pictures, around them


def _enlargement(size: Sequence[int], columns: int, most: int) -> int:
    """The whole number by which pictures (H, W) are enlarged: to at most so many pixels, and a row to `WIDTH`."""
    return max(1, min(most // max(size), WIDTH // (columns * size[1])))


def _mosaic(
    pictures: npt.NDArray[np.uint8], columns: int, scale: int, gap: tuple[int, int] = (GAP, GAP)
) -> npt.NDArray[np.uint8]:
    """Pictures (n, H, W, C) enlarged and laid out in rows on 255, (rows (scale H + gap) - gap, ..., C)."""
    n, height, width, channels = pictures.shape
    rows, high, wide = -(-n // columns), height * scale, width * scale
    cells = np.full((rows * columns, high + gap[0], wide + gap[1], channels), 255, np.uint8)
    cells[:n, :high, :wide] = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return grid.reshape(rows * (high + gap[0]), -1, channels)[: -gap[0], : -gap[1]]


def _pictures(
    pixels: npt.NDArray[np.uint8], columns: int, title: str, words: Sequence[str], caption: str | None = None
) -> Figure:
    """Pictures in rows, a pixel of theirs a square of whole pixels of the figure, with words above the first ones."""
    scale = _enlargement(pixels.shape[1:3], columns, 160)
    line = 26  # pixels of a line of words
    gap = (GAP + line if len(words) > columns else GAP, GAP)
    mosaic = _mosaic(pixels, columns, scale, gap)
    height, width = mosaic.shape[:2]
    with _style():
        figure = _blank(1, 1)
        figure.set_layout_engine("none")  # places are given in pixels
        heading = figure.suptitle(title, ha="left", va="top", fontsize=10.5, fontweight="bold")
        room = heading.get_window_extent().width
        above = MARGIN + 34 + (line if words else 0)
        below = MARGIN + (line if caption else 0)
        whole_width, whole_height = max(width, int(room) + 1) + 2 * MARGIN, above + height + below
        figure.set_size_inches(whole_width / figure.dpi, whole_height / figure.dpi)
        heading.set_position((MARGIN / whole_width, 1 - MARGIN / whole_height))
        axes = figure.add_axes(
            (MARGIN / whole_width, below / whole_height, width / whole_width, height / whole_height), frameon=False
        )
        axes.imshow(mosaic.repeat(3 // mosaic.shape[2], axis=2), interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        cell = (pixels.shape[1] * scale + gap[0], pixels.shape[2] * scale + gap[1])
        for k, word in enumerate(words):
            row, column = divmod(k, columns)
            axes.text(
                column * cell[1] + (cell[1] - gap[1]) / 2 - 0.5, row * cell[0] - 0.5 - GAP, word,
                ha="center", va="bottom", fontsize=8.5,
            )  # fmt: skip
        if caption:
            axes.set_xlabel(caption, loc="left")
    return figure


def _frames(
    path: npt.ArrayLike, frames: int, data_range: tuple[float, float]
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """States of a trajectory as bytes (frames, n, H, W, C), evenly spaced, and the number of steps before each."""
    states = check_array("path", path, min_ndim=4, finite=False)
    if states.ndim == 4:
        states = states[:, None]
    if states.ndim != 5 or len(states) < 2 or not states.shape[1]:
        raise ArgumentError("path", f"shape {states.shape}", "(steps + 1, n, H, W, C) with at least one step")
    count = min(check_int("frames", frames, low=2), len(states))
    steps = np.linspace(0, len(states) - 1, count).round().astype(int).tolist()
    shown = states[steps]
    pixels = as_uint8(shown.reshape(-1, *shown.shape[2:]), data_range=data_range, argument="path")
    return pixels.reshape(shown.shape), steps


def _indexed(pictures: npt.NDArray[np.uint8], columns: int, scale: int) -> Any:
    """A mosaic as a GIF frame with at most 256 colours, 255 the white of the gaps."""
    n, height, width, channels = pictures.shape
    if channels == 1:
        return to_pillow(_mosaic(pictures, columns, scale))
    from PIL import Image

    # Colours are chosen before the enlargement and without the gaps: neither changes them.
    strip = to_pillow(pictures.reshape(n * height, width, 3)).quantize(255, Image.Quantize.MEDIANCUT, kmeans=1)
    frame = to_pillow(_mosaic(np.asarray(strip).reshape(n, height, width, 1), columns, scale))
    palette = strip.getpalette()[: 3 * 255]
    frame.putpalette(palette + [0] * (3 * 255 - len(palette)) + [255] * 3)
    return frame


def _by(what: str, sampler: str | None) -> str:
    return what if sampler is None else f"{what}: {sampler}"


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


def _plain_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """Label a log axis by the few values that there are."""
    from matplotlib.ticker import NullLocator

    axes.set_xticks(sizes, [f"{size:,g}" if size < 1e6 else f"{size:.0e}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def _as_duration(seconds: float, _: int | None = None) -> str:
    """10 ms for 0.01."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= 0.999 * s), ("µs", 1e-6))
    return f"{seconds / size:g} {unit}"


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
