"""How likely data are, against closed forms: Gaussian data with an exact denoiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
from host_cuda import HostRuntime, has_compiler
from tolerances import DENSITY, DENSITY_FLOAT32, LANCZOS, SIGMAS, assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import likelihood
from fastdiff.backends.cuda import CudaBackend
from fastdiff.errors import ArgumentError
from fastdiff.likelihood import bound, log_density
from fastdiff.schedule import target

D = 16
C = 0.9 ** np.abs(np.subtract.outer(np.arange(D), np.arange(D)))
ROW = np.sin(np.arange(D) / 2)[None]
LINEAR, TUTORIAL = fd.Schedule.linear(1000), fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
LANES = {"numpy": "numpy", "cpu": "cpu"}
if has_compiler():
    LANES["cuda"] = CudaBackend(HostRuntime())


class Exact:
    """The best denoiser of N(0, cov), written out."""

    shape = classes = None

    def __init__(self, schedule, cov=C, prediction="noise"):
        self.schedule, self.T, self.prediction, self.cov = schedule, schedule.T, prediction, cov

    def jacobian(self, t):
        signal, noise, one = self.schedule.signal[t], self.schedule.noise[t], np.eye(len(self.cov))
        x0 = signal * self.cov @ np.linalg.inv(signal**2 * self.cov + noise**2 * one)
        of_noise, of_data = target(self.prediction, np.array([signal]), np.array([noise]))
        return of_noise * (one - signal * x0) / noise + of_data * x0

    def spread(self, t):
        """Cov[x0 | x_t]."""
        return np.linalg.inv(
            np.linalg.inv(self.cov) + self.schedule.signal[t] ** 2 / self.schedule.noise[t] ** 2 * np.eye(D)
        )

    def predict(self, x, t):
        return x @ self.jacobian(t).astype(x.dtype)

    def vjp(self, x, t, vector):
        return self.predict(vector, t)

    jvp = vjp


def gaussian(x, cov):
    _, log_det = np.linalg.slogdet(cov)
    squares = np.sum(x * np.linalg.solve(cov, x.T).T, axis=1)
    return -0.5 * (squares + log_det + len(cov) * math.log(2 * math.pi))


def drawn(n, seed=0):
    return np.random.default_rng(seed).multivariate_normal(np.zeros(D), C, size=n)


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(("rows", "want"), [(10, -3.460321), (20, -5.235504), (50, -6.391380), (100, -6.789130)])
def test_the_density_of_a_table(rows, want):
    found = log_density(Exact(LINEAR), ROW, sampler=fd.samplers.ddim(LINEAR, rows), backend="numpy")
    np.testing.assert_allclose(found.values, want, atol=1e-6)
    assert found.residual[0] < 1e-12
    assert found.negative.tolist() == [0]
    assert found.stderr.tolist() == [0]


def test_all_timesteps_by_default():
    found = log_density(Exact(LINEAR), ROW, backend="numpy")
    np.testing.assert_allclose(found.values, -7.158550, atol=1e-6)
    np.testing.assert_allclose(gaussian(ROW, C), -7.202704366, atol=1e-9)


FLOW = fd.Schedule.flow(60)  # ends without signal, of which the noise says nothing


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(TUTORIAL, "noise"), (TUTORIAL, "x0"), (TUTORIAL, "v"), (FLOW, "x0"), (FLOW, "v"), (FLOW, "velocity")],
)
def test_it_is_that_of_the_samples(schedule, prediction):
    """The table's law is a Gaussian, which `exact_chain` knows."""
    smp = fd.samplers.ddim(schedule, 12, prediction=prediction)
    exact = fd.denoisers.Gaussian(np.zeros(D), C, schedule, prediction=prediction)
    law = fd.denoisers.exact_chain(exact, smp)
    x = fd.sample(exact, smp, initial=np.random.default_rng(0).normal(size=(3, D)), backend="numpy")
    found = log_density(Exact(schedule, prediction=prediction), x, sampler=smp, backend="numpy")
    np.testing.assert_allclose(found.values, gaussian(x - law.mean, law.cov), atol=DENSITY)


