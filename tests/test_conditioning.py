"""Sampling given observations, held against exact posteriors."""

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import conditioning
from fastdiff.errors import ArgumentError

LINEAR = fd.Schedule.linear()


def correlated(d, rho):
    return rho ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))


def gaussian(d, rho, prediction="noise", schedule=LINEAR):
    return fd.denoisers.Gaussian(np.zeros(d), correlated(d, rho), schedule, prediction=prediction)


def root(S):
    values, vectors = np.linalg.eigh((S + S.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def w2(mean, cov, other_mean, other_cov):
    cross = root(root(cov) @ other_cov @ root(cov))
    return np.sqrt(((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov - 2 * cross))


def moments(denoiser, table, after=None):
    """Mean and covariance of what a table samples with an affine denoiser; `after(i, mean, cov)` changes them."""
    d = denoiser.shape[0]
    mean, cov, probes = np.zeros(d), np.eye(d), np.vstack([np.zeros(d), np.eye(d)])
    for i, row in enumerate(table.rows):
        images = row.a * probes
        if row.evaluates:
            out = denoiser.predict(probes, row.t, backend="numpy")
            images = images + row.b * (row.p * probes + row.q * out) + row.e * out
        M = (images[1:] - images[0]).T
        mean, cov = M @ mean + images[0], M @ cov @ M.T + row.s**2 * np.eye(d)
        if after is not None:
            after(i, mean, cov)
    return mean, cov


# Half of 16 correlated values, seen exactly; distances to the true law computed independently, from the formulas.
SEEN = np.array([1, -1, 0.5, 2, 0, -0.5, 1, 0.3])
CASE_A = np.full(16, np.nan)
CASE_A[::2] = SEEN
DISTANCES = {
    "replace": (0.7349, 0.7073),
    "repaint": (0.2503, 0.1805),
    "pigdm": (0.4760, 0.4458),
    "tmpd": (0.1385, 0.0814),
}


def distance(method, rows):
    prior, noise = gaussian(16, 0.9), 0.0 if method in ("replace", "repaint") else 1e-3
    true = prior.given(fd.Known(CASE_A)).data
    table = fd.samplers.ddpm(LINEAR, rows)
    if noise:
        found = moments(fd.condition(prior, fd.Known(CASE_A, noise), method), table)
        return w2(*found, true.mean, true.cov)
    table = conditioning.resampled(table) if method == "repaint" else table
    signal, spread = conditioning.levels_after(table)

    def overwritten(i, mean, cov):
        mean[::2] = signal[i] * SEEN
        cov[::2], cov[:, ::2] = 0, 0
        cov[range(0, 16, 2), range(0, 16, 2)] = spread[i] ** 2

    return w2(*moments(prior, table, overwritten), true.mean, true.cov)


@pytest.mark.parametrize("method", DISTANCES)
def test_distances_to_the_true_law(method):
    for rows, wanted in zip((50, 100), DISTANCES[method], strict=True):
        assert distance(method, rows) == pytest.approx(wanted, rel=0.02)


def test_tmpd_comes_to_the_true_law():
    assert distance("tmpd", 1000) == pytest.approx(0.0107, rel=0.02)


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("method", ["tmpd", "pigdm"])
def test_a_method_is_the_same_in_every_prediction(prediction, method):
    """What is moved is the mean of x0, whatever the network says."""
    x = np.random.default_rng(0).normal(size=(3, 5))
    known = [fd.Known([1.0, np.nan, np.nan, np.nan, -1.0], 0.2), fd.Linear(np.ones((1, 5)), [2.0], 0.1)]

    def mean_x0(prediction):
        out = fd.condition(gaussian(5, 0.8, prediction), known, method).predict(x, 300, backend="numpy")
        p, q = conditioning.x0_from_output(LINEAR.signal[300:301], LINEAR.noise[300:301], prediction)
        return p * x + q * out

    np.testing.assert_allclose(mean_x0(prediction), mean_x0("noise"), atol=1e-9)


def test_tmpd_is_exact_for_a_gaussian_at_every_level():
    """The mean of x0 given a state and observations: of the joint normal law, by its formula."""
    prior, d = gaussian(6, 0.8), 6
    A = np.random.default_rng(1).normal(size=(2, d))
    y, noise = np.array([0.5, -1.0]), np.array([0.3, 0.1])
    x = np.random.default_rng(2).normal(size=(4, d))
    for t in (5, 200, 700):
        signal, level = LINEAR.signal[t], LINEAR.noise[t]
        rows = np.vstack([signal * np.eye(d), A])
        S = rows @ prior.cov @ rows.T + np.diag([*[level**2] * d, *noise**2])
        wanted = np.linalg.solve(S, np.hstack([x, np.tile(y, (4, 1))]).T).T @ rows @ prior.cov
        out = fd.condition(prior, fd.Linear(A, y, noise)).predict(x, t, backend="numpy")
        np.testing.assert_allclose((x - level * out) / signal, wanted, atol=1e-7)


def smooth(d, width):
    at = np.arange(d)
    return np.exp(-((at[:, None] - at) ** 2) / (2 * width**2))


@pytest.mark.parametrize("seen", [np.arange(12), np.r_[:6, 18:24]], ids=["beyond", "between"])
def test_what_a_smooth_curve_hides_is_told_by_small_singular_values(seen):
    """Half of the values are one gap: what lies there is told by a covariance of which 1e-5 counts."""
    d, noise = 24, 3e-3
    prior = fd.denoisers.Gaussian(np.zeros(d), smooth(d, 3.0), LINEAR)
    truth = np.linalg.cholesky(prior.cov + 1e-9 * np.eye(d)) @ np.random.default_rng(3).normal(size=d)
    known = np.full(d, np.nan)
    known[seen] = truth[seen]
    true = prior.given(fd.Known(known, noise)).data
    found = moments(fd.condition(prior, fd.Known(known, noise)), fd.samplers.ddpm(LINEAR, 200))
    assert w2(*found, true.mean, true.cov) < 0.025 * np.sqrt(np.trace(true.cov))


SHAPES = {
    "diagonal": lambda: fd.NoiseShape.diagonal([0.5, 1.0, 2.0, 4.0]),
    "dense": lambda: fd.NoiseShape.dense(2 * correlated(4, 0.6)),
    "low rank": lambda: fd.NoiseShape.low_rank(np.array([[1.0], [0.5], [-1.0], [2.0]]), [0.5, 1.0, 1.0, 2.0]),
    "stationary": lambda: fd.NoiseShape.stationary(np.array([1.0, 0.5, 0.2, 0.5])),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_covariance_spreads_rows(shape):
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(shape().spread(x), x @ shape().cov(), atol=1e-12)


class Coloured:
    """A denoiser of L x, from one of x, with its derivatives; `root` L."""

    T, prediction, shape = 1000, "noise", (4,)

    def __init__(self, inner, root):
        self.inner, self.root, self.inverse = inner, root, np.linalg.inv(root)

    def predict(self, x, t):
        return self.inner.predict(x @ self.inverse.T, t, backend="numpy") @ self.root.T

    def vjp(self, x, t, cotangent):
        white = self.inner.vjp(x @ self.inverse.T, t, np.ascontiguousarray(cotangent @ self.root), backend="numpy")
        return white @ self.inverse


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["tmpd", "pigdm", "dps", "smc"])
def test_given_with_a_noise_shape_is_given_in_whitened_states(method, shape):
    """A becomes A L: the samples are L times those of white noise."""
    shape, white = shape(), gaussian(4, 0.5)
    root = shape.colour(np.eye(4), backend="numpy").T
    A, y = np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, -1.0, 0.2]]), np.array([1.0, -0.5])
    options = {"n": 6, "method": method, "seed": 1, "backend": "numpy"}
    start = np.random.default_rng(0).normal(size=(6, 4))
    given, plain = fd.Linear(A, y, 0.2), Coloured(white, np.eye(4))
    got = fd.sample(Coloured(white, root), TABLE, given=given, noise_shape=shape, initial=start @ root.T, **options)
    want = fd.sample(plain, TABLE, given=fd.Linear(A @ root, y, 0.2), initial=start, **options)
    np.testing.assert_allclose(got, want @ root.T, atol=1e-5 * np.abs(want).max())
    if method == "tmpd":
        first = fd.Known([1.0, np.nan, np.nan, np.nan])
        x = fd.sample(Coloured(white, root), TABLE, n=300, given=first, noise_shape=shape, backend="numpy")
        np.testing.assert_array_equal(x[:, 0], 1)


