"""Schedules: every table against a plain loop, spacings, the doctor, storage, and bad input."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdiff import samplers
from fastdiff.errors import ArgumentError, ScheduleWarning
from fastdiff.schedule import SPACINGS, Schedule

TABLES = ("betas", "alphas", "alphas_bar", "signal", "noise", "posterior_variance", "log_snr")


def tutorial() -> Schedule:
    return Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)


MADE = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "cosine": lambda: Schedule.cosine(50),
    "sigmoid": tutorial,
    "custom": lambda: Schedule.from_betas([0.3, 0.9, 0.2, 0.999]),
}


@pytest.fixture(params=MADE)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    made: Schedule = MADE[request.param]()
    assert made.name == request.param
    return made


# -- tables ------------------------------------------------------------------------------------------------


def test_tables_equal_a_plain_loop(schedule):
    abar = 1.0
    for t in range(schedule.T):
        beta = float(schedule.betas[t])
        before, abar = abar, abar * (1 - beta)
        expected = {
            "alphas": 1 - beta,
            "alphas_bar": abar,
            "signal": math.sqrt(abar),
            "noise": math.sqrt(1 - abar),
            "posterior_variance": (1 - before) / (1 - abar) * beta,
            "log_snr": math.log(abar / (1 - abar)),
        }
        for name, value in expected.items():
            # the loop's own 1 - abar loses 1e-16 / beta; ours does not
            assert getattr(schedule, name)[t] == pytest.approx(value, rel=1e-10, abs=1e-10 * beta), (name, t)


def test_tables_are_float64_and_read_only(schedule):
    for name in TABLES:
        table = getattr(schedule, name)
        assert table.shape == (schedule.T,)
        assert table.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.5
    with pytest.raises(AttributeError):
        schedule.T = 3


def test_the_constructors_give_their_formulas():
    T, first, last = 7, 1e-3, 0.5
    ramp = [i / (T - 1) for i in range(T)]
    linear = [first + (last - first) * u for u in ramp]
    scaled = [(math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * u) ** 2 for u in ramp]
    sigmoid = [first + (last - first) / (1 + math.exp(6 - 12 * u)) for u in ramp]

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = [min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        for name, betas in (("linear", linear), ("scaled_linear", scaled), ("sigmoid", sigmoid)):
            made = getattr(Schedule, name)(T, beta_start=first, beta_end=last)
            np.testing.assert_allclose(made.betas, betas, rtol=1e-14, err_msg=name)
    np.testing.assert_allclose(Schedule.cosine(T).betas, cosine, rtol=1e-12)


def test_known_numbers():
    linear = Schedule.linear()
    assert linear.T == 1000
    assert linear.betas[0] == 1e-4
    assert linear.betas[-1] == 0.02
    assert linear.posterior_variance[487] == pytest.approx(0.00979, abs=5e-6)
    assert linear.posterior_variance[999] == pytest.approx(0.02, abs=5e-6)
    assert linear.posterior_variance[0] == 0
    assert tutorial().alphas_bar[-1] == pytest.approx(0.00539, abs=5e-6)
    assert Schedule.cosine().betas[-1] == 0.999
    assert Schedule.cosine().name == "cosine"


def test_noise_and_log_snr_stay_exact_for_tiny_betas():
    """1 - abar would be 0 here: the betas are below the spacing of float64 at 1."""
    tiny = Schedule.from_betas([1e-20, 3e-20, 0.995])
    np.testing.assert_allclose(tiny.noise[:2], [1e-10, 2e-10], rtol=1e-15)
    np.testing.assert_allclose(tiny.log_snr[:2], [20 * math.log(10), math.log(2.5e19)], rtol=1e-15)
    assert tiny.posterior_variance[1] == pytest.approx(0.75e-20, rel=1e-15)


def test_the_logistic_curve_has_the_same_bits_on_every_machine():
    """NumPy's exp has others with AVX-512 than without."""
    digest = hashlib.sha256(tutorial().betas.astype("<f8").tobytes()).hexdigest()
    assert digest == "a07f0598fb6692b7a432a1f1e9fb812185d6a6afca8d70a18430d1c61469d934"
    rise = [1 / (1 + math.exp(6 - 12 * i / 99)) for i in range(100)]
    np.testing.assert_allclose(tutorial().betas, 1e-5 + np.array(rise) * (0.1 - 1e-5), rtol=1e-15)


