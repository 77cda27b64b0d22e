"""The parity checks of convolutions in float32: they run on any runtime."""

from __future__ import annotations

import contextlib
import itertools
from typing import NamedTuple
from unittest import mock

import numpy as np
from cuda_parity import NUMPY, both_ways, covers
from cuda_parity_layers import normals, unfilled
from tolerances import assert_close, assert_same_bits

from fastdiff.backends.cuda import conv as cuda_conv
from fastdiff.backends.layers import Conv

SAME, CURVE = Conv((3, 3), pad=(1, 1, 1, 1)), Conv((1, 3), pad=(0, 0, 1, 1))


class Case(NamedTuple):
    """A convolution of `images` images, from so many channels to so many."""

    geometry: Conv
    images: int
    height: int
    width: int
    channels: int
    outputs: int


# Every geometry; channels in fours and not, around the depths and widths of tiles; images of one pixel; phases that
# are empty, taps that meet nothing, outputs that see the padding alone.
CASES = {
    "small": [
        Case(SAME, 2, 5, 7, 3, 5),
        Case(SAME, 3, 4, 4, 20, 68),
        Case(Conv(), 3, 3, 8, 33, 9),
        Case(Conv((3, 3), (2, 2), (1, 1, 1, 1)), 2, 5, 6, 8, 4),
        Case(Conv((3, 3), (2, 2), (0, 1, 0, 1)), 2, 6, 5, 12, 40),
        Case(SAME._replace(up=(2, 2)), 2, 3, 4, 12, 36),
        Case(CURVE, 2, 1, 67, 1, 4),
        Case(CURVE._replace(stride=(1, 2)), 3, 1, 9, 4, 1),
        Case(CURVE._replace(up=(1, 2)), 1, 1, 9, 7, 8),
        Case(Conv((5, 4), (2, 3), (2, 0, 1, 3), (3, 2)), 2, 4, 5, 4, 6),
        Case(Conv((5, 4), (2, 3), (2, 0, 1, 3), (3, 2)), 2, 1, 9, 4, 1),
        Case(Conv((2, 1), (3, 2)), 2, 5, 5, 3, 8),
        Case(Conv((1, 1), (4, 4), (1, 2, 1, 2)), 2, 1, 3, 3, 5),
    ],
    "full": [
        Case(SAME, 5, 32, 32, 64, 130),
        Case(SAME, 9, 16, 16, 256, 128),
        Case(SAME, 3, 33, 31, 3, 64),
        Case(SAME, 7, 28, 28, 128, 3),
        Case(Conv(), 7, 16, 16, 256, 768),
        Case(Conv((3, 3), (2, 2), (0, 1, 0, 1)), 5, 32, 32, 64, 96),
        Case(SAME._replace(up=(2, 2)), 5, 16, 16, 96, 64),
        Case(CURVE, 65, 1, 200, 64, 128),
        Case(Conv((5, 4), (2, 3), (2, 0, 1, 3), (3, 2)), 3, 20, 33, 40, 24),
    ],
}
# Images of one pixel: `rows` tiles.
ROWS = {
    "small": [Case(Conv(), 5, 1, 1, 150, 34), Case(SAME, 3, 1, 1, 9, 8), Case(Conv(), 34, 1, 1, 3, 6)],
    "full": [Case(Conv(), 16, 1, 1, 512, 2048), Case(Conv(), 257, 1, 1, 1000, 70), Case(SAME, 67, 1, 1, 129, 128)],
}
TILES = cuda_conv.TILES


@contextlib.contextmanager
def only(*tiles, least_chunk=cuda_conv.LEAST_CHUNK):
    """Tiles that may be chosen, and the pixels that a chunk of a weight gradient has at least."""
    with mock.patch.multiple(cuda_conv, TILES=tiles, LEAST_CHUNK=least_chunk):
        yield


def wide(array):
    return None if array is None else array.astype(np.float64)


