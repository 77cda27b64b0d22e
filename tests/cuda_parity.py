"""What every CUDA kernel must agree with, as checks that run on any runtime: the host one, and a GPU's.

A check takes a `CudaBackend` and the size of the work, "small" or "full", and raises where something disagrees.
``python tests/cuda_parity.py`` runs all of them, small, on the host runtime.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tolerances import assert_close, assert_same_bits

from fastdiff.backends import Row, TrainState
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.numpy import NumpyBackend
from fastdiff.kernels.cuda import runtime
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import Draw, Stream, fill_normal, round_keys

NUMPY = NumpyBackend()


class Check(NamedTuple):
    """A check, and the (source, entry) that it covers."""

    run: Callable[[CudaBackend, str], None]
    covers: frozenset[tuple[str, str]]


CHECKS: dict[str, Check] = {}


def covers(source, *entries):
    """Register a check of entries of one source."""

    def register(run):
        CHECKS[run.__name__] = Check(run, frozenset((source, entry) for entry in entries))
        return run

    return register


def all_entries():
    """(source, entry) of everything in kernels/cuda."""
    return {(source, entry) for source in runtime.source_names() for entry in runtime.entries(source)}


# Widths around quarters, groups of 16, blocks and tiles; more items than threads, more tiles than blocks.
SHAPES = {
    "small": [
        (1, 1),
        (3, 2),
        (5, 3),
        (2, 4),
        (7, 9),
        (3, 16),
        (2, 17),
        (5, 48),
        (40, 50),
        (1, 999),
        (9, 112),
        (99, 1),
        (103, 101),
        (2603, 1),
        (3, 2044),
        (6, 1022),
        (2, 2052),
    ],
    "full": [(1, 1), (7, 13), (1_000_003, 3), (200_003, 50), (3001, 3072), (3, 1_000_001), (20_001, 100)],
}
SPECIAL = [0.0, -0.0, 1.0, -1.5, math.nan, math.inf, -math.inf, 1e-42, -1e-45, 3e38, -3e38, 1e-30]
LAST_ROW = 2**56 - 1


def filled(shape, seed):
    """Normals with hostile values among them."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    flat = values.reshape(-1)
    at = np.arange(0, flat.size, 3)
    flat[at] = np.resize(np.roll(SPECIAL, seed), at.size).astype(np.float32)
    return values


def off_by_one(be, values):
    """A copy on the backend that begins 4 bytes beyond a multiple of 16."""
    room = be.runtime.empty(values.size + 1)
    be.runtime.copy(room[1:], be.asarray(values.reshape(-1)))
    return room[1:].reshape(values.shape)


def both_ways(be, *arrays):
    """Copies of the arrays (None stays None), aligned to 16 bytes and not."""
    for place in (lambda values: be.asarray(values.copy()), lambda values: off_by_one(be, values)):
        yield [None if array is None else place(array) for array in arrays]


