"""Perceptrons on the CPU: scratch of a network, and which of its kernels run."""

from __future__ import annotations

import time
import weakref
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cpu.step import StepOperations, keys_of, law_of, numbers_of
from fastdiff.backends.layers import LayerBackend
from fastdiff.backends.numpy.host import asked_at
from fastdiff.backends.protocol import (
    DEPTH,
    AdamW,
    ChainTable,
    Inputs,
    LinearPart,
    MLPPlan,
    Row,
    Segment,
    Team,
    TmpdPlan,
    Training,
    TrainingDraws,
    TrainState,
)
from fastdiff.errors import ArgumentError
from fastdiff.kernels.cpu import mlp as mlp_kernels
from fastdiff.noise import Draw, Stream

Array = npt.NDArray[Any]

TRAIN_NOISE = int(Stream.TRAIN_NOISE)
FEW = 7  # samples: a chain of so few runs sample by sample


def _packed_part(part: LinearPart | None) -> Array:
    """A network's linear part as the kernels take it."""
    if part is None:
        return np.empty(0, np.float32)
    arrays = [part.basis, part.basis.T, part.gains, *([] if part.rest is None else [part.rest])]
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float32)


class _Table:
    """A sampler's table as the kernels take it."""

    def __init__(self, rows: tuple[Row, ...], clip: tuple[float, float] | None) -> None:
        if any(row.r != 0 for row in rows):
            raise ArgumentError("rows (r)", "a table that scales its noise", "0: a perceptron learns no variance")
        self.rows, self.clip = rows, clip
        none = np.empty(0, np.float32)
        steps = np.array([(row.t, row.step, row.evaluates) for row in rows], np.int64)
        numbers, depth = numbers_of(rows, clip), max(row.depth for row in rows)
        self.chain = tuple(mlp_kernels.Chain(steps, numbers, depth, weights=none, levels=none))
        self.evaluated = np.array([row.t for row in rows if row.evaluates], np.int64)


def backward_runs(plan: MLPPlan, ends: Array) -> Array:
    """The runs of layers that a backward pass takes as one, as `tmpd.NARROW` ...: none of their outputs but the last is
    changed by anything, and their product is smaller than they."""
    runs: list[list[int]] = []
    at = 0
    for k, layer in enumerate(plan.layers):
        slopes = layer.activation != "none" or layer.time == "scale_shift"
        if runs and runs[-1][3] < 0:
            narrow, wide = runs[-1][:2]
            if narrow * layer.outputs < narrow * wide + layer.inputs * layer.outputs:
                at -= narrow * wide
                runs[-1][1:] = layer.outputs, at, int(ends[k]) if slopes else -1, runs[-1][4], k
                at += narrow * layer.outputs
                continue
        runs.append([layer.inputs, layer.outputs, at, int(ends[k]) if slopes else -1, k, k])
        at += layer.inputs * layer.outputs
    return np.array(runs, np.int64)


