"""Convolutions of three taps along rows with stride 1 by Winograd's F(4, 3): 6 products for 4 outputs, half of 12.

These are the transforms of `winograd` in one direction: with d the six inputs that a tile of four outputs sees, and g
the taps,

    y = A^T [(G g) * (B^T d)],

a sum over channels, so that each of the 6 places is a matrix product over (tiles, channels). The gradient of the taps
is G^T [sum over tiles of (B^T d) * (A dy)]. Tiles are numbered along the rows of all images, one row after another.

What a product reads in columns lies panel by panel, (length, width of the panel): rows a power of two apart would share
a few sets of the cache. All sums of an output have an order of their own, whatever is computed together.
"""

from __future__ import annotations

from numba.extending import register_jitable

from fastdiff.kernels.cpu.conv import panel_of, panels_of
from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import kernel
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
weights_line, more_weights_line = (transform_of(to_taps, SEEN, addends, lines=1) for addends in (0, 2))


@register_jitable
def plane_of(rows, columns):
    """Values from one place's matrix to the next one's."""
    return rows * columns + APART


@kernel
def taps_range(start, stop, w, c, k, u):
    """U for input channels start ... stop - 1 of w (3, c, k): place by place, panel by panel, (c, width)."""
    plane, panels = plane_of(c, k), panels_of(k)
    for panel in range(panels):
        at, n = panel_of(panel, panels, k)
        for i in range(start, stop):
            for j in range(0, n, LANES):
                taps_line(w, i * k + at + j, 0, c * k, min(LANES, n - j), u, at * c + i * n + j, 0, plane)


@kernel
def _seen(x, row, first, count, width, c, edge):
    """edge (count, c) = what row `row` of all images shows from column `first` on, with zeros around it."""
    for i in range(count):
        at = first + i
        inside = at >= 0 and at < width
        source = (row * width + at) * c
        for j in range(c):
            edge[i * c + j] = x[source + j] if inside else ZERO


@kernel
def _inputs(x, first, last, width, c, edge, v, plane):
    """V (tiles, c) of every place for tiles first ... last - 1."""
    across = (width + TILE - 1) // TILE
    for t in range(first, last):
        row, column = t // across, TILE * (t % across) - 1
        to = (t - first) * c
        if column >= 0 and column + SEEN <= width:
            at = (row * width + column) * c
            for j in range(0, c, LANES):
                inputs_line(x, at + j, 0, c, min(LANES, c - j), v, to + j, 0, plane)
        else:
            _seen(x, row, column, SEEN, width, c, edge)
            for j in range(0, c, LANES):
                inputs_line(edge, j, 0, c, min(LANES, c - j), v, to + j, 0, plane)


