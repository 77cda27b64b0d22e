"""Convolutions on tensor cores: how work is cut, which bits stay, what the compiler makes of it.

That the values are right is in `cuda_parity_conv_mma`, which `test_cuda_host` runs in every order of threads and under
the sanitizers.
"""

import itertools
import shutil
import subprocess

import numpy as np
import pytest
from cuda_parity_conv_mma import CASES, MANY, Case, arrays_of, pairs
from host_cuda import ORDERS, HostRuntime, has_compiler
from tolerances import assert_same_bits

from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda import conv_mma as cuda_conv_mma
from fastdiff.backends.cuda.conv import product
from fastdiff.backends.cuda.conv_mma import TILES, gather_shape, most_taps, weight_plan
from fastdiff.backends.cuda.device import SHARED_LIMITS
from fastdiff.backends.layers import Conv
from fastdiff.errors import BackendError
from fastdiff.kernels.cuda import runtime

F = np.float32
ALL = [case for cases in CASES.values() for case in cases]
THREADS = {"64": 576, "32": 288}  # of conv_mma_weight_, at most

host_run = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")


def form_of(case, adjoint=False):
    """The product of a convolution or of its input gradient."""
    n, height, width, _ = case.shape
    out = (n, *case.geometry.size(height, width), case.outputs)
    return product(case.geometry, case.shape, out, adjoint)


def sizes_of(case, adjoint=False):
    return form_of(case, adjoint).sizes.tobytes()


# ------------------------------------------------------------------------------------------- how work is cut


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("up", [1, 2, 3])
def test_most_taps_are_those_of_a_pixel_in_the_middle(kernel, stride, up):
    """No pixel meets more than one on the other side does, counted one by one; and one meets as many."""
    for pad in range(kernel):
        geometry = Conv((kernel, 1), (stride, 1), (pad, pad, 0, 0), (up, 1))
        size = 24
        met = list(pairs(geometry, 0, size, geometry.size(size, 1)[0]))
        outputs, inputs = ([pair[k] for pair in met] for k in (0, 1))
        assert most_taps(kernel, stride, pad, up, False) == max(map(outputs.count, outputs))
        assert most_taps(kernel, stride, pad, up, True) == max(map(inputs.count, inputs))


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("adjoint", [False, True])
def test_every_tile_fits_every_device(case, adjoint):
    """And all of them cover every pixel."""
    form = form_of(case, adjoint)
    for tile, copied, limit in itertools.product(TILES, (True, False), SHARED_LIMITS.values()):
        shape = gather_shape(form.sizes.tobytes(), adjoint, tile, copied, limit)
        assert shape.shared <= limit
        assert 1 << (shape.rows_log + shape.columns_log) <= tile.pixels
        assert shape.tiles * tile.pixels >= form.pixels
    assert gather_shape(sizes_of(case, adjoint), adjoint, TILES[0], True, 4096) is None


def test_the_pixels_of_all_taps_lie_in_shared_memory():
    """For the layers of U-Nets, on every device: a value is read once, not nine times."""
    for side, channels in ((32, 64), (16, 128), (8, 256)):
        case = Case(Conv((3, 3), pad=(1, 1, 1, 1)), (16, side, side, channels), channels)
        for adjoint, limit in itertools.product((False, True), SHARED_LIMITS.values()):
            assert gather_shape(sizes_of(case, adjoint), adjoint, TILES[0], True, limit).box


@pytest.mark.parametrize("case", [*ALL, MANY], ids=str)
def test_weight_gradients_are_cut_into_all_there_is(case):
    plan, (_, _, _, channels) = weight_plan(sizes_of(case)), case.shape
    parts = np.prod(plan.taps) * plan.channel_blocks
    wide = case.outputs > 32
    assert parts * 32 * (1 + wide) <= THREADS["64" if wide else "32"]
    assert plan.shape.shared <= min(SHARED_LIMITS.values())
    assert (plan.chunks - 1) * plan.chunk < plan.shape.tiles <= plan.chunks * plan.chunk
    cut = plan.blocks * parts * 32 * 32 * (1 + wide)
    assert cut >= np.prod(case.geometry.kernel) * channels * case.outputs


def test_bounds_are_those_of_the_launch():
    text = runtime._read("conv_mma.cu")
    for tile in TILES:
        for name in (f"conv_mma_{tile.name}", f"conv_mma_adjoint_{tile.name}"):
            before = text[: text.index(f" {name}(")]
            assert before.rstrip().endswith(f"FD_KERNEL FD_BOUNDS({tile.threads}, {512 // tile.threads})")
    for name, threads in THREADS.items():
        before = text[: text.index(f" conv_mma_weight_{name}(")]
        assert before.rstrip().endswith(f"FD_KERNEL FD_BOUNDS({threads}, {576 // threads})")


