"""The layers of image networks on CUDA, but for convolutions: ``norm.cu``, ``attention.cu`` and ``pointwise.cu``.

How an operation runs is a fixed rule of a layer's sizes, where it decides the order of a sum; a sample's bits depend
neither on its batch nor on the device. Scratch is kept for each queue, and grown: an operation that is repeated
allocates nothing.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastdiff.backends.cuda.conv import ConvOperations
from fastdiff.backends.cuda.norm_gradients import NormGradient, NormGradients
from fastdiff.backends.layers import Affine, Batch, Norm
from fastdiff.backends.protocol import TrainingDraws
from fastdiff.noise import TARGETS, Draw, drop_limit, round_keys

Array = Any

VECTOR = 16  # bytes that are read and written at once where everything is aligned to them
VALUE = 4  # bytes
# GroupNorm. What a block has in shared memory leaves room for a second block on every device of 200 KB or more, and
# for its static arrays on one of 99 KB.
BUNDLE = 16  # channels that a block takes at least, where the image has them: two sectors of memory
WHOLE = 88 * 1024  # bytes
CHUNK_VALUES = 8192
FEWEST_THREADS, FORWARD_THREADS, THREADS = 64, 512, 256
WARP = 32
AT_ONCE = 2
MOST_ROWS = 256  # LayerNorm: rows of a chunk
# Attention, as in attention.cu.
SIDE, TILE, DEPTH = 16, 64, 32
TANGENT_COLUMNS = 128
ERROR_CHUNK = 4096  # values whose squared errors one block adds up


class NormPlan(NamedTuple):
    """How the GroupNorm of a layer runs.

    Attributes
    ----------
    bundle : int
        Channels of a block: whole groups.
    fours : bool
        Whether a thread takes four channels at once.
    forward, backward : (int, int) or None
        Threads of a block, and the bytes of shared memory that hold all pixels; None where these are too many.
    rows : int
        Pixels of a chunk where that is so.
    """

    bundle: int
    fours: bool
    forward: tuple[int, int] | None
    backward: tuple[int, int] | None
    rows: int


@cache
def norm_plan(pixels: int, channels: int, groups: int) -> NormPlan:
    """Return how GroupNorm runs on images of so many pixels."""
    group = channels // groups
    vector = 4 if group % 4 == 0 else 1
    bundle = min(channels, -(-BUNDLE // group) * group)
    count = bundle // vector  # vectors of a pixel

    def whole(most: int) -> tuple[int, int] | None:
        threads = FEWEST_THREADS
        while threads < most and 4 * threads < pixels * count:
            threads *= 2
        columns = min(count, threads)
        turns = -(-pixels // (threads // columns)) * -(-count // columns)
        size = VALUE * vector * threads * turns
        return (threads, size) if size <= WHOLE else None

    return NormPlan(bundle, vector == 4, whole(FORWARD_THREADS), whole(THREADS), max(1, CHUNK_VALUES // bundle))


class LayerOperations(ConvOperations):
    """`LayerBackend`, with its convolutions."""

    def _by_fours(self, *arrays: Array | None, multiples: tuple[int, ...] = ()) -> bool:
        """Whether all arrays are aligned, and the sizes multiples of four."""
        return not any(size % 4 for size in multiples) and all(
            array is None or self.runtime.address(array) % VECTOR == 0 for array in arrays
        )

    def _launch_layer(
        self, source: str, entry: str, items: int, args: tuple[Any, ...], block: int | None = None, shared: int = 0
    ) -> None:
        """Launch a kernel on so many threads, in as many blocks as go round."""
        if items:
            grid, block = self.runtime.grid_1d(items, block)
            self.runtime.launch(source, entry, grid, block, args, shared)

    # ------------------------------------------------------------------------------------------- norm

    def norm(self, layer: Norm, out: Array, *, eps: float, parts: tuple[Array, Array] | None = None) -> None:
        (x, given, stats, silu), groups = layer, layer.stats.shape[1]
        images, pixels, channels = len(x), x.shape[1] * x.shape[2], x.shape[3]
        plan = norm_plan(pixels, channels, groups)
        blocks = images * -(-channels // plan.bundle)
        how = channels, channels // groups, plan.bundle
        joined = self._joined(plan, plan.forward, parts)
        if parts is not None and not joined[-1]:
            self.concatenate(*parts, x)
        fours = self._norm_fours(plan, x, *joined[:2], *given, out)
        if plan.forward is not None:
            threads, shared = plan.forward
            entry, sources = ("norm_joined", (x, *joined)) if joined[-1] else ("norm_forward", (x,))
            args: tuple[Any, ...] = (*sources, *given, out, stats, images, pixels, *how, eps, silu, fours)
            self._launch_layer("norm", entry, blocks * threads, args, threads, shared)
            return
        chunks = -(-pixels // plan.rows)
        sizes, items = (images, pixels, plan.rows, chunks, *how), blocks * chunks * THREADS
        with self._lock:
            sums = self._scratch("norm", 2 * images * groups * chunks)
            self._launch_layer("norm", "norm_chunks", items, (x, sums, *sizes, fours), THREADS)
            args = (x, sums, *given, out, stats, *sizes, eps, silu, fours)
            self._launch_layer("norm", "norm_apply", items, args, THREADS)

    def norm_backward(
        self,
        layer: Norm,
        dy: Array,
        dx: Array,
        grads: Affine,
        *,
        add: bool = False,
        parts: tuple[Array, Array] | None = None,
    ) -> None:
        x, affine, stats, silu = layer
        images, pixels, channels, groups = len(x), x.shape[1] * x.shape[2], x.shape[3], stats.shape[1]
        plan, given = norm_plan(pixels, channels, groups), (dy, x, *affine, stats)
        blocks, across = images * -(-channels // plan.bundle), -(-channels // WARP)
        how = channels, channels // groups, plan.bundle
        joined = self._joined(plan, plan.backward, parts)
        fours = self._norm_fours(plan, dy, x, *affine, dx, *joined[:2])
        waiting = self._waiting
        with self._lock:
            norms = NormGradients(self.runtime, self._apart) if waiting is None else waiting.norms
            name = "norm" if waiting is None else f"norm {len(norms.waiting)}"
            sums = self._scratch(name, 2 * images * channels)
            if plan.backward is not None:
                threads, shared = plan.backward
                args: tuple[Any, ...] = (
                    *given, dx, *joined, sums, grads.modulation, images, pixels, *how, silu, add, fours,
                )  # fmt: skip
                self._launch_layer("norm", "norm_backward", blocks * threads, args, threads, shared)
            else:
                chunks = -(-pixels // plan.rows)
                sizes, items = (images, pixels, plan.rows, chunks, *how), blocks * chunks * THREADS
                some = self._scratch("norm chunks", 2 * images * chunks * channels)
                self._launch_layer("norm", "norm_backward_chunks", items, (*given, some, *sizes, silu, fours), THREADS)
                args = (some, affine.gamma, affine.beta, sums, grads.modulation, images, chunks, channels)
                self._launch_layer("norm", "norm_backward_images", images * across * THREADS, args, THREADS)
                args = (*given, sums, dx, *sizes, silu, add, fours)
                self._launch_layer("norm", "norm_backward_apply", items, args, THREADS)
            norms.waiting.append(NormGradient(sums, affine.modulation, grads.gamma, grads.beta, images))
            if waiting is None:
                norms.finish()
        if parts is not None and not joined[-1]:
            self.split(dx, *parts)

    def _joined(
        self, plan: NormPlan, whole: tuple[int, int] | None, parts: tuple[Array, Array] | None
    ) -> tuple[Array | None, Array | None, int]:
        """The parts that a kernel joins, or parts, itself, and the channels of the first; of none, where it cannot."""
        left = 0 if parts is None or whole is None else parts[0].shape[-1]
        return (None, None, 0) if parts is None or left == 0 or (plan.fours and left % 4) else (*parts, left)

    def _norm_fours(self, plan: NormPlan, *arrays: Array | None) -> int:
        return (AT_ONCE if self._by_fours(*arrays) else 1) if plan.fours else 0

    def norm_tangent(self, layer: Norm, dh: Array, out: Array, *, modulation_tangent: Array | None = None) -> None:
        x, affine, stats, silu = layer
        images, pixels, channels = len(x), x.shape[1] * x.shape[2], x.shape[3]
        group = channels if stats is None else channels // stats.shape[1]
        args = (dh, x, *affine, modulation_tangent, stats, out, images, pixels, channels, group, silu)
        self._launch_layer("norm", "norm_tangent", out.size, args)

    # ------------------------------------------------------------------------------------------- layer norm

    def layer_norm(self, layer: Norm, out: Array, *, eps: float) -> None:
        x, (gamma, beta, _), stats, _ = layer
        rows, channels, lanes, fours = self._rows_of(stats, x, gamma, beta, out)
        args = (x, gamma, beta, out, stats, rows, channels, lanes, eps, fours)
        self._launch_layer("layer_norm", "layer_norm", rows * lanes, args, THREADS)

    def layer_norm_backward(self, layer: Norm, dy: Array, dx: Array, grads: Affine, *, add: bool = False) -> None:
        x, (gamma, *_), stats, _ = layer
        rows, channels, lanes, fours = self._rows_of(stats, x, gamma, dy, dx)
        size = max(1, min(MOST_ROWS, CHUNK_VALUES // channels))
        chunks = -(-rows // size)
        with self._lock:
            sums = self._scratch("norm", 2 * chunks * channels)
            plain, by_h = sums[: chunks * channels], sums[chunks * channels : 2 * chunks * channels]
            args = (dy, x, gamma, stats, dx, plain, by_h, rows, size, channels, lanes, add, fours)
            self._launch_layer("layer_norm", "layer_norm_backward", chunks * THREADS, args, THREADS)
            self._sum_columns(plain, grads.beta, chunks)
            self._sum_columns(by_h, grads.gamma, chunks)

    def _rows_of(self, stats: Array, *arrays: Array) -> tuple[int, int, int, int]:
        """Rows, channels, threads that share a row, and how they take four channels at once."""
        channels = arrays[0].shape[-1]
        vector = 1 if channels % 4 else 4
        lanes = min(WARP, 1 << (channels // vector - 1).bit_length())
        fours = 0 if vector == 1 else AT_ONCE if self._by_fours(*arrays) else 1
        return stats.size // 2, channels, lanes, fours

    # ------------------------------------------------------------------------------------------- attention

    def attention(self, qkv: Array, out: Array, log_sums: Array, *, heads: int) -> None:
        sizes, blocks, shape, shared = self._attend(out, heads, 1, 4)
        args = (qkv, out, log_sums, *sizes, shape, self._by_fours(qkv, out, multiples=sizes[3:4]))
        self._launch_layer("attention", "attention", blocks * THREADS, args, THREADS, shared)

    def attention_backward(
        self, dy: Array, qkv: Array, out: Array, log_sums: Array, dqkv: Array, *, heads: int
    ) -> None:
        sizes, blocks, shape, shared = self._attend(out, heads, 3, 2)
        with self._lock:
            deltas = self._scratch("deltas", log_sums.size)
            args = (dy, out, deltas, *sizes[:4])
            self._launch_layer("attention", "attention_deltas", log_sums.size * WARP, args, THREADS)
            at_once = self._by_fours(dy, qkv, dqkv, multiples=sizes[3:4])
            args = (dy, qkv, log_sums, deltas, dqkv, *sizes, shape, at_once)
            self._launch_layer("attention", "attention_backward", blocks * THREADS, args, THREADS, shared)

    def attention_tangent(
        self, dqkv: Array, qkv: Array, out: Array, log_sums: Array, dout: Array, *, heads: int
    ) -> None:
        images, length, channels = out.shape
        width = channels // heads
        args = (dqkv, qkv, out, log_sums, dout, images, length, heads, width, 1 / math.sqrt(width))
        slabs = -(-width // TANGENT_COLUMNS)
        self._launch_layer("attention", "attention_tangent", log_sums.size * slabs * WARP, args, THREADS)

    def _attend(self, out: Array, heads: int, results: int, most: int) -> tuple[tuple[Any, ...], int, int, int]:
        """Sizes and scale, blocks, their shape, and the shared memory of one; the shape changes no bits."""
        images, length, channels = out.shape
        width = channels // heads
        columns = 1 if width <= TILE else 2  # in tiles
        pairs = results * images * heads * -(-width // (TILE * columns))

        def blocks(rows: int) -> int:
            return pairs * -(-length // (SIDE * rows))

        rows = most if length > SIDE and blocks(most) >= self.runtime.multiprocessors else 1
        shared = (SIDE * rows + TILE) * (DEPTH + 4) + SIDE * rows * (TILE + 4) + TILE * TILE * columns
        sizes = images, length, heads, width, 1 / math.sqrt(width)
        return sizes, blocks(rows), 10 * rows + columns, VALUE * shared

    # ------------------------------------------------------------------------------------------- the rest

    def silu(self, x: Array, out: Array) -> None:
        self._values("silu", (x, out))

    def silu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        self._values("silu_backward", (dy, x, dx), add)

    def gelu(self, x: Array, out: Array) -> None:
        self._values("gelu", (x, out))

    def gelu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        self._values("gelu_backward", (dy, x, dx), add)

    def offset(self, x: Array, p: Array, out: Array) -> None:
        fours = self._by_fours(x, p, out, multiples=(p.size,))
        args = (x, p, out, len(x), p.size, fours)
        self._launch_layer("pointwise", "offset", x.size // 4 if fours else x.size, args)

    def offset_backward(self, dy: Array, dp: Array) -> None:
        self._sum_columns(dy, dp, len(dy))

    def add(self, a: Array, b: Array, out: Array) -> None:
        self._values("add", (a, b, out))

    def _values(self, entry: str, arrays: tuple[Array, ...], *options: Any) -> None:
        size = arrays[0].size
        fours = self._by_fours(*arrays, multiples=(size,))
        self._launch_layer("pointwise", entry, size // 4 if fours else size, (*arrays, size, *options, fours))

    def concatenate(self, a: Array, b: Array, out: Array) -> None:
        self._columns("concatenate", (a, b, out), a, b)

    def split(self, x: Array, a: Array, b: Array, *, add: bool = False) -> None:
        self._columns("split", (x, a, b), a, b, add)

    def _columns(self, entry: str, arrays: tuple[Array, ...], a: Array, b: Array, *options: Any) -> None:
        left, right = a.shape[-1], b.shape[-1]
        fours = self._by_fours(*arrays, multiples=(left, right))
        args = (*arrays, a.size // max(1, left), left, right, *options, fours)
        self._launch_layer("pointwise", entry, (a.size + b.size) // (4 if fours else 1), args)

    def resize(self, x: Array, out: Array) -> None:
        images, height, width, channels = out.shape
        args = (x, out, images, *x.shape[1:3], height, width, channels)
        self._launch_layer("pointwise", "resize", out.size, args)

    def take(self, table: Array, index: Array, out: Array, *, add: bool = False) -> None:
        self._launch_layer("pointwise", "take", out.size, (table, index, out, *out.shape, add))

    def take_backward(self, dy: Array, index: Array, dtable: Array) -> None:
        self._launch_layer("pointwise", "fill", dtable.size, (dtable, dtable.size, 0))
        self._launch_layer("pointwise", "take_backward", len(dy) * THREADS, (dy, index, dtable, *dy.shape), THREADS)

    def draw_batch(self, draws: TrainingDraws, batch: Batch, step: int, first: int) -> None:
        n, height, width, channels = batch.x.shape
        tall, wide = draws.data.shape[-3:-1]
        size, labels = height * width * channels, None if batch.labels is None else draws.labels
        columns = 0 if draws.covariates is None or batch.covariates is None else draws.covariates.shape[1]
        args = (
            draws.data, labels, *(self._table(table) for table in draws[1:5]), *batch[:4],
            draws.covariates if columns else None, batch.covariates, n, size, tall, wide, draws.masked, width, channels,
            columns, draws.classes, drop_limit(draws.drop), draws.bound, len(draws.signal), first, step,
            self._step_at(), draws.flip, round_keys(draws.seed),
        )  # fmt: skip
        self._launch_layer("pointwise", "draw_batch", n * -(-size // 4), args)
        if batch.known is not None:
            at = step, first
            self._draw_known(
                draws, draws.data, self._table(draws.signal), batch[:3], (batch.known, batch.marks, size), at
            )

    def _draw_known(
        self,
        draws: TrainingDraws,
        data: Array,
        signal: Array,
        batch: tuple[Array, Array, Array],
        known: tuple[Array, Array, int],
        at: tuple[int, int],
    ) -> None:
        """Draw what is known of a batch (x, t, target) of rows of `data`, at a step and from a position on.

        `known` is where the values go and where the marks, and how far apart their rows are.
        """
        assert draws.targets is not None
        (x, t, target), (kind, image) = batch, draws.targets
        size = math.prod(image)
        args = (
            data, signal, t, x, target, *known[:2], len(t), known[2], size * (1 + draws.masked), *image,
            TARGETS.index(kind), len(data), at[1], at[0], self._step_at(), draws.flip, round_keys(draws.seed),
        )  # fmt: skip
        self._launch_layer("pointwise", "draw_known", len(t) * size, args)

    def hold(self, x: Array, known: Array, level: float) -> None:
        self._hold(x, known, 2 * x.shape[1], level)

    def _hold(self, x: Array, known: Array, stride: int, level: float) -> None:
        """Do `hold` with rows of `known` so far apart."""
        self._launch_layer("pointwise", "hold", x.size, (x, known, *x.shape, stride, np.float32(level)))

    def dropout(self, x: Array, out: Array, rate: float, first_block: int, draw: Draw) -> None:
        size = x.size // max(1, len(x))
        fours = self._by_fours(x, out, multiples=(size,))
        limit, scale = math.ceil(rate * 2.0**32), np.float32(1 / (1 - rate))
        at = first_block, draw.first_row, draw.step, self._step_at()
        args = (x, out, len(x), size, limit, scale, *at, round_keys(draw.seed), fours)
        self._launch_layer("pointwise", "dropout", len(x) * -(-size // 4), args)

    repeats_resize = True

    def squared_error(self, y: Array, target: Array, dy: Array, loss: Array, terms: Array | None = None) -> None:
        size = target.size
        chunks = -(-size // ERROR_CHUNK)
        with self._lock:
            sums = self._scratch("errors", chunks, np.float64)
            scale = np.float32(2 / max(1, size))
            entry, args = "squared_error", (y, target, *(() if terms is None else (terms,)), dy, size)
            if terms is not None:
                entry, args = "weighted_error", (*args, size // max(1, len(target)), target.shape[-1], terms.shape[1])
            self._launch_layer("pointwise", entry, chunks * THREADS, (*args, scale, sums), THREADS)
            self.runtime.launch("pointwise", "mean_of_chunks", 1, THREADS, (sums, chunks, size, loss))
