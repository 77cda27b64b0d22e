"""scheduler_config.json of diffusers: the sampler that it stands for, and back.

A scheduler of diffusers is a schedule, a prediction and a method; our samplers are that for a number of steps. What a
configuration asks for and a table of ours does otherwise is warned of, with the key; a class that we do not have, or a
value that would change the mathematics, is an error.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from fastdiff import samplers
from fastdiff.errors import ArgumentError, ConversionWarning, check_choice, check_float, check_int, shown
from fastdiff.samplers import Sampler, options_of
from fastdiff.schedule import LOUDEST, Schedule

log = logging.getLogger("fastdiff")

PREDICTIONS = {"epsilon": "noise", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
LEVEL_KEYS = (
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
PLACED = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_lu_lambdas": "exponential",  # the same: lambda in equal steps, both ends included
    "use_beta_sigmas": "beta",
}
FEW_ROWS = 15
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
USUAL_BETAS = {
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
        ("linear", 0.00085, 0.012),
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), ("scaled_linear", 0.00085, 0.012)),
}  # those of the other classes: linear, 1e-4, 0.02
TWO_STAGES = ("heun", "dpm2", "dpm2_ancestral", "dpmpp_sde")
# their linspace leaves out t = 0
SKIP_ZERO = ("dpmpp_2m", "dpmpp_3m", "dpmsolver", "dpmsolver_single", "unipc", "deis", "sa_solver")
OFF: tuple[Any, ...] = (None, False, 0, [], {}, "")
# Whose noise levels follow from betas, and whose method is no table of ours.
LEVELS_ONLY = ("RePaintScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")


class _Config:
    """A configuration that is read key by key; what nobody asked for is found in the end."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = {key: value for key, value in content.items() if not key.startswith("_")}
        self.asked: set[str] = set(LEVEL_KEYS)
        self.notes: list[str] = []

    def take(self, key: str, usual: Any = None) -> Any:
        self.asked.add(key)
        return self.content.get(key, usual)

    def choice(self, key: str, usual: str, choices: tuple[str, ...]) -> str:
        return check_choice(key, self.take(key, usual), choices)

    def flag(self, key: str, usual: bool = False) -> bool:
        value = self.take(key, usual)
        if not isinstance(value, bool | None):
            raise ArgumentError(key, shown(value), "true or false")
        return bool(value)

    def number(self, key: str, usual: float | None = None) -> float | None:
        """The number of a key, checked whatever else is asked for; None: there is none."""
        value = self.take(key, usual)
        return None if value is None else check_float(key, value)

    def differs(self, key: str, what: str, usual: Any = None) -> None:
        """Note what is left undone, where the key is set to something else than `usual`."""
        value = self.take(key, usual)
        if value != usual and value not in OFF:
            self.notes.append(f"{key} = {value!r}: {what}")

    def refuse(self, key: str, wants: Any) -> None:
        value = self.take(key, wants)
        if value != wants and not (value in OFF and wants in OFF):
            raise ArgumentError(key, shown(value), f"{wants!r}: fastdiff does not have the other")

    def rest(self) -> None:
        """Refuse keys that nobody knows and that ask for something."""
        for key in sorted(self.content.keys() - self.asked):
            if self.content[key] not in OFF:
                raise ArgumentError(key, shown(self.content[key]), "a key that fastdiff knows, or none")
            log.info("%s = %r in a scheduler's configuration: unknown, left out", key, self.content[key])


Method = tuple[Callable[..., Sampler], dict[str, Any]]