def test_the_evidence_of_particles_is_that_of_the_table():
    """50 rows of ddpm sample another law than the data's, whose evidence is -3.51."""
    known = fd.Known(np.tile([1.0, -0.5, np.nan, np.nan], (40, 1)), 0.3)
    x, evidence = fd.sample(
        gaussian(4, 0.8), fd.samplers.ddpm(LINEAR, 50), n=256, given=known, method="smc", return_evidence=True,
        backend="numpy",
    )  # fmt: skip
    assert x.shape == (256, 40, 4)
    error = evidence.std(ddof=1) / np.sqrt(40)
    assert error < 0.02
    assert abs(evidence.mean() + 3.7204792) < 3 * error
    one, alone = fd.sample(
        gaussian(4, 0.8), fd.samplers.ddpm(LINEAR, 50), n=256, given=fd.Known([1.0, -0.5, np.nan, np.nan], 0.3),
        method="smc", return_evidence=True, backend="numpy",
    )  # fmt: skip
    np.testing.assert_array_equal(one, x[:, 0])
    assert alone == evidence[0]


def test_particles_find_the_law_of_a_mixture():
    """Two clusters, and an observation that tells them apart less than it seems: the share of each is exact."""
    means = np.array([[-2.0, 0.0], [2.0, 0.0]])
    prior = fd.denoisers.Mixture([0.5, 0.5], means, [0.25 * np.eye(2)] * 2, LINEAR)
    known = fd.Known([0.3, np.nan], 1.0)
    posterior = prior.given(known)
    share = posterior.weights[1]
    assert 0.6 < share < 0.9
    x = fd.sample(prior, fd.samplers.ddpm(LINEAR, 100), n=4000, given=known, method="smc", backend="numpy")
    assert np.mean(x[:, 0] > 0) == pytest.approx(share, abs=0.04)


