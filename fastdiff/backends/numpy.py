"""The reference backend: plain NumPy formulas, in float32 or float64. It is the specification of every operation.

Each layer's forward and backward formulas stand side by side. For a scalar loss, ``dy`` is the gradient of the loss
with respect to ``y``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends import AdamW, LinearPart, MLPPlan, Row, RowMap, Training, TrainingDraws, TrainState
from fastdiff.backends.numpy_layers import (
    NumpyLayers,
    activate,
    activate_backward,
    embedding_backward,
    linear,
    linear_backward,
    modulate,
    modulate_backward,
    squared_error,
)
from fastdiff.noise import Draw, Stream

Array = npt.NDArray[Any]
Saved = tuple[Array, Array, Array, Array]


POSTERIOR_VALUES = 1 << 18  # differences of states and data that are held at once


class NumpyBackend(NumpyLayers):
    """Plain NumPy. Arrays are ``numpy.ndarray``; float64 input is computed in float64."""

    name = "numpy"
    threads = 1

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        array = np.asarray(value)
        if dtype is None:
            dtype = np.float64 if array.dtype == np.float64 else np.float32
        return np.ascontiguousarray(array, dtype)

    def owns(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        return array

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return np.empty(shape, dtype)

    def normal(self, out: Array, draw: Draw) -> None:
        law.fill_normal(out, draw)

    def forward_noise(
        self,
        x0: Array,
        t: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        eps: Array,
        draw: Draw,
    ) -> None:
        self.normal(eps, draw)
        real = out.dtype.type
        np.multiply(signal.astype(real)[t, None], x0, out=out)
        out += noise.astype(real)[t, None] * eps

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        previous: Array | None,
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        real = x.dtype.type

        def total(*terms: tuple[float, Array | None]) -> Array:
            value = np.zeros_like(x)
            for coefficient, array in terms:
                if real(coefficient) != 0:
                    value += real(coefficient) * array
            return value

        x0 = z = None
        if row.b != 0 or previous is not None:
            x0 = total((row.p, x), (row.q, out))
            if clip is not None:
                low, high = real(clip[0]), real(clip[1])
                x0 = np.where(x0 < low, low, np.where(x0 > high, high, x0))
        if row.s != 0:
            z = np.empty_like(x)
            self.normal(z, draw)
        x[...] = total((row.a, x), (row.b, x0), (row.c, previous), (row.e, out), (row.s, z))
        if previous is not None:
            previous[...] = x0

    def mlp_forward(self, plan: MLPPlan, params: Array, x: Array, t: Array, out: Array | None = None) -> Array:
        y = _mlp_forward(plan, params, x, t)[0]
        if out is None:
            return y
        out[...] = y
        return out

    def mlp_gradient(
        self, plan: MLPPlan, params: Array, x: Array, t: Array, target: Array, grads: Array
    ) -> tuple[float, Array]:
        with np.errstate(over="ignore", invalid="ignore"):  # a training that diverges is reported by its loss
            y, saved = _mlp_forward(plan, params, x, t)
            loss, dy = squared_error(y, target)
            dx = _mlp_backward(plan, params, dy, t, saved, grads)
            return loss, dx if plan.linear is None else dx + _linear_part(plan.linear, t, dy)

    def mlp_vjp(self, plan: MLPPlan, params: Array, x: Array, t: Array, dy: Array, dx: Array) -> None:
        """Every layer is u = x W + b, v = (1 + gain) u + shift, y = act(v): dx = ((1 + gain) act'(v) dy) W^T."""
        _, saved = _mlp_forward(plan, params, x, t)
        d = dy
        steps = list(zip(plan.layers, _weights(plan, params), saved, strict=False))
        for layer, (w, _), (_, _, v, gain) in reversed(steps):
            d = ((1 + gain) * activate_backward(d, v, layer.activation)) @ w.T
        dx[...] = d if plan.linear is None else d + _linear_part(plan.linear, t, dy)

    def mlp_jvp(self, plan: MLPPlan, params: Array, x: Array, t: Array, dx: Array, dy: Array) -> None:
        """Every layer is u = x W + b, v = (1 + gain) u + shift, y = act(v): dy = (1 + gain) act'(v) (dx W)."""
        _, saved = _mlp_forward(plan, params, x, t)
        d = dx
        for layer, (w, _), (_, _, v, gain) in zip(plan.layers, _weights(plan, params), saved, strict=False):
            d = activate_backward((1 + gain) * (d @ w), v, layer.activation)
        dy[...] = d if plan.linear is None else d + _linear_part(plan.linear, t, dx)

    def mlp_train_gradient(
        self, plan: MLPPlan, params: Array, draws: TrainingDraws, step: int, batch: int, grads: Array
    ) -> float:
        x, t, target = draw_batch(draws, plan.T, step, batch)
        return self.mlp_gradient(plan, params, x, t, target, grads)[0]

    def mlp_chain(
        self,
        plan: MLPPlan,
        params: Array,
        x: Array,
        rows: tuple[Row, ...],
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        previous = np.zeros_like(x) if any(row.c != 0 for row in rows) else None
        for row in rows:
            out = self.mlp_forward(plan, params, x, np.full(len(x), row.t))
            self.sampler_step(x, out, previous, row, clip, draw.at(row.t))

    def similarity(self, v: Array, out: Array) -> None:
        with np.errstate(over="ignore"):  # exp(-inf) is the right 0
            np.subtract(v[:, :, None], v[:, None, :], out=out)
            np.exp(np.negative(np.square(out, out=out), out=out), out=out)

    def map_rows(self, x: Array, out: Array, plan: RowMap) -> None:
        real = x.dtype.type
        y = np.zeros(out.shape, real)
        if plan.scale is not None:
            y += x * plan.scale.astype(real)
        if plan.left is not None:
            product = x @ plan.left.astype(real)
            y += product if plan.right is None else product @ plan.right.astype(real)
        if plan.offset is not None:
            y += plan.offset.astype(real)
        if plan.standardise:
            y -= y[:, :1].copy()  # the mean of a constant row need not be its value; of zeros it is
            y -= y.mean(axis=1, keepdims=True)
            deviation = np.sqrt(np.mean(np.square(y), axis=1, keepdims=True))
            y /= np.where(deviation > 0, deviation, real(1))
        out[...] = y

    def mapped_normal(self, out: Array, plan: RowMap, draw: Draw) -> None:
        z = np.empty((len(out), plan.shape[0]), out.dtype)
        self.normal(z, draw)
        self.map_rows(z, out, plan)

    def posterior_mean(
        self,
        x: Array,
        data: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        log_sum: Array,
    ) -> None:
        real = x.dtype.type
        signal, noise = (levels.astype(real)[:, None, None] for levels in (signal, noise))
        top, total = np.full((len(x), 1), -np.inf, real), np.zeros((len(x), 1), real)
        out[...] = 0
        rows = max(1, POSTERIOR_VALUES // max(1, x.size))
        for first in range(0, len(data), rows):
            part = data[first : first + rows]
            exponents = real(-0.5) * np.square((x[:, None] - signal * part) / noise).sum(axis=2)
            before, top = top, np.maximum(top, exponents.max(axis=1, keepdims=True))
            weights, keep = np.exp(exponents - top), np.exp(before - top)
            out[...] = keep * out + weights @ part
            total = keep * total + weights.sum(axis=1, keepdims=True)
        out /= total
        log_sum[...] = (top + np.log(total))[:, 0]

    def blend(self, out: Array, state: Array, parts: Array, residuals: Array, constant: float) -> None:
        real = out.dtype.type
        exponent = real(constant) - real(0.5) * np.square(residuals).sum(axis=1)
        top = np.maximum(state[:, 0], exponent)
        before, weight = state[:, 1] * np.exp(state[:, 0] - top), np.exp(exponent - top)
        total = before + weight
        out += (weight / total)[:, None] * (parts - out)
        state[:, 0], state[:, 1] = top, total

    def adamw(self, state: TrainState, options: AdamW) -> float:
        (params, grads, m, v, average), o = state, options
        norm = float(np.sqrt(np.sum(np.square(grads, dtype=np.float64))))
        if not np.isfinite(norm):
            return norm
        real = params.dtype.type
        g = grads * real(min(1.0, o.clip_norm / (norm + 1e-6)))
        m += real(1 - o.beta1) * (g - m)
        v += real(1 - o.beta2) * (g * g - v)
        denominator = np.sqrt(v) * real(o.correction2**-0.5) + real(o.eps)
        params *= real(1 - o.rate * o.decay)
        params -= real(o.rate / o.correction1) * (m / denominator)
        average += real(1 - o.ema) * (params - average)
        return norm

    def mlp_training(
        self, plan: MLPPlan, draws: TrainingDraws, batch: int, state: TrainState, results: Array
    ) -> Training:
        def gradient(step: int) -> Array:
            return np.array([self.mlp_train_gradient(plan, state.params, draws, step, batch, state.grads)])

        return self.record_training(gradient, state, results)


def draw_batch(draws: TrainingDraws, T: int, step: int, batch: int) -> tuple[Array, Array, Array]:
    """Return x_t (batch, D), t (batch,) int64 and the target (batch, D) of a training step."""
    data, seed = draws.data, draws.seed
    x0 = data[law.scaled_words(batch, len(data), Draw(seed, Stream.BATCH, step))]
    t = law.scaled_words(batch, T, Draw(seed, Stream.TRAIN_TIME, step))
    eps = np.empty_like(x0)
    law.fill_normal(eps, Draw(seed, Stream.TRAIN_NOISE, step))
    signal, noise, target_noise, target_data = (table.astype(x0.dtype)[t, None] for table in draws[1:5])
    return signal * x0 + noise * eps, t, target_noise * eps + target_data * x0


def _weights(plan: MLPPlan, flat: Array) -> list[tuple[Array, Array]]:
    """Views (W, b) of every layer in a flat buffer; the time table's own parameters come last."""
    shapes = [(layer.weight, layer.bias, layer.inputs, layer.outputs) for layer in plan.layers]
    if plan.features is not None:
        shapes.append((plan.time_weight, plan.time_bias, plan.features.shape[1], plan.time_width))
    return [(flat[w : w + i * o].reshape(i, o), flat[b : b + o]) for w, b, i, o in shapes]


def _time_table(plan: MLPPlan, params: Array) -> Array:
    """The time table (T, time_width)."""
    if plan.features is None:
        return params[plan.time_weight : plan.time_weight + plan.T * plan.time_width].reshape(plan.T, plan.time_width)
    return linear(plan.features.astype(params.dtype), *_weights(plan, params)[-1])


def _mlp_forward(plan: MLPPlan, params: Array, x: Array, t: Array) -> tuple[Array, list[Saved]]:
    """Output, and for every layer (input, u before modulation, v before activation, gain)."""
    time = _time_table(plan, params)[t]
    saved = []
    for layer, (w, b) in zip(plan.layers, _weights(plan, params), strict=False):
        u = linear(x, w, b)
        gain, shift = _gain_and_shift(layer.time, time[:, layer.time_column :], layer.outputs)
        v = u if layer.time == "none" else modulate(u, gain, shift)
        saved.append((x, u, v, gain))
        x = activate(v, layer.activation)
    return x if plan.linear is None else x + _linear_part(plan.linear, t, saved[0][0]), saved


def _linear_part(part: LinearPart, t: Array, x: Array) -> Array:
    """B_t x, row by row; being symmetric, it is its own backward pass."""
    basis = part.basis.astype(x.dtype)
    y = ((x @ basis) * part.gains.astype(x.dtype)[t]) @ basis.T
    return y if part.rest is None else y + part.rest.astype(x.dtype)[t, None] * x


def _gain_and_shift(mode: str, columns: Array, width: int) -> tuple[Array, Array]:
    none = np.zeros((1, 1), columns.dtype)
    if mode == "scale_shift":
        return columns[:, :width], columns[:, width : 2 * width]
    return none, columns[:, :width] if mode == "shift" else none


def _mlp_backward(plan: MLPPlan, params: Array, dy: Array, t: Array, saved: list[Saved], grads: Array) -> Array:
    """Fill `grads`, return the gradient of the network's input."""
    grads[...] = 0
    weights, dweights = _weights(plan, params), _weights(plan, grads)
    dtime = np.zeros((len(dy), plan.time_width), dy.dtype)
    for i in reversed(range(len(plan.layers))):
        layer, (x, u, v, gain) = plan.layers[i], saved[i]
        du = activate_backward(dy, v, layer.activation)
        if layer.time != "none":
            du, dgain, dshift = modulate_backward(du, u, gain)
            parts = [dshift] if layer.time == "shift" else [dgain, dshift]
            dtime[:, layer.time_column : layer.time_column + len(parts) * layer.outputs] = np.hstack(parts)
        dy, dweights[i][0][...], dweights[i][1][...] = linear_backward(du, x, weights[i][0])
    dtable = embedding_backward(dtime, t, plan.T)
    if plan.features is None:
        grads[plan.time_weight : plan.time_weight + dtable.size] = dtable.ravel()
    else:
        _, dweights[-1][0][...], dweights[-1][1][...] = linear_backward(
            dtable, plan.features.astype(dy.dtype), weights[-1][0]
        )
    return dy
