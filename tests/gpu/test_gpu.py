"""The parity checks of the host run on a GPU, at full size, and what only a GPU can show."""

from __future__ import annotations

import cuda_parity_conv  # noqa: F401 - registers its checks
import cuda_parity_conv_mma  # noqa: F401 - registers its checks
import cuda_parity_covariance  # noqa: F401 - registers its checks
import cuda_parity_layers  # noqa: F401 - registers its checks
import cuda_parity_mlp  # noqa: F401 - registers its checks
import numpy as np
import pytest
import test_cuda_twins as twin_cases
from cuda_parity import CHECKS, all_entries
from cuda_parity_mlp import terms
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff.backends.cuda import CudaBackend

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
    assert be.runtime.kernel(*key).attributes["local_size_bytes"] == 0


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
    at = {"seed": 1, "stream": 0, "step": 2, "first_sample": 3}
    fd.get_backend("numpy").normal(want, **at)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        be.normal(out, **at)
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
