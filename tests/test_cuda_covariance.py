"""The covariance operations of the CUDA backend, run on the CPU from the text of the kernels.

`cuda_parity_covariance` says that they agree with NumPy, in any batch; here is what else they promise: that how a map
runs changes no bit, what happens at the edges of float32, what is kept on the device, and that the Numba twin is taken.
"""

import gc
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from cuda_parity_covariance import MAPS, Sizes, map_of
from host_cuda import ORDERS, HostRuntime, has_compiler
from tolerances import HANG_SECONDS, assert_close, assert_same_bits

from fastdiff.backends import RowMap, get_backend
from fastdiff.backends.cuda import CudaBackend
from fastdiff.backends.cuda import covariance as operations
from fastdiff.backends.cuda.covariance import PRODUCTS, MapTile, map_tile, packed
from fastdiff.noise import Draw, Stream

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")

NUMPY, F = get_backend("numpy"), np.float32
DRAW = Draw(3, Stream.INIT, first_row=7)
LEAST_SHARED_LIMIT = 99 * 1024  # of the architectures that the gate compiles for: sm_120


@pytest.fixture(params=ORDERS)
def be(request):
    return CudaBackend(HostRuntime(request.param))


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(F)


def mapped(be, x, plan):
    out = be.empty((len(x), plan.shape[1]))
    be.map_rows(x, out, plan)
    return out


def drawn(be, m, plan):
    out = be.empty((m, plan.shape[1]))
    be.mapped_normal(out, plan, DRAW)
    return out


def posterior(be, x, data, signal, noise):
    out, log_sum = be.empty(x.shape), be.empty((len(x),))
    be.posterior_mean(x, data, np.full(len(x), signal), np.full(len(x), noise), out, log_sum)
    return out, log_sum


# ------------------------------------------------------------------------------------------- how a map runs


def test_the_rule_of_a_map():
    for n, k in itertools.product([1, 3, 32, 33, 50, 64, 65, 128, 129, 300, 3072], repeat=2):
        for rank in (0, 1, 16, 200, 3000):
            tile = map_tile(n, k, rank)
            assert tile.shared <= LEAST_SHARED_LIMIT
            assert tile.chunk % 4 == 0
            assert tile.rows == 32 or k <= PRODUCTS // tile.rows
    assert map_tile(128, 128) == MapTile(64, 128, False, 4 * 64 * (132 + 132))
    assert map_tile(50, 50, 8) == MapTile(128, 52, True, 4 * 128 * (52 + 52 + 12))
    assert [map_tile(300, 300, rank).fused for rank in (0, 16, 190, 200)] == [False, True, False, False]


@pytest.mark.parametrize("sizes", [s for s in MAPS["small"] if s.rank is not None], ids=str)
def test_how_a_map_runs_changes_no_bits(monkeypatch, sizes):
    """Rows of a block, chunks of x, and whether x left is kept in shared memory."""
    be = CudaBackend(HostRuntime("shuffled"))
    plan, x = map_of(sizes), normals(sizes.m, sizes.n)
    want, want_drawn = mapped(be, x, plan), drawn(be, sizes.m, plan)
    for rows, chunk, fused in [(256, 4, False), (32, 12, True), (64, 36, True), (128, 8, False)]:
        tile = MapTile(rows, chunk, fused, be.runtime.shared_limit)
        monkeypatch.setattr(operations, "map_tile", lambda n, k, rank=0, tile=tile: tile)
        assert_same_bits(mapped(be, x, plan), want)
        assert_same_bits(drawn(be, sizes.m, plan), want_drawn)


def test_a_product_of_rank_zero_adds_nothing(be):
    scale, offset = np.linspace(1, 2, 6), np.arange(6.0)
    plan = RowMap(scale=scale, left=np.empty((6, 0)), right=np.empty((0, 6)), offset=offset)
    x = normals(5, 6)
    assert_same_bits(mapped(be, x, plan), mapped(be, x, RowMap(scale=scale, offset=offset)))
    assert_same_bits(drawn(be, 5, plan), drawn(be, 5, RowMap(scale=scale, offset=offset)))


