"""Convolutions by cuDNN: our side of it on the host run, with a stand-in for cuDNN that computes with NumPy."""

from __future__ import annotations

import importlib
import logging
import pickle
import sys
import threading
from importlib.util import find_spec

import numpy as np
import pytest
from cuda_parity_conv import CASES, ROWS, SAME, Arrays, Case
from cuda_parity_layers import unfilled
from device_array import DeviceRuntime
from fake_cudnn import DataType, Graph, Library
from host_cuda import HostRuntime, has_compiler
from test_cuda_conv import backward, forward
from test_image_models import BYTES, LABELS, model
from tolerances import CUDA_STEPS, assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda.cudnn import Cudnn, Work
from fastdiff.backends.layers import Conv
from fastdiff.errors import ArgumentError, BackendError

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

DOWN = Conv((3, 3), (2, 2), (0, 1, 0, 1))
# Channels that cuDNN takes in bf16 as well.
EIGHTS = [
    Case(SAME, 2, 5, 7, 8, 16),
    Case(Conv(), 3, 3, 8, 24, 8),
    Case(DOWN, 2, 6, 5, 8, 40),
    Case(Conv((1, 3), (1, 2), (0, 0, 1, 1)), 2, 1, 67, 16, 8),
]


@pytest.fixture
def made(monkeypatch):
    """Make a backend with cuDNN and its library."""

    def make(runtime=None, **options):
        runtime = runtime or HostRuntime("shuffled")
        library = Library(runtime)
        monkeypatch.setitem(sys.modules, "cudnn", library)
        return CudaBackend(runtime, convolutions="cudnn", **options), library

    return make


def ours(library):
    """Which of the three products cuDNN did since the last call."""
    done, library.executed[:] = [kind for kind, _ in library.executed], []
    return done


def bare_output(given):
    out = np.empty(given.out_shape)
    fd.get_backend("numpy").conv(given.geometry, *(a.astype(np.float64) for a in (given.x, given.w, given.b)), out)
    return out


