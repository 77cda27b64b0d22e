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
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule

log = logging.getLogger("fastdiff")

PREDICTIONS = {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}
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
TWO_STAGES = ("heun", "dpm2", "dpmpp_2s")
SKIP_ZERO = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "unipc", "deis")  # their linspace leaves out t = 0
OFF: tuple[Any, ...] = (None, False, 0, [], {}, "")
# Whose noise levels follow from betas, and whose method is no table of ours.
LEVELS_ONLY = (
    "PNDMScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler", "DPMSolverSDEScheduler", "RePaintScheduler",
    "KDPM2AncestralDiscreteScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler",
)  # fmt: skip


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
    for key, spacing in PLACED.items():
        if c.flag(key):
            how = "are quantiles of sigma there, of t here" if spacing == "beta" else "become those of timesteps"
            c.notes.append(f"{key}: its levels {how}")
            return spacing
    spacing = c.choice("timestep_spacing", usual, ("linspace", "leading", "trailing"))
    if spacing == "leading":
        c.differs("steps_offset", "the last timestep is 0 here", 0)
    else:
        c.take("steps_offset")
    if skips_zero and spacing == "leading":
        c.notes.append("timestep_spacing = 'leading': begins at the last timestep here, as 'linspace'")
    if not skips_zero and usual == "linspace" and spacing == "linspace" and (T - 1) % max(1, steps - 1):
        c.notes.append("timestep_spacing = 'linspace': fractions of timesteps are rounded here")
    return "linspace_open" if skips_zero and spacing != "trailing" else spacing


def _clip(c: _Config, usual: bool) -> float | None:
    c.differs("thresholding", "no dynamic thresholding; x0 is clipped as the caller says", False)
    for key in ("dynamic_thresholding_ratio", "sample_max_value"):
        c.take(key)
    reach = c.take("clip_sample_range", 1.0)
    return check_float("clip_sample_range", reach, low=0, low_open=True) if c.flag("clip_sample", usual) else None


def _no_flow(c: _Config) -> None:
    c.refuse("use_flow_sigmas", False)
    c.refuse("use_dynamic_shifting", False)
    for key in ("flow_shift", "time_shift_type"):
        c.take(key)


def _lower(c: _Config, steps: int, final: str, *, always: bool = False, usual: bool = True) -> int:
    """`lower_order_final`: theirs lower the last rows where there are few, and the last one to no noise."""
    if c.flag("lower_order_final", usual) and (always or steps < FEW_ROWS):
        return 2
    return 1 if final == "zero" else 0


def _ddpm(c: _Config, T: int, steps: int) -> Method:
    kinds = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned_range"}
    kinds |= {"fixed_small_log": "small", "fixed_large_log": "large"}
    variance = kinds[c.choice("variance_type", "fixed_small", tuple(kinds))]
    options = {"spacing": _spacing(c, T, steps, usual="leading"), "clip": _clip(c, True), "variance": variance}
    return samplers.ddpm, options


def _ddim(c: _Config, T: int, steps: int) -> Method:
    spacing = _spacing(c, T, steps, usual="leading")
    if spacing != "leading" and T % steps:
        c.notes.append(f"timestep_spacing = {spacing!r}: the timestep before is the one visited, not t - T // steps")
    if not c.flag("set_alpha_to_one", True):
        c.notes.append("set_alpha_to_one = False: the last row leads to no noise here")
    return samplers.ddim, {"spacing": spacing, "clip": _clip(c, True)}


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


def _final(c: _Config, T: int) -> str:
    _no_flow(c)
    lowest = c.take("lambda_min_clipped")
    if lowest not in (None, -math.inf) and check_float("lambda_min_clipped", lowest) > -1e10:
        c.notes.append(f"lambda_min_clipped = {lowest!r}: no timestep is left out")
    c.differs("variance_type", "the learned variance is not used")
    c.differs("euler_at_final", "the last row is of first order only where it leads to no noise", False)
    return c.choice("final_sigmas_type", "zero", ("zero", "sigma_min"))


def _multistep(c: _Config, T: int, steps: int) -> Method:
    kind = c.choice("algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++"))
    order = check_int("solver_order", c.take("solver_order", 2), low=1, high=3)
    solver = c.choice("solver_type", "midpoint", ("midpoint", "heun"))
    final = _final(c, T)
    _clip(c, False)
    lower = _lower(c, steps, final)
    options: dict[str, Any] = {"spacing": _spacing(c, T, steps, skips_zero=True), "final": final}
    if order == 1:
        return (samplers.ddim if kind == "dpmsolver++" else samplers.euler_ancestral), options
    options |= {"eta": 1.0 if kind.startswith("sde") else 0.0, "lower_order_final": lower}
    if order == 2:
        return samplers.dpmpp_2m, {**options, "solver": solver}
    if kind.startswith("sde"):
        c.notes.append("solver_order = 3 with 'sde-dpmsolver++': its second difference has the wrong sign there")
    if solver == "heun":
        c.notes.append("solver_type = 'heun' with solver_order 3: the second row is of the midpoint form")
    return samplers.dpmpp_3m, {**options, "published": True}


