"""Sampler tables: golden numbers, the papers' formulas written as loops, the rules of a table, and bad input.

`run` executes a table in plain NumPy, one term at a time. It is the table law as a test sees it.
"""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff import samplers
from fastdiff.errors import ArgumentError, ScheduleWarning
from fastdiff.samplers import Sampler
from fastdiff.schedule import SPACINGS, Schedule

LINEAR = Schedule.linear()


def run(table, model, x, noise=None):
    """Every state of the chain, the start first; noise maps a timestep to z."""
    states, memory = [x], (None, None, None)
    for t, p, q, a, b, c1, c2, c3, e, s, _, _ in table.rows:
        out = model(x, t) if q != 0 or e != 0 else 0
        m = p * x + q * out
        if table.clip is not None:
            m = np.clip(m, *table.clip)
        following = np.zeros_like(x)
        for factor, term in ((a, x), (b, m), *zip((c1, c2, c3), memory, strict=True), (e, out)):
            if factor != 0:
                following = following + factor * term
        if s != 0:
            following = following + s * noise(t)
        x, memory = following, (m, *memory[:2]) if q != 0 or e != 0 else memory
        states.append(x)
    return np.array(states)


def normal(seed):
    """z of a timestep: fixed, independent between timesteps."""
    return lambda t: np.random.default_rng((seed, t)).normal(size=(3, 5))


START = np.random.default_rng(5).normal(size=(3, 5))


def smooth_x0(x, t):
    """Some network that predicts x0, bounded as data is."""
    return np.tanh(0.7 * x + 0.1 * np.roll(x, 1, axis=1) + 1e-3 * t)


def as_prediction(schedule, prediction):
    """The same network, in the form named."""

    def model(x, t):
        alpha, sigma = schedule.signal[t], schedule.noise[t]
        x0 = smooth_x0(x, t)
        noise = (x - alpha * x0) / sigma
        forms = {"x0": x0, "noise": noise, "v": alpha * noise - sigma * x0, "velocity": noise - x0}
        return forms[prediction]

    return model


# -- golden numbers ----------------------------------------------------------------------------------------


def golden_run(table):
    x = (np.arange(768) / 768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2)
    return np.abs(run(table, lambda x, t: x * t / (t + 1), x)[-1])


def test_golden_ddim():
    result = golden_run(samplers.ddim(LINEAR, 10, clip=1.0, spacing="leading"))
    assert result.sum() == pytest.approx(172.0067, abs=1e-3)
    assert result.mean() == pytest.approx(0.223967, abs=1e-6)


def test_golden_ddim_of_another_schedule():
    schedule = Schedule.linear(beta_start=0.01)
    result = golden_run(samplers.ddim(schedule, 10, clip=1.0, spacing="leading"))
    assert result.sum() == pytest.approx(149.8295, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "noise", "v"),
    [
        ("euler", {}, 169.46404, 48.703573),
        ("heun", {}, 241.82017, None),
        ("lms", {"order": 2}, 185.3172, 71.289425),
        ("lms", {"order": 4}, None, 77.777637),
        ("dpmpp_2m", {}, 260.8123, 189.31647),
        ("dpmpp_3m", {"published": True, "lower_order_final": 1}, 202.63617, None),
        ("dpmpp_3m", {"published": True}, 269.94794, 192.34634),
        ("dpmpp_3m", {"lower_order_final": 1}, 132.05641, None),
        ("unipc", {}, 264.61156, 192.75071),
        ("unipc", {"order": 3}, 269.48586, None),
        ("deis", {}, 203.97167, 96.216584),
        ("deis", {"order": 3, "lower_order_final": 1}, 209.19107, None),
    ],
)
def test_golden_sums(name, options, noise, v):
    """Ten rows at t = 999, 888 .. 0, to no noise: to the digits that are known."""
    for prediction, expected in (("noise", noise), ("v", v)):
        if expected is not None:
            table = getattr(samplers, name)(LINEAR, 10, spacing="linspace", prediction=prediction, **options)
            digits = 4 if expected == 185.3172 else 8
            assert golden_run(table).sum() == pytest.approx(expected, rel=0.6 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("name", "options", "noise", "v"),
    [
        ("dpmpp_2m", {}, 0.3301, 0.2251),
        ("deis", {"lower_order_final": 2}, 0.23916, 0.091),
        ("unipc", {"lower_order_final": 2}, 0.2464, 0.1014),
    ],
)
def test_golden_means(name, options, noise, v):
    """Ten rows, evenly from t = 999, to the noise of t = 0."""
    for prediction, expected in (("noise", noise), ("v", v)):
        table = getattr(samplers, name)(LINEAR, 10, final="sigma_min", prediction=prediction, **options)
        assert golden_run(table).mean() == pytest.approx(expected, abs=1e-4 if expected == 0.091 else 5e-5)


def karras_levels(low, high, n):
    """n levels of noise / signal in Karras spacing, the least first, and the schedule of them."""
    ratio = np.linspace(low ** (1 / 7), high ** (1 / 7), n) ** 7
    abar = 1 / (1 + ratio**2)
    return ratio, Schedule(1 - abar / np.append(1.0, abar[:-1]))


