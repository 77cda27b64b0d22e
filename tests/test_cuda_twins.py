"""The Numba twins: the bits of NumPy in Numba's CUDA simulator, and compiled without fused operations.

Maps of rows are products, and agree up to rounding.

The simulator is chosen when Numba is imported, so the cases run in a process of their own: this file as a program.
It has a thread of Python for every CUDA thread: shapes are small, odd, and blocks have a prime size.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import numpy as np
import pytest
from tolerances import assert_close, assert_same_bits

from fastdiff.backends import Row, RowMap, get_backend
from fastdiff.backends.cuda.covariance import _TwinMap
from fastdiff.noise import Draw, Stream

SHAPES = [(1, 1), (3, 2), (2, 4), (5, 3), (3, 7), (2, 13), (1, 31)]
WHERE = [(0, 0), (2**64 - 1, 2**56 - 40), (0x299F31D0A4093822, 2**32 - 2)]  # (seed, first sample)
THREADS = 7
# Coefficients (p, q, a, b, c1, c2, c3, e, s, r): every one absent somewhere, and all of them together but for r, whose
# power has its own rounding.
ROWS = [
    Row(3, 1.25, -0.75, 0.5, 0.25, -0.5, 0.375, -0.625, 0.125, 0.75),
    Row(0, 1.25, -0.75, 0.5, 0.25),
    Row(99, 0, 0, 0.9, 0, e=-0.3, s=1.5),
    Row(2**32 - 1, 0, 1, 0, 1, 0.5, s=0.1),
    Row(7, 1, 0, 0, 1.5, -0.5),
    Row(7, 0, 1, 0.5, 0, 0, 0.5),
    Row(7, 0.5, 0, 0.5, 0.25, 0.5, 0, -0.5, s=0.25),
    Row(7, 0.5, 0.25, 0.5, 0.25, s=0.75, r=-0.5),
]
CLIPS = [None, (-0.5, 0.75)]
TINY = np.float32(1e-41)  # a denormal
# (rows, inputs, outputs, rank or 0): tiles of 8 rows and 32 inputs, blocks of 7 columns.
MAPS = [(1, 1, 1, 0), (9, 5, 3, 0), (8, 33, 15, 0), (3, 7, 7, 0), (3, 7, 7, 2), (10, 4, 11, 3)]


def data(seed, shape):
    """Normals with a denormal, and zeros of both signs, among them."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x.reshape(-1)[1::11] = -0.0
    x.reshape(-1)[2::11] = TINY
    return x


def forward_cases(twins, to_device=np.asarray, shapes=SHAPES, **options):
    """Run forward noising against NumPy; return the number of cases."""
    reference, count = get_backend("numpy"), 0
    for shape, (seed, first) in itertools.product(shapes, WHERE):
        rng, draw = np.random.default_rng(1), Draw(seed, Stream.FORWARD, first_row=first)
        x0, t = data(2, shape), rng.integers(0, 10, shape[0])
        signal, noise = rng.random(10), rng.random(10)
        signal[0], noise[1] = 1.0, 0.0
        want = np.empty_like(x0), np.empty_like(x0)
        reference.forward_noise(x0, t, signal, noise, *want, draw)
        tables = (to_device(table.astype(np.float32)) for table in (signal, noise))
        got = [to_device(np.full(shape, np.nan, np.float32)) for _ in range(2)]
        twins.forward_noise(to_device(x0), to_device(t), *tables, *got, draw, **options)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(to_host(a), b)
        count += 1
    return count


def step_cases(twins, to_device=np.asarray, shapes=SHAPES, **options):
    """Run rows of sampler tables against NumPy; return the number of cases."""
    reference, count = get_backend("numpy"), 0
    for shape, row, clip in itertools.product(shapes, ROWS, CLIPS):
        seed, first = WHERE[count % len(WHERE)]
        draw = Draw(seed, Stream.STEP if count % 2 else Stream.CHAIN, row.t, first)
        for depth in {row.depth, 1, 3} - set(range(row.depth)):
            x, outs = data(3, shape), data(4, (2, *shape) if row.r else shape) if row.evaluates else None
            memory = tuple(data(5 + k, shape) for k in range(depth))
            state, given = (None if a is None else to_device(a.copy()) for a in (x, outs))
            remembered = tuple(to_device(m.copy()) for m in memory)
            reference.sampler_step(x, outs, memory, row, clip, draw)
            twins.sampler_step(state, given, remembered, row, clip, draw, **options)
            for got, want in zip((state, *remembered), (x, *memory), strict=True):
                if row.r == 0:
                    assert_same_bits(to_host(got), want)
                else:
                    assert_close(to_host(got), want, terms=2)
            count += 1
    return count


