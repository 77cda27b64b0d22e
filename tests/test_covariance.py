"""The covariance room: similarity, scatter, spectra, reshaping, propagation, and its operations on every backend."""

from __future__ import annotations

import copy
import math
import pickle
import tracemalloc

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SIGMAS, WORKSPACE, assert_close, assert_estimate, assert_same_bits

import fastdiff as fd
from fastdiff import covariance
from fastdiff.backends import RowMap, get_backend
from fastdiff.backends.cpu import CpuBackend
from fastdiff.covariance import (
    check_covariance,
    effective_rank,
    empirical,
    propagate,
    propagate_chain,
    reshaping,
    scatter,
    similarity,
    spectrum,
)
from fastdiff.errors import ArgumentError
from fastdiff.noise import Draw
from fastdiff.schedule import Schedule

NUMPY, CPU = get_backend("numpy"), get_backend("cpu")
THREADED = [get_backend("cpu", threads=threads) for threads in (1, 2, 3)]
TUTORIAL = Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
REACHED = {"float64": 1e-10, "float32": 1e-4}  # scatter of what was reshaped, relative to the target
FORMS = ("spectrum", "transport")


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def matrix(n, condition=1e4, rank=None, seed=0):
    """A covariance with eigenvalues from 1 to 1 / condition."""
    basis = np.linalg.qr(normals(n, n, seed=seed))[0][:, :rank]
    return (basis * np.geomspace(1, 1 / condition, rank or n)) @ basis.T