@pytest.mark.parametrize(
    ("name", "options", "prediction", "expected"),
    [
        ("dpmpp_2m", {}, "v", 0.2092),
        ("unipc", {"lower_order_final": 1}, "noise", 0.2925),
        ("unipc", {"lower_order_final": 1}, "v", 0.1962),
    ],
)
def test_golden_means_of_karras_levels(name, options, prediction, expected):
    """Ten levels given exactly, and the timesteps that they stand for; the last row stays at the last of them."""
    ratio = LINEAR.noise / LINEAR.signal
    levels, schedule = karras_levels(*ratio[[0, -1]], 10)
    stands_for = np.rint(np.interp(np.log(levels), np.log(ratio), np.arange(LINEAR.T)))
    for spacing in ("linspace", "karras"):
        table = getattr(samplers, name)(
            schedule, 10, final="sigma_min", prediction=prediction, spacing=spacing, **options
        )
        assert table.timesteps.tolist() == [*range(9, -1, -1)]
    x = (np.arange(768) / 768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2)
    found = run(table, lambda x, t: x * stands_for[t] / (stands_for[t] + 1), x)[-1]
    assert np.abs(found).mean() == pytest.approx(expected, abs=1e-4)


def test_golden_edm_euler():
    """Ten levels from 80 to 0.002, data of deviation 1/2; a network that is told log(sigma) / 4."""
    ratio, schedule = karras_levels(0.002 / 0.5, 80 / 0.5, 10)
    told = np.log(0.5 * ratio) / 4
    x = (np.arange(768) / 768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) * math.hypot(80, 1)
    table = samplers.euler(schedule, 10, prediction="v", spacing="linspace")
    found = 0.5 * run(table, lambda x, t: -x * told[t] / (told[t] + 1), x / math.hypot(80, 0.5))[-1]
    assert np.abs(found).sum() == pytest.approx(34.1855, abs=1e-3)


GOLDEN_ROW = dict(zip("pqab", (17.27595, -17.24698), strict=False))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dpmpp_2m", {"eta": 1}, {**GOLDEN_ROW, "a": 0.1920268, "b": 0.3653803, "c1": -0.097575, "s": 0.9409849}),
        ("unipc", {}, {**GOLDEN_ROW, "a": 0.961927, "b": 0.3293678, "c1": -0.1061274}),
        ("heun", {}, {**GOLDEN_ROW, "a": 1, "b": 0.2352014, "c1": -0.2352014}),
        ("deis", {}, {"p": 0, "q": 1, "a": 4.818617, "b": -4.891679, "c1": 1.041455}),
    ],
)
def test_golden_rows(name, options, expected):
    """The second row at t = 999, 749, 500, 250."""
    table = getattr(samplers, name)(LINEAR, 4, spacing="linspace_open", **options)
    row = table.rows[1]
    assert row.t == 749
    for column, value in {**dict.fromkeys(("c2", "c3", "e", "s", "r"), 0.0), **expected}.items():
        assert getattr(row, column) == pytest.approx(value, rel=5e-7), column
    if name == "unipc":
        assert table.rows[2].c2 == pytest.approx(0.05069671, rel=1e-7)


# -- the papers' formulas, as loops ------------------------------------------------------------------------


def levels(schedule, timesteps):
    """(t, abar, abar of the next, last?) along the timesteps, in more digits: the formulas take 1 - abar."""
    abar = np.cumprod(1 - schedule.betas.astype(np.longdouble))
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        yield t, abar[t], np.longdouble(1) if last else abar[timesteps[i + 1]], last


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_algorithm_2(variance):
    """Ho et al. 2020, algorithm 2: from the noise, with the table's own betas, over all T steps."""
    schedule = Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    model, noise = as_prediction(schedule, "noise"), normal(1)
    x, expected = START, [START]
    for t in reversed(range(schedule.T)):
        beta, abar = schedule.betas[t], schedule.alphas_bar[t]
        x = (x - beta / math.sqrt(1 - abar) * model(x, t)) / math.sqrt(1 - beta)
        if t > 0:
            spread = beta if variance == "large" else schedule.posterior_variance[t]
            x = x + math.sqrt(spread) * noise(t)
        expected.append(x)
    table = samplers.ddpm(schedule, variance=variance)
    np.testing.assert_allclose(run(table, model, START, noise), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "spacing", [spacing for spacing in SPACINGS if spacing != "beta"]
)  # that one begins with tiny gaps
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_with_skipped_steps_clips_before_the_mean(variance, spacing):
    table = samplers.ddpm(LINEAR, 23, variance=variance, clip=0.5, prediction="x0", spacing=spacing)
    noise = normal(2)
    x, expected = START, [START]
    for t, abar, before, last in levels(LINEAR, LINEAR.timesteps(23, spacing=spacing)):
        beta = 1 - abar / before
        x0 = np.clip(smooth_x0(x, t), -0.5, 0.5)
        kept = math.sqrt(1 - beta) * (1 - before) / (1 - abar) * x
        x = math.sqrt(before) * beta / (1 - abar) * x0 + kept
        if not last:
            x = x + math.sqrt(beta * ((1 - before) / (1 - abar) if variance == "small" else 1)) * noise(t)
        expected.append(x)
    np.testing.assert_allclose(run(table, smooth_x0, START, noise), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_equation_12(spacing, eta, clip):
    table = samplers.ddim(LINEAR, 17, eta=eta, clip=clip, spacing=spacing)
    model, noise = as_prediction(LINEAR, "noise"), normal(3)
    x, expected = START, [START]
    for t, abar, before, last in levels(LINEAR, LINEAR.timesteps(17, spacing=spacing)):
        out = model(x, t)
        x0 = (x - math.sqrt(1 - abar) * out) / math.sqrt(abar)
        if clip is not None:
            x0 = np.clip(x0, -clip, clip)
        sigma = eta * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
        x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * out  # the raw noise, clipped or not
        if not last:
            x = x + sigma * noise(t)
        expected.append(x)
    np.testing.assert_allclose(run(table, model, START, noise), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpmpp_2m_is_algorithm_2(final):
    """Lu et al. 2022 (arXiv 2211.01095), algorithm 2, with its multistep difference written out."""
    table = samplers.dpmpp_2m(LINEAR, 12, clip=0.6, prediction="x0", final=final)
    timesteps = LINEAR.timesteps(12, spacing="linspace_open")
    alpha = [math.sqrt(LINEAR.alphas_bar[t]) for t in timesteps] + [math.sqrt(LINEAR.alphas_bar[0])]
    sigma = [math.sqrt(1 - LINEAR.alphas_bar[t]) for t in timesteps] + [math.sqrt(1 - LINEAR.alphas_bar[0])]
    if final == "zero":
        alpha[-1], sigma[-1] = 1.0, 0.0
    half_log_snr = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma, strict=True)]
    x, previous, expected = START, None, [START]
    for i, t in enumerate(timesteps):
        x0 = np.clip(smooth_x0(x, t), -0.6, 0.6)
        h = half_log_snr[i + 1] - half_log_snr[i]
        d = x0
        if i > 0 and h < math.inf:
            d = x0 + (x0 - previous) / (2 * (half_log_snr[i] - half_log_snr[i - 1]) / h)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (math.exp(-h) - 1) * d
        previous = x0
        expected.append(x)
    np.testing.assert_allclose(run(table, smooth_x0, START), expected, rtol=0, atol=1e-11)
    assert (table.rows[-1].c1 == 0) is (final == "zero")


