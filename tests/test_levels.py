"""Schedules that end in noise alone, flows and zero terminal SNR, through everything that uses a schedule.

A flow has signal + noise = 1: whatever takes signal^2 + noise^2 for 1 fails here.
"""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import scipy.stats
from gradcheck import assert_gradient
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import checkpoint, samplers
from fastdiff.errors import ArgumentError, CheckpointError, ScheduleWarning
from fastdiff.exact import Empirical, Gaussian, Mixture, exact_chain
from fastdiff.samplers import Sampler
from fastdiff.samplers.table import noise_from_output, x0_from_output
from fastdiff.schedule import PREDICTIONS, Schedule, target

SCHEDULES = {
    "flow": Schedule.flow(40),
    "shifted flow": Schedule.flow(30, shift=3.0),
    "zero terminal snr": Schedule.linear(50, beta_start=1e-3, beta_end=0.2).zero_terminal_snr(),
    "zero cosine": Schedule.cosine(20).zero_terminal_snr(),
}
WITH_X0 = ("x0", "v", "velocity")  # predictions that can say what x0 is where the signal is 0
MEAN = np.array([0.5, -1.0, 2.0])
FACTOR = np.random.default_rng(0).normal(size=(3, 3))
COV = FACTOR @ FACTOR.T / 3
POINTS = np.random.default_rng(1).normal(size=(7, 3))
X = np.random.default_rng(2).normal(size=(5, 3))


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


def exact(kind: str, schedule: Schedule, prediction: str = "v") -> fd.denoisers.Exact:
    if kind == "gaussian":
        return Gaussian(MEAN, COV, schedule, prediction=prediction)
    if kind == "low rank":
        return Gaussian.low_rank(MEAN, FACTOR[:, :1], 0.3, schedule, prediction=prediction)
    if kind == "mixture":
        return Mixture([0.3, 0.7], [MEAN, -MEAN], [COV, np.eye(3)], schedule, prediction=prediction)
    return Empirical(POINTS, schedule, prediction=prediction)


# -- the tables --------------------------------------------------------------------------------------------


def test_a_flow_is_a_straight_line():
    for T, shift in ((2, 1.0), (7, 1.0), (10, 3.0), (10, 0.3)):
        flow = Schedule.flow(T, shift=shift)
        times = [shift * k / T / (1 + (shift - 1) * k / T) for k in range(1, T + 1)]
        np.testing.assert_allclose(flow.noise, times, rtol=1e-14)
        np.testing.assert_allclose(flow.signal, [1 - u for u in times], rtol=1e-12, atol=1e-15)
        assert (flow.kind, flow.name, flow.T) == ("flow", "flow", T)
        assert (flow.signal[-1], flow.noise[-1], flow.log_snr[-1]) == (0, 1, -math.inf)
    times = Schedule.flow(1000).noise[Schedule.flow(1000).timesteps(5)]
    np.testing.assert_allclose(times, np.linspace(1, 0, 6)[:-1], rtol=1e-15)


def test_the_markov_form_has_the_jumps(schedule):
    """alpha and beta, step by step, lead to signal and noise; the posterior's variance is that of two Gaussians."""
    signal, variance = 1.0, 0.0
    for t in range(schedule.T):
        alpha, beta = schedule.alphas[t], schedule.betas[t]
        posterior = 1 / (alpha / beta + 1 / variance) if variance else 0.0
        signal, variance = math.sqrt(alpha) * signal, alpha * variance + beta
        assert schedule.signal[t] == pytest.approx(signal, rel=1e-9, abs=1e-12)
        assert schedule.noise[t] == pytest.approx(math.sqrt(variance), rel=1e-9)
        assert schedule.alphas_bar[t] == pytest.approx(signal**2, rel=1e-9, abs=1e-15)
        assert schedule.power[t] == pytest.approx(signal**2 + variance, rel=1e-9)
        assert schedule.posterior_variance[t] == pytest.approx(posterior, rel=1e-9)
        snr = math.log(signal**2 / variance) if signal > 1e-8 else -math.inf
        assert schedule.log_snr[t] == pytest.approx(snr, rel=1e-9, abs=1e-9)
    assert (schedule.betas > 0).all()
    assert schedule.betas[-1] == 1


