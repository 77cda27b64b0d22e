"""Forward noising and the fused sampler step: one pass over memory, the noise never leaves the cache."""

from __future__ import annotations

import numpy as np

from fastdiff.kernels.cpu.jit import kernel
from fastdiff.kernels.cpu.noise import draw_chunk

ZERO = np.float32(0)


@kernel
def forward_noise_range(
    start, stop, x0, t, signal, noise, out, eps, n, width, first_row, stream, keys, words, z, segments
):
    """Chunks start ... stop - 1 of out = signal[t] x0 + noise[t] eps; x0, out and eps are flat (n width,)."""
    for chunk in range(start, stop):
        for k in range(draw_chunk(chunk, n, width, first_row, 0, stream, keys, words, z, segments)):
            begin, length, at = segments[k]
            end = begin + length
            while begin < end:  # row by row, each with its own t
                row = begin // width
                count = min(end, (row + 1) * width) - begin
                a, b = signal[t[row]], noise[t[row]]
                source, clean = z[at : at + count], x0[begin : begin + count]
                noisy, drawn = out[begin : begin + count], eps[begin : begin + count]
                for j in range(count):
                    noisy[j] = a * clean[j] + b * source[j]
                    drawn[j] = source[j]
                begin += count
                at += count


@kernel
def apply_row(x, out, previous, z, row, low, high, keep):
    """Apply one row of a table to flat segments, in place.

    `row` is (p, q, a, b, c, e, s) in float32; a zero coefficient leaves its term out. Where a segment is not needed,
    any array of the length will do. `keep` says that `previous` takes this row's x0.
    """
    p, q, a, b, c, e, s = row[0], row[1], row[2], row[3], row[4], row[5], row[6]
    for j in range(len(x)):
        xj, oj = x[j], out[j]
        x0 = ZERO
        if p != ZERO:
            x0 = x0 + p * xj
        if q != ZERO:
            x0 = x0 + q * oj
        if x0 > high:
            x0 = high
        if x0 < low:
            x0 = low
        value = ZERO
        if a != ZERO:
            value = value + a * xj
        if b != ZERO:
            value = value + b * x0
        if c != ZERO:
            value = value + c * previous[j]
        if e != ZERO:
            value = value + e * oj
        if s != ZERO:
            value = value + s * z[j]
        if keep:
            previous[j] = x0
        x[j] = value


@kernel
def step_range(
    start,
    stop,
    x,
    out,
    previous,
    row,
    low,
    high,
    keep,
    n,
    width,
    first_row,
    step,
    stream,
    keys,
    words,
    z,
    segments,
):
    """Chunks start ... stop - 1 of a sampler step on flat (n width,) arrays; see `apply_row`."""
    for chunk in range(start, stop):
        for k in range(draw_chunk(chunk, n, width, first_row, step, stream, keys, words, z, segments)):
            begin, length, at = segments[k]
            end = begin + length
            apply_row(x[begin:end], out[begin:end], previous[begin:end], z[at : at + length], row, low, high, keep)
