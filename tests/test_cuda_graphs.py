"""CUDA graphs of the CUDA backend: what they repeat, when they are made anew, and what has no place in one.

Here a graph is a list of launches with the addresses and numbers of the time when it was captured. Whatever else
happens while it is captured is an error of the host run.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext

import numpy as np
import pytest
from device_array import DeviceArray, DeviceRuntime
from host_cuda import HostError, HostRuntime, has_compiler
from test_image_models import net
from tolerances import assert_same_bits

import fastdiff as fd
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda.device import TABLES
from fastdiff.backends.layers import Batch
from fastdiff.errors import ArgumentError, TrainingError
from fastdiff.kernels.cuda.runtime import CaptureError
from fastdiff.nn import runner

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(0, 256, (12, 8, 4, 1), np.uint8)
LABELS = np.arange(12) % 3
EVERYTHING = {"classes": 3, "dropout": 0.2, "attention": (False, True)}
QUIET = {"progress": False, "batch": 3}
KINDS = {"plain": {}, "everything": EVERYTHING, "modulated": {"scale_shift": True, "dropout": 0.1}}


@pytest.fixture
def be():
    return CudaBackend(DeviceRuntime("shuffled"))


@pytest.fixture
def eager():
    return CudaBackend(HostRuntime(), graphs=False)


def model(backend, **options):
    return fd.Diffusion(net((8, 4, 1), **options), backend=backend, seed=4)


def labels_of(options):
    return LABELS if "classes" in options else None


def trained(backend, options, steps=4, **more):
    return model(backend, **options).fit(PICTURES, labels_of(options), steps=steps, **QUIET, **more)


def assert_same_models(ours, theirs):
    assert ours.history == theirs.history
    for name in ("m", "v"):
        assert_same_bits(getattr(ours._optimizer, name), getattr(theirs._optimizer, name))
    assert_same_bits(ours.net.flat, theirs.net.flat)
    assert_same_bits(ours._average, theirs._average)


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("options", "precision"),
    [*((options, "float32") for options in KINDS.values()), (EVERYTHING, "bf16")],
    ids=[*KINDS, "on tensor cores"],
)
def test_training_has_the_same_bits(options, precision):
    """Draws, forward, loss, backward, optimiser: one graph, with the launches of a step by itself."""
    be, eager = (
        CudaBackend(here, precision=precision, graphs=graphs)
        for here, graphs in ((DeviceRuntime(), True), (HostRuntime(), False))
    )
    ours, theirs = (trained(each, options, flip=True, warmup=3, decay_steps=9) for each in (be, eager))
    assert_same_models(ours, theirs)
    assert not eager.runtime.graphs
    (size,) = be.runtime.graphs
    step = len(eager.runtime.launches) // 4
    assert size == step
    assert be.runtime.launches[-step - 1 :] == [("optim", "set_step"), *eager.runtime.launches[-step:]]
    for each in (ours, theirs):  # another call draws from other arrays
        each.fit(PICTURES, labels_of(options), steps=2, **QUIET)
    assert_same_models(ours, theirs)
    assert be.runtime.graphs == [step] * 2


def test_a_training_step_allocates_nothing_and_reads_come_late(be, monkeypatch):
    """From the second step on the host sets the step and launches the graph, and sometimes reads results."""
    made, here = [], be.runtime
    monkeypatch.setattr(be, "steps_ahead", 4)
    monkeypatch.setattr("fastdiff.training.READ_SECONDS", np.inf)
    empty = here.empty
    monkeypatch.setattr(here, "empty", lambda *args: made.append(args) or empty(*args))
    read, counts = here.to_numpy, []
    monkeypatch.setattr(here, "to_numpy", lambda array: counts.append(len(made)) or read(array))
    monkeypatch.setattr(DeviceArray, "__setitem__", None)
    ours = trained(be, EVERYTHING, steps=6)
    assert here.reads == [(4, 2)] * 2 + [ours.net.flat.shape] * 4
    assert counts[0] > 0
    assert counts[1:] == [counts[0]] * 5


@pytest.mark.parametrize("ahead", [1, 3, 64])
def test_when_losses_are_read_changes_nothing(be, eager, monkeypatch, ahead):
    monkeypatch.setattr(be, "steps_ahead", ahead)
    monkeypatch.setattr("fastdiff.training.READ_SECONDS", np.inf)
    monkeypatch.setattr("fastdiff.training.LOOK_EVERY", 5)
    assert_same_models(*(trained(each, EVERYTHING, steps=8, validation=0.5) for each in (be, eager)))


def test_steps_after_one_that_went_wrong_do_nothing(be, monkeypatch):
    """They have been issued before anybody has seen it."""
    monkeypatch.setattr("fastdiff.training.READ_SECONDS", np.inf)
    ours, good = (trained(be, {}, steps=2) for _ in range(2))
    draw = be.draw_batch

    def broken(draws, batch, step, first):
        draw(draws, batch, step, first)
        if step == 4:
            batch.x[...] = np.float32(np.nan)

    monkeypatch.setattr(be, "graphs", False)
    monkeypatch.setattr(be, "draw_batch", broken)
    with pytest.raises(TrainingError, match=r"^loss nan in step 4"):
        ours.fit(PICTURES, steps=7, **QUIET)
    monkeypatch.setattr(be, "draw_batch", draw)
    assert ours.step == 4
    assert_same_models(ours, good.fit(PICTURES, steps=2, **QUIET))
    assert_same_models(*(each.fit(PICTURES, steps=2, **QUIET) for each in (ours, good)))


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_a_batch_in_parts(be, eager, options):
    """Parts of two sizes: a network without dropout has a graph of each, one with dropout none."""
    ours, theirs = (trained(each, options, steps=4, accumulate=2) for each in (be, eager))
    assert_same_models(ours, theirs)
    assert len(be.runtime.graphs) == (0 if options else 2)


def test_images_that_are_padded(be, eager):
    pictures, results, samples = PICTURES[:, :7, :3], [], []
    for each in (be, eager):
        ours = fd.Diffusion(net((7, 3, 1)), backend=each, seed=4)
        results.append(ours.fit(pictures, steps=3, **QUIET))
        samples.append(each.to_numpy(ours.sample(2, steps=3)))
    assert_same_models(*results)
    assert_same_bits(*samples)
    assert len(be.runtime.graphs) == 2


def test_what_happens_between_two_steps(be, eager):
    """Predictions of more images move the arena and scratch, other tables push those of the training out."""
    results = []
    for each in (be, eager):
        ours, other, graphs = model(each), net((8, 4, 1), channels=(8, 16)), []

        def between(step, loss, each=each, ours=ours, other=other, graphs=graphs):
            graphs.append(len(each.runtime.graphs))
            x = np.zeros((24, 8, 4, 1), np.float32)
            if step == 3:
                ours.net.predict(x, 3, backend=each)
            elif step == 6:
                other_grads = each.asarray(other.layout.zeros(np.float32))
                x = each.asarray(x)
                t = each.asarray(np.zeros(24), np.int64)
                other.runner(each).gradient(Batch(x, t, each.asarray(x)), other_grads)
            elif step == 9:
                for k in range(2 * TABLES):
                    each._table(np.array([float(k)]))

        results.append(ours.fit(PICTURES, steps=13, callback=between, **QUIET))
        if each is be:
            assert graphs == [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert_same_models(*results)


def test_validation_between_the_steps(be, eager, monkeypatch):
    monkeypatch.setattr("fastdiff.training.LOOK_EVERY", 2)
    ours, theirs = (trained(each, EVERYTHING, steps=6, validation=0.5) for each in (be, eager))
    assert_same_models(ours, theirs)
    assert 0 < len(be.runtime.graphs) < 6


def test_an_interrupt_counts_the_steps_that_have_been_issued(be, eager, monkeypatch):
    answers = iter([False] * 3 + [True] * 2)
    monkeypatch.setattr("fastdiff.training.held_back", lambda: nullcontext(lambda: next(answers)))
    monkeypatch.setattr("fastdiff.training.READ_SECONDS", np.inf)
    ours = model(be)
    with pytest.raises(KeyboardInterrupt):
        ours.fit(PICTURES, steps=20, **QUIET)
    monkeypatch.undo()
    assert ours.step == 4
    assert_same_models(ours, trained(eager, {}, steps=4))


CURVES = RANDOM.normal(size=(50, 7)).astype(np.float32)


@pytest.mark.parametrize("make", [lambda: fd.MLP(7, hidden=(9, 5), T=12), lambda: fd.MLP.tutorial(7, T=12)])
def test_a_perceptron(be, eager, make):
    """Its training step is one graph as well, made anew for another batch and for other data."""
    models = [fd.Diffusion(make(), fd.Schedule.cosine(12), backend=each, seed=4) for each in (be, eager)]
    for number, (rows, batch) in enumerate([(50, 6), (50, 6), (50, 7), (40, 7)], start=1):
        for each in models:
            each.fit(CURVES[:rows], steps=3, batch=batch, progress=False)
        assert_same_models(*models)
        assert len(be.runtime.graphs) == number
    step = len(eager.runtime.launches) // 12
    assert set(be.runtime.graphs) == {step}
    assert be.runtime.launches[-step - 1 :] == [("optim", "set_step"), *eager.runtime.launches[-step:]]


# ------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_samples_have_the_same_bits(be, eager, options):
    ours, theirs = (trained(each, options, steps=1) for each in (be, eager))
    how = {"labels": 1 if "classes" in options else None, "steps": 4}
    for number, sampler in enumerate(("ddim", "ddpm", "dpmpp_2m", "unipc"), start=1):
        got, want = (each.sample(3, sampler=sampler, batch=2, **how) for each in (ours, theirs))
        assert_same_bits(got._memory, want)
        # Of two images and of one; the weights of the next call may lie where the last one's lay.
        assert 2 <= len(be.runtime.graphs) <= 2 * number
    assert not eager.runtime.graphs
    assert len(ours._sampled(True).on(be)._steps) == 2


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_sampling_step_is_one_graph(precision):
    """The network and the sampler's step; between two calls of a model as it is nothing is made anew."""
    be, eager = (
        CudaBackend(here, precision=precision, graphs=graphs)
        for here, graphs in ((DeviceRuntime(), True), (HostRuntime(), False))
    )
    ours, theirs = (trained(each, EVERYTHING, steps=1) for each in (be, eager))
    for call in (1, 2):
        eager.runtime.launches.clear()
        got, want = (each.sample(2, labels=1, steps=5, seed=call) for each in (ours, theirs))
        assert_same_bits(got._memory, want)
        (size,) = be.runtime.graphs
        prepared = precision == "bf16" and call == 1  # all weights at once, and only then
        assert len(eager.runtime.launches) == 1 + 5 * size + prepared
        last = [("step", "step_recorded_wide"), *reversed(eager.runtime.launches[-size:-1])]
        assert be.runtime.launches[: -size - 2 : -1] == [*last, ("step", "set_row")]
        assert ("conv_mma", "conv_mma_prepare") not in last
    ours.fit(PICTURES, LABELS, steps=1, **QUIET)
    theirs.fit(PICTURES, LABELS, steps=1, **QUIET)
    assert_same_bits(ours.sample(2, labels=1, steps=5)._memory, theirs.sample(2, labels=1, steps=5))


