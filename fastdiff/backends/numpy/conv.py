"""The reference formulas of convolutions, over NHWC images."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.layers import Conv
from fastdiff.backends.numpy.functions import store

Array = npt.NDArray[Any]


class ConvOperations:
    """Convolutions, forward and backward."""

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
            store(inner.reshape(n, height, up, width, across, channels).sum(axis=(2, 4)), dx, add)


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
