"""The posterior mean over a finite data set, and the running average of a mixture.

A tile of samples is stored feature by feature, so the samples are the vector lanes: every sample has its own chain of
operations over the features and over the data, and its bits depend neither on its tile nor on its place there. The
data pass by in blocks that stay in cache; a block's sums are added to what came before, so that an error grows with
the length of a block and the number of blocks, not with their product.
"""

from __future__ import annotations

import numpy as np

from fastdiff.kernels.cpu.elementary import exp, multiply_add
from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import kernel

LANES = 16
TILE = 64  # samples
BLOCK = 64  # rows of data
ROWS_OF_LANES = 6  # in the arena: -signal, factor, top, total, a block's total, rescaling

F = np.float32
ZERO, MINUS_HALF = F(0), F(-0.5)
NEGLIGIBLE = F(-64)  # exponents relative to the greatest: weights below 1e-27 are 0


@kernel
def weight(exponent):
    """exp(exponent) in float32 of an exponent that is not positive; 0 where it is `NEGLIGIBLE`."""
    x = exponent if exponent > NEGLIGIBLE else NEGLIGIBLE
    return exp(x) if exponent > NEGLIGIBLE else ZERO


@kernel
def arena_size(d):
    """Values of workspace for samples of d values."""
    return TILE * (2 * d + BLOCK + ROWS_OF_LANES)


@kernel
def _distances(count, lanes, columns, minus_signal, data, d, squares):
    """squares[k, lane] = |x - signal y_k|^2 of `count` rows of data; `columns` is x, feature by feature."""
    for k in range(count):
        y = data[k * d : (k + 1) * d]
        total = squares[k * TILE : k * TILE + lanes]
        for i in range(lanes):
            total[i] = ZERO
        j = 0
        while j + 8 <= d:  # features at a time: their sum stays in a register
            x = columns[j * TILE : (j + 8) * TILE]
            y0, y1, y2, y3, y4, y5, y6, y7 = (
                y[j], y[j + 1], y[j + 2], y[j + 3], y[j + 4], y[j + 5], y[j + 6], y[j + 7],
            )  # fmt: skip
            for i in range(lanes):
                s, sum_ = minus_signal[i], total[i]
                v = multiply_add(s, y0, x[i])
                sum_ = multiply_add(v, v, sum_)
                v = multiply_add(s, y1, x[TILE + i])
                sum_ = multiply_add(v, v, sum_)
                v = multiply_add(s, y2, x[2 * TILE + i])
                sum_ = multiply_add(v, v, sum_)
                v = multiply_add(s, y3, x[3 * TILE + i])
                sum_ = multiply_add(v, v, sum_)
                v = multiply_add(s, y4, x[4 * TILE + i])
                sum_ = multiply_add(v, v, sum_)
                v = multiply_add(s, y5, x[5 * TILE + i])
                sum_ = multiply_add(v, v, sum_)
                v = multiply_add(s, y6, x[6 * TILE + i])
                sum_ = multiply_add(v, v, sum_)
                v = multiply_add(s, y7, x[7 * TILE + i])
                total[i] = multiply_add(v, v, sum_)
            j += 8
        while j < d:
            x, yj = columns[j * TILE : (j + 1) * TILE], y[j]
            for i in range(lanes):
                v = multiply_add(minus_signal[i], yj, x[i])
                total[i] = multiply_add(v, v, total[i])
            j += 1


@kernel
def _weigh(count, lanes, squares, factor, top, part, rescale):
    """Turn squares into weights relative to the greatest so far; `part` takes their sums over the block."""
    for i in range(lanes):
        rescale[i] = top[i]
        part[i] = ZERO
    for k in range(count):
        exponents = squares[k * TILE : k * TILE + lanes]
        for i in range(lanes):
            v = factor[i] * exponents[i]
            exponents[i] = v
            top[i] = v if v > top[i] else top[i]
    for i in range(lanes):
        rescale[i] = weight(rescale[i] - top[i])
    for k in range(count):
        weights = squares[k * TILE : k * TILE + lanes]
        for i in range(lanes):
            w = weight(weights[i] - top[i])
            weights[i] = w
            part[i] += w


