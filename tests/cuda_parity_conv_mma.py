"""The parity checks of convolutions on tensor cores: they run on any runtime.

What is multiplied is rounded to bf16, so there are two references: the formula on rounded values, which must agree up
to the rounding of float32 sums, and the formula itself, up to that of bf16.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import NamedTuple
from unittest import mock

import numpy as np
from cuda_parity import NUMPY, both_ways, covers
from tolerances import assert_close, assert_close_in_bf16, assert_same_bits

from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda import conv_mma as cuda_conv_mma
from fastdiff.backends.cuda.conv import product
from fastdiff.backends.cuda.conv_mma import TILES
from fastdiff.backends.layers import Conv, ConvShapes

F = np.float32


class Case(NamedTuple):
    """A convolution of `shape` (N, H, W, C) to `outputs` channels."""

    geometry: Conv
    shape: tuple[int, int, int, int]
    outputs: int


SAME = Conv((3, 3), pad=(1, 1, 1, 1))
# Channels that are no multiple of 4, 8, 16 or 32; phases without taps; repeated values under large strides.
CASES = {
    "small": [
        Case(SAME, (3, 5, 6, 35), 20),
        Case(Conv((3, 3), (2, 2), (0, 1, 0, 1)), (2, 7, 6, 4), 10),
        Case(Conv((3, 3), pad=(1, 1, 1, 1), up=(2, 2)), (2, 3, 4, 6), 3),
        Case(Conv(), (5, 1, 1, 36), 40),
        Case(Conv((1, 3), (1, 2), (0, 0, 1, 1)), (2, 1, 11, 8), 36),
        Case(Conv(stride=(2, 2)), (2, 5, 5, 3), 8),
        Case(Conv((2, 5), (2, 3), (1, 0, 2, 1), (3, 2)), (1, 3, 4, 2), 2),
    ],
    "full": [
        Case(SAME, (16, 32, 32, 64), 128),
        Case(SAME, (5, 33, 31, 3), 32),
        Case(SAME, (3, 4, 4, 256), 130),
        Case(Conv((3, 3), (2, 2), (0, 1, 0, 1)), (8, 32, 32, 96), 96),
        Case(Conv((3, 3), pad=(1, 1, 1, 1), up=(2, 2)), (8, 9, 8, 128), 64),
        Case(Conv(), (300, 1, 1, 128), 512),
        Case(Conv((1, 3), (1, 2), (0, 0, 1, 1)), (4, 1, 3001, 32), 64),
        Case(Conv((7, 7), (2, 2), (3, 3, 3, 3)), (2, 40, 40, 20), 24),
    ],
}


def normals(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(F)


def bf16(x):
    """Finite float32 values rounded to bf16, to nearest even."""
    bits = x.astype(F).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(F)


def pairs(geometry, axis, inputs, outputs):
    """Along an axis, every output and input that meet, with their taps."""
    kernel, stride, up, pad = geometry.kernel[axis], geometry.stride[axis], geometry.up[axis], geometry.pad[2 * axis]
    for o, q in itertools.product(range(outputs), range(inputs)):
        taps = [s for s in range(kernel) if 0 <= o * stride + s - pad - q * up < up]
        if taps:
            yield o, q, taps


def rounded_products(geometry, x, w, dy):
    """The bare output and dx of rounded values: the taps that meet one input are added up, then rounded."""
    y, dx = np.zeros(dy.shape), np.zeros(x.shape)
    x, dy = bf16(x).astype(np.float64), bf16(dy).astype(np.float64)
    columns = list(pairs(geometry, 1, x.shape[2], dy.shape[2]))
    for (i, p, rows), (j, q, across) in itertools.product(pairs(geometry, 0, x.shape[1], dy.shape[1]), columns):
        weight = np.zeros(w.shape[2:], F)
        for tap in itertools.product(rows, across):
            weight += w[tap]
        weight = bf16(weight).astype(np.float64)
        y[:, i, j] += x[:, p, q] @ weight
        dx[:, p, q] += dy[:, i, j] @ weight.T
    return y, dx


def arrays_of(case, seed=0):
    """x, w, b, dy."""
    n, height, width, channels = case.shape
    out = (n, *case.geometry.size(height, width), case.outputs)
    w = normals(seed + 1, *case.geometry.kernel, channels, case.outputs)
    return normals(seed, *case.shape), w, normals(seed + 2, case.outputs), normals(seed + 3, *out)


def on_tensor_cores(be):
    return CudaBackend(be.runtime, precision="bf16")


@contextlib.contextmanager
def shared_limit(be, limit):
    kept, be.runtime.shared_limit = be.runtime.shared_limit, limit
    try:
        yield
    finally:
        be.runtime.shared_limit = kept


def variants(be, case, size):
    """One after the other, all ways in which a device could make the outputs; the number of the first case has all."""
    yield
    if case in CASES[size][:1]:
        for tile in TILES:
            with mock.patch.object(cuda_conv_mma, "TILES", (tile,)):
                yield
        with shared_limit(be, 49152 if size == "small" else 65536):  # no room for the pixels of all taps
            yield


@covers("conv_mma", "conv_mma_pack", *(f"conv_mma_{tile.name}" for tile in TILES))
def conv_mma_outputs(be, size):
    be = on_tensor_cores(be)
    for case in CASES[size]:
        x, w, b, dy = arrays_of(case)
        shift, residual = normals(7, len(x), case.outputs), normals(8, *dy.shape)
        rounded, _ = rounded_products(case.geometry, x, w, dy)
        want, plain, absolute = np.zeros_like(dy, np.float64), np.zeros_like(dy, np.float64), np.zeros_like(dy)
        wide = [a.astype(np.float64) for a in (x, w, b)]
        NUMPY.conv(case.geometry, *wide, want, shift=shift.astype(np.float64), residual=residual.astype(np.float64))
        NUMPY.conv(case.geometry, *wide, plain)
        NUMPY.conv(case.geometry, *map(np.abs, (x, w, b)), absolute)
        terms = w[..., 0].size + 3
        bits = None
        for _ in variants(be, case, size):
            for there in both_ways(be, x, w, b, np.full_like(dy, np.nan), shift, residual):
                be.conv(case.geometry, *there[:4], shift=there[4], residual=there[5])
                got = be.to_numpy(there[3])
                assert_same_bits(got, got if bits is None else bits)
                bits = got
        assert_close(bits, rounded + b + shift[:, None, None] + residual, terms=terms)
        assert_close_in_bf16(bits, want, absolute, terms=terms)
        # Nothing but b is added, and an image does not depend on the others.
        out = be.empty(dy.shape)
        be.conv(case.geometry, *(be.asarray(a) for a in (x, w, b)), out)
        assert_close(be.to_numpy(out), rounded + b, terms=terms)
        part = be.empty((1, *dy.shape[1:]))
        be.conv(case.geometry, *(be.asarray(a) for a in (x[-1:], w, b)), part)
        assert_same_bits(be.to_numpy(part), be.to_numpy(out)[-1:])
        assert_close_in_bf16(be.to_numpy(out), plain, absolute, terms=terms)


@covers("conv_mma", "conv_mma_pack_adjoint", *(f"conv_mma_adjoint_{tile.name}" for tile in TILES))
def conv_mma_input_gradients(be, size):
    be = on_tensor_cores(be)
    for case in CASES[size]:
        x, w, b, dy = arrays_of(case, seed=20)
        before = normals(9, *x.shape)
        _, rounded = rounded_products(case.geometry, x, w, dy)
        want, absolute = np.zeros(x.shape), np.zeros(x.shape)
        scratch = np.zeros(w.shape), np.zeros(b.shape)
        NUMPY.conv_backward(case.geometry, *(a.astype(np.float64) for a in (dy, x, w)), want, *scratch)
        NUMPY.conv_backward(case.geometry, *(np.abs(a.astype(np.float64)) for a in (dy, x, w)), absolute, *scratch)
        terms = w[:, :, 0].size + 1
        bits = None
        for _ in variants(be, case, size):
            for there in both_ways(be, dy, x, w, np.full_like(x, np.nan), np.zeros_like(w), np.zeros_like(b)):
                be.conv_backward(case.geometry, *there)
                got = be.to_numpy(there[3])
                assert_same_bits(got, got if bits is None else bits)
                bits = got
        assert_close(bits, rounded, terms=terms)
        assert_close_in_bf16(bits, want, absolute, terms=terms)
        # Added to what is there; and an image does not depend on the others.
        added = be.asarray(before.copy())
        given = [be.asarray(a) for a in (dy, x, w)]
        be.conv_backward(case.geometry, *given, added, be.empty(w.shape), be.empty(b.shape), add=True)
        assert_close(be.to_numpy(added), rounded + before, terms=terms)
        part = be.empty((1, *x.shape[1:]))
        given = [be.asarray(a) for a in (dy[-1:], x[-1:], w)]
        be.conv_backward(case.geometry, *given, part, be.empty(w.shape), be.empty(b.shape))
        assert_same_bits(be.to_numpy(part), bits[-1:])


@covers("conv_mma", "conv_mma_prepare")
def conv_mma_prepared(be, size):
    """Weights that are views of one buffer, prepared together, and again when they have changed: the same results."""
    be, kept, cases = on_tensor_cores(be), {}, CASES[size]
    given = [arrays_of(case, seed=60) for case in cases]
    flat = np.concatenate([np.zeros(5, F), *(w.reshape(-1) for _, w, _, _ in given)])
    for change in (0, 1):
        for backward in (False, True):
            base, at, convs, weights = be.asarray(flat + F(change)), 5, [], []
            for case, (x, w, _, dy) in zip(cases, given, strict=True):
                weights.append(base[at : at + w.size].reshape(w.shape))
                convs.append(ConvShapes(case.geometry, x.shape, dy.shape))
                at += w.size
            if backward not in kept:
                kept[backward] = be.prepare(convs, backward)
            ready = kept[backward].run(weights)
            for conv, w, forms in zip(convs, weights, ready, strict=True):
                for adjoint in (False, True)[: 1 + backward]:
                    form = product(conv.geometry, conv.x, conv.out, adjoint)
                    packed = be.to_numpy(be._tensor_cores.weights(form, w, adjoint))
                    got = be.to_numpy(forms[adjoint])
                    assert_same_bits(got.view(np.uint32), packed[: got.size].view(np.uint32))
    # They take the place of the weights themselves.
    (x, _, b, dy), results = given[0], []
    for w in ([weights[0]] * 2, ready[0]):
        out, dx, dw, db = (be.empty(shape) for shape in (dy.shape, x.shape, weights[0].shape, b.shape))
        there = [be.asarray(array) for array in (x, b, dy)]
        be.conv(convs[0].geometry, there[0], w[0], there[1], out)
        be.conv_backward(convs[0].geometry, there[2], there[0], w[1], dx, dw, db)
        results.append([be.to_numpy(out), be.to_numpy(dx)])
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)


@contextlib.contextmanager
def small_chunks():
    """As many sums over pixels as there are tiles of them."""
    with mock.patch.object(cuda_conv_mma, "LEAST_TILES", 1):
        cuda_conv_mma.weight_plan.cache_clear()
        yield
    cuda_conv_mma.weight_plan.cache_clear()


MANY = Case(Conv(), (35, 8, 8, 3), 2)  # more tiles than one thread adds up


@covers("conv_mma", "conv_mma_weight_32", "conv_mma_weight_64", "conv_mma_sum")
def conv_mma_weight_gradients(be, size):
    be = on_tensor_cores(be)
    for case, chunks in [*((case, contextlib.nullcontext()) for case in CASES[size]), (MANY, small_chunks())]:
        x, w, b, dy = arrays_of(case, seed=40)
        rounded, want, absolute = np.zeros((3, *w.shape))
        want_b = np.zeros(b.shape)
        wide = [a.astype(np.float64) for a in (dy, x, w)]
        NUMPY.conv_backward(case.geometry, *(bf16(a).astype(np.float64) for a in (dy, x, w)), None, rounded, want_b)
        NUMPY.conv_backward(case.geometry, *map(np.abs, wide), None, absolute, want_b)
        NUMPY.conv_backward(case.geometry, *wide, None, want, want_b)
        terms = dy[..., 0].size
        bits = None
        with chunks:
            for _ in range(2):
                for there in both_ways(be, dy, x, w, np.full_like(w, np.nan), np.full_like(b, np.nan)):
                    be.conv_backward(case.geometry, *there[:3], None, *there[3:])
                    got = [be.to_numpy(array) for array in there[3:]]
                    for array, same in zip(got, bits or got, strict=True):
                        assert_same_bits(array, same)
                    bits = got
        assert_close(bits[0], rounded, terms=terms)
        assert_close_in_bf16(bits[0], want, absolute, terms=terms)
        assert_close(bits[1], want_b, terms=terms)
