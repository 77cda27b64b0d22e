"""What image networks do value by value, or row by row, besides convolutions, norms and attention."""

from __future__ import annotations

import numpy as np

from fastdiff.kernels.cpu.elementary import EXP_HIGH, EXP_LOW, HALF, exp, sigmoid
from fastdiff.kernels.cpu.jit import kernel
from fastdiff.kernels.cpu.noise import CHUNK, _words

BLOCK = 4096  # values whose squares are summed together
LANES = 64

ZERO, ONE = np.float32(0), np.float32(1)

# 2 sqrt(2 / pi), that times 0.044715, and three times that. Beyond GELU_END the gate is 0 or 1 in float32.
GELU_A, GELU_B, GELU_3B, GELU_END = (np.float32(v) for v in (1.5957691216057308, 0.0713548162726, 0.2140644488178, 10))


@kernel
def silu_range(start, stop, x, out):
    """Values start ... stop - 1 of out = x / (1 + exp(-x))."""
    a, y = x[start:stop], out[start:stop]
    for i in range(stop - start):
        y[i] = a[i] * sigmoid(a[i])


@kernel
def silu_backward_range(start, stop, dy, x, dx, add):
    """dx = dy g (1 + x (1 - g)) with g = 1 / (1 + exp(-x))."""
    d, a, to = dy[start:stop], x[start:stop], dx[start:stop]
    for i in range(stop - start):
        g = sigmoid(a[i])
        value = d[i] * g * (ONE + a[i] * (ONE - g))
        to[i] = to[i] + value if add else value


@kernel
def _gelu_gate(v):
    """1 / (1 + exp(-v (A + B v^2)))."""
    return sigmoid(v * (GELU_A + GELU_B * (v * v)))


@kernel
def gelu_range(start, stop, x, out):
    """Values start ... stop - 1 of out = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x times a sigmoid."""
    a, y = x[start:stop], out[start:stop]
    for i in range(stop - start):
        low = -GELU_END if a[i] < -GELU_END else a[i]
        y[i] = low * _gelu_gate(low)


@kernel
def gelu_backward_range(start, stop, dy, x, dx, add):
    """dx = dy g (1 + x (1 - g) (A + 3 B x^2)), g being the sigmoid of `gelu_range`."""
    d, a, to = dy[start:stop], x[start:stop], dx[start:stop]
    for i in range(stop - start):
        low = -GELU_END if a[i] < -GELU_END else a[i]
        v = GELU_END if low > GELU_END else low
        g = _gelu_gate(v)
        value = d[i] * g * (ONE + v * (ONE - g) * (GELU_A + GELU_3B * (v * v)))
        to[i] = to[i] + value if add else value


@kernel
def offset_range(start, stop, x, p, out):
    """Images start ... stop - 1 of out = x + p; out may be x."""
    size = len(p)
    for n in range(start, stop):
        a, y = x[n * size : (n + 1) * size], out[n * size : (n + 1) * size]
        for i in range(size):
            y[i] = a[i] + p[i]


@kernel
def add_range(start, stop, a, b, out):
    """out = a + b; out may be a or b."""
    x, y, to = a[start:stop], b[start:stop], out[start:stop]
    for i in range(stop - start):
        to[i] = x[i] + y[i]


@kernel
def copy_columns(start, stop, source, from_column, from_width, target, to_column, to_width, width, add):
    """Rows start ... stop - 1: `width` columns of one matrix to another, both flat; with `add`, added."""
    for row in range(start, stop):
        a, b = row * from_width + from_column, row * to_width + to_column
        x, y = source[a : a + width], target[b : b + width]
        if add:
            for j in range(width):
                y[j] += x[j]
        else:
            for j in range(width):
                y[j] = x[j]


@kernel
def take_rows(start, stop, table, index, out, width, add):
    """Rows i = start ... stop - 1 of out (n, width), flat, become row index[i] of the table, or have it added."""
    for i in range(start, stop):
        x, y = table[index[i] * width : (index[i] + 1) * width], out[i * width : (i + 1) * width]
        if add:
            for j in range(width):
                y[j] += x[j]
        else:
            for j in range(width):
                y[j] = x[j]


