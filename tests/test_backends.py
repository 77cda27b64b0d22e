"""One protocol, and one result: NumPy, cpu and the loops of naive.py agree on every operation.

Noise, noising and the sampler step agree to the bit; networks and the optimiser up to rounding. On cpu, a sample's
bits depend neither on its batch nor on the threads, and a fused chain is its steps.
"""

import copy
import gc
import inspect
import itertools
import logging
import math
import pickle
import weakref
from functools import partial
from types import SimpleNamespace

import naive
import numpy as np
import pytest
from gradcheck import scatter, with_linear
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rows import three_back
from tolerances import assert_close, assert_same_bits

from fastdiff import backends, samplers
from fastdiff.backends import (
    Backend,
    ChainTable,
    Inputs,
    Row,
    SharingBackend,
    TrainingDraws,
    TrainState,
    available_backends,
    get_backend,
)
from fastdiff.backends.cpu import CpuBackend
from fastdiff.backends.layers import LayerBackend
from fastdiff.backends.numpy import NumpyBackend
from fastdiff.backends.numpy.mlp import draw_batch
from fastdiff.errors import ArgumentError, BackendError
from fastdiff.nn import MLP
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import Draw, Stream
from fastdiff.samplers import ddim, ddpm, dpmpp_2m
from fastdiff.schedule import Schedule

NUMPY, CPU = get_backend("numpy"), get_backend("cpu")
THREADED = [get_backend("cpu", threads=threads) for threads in (1, 2, 3)]

# ------------------------------------------------------------------------------------------- one protocol


def operations(kind):
    return {name: member for name, member in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


@pytest.mark.parametrize("kind", [NumpyBackend, CpuBackend])
def test_same_signatures(kind):
    """Names, order, kinds, defaults and annotations; and nothing public besides."""
    wanted, found = operations(LayerBackend), operations(kind)
    found.pop("renew", None)  # what `fastdiff.forks` calls in a forked child
    shared = found.pop("mlp_shared_training", None)  # of a `SharingBackend`, as the CPU is
    assert shared is None or inspect.signature(shared) == inspect.signature(SharingBackend.mlp_shared_training)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert inspect.signature(found[name]) == inspect.signature(wanted[name]), name


def test_available_backends_are_backends():
    assert available_backends()[0] == "numpy"
    for name in available_backends():
        be = get_backend(name)
        assert isinstance(be, Backend)
        assert be.name == name
        assert be.threads >= 1
        assert get_backend(name) is be
        assert get_backend(be) is be


def test_auto_logs_its_choice_once(caplog):
    backends._choose_auto.cache_clear()
    with caplog.at_level(logging.INFO, "fastdiff"):
        assert get_backend() is get_backend("auto") is CPU
    (record,) = caplog.records
    assert record.getMessage().startswith("backend 'auto' chose 'cpu', and not 'cuda': ")


def test_threads_are_for_cpu():
    assert get_backend("cpu", threads=3).threads == 3
    assert get_backend("auto", threads=1).threads == 1
    for bad in (0, -1, 1.5, "2", True, 5000):
        with pytest.raises(ArgumentError, match=r"^threads: got"):
            get_backend("cpu", threads=bad)
    for name in ("numpy", NUMPY, CPU):
        with pytest.raises(ArgumentError, match=r"^threads: got 2, wants None"):
            get_backend(name, threads=2)


def test_auto_is_cuda_where_its_family_was_measured(monkeypatch, tmp_path, caplog):
    """Else the log says why not; without any measurement no GPU is looked at."""

    def chosen():
        caplog.clear()
        with caplog.at_level("INFO"):
            name = backends._choose_auto.__wrapped__()
        return name, caplog.records[-1].getMessage()

    assert not list(backends.MEASURED.glob("*")), "a family is measured: the README and docs/gpu.md must say so"
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_shared", None)
        name, said = chosen()
        assert (name, said) == ("cpu", "backend 'auto' chose 'cpu', and not 'cuda': not measured on a GPU yet, which "
                                "'make gpu' does")  # fmt: skip
    monkeypatch.setattr(backends, "MEASURED", tmp_path)
    (tmp_path / "sm_90.json").write_text('{"scale": 0.001}')  # a quick run, that somebody put there
    assert chosen()[1].endswith("not measured on a GPU yet, which 'make gpu' does")
    (tmp_path / "sm_90.json").write_text('{"scale": 1.0}')
    arch = "90"

    def shared(name, *options):
        assert (name, *options) == ("cuda", None, "raw", "float32", True, "own")
        if not arch:
            raise BackendError("the NVIDIA driver is too old")
        return SimpleNamespace(runtime=SimpleNamespace(arch=arch))

    monkeypatch.setattr(backends, "_shared", shared)
    assert chosen() == ("cuda", "backend 'auto' chose 'cuda'")
    arch = "120"
    assert chosen()[1].endswith("'cuda': measured on GPUs of sm_90, and this one is of sm_120; 'make gpu' measures it")
    arch = ""
    assert chosen() == ("cpu", "backend 'auto' chose 'cpu', and not 'cuda': the NVIDIA driver is too old")


@pytest.mark.parametrize("bad", ["gpu", "CPU", "", None, 1, NumpyBackend, object()])
def test_unknown_backends_are_refused_with_those_known(bad):
    with pytest.raises(ArgumentError, match="'auto', 'numpy', 'cpu', 'cuda'"):
        get_backend(bad)


def test_cuda_says_what_to_do():
    with pytest.raises(BackendError, match="backend='cpu'"):
        get_backend("cuda")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda be: pickle.loads(pickle.dumps(be))])
