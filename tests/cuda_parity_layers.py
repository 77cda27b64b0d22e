"""The parity checks of the layers of image networks, but for convolutions: they run on any runtime."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from unittest import mock

import numpy as np
from cuda_parity import NUMPY, both_ways, covers, off_by_one
from tolerances import assert_close, assert_same_bits

from fastdiff.backends import TrainingDraws, TrainState
from fastdiff.backends.cuda import layers as cuda_layers
from fastdiff.backends.layers import Affine, Batch, Norm
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import TARGETS, Draw, Stream

F, EPS = np.float32, 1e-5


def normals(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(F)


def unfilled(*shape):
    return np.full(shape, np.nan, F)


def wide(value):
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype == F else value


def with_arrays(value, change):
    """What a layer is given, with every array, or what stands for one, changed."""
    if isinstance(value, (Norm, Affine)):
        return type(value)(*(with_arrays(part, change) for part in value))
    return change(value) if isinstance(value, np.ndarray) or type(value) is int else value


def agree(be, method, given, outputs, **options):
    """Run a layer here, on aligned arrays and on others, and as the reference in float64; yield the outputs of both.

    In `given` and `options` a number stands for the output of this place. Both ways have the same bits.
    """
    want = [wide(output).copy() for output in outputs]
    arrays = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
    places = {name: value for name, value in options.items() if name.startswith("d")}
    rest = {name: value for name, value in options.items() if name not in arrays and name not in places}

    def run(backend, filled, rows):
        positional = [with_arrays(a, lambda a: filled[a] if type(a) is int else next(rows)) for a in given]
        named = {name: filled[place] for name, place in places.items()} | {name: next(rows) for name in arrays}
        getattr(backend, method)(*positional, **named, **rest)

    hosts = []
    for value in given:
        with_arrays(value, lambda a: None if type(a) is int else hosts.append(a))
    hosts += arrays.values()
    run(NUMPY, want, iter([wide(a) for a in hosts]))
    bits = None
    for there in both_ways(be, *outputs, *hosts):
        filled = there[: len(outputs)]
        run(be, filled, iter(there[len(outputs) :]))
        got = [be.to_numpy(array) for array in filled]
        for array, same in zip(got, bits or got, strict=True):
            assert_same_bits(array, same)
        bits = got
    return bits, want


@contextlib.contextmanager
def in_chunks():
    """No image fits into shared memory, and chunks are small."""
    with mock.patch.multiple(cuda_layers, WHOLE=0, CHUNK_VALUES=48):
        cuda_layers.norm_plan.cache_clear()
        yield
    cuda_layers.norm_plan.cache_clear()


# Images and groups: groups of one, of odd and of four channels; bundles that end early; one wider than a block.
NORMS = {
    "small": [
        ((1, 1, 1, 2), 2),
        ((2, 3, 5, 6), 2),
        ((3, 2, 3, 40), 10),
        ((2, 1, 9, 21), 3),
        ((1, 4, 4, 72), 3),
        ((9, 1, 3, 300), 1),
    ],
    "full": [((5, 16, 16, 128), 32), ((3, 64, 64, 24), 4), ((2, 1, 3000, 36), 12), ((2, 9, 7, 3000), 1)],
}


def norm_agrees(be, shape, groups, number):
    (n, height, width, c), values = shape, shape[1] * shape[2] * shape[3] // groups
    x = normals(1, *shape) * F(3) + F(5)
    gamma, beta = normals(2, c), normals(3, c)
    silu, modulated = number % 2 == 0, number % 3 != 0
    affine = Affine(gamma, beta, normals(4, n, 2 * c) if modulated else None)
    lefts = {1, c // 2 // 4 * 4 or 1} if c > 1 else ()
    for left, place in itertools.product(lefts, (be.asarray, partial(off_by_one, be))):
        same_of_parts(be, Norm(x, affine, unfilled(n, groups, 2), silu), left, place)
    outputs = [unfilled(*shape), unfilled(n, groups, 2)]
    (y, stats), (want, wanted_stats) = agree(be, "norm", [Norm(x, affine, 1, silu), 0], outputs, eps=EPS)
    assert_close(stats, wanted_stats, terms=9)
    assert_close(y, want, terms=9)
    dy = normals(5, *shape)
    for start in (unfilled(*shape), normals(6, *shape), dy):  # filled, added to, in the place of dy
        outputs = [start, unfilled(c), unfilled(c), *[unfilled(n, 2 * c)] * modulated]
        grads = Affine(1, 2, 3 if modulated else None)
        arrays = [Norm(x, affine, stats, silu), 0 if start is dy else dy, 0, grads]
        add = start is not dy and bool(np.isfinite(start).all())
        got, want = agree(be, "norm_backward", arrays, outputs, add=add)
        assert_close(got[0], want[0], terms=9 + values // 8)
        for a, b in zip(got[1:], want[1:], strict=True):
            assert_close(a, b, terms=9 + n * height * width)


def same_of_parts(be, layer, left, place):
    """A norm of two parts has the bits of one of their concatenation, and its gradients have those of that."""
    x, c, dy = layer.x, layer.x.shape[-1], place(normals(5, *layer.x.shape))
    affine, found = with_arrays(layer.affine, place), []
    for joined, add in itertools.product((False, True), (False, True)):
        two = [np.ascontiguousarray(part) for part in np.split(x, [left], axis=-1)]
        parts, to = (tuple(place(array) for array in arrays) for arrays in (two, map(np.zeros_like, two)))
        whole, dx = place(unfilled(*x.shape) if joined else x), place(normals(6, *x.shape))
        out, stats, dgamma, dbeta = (be.asarray(unfilled(*size)) for size in (x.shape, layer.stats.shape, (c,), (c,)))
        there = Norm(whole, affine, stats, layer.silu)
        be.norm(there, out, eps=EPS, parts=parts if joined else None)
        be.norm_backward(there, dy, dx, Affine(dgamma, dbeta), add=add, parts=to if joined else None)
        if not joined:
            be.split(dx, *to)
        found.append([be.to_numpy(array) for array in (whole, out, stats, dgamma, dbeta, *to)])
    for apart, joined in zip(found[:2], found[2:], strict=True):
        for array, wanted in zip(joined, apart, strict=True):
            assert_same_bits(array, wanted)


@covers("norm", "norm_forward", "norm_joined", "norm_backward", "norm_parameters")
def norms(be, size):
    for number, (shape, groups) in enumerate(NORMS[size]):
        norm_agrees(be, shape, groups, number)


SPLIT = {"small": [((2, 3, 5, 6), 2), ((1, 2, 7, 40), 10), ((9, 1, 2, 300), 1)], "full": NORMS["full"]}


@covers(
    "norm",
    "norm_chunks", "norm_apply", "norm_backward_chunks", "norm_backward_images", "norm_backward_apply",
    "norm_parameters",
)  # fmt: skip
def norms_in_chunks(be, size):
    with in_chunks():
        for number, (shape, groups) in enumerate(SPLIT[size], start=1):
            norm_agrees(be, shape, groups, number)


@covers("norm", "norm_tangent")
def norm_tangents(be, size):
    for number, (shape, groups) in enumerate(NORMS[size]):
        n, c, silu = shape[0], shape[-1], number % 2 == 0
        x, dh, gamma, beta = normals(1, *shape), normals(2, *shape), normals(3, c), normals(4, c)
        stats, modulation, other = normals(5, n, groups, 2), normals(6, n, 2 * c), normals(7, n, 2 * c)
        for modulated, moves in ((None, None), (modulation, None), (modulation, other)):
            layer, options = Norm(x, Affine(gamma, beta, modulated), stats, silu), {"modulation_tangent": moves}
            (got,), (want,) = agree(be, "norm_tangent", [layer, dh, 0], [unfilled(*shape)], **options)
            assert_close(got, want, terms=9)
            (same,), _ = agree(be, "norm_tangent", [layer, 0, 0], [dh], **options)
            assert_same_bits(same, got)
        layer, out = with_arrays(Norm(x, Affine(gamma, beta), None), be.asarray), be.asarray(unfilled(*shape))
        be.norm_tangent(layer, be.asarray(dh), out)
        assert_same_bits(be.to_numpy(out), gamma * dh)


# Rows that are less than a team, a team, a warp's and more than those; chunks that end early; one wider than a block.
LAYER_NORMS = {
    "small": [(1, 1, 1, 1), (3, 11, 1, 7), (2, 3, 3, 16), (1, 33, 1, 33), (2, 1, 3, 132), (2, 1, 2, 1100)],
    "full": [(64, 32, 32, 64), (3, 1, 4099, 50), (16, 16, 16, 512), (70, 1, 9, 3001)],
}


def layer_norm_agrees(be, shape):
    x, c, rows = normals(1, *shape) * F(3) + F(5), shape[-1], int(np.prod(shape[:-1]))
    gamma, beta = normals(2, c), normals(3, c)
    outputs = [unfilled(*shape), unfilled(*shape[:-1], 2)]
    (y, stats), (want, wanted_stats) = agree(be, "layer_norm", [Norm(x, Affine(gamma, beta), 1), 0], outputs, eps=EPS)
    r = wanted_stats[..., 1]
    assert_close(stats[..., 0], wanted_stats[..., 0], terms=9)
    assert_close(stats[..., 1], r, terms=9, scale=10 * r**2)  # x has this size, before the mean is subtracted
    assert_close(y, want, terms=9, scale=10 * r[..., None] * np.maximum(1, np.abs(gamma)))
    dy = normals(5, *shape)
    for start in (unfilled(*shape), normals(6, *shape), dy):  # filled, added to, in the place of dy
        arrays = [Norm(x, Affine(gamma, beta), stats), 0 if start is dy else dy, 0, Affine(1, 2)]
        add = start is not dy and bool(np.isfinite(start).all())
        got, want = agree(be, "layer_norm_backward", arrays, [start, unfilled(c), unfilled(c)], add=add)
        for array, wanted, terms in zip(got, want, (9 + c, 9 + rows, 9 + rows), strict=True):
            assert_close(array, wanted, terms=terms, scale=max(1, np.abs(wanted).max()))


@covers("layer_norm", "layer_norm", "layer_norm_backward")
def layer_norms(be, size):
    for shape in LAYER_NORMS[size]:
        layer_norm_agrees(be, shape)


# (images, length, channels, heads): tiles of 16 and 64 rows, slabs of 64 and 128 columns, chunks of 32 channels.
ATTENTIONS = {
    "small": [(1, 1, 4, 2), (2, 5, 8, 8), (1, 67, 9, 1), (1, 7, 66, 2), (1, 3, 130, 1)],
    "full": [(3, 64, 128, 1), (2, 256, 256, 1), (2, 257, 64, 8), (1, 1000, 48, 3), (2, 70, 300, 1)],
}


@covers("attention", "attention", "attention_deltas", "attention_backward", "attention_tangent")
def attentions(be, size):
    for n, length, channels, heads in ATTENTIONS[size]:
        qkv = 2 * normals(1, n, length, 3 * channels)
        outputs = [unfilled(n, length, channels), unfilled(n, heads, length)]
        (out, log_sums), (want, wanted_sums) = agree(be, "attention", [qkv, 0, 1], outputs, heads=heads)
        terms = length + channels
        assert_close(log_sums, wanted_sums, terms=terms)
        assert_close(out, want, terms=terms)
        dy = normals(2, n, length, channels)
        arrays = [dy, qkv, out, log_sums, 0]
        (dqkv,), (want,) = agree(be, "attention_backward", arrays, [unfilled(*qkv.shape)], heads=heads)
        assert_close(dqkv, want, terms=2 * terms)
        arrays = [normals(3, *qkv.shape), qkv, out, log_sums, 0]
        (tangent,), (want,) = agree(be, "attention_tangent", arrays, [unfilled(*out.shape)], heads=heads)
        assert_close(tangent, want, terms=2 * terms, scale=3 * np.abs(qkv).max())  # dS and v have this size


VALUES = {"small": [(1,), (3, 5), (2, 4, 4, 8)], "full": [(1_000_003,), (64, 32, 32, 128)]}


@covers("pointwise", "silu", "silu_backward", "gelu", "gelu_backward", "add")
def values_one_by_one(be, size):
    for shape in VALUES[size]:
        x, y = 4 * normals(1, *shape), normals(2, *shape)
        if x.size > 1:
            x.flat[0] = -100  # where exp(-x) is beyond float32
        for method in ("silu", "gelu"):
            (got,), (want,) = agree(be, method, [x, 0], [unfilled(*shape)])
            assert_close(got, want, terms=9)
            for add in (False, True):
                (got,), (want,) = agree(be, f"{method}_backward", [y, x, 0], [normals(4, *shape)], add=add)
                assert_close(got, want, terms=9)
        start = normals(3, *shape)
        for arrays, total in (([x, y, 0], x + y), ([0, y, 0], start + y), ([x, 0, 0], x + start)):
            (got,), _ = agree(be, "add", arrays, [start])
            assert_same_bits(got, total)


COLUMNS = {"small": [((3,), 2, 5), ((1, 2, 3), 4, 8), ((2, 2), 1, 4)], "full": [((64, 32, 32), 128, 64)]}


@covers("pointwise", "concatenate", "split")
def columns(be, size):
    for rows, left, right in COLUMNS[size]:
        a, b = normals(1, *rows, left), normals(2, *rows, right)
        both = np.concatenate([a, b], axis=-1)
        (got,), _ = agree(be, "concatenate", [a, b, 0], [unfilled(*both.shape)])
        assert_same_bits(got, both)
        for add in (False, True):
            outputs = [normals(5, *a.shape), unfilled(*b.shape)]
            (got_a, got_b), _ = agree(be, "split", [both, 0, 1], outputs, add=add)
            assert_same_bits(got_a, outputs[0] + a if add else a)
            assert_same_bits(got_b, b)


OFFSETS = {"small": [(1, 1, 1, 1), (40, 1, 3, 3), (3, 2, 5, 4)], "full": [(64, 32, 32, 64), (1031, 1, 7, 5)]}


@covers("pointwise", "offset", "column_sums")
def offsets(be, size):
    for shape in OFFSETS[size]:
        x, p = normals(1, *shape), normals(2, *shape[1:])
        start = normals(3, *shape)
        for arrays, total in (([x, p, 0], x + p), ([0, p, 0], start + p)):
            (got,), _ = agree(be, "offset", arrays, [start])
            assert_same_bits(got, total)
        (got,), (want,) = agree(be, "offset_backward", [x, 0], [unfilled(*shape[1:])])
        assert_close(got, want, terms=len(x))


TABLES = {"small": [(7, 5, 11), (1, 3, 4), (3, 1, 1), (5, 40, 70)], "full": [(1000, 2048, 512), (10, 256, 128)]}


# To so many rows and columns.
RESIZES = {
    "small": [((2, 3, 5, 3), 4, 7), ((3, 4, 7, 2), 3, 5), ((1, 1, 9, 4), 1, 12), ((2, 5, 2, 1), 3, 4)],
    "full": [((64, 28, 28, 3), 32, 32), ((64, 32, 32, 128), 28, 28)],
}


@covers("pointwise", "resize")
def resized(be, size):
    for shape, height, width in RESIZES[size]:
        target = shape[0], height, width, shape[3]
        (got,), (want,) = agree(be, "resize", [normals(1, *shape), 0], [unfilled(*target)])
        assert_same_bits(got, want.astype(F))
        assert want.any()


@covers("pointwise", "fill")
def constants(be, size):
    for shape in VALUES[size]:
        for (x,) in both_ways(be, unfilled(*shape)):
            be._launch_layer("pointwise", "fill", x.size, (x, x.size, 2.5))
            assert_same_bits(be.to_numpy(x), np.full(shape, 2.5, F))


@covers("pointwise", "take", "take_backward")
def rows_of_tables(be, size):
    for count, n, width in TABLES[size]:
        table, dy = normals(1, count, width), normals(2, n, width)
        index = np.random.default_rng(n).integers(0, count, n)
        for add in (False, True):
            start = normals(3, n, width)
            got = be.asarray(start.copy())
            be.take(be.asarray(table), be.asarray(index, np.int64), got, add=add)
            assert_same_bits(be.to_numpy(got), start + table[index] if add else table[index])
        got, want = be.asarray(unfilled(count, width)), unfilled(count, width)
        be.take_backward(be.asarray(dy), be.asarray(index, np.int64), got)
        NUMPY.take_backward(dy, index, want)
        assert_same_bits(be.to_numpy(got), want)


# Images, positions of the batch and rows of data.
DRAWS = {
    "small": [((1, 1, 1), 1, 1), ((3, 4, 2), 5, 7), ((1, 9, 1), 3, 2), ((5, 3, 3), 4, 100), ((3, 5, 2), 6, 3)],
    "full": [((32, 32, 3), 4099, 1000)],
}


@covers("pointwise", "draw_batch")
def drawn_batches(be, size):
    for number, (shape, n, rows) in enumerate(DRAWS[size]):
        T, labels = 11, np.random.default_rng(3).integers(0, 9, rows)
        tables = np.random.default_rng(2).normal(size=(4, T))
        whole = (shape[0] + 4, shape[1] + 7, shape[2]) if number in (3, 4) else shape  # parts are cut out of it
        draws = TrainingDraws(normals(1, rows, *whole), *tables, 2**63 + 5, labels, number % 2 == 1)
        if number == 2:  # some values have not been seen
            hidden = np.where(normals(4, rows, *shape) < 0, F(np.nan), F(0))
            draws = draws._replace(data=np.stack([draws.data, hidden], axis=1), masked=True)
        at = 2**32 - 1 - number, (0, 17)[number % 2]
        covariates = np.random.default_rng(4).normal(size=(rows, number + 1)).astype(np.float32)
        draws = draws._replace(covariates=covariates, drop=(0.0, 0.5, 1.0)[number % 3], classes=9)
        want = [unfilled(n, *shape), np.empty(n, np.int64), unfilled(n, *shape), np.full(n, -1), None]
        want.append(unfilled(n, 1, 1, number + 1))
        NUMPY.draw_batch(draws, Batch(*want), *at)
        for given in (be.asarray(labels, np.int64), None):
            got = [None if array is None else be.asarray(np.zeros_like(array), array.dtype) for array in want]
            there = draws._replace(data=be.asarray(draws.data), labels=given, covariates=be.asarray(covariates))
            if given is None:
                got[3] = got[5] = None
            be.draw_batch(there, Batch(*got), *at)
            for array, wanted in zip(got, want, strict=True):
                if array is not None:
                    assert_same_bits(be.to_numpy(array), wanted)


@covers("pointwise", "draw_known", "hold")
def known_batches(be, size):
    """What is known of a batch, by the bits of the noise law, where some values have not been seen, and held later."""
    for number, (shape, n, rows) in enumerate(DRAWS[size]):
        hidden = np.where(normals(4, rows, *shape) < -1, F(np.nan), F(0))
        data = normals(1, rows, *shape) if number % 2 else np.stack([normals(1, rows, *shape), hidden], axis=1)
        tables = np.random.default_rng(2).normal(size=(4, 11))
        for kind in TARGETS:
            draws = TrainingDraws(data, *tables, 2**63 + 5, None, number % 2 == 1, masked=number % 2 == 0)
            draws, at = draws._replace(targets=(kind, shape)), (2**32 - 1 - number, (0, 17)[number % 2])
            want = [unfilled(n, *shape), np.empty(n, np.int64), unfilled(n, *shape), None, None, None]
            want += [unfilled(n, *shape), unfilled(n, *shape)]
            got = [None if array is None else be.asarray(np.zeros_like(array), array.dtype) for array in want]
            NUMPY.draw_batch(draws, Batch(*want), *at)
            be.draw_batch(draws._replace(data=be.asarray(data)), Batch(*got), *at)
            for array, wanted in zip(got, want, strict=True):
                if array is not None:
                    assert_same_bits(be.to_numpy(array), wanted)
        known = np.hstack([part.reshape(n, -1) for part in want[6:]])
        x = normals(7, n, known.shape[1] // 2)
        there = be.asarray(x.copy())
        NUMPY.hold(x, known, 0.3)
        be.hold(there, be.asarray(known), 0.3)
        assert_same_bits(be.to_numpy(there), x)


DROPS = {"small": [(3, 1, 7, 1), (2, 1, 1, 3), (3, 2, 2, 4)], "full": [(64, 32, 32, 128), (7, 33, 31, 5)]}


@covers("pointwise", "dropout")
def dropped(be, size):
    """The bits of the noise law, in place too."""
    for number, shape in enumerate(DROPS[size]):
        x, want = normals(1, *shape), unfilled(*shape)
        draw = Draw(2**64 - 1, Stream.DROPOUT, 2**32 - 1 - number, (2**33 + 5, 0)[number % 2])
        at = (0.3, 1e-9, 0.999)[number % 3], (0, 7)[number % 2], draw
        NUMPY.dropout(x, want, *at)
        for there, out in both_ways(be, x, unfilled(*shape)):
            for to in (out, there):
                be.dropout(there, to, *at)
                assert_same_bits(be.to_numpy(to), want)


ERRORS = {"small": [(1,), (3, 5), (4097,)], "full": [(64, 32, 32, 3), (3_000_001,)]}


@covers("pointwise", "squared_error", "mean_of_chunks")
def squared_errors(be, size):
    for shape in ERRORS[size]:
        y, target, want = normals(1, *shape), normals(2, *shape), unfilled(*shape)
        target[target > 2] = np.nan  # has not been seen
        want_loss = np.empty(1)
        NUMPY.squared_error(y, target, want, want_loss)
        for there, wanted, dy in both_ways(be, y, target, unfilled(*shape)):
            loss = be.empty((1,), np.float64)
            be.squared_error(there, wanted, dy, loss)
            assert_close(be.to_numpy(loss), want_loss, dtype=np.float64, terms=y.size)
            assert_same_bits(be.to_numpy(dy), want)


WEIGHTED = {"small": [(3, 5, 1, 3), (2, 33, 65, 1), (1, 2)], "full": [(64, 32, 32, 3), (5000, 50)]}


@covers("pointwise", "weighted_error", "mean_of_chunks")
def weighted_errors(be, size):
    for shape in WEIGHTED[size]:
        for columns in (1, 6):
            outputs = (*shape[:-1], shape[-1] * (2 if columns > 1 else 1))
            given = normals(1, *outputs), normals(2, *shape), normals(3, shape[0], columns)
            given[1][given[1] > 1.5] = np.nan  # has not been seen
            want, want_loss = wide(unfilled(*outputs)), np.empty(1)
            NUMPY.squared_error(*map(wide, given[:2]), want, want_loss, wide(given[2]))
            for y, target, terms, dy in both_ways(be, *given, unfilled(*outputs)):
                loss = be.empty((1,), np.float64)
                be.squared_error(y, target, dy, loss, terms)
                assert_close(be.to_numpy(loss), want_loss, dtype=F, terms=20)
                assert_close(be.to_numpy(dy), want, terms=20)


STEPS, BAD, ROWS = 7, 4, 3


@covers("optim", "set_step", "finish_norm")
def repeated_steps(be, size):
    """Training steps whose gradient takes the step's number, as a graph from the second one on.

    One is not finite: it and those after it do nothing. There are fewer rows of results than steps.
    """
    count = {"small": 1003, "full": 3_000_001}[size]
    x, target, *state = normals(1, 6, 1, count)
    bad, state[2] = x.copy(), np.square(state[2])
    bad[0, ::3] = np.inf
    plan = TrainingPlan(warmup=4, decay_steps=STEPS)
    results = []
    for each in (be, NUMPY):
        given, rows, grads = each.asarray(x.copy()), each.asarray(unfilled(1, count)), each.asarray(unfilled(1, count))
        wanted, arrays = each.asarray(target), [each.asarray(array[0].copy()) for array in state]
        loss, of_steps = each.empty((1,), np.float64), each.asarray(np.zeros((ROWS, 2)), np.float64)

        def gradient(step, be=each, given=given, rows=rows, wanted=wanted, grads=grads, loss=loss):
            be.dropout(given, rows, 0.3, 0, Draw(7, Stream.DROPOUT, step))
            be.squared_error(rows, wanted, grads, loss)
            return loss

        training = each.record_training(gradient, TrainState(arrays[0], grads.reshape(-1), *arrays[1:]), of_steps)
        for step in range(STEPS):
            given[...] = each.asarray(bad if step == BAD else x)
            training.run(step, plan.options(step, step))
            results.append((each.to_numpy(of_steps).copy(), [each.to_numpy(array).copy() for array in arrays]))
    before = [array[0] for array in state]
    for step, (got, want) in enumerate(zip(results[:STEPS], results[STEPS:], strict=True)):
        assert (np.isfinite(got[0]) == np.isfinite(want[0])).all()
        assert np.isfinite(got[0][step % ROWS]).tolist() == [step != BAD, step < BAD]
        finite = np.isfinite(want[0])
        assert_close(got[0][finite], want[0][finite], dtype=np.float64, terms=count)
        for array, same, old in zip(got[1], want[1], before, strict=True):
            assert_same_bits(array, same)
            assert (step >= BAD) == np.array_equal(array, old)
        before = got[1]
