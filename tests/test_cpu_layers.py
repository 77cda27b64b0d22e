"""The layers of the CPU backend against the reference, and the laws they keep: bits, memory, vector code."""

from __future__ import annotations

import functools
import gc
import weakref
from functools import partial

import numba
import numpy as np
import pytest
from assembly import assert_packed
from cuda_parity_layers import same_of_parts, with_arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import SMALL, peak_of
from tolerances import WINOGRAD_ERROR, assert_close, assert_same_bits

from fastdiff.backends.cpu import CpuBackend, workers
from fastdiff.backends.cpu import conv as cpu_conv
from fastdiff.backends.layers import Affine, Conv, ConvShapes, LayerBackend, Norm
from fastdiff.backends.numpy import NumpyBackend
from fastdiff.kernels.cpu import (
    attention,
    conv,
    gemm,
    gemm_nested,
    layer_norm,
    linear,
    norm,
    pointwise,
    winograd,
    winograd_rows,
)
from fastdiff.kernels.cpu.gemm import host_width
from fastdiff.noise import Draw, Stream

CPU, REFERENCE = CpuBackend(threads=2), NumpyBackend()
F32, F64 = np.float32, np.float64
EPS = 1e-5


def normals(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(F32)


def unfilled(*shape):
    return np.full(shape, np.nan, F32)


def wide(value):
    return value.astype(F64) if isinstance(value, np.ndarray) and value.dtype == F32 else value


def of_run(filled, cast, value):
    return filled[value] if type(value) is int else cast(value)


def both(method, given_arrays, outputs, **options):
    """Run a layer on the CPU in float32 and as the reference in float64; return the outputs of both.

    In what is given a number stands for the output of this place.
    """
    results = []
    for be, cast in ((CPU, lambda value: value), (REFERENCE, wide)):
        filled = [cast(output).copy() for output in outputs]
        change = partial(of_run, filled, cast)
        arrays = [with_arrays(value, change) for value in given_arrays]
        named = {k: filled[v] if k.startswith("d") else cast(v) for k, v in options.items()}
        getattr(be, method)(*arrays, **named)
        results.append(filled)
    return results


# ------------------------------------------------------------------------------------------------ convolutions

SAME = Conv((3, 3), pad=(1, 1, 1, 1))
GEOMETRIES = {
    "3x3": SAME,
    "1x1": Conv(),
    "down, padded around": Conv((3, 3), (2, 2), (1, 1, 1, 1)),
    "down, padded behind": Conv((3, 3), (2, 2), (0, 1, 0, 1)),
    "up": Conv((3, 3), pad=(1, 1, 1, 1), up=(2, 2)),
    "curve": Conv((1, 3), pad=(0, 0, 1, 1)),
    "curve down": Conv((1, 3), (1, 2), (0, 0, 1, 1)),
    "curve up": Conv((1, 3), pad=(0, 0, 1, 1), up=(1, 2)),
    "odd": Conv((5, 4), (2, 3), (2, 0, 1, 3), (3, 2)),
    "gaps": Conv((2, 1), (3, 2)),
}
SHAPES = [(1, 5, 7, 3, 5), (3, 8, 8, 16, 70), (2, 1, 9, 4, 1), (9, 2, 2, 33, 32), (2, 20, 33, 2, 3), (5, 4, 4, 8, 130)]
SHAPES += [(6, 1, 1, 9, 8), (3, 1, 37, 130, 144), (1, 5, 70, 300, 40), (3, 11, 6, 17, 70), (7, 4, 5, 64, 130)]
SHAPES += [(5, 1, 117, 24, 132)]  # several blocks in each direction, along rows and in a linear layer


def assert_conv(geometry, shape, shifted, residual, add):
    n, height, width, c, k = shape
    rows, columns = geometry.size(height, width)
    if min(rows, columns) < 1:
        return
    x, w, b = normals(1, n, height, width, c), normals(2, *geometry.kernel, c, k), normals(3, k)
    extra = {"shift": normals(4, n, k) if shifted else None}
    extra["residual"] = normals(5, n, rows, columns, k) if residual else None
    terms = geometry.kernel[0] * geometry.kernel[1] * c * geometry.up[0] * geometry.up[1]
    (y,), (want,) = both("conv", [geometry, x, w, b, 0], [unfilled(n, rows, columns, k)], **extra)
    assert_close(y, want, terms=terms + 3)
    dy = normals(6, n, rows, columns, k)
    outputs = [normals(7, *x.shape) if add else unfilled(*x.shape), *(unfilled(*a.shape) for a in (w, b))]
    outputs += [unfilled(n, k)] * shifted
    dshift = {"dshift": 3} if shifted else {}
    got, want = both("conv_backward", [geometry, dy, x, w, 0, 1, 2], outputs, add=add, **dshift)
    sums = [terms // c * k, n * rows * columns, n * rows * columns, rows * columns]
    for array, wanted, count in zip(got, want, sums, strict=False):
        assert_close(array, wanted, terms=count + 1, scale=max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_agree_with_the_reference(name, shape):
    odd = len(name) + shape[0]
    assert_conv(GEOMETRIES[name], shape, odd % 2 == 0, odd % 3 == 0, odd % 2 == 1)


sizes, few = st.integers(1, 12), st.integers(1, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(few, few), st.tuples(few, few), st.tuples(*[st.integers(0, 3)] * 4), st.tuples(few, few),
    st.tuples(few, sizes, sizes, st.integers(1, 20), st.integers(1, 70)), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_convolution_agrees_with_the_reference(kernel, stride, pad, up, shape, shifted, residual, add):
    assert_conv(Conv(kernel, stride, pad, up), shape, shifted, residual, add)


def test_a_convolution_without_an_input_gradient():
    x, w, dy = normals(1, 2, 5, 5, 3), normals(2, 3, 3, 3, 4), normals(3, 2, 5, 5, 4)
    want, got = ([unfilled(*w.shape), unfilled(4)] for _ in range(2))
    CPU.conv_backward(SAME, dy, x, w, np.empty_like(x), *want)
    CPU.conv_backward(SAME, dy, x, w, None, *got)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_an_image_without_taps_is_its_bias():
    """All of the kernel lies in the padding."""
    assert_conv(Conv((1, 1), (4, 4), (1, 2, 1, 2)), (2, 1, 1, 3, 5), True, True, True)


WIDTHS = sorted({host_width(), 0})


@functools.cache
def products(width):
    """`gemm_nested`, and the same as products that accumulate."""
    nested = gemm_nested.gemm_nested if width == host_width() else gemm_nested.make_gemm_nested(width)
    plain = gemm.gemm if width == host_width() else gemm.make_gemm(width)

    @numba.njit
    def at_once(c, ldc, a, a_rs, a_cs, a_us, b, ldb, b_us, m, n, k, blocks):
        nested(c, 3, ldc, a, 2, a_rs, a_cs, a_us, b, 1, ldb, b_us, m, n, k, blocks)

    @numba.njit
    def in_turn(c, ldc, a, a_rs, a_cs, a_us, b, ldb, b_us, m, n, k, blocks):
        for u in range(blocks):
            plain(c, 3, ldc, a, 2 + u * a_us, a_rs, a_cs, b, 1 + u * b_us, ldb, m, n, k, True)

    return at_once, in_turn


@pytest.mark.parametrize("width", WIDTHS)
def test_a_nested_product_has_the_bits_of_its_parts_in_turn(width):
    """Every tile, rows along any direction, and nothing written around C."""
    at_once, in_turn = products(width)
    a, b = normals(1, 1000), normals(2, 3000)
    for m in (0, 1, 2, 3, 4, 5, 6, 7, 13):
        for n in (0, 1, 15, 16, 17, 33, 50, 64, 70, 130):
            for k, blocks in ((3, 2), (5, 1), (0, 2), (2, 0), (1, 4)):
                for a_rs, a_cs, a_us in ((40, 1, 7), (1, 20, 100)):
                    c = normals(3, 13 * 140 + 9)
                    got, want = c.copy(), c.copy()
                    for run, out in ((at_once, got), (in_turn, want)):
                        run(out, 140, a, a_rs, a_cs, a_us, b, 140, 700, m, n, k, blocks)
                    assert_same_bits(got, want)


# ------------------------------------------------------------------------------------------------ norm, attention


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 1, 3, 4), 2), ((3, 5, 7, 6), 3), ((2, 8, 8, 128), 8), ((2, 40, 33, 40), 8), ((1, 1, 40, 1500), 5),
     ((16, 1, 1, 64), 4), ((1, 70, 50, 17), 1)],
)  # fmt: skip
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_norm_agrees_with_the_reference(shape, groups, silu, modulated):
    n, height, width, c = shape
    x = normals(1, *shape) * np.float32(3) + np.float32(5)
    gamma, beta = normals(2, c), normals(3, c)
    affine = Affine(gamma, beta, normals(4, n, 2 * c) if modulated else None)
    outputs = [unfilled(*shape), unfilled(n, groups, 2)]
    (y, stats), (want, wanted_stats) = both("norm", [Norm(x, affine, 1, silu), 0], outputs, eps=EPS)
    assert_close(stats, wanted_stats, terms=9)
    assert_close(y, want, terms=9)
    dy, values = normals(5, *shape), height * width * c // groups
    for start in (unfilled(*shape), normals(6, *shape), dy):
        given_dy = 0 if start is dy else dy
        outputs = [start, unfilled(c), unfilled(c), *[unfilled(n, 2 * c)] * modulated]
        arrays = [Norm(x, affine, stats, silu), given_dy, 0, Affine(1, 2, 3 if modulated else None)]
        add = start is not dy and bool(np.isfinite(start).all())
        got, want = both("norm_backward", arrays, outputs, add=add)
        assert_close(got[0], want[0], terms=9 + values // 8)
        for a, b in zip(got[1:], want[1:], strict=True):
            assert_close(a, b, terms=9 + n * height * width)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 2, 5, 6), (2, 33, 31, 12), (5, 1, 700, 4), (2, 2, 2, 1030)])
