"""What is missing of recordings, and what follows them: window by window, each given what those before have drawn.

A window of T rows moves along the recording from left to right. Its first third has been finished before, and its last
third is drawn to be drawn again by the next window, which sees more of what follows; so a gap of a third of a window or
less is filled in by a window that sees both of its ends. Every draw goes its own way: a window is given the values that
the same draw has finished.

Draw k of window w of recording i has the noise of sample ``(i 2^16 + w) 2^20 + k``. Nothing depends on how many draws
or recordings there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends.protocol import DRAWS
from fastdiff.errors import ArgumentError, check_array, check_float
from fastdiff.observations import Observations

log = logging.getLogger("fastdiff")

Float64 = npt.NDArray[np.float64]
Values = npt.NDArray[Any]
Drawn = Callable[[Observations, npt.NDArray[np.int64], int], Values]
"""Takes observations, one for each sample, of which recording each is, and the first row of the window; returns the
samples (count, ...)."""

WINDOWS = 1 << 16  # of a recording
BLOCK_VALUES = 1 << 24  # of draws that are held at once, where quantiles are asked for


class Step(NamedTuple):
    """A window: its rows start ... start + T - 1, of which those before `finished` are not drawn again."""

    number: int
    start: int
    finished: int


def steps_of(length: int, T: int) -> list[Step]:
    """Return the windows over a recording of so many rows: the last one ends with it, whose rows are at least T."""
    third = max(1, T // 3)
    advance = max(1, T - 2 * third)
    starts = [*range(0, max(0, length - T), advance), max(0, length - T)]
    steps = []
    for k, start in enumerate(starts):
        last = k + 1 == len(starts)
        steps.append(Step(k, start, length if last else min(starts[k + 1] + third, start + T)))
    if len(steps) > WINDOWS:
        raise ArgumentError("X", f"a recording of {length} rows", f"at most {WINDOWS} windows: cut it")
    return steps


def filled(
    seen: Float64, shape: tuple[int, ...], draws: int, drawn: Drawn, steps: Sequence[Step], first_draw: int = 0
) -> Iterator[tuple[slice, Float64]]:
    """Yield finished rows of recordings, from left to right: which, and their draws (draws, N, rows, ...).

    Parameters
    ----------
    seen : (N, time, ...) array
        NaN where nothing is known; at least as long as a window.
    shape : tuple of int
        Of a window, (T, ...).
    draws : int
    drawn : callable
    steps : sequence of Step
    first_draw : int, optional
    """
    T, count = shape[0], len(seen)
    kept = np.empty((draws, count, 0, *shape[1:]))  # what the windows before have finished, from `begin` on
    begin = done = 0
    for step in steps:
        stop = step.start + T
        window = np.repeat(seen[None, :, step.start : stop], draws, axis=0)
        overlap = slice(step.start - begin, done - begin)
        window[:, :, : done - step.start] = kept[:, :, overlap]
        wanted = slice(max(done, step.start) - step.start, step.finished - step.start)
        rows = np.flatnonzero(np.isnan(window[0, :, wanted]).reshape(count, -1).any(axis=1))
        if len(rows):
            flat = window[:, rows].swapaxes(0, 1).reshape(len(rows) * draws, -1)  # all draws of a recording together
            first = (rows * WINDOWS + step.number) * DRAWS + first_draw
            firsts = (first[:, None] + np.arange(draws)).reshape(-1)
            width = math.prod(shape)
            known = Observations(width, len(flat), ((flat, np.zeros(width)),), (), (), np.float64, firsts=firsts)
            got = drawn(known, np.repeat(rows, draws), step.start).reshape(len(rows), draws, *shape)
            window[:, rows] = got.swapaxes(0, 1)
        fresh = slice(max(done, step.start), step.finished)
        if fresh.stop > fresh.start:
            yield fresh, window[:, :, wanted]
        kept, begin, done = window, step.start, max(done, step.finished)


def summary(parts: Iterator[tuple[slice, Float64]], quantiles: Sequence[float] | None, axis: int) -> Float64:
    """Return all draws, or their quantiles, of which only a window's draws are held, along the time axis."""
    found = [part if quantiles is None else np.quantile(part, quantiles, axis=0) for _, part in parts]
    return np.concatenate(found, axis=axis)


def check_quantiles(quantiles: Any) -> list[float] | None:
    """Return the levels in the order that was asked for."""
    if quantiles is None:
        return None
    levels = np.atleast_1d(check_array("quantiles", quantiles, min_ndim=0)).tolist()
    if not levels:
        raise ArgumentError("quantiles", "none", "levels from 0 to 1, as in (0.05, 0.5, 0.95)")
    return [check_float("quantiles", level, low=0, high=1) for level in levels]


def forecast_plan(past: int, horizon: int, T: int) -> tuple[int, list[Step]]:
    """Return from which row of the past on it is used (negative: rows before it are missing), and the windows.

    Where past and horizon fit into a window they are its beginning. Else every window draws the half of its rows, or
    what is left of the horizon, given the rows before.
    """
    if past + horizon <= T:
        return 0, [Step(0, 0, past + horizon)]
    ahead = min(horizon, max(1, T // 2))
    first = past + ahead - T
    rolls = -(-horizon // ahead)
    if rolls > WINDOWS:
        raise ArgumentError("horizon", f"{horizon}", f"at most {WINDOWS * ahead}")
    return first, [Step(k, k * ahead, T + k * ahead) for k in range(rolls)]


def blocks_of(T: int, block: int) -> list[slice]:
    """The blocks of a window."""
    return [slice(start, min(start + block, T)) for start in range(0, T, block)]