# ------------------------------------------------------------------------------------------- the laws

TABLE = fd.samplers.ddpm(LINEAR, 12)
HOLES = np.array([[1.0, np.nan, 0.5, np.nan], [np.nan, np.nan, np.nan, -2.0], [0.1, 0.2, np.nan, np.nan]])


@pytest.mark.parametrize("method", ["tmpd", "pigdm", "dps", "replace", "repaint", "smc"])
def test_draws_do_not_depend_on_the_batch(method):
    prior, noise = gaussian(4, 0.8), 0.1 if method == "smc" else 0.0
    whole = fd.sample(prior, TABLE, n=6, given=fd.Known(HOLES, noise), method=method, seed=5)
    assert whole.shape == (6, 3, 4)
    assert np.isfinite(whole).all()
    parts = fd.sample(prior, TABLE, n=6, given=fd.Known(HOLES, noise), method=method, seed=5, batch=7)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    if method != "smc":  # whose draws are particles
        few = fd.sample(prior, TABLE, n=2, given=fd.Known(HOLES, noise), method=method, seed=5, first_sample=2)
        np.testing.assert_allclose(few, whole[2:4], atol=1e-5)
        alone = fd.sample(prior, TABLE, n=6, given=fd.Known(HOLES[0], noise), method=method, seed=5)
        np.testing.assert_allclose(alone, whole[:, 0], atol=1e-5)


@pytest.mark.parametrize("schedule", [fd.Schedule.flow(40), fd.Schedule.cosine(40).zero_terminal_snr()])
def test_known_values_are_kept_from_noise_alone_on(schedule):
    """What comes back to noise alone has forgotten the level that it came from."""
    prior = gaussian(4, 0.8, "v", schedule)
    table = fd.samplers.ddpm(schedule, 6, prediction="v")
    path = fd.sample(prior, table, n=3, given=fd.Known(HOLES), method="repaint", trajectory=True)[1]
    assert np.isfinite(path).all()
    np.testing.assert_array_equal(path[-1][:, ~np.isnan(HOLES)], np.float32([HOLES[~np.isnan(HOLES)]] * 3))


