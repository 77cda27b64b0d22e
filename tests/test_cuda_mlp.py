"""The network kernels of the CUDA backend and its network operations, run on the CPU from the same text.

Every kernel agrees with the reference's formulas, up to rounding, draws and sums in batch order to the bit; the
operations agree with NumPy in float64. A sample's bits depend on no batch, tile or order of threads, and a chain is
its steps.
"""

import gc
import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from gradcheck import scatter, with_linear
from host_cuda import ORDERS, HostRuntime, has_compiler
from tolerances import assert_close, assert_same_bits

from fastdiff import samplers
from fastdiff.backends import (
    AdamW,
    ChainTable,
    DenseLayer,
    Inputs,
    MLPPlan,
    Row,
    TrainingDraws,
    TrainState,
    get_backend,
)
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda import mlp as operations
from fastdiff.backends.cuda.device import SHARED_LIMITS
from fastdiff.backends.cuda.mlp import MMA_FEW, MMA_TILES, ChainTile, chain_plan, chain_tile, packed_size, shared_bytes
from fastdiff.backends.layers import Conv
from fastdiff.backends.numpy import functions as reference
from fastdiff.backends.numpy import mlp as perceptron
from fastdiff.errors import ArgumentError
from fastdiff.kernels.cpu.gemm import host_width
from fastdiff.nn import MLP
from fastdiff.nn.mlp import sinusoidal_features
from fastdiff.noise import Draw, Stream
from fastdiff.samplers import ddim, ddpm, dpmpp_2m, lms
from fastdiff.schedule import Schedule

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

NUMPY, CPU = get_backend("numpy"), get_backend("cpu")
F = np.float32
KINDS = list(itertools.product(["none", "leaky_relu", "silu"], ["none", "shift", "scale_shift"]))
LAYERED = 64  # bytes of shared memory: no network fits, and all go layer by layer


def cuda(order="forward", shared_limit=None, precision="float32"):
    runtime = HostRuntime(order)
    if shared_limit is not None:
        runtime.shared_limit = shared_limit
    return CudaBackend(runtime, precision=precision)


BACKENDS = {order: cuda(order) for order in ORDERS}
ONE_LAUNCH, PER_LAYER = BACKENDS["shuffled"], cuda("shuffled", LAYERED)


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(F)


# ------------------------------------------------------------------------------------------- kernels


@pytest.fixture(params=ORDERS)
def runtime(request):
    return HostRuntime(request.param)


SHAPES = [(1, 1), (5, 3), (33, 17), (7, 130)]


def modulation(mode, m, T, before=2, after=1):
    """A time table with columns of other layers on both sides."""
    return normals(T, before + {"none": 0, "shift": 1, "scale_shift": 2}[mode] * m + after, seed=7), before


def gain_and_shift(mode, table, t, column, m):
    return perceptron._gain_and_shift(mode, table[t][:, column:].astype(np.float64), m)