def distance(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# -- similarity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 50, 131])
@pytest.mark.parametrize("batch", [None, 0, 1, 3])
def test_similarity_agrees_with_loops(backend, n, batch):
    v = 3 * normals(n) if batch is None else 3 * normals(batch, n)
    v = v.astype(np.float32)
    got = similarity(v, backend=backend)
    want = np.array([naive.similarity(row) for row in v.reshape(-1, n).tolist()]).reshape(*v.shape, n)
    assert got.dtype == np.float32
    # An error of the exponent, which is up to 100 here, is a relative one of the result.
    assert got.shape == want.shape
    assert np.all(np.abs(got - want) <= 1e-6 * want * (1 + np.ptp(v, axis=-1).max(initial=0) ** 2 / 8) + 2.0**-126)
    assert_same_bits(got, got.swapaxes(-1, -2))
    assert_same_bits(np.diagonal(got, axis1=-2, axis2=-1), np.ones(v.shape, np.float32))


def test_similarity_over_the_whole_range(backend):
    """Accurate down to the smallest normal number, 0 beyond the denormal ones, and no warning."""
    distances = np.linspace(0, 14, 3001, dtype=np.float32)
    got = similarity(np.concatenate([[0], distances]).astype(np.float32), backend=backend)[0, 1:]
    square = (distances * distances).astype(np.float64)
    normal = square < 87
    assert np.abs(got / np.exp(-square) - 1)[normal].max() < 2e-7
    assert got[~normal].max() <= 2.0**-125
    assert got[square > 110].max() == 0
    far = similarity(np.array([0, 3e38, -3e38], np.float32), backend=backend)
    assert_same_bits(far, np.eye(3, dtype=np.float32))


def test_similarity_in_float64_and_of_integers():
    v = normals(9)
    assert_close(similarity(v, backend="numpy"), np.array(naive.similarity(v)), terms=4)
    assert_same_bits(similarity([0, 1, 3]), similarity(np.array([0, 1, 3], np.float32)))


def test_similarity_does_not_depend_on_batch_or_threads():
    v = normals(700, 50).astype(np.float32)
    whole = [similarity(v, backend=be) for be in THREADED]
    for other in whole[1:]:
        assert_same_bits(other, whole[0])
    parts = [similarity(v[a:b]) for a, b in ((0, 1), (1, 8), (8, 700))]
    assert_same_bits(np.concatenate(parts), whole[0])
    assert_same_bits(similarity(v[3]), whole[0][3])


@pytest.mark.parametrize("bad", [np.float32(1), np.zeros((2, 2, 2)), [1j], [math.nan, 0], [[1], [1, 2]], "ab", [True]])
def test_similarity_refuses(bad, backend):
    with pytest.raises(ArgumentError, match=r"^v: got"):
        similarity(bad, backend=backend)


def peak_beside(work, result_bytes):
    """Bytes that a warm call has at once beside its result."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] - result_bytes
    finally:
        tracemalloc.stop()


def test_similarity_allocates_its_result_only(backend):
    v = normals(20, 300).astype(np.float32)
    assert peak_beside(lambda: similarity(v, backend=backend), 4 * 20 * 300**2) < WORKSPACE


# -- scatter and moments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (7, 3), (40, 11)])
@pytest.mark.parametrize("centre", [False, True])
def test_scatter_agrees_with_loops(shape, centre):
    X = normals(*shape) + 2
    want = np.array(naive.scatter(X, centre))
    assert_close(scatter(X, centre), want, terms=len(X), scale=np.sum(X**2))
    assert_close(scatter(X, centre=centre, normalise=True), want / len(X), terms=len(X), scale=np.sum(X**2) / len(X))
    assert_close(scatter(X.astype(np.float32), centre), want, dtype=np.float32, scale=np.sum(X**2))
    assert_same_bits(scatter(X.tolist(), centre), scatter(X, centre))


@pytest.mark.parametrize("rows", [2, 3, 5000])
def test_empirical_agrees_with_numpy_in_any_chunks(rows, tmp_path, monkeypatch):
    """A far mean, over which sums of squares would lose everything; blocks smaller than the chunks."""
    X = normals(rows, 6) * np.arange(1, 7) + 1e6
    np.save(tmp_path / "x.npy", X.astype(np.float32) if rows < 5 else X)
    saved = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = np.asarray(saved, np.float64)
    mean, cov = data.mean(axis=0), np.cov(data, rowvar=False)
    cuts = sorted(np.random.default_rng(1).integers(0, rows, 5))
    for values in (covariance.BLOCK_VALUES, 600):
        monkeypatch.setattr(covariance, "BLOCK_VALUES", values)
        for data_set in (saved, np.split(saved, cuts), (row[None] for row in saved), [data[:0], data]):
            got = empirical(data_set)
            assert got.count == rows
            np.testing.assert_allclose(got.mean, mean, rtol=1e-14)
            np.testing.assert_allclose(got.cov, cov, rtol=0, atol=1e-9 * np.abs(cov).max())
            assert_same_bits(got.cov, got.cov.T)
            assert got.cov.flags.c_contiguous


def test_empirical_holds_its_result_and_a_chunk(monkeypatch):
    """Of an array a block, of an iterable one chunk."""
    monkeypatch.setattr(covariance, "BLOCK_VALUES", 1 << 13)
    n, rows = 300, 600
    X = normals(rows, n).astype(np.float32)
    result, block = 8 * n * n, 8 * (1 << 13)
    for work, chunk in (
        (lambda: empirical(X), 0),
        (lambda: scatter(X), 0),
        (lambda: empirical(normals(100, n, seed=i) for i in range(6)), 8 * 100 * n),
    ):
        assert peak_beside(work, result) < 3 * block + 2 * chunk  # the old chunk is there while the new one is made


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones((1, 3)), "got 1 row, wants at least 2 rows"),
        ([np.ones((1, 3))], "got 1 row, wants"),
        (np.ones((0, 3)), "got 0 rows"),
        ([], "got 0 rows"),
        ([np.ones((2, 3)), np.ones((2, 4))], r"X, chunk 1: got shape \(2, 4\), wants shape \(any, 3\)"),
        ([np.ones((2, 3)), np.ones(3)], r"X, chunk 1: got shape \(3,\)"),
        (np.ones(3), r"got shape \(3,\)"),
        (7, "got int, wants an array"),
        ([np.ones((2, 1)), np.array([[0], [math.nan]])], r"X, chunk 1: got nan at index \(1, 0\)"),
        (np.ones((2, 2), complex), "dtype complex"),
    ],
)
def test_empirical_refuses(given, message):
    with pytest.raises(ArgumentError, match=message):
        empirical(given)


def test_scatter_refuses(monkeypatch):
    monkeypatch.setattr(covariance, "BLOCK_VALUES", 4)
    X = np.ones((5, 2))
    X[3, 1] = np.inf
    for bad, message in (
        (X, r"X, rows from 2: got inf at index \(1, 1\)"),
        (X[:0], "got no row"),
        ([[1], [1, 2]], "X"),
    ):
        with pytest.raises(ArgumentError, match=message):
            scatter(bad)


# -- spectra ---------------------------------------------------------------------------------------------------


def test_spectrum_descends():
    values = np.array([5.0, 2.0, 2.0, 0.0, -1.0])
    basis = np.linalg.qr(normals(5, 5))[0]
    C = (basis * values) @ basis.T
    np.testing.assert_allclose(spectrum(C), values, atol=1e-14)
    assert spectrum(C.astype(np.float32)).dtype == np.float64


def test_effective_ranks():
    for n in (1, 2, 30):
        for kind in ("entropy", "participation"):
            assert effective_rank(3 * np.eye(n), kind) == pytest.approx(n)
    assert effective_rank(np.ones((4, 4))) == pytest.approx(1)
    shares = np.array([0.5, 0.25, 0.25])
    C = np.diag(7 * shares)
    assert effective_rank(C) == pytest.approx(2**1.5)
    assert effective_rank(C, "participation") == pytest.approx(1 / 0.375)
    for C in (matrix(20), matrix(20, rank=3)):
        assert 1 <= effective_rank(C, "participation") <= effective_rank(C) <= np.linalg.matrix_rank(C) + 1e-9


def test_noise_is_more_complex_than_a_signal():
    """docs/background.md: the spectrum of a curve's similarity is far more concentrated than that of noise."""
    curve = fd.data.harmonic_curves(1)[0]
    assert effective_rank(similarity(curve)) < 5
    assert effective_rank(scatter(normals(1000, 50))) > 45


@pytest.mark.parametrize("check", [spectrum, effective_rank, lambda C: check_covariance("C", C)])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1.0, 0.5], [0.25, 1.0]], r"C: got entries that differ by 0.25 from their mirror, wants a symmetric"),
        ([[1.0, math.nan], [math.nan, 1.0]], "C: got nan"),
        (np.ones((2, 3)), r"C: got shape \(2, 3\), wants a square"),
        (np.ones((0, 0)), r"C: got shape \(0, 0\)"),
        (np.ones(3), "C: got shape"),
        (np.eye(2, dtype=complex), "C: got dtype"),
    ],
)
def test_what_is_no_symmetric_matrix(check, bad, message):
    with pytest.raises(ArgumentError, match=message):
        check(bad)


