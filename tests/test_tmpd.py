"""Chains of a perceptron given observations, in one piece, against the same row by row in NumPy, and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from device_array import DeviceRuntime
from gradcheck import scatter, with_linear
from host_cuda import has_compiler
from test_image_models import net as image_net
from tolerances import TMPD, assert_same_bits

import fastdiff as fd
from fastdiff import conditioning
from fastdiff.backends.cuda import CudaBackend
from fastdiff.base import GaussianBase
from fastdiff.bench import BY_NAME
from fastdiff.kernels.cpu import tmpd
from fastdiff.nn import MLP

CPU, ALONE = fd.get_backend("cpu", threads=2), fd.get_backend("cpu", threads=1)
T = 8
ON_HOST = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")


def tame(net):
    """Smaller weights: what a chain makes of a difference grows with them."""
    net.flat *= 0.5
    return net


NETS = {
    "default": lambda: scatter(MLP(6, hidden=(5, 9), T=T)),
    "tutorial": lambda: scatter(MLP.tutorial(5, T=T)),
    "linear part": lambda: with_linear(scatter(MLP(7, hidden=(6,), T=T))),
    "part of rank": lambda: with_linear(scatter(MLP(26, hidden=(12,), T=T)), 4),
    "part alone": lambda: with_linear(scatter(MLP(5, hidden=(), T=T))),
    "many values": lambda: scatter(MLP(40, hidden=(20,), T=T)),
}
TABLES = {
    "ddpm": lambda s: fd.samplers.ddpm(s, 4, prediction="v"),
    "memory": lambda s: fd.samplers.dpmpp_2m(s, 5, prediction="v"),
}


def holes(d, count=3, seed=0):
    """Observations of which some know less than others, and one nothing."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, d))
    values[rng.random((count, d)) < 0.4] = np.nan
    values[-1] = np.nan
    return values


def observations(kind, d):
    rng = np.random.default_rng(1)
    seen = fd.Known(holes(d), 0.3)
    if kind == "single values":
        return seen
    return [seen, fd.Linear(rng.normal(size=(2, d)) / np.sqrt(d), rng.normal(size=2), 0.2)]