def test_backends_survive_copy_and_pickle(backend, again):
    be = get_backend(backend)
    other = again(be)
    assert type(other) is type(be)
    assert other.threads == be.threads
    assert_same_bits(drawn(other), drawn(be))


def drawn(be, shape=(3, 5), draw=Draw(1, Stream.INIT)):  # noqa: B008 - immutable
    z = be.empty(shape)
    be.normal(z, draw)
    return z


def test_arrays(backend):
    be = get_backend(backend)
    strided = np.arange(12).reshape(3, 4)[:, ::2]
    array = be.asarray(strided)
    assert array.flags.c_contiguous
    assert array.dtype == np.float32
    assert be.asarray(strided, np.int64).dtype == np.int64
    assert be.asarray(np.ones(2)).dtype == (np.float64 if backend == "numpy" else np.float32)
    assert be.to_numpy(array).tolist() == strided.tolist()
    assert be.empty((2, 3)).dtype == np.float32
    assert be.empty((2, 3), np.int64).shape == (2, 3)


# ------------------------------------------------------------------------------------------- noising


def unset(net, dtype):
    """A gradient buffer whose tensors are NaN; the padding between them is zero, as the protocol asks."""
    grads = net.layout.zeros(dtype)
    for view in net.layout.views(grads).values():
        view[...] = np.nan
    return grads


SPECIAL = [0.0, -0.0, 1.0, -1.5, math.nan, math.inf, -math.inf, 1e-42, -1e-45, 3e38, -3e38, 1e-30]
ANY_FLOAT = st.one_of(st.floats(width=32), st.sampled_from(SPECIAL))
SEEDS = st.integers(0, 2**64 - 1)
SHAPES = st.tuples(st.integers(0, 4), st.integers(0, 21))


def noised(be, x0, t, signal, noise, seed, first):
    out, eps = be.empty(x0.shape, x0.dtype), be.empty(x0.shape, x0.dtype)
    with np.errstate(all="ignore"):
        be.forward_noise(x0, t, signal, noise, out, eps, Draw(seed, Stream.FORWARD, first_row=first))
    return out, eps


@given(data=st.data(), x0=hnp.arrays(np.float32, SHAPES, elements=ANY_FLOAT), seed=SEEDS)
@settings(max_examples=100)
def test_forward_noise_has_the_same_bits_everywhere(data, x0, seed):
    t = data.draw(hnp.arrays(np.int64, len(x0), elements=st.integers(0, 5)))
    signal, noise = (data.draw(hnp.arrays(np.float64, 6, elements=st.floats(0, 1))) for _ in range(2))
    first = data.draw(st.sampled_from([0, 7, 2**32 - 2, 2**56 - 4]))
    z = naive.normal(*x0.shape, seed=seed, stream=Stream.FORWARD, first_sample=first)
    with np.errstate(all="ignore"):
        want = naive.forward_noise(x0, t, signal, noise, z)
    for be in (NUMPY, CPU):
        out, eps = noised(be, x0, t, signal, noise, seed, first)
        assert_same_bits(out, want)
        assert_same_bits(eps, z)