# -- relations between the tables --------------------------------------------------------------------------

MAKERS = {
    "euler_ancestral": lambda s, **options: samplers.euler_ancestral(s, 30, **options),
    "euler churn": lambda s, **options: samplers.euler(s, 30, churn=9, s_tmin=0.05, **options),
    "ddim reclip": lambda s, **options: samplers.ddim(s, 30, eta=0.3, reclip=True, **options),
    "heun": lambda s, **options: samplers.heun(s, 12, **options),
    "heun churn": lambda s, **options: samplers.heun(s, 12, churn=6, s_tmin=0.05, **options),
    "dpm2": lambda s, **options: samplers.dpm2(s, 30, **options),
    "dpmpp_2s": lambda s, **options: samplers.dpmpp_2s(s, 30, **options),
    "dpmpp_2m sde": lambda s, **options: samplers.dpmpp_2m(s, 30, eta=1.0, solver="heun", **options),
    "dpmpp_3m": lambda s, **options: samplers.dpmpp_3m(s, 30, **options),
    "dpmpp_3m published": lambda s, **options: samplers.dpmpp_3m(s, 30, eta=0.5, published=True, **options),
    "unipc1": lambda s, **options: samplers.unipc(s, 30, order=1, variant="bh1", **options),
    "unipc2": lambda s, **options: samplers.unipc(s, 30, **options),
    "unipc uncorrected": lambda s, **options: samplers.unipc(s, 30, uncorrected=(0, 1, 5), **options),
    "dpm2 published": lambda s, **options: samplers.dpm2(s, 30, published=True, **options),
    "unipc3": lambda s, **options: samplers.unipc(s, 30, order=3, **options),
    "deis2": lambda s, **options: samplers.deis(s, 30, **options),
    "deis3": lambda s, **options: samplers.deis(s, 30, order=3, **options),
    "lms": lambda s, **options: samplers.lms(s, 30, **options),
    "pndm": lambda s, **options: samplers.pndm(s, 30, **options),
    "ipndm": lambda s, **options: samplers.ipndm(s, 30, **options),
    "dpmsolver": lambda s, **options: samplers.dpmsolver(s, 30, order=3, **options),
    "dpmsolver sde": lambda s, **options: samplers.dpmsolver(s, 30, eta=1.0, **options),
    "unipc noise": lambda s, **options: samplers.unipc(s, 30, order=3, predict_x0=False, **options),
    "single3": lambda s, **options: samplers.dpmsolver_single(s, 30, order=3, **options),
    "single3 noise": lambda s, **options: samplers.dpmsolver_single(s, 30, order=3, predict_x0=False, **options),
    "single sde": lambda s, **options: samplers.dpmsolver_single(s, 30, eta=1.0, **options),
    "sa_solver": lambda s, **options: samplers.sa_solver(s, 30, predictor=3, corrector=4, **options),
    "sa_solver noise": lambda s, **options: samplers.sa_solver(s, 30, predict_x0=False, **options),
    "dpmpp_sde": lambda s, **options: samplers.dpmpp_sde(s, 30, **options),
    "dpm2_ancestral": lambda s, **options: samplers.dpm2_ancestral(s, 30, **options),
    "lcm": lambda s, **options: samplers.lcm(s, 30, timestep_scaling=0.01, **options),
    "consistency": lambda s, **options: samplers.consistency(s, 30, **options),
    "tcd": lambda s, **options: samplers.tcd(s, 30, **options),
    "ddpm": lambda s, **options: samplers.ddpm(s, 30, **options),
    "ddpm large": lambda s, **options: samplers.ddpm(s, 30, variance="large", **options),
    "ddim": lambda s, **options: samplers.ddim(s, 30, **options),
    "ddim eta": lambda s, **options: samplers.ddim(s, 30, eta=0.5, **options),
    "dpmpp_2m": lambda s, **options: samplers.dpmpp_2m(s, 30, **options),
    "dpmpp_2m sigma_min": lambda s, **options: samplers.dpmpp_2m(s, 30, final="sigma_min", **options),
}