@pytest.mark.parametrize("lane", LANES)
def test_backends_agree(lane):
    x = drawn(5).astype(np.float32)
    smp = fd.samplers.ddim(LINEAR, 50)
    want = log_density(Exact(LINEAR), x.astype(np.float64), sampler=smp, backend="numpy")
    got = log_density(Exact(LINEAR), x, sampler=smp, backend=LANES[lane])
    np.testing.assert_allclose(got.values, want.values, atol=DENSITY_FLOAT32)
    assert got.residual.max() < 1e-5


SHORT = fd.Schedule.sigmoid(20, beta_start=1e-3, beta_end=0.4)


def curved(dtype="float64", points=3, size=0.4):
    """A perceptron that is not linear, so that Newton's method has to find where a sample came from."""
    net = fd.MLP(points, hidden=(8,), T=20, dtype=dtype)
    for view in net.params.values():
        view[...] = size * np.random.default_rng(view.size).normal(size=view.shape)
    net.prediction = "noise"
    return net


def test_a_network():
    """log |det| of the whole map by differences, from noise to sample."""
    net, smp = curved(), fd.samplers.ddim(SHORT, 8)

    def sampled(z):
        return fd.sample(net, smp, initial=z, backend="numpy")

    z = np.random.default_rng(0).normal(size=(4, 3))
    found = log_density(net, sampled(z), sampler=smp, backend="numpy")
    assert max(np.ptp(net.jvp(z, 9, np.ones_like(z), backend="numpy"), axis=0)) > 0.2  # J depends on x
    step = 1e-5 * np.eye(3)
    J = np.stack([(sampled(z + h) - sampled(z - h)) / 2e-5 for h in step], axis=-1)
    want = -0.5 * np.sum(z**2, axis=1) - 1.5 * math.log(2 * math.pi) - np.log(np.abs(np.linalg.det(J)))
    assert found.residual.max() < 1e-12
    np.testing.assert_allclose(found.values, want, atol=1e-6)
    # A row does not depend on the others.
    alone = log_density(net, sampled(z)[2:3], sampler=smp, backend="numpy")
    np.testing.assert_allclose(alone.values, found.values[2:3], rtol=1e-12)


def test_a_row_that_turns_around_is_counted():
    """x' = -x in one row, by a table of one's own."""
    s = fd.Schedule.cosine(4)
    smp = fd.Sampler([(3, 0, 1, -1, 1, 0, 0, 0)], s, prediction="x0")
    odd = log_density(Exact(s, np.eye(3) * 1e-9, "x0"), np.ones((2, 3)), sampler=smp, backend="numpy")
    assert odd.negative.tolist() == [1, 1]


def test_the_lanczos_trace_against_the_determinant():
    """Its bias, with so many probes that its standard error is small: averaged over all signs it is exact."""
    d, s = 64, fd.Schedule.cosine(20)
    cov = 0.8 ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))
    x = np.random.default_rng(1).multivariate_normal(np.zeros(d), cov, size=2)
    smp = fd.samplers.ddim(s, 10)
    exact = log_density(Exact(s, cov), x, sampler=smp, backend="numpy")
    traced = log_density(Exact(s, cov), x, sampler=smp, trace="hutchinson", probes=24, backend="numpy")
    assert traced.negative is None
    assert (np.abs(traced.values - exact.values) < SIGMAS * traced.stderr).all()
    assert (traced.stderr < 3).all()
    # One symmetric operator for all units: the sum of its forms is the trace, whose bias is that of the Krylov space.
    smooth = Exact(s, cov).jacobian(10) + 0.3 * np.eye(d)
    total = likelihood._log_form(lambda v: v @ smooth @ smooth, np.eye(d)).sum()
    assert abs(total - 2 * np.linalg.slogdet(smooth)[1]) < LANCZOS


