"""The CPU backend: compiled Numba kernels in float32, on threads of its own.

The kernels release the GIL and take a range of their work, so plain Python threads run them: no OpenMP and no Numba
threading layer. Two user threads may therefore use a backend at once on any platform (they take turns), a forked
child works, and nothing global is set. A result does not depend on the number of threads, because a kernel's pieces
write disjoint memory and sums over pieces are added in the order of the pieces.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import DEPTH, AdamW, LinearPart, MLPPlan, Row, RowMap, TrainingDraws, TrainState
from fastdiff.backends.numpy import NumpyBackend
from fastdiff.errors import ArgumentError, BackendError
from fastdiff.noise import Draw, Stream, round_keys

try:
    from fastdiff.backends.cpu_layers import CpuLayers
    from fastdiff.backends.workers import Body, Workers
    from fastdiff.kernels.cpu import covariance as covariance_kernels
    from fastdiff.kernels.cpu import mlp as mlp_kernels
    from fastdiff.kernels.cpu import noise as noise_kernels
    from fastdiff.kernels.cpu import optim as optim_kernels
    from fastdiff.kernels.cpu import posterior as posterior_kernels
    from fastdiff.kernels.cpu import step as step_kernels
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("fastdiff"):
        raise
    raise BackendError("fastdiff is imported from a source tree that is not installed: run pip install -e .") from error

Array = npt.NDArray[Any]

FEW = 7  # samples: a chain of so few runs sample by sample
# Values in a piece of work: less is not worth waking a thread, which takes some 20 us.
MIN_PIECE = 1 << 16
MIN_LIGHT_PIECE = 1 << 18  # where little is done with each
FRESH_PIECE = 1 << 20  # at most, of a new result: two huge pages of 2 MB


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _law(draw: Draw) -> tuple[Any, int, int, Array]:
    """First row, step, stream and keys, as the kernels take them."""
    return np.uint64(draw.first_row), draw.step, int(draw.stream), round_keys(draw.seed)


def _numbers(rows: Sequence[Row], clip: tuple[float, float] | None) -> Array:
    """The numbers of rows as the kernels take them: columns `step_kernels.P` ... `step_kernels.HIGH`."""
    return np.array([(*row[1:11], *(clip or (-np.inf, np.inf))) for row in rows], np.float32)


class _Table:
    """A sampler's table as the kernels take it."""

    def __init__(self, rows: tuple[Row, ...], clip: tuple[float, float] | None) -> None:
        if any(row.r != 0 for row in rows):
            raise ArgumentError("rows (r)", "a table that scales its noise", "0: a perceptron learns no variance")
        self.rows, self.clip = rows, clip
        self.steps = np.array([(row.t, row.step, row.evaluates) for row in rows], np.int64)
        self.numbers = _numbers(rows, clip)
        self.depth = max(row.depth for row in rows)
        self.evaluated = np.array([row.t for row in rows if row.evaluates], np.int64)


class _Workspace:
    """Scratch arrays of one worker, made once."""

    def __init__(self) -> None:
        self.words = np.empty((4, noise_kernels.CHUNK), np.uint32)
        self.z = np.empty(noise_kernels.WORKSPACE, np.float32)
        self.segments = np.empty((4, 3), np.int64)

    @property
    def noise(self) -> tuple[Array, Array, Array]:
        return self.words, self.z, self.segments


def _packed_part(part: LinearPart | None) -> tuple[Array, int]:
    """A network's linear part as the kernels take it, and its rank."""
    if part is None:
        return np.empty(0, np.float32), 0
    arrays = [part.basis, part.basis.T, part.gains, *([] if part.rest is None else [part.rest])]
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float32), part.rank


