"""Schedules, timesteps and whole sampler runs against the schedulers of diffusers.

Their tables are float32, and their DPM-Solver++ keeps its state in float32 too, so the tolerances here are
measured, not derived: each is about three times the largest difference seen over the configurations of its
test (torch 2.13 and diffusers 0.42 on a CPU).
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
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
    pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning"),  # "dpmsolver", which theirs wants to give up
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
        if getattr(scheduler, "final_alpha_cumprod", 1) != 1:  # of the first timestep
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]

    scheduler.set_timesteps(steps)
    if schedule is not None and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    x = torch.from_numpy(START if signal is None else START / signal)
    for i, t in enumerate(scheduler.timesteps):
        shown = x if signal is None else scheduler.scale_model_input(x, t)
        out = torch.from_numpy(model(shown.numpy(), round(float(t))))
        x = scheduler.step(out, t, x, **options(i)).prev_sample
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


def of_ratios(ratio):
    """The schedule with these noise / signal, the least first."""
    abar = 1 / (1 + np.asarray(ratio) ** 2)
    return Schedule(1 - abar / np.append(1, abar[:-1]))


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
        if name == "unipc":
            ours["uncorrected"] = tuple(rng.permutation(steps)[: rng.integers(3)].tolist())
            theirs["disable_corrector"] = [*ours["uncorrected"], 1000]
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


def run_once(name, kind, schedule, arguments, steps, ours, theirs, *, normals=None, signal=None, options=None):
    """Compare a whole run; `normals` are those that theirs draws, by row of theirs."""
    import diffusers

    prediction = ours["prediction"]
    scheduler = getattr(diffusers, kind)(**arguments, prediction_type=PREDICTIONS[prediction], **theirs)
    model = network(schedule, prediction)
    table = getattr(samplers, name)(schedule, steps, **ours)
    expected, timesteps = theirs_run(scheduler, steps, model, options or (lambda i: {}), signal, schedule)
    assert table.timesteps.tolist() == np.rint(timesteps).tolist()
    zeros = [0.0] * len(table)
    assert_near(ours_run(table, model, zeros if normals is None else normals), expected)


@pytest.mark.parametrize("seed", range(3))
def test_dpmsolver(seed):
    """In the noise, to the noise of t = 0, which is all that theirs does."""
    rng = np.random.default_rng((seed, 2))
    for kind, T, steps, spacing, prediction in configurations(9, ["linspace_open", "trailing"], seed):
        schedule, arguments = schedules(kind, T)
        order, solver = int(rng.integers(1, 4)), str(rng.choice(["midpoint", "heun"]))
        noisy = order < 3 and bool(rng.integers(2))
        drawn = torch_normals(steps)
        ours = {"order": order, "solver": solver, "published": True, "eta": float(noisy), "final": "sigma_min"}
        theirs = {
            "algorithm_type": "sde-dpmsolver" if noisy else "dpmsolver", "solver_order": order, "solver_type": solver,
            "final_sigmas_type": "sigma_min", "timestep_spacing": spacing.removesuffix("_open"),
        }  # fmt: skip
        ours["lower_order_final"] = 2 if steps < 15 else 0
        run_once(
            "dpmsolver", "DPMSolverMultistepScheduler", schedule, arguments, steps,
            {**ours, "spacing": spacing, "prediction": prediction}, theirs,
            normals=[z.numpy() for z in drawn] if noisy else None,
            options=(lambda i: {"variance_noise": drawn[i]}) if noisy else None,  # noqa: B023
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_unipc_of_the_noise(seed):
    rng = np.random.default_rng((seed, 3))
    for kind, T, steps, spacing, prediction in configurations(9, ["linspace_open", "trailing"], seed):
        schedule, arguments = schedules(kind, T)
        order, variant = int(rng.integers(1, 4)), str(rng.choice(["bh1", "bh2"]))
        ours = {"order": order, "variant": variant, "predict_x0": False, "final": "sigma_min", "lower_order_final": 2}
        theirs = {
            "predict_x0": False, "solver_order": order, "solver_type": variant, "final_sigmas_type": "sigma_min",
            "timestep_spacing": spacing.removesuffix("_open"),
        }  # fmt: skip
        run_once(
            "unipc", "UniPCMultistepScheduler", schedule, arguments, steps,
            {**ours, "spacing": spacing, "prediction": prediction}, theirs,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_singlestep(seed):
    rng = np.random.default_rng((seed, 4))
    for kind, T, steps, _, prediction in configurations(9, ["linspace_open"], seed):
        schedule, arguments = schedules(kind, T)
        order, solver = int(rng.integers(1, 4)), str(rng.choice(["midpoint", "heun"]))
        algorithm = str(rng.choice(["dpmsolver++", "dpmsolver"] + ["sde-dpmsolver++"] * (order < 3)))
        final = "sigma_min" if algorithm == "dpmsolver" else str(rng.choice(["zero", "sigma_min"]))
        ours = {"order": order, "solver": solver, "predict_x0": algorithm != "dpmsolver", "final": final}
        theirs = {
            "algorithm_type": algorithm, "solver_order": order, "solver_type": solver, "final_sigmas_type": final,
            "lower_order_final": final == "zero" or steps % order > 0,
        }  # fmt: skip
        noisy = algorithm.startswith("sde")
        normals = [z.numpy() for z in torch_normals(steps)]
        run_once(
            "dpmsolver_single", "DPMSolverSinglestepScheduler", schedule, arguments, steps,
            {**ours, "eta": float(noisy), "prediction": prediction}, theirs,
            normals=normals if noisy else None, options=(lambda i: {"generator": generator(i)}) if noisy else None,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_sa_solver(seed):
    rng = np.random.default_rng((seed, 5))
    for kind, T, steps, spacing, prediction in configurations(9, ["linspace_open", "trailing"], seed):
        schedule, arguments = schedules(kind, T)
        predictor, corrector = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        predict_x0, tau = bool(rng.integers(2)), float(rng.choice([0, 0.7, 1]))
        ours = {
            "predictor": predictor, "corrector": corrector, "predict_x0": predict_x0, "tau": tau, "final": "sigma_min",
            "lower_order_final": 2,
        }  # fmt: skip
        low, high = 0.2 * T, 0.8 * T
        theirs = {
            "predictor_order": predictor, "corrector_order": corrector,
            "algorithm_type": "data_prediction" if predict_x0 else "noise_prediction",
            "tau_func": lambda t: tau if low <= t <= high else 0,  # noqa: B023
            "timestep_spacing": spacing.removesuffix("_open"),
        }  # fmt: skip
        run_once(
            "sa_solver", "SASolverScheduler", schedule, arguments, steps,
            {**ours, "spacing": spacing, "prediction": prediction}, theirs,
            normals=[z.numpy() for z in torch_normals(steps)], options=lambda i: {"generator": generator(i)},
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_pndm(seed):
    """Of the noise; for v theirs takes a mean of v at several levels, and the noise from it and the present state."""
    for kind, T, steps, _, _ in configurations(9, ["leading"], seed):
        schedule, arguments = schedules(kind, T)
        run_once(
            "pndm", "PNDMScheduler", schedule, arguments, steps, {"spacing": "leading", "prediction": "noise"},
            {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "leading"},
        )  # fmt: skip


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_to_the_noise_of_the_first_timestep(name):
    """set_alpha_to_one=False: with "leading" spacing the last row stays where it is."""
    kind, theirs = {
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    }[name]
    for schedule_kind, T, steps, spacing, prediction in configurations(12, ["leading", "trailing"], 7):
        schedule, arguments = schedules(schedule_kind, T)
        if name == "pndm":
            prediction, spacing = "noise", "leading"
        ours = {"spacing": spacing, "prediction": prediction, "final": "sigma_min"}
        theirs = {**theirs, "set_alpha_to_one": False, "timestep_spacing": spacing}
        run_once(name, kind, schedule, arguments, steps, ours, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_ipndm(seed):
    """Theirs has levels of its own and predicts v; it is given ours, which are visited in all rows."""
    import torch
    from diffusers import IPNDMScheduler

    for kind, T, steps, spacing, _ in configurations(9, ["leading", "trailing"], seed):
        schedule, _ = schedules(kind, T)
        model = network(schedule, "v")
        table = samplers.ipndm(schedule, steps, spacing=spacing, prediction="v")
        scheduler = IPNDMScheduler()
        scheduler.set_timesteps(steps)
        scheduler.betas = torch.tensor([*schedule.noise[table.timesteps], 0.0])
        scheduler.alphas = torch.tensor([*schedule.signal[table.timesteps], 1.0])
        scheduler.timesteps = torch.tensor(table.timesteps.tolist())
        x = torch.from_numpy(START)
        for t in table.timesteps.tolist():
            x = scheduler.step(torch.from_numpy(model(x.numpy(), t)), t, x).prev_sample
        assert_near(ours_run(table, model, [0.0] * steps), x.numpy())


@pytest.mark.parametrize("seed", range(3))
def test_dpm2_ancestral(seed):
    """Theirs draws in every second row, and does not know x0 prediction."""
    for kind, T, steps, spacing, prediction in configurations(9, ["trailing", "leading"], seed):
        if prediction == "x0":
            continue
        schedule, arguments = schedules(kind, T)
        first = schedule.timesteps(steps, spacing=spacing)[0]
        run_once(
            "dpm2_ancestral", "KDPM2AncestralDiscreteScheduler", schedule, arguments, steps,
            {"spacing": spacing, "prediction": prediction}, {"timestep_spacing": spacing},
            normals=[z.numpy() for z in torch_normals(2 * steps)], signal=schedule.signal[first],
            options=lambda i: {"generator": generator(i)},
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_euler_ancestral(seed):
    """Theirs does not know x0 prediction, and keeps its state in float32."""
    for kind, T, steps, spacing, prediction in configurations(9, ["trailing", "leading"], seed):
        if prediction == "x0":
            continue
        schedule, arguments = schedules(kind, T)
        first = schedule.timesteps(steps, spacing=spacing)[0]
        run_once(
            "euler_ancestral", "EulerAncestralDiscreteScheduler", schedule, arguments, steps,
            {"spacing": spacing, "prediction": prediction}, {"timestep_spacing": spacing},
            normals=[z.numpy() for z in torch_normals(steps)], signal=schedule.signal[first],
            options=lambda i: {"generator": generator(i)},
        )  # fmt: skip


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_dpm2(prediction):
    """With levels even in the logarithm, so that middles are timesteps."""
    schedule = of_ratios(np.exp(np.linspace(-3, 3, 31)))
    arguments = {"num_train_timesteps": 31, "trained_betas": schedule.betas.tolist()}
    run_once(
        "dpm2", "KDPM2DiscreteScheduler", schedule, arguments, 16,
        {"spacing": "linspace", "prediction": prediction, "published": True}, {"timestep_spacing": "linspace"},
        signal=schedule.signal[-1],
    )  # fmt: skip


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_dpmpp_sde(prediction, monkeypatch):
    """With levels even in the logarithm, so that middles are timesteps, and given increments of a Brownian motion."""
    import torch

    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))  # only for noise of its own
    from diffusers.schedulers import scheduling_dpmsolver_sde

    ratio = np.exp(np.linspace(-3, 3, 31))
    schedule = of_ratios(ratio)
    table = samplers.dpmpp_sde(schedule, 16, spacing="linspace", prediction=prediction)
    scheduler = scheduling_dpmsolver_sde.DPMSolverSDEScheduler(
        num_train_timesteps=31, trained_betas=schedule.betas.tolist(), prediction_type=PREDICTIONS[prediction]
    )
    rng, steps = np.random.default_rng(0), ratio[::-1]
    increments = rng.normal(size=(30, *SHAPE)) * np.sqrt(steps[:-1] - steps[1:])[:, None, None, None]

    def between(sigma, sigma_next):
        i, j = (int(np.abs(np.log(steps) - np.log(float(level))).argmin()) for level in (sigma, sigma_next))
        return torch.from_numpy(increments[i:j].sum(axis=0) / np.sqrt(steps[i] - steps[j]))

    monkeypatch.setattr(scheduling_dpmsolver_sde, "BrownianTreeNoiseSampler", lambda *_: between)
    normals = []
    for i in range(0, 30, 2):  # the second stage has noise of its own beside that of the first
        first, whole = between(steps[i], steps[i + 1]).numpy(), between(steps[i], steps[i + 2]).numpy()
        share = np.sqrt((steps[i] - steps[i + 1]) / (steps[i] - steps[i + 2]))
        normals += [first, (whole - share * first) / np.sqrt(1 - share**2)]
    model = network(schedule, prediction)
    expected, timesteps = theirs_run(scheduler, 16, model, lambda i: {}, schedule.signal[-1], schedule)
    assert table.timesteps.tolist() == np.rint(timesteps).tolist()
    assert_near(ours_run(table, model, [*normals, 0.0]), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [5, 10, 25])
def test_methods_of_distilled_networks(prediction, steps):
    schedule, arguments = schedules("scaled_linear", 1000)
    drawn = {"normals": [z.numpy() for z in torch_normals(steps)], "options": lambda i: {"generator": generator(i)}}
    for scaling in (10.0, 1e-3):
        run_once(
            "lcm", "LCMScheduler", schedule, arguments, steps,
            {"prediction": prediction, "timestep_scaling": scaling}, {"timestep_scaling": scaling}, **drawn,
        )  # fmt: skip
    for eta in (0.0, 0.3, 1.0):
        drawn["options"] = lambda i: {"generator": generator(i), "eta": eta}  # noqa: B023
        run_once(
            "tcd", "TCDScheduler", schedule, arguments, steps,
            {"prediction": prediction, "eta": eta, "final": "sigma_min"}, {}, **drawn,
        )  # fmt: skip


def of_v(schedule):
    """`network`, of v: what networks with the scalings of EDM say, for data of deviation 1."""
    return network(schedule, "v")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_edm(name, seed):
    """v for data and levels divided by sigma_data, its sign turned where theirs calls it epsilon."""
    import diffusers
    import torch

    rng = np.random.default_rng((seed, 6))
    for _ in range(8):
        steps, deviation = int(rng.integers(4, 25)), rng.uniform(0.3, 1.5)
        final, kind = str(rng.choice(["zero", "sigma_min"])), str(rng.choice(["epsilon", "v_prediction"]))
        theirs = {
            "sigma_data": deviation, "sigma_min": 0.01, "sigma_max": 40.0, "rho": 6.0, "prediction_type": kind,
            "final_sigmas_type": final, "sigma_schedule": str(rng.choice(["karras", "exponential"])),
        }  # fmt: skip
        make, ours, noisy = samplers.euler, {}, False
        if name == "EDMDPMSolverMultistep":
            order, noisy, solver = int(rng.integers(1, 4)), bool(rng.integers(2)), str(rng.choice(["midpoint", "heun"]))
            order, lower = min(order, 2) if noisy else order, bool(rng.integers(2))
            solver = "midpoint" if order == 3 else solver  # of its second row
            theirs |= {
                "algorithm_type": "sde-dpmsolver++" if noisy else "dpmsolver++", "solver_order": order,
                "solver_type": solver, "lower_order_final": lower, "euler_at_final": True,
            }  # fmt: skip
            if order > 1:
                make, ours = samplers.dpmpp_2m, {"solver": solver}
                if order == 3:
                    make, ours = samplers.dpmpp_3m, {"published": True}
                ours |= {"eta": float(noisy), "lower_order_final": 2 if lower and steps < 15 else 1}
            elif noisy:
                make = samplers.euler_ancestral
        scheduler = getattr(diffusers, f"{name}Scheduler")(**theirs)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        if final == "sigma_min":  # which differs from the level before it by rounding only, and would add noise
            scheduler.sigmas[-1] = scheduler.sigmas[-2]
        schedule = of_ratios(scheduler.sigmas.numpy()[-2::-1] / deviation)
        table = make(schedule, steps, prediction="v", spacing="linspace", final=final, **ours)
        model = of_v(schedule)
        x = torch.from_numpy(START) * (scheduler.sigmas[0] ** 2 + deviation**2) ** 0.5
        for i, t in enumerate(scheduler.timesteps):
            out = model(scheduler.scale_model_input(x, t).numpy(), steps - 1 - i)
            out = torch.from_numpy(out if kind == "v_prediction" else -out)
            x = scheduler.step(out, t, x, **({"generator": generator(i)} if noisy else {})).prev_sample
        found = ours_run(table, model, [z.numpy() for z in torch_normals(steps)] if noisy else [0.0] * steps)
        level = schedule.signal[0] if final == "sigma_min" else 1.0
        assert_near(found / level * deviation, x.numpy())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [2, 4, 13, 40])
def test_consistency_models(steps, clip):
    import torch
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler(clip_denoised=clip, sigma_data=0.4)
    levels = scheduler.sigmas.numpy()[::-1]
    schedule = of_ratios(levels / 0.4)
    visited = 39 - np.arange(steps) * (40 // steps)
    table = samplers.consistency(schedule, steps, prediction="v", spacing=visited, clip=1 / 0.4 if clip else None)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(scheduler.sigmas[:-1], levels[visited], rtol=1e-6)
    model = of_v(schedule)
    x = torch.from_numpy(START) * (scheduler.sigmas[0] ** 2 + 0.4**2) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        out = -model(scheduler.scale_model_input(x, t).numpy(), visited[i])
        x = scheduler.step(torch.from_numpy(out), t, x, generator=generator(i)).prev_sample
    assert_near(0.4 * ours_run(table, model, [z.numpy() for z in torch_normals(steps)]), x.numpy())


def test_trigonometric_consistency_models():
    """SCM is `lcm` without its scalings, of v."""
    import torch
    from diffusers import SCMScheduler

    scheduler = SCMScheduler(sigma_data=0.5)
    angles = [1.56454, 1.3, 0.7, 0.2, 0.0]
    scheduler.set_timesteps(4, timesteps=angles, max_timesteps=None, intermediate_timesteps=None)
    schedule = of_ratios(np.tan(scheduler.timesteps.double().numpy()[-2::-1]))
    table = samplers.lcm(schedule, 4, prediction="v", spacing="linspace", timestep_scaling=np.inf)
    model, x = of_v(schedule), torch.from_numpy(START) * 0.5
    for i, t in enumerate(scheduler.timesteps[:-1]):
        out = torch.from_numpy(0.5 * model(x.numpy() / 0.5, 3 - i))
        x = scheduler.step(out, t, x, generator=generator(i))[0]
    normals = [torch.randn(SHAPE, generator=generator(i)).numpy() for i in range(4)]
    assert_near(0.5 * ours_run(table, model, normals), x.numpy())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["heun", "euler"])
def test_churn(name, prediction):
    """On levels of which every one raised by churn is one too; Euler's method is theirs uncorrected.

    The churn of their Euler schedulers is another: it shows the network the state without its noise.
    """
    import torch
    from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler

    steps, gain = 9, 1.2
    ratio = 0.01 * gain ** np.arange(46)
    schedule, visited = of_ratios(ratio), np.arange(44, 0, -5)
    churn = {"churn": (gain - 1) * steps, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.007}
    table = getattr(samplers, name)(schedule, steps, spacing=visited, prediction=prediction, **churn)
    scheduler = KarrasVeScheduler(s_churn=churn["churn"], s_min=0.05, s_max=10.0, s_noise=1.007)
    scheduler.num_inference_steps = steps
    model, x = network(schedule, "noise"), torch.from_numpy(START / schedule.signal[44])

    def out(x, level):
        t = int(np.abs(ratio - level).argmin())
        return torch.from_numpy(-model(x.numpy() * schedule.signal[t], t))

    normals = []
    for i, t in enumerate(visited):
        last = 0.0 if i + 1 == steps else ratio[visited[i + 1]]
        noised, level = scheduler.add_noise_to_input(x, float(ratio[t]), generator(i))
        x, slope = scheduler.step(out(noised, level), level, last, noised, return_dict=False)
        if last > 0 and name == "heun":
            x = scheduler.step_correct(out(x, last), level, last, noised, x, slope, return_dict=False)[0]
        if level > ratio[t]:
            normals.append(torch.randn(SHAPE, generator=generator(i)).numpy())
    assert 0 < len(normals) < steps
    drawn = iter(normals)
    found = ours_run(table, network(schedule, prediction), [next(drawn) if row.s > 0 else 0.0 for row in table.rows])
    assert_near(found, x.numpy())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "heun", "lcm", "LCM"])
def test_flow_matching(name, shift):
    """They are given our levels; their state is float32."""
    import diffusers
    import torch

    schedule, steps = Schedule.flow(1000, shift=shift), 20
    options = {"lcm": {"timestep_scaling": np.inf}, "heun": {"velocity": True}}.get(name.lower(), {})
    table = getattr(samplers, name.lower())(schedule, steps, prediction="velocity", spacing="trailing", **options)
    if name == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
        scheduler.sigma_min = 1 / steps  # it takes no levels, but those between two
        scheduler.set_timesteps(steps)
    elif name == "LCM":
        scheduler = diffusers.FlowMatchLCMScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=name == "lcm")
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())

    def model(x, t):
        x0 = np.tanh(0.6 * x + np.cos(3 * x) * t / schedule.T)
        return (x - x0) / schedule.noise[t]

    x = torch.from_numpy(START)
    for i, t in enumerate(scheduler.timesteps):
        at = int(np.abs(schedule.noise - float(t) / 1000).argmin())
        x = scheduler.step(torch.from_numpy(model(x.numpy(), at)), t, x, generator=generator(i)).prev_sample
    kind = torch.float64 if name == "LCM" else torch.float32
    normals = [torch.randn(SHAPE, generator=generator(i), dtype=kind).numpy() for i in range(2 * steps)]
    assert_near(ours_run(table, model, normals), x.numpy())


@pytest.mark.parametrize("name", list(scheduler_config.METHODS))
def test_configurations_that_they_write_are_read(name, tmp_path, monkeypatch):
    """With every key of theirs, the unusual defaults of some classes among them."""
    import diffusers

    where = diffusers
    if name == "DPMSolverSDEScheduler":
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))  # only for noise of its own
        from diffusers.schedulers import scheduling_dpmsolver_sde as where
    getattr(where, name)().save_pretrained(tmp_path)
    with warnings.catch_warnings(action="ignore", category=ConversionWarning):
        table = load_scheduler(tmp_path, 10)
    assert table.name in samplers.names()
    assert table.schedule.T == 1000
