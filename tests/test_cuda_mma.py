"""What kernels with tensor cores are made of, on the host run: matrix products of a warp, bf16, copies behind its back.

The same texts run on a GPU (tests/gpu), where the fragment layouts are those of the hardware.
"""

import zlib

import cuda_parity_conv_mma  # noqa: F401 - registers its checks
import numpy as np
import pytest
from cuda_parity import CHECKS
from host_cuda import ORDERS, HostRuntime, has_compiler
from test_cuda_host import needs_sanitizers, sanitized
from tolerances import assert_same_bits

from fastdiff.backends.cuda import CudaBackend
from fastdiff.kernels.cuda import runtime

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

F = np.float32

# Every warp: d (16, 16) += a (16, 16) b (16, 16). a_across: a is stored transposed; b_across: b is not.
PRODUCT = """
FD_KERNEL product(const uint32 *a, const uint32 *b, float *d, int a_across, int b_across) {
    FD_SHARED_ARRAY(bf16, shared, 3 * 512);
    const int lane = threadIdx.x % FD_WARP, warp = threadIdx.x / FD_WARP, i = lane / 8, j = lane % 8;
    bf16 *const as = shared + warp * 512, *const bs = as + 256;
    fd_cp_async16(as + lane * 8, a + warp * 128 + lane * 4, 16);
    fd_cp_async16(bs + lane * 8, b + warp * 128 + lane * 4, 16);
    fd_cp_async_commit();
    fd_cp_async_wait(0);
    fd_syncwarp();
    uint32 fa[4], fb[4];
    const int low = i % 2 * 8, high = i / 2 * 8;
    if (a_across) fd_ldmatrix_x4_trans(fa, as + (high + j) * 16 + low);
    else fd_ldmatrix_x4(fa, as + (low + j) * 16 + high);
    if (b_across) fd_ldmatrix_x4_trans(fb, bs + (low + j) * 16 + high);
    else fd_ldmatrix_x4(fb, bs + (high + j) * 16 + low);
    for (int n = 0; n < 2; n++) {
        float acc[4];
        for (int k = 0; k < 4; k++) acc[k] = d[warp * 256 + (lane / 4 + k / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + k % 2];
        fd_mma_m16n8k16(acc, fa, fb[2 * n], fb[2 * n + 1]);
        for (int k = 0; k < 4; k++) d[warp * 256 + (lane / 4 + k / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + k % 2] = acc[k];
    }
}
"""
# One fragment, or one address, is not where it belongs.
WRONG = {
    "a fragments": ("acc, fa,", "acc, turned,", "uint32 turned[4] = {fa[0], fa[2], fa[1], fa[3]};"),
    "b fragments": ("fb[2 * n], fb[2 * n + 1]", "fb[2 * n + 1], fb[2 * n]", ""),
    "b tiles": ("fb[2 * n], fb[2 * n + 1]", "fb[n], fb[n + 2]", ""),
    "a matrices": ("as + (low + j) * 16 + high", "as + (high + j) * 16 + low", ""),
    "b matrices": ("bs + (low + j) * 16 + high", "bs + (high + j) * 16 + low", ""),
    "a transposed": ("fd_ldmatrix_x4_trans(fa", "fd_ldmatrix_x4(fa", ""),
    "b transposed": ("fd_ldmatrix_x4_trans(fb", "fd_ldmatrix_x4(fb", ""),
    "accumulators": ("(lane / 4 + k / 2 * 8) * 16", "(lane / 4 + k % 2 * 8) * 16", ""),
}


@pytest.fixture
def run(monkeypatch):
    """Launch the only entry of a text in one block."""
    read, texts = runtime._read, {}
    monkeypatch.setattr(runtime, "_read", lambda name: texts.get(name) or read(name))

    def launch(text, block, *args, **how):
        name = f"text{zlib.crc32(text.encode())}"
        texts[f"{name}.cu"] = text
        (entry,) = runtime.entries(name)
        HostRuntime(**how).launch(name, entry, 1, block, args)

    return launch


def pairs(values):
    """Values that bf16 can hold, two in a uint32."""
    bits = np.ascontiguousarray(values, F).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16).view(np.uint32)


