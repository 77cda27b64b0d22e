"""What backends of the host share, as they compute on NumPy arrays: recordings that are calls, and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends.layers import Batch, Conv, ConvShapes, Later, LayerBackend, Prepared, Recording, Sampling
from fastdiff.backends.numpy.functions import cut, guided
from fastdiff.backends.numpy.tmpd import TmpdOperations
from fastdiff.backends.protocol import AdamW, Backend, MLPPlan, Row, Training, TrainingDraws, TrainState
from fastdiff.noise import Draw, Stream

Array = npt.NDArray[Any]


class HostBackend(TmpdOperations):
    """The operations of a backend for which nothing is faster than NumPy, or a plain call."""

    steps_ahead = 1
    repeats_resize = True
    gradients_wait = 0

    def owns(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        return array

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return np.empty(shape, dtype)

    def guide(self, asked: Array, unasked: Array, weight: float, rescale: float, out: Array) -> None:
        out[...] = guided(asked, unasked, weight, rescale)

    def hold(self, x: Array, known: Array, level: float) -> None:
        held(x, known, level)

    def queue(self) -> int:
        return 0

    def address(self, array: Array) -> int:
        return array.ctypes.data

    def prepare(self, convs: Sequence[ConvShapes], backward: bool) -> Prepared:
        return AsTheyAre()

    def gradients_together(self) -> AbstractContextManager[Later]:
        return nullcontext(Later())

    def linears(self, x: Array, layers: Sequence[tuple[Array, Array, Array]]) -> None:
        for w, b, out in layers:
            cast(LayerBackend, self).conv(Conv(), x, w, b, out)

    def linears_backward(self, dx: Array, layers: Sequence[tuple[Array, Array]], *, add: bool = False) -> None:
        for i, (dy, w) in enumerate(layers):
            cast(LayerBackend, self).conv_backward(Conv(), dy, dx, w, dx, None, None, add=add or i > 0)

    def resize(self, x: Array, out: Array) -> None:
        height, width = map(min, x.shape[1:3], out.shape[1:3])
        out[...] = 0
        out[:, :height, :width] = x[:, :height, :width]

    def draw_batch(self, draws: TrainingDraws, batch: Batch, step: int, first: int) -> None:
        x, t, target, chosen, _, covariates, known, marks = batch
        n, of_rows = len(x), Draw(draws.seed, Stream.BATCH, step, first)
        rows = drawn_rows(draws, n, of_rows)
        t[...] = law.scaled_words(n, len(draws.signal), of_rows.of(Stream.TRAIN_TIME))
        x0, eps, hidden = draws.data[rows], np.empty_like(x), None
        if draws.masked:
            x0, hidden = x0[:, 0], x0[:, 1]
        if x0.shape[1:3] != x.shape[1:3]:
            x0 = cut(x0, x.shape[1:3], of_rows.of(Stream.AUGMENT))
        if draws.flip:
            mirrored = law.flips(n, of_rows.of(Stream.AUGMENT))
            x0[mirrored] = x0[mirrored][:, :, ::-1]
        cast(Backend, self).normal(eps.reshape(n, -1), of_rows.of(Stream.TRAIN_NOISE))
        signal, level, of_noise, of_data = (table.astype(x.dtype)[t, None, None, None] for table in draws[1:5])
        x[...] = signal * x0 + level * eps
        target[...] = of_noise * eps + of_data * x0
        if hidden is not None:
            target += hidden
        labels, numbers = asked_of_rows(draws, rows, of_rows)
        if chosen is not None:
            chosen[...] = labels
        if covariates is not None:
            covariates[...] = np.asarray(numbers).reshape(covariates.shape)
        if known is not None and marks is not None:
            marked = known_of_rows(draws, x0.reshape(n, -1), None if hidden is None else hidden.reshape(n, -1), of_rows)
            known[...], marks[...] = (part.reshape(x.shape) for part in np.split(marked, 2, axis=1))
            hold_batch(marked, signal.reshape(n, 1), x.reshape(n, -1), target.reshape(n, -1))

    def mlp_training(
        self, plan: MLPPlan, draws: TrainingDraws, batch: int, state: TrainState, results: Array
    ) -> Training:
        be = cast(Backend, self)

        def gradient(step: int) -> Array:
            return np.array([be.mlp_train_gradient(plan, state.params, draws, step, batch, state.grads)])

        return self.record_training(gradient, state, results)

    def finish_step(self, loss: Array, step: int, state: TrainState, options: AdamW, results: Array) -> None:
        rows, norm = len(results), math.nan
        if math.isfinite(loss[0]) and math.isfinite(results[(step - 1) % rows, 1]):
            norm = cast(Backend, self).adamw(state, options)
        results[step % rows, 0], results[step % rows, 1] = loss[0], norm

    def record(self, body: Callable[[], None], places: Sequence[Array | None] = ()) -> Recording:
        return PlainCall(body)

    def record_training(self, gradient: Callable[[int], Array], state: TrainState, results: Array) -> Training:
        return PlainTraining(cast(LayerBackend, self), gradient, state, results)

    def record_sampling(self, output: Callable[[], Array], state: Array) -> Sampling:
        return PlainSampling(cast(LayerBackend, self), output)


def drawn_rows(draws: TrainingDraws, n: int, draw: Draw) -> npt.NDArray[np.int64]:
    """Return which rows of the data are at n positions of a batch."""
    if draws.by_position:
        return np.arange(draw.first_row, draw.first_row + n)
    return law.scaled_words(n, len(draws.data), draw)


def asked_of_rows(draws: TrainingDraws, rows: Array, draw: Draw) -> tuple[Array | None, Array | None]:
    """Return labels and covariates of data rows at the positions of `draw`, left out where stream DROP says so."""
    labels, covariates = (None if given is None else given[rows] for given in (draws.labels, draws.covariates))
    if draws.drop > 0:
        out = law.dropped(len(rows), draws.drop, draw.of(Stream.DROP))
        if labels is not None:
            labels[out[:, 0]] = draws.classes
        if covariates is not None:
            covariates[out[:, 1]] = 0
    return labels, covariates


def known_of_rows(draws: TrainingDraws, x0: Array, hidden: Array | None, draw: Draw) -> Array:
    """Return what is known to a network of rows x0 (n, D) at the positions of `draw`, (n, 2 D): values, and marks.

    `hidden` (n, D) is NaN where nothing has been seen.
    """
    assert draws.targets is not None
    kind, image = draws.targets
    marked = ~law.targets(len(x0), image, kind, draw.of(Stream.DROP)).reshape(x0.shape)
    if hidden is not None:
        marked &= ~np.isnan(hidden)
    return np.hstack([np.where(marked, x0, 0), marked], dtype=x0.dtype)


def held(x: Array, known: Array, level: float) -> None:
    """Do `Backend.hold`."""
    values, marks = np.split(known, 2, axis=1)
    np.copyto(x, values * x.dtype.type(level), where=marks != 0)


def hold_batch(known: Array, signal: Array, x: Array, target: Array) -> None:
    """Take noise and target from what is known of a batch (n, D): see `TrainingDraws`; `signal` is (n, 1)."""
    values, marks = np.split(known, 2, axis=1)
    np.copyto(x, signal * values, where=marks != 0)
    np.copyto(target, np.nan, where=marks != 0)


def asked_at(plan: MLPPlan, draws: TrainingDraws, rows: Array, draw: Draw) -> Array:
    """Return what is asked of data rows at the positions of `draw`, (n, plan.asked), of the data's dtype."""
    known = None
    if plan.known:
        x0, hidden = draws.data[rows], None
        if draws.masked:
            x0, hidden = x0[:, 0], x0[:, 1]
        known = known_of_rows(draws, x0, hidden, draw)
    return plan.asks(*asked_of_rows(draws, rows, draw), draws.data.dtype, known)


class AsTheyAre:
    """Weights that a backend reads as they are."""

    def run(self, weights: Sequence[Array]) -> list[list[Array]]:
        return [[w, w] for w in weights]


class PlainCall(NamedTuple):
    """A recording of nothing: the operations are called again."""

    body: Callable[[], None]

    def run(self) -> None:
        self.body()


class PlainTraining(NamedTuple):
    """A gradient and an optimiser step, one after the other."""

    be: LayerBackend
    gradient: Callable[[int], Array]
    state: TrainState
    results: Array

    def run(self, step: int, options: AdamW) -> None:
        self.be.finish_step(self.gradient(step), step, self.state, options, self.results)


class PlainSampling(NamedTuple):
    """An output and a sampler's step, one after the other."""

    be: LayerBackend
    output: Callable[[], Array]

    def run(self, x: Array, memory: tuple[Array, ...], row: Row, clip: tuple[float, float] | None, draw: Draw) -> None:
        self.be.sampler_step(x, self.be.asarray(self.output(), x.dtype), memory, row, clip, draw)
