"""The convolutions of the CUDA backend, in float32: which kernels of ``conv.cu`` run, on which tiles and buffers.

The matrix products of perceptrons are convolutions as well.

Tiles are chosen for the device, and change no bit: an output is one sum whatever they are. The pixels of a weight
gradient are cut into chunks by the sizes of the layer and the batch alone. Nothing is allocated but scratch, which
grows to the largest layer and is kept, nothing is read back, and all work goes to the current stream.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.conv_mma import PackedWeights, TensorCores, by_kind
from fastdiff.backends.cuda.cudnn import Cudnn
from fastdiff.backends.cuda.device import Device
from fastdiff.backends.cuda.norm_gradients import NormGradients
from fastdiff.backends.cuda.tuning import Tuning, tuning
from fastdiff.backends.layers import Conv, ConvShapes, Later, Prepared
from fastdiff.backends.numpy.host import AsTheyAre
from fastdiff.forks import cached_property
from fastdiff.kernels.cuda.runtime import STRUCTURES, TASKS, tasks_of

Array = Any

VECTOR = 16  # bytes
DEPTH = 16  # pixels that a tile of a weight gradient takes at once: chunks are multiples
# A weight gradient is cut into so many blocks of so many rows and columns, if every chunk still has so many pixels and
# all partial sums so many values.
BLOCKS, BLOCK_ROWS, BLOCK_COLUMNS = 528, 128, 64
LEAST_CHUNK, MOST_PARTIALS = 256, 1 << 24
SUM_THREADS, SUM_COLUMNS = 256, 32  # of conv_image_sums, and of conv_weights_finish
COLUMNS = 8  # of a block of column_sums, which has as many threads
WAIT = 16  # convolutions
VALUE = 4  # bytes
TOGETHER = 1 << 25  # all partial sums of the weight gradients that one launch makes have so many values, or are of one


class Tile(NamedTuple):
    """A variant of a kernel.

    Attributes
    ----------
    name : str
        What follows the kernel's name.
    pixels, channels : int
        Of the outputs of a block; for a weight gradient its rows, taps times channels, and channels.
    threads : int
    rate : float
        Outputs in the same time, compared with the widest: an estimate.
    """

    name: str
    pixels: int
    channels: int
    threads: int
    rate: float


TILES = (
    Tile("128x64", 128, 64, 128, 1.0),
    Tile("64x32", 64, 32, 128, 0.65),
    Tile("128x8", 128, 8, 64, 0.3),
)
ROWS = Tile("rows", 32, 32, 256, 0.5)  # for images of one pixel: another order of additions


class Product(NamedTuple):
    """A convolution, or its input gradient, as a matrix product.

    Attributes
    ----------
    sizes : ndarray
        One "ConvSizes".
    pixels : int
        Of the target, in the largest phase.
    pairs : int
        Of phases along rows and columns.
    places : int
        Matrices (C, K) of the weights: those of the kernel, or of folded weights.
    """

    sizes: npt.NDArray[Any]
    pixels: int
    pairs: int
    places: int


@lru_cache(maxsize=512)
def product(geometry: Conv, x: tuple[int, ...], out: tuple[int, ...], adjoint: bool) -> Product:
    """Return the product for images of these shapes; see conv.cuh for phases and folded weights."""
    (n, *source, channels), (_, *target, outputs) = x, out
    common = [math.gcd(stride, up) for stride, up in zip(geometry.stride, geometry.up, strict=True)]
    up_period = [up // g for up, g in zip(geometry.up, common, strict=True)]
    stride_period = [stride // g for stride, g in zip(geometry.stride, common, strict=True)]
    periods, size = (stride_period, source) if adjoint else (up_period, target)
    fold, places = [0, 0], list(geometry.kernel)
    if geometry.up != (1, 1):
        for axis, (kernel, stride, up) in enumerate(zip(geometry.kernel, geometry.stride, geometry.up, strict=True)):
            # The most inputs that neighbouring taps meet; the most outputs that meet an input through some tap.
            fold[axis] = -(-(kernel + up - 1) // (stride if adjoint else up))
            places[axis] = periods[axis] * fold[axis]
    values = (
        n, channels, outputs, *source, *target, *geometry.kernel, *geometry.stride, geometry.pad[0], geometry.pad[2],
        *geometry.up, *up_period, *stride_period, *fold,
    )  # fmt: skip
    sizes = np.array(values, np.int32).view(STRUCTURES["ConvSizes"])
    pixels = n * math.prod(-(-length // period) for length, period in zip(size, periods, strict=True))
    return Product(sizes, pixels, math.prod(periods), math.prod(places))


def blocks_of(tile: Tile, pixels: int, channels: int, times: int) -> int:
    """Return how many blocks make so many outputs, `times` over."""
    return -(-pixels // tile.pixels) * -(-channels // tile.channels) * times


def best_tile(multiprocessors: int, *outputs: tuple[int, int, int], tiles: Sequence[Tile] | None = None) -> Tile:
    """Return the tile that makes all outputs, as for `blocks_of`, in the fewest turns of all multiprocessors."""

    def cost(tile: Tile) -> float:
        blocks = sum(blocks_of(tile, *each) for each in outputs)
        return -(-blocks // multiprocessors) * tile.pixels * tile.channels / tile.rate

    return min(TILES if tiles is None else tiles, key=cost)


def chunks_of(pixels: int, pairs: int, rows: int, outputs: int) -> tuple[int, int]:
    """Return how many chunks the pixels of a weight gradient of (rows, outputs) come in, and pixels of each."""
    tiles = -(-rows // BLOCK_ROWS) * -(-outputs // BLOCK_COLUMNS) * pairs
    most = min(BLOCKS // tiles, pixels // LEAST_CHUNK, MOST_PARTIALS // (rows * outputs * pairs))
    chunk = max(1, -(-pixels // max(1, most) // DEPTH)) * DEPTH
    return max(1, -(-pixels // chunk)), chunk


class WeightGradient(NamedTuple):
    """What is to be made of dy and x: dw, db and, where it is wanted, dshift; `form` is that of the forward pass."""

    form: Product
    dy: Array
    x: Array
    dw: Array
    db: Array
    dshift: Array | None = None


class Partial(NamedTuple):
    """The partial sums of a weight gradient, those of its bias, and how many there are."""

    task: WeightGradient
    sums: Array
    of_bias: Array
    chunks: int


@dataclass
class Waiting:
    """Gradients that wait in `ConvOperations.gradients_together`: their operands, or partial sums that are there.

    Attributes
    ----------
    rounds, values : int
        In how many buffers these lie, and how many values they have.
    """

    norms: NormGradients
    convs: list[WeightGradient] = field(default_factory=list)
    partials: list[Partial] = field(default_factory=list)
    rounds: int = 0
    values: int = 0


def partial_sums(task: WeightGradient) -> tuple[int, int, int, int, bool]:
    """Return rows of a weight gradient, chunks, pixels of each, values of partial sums, and whether there are any."""
    form, (channels, outputs) = task.form, task.dw.shape[2:]
    rows = form.places // form.pairs * (-(-channels // 4) * 4)  # of one pair of phases
    chunks, chunk = chunks_of(form.pixels, form.pairs, rows, outputs)
    finish = chunks > 1 or bool(form.sizes["fold"].any())
    return rows, chunks, chunk, chunks * form.places * channels * outputs, finish


def _values_of(task: WeightGradient) -> int:
    *_, values, finish = partial_sums(task)
    return values * finish


def image_blocks(dshift: Array) -> int:
    """Return how many blocks make the sums over images."""
    return len(dshift) * -(-dshift.shape[1] // SUM_COLUMNS) if dshift.size else 0


def _pixels(rows: Array) -> Array:
    """Rows (n, C) as the pixels of one image."""
    return rows.reshape(1, len(rows), 1, -1)


class ConvOperations(Device):
    """The convolutions of `LayerBackend`."""

    precision = "float32"
    """Or "bf16": products on tensor cores (`TensorCores`)."""
    _cudnn: Cudnn | None = None
    """Takes what it can, where there is one; then no gradients wait."""

    @property
    def gradients_wait(self) -> int:
        return 0 if self._cudnn else WAIT

    @cached_property
    def _local(self) -> threading.local:
        return threading.local()

    @property
    def _waiting(self) -> Waiting | None:
        """What waits, in this thread; None: nothing may."""
        return getattr(self._local, "waiting", None)

    def gradients_together(self) -> AbstractContextManager[Later]:
        return nullcontext(Later()) if self._cudnn else self._together()

    @contextmanager
    def _together(self) -> Iterator[Later]:
        waiting = self._local.waiting = Waiting(NormGradients(self.runtime, self._apart))

        def begin() -> None:
            # Scratch that this takes is taken by nothing else before all is finished.
            with self._lock, self.runtime.aside():
                self._start_convs(waiting.convs, waiting)
            waiting.convs.clear()

        try:
            yield Later(begin, self.runtime.rejoin)
            begin()
            with self._lock, self.runtime.aside():
                self._add_up(waiting.partials)
            waiting.norms.finish()
            self.runtime.rejoin()
        finally:
            self._local.waiting = None

    @cached_property
    def _tensor_cores(self) -> TensorCores:
        return TensorCores(self.runtime, self._scratch, self._tuning)

    @cached_property
    def _tuning(self) -> Tuning:
        return tuning(self.runtime.arch)

    def prepare(self, convs: Sequence[ConvShapes], backward: bool) -> Prepared:
        if self.precision != "bf16" or self._cudnn or not convs:
            return AsTheyAre()
        adjoints = (False, True)[: 1 + backward]
        forms = [[product(*conv, adjoint) for adjoint in adjoints] for conv in convs]
        return PackedWeights(self.runtime, forms)

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
        if out.size:
            with self._lock:
                if self._cudnn and self._cudnn.conv(geometry, x, w, b, out, shift, residual):
                    return
                form = product(geometry, x.shape, out.shape, False)
                self._gather("conv", form, x, self._weights(form, w, False), out, (b, shift, residual))

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
        with self._lock:
            wanted = dx is not None and dx.size > 0
            if wanted and not (self._cudnn and self._cudnn.input_gradient(geometry, dy, w, dx, add)):
                form = product(geometry, x.shape, dy.shape, True)
                self._gather("conv_input", form, dy, self._weights(form, w, True), dx, (dx if add else None,))
            if dw is None or db is None or self._cudnn:
                self._sum_images(dy, dshift)
            if dw is None or db is None:
                return
            if self._cudnn:
                if self._cudnn.weight_gradient(geometry, dy, x, dw, db, dshift):
                    return
                dshift = None  # it is there
            task = WeightGradient(product(geometry, x.shape, dy.shape, False), dy, x, dw, db, dshift)
            if self._waiting is not None:
                self._waiting.convs.append(task)
            else:
                self._start_convs([task])

    def _weights(self, form: Product, w: Array, adjoint: bool) -> Array:
        """The weights as a product reads them: w itself, or folded for upsampled images; prepared ones are so."""
        if self.precision == "bf16":
            return w if w.ndim == 1 else self._tensor_cores.weights(form, w, adjoint)
        if not form.sizes["fold"].any():
            return w
        size = form.places * w.shape[2] * w.shape[3]
        folded = self._scratch("weights", size)
        self.runtime.launch("conv", "conv_fold", *self.runtime.grid_1d(size), (w, folded, form.sizes, adjoint))
        return folded

    def _gather(
        self, entry: str, form: Product, source: Array, w: Array, target: Array, added: tuple[Array | None, ...]
    ) -> None:
        """Launch a product; `added` are arrays that are added to it, where given."""
        if self.precision == "bf16":
            self._tensor_cores.gather(form, source, w, target, added, entry == "conv_input")
        else:
            self._gather_float32(entry, form, source, w, target, added, rows=target.shape[1:3] == (1, 1))

    def _gather_float32(
        self,
        entry: str,
        form: Product,
        source: Array,
        w: Array,
        target: Array,
        added: tuple[Array | None, ...],
        *,
        rows: bool,
    ) -> None:
        channels = target.shape[-1]
        outputs = form.pixels, channels, form.pairs
        tiles = (ROWS,) if rows else self._tuning.of(entry, TILES, form.sizes)
        tile = best_tile(self.runtime.multiprocessors, outputs, tiles=tiles)
        vectors = self._vectors((source, source.shape[-1]), (w, int(form.sizes["outputs"][0])))
        vectors += 4 * self._fours(channels, target, *added)
        args = (source, w, *added, target, form.sizes, vectors)
        self.runtime.launch("conv", f"{entry}_{tile.name}", blocks_of(tile, *outputs), tile.threads, args)

    def _start_convs(self, tasks: Sequence[WeightGradient], waiting: Waiting | None = None) -> None:
        """Fill dw, db and dshift; what comes in partial sums may stay so and wait."""
        of_bf16 = self.precision == "bf16"
        kind, start = ("MmaTask", self._tensor_cores.start) if of_bf16 else ("WeightTask", self._start_float32)
        values_of = self._tensor_cores.values_of if of_bf16 else _values_of
        for alike in by_kind(tasks) if of_bf16 else [list(tasks)]:
            while alike:
                some: list[WeightGradient] = []
                values = launched = 0
                while alike and launched + 1 + (alike[0].dshift is not None) <= TASKS[kind]:
                    more = values_of(alike[0])
                    if some and values + more > TOGETHER:
                        break
                    launched += 1 + (alike[0].dshift is not None)
                    values += more
                    some.append(alike.pop(0))
                number = waiting.rounds if waiting else 0
                partials = start(some, self._scratch(f"partials of {number}", max(1, values)), number)
                if waiting is None:
                    self._add_up(partials)
                    continue
                waiting.partials += partials
                waiting.values += values
                waiting.rounds += bool(partials)
                if waiting.values > TOGETHER:
                    self._add_up(waiting.partials)
                    waiting.partials, waiting.values, waiting.rounds = [], 0, 0

    def _add_up(self, partials: Sequence[Partial]) -> None:
        """Fill dw and db with the sums of partial sums, in order."""
        if self.precision == "bf16":
            self._tensor_cores.add_up(partials)
        else:
            self._finish_float32(partials)

    def _finish_float32(self, partials: Sequence[Partial]) -> None:
        for begin in range(0, len(partials), TASKS["FinishTask"]):
            some, rows, blocks = partials[begin : begin + TASKS["FinishTask"]], [], 0
            first = some[0]
            for task, sums, of_bias, chunks in some:
                pairs = (sums, first.sums), (of_bias, first.of_bias), (task.dw, first.task.dw), (task.db, first.task.db)
                rows.append((*(self._apart(*pair) for pair in pairs), task.form.sizes[0], chunks, blocks))
                blocks += -(-(task.dw.size + task.db.size) // SUM_THREADS)
            args = (first.sums, first.of_bias, first.task.dw, first.task.db, tasks_of("FinishTask", rows))
            self.runtime.launch("conv", "conv_weights_finish", blocks, SUM_THREADS, args)

    def _start_float32(self, tasks: Sequence[WeightGradient], room: Array, number: int) -> list[Partial]:
        """Launch what makes dw, db and dshift, or partial sums, which are returned and lie in `room`."""
        first, plans = tasks[0], [partial_sums(task) for task in tasks]
        outputs = [
            (rows, task.db.size, task.form.pairs * chunks)
            for task, (rows, chunks, *_) in zip(tasks, plans, strict=True)
        ]
        tiles = self._tuning.of("conv_weights", TILES)
        tile = best_tile(self.runtime.multiprocessors, *outputs, tiles=tiles)
        bias_room = self._scratch(f"sums of {number}", max(1, sum(times * width for _, width, times in outputs)))
        rows: list[tuple[Any, ...]] = []
        partials: list[Partial] = []
        blocks = at = bias_at = 0
        base = bias_base = room
        for task, (_, chunks, chunk, values, finish), each in zip(tasks, plans, outputs, strict=True):
            form, dy, x, dw, db, _ = task
            to, to_bias = dw, db
            if finish:
                to, to_bias = room[at : at + values], bias_room[bias_at : bias_at + each[1] * each[2]]
                partials.append(Partial(task, to, to_bias, chunks))
                at, bias_at = at + values, bias_at + to_bias.size
            vectors = self._vectors((x, dw.shape[2]), (dy, db.size)) + 4 * self._fours(db.size, to)
            base, bias_base = (to, to_bias) if not rows else (base, bias_base)
            pairs = (x, first.x), (dy, first.dy), (to, base), (to_bias, bias_base)
            rows.append((*(self._apart(*pair) for pair in pairs), chunk, form.sizes[0], vectors, blocks))
            blocks += blocks_of(tile, *each)
        for task in tasks:
            if task.dshift is not None:
                places = self._apart(task.dy, first.dy), self._apart(task.dshift, base)
                rows.append((0, *places, 0, 0, task.form.sizes[0], 0, blocks))
                blocks += image_blocks(task.dshift)
        args = (first.x, first.dy, base, bias_base, tasks_of("WeightTask", rows))
        self.runtime.launch("conv", f"conv_weights_{tile.name}", blocks, tile.threads, args)
        return partials

    def _apart(self, array: Array, base: Array) -> int:
        """How many values an array lies behind another."""
        return (self.runtime.address(array) - self.runtime.address(base)) // VALUE

    def linears(self, x: Array, layers: Sequence[tuple[Array, Array, Array]]) -> None:
        x = x.reshape(len(x), 1, 1, -1)
        with self._lock:
            for begin in range(0, len(layers), TASKS["GatherTask"]):
                some, rows, blocks = layers[begin : begin + TASKS["GatherTask"]], [], 0
                first = some[0]
                for w, b, out in some:
                    form = product(Conv(), x.shape, (len(x), 1, 1, b.size), False)
                    vectors = self._vectors((x, x.shape[3]), (w, b.size)) + 4 * self._fours(b.size, out, b)
                    places = (self._apart(*pair) for pair in zip((w, b, out), first, strict=True))
                    rows.append((0, *places, form.sizes[0], vectors, blocks))
                    blocks += blocks_of(ROWS, form.pixels, b.size, 1)
                args = (x, *first, tasks_of("GatherTask", rows))
                self.runtime.launch("conv", "conv_rows_many", blocks, ROWS.threads, args)

    def linears_backward(self, dx: Array, layers: Sequence[tuple[Array, Array]], *, add: bool = False) -> None:
        n, channels = len(dx), dx.size // max(1, len(dx))
        if dx.size == 0:
            return
        with self._lock:
            parts = self._scratch("parts", (len(layers) + add) * dx.size)
            for begin in range(0, len(layers), TASKS["GatherTask"]):
                some, rows, blocks = layers[begin : begin + TASKS["GatherTask"]], [], 0
                first = some[0]
                for i, (dy, w) in enumerate(some, begin):
                    form = product(Conv(), (n, 1, 1, channels), (n, 1, 1, dy.size // n), True)
                    part = parts[i * dx.size : (i + 1) * dx.size]
                    vectors = self._vectors((dy, dy.size // n), (w, dy.size // n)) + 4 * self._fours(channels, part)
                    pairs = (dy, first[0]), (w, first[1])
                    places = (*(self._apart(*pair) for pair in pairs), 0, i * dx.size)
                    rows.append((*places, form.sizes[0], vectors, blocks))
                    blocks += blocks_of(ROWS, form.pixels, channels, 1)
                args = (*first, parts, tasks_of("GatherTask", rows))
                self.runtime.launch("conv", "conv_input_rows_many", blocks, ROWS.threads, args)
            if add:
                self._sum_columns(dx, parts[len(layers) * dx.size :], 1)
            self._sum_columns(parts, dx, len(layers) + add)

    def _sum_columns(self, x: Array, out: Array, rows: int) -> None:
        """Fill out with the sums of the columns of x."""
        if out.size:
            grid, block = self.runtime.grid_1d(-(-out.size // COLUMNS) * SUM_THREADS, SUM_THREADS)
            self.runtime.launch("pointwise", "column_sums", grid, block, (x, out, rows, out.size))

    def _sum_images(self, dy: Array, dshift: Array | None) -> None:
        """Fill dshift, where there is one."""
        if dshift is not None and dshift.size:
            images, height, width, outputs = dy.shape
            grid, block = self.runtime.grid_1d(images * -(-outputs // SUM_COLUMNS) * SUM_THREADS, SUM_THREADS)
            args = (dy, dshift, images, height * width, outputs)
            self.runtime.launch("conv", "conv_image_sums", grid, block, args)

    def _dense(self, x: Array, w: Array, out: Array) -> None:
        """Fill `out` (n, K) with x (n, C) w (C, K) in float32: a convolution of one image of n pixels."""
        x, w, out = _pixels(x), w.reshape(1, 1, *w.shape), _pixels(out)
        form = product(Conv(), x.shape, out.shape, False)
        self._gather_float32("conv", form, x, w, out, (None, None, None), rows=False)

    def _dense_backward(
        self, dy: Array, x: Array, w: Array, dx: Array | None, dw: Array | None, db: Array | None
    ) -> None:
        """Fill what is wanted of dx = dy w^T, and of dw = x^T dy with db, the column sums of dy."""
        dy, x, w = _pixels(dy), _pixels(x), w.reshape(1, 1, *w.shape)
        if dx is not None:
            form = product(Conv(), x.shape, dy.shape, True)
            self._gather_float32("conv_input", form, dy, w, _pixels(dx), (None,), rows=False)
        if dw is not None and db is not None:
            form, dw = product(Conv(), x.shape, dy.shape, False), dw.reshape(1, 1, *dw.shape)
            task = WeightGradient(form, dy, x, dw, db)
            partials = self._scratch("partials of 0", max(1, _values_of(task)))
            self._finish_float32(self._start_float32([task], partials, 0))

    def _vectors(self, source: tuple[Array, int], weight: tuple[Array, int]) -> int:
        """Which operands are read 16 bytes at once: arrays with the length of their rows."""
        return self._fours(source[1], source[0]) + 2 * self._fours(weight[1], weight[0])

    def _fours(self, channels: int, *arrays: Array | None) -> bool:
        """Whether rows of so many channels can be read 16 bytes at once."""
        addresses = [self.runtime.address(array) for array in arrays if array is not None]
        return channels % 4 == 0 and all(address % VECTOR == 0 for address in addresses)