@pytest.mark.parametrize("shape", [(3000, 67), (9, 9001), (20011, 3)])
def test_forward_noise_beyond_the_chunks(shape):
    x0 = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    t = np.arange(len(x0)) % 100
    tables = Schedule.cosine(100).signal, Schedule.cosine(100).noise
    want, z = noised(NUMPY, x0, t, *tables, 5, 3)
    for be in THREADED:
        out, eps = noised(be, x0, t, *tables, 5, 3)
        assert_same_bits(out, want)
        assert_same_bits(eps, z)


# ------------------------------------------------------------------------------------------- the sampler step


def stepped(be, x, out, memory, row, clip, draw):
    x, memory = x.copy(), tuple(array.copy() for array in memory)
    with np.errstate(all="ignore"):
        be.sampler_step(x, out, memory, row, clip, draw.at(row.step))
    return x, memory


DRAW = Draw(9, Stream.STEP, first_row=2**32 - 1)
CLIPS = (None, (-1.0, 1.0), (-0.25, 0.5), (0.0, 2.0))


def test_every_combination_of_terms():
    """All 2^9 sets of coefficients that are zero, a clip each, memories of all depths; hostile values in all."""
    x, out, *memory = np.random.default_rng(4).normal(size=(5, 9, 5)).astype(np.float32)
    for shift, array in enumerate((x, out, *memory)):
        array[:5] = np.roll(np.resize(SPECIAL, 25), 4 * shift).reshape(5, 5)
    z = naive.normal(9, 5, seed=9, stream=Stream.STEP, step=6, first_sample=2**32 - 1)
    numbers = (1.1, -0.6, 0.9, 0.8, -0.3, 0.15, -0.2, 0.2, 0.4)
    clips = itertools.cycle(CLIPS)
    for used in itertools.product((0, 1), repeat=9):
        row, clip = Row(6, *(number * use for number, use in zip(numbers, used, strict=True))), next(clips)
        with np.errstate(all="ignore"):
            results = [
                naive.sampler_step(x[at], out[at], tuple(m[at] for m in memory), z[at], row[1:10], clip)
                for at in np.ndindex(x.shape)
            ]
        want = np.array([value for value, _ in results], np.float32).reshape(x.shape)
        want_memory = np.array([after for _, after in results], np.float32).T.reshape(3, *x.shape)
        for be, depth in itertools.product((NUMPY, CPU), range(row.depth, 4)):
            got, kept = stepped(be, x, out if row.evaluates else None, memory[:depth], row, clip, DRAW)
            assert_same_bits(got, want)
            for array, wanted in zip(kept, want_memory, strict=False):
                assert_same_bits(array, wanted)


COEFFICIENT = st.one_of(st.just(0.0), st.floats(-2, 2), st.sampled_from([1e-60, 1e-45, -1e-40, 1e30]))


@given(data=st.data(), shape=SHAPES, row=st.tuples(*[COEFFICIENT] * 9), clip=st.sampled_from(CLIPS), seed=SEEDS)
@settings(max_examples=150)
def test_sampler_step_has_the_same_bits_everywhere(data, shape, row, clip, seed):
    x, out, *memory = (data.draw(hnp.arrays(np.float32, shape, elements=ANY_FLOAT)) for _ in range(5))
    row = Row(data.draw(st.sampled_from([0, 999, 2**20 - 1])), *row, visit=data.draw(st.sampled_from([0, 1, 4095])))
    memory = memory[: data.draw(st.integers(row.depth, 3))]
    stream, first = data.draw(st.sampled_from(Stream)), data.draw(st.integers(0, 2**56 - 4))
    draw = Draw(seed, stream, first_row=first)
    want, want_memory = stepped(NUMPY, x, out, memory, row, clip, draw)
    got, got_memory = stepped(CPU, x, out, memory, row, clip, draw)
    assert_same_bits(got, want)
    for array, wanted in zip(got_memory, want_memory, strict=True):
        assert_same_bits(array, wanted)