STOCHASTIC = ("ddpm", "ddpm large", "ddim eta", "ddim reclip", "euler_ancestral", "dpmpp_2m sde", "dpmpp_3m published")
STOCHASTIC += (
    "dpmsolver sde",
    "single sde",
    "sa_solver",
    "sa_solver noise",
    "dpmpp_sde",
    "dpm2_ancestral",
    "lcm",
    "consistency",
    "tcd",
)
UNCLIPPED = (
    "deis2",
    "deis3",
    "lms",
    "pndm",
    "ipndm",
    "dpmsolver",
    "dpmsolver sde",
    "unipc noise",
    "single3 noise",
    "single sde",
    "sa_solver noise",
    "dpmpp_sde",
)  # fmt: skip - they remember the noise, or a mixture
TWO_STAGES = ("heun", "heun churn", "dpm2", "dpm2 published", "dpmpp_2s", "dpm2_ancestral", "dpmpp_sde")


@pytest.mark.parametrize(
    ("maker", "clip"),
    [(maker, clip) for maker in MAKERS for clip in (None, (-0.4, 0.6)) if clip is None or maker not in UNCLIPPED],
)
def test_all_predictions_give_one_trajectory(maker, clip):
    paths = []
    for prediction in samplers.PREDICTIONS:
        table = MAKERS[maker](LINEAR, prediction=prediction, clip=clip)
        assert table.prediction == prediction
        paths.append(run(table, as_prediction(LINEAR, prediction), START, normal(4)))
    for path in paths[1:]:
        np.testing.assert_allclose(path, paths[0], rtol=0, atol=1e-10 * max(1, np.abs(paths[0]).max()))


@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 12])
def test_pndm_is_a_loop(steps, prediction):
    """With the noise of every evaluation kept: what the table reads back from the state is what the loop remembers."""
    for schedule in (LINEAR, LINEAR.zero_terminal_snr()) if prediction == "v" else (LINEAR,):
        model, t = as_prediction(schedule, prediction), schedule.timesteps(steps)
        with np.errstate(divide="ignore"):
            ratio = np.append(schedule.noise[t] / schedule.signal[t], 0.0)
        alpha = np.append(schedule.signal[t], 1.0)
        pure = int(np.isinf(ratio[0]))

        def noise_of(x, t, model=model, schedule=schedule):
            out, signal, sigma = model(x, t), schedule.signal[t], schedule.noise[t]
            return out if prediction == "noise" else sigma * x + signal * out

        x, kept = START, []
        for i in range(steps):
            if i < pure:
                x = alpha[1] * -model(x, t[0]) + ratio[1] * alpha[1] * noise_of(x, t[0])
                continue
            kept = [noise_of(x, t[i]), *kept]
            if i == pure + 1:  # Heun's method, and the second timestep anew
                step = ratio[i] - ratio[i - 1]
                x = alpha[i] * (before + step * (kept[0] + kept[1]) / 2)  # noqa: F821 - of the round before
                kept[0] = noise_of(x, t[i])
            w = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12]}.get(len(kept), [55, -59, 37, -9])
            w = np.array(w) / (24 if len(kept) > 3 else 1)
            before = x / alpha[i]
            x = alpha[i + 1] * (before + (ratio[i + 1] - ratio[i]) * sum(a * b for a, b in zip(w, kept, strict=False)))
        table = samplers.pndm(schedule, steps, prediction=prediction)
        assert table.evaluations == steps + (steps > 1 + pure)
        found = run(table, model, START)[-1]
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-9 * max(1, np.abs(x).max()))


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("maker", [maker for maker in MAKERS if maker not in ("dpmpp_2m sigma_min", "lcm")])
def test_a_last_row_of_no_length_stays(maker, spacing):
    """To the noise of t = 0 from timesteps that end there: all that such a row can do is to correct."""
    table = MAKERS[maker](LINEAR, spacing=spacing, final="sigma_min", prediction="v")
    assert table.rows[-1].t == 0
    states = run(table, as_prediction(LINEAR, "v"), START, normal(8))
    corrects = maker.startswith(("unipc", "sa_solver", "single"))  # the last ones begin from a state before
    assert np.allclose(states[-1], states[-2], rtol=0, atol=1e-12) != corrects


