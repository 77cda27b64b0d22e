"""Orders of samplers, measured: the error of one row with exact memory, and of whole runs, on exact Gaussians.

Of a Gaussian N(0, V) the probability-flow equation is solved by x = k sqrt(alpha^2 V + sigma^2), whatever the schedule,
so the state, the memory and the next state of a row are known.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from fastdiff import samplers
from fastdiff.denoisers import Gaussian, convergence, exact_chain
from fastdiff.sampling import sample
from fastdiff.schedule import Schedule

V = 0.3


def level_schedule(half_log_snr):
    """The schedule with these levels, lambda = log(signal / noise), highest first."""
    abar, variance = (1 / (1 + np.exp(sign * 2 * np.asarray(half_log_snr))) for sign in (-1, 1))
    return Schedule(np.diff(variance, prepend=0) / np.append(1, abar[:-1]))


EVEN = level_schedule(np.linspace(10, -10, 4097))  # any number of steps that divides 4096 has even ones


def solution(t):
    """(x, x0, noise) at timesteps of EVEN."""
    alpha, sigma = EVEN.signal[t], EVEN.noise[t]
    power = alpha**2 * V + sigma**2
    return np.sqrt(power), alpha * V / np.sqrt(power), sigma / np.sqrt(power)


def of_noise(x, t):
    """The network: noise prediction."""
    return EVEN.noise[t] * x / (EVEN.signal[t] ** 2 * V + EVEN.noise[t] ** 2)


def one_row(row, x, memory):
    """(x', m) of a row."""
    out = of_noise(x, row.t)
    m = row.p * x + row.q * out
    kept = sum(c * old for c, old in zip(row[5:8], memory, strict=True))
    return row.a * x + row.b * m + kept + row.e * out, m


def slope(error, steps):
    return -np.polyfit(np.log(steps), np.log(np.abs(error)), 1)[0]


STEPS = (256, 512, 1024)
MULTISTEP = {
    "ddim": (lambda n: samplers.ddim(EVEN, n, spacing="linspace_open"), 1, 1),
    "dpmpp_2m": (lambda n: samplers.dpmpp_2m(EVEN, n), 1, 2),
    "dpmpp_2m heun": (lambda n: samplers.dpmpp_2m(EVEN, n, solver="heun"), 1, 2),
    "dpmpp_3m": (lambda n: samplers.dpmpp_3m(EVEN, n), 1, 3),
    "dpmpp_3m published": (lambda n: samplers.dpmpp_3m(EVEN, n, published=True), 1, 2),
    "deis1": (lambda n: samplers.deis(EVEN, n, order=1), 2, 1),
    "deis2": (lambda n: samplers.deis(EVEN, n), 2, 2),
    "deis3": (lambda n: samplers.deis(EVEN, n, order=3), 2, 3),
    "lms2": (lambda n: samplers.lms(EVEN, n, order=2, spacing="linspace_open"), 2, 2),
    "lms3": (lambda n: samplers.lms(EVEN, n, order=3, spacing="linspace_open"), 2, 3),
    "lms4": (lambda n: samplers.lms(EVEN, n, spacing="linspace_open"), 2, 4),
    "dpmsolver1": (lambda n: samplers.dpmsolver(EVEN, n, order=1), 2, 1),
    "dpmsolver2": (lambda n: samplers.dpmsolver(EVEN, n), 2, 2),
    "dpmsolver2 heun": (lambda n: samplers.dpmsolver(EVEN, n, solver="heun"), 2, 2),
    "dpmsolver3": (lambda n: samplers.dpmsolver(EVEN, n, order=3), 2, 3),
    "dpmsolver3 published": (lambda n: samplers.dpmsolver(EVEN, n, order=3, published=True), 2, 2),
    "pndm": (lambda n: samplers.pndm(EVEN, n, spacing="linspace_open"), 2, 2),
    "ipndm1": (lambda n: samplers.ipndm(EVEN, n, order=1, spacing="linspace_open"), 2, 1),
    "ipndm2": (lambda n: samplers.ipndm(EVEN, n, order=2, spacing="linspace_open"), 2, 2),
    "ipndm3": (lambda n: samplers.ipndm(EVEN, n, order=3, spacing="linspace_open"), 2, 2),
    "ipndm4": (lambda n: samplers.ipndm(EVEN, n, spacing="linspace_open"), 2, 2),
    "sa_solver1": (lambda n: samplers.sa_solver(EVEN, n, tau=0, predictor=1, corrector=0), 1, 1),
    "sa_solver2": (lambda n: samplers.sa_solver(EVEN, n, tau=0, predictor=2, corrector=0), 1, 2),
    "sa_solver3": (lambda n: samplers.sa_solver(EVEN, n, tau=0, predictor=3, corrector=0), 1, 3),
    "sa_solver3 noise": (
        lambda n: samplers.sa_solver(EVEN, n, tau=0, predictor=3, corrector=0, predict_x0=False), 2, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTISTEP)
def test_one_row_of_a_method_that_remembers(name):
    """State and memory exact: h^(p + 1).

    From lambda = 0, but for the published 3M, whose errors of h^3 and of h^4 cancel near there.
    """
    make, remembered, order = MULTISTEP[name]
    place = 7 / 16 if name == "dpmpp_3m published" else 1 / 2
    errors = []
    for n in STEPS:
        t = EVEN.timesteps(n, spacing="linspace_open")
        table, i = make(n), int(place * n)
        memory = [solution(t[i - back])[remembered] for back in (1, 2, 3)]
        found, _ = one_row(table.rows[i + len(table) - n], solution(t[i])[0], memory)  # pndm has one more before
        errors.append(found - solution(t[i + 1])[0])
    assert table.order == order
    assert abs(slope(errors, STEPS) - (order + 1)) < 0.15


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm2 published", "dpmpp_2s"])
def test_one_step_of_two_stages(name):
    """From lambda = 0, state exact: h^3."""
    errors = []
    for n in STEPS:
        t = EVEN.timesteps(n, spacing="linspace_open")
        options = {"published": True} if name == "dpm2 published" else {}
        table, i = getattr(samplers, name.split()[0])(EVEN, n, spacing="linspace_open", **options), n // 2
        first, second = table.rows[2 * i : 2 * i + 2]
        assert first.t == t[i]
        x, m = one_row(first, solution(t[i])[0], (0, 0, 0))
        errors.append(one_row(second, x, (m, 0, 0))[0] - solution(t[i + 1])[0])
    assert table.order == (None if options else 2)
    local = slope(errors, STEPS)
    assert abs(local - 3) < 0.15 or (name == "dpm2" and local > 3)  # 4.03: the middle suits a Gaussian


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_one_turn(order, solver, predict_x0):
    """As many rows as the order, from the exact state of the first of them near lambda = 2: h^(p + 1)."""
    errors, steps = [], [2 * n for n in STEPS] if order == 3 else STEPS  # 4.16 with those: not small enough yet
    for n in steps:
        t = EVEN.timesteps(n, spacing="linspace_open")
        table = samplers.dpmsolver_single(EVEN, n, order=order, solver=solver, predict_x0=predict_x0)
        i = int(0.4 * n) // order * order
        x, memory = solution(t[i])[0], (0.0, 0.0, 0.0)
        for row in table.rows[i : i + order]:
            x, m = one_row(row, x, memory)
            memory = (m, *memory[:2])
        errors.append(x - solution(t[i + order])[0])
    assert table.order == order
    assert abs(slope(errors, steps) - (order + 1)) < 0.15


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_one_corrected_row_of_unipc(order, variant, predict_x0):
    """A row holds the corrector of its state and the next predictor; without the latter it is of order p + 1.

    The predictor of a row is a row of `dpmpp_2m`, `dpmpp_3m` or `ddim`, or of `dpmsolver`; with "bh1" that of order 2
    has h for 1 - e^-h.
    """
    kept, scale = (1, EVEN.noise) if predict_x0 else (2, EVEN.signal)  # what is remembered; x / scale stays
    other = EVEN.signal if predict_x0 else EVEN.noise
    errors = []
    for n in STEPS:
        t = EVEN.timesteps(n, spacing="linspace_open")
        i = n // 2 if predict_x0 or order < 3 else 7 * n // 16  # there errors of h^5 and more cancel
        rows = samplers.unipc(EVEN, n, order=order, variant=variant, predict_x0=predict_x0).rows
        # The table of lower order whose corrector is off: x' = a x + alpha' (predictor's memory).
        makers = {1: samplers.ddim, 2: samplers.dpmpp_2m, 3: samplers.dpmpp_3m}
        plain = makers[order](EVEN, n, spacing="linspace_open").rows
        exact, h = [solution(t[i - back])[kept] for back in range(4)], 20 / n
        if not predict_x0:
            h, plain = -h, samplers.dpmsolver(EVEN, n, order=order).rows
        bent = 0.0
        if order == 2 and variant == "bh1":  # of one m1 - m in the memory: half of what h has more than 1 - e^-h
            bent = (h + np.expm1(-h)) / 2
        predicted = one_row(plain[i - 1], solution(t[i - 1])[0], [*exact[2:], 0])[0]
        predicted += other[t[i]] * bent * (exact[1] - exact[2])
        whole, m = one_row(rows[i], predicted, exact[1:])
        uncorrected, _ = one_row(plain[i], predicted, exact[1:])
        uncorrected += other[t[i + 1]] * bent * (m - exact[1])
        corrected = predicted + (whole - uncorrected) * scale[t[i]] / scale[t[i + 1]]
        errors.append(corrected - solution(t[i])[0])
    assert abs(slope(errors, STEPS) - (order + 2)) < 0.15


@pytest.mark.parametrize(
    ("published", "expected"), [(True, (2.7e-5, 3.6e-6, 4.7e-7)), (False, (7.1e-6, 5.7e-7, 3.9e-8))]
)
def test_local_errors_of_dpmpp_3m(published, expected):
    """x0 = tanh(lambda), one row from lambda = -1/2 with exact memory, by quadrature."""
    for h, error in zip((0.1, 0.05, 0.025), expected, strict=True):
        half_log_snr = -0.5 + h * np.arange(2, -3, -1)
        schedule = level_schedule(half_log_snr)
        row = samplers.dpmpp_3m(schedule, 4, prediction="x0", published=published, final="sigma_min").rows[2]
        m = np.tanh(half_log_snr[row.t :])
        found = row.b * m[0] + row.c1 * m[1] + row.c2 * m[2]
        wanted = quad(lambda u: np.exp(u) * np.tanh(u), -0.5, -0.5 + h, epsabs=1e-14)[0] * schedule.noise[row.t - 1]
        assert abs(found - wanted) == pytest.approx(error, rel=0.02)


# -- whole runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddim", 0.1856472),
        ("dpmpp_2m", 0.2274668),
        ("unipc", 0.2289572),
        ("unipc3", 0.2298228),
        ("dpmpp_2m sde", 0.23496),
        ("deis", 0.21786),
        ("heun", 0.2296824),
    ],
)
def test_golden_variances(name, expected):
    """Data N(0, 1/4), 20 timesteps evenly from t = 999 of the linear schedule."""
    schedule = Schedule.linear()
    options = {"unipc3": {"order": 3, "lower_order_final": 2}, "dpmpp_2m sde": {"eta": 1.0}}.get(name, {})
    make = getattr(samplers, {"unipc3": "unipc", "dpmpp_2m sde": "dpmpp_2m"}.get(name, name))
    table = make(schedule, 20, spacing="linspace_open", **options)
    variance = exact_chain(Gaussian([0.0], [[0.25]], schedule), table).cov[0, 0]
    assert variance == pytest.approx(expected, abs=6e-8 if len(str(expected)) == 9 else 6e-6)