def map_cases(twins, to_device=np.asarray, maps=MAPS, **options):
    """Run maps of rows against NumPy; return the number of cases."""
    reference, count = get_backend("numpy"), 0
    for (m, n, k, rank), offset in itertools.product(maps, (False, True)):
        rng = np.random.default_rng(m)
        x, left = rng.normal(size=(m, n)).astype(np.float32), rng.normal(size=(n, rank or k))
        plan = RowMap(
            scale=rng.normal(size=n) if n == k else None,
            left=left,
            right=rng.normal(size=(rank, k)) if rank else None,
            offset=rng.normal(size=k) if offset else None,
        )
        want = np.empty((m, k))
        reference.map_rows(x.astype(np.float64), want, plan)
        got, inner = (to_device(np.full((m, width), np.nan, np.float32)) for width in (k, rank))
        placed = _TwinMap(plan, SimpleNamespace(asarray=lambda array, dtype: to_device(array.astype(dtype))))
        twins.map_rows(to_device(x), got, *placed.arguments, inner if rank else None, **options)
        assert_close(to_host(got), want, terms=n + rank + 2)
        count += 1
    return count


def to_host(array):
    """A device array, of CuPy or of Numba, or a NumPy array as NumPy."""
    for method in ("get", "copy_to_host"):
        if hasattr(array, method):
            return getattr(array, method)()
    return array


# ------------------------------------------------------------------------------------------- in the simulator


def program(*arguments, simulator="1"):
    """Run this file."""
    command = [sys.executable, "-W", "error", __file__, *arguments]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": simulator}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_same_bits_in_the_simulator():
    done = program("simulate")
    assert done.returncode == 0, done.stderr
    forward, step, maps = map(int, done.stdout.split())
    assert forward == len(SHAPES) * len(WHERE)
    assert step > len(SHAPES) * len(ROWS) * len(CLIPS)
    assert maps == 2 * len(MAPS)


@pytest.mark.parametrize("broken", ["draw", "noised", "remembered", "advanced"])
def test_a_wrong_element_function_is_noticed(broken):
    done = program("simulate", broken)
    assert done.returncode == 1
    assert "differ; first at" in done.stderr


def simulate(broken=""):
    """Run all cases; `broken` names an element function to put a small error into."""
    from numba import cuda

    from fastdiff.kernels.cuda import numba_twins as twins

    def wrong(*values):
        result = right(*values)
        if isinstance(result, tuple):
            result = (np.nextafter(result[0], np.float32(9)), *result[1:])
        else:
            result = np.nextafter(result, np.float32(9))
        return result

    if broken:
        right = getattr(twins, broken)
        setattr(twins, broken, cuda.jit(device=True)(wrong))
    cases = (forward_cases, step_cases, map_cases)
    print(*(run(twins, threads=THREADS) for run in cases))  # noqa: T201


def test_a_launch_goes_to_the_device_of_its_arrays():
    done = program("devices")
    assert done.stdout.split() == ["enter", "1", "leave", "1"], done.stderr


def devices():
    """Run a step on an array that says it is on device 1; print which device was current then."""
    from numba import cuda

    from fastdiff.kernels.cuda import numba_twins as twins

    class Array(np.ndarray):
        device = SimpleNamespace(id=1)

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            print("enter", self.number)  # noqa: T201

        def __exit__(self, *error):
            print("leave", self.number, *filter(None, error))  # noqa: T201

    cuda.gpus = [Device(0), Device(1)]
    draw = Draw(0, 1, ROWS[2].t)
    twins.sampler_step(data(3, (3, 7)).view(Array), data(4, (3, 7)), (), ROWS[2], None, draw, threads=THREADS)
    twins.sampler_step(data(3, (3, 7)), data(4, (3, 7)), (), ROWS[2], None, draw, threads=THREADS)