# -- timesteps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("trailing", [9, 7, 4, 1]),  # round(10, 7.5, 5, 2.5) - 1: halves go to the even number
        ("leading", [6, 4, 2, 0]),
        ("linspace", [9, 6, 3, 0]),
        ("linspace_open", [9, 7, 4, 2]),  # 0, 2.25, 4.5, 6.75, 9
    ],
)
def test_spacings_by_hand(spacing, expected):
    steps = Schedule.cosine(10).timesteps(4, spacing=spacing)
    assert steps.dtype == np.int64
    assert steps.tolist() == expected


@given(T=st.integers(1, 3000), share=st.floats(0, 1), spacing=st.sampled_from(SPACINGS[:4]))
@settings(max_examples=150, deadline=None)
def test_spacings_for_any_pair(T, share, spacing):
    most = T - 1 if spacing == "linspace_open" else T
    assume(most >= 1)
    n = 1 + round(share * (most - 1))
    steps = Schedule.cosine(T).timesteps(n, spacing=spacing)
    assert steps.shape == (n,)
    assert (np.diff(steps) < 0).all()
    i = np.arange(n)
    ideal = {
        "trailing": T * (n - i) / n - 1,
        "leading": (n - 1 - i) * (T // n),
        "linspace": (T - 1) * (n - 1 - i) / max(1, n - 1) if n > 1 else np.array([T - 1]),
        "linspace_open": (T - 1) * (n - i) / n,
    }
    assert np.abs(steps - ideal[spacing]).max() <= (0 if spacing == "leading" else 0.5 + 1e-9)
    assert steps[0] <= T - 1
    assert steps[-1] >= (1 if spacing == "linspace_open" else 0)


PLACED = SPACINGS[4:]


@given(T=st.integers(2, 3000), share=st.floats(0, 1), spacing=st.sampled_from(PLACED))
@settings(max_examples=100, deadline=None)
def test_levels_become_the_nearest_timesteps(T, share, spacing):
    """By the definition, level by level; log(rho) is linear between timesteps, as the levels are few."""
    schedule = Schedule.cosine(T)
    n = 2 + round(share * (T - 2))
    ratio = schedule.noise / schedule.signal
    top = T - 1 if spacing == "beta" else int(np.abs(np.log(ratio / 160)).argmin())  # its last one is louder
    ends, i = np.array([ratio[top], ratio[0]]), np.arange(n)
    fractions = i / (n - 1)
    if spacing == "beta":
        ideal = scipy.stats.beta.ppf(1 - fractions, 0.6, 0.6) * (T - 1)
    else:
        roots = ends ** (1 / 7)
        levels = {
            "karras": (roots[0] + fractions * (roots[1] - roots[0])) ** 7,
            "exponential": ends[0] * (ends[1] / ends[0]) ** fractions,
            "lambda": ends[0] * (ends[1] / ends[0]) ** (i / n),
        }[spacing]
        ideal = np.interp(np.log(levels), np.log(ratio), np.arange(T))
    near = np.rint(ideal)
    clear = np.abs(np.abs(ideal - near) - 0.5) > 1e-6  # not halfway between two
    if len(np.unique(near[near > 0] if spacing == "lambda" else near)) < 2:
        with pytest.raises(ArgumentError, match="spacing: got"):
            schedule.timesteps(n, spacing=spacing)
        return
    steps = schedule.timesteps(n, spacing=spacing)
    assert steps.dtype == np.int64
    assert (np.diff(steps) < 0).all()
    wanted = near[clear & (near > 0)] if spacing == "lambda" else near[clear]
    assert set(wanted.astype(int)) <= set(steps.tolist())
    assert steps[0] == top
    assert bool(steps[-1] == 0) is (spacing != "lambda")


def test_levels_that_fall_together_are_logged(caplog):
    with caplog.at_level("INFO", "fastdiff"):
        steps = Schedule.linear().timesteps(400, spacing="karras")
    assert 200 < len(steps) < 400
    assert f"'karras' spacing: {400 - len(steps)} of 400 levels fall on timesteps that others have" in caplog.text


@pytest.mark.parametrize("schedule", [Schedule.flow(1000), Schedule.linear().zero_terminal_snr()])
def test_levels_after_pure_noise(schedule):
    for spacing in PLACED:
        steps = schedule.timesteps(20, spacing=spacing)
        assert steps[0] == 999
        assert (np.diff(steps) < 0).all()
        if spacing != "beta":
            ratio = schedule.noise[:-1] / schedule.signal[:-1]
            assert steps[1] == np.abs(np.log(ratio / 160)).argmin()


def test_the_loudest_level():
    """Nearest to sigma_max, the last one where that is quieter; levels that are not placed do not ask."""
    cosine, linear = Schedule.cosine(1000), Schedule.linear()
    for schedule, loudest, first in (
        (cosine, 160, 995),
        (cosine, np.inf, 999),
        (linear, 20.0, 768),
        (linear, 1e3, 999),
    ):
        for spacing in ("karras", "exponential", "lambda"):
            assert schedule.timesteps(20, spacing=spacing, sigma_max=loudest)[0] == first
        assert schedule.timesteps(20, spacing="beta", sigma_max=loudest)[0] == 999
    ratio = cosine.noise / cosine.signal
    assert cosine.timesteps(20, spacing="karras")[0] == np.abs(np.log(ratio / 160)).argmin()
    assert Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1).timesteps(20, spacing="karras")[0] == 99
    for wrong in (0, -1, np.nan, "80"):
        with pytest.raises(ArgumentError, match="sigma_max: got"):
            cosine.timesteps(20, spacing="karras", sigma_max=wrong)


