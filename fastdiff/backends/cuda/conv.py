"""The convolutions of the CUDA backend, in float32: which kernels of ``conv.cu`` run, on which tiles and buffers.

The matrix products of perceptrons are convolutions as well.

Tiles are chosen for the device, and change no bit: an output is one sum whatever they are. The pixels of a weight
gradient are cut into chunks by the sizes of the layer and the batch alone. Nothing is allocated but scratch, which
grows to the largest layer and is kept, nothing is read back, and all work goes to the current stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.conv_mma import PackedWeights, TensorCores
from fastdiff.backends.cuda.cudnn import Cudnn
from fastdiff.backends.cuda.device import Device
from fastdiff.backends.layers import Conv, ConvShapes, Prepared
from fastdiff.backends.numpy.host import AsTheyAre
from fastdiff.forks import cached_property
from fastdiff.kernels.cuda.runtime import STRUCTURES

Array = Any

VECTOR = 16  # bytes
DEPTH = 16  # pixels that a tile of a weight gradient takes at once: chunks are multiples
# A weight gradient is cut into so many blocks of so many rows and columns, if every chunk still has so many pixels and
# all partial sums so many values.
BLOCKS, BLOCK_ROWS, BLOCK_COLUMNS = 528, 128, 64
LEAST_CHUNK, MOST_PARTIALS = 256, 1 << 24
SUM_THREADS, SUM_COLUMNS = 256, 32  # of conv_image_sums


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


def best_tile(pixels: int, channels: int, times: int, multiprocessors: int) -> Tile:
    """Return the tile that makes so many outputs, `times` over, in the fewest turns of all multiprocessors."""

    def cost(tile: Tile) -> float:
        blocks = -(-pixels // tile.pixels) * -(-channels // tile.channels) * times
        return -(-blocks // multiprocessors) * tile.pixels * tile.channels / tile.rate

    return min(TILES, key=cost)


def chunks_of(pixels: int, pairs: int, rows: int, outputs: int) -> tuple[int, int]:
    """Return how many chunks the pixels of a weight gradient of (rows, outputs) come in, and pixels of each."""
    tiles = -(-rows // BLOCK_ROWS) * -(-outputs // BLOCK_COLUMNS) * pairs
    most = min(BLOCKS // tiles, pixels // LEAST_CHUNK, MOST_PARTIALS // (rows * outputs * pairs))
    chunk = max(1, -(-pixels // max(1, most) // DEPTH)) * DEPTH
    return max(1, -(-pixels // chunk)), chunk


def _pixels(rows: Array) -> Array:
    """Rows (n, C) as the pixels of one image."""
    return rows.reshape(1, len(rows), 1, -1)


class ConvOperations(Device):
    """The convolutions of `LayerBackend`."""

    precision = "float32"
    """Or "bf16": products on tensor cores (`TensorCores`)."""
    _cudnn: Cudnn | None = None
    """Takes what it can, where there is one."""

    @cached_property
    def _tensor_cores(self) -> TensorCores:
        return TensorCores(self.runtime, self._scratch)

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
        images, height, width, outputs = dy.shape
        if dshift is not None and dshift.size:
            grid, block = self.runtime.grid_1d(images * -(-outputs // SUM_COLUMNS) * SUM_THREADS, SUM_THREADS)
            args = (dy, dshift, images, height * width, outputs)
            self.runtime.launch("conv", "conv_image_sums", grid, block, args)
        with self._lock:
            wanted = dx is not None and dx.size > 0
            if wanted and not (self._cudnn and self._cudnn.input_gradient(geometry, dy, w, dx, add)):
                form = product(geometry, x.shape, dy.shape, True)
                self._gather("conv_input", form, dy, self._weights(form, w, True), dx, (dx if add else None,))
            if dw is None or db is None:
                return
            if not (self._cudnn and self._cudnn.weight_gradient(geometry, dy, x, dw, db, dshift)):
                self._weight_gradient(product(geometry, x.shape, dy.shape, False), dy, x, dw, db)

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
        tile = ROWS if rows else best_tile(form.pixels, channels, form.pairs, self.runtime.multiprocessors)
        vectors = self._vectors((source, source.shape[-1]), (w, int(form.sizes["outputs"][0])))
        vectors += 4 * self._fours(channels, target, *added)
        blocks = -(-form.pixels // tile.pixels) * -(-channels // tile.channels) * form.pairs
        args = (source, w, *added, target, form.sizes, vectors)
        self.runtime.launch("conv", f"{entry}_{tile.name}", blocks, tile.threads, args)

    def _weight_gradient(self, form: Product, dy: Array, x: Array, dw: Array, db: Array) -> None:
        """Fill dw and db: sums over chunks of pixels, and where there are several, the sum of these."""
        if self.precision == "bf16":
            self._tensor_cores.weight_gradient(form, dy, x, dw, db)
        else:
            self._weight_gradient_float32(form, dy, x, dw, db)

    def _weight_gradient_float32(self, form: Product, dy: Array, x: Array, dw: Array, db: Array) -> None:
        channels, outputs = dw.shape[2:]
        rows = form.places // form.pairs * (-(-channels // 4) * 4)  # of one pair of phases
        chunks, chunk = chunks_of(form.pixels, form.pairs, rows, outputs)
        tile = best_tile(rows, outputs, form.pairs * chunks, self.runtime.multiprocessors)
        partials, sums = dw, db
        finish = chunks > 1 or bool(form.sizes["fold"].any())
        if finish:
            partials = self._scratch("partials", chunks * form.places * channels * outputs)
            sums = self._scratch("sums", chunks * form.pairs * outputs)
        blocks = -(-rows // tile.pixels) * -(-outputs // tile.channels) * form.pairs * chunks
        vectors = self._vectors((x, channels), (dy, outputs)) + 4 * self._fours(outputs, partials)
        args = (x, dy, partials, sums, form.sizes, chunk, vectors)
        self.runtime.launch("conv", f"conv_weights_{tile.name}", blocks, tile.threads, args)
        if finish:
            grid, block = self.runtime.grid_1d(dw.size + outputs)
            parts = (partials, sums, dw, db, form.sizes, chunks)
            self.runtime.launch("conv", "conv_weights_finish", grid, block, parts)

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
            self._weight_gradient_float32(form, dy, x, dw, db)

    def _vectors(self, source: tuple[Array, int], weight: tuple[Array, int]) -> int:
        """Which operands are read 16 bytes at once: arrays with the length of their rows."""
        return self._fours(source[1], source[0]) + 2 * self._fours(weight[1], weight[0])

    def _fours(self, channels: int, *arrays: Array | None) -> bool:
        """Whether rows of so many channels can be read 16 bytes at once."""
        addresses = [self.runtime.address(array) for array in arrays if array is not None]
        return channels % 4 == 0 and all(address % VECTOR == 0 for address in addresses)
