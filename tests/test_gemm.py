"""The GEMM kernel against scalar chains of fused multiply-adds, bit for bit, on every width the host runs."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from fastdiff.kernels.cpu import gemm as module

CANARY = np.float32(-123.25)
HOST = module.host_width()
WIDTHS = [width for width in (16, 8, 4) if width <= HOST] + [0]
widths = pytest.mark.parametrize("width", WIDTHS)


@intrinsic
def fused(typingctx, a, b, c):
    f = types.float32
    return f(f, f, f), lambda context, builder, signature, args: builder.fma(*args)


@numba.njit
def rounded(a, b, c):
    return a * b + c


def _oracle(multiply_add):
    @numba.njit
    def oracle(c, a, b, accumulate):
        for i in range(c.shape[0]):
            for j in range(c.shape[1]):
                total = c[i, j] if accumulate else np.float32(0)
                for k in range(a.shape[1]):
                    total = multiply_add(a[i, k], b[k, j], total)
                c[i, j] = total

    return oracle


FUSED, ROUNDED = _oracle(fused), _oracle(rounded)


@functools.cache
def kernel(width):
    gemm = module.gemm if width == HOST else module.make_gemm(width)

    @numba.njit(nogil=True)
    def call(c, c_off, ldc, a, a_off, a_rs, a_cs, b, b_off, ldb, m, n, k, accumulate):
        gemm(c, c_off, ldc, a, a_off, a_rs, a_cs, b, b_off, ldb, m, n, k, accumulate)

    return call


def framed(values, transpose, pad, before, after, fill):
    """A matrix in a flat array full of `fill`: the array, its offset, the strides of rows and columns."""
    rows, columns = values.shape[::-1] if transpose else values.shape
    ld = columns + pad
    flat = np.full(before + max(rows * ld - pad, 0) + after, fill, np.float32)
    view = np.lib.stride_tricks.as_strided(flat[before:], (rows, columns), (4 * ld, 4))
    view[...] = values.T if transpose else values
    return flat, before, *((1, ld) if transpose else (ld, 1))


def check(width, a, b, c=None, transpose=False, pad=0, before=0, after=0):
    """Run the kernel and the oracle; compare all of C's array, surroundings included. Return C."""
    (m, k), n, accumulate = a.shape, b.shape[1], c is not None
    # Without accumulate, C's old values must not matter: NaN.
    start = c if accumulate else np.full((m, n), np.nan, np.float32)
    a_args = framed(a, transpose, pad, before, after, np.nan)
    b_args = framed(b, False, pad, before, after, np.nan)
    c_args = framed(start, False, pad, before, after, CANARY)
    wanted = start.copy()
    (FUSED if width else ROUNDED)(wanted, a, b, accumulate)
    wanted_flat = framed(wanted, False, pad, before, after, CANARY)[0]
    kernel(width)(*c_args[:3], *a_args, *b_args[:3], m, n, k, accumulate)
    np.testing.assert_array_equal(c_args[0].view(np.uint32), wanted_flat.view(np.uint32))
    return wanted


def normals(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def test_oracle_fuses():
    """(1 + e)^2 - (1 + 2e) is e^2 when fused, and 0 when the product is rounded."""
    e = np.float32(2.0**-12)
    a, b, c = np.full((1, 1), 1 + e), np.full((1, 1), 1 + e), np.full((1, 1), -(1 + 2 * e))
    for oracle, wanted in ((FUSED, e * e), (ROUNDED, 0)):
        total = c.copy()
        oracle(total, a, b, True)
        assert total.dtype == np.float32
        assert total[0, 0] == wanted


@widths
def test_every_tile(width):
    """All row tails and column tails, beyond one tile of rows, one panel and one long single row."""
    rng = np.random.default_rng(1)
    for m in range(14):
        for n in range(300 if m == 1 else 140):
            c = normals(rng, m, n) if (m + n) % 2 else None
            check(
                width,
                normals(rng, m, 3),
                normals(rng, 3, n),
                c,
                transpose=n % 3 == 0,
                pad=1,
                before=1,
                after=20,
            )


@widths
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 300), st.integers(0, 40)),
    frame=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 40)),
    transpose=st.booleans(),
    accumulate=st.booleans(),
    exponent=st.sampled_from([0, 18, -19, -22]),  # to products near overflow, subnormal, and zero
    seed=st.integers(0, 2**32),
)
def test_bits(width, sizes, frame, transpose, accumulate, exponent, seed):
    (m, n, k), rng = sizes, np.random.default_rng(seed)
    scale = np.float32(10.0**exponent)
    a, b, c = normals(rng, m, k) * scale, normals(rng, k, n) * scale, normals(rng, m, n) * scale
    a[rng.random(a.shape) < 0.1] = -0.0
    check(width, a, b, c if accumulate else None, transpose, *frame)


