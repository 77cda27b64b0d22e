"""Convolutions on tensor cores, on CUDA: which kernels of ``conv_mma.cu`` run, and how they cut the work.

Operands are rounded to bf16 on their way into shared memory, sums are float32, and so is everything that lasts. The
tiles of outputs and input gradients are chosen for the device and change no bit; a weight gradient is cut by the sizes
of the layer and the batch alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastdiff.backends.cuda.device import SHARED_LIMITS
from fastdiff.backends.cuda.tuning import Tuning
from fastdiff.errors import BackendError
from fastdiff.kernels.cuda.runtime import STRUCTURES, TASKS, Runtime, tasks_of

if TYPE_CHECKING:
    from fastdiff.backends.cuda.conv import Partial, Product, WeightGradient

Array = Any

DEPTH, PIXELS = 32, 64  # as in conv_mma.cu
PAD = 8  # values between two rows in shared memory
WARP = 32  # threads; also the channels of x, and of dy, in the part of a weight gradient that a warp makes
FULL = 9  # parts of a block of it, for every 32 channels of dy
SIDE = 1 << 10  # its boxes have fewer rows and columns
COPY_SOURCE, COPY_GRADIENT, PAIRS = 1, 2, 4
# A weight gradient comes in so many blocks, if a chunk still has so many tiles, and all partial sums so many values.
BLOCKS, LEAST_TILES, MOST_PARTIALS = 528, 4, 1 << 24
FAN = 32  # partial sums that a thread adds up
SUM_THREADS = 256  # of conv_mma_sum
VALUE = 4  # bytes
STATIC = 256  # bytes of shared memory that conv_mma_weight has besides


class Tile(NamedTuple):
    """A variant of a kernel: its name, pixels and channels of a block, threads, and an estimate of its speed."""

    name: str
    pixels: int
    channels: int
    threads: int
    rate: float


TILES = (
    Tile("128x128", 128, 128, 256, 1.0),
    Tile("128x64", 128, 64, 256, 0.8),
    Tile("128x32", 128, 32, 256, 0.5),
    Tile("64x32", 64, 32, 128, 0.45),
)


class Shape(NamedTuple):
    """How the pixels of a tile lie.

    Attributes
    ----------
    rows_log, columns_log : int
        It has 2^rows_log rows of 2^columns_log pixels, of as many images as make it full.
    box : bool
        Whether shared memory holds all source pixels that it meets, or those of one tap at a time.
    tiles : int
        How many such tiles a phase of the target has at most.
    shared : int
        Bytes of shared memory.
    """

    rows_log: int
    columns_log: int
    box: bool
    tiles: int
    shared: int


class WeightPlan(NamedTuple):
    """How a weight gradient is cut.

    Attributes
    ----------
    taps : (int, int)
        Rows and columns of the kernel that a block makes.
    channel_blocks : int
        Channels of x that it makes, in units of 32.
    shape : Shape
    blocks : int
        For one chunk.
    chunks, chunk : int
        How many there are, and tiles of each.
    """

    taps: tuple[int, int]
    channel_blocks: int
    shape: Shape
    blocks: int
    chunks: int
    chunk: int


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def most_taps(kernel: int, stride: int, pad: int, up: int, adjoint: bool) -> int:
    """Return along an axis the taps of the phase that has the most; `conv_phase` in conv.cuh."""
    common = math.gcd(stride, up)
    if adjoint:
        ends = [(phase * up + pad - kernel + stride, phase * up + pad + up - 1) for phase in range(stride // common)]
    else:
        ends = [(phase * stride - pad, phase * stride - pad + kernel - 1) for phase in range(up // common)]
    divisor = stride if adjoint else up
    return max(0, *(high // divisor - low // divisor + 1 for low, high in ends))


def _shapes(pixels: int, images: int, count: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Logarithms of rows and columns, images, and how many: tiles for so many images of `count` pixels each."""
    logs = [(length - 1).bit_length() + 1 for length in count]
    for rows_log in range(logs[0]):
        for columns_log in range(logs[1]):
            deep = pixels >> (rows_log + columns_log)
            if deep:
                tiles = _ceil(count[0], 1 << rows_log) * _ceil(count[1], 1 << columns_log) * _ceil(images, deep)
                yield rows_log, columns_log, deep, tiles


def _side(log: int, step: int, taps: int) -> int:
    """Source pixels that 2^log target pixels meet along an axis."""
    return ((1 << log) - 1) * step + taps


