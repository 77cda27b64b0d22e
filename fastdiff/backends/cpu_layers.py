"""The layers of image networks on the CPU: the Numba kernels behind `LayerBackend`.

A sample's bits depend neither on the batch nor on the threads: its own sums have a fixed order, and sums over the
batch (gradients of parameters) run over groups that the layer's sizes and the batch decide, added in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends.layers import Conv
from fastdiff.kernels.cpu import attention as attention_kernels
from fastdiff.kernels.cpu import conv as conv_kernels
from fastdiff.kernels.cpu import norm as norm_kernels
from fastdiff.kernels.cpu import pointwise as pointwise_kernels
from fastdiff.kernels.cpu.conv import COLUMNS, LENGTH, ROWS, TAPS
from fastdiff.kernels.cpu.noise import CHUNK
from fastdiff.noise import Stream, round_keys

Array = npt.NDArray[Any]
Range = Callable[[int, int, int], None]
Job = tuple[Range, int, float]

BLOCK = 256  # pixels of an image that are convolved together: they stay in cache for all channels
MIN_WORK = 4e6  # floating-point operations of a piece of work: less is not worth waking a thread
PIECES = 4  # for each thread, so that all end at about the same time
MAX_GROUPS = 16  # of images, whose weight gradients are summed apart
GROUP_BYTES = 1 << 20  # of all groups' sums together
SILU_WORK, LIGHT_WORK = 120, 30  # floating-point operations of a convolution that last as long, for each value
ALIGNMENT = 64  # bytes: a cache line
NOTHING = np.empty(0, np.float32)


class _Phase(NamedTuple):
    """Output positions first, first + step, ... along one axis, which see the input through the same taps.

    Position first + m step sees input m stride + offset + i through the i-th of `taps`, each the sum of these taps of
    the kernel.
    """

    first: int
    step: int
    stride: int
    offset: int
    taps: tuple[tuple[int, ...], ...]

    def segments(self, low: int, high: int, size: int) -> list[tuple[int, int, int, int]]:
        """Output positions low ... high - 1 by the taps that lie in an input of `size`: (m, count, first tap, taps)."""
        found: list[tuple[int, int, int, int]] = []
        for m in range(-(-(low - self.first) // self.step), -(-(high - self.first) // self.step)):
            at = m * self.stride + self.offset
            begin, end = max(0, -at), min(len(self.taps), size - at)
            if begin >= end:
                continue
            last = found[-1] if found else None
            if last is not None and last[2:] == (begin, end - begin) and last[0] + last[1] == m:
                found[-1] = (last[0], last[1] + 1, begin, end - begin)
            else:
                found.append((m, 1, begin, end - begin))
        return found


def _phase(first: int, step: int, stride: int, pairs: list[tuple[int, int]]) -> _Phase:
    """A phase of pairs (offset, tap)."""
    offsets = [offset for offset, _ in pairs] or [0]
    span = range(min(offsets), max(offsets) + 1) if pairs else range(0)
    taps = tuple(tuple(tap for offset, tap in pairs if offset == at) for at in span)
    return _Phase(first, step, stride, min(offsets), taps)


def _phases(kernel: int, stride: int, pad: int, up: int) -> list[_Phase]:
    """Output o sees input (o stride + s - pad) // up through tap s: taps that meet one input value are one tap."""
    period = up // math.gcd(stride, up)
    return [
        _phase(p, period, period * stride // up, [((p * stride + s - pad) // up, s) for s in range(kernel)])
        for p in range(period)
    ]


def _adjoint_phases(kernel: int, stride: int, pad: int, up: int) -> list[_Phase]:
    """Input q gets the gradient of output o through tap s where o stride + s - pad = q up + d for some d < up."""
    period = stride // math.gcd(stride, up)
    return [
        _phase(
            p,
            period,
            period * up // stride,
            [
                (place // stride, s)
                for s in range(kernel)
                for d in range(up)
                if (place := p * up + d + pad - s) % stride == 0
            ],
        )
        for p in range(period)
    ]


class _Product:
    """The tables of `kernels.cpu.conv` for one convolution, or for its input gradient: a convolution of dy.

    Parameters
    ----------
    phases : (list of _Phase, list of _Phase)
        Along rows and columns.
    source, target : (int, int, int)
        Height, width and channels of its input and output.
    images : int
    kernel_columns : int
    """

    def __init__(
        self,
        phases: tuple[list[_Phase], list[_Phase]],
        source: tuple[int, int, int],
        target: tuple[int, int, int],
        images: int,
        kernel_columns: int,
    ) -> None:
        (in_height, in_width, c), (height, width, k) = source, target
        block_rows = min(height, max(1, BLOCK // max(width, 1)))
        pairs: list[tuple[_Phase, _Phase, int]] = []
        taps: list[tuple[int, int, int]] = []
        kernels = 0  # blocks (c, k) of weights, those of a pair of phases after another's
        for down in phases[0]:
            for across in phases[1]:
                pairs.append((down, across, kernels))
                for of_rows in down.taps:
                    for of_columns in across.taps:
                        sources = [r * kernel_columns + s for r in of_rows for s in of_columns] or [-1]
                        taps += [(kernels, source, number > 0) for number, source in enumerate(sources)]
                        kernels += 1
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
                        shape = [1, rows * columns] if joined else [rows, columns]
                        wide = len(across.taps)
                        parts.append([
                            *shape, out * k, out_row, out_column, (y * in_width + x) * c, in_row, in_column,
                            in_width * c, tap_rows, tap_columns * c, (kernel + tap * wide + column) * c * k,
                            wide * c * k, tap,
                        ])  # fmt: skip
            firsts.append(len(parts))
        self.parts = np.array(parts, np.int64).reshape(-1, conv_kernels.PART_COLUMNS)
        self.firsts, self.blocks = np.array(firsts, np.int64), len(firsts) - 1
        self.taps = np.array(taps, np.int64).reshape(-1, 3)
        self.direct = taps == [(i, i, 0) for i in range(len(taps))]  # the weights can be used as they are
        self.collected = self.taps[self.taps[:, 1] >= 0, :2].copy()
        self.images, self.channels, self.pixels, self.weights = images, (c, k), height * width, kernels * c * k
        self.sizes = np.array([images, in_height * in_width, c, height, width, k, block_rows], np.int64)
        # Floating-point operations for an image.
        self.work = 2.0 * k * float(np.prod(self.parts[:, [ROWS, COLUMNS, TAPS, LENGTH]], axis=1).sum())
        # Of the weights' gradient: many groups where the weights are few, so that the images are read once.
        groups = max(1, min(images, MAX_GROUPS, GROUP_BYTES // max(4 * self.weights, 1)))
        self.group = max(1, -(-images // groups))
        self.groups = -(-images // self.group)
        self.slots = 1 if self.groups > MAX_GROUPS // 2 else max(len(down.taps) for down in phases[0])
        self.weight_items = self.groups * conv_kernels.panels_of(k) * self.slots


@lru_cache(maxsize=1024)
def _product(geometry: Conv, shape: tuple[int, int, int, int], k: int, adjoint: bool) -> _Product:
    """The product of a convolution of x with this shape into k channels, or that of its input gradient."""
    images, height, width, c = shape
    source, target = (height, width, c), (*geometry.size(height, width), k)
    if adjoint:
        source, target = target, source
    make = _adjoint_phases if adjoint else _phases
    down, across = (
        make(geometry.kernel[axis], geometry.stride[axis], geometry.pad[2 * axis], geometry.up[axis])
        for axis in range(2)
    )
    return _Product((down, across), source, target, images, geometry.kernel[1])


class _Scratch:
    """Named float32 buffers, made once and grown where more is needed."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Array] = {}

    def __call__(self, name: Any, size: int) -> Array:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            spare = np.empty(size + ALIGNMENT // 4, np.float32)
            start = -spare.ctypes.data % ALIGNMENT // 4
            buffer = self._buffers[name] = spare[start : start + size]
        return buffer if len(buffer) == size else buffer[:size]


class CpuLayers:
    """`LayerBackend` for `CpuBackend`, on its workers."""

    threads: int
    _workers: Any

    @cached_property
    def _scratch(self) -> _Scratch:
        return _Scratch()

    def _share(self, *jobs: Job) -> None:
        """Run every job (range of items, items, work of an item) in pieces, all at once."""
        if self.threads == 1 or sum(items * work for _, items, work in jobs) < 2 * MIN_WORK:
            for body, items, _ in jobs:
                if items:
                    body(0, 0, items)
            return
        pieces: list[tuple[Range, int, int]] = []
        for body, items, work in jobs:
            grain = max(1, math.ceil(MIN_WORK / max(work, 1)), -(-items // (PIECES * self.threads)))
            pieces += [(body, start, min(items, start + grain)) for start in range(0, items, grain)]

        def piece(worker: int, first: int, last: int) -> None:
            for body, start, stop in pieces[first:last]:
                body(worker, start, stop)

        self._workers.run(piece, len(pieces), 1)

    def _convolve(
        self, product: _Product, x: Array, w: Array, y: Array, begin: bool, b: Array, shift: Array, residual: Array
    ) -> Job:
        """The job of a convolution; all arrays flat."""
        images, scratch = product.images, self._scratch
        group = 1
        if product.blocks == 1:
            # The bits do not depend on it.
            group = max(1, min(BLOCK // max(product.pixels, 1), -(-images // (2 * self.threads))))

        def body(worker: int, start: int, stop: int) -> None:
            pattern = scratch(("pattern", worker), conv_kernels.PATTERN + product.channels[1])
            conv_kernels.conv_range(
                start, stop, group, product.sizes, product.parts, product.firsts, x, w, y, begin, b, shift, residual,
                pattern,
            )  # fmt: skip

        work = (product.work + LIGHT_WORK * product.pixels * product.channels[1]) * group / max(product.blocks, 1)
        return body, -(-images // group) * product.blocks, work

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
        product = _product(geometry, x.shape, out.shape[3], False)
        weights = w.reshape(-1)
        with self._workers.lock:
            if not product.direct:
                weights = self._scratch("weights", product.weights)
                conv_kernels.spread_weights(product.taps, w.reshape(-1), weights, *product.channels, False)
            self._share(
                self._convolve(
                    product, x.reshape(-1), weights, out.reshape(-1), True, b,
                    NOTHING if shift is None else shift.reshape(-1),
                    NOTHING if residual is None else residual.reshape(-1),
                )
            )  # fmt: skip

    def conv_backward(
        self,
        geometry: Conv,
        dy: Array,
        x: Array,
        w: Array,
        dx: Array | None,
        dw: Array,
        db: Array,
        *,
        dshift: Array | None = None,
        add: bool = False,
    ) -> None:
        k, scratch = dy.shape[3], self._scratch
        product = _product(geometry, x.shape, k, False)
        images, size = product.images, product.channels[0] * k
        flat_x, flat_dy, flat_w, flat_dw = x.reshape(-1), dy.reshape(-1), w.reshape(-1), dw.reshape(-1)

        def weights(worker: int, start: int, stop: int) -> None:
            del worker
            conv_kernels.conv_weights_range(
                start, stop, product.group, product.slots, product.sizes, product.parts, product.firsts,
                flat_x, flat_dy, sums, product.weights,
            )  # fmt: skip

        def pixels(worker: int, start: int, stop: int) -> None:
            wide = scratch(("pattern", worker), conv_kernels.PATTERN + k)
            conv_kernels.pixel_sums_range(start, stop, flat_dy, product.pixels, k, shifts, wide)

        def collect(worker: int, start: int, stop: int) -> None:
            del worker
            conv_kernels.collect_weights(start, stop, product.collected, sums, product.groups, flat_dw, size)

        with self._workers.lock:
            whole = product.direct and product.groups == 1
            sums = flat_dw if whole else scratch("sums", product.groups * product.weights)
            sums.fill(0)
            shifts = scratch("shifts", images * k) if dshift is None else dshift.reshape(-1)
            jobs: list[Job] = []
            if dx is not None:
                adjoint = _product(geometry, x.shape, k, True)
                turned = scratch("weights", adjoint.weights)
                conv_kernels.spread_weights(adjoint.taps, flat_w, turned, *product.channels, True)
                flat_dx = dx.reshape(-1)
                jobs.append(self._convolve(adjoint, flat_dy, turned, flat_dx, not add, NOTHING, NOTHING, NOTHING))
            jobs.append((weights, product.weight_items, product.work * images / max(product.weight_items, 1)))
            jobs.append((pixels, images, float(LIGHT_WORK * product.pixels * k)))
            self._share(*jobs)
            conv_kernels.row_sums(shifts, db)
            if not whole:
                self._share(
                    (collect, geometry.kernel[0] * geometry.kernel[1], float(LIGHT_WORK * size * product.groups))
                )

    def norm(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        out: Array,
        stats: Array,
        *,
        groups: int,
        eps: float,
        silu: bool,
        modulation: Array | None = None,
    ) -> None:
        images, pixels, channels, k = len(x), x.shape[1] * x.shape[2], len(gamma), norm_kernels
        given = NOTHING if modulation is None else modulation.reshape(-1)
        flat = x.reshape(-1), gamma, beta, out.reshape(-1), stats.reshape(-1), given

        def body(worker: int, start: int, stop: int) -> None:
            rows, totals = self._rows(worker, channels)
            k.norm_range(start, stop, *flat, pixels, groups, eps, silu, rows, totals[0])

        with self._workers.lock:
            self._share((body, images, float((SILU_WORK if silu else LIGHT_WORK) * pixels * channels)))

    def norm_backward(
        self,
        dy: Array,
        x: Array,
        gamma: Array,
        beta: Array,
        stats: Array,
        dx: Array,
        dgamma: Array,
        dbeta: Array,
        *,
        groups: int,
        silu: bool,
        modulation: Array | None = None,
        dmodulation: Array | None = None,
        add: bool = False,
    ) -> None:
        images, pixels, channels = len(x), x.shape[1] * x.shape[2], len(gamma)
        k, scratch = norm_kernels, self._scratch
        given, wanted = (NOTHING if a is None else a.reshape(-1) for a in (modulation, dmodulation))
        flat = dy.reshape(-1), x.reshape(-1), gamma, beta, stats.reshape(-1), given, dx.reshape(-1)

        def body(worker: int, start: int, stop: int) -> None:
            rows, totals = self._rows(worker, channels)
            dv = scratch(("image", worker), pixels * channels)
            k.norm_backward_range(start, stop, *flat, sums, pixels, groups, silu, add, rows, totals, dv)

        with self._workers.lock:
            sums = scratch("shifts", 2 * images * channels)
            self._share((body, images, float(2 * (SILU_WORK if silu else LIGHT_WORK) * pixels * channels)))
            k.collect_norm(sums, gamma, beta, given, dgamma, dbeta, wanted)

    def _rows(self, worker: int, channels: int) -> tuple[Array, Array]:
        """Scratch of the norm kernels: rows of values and sums in float64."""
        k, length = norm_kernels, norm_kernels.ROW + channels
        rows = self._scratch(("rows", worker), k.LANES * length)
        totals = self._scratch(("totals", worker), 4 * channels)
        return rows.reshape(k.LANES, length), totals.view(np.float64).reshape(2, channels)

    def attention(self, qkv: Array, out: Array, log_sums: Array, *, heads: int) -> None:
        (images, length, channels), k, scratch = out.shape, attention_kernels, self._scratch
        flat = qkv.reshape(-1), out.reshape(-1), log_sums.reshape(-1)

        def body(worker: int, start: int, stop: int) -> None:
            k.attention_range(
                start, stop, *flat, length, channels, heads, scratch(("scores", worker), length * k.TILE),
                scratch(("turned", worker), channels * k.TILE), scratch(("lanes", worker), 2 * k.TILE).reshape(2, -1),
            )  # fmt: skip

        work = float(k.TILE * length * (4 * channels // heads + SILU_WORK))
        with self._workers.lock:
            self._share((body, images * heads * -(-length // k.TILE), work))

    def attention_backward(
        self, dy: Array, qkv: Array, out: Array, log_sums: Array, dqkv: Array, *, heads: int
    ) -> None:
        (images, length, channels), k, scratch = out.shape, attention_kernels, self._scratch
        flat = dy.reshape(-1), qkv.reshape(-1), out.reshape(-1), log_sums.reshape(-1), dqkv.reshape(-1)

        def body(worker: int, start: int, stop: int) -> None:
            k.attention_backward_range(
                start, stop, *flat, length, channels, heads, scratch(("scores", worker), length * k.TILE),
                scratch(("dscores", worker), length * k.TILE), scratch(("turned", worker), channels * k.TILE),
                scratch(("other", worker), channels * k.TILE), scratch(("lanes", worker), 2 * k.TILE).reshape(2, -1),
            )  # fmt: skip

        work = float(length * length * (10 * channels // heads + SILU_WORK))
        with self._workers.lock:
            self._share((body, images * heads, work))

    def silu(self, x: Array, out: Array) -> None:
        self._values(SILU_WORK, pointwise_kernels.silu_range, x, out)

    def silu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        self._values(SILU_WORK, pointwise_kernels.silu_backward_range, dy, x, dx, options=(add,))

    def add(self, a: Array, b: Array, out: Array) -> None:
        self._values(LIGHT_WORK, pointwise_kernels.add_range, a, b, out)

    def _values(self, work: int, kernel: Any, *arrays: Array, options: tuple[Any, ...] = ()) -> None:
        """Run a kernel over ranges of the values of arrays of one size."""
        flat = [array.reshape(-1) for array in arrays]

        def body(worker: int, start: int, stop: int) -> None:
            del worker
            kernel(start, stop, *flat, *options)

        with self._workers.lock:
            self._share((body, flat[0].size, float(work)))

    def concatenate(self, a: Array, b: Array, out: Array) -> None:
        left, right = a.shape[-1], b.shape[-1]
        both = left + right
        parts = a.reshape(-1), b.reshape(-1), out.reshape(-1)

        def body(worker: int, start: int, stop: int) -> None:
            del worker
            copy = pointwise_kernels.copy_columns
            copy(start, stop, parts[0], 0, left, parts[2], 0, both, left, False)
            copy(start, stop, parts[1], 0, right, parts[2], left, both, right, False)

        with self._workers.lock:
            self._share((body, parts[0].size // left, float(LIGHT_WORK * both)))

    def split(self, x: Array, a: Array, b: Array, *, add: bool = False) -> None:
        left, right = a.shape[-1], b.shape[-1]
        both = left + right
        parts = a.reshape(-1), b.reshape(-1), x.reshape(-1)

        def body(worker: int, start: int, stop: int) -> None:
            del worker
            copy = pointwise_kernels.copy_columns
            copy(start, stop, parts[2], 0, both, parts[0], 0, left, left, add)
            copy(start, stop, parts[2], left, both, parts[1], 0, right, right, False)

        with self._workers.lock:
            self._share((body, parts[0].size // left, float(LIGHT_WORK * both)))

    def take(self, table: Array, index: Array, out: Array, *, add: bool = False) -> None:
        pointwise_kernels.take_rows(table.reshape(-1), index, out.reshape(-1), table.shape[1], add)

    def take_backward(self, dy: Array, index: Array, dtable: Array) -> None:
        pointwise_kernels.take_rows_backward(dy.reshape(-1), index, dtable.reshape(-1), dtable.shape[1])

    def dropout(
        self, x: Array, out: Array, *, rate: float, seed: int, step: int, first_block: int, first_sample: int = 0
    ) -> None:
        size, limit, scale = x.size // max(len(x), 1), math.ceil(rate * 2.0**32), np.float32(1 / (1 - rate))
        flat_x, flat_out, keys, row = x.reshape(-1), out.reshape(-1), round_keys(seed), np.uint64(first_sample)

        def body(worker: int, start: int, stop: int) -> None:
            words = self._scratch(("words", worker), 4 * CHUNK).view(np.uint32).reshape(4, CHUNK)
            pointwise_kernels.dropout_range(
                start, stop, flat_x, flat_out, size, np.uint64(limit), scale, step, int(Stream.DROPOUT), first_block,
                row, keys, words,
            )  # fmt: skip

        with self._workers.lock:
            self._share((body, len(x), float(SILU_WORK * size)))

    def squared_error(self, y: Array, target: Array, dy: Array) -> Array:
        k = pointwise_kernels
        flat = y.reshape(-1), target.reshape(-1), dy.reshape(-1)
        if not y.size:
            return np.array([math.nan])
        scale, blocks = np.float32(2 / y.size), -(-y.size // k.BLOCK)

        def body(worker: int, start: int, stop: int) -> None:
            lanes = self._scratch(("totals", worker), 2 * k.LANES).view(np.float64)
            k.squared_error_range(start, stop, *flat, scale, sums, lanes)

        with self._workers.lock:
            sums = self._scratch("errors", 2 * blocks).view(np.float64)
            self._share((body, blocks, float(LIGHT_WORK * k.BLOCK)))
            return np.array([sum(sums.tolist()) / y.size])
