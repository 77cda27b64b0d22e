"""What training aims at, and how fast: AdamW with clipping and a moving average, rates of the absolute step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any, Final, Self

from fastdiff.backends import AdamW
from fastdiff.errors import ArgumentError, check_choice, check_float, check_int

MOST_STEPS = 1 << 53  # they become floats
FLOOR = 0.01  # of the peak rate, where the decay ends
FASTEST = 1e15  # rate: beyond it one step can take float32 weights to infinity
WEIGHTINGS = ("uniform", "min_snr")
LR_PLANS = ("cosine", "constant", "one-cycle")
RISE, LOWEST, LAST = 0.3, 1 / 25, 1e-4 / 25  # of one cycle: share of its steps; rates at both ends over the peak's
LATER = {"weighting": "uniform", "snr_gamma": 5.0, "lr_plan": "cosine"}  # what 0.1.0 had not, and its meaning there


class Unset(Enum):
    """The default of an argument of which None is a value."""

    UNSET = "as before"

    def __repr__(self) -> str:
        return self.value


UNSET: Final = Unset.UNSET


@dataclass(frozen=True)
class TrainingPlan:
    """How fast to learn at which step, and what counts how much.

    Attributes
    ----------
    lr : float
        Peak learning rate.
    warmup : int
        The rate grows linearly over the steps 0 .. warmup - 1.
    decay_steps : int or None
        Absolute step at which a half cosine, which starts where the warm-up ends, reaches a hundredth of `lr`; it
        stays there. None: no decay. With "one-cycle" the step where the cycle, which starts at step 0, ends.
    clip_norm : float or None
        Bound on the norm of the gradient; None: no clipping.
    ema : float or None
        Decay of the moving average of the weights, approached as (1 + n) / (10 + n) after n updates; None: the
        average is the weights themselves.
    beta1, beta2, eps, weight_decay : float
        AdamW (Loshchilov and Hutter 2019), algorithm 2, decay multiplied by the rate.
    weighting : {"uniform", "min_snr"}
        Every squared error of the prediction counts 1; or what makes that of x0 count min(SNR, snr_gamma), with
        SNR = signal^2 / noise^2 (Hang et al. 2023, arXiv 2303.09556).
    snr_gamma : float
    lr_plan : {"cosine", "constant", "one-cycle"}
        How the rate goes: as `decay_steps` says; constant after the warm-up, whatever `decay_steps` is; or up from a
        25th of `lr` by half a cosine over the warm-up, by default 0.3 of the steps, and down by another one to a
        ten-thousandth of that (Smith and Topin 2019, with the numbers of PyTorch's OneCycleLR, and constant momentum).
    """

    lr: float = 1e-3
    warmup: int = 0
    decay_steps: int | None = None
    clip_norm: float | None = 1.0
    ema: float | None = 0.999
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    weighting: str = "uniform"
    snr_gamma: float = 5.0
    lr_plan: str = "cosine"

    def __post_init__(self) -> None:
        def settle(name: str, check: Callable[..., Any], *args: Any, **bounds: Any) -> None:
            """Keep what a check returns: a NumPy scalar passes it, and no file could hold that."""
            if getattr(self, name) is not None or name not in ("decay_steps", "clip_norm", "ema"):
                object.__setattr__(self, name, check(name, getattr(self, name), *args, **bounds))

        settle("lr", check_float, low=0, high=FASTEST, low_open=True)
        settle("warmup", check_int, low=0, high=MOST_STEPS)
        settle("decay_steps", check_int, low=1, high=MOST_STEPS)
        if self.decay_steps is not None and self.decay_steps <= self.warmup:
            raise ArgumentError("decay_steps", str(self.decay_steps), f"more than warmup, {self.warmup}")
        settle("clip_norm", check_float, low=0, low_open=True)
        for name in ("ema", "beta1", "beta2"):
            settle(name, check_float, low=0, high=1, high_open=True)
        settle("eps", check_float, low=0, low_open=True)
        settle("weight_decay", check_float, low=0)
        settle("weighting", check_choice, WEIGHTINGS)
        settle("snr_gamma", check_float, low=0, low_open=True)
        settle("lr_plan", check_choice, LR_PLANS)

    def changed(self, **options: Any) -> Self:
        """Return this plan with the options that are not `UNSET`."""
        return replace(self, **{name: value for name, value in options.items() if value is not UNSET})

    def check_named(self, lr_plan: Any, decay_steps: Any) -> None:
        """Refuse what was named (else `UNSET`) together with a number of steps, if it would do nothing."""
        if lr_plan == "constant" and isinstance(decay_steps, int):
            raise ArgumentError("decay_steps", str(decay_steps), "None with lr_plan='constant'")
        if self.decay_steps is None and (self.lr_plan == "one-cycle" or lr_plan == "cosine"):
            raise ArgumentError(
                "decay_steps", "None", f"with steps and lr_plan={self.lr_plan!r} the step where it ends"
            )

    def difference(self, other: TrainingPlan) -> str:
        """Return what another plan has that differs: ``lr 0.0001 (0.001 before)``."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return ", ".join(f"{name} {new} ({old} before)" for name, new, old in pairs if new != old)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.lr_plan == "one-cycle" and self.decay_steps is not None:
            rise = self.warmup or math.ceil(RISE * self.decay_steps)
            if step < rise:
                return self.lr * _half_cosine(LOWEST, 1.0, step / rise)
            return self.lr * _half_cosine(1.0, LAST, (step - rise) / max(1, self.decay_steps - rise))
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay_steps is None or self.lr_plan == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup) / (self.decay_steps - self.warmup))
        return self.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))

    def options(self, step: int, ema_updates: int) -> AdamW:
        """Return the scalars of the optimiser step that follows `step` steps and `ema_updates` averages."""
        return AdamW(
            rate=self.rate(step),
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            decay=self.weight_decay,
            correction1=1 - self.beta1 ** (step + 1),
            correction2=1 - self.beta2 ** (step + 1),
            clip_norm=math.inf if self.clip_norm is None else self.clip_norm,
            ema=0.0 if self.ema is None else min(self.ema, (1 + ema_updates) / (10 + ema_updates)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types; of what 0.1.0 had not, only what is not its usual value."""
        options = asdict(self)
        for names in (("weighting", "snr_gamma"), ("lr_plan",)):
            if _is_usual(self, *names):
                for name in names:
                    del options[name]
        return options

    @property
    def features(self) -> list[str]:
        """What a file that has this plan asks of its reader: names out of `fastdiff.checkpoint.FEATURES`."""
        names = [] if _is_usual(self, "weighting", "snr_gamma") else ["min snr"]
        return names if _is_usual(self, "lr_plan") else [*names, "rate plan"]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Return the plan of `to_dict`; an unknown or missing name raises `ArgumentError`."""
        known = [field.name for field in fields(cls)]
        if sorted({*LATER, *config}) != sorted(known):
            raise ArgumentError("training plan", f"keys {sorted(config)}", f"the keys {sorted(known)}")
        return cls(**config)


def _half_cosine(first: float, last: float, progress: float) -> float:
    """From the first value to the last, as half a cosine goes, and the last beyond."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _is_usual(plan: TrainingPlan, *names: str) -> bool:
    return all(getattr(plan, name) == LATER[name] for name in names)