@pytest.mark.parametrize(("activation", "mode"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_modulation_and_activation(runtime, shape, activation, mode):
    (n, m), T = shape, 5
    product, bias, t = 3 * normals(n, m), normals(m, seed=1), np.arange(n) * 3 % T
    table, column = modulation(mode, m, T)
    codes = operations.MODES[mode], operations.ACTIVATIONS[activation]
    u, y = product.copy(), runtime.empty((n, m))
    args = (bias, table, t, n, m, table.shape[1], column, *codes)
    runtime.launch("mlp", "mlp_bias_activate", *runtime.grid_1d(n * m), (u, y, *args))
    in_place = product.copy()
    runtime.launch("mlp", "mlp_bias_activate", *runtime.grid_1d(n * m), (in_place, in_place, *args))
    assert_same_bits(u, product + bias)
    assert_same_bits(in_place, y)
    wide = product.astype(np.float64) + bias
    want = reference.activate(reference.modulate(wide, *gain_and_shift(mode, table, t, column, m)), activation)
    assert_close(y, want, terms=4)


@pytest.mark.parametrize(("activation", "mode"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_of_a_layer(runtime, shape, activation, mode):
    (n, m), T = shape, 5
    dy, u, t = normals(n, m), 3 * normals(n, m, seed=1), np.arange(n) * 3 % T
    table, column = modulation(mode, m, T)
    gain, shift = gain_and_shift(mode, table, t, column, m)
    v = reference.modulate(u.astype(np.float64), gain, shift)
    y = reference.activate(v, activation).astype(F)
    width = table.shape[1]
    d, dtime = dy.copy(), np.full((n, width), 7, F)
    kinds = operations.MODES[mode], operations.ACTIVATIONS[activation]
    args = d, d, u, y, table, t, dtime, n, n, m, width, column, *kinds
    runtime.launch("mlp", "mlp_layer_backward", *runtime.grid_1d(n * m), args)

    dv = reference.activate_backward(dy.astype(np.float64), v, activation)
    du, dgain, dshift = reference.modulate_backward(dv, u.astype(np.float64), gain)
    assert_close(d, du, terms=4)
    parts = {"none": [], "shift": [dshift], "scale_shift": [dgain, dshift]}[mode]
    want = np.full((n, width), 7.0)
    for k, part in enumerate(parts):
        want[:, column + k * m : column + (k + 1) * m] = part
    assert_close(dtime, want, terms=4)

    twice, kept = np.concatenate([dy, dy]), runtime.empty((2 * n, m))  # two vectors of each sample, not in place
    args = twice, kept, u, y, table, t, None, 2 * n, n, m, width, column, *kinds
    runtime.launch("mlp", "mlp_layer_backward", *runtime.grid_1d(2 * n * m), args)
    assert_same_bits(kept, np.concatenate([d, d]))
    assert_same_bits(twice[n:], dy)


@pytest.mark.parametrize(("T", "width"), [(1, 1), (11, 7), (40, 66)])
def test_the_time_table_and_its_gradient(runtime, T, width):
    features = sinusoidal_features(T).astype(F)
    weight, bias, dtable = normals(32, width), normals(width, seed=1), normals(T, width, seed=2)
    table, dweight, dbias = runtime.empty((T, width)), runtime.empty((32, width)), runtime.empty((width,))
    runtime.launch("mlp", "mlp_time_table", *runtime.grid_1d(T * width), (features, weight, bias, table, T, 32, width))
    args = (features, dtable, dweight, dbias, T, 32, width)
    runtime.launch("mlp", "mlp_time_table_backward", *runtime.grid_1d(33 * width), args)
    wide = [array.astype(np.float64) for array in (features, weight, bias, dtable)]
    assert_close(table, reference.linear(*wide[:3]), terms=33)
    _, want_weight, want_bias = reference.linear_backward(wide[3], wide[0], wide[1])
    assert_close(dweight, want_weight, terms=T)
    assert_close(dbias, want_bias, terms=T)


@pytest.mark.parametrize(("n", "T", "width"), [(1, 1, 1), (300, 7, 5), (40, 100, 66), (257, 1, 3), (600, 70_000, 2)])
def test_rows_of_one_timestep_are_added_in_the_order_of_the_batch(runtime, n, T, width):
    t, dtime = np.random.default_rng(n).integers(0, T, n), normals(n, width)
    order, spare, dtable = runtime.empty((n,), np.int32), runtime.empty((n,), np.int32), np.zeros((T, width), F)
    runtime.launch("mlp", "mlp_order_times", 1, 256, (t, order, spare, n, T))
    runtime.launch("mlp", "mlp_time_gradient", *runtime.grid_1d(n * width), (dtime, t, order, dtable, n, width))
    assert order.tolist() == np.argsort(t, kind="stable").tolist()
    assert_same_bits(dtable, reference.embedding_backward(dtime, t, T))


def draws_for(net, rows=37, seed=2**63 + 5):
    schedule = Schedule.cosine(net.T)
    data = np.random.default_rng(3).normal(size=(rows, net.points)).astype(F)
    of_noise, of_data = np.linspace(0.5, 0.9, net.T), np.linspace(-0.5, 0.5, net.T)
    return TrainingDraws(data, schedule.signal, schedule.noise, of_noise, of_data, seed=seed)


@pytest.mark.parametrize(("n", "d", "T"), [(1, 1, 1), (5, 3, 11), (33, 50, 100), (9, 18, 1000)])
@pytest.mark.parametrize("step", [0, 2**32 - 1])
def test_training_draws_have_the_bits_of_the_reference(runtime, n, d, T, step):
    net = MLP(d, hidden=(1,), T=T)
    be, draws = CudaBackend(runtime), draws_for(net)
    wanted, first = perceptron.draw_batch(draws, T, step, n), n // 3
    for array, want in zip(be._draw(be._trained(net.plan, draws, n), step), wanted, strict=True):
        assert_same_bits(array, want)
    inputs, target = be._draw_part(be._trained(net.plan, draws, n - first, part=n - first), step, first)
    for array, want in zip((inputs.x, inputs.t, target), wanted, strict=True):
        assert_same_bits(array, want[first:])


def test_packed_parameters(runtime):
    net = scatter(MLP(5, hidden=(3, 8, 1), T=2))
    be = CudaBackend(runtime)
    buffers = be._network(net.plan)
    be.mlp_forward(net.plan, net.flat, Inputs(normals(2, 5), np.zeros(2, np.int64)))
    want = []
    for layer in net.plan.layers:
        w = net.flat[layer.weight : layer.weight + layer.inputs * layer.outputs].reshape(layer.inputs, layer.outputs)
        rows = np.vstack([w, net.flat[layer.bias : layer.bias + layer.outputs]])
        want.append(np.pad(rows, ((0, 0), (0, -layer.outputs % 4))).ravel())
    assert_same_bits(buffers.packed, np.concatenate(want))
    assert len(buffers.packed) == packed_size(net.plan)


# ------------------------------------------------------------------------------------------- operations

NETS = {
    "default": lambda: MLP(50, T=100),
    "tutorial": lambda: MLP.tutorial(50, T=100),
    "linear": lambda: MLP(4, hidden=(), T=3),
    "one": lambda: MLP(1, hidden=(1,), T=2),
    "odd": lambda: MLP(17, hidden=(33, 1, 19), T=11),
    "wide": lambda: MLP(3, hidden=(130, 7), T=1000),
    "tutorial of three": lambda: MLP.tutorial(3, T=5),
    "linear part": lambda: with_linear(MLP(17, hidden=(33, 19), T=11)),
    "part of rank": lambda: with_linear(MLP(17, hidden=(5,), T=11), 7),
    "part alone": lambda: with_linear(MLP(5, hidden=(), T=3)),
}


@pytest.fixture(scope="module", params=NETS)
def net(request):
    return scatter(NETS[request.param]())


@pytest.fixture(params=["one launch", "per layer"])
def be(request):
    return ONE_LAUNCH if request.param == "one launch" else PER_LAYER


def terms(plan):
    """How many products the longest way through the network adds up."""
    return sum(layer.inputs for layer in plan.layers) + 32


def batch_of(net, n, seed=0):
    x, target = normals(2, n, net.points, seed=seed)
    return x, np.random.default_rng(seed).integers(0, net.T, n), target


def test_the_ways_are_what_they_are_called(net):
    assert ONE_LAUNCH._network(net.plan).tile is not None
    assert PER_LAYER._network(net.plan).tile is None


@pytest.mark.parametrize("n", [0, 1, 5, 70])
def test_forward_agrees(net, be, n):
    x, t, _ = batch_of(net, n)
    want = NUMPY.mlp_forward(net.plan, net.flat.astype(np.float64), Inputs(x.astype(np.float64), t))
    out = be.empty(want.shape)
    got = be.mlp_forward(net.plan, net.flat, Inputs(x, t))
    assert got.dtype == F
    assert be.mlp_forward(net.plan, net.flat, Inputs(x, t), out) is out
    assert_same_bits(out, got)
    assert_close(got, want, terms=terms(net.plan))


@pytest.mark.skipif(host_width() == 0, reason="the CPU backend rounds its products here")
def test_one_launch_has_the_bits_of_the_cpu_backend(net):
    x, t, _ = batch_of(net, 70)
    assert_same_bits(
        ONE_LAUNCH.mlp_forward(net.plan, net.flat, Inputs(x, t)), CPU.mlp_forward(net.plan, net.flat, Inputs(x, t))
    )


def unset(size, plan):
    """A gradient buffer that is NaN, but for the padding between the tensors."""
    grads = np.zeros(size, F)
    spans = [(at, n) for la in plan.layers for at, n in ((la.weight, la.inputs * la.outputs), (la.bias, la.outputs))]
    if plan.time_width and plan.features is None:
        spans.append((plan.time_weight, plan.T * plan.time_width))
    elif plan.time_width:
        spans += [(plan.time_weight, plan.features.shape[1] * plan.time_width), (plan.time_bias, plan.time_width)]
    for at, n in spans:
        grads[at : at + n] = np.nan
    return grads, spans


def check_gradients(be, plan, flat, x, t, target):
    grads, spans = unset(len(flat), plan)
    padding = grads == 0
    wide = np.zeros(len(flat))
    want_loss, want_dx = NUMPY.mlp_gradient(
        plan, flat.astype(np.float64), Inputs(x.astype(np.float64), t), target.astype(np.float64), wide
    )
    loss, dx = be.mlp_gradient(plan, flat, Inputs(x, t), target, grads)
    assert type(loss) is float
    assert_close(F(loss), want_loss, terms=terms(plan))
    assert_close(dx, want_dx, terms=terms(plan))
    for at, n in spans:
        assert_close(grads[at : at + n], wide[at : at + n], terms=terms(plan) + len(x))
    assert not grads[padding].any()


@pytest.mark.parametrize("n", [1, 3, 257])
def test_gradients_agree(net, n):
    x, t, target = batch_of(net, n, seed=1)
    check_gradients(ONE_LAUNCH, net.plan, net.flat, x, t, target)


def mixed_plan():
    """Every activation with every kind of modulation, an odd width each, more outputs than inputs."""
    at, column, width, layers = 0, 0, 3, []
    for k, (activation, mode) in enumerate(KINDS):
        outputs = 5 + k
        layers.append(DenseLayer(width, outputs, at, at + width * outputs, activation, mode, column))
        at += (width + 1) * outputs + 2
        column += {"none": 0, "shift": 1, "scale_shift": 2}[mode] * outputs
        width = outputs
    return MLPPlan(
        tuple(layers), T=6, size=at + 6 * column, time_width=column, time_weight=at, time_bias=0, features_of=None
    )


def test_every_kind_of_layer(be):
    plan = mixed_plan()
    flat, x, target = normals(plan.size) / 3, normals(37, 3, seed=1), normals(37, plan.layers[-1].outputs, seed=2)
    t = np.arange(37) % 6
    want = NUMPY.mlp_forward(plan, flat.astype(np.float64), Inputs(x.astype(np.float64), t))
    assert_close(be.mlp_forward(plan, flat, Inputs(x, t)), want, terms=terms(plan))
    check_gradients(be, plan, flat, x, t, target)


@pytest.mark.parametrize("batch", [1, 37])
def test_a_training_gradient_is_the_gradient_of_the_drawn_batch(net, batch):
    draws = draws_for(net)
    grads, want = unset(len(net.flat), net.plan)[0], unset(len(net.flat), net.plan)[0]
    loss = ONE_LAUNCH.mlp_train_gradient(net.plan, net.flat, draws, 3, batch, grads)
    x, t, target = perceptron.draw_batch(draws, net.T, 3, batch)
    assert ONE_LAUNCH.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, want)[0] == loss
    assert_same_bits(grads, want)


@pytest.mark.parametrize("make", [lambda: MLP(5, hidden=(9,), T=7), lambda: MLP.tutorial(5, T=7)])
def test_training_goes_the_way_of_the_reference(make):
    """A few steps of AdamW; every order of threads gives the same bits."""

    def trained(be, dtype=F):
        net = scatter(make())
        flat = net.flat.astype(dtype)
        draws = draws_for(net)._replace(data=draws_for(net).data.astype(dtype))
        grads, m, v, average = (np.zeros_like(flat) for _ in range(4))
        losses = []
        for step in range(6):
            losses.append(be.mlp_train_gradient(net.plan, flat, draws, step, 29, grads))
            options = AdamW(1e-2, 0.9, 0.99, 1e-3, 0.0, 1 - 0.9 ** (step + 1), 1 - 0.99 ** (step + 1), np.inf, 0.0)
            be.adamw(TrainState(flat, grads, m, v, average), options)
        return losses, flat

    want, want_flat = trained(NUMPY, np.float64)
    results = [trained(be) for be in BACKENDS.values()]
    assert_close(np.array(results[0][0], F), np.array(want), terms=6 * 100)
    assert_close(results[0][1], want_flat, terms=6 * 100)
    for losses, flat in results[1:]:
        assert losses == results[0][0]
        assert_same_bits(flat, results[0][1])


# ------------------------------------------------------------------------------------------- batches and chains


def test_a_row_does_not_depend_on_its_batch_or_the_order_of_threads(net):
    x, t, _ = batch_of(net, 130)
    whole = ONE_LAUNCH.mlp_forward(net.plan, net.flat, Inputs(x, t))
    for be, edges in zip(BACKENDS.values(), ([0, 130], [0, 1, 130], [0, 9, 73, 130]), strict=True):
        parts = [be.mlp_forward(net.plan, net.flat, Inputs(x[a:b], t[a:b])) for a, b in itertools.pairwise(edges)]
        assert_same_bits(np.concatenate(parts), whole)
    shuffled = np.random.default_rng(0).permutation(130)
    assert_same_bits(ONE_LAUNCH.mlp_forward(net.plan, net.flat, Inputs(x[shuffled], t[shuffled])), whole[shuffled])


def table(net, name):
    schedule = Schedule.cosine(max(net.T, 2))
    return {
        "ddpm": lambda: ddpm(schedule, min(schedule.T, 4), clip=1.0),
        "ddim": lambda: ddim(schedule, min(schedule.T, 4), eta=0.5),
        "dpmpp_2m": lambda: dpmpp_2m(schedule, min(schedule.T - 1, 4), prediction="v"),
        "lms": lambda: lms(schedule, min(schedule.T - 1, 5)),  # reaches back three rows
    }[name]()


def chained(be, net, smp, x, first):
    x = x.copy()
    be.mlp_chain(net.plan, net.flat, x, ChainTable(smp.rows, smp.clip), Draw(4, Stream.STEP, first_row=first))
    return x


def stepped(be, net, smp, x, first):
    state, memory = x.copy(), tuple(np.zeros((max(row.depth for row in smp.rows), *x.shape), x.dtype))
    for row in smp.rows:
        out = be.mlp_forward(net.plan, net.flat, Inputs(state, np.full(len(x), row.t))) if row.evaluates else None
        be.sampler_step(state, out, memory, row, smp.clip, Draw(4, Stream.STEP, row.step, first))
    return state


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "lms"])
def test_a_chain_is_its_steps_in_any_batch(net, be, name):
    smp, first = table(net, name), 2**32 - 30
    x, _, _ = batch_of(net, 70)
    whole = chained(be, net, smp, x, first)
    assert np.isfinite(whole).all()
    assert_same_bits(stepped(be, net, smp, x, first), whole)
    if be is ONE_LAUNCH:  # else the bits are those of the matrix product
        for other, edges in zip(BACKENDS.values(), ([0, 70], [0, 1, 70], [0, 9, 43, 70]), strict=True):
            parts = [chained(other, net, smp, x[a:b], first + a) for a, b in itertools.pairwise(edges)]
            assert_same_bits(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "lms"])
