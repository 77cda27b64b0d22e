"""Layers of image networks: the reference against loops, and every entry of every gradient against differences."""

import math

import naive
import numpy as np
import pytest
from gradcheck import assert_gradient, differences
from tolerances import assert_close

from fastdiff.backends import get_backend
from fastdiff.backends.layers import Affine, Conv, LayerBackend, Norm
from fastdiff.noise import Draw, Stream

NUMPY = get_backend("numpy")
FLOATS = pytest.mark.parametrize("dtype", [np.float64, np.float32])


def arrays(*shapes, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(dtype) for shape in shapes]


def unset(*like):
    return [np.full_like(array, np.nan) for array in like]


def test_the_reference_has_every_layer():
    assert isinstance(NUMPY, LayerBackend)


# ------------------------------------------------------------------------------------------- convolution

CONVS = {
    "1x1": (Conv(), (2, 3, 2, 3)),
    "linear": (Conv(), (3, 1, 1, 2)),
    "3x3": (Conv((3, 3), pad=(1, 1, 1, 1)), (2, 3, 4, 2)),
    "3x3 of one pixel": (Conv((3, 3), pad=(1, 1, 1, 1)), (1, 1, 1, 2)),
    "stride 2": (Conv((3, 3), (2, 2), (1, 1, 1, 1)), (1, 4, 5, 2)),
    "stride 2, odd": (Conv((3, 3), (2, 2), (1, 1, 1, 1)), (1, 3, 1, 2)),
    "stride 2, padded below": (Conv((3, 3), (2, 2), (0, 1, 0, 1)), (2, 4, 6, 1)),
    "stride 2, padded below, odd": (Conv((3, 3), (2, 2), (0, 1, 0, 1)), (1, 5, 3, 2)),
    "up": (Conv((3, 3), pad=(1, 1, 1, 1), up=(2, 2)), (2, 2, 3, 2)),
    "1-D": (Conv((1, 3), pad=(0, 0, 1, 1)), (2, 1, 5, 2)),
    "1-D, stride 2": (Conv((1, 3), (1, 2), (0, 0, 1, 1)), (1, 1, 5, 2)),
    "1-D, up": (Conv((1, 3), pad=(0, 0, 1, 1), up=(1, 2)), (1, 1, 3, 2)),
}
convs = pytest.mark.parametrize(("geometry", "shape"), CONVS.values(), ids=CONVS)


def conv_case(geometry, shape, dtype=np.float64, outputs=3):
    """x, w, b, shift and residual."""
    n, height, width, channels = shape
    size = geometry.size(height, width)
    shapes = (*geometry.kernel, channels, outputs), (outputs,), (n, outputs), (n, *size, outputs)
    return arrays(shape, *shapes, dtype=dtype)


@FLOATS
@convs
def test_conv(geometry, shape, dtype):
    x, w, b, shift, residual = conv_case(geometry, shape, dtype)
    place = {"stride": geometry.stride, "pad": geometry.pad, "up": geometry.up}
    for extra in ({}, {"shift": shift}, {"residual": residual}, {"shift": shift, "residual": residual}):
        (out,) = unset(residual)
        NUMPY.conv(geometry, x, w, b, out, **extra)
        assert_close(out, naive.conv(x, w, b, **place, **extra), terms=w.size, scale=3)


@convs
def test_conv_backward(geometry, shape):
    x, w, b, shift, residual = conv_case(geometry, shape)
    out, (dy,) = np.empty_like(residual), arrays(residual.shape, seed=1)

    def loss():
        NUMPY.conv(geometry, x, w, b, out, shift=shift, residual=residual)
        return np.sum(out * dy)

    dx, dw, db, dshift = unset(x, w, b, shift)
    NUMPY.conv_backward(geometry, dy, x, w, dx, dw, db, dshift=dshift)
    for array, gradient in zip((x, w, b, shift, residual), (dx, dw, db, dshift, dy), strict=True):
        assert_gradient(loss, array, gradient)
    more, again = x.copy(), unset(w, b)
    NUMPY.conv_backward(geometry, dy, x, w, more, *again, add=True)
    assert_close(more, x + dx)
    NUMPY.conv_backward(geometry, dy, x, w, None, *again)
    assert np.array_equal(again[0], dw)
    assert np.array_equal(again[1], db)