def _singlestep(c: _Config, T: int, steps: int) -> Method:
    c.refuse("algorithm_type", "dpmsolver++")
    c.refuse("solver_order", 2)
    c.refuse("solver_type", "midpoint")
    c.take("lower_order_final")
    final = _final(c, T)
    _clip(c, False)
    c.notes.append(
        "DPMSolverSinglestepScheduler: a step there is one evaluation, and two timesteps are one step of ours"
    )
    return samplers.dpmpp_2s, {"spacing": _spacing(c, T, steps, skips_zero=True), "final": final}


def _unipc(c: _Config, T: int, steps: int) -> Method:
    c.refuse("predict_x0", True)
    c.refuse("solver_p", None)
    c.differs("disable_corrector", "every row is corrected", [])
    for key in ("sigma_min", "sigma_max", "shift_terminal"):
        c.differs(key, "the levels are those of the schedule")
    final = _final(c, T)
    _clip(c, False)
    return samplers.unipc, {
        "order": check_int("solver_order", c.take("solver_order", 2), low=1, high=3),
        "variant": c.choice("solver_type", "bh2", ("bh1", "bh2")),
        "lower_order_final": _lower(c, steps, final, always=True),
        "spacing": _spacing(c, T, steps, skips_zero=True),
        "final": final,
    }


def _deis(c: _Config, T: int, steps: int) -> Method:
    c.refuse("algorithm_type", "deis")
    c.refuse("solver_type", "logrho")
    _no_flow(c)
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
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "HeunDiscreteScheduler": _heun,
    "LMSDiscreteScheduler": _lms,
    "KDPM2DiscreteScheduler": _dpm2,
    "DPMSolverMultistepScheduler": _multistep,
    "DPMSolverSinglestepScheduler": _singlestep,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
}


def check_class(content: Mapping[str, Any]) -> None:
    """Refuse a scheduler whose noise levels are not those of its betas; one without a class is taken for DDPM's."""
    check_choice("_class_name", content.get("_class_name", "DDPMScheduler"), [*METHODS, *LEVELS_ONLY])
    for key in ("use_flow_sigmas", "use_dynamic_shifting"):
        if content.get(key):
            raise ArgumentError(key, shown(content[key]), "false: fastdiff reads no flow from a scheduler")


def table(
    content: Mapping[str, Any], schedule: Schedule, prediction: str, steps: int, options: Mapping[str, Any]
) -> tuple[Sampler, list[str]]:
    """The sampler of a configuration for so many steps, `options` before its own; and what it does otherwise."""
    kind = content.get("_class_name", "DDPMScheduler")
    c = _Config(content)
    make, chosen = METHODS[check_choice("_class_name", kind, METHODS)](c, schedule.T, steps)
    c.rest()
    known = (make.__kwdefaults__ or {}).keys() - {"prediction"}
    for name in options.keys() - known:
        wants = f"an option of {make.__name__}: {', '.join(sorted(known))}"
        raise ArgumentError(name, shown(options[name]), wants)
    return make(schedule, steps, prediction=prediction, **{**chosen, **options}), c.notes


# -- back ----------------------------------------------------------------------------------------------------


def config_of(sampler: Sampler) -> dict[str, Any]:
    """The configuration whose table a sampler is: see `fastdiff.interop.save_scheduler`."""
    if not isinstance(sampler, Sampler):
        raise ArgumentError("sampler", type(sampler).__name__, "a table from fastdiff.samplers")
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    levels = {
        **_betas(sampler.schedule),
        "prediction_type": theirs[check_choice("prediction", sampler.prediction, theirs)],
    }
    for content, steps in _candidates(sampler):
        with warnings.catch_warnings(action="ignore"):
            try:
                found, notes = table(content, sampler.schedule, sampler.prediction, steps, {})
            except ArgumentError:
                continue
        if found.rows == sampler.rows and (found.clip == sampler.clip or "clip_sample" not in content):
            if found.clip != sampler.clip:
                notes.append(f"clip = {sampler.clip}: {content['_class_name']} clips no x0")
            for note in notes:
                warnings.warn(note, ConversionWarning, stacklevel=3)
            return {**content, **levels}
    raise ArgumentError("sampler", shown(sampler), "a table that a scheduler of diffusers stands for")