@pytest.mark.parametrize("silu", [False, True])
def test_norm_tangent_agrees_with_the_reference(shape, silu):
    n, c = shape[0], shape[-1]
    x, dh, gamma, beta = normals(1, *shape), normals(2, *shape), normals(3, c), normals(4, c)
    stats, modulation, other = normals(5, n, 2, 2), normals(6, n, 2 * c), normals(7, n, 2 * c)
    for modulated, moves in ((None, None), (modulation, None), (modulation, other)):
        for moments in (stats, None) if not silu and moves is None else (stats,):
            layer, options = Norm(x, Affine(gamma, beta, modulated), moments, silu), {"modulation_tangent": moves}
            (got,), (want,) = both("norm_tangent", [layer, dh, 0], [unfilled(*shape)], **options)
            assert_close(got, want, terms=9)
            (same,), _ = both("norm_tangent", [layer, 0, 0], [dh], **options)
            assert_same_bits(same, got)


@pytest.mark.parametrize("shape", [(48, 48, 24), (9, 5, 1030), (70, 50, 17)])  # of several runs
def test_a_norm_of_one_image_is_that_of_many(shape):
    """Threads that take parts of an image give the bits of one that takes it whole."""
    x, affine = normals(1, 9, *shape) + F32(2), Affine(normals(2, shape[-1]), normals(3, shape[-1]))
    groups, results = 2 if shape[-1] % 2 == 0 else 1, []
    for threads in (1, 2, 3):
        be = CpuBackend(threads=threads)
        for parts in ([x], [x[:1], x[1:]]):
            found = [(unfilled(*part.shape), unfilled(len(part), groups, 2)) for part in parts]
            for part, (out, stats) in zip(parts, found, strict=True):
                be.norm(Norm(part, affine, stats, True), out, eps=EPS)
            results.append([np.concatenate(arrays) for arrays in zip(*found, strict=True)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


def test_the_variance_of_a_group_far_from_zero():
    """A mean of 1000 and a deviation of 1: two passes keep what a sum of squares would lose."""
    x = normals(1, 2, 64, 64, 8) + np.float32(1000)
    outputs = [unfilled(*x.shape), unfilled(2, 2, 2)]
    affine = Affine(np.ones(8, F32), np.zeros(8, F32))
    (_, stats), (_, want) = both("norm", [Norm(x, affine, 1), 0], outputs, eps=EPS)
    assert_close(stats[..., 1], want[..., 1], terms=9)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 11, 1, 7), (2, 8, 9, 16), (5, 33, 1, 130), (1, 1, 300, 2)])
