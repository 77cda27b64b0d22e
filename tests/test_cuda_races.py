"""No CUDA kernel has a data race, a misaligned access or a read of shared memory that was never written.

The host run finds them, by the parity checks at their small sizes (tests/host_cuda/races.cpp); faults that are planted
here show that it does.
"""

from __future__ import annotations

import re

import cuda_parity_conv  # noqa: F401 - registers its checks
import cuda_parity_conv_mma  # noqa: F401 - registers its checks
import cuda_parity_covariance  # noqa: F401 - registers its checks
import cuda_parity_layers  # noqa: F401 - registers its checks
import cuda_parity_mlp  # noqa: F401 - registers its checks
import cuda_parity_tmpd  # noqa: F401 - registers its checks
import host_cuda
import numpy as np
import pytest
from cuda_parity import CHECKS
from host_cuda import HostError, HostRuntime

from fastdiff.backends.cuda import CudaBackend
from fastdiff.kernels.cuda import runtime

pytestmark = pytest.mark.skipif(not host_cuda.has_compiler(), reason="the host run of the CUDA kernels needs g++")


@pytest.mark.parametrize("name", CHECKS)
def test_no_kernel_has_a_race(name):
    CHECKS[name].run(CudaBackend(HostRuntime(races=True)), "small")


# ------------------------------------------------------------------------------------------- planted faults


@pytest.fixture
def altered(monkeypatch):
    """Change the text of a file once, so that every source is read anew."""
    read = runtime._read

    def alter(file, old, new):
        assert read(file).count(old) == 1, f"{file} has another text now"
        monkeypatch.setattr(runtime, "_read", lambda name: read(name).replace(old, new) if name == file else read(name))
        runtime.source_text.cache_clear()

    yield alter
    monkeypatch.undo()
    runtime.source_text.cache_clear()