# ------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("number", range(len(CASES["small"] + ROWS["small"])))
def test_float32_agrees_with_the_reference(made, number):
    """Whatever the geometry; cuDNN does what is neither upsampled nor of one pixel."""
    case = (CASES["small"] + ROWS["small"])[number]
    (be, library), given = made(), Arrays(case, number)
    got, want = [forward(be, given), *backward(be, given)], [given.outputs(), *given.gradients()]
    upsampled, rows = case.geometry.up != (1, 1), (case.height, case.width) == (1, 1)
    assert ours(library) == ([] if upsampled or rows else ["fprop", "dgrad", "wgrad"])
    pixels = given.dy.size // case.outputs
    terms = given.taps * case.channels + 3, given.taps * case.outputs + 1, pixels, pixels, pixels
    for array, wanted, count in zip(got, want, terms, strict=True):
        assert_close(array, wanted, terms=count, scale=max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("case", EIGHTS)
@pytest.mark.parametrize("number", range(4))
def test_bf16_agrees_with_our_own_kernels(made, case, number):
    """Both round the factors and add in float32; what is fused is added in the same order."""
    (be, library), own, given = (
        made(precision="bf16"),
        CudaBackend(HostRuntime(), precision="bf16"),
        Arrays(case, number),
    )
    got, want = ([forward(each, given), *backward(each, given)] for each in (be, own))
    assert ours(library) == ["fprop", "wgrad"] if case.geometry is DOWN else ["fprop", "dgrad", "wgrad"]
    pixels = given.dy.size // case.outputs
    terms = given.taps * case.channels + 3, given.taps * case.outputs + 1, pixels, pixels, pixels
    for array, wanted, count in zip(got, want, terms, strict=True):
        assert_close(array, wanted, terms=count, scale=max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_result_may_be_the_residual(made, precision):
    (be, _), given = made(precision=precision), Arrays(EIGHTS[0], 1)
    want, out, by_us = forward(be, given), given.residual.copy(), ("cudnn", "cudnn_finish")
    assert (by_us in be.runtime.launches) == (precision == "float32")
    be.conv(given.geometry, given.x, given.w, given.b, out, shift=given.shift, residual=out)
    assert by_us in be.runtime.launches
    assert_close(out, want, terms=4)


def test_what_is_not_aligned_is_ours(made):
    (be, library), given = made(), Arrays(EIGHTS[0], 1)
    room, out = be.empty((given.x.size + 1,)), be.empty(given.out_shape)
    x = room[1:].reshape(given.x.shape)
    x[...] = given.x
    be.conv(given.geometry, x, given.w, given.b, out)
    assert not ours(library)
    assert_close(out, bare_output(given), terms=100)


@pytest.mark.parametrize("geometry", [SAME, DOWN])
def test_no_images(made, geometry):
    (be, library), given = made(), Arrays(Case(geometry, 0, 4, 4, 8, 8), 1)
    assert forward(be, given).size == 0
    _, dw, db, _ = backward(be, given)
    assert not dw.any()
    assert not db.any()
    assert not ours(library)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_network_learns_the_same(made, precision):
    """Three steps with graphs, of which the third is replayed; an unfused, a fused and an upsampled convolution."""
    (be, library), own = (
        made(DeviceRuntime("shuffled"), precision=precision),
        CudaBackend(HostRuntime(), precision=precision),
    )
    sides = [model(each, classes=3) for each in (be, own)]
    for each in sides:
        each.fit(BYTES, LABELS, steps=3, batch=4, progress=False)
    assert library.planned > 3
    bound = CUDA_STEPS if precision == "float32" else 20 * CUDA_STEPS
    np.testing.assert_allclose(sides[0].history["loss"], sides[1].history["loss"], rtol=bound)


# ------------------------------------------------------------------------------------------- plans and streams


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_shape_is_planned_once_and_nothing_is_allocated_after(made, monkeypatch, precision):
    (be, library), allocated = made(DeviceRuntime(), precision=precision), []
    empty = be.runtime.empty
    monkeypatch.setattr(be.runtime, "empty", lambda shape, *args: allocated.append(shape) or empty(shape, *args))

    def work(case):
        given = Arrays(case, 2)
        x, w, b, dy = map(be.asarray, (given.x, given.w, given.b, given.dy))
        outputs = [be.asarray(unfilled(*a.shape)) for a in (given.dy, given.x, given.w, given.b)]
        allocated.clear()
        before = library.planned
        be.conv(given.geometry, x, w, b, outputs[0])
        be.conv_backward(given.geometry, dy, x, w, *outputs[1:])
        return library.planned - before, len(allocated)

    large, small = (EIGHTS[0]._replace(images=n) for n in (5, 2))
    planned, arrays = work(large)
    assert planned == 3
    assert arrays > 0
    assert work(large) == (0, 0)
    assert work(small) == (3, 0)
    assert work(large) == (0, 0)
    assert work(large._replace(geometry=SAME._replace(pad=(1, 0, 0, 1))))[0] == 3
    assert not be.runtime.reads


def test_what_cudnn_refuses_in_a_graph_is_done_without(made, monkeypatch, caplog):
    (be, library), own = made(DeviceRuntime()), CudaBackend(HostRuntime())
    execute = Graph.execute

    def refuse(graph, *args, **options):
        if library.runtime.capturing:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        execute(graph, *args, **options)

    monkeypatch.setattr(Graph, "execute", refuse)
    sides = [model(each, classes=3).fit(BYTES, LABELS, steps=3, batch=4, progress=False) for each in (be, own)]
    np.testing.assert_allclose(sides[0].history["loss"], sides[1].history["loss"], rtol=CUDA_STEPS)
    assert "cuDNN: CUDNN_STATUS_NOT_SUPPORTED" in caplog.text
    assert not be.graphs


def test_what_cudnn_refuses_is_asked_once_and_logged(made, caplog):
    (be, library), given = made(precision="bf16"), Arrays(CASES["small"][0], 1)
    with caplog.at_level(logging.INFO, "fastdiff"):
        first = forward(be, given)
        assert_same_bits(forward(be, given), first)
    assert_same_bits(first, forward(CudaBackend(HostRuntime(), precision="bf16"), given))
    (message,) = [r.getMessage() for r in caplog.records if "cuDNN" in r.getMessage()]
    assert message.startswith("cuDNN has no plan, so our own kernels take Work(kind='conv_fprop'")
    assert message.endswith("No execution plans support the graph.")
    assert library.planned == 0


def test_work_goes_to_the_current_stream(made, monkeypatch):
    """In a graph to the one that is captured, with the scratch and the handle of the caller's queue."""
    (be, library), given = made(), Arrays(EIGHTS[0], 0)
    x, w, b, out = given.x, given.w, given.b, be.empty(given.out_shape)
    recording = be.record(lambda: be.conv(given.geometry, x, w, b, out))
    for _ in range(3):
        out.fill(np.nan)
        recording.run()
        assert_close(out, bare_output(given), terms=100)
    assert be.runtime.graphs == [3]  # weights, cuDNN, what is added
    assert library.executed == [("fprop", 0), ("fprop", 1 << 20)]
    be.conv(given.geometry, x, w, b, out)
    monkeypatch.setattr(be.runtime, "queue", threading.get_ident)
    be.conv(given.geometry, x, w, b, out)
    assert library.executed[2:] == [("fprop", 0), ("fprop", threading.get_ident())]
    assert len(library.streams) == 2


# ------------------------------------------------------------------------------------------- names and errors


def test_names(made):
    for bad in ("cuDNN", "", None, 1):
        with pytest.raises(ArgumentError, match=r"^convolutions: .*wants one of 'own', 'cudnn'"):
            CudaBackend(HostRuntime(), convolutions=bad)
    with pytest.raises(ArgumentError, match=r"^convolutions: got 'cudnn', wants None: only the cuda backend"):
        fd.get_backend("cpu", convolutions="cudnn")
    with pytest.raises(ArgumentError, match=r"^convolutions: got own, wants None: a backend object has its own"):
        fd.get_backend(CudaBackend(HostRuntime()), convolutions="own")
    be, _ = made(precision="bf16")
    kind, options = be.__reduce__()
    assert kind is CudaBackend
    assert options[-1] == "cudnn"
    assert pickle.loads(pickle.dumps(options[1:])) == options[1:]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(BackendError, match=r"needs cuDNN: pip install 'fastdiff-engine\[cudnn\]'; 'own' needs nothing"):
        CudaBackend(HostRuntime(), convolutions="cudnn")
    library = Library(HostRuntime())

    def create_handle():
        raise RuntimeError("cudnnHandle Create failed")

    library.create_handle = create_handle
    monkeypatch.setitem(sys.modules, "cudnn", library)
    with pytest.raises(BackendError, match=r"cuDNN does not start: cudnnHandle Create failed; pip install"):
        CudaBackend(HostRuntime(), convolutions="cudnn")
    CudaBackend(HostRuntime())


# ------------------------------------------------------------------------------------------- the real module


@pytest.mark.skipif(find_spec("cudnn") is None, reason="the calls of cuDNN's module need nvidia-cudnn-frontend")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_real_module_takes_our_calls(monkeypatch, precision):
    """As far as it goes without libcudnn: graphs are described, and the methods that plan and execute are there."""
    real = importlib.import_module("cudnn")
    monkeypatch.setattr(real, "create_handle", lambda: 1)
    monkeypatch.setattr(real, "set_stream", lambda handle, stream: None)
    cudnn = Cudnn(HostRuntime(), precision, lambda name, size: None)
    x, y, w = (2, 5, 7, 8), (2, 5, 7, 16), (16, 3, 3, 8)
    for kind, operands, result in (("fprop", (x, w), y), ("dgrad", (y, w), x), ("wgrad", (x, y), w)):
        added = ((1, 1, 1, 16), y) if kind == "fprop" else ()
        graph = cudnn.graph(Work(f"conv_{kind}", SAME, operands, result, added), handle=1)
        for name in ("validate", "build_operation_graph", "create_execution_plans", "deselect_numeric_notes",
                     "deselect_workspace_greater_than", "check_support", "build_plans", "get_workspace_size",
                     "execute"):  # fmt: skip
            assert callable(getattr(graph, name))
    assert issubclass(real.cudnnGraphNotSupportedError, Exception)
    assert {kind.name for kind in DataType} <= set(dir(real.data_type))
