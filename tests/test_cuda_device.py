"""The whole library on arrays that lie on a device and refuse to become NumPy arrays unasked.

Nothing but the runtime may bring one to the host, and what it brings is counted: one read in many training steps, none
in a sampling loop.
"""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace

import cuda_parity_conv  # noqa: F401 - registers its checks
import cuda_parity_covariance  # noqa: F401 - registers its checks
import cuda_parity_layers  # noqa: F401 - registers its checks
import cuda_parity_mlp  # noqa: F401 - registers its checks
import cuda_parity_tmpd  # noqa: F401 - registers its checks
import numpy as np
import pytest
from cuda_parity import CHECKS
from device_array import DeviceArray, DeviceRuntime
from host_cuda import HostRuntime, has_compiler
from tolerances import assert_same_bits

import fastdiff as fd
from fastdiff import backends, cli, demo
from fastdiff.backends import PRECISIONS, Inputs
from fastdiff.backends.cuda import CudaBackend
from fastdiff.errors import ArgumentError, TrainingError
from fastdiff.process import posterior

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

SCHEDULE = fd.Schedule.cosine(12)
X0 = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
T5 = np.array([0, 3, 11, 3, 7])


@pytest.fixture
def be():
    return CudaBackend(DeviceRuntime())


HOST = CudaBackend(HostRuntime())


@pytest.fixture
def named(be, monkeypatch):
    """The backend is what "cuda" means."""
    shared = backends._shared
    monkeypatch.setattr(backends, "_shared", lambda name, *rest: be if name == "cuda" else shared(name, *rest))
    return be


def read(array):
    assert isinstance(array, DeviceArray)
    return array._memory


# ------------------------------------------------------------------------------------------- the array itself


@pytest.mark.parametrize(
    "conversion",
    [
        np.asarray, np.array, float, int, bool, list, iter, sum, np.zeros_like, np.sqrt, np.concatenate, np.from_dlpack,
        memoryview, lambda a: a == a, lambda a: a + np.ones(3), lambda a: np.ones(3) + a, lambda a: a.item(),
        lambda a: np.ones(3)[a], lambda a: np.copyto(np.ones(3), a), lambda a: 1 in a, lambda a: [0, 1][a],
    ],
)  # fmt: skip
def test_it_refuses_to_come_to_the_host(conversion):
    with pytest.raises((TypeError, RuntimeError, BufferError, IndexError)):
        conversion(DeviceArray(np.ones(3, np.float32)))
    with pytest.raises((TypeError, AssertionError)):
        DeviceArray(np.ones(3))[...] = np.ones(3)


def test_it_computes_where_it_is():
    a = DeviceArray(np.arange(6, dtype=np.float32).reshape(2, 3))
    b = (2 * a[:, 1:] - np.float32(1)) / 4
    b[0] += b[1]
    assert read(b).tolist() == [[2.0, 3.0], [1.75, 2.25]]
    assert a[:, ::2].flags.c_contiguous is False
    assert read(a.T.reshape(6)[DeviceArray(np.array([1, 5]))]).tolist() == [3, 5]
    assert (len(a), a.ndim, a.size, a.nbytes, a.device.id, a.__dlpack_device__()) == (2, 2, 6, 24, 0, (2, 0))
    with pytest.raises(AssertionError, match="devices 0 and 1"):
        a + DeviceArray(np.ones(3), where=1)


# ------------------------------------------------------------------------------------------- the library on it


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_agree(be, name):
    CHECKS[name].run(be, "small")