class Arrays:
    """The arrays of a case, and what the reference makes of them in float64."""

    def __init__(self, case, number):
        self.geometry, n, height, width, c, k = case
        self.add, shifted, residual = number % 2 == 0, number % 3 != 0, number % 4 != 0
        size = self.geometry.size(height, width)
        self.x, self.w, self.b = normals(1, n, height, width, c), normals(2, *self.geometry.kernel, c, k), normals(3, k)
        self.shift = normals(4, n, k) if shifted else None
        self.residual = normals(5, n, *size, k) if residual else None
        self.dy, self.out_shape = normals(6, n, *size, k), (n, *size, k)
        self.start = normals(7, *self.x.shape) if self.add else unfilled(*self.x.shape)
        self.taps = int(np.prod(self.geometry.kernel) * np.prod(self.geometry.up))

    def outputs(self):
        want = np.empty(self.out_shape)
        arrays = map(wide, (self.x, self.w, self.b))
        NUMPY.conv(self.geometry, *arrays, want, shift=wide(self.shift), residual=wide(self.residual))
        return want

    def gradients(self):
        """dx, dw, db and dshift."""
        want = [wide(self.start), *(np.empty(array.shape) for array in (self.w, self.b))]
        want.append(np.empty((len(self.x), len(self.b))))
        arrays = map(wide, (self.dy, self.x, self.w))
        NUMPY.conv_backward(self.geometry, *arrays, *want[:3], dshift=want[3], add=self.add)
        return want


def cases(size, table=CASES):
    for number, case in enumerate(table[size]):
        yield Arrays(case, number)


def outputs_agree(be, given, tiles):
    """All tiles give the same bits, aligned or not, and an image's own in any batch."""
    want, bits = given.outputs(), None
    for tile in tiles:
        with only(tile):
            arrays = unfilled(*want.shape), given.x, given.w, given.b, given.shift, given.residual
            for out, x, w, b, shift, residual in both_ways(be, *arrays):
                be.conv(given.geometry, x, w, b, out, shift=shift, residual=residual)
                got = be.to_numpy(out)
                bits = got if bits is None else bits
                assert_same_bits(got, bits)
            last = [None if array is None else array[-1:] for array in (shift, residual)]
            some = be.asarray(unfilled(*want[-1:].shape))
            be.conv(given.geometry, x[-1:], w, b, some, shift=last[0], residual=last[1])
            assert_same_bits(be.to_numpy(some), bits[-1:])
    assert_close(bits, want, terms=given.taps * given.x.shape[3] + 3)


FORWARD = [f"conv_{tile.name}" for tile in TILES]
ADJOINT = [f"conv_input_{tile.name}" for tile in TILES]
WEIGHTS = [f"conv_weights_{tile.name}" for tile in TILES]


@covers("conv", *FORWARD, "conv_fold")
def convolutions(be, size):
    for given in cases(size):
        outputs_agree(be, given, TILES)


@covers("conv", "conv_rows")
def convolutions_of_rows(be, size):
    for given in cases(size, ROWS):
        outputs_agree(be, given, TILES[:1])


