"""Noise schedules: float64 tables built once, the timesteps a sampler visits, and the doctor.

A schedule is its betas; every other table follows from them by multiplication, addition and square roots
alone, which IEEE arithmetic fixes to the bit, so a schedule stored by its betas is the same on every machine
(`log_snr`, which no sampler of one step reads, goes through the logarithm of the platform).
"""

from __future__ import annotations

import logging
import math
import reprlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, ScheduleWarning, check_array, check_choice, check_float, check_int

log = logging.getLogger("fastdiff")

Array = npt.NDArray[np.float64]

MAX_T = 1_000_000  # far above any use; a mistyped T must not ask for terabytes
END_LIMIT = 0.01  # abar[-1] above this: the chain does not end near noise
SPACINGS = ("trailing", "leading", "linspace", "linspace_open", "karras", "exponential", "lambda", "beta")
KARRAS_RHO, BETA_SHAPE = 7.0, 0.6  # Karras et al. 2022, table 1; Lee et al. 2024
_NAMES = ("linear", "scaled_linear", "cosine", "sigmoid", "custom")


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The noise levels of a diffusion of T steps, t = 0 .. T - 1, as read-only float64 tables.

    One step of the forward chain is ``x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z`` (Ho et al. 2020,
    equation 2) and a jump from the data is ``x_t = signal_t x_0 + noise_t z`` (equation 4), where abar before
    t = 0 counts as 1.

    Use the classmethods: they name the schedule and let the doctor speak. The constructor itself is silent,
    for tables that are being restored.

    Parameters
    ----------
    betas : (T,) array_like
        Variance added by each step, each above 0 and below 1.
    name : str, optional
        Which constructor made it: "linear", "scaled_linear", "cosine", "sigmoid" or "custom".

    Attributes
    ----------
    T : int
        Number of steps.
    betas, alphas, alphas_bar : (T,) float64
        beta_t, 1 - beta_t, and the running product of the alphas.
    signal, noise : (T,) float64
        sqrt(alphas_bar) and sqrt(1 - alphas_bar). The latter comes from the forward variance
        ``v_t = alpha_t v_{t-1} + beta_t``, a sum of positive terms, and so stays exact to rounding where
        alphas_bar is close to 1.
    posterior_variance : (T,) float64
        Variance of q(x_{t-1} | x_t, x_0), beta_t (1 - abar_{t-1}) / (1 - abar_t) (Ho et al. 2020,
        equation 7); 0 at t = 0.
    log_snr : (T,) float64
        log(abar / (1 - abar)), falling.

    Raises
    ------
    ArgumentError
        If the betas are not a non-empty row of at most a million finite numbers inside (0, 1), if abar
        falls below what float64 can hold, or if the name is unknown.
    """

    betas: Array
    name: str = "custom"
    T: int = field(init=False)
    alphas: Array = field(init=False)
    alphas_bar: Array = field(init=False)
    signal: Array = field(init=False)
    noise: Array = field(init=False)
    posterior_variance: Array = field(init=False)
    log_snr: Array = field(init=False)

    def __post_init__(self) -> None:
        check_choice("name", self.name, _NAMES)
        betas = check_array("betas", self.betas, shape=(None,), dtype=np.float64).copy()
        if not 1 <= betas.size <= MAX_T:
            raise ArgumentError("betas", f"{betas.size} values", f"between 1 and {MAX_T} values")
        outside = np.flatnonzero((betas <= 0) | (betas >= 1))
        if outside.size:
            raise ArgumentError("betas", f"{betas[outside[0]]} at index {outside[0]}", "numbers above 0 and below 1")
        alphas = 1 - betas
        alphas_bar = np.cumprod(alphas)
        if alphas_bar[-1] < np.finfo(np.float64).tiny:
            raise ArgumentError("betas", "a product of (1 - beta) that vanishes in float64", "fewer or smaller betas")
        variance = np.empty_like(betas)
        previous = 0.0
        for t in range(betas.size):
            variance[t] = previous = alphas[t] * previous + betas[t]
        posterior_variance = np.append(0.0, variance[:-1]) / variance * betas
        tables = {
            "betas": betas,
            "alphas": alphas,
            "alphas_bar": alphas_bar,
            "signal": np.sqrt(alphas_bar),
            "noise": np.sqrt(variance),
            "posterior_variance": posterior_variance,
            "log_snr": np.log(alphas_bar) - np.log(variance),
        }
        object.__setattr__(self, "T", betas.size)
        for name, table in tables.items():
            table.setflags(write=False)
            object.__setattr__(self, name, table)

    # -- constructors --------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, T: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas on a straight line from `beta_start` to `beta_end` (Ho et al. 2020, section 4).

        Parameters
        ----------
        T : int, optional
            Number of steps, 1 to 1000000. The default betas are made for 1000; for another T scale both
            by 1000 / T.
        beta_start, beta_end : float, optional
            First and last beta, inside (0, 1).

        Returns
        -------
        Schedule

        Raises
        ------
        ArgumentError
            If T or a beta is out of range.

        Warns
        -----
        ScheduleWarning
            If the schedule does not end near noise; see `diagnose`.
        """
        T, first, last = _checked_ramp(T, beta_start, beta_end)
        return _advised(cls(np.linspace(first, last, T), "linear"))

    @classmethod
    def scaled_linear(cls, T: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas whose square roots lie on a straight line (Rombach et al. 2022, latent diffusion).

        Parameters, errors and warnings as for `linear`.
        """
        T, first, last = _checked_ramp(T, beta_start, beta_end)
        return _advised(cls(np.linspace(math.sqrt(first), math.sqrt(last), T) ** 2, "scaled_linear"))

    @classmethod
    def cosine(cls, T: int = 1000) -> Schedule:
        """The cosine schedule (Nichol & Dhariwal 2021, equation 17), betas capped at 0.999.

        beta_i = 1 - f((i + 1) / T) / f(i / T) with f(u) = cos^2((u + 0.008) / 1.008 * pi / 2). It ends near
        noise for every T.

        Parameters
        ----------
        T : int, optional
            Number of steps, 1 to 1000000.

        Returns
        -------
        Schedule

        Raises
        ------
        ArgumentError
            If T is out of range.
        """
        T = check_int("T", T, low=1, high=MAX_T)
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * (np.pi / 2)) ** 2
        return _advised(cls(np.minimum(1 - f[1:] / f[:-1], 0.999), "cosine"))

    @classmethod
    def sigmoid(cls, T: int, *, beta_start: float, beta_end: float) -> Schedule:
        """Betas on a logistic curve: ``sigmoid(linspace(-6, 6, T)) (beta_end - beta_start) + beta_start``.

        The schedule of the curve tutorial is ``Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)``.

        Parameters
        ----------
        T : int
            Number of steps, 1 to 1000000.
        beta_start, beta_end : float
            The two levels that the curve runs between, inside (0, 1).

        Returns, errors and warnings as for `linear`.
        """
        T, first, last = _checked_ramp(T, beta_start, beta_end)
        rise = 1 / (1 + np.exp(-np.linspace(-6, 6, T)))
        return _advised(cls(rise * (last - first) + first, "sigmoid"))

    @classmethod
    def from_betas(cls, betas: npt.ArrayLike) -> Schedule:
        """A schedule from betas of your own.

        Parameters
        ----------
        betas : (T,) array_like
            Real numbers above 0 and below 1.

        Returns
        -------
        Schedule

        Raises
        ------
        ArgumentError
            As the class says.

        Warns
        -----
        ScheduleWarning
            If the schedule does not end near noise; see `diagnose`.
        """
        return _advised(cls(check_array("betas", betas)))

    # -- what it answers -----------------------------------------------------------------------------------

    def timesteps(self, steps: int, *, spacing: str = "trailing") -> npt.NDArray[np.int64]:
        """The timesteps that a sampler of `steps` steps visits, strictly descending.

        Parameters
        ----------
        steps : int
            How many, n: 1 to T, or 1 to T - 1 for "linspace_open".
        spacing : str, optional
            Which n of the T (Lin et al. 2024, table 2, names the first three):

            - "trailing": round(T (n - i) / n) - 1 for i = 0 .. n - 1. Begins at T - 1.
            - "leading": multiples of T // n, from 0. Begins below T - 1, where the state may be far from
              noise.
            - "linspace": round(linspace(0, T - 1, n)), both ends included (one step: T - 1).
            - "linspace_open": round(linspace(0, T - 1, n + 1)) without the 0, as DPM-Solver++ wants it.

            The others place n levels, at least 2, each of which becomes the nearest timestep. Levels that fall on one
            timestep are visited once, so that fewer than n may be left, which is logged. With rho = noise / signal:

            - "karras": rho^(1/7) in equal steps, from that of T - 1 to that of 0 (Karras et al. 2022, equation 5).
            - "exponential": log(rho) in equal steps, both ends included.
            - "lambda": n equal steps of lambda = -log(rho), their end at t = 0 left out, as DPM-Solver has it.
            - "beta": quantiles of a Beta(0.6, 0.6) law in t, both ends included (Lee et al. 2024): dense at both.

        Returns
        -------
        (n,) int64
            Fewer for the last four, where levels fall together.

        Raises
        ------
        ArgumentError
            If `steps` or `spacing` is none of these, or if fewer than two timesteps are left.
        """
        check_choice("spacing", spacing, SPACINGS)
        if spacing == "linspace_open" and self.T == 1:
            raise ArgumentError("spacing", "'linspace_open' for T = 1", "another spacing, or T of at least 2")
        if spacing in SPACINGS[4:]:
            return _placed(self, check_int("steps", steps, low=2, high=self.T), spacing)
        n = check_int("steps", steps, low=1, high=self.T - 1 if spacing == "linspace_open" else self.T)
        if spacing == "trailing":
            ascending = np.rint(self.T * np.arange(1, n + 1) / n) - 1
        elif spacing == "leading":
            ascending = np.arange(n, dtype=np.float64) * (self.T // n)
        elif spacing == "linspace" and n > 1:
            ascending = np.rint(np.linspace(0, self.T - 1, n))
        else:  # linspace_open, and linspace of a single step
            ascending = np.rint(np.linspace(0, self.T - 1, n + 1))[1:]
        return np.asarray(ascending[::-1], dtype=np.int64)

    def diagnose(self) -> list[str]:
        """The doctor: what is legal about this schedule and probably not meant.

        Returns
        -------
        list of str
            One plain sentence or two for each finding, with advice; empty for a sound schedule. The first
            finding, an end that is not noise, is also raised as a `ScheduleWarning` when a schedule is
            made by one of the classmethods.
        """
        found = []
        end = float(self.alphas_bar[-1])
        if end > END_LIMIT:
            # Betas k times as large, or k times as many steps, bring log(abar) to k times what it is.
            k = math.ceil(10 * math.log(END_LIMIT / 2) / math.log(end)) / 10 if end < 1 else math.inf
            ways = [f"Schedule.cosine({self.T})"]
            if k * self.T <= MAX_T:
                ways.insert(0, f"about {math.ceil(k * self.T)} steps")
            if k * self.betas.max() < 1:
                ways.insert(0, f"betas about {k:g} times as large")
            found.append(
                f"the schedule does not end in noise: abar is {end:.3g} at the last of {self.T} steps and "
                f"should be at most {END_LIMIT:g}, so sampling from pure noise starts off the mark. "
                f"Take {', or '.join(ways)}."
            )
        if end < 1e-12:
            found.append(
                f"abar falls to {end:.3g}: there x0 is read from a noise prediction through a factor of "
                f"{1 / self.signal[-1]:.1e}, beyond float32. "
                "Predict 'v' or 'x0', or take fewer steps or smaller betas."
            )
        if self.noise[0] > 0.3:
            found.append(
                f"the first step already adds noise of standard deviation {self.noise[0]:.2g}: "
                "finer detail is never seen by the network. Take a smaller first beta."
            )
        if (np.diff(self.betas) < 0).any():
            t = int(np.flatnonzero(np.diff(self.betas) < 0)[0]) + 1
            found.append(f"the betas fall at t = {t}. They usually rise all the way: is the order right?")
        return found

    # -- identity and storage ------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The schedule as a dictionary that JSON can hold: its name and its betas.

        The betas are stored even where the name would give them: exp and cos may differ in the last bit from
        one machine to the next, and JSON keeps every float64 exactly.
        """
        return {"name": self.name, "betas": self.betas.tolist()}

    @classmethod
    def from_dict(cls, stored: Any) -> Schedule:
        """Restore what `to_dict` gave, bit for bit; silently, for the doctor spoke when it was made.

        Parameters
        ----------
        stored : dict
            With the keys "name" and "betas" and no others.

        Returns
        -------
        Schedule

        Raises
        ------
        ArgumentError
            If it is anything else.
        """
        wants = "a dictionary with the keys 'name' and 'betas'"
        if not isinstance(stored, dict):
            raise ArgumentError("schedule", type(stored).__name__, wants)
        if set(stored) != {"name", "betas"}:
            raise ArgumentError("schedule", f"the keys {reprlib.repr(sorted(map(str, stored)))}", wants)
        return cls(check_array("betas", stored["betas"]), stored["name"])

    def __eq__(self, other: object) -> bool:
        """Whether both have the same betas to the bit, and so the same tables; names do not count."""
        if not isinstance(other, Schedule):
            return NotImplemented
        return np.array_equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash(self.betas.tobytes())

    def __repr__(self) -> str:
        return (
            f"<Schedule {self.name}: T={self.T}, betas {self.betas[0]:.3g} .. {self.betas[-1]:.3g}, "
            f"abar ends at {self.alphas_bar[-1]:.3g}>"
        )

    def __reduce__(self) -> tuple[Callable[..., Schedule], tuple[Array, str]]:
        return Schedule, (self.betas, self.name)