@pytest.mark.parametrize("shape", [(3000, 67), (9, 9001)])
@pytest.mark.parametrize("s", [0.0, 0.5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_sampler_step_beyond_the_chunks(shape, s, depth):
    x, out, *memory = np.random.default_rng(1).normal(size=(2 + depth, *shape)).astype(np.float32)
    row = Row(3, 1.1, -0.4, 0.3, 0.7, -0.2, *(0.3, -0.6)[: depth - 1], e=0.1, s=s)
    want, want_memory = stepped(NUMPY, x, out, memory, row, (-1.0, 1.0), DRAW)
    for be in THREADED:
        got, got_memory = stepped(be, x, out, memory, row, (-1.0, 1.0), DRAW)
        assert_same_bits(got, want)
        for array, wanted in zip(got_memory, want_memory, strict=True):
            assert_same_bits(array, wanted)


@pytest.mark.parametrize("shape", [(3000, 67), (9, 9001), (1, 1), (0, 5)])
@pytest.mark.parametrize("depth", [0, 3])
def test_learned_noise(shape, depth):
    """s exp(r v) z is added to the rest of the row, v being the second output."""
    x, out, v, *memory = np.random.default_rng(1).normal(size=(3 + depth, *shape)).astype(np.float32)
    row = Row(3, 1.1, -0.4, 0.3, 0.7, e=0.1, s=0.5, r=-1.7)._replace(**{f"c{k + 1}": 0.2 for k in range(depth)})
    rest, want_memory = stepped(NUMPY, x, out, memory, row._replace(s=0.0, r=0.0), (-1.0, 1.0), DRAW)
    noise = 0.5 * np.exp(row.r * v.astype(np.float64)) * drawn(NUMPY, shape, DRAW.at(3))
    scale = np.abs(rest) + np.abs(noise) * (1 + np.abs(row.r * v))  # a power's rounding grows with it
    results = []
    for be in (NUMPY, *THREADED):
        got, got_memory = stepped(be, x, np.stack([out, v]), memory, row, (-1.0, 1.0), DRAW)
        assert_close(got, rest + noise, scale=scale)
        for array, wanted in zip(got_memory, want_memory, strict=True):
            assert_same_bits(array, wanted)
        results.append(got)
    for got in results[2:]:
        assert_same_bits(got, results[1])


def test_learned_noise_of_hostile_values():
    """No noise where v says none, and NaN where v is NaN; a v that is far too large gives no NaN."""
    v = np.array([[-1e4, 1e4, math.inf, -math.inf, math.nan, 0.0]], np.float32)
    out, row = np.stack([np.zeros_like(v), v]), Row(3, 0, 0, 1, 0, e=0.5, s=1, r=1)
    got, _ = stepped(CPU, np.zeros_like(v), out, (), row, None, DRAW)
    z = drawn(NUMPY, v.shape, DRAW.at(3))
    assert got[0, 5] == z[0, 5]
    assert np.isnan(got[0]).tolist() == [False] * 4 + [True, False]
    assert (np.abs(got[0, [0, 3]]) < 1e-36).all()
    assert (np.abs(got[0, [1, 2]]) > 1e36).all()
    with pytest.raises(ValueError, match="reshape"):  # v is missing
        stepped(CPU, np.zeros_like(v), out[0], (), row, None, DRAW)


def test_numpy_steps_in_float64():
    x, out, *memory = np.random.default_rng(2).normal(size=(5, 4, 7))
    row = Row(3, 1.1, -0.4, 0.3, 0.7, -0.2, 0.3, -0.6, 0.1, 0.5)
    z = naive.normal(4, 7, seed=9, stream=Stream.STEP, step=3, first_sample=2**32 - 1).astype(np.float64)
    got, _ = stepped(NUMPY, x, out, memory, row, (-1.0, 1.0), DRAW)
    for at in np.ndindex(x.shape):
        remembered = tuple(m[at] for m in memory)
        want, _ = naive.sampler_step(x[at], out[at], remembered, z[at], row[1:10], (-1.0, 1.0), np.float64)
        assert got[at] == want


# ------------------------------------------------------------------------------------------- networks

NETS = {
    "default": lambda: MLP(50, T=100),
    "tutorial": lambda: MLP.tutorial(50, T=100),
    "linear": lambda: MLP(4, hidden=(), T=3),
    "one": lambda: MLP(1, hidden=(1,), T=1),
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


def terms(net):
    """How many products the longest way through the network adds up."""
    return sum(layer.inputs for layer in net.plan.layers) + 32


def batch_of(net, n, seed=0):
    random = np.random.default_rng(seed)
    x, target = random.normal(size=(2, n, net.points)).astype(np.float32)
    return x, random.integers(0, net.T, n), target


@pytest.mark.parametrize("n", [1, 2, 5, 130])
def test_networks_agree_with_loops_and_with_each_other(net, n):
    x, t, _ = batch_of(net, n)
    params = {name: view.astype(np.float64).tolist() for name, view in net.params.items()}
    want = NUMPY.mlp_forward(net.plan, net.flat.astype(np.float64), Inputs(x.astype(np.float64), t))
    for k in {0, n // 2, n - 1}:
        row = x[k].astype(np.float64).tolist()
        loop = naive.tutorial(params, row, t[k]) if net.kind == "tutorial" else naive.mlp(params, row, t[k], net.T)
        if net.plan.linear is not None:
            loop = naive.with_linear(loop, row, net.plan.linear, t[k])
        assert_close(want[k], loop, terms=terms(net), scale=1000)  # the angles of the time features are that large
    for be in (NUMPY, CPU):
        got = be.mlp_forward(net.plan, net.flat, Inputs(x, t))
        assert got.dtype == np.float32
        assert_close(got, want, terms=terms(net))


def through(made, sizes):
    """A network of width one whose weights are 1 and biases 0: its activations, one after the other."""
    for name, view in made.params.items():
        view[...] = name.startswith("layers") and name.endswith("weight")
    x = np.concatenate([sizes, -sizes]).astype(np.float32)[:, None]
    t = np.zeros(len(x), np.int64)
    want = NUMPY.mlp_forward(made.plan, made.flat.astype(np.float64), Inputs(x.astype(np.float64), t))
    return [(be.mlp_forward(made.plan, made.flat, Inputs(x, t)), want) for be in (NUMPY, CPU)]


def test_silu_is_accurate():
    for got, want in through(MLP(1, hidden=(1,), T=1), np.linspace(0, 80, 4001)):
        assert_close(got, want, scale=0)


def test_activations_at_the_ends_of_the_range():
    """Vanishing and huge values: no overflow, no NaN."""
    for made in (MLP(1, hidden=(1,), T=1), MLP.tutorial(1, T=1)):
        for got, want in through(made, np.array([0, 1e-40, 1e-30, 87, 88.5, 104, 1e30])):
            assert_close(got, want, scale=1)


def gradients(be, net, x, t, target):
    grads = unset(net, np.float32)
    loss, dx = be.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, grads)
    return loss, dx, grads


@pytest.mark.parametrize("n", [1, 3, 257])
def test_gradients_agree(net, n):
    x, t, target = batch_of(net, n, seed=1)
    grads = unset(net, np.float64)
    wide = Inputs(x.astype(np.float64), t)
    loss, dx = NUMPY.mlp_gradient(net.plan, net.flat.astype(np.float64), wide, target.astype(np.float64), grads)
    for be in (NUMPY, CPU):
        got_loss, got_dx, got = gradients(be, net, x, t, target)
        assert type(got_loss) is float
        assert_close(np.float32(got_loss), loss, terms=terms(net))
        assert_close(got_dx, dx, terms=terms(net))
        views, wants = net.layout.views(got), net.layout.views(grads)
        for name in views:
            assert_close(views[name], wants[name], terms=terms(net) + n)
        assert not got[padding(net)].any()


def padding(net):
    """Mask of the entries of the flat buffer that belong to no tensor."""
    mask = np.ones(net.layout.size, bool)
    for view in net.layout.views(mask).values():
        view[...] = False
    return mask


def draws_for(net, rows=37, prediction=(1.0, 0.0)):
    schedule = Schedule.cosine(net.T)
    data = np.random.default_rng(3).normal(size=(rows, net.points)).astype(np.float32)
    target_noise, target_data = (np.full(net.T, value) for value in prediction)
    return TrainingDraws(data, schedule.signal, schedule.noise, target_noise, target_data, seed=2**63 + 5)


def test_a_training_batch_is_the_noise_law(net):
    draws = draws_for(net, prediction=(0.75, -0.5))
    x, t, target = draw_batch(draws, net.T, step=12, batch=6)
    assert t.tolist() == naive.scaled(6, net.T, seed=draws.seed, stream=Stream.TRAIN_TIME, step=12)
    data = draws.data[naive.scaled(6, 37, seed=draws.seed, stream=Stream.BATCH, step=12)]
    eps = naive.normal(6, net.points, seed=draws.seed, stream=Stream.TRAIN_NOISE, step=12)
    assert_same_bits(x, naive.forward_noise(data, t, draws.signal, draws.noise, eps))
    assert_same_bits(target, np.float32(0.75) * eps + np.float32(-0.5) * data)


@pytest.mark.parametrize("batch", [1, 7, 129, 1000])
def test_a_training_gradient_is_the_gradient_of_the_drawn_batch(net, batch):
    draws = draws_for(net, prediction=(0.75, -0.5))
    drawn_batch = draw_batch(draws, net.T, 3, batch)
    for be in (NUMPY, CPU):
        grads = unset(net, np.float32)
        loss = be.mlp_train_gradient(net.plan, net.flat, draws, 3, batch, grads)
        want_loss, _, want = gradients(be, net, *drawn_batch)
        assert type(loss) is float
        assert loss == want_loss
        assert_same_bits(grads, want)


@pytest.mark.parametrize("batch", [1, 129, 1000])
def test_a_training_gradient_may_weigh_its_rows(net, batch):
    weights = np.random.default_rng(4).uniform(0.1, 2, size=(net.T, 1))
    draws = draws_for(net)._replace(terms=weights)
    wide, exact = net.flat.astype(np.float64), draws._replace(data=draws.data.astype(np.float64))
    want = unset(net, np.float64)
    want_loss = NUMPY.mlp_train_gradient(net.plan, wide, exact, 3, batch, want)
    x, t, target = draw_batch(exact, net.T, 3, batch)
    y = NUMPY.mlp_forward(net.plan, wide, Inputs(x, t))
    assert want_loss == pytest.approx(np.mean(weights[t] * (y - target) ** 2), rel=1e-12)
    grads, even = unset(net, np.float32), unset(net, np.float32)
    loss = CPU.mlp_train_gradient(net.plan, net.flat, draws, 3, batch, grads)
    assert_close(np.float32(loss), want_loss, terms=terms(net))
    for name, view in net.layout.views(grads).items():
        assert_close(view, net.layout.views(want)[name], terms=terms(net) + batch)
    uniform = draws._replace(terms=np.ones((net.T, 1)))
    same = CPU.mlp_train_gradient(net.plan, net.flat, uniform, 3, batch, even)
    assert same == CPU.mlp_train_gradient(net.plan, net.flat, draws_for(net), 3, batch, grads)
    assert_same_bits(even, grads)


# ------------------------------------------------------------------------------------------- the batch law


@given(data=st.data(), n=st.integers(1, 400))
@example(data=None, n=129)
@settings(max_examples=8)
def test_a_row_does_not_depend_on_its_batch(net, data, n):
    x, t, _ = batch_of(net, n)
    edges = [0, 1, 128, n] if data is None else [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=4))), n]
    whole = CPU.mlp_forward(net.plan, net.flat, Inputs(x, t))
    for be in THREADED:
        parts = [
            be.mlp_forward(net.plan, net.flat, Inputs(x[a:b].copy(), t[a:b])) for a, b in itertools.pairwise(edges)
        ]
        assert_same_bits(np.concatenate(parts), whole)
    shuffled = np.random.default_rng(n).permutation(n)
    assert_same_bits(CPU.mlp_forward(net.plan, net.flat, Inputs(x[shuffled], t[shuffled])), whole[shuffled])