@pytest.mark.parametrize("kind", ["single values", "linear maps"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_in_one_piece_it_is_the_same(make, table, kind, monkeypatch):
    net, table = tame(make()), table(fd.Schedule.cosine(T).zero_terminal_snr())  # whose first row says nothing
    options = {"n": 30, "given": observations(kind, net.points), "seed": 2, "first_sample": 3}
    want = fd.sample(net, table, backend="numpy", **options)
    monkeypatch.setattr(conditioning.ConditionedEvaluator, "step", None)  # it is not row by row
    got = fd.sample(net, table, backend=CPU, **options)
    assert np.abs(got - want).max() <= TMPD * np.abs(want).max()
    for other in ({"batch": 7, "progress": True}, {"batch": 64, "backend": ALONE}):
        assert_same_bits(fd.sample(net, table, **{"backend": CPU, **options, **other}), got)
    assert_same_bits(fd.sample(net, table, backend=CPU, **{**options, "n": 2, "first_sample": 5}), got[2:4])


def test_a_mean_that_is_moved_too_far_is_moved_less(monkeypatch):
    """In the chain in one piece too: a tenth of a deviation, and as many times that as values are large."""
    net, table = tame(NETS["many values"]()), TABLES["ddpm"](fd.Schedule.cosine(T))
    options = {"n": 20, "given": fd.Known(4 * holes(net.points), 0.3), "seed": 2}
    free = fd.sample(net, table, backend=CPU, **options)
    monkeypatch.setattr(conditioning, "REACH", 0.1)
    want = fd.sample(net, table, backend="numpy", **options)
    got = fd.sample(net, table, backend=CPU, **options)
    assert np.abs(got - want).max() <= TMPD * np.abs(want).max()
    assert np.abs(got - free)[:, :2].max() > 0.1
    np.testing.assert_allclose(got[:, 2], free[:, 2], atol=1e-5)  # of which nothing is known


def test_an_observation_has_its_bits_among_others():
    net, table = NETS["default"](), TABLES["ddpm"](fd.Schedule.cosine(T))
    seen = holes(net.points)
    all_of_them = fd.sample(net, table, n=5, given=fd.Known(seen, 0.3), backend=CPU)
    known = conditioning.observations(fd.Known(seen, 0.3), net.shape)
    assert_same_bits(fd.sample(net, table, n=5, given=known.some(np.array([1])), backend=CPU), all_of_them[:, 1:2])


def test_what_is_small_is_left_out():
    """By the singular values of a matrix: divided by where they are large, and left out where they are not."""
    rng = np.random.default_rng(0)
    K, rows, least = 5, 20, 1e-3
    U, V = (np.linalg.qr(rng.normal(size=(rows, K, K)))[0] for _ in range(2))
    values = np.array([3.0, 1.0, 0.1, 1e-5, 0.0])
    M, rest = U * values @ V.transpose(0, 2, 1), rng.normal(size=(rows, K))
    parts = np.einsum("nik,ni->nk", U, rest)
    filtered = (1 - (least**2 / (values**2 + least**2)) ** 3) / np.maximum(values, 1e-300)
    want = np.einsum("nik,nk->ni", V, filtered * parts)
    np.testing.assert_allclose(conditioning.damped(M, rest, least), want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    H, rhs, w = np.zeros((K, K, tmpd.TILE)), np.zeros((K, tmpd.TILE)), np.zeros((K, tmpd.TILE))
    H[..., :rows], rhs[:, :rows] = M.transpose(1, 2, 0), rest.T
    room = [np.empty(K * k * tmpd.LANES) for k in (K, 1, 1)]
    tmpd.damped(K, K, rows, H.reshape(-1), rhs.reshape(-1), least**2, *room, w.reshape(-1))
    np.testing.assert_allclose(w[:, :rows].T, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def test_one_forward_pass_for_all_products(monkeypatch):
    """Of few observations the products with J^T, and the output, are one call of the network's backend."""
    be, calls = fd.get_backend("numpy"), []
    for name in ("mlp_forward", "mlp_vjp"):
        original = getattr(type(be), name)
        monkeypatch.setattr(
            type(be), name, lambda self, *a, name=name, original=original: (calls.append(name), original(self, *a))[1]
        )
    net = NETS["default"]()
    fd.sample(net, fd.samplers.ddpm(fd.Schedule.cosine(T), 3), n=2, given=fd.Known(holes(6)[0]), backend=be)
    assert calls == ["mlp_vjp"] * 3


def test_the_workload_compares_the_same_draws():
    """Its inputs for the peer hold the noise that ours draws."""
    workload = BY_NAME["chain-given-tutorial-1000"].at(0.2)
    assert (workload.curves_seen, workload.draws_of_each) == (2, 100)
    inputs, outputs = workload.compare(CPU, None)
    assert outputs["samples"].shape == (200, 50)
    start = fd.normal((1, 50), seed=0, stream="init", first_sample=2**20)
    assert_same_bits(inputs["noise"][0, 100:101], start)


def test_draws_with_indices_of_their_own_have_their_noise():
    """As windows of recordings have: in one piece as row by row, and whoever else is drawn."""
    net, table = tame(NETS["default"]()), TABLES["ddpm"](fd.Schedule.cosine(T))
    seen, firsts = holes(net.points, 5), np.array([7, 8, 2**20 + 3, 2**20 + 4, 11])
    known = replace(conditioning.observations(fd.Known(seen, 0.3), net.shape), firsts=firsts)
    want = fd.sample(net, table, n=1, given=known, backend="numpy")
    got = fd.sample(net, table, n=1, given=known, backend=CPU)
    assert np.abs(got - want).max() <= TMPD * np.abs(want).max()
    for which in ([1], [2, 3]):
        few = replace(known, count=len(which), known=((seen[which], np.full(net.points, 0.3)),), firsts=firsts[which])
        assert_same_bits(fd.sample(net, table, n=1, given=few, backend=CPU), got[:, which])


# ------------------------------------------------------------------------------------------- closed forms

BACKENDS = ["numpy", "cpu", pytest.param("cuda", marks=ON_HOST)]


def backend(name):
    return CudaBackend(DeviceRuntime()) if name == "cuda" else fd.get_backend(name)


@pytest.mark.parametrize("stepwise", [False, True], ids=["in one piece", "row by row"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["few values", "linear maps", "many values"])
def test_a_network_that_is_a_gaussian_draws_from_its_posterior(kind, name, stepwise):
    """Value by value: the mean of x0 given a state and what was seen is that of the joint normal law."""
    d, s, be = 40 if kind == "many values" else 6, fd.Schedule.cosine(12), backend(name)
    at, random = np.arange(d), np.random.default_rng(4)
    variances, axes = np.linalg.eigh(np.exp(-np.abs(at[:, None] - at) / 4))
    prior = fd.denoisers.Gaussian(np.zeros(d), axes * variances @ axes.T, s, prediction="v")
    net = MLP(d, hidden=(), T=12)
    net.set_linear(GaussianBase(axes, variances, 0.0).linear(s, "v"))
    values = np.where(at % 2, random.normal(size=d), np.nan)
    seen = fd.Known(values, 0.3)
    if kind == "linear maps":
        maps = fd.Linear(random.normal(size=(2, d)), [1.0, -1.0], 0.5)
        seen = [fd.Known(np.where(at < 2, values, np.nan), 0.3), maps]
    for table in (fd.samplers.ddpm(s, 5, prediction="v"), fd.samplers.dpmpp_2m(s, 5, prediction="v")):
        want = fd.sample(prior.given(seen), table, n=7, shape=(d,), seed=3, backend="numpy")
        got = fd.sample(net, table, n=7, given=seen, seed=3, trajectory=stepwise, backend=be)
        got = be.to_numpy(got[0] if stepwise else got)
        assert np.abs(got - want).max() <= TMPD * np.abs(want).max()


# ------------------------------------------------------------------------------------------- on CUDA

LAUNCHES = {"few values": (8, 8 + 6 + 3), "many values": (20, 8 + 1 + 16 * (6 + 1) + 2)}


@ON_HOST
@pytest.mark.parametrize("kind", LAUNCHES)
def test_on_cuda_a_row_is_one_graph_and_nothing_is_read(kind):
    """A forward pass of two launches for each of four layers, products of six, what is solved, and the step."""
    count, launches = LAUNCHES[kind]
    net, table = tame(scatter(MLP.tutorial(50, T=T))), TABLES["memory"](fd.Schedule.cosine(T))
    values = np.where(np.arange(50) < count, np.random.default_rng(0).normal(size=50), np.nan)
    be, eager = CudaBackend(DeviceRuntime()), CudaBackend(DeviceRuntime(), graphs=False)
    options = {"n": 5, "given": fd.Known(values, 0.3), "batch": 3}
    got, want = (each.to_numpy(fd.sample(net, table, backend=each, **options)) for each in (be, eager))
    assert_same_bits(got, want)
    assert be.runtime.reads == eager.runtime.reads == [(5, 50)] * 2  # once by `sample`, once here
    assert be.runtime.graphs == [launches] * 2  # for 3 states, and for 2
    assert not eager.runtime.graphs


@ON_HOST
def test_on_cuda_other_networks_read_nothing_either():
    """Row by row: a network of pictures, one that is asked for something, and one whose path is wanted."""
    s, be = fd.Schedule.cosine(T), CudaBackend(DeviceRuntime())
    table, random = fd.samplers.ddpm(s, 3, prediction="v"), np.random.default_rng(0)
    nets = {
        "pictures": (image_net((8, 4, 1), T=T), {}, []),
        "classes": (tame(scatter(MLP(6, hidden=(5,), T=T, classes=3))), {"labels": 1}, [(2,)]),  # its labels, once
        "path": (NETS["default"](), {"trajectory": True}, []),
    }
    for net, options, asked in nets.values():
        values = random.normal(size=net.shape)
        values[:2] = np.nan
        options |= {"n": 2, "given": fd.Known(values, 0.3), "seed": 1}
        want = fd.sample(net, table, backend="numpy", **options)
        be.runtime.reads.clear()
        got = fd.sample(net, table, backend=be, **options)
        want, got = ((each[0] if "trajectory" in options else each) for each in (want, got))
        assert be.runtime.reads == [*asked, (2, want[0].size)]
        assert np.abs(be.to_numpy(got) - want).max() <= TMPD * np.abs(want).max()