def _spacing(c: _Config, T: int, steps: int, *, usual: str = "linspace", skips_zero: bool = False) -> str:
    if c.flag("use_flow_sigmas"):
        c.notes.append("use_flow_sigmas: its levels become those of timesteps; a network is told T sigma there, t here")
        c.take("timestep_spacing")
        return "linspace_open"
    for key, spacing in PLACED.items():
        if c.flag(key):
            how = "are quantiles of sigma there, of t here" if spacing == "beta" else "become those of timesteps"
            c.notes.append(f"{key}: its levels {how}")
            return spacing
    spacing = c.choice("timestep_spacing", usual, ("linspace", "leading", "trailing"))
    c.number("steps_offset")
    if spacing == "leading":
        c.differs("steps_offset", "the last timestep is 0 here", 0)
    if skips_zero and spacing == "leading":
        c.notes.append("timestep_spacing = 'leading': begins at the last timestep here, as 'linspace'")
    if not skips_zero and usual == "linspace" and spacing == "linspace" and (T - 1) % max(1, steps - 1):
        c.notes.append("timestep_spacing = 'linspace': fractions of timesteps are rounded here")
    return "linspace_open" if skips_zero and spacing != "trailing" else spacing


def _clip(c: _Config, usual: bool) -> float | None:
    c.differs("thresholding", "no dynamic thresholding; x0 is clipped as the caller says", False)
    for key in ("dynamic_thresholding_ratio", "sample_max_value"):
        c.number(key)
    reach = c.number("clip_sample_range", 1.0)
    return check_float("clip_sample_range", reach, low=0, low_open=True) if c.flag("clip_sample", usual) else None


def _maybe_flow(c: _Config) -> None:
    c.refuse("use_dynamic_shifting", False)
    for key in ("flow_shift", "time_shift_type"):
        c.take(key)
    if c.flag("use_flow_sigmas"):
        for key in PLACED:
            c.refuse(key, False)


def _lower(c: _Config, steps: int, final: str, *, always: bool = False, at_end: bool = False) -> int:
    """`lower_order_final`: theirs lower the last rows where there are few, and the last one to no noise."""
    if c.flag("lower_order_final", True) and (always or steps < FEW_ROWS):
        return 2
    return 1 if final == "zero" or at_end else 0


def _ddpm(c: _Config, T: int, steps: int) -> Method:
    kinds = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned_range"}
    if c.content.get("variance_type") == "learned":
        wants = "'learned_range', or a fixed one: fastdiff has a fraction between two variances, not one itself"
        raise ArgumentError("variance_type", "'learned'", wants)
    kinds |= {"fixed_small_log": "small", "fixed_large_log": "large"}
    variance = kinds[c.choice("variance_type", "fixed_small", tuple(kinds))]
    options = {"spacing": _spacing(c, T, steps, usual="leading"), "clip": _clip(c, True), "variance": variance}
    return samplers.ddpm, options


def _ddim(c: _Config, T: int, steps: int) -> Method:
    spacing = _spacing(c, T, steps, usual="leading")
    if spacing != "leading" and T % steps:
        c.notes.append(f"timestep_spacing = {spacing!r}: the timestep before is the one visited, not t - T // steps")
    return samplers.ddim, {"spacing": spacing, "clip": _clip(c, True), "final": _alpha_to_one(c, True)}


def _alpha_to_one(c: _Config, usual: bool) -> str:
    return "zero" if c.flag("set_alpha_to_one", usual) else "sigma_min"


def _euler(c: _Config, T: int, steps: int) -> Method:
    c.refuse("interpolation_type", "linear")
    c.refuse("timestep_type", "discrete")
    for key in ("sigma_min", "sigma_max"):
        c.differs(key, "the levels are those of the schedule")
    final = c.choice("final_sigmas_type", "zero", ("zero", "sigma_min"))
    return samplers.euler, {"spacing": _spacing(c, T, steps), "final": final}


def _euler_ancestral(c: _Config, T: int, steps: int) -> Method:
    return samplers.euler_ancestral, {"spacing": _spacing(c, T, steps)}


def _heun(c: _Config, T: int, steps: int) -> Method:
    return samplers.heun, {"spacing": _spacing(c, T, steps), "clip": _clip(c, False)}


def _lms(c: _Config, T: int, steps: int) -> Method:
    return samplers.lms, {"spacing": _spacing(c, T, steps)}


def _dpm2(c: _Config, T: int, steps: int) -> Method:
    c.notes.append("KDPM2DiscreteScheduler: the middle of a step becomes a timestep, and its weights follow")
    return samplers.dpm2, {"spacing": _spacing(c, T, steps)}