def table(net, name):
    schedule = Schedule.cosine(max(net.T, 2))
    return {
        **{other: partial(samplers.named, other, schedule, 4, prediction="v") for other in samplers.names()},
        "ddpm": lambda: ddpm(schedule, min(schedule.T, 9), clip=1.0),
        "ddim": lambda: ddim(schedule, min(schedule.T, 9), eta=0.5),
        "dpmpp_2m": lambda: dpmpp_2m(schedule, min(schedule.T - 1, 9), prediction="v"),
        "three back": lambda: three_back(schedule, clip=(-0.5, 0.75)),
    }[name]()


def chained(be, net, smp, x, first):
    x = x.copy()
    be.mlp_chain(net.plan, net.flat, x, ChainTable(smp.rows, smp.clip), Draw(4, Stream.STEP, first_row=first))
    return x


def walked(net, smp, x, first):
    """The chain of `chained`, on cpu, row by row."""
    x, memory = x.copy(), tuple(np.zeros((max(row.depth for row in smp.rows), *x.shape), x.dtype))
    for row in smp.rows:
        out = CPU.mlp_forward(net.plan, net.flat, Inputs(x, np.full(len(x), row.t))) if row.evaluates else None
        CPU.sampler_step(x, out, memory, row, smp.clip, Draw(4, Stream.STEP, row.step, first))
    return x


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "three back"])
def test_a_chain_is_its_steps_in_any_batch(net, name):
    if net.T == 1:
        net = scatter(MLP(1, hidden=(1,), T=2))
    smp, first = table(net, name), 2**32 - 70
    x, _, _ = batch_of(net, 300)
    whole = chained(CPU, net, smp, x, first)
    assert np.isfinite(whole).all()
    assert_same_bits(walked(net, smp, x, first), whole)
    for be in THREADED:
        for edges in ([0, 300], [0, 1, 8, 24, 128, 257, 300]):
            parts = [chained(be, net, smp, x[a:b], first + a) for a, b in itertools.pairwise(edges)]
            assert_same_bits(np.concatenate(parts), whole)


