"""The parity checks of the covariance operations, beside those of `cuda_parity`: they run on any runtime."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from cuda_parity import NUMPY, both_ways, covers
from tolerances import assert_close, assert_same_bits

from fastdiff.backends import RowMap
from fastdiff.noise import Draw, Stream

CURVES = {
    "small": [(1, 1), (3, 3), (50, 2), (7, 13), (2, 50), (5, 32), (3, 129), (1, 1030)],
    "full": [(1, 1), (4096, 128), (10_007, 50), (1_000_003, 3), (3, 5003)],
}


@covers("covariance", "similarity")
def similarities(be, size):
    for i, (batch, n) in enumerate(CURVES[size]):
        v = np.random.default_rng(i).normal(size=(batch, n), scale=(0.5, 3.0)[i % 2]).astype(np.float32)
        v[0, :: max(1, n // 3)] = (1e4, 1e-30, -7.0, 1e30)[i % 4]
        want = np.empty((batch, n, n))
        NUMPY.similarity(v.astype(np.float64), want)
        for (out,) in both_ways(be, np.full(want.shape, np.nan, np.float32)):
            be.similarity(be.asarray(v), out)
            got = be.to_numpy(out)
            # A difference d is off by half a unit of d; its square's exponential by 2 d times that, d^2 exp(-d^2) < 1.
            assert_close(got, want, scale=1.0)
            assert_same_bits(got, np.swapaxes(got, 1, 2))
            assert (got[:, np.arange(n), np.arange(n)] == 1).all()
    be.similarity(be.empty((0, 5)), be.empty((0, 5, 5)))


class Sizes(NamedTuple):
    """Of a map of m rows; parts: scale, offset, standardise; rank 0 is one matrix, None is none."""

    m: int
    n: int
    k: int
    rank: int | None
    parts: str


# Around the widths of a block: results of 32, 64, 128, 256 columns, chunks of x, x left in shared memory or not.
MAPS = {
    "small": [
        Sizes(7, 1, 1, 0, "so"),
        Sizes(6, 2, 5, 0, ""),
        Sizes(5, 9, 2, 0, "o"),
        Sizes(3, 90, 31, 0, "z"),
        Sizes(131, 50, 50, 0, "sz"),
        Sizes(67, 40, 100, 0, ""),
        Sizes(33, 300, 270, 0, "oz"),
        Sizes(3, 280, 280, 0, "s"),
        Sizes(37, 50, 50, 3, "so"),
        Sizes(5, 9, 300, 5, "z"),
        Sizes(2, 600, 600, 2, "so"),
        Sizes(4, 101, 101, 100, "soz"),
        Sizes(1, 400, 130, 129, ""),
        Sizes(8, 13, 13, None, "so"),
        Sizes(3, 290, 290, None, "sz"),
    ],
    "full": [
        Sizes(200_003, 128, 128, 0, ""),
        Sizes(100_003, 50, 50, 0, "oz"),
        Sizes(20_001, 50, 50, 8, "so"),
        Sizes(1003, 1000, 999, 0, "oz"),
        Sizes(301, 3072, 3072, 16, "soz"),
        Sizes(515, 700, 700, 300, "s"),
        Sizes(100_003, 3, 3, None, "soz"),
    ],
}


def map_of(sizes):
    """A plan whose terms are all of the size of one."""
    random, (_, n, k, rank, parts) = np.random.default_rng(sum(sizes[:3])), sizes
    left = None if rank is None else random.normal(size=(n, rank or k)) / np.sqrt(n)
    return RowMap(
        scale=random.normal(size=n) if "s" in parts else None,
        left=left,
        right=random.normal(size=(rank, k)) / np.sqrt(rank) if rank else None,
        offset=random.normal(size=k) if "o" in parts else None,
        standardise="z" in parts,
    )


def products(sizes):
    """How many products a value adds up."""
    return sizes.n + (sizes.rank or 0) + sizes.k


@covers("covariance", "map_rows", "standardise_rows")
def maps_of_rows(be, size):
    for i, sizes in enumerate(MAPS[size]):
        plan, shape = map_of(sizes), (sizes.m, sizes.k)
        x = np.random.default_rng(i).normal(size=(sizes.m, sizes.n)).astype(np.float32)
        want = np.empty(shape)
        NUMPY.map_rows(x.astype(np.float64), want, plan)
        for there, out in both_ways(be, x, np.full(shape, np.nan, np.float32)):
            be.map_rows(there, out, plan)
            got = be.to_numpy(out)
            assert_close(got, want, terms=products(sizes))
        a = sizes.m // 3  # a row does not depend on its batch
        part = be.empty((min(3, sizes.m - a), sizes.k))
        be.map_rows(be.asarray(x[a : a + 3]), part, plan)
        assert_same_bits(be.to_numpy(part), got[a : a + 3])
    be.map_rows(be.empty((0, sizes.n)), be.empty((0, sizes.k)), plan)


@covers("covariance", "map_rows", "standardise_rows")
def mapped_normals(be, size):
    """Normals have the bits of the noise law: the map of stored ones gives the same bits."""
    for i, sizes in enumerate(MAPS[size]):
        plan, m = map_of(sizes), sizes.m
        first = (2**32 - 2, 2**56 - m, 0)[i % 3]
        draw = Draw((0, 2**64 - 1)[i % 2], list(Stream)[i % len(Stream)], (5, 2**32 - 1)[i % 2], first)
        z, stored, out = be.empty((m, sizes.n)), be.empty((m, sizes.k)), be.empty((m, sizes.k))
        be.normal(z, draw)
        be.map_rows(z, stored, plan)
        be.mapped_normal(out, plan, draw)
        got = be.to_numpy(out)
        assert_same_bits(got, be.to_numpy(stored))
        want = np.empty((m, sizes.k))
        NUMPY.mapped_normal(want, plan, draw)
        assert_close(got, want, terms=products(sizes))
        part = be.empty((m - m // 2, sizes.k))
        be.mapped_normal(part, plan, draw.after(m // 2))
        assert_same_bits(be.to_numpy(part), got[m // 2 :])


# (rows, data, columns): around tiles of 16 and 64 rows, of 128 rows of data, of 64 columns.
POSTERIORS = {
    "small": [(1, 1, 1), (5, 3, 2), (70, 140, 7), (130, 64, 33), (17, 129, 66), (3, 260, 130)],
    "full": [(1, 1, 1), (1003, 10_007, 50), (20_001, 300, 128), (67, 1009, 3072), (9, 100_003, 3)],
}


@covers("covariance", "posterior_mean")
def posterior_means(be, size):
    for (m, count, d), together in itertools.product(POSTERIORS[size], (True, False)):
        random = np.random.default_rng(m)
        data = random.normal(size=(count, d)).astype(np.float32)
        signal, noise = np.full((2, m), [[0.75], [0.5]]) if together else random.uniform(0.3, 1.0, (2, m))
        # Rows near a row of the data, and far from all.
        x = signal[:, None] * data[random.integers(0, count, m)] + noise[:, None] * random.normal(size=(m, d))
        x[::5] *= 3
        x = x.astype(np.float32)
        want, want_log = np.empty((m, d)), np.empty(m)
        NUMPY.posterior_mean(x.astype(np.float64), data.astype(np.float64), signal, noise, want, want_log)
        x_there, data_there, out, log_sum = be.asarray(x), be.asarray(data), be.empty((m, d)), be.empty((m,))
        be.posterior_mean(x_there, data_there, signal, noise, out, log_sum)
        got, got_log = be.to_numpy(out), be.to_numpy(log_sum)
        exponents = max(1.0, np.abs(want_log).max())  # they are what is rounded
        assert_close(got_log, want_log, terms=d + 4, scale=exponents)
        assert_close(got, want, terms=d + count, scale=exponents * np.abs(data).max())
        a = m // 3  # a row does not depend on its batch
        part, part_log = be.empty((min(4, m - a), d)), be.empty((min(4, m - a),))
        be.posterior_mean(be.asarray(x[a : a + 4]), data_there, signal[a : a + 4], noise[a : a + 4], part, part_log)
        assert_same_bits(be.to_numpy(part), got[a : a + 4])
        assert_same_bits(be.to_numpy(part_log), got_log[a : a + 4])
    none = np.empty(0)
    be.posterior_mean(be.empty((0, d)), data_there, none, none, be.empty((0, d)), be.empty((0,)))


BLENDS = {
    "small": [(1, 1, 1), (9, 50, 50), (35, 3, 70), (20, 33, 0)],
    "full": [(1, 1, 1), (100_003, 50, 50), (1003, 3072, 16)],
}


@covers("covariance", "blend")
def blends(be, size):
    for m, d, r in BLENDS[size]:
        random = np.random.default_rng(m)
        want, want_state = np.zeros((m, d)), np.tile([-np.inf, 0.0], (m, 1))
        out, state = be.asarray(want), be.asarray(want_state)
        for constant in (-1.5, 0.25, 90.0, -40.0, 88.0):
            parts, residuals = (random.normal(size=(m, width)).astype(np.float32) for width in (d, r))
            NUMPY.blend(want, want_state, parts.astype(np.float64), residuals.astype(np.float64), constant)
            be.blend(out, state, be.asarray(parts), be.asarray(residuals), constant)
        assert_close(be.to_numpy(state), want_state, terms=r + 8)
        assert_close(be.to_numpy(out), want, terms=r + 8, scale=np.abs(want_state).max())
    be.blend(be.empty((0, 3)), be.empty((0, 2)), be.empty((0, 3)), be.empty((0, 3)), 0.0)
