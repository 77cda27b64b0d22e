"""The network operations of the CUDA backend: which kernels of ``mlp.cu`` run, in which order, on which buffers.

With precision "bf16x3" or "bf16" what runs in one launch is ``mlp_mma.cu``; all else multiplies float32.

A network whose activations fit into shared memory, 32 samples at a time, runs in one launch: its forward pass, and a
whole sampling chain. Both are the same kernel, so a chain has the bits of its steps, and a sample's bits do not depend
on its batch. Wider networks, and training, go layer by layer, with products by the kernels of convolutions. The choice
is made by `chain_tile` from the sizes of the layers, never from the batch. A chain given observations goes layer by
layer too, and a row of it is a recording.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.device import SHARED_LIMITS
from fastdiff.backends.cuda.layers import LayerOperations
from fastdiff.backends.cuda.recording import RecordingOperations
from fastdiff.backends.cuda.step import no_variance, row_records, step_plan
from fastdiff.backends.cuda.tmpd import TmpdOperations
from fastdiff.backends.layers import Batch, Recording
from fastdiff.backends.protocol import (
    AdamW,
    Backend,
    ChainTable,
    DenseLayer,
    Inputs,
    LinearPart,
    MLPPlan,
    PartGradient,
    Row,
    TmpdPlan,
    TmpdWorkspace,
    Training,
    TrainingDraws,
    TrainState,
)
from fastdiff.forks import cached_property
from fastdiff.kernels.cuda.runtime import Runtime
from fastdiff.noise import Draw, Stream, drop_limit, round_keys

Array = Any

ACTIVATIONS = {"none": 0, "leaky_relu": 1, "silu": 2}
MODES = {"none": 0, "shift": 1, "scale_shift": 2}

SHARED_LIMIT = SHARED_LIMITS["9.0"]
THREADS = 256  # of `mlp_chain` and `mlp_order_times`, which are written for it
VALUE = 4  # bytes
STEP = 16  # rows and columns of a matrix on tensor cores


class ChainTile(NamedTuple):
    """How `mlp_chain` runs a network.

    Attributes
    ----------
    rows : int
        Samples of a tile.
    staged : bool
        Whether the parameters lie in shared memory too, or are read through the caches.
    """

    rows: int
    staged: bool


TILES = tuple(ChainTile(rows, staged) for rows in (64, 32) for staged in (True, False))
FEW = 8  # samples of a tile where larger ones would leave multiprocessors idle
# On tensor cores. 128 samples are for weights that leave room for one block on a multiprocessor.
MMA_TILES = (ChainTile(128, True), *TILES)
MMA_FEW = STEP
HALVES = {"bf16x3": 2, "bf16": 1}  # how many bf16 a factor is, where it is not float32


def _round4(n: int) -> int:
    return -(-n // 4) * 4


def _round_step(n: int) -> int:
    return -(-n // STEP) * STEP  # mma_round in mlp_mma.cu


def _pitch(n: int) -> int:
    return (n + 3) // 8 * 8 + 4  # mlp_pitch in mlp.cuh


def _widths(plan: MLPPlan) -> tuple[int, int]:
    """Widest output of the layers 0, 2, ... and 1, 3, ..., or what a linear part needs there."""
    outputs, rank = [layer.outputs for layer in plan.layers], 0 if plan.linear is None else plan.linear.rank
    ranks = (0, rank) if len(outputs) % 2 else (rank, 0)  # the product with its basis lies where the output does not
    return max(*outputs[::2], ranks[0]), max(*outputs[1::2], 0, ranks[1])


def _room(plan: MLPPlan, halves: int) -> tuple[int, int]:
    """Bytes for a sample of what the layers 0, 2, ... and 1, 3, ... of `mlp_mma.cu` leave, multiples of 16."""

    def factors(n: int) -> int:
        return 2 * halves * (_round_step(n) + 8)

    d, *_, last = plan.layers[0].inputs, *(layer.outputs for layer in plan.layers)
    room = [0, factors(d)]  # the first layer finds its factors where the second leaves its own
    for k, layer in enumerate(plan.layers[:-1]):
        room[k % 2] = max(room[k % 2], factors(layer.outputs))
    where = (len(plan.layers) - 1) % 2
    room[where] = max(room[where], VALUE * _pitch(last))
    if plan.linear is not None:  # its two products find theirs where the output does not lie
        room[1 - where] = max(room[1 - where], factors(d) + factors(plan.linear.rank))
    return room[0], room[1]


def layer_sizes(layers: Iterable[tuple[int, int]], precision: str = "float32") -> list[tuple[int, int]]:
    """Return how many packed values the W and the bias of layers of so many inputs and outputs have.

    Of float32 every row of W and every bias is a multiple of four values; on tensor cores both sides of W are multiples
    of 16, and a value holds two bf16: the high and the low part of one, or two that are neighbours.
    """
    if precision == "float32":
        return [(inputs * _round4(outputs), _round4(outputs)) for inputs, outputs in layers]
    sides = [(_round_step(inputs), _round_step(outputs)) for inputs, outputs in layers]
    return [(rows * columns * HALVES[precision] // 2, columns) for rows, columns in sides]


def packed_size(plan: MLPPlan, precision: str = "float32") -> int:
    """Return the length of the packed parameters in values of 4 bytes, see `layer_sizes`."""
    return sum(map(sum, layer_sizes([(layer.inputs, layer.outputs) for layer in plan.layers], precision)))


def shared_bytes(plan: MLPPlan, tile: ChainTile, precision: str = "float32", *, memory: bool = True) -> int:
    """Return the shared memory of a block of `mlp_chain`; `memory`: the table remembers a row, or several."""
    if precision == "float32":
        left = VALUE * sum(map(_pitch, _widths(plan)))
    else:
        left = sum(_room(plan, HALVES[precision]))
    row = (2 if memory else 1) * VALUE * _pitch(plan.layers[0].inputs) + left + VALUE  # the last: the timestep
    return tile.rows * row + VALUE * (packed_size(plan, precision) if tile.staged else 0)


def chain_tile(
    plan: MLPPlan, shared_limit: int = SHARED_LIMIT, precision: str = "float32", rows: int | None = None
) -> ChainTile | None:
    """Return how a network runs in one launch, None where it is too wide for that. Large tiles come first.

    With `rows` that of tiles of so many samples. A network that is asked for something goes layer by layer: every
    sample has a row of the time table of its own, and those of a tile are more than shared memory holds beside its
    activations.
    """
    if plan.asked:
        return None
    tiles = TILES if precision == "float32" else MMA_TILES
    if rows is not None:
        tiles = (ChainTile(rows, True), ChainTile(rows, False))
    return next((tile for tile in tiles if shared_bytes(plan, tile, precision) <= shared_limit), None)


def chain_plan(plan: MLPPlan, shared_limit: int = SHARED_LIMIT, precision: str = "float32") -> str:
    """Return in words how the network's sampling chain runs where a block may have so much shared memory, and why."""

    def size(count: int) -> str:
        return f"{count / 1024:.0f} KB"

    tile, apart = chain_tile(plan, shared_limit, precision), "layer by layer"
    apart += "" if precision == "float32" else ", in float32"
    if plan.asked:
        return f"{apart}: every sample has a row of the time table of its own, by what is asked of it"
    if tile is None:
        least = size(shared_bytes(plan, TILES[-1], precision))
        return f"{apart}: {TILES[-1].rows} samples need {least} of shared memory, a block has {size(shared_limit)}"
    needed, weights = (
        size(count) for count in (shared_bytes(plan, tile, precision), VALUE * packed_size(plan, precision))
    )
    how = f"one launch: {tile.rows} samples in {needed} of shared memory, weights in "
    return how + ("it" if tile.staged else f"the caches: their {weights} do not fit beside")


