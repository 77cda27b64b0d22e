"""Products of a network's Jacobian with vectors: J^T c by a backward pass, J v by tangents."""

from __future__ import annotations

import numpy as np
import pytest
from gradcheck import assert_gradient, scatter, with_linear
from host_cuda import HostRuntime, has_compiler
from test_unet import NETS as UNETS
from test_unet import apart
from test_unet import made as unet
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.backends import DenseLayer, Inputs, MLPPlan
from fastdiff.backends.cuda import CudaBackend
from fastdiff.denoiser import denoiser_of
from fastdiff.errors import ArgumentError
from fastdiff.nn import MLP, Conv
from fastdiff.nn.layers import Program

NUMPY = fd.get_backend("numpy")


class Everything(fd.nn.ProgramNetwork):
    """Every operation of a program, with x on every way through it that there is."""

    kind, options = "everything of the tests", ("shape", "T", "classes", "seed")

    def __init__(self, shape, *, T=4, classes=None, seed=0, dtype="float32", draw=True):
        self.describe(shape, T=T, classes=classes, seed=seed, dtype=dtype)
        self.build(draw)

    def record(self, p):
        around = Conv((1, 3), pad=(0, 0, 1, 1))
        told = p.take(p.parameter("time.weight", (self.T, 4)), p.given("t", (p.n,)))
        told = p.gelu(p.conv("told", p.silu(told), 4))
        x = p.given("x", (p.n, *self.image))

        def plain(name):  # an image that x does not change
            image = p.offset(f"{name}.places", p.conv(name, told, 4, Conv(up=(1, self.image[1]))))
            return p.norm(f"{name}.norm", image, groups=2, eps=1e-3, silu=False)

        h = p.conv("first", p.resize(x, 1, self.image[1] + 1), 4, around, shift=p.conv("shift", told, 4))
        h = p.norm("norm", h, groups=2, eps=1e-3, silu=True, modulation=p.conv("modulation", told, 8))
        h = p.resize(h, 1, self.image[1])
        h = p.concatenate(h, p.gelu(p.layer_norm("layer_norm", h, eps=1e-3)))
        h = p.concatenate(plain("plain"), p.offset("places", p.conv("second", h, 6, around)))
        h = p.attention(p.conv("qkv", h, 12), 2)
        h = p.conv("out", h, 4, residual=p.silu(p.conv("side", x, 4)))
        # What x changes in other ways: shifts and modulation.
        seen = p.silu(p.conv("seen", h, 4, Conv((1, self.image[1]))))
        h = p.norm("norm.1", h, groups=4, eps=1e-3, silu=False)
        h = p.norm("norm.2", h, groups=1, eps=1e-3, silu=True, modulation=p.conv("modulation.2", seen, 8))
        other = p.layer_norm("layer_norm.1", plain("plain.1"), eps=1e-3)
        other = p.norm("norm.3", other, groups=2, eps=1e-3, silu=True, modulation=p.conv("modulation.3", seen, 8))
        h = p.conv("third", plain("plain.2"), 4, around, shift=p.conv("shift.3", seen, 4), residual=h)
        h = p.concatenate(p.conv("fourth", plain("plain.3"), 4, residual=h), other)
        p.conv("last", h, self.outputs)


def everything(dtype="float64"):
    net, random = Everything((1, 5, 2), dtype=dtype), np.random.default_rng(0)
    for name, view in net.params.items():
        view[...] = random.normal(size=view.shape) / np.sqrt(max(1, np.prod(view.shape[:-1])))
        view += "norm" in name and name.endswith("weight")
    return net


NETS = {
    "default": lambda dtype: scatter(MLP(5, hidden=(6, 7), T=3, dtype=dtype)),
    "tutorial": lambda dtype: scatter(MLP.tutorial(3, T=4, dtype=dtype)),
    "linear": lambda dtype: scatter(MLP(4, hidden=(), T=3, dtype=dtype)),
    "linear part": lambda dtype: with_linear(scatter(MLP(5, hidden=(6,), T=3, dtype=dtype))),
    "part of rank": lambda dtype: with_linear(scatter(MLP(7, hidden=(5, 3, 9), T=3, dtype=dtype)), 3),
    "part alone": lambda dtype: with_linear(scatter(MLP(5, hidden=(), T=3, dtype=dtype))),
    "everything": everything,
    **{name: (lambda dtype, o=options: unet(o, dtype, dropout=0.0)) for name, options in UNETS.items()},
}
nets = pytest.mark.parametrize("make", NETS.values(), ids=NETS)
LANES = {"numpy": NUMPY, "cpu": fd.get_backend("cpu", threads=2), "one thread": fd.get_backend("cpu", threads=1)}
if has_compiler():
    LANES["cuda"] = CudaBackend(HostRuntime())
TERMS = 300  # of a way through one of these networks and back


def given(net, n=2, seed=1):
    """x, t, labels, and a vector like the output and one like x."""
    random = np.random.default_rng(seed)
    shape = net.shape if len(net.shape) == 1 else (*net.shape[:-1], net.outputs)
    x, tangent = random.normal(size=(2, n, *net.shape)).astype(net.dtype)
    labels = None if net.classes is None else random.integers(0, net.classes, n)
    cotangent = random.normal(size=(n, *shape)).astype(net.dtype)
    return x, random.integers(0, net.T, n), labels, cotangent, tangent