def _placed(schedule: Schedule, n: int, spacing: str) -> npt.NDArray[np.int64]:
    """The timesteps nearest to n levels, descending, each once: see `Schedule.timesteps`."""
    log_ratio = -schedule.log_snr[np.isfinite(schedule.log_snr)] / 2
    pure = schedule.T - len(log_ratio)  # a last step without signal is always visited
    top, low, ramp = log_ratio[-1], log_ratio[0], np.linspace(0, 1, n - pure)
    if spacing == "beta":
        from scipy.special import betaincinv

        placed = betaincinv(BETA_SHAPE, BETA_SHAPE, 1 - ramp) * (len(log_ratio) - 1)
    else:
        if spacing == "karras":
            first, last = np.exp(top / KARRAS_RHO), np.exp(low / KARRAS_RHO)
            levels = KARRAS_RHO * np.log(first + ramp * (last - first))
        elif spacing == "exponential":
            levels = top + ramp * (low - top)
        else:
            levels = np.linspace(top, low, n - pure + 1)[:-1]
        placed = np.interp(levels, log_ratio, np.arange(len(log_ratio)))
    t = np.unique(np.append(np.rint(placed), schedule.T - 1).astype(np.int64))[::-1]
    if spacing == "lambda":
        t = t[t > 0]
    if len(t) < 2:
        raise ArgumentError("spacing", f"{spacing!r}, which leaves {len(t)} timestep of {n}", "another, or more steps")
    if len(t) < n:
        log.info(
            "%r spacing: %d of %d levels fall on timesteps that others have, %d are left",
            spacing,
            n - len(t),
            n,
            len(t),
        )
    return np.asarray(t, np.int64)


def _checked_ramp(T: int, beta_start: float, beta_end: float) -> tuple[int, float, float]:
    first, last = (
        check_float(name, beta, low=0, high=1, low_open=True, high_open=True)
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end))
    )
    return check_int("T", T, low=1, high=MAX_T), first, last


def _advised(schedule: Schedule) -> Schedule:
    """Warn, at the line that called the classmethod, if the schedule does not end near noise."""
    if schedule.alphas_bar[-1] > END_LIMIT:
        warnings.warn(schedule.diagnose()[0], ScheduleWarning, stacklevel=3)
    return schedule