def test_golden_zero_terminal_snr():
    zero = Schedule.linear().zero_terminal_snr()
    assert zero.alphas_bar[[0, 500, 998, 999]] == pytest.approx([0.9999, 0.0752462, 4.21326e-9, 0], rel=2e-6)
    assert Schedule.linear().alphas_bar[500] == pytest.approx(0.0777967, rel=1e-6)
    root = np.sqrt(Schedule.linear().alphas_bar)
    want = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(zero.signal, want, rtol=1e-9, atol=1e-15)
    assert zero.name == "linear"
    assert zero.zero_terminal_snr() is zero
    flow = Schedule.flow(5)
    assert flow.zero_terminal_snr() is flow
    with pytest.raises(ArgumentError, match="schedule: got T = 1"):
        Schedule.from_betas([0.999]).zero_terminal_snr()


def test_small_betas_survive_the_rescaling():
    """1 - abar_t / abar_{t-1} of the rescaled signal would be 0 for the second."""
    zero = Schedule.from_betas([1e-20, 3e-20, 0.9, 0.995]).zero_terminal_snr()
    last = math.sqrt(0.1 * 0.005)
    assert zero.betas[1] == pytest.approx(3e-20 / (1 - last), rel=1e-12)


def test_laplace_is_the_papers_log_snr():
    T, mean, scale = 40, 0.4, 1.3
    made = Schedule.laplace(T, mean=mean, scale=scale)
    for t in range(T - 1):
        u = (t + 1) / T
        want = mean - scale * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u)) * (u != 0.5)
        assert made.log_snr[t] == pytest.approx(want, abs=1e-9)
    assert made.name == "laplace"
    assert made.betas[-1] == 0.999
    for bad in ({"scale": 0}, {"scale": -1}, {"mean": math.nan}, {"T": 1}):
        with pytest.raises(ArgumentError, match=f"{next(iter(bad))}: got"):
            Schedule.laplace(**bad)


@pytest.mark.parametrize("bad", [{"mean": 50}, {"mean": -1e300}, {"scale": 1e-300}, {"scale": 1e300}])
def test_laplace_levels_that_fall_together(bad):
    with pytest.raises(ArgumentError, match=r"mean, scale: got .*, wants levels that float64 can tell apart"):
        Schedule.laplace(10, **bad)


@pytest.mark.parametrize("bad", [{"shift": 0}, {"shift": 1e3}, {"shift": math.nan}, {"T": 1}, {"T": 2.0}])
def test_bad_flows(bad):
    with pytest.raises(ArgumentError, match=f"{next(iter(bad))}: got"):
        Schedule.flow(**bad)


def test_the_doctor_knows_what_may_be_predicted(schedule):
    said = " ".join(schedule.diagnose())
    assert "last step is noise alone" in said
    assert "does not end in noise" not in said


def test_predictions_are_solved_for_data_and_noise(schedule):
    signal, noise = schedule.signal, schedule.noise
    x0, eps = X[0, 0], X[1, 1]
    outputs = {"noise": eps, "x0": x0, "v": signal * eps - noise * x0, "velocity": eps - x0}
    for prediction, out in outputs.items():
        at = slice(schedule.T - (prediction == "noise"))
        levels, x, out = (signal[at], noise[at]), (signal * x0 + noise * eps)[at], (0 * signal + out)[at]
        of_noise, of_data = target(prediction, *levels)
        np.testing.assert_allclose(of_noise * eps + of_data * x0, out, rtol=1e-12, atol=1e-14)
        p, q = x0_from_output(*levels, prediction)
        np.testing.assert_allclose(p * x + q * out, x0, rtol=1e-9)
        f, g = noise_from_output(*levels, prediction)
        np.testing.assert_allclose(f * x + g * out, eps, rtol=1e-9)