def units(n, shape):
    """Every unit vector of one sample, for n of them."""
    size = int(np.prod(shape))
    return np.broadcast_to(np.eye(size).reshape(size, 1, *shape), (size, n, *shape)).copy()


@nets
def test_every_entry(make):
    net = make("float64")
    x, t, labels, cotangent, _ = given(net)

    def inner():
        return np.sum(net.predict(x, t, labels, backend="numpy") * cotangent)

    got = net.vjp(x, t, cotangent, labels, backend="numpy")
    assert_gradient(inner, x, got)
    # All columns of J, against all rows of it.
    n, size = len(x), int(np.prod(net.shape))
    columns = net.jvp(x, t, units(n, net.shape), labels, backend="numpy")
    rows = net.vjp(x, t, units(n, cotangent.shape[1:]), labels, backend="numpy")
    J = columns.reshape(size, n, -1).transpose(1, 2, 0)
    assert_close(rows.reshape(-1, n, size).transpose(1, 0, 2), J, terms=TERMS, scale=np.abs(J).max())
    assert_close(np.einsum("noi,no->ni", J, cotangent.reshape(n, -1)).reshape(x.shape), got, terms=TERMS)
    assert np.abs(J).max() > 1e-3


def wide(net, make):
    """The network in float64, with its own weights."""
    other = make("float64")
    other.flat[...] = net.flat
    return other


@nets
@pytest.mark.parametrize("lane", LANES)
def test_backends_agree_with_float64(make, lane):
    net = make("float32")
    x, t, labels, cotangent, tangent = given(net, 5)
    for name, vector in (("vjp", cotangent), ("jvp", tangent)):
        vectors = np.stack([vector, -2 * vector[::-1]])
        got = getattr(net, name)(x, t, vectors, labels, backend=LANES[lane])
        arrays = x.astype(np.float64), t, vectors.astype(np.float64)
        want = getattr(wide(net, make), name)(*arrays, labels, backend="numpy")
        assert got.dtype == np.float32
        assert_close(got, want, terms=TERMS)
        alone = getattr(net, name)(x, t, vectors[1], labels, backend=LANES[lane])
        assert_same_bits(alone, got[1])


@nets
@pytest.mark.parametrize("lane", ["cpu", "cuda"])
def test_the_batch_and_the_threads_change_nothing(make, lane):
    if lane not in LANES:
        pytest.skip("the host run of the CUDA kernels needs g++")
    net, n = make("float32"), 131
    x, t, labels, cotangent, tangent = given(net, n)
    if not isinstance(net, MLP):
        n, net.chunk = 7, 3
    for name, vector in (("vjp", cotangent), ("jvp", tangent)):
        whole = getattr(net, name)(
            x[:n], t[:n], vector[:n], None if labels is None else labels[:n], backend=LANES[lane]
        )
        for part in (slice(0, 1), slice(n - 2, n)):
            some = None if labels is None else labels[part]
            for be in (LANES[lane], LANES["one thread"] if lane == "cpu" else LANES[lane]):
                assert_same_bits(getattr(net, name)(x[part], t[part], vector[part], some, backend=be), whole[part])


KINDS = [(a, t) for a in ("none", "leaky_relu", "silu") for t in ("none", "shift", "scale_shift")]


@pytest.mark.parametrize("lane", LANES)
def test_every_kind_of_dense_layer(lane):
    be, layers, column, width = LANES[lane], [], 0, 5
    for i, (activation, time) in enumerate(KINDS):
        layers.append(DenseLayer(width, width, 30 * i, 30 * i + 25, activation, time, column))
        column += width * ("none", "shift", "scale_shift").index(time)
    end = 30 * len(layers)
    plan = MLPPlan(tuple(layers), 4, end + 4 * column, column, end, 0, None)
    flat, x, dy, dx = (np.random.default_rng(3).normal(size=size) for size in (plan.size, (6, 5), (6, 5), (6, 5)))
    flat *= 0.5
    t = np.arange(6) % 4
    want, got = np.empty((2, 6, 5)), be.empty((2, 6, 5))

    def inner():
        return np.sum(NUMPY.mlp_forward(plan, flat, Inputs(x, t)) * dy)

    NUMPY.mlp_vjp(plan, flat, Inputs(x, t), dy, want[0])
    NUMPY.mlp_jvp(plan, flat, Inputs(x, t), dx, want[1])
    assert_gradient(inner, x, want[0])
    np.testing.assert_allclose(np.sum(want[0] * dx), np.sum(want[1] * dy), rtol=1e-12)
    wanted = NUMPY.mlp_forward(plan, flat, Inputs(x, t))
    params, x, dy, dx = (be.asarray(a, np.float32) for a in (flat, x, dy, dx))
    t = be.asarray(t, np.int64)
    y = be.empty((6, 5))
    be.mlp_vjp(plan, params, Inputs(x, t), dy, got[0], y=y)
    assert_close(be.to_numpy(y), wanted, terms=TERMS, dtype=np.float32)
    be.mlp_jvp(plan, params, Inputs(x, t), dx, got[1])
    for k in range(2):
        assert_close(be.to_numpy(got[k]), want[k], terms=TERMS, dtype=np.float32)