def test_timesteps_of_ones_own():
    schedule = Schedule.linear()
    assert schedule.timesteps(3, spacing=[900, 500, 20]).tolist() == [900, 500, 20]
    table = samplers.unipc(schedule, 3, spacing=(900, 500, 20))
    assert table.timesteps.tolist() == [900, 500, 20]
    assert table.options["spacing"] == (900, 500, 20)
    for wrong in ([1000, 3, 2], [5, 5, 3], [3, 4, 5], [2.5, 2, 1], [[3, 2, 1]], [], None, 3):
        with pytest.raises(ArgumentError, match="spacing: got"):
            schedule.timesteps(3, spacing=wrong)
    with pytest.raises(ArgumentError, match="steps: got 4, wants an integer from 3 to 3"):
        schedule.timesteps(4, spacing=[900, 500, 20])


def test_one_step_starts_at_the_noise_end():
    for spacing in ("trailing", "linspace", "linspace_open"):
        assert Schedule.cosine(20).timesteps(1, spacing=spacing).tolist() == [19]
    for spacing in ("trailing", "linspace", "leading"):
        assert Schedule.cosine(1).timesteps(1, spacing=spacing).tolist() == [0]


def test_timesteps_bad_input():
    s = Schedule.cosine(10)
    for spacing in SPACINGS:
        for steps in (0, -1, 11, 2.0, True, "3", None):
            with pytest.raises(ArgumentError, match="steps: got"):
                s.timesteps(steps, spacing=spacing)
    with pytest.raises(ArgumentError, match="integer from 1 to 9"):
        s.timesteps(10, spacing="linspace_open")
    with pytest.raises(ArgumentError, match=r"spacing.*'trailing', 'leading', 'linspace', 'linspace_open', 'karras'"):
        s.timesteps(3, spacing="even")
    for spacing in PLACED:
        with pytest.raises(ArgumentError, match="steps: got 1, wants an integer from 2 to 10"):
            s.timesteps(1, spacing=spacing)
    steep = Schedule(np.array([1e-6, 0.999]))  # the levels between its ends have no timestep
    with pytest.raises(ArgumentError, match="spacing: got 'lambda', which leaves 1 timestep of 2"):
        steep.timesteps(2, spacing="lambda")
    with pytest.raises(ArgumentError, match=r"spacing.*T of at least 2"):
        Schedule.cosine(1).timesteps(1, spacing="linspace_open")


