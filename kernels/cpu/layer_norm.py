"""LayerNorm over the channels of every row (pixel) of a matrix (rows, channels).

What is done value by value runs along a row's channels; its sums have lanes of their own, added as a tree, so that
neither the width of a CPU's vectors nor the neighbouring rows decide their bits.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from fastdiff.kernels.cpu.gemm import F32, FLOAT_BYTES, I32, I64
from fastdiff.kernels.cpu.jit import kernel

LANES = 16  # sums of a row that run side by side
ROWS = 3  # of scratch

ZERO, ONE = np.float32(0), np.float32(1)


@intrinsic
def row_sum(typingctx, row):
    """The sum of a float32 array: value i goes to lane i % LANES, in order, and lanes that are a half apart are added.

    What is beyond whole vectors follows, value by value.
    """

    def codegen(context, builder, signature, args):
        array = make_array(signature.args[0])(context, builder, args[0])
        vector, size = ir.VectorType(F32, LANES), builder.extract_value(array.shape, 0)
        lanes = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES))
        vectors = builder.udiv(size, I64(LANES))
        with cgutils.for_range(builder, vectors) as loop:
            place = builder.gep(array.data, [builder.mul(loop.index, I64(LANES))])
            values = builder.load(builder.bitcast(place, vector.as_pointer()), align=FLOAT_BYTES)
            builder.store(builder.fadd(builder.load(lanes), values), lanes)
        sums, half = builder.load(lanes), LANES // 2
        while half:
            upper = builder.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(I32, half), [*range(half, 2 * half)]))
            lower = builder.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(I32, half), [*range(half)]))
            sums, half = builder.fadd(lower, upper), half // 2
        total = cgutils.alloca_once_value(builder, builder.extract_element(sums, I32(0)))
        with cgutils.for_range_slice(builder, builder.mul(vectors, I64(LANES)), size, I64(1), inc=True) as (i, _):
            value = builder.load(builder.gep(array.data, [i]))
            builder.store(builder.fadd(builder.load(total), value), total)
        return builder.load(total)

    return types.float32(types.Array(types.float32, 1, "C")), codegen


@kernel
def layer_norm_range(start, stop, x, gamma, beta, out, stats, eps, squares):
    """Rows start ... stop - 1; x, out and stats are flat, eps has one value."""
    channels = len(gamma)
    count, square = np.float32(channels), squares[:channels]
    for row in range(start, stop):
        a, y = x[row * channels : (row + 1) * channels], out[row * channels : (row + 1) * channels]
        mean = row_sum(a) / count
        for c in range(channels):
            d = a[c] - mean
            square[c] = d * d
        scale = ONE / math.sqrt(row_sum(square) / count + eps[0])
        stats[2 * row], stats[2 * row + 1] = mean, scale
        for c in range(channels):
            y[c] = (a[c] - mean) * scale * gamma[c] + beta[c]


@kernel
def layer_norm_backward_range(start, stop, size, dy, x, gamma, stats, dx, plain, by_h, add, rows):
    """Chunks start ... stop - 1 of `size` rows; plain[chunk] (channels,) takes the sums of dy, by_h those of dy h.

    With h = (x - mean) r and dh = dy gamma: dx = r (dh - <dh> - h <dh h>). dx may be dy unless `add`.
    """
    channels = len(gamma)
    count = np.float32(channels)
    h, dh, dhh = rows[0, :channels], rows[1, :channels], rows[2, :channels]
    for chunk in range(start, stop):
        first = plain[chunk * channels : (chunk + 1) * channels]
        second = by_h[chunk * channels : (chunk + 1) * channels]
        first[:] = ZERO
        second[:] = ZERO
        for row in range(chunk * size, min(len(stats) // 2, (chunk + 1) * size)):
            at, end = row * channels, (row + 1) * channels
            a, d, to = x[at:end], dy[at:end], dx[at:end]
            mean, scale = stats[2 * row], stats[2 * row + 1]
            for c in range(channels):
                h[c] = (a[c] - mean) * scale
            for c in range(channels):
                first[c] += d[c]
                second[c] += d[c] * h[c]
            for c in range(channels):
                dh[c] = d[c] * gamma[c]
                dhh[c] = dh[c] * h[c]
            dh_mean, dhh_mean = row_sum(dh) / count, row_sum(dhh) / count
            if add:
                for c in range(channels):
                    to[c] += scale * ((dh[c] - dh_mean) - h[c] * dhh_mean)
            else:
                for c in range(channels):
                    to[c] = scale * ((dh[c] - dh_mean) - h[c] * dhh_mean)