# ------------------------------------------------------------------------------------------- compiled


def test_a_launch_waits_for_no_stream():
    """Numba waits for the stream that an array names unless it is told not to."""
    pytest.importorskip("numba_cuda")
    done = program("waits", simulator="0")
    assert done.stdout.split() == ["launched", "0"], done.stderr


def waits():
    """Launch a step on arrays that name a stream, with Numba's driver replaced; print how often one was waited for."""
    import inspect

    from numba import cuda

    from fastdiff.kernels.cuda import numba_twins as twins

    default, waited = inspect.signature(cuda.as_cuda_array).parameters["sync"].default, []

    class OnDevice(np.ndarray):
        def __array_finalize__(self, other):
            self.__cuda_array_interface__ = {"stream": 7}

    def as_cuda_array(array, sync=default):
        if sync:
            waited.append(array.__cuda_array_interface__["stream"])
        return array.view(np.ndarray)

    class Kernel:
        def __getitem__(self, geometry):
            return self.launch

        @staticmethod
        def launch(*arguments):
            for argument in arguments:
                if hasattr(argument, "__cuda_array_interface__"):  # as Numba itself does
                    as_cuda_array(argument)
            print("launched")  # noqa: T201

    cuda.as_cuda_array = as_cuda_array
    cuda.get_current_device = lambda: SimpleNamespace(MULTIPROCESSOR_COUNT=2)
    twins.step_kernel = Kernel()
    x, output = (data(seed, (3, 7)).view(OnDevice) for seed in (3, 4))
    twins.sampler_step(x, output, (), ROWS[2], None, Draw(0, 1, ROWS[2].t), threads=THREADS)
    print(len(waited))  # noqa: T201


def test_products_are_never_fused():
    """PTX needs no GPU. A product there says how it is rounded: only so nothing fuses it with an addition.

    And nothing lies in local memory. In a matrix product fusing is welcome.
    """
    for package in ("numba-cuda", "nvidia-nvvm"):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip("compiling the Numba twins needs NVVM: pip install numba-cuda nvidia-nvvm")
    done = program("ptx", simulator="0")
    assert done.returncode == 0, done.stderr
    *kernels, product = done.stdout.split(".entry")[1:]
    assert "fma" in product
    assert ".local" not in product
    assert len(kernels) == 2
    for ptx in kernels:
        operations = set(re.findall(r"\b(\w+)\.((?:\w+\.)*)f32\b", ptx))
        names = {name for name, _ in operations}
        assert {"add", "mul", "sqrt"} <= names
        assert "fma" not in names
        assert {how for name, how in operations if name in ("mul", "sqrt")} == {"rn."}
        assert not any("ftz" in how or "approx" in how for _, how in operations)
        assert ".f64" not in ptx
        assert ".local" not in ptx


def ptx():
    """Print the PTX of the kernels."""
    from numba import cuda, types
    from numba.cuda import dispatcher

    from fastdiff.kernels.cuda import numba_twins as twins

    # A device function is compiled for the device at hand, and there may be none.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))
    matrix, vector, number, word = types.float32[:, ::1], types.float32[::1], types.float32, types.uint64
    forward = (matrix, types.int64[::1], vector, vector, matrix, matrix, *[word] * 4)
    step = (*[matrix] * 6, types.UniTuple(number, 10), number, number, types.int64, *[word] * 5)
    maps = (*[matrix] * 5, types.boolean, types.boolean)
    kernels = ((twins.forward_noise_kernel, forward), (twins.step_kernel, step), (twins.map_kernel, maps))
    for kernel, signature in kernels:
        print(cuda.compile(kernel.py_func, signature, device=False, abi="numba", cc=(9, 0))[0])  # noqa: T201


if __name__ == "__main__":
    {"simulate": simulate, "devices": devices, "waits": waits, "ptx": ptx}[sys.argv[1]](*sys.argv[2:])