@pytest.mark.parametrize("steps", [1000, 37])
@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
def test_ddim_with_eta_1_is_ddpm(prediction, steps):
    model, noise = as_prediction(LINEAR, prediction), normal(6)
    ddpm = run(samplers.ddpm(LINEAR, steps, prediction=prediction), model, START, noise)
    ddim = run(samplers.ddim(LINEAR, steps, eta=1.0, prediction=prediction), model, START, noise)
    np.testing.assert_allclose(ddim, ddpm, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("maker", "spacing"),
    [
        (maker, spacing)
        for maker in MAKERS
        if maker not in (*TWO_STAGES, "pndm", "tcd", "euler churn")
        for spacing in SPACINGS
    ],
)
def test_the_last_row_adds_no_noise_and_the_others_as_they_should(maker, spacing):
    table = MAKERS[maker](LINEAR, spacing=spacing)
    s = [row.s for row in table.rows]
    assert s[-1] == 0
    noisy = [maker in STOCHASTIC and (not maker.startswith("sa_") or 200 <= row.t <= 800) for row in table.rows]
    if maker == "consistency":  # whose last jump is to the noise of t = 0
        noisy = [later.t > 0 for later in table.rows[1:]] + [False]
    assert [value > 0 for value in s[:-1]] == noisy[:-1]
    assert table.timesteps.tolist() == LINEAR.timesteps(30, spacing=spacing).tolist()
    if maker not in ("dpmpp_2m sigma_min", "lcm", "consistency", *UNCLIPPED):  # what comes out is x0 itself
        assert table.rows[-1][3:] == (0, 1, 0, 0, 0, 0, 0, 0, 0)


def test_heun_of_the_velocity():
    """x' = x + step (slope + slope') / 2 of straight paths, for every prediction; nothing but that."""
    schedule = Schedule.flow(50, shift=2.0)
    slope = as_prediction(schedule, "velocity")
    x, t = START, schedule.timesteps(10)
    for first, last in pairwise(t):
        step = schedule.noise[last] - schedule.noise[first]
        half = slope(x, first)
        x = x + step / 2 * (half + slope(x + step * half, last))
    x = x - schedule.noise[t[-1]] * slope(x, t[-1])
    for prediction in ("velocity", "x0", "v"):
        table = samplers.heun(schedule, 10, velocity=True, spacing="trailing", prediction=prediction)
        assert table.evaluations == 19
        found = run(table, as_prediction(schedule, prediction), START)[-1]
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-11)
    for wrong, words in (
        ({"churn": 3}, "churn: got 3 with velocity=True"),
        ({"clip": 1}, "clip: got 1 with"),
        ({"velocity": 1}, "velocity: got 1, wants True or False"),
    ):
        with pytest.raises(ArgumentError, match=words):
            samplers.heun(schedule, 10, prediction="v", **{"velocity": True, **wrong})
    with pytest.raises(ArgumentError, match="velocity: got True, wants False for a schedule that is no flow"):
        samplers.heun(LINEAR, 10, velocity=True)


def test_zero_coefficients_are_plain_zeros():
    for maker, make in MAKERS.items():
        for prediction in samplers.PREDICTIONS:
            table = np.array(make(LINEAR, prediction=prediction).rows)
            assert np.isfinite(table).all()
            assert not np.signbit(table[table == 0]).any(), (maker, prediction)
    assert all(row.a == 0 and row.c1 == 0 for row in MAKERS["ddim"](LINEAR).rows)
    assert all(row.e == 0 for row in MAKERS["ddpm"](LINEAR).rows)
    assert all(row.p == 0 and row.q == 1 for row in MAKERS["ddpm"](LINEAR, prediction="x0").rows)


def test_the_small_variance_has_its_floor():
    schedule = Schedule.from_betas([1e-24, 1e-24, 0.995])
    assert samplers.ddpm(schedule).rows[1].s == 1e-10
    assert samplers.ddpm(schedule).rows[2].s == 0


@pytest.mark.filterwarnings("ignore::fastdiff.errors.ScheduleWarning")  # "leading" may start anywhere
@given(
    betas=st.lists(st.floats(1e-4, 0.95), min_size=2, max_size=40),
    steps=st.integers(1, 40),
    spacing=st.sampled_from(SPACINGS),
    prediction=st.sampled_from(samplers.PREDICTIONS),
)
@settings(max_examples=100, deadline=None)
def test_any_schedule_makes_finite_tables_that_keep_a_perfect_guess(betas, steps, spacing, prediction):
    """Where the network knows x0 and z, deterministic rows keep the state at signal x0 + noise z."""
    schedule = Schedule(np.array(betas))
    steps = min(steps, schedule.T - 1)
    x0, z = 0.7, -1.3
    try:
        schedule.timesteps(steps, spacing=spacing)
    except ArgumentError:
        assume(False)
    for name in samplers.names():
        options = {"tau": 0.0} if name == "sa_solver" else {"eta": 0.0} if name == "tcd" else {}
        table = getattr(samplers, name)(schedule, steps, spacing=spacing, prediction=prediction, **options)
        if name in ("ddpm", "lcm", "consistency") or any(row.s > 0 for row in table.rows):
            continue
        first = table.rows[0].t
        x = schedule.signal[first] * x0 + schedule.noise[first] * z

        def model(x, t):
            alpha, sigma = schedule.signal[t], schedule.noise[t]
            return {"x0": x0, "noise": z, "v": alpha * z - sigma * x0, "velocity": z - x0}[prediction]

        states = run(table, model, np.array(x))
        # x0 is read from a noise prediction through 1 / signal, and extrapolated over uneven steps
        slack = 1e-9 / schedule.signal[-1] * max(1, np.abs(np.array(table.rows)[:, 3:9]).max())
        for t, state in zip(table.timesteps, states, strict=False):
            assert abs(state - schedule.signal[t] * x0 - schedule.noise[t] * z) <= slack
        assert abs(states[-1] - x0) <= slack


# -- a table of one's own ----------------------------------------------------------------------------------