class _TmpdWorkspace:
    """What the kernel needs of observations and a table, and a worker's buffers for it."""

    def __init__(self, net: _MLPSpace, table: _Table, tmpd: TmpdPlan) -> None:
        from fastdiff.kernels.cpu import tmpd as kernels

        plan, lanes, (_, m), K = net.plan, mlp_kernels.CHAIN_TILE, tmpd.y.shape, tmpd.products
        d = plan.layers[0].inputs
        self.tmpd, self.table = tmpd, table
        observations = kernels.Observations(
            rows=tmpd.numbers[np.array([row.t for row in table.rows])],
            products=K,
            per=tmpd.per,
            firsts=tmpd.firsts,
            matrix=np.empty(0, np.float32) if tmpd.matrix is None else tmpd.matrix.astype(np.float32).reshape(-1),
            places=np.empty(0, np.int64) if tmpd.places is None else tmpd.places.reshape(-1),
            y=tmpd.y.reshape(-1),
            variance=tmpd.variance.reshape(-1),
            reach=tmpd.reach,
            m=m,
        )
        self.observations = tuple(observations)
        ends = np.concatenate([[0], np.cumsum([lanes * layer.outputs for layer in plan.layers])])
        runs = backward_runs(plan, ends)
        self.back = kernels.Back(runs, np.empty(int(runs[:, :2].prod(axis=1).sum()), np.float32), ends)
        self.products = np.empty((2, plan.size), np.float32)
        rank = 0 if plan.linear is None else plan.linear.rank
        wide = int(runs[0, kernels.WIDE])
        singles = int(ends[-1]) + lanes * (K * max(d, wide) + d + m) + d * (wide + d + rank)
        basis = (K + 1) * m * lanes if m > K else 0
        doubles = lanes * (4 * m + (K + 1) * K + K + 2 * (K + 1) + 3) + 16 * (K * K + 2 * K) + basis
        buffers = [
            (np.empty(singles, np.float32), np.empty(doubles), np.empty(lanes * m, np.int64)) for _ in net.deltas
        ]
        self.spaces = [
            tuple(kernels.Space(*of_chain, *own))
            for *of_chain, own in zip(net.memories, net.deltas, buffers, strict=True)
        ]


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
        rank = 0 if plan.linear is None else plan.linear.rank
        self.fixed = plan.time_width, self.slots, _packed_part(plan.linear), rank  # of `mlp_kernels.Network`
        self.features = None if plan.features is None else plan.features.astype(np.float32)
        self.table = np.zeros(plan.T * plan.time_width if self.features is not None else 1, np.float32)
        self.rows = np.empty(0 if self.features is None else self.features.size, np.float32)
        self.lasting: tuple[Array, Array, int] | None = None  # timesteps and bits of parameters of the table, its rows
        # The time table's parameters come last in the flat buffer; sums over tiles concern what is before them.
        self.summed = plan.time_weight if plan.time_width else plan.size
        self.transposed = np.empty(self.summed, np.float32)
        self.dtable = np.zeros(self.table.size, np.float32)
        self.t = np.empty(0, np.int64)
        self.indices = np.empty(0, np.int64)
        self.sums: list[
            tuple[Array, Array, Array]
        ] = []  # of the tile that a worker is at, made at the first training step
        self.draws: TrainingDraws | None = None
        self.tables: Array = np.empty(0)
        self.keys: Array = np.empty(0)
        self.nothing = np.empty((1, 1), np.float32)
        self.not_given = (self.nothing.reshape(-1),) * 3
        self.tmpd: _TmpdWorkspace | None = None  # the last
        # What is asked: room for its part of a tile's rows of the time table, and the buffers of a chain.
        width, d = k.TILE * plan.time_width, plan.layers[0].inputs
        self.own = np.arange(k.TILE)
        self.rooms = [np.empty(width if plan.asked else 0, np.float32) for _ in range(threads)]
        flat = self.nothing.reshape(-1)
        self.not_asked = [(flat, 0, plan.asked_weight, room, self.own, plan.known) for room in self.rooms]
        self.turned: list[tuple[Array, ...]] = []
        if plan.asked:
            sizes = [k.CHAIN_TILE * columns for columns in (plan.asked, d, d)]
            self.turned = [tuple(np.empty(size, np.float32) for size in sizes) for _ in range(threads)]

    # What the kernels take comes as plain tuples in the order of named ones: those take Numba a microsecond more each.

    def asked(self, asked: Array | None, worker: int = 0) -> tuple[Array, int, int, Array, Array, int]:
        """What is asked of samples: an `mlp_kernels.Asked`."""
        if asked is None:
            return self.not_asked[worker]
        plan = self.plan
        return asked.reshape(-1), plan.asked, plan.asked_weight, self.rooms[worker], self.own, plan.known

    def network(self, params: Array, t: Array, *, lasting: bool = False) -> tuple[tuple[Any, ...], int]:
        """An `mlp_kernels.Network` whose time table has the rows that t needs, and how many they are."""
        table, count = self.time_table(params, t, lasting)
        return (self.layers, params, self.transposed, table, *self.fixed), count

    def time_table(self, params: Array, t: Array, lasting: bool = False) -> tuple[Array, int]:
        """The table with the rows that t needs, found through `slots`, and how many they are.

        With `lasting` nobody changes the array t, and the table is made again only for other parameters: it would take
        a tenth of a chain of one curve.
        """
        plan = self.plan
        if self.features is None:
            return params[plan.time_weight : plan.time_weight + max(1, plan.T * plan.time_width)], plan.T
        own = params[plan.time_weight :].view(np.uint32) if lasting else None
        if own is not None and self.lasting is not None:
            made, bits, count = self.lasting
            if made is t and np.array_equal(bits, own):
                return self.table, count
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
        self.lasting = None if own is None else (t, own.copy(), count)
        return self.table, count

    def grow(self, batch: int) -> None:
        """Have buffers for training steps of this batch."""
        if not self.sums:
            width = mlp_kernels.TILE * max(1, self.plan.time_width)
            self.sums = [
                (np.zeros(self.summed, np.float32), np.empty(width, np.float32), np.zeros(1)) for _ in self.arenas
            ]
        if batch != len(self.t):
            self.t, self.indices = np.empty(batch, np.int64), np.empty(batch, np.int64)


