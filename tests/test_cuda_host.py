"""The CUDA sources and the CUDA backend without a GPU: every kernel runs on the CPU, from the text that a GPU gets.

`host_cuda` runs them; `cuda_parity` says what they must agree with. Here too: that the host run notices what a GPU
leaves undefined, and the runtime for CuPy against a stand-in for CuPy.
"""

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
import types
import zlib
from pathlib import Path

import cuda_gate
import cuda_parity
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
from device_array import DeviceArray
from host_cuda import HostError, HostRuntime
from stand_in_cupy import CUDADriverError, CUDARuntimeError, StandIn, StandInModule, StandInStream, elf
from tolerances import HANG_SECONDS, assert_same_bits

import fastdiff as fd
from fastdiff import backends
from fastdiff.backends import Inputs, TrainState
from fastdiff.backends.cuda import CudaBackend, device
from fastdiff.backends.layers import Affine, Norm, PartsBackend
from fastdiff.errors import ArgumentError, BackendError
from fastdiff.kernels.cuda import runtime
from fastdiff.noise import Draw, Stream

if not host_cuda.has_compiler():
    pytest.skip("the host run of the CUDA kernels needs g++", allow_module_level=True)

# ------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_agree(name):
    """Every entry in three orders of threads and blocks; and each check launches what it claims to cover.

    The shared memory of the host run is what the compiler of a GPU gives an entry.
    """
    here = HostRuntime("mixed")
    for _ in host_cuda.ORDERS:  # again where it launches an entry less than three times
        CHECKS[name].run(CudaBackend(here), "small")
        if here.met >= (wanted := {(*key, order) for key in CHECKS[name].covers for order in host_cuda.ORDERS}):
            break
    assert here.met >= wanted
    rows = (line.split() for line in cuda_gate.KEPT.read_text().splitlines()[2:])
    static = {entry: -(-int(shared) // 16) * 16 for entry, arch, _, shared, *_ in rows if arch == "sm_90"}
    assert here.static_shared == {key: static[key[1]] for key in here.static_shared}


@pytest.mark.parametrize("block", [1, 32, 256, 1024])
def test_noise_does_not_depend_on_the_geometry(block):
    for multiprocessors in (1, 7):
        be = CudaBackend(HostRuntime(block=block, multiprocessors=multiprocessors))
        for name in ("normals", "forward_noising", "sampler_steps"):
            if name != "sampler_steps" or block == 256:
                CHECKS[name].run(be, "small")


@pytest.mark.parametrize("blocks", [1, 4, 1000])
def test_tiles_are_aligned_and_full(blocks):
    """A tile has no more Philox blocks than threads take; where there is enough to do nearly all lanes have one."""
    turn, tiled = device.WARP * device.TILE_LINES, set()
    for width in range(1, 2060):
        rows, quarter = device.tile_rows(10_000, width, blocks), -(-width // 4)
        assert rows * width % 4 == 0
        assert rows * quarter <= device.TILE_THREADS * device.TILE_LINES
        if rows:
            tiled.add(width)
            assert blocks > 1 or -rows * quarter % turn <= (1 / device.LEAST_FILL - 1) * rows * quarter
    assert tiled > {*range(1, 101), 128, 168, 200, 500}
    assert not tiled & {513, 1026, 2049}


def test_each_form_runs_where_it_may():
    """Tiles take rows that fit, of aligned arrays, whose numbers have the same upper half."""
    here = HostRuntime()
    be, draw = CudaBackend(here), Draw(5, Stream.STEP, first_row=2**32 - 9)
    at = here.empty(3001)
    for array, entry in (
        (here.empty((9, 50)), "normal_rows"), (here.empty((10, 50)), "normal"), (at[1:451].reshape(9, 50), "normal"),
        (here.empty((9, 64)), "normal_wide"), (here.empty((2, 1021)), "normal"), (here.empty((2, 1022)), "normal_rows"),
        (at[1:577].reshape(9, 64), "normal"),
    ):  # fmt: skip
        be.normal(array, draw)
        assert here.launches[-1] == ("noise", entry)


def test_the_norm_does_not_depend_on_the_geometry():
    g = np.random.default_rng(0).normal(size=70_001).astype(np.float32)
    options = cuda_parity.PLANS[0].options(0, 0)
    norms = set()
    for multiprocessors in (1, 3, 50):
        be = CudaBackend(HostRuntime(multiprocessors=multiprocessors))
        norms.add(be.adamw(TrainState(*(np.zeros_like(g), g, *np.zeros((3, g.size), np.float32))), options))
    assert len(norms) == 1


# ------------------------------------------------------------------------------------------- the sanitizers

SANITIZED = {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc", "FASTDIFF_HOST_SANITIZE": "1"}


def sanitized(*arguments):
    environment = {**os.environ, **SANITIZED, "LD_PRELOAD": host_cuda.sanitizer_library()}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=environment, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip


needs_sanitizers = pytest.mark.skipif(
    not Path(host_cuda.sanitizer_library()).is_absolute(), reason="the sanitizer run of the CUDA kernels needs libasan"
)


@needs_sanitizers
def test_kernels_agree_under_sanitizers():
    host_cuda.build_all(sanitize=True)  # to compile takes longer than to run
    done = sanitized("cuda_parity.py")
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == len(CHECKS)


BAD_KERNELS = {
    "past an array": ("heap-buffer-overflow", "x[n] = 1;"),
    "past shared memory": ("heap-buffer-overflow", "FD_SHARED_ARRAY(int, s, 8); s[n] = n; x[0] = s[n];"),
    "misaligned": ("misaligned address", "fd_store4(x + n - 7, make_float4(0, 0, 0, 0));"),
    "too large": ("signed integer overflow", "x[0] = (float)(n * (1 << 30));"),
}
# Each in a fork, as it ends the process; the last line of what it says is its exit code.
LAUNCHES = """
import os, sys
import numpy as np
from host_cuda import HostRuntime
from fastdiff.kernels.cuda import runtime
read = runtime._read
runtime._read = lambda name: sys.argv[1] if name == "bad.cu" else read(name)
for entry in runtime.entries("bad"):
    if (child := os.fork()) == 0:
        HostRuntime().launch("bad", entry, 1, 1, (np.zeros(8, np.float32), 8))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end="\\0", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def sanitizers_said():
    bodies = enumerate(body for _, body in BAD_KERNELS.values())
    done = sanitized("-c", LAUNCHES, "\n".join(f"FD_KERNEL bad{k}(float *x, int n) {{ {body} }}" for k, body in bodies))
    assert done.returncode == 0, done.stderr
    return dict(zip(BAD_KERNELS, done.stderr.split("\0"), strict=False))


@needs_sanitizers
@pytest.mark.parametrize("name", BAD_KERNELS)
def test_sanitizers_see_what_is_wrong(sanitizers_said, name):
    said, _, code = sanitizers_said[name].rpartition("\n")
    assert int(code) != 0
    assert BAD_KERNELS[name][0] in said


# ------------------------------------------------------------------------------------------- the host run itself


@pytest.fixture
def run(monkeypatch):
    """Launch the only entry of a text."""
    read, texts = runtime._read, {}
    monkeypatch.setattr(runtime, "_read", lambda name: texts.get(name) or read(name))

    def launch(text, grid, block, *args, here=None, shared_bytes=0):
        name = f"text{zlib.crc32(text.encode())}"
        texts[f"{name}.cu"] = text
        (entry,) = runtime.entries(name)
        (here or HostRuntime()).launch(name, entry, grid, block, args, shared_bytes)

    return launch


def test_barriers_and_shared_memory(run):
    """A reversal within blocks through shared memory, dynamic and static."""
    text = """
    FD_KERNEL reverse(float *x) {
        FD_SHARED(float, a);
        FD_SHARED_ARRAY(float, b, 70);
        const int i = threadIdx.x, n = blockDim.x;
        a[i] = x[blockIdx.x * n + i];
        fd_syncthreads();
        b[i] = a[n - 1 - i] + 1;
        fd_syncthreads();
        x[blockIdx.x * n + i] = b[i] + 0 * a[(i + 1) % n];
    }"""
    for order in host_cuda.ORDERS:
        x = np.arange(210, dtype=np.float32)
        run(text, 3, 70, x, here=HostRuntime(order), shared_bytes=280)
        assert_same_bits(x, np.arange(210, dtype=np.float32).reshape(3, 70)[:, ::-1].ravel() + np.float32(1))


def test_shuffles(run):
    text = """
    FD_KERNEL shuffle(int *i, double *d, int64 *all) {
        const int k = threadIdx.x;
        const int down = fd_shuffle_down(k, 5), swapped = fd_shuffle_xor(down, 3);
        i[k] = fd_shuffle(swapped, 7) * 1000 + swapped;
        double sum = k;
        for (int delta = 16; delta > 0; delta /= 2) sum += fd_shuffle_down(sum, delta);
        d[k] = sum;
        int64 total = 1ll << 40;
        for (int mask = 1; mask < 32; mask *= 2) total += fd_shuffle_xor(total, mask);
        all[k] = total;
    }"""
    lane = np.arange(32)
    down = np.where(lane + 5 < 32, lane + 5, lane)
    for order in host_cuda.ORDERS:
        i, d, all_lanes = np.empty(96, np.int32), np.empty(96), np.empty(96, np.int64)
        run(text, 1, 96, i, d, all_lanes, here=HostRuntime(order))
        for warp in range(3):
            swapped = (down + 32 * warp)[lane ^ 3]
            assert i[32 * warp :][:32].tolist() == (swapped[7] * 1000 + swapped).tolist()
            assert d[32 * warp] == (lane + 32 * warp).sum()
        assert all_lanes.tolist() == [32 << 40] * 96


def test_shared_memory_is_garbage_in_every_block(run):
    text = """
    FD_KERNEL peek(float *x) {
        FD_SHARED(float, a);
        FD_SHARED_ARRAY(float, b, 1);
        x[2 * blockIdx.x] = a[0];
        x[2 * blockIdx.x + 1] = b[0];
        a[0] = b[0] = 1;
    }"""
    x = np.zeros(6, np.float32)
    run(text, 3, 1, x, shared_bytes=4)
    assert np.isnan(x).all()


# What a kernel does, how many threads do it, and what is said.
WAITING = {
    "one ends before a barrier": (
        "if (threadIdx.x == 2) return;\n fd_syncthreads();",
        4, "not all threads reached the barrier at text.*:3: 3 of 4 did, thread 2 ended",
    ),
    "two barriers": (
        "if (threadIdx.x == 2) fd_syncthreads();\n else fd_syncthreads();",
        4, r"threads of one block wait at different barriers: text.*:[23] and text.*:[23]$",
    ),
    "one lane at a barrier": (
        "if (threadIdx.x == 5) fd_syncthreads(); else fd_shuffle_down(1, 1);",
        32, "not all threads reached the shuffle .*: 31 of 32 did, thread 5 waits elsewhere",
    ),
    "two shuffles": (
        "if (threadIdx.x == 5) fd_shuffle_down(1, 1);\n else fd_shuffle_down(1, 1);",
        64, "threads of one warp wait at different shuffles",
    ),
    "a broken warp": ("fd_shuffle_xor(1, 1);", 36, "4 of 32 did, thread 36 does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("order", host_cuda.ORDERS)
def test_what_not_all_threads_reach_is_reported(run, name, order):
    here, (body, threads, message) = HostRuntime(order), WAITING[name]
    x = np.zeros(1, np.int32)
    with pytest.raises(HostError, match=message):
        run(f"FD_KERNEL wait(int *x) {{ x[0] = 1;\n {body} }}", 2, threads, x, here=here)
    # The next launch finds everything in order.
    run("FD_KERNEL fine(int *x) { fd_syncthreads(); if (threadIdx.x == 0) x[0] = 5; }", 1, 64, x, here=here)
    assert x == 5


def test_orders_show_a_missing_barrier(run):
    text = """
    FD_KERNEL race(float *x) {
        FD_SHARED_ARRAY(float, a, 64);
        a[threadIdx.x] = threadIdx.x;
        x[threadIdx.x] = a[63 - threadIdx.x];
    }"""
    results = []
    for order in host_cuda.ORDERS:
        x = np.zeros(64, np.float32)
        run(text, 1, 64, x, here=HostRuntime(order))
        results.append(np.isnan(x).tolist())
    assert results[0] != results[1] != results[2]


def test_launches_that_no_device_takes(run):
    text = "FD_KERNEL nothing(int n) { (void)n; }"
    for grid, block in ((0, 1), (1, 0), (1, 1025)):
        with pytest.raises(HostError, match="a launch of"):
            run(text, grid, block, 1)
    with pytest.raises(HostError, match="shared memory"):
        run(text, 1, 1, 1, shared_bytes=228 * 1024)
    text = "FD_KERNEL own(float *x) { FD_SHARED(float, a); FD_SHARED_ARRAY(float, b, 5); x[0] = a[0] = b[0] = 1; }"
    run(text, 1, 1, np.zeros(1, np.float32), shared_bytes=227 * 1024 - 32)
    with pytest.raises(HostError, match="asks for 232420 bytes of shared memory, besides 32 of its own"):
        run(text, 1, 1, np.zeros(1, np.float32), shared_bytes=227 * 1024 - 28)


def test_what_does_not_compile_is_shown(run):
    with pytest.raises(HostError, match=r"text\d+\.cu:2.*oops"):
        run("FD_KERNEL wrong(int n) {\n oops(n); }", 1, 1, 1)


# ------------------------------------------------------------------------------------------- normals

PAIRS = """
FD_KERNEL pairs(const uint32 *radii, const uint32 *angles, float *a, float *b, int n) {
    FD_GRID_STRIDE(i, n) fd_box_muller(radii[i], angles[i], a[i], b[i]);
}
"""
# Numbers whose root is not the nearest float by some reciprocal root as near as a GPU's, of all up to powers of 4.
ROOTS = """
FD_KERNEL roots(int *found, int *count, float *some) {
    FD_GRID_STRIDE(i, 1 << 24) {
        const float x = fd_bits_float(0x3f800000 + (int)i);
        const double reciprocal = 1 / sqrt((double)x);
        for (int k = -3; k <= 3; k++) {
            const float near = fd_bits_float(fd_float_bits((float)reciprocal) + k);
            if (fabs(near / reciprocal - 1) > ERROR) continue;
            count[0]++;
            if (fd_root_by(x, near) != sqrtf(x) && count[1] < 8) found[count[1]++] = fd_float_bits(x);
        }
    }
    some[0] = fd_root(0.0f), some[1] = fd_root(-0.0f);
    some[2] = fd_root(1e-30f), some[3] = fd_root(5.9604645e-8f), some[4] = fd_root(45.8f);
}
"""


def test_normals_of_all_kinds_of_words(run):
    """Around every power of two, where logarithms change octaves and angles quarters; and of random words."""
    near = np.arange(-300, 300, dtype=np.int64)
    octave = (fd.noise.SQRT_HALF_BITS - 0x3F000000 + 2**23) << 8  # where a mantissa is the root of 1/2
    words = [*(2**k for k in range(33)), *(octave >> k for k in range(32)), *(k << 29 for k in range(8))]
    edges = np.unique(np.add.outer(words, near)).astype(np.int64) & 0xFFFFFFFF
    random = np.random.default_rng(0).integers(0, 2**32, 200_000)
    radii = np.concatenate([edges, random]).astype(np.uint32)
    angles = np.concatenate([np.random.default_rng(1).permutation(edges), random[::-1]]).astype(np.uint32)
    for given in ((radii, angles), (angles, radii)):
        got = np.empty((2, len(radii)), np.float32)
        run(PAIRS, 1, 64, *given, *got, len(radii))
        assert_same_bits(got, np.stack(fd.noise.box_muller(*given)))


def test_roots_are_the_nearest_floats(run):
    """1 / sqrt of a GPU is within 2^-22.9, which two floats or three are.

    For two numbers the largest of them will not do. It is not that of a GPU, whose own root has the same steps
    (test_cuda_gate), and is the nearest float.
    """
    found, count, some = np.zeros(8, np.int32), np.zeros(2, np.int32), np.zeros(5, np.float32)
    run(ROOTS.replace("ERROR", repr(2.0**-22.9)), 1, 1, found, count, some)
    assert count[0] > 2 * 2**24
    assert found[: count[1]].tolist() == [0x3FFC114A, 0x406E9372]
    assert_same_bits(some, np.sqrt(np.array([0.0, -0.0, 1e-30, 5.9604645e-8, 45.8], np.float32)))


# ------------------------------------------------------------------------------------------- arguments


def test_arguments_are_cast_as_declared(run):
    text = """
    FD_KERNEL take(double *out, const float *null, int a, uint32 b, int64 c, uint64 d, real e, double f, TableRow r) {
        const double values[] = {(double)a, (double)b, (double)c, (double)d, e, f, r.p, r.high, null ? 0.0 : 1.0};
        for (int i = 0; i < 9; i++) out[i] = values[i];
    }"""
    out = np.zeros(9)
    row = (1.5, *[0] * 9, -math.inf, math.inf)
    run(text, 1, 1, out, None, -3, 2**32 - 1, -(2**62), 2**63, 0.1, 0.1, row)
    assert out.tolist() == [-3, 2**32 - 1, -(2**62), 2**63, np.float32(0.1), 0.1, 1.5, math.inf, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros(4, np.float32),), "copies takes 3 arguments, got 1"),
        ((np.zeros(4), np.zeros(4, np.float32), 4), "to_n has dtype float64, declared is float32"),
        ((np.zeros(8, np.float32)[::2], np.zeros(4, np.float32), 4), "to_n is not C-contiguous"),
        ((np.zeros(4, np.float32), np.zeros(4, np.int64), 4), "from_n has dtype int64"),
    ],
)
def test_wrong_arrays_are_refused_by_name(run, args, message):
    with pytest.raises(TypeError, match=message):
        run("FD_KERNEL copies(float *__restrict__ to_n, const float *__restrict__ from_n, int n) {}", 1, 1, *args)


@pytest.mark.parametrize(("kind", "value"), [("int", 2**31), ("uint32", -1), ("uint32", 2**32), ("int64", 2**63)])
def test_numbers_that_do_not_fit_are_refused(run, kind, value):
    with pytest.raises(OverflowError):
        run(f"FD_KERNEL take({kind} n) {{ (void)n; }}", 1, 1, value)


def test_unknown_types_are_refused(run):
    with pytest.raises(ValueError, match=r"parameter 'short n' of take"):
        run("FD_KERNEL take(short n) {}", 1, 1, 1)


def test_constants_are_those_of_the_noise_law():
    """Each reads back as the float32 that NumPy takes."""
    lines = dict(line.split(" ", 2)[1:] for line in runtime.constants().splitlines() if line.startswith("#define FD_L"))
    from fastdiff.noise import LN2_LOW, LOG_COEFFICIENTS

    assert np.float32(lines["FD_LOG_4"].strip("()f")) == np.float32(LOG_COEFFICIENTS[4])
    assert np.float32(lines["FD_LN2_LOW"].strip("()f")) == np.float32(LN2_LOW)
    assert np.float32(lines["FD_LEAKY_SLOPE"].strip("()f")) == np.float32(backends.LEAKY_SLOPE)


# ------------------------------------------------------------------------------------------- the backend


def test_same_signatures():
    def operations(kind):
        return {name: f for name, f in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}

    wanted, found = operations(PartsBackend), operations(CudaBackend)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert inspect.signature(found[name]) == inspect.signature(wanted[name]), name
    assert isinstance(CudaBackend(HostRuntime()), PartsBackend)
    assert isinstance(HostRuntime(), runtime.Runtime)


def test_arrays():
    be = CudaBackend(HostRuntime())
    strided = np.arange(12).reshape(3, 4)[:, ::2]
    array = be.asarray(strided)
    assert array.flags.c_contiguous
    assert array.dtype == be.asarray(np.ones(2)).dtype == be.empty((2, 3)).dtype == np.float32
    assert be.asarray(strided, np.int64).dtype == be.empty((2, 3), np.int64).dtype == np.int64
    assert be.to_numpy(array).tolist() == strided.tolist()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda be: pickle.loads(pickle.dumps(be))])
def test_the_backend_survives_copy_and_pickle(again):
    be = again(CudaBackend(HostRuntime()))
    z = be.empty((3, 5))
    be.normal(z, Draw(1, Stream.INIT))
    assert_same_bits(z, fd.normal((3, 5), seed=1, stream="init", backend="numpy"))


def test_tables_are_kept_and_forgotten():
    be = CudaBackend(HostRuntime())
    first = be._table(np.array([0.5]))
    assert be._table(np.array([0.5])) is first
    for k in range(100):
        be._table(np.array([float(k)]))
    assert be._table(np.array([0.5])) is not first
    assert len(be._tables) < 50


TWINS = """
import numpy as np
from cuda_parity import filled, step_agrees
from host_cuda import HostRuntime
from fastdiff.backends import Row, get_backend
from fastdiff.backends.cuda import CudaBackend, device
from fastdiff.noise import Draw, Stream
here = HostRuntime()
be = CudaBackend(here, "numba")
x0, t, draw = filled((3, 7), 1), np.array([0, 1, 1]), Draw(5, Stream.FORWARD, first_row=2)
results = []
for each in (be, get_backend("numpy")):
    out, eps = np.empty_like(x0), np.empty_like(x0)
    with np.errstate(all="ignore"):
        each.forward_noise(x0, t, np.array([0.5, 0.1]), np.array([0.3, 0.2]), out, eps, draw)
    results.append((out, eps))
for got, want in zip(*results):
    assert got.tobytes() == want.tobytes()
for row in (Row(3, 1.1, -0.4, 0.3, 0.7, -0.2, e=0.1, s=0.5), Row(3, 1.1, 0, 0.3, 0.7)):
    step_agrees(be, (3, 7), row, (-1.0, 1.0), True)
assert not here.launches
print("agree")
"""


def test_the_backend_on_numba_kernels():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWINS],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=environment, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.stdout == "agree\n", done.stderr[-2000:]


def test_without_numba_for_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdiff.kernels.cuda.numba_twins", None)
    with pytest.raises(BackendError, match="kernels='numba' needs Numba's CUDA target"):
        CudaBackend(HostRuntime(), "numba")
    with pytest.raises(ArgumentError, match="kernels: got 'triton'"):
        CudaBackend(HostRuntime(), "triton")


def test_train_save_load_and_sample(tmp_path):
    be = CudaBackend(HostRuntime("shuffled"))
    curves = fd.data.harmonic_curves(60, points=10, seed=0)
    options = {"steps": 4, "batch": 40, "progress": False}
    model = fd.Diffusion(fd.MLP(10, hidden=(16, 16), T=12), backend=be, seed=3).fit(curves, **options)
    other = fd.Diffusion(fd.MLP(10, hidden=(16, 16), T=12), backend="numpy", seed=3).fit(curves, **options)
    model.save(tmp_path / "m.safetensors", training=True)
    loaded = fd.load(tmp_path / "m.safetensors", backend=be)
    for name in ("ddpm", "ddim", "dpmpp_2m"):
        samples = model.sample(5, sampler=name)
        assert_same_bits(loaded.sample(5, sampler=name), samples)
        assert np.abs(samples - other.sample(5, sampler=name)).max() < 1e-3
    loaded.fit(curves, steps=2, progress=False)
    model.fit(curves, steps=2, progress=False)
    assert_same_bits(loaded.sample(3), model.sample(3))


# ------------------------------------------------------------------------------------------- CuPy


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path))

    def install(**options):
        cupy = StandIn(**options)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return cupy

    return install


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_agree_through_cupy(stand_in, name):
    stand_in()
    CHECKS[name].run(CudaBackend(), "small")


def test_train_and_sample_through_cupy(stand_in):
    """The same bits as on the host runtime: arrays go where the backend wants them."""
    stand_in()
    curves, samples = fd.data.harmonic_curves(30, points=10, seed=0), []
    for be in (CudaBackend(), CudaBackend(HostRuntime())):
        model = fd.Diffusion(fd.MLP(10, hidden=(16,), T=12), backend=be, seed=3)
        samples.append(be.to_numpy(model.fit(curves, steps=3, batch=20, progress=False).sample(3)))
    assert_same_bits(*samples)


PICTURES = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), np.uint8)


def of_pictures(be):
    """A model trained and sampled from on a backend; its weights, losses and samples."""
    unet = fd.UNet((4, 4, 1), channels=(4, 4), blocks=1, T=12, groups=2, dropout=0.3)
    model = fd.Diffusion(unet, backend=be, seed=3).fit(PICTURES, steps=4, batch=3, progress=False)
    return model.net.flat, np.array(model.history["loss"]), be.to_numpy(model.sample(3, steps=4))


def test_graphs_through_cupy(stand_in):
    cupy = stand_in()
    want = of_pictures(CudaBackend(HostRuntime(), graphs=False))
    for got, wanted in zip(of_pictures(CudaBackend()), want, strict=True):
        assert_same_bits(got, wanted)
    assert len(cupy.host.graphs) == 2


@pytest.mark.parametrize("where", ["begin_capture", "end_capture", "launch", "empty"])
def test_captures_that_fail(stand_in, monkeypatch, caplog, where):
    """Whatever CUDA says to a graph, the work is done without one."""
    cupy, want = stand_in(), of_pictures(CudaBackend(HostRuntime(), graphs=False))
    be = CudaBackend()
    wrong = CUDADriverError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED") if where == "launch" else CUDARuntimeError(901)

    def fail(*args):
        if cupy.host.capturing and where == "end_capture":
            cupy.host.end_capture()
        raise wrong

    if where == "launch":
        launch = cupy.host.launch
        monkeypatch.setattr(cupy.host, "launch", lambda *a: fail() if cupy.host.capturing else launch(*a))
    elif where == "empty":
        issue = be._issue_adamw
        monkeypatch.setattr(be, "_issue_adamw", lambda *args: (be.empty((1,)), issue(*args))[1])
    else:
        monkeypatch.setattr(StandInStream, where, fail)
    with caplog.at_level("WARNING"):
        for got, wanted in zip(of_pictures(be), want, strict=True):
            assert_same_bits(got, wanted)
    (record,) = caplog.records
    said = "memory was asked for" if where == "empty" else f"{type(wrong).__name__}: {wrong}"
    assert said in record.getMessage()
    assert not be.graphs


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, AssertionError])
def test_errors_of_the_work_end_a_capture(stand_in, error):
    """They are raised: only what CUDA says to a graph makes the work go on without one."""
    cupy, be, interrupted = stand_in(), CudaBackend(), []

    def work():
        if interrupted:
            raise interrupted.pop()

    recording = be.record(work)
    recording.run()
    interrupted.append(error)
    with pytest.raises(error):
        recording.run()
    assert not cupy.host.capturing
    assert not be.runtime.capturing
    assert be.graphs
    recording.run()
    assert cupy.host.graphs == [0, 0]


def test_kernels_are_compiled_once(stand_in, tmp_path):
    """For all processes: the file is found again. -ftz=true is CuPy's habit and is not among the options."""
    cupy = stand_in()
    for _ in range(2):
        CHECKS["optimiser"].run(CudaBackend(), "small")
    assert cupy.compiled == [[*runtime.COMPILE_OPTIONS, "-arch=sm_90"]]
    assert "-ftz=false" in runtime.COMPILE_OPTIONS
    assert "-fmad=false" in runtime.COMPILE_OPTIONS
    assert [path.name.split("-")[:2] for path in (tmp_path / "cuda").iterdir()] == [["optim", "sm_90"]]


def changed(path, what):
    """What became of a file: cut, emptied, or of another compiler."""
    code = path.read_bytes()
    path.write_bytes({"cut": code[:-1], "cut short": code[:70], "empty": b"", "other": elf(code[64:-56][:-1])}[what])


@pytest.mark.parametrize("what", ["cut", "cut short", "empty", "other"])
def test_damaged_kernels_are_compiled_anew(stand_in, tmp_path, what):
    """Machine code is whole by its own headers, of which CuPy drops the last byte; a file that is not is replaced."""
    cupy = stand_in()
    CHECKS["optimiser"].run(CudaBackend(), "small")
    (path,) = (tmp_path / "cuda").iterdir()
    whole = path.read_bytes()
    assert len(whole) == runtime.cubin_size(whole)
    changed(path, what)
    CHECKS["optimiser"].run(CudaBackend(), "small")
    assert len(cupy.compiled) == 2
    assert path.read_bytes() == whole
    changed(path, "cut")
    short = cupy.cuda.nvrtc.getCUBIN
    cupy.cuda.nvrtc.getCUBIN = lambda program: short(program)[:-1]
    with pytest.raises(BackendError, match=r"NVRTC gave \d+ bytes of optim\.cu for sm_90, of \d+"):
        CHECKS["optimiser"].run(CudaBackend(), "small")


def test_a_driver_that_refuses_new_code_is_named(stand_in, monkeypatch):
    cupy = stand_in(driver=12040)

    def refuse(module, cubin):
        raise CUDADriverError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(StandInModule, "load", refuse)
    with pytest.raises(BackendError, match=r"knows CUDA 12\.4, does not load optim\.cu as NVRTC 13\.0 .*NO_BINARY"):
        CHECKS["optimiser"].run(CudaBackend(), "small")
    assert len(cupy.compiled) == 2


def test_a_folder_that_cannot_be_written_is_no_obstacle(stand_in, monkeypatch, tmp_path, caplog):
    """It costs one line, however many kernels are compiled."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDIFF_CACHE_DIR", str(tmp_path / "file"))
    cupy = stand_in()
    with caplog.at_level("WARNING"):
        for check in ("optimiser", "normals"):
            CHECKS[check].run(CudaBackend(), "small")
    assert len(cupy.compiled) == 2
    (record,) = caplog.records
    assert "are not kept" in record.getMessage()
    assert f"another folder than {tmp_path / 'file' / 'cuda'}" in record.getMessage()


def test_two_gpus_of_different_kinds(stand_in, tmp_path):
    """Each backend compiles for its own, and the code of both is kept."""
    for arch in ("90", "120", "90"):
        cupy = stand_in()
        be = CudaBackend()
        be.runtime.arch = arch
        CHECKS["optimiser"].run(be, "small")
    assert cupy.compiled == []  # the third found it
    kept = sorted(path.name.split("-")[1] for path in (tmp_path / "cuda").iterdir())
    assert kept == ["sm_120", "sm_90"]


def test_where_compiled_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTDIFF_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / "fastdiff" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / ".cache" / "fastdiff" / "cuda"


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r"needs CuPy: pip install 'fastdiff-engine\[cuda13\]'.*backend='cpu'"):
        CudaBackend()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driver": 0}, "needs an NVIDIA driver, and this machine has none.*backend='cpu'"),
        ({"driver": 12040, "devices": CUDARuntimeError(35)}, r"too old: it knows CUDA 12\.4, .* CUDA 13\.2; .*cuda12"),
        ({"devices": CUDARuntimeError(100)}, "needs an NVIDIA GPU, .*CUDA_VISIBLE_DEVICES"),
        ({"devices": 0}, "needs an NVIDIA GPU, .*CUDA_VISIBLE_DEVICES"),
        ({"devices": CUDARuntimeError(999)}, "CUDA does not start: status 999; backend='cpu'"),
    ],
)
def test_machines_without_a_usable_gpu(stand_in, options, message):
    stand_in(**options)
    with pytest.raises(BackendError, match=message):
        CudaBackend()


def test_out_of_device_memory(stand_in):
    stand_in()
    with pytest.raises(
        BackendError, match=r"on Stand-in: asked for 1\.638e\+04 GiB, 4 MiB of 80 GiB are free; a smaller batch"
    ):
        CudaBackend().empty((2**21, 2**21))


def test_out_of_device_memory_wherever_some_is_needed(stand_in):
    """Whatever allocates says how much it asked for: 1001 float32 values here, one more than there are."""
    cupy, be = stand_in(), CudaBackend()
    x, t = np.zeros((7, 143), np.float32), np.zeros(7, np.int64)
    schedule, net = fd.Schedule.cosine(5), fd.MLP(143, hidden=(4,), T=5)
    table, there = fd.samplers.ddpm(schedule), be.asarray(x)
    cupy.most = 1000
    for call in (
        lambda: be.empty(x.shape),
        lambda: be.asarray(x),
        lambda: be.runtime.matmul(be.empty((7, 1)), be.empty((1, 143)), there),
        lambda: fd.forward_noise(x, 3, schedule, backend=be),
        lambda: fd.forward_noise(there, 3, schedule, backend=be),
        lambda: fd.sample(net, table, n=7, backend=be),
        lambda: fd.sample(lambda x, t: x, table, initial=there, backend=be),
        lambda: be.mlp_forward(net.plan, be.asarray(net.flat[:1000]), Inputs(there, be.asarray(t, np.int64))),
        lambda: fd.Diffusion(fd.MLP(143, hidden=(), T=5), schedule, backend=be).fit(x, steps=1, progress=False),
    ):
        with pytest.raises(BackendError, match=r"^out of device memory on Stand-in: asked for .* a smaller batch"):
            call()


def test_compiler_errors_are_shown(stand_in):
    cupy = stand_in()

    def fail(program, options):
        raise RuntimeError("NVRTC_ERROR_COMPILATION")

    cupy.cuda.nvrtc.compileProgram = fail
    with pytest.raises(BackendError, match=r"(?s)noise.cu does not compile for sm_90 with NVRTC 13\.0.*the log"):
        CHECKS["normals"].run(CudaBackend(), "small")

    def missing():
        raise RuntimeError("libnvrtc.so")

    cupy.cuda.nvrtc.getVersion = missing
    with pytest.raises(BackendError, match="pip install nvidia-cuda-nvrtc"):
        CHECKS["normals"].run(CudaBackend(), "small")


def test_foreign_arrays_are_taken_in_or_refused(stand_in):
    stand_in()
    be = CudaBackend()
    here = be.asarray(np.ones((4, 4)))
    assert be.asarray(here) is here
    assert be.asarray(here[:, ::2]).flags.c_contiguous
    elsewhere = DeviceArray(np.ones((4, 4), np.float32), where=1)
    assert be.asarray(elsewhere).device.id == 0
    assert (be.owns(here), be.owns(elsewhere), be.owns(np.ones(3))) == (True, False, False)
    with pytest.raises(BackendError, match="out_nd is on GPU 1, and this backend works on GPU 0, Stand-in: bring it"):
        be.normal(elsewhere, Draw(0, 0))
    with pytest.raises(TypeError, match=r"out_nd is (list|ndarray), wants a CuPy array"):
        be.runtime.launch(
            "noise", "normal", 1, 1, (np.ones((4, 4), np.float32), 4, 4, 0, 0, 0, np.zeros(20, np.uint32))
        )


def test_large_shared_memory_is_announced_to_the_kernel(stand_in, monkeypatch):
    text = "FD_KERNEL large(float *x) { FD_SHARED(float, a); a[20000] = 3; x[0] = a[20000]; }"
    read = runtime._read
    monkeypatch.setattr(runtime, "_read", lambda name: text if name == "large.cu" else read(name))
    stand_in()
    be = CudaBackend()
    x = be.empty((1,))
    for size in (100_000, 90_000, 120_000):
        be.runtime.launch("large", "large", 1, 1, (x,), size)
        assert be.to_numpy(x) == 3
    assert be.runtime.attribute("large", "large", "MAX_DYNAMIC_SHARED_SIZE_BYTES") == 120_000
    assert be.runtime.attribute("large", "large", "LOCAL_SIZE_BYTES") == 0


@pytest.mark.parametrize(("shape", "groups"), [((1, 27, 27, 32), 4), ((1, 18, 18, 256), 8), ((1, 24, 24, 96), 32)])
def test_static_shared_memory_counts_too(stand_in, shape, groups):
    """Of a kernel whose dynamic shared memory alone would not have to be announced."""
    cupy, (x, y, dx), (gamma, beta, *grads) = stand_in(), np.ones((3, *shape), np.float32), np.ones((4, shape[-1]), "f")
    be, stats = CudaBackend(), np.empty((1, groups, 2), np.float32)
    x, y, dx, gamma, beta, stats, *grads = map(be.asarray, (x, y, dx, gamma, beta, stats, *grads))
    layer = Norm(x, Affine(gamma, beta), stats)
    be.norm(layer, y, eps=1e-5)
    be.norm_backward(layer, y, dx, Affine(*grads))
    assert {entry: cupy.host.static_shared["norm", entry] for entry in ("norm_forward", "norm_backward")} == {
        "norm_forward": 2048, "norm_backward": 8192,
    }  # fmt: skip


def test_the_cupy_runtime_survives_pickle(stand_in):
    stand_in()
    be = pickle.loads(pickle.dumps(CudaBackend()))
    assert be.runtime.device == "Stand-in"
    assert isinstance(be.runtime, runtime.Runtime)


# ------------------------------------------------------------------------------------------- one of several GPUs


@pytest.mark.parametrize(
    ("told", "devices", "used", "want"),
    [
        ({}, 4, 0, 0),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1, 0, 0),  # its engine shows it one
        ({"MPI_LOCALRANKID": "5"}, 4, 0, 1),
        ({"SLURM_LOCALID": "3"}, 4, 0, 3),
        ({"SLURM_LOCALID": "3"}, 4, 2, 2),  # somebody has chosen
    ],
)
def test_the_processes_of_a_launcher_share_the_gpus(stand_in, monkeypatch, told, devices, used, want):
    for name in runtime.LOCAL_NUMBERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    stand_in(devices=devices).used = used
    be = backends._shared.__wrapped__("cuda", None, "raw", "float32", True, "own")
    assert (be.runtime.device_id, be.runtime.place) == (want, f"0000:0{want}:00.0")


def test_nccl_of_cupy(stand_in, monkeypatch):
    stand_in()
    be = CudaBackend()
    assert be.runtime.nccl is None
    for available in (True, False):
        nccl = types.SimpleNamespace(available=available)
        monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(nccl=nccl))
        assert be.runtime.nccl is (nccl if available else None)
