"""Normals by the noise law (`fastdiff.noise`): the same operations in the same order, hence the same bits.

A chunk of blocks is drawn in two passes, integers into four arrays of words and then Box-Muller per pair. Fused into
one loop they would not vectorise; a chunk's arrays stay in cache between the passes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastdiff.kernels.cpu.jit import bits_float, export, float_bits, kernel
from fastdiff.noise import (
    ANGLE_UNIT,
    COS_COEFFICIENTS,
    LN2_HIGH,
    LN2_LOW,
    LOG_COEFFICIENTS,
    PHILOX_M,
    SIN_COEFFICIENTS,
    SQRT_HALF_BITS,
    UNIFORM_UNIT,
)

CHUNK = 512
"""Blocks drawn at once, so 2048 normals: the workspace stays in the first-level cache."""
LANES = 16
MAGIC_BITS = 20
QUARTER = CHUNK + LANES  # distance of the four quarters in the workspace; the copies below read whole vectors
ORDERED = 4 * QUARTER  # where normals in the order of their rows begin
WORKSPACE = ORDERED + 4 * CHUNK + 4 * LANES

# Constants with a fixed type: an untyped literal would widen the arithmetic.
F = np.float32
U = np.uint32
M0, M1 = np.uint64(PHILOX_M[0]), np.uint64(PHILOX_M[1])
SHIFT, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (F(c) for c in LOG_COEFFICIENTS)
S0, S1, S2 = (F(c) for c in SIN_COEFFICIENTS)
C0, C1, C2 = (F(c) for c in COS_COEFFICIENTS)
HALF, ONE, MINUS_TWO = F(0.5), F(1), F(-2)
UNIT, ANGLE, LN2_H, LN2_L = F(UNIFORM_UNIT), F(ANGLE_UNIT), F(LN2_HIGH), F(LN2_LOW)
# Numba computes with 32-bit integers in 64 bits; the casts below say that 32 are enough, for vectors of 16.
INT = np.int32
ROOT_BITS, EIGHTH = INT(SQRT_HALF_BITS), INT(1 << 21)
I1, I2, I22, I23, I30 = INT(1), INT(2), INT(22), INT(23), INT(30)
EIGHT = U(8)


class Law(NamedTuple):
    """Where noise comes from: a `fastdiff.noise.Draw`, with the keys of its seed."""

    first_row: np.uint64
    step: int
    stream: int
    keys: Any


class Room(NamedTuple):
    """What a thread draws in: words (4, CHUNK) uint32, z (WORKSPACE,) float32, segments (4, 3) int64."""

    words: Any
    z: Any
    segments: Any


@kernel
def log_uniform(w):
    """ln((float32(w) + 0.5) 2^-32) of a word."""
    bits = float_bits((F(w) + HALF) * UNIT)
    exponent = INT(INT(bits - ROOT_BITS) >> I23)
    m = bits_float(INT(bits - INT(exponent << I23))) - ONE
    e = F(exponent)
    square = m * m
    y = L8 * m + L7
    y = y * m + L6
    y = y * m + L5
    y = y * m + L4
    y = y * m + L3
    y = y * m + L2
    y = y * m + L1
    y = y * m + L0
    y = y * m * square
    y = y + e * LN2_L
    y = y - HALF * square
    return (m + y) + e * LN2_H


@kernel
def cos_sin_turn(w):
    """Cosine and sine of the angle 2 pi (w >> 8) 2^-24 of a word."""
    k = INT(w >> EIGHT)
    quarter = INT(INT(k + EIGHTH) >> I22)
    x = F(INT(k - INT(quarter << I22))) * ANGLE
    z = x * x
    s = ((S2 * z + S1) * z + S0) * z * x + x
    c = ((C2 * z + C1) * z + C0) * z * z - HALF * z + ONE
    odd = INT(quarter & I1) == I1
    cosine = s if odd else c
    sine = c if odd else s
    # Signs through the sign bit: the second and third quarter for the cosine, the third and fourth for the sine.
    cosine = bits_float(INT(float_bits(cosine) ^ INT(INT(INT(quarter + I1) & I2) << I30)))
    return cosine, bits_float(INT(float_bits(sine) ^ INT(INT(quarter & I2) << I30)))


@kernel
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round of Philox4x32 in the low halves of 64-bit lanes, which is how the products come; the high halves
    hold what the masks drop."""
    product0, product1 = M0 * (c0 & LOW), M1 * (c2 & LOW)
    return (product1 >> SHIFT) ^ c1 ^ k0, product1, (product0 >> SHIFT) ^ c3 ^ k1, product0