def test_what_is_no_covariance():
    with pytest.raises(ArgumentError, match=r"C: got an eigenvalue of -1; the largest is 2, wants no negative"):
        effective_rank(np.diag([2.0, -1.0]))
    with pytest.raises(ArgumentError, match="C: got no eigenvalue above 0"):
        effective_rank(np.zeros((3, 3)))
    with pytest.raises(ArgumentError, match="'entropy', 'participation'"):
        effective_rank(np.eye(2), "rank")
    with pytest.raises(ArgumentError, match="S: got shape"):
        check_covariance("S", np.eye(2), 3)


def test_a_covariance_may_be_rounded():
    """float32 is given the slack of float32, in symmetry and in eigenvalues."""
    C = matrix(12, rank=5)
    rounded = C.astype(np.float32)
    rounded[0, 1] += 1e-5
    got = check_covariance("C", rounded)
    assert got.eps == np.finfo(np.float32).eps
    assert_same_bits(got.cov, got.cov.T)
    assert got.spectrum.min() == 0
    np.testing.assert_allclose((got.basis * got.spectrum) @ got.basis.T, C, atol=2e-5)
    with pytest.raises(ArgumentError, match="mirror"):
        check_covariance("C", rounded.astype(np.float64))
    lifted = check_covariance("C", np.diag([1.0, -0.5]), jitter=0.75)
    assert lifted.spectrum.tolist() == [1.75, 0.25]