@lru_cache(maxsize=1024)
def gather_shape(
    sizes: bytes, adjoint: bool, tile: Tile, copied: bool, limit: int, stages: int = Tuning().stages
) -> Shape | None:
    """Return the shape that stages the fewest pixels, None where none fits into so much shared memory.

    Parameters
    ----------
    sizes : bytes
        "ConvSizes".
    adjoint : bool
        Of the input gradient.
    tile : Tile
    copied : bool
        Whether source pixels are copied while the block computes, which takes room.
    limit : int
        Bytes.
    stages : int
        Of weights, in shared memory.
    """
    of = np.frombuffer(sizes, STRUCTURES["ConvSizes"])[0]
    size = of["input" if adjoint else "output"].tolist()
    period, step = of["up_period"].tolist(), of["stride_period"].tolist()
    if adjoint:
        period, step = step, period
    count = _ceil(size[0], period[0]), _ceil(size[1], period[1])
    kernel, stride, pad, up = (of[name].tolist() for name in ("kernel", "stride", "pad", "up"))
    taps = [most_taps(kernel[a], stride[a], pad[a], up[a], adjoint) for a in (0, 1)]
    every = math.prod(taps)
    line, lines = (DEPTH, tile.channels) if adjoint else (tile.channels, DEPTH)
    weights = 2 * stages * lines * (line + PAD)
    best: tuple[int, Shape] | None = None
    for rows_log, columns_log, deep, tiles in _shapes(tile.pixels, int(of["images"]), count):
        whole = deep * _side(rows_log, step[0], taps[0]) * _side(columns_log, step[1], taps[1])
        for box in (True, False) if every > 1 else (False,):
            pixels = whole if box else tile.pixels
            shared = weights + pixels * (4 * (DEPTH + PAD) + 4 * DEPTH * copied) + 4 * pixels * (1 if box else every)
            cost = tiles * (2 * tile.pixels + pixels * (1 if box else every))
            if shared <= limit and (best is None or cost < best[0]):
                best = cost, Shape(rows_log, columns_log, box, tiles, shared)
    return best[1] if best else None