def test_layer_norm_agrees_with_the_reference(shape):
    x, c, rows = normals(1, *shape) * F32(3) + F32(5), shape[-1], int(np.prod(shape[:-1]))
    gamma, beta = normals(2, c), normals(3, c)
    outputs = [unfilled(*shape), unfilled(*shape[:-1], 2)]
    (y, stats), (want, wanted_stats) = both("layer_norm", [Norm(x, Affine(gamma, beta), 1), 0], outputs, eps=EPS)
    r = wanted_stats[..., 1]
    assert_close(stats[..., 0], wanted_stats[..., 0], terms=9)
    assert_close(stats[..., 1], r, terms=9, scale=10 * r**2)  # x has this size, before the mean is subtracted
    assert_close(y, want, terms=9, scale=10 * r[..., None] * np.maximum(1, np.abs(gamma)))
    dy = normals(5, *shape)
    for start in (unfilled(*shape), normals(6, *shape), dy):  # filled, added to, in the place of dy
        arrays = [Norm(x, Affine(gamma, beta), stats), 0 if start is dy else dy, 0, Affine(1, 2)]
        add = start is not dy and bool(np.isfinite(start).all())
        got, want = both("layer_norm_backward", arrays, [start, unfilled(c), unfilled(c)], add=add)
        for array, wanted, terms in zip(got, want, (9 + c, 9 + rows, 9 + rows), strict=True):
            assert_close(array, wanted, terms=terms, scale=max(1, np.abs(wanted).max()))


def test_the_variance_of_a_row_far_from_zero():
    """A mean of 1000 and a deviation of 1: two passes keep what a sum of squares would lose."""
    x = normals(1, 2, 3, 5, 200) + F32(1000)
    outputs = [unfilled(*x.shape), unfilled(2, 3, 5, 2)]
    layer = Norm(x, Affine(np.ones(200, F32), np.zeros(200, F32)), 1)
    (out, stats), (want, wanted_stats) = both("layer_norm", [layer, 0], outputs, eps=EPS)
    assert_close(stats[..., 1], wanted_stats[..., 1], terms=9)
    assert_close(out, want, scale=1000.0)


@pytest.mark.parametrize(
    ("n", "length", "channels", "heads"), [(1, 1, 4, 2), (2, 64, 128, 4), (3, 70, 24, 3), (1, 200, 32, 1), (2, 5, 8, 8)]
)
def test_attention_agrees_with_the_reference(n, length, channels, heads):
    qkv = 2 * normals(1, n, length, 3 * channels)
    outputs = [unfilled(n, length, channels), unfilled(n, heads, length)]
    (out, log_sums), (want, wanted_sums) = both("attention", [qkv, 0, 1], outputs, heads=heads)
    terms = length + channels
    assert_close(log_sums, wanted_sums, terms=terms)
    assert_close(out, want, terms=terms)
    dy = normals(2, n, length, channels)
    (dqkv,), (want,) = both("attention_backward", [dy, qkv, out, log_sums, 0], [unfilled(*qkv.shape)], heads=heads)
    assert_close(dqkv, want, terms=2 * terms)
    arrays = [normals(3, *qkv.shape), qkv, out, log_sums, 0]
    (tangent,), (want,) = both("attention_tangent", arrays, [unfilled(*out.shape)], heads=heads)
    assert_close(tangent, want, terms=2 * terms, scale=3 * np.abs(qkv).max())  # dS and v have this size