@kernel
def take_rows_backward(start, stop, dy, index, dtable, width):
    """Rows start ... stop - 1 of dtable: the sums of the rows i of dy with that index, in the order of i."""
    dtable[start * width : stop * width] = ZERO
    for i in range(len(index)):
        if start <= index[i] < stop:
            x, y = dy[i * width : (i + 1) * width], dtable[index[i] * width : (index[i] + 1) * width]
            for j in range(width):
                y[j] += x[j]


@kernel
def dropout_range(start, stop, x, out, size, limit, scale, first_block, law, words):
    """Images start ... stop - 1 of `size` values: value j is dropped where word j % 4 of its block is below `limit`."""
    below, factor = np.uint64(limit), scale[0]
    for n in range(start, stop):
        for begin in range(0, size, 4 * CHUNK):
            count = min(4 * CHUNK, size - begin)
            blocks = (count + 3) // 4
            row = np.uint64(law.first_row + n)
            _words(blocks, first_block + begin // 4, row, CHUNK, False, law.step, law.stream, law.keys, words)
            at = n * size + begin
            for word in range(4):
                drawn, many = words[word], (count - word + 3) // 4
                a, y = x[at + word : at + count], out[at + word : at + count]
                for i in range(many):
                    kept = np.uint64(drawn[i]) >= below
                    y[4 * i] = a[4 * i] * factor if kept else ZERO


@kernel
def squared_error_range(start, stop, y, target, dy, scale, sums, lanes):
    """Blocks start ... stop - 1: dy = (y - target) scale[0], sums[block] = the sum of the squares of y - target.

    Where the target is NaN, y - target counts as 0.
    """
    factor = scale[0]
    for block in range(start, stop):
        first, last = block * BLOCK, min(len(y), (block + 1) * BLOCK)
        a, b, to = y[first:last], target[first:last], dy[first:last]
        for i in range(last - first):
            to[i] = a[i] - b[i] if b[i] == b[i] else ZERO
        lanes[:] = 0.0
        for i in range(0, last - first, LANES):
            row = to[i : min(last - first, i + LANES)]
            for j in range(len(row)):
                value = np.float64(row[j])
                lanes[j] += value * value
                row[j] = row[j] * factor
        total = 0.0
        for j in range(LANES):
            total += lanes[j]
        sums[block] = total


@kernel
def weighted_error_range(start, stop, y, target, dy, terms, values, channels, scale, sums):
    """Rows start ... stop - 1 of the loss by `terms`: dy, and sums[row] = the sum over the row's values.

    See `LayerBackend.squared_error`: a row of terms is w, or w, g, h, V, K, A, and then y has twice the channels.
    """
    hybrid = terms.shape[1] > 1
    outputs = 2 * channels if hybrid else channels
    for row in range(start, stop):
        weight, total = terms[row, 0], 0.0
        factor = scale[0] * weight
        for pixel in range(values // channels):
            at, to = row * values + pixel * channels, (row * values // channels + pixel) * outputs
            for j in range(channels):
                wanted = target[at + j]
                difference = y[to + j] - wanted if wanted == wanted else ZERO
                dy[to + j] = difference * factor
                total += np.float64(weight * (difference * difference))
            if not hybrid:
                continue
            g, h, V, K, A = terms[row, 1], terms[row, 2], terms[row, 3], terms[row, 4], terms[row, 5]
            for j in range(channels):
                wanted = target[at + j]
                difference = y[to + j] - wanted if wanted == wanted else ZERO
                hv = h * y[to + channels + j]
                left = (V + K * (difference * difference)) * exp(min(max(-hv, EXP_LOW), EXP_HIGH))
                total += np.float64(g * (hv + left + A))
                dy[to + channels + j] = g * h * (ONE - left) * (scale[0] * HALF)
        sums[row] = total


@kernel
def mean_of_blocks(start, stop, sums, size, out):
    """out[0] = the sum of all sums, in order, over `size`."""
    total = 0.0
    for block in range(len(sums)):
        total += sums[block]
    out[0] = total / size