def test_chains_agree(net, be, name):
    smp = table(net, name)
    x, _, _ = batch_of(net, 9)
    want = x.astype(np.float64)
    NUMPY.mlp_chain(
        net.plan, net.flat.astype(np.float64), want, ChainTable(smp.rows, smp.clip), Draw(4, Stream.STEP, first_row=6)
    )
    assert_close(chained(be, net, smp, x, 6), want, terms=len(smp) * terms(net.plan))


@pytest.mark.parametrize("name", samplers.names())
def test_every_sampler_is_a_chain(be, name):
    net = scatter(NETS["odd"]())
    smp = samplers.named(name, Schedule.cosine(net.T), 4, prediction="v")
    x, _, _ = batch_of(net, 9)
    got, want = chained(be, net, smp, x, 6), x.astype(np.float64)
    assert_same_bits(got, stepped(be, net, smp, x, 6))
    NUMPY.mlp_chain(
        net.plan, net.flat.astype(np.float64), want, ChainTable(smp.rows, smp.clip), Draw(4, Stream.STEP, first_row=6)
    )
    assert_close(got, want, terms=len(smp) * terms(net.plan))


def test_every_term_of_a_table(be):
    """Rows with all terms, the memory already in the first, where it is zero; clips on one side; 1 to 3 rows back."""
    net = scatter(NETS["odd"]())
    x, _, _ = batch_of(net, 70)
    for back in (1, 2, 3):
        numbers = np.random.default_rng(7 + back).normal(size=(3, 9)) / 2
        numbers[:, 4 + back : 7] = 0
        rows = [Row(t, *row) for t, row in zip((10, 3, 3), numbers.tolist(), strict=True)]
        rows = (*rows, rows[2]._replace(q=0.0, e=0.0, visit=1), rows[1]._replace(s=0.0))
        smp = SimpleNamespace(rows=rows, clip=(-0.25, 2.0))
        got = chained(be, net, smp, x, 2**56 - 70)
        assert_same_bits(got, stepped(be, net, smp, x, 2**56 - 70))
        want = x.astype(np.float64)
        draw = Draw(4, Stream.STEP, first_row=2**56 - 70)
        NUMPY.mlp_chain(net.plan, net.flat.astype(np.float64), want, ChainTable(smp.rows, smp.clip), draw)
        assert_close(got, want, terms=5 * terms(net.plan))


