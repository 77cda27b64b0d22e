"""A network of one's own, from public pieces: it is trained, resumed, sampled, saved and loaded as ours are."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
from gradcheck import assert_gradient
from host_cuda import HostRuntime, has_compiler
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.layers import Batch
from fastdiff.errors import ArgumentError, CheckpointError

# ------------------------------------------------------------------------------------------- the network


@fd.nn.register
class Ladder(fd.nn.ProgramNetwork):
    """Residual convolutions along curves of several channels (1, points, channels), each block told t and the class."""

    kind, widths = "ladder of the tests", "width"
    options = ("shape", "width", "depth", "T", "classes", "seed")

    def __init__(self, shape, *, width=4, depth=2, T=8, classes=None, seed=0, dtype="float32", draw=True):
        self.describe(shape, T=T, classes=classes, seed=seed, dtype=dtype)
        self.width, self.depth = width, depth
        self.build(draw)

    def record(self, p):
        along = fd.nn.Conv((1, 3), pad=(0, 0, 1, 1))
        features = p.given("features", (self.T, 8), fixed=True)
        told = p.conv("time", p.take(features, p.given("t", (p.n,))), self.width)
        if self.classes is not None:
            table = p.parameter("class_embedding.weight", (self.classes, self.width))
            told = p.concatenate(told, p.take(table, p.given("labels", (p.n,))))
        told = p.silu(told)
        h = p.conv("first", p.given("x", (p.n, *self.image)), self.width, along)
        for i in range(self.depth):
            shift = p.conv(f"blocks.{i}.told", told, self.width)
            y = p.norm(f"blocks.{i}.norm", h, groups=2, eps=1e-5, silu=True)
            y = p.silu(p.conv(f"blocks.{i}.conv1", y, self.width, along, shift=shift))
            h = p.conv(f"blocks.{i}.conv2", y, self.width, along, residual=h)
        p.conv("last", h, self.outputs, along)

    def constants(self):
        return {"features": fd.nn.sinusoidal_features(self.T, 8).astype(self.dtype)}

    def start(self, name):
        if name.startswith("last."):
            return "zero"
        return "normal" if name == "class_embedding.weight" else super().start(name)


# ------------------------------------------------------------------------------------------- its use

SHAPE, CLASSES = (1, 9, 2), 3
RANDOM = np.random.default_rng(0)
CURVES = RANDOM.normal(size=(24, *SHAPE)).astype(np.float32)
LABELS = np.arange(24) % CLASSES
QUIET = {"progress": False, "batch": 6, "data_range": (-5.0, 5.0)}
EVERYTHING = {"flip": True, "accumulate": 2, "warmup": 2, "decay_steps": 9, "validation": 0.25, **QUIET}
NAMES = ("numpy", "cpu", "cuda")


@pytest.fixture(params=NAMES)
def be(request):
    if request.param != "cuda":
        return fd.get_backend(request.param)
    if not has_compiler():
        pytest.skip("the host run of the CUDA kernels needs g++")
    return CudaBackend(HostRuntime())


def model(be, **options):
    return fd.Diffusion(Ladder(SHAPE, classes=CLASSES, **options), backend=be, seed=3)


def scattered(net):
    for number, view in enumerate(net.params.values()):
        fan_in = math.prod(view.shape[:-1])
        view[...] = np.random.default_rng(number).normal(size=view.shape) / math.sqrt(fan_in)
    return net


def test_it_is_small():
    import inspect

    assert len(inspect.getsource(Ladder).splitlines()) <= 80


def gradient(net, be, x, t, target, labels):
    x, target = (be.asarray(array, net.dtype) for array in (x, target))
    t, labels = (be.asarray(array, np.int64) for array in (t, labels))
    grads = be.asarray(net.layout.zeros(net.dtype), net.dtype)
    loss = net.runner(be).gradient(Batch(x, t, target, labels), grads)
    return be.to_numpy(loss).copy(), be.to_numpy(grads)


def test_every_entry_of_its_gradient():
    net = scattered(Ladder((1, 5, 2), width=4, depth=2, T=4, classes=2, dtype="float64"))
    be, labels = fd.get_backend("numpy"), np.array([1, 0])
    x, target, t = RANDOM.normal(size=(2, 1, 5, 2)), RANDOM.normal(size=(2, 1, 5, 2)), np.array([3, 1])

    def loss():
        return np.mean((net.predict(x, t, labels, backend="numpy") - target) ** 2)

    value, grads = gradient(net, be, x, t, target, labels)
    assert_close(value[0], loss())
    for name, view in net.params.items():
        got = net.layout.views(grads)[name]
        assert_gradient(loss, view, got)
        assert got.any()


def test_gradients_of_backends_agree(be):
    wide, net = (scattered(Ladder(SHAPE, classes=CLASSES, dtype=dtype)) for dtype in ("float64", "float32"))
    batch = CURVES[:5], np.arange(5), -CURVES[5:10], LABELS[:5]
    want_loss, want = gradient(wide, fd.get_backend("numpy"), *batch)
    loss, got = gradient(net, be, *batch)
    assert_close(loss, want_loss, dtype=np.float32, terms=1000)
    assert_close(got, want, dtype=np.float32, terms=1000, scale=np.abs(want).max())


def test_it_goes_on_bit_for_bit(be, tmp_path):
    whole = model(be).fit(CURVES, LABELS, steps=6, **EVERYTHING)
    half = model(be).fit(CURVES, LABELS, steps=3, **EVERYTHING)
    half.save(tmp_path / "m.safetensors")
    again = fd.load(tmp_path / "m.safetensors", backend=be)
    assert type(again.net) is Ladder
    again.fit(CURVES, LABELS, steps=3, **EVERYTHING)
    assert again.history == whole.history
    assert_same_bits(again.net.flat, whole.net.flat)
    for ema in (False, True):
        got, want = (each.sample(3, labels=1, sampler="ddim", steps=4, ema=ema) for each in (again, whole))
        assert_same_bits(be.to_numpy(got), be.to_numpy(want))


def test_it_learns(be):
    """Waves, whose phase is the class."""
    waves = np.sin(np.arange(9)[:, None] + np.arange(2) + 2 * LABELS[:, None, None, None]).astype(np.float32)
    trained = model(be, T=20).fit(waves, LABELS, steps=150, lr=0.02, **QUIET)
    losses = trained.history["loss"]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


def test_samples_do_not_depend_on_the_batch(be):
    trained = model(be).fit(CURVES, LABELS, steps=3, **QUIET)
    labels = np.arange(5) % CLASSES
    whole = be.to_numpy(trained.sample(5, labels=labels))
    assert whole.shape == (5, *SHAPE)
    if be.name != "numpy":  # where BLAS decides how it adds
        assert_same_bits(be.to_numpy(trained.sample(5, labels=labels, batch=2)), whole)
        trained.net.chunk = 2
        assert_same_bits(be.to_numpy(trained.sample(5, labels=labels)), whole)
    path = trained.sample(5, labels=labels, trajectory=True)[0]
    assert_same_bits(be.to_numpy(path), whole)
    other = be.to_numpy(trained.sample(5, labels=(labels + 1) % CLASSES))
    assert (other != whole).any()


def test_backends_agree():
    results = []
    for name in ("numpy", "cpu"):
        trained = model(name).fit(CURVES, LABELS, steps=3, **QUIET)
        results.append((trained.history["loss"], trained.sample(3, labels=0)))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4)


def test_copies_start_with_no_memory(be):
    trained = model(be).fit(CURVES, LABELS, steps=2, **QUIET)
    want = be.to_numpy(trained.sample(2, labels=1))
    for again in (copy.deepcopy(trained.net), pickle.loads(pickle.dumps(trained.net))):
        assert_same_bits(again.flat, trained.net.flat)
        assert not again._memories._memories
    if be.name != "cuda":
        assert_same_bits(copy.deepcopy(trained).sample(2, labels=1), want)


def test_it_is_a_denoiser(be):
    net = scattered(Ladder(SHAPE, T=6))
    smp = fd.samplers.ddpm(fd.Schedule.cosine(6), clip=3.0)
    x = fd.sample(net, smp, n=3, backend=be, seed=2)
    stepwise = fd.sample(partial(net.predict, backend=be), smp, n=3, shape=SHAPE, backend=be, seed=2)
    if be.name == "cuda":
        x, stepwise = be.to_numpy(x), be.to_numpy(stepwise)
    assert_same_bits(x, stepwise)
    with pytest.raises(ArgumentError, match="labels: got"):
        fd.sample(net, smp, n=3, labels=1, backend=be)


# ------------------------------------------------------------------------------------------- what is refused


def test_a_kind_that_nobody_registered(tmp_path, monkeypatch):
    model("cpu").fit(CURVES, LABELS, steps=1, **QUIET).save(tmp_path / "m.safetensors")
    monkeypatch.delitem(fd.nn.network._kinds, Ladder.kind)
    with pytest.raises(CheckpointError, match=r"kind: got 'ladder of the tests', wants one of .*unet"):
        fd.load(tmp_path / "m.safetensors")


def test_a_kind_that_another_class_has():
    class Other(Ladder):
        kind = "unet"

    with pytest.raises(ArgumentError, match=r"kind: got 'unet', wants another name: fastdiff.nn.unet.UNet has it"):
        fd.nn.register(Other)
    assert type(fd.nn.network_of(fd.UNet((4, 4, 1), channels=(4,)).to_dict())) is fd.UNet


@pytest.mark.parametrize(
    ("bad", "argument"),
    [({"shape": (0, 3, 1)}, "shape"), ({"shape": 3}, "shape"), ({"T": 0}, "T"), ({"classes": 0}, "classes"),
     ({"seed": -1}, "seed"), ({"dtype": "float16"}, "dtype"), ({"width": 1 << 40}, "width")],
)  # fmt: skip
def test_bad_arguments(bad, argument):
    with pytest.raises(ArgumentError) as caught:
        Ladder(**{"shape": SHAPE} | bad)
    assert caught.value.argument == argument


def test_a_value_is_not_put_beside_itself():
    class Doubled(Ladder):
        def record(self, p):
            h = p.conv("first", p.given("x", (p.n, *self.image)), self.width)
            p.conv("last", p.concatenate(h, h), self.outputs)

    with pytest.raises(ArgumentError, match="b: got the value that a is, wants another one"):
        Doubled(SHAPE)


def test_weights_start_as_it_says():
    net = Ladder(SHAPE, classes=CLASSES, seed=7)
    assert not net.params["last.weight"].any()
    assert (net.params["blocks.0.norm.weight"] == 1).all()
    assert not net.params["blocks.0.norm.bias"].any()
    bound = 1 / math.sqrt(3 * net.width)
    assert 0.5 * bound < np.abs(net.params["blocks.1.conv2.weight"]).max() <= bound
    assert np.abs(net.params["class_embedding.weight"]).max() > 1
    before = net.flat.copy()
    scattered(net).redraw()
    assert_same_bits(net.flat, before)
    assert fd.nn.network_of(net.to_dict()).to_dict() == net.to_dict()