def _dpm2_ancestral(c: _Config, T: int, steps: int) -> Method:
    return samplers.dpm2_ancestral, {"spacing": _spacing(c, T, steps)}


def _sde(c: _Config, T: int, steps: int) -> Method:
    c.notes.append("DPMSolverSDEScheduler: the middle of a step becomes a timestep")
    c.differs("noise_sampler_seed", "noise is that of a seed and a sample's number")
    return samplers.dpmpp_sde, {"spacing": _spacing(c, T, steps)}


def _pndm(c: _Config, T: int, steps: int) -> Method:
    if not c.flag("skip_prk_steps"):
        c.notes.append(
            "skip_prk_steps = False: starts by Heun's method, as if it were true, and not by Runge and Kutta's"
        )
    if c.content.get("prediction_type") == "v_prediction":
        c.notes.append("prediction_type = 'v_prediction': the noise is what is remembered here, not v")
    spacing = _spacing(c, T, steps, usual="leading")
    if spacing != "leading" and T % steps:
        c.notes.append(f"timestep_spacing = {spacing!r}: the timestep before is the one visited, not t - T // steps")
    return samplers.pndm, {"spacing": spacing, "final": _alpha_to_one(c, False)}


def _distilled(c: _Config, T: int, steps: int) -> str:
    """The spacing of LCM and TCD, which choose among the timesteps of the distillation."""
    for key in ("timestep_spacing", "set_alpha_to_one"):
        c.take(key)
    c.number("steps_offset")
    original = check_int("original_inference_steps", c.take("original_inference_steps", 50), low=1, high=T)
    chosen = np.floor(np.linspace(0, original, min(steps, original), endpoint=False)).astype(np.int64)
    theirs = (np.arange(1, original + 1) * (T // original) - 1)[::-1][chosen]
    if not np.array_equal(theirs, np.rint(T * np.arange(steps, 0, -1) / steps) - 1):
        c.notes.append(f"original_inference_steps = {original}: timesteps are even here, not those of the distillation")
    return "trailing"


def _lcm(c: _Config, T: int, steps: int) -> Method:
    scaling = check_float("timestep_scaling", c.take("timestep_scaling", 10.0), low=0)
    spacing = _distilled(c, T, steps)
    return samplers.lcm, {"spacing": spacing, "clip": _clip(c, False), "timestep_scaling": scaling}


def _tcd(c: _Config, T: int, steps: int) -> Method:
    c.take("timestep_scaling")
    spacing = _distilled(c, T, steps)
    return samplers.tcd, {"spacing": spacing, "clip": _clip(c, False), "final": "sigma_min"}


def _flow(c: _Config, T: int, steps: int) -> str:
    """The spacing of a flow's scheduler."""
    for key in ("use_dynamic_shifting", "invert_sigmas", "shift_terminal", *PLACED):
        c.refuse(key, False)
    keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type", "upscale_mode")
    for key in keys:
        c.take(key)
    c.notes.append("a network is told T sigma there, and t, which is T sigma - 1 without a shift, here")
    if check_float("shift", c.take("shift", 1.0), low=0, low_open=True) != 1:
        c.notes.append("shift: the lowest level is shifted twice there")
    elif (T - 1) % max(1, steps - 1):
        c.notes.append("fractions of timesteps are rounded here")
    return "linspace"


def _flow_euler(c: _Config, T: int, steps: int) -> Method:
    spacing = _flow(c, T, steps)
    if c.flag("stochastic_sampling"):
        return samplers.lcm, {"spacing": spacing, "timestep_scaling": math.inf}
    return samplers.euler, {"spacing": spacing}


def _flow_lcm(c: _Config, T: int, steps: int) -> Method:
    c.refuse("scale_factors", None)
    return samplers.lcm, {"spacing": _flow(c, T, steps), "timestep_scaling": math.inf}


def _flow_heun(c: _Config, T: int, steps: int) -> Method:
    return samplers.heun, {"spacing": _flow(c, T, steps), "velocity": True}


def _final(c: _Config) -> str:
    _maybe_flow(c)
    lowest = c.take("lambda_min_clipped")
    if lowest not in (None, -math.inf) and check_float("lambda_min_clipped", lowest) > -1e10:
        c.notes.append(f"lambda_min_clipped = {lowest!r}: no timestep is left out")
    c.differs("variance_type", "the learned variance is not used")
    final = c.choice("final_sigmas_type", "zero", ("zero", "sigma_min"))
    if c.flag("use_flow_sigmas"):
        c.refuse("final_sigmas_type", "zero")
    return final


def _multistep(c: _Config, T: int, steps: int) -> Method:
    kinds = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    kind = c.choice("algorithm_type", "dpmsolver++", kinds)
    order = check_int("solver_order", c.take("solver_order", 2), low=1, high=3)
    solver = c.choice("solver_type", "midpoint", ("midpoint", "heun"))
    final = _final(c)
    _clip(c, False)
    lower = _lower(c, steps, final, at_end=c.flag("euler_at_final"))
    options: dict[str, Any] = {"spacing": _spacing(c, T, steps, skips_zero=True), "final": final}
    noisy = kind.startswith("sde")
    if not kind.endswith("++"):
        if noisy and order == 3:
            raise ArgumentError("solver_order", "3 with 'sde-dpmsolver'", "1 or 2: there is no method of order 3")
        options |= {"order": order, "eta": float(noisy), "solver": solver, "lower_order_final": lower}
        return samplers.dpmsolver, {**options, "published": True}
    if order == 1:
        return (samplers.euler_ancestral if noisy else samplers.ddim), options
    options |= {"eta": float(noisy), "lower_order_final": lower}
    if order == 2:
        return samplers.dpmpp_2m, {**options, "solver": solver}
    if noisy:
        c.notes.append("solver_order = 3 with 'sde-dpmsolver++': its second difference has the wrong sign there")
    if solver == "heun":
        c.notes.append("solver_type = 'heun' with solver_order 3: the second row is of the midpoint form")
    return samplers.dpmpp_3m, {**options, "published": True}


def _singlestep(c: _Config, T: int, steps: int) -> Method:
    kind = c.choice("algorithm_type", "dpmsolver++", ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"))
    order = check_int("solver_order", c.take("solver_order", 2), low=1, high=3)
    final = _final(c)
    _clip(c, False)
    if c.flag("lower_order_final") and final == "sigma_min" and steps % order == 0 and order > 1:
        c.notes.append("lower_order_final = True: not where the last row leads to some noise")
    return samplers.dpmsolver_single, {
        "order": order,
        "eta": float(kind.startswith("sde")),
        "solver": c.choice("solver_type", "midpoint", ("midpoint", "heun")),
        "predict_x0": kind.endswith("++"),
        "spacing": _spacing(c, T, steps, skips_zero=True),
        "final": final,
    }


def _sa(c: _Config, T: int, steps: int) -> Method:
    kind = c.choice("algorithm_type", "data_prediction", ("data_prediction", "noise_prediction"))
    c.refuse("tau_func", None)
    _maybe_flow(c)
    _clip(c, False)
    for key in ("lambda_min_clipped", "variance_type"):
        c.differs(key, "is left out", -math.inf if key.startswith("lambda") else None)
    return samplers.sa_solver, {
        "between": (min(200 / T, 1.0), min(800 / T, 1.0)),
        "predictor": check_int("predictor_order", c.take("predictor_order", 2), low=1, high=3),
        "corrector": check_int("corrector_order", c.take("corrector_order", 2), low=1, high=4),
        "predict_x0": kind == "data_prediction",
        "lower_order_final": 2 if c.flag("lower_order_final", True) else 0,
        "spacing": _spacing(c, T, steps, skips_zero=True),
        "final": "sigma_min",
    }


def _unipc(c: _Config, T: int, steps: int) -> Method:
    c.refuse("solver_p", None)
    skipped = c.take("disable_corrector") or ()
    if not isinstance(skipped, (list, tuple)):
        raise ArgumentError("disable_corrector", shown(skipped), "a list of numbers of steps")
    skipped = [check_int("disable_corrector", step, low=0) for step in skipped]
    for key in ("sigma_min", "sigma_max", "shift_terminal"):
        c.differs(key, "the levels are those of the schedule")
    final = _final(c)
    _clip(c, False)
    return samplers.unipc, {
        "order": check_int("solver_order", c.take("solver_order", 2), low=1, high=3),
        "variant": c.choice("solver_type", "bh2", ("bh1", "bh2")),
        "predict_x0": c.flag("predict_x0", True),
        "uncorrected": tuple(step for step in skipped if step < steps),
        "lower_order_final": _lower(c, steps, final, always=True),
        "spacing": _spacing(c, T, steps, skips_zero=True),
        "final": final,
    }


def _deis(c: _Config, T: int, steps: int) -> Method:
    c.refuse("algorithm_type", "deis")
    c.refuse("solver_type", "logrho")
    _maybe_flow(c)
    _clip(c, False)
    return samplers.deis, {
        "order": check_int("solver_order", c.take("solver_order", 2), low=1, high=3),
        "lower_order_final": _lower(c, steps, "sigma_min"),
        "spacing": _spacing(c, T, steps, skips_zero=True),
        "final": "sigma_min",
    }


METHODS: dict[str, Callable[[_Config, int, int], Method]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DDPMParallelScheduler": _ddpm,
    "DDIMParallelScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "HeunDiscreteScheduler": _heun,
    "LMSDiscreteScheduler": _lms,
    "KDPM2DiscreteScheduler": _dpm2,
    "DPMSolverMultistepScheduler": _multistep,
    "DPMSolverSinglestepScheduler": _singlestep,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "KDPM2AncestralDiscreteScheduler": _dpm2_ancestral,
    "DPMSolverSDEScheduler": _sde,
    "PNDMScheduler": _pndm,
    "SASolverScheduler": _sa,
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "FlowMatchLCMScheduler": _flow_lcm,
}


def schedule_of(content: Mapping[str, Any]) -> tuple[Schedule, str]:
    """Schedule and prediction of a configuration; one without a class is taken for DDPM's."""
    kind = check_choice("_class_name", content.get("_class_name", "DDPMScheduler"), [*METHODS, *LEVELS_ONLY])
    name, first, last = USUAL_BETAS.get(kind, ("linear", 1e-4, 0.02))
    c = {
        "num_train_timesteps": 1000, "beta_schedule": name, "beta_start": first, "beta_end": last,
        "trained_betas": None, "prediction_type": "epsilon", "rescale_betas_zero_snr": False, **content,
    }  # fmt: skip
    if kind in FLOWS:
        return Schedule.flow(c["num_train_timesteps"], shift=c.get("shift", 1.0)), "velocity"
    prediction = PREDICTIONS[check_choice("prediction_type", c["prediction_type"], PREDICTIONS)]
    if c.get("use_flow_sigmas"):
        return Schedule.flow(c["num_train_timesteps"], shift=c.get("flow_shift", 1.0)), prediction
    if prediction == "velocity":
        raise ArgumentError("prediction_type", "'flow_prediction'", "another one, without use_flow_sigmas")
    kinds = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
    name, T = check_choice("beta_schedule", c["beta_schedule"], kinds), c["num_train_timesteps"]
    if c["trained_betas"] is not None:
        schedule = Schedule.from_betas(c["trained_betas"])
    elif name == "squaredcos_cap_v2":
        schedule = Schedule.cosine(T)
    else:
        schedule = getattr(Schedule, name)(T, beta_start=c["beta_start"], beta_end=c["beta_end"])
    return schedule.zero_terminal_snr() if c["rescale_betas_zero_snr"] else schedule, prediction


def table(
    content: Mapping[str, Any], schedule: Schedule, prediction: str, steps: int, options: Mapping[str, Any]
) -> tuple[Sampler, list[str]]:
    """The sampler of a configuration for so many steps, `options` before its own; and what it does otherwise."""
    kind = content.get("_class_name", "DDPMScheduler")
    c = _Config(content)
    make, chosen = METHODS[check_choice("_class_name", kind, METHODS)](c, schedule.T, steps)
    c.rest()
    known = options_of(make).keys() - {"prediction"}
    for name in options.keys() - known:
        wants = f"an option of {make.__name__}: {', '.join(sorted(known))}"
        raise ArgumentError(name, shown(options[name]), wants)
    if chosen["spacing"] in ("karras", "exponential") and "spacing" not in options:  # theirs begin at T - 1
        chosen["spacing"] = schedule.timesteps(steps, spacing=chosen["spacing"], sigma_max=math.inf)
        steps = len(chosen["spacing"])
    return make(schedule, steps, prediction=prediction, **{**chosen, **options}), c.notes


# -- back ----------------------------------------------------------------------------------------------------


def config_of(sampler: Sampler) -> dict[str, Any]:
    """The configuration whose table a sampler is: see `fastdiff.interop.save_scheduler`."""
    if not isinstance(sampler, Sampler):
        raise ArgumentError("sampler", type(sampler).__name__, "a table from fastdiff.samplers")
    levels = _level_keys(sampler.schedule, sampler.prediction)
    found = _found(sampler)
    if found is None:
        raise _without(sampler)
    content, notes = found
    for note in notes:
        warnings.warn(note, ConversionWarning, stacklevel=3)
    if content["_class_name"] in FLOWS:
        if sampler.prediction != "velocity":
            raise ArgumentError("prediction", shown(sampler.prediction), "'velocity', as flows have it there")
        return {**content, "num_train_timesteps": sampler.schedule.T, "shift": levels["flow_shift"]}
    return {**content, **levels}


def _found(sampler: Sampler) -> tuple[dict[str, Any], list[str]] | None:
    """The first configuration that stands for a table, and what is done otherwise."""
    for content, steps in _candidates(sampler):
        with warnings.catch_warnings(action="ignore"):
            placed = next((name for key, name in PLACED.items() if key in content), None)
            usual = options_of(getattr(samplers, sampler.name))["spacing"]
            capped = sampler.options.get("spacing", usual) == placed
            try:
                given = {"spacing": placed} if capped and placed else {}
                made, notes = table(content, sampler.schedule, sampler.prediction, steps, given)
            except ArgumentError:
                continue
            if given and placed != "beta":
                notes.append(f"spacing = {placed!r}: its loudest level is {LOUDEST:g} here, that of T - 1 there")
        if made.rows == sampler.rows and (made.clip == sampler.clip or "clip_sample" not in content):
            if made.clip != sampler.clip:
                notes.append(f"clip = {sampler.clip}: {content['_class_name']} clips no x0")
            return content, notes
    return None


def _without(sampler: Sampler) -> ArgumentError:
    """What is said of a table that no scheduler stands for: the option that keeps it from being one."""
    known, name = dict(sampler.options), sampler.name
    steps = known.pop("steps", None)
    if name not in samplers.names() or steps is None:
        return ArgumentError("sampler", shown(sampler), "a table that a scheduler of diffusers stands for")
    make = getattr(samplers, name)
    usual = {key: value for key, value in options_of(make).items() if key != "prediction"}
    trials = [(key, {**known, key: usual[key]}) for key in known]
    if "published" in usual and not known.get("published"):
        trials.append(("published", {**known, "published": True}))
    for key, values in (("final", ("sigma_min", "zero")), ("spacing", ("linspace", "leading", "trailing"))):
        if key in usual:
            trials += [(key, {**known, key: value}) for value in values if value != known.get(key, usual[key])]
    with warnings.catch_warnings(action="ignore"):
        for key, options in trials:
            try:
                other = make(sampler.schedule, steps, prediction=sampler.prediction, **options)
            except ArgumentError:
                continue
            if _found(other) is not None:
                got, wants = known.get(key, usual[key]), f"{options[key]!r}, or another that diffusers has: it has no"
                return ArgumentError(key, shown(got), f"{wants} {name} with this one")
    if known:
        got = ", ".join(f"{key}={value!r}" for key, value in known.items())
        return ArgumentError(", ".join(known), f"{name} with {got}", "options that a scheduler of diffusers has")
    return ArgumentError("sampler", shown(sampler), f"one that diffusers has: no scheduler of it is {name} like this")


def _candidates(sampler: Sampler) -> Iterator[tuple[dict[str, Any], int]]:
    """Configurations and numbers of steps that a sampler of this name may come from, the plainest first."""
    clips: list[dict[str, Any]] = [{"clip_sample": False}]
    if sampler.clip is not None and sampler.clip[0] == -sampler.clip[1]:
        clips = [{"clip_sample": True, "clip_sample_range": sampler.clip[1]}]
    finals = [{"final_sigmas_type": final} for final in ("zero", "sigma_min")]
    to_one = [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}]
    orders = [{"solver_order": order} for order in (1, 2, 3)]
    lower = [{"lower_order_final": True}, {"lower_order_final": False}]
    sde = [{"algorithm_type": kind} for kind in ("dpmsolver++", "sde-dpmsolver++")]
    noises = [{"algorithm_type": kind} for kind in ("dpmsolver", "sde-dpmsolver")]
    pairs = [{"solver_type": kind} for kind in ("midpoint", "heun")]
    both = [{"solver_type": kind} for kind in ("bh2", "bh1")]
    of_x0 = [{"predict_x0": True}, {"predict_x0": False}]
    variances = [{"variance_type": kind} for kind in ("fixed_small", "fixed_large", "learned_range")]
    adams: list[list[dict[str, Any]]] = [
        [{"algorithm_type": kind} for kind in ("data_prediction", "noise_prediction")],
        [{"predictor_order": order} for order in (1, 2, 3)],
        [{"corrector_order": order} for order in (1, 2, 3, 4)],
        lower,
    ]
    skips = [{"disable_corrector": list(sampler.options.get("uncorrected", ()))}]
    ends = [*lower, {"lower_order_final": False, "euler_at_final": True}]
    singles: list[list[dict[str, Any]]] = [orders, [*sde, *noises[:1]], pairs, finals]
    kinds: dict[str, tuple[str, list[list[dict[str, Any]]]]] = {
        "ddpm": ("DDPMScheduler", [variances, clips]),
        "ddim": ("DDIMScheduler", [clips, to_one]),
        "euler": ("EulerDiscreteScheduler", [finals]),
        "euler_ancestral": ("EulerAncestralDiscreteScheduler", []),
        "heun": ("HeunDiscreteScheduler", [clips]),
        "lms": ("LMSDiscreteScheduler", []),
        "dpm2": ("KDPM2DiscreteScheduler", []),
        "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", []),
        "dpmpp_sde": ("DPMSolverSDEScheduler", []),
        "pndm": ("PNDMScheduler", [[{"skip_prk_steps": True}], to_one]),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", [orders[1:2], sde, pairs, finals, ends]),
        "dpmpp_3m": ("DPMSolverMultistepScheduler", [orders[2:], sde, finals, ends]),
        "dpmsolver": ("DPMSolverMultistepScheduler", [orders, noises, pairs, finals[1:], ends]),
        "dpmsolver_single": ("DPMSolverSinglestepScheduler", singles),
        "sa_solver": ("SASolverScheduler", adams),
        "lcm": ("LCMScheduler", [clips, [{"timestep_scaling": sampler.options.get("timestep_scaling", 10.0)}]]),
        "tcd": ("TCDScheduler", [clips]),
        "unipc": ("UniPCMultistepScheduler", [orders, both, of_x0, finals, lower, skips]),
        "deis": ("DEISMultistepScheduler", [orders, lower]),
    }
    flow = sampler.schedule.kind == "flow"
    if flow:
        straight = {"ddim": [], "euler": [], "lcm": [[{"stochastic_sampling": True}]]}
        kinds = {
            **{name: kind for name, kind in kinds.items() if name in SKIP_ZERO},
            **{name: ("FlowMatchEulerDiscreteScheduler", options) for name, options in straight.items()},
            "heun": ("FlowMatchHeunDiscreteScheduler", []),
        }
    if sampler.name not in kinds:
        return
    kind, choices = kinds[sampler.name]
    for spacing, steps in _flow_spacings(sampler) if flow else _spacings(sampler):
        for parts in product(*choices):
            content: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.35.0", **spacing}
            for part in parts:
                content.update(part)
            yield content, steps


def _visited(sampler: Sampler) -> Any:
    """The timesteps from which steps begin."""
    t = sampler.timesteps
    if sampler.name == "pndm":
        return np.unique(t)[::-1]
    if sampler.name not in TWO_STAGES:
        return t
    if sampler.options.get("velocity"):
        return t[::2]
    return t[::2] if sampler.rows[1].depth else np.append(t[0], t[1::2])  # from noise alone there is one stage


def _flow_spacings(sampler: Sampler) -> Iterator[tuple[dict[str, Any], int]]:
    if sampler.name in SKIP_ZERO:
        yield {"use_flow_sigmas": True}, len(sampler.timesteps)
    else:
        yield {}, len(_visited(sampler))


def _spacings(sampler: Sampler) -> Iterator[tuple[dict[str, Any], int]]:
    """Spacings and numbers of steps that lead to a sampler's timesteps; of more steps, where some fall together."""
    schedule, visited = sampler.schedule, _visited(sampler)
    count = len(visited)
    if sampler.name in ("lcm", "tcd"):
        even = [n for n in range(50, 0, -1) if n % count == 0 and schedule.T % n == 0]
        yield {"original_inference_steps": even[0] if even else count}, count
        return
    options: list[dict[str, Any]] = [{"timestep_spacing": name} for name in ("linspace", "trailing", "leading")]
    options += [{key: True} for key in PLACED if key != "use_lu_lambdas"]
    for option in options:
        most = count if "timestep_spacing" in option else min(schedule.T, 2 * count + 8)
        for steps in range(count, most + 1):
            c = _Config(option)
            spacing = _spacing(c, schedule.T, steps, skips_zero=sampler.name in SKIP_ZERO)
            for loudest in (math.inf, LOUDEST):
                try:
                    if np.array_equal(schedule.timesteps(steps, spacing=spacing, sigma_max=loudest), visited):
                        yield dict(option), steps
                        break
                except ArgumentError:
                    continue


def _level_keys(schedule: Schedule, prediction: str) -> dict[str, Any]:
    """The keys of a schedule, its betas themselves where no name gives them, and of a prediction."""
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    named = {"prediction_type": theirs[prediction]}
    if schedule.kind == "flow":
        shift = float(schedule.noise[0] / schedule.signal[0] * (schedule.T - 1))
        shift = round(shift, 9) or shift
        made = Schedule.flow(schedule.T, shift=shift) if schedule.name == "flow" and 0.01 <= shift <= 100 else None
        if made is None or not np.allclose(made.noise, schedule.noise, rtol=1e-9, atol=0):
            raise ArgumentError("sampler", f"a table of {schedule!r}", "one of Schedule.flow, or of betas")
        return {"num_train_timesteps": schedule.T, "flow_shift": shift, **named}
    if prediction == "velocity":
        wants = "'noise', 'x0' or 'v': they have velocity ('flow_prediction') for flows only"
        raise ArgumentError("prediction", "'velocity'", wants)
    return {**_betas(schedule), **named}


def _betas(schedule: Schedule) -> dict[str, Any]:
    if schedule.signal[-1] == 0:  # theirs take no beta of 1 but for this flag, which changes nothing here
        betas = schedule.betas.tolist()
        return {"num_train_timesteps": schedule.T, "trained_betas": betas, "rescale_betas_zero_snr": True}
    T, ends = schedule.T, {"beta_start": float(schedule.betas[0]), "beta_end": float(schedule.betas[-1])}
    with warnings.catch_warnings(action="ignore"):
        for ours, theirs in (("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")):
            try:
                made = Schedule.cosine(T) if ours == "cosine" else getattr(Schedule, ours)(T, **ends)
            except ArgumentError:  # ends of another law, between which this one has no levels
                continue
            if np.allclose(made.betas, schedule.betas, rtol=1e-12, atol=0):
                return {"num_train_timesteps": T, "beta_schedule": theirs, **(ends if ours != "cosine" else {})}
    return {"num_train_timesteps": T, "trained_betas": schedule.betas.tolist()}
