"""The reference formulas of functions: y from x, and beside it the gradient of x from that of y.

For a scalar loss, ``dy`` is the gradient of the loss with respect to ``y``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import noise
from fastdiff.backends.protocol import LEAKY_SLOPE, Activation
from fastdiff.noise import Draw

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


def guided(asked: Array, unasked: Array, weight: float, rescale: float = 0.0) -> Array:
    """Classifier-free guidance, u + w (c - u), (n, d) each (Ho and Salimans 2022); see `Backend.guide`."""
    out = asked - unasked
    out *= out.dtype.type(weight)
    out += unasked
    if rescale:
        wide, narrow = (np.std(array, axis=1, keepdims=True) for array in (out, asked))
        out *= rescale * narrow / np.where(wide > 0, wide, 1) + out.dtype.type(1 - rescale)
    return out


def squared_error(y: Array, target: Array, terms: Array | None = None) -> tuple[float, Array]:
    """Return the mean of (y - target)^2 over all entries, NaN of none, and its gradient dy = 2 (y - target) / size.

    Where the target is NaN, y - target counts as 0.
    With `terms` it is as `LayerBackend.squared_error` says.
    """
    if target.size == 0:
        return math.nan, np.empty_like(y)
    scale = y.dtype.type(2 / target.size)
    if terms is None:
        difference = _difference(y, target)
        return float(np.mean(np.square(difference, dtype=np.float64))), difference * scale
    columns = terms.astype(y.dtype).T.reshape(-1, len(y), *(1,) * (y.ndim - 1))
    if len(columns) == 1:
        difference = _difference(y, target)
        return float(np.mean(columns[0] * np.square(difference, dtype=np.float64))), difference * scale * columns[0]
    w, g, h, V, K, A = columns
    mean, v = np.split(y, 2, axis=-1)
    difference = _difference(mean, target)
    square, hv = np.square(difference), h * v
    left = (V + K * square) * np.exp(-hv)
    bound = g * (hv + left + A)
    loss = float(np.mean(w * square + bound, dtype=np.float64))
    return loss, np.concatenate([difference * scale * w, g * h * (1 - left) * (scale / 2)], axis=-1)


def _difference(y: Array, target: Array) -> Array:
    difference: Array = y - target
    difference[np.isnan(target)] = 0
    return difference


def store(gradient: Array, out: Array, add: bool) -> None:
    """Fill `out` with a gradient, or add it."""
    out[...] = out + gradient if add else gradient


def cut(pictures: Array, size: Sequence[int], draw: Draw) -> Array:
    """Return a part of each picture (n, H, W, C), of a size (h, w), cut out where `fastdiff.noise.cuts` says."""
    room = pictures.shape[1] - size[0], pictures.shape[2] - size[1]
    parts = np.empty((len(pictures), *size, pictures.shape[3]), pictures.dtype)
    for part, whole, (top, left) in zip(parts, pictures, noise.cuts(len(pictures), room, draw).tolist(), strict=True):
        part[...] = whole[top : top + size[0], left : left + size[1]]
    return parts
