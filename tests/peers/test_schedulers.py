"""Schedules, timesteps and whole sampler runs against the schedulers of diffusers.

Their tables are float32, and their DPM-Solver++ keeps its state in float32 too, so the tolerances here are
measured, not derived: each is about three times the largest difference seen over the configurations of its
test (torch 2.13 and diffusers 0.42 on a CPU).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from fastdiff import samplers, scheduler_config
from fastdiff.errors import ConversionWarning
from fastdiff.interop import load_scheduler
from fastdiff.schedule import Schedule

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::fastdiff.errors.ScheduleWarning"),  # some begin or end far from noise
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # theirs, between NumPy and torch
]

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (2, 3, 4)
START = np.random.default_rng(0).normal(size=SHAPE)


def schedules(name: str, T: int) -> tuple[Schedule, dict[str, Any]]:
    """Our schedule and the arguments of theirs, the betas scaled to T."""
    ends = {"beta_start": 0.1 / T, "beta_end": 20 / T}
    ours = Schedule.cosine(T) if name == "cosine" else getattr(Schedule, name)(T, **ends)
    theirs = {"num_train_timesteps": T, **ends}
    if name == "sigmoid":  # which only their DDPM knows by name
        return ours, {**theirs, "trained_betas": ours.betas}
    return ours, {**theirs, "beta_schedule": SCHEDULES[name]}


def network(schedule: Schedule, prediction: str):
    """Some network in the form named, the same function of (x, t) whatever the form."""

    def model(x, t):
        alpha, sigma = schedule.signal[t], schedule.noise[t]
        x0 = np.tanh(0.6 * x + np.cos(3 * x) * t / schedule.T)
        noise = (x - alpha * x0) / sigma
        return {"x0": x0, "noise": noise, "v": alpha * noise - sigma * x0}[prediction]

    return model


def ours_run(table, model, normals):
    x, memory = START, (None, None, None)
    for i, (t, p, q, a, b, c1, c2, c3, e, s, _, _) in enumerate(table.rows):
        out = model(x, t)
        m = p * x + q * out
        if table.clip is not None:
            m = np.clip(m, *table.clip)
        x = a * x + b * m + e * out + s * normals[i]
        x = x + sum(c * kept for c, kept in zip((c1, c2, c3), memory, strict=True) if c)
        memory = (m, *memory[:2])
    return x


def theirs_run(scheduler, steps, model, options, signal=None, schedule=None):
    """The result of a scheduler's loop and its timesteps; `options` gives more arguments of step by row.

    Those that keep x / signal get it, and what the network is shown is scaled, but not the state. With a schedule
    theirs begins with its float64 numbers, for 1 - abar in float32 is wrong by 1e-4 of itself at t = 0, and computes in
    float64 with the levels that it has rounded.
    """
    import torch

    if schedule is not None:
        scheduler.alphas_cumprod = torch.tensor(schedule.alphas_bar)

    scheduler.set_timesteps(steps)
    if schedule is not None:
        scheduler.sigmas = scheduler.sigmas.double()
    x = torch.from_numpy(START if signal is None else START / signal)
    for i, t in enumerate(scheduler.timesteps):
        shown = x if signal is None else scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.from_numpy(model(shown.numpy(), int(t))), t, x, **options(i)).prev_sample
    return x.numpy(), scheduler.timesteps.tolist()


def generator(i: int):
    import torch

    return torch.Generator().manual_seed(1000 + i)


def torch_normals(steps: int):
    """What a step of theirs draws from `generator`."""
    import torch

    return [torch.randn(SHAPE, generator=generator(i), dtype=torch.float64) for i in range(steps)]


@pytest.mark.parametrize("T", [1000, 100])
@pytest.mark.parametrize("name", [*SCHEDULES, "sigmoid"])
def test_schedules(name, T):
    from diffusers import DDPMScheduler

    ours, arguments = schedules(name, T)
    arguments.pop("trained_betas", None)
    theirs = DDPMScheduler(**{**arguments, "beta_schedule": SCHEDULES.get(name, name)})
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.alphas_bar, theirs.alphas_cumprod.numpy(), rtol=4e-5)
    variance = [float(theirs._get_variance(t)) for t in range(T)]
    # 1 - abar_0 in float32 is off by 6e-8 / beta_0
    np.testing.assert_allclose(ours.posterior_variance, variance, rtol=2e-3, atol=1e-20)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [*SCHEDULES, "sigmoid"])
@pytest.mark.parametrize(
    ("T", "steps", "spacing", "variance", "clip"),
    [
        (100, 100, "leading", "small", None),
        (1000, 37, "linspace", "large", 1.0),
        (1000, 20, "trailing", "small", 0.8),
        (60, 7, "leading", "large", None),
    ],
)
def test_ddpm(T, steps, spacing, variance, clip, name, prediction):
    from diffusers import DDPMScheduler

    schedule, arguments = schedules(name, T)
    scheduler = DDPMScheduler(
        **arguments,
        variance_type=f"fixed_{variance}",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
    )
    model = network(schedule, prediction)
    table = samplers.ddpm(schedule, steps, variance=variance, clip=clip, prediction=prediction, spacing=spacing)
    expected, timesteps = theirs_run(scheduler, steps, model, lambda i: {"generator": generator(i)})
    assert table.timesteps.tolist() == timesteps
    normals = [z.numpy() for z in torch_normals(steps)]
    np.testing.assert_allclose(ours_run(table, model, normals), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [*SCHEDULES, "sigmoid"])
@pytest.mark.parametrize(
    ("T", "steps", "spacing", "eta", "clip"),
    [  # trailing only where T is a multiple of the steps: their previous timestep is t - T // n
        (100, 100, "leading", 0.0, None),
        (1000, 37, "leading", 0.0, 1.0),
        (1000, 20, "trailing", 0.5, 0.8),
        (60, 10, "trailing", 1.0, None),
    ],
)
def test_ddim(T, steps, spacing, eta, clip, name, prediction):
    from diffusers import DDIMScheduler

    schedule, arguments = schedules(name, T)
    scheduler = DDIMScheduler(
        **arguments,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
    )
    model, normals = network(schedule, prediction), torch_normals(steps)
    table = samplers.ddim(schedule, steps, eta=eta, clip=clip, prediction=prediction, spacing=spacing)
    expected, timesteps = theirs_run(
        scheduler, steps, model, lambda i: {"eta": eta, "variance_noise": normals[i]} if eta else {}
    )
    assert table.timesteps.tolist() == timesteps
    found = ours_run(table, model, [z.numpy() for z in normals])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [*SCHEDULES, "sigmoid"])
@pytest.mark.parametrize(
    ("T", "steps", "spacing", "final"),
    [
        (100, 30, "linspace_open", "zero"),
        (1000, 10, "linspace_open", "sigma_min"),
        (1000, 20, "trailing", "zero"),
        (60, 12, "trailing", "sigma_min"),
    ],
)
def test_dpmpp_2m(T, steps, spacing, final, name, prediction):
    from diffusers import DPMSolverMultistepScheduler

    schedule, arguments = schedules(name, T)
    scheduler = DPMSolverMultistepScheduler(
        **arguments,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing.removesuffix("_open"),
        lower_order_final=False,
        final_sigmas_type=final,
    )
    model = network(schedule, prediction)
    table = samplers.dpmpp_2m(schedule, steps, prediction=prediction, spacing=spacing, final=final)
    expected, timesteps = theirs_run(scheduler, steps, model, lambda i: {})
    assert table.timesteps.tolist() == timesteps
    np.testing.assert_allclose(ours_run(table, model, [0.0] * steps), expected, rtol=0, atol=5e-4)


# -- samplers that remember, or have two stages: random configurations ------------------------------------------

LIMIT = 2e-5  # of the largest value; their levels are float32 at last, and the state of some is


def configurations(count, spacings, seed):
    """(schedule's name, T, steps, spacing, prediction), the steps such that no spacing of theirs has fractions."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        T = int(rng.choice([100, 300, 1000]))
        steps = int(rng.choice([n for n in range(5, 41) if T % n == 0 and 2 * n < T]))
        name = str(rng.choice(["linear", "scaled_linear", "sigmoid"]))
        yield name, T, steps, str(rng.choice(spacings)), list(PREDICTIONS)[k % 3]


def assert_near(found, expected):
    assert np.abs(found - expected).max() < LIMIT * np.abs(expected).max()


MULTISTEP = {
    "unipc": ("UniPCMultistepScheduler", ("order", "variant", "final", "lower")),
    "deis": ("DEISMultistepScheduler", ("order", "lower")),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", ("solver", "final", "lower")),
    "dpmpp_2m sde": ("DPMSolverMultistepScheduler", ("solver", "final", "lower")),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", ("final", "lower")),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep(name, seed):
    import diffusers

    kind, choices = MULTISTEP[name]
    rng = np.random.default_rng((seed, 1))
    for kind_of_schedule, T, steps, spacing, prediction in configurations(9, ["linspace_open", "trailing"], seed):
        schedule, arguments = schedules(kind_of_schedule, T)
        order = int(rng.integers(1, 4)) if "order" in choices else 3 if name == "dpmpp_3m" else 2
        final = str(rng.choice(["zero", "sigma_min"])) if "final" in choices else "sigma_min"
        lower = bool(rng.integers(2)) or final == "zero"
        ours = {"final": final, "spacing": spacing, "prediction": prediction}
        theirs = {"prediction_type": PREDICTIONS[prediction], "timestep_spacing": spacing.removesuffix("_open")}
        theirs["lower_order_final"] = lower
        if name != "deis":
            theirs["final_sigmas_type"] = final
        # UniPC lowers the order of the last rows however many there are, the others below 15, the last one to no noise.
        short = lower and (name == "unipc" or steps < 15)
        ours["lower_order_final"] = 2 if short else 1 if final == "zero" else 0
        theirs["solver_order"] = order
        if name in ("unipc", "deis"):
            ours["order"] = order
        if "variant" in choices:  # with "bh1" their last row to no noise is NaN
            ours["variant"] = theirs["solver_type"] = str(rng.choice(["bh1", "bh2"])) if final != "zero" else "bh2"
        if "solver" in choices:
            ours["solver"] = theirs["solver_type"] = str(rng.choice(["midpoint", "heun"]))
        options, normals = (lambda i: {}), [0.0] * steps
        if name == "dpmpp_2m sde":
            ours["eta"], theirs["algorithm_type"] = 1.0, "sde-dpmsolver++"
            drawn = torch_normals(steps)
            options, normals = (lambda i: {"variance_noise": drawn[i]}), [z.numpy() for z in drawn]  # noqa: B023
        if name == "dpmpp_3m":
            ours["published"] = True
        scheduler = getattr(diffusers, kind)(**arguments, **theirs)
        model = network(schedule, prediction)
        table = getattr(samplers, name.removesuffix(" sde"))(schedule, steps, **ours)
        expected, timesteps = theirs_run(scheduler, steps, model, options, schedule=schedule)
        assert table.timesteps.tolist() == timesteps
        assert_near(ours_run(table, model, normals), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["euler", "heun", "lms"])
def test_methods_in_ratio(name, seed):
    import diffusers

    kind = {"euler": "EulerDiscrete", "heun": "HeunDiscrete", "lms": "LMSDiscrete"}[name]
    for kind_of_schedule, T, steps, spacing, prediction in configurations(9, ["trailing", "leading"], seed):
        schedule, arguments = schedules(kind_of_schedule, T)
        model = network(schedule, prediction)
        table = getattr(samplers, name)(schedule, steps, spacing=spacing, prediction=prediction)
        scheduler = getattr(diffusers, f"{kind}Scheduler")(
            **arguments, prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing
        )
        signal = schedule.signal[table.timesteps[0]]
        expected, timesteps = theirs_run(scheduler, steps, model, lambda i: {}, signal, schedule)
        assert table.timesteps.tolist() == timesteps
        assert_near(ours_run(table, model, [0.0] * len(table)), expected)


@pytest.mark.parametrize("name", list(scheduler_config.METHODS))
def test_configurations_that_they_write_are_read(name, tmp_path):
    """With every key of theirs, the unusual defaults of some classes among them."""
    import diffusers

    getattr(diffusers, name)().save_pretrained(tmp_path)
    with warnings.catch_warnings(action="ignore", category=ConversionWarning):
        table = load_scheduler(tmp_path, 10)
    assert table.name in samplers.names()
    assert table.schedule.T == 1000