GOOD = [(3, 1, -1, 0.5, 0.5, 0, 0, 0.1), (1, 1, -1, 0.5, 0.5, 0.2, 0, 0), (1, 1, -1, 0, 1, 0, 0, 0)]
SHORT = Schedule.cosine(4)


def test_a_custom_table():
    table = Sampler(GOOD, SHORT, prediction="v", clip=2, name="mine", order=3)
    assert len(table) == 3
    assert [(*row[:6], row.e, row.s) for row in table.rows] == GOOD
    assert all(row.c2 == row.c3 == row.r == row.visit == 0 for row in table.rows)
    assert table.rows[0].t == 3
    assert isinstance(table.rows[0].t, int)
    assert table.rows[1].c1 == 0.2
    assert table.timesteps.tolist() == [3, 1, 1]
    assert table.timesteps.dtype == np.int64
    assert not table.timesteps.flags.writeable
    assert (table.prediction, table.clip, table.name, table.order) == ("v", (-2.0, 2.0), "mine", 3)
    assert table.schedule is SHORT
    assert Sampler(np.array(table.rows), SHORT, prediction="v", clip=(-2, 2)) == table
    assert Sampler(table.rows, SHORT, prediction="v", clip=[-2, 2]) == table
    plain = Sampler(GOOD, SHORT)
    assert (plain.prediction, plain.clip, plain.name, plain.order) == ("noise", None, "custom", None)
    assert plain != table
    assert plain != "custom"
    assert plain != Sampler(GOOD, SHORT, clip=2)
    assert plain != Sampler(GOOD, SHORT, prediction="v")
    assert plain != Sampler(GOOD, Schedule.cosine(5))
    assert plain != Sampler(GOOD[:2], SHORT)
    assert plain == Sampler(GOOD, SHORT, name="another", order=1)
    assert repr(table) == "<Sampler mine: 3 rows of T=4, v prediction, x0 clipped to [-2, 2]>"
    with pytest.raises(AttributeError):
        table.clip = None


def test_copies():
    for maker, make in MAKERS.items():
        table = make(LINEAR, clip=None if maker in UNCLIPPED else (-1, 2), prediction="v")
        for other in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
            assert other == table
            assert hash(other) == hash(table)
            assert (other.name, other.order) == (table.name, table.order)
            assert not other.timesteps.flags.writeable
            assert not other.schedule.betas.flags.writeable


def changed(row, column, value):
    rows = [list(r) for r in GOOD]
    rows[row]["tpqabces".index(column)] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"rows: got shape \(0,\)"),
        (np.zeros((0, 8)), r"rows: got shape \(0, 8\)"),
        (np.zeros(8), r"rows: got shape \(8,\)"),
        (np.zeros((2, 7)), r"rows: got shape \(2, 7\)"),
        ([(1, 2), (1, 2, 3)], "rows: got rows of different lengths"),
        (None, "rows: got dtype object"),
        ([("1",) * 8], "rows: got dtype <U1"),
        (changed(1, "b", math.nan), "rows: got nan"),
        (changed(1, "q", -math.inf), "rows: got -inf"),
        (changed(1, "t", 1.5), r"rows \(t\): got 1.5"),
        (changed(0, "t", 4), r"rows \(t\): got 4, wants whole timesteps of the schedule, 0 to 3"),
        (changed(2, "t", -1), r"rows \(t\): got -1"),
        (changed(0, "t", 1e300), r"rows \(t\): got 1e\+300"),
        (changed(2, "t", 2), r"rows \(t\): got 2 after 1 in row 2, which evaluates"),
        (changed(0, "c", 0.1), r"rows \(c1\): got c1 = 0.1 in row 0, before which 0 evaluate"),
        ([(3, 0, 1, 1, 1, 0, 0, 0, 0, 0), (2, 0, 1, 1, 1, 0, 0.5, 0, 0, 0)], r"rows \(c2\): got c2 = 0.5 in row 1"),
        (
            [(3, 0, 1, 1, 1, 0, 0, 0, 0, 0), (3, 0, 0, 1, 0, 0, 0, 0, 0, 0), (2, 0, 1, 1, 1, 0, 0.5, 0, 0, 0)],
            r"rows \(c2\): got c2 = 0.5 in row 2, before which 1 evaluate",
        ),
        ([(3, 0, 0, 1, 0, 0, 0, 0, 0, 0.1, 0.5)], r"rows \(r\): got 0.5 in row 0, which does not evaluate"),
        (changed(1, "s", -0.1), r"rows \(s\): got -0.1"),
        ([(1, 0, 1, 1, 1, 0, 0, 0.1)] * 4097, r"rows \(s\): got more than 4096 rows with noise at t = 1"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(ArgumentError, match=message):
        Sampler(rows, SHORT)


def test_a_table_that_goes_back_up():
    """Resampling: noise is added again, and the same timestep is visited twice, with other noise."""
    down, up = (2, 0, 1, 0.5, 0.5, 0, 0, 0, 0, 0.3), (3, 0, 0, 0.9, 0, 0, 0, 0, 0, 0.4)
    table = Sampler([(3, *down[1:]), down, up, (3, *down[1:]), down, (1, 0, 1, 0, 1, 0, 0, 0, 0, 0)], SHORT)
    assert [row.visit for row in table.rows] == [0, 0, 1, 2, 1, 0]
    assert [row.step for row in table.rows[:4]] == [3, 2, 3 + 2**20, 3 + 2**21]
    assert (len(table), table.evaluations, table.depth) == (6, 5, 0)
    assert pickle.loads(pickle.dumps(table)) == table


def test_a_remembered_noise_is_not_clipped():
    alpha, sigma = SHORT.signal[3], SHORT.noise[3]
    for prediction, p, q in (("noise", 0, 1), ("x0", 1 / sigma, -alpha / sigma), ("v", sigma, alpha)):
        rows = [(3, p, q, 1, -1, 0, 0, 0, 0, 0), (1, 1, 1, 1, -1, 0.5, 0, 0, 0, 0)]
        assert Sampler(rows, SHORT, prediction=prediction).depth == 1
        with pytest.raises(ArgumentError, match="clip: got bounds, for a table that remembers the noise"):
            Sampler(rows, SHORT, prediction=prediction, clip=1)
        Sampler([(*row[:5], 0, *row[6:]) for row in rows], SHORT, prediction=prediction, clip=1)  # nothing remembered


BAD_CLIPS = [0, -1, math.nan, math.inf, "1", True, (1,), (1, 2, 3), (1, 1), (2, -2), (0, math.inf), (None, 1)]


@pytest.mark.parametrize("clip", BAD_CLIPS)
def test_bad_clip(clip):
    with pytest.raises(ArgumentError, match="clip: got"):
        Sampler(GOOD, SHORT, clip=clip)
    with pytest.raises(ArgumentError, match="clip: got"):
        samplers.ddim(LINEAR, 5, clip=clip)


def test_bad_options_of_a_table():
    for prediction in ("epsilon", None, 3):
        with pytest.raises(ArgumentError, match=r"prediction.*'noise', 'x0', 'v'"):
            Sampler(GOOD, SHORT, prediction=prediction)
    for order in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match="order: got"):
            Sampler(GOOD, SHORT, order=order)
    for name in ("", None, 3):
        with pytest.raises(ArgumentError, match="name: got"):
            Sampler(GOOD, SHORT, name=name)
    with pytest.raises(ArgumentError, match="schedule: got int"):
        Sampler(GOOD, 4)