def test_drawn_rows_are_not_stored(be):
    for sizes in MAPS["small"]:
        be.runtime.launches.clear()
        drawn(be, sizes.m, map_of(sizes))
        assert {entry for _, entry in be.runtime.launches} <= {"map_rows", "standardise_rows"}


def test_packed_matrices_are_in_the_order_of_the_noise_blocks():
    assert packed(np.arange(1.0, 7.0)).tolist() == [1, 3, 5, 0, 2, 4, 6, 0]
    matrix = packed(np.arange(15.0).reshape(5, 3) + 1)
    assert matrix.shape == (8, 4)
    assert matrix[[0, 1, 2, 4, 5]].tolist() == [
        [1, 2, 3, 0], [7, 8, 9, 0], [13, 14, 15, 0], [4, 5, 6, 0], [10, 11, 12, 0]
    ]  # fmt: skip
    assert not matrix[[3, 6, 7]].any()


def test_a_plan_is_kept_on_the_device_as_long_as_it_lives(be, monkeypatch):
    plan, uploads, asarray = map_of(Sizes(3, 5, 4, 0, "o")), [], be.runtime.asarray
    monkeypatch.setattr(be.runtime, "asarray", lambda *args: uploads.append(args) or asarray(*args))
    x = normals(3, 5)
    first = mapped(be, x, plan)
    assert len(uploads) == 2
    assert_same_bits(mapped(be, x, plan), first)
    assert len(uploads) == 2
    monkeypatch.setattr(be.runtime, "queue", lambda: 1)  # work there does not wait for what was issued here
    assert_same_bits(mapped(be, x, plan), first)
    assert len(uploads) == 4
    gone = weakref.ref(plan)
    del plan
    gc.collect()
    assert gone() is None
    assert not be._maps


# ------------------------------------------------------------------------------------------- the edges of float32


@pytest.mark.parametrize("k", [1, 3, 50, 300])
def test_a_constant_row_becomes_zero(be, k):
    """Also where the float32 sum of its values is not k times the value; the other rows are not touched by it."""
    x = normals(5, k)
    x[1], x[3] = 0.1, -1e30
    for plan in (RowMap(scale=np.ones(k), standardise=True), RowMap(left=np.eye(k), standardise=True)):
        got = mapped(be, x, plan)
        assert not got[[1, 3]].any()
        if k > 1:
            assert_close(got[::2].mean(axis=1), np.zeros(3), scale=1.0)
            assert_close(got[::2].std(axis=1), np.ones(3), terms=4)


def test_what_is_not_finite_stays_in_its_row(be):
    x = normals(9, 50)
    x[4, 7], x[6, 0] = np.nan, np.inf
    rest = [0, 1, 2, 3, 5, 7, 8]
    clean = x.copy()
    clean[[4, 6]] = 0
    for parts, rank in (("", 0), ("so", 3), ("z", 0)):
        plan = map_of(Sizes(9, 50, 50, rank, parts))
        got = mapped(be, x, plan)
        assert_same_bits(got[rest], mapped(be, clean, plan)[rest])
        assert np.isnan(got[4]).all()
        assert not np.isfinite(got[6]).any()
    got, log_sum = posterior(be, x, normals(33, 50, seed=1), 0.8, 0.6)
    want, want_log = posterior(be, clean, normals(33, 50, seed=1), 0.8, 0.6)
    assert_same_bits(got[rest], want[rest])
    assert_same_bits(log_sum[rest], want_log[rest])
    assert np.isnan(got[4]).all()


