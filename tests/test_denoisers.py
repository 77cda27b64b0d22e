"""The exact denoisers and chain: dense algebra, densities, backends, whole runs, and orders of convergence."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import naive
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
import scipy.stats
from gradcheck import assert_gradient
from tolerances import EPS, assert_close, assert_estimate, assert_same_bits

import fastdiff as fd
from fastdiff import samplers
from fastdiff.errors import ArgumentError
from fastdiff.exact import Empirical, ExactChain, Gaussian, Mixture, Moments, convergence, exact_chain
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule

TUTORIAL = Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
PREDICTIONS = ("noise", "x0", "v", "velocity")


def covariance(d, seed=0, rank=None):
    factor = np.random.default_rng(seed).normal(size=(d, rank or d))
    return factor @ factor.T / d


MEAN, COV = np.array([0.5, -1.0, 2.0, 0.0]), covariance(4)
X = np.random.default_rng(9).normal(size=(6, 4))


def law(schedule, t, mean=MEAN, cov=COV):
    """Mean and covariance of x_t: docs/background.md, in full matrices."""
    abar = schedule.alphas_bar[t]
    return math.sqrt(abar) * mean, abar * cov + (1 - abar) * np.eye(len(mean))


# -- the denoiser ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cov", [COV, covariance(4, rank=2), np.zeros((4, 4)), np.diag([1e-6, 1.0, 9.0, 1e3])])
@pytest.mark.parametrize("t", [0, 37, 99])
def test_predictions_are_conditional_expectations(t, cov):
    """E[u | x] = E[u] + Cov(u, x) Cov(x)^-1 (x - E[x]), with dense solves."""
    alpha, sigma = TUTORIAL.signal[t], TUTORIAL.noise[t]
    middle, spread = law(TUTORIAL, t, cov=cov)
    whitened = np.linalg.solve(spread, (X - middle).T).T
    x0 = MEAN + alpha * whitened @ cov
    noise = sigma * whitened
    expected = {"x0": x0, "noise": noise, "v": alpha * noise - sigma * x0, "velocity": noise - x0}
    for prediction in PREDICTIONS:
        gaussian = Gaussian(MEAN, cov, TUTORIAL, prediction=prediction)
        np.testing.assert_allclose(gaussian.predict(X, t), expected[prediction], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(gaussian.mean_x0(X, t), x0, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("t", [0, 50, 99])
def test_log_density(t):
    gaussian = Gaussian(MEAN, COV, TUTORIAL)
    expected = scipy.stats.multivariate_normal(*law(TUTORIAL, t)).logpdf(X)
    np.testing.assert_allclose(gaussian.log_density(X, t), expected, rtol=1e-9)
    assert gaussian.log_density(X, t).dtype == np.float64


@pytest.mark.parametrize("rank", [1, 4])
def test_the_noise_prediction_is_the_score(rank):
    """E[noise | x] = -sigma grad log q_t(x), by central differences of the density."""
    gaussian = Gaussian(MEAN, covariance(4, rank=rank), TUTORIAL)
    t, step = 60, 1e-5
    for j in range(4):
        shift = step * np.eye(4)[j]
        slope = (gaussian.log_density(X + shift, t) - gaussian.log_density(X - shift, t)) / (2 * step)
        np.testing.assert_allclose(gaussian.predict(X, t)[:, j], -TUTORIAL.noise[t] * slope, rtol=0, atol=1e-7)


def test_a_timestep_for_each_row():
    t = np.array([0, 99, 3, 3, 50, 98])
    for prediction in PREDICTIONS:
        gaussian = Gaussian(MEAN, COV, TUTORIAL, prediction=prediction)
        for method in (gaussian.predict, gaussian.mean_x0, gaussian.log_density):
            rows = [method(X[i : i + 1], int(t[i]))[0] for i in range(len(t))]
            np.testing.assert_allclose(method(X, t), rows, rtol=1e-13)
            np.testing.assert_allclose(method(X, np.int32(7)), method(X, [7] * 6), rtol=1e-13)


def test_shapes_and_dtypes():
    d = 12
    cov, mean = covariance(d), np.arange(d).reshape(2, 3, 2)
    gaussian = Gaussian(mean, cov, TUTORIAL)
    assert (gaussian.shape, gaussian.d, gaussian.T, gaussian.prediction) == ((2, 3, 2), 12, 100, "noise")
    x = np.random.default_rng(0).normal(size=(5, 2, 3, 2))
    flat = gaussian.predict(x.reshape(5, d), 3)
    np.testing.assert_array_equal(gaussian.predict(x, 3).reshape(5, d), flat)
    np.testing.assert_array_equal(gaussian.predict(np.asfortranarray(x), 3, labels=[1] * 5).reshape(5, d), flat)
    np.testing.assert_allclose(gaussian.predict(x[::-1], 3)[::-1].reshape(5, d), flat, rtol=0, atol=1e-13)
    assert gaussian.predict(x.astype(np.float32), 3).dtype == np.float32
    for name, dtype in (("cpu", np.float32), ("numpy", np.float64)):
        assert gaussian.predict(x, 3, backend=name).dtype == gaussian.log_density(x, 3, backend=name).dtype == dtype
    for dtype in (np.float64, np.float16, np.int8, np.uint64):
        assert gaussian.predict(np.ones((1, d), dtype), 3).dtype == np.float64
    assert gaussian.predict(np.zeros((0, 2, 3, 2)), 3).shape == (0, 2, 3, 2)
    assert gaussian.log_density(np.zeros((0, d)), 3).shape == (0,)
    one = Gaussian([0.0], [[4.0]], TUTORIAL)
    assert one.predict([1.0, 2.0], 3).shape == (2,)  # rows of one value


def test_the_callers_arrays_are_not_held_nor_changed():
    mean, cov = MEAN.copy(), COV.copy()
    gaussian = Gaussian(mean, cov, TUTORIAL)
    before = gaussian.predict(X, 5)
    mean[:], cov[:] = 0, 0
    np.testing.assert_array_equal(gaussian.predict(X, 5), before)
    np.testing.assert_array_equal(gaussian.mean, MEAN)
    np.testing.assert_array_equal(gaussian.cov, (COV + COV.T) / 2)
    with pytest.raises(ValueError, match="read-only"):
        gaussian.mean[0] = 1


def test_a_covariance_in_float32_is_good_enough():
    """X^T X in float32 is neither quite symmetric nor quite positive."""
    thin = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    gaussian = Gaussian(np.zeros(40), thin.T @ thin, TUTORIAL)
    assert np.isfinite(gaussian.predict(np.ones((2, 40)), 0)).all()


@pytest.mark.parametrize(
    ("cov", "message"),
    [
        (np.eye(3), r"cov: got shape \(3, 3\)"),
        (np.ones(4), r"cov: got shape \(4,\)"),
        (np.eye(4) + np.eye(4, k=1), "cov: got entries that differ by 1 from their mirror"),
        (np.diag([1.0, 1, 1, -0.1]), "cov: got an eigenvalue of -0.1"),
        (-np.eye(4), "cov: got an eigenvalue of -1"),
        (np.full((4, 4), math.nan), "cov: got nan"),
        (np.eye(4) * 1j, "cov: got dtype complex"),
        (np.eye(4, dtype=bool), "cov: got dtype bool"),
        (None, "cov: got dtype object"),
    ],
)
def test_bad_covariance(cov, message):
    with pytest.raises(ArgumentError, match=message):
        Gaussian(MEAN, cov, TUTORIAL)


def test_bad_gaussian():
    for mean in (3.0, [], np.zeros((0, 3)), ["a"], [math.inf] * 4, None, [1j] * 4):
        with pytest.raises(ArgumentError, match="mean: got"):
            Gaussian(mean, COV, TUTORIAL)
    with pytest.raises(ArgumentError, match="schedule: got int"):
        Gaussian(MEAN, COV, 100)
    with pytest.raises(ArgumentError, match=r"prediction.*'noise', 'x0', 'v'"):
        Gaussian(MEAN, COV, TUTORIAL, prediction="epsilon")


def test_bad_states_and_timesteps():
    gaussian = Gaussian(MEAN, COV, TUTORIAL)
    for method in (gaussian.predict, gaussian.mean_x0, gaussian.log_density):
        for x in (
            np.zeros((2, 3)),
            np.zeros(4),
            1.0,
            np.full((1, 4), math.nan),
            np.zeros((1, 4), bool),
            [[1j] * 4],
        ):
            with pytest.raises(ArgumentError, match="x: got"):
                method(x, 3)
        for t in (-1, 100, 1.0, True, None, "3", [1, 2], [[1] * 6], [0, 1, 2, 3, 4, 100]):
            with pytest.raises(ArgumentError, match="t: got"):
                method(X, t)


def test_denoisers_and_chains_survive_copying():
    gaussian = Gaussian(MEAN, COV, TUTORIAL, prediction="v")
    chain = exact_chain(gaussian, samplers.ddpm(TUTORIAL, 7, prediction="v"))
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert isinstance(other, ExactChain)
        np.testing.assert_array_equal(other.gaussian.predict(X, 5), gaussian.predict(X, 5))
        assert other.w2() == chain.w2()
        assert chain.w2(other.gaussian) == chain.w2()


# -- the exact chain ---------------------------------------------------------------------------------------


def run(table, model, x, noise):
    """Execute a table, one term at a time; every state, the start first. `noise` maps a row number to z."""
    states, memory = [x], (None, None, None)
    for i, (t, p, q, a, b, c1, c2, c3, e, s, _, _) in enumerate(table.rows):
        out = model(x, t) if q != 0 or e != 0 else 0
        m = p * x + q * out
        following = np.zeros_like(x)
        for factor, term in ((a, x), (b, m), *zip((c1, c2, c3), memory, strict=True), (e, out)):
            if factor != 0:
                following = following + factor * term
        x = following + s * noise(i)
        memory = (m, *memory[:2]) if q != 0 or e != 0 else memory
        states.append(x)
    return np.array(states)


def response(gaussian, table):
    """Mean and covariance of every state, from the table's own response to each source of noise.

    All sources are run at once: batch row 0 gets none of them, row 1 + i d + j a one in component j of the
    start (i = 0) or of the noise of table row i - 1. The chain is affine: covariance = sum of outer products.
    """
    d, sources = gaussian.d, len(table.rows) + 1
    unit = np.zeros((sources, 1 + sources * d, d))
    for i in range(sources):
        unit[i, 1 + i * d : 1 + (i + 1) * d] = np.eye(d)
    states = run(table, gaussian.predict, unit[0], lambda i: unit[i + 1])
    moved = states[:, 1:] - states[:, :1]
    return states[:, 0], np.einsum("rki,rkj->rij", moved, moved)


def heun(schedule, steps, spacing="linspace_open"):
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1), as a table of one's own.

    Over x / alpha the ODE is d(x / alpha) / ds = (x / alpha - x0) / s with s = sigma / alpha. The first row
    of a step is Euler's; the second, at the timestep reached, exchanges half of Euler's slope for the new
    one, and the two x0 are all it needs. The last step is Euler's alone.
    """
    t = schedule.timesteps(steps, spacing=spacing)
    alpha, sigma = np.append(schedule.signal[t], 1.0), np.append(schedule.noise[t], 0.0)
    rows = []
    for i in range(steps):
        ratio = sigma[i + 1] / sigma[i]
        p, q = 1 / alpha[i], -sigma[i] / alpha[i]
        rows.append((t[i], p, q, ratio, alpha[i + 1] - ratio * alpha[i], 0, 0, 0))
        if i + 1 < steps:
            s, reached = sigma[i] / alpha[i], sigma[i + 1] / alpha[i + 1]
            half = alpha[i + 1] * (s - reached) / (2 * reached)
            p, q = 1 / alpha[i + 1], -sigma[i + 1] / alpha[i + 1]
            rows.append((t[i + 1], p, q, 1, half, -half, 0, 0))
    return Sampler(rows, schedule, name="heun", order=2)