# -- constructors: names and bad input ---------------------------------------------------------------------

CONSTRUCTORS = [getattr(samplers, name) for name in samplers.names()]


@pytest.mark.parametrize("make", CONSTRUCTORS)
def test_bad_arguments(make):
    with pytest.raises(ArgumentError, match="schedule: got int"):
        make(1000, 10)
    for steps in (0, -1, 1001, 2.5, "10", True):
        with pytest.raises(ArgumentError, match="steps: got"):
            make(LINEAR, steps)
    with pytest.raises(ArgumentError, match="spacing: got 'even'"):
        make(LINEAR, 10, spacing="even")
    with pytest.raises(ArgumentError, match="prediction: got 'epsilon'"):
        make(LINEAR, 10, prediction="epsilon")


def test_bad_arguments_of_their_own():
    with pytest.raises(ArgumentError, match=r"variance.*'small', 'large'"):
        samplers.ddpm(LINEAR, variance="learned")
    for eta in (-0.1, 1.1, math.nan, "1", None):
        with pytest.raises(ArgumentError, match="eta: got"):
            samplers.ddim(LINEAR, 10, eta=eta)
    with pytest.raises(ArgumentError, match=r"final.*'zero', 'sigma_min'"):
        samplers.dpmpp_2m(LINEAR, 10, final="sigma_max")
    with pytest.raises(ArgumentError, match="steps: got None"):
        samplers.ddim(LINEAR, None)
    for make in CONSTRUCTORS:
        with pytest.raises(ArgumentError, match=r"final.*'zero', 'sigma_min'"):
            make(LINEAR, 10, final="sigma_max")
    for make in (samplers.unipc, samplers.deis, samplers.lms):
        for order in (0, 5 if make is samplers.lms else 4, 1.5, True, "2", None):
            with pytest.raises(ArgumentError, match="order: got"):
                make(LINEAR, 10, order=order)
    for make, option, most in (
        (samplers.ipndm, "order", 4),
        (samplers.dpmsolver, "order", 3),
        (samplers.dpmsolver_single, "order", 3),
        (samplers.sa_solver, "predictor", 3),
        (samplers.sa_solver, "corrector", 4),
    ):
        for order in (-1, most + 1, 1.5, True, "2", None):
            with pytest.raises(ArgumentError, match=f"{option}: got"):
                make(LINEAR, 10, **{option: order})
    for option, wrong in (("tau", (-1, 1001, math.nan)), ("between", (0.2, (0.2,), (-0.1, 0.8), (0.2, 1.1)))):
        for value in wrong:
            with pytest.raises(ArgumentError, match=f"{option}: got"):
                samplers.sa_solver(LINEAR, 10, **{option: value})
    for make, option in ((samplers.tcd, "eta"), (samplers.lcm, "timestep_scaling")):
        for value in (-1, math.nan, "1", np.ones(2)):
            with pytest.raises(ArgumentError, match=f"{option}: got"):
                make(LINEAR, 10, **{option: value})
    for make in (samplers.deis, samplers.lms):
        with pytest.raises(ArgumentError, match=r"clip: got 1, wants None: \w+ remembers the noise"):
            make(LINEAR, 10, clip=1)
    for make in (samplers.dpmpp_2m, samplers.dpmpp_3m, samplers.unipc, samplers.deis):
        for rows in (-1, 3, 1.0, True):
            with pytest.raises(ArgumentError, match="lower_order_final: got"):
                make(LINEAR, 10, lower_order_final=rows)
        with pytest.raises(ArgumentError, match="lower_order_final: got 0 with final='zero'"):
            make(LINEAR, 10, lower_order_final=0)
    for make in (samplers.dpmpp_2m, samplers.dpmpp_3m):
        for eta in (-0.1, math.inf, "1"):
            with pytest.raises(ArgumentError, match="eta: got"):
                make(LINEAR, 10, eta=eta)
    with pytest.raises(ArgumentError, match=r"solver.*'midpoint', 'heun'"):
        samplers.dpmpp_2m(LINEAR, 10, solver="bh2")
    with pytest.raises(ArgumentError, match=r"variant.*'bh1', 'bh2'"):
        samplers.unipc(LINEAR, 10, variant="midpoint")
    for wrong in (1, [1.0], (-1,), (10,), "0", None, np.ones(2)):
        with pytest.raises(ArgumentError, match="uncorrected: got"):
            samplers.unipc(LINEAR, 10, uncorrected=wrong)
    for make in (samplers.dpmpp_3m, samplers.dpm2):
        with pytest.raises(ArgumentError, match="published: got 1"):
            make(LINEAR, 10, published=1)
    with pytest.raises(ArgumentError, match="reclip: got 1"):
        samplers.ddim(LINEAR, 10, reclip=1)
    for make in (samplers.heun, samplers.euler):
        for option in ("churn", "s_tmin", "s_tmax", "s_noise"):
            for value in (-1, math.nan, "1", True):
                with pytest.raises(ArgumentError, match=f"{option}: got"):
                    make(LINEAR, 10, **{option: value})
        with pytest.raises(ArgumentError, match="s_tmax: got 1"):
            make(LINEAR, 10, s_tmin=2, s_tmax=1)
        with pytest.raises(ArgumentError, match=r"churn: got 0.001, which is 0.0001 of a level at each of 10 steps"):
            make(LINEAR, 10, churn=0.001)
        with pytest.raises(ArgumentError, match="churn: got 1, "):  # all of the churn is asked for above the schedule
            make(LINEAR, 10, churn=1, s_tmin=1e6)
    for make in (samplers.dpmpp_2m, samplers.unipc, samplers.lms, samplers.heun):
        with pytest.raises(ArgumentError, match="abar does not change"):
            make(Schedule.from_betas([0.5, 1e-20, 0.99, 0.9]), 4, spacing="trailing")