@covers("conv", "conv_rows_many", "conv_input_rows_many")
def many_layers_of_rows(be, size):
    """More of them than a launch takes, with the bits of each alone; their input gradients are added up."""
    n, channels = (5, 9) if size == "small" else (256, 128)
    widths = [4, 9, 33] * 9
    x, start = normals(1, n, 1, 1, channels), normals(2, n, 1, 1, channels)
    ws = [normals(10 + i, 1, 1, channels, width) for i, width in enumerate(widths)]
    bs = [normals(50 + i, width) for i, width in enumerate(widths)]
    dys = [normals(90 + i, n, 1, 1, width) for i, width in enumerate(widths)]
    there = be.asarray(x)
    layers = [
        (be.asarray(w), be.asarray(b), be.asarray(unfilled(n, 1, 1, len(b)))) for w, b in zip(ws, bs, strict=True)
    ]
    be.linears(there, layers)
    for w, b, out in layers:
        alone = be.asarray(unfilled(*out.shape))
        be.conv(Conv(), there, w, b, alone)
        assert_same_bits(be.to_numpy(out), be.to_numpy(alone))
        want = wide(x).reshape(n, -1) @ wide(be.to_numpy(w))[0, 0] + wide(be.to_numpy(b))
        assert_close(be.to_numpy(out).reshape(n, -1), want, terms=channels + 1)
    for add in (False, True):
        dx = be.asarray(start.copy() if add else unfilled(*start.shape))
        be.linears_backward(dx, [(be.asarray(dy), w) for dy, (w, *_) in zip(dys, layers, strict=True)], add=add)
        want = wide(start).reshape(n, -1) * add
        for dy, w in zip(dys, ws, strict=True):
            want = want + wide(dy).reshape(n, -1) @ wide(w)[0, 0].T
        assert_close(be.to_numpy(dx).reshape(n, -1), want, terms=sum(widths) + 1)


def input_gradients_agree(be, given, tiles):
    (want, *_), bits = given.gradients(), None
    for tile in tiles:
        with only(tile):
            for start, dy, x, w in both_ways(be, given.start, given.dy, given.x, given.w):
                last = be.asarray(be.to_numpy(start)[-1:].copy())
                dw, db = be.empty(w.shape), be.empty(given.b.shape)
                be.conv_backward(given.geometry, dy, x, w, start, dw, db, add=given.add)
                got = be.to_numpy(start)
                bits = got if bits is None else bits
                assert_same_bits(got, bits)
                be.conv_backward(given.geometry, dy[-1:], x[-1:], w, last, dw, db, add=given.add)
                assert_same_bits(be.to_numpy(last), bits[-1:])
    assert_close(bits, want, terms=given.taps * given.dy.shape[3] + 1)


@covers("conv", *ADJOINT, "conv_fold")
def input_gradients(be, size):
    for given in cases(size):
        input_gradients_agree(be, given, TILES)


@covers("conv", "conv_input_rows")
def input_gradients_of_rows(be, size):
    for given in cases(size, ROWS):
        input_gradients_agree(be, given, TILES[:1])