def test_a_table_for_a_learned_variance_is_refused(be):
    net, x = scatter(MLP(3, hidden=(5,), T=7)), normals(4, 3)
    row = Row(2, 1.0, 0.5, 0.3, 0.4, s=0.5, r=0.25)
    for run in (
        lambda: be.mlp_chain(net.plan, net.flat, x, ChainTable((row,)), Draw(0, Stream.STEP)),
        lambda: be.sampler_step(x, x.copy(), (), row, None, Draw(0, Stream.STEP)),
    ):
        with pytest.raises(ArgumentError, match=r"rows \(r\): got 0.25 at t = 2"):
            run()


def test_an_empty_chain_changes_nothing(be):
    net = scatter(MLP(3, hidden=(5,), T=7))
    x = normals(4, 3)
    kept = x.copy()
    be.mlp_chain(net.plan, net.flat, x, ChainTable(()), Draw(0, Stream.STEP))
    assert_same_bits(x, kept)
    assert chained(be, net, table(net, "ddpm"), x[:0], 0).shape == (0, 3)


@pytest.mark.parametrize("name", ["odd", "tutorial of three"])
def test_tiles_and_staging_change_no_bits(name):
    """A limit of every way: 64 or 32 samples a tile, parameters in shared memory or in the caches."""
    net = scatter(NETS[name]())
    smp = table(net, "dpmpp_2m")
    x, _, _ = batch_of(net, 130)
    want, seen = chained(ONE_LAUNCH, net, smp, x, 5), set()
    for tile in itertools.starmap(ChainTile, itertools.product((64, 32), (True, False))):
        be = cuda("backward", shared_bytes(net.plan, tile))
        seen.add(chain_tile(net.plan, be.runtime.shared_limit))
        assert_same_bits(chained(be, net, smp, x, 5), want)
        assert_same_bits(chained(be, net, smp, x[:7], 5), want[:7])
    assert {tile.staged for tile in seen} == {True, False}
    assert {tile.rows for tile in seen} == {32, 64}