TABLES = {
    "ddpm": lambda s, p: samplers.ddpm(s, 9, prediction=p),
    "ddpm large": lambda s, p: samplers.ddpm(s, 9, variance="large", prediction=p),
    "ddim": lambda s, p: samplers.ddim(s, 9, prediction=p),
    "ddim eta": lambda s, p: samplers.ddim(s, 9, eta=0.7, prediction=p),
    "dpmpp_2m": lambda s, p: samplers.dpmpp_2m(s, 9, prediction=p),
    "dpmpp_2m sigma_min": lambda s, p: samplers.dpmpp_2m(s, 9, prediction=p, final="sigma_min"),
    "dpmpp_2m sde": lambda s, p: samplers.dpmpp_2m(s, 9, eta=1.0, prediction=p),
    "dpmpp_3m sde": lambda s, p: samplers.dpmpp_3m(s, 9, eta=0.7, prediction=p),
    "euler_ancestral": lambda s, p: samplers.euler_ancestral(s, 9, prediction=p),
    "heun with churn": lambda s, p: samplers.heun(s, 9, churn=4, s_tmin=0.1, s_noise=1.1, prediction=p),
    "unipc3": lambda s, p: samplers.unipc(s, 9, order=3, prediction=p),
    "deis3": lambda s, p: samplers.deis(s, 9, order=3, prediction=p),
    "lms4": lambda s, p: samplers.lms(s, 9, prediction=p),
    "pndm": lambda s, p: samplers.pndm(s, 9, prediction=p),
    "sa_solver": lambda s, p: samplers.sa_solver(s, 9, predictor=3, corrector=4, prediction=p),
    "dpmpp_sde": lambda s, p: samplers.dpmpp_sde(s, 5, prediction=p),
    "single sde": lambda s, p: samplers.dpmsolver_single(s, 9, eta=1.0, prediction=p),
    "euler with churn": lambda s, p: samplers.euler(s, 9, churn=4, s_tmin=0.1, s_noise=1.1, prediction=p),
    "consistency": lambda s, p: samplers.consistency(s, 5, prediction=p),
    "three rows and back up": lambda s, p: Sampler(
        [(90, 0.7, -0.2, 0.4, 0.3, 0, 0, 0, 0.1, 0.5), (60, 1.1, 0.3, 0.6, -0.5, 0.8, 0, 0, 0.2, 0.3)]
        + [(70, 0.4, 0, 0.9, 0.2, 0.3, 0.5, 0, 0, 0.4), (70, 0.9, 0.4, 0.5, 0.3, -0.6, 0.3, 0, -0.1, 0.2)]
        + [(t, 0.9, 0.4, 0.5, 0.3, -0.6, 0.2, 0.4, -0.1, 0.2) for t in (40, 20, 20, 3)],
        s,
        prediction=p,
    ),
    "memory and noise": lambda s, p: Sampler(
        [(90, 0.7, -0.2, 0.4, 0.3, 0, 0.1, 0.5), (60, 1.1, 0.3, 0.6, -0.5, 0.8, 0.2, 0.3)]
        + [(t, 0.9, 0.4, 0.5, 0.3, -0.6, -0.1, 0.2) for t in (40, 20, 3)],
        s,
        prediction=p,
    ),
    "a state wiped out, an x0 remembered": lambda s, p: Sampler(
        [
            (90, 0.7, -0.2, 0, 0, 0, 0, 0),
            (60, 1.1, 0.3, 0.6, -0.5, 0.8, 0, 0),
            (5, 0.9, 0.4, 1, 0.2, 0.3, 0, 0.1),
        ],
        s,
        prediction=p,
    ),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", TABLES)
def test_exact_chain_is_what_the_table_does(name, prediction):
    thin = np.random.default_rng(1).normal(size=(4, 2))
    for gaussian in (
        *(
            Gaussian(MEAN, cov, TUTORIAL, prediction=prediction)
            for cov in (COV, covariance(4, rank=2), np.zeros((4, 4)))
        ),
        *(Gaussian.low_rank(MEAN, thin[:, :r], 0.3, TUTORIAL, prediction=prediction) for r in (0, 1, 2)),
    ):
        table = TABLES[name](TUTORIAL, prediction)
        chain = exact_chain(gaussian, table)
        means, covs = response(gaussian, table)
        assert len(chain.trace) == len(table) + 1
        for i, moments in enumerate(chain.trace):
            np.testing.assert_allclose(moments.mean, means[i], rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(moments.cov, covs[i], rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(chain.mean, chain.trace[-1].mean)
        np.testing.assert_array_equal(chain.cov, chain.trace[-1].cov)


def test_heun_rows_are_heun():
    schedule, steps = TUTORIAL, 6
    gaussian = Gaussian(MEAN, COV, schedule)
    t = schedule.timesteps(steps, spacing="linspace_open")
    scale = list(schedule.noise[t] / schedule.signal[t])
    scaled = X / schedule.signal[t[0]]
    for i in range(steps):
        slope = gaussian.predict(scaled * schedule.signal[t[i]], t[i])
        if i + 1 < steps:
            guess = scaled + (scale[i + 1] - scale[i]) * slope
            slope = (slope + gaussian.predict(guess * schedule.signal[t[i + 1]], t[i + 1])) / 2
            scaled = scaled + (scale[i + 1] - scale[i]) * slope
        else:
            scaled = scaled - scale[i] * slope
    found = run(heun(schedule, steps), gaussian.predict, X, lambda i: 0.0)[-1]
    np.testing.assert_allclose(found, scaled, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*TABLES, "heun"])
def test_exact_chain_is_what_samples_do(name):
    """200,000 samples, drawn by the library on cpu: mean and covariance within 5 standard errors.

    Of a mean of n draws that is sqrt(V_ii / n), of a covariance sqrt((V_ii V_jj + V_ij^2) / n).
    """
    n = 200_000
    table = TABLES[name](TUTORIAL, "noise") if name in TABLES else heun(TUTORIAL, 9)
    for gaussian in (Gaussian(MEAN, COV, TUTORIAL), Gaussian.low_rank(MEAN, COV[:, :1], 0.5, TUTORIAL)):
        drawn = fd.sample(gaussian, table, n=n, seed=3, backend="cpu").astype(np.float64)
        chain = exact_chain(gaussian, table)
        variance = np.diag(chain.cov)
        assert_estimate(drawn.mean(axis=0), chain.mean, np.sqrt(variance / n))
        assert_estimate(np.cov(drawn.T), chain.cov, np.sqrt((np.outer(variance, variance) + chain.cov**2) / n))


@pytest.mark.parametrize("rank", [1, 4])
def test_noised_draws_have_the_closed_form_covariance(rank):
    """250,000 draws, at every twentieth step: within 5 standard errors, as above."""
    n = 250_000
    gaussian = Gaussian(MEAN, covariance(4, rank=rank), TUTORIAL)
    z = fd.normal((n, 4), stream="data", backend="cpu")
    x0 = (z * gaussian.data.deviations.astype("f4")) @ gaussian.data.basis.T.astype("f4") + MEAN.astype("f4")
    for t in range(0, 100, 20):
        moments, (mean, cov) = gaussian.moments(t), law(TUTORIAL, t, cov=gaussian.cov)
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(moments.cov, cov, rtol=0, atol=1e-13)
        x = fd.forward_noise(x0, t, TUTORIAL, seed=1, backend="cpu")[0].astype(np.float64)
        variance = np.diag(cov)
        assert_estimate(x.mean(axis=0), mean, np.sqrt(variance / n))
        assert_estimate(np.cov(x.T), cov, np.sqrt((np.outer(variance, variance) + cov**2) / n))


def test_exact_chain_bad_input():
    gaussian = Gaussian(MEAN, COV, TUTORIAL)
    with pytest.raises(ArgumentError, match="gaussian: got function"):
        exact_chain(run, samplers.ddpm(TUTORIAL))
    with pytest.raises(ArgumentError, match="sampler: got str"):
        exact_chain(gaussian, "ddpm")
    with pytest.raises(ArgumentError, match="clip None"):
        exact_chain(gaussian, samplers.ddpm(TUTORIAL, clip=3.0))
    with pytest.raises(ArgumentError, match="the denoiser's schedule"):
        exact_chain(gaussian, samplers.ddpm(Schedule.linear()))
    with pytest.raises(ArgumentError, match="prediction 'v'"):
        exact_chain(gaussian, samplers.ddpm(TUTORIAL, prediction="v"))
    chain = exact_chain(gaussian, samplers.ddpm(TUTORIAL))
    with pytest.raises(ArgumentError, match="gaussian: got 1 dimensions"):
        chain.w2(Gaussian([0.0], [[1.0]], TUTORIAL))
    with pytest.raises(ArgumentError, match="gaussian: got Moments"):
        chain.w2(chain.trace[0])
    with pytest.raises(ArgumentError, match="other: got 1 dimensions"):
        chain.trace[0].w2(Gaussian([0.0], [[1.0]], TUTORIAL).data)


# -- low rank, mixtures, data sets ---------------------------------------------------------------------------

RNG = np.random.default_rng(5)
THIN = RNG.normal(size=(4, 2))
CENTRES, SPREADS = 2 * RNG.normal(size=(3, 4)), np.array([covariance(4, 1), covariance(4, 2, rank=2), np.zeros((4, 4))])
POINTS = RNG.normal(size=(70, 4))
WEIGHTS = np.array([0.5, 0.2, 0.3])
EXACT = {
    "full": lambda p: Gaussian(MEAN, COV, TUTORIAL, prediction=p),
    "low rank": lambda p: Gaussian.low_rank(MEAN, THIN, 0.2, TUTORIAL, prediction=p),
    "singular": lambda p: Gaussian.low_rank(MEAN, THIN, 0, TUTORIAL, prediction=p),
    "isotropic": lambda p: Gaussian.low_rank(MEAN, np.zeros((4, 0)), 2, TUTORIAL, prediction=p),
    "mixture": lambda p: Mixture(WEIGHTS, CENTRES, SPREADS, TUTORIAL, prediction=p),
    "mixture of low rank": lambda p: Mixture.of(
        [0.6, 0.4, 0],
        [Gaussian.low_rank(CENTRES[k], THIN[:, :k], 0.1, TUTORIAL, prediction=p) for k in range(3)],
    ),
    "data": lambda p: Empirical(POINTS, TUTORIAL, prediction=p),
    "one row": lambda p: Empirical(POINTS[:1], TUTORIAL, prediction=p),
}


@pytest.mark.parametrize("name", EXACT)
def test_prediction_is_the_score(name):
    """E[noise | x] = -sigma grad log q_t(x), every entry; and the other predictions follow from it."""
    denoiser = EXACT[name]("noise")
    for t in (40, 70, 99):
        alpha, sigma = TUTORIAL.signal[t], TUTORIAL.noise[t]
        x = np.random.default_rng(t).normal(size=(3, 4))
        noise = denoiser.predict(x, t)
        assert_gradient(lambda x=x, t=t: denoiser.log_density(x, t).sum(), x, -noise / sigma)
        x0 = (x - sigma * noise) / alpha
        np.testing.assert_allclose(denoiser.mean_x0(x, t), x0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(EXACT[name]("x0").predict(x, t), x0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(EXACT[name]("v").predict(x, t), alpha * noise - sigma * x0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(EXACT[name]("velocity").predict(x, t), noise - x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [10, 50, 99])
def test_densities_integrate_to_one(t):
    x = np.linspace(-40, 40, 160_001)
    for denoiser in (
        Gaussian([1.0], [[4.0]], TUTORIAL),
        Gaussian.low_rank([1.0], [[1.0]], 3, TUTORIAL),
        Mixture([0.3, 0.7], [[-2.0], [1.0]], [[[0.0]], [[2.0]]], TUTORIAL),
        Empirical([[-1.0], [0.0], [2.5]], TUTORIAL),
    ):
        assert scipy.integrate.simpson(np.exp(denoiser.log_density(x, t)), x) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("r", [0, 1, 3, 6, 9])
def test_low_rank_is_the_full_covariance(r):
    """As the dense one, whatever the factor: thin, square, wide, of dependent columns."""
    d = 6
    mean, factor = RNG.normal(size=d), RNG.normal(size=(d, r))
    factor[:, 1:2] = factor[:, :1]
    x = 2 * RNG.normal(size=(5, d))
    for variance in (0.0, 0.7):
        dense = factor @ factor.T + variance * np.eye(d)
        for prediction in PREDICTIONS:
            thin = Gaussian.low_rank(mean, factor, variance, TUTORIAL, prediction=prediction)
            full = Gaussian(mean, dense, TUTORIAL, prediction=prediction)
            for t in (0, 50, 99):
                np.testing.assert_allclose(thin.predict(x, t), full.predict(x, t), rtol=1e-7, atol=1e-8)
                np.testing.assert_allclose(thin.log_density(x, t), full.log_density(x, t), rtol=1e-7)
        np.testing.assert_allclose(thin.cov, dense, rtol=0, atol=1e-12)
        assert thin.data.w2(full.data) < 1e-6
        shifted = Gaussian.low_rank(mean + 1, RNG.normal(size=(d, 2)), 0.1, TUTORIAL)
        for one in (thin, full) if variance else ():  # the closed form's roots need it
            distance = one.data.w2(shifted.data)
            assert distance == pytest.approx(closed_form(mean, dense, mean + 1, shifted.cov), rel=1e-6)
            assert shifted.data.w2(one.data) == pytest.approx(distance, rel=1e-9)


def test_a_mixture_of_one_is_a_gaussian():
    x = 3 * RNG.normal(size=(6, 4))
    for prediction in PREDICTIONS:
        for name in ("full", "low rank", "isotropic"):
            alone = EXACT[name](prediction)
            for mixture in (
                Mixture.of([1], [alone]),
                Mixture([1.0], [MEAN], [alone.cov], TUTORIAL, prediction=prediction),
            ):
                for t in (0, 50, [3, 99, 3, 4, 4, 3]):
                    np.testing.assert_allclose(mixture.predict(x, t), alone.predict(x, t), rtol=1e-9, atol=1e-9)
                    np.testing.assert_allclose(mixture.log_density(x, t), alone.log_density(x, t), rtol=1e-9)
            np.testing.assert_allclose(mixture.data.cov, alone.cov, rtol=0, atol=1e-12)


def test_a_mixture_weighs_its_components():
    """Dense algebra, one component at a time; a weight of 0 leaves one out."""
    x, t = 2 * RNG.normal(size=(6, 4)), 60
    weights = np.array([0.6, 0.4, 0.0])
    mixture = Mixture(weights, CENTRES, SPREADS, TUTORIAL)
    laws = [law(TUTORIAL, t, mean, cov) for mean, cov in zip(CENTRES, SPREADS, strict=True)]
    densities = np.array([scipy.stats.multivariate_normal(*one).pdf(x) for one in laws])
    joint = weights[:, None] * densities
    parts = [component.predict(x, t) for component in mixture.components]
    expected = np.einsum("kn,knd->nd", joint / joint.sum(axis=0), parts)
    np.testing.assert_allclose(mixture.predict(x, t), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(mixture.log_density(x, t), np.log(joint.sum(axis=0)), rtol=1e-10)
    mean = weights @ CENTRES
    cov = sum(w * (c + np.outer(m - mean, m - mean)) for w, m, c in zip(weights, CENTRES, SPREADS, strict=True))
    np.testing.assert_allclose(mixture.moments(t).mean, TUTORIAL.signal[t] * mean, rtol=1e-12)
    np.testing.assert_allclose(mixture.moments(t).cov, law(TUTORIAL, t, mean, cov)[1], rtol=0, atol=1e-12)


def test_data_are_a_mixture_of_points():
    x = 2 * RNG.normal(size=(6, 4))
    weights, covs = np.full(len(POINTS), 1 / len(POINTS)), np.zeros((len(POINTS), 4, 4))
    for prediction in PREDICTIONS:
        data, points = EXACT["data"](prediction), Mixture(weights, POINTS, covs, TUTORIAL, prediction=prediction)
        for t in (0, 50, [3, 99, 3, 4, 50, 98]):
            np.testing.assert_allclose(data.predict(x, t), points.predict(x, t), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(data.log_density(x, t), points.log_density(x, t), rtol=1e-9)
    np.testing.assert_allclose(data.moments(7).cov, points.moments(7).cov, rtol=0, atol=1e-12)
    np.testing.assert_allclose(data.data.cov, np.cov(POINTS.T, bias=True), rtol=0, atol=1e-12)


def test_deterministic_samplers_land_on_the_data(backend):
    images = RNG.normal(size=(40, 2, 3)).astype(np.float32)
    for prediction in PREDICTIONS:
        denoiser = Empirical(images, TUTORIAL, prediction=prediction)
        for table in (
            samplers.ddim(TUTORIAL, 50, prediction=prediction),
            samplers.dpmpp_2m(TUTORIAL, 20, prediction=prediction),
        ):
            x = fd.sample(denoiser, table, n=200, backend=backend)
            gap = np.abs(x[:, None] - images).max(axis=(2, 3))
            assert len(np.unique(gap.argmin(axis=1))) > 20  # many of them
            if prediction == "x0":
                assert_same_bits(x, images[gap.argmin(axis=1)])
            else:
                assert_close(x, images[gap.argmin(axis=1)], terms=4)


@pytest.mark.parametrize("far", [1e2, 1e4])
def test_far_states_and_little_noise(far):
    """`far` sigma from all data, and where sigma is 1e-6: finite, and what closed forms say, in float64."""
    schedule = Schedule.from_betas([1e-12, 0.99, 0.99])
    alpha, sigma = schedule.signal[0], schedule.noise[0]
    points = np.array([[0.0, 0.0], [1.0, 0.0]])
    data, mixture = (
        kind(*args, schedule)
        for kind, args in ((Empirical, (points,)), (Mixture, ([0.5, 0.5], points, np.zeros((2, 2, 2)))))
    )
    x = np.array([[-far * sigma, 0.0], [alpha + far * sigma, 0.0], [alpha / 2 - sigma**2, far * sigma]])
    near = np.array([0.0, 1.0, scipy.special.expit(-alpha)])  # near the middle the odds are exp(-alpha)
    for denoiser in (data, mixture):
        np.testing.assert_allclose(denoiser.mean_x0(x, 0)[:, 0], near, rtol=0, atol=1e-3)
        noise = denoiser.predict(x, 0)
        np.testing.assert_allclose(noise[:2], [[-far, 0], [far, 0]], rtol=1e-9, atol=1e-9)
        top = -0.5 * far**2 - math.log(2 * math.pi * sigma**2) + math.log(0.5)
        np.testing.assert_allclose(denoiser.log_density(x, 0)[:2], top, rtol=1e-9)
    full = Gaussian([3.0, -2.0], np.diag([1.0, 0.0]), schedule)
    gaussian = Gaussian.low_rank([3.0, -2.0], [[1.0], [0.0]], 0, schedule)
    x = np.array([[3 * alpha + far, -2 * alpha + far * sigma]])
    expected = [[sigma * far / (alpha**2 + sigma**2), far]]
    np.testing.assert_allclose(full.predict(x, 0), expected, rtol=1e-8)
    rounding = 8 * EPS[x.dtype] * np.abs(x).max() / sigma  # of x itself, over sigma
    np.testing.assert_allclose(gaussian.predict(x, 0), expected, rtol=0, atol=rounding)
    single = np.float32([[-far, 0], [far, 1]]) * np.float32(sigma)
    for denoiser in (data, mixture, gaussian):
        for backend in ("numpy", "cpu"):
            assert np.isfinite(denoiser.predict(single, 0, backend=backend)).all()
            assert np.isfinite(denoiser.log_density(single, 0, backend=backend)).all()


def test_bad_low_rank():
    for factor in (np.ones(4), np.ones((3, 2)), np.full((4, 2), math.nan), "no"):
        with pytest.raises(ArgumentError, match="factor: got"):
            Gaussian.low_rank(MEAN, factor, 0.1, TUTORIAL)
    for variance in (-1e-9, math.inf, None):
        with pytest.raises(ArgumentError, match="variance: got"):
            Gaussian.low_rank(MEAN, THIN, variance, TUTORIAL)


def test_bad_mixtures():
    def build(weights=WEIGHTS, means=CENTRES, covs=SPREADS):
        return Mixture(weights, means, covs, TUTORIAL)

    for weights, message in (
        ([0.5, 0.7, -0.2], "-0.2, wants no negative"),
        ([0.5, 0.2, 0.2], "a sum of 0.9"),
        ([0.5, 0.5], r"shape \(2,\)"),
        ([0.5, 0.5, math.nan], "nan"),
    ):
        with pytest.raises(ArgumentError, match=f"weights: got {message}"):
            build(weights)
    with pytest.raises(ArgumentError, match=r"covs: got shape \(2, 4, 4\)"):
        build(covs=SPREADS[:2])
    with pytest.raises(ArgumentError, match=r"covs\[1\]: got an eigenvalue of -1"):
        build(covs=[np.eye(4), -np.eye(4), np.eye(4)])
    with pytest.raises(ArgumentError, match=r"covs\[2\]: got entries that differ by 1"):
        build(covs=[np.eye(4), np.eye(4), np.eye(4) + np.eye(4, k=1)])
    with pytest.raises(ArgumentError, match="means: got"):
        build(means=CENTRES[0])
    for weights, means, covs in (
        ([], np.zeros((0, 4)), np.zeros((0, 4, 4))),
        ([1], np.zeros((1, 0)), np.zeros((1, 0, 0))),
    ):
        with pytest.raises(ArgumentError, match="means: got"):
            build(weights, means, covs)
    with pytest.raises(ArgumentError, match="schedule: got int"):
        Mixture(WEIGHTS, CENTRES, SPREADS, 100)
    one = EXACT["full"]("noise")
    for other, message in (
        (EXACT["full"]("v"), "prediction 'v'"),
        (Gaussian([0.0], [[1.0]], TUTORIAL), "shape"),
        (Gaussian(MEAN, COV, Schedule.linear()), "schedule"),
        (EXACT["data"]("noise"), "Empirical"),
    ):
        with pytest.raises(ArgumentError, match=rf"components\[1\]: got {message}"):
            Mixture.of([0.5, 0.5], [one, other])
    with pytest.raises(ArgumentError, match="components: got none"):
        Mixture.of([], ())


def test_bad_data():
    for points in (np.zeros((0, 4)), np.zeros((3, 0)), np.zeros(3), [[math.inf]], [["a"]], [[True]]):
        with pytest.raises(ArgumentError, match="X: got"):
            Empirical(points, TUTORIAL)
    with pytest.raises(ArgumentError, match="schedule: got str"):
        Empirical(POINTS, "linear")
    with pytest.raises(ArgumentError, match="prediction: got"):
        Empirical(POINTS, TUTORIAL, prediction="score")


@pytest.mark.parametrize("name", EXACT)
def test_exact_denoisers_survive_copying(name):
    denoiser = EXACT[name]("v")
    size = len(pickle.dumps((denoiser, denoiser.data)))
    before = denoiser.predict(X, 5), denoiser.log_density(X, 5), denoiser.moments(5).cov
    assert len(pickle.dumps((denoiser, denoiser.data))) == size  # what backends keep is left out
    for other in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        after = other.predict(X, 5), other.log_density(X, 5), other.moments(5).cov
        for one, two in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, two)


def test_the_data_are_kept_as_they_were():
    points = POINTS.astype(np.float32)
    denoiser = Empirical(points, TUTORIAL)
    before = denoiser.predict(X, 5)
    points[:] = 0
    np.testing.assert_array_equal(denoiser.predict(X, 5), before)
    np.testing.assert_array_equal(denoiser.X, POINTS.astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        denoiser.X[0] = 1


# -- on backends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_backends_agree(name, any_backend):
    """float32 against float64.

    A residual is up to (1 + |x|) / sigma and off by eps of that; an exponent, its square, by eps of that, and so are
    the weights of what is averaged.
    """
    x = np.random.default_rng(8).normal(size=(40, 4)).astype(np.float32)
    for prediction in PREDICTIONS:
        denoiser = EXACT[name](prediction)
        for t in (30, 99, np.random.default_rng(8).integers(30, 100, 40)):
            residual = (1 + np.abs(x).max()) / np.min(TUTORIAL.noise[t])
            want, density = (method(x.astype(np.float64), t) for method in (denoiser.predict, denoiser.log_density))
            weighs = not isinstance(denoiser, Gaussian)
            scale = residual + weighs * np.abs(density).max() * np.abs(want).max()
            got = denoiser.predict(x, t, backend=any_backend)
            assert got.dtype == np.float32
            assert_close(got, want, scale=scale)
            assert_close(denoiser.log_density(x, t, backend=any_backend), density, scale=residual**2)
            if any_backend.name == "cpu":  # what "auto" takes for float32
                assert_same_bits(denoiser.predict(x, t), got)


def test_the_driver_is_predict(backend):
    """One loop with workspaces of its own, and the public method in the place of a network."""
    for make in EXACT.values():
        denoiser, table = make("noise"), samplers.ddim(TUTORIAL, 5, eta=0.5)
        x = fd.sample(denoiser, table, n=30, batch=7, backend=backend)
        predict = partial(denoiser.predict, backend=backend)
        assert_same_bits(x, fd.sample(predict, table, n=30, batch=7, shape=(4,), backend=backend))
        assert fd.sample(denoiser, table, n=0, backend=backend).shape == (0, 4)
    start = np.random.default_rng(0).normal(size=(5, 4))
    x = fd.sample(EXACT["mixture"]("noise"), samplers.ddim(TUTORIAL, 5), initial=start, backend="numpy")
    expected = run(samplers.ddim(TUTORIAL, 5), EXACT["mixture"]("noise").predict, start, lambda i: 0.0)[-1]
    assert x.dtype == np.float64
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("m", "n", "d"), [(1, 1, 1), (3, 2, 7), (17, 64, 8), (65, 65, 9), (66, 130, 31), (5, 1000, 64), (0, 3, 2)]
)
def test_posterior_mean_is_naive(m, n, d, backend):
    be = fd.get_backend(backend)
    rng = np.random.default_rng(m)
    x, data = rng.normal(size=(m, d)).astype(np.float32), rng.normal(size=(n, d)).astype(np.float32)
    signal, noise = rng.uniform(0.1, 1, m), rng.uniform(0.3, 2, m)
    mean, log_sum = np.full((m, d), np.nan, np.float32), np.full(m, np.nan, np.float32)
    be.posterior_mean(x, data, signal, noise, mean, log_sum)
    for i in range(m):
        want, want_sum = naive.posterior_mean(x[i].tolist(), data.tolist(), signal[i], noise[i])
        size = 0.5 * np.square((np.abs(x[i]).max() + np.abs(data).max()) / noise[i])  # of a value's share in exponents
        assert_close(log_sum[i], np.array(want_sum), terms=d, scale=size)
        assert_close(mean[i], np.array(want), terms=n + d, scale=np.abs(data).max() * (1 + size))


def test_a_row_of_a_posterior_mean_stands_alone():
    """Its bits are those of the row alone, in any batch and on any number of threads, and so are a blend's."""
    rng = np.random.default_rng(3)
    m, n, d = 200, 150, 13
    x, data = rng.normal(size=(m, d)).astype(np.float32), rng.normal(size=(n, d)).astype(np.float32)
    t = rng.integers(0, 100, m)
    signal, noise = TUTORIAL.signal[t], TUTORIAL.noise[t]

    def run_rows(threads, rows):
        be = fd.get_backend("cpu", threads=threads)
        at = x[rows]
        mean, log_sum = np.empty_like(at), np.empty(len(at), np.float32)
        be.posterior_mean(at, data, signal[rows], noise[rows], mean, log_sum)
        state = np.tile(np.float32([-np.inf, 0]), (len(at), 1))
        blended = np.zeros_like(at)
        for k in range(3):
            be.blend(blended, state, mean, at - data[k], 0.1 * k)
        return mean, log_sum, blended, state

    whole = run_rows(1, slice(None))
    for threads in (1, 2, 3):
        for rows in (slice(None), slice(0, 1), slice(7, 90), slice(190, 200), slice(37, 38)):
            for got, want in zip(run_rows(threads, rows), whole, strict=True):
                assert_same_bits(got, want[rows])


def test_posterior_mean_of_one_likely_row_is_that_row():
    """Also where it comes after others, and where the data hold zeros."""
    data = np.float32([[0, 3, -1], [5, 0, 1e-30], [1, 1, 1]] * 50)
    data[77] = 0, 0.1, 7
    x = np.float32([[0, 0.1, 7]])
    mean, log_sum = np.empty_like(x), np.empty(1, np.float32)
    fd.get_backend("cpu").posterior_mean(x, data, np.ones(1), np.full(1, 1e-3), mean, log_sum)
    assert_same_bits(mean, data[77:78])
    assert log_sum[0] == 0


@pytest.mark.parametrize(("m", "d", "r"), [(1, 1, 1), (50, 3, 17), (9, 40, 0), (300, 64, 64)])
def test_blend_is_naive(m, d, r, backend):
    be = fd.get_backend(backend)
    rng = np.random.default_rng(m)
    parts, residuals = rng.normal(size=(5, m, d)).astype("f4"), rng.normal(size=(5, m, r)).astype("f4")
    constants = [-200.0, 1.25, 0.5, -3.0, 0.25]
    out, state = np.zeros((m, d), np.float32), np.tile(np.float32([-np.inf, 0]), (m, 1))
    for part, residual, constant in zip(parts, residuals, constants, strict=True):
        be.blend(out, state, part, residual, constant)
    exponents = np.array(constants)[:, None] - 0.5 * np.square(residuals.astype(np.float64)).sum(axis=2)
    logs = state[:, 0] + np.log(state[:, 1])
    for i in range(m):
        want, want_log = naive.weighted_mean(exponents[:, i].tolist(), parts[:, i].tolist())
        assert_close(out[i], np.array(want), terms=r + 5, scale=8 + r)
        assert_close(logs[i], np.array(want_log), terms=r + 5, scale=8 + r)


# -- the Wasserstein distance ------------------------------------------------------------------------------


def closed_form(mean1, cov1, mean2, cov2):
    root = scipy.linalg.sqrtm(cov1)
    cross = scipy.linalg.sqrtm(root @ cov2 @ root)
    return math.sqrt(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * np.real(cross)))


def moments(mean, cov):
    return Gaussian(mean, cov, TUTORIAL).data


def test_w2_is_the_closed_form():
    for seed in range(5):
        mean1, mean2 = np.random.default_rng(seed).normal(size=(2, 6))
        cov1, cov2 = covariance(6, seed), covariance(6, seed + 50)
        expected = closed_form(mean1, cov1, mean2, cov2)
        assert moments(mean1, cov1).w2(moments(mean2, cov2)) == pytest.approx(expected, rel=1e-9)
        assert moments(mean2, cov2).w2(moments(mean1, cov1)) == pytest.approx(expected, rel=1e-9)


def test_w2_known_values():
    zero = np.zeros(3)
    assert moments(zero, np.eye(3)).w2(moments(zero + 2, np.eye(3))) == pytest.approx(math.sqrt(12))
    assert moments(zero, 4 * np.eye(3)).w2(moments(zero, 9 * np.eye(3))) == pytest.approx(math.sqrt(3))
    assert moments(zero, np.zeros((3, 3))).w2(moments(zero, COV[:3, :3])) == pytest.approx(
        math.sqrt(np.trace(COV[:3, :3]))
    )
    line, plane = np.diag([4.0, 0, 0]), np.diag([0, 1.0, 1.0])  # singular and orthogonal: no overlap to save
    assert moments(zero, line).w2(moments(zero, plane)) == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12])
def test_w2_of_near_equal_covariances_does_not_cancel(gap):
    """C and (1 + gap)^2 C are gap sqrt(tr C) apart; the trace formula would lose it at gap 1e-8."""
    cov = covariance(6)
    expected = gap * math.sqrt(np.trace(cov))
    factor = 1 + gap
    exact = ((1 + gap) - 1) / gap  # what 1 + gap rounds to
    data = moments(np.zeros(6), cov)
    shared = Moments(data.mean, data.deviations * factor, data.basis)
    assert data.w2(shared) == pytest.approx(expected * exact, rel=3e-16 / gap)
    turned = moments(np.zeros(6), cov * factor**2)
    assert not np.array_equal(turned.basis, data.basis)
    assert data.w2(turned) == pytest.approx(expected * exact, rel=1e-14 / gap + 1e-9)


def test_w2_to_itself_is_zero():
    for rank in (1, 3, 6):
        data = moments(np.ones(6), covariance(6, rank=rank))
        assert data.w2(data) == 0


# -- samplers reach the data -------------------------------------------------------------------------------


def even_schedule(T=4097, end=20.0):
    """log SNR falls in even steps from `end` to -`end`."""
    log_snr = np.linspace(end, -end, T)
    abar, variance = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
    return Schedule.from_betas(np.diff(variance, prepend=0) / np.append(1, abar[:-1]))


ORDERS = {
    "ddim": lambda s, n: samplers.ddim(s, n),
    "dpmpp_2m": lambda s, n: samplers.dpmpp_2m(s, n),
    "dpmpp_2m sigma_min": lambda s, n: samplers.dpmpp_2m(s, n, final="sigma_min"),
    "heun": heun,
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    """W2 to the data falls like steps ** -order, order being what the sampler declares.

    What makes the slope clean: these methods are of their order in steps of log SNR, so the schedule has even
    ones (by timestep, the usual schedules take one huge step at the clean end, which hides the order). It has
    4097 timesteps, far more than the samplers visit, so any spacing is even too. It runs from noise of 2e-9
    of the variance to a signal of 2e-9, and the data's mean is 0, so neither end of the chain adds an error
    that distances down to 1e-3 would show. The spectrum is wide, 1e-2 to 1e1.
    """
    schedule = even_schedule()
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    gaussian = Gaussian(np.zeros(9), (basis * np.logspace(-2, 1, 9)) @ basis.T, schedule)
    steps = np.array([64, 128, 256])
    distance = convergence(gaussian, lambda n: ORDERS[name](schedule, n), steps)
    slopes = -np.diff(np.log(distance)) / np.diff(np.log(steps))
    order = ORDERS[name](schedule, 64).order
    assert np.abs(slopes - order).max() < 0.1  # measured: 0.97 to 0.99, 1.96 to 1.99, Heun 2.06 to 2.03
    assert distance[-1] < 0.1


def test_convergence_takes_names():
    gaussian = Gaussian(MEAN, COV, TUTORIAL, prediction="v")
    for name in ("ddpm", "ddim", "dpmpp_2m"):
        wanted = [exact_chain(gaussian, samplers.named(name, TUTORIAL, n, prediction="v")).w2() for n in (3, 9)]
        np.testing.assert_array_equal(convergence(gaussian, name, [3, 9]), wanted)
    with pytest.raises(ArgumentError, match="sampler: got 'plms'"):
        convergence(gaussian, "plms", [3])


@pytest.mark.parametrize(("make", "limit"), [(samplers.ddpm, 0.015), (lambda s: samplers.ddim(s, s.T), 0.007)])
def test_the_full_chain_ends_near_the_data(make, limit):
    """The covariance is right to 1 / T. What the start misses of the mean, DDIM keeps and DDPM forgets."""
    errors = {}
    for T in (1000, 2000):
        schedule = Schedule.linear(T, beta_start=0.1 / T, beta_end=20 / T)
        gaussian = Gaussian(MEAN, COV, schedule)
        chain = exact_chain(gaussian, make(schedule))
        errors[T] = np.abs(chain.cov - COV).max()
        missed = 2 * schedule.signal[-1] * np.linalg.norm(MEAN)
        assert np.linalg.norm(chain.mean - MEAN) < (missed if make is not samplers.ddpm else missed / 50)
        assert chain.w2() < 0.015
    assert errors[1000] < limit  # measured: 0.0137 and 0.0063
    assert errors[1000] / errors[2000] == pytest.approx(2, abs=0.1)


def test_ddpm_variances_are_right_for_their_data():
    """Ho et al. 2020, section 3.2: small is right for a point, large for unit variance, in any steps."""
    zero = np.zeros(3)
    start = Schedule.cosine(100)  # ends closer to noise than the tutorial's: the start must not show
    small, large = (samplers.ddpm(start, 10, variance=variance) for variance in ("small", "large"))
    point = exact_chain(Gaussian(zero, np.zeros((3, 3)), start), small)
    expected = np.append(start.noise[small.timesteps[1:]], 0.0)
    for moments, noise in zip(point.trace[1:], expected, strict=True):
        np.testing.assert_allclose(moments.deviations, noise, rtol=1e-3, atol=1e-12)
    unit = exact_chain(Gaussian(zero, np.eye(3), start), large)
    for moments in unit.trace[:-1]:
        np.testing.assert_allclose(moments.deviations, 1, rtol=1e-12)