def test_attention_of_scores_beyond_the_range_of_exp():
    qkv = 60 * normals(1, 1, 30, 24)
    outputs = [unfilled(1, 30, 8), unfilled(1, 1, 30)]
    (out, log_sums), (want, sums) = both("attention", [qkv, 0, 1], outputs, heads=1)
    assert np.abs(sums).max() > 1000
    assert_close(log_sums, sums, terms=30)
    assert_close(out, want, terms=30, scale=8 * np.abs(sums).max())  # rounding of a score is an exponent's error


@pytest.mark.parametrize("be", [CPU, REFERENCE], ids=lambda be: be.name)
@pytest.mark.parametrize("left", [1, 5])
def test_norms_of_parts(be, left):
    affine = Affine(normals(2, 6), normals(3, 6), normals(4, 3, 12))
    same_of_parts(be, Norm(normals(1, 3, 4, 5, 6), affine, unfilled(3, 2, 2), silu=True), left, be.asarray)


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 1, 1, 1), (2, 33, 32, 31)])
def test_the_small_layers_agree_with_the_reference(shape):
    x, y, z = normals(1, *shape), normals(2, *shape), normals(3, *shape[:-1], 5)
    for add in (False, True):
        for method in ("silu_backward", "gelu_backward"):
            (got,), (want,) = both(method, [y, x, 0], [normals(4, *shape)], add=add)
            assert_close(got, want, terms=9)
        outputs = [normals(5, *shape), unfilled(*z.shape)]
        got, want = both("split", [np.concatenate([x, z], axis=-1), 0, 1], outputs, add=add)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
    for method in ("silu", "gelu"):
        (got,), (want,) = both(method, [x, 0], [unfilled(*shape)])
        assert_close(got, want, terms=9)
    (got,), (want,) = both("offset", [x, y[0], 0], [unfilled(*shape)])
    assert_close(got, want)
    (got,), (want,) = both("offset_backward", [y, 0], [unfilled(*shape[1:])])
    assert_close(got, want, terms=len(y))
    (got,), _ = both("concatenate", [x, z, 0], [unfilled(*shape[:-1], shape[-1] + 5)])
    assert_same_bits(got, np.concatenate([x, z], axis=-1))
    total = unfilled(*shape)
    CPU.add(x, y, total)
    assert_same_bits(total, x + y)
    CPU.add(total, y, total)
    assert_same_bits(total, (x + y) + y)
    dy, wanted, loss, wanted_loss = unfilled(*shape), x.copy(), np.empty(1), np.empty(1)
    CPU.squared_error(x, y, dy, loss)
    REFERENCE.squared_error(x, y, wanted, wanted_loss)
    assert_close(loss, wanted_loss, dtype=F32)
    assert_same_bits(dy, wanted)


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("shape", [(3, 7, 5, 3), (1, 1, 1, 1), (65, 2, 3, 2), (2, 33, 65, 1)])
def test_a_loss_by_its_terms(shape, columns):
    random = np.random.default_rng(0)
    y = random.normal(size=(*shape[:-1], shape[-1] * (2 if columns > 1 else 1))).astype(F32)
    target, terms = random.normal(size=shape).astype(F32), random.normal(size=(shape[0], columns)).astype(F32)
    (dy, loss), (want, want_loss) = ((np.full(y.shape, np.nan, dtype), np.empty(1)) for dtype in (F32, np.float64))
    CPU.squared_error(y, target, dy, loss, terms)
    wide = (array.astype(np.float64) for array in (y, target, terms))
    y, target, terms = wide
    REFERENCE.squared_error(y, target, want, want_loss, terms)
    assert_close(loss, want_loss, dtype=F32, terms=20)
    assert_close(dy, want, terms=20)


def test_gelu_far_from_zero():
    """Where x^2 is beyond float32, and at infinity: 0 or x, and a slope of 0 or 1."""
    x, out, dx = np.array([-np.inf, -3e38, -1e20, -11, 11, 1e20, 3e38, np.inf, np.nan], F32), unfilled(9), unfilled(9)
    CPU.gelu(x, out)
    CPU.gelu_backward(np.ones(9, F32), x, dx)
    assert np.abs(out[:4]).max() < 1e-35
    assert_same_bits(out[4:], x[4:])
    assert np.abs(dx[:4]).max() < 1e-35
    assert_same_bits(dx[4:], np.array([1, 1, 1, 1, np.nan], F32))


