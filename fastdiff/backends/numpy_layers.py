"""The reference formulas of layers: element functions, and every operation of image networks.

Forward and backward stand side by side. For a scalar loss, ``dy`` is the gradient of the loss with respect to ``y``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends import LEAKY_SLOPE, Activation, AdamW, Backend, Row, Training, TrainingDraws, TrainState
from fastdiff.backends.layers import Batch, Conv, ConvShapes, LayerBackend, Prepared, Recording, Sampling
from fastdiff.noise import Draw, Stream

Array = npt.NDArray[Any]

GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def linear(x: Array, w: Array, b: Array) -> Array:
    """Return y = x W + b for x (n, in), W (in, out), b (out,)."""
    return x @ w + b


def linear_backward(dy: Array, x: Array, w: Array) -> tuple[Array, Array, Array]:
    """Return dx = dy W^T, dW = x^T dy and db, the column sums of dy."""
    return dy @ w.T, x.T @ dy, dy.sum(axis=0)


def activate(v: Array, kind: Activation) -> Array:
    """Return LeakyReLU max(v, 0.01 v), SiLU v / (1 + exp(-v)), or v itself."""
    if kind == "leaky_relu":
        return np.where(v > 0, v, v.dtype.type(LEAKY_SLOPE) * v)
    return v * _sigmoid(v) if kind == "silu" else v


def activate_backward(dy: Array, v: Array, kind: Activation) -> Array:
    """Return dv; for SiLU with g = 1 / (1 + exp(-v)) it is dy g (1 + v (1 - g))."""
    if kind == "leaky_relu":
        return np.where(v > 0, dy, v.dtype.type(LEAKY_SLOPE) * dy)
    if kind == "silu":
        g = _sigmoid(v)
        dy = dy * g * (1 + v * (1 - g))
    return dy


def gelu(x: Array) -> Array:
    """Return x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3): it is x g with g = 1 / (1 + exp(-2 u))."""
    return x * _sigmoid(_gelu_exponent(x))


def gelu_backward(dy: Array, x: Array) -> Array:
    """Return dx = dy g (1 + x (1 - g) v') with v = 2 u and v' = 2 sqrt(2 / pi) (1 + 3 0.044715 x^2)."""
    g = _sigmoid(_gelu_exponent(x))
    slope = x.dtype.type(2 * GELU_SCALE) * (1 + x.dtype.type(3 * GELU_CUBIC) * x * x)
    return dy * g * (1 + x * (1 - g) * slope)


def _gelu_exponent(x: Array) -> Array:
    v: Array = x.dtype.type(2 * GELU_SCALE) * (x + x.dtype.type(GELU_CUBIC) * x * x * x)
    return v


def _sigmoid(v: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-v) = inf gives the right 0
        gate: Array = 1 / (1 + np.exp(-v))
    return gate


def modulate(u: Array, gain: Array, shift: Array) -> Array:
    """Return (1 + gain) u + shift."""
    return (1 + gain) * u + shift


def modulate_backward(dv: Array, u: Array, gain: Array) -> tuple[Array, Array, Array]:
    """Return du = dv (1 + gain), dgain = dv u and dshift = dv."""
    return dv * (1 + gain), dv * u, dv


def embedding_backward(drows: Array, t: Array, rows: int) -> Array:
    """Return the gradient (rows, width) of a table whose rows t were taken: the sums of `drows` over equal t."""
    dtable = np.zeros((rows, drows.shape[1]), drows.dtype)
    np.add.at(dtable, t, drows)
    return dtable


def squared_error(y: Array, target: Array) -> tuple[float, Array]:
    """Return the mean of (y - target)^2 over all entries, NaN of none, and its gradient dy = 2 (y - target) / size."""
    difference = y - target
    if y.size == 0:
        return math.nan, difference
    return float(np.mean(np.square(difference, dtype=np.float64))), difference * y.dtype.type(2 / y.size)


def _store(gradient: Array, out: Array, add: bool) -> None:
    out[...] = out + gradient if add else gradient


class NumpyLayers:
    """The layers of `LayerBackend` in plain NumPy, float32 or float64."""

    def queue(self) -> int:
        return 0

    def address(self, array: Array) -> int:
        return array.ctypes.data

    def prepare(self, convs: Sequence[ConvShapes], backward: bool) -> Prepared:
        return AsTheyAre()

    def conv(
        self,
        geometry: Conv,
        x: Array,
        w: Array,
        b: Array,
        out: Array,
        *,
        shift: Array | None = None,
        residual: Array | None = None,
    ) -> None:
        """A sum over the taps (r, s) of matrix products: y = sum X_rs w_rs + b, X_rs being the pixels under a tap."""
        padded = _padded(geometry, x)
        y = np.zeros(out.shape, out.dtype)
        for tap, window in _taps(geometry, out.shape):
            y += padded[window] @ w[tap]
        y += b
        if shift is not None:
            y += shift[:, None, None]
        if residual is not None:
            y += residual
        out[...] = y

    def conv_backward(
        self,
        geometry: Conv,
        dy: Array,
        x: Array,
        w: Array,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
        *,
        dshift: Array | None = None,
        add: bool = False,
    ) -> None:
        """Every tap is linear: dw_rs = X_rs^T dy, and dX_rs += dy w_rs^T.

        b is added to every pixel and `shift` to every pixel of an image, so theirs are sums of dy over those. The
        padding of X has no gradient, and a value of x that is repeated takes the sum over its copies.
        """
        padded = _padded(geometry, x)
        dpadded = np.zeros_like(padded)
        rows = dy.reshape(-1, dy.shape[-1])
        for tap, window in _taps(geometry, dy.shape):
            if dw is not None:
                dw[tap] = padded[window].reshape(len(rows), -1).T @ rows
            dpadded[window] += dy @ w[tap].T
        if db is not None:
            db[...] = rows.sum(axis=0)
        if dshift is not None:
            dshift[...] = dy.sum(axis=(1, 2))
        if dx is not None:
            n, height, width, channels = x.shape
            (up, across), (top, _, left, _) = geometry.up, geometry.pad
            inner = dpadded[:, top : top + height * up, left : left + width * across]
            _store(inner.reshape(n, height, up, width, across, channels).sum(axis=(2, 4)), dx, add)

    def norm(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        out: Array,
        stats: Array,
        *,
        groups: int,
        eps: float,
        silu: bool,
        modulation: Array | None = None,
    ) -> None:
        """u = gamma (x - mean) / sqrt(variance + eps) + beta, v = (1 + gain) u + shift, y = SiLU(v)."""
        grouped = _grouped(x, groups)
        mean = grouped.mean(axis=(1, 3))
        variance = np.square(grouped - mean[:, None, :, None]).mean(axis=(1, 3))
        stats[..., 0], stats[..., 1] = mean, 1 / np.sqrt(variance + x.dtype.type(eps))
        v = _normalised(x, stats) * gamma + beta
        if modulation is not None:
            v = modulate(v, *_gain_and_shift(modulation))
        out[...] = activate(v, "silu") if silu else v

    def norm_backward(
        self,
        dy: Array,
        x: Array,
        gamma: Array,
        beta: Array,
        stats: Array,
        dx: Array,
        dgamma: Array,
        dbeta: Array,
        *,
        groups: int,
        silu: bool,
        modulation: Array | None = None,
        dmodulation: Array | None = None,
        add: bool = False,
    ) -> None:
        """With h = (x - mean) r and r = 1 / sqrt(variance + eps), <.> being the mean over the m values of a group:

        dmean / dx_j = 1 / m and dr / dx_j = -r^2 h_j / m, so dx = r (dh - <dh> - h <dh h>).
        """
        h = _normalised(x, stats)
        u = h * gamma + beta
        gain, shift = (np.zeros(1, x.dtype),) * 2 if modulation is None else _gain_and_shift(modulation)
        dv = activate_backward(dy, modulate(u, gain, shift), "silu") if silu else dy
        du, dgain, dshift = modulate_backward(dv, u, gain)
        if dmodulation is not None:
            dmodulation[...] = np.hstack([dgain.sum(axis=(1, 2)), dshift.sum(axis=(1, 2))])
        dgamma[...] = (du * h).sum(axis=(0, 1, 2))
        dbeta[...] = du.sum(axis=(0, 1, 2))
        dh, h = _grouped(du * gamma, groups), _grouped(h, groups)
        dh_mean, dhh_mean = (a.mean(axis=(1, 3), keepdims=True) for a in (dh, dh * h))
        _store((stats[:, None, :, 1, None] * (dh - dh_mean - h * dhh_mean)).reshape(x.shape), dx, add)

    def norm_tangent(
        self,
        dh: Array,
        x: Array,
        gamma: Array,
        beta: Array,
        stats: Array | None,
        out: Array,
        *,
        silu: bool,
        modulation: Array | None = None,
        modulation_tangent: Array | None = None,
    ) -> None:
        dv = gamma * dh
        if modulation is not None:
            dv *= 1 + _gain_and_shift(modulation)[0]
        if stats is not None:
            u = _normalised(x, stats) * gamma + beta
            if modulation_tangent is not None:
                dgain, dshift = _gain_and_shift(modulation_tangent)
                dv += dgain * u + dshift
            if silu:
                v = u if modulation is None else modulate(u, *_gain_and_shift(modulation))
                dv = activate_backward(dv, v, "silu")
        out[...] = dv

    def layer_norm(self, x: Array, gamma: Array, beta: Array, out: Array, stats: Array, *, eps: float) -> None:
        """y = gamma h + beta with h = (x - mean) / sqrt(variance + eps), over the channels."""
        mean = x.mean(axis=-1)
        variance = np.square(x - mean[..., None]).mean(axis=-1)
        stats[..., 0], stats[..., 1] = mean, 1 / np.sqrt(variance + x.dtype.type(eps))
        out[...] = (x - stats[..., :1]) * stats[..., 1:] * gamma + beta

    def layer_norm_backward(
        self,
        dy: Array,
        x: Array,
        gamma: Array,
        stats: Array,
        dx: Array,
        dgamma: Array,
        dbeta: Array,
        *,
        add: bool = False,
    ) -> None:
        """dx = r (dh - <dh> - h <dh h>) with dh = dy gamma, as in `norm_backward`; <.> is the mean over channels."""
        h = (x - stats[..., :1]) * stats[..., 1:]
        dgamma[...] = (dy * h).sum(axis=(0, 1, 2))
        dbeta[...] = dy.sum(axis=(0, 1, 2))
        dh = dy * gamma
        dh_mean, dhh_mean = (a.mean(axis=-1, keepdims=True) for a in (dh, dh * h))
        _store(stats[..., 1:] * (dh - dh_mean - h * dhh_mean), dx, add)

    def attention(self, qkv: Array, out: Array, log_sums: Array, *, heads: int) -> None:
        """S = q k^T / sqrt(d), P = exp(S - log sum exp S), y = P v, for every head of width d."""
        q, k, v, scale = _heads(qkv, heads)
        scores = q @ k.swapaxes(2, 3) * scale
        top = scores.max(axis=-1, keepdims=True)
        log_sums[...] = (top + np.log(np.exp(scores - top).sum(axis=-1, keepdims=True)))[..., 0]
        out[...] = (np.exp(scores - log_sums[..., None]) @ v).swapaxes(1, 2).reshape(out.shape)

    def attention_backward(
        self, dy: Array, qkv: Array, out: Array, log_sums: Array, dqkv: Array, *, heads: int
    ) -> None:
        """dv = P^T dy, dP = dy v^T, dS = P (dP - sum over the row of P dP), dq = dS k / sqrt(d), dk = dS^T q / sqrt(d).

        The sum over the row of P dP is that over the channels of dy y, because y = P v.
        """
        q, k, v, scale = _heads(qkv, heads)
        shape = (*out.shape[:2], heads, -1)
        dout, y = dy.reshape(shape).swapaxes(1, 2), out.reshape(shape).swapaxes(1, 2)
        p = np.exp(q @ k.swapaxes(2, 3) * scale - log_sums[..., None])
        ds = p * (dout @ v.swapaxes(2, 3) - (dout * y).sum(axis=-1, keepdims=True)) * scale
        parts = [ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout]
        dqkv[...] = np.concatenate([part.swapaxes(1, 2).reshape(out.shape) for part in parts], axis=-1)

    def attention_tangent(
        self, dqkv: Array, qkv: Array, out: Array, log_sums: Array, dout: Array, *, heads: int
    ) -> None:
        """dS = (dq k^T + q dk^T) / sqrt(d), dP = P (dS - sum over the row of P dS), dy = dP v + P dv."""
        (q, k, v, scale), (dq, dk, dv, _) = _heads(qkv, heads), _heads(dqkv, heads)
        p = np.exp(q @ k.swapaxes(2, 3) * scale - log_sums[..., None])
        ds = (dq @ k.swapaxes(2, 3) + q @ dk.swapaxes(2, 3)) * scale
        dp = p * (ds - (p * ds).sum(axis=-1, keepdims=True))
        dout[...] = (dp @ v + p @ dv).swapaxes(1, 2).reshape(out.shape)

    def silu(self, x: Array, out: Array) -> None:
        out[...] = activate(x, "silu")

    def silu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        _store(activate_backward(dy, x, "silu"), dx, add)

    def gelu(self, x: Array, out: Array) -> None:
        out[...] = gelu(x)

    def gelu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        _store(gelu_backward(dy, x), dx, add)

    def offset(self, x: Array, p: Array, out: Array) -> None:
        np.add(x, p, out=out)

    def offset_backward(self, dy: Array, dp: Array) -> None:
        dp[...] = dy.sum(axis=0)

    def add(self, a: Array, b: Array, out: Array) -> None:
        np.add(a, b, out=out)

    def concatenate(self, a: Array, b: Array, out: Array) -> None:
        np.concatenate([a, b], axis=-1, out=out)

    def split(self, x: Array, a: Array, b: Array, *, add: bool = False) -> None:
        _store(x[..., : a.shape[-1]], a, add)
        b[...] = x[..., a.shape[-1] :]

    def resize(self, x: Array, out: Array) -> None:
        height, width = map(min, x.shape[1:3], out.shape[1:3])
        out[...] = 0
        out[:, :height, :width] = x[:, :height, :width]

    def take(self, table: Array, index: Array, out: Array, *, add: bool = False) -> None:
        _store(table[index], out, add)

    def take_backward(self, dy: Array, index: Array, dtable: Array) -> None:
        dtable[...] = embedding_backward(dy, index, len(dtable))

    def draw_batch(self, draws: TrainingDraws, batch: Batch, step: int, first: int) -> None:
        x, t, target, chosen = batch
        n, of_rows = len(x), Draw(draws.seed, Stream.BATCH, step, first)
        rows = law.scaled_words(n, len(draws.data), of_rows)
        t[...] = law.scaled_words(n, len(draws.signal), of_rows.of(Stream.TRAIN_TIME))
        x0, eps = draws.data[rows], np.empty_like(x)
        if draws.flip:
            mirrored = law.flips(n, of_rows.of(Stream.AUGMENT))
            x0[mirrored] = x0[mirrored][:, :, ::-1]
        cast(Backend, self).normal(eps.reshape(n, -1), of_rows.of(Stream.TRAIN_NOISE))
        signal, level, of_noise, of_data = (table.astype(x.dtype)[t, None, None, None] for table in draws[1:5])
        x[...] = signal * x0 + level * eps
        target[...] = of_noise * eps + of_data * x0
        if chosen is not None and draws.labels is not None:
            chosen[...] = draws.labels[rows]

    def dropout(self, x: Array, out: Array, rate: float, first_block: int, draw: Draw) -> None:
        values = x.reshape(len(x), -1)
        words = law.philox_words(len(x), -(-values.shape[1] // 4), draw, first_block)
        kept = words.reshape(len(x), -1)[:, : values.shape[1]] >= rate * 2.0**32
        out[...] = np.where(kept, values * x.dtype.type(1 / (1 - rate)), x.dtype.type(0)).reshape(x.shape)

    def squared_error(self, y: Array, target: Array, dy: Array, loss: Array) -> None:
        loss[0], dy[...] = squared_error(y, target)

    steps_ahead = 1

    def finish_step(self, loss: Array, step: int, state: TrainState, options: AdamW, results: Array) -> None:
        rows, norm = len(results), math.nan
        if math.isfinite(loss[0]) and math.isfinite(results[(step - 1) % rows, 1]):
            norm = cast(Backend, self).adamw(state, options)
        results[step % rows, 0], results[step % rows, 1] = loss[0], norm

    repeats_resize = True

    def record(self, body: Callable[[], None], places: Sequence[Array | None] = ()) -> Recording:
        return PlainCall(body)

    def record_training(self, gradient: Callable[[int], Array], state: TrainState, results: Array) -> Training:
        return PlainTraining(cast(LayerBackend, self), gradient, state, results)

    def record_sampling(self, output: Callable[[], Array], state: Array) -> Sampling:
        return PlainSampling(cast(LayerBackend, self), output)


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

    def run(self, x: Array, previous: Array | None, row: Row, clip: tuple[float, float] | None, draw: Draw) -> None:
        self.be.sampler_step(x, self.be.asarray(self.output(), x.dtype), previous, row, clip, draw)


def _padded(geometry: Conv, x: Array) -> Array:
    """x with its rows and columns repeated and zeros around."""
    top, bottom, left, right = geometry.pad
    x = x.repeat(geometry.up[0], axis=1).repeat(geometry.up[1], axis=2)
    n, height, width, channels = x.shape
    padded = np.zeros((n, top + height + bottom, left + width + right, channels), x.dtype)
    padded[:, top : top + height, left : left + width] = x
    return padded


def _taps(geometry: Conv, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], tuple[slice, ...]]]:
    """For every tap of the kernel, the pixels under it when the output has this shape."""
    _, height, width, _ = shape
    down, across = geometry.stride
    return [
        ((r, s), (slice(None), slice(r, r + height * down, down), slice(s, s + width * across, across)))
        for r in range(geometry.kernel[0])
        for s in range(geometry.kernel[1])
    ]


def _grouped(x: Array, groups: int) -> Array:
    """(N, pixels, groups, channels of a group)."""
    n, height, width, channels = x.shape
    return x.reshape(n, height * width, groups, channels // groups)


def _normalised(x: Array, stats: Array) -> Array:
    mean, scale = stats[:, None, :, 0, None], stats[:, None, :, 1, None]
    return ((_grouped(x, stats.shape[1]) - mean) * scale).reshape(x.shape)


def _gain_and_shift(modulation: Array) -> tuple[Array, Array]:
    gain, shift = np.split(modulation[:, None, None], 2, axis=-1)
    return gain, shift


def _heads(qkv: Array, heads: int) -> tuple[Array, Array, Array, Any]:
    """q, k and v (N, heads, L, d), and 1 / sqrt(d)."""
    n, length, width = qkv.shape
    q, k, v = qkv.reshape(n, length, 3, heads, width // (3 * heads)).transpose(2, 0, 3, 1, 4)
    return q, k, v, qkv.dtype.type(1 / math.sqrt(q.shape[-1]))