def test_backends_agree():
    options = {"n": 5, "given": fd.Known(HOLES, 0.05), "seed": 2}
    want = fd.sample(gaussian(4, 0.8), TABLE, backend="numpy", **options)
    np.testing.assert_allclose(fd.sample(gaussian(4, 0.8), TABLE, backend="cpu", **options), want, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("method", ["tmpd", "replace"])
def test_what_is_known_comes_back_to_the_bit(dtype, method):
    values = (HOLES * np.pi).astype(dtype)
    x = fd.sample(gaussian(4, 0.8), TABLE, n=3, given=fd.Known(values), method=method)
    assert x.dtype == np.result_type(dtype, np.float32)
    told = ~np.isnan(values)
    for draw in x:
        np.testing.assert_array_equal(draw[told], values[told])
        assert not np.isnan(draw).any()


def test_nothing_known_is_plain_sampling():
    prior = gaussian(4, 0.8)
    plain = fd.sample(prior, TABLE, n=3, seed=4)
    for known in (fd.Known(np.full(4, np.nan)), [], fd.Linear(np.zeros((0, 4)), np.zeros(0), 0.0)):
        for method in ("auto", "replace"):
            np.testing.assert_array_equal(fd.sample(prior, TABLE, n=3, seed=4, given=known, method=method), plain)


def test_all_known_is_what_is_known():
    x = fd.sample(gaussian(4, 0.8), TABLE, n=3, given=fd.Known(np.arange(4.0)))
    np.testing.assert_array_equal(x, np.tile(np.arange(4.0), (3, 1)))


@pytest.mark.parametrize("method", ["tmpd", "pigdm"])
def test_many_values_are_told_without_a_matrix(caplog, method):
    """Of a white Gaussian, where row sums are all there is, and one iteration is enough, it is still exact."""
    white = fd.denoisers.Gaussian(np.zeros(100), np.eye(100), LINEAR)
    values = np.full(100, np.nan)
    values[:80] = np.linspace(-1, 1, 80)
    with caplog.at_level("INFO", "fastdiff"):
        denoiser = fd.condition(white, fd.Known(values, 0.5), method)
        x = np.random.default_rng(0).normal(size=(2, 100))
        out = denoiser.predict(x, 300, backend="numpy")
    assert "80 observations" in caplog.text
    signal, noise = LINEAR.signal[300], LINEAR.noise[300]
    few = fd.condition(fd.denoisers.Gaussian(np.zeros(40), np.eye(40), LINEAR), fd.Known(values[:40], 0.5), method)
    np.testing.assert_allclose(out[:, :40], few.predict(x[:, :40], 300, backend="numpy"), atol=1e-7)
    assert np.abs((x - noise * out) / signal)[:, 80:].max() < 10


def test_tmpd_of_many_values_is_close_to_exact():
    """More values than iterations, of a smooth law: the mean of x0 given a state, by the formula of normal laws."""
    d = 60
    at = np.arange(d)
    cov = np.exp(-((at[:, None] - at) ** 2) / 50) + 1e-3 * np.eye(d)
    prior = fd.denoisers.Gaussian(np.zeros(d), cov, LINEAR)
    rng = np.random.default_rng(0)
    truth = np.linalg.cholesky(cov) @ rng.normal(size=d)
    seen = at % 2 == 0
    assert seen.sum() > conditioning.KRYLOV
    for t in (5, 200, 700):
        signal, level = LINEAR.signal[t], LINEAR.noise[t]
        x = (signal * truth + level * rng.normal(size=(3, d))).astype(np.float64)
        A = np.vstack([signal * np.eye(d), np.eye(d)[seen]])
        S = A @ cov @ A.T + np.diag([*[level**2] * d, *[0.05**2] * seen.sum()])
        wanted = np.linalg.solve(S, np.hstack([x, np.tile(truth[seen], (3, 1))]).T).T @ A @ cov
        out = fd.condition(prior, fd.Known(np.where(seen, truth, np.nan), 0.05)).predict(x, t, backend="numpy")
        np.testing.assert_allclose((x - level * out) / signal, wanted, atol=0.02)  # of deviations of 1


@pytest.mark.parametrize("schedule", [fd.Schedule.cosine(10), fd.Schedule.cosine(50).zero_terminal_snr()])
def test_a_network_that_has_learnt_nothing_does_not_explode(schedule):
    """Its Jacobian is nothing like a covariance, and still what is drawn stays where the data are."""
    X = fd.data.harmonic_curves(200, points=20, seed=0)
    model = fd.Diffusion(schedule=schedule, base=None, backend="cpu")
    model.fit(X, steps=20, batch=64, judge=False, progress=False)
    holes = X[:4].copy()
    holes[0, 2:], holes[1, ::2], holes[2, 12:], holes[3, 5] = np.nan, np.nan, np.nan, np.nan
    assert np.abs(model.impute(holes, draws=20)).max() < 5 * np.abs(X).max()


def test_a_weight_multiplies_the_law():
    """exp(-(x0 - 1)^2 / 2) times N(0, I): N(1/2, 1/2), which particles sample and whose Z is known."""
    prior = fd.denoisers.Gaussian(np.zeros(2), np.eye(2), LINEAR)

    def weight(x0):
        return -((x0 - 1) ** 2).sum(axis=1) / 2, 1 - x0

    x, evidence = fd.sample(
        prior, fd.samplers.ddpm(LINEAR, 200), n=4000, given=fd.Weight(weight), method="smc", return_evidence=True,
        backend="numpy",
    )  # fmt: skip
    assert evidence == pytest.approx(-np.log(2) - 0.5, abs=0.03)
    np.testing.assert_allclose(x.mean(axis=0), 0.5, atol=0.05)
    np.testing.assert_allclose(x.var(axis=0), 0.5, atol=0.06)


# ------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def model():
    X = 3 + 2 * fd.data.harmonic_curves(400, points=8, seed=0)
    return fd.Diffusion(backend="cpu").fit(X, steps=300, batch=128, judge=False, progress=False)


def test_a_model_takes_observations_in_the_units_of_the_data(model):
    factor, offset = model.normaliser.affine()
    values = np.full((2, 8), np.nan)
    values[0, 2], values[1, [0, 5]] = 4.0, (2.0, 3.0)
    got = model.sample(3, given=fd.Known(values, 0.5))
    inner = fd.sample(
        model.denoiser(), model.named_sampler("auto").unclipped(), n=3, seed=model.seed,
        given=fd.Known((values - offset) / factor, 0.5 / factor),
    )  # fmt: skip
    assert got.shape == (3, 2, 8)
    np.testing.assert_allclose(got, inner * factor + offset, rtol=1e-4, atol=1e-4)
    A = np.zeros((1, 8))
    A[0, 2] = 1
    row = model.sample(3, given=fd.Linear(A, [4.0], 0.5))
    np.testing.assert_allclose(row, got[:, 0], rtol=1e-3, atol=1e-3)
    assert np.abs(got - offset).max() < 6 * factor


def test_imputation_fills_holes_only(model):
    X = 3 + 2 * fd.data.harmonic_curves(4, points=8, seed=1).astype(np.float64)
    holes = X.copy()
    holes[0, 1:4], holes[2, 7], holes[3] = np.nan, np.nan, np.nan
    filled = model.impute(holes, draws=5)
    assert (filled.shape, filled.dtype) == ((5, 4, 8), np.float64)
    assert np.isfinite(filled).all()
    for draw in filled:
        np.testing.assert_array_equal(draw[~np.isnan(holes)], holes[~np.isnan(holes)])
    np.testing.assert_allclose(model.impute(holes, draws=2, first_draw=3), filled[3:], atol=1e-5)
    np.testing.assert_allclose(model.impute(holes[:1], draws=5), filled[:, :1], atol=1e-5)  # each row has its own noise
    assert filled[:, 3].std() > 0
    np.testing.assert_array_equal(model.impute(X, draws=2), np.stack([X, X]))


def test_the_evidence_of_a_model_is_in_the_units_of_the_data(model):
    factor, _ = model.normaliser.affine()
    values = np.full((2, 8), np.nan)
    values[0, 2], values[1, [0, 5]] = 4.0, (2.0, 3.0)
    _, evidence = model.sample(64, given=fd.Known(values, 0.5), method="smc", return_evidence=True)
    inside = conditioning.inside(conditioning.observations(fd.Known(values, 0.5), (8,)), *model.normaliser.affine())
    _, inner = fd.sample(
        model.denoiser(), model.named_sampler("ddpm"), n=64, seed=model.seed, given=inside, method="smc",
        return_evidence=True,
    )  # fmt: skip
    np.testing.assert_allclose(evidence, inner - np.array([1, 2]) * np.log(factor))


def test_a_model_with_a_noise_shape_takes_observations_of_data():
    """Of data L u, with rows of L: what is known comes back to the bit, and is told from what correlates with it."""
    d = 6
    S = smooth(d, 2.0) + 0.05 * np.eye(d)
    X = np.random.default_rng(0).multivariate_normal(np.arange(d), S, 600, method="cholesky").astype(np.float32)
    model = fd.Diffusion(noise_shape=fd.NoiseShape.dense(S), backend="cpu")
    model.fit(X, steps=60, batch=128, judge=False, progress=False)
    holes = np.full((2, d), np.nan)
    holes[0, 0], holes[1, 2:4] = 1.5, (1.4, 3.0)
    drawn = model.impute(holes, draws=200)
    np.testing.assert_array_equal(drawn[:, ~np.isnan(holes)], np.tile(holes[~np.isnan(holes)], (200, 1)))
    law = fd.denoisers.Gaussian(X.mean(axis=0).astype(np.float64), np.cov(X.T), LINEAR)
    for k, row in enumerate(holes):
        true = law.given(fd.Known(row)).data
        spread = np.sqrt(np.diag(true.cov))
        assert (np.abs(drawn[:, k].mean(axis=0) - true.mean) <= 0.3 * spread + 1e-6).all()
        np.testing.assert_allclose(drawn[:, k].std(axis=0), spread, rtol=0.25, atol=1e-6)
    _, evidence = model.sample(256, given=fd.Known(holes, 0.5), method="smc", return_evidence=True)
    np.testing.assert_allclose(evidence, [one.log_evidence for one in law.given(fd.Known(holes, 0.5))], atol=0.3)
    with pytest.raises(ArgumentError, match="'replace' or 'repaint', for a model with a noise shape"):
        model.impute(holes, draws=2, method="replace")


def test_pictures_are_filled_in():
    rng = np.random.default_rng(0)
    X = (rng.random((40, 4, 4, 1)) * 255).astype(np.uint8)
    net = fd.UNet((4, 4, 1), channels=(8,), blocks=1, attention=(False,), groups=4, T=10)
    pictures = fd.Diffusion(net, fd.Schedule.cosine(10)).fit(X, steps=4, batch=8, progress=False)
    part = X[0].astype(np.float32)
    part[2:] = np.nan
    for method in ("auto", "replace"):
        drawn = pictures.sample(3, given=fd.Known(part), method=method)
        np.testing.assert_array_equal(drawn[:, :2], np.broadcast_to(X[0, :2], (3, 2, 4, 1)))


def test_several_observations_each_with_its_class():
    """A class of each observation, whose draws all have it; its Jacobian too."""
    net = fd.UNet((1, 4, 1), channels=(8,), blocks=1, attention=(False,), groups=4, T=6, classes=3)
    X = np.random.default_rng(0).normal(size=(12, 1, 4, 1)).astype(np.float32)
    options = {"steps": 30, "batch": 12, "progress": False, "judge": False}
    model = fd.Diffusion(net, fd.Schedule.cosine(6)).fit(X, np.arange(12) % 3, **options)
    part = X[:3].copy()
    part[:, :, 2:] = np.nan
    three = model.sample(4, given=fd.Known(part), labels=[0, 2, 1])
    assert three.shape == (4, 3, 1, 4, 1)
    first = model.sample(4, given=fd.Known(part[0]), labels=0)
    np.testing.assert_allclose(three[:, 0], first, atol=1e-4)
    other = model.sample(4, given=fd.Known(part), labels=[0, 1, 1])
    np.testing.assert_array_equal(other[:, [0, 2]], three[:, [0, 2]])
    assert np.abs(other[:, 1] - three[:, 1]).max() > 1e-3
    np.testing.assert_array_equal(model.impute(part, 4, labels=[0, 2, 1]), three)
    with pytest.raises(ArgumentError, match="labels"):
        model.sample(4, given=fd.Known(part), labels=[0, 2])


@pytest.mark.parametrize("method", ["tmpd", "dps", "replace"])
def test_the_path_of_draws_given_observations(method):
    options = {"n": 5, "given": fd.Known(HOLES, 0.1), "seed": 3, "method": method, "backend": "numpy"}
    plain = fd.sample(gaussian(4, 0.8), TABLE, **options)
    x, path = fd.sample(gaussian(4, 0.8), TABLE, trajectory=True, batch=7, **options)
    np.testing.assert_allclose(x, plain, atol=1e-4)
    assert path.shape == (len(TABLE) + 1, 5, 3, 4)
    np.testing.assert_allclose(path[-1], x, atol=1e-6)
    seen = []

    def look(i, t, state):
        seen.append((i, t, state.copy()))
        return i == 6

    stopped = fd.sample(gaussian(4, 0.8), TABLE, callback=look, **options)
    assert [i for i, _, _ in seen] == list(range(7))
    assert [t for _, t, _ in seen] == [row.t for row in TABLE.rows[:7]]
    for i, _, state in seen:
        np.testing.assert_allclose(state, path[i + 1], atol=1e-4)
    np.testing.assert_allclose(stopped, path[7], atol=1e-4)


@pytest.mark.parametrize("method", ["tmpd", "pigdm", "replace"])
def test_guided_draws_are_the_same_on_every_backend(any_backend, method):
    """Of a small network, cuda by the host run."""
    net = fd.MLP(4, T=10, hidden=(8,), seed=1)
    table = fd.samplers.ddpm(fd.Schedule.cosine(10), 3)
    options = {"n": 2, "given": fd.Known(HOLES, 0.1), "method": method, "seed": 2}
    want = fd.sample(net, table, backend="numpy", **options)
    got = fd.sample(net, table, backend=any_backend, **options)
    got = got if isinstance(got, np.ndarray) else any_backend.to_numpy(got)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


# ------------------------------------------------------------------------------------------- bad input

PRIOR = gaussian(4, 0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": fd.Known(np.zeros(3))}, "given: got values of shape"),
        ({"given": "half"}, "given: got str"),
        ({"given": fd.Known(HOLES), "method": "magic"}, "method: got 'magic'"),
        (
            {"given": [fd.Known([1, np.nan, np.nan, np.nan]), fd.Linear([[1, 0, 0, 0]], [2], 0)]},
            "contradict each other",
        ),
        ({"given": fd.Known(HOLES), "method": "smc"}, "given: got an observation without noise"),
        ({"given": fd.Known(HOLES), "initial": np.zeros((2, 4), np.float32), "n": 2}, "initial: got a state"),
        ({"given": fd.Known(HOLES, 0.1), "first_sample": 2**20}, "first_sample: got"),
        ({"given": fd.Linear(np.ones((1, 4)), [1.0], 0.1), "method": "replace"}, "given: got fd.Linear or fd.Weight"),
        ({"given": fd.Known(HOLES), "return_evidence": True}, "return_evidence: got True"),
        ({"return_evidence": True}, "return_evidence: got True"),
        ({"given": fd.Known(HOLES, 1.0), "method": "smc", "trajectory": True}, "method: got 'smc' with a trajectory"),
        (
            {"given": fd.Weight(lambda x: (np.full(len(x), np.nan), x)), "method": "smc"},
            "log weight nan for sample 0 of the batch, in the row at t = 999",
        ),
        (
            {"given": fd.Weight(lambda x: (np.zeros(len(x)), np.full(x.shape, np.inf)))},
            "a gradient for sample 0 of the batch, in the row at t = 999 that",
        ),
        ({"given": fd.Weight(lambda x: x)}, r"wants a pair \(log weights, gradients\)"),
    ],
)
def test_bad_observations(options, message):
    with pytest.raises(ArgumentError, match=message):
        fd.sample(PRIOR, TABLE, **{"n": 3, **options})


