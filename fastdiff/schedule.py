"""Noise schedules: float64 tables built once, the timesteps a sampler visits, and the doctor.

A schedule that preserves variance is its betas, a flow its signal and noise; every other table follows from them by
multiplication, addition, division and square roots alone, which IEEE arithmetic fixes to the bit, so a schedule that is
stored is the same on every machine (`log_snr`, which no sampler of one step reads, goes through the logarithm of the
platform). Nothing that uses a schedule may take signal^2 + noise^2 for 1: that is its `power`.

What a network predicts is a mixture of noise and data: `target`.
"""

from __future__ import annotations

import logging
import math
import reprlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import rounded
from fastdiff.errors import ArgumentError, ScheduleWarning, check_array, check_choice, check_float, check_int, shown

log = logging.getLogger("fastdiff")

Float64 = npt.NDArray[np.float64]
Spacing = str | npt.ArrayLike  # a name, or timesteps of one's own

MAX_T = 1_000_000  # far above any use; a mistyped T must not ask for terabytes
END_LIMIT = 0.01  # abar[-1] above this: the chain does not end near noise
SPACINGS = ("trailing", "leading", "linspace", "linspace_open", "karras", "exponential", "lambda", "beta")
LOUDEST = 160.0  # of noise / signal, where levels are placed: the end of the linear schedule, which is 157
KARRAS_RHO, BETA_SHAPE = 7.0, 0.6  # Karras et al. 2022, table 1; Lee et al. 2024
PREDICTIONS = ("noise", "x0", "v", "velocity")
KINDS = ("variance preserving", "flow")
_NAMES = ("linear", "scaled_linear", "cosine", "sigmoid", "laplace", "flow", "custom")


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Schedule:
    """The noise levels of a diffusion of T steps, t = 0 .. T - 1, as read-only float64 tables.

    A jump from the data is ``x_t = signal_t x_0 + noise_t z`` (Ho et al. 2020, equation 4), with signal 1 and noise 0
    before t = 0, and one step of the forward chain is ``x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z`` (equation 2).
    A schedule is of one of two kinds:

    - "variance preserving": signal^2 + noise^2 = 1 and alpha_t = 1 - beta_t. It is given by its betas, of which the
      last may be 1: zero terminal SNR (Lin et al. 2024).
    - "flow": signal + noise = 1, the straight way from data to noise of flow matching (Lipman et al. 2023; Liu et al.
      2023). It is given by the two factors, and the Markov chain with the same jumps has
      ``alpha_t = (signal_t / signal_{t-1})^2`` and ``beta_t = noise_t^2 - alpha_t noise_{t-1}^2``.

    Use the classmethods: they name the schedule and let the doctor speak. The constructor itself is silent,
    for tables that are being restored.

    Parameters
    ----------
    betas : (T,) array_like, optional
        Variance added by each step, each above 0 and below 1; the last may be 1.
    name : str, optional
        Which constructor made it: "linear", "scaled_linear", "cosine", "sigmoid", "laplace", "flow" or "custom".
    signal, noise : (T,) array_like, optional
        In the place of the betas: the two factors of a flow.

    Attributes
    ----------
    kind : {"variance preserving", "flow"}
    T : int
        Number of steps.
    betas, alphas, alphas_bar : (T,) float64
        beta_t, alpha_t, and the running product of the alphas, which is signal^2.
    signal, noise : (T,) float64
        The two factors; signal is 0 at most at the last step. The noise of a schedule that is given by betas comes
        from the forward variance ``v_t = alpha_t v_{t-1} + beta_t``, a sum of positive terms, and so stays exact to
        rounding where alphas_bar is close to 1.
    power : (T,) float64
        signal^2 + noise^2, the variance of x_t for data of unit variance: 1 to the bit where variance is preserved.
    posterior_variance : (T,) float64
        Variance of q(x_{t-1} | x_t, x_0), beta_t noise_{t-1}^2 / noise_t^2 (Ho et al. 2020, equation 7); 0 at t = 0.
    log_snr : (T,) float64
        log(signal^2 / noise^2), falling; minus infinity where the signal is 0.

    Raises
    ------
    ArgumentError
        If the betas are not a non-empty row of at most a million finite numbers inside (0, 1), if abar
        falls below what float64 can hold, if the factors of a flow do not run from data to noise, or if the name is
        unknown.

    Examples
    --------
    >>> s = fd.Schedule([0.1, 0.2, 0.5])
    >>> s.T, s.alphas_bar.round(3).tolist()
    (3, [0.9, 0.72, 0.36])
    >>> bool(np.allclose(s.signal**2 + s.noise**2, 1))
    True
    """

    betas: Float64
    name: str
    kind: str
    T: int
    alphas: Float64
    alphas_bar: Float64
    signal: Float64
    noise: Float64
    power: Float64
    posterior_variance: Float64
    log_snr: Float64

    def __init__(
        self,
        betas: npt.ArrayLike | None = None,
        name: str = "custom",
        *,
        signal: npt.ArrayLike | None = None,
        noise: npt.ArrayLike | None = None,
    ) -> None:
        check_choice("name", name, _NAMES)
        if (signal is None) != (noise is None) or (betas is None) == (signal is None):
            raise ArgumentError("betas, signal, noise", "another choice of them", "the betas, or signal and noise")
        if signal is None:
            tables = _preserving(_checked_row("betas", betas))
        else:
            tables = _flowing(_checked_row("signal", signal), _checked_row("noise", noise))
        kind, T = KINDS[signal is not None], len(tables["betas"])
        variance = tables.pop("variance")
        tables["power"] = power(tables["signal"], tables["noise"])
        tables["posterior_variance"] = np.append(0.0, variance[:-1]) / variance * tables["betas"]
        with np.errstate(divide="ignore"):
            tables["log_snr"] = np.log(tables["alphas_bar"]) - np.log(variance)
        for table in tables.values():
            table.setflags(write=False)
        for key, value in {"name": name, "kind": kind, "T": T, **tables}.items():
            object.__setattr__(self, key, value)

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

        Examples
        --------
        >>> s = fd.Schedule.linear(1000)
        >>> s.betas[[0, -1]].round(6).tolist(), bool(s.alphas_bar[-1] < 1e-4)
        ([0.0001, 0.02], True)
        """
        T, first, last = _checked_ramp(T, beta_start, beta_end)
        return _advised(cls(np.linspace(first, last, T), "linear"))

    @classmethod
    def scaled_linear(cls, T: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas whose square roots lie on a straight line (Rombach et al. 2022, latent diffusion).

        Parameters, errors and warnings as for `linear`.

        Examples
        --------
        >>> s = fd.Schedule.scaled_linear(1000)
        >>> np.allclose(np.diff(np.sqrt(s.betas)), np.sqrt(s.betas[1]) - np.sqrt(s.betas[0]))
        True
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

        Examples
        --------
        >>> fd.Schedule.cosine(4).signal.round(3).tolist()
        [0.92, 0.703, 0.38, 0.012]
        """
        T = check_int("T", T, low=1, high=MAX_T)
        f = rounded.cos((np.arange(T + 1) / T + 0.008) / 1.008 * (np.pi / 2)) ** 2
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

        Examples
        --------
        >>> s = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
        >>> round(float(s.alphas_bar[-1]), 5)
        0.00539
        """
        T, first, last = _checked_ramp(T, beta_start, beta_end)
        rise = 1 / (1 + rounded.exp(-np.linspace(-6, 6, T)))
        return _advised(cls(rise * (last - first) + first, "sigmoid"))

    @classmethod
    def laplace(cls, T: int = 1000, *, mean: float = 0.0, scale: float = 0.5) -> Schedule:
        """A schedule whose log SNR is spread by a Laplace law (Hang et al. 2024, arXiv 2407.03297, table 1).

        ``log SNR(u) = mean - scale sign(1/2 - u) log(1 - 2 |u - 1/2|)`` at u = (t + 1) / T: uniform timesteps train
        the middle noise levels most. Betas are capped at 0.999, as of `cosine`. With the defaults the first step
        already has an SNR of sqrt(T / 2): fine detail wants a larger scale.

        Parameters
        ----------
        T : int, optional
            Number of steps, 2 to 1000000.
        mean, scale : float, optional
            Of the Laplace law; the scale is above 0.

        Returns
        -------
        Schedule

        Raises
        ------
        ArgumentError
            If an argument is out of range.

        Warns
        -----
        ScheduleWarning
            If the schedule does not end near noise; see `diagnose`.

        Examples
        --------
        >>> s = fd.Schedule.laplace(100)
        >>> abs(round(float(s.log_snr[49]), 6))  # the middle timestep is at the mean
        0.0
        """
        T = check_int("T", T, low=2, high=MAX_T)
        mean, scale = check_float("mean", mean), check_float("scale", scale, low=0, low_open=True)
        u = np.arange(1, T) / T
        log_snr = mean - scale * np.sign(0.5 - u) * rounded.log(1 - 2 * np.abs(u - 0.5))
        abar = np.concatenate([[1.0], 1 / (1 + rounded.exp(np.clip(-log_snr, -700, 700))), [0.0]])
        if (np.diff(abar) >= 0).any():
            raise ArgumentError("mean, scale", f"{mean:g}, {scale:g}", "levels that float64 can tell apart")
        return _advised(cls(np.minimum(1 - abar[1:] / abar[:-1], 0.999), "laplace"))

    @classmethod
    def flow(cls, T: int = 1000, *, shift: float = 1.0) -> Schedule:
        """The straight way from data to noise, x = (1 - u) x0 + u z (flow matching, rectified flow).

        Timestep t stands for the time ``u = shift v / (1 + (shift - 1) v)`` at v = (t + 1) / T: the last one is noise
        alone, and u = 0, the data, comes before t = 0. The n timesteps of "trailing" spacing are those at the times
        linspace(1, 0, n + 1)[:-1], shifted, where n divides T. `fastdiff.samplers.ddim` with eta = 0 is Euler's method
        for ``dx / du = noise - x0``, which is what the prediction "velocity" says.

        Parameters
        ----------
        T : int, optional
            Number of steps, 2 to 1000000.
        shift : float, optional
            Above 1 spends more timesteps where there is much noise (Esser et al. 2024, equation 23), 0.01 to 100.

        Returns
        -------
        Schedule
            Of the kind "flow".

        Raises
        ------
        ArgumentError
            If an argument is out of range.

        Examples
        --------
        >>> s = fd.Schedule.flow(4)
        >>> s.signal.tolist(), s.noise.tolist()
        ([0.75, 0.5, 0.25, 0.0], [0.25, 0.5, 0.75, 1.0])
        """
        T, shift = check_int("T", T, low=2, high=MAX_T), check_float("shift", shift, low=0.01, high=100)
        steps = np.arange(1, T + 1, dtype=np.float64)
        length = T + (shift - 1) * steps
        noise = shift * steps / length
        noise[-1] = 1.0
        return cls(name="flow", signal=(T - steps) / length, noise=noise)

    @classmethod
    def from_betas(cls, betas: npt.ArrayLike) -> Schedule:
        """A schedule from betas of your own.

        Parameters
        ----------
        betas : (T,) array_like
            Real numbers above 0 and below 1; the last may be 1.

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

        Examples
        --------
        >>> s = fd.Schedule.from_betas(np.linspace(0.01, 0.5, 20))
        >>> s.T, s.name
        (20, 'custom')
        """
        return _advised(cls(check_array("betas", betas)))

    def zero_terminal_snr(self) -> Schedule:
        """The same schedule, ending in noise alone: signal shifted and rescaled (Lin et al. 2024, algorithm 1).

        ``signal'_t = (signal_t - signal_{T-1}) signal_0 / (signal_0 - signal_{T-1})``. At the last timestep a
        prediction of the noise says nothing of the data, and is refused: predict "v", "velocity" or "x0".

        Returns
        -------
        Schedule
            Of the same name; itself, where the last signal is 0 already.

        Raises
        ------
        ArgumentError
            If the schedule has only one step, or betas so small that its signal does not change.

        Examples
        --------
        >>> s = fd.Schedule.linear(1000).zero_terminal_snr()
        >>> float(s.signal[-1]), float(s.betas[-1])
        (0.0, 1.0)
        """
        last = self.signal[-1]
        if last == 0:
            return self
        if self.T == 1:
            raise ArgumentError("schedule", "T = 1", "at least 2 steps: the first one keeps its signal")
        if last == self.signal[0]:
            raise ArgumentError("schedule", "a signal that float64 does not see fall", "larger betas")
        signal = (self.signal - last) * (self.signal[0] / (self.signal[0] - last))
        # By how much the signal falls, from the betas: as a difference it would lose what small betas say.
        fall = (self.signal[:-1] * self.betas[1:] / (1 + np.sqrt(self.alphas[1:]))) * (
            self.signal[0] / (self.signal[0] - last)
        )
        betas = self.betas.copy()
        betas[1:] = fall * (signal[:-1] + signal[1:]) / signal[:-1] ** 2
        betas[-1] = 1.0
        return type(self)(betas, self.name)

    # -- what it answers -----------------------------------------------------------------------------------

    def target(self, prediction: str) -> tuple[Float64, Float64]:
        """What a network of a prediction learns to say: ``of_noise[t] noise + of_data[t] x0``.

        Parameters
        ----------
        prediction : {"noise", "x0", "v", "velocity"}
            See `fastdiff.schedule.target`.

        Returns
        -------
        of_noise, of_data : (T,) float64

        Raises
        ------
        ArgumentError
            The noise, where the schedule ends in noise alone: of such a state it says nothing of x0.

        Examples
        --------
        >>> of_noise, of_data = fd.Schedule.flow(4).target("velocity")  # noise - x0
        >>> of_noise.tolist(), of_data.tolist()
        ([1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0])
        """
        check_choice("prediction", prediction, PREDICTIONS)
        if prediction == "noise" and self.signal[-1] == 0:
            wants = f"'v', 'velocity' or 'x0': at t = {self.T - 1} the signal is 0, and the noise says nothing of x0"
            raise ArgumentError("prediction", "'noise'", wants)
        return target(prediction, self.signal, self.noise)

    def difference(self, other: Schedule) -> str | None:
        """Where two schedules differ by more than float32 shows, in words; None where they agree.

        Tables of equal formulas may differ in the last bit of float64 from one machine to another; networks and
        samples are float32.

        Examples
        --------
        >>> fd.Schedule.cosine(20).difference(fd.Schedule.cosine(30))
        'T = 20 against 30'
        >>> fd.Schedule.cosine(20).difference(fd.Schedule.cosine(20)) is None
        True
        """
        if not isinstance(other, Schedule):
            raise ArgumentError("other", shown(other), "a Schedule")
        if self.T != other.T:
            return f"T = {self.T} against {other.T}"
        for name in ("signal", "noise"):
            ours, theirs = getattr(self, name), getattr(other, name)
            far = np.flatnonzero(np.abs(ours - theirs) > np.finfo(np.float32).eps * np.abs(ours))
            if far.size:
                t = far[0]
                return f"{name} {ours[t]:.7g} against {theirs[t]:.7g} at t = {t}"
        return None

    def timesteps(
        self, steps: int, *, spacing: Spacing = "trailing", sigma_max: float = LOUDEST
    ) -> npt.NDArray[np.int64]:
        """The timesteps that a sampler of `steps` steps visits, strictly descending.

        Parameters
        ----------
        steps : int
            How many, n: 1 to T, or 1 to T - 1 for "linspace_open".
        spacing : str or (n,) array_like of int, optional
            Timesteps of one's own, strictly descending; or which n of the T (Lin et al. 2024, table 2, names the first
            three):

            - "trailing": round(T (n - i) / n) - 1 for i = 0 .. n - 1. Begins at T - 1.
            - "leading": multiples of T // n, from 0. Begins below T - 1, where the state may be far from
              noise.
            - "linspace": round(linspace(0, T - 1, n)), both ends included (one step: T - 1).
            - "linspace_open": round(linspace(0, T - 1, n + 1)) without the 0, as DPM-Solver++ wants it.

            The others place n levels, at least 2, each of which becomes the nearest timestep. Levels that fall on one
            timestep are visited once, so that fewer than n may be left, which is logged. With rho = noise / signal,
            from the timestep nearest to `sigma_max`, or from T - 1 if that is quieter; of a schedule that ends in noise
            alone from T - 1 and then from there:

            - "karras": rho^(1/7) in equal steps, down to that of t = 0 (Karras et al. 2022, equation 5).
            - "exponential": log(rho) in equal steps, both ends included.
            - "lambda": n equal steps of lambda = -log(rho), their end at t = 0 left out, as DPM-Solver has it.
            - "beta": quantiles of a Beta(0.6, 0.6) law in t, both ends included (Lee et al. 2024): dense at both.
        sigma_max : float, optional
            The loudest level of "karras", "exponential" and "lambda", above 0. The cosine schedule goes on to 20,000,
            where steps change nothing that can be seen; to begin at sigma_max leaves out 1 / sigma_max of the data.
            Infinity begins at T - 1, as other programs do.

        Returns
        -------
        (n,) int64
            Fewer for the last four, where levels fall together.

        Raises
        ------
        ArgumentError
            If `steps` or `spacing` is none of these, or if fewer than two timesteps are left.

        Examples
        --------
        >>> s = fd.Schedule.cosine(100)
        >>> s.timesteps(4).tolist(), s.timesteps(4, spacing="leading").tolist()
        ([99, 74, 49, 24], [75, 50, 25, 0])
        """
        if sigma_max != math.inf:
            sigma_max = check_float("sigma_max", sigma_max, low=0, low_open=True)
        if not isinstance(spacing, str):
            return self._own_timesteps(steps, spacing)
        check_choice("spacing", spacing, SPACINGS)
        if spacing in SPACINGS[3:] and self.T == 1:
            wants = f"one of {', '.join(map(repr, SPACINGS[:3]))}, or T of at least 2"
            raise ArgumentError("spacing", f"{spacing!r} for T = 1", wants)
        if spacing in SPACINGS[4:]:
            return _placed(self, check_int("steps", steps, low=2, high=self.T), spacing, sigma_max)
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

    def _own_timesteps(self, steps: int, given: npt.ArrayLike) -> npt.NDArray[np.int64]:
        wants = f"one of {', '.join(map(repr, SPACINGS))}, or timesteps from {self.T - 1} to 0 that fall"
        if given is None or isinstance(given, int | float):
            raise ArgumentError("spacing", shown(given), wants)
        t = check_array("spacing", given, shape=(None,), dtype=np.float64)
        if not t.size or (t != np.rint(t)).any() or (t < 0).any() or (t >= self.T).any() or (np.diff(t) >= 0).any():
            raise ArgumentError("spacing", reprlib.repr(t.tolist()), wants)
        check_int("steps", steps, low=t.size, high=t.size)
        return np.asarray(t, np.int64)

    def diagnose(self) -> list[str]:
        """The doctor: what is legal about this schedule and probably not meant.

        Returns
        -------
        list of str
            One plain sentence or two for each finding, with advice; empty for a sound schedule. The first
            finding, an end that is not noise, is also raised as a `ScheduleWarning` when a schedule is
            made by one of the classmethods.

        Examples
        --------
        >>> fd.Schedule.cosine(100).diagnose()
        []
        >>> len(fd.Schedule([1e-4] * 10).diagnose())  # hardly any noise at the end
        1
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
        if end == 0:
            found.append(
                "the last step is noise alone: a prediction of noise is refused there. Predict 'v', 'velocity' or 'x0'."
            )
        elif end < 1e-12:
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

    @property
    def features(self) -> list[str]:
        """What a file that has this schedule asks of its reader: names out of `fastdiff.checkpoint.FEATURES`."""
        if self.kind == "flow":
            return ["flow schedule"]
        named = ["laplace schedule"] if self.name == "laplace" else []
        return named + (["zero terminal snr"] if self.betas[-1] == 1 else [])

    def to_dict(self) -> dict[str, Any]:
        """The schedule as a dictionary that JSON can hold: its name and its betas; or name, kind, signal and noise.

        The tables are stored even where the name would give them: exp and cos may differ in the last bit from
        one machine to the next, and JSON keeps every float64 exactly.

        Examples
        --------
        >>> sorted(fd.Schedule.cosine(20).to_dict())
        ['betas', 'name']
        """
        if self.kind == "flow":
            levels = {"signal": self.signal.tolist(), "noise": self.noise.tolist()}
            return {"name": self.name, "kind": self.kind, **levels}
        return {"name": self.name, "betas": self.betas.tolist()}

    @classmethod
    def from_dict(cls, stored: Any) -> Schedule:
        """Restore what `to_dict` gave, bit for bit; silently, for the doctor spoke when it was made.

        Parameters
        ----------
        stored : dict
            With the keys "name" and "betas", or "name", "kind", "signal" and "noise", and no others.

        Returns
        -------
        Schedule

        Raises
        ------
        ArgumentError
            If it is anything else.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> fd.Schedule.from_dict(s.to_dict()) == s
        True
        """
        wants = "a dictionary with the keys 'name' and 'betas', or 'name', 'kind', 'signal' and 'noise'"
        if not isinstance(stored, dict):
            raise ArgumentError("stored", type(stored).__name__, wants)
        if set(stored) == {"name", "betas"}:
            return cls(check_array("betas", stored["betas"]), stored["name"])
        if set(stored) != {"name", "kind", "signal", "noise"}:
            raise ArgumentError("stored", f"the keys {reprlib.repr(sorted(map(str, stored)))}", wants)
        check_choice("kind", stored["kind"], ["flow"])
        return cls(name=stored["name"], signal=stored["signal"], noise=stored["noise"])

    def _defined_by(self) -> tuple[Float64, ...]:
        return (self.signal, self.noise) if self.kind == "flow" else (self.betas,)

    def __eq__(self, other: object) -> bool:
        """Whether both are of one kind and have the same tables to the bit; names do not count."""
        if not isinstance(other, Schedule):
            return NotImplemented
        return self.kind == other.kind and all(map(np.array_equal, self._defined_by(), other._defined_by()))

    def __hash__(self) -> int:
        return hash(tuple(table.tobytes() for table in self._defined_by()))

    def __repr__(self) -> str:
        if self.kind == "flow":
            ends = f"signal {self.signal[0]:.3g} .. {self.signal[-1]:.3g}, noise {self.noise[0]:.3g} .. "
            return f"<Schedule {self.name}: T={self.T}, {ends}{self.noise[-1]:.3g}>"
        return (
            f"<Schedule {self.name}: T={self.T}, betas {self.betas[0]:.3g} .. {self.betas[-1]:.3g}, "
            f"abar ends at {self.alphas_bar[-1]:.3g}>"
        )

    def _repr_html_(self) -> str:
        from fastdiff.display import schedule_html

        return schedule_html(self)

    def __reduce__(self) -> tuple[Callable[..., Schedule], tuple[Any, ...]]:
        if self.kind == "flow":
            return partial(Schedule, signal=self.signal, noise=self.noise), (None, self.name)
        return Schedule, (self.betas, self.name)