@pytest.mark.parametrize("purpose", ["vjp", "jvp"])
@pytest.mark.parametrize("make", [everything, NETS["curves"]], ids=["everything", "unet"])
def test_values_that_share_memory_do_not_disturb_each_other(make, purpose):
    net = make("float32")
    x, t, labels, cotangent, tangent = given(net)
    inputs = {"x": x.reshape(2, *net.image), "t": t, "labels": labels, **net.constants()}
    vector = cotangent if purpose == "vjp" else tangent
    results = []
    for separate in (False, True):
        program = Program(2, purpose)
        net.record(program)
        program.plan()
        program.lay(np.full(program.size, np.nan, np.float32))
        if separate:
            apart(program)
        vector = vector.reshape(program.output.shape if purpose == "vjp" else inputs["x"].shape)
        results.append(program.run(NUMPY, net.params, {**inputs, "vector": vector}).copy())
    assert_same_bits(results[0], results[1])
    assert np.isfinite(results[0]).all()


def test_a_runner_reuses_its_memory():
    net = NETS["curves"]("float32")
    x, _, labels, cotangent, _ = given(net)
    runner = net.runner(LANES["cpu"])
    flat = (array.reshape(2, -1) for array in (x, cotangent))
    x, cotangent = flat
    first = runner.vjp(x, 1, cotangent, labels)
    want, address = first.copy(), first.ctypes.data
    runner.evaluate(x, 0, labels)
    again = runner.vjp(x, 1, cotangent, labels)
    assert again.ctypes.data == address
    assert_same_bits(again, want)
    assert_same_bits(want, net.vjp(x, 1, cotangent, labels, backend=LANES["cpu"]))


def test_a_network_that_does_not_look():
    class Blind(fd.nn.ProgramNetwork):
        kind, options = "blind of the tests", ("shape", "T")

        def __init__(self, shape, *, T=4, dtype="float32", draw=True):
            self.describe(shape, T=T, dtype=dtype)
            self.build(draw)

        def record(self, p):
            p.given("x", (p.n, *self.image))
            t = p.take(p.parameter("time.weight", (self.T, 3)), p.given("t", (p.n,)))
            p.conv("last", t, 1, Conv((1, 1), up=(1, self.image[1])))

    net, x = Blind((5,)), np.ones((2, 5), np.float32)
    for name in ("vjp", "jvp"):
        assert not getattr(net, name)(x, 1, x, backend="numpy").any()


def test_a_denoiser_of_the_callers():
    """Products of an object that has them; without, an error that says so."""

    class Linear:
        T, prediction, shape, classes = 4, "x0", (2,), None
        J = np.array([[1.0, 2.0], [0.0, 3.0]])

        def predict(self, x, t):
            return x @ self.J.T

        def vjp(self, x, t, cotangent):
            return cotangent @ self.J

        def jvp(self, x, t, tangent):
            return tangent @ self.J.T

    evaluator = denoiser_of(Linear()).on(NUMPY, (2,))
    x, vectors = np.ones((3, 2)), np.random.default_rng(0).normal(size=(2, 3, 2))
    assert_close(evaluator.vjp(x, 1, vectors), vectors @ Linear.J)
    assert_close(evaluator.jvp(x, 1, vectors[0]), vectors[0] @ Linear.J.T)
    bare = denoiser_of(lambda x, t: x).on(NUMPY, (2,))
    for name in ("vjp", "jvp"):
        with pytest.raises(ArgumentError, match=rf"denoiser: got a function, wants one with derivatives.*\.{name}"):
            getattr(bare, name)(x, 1, x)


def test_a_models_denoiser():
    model = fd.Diffusion(MLP(5, hidden=(8,), T=4), backend="numpy")
    model.fit(np.random.default_rng(0).normal(size=(64, 5)), steps=3, progress=False)
    denoiser, x = model.denoiser(), np.ones((2, 5), np.float32)
    want = model.net.vjp(x, 2, x, backend="numpy", flat=denoiser.flat)
    assert_same_bits(denoiser.vjp(x, 2, x), want)
    assert_same_bits(denoiser.on(NUMPY).vjp(x, 2, x), want)
    assert_same_bits(denoiser.jvp(x, 2, x), denoiser.on(NUMPY).jvp(x, 2, x))


@pytest.mark.parametrize("shape", [(5,), (2, 4), (3, 5), (2, 3, 5), (2, 2, 2, 5), ()])
def test_vectors_of_another_shape_are_refused(shape):
    net = MLP(5, hidden=(), T=2)
    with pytest.raises(ArgumentError, match=r"cotangent: got shape .*\(2, 5\), or several"):
        net.vjp(np.zeros((2, 5)), 0, np.zeros(shape))
    with pytest.raises(ArgumentError, match=r"tangent: got nan"):
        net.jvp(np.zeros((2, 5)), 0, np.full((2, 5), np.nan))