def test_samples_of_changed_weights(be):
    """Of the network itself, whose weights anybody may change, and of a copy."""
    ours = trained(be, {}, steps=1)
    first = ours.sample(2, steps=3, ema=False)._memory
    frozen = copy.deepcopy(ours)
    ours.net.flat *= np.float32(1.5)
    changed = ours.sample(2, steps=3, ema=False)._memory
    assert (first != changed).any()
    assert_same_bits(frozen.sample(2, steps=3, ema=False)._memory, first)
    eager = CudaBackend(HostRuntime(), graphs=False)
    ours.backend = eager
    assert_same_bits(ours.sample(2, steps=3, ema=False), changed)
    assert_same_bits(ours.sample(2, steps=3), frozen.sample(2, steps=3)._memory)


def test_few_graphs_are_kept(be):
    unet, x = net((8, 4, 1)), np.zeros((1, 8, 4, 1), np.float32)
    weights = [be.asarray(unet.flat) for _ in range(2 * runner.MAX_RECORDINGS)]
    for flat in weights:
        for _ in range(3):
            unet.predict(x, 3, backend=be, flat=flat)
    ((_, programs),) = unet._memories.on(be).spaces.values()
    assert [len(laid.passes) for laid in programs.values()] == [runner.MAX_RECORDINGS]
    assert len(be.runtime.graphs) == 2 * runner.MAX_RECORDINGS