def target(prediction: str, signal: Float64, noise: Float64) -> tuple[Float64, Float64]:
    """Factors of the noise and of x0 in what a prediction says, at levels of signal and noise.

    noise and x0 are themselves, v = signal noise - noise_t x0 (Salimans & Ho 2022, appendix D), and
    velocity = noise - x0, the slope of a flow (Liu et al. 2023).
    """
    zeros, ones = np.zeros_like(signal), np.ones_like(signal)
    of = {"noise": (ones, zeros), "x0": (zeros, ones), "v": (signal, -noise), "velocity": (ones, -ones)}
    return of[check_choice("prediction", prediction, PREDICTIONS)]


def power(signal: Float64, noise: Float64) -> Float64:
    """signal^2 + noise^2, and 1 to the bit where it is 1 but for rounding."""
    squares = signal**2 + noise**2
    return np.where(np.abs(squares - 1) < 1e-9, 1.0, squares)


def _checked_row(argument: str, values: Any) -> Float64:
    row = check_array(argument, values, shape=(None,), dtype=np.float64).copy()
    if not 1 <= row.size <= MAX_T:
        raise ArgumentError(argument, f"{row.size} values", f"between 1 and {MAX_T} values")
    return row


def _preserving(betas: Float64) -> dict[str, Float64]:
    """The tables of a schedule that preserves variance, and the square of the noise."""
    most = np.append(np.full(betas.size - 1, np.nextafter(1, 0)), 1.0 if betas.size > 1 else np.nextafter(1, 0))
    outside = np.flatnonzero((betas <= 0) | (betas > most))
    if outside.size:
        raise ArgumentError("betas", f"{betas[outside[0]]} at index {outside[0]}", "numbers above 0 and below 1")
    alphas = 1 - betas
    alphas_bar = np.cumprod(alphas)
    if (alphas_bar < np.finfo(np.float64).tiny)[: betas.size - int(betas[-1] == 1)].any():
        raise ArgumentError("betas", "a product of (1 - beta) that vanishes in float64", "fewer or smaller betas")
    variance = np.empty_like(betas)
    previous = 0.0
    for t in range(betas.size):
        variance[t] = previous = alphas[t] * previous + betas[t]
    return {
        "betas": betas, "alphas": alphas, "alphas_bar": alphas_bar, "variance": variance,
        "signal": np.sqrt(alphas_bar), "noise": np.sqrt(variance),
    }  # fmt: skip