WHOLE = {
    "ddim": (samplers.ddim, 1, 0.99),
    "dpmpp_2m": (samplers.dpmpp_2m, 2, 2.0),
    "dpmpp_3m published": (lambda s, n: samplers.dpmpp_3m(s, n, published=True), 2, 2.03),
    "dpmpp_3m": (samplers.dpmpp_3m, 3, 4.09),
    "unipc1": (lambda s, n: samplers.unipc(s, n, order=1), 2, 2.0),
    "unipc2": (samplers.unipc, 3, 3.0),
    "unipc3": (lambda s, n: samplers.unipc(s, n, order=3), 4, 3.77),
    "unipc uncorrected": (lambda s, n: samplers.unipc(s, n, uncorrected=(0, 1, 2)), 3, 3.0),
    "deis2": (samplers.deis, 2, 1.99),
    "deis3": (lambda s, n: samplers.deis(s, n, order=3), 3, 3.9),
    "lms2": (lambda s, n: samplers.lms(s, n, order=2), 2, 1.96),
    "lms4": (samplers.lms, 4, 3.82),
    "heun": (lambda s, n: samplers.heun(s, n, spacing="linspace_open"), 2, 2.01),
    "dpm2": (samplers.dpm2, 2, 2.52),
    "dpm2 published": (lambda s, n: samplers.dpm2(s, n, published=True), None, 1.71),
    "dpmpp_2s": (samplers.dpmpp_2s, 2, 1.99),
    "dpmsolver2": (samplers.dpmsolver, 2, 2),
    "dpmsolver3": (lambda s, n: samplers.dpmsolver(s, n, order=3), 3, 3.9),
    "dpmsolver3 published": (lambda s, n: samplers.dpmsolver(s, n, order=3, published=True), 2, 2),
    "unipc1 noise": (lambda s, n: samplers.unipc(s, n, order=1, predict_x0=False), 2, 2),
    "unipc2 noise": (lambda s, n: samplers.unipc(s, n, predict_x0=False), 3, 3),
    "unipc3 noise": (lambda s, n: samplers.unipc(s, n, order=3, predict_x0=False), 4, 4.17),
    "sa_solver22": (lambda s, n: samplers.sa_solver(s, n, tau=0), 2, 2.12),
    "sa_solver33": (lambda s, n: samplers.sa_solver(s, n, tau=0, predictor=3, corrector=3), 3, 3.8),
    "sa_solver34": (lambda s, n: samplers.sa_solver(s, n, tau=0, predictor=3, corrector=4), 4, 3.77),
    "sa_solver34 noise": (
        lambda s, n: samplers.sa_solver(s, n, tau=0, predictor=3, corrector=4, predict_x0=False), 4, 4.17,
    ),
    "single1": (lambda s, n: samplers.dpmsolver_single(s, n, order=1), 1, 1),
    "single2": (samplers.dpmsolver_single, 2, 2),
    "single2 heun": (lambda s, n: samplers.dpmsolver_single(s, n, solver="heun"), 2, 2),
    "single3": (lambda s, n: samplers.dpmsolver_single(s, n, order=3), 3, 3),
    "single3 heun": (lambda s, n: samplers.dpmsolver_single(s, n, order=3, solver="heun"), 3, 3),
    "single2 noise": (lambda s, n: samplers.dpmsolver_single(s, n, predict_x0=False), 2, 2),
    "single3 noise": (lambda s, n: samplers.dpmsolver_single(s, n, order=3, predict_x0=False), 3, 3),
    "pndm": (lambda s, n: samplers.pndm(s, n), 2, 2),
    "ipndm": (lambda s, n: samplers.ipndm(s, n), 2, 2),
    "tcd": (lambda s, n: samplers.tcd(s, n, eta=0), 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_runs_converge(name):
    """W2 of 256 steps over that of 512, steps even in lambda; the spectrum is wide, 1e-2 to 1e1.

    The first rows are of lower order, but deep in noise, where it does not show. Third order and more gain from the
    data being Gaussian, or are not yet at their limit.
    """
    make, order, measured = WHOLE[name]
    gaussian = Gaussian(np.zeros(9), np.diag(np.logspace(-2, 1, 9)), EVEN)
    far, near = convergence(gaussian, lambda n: make(EVEN, n), [256, 512])
    assert make(EVEN, 64).order == order
    assert np.log2(far / near) == pytest.approx(measured, abs=0.05)


@pytest.mark.parametrize("name", samplers.names())
def test_from_noise_alone(name):
    """The first step begins at a level that no logarithm has; in 200 steps the data are near, but for leaps."""
    for schedule in (Schedule.flow(400), Schedule.linear().zero_terminal_snr()):
        gaussian = Gaussian([0.5, -0.3], [[0.3, 0.1], [0.1, 0.2]], schedule, prediction="v")
        spacing = {} if name == "ddpm" else {"spacing": "trailing"}
        table = samplers.named(name, schedule, 200, prediction="v", **spacing)
        assert np.isfinite(np.array(table.rows)).all()
        distance = exact_chain(gaussian, table).w2()
        assert distance < (0.5 if name in ("lcm", "tcd", "consistency") else 0.03)


STOCHASTIC = {
    "dpm2_ancestral": samplers.dpm2_ancestral,
    "dpmpp_sde": samplers.dpmpp_sde,
    "dpmsolver eta": lambda s, n: samplers.dpmsolver(s, n, eta=1.0),
    "single eta": lambda s, n: samplers.dpmsolver_single(s, n, eta=1.0),
    "sa_solver": samplers.sa_solver,
    "sa_solver noise": lambda s, n: samplers.sa_solver(s, n, predictor=3, corrector=4, predict_x0=False),
    "tcd": samplers.tcd,
    "lcm": samplers.lcm,
    "consistency": samplers.consistency,
    "euler churn": lambda s, n: samplers.euler(s, n, churn=10.0),
    "heun churn": lambda s, n: samplers.heun(s, n, churn=10.0),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_drawn_covariances(name):
    """200,000 draws of 5 steps have the covariance of the exact chain, within 4 of their standard errors."""
    gaussian = Gaussian([0.3, -0.2], [[0.5, 0.4], [0.4, 0.9]], Schedule.linear())
    table = STOCHASTIC[name](gaussian.schedule, 5)
    expected, n = exact_chain(gaussian, table), 200_000
    x = sample(gaussian, table, n=n, seed=3, backend="numpy")
    deviations = np.sqrt(np.diag(expected.cov))
    assert (np.abs(x.mean(axis=0) - expected.mean) < 4 * deviations / np.sqrt(n)).all()
    spread = np.sqrt((np.outer(deviations, deviations) ** 2 + expected.cov**2) / n)
    assert (np.abs(np.cov(x.T) - expected.cov) < 4 * spread).all()


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("dpm2_ancestral", 2.02),
        ("dpmpp_sde", 2.94),
        ("dpmsolver eta", 1.98),
        ("single eta", 0.89),
        ("sa_solver", 2.13),
        ("tcd", 0.05),
        ("euler churn", 1),
        ("heun churn", 2),
    ],
)
def test_weak_orders(name, measured):
    """W2 of the exact law of 256 steps over that of 512; `tcd` leaps below every level, however many there are."""
    gaussian = Gaussian(np.zeros(9), np.diag(np.logspace(-2, 1, 9)), EVEN)
    far, near = convergence(gaussian, lambda n: STOCHASTIC[name](EVEN, n), [256, 512])
    assert np.log2(far / near) == pytest.approx(measured, abs=0.05)