def test_the_chosen_way_is_told():
    plan = MLP.tutorial(50, T=100).plan
    for limit in (227 * 1024, 163 * 1024, 99 * 1024, 48 * 1024):
        tile = chain_tile(plan, limit)
        assert tile is None or shared_bytes(plan, tile) <= limit
    caches = "weights in the caches: their 198 KB do not fit beside"
    assert chain_plan(plan) == f"one launch: 64 samples in 102 KB of shared memory, {caches}"
    assert chain_plan(plan, 99 * 1024) == f"one launch: 32 samples in 51 KB of shared memory, {caches}"
    assert chain_plan(MLP(50, hidden=(64, 64)).plan).endswith("of shared memory, weights in it")
    wide = MLP(50, hidden=(1024, 1024)).plan
    assert chain_plan(wide) == "layer by layer: 32 samples need 270 KB of shared memory, a block has 227 KB"


# ------------------------------------------------------------------------------------------- on tensor cores

HALVES = ["bf16x3", "bf16"]


@pytest.fixture(params=HALVES)
def precision(request):
    return request.param


@pytest.mark.parametrize("part", [None, 6])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "lms"])
def test_a_chain_on_tensor_cores_is_its_steps_in_any_batch(precision, name, part):
    net = scatter(NETS["odd"]()) if part is None else with_linear(scatter(NETS["odd"]()), part)
    smp, first = table(net, name), 2**32 - 30
    x, _, _ = batch_of(net, 70)
    whole = chained(cuda("shuffled", precision=precision), net, smp, x, first)
    assert np.isfinite(whole).all()
    assert_same_bits(stepped(cuda(precision=precision), net, smp, x, first), whole)
    for order, edges in zip(ORDERS, ([0, 1, 70], [0, 9, 43, 70], [0, 17, 70]), strict=True):
        be = cuda(order, precision=precision)
        parts = [chained(be, net, smp, x[a:b], first + a) for a, b in itertools.pairwise(edges)]
        assert_same_bits(np.concatenate(parts), whole)
    # Other products than those of float32.
    assert (whole != chained(ONE_LAUNCH, net, smp, x, first)).any()