# -- reshaping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
@pytest.mark.parametrize("target_rank", [None, 20, 3])
def test_reshaped_noise_has_the_target_as_scatter(form, dtype, condition, target_rank):
    n = 48
    X = (normals(300, n) @ np.linalg.cholesky(matrix(n, condition, seed=1)).T).astype(dtype)
    target = matrix(n, condition, rank=target_rank, seed=2)
    r = reshaping(scatter(X), target, form=form)
    assert r.rank == (target_rank or n)
    for be in ("numpy", "cpu") if dtype == "float32" else ("numpy",):
        Y = r.apply(X, backend=be)
        assert Y.dtype == dtype
        assert distance(scatter(Y), target) < REACHED[dtype]
        back = r.inverse.apply(Y, backend=be)
        kept = X @ (r.before @ r.before.T)  # all of X where the rank is full
        assert distance(back, kept) < REACHED[dtype]
    if target_rank is None:
        assert distance(kept, X) < REACHED[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_the_matrix_is_the_formula(form):
    source, target = matrix(6, 50, seed=3), matrix(6, 20, seed=4)
    r = reshaping(source, target, form=form)
    np.testing.assert_allclose(r.matrix.T @ source @ r.matrix, target, atol=1e-13)
    np.testing.assert_allclose(r.inverse.matrix, np.linalg.inv(r.matrix), rtol=0, atol=1e-11)
    np.testing.assert_allclose(r.apply(np.eye(6), backend="numpy"), r.matrix, atol=1e-14)

    def root(C, power):
        values, basis = np.linalg.eigh(C)
        return (basis * values**power) @ basis.T

    if form == "transport":
        half, inverse = root(source, 0.5), root(source, -0.5)
        want = inverse @ root(half @ target @ half, 0.5) @ inverse
    else:
        (L, V), (L1, V1) = (np.linalg.eigh(C) for C in (source, target))
        want = (V * np.sign(np.sum(V * V1, axis=0)) * np.sqrt(L1 / L)) @ V1.T
    np.testing.assert_allclose(r.matrix, want, atol=1e-11)


def test_both_forms_reach_the_target_and_transport_moves_the_points_least():
    X, target = normals(500, 16, seed=5), matrix(16, 100, seed=6)
    moved, reached = {}, {}
    for form in FORMS:
        Y = reshaping(scatter(X), target, form=form).apply(X, backend="numpy")
        moved[form] = np.mean(np.sum((Y - X) ** 2, axis=1))
        reached[form] = distance(scatter(Y), target)
    assert max(reached.values()) < 1e-12
    assert moved["transport"] < 0.99 * moved["spectrum"]
    here, there = (check_covariance("C", C) for C in (scatter(X, normalise=True), target / len(X)))
    laws = [fd.denoisers.Moments(np.zeros(16), np.sqrt(c.spectrum), c.basis) for c in (here, there)]
    assert moved["transport"] == pytest.approx(laws[0].w2(laws[1]) ** 2)


def test_with_shared_eigenvectors_the_forms_are_one_and_equal_matrices_give_the_identity():
    C = matrix(9, 30)
    values, basis = np.linalg.eigh(C)
    target = (basis * (values**2 + 1)) @ basis.T
    spectral, transport = (reshaping(C, target, form=form).matrix for form in FORMS)
    np.testing.assert_allclose(spectral, transport, atol=1e-12)
    for form in FORMS:
        np.testing.assert_allclose(reshaping(C, C, form=form).matrix, np.eye(9), atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_a_singular_source_will_do_for_a_target_in_its_range(form):
    basis = np.linalg.qr(normals(10, 4))[0]
    source, target = (basis @ C @ basis.T for C in (matrix(4, 9, seed=1), matrix(4, 9, rank=3, seed=2)))
    r = reshaping(source, target, form=form)
    assert r.rank == 3
    np.testing.assert_allclose(r.matrix.T @ source @ r.matrix, target, atol=1e-13)
    np.testing.assert_allclose(r.matrix @ r.inverse.matrix, r.before @ r.before.T, atol=1e-13)
    nothing = reshaping(source, np.zeros((10, 10)), form=form)
    assert nothing.rank == 0
    assert not nothing.apply(np.ones((3, 10))).any()


def test_rank_tolerance():
    source, target = np.eye(3), np.diag([1.0, 1e-3, 1e-20])
    assert reshaping(source, target).rank == 2
    assert reshaping(source, target, rank_tol=1e-2).rank == 1
    assert reshaping(source, target, rank_tol=0).rank == 3
    assert reshaping(source, np.diag([1.0, 1e-3, 1e-6]).astype(np.float32)).rank == 3
    assert reshaping(source, np.diag([1.0, 1e-3, 1e-7]).astype(np.float32)).rank == 2


@pytest.mark.parametrize("form", FORMS)
def test_jitter_makes_up_for_rank(form):
    X = normals(5, 8)
    with pytest.raises(
        ArgumentError,
        match=r"target: got rank 8 for a source of rank 5, with rank_tol=\S+, wants at most rank 5, or jitter=",
    ):
        reshaping(scatter(X), np.eye(8), form=form)
    r = reshaping(scatter(X), np.eye(8), form=form, jitter=1e-3)
    assert r.rank == 8
    np.testing.assert_allclose(r.matrix.T @ (scatter(X) + 1e-3 * np.eye(8)) @ r.matrix, 1.001 * np.eye(8), atol=1e-9)
    with pytest.raises(
        ArgumentError, match=r"target: got an eigenvalue of -0.2.*wants no.*jitter=0.22 on the diagonal"
    ):
        reshaping(np.eye(2), np.diag([1, -0.2]), form=form)
    assert reshaping(np.eye(2), np.diag([1, -0.2]), form=form, jitter=0.22).rank == 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.eye(3), np.eye(2)), {}, r"target: got shape \(2, 2\), wants shape \(3, 3\)"),
        (([[1, 2], [0, 1]], np.eye(2)), {}, "source: got entries that differ by 2"),
        ((np.eye(2), [[1, 2], [0, 1]]), {}, "target: got entries"),
        ((np.full((2, 2), np.inf), np.eye(2)), {}, "source: got inf"),
        ((np.zeros((2, 2)), np.eye(2)), {}, "target: got rank 2 for a source of rank 0"),
        ((np.diag([1, 0]), np.diag([0, 1])), {"form": "transport"}, "target: got 1 of its trace outside .* jitter="),
        ((np.eye(2), np.eye(2)), {"form": "other"}, "form: got 'other', wants one of 'spectrum', 'transport'"),
        ((np.eye(2), np.eye(2)), {"jitter": -1}, "jitter: got -1"),
        ((np.eye(2), np.eye(2)), {"rank_tol": 2}, "rank_tol: got 2"),
    ],
)
def test_reshaping_refuses(arguments, options, message):
    with pytest.raises(ArgumentError, match=message):
        reshaping(*arguments, **options)


