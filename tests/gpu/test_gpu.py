"""The parity checks of the host run on a GPU, at full size, and what only a GPU can show."""

from __future__ import annotations

from importlib.util import find_spec

import cuda_parity_conv
import cuda_parity_conv_mma  # noqa: F401 - registers its checks
import cuda_parity_covariance  # noqa: F401 - registers its checks
import cuda_parity_layers  # noqa: F401 - registers its checks
import cuda_parity_mlp  # noqa: F401 - registers its checks
import cuda_parity_tmpd  # noqa: F401 - registers its checks
import numpy as np
import pytest
import test_cuda_twins as twin_cases
from cuda_parity import CHECKS, all_entries
from cuda_parity_mlp import terms
from tolerances import CUDNN_ERROR, assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.backends import CONVOLUTIONS, PRECISIONS
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda.tuning import Tuning
from fastdiff.kernels.cuda import runtime
from fastdiff.noise import Draw

pytestmark = pytest.mark.gpu

FULL_SHAPES = [(100_003, 50), (3, 1_000_001)]
FULL_MAPS = [(100_003, 128, 128, 0), (10_007, 300, 300, 16), (3, 5003, 257, 0)]


@pytest.fixture(scope="module")
def be():
    return CudaBackend()


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("name", CHECKS)
def test_parity(be, name, size):
    CHECKS[name].run(be, size)


@pytest.mark.parametrize("key", sorted(all_entries()), ids="-".join)
def test_nothing_lies_in_local_memory(be, key):
    assert be.runtime.attribute(*key, "LOCAL_SIZE_BYTES") == 0


def convolved(be, given):
    """A convolution and its gradients, done for the third time, as a graph."""
    arrays = given.x, given.w, given.b, given.dy, given.shift, given.residual
    x, w, b, dy, shift, residual = (None if array is None else be.asarray(array) for array in arrays)
    made = [be.empty(array.shape) for array in (given.dy, given.x, given.w, given.b)]

    def work():
        be.conv(given.geometry, x, w, b, made[0], shift=shift, residual=residual)
        be.conv_backward(given.geometry, dy, x, w, *made[1:])

    recording = be.record(work)
    for _ in range(3):
        for array in made:
            array.fill(np.nan)
        recording.run()
    return [be.to_numpy(array) for array in made]


@pytest.mark.parametrize("stages", [2, 4])
def test_stages(be, stages):
    """Of weights in shared memory: other numbers of them than the default change no bits."""
    usual, other = (CudaBackend(be.runtime, precision="bf16") for _ in range(2))
    other._tuning = Tuning(stages=stages)
    for given in cuda_parity_conv.cases("small"):
        for got, want in zip(convolved(other, given), convolved(usual, given), strict=True):
            assert_same_bits(got, want)
    for entry in runtime.entries("conv_mma"):
        assert be.runtime.attribute(f"conv_mma.{stages}", entry, "LOCAL_SIZE_BYTES") == 0


@pytest.mark.skipif(find_spec("cudnn") is None, reason="cuDNN needs nvidia-cudnn-frontend")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cudnn(precision):
    """As our own convolutions; it takes some, and can be captured."""
    own, cudnn = (CudaBackend(precision=precision, convolutions=choice) for choice in CONVOLUTIONS)
    for given in cuda_parity_conv.cases("full"):
        for got, want in zip(convolved(cudnn, given), convolved(own, given), strict=True):
            assert np.linalg.norm(got - want) <= CUDNN_ERROR * np.linalg.norm(want)
    assert any(cudnn._cudnn._plans.values())
    assert cudnn.graphs


@pytest.mark.parametrize("size", ["small", "full"])
def test_twins(be, size):
    from fastdiff.kernels.cuda import numba_twins

    shapes = FULL_SHAPES if size == "full" else twin_cases.SHAPES
    assert twin_cases.forward_cases(numba_twins, be.runtime.asarray, shapes) == len(shapes) * len(twin_cases.WHERE)
    assert twin_cases.step_cases(numba_twins, be.runtime.asarray, shapes)
    maps = FULL_MAPS if size == "full" else twin_cases.MAPS
    assert twin_cases.map_cases(numba_twins, be.runtime.asarray, maps) == 2 * len(maps)


