"""What the constructors of tables share: levels of noise along the timesteps, predictions, weights of a memory.

Every method here is exact where what it remembers is a polynomial: of lambda for methods that remember x0, for then

    x' = sigma' / sigma x + alpha' int_0^1 H exp(-H (1 - v)) x0(v) dv,     H = lambda' - lambda

solves the probability-flow equation between two levels (Lu et al. 2022, arXiv 2211.01095, proposition 4.1), v running
from 0 to 1. So a method is a set of moments of that kernel and the places of what it remembers.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Row
from fastdiff.errors import ArgumentError, ScheduleWarning, check_choice, check_int, shown
from fastdiff.samplers.table import Clip, Sampler, check_schedule, noise_from_output, x0_from_output
from fastdiff.schedule import END_LIMIT, Float64, Schedule, Spacing, power

FINALS = ("zero", "sigma_min")
SERIES_BELOW, SERIES_TERMS = 1.0, 20  # of H: 1 / 20! is below rounding
FEW_ROWS = 15
MEMORY = ("b", "c1", "c2", "c3")  # columns of m, m1, m2, m3


class Levels(NamedTuple):
    """Timesteps with the levels there and at the next one; each (n,).

    Attributes
    ----------
    t : (n,) int64
    signal, noise, signal_next, noise_next : (n,) float64
        alpha, sigma, alpha', sigma'.
    half_log_snr, growth : (n,) float64
        lambda = log(alpha / sigma), and how much it grows to the next level: infinite where that has no noise.
    """

    t: npt.NDArray[np.int64]
    signal: Float64
    noise: Float64
    signal_next: Float64
    noise_next: Float64
    half_log_snr: Float64
    growth: Float64

    def at(self, rows: npt.NDArray[np.int64]) -> Levels:
        return Levels(self.t[rows], *(column[rows] for column in self[1:]))

    @property
    def ratio(self) -> Float64:
        """rho = sigma / alpha, infinite where there is no signal."""
        with np.errstate(divide="ignore"):
            return np.divide(self.noise, self.signal)

    @property
    def ratio_next(self) -> Float64:
        return np.divide(self.noise_next, self.signal_next)

    @property
    def stays(self) -> npt.NDArray[np.bool_]:
        """Rows that lead from t = 0 to the noise there: a last one, of no length."""
        return (self.t == 0) & (self.noise_next > 0)


def levels(schedule: Schedule, steps: int, spacing: Spacing, final: str) -> Levels:
    """The levels that a constructor's arguments name; called by it, so that a warning shows its caller's line."""
    check_schedule(schedule)
    check_choice("final", final, FINALS)
    t = schedule.timesteps(steps, spacing=spacing)
    start = max(schedule.alphas_bar[t[0]], 1 - schedule.noise[t[0]] ** 2)
    if start > END_LIMIT >= schedule.alphas_bar[-1]:
        what = "the noise lacks a variance of" if schedule.kind == "flow" else "abar is"
        name = repr(spacing) if isinstance(spacing, str) else "this"
        warnings.warn(
            f"{name} spacing begins at t = {t[0]}, where {what} {start:.3g}: sampling starts there "
            "from pure noise and misses. Take spacing='trailing', or pass an initial state of that noise.",
            ScheduleWarning,
            stacklevel=4,
        )
    signal, noise, half_log_snr = schedule.signal[t], schedule.noise[t], schedule.log_snr[t] / 2
    if final == "zero":
        end = 1.0, 0.0, np.inf
    else:
        end = schedule.signal[0], schedule.noise[0], schedule.log_snr[0] / 2
    growth = np.diff(half_log_snr, append=end[2])
    following = np.append(signal[1:], end[0]), np.append(noise[1:], end[1])
    return Levels(t, signal, noise, *following, half_log_snr, growth)


def check_growth(grid: Levels) -> None:
    """Methods of higher order divide by the growth of lambda, but for a row that stays."""
    if (grid.growth[~grid.stays] <= 0).any():
        raise ArgumentError("schedule", "timesteps between which abar does not change", "larger betas")


def gap_variance(grid: Levels) -> Float64:
    """beta_t, which the forward process adds from the next level to this one: sigma^2 - (alpha / alpha')^2 sigma'^2.

    Where variance is preserved it is 1 - abar / abar', as (sigma^2 - sigma'^2) / alpha'^2, which loses nothing where
    abar is close to 1.
    """
    here, there = power(grid.signal, grid.noise), power(grid.signal_next, grid.noise_next)
    return (there * grid.noise**2 - here * grid.noise_next**2) / grid.signal_next**2


# -- methods that remember -----------------------------------------------------------------------------------


def kernel_moments(growth: float, count: int) -> Float64:
    """M_k = int_0^1 H exp(-H (1 - v)) v^k dv for k = 0 .. count - 1; H of either sign, finite."""
    if abs(growth) >= SERIES_BELOW:
        found = [-np.expm1(-growth)]
        for k in range(1, count):
            found.append(1 - k / growth * found[-1])
        return np.array(found)
    degree, j = np.arange(count)[:, None], np.arange(1, SERIES_TERMS)
    # H sum_j (-H)^j k! / (k + j + 1)!
    terms = np.cumprod(-growth / (degree + 1 + j), axis=1)
    return growth / (degree[:, 0] + 1.0) * (1 + terms.sum(axis=1))


def weights(places: npt.ArrayLike, moments: Float64) -> Float64:
    """Weights w with sum_j w_j f(places_j) = sum_k moments_k f_k for every polynomial f(v) = sum_k f_k v^k."""
    nodes = np.asarray(places, np.float64)
    return np.asarray(np.linalg.solve(np.vander(nodes, increasing=True).T, moments[: len(nodes)]), np.float64)


def row_orders(grid: Levels, order: int, lower_order_final: int | None, final: str) -> npt.NDArray[np.int64]:
    """Order of every row: the first rows have little to remember, the last ones fall as `lower_order_final` says.

    What was seen at a level of pure noise is infinitely far away in lambda, and no place for a polynomial.
    """
    check_growth(grid)
    rows = len(grid.t)
    if lower_order_final is None:
        last = 0 if final == "sigma_min" else 2 if order == 3 and rows < FEW_ROWS else 1
    else:
        last = check_int("lower_order_final", lower_order_final, low=0, high=2)
    row = np.arange(rows)
    seen = np.maximum(1, row + 1 - np.count_nonzero(np.isinf(grid.half_log_snr)))
    orders = np.where(grid.stays, 1, np.minimum(order, seen))
    return np.where(row >= rows - last, np.minimum(orders, rows - row), orders)


def refuse_infinite_step(orders: npt.NDArray[np.int64], final: str) -> None:
    """The step to no noise is infinitely long in lambda, and only one of first order can be taken."""
    if final == "zero" and orders[-1] > 1:
        raise ArgumentError("lower_order_final", "0 with final='zero'", "1 or 2 there, or final='sigma_min'")


# -- tables --------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """What every constructor hands to `sampler` besides rows."""

    name: str
    schedule: Schedule
    prediction: str
    clip: Clip
    order: int | None


def sampler(table: Table, t: npt.ArrayLike, **columns: npt.ArrayLike) -> Sampler:
    """The table of these columns; those not named are 0."""
    rows = np.zeros((np.size(t), len(Row._fields)))
    rows[:, 0] = t
    for column, values in columns.items():
        rows[:, Row._fields.index(column)] = values
    return Sampler(
        rows, table.schedule, prediction=table.prediction, clip=table.clip, name=table.name, order=table.order
    )


def noise_table(
    table: Table,
    grid: Levels,
    first: npt.NDArray[np.bool_],
    memory: Float64,
    *,
    keeps: Float64 | float = 1.0,
    s: Float64 | float = 0.0,
    also: Float64 | float = 0.0,
) -> Sampler:
    """The table of x' / alpha' = keeps x / alpha + memory @ (noise, earlier noise ..) + s z / alpha'.

    Rows that are `first` keep x, and rho' - rho is added to their weight of the noise here. x / alpha is x0 + rho
    noise, and written so where the network does not predict the noise: nothing is divided by a small signal, or none.
    `also` is what is remembered of x besides the noise.
    """
    ratio, keeps = grid.ratio, np.broadcast_to(keeps, len(grid.t))
    f, g = noise_from_output(grid.signal, grid.noise, table.prediction)
    p, q = x0_from_output(grid.signal, grid.noise, table.prediction)
    if table.prediction == "noise":
        memory[first, 0] += (grid.ratio_next - ratio)[first]
        a, e = grid.signal_next / grid.signal * keeps, np.zeros_like(ratio)
    else:
        memory[~first, 0] += (ratio * keeps)[~first]
        memory[first, 0] += grid.ratio_next[first]
        a, e = grid.signal_next * p * keeps, grid.signal_next * q * keeps
    memory *= grid.signal_next[:, None]
    return sampler(table, grid.t, p=f + also, q=g, a=a, e=e, s=s, **dict(zip(MEMORY, memory.T, strict=False)))


def refuse_clip(name: str, clip: object) -> None:
    if clip is not None:
        wants = f"None: {name} remembers the noise, which has no bounds; dpmpp_2m, dpmpp_3m and unipc clip"
        raise ArgumentError("clip", shown(clip), wants)