def test_a_start_far_from_noise_warns():
    """60 of the tutorial's 100 steps by leading spacing begin at t = 59, where abar is 0.29."""
    tutorial = Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    for make in CONSTRUCTORS:
        with pytest.warns(ScheduleWarning, match=r"t = 59, where abar is 0.288") as caught:
            make(tutorial, 60, spacing="leading")
        assert len(caught) == 1
        assert caught[0].filename == __file__
        make(tutorial, 60)  # a warning would be an error here


def test_named():
    usual = {"ddpm": 1000, "ddim": 50, "dpmpp_2m": 20, "unipc": 10}
    for name in samplers.names():
        make = getattr(samplers, name)
        assert name in samplers.__all__
        assert make(LINEAR, usual[name]) == samplers.named(name, LINEAR) if name in usual else True
        table = samplers.named(name, LINEAR, 7, prediction="v", final="sigma_min", spacing="linspace_open")
        assert table == make(LINEAR, 7, prediction="v", final="sigma_min", spacing="linspace_open")
        assert table.name == name
        if name not in samplers.UNCLIPPED:
            assert samplers.named(name, LINEAR, 7, clip=1.5) == make(LINEAR, 7, clip=1.5)
        assert 2 <= len(samplers.named(name, Schedule.cosine(10))) <= 19
        assert 20 < len(samplers.about(name)) < 85
    for name in ("plms", "", None, 3):
        with pytest.raises(ArgumentError, match=r"name.*'ddpm', 'ddim', 'dpmpp_2m'"):
            samplers.named(name, LINEAR)
    with pytest.raises(ArgumentError, match="schedule: got NoneType"):
        samplers.named("ddim", None)


def test_order_is_declared_for_deterministic_samplers():
    orders = {maker: make(LINEAR).order for maker, make in MAKERS.items()}
    assert {maker: order for maker, order in orders.items() if order is not None} == {
        "ddim": 1,
        "dpmpp_2m": 2,
        "dpmpp_2m sigma_min": 2,
        "heun": 2,
        "dpm2": 2,
        "dpmpp_2s": 2,
        "dpmpp_3m": 3,
        "unipc1": 2,
        "unipc2": 3,
        "unipc uncorrected": 3,
        "unipc3": 4,
        "deis2": 2,
        "deis3": 3,
        "lms": 4,
        "pndm": 2,
        "ipndm": 2,
        "dpmsolver": 3,
        "unipc noise": 4,
        "single3": 3,
        "single3 noise": 3,
    }
    assert samplers.dpmpp_3m(LINEAR, 20, published=True).order == 2


def test_a_label_is_the_name_and_the_number_of_steps():
    schedule = Schedule.cosine(60)
    assert samplers.named("ddim", schedule).label == "ddim, 50 steps"
    assert samplers.ddim(schedule, 1).label == "ddim, 1 step"
    assert samplers.heun(schedule, 10, spacing="trailing").label == "heun, 19 evaluations"
    assert samplers.dpm2(schedule, 1).label == "dpm2, 1 step"