def test_rows_of_tables():
    table, index = normals(1, 7, 11), np.array([3, 3, 0, 6, 2])
    for add in (False, True):
        (got,), (want,) = both("take", [table, index, 0], [normals(2, 5, 11)], add=add)
        assert_close(got, want)
    dy, got, want = normals(3, 5, 11), unfilled(7, 11), np.empty((7, 11), F32)
    CPU.take_backward(dy, index, got)
    REFERENCE.take_backward(dy, index, want)
    assert_same_bits(got, want)


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 1, 1, 3), (2, 33, 32, 31)])
@pytest.mark.parametrize(("first_block", "first_sample"), [(0, 0), (7, 2**33 + 5)])
def test_dropout_has_the_bits_of_the_reference(shape, first_block, first_sample):
    x, got, want = normals(1, *shape), unfilled(*shape), unfilled(*shape)
    for be, out in ((CPU, got), (REFERENCE, want)):
        be.dropout(x, out, 0.3, first_block, Draw(5, Stream.DROPOUT, 9, first_sample))
    assert_same_bits(got, want)


# ------------------------------------------------------------------------------------------------ laws


def layers(be, rows, whole=False):
    """Outputs of every layer for these images of a batch of 7, whose samples must not feel each other.

    With `whole`, gradients of parameters as well: sums over the batch.
    """
    results = []

    def keep(*arrays):
        results.extend(array.copy() for array in arrays)

    def images(seed, *shape):
        return normals(seed, 7, *shape)[rows]

    for geometry, (height, width, c, k) in (
        (SAME, (20, 16, 24, 40)), (SAME, (8, 8, 64, 70)), (SAME, (2, 3, 40, 40)), (Conv(), (16, 16, 40, 48)),
        (Conv(), (1, 1, 300, 200)), (GEOMETRIES["up"], (8, 8, 20, 24)),
        (GEOMETRIES["down, padded behind"], (16, 16, 8, 9)), (GEOMETRIES["curve"], (1, 37, 32, 48)),
        (GEOMETRIES["curve"], (1, 16, 130, 144)), (GEOMETRIES["curve"], (1, 75, 140, 136)),
        (Conv(), (1, 2, 150, 260)), (Conv(), (1, 75, 140, 136)),
    ):  # fmt: skip
        x, w, b = images(1, height, width, c), normals(2, *geometry.kernel, c, k), normals(3, k)
        n, size = len(x), geometry.size(height, width)
        y, dx, dw, db, dshift = (
            unfilled(n, *size, k),
            unfilled(*x.shape),
            np.empty_like(w),
            np.empty_like(b),
            unfilled(n, k),
        )
        be.conv(geometry, x, w, b, y, shift=images(4, k), residual=images(5, *size, k))
        be.conv_backward(geometry, images(6, *size, k), x, w, dx, dw, db, dshift=dshift)
        keep(y, dx, dshift, *([dw, db] if whole else []))
    for height, width, c in ((32, 20, 32), (3, 3, 16)):
        x, dy, gamma, beta = images(1, height, width, c), images(2, height, width, c), normals(3, c), normals(4, c)
        out, dx, stats, dmodulation = (
            unfilled(*x.shape),
            unfilled(*x.shape),
            unfilled(len(x), 4, 2),
            unfilled(len(x), 2 * c),
        )
        sums = np.empty_like(gamma), np.empty_like(beta)
        layer = Norm(x, Affine(gamma, beta, images(5, 2 * c)), stats, silu=True)
        be.norm(layer, out, eps=EPS)
        be.norm_backward(layer, dy, dx, Affine(*sums, dmodulation))
        keep(out, dx, stats, dmodulation, *(sums if whole else []))
    for height, width, c in ((20, 15, 48), (1, 1, 7)):
        x, dy, gamma, beta = images(1, height, width, c), images(2, height, width, c), normals(3, c), normals(4, c)
        out, dx, stats, sums = (
            unfilled(*x.shape),
            unfilled(*x.shape),
            unfilled(len(x), height, width, 2),
            normals(5, 2, c),
        )
        layer = Norm(x, Affine(gamma, beta), stats)
        be.layer_norm(layer, out, eps=EPS)
        be.layer_norm_backward(layer, dy, dx, Affine(*sums))
        keep(out, dx, stats, *(sums if whole else []))
    for length, channels in ((100, 32), (6, 8)):
        qkv, dy = images(1, length, 3 * channels), images(2, length, channels)
        out, log_sums, dqkv = unfilled(*dy.shape), unfilled(len(dy), 2, length), unfilled(*qkv.shape)
        be.attention(qkv, out, log_sums, heads=2)
        be.attention_backward(dy, qkv, out, log_sums, dqkv, heads=2)
        tangent = unfilled(*dy.shape)
        be.attention_tangent(images(3, length, 3 * channels), qkv, out, log_sums, tangent, heads=2)
        keep(out, log_sums, dqkv, tangent)
    x, y, z = images(1, 40, 40, 16), images(2, 40, 40, 16), images(3, 40, 40, 5)
    out, joined = unfilled(*x.shape), unfilled(*x.shape[:-1], 21)
    for method in (be.silu, be.gelu):
        method(x, out)
        keep(out)
    for method in (be.silu_backward, be.gelu_backward, be.add):
        method(y, x, out)
        keep(out)
    be.offset(x, normals(6, 40, 40, 16), out)
    keep(out)
    be.dropout(x, out, 0.2, 3, Draw(1, Stream.DROPOUT, 2, rows.start))
    be.concatenate(x, z, joined)
    keep(out, joined)
    be.split(joined, out, z)
    keep(out, z)
    if whole:
        loss = np.empty(1)
        be.offset_backward(x, out[0])
        keep(out[0])
        be.squared_error(x, y, out, loss)
        keep(out, loss)
        doubled, terms = images(7, 40, 40, 32), images(8, 6)
        slopes = unfilled(*doubled.shape)
        be.squared_error(doubled, x, slopes, loss, terms)
        keep(slopes, loss)
        be.squared_error(y, x, out, loss, terms[:, :1].copy())
        keep(out, loss)
    return results