def test_beyond_determinants():
    net, smp = curved(points=300, size=0.06), fd.samplers.ddim(SHORT, 3)
    z = np.random.default_rng(0).normal(size=(2, 300))
    x = fd.sample(net, smp, initial=z, backend="numpy")
    with pytest.raises(ArgumentError, match=r"^trace: got 'exact' for 300 values, wants 'hutchinson' beyond 256"):
        log_density(net, x, sampler=smp, backend="numpy")
    found = log_density(net, x, sampler=smp, trace="hutchinson", probes=6, backend="numpy")
    assert found.residual.max() < 1e-9
    bigger = likelihood.EXACT_VALUES
    try:
        likelihood.EXACT_VALUES = 300
        want = log_density(net, x, sampler=smp, backend="numpy")
    finally:
        likelihood.EXACT_VALUES = bigger
    assert (np.abs(found.values - want.values) < SIGMAS * found.stderr + LANCZOS * 300).all()
    single = log_density(net, x, sampler=smp, trace="hutchinson", backend="numpy")
    assert np.isnan(single.stderr).all()


# ------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize(
    ("schedule", "last", "steps", "first", "total"),
    [
        (LINEAR, 0.000322873, 68.451075, -50.986092, 17.465306),
        (TUTORIAL, 0.0432476, 60.985820, -43.437455, 17.591613),
    ],
)
def test_the_bound_in_closed_form(schedule, last, steps, first, total):
    """With exact expectations: E |x0 - x0_hat|^2 = tr Cov[x0 | x_t], and E x0^2 = 1."""
    exact = Exact(schedule)
    terms = likelihood._costs(schedule) * [np.trace(exact.spread(t)) for t in range(schedule.T)]
    ratio = schedule.signal[0] ** 2 / schedule.noise[0] ** 2
    terms[0] += 0.5 * D * math.log(2 * math.pi / ratio)
    # The prior's term is quadratic in x0: rows +-1 have its expectation.
    found = bound(exact, np.ones((2, D)), backend="numpy").terms[-1]
    np.testing.assert_allclose([found, terms[1:].sum(), terms[0]], [last, steps, first], atol=1e-6)
    np.testing.assert_allclose(found + terms.sum(), total, atol=1e-6)


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_the_bounds_terms(prediction):
    exact = Exact(TUTORIAL, prediction=prediction)
    found = bound(exact, drawn(4000, seed=3), draws=2, backend="numpy")
    want = likelihood._costs(TUTORIAL) * [np.trace(exact.spread(t)) for t in range(100)]
    want[0] += 0.5 * D * math.log(2 * math.pi * TUTORIAL.noise[0] ** 2 / TUTORIAL.signal[0] ** 2)
    off = np.abs(found.terms - np.append(want, 0.0432476)) / found.stderr
    assert off.max() < SIGMAS
    assert np.mean(off < 3) > 0.97
    assert abs(found.total - 17.591613) < 3 * found.total_stderr
    assert found.per_row.shape == (4000,)
    np.testing.assert_allclose(found.per_row.mean(), found.total)


@pytest.mark.parametrize("lane", LANES)
def test_the_bound_on_backends(lane):
    x = drawn(6).astype(np.float32)
    want = bound(Exact(TUTORIAL), x.astype(np.float64), backend="numpy", seed=5)
    got = bound(Exact(TUTORIAL), x, backend=LANES[lane], seed=5)
    np.testing.assert_allclose(got.terms, want.terms, rtol=1e-3, atol=1e-4)
    other = bound(Exact(TUTORIAL), x, backend=LANES[lane], seed=6)
    assert (other.terms[:-1] != got.terms[:-1]).all()