def test_tiles_staging_and_blocks_change_no_bits_on_tensor_cores(precision, monkeypatch):
    """128, 64 or 32 samples a tile, 16 where they are few; parameters in shared memory or not; 256 threads or 512."""
    net = scatter(MLP(19, hidden=(33, 21), T=11))
    smp, seen, threads = table(net, "ddpm"), [], set()
    x, _, _ = batch_of(net, 260)
    want = chained(cuda("shuffled", precision=precision), net, smp, x, 5)
    for tile in MMA_TILES:
        be = cuda("backward", shared_bytes(net.plan, tile, precision), precision)
        launch = be.runtime.launch

        def noted(source, entry, grid, block, *rest, launch=launch):
            if entry == f"mlp_chain_{precision}":
                threads.add(block)
            launch(source, entry, grid, block, *rest)

        monkeypatch.setattr(be.runtime, "launch", noted)
        seen.append(chain_tile(net.plan, be.runtime.shared_limit, precision))
        assert_same_bits(chained(be, net, smp, x, 5), want)
        assert_same_bits(chained(be, net, smp, x[:7], 5), want[:7])
    assert tuple(seen) == MMA_TILES
    assert threads == {256, 512}
    few = chain_tile(MLP(50, T=100).plan, precision=precision, rows=MMA_FEW)
    assert few.staged, "the weights do not fit beside a tile of few samples"