@pytest.fixture
def many_pieces(monkeypatch):
    """Every job is shared out among the threads, however small."""
    monkeypatch.setattr(workers, "MIN_WORK", 1)


@pytest.mark.parametrize("name", ["3x3", "curve"])
@pytest.mark.parametrize(("c", "k"), [(16, 48), (64, 64), (100, 33), (160, 130)])
def test_winograd_is_nearly_as_exact_as_the_plain_product(c, k, name, monkeypatch):
    """Its error in the norm, against float64, is a small multiple of that of one product after another."""
    geometry, height = GEOMETRIES[name], 12 if name == "3x3" else 1
    x, w, dy = normals(1, 3, height, 12, c), normals(2, *geometry.kernel, c, k), normals(3, 3, height, 12, k)
    b = np.zeros(k, F32)
    monkeypatch.setattr(cpu_conv, "_product", cpu_conv._Product)  # not kept
    errors = []
    for least in (1, 1000):
        monkeypatch.setattr(cpu_conv, "LEAST_CHANNELS", least)
        (y,), (want,) = both("conv", (geometry, x, w, b, 0), (unfilled(*dy.shape),))
        grads, wants = both("conv_backward", (geometry, dy, x, w, 0, 1, 2), (x * 0, w * 0, b))
        pairs = zip((y, *grads[:2]), (want, *wants[:2]), strict=True)
        errors.append([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])
    for by_winograd, plain in zip(*errors, strict=True):
        assert by_winograd < WINOGRAD_ERROR
        assert plain < by_winograd  # it did run


