"""What a model says of rows and recordings: what is missing, what follows, what is strange.

`impute`, `forecast` and `anomaly` are the methods of `Diffusion`. Rows are answered at once; a recording, or a horizon
beyond the window, is answered window by window, as `fastdiff.recordings` plans it. A frame comes back as frames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff import series
from fastdiff.backends import Backend, get_backend
from fastdiff.backends.protocol import DRAWS
from fastdiff.covariates import checked_covariates
from fastdiff.errors import ArgumentError, as_named, check_array, check_int, check_room, check_size
from fastdiff.generation import MOST_ASKED
from fastdiff.nn import Network
from fastdiff.noise import MAX_ROW
from fastdiff.normaliser import Normaliser
from fastdiff.observations import Known, Observations, observations
from fastdiff.recordings import (
    BLOCK_VALUES,
    Step,
    blocks_of,
    check_quantiles,
    filled,
    forecast_plan,
    steps_of,
    summary,
)
from fastdiff.schedule import Schedule

log = logging.getLogger("fastdiff")

LEAST_DEVIATION = 1e-3  # of draws, relative to the data's: a value that never varies is not infinitely strange

Float64 = npt.NDArray[np.float64]
Values = npt.NDArray[Any]


class Model(Protocol):
    """What a question needs of a `Diffusion`."""

    backend: str | Backend
    channel_names: list[str] | None

    def _fitted(self) -> tuple[Network, Schedule, Normaliser]: ...
    def impute(self, *args: Any, **options: Any) -> Any: ...
    def sample(self, *args: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Draws:
    """How an answer is drawn: how many times, of which class and with which covariates each row.

    `quantiles` are levels that are asked for instead of the draws, and `options` are those of `Diffusion.sample`.
    """

    count: int
    quantiles: Any
    first: int
    labels: Any
    covariates: Any
    options: dict[str, Any]
    first_row: int = 0

    @property
    def levels(self) -> list[float] | None:
        """The quantiles, checked."""
        return check_quantiles(self.quantiles)

    def labels_of(self, rows: npt.NDArray[np.int64], n: int) -> Any:
        """The classes of some of n rows."""
        labels = None if self.labels is None else check_array("labels", self.labels)
        return labels if labels is None or labels.ndim == 0 else check_array("labels", labels, shape=(n,))[rows]


@as_named(first_sample="first_draw", values="X")
def impute(model: Model, X: Any, draws: Draws) -> Any:
    """Draw what is missing, as `Diffusion.impute` says."""
    net, _, _ = model._fitted()
    count, levels = check_int("draws", draws.count, low=1), draws.levels
    X, frame, whole = _asked(model, "X", X)
    if np.ndim(X) == 0:
        raise ArgumentError("X", "shape ()", f"rows of shape {net.shape}: (N, ...)")
    most = 0 if whole else MAX_ROW // DRAWS - np.shape(X)[0]
    first_row = check_int("first_row", draws.first_row, low=0, high=most)
    if whole:
        points, T = len(X), net.shape[0]
        if np.shape(X)[1:] != net.shape[1:]:
            wants = f"a recording (time, {net.shape[-1]}), or rows of shape {net.shape}: (N, ...)"
            raise ArgumentError("X", f"shape {np.shape(X)}", wants)
        padded = np.full((1, max(points, T), *net.shape[1:]), np.nan)
        padded[0, :points] = X
        inputs = _laid(model, draws.covariates, (1, points), 0, padded.shape[1], whole=True)
        parts = _filled(model, padded, steps_of(padded.shape[1], T), draws, inputs)
        found = summary(parts, levels, axis=2)[:, 0, :points]
        return found if frame is None else _frames([frame.filled(_columns(one)) for one in found], levels)
    seen = Known(X)
    if seen.values.shape[1:] != net.shape:
        raise ArgumentError("X", f"shape {seen.values.shape}", f"rows of shape {net.shape}: (N, ...)")
    known = observations(seen, net.shape)
    values = known.known[0][0]
    missing = np.flatnonzero(np.isnan(values).any(axis=1))
    dtype = np.dtype(np.float64) if levels else np.result_type(np.float32, known.dtype)
    check_room("draws", (count, *values.shape), dtype)
    out = np.empty((len(levels or range(count)), len(values), *net.shape), dtype)
    out[...] = values.astype(dtype).reshape(len(values), *net.shape)
    form = net.covariate_form
    shape = None if form is None else form.shape
    inputs = None if draws.covariates is None else checked_covariates(draws.covariates, shape, len(values))
    at_once = len(missing) if levels is None else max(1, BLOCK_VALUES // (count * values.shape[1]))
    for start in range(0, len(missing), max(1, at_once)):
        some = missing[start : start + at_once]
        drawn = model.sample(
            count, labels=draws.labels_of(some, len(values)), covariates=None if inputs is None else inputs[some],
            first_sample=draws.first, given=known.some(some, first_row), **draws.options,
        )  # fmt: skip
        out[:, some] = drawn if levels is None else np.quantile(drawn, levels, axis=0)
    return out if frame is None else _frames([frame.filled(one) for one in out], levels)


@as_named(first_sample="first_draw", values="past")
def forecast(model: Model, past: Any, horizon: int, draws: Draws) -> Any:
    """Draw what comes after the past, as `Diffusion.forecast` says."""
    net, _, _ = model._fitted()
    T = net.shape[0]
    if len(net.shape) > 2:
        raise ArgumentError("past", "a model of pictures", "a model of curves or series")
    levels = draws.levels
    horizon = check_int("horizon", horizon, low=1)
    past, frame, whole = _asked(model, "past", past)
    seen = check_array("past", past, finite=False, dtype=np.float64)
    seen = seen[None] if whole else seen
    if seen.ndim != len(net.shape) + 1 or seen.shape[2:] != net.shape[1:] or not seen.shape[1]:
        wants = ("rows", *net.shape[1:]) if whole else ("N", "rows", *net.shape[1:])
        raise ArgumentError("past", f"shape {seen.shape[whole:]}", f"shape ({', '.join(map(str, wants))})")
    if np.isinf(seen).any():
        raise ArgumentError("past", "infinite values", "finite values, or NaN where nothing is known")
    rows = seen.shape[1]
    if rows > T and not whole:
        raise ArgumentError("past", f"{rows} rows", f"at most {T}, as a window has: past[:, -{T}:]")
    first, windows = forecast_plan(rows, horizon, T)
    if first > 0:
        log.info("forecast: the last %d of %d rows are used", rows - first, rows)
    laid = np.full((len(seen), windows[-1].start + T, *net.shape[1:]), np.nan)
    laid[:, max(0, -first) : rows - first] = seen[:, max(0, first) :]
    inputs = _laid(model, draws.covariates, (len(seen), rows + horizon), first, laid.shape[1], whole=whole)
    parts = _filled(model, laid, windows, draws, inputs)
    found = summary(parts, levels, axis=2)[:, :, rows - first : rows - first + horizon]
    if frame is not None:
        return _frames([frame.later(_columns(one)) for one in found[:, 0]], levels)
    return found[:, 0] if whole else found


def anomaly(model: Model, X: Any, block: int | None, draws: int, options: dict[str, Any]) -> Any:
    """Return how strange each value is, as `Diffusion.anomaly` says."""
    net, _, normaliser = model._fitted()
    T = net.shape[0]
    block = max(1, T // 8) if block is None else check_int("block", block, low=1, high=T)
    draws = check_int("draws", draws, low=2)
    X, frame, whole = _asked(model, "X", X)
    values = check_array("X", X, finite=False, dtype=np.float64)
    windows = steps_of(len(values), T) if whole and len(values) >= T else []
    if whole and not windows:
        raise ArgumentError("X", f"{len(values)} rows", f"at least {T}, as a window has")
    if not whole and values.shape[1:] != net.shape:
        raise ArgumentError("X", f"shape {values.shape}", f"rows of shape {net.shape}: (N, ...)")
    rows = np.stack([values[step.start : step.start + T] for step in windows]) if whole else values
    if whole and net.pointwise and options.get("covariates") is not None:
        inputs = check_array("covariates", options["covariates"], shape=(len(values), None), dtype=np.float64)
        options = options | {"covariates": np.stack([inputs[step.start : step.start + T] for step in windows])}
    found = np.full(rows.shape, np.nan)
    least = LEAST_DEVIATION * np.broadcast_to(normaliser.std, net.shape)
    for part in blocks_of(T, block):
        holed = rows.copy()
        holed[:, part] = np.nan
        drawn = model.impute(holed, draws, **options)[:, :, part]
        m, s = drawn.mean(axis=0), np.maximum(drawn.std(axis=0, ddof=1), least[part])
        found[:, part] = ((rows[:, part] - m) / s) ** 2 / 2
    if not whole:
        return found if frame is None else frame.filled(found)
    out, done = np.full(values.shape, np.nan), 0
    for step, one in zip(windows, found, strict=True):
        out[done : step.finished] = one[done - step.start : step.finished - step.start]
        done = step.finished
    return out if frame is None else frame.filled(_columns(out))


def _asked(model: Model, argument: str, X: Any) -> tuple[Any, series.Frame | None, bool]:
    """Return what a question is about as an array, the frame that it was, and whether it is one recording."""
    net, _, _ = model._fitted()
    if isinstance(X, series.Windows):
        X = X.values
    if not series.is_frame(X):
        X = check_array(argument, X, finite=False)
        check_size(argument, X, MOST_ASKED)
        return X, None, X.ndim == len(net.shape) < 3
    frame = series.Frame.of(X, argument)
    check_size(argument, frame.values, MOST_ASKED, names=frame.names)
    columns = frame.values.shape[1]
    if len(net.shape) == 1:
        if columns not in (1, net.shape[0]):
            raise ArgumentError(argument, f"{columns} columns", f"curves of {net.shape[0]} columns, or one of values")
        if columns > 1:
            return frame.values, frame, False
        frame.check_clock()
        return frame.values[:, 0], frame, True
    if columns != net.shape[-1] or (model.channel_names is not None and frame.names != model.channel_names):
        wants = f"the {net.shape[-1]} of the model" + (f": {model.channel_names}" if model.channel_names else "")
        raise ArgumentError(argument, f"the columns {frame.names}", wants)
    frame.check_clock()
    return frame.values, frame, True


def _laid(
    model: Model, covariates: Any, of: tuple[int, int], first: int, length: int, *, whole: bool
) -> Float64 | None:
    """Return covariates of recordings, where there are any: (N, k), or of every row (N, length, k).

    `of` is how many recordings there are and how many rows of each have covariates, of which the first one that is
    wanted is row `first`. Before the first row and after the last there are theirs.
    """
    net, _, _ = model._fitted()
    form, (count, rows) = net.covariate_form, of
    if covariates is None or form is None:
        return None if covariates is None else checked_covariates(covariates, None, count)  # which sampling refuses
    if not net.pointwise:
        return checked_covariates(covariates, form.shape, count)
    given = check_array("covariates", covariates, dtype=np.float64)
    given = given[None] if whole and given.ndim == 2 else given
    inputs = checked_covariates(given, (rows, form.shape[-1]), count)
    return inputs[:, np.clip(np.arange(first, first + length), 0, rows - 1)]


def _filled(
    model: Model, seen: Float64, windows: list[Step], draws: Draws, covariates: Float64 | None
) -> Iterator[tuple[slice, Float64]]:
    """Yield what has been drawn of recordings: see `fastdiff.recordings.filled`, and for `covariates` `_laid`."""
    net, _, _ = model._fitted()
    count = check_int("draws", draws.count, low=1, high=DRAWS)
    first = check_int("first_draw", draws.first, low=0, high=DRAWS - count)

    def drawn(known: Observations, rows: npt.NDArray[np.int64], start: int) -> Values:
        labels, inputs = draws.labels_of(rows, len(seen)), None
        if covariates is not None:
            inputs = covariates[rows] if covariates.ndim == 2 else covariates[rows, start : start + net.shape[0]]
        got: Values = get_backend(model.backend).to_numpy(
            model.sample(1, labels=labels, covariates=inputs, given=known, **draws.options)
        )
        return got[0]

    return filled(seen, net.shape, count, drawn, windows, first)


def _columns(values: Values) -> Values:
    """A recording as columns."""
    return values if values.ndim == 2 else values[:, None]


def _frames(frames: list[Any], levels: list[float] | None) -> Any:
    """Frames of draws as a list, of quantiles under their levels."""
    return frames if levels is None else dict(zip(levels, frames, strict=True))