# -- copies and files --------------------------------------------------------------------------------------


def test_copies_and_equality(schedule):
    for other in (pickle.loads(pickle.dumps(schedule)), Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
        for name in ("betas", "alphas", "alphas_bar", "signal", "noise", "power", "posterior_variance", "log_snr"):
            assert getattr(other, name).tobytes() == getattr(schedule, name).tobytes()
    others = [s for s in SCHEDULES.values() if s is not schedule]
    assert schedule not in others
    assert len({schedule, *others}) == len(SCHEDULES)
    assert Schedule.from_betas(Schedule.flow(9).betas) != Schedule.flow(9)
    assert repr(Schedule.flow(10, shift=3)) == "<Schedule flow: T=10, signal 0.75 .. 0, noise 0.25 .. 1>"


@pytest.mark.parametrize(
    "stored",
    [
        {"name": "flow", "kind": "flow", "signal": [0.5, 0.0]},
        {"name": "flow", "kind": "river", "signal": [0.5, 0.0], "noise": [0.5, 1.0]},
        {"name": "flow", "kind": "flow", "signal": [0.5, 0.0], "noise": [0.5]},
        {"name": "flow", "kind": "flow", "signal": [0.5, 0.5], "noise": [0.5, 0.5]},
        {"name": "flow", "kind": "flow", "signal": [0.5, -0.1], "noise": [0.5, 1.1]},
        {"name": "flow", "kind": "flow", "signal": [0.6, 0.0], "noise": [0.5, 1.0]},
        {"name": "flow", "kind": "flow", "signal": [1.0, 0.0], "noise": [0.0, 1.0]},
        {"name": "flow", "kind": "flow", "signal": [], "noise": []},
        {"name": "flow", "kind": "flow", "signal": [math.nan], "noise": [1.0]},
        {"name": "linear", "betas": [1.0, 0.5]},
        {"name": "linear", "betas": [1.0]},
    ],
)
def test_files_with_no_schedule_of_ours(stored):
    with pytest.raises(ArgumentError, match=r"(stored|schedule|betas|signal|noise|kind).*: got"):
        Schedule.from_dict(stored)


def test_a_flow_is_a_feature_under_any_name():
    assert Schedule(signal=[0.5, 0.0], noise=[0.5, 1.0]).features == ["flow schedule"]
    assert Schedule([0.1, 0.2], "flow").features == []


def trained(schedule: Schedule, prediction: str | None = None, **options) -> fd.Diffusion:
    net = fd.MLP(3, hidden=(8,), T=schedule.T)
    model = fd.Diffusion(net, schedule, prediction=prediction, seed=3, **options)
    return model.fit(POINTS, steps=4, batch=8, progress=False, judge=False, validation=0)


@pytest.mark.parametrize(("name", "feature"), [("flow", "flow schedule"), ("zero cosine", "zero terminal snr")])
def test_models_are_saved_and_loaded(name, feature, tmp_path, monkeypatch):
    model = trained(SCHEDULES[name], backend="cpu")
    assert model.prediction == ("velocity" if name == "flow" else "v")
    model.save(tmp_path / "m.safetensors")
    features = checkpoint.describe(tmp_path / "m.safetensors")["features"]
    assert features == [feature, *(["velocity"] if name == "flow" else [])]
    again = fd.load(tmp_path / "m.safetensors", backend="cpu")
    assert again.schedule == model.schedule
    assert again.prediction == model.prediction
    assert_same_bits(again.sample(5), model.sample(5))
    for one in (model, again):
        one.fit(POINTS, steps=3, batch=8, progress=False, judge=False)
    assert_same_bits(again.net.flat, model.net.flat)
    monkeypatch.setattr(checkpoint, "FEATURES", checkpoint.FEATURES - {feature})
    with pytest.raises(CheckpointError, match=f"needs the feature.*'{feature}'"):
        fd.load(tmp_path / "m.safetensors")


def test_a_table_of_another_machine_is_accepted():
    """Equal formulas may differ in the last bits of float64, which no network sees."""
    schedule = Schedule.cosine(20)
    model = trained(schedule, backend="cpu")
    near = Schedule.from_betas(schedule.betas * (1 + 2e-15))
    assert near != schedule
    assert near.difference(schedule) is None
    want = model.sample(3, sampler=samplers.ddim(schedule, 5, prediction="v"))
    assert_close(model.sample(3, sampler=samplers.ddim(near, 5, prediction="v")), want)
    far = Schedule.from_betas(np.append(schedule.betas[:-3], [0.5, 0.6, 0.999]))
    with pytest.raises(ArgumentError, match=r"sampler: got .*: signal [\d.]+ against [\d.]+ at t = 17"):
        model.sample(3, sampler=samplers.ddim(far, 5, prediction="v"))
    with pytest.raises(ArgumentError, match="T = 21 against 20"):
        model.sample(3, sampler=samplers.ddim(Schedule.cosine(21), 5, prediction="v"))


# -- what the signal of 0 forbids --------------------------------------------------------------------------


def test_noise_says_nothing_where_there_is_no_signal(schedule):
    said = "prediction: got 'noise' for timesteps without signal, wants 'v'"
    for make in (samplers.ddpm, samplers.ddim, samplers.dpmpp_2m):
        with pytest.raises(ArgumentError, match=said):
            make(schedule, 5, prediction="noise")
        for prediction in WITH_X0:
            assert np.isfinite(np.array(make(schedule, 5, prediction=prediction).rows)).all()
    with pytest.raises(ArgumentError, match="prediction: got 'noise', wants 'v', 'velocity' or 'x0': at t = "):
        fd.Diffusion(schedule=schedule, prediction="noise")
    with pytest.warns(ScheduleWarning, match="begins at t"):
        samplers.ddim(schedule, 4, prediction="noise", spacing="leading")  # never there


def test_the_posterior_of_the_noise_where_there_is_no_signal(schedule):
    x_t = x0 = np.ones((1, 3))
    for t in (schedule.T - 1, [schedule.T - 1]):
        with pytest.raises(ArgumentError, match="noise: got the noise at t"):
            fd.posterior(x_t, t, schedule, noise=x0)
        assert np.isfinite(fd.posterior(x_t, t, schedule, x0=x0)[0]).all()
    assert np.isfinite(fd.posterior(x_t, schedule.T - 2, schedule, noise=x0)[0]).all()


# -- processes ---------------------------------------------------------------------------------------------


def test_jumps_and_steps_have_one_law(schedule, any_backend):
    x0 = np.full((4000, 1), 1.5, np.float32)
    chain = fd.forward_chain(x0, schedule, backend=any_backend)
    for t in (0, schedule.T // 2, schedule.T - 1):
        signal, noise = schedule.signal[t], schedule.noise[t]
        x, eps = fd.forward_noise(x0, t, schedule, backend=any_backend)
        assert_close(x, signal * x0.astype(np.float64) + noise * eps)
        assert chain[t + 1].mean() == pytest.approx(1.5 * signal, abs=5 * noise / math.sqrt(4000))
        assert chain[t + 1].std() == pytest.approx(noise, rel=0.06)
    covariances = list(fd.covariance.propagate_chain(COV, schedule))
    for t in range(schedule.T):
        want = schedule.signal[t] ** 2 * COV + schedule.noise[t] ** 2 * np.eye(3)
        np.testing.assert_allclose(fd.covariance.propagate(COV, schedule, t), want, rtol=1e-12)
        np.testing.assert_allclose(covariances[t + 1], want, rtol=1e-9)


def test_the_posterior_is_bayes_rule(schedule):
    """The product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), completed to a square."""
    x_t, x0 = X, X[::-1] * 0.5
    for t in range(1, schedule.T):
        alpha, beta, before = schedule.alphas[t], schedule.betas[t], schedule.noise[t - 1] ** 2
        precision = alpha / beta + 1 / before
        want = (math.sqrt(alpha) / beta * x_t + schedule.signal[t - 1] / before * x0) / precision
        mean, var = fd.posterior(x_t, t, schedule, x0=x0)
        np.testing.assert_allclose(mean, want, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(var, np.full((5, 1), 1 / precision), rtol=1e-9)
        if schedule.signal[t] > 0:
            noise = (x_t - schedule.signal[t] * x0) / schedule.noise[t]
            np.testing.assert_allclose(fd.posterior(x_t, t, schedule, noise=noise)[0], mean, rtol=1e-7, atol=1e-9)


def test_ancestral_rows_are_the_posterior(schedule):
    """Of all timesteps, and of some: there alpha_t is the quotient over the gap."""
    T = schedule.T
    rows = samplers.ddpm(schedule, prediction="x0").rows
    for t, row in zip(reversed(range(T)), rows, strict=True):
        mean, var = fd.posterior(X, t, schedule, x0=X[::-1].copy())
        np.testing.assert_allclose(row.a * X + row.b * X[::-1], mean, rtol=1e-9, atol=1e-12)
        assert row.s**2 == pytest.approx(float(var[0, 0]), rel=1e-9)
    large = samplers.ddpm(schedule, prediction="x0", variance="large").rows
    np.testing.assert_allclose([row.s**2 for row in large[:-1]], schedule.betas[:0:-1], rtol=1e-9)


# -- exact models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "low rank", "mixture", "data"])
def test_predictions_are_conditional_expectations(kind, schedule):
    """The noise is -noise_t times the gradient of the density; the others follow, at signal 0 from E x0 = the mean."""
    for t in (schedule.T - 1, schedule.T // 2, schedule.T // 3):
        signal, noise = schedule.signal[t], schedule.noise[t]
        denoiser = exact(kind, schedule, "noise")
        score = denoiser.predict(X, t)
        x = X.copy()
        assert_gradient(lambda x=x, t=t, law=denoiser: law.log_density(x, t).sum(), x, -score / noise)
        x0 = (X - noise * score) / signal if signal > 0 else np.broadcast_to(denoiser.data.mean, X.shape)
        np.testing.assert_allclose(denoiser.mean_x0(X, t), x0, rtol=0, atol=1e-10)
        for prediction in PREDICTIONS:
            of_noise, of_data = target(prediction, signal, noise)
            got = exact(kind, schedule, prediction).predict(X, t)
            np.testing.assert_allclose(got, of_noise * score + of_data * x0, rtol=0, atol=1e-10)


def test_the_state_has_the_density_of_its_moments(schedule):
    denoiser = exact("gaussian", schedule)
    for t in (0, schedule.T // 2, schedule.T - 1):
        cov = schedule.signal[t] ** 2 * COV + schedule.noise[t] ** 2 * np.eye(3)
        np.testing.assert_allclose(denoiser.moments(t).cov, cov, rtol=0, atol=1e-12)
        want = scipy.stats.multivariate_normal(schedule.signal[t] * MEAN, cov).logpdf(X)
        np.testing.assert_allclose(denoiser.log_density(X, t), want, rtol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "low rank", "mixture", "data"])
def test_exact_models_on_every_backend(kind, any_backend, schedule):
    x = X.astype(np.float32)
    for prediction in ("v", "velocity"):
        denoiser = exact(kind, schedule, prediction)
        for t in (schedule.T // 2, schedule.T - 1, np.array([schedule.T - 1, 9, 12, schedule.T - 2, 9])):
            want = denoiser.predict(x.astype(np.float64), t, backend="numpy")
            assert_close(denoiser.predict(x, t, backend=any_backend), want, terms=200)


@pytest.mark.parametrize("steps", [2, 3])
def test_few_steps_from_noise_alone_and_to_none(steps, schedule):
    """Both are infinitely long in log(signal / noise), and may be neighbours; a perfect guess is kept."""
    for name in samplers.names():
        if name == "consistency":  # it keeps a little of x
            continue
        options = {"timestep_scaling": np.inf} if name == "lcm" else {}  # so does this one
        table = samplers.named(name, schedule, steps, prediction="x0", spacing="trailing", **options)
        x = fd.sample(lambda x, t: np.full_like(x, 0.7), table, n=2, shape=3, backend="numpy")
        np.testing.assert_allclose(x, 0.7, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("prediction", WITH_X0)
def test_every_sampler_draws_the_gaussian(prediction, schedule):
    """With all rows the exact chain ends near the data's law, and follows the state on its way."""
    gaussian = exact("gaussian", schedule, prediction)
    for make in (samplers.ddpm, samplers.ddim, samplers.dpmpp_2m):
        steps = schedule.T - 1 if make is samplers.dpmpp_2m else schedule.T
        table = make(schedule, steps, prediction=prediction)
        chain = exact_chain(gaussian, table)
        assert chain.w2() < 0.2
        for row, moments in zip(table.rows, chain.trace, strict=False):
            assert moments.w2(gaussian.moments(row.t)) < 0.2


# -- flows -------------------------------------------------------------------------------------------------


def euler(flow: Schedule, steps: int) -> Sampler:
    """Euler's method for dx / du = velocity, row by row."""
    t = flow.timesteps(steps)
    u = [*flow.noise[t].tolist(), 0.0]
    rows = [(t[i], 0, 0, 1, 0, 0, u[i + 1] - u[i], 0) for i in range(steps)]
    return Sampler(rows, flow, prediction="velocity", name="euler")


@pytest.mark.parametrize(
    ("shift", "golden"),
    [(1.0, (0.1363314, 0.1855737, 0.2356100)), (3.0, (0.0665637, 0.1366722, 0.2223946))],
)
def test_golden_flow_euler(shift, golden):
    """The variance of samples of N(0, 0.25), by a table of our own and by ddim's, which is the same method."""
    flow = Schedule.flow(1000, shift=shift)
    gaussian = Gaussian([0.0], [[0.25]], flow, prediction="velocity")
    for steps, want in zip((5, 10, 50), golden, strict=True):
        assert exact_chain(gaussian, euler(flow, steps)).cov[0, 0] == pytest.approx(want, abs=6e-8)
        ddim = samplers.ddim(flow, steps, prediction="velocity")
        assert exact_chain(gaussian, ddim).cov[0, 0] == pytest.approx(want, abs=6e-8)


def test_a_flow_is_learned(any_backend):
    """Targets are noise - x0: the loss of a network that says 0 is their power, 1 + the data's."""
    flow = SCHEDULES["flow"]
    net = fd.MLP(3, hidden=(8,), T=flow.T)
    net.flat[:] = 0
    model = fd.Diffusion(net, flow, base=None, backend=any_backend)
    model.fit(POINTS, steps=1, batch=2000, progress=False, judge=False, validation=0)
    assert model.history["loss"][0] == pytest.approx(2.0, rel=0.05)


def test_a_base_of_a_flow_is_the_gaussian():
    rows = np.random.default_rng(5).multivariate_normal(MEAN, COV, size=300)
    for prediction in WITH_X0:
        model = fd.Diffusion(schedule=SCHEDULES["flow"], prediction=prediction, base="gaussian", backend="numpy")
        model.fit(rows, steps=0, progress=False, judge=False)
        base = model._gaussian
        cov = base.axes @ np.diag(base.variances) @ base.axes.T
        want = Gaussian(np.zeros(3), cov, model.schedule, prediction=prediction)
        for t in (0, 20, 39):
            assert_close(model.denoiser().predict(X.astype(np.float32), t), want.predict(X, t), terms=40)