class _MLPSpace:
    """What the kernels need of one network, and their buffers, made once and grown where a batch needs more."""

    def __init__(self, plan: MLPPlan, threads: int) -> None:
        k = mlp_kernels
        self.plan: MLPPlan = weakref.proxy(plan)  # or the plan, a weak key of `_networks`, would never go
        self.layers = np.zeros((len(plan.layers), k.LAYER_COLUMNS), np.int64)
        at = k.TILE * plan.layers[0].inputs
        x = 0
        for row, layer in zip(self.layers, plan.layers, strict=True):
            keep = layer.activation == "silu" or layer.time == "scale_shift"  # u is needed again by the backward pass
            u, y = at, at + k.TILE * layer.outputs if keep else at
            row[:] = (
                layer.inputs, layer.outputs, layer.weight, layer.bias,
                k.ACTIVATIONS[layer.activation], k.MODES[layer.time], layer.time_column, x, u, y,
            )  # fmt: skip
            at, x = y + k.TILE * layer.outputs, y
        widest = max(max(layer.inputs, layer.outputs) for layer in plan.layers)
        at += 0 if plan.linear is None else k.TILE * plan.linear.rank
        self.arenas = [np.empty(at, np.float32) for _ in range(threads)]
        self.deltas = [np.empty((3, k.TILE * widest), np.float32) for _ in range(threads)]
        self.times = [np.empty(k.TILE, np.int64) for _ in range(threads)]
        self.memories = [np.empty((DEPTH, k.TILE * plan.layers[0].inputs), np.float32) for _ in range(threads)]
        self.slots = np.arange(plan.T)
        self.used = np.empty(plan.T, np.int64)
        self.linear = _packed_part(plan.linear)
        self.features = None if plan.features is None else plan.features.astype(np.float32)
        self.table = np.zeros(plan.T * plan.time_width if self.features is not None else 1, np.float32)
        self.rows = np.empty(0 if self.features is None else self.features.size, np.float32)
        # The time table's parameters come last in the flat buffer; sums over tiles concern what is before them.
        self.summed = plan.time_weight if plan.time_width else plan.size
        self.transposed = np.empty(self.summed, np.float32)
        self.dtable = np.zeros(self.table.size, np.float32)
        self.t = np.empty(0, np.int64)
        self.indices = np.empty(0, np.int64)
        # Of the tile that a worker is at, made at the first training step.
        self.partials: list[Array] = []
        self.dtime: list[Array] = []
        self.losses: list[Array] = []
        self.draws: TrainingDraws | None = None
        self.tables: Array = np.empty(0)
        self.keys: Array = np.empty(0)
        self.nothing = np.empty((1, 1), np.float32)

    def time_table(self, params: Array, t: Array) -> tuple[Array, int]:
        """The table with the rows that t needs, found through `slots`, and how many they are."""
        plan = self.plan
        if self.features is None:
            return params[plan.time_weight : plan.time_weight + max(1, plan.T * plan.time_width)], plan.T
        count = mlp_kernels.number_slots(t, self.slots, self.used)
        mlp_kernels.time_table(
            count,
            self.used,
            self.features,
            self.rows,
            params,
            plan.time_weight,
            plan.time_bias,
            plan.time_width,
            self.table,
        )
        return self.table, count

    def grow(self, batch: int) -> None:
        """Have buffers for training steps of this batch."""
        if not self.dtime:
            rows = mlp_kernels.TILE
            for _ in self.arenas:
                self.partials.append(np.zeros(self.summed, np.float32))
                self.dtime.append(np.empty(rows * max(1, self.plan.time_width), np.float32))
                self.losses.append(np.zeros(1))
        if batch != len(self.t):
            self.t, self.indices = np.empty(batch, np.int64), np.empty(batch, np.int64)


class _MapSpace:
    """A map of rows in float32, and what the kernels need besides, made once."""

    def __init__(self, plan: RowMap, threads: int) -> None:
        n, k = plan.shape
        products = 0 if plan.left is None else 1 if plan.right is None else 2
        r = len(plan.right) if plan.left is not None and plan.right is not None else 0
        self.n, self.sizes = n, (n, k, r, products, plan.standardise)
        self.tile = rows = covariance_kernels.tile_rows(n, k, products > 0)
        self.parts = tuple(
            np.array([] if part is None else part, np.float32).reshape(-1)
            for part in (plan.scale, plan.left, plan.right, plan.offset)
        )
        # The middle of two products, a tile of squares, sums of rows, and the weights that make means of them.
        sizes = (rows * r, rows * k, rows, k) if plan.standardise else (rows * r, 0, 0, 0)
        self.work = [tuple(np.full(size, 1 / max(1, k), np.float32) for size in sizes) for _ in range(threads)]
        self._drawn: list[Array] = []

    def drawn(self) -> list[Array]:
        """Room for a tile of normals, for each worker."""
        while len(self._drawn) < len(self.work):
            self._drawn.append(np.empty(self.tile * self.n, np.float32))
        return self._drawn


