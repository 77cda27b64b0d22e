"""3x3 convolutions with stride 1 by Winograd's F(4x4, 3x3): 36 products for 16 outputs of 9 taps, a quarter of 144.

A row of four outputs of a correlation of six inputs d with three taps g is a product of polynomials, known by its
values at six points (Toom and Cook; Winograd 1980; Lavin and Gray 2016). At the points 0, a, -a, b, -b and infinity,

    y = A^T [(G g) * (B^T d)],

row i of A^T being the i-th powers of the points (infinity counts in the last row only), that of G the powers
0, 1, 2 of a point p over the product of its differences from the other four, and that of B^T the coefficients of
x (x^2 - a^2) (x^2 - b^2) / (x - p), for infinity without the division. Rows and columns together use each matrix twice:

    Y = A^T [U * V] A,   U = G g G^T,   V = B^T d B,

a sum over channels, so that every one of the 36 places is a matrix product over (tiles, channels). The form is
bilinear: the gradient of the taps is G^T [sum over tiles of V * (A dY A^T)] G, and that of the inputs is the
convolution of dY with the taps turned around.

The points are a = sqrt(1/2) and b = sqrt(2): a^2 b^2 = 1 saves a multiplication, and rounding errors are half those of
1 and 2: about 1e-6 in the norm, relative to float64, where NumPy's float32 has 2e-7 (`make profile` prints both).

A tile is 4x4 outputs; a row of tiles is cut from the image with its surrounding zeros into a strip. All sums of an
output have an order of their own, whatever the tiles, panels and images that are computed together.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable
from numba.np.arrayobj import make_array

from fastdiff.kernels.cpu.conv import panel_of, panels_of
from fastdiff.kernels.cpu.gemm import I64, TILES, Rows, gemm, host_width
from fastdiff.kernels.cpu.jit import kernel

TILE = 4  # output rows and columns of a tile
SEEN = 6  # input rows and columns that it sees
PLACES = SEEN * SEEN
APART = 16  # values between the planes of two places, lest they meet in the same sets of the cache

LANES = TILES[host_width()][0]
WIDE = LANES * TILES[host_width()][2]  # channels of a panel, at most
FUSED = host_width() > 0
ZERO = np.float32(0)

A, B = math.sqrt(0.5), math.sqrt(2)
A2, B2 = 0.5, 2.0
BY_A, BY_B = 1 / (2 * A2 * (A2 - B2)), 1 / (2 * B2 * (B2 - A2))  # over the products of differences


class _Arithmetic:
    """Sums and products of vectors."""

    def __init__(self, builder, vec):
        self.builder, self.vec = builder, vec

    def number(self, value):
        return ir.Constant(self.vec.type, [float(np.float32(value))] * self.vec.lanes)

    def add(self, x, y):
        return self.builder.fadd(x, y)

    def sub(self, x, y):
        return self.builder.fsub(x, y)

    def mul(self, factor, x):
        return self.builder.fmul(self.number(factor), x)

    def fma(self, factor, x, y):
        """factor x + y."""
        if FUSED:
            return self.vec.call(f"fma.v{self.vec.lanes}f32", self.vec.type, self.number(factor), x, y)
        return self.add(self.mul(factor, x), y)

    def pair(self, even, odd):
        return self.add(even, odd), self.sub(even, odd)


def of_inputs(m, d):
    """B^T d."""
    at_a = m.pair(m.fma(-B2, d[2], d[4]), m.mul(A, m.fma(-B2, d[1], d[3])))
    at_b = m.pair(m.fma(-A2, d[2], d[4]), m.mul(B, m.fma(-A2, d[1], d[3])))
    zero, infinity = (m.fma(-(A2 + B2), d[2 + i], m.add(d[i], d[4 + i])) for i in range(2))
    return [zero, *at_a, *at_b, infinity]


def of_outputs(m, v):
    """A^T v."""
    (even_a, odd_a), (even_b, odd_b) = m.pair(v[1], v[2]), m.pair(v[3], v[4])
    return [
        m.add(v[0], m.add(even_a, even_b)),
        m.fma(A, odd_a, m.mul(B, odd_b)),
        m.fma(A2, even_a, m.mul(B2, even_b)),
        m.fma(A * A2, odd_a, m.fma(B * B2, odd_b, v[5])),
    ]


def to_outputs(m, y):
    """A y, the transpose of `of_outputs`."""
    at_a = m.pair(m.fma(A2, y[2], y[0]), m.fma(A * A2, y[3], m.mul(A, y[1])))
    at_b = m.pair(m.fma(B2, y[2], y[0]), m.fma(B * B2, y[3], m.mul(B, y[1])))
    return [y[0], *at_a, *at_b, y[3]]


def of_taps(m, g):
    """G g."""
    at_a = m.pair(m.fma(BY_A * A2, g[2], m.mul(BY_A, g[0])), m.mul(BY_A * A, g[1]))
    at_b = m.pair(m.fma(BY_B * B2, g[2], m.mul(BY_B, g[0])), m.mul(BY_B * B, g[1]))
    return [g[0], *at_a, *at_b, g[2]]


def to_taps(m, u):
    """G^T u, the transpose of `of_taps`."""
    (even_a, odd_a), (even_b, odd_b) = m.pair(u[1], u[2]), m.pair(u[3], u[4])
    return [
        m.fma(BY_A, even_a, m.fma(BY_B, even_b, u[0])),
        m.fma(BY_A * A, odd_a, m.mul(BY_B * B, odd_b)),
        m.fma(BY_A * A2, even_a, m.fma(BY_B * B2, even_b, u[5])),
    ]


def transform_of(of_row, size, addends=0, lines=None):
    """Make an intrinsic for both directions of a square of `size` values, in a vector of channels.

    With one line it is for this alone, and the distances of rows are of no use.

    ``transform(x, at, row, column, used, out, to, out_row, out_column)``: value (i, j) of the input is at
    ``x[at + i row + j column]``, of the output likewise; `used` lanes are read and written. With addends, arrays and
    offsets follow: one value for all of the output, and one laid out like the output, which may be the output.
    """

    def emit(context, builder, signature, args, masked):
        def start(position):
            data = make_array(signature.args[position])(context, builder, args[position]).data
            return builder.gep(data, [args[position + 1]])

        vec = Rows(builder, LANES, masked, args[4])
        arithmetic = _Arithmetic(builder, vec)

        def places(origin, row, column, rows, columns):
            for i in range(rows):
                begin = builder.gep(origin, [builder.mul(ir.Constant(I64, i), row)])
                yield [builder.gep(begin, [builder.mul(ir.Constant(I64, j), column)]) for j in range(columns)]

        rows = [
            of_row(arithmetic, [vec.load(place, 0) for place in line])
            for line in places(start(0), args[2], args[3], lines or size, size)
        ]
        columns = [
            of_row(arithmetic, [row[j] for row in rows]) if lines is None else [rows[0][j]] for j in range(len(rows[0]))
        ]
        shape = len(columns[0]), len(columns)
        targets = places(start(5), args[7], args[8], *shape)
        others = places(start(11), args[7], args[8], *shape) if addends > 1 else None
        base = vec.load(start(9), 0) if addends else None
        for i, line in enumerate(targets):
            other = next(others) if others else None
            for j, place in enumerate(line):
                value = columns[j][i]
                if addends:
                    value = builder.fadd(builder.fadd(base, vec.load(other[j], 0)) if other else base, value)
                vec.store(value, place, 0)

    def make(typing, *kinds):
        def codegen(context, builder, signature, args):
            with builder.if_else(builder.icmp_signed("<", args[4], ir.Constant(I64, LANES))) as (part, whole):
                with part:
                    emit(context, builder, signature, args, 0)
                with whole:
                    emit(context, builder, signature, args, None)
            return context.get_dummy_value()

        return types.void(*kinds), codegen

    if addends == 0:

        @intrinsic
        def transform(typingctx, x, at, row, column, used, out, to, out_row, out_column):
            i = types.int64
            return make(typingctx, x, i, i, i, i, out, i, i, i)

    elif addends == 1:

        @intrinsic
        def transform(typingctx, x, at, row, column, used, out, to, out_row, out_column, base, base_at):
            i = types.int64
            return make(typingctx, x, i, i, i, i, out, i, i, i, base, i)

    else:

        @intrinsic
        def transform(
            typingctx, x, at, row, column, used, out, to, out_row, out_column, base, base_at, other, other_at
        ):
            i = types.int64
            return make(typingctx, x, i, i, i, i, out, i, i, i, base, i, other, i)

    return transform


inputs_tile = transform_of(of_inputs, SEEN)
outputs_tile = transform_of(of_outputs, SEEN)
outputs_and_base, outputs_base_other = (transform_of(of_outputs, SEEN, addends) for addends in (1, 2))
gradients_tile = transform_of(to_outputs, TILE)
taps_tile = transform_of(of_taps, 3)
weights_tile, more_weights_tile = (transform_of(to_taps, SEEN, addends) for addends in (0, 2))


@kernel
def _strip(x, n, row, rows, column, columns, height, width, c, strip):
    """strip (rows, columns, c) = what image n shows from `row` and `column` on, with zeros around it."""
    for i in range(rows):
        line = strip[i * columns * c : (i + 1) * columns * c]
        at = row + i
        if at < 0 or at >= height:
            line[:] = ZERO
            continue
        before, inside = -column, min(width, columns + column)
        line[: before * c] = ZERO
        source, target = x[(n * height + at) * width * c :], line[before * c : (before + inside) * c]
        for j in range(len(target)):
            target[j] = source[j]
        line[(before + inside) * c :] = ZERO


@register_jitable
def panel_start(panel, first, c):
    """Where the planes (c, width) of a panel begin in U: `first` is its first output channel; or the size of U."""
    return PLACES * (c * first + panel * APART)


@register_jitable
def planes(tiles, channels):
    """Values of all places of so many tiles: a plane (tiles, channels) for each."""
    return PLACES * (tiles * channels + APART)


@register_jitable
def seen(across):
    """Columns that a row of so many tiles sees."""
    return TILE * across + SEEN - TILE


@kernel
def taps_range(start, stop, w, c, k, u):
    """U for input channels start ... stop - 1 of w (3, 3, c, k): panel by panel, (36, c, width)."""
    panels = panels_of(k)
    for panel in range(panels):
        at, n = panel_of(panel, panels, k)
        base, plane = panel_start(panel, at, c), c * n + APART
        for i in range(start, stop):
            for j in range(0, n, LANES):
                used = min(LANES, n - j)
                taps_tile(w, i * k + at + j, 3 * c * k, c * k, used, u, base + i * n + j, SEEN * plane, plane)


@kernel
def _inputs_row(x, n, row, height, width, c, strip, v, at, plane):
    """V of tile row `row` of image n, at `at` of every plane."""
    across = (width + TILE - 1) // TILE
    columns = seen(across)
    _strip(x, n, TILE * row - 1, SEEN, -1, columns, height, width, c, strip)
    for tile in range(across):
        for j in range(0, c, LANES):
            inputs_tile(
                strip, TILE * tile * c + j, columns * c, c, min(LANES, c - j), v, at + tile * c + j, SEEN * plane, plane
            )


@kernel
def conv_range(
    start, stop, rows, shares, sizes, x, u, y, begin, bias, shift, residual, strip, v, m, base, tile,
):  # fmt: skip
    """Items start ... stop - 1 of a convolution: `rows` rows of tiles, and every `shares`-th panel of channels.

    `sizes` are images, height, width, input channels, output channels. With `begin`, y becomes bias + shift + residual
    + the convolution (an empty one of the three is 0); else that is added to what y holds. `base` takes a row of
    channels of a panel, `tile` a tile of these.
    """
    images, height, width, c, k = sizes
    down, across = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    panels = panels_of(k)
    added = residual if begin else y
    for item in range(start, stop):
        first = (item // shares) * rows
        last = min(first + rows, images * down)
        tiles = (last - first) * across
        plane = tiles * c + APART
        for row in range(first, last):
            n, ty = row // down, row % down
            _inputs_row(x, n, ty, height, width, c, strip, v, (row - first) * across * c, plane)
        for panel in range(item % shares, panels, shares):
            at, wide = panel_of(panel, panels, k)
            out_plane, u_plane = tiles * wide + APART, c * wide + APART
            start_u = panel_start(panel, at, c)
            for place in range(PLACES):
                gemm(
                    m, place * out_plane, wide, v, place * plane, c, 1, u, start_u + place * u_plane, wide,
                    tiles, wide, c, False,
                )  # fmt: skip
            for row in range(first, last):
                n, ty = row // down, row % down
                for j in range(wide):
                    base[j] = bias[at + j] if len(bias) > 0 else ZERO
                if len(shift) > 0:
                    for j in range(wide):
                        base[j] += shift[n * k + at + j]
                for tx in range(across):
                    source = ((row - first) * across + tx) * wide
                    to = ((n * height + TILE * ty) * width + TILE * tx) * k + at
                    inside_rows, inside = min(TILE, height - TILE * ty), min(TILE, width - TILE * tx)
                    whole = inside_rows == TILE and inside == TILE
                    for j in range(0, wide, LANES):
                        used = min(LANES, wide - j)
                        if not whole:
                            outputs_and_base(m, source + j, SEEN * out_plane, out_plane, used, tile, j, TILE * wide,
                                             wide, base, j)  # fmt: skip
                        elif len(added) > 0:
                            outputs_base_other(m, source + j, SEEN * out_plane, out_plane, used, y, to + j, width * k,
                                               k, base, j, added, to + j)  # fmt: skip
                        else:
                            outputs_and_base(m, source + j, SEEN * out_plane, out_plane, used, y, to + j, width * k,
                                             k, base, j)  # fmt: skip
                    if whole:
                        continue
                    for i in range(inside_rows):
                        for s in range(inside):
                            here = to + (i * width + s) * k
                            values, out = tile[(i * TILE + s) * wide :], y[here : here + wide]
                            if len(added) > 0:
                                other = added[here : here + wide]
                                for j in range(wide):
                                    out[j] = values[j] + other[j]
                            else:
                                for j in range(wide):
                                    out[j] = values[j]


@kernel
def gradient_tiles_range(start, stop, first, tiles, sizes, x, dy, strip, v, d):
    """Rows of tiles first + start ... first + stop - 1 of x and of dy, for a gradient of `tiles` tiles at once."""
    _, height, width, c, k = sizes
    down, across = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    x_plane, dy_plane = tiles * c + APART, tiles * k + APART
    for item in range(start, stop):
        row = first + item
        n, ty = row // down, row % down
        _inputs_row(x, n, ty, height, width, c, strip, v, item * across * c, x_plane)
        _strip(dy, n, TILE * ty, TILE, 0, TILE * across, height, width, k, strip)
        for tx in range(across):
            for j in range(0, k, LANES):
                gradients_tile(
                    strip, TILE * tx * k + j, TILE * across * k, k, min(LANES, k - j),
                    d, (item * across + tx) * k + j, SEEN * dy_plane, dy_plane,
                )  # fmt: skip


@kernel
def gradient_sums_range(start, stop, tiles, c, k, v, d, du, accumulate):
    """Items start ... stop - 1 of the sums over tiles: a place and a panel of channels each."""
    panels = panels_of(k)
    for item in range(start, stop):
        place = item // panels
        panel = item % panels
        at, wide = panel_of(panel, panels, k)
        gemm(
            du, panel_start(panel, at, c) + place * (c * wide + APART), wide, v, place * (tiles * c + APART), 1, c,
            d, place * (tiles * k + APART) + at, k, c, wide, tiles, accumulate,
        )  # fmt: skip


@kernel
def gradient_range(start, stop, group_rows, rows, sizes, x, dy, strip, v, d, sums, size):
    """Groups start ... stop - 1 of `group_rows` rows of tiles: the sums of each, `rows` rows at a time, in `sums`."""
    images, height, width, c, k = sizes
    down, across = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    for group in range(start, stop):
        own = sums[group * size : (group + 1) * size]
        first, last = group * group_rows, min((group + 1) * group_rows, images * down)
        for row in range(first, last, rows):
            count = min(rows, last - row)
            tiles = count * across
            gradient_tiles_range(0, count, row, tiles, sizes, x, dy, strip, v, d)
            gradient_sums_range(0, PLACES * panels_of(k), tiles, c, k, v, d, own, row > first)


@kernel
def gradient_taps_range(start, stop, du, groups, size, c, k, zeros, dw):
    """dw (3, 3, c, k) for input channels start ... stop - 1: that of all groups' sums, added in their order."""
    panels = panels_of(k)
    for panel in range(panels):
        at, n = panel_of(panel, panels, k)
        base, plane = panel_start(panel, at, c), c * n + APART
        for i in range(start, stop):
            for j in range(0, n, LANES):
                used, to = min(LANES, n - j), i * k + at + j
                source = base + i * n + j
                weights_tile(du, source, SEEN * plane, plane, used, dw, to, 3 * c * k, c * k)
                for group in range(1, groups):
                    more_weights_tile(du, group * size + source, SEEN * plane, plane, used, dw, to, 3 * c * k, c * k,
                                      zeros, 0, dw, to)  # fmt: skip