@lru_cache(maxsize=512)
def weight_plan(sizes: bytes) -> WeightPlan:
    """Return how a weight gradient is cut; it fits into the shared memory of every device."""
    of = np.frombuffer(sizes, STRUCTURES["ConvSizes"])[0]
    images, channels, outputs = (int(of[name]) for name in ("images", "channels", "outputs"))
    (height, width), kernel, stride = (tuple(of[name].tolist()) for name in ("output", "kernel", "stride"))
    across = WARP * warps_across(outputs)
    for taps in (kernel, (1, kernel[1]), (1, 1)):
        for channel_blocks in range(min(FULL // math.prod(taps), _ceil(channels, WARP)), 0, -1):
            found = []
            for rows_log, columns_log, deep, tiles in _shapes(PIXELS, images, (height, width)):
                sides = _side(rows_log, stride[0], taps[0]), _side(columns_log, stride[1], taps[1])
                pixels = deep * math.prod(sides)
                of_x = pixels * (4 * (channel_blocks * WARP + PAD) + 4 * channel_blocks * WARP)
                of_dy = PIXELS * (4 * (across + PAD) + 4 * across)
                shared = of_x + of_dy + 4 * PIXELS + _ceil(pixels, 4) * 16
                if max(sides) < SIDE and shared + STATIC <= min(SHARED_LIMITS.values()):
                    found.append((tiles * (PIXELS + pixels), Shape(rows_log, columns_log, True, tiles, shared)))
            if found:
                shape = min(found)[1]
                blocks = _ceil(kernel[0], taps[0]) * _ceil(kernel[1], taps[1])
                blocks *= _ceil(channels, channel_blocks * WARP) * _ceil(outputs, across)
                values = (math.prod(kernel) * channels + 1) * outputs
                most = min(BLOCKS // blocks, shape.tiles // LEAST_TILES, MOST_PARTIALS // values)
                chunk = max(1, _ceil(shape.tiles, max(1, most)))
                return WeightPlan(taps, channel_blocks, shape, blocks, max(1, _ceil(shape.tiles, chunk)), chunk)
    raise BackendError(f"precision 'bf16' has no kernel for a convolution with stride {stride}; 'float32' has")


def source_of(stages: int) -> str:
    """Return the source that holds so many stages of weights."""
    return "conv_mma" if stages == Tuning().stages else f"conv_mma.{stages}"


def _pairs(form: Product, w: Array) -> int:
    """Pairs of bf16 in packed weights."""
    return form.places * int(w.shape[2]) * _ceil(w.shape[3], 8) * 4


def warps_across(outputs: int) -> int:
    """Warps of a block of a weight gradient that lie side by side along the channels of dy."""
    return 1 if outputs <= WARP else 2


def by_kind(tasks: Sequence[WeightGradient]) -> list[list[WeightGradient]]:
    """Return weight gradients, those of one kernel together."""
    kinds = [[task for task in tasks if warps_across(task.db.size) == warps] for warps in (1, 2)]
    return [kind for kind in kinds if kind]


class PackedWeights:
    """Many weights, views of one buffer, each as `TensorCores.weights` packs it, in one array and by one launch.

    Parameters
    ----------
    runtime : Runtime
    forms : list of list of Product
        Of every convolution, forward and, where it is wanted, backward.
    """

    def __init__(self, runtime: Runtime, forms: Sequence[Sequence[Product]]) -> None:
        self.runtime, self.forms = runtime, forms
        self._packed: tuple[Array, Array, Array, list[list[Array]]] | None = None

    def run(self, weights: Sequence[Array]) -> list[list[Array]]:
        if self._packed is None:
            self._packed = self._made(weights)
        packed, places, sizes, ready = self._packed
        args = (weights[0], packed, places, sizes, len(places), packed.size)
        self.runtime.launch("conv_mma", "conv_mma_prepare", *self.runtime.grid_1d(packed.size), args)
        return ready

    def _made(self, weights: Sequence[Array]) -> tuple[Array, Array, Array, list[list[Array]]]:
        """Memory for the packed weights, where each lies in it and in the buffer, their sizes, and their views."""
        base, sizes, places, ends, first = self.runtime.address(weights[0]), [], [], [], 0
        for w, of in zip(weights, self.forms, strict=True):
            for adjoint, form in enumerate(of):
                places.append((first, (self.runtime.address(w) - base) // w.itemsize, adjoint))
                sizes.append(form.sizes)
                first += _pairs(form, w)
                ends.append(first)
        packed = self.runtime.empty((first,))
        there = self.runtime.asarray(np.array(places, np.int64), np.int64)
        records = self.runtime.asarray(np.concatenate(sizes).view(np.uint8), np.uint8)
        views = iter([packed[start:end] for (start, *_), end in zip(places, ends, strict=True)])
        ready = [[next(views) for _ in of] for of in self.forms]
        return packed, there, records, [[each[0], each[-1]] for each in ready]


class TensorCores:
    """What `ConvOperations` launches where its precision is "bf16".

    Parameters
    ----------
    runtime : Runtime
    scratch : callable
        Takes a name and a size and returns an array of at least so many float32 values, for the current queue alone.
    tuning : Tuning
    """

    def __init__(self, runtime: Runtime, scratch: Callable[[str, int], Array], tuning: Tuning) -> None:
        self.runtime, self.scratch, self.tuning = runtime, scratch, tuning

    def weights(self, form: Product, w: Array, adjoint: bool) -> Array:
        """Return the weights as `gather` reads them: folded for upsampled images, in pairs of bf16."""
        pairs = _pairs(form, w)
        packed = self.scratch("packed", pairs)
        entry = "conv_mma_pack_adjoint" if adjoint else "conv_mma_pack"
        self.runtime.launch("conv_mma", entry, *self.runtime.grid_1d(pairs), (w, packed, form.sizes))
        return packed

    def gather(
        self, form: Product, source: Array, w: Array, target: Array, added: tuple[Array | None, ...], adjoint: bool
    ) -> None:
        """Fill `target`: the output, to which bias, shift and residual are added, or the input gradient and another."""
        channels, multiprocessors = target.shape[-1], self.runtime.multiprocessors
        copied = self._together(4, source.shape[-1], source)
        entry = "conv_mma_adjoint" if adjoint else "conv_mma"
        choices: list[tuple[float, int, Tile, Shape, int]] = []
        for tiles, stages in (
            (self.tuning.of(entry, TILES, form.sizes), self.tuning.stages),
            (self.tuning.of(entry, TILES), self.tuning.stages),
            (TILES, Tuning().stages),
        ):
            for tile in tiles if not choices else ():
                shape = gather_shape(form.sizes.tobytes(), adjoint, tile, copied, self.runtime.shared_limit, stages)
                if shape is not None:
                    blocks = shape.tiles * form.pairs * _ceil(channels, tile.channels)
                    cost = _ceil(blocks, multiprocessors) * tile.pixels * tile.channels / tile.rate
                    choices.append((cost, blocks, tile, shape, stages))
        if not choices:
            kernel = tuple(form.sizes["kernel"][0].tolist())
            raise BackendError(f"precision 'bf16' has no kernel for a convolution of {kernel} taps; 'float32' has")
        _, blocks, tile, shape, stages = min(choices)
        bias, shift, residual = (None, None, *added) if adjoint else added
        flags = COPY_SOURCE * copied + PAIRS * self._together(2, channels, target)
        self.runtime.launch(
            source_of(stages), f"{entry}_{tile.name}", blocks, tile.threads,
            (source, w, bias, shift, residual, target, form.sizes, shape.rows_log, shape.columns_log, shape.box, flags),
            shape.shared,
        )  # fmt: skip

    def values_of(self, task: WeightGradient) -> int:
        """Return how many values the partial sums of a weight gradient have."""
        chunks = weight_plan(task.form.sizes.tobytes()).chunks
        return chunks * (task.dw.size + task.db.size) if chunks > 1 else 0

    def start(self, tasks: Sequence[WeightGradient], room: Array, number: int) -> list[Partial]:
        """Launch what makes dw, db and dshift, or partial sums, which are returned and lie in `room`; all of a kind."""
        from fastdiff.backends.cuda.conv import Partial, image_blocks

        first, warps = tasks[0], warps_across(tasks[0].db.size)
        rows: list[tuple[Any, ...]] = []
        partials: list[Partial] = []
        blocks = at = most = shared = 0
        base = bias_base = room
        for task in tasks:
            form, dy, x, dw, db, _ = task
            plan, row = weight_plan(form.sizes.tobytes()), dw.size + db.size
            threads = math.prod(plan.taps) * plan.channel_blocks * warps * WARP
            to, to_bias = dw, db
            if plan.chunks > 1:
                sums = room[at : at + plan.chunks * row]
                to, to_bias, at = sums, sums[dw.size :], at + sums.size
                partials.append(Partial(task, sums, to_bias, plan.chunks))
            flags = COPY_SOURCE * self._together(4, dw.shape[2], x) + COPY_GRADIENT * self._together(4, db.size, dy)
            flags += PAIRS * self._together(2, db.size, to)
            base, bias_base = (to, to_bias) if not rows else (base, bias_base)
            pairs = (x, first.x), (dy, first.dy), (to, base), (to_bias, bias_base)
            places = [self._apart(*pair) for pair in pairs]
            shape = plan.shape.rows_log, plan.shape.columns_log, *plan.taps, plan.channel_blocks
            rows.append((*places, row, form.sizes[0], *shape, plan.chunk, flags, threads, blocks))
            blocks += plan.chunks * plan.blocks
            most, shared = max(most, threads), max(shared, plan.shape.shared)
        for task in tasks:
            if task.dshift is not None:
                places = [0, self._apart(task.dy, first.dy), self._apart(task.dshift, base), 0, 0]
                rows.append((*places, task.form.sizes[0], *(0,) * 8, blocks))
                blocks += image_blocks(task.dshift)
        args = (first.x, first.dy, base, bias_base, tasks_of("MmaTask", rows))
        self.runtime.launch("conv_mma", f"conv_mma_weight_{WARP * warps}", blocks, most, args, shared)
        return partials

    def add_up(self, partials: Sequence[Partial]) -> None:
        """Fill dw and db with the sums of partial sums, `FAN` at a time, and so in levels."""
        level = 0
        while partials:
            level += 1
            first, further, at = partials[0], [], 0
            room = sum(_ceil(each.chunks, FAN) * self._row(each) for each in partials if each.chunks > FAN)
            buffer = self.scratch(f"partials, level {level}", max(1, room))
            rows: list[tuple[int, ...]] = []
            sizes: list[int] = []
            for each in partials:
                task, row, groups = each.task, self._row(each), _ceil(each.chunks, FAN)
                to, to_bias = task.dw, task.db
                if groups > 1:
                    sums = buffer[at : at + groups * row]
                    to, to_bias, at = sums, sums[task.dw.size :], at + sums.size
                    further.append(each._replace(sums=sums, of_bias=to_bias, chunks=groups))
                pairs = (each.sums, first.sums), (to, first.task.dw), (to_bias, first.task.db)
                rows.append((*(self._apart(*pair) for pair in pairs), row, task.dw.size, each.chunks))
                sizes.append(_ceil(groups * row, SUM_THREADS))
            for begin in range(0, len(rows), TASKS["SumTask"]):
                some, blocks = slice(begin, begin + TASKS["SumTask"]), itertools.accumulate([0, *sizes[begin:]])
                record = tasks_of("SumTask", [(*row, block) for row, block in zip(rows[some], blocks, strict=False)])
                args = (first.sums, first.task.dw, first.task.db, record, FAN)
                self.runtime.launch("conv_mma", "conv_mma_sum", sum(sizes[some]), SUM_THREADS, args)
            partials = further

    def _row(self, partial: Partial) -> int:
        return int(partial.task.dw.size + partial.task.db.size)

    def _apart(self, array: Array, base: Array) -> int:
        """How many values an array lies behind another."""
        return (self.runtime.address(array) - self.runtime.address(base)) // VALUE

    def _together(self, count: int, channels: int, array: Array) -> bool:
        """Whether so many values of a row of `channels` are aligned to their size."""
        return channels % count == 0 and self.runtime.address(array) % (4 * count) == 0
