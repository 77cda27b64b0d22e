"""Weight gradients beside the backward pass, on a second stream of a CUDA graph: what puts launches in order.

The host run knows of every launch of a graph what it waits for, and its race checker which bytes it touches.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from device_array import DeviceRuntime
from host_cuda import HostError, HostRuntime, has_compiler
from stand_in_cupy import StandIn
from test_cuda_graphs import EVERYTHING, LABELS, PICTURES, QUIET, assert_same_models, model
from test_cuda_unet import Counting

import fastdiff as fd
from fastdiff import bench
from fastdiff.backends.cuda import CudaBackend, conv, conv_mma
from fastdiff.backends.layers import Later
from fastdiff.bench.networks import IMAGE_T, UNET

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

NET = {**EVERYTHING, "attention": (True, True), "dropout": 0.0}
MODULATED = {**NET, "scale_shift": True, "attention": (False, False)}


class Watched(DeviceRuntime):
    """It looks for races in graphs alone."""

    def begin_capture(self):
        self.races = True
        super().begin_capture()

    def end_capture(self):
        self.races = False
        return super().end_capture()


def trained(be, steps=2, options=NET):
    """A model after some steps, from the second one on as a graph."""
    return model(be, **options).fit(PICTURES, LABELS, steps=steps, **QUIET)


def meet(a, b):
    """Whether two launches touch the same bytes, one of them to write."""
    for first, second in ((a.touched, b.touched), (b.touched, a.touched)):
        written = first[first[:, 2] > 0]
        at = np.searchsorted(second[:, 1], written[:, 0], side="right")  # the first stretch that ends behind its begin
        there = at < len(second)
        if (second[at[there], 0] < written[there, 1]).any():
            return True
    return False


def unordered(played):
    """Pairs of launches that meet, and that nothing puts in order."""
    return [
        (a.entry, b.entry) for a, b in combinations(played, 2) if not a.precedes(b) and not b.precedes(a) and meet(a, b)
    ]


@pytest.fixture
def short(monkeypatch):
    """Few gradients wait, so that a small network has several rounds of them; most come in partial sums."""
    monkeypatch.setattr(conv, "WAIT", 4)
    monkeypatch.setattr(conv, "LEAST_CHUNK", 16)
    monkeypatch.setattr(conv_mma, "LEAST_TILES", 1)
    conv_mma.weight_plan.cache_clear()
    yield
    conv_mma.weight_plan.cache_clear()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_launches_beside_each_other_touch_different_bytes(short, precision):
    be = CudaBackend(Watched(), precision=precision)
    trained(be)
    played = be.runtime.played
    assert [len(played)] == be.runtime.graphs
    aside = [each for each in played if each.stream == 1]
    assert be.runtime.forked == [len(aside)]
    assert not unordered(played)
    beside = {a.entry for a, b in combinations(played, 2) if b.stream < a.stream and not a.precedes(b)}
    assert any(entry.startswith("conv") and "weight" in entry for entry in beside)
    assert all(len(each.touched) for each in played)


@pytest.mark.parametrize(("precision", "options"), [("float32", NET), ("bf16", NET), ("float32", MODULATED)])
def test_as_late_as_may_be_they_have_the_same_bits(short, precision, options):
    be, eager = (
        CudaBackend(here, precision=precision, graphs=graphs)
        for here, graphs in ((DeviceRuntime(late=True), True), (HostRuntime(), False))
    )
    assert_same_models(*(trained(each, 4, options) for each in (be, eager)))
    (size,) = be.runtime.graphs
    step = len(eager.runtime.launches) // 4
    ours, theirs = be.runtime.launches[-step:], eager.runtime.launches[-step:]
    assert size == step
    assert ours != theirs
    assert Counter(ours) == Counter(theirs)


def test_through_cupy(short, monkeypatch, tmp_path):
    """Its events and streams put the same launches in order."""
    cupy = StandIn()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path))
    be, plain = CudaBackend(), CudaBackend(DeviceRuntime())
    for each in (be, plain):
        trained(each)
    assert sum(each.stream for each in plain.runtime.played) > 0
    assert cupy.host.played == plain.runtime.played


# ------------------------------------------------------------------------------------------- planted faults


def no_wait_before_it_is_overwritten(monkeypatch):
    monkeypatch.setattr(conv, "Later", lambda begin, finish: Later(begin))


def no_wait_for_the_gradient(monkeypatch):
    follow = HostRuntime.follow
    monkeypatch.setattr(HostRuntime, "follow", lambda self, stream, event: stream or follow(self, stream, event))


def scratch_of_another(monkeypatch):
    scratch = CudaBackend._scratch

    def shared(self, name, *rest):
        return scratch(self, "partials of 0" if name == "deltas" else name, *rest)

    monkeypatch.setattr(CudaBackend, "_scratch", shared)


@pytest.mark.parametrize("plant", [no_wait_before_it_is_overwritten, no_wait_for_the_gradient, scratch_of_another])
def test_planted_faults_are_found(short, monkeypatch, plant):
    plant(monkeypatch)
    be = CudaBackend(Watched())
    trained(be)
    assert unordered(be.runtime.played)


def test_a_graph_ends_with_nothing_aside():
    here, x = DeviceRuntime(), CudaBackend(DeviceRuntime()).asarray(np.ones(3))

    def issue():
        with here.aside():
            here.launch("pointwise", "fill", 1, 61, (x, 3, 2.0))

    with pytest.raises(HostError, match="has not been waited for"):
        here.capture(issue)
    issue()
    assert not here.capturing


# ------------------------------------------------------------------------------------------- how many


class Streams(Counting):
    """It runs nothing, and knows the launches of a graph that are aside."""

    def __init__(self):
        super().__init__()
        self.aside_launches = []

    def launch(self, source, entry, *rest, **options):
        super().launch(source, entry, *rest, **options)
        self.aside_launches += [entry] * self._stream


FORKED = {
    "float32": {"conv_weights_128x64": 7, "conv_weights_64x32": 3, "conv_weights_finish": 3},
    "bf16": {"conv_mma_weight_64": 10, "conv_mma_weight_32": 3, "conv_mma_sum": 2},
}


@pytest.mark.parametrize("precision", FORKED)
def test_forked_launches_of_a_training_step(precision):
    """Of the network of the benchmarks with a batch of 16: all that makes gradients of weights, and nothing else."""
    be = CudaBackend(Streams(), precision=precision)
    work = bench.BY_NAME["unet-train-16"]
    net = fd.UNet(work.shape, T=IMAGE_T, channels=work.channels, **UNET)
    pictures = np.arange(2 * np.prod(work.shape)).reshape(2, *work.shape) % 256
    fd.Diffusion(net, backend=be, seed=0).fit(pictures.astype(np.uint8), steps=2, batch=16, progress=False)
    step = Counter(entry for _, entry in be.runtime.launches[len(be.runtime.launches) // 2 :])
    assert Counter(be.runtime.aside_launches) == FORKED[precision]
    assert {entry: step[entry] for entry in FORKED[precision]} == FORKED[precision]