@covers("noise", "normal", "normal_wide", "normal_rows")
def normals(be, size):
    for i, (n, width) in enumerate(SHAPES[size]):
        draw = Draw(
            seed=(0, 1, 2**64 - 1, 0x9E3779B97F4A7C15)[i % 4],
            stream=list(Stream)[i % len(Stream)],
            step=(0, 7, 2**32 - 1)[i % 3],
            first_row=(0, 2**32 - 2, LAST_ROW - n + 1, 2**32 - n)[i // 2 % 4],
        )
        want = np.empty((n, width), np.float32)
        fill_normal(want, draw)
        for (out,) in both_ways(be, np.full_like(want, np.nan)):
            be.normal(out, draw)
            assert_same_bits(be.to_numpy(out), want)
    for shape in ((0, 5), (5, 0), (0, 0)):
        be.normal(be.empty(shape), Draw(0, 0))


@covers("noise", "forward_noise", "forward_noise_wide", "forward_noise_rows")
def forward_noising(be, size):
    random = np.random.default_rng(1)
    signal, noise = random.random((2, 11))
    signal[:3], noise[:3] = (0, 1, 1e-42), (1, 0, 1e-42)
    for i, shape in enumerate(SHAPES[size]):
        x0, t = filled(shape, i), random.integers(0, 11, shape[0])
        first_row = (2**33 - shape[0], 2**32 - 3)[i % 3 == 2]  # with the same upper half, and with another one
        draw = Draw(3 + i, Stream.FORWARD, first_row=first_row)
        want, eps = np.empty_like(x0), np.empty_like(x0)
        with np.errstate(all="ignore"):
            NUMPY.forward_noise(x0, t, signal, noise, want, eps, draw)
        for got_x0, out, drawn in both_ways(be, x0, np.full_like(x0, np.nan), np.full_like(x0, np.nan)):
            be.forward_noise(got_x0, be.asarray(t, np.int64), signal, noise, out, drawn, draw)
            assert_same_bits(be.to_numpy(out), want)
            assert_same_bits(be.to_numpy(drawn), eps)
        # Without eps, which is the caller's wish.
        out = be.empty(shape)
        entry = "forward_noise_wide" if shape[1] % 16 == 0 else "forward_noise"
        tables = be.asarray(signal), be.asarray(noise)
        args = (be.asarray(x0), be.asarray(t, np.int64), *tables, out, None, *shape, first_row, Stream.FORWARD)
        be.runtime.launch("noise", entry, *be.runtime.grid_1d(x0.size), (*args, round_keys(3 + i)))
        assert_same_bits(be.to_numpy(out), want)


CLIPS = (None, (-1.0, 1.0), (-0.25, 0.5), (0.0, 2.0))
ZERO_CLIPS = ((-0.0, 2.0), (-1.0, -0.0))


@covers("step", "step_noisy", "step_noisy_wide", "step_noisy_rows", "step_quiet", "step_deep")
def sampler_steps(be, size):
    """All sets of coefficients that are zero, all clips, and every memory that the row may have."""
    numbers = (1.1, -0.6, 0.9, 0.8, -0.3, 0.7, -0.2, 0.2, 0.4)
    for k, few in enumerate(itertools.product((0, 1), repeat=9)):
        if few[5:7] != (0, 0) and k % 5:  # every fifth of those that reach back further
            continue
        row = Row(2**32 - 1 - k, *(number * used for number, used in zip(numbers, few, strict=True)))
        clips = CLIPS if row.depth < 2 else CLIPS[k % 4 :][:1]
        for clip, depth in itertools.product(clips, range(row.depth, 4)):
            if depth < 2 or clip == CLIPS[k % 4]:
                step_agrees(be, (5, (7, 32)[k % 2]), row, clip, depth)
    for coefficient in (1e-60, 1e-45, -1e-40, 1e30, 1e60):  # in float32: zero, denormals, large, infinite
        for back in (1, 3):
            row = Row(5, *[coefficient] * (4 + back), *[0] * (3 - back), coefficient, coefficient)
            step_agrees(be, (3, 16), row, (-1.0, 1.0), back)
    # Signs of zeros: noise that vanishes, bounds that are -0.
    for s, clip, depth in itertools.product((1e-45, 1e-30, 1e-17, 0.5), (None, *ZERO_CLIPS), (0, 1)):
        for row in (Row(5, 1.1, -0.6, 0.9, 0.8, s=s), Row(5, 0, 0, 0.9, 0, s=s), Row(5, 1, 0, 0, 1, e=-0.2, s=s)):
            step_agrees(be, (9, 64), row, clip, depth)
    for shape in SHAPES[size]:
        for s, r in ((0.0, 0.0), (0.5, 0.0), (0.5, -0.7)):
            row = Row(3, 1.1, -0.4, 0.3, 0.7, -0.2, 0, 0, 0.1, s, r)
            step_agrees(be, shape, row, (-1.0, 1.0), depth=1)
            step_agrees(be, shape, row._replace(c2=0.3, c3=-0.5), (-1.0, 1.0), depth=3)
            step_agrees(be, shape, row._replace(c1=0, e=0), (-1.0, 1.0), depth=0)
            step_agrees(be, shape, row._replace(a=0.2), None, depth=1, first_row=2**32 - 1)  # the upper halves differ
    # An m that nobody wants is not computed: the output may be absent.
    step_agrees(be, (3, 5), Row(3, 1.1, -0.4, 0.3, 0, s=0.5), None, depth=0)
    for power in (0.0, 3e-3, 60.0, -60.0):  # of the noise's scale
        step_agrees(be, (4, 9), Row(3, 0.5, 0.2, 0.3, 0.4, s=1.0, r=power), None, depth=0)


def step_agrees(be, shape, row, clip, depth, first_row=None):
    """A step beside a memory of so many rows has the bits of the reference, but for the power that scales noise."""
    x, out, *memory = (filled(shape, seed) for seed in range(1, 3 + depth))
    if row.r != 0:
        x, *memory = np.random.default_rng(8).uniform(-1, 1, (1 + depth, *shape)).astype(np.float32)
        out = np.random.default_rng(9).uniform(-1, 1, (2, *shape)).astype(np.float32)
    elif row.e == 0 and (row.q == 0 or (row.b == 0 and depth == 0)):
        out = None
    draw = Draw(9, Stream.STEP, row.step, 2**33 - shape[0] if first_row is None else first_row)
    want, kept = x.copy(), tuple(array.copy() for array in memory)
    with np.errstate(all="ignore"):
        NUMPY.sampler_step(want, out, kept, row, clip, draw)
    for got, got_out, *got_memory in both_ways(be, x, out, *memory):
        be.sampler_step(got, got_out, tuple(got_memory), row, clip, draw)
        if row.r == 0:
            assert_same_bits(be.to_numpy(got), want)
        else:
            assert_close(be.to_numpy(got), want, terms=4)
        for array, wanted in zip(got_memory, kept, strict=True):
            assert_same_bits(be.to_numpy(array), wanted)


@covers("step", "guide", "guide_rescale")
def guidance(be, size):
    for shape in SHAPES[size]:
        c, u = np.random.default_rng(shape[0]).normal(size=(2, *shape)).astype(np.float32)
        for weight, rescale in ((0.0, 0.0), (2.5, 0.0), (3.0, 0.7), (1.5, 1.0)):
            want, out = np.empty_like(c), be.asarray(c.copy())
            NUMPY.guide(c, u, weight, rescale, want)
            be.guide(out, be.asarray(u), weight, rescale, out)
            if rescale:
                assert_close(be.to_numpy(out), want, terms=2 * shape[1])
            else:
                assert_same_bits(be.to_numpy(out), want)


@covers("step", "set_row", "step_recorded", "step_recorded_wide", "step_recorded_rows", "step_deep_recorded")
def recorded_sampler_steps(be, size):
    """Steps of a sampler whose denoiser adds two arrays: the same work again and again, with other rows and noise."""
    names = {"p": 1.1, "q": -0.6, "a": 0.9, "b": 0.8, "c1": -0.3, "e": 0.2, "s": 0.4}
    rows = [
        Row(k, **{name: value * (k >> i & 1) for i, (name, value) in enumerate(names.items())})
        for k in reversed(range(128))
    ]
    shapes = [(5, 7), (3, 32), (2, 16), (1, 1)] if size == "small" else SHAPES[size]
    for shape, depth in itertools.product(shapes, range(4)):
        kept, host_kept = {}, {}
        few = [row for row in rows[:: 1 if shape == (5, 7) else 11] if depth or row.c1 == 0]
        few += [row._replace(s=1e-45) for row in few[:8]]
        if depth == 3:
            few = [row._replace(c2=0.7 * (k % 2), c3=-0.4 * (k % 3 == 0)) for k, row in enumerate(few)]
        for k, row in enumerate(few):
            arrays = [filled(shape, seed) for seed in range(1, 3 + depth)]
            # In every third one rows of noise lie on both sides of 2^32.
            at = Draw(2**64 - 1 - k, Stream.STEP, row.t, 2**32 - 1 + k * (k % 3 > 0))
            clip = ZERO_CLIPS[k % 2] if k % 7 == 0 else CLIPS[k % 4]
            with np.errstate(all="ignore"):
                want = sampled(NUMPY, host_kept, arrays, row, clip, at)
            if k == 0:  # where the work is done again and again
                there = [be.asarray(array) for array in (*arrays[:2], *arrays)]
            for to, array in zip(there, (*arrays[:2], *arrays), strict=True):
                be.runtime.copy(to, be.asarray(array))
            got = sampled(be, kept, there[2:], row, clip, at, state=there[0])
            for array, wanted in zip(got, want, strict=True):
                assert_same_bits(be.to_numpy(array), wanted)
        # A denoiser that learned its variance: two outputs, in rows that scale their noise by the second and in others.
        kept, draw = {}, Draw(3, Stream.STEP, 7)
        state, other = be.empty(shape), be.empty(shape)
        for k, row in enumerate(few[:4]):
            row = row._replace(q=-0.6, s=0.4, r=(0.7, -0.5, 0.0, 0.2)[k])
            x, added, *memory = np.random.default_rng(k).uniform(-1, 1, (2 + depth, *shape)).astype(np.float32)
            want, remembered, out = x.copy(), tuple(array.copy() for array in memory), x + added
            NUMPY.sampler_step(want, np.stack([out, out]) if row.r else out, remembered, row, None, draw)
            for to, array in ((state, x), (other, added)):
                be.runtime.copy(to, be.asarray(array))
            got = sampled(be, kept, [x, other, *memory], row, None, draw, state, outputs=2)
            assert_close(be.to_numpy(got[0]), want, terms=4)
            for array, wanted in zip(got[1:], remembered, strict=True):
                assert_same_bits(be.to_numpy(array), wanted)


def sampled(be, kept, arrays, row, clip, draw, state=None, outputs=1):
    """x and the memory after a step by the sum of x and another array, as one output or as two."""
    x, *memory = (be.asarray(array).copy() for array in (arrays[0], *arrays[2:]))
    state = x.copy() if state is None else state
    out = kept.setdefault("out", be.empty((outputs, *x.shape)))
    other = kept.setdefault("other", be.asarray(arrays[1]))

    def output():
        for each in range(outputs):
            be.add(state, other, out[each])
        return out[0] if outputs == 1 else out

    if "sampling" not in kept:
        kept["sampling"] = be.record_sampling(output, state)
    kept["sampling"].run(x, tuple(memory), row, clip, draw)
    return [x, *memory]


PLANS = (
    TrainingPlan(),
    TrainingPlan(clip_norm=1e-3, ema=0.5, weight_decay=0.3),
    TrainingPlan(clip_norm=None, ema=None, weight_decay=0.0, lr=0.1),
)
SIZES = {"small": [1, 16, 1003, 4096, 4097, 30_011], "full": [1, 4097, 300_007, 20_000_003]}


@covers("optim", "square_sums", "finish_norm", "adamw")
def optimiser(be, size):
    for count, plan in itertools.product(SIZES[size], PLANS):
        random = np.random.default_rng(count)
        state = list(random.normal(size=(4, count)).astype(np.float32))
        state[2] = np.square(state[2])
        g = random.normal(size=count).astype(np.float32)
        options = plan.options(6, 100)
        want = [column.copy() for column in state]
        want_norm = NUMPY.adamw(TrainState(want[0], g, *want[1:]), options)
        got = [be.asarray(column.copy()) for column in state]
        norm = be.adamw(TrainState(got[0], be.asarray(g), *got[1:]), options)
        assert type(norm) is float
        assert_close(norm, want_norm, terms=count, dtype=np.float64)
        for column, wanted in zip(got, want, strict=True):
            assert_same_bits(be.to_numpy(column), wanted)
        for bad in (math.nan, math.inf, -math.inf):
            g[count // 2] = bad
            got = [be.asarray(column.copy()) for column in state]
            assert not math.isfinite(be.adamw(TrainState(got[0], be.asarray(g), *got[1:]), options))
            for column, wanted in zip(got, state, strict=True):
                assert_same_bits(be.to_numpy(column), wanted)


if __name__ == "__main__":
    import cuda_parity
    import cuda_parity_conv  # noqa: F401 - registers its checks
    import cuda_parity_conv_mma  # noqa: F401 - registers its checks
    import cuda_parity_covariance  # noqa: F401 - registers its checks
    import cuda_parity_layers  # noqa: F401 - registers its checks
    import cuda_parity_mlp  # noqa: F401 - registers its checks
    import cuda_parity_tmpd  # noqa: F401 - registers its checks
    from host_cuda import HostRuntime

    for name, check in cuda_parity.CHECKS.items():
        check.run(CudaBackend(HostRuntime("shuffled")), "small")
        print(name, "agrees")  # noqa: T201