class CpuBackend(CpuLayers):
    """Numba kernels on the CPU, float32.

    Parameters
    ----------
    threads : int or None
        Number of threads; None: one per core that this process may run on.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or _cores()
        self._workers = Workers(self.threads)
        self._spaces = [_Workspace() for _ in range(self.threads)]
        self._networks: weakref.WeakKeyDictionary[MLPPlan, _MLPSpace] = weakref.WeakKeyDictionary()
        self._maps: weakref.WeakKeyDictionary[RowMap, _MapSpace] = weakref.WeakKeyDictionary()
        self._table: _Table | None = None  # the last that was run
        self._lanes = [np.empty(optim_kernels.LANES) for _ in range(self.threads)]
        self._sums, self._scalars = np.empty(0), np.empty(8, np.float32)
        self._arenas = [np.empty(posterior_kernels.LANES, np.float32) for _ in range(self.threads)]

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return CpuBackend, (self.threads,)

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        return np.ascontiguousarray(value, np.float32 if dtype is None else dtype)

    def owns(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        return array

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return np.empty(shape, dtype)

    def normal(self, out: Array, draw: Draw) -> None:
        flat, law = out.reshape(-1), _law(draw)

        def body(worker: int, start: int, stop: int) -> None:
            noise_kernels.normal_range(start, stop, flat, *out.shape, *law, *self._spaces[worker].noise)

        self._chunks(body, out.shape)

    def forward_noise(
        self,
        x0: Array,
        t: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        eps: Array,
        draw: Draw,
    ) -> None:
        arrays = (
            x0.reshape(-1),
            t,
            signal.astype(np.float32),
            noise.astype(np.float32),
            out.reshape(-1),
            eps.reshape(-1),
        )
        first, _, stream, keys = _law(draw)

        def body(worker: int, start: int, stop: int) -> None:
            step_kernels.forward_noise_range(
                start, stop, *arrays, *x0.shape, first, stream, keys, *self._spaces[worker].noise
            )

        self._chunks(body, x0.shape)

    def _chunks(self, body: Body, shape: tuple[int, ...]) -> None:
        if 0 in shape:
            return
        chunks = noise_kernels.chunks_of(*shape)
        with self._workers.lock:
            self._workers.run(body, chunks, max(1, MIN_PIECE // (4 * noise_kernels.CHUNK)))

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        flat = x.reshape(-1)
        outs = flat if out is None else out.reshape(-1)
        outs, v = (outs, outs) if row.r == 0 else outs.reshape(2, flat.size)
        remembered = (*(m.reshape(-1) for m in memory), flat, flat, flat)[:DEPTH]
        numbers = _numbers((row,), clip)[0]
        depth = len(memory) if row.evaluates else 0
        law = _law(draw)

        def noisy(worker: int, start: int, stop: int) -> None:
            step_kernels.step_range(
                start, stop, flat, outs, v, remembered, numbers, depth, *x.shape,
                *law, *self._spaces[worker].noise,
            )  # fmt: skip

        def quiet(worker: int, start: int, stop: int) -> None:
            del worker
            step_kernels.row_range(start, stop, flat, outs, remembered, numbers, depth)

        if row.s != 0:
            self._chunks(noisy, x.shape)
        else:
            with self._workers.lock:
                self._workers.run(quiet, flat.size, MIN_LIGHT_PIECE)

    def _network(self, plan: MLPPlan) -> _MLPSpace:
        space = self._networks.get(plan)
        if space is None:
            space = self._networks[plan] = _MLPSpace(plan, self.threads)
        return space

    def mlp_forward(self, plan: MLPPlan, params: Array, x: Array, t: Array, out: Array | None = None) -> Array:
        y = np.empty((len(x), plan.layers[-1].outputs), np.float32) if out is None else out
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        with self._workers.lock:
            net = self._network(plan)
            table, _ = net.time_table(params, t)

            def body(worker: int, start: int, stop: int) -> None:
                mlp_kernels.forward_range(
                    start,
                    stop,
                    flat_x,
                    flat_y,
                    t,
                    net.layers,
                    params,
                    table,
                    plan.time_width,
                    net.slots,
                    net.linear,
                    net.arenas[worker],
                )

            self._workers.run(body, -(-len(x) // mlp_kernels.TILE), 1)
        return y

    def mlp_chain(
        self,
        plan: MLPPlan,
        params: Array,
        x: Array,
        rows: tuple[Row, ...],
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        flat = x.reshape(-1)
        first, _, stream, keys = _law(draw)
        with self._workers.lock:
            net = self._network(plan)
            if self._table is None or self._table.rows is not rows or self._table.clip != clip:
                self._table = _Table(rows, clip)  # makes it one fifth of the time of one curve
            steps, numbers, depth = self._table.steps, self._table.numbers, self._table.depth
            table, _ = net.time_table(params, self._table.evaluated)

            # The same bits either way; vectors of few samples would be mostly empty.
            if len(x) <= FEW:
                mlp_kernels.chain_few(
                    flat, steps, numbers, depth, net.layers, params, table, plan.time_width, net.slots,
                    net.linear, first, stream, keys, *self._spaces[0].noise, net.arenas[0], net.memories[0],
                    net.times[0],
                )  # fmt: skip
                return

            def body(worker: int, start: int, stop: int) -> None:
                mlp_kernels.chain_range(
                    start, stop, flat, steps, numbers, depth, net.layers, params, table, plan.time_width,
                    net.slots, net.linear, first, stream, keys, *self._spaces[worker].noise[:2],
                    net.arenas[worker], net.memories[worker],
                )  # fmt: skip

            self._workers.run(body, -(-len(x) // mlp_kernels.CHAIN_TILE), 1)

    def mlp_gradient(
        self, plan: MLPPlan, params: Array, x: Array, t: Array, target: Array, grads: Array
    ) -> tuple[float, Array]:
        dx = np.empty_like(x)
        with self._workers.lock:
            net = self._network(plan)
            net.grow(len(x))
            net.t[:] = t
            loss = self._gradient(
                net, params, grads, (x.reshape(-1), target.reshape(-1), dx.reshape(-1)), None, 0, len(x)
            )
        return loss, dx

    def mlp_train_gradient(
        self, plan: MLPPlan, params: Array, draws: TrainingDraws, step: int, batch: int, grads: Array
    ) -> float:
        words = self._spaces[0].words
        with self._workers.lock:
            net = self._network(plan)
            net.grow(batch)
            if net.draws is not draws:
                net.draws, net.tables, net.keys = draws, np.array(draws[1:5], np.float32), round_keys(draws.seed)
            keys = net.keys
            mlp_kernels.scaled_words(net.t, plan.T, step, int(Stream.TRAIN_TIME), keys, words)
            mlp_kernels.scaled_words(net.indices, len(draws.data), step, int(Stream.BATCH), keys, words)
            nothing = net.nothing.reshape(-1)
            return self._gradient(net, params, grads, (nothing, nothing, nothing), draws, step, batch)

    def _gradient(
        self,
        net: _MLPSpace,
        params: Array,
        grads: Array,
        given: tuple[Array, Array, Array],
        draws: TrainingDraws | None,
        step: int,
        batch: int,
    ) -> float:
        """Gradient of the batch that is `given` or drawn, at the timesteps net.t."""
        plan, width = net.plan, net.plan.time_width
        table, count = net.time_table(params, net.t)
        dtable = net.dtable
        if width and net.features is None:
            dtable = grads[plan.time_weight : plan.time_weight + plan.T * width]
        dtable[: count * width] = 0
        mlp_kernels.transpose_weights(net.layers if draws is None else net.layers[1:], params, net.transposed)
        if draws is None:
            data, tables, keys = net.nothing, net.nothing, round_keys(0)
        else:
            data, tables, keys = draws.data, net.tables, net.keys
        turns, total = np.zeros(2, np.int64), np.zeros(1)

        def body(worker: int, start: int, stop: int) -> None:
            del start, stop
            held = -1
            try:
                while True:
                    held = mlp_kernels.gradient_tiles(
                        held, turns, total, draws is None, *given, data, net.indices, net.t, tables, batch, net.layers,
                        params, net.transposed, table, width, net.slots, net.linear, net.dtime[worker], grads,
                        net.summed, net.partials[worker], dtable, net.losses[worker], step, int(Stream.TRAIN_NOISE),
                        keys, *self._spaces[worker].noise, net.arenas[worker], *net.deltas[worker],
                    )  # fmt: skip
                    if held < 0:
                        return
                    time.sleep(0)
            except BaseException:
                turns[1] = -1  # the others would wait for this thread's tile
                raise

        self._workers.run(body, min(self.threads, -(-batch // mlp_kernels.TILE)), 1)
        if net.features is not None and width:
            mlp_kernels.time_table_backward(
                count, net.rows, net.features.shape[1], dtable, width, grads, plan.time_weight, plan.time_bias
            )
        return float(total[0] / (batch * plan.layers[-1].outputs))

    def similarity(self, v: Array, out: Array) -> None:
        flat, flat_out, n = v.reshape(-1), out.reshape(-1), max(1, v.shape[1])

        def body(worker: int, start: int, stop: int) -> None:
            del worker
            covariance_kernels.similarity_range(start, stop, flat, flat_out, n)

        with self._workers.lock:
            self._workers.run(body, flat.size, max(1, self._grain(flat_out.size) // n))

    def _grain(self, values: int) -> int:
        """Values in a piece of a result that may be fresh memory: threads should not be on one page of it at once."""
        return max(MIN_PIECE, min(FRESH_PIECE, values // (8 * self.threads)))

    def _row_map(self, plan: RowMap) -> _MapSpace:
        space = self._maps.get(plan)
        if space is None:
            space = self._maps[plan] = _MapSpace(plan, self.threads)
        return space

    def _run_tiles(self, body: Body, space: _MapSpace, out: Array) -> None:
        """Call `body` over the tiles of a map's result."""
        if out.size:
            tiles, values = -(-len(out) // space.tile), space.tile * max(space.sizes[:2])
            self._workers.run(body, tiles, max(1, self._grain(out.size) // values))

    def map_rows(self, x: Array, out: Array, plan: RowMap) -> None:
        flat, flat_out = x.reshape(-1), out.reshape(-1)
        with self._workers.lock:
            space = self._row_map(plan)

            def body(worker: int, start: int, stop: int) -> None:
                covariance_kernels.map_range(
                    start, stop, space.tile, flat, flat_out, *space.sizes, space.parts, space.work[worker]
                )

            self._run_tiles(body, space, out)

    def mapped_normal(self, out: Array, plan: RowMap, draw: Draw) -> None:
        flat, law = out.reshape(-1), _law(draw)
        with self._workers.lock:
            space = self._row_map(plan)
            drawn = space.drawn()

            def body(worker: int, start: int, stop: int) -> None:
                covariance_kernels.mapped_normal_range(
                    start, stop, space.tile, drawn[worker], flat, *space.sizes, space.parts, space.work[worker],
                    *law, *self._spaces[worker].noise,
                )  # fmt: skip

            self._run_tiles(body, space, out)

    def posterior_mean(
        self,
        x: Array,
        data: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        log_sum: Array,
    ) -> None:
        k, (m, d) = posterior_kernels, x.shape
        flat = x.reshape(-1), data.reshape(-1), np.array([-signal, -0.5 / noise**2], np.float32), out.reshape(-1)
        rows = min(k.TILE, -(-m // (self.threads * k.LANES)) * k.LANES)  # the bits are the same in any tile
        with self._workers.lock:
            if len(self._arenas[0]) < k.arena_size(d):
                self._arenas = [np.empty(k.arena_size(d), np.float32) for _ in range(self.threads)]

            def body(worker: int, start: int, stop: int) -> None:
                k.posterior_mean_range(start, stop, rows, *flat, log_sum, d, self._arenas[worker])

            self._workers.run(body, -(-m // max(rows, 1)), 1)

    def blend(self, out: Array, state: Array, parts: Array, residuals: Array, constant: float) -> None:
        k, (m, d), r = posterior_kernels, out.shape, residuals.shape[1]
        flat = out.reshape(-1), state.reshape(-1), parts.reshape(-1), residuals.reshape(-1)

        def body(worker: int, start: int, stop: int) -> None:
            k.blend_range(start, stop, *flat, d, r, np.float32(constant), self._arenas[worker][: k.LANES])

        with self._workers.lock:
            self._workers.run(body, m, max(1, MIN_PIECE // (d + r)))

    def adamw(self, state: TrainState, options: AdamW) -> float:
        (params, grads, m, v, average), o = state, options
        with self._workers.lock:
            blocks = -(-params.size // optim_kernels.BLOCK)
            if len(self._sums) != blocks:
                self._sums = np.empty(blocks)
            sums, scalars = self._sums, self._scalars
            self._workers.run(
                lambda worker, start, stop: optim_kernels.square_sums(start, stop, grads, sums, self._lanes[worker]),
                len(sums),
                MIN_LIGHT_PIECE // optim_kernels.BLOCK,
            )
            norm = math.sqrt(sum(sums.tolist()))
            if not math.isfinite(norm):
                return norm
            scalars[:] = (
                min(1.0, o.clip_norm / (norm + 1e-6)), 1 - o.beta1, 1 - o.beta2, o.correction2**-0.5,
                o.eps, 1 - o.rate * o.decay, o.rate / o.correction1, 1 - o.ema,
            )  # fmt: skip
            self._workers.run(
                lambda worker, start, stop: optim_kernels.adamw_range(
                    start, stop, params, grads, m, v, average, scalars
                ),
                params.size,
                MIN_LIGHT_PIECE,
            )
        return norm

    steps_ahead = NumpyBackend.steps_ahead
    mlp_training = NumpyBackend.mlp_training
    draw_batch = NumpyBackend.draw_batch
    address = NumpyBackend.address
    prepare = NumpyBackend.prepare
    finish_step = NumpyBackend.finish_step
    record_training = NumpyBackend.record_training
    record_sampling = NumpyBackend.record_sampling
    resize = NumpyBackend.resize
    repeats_resize = False
    queue = NumpyBackend.queue