def test_similarity_of_values_that_are_not_finite_or_far_apart(be):
    v = np.array([[0.0, np.nan, np.inf, -np.inf, 9.3, 9.4, 1e-30, 3e38]], F)
    want, got = np.empty((1, 8, 8), F), be.empty((1, 8, 8))
    with np.errstate(all="ignore"):
        NUMPY.similarity(v, want)
    be.similarity(v, got)
    assert np.isnan(got).tolist() == np.isnan(want).tolist()
    assert_close(np.nan_to_num(got), np.nan_to_num(want), scale=1.0)
    assert got[0, 0, 5] == 0  # exp(-88): below it float32 has denormals only


# ------------------------------------------------------------------------------------------- posterior means


def test_a_posterior_mean_lands_on_the_data(be):
    """With little noise the mean is a row of the data to the bit, however far the others are."""
    data, k = normals(300, 7), np.arange(0, 300, 13)
    x = F(0.5) * data[k]
    for noise in (1e-2, 1e-4):
        got, log_sum = posterior(be, x, data, 0.5, noise)
        assert_same_bits(got, data[k])
        assert (log_sum == 0).all()
    got, log_sum = posterior(be, x, data[5:6], 0.5, 1e-4)
    assert_same_bits(got, np.repeat(data[5:6], len(k), axis=0))
    assert np.isfinite(log_sum).all()
    assert log_sum.min() < -1e4  # its exponential is 0 in any float


def test_a_posterior_mean_survives_a_distant_origin(be):
    """The squares of x and y are 1e7 times those of their differences: expanded, nothing would be left of these."""
    signal, noise = 0.75, 2.0**-6
    data = F(100) + F(0.02) * normals(150, 5)
    x = (signal * data[::10] + 0.02 * normals(15, 5, seed=1)).astype(F)
    want, want_log = np.empty((15, 5)), np.empty(15)
    NUMPY.posterior_mean(
        x.astype(np.float64), data.astype(np.float64), np.full(15, signal), np.full(15, noise), want, want_log
    )
    got, got_log = posterior(be, x, data, signal, noise)
    assert_close(got_log, want_log, terms=9, scale=np.abs(want_log).max())
    assert_close(got, want, terms=9)
    assert want.std(axis=0).min() > 100 * np.abs(got - want).max()


def test_posterior_means_of_few_rows_have_the_bits_of_many():
    """Tiles of 16 rows where there are more multiprocessors than tiles of 64."""
    x, data = normals(150, 70), normals(200, 70, seed=1)
    wants = posterior(CudaBackend(HostRuntime(multiprocessors=1)), x, data, 0.6, 0.8)
    for multiprocessors in (3, 4, 50):
        here = CudaBackend(HostRuntime("backward", multiprocessors=multiprocessors))
        for got, want in zip(posterior(here, x, data, 0.6, 0.8), wants, strict=True):
            assert_same_bits(got, want)


# ------------------------------------------------------------------------------------------- the Numba twin

TWIN = """
import numpy as np
from cuda_parity_covariance import Sizes, map_of
from host_cuda import HostRuntime
from tolerances import assert_close
from fastdiff.backends import get_backend
from fastdiff.backends.cuda import CudaBackend
here = HostRuntime()
be = CudaBackend(here, "numba")
x = np.random.default_rng(0).normal(size=(9, 13)).astype(np.float32)
launched = [set(), set(), {"standardise_rows"}, {"map_rows"}]
for (k, rank, parts), entries in zip([(5, 0, "o"), (13, 2, "so"), (13, 0, "sz"), (13, None, "s")], launched):
    plan = map_of(Sizes(9, 13, k, rank, parts))
    here.launches.clear()
    want, out = np.empty((9, k)), be.empty((9, k))
    get_backend("numpy").map_rows(x.astype(np.float64), want, plan)
    be.map_rows(x, out, plan)
    assert_close(out, want, terms=20)
    assert {entry for _, entry in here.launches} == entries
print("agree")
"""


def test_the_twin_is_taken_where_there_is_one():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWIN],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=environment, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.stdout == "agree\n", done.stderr[-2000:]