def test_noising(be):
    x0, t = be.asarray(X0), be.asarray(T5, np.int64)
    at = {"seed": 6, "first_sample": 3}
    want, eps = fd.forward_noise(X0, T5, SCHEDULE, backend="numpy", **at)
    out = be.empty(X0.shape)
    for steps in (t, T5, t.astype(np.int32)):
        noisy, drawn = fd.forward_noise(x0, steps, SCHEDULE, backend=be, out=out, **at)
        assert noisy is out
        assert_same_bits(read(noisy), want)
        assert_same_bits(read(drawn), eps)
    at_three = fd.forward_noise(x0, t[1], SCHEDULE, backend=be, **at)[0]
    assert_same_bits(read(at_three), fd.forward_noise(X0, 3, SCHEDULE, backend="numpy", **at)[0])
    assert_same_bits(read(x0), X0)
    chain = fd.forward_chain(x0, SCHEDULE, seed=6, backend=be)
    assert_same_bits(read(chain), fd.forward_chain(X0, SCHEDULE, seed=6, backend="numpy"))
    z = fd.normal((3, 4), seed=2, backend=be)
    assert_same_bits(read(z), fd.normal((3, 4), seed=2, backend="numpy"))
    assert not be.runtime.reads
    # The host's arrays come back to it.
    for array in (*fd.forward_noise(X0, T5, SCHEDULE, backend=be), fd.forward_chain(X0, SCHEDULE, backend=be)):
        assert isinstance(array, np.ndarray)
    given = np.empty_like(X0)
    assert fd.forward_noise(X0, t, SCHEDULE, backend=be, out=given, **at)[0] is given
    assert_same_bits(given, want)


