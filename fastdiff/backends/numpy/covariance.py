"""The reference formulas of maps of rows, similarities and posterior means."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends.protocol import RowMap
from fastdiff.noise import Draw

Array = npt.NDArray[Any]

POSTERIOR_VALUES = 1 << 18  # differences of states and data that are held at once


class CovarianceOperations:
    """Similarity, maps of rows, and averages over data."""

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
        law.fill_normal(z, draw)
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
