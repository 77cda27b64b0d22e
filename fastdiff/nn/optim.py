"""What training aims at, and how fast: AdamW with clipping and a moving average, rates of the absolute step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from fastdiff.backends import AdamW
from fastdiff.errors import ArgumentError, check_choice, check_float, check_int

MOST_STEPS = 1 << 53  # they become floats
FLOOR = 0.01  # of the peak rate, where the decay ends
WEIGHTINGS = ("uniform", "min_snr")


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
        stays there. None: no decay.
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

    def __post_init__(self) -> None:
        check_float("lr", self.lr, low=0, low_open=True)
        check_int("warmup", self.warmup, low=0, high=MOST_STEPS)
        decays = self.decay_steps is not None
        if decays and check_int("decay_steps", self.decay_steps, low=1, high=MOST_STEPS) <= self.warmup:
            raise ArgumentError("decay_steps", str(self.decay_steps), f"more than warmup, {self.warmup}")
        if self.clip_norm is not None:
            check_float("clip_norm", self.clip_norm, low=0, low_open=True)
        if self.ema is not None:
            check_float("ema", self.ema, low=0, high=1, high_open=True)
        for name in ("beta1", "beta2"):
            check_float(name, getattr(self, name), low=0, high=1, high_open=True)
        check_float("eps", self.eps, low=0, low_open=True)
        check_float("weight_decay", self.weight_decay, low=0)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_float("snr_gamma", self.snr_gamma, low=0, low_open=True)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay_steps is None:
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
        """Return the plan as JSON types; without the weighting where it is uniform, as 0.1.0 wrote it."""
        plan = asdict(self)
        if self.weighting == "uniform":
            del plan["weighting"], plan["snr_gamma"]
        return plan

    @property
    def features(self) -> list[str]:
        """What a file that has this plan asks of its reader: names out of `fastdiff.checkpoint.FEATURES`."""
        return [] if self.weighting == "uniform" else ["min snr"]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Return the plan of `to_dict`; an unknown or missing name raises `ArgumentError`."""
        known = [field.name for field in fields(cls)]
        if sorted({"weighting", "snr_gamma", *config}) != sorted(known):
            raise ArgumentError("training plan", f"keys {sorted(config)}", f"the keys {sorted(known)}")
        return cls(**config)
