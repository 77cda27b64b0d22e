"""Samplers that remember what the network said at earlier rows: one evaluation a row, order from two rows on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_choice, check_float, check_int, shown
from fastdiff.samplers.levels import (
    Levels,
    Table,
    kernel_moments,
    levels,
    refuse_infinite_step,
    row_orders,
    sampler,
    weights,
)
from fastdiff.samplers.table import Clip, Sampler, noise_from_output, x0_from_output
from fastdiff.schedule import Array, Schedule

MEMORY = ("b", "c1", "c2", "c3")  # columns of m, m1, m2, m3


def dpmpp_2m(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    solver: str = "midpoint",
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "linspace_open",
    final: str = "zero",
    lower_order_final: int | None = None,
) -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, deterministic.

    With lambda = log(alpha / sigma), h its growth over this step and h_previous over the one before::

        x' = sigma' / sigma exp(-eta h) x + alpha' (1 - exp(-H)) ((1 + r) x0 - r x0_previous)
             + sigma' sqrt(1 - exp(-2 eta h)) z,      H = (1 + eta) h,      r = h / (2 h_previous)

    The first row has r = 0, and so has the last with ``final="zero"``, where h is infinite. With eta = 1 it is
    SDE-DPM-Solver++(2M) (their section 5), which forgets errors of earlier rows, and wants more of them.

    Parameters
    ----------
    schedule : Schedule
        The schedule of the network.
    steps : int
        Number of rows.
    eta : float, optional
        Noise that is added on the way, at least 0: 0 none, 1 that of the reverse stochastic equation.
    solver : {"midpoint", "heun"}, optional
        The slope of x0 is weighted with half of x0's weight, or with its integral; both are of second order.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : str, optional
        What the network predicts, one of `PREDICTIONS`.
    spacing : str, optional
        Which timesteps, see `Schedule.timesteps`.
    final : {"zero", "sigma_min"}, optional
        Where the last row leads: to the clean sample, or to the noise level of t = 0 (the last timestep must
        then be above 0, so "linspace_open", or "trailing" with at most T / 2 steps or so).
    lower_order_final : {0, 1, 2}, optional
        How many rows at the end are of lower order than the others, the last one of the first, the one before of at
        most the second; None: 1 with ``final="zero"``, where 0 is impossible, and otherwise 0.

    Returns
    -------
    Sampler

    Raises
    ------
    ArgumentError
        If an argument is none of these.

    Warns
    -----
    ScheduleWarning
        If the first timestep is far from noise.
    """
    grid = levels(schedule, steps, spacing, final)
    eta = check_float("eta", eta, low=0)
    check_choice("solver", solver, ("midpoint", "heun"))
    orders = row_orders(grid, 2, lower_order_final, final)
    refuse_infinite_step(orders, final)
    growth = grid.growth
    pull = grid.signal_next * -np.expm1(-growth if eta == 0 else -(1 + eta) * growth)
    second = orders == 2
    r = np.zeros(len(growth))
    r[second] = growth[second] / (2 * growth[:-1][second[1:]])
    if solver == "heun":
        moments = np.array([kernel_moments((1 + eta) * h, 2) for h in growth[second]]).reshape(-1, 2)
        r[second] *= 2 * moments[:, 1] / moments[:, 0]
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    a, s = _decay(grid, eta)
    table = Table("dpmpp_2m", schedule, prediction, clip, 2 if eta == 0 else None)
    return sampler(table, grid.t, p=p, q=q, a=a, b=pull * (1 + r), c1=-pull * r, s=s)


def dpmpp_3m(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    published: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "linspace_open",
    final: str = "zero",
    lower_order_final: int | None = None,
) -> Sampler:
    """DPM-Solver++(3M): third order, deterministic; x0 is continued as a parabola through three rows.

    x0 and its divided differences d1, d2 with respect to lambda, at h apart, are weighted with the moments of the
    kernel of `dpmpp_2m`::

        x' = sigma' / sigma exp(-eta h) x + alpha' (M_0 x0 + M_1 d1 + M_2 d2) + sigma' sqrt(1 - exp(-2 eta h)) z

    What is published, in the authors' code and everywhere since, has half of M_2: the coefficient of a Taylor series,
    for a second derivative, beside a divided difference, which is half of one. It is of second order: the error of one
    row with exact memory falls like h^3 (measured: 2.9), and that of the corrected one like h^4 (measured: 3.9).
    Second-order rows are those of `dpmpp_2m`.

    Parameters
    ----------
    schedule, steps, eta, clip, prediction, spacing, final
        As of `dpmpp_2m`.
    published : bool, optional
        The coefficient as published, to compare with other programs.
    lower_order_final : {0, 1, 2}, optional
        As of `dpmpp_2m`; None: 2 with ``final="zero"`` and fewer than 15 rows.

    Returns, errors and warnings as for `dpmpp_2m`.
    """
    grid = levels(schedule, steps, spacing, final)
    eta = check_float("eta", eta, low=0)
    if not isinstance(published, bool):
        raise ArgumentError("published", shown(published), "True or False")
    orders = row_orders(grid, 3, lower_order_final, final)
    refuse_infinite_step(orders, final)
    memory = np.zeros((len(grid.t), 3))
    for i, order in enumerate(orders):
        moments = _data_moments((1 + eta) * grid.growth[i], order)
        if order == 3 and published:
            moments[2] /= 2
        memory[i, :order] = grid.signal_next[i] * weights(_places(grid, i, order), moments)
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    a, s = _decay(grid, eta)
    table = Table("dpmpp_3m", schedule, prediction, clip, (2 if published else 3) if eta == 0 else None)
    return sampler(table, grid.t, p=p, q=q, a=a, s=s, **dict(zip(MEMORY, memory.T, strict=False)))