class MLPOperations(StepOperations):
    """Perceptrons: forward, gradient, and a sampling chain."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._networks: weakref.WeakKeyDictionary[MLPPlan, _MLPSpace] = weakref.WeakKeyDictionary()
        self._table: _Table | None = None  # the last that was run

    def renew(self) -> None:
        super().renew()
        self._networks, self._table = weakref.WeakKeyDictionary(), None

    def _network(self, plan: MLPPlan) -> _MLPSpace:
        space = self._networks.get(plan)
        if space is None:
            space = self._networks[plan] = _MLPSpace(plan, self.threads)
        return space

    def mlp_forward(self, plan: MLPPlan, params: Array, inputs: Inputs, out: Array | None = None) -> Array:
        x, t, asked = inputs
        y = np.empty((len(x), plan.layers[-1].outputs), np.float32) if out is None else out
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        with self._workers.lock:
            net = self._network(plan)
            network, _ = net.network(params, t)

            def body(worker: int, start: int, stop: int) -> None:
                mlp_kernels.forward_range(
                    start, stop, flat_x, flat_y, t, network, net.asked(asked, worker), net.arenas[worker]
                )

            self._workers.run(body, -(-len(x) // mlp_kernels.TILE), 1)
        return y

    def mlp_chain(
        self, plan: MLPPlan, params: Array, x: Array, table: ChainTable, draw: Draw, asked: Array | None = None
    ) -> None:
        (rows, clip, weights, levels), flat = table, x.reshape(-1)
        law = law_of(draw)
        with self._workers.lock:
            net = self._network(plan)
            if self._table is None or self._table.rows is not rows or self._table.clip != clip:
                self._table = _Table(rows, clip)  # a fifth of the time of one curve
            chain = self._table.chain
            if asked is not None:
                *rows_of_it, none, _ = chain
                chain = *rows_of_it, none if weights is None else weights, none if levels is None else levels
            network, _ = net.network(params, self._table.evaluated, lasting=True)

            # The same bits either way; vectors of few samples would be mostly empty.
            if len(x) <= FEW and weights is None:
                mlp_kernels.chain_few(
                    flat, chain, network, net.asked(asked), law, self._rooms[0], net.arenas[0], net.memories[0],
                    net.times[0],
                )  # fmt: skip
                return
            if asked is not None:

                def body(worker: int, start: int, stop: int) -> None:
                    mlp_kernels.asked_chain_range(
                        start, stop, flat, chain, network, net.asked(asked, worker), law, self._rooms[worker],
                        net.arenas[worker], net.memories[worker], net.turned[worker],
                    )  # fmt: skip

                tile = mlp_kernels.CHAIN_TILE // (1 if weights is None else 2)
                self._workers.run(body, -(-len(x) // tile), 1)
                return

            def body(worker: int, start: int, stop: int) -> None:
                mlp_kernels.chain_range(
                    start, stop, flat, chain, network, law, self._rooms[worker], net.arenas[worker],
                    net.memories[worker],
                )  # fmt: skip

            self._workers.run(body, -(-len(x) // mlp_kernels.CHAIN_TILE), 1)

    def mlp_chain_tmpd(
        self, plan: MLPPlan, params: Array, x: Array, rows: tuple[Row, ...], draw: Draw, tmpd: TmpdPlan
    ) -> bool:
        from fastdiff.kernels.cpu import tmpd as tmpd_kernels

        flat = x.reshape(-1)
        law = law_of(draw)
        with self._workers.lock:
            net = self._network(plan)
            if self._table is None or self._table.rows is not rows or self._table.clip is not None:
                self._table = _Table(rows, None)
            table = self._table
            if net.tmpd is None or net.tmpd.tmpd is not tmpd or net.tmpd.table is not table:
                net.tmpd = _TmpdWorkspace(net, table, tmpd)
            space = net.tmpd
            network, back = net.network(params, table.evaluated, lasting=True)[0], tuple(space.back)
            tmpd_kernels.backward_weights(net.layers, space.back.runs, params, space.back.weights, *space.products)

            def body(worker: int, start: int, stop: int) -> None:
                tmpd_kernels.chain_tmpd(
                    start, stop, flat, table.chain, network, back, space.observations, law, self._rooms[worker],
                    net.arenas[worker], space.spaces[worker],
                )  # fmt: skip

            self._workers.run(body, -(-len(x) // mlp_kernels.CHAIN_TILE), 1)
        return True

    def mlp_gradient(
        self, plan: MLPPlan, params: Array, inputs: Inputs, target: Array, grads: Array
    ) -> tuple[float, Array]:
        x, t, asked = inputs
        dx = np.empty_like(x)
        with self._workers.lock:
            net = self._network(plan)
            net.grow(len(x))
            net.t[:] = t
            given = x.reshape(-1), target.reshape(-1), dx.reshape(-1)
            loss = self._gradient(net, params, grads, given, None, 0, asked)
        return loss, dx

    def mlp_vjp(
        self, plan: MLPPlan, params: Array, inputs: Inputs, dy: Array, dx: Array, y: Array | None = None
    ) -> None:
        self._products(plan, params, inputs, dy, dx, backward=True, y=y)

    def mlp_jvp(self, plan: MLPPlan, params: Array, inputs: Inputs, dx: Array, dy: Array) -> None:
        self._products(plan, params, inputs, dx, dy, backward=False)

    def _products(
        self,
        plan: MLPPlan,
        params: Array,
        inputs: Inputs,
        given: Array,
        out: Array,
        *,
        backward: bool,
        y: Array | None = None,
    ) -> None:
        """`mlp_vjp` or `mlp_jvp`, a tile at a time."""
        x, t, asked = inputs
        k, arrays = mlp_kernels, [x.reshape(-1), t, given.reshape(-1), out.reshape(-1)]
        with self._workers.lock:
            net = self._network(plan)
            network, _ = net.network(params, t)
            if backward:
                k.transpose_weights(net.layers, params, net.transposed)
                arrays.append(net.nothing[:0].reshape(-1) if y is None else y.reshape(-1))
            kernel = k.vjp_range if backward else k.jvp_range

            def body(worker: int, start: int, stop: int) -> None:
                kernel(start, stop, *arrays, network, net.asked(asked, worker), net.arenas[worker], net.deltas[worker])

            self._workers.run(body, -(-len(x) // k.TILE), 1)

    def mlp_train_gradient(
        self, plan: MLPPlan, params: Array, draws: TrainingDraws, step: int, batch: int, grads: Array
    ) -> float:
        with self._workers.lock:
            net, asked = self._drawn(plan, draws, step, batch)
            return self._gradient(net, params, grads, net.not_given, draws, step, asked)

    def _drawn(self, plan: MLPPlan, draws: TrainingDraws, step: int, batch: int) -> tuple[_MLPSpace, Array | None]:
        """Draw which rows and timesteps a training step takes; return where they are, and what is asked of them."""
        (words, *_), net = self._rooms[0], self._network(plan)
        net.grow(batch)
        if net.draws is not draws:
            terms = [] if draws.terms is None else [draws.terms[:, 0]]
            net.draws, net.keys = draws, keys_of(draws.seed)
            net.tables = np.array([*draws[1:5], *terms], np.float32)
        mlp_kernels.scaled_words(net.t, plan.T, step, int(Stream.TRAIN_TIME), net.keys, words)
        if draws.by_position:
            net.indices[:] = np.arange(len(net.indices))
        else:
            mlp_kernels.scaled_words(net.indices, len(draws.data), step, int(Stream.BATCH), net.keys, words)
        asked = asked_at(plan, draws, net.indices, Draw(draws.seed, Stream.BATCH, step)) if plan.asked else None
        return net, asked

    def mlp_shared_training(
        self, plan: MLPPlan, draws: TrainingDraws, batch: int, state: TrainState, results: Array, team: Team
    ) -> Training:
        return _Shared(self, plan, draws, batch, state, results, team)

    def _gradient(
        self,
        net: _MLPSpace,
        params: Array,
        grads: Array,
        given: tuple[Array, Array, Array],
        draws: TrainingDraws | None,
        step: int,
        asked: Array | None,
    ) -> float:
        """Gradient of the batch that is `given` or drawn, at the timesteps net.t, with what is asked of it."""
        plan, width, batch = net.plan, net.plan.time_width, len(net.t)
        network, count = net.network(params, net.t)
        dtable = net.dtable
        if width and net.features is None:
            dtable = grads[plan.time_weight : plan.time_weight + plan.T * width]
        dtable[: count * width] = 0
        mlp_kernels.transpose_weights(net.layers if draws is None else net.layers[1:], params, net.transposed)
        if draws is None:
            data, tables, keys = net.nothing, net.nothing, keys_of(0)
        else:
            data, tables, keys = draws.data.reshape(len(draws.data), -1), net.tables, net.keys
        samples = data, net.indices, net.t, tables, batch, step, TRAIN_NOISE, keys
        turns, total = np.zeros(2, np.int64), (grads[: net.summed], dtable, np.zeros(1))

        def body(worker: int, start: int, stop: int) -> None:
            del start, stop
            held = -1
            try:
                while True:
                    held = mlp_kernels.gradient_tiles(
                        held, turns, draws is not None, given, samples, network, net.asked(asked, worker), total,
                        net.sums[worker], self._rooms[worker], net.arenas[worker], net.deltas[worker],
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
        return float(total[2][0] / (batch * plan.layers[-1].outputs))


class _Shared:
    """A training step whose tiles are shared by a team: each has sums of its own, which are added in their order."""

    def __init__(
        self,
        be: MLPOperations,
        plan: MLPPlan,
        draws: TrainingDraws,
        batch: int,
        state: TrainState,
        results: Array,
        team: Team,
    ) -> None:
        self.be, self.plan, self.draws, self.batch, self.team = be, plan, draws, batch, team
        self.state, self.results = state, results
        self.tiles = team.share(-(-batch // mlp_kernels.TILE))
        self.rows = slice(*(min(batch, at * mlp_kernels.TILE) for at in (self.tiles.start, self.tiles.stop)))
        self.summed, count = plan.time_weight if plan.time_width else plan.size, len(self.tiles)
        self.partials = np.zeros((count, self.summed), np.float32)
        self.dtimes = np.empty((count, mlp_kernels.TILE * max(1, plan.time_width)), np.float32)
        self.losses = np.zeros(count)
        self.dtable = np.empty(plan.T * plan.time_width if plan.features is not None else 0, np.float32)

    def run(self, step: int, options: AdamW) -> None:
        plan, grads = self.plan, self.state.grads
        count, t, features = self._computed(step)
        width, summed, own = plan.time_width, grads[: self.summed], t[self.rows]
        parts = [Segment(summed, self._add, summed)]
        if width and plan.features is None:
            dtable = grads[plan.time_weight : plan.time_weight + plan.T * width]
            if self.tiles.start == 0:
                dtable[:] = 0
            rows = np.arange(plan.T)
            parts.append(Segment(dtable, lambda _: self._collect(own, rows, dtable), dtable, in_pieces=False))
        elif width:
            # The table's rows in the order in which the batch has their timesteps first: those that nobody before this
            # member had are zero, and do not travel.
            first = np.full(plan.T, self.batch)
            first[t[::-1]] = np.arange(self.batch)[::-1]
            rows, used = np.argsort(np.argsort(first, kind="stable")), first < self.batch
            before, after = (width * np.count_nonzero(first < at) for at in (self.rows.start, self.rows.stop))
            dtable = self.dtable
            dtable[:after] = 0

            def make() -> None:
                made = np.take(dtable.reshape(plan.T, width), rows[used], axis=0).reshape(-1)
                mlp_kernels.time_table_backward(
                    count, features, features.size // count, made, width, grads, plan.time_weight, plan.time_bias
                )

            def collect(_: slice) -> None:
                self._collect(own, rows, dtable)

            parts.append(Segment(dtable[:after], collect, None, came=dtable[:before], in_pieces=False))
            parts.append(Segment(None, collect, grads[self.summed :], make))
        total = self.team.sum(parts, self.losses.tolist())
        loss = np.array([total / (self.batch * plan.layers[-1].outputs)])
        cast(LayerBackend, self.be).finish_step(loss, step, self.state, options, self.results)

    def _collect(self, t: Array, rows: Array, dtable: Array) -> None:
        mlp_kernels.collect_times(self.dtimes.reshape(-1), t, rows, dtable, self.plan.time_width)

    def _computed(self, step: int) -> tuple[int, Array, Array]:
        """Fill the sums of this member's tiles; return how many rows of the time table there are, the timesteps of the
        batch, and the features of the rows.
        """
        be, plan, draws, params = self.be, self.plan, self.draws, self.state.params
        with be._workers.lock:
            net, asked = be._drawn(plan, draws, step, self.batch)
            network, count = net.network(params, net.t)
            mlp_kernels.transpose_weights(net.layers[1:], params, net.transposed)
            data = draws.data.reshape(len(draws.data), -1)
            samples = data, net.indices, net.t, net.tables, self.batch, step, TRAIN_NOISE, net.keys
            sums = self.partials, self.dtimes, self.losses

            def body(worker: int, start: int, stop: int) -> None:
                mlp_kernels.gradient_share(
                    start, stop, self.tiles.start, net.not_given, samples, network, net.asked(asked, worker), sums,
                    be._rooms[worker], net.arenas[worker], net.deltas[worker],
                )  # fmt: skip

            be._workers.run(body, len(self.tiles), 1)
            features = net.rows[: count * plan.features.shape[1]] if plan.features is not None else net.rows
            return count, net.t.copy(), features.copy()

    def _add(self, part: slice) -> None:
        grads = self.state.grads
        for tile, partial in zip(self.tiles, self.partials, strict=True):
            if tile == 0:
                grads[part] = partial[part]
            else:
                grads[part] += partial[part]