def test_noise_does_not_depend_on_the_batch(monkeypatch):
    x = drawn(7).astype(np.float32)
    whole = bound(curved_net := Exact(TUTORIAL), x, draws=2, backend="numpy").per_row
    monkeypatch.setattr(likelihood, "BATCH_VALUES", 2 * D)
    np.testing.assert_allclose(bound(curved_net, x, draws=2, backend="numpy").per_row, whole, rtol=1e-5)


def test_bytes():
    """The probabilities of all levels of one value are 1 together, and the bound is that of the levels."""
    levels = np.arange(256) * likelihood.BYTE - 1
    for mean in (-1.2, -1.0, 0.1, 0.997):
        for deviation in (1e-3, 0.05, 2.0):
            logs = [likelihood._log_bytes(np.array([[v]]), np.array([[mean]]), deviation)[0] for v in levels]
            assert_close(np.exp(logs).sum(), np.float64(1), terms=256)
    tails = likelihood._log_bytes(levels[[200]][None], np.array([[-1.0]]), 1e-3)
    assert np.isfinite(tails).all()
    assert tails[0] < -1e5
    rows = levels[np.random.default_rng(0).integers(0, 256, size=(8, D))]
    density = bound(Exact(TUTORIAL), rows, backend="numpy")
    coded = bound(Exact(TUTORIAL), rows, decoder="bytes", backend="numpy")
    assert_same_bits(coded.terms[1:], density.terms[1:])
    assert coded.terms[0] > 0  # a probability
    # Of a wide decoder the two differ by the log of a level's width.
    sharp = D * math.log(likelihood.BYTE)
    assert abs(coded.terms[0] - (density.terms[0] - sharp)) < 0.2 * D
    with pytest.raises(ArgumentError, match=r"^decoder: got 'bytes' for other values"):
        bound(Exact(TUTORIAL), ROW, decoder="bytes")


# ------------------------------------------------------------------------------------------- denoising errors


@pytest.mark.parametrize("schedule", [LINEAR, TUTORIAL, fd.Schedule.flow(100)], ids=["linear", "tutorial", "flow"])
def test_the_denoising_integral_with_exact_expectations(schedule):
    """E |x0 - x0_hat|^2 for a row x is |(I - signal K) x|^2 + noise^2 |K|^2 with x0_hat = K x_t."""
    exact, errors = Exact(schedule, prediction="x0"), []
    for t in range(schedule.T):
        K = exact.jacobian(t)
        errors.append(np.sum((ROW @ (np.eye(D) - schedule.signal[t] * K)) ** 2) + schedule.noise[t] ** 2 * np.sum(K**2))
    known = 0.5 * D * (math.log1p(schedule.signal[0] ** 2 / schedule.noise[0] ** 2) - math.log(2 * math.pi * math.e))
    value = known - 0.5 * likelihood._quadrature(schedule) @ errors
    assert abs(value - gaussian(ROW, C)[0]) < 0.06  # see the notes of `log_density`


def test_the_denoising_integral():
    rows = np.repeat(ROW, 300, axis=0)
    for probes in (1, 3):
        found = log_density(Exact(TUTORIAL), rows, method="denoising", probes=probes, backend="numpy")
        spread = found.values.std(ddof=1)
        np.testing.assert_allclose(found.stderr.mean(), spread, rtol=0.15)
        assert abs(found.values.mean() - gaussian(ROW, C)[0]) < 3 * spread / math.sqrt(300) + 0.06


# ------------------------------------------------------------------------------------------- what is refused


class Ranging(Exact):
    """With a variance beside its prediction."""

    learned_variance = True

    def predict(self, x, t):
        return np.stack([super().predict(x, t), np.ones_like(x)])

    def vjp(self, x, t, vector):
        return super().predict(vector, t)


def test_a_learned_variance_is_left_out():
    smp = fd.samplers.ddim(TUTORIAL, 5)
    want, got = (log_density(of(TUTORIAL), ROW, sampler=smp, backend="numpy") for of in (Exact, Ranging))
    assert_same_bits(got.values, want.values)
    want, got = (bound(of(TUTORIAL), ROW, backend="numpy") for of in (Exact, Ranging))
    assert_same_bits(got.terms, want.terms)