def unipc(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    variant: str = "bh2",
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "linspace_open",
    final: str = "zero",
    lower_order_final: int | None = None,
) -> Sampler:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867), data prediction: a predictor, and a corrector that costs nothing.

    The predictor continues x0 as a polynomial through `order` rows. When the network is evaluated at what it predicts,
    the step is taken again with that value as well, which makes it of order + 1. Both are linear in what a row
    remembers: with the corrected state x - d, d linear in the memory, the next prediction is one row of the table, and
    the last one stays uncorrected.

    Where the polynomial is a straight line (predictor of order 2, corrector of order 1) its slope has the weight
    B(h) / 2, as in the paper's appendix: B(h) = 1 - exp(-h) for "bh2" and h for "bh1". The other moments are exact, and
    do not depend on B. So the predictor of order 2 is `dpmpp_2m`, and that of order 3 the corrected `dpmpp_3m`.

    Parameters
    ----------
    schedule, steps, clip, prediction, spacing, final
        As of `dpmpp_2m`.
    order : {1, 2, 3}, optional
        Of the predictor.
    variant : {"bh1", "bh2"}, optional
        The function B.
    lower_order_final : {0, 1, 2}, optional
        As of `dpmpp_2m`; None: 1 with ``final="zero"``, 2 for order 3 and fewer than 15 rows.

    Returns, errors and warnings as for `dpmpp_2m`.
    """
    grid = levels(schedule, steps, spacing, final)
    order = check_int("order", order, low=1, high=3)
    check_choice("variant", variant, ("bh1", "bh2"))
    orders = row_orders(grid, order, lower_order_final, final)
    refuse_infinite_step(orders, final)
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    a = grid.noise_next / grid.noise
    memory, before = np.zeros((len(grid.t), 4)), np.zeros(4)
    for i, width in enumerate(orders):
        predicted = np.zeros(4)
        predicted[:width] = weights(_places(grid, i, width), _data_moments(grid.growth[i], width, variant))
        memory[i] = grid.signal_next[i] * predicted
        if i and np.isfinite(grid.growth[i - 1]):
            taken = orders[i - 1] + 1
            moments = _data_moments(grid.growth[i - 1], taken, variant)
            change = -np.roll(before, 1)  # what predicted this row's state; its oldest entry is 0
            change[:taken] += weights([1.0, *_places(grid, i - 1, taken - 1)], moments)
            memory[i] += a[i] * grid.signal[i] * change
        before = predicted
    table = Table("unipc", schedule, prediction, clip, order + 1)
    return sampler(table, grid.t, p=p, q=q, a=a, **dict(zip(MEMORY, memory.T, strict=True)))


def deis(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    clip: None = None,
    prediction: str = "noise",
    spacing: str = "linspace_open",
    final: str = "zero",
    lower_order_final: int | None = None,
) -> Sampler:
    """DEIS (Zhang & Chen 2023, arXiv 2204.13902) in log rho: the noise is a polynomial of log(sigma / alpha).

    With rho = sigma / alpha the probability-flow equation is d(x / alpha) = noise d rho, so that::

        x' / alpha' = x / alpha + int_rho^rho' noise d rho,      noise a polynomial through `order` rows

    The memory holds the noise, and x0 is never formed: the table cannot clip.

    Parameters
    ----------
    schedule, steps, prediction, spacing, final
        As of `dpmpp_2m`.
    order : {1, 2, 3}, optional
        How many rows the polynomial goes through.
    clip : None
        What is remembered is the noise, which has no bounds.
    lower_order_final : {0, 1, 2}, optional
        As of `unipc`.

    Returns, errors and warnings as for `dpmpp_2m`.
    """
    grid = levels(schedule, steps, spacing, final)
    order = check_int("order", order, low=1, high=3)
    _refuse_clip("deis", clip)
    orders = row_orders(grid, order, lower_order_final, final)
    refuse_infinite_step(orders, final)
    memory = np.zeros((len(grid.t), 3))
    for i, width in enumerate(orders):
        if width > 1:
            moments = kernel_moments(-grid.growth[i], width)
            memory[i, :width] = grid.ratio_next[i] * weights(_places(grid, i, width), moments)
    return _noise_table(Table("deis", schedule, prediction, None, order), grid, orders, memory)


def lms(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 4,
    clip: None = None,
    prediction: str = "noise",
    spacing: str = "trailing",
    final: str = "zero",
    lower_order_final: int | None = 0,
) -> Sampler:
    """Linear multistep, the method of Adams and Bashforth in rho = sigma / alpha (Karras et al. 2022, equation 1).

    As `deis`, with the noise a polynomial of rho itself, which is finite at rho = 0: the last row needs no lower order.

    Parameters
    ----------
    schedule, steps, prediction, spacing, final
        As of `dpmpp_2m`.
    order : {1, 2, 3, 4}, optional
        How many rows the polynomial goes through.
    clip : None
        What is remembered is the noise, which has no bounds.
    lower_order_final : {0, 1, 2}, optional
        As of `dpmpp_2m`, but for the default 0; None: the rule of `unipc`.

    Returns, errors and warnings as for `dpmpp_2m`.
    """
    grid = levels(schedule, steps, spacing, final)
    order = check_int("order", order, low=1, high=4)
    _refuse_clip("lms", clip)
    orders = row_orders(grid, order, lower_order_final, final)
    ratio, step = grid.ratio, grid.ratio_next - grid.ratio
    memory = np.zeros((len(grid.t), 4))
    for i, width in enumerate(orders):
        if width > 1:
            places = (ratio[i - np.arange(width)] - ratio[i]) / step[i]
            memory[i, :width] = step[i] * weights(places, 1 / np.arange(1.0, width + 1))
    return _noise_table(Table("lms", schedule, prediction, None, order), grid, orders, memory)


# -- the parts that they share -------------------------------------------------------------------------------


def _decay(grid: Levels, eta: float) -> tuple[Array, Array]:
    """(a, s) of a step that adds eta times the noise of the reverse stochastic equation."""
    a = grid.noise_next / grid.noise
    if eta == 0:
        return a, np.zeros_like(a)
    return a * np.exp(-eta * grid.growth), grid.noise_next * np.sqrt(-np.expm1(-2 * eta * grid.growth))


def _places(grid: Levels, i: int, count: int) -> Array:
    """Where the last `count` rows from row i back are in its step, which goes from 0 to 1 in lambda."""
    if count == 1:
        return np.zeros(1)
    return (grid.half_log_snr[i - np.arange(count)] - grid.half_log_snr[i]) / grid.growth[i]


def _data_moments(growth: float, count: int, variant: str = "bh2") -> Array:
    """Moments of a polynomial through so many places; those of a straight line are not the exact ones: see `unipc`."""
    if count == 1:
        return -np.expm1(-np.array([growth]))
    moments = kernel_moments(growth, count)
    if count == 2:
        moments[1] = (moments[0] if variant == "bh2" else growth) / 2
    return moments


def _refuse_clip(name: str, clip: object) -> None:
    if clip is not None:
        wants = f"None: {name} remembers the noise, which has no bounds; dpmpp_2m, dpmpp_3m and unipc clip"
        raise ArgumentError("clip", shown(clip), wants)


def _noise_table(table: Table, grid: Levels, orders: npt.NDArray[np.int64], memory: Array) -> Sampler:
    """The table of x' / alpha' = x / alpha + memory @ (noise, earlier noise ..); first-order rows are filled in here.

    x / alpha is x0 + rho noise, and written so where the network does not predict the noise: then nothing is divided by
    a small signal, nor by none.
    """
    first, ratio = orders == 1, grid.ratio
    f, g = noise_from_output(grid.signal, grid.noise, table.prediction)
    p, q = x0_from_output(grid.signal, grid.noise, table.prediction)
    if table.prediction == "noise":
        memory[first, 0] = (grid.ratio_next - ratio)[first]
        a, e = grid.signal_next / grid.signal, np.zeros_like(ratio)
    else:
        memory[~first, 0] += ratio[~first]
        memory[first, 0] = grid.ratio_next[first]
        a, e = grid.signal_next * p, grid.signal_next * q
    memory *= grid.signal_next[:, None]
    return sampler(table, grid.t, p=f, q=g, a=a, e=e, **dict(zip(MEMORY, memory.T, strict=False)))