# ------------------------------------------------------------------------------------------- normalisation

NORMS = [((2, 2, 3, 4), 2), ((1, 1, 5, 3), 1), ((2, 3, 1, 3), 3), ((1, 1, 1, 6), 2)]
norms = pytest.mark.parametrize(("shape", "groups"), NORMS)
silus = pytest.mark.parametrize("silu", [False, True])
modulated = pytest.mark.parametrize("modulates", [False, True])


def norm_case(shape, groups, modulates, dtype=np.float64):
    x, gamma, beta, modulation = arrays(shape, shape[-1:], shape[-1:], (shape[0], 2 * shape[-1]), dtype=dtype)
    return x, gamma, beta, np.empty((shape[0], groups, 2), dtype), modulation if modulates else None


@FLOATS
@modulated
@silus
@norms
def test_norm(shape, groups, silu, modulates, dtype):
    x, gamma, beta, stats, modulation = norm_case(shape, groups, modulates, dtype)
    x += 3
    options = {"groups": groups, "eps": 1e-3, "modulation": modulation}
    (out,) = unset(x)
    NUMPY.norm(Norm(x, Affine(gamma, beta, modulation), stats, silu), out, eps=1e-3)
    scale = 10 / np.sqrt(x.var(axis=(1, 2)).min() + 1e-3)  # x / deviation, before the mean is subtracted
    assert_close(out, naive.norm(x, gamma, beta, activated=silu, **options), terms=x.size, scale=scale)
    grouped = x.reshape(shape[0], -1, groups, shape[-1] // groups)
    assert_close(stats[..., 0], grouped.mean(axis=(1, 3)), terms=x.size)
    assert_close(stats[..., 1], 1 / np.sqrt(grouped.var(axis=(1, 3)) + 1e-3), terms=x.size)


@modulated
@silus
@norms
def test_norm_backward(shape, groups, silu, modulates):
    x, gamma, beta, stats, modulation = norm_case(shape, groups, modulates)
    out, (dy,) = np.empty_like(x), arrays(shape, seed=1)
    affine = Affine(gamma, beta, modulation)

    def loss():
        NUMPY.norm(Norm(x, affine, stats, silu), out, eps=0.1)
        return np.sum(out * dy)

    loss()
    layer = Norm(x, affine, stats.copy(), silu)
    dx, dgamma, dbeta = unset(x, gamma, beta)
    dmodulation = unset(modulation)[0] if modulates else None
    NUMPY.norm_backward(layer, dy, dx, Affine(dgamma, dbeta, dmodulation))
    pairs = [(x, dx), (gamma, dgamma), (beta, dbeta), *([(modulation, dmodulation)] if modulates else [])]
    for array, gradient in pairs:
        assert_gradient(loss, array, gradient)
    more, in_place, rest = x.copy(), dy.copy(), Affine(*unset(gamma, beta))
    NUMPY.norm_backward(layer, dy, more, rest, add=True)
    assert_close(more, x + dx)
    NUMPY.norm_backward(layer, in_place, in_place, rest)
    assert np.array_equal(in_place, dx)


@modulated
@silus
@norms
def test_norm_tangent(shape, groups, silu, modulates):
    """<dy, J v> = <J^T dy, v>, the normalised values' own part being their backward pass."""
    x, gamma, beta, stats, modulation = norm_case(shape, groups, modulates)
    out, (dy, dx) = np.empty_like(x), arrays(shape, shape, seed=1)
    layer = Norm(x, Affine(gamma, beta, modulation), stats, silu)
    NUMPY.norm(layer, out, eps=0.1)
    by_x, dgamma, dbeta, dh, tangent = unset(x, gamma, beta, x, x)
    by_modulation = dmodulation = None
    if modulates:
        (by_modulation,), (dmodulation,) = unset(modulation), arrays(modulation.shape, seed=2)
    NUMPY.norm_backward(layer, dy, by_x, Affine(dgamma, dbeta, by_modulation))
    plain = Norm(x, Affine(np.ones_like(gamma), np.zeros_like(gamma)), stats)
    NUMPY.norm_backward(plain, dx, dh, Affine(dgamma, dbeta))
    NUMPY.norm_tangent(layer, dh, tangent, modulation_tangent=dmodulation)
    other = 0 if by_modulation is None else np.sum(by_modulation * dmodulation)
    scale = np.sum(np.abs(dy * tangent))
    assert_close(np.sum(dy * tangent), np.sum(by_x * dx) + other, terms=x.size, scale=scale)
    NUMPY.norm_tangent(layer, dh, dh, modulation_tangent=dmodulation)
    assert np.array_equal(dh, tangent)


LAYER_NORMS = pytest.mark.parametrize("shape", [(2, 2, 3, 4), (3, 1, 1, 7), (1, 3, 11, 5), (2, 1, 2, 1)])


@FLOATS
@LAYER_NORMS
def test_layer_norm(shape, dtype):
    x, gamma, beta = arrays(shape, shape[-1:], shape[-1:], dtype=dtype)
    x += 3
    out, stats = unset(x, np.empty((*shape[:-1], 2), dtype))
    NUMPY.layer_norm(Norm(x, Affine(gamma, beta), stats), out, eps=1e-3)
    scale = 10 / np.sqrt(x.var(axis=-1).min() + 1e-3)  # x / deviation, before the mean is subtracted
    assert_close(out, naive.layer_norm(x, gamma, beta, 1e-3), terms=shape[-1], scale=scale)
    assert_close(stats[..., 0], x.mean(axis=-1), terms=shape[-1])
    assert_close(stats[..., 1], 1 / np.sqrt(x.var(axis=-1) + 1e-3), terms=shape[-1])


@LAYER_NORMS
def test_layer_norm_backward(shape):
    x, gamma, beta = arrays(shape, shape[-1:], shape[-1:])
    out, stats, (dy,) = np.empty_like(x), np.empty((*shape[:-1], 2)), arrays(shape, seed=1)

    def loss():
        NUMPY.layer_norm(Norm(x, Affine(gamma, beta), stats), out, eps=0.1)
        return np.sum(out * dy)

    loss()
    layer = Norm(x, Affine(gamma, beta), stats.copy())
    dx, dgamma, dbeta = unset(x, gamma, beta)
    NUMPY.layer_norm_backward(layer, dy, dx, Affine(dgamma, dbeta))
    for array, gradient in ((x, dx), (gamma, dgamma), (beta, dbeta)):
        assert_gradient(loss, array, gradient)
    more, in_place, rest = x.copy(), dy.copy(), Affine(*unset(gamma, beta))
    NUMPY.layer_norm_backward(layer, dy, more, rest, add=True)
    assert_close(more, x + dx)
    NUMPY.layer_norm_backward(layer, in_place, in_place, rest)
    assert np.array_equal(in_place, dx)


# ------------------------------------------------------------------------------------------- attention

ATTENTIONS = [((2, 3, 12), 2), ((1, 1, 3), 1), ((1, 5, 6), 2), ((2, 4, 9), 1)]


@FLOATS
@pytest.mark.parametrize(("shape", "heads"), ATTENTIONS)
def test_attention(shape, heads, dtype):
    (qkv,) = arrays(shape, dtype=dtype)
    n, length, width = shape
    out, log_sums = unset(np.empty((n, length, width // 3), dtype), np.empty((n, heads, length), dtype))
    NUMPY.attention(qkv, out, log_sums, heads=heads)
    want, want_sums = naive.attention(qkv, heads)
    assert_close(out, want, terms=length * width)
    assert_close(log_sums, want_sums, terms=length * width, scale=4)


@pytest.mark.parametrize(("shape", "heads"), ATTENTIONS)
def test_attention_backward(shape, heads):
    (qkv,) = arrays(shape)
    n, length, width = shape
    dy, out, log_sums = arrays((n, length, width // 3), (n, length, width // 3), (n, heads, length), seed=1)

    def loss():
        NUMPY.attention(qkv, out, log_sums, heads=heads)
        return np.sum(out * dy)

    loss()
    (dqkv,) = unset(qkv)
    NUMPY.attention_backward(dy, qkv, out.copy(), log_sums.copy(), dqkv, heads=heads)
    assert_gradient(loss, qkv, dqkv)


@pytest.mark.parametrize(("shape", "heads"), ATTENTIONS)
def test_attention_tangent(shape, heads):
    """<dy, J v> = <J^T dy, v>."""
    n, length, width = shape
    qkv, v, dy, out, log_sums = arrays(shape, shape, *[(n, length, width // 3)] * 2, (n, heads, length))
    NUMPY.attention(qkv, out, log_sums, heads=heads)
    dqkv, tangent = unset(qkv, out)
    NUMPY.attention_backward(dy, qkv, out, log_sums, dqkv, heads=heads)
    NUMPY.attention_tangent(v, qkv, out, log_sums, tangent, heads=heads)
    assert_close(np.sum(dy * tangent), np.sum(dqkv * v), terms=qkv.size, scale=np.abs(dqkv * v).sum())


def test_attention_does_not_overflow():
    qkv = np.full((1, 2, 3), 1e4, np.float32)
    qkv[0, 1, 1] = -1e4
    out, log_sums = np.empty((1, 2, 1), np.float32), np.empty((1, 1, 2), np.float32)
    NUMPY.attention(qkv, out, log_sums, heads=1)
    assert np.array_equal(out, np.full_like(out, 1e4))
    assert np.array_equal(log_sums, np.full_like(log_sums, 1e8))


# ------------------------------------------------------------------------------------------- the rest


def test_silu():
    x, dy = arrays((2, 7), (2, 7))
    x[0] = (-800, -30, -1, 0, 1, 30, 800)
    out, dx = unset(x, x)
    NUMPY.silu(x, out)
    assert_close(out, np.vectorize(naive.silu)(x), scale=0)
    x[0] = (-50, -5, -1, 0, 1, 5, 50)

    def loss():
        NUMPY.silu(x, out)
        return np.sum(out * dy)

    NUMPY.silu_backward(dy, x, dx)
    assert_gradient(loss, x, dx)
    more = x.copy()
    NUMPY.silu_backward(dy, x, more, add=True)
    assert_close(more, x + dx)


@FLOATS
def test_gelu(dtype):
    (x,) = arrays((2, 9), dtype=dtype)
    x[0] = (-800, -30, -5, -1, 0, 1, 5, 30, 800)
    (out,) = unset(x)
    NUMPY.gelu(x, out)
    assert_close(out, np.vectorize(naive.gelu)(x.astype(np.float64)), scale=1)


def test_gelu_is_near_to_that_of_the_error_function():
    """x times the normal distribution function, which the tanh form stands for; by 5e-4 at most."""
    x = np.linspace(-6, 6, 101)
    (out,) = unset(x)
    NUMPY.gelu(x, out)
    exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert 1e-4 < np.abs(out - exact).max() < 5e-4


def test_gelu_backward():
    x, dy = arrays((2, 7), (2, 7))
    x[0] = (-6, -3, -1, 0, 1, 3, 6)
    out, dx = unset(x, x)

    def loss():
        NUMPY.gelu(x, out)
        return np.sum(out * dy)

    NUMPY.gelu_backward(dy, x, dx)
    assert_gradient(loss, x, dx)
    more = x.copy()
    NUMPY.gelu_backward(dy, x, more, add=True)
    assert_close(more, x + dx)


@pytest.mark.parametrize("shape", [(3, 2, 3, 2), (1, 1, 5, 1), (4, 1, 1, 7)])
def test_offset(shape):
    x, p, dy = arrays(shape, shape[1:], shape)
    out, dp = unset(x, p)

    def loss():
        NUMPY.offset(x, p, out)
        return np.sum(out * dy)

    loss()
    assert np.array_equal(out, naive.offset(x, p))
    NUMPY.offset_backward(dy, dp)
    assert_gradient(loss, p, dp)
    assert_gradient(loss, x, dy)
    want = x + p
    NUMPY.offset(x, p, x)
    assert np.array_equal(x, want)


def test_add_concatenate_and_split():
    a, b, c = arrays((2, 1, 3, 2), (2, 1, 3, 5), (2, 1, 3, 2))
    total = a.copy()
    NUMPY.add(total, c, total)
    assert np.array_equal(total, a + c)
    joined = np.empty((2, 1, 3, 7))
    NUMPY.concatenate(a, b, joined)
    assert np.array_equal(joined[..., :2], a)
    assert np.array_equal(joined[..., 2:], b)
    first, second = unset(a, b)
    NUMPY.split(joined, first, second)
    assert np.array_equal(first, a)
    assert np.array_equal(second, b)
    NUMPY.split(joined, first, second, add=True)
    assert np.array_equal(first, a + a)
    assert np.array_equal(second, b)


def test_take():
    table, dy = arrays((4, 3), (5, 3))
    index = np.array([2, 0, 2, 3, 2])
    out, dtable = unset(dy, table)

    def loss():
        NUMPY.take(table, index, out)
        return np.sum(out * dy)

    loss()
    assert np.array_equal(out, table[index])
    NUMPY.take_backward(dy, index, dtable)
    assert_gradient(loss, table, dtable)
    (more,) = arrays((5, 3), seed=2)
    want = more + table[index]
    NUMPY.take(table, index, more, add=True)
    assert np.array_equal(more, want)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("first_sample", [0, 2**32 - 2])
def test_dropout(rate, first_sample):
    (x,) = arrays((4, 2, 3, 3))
    at = {"rate": rate, "seed": 2**40 + 3, "step": 7, "first_block": 11, "first_sample": first_sample}
    (out,) = unset(x)
    NUMPY.dropout(x, out, rate, 11, Draw(2**40 + 3, Stream.DROPOUT, 7, first_sample))
    assert_close(out, naive.dropout(x, **at), scale=0)
    assert np.count_nonzero(out) < x.size or not rate


def test_dropout_keeps_its_share():
    x, rate = np.ones((50, 2000)), 0.3
    out = np.empty_like(x)
    NUMPY.dropout(x, out, rate, 0, Draw(1, Stream.DROPOUT))
    share = np.mean(out == 0)
    assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)


def test_squared_error():
    y, target = arrays((2, 3, 1, 2), (2, 3, 1, 2))
    (dy,) = unset(y)
    loss = np.empty(1)
    NUMPY.squared_error(y, target, dy, loss)
    assert_close(loss, [np.mean((y - target) ** 2)])

    def value():
        NUMPY.squared_error(y, target, np.empty_like(y), loss)
        return loss[0]

    assert_gradient(value, y, dy)


def loss_of(y, target, terms):
    """The loss by its terms, value by value."""
    y, target = y.reshape(len(y), -1, y.shape[-1]), target.reshape(len(y), -1, target.shape[-1])
    channels, values = target.shape[-1], []
    for row, pixel, channel in np.ndindex(target.shape):
        w, *variance = terms[row]
        d = y[row, pixel, channel] - target[row, pixel, channel]
        values.append(w * d**2)
        if variance:
            (g, h, V, K, A), v = variance, y[row, pixel, channels + channel]
            values[-1] += g * (h * v + (V + K * d**2) * math.exp(-h * v) + A)
    return np.mean(values)


@pytest.mark.parametrize("columns", [1, 6])
def test_a_loss_by_its_terms(columns):
    y, target, terms = arrays((3, 2, 2, 4 if columns > 1 else 2), (3, 2, 2, 2), (3, columns))
    (dy,) = unset(y)
    loss = np.empty(1)
    NUMPY.squared_error(y, target, dy, loss, terms)
    assert_close(loss, [loss_of(y, target, terms)])

    def value(terms):
        NUMPY.squared_error(y, target, np.empty_like(y), loss, terms)
        return loss[0]

    # The mean has the gradient of the squares alone: in the bound it is a constant.
    squares = terms.copy()
    squares[:, 1:2] = 0
    want = differences(lambda: value(squares), y)
    want[..., 2:] = differences(lambda: value(terms), y)[..., 2:]
    np.testing.assert_allclose(dy, want, rtol=1e-6, atol=1e-9)