# ------------------------------------------------------------------------------------------- what stands in the way


def test_a_device_that_refuses_is_told_once(be, eager, monkeypatch, caplog):
    def refuse(issue):
        raise CaptureError("CUDARuntimeError: cudaErrorStreamCaptureUnsupported")

    monkeypatch.setattr(be.runtime, "capture", refuse)
    with caplog.at_level(logging.WARNING):
        ours = trained(be, EVERYTHING)
        samples = ours.sample(2, labels=1, steps=4)
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graphs from here on, every kernel is launched by itself: "
        "CUDARuntimeError: cudaErrorStreamCaptureUnsupported"
    ]
    theirs = trained(eager, EVERYTHING)
    assert_same_models(ours, theirs)
    assert_same_bits(samples._memory, theirs.sample(2, labels=1, steps=4))


def test_an_error_of_the_work_itself_comes_out(be):
    times = []

    def body():
        if times:
            raise ZeroDivisionError
        times.append(1)

    recording = be.record(body)
    recording.run()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            recording.run()
    assert not be.runtime.capturing
    assert not DeviceArray.capturing


def test_what_has_no_place_in_a_graph(be):
    array = be.asarray(np.ones(3))

    def assign():
        array[...] = 2

    for wrong in (
        lambda: be.empty((3,)), lambda: be.runtime.zeros(3), lambda: be.asarray([1.0]), lambda: be.to_numpy(array),
        lambda: be.runtime.copy(array, array), lambda: be.runtime.matmul(array, array, array), assign,
        lambda: array * 2, lambda: array.fill(0), lambda: array.copy(), lambda: array.astype(np.float64),
        lambda: be._scratch("new", 10),
    ):  # fmt: skip
        works = iter([lambda: None, wrong])
        recording = be.record(lambda works=works: next(works)())
        recording.run()
        with pytest.raises(HostError, match="while a graph is captured"):
            recording.run()


