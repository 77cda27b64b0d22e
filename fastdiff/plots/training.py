"""Figures of schedules, of training, and of how samplers converge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_float
from fastdiff.plots.layout import blank, legend, one_axes, plain_logarithms, whole_numbers
from fastdiff.plots.style import BLUE, GREY, ORANGE, RED, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastdiff.schedule import Schedule


def schedule_factors(schedule: Schedule) -> Figure:
    """Draw what one jump to timestep t keeps of the signal and adds of noise, and the log of their ratio's square.

    ``x_t = signal_t x_0 + noise_t z``: the two factors against t, and log SNR = log(signal^2 / noise^2), with what is
    left of the signal where the chain ends.

    Parameters
    ----------
    schedule : Schedule
        Its `signal` and `noise` are drawn, (T,) each.

    Examples
    --------
    >>> from fastdiff import plots
    >>> len(plots.schedule_factors(fd.Schedule.cosine(100)).axes)  # the factors, and log SNR
    2
    """
    signal = check_array("schedule.signal", schedule.signal, shape=(None,))
    noise = check_array("schedule.noise", schedule.noise, shape=signal.shape)
    with styled():
        figure = blank(7.8, 3.2)
        factors, ratio = figure.subplots(1, 2)
        t = np.arange(len(signal))
        mark = "o" if len(t) < 12 else None
        preserving = np.allclose(signal**2 + noise**2, 1)
        formulas = (r" $\sqrt{\bar\alpha_t}$", r" $\sqrt{1-\bar\alpha_t}$") if preserving else ("", "")
        factors.plot(t, signal, color=BLUE, marker=mark, markersize=3.5, label="signal" + formulas[0])
        factors.plot(t, noise, color=ORANGE, marker=mark, markersize=3.5, label="noise" + formulas[1])
        factors.set(xlabel="timestep t", ylabel="factor", ylim=(-0.02, 1.04))
        legend(factors)
        log_snr = np.full(len(t), np.nan)
        there = (signal > 0) & (noise > 0)
        log_snr[there] = 2 * np.log(signal[there] / noise[there])
        ratio.plot(t, log_snr, color=BLUE, marker=mark, markersize=3.5)
        ratio.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        end = int(np.flatnonzero(there)[-1])
        ratio.plot(t[end], log_snr[end], "o", color=RED, markersize=5)
        words = f"ends at signal {signal[-1]:.2g}" + ("" if signal[-1] > 0 else ": noise alone")
        ratio.set_title(words, fontsize=9, fontweight="normal", color=RED, loc="right", pad=4)
        ratio.set(xlabel="timestep t", ylabel="log SNR")
        figure.suptitle("How much signal, how much noise", x=0.02, ha="left", fontsize=10.5, fontweight="bold")
        for axes in (factors, ratio):
            whole_numbers(axes)
    return figure


def loss(history: Mapping[str, Sequence[float]], *, linear: float | None = None) -> Figure:
    """Draw the training loss, raw and smoothed, and that of held-out rows where there is one, with its smallest.

    Parameters
    ----------
    history : mapping
        ``Diffusion.history``: lists "step" and "loss", and "validation_step" and "validation_loss".
        The smoothed line is the mean over a window of a fiftieth of the steps, centred.
    linear : float, optional
        The loss of the best linear denoiser, ``Diffusion.linear_loss``: what a network must come below.

    Examples
    --------
    >>> from fastdiff import plots
    >>> history = {"step": [10, 20, 30], "loss": [1.0, 0.5, 0.4]}
    >>> history |= {"validation_step": [20, 30], "validation_loss": [0.5, 0.45]}
    >>> len(plots.loss(history, linear=0.6).axes)
    1
    """
    step = check_array("history['step']", history.get("step", []), shape=(None,))
    value = check_array("history['loss']", history.get("loss", []), shape=step.shape, finite=False)
    if not len(step):
        raise ArgumentError("history", "no steps", "the history of a model that was fitted")
    held_step = check_array("history['validation_step']", history.get("validation_step", []), shape=(None,))
    held = check_array(
        "history['validation_loss']", history.get("validation_loss", []), shape=held_step.shape, finite=False
    )
    with one_axes(6.4, 3.6) as (figure, axes):
        axes.plot(step, value, color=BLUE, linewidth=0.6, alpha=0.35, label="each batch")
        axes.plot(step, _smoothed(value), color=BLUE, label="smoothed")
        if len(held):
            mark = "o" if len(held) <= 25 else None  # more would cover the line
            label = "held out, averaged weights"
            axes.plot(held_step, held, color=ORANGE, marker=mark, markersize=4, linewidth=1.3, label=label)
        note = ""
        if len(held) and np.isfinite(held).any():
            best = int(np.nanargmin(held))
            axes.plot(held_step[best], held[best], "o", color=RED, markersize=5.5, zorder=4)
            note = f" (red: the smallest held-out loss, {held[best]:.3g} at step {int(held_step[best]):,})"
        if linear is not None:
            lowest = check_float("linear", linear, low=0)
            axes.axhline(lowest, color=GREY, linewidth=1.2, linestyle="--", label="best linear denoiser")
        axes.set(xlabel=f"training step{note}", ylabel="mean squared error")
        figure.suptitle("Training loss", x=0.02, ha="left", fontsize=10.5, fontweight="bold")
        if min(value.min(), held.min() if len(held) else 1.0) > 0:  # False for NaN too
            axes.set_yscale("log")
            plain_logarithms(axes)
        whole_numbers(axes)
        legend(axes)
    return figure


def convergence(
    steps: npt.ArrayLike, distances: Mapping[str, npt.ArrayLike], *, plateau: tuple[float, str] | None = None
) -> Figure:
    """Draw how far samplers end from the data, against their number of steps.

    Parameters
    ----------
    steps : (k,) array_like of int
    distances : mapping of str to (k,) array_like
        For each sampler, above 0: ``exact_chain(...).w2()``. NaN where a sampler cannot take so many steps.
    plateau : pair of float and str, optional
        A distance that no number of steps comes below, and why: a line with these words.

    Examples
    --------
    >>> from fastdiff import plots
    >>> s = fd.Schedule.cosine(100)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> far = [fd.denoisers.exact_chain(law, fd.samplers.ddim(s, n)).w2() for n in (5, 10, 20)]
    >>> len(plots.convergence([5, 10, 20], {"ddim": far}).axes)
    1
    """
    at = check_array("steps", steps, shape=(None,))
    with one_axes(6.4, 3.8) as (figure, axes):
        for (name, values), colour in zip(distances.items(), (GREY, BLUE, ORANGE, RED) * len(distances), strict=False):
            shown = check_array(f"distances[{name!r}]", values, shape=at.shape, finite=False)
            axes.loglog(at, shown, color=colour, marker="o", markersize=3.5, label=name)
        if plateau is not None:
            level = check_float("plateau", plateau[0], low=0, low_open=True)
            axes.axhline(level, color="#1f2328", linewidth=0.9, linestyle=":")
            axes.annotate(
                f"{plateau[1]}: {level:.2g}", (0.01, level), xycoords=("axes fraction", "data"), xytext=(0, -4),
                textcoords="offset points", va="top", fontsize=8,
            )  # fmt: skip
            axes.set_ylim(bottom=min(axes.get_ylim()[0], 0.6 * level))
        axes.set(title="Exact distance to the data", xlabel="sampling steps", ylabel="2-Wasserstein distance")
        axes.xaxis.set_major_formatter("{x:g}")
        legend(axes)
    return figure


def _smoothed(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Mean over a centred window of a fiftieth of the values, cut off at both ends."""
    half = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    means: npt.NDArray[np.float64] = (total[last] - total[first]) / (last - first)
    return means
