"""Figures of schedules, of training, and of how samplers converge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array
from fastdiff.plots.layout import legend, one_axes, plain_logarithms, whole_numbers
from fastdiff.plots.style import BLUE, GREY, ORANGE, RED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastdiff.schedule import Schedule


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
    with one_axes(6.4, 3.6) as (figure, axes):
        t = np.arange(len(signal))
        mark = "o" if len(t) < 12 else None
        preserving = np.allclose(signal**2 + noise**2, 1)
        formulas = (r" $\sqrt{\bar\alpha_t}$", r" $\sqrt{1-\bar\alpha_t}$") if preserving else ("", "")
        axes.plot(t, signal, color=BLUE, marker=mark, markersize=3.5, label="signal" + formulas[0])
        axes.plot(t, noise, color=ORANGE, marker=mark, markersize=3.5, label="noise" + formulas[1])
        axes.set(title="How much signal, how much noise", xlabel="timestep t", ylabel="factor")
        axes.set_ylim(-0.02, 1.04)
        whole_numbers(axes)
        legend(axes)
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
    with one_axes(6.4, 3.6) as (figure, axes):
        axes.plot(step, value, color=BLUE, linewidth=0.6, alpha=0.35, label="each batch")
        axes.plot(step, _smoothed(value), color=BLUE, label="smoothed")
        if len(held):
            mark = "o" if len(held) <= 25 else None  # more would cover the line
            axes.plot(held_step, held, color=ORANGE, marker=mark, markersize=4, linewidth=1.3, label="held out")
        axes.set(title="Training loss", xlabel="training step", ylabel="mean squared error")
        if min(value.min(), held.min() if len(held) else 1.0) > 0:  # False for NaN too
            axes.set_yscale("log")
            plain_logarithms(axes)
        whole_numbers(axes)
        legend(axes)
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
    with one_axes(6.4, 3.8) as (figure, axes):
        for (name, values), colour in zip(distances.items(), (GREY, BLUE, ORANGE, RED) * len(distances), strict=False):
            shown = check_array(f"distances[{name!r}]", values, shape=at.shape, finite=False)
            axes.loglog(at, shown, color=colour, marker="o", markersize=3.5, label=name)
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