def _flowing(signal: Float64, noise: Float64) -> dict[str, Float64]:
    """The tables of a schedule that is given by both factors, and the square of the noise."""
    if signal.shape != noise.shape:
        raise ArgumentError("noise", f"{noise.size} values", f"{signal.size}, as there are of the signal")
    before, quieter = np.append(1.0, signal[:-1]), np.append(0.0, noise[:-1])
    falls = (signal < before).all() and signal[-1] >= 0
    if not falls or not (noise > quieter).all() or np.abs(signal + noise - 1).max() > 1e-12:
        wants = "a signal that falls from below 1 to at least 0, and noise = 1 - signal"
        raise ArgumentError("signal, noise", "factors that are no flow", wants)
    ratio = signal / before
    return {
        "betas": (noise - ratio * quieter) * (noise + ratio * quieter), "alphas": ratio**2, "alphas_bar": signal**2,
        "signal": signal, "noise": noise, "variance": noise**2,
    }  # fmt: skip


def _placed(schedule: Schedule, n: int, spacing: str, sigma_max: float) -> npt.NDArray[np.int64]:
    """The timesteps nearest to n levels, descending, each once: see `Schedule.timesteps`."""
    log_ratio = -schedule.log_snr / 2
    pure = int(np.isinf(log_ratio[-1]))  # a last step without signal is always visited, and then the loudest level
    if spacing == "beta":
        log_ratio = log_ratio[:-1] if pure else log_ratio
    else:
        log_ratio = log_ratio[: len(log_ratio) - pure]
        if log_ratio[-1] > math.log(sigma_max):
            log_ratio = log_ratio[: np.abs(log_ratio - math.log(sigma_max)).argmin() + 1]
    top, low, ramp = log_ratio[-1], log_ratio[0], np.linspace(0, 1, n - pure)
    if spacing == "beta":
        from scipy.special import betaincinv

        placed = betaincinv(BETA_SHAPE, BETA_SHAPE, 1 - ramp) * (len(log_ratio) - 1)
    else:
        if spacing == "karras":
            first, last = np.exp(top / KARRAS_RHO), np.exp(low / KARRAS_RHO)
            levels = KARRAS_RHO * np.log((1 - ramp) * first + ramp * last)
        elif spacing == "exponential":
            levels = top + ramp * (low - top)
        else:
            levels = np.linspace(top, low, n - pure + 1)[:-1]
        placed = np.interp(levels, log_ratio, np.arange(len(log_ratio)))
    t = np.unique(np.append(np.rint(placed), [schedule.T - 1] * pure).astype(np.int64))[::-1]
    if spacing == "lambda":
        t = t[t > 0]
    if len(t) < 2:
        raise ArgumentError("spacing", f"{spacing!r}, which leaves {len(t)} timestep of {n}", "another, or more steps")
    if len(t) < n:
        text = "%r spacing: %d of %d levels fall on timesteps that others have, %d are left"
        log.info(text, spacing, n - len(t), n, len(t))
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
