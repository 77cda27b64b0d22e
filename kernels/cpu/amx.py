"""Convolutions of bf16 values by the matrix unit of a CPU: sums of products in float32, 32 x 32 at once.

**A grid.** All pixels of a batch, rounded to bf16, lie one after another as *cells*, the channels of each filled up
with zeros to whole tiles, with cells of zeros after every row and rows of zeros after every image, as many as taps
reach beyond an edge. The next row's left edge is the last one's right edge, so few are needed. A tap is a distance
between cells then, and a convolution a sum over taps of products of one and the same matrix, read from another cell
on; what comes of the cells of zeros is thrown away. With a stride each of its phases has a grid of its own.

**The bits.** An output is the sum over taps, and over the channels of each, in order, in pairs; that of a weight over
the cells, in order. So they depend on neither batch nor threads, nor on how work is cut.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from fastdiff.kernels.cpu.jit import kernel, part
from fastdiff.kernels.cpu.tiles import (
    DEEP,
    ROW_BYTES,
    SIDE,
    TILE_BYTES,
    clear_0,
    clear_1,
    clear_2,
    clear_3,
    load_0,
    load_1,
    load_2,
    load_3,
    load_left,
    load_lower,
    load_right,
    load_upper,
    lower_left,
    lower_right,
    store_0,
    store_1,
    store_2,
    store_3,
    tiles_begin,
    tiles_end,
    upper_left,
    upper_right,
)  # fmt: skip
from fastdiff.kernels.cpu.transpose import transpose_part, turned

HALF_SIDE = SIDE // 2
BLOCK = 2 * SIDE  # rows and columns of the sums that are held at once
TILE = SIDE * DEEP  # bf16 values of a tile
CHUNK = 64  # cells that a thread turns at once
CELLS = 2048  # cells that all taps of a weight gradient read before the next ones: they stay in the cache
ZERO = np.float32(0)

# Of a pair of phases: first output row and column, steps, how many, its first tap and the one after its last.
FIRST_ROW, STEP_ROW, ROWS, FIRST_COLUMN, STEP_COLUMN, COLUMNS, FIRST_TAP, END_TAP = range(8)
AT, WEIGHT = range(2)  # of a tap: the cell, of all grids, that cell 0 sees through it; its block of weights

I16, I32, I64, F32 = *map(ir.IntType, (16, 32, 64)), ir.FloatType()
LANES, FLOAT, HALF = 16, 4, 2  # of a vector; bytes of a float32 and of a bf16


class _Lanes:
    """Vectors of 16 values at addresses, of which the first `used` lanes, or all, are read and written."""

    def __init__(self, builder, used=None):
        self.builder, index, self.mask = builder, ir.VectorType(I64, LANES), None
        if used is None:
            return
        first = builder.insert_element(ir.Constant(index, ir.Undefined), used, ir.Constant(I32, 0))
        every = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))
        self.mask = builder.icmp_signed("<", ir.Constant(index, list(range(LANES))), every)

    def _call(self, name, result, *args):
        function = ir.FunctionType(result, [each.type for each in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), args)

    def _place(self, address, element):
        return self.builder.inttoptr(address, ir.VectorType(element, LANES).as_pointer())

    def load(self, address):
        place, size = self._place(address, F32), ir.Constant(I32, 4)
        if self.mask is None:
            return self.builder.load(place, align=4)
        zero = ir.Constant(ir.VectorType(F32, LANES), [0.0] * LANES)
        return self._call(f"llvm.masked.load.v{LANES}f32.p0", zero.type, place, size, self.mask, zero)

    def store(self, value, address):
        name, size = {F32: "f32", I16: "i16"}[value.type.element], ir.Constant(I32, 2)
        place = self._place(address, value.type.element)
        if self.mask is None:
            return self.builder.store(value, place, align=2)
        return self._call(f"llvm.masked.store.v{LANES}{name}.p0", ir.VoidType(), value, place, size, self.mask)

    def number(self, value):
        return ir.Constant(ir.VectorType(I32, LANES), [value] * LANES)

    def rounded(self, value):
        """The bits of values in bf16, to nearest even; of what is no number those of one that is none."""
        builder, sixteen = self.builder, self.number(16)
        bits = builder.bitcast(value, sixteen.type)
        odd = builder.and_(builder.lshr(bits, sixteen), self.number(1))
        near = builder.lshr(builder.add(bits, builder.add(odd, self.number(0x7FFF))), sixteen)
        return builder.select(builder.fcmp_ordered("==", value, value), near, self.number(0x7FC0))


def _for_lanes(builder, used, body):
    """Emit `body` for whole vectors and for others."""
    with builder.if_else(builder.icmp_signed(">=", used, I64(LANES))) as (whole, some):
        with whole:
            body(_Lanes(builder))
        with some:
            body(_Lanes(builder, used))


@intrinsic
def _round(typingctx, to, source, used):
    """At most 16 values from an address on, rounded to bf16 at another."""

    def emit(context, builder, signature, args):
        to, source, used = args

        def body(lanes):
            lanes.store(builder.trunc(lanes.rounded(lanes.load(source)), ir.VectorType(I16, LANES)), to)

        _for_lanes(builder, used, body)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i), emit


@intrinsic
def _pair(typingctx, to, even, odd, used_even, used_odd):
    """Of two rows of at most 16 values pairs in bf16, 16 of them: what is not used is 0."""

    def emit(context, builder, signature, args):
        low, high = (_Lanes(builder, args[3 + e]) for e in range(2))
        first, second = low.rounded(low.load(args[1])), high.rounded(high.load(args[2]))
        both = builder.or_(first, builder.shl(second, low.number(16)))
        builder.store(both, builder.inttoptr(args[0], both.type.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i), emit


@intrinsic
def _turn(typingctx, to, distance, places, offset, used):
    """Of 16 rows at addresses (of none at 0) at most 16 values from an offset on, in bf16, one place after another."""

    def emit(context, builder, signature, args):
        to, distance, places, offset, used = args
        rows = []
        for e in range(SIDE):
            place = builder.load(builder.inttoptr(builder.add(places, I64(8 * e)), I64.as_pointer()))
            there = builder.icmp_signed("!=", place, I64(0))
            lanes = _Lanes(builder, builder.select(there, used, I64(0)))
            rows.append(lanes.rounded(lanes.load(builder.add(place, offset))))
        pairs = [builder.or_(rows[e], builder.shl(rows[e + 1], lanes.number(16))) for e in range(0, SIDE, 2)]
        for first in (0, HALF_SIDE):
            picked = ir.Constant(ir.VectorType(I32, HALF_SIDE), [first + j for j in range(HALF_SIDE)])
            square = turned(builder, [builder.shuffle_vector(pair, pair, picked) for pair in pairs])
            for j, row in enumerate(square):
                place = builder.add(to, builder.mul(distance, I64(first + j)))
                builder.store(row, builder.inttoptr(place, row.type.as_pointer()), align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i, i), emit


def _sum_of(count):
    """Make an intrinsic that writes the sums of so many rows of at most 16 values."""

    def emit(context, builder, signature, args):
        def body(lanes):
            values = [lanes.load(address) for address in args[2:]]
            total = values[-1]
            for value in reversed(values[:-1]):
                total = builder.fadd(value, total)
            lanes.store(total, args[0])

        _for_lanes(builder, args[1], body)
        return context.get_dummy_value()

    i = types.int64
    if count == 2:

        @intrinsic
        def add(typingctx, to, used, first, second):
            return types.void(i, i, i, i), emit

    else:

        @intrinsic
        def add(typingctx, to, used, first, second, third):
            return types.void(i, i, i, i, i), emit

    return add


_add_two, _add_three = _sum_of(2), _sum_of(3)


@kernel
def grid_range(start, stop, grid, x, cells):
    """Rows start ... stop - 1 of all images' cells, of x (images, height, width, channels); the last one is the edge.

    That is all cells before the first image and after the last one, of zeros. `grid` has images, height, width,
    channels, those of a cell, rows and columns of an image's cells, the strides, cells before the first, and in all.
    """
    images, height, width, channels, wide, rows, columns, down, across, head, total = grid
    x_at, cells_at = x.ctypes.data, cells.ctypes.data
    for item in range(start, stop):
        if item == images * rows:
            for g in range(down * across):
                cells[g * total * wide : (g * total + head) * wide] = 0
                cells[(g * total + head + images * rows * columns) * wide : (g + 1) * total * wide] = 0
            continue
        n, row = item // rows, item % rows
        for g in range(down * across):
            y, first = row * down + g // across, g % across
            inside = (width - first + across - 1) // across if y < height else 0
            to = (g * total + head + item * columns) * wide
            source = ((n * height + y) * width + first) * channels
            runs, length, apart = (
                (1, inside * wide, 0) if channels == wide and across == 1 else (inside, channels, wide)
            )
            for j in range(runs):
                there = cells_at + HALF * (to + j * apart)
                here = x_at + FLOAT * (source + j * across * channels)
                for i in range(0, length, LANES):
                    _round(there + HALF * i, here + FLOAT * i, length - i)
                if channels < wide:
                    cells[to + j * wide + channels : to + (j + 1) * wide] = 0
            cells[to + inside * wide : to + columns * wide] = 0


@kernel
def weights_tiles_range(start, stop, firsts, sources, w, tiles, c, k, transpose, block):
    """Columns of 16 output channels start ... stop - 1 of the weights (taps, c, k), or (taps, k, c) with `transpose`.

    Block b of `tiles` is the sum of the taps ``sources[firsts[b] : firsts[b + 1]]``, rounded: for every column of
    tiles its blocks one after another, each tile after tile along the inputs. `block` takes one as it is.
    """
    blocks, parts = len(firsts) - 1, (c + DEEP - 1) // DEEP
    for column in range(start, stop):
        at = column * SIDE
        n = min(SIDE, k - at)
        for b in range(blocks):
            for deep in range(parts):
                row = deep * DEEP
                rows = min(DEEP, c - row)
                if n < SIDE or rows < DEEP or firsts[b] == firsts[b + 1]:
                    block[:TILE] = ZERO
                for s in range(firsts[b], firsts[b + 1]):
                    add = s > firsts[b]
                    if transpose:
                        transpose_part(w, (sources[s] * k + at) * c + row, c, block, 0, SIDE, n, rows, add)
                        continue
                    for i in range(rows):
                        values, out = w[(sources[s] * c + row + i) * k + at :][:n], block[i * SIDE :][:n]
                        if add:
                            for j in range(n):
                                out[j] += values[j]
                        else:
                            for j in range(n):
                                out[j] = values[j]
                to = tiles.ctypes.data + ((column * blocks + b) * parts + deep) * TILE_BYTES
                for i in range(SIDE):
                    even = block.ctypes.data + 2 * i * ROW_BYTES
                    _pair(to + i * ROW_BYTES, even, even + ROW_BYTES, SIDE, SIDE)


@part
def _add_products(steps, a, row_bytes, b, column_bytes, both):
    """Add the products of 32 rows at a and of one or `both` columns of tiles at b, so many tiles along each."""
    for _ in range(steps):
        load_upper(a, row_bytes)
        load_left(b, ROW_BYTES)
        upper_left()
        load_lower(a + SIDE * row_bytes, row_bytes)
        lower_left()
        if both:
            load_right(b + column_bytes, ROW_BYTES)
            upper_right()
            lower_right()
        a += ROW_BYTES
        b += TILE_BYTES


class Layer(NamedTuple):
    """A convolution: its grid, phases and taps, of how many blocks of weights, and the shape of an image of y."""

    grid: Any
    phases: Any
    taps: Any
    blocks: int
    shape: Any


class Begin(NamedTuple):
    """What y is before a convolution is added: bias + shift of the image + residual, or, unless `anew`, as it is.

    An empty one of the three is 0.
    """

    anew: bool
    bias: Any
    shift: Any
    residual: Any


@kernel
def conv_range(start, stop, cells, columns, layer, x, w, y, begin, sums, base):
    """Items start ... stop - 1 of a convolution: `cells` cells and `columns` columns of tiles each, of every phase.

    x is a grid and w has tiles, as `grid_range` and `weights_tiles_range` make them. `sums` takes a block of sums,
    `base` a row of one.
    """
    (grid, phases, taps, blocks, shape), (anew, bias, shift, residual) = layer, begin
    images, wide, grid_rows, grid_columns = grid[0], grid[4], grid[5], grid[6]
    height, width, k = shape
    all_cells, of_image = images * grid_rows * grid_columns, grid_rows * grid_columns
    parts, all_columns = wide // DEEP, (k + SIDE - 1) // SIDE
    places, shares = (all_cells + cells - 1) // cells, (all_columns + columns - 1) // columns
    added = residual if anew else y
    adding, biased, shifted = len(added) > 0, len(bias) > 0, len(shift) > 0
    x_at, w_at, y_at, added_at = x.ctypes.data, w.ctypes.data, y.ctypes.data, added.ctypes.data
    sums_at, base_at = sums.ctypes.data, base.ctypes.data
    row_bytes, column_bytes = 2 * wide, blocks * parts * TILE_BYTES
    tiles_begin()
    for item in range(start, stop):
        share, place, phase = item % shares, (item // shares) % places, phases[item // (shares * places)]
        first_row, step_row, rows = phase[FIRST_ROW], phase[STEP_ROW], phase[ROWS]
        first_column, step_column, valid = phase[FIRST_COLUMN], phase[STEP_COLUMN], phase[COLUMNS]
        first_tap, end_tap = phase[FIRST_TAP], phase[END_TAP]
        first = place * cells
        end = min(first + cells, all_cells)
        for column in range(share * columns, min((share + 1) * columns, all_columns), 2):
            at = column * SIDE
            n, both = min(BLOCK, k - at), k - at > SIDE
            image = -1
            for cell in range(first, end, BLOCK):
                clear_0()
                clear_1()
                clear_2()
                clear_3()
                for t in range(first_tap, end_tap):
                    a = x_at + (taps[t, AT] + cell) * row_bytes
                    b = w_at + column * column_bytes + taps[t, WEIGHT] * parts * TILE_BYTES
                    _add_products(parts, a, row_bytes, b, column_bytes, both)
                store_0(sums_at, 2 * ROW_BYTES)
                store_1(sums_at + ROW_BYTES, 2 * ROW_BYTES)
                store_2(sums_at + 2 * SIDE * ROW_BYTES, 2 * ROW_BYTES)
                store_3(sums_at + (2 * SIDE + 1) * ROW_BYTES, 2 * ROW_BYTES)
                own, inside = cell // of_image, cell % of_image
                row, i = inside // grid_columns, inside % grid_columns
                values, left = sums_at, min(BLOCK, end - cell)
                while left > 0:
                    run = min(left, grid_columns - i)
                    if row < rows and i < valid:
                        if own != image:
                            image = own
                            for j in range(n):
                                base[j] = bias[at + j] if biased else ZERO
                            if shifted:
                                for j in range(n):
                                    base[j] += shift[image * k + at + j]
                        to = ((own * height + first_row + row * step_row) * width + first_column + i * step_column) * k
                        there, apart, right = FLOAT * (to + at), FLOAT * step_column * k, base_at + ROW_BYTES
                        for r in range(min(run, valid - i)):
                            one = values + 2 * r * ROW_BYTES
                            if adding:
                                _add_three(y_at + there, n, one, base_at, added_at + there)
                                if both:
                                    two = there + ROW_BYTES
                                    _add_three(y_at + two, n - LANES, one + ROW_BYTES, right, added_at + two)
                            else:
                                _add_two(y_at + there, n, one, base_at)
                                if both:
                                    _add_two(y_at + there + ROW_BYTES, n - LANES, one + ROW_BYTES, right)
                            there += apart
                    left, values, i = left - run, values + 2 * run * ROW_BYTES, i + run
                    if i == grid_columns:
                        i, row = 0, row + 1
                        if row == grid_rows:
                            row, own = 0, own + 1
    tiles_end()


@register_jitable
def _start(layout, cell):
    """Image, row, column of a cell of groups of images, its place in its group, and the first image after that."""
    images, rows, columns, together, pitch = layout
    group, inside = cell // pitch, cell % pitch
    n, of_image = group * together + inside // (rows * columns), inside % (rows * columns)
    return n, of_image // columns, of_image % columns, inside, min((group + 1) * together, images)


@register_jitable
def _next(layout, n, row, i, inside, last):
    """What `_start` gives for the cell after one."""
    images, rows, columns, together, pitch = layout
    i, inside = i + 1, inside + 1
    if i == columns:
        i, row = 0, row + 1
        if row == rows:
            row, n = 0, n + 1
    if inside == pitch:
        n, row, i, inside, last = last, 0, 0, 0, min(last + together, images)
    return n, row, i, inside, last


@kernel
def turned_range(start, stop, layout, shape, phases, dy, lines, distance, places):
    """Cells 64 start ... 64 stop - 1 of dy, for every phase, channel by channel: lines (phases, wide, distance).

    `layout` says how groups of images lie in cells: images, rows and columns of cells of one, images of a group, its
    cells. `places` takes 16 addresses.
    """
    layout = layout[0], layout[1], layout[2], layout[3], layout[4]
    height, width, k = shape
    wide = (k + BLOCK - 1) // BLOCK * BLOCK
    dy_at, lines_at, places_at = dy.ctypes.data, lines.ctypes.data, places.ctypes.data
    for p in range(len(phases)):
        phase = phases[p]
        first_row, step_row, rows = phase[FIRST_ROW], phase[STEP_ROW], phase[ROWS]
        first_column, step_column, valid = phase[FIRST_COLUMN], phase[STEP_COLUMN], phase[COLUMNS]
        n, row, i, inside, last = _start(layout, start * CHUNK)
        for cell in range(start * CHUNK, stop * CHUNK, SIDE):
            for e in range(SIDE):
                to = ((n * height + first_row + row * step_row) * width + first_column + i * step_column) * k
                places[e] = dy_at + FLOAT * to if n < last and row < rows and i < valid else 0
                n, row, i, inside, last = _next(layout, n, row, i, inside, last)
            for at in range(0, wide, SIDE):
                there = lines_at + HALF * ((p * wide + at) * distance + cell)
                _turn(there, HALF * distance, places_at, FLOAT * at, k - at)


@kernel
def pairs_range(start, stop, layout, sizes, grids, x, pairs):
    """Pairs of cells start ... stop - 1 of x, for every grid: pairs (grids, 2, columns of tiles, all pairs, 16).

    The first of two copies has cells 2i and 2i + 1 as a pair, the other one 2i + 1 and 2i + 2, so that taps see whole
    pairs. `sizes` are height, width and channels of x, cells of zeros before the first, copies, and pairs in all.
    """
    cells = (layout[0] + layout[3] - 1) // layout[3] * layout[4]
    layout = layout[0], layout[1], layout[2], layout[3], layout[4]
    height, width, c, head, copies, half = sizes
    columns = (c + SIDE - 1) // SIDE
    x_at, pairs_at = x.ctypes.data, pairs.ctypes.data
    for g in range(len(grids)):
        grid = grids[g]
        first_row, step_row, rows = grid[FIRST_ROW], grid[STEP_ROW], grid[ROWS]
        first_column, step_column, valid = grid[FIRST_COLUMN], grid[STEP_COLUMN], grid[COLUMNS]
        cell = 2 * start - head
        n, row, i, inside, last = _start(layout, max(cell, 0))
        low, high = 0, 0
        for pair in range(2 * start, 2 * stop + 1):
            low, high = high, 0
            if 0 <= cell < cells:
                if n < last and row < rows and i < valid:
                    high = ((n * height + first_row + row * step_row) * width + first_column + i * step_column) * c
                    high = x_at + FLOAT * high
                n, row, i, inside, last = _next(layout, n, row, i, inside, last)
            cell += 1
            # `high` is cell `pair`, so that those of a copy are complete when it is even, or odd.
            copy = 1 - pair % 2
            number = (pair - 1) // 2 if copy == 0 else pair // 2 - 1
            if copy >= copies or number < start:
                continue
            for column in range(columns):
                used = min(SIDE, c - column * SIDE)
                to = pairs_at + (((g * copies + copy) * columns + column) * half + number) * ROW_BYTES
                at = FLOAT * column * SIDE
                _pair(to, low + at, high + at, used if low else 0, used if high else 0)


@kernel
def weights_range(start, stop, layout, phases, taps, blocks, sizes, lines, pairs, sums, held):
    """Items start ... stop - 1 of the weights' gradient: a group of images, 32 output and 32 input channels each.

    `lines` are of dy and `pairs` of x, as `turned_range` and `pairs_range` make them. A tap is the first pair that it
    sees, of all rows of pairs, and its block of weights. `sums` (groups, blocks, c, k) takes the sums over the cells of
    a group, in order; `held` takes a block of sums for every tap. `sizes` are c, k, the distance of lines and the pairs
    in all.
    """
    c, k, distance, half = sizes
    pitch, columns, parts = layout[4], (c + SIDE - 1) // SIDE, (k + BLOCK - 1) // BLOCK
    shares = (columns + 1) // 2
    lines_at, pairs_at, held_at = lines.ctypes.data, pairs.ctypes.data, held.ctypes.data
    row_bytes, column_bytes = HALF * distance, half * ROW_BYTES
    tiles_begin()
    for item in range(start, stop):
        share, part, group = item % shares, (item // shares) % parts, item // (shares * parts)
        both = 2 * share + 1 < columns
        for first in range(0, pitch, CELLS):
            steps = min(CELLS, pitch - first) // DEEP
            cell = group * pitch + first
            for p in range(len(phases)):
                first_line = lines_at + ((p * parts + part) * BLOCK * distance + cell) * HALF
                for t in range(phases[p, FIRST_TAP], phases[p, END_TAP]):
                    to = held_at + t * 4 * TILE_BYTES
                    if first == 0:
                        clear_0()
                        clear_1()
                        clear_2()
                        clear_3()
                    else:
                        load_0(to, ROW_BYTES)
                        load_1(to + TILE_BYTES, ROW_BYTES)
                        load_2(to + 2 * TILE_BYTES, ROW_BYTES)
                        load_3(to + 3 * TILE_BYTES, ROW_BYTES)
                    a, b = first_line, pairs_at + (taps[t, AT] + 2 * share * half + cell // 2) * ROW_BYTES
                    _add_products(steps, a, row_bytes, b, column_bytes, both)
                    store_0(to, ROW_BYTES)
                    store_1(to + TILE_BYTES, ROW_BYTES)
                    store_2(to + 2 * TILE_BYTES, ROW_BYTES)
                    store_3(to + 3 * TILE_BYTES, ROW_BYTES)
        for t in range(len(taps)):
            for quarter in range(4):
                row, at = part * BLOCK + quarter // 2 * SIDE, share * BLOCK + quarter % 2 * SIDE
                to = ((group * blocks + taps[t, WEIGHT]) * c + at) * k + row
                inside_rows, inside = max(0, min(SIDE, k - row)), max(0, min(SIDE, c - at))
                transpose_part(held, (4 * t + quarter) * SIDE * SIDE, SIDE, sums, to, k, inside_rows, inside, False)
    tiles_end()
