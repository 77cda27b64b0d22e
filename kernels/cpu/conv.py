"""Convolutions without an im2col buffer: matrix products straight on the pixels.

In NHWC memory the taps of one kernel row lie side by side, so with the pixels of an output row as rows of a matrix A,
distance (stride * C), a convolution is one product for each kernel row, of inner length columns * C; `gemm_nested` adds
them up in registers. No zeros are stored around an image: pixels with the same taps inside it are a *part*, a
rectangle of output pixels with its piece of the weights, and a tap outside costs nothing.

Parts are rows of an int64 table (columns ROWS ... TAP). The order of additions of an output element is that of its
taps and channels, whatever the parts, tiles and images that are computed together.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from fastdiff.kernels.cpu.gemm import TILES, host_width
from fastdiff.kernels.cpu.gemm_nested import gemm_nested
from fastdiff.kernels.cpu.jit import kernel
from fastdiff.kernels.cpu.transpose import transpose_part

# Columns of the table of parts: rows and columns of output pixels; their distances and the first one's offset in the
# output, the same in the input for the first tap; the distance of kernel rows in the input; how many kernel rows;
# columns times channels of a kernel row; offset and distance of kernel rows in the weights; the first kernel row.
(
    ROWS, COLUMNS, OUT, OUT_ROW, OUT_COLUMN, IN, IN_ROW, IN_COLUMN, IN_TAP, TAPS, LENGTH, WEIGHT, WEIGHT_TAP, TAP,
) = range(14)  # fmt: skip
PART_COLUMNS = 14
FEW = 6  # rows of a tile of the matrix product
LEAST_SUM = 16  # pixels: a sum over fewer is not worth fetching and storing what it adds to
PANEL = 80 << 10  # weights that stay in the second-level cache: with more, kernel rows take turns
PATTERN = 1024  # values: rows of biases are repeated up to this length

LANES = TILES[host_width()][0]
VECTORS = TILES[host_width()][2]
ZERO = np.float32(0)


@register_jitable
def panels_of(channels: int) -> int:
    """Number of panels of output channels, each at most a tile wide."""
    return -(-channels // (LANES * VECTORS))


@kernel
def panel_of(panel, panels, channels):
    """First channel and width of a panel; whole vectors are shared out evenly."""
    vectors = (channels + LANES - 1) // LANES
    first = LANES * (panel * (vectors // panels) + min(panel, vectors % panels))
    width = LANES * (vectors // panels + (panel < vectors % panels))
    return first, min(width, channels - first)


@kernel
def pack_range(start, stop, values, rows, columns, packed):
    """Rows start ... stop - 1 of a matrix (rows, columns), panel by panel, (rows, width of the panel).

    Of rows that are a power of two apart few would stay in a cache.
    """
    panels = panels_of(columns)
    vectors = (columns + LANES - 1) // LANES
    each, more = vectors // panels, vectors % panels
    for r in range(start, stop):
        at = 0
        for panel in range(panels):
            n = min(LANES * (each + (panel < more)), columns - at)
            to, source = at * rows + r * n, r * columns + at
            for j in range(n):
                packed[to + j] = values[source + j]
            at += n


@kernel
def _start(y, pixels, first_pixel, image_pixels, channels, bias, shift, residual, pattern):
    """y (pixels, channels), at `first_pixel` of all images, becomes bias + shift of its image + residual."""
    repeats = max(1, min(pixels, PATTERN // channels))
    image = -1
    if len(shift) == 0:
        for p in range(repeats):
            row = pattern[p * channels : (p + 1) * channels]
            for k in range(channels):
                row[k] = bias[k]
    done = 0
    while done < pixels:
        count = min(repeats, pixels - done)
        if len(shift) > 0:
            at = (first_pixel + done) // image_pixels
            count = min(count, (at + 1) * image_pixels - first_pixel - done)
            if at != image:
                image = at
                own = shift[at * channels : (at + 1) * channels]
                for p in range(min(repeats, image_pixels)):
                    row = pattern[p * channels : (p + 1) * channels]
                    for k in range(channels):
                        row[k] = bias[k] + own[k]
        begin, length = (first_pixel + done) * channels, count * channels
        out = y[begin : begin + length]
        if len(residual) > 0:
            other = residual[begin : begin + length]
            for k in range(length):
                out[k] = pattern[k] + other[k]
        else:
            for k in range(length):
                out[k] = pattern[k]
        done += count


@kernel
def conv_range(
    start, stop, group, sizes, parts, firsts, x, w, y, begin, bias, shift, residual, pattern, packed,
):  # fmt: skip
    """Items start ... stop - 1 of a convolution: `group` images each, one block of output rows of every image.

    Where w is `packed`, it lies panel by panel, as `pack_range` has it. `sizes` are images, input pixels and channels,
    output rows, columns and channels, rows of a block. Parts of block i are firsts[i] ... firsts[i + 1] - 1. With
    `begin`, y starts from bias + shift + residual (an empty shift or residual is none, an empty bias is 0); else from
    what it holds.
    """
    images, in_pixels, c, height, width, k, block_rows = sizes
    blocks = len(firsts) - 1
    in_image, out_image = in_pixels * c, height * width * k
    panels = (k + LANES * VECTORS - 1) // (LANES * VECTORS)
    for item in range(start, stop):
        first = (item // blocks) * group
        block = item % blocks
        count = min(group, images - first)
        if begin:
            rows = min(block_rows, height - block * block_rows)
            if len(bias) == 0:
                for n in range(first, first + count):
                    at = n * out_image + block * block_rows * width * k
                    y[at : at + rows * width * k] = ZERO
            elif rows == height:
                _start(y, count * height * width, first * height * width, height * width, k, bias, shift, residual,
                       pattern)  # fmt: skip
            else:
                for n in range(first, first + count):
                    pixel = (n * height + block * block_rows) * width
                    _start(y, rows * width, pixel, height * width, k, bias, shift, residual, pattern)
        for panel in range(panels):
            at, n = panel_of(panel, panels, k)
            w_first, w_row = (at * (len(w) // k), n) if packed else (at, k)
            for part in range(firsts[block], firsts[block + 1]):
                p = parts[part]
                rows, columns, deep = p[ROWS], p[COLUMNS], count
                if rows == 1 and in_image == columns * p[IN_COLUMN] and out_image == columns * p[OUT_COLUMN]:
                    columns, deep = columns * deep, 1
                # The rows of the product are the pixels along one direction, with the others around it.
                m, a_m, c_m = columns, p[IN_COLUMN], p[OUT_COLUMN]
                n1, a_1, c_1 = rows, p[IN_ROW], p[OUT_ROW]
                n2, a_2, c_2 = deep, in_image, out_image
                if m < FEW and n1 > m and n1 >= n2:
                    m, a_m, c_m, n1, a_1, c_1 = n1, a_1, c_1, m, a_m, c_m
                elif m < FEW and n2 > m:
                    m, a_m, c_m, n2, a_2, c_2 = n2, a_2, c_2, m, a_m, c_m
                a_off, c_off = first * in_image + p[IN], first * out_image + p[OUT] + at
                together = max(1, PANEL // (p[LENGTH] * LANES * VECTORS))
                for tap in range(0, p[TAPS], together):
                    taps, to = min(together, p[TAPS] - tap), w_first + (p[WEIGHT] + tap * p[WEIGHT_TAP]) // k * w_row
                    for i in range(n2):
                        for j in range(n1):
                            gemm_nested(
                                y, c_off + i * c_2 + j * c_1, c_m,
                                x, a_off + i * a_2 + j * a_1 + tap * p[IN_TAP], a_m, 1, p[IN_TAP],
                                w, to, w_row, p[WEIGHT_TAP] // k * w_row, m, n, p[LENGTH], taps,
                            )  # fmt: skip


@kernel
def conv_weights_range(start, stop, group, slots, sizes, parts, firsts, x, dy, sums, size, packed):
    """Items start ... stop - 1 of the weights' gradient: a group of images, a panel of channels, a slot of kernel rows.

    Where dy is `packed`, it lies panel by panel, as `pack_range` has it.

    `sums` (groups, weights) takes for each group the sum over its pixels, image by image and part by part. A kernel
    row belongs to the slot that is its remainder by `slots`: another split of the work and no other order of sums.
    """
    images, in_pixels, c, height, width, k, _ = sizes
    blocks = len(firsts) - 1
    in_image, out_image = in_pixels * c, height * width * k
    panels = (k + LANES * VECTORS - 1) // (LANES * VECTORS)
    for item in range(start, stop):
        slot = item % slots
        at, n = panel_of((item // slots) % panels, panels, k)
        first = (item // (slots * panels)) * group
        count = min(group, images - first)
        to = (item // (slots * panels)) * size + at
        pixels = height * width
        row, images_from = (n, (at * images + first * n) * pixels) if packed else (k, first * out_image + at)
        for block in range(blocks):
            for part in range(firsts[block], firsts[block + 1]):
                p = parts[part]
                rows, columns, deep = p[ROWS], p[COLUMNS], count
                if rows == 1 and in_image == columns * p[IN_COLUMN] and out_image == columns * p[OUT_COLUMN]:
                    columns, deep = columns * deep, 1
                inner, a_k, b_k = columns, p[IN_COLUMN], p[OUT_COLUMN]
                outer, a_u, b_u = rows, p[IN_ROW], p[OUT_ROW]
                around, a_n, b_n = deep, in_image, out_image
                if inner < outer:
                    inner, a_k, b_k, outer, a_u, b_u = outer, a_u, b_u, inner, a_k, b_k
                if inner * outer < LEAST_SUM and around > outer:
                    around, a_n, b_n, outer, a_u, b_u = outer, a_u, b_u, around, a_n, b_n
                a_off, b_off = first * in_image + p[IN], images_from + p[OUT] // k * row
                b_n, b_k, b_u = b_n // k * row, b_k // k * row, b_u // k * row
                for i in range(around):
                    for tap in range(p[TAPS]):
                        if (p[TAP] + tap) % slots == slot:
                            gemm_nested(
                                sums, to + p[WEIGHT] + tap * p[WEIGHT_TAP], k,
                                x, a_off + i * a_n + tap * p[IN_TAP], 1, a_k, a_u,
                                dy, b_off + i * b_n, b_k, b_u, p[LENGTH], n, inner, outer,
                            )  # fmt: skip


@kernel
def clear(start, stop, values):
    """Values start ... stop - 1 become 0."""
    values[start:stop] = ZERO


@kernel
def spread_weights(start, stop, taps, w, out, c, k, transpose, packed):
    """Blocks start ... stop - 1 (c, k) of `out`, or (k, c) with `transpose`: sums of the blocks of w that `taps` lists.

    A row of `taps` is (block of out, block of w or -1 for zeros, whether it is added). `packed`: as of `pack_range`.
    """
    size = c * k
    rows, columns = (k, c) if transpose else (c, k)
    panels = panels_of(columns) if packed else 1
    total = len(out) // columns
    for t in range(len(taps)):
        if taps[t, 0] < start or taps[t, 0] >= stop:
            continue
        first, source, add = taps[t, 0] * rows, taps[t, 1] * size, taps[t, 2] != 0
        for panel in range(panels):
            at, n = panel_of(panel, panels, columns) if packed else (0, columns)
            to = at * total + first * n
            if taps[t, 1] < 0:
                out[to : to + rows * n] = ZERO
            elif transpose:
                transpose_part(w, source + at * k, k, out, to, n, n, k, add)
            else:
                for i in range(rows):
                    here, there = source + i * columns + at, to + i * n
                    for j in range(n):
                        old = out[there + j] if add else ZERO
                        out[there + j] = w[here + j] + old


@kernel
def collect_weights(start, stop, taps, sums, groups, dw, block):
    """Blocks start ... stop - 1 of dw: sums over the groups, and over the blocks of `sums` that `taps` lists.

    A row of `taps` is (block of sums, block of dw); rows of one block of dw are added in their order.
    """
    size = len(sums) // groups
    for b in range(start, stop):
        target = dw[b * block : (b + 1) * block]
        fresh = True
        for t in range(len(taps)):
            if taps[t, 1] != b:
                continue
            for g in range(groups):
                at = g * size + taps[t, 0] * block
                source = sums[at : at + block]
                if fresh:
                    for i in range(block):
                        target[i] = source[i]
                else:
                    for i in range(block):
                        target[i] += source[i]
                fresh = False
        if fresh:
            target[:] = ZERO


@kernel
def pixel_sums_range(start, stop, values, pixels, channels, sums, wide):
    """sums[n] (channels,) = the sum over the pixels of image n of `values` (n, pixels, channels).

    Pixel i is added to sum i % repeats, in order, and the repeats are added in order.
    """
    repeats = max(1, min(pixels, PATTERN // channels))
    length = repeats * channels
    lanes = wide[:length]
    for n in range(start, stop):
        image = values[n * pixels * channels : (n + 1) * pixels * channels]
        lanes[:] = ZERO
        for at in range(0, pixels * channels, length):
            row = image[at : min(at + length, pixels * channels)]
            for i in range(len(row)):
                lanes[i] += row[i]
        out = sums[n * channels : (n + 1) * channels]
        out[:] = ZERO
        for p in range(repeats):
            row = lanes[p * channels : (p + 1) * channels]
            for i in range(channels):
                out[i] += row[i]


@kernel
def row_sums(start, stop, rows, channels, out):
    """out[start ... stop - 1] = the sums of these channels over the rows (n, channels), flat, in order."""
    total = out[start:stop]
    total[:] = ZERO
    for n in range(len(rows) // channels):
        row = rows[n * channels + start : n * channels + stop]
        for i in range(stop - start):
            total[i] += row[i]
