"""The layers of the CUDA backend, but for convolutions: the laws they keep, beside the checks of parity."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest
from cuda_parity_layers import EPS, in_chunks, normals, unfilled
from host_cuda import ORDERS, HostRuntime, has_compiler
from tolerances import assert_close, assert_same_bits

from fastdiff.backends import get_backend
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda import conv as cuda_conv
from fastdiff.backends.cuda import layers as cuda_layers
from fastdiff.backends.cuda.layers import WHOLE, NormPlan, norm_plan
from fastdiff.backends.layers import Affine, Norm
from fastdiff.kernels.cuda import runtime
from fastdiff.noise import Draw, Stream

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

F32 = np.float32
NUMPY = get_backend("numpy")


@pytest.fixture(params=ORDERS)
def be(request):
    return CudaBackend(HostRuntime(request.param))


# ------------------------------------------------------------------------------------------- how a norm runs


def test_the_rule_of_a_norm():
    assert norm_plan(1024, 128, 32) == NormPlan(16, True, (512, 65536), (256, 65536), 512)
    assert norm_plan(64, 64, 8) == NormPlan(16, True, (64, 4096), (64, 4096), 512)
    assert norm_plan(4096, 64, 8) == NormPlan(16, True, None, None, 512)
    assert norm_plan(3, 10, 5) == NormPlan(10, False, (64, 256), (64, 256), 819)
    assert norm_plan(1, 5000, 1).rows == 1
    for pixels in (1, 7, 64, 1000, 70_000):
        for channels, groups in ((1, 1), (6, 2), (30, 2), (96, 8), (256, 32), (3000, 3)):
            plan = norm_plan(pixels, channels, groups)
            assert plan.bundle % (channels // groups) == 0
            assert plan.bundle // (channels // groups) <= 32
            for whole, most in ((plan.forward, 512), (plan.backward, 256)):
                assert whole is None or (whole[0] <= most and 4 * pixels * plan.bundle <= whole[1] <= WHOLE)


def test_numbers_are_those_of_the_kernels():
    sources = "norm.cu", "norm.cuh", "layer_norm.cu", "attention.cu", "pointwise.cu"
    norm, both_norms, layer_norm, attention, pointwise = map(runtime._read, sources)
    for text, name, value in (
        (norm, "MOST_THREADS", cuda_layers.THREADS), (both_norms, "AT_ONCE", cuda_layers.AT_ONCE),
        (layer_norm, "THREADS", cuda_layers.THREADS), (layer_norm, "MOST_ROWS", cuda_layers.MOST_ROWS),
        (pointwise, "SUM_COLUMNS", cuda_conv.COLUMNS),
        (attention, "THREADS", cuda_layers.THREADS), (attention, "SIDE", cuda_layers.SIDE),
        (attention, "TILE", cuda_layers.TILE), (attention, "DEPTH", cuda_layers.DEPTH),
        (pointwise, "CHUNK", cuda_layers.ERROR_CHUNK), (pointwise, "SUM_THREADS", cuda_conv.SUM_THREADS),
    ):  # fmt: skip
        assert re.search(rf"^#define {name} +{value}\b", text, re.M), name
    of_entries = [int(n) for n in re.findall(r"FD_BOUNDS\((\d+), \d+\) norm_", norm)]
    assert of_entries == [512, 512, 256]  # forward, joined, backward


@pytest.mark.parametrize("chunks", [False, True])
def test_the_variance_of_a_group_far_from_zero(be, chunks):
    """A mean of 1000 and a deviation of 1: two passes keep what a sum of squares would lose."""
    x, ones, zeros = normals(1, 1, 6, 7, 8) + F32(1000), np.ones(8, F32), np.zeros(8, F32)
    affine, want, want_stats = Affine(ones, zeros), np.empty(x.shape), np.empty((1, 2, 2))
    NUMPY.norm(Norm(x.astype(np.float64), affine, want_stats), want, eps=EPS)
    out, stats = unfilled(*x.shape), unfilled(1, 2, 2)
    with in_chunks() if chunks else contextlib.nullcontext():
        be.norm(Norm(x, affine, stats), out, eps=EPS)
    assert_close(stats[..., 1], want_stats[..., 1], terms=9)
    assert_close(out, want, scale=1000.0)


def test_the_variance_of_a_row_far_from_zero(be):
    x, ones, zeros = normals(1, 1, 2, 3, 200) + F32(1000), np.ones(200, F32), np.zeros(200, F32)
    affine, want, want_stats = Affine(ones, zeros), np.empty(x.shape), np.empty((1, 2, 3, 2))
    NUMPY.layer_norm(Norm(x.astype(np.float64), affine, want_stats), want, eps=EPS)
    out, stats = unfilled(*x.shape), unfilled(1, 2, 3, 2)
    be.layer_norm(Norm(x, affine, stats), out, eps=EPS)
    assert_close(stats[..., 1], want_stats[..., 1], terms=9)
    assert_close(out, want, scale=1000.0)


# ------------------------------------------------------------------------------------------- attention


def test_attention_of_scores_beyond_the_range_of_exp(be):
    qkv, out, log_sums = 60 * normals(1, 1, 30, 24), unfilled(1, 30, 8), unfilled(1, 1, 30)
    want, want_sums = np.empty(out.shape), np.empty(log_sums.shape)
    NUMPY.attention(qkv.astype(np.float64), want, want_sums, heads=1)
    be.attention(qkv, out, log_sums, heads=1)
    assert np.abs(log_sums).max() > 1000
    assert_close(log_sums, want_sums, terms=30)
    assert_close(out, want, terms=30, scale=8 * np.abs(want_sums).max())  # a score's rounding is an exponent's error


@pytest.mark.parametrize(("length", "channels", "heads"), [(35, 6, 2), (70, 70, 1)])
def test_the_rows_of_a_block_change_no_bits(length, channels, heads):
    """16 of them where there are more multiprocessors than larger tiles, else 32 or 64."""
    results = []
    for multiprocessors in (1, 1000):
        be = CudaBackend(HostRuntime("shuffled", multiprocessors=multiprocessors))
        qkv, dy = normals(1, 1, length, 3 * channels), normals(2, 1, length, channels)
        out, log_sums, dqkv = unfilled(*dy.shape), unfilled(1, heads, length), unfilled(*qkv.shape)
        be.attention(qkv, out, log_sums, heads=heads)
        be.attention_backward(dy, qkv, out, log_sums, dqkv, heads=heads)
        results.append((out, log_sums, dqkv, be._attend(out, heads, 1, 4)[2]))
    assert [shape // 10 for *_, shape in results] == [4, 1]
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        assert_same_bits(a, b)


# ------------------------------------------------------------------------------------------- values


def test_gelu_far_from_zero(be):
    """Where x^2 is beyond float32, and at infinity: 0 or x, and a slope of 0 or 1."""
    x, out, dx = np.array([-np.inf, -3e38, -1e20, -11, 11, 1e20, 3e38, np.inf, np.nan], F32), unfilled(9), unfilled(9)
    be.gelu(x, out)
    be.gelu_backward(np.ones(9, F32), x, dx)
    assert np.abs(out[:4]).max() < 1e-35
    assert_same_bits(out[4:], x[4:])
    assert np.abs(dx[:4]).max() < 1e-35
    assert_same_bits(dx[4:], np.array([1, 1, 1, 1, np.nan], F32))


def test_silu_is_near_and_ends_well(be):
    """Approximate powers and reciprocals are as far from the true ones here as on a GPU, on either side."""
    x = np.concatenate([np.linspace(-87, 87, 20_001), np.linspace(-1e-3, 1e-3, 501)]).astype(F32)
    out, wide = unfilled(x.size), x.astype(np.float64)
    be.silu(x, out)
    want = wide / (1 + np.exp(-wide))
    error = np.abs(out - want) / np.maximum(np.abs(want), 1e-300)
    assert 2.0**-23 < error.max() < 2.0**-21 + 2.0**-24
    assert_same_bits(out[x > 18], x[x > 18])
    x, out = np.array([-np.inf, -3e38, -1e4, 1e4, 3e38, np.inf, np.nan], F32), unfilled(7)
    be.silu(x, out)
    assert out[0] == -np.inf
    assert np.abs(out[1:3]).max() < 6
    assert_same_bits(out[3:], x[3:])


# ------------------------------------------------------------------------------------------- laws


def layers(be, rows):
    """Outputs of every layer for these images of a batch of 5, whose samples must not feel each other."""
    results = []

    def images(seed, *shape):
        return normals(seed, 5, *shape)[rows]

    def norms(height, width, c):
        x, dy, gamma, beta = images(1, height, width, c), images(2, height, width, c), normals(3, c), normals(4, c)
        n, affine = len(x), Affine(gamma, beta, images(5, 2 * c))
        out, dx, stats, dmodulation = unfilled(*x.shape), unfilled(*x.shape), unfilled(n, c // 4, 2), unfilled(n, 2 * c)
        layer = Norm(x, affine, stats, silu=True)
        be.norm(layer, out, eps=EPS)
        be.norm_backward(layer, dy, dx, Affine(*np.empty((2, c), F32), dmodulation))
        results.extend([out, dx, stats, dmodulation])

    norms(3, 4, 24)
    with in_chunks():
        norms(3, 5, 24)
    x, dy, gamma, beta = images(1, 3, 5, 24), images(2, 3, 5, 24), normals(3, 24), normals(4, 24)
    out, dx, stats, gelu = unfilled(*x.shape), unfilled(*x.shape), unfilled(*x.shape[:-1], 2), unfilled(*x.shape)
    layer = Norm(x, Affine(gamma, beta), stats)
    be.layer_norm(layer, out, eps=EPS)
    be.layer_norm_backward(layer, dy, dx, Affine(*np.empty((2, 24), F32)))
    be.gelu(x, gelu)
    results.extend([out, dx, stats, gelu])
    qkv, dy = images(1, 19, 24), images(2, 19, 8)
    out, log_sums, dqkv = unfilled(*dy.shape), unfilled(len(dy), 2, 19), unfilled(*qkv.shape)
    be.attention(qkv, out, log_sums, heads=2)
    be.attention_backward(dy, qkv, out, log_sums, dqkv, heads=2)
    x, dropped = images(1, 3, 5, 7), unfilled(*images(1, 3, 5, 7).shape)
    be.dropout(x, dropped, 0.2, 3, Draw(1, Stream.DROPOUT, 2, rows.start))
    return [*results, out, log_sums, dqkv, dropped]


def test_the_batch_changes_nothing():
    want = layers(CudaBackend(HostRuntime("shuffled", multiprocessors=1)), slice(0, 5))
    for multiprocessors in (2, 50):
        be = CudaBackend(HostRuntime("backward", multiprocessors=multiprocessors, block=64))
        parts = [layers(be, slice(*ends)) for ends in ((0, 1), (1, 4), (4, 5))]
        for whole, *split in zip(want, *parts, strict=True):
            assert_same_bits(np.concatenate(split), whole)


def test_no_images(be):
    """Nothing to compute, and gradients of parameters that are sums of nothing."""
    x, gamma, sums = np.empty((0, 3, 3, 4), F32), np.ones(4, F32), np.full((2, 4), np.nan, F32)
    stats, qkv, table = np.empty((0, 1, 2), F32), np.empty((0, 9, 12), F32), unfilled(3, 4)
    layer = Norm(x, Affine(gamma, gamma), stats, silu=True)
    be.norm(layer, x, eps=EPS)
    be.norm_backward(layer, x, x, Affine(*sums))
    rows, position, more = np.empty((0, 3, 3, 2), F32), unfilled(3, 3, 4), np.full((2, 4), np.nan, F32)
    layer = Norm(x, Affine(gamma, gamma), rows)
    be.layer_norm(layer, x, eps=EPS)
    be.layer_norm_backward(layer, x, x, Affine(*more))
    be.gelu(x, x)
    be.gelu_backward(x, x, x)
    be.offset(x, position, x)
    be.offset_backward(x, position)
    out, log_sums = np.empty((0, 9, 4), F32), np.empty((0, 1, 9), F32)
    be.attention(qkv, out, log_sums, heads=1)
    be.attention_backward(out, qkv, out, log_sums, qkv, heads=1)
    be.silu(x, x)
    be.silu_backward(x, x, x)
    be.add(x, x, x)
    be.concatenate(x, x, np.empty((0, 3, 3, 8), F32))
    be.dropout(x, x, 0.5, 0, Draw(0, Stream.DROPOUT))
    be.take_backward(np.empty((0, 4), F32), np.empty(0, np.int64), table)
    assert not sums.any()
    assert not more.any()
    assert not position.any()
    assert not table.any()
    loss = np.empty(1)
    be.squared_error(x, x, x, loss)
    assert np.isnan(loss)


def test_what_is_not_finite_stays_in_its_image(be):
    x, gamma = normals(1, 2, 3, 3, 8), np.ones(8, F32)
    x[0, 1, 1, 3] = np.nan
    out, stats = unfilled(*x.shape), unfilled(2, 2, 2)
    be.norm(Norm(x, Affine(gamma, gamma), stats, silu=True), out, eps=EPS)
    assert np.isnan(out[0, ..., :4]).all()
    assert np.isfinite(out[0, ..., 4:]).all()
    assert np.isfinite(out[1]).all()
    qkv, y, log_sums = normals(1, 2, 20, 12), unfilled(2, 20, 4), unfilled(2, 1, 20)
    qkv[0, 3, 1] = np.nan  # a query
    be.attention(qkv, y, log_sums, heads=1)
    assert np.isnan(y[0, 3]).all()
    assert np.isfinite(np.delete(y[0], 3, axis=0)).all()
    assert np.isfinite(y[1]).all()


def test_a_warm_operation_allocates_nothing(monkeypatch):
    here = HostRuntime()
    be, made, empty = CudaBackend(here), [], here.empty
    monkeypatch.setattr(here, "empty", lambda *args: made.append(args) or empty(*args))
    layers(be, slice(0, 5))
    assert made
    made.clear()
    layers(be, slice(0, 5))
    layers(be, slice(1, 3))
    assert not made