class _Part:
    """The linear part of a network on the device.

    Attributes
    ----------
    flat : array
        The basis, zeros for a bias, its transpose, and zeros again.
    rows : list of tuple
        Its two products as layers of `mlp_chain`.
    values : array
        What `mlp_chain` takes: room for their packed parameters, `size` values, then the gains, at `gains`, and the
        rest, at `rest` or, where there is none, at 0.
    """

    def __init__(self, part: LinearPart, runtime: Runtime, precision: str) -> None:
        d, rank = part.basis.shape
        arrays = (part.basis, np.zeros(rank), part.basis.T, np.zeros(d))
        self.rank, self.flat = rank, runtime.asarray(_joined(*arrays))
        self.basis = self.flat[: d * rank].reshape(d, rank)
        self.transposed = self.flat[(d + 1) * rank : (2 * d + 1) * rank].reshape(rank, d)
        end, zeros = (d + 1) * rank, (0, 0, 0)  # no activation, no time
        layers = [(d, rank, 0, d * rank, *zeros), (rank, d, end, end + rank * d, *zeros)]
        self.rows, self.size = _packed_rows(layers, precision)
        self.gains = self.size
        self.rest = 0 if part.rest is None else self.gains + part.gains.size
        rest = np.empty(0) if part.rest is None else part.rest
        self.values = runtime.asarray(_joined(np.zeros(self.size), part.gains, rest))
        self.packed = False


def _packed_rows(
    layers: Sequence[tuple[int, int, int, int, int, int, int]], precision: str
) -> tuple[list[tuple[int, ...]], int]:
    """Return the layer table that a kernel takes, from its columns but WEIGHT and BIAS, and the packed size."""
    sizes = layer_sizes([layer[:2] for layer in layers], precision)
    rows: list[tuple[int, ...]] = []
    at = 0
    for layer, (of_weight, of_bias) in zip(layers, sizes, strict=True):
        rows.append((*layer[:2], at, at + of_weight, *layer[2:]))
        at += of_weight + of_bias
    return rows, at


def _joined(*arrays: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float32)


class _Times(NamedTuple):
    """The time table, where samples find their rows in it, and their timesteps."""

    table: Array | None
    places: Array
    t: Array


class _DeviceTable(NamedTuple):
    """A sampler's table on the device, as `mlp_chain` takes it, and what it was made from."""

    depth: int = 0
    records: Array = None
    steps: Array = None
    rows: tuple[Row, ...] = ()
    clip: tuple[float, float] | None = None


NO_ROWS = _DeviceTable()


