"""The covariance room: similarity matrices, and linear maps of rows, given or drawn, on tiles that stay in cache.

Every sum of a row runs in an order that the map's own sizes decide, so a row's bits do not depend on its tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastdiff.kernels.cpu.elementary import exp
from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import kernel
from fastdiff.kernels.cpu.noise import Law, Room, chunks_of, draw_chunk, law_at

TILE = 128  # rows, where there are products
TILE_VALUES = 1 << 18  # that a tile has at most, unless it has few rows already
FEWEST = 16
DEPTH = 512  # of a product at once: so much of a panel of the matrix stays in cache

F = np.float32
ZERO, ONE = F(0), F(1)
LEAST_EXPONENT = F(-88)  # of exp: below -87.7 the factor 2^whole is 0


class Map(NamedTuple):
    """A map of rows of n values to k, in tiles of `tile` rows; a part without values is no part.

    `products` is 0, 1 (x left) or 2 (x left right, with r values between them).
    """

    tile: int
    n: int
    k: int
    r: int
    products: int
    standardise: bool
    scale: Any
    left: Any
    right: Any
    offset: Any


class MapRoom(NamedTuple):
    """A thread's: the middle of two products, squares, sums of rows, and the weights that make means of them."""

    middle: Any
    squares: Any
    sums: Any
    weights: Any


@kernel
def exp_minus_square(d):
    """exp(-d^2) in float32; 0 where that is below some 1e-38."""
    exponent = -(d * d)
    return exp(exponent if exponent > LEAST_EXPONENT else LEAST_EXPONENT)


@kernel
def similarity_range(start, stop, v, out, n):
    """Rows start ... stop - 1 of the B n rows of the matrices exp(-(v_i - v_j)^2); v (B n,) and out (B n n,) flat.

    Numba does not look for negative ones among unsigned indices: that spares slices, which would cost as much as a row.
    """
    width = np.uint64(n)
    for row in range(np.uint64(start), np.uint64(stop)):
        curve, to, value = row // width * width, row * width, v[row]
        for j in range(width):
            out[to + j] = exp_minus_square(v[curve + j] - value)


def tile_rows(n, k, products):
    """Rows of a tile of a map from n to k values: a rule of the map alone."""
    rows = min(TILE, TILE_VALUES // max(n, k, 1))
    return max(rows, FEWEST if products else 1)


@kernel
def _product(rows, c, c_off, k, a, a_off, n, matrix, accumulate):
    """C = A `matrix`, or C + A `matrix`, of the `rows` rows of a tile; the matrix is (n, k)."""
    for depth in range(0, max(n, 1), DEPTH):
        gemm(
            c, c_off, k, a, a_off + depth, n, 1, matrix, depth * k, k,
            rows, k, min(DEPTH, n - depth), accumulate or depth > 0,
        )  # fmt: skip


@kernel
def _standardise(rows, y, k, squares, sums, weights):
    """Rows of y minus their mean, through their standard deviation; sums are products with `weights`, all 1 / k."""
    for i in range(rows):
        row = y[i * k : (i + 1) * k]
        first = row[0]  # subtracted from all before the mean is, so that a constant row becomes 0 exactly
        for j in range(k):
            row[j] = row[j] - first
    gemm(sums, 0, 1, y, 0, k, 1, weights, 0, 1, rows, 1, k, False)
    for i in range(rows):
        row, square, mean = y[i * k : (i + 1) * k], squares[i * k : (i + 1) * k], sums[i]
        for j in range(k):
            value = row[j] - mean
            row[j] = value
            square[j] = value * value
    gemm(sums, 0, 1, squares, 0, k, 1, weights, 0, 1, rows, 1, k, False)
    for i in range(rows):
        row, deviation = y[i * k : (i + 1) * k], math.sqrt(sums[i])
        factor = ONE / deviation if deviation > ZERO else ONE
        for j in range(k):
            row[j] = row[j] * factor


@kernel
def _map_tile(rows, x, at, out, begin, given, room):
    """The rows at x[at:] to out[begin:], through the map `given`."""
    n, k, scale, offset = given.n, given.k, given.scale, given.offset
    scaled = len(scale) > 0
    y = out[begin : begin + rows * k]
    if scaled:
        for i in range(rows):
            source, target = x[at + i * n : at + (i + 1) * n], y[i * k : (i + 1) * k]
            for j in range(k):
                target[j] = source[j] * scale[j]
    if given.products == 1:
        _product(rows, out, begin, k, x, at, n, given.left, scaled)
    elif given.products == 2:
        _product(rows, room.middle, 0, given.r, x, at, n, given.left, False)
        _product(rows, out, begin, k, room.middle, 0, given.r, given.right, scaled)
    if len(offset) > 0:
        for i in range(rows):
            target = y[i * k : (i + 1) * k]
            for j in range(k):
                target[j] = target[j] + offset[j]
    if given.standardise:
        _standardise(rows, y, k, room.squares, room.sums, room.weights)


@kernel
def map_range(start, stop, x, out, given, room):
    """Tiles start ... stop - 1 of a map of the rows of x (m, n) to out (m, k), both flat."""
    given, room = Map(*given), MapRoom(*room)
    tile, n, k = given.tile, given.n, given.k
    m = len(out) // k
    for begin in range(start * tile, min(stop * tile, m), tile):
        rows = min(tile, m - begin)
        _map_tile(rows, x, begin * n, out, begin * k, given, room)


@kernel
def mapped_normal_range(start, stop, drawn, out, given, room, law, noise):
    """`map_range` of normals (m, n), of which a tile is drawn into the workspace `drawn` at a time."""
    given, room, law, noise = Map(*given), MapRoom(*room), Law(*law), Room(*noise)
    tile, n, k = given.tile, given.n, given.k
    m = len(out) // k
    for begin in range(start * tile, min(stop * tile, m), tile):
        rows = min(tile, m - begin)
        here = law_at(law, law.first_row + np.uint64(begin), law.step)
        for chunk in range(chunks_of(rows, n)):
            for s in range(draw_chunk(chunk, rows, n, here, noise)):
                to, length, at = noise.segments[s]
                target, source = drawn[to : to + length], noise.z[at : at + length]
                for j in range(length):
                    target[j] = source[j]
        _map_tile(rows, drawn, 0, out, begin * k, given, room)
