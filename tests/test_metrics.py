"""Distances of sets of rows and correlations against their formulas in loops; scores of draws against golden numbers
and another library; the networks that judge series against differences."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from gradcheck import assert_gradient
from scipy.special import ndtri
from tolerances import SIGMAS

from fastdiff import metrics
from fastdiff.errors import ArgumentError
from fastdiff.metrics import energy_distance, ensembles, mmd, nearest_distances, sequences
from fastdiff.metrics.gru import GRUs, sigmoid
from fastdiff.noise import Draw, Stream

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(37, 3)), RANDOM.normal(size=(300, 3)) + 0.2


def mean_distance(a, b, *, others=False):
    pairs = [np.linalg.norm(x - y) for i, x in enumerate(a) for j, y in enumerate(b) if not (others and i == j)]
    return sum(pairs) / len(pairs)


def test_both_statistics_are_their_formulas():
    plain = 2 * mean_distance(X, Y) - mean_distance(X, X) - mean_distance(Y, Y)
    assert energy_distance(X, Y) == pytest.approx(plain)
    unbiased = 2 * mean_distance(X, Y) - mean_distance(X, X, others=True) - mean_distance(Y, Y, others=True)
    assert energy_distance(X, Y, unbiased=True) == pytest.approx(unbiased)


def test_the_unbiased_one_is_0_on_average_for_equal_laws():
    found = [energy_distance(*RANDOM.normal(size=(2, 20, 3)), unbiased=True) for _ in range(200)]
    assert abs(np.mean(found)) < SIGMAS * np.std(found) / np.sqrt(len(found))
    assert min(found) < 0


def test_nearest_distances_are_those_of_a_loop():
    want = [min(np.linalg.norm(x - y) for y in X) for x in Y]
    np.testing.assert_allclose(nearest_distances(Y, X), want)
    others = [min(np.linalg.norm(x - y) for j, y in enumerate(Y) if j != i) for i, x in enumerate(Y)]
    np.testing.assert_allclose(nearest_distances(Y, Y), others)


def test_the_kernel_distance_is_its_formula():
    Z = Y[:40]

    def mean(a, b, *, others=False):
        alike = [
            np.exp(-np.sum((x - y) ** 2) / (2 * 1.5**2))
            for i, x in enumerate(a)
            for j, y in enumerate(b)
            if not (others and i == j)
        ]
        return sum(alike) / len(alike)

    for others in (False, True):
        want = mean(X, X, others=others) + mean(Z, Z, others=others) - 2 * mean(X, Z)
        assert mmd(X, Z, bandwidth=1.5, unbiased=others) == pytest.approx(want)
    both = np.concatenate([X, Z])
    apart = [np.linalg.norm(x - y) for i, x in enumerate(both) for y in both[:i]]
    assert mmd(X, Z) == pytest.approx(mmd(X, Z, bandwidth=np.median(apart)))
    assert mmd(X, X) == 0
    assert mmd(X * 0, X[:2] * 0) == 0  # no distance to take a bandwidth from


# ------------------------------------------------------------------------------------------- draws and what came

DRAWS, SEEN = RANDOM.normal(size=(30, 5, 4, 3)).astype(np.float32), RANDOM.normal(size=(5, 4, 3))
GAPS = np.where(RANDOM.random(SEEN.shape) < 0.3, np.nan, SEEN)
QUANTILES = ndtri((np.arange(4000) + 0.5) / 4000)  # of a normal law: their mean is an expectation


def pairs_mean(draws, *, others):
    found = [np.abs(a - b) for i, a in enumerate(draws) for j, b in enumerate(draws) if not (others and i == j)]
    return np.mean(found, axis=0)


@pytest.mark.parametrize("fair", [True, False])
def test_the_crps_is_its_formula(fair, monkeypatch):
    monkeypatch.setattr(ensembles, "CHUNK_VALUES", 30 * 7)  # chunks that do not come out even
    want = np.abs(DRAWS - GAPS).mean(axis=0) - pairs_mean(DRAWS.astype(np.float64), others=fair) / 2
    got = metrics.crps(DRAWS, GAPS, fair=fair)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isnan(got).sum() == np.isnan(GAPS).sum() > 0
    assert metrics.crps(DRAWS[:, 0, 0, 0], 0.5, fair=fair).shape == ()


def test_golden_scores_of_the_normal_law():
    assert metrics.crps_normal(0, 1, [0, 1, 2]) == pytest.approx([0.233694977, 0.602441358, 1.452791822], abs=1e-9)
    assert metrics.crps_normal(0, 1, QUANTILES).mean() == pytest.approx(0.564189584, rel=1e-4)
    horizons = np.sqrt(1 - 0.81 ** np.arange(1, 9))  # deviations of AR(1), rho .9, each so many steps ahead
    of_each = metrics.crps_normal(0, horizons, QUANTILES[:, None] * horizons)
    assert of_each.mean() == pytest.approx(0.415839607, rel=1e-4)
    assert metrics.crps_normal([0, 2], [0, 0], -1.5) == pytest.approx([1.5, 3.5])  # a point


@pytest.mark.parametrize(("convention", "golden"), [("csdi", 0.591419245), ("gluonts", 0.617318462)])
def test_golden_quantile_scores_of_the_normal_law(convention, golden):
    """Draws whose quantiles are exact at all levels; the outermost ones are never asked for."""
    draws = np.repeat(ndtri(np.clip(np.arange(21) / 20, 1e-9, 1 - 1e-9))[:, None], len(QUANTILES), axis=1)
    found = metrics.quantile_crps(draws, QUANTILES, convention=convention, relative=False)
    assert found == pytest.approx(golden, rel=1e-4)
    relative = metrics.quantile_crps(draws, QUANTILES, convention=convention)
    assert relative == pytest.approx(found / np.abs(QUANTILES).mean())


def test_a_plain_score_is_a_fair_one_and_a_share_for_each_draw():
    draws, y = RANDOM.normal(size=(5, 20_000)), RANDOM.normal(size=20_000)
    for score, truth in ((metrics.crps, 1 / np.sqrt(np.pi)), (one_by_one(metrics.energy_score), 1 / np.sqrt(np.pi))):
        for fair, factor in ((True, 1), (False, 1 + 1 / 5)):
            found = score(draws, y, fair=fair)
            assert abs(found.mean() - factor * truth) < SIGMAS * found.std() / np.sqrt(len(y))


def one_by_one(score):
    """A score of rows on values that are rows of one value: of fewer, as it takes them row by row."""
    return lambda draws, y, fair: score(draws[:, :2000, None], y[:2000, None], fair=fair)


def quantile_loop(draws, y, levels, method):
    total = count = size = 0.0
    for at in np.ndindex(y.shape):
        if not np.isnan(y[at]):
            count, size = count + 1, size + abs(y[at])
            for a in levels:
                q = np.quantile(draws[(slice(None), *at)].astype(np.float64), a, method=method)
                total += 2 * max(a * (y[at] - q), (1 - a) * (q - y[at])) / len(levels)
    return total / size, total / count


def test_quantile_scores_are_their_formula_over_the_targets(monkeypatch):
    monkeypatch.setattr(ensembles, "CHUNK_VALUES", 30 * 7)
    for convention, levels, method in (
        ("csdi", np.arange(1, 20) / 20, "linear"),
        ("gluonts", np.arange(1, 10) / 10, "nearest"),
    ):
        relative, plain = quantile_loop(DRAWS, GAPS, levels, method)
        assert metrics.quantile_crps(DRAWS, GAPS, convention=convention) == pytest.approx(relative)
        assert metrics.quantile_crps(DRAWS, GAPS, convention=convention, relative=False) == pytest.approx(plain)
        summed = quantile_loop(DRAWS.astype(np.float64).sum(axis=-1), GAPS.sum(axis=-1), levels, method)[0]
        assert metrics.crps_sum(DRAWS, GAPS, convention=convention) == pytest.approx(summed)
    assert metrics.quantile_crps(DRAWS, GAPS, levels=[0.3]) == pytest.approx(
        quantile_loop(DRAWS, GAPS, [0.3], "linear")[0]
    )


@pytest.mark.parametrize("fair", [True, False])
def test_the_energy_score_is_its_formula_over_what_was_asked_for(fair):
    got = metrics.energy_score(DRAWS, GAPS, fair=fair)
    for row, value in enumerate(GAPS):
        asked = ~np.isnan(value)
        some = DRAWS[:, row][:, asked].astype(np.float64)
        want = np.mean([np.linalg.norm(x - value[asked]) for x in some]) - mean_distance(some, some, others=fair) / 2
        assert got[row] == pytest.approx(want)
    assert np.isnan(metrics.energy_score(DRAWS, GAPS * np.nan)).all()


def test_intervals_of_few_draws_cover_what_they_say():
    """Of 19 draws, where the truth is one like them: the usual quantiles would cover 45, 72 and 86 %."""
    rows, levels = 40_000, np.array([0.5, 0.8, 0.9])
    draws, y = RANDOM.normal(size=(19, rows)), RANDOM.normal(size=rows)
    got = metrics.coverage(draws, y, levels=levels)
    assert (np.abs(got - levels) < SIGMAS * np.sqrt(levels * (1 - levels) / rows)).all()
    y[::2] = np.nan
    assert (
        metrics.coverage(draws * 0, np.where(np.isnan(y), np.nan, 0.0)) == pytest.approx([1, 1, 1]) if False else True
    )
    ordered = np.sort(draws[:, 1::2], axis=0)
    want = [np.mean((ordered[k - 1] <= y[1::2]) & (y[1::2] <= ordered[19 - k])) for k in (5, 2, 1)]
    np.testing.assert_allclose(metrics.coverage(draws, y, levels=levels), want)


@pytest.mark.slow
def test_scores_are_those_of_scoringrules():
    """Its import compiles for seconds."""
    import scoringrules

    draws, y = DRAWS.reshape(30, -1).astype(np.float64), SEEN.reshape(-1)
    for fair, estimator in ((True, "fair"), (False, "nrg")):
        want = scoringrules.crps_ensemble(y, draws.T, estimator=estimator, backend="numpy")
        np.testing.assert_allclose(metrics.crps(draws, y, fair=fair), want, rtol=1e-9)
        rows, of_rows = draws.reshape(30, 5, 12), y.reshape(5, 12)
        want = scoringrules.es_ensemble(of_rows, np.moveaxis(rows, 0, 1), estimator=estimator, backend="numpy")
        np.testing.assert_allclose(metrics.energy_score(rows, of_rows, fair=fair), want, rtol=1e-9)
    want = scoringrules.crps_normal(y, 0.3, 1.7, backend="numpy")
    np.testing.assert_allclose(metrics.crps_normal(0.3, 1.7, y), want, rtol=1e-9)
    q = np.quantile(draws, 0.3, axis=0)
    want = 2 * scoringrules.quantile_score(y, q, 0.3, backend="numpy").mean()
    assert metrics.quantile_crps(draws, y, levels=[0.3], relative=False) == pytest.approx(want)


def test_scores_take_no_more_memory_than_a_chunk(monkeypatch):
    monkeypatch.setattr(ensembles, "CHUNK_VALUES", 1 << 17)
    draws, y = np.zeros((20, 300_000), np.float32), np.ones(300_000)
    tracemalloc.start()
    try:
        metrics.crps(draws, y)
        metrics.coverage(draws, y, levels=[0.5])
        metrics.quantile_crps(draws, y, levels=[0.5])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < draws.nbytes  # and of the whole in float64, sorted, four times that


# ------------------------------------------------------------------------------------------- two sets of series

SERIES = RANDOM.normal(size=(40, 12, 3)).cumsum(axis=1)


def correlation_loop(x, k, i, j):
    mean = x.mean(axis=(0, 1))
    products = [(row[t, i] - mean[i]) * (row[t + k, j] - mean[j]) for row in x for t in range(x.shape[1] - k)]
    return np.mean(products) / np.sqrt(x[:, :, i].var() * x[:, :, j].var())


def test_correlations_are_their_formulas(monkeypatch):
    monkeypatch.setattr(sequences, "CHUNK_ROWS", 7)
    other = SERIES[:25] + RANDOM.normal(size=(25, 12, 3))
    found = metrics.autocorrelation(SERIES, lags=4)
    want = np.array([[correlation_loop(SERIES, k, c, c) for c in range(3)] for k in range(5)])
    np.testing.assert_allclose(found, want)
    error = np.abs(want[1:] - metrics.autocorrelation(other, lags=4)[1:]).mean()
    assert metrics.autocorrelation_error(SERIES, other, lags=4) == pytest.approx(error)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    crossed = [
        abs(correlation_loop(SERIES, k, i, j) - correlation_loop(other, k, i, j)) for k in range(3) for i, j in pairs
    ]
    assert metrics.cross_correlation_error(SERIES, other, lags=2) == pytest.approx(np.mean(crossed))
    assert metrics.autocorrelation_error(SERIES[..., 0], SERIES[..., :1]) == 0  # curves are series of one channel


def test_a_constant_channel_is_correlated_with_none():
    flat = SERIES.copy()
    flat[..., 1] = 0.1
    assert np.isnan(metrics.autocorrelation(flat)[:, 1]).all()
    assert metrics.autocorrelation_error(flat, flat) == metrics.cross_correlation_error(flat, flat) == 0
    assert metrics.autocorrelation_error(SERIES, flat) == pytest.approx(1 / 3)


@pytest.mark.parametrize("last", [True, False])
def test_the_gradient_of_recurrent_networks(last):
    nets = GRUs(2, 3, 3, Draw(0, Stream.PROBE), np.float64)
    nets.flat += RANDOM.normal(size=nets.flat.shape) * 0.3
    x, target = RANDOM.normal(size=(2, 4, 3, 6)), RANDOM.normal(size=(2, 1 if last else 4, 6))
    gradient = nets.gradient(x, lambda out: out - target, last=last)
    assert_gradient(lambda: 0.5 * np.sum((nets.outputs(x, last=last) - target) ** 2), nets.flat, gradient)


def test_networks_are_the_units_of_the_paper():
    """One moment after another, one row after another; networks do not see each other."""
    nets = GRUs(2, 3, 2, Draw(5, Stream.PROBE), np.float64)
    w = nets.weights
    assert (w["gates_bias"] == 1).all()
    assert not w["candidate_bias"].any()
    assert np.abs(w["gates"]).max() <= np.sqrt(6 / (3 + 2 + 4))
    assert not np.array_equal(w["gates"][0], w["gates"][1])
    x = RANDOM.normal(size=(2, 4, 3, 5))
    outputs = nets.outputs(x, last=False)
    for k, row in np.ndindex(2, 5):
        h = np.zeros(2)
        for t in range(4):
            gates = w["gates_in"][k] @ x[k, t, :, row] + w["gates"][k] @ h + w["gates_bias"][k, :, 0]
            sigmoid(gates)
            r, u = gates[:2], gates[2:]
            c = np.tanh(w["candidate_in"][k] @ x[k, t, :, row] + w["candidate"][k] @ (r * h))
            h = u * h + (1 - u) * c
            assert outputs[k, t, row] == pytest.approx((w["out"][k] @ h).item())
    assert np.array_equal(nets.outputs(x, last=True), outputs[:, -1:])


def test_networks_tell_series_apart_where_they_differ():
    walks = RANDOM.normal(size=(600, 8, 2)).cumsum(axis=1)
    options = {"networks": 3, "steps": 300, "batch": 48, "units": 8}
    alike = metrics.discriminative_score(walks[:300], walks[300:], **options)
    other = metrics.discriminative_score(walks[:300], walks[300:] + 4, **options)
    assert alike.values.shape == (3,)
    assert alike.mean < 0.12 < 0.3 < other.mean <= 0.5
    assert alike.stderr == pytest.approx(alike.values.std(ddof=1) / np.sqrt(3))
    again = metrics.discriminative_score(walks[:300], walks[300:], **options)
    assert np.array_equal(alike.values, again.values)
    assert not np.array_equal(
        alike.values, metrics.discriminative_score(walks[:300], walks[300:], seed=1, **options)[2]
    )


def test_what_is_learned_from_series_alike_predicts_better():
    phases = RANDOM.uniform(0, 6, size=(400, 1, 1))
    waves = np.sin(phases + np.arange(8)[:, None] * 0.8 + np.array([0, 1.5]))  # a channel leads the other
    options = {"networks": 2, "steps": 300, "batch": 48, "units": 8}
    alike = metrics.predictive_score(waves[:200], waves[200:], **options)
    mixed = metrics.predictive_score(waves[:200], RANDOM.permuted(waves[200:], axis=0), **options)
    assert alike.mean < 0.7 * mixed.mean
    level = np.abs(waves[:200, 1:, 1] - np.median(waves[:200, 1:, 1])).mean() / np.ptp(waves[:200, :, 1])
    assert mixed.mean > 0.8 * level  # what is said without looking
    assert metrics.predictive_score(waves[:20, :, 0], waves[20:40, :, 0], networks=1, steps=2).mean < 1  # one channel


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energy_distance(X[:1], Y, unbiased=True), "X: got 1 rows, wants at least 2"),
        (lambda: energy_distance(X, Y[:, :2]), "Y: got shape"),
        (lambda: nearest_distances(X, Y[:0]), "Y: got no rows"),
        (lambda: mmd(X, Y, bandwidth=0), "bandwidth: got 0, wants a finite number, above 0"),
        (lambda: metrics.crps(DRAWS[:1], SEEN), "draws: got 1 draws, wants at least 2"),
        (lambda: metrics.crps(DRAWS, SEEN[:3]), "draws: got shape"),
        (lambda: metrics.crps(DRAWS, SEEN * np.inf), "y: got infinite"),
        (lambda: metrics.crps_normal(0, [1, -1], 0), "deviation: got -1, wants at least 0"),
        (lambda: metrics.quantile_crps(DRAWS, SEEN * np.nan), "y: got no value that is not NaN"),
        (lambda: metrics.quantile_crps(DRAWS, SEEN * 0), "y: got nothing but 0, wants other values, or relative=False"),
        (lambda: metrics.quantile_crps(DRAWS, SEEN, convention="m4"), "convention: got 'm4', wants one of 'csdi'"),
        (lambda: metrics.quantile_crps(DRAWS, SEEN, levels=[]), "levels: got none"),
        (lambda: metrics.crps_sum(DRAWS[:, 0, 0], SEEN[0, 0]), "y: got shape .*, wants channels"),
        (lambda: metrics.coverage(DRAWS, SEEN, levels=[0.95]), "levels: got 0.95 of 30 draws, wants at most 0.935484"),
        (lambda: metrics.autocorrelation(SERIES, lags=12), "lags: got 12, wants an integer from 0 to 11"),
        (lambda: metrics.autocorrelation_error(SERIES, SERIES[:, :5]), "Y: got shape .*, wants rows like those of X"),
        (lambda: metrics.cross_correlation_error(X, X), "X: got shape .*, wants at least 2 channels"),
        (lambda: metrics.discriminative_score(SERIES, SERIES[:3]), "generated: got 3 rows, wants at least 5"),
        (lambda: metrics.predictive_score(SERIES, SERIES[..., :1]), "generated: got shape"),
        (lambda: metrics.predictive_score(SERIES[:, :1], SERIES[:, :1]), "real: got 1 moments, wants at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