def test_a_chain_remembers_nothing_of_the_one_before():
    """The memory is zero at first, whatever a tile held; two tables are told apart, and weights that have changed."""
    net = scatter(MLP(5, hidden=(3,), T=11))
    x, _, _ = batch_of(net, 70)
    smp = table(net, "three back")
    hasty = SimpleNamespace(rows=smp.rows[4:], clip=smp.clip)  # the first row reaches back three
    for n in (70, 3):
        chained(CPU, net, smp, x[:n], 5)
        assert_same_bits(chained(CPU, net, hasty, x[:n], 5), walked(net, hasty, x[:n], 5))
        wide = SimpleNamespace(rows=hasty.rows, clip=None)
        assert_same_bits(chained(CPU, net, wide, x[:n], 5), walked(net, wide, x[:n], 5))
    for at in (net.plan.time_bias - 1, net.plan.time_bias):  # the last weight and the first bias of the time table
        before = chained(CPU, net, wide, x[:3], 5)
        net.flat[at] += 1
        after = chained(CPU, net, wide, x[:3], 5)  # its timesteps are those of before
        assert not np.array_equal(after, before)
        assert_same_bits(after, walked(net, wide, x[:3], 5))
        assert_same_bits(chained(CPU, net, wide, x[:3], 5), after)  # the last steps were made for others