@kernel
def _words(count, first_block, first_row, run, along_rows, step, stream, keys, words):
    """Words of `count` <= CHUNK blocks into words[0:4].

    Runs of `run` blocks go along one row: block i is block ``first_block + i % run`` of row ``first_row + i // run``.
    Or, with `along_rows`, over the rows: it is block ``first_block + i // run`` of row ``first_row + i % run``.
    """
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    # i // run as a product: exact for i < CHUNK and run <= CHUNK; a longer run does not end here.
    magic = np.uint64((1 << MAGIC_BITS) // run + 1 if run <= CHUNK else 0)
    length, block, tag = np.uint64(run), np.uint64(first_block), np.uint64(stream) << np.uint64(56)
    step = np.uint64(step)
    # Rounds written out: a loop over them would be the innermost one, and the outer one would not vectorise.
    k0, k1 = np.uint64(keys[0, 0]), np.uint64(keys[0, 1])
    k2, k3 = np.uint64(keys[1, 0]), np.uint64(keys[1, 1])
    k4, k5 = np.uint64(keys[2, 0]), np.uint64(keys[2, 1])
    k6, k7 = np.uint64(keys[3, 0]), np.uint64(keys[3, 1])
    k8, k9 = np.uint64(keys[4, 0]), np.uint64(keys[4, 1])
    k10, k11 = np.uint64(keys[5, 0]), np.uint64(keys[5, 1])
    k12, k13 = np.uint64(keys[6, 0]), np.uint64(keys[6, 1])
    k14, k15 = np.uint64(keys[7, 0]), np.uint64(keys[7, 1])
    k16, k17 = np.uint64(keys[8, 0]), np.uint64(keys[8, 1])
    k18, k19 = np.uint64(keys[9, 0]), np.uint64(keys[9, 1])
    for i in range(count):
        past = (np.uint64(i) * magic) >> np.uint64(MAGIC_BITS)
        within = np.uint64(i) - past * length
        row = (first_row + (within if along_rows else past)) | tag
        c0, c1, c2, c3 = block + (past if along_rows else within), step, row, row >> SHIFT
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k2, k3)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k4, k5)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k6, k7)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k8, k9)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k10, k11)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k12, k13)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k14, k15)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k16, k17)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k18, k19)
        w0[i] = U(c0)
        w1[i] = U(c1)
        w2[i] = U(c2)
        w3[i] = U(c3)


@kernel
def _pair(count, wa, wb, za, zb):
    for i in range(count):
        radius = math.sqrt(MINUS_TWO * log_uniform(wa[i]))
        cosine, sine = cos_sin_turn(wb[i])
        za[i] = radius * cosine
        zb[i] = radius * sine


@kernel
def _draw(count, first_block, first_row, run, along_rows, step, stream, keys, words, z):
    """Draw `count` blocks, numbered as in `_words`; value j of block i goes to z[j QUARTER + i]."""
    count = (count + LANES - 1) // LANES * LANES  # whole vectors also where little is wanted
    _words(count, first_block, first_row, run, along_rows, step, stream, keys, words)
    _pair(count, words[0], words[1], z[:QUARTER], z[QUARTER:])
    _pair(count, words[2], words[3], z[2 * QUARTER :], z[3 * QUARTER :])


DRAW_TYPES = (
    *(types.int64, types.int64, types.uint64, types.int64, types.boolean, types.int64, types.int64),
    *(types.uint32[:, ::1], types.uint32[:, ::1], types.float32[::1]),
)
_emit_draw = export(_draw, DRAW_TYPES, "draw")


@intrinsic
def draw(typingctx, count, first_block, first_row, run, along_rows, step, stream, keys, words, z):
    """`_draw`, compiled once for all its callers."""
    return types.void(*DRAW_TYPES), lambda context, builder, signature, args: _emit_draw(context, builder, args)


@kernel
def law_at(law, first_row, step):
    """The law of a draw that begins at another row, and at another step."""
    return Law(first_row, step, law.stream, law.keys)


@kernel
def draw_rows(rows, first_row, width, law, room):
    """Draw `rows` whole rows of `width` values in at most CHUNK blocks; they lie in order from z[ORDERED]."""
    z, blocks = room.z, (width + 3) // 4
    draw(rows * blocks, 0, first_row, blocks, False, law.step, law.stream, law.keys, room.words, z)
    vectors = (blocks + LANES - 1) // LANES
    # Whole vectors are copied: what they overrun is written again by the next quarter or row.
    for row in range(rows):
        for quarter in range(4):
            target = z[ORDERED + row * width + quarter * blocks :]
            source = z[quarter * QUARTER + row * blocks :]
            for v in range(vectors):
                for j in range(LANES):
                    target[v * LANES + j] = source[v * LANES + j]


@kernel
def chunks_of(n, width):
    """Number of chunks in which n rows are drawn: several rows a chunk, or several chunks a row."""
    blocks = (width + 3) // 4
    if blocks <= CHUNK:
        rows = CHUNK // max(blocks, 1)
        return (n + rows - 1) // rows
    return n * ((blocks + CHUNK - 1) // CHUNK)


@kernel
def draw_chunk(chunk, n, width, law, room):
    """Draw one chunk of the normals of (n, width) into room.z.

    Fills room.segments with (begin in the flat array, length, begin in z), and returns how many there are.
    """
    segments, blocks = room.segments, (width + 3) // 4
    if blocks <= CHUNK:
        rows = CHUNK // blocks
        begin = chunk * rows
        rows = min(rows, n - begin)
        draw_rows(rows, law.first_row + np.uint64(begin), width, law, room)
        segments[0, 0], segments[0, 1], segments[0, 2] = begin * width, rows * width, ORDERED
        return 1
    per_row = (blocks + CHUNK - 1) // CHUNK
    row, block = chunk // per_row, (chunk % per_row) * CHUNK
    count, first_row = min(CHUNK, blocks - block), law.first_row + np.uint64(row)
    draw(count, block, first_row, CHUNK + 1, False, law.step, law.stream, law.keys, room.words, room.z)
    for quarter in range(4):
        column = block + quarter * blocks
        segments[quarter, 0] = row * width + column
        segments[quarter, 1] = max(0, min(count, width - column))
        segments[quarter, 2] = quarter * QUARTER
    return 4


@kernel
def normal_range(start, stop, out, n, width, law, room):
    """Fill the chunks start ... stop - 1 of the flat array `out` of (n, width) normals."""
    law, room = Law(*law), Room(*room)
    for chunk in range(start, stop):
        for k in range(draw_chunk(chunk, n, width, law, room)):
            begin, length, at = room.segments[k]
            target, source = out[begin : begin + length], room.z[at : at + length]
            for j in range(length):
                target[j] = source[j]
