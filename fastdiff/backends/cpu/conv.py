"""Convolutions on the CPU: how their work is cut, and which of four forms does it.

A *product* is a matrix product straight on the pixels (`kernels.cpu.conv`), for any geometry; a linear layer, or a 1x1
convolution, is one over all pixels (`kernels.cpu.linear`); Winograd's forms take convolutions with stride 1 between
enough channels, of 3x3 taps (`kernels.cpu.winograd`) and of 3 taps along rows (`kernels.cpu.winograd_rows`). All give a
sample's values in an order of additions that its layer alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from fastdiff.backends.cpu import conv_amx
from fastdiff.backends.cpu.phases import Phase, Sides
from fastdiff.backends.cpu.workers import PIECES, Array, Job, Phases, Scripted, aligned
from fastdiff.backends.layers import Conv, ConvShapes, Prepared
from fastdiff.backends.numpy.host import AsTheyAre
from fastdiff.kernels.cpu import conv as kernels
from fastdiff.kernels.cpu import linear, winograd, winograd_rows
from fastdiff.kernels.cpu.conv import COLUMNS, LENGTH, ROWS, TAPS

BLOCK = 256  # pixels of an image that are convolved together: they stay in cache for all channels
MAX_GROUPS = 16  # of images, whose weight gradients are summed apart
GROUP_BYTES = 1 << 20  # of all groups' sums together
# A matrix is copied panel by panel where it has so many columns, its rows are used so often, and it is no larger.
PACKED_CHANNELS, PACKED_USES, PACKED_VALUES = 128, 64, 1 << 22
LEAST_CHANNELS = 16  # on both sides, for Winograd
MOST_TILES, CACHED = 64, 8192  # of a Winograd transform: tiles, and tiles times channels
FEW_TILES = 16  # with fewer in an item, one picture of 8 x 8 took 1.7 times as long (2026-12-01)
FEW_SUMS = 64 * 64  # weights: with more, their sums by Winograd do not fit a thread's cache
GROUP_TILES, MOST_GROUPS = 64, 8  # tiles summed together, at least; sums over groups of tiles, at most
CACHED_BOTH = 4096  # tiles times channels of input and output that are summed at once
SUM_TILES = 256  # tiles whose weight gradient is summed at once
LEAST_ROWS, LEAST_COLUMNS = 32, 64  # of a block, where smaller ones give all threads some
BLOCKS = 2  # for each thread, at least
FEW_ROW_SUMS = 128 * 128  # weights: with more there are enough blocks of them, and one sum for each
ROW_SAVED = 1.6
# Floating-point operations of a convolution that last as long, for each value: of a light pass, of a transform.
LIGHT_WORK, TAPS_WORK = 30, 300
SAVED = 3  # of the time of a convolution, by Winograd
KEPT_BYTES = 1 << 28  # of taps that are kept while nothing changes the weights
NOTHING = np.empty(0, np.float32)


def _vectors(channels: int, parts: int) -> int:
    """Channels of each of so many parts, in whole vectors."""
    return -(-channels // (parts * winograd.LANES)) * winograd.LANES


class _Product:
    """How one convolution, or its input gradient (a convolution of dy, `adjoint`), is cut into pieces.

    Parameters
    ----------
    geometry : Conv
    shape : (int, int, int, int)
        Of x.
    k : int
        Output channels.
    adjoint : bool
    """

    def __init__(self, geometry: Conv, shape: tuple[int, int, int, int], k: int, adjoint: bool) -> None:
        (in_height, in_width, c), (height, width, k), *both = Sides.of(geometry, shape, k, adjoint)
        images, kernel_columns = shape[0], geometry.kernel[1]
        # Whether Winograd does it: a rule of the layer alone.
        self.by_winograd = geometry == Conv((3, 3), pad=(1, 1, 1, 1)) and min(c, k) >= LEAST_CHANNELS
        self.across = -(-width // winograd.TILE)
        # Along rows it takes 6 products for up to 4 outputs, where the taps inside a row are 3 for each but its ends.
        self.by_rows = (
            geometry == Conv((1, 3), pad=(0, 0, 1, 1))
            and min(c, k) >= LEAST_CHANNELS
            and winograd.SEEN * self.across < 3 * width - 2
        )
        block_rows = min(height, max(1, BLOCK // max(width, 1)))
        pairs: list[tuple[Phase, Phase, int]] = []
        taps: list[tuple[int, int, int]] = []
        blocks = 0  # (c, k) of weights, those of a pair of phases after another's
        for down in both[0]:
            for across in both[1]:
                pairs.append((down, across, blocks))
                for of_rows in down.taps:
                    for of_columns in across.taps:
                        sources = [r * kernel_columns + s for r in of_rows for s in of_columns] or [-1]
                        taps += [(blocks, source, number > 0) for number, source in enumerate(sources)]
                        blocks += 1
        parts: list[list[int]] = []
        firsts = [0]
        for low in range(0, height, block_rows):
            for down, across, kernel in pairs:
                for m, rows, tap, tap_rows in down.segments(low, min(height, low + block_rows), in_height):
                    for n, columns, column, tap_columns in across.segments(0, width, in_width):
                        in_row, in_column = down.stride * in_width * c, across.stride * c
                        out_row, out_column = down.step * width * k, across.step * k
                        y, x = m * down.stride + down.offset + tap, n * across.stride + across.offset + column
                        out = (down.first + m * down.step) * width + across.first + n * across.step
                        joined = in_row == columns * in_column and out_row == columns * out_column
                        sides = [1, rows * columns] if joined else [rows, columns]
                        wide = len(across.taps)
                        parts.append([
                            *sides, out * k, out_row, out_column, (y * in_width + x) * c, in_row, in_column,
                            in_width * c, tap_rows, tap_columns * c, (kernel + tap * wide + column) * c * k,
                            wide * c * k, tap,
                        ])  # fmt: skip
            firsts.append(len(parts))
        self.parts = np.array(parts, np.int64).reshape(-1, kernels.PART_COLUMNS)
        self.firsts, self.blocks = np.array(firsts, np.int64), len(firsts) - 1
        self.taps = np.array(taps, np.int64).reshape(-1, 3)
        self.tile_rows, self.row_tiles = images * -(-height // winograd.TILE), images * height * self.across
        self.plain_sizes = np.array([images, height, width, c, k], np.int64)
        self.adjoint = adjoint
        # Whether the weights can be used as they are.
        self.direct = not adjoint and taps == [(i, i, 0) for i in range(len(taps))]
        # Whether a product reads them panel by panel; where that is a copy made for it, it must be used often.
        often = not self.direct or images * height * width >= PACKED_USES
        self.packed = not self.by_winograd and k >= PACKED_CHANNELS and often
        # Whether it is one matrix product over all pixels of all images.
        self.linear = geometry == Conv()
        self.collected = self.taps[self.taps[:, 1] >= 0, :2].copy()
        self.images, self.channels, self.pixels, self.weights = images, (c, k), height * width, blocks * c * k
        self.sizes = np.array([images, in_height * in_width, c, height, width, k, block_rows], np.int64)
        # Floating-point operations for an image.
        self.work = 2.0 * k * float(np.prod(self.parts[:, [ROWS, COLUMNS, TAPS, LENGTH]], axis=1).sum())
        # Of the weights' gradient: many groups where the weights are few, so that the images are read once.
        groups = max(1, min(images, MAX_GROUPS, GROUP_BYTES // max(4 * self.weights, 1)))
        self.group = max(1, -(-images // groups))
        self.groups = -(-images // self.group)
        self.slots = 1 if self.groups > MAX_GROUPS // 2 else max(len(down.taps) for down in both[0])
        self.weight_items = self.groups * kernels.panels_of(k) * self.slots
        # Values of the form that the weights are brought into, where that has not as many as they; it may be kept.
        self.form = 0
        if self.by_winograd:
            self.form = int(winograd.panel_start(kernels.panels_of(k), k, c))
        elif not (self.linear or self.by_rows or self.weights == math.prod(geometry.kernel) * c * k):
            self.form = self.weights

    def forming(self, w: Array, form: Array) -> Job:
        """What brings weights into their form."""
        return self.tapping(w, form) if self.by_winograd else self.spreading(w, form)

    def tapping(self, w: Array, taps: Array) -> Job:
        """What makes taps of Winograd's form out of weights."""
        c, k = self.channels
        return winograd.taps_range, (w, c, k, taps), c, float(TAPS_WORK * k)

    def spreading(self, w: Array, spread: Array) -> Job:
        """What lays out the weights by pairs of phases."""
        c, k = self.channels
        sides = (k, c) if self.adjoint else (c, k)
        arguments = self.taps, w, spread, *sides, self.adjoint, self.packed
        return kernels.spread_weights, arguments, self.weights // max(c * k, 1), float(LIGHT_WORK * c * k)