class Silent:
    def predict(self, x, t):
        return x


TABLES = {
    "draws noise": fd.samplers.ddpm(TUTORIAL, 10),
    "remembers rows": fd.samplers.dpmpp_2m(TUTORIAL, 10),
    "clips": fd.samplers.ddim(TUTORIAL, 10, clip=1.0),
}


@pytest.mark.parametrize("fault", TABLES)
def test_tables_that_are_refused(fault):
    with pytest.raises(ArgumentError, match=rf"^sampler: got .*, which {fault}, wants a deterministic table"):
        log_density(Exact(TUTORIAL), ROW, sampler=TABLES[fault])


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"method": "exact"}, "method"),
        ({"trace": "none"}, "trace"),
        ({"probes": 0}, "probes"),
        ({"probes": 5000}, "probes"),
        ({"seed": -1}, "seed"),
        ({"sampler": "ddim"}, "sampler"),
        ({"schedule": fd.Schedule.cosine(7)}, "schedule"),
        ({"labels": 1}, "labels"),
        ({"method": "denoising", "sampler": fd.samplers.ddim(TUTORIAL, 10)}, "sampler"),
        ({"sampler": fd.samplers.ddim(TUTORIAL, 10, prediction="v")}, "denoiser"),
    ],
)
def test_bad_options(options, argument):
    with pytest.raises(ArgumentError, match=rf"^{argument}: "):
        log_density(Exact(TUTORIAL), ROW, **options)


@pytest.mark.parametrize("X", [np.ones(16), np.ones((0, 16)), np.ones((2, 0)), np.full((2, 16), np.nan), "rows", None])
@pytest.mark.parametrize("score", [bound, log_density])
def test_bad_rows(score, X):
    with pytest.raises(ArgumentError, match=r"^X: "):
        score(Exact(TUTORIAL), X)


def test_bad_denoisers():
    for score in (bound, log_density):
        with pytest.raises(ArgumentError, match=r"^schedule: got None"):
            score(Silent(), ROW)
        with pytest.raises(ArgumentError, match=r"^denoiser: got no prediction"):
            score(Silent(), ROW, schedule=TUTORIAL)
        with pytest.raises(ArgumentError, match=r"^X: got shape \(1, 16\)"):
            score(curved("float32"), ROW, schedule=fd.Schedule.cosine(20))
    with pytest.raises(ArgumentError, match=r"^draws: "):
        bound(Exact(TUTORIAL), ROW, draws=0)
    without = Exact(TUTORIAL)
    without.vjp = None
    with pytest.raises(ArgumentError, match=r"^denoiser: got a function, wants one with derivatives"):
        log_density(without, ROW)


# ------------------------------------------------------------------------------------------- models

ROWS = (np.random.default_rng(2).normal(size=(80, 9)) @ np.diag(np.linspace(3, 0.3, 9)) + 4).astype(np.float32)
UNITS = {
    "all": {"scale": "all"},
    "column": {"scale": "column"},
    "shaped": {"noise_shape": fd.NoiseShape.diagonal(np.linspace(0.5, 4, 9))},
}


def gaussian_model(rows=ROWS, dtype="float64", **options):
    """A model that is the Gaussian of its rows: a base that nothing has been added to."""
    net = fd.MLP(9, hidden=(4,), T=60, dtype=dtype)
    made = fd.Diffusion(net, fd.Schedule.cosine(60), base="gaussian", backend="numpy", **options)
    return made.fit(rows.astype(np.float64), steps=0, progress=False, judge=False)