@kernel
def posterior_mean_range(start, stop, rows, x, data, scales, out, log_sum, d, arena):
    """Tiles start ... stop - 1, of `rows` samples, a multiple of LANES up to TILE.

    x, data and out are flat; `scales` (2, m) holds -signal and -1 / (2 noise^2) of each sample. `out` takes the mean of
    the data rows weighted by exp(-|x - signal y|^2 / (2 noise^2)), `log_sum` the logarithm of the weights' sum.
    """
    m, n = len(log_sum), len(data) // d
    columns, part = arena[: TILE * d], arena[TILE * d : 2 * TILE * d]
    at = 2 * TILE * d
    squares = arena[at : at + TILE * BLOCK]
    at += TILE * BLOCK
    minus_signal, factor, top, total, sums, rescale = (
        arena[at : at + TILE], arena[at + TILE : at + 2 * TILE], arena[at + 2 * TILE : at + 3 * TILE],
        arena[at + 3 * TILE : at + 4 * TILE], arena[at + 4 * TILE : at + 5 * TILE], arena[at + 5 * TILE :],
    )  # fmt: skip
    for tile in range(start, stop):
        begin = tile * rows
        used = min(rows, m - begin)
        lanes = (used + LANES - 1) // LANES * LANES
        for i in range(lanes):
            row = begin + min(i, used - 1)  # the last vector is filled up with a sample
            source = x[row * d : (row + 1) * d]
            for j in range(d):
                columns[j * TILE + i] = source[j]
            minus_signal[i], factor[i] = scales[0, row], scales[1, row]
            top[i], total[i] = -np.inf, ZERO
        mean = out[begin * d : (begin + used) * d]
        mean[:] = ZERO
        for first in range(0, n, BLOCK):
            count = min(BLOCK, n - first)
            block = data[first * d : (first + count) * d]
            _distances(count, lanes, columns, minus_signal, block, d, squares)
            _weigh(count, lanes, squares, factor, top, sums, rescale)
            gemm(part, 0, d, squares, 0, 1, TILE, data, first * d, d, used, d, count, False)
            for i in range(used):
                target, added, keep = mean[i * d : (i + 1) * d], part[i * d : (i + 1) * d], rescale[i]
                for j in range(d):
                    target[j] = target[j] * keep + added[j]
            for i in range(lanes):
                total[i] = total[i] * rescale[i] + sums[i]
        for i in range(used):
            target, share = mean[i * d : (i + 1) * d], total[i]
            for j in range(d):
                target[j] = target[j] / share
            log_sum[begin + i] = top[i] + F(np.log(share))


@kernel
def blend_range(start, stop, out, state, parts, residuals, d, r, constant, lanes):
    """Rows start ... stop - 1 of `Backend.blend` on flat arrays; `lanes` (LANES,) is workspace."""
    for i in range(start, stop):
        residual = residuals[i * r : (i + 1) * r]
        lanes[:] = ZERO
        for j in range(0, r, LANES):
            values = residual[j : min(r, j + LANES)]
            for k in range(len(values)):
                lanes[k] += values[k] * values[k]
        square = ZERO
        for k in range(LANES):
            square += lanes[k]
        exponent = constant + MINUS_HALF * square
        top = max(state[2 * i], exponent)
        added = weight(exponent - top)
        total = state[2 * i + 1] * weight(state[2 * i] - top) + added
        share = added / total
        target, part = out[i * d : (i + 1) * d], parts[i * d : (i + 1) * d]
        for j in range(d):
            target[j] += share * (part[j] - target[j])
        state[2 * i], state[2 * i + 1] = top, total