@widths
@pytest.mark.parametrize(("m", "n", "k"), [(128, 100, 50), (128, 200, 100), (50, 100, 128), (3, 50, 700)])
@pytest.mark.parametrize("transpose", [False, True])
def test_working_sizes(width, m, n, k, transpose):
    """The exact chain, and its error against float64 within the bound for k roundings."""
    rng = np.random.default_rng(2)
    a, b = normals(rng, m, k), normals(rng, k, n)
    c = check(width, a, b, transpose=transpose)
    wide = a.astype(np.float64) @ b.astype(np.float64)
    bound = (k + 1) * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    assert np.all(np.abs(c - wide) <= bound)


@widths
def test_bias(width):
    """That of `gemm` and the bias added to it, in every tile; nothing beside C is written."""
    with_bias = (module.gemm if width == HOST else module.make_gemm(width)).with_bias

    @numba.njit
    def call(c, ldc, a, b, bias, first, m, n, k):
        with_bias(c, 0, ldc, a, 0, k, 1, b, 0, n, m, n, k, bias, first)

    rng = np.random.default_rng(4)
    for m, n, k in itertools.product((1, 2, 5, 6, 13), (*range(1, 20), 50, 100, 129), (0, 1, 7)):
        a, b, bias = normals(rng, m, k), normals(rng, k, n), np.full(n + 2, np.nan, np.float32)
        bias[1:-1] = normals(rng, n)
        c = np.full((m, n + 1), CANARY)
        call(c.reshape(-1), n + 1, a.reshape(-1), b.reshape(-1), bias, 1, m, n, k)
        wanted = check(width, a, b) + bias[1:-1]
        np.testing.assert_array_equal(c[:, :-1].view(np.uint32), wanted.view(np.uint32))
        assert (c[:, -1] == CANARY).all()


@widths
def test_batch_law(width):
    """An element has the same bits alone, in any part of the rows and columns, and with k in pieces."""
    rng, call = np.random.default_rng(3), kernel(width)
    m, n, k = 128, 100, 200
    a, b = normals(rng, m * k), normals(rng, k * n)
    whole = np.empty(m * n, np.float32)
    call(whole, 0, n, a, 0, k, 1, b, 0, n, m, n, k, False)
    for cuts_m, cuts_n, cuts_k in [
        (range(m + 1), (0, n), (0, k)),
        ((0, 5, 6, 30, 37, m), (0, 1, 4, 50, 66, n), (0, k)),
        ((0, 64, m), (0, n), (0, 1, 2, 7, 100, k)),
        ((0, 1, 11, m), (0, 3, 47, n), (0, 0, 128, k)),
    ]:
        parts = np.full(m * n, np.nan, np.float32)
        for i, i_end in itertools.pairwise(cuts_m):
            for j, j_end in itertools.pairwise(cuts_n):
                for p, p_end in itertools.pairwise(cuts_k):
                    a_args, b_args = (a, i * k + p, k, 1), (b, p * n + j, n)
                    call(parts, i * n + j, n, *a_args, *b_args, i_end - i, j_end - j, p_end - p, p > 0)
        np.testing.assert_array_equal(parts.view(np.uint32), whole.view(np.uint32))


@pytest.mark.slow
@widths
def test_machine_code(width):
    """Packed fused multiply-adds of the full width; none at width 0."""
    fresh = numba.njit(error_model="numpy")(module.make_driver(width).py_func)  # cached code has no text
    fresh.compile(types.void(*module.DRIVER_ARGS))
    text = fresh.inspect_asm(module.DRIVER_ARGS)
    if width == 0:
        assert not re.search(r"vfn?m(add|sub)|\bfml[as]\b|\bfmadd\b|fmaf", text)
        return
    arm = r"\bfmla(\.4s\s|\s+v\d+\.4s)"
    pattern = arm if HOST == 4 else rf"vfmadd\d+ps\s.*%{ {16: 'z', 8: 'y', 4: 'x'}[width] }mm"
    _, rows, vectors, _ = module.TILES[width]
    assert len(re.findall(pattern, text)) >= rows * vectors
    assert "fmaf" not in text


