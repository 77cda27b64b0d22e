"""Convolutions of three taps along rows with stride 1 by Winograd's F(4, 3): 6 products for 4 outputs, half of 12.

These are the transforms of `winograd` in one direction: with d the six inputs that a tile of four outputs sees, and g
the taps,

    y = A^T [(G g) * (B^T d)],

a sum over channels, so that each of the 6 places is a matrix product over (tiles, channels). The gradient of the taps
is G^T [sum over tiles of (B^T d) * (A dy)]. Tiles are numbered along the rows of all images, one row after another.

All is done in blocks of at most `MOST` tiles, input channels and output channels, of what is summed of `DEEP` in large
layers: what they are transformed to stays in the second-level cache, whatever the size of the layer, and the products
outweigh the transforms, which other blocks do again. All sums of an output have an order of their own, whatever is
computed together.
"""

from __future__ import annotations

from numba.extending import register_jitable

from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import kernel
from fastdiff.kernels.cpu.linear import MOST
from fastdiff.kernels.cpu.transpose import transpose_part
from fastdiff.kernels.cpu.winograd import (
    APART,
    LANES,
    SEEN,
    TILE,
    ZERO,
    of_inputs,
    of_outputs,
    of_taps,
    to_outputs,
    to_taps,
    transform_of,
)

inputs_line = transform_of(of_inputs, SEEN, lines=1)
outputs_and_base, outputs_base_other = (transform_of(of_outputs, SEEN, addends, lines=1) for addends in (1, 2))
gradients_line = transform_of(to_outputs, TILE, lines=1)
taps_line = transform_of(of_taps, 3, lines=1)
weights_line = transform_of(to_taps, SEEN, lines=1)

TAPS = 3
DEEP = MOST // 2  # input channels that are summed at once where there are more than MOST, and tiles
PLANES = SEEN * (MOST * (MOST + APART) + APART)  # values of a block, at all places


@register_jitable
def _distances(rows, columns):
    """Values from a row of a block to the next one, and from a place to the next: they meet in no set of a cache."""
    return columns + APART, rows * (columns + APART) + APART


@kernel
def _transformed(x, first, last, width, c, at, n, gradient, edge, v):
    """V (tiles, n) of every place for tiles first ... last - 1, channels at ... at + n - 1; of a `gradient`, A dy."""
    across = (width + TILE - 1) // TILE
    seen, before = (TILE, 0) if gradient else (SEEN, 1)
    distance, plane = _distances(last - first, n)
    for t in range(first, last):
        row, column = t // across, TILE * (t % across) - before
        to = (t - first) * distance
        if column >= 0 and column + seen <= width:
            source = (row * width + column) * c + at
            for j in range(0, n, LANES):
                if gradient:
                    gradients_line(x, source + j, 0, c, min(LANES, n - j), v, to + j, 0, plane)
                else:
                    inputs_line(x, source + j, 0, c, min(LANES, n - j), v, to + j, 0, plane)
            continue
        for i in range(seen):  # with zeros around the row
            part = edge[i * n : (i + 1) * n]
            if column + i >= 0 and column + i < width:
                source = (row * width + column + i) * c + at
                values = x[source : source + n]
                for j in range(n):
                    part[j] = values[j]
            else:
                part[:] = ZERO
        for j in range(0, n, LANES):
            if gradient:
                gradients_line(edge, j, 0, n, min(LANES, n - j), v, to + j, 0, plane)
            else:
                inputs_line(edge, j, 0, n, min(LANES, n - j), v, to + j, 0, plane)


@kernel
def _taps(w, c, k, first, count, at, n, adjoint, turned, u):
    """U (count, n) of every place, for input channels from `first` and output channels from `at` on.

    The taps are w (3, c, k), or with `adjoint` those of an input gradient: w (3, k, c), turned around.
    """
    if adjoint:
        for tap in range(TAPS):
            source = ((TAPS - 1 - tap) * k + at) * c + first
            transpose_part(w, source, c, turned, tap * count * n, n, n, count, False)
    distance, plane = _distances(count, n)
    for i in range(count):
        for j in range(0, n, LANES):
            used, to = min(LANES, n - j), i * distance + j
            if adjoint:
                taps_line(turned, i * n + j, 0, count * n, used, u, to, 0, plane)
            else:
                taps_line(w, (first + i) * k + at + j, 0, c * k, used, u, to, 0, plane)