def test_memory_that_a_graph_lost_is_noticed(be):
    arrays = [be.asarray(np.ones(3))]
    recording = be.record(lambda: be.silu(arrays[0], arrays[0]))
    for _ in range(3):
        recording.run()
    arrays[0] = None
    with pytest.raises(HostError, match="silu: memory of the graph has been given back"):
        recording.run()


def test_graphs_can_be_left_out(be):
    with pytest.raises(ArgumentError, match=r"^graphs: got 'no', wants True or False"):
        CudaBackend(HostRuntime(), graphs="no")
    with pytest.raises(ArgumentError, match=r"^graphs: got 1, wants True or False"):
        fd.get_backend("cuda", graphs=1)
    for name in ("numpy", "cpu", "auto"):
        with pytest.raises(ArgumentError, match=r"^graphs: got False, wants None: only the cuda backend has graphs"):
            fd.get_backend(name, graphs=False)
    with pytest.raises(ArgumentError, match=r"^graphs: got False, wants None: a backend object has its own"):
        fd.get_backend(be, graphs=False)
    eager, times = CudaBackend(HostRuntime(), graphs=False), []
    recording = eager.record(lambda: times.append(1))
    for _ in range(3):
        recording.run()
    assert len(times) == 3
    assert not eager.runtime.graphs