class _Network:
    """What the kernels need of one network, made once, and the buffers of its training, grown with the batch."""

    def __init__(self, plan: MLPPlan, runtime: Runtime, precision: str) -> None:
        self.plan: MLPPlan = weakref.proxy(plan)  # the plan is a weak key of the dictionary that holds this
        self.runtime = runtime
        self.tile = chain_tile(plan, runtime.shared_limit, precision)
        self.widths = _widths(plan) if precision == "float32" else _room(plan, HALVES[precision])
        self.packed = runtime.empty((packed_size(plan, precision) if self.tile else 0,))
        rows, _ = _packed_rows(
            [
                (layer.inputs, layer.outputs, layer.weight, layer.bias, ACTIVATIONS[layer.activation],
                 MODES[layer.time], layer.time_column)
                for layer in plan.layers
            ],
            precision,
        )  # fmt: skip
        self.part = None if plan.linear is None else _Part(plan.linear, runtime, precision)
        rows += [] if self.part is None else self.part.rows
        # The kernel's offsets have 32 bits; a network that is too wide for shared memory does without the table.
        self.layers = runtime.asarray(np.array(rows, np.int32)) if self.tile else None
        self.features = self.table = self.dtable = None
        if plan.features is not None:
            self.features = runtime.asarray(plan.features.astype(np.float32))
            self.table = runtime.empty((plan.T, plan.time_width))
            self.dtable = runtime.empty((plan.T, plan.time_width))
        self.loss = runtime.empty((1,), np.float64)
        self.widest = max(max(layer.inputs, layer.outputs) for layer in plan.layers)
        self.room: tuple[Array, Array] | None = None  # of the linear part's products in a gradient
        self.batch = 0
        self.buffers: dict[str, Array] = {}
        self.tmpd: _TmpdChain | None = None  # the last
        self.moves = 0  # how often draws or buffers that a recording may use have changed
        self.draws: TrainingDraws | None = None
        self.sampler = NO_ROWS
        self.data = self.tables = self.terms = self.labels = self.covariates = None
        self._own: Array = None
        self.keys: npt.NDArray[np.uint32] = np.empty(0, np.uint32)

    def sampler_of(self, rows: tuple[Row, ...], clip: tuple[float, float] | None) -> _DeviceTable:
        """Return a table on the device; the last one is kept."""
        if self.sampler.rows is not rows or self.sampler.clip != clip:
            for row in rows:
                if row.r != 0:
                    raise no_variance(row)
            records = self.runtime.asarray(row_records(rows, clip).view(np.uint8))
            steps = self.runtime.asarray(np.array([(row.t, row.step, row.evaluates) for row in rows], np.int64).T)
            self.sampler = _DeviceTable(max(row.depth for row in rows), records, steps, rows, clip)
        return self.sampler

    def use(self, draws: TrainingDraws) -> None:
        """Have the data and the tables of a training on the device."""
        if self.draws is not draws:
            self.draws, self.keys, self.moves = draws, round_keys(draws.seed), self.moves + 1
            self.data = self.runtime.asarray(draws.data, np.float32)
            self.tables = self.runtime.asarray(np.array(draws[1:5], np.float32))
            for name, dtype in (("terms", np.float32), ("labels", np.int64), ("covariates", np.float32)):
                array = getattr(draws, name)
                setattr(self, name, None if array is None else self.runtime.asarray(array, dtype))

    def own(self, n: int) -> Array:
        """Return 0 .. n - 1, the places of samples whose rows of the time table are their own."""
        if self._own is None or len(self._own) < n:
            self._own = self.runtime.asarray(np.arange(n), np.int64)
        return self._own[:n]

    def grow(self, n: int) -> None:
        """Have buffers for a gradient of n samples."""
        if n == self.batch:
            return
        plan, empty = self.plan, self.runtime.empty
        self.buffers = {
            "x": empty((n, plan.layers[0].inputs)), "target": empty((n, plan.layers[-1].outputs)),
            "t": empty((n,), np.int64), "terms": empty((n, 1)), "dtime": empty((n, plan.time_width)),
            "order": empty((n,), np.int32), "spare order": empty((n,), np.int32),
            "d0": empty((n * self.widest,)), "d1": empty((n * self.widest,)),
        }  # fmt: skip
        if plan.asked:
            self.own(n)
            self.buffers |= {
                "asked": empty((n, plan.asked)), "times": empty((n, plan.time_width)),
                "sums": empty((plan.time_width,)),
            }  # fmt: skip
        for k, layer in enumerate(plan.layers):
            self.buffers[f"u{k}"] = empty((n, layer.outputs))
            # u is needed again by the backward pass of these; elsewhere the sign of y is enough.
            keep = layer.activation == "silu" or layer.time == "scale_shift"
            self.buffers[f"y{k}"] = empty((n, layer.outputs)) if keep else self.buffers[f"u{k}"]
        if self.part is not None:
            self.room = empty((n, self.part.rank)), empty((n, len(self.part.basis)))
        self.batch, self.moves = n, self.moves + 1


def _weight(layer: DenseLayer, flat: Array) -> Array:
    size = layer.inputs * layer.outputs
    return flat[layer.weight : layer.weight + size].reshape(layer.inputs, layer.outputs)


def _of_asked(plan: MLPPlan, flat: Array) -> Array:
    size = plan.asked * plan.time_width
    return flat[plan.asked_weight : plan.asked_weight + size].reshape(plan.asked, plan.time_width)


def _bias(layer: DenseLayer, flat: Array) -> Array:
    return flat[layer.bias : layer.bias + layer.outputs]