@pytest.mark.parametrize("known", ["x0", "noise"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_posterior_stays_on_the_device(be, known, dtype):
    x_t, other = np.random.default_rng(1).normal(size=(2, 5, 3, 2)).astype(dtype)
    want, want_var = posterior(x_t, T5, SCHEDULE, **{known: other})
    arrays = be.asarray(x_t, dtype), be.asarray(other, dtype)
    for t in (T5, be.asarray(T5, np.int64)):
        mean, var = posterior(arrays[0], t, SCHEDULE, **{known: arrays[1]}, backend=be)
        assert_same_bits(read(mean), want)
        assert_same_bits(read(var), want_var)
    assert var.shape == (5, 1, 1)
    assert not be.runtime.reads
    mean, _ = posterior(x_t, 4, SCHEDULE, **{known: other}, backend=be)
    assert_same_bits(mean, posterior(x_t, 4, SCHEDULE, **{known: other})[0])


def test_an_array_on_a_gpu_chooses_the_backend(named):
    x0, net = named.asarray(X0), fd.MLP(7, hidden=(5,), T=12)
    results = [
        *fd.forward_noise(x0, T5, SCHEDULE), fd.forward_chain(x0, SCHEDULE), *posterior(x0, 3, SCHEDULE, x0=x0),
        net.predict(x0, T5), fd.sample(net, fd.samplers.ddpm(SCHEDULE), initial=x0),
    ]  # fmt: skip
    assert all(isinstance(array, DeviceArray) for array in results)
    for argument, call in {
        "x0": lambda: fd.forward_noise(x0, T5, SCHEDULE, backend="cpu"),
        "t": lambda: fd.forward_noise(X0, named.asarray(T5, np.int64), SCHEDULE, backend="numpy"),
        "x_t": lambda: posterior(x0, 3, SCHEDULE, x0=X0, backend="cpu"),
        "noise": lambda: posterior(X0, 3, SCHEDULE, noise=x0, backend="cpu"),
        "initial": lambda: fd.sample(net, fd.samplers.ddpm(SCHEDULE), initial=x0, backend="cpu"),
        "x": lambda: net.predict(x0, 3, backend="cpu"),
        "X": lambda: fd.Diffusion(backend="cpu").fit(x0, steps=1),
    }.items():
        with pytest.raises(ArgumentError, match=f"^{argument}: got an array on a GPU, wants backend='cuda'"):
            call()


def test_networks_and_their_samples(be):
    net, host = fd.MLP(7, hidden=(16, 9), T=12), fd.MLP(7, hidden=(16, 9), T=12)
    x, at = be.asarray(X0), {"n": 5, "seed": 3, "first_sample": 4}
    assert_same_bits(read(net.predict(x, be.asarray(T5, np.int64), backend=be)), host.predict(X0, T5, backend=HOST))
    assert isinstance(net.predict(X0, 3, backend=be), np.ndarray)
    be.runtime.reads.clear()
    seen = []
    for table in (fd.samplers.ddpm(SCHEDULE, clip=1.0), fd.samplers.dpmpp_2m(SCHEDULE, 5)):
        want = fd.sample(host, table, backend=HOST, **at)
        fused = fd.sample(net, table, backend=be, batch=3, **at)
        stepwise, path = fd.sample(net, table, backend=be, batch=3, trajectory=True, **at)
        watched = fd.sample(net, table, backend=be, callback=lambda i, t, x: seen.append(x.copy()), **at)
        for got in (fused, stepwise, watched, path[-1], seen[-1]):
            assert_same_bits(read(got), want)
        started = fd.sample(net, table, backend=be, initial=path[0], seed=3, first_sample=4)
        assert_same_bits(read(started), want)

    def function(x, t):  # a denoiser that somebody else has written for arrays on the device
        return 0.5 * x + float(t) / 10

    table = fd.samplers.dpmpp_2m(SCHEDULE, 5)
    got = fd.sample(function, table, shape=7, backend=be, **at)
    assert_same_bits(read(got), fd.sample(function, table, shape=7, backend=HOST, **at))
    assert not be.runtime.reads


def test_outputs_and_places_that_do_not_fit(be):
    x0, elsewhere = be.asarray(X0), DeviceArray(X0.copy(), where=1)
    table = fd.samplers.ddpm(SCHEDULE)
    wants = r"wants a CuPy array on the backend's GPU of float32 \(5, 7\)"
    for out, got in ((elsewhere, "DeviceArray on GPU 1"), (np.empty_like(X0), "ndarray"), (X0.tolist(), "list")):
        with pytest.raises(ArgumentError, match=f"^out: got {got}, {wants}"):
            fd.forward_noise(x0, 3, SCHEDULE, out=out, backend=be)
    with pytest.raises(ArgumentError, match=r"^out: got a read-only or strided view"):
        fd.forward_noise(x0, 3, SCHEDULE, out=be.empty((5, 14))[:, ::2], backend=be)
    with pytest.raises(ArgumentError, match=r"^out: got float64 \(5, 7\)"):
        fd.forward_noise(x0, 3, SCHEDULE, out=be.empty((5, 7), np.float64), backend=be)
    with pytest.raises(ArgumentError, match=r"^out: got DeviceArray on GPU 0, wants a NumPy array"):
        fd.forward_noise(X0, 3, SCHEDULE, out=be.empty((5, 7)), backend=be)
    # Arrays of another device, of another dtype, and views are taken in.
    want = fd.forward_noise(X0, 3, SCHEDULE, backend="numpy")[0]
    wide = DeviceArray(np.repeat(X0, 2, axis=1).astype(np.float64))[:, ::2]
    for given in (elsewhere, wide, be.asarray(X0, np.float64)):
        assert_same_bits(read(fd.forward_noise(given, 3, SCHEDULE, backend=be)[0]), want)
    for bad in (np.complex64, bool):
        with pytest.raises(ArgumentError, match=r"^x0: got dtype"):
            fd.forward_noise(be.asarray(X0, bad), 3, SCHEDULE, backend=be)
    with pytest.raises(ArgumentError, match=r"^denoiser output: got shape \(5, 6\)"):
        fd.sample(lambda x, t: x[:, 1:], table, n=5, shape=7, backend=be)


# ------------------------------------------------------------------------------------------- models


def model(be, **options):
    return fd.Diffusion(fd.MLP(10, hidden=(16, 16), T=12), backend=be, seed=3, **options)


CURVES = fd.data.harmonic_curves(60, points=10, seed=0)


def test_train_save_load_and_sample(be, tmp_path):
    options = {"steps": 4, "batch": 40, "progress": False, "validation": 0.2}
    ours, host = model(be).fit(CURVES, **options), model(HOST).fit(CURVES, **options)
    assert ours.history == host.history
    ours.save(tmp_path / "m.safetensors", training=True)
    loaded = fd.load(tmp_path / "m.safetensors", backend=be)
    for name in ("ddpm", "ddim", "dpmpp_2m"):
        want, path = host.sample(5, sampler=name, trajectory=True)
        got, got_path = ours.sample(5, sampler=name, trajectory=True)
        assert_same_bits(read(got), want)
        assert_same_bits(read(got_path), path)
        assert_same_bits(read(loaded.sample(5, sampler=name)), want)
    for each in (ours, loaded, host):
        each.fit(CURVES, steps=2, progress=False)
    assert_same_bits(loaded.net.flat, host.net.flat)
    assert_same_bits(ours.net.flat, host.net.flat)
    assert_same_bits(read(ours.denoiser().predict(be.asarray(CURVES), 3)), host.denoiser().predict(CURVES, 3))


def test_training_data_on_the_device(be):
    ours = model(be).fit(be.asarray(CURVES), steps=2, progress=False)
    assert_same_bits(ours.net.flat, model(be).fit(CURVES, steps=2, progress=False).net.flat)


def test_training_steps_are_read_together(be, monkeypatch):
    """The losses and norms of four; at the end, and for a callback, the whole state, once."""
    monkeypatch.setattr(be, "steps_ahead", 4)
    monkeypatch.setattr("fastdiff.training.READ_SECONDS", math.inf)
    ours, state = model(be), 4
    ours.fit(CURVES, steps=7, progress=False)
    size = ours.net.flat.shape
    assert be.runtime.reads == [(4, 2)] * 2 + [size] * state
    be.runtime.reads.clear()
    ours.fit(CURVES, steps=2, progress=False, callback=lambda step, loss: False)
    assert be.runtime.reads == [(4, 2), *[size] * state] * 2
    be.runtime.reads.clear()
    ours.sample(5)
    ours.sample(5, trajectory=True)
    assert not be.runtime.reads


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_leaves_the_model_as_it_was(be, what):
    """The step is issued before the host looks, so the device itself must leave everything alone."""
    ours = model(be).fit(CURVES, steps=3, progress=False)
    before = [array.copy() for array in (ours.net.flat, ours._optimizer.m, ours._optimizer.v, ours._average)]
    be.graphs = False
    issue = be._train_gradient

    def broken(net, params, step, grads):
        loss = issue(net, params, step, grads)
        (loss if what == "loss" else grads)[0] = math.inf
        return loss

    be._train_gradient = broken
    with pytest.raises(TrainingError, match="loss inf in step 3" if what == "loss" else "gradient norm inf at loss"):
        ours.fit(CURVES, steps=2, progress=False)
    after = ours.net.flat, ours._optimizer.m, ours._optimizer.v, ours._average
    for got, want in zip(after, before, strict=True):
        assert_same_bits(got, want)
    assert (ours.step, len(ours.history["loss"])) == (3, 3)
    del be._train_gradient
    again = model(be).fit(CURVES, steps=5, progress=False)
    assert_same_bits(ours.fit(CURVES, steps=2, progress=False).net.flat, again.net.flat)


def test_a_gradient_of_no_samples(be):
    net = fd.MLP(3, hidden=(4,), T=5)
    none, t = np.zeros((0, 3), np.float32), np.zeros(0, np.int64)
    for each in (be, fd.get_backend("numpy")):
        grads = each.asarray(np.ones_like(net.flat))
        inputs = Inputs(each.asarray(none), each.asarray(t, np.int64))
        loss, dx = each.mlp_gradient(net.plan, each.asarray(net.flat), inputs, each.asarray(none), grads)
        assert math.isnan(loss)
        assert dx.shape == (0, 3)
        assert_same_bits(each.to_numpy(grads), np.zeros_like(net.flat))


def test_the_command_line(named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fd.data.save_curves("curves.csv", CURVES)
    monkeypatch.setattr(cli.sample, "SAMPLES_AT_ONCE", 3)

    def run(command):
        assert cli.main([*command.split(), "--backend", "cuda"]) == 0
        return capsys.readouterr().out

    run("train curves.csv -o m.safetensors --steps 3 --quiet")
    run("sample m.safetensors -n 5 -o new.npy --quiet")
    want = fd.load("m.safetensors", backend=HOST).sample(5)
    assert_same_bits(fd.data.load_curves("new.npy").astype(np.float32), want)
    out = run("info m.safetensors")
    assert re.search(r"^ +device +host$", out, re.M)
    assert re.search(r"^ +here +one launch: 64 samples", out, re.M)
    assert out.count("one launch") == 4 * len(PRECISIONS)
    sizes = {"CURVE_STEPS": 2, "FAMILY_STEPS": 2, "FAMILY_CURVES": 20, "GENERATED": 3, "BATCH": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(demo, name, value)
    assert "energy distance" in run("demo -o demo --quiet")


# ------------------------------------------------------------------------------------------- DLPack


class Capsule:
    """Offers DLPack and nothing else."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device


class Refuses(Capsule):
    def __dlpack__(self, **options):
        raise BufferError("it requires grad")


@pytest.mark.parametrize("backend", ["numpy", "cpu", "host run"])
def test_dlpack_of_the_host(backend):
    """Every function that takes arrays; the results are NumPy arrays."""
    be = HOST if backend == "host run" else fd.get_backend(backend)
    t, net = Capsule(T5), fd.MLP(7, hidden=(5,), T=12)
    table, x = fd.samplers.ddim(SCHEDULE, 4), Capsule(X0)
    pairs = [
        (fd.forward_noise(x, t, SCHEDULE, backend=be), fd.forward_noise(X0, T5, SCHEDULE, backend=be)),
        ((fd.forward_chain(x, SCHEDULE, backend=be),), (fd.forward_chain(X0, SCHEDULE, backend=be),)),
        (posterior(x, t, SCHEDULE, noise=x), posterior(X0, T5, SCHEDULE, noise=X0)),
        ((net.predict(x, t, backend=be),), (net.predict(X0, T5, backend=be),)),
        ((fd.sample(net, table, initial=x, backend=be),), (fd.sample(net, table, initial=X0, backend=be),)),
        (
            (fd.sample(lambda x, t: Capsule(x / 2), table, n=3, shape=7, backend=be),),
            (fd.sample(lambda x, t: x / 2, table, n=3, shape=7, backend=be),),
        ),
    ]
    for got, want in pairs:
        for a, b in zip(got, want, strict=True):
            assert isinstance(a, np.ndarray)
            assert_same_bits(a, b)
    trained = [fd.Diffusion(net, SCHEDULE, backend=be).reset().fit(X, steps=2, progress=False) for X in (x, X0)]
    assert trained[0].history == trained[1].history
    assert_same_bits(fd.forward_noise(x, Capsule(np.array(3)), SCHEDULE)[0], fd.forward_noise(X0, 3, SCHEDULE)[0])


def test_dlpack_that_is_refused():
    for argument, call in {
        "x0": lambda bad: fd.forward_noise(bad, 3, SCHEDULE),
        "t": lambda bad: fd.forward_noise(X0, bad, SCHEDULE),
        "X": lambda bad: fd.Diffusion().fit(bad),
    }.items():
        with pytest.raises(ArgumentError, match=rf"^{argument}: got Refuses \(it requires grad\), wants"):
            call(Refuses(X0))
    with pytest.raises(ArgumentError, match=r"^x0: got dtype complex64"):
        fd.forward_noise(Capsule(X0.astype(np.complex64)), 3, SCHEDULE)


def test_dlpack_of_a_gpu(named, monkeypatch):
    """Another library's array on a GPU becomes a CuPy array, without a way through the host."""
    cupy = SimpleNamespace(from_dlpack=lambda value: value.array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x, t = Capsule(DeviceArray(X0.astype(np.float64)), (2, 0)), Capsule(DeviceArray(T5), (13, 0))
    noisy, _ = fd.forward_noise(x, t, SCHEDULE)
    assert_same_bits(read(noisy), fd.forward_noise(X0, T5, SCHEDULE)[0])
    mean, _ = posterior(x, t, SCHEDULE, x0=x)
    assert mean.dtype == np.float64
    assert isinstance(fd.MLP(7, hidden=(5,), T=12).predict(x, t), DeviceArray)
    assert not named.runtime.reads
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ArgumentError, match=r"^x0: got an array on a GPU, wants CuPy for it"):
        fd.forward_noise(x, 3, SCHEDULE)