@kernel
def conv_range(
    start, stop, tiles, shares, sizes, x, u, y, begin, bias, shift, residual, edge, v, m, base, tile,
):  # fmt: skip
    """Items start ... stop - 1 of a convolution: `tiles` tiles, and every `shares`-th panel of channels.

    `sizes` are images, height, width, input channels, output channels. With `begin`, y becomes bias + shift + residual
    + the convolution (an empty one of the three is 0); else that is added to what y holds. `base` takes a row of
    channels of a panel, `tile` a tile of these.
    """
    images, height, width, c, k = sizes
    across = (width + TILE - 1) // TILE
    panels = panels_of(k)
    added = residual if begin else y
    for item in range(start, stop):
        first = (item // shares) * tiles
        last = min(first + tiles, images * height * across)
        count = last - first
        v_plane, m_plane = plane_of(count, c), plane_of(count, k)
        _inputs(x, first, last, width, c, edge, v, v_plane)
        for place in range(SEEN):  # the outer loop, so that its inputs stay in the cache for all panels
            for panel in range(item % shares, panels, shares):
                at, n = panel_of(panel, panels, k)
                gemm(
                    m, place * m_plane + at * count, n, v, place * v_plane, c, 1, u, place * plane_of(c, k) + at * c, n,
                    count, n, c, False,
                )  # fmt: skip
        for panel in range(item % shares, panels, shares):
            at, n = panel_of(panel, panels, k)
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
                to, source = (row * width + column) * k + at, at * count + t * n
                inside = min(TILE, width - column)
                for j in range(0, n, LANES):
                    used = min(LANES, n - j)
                    if inside < TILE:
                        outputs_and_base(m, source + j, 0, m_plane, used, tile, j, 0, n, base, j)
                    elif len(added) > 0:
                        outputs_base_other(m, source + j, 0, m_plane, used, y, to + j, 0, k, base, j, added, to + j)
                    else:
                        outputs_and_base(m, source + j, 0, m_plane, used, y, to + j, 0, k, base, j)
                if inside < TILE:
                    for s in range(inside):
                        for j in range(n):
                            value = tile[s * n + j]
                            y[to + s * k + j] = value + added[to + s * k + j] if len(added) > 0 else value


@kernel
def gradient_tiles_range(start, stop, first, tiles, sizes, x, dy, edge, v, d):
    """Tiles first + start ... first + stop - 1 of x and of dy, for a gradient of `tiles` tiles at once."""
    _, _, width, c, k = sizes
    across = (width + TILE - 1) // TILE
    _inputs(x, first + start, first + stop, width, c, edge, v[start * c :], plane_of(tiles, c))
    plane, panels = plane_of(tiles, k), panels_of(k)
    for t in range(start, stop):
        row, column = (first + t) // across, TILE * ((first + t) % across)
        whole, at = column + TILE <= width, (row * width + column) * k
        if not whole:
            _seen(dy, row, column, TILE, width, k, edge)
        for panel in range(panels):
            begin, n = panel_of(panel, panels, k)
            to = begin * tiles + t * n
            for j in range(0, n, LANES):
                used = min(LANES, n - j)
                if whole:
                    gradients_line(dy, at + begin + j, 0, k, used, d, to + j, 0, plane)
                else:
                    gradients_line(edge, begin + j, 0, k, used, d, to + j, 0, plane)


@kernel
def gradient_sums_range(start, stop, tiles, c, k, v, d, du, accumulate):
    """Items start ... stop - 1 of the sums over tiles: a place and a panel of channels each."""
    panels = panels_of(k)
    for item in range(start, stop):
        place = item // panels
        at, n = panel_of(item % panels, panels, k)
        gemm(
            du, place * plane_of(c, k) + at * c, n, v, place * plane_of(tiles, c), 1, c,
            d, place * plane_of(tiles, k) + at * tiles, n, c, n, tiles, accumulate,
        )  # fmt: skip


@kernel
def gradient_range(start, stop, group_tiles, tiles, sizes, x, dy, edge, v, d, sums, size):
    """Groups start ... stop - 1 of `group_tiles` tiles: the sums of each, `tiles` at a time, in `sums`."""
    images, height, width, c, k = sizes
    total = images * height * ((width + TILE - 1) // TILE)
    for group in range(start, stop):
        own = sums[group * size : (group + 1) * size]
        first, last = group * group_tiles, min((group + 1) * group_tiles, total)
        for at in range(first, last, tiles):
            count = min(tiles, last - at)
            gradient_tiles_range(0, count, at, count, sizes, x, dy, edge, v, d)
            gradient_sums_range(0, SEEN * panels_of(k), count, c, k, v, d, own, at > first)


@kernel
def gradient_taps_range(start, stop, du, groups, size, c, k, zeros, dw):
    """dw (3, c, k) for input channels start ... stop - 1: that of all groups' sums, added in their order."""
    plane, panels = plane_of(c, k), panels_of(k)
    for panel in range(panels):
        at, n = panel_of(panel, panels, k)
        for i in range(start, stop):
            for j in range(0, n, LANES):
                used, to, source = min(LANES, n - j), i * k + at + j, at * c + i * n + j
                weights_line(du, source, 0, plane, used, dw, to, 0, c * k)
                for group in range(1, groups):
                    more_weights_line(du, group * size + source, 0, plane, used, dw, to, 0, c * k, zeros, 0, dw, to)
