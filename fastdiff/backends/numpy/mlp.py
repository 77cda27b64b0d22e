"""The reference formulas of perceptrons: each layer's forward and backward side by side.

For a scalar loss, ``dy`` is the gradient of the loss with respect to ``y``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends.numpy.functions import (
    activate,
    activate_backward,
    embedding_backward,
    guided,
    linear,
    linear_backward,
    modulate,
    modulate_backward,
    squared_error,
)
from fastdiff.backends.numpy.host import asked_at, drawn_rows, held, hold_batch
from fastdiff.backends.numpy.step import StepOperations
from fastdiff.backends.protocol import ChainTable, Inputs, LinearPart, MLPPlan, Row, TmpdPlan, TrainingDraws
from fastdiff.noise import Draw, Stream

Array = npt.NDArray[Any]
Saved = tuple[Array, Array, Array, Array]


class MLPOperations(StepOperations):
    """Perceptrons: forward, gradient, and a sampling chain."""

    def mlp_forward(self, plan: MLPPlan, params: Array, inputs: Inputs, out: Array | None = None) -> Array:
        y = _mlp_forward(plan, params, inputs)[0]
        if out is None:
            return y
        out[...] = y
        return out

    def mlp_gradient(
        self, plan: MLPPlan, params: Array, inputs: Inputs, target: Array, grads: Array
    ) -> tuple[float, Array]:
        return self._gradient(plan, params, inputs, target, grads)

    def _gradient(
        self,
        plan: MLPPlan,
        params: Array,
        inputs: Inputs,
        target: Array,
        grads: Array,
        terms: Array | None = None,
    ) -> tuple[float, Array]:
        with np.errstate(over="ignore", invalid="ignore"):  # a training that diverges is reported by its loss
            y, saved = _mlp_forward(plan, params, inputs)
            loss, dy = squared_error(y, target, terms)
            dx = _mlp_backward(plan, params, inputs, dy, saved, grads)
            return loss, dx if plan.linear is None else dx + _linear_part(plan.linear, inputs.t, dy)

    def mlp_vjp(
        self, plan: MLPPlan, params: Array, inputs: Inputs, dy: Array, dx: Array, y: Array | None = None
    ) -> None:
        """Every layer is u = x W + b, v = (1 + gain) u + shift, y = act(v): dx = ((1 + gain) act'(v) dy) W^T."""
        output, saved = _mlp_forward(plan, params, inputs)
        if y is not None:
            y[...] = output
        d = dy
        steps = list(zip(plan.layers, _weights(plan, params), saved, strict=False))
        for layer, (w, _), (_, _, v, gain) in reversed(steps):
            d = ((1 + gain) * activate_backward(d, v, layer.activation)) @ w.T
        dx[...] = d if plan.linear is None else d + _linear_part(plan.linear, inputs.t, dy)

    def mlp_jvp(self, plan: MLPPlan, params: Array, inputs: Inputs, dx: Array, dy: Array) -> None:
        """Every layer is u = x W + b, v = (1 + gain) u + shift, y = act(v): dy = (1 + gain) act'(v) (dx W)."""
        _, saved = _mlp_forward(plan, params, inputs)
        d = dx
        for layer, (w, _), (_, _, v, gain) in zip(plan.layers, _weights(plan, params), saved, strict=False):
            d = activate_backward((1 + gain) * (d @ w), v, layer.activation)
        dy[...] = d if plan.linear is None else d + _linear_part(plan.linear, inputs.t, dx)

    def mlp_train_gradient(
        self, plan: MLPPlan, params: Array, draws: TrainingDraws, step: int, batch: int, grads: Array
    ) -> float:
        x, t, target = draw_batch(draws, plan.T, step, batch)
        terms = None if draws.terms is None else draws.terms[t]
        asked = None
        if plan.asked:
            of_rows = Draw(draws.seed, Stream.BATCH, step)
            asked = asked_at(plan, draws, drawn_rows(draws, batch, of_rows), of_rows)
            if plan.known:
                hold_batch(asked[:, -plan.known :], draws.signal.astype(x.dtype)[t, None], x, target)
        return self._gradient(plan, params, Inputs(x, t, asked), target, grads, terms)[0]

    def mlp_chain(
        self, plan: MLPPlan, params: Array, x: Array, table: ChainTable, draw: Draw, asked: Array | None = None
    ) -> None:
        (rows, clip, weights, levels), unasked = table, None
        if asked is not None and plan.known:
            unasked = asked.copy()
            unasked[:, : -plan.known] = 0
        memory = tuple(np.zeros((max(row.depth for row in rows), *x.shape), x.dtype))
        for i, row in enumerate(rows):
            out = None
            if row.evaluates:
                t = np.full(len(x), row.t)
                if asked is not None and levels is not None:
                    held(x, asked[:, -plan.known :], levels[i])
                out = self.mlp_forward(plan, params, Inputs(x, t, asked))
                if weights is not None and weights[i] != 1:
                    out = guided(out, self.mlp_forward(plan, params, Inputs(x, t, unasked)), weights[i])
            self.sampler_step(x, out, memory, row, clip, draw.at(row.step))

    def mlp_chain_tmpd(
        self, plan: MLPPlan, params: Array, x: Array, rows: tuple[Row, ...], draw: Draw, tmpd: TmpdPlan
    ) -> bool:
        """Not in one piece: `fastdiff.conditioning` has the formulas."""
        return False


def draw_batch(draws: TrainingDraws, T: int, step: int, batch: int) -> tuple[Array, Array, Array]:
    """Return x_t (batch, D), t (batch,) int64 and the target (batch, D) of a training step."""
    data, seed = draws.data, draws.seed
    x0 = data[drawn_rows(draws, batch, Draw(seed, Stream.BATCH, step))]
    hidden = 0
    if draws.masked:
        x0, hidden = x0[:, 0], x0[:, 1]
    t = law.scaled_words(batch, T, Draw(seed, Stream.TRAIN_TIME, step))
    eps = np.empty(x0.shape, x0.dtype)
    law.fill_normal(eps, Draw(seed, Stream.TRAIN_NOISE, step))
    signal, noise, target_noise, target_data = (table.astype(x0.dtype)[t, None] for table in draws[1:5])
    target = target_noise * eps + target_data * x0
    return signal * x0 + noise * eps, t, target + hidden if draws.masked else target


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


def _of_asked(plan: MLPPlan, flat: Array) -> Array:
    """View W (asked, time_width) in a flat buffer."""
    end = plan.asked_weight + plan.asked * plan.time_width
    return flat[plan.asked_weight : end].reshape(plan.asked, plan.time_width)


def _mlp_forward(plan: MLPPlan, params: Array, inputs: Inputs) -> tuple[Array, list[Saved]]:
    """Output, and for every layer (input, u before modulation, v before activation, gain)."""
    x, t, asked = inputs
    time = _time_table(plan, params)[t]
    if asked is not None:
        time = time + asked.astype(time.dtype) @ _of_asked(plan, params)
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


def _mlp_backward(plan: MLPPlan, params: Array, inputs: Inputs, dy: Array, saved: list[Saved], grads: Array) -> Array:
    """Fill `grads`, return the gradient of the network's input."""
    grads[...], (_, t, asked) = 0, inputs
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
    if asked is not None:
        _of_asked(plan, grads)[...] = asked.astype(dtime.dtype).T @ dtime
    dtable = embedding_backward(dtime, t, plan.T)
    if plan.features is None:
        grads[plan.time_weight : plan.time_weight + dtable.size] = dtable.ravel()
    else:
        _, dweights[-1][0][...], dweights[-1][1][...] = linear_backward(
            dtable, plan.features.astype(dy.dtype), weights[-1][0]
        )
    return dy
