"""AdamW with clipping and a moving average in one pass over the flat buffers."""

from __future__ import annotations

import math

import numpy as np

from fastdiff.kernels.cpu.jit import kernel

BLOCK = 4096
LANES = 64


@kernel
def square_sums(start, stop, values, sums, lanes):
    """sums[i] = sum of squares of block i of `values`, in float64 and in an order that only the block decides."""
    for block in range(start, stop):
        part = values[block * BLOCK : min(len(values), (block + 1) * BLOCK)]
        lanes[:] = 0.0
        for i in range(0, len(part), LANES):
            row = part[i : min(len(part), i + LANES)]
            for j in range(len(row)):
                value = np.float64(row[j])
                lanes[j] += value * value
        total = 0.0
        for j in range(LANES):
            total += lanes[j]
        sums[block] = total


@kernel
def adamw_range(start, stop, params, grads, m, v, average, scalars):
    """AdamW on the entries start ... stop - 1; `scalars` are those of `CpuBackend.adamw`, float32."""
    scale, one_beta1, one_beta2, root, eps, keep, rate, one_ema = (
        scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], scalars[6], scalars[7],
    )  # fmt: skip
    p, g, mi, vi, a = (
        params[start:stop], grads[start:stop], m[start:stop], v[start:stop], average[start:stop],
    )  # fmt: skip
    for i in range(stop - start):
        gradient = g[i] * scale
        first = mi[i] + one_beta1 * (gradient - mi[i])
        second = vi[i] + one_beta2 * (gradient * gradient - vi[i])
        value = p[i] * keep - rate * (first / (math.sqrt(second) * root + eps))
        mi[i] = first
        vi[i] = second
        p[i] = value
        a[i] = a[i] + one_ema * (value - a[i])