# Where, what goes, what stands there instead, a check that meets it, and what is said.
PLANTED = {
    "sums of a group": (
        "norm.cuh", "fd_syncthreads();\n        if (lanes.row", "if (lanes.row", "norms", "what was",
    ),
    "a box of pixels": (
        "conv_mma.cu", "fd_syncthreads();\n        if (new_box) begin_box", "if (new_box) begin_box",
        "conv_mma_outputs", "reads what was",
    ),
    "a stage too few": (
        "conv_mma.cu", "fd_cp_async_wait(STAGES - 2)", "fd_cp_async_wait(STAGES - 1)", "conv_mma_outputs",
        "reads what was never written of shared memory",
    ),
    "products that a warp reads": (
        "tmpd.cu", "fd_syncwarp();\n        tmpd_times(", "tmpd_times(", "moved_outputs", "reads what was",
    ),
    "normals of a tile": (
        "tiles.cuh", "fd_syncthreads();\n            TILE_EACH z", "TILE_EACH z", "normals",
        "what was .* of shared memory",
    ),
    "the next tile": (
        "tiles.cuh", "if (DRAWS) fd_syncthreads();\n        row", "row", "normals", "what was read of shared memory",
    ),
    "factors of the next tile": (
        "tiles.cuh", "if (DRAWS) fd_syncthreads();\n        row", "row", "forward_noising", "what was",
    ),
    "outputs of a layer": (
        "mlp.cu", "second);\n                fd_syncthreads();", "second);", "chains", "reads what was",
    ),
    "factors of the states": (
        "mlp_mma.cu", "}\n                    fd_syncthreads();\n                }", "}\n                }",
        "chains_on_tensor_cores", "reads what was",
    ),
    # Outputs of the second task on, which are no arguments: only the first one's are.
    "tasks behind the first": (
        "common.cuh", "return (int)blockIdx.x - mine->first;", "return mine->first ? 0 : (int)blockIdx.x;",
        "many_layers_of_rows", "writes what was written of an array",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(altered, fault):
    file, old, new, check, said = PLANTED[fault]
    altered(file, old, new)
    with pytest.raises(HostError, match=said) as caught:
        CHECKS[check].run(CudaBackend(HostRuntime(races=True)), "small")
    assert re.search(r"\.cuh?:\d+", str(caught.value)), "no line is named"


# ------------------------------------------------------------------------------------------- what is a race


@pytest.fixture
def run(monkeypatch):
    """Launch the body of a name in so many blocks of 64 threads. All bodies are of one source, compiled once.

    On arrays x of 256 floats and k of integers; `far` is another, which is no argument: `place` says where it lies.
    """
    read, text = runtime._read, "".join(kernel(name, body) for name, (body, *_) in {**GOOD, **BAD}.items())
    monkeypatch.setattr(runtime, "_read", lambda name: text if name == "bodies.cu" else read(name))

    def launch(name, grid):
        arrays, far = (np.zeros(256, np.float32), np.zeros(256, np.int32)), np.zeros(256, np.float32)
        for order in host_cuda.ORDERS:
            here = HostRuntime(order, races=True)
            here.launch("bodies", entry(name), grid, 64, (*arrays, np.array([here.address(far)])))

    return launch


def entry(name):
    return "race_" + re.sub(r"\W", "_", name)


def kernel(name, body):
    return (
        f"FD_KERNEL {entry(name)}(float *x, int *k, const int64 *place) {{\n    FD_SHARED_ARRAY(float, s, 256);\n"
        "    float *const far = reinterpret_cast<float *>(place[0]);\n    (void)far;\n"
        "    const int i = threadIdx.x, b = blockIdx.x;\n    (void)s, (void)i, (void)b, (void)x, (void)k;\n"
        f"    {body}\n}}\n"
    )


GOOD = {
    "barrier": ("s[i] = i; fd_syncthreads(); x[i] = s[63 - i];", 1),
    "reads before a write": ("s[i] = i; fd_syncthreads(); const float a = s[63 - i]; fd_syncthreads(); s[i] = a;", 2),
    "warp barrier": ("s[i] = i; fd_syncwarp(); x[64 * b + i] = s[i ^ 5]; fd_syncwarp(); s[i] = 1;", 2),
    "one lane writes what all read": (
        "s[i] = 1; fd_syncwarp(); x[i] = s[i / 32 * 32]; fd_syncwarp(); if (i % 32 == 0) s[i] += 1;", 1,
    ),
    "blocks apart": ("x[b * 64 + i] = i;", 4),
    "blocks apart, elsewhere": ("far[b * 64 + i] = i; x[b * 64 + i] = far[b * 64 + i];", 4),
    "all read one": ("x[64 + 64 * b + i] = x[0];", 3),
    "atomic": ("fd_atomic_add(k, 1);", 2),
    "atomic, then a barrier": ("fd_atomic_add(k, 1); fd_syncthreads(); x[i] = (float)k[0];", 1),
    "halves of a word": ("reinterpret_cast<bf16 *>(s)[i] = 1;", 2),
    "a copy that is waited for": (
        "fd_cp_async16(s + 4 * i, x + 4 * i, 16); fd_cp_async_commit(); fd_cp_async_wait(0); fd_syncthreads();"
        " x[i] = s[255 - i];", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_is_in_order_is_no_race(run, name):
    run(name, GOOD[name][1])


SHARED, ARRAY = "of shared memory", "of an array"
BAD = {
    "write, read": ("s[i] = i; x[i] = s[i ^ 32];", 1, f"reads what was .* {SHARED}"),
    "read, write": ("s[i] = i; fd_syncthreads(); x[i] = s[63 - i]; s[i] = 1;", 1, f"what was .* {SHARED}"),
    "many read, one writes": (
        "s[i] = i; fd_syncthreads(); x[i] = s[0]; fd_syncwarp(); if (i == 40) s[0] = 1;", 1,
        f"writes what was read {SHARED}",
    ),
    "write, write": ("s[i / 2] = i;", 1, f"writes what was written {SHARED}"),
    "lanes without a barrier": ("s[i] = i; x[i] = s[i ^ 1];", 1, f"reads what was .* {SHARED}"),
    "a shuffle is no barrier": (
        "s[i] = i; x[i] = fd_shuffle(s[i], 0); x[i] += s[i ^ 1];", 1, f"reads what was written {SHARED}",
    ),
    "warps behind barriers of their own": ("s[i] = i; fd_syncwarp(); x[i] = s[i ^ 32];", 1, "reads what was"),
    "blocks write": ("x[i] = b;", 2, f"writes what was written {ARRAY}"),
    "blocks write elsewhere": ("far[i] = b;", 2, f"writes what was written {ARRAY}"),
    "lanes meet elsewhere": ("far[i] = i; x[i] = far[i ^ 1];", 1, f"what was .* {ARRAY}"),
    "a block reads, another writes": ("if (b) x[i] = 1; else x[64 + i] = x[63 - i];", 2, f"what was .* {ARRAY}"),
    "blocks read, one writes": (
        "if (b < 2) x[64 + 64 * b + i] = x[0]; else if (i == 0) x[0] = 1;", 3, f"what was .* {ARRAY}",
    ),
    "atomic and plain": ("if (i < 32) fd_atomic_add(k, 1); else x[i] = (float)k[0];", 1, f"what was .* {ARRAY}"),
    "half a word": ("reinterpret_cast<bf16 *>(s)[i / 2] = 1;", 1, f"writes what was written {SHARED}"),
    "never written": ("x[i] = s[i + 64];", 1, f"reads what was never written {SHARED}"),
    "of the block before": ("if (b == 0) s[i] = 1; fd_syncthreads(); x[64 * b + i] = s[i];", 2, "never written"),
    "a copy that is not waited for": (
        "fd_cp_async16(s + 4 * i, x + 4 * i, 16); fd_cp_async_commit(); x[i] = s[4 * i];", 1, "never written",
    ),
    "misaligned": ("if (i == 0) fd_store4(x + 1, make_float4(0, 0, 0, 0));", 1, "misaligned address .* at common.cuh"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_races_are_found(run, name):
    _, grid, said = BAD[name]
    with pytest.raises(HostError, match=rf"bodies\.cu, {entry(name)}: block \d, thread \d+.*({said})"):
        run(name, grid)


# ------------------------------------------------------------------------------------------- work


def test_timesteps_are_sorted_in_linear_time():
    """Four times the batch touches memory at most four times as often."""
    touched = []
    for n in (1024, 4096):
        here, t = HostRuntime(races=True), np.random.default_rng(n).integers(0, 1000, n)
        order, spare = np.empty((2, n), np.int32)
        here.launch("mlp", "mlp_order_times", 1, 256, (t, order, spare, n, 1000))
        assert order.tolist() == np.argsort(t, kind="stable").tolist()
        touched.append(here.accesses["mlp", "mlp_order_times"])
    assert touched[1] <= 4 * touched[0]


def test_a_timestep_is_read_once_to_be_added_up():
    """Where it ends is found by halving: a thread reads timesteps to find its place, and no more of them than that."""
    n, width = 3000, 4
    here, t, order = HostRuntime(races=True), np.zeros(n, np.int64), np.arange(n, dtype=np.int32)
    dtime, dtable = np.ones((n, width), np.float32), np.zeros((1, width), np.float32)
    here.launch("mlp", "mlp_time_gradient", 3, 61, (dtime, t, order, dtable, n, width))
    assert dtable.tolist() == [[n] * width]
    to_find, to_add = 4 * n * width, 2 * n * width
    assert here.accesses["mlp", "mlp_time_gradient"] <= to_find + to_add + 100 * width
