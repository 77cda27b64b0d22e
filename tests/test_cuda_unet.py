"""Whole U-Nets on the CUDA backend, on arrays that lie on a pretended device: results, training, reads and memory."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from device_array import DeviceArray, DeviceRuntime
from host_cuda import HostRuntime, has_compiler
from test_image_models import BYTES, LABELS, model
from test_unet import NETS, batch_of, made
from tolerances import CUDA_STEPS, assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import bench
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.layers import Batch, LayerBackend
from fastdiff.bench.networks import IMAGE_T, UNET
from fastdiff.errors import ArgumentError, TrainingError
from fastdiff.kernels.cuda import runtime
from fastdiff.noise import Draw, Stream

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

TERMS = 200  # of a way through one of these networks, as in test_unet
PICTURES = {"shape": (8, 8, 1), "channels": (4, 8), "groups": 2, "classes": 3, "attention": (True, True)}
ALL = {**NETS, "pictures": PICTURES, "modulated pictures": {**PICTURES, "scale_shift": True, "dropout": 0.2}}
MOST_LAUNCHES = 270
QUIET = {"progress": False, "batch": 4}


@pytest.fixture
def be():
    return CudaBackend(DeviceRuntime("shuffled"))


HOST = CudaBackend(HostRuntime())


def read(array):
    assert isinstance(array, DeviceArray)
    return array._memory


def test_the_protocol_is_complete(be):
    assert isinstance(be, LayerBackend)


@pytest.mark.parametrize("precision", ["tf32", "", None, 32])
def test_precisions_are_named(precision):
    with pytest.raises(ArgumentError, match=r"^precision: .*wants one of 'float32', 'bf16x3', 'bf16'"):
        CudaBackend(HostRuntime(), precision=precision)
    with pytest.raises(ArgumentError, match=r"^precision: got 'bf16', wants None: the numpy backend has no choice"):
        fd.get_backend("numpy", precision="bf16")
    with pytest.raises(ArgumentError, match=r"^precision: got bf16, wants None: a backend object has its own"):
        fd.get_backend(HOST, precision="bf16")


# ------------------------------------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_outputs_and_gradients_agree_with_float64(be, options):
    net, wide = made(options, "float32"), made(options)
    wide.flat[...] = net.flat
    x, t, target, labels = batch_of(net, 3)
    there = {
        name: None if value is None else be.asarray(value, np.int64 if value.dtype == np.int64 else np.float32)
        for name, value in {"x": x, "t": t, "target": target, "labels": labels, "params": net.flat}.items()
    }
    y = net.predict(there["x"], there["t"], there["labels"], backend=be, flat=there["params"])
    assert_close(read(y), wide.predict(x.astype(np.float64), t, labels, backend="numpy"), terms=TERMS)
    assert isinstance(net.predict(x, t, labels, backend=be), np.ndarray)

    draw, grads, want = Draw(3, Stream.DROPOUT, 2, 5), be.asarray(net.layout.zeros(np.float32)), wide.flat * 0
    be.runtime.reads.clear()
    batch = Batch(there["x"], there["t"], there["target"], there["labels"])
    loss = net.runner(be, there["params"]).gradient(batch, grads, draw)
    assert not be.runtime.reads
    batch = Batch(x.astype(np.float64), t, target.astype(np.float64), labels)
    wanted = wide.runner(fd.get_backend("numpy")).gradient(batch, want, draw)
    assert_close(read(loss), wanted, dtype=np.float32, terms=TERMS)
    got = net.layout.views(read(grads))
    scale = np.abs(want).max()
    for name, view in wide.layout.views(want).items():
        assert_close(got[name], view, terms=TERMS, scale=scale)


def test_the_batch_changes_nothing(be):
    net = made(PICTURES, "float32")
    x, t, _, labels = batch_of(net, 5)
    want = net.predict(x, t, labels, backend=be)
    for part in (slice(0, 1), slice(1, 5)):
        assert_same_bits(net.predict(x[part], t[part], labels[part], backend=HOST), want[part])
    net.chunk = 2
    assert_same_bits(net.predict(x, t, labels, backend=be), want)


# ------------------------------------------------------------------------------------------- launches


class Counting(HostRuntime):
    """A device of many multiprocessors that runs nothing."""

    def __init__(self):
        super().__init__(block=256, multiprocessors=132)

    def empty(self, shape, dtype=runtime.REAL):
        return np.zeros(shape, dtype)

    def launch(self, source, entry, grid, block, args, shared_bytes=0):
        runtime.cast_arguments(source, entry, args)
        self.launches.append((source, entry))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"scale_shift": True}], ids=["shifted", "modulated"])
def test_launches_of_a_training_step(precision, options):
    """Of the network of the benchmarks, 3.94 M parameters, with a batch of 16."""
    be = CudaBackend(Counting(), precision=precision, graphs=False)
    work = bench.BY_NAME["unet-train-16"]
    net = fd.UNet(work.shape, T=IMAGE_T, channels=work.channels, **UNET, **options)
    assert options or net.flat.size == 3_940_560
    pictures = np.arange(2 * math.prod(work.shape)).reshape(2, *work.shape) % 256
    fd.Diffusion(net, backend=be, seed=0).fit(pictures.astype(np.uint8), steps=1, batch=16, progress=False)
    assert 0 < len(be.runtime.launches) <= MOST_LAUNCHES
    assert be.runtime.launches.count(("norm", "norm_parameters")) == 1
    counted = [be.runtime.launches.count(("pointwise", entry)) for entry in ("concatenate", "split")]
    assert counted == [1, 1]  # of an image too large for shared memory; norms do the others


# ------------------------------------------------------------------------------------------- models


def test_training_agrees_with_the_cpu(be):
    """Three steps with everything on.

    A bias of the keys adds the same to all scores of a row, so its gradient is zero but for rounding: of that, Adam
    makes a step in any direction.
    """
    everything = {"classes": 3, "dropout": 0.2, "prediction": "v"}
    ours, host = (model(backend, **everything) for backend in (be, "cpu"))
    start = host.net.flat.copy()
    for each in (ours, host):
        each.fit(BYTES, LABELS, steps=3, flip=True, validation=0.25, **QUIET)
    np.testing.assert_allclose(ours.history["loss"], host.history["loss"], rtol=CUDA_STEPS)
    np.testing.assert_allclose(ours.history["validation_loss"], host.history["validation_loss"], rtol=CUDA_STEPS)
    moved, off = host.net.flat - start, ours.net.flat - host.net.flat
    for name, view in ours.net.layout.views(off).items():
        if name.endswith("to_qkv.bias"):
            width = len(view) // 3
            assert np.abs(view[width : 2 * width]).max() <= 3 * 2e-3  # steps of 1e-3, each in either direction
            view[width : 2 * width] = 0
    assert 0 < np.linalg.norm(off) <= CUDA_STEPS * np.linalg.norm(moved)


def test_train_save_load_and_sample(be, tmp_path):
    options = {"steps": 2, "accumulate": 2, **QUIET}
    ours, host = (model(backend, classes=3, dropout=0.2).fit(BYTES, LABELS, **options) for backend in (be, HOST))
    assert ours.history == host.history
    assert_same_bits(ours.net.flat, host.net.flat)
    ours.save(tmp_path / "m.safetensors")
    loaded = fd.load(tmp_path / "m.safetensors", backend=be)
    for sampler, steps in (("ddim", 3), ("dpmpp_2m", 3), ("unipc", 4), ("heun", 3), ("ddpm", 2)):
        how = {"labels": 2, "sampler": sampler, "steps": steps}
        want = host.sample(3, **how)
        be.runtime.reads.clear()
        assert_same_bits(read(ours.sample(3, **how)), want)
        assert not be.runtime.reads
        assert_same_bits(read(loaded.sample(3, batch=2, **how)), want)
    for each in (ours, loaded, host):
        each.fit(BYTES, LABELS, **options)
    assert_same_bits(ours.net.flat, host.net.flat)
    assert_same_bits(loaded.net.flat, host.net.flat)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_reads_once_and_allocates_nothing(be, monkeypatch, accumulate):
    """Losses and norms of some steps together; at the end the whole state. Nothing goes to the device either."""
    ours, made_arrays, sent = model(be, classes=3, dropout=0.2), [], []
    here = be.runtime
    monkeypatch.setattr(be, "steps_ahead", 2)
    monkeypatch.setattr("fastdiff.training.READ_SECONDS", math.inf)
    empty, asarray = here.empty, here.asarray
    monkeypatch.setattr(here, "empty", lambda *args: made_arrays.append(args) or empty(*args))

    def watched(value, dtype=None):
        if not isinstance(value, DeviceArray):
            sent.append(np.shape(value))
        return asarray(value, dtype)

    monkeypatch.setattr(here, "asarray", watched)
    read, at_reads = here.to_numpy, []
    monkeypatch.setattr(here, "to_numpy", lambda array: at_reads.append((len(made_arrays), len(sent))) or read(array))
    ours.fit(BYTES, LABELS, steps=4, flip=True, accumulate=accumulate, **QUIET)
    size = ours.net.flat.shape
    assert here.reads == [(2, 2)] * 2 + [size] * 4
    assert at_reads[0][0] > 0
    assert at_reads == [at_reads[0]] * 6


def test_a_sampling_step_allocates_nothing(be, monkeypatch):
    ours, counts = model(be, classes=3).fit(BYTES, LABELS, steps=1, **QUIET), []
    here = be.runtime
    empty, copy_to, made_arrays = here.empty, here.copy, []
    monkeypatch.setattr(here, "empty", lambda *args: made_arrays.append(args) or empty(*args))
    monkeypatch.setattr(here, "copy", lambda *args: counts.append(len(made_arrays)) or copy_to(*args))
    here.reads.clear()
    ours.sample(2, labels=1, sampler="ddim", steps=4)
    assert counts[1:] == [counts[1]] * 3
    assert not here.reads


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_leaves_the_model_as_it_was(be, monkeypatch, what):
    ours = model(be).fit(BYTES, steps=2, **QUIET)
    before = [array.copy() for array in (ours.net.flat, ours._optimizer.m, ours._optimizer.v, ours._average)]
    issue = be._issue_adamw

    def broken(state, options, training):
        (training[0] if what == "loss" else state.grads)[0] = math.inf
        return issue(state, options, training)

    monkeypatch.setattr(be, "_issue_adamw", broken)
    with pytest.raises(TrainingError, match="loss inf in step 2" if what == "loss" else "gradient norm inf at loss"):
        ours.fit(BYTES, steps=2, **QUIET)
    after = ours.net.flat, ours._optimizer.m, ours._optimizer.v, ours._average
    for got, want in zip(after, before, strict=True):
        assert_same_bits(got, want)
    assert (ours.step, len(ours.history["loss"])) == (2, 2)


def test_work_of_two_queues_is_apart(be, monkeypatch):
    """What one queue runs in its arena, another one does not wait for."""
    net = made(PICTURES, "float32")
    x, t, _, labels = batch_of(net, 2)
    want = net.predict(x, t, labels, backend=be)
    monkeypatch.setattr(be.runtime, "queue", threading.get_ident)
    results, arenas = [], net._memories.on(be).spaces
    thread = threading.Thread(target=lambda: results.append(net.predict(x, t, labels, backend=be)))
    thread.start()
    thread.join()
    assert_same_bits(results[0], want)
    assert len(arenas) == 2
    (first, _), (second, _) = arenas.values()
    assert not np.shares_memory(first._memory, second._memory)
