"""The exact Gaussian denoiser and chain: dense algebra, densities, whole runs, and orders of convergence."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from fastdiff import samplers
from fastdiff.denoisers import ExactChain, Gaussian, Moments, exact_chain
from fastdiff.errors import ArgumentError
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule

TUTORIAL = Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
PREDICTIONS = ("noise", "x0", "v")


def covariance(d, seed=0, rank=None):
    factor = np.random.default_rng(seed).normal(size=(d, rank or d))
    return factor @ factor.T / d


MEAN, COV = np.array([0.5, -1.0, 2.0, 0.0]), covariance(4)
X = np.random.default_rng(9).normal(size=(6, 4))


def law(schedule, t, mean=MEAN, cov=COV):
    """Mean and covariance of x_t: BACKGROUND, section 3, in full matrices."""
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
    expected = {"x0": x0, "noise": noise, "v": alpha * noise - sigma * x0}
    for prediction in PREDICTIONS:
        gaussian = Gaussian(MEAN, cov, TUTORIAL, prediction=prediction)
        np.testing.assert_allclose(gaussian.predict(X, t), expected[prediction], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(gaussian.mean_x0(X, t), x0, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("t", [0, 50, 99])
def test_log_density(t):
    gaussian = Gaussian(MEAN, COV, TUTORIAL)
    expected = scipy.stats.multivariate_normal(*law(TUTORIAL, t)).logpdf(X)
    np.testing.assert_allclose(gaussian.log_density(X, t), expected, rtol=1e-9)
    assert gaussian.log_density(X.astype(np.float32), t).dtype == np.float64


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
    single = gaussian.predict(x.astype(np.float32), 3)
    assert single.dtype == np.float32
    np.testing.assert_array_equal(single, gaussian.predict(x.astype(np.float32).astype(np.float64), 3).astype("f4"))
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
    states, previous = [x], None
    for i, (t, p, q, a, b, c, e, s) in enumerate(table.rows):
        out = model(x, t)
        x0 = p * x + q * out
        following = np.zeros_like(x)
        for factor, term in ((a, x), (b, x0), (c, previous), (e, out)):
            if factor != 0:
                following = following + factor * term
        x, previous = following + s * noise(i), x0
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
    for cov in (COV, covariance(4, rank=2), np.zeros((4, 4))):
        gaussian = Gaussian(MEAN, cov, TUTORIAL, prediction=prediction)
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


def test_exact_chain_is_what_samples_do():
    """20,000 samples of a stochastic sampler: mean and covariance within 5 standard errors."""
    n = 20_000
    gaussian = Gaussian(MEAN, COV, TUTORIAL)
    table = samplers.ddim(TUTORIAL, 12, eta=0.8)
    rng = np.random.default_rng(11)
    drawn = run(table, gaussian.predict, rng.normal(size=(n, 4)), lambda i: rng.normal(size=(n, 4)))[-1]
    chain = exact_chain(gaussian, table)
    variance = np.diag(chain.cov)
    assert (np.abs(drawn.mean(axis=0) - chain.mean) < 5 * np.sqrt(variance / n)).all()
    error = np.sqrt((np.outer(variance, variance) + chain.cov**2) / n)
    assert (np.abs(np.cov(drawn.T) - chain.cov) < 5 * error).all()


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
    tables = [ORDERS[name](schedule, int(n)) for n in steps]
    distance = [exact_chain(gaussian, table).w2() for table in tables]
    slopes = -np.diff(np.log(distance)) / np.diff(np.log(steps))
    assert np.abs(slopes - tables[0].order).max() < 0.1  # measured: 0.97 to 0.99, 1.96 to 1.99, Heun 2.06 to 2.03
    assert distance[-1] < 0.1


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