@covers("conv", *WEIGHTS, "conv_weights_finish", "conv_image_sums")
def weight_gradients(be, size):
    """In one chunk of pixels, and in several; all tiles give the same bits."""
    for given in [*cases(size), *cases(size, ROWS)]:
        _, *want = given.gradients()
        pixels = given.dy.size // given.dy.shape[3]
        for least in (cuda_conv.LEAST_CHUNK, 16):
            bits = None
            for tile in TILES:
                with only(tile, least_chunk=least):
                    arrays = *(unfilled(*array.shape) for array in want), given.dy, given.x, given.w
                    for dw, db, dshift, dy, x, w in both_ways(be, *arrays):
                        be.conv_backward(given.geometry, dy, x, w, None, dw, db, dshift=dshift)
                        got = [be.to_numpy(array) for array in (dw, db, dshift)]
                        for array, same in zip(got, bits or got, strict=True):
                            assert_same_bits(array, same)
                        bits = got
                        alone = be.asarray(unfilled(*dshift.shape))
                        be.conv_backward(given.geometry, dy, x, w, None, None, None, dshift=alone)
                        assert_same_bits(be.to_numpy(alone), bits[2])
            for array, wanted, terms in zip(bits, want, (pixels, pixels, pixels // len(given.x)), strict=True):
                assert_close(array, wanted, terms=terms + 1, scale=max(1, np.abs(wanted).max()))


@covers("conv", *FORWARD[:1], *ADJOINT[:1])
def offsets_have_64_bits(be, size):
    """The last image of a batch of more than 2^31 values; the others are zeros."""
    n, side, c, k = {"small": (3, 4, 8, 4), "full": (2100, 32, 1024, 4)}[size]
    assert size == "small" or n * side * side * c > 2**31
    given = Arrays(Case(Conv(), 1, side, side, c, k), 12)  # without shift and residual
    w, b, last, last_dy = map(be.asarray, (given.w, given.b, given.x, given.dy))
    shapes = (n, side, side, c), (n, side, side, k)
    x, dy, out = be.runtime.zeros(shapes[0]), be.runtime.zeros(shapes[1]), be.empty(shapes[1])
    be.runtime.copy(x[-1:], last)
    be.runtime.copy(dy[-1:], last_dy)
    with only(TILES[0]):
        be.conv(Conv(), x, w, b, out)
        assert_close(be.to_numpy(out[-1:]), given.outputs(), terms=c)
        del out
        dx, dw, db = be.empty(x.shape), be.empty(w.shape), be.empty(b.shape)
        be.conv_backward(Conv(), dy, x, w, dx, dw, db)
        want_dx, want_dw, _, _ = given.gradients()
        assert_close(be.to_numpy(dx[-1:]), want_dx - given.start, terms=k)
        assert_close(be.to_numpy(dw), want_dw, terms=side * side)


# ------------------------------------------------------------------------------------------- around cuDNN

MATRICES = {"small": [(1, 1), (9, 5), (27, 32), (40, 33)], "full": [(9 * 256, 256), (27, 128), (1, 1000), (2049, 3)]}


def halves(be, array, size):
    """The upper halves of float32 that an array holds, two to a value."""
    return be.to_numpy(array).view(np.uint16)[:size]


def rounded(x):
    """Finite float32 values as bf16, to nearest even."""
    bits = x.reshape(-1).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@covers("cudnn", "cudnn_turn", "cudnn_halves")
def matrices_for_cudnn(be, size):
    for rows, columns in MATRICES[size]:
        x, here = normals(1, rows, columns), be.runtime
        count = x.size
        want = np.ascontiguousarray(x.T)
        for (there,) in both_ways(be, x):
            turned = be.empty((columns, rows))
            here.launch("cudnn", "cudnn_turn", *here.grid_1d(count), (there, turned, rows, columns, False))
            assert_same_bits(be.to_numpy(turned), want)
            packed = be.empty((-(-count // 2),))
            here.launch("cudnn", "cudnn_turn", *here.grid_1d(count), (there, packed, rows, columns, True))
            assert_same_bits(halves(be, packed, count), rounded(want))
        packed = be.empty((-(-count // 2),))
        here.launch("cudnn", "cudnn_halves", *here.grid_1d(-(-count // 4)), (be.asarray(x), packed, count))
        assert_same_bits(halves(be, packed, count), rounded(x))


SUMS = {"small": [(2, 3, 5), (3, 4, 8), (1, 1, 1)], "full": [(16, 1024, 64), (7, 49, 130)]}


@covers("cudnn", "cudnn_finish")
def sums_after_cudnn(be, size):
    """Every set of terms, in the order of the text; into an array of its own and into the residual."""
    for n, pixels, channels in SUMS[size]:
        y, shift, residual = normals(1, n, pixels, channels), normals(2, n, channels), normals(3, n, pixels, channels)
        bias, here, fours = normals(4, channels), be.runtime, channels % 4 == 0
        for used in itertools.product((False, True), repeat=3):
            given = [a if use else None for a, use in zip((bias, shift, residual), used, strict=True)]
            want = y
            for term in (given[0], None if given[1] is None else shift[:, None], given[2]):
                want = want if term is None else want + term
            there = [None if a is None else be.asarray(a.copy()) for a in (y, *given)]
            for out in (be.empty(y.shape), there[0] if there[3] is None else there[3]):
                grid = here.grid_1d(y.size // (4 if fours else 1))
                args = (*there, out, n * pixels, pixels, channels, fours)
                here.launch("cudnn", "cudnn_finish", *grid, args)
                assert_same_bits(be.to_numpy(out), want)