_product = lru_cache(maxsize=1024)(_Product)


class KeptForms:
    """Weights as some convolutions read them, in memory of their own: see `Prepared`.

    They are made where that is done once. What is written down to be done again reads the weights themselves, and so do
    convolutions that would take the memory beyond `KEPT_BYTES`: forms for Winograd are four times the weights.
    """

    def __init__(self, be: ConvOperations, convs: Sequence[ConvShapes]) -> None:
        self._be, kept = be, 0
        self._products: list[_Product | None] = []
        for geometry, x, out in convs:
            product = _product(geometry, x, out[3], False)
            kept += 4 * product.form
            self._products.append(product if product.form and kept <= KEPT_BYTES else None)

    def run(self, weights: Sequence[Array]) -> list[list[Array]]:
        be, jobs, forms = self._be, [], []
        for product, w in zip(self._products, weights, strict=True):
            form = w
            if product is not None and not be._recorded:
                form = aligned(product.form)
                jobs.append(product.forming(w.reshape(-1), form))
            forms.append([form, w])
        if jobs:
            with be._workers.lock:
                be._do(jobs)
        return forms


class ConvOperations(Scripted):
    """Convolutions of `LayerBackend`."""

    precision = "float32"

    def prepare(self, convs: Sequence[ConvShapes], backward: bool) -> Prepared:
        if self.precision == "bf16" and convs:
            return conv_amx.TiledWeights(self, convs, backward)
        return AsTheyAre() if backward else KeptForms(self, convs)

    def conv(
        self,
        geometry: Conv,
        x: Array,
        w: Array,
        b: Array,
        out: Array,
        *,
        shift: Array | None = None,
        residual: Array | None = None,
    ) -> None:
        extra = (NOTHING if array is None else array.reshape(-1) for array in (shift, residual))
        with self._workers.lock:
            self._do(*self._phases_of(geometry, x.shape, out.shape[3], False, (x, w, out), (True, b, *extra)))

    def conv_backward(
        self,
        geometry: Conv,
        dy: Array,
        x: Array,
        w: Array,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
        *,
        dshift: Array | None = None,
        add: bool = False,
    ) -> None:
        k = dy.shape[3]
        product = _product(geometry, x.shape, k, False)
        flat_x, flat_dy = x.reshape(-1), dy.reshape(-1)
        with self._workers.lock:
            shifts = self._scratch("shifts", product.images * k) if dshift is None else dshift.reshape(-1)
            pixels = flat_dy, product.pixels, k, shifts, self._each("pattern", kernels.PATTERN + k)
            sums: Phases = [
                [(kernels.pixel_sums_range, pixels, product.images, float(LIGHT_WORK * product.pixels * k))]
            ]
            several = [sums] if dshift is not None or db is not None else []
            if dw is not None and db is not None:
                sums.append([(kernels.row_sums, (shifts, k, db), k, float(product.images))])
                if self.precision == "bf16":
                    several.insert(0, conv_amx.weights(self, geometry, x.shape, k, (flat_x, flat_dy, dw.reshape(-1))))
                else:
                    weights = self._weights_by_product
                    if product.by_winograd or product.by_rows:
                        weights = self._weights_by_winograd if product.by_winograd else self._weights_by_rows
                    several.insert(0, weights(product, flat_x, flat_dy, dw.reshape(-1)))
            if dx is not None:
                begin = (not add, NOTHING, NOTHING, NOTHING)
                several.append(self._phases_of(geometry, x.shape, k, True, (dy, w, dx), begin))
            self._do(*map(list, map(chain.from_iterable, zip_longest(*several, fillvalue=()))))

    def _phases_of(
        self,
        geometry: Conv,
        shape: tuple[int, ...],
        k: int,
        adjoint: bool,
        arrays: tuple[Array, Array, Array],
        begin: tuple[Any, ...],
    ) -> Phases:
        """The phases of a convolution of x by w to y, or of an input gradient: one of dy."""
        x, w, y = (array.reshape(-1) for array in arrays)
        if self.precision == "bf16":
            return conv_amx.convolve(self, geometry, shape, k, adjoint, (x, w, y), begin)
        return self._convolve(_product(geometry, shape, k, adjoint), x, w, y, begin)

    def _convolve(self, product: _Product, x: Array, w: Array, y: Array, begin: tuple[Any, ...]) -> Phases:
        """The same in float32.

        Arrays are flat; `begin` says what y starts as: whether anew, bias, shift, residual.
        """
        if product.linear:
            return self._by_blocks(product, x, w, y, begin)
        if product.by_rows:
            return self._by_rows(product, x, w, y, begin)
        k, phases = product.channels[1], []
        if len(w) != product.form and (product.packed or not product.direct):  # else they are in their form already
            spread = self._scratch("weights", product.weights)
            job = product.spreading(w, spread)
            if product.direct:
                rows = product.weights // max(k, 1)
                job = kernels.pack_range, (w, rows, k, spread), rows, float(LIGHT_WORK * k)
            phases.append([job])
            w = spread
        if product.by_winograd:
            return phases + self._by_winograd(product, x, w, y, begin)
        return phases + self._by_product(product, x, w, y, begin)

    def _by_product(self, product: _Product, x: Array, w: Array, y: Array, begin: tuple[Any, ...]) -> Phases:
        images, k, group = product.images, product.channels[1], 1
        if product.blocks == 1:
            # The bits do not depend on it.
            group = max(1, min(BLOCK // max(product.pixels, 1), -(-images // (2 * self.threads))))
        arguments = (
            group, product.sizes, product.parts, product.firsts, x, w, y, *begin,
            self._each("pattern", kernels.PATTERN + k), product.packed,
        )  # fmt: skip
        work = (product.work + LIGHT_WORK * product.pixels * k) * group / max(product.blocks, 1)
        return [[(kernels.conv_range, arguments, -(-images // group) * product.blocks, work)]]

    def _by_winograd(self, product: _Product, x: Array, w: Array, y: Array, begin: tuple[Any, ...]) -> Phases:
        c, k = product.channels
        across, height, panels = product.across, product.tile_rows, kernels.panels_of(k)
        # More items than threads, each with few enough tiles for the cache. Every item reads the taps of its panels of
        # channels, which takes longer than all else where it has few tiles: then panels are shared out instead, and
        # there is an item for each thread. The bits do not depend on it.
        many, least = PIECES * self.threads, -(-FEW_TILES // across)
        shares = min(panels, self.threads) if -(-height // many) < least else 1
        rows = max(-(-height * shares // many), min(least, -(-height * shares // self.threads)))
        rows = max(1, min(MOST_TILES // across, CACHED // (c * across), rows))
        items = -(-height // rows)
        before, taps = [], w
        if len(w) != product.form:  # else they are taps already
            taps = self._scratch("taps", product.form)
            before.append([product.tapping(w, taps)])
        arguments = (
            rows, shares, product.plain_sizes, x, taps, y, *begin,
            self._each("strip", winograd.SEEN * winograd.seen(across) * c),
            self._each("inputs", winograd.planes(rows * across, c)),
            self._each("outputs", winograd.planes(rows * across, winograd.WIDE)),
            self._each("base", winograd.WIDE), self._each("tile", winograd.WIDE * winograd.TILE**2),
        )  # fmt: skip
        work = product.work * product.images / (SAVED * max(items * shares, 1))
        return [*before, [(winograd.conv_range, arguments, items * shares, work)]]

    def _cut(self, rows: int, most: int, k: int, times: int = 1) -> tuple[int, int, int]:
        """Rows and columns of a block of (rows, k), at most `most` and `MOST`, and how many there are.

        They are smaller where there would be too few for all threads, `times` over. The bits do not depend on it.
        """
        wanted = -(-BLOCKS * self.threads // times)
        parts = max(1, -(-rows // most))
        shares = max(-(-k // linear.MOST), min(-(-k // LEAST_COLUMNS), -(-wanted // parts)))
        parts = max(parts, min(-(-rows // LEAST_ROWS), -(-wanted // shares)))
        tall, wide = max(1, _vectors(rows, parts)), _vectors(k, shares)
        return tall, wide, -(-rows // tall) * -(-k // wide)

    def _by_blocks(self, product: _Product, x: Array, w: Array, y: Array, begin: tuple[Any, ...]) -> Phases:
        k = product.channels[1]
        tall, wide, blocks = self._cut(product.images * product.pixels, linear.PIXELS, k)
        arguments = (
            tall, wide, product.plain_sizes, x, w, product.adjoint, y, *begin,
            self._each("taps", linear.SIZE), self._each("base", linear.MOST),
        )  # fmt: skip
        work = (product.work + LIGHT_WORK * product.pixels * k) * product.images / max(blocks, 1)
        return [[(linear.linear_range, arguments, blocks, work)]]

    def _by_rows(self, product: _Product, x: Array, w: Array, y: Array, begin: tuple[Any, ...]) -> Phases:
        kernel, k = winograd_rows, product.channels[1]
        tiles, wide, blocks = self._cut(product.row_tiles, linear.MOST, k)
        arguments = (
            tiles, wide, product.plain_sizes, x, w, product.adjoint, y, *begin,
            self._each("strip", winograd.SEEN * linear.MOST), self._each("turned", kernel.TAPS * linear.MOST**2),
            self._each("inputs", kernel.PLANES), self._each("taps", kernel.PLANES),
            self._each("outputs", kernel.PLANES), self._each("base", linear.MOST),
            self._each("tile", linear.MOST * winograd.TILE),
        )  # fmt: skip
        work = product.work * product.images / (ROW_SAVED * max(blocks, 1))
        return [[(kernel.conv_range, arguments, blocks, work)]]

    def _weights_by_product(self, product: _Product, x: Array, dy: Array, dw: Array) -> Phases:
        c, k = product.channels
        whole = product.direct and product.groups == 1
        sums = dw if whole else self._scratch("sums", product.groups * product.weights)
        phases: Phases = []
        if product.linear and product.blocks == 1 and product.images:
            # Few pieces: each turns its part of x.
            parts = -(-c // linear.MOST)
            shares = min(-(-k // linear.MOST), -(-BLOCKS * self.threads // (product.groups * parts)))
            deep, wide = _vectors(c, parts), _vectors(k, shares)
            blocks = product.groups * -(-c // deep) * -(-k // wide)
            work = product.work * product.images / blocks
            arguments: tuple[Any, ...] = (
                product.group, deep, wide, product.plain_sizes, x, dy,
                self._each("inputs", linear.SIZE), self._each("outputs", linear.SIZE), sums,
            )  # fmt: skip
            phases.append([(linear.linear_weights_range, arguments, blocks, work)])
        else:
            pixels = product.images * product.pixels
            packed = k >= PACKED_CHANNELS and product.weights // k >= PACKED_USES and 0 < pixels * k <= PACKED_VALUES
            if packed:
                panels = self._scratch("outputs", pixels * k)
                phases.append([(kernels.pack_range, (dy, pixels, k, panels), pixels, float(LIGHT_WORK * k))])
                dy = panels
            work = product.work * product.images / max(product.weight_items, 1)
            arguments = (
                product.group, product.slots, product.sizes, product.parts, product.firsts, x, dy, sums,
                product.weights, packed,
            )  # fmt: skip
            phases.append([(kernels.clear, (sums,), sums.size, 1.0)])
            phases.append([(kernels.conv_weights_range, arguments, product.weight_items, work)])
        if not whole:
            collect = product.collected, sums, product.groups, dw, c * k
            work = float(LIGHT_WORK * c * k * product.groups)
            phases.append([(kernels.collect_weights, collect, dw.size // max(c * k, 1), work)])
        return phases

    def _weights_by_winograd(self, product: _Product, x: Array, dy: Array, dw: Array) -> Phases:
        if not product.images:
            return [[(kernels.clear, (dw,), dw.size, 1.0)]]
        (c, k), across, height = product.channels, product.across, product.tile_rows
        panels = kernels.panels_of(k)
        size = winograd.panel_start(panels, k, c)
        strip = self._each("strip", winograd.SEEN * winograd.seen(across) * max(c, k))
        phases: Phases = []
        if c * k <= FEW_SUMS:
            # Each thread has groups of tiles, and their sums, to itself and in its own cache.
            group = max(1, -(-max(GROUP_TILES, -(-height * across // MOST_GROUPS)) // across))
            rows, groups = max(1, min(group, CACHED_BOTH // ((c + k) * across))), -(-height // group)
            sums = self._scratch("sums", groups * size)
            arguments: tuple[Any, ...] = (
                group, rows, product.plain_sizes, x, dy, strip, self._each("inputs", winograd.planes(rows * across, c)),
                self._each("outputs", winograd.planes(rows * across, k)), sums, size,
            )  # fmt: skip
            work = 2.0 * group * across * (winograd.PLACES * c * k + TAPS_WORK * (c + k))
            phases.append([(winograd.gradient_range, arguments, groups, work)])
        else:
            # All threads transform tiles, and then share out the places; the order of a sum is that of the tiles.
            groups, places, step = 1, winograd.PLACES * panels, max(1, min(height, SUM_TILES // across))
            sums = self._scratch("sums", size)
            inputs = self._scratch("inputs", winograd.planes(step * across, c))
            outputs = self._scratch("outputs", winograd.planes(step * across, k))
            for first in range(0, height, step):
                rows = min(step, height - first)
                tiles = rows * across
                arguments = first, tiles, product.plain_sizes, x, dy, strip, inputs, outputs
                work = 2.0 * tiles * c * k * winograd.PLACES / places
                phases += [
                    [(winograd.gradient_tiles_range, arguments, rows, float(TAPS_WORK * across * (c + k)))],
                    [(winograd.gradient_sums_range, (tiles, c, k, inputs, outputs, sums, first > 0), places, work)],
                ]
        zeros = np.zeros(winograd.LANES, np.float32)
        taps = sums, groups, size, c, k, zeros, dw
        return [*phases, [(winograd.gradient_taps_range, taps, c, float(TAPS_WORK * k * groups))]]

    def _weights_by_rows(self, product: _Product, x: Array, dy: Array, dw: Array) -> Phases:
        (c, k), total, kernel = product.channels, product.row_tiles, winograd_rows
        if not total:
            return [[(kernels.clear, (dw,), dw.size, 1.0)]]
        group = max(GROUP_TILES, -(-total // MOST_GROUPS)) if c * k <= FEW_ROW_SUMS else total
        groups = -(-total // group)
        deep, wide, blocks = self._cut(c, linear.MOST, k, groups)
        sums = dw if groups == 1 else self._scratch("sums", groups * dw.size)
        arguments = (
            group, deep, wide, product.plain_sizes, x, dy, self._each("strip", winograd.SEEN * linear.MOST),
            self._each("inputs", kernel.PLANES), self._each("outputs", kernel.PLANES),
            self._each("taps", kernel.PLANES), sums,
        )  # fmt: skip
        work = product.work * product.images / (ROW_SAVED * groups * blocks)
        phases: Phases = [[(kernel.gradient_range, arguments, groups * blocks, work)]]
        if groups > 1:
            collect = product.collected, sums, groups, dw, c * k
            phases.append([(kernels.collect_weights, collect, kernel.TAPS, float(LIGHT_WORK * c * k * groups))])
        return phases
