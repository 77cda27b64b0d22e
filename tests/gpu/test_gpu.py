"""The parity checks of the host run on a GPU, at full size, and what only a GPU can show."""

from __future__ import annotations

import cuda_parity_mlp  # noqa: F401 - registers its checks
import numpy as np
import pytest
import test_cuda_twins as twin_cases
from cuda_parity import CHECKS, all_entries
from tolerances import assert_same_bits

import fastdiff as fd
from fastdiff.backends.cuda import CudaBackend

pytestmark = pytest.mark.gpu

FULL_SHAPES = [(100_003, 50), (3, 1_000_001)]


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


def test_train_save_load_sample(be, tmp_path):
    X = fd.data.harmonic_curves(1000, points=50)
    model, on_cpu = (fd.Diffusion(backend=backend, seed=0) for backend in (be, "cpu"))
    for each in (model, on_cpu):
        each.fit(X, steps=30, batch=64, progress=False)
    np.testing.assert_allclose(model.history["loss"], on_cpu.history["loss"], rtol=1e-3)
    model.save(tmp_path / "m.safetensors")
    curves = be.to_numpy(be.asarray(model.sample(103)))
    loaded = fd.load(tmp_path / "m.safetensors", backend=be)
    assert_same_bits(be.to_numpy(be.asarray(loaded.sample(103))), curves)
    want = fd.load(tmp_path / "m.safetensors", backend="cpu").sample(103)
    np.testing.assert_allclose(curves, want, rtol=0, atol=1e-3 * np.abs(want).max())
