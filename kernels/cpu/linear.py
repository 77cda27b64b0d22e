"""Linear layers and 1x1 convolutions: matrix products in blocks of pixels, input channels and output channels.

A block of the weights is copied, or turned, to where its rows lie close together and in different sets of a cache; it
stays in the nearest one while all rows of pixels pass. Every sum has the order of its channels, or of its pixels,
whatever the blocks.
"""

from __future__ import annotations

from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import kernel
from fastdiff.kernels.cpu.transpose import transpose_part

MOST, PIXELS = 128, 512  # channels of a block on a side that is written; its pixels
DEEP = 512  # channels, or pixels, that are summed before the sums are stored
ROW = MOST + 16  # values from a row of a copied block to the next one
TURNED = DEEP + 16  # the same of a turned block
SIZE = DEEP * ROW
FEW = 8  # pixels, for which weights are read where they are


@kernel
def _copied(values, at, distance, rows, columns, to):
    """The matrix `to` (rows, columns) from one whose rows are `distance` apart."""
    for i in range(rows):
        source, target = values[at + i * distance :][:columns], to[i * ROW :][:columns]
        for j in range(columns):
            target[j] = source[j]


@kernel
def _start(y, first, count, of_image, at, n, k, bias, shift, residual, base):
    """Channels at ... at + n - 1 of y (pixels, k) become bias + shift of the image + residual, for `count` pixels."""
    image = -1
    for p in range(first, first + count):
        if p // of_image != image:
            image = p // of_image
            for j in range(n):
                base[j] = bias[at + j]
            if len(shift) > 0:
                own = shift[image * k + at :][:n]
                for j in range(n):
                    base[j] += own[j]
        out = y[p * k + at :][:n]
        if len(residual) > 0:
            other = residual[p * k + at :][:n]
            for j in range(n):
                out[j] = base[j] + other[j]
        else:
            for j in range(n):
                out[j] = base[j]


@kernel
def linear_range(start, stop, pixels, wide, sizes, x, w, adjoint, y, begin, bias, shift, residual, u, base):
    """Items start ... stop - 1 of y (pixels, k): `pixels` pixels and `wide` output channels each.

    `sizes` are images, height, width, input channels, output channels. With `begin`, y becomes bias + shift +
    residual + x w (an empty one of the three is 0); else that is added to what y holds. w is (c, k), or with `adjoint`
    the transpose of that.
    """
    images, height, width, c, k = sizes
    of_image = height * width
    shares = (k + wide - 1) // wide
    for item in range(start, stop):
        first, at = (item // shares) * pixels, (item % shares) * wide
        count, n = min(pixels, images * of_image - first), min(wide, k - at)
        started = not begin
        if begin and len(bias) > 0:
            _start(y, first, count, of_image, at, n, k, bias, shift, residual, base)
            started = True
        for deep in range(0, c, DEEP):
            channels = min(DEEP, c - deep)
            add = started or deep > 0
            if not adjoint and count <= FEW:
                gemm(y, first * k + at, k, x, first * c + deep, c, 1, w, deep * k + at, k, count, n, channels, add)
                continue
            if adjoint:
                transpose_part(w, at * c + deep, c, u, 0, ROW, n, channels, False)
            else:
                _copied(w, deep * k + at, k, channels, n, u)
            gemm(y, first * k + at, k, x, first * c + deep, c, 1, u, 0, ROW, count, n, channels, add)


@kernel
def linear_weights_range(start, stop, group, deep, wide, sizes, x, dy, v, d, sums):
    """Items start ... stop - 1 of the weights' gradient: `deep` input and `wide` output channels of a group each.

    `sums` (groups, c, k) takes for each group the sum over the pixels of its `group` images, in their order.
    """
    images, height, width, c, k = sizes
    of_image = height * width
    parts, shares = (c + deep - 1) // deep, (k + wide - 1) // wide
    for item in range(start, stop):
        part, share, number = item % parts, (item // parts) % shares, item // (parts * shares)
        begin, end = number * group * of_image, min((number + 1) * group, images) * of_image
        above, to = part * deep, (number * c + part * deep) * k
        channels = min(deep, c - above)
        for first in range(begin, end, DEEP):
            count = min(DEEP, end - first)
            transpose_part(x, first * c + above, c, v, 0, TURNED, count, channels, False)
            for at in range(share * wide, min((share + 1) * wide, k), MOST):
                n = min(MOST, min((share + 1) * wide, k) - at)
                _copied(dy, first * k + at, k, count, n, d)
                gemm(sums, to + at, k, v, 0, TURNED, 1, d, 0, ROW, channels, n, count, first > begin)