def test_a_chain_refuses_what_a_perceptron_does_not_learn():
    net = MLP(5, hidden=(3,), T=11)
    smp = SimpleNamespace(rows=(Row(3, 0, 1, 0, 1, s=1, r=0.5),), clip=None)
    with pytest.raises(ArgumentError, match=r"rows \(r\)"):
        chained(CPU, net, smp, np.zeros((2, 5), np.float32), 0)


@pytest.mark.parametrize("name", ["ddim", "three back"])
def test_curves_longer_than_a_chunk_of_noise(name):
    net = scatter(MLP(2055, hidden=(3,), T=11))
    smp = table(net, name)
    x, _, _ = batch_of(net, 70)
    state = walked(net, smp, x, 7)
    assert_same_bits(chained(CPU, net, smp, x, 7), state)
    assert_same_bits(chained(CPU, net, smp, x[67:], 74), state[67:])
    draws = draws_for(net)
    grads, want = (np.full(net.flat.shape, np.nan, np.float32) for _ in range(2))
    loss = CPU.mlp_train_gradient(net.plan, net.flat, draws, 3, 5, grads)
    x, t, target = draw_batch(draws, net.T, 3, 5)
    assert CPU.mlp_gradient(net.plan, net.flat, Inputs(x, t), target, want)[0] == loss
    assert_same_bits(grads, want)