def test_work_goes_to_the_current_stream(be):
    """On a stream that waits for nothing else, an operation comes before what is issued after it there."""
    import cupy

    want, out = np.empty((1000, 64), np.float32), be.empty((1000, 64))
    draw = Draw(1, 0, 2, 3)
    fd.get_backend("numpy").normal(want, draw)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        be.normal(out, draw)
        copy = out.copy()
    stream.synchronize()
    assert_same_bits(cupy.asnumpy(copy), want)


def test_arrays_of_other_libraries(be):
    """CuPy arrays choose the backend, and stay on the GPU; what goes through DLPack is not copied."""
    import cupy

    host, schedule = np.ones((5, 7), np.float32), fd.Schedule.cosine(12)
    x0, t = cupy.asarray(host), cupy.arange(5)
    want = fd.forward_noise(host, np.arange(5), schedule, backend="numpy")

    class Capsule:
        __dlpack__, __dlpack_device__ = x0.__dlpack__, x0.__dlpack_device__

    for given in (x0, Capsule()):
        for got, wanted in zip(fd.forward_noise(given, t, schedule), want, strict=True):
            assert isinstance(got, cupy.ndarray)
            assert_same_bits(cupy.asnumpy(got), wanted)
        mean, var = fd.posterior(given, t, schedule, x0=given)
        wanted, wanted_var = fd.posterior(host, np.arange(5), schedule, x0=host)
        assert_close(cupy.asnumpy(mean), wanted, terms=2)
        assert_same_bits(cupy.asnumpy(var), wanted_var)
    assert cupy.from_dlpack(Capsule()).data.ptr == x0.data.ptr


def test_train_save_load_sample(be, tmp_path):
    """As on the CPU, up to the rounding of as many products as a way through all networks and steps adds up."""
    X, steps = fd.data.harmonic_curves(1000, points=50), 30
    model, on_cpu = (fd.Diffusion(backend=backend, seed=0) for backend in (be, "cpu"))
    for each in (model, on_cpu):
        each.fit(X, steps=steps, batch=64, progress=False)
    losses = (np.array(each.history["loss"], np.float32) for each in (model, on_cpu))
    assert_close(*losses, terms=steps * terms(model.net))
    model.save(tmp_path / "m.safetensors")
    curves = be.to_numpy(model.sample(103))
    loaded = fd.load(tmp_path / "m.safetensors", backend=be)
    assert_same_bits(be.to_numpy(loaded.sample(103)), curves)
    want = fd.load(tmp_path / "m.safetensors", backend="cpu").sample(103)
    assert_close(curves, want, terms=model.schedule.T * terms(model.net))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("own", [False, True])
def test_graphs(own, precision):
    """Of the same bits as kernel by kernel, on the legacy stream and on one of the caller's; none is refused."""
    import cupy

    pictures, labels = np.random.default_rng(0).integers(0, 256, (60, 18, 16, 3), np.uint8), np.arange(60) % 3
    results = []
    for graphs in (True, False):
        be = CudaBackend(precision=precision, graphs=graphs)
        net = fd.UNet((18, 16, 3), channels=(16, 32, 32), classes=3, dropout=0.1, T=50)
        with cupy.cuda.Stream(non_blocking=True) if own else cupy.cuda.Stream.null:
            model = fd.Diffusion(net, backend=be, seed=0)
            model.fit(pictures, labels, steps=6, batch=8, flip=True, progress=False)
            samples = be.to_numpy(model.sample(5, labels=1, batch=3, steps=6))
        assert be.graphs == graphs
        results.append((model.net.flat, np.array(model.history["loss"]), samples))
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)