@kernel
def conv_range(
    start, stop, tiles, wide, sizes, x, w, adjoint, y, begin, bias, shift, residual, edge, turned, v, u, m, base, tile,
):  # fmt: skip
    """Items start ... stop - 1 of a convolution: `tiles` tiles and `wide` output channels each.

    `sizes` are images, height, width, input channels, output channels. With `begin`, y becomes bias + shift + residual
    + the convolution (an empty one of the three is 0); else that is added to what y holds. `adjoint`: as of `_taps`.
    """
    images, height, width, c, k = sizes
    across = (width + TILE - 1) // TILE
    total = images * height * across
    blocks = (total + tiles - 1) // tiles
    added = residual if begin else y
    step = MOST if c <= MOST else DEEP
    held = -1  # where the output channels begin whose taps are in u, all of them
    for item in range(start, stop):
        first, at = (item % blocks) * tiles, (item // blocks) * wide
        last, n = min(first + tiles, total), min(wide, k - at)
        count = last - first
        row_m, plane_m = _distances(count, n)
        for deep in range(0, c, step):
            channels = min(step, c - deep)
            _transformed(x, first, last, width, c, deep, channels, False, edge, v)
            if at != held:
                _taps(w, c, k, deep, channels, at, n, adjoint, turned, u)
            (row_v, plane_v), (row_u, plane_u) = _distances(count, channels), _distances(channels, n)
            for place in range(SEEN):
                gemm(
                    m, place * plane_m, row_m, v, place * plane_v, row_v, 1, u, place * plane_u, row_u, count, n,
                    channels, deep > 0,
                )  # fmt: skip
        if c <= MOST:
            held = at
        image = -1
        for t in range(count):
            row, column = (first + t) // across, TILE * ((first + t) % across)
            if row // height != image:
                image = row // height
                for j in range(n):
                    base[j] = bias[at + j] if len(bias) > 0 else ZERO
                if len(shift) > 0:
                    for j in range(n):
                        base[j] += shift[image * k + at + j]
            to, source = (row * width + column) * k + at, t * row_m
            inside = min(TILE, width - column)
            for j in range(0, n, LANES):
                used = min(LANES, n - j)
                if inside < TILE:
                    outputs_and_base(m, source + j, 0, plane_m, used, tile, j, 0, n, base, j)
                elif len(added) > 0:
                    outputs_base_other(m, source + j, 0, plane_m, used, y, to + j, 0, k, base, j, added, to + j)
                else:
                    outputs_and_base(m, source + j, 0, plane_m, used, y, to + j, 0, k, base, j)
            if inside < TILE:
                for s in range(inside):
                    for j in range(n):
                        value = tile[s * n + j]
                        y[to + s * k + j] = value + added[to + s * k + j] if len(added) > 0 else value


@kernel
def gradient_range(start, stop, group, deep, wide, sizes, x, dy, edge, v, d, du, sums):
    """Items start ... stop - 1 of the gradient of the taps: `deep` input and `wide` output channels of a group each.

    `sums` (groups, 3, c, k) takes for each group the sum over its `group` tiles, in their order.
    """
    images, height, width, c, k = sizes
    total = images * height * ((width + TILE - 1) // TILE)
    parts, shares = (c + deep - 1) // deep, (k + wide - 1) // wide
    for item in range(start, stop):
        part, share, number = item % parts, (item // parts) % shares, item // (parts * shares)
        above, at, begin = part * deep, share * wide, number * group
        channels, n, end = min(deep, c - above), min(wide, k - at), min(begin + group, total)
        row, plane = _distances(channels, n)
        for first in range(begin, end, DEEP):
            last = min(first + DEEP, end)
            _transformed(x, first, last, width, c, above, channels, False, edge, v)
            _transformed(dy, first, last, width, k, at, n, True, edge, d)
            (row_v, plane_v), (row_d, plane_d) = _distances(last - first, channels), _distances(last - first, n)
            for place in range(SEEN):
                gemm(
                    du, place * plane, row, v, place * plane_v, 1, row_v, d, place * plane_d, row_d, channels, n,
                    last - first, first > begin,
                )  # fmt: skip
        for i in range(channels):
            to = (number * TAPS * c + above + i) * k + at
            for j in range(0, n, LANES):
                weights_line(du, i * row + j, 0, plane, min(LANES, n - j), sums, to + j, 0, c * k)