def products(run, text, a_across, b_across, **how):
    """What a text makes of whole numbers, and what it should; nothing is rounded on the way."""
    a, b, d = np.random.default_rng(0).integers(-9, 10, (3, 3, 16, 16)).astype(F)
    want = d + a @ b
    stored = (m.swapaxes(1, 2) if turn else m for m, turn in ((a, a_across), (b, not b_across)))
    run(text, 96, *(pairs(m) for m in stored), d, a_across, b_across, **how)
    return d, want


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("a_across", [0, 1])
@pytest.mark.parametrize("b_across", [0, 1])
def test_products(run, a_across, b_across, order):
    assert_same_bits(*products(run, PRODUCT, a_across, b_across, order=order))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layout_shows(run, name):
    old, new, declared = WRONG[name]
    assert old in PRODUCT
    text = PRODUCT.replace(old, new).replace("for (int n = 0", declared + "\nfor (int n = 0")
    results = [products(run, text, *across) for across in ((0, 0), (1, 1))]
    assert any((got != want).any() for got, want in results)


@pytest.mark.parametrize("cut", [False, True])
def test_sums_are_cut_where_that_is_asked_for(run, cut):
    """1.25 2^-24 is added to 1 and to -1: rounded, or cut off as tensor cores do."""
    a, b, d = np.zeros((3, 16, 16), F)
    a[:, 0], b[0], d[:8], d[8:] = 2.0**-12, 1.25 * 2.0**-12, 1, -1
    want = np.where(d == 1, 1 if cut else 1 + 2.0**-23, -1 if cut else 2.0**-24 - 1).astype(F)
    run(PRODUCT, 32, pairs(a), pairs(b.T), d, 0, 0, cut_sums=cut)
    assert_same_bits(d, want)
    assert_same_bits(*products(run, PRODUCT, 0, 1, cut_sums=cut))  # what needs no rounding


ON_TENSOR_CORES = [name for name, check in CHECKS.items() if any(source == "conv_mma" for source, _ in check.covers)]


@pytest.mark.parametrize("name", ON_TENSOR_CORES)
def test_bounds_hold_where_sums_are_cut(name):
    """They are stated for sums that are rounded, and must cover the others."""
    CHECKS[name].run(CudaBackend(HostRuntime(cut_sums=True)), "small")


ROUND = """
FD_KERNEL round_pairs(const float *x, uint32 *out, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = fd_bf16x2(x[2 * i], x[2 * i + 1]);
}
"""


def nearest_bf16(x):
    """The nearest bf16 of finite float32 values, of two as near the even one, in float64."""
    below = x.view(np.uint32) & np.uint32(0xFFFF0000)
    above = below + np.uint32(0x10000)
    with np.errstate(invalid="ignore"):
        low, high = (bits.view(F).astype(np.float64) for bits in (below, above))
    high = np.where(np.isinf(high), np.copysign(2.0**128, high), high)
    down, up = np.abs(x - low), np.abs(high - x)
    even = below & np.uint32(0x10000) == 0
    return np.where((down < up) | ((down == up) & even), below, above).view(F)