@pytest.mark.parametrize("units", UNITS)
def test_a_model_scores_in_the_units_of_the_data(units):
    model = gaussian_model(**UNITS[units])
    base, normaliser = model._gaussian, model.normaliser
    cov = base.axes @ np.diag(base.variances) @ base.axes.T
    smp = fd.samplers.ddim(model.schedule, 60, prediction=model.prediction)
    exact = fd.denoisers.Gaussian(np.zeros(9), cov, model.schedule, prediction=model.prediction)
    law = fd.denoisers.exact_chain(exact, smp)
    # The law in the data's units, by its mean and covariance there.
    mean = normaliser.invert(law.mean[None].copy(), fd.get_backend("numpy"))[0]
    moved = [normaliser.invert(row[None].copy(), fd.get_backend("numpy"))[0] - mean for row in law.mean + np.eye(9)]
    A = np.array(moved).T
    want = gaussian(ROWS[:5] - mean, A @ law.cov @ A.T)
    np.testing.assert_allclose(model.score_samples(ROWS[:5]), want, atol=DENSITY)
    np.testing.assert_allclose(model.score(ROWS[:5]), want.mean(), atol=DENSITY)
    # Other units: a density per thousandth.
    larger = gaussian_model(1000 * ROWS, **(UNITS[units] if units != "shaped" else {"scale": "all"}))
    if units != "shaped":
        np.testing.assert_allclose(larger.score_samples(1000 * ROWS[:5]), want - 9 * math.log(1000), atol=1e-4)


def test_a_model_bounds_itself():
    model = gaussian_model()
    found = model.bound(ROWS, draws=4)
    inside = bound(
        model.denoiser(), model.normaliser.apply(ROWS, np.float64), draws=4, seed=model.seed, backend="numpy"
    )
    np.testing.assert_allclose(found.per_row - inside.per_row, -model.normaliser.log_det(9))
    np.testing.assert_allclose(found.total - inside.total, -model.normaliser.log_det(9))
    assert found.total > -model.score(ROWS)
    assert found.total_stderr > 0


def test_a_model_in_float32():
    wide, narrow = gaussian_model(), gaussian_model(dtype="float32")
    found = narrow.log_density(ROWS[:4])
    np.testing.assert_allclose(found.values, wide.score_samples(ROWS[:4]), atol=DENSITY_FLOAT32)
    assert found.residual.max() < 1e-5
    # A float32 network beside rows in float64: Newton's method stops where it gets no nearer.
    inside = wide.normaliser.apply(ROWS[:4], np.float64)
    again = log_density(narrow.denoiser(), inside, backend="numpy", seed=1)
    assert again.residual.max() < 1e-5
    denoised = narrow.log_density(ROWS[:4], method="denoising", probes=8)
    assert (np.abs(denoised.values - found.values) < SIGMAS * denoised.stderr + 0.5).all()


def test_a_model_of_pictures_with_classes():
    net = fd.UNet((4, 4, 1), channels=(4,), blocks=1, T=8, classes=2, attention=(True,))
    rows = np.random.default_rng(0).integers(0, 256, size=(12, 4, 4, 1)).astype(np.uint8)
    labels = np.arange(12) % 2
    model = fd.Diffusion(net, fd.Schedule.cosine(8), backend="cpu").fit(rows, labels, steps=3, batch=4, progress=False)
    by_table = model.log_density(rows[:3], labels[:3])
    assert by_table.residual.max() < 1e-4
    traced = model.log_density(rows[:3], labels[:3], trace="hutchinson", probes=12)
    assert (np.abs(traced.values - by_table.values) < SIGMAS * traced.stderr).all()
    others = model.score_samples(rows[:3], 1 - labels[:3])
    assert (others != by_table.values).all()
    coded = model.bound(rows, labels, decoder="bytes")
    assert coded.terms[0] > 0
    with pytest.raises(ArgumentError, match=r"^y: "):
        model.score_samples(rows)
    with pytest.raises(ArgumentError, match=r"^X: got dtype float64, wants bytes"):
        model.score_samples(rows / 1.0, labels)
    with pytest.raises(fd.errors.TrainingError):
        fd.Diffusion().score(ROWS)