# -- the doctor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule.linear(50),
        lambda: Schedule.scaled_linear(100),
        lambda: Schedule.sigmoid(10, beta_start=1e-5, beta_end=0.1),
        lambda: Schedule.from_betas([0.5, 0.5]),
    ],
)
def test_an_end_that_is_not_noise_warns_once_where_the_user_stands(make):
    with pytest.warns(ScheduleWarning, match="does not end in noise") as caught:
        made = make()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert made.diagnose()[0] == str(caught[0].message)


def test_the_doctors_advice_helps():
    with pytest.warns(ScheduleWarning) as caught:
        Schedule.linear(50)
    advice = str(caught[0].message)
    k = float(advice.split("betas about ")[1].split(" times")[0])
    steps = int(advice.split("or about ")[1].split(" steps")[0])
    assert Schedule.linear(50, beta_start=k * 1e-4, beta_end=k * 0.02).diagnose() == []
    assert Schedule.linear(steps).diagnose() == []
    assert "Schedule.cosine(50)" in advice


def test_advice_is_only_what_is_possible():
    with pytest.warns(ScheduleWarning) as caught:
        Schedule.from_betas([0.5])
    assert "betas about" not in str(caught[0].message)
    with pytest.warns(ScheduleWarning) as caught:
        Schedule.from_betas([1e-300])  # abar is 1 to rounding: nothing can be worked out from it
    assert "Take Schedule.cosine(1)." in str(caught[0].message)


@pytest.mark.parametrize("T", [1, 2, 3, 10, 1000, 4000])
def test_a_sound_schedule_is_left_alone(T):
    found = Schedule.cosine(T).diagnose()  # a warning would be an error here
    assert found == [] or (T < 10 and "first step" in found[0])
    assert Schedule.linear().diagnose() == []
    assert tutorial().diagnose() == []


def test_other_findings():
    deep = Schedule.from_betas(np.linspace(0.01, 0.9, 50)).diagnose()
    assert len(deep) == 1
    assert "abar falls to" in deep[0]
    falling = Schedule.linear(beta_start=0.02, beta_end=1e-4).diagnose()
    assert len(falling) == 1
    assert "fall at t = 1" in falling[0]
    rough = Schedule.from_betas([0.5] * 10).diagnose()
    assert len(rough) == 1
    assert "first step" in rough[0]


# -- copies and storage ------------------------------------------------------------------------------------


def restored_copies(schedule: Schedule) -> list[Schedule]:
    return [
        copy.deepcopy(schedule),
        copy.copy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))),
    ]


def test_copies_have_the_same_bits_and_stay_read_only(schedule):
    for other in restored_copies(schedule):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert other.name == schedule.name
        assert other.T == schedule.T
        for name in TABLES:
            assert getattr(other, name).tobytes() == getattr(schedule, name).tobytes()
            assert not getattr(other, name).flags.writeable


def test_copies_are_silent():
    with pytest.warns(ScheduleWarning):
        short = Schedule.linear(5)
    assert len(restored_copies(short)) == 4  # a warning would be an error here


def test_equality():
    assert Schedule.linear() == Schedule.from_betas(Schedule.linear().betas)
    assert Schedule.linear() != Schedule.scaled_linear()
    assert Schedule.cosine(5) != Schedule.cosine(6)
    assert Schedule.cosine(5) != "cosine"
    assert repr(tutorial()) == "<Schedule sigmoid: T=100, betas 0.000257 .. 0.0998, abar ends at 0.00539>"