@pytest.mark.parametrize(("name", "k", "times"), [("3x3", 24, 4), ("up", 24, 1.7), ("up", 130, 1.7)])
def test_forms_are_kept_while_nothing_changes_the_weights(name, k, times, monkeypatch):
    """Of what is done once; what is written down reads the weights. Large ones stay as they are; no bit changes."""
    x, b, same = normals(1, 2, 9, 6, 20), normals(2, k), GEOMETRIES[name]
    weights, shape = [normals(seed, *same.kernel, 20, k) for seed in (3, 4)], (2, *same.size(9, 6), k)
    convs = [ConvShapes(same, x.shape, shape)] * 2  # forms of them suit any batch
    lone = [ConvShapes(same, (1, 1, 6, 20), (1, *same.size(1, 6), k))] * 2

    def outputs(forms):
        out = unfilled(*shape)
        for form in forms:
            CPU.conv(same, x, form, b, out, residual=None if form is forms[0] else out.copy())
        return out

    want, prepared = outputs(weights), CPU.prepare(convs, backward=False)
    kept = [form for form, _ in prepared.run(weights)]
    assert all(form.ndim == 1 and form.size > times * w.size for form, w in zip(kept, weights, strict=True))
    assert_same_bits(outputs(kept), want)
    assert_same_bits(outputs([form for form, _ in CPU.prepare(lone, backward=False).run(weights)]), want)
    weights[0] += 1  # the forms are those of before
    assert_same_bits(outputs(kept), want)
    assert not np.array_equal(outputs(weights), want)
    given = []
    CPU.record(lambda: given.extend(form for form, _ in prepared.run(weights))).run()
    assert all(form is w for form, w in zip(given, weights, strict=True))
    assert CPU.prepare(convs, backward=True).run(weights)[0][0] is weights[0]
    monkeypatch.setattr(cpu_conv, "KEPT_BYTES", 5 * kept[0].nbytes // 4)
    one, other = CPU.prepare(convs, backward=False).run(weights)
    assert one[0] is not weights[0]
    assert other[0] is weights[1]


def test_the_transforms_are_those_of_the_formula():
    """A^T, G and B^T from the points, as matrices; what the kernels do to unit vectors, row by row."""
    points = np.array([0, winograd.A, -winograd.A, winograd.B, -winograd.B])
    outputs = np.vstack([points[:, None] ** np.arange(4), [0, 0, 0, 1]])
    taps = points[:, None] ** np.arange(3) / [[np.prod([p - q for q in points if q != p])] for p in points]
    inputs = np.zeros((6, 6))
    for i, p in enumerate(points):
        inputs[i, :5] = np.poly([q for q in points if q != p])[::-1]
    inputs[5] = np.poly(points)[::-1]
    matrices = {
        "inputs": (winograd.inputs_tile, inputs), "outputs": (winograd.outputs_tile, outputs.T),
        "gradients": (winograd.gradients_tile, outputs), "taps": (winograd.taps_tile, np.vstack([taps, [0, 0, 1]])),
        "weights": (winograd.weights_tile, np.vstack([taps, [0, 0, 1]]).T),
    }  # fmt: skip
    along_rows = {
        "inputs": winograd_rows.inputs_line, "gradients": winograd_rows.gradients_line,
        "taps": winograd_rows.taps_line, "weights": winograd_rows.weights_line,
    }  # fmt: skip
    for transform, matrix in matrices.values():
        m, n = matrix.shape
        source, target = np.random.default_rng(0).normal(size=(n, n, 3)).astype(F32), np.zeros((m, m, 3), F32)
        run_transform(transform)(source.reshape(-1), 3 * n, target.reshape(-1), 3 * m)
        assert_close(target, np.einsum("in,jk,nkc->ijc", matrix, matrix, source.astype(F64)), scale=10, dtype=F32)
    for kind, transform in along_rows.items():
        m, n = (matrix := matrices[kind][1]).shape
        source, target = np.random.default_rng(0).normal(size=(n, 3)).astype(F32), np.zeros((m, 3), F32)
        run_transform(transform)(source.reshape(-1), 0, target.reshape(-1), 0)
        assert_close(target, matrix @ source.astype(F64), scale=10, dtype=F32)


@pytest.mark.parametrize("width", range(1, 11))
def test_short_rows_are_convolved_the_cheaper_way(width):
    """Six products for a tile, or one for each tap inside the row."""
    product = cpu_conv._Product(GEOMETRIES["curve"], (1, 1, width, 16), 16, False)
    assert product.by_rows == (6 * -(-width // 4) < 3 * width - 2)


def run_transform(transform):
    @numba.njit
    def run(source, row, target, out_row):
        transform(source, 0, row, 3, 3, target, 0, out_row, 3)

    return run


@pytest.mark.usefixtures("many_pieces")
def test_the_number_of_threads_changes_nothing():
    want = layers(CpuBackend(threads=1), slice(0, 7), whole=True)
    for threads in (2, 3):
        for a, b in zip(layers(CpuBackend(threads=threads), slice(0, 7), whole=True), want, strict=True):
            assert_same_bits(a, b)


@pytest.mark.usefixtures("many_pieces")
def test_the_batch_changes_nothing():
    want = layers(CPU, slice(0, 7))
    parts = [layers(CpuBackend(threads=3), slice(*ends)) for ends in ((0, 1), (1, 5), (5, 7))]
    for whole, *split in zip(want, *parts, strict=True):
        assert_same_bits(np.concatenate(split), whole)


def test_a_recording_follows_the_values_of_arrays():
    x, y, calls = normals(1, 500), unfilled(500), []

    def body():
        CPU.silu(x, y)
        CPU.add(y, x, y)
        calls.append(1)

    recording = CPU.record(body)
    for seed in (1, 1, 2, 1):
        x[:] = normals(seed, 500)
        recording.run()
        want = unfilled(500)
        REFERENCE.silu(x, want)
        assert_close(y, want + x, scale=4)
    assert len(calls) == 1


def test_a_recording_keeps_its_arrays_but_not_those_of_its_places():
    x, y = normals(1, 500), unfilled(500)
    recording = CPU.record(functools.partial(CPU.silu, x, y), [x])
    recording.run()
    gone, kept = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert gone() is None
    assert kept() is not None


def test_a_failure_while_writing_down_leaves_nothing_behind():
    x, y = normals(1, 500), unfilled(500)
    with pytest.raises(TypeError, match="contiguous"):
        CPU.record(
            lambda: (
                CPU.attention(normals(1, 2, 3, 9)[:, :2], normals(2, 2, 3, 3), y, heads=1)
                or CPU._do([(pointwise.add_range, (x[::2], x, y), 9, 1.0)])
            )
        ).run()
    CPU.silu(x, y)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("name", ["3x3", "1x1", "curve"])
def test_no_images_are_convolved(name):
    """Nothing to compute, and gradients of parameters that are sums of nothing."""
    geometry, height = GEOMETRIES[name], 1 if name == "curve" else 9
    x, y, w = np.empty((0, height, 9, 16), F32), np.empty((0, height, 9, 20), F32), normals(1, *geometry.kernel, 16, 20)
    dw, db = unfilled(*w.shape), unfilled(20)
    CPU.conv(geometry, x, w, db, y)
    CPU.conv_backward(geometry, y, x, w, x.copy(), dw, db)
    assert not dw.any()
    assert not db.any()


def test_no_images():
    """Nothing to compute, and gradients of parameters that are sums of nothing."""
    x, w, dw, db = np.empty((0, 5, 5, 3), F32), normals(1, 3, 3, 3, 4), unfilled(3, 3, 3, 4), unfilled(4)
    y = np.empty((0, 5, 5, 4), F32)
    CPU.conv(SAME, x, w, db, y)
    CPU.conv_backward(SAME, y, x, w, x.copy(), dw, db)
    assert not dw.any()
    assert not db.any()
    gamma, sums, position = np.ones(3, F32), normals(2, 2, 3), unfilled(5, 5, 3)
    stats = np.empty((0, 5, 5, 2), F32)
    layer = Norm(x, Affine(gamma, gamma), stats)
    CPU.layer_norm(layer, x.copy(), eps=EPS)
    CPU.layer_norm_backward(layer, x, x.copy(), Affine(*sums))
    CPU.offset_backward(x, position)
    assert not sums.any()
    assert not position.any()


def test_the_protocol_is_complete():
    assert isinstance(CPU, LayerBackend)


def test_warm_layers_allocate_no_arrays():
    x, dy, dx, y, residual = (normals(seed, 4, 16, 16, 32) for seed in range(5))
    w, dw, v = normals(1, 3, 3, 32, 32), normals(2, 3, 3, 32, 32), [normals(seed, 32) for seed in range(4)]
    up, dup, more = GEOMETRIES["up"], normals(1, 4, 32, 32, 32), normals(2, 4, 16, 16, 64)
    stats, qkv, dqkv = normals(1, 4, 8, 2), normals(2, 4, 256, 96), normals(3, 4, 256, 96)
    flat, log_sums, index = (a.reshape(4, 256, 32) for a in (y, dy)), normals(4, 4, 2, 256), np.array([1, 0, 1, 2])
    out, dout = flat
    v_rows, shift, loss, rows = normals(5, 4, 32), normals(6, 4, 32), np.empty(1), normals(7, 4, 16, 16, 2)
    group_norm, row_norm = Norm(x, Affine(v[0], v[1]), stats, silu=True), Norm(x, Affine(v[0], v[1]), rows)

    def work():
        CPU.conv(SAME, x, w, v[0], y, shift=shift, residual=residual)
        CPU.conv_backward(SAME, dy, x, w, dx, dw, v[1])
        CPU.conv(up, x, w, v[0], dup)
        CPU.conv_backward(up, dup, x, w, dx, dw, v[1])
        CPU.norm(group_norm, y, eps=EPS)
        CPU.norm_backward(group_norm, dy, dx, Affine(v[2], v[3]))
        CPU.attention(qkv, out, log_sums, heads=2)
        CPU.attention_backward(dout, qkv, out, log_sums, dqkv, heads=2)
        CPU.silu(x, y)
        CPU.silu_backward(dy, x, dx)
        CPU.layer_norm(row_norm, y, eps=EPS)
        CPU.layer_norm_backward(row_norm, dy, dx, Affine(v[2], v[3]))
        CPU.gelu(x, y)
        CPU.gelu_backward(dy, x, dx)
        CPU.offset(x, y[0], dx)
        CPU.offset_backward(dy, y[0])
        CPU.add(x, y, y)
        CPU.concatenate(x, y, more)
        CPU.split(more, dx, residual)
        CPU.dropout(x, y, 0.1, 0, Draw(0, Stream.DROPOUT))
        CPU.take(dw.reshape(-1, 32), index, v_rows)
        CPU.take_backward(v_rows, index, dw.reshape(-1, 32))
        CPU.squared_error(y, x, dx, loss)

    recording = CPU.record(work)
    recording.run()
    assert peak_of(recording.run) < SMALL


N = 64


def hot_kernels():
    """Name: (kernel, arguments, packed operations that its loops must hold)."""
    x, y, z, u, v = (np.ones(16 * N, F32) for _ in range(5))
    rows, totals, nothing, one = np.ones((norm.LANES, 16 * N), F32), np.ones((2, N)), np.empty(0, F32), np.ones(N, F32)
    many = ["multiply", "add"]
    normed = norm.Norm(one, one, nothing, u, 4, True)
    return {
        "start of a convolution": (conv._start, (x, 16, 0, 16, N, one, nothing, z, u), ["add"]),
        "start of a linear layer": (linear._start, (x, 0, 4, 2, 0, N, N, one, nothing, z, u), ["add"]),
        "sums over pixels": (conv.pixel_sums_range, (0, 1, x, 16, N, y, u), ["add"]),
        "moments": (norm._moments, (x, normed, 16 * N, y, z, totals[0], np.ones(8)), many),
        "norm": (
            norm.norm_range,
            (0, 1, x, normed, y, 16, np.array([EPS]), np.ones(8), rows, totals),
            [*many, "divide"],
        ),
        "norm backward": (
            norm.norm_backward_range,
            (0, 1, x, y, normed, z, v, 16, False, rows, totals, np.ones(16 * N, F32)),
            [*many, "divide"],
        ),
        "softmax": (attention.attention_range, (0, 1, x, y, z, 1, 4, 1, u, v, np.ones((2, attention.TILE), F32)), many),
        "LayerNorm": (layer_norm.layer_norm_range, (0, 2, x, one, one, y, z, np.array([EPS], F32), u), many),
        "LayerNorm backward": (
            layer_norm.layer_norm_backward_range, (0, 1, 2, x, y, one, z[:4], u, v[:N], v[N:], False, rows), many,
        ),
        "GELU": (pointwise.gelu_range, (0, N, x, y), [*many, "divide"]),
        "GELU backward": (pointwise.gelu_backward_range, (0, N, x, y, z, False), [*many, "divide"]),
        "SiLU": (pointwise.silu_range, (0, N, x, y), [*many, "divide"]),
        "SiLU backward": (pointwise.silu_backward_range, (0, N, x, y, z, False), [*many, "divide"]),
        "sum": (pointwise.add_range, (0, N, x, y, z), ["add"]),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", hot_kernels())
def test_hot_kernels_are_vectorised(name):
    assert_packed(*hot_kernels()[name])