class MLPOperations(LayerOperations, RecordingOperations, TmpdOperations):
    """Perceptrons: forward, gradient, training, and a sampling chain."""

    @cached_property
    def _mlp_networks(self) -> weakref.WeakKeyDictionary[MLPPlan, dict[tuple[int, int], _Network]]:
        return weakref.WeakKeyDictionary()

    def _network(self, plan: MLPPlan, part: int = 0) -> _Network:
        """The network's buffers for the current queue: work on another one may still use those of that one.

        Parts of a batch, of so many rows each, have buffers of their own.
        """
        networks, key = self._mlp_networks.setdefault(plan, {}), (self.runtime.queue(), part)
        if key not in networks:
            networks[key] = _Network(plan, self.runtime, self.precision)
        return networks[key]

    def _launch(self, entry: str, items: int, *args: Any) -> None:
        """Launch a kernel that loops over `items`."""
        self.runtime.launch("mlp", entry, *self.runtime.grid_1d(items), args)

    def mlp_forward(self, plan: MLPPlan, params: Array, inputs: Inputs, out: Array | None = None) -> Array:
        x, t, _ = inputs
        y = self.runtime.empty((len(x), plan.layers[-1].outputs)) if out is None else out
        if len(x) == 0:
            return y
        with self._lock:
            net = self._network(plan)
            if net.tile is not None:
                self._tiles(net, params, x, (y, t))
            else:
                self._forward(net, params, inputs, y)
        return y

    def mlp_chain(
        self, plan: MLPPlan, params: Array, x: Array, table: ChainTable, draw: Draw, asked: Array | None = None
    ) -> None:
        (rows, clip, weights, levels), n = table, len(x)
        if n == 0 or not rows:
            return
        with self._lock:
            net = self._network(plan)
            if net.tile is not None:
                self._tiles(net, params, x, (None, None), rows, clip, draw)
                return
        memory = tuple(self.runtime.zeros(x.shape) for _ in range(max(row.depth for row in rows)))
        lanes = n if weights is None else 2 * n  # guided ones come twice, asked and not
        out, t = self.runtime.empty((lanes, x.shape[1])), self.runtime.empty((lanes,), np.int64)
        if weights is not None:
            twice, both = self.runtime.empty(out.shape), self.runtime.zeros((lanes, plan.asked))
            self.runtime.copy(both[:n], asked)
            if plan.known:
                both[n:, -plan.known :] = both[:n, -plan.known :]
        known = None if asked is None else asked.reshape(-1)[plan.asked - plan.known :]
        for i, row in enumerate(rows):
            if row.evaluates and known is not None and levels is not None:
                self._hold(x, known, plan.asked, levels[i])
            if row.evaluates and weights is not None and weights[i] != 1:
                t.fill(row.t)
                for half in (twice[:n], twice[n:]):
                    self.runtime.copy(half, x)
                self.mlp_forward(plan, params, Inputs(twice, t, both), out)
                self.guide(out[:n], out[n:], float(weights[i]), 0.0, out[:n])
            elif row.evaluates:
                t.fill(row.t)
                self.mlp_forward(plan, params, Inputs(x, t[:n], asked), out[:n])
            self.sampler_step(x, out[:n] if row.evaluates else None, memory, row, clip, draw.at(row.step))

    def mlp_chain_tmpd(
        self, plan: MLPPlan, params: Array, x: Array, rows: tuple[Row, ...], draw: Draw, tmpd: TmpdPlan
    ) -> bool:
        if len(x) == 0 or not rows:
            return True
        with self._lock:
            net, depth = self._network(plan), max(row.depth for row in rows)
            net.grow(len(x))
            if net.tmpd is None or not net.tmpd.fits(params, x, tmpd, depth):
                net.tmpd = None  # the old one goes before the new one comes
                net.tmpd = _TmpdChain(self, net, params, x.shape, tmpd, depth)
            net.tmpd.run(x, rows, draw)
        return True

    def mlp_gradient(
        self, plan: MLPPlan, params: Array, inputs: Inputs, target: Array, grads: Array
    ) -> tuple[float, Array]:
        n, dx = len(inputs.x), self.runtime.empty(inputs.x.shape)
        if n == 0:
            grads.fill(0)
            return math.nan, dx
        with self._lock:
            net = self._network(plan)
            net.grow(n)
            self._gradient(net, params, inputs, target, grads, dx)
            return float(self.runtime.to_numpy(net.loss)[0]), dx

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
        """`mlp_vjp` or `mlp_jvp`, layer by layer; the forward pass runs once for all vectors."""
        x, t, asked = inputs
        if given.size == 0:
            return
        with self._lock:
            net = self._network(plan)
            net.grow(len(x))
            times = self._times(net, params, t, asked)
            kept = self._kept(net, params, times, x)
            if y is not None:
                self.runtime.copy(y, kept[-1])
                self._add_part(net, x, y, t, net.room)
            vectors, results = (array.reshape(-1, array.shape[-1]) for array in (given, out))
            self._product(net, params, times, kept, vectors, results, backward=backward)

    def _product(
        self,
        net: _Network,
        params: Array,
        times: _Times,
        kept: list[Array],
        given: Array,
        out: Array,
        *,
        backward: bool,
    ) -> None:
        """out = J^T given, or J given, for vectors (k n, ...), by what `_kept` has kept of n samples."""
        layers, rows = range(len(net.plan.layers)), len(given)
        room, here = [self._scratch(f"product {i}", rows * net.widest) for i in range(2)], given
        for turn, k in enumerate(reversed(layers) if backward else layers):
            layer = net.plan.layers[k]
            width = layer.inputs if backward else layer.outputs
            to = out if turn == layers[-1] else room[turn % 2][: rows * width].reshape(rows, width)
            if not backward:
                self._dense(here, _weight(layer, params), to)
            of = to if not backward else here if turn else room[1][: here.size].reshape(here.shape)  # not the caller's
            if layer.activation != "none" or layer.time == "scale_shift":
                self._slope(net, k, to if not backward else here, of, kept[k + 1], times)
                here = of
            if backward:
                self._dense_backward(here, to, _weight(layer, params), to, None, None)
            here = to
        if net.part is not None:
            sizes = rows * net.part.rank, rows * len(net.part.basis)
            h, product = (self._scratch(f"part {i}", size)[:size].reshape(rows, -1) for i, size in enumerate(sizes))
            self._add_part(net, given, out, times.t, (h, product))

    def _kept(self, net: _Network, params: Array, times: _Times, x: Array) -> list[Array]:
        """Run the layers, and keep what a backward pass needs: return x and the output of every layer."""
        layers, buffers = range(len(net.plan.layers)), net.buffers
        kept = [x, *(buffers[f"y{k}"] for k in layers)]
        for k in layers:
            self._layer(net, k, params, times, kept[k], buffers[f"u{k}"], kept[k + 1])
        return kept

    def _slope(
        self,
        net: _Network,
        k: int,
        given: Array,
        d: Array,
        y: Array,
        times: _Times,
        dtime: Array | None = None,
    ) -> None:
        """Fill d with what is given times dy / du of layer k, and where it is given the layer's columns of dtime."""
        layer, width = net.plan.layers[k], net.plan.time_width
        self._launch(
            "mlp_layer_backward", d.size,
            given, d, net.buffers[f"u{k}"], y, *times[:2], dtime, len(d), len(y), d.shape[1], width,
            layer.time_column, MODES[layer.time], ACTIVATIONS[layer.activation],
        )  # fmt: skip

    def mlp_train_gradient(
        self, plan: MLPPlan, params: Array, draws: TrainingDraws, step: int, batch: int, grads: Array
    ) -> float:
        with self._lock:
            loss = self._train_gradient(self._trained(plan, draws, batch), params, step, grads)
            return float(self.runtime.to_numpy(loss)[0])

    def mlp_training(
        self, plan: MLPPlan, draws: TrainingDraws, batch: int, state: TrainState, results: Array
    ) -> Training:
        return _Steps(self, plan, draws, batch, state, results)

    def mlp_parts(self, plan: MLPPlan, params: Array, draws: TrainingDraws) -> PartGradient:
        return _Parts(self, plan, params, draws).gradient

    def _trained(self, plan: MLPPlan, draws: TrainingDraws, batch: int, part: int = 0) -> _Network:
        net = self._network(plan, part)
        net.grow(batch)
        net.use(draws)
        return net

    def _train_gradient(self, net: _Network, params: Array, step: int, grads: Array) -> Array:
        """Issue `mlp_train_gradient`; once the work is done, what is returned holds the loss."""
        x, t, target = self._draw(net, step)
        asked = None if not net.plan.asked else self._draw_asked(net, step)
        return self._drawn_gradient(net, params, Inputs(x, t, asked), target, grads)

    def _drawn_gradient(self, net: _Network, params: Array, inputs: Inputs, target: Array, grads: Array) -> Array:
        """Issue the gradient of a batch that has been drawn; what is returned will hold the loss."""
        terms = None
        if net.terms is not None:
            terms = net.buffers["terms"]
            self.take(net.terms, inputs.t, terms)
        self._gradient(net, params, inputs, target, grads, None, terms)
        return net.loss

    def _draw_part(self, net: _Network, step: int, first: int) -> tuple[Inputs, Array]:
        """Inputs and target of so many positions of a training step, from `first` on."""
        plan, draws = net.plan, net.draws
        assert net.data is not None and draws is not None  # noqa: PT018
        x, t, target = (net.buffers[name] for name in ("x", "t", "target"))
        (n, d), columns = x.shape, plan.asked - plan.classes - plan.known
        # As an image network draws a row of pixels.
        data = net.data.reshape(len(net.data), *((2,) if draws.masked else ()), 1, d, 1)
        draws = draws._replace(data=data, labels=net.labels, covariates=net.covariates)
        labels = self._scratch("labels of a part", n, np.int64)[:n] if plan.classes else None
        numbers = self._room_of("numbers", n, columns) if columns else None
        image = n, 1, d, 1
        self.draw_batch(draws, Batch(x.reshape(image), t, target.reshape(image), labels, None, numbers), step, first)
        pieces = [] if numbers is None else [numbers]
        if labels is not None:  # the null class has none of the columns
            pieces.insert(0, self._room_of("classes", n, plan.classes))
            self.take(self._table(np.eye(plan.classes + 1, plan.classes)), labels, pieces[0])
        if plan.known:
            pieces.append(self._room_of("known", n, plan.known))
            flat = pieces[-1].reshape(-1)
            self._draw_known(draws, net.data, net.tables, (x, t, target), (flat, flat[d:], plan.known), (step, first))
        while len(pieces) > 1:
            *before, a, b = pieces
            pieces = [*before, self._room_of(f"{len(before)} and more", n, a.shape[1] + b.shape[1])]
            self.concatenate(a, b, pieces[-1])
        return Inputs(x, t, pieces[0] if pieces else None), target

    def _room_of(self, what: str, n: int, width: int) -> Array:
        return self._scratch(f"{what} of a part", n * width)[: n * width].reshape(n, width)

    def _draw_asked(self, net: _Network, step: int) -> Array:
        """What is asked of the rows of a training step, in the network's buffer."""
        asked, draws, plan = net.buffers["asked"], net.draws, net.plan
        assert draws is not None
        columns = plan.asked - plan.classes - plan.known
        if plan.classes + columns:
            self._launch(
                "mlp_draw_asked", len(asked) * (plan.classes + columns),
                net.labels, net.covariates, asked, len(asked), draws.bound, plan.classes, columns, plan.asked,
                drop_limit(draws.drop), step, self._step_at(), net.keys,
            )  # fmt: skip
        if plan.known:
            first, d, flat = plan.asked - plan.known, plan.known // 2, asked.reshape(-1)
            batch = net.buffers["x"], net.buffers["t"], net.buffers["target"]
            known = flat[first:], flat[first + d :], plan.asked
            self._draw_known(draws, net.data, net.tables, batch, known, (step, 0))
        return asked

    def _draw(self, net: _Network, step: int) -> tuple[Array, Array, Array]:
        """x_t, t and target of a training step, in the network's buffers."""
        assert net.data is not None and net.draws is not None  # noqa: PT018
        n, d = net.buffers["x"].shape
        x, t, target = (net.buffers[name] for name in ("x", "t", "target"))
        pitch = net.data.size // len(net.data)  # values behind x0 are added to the target
        self._launch(
            "mlp_draw_batch", n * (-(-d // 4)),
            net.data, net.tables, x, target, t, n, d, pitch, net.draws.bound, net.plan.T, step, self._step_at(),
            net.keys,
        )  # fmt: skip
        return x, t, target

    def _time_table(self, net: _Network, params: Array) -> Array | None:
        """The time table (T, time_width), flat where it is a parameter; None for a network without time."""
        plan = net.plan
        if plan.time_width == 0:
            return None
        if net.features is None:
            return params[plan.time_weight : plan.time_weight + plan.T * plan.time_width]
        self._launch(
            "mlp_time_table", plan.T * plan.time_width,
            net.features, params[plan.time_weight :], params[plan.time_bias :], net.table,
            plan.T, net.features.shape[1], plan.time_width,
        )  # fmt: skip
        return net.table

    def _times(self, net: _Network, params: Array, t: Array, asked: Array | None, room: Array | None = None) -> _Times:
        """The time table as samples find it: with rows of their own, of a network that is asked for something.

        These lie in `room` (n, time_width), by default the buffer of gradients.
        """
        table, plan = self._time_table(net, params), net.plan
        if asked is None:
            return _Times(table, t, t)
        rows, n = net.buffers["times"] if room is None else room, len(t)
        self._dense(asked, _of_asked(plan, params), rows)
        self._launch("mlp_add_times", rows.size, rows, table, t, n, plan.time_width)
        return _Times(rows, net.own(n), t)

    def _tiles(
        self,
        net: _Network,
        params: Array,
        x: Array,
        forward: tuple[Array | None, Array | None],
        rows: tuple[Row, ...] = (),
        clip: tuple[float, float] | None = None,
        draw: Draw = Draw(0, Stream.STEP),  # noqa: B008 - immutable
    ) -> None:
        """One launch of `mlp_chain`: all rows, or where there are none the forward pass to an output, at timesteps."""
        plan, n, table = net.plan, len(x), self._time_table(net, params)
        assert net.tile is not None
        plain = self.precision == "float32"
        self._pack(params, net.packed, net.layers, len(plan.layers))
        sampler = net.sampler_of(rows, clip) if rows else NO_ROWS
        deep = self._scratch("chain", 2 * x.size) if sampler.depth > 1 else None
        tile = self._tile_of(net, n)
        shared, threads = shared_bytes(plan, tile, self.precision, memory=sampler.depth > 0), THREADS
        if plain:
            source, entry = "mlp", "mlp_chain" if net.part is None else "mlp_chain_part"
        else:
            source, entry = "mlp_mma", f"mlp_chain_{self.precision}"
            if tile.rows > MMA_FEW and 2 * shared > self.runtime.shared_limit:  # one block on a multiprocessor
                threads = 2 * THREADS
        grid, _ = self.runtime.grid_1d(-(-n // tile.rows) * threads, threads)
        self.runtime.launch(
            source, entry, grid, threads,
            (x, *forward, sampler.records, sampler.steps, len(rows), sampler.depth, deep, net.layers, len(plan.layers),
             net.packed, net.packed.size, table, plan.time_width, *self._part(net), n, tile.rows, *net.widths,
             tile.staged, draw.first_row, round_keys(draw.seed)),
            shared,
        )  # fmt: skip

    def _tile_of(self, net: _Network, n: int) -> ChainTile:
        """The tile for n samples, smaller ones where that keeps more multiprocessors busy; it changes no bits."""
        assert net.tile is not None
        plain = self.precision == "float32"
        rows = {tile.rows: None for tile in (TILES if plain else MMA_TILES)}  # the largest first
        sizes = [size for size in rows if size <= net.tile.rows and -(-n // size) >= self.runtime.multiprocessors]
        if plain:
            return net.tile._replace(rows=sizes[0] if sizes else FEW)
        tile = chain_tile(net.plan, self.runtime.shared_limit, self.precision, sizes[0] if sizes else MMA_FEW)
        assert tile is not None  # it is no larger than the network's
        return tile

    def _pack(self, params: Array, packed: Array, layers: Array, count: int, size: int | None = None) -> None:
        """Fill what a chain reads of its layers' parameters, the first `size` values of `packed`."""
        args = params, packed, layers, count, packed.size if size is None else size
        if self.precision == "float32":
            self._launch("mlp_pack", args[-1], *args)
        else:
            grid, block = self.runtime.grid_1d(args[-1])
            self.runtime.launch("mlp_mma", "mlp_mma_pack", grid, block, (*args, HALVES[self.precision]))

    def _layer(self, net: _Network, k: int, params: Array, times: _Times, x: Array, u: Array, y: Array) -> None:
        """Of layer k, u = x W + bias, y = act((1 + gain) u + shift)."""
        layer, width, (n, m) = net.plan.layers[k], net.plan.time_width, u.shape
        self._dense(x, _weight(layer, params), u)
        self._launch(
            "mlp_bias_activate", n * m,
            u, y, _bias(layer, params), *times[:2], n, m, width, layer.time_column,
            MODES[layer.time], ACTIVATIONS[layer.activation],
        )  # fmt: skip

    def _forward(self, net: _Network, params: Array, inputs: Inputs, y: Array) -> None:
        """Layer by layer, keeping nothing."""
        x, t, asked = inputs
        room = None if asked is None else self.runtime.empty((len(x), net.plan.time_width))
        times, (*hidden, _), h = self._times(net, params, t, asked, room), net.plan.layers, x
        for k, layer in enumerate(hidden):
            u = self.runtime.empty((len(x), layer.outputs))
            self._layer(net, k, params, times, h, u, u)
            h = u
        self._layer(net, len(hidden), params, times, h, y, y)
        self._add_part(net, x, y, t)

    def _part(self, net: _Network) -> tuple[Any, ...]:
        """The network's linear part as `mlp_chain` takes it."""
        part = net.part
        if part is None:
            return () if self.precision == "float32" else (None, 0, 0, 0)
        if not part.packed:
            assert net.layers is not None
            layers = net.layers[len(net.plan.layers) :]
            self._pack(part.flat, part.values, layers, len(layers), part.size)
            part.packed = True
        return part.values, part.rank, part.gains, part.rest

    def _add_part(self, net: _Network, x: Array, y: Array, t: Array, room: tuple[Array, Array] | None = None) -> None:
        """Add the linear part of the output for x to y, or, as it is symmetric, of the gradient of y to that of x.

        There may be several rows of each of the samples that t is of, those of the first vector first.
        """
        part = net.part
        if part is None:
            return
        n, d = x.shape
        h, product = room or (self.runtime.empty((n, part.rank)), self.runtime.empty((n, d)))
        self._dense(x, part.basis, h)
        self._launch("mlp_scale", h.size, h, part.values[part.gains :], t, n, len(t), part.rank)
        self._dense(h, part.transposed, product)
        rest = part.values[part.rest :] if part.rest else None
        self._launch("mlp_add_part", x.size, y, product, x, rest, t, n, len(t), d)

    def _gradient(
        self,
        net: _Network,
        params: Array,
        inputs: Inputs,
        target: Array,
        grads: Array,
        dx: Array | None,
        terms: Array | None = None,
    ) -> None:
        """Fill `grads`, net.loss and, where given, dx."""
        x, t, asked = inputs
        plan, buffers, n, width = net.plan, net.buffers, len(x), net.plan.time_width
        times = self._times(net, params, t, asked)
        kept = self._kept(net, params, times, x)
        self._add_part(net, x, kept[-1], t, net.room)

        dy, free = buffers["d0"], buffers["d1"]
        self.squared_error(kept[-1], target, dy, net.loss, terms)
        of_output = None
        if dx is not None and net.part is not None:
            of_output = self.runtime.empty(x.shape)
            of_output[...] = dy[: x.size].reshape(x.shape)
        for k in reversed(range(len(plan.layers))):
            layer = plan.layers[k]
            du = dy[: n * layer.outputs].reshape(n, layer.outputs)
            self._slope(net, k, du, du, kept[k + 1], times, buffers["dtime"])
            to = dx
            if k > 0:
                to = free[: n * layer.inputs].reshape(n, layer.inputs)
            self._dense_backward(du, kept[k], _weight(layer, params), to, _weight(layer, grads), _bias(layer, grads))
            dy, free = free, dy
        if of_output is not None:
            self._add_part(net, of_output, dx, t, net.room)
        if asked is not None:
            of_asked = _of_asked(plan, params), None, _of_asked(plan, grads), buffers["sums"]
            self._dense_backward(buffers["dtime"], asked, *of_asked)
        if width:
            self._time_gradient(net, t, grads)

    def _time_gradient(self, net: _Network, t: Array, grads: Array) -> None:
        """Gradient of the time table from the rows of dtime, and of what it is made from."""
        plan, n, width = net.plan, len(t), net.plan.time_width
        dtime, order, spare = (net.buffers[name] for name in ("dtime", "order", "spare order"))
        dtable = net.dtable
        if dtable is None:
            dtable = grads[plan.time_weight : plan.time_weight + plan.T * width]
        self.runtime.launch("pointwise", "fill", *self.runtime.grid_1d(dtable.size), (dtable, dtable.size, 0))
        self.runtime.launch("mlp", "mlp_order_times", 1, THREADS, (t, order, spare, n, plan.T))
        self._launch("mlp_time_gradient", n * width, dtime, t, order, dtable, n, width)
        if net.features is not None:
            count = net.features.shape[1]
            self._launch(
                "mlp_time_table_backward", (count + 1) * width,
                net.features, dtable, grads[plan.time_weight :], grads[plan.time_bias :], plan.T, count, width,
            )  # fmt: skip


class _Steps:
    """Training steps of a perceptron."""

    def __init__(
        self,
        be: MLPOperations,
        plan: MLPPlan,
        draws: TrainingDraws,
        batch: int,
        state: TrainState,
        results: Array,
    ) -> None:
        self.be, self.plan, self.draws, self.batch, self.state, self.results = be, plan, draws, batch, state, results
        self._of: tuple[_Network, int] | None = None
        self._recorded: Training | None = None

    def run(self, step: int, options: AdamW) -> None:
        be, state = self.be, self.state
        with be._lock:
            net = be._trained(self.plan, self.draws, self.batch)
            if self._recorded is None or self._of != (net, net.moves):

                def gradient(step: int) -> Array:
                    return be._train_gradient(net, state.params, step, state.grads)

                self._of, self._recorded = (net, net.moves), be.record_training(gradient, state, self.results)
            self._recorded.run(step, options)


class _Parts:
    """Gradients of parts of a training batch, each of which is a graph."""

    def __init__(self, be: MLPOperations, plan: MLPPlan, params: Array, draws: TrainingDraws) -> None:
        self.be, self.plan, self.params, self.draws = be, plan, params, draws
        self._step = [0]
        self._recorded: dict[int, tuple[_Network, int, Recording]] = {}  # by the first position

    def gradient(self, step: int, first: int, n: int, grads: Array) -> Array:
        """Do what `PartsBackend.mlp_parts` says; a part always has the same `grads`."""
        be, params, at = self.be, self.params, self._step
        with be._lock:
            net = be._trained(self.plan, self.draws, n, part=n)
            recorded = self._recorded.get(first)
            if recorded is None or recorded[:2] != (net, net.moves):

                def body() -> None:
                    be._drawn_gradient(net, params, *be._draw_part(net, at[0], first), grads)

                recorded = self._recorded[first] = net, net.moves, be.record(body)
            at[0] = step
            be._set_step(step)
            recorded[2].run()
            return net.loss


class _TmpdStep:
    """A row on n states given observations: the network, its products, what moves the output, and the step.

    Attributes
    ----------
    index : (n,) int64 array
        Where the noise of the states is, by the noise law.
    table : array or None
        The time table.
    """

    table: Array | None = None

    def __init__(self, be: MLPOperations, net: _Network, params: Array, shape: tuple[int, int], tmpd: TmpdPlan) -> None:
        empty = be.runtime.empty
        self.be, self.net, self.params, self.moves = be, net, params, net.moves
        self.room, self.index = TmpdWorkspace(cast(Backend, be), tmpd, shape, np.float32), empty((shape[0],), np.int64)
        self.state, self.products = empty(shape), empty((tmpd.products if tmpd.direct else 1, *shape))

    def issue(self, memory: list[Array], moves: bool) -> None:
        """Do the row that was set, one that evaluates the network, beside a table's memory."""
        be, net, params, x, t = self.be, self.net, self.params, self.state, self.room.t
        times = _Times(self.table, t, t)
        kept = be._kept(net, params, times, x)
        out = kept[-1]
        be._add_part(net, x, out, t, net.room)

        def product(cotangent: Array) -> Array:
            vectors, results = (array.reshape(-1, x.shape[1]) for array in (cotangent, self.products))
            be._product(net, params, times, kept, vectors, results, backward=True)
            return results.reshape(cotangent.shape)

        if moves:
            self.room.move(x, out, product)
        be._step_deep_recorded(x, out, None, memory, len(memory), self.index)


class _TmpdChain:
    """A perceptron's chains on n states given observations: a row is one graph."""

    def __init__(
        self, be: MLPOperations, net: _Network, params: Array, shape: tuple[int, int], tmpd: TmpdPlan, depth: int
    ) -> None:
        self.tmpd, self.memory = tmpd, [be.runtime.empty(shape) for _ in range(depth)]
        self.step = step = _TmpdStep(be, net, params, shape, tmpd)
        self._moved, self._plain = (be.record(partial(step.issue, self.memory, moves)) for moves in (True, False))

    def fits(self, params: Array, x: Array, tmpd: TmpdPlan, depth: int) -> bool:
        """Whether it is the one for these states, and the network's buffers are where they were."""
        step = self.step
        same = step.params is params and self.tmpd is tmpd and step.moves == step.net.moves
        return same and step.state.shape == x.shape and len(self.memory) == depth

    def run(self, x: Array, rows: tuple[Row, ...], draw: Draw) -> None:
        """Change x, which is from state number ``draw.first_row`` on, by all rows of a table."""
        tmpd, step, be, runtime = self.tmpd, self.step, self.step.be, self.step.be.runtime
        which, index = tmpd.states(draw.first_row, len(x))
        step.room.place(which)
        step.index[...] = runtime.asarray(index)
        runtime.copy(step.state, x)
        for array in self.memory:
            array.fill(0)
        step.table = be._time_table(step.net, step.params)
        for row in rows:
            if row.r != 0:
                raise no_variance(row)
            plan = step_plan(row, None, len(self.memory))
            be._set_row(plan.record, draw.at(row.step))
            if row.evaluates:
                step.room.t.fill(row.t)
                (self._plain if tmpd.gain[row.t] == 0 else self._moved).run()
            else:
                be._step_deep_recorded(step.state, None, None, self.memory, plan.keep, step.index)
        runtime.copy(x, step.state)