@pytest.mark.parametrize("rank", [None, 5])
def test_apply_in_any_batches(rank, backend, tmp_path):
    """The same bits on cpu; NumPy's products may round otherwise where the shapes differ."""
    r = reshaping(np.eye(24), matrix(24, rank=rank))
    X = normals(1000, 24).astype(np.float32)
    whole = r.apply(X, standardise=True, backend=backend)
    np.testing.assert_allclose(whole.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(whole.std(axis=1), 1, rtol=1e-5)
    np.save(tmp_path / "x.npy", X)
    for batch in (1, 7, 333, 1000, 5000):
        for rows in (X, np.load(tmp_path / "x.npy", mmap_mode="r"), X[:, ::-1].copy()[:, ::-1]):
            part = r.apply(rows, standardise=True, backend=backend, batch=batch)
            if backend == "cpu":
                assert_same_bits(part, whole)
            else:
                assert_close(part, whole, terms=24, scale=30)
    assert r.apply(X[:0], backend=backend).shape == (0, 24)


class Elsewhere(CpuBackend):
    """A backend whose arrays are not the caller's."""

    class Array(np.ndarray):
        pass

    def asarray(self, value, dtype=None):
        return super().asarray(value, dtype).view(self.Array)

    def empty(self, shape, dtype=np.float32):
        return super().empty(shape, dtype).view(self.Array)

    def owns(self, value):
        return isinstance(value, self.Array)

    def to_numpy(self, array):
        assert self.owns(array)
        return np.array(array)


@pytest.mark.parametrize("batch", [None, 3])
def test_results_come_back_from_where_they_are_made(batch):
    r, X = reshaping(np.eye(5), matrix(5)), normals(10, 5)
    got = r.apply(X, backend=Elsewhere(), batch=batch)
    assert type(got) is np.ndarray
    assert_same_bits(got, r.apply(X))
    assert type(similarity(X, backend=Elsewhere())) is np.ndarray


def test_the_cheaper_of_two_plans():
    """Two products of rank r cost 2 n r, one of the whole matrix n n; the results agree."""
    for rank, factored in ((5, True), (6, False)):
        r = reshaping(np.eye(12), matrix(12, rank=rank))
        assert [plan.right is not None for plan in r._plans] == [factored, factored]
        np.testing.assert_allclose(r.apply(np.eye(12), backend="numpy"), r.matrix, atol=1e-14)


def test_apply_bounds_its_memory():
    r = reshaping(np.eye(64), matrix(64))
    X = normals(10_000, 64)
    assert peak_beside(lambda: r.apply(X, batch=500), 4 * X.size) < 4 * 500 * 64 + WORKSPACE


def test_apply_refuses(backend):
    r = reshaping(np.eye(3), np.eye(3))
    X = np.ones((10, 3))
    X[7, 1] = np.nan
    for bad, message in (
        (X, r"X: got nan at index \(7, 1\)"), (X[:, :2], r"X: got shape \(10, 2\)"), (X[0], "X: got shape"),
        ([[1], [2, 3]], "X: got rows of different"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            r.apply(bad, backend=backend)
    with pytest.raises(ArgumentError, match=r"X\[6:8\]: got nan at index \(1, 1\)"):
        r.apply(X, backend=backend, batch=2)
    with pytest.raises(ArgumentError, match="batch: got 0"):
        r.apply(X[:2], backend=backend, batch=0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_reshaping_travels(again):
    r = reshaping(np.eye(8), matrix(8, rank=2))
    X = normals(5, 8)
    want = r.apply(X)
    assert_same_bits(again(r).apply(X), want)
    with pytest.raises(ValueError, match="read-only"):
        r.matrix[0, 0] = 1


# -- propagation -----------------------------------------------------------------------------------------------


def test_the_closed_form_is_the_chain():
    S0 = matrix(5, 10) * 3
    chain = list(propagate_chain(S0, TUTORIAL))
    assert len(chain) == TUTORIAL.T + 1
    assert_close(chain[0], S0)
    np.testing.assert_allclose(propagate(S0, TUTORIAL, np.arange(100)), np.stack(chain[1:]), rtol=1e-12, atol=1e-15)
    assert_same_bits(propagate(S0, TUTORIAL, 7), propagate(S0, TUTORIAL, [7])[0])
    abar = math.prod(1 - beta for beta in TUTORIAL.betas[:8])
    np.testing.assert_allclose(propagate(S0, TUTORIAL, 7), abar * S0 + (1 - abar) * np.eye(5), rtol=1e-12)


def test_measured_covariance_follows_the_closed_form():
    """Forward-noised draws at every tenth step, each entry of the covariance within its Monte Carlo error."""
    n, d = 1_000_000, 4
    factor = np.linalg.cholesky(matrix(d, 10) * 3)
    x0 = fd.normal((n, d), stream="data").astype(np.float64) @ factor.T
    for t in range(9, 100, 10):
        x_t, _ = fd.forward_noise(x0, t, TUTORIAL, seed=3)
        want = propagate(factor @ factor.T, TUTORIAL, t)
        error = np.sqrt((want**2 + np.outer(want.diagonal(), want.diagonal())) / n)
        got = empirical(x_t)
        assert_estimate(got.cov, want, error)
        assert np.abs(got.mean).max() < SIGMAS * math.sqrt(want.diagonal().max() / n)


def test_propagation_refuses():
    for function in (lambda S0, s: propagate(S0, s, 0), propagate_chain):  # the chain before its first step
        with pytest.raises(ArgumentError, match="S0: got an eigenvalue of -1"):
            function(-np.eye(2), TUTORIAL)
        with pytest.raises(ArgumentError, match="schedule: got int"):
            function(np.eye(2), 100)
    for bad in (100, -1, 0.5, [[1]]):
        with pytest.raises(ArgumentError, match="t: got"):
            propagate(np.eye(2), TUTORIAL, bad)


# -- the operations of a backend -------------------------------------------------------------------------------


def plan_of(n, k, rank, scaled, shifted, standardise, seed=0):
    rng = np.random.default_rng(seed)
    return RowMap(
        scale=rng.normal(size=n) if scaled else None,
        left=None if rank is None else rng.normal(size=(n, rank or k)),
        right=rng.normal(size=(rank, k)) if rank else None,
        offset=rng.normal(size=k) if shifted else None,
        standardise=standardise,
    )


def arguments_of(plan):
    return {
        name: part.tolist() if isinstance(part, np.ndarray) else part
        for name, part in ((f, getattr(plan, f)) for f in ("scale", "left", "right", "offset", "standardise"))
    }


def mapped(be, x, plan):
    out = be.empty((len(x), plan.shape[1]), x.dtype)
    out.fill(np.nan)
    be.map_rows(x, out, plan)
    return out


PLANS = [
    (1, 1, 0, False, False, False),
    (5, 5, None, True, False, False),
    (17, 17, None, True, True, True),
    (33, 20, 0, False, True, True),
    (20, 33, 0, False, False, False),
    (48, 48, 3, True, True, False),
    (31, 7, 2, False, False, True),
    (700, 9, 0, False, False, False),  # deeper than a product at once
    (9, 9, 600, True, False, True),
]


@pytest.mark.parametrize("sizes", PLANS)
@pytest.mark.parametrize("m", [0, 1, 6, 150])
def test_maps_of_rows_agree_with_loops(sizes, m):
    plan = plan_of(*sizes)
    x = normals(m, plan.shape[0])
    n, k = plan.shape
    want = np.array([naive.map_row(row, **arguments_of(plan)) for row in x.tolist()[:7]]).reshape(-1, k)
    exact = mapped(NUMPY, x, plan)
    scale = 60 * (1 if plan.right is None else len(plan.right))
    assert_close(exact[:7], want, terms=n, scale=scale)
    for be in (NUMPY, CPU):
        assert_close(mapped(be, x.astype(np.float32), plan), exact, dtype=np.float32, terms=n, scale=scale)


@given(data=st.data(), sizes=st.sampled_from(PLANS), m=st.integers(1, 600))
@settings(max_examples=25)
def test_a_mapped_row_does_not_depend_on_its_batch_or_the_threads(data, sizes, m):
    plan = plan_of(*sizes)
    x = normals(m, plan.shape[0]).astype(np.float32)
    whole = mapped(CPU, x, plan)
    cut = data.draw(st.integers(0, m))
    for be in THREADED:
        assert_same_bits(np.concatenate([mapped(be, x[:cut], plan), mapped(be, x[cut:], plan)]), whole)


@pytest.mark.parametrize(
    "sizes", [*PLANS, (3000, 3000, 2, False, False, False), (9001, 9001, None, True, False, False)]
)
@pytest.mark.parametrize("m", [1, 40, 300])
def test_shaped_noise_is_the_map_of_the_noise_law(sizes, m):
    plan = plan_of(*sizes)
    draw = Draw(5, 1, 9, 2**40)
    z = CPU.empty((m, plan.shape[0]))
    CPU.normal(z, draw)
    want = mapped(CPU, z, plan)
    for be in THREADED:
        out = be.empty((m, plan.shape[1]))
        be.mapped_normal(out, plan, draw)
        assert_same_bits(out, want)
        cut = m // 3
        be.mapped_normal(out[:cut], plan, draw)
        be.mapped_normal(out[cut:], plan, draw.after(cut))
        assert_same_bits(out, want)
    reference = NUMPY.empty((m, plan.shape[1]))
    NUMPY.mapped_normal(reference, plan, draw)
    assert_close(want, reference, terms=plan.shape[0], scale=60 * (1 if plan.right is None else len(plan.right)))


def test_shaped_noise_has_its_covariance(backend):
    target = matrix(6, 20)
    out = get_backend(backend).empty((40_000, 6))
    get_backend(backend).mapped_normal(out, RowMap(left=np.linalg.cholesky(target).T), Draw(1, 0))
    error = np.sqrt((target**2 + np.outer(target.diagonal(), target.diagonal())) / len(out))
    assert_estimate(empirical(out).cov, target, error)


def test_standardised_rows(backend):
    """Mean 0 and deviation 1; a constant row, whose computed mean need not be its value, becomes 0."""
    be = get_backend(backend)
    x = np.concatenate([normals(50, 10), np.full((3, 10), [[0.1], [-1e30], [0]]), 1e6 + normals(2, 10)]).astype(
        np.float32
    )
    y = mapped(be, x, RowMap(scale=np.ones(10), standardise=True))
    assert_same_bits(y[50:53] + 0, np.zeros((3, 10), np.float32))
    for rows in (y[:50], y[53:]):
        np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-6)
        np.testing.assert_allclose(rows.std(axis=1), 1, rtol=1e-5)


def test_maps_leave_nothing_behind():
    be = get_backend("cpu", threads=1)
    before = len(be._maps)
    mapped(be, np.ones((3, 4), np.float32), RowMap(left=np.eye(4)))
    assert len(be._maps) == before


# --------------------------------------------------------------------------------------- shrinkage


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (12, 30), (5, 5), (2, 3)])
def test_ledoit_wolf_is_scikit_learn_s(rows, columns):
    from sklearn.covariance import ledoit_wolf as peer

    X = np.random.default_rng(0).normal(size=(rows, columns)) @ np.diag(np.arange(1.0, columns + 1))
    want, shrinkage = peer(X)
    got = covariance.ledoit_wolf(X)
    assert got.shrinkage == pytest.approx(shrinkage)
    np.testing.assert_allclose(got.cov, want, atol=1e-12)


def test_draws_of_shrunk_moments_have_them():
    moments = covariance.ledoit_wolf(np.random.default_rng(0).normal(size=(6, 9)) + np.arange(9))
    of_rows, of_columns = np.eye(6), np.eye(9)
    of_rows, of_columns = (
        moments.sample(a, b) - moments.mean
        for a, b in ((of_rows, 0 * of_rows @ np.zeros((6, 9))), (np.zeros((9, 6)), of_columns))
    )
    np.testing.assert_allclose(of_rows.T @ of_rows + of_columns.T @ of_columns, moments.cov, atol=1e-12)
