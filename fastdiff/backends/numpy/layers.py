"""The reference formulas of every layer of image networks, forward and backward side by side.

For a scalar loss, ``dy`` is the gradient of the loss with respect to ``y``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends.layers import Affine, Norm
from fastdiff.backends.numpy.conv import ConvOperations
from fastdiff.backends.numpy.functions import (
    activate,
    activate_backward,
    embedding_backward,
    gelu,
    gelu_backward,
    modulate,
    modulate_backward,
    squared_error,
    store,
)
from fastdiff.noise import Draw

Array = npt.NDArray[Any]


class LayerOperations(ConvOperations):
    """The layers of `LayerBackend`, float32 or float64."""

    def norm(self, layer: Norm, out: Array, *, eps: float, parts: tuple[Array, Array] | None = None) -> None:
        """u = gamma (x - mean) / sqrt(variance + eps) + beta, v = (1 + gain) u + shift, y = SiLU(v)."""
        x, (gamma, beta, modulation), stats, silu = layer
        if parts is not None:
            self.concatenate(*parts, x)
        grouped = _grouped(x, stats.shape[1])
        mean = grouped.mean(axis=(1, 3))
        variance = np.square(grouped - mean[:, None, :, None]).mean(axis=(1, 3))
        stats[..., 0], stats[..., 1] = mean, 1 / np.sqrt(variance + x.dtype.type(eps))
        v = _normalised(x, stats) * gamma + beta
        if modulation is not None:
            v = modulate(v, *_gain_and_shift(modulation))
        out[...] = activate(v, "silu") if silu else v

    def norm_backward(
        self,
        layer: Norm,
        dy: Array,
        dx: Array,
        grads: Affine,
        *,
        add: bool = False,
        parts: tuple[Array, Array] | None = None,
    ) -> None:
        """With h = (x - mean) r and r = 1 / sqrt(variance + eps), <.> being the mean over the m values of a group:

        dmean / dx_j = 1 / m and dr / dx_j = -r^2 h_j / m, so dx = r (dh - <dh> - h <dh h>).
        """
        (x, (gamma, beta, modulation), stats, silu), groups = layer, layer.stats.shape[1]
        h = _normalised(x, stats)
        u = h * gamma + beta
        gain, shift = (np.zeros(1, x.dtype),) * 2 if modulation is None else _gain_and_shift(modulation)
        dv = activate_backward(dy, modulate(u, gain, shift), "silu") if silu else dy
        du, dgain, dshift = modulate_backward(dv, u, gain)
        if grads.modulation is not None:
            grads.modulation[...] = np.hstack([dgain.sum(axis=(1, 2)), dshift.sum(axis=(1, 2))])
        grads.gamma[...] = (du * h).sum(axis=(0, 1, 2))
        grads.beta[...] = du.sum(axis=(0, 1, 2))
        dh, h = _grouped(du * gamma, groups), _grouped(h, groups)
        dh_mean, dhh_mean = (a.mean(axis=(1, 3), keepdims=True) for a in (dh, dh * h))
        store((stats[:, None, :, 1, None] * (dh - dh_mean - h * dhh_mean)).reshape(x.shape), dx, add)
        if parts is not None:
            self.split(dx, *parts)

    def norm_tangent(self, layer: Norm, dh: Array, out: Array, *, modulation_tangent: Array | None = None) -> None:
        x, (gamma, beta, modulation), stats, silu = layer
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

    def layer_norm(self, layer: Norm, out: Array, *, eps: float) -> None:
        """y = gamma h + beta with h = (x - mean) / sqrt(variance + eps), over the channels."""
        x, (gamma, beta, _), stats, _ = layer
        mean = x.mean(axis=-1)
        variance = np.square(x - mean[..., None]).mean(axis=-1)
        stats[..., 0], stats[..., 1] = mean, 1 / np.sqrt(variance + x.dtype.type(eps))
        out[...] = (x - stats[..., :1]) * stats[..., 1:] * gamma + beta

    def layer_norm_backward(self, layer: Norm, dy: Array, dx: Array, grads: Affine, *, add: bool = False) -> None:
        """dx = r (dh - <dh> - h <dh h>) with dh = dy gamma, as in `norm_backward`; <.> is the mean over channels."""
        x, affine, stats, _ = layer
        h = (x - stats[..., :1]) * stats[..., 1:]
        grads.gamma[...] = (dy * h).sum(axis=(0, 1, 2))
        grads.beta[...] = dy.sum(axis=(0, 1, 2))
        dh = dy * affine.gamma
        dh_mean, dhh_mean = (a.mean(axis=-1, keepdims=True) for a in (dh, dh * h))
        store(stats[..., 1:] * (dh - dh_mean - h * dhh_mean), dx, add)

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
        store(activate_backward(dy, x, "silu"), dx, add)

    def gelu(self, x: Array, out: Array) -> None:
        out[...] = gelu(x)

    def gelu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        store(gelu_backward(dy, x), dx, add)

    def offset(self, x: Array, p: Array, out: Array) -> None:
        np.add(x, p, out=out)

    def offset_backward(self, dy: Array, dp: Array) -> None:
        dp[...] = dy.sum(axis=0)

    def add(self, a: Array, b: Array, out: Array) -> None:
        np.add(a, b, out=out)

    def concatenate(self, a: Array, b: Array, out: Array) -> None:
        np.concatenate([a, b], axis=-1, out=out)

    def split(self, x: Array, a: Array, b: Array, *, add: bool = False) -> None:
        store(x[..., : a.shape[-1]], a, add)
        b[...] = x[..., a.shape[-1] :]

    def take(self, table: Array, index: Array, out: Array, *, add: bool = False) -> None:
        store(table[index], out, add)

    def take_backward(self, dy: Array, index: Array, dtable: Array) -> None:
        dtable[...] = embedding_backward(dy, index, len(dtable))

    def dropout(self, x: Array, out: Array, rate: float, first_block: int, draw: Draw) -> None:
        values = x.reshape(len(x), -1)
        words = law.philox_words(len(x), -(-values.shape[1] // 4), draw, first_block)
        kept = words.reshape(len(x), -1)[:, : values.shape[1]] >= rate * 2.0**32
        out[...] = np.where(kept, values * x.dtype.type(1 / (1 - rate)), x.dtype.type(0)).reshape(x.shape)

    def squared_error(self, y: Array, target: Array, dy: Array, loss: Array, terms: Array | None = None) -> None:
        loss[0], dy[...] = squared_error(y, target, terms)


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