def test_neon_code():
    """The NEON tile, compiled for aarch64 on any host: 24 packed multiply-adds in a loop without spills."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite has no aarch64 target")
    unit, pointer, i64 = ir.Module(), module.F32.as_pointer(), module.I64
    arguments = [pointer, i64, pointer, i64, i64, pointer, i64, i64, i64]
    function = ir.Function(unit, ir.FunctionType(ir.VoidType(), arguments), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    operands = *function.args[:-1], builder.trunc(function.args[-1], module.I1)
    module._emit_tile(builder, module.Rows(builder, 4, None, module._int(4)), True, 6, 4, operands)
    builder.ret_void()
    machine = target.create_target_machine(cpu="neoverse-n1", opt=3)
    text = machine.emit_assembly(llvm.parse_assembly(str(unit)))
    body = text[text.index("fmla") : text.rindex("fmla")]
    assert text.count("fmla") == 24
    assert "[sp" not in body


PROGRAM = """
import numba, numpy as np
from fastdiff.kernels.cpu.gemm import gemm

@numba.njit(cache=True)
def square(c, a, n):
    gemm(c, 0, n, a, 0, n, 1, a, 0, n, n, n, n, False)

a, c = np.arange(9, dtype=np.float32), np.empty(9, np.float32)
square(c, a, 3)
assert (c.reshape(3, 3) == a.reshape(3, 3) @ a.reshape(3, 3)).all()
print(sum(square.stats.cache_hits.values()), sum(gemm.driver.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_cached_caller_in_a_new_process(tmp_path):
    """A kernel that calls gemm is cached, and finds gemm's code when another process loads it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for wanted in ("0 0", "1 1"):
        command = [sys.executable, str(program)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout.strip()) == (0, wanted), run.stderr


GUARDED = """
import ctypes, mmap, numba, numpy as np
from fastdiff.kernels.cpu import gemm as module

libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

def before_guard(count, keep=[]):
    pages = -(-4 * count // page) + 2
    keep.append(mmap.mmap(-1, pages * page))
    whole = np.frombuffer(keep[-1], np.float32)
    assert libc.mprotect(whole.ctypes.data, page, 0) == 0
    assert libc.mprotect(whole.ctypes.data + (pages - 1) * page, page, 0) == 0
    end = (pages - 1) * page // 4
    return whole[end - count : end]

def run(width):
    gemm = module.make_gemm(width)

    with_bias = gemm.with_bias

    @numba.njit
    def call(c, a, rs, cs, b, bias, m, n, k):
        with_bias(c, 0, n, a, 0, rs, cs, b, 0, n, m, n, k, bias, 0)
        gemm(c, 0, n, a, 0, rs, cs, b, 0, n, m, n, k, False)
        gemm(c, 0, n, a, 0, rs, cs, b, 0, n, m, n, k, True)

    for m in (1, 2, 5, 7, 13):
        for n in (1, 2, 3, 5, 15, 17, 50, 100):
            for k in (0, 1, 9):
                c, a, b, bias = before_guard(m * n), before_guard(m * k), before_guard(k * n), before_guard(n)
                a[:], b[:] = 1, 1
                call(c, a, k, 1, b, bias, m, n, k)
                call(c, a, 1, m, b, bias, m, n, k)
                assert (c == 2 * k).all()

for width in %r:
    run(width)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_touches_nothing_outside():
    """Arrays end at a forbidden page: a stray access, even one whose value is unused, kills the process."""
    command = [sys.executable, "-c", GUARDED % WIDTHS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("wrong", ["dtype", "ndim", "layout", "readonly"])
def test_refuses_other_arrays(wrong):
    c = a = np.zeros(8, np.float32)
    if wrong == "dtype":
        a = a.astype(np.float64)
    elif wrong == "ndim":
        a = a.reshape(2, 4)
    elif wrong == "layout":
        a = a[::2]
    else:
        c = np.zeros(8, np.float32)
        c.flags.writeable = False
    with pytest.raises(TypingError, match="gemm"):
        kernel(HOST)(c, 0, 1, a, 0, 1, 1, a, 0, 1, 1, 1, 1, False)