@host_run
def test_what_has_no_kernel_is_said():
    be = CudaBackend(HostRuntime(), precision="bf16")
    be.runtime.shared_limit = 4096
    x, w, b, dy = arrays_of(CASES["small"][0])
    with pytest.raises(BackendError, match=r"'bf16' has no kernel for a convolution of \(3, 3\) taps; 'float32' has"):
        be.conv(CASES["small"][0].geometry, x, w, b, np.empty_like(dy))


# ------------------------------------------------------------------------------------------- bits


@host_run
def test_precision_chooses_the_kernels():
    case = CASES["small"][0]
    x, w, b, dy = arrays_of(case)
    results = []
    for precision in ("float32", "bf16"):
        be = CudaBackend(HostRuntime(), precision=precision)
        out, dx, dw, db = (np.empty_like(a) for a in (dy, x, w, b))
        be.conv(case.geometry, x, w, b, out)
        be.conv_backward(case.geometry, dy, x, w, dx, dw, db)
        assert {source for source, _ in be.runtime.launches} == {"conv_mma" if precision == "bf16" else "conv"}
        results.append((out, dx, dw))
    for single, half in zip(*results, strict=True):
        error = np.linalg.norm(single - half) / np.linalg.norm(single)
        assert 2.0**-11 < error < 2.0**-8, "what is multiplied is not rounded to bf16"


@host_run
@pytest.mark.parametrize("case", [CASES["small"][0], MANY], ids=["image", "many tiles"])
def test_bits_depend_on_neither_device_nor_order(case, monkeypatch):
    monkeypatch.setattr(cuda_conv_mma, "LEAST_TILES", 1)
    weight_plan.cache_clear()
    x, w, b, dy = arrays_of(case)
    first = None
    for order, multiprocessors, limit in zip(ORDERS, (1, 7, 200), SHARED_LIMITS.values(), strict=True):
        be = CudaBackend(HostRuntime(order, multiprocessors=multiprocessors), precision="bf16")
        be.runtime.shared_limit = limit
        got = [np.empty_like(a) for a in (dy, x, w, b)]
        be.conv(case.geometry, x, w, b, got[0])
        be.conv_backward(case.geometry, dy, x, w, *got[1:])
        for array, same in zip(got, first or got, strict=True):
            assert_same_bits(array, same)
        first = got
    weight_plan.cache_clear()


@host_run
def test_values_that_are_not_finite_stay_so():
    """They reach the pixels that meet them, and no others; also what is beyond a tile's tail."""
    case = CASES["small"][0]
    x, w, b, dy = arrays_of(case)
    for value in (np.inf, np.nan):
        x[1, 2, 3, 34] = value
        out = np.empty_like(dy)
        CudaBackend(HostRuntime(), precision="bf16").conv(case.geometry, x, w, b, out)
        met = np.zeros(dy.shape[:3], bool)
        met[1, 1:4, 2:5] = True
        assert np.array_equal(np.isfinite(out), np.repeat(met[..., None] ^ True, case.outputs, axis=-1))


# ------------------------------------------------------------------------------------------- the compiler


def test_kernels_use_the_tensor_cores(tmp_path):
    """Products, loads of fragments and copies are the instructions that they are meant to be."""
    if not shutil.which("nvcc"):
        pytest.skip("the compile gate: nvcc is not here: install the CUDA toolkit")
    source, made = tmp_path / "conv_mma.cu", tmp_path / "conv_mma.out"
    source.write_text(runtime.source_text("conv_mma"))
    cuobjdump = shutil.which("cuobjdump")
    command = ["nvcc", "-cubin" if cuobjdump else "-ptx", "-arch=sm_90", *runtime.COMPILE_OPTIONS]
    subprocess.run([*command, "-o", str(made), str(source)], check=True, capture_output=True)
    text = made.read_text() if not cuobjdump else ""
    if cuobjdump:
        text = subprocess.run([cuobjdump, "-sass", str(made)], check=True, capture_output=True, text=True).stdout
    names = ("HMMA.16816.F32.BF16", "LDSM.16", "LDGSTS") if cuobjdump else ("mma.sync", "ldmatrix", "cp.async.cg")
    per_entry = text.split("Function : " if cuobjdump else ".entry ")[1:]
    products = 0
    for entry in per_entry:
        if any(f"conv_mma_{name}" in entry[:40] for name in ("pack", "prepare", "sum")):
            continue
        products += 1
        for name in names:
            assert entry.count(name) >= 4, f"{name} in {entry[:40]}"
    assert products == 2 * len(TILES) + len(THREADS)