@pytest.mark.parametrize("name", ["three back", *samplers.names()])
def test_chains_agree(name):
    net = scatter(MLP(17, hidden=(33, 1, 19), T=11))
    smp = table(net, name)
    x, _, _ = batch_of(net, 40)
    want = x.astype(np.float64)
    NUMPY.mlp_chain(
        net.plan, net.flat.astype(np.float64), want, ChainTable(smp.rows, smp.clip), Draw(4, Stream.STEP, first_row=6)
    )
    for be in (NUMPY, CPU):
        assert_close(chained(be, net, smp, x, 6), want, terms=len(smp) * terms(net))


@pytest.mark.parametrize("batch", [100, 1000, 4500])
def test_training_does_not_depend_on_threads(net, batch):
    draws = draws_for(net)
    results = []
    for be in (*THREADED, THREADED[0]):
        grads = unset(net, np.float32)
        results.append((be.mlp_train_gradient(net.plan, net.flat, draws, 8, batch, grads), grads))
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert_same_bits(grads, results[0][1])


def test_networks_leave_nothing_behind():
    """A backend's buffers for a network go when the network goes."""
    made = MLP(3, hidden=(5,), T=7)
    CPU.mlp_forward(made.plan, made.flat, Inputs(np.ones((2, 3), np.float32), np.zeros(2, np.int64)))
    gone = weakref.ref(made.plan)
    del made
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------------------- the optimiser


def optimiser_state(size, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    p, m, average, g = random.normal(size=(4, size)).astype(dtype)
    return [p, m, np.square(random.normal(size=size)).astype(dtype), average], g


PLANS = {
    "default": TrainingPlan(),
    "clipped": TrainingPlan(clip_norm=1e-3, ema=0.5, weight_decay=0.3),
    "free": TrainingPlan(clip_norm=None, ema=None, weight_decay=0.0, lr=0.1),
}


@pytest.mark.parametrize("size", [1, 16, 1003])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_adamw_agrees_with_loops(plan, size):
    state, g = optimiser_state(size)
    options, ema = plan.options(step=6, ema_updates=100), min(plan.ema or 0, 101 / 110)
    want = naive.adamw(
        [column.astype(np.float64).tolist() for column in state], g.astype(np.float64).tolist(),
        step=6, rate=plan.lr, decay=plan.weight_decay, clip=plan.clip_norm or math.inf, ema=ema,
    )  # fmt: skip
    for be, dtype in ((NUMPY, np.float64), (NUMPY, np.float32), (CPU, np.float32)):
        got = [column.astype(dtype) for column in state]
        norm = be.adamw(TrainState(got[0], g.astype(dtype), *got[1:]), options)
        assert type(norm) is float
        assert_close(norm, np.linalg.norm(g.astype(np.float64)), dtype=np.float64)
        for column, wanted in zip(got, want, strict=True):
            assert_close(column, wanted)


def test_adamw_does_not_depend_on_threads():
    results = []
    for be in THREADED:
        state, g = optimiser_state(300_007)
        norm = be.adamw(TrainState(state[0], g, *state[1:]), PLANS["default"].options(0, 0))
        results.append((norm, state))
    for norm, state in results[1:]:
        assert norm == results[0][0]
        for got, want in zip(state, results[0][1], strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(backend, bad):
    state, g = optimiser_state(100)
    g[57] = bad
    kept = [column.copy() for column in state]
    norm = get_backend(backend).adamw(TrainState(state[0], g, *state[1:]), PLANS["free"].options(3, 3))
    assert not math.isfinite(norm)
    for got, want in zip(state, kept, strict=True):
        assert_same_bits(got, want)
