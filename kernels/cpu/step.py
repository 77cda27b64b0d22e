"""Forward noising and the fused sampler step: one pass over memory, the noise never leaves the cache."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastdiff.kernels.cpu.elementary import EXP_HIGH, EXP_LOW, exp
from fastdiff.kernels.cpu.jit import export, kernel, load, part, store
from fastdiff.kernels.cpu.noise import Law, Room, draw_chunk

ZERO = np.float32(0)
# Numbers of a row that is given to a kernel, in float32: those of the table, and the bounds of m.
P, Q, A, B, C1, C2, C3, E, S, R, LOW, HIGH = range(12)
# Arrays that share no memory, unless nothing is done with one of them.
X, OUT, M1, M2, M3, NOISE = range(6)


@kernel
def forward_noise_range(start, stop, x0, t, signal, noise, out, eps, n, width, law, room):
    """Chunks start ... stop - 1 of out = signal[t] x0 + noise[t] eps; x0, out and eps are flat (n width,)."""
    law, room = Law(*law), Room(*room)
    for chunk in range(start, stop):
        for k in range(draw_chunk(chunk, n, width, law, room)):
            begin, length, at = room.segments[k]
            end = begin + length
            while begin < end:  # row by row, each with its own t
                row = begin // width
                count = min(end, (row + 1) * width) - begin
                a, b = signal[t[row]], noise[t[row]]
                source, clean = room.z[at : at + count], x0[begin : begin + count]
                noisy, drawn = out[begin : begin + count], eps[begin : begin + count]
                for j in range(count):
                    noisy[j] = a * clean[j] + b * source[j]
                    drawn[j] = source[j]
                begin += count
                at += count


@part
def _apply(begin, end, x, out, memory, z, at, row, c, s, depth):
    (m1, m2, m3), (c1, c2, c3) = memory, c
    p, q, a, b, e, low, high = row[P], row[Q], row[A], row[B], row[E], row[LOW], row[HIGH]
    for j in range(begin, end):
        xj, oj = load(x, j, X), load(out, j, OUT)
        m = ZERO
        if p != ZERO:
            m = m + p * xj
        if q != ZERO:
            m = m + q * oj
        if m > high:
            m = high
        if m < low:
            m = low
        value = ZERO
        if a != ZERO:
            value = value + a * xj
        if b != ZERO:
            value = value + b * m
        if c1 != ZERO:
            value = value + c1 * load(m1, j, M1)
        if c2 != ZERO:
            value = value + c2 * load(m2, j, M2)
        if c3 != ZERO:
            value = value + c3 * load(m3, j, M3)
        if e != ZERO:
            value = value + e * oj
        if s != ZERO:
            value = value + s * load(z, at + j, NOISE)
        if depth > 2:
            store(m3, j, M3, load(m2, j, M2))
        if depth > 1:
            store(m2, j, M2, load(m1, j, M1))
        if depth > 0:
            store(m1, j, M1, m)
        store(x, j, X, value)


@kernel
def _apply_row(begin, end, x, out, m1, m2, m3, z, at, row, depth):
    """Apply one row of a table to begin ... end - 1 of flat arrays, in place; the noise of `begin` is z[at].

    `row` has the numbers P ... HIGH; a zero coefficient leaves its term out. The first `depth` of m1, m2 and m3 are to
    remember this row. Where an array is not needed, any of the length will do.
    """
    at -= begin
    c1, c2, c3, s = row[C1], row[C2], row[C3], row[S]
    # The last loop would do for all, but what it asks at every element makes it twice as long as the first.
    if depth == 0 and c1 == ZERO and c2 == ZERO and c3 == ZERO:
        if s == ZERO:
            _apply(begin, end, x, out, (x, x, x), x, at, row, (ZERO, ZERO, ZERO), ZERO, 0)
        else:
            _apply(begin, end, x, out, (x, x, x), z, at, row, (ZERO, ZERO, ZERO), s, 0)
    elif depth == 1 and c2 == ZERO and c3 == ZERO:
        _apply(begin, end, x, out, (m1, m1, m1), z, at, row, (c1, ZERO, ZERO), s, 1)
    else:
        _apply(begin, end, x, out, (m1, m2, m3), z, at, row, (c1, c2, c3), s, depth)


ROW_TYPES = (types.int64, types.int64, *[types.float32[::1]] * 6, types.int64, types.float32[::1], types.int64)
_emit_apply_row = export(_apply_row, ROW_TYPES, "apply_row")


@intrinsic
def apply_row(typingctx, begin, end, x, out, m1, m2, m3, z, at, row, depth):
    """`_apply_row`, compiled once for all its callers."""
    return types.void(*ROW_TYPES), lambda context, builder, signature, args: _emit_apply_row(context, builder, args)


@kernel
def row_range(start, stop, x, out, memory, row, depth):
    """Values start ... stop - 1 of a sampler step without noise on flat arrays; see `apply_row`."""
    m1, m2, m3 = memory
    apply_row(start, stop, x, out, m1, m2, m3, out, start, row, depth)


@kernel
def scale_noise(z, v, r):
    """z *= exp(r v); the power ends at 88, below what float32 holds."""
    for j in range(len(v)):
        power = r * v[j]
        if power > EXP_HIGH:
            power = EXP_HIGH
        if power < EXP_LOW:
            power = EXP_LOW
        z[j] *= exp(power)


@kernel
def step_range(start, stop, x, out, v, memory, row, depth, n, width, law, room):
    """Chunks start ... stop - 1 of a sampler step on flat (n width,) arrays; see `apply_row`. `v` where r is not 0."""
    law, room, (m1, m2, m3) = Law(*law), Room(*room), memory
    z = room.z
    for chunk in range(start, stop):
        for k in range(draw_chunk(chunk, n, width, law, room)):
            begin, length, at = room.segments[k]
            if row[R] != ZERO:
                scale_noise(z[at:], v[begin : begin + length], row[R])
            apply_row(begin, begin + length, x, out, m1, m2, m3, z, at, row, depth)