def test_what_goes_layer_by_layer_multiplies_float32(precision):
    """Networks that are asked for something or too wide, training and derivatives: the bits of float32."""
    be, plain = cuda(precision=precision), cuda()
    asked = scatter(MLP(5, hidden=(9,), T=7, classes=3))
    wide = scatter(MLP(3, hidden=(4000,), T=7))
    for net, told in ((asked, asked.plan.asks(np.arange(9) % 4, None)), (wide, None)):
        x, t, _ = batch_of(net, 9)
        got, want = (b.mlp_forward(net.plan, net.flat, Inputs(x, t, told)) for b in (be, plain))
        assert_same_bits(got, want)
        assert chain_plan(net.plan, precision=precision).startswith("layer by layer, in float32: ")
    net = scatter(NETS["odd"]())
    x, t, target = batch_of(net, 9)
    found = []
    for each in (be, plain):
        grads, dx = np.zeros_like(net.flat), np.empty_like(x)
        loss, _ = each.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, grads)
        each.mlp_vjp(net.plan, net.flat, Inputs(x, t), target, dx)
        found.append((np.float32(loss), grads, dx))
    for got, want in zip(*found, strict=True):
        assert_same_bits(got, want)


def test_how_a_chain_on_tensor_cores_runs_is_told():
    plan = MLP(50, T=100).plan
    caches = "weights in the caches: their 194 KB do not fit beside"
    assert chain_plan(plan, precision="bf16x3") == f"one launch: 64 samples in 94 KB of shared memory, {caches}"
    assert chain_plan(plan, precision="bf16") == "one launch: 128 samples in 218 KB of shared memory, weights in it"
    for name, limit in ((name, limit) for name in HALVES for limit in SHARED_LIMITS.values()):
        tile = chain_tile(plan, limit, name)
        assert shared_bytes(plan, tile, name) <= limit


def test_bf16x3_of_image_networks_is_float32():
    """Its convolutions are those of float32, and so are their gradients."""
    x, w, dy = normals(2, 5, 6, 3), normals(3, 3, 3, 4, seed=1), normals(2, 5, 6, 4, seed=2)
    b, geometry, found = normals(4, seed=3), Conv((3, 3), pad=(1, 1, 1, 1)), []
    for be in (cuda(precision="bf16x3"), cuda(), cuda(precision="bf16")):
        y, dx, dw, db = (np.empty_like(array) for array in (dy, x, w, b))
        be.conv(geometry, x, w, b, y)
        be.conv_backward(geometry, dy, x, w, dx, dw, db)
        found.append((y, dx, dw, db))
    for got, want in zip(*found[:2], strict=True):
        assert_same_bits(got, want)
    assert (found[2][0] != found[1][0]).any()


def test_networks_leave_nothing_behind():
    made = MLP(3, hidden=(5,), T=7)
    ONE_LAUNCH.mlp_forward(made.plan, made.flat, Inputs(np.ones((2, 3), F), np.zeros(2, np.int64)))
    gone = weakref.ref(made.plan)
    del made
    gc.collect()
    assert gone() is None