def _candidates(sampler: Sampler) -> Iterator[tuple[dict[str, Any], int]]:
    """Configurations and numbers of steps that a sampler of this name may come from, the plainest first."""
    clips: list[dict[str, Any]] = [{"clip_sample": False}]
    if sampler.clip is not None and sampler.clip[0] == -sampler.clip[1]:
        clips = [{"clip_sample": True, "clip_sample_range": sampler.clip[1]}]
    finals = [{"final_sigmas_type": final} for final in ("zero", "sigma_min")]
    orders = [{"solver_order": order} for order in (1, 2, 3)]
    lower = [{"lower_order_final": True}, {"lower_order_final": False}]
    sde = [{"algorithm_type": kind} for kind in ("dpmsolver++", "sde-dpmsolver++")]
    pairs = [{"solver_type": kind} for kind in ("midpoint", "heun")]
    both = [{"solver_type": kind} for kind in ("bh2", "bh1")]
    kinds: dict[str, tuple[str, list[list[dict[str, Any]]]]] = {
        "ddpm": (
            "DDPMScheduler",
            [[{"variance_type": kind} for kind in ("fixed_small", "fixed_large", "learned_range")], clips],
        ),
        "ddim": ("DDIMScheduler", [clips]),
        "euler": ("EulerDiscreteScheduler", [finals]),
        "euler_ancestral": ("EulerAncestralDiscreteScheduler", []),
        "heun": ("HeunDiscreteScheduler", [clips]),
        "lms": ("LMSDiscreteScheduler", []),
        "dpm2": ("KDPM2DiscreteScheduler", []),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", [orders[1:2], sde, pairs, finals, lower]),
        "dpmpp_3m": ("DPMSolverMultistepScheduler", [orders[2:], sde, finals, lower]),
        "dpmpp_2s": ("DPMSolverSinglestepScheduler", [finals]),
        "unipc": ("UniPCMultistepScheduler", [orders, both, finals, lower]),
        "deis": ("DEISMultistepScheduler", [orders, lower]),
    }
    if sampler.name not in kinds:
        return
    kind, choices = kinds[sampler.name]
    for spacing, steps in _spacings(sampler):
        for parts in product(*choices):
            content: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.35.0", **spacing}
            for part in parts:
                content.update(part)
            yield content, steps


def _spacings(sampler: Sampler) -> Iterator[tuple[dict[str, Any], int]]:
    """Spacings and numbers of steps that lead to a sampler's timesteps; of more steps, where some fall together."""
    schedule, visited = sampler.schedule, sampler.timesteps[:: 2 if sampler.name in TWO_STAGES else 1]
    count = len(visited)
    options: list[dict[str, Any]] = [{"timestep_spacing": name} for name in ("linspace", "trailing", "leading")]
    options += [{key: True} for key in PLACED if key != "use_lu_lambdas"]
    for option in options:
        most = count if "timestep_spacing" in option else min(schedule.T, 2 * count + 8)
        for steps in range(count, most + 1):
            c = _Config(option)
            spacing = _spacing(c, schedule.T, steps, skips_zero=sampler.name in SKIP_ZERO)
            try:
                if np.array_equal(schedule.timesteps(steps, spacing=spacing), visited):
                    yield dict(option), steps
            except ArgumentError:
                continue


def _betas(schedule: Schedule) -> dict[str, Any]:
    """The keys of a schedule, its betas themselves where no name gives them."""
    if schedule.kind == "flow":
        raise ArgumentError("sampler", f"a table of {schedule!r}", "one of a schedule that is made of betas")
    if schedule.signal[-1] == 0:  # theirs take no beta of 1 but for this flag, which changes nothing here
        betas = schedule.betas.tolist()
        return {"num_train_timesteps": schedule.T, "trained_betas": betas, "rescale_betas_zero_snr": True}
    T, ends = schedule.T, {"beta_start": float(schedule.betas[0]), "beta_end": float(schedule.betas[-1])}
    with warnings.catch_warnings(action="ignore"):
        for ours, theirs in (("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")):
            made = Schedule.cosine(T) if ours == "cosine" else getattr(Schedule, ours)(T, **ends)
            if np.allclose(made.betas, schedule.betas, rtol=1e-12, atol=0):
                return {"num_train_timesteps": T, "beta_schedule": theirs, **(ends if ours != "cosine" else {})}
    return {"num_train_timesteps": T, "trained_betas": schedule.betas.tolist()}