def test_the_callers_array_is_not_held():
    betas = np.full(20, 0.5)
    s = Schedule.from_betas(betas)
    betas[:] = 0.1
    assert (s.betas == 0.5).all()
    assert betas.flags.writeable


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        "linear",
        {},
        {"name": "linear"},
        {"betas": [0.9, 0.999]},
        {"name": "linear", "betas": [0.999], "T": 1},
        {"name": "linear", "betas": "0.1"},
        {"name": "linear", "betas": []},
        {"name": "linear", "betas": [0.999, None]},
        {"name": "linear", "betas": [0.999, "0.1"]},
        {"name": "linear", "betas": [0.999, math.nan]},
        {"name": "linear", "betas": [0.999, 10**400]},
        {"name": "linear", "betas": [True]},
        {"name": "linear", "betas": [[0.999]]},
        {"name": "linear", "betas": [[0.5], 0.5]},
        {"name": "linear", "betas": {"0": 0.999}},
        {"name": "linear", "betas": [1.0]},
        {"name": "karras", "betas": [0.999]},
        {"name": ["linear"], "betas": [0.999]},
        {1: 2, "name": "linear", "betas": [0.999]},
    ],
)
def test_from_dict_refuses_what_to_dict_never_wrote(stored):
    with pytest.raises(ArgumentError, match=r"(stored|betas|name): got"):
        Schedule.from_dict(stored)


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, -5, 10**6 + 1, 10.0, True, "10", None])
def test_bad_T(T):
    for name in ("linear", "scaled_linear", "cosine", "sigmoid"):
        options = {"beta_start": 1e-4, "beta_end": 0.02} if name != "cosine" else {}
        with pytest.raises(ArgumentError, match="T: got"):
            getattr(Schedule, name)(T, **options)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.5, math.nan, math.inf, "0.1", None, True])
def test_bad_beta_ends(beta):
    for name in ("linear", "scaled_linear", "sigmoid"):
        with pytest.raises(ArgumentError, match="beta_start: got"):
            getattr(Schedule, name)(1000, beta_start=beta, beta_end=0.02)
        with pytest.raises(ArgumentError, match="beta_end: got"):
            getattr(Schedule, name)(1000, beta_start=1e-4, beta_end=beta)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "0 values"),
        (0.999, "shape"),
        ([[0.999]], "shape"),
        ([0.5, 0.0], "0.0 at index 1"),
        ([1.0], "1.0 at index 0"),
        ([-0.1], "-0.1"),
        ([0.5, math.nan], "nan at index"),
        ([math.inf], "inf"),
        ([1 + 0.1j], "complex"),
        (["0.1"], "dtype"),
        ([True, True], "bool"),
        ([0.1, [0.2]], "different lengths"),
        (None, "object"),
        (np.full(1000, 0.99), "vanishes"),
    ],
)
def test_bad_betas(betas, message):
    with pytest.raises(ArgumentError, match=message):
        Schedule.from_betas(betas)


def test_too_many_betas():
    with pytest.raises(ArgumentError, match="1000001 values"):
        Schedule.from_betas(np.full(10**6 + 1, 1e-5))


@pytest.mark.parametrize("spacing", ["linspace_open", "karras", "exponential", "lambda", "beta"])
def test_one_timestep_has_no_places_between(spacing):
    with pytest.raises(ArgumentError, match=f"spacing: got '{spacing}' for T = 1, wants one of 'trailing', "):
        Schedule.cosine(1).timesteps(1, spacing=spacing)


def test_betas_or_both_factors():
    for tables in ({}, {"signal": [0.5]}, {"betas": [0.5], "signal": [0.5], "noise": [0.5]}):
        with pytest.raises(ArgumentError, match="betas, signal, noise: got another choice of them"):
            Schedule(**tables)


def test_karras_levels_end_at_the_last_one_however_small():
    steps = Schedule.from_betas([1e-300] + [0.3] * 19).timesteps(6, spacing="karras")
    assert (steps[0], steps[-1]) == (19, 0)


def test_a_signal_that_does_not_fall_cannot_be_brought_to_none():
    with pytest.warns(ScheduleWarning):
        schedule = Schedule.from_betas([1e-20] * 10)
    with pytest.raises(ArgumentError, match=r"schedule: got a signal that float64 does not see fall, wants larger"):
        schedule.zero_terminal_snr()