def test_rounding_to_nearest_even(run):
    bits = np.random.default_rng(1).integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    ties = (bits[:1000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    near = ties[:500] + np.repeat(np.array([1, -1], np.int32).view(np.uint32), 250)
    edges = [0, 0x80000000, 1, 0x7FFF, 0x8000, 0x8001, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0xFF7FFFFF]
    x = np.concatenate([bits, ties, near, np.array(edges, np.uint32)]).view(F)
    x = x[np.isfinite(x)]
    x = x[: len(x) // 2 * 2].copy()
    special = np.array([np.inf, -np.inf, np.nan, -np.nan], F)
    x = np.concatenate([x, special])
    out = np.zeros(len(x) // 2, np.uint32)
    run(ROUND, 64, x, out, len(out))
    got = (out.view(np.uint16).astype(np.uint32) << 16).view(F)
    assert_same_bits(got, np.concatenate([nearest_bf16(x[:-4]), special]))


# ------------------------------------------------------------------------------------------- copies

COPIES = """
FD_KERNEL copies(const float *from_n, float *out, int bytes) {
    FD_SHARED_ARRAY(float, shared, 32);
    float *const first = shared + 8 * threadIdx.x, *const second = first + 4;
    for (int i = 0; i < 8; i++) first[i] = 7;
    fd_cp_async16(first, from_n + 8 * threadIdx.x, 16);
    fd_cp_async_commit();
    fd_cp_async16(second, from_n + 8 * threadIdx.x + 4, bytes);
    out += 24 * threadIdx.x;
    for (int i = 0; i < 8; i++) out[i] = first[i];
    fd_cp_async_commit();
    fd_cp_async_wait(1);
    for (int i = 0; i < 8; i++) out[8 + i] = first[i];
    fd_cp_async_wait(0);
    for (int i = 0; i < 8; i++) out[16 + i] = first[i];
}
"""


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_copies_arrive_group_by_group_when_they_are_waited_for(run, count):
    values = np.arange(1, 33, dtype=F)
    out = np.zeros((4, 3, 8), F)
    run(COPIES, 4, values, out, 4 * count)
    values = values.reshape(4, 8)
    assert np.isnan(out[:, 0]).all()
    assert_same_bits(out[:, 1:, :4], np.stack([values[:, :4]] * 2, axis=1))
    assert np.isnan(out[:, 1, 4:]).all()
    assert_same_bits(out[:, 2, 4:], np.where(np.arange(4) < count, values[:, 4:], F(0)))


NEIGHBOURS = """
FD_KERNEL neighbours(const float *from_n, float *out) {
    FD_SHARED_ARRAY(float, shared, 256);
    fd_cp_async16(shared + 4 * threadIdx.x, from_n + 4 * threadIdx.x, 16);
    fd_cp_async_commit();
    fd_cp_async_wait(0);
    fd_syncthreads();
    for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = shared[4 * (63 - threadIdx.x) + i];
}
"""


def test_copies_of_other_threads_need_a_barrier(run):
    values = np.arange(256, dtype=F)
    want = values.reshape(64, 4)[::-1].ravel()
    for order in ORDERS:
        out = np.zeros(256, F)
        run(NEIGHBOURS, 64, values, out, order=order)
        assert_same_bits(out, want)
        for missing in ("fd_syncthreads();", "fd_cp_async_wait(0);", "fd_cp_async_commit();"):
            run(NEIGHBOURS.replace(missing, ""), 64, values, out, order=order)
            assert np.isnan(out).any(), missing


WRONG_COPIES = {
    "misaligned address": "fd_cp_async16(s, x + 1, 16)",
    "misaligned address ": "fd_cp_async16(s + 1, x, 16)",
    "misaligned address  ": "uint32 r[4]; fd_ldmatrix_x4(r, reinterpret_cast<bf16 *>(s) + threadIdx.x)",
    "heap-buffer-overflow": "fd_cp_async16(s, x + 8, 16)",
    "heap-buffer-overflow ": "fd_cp_async16(s + 128, x, 16)",
    "heap-buffer-overflow  ": "uint32 r[4]; fd_ldmatrix_x4(r, reinterpret_cast<bf16 *>(s) + 256 - threadIdx.x % 2 * 8)",
}


@needs_sanitizers
@pytest.mark.parametrize("message", WRONG_COPIES)
def test_sanitizers_see_wrong_addresses(message):
    text = f"""
    FD_KERNEL bad(const float *x) {{
        FD_SHARED_ARRAY(float, s, 128);
        (void)x;
        {WRONG_COPIES[message]};
        fd_cp_async_commit();
        fd_cp_async_wait(0);
    }}"""
    code = (
        "import numpy as np\nfrom host_cuda import HostRuntime\nfrom fastdiff.kernels.cuda import runtime\n"
        f"read, text = runtime._read, {text!r}\n"
        "runtime._read = lambda name: text if name == 'bad.cu' else read(name)\n"
        "HostRuntime().launch('bad', 'bad', 1, 32, (np.zeros(8, np.float32),))\n"
    )
    done = sanitized("-c", code)
    assert done.returncode != 0
    assert message.strip() in done.stderr