@pytest.mark.parametrize("method", ["tmpd", "pigdm"])
def test_rows_that_say_the_same_without_noise(method):
    """A singular A, and values that agree: as if each were told once."""
    once = fd.Linear([[1.0, 1.0, 0.0, 0.0]], [0.6], 0.0)
    again = fd.Linear([[1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], [0.6, 1.2, 0.0], 0.0)
    options = {"n": 5, "method": method, "seed": 2, "backend": "numpy"}
    x = fd.sample(PRIOR, TABLE, given=again, **options)
    np.testing.assert_allclose(x, fd.sample(PRIOR, TABLE, given=once, **options), atol=2e-3)
    if method == "tmpd":
        np.testing.assert_allclose(x[:, :2].sum(axis=1), 0.6, atol=2e-3)
    with pytest.raises(ArgumentError, match="contradict each other"):
        fd.sample(PRIOR, TABLE, n=2, given=fd.Linear(again.A, [0.6, 1.2, 1.0], 0.0), method=method)


def test_values_far_outside_of_the_data_are_taken_as_they_are():
    """A hundred deviations away: the mean follows in closed form, and a network's draws stay finite."""
    known = fd.Known([100.0, np.nan, np.nan, np.nan])
    x = fd.sample(PRIOR, fd.samplers.ddpm(LINEAR, 100), n=400, given=known, backend="numpy")
    np.testing.assert_allclose(x.mean(axis=0), 100 * 0.8 ** np.arange(4), rtol=0.02)
    net = fd.MLP(4, T=10, hidden=(8,))
    for method in ("tmpd", "pigdm", "replace"):
        drawn = fd.sample(net, fd.samplers.ddpm(fd.Schedule.cosine(10)), n=3, given=known, method=method)
        assert np.isfinite(drawn).all()
        np.testing.assert_array_equal(drawn[:, 0], 100)


def test_bad_tables():
    known = fd.Known([1.0, np.nan, np.nan, np.nan], 0.1)
    with pytest.raises(ArgumentError, match=r"clip \(-1.0, 1.0\), wants clip None with 'tmpd'"):
        fd.sample(PRIOR, fd.samplers.ddpm(LINEAR, 5, clip=1), n=2, given=known)
    with pytest.raises(ArgumentError, match="noise in every row but the last"):
        fd.sample(PRIOR, fd.samplers.ddim(LINEAR, 5), n=2, given=known, method="smc")
    with pytest.raises(ArgumentError, match="a table without memory for 'repaint'"):
        fd.sample(PRIOR, fd.samplers.dpmpp_2m(LINEAR, 5), n=2, given=known, method="repaint")
    with pytest.raises(ArgumentError, match="one with derivatives"):
        fd.sample(lambda x, t: x, TABLE, n=2, shape=(4,), given=known)


def test_a_derivative_of_any_size_moves_the_mean_no_farther_than_that_can_be():
    """pigdm trusts it: of a network whose output says nothing the steps would grow from row to row."""
    d, reach = 4, conditioning.REACH * 2

    class Steep:
        T, prediction, shape = 1000, "x0", (d,)

        def predict(self, x, t):
            return np.zeros_like(x)

        def vjp(self, x, t, cotangent):
            return np.float32(1e20) * cotangent

    x = np.random.default_rng(0).normal(size=(5, d)).astype(np.float32)
    for method in ("pigdm", "tmpd"):
        denoiser = fd.condition(Steep(), fd.Known(HOLES[0], 0.1), method, schedule=LINEAR)
        for t in (10, 500, 999):
            power = np.sqrt(LINEAR.noise[t] ** 2 / (LINEAR.signal[t] ** 2 + LINEAR.noise[t] ** 2))
            moved = np.linalg.norm(denoiser.predict(x, t, backend="numpy"), axis=1)
            assert (moved <= reach * power * (1 + 1e-5)).all()
            assert method == "tmpd" or moved == pytest.approx(reach * power)


def test_draws_that_are_not_finite_are_an_error():
    """As of a network that has learnt nothing, by a method that holds nothing back."""

    class Steep:
        T, prediction, shape = 10, "noise", (4,)

        def predict(self, x, t):
            return np.float32(1e20) * x

        def vjp(self, x, t, cotangent):
            return np.float32(1e20) * cotangent

    table = fd.samplers.ddpm(fd.Schedule.cosine(10), 10)
    with np.errstate(all="ignore"), pytest.raises(ArgumentError, match="method: got 'dps', whose samples are not"):
        fd.sample(Steep(), table, n=2, given=fd.Known(HOLES), method="dps", backend="numpy")


def test_bad_conditions():
    with pytest.raises(ArgumentError, match="given: got 3 observations, wants one"):
        fd.condition(PRIOR, fd.Known(HOLES))
    with pytest.raises(ArgumentError, match="method: got 'replace'"):
        fd.condition(PRIOR, fd.Known(HOLES[0]), "replace")
    with pytest.raises(ArgumentError, match="schedule: got NoneType"):
        fd.condition(fd.MLP(4, T=10), fd.Known(HOLES[0]))
    with pytest.raises(ArgumentError, match="prediction: got None"):
        fd.condition(fd.MLP(4, T=10), fd.Known(HOLES[0]), schedule=fd.Schedule.cosine(10))


def test_no_particle_with_a_weight():
    def nothing(x0):
        return np.full(len(x0), -np.inf), np.zeros_like(x0)

    with pytest.raises(ArgumentError, match="no particle with a weight above 0 for observation 0 in row 0"):
        fd.sample(PRIOR, TABLE, n=4, given=fd.Weight(nothing), method="smc")


def test_bad_rows_to_fill_in(model):
    for shape in ((2, 7), (2, 8, 1)):
        with pytest.raises(ArgumentError, match=r"X: got shape"):
            model.impute(np.zeros(shape))
    with pytest.raises(ArgumentError, match="draws: got 0"):
        model.impute(np.zeros((2, 8)), draws=0)
