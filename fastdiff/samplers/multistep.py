"""Samplers that remember what the network said at earlier rows: one evaluation a row, order from two rows on."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_bool, check_choice, check_float, check_int, shown
from fastdiff.samplers.levels import (
    MEMORY,
    Levels,
    Table,
    kernel_moments,
    levels,
    noise_table,
    refuse_clip,
    refuse_infinite_step,
    row_orders,
    sampler,
    weights,
)
from fastdiff.samplers.table import Clip, Sampler, constructor, x0_from_output
from fastdiff.schedule import Float64, Schedule, Spacing

ADAMS = {
    2: np.array([3, -1]) / 2,
    3: np.array([23, -16, 5]) / 12,
    4: np.array([55, -59, 37, -9]) / 24,
}  # weights of Adams and Bashforth's methods of equal steps
MOST_NOISE = 1e6  # times that of the reverse stochastic equation


@constructor
def dpmpp_2m(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    solver: str = "midpoint",
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
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
    spacing : str or (steps,) array_like of int, optional
        Which timesteps, see `Schedule.timesteps`.
    final : {"zero", "sigma_min"}, optional
        Where the last row leads: to the clean sample, or to the noise level of t = 0. With timesteps that end at 0 the
        last row then stays there, and only a corrector (`unipc`, `sa_solver`) makes something of it.
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

    Examples
    --------
    >>> fd.samplers.dpmpp_2m(fd.Schedule.cosine(20), 5).evaluations
    5
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


@constructor
def dpmpp_3m(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    published: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
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

    Examples
    --------
    >>> fd.samplers.dpmpp_3m(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    eta = check_float("eta", eta, low=0)
    check_bool("published", published)
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


@constructor
def unipc(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    variant: str = "bh2",
    predict_x0: bool = True,
    uncorrected: tuple[int, ...] = (),
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
    final: str = "zero",
    lower_order_final: int | None = None,
) -> Sampler:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867): a predictor, and a corrector that costs nothing.

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
    predict_x0 : bool, optional
        Whether x0 is continued (default, and better), or the noise, as by `dpmsolver`: such a table cannot clip.
    uncorrected : tuple of int, optional
        Numbers of steps that are not taken again, from 0: the first ones, where strong guidance leads them astray.
    lower_order_final : {0, 1, 2}, optional
        As of `dpmpp_2m`; None: 1 with ``final="zero"``, 2 for order 3 and fewer than 15 rows.

    Returns, errors and warnings as for `dpmpp_2m`.

    Examples
    --------
    >>> fd.samplers.unipc(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    order = check_int("order", order, low=1, high=3)
    check_choice("variant", variant, ("bh1", "bh2"))
    if not check_bool("predict_x0", predict_x0):
        refuse_clip("unipc(predict_x0=False)", clip)
    orders = row_orders(grid, order, lower_order_final, final)
    refuse_infinite_step(orders, final)
    taken = orders + 1
    if not isinstance(uncorrected, (tuple, list)):
        raise ArgumentError("uncorrected", shown(uncorrected), "a tuple of numbers of steps")
    for step in uncorrected:
        taken[check_int("uncorrected", step, low=0, high=len(taken) - 1)] = 0
    table = Table("unipc", schedule, prediction, clip, order + 1)
    return _corrected(table, grid, orders, taken, predict_x0=predict_x0, slope=variant)


@constructor
def deis(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    clip: None = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
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

    Examples
    --------
    >>> fd.samplers.deis(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    order = check_int("order", order, low=1, high=3)
    refuse_clip("deis", clip)
    orders = row_orders(grid, order, lower_order_final, final)
    refuse_infinite_step(orders, final)
    memory = np.zeros((len(grid.t), 3))
    for i, width in enumerate(orders):
        if width > 1:
            moments = kernel_moments(-grid.growth[i], width)
            memory[i, :width] = grid.ratio_next[i] * weights(_places(grid, i, width), moments)
    return noise_table(Table("deis", schedule, prediction, None, order), grid, orders == 1, memory)


@constructor
def lms(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 4,
    clip: None = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
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

    Examples
    --------
    >>> fd.samplers.lms(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    order = check_int("order", order, low=1, high=4)
    refuse_clip("lms", clip)
    orders = row_orders(grid, order, lower_order_final, final)
    ratio, step = grid.ratio, grid.ratio_next - grid.ratio
    memory = np.zeros((len(grid.t), 4))
    for i, width in enumerate(orders):
        if width > 1:
            places = (ratio[i - np.arange(width)] - ratio[i]) / step[i]
            memory[i, :width] = step[i] * weights(places, 1 / np.arange(1.0, width + 1))
    return noise_table(Table("lms", schedule, prediction, None, order), grid, orders == 1, memory)


@constructor
def pndm(
    schedule: Schedule,
    steps: int,
    *,
    clip: None = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """PNDM's pseudo linear multistep, PLMS (Liu et al. 2022, arXiv 2202.09778, algorithm 2; Rombach et al. 2022).

    The transfer of `ddim` with a mean of the noise whose weights are those of Adams and Bashforth's method of equal
    steps, whatever the steps in rho = sigma / alpha are, which leaves it of second order::

        x' / alpha' = x / alpha + (rho' - rho) (55 noise - 59 noise_1 + 37 noise_2 - 9 noise_3) / 24

    It starts with a step of Heun's method, which evaluates the second timestep twice, and then of order 2 and 3. The
    first row that wants four values of the noise finds the oldest where the second evaluation left it together with the
    state. The start by Runge and Kutta's method, twelve evaluations for the first three steps, is no table: the first
    row after it wants the noise of 4, 8 and 12 evaluations before.

    Parameters
    ----------
    schedule, steps, prediction, spacing, final
        As of `dpmpp_2m`; the network is evaluated steps + 1 times.
    clip : None
        What is remembered is the noise, which has no bounds.

    Returns, errors and warnings as for `dpmpp_2m`.

    Examples
    --------
    >>> fd.samplers.pndm(fd.Schedule.cosine(20), 6).evaluations
    7
    """
    grid = levels(schedule, steps, spacing, final)
    refuse_clip("pndm", clip)
    return _pseudo(Table("pndm", schedule, prediction, None, 2), grid, twice=True)


@constructor
def ipndm(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 4,
    clip: None = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """Improved PNDM (Zhang & Chen 2023, arXiv 2204.13902, section 3.3): `pndm` that starts with lower orders.

    Parameters
    ----------
    schedule, steps, prediction, spacing, final
        As of `dpmpp_2m`.
    order : {1, 2, 3, 4}, optional
        How many rows the weights go through.
    clip : None
        What is remembered is the noise, which has no bounds.

    Returns, errors and warnings as for `dpmpp_2m`.

    Examples
    --------
    >>> fd.samplers.ipndm(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    order = check_int("order", order, low=1, high=4)
    refuse_clip("ipndm", clip)
    return _pseudo(Table("ipndm", schedule, prediction, None, min(order, 2)), grid, order)


@constructor
def dpmsolver(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    eta: float = 0.0,
    solver: str = "midpoint",
    published: bool = False,
    clip: None = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
    final: str = "zero",
    lower_order_final: int | None = None,
) -> Sampler:
    """DPM-Solver, multistep, in the noise (Lu et al. 2022, arXiv 2206.00927): what `dpmpp_2m` and `dpmpp_3m` improved.

    With lambda = log(alpha / sigma), h its growth and N_k the moments of exp(h (1 - v)) as of `deis`::

        x' = alpha' / alpha x + (1 + eta) sigma' (N_0 noise + N_1 d1 + N_2 d2) + sqrt(eta) sigma' sqrt(exp(2 h) - 1) z

    d1 and d2 being divided differences of the noise along lambda. It multiplies errors of the network by rho = sigma /
    alpha where the forms for x0 do not, and cannot clip; take those. With eta = 1 it is SDE-DPM-Solver; a step from
    noise alone, or to none, adds no noise. With ``solver="heun"`` and eta = 0 it is `deis`.

    Parameters
    ----------
    schedule, steps, prediction, spacing, final, lower_order_final
        As of `unipc`.
    order : {1, 2, 3}, optional
        How many rows the polynomial goes through.
    eta : float, optional
        Noise that is added on the way, 0 to 1e6: 0 none, 1 that of the reverse stochastic equation.
    solver : {"midpoint", "heun"}, optional
        Of rows of second order, as of `dpmpp_2m`.
    published : bool, optional
        For order 3: half of N_2, see `dpmpp_3m`.
    clip : None
        What is remembered is the noise, which has no bounds.

    Returns, errors and warnings as for `dpmpp_2m`.

    Examples
    --------
    >>> fd.samplers.dpmsolver(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    order, eta = check_int("order", order, low=1, high=3), check_float("eta", eta, low=0, high=MOST_NOISE)
    check_choice("solver", solver, ("midpoint", "heun"))
    check_bool("published", published)
    refuse_clip("dpmsolver", clip)
    orders = row_orders(grid, order, lower_order_final, final)
    refuse_infinite_step(orders, final)
    slope, noisy = "exact" if solver == "heun" else "bh2", np.where(np.isfinite(grid.growth), eta, 0.0)
    memory = np.zeros((len(grid.t), 3))
    for i, width in enumerate(orders):
        if width == 1:
            memory[i, 0] = noisy[i] * (grid.ratio_next[i] - grid.ratio[i]) if noisy[i] else 0.0
            continue
        moments = _data_moments(-grid.growth[i], width, slope)
        if width == 3 and published:
            moments[2] /= 2
        memory[i, :width] = (1 + noisy[i]) * grid.ratio_next[i] * weights(_places(grid, i, width), moments)
    table = Table("dpmsolver", schedule, prediction, None, _order(order, eta, published))
    return noise_table(table, grid, orders == 1, memory, s=grid.signal_next * np.sqrt(noisy * _fallen(grid)))


@constructor
def sa_solver(
    schedule: Schedule,
    steps: int,
    *,
    tau: float = 1.0,
    between: tuple[float, float] = (0.2, 0.8),
    predictor: int = 2,
    corrector: int = 2,
    predict_x0: bool = True,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
    final: str = "zero",
    lower_order_final: int | None = None,
) -> Sampler:
    """SA-Solver (Xue et al. 2023, arXiv 2309.05019): Adams' methods for the reverse stochastic equation of noise tau^2.

    A predictor of Adams and Bashforth and a corrector of Adams and Moulton, both with the moments of `dpmpp_2m`, eta =
    tau^2. The corrector takes a step again with what the network said at its end, and with the same noise: so it is
    linear in what a row remembers, as that of `unipc`, and costs no evaluation. A slope of two points has the weight
    H / 2, H = (1 + tau^2) h, as the authors' code has it. tau = 0 is `unipc` with "bh1", up to the orders chosen.

    Parameters
    ----------
    schedule, steps, clip, prediction, spacing, final
        As of `dpmpp_2m`.
    tau : float, optional
        Noise that is added on the way, 0 to 1000.
    between : (float, float), optional
        Rows at timesteps t with ``between[0] T <= t <= between[1] T`` have that tau, the others none.
    predictor : {1, 2, 3}, optional
        Through how many rows the predictor goes.
    corrector : {0, 1, 2, 3, 4}, optional
        Through how many the corrector goes, the end of the step among them; 0: there is none.
    predict_x0 : bool, optional
        Whether x0 is continued, or the noise, as by `dpmsolver`: such a table cannot clip.
    lower_order_final : {0, 1, 2}, optional
        As of `dpmpp_2m`; with 2 the last corrector has at most three points. None: as of `unipc`.

    Returns, errors and warnings as for `dpmpp_2m`.

    Examples
    --------
    >>> fd.samplers.sa_solver(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    tau = check_float("tau", tau, low=0, high=math.sqrt(MOST_NOISE))
    if not isinstance(between, (tuple, list)) or len(between) != 2:
        raise ArgumentError("between", shown(between), "a pair of fractions of T, (low, high)")
    low, high = (check_float("between", end, low=0, high=1) for end in between)
    predictor = check_int("predictor", predictor, low=1, high=3)
    corrector = check_int("corrector", corrector, low=0, high=4)
    if not check_bool("predict_x0", predict_x0):
        refuse_clip("sa_solver(predict_x0=False)", clip)
    orders = row_orders(grid, predictor, lower_order_final, final)
    refuse_infinite_step(orders, final)
    taken = np.minimum(corrector, row_orders(grid, 3, 0, "sigma_min") + 1)
    if lower_order_final == 2:
        taken = np.minimum(taken, np.arange(len(grid.t), 0, -1) + 1)
    noisy = (grid.t >= low * schedule.T) & (grid.t <= high * schedule.T) & (predict_x0 | np.isfinite(grid.growth))
    eta = np.where(noisy, tau**2, 0.0)
    table = Table("sa_solver", schedule, prediction, clip, max(predictor, corrector) if not eta.any() else None)
    slope = "bh1" if predict_x0 else "exact"
    return _corrected(table, grid, orders, taken, predict_x0=predict_x0, slope=slope, eta=eta)


# -- the parts that they share -------------------------------------------------------------------------------


def _decay(grid: Levels, eta: npt.ArrayLike) -> tuple[Float64, Float64]:
    """(a, s) of steps that add eta times the noise of the reverse stochastic equation."""
    a, eta = grid.noise_next / grid.noise, np.broadcast_to(eta, len(grid.t))
    lost = np.multiply(eta, grid.growth, out=np.zeros_like(a), where=eta > 0)
    return a * np.exp(-lost), grid.noise_next * np.sqrt(-np.expm1(-2 * lost))


def _order(order: int, eta: float, published: bool) -> int | None:
    return None if eta else 2 if published and order == 3 else order


def _places(grid: Levels, i: int, count: int) -> Float64:
    """Where the last `count` rows from row i back are in its step, which goes from 0 to 1 in lambda."""
    if count == 1:
        return np.zeros(1)
    return (grid.half_log_snr[i - np.arange(count)] - grid.half_log_snr[i]) / grid.growth[i]


def _data_moments(growth: float, count: int, slope: str = "bh2") -> Float64:
    """Moments of a polynomial through so many places; those of a straight line are half of B: see `unipc`.

    Unless the slope is "exact". Of a noise method the growth is that of -lambda.
    """
    if count == 1:
        return -np.expm1(-np.array([growth]))
    moments = kernel_moments(growth, count)
    if count == 2 and slope != "exact":
        moments[1] = (moments[0] if slope == "bh2" else growth) / 2
    return moments


def _pseudo(table: Table, grid: Levels, order: int = 4, *, twice: bool = False) -> Sampler:
    """Adams and Bashforth's weights of equal steps; where `twice`, the second timestep is evaluated two times."""
    orders = row_orders(grid, min(order, 3), 0, "sigma_min")  # 3 stands for 4 once there are so many
    rows, pure = len(grid.t), int(np.isinf(grid.half_log_snr[0]))
    step = grid.ratio_next - grid.ratio
    memory = np.zeros((rows, 4))
    for i, width in enumerate(orders):
        if width == 3 and order == 4 and i - pure >= 3:
            width = 4
        if width > 1:
            memory[i, :width] = step[i] * ADAMS[width]
    first, keeps, also = orders == 1, np.ones(rows), np.zeros(rows)
    if not twice or rows < 2 + pure:
        return noise_table(table, grid, first, memory)
    # With y = x / alpha and n the noise: y_1 = y_0 + d_0 n_0 is evaluated, and y_1' = y_0 + d_0 (n_0 + n_1) / 2.
    at, d = pure + 1, step[pure : pure + 3]
    again = np.insert(np.arange(rows), at, at)
    grid = grid.at(again)
    grid.signal_next[at], grid.noise_next[at], grid.growth[at] = grid.signal[at], grid.noise[at], 0.0
    first, keeps, also, memory = first[again], keeps[again], also[again], memory[again]
    first[at] = False
    # It remembers n_1 + 2 / d_0 y_1, which is n_0 + 2 / d_0 y_1'.
    also[at], keeps[at] = 2 / d[0] / grid.signal[at], 0.0
    memory[at] = d[0] / 2, -d[0] / 2, 0, 0
    later = memory[at + 1 :]  # of the rows after it, the second evaluation lies between two that they remember
    for row, back in zip(later, (1, 2), strict=False):
        row[back:] = np.append(0.0, row[back:-1])
    if len(later) > 2:
        # n_0 = m_3 - 2 / d_0 y_1', where y_3 = y_1' + d_1 (3 n_1' - n_0) / 2 + d_2 (23 n_2 - 16 n_1' + 5 n_0) / 12
        of_noise = np.array([0.0, 23 / 6 * d[2], 3 * d[1] - 16 / 6 * d[2]]) / d[0]
        share = later[2, 3] / (1 + (d[1] - 5 / 6 * d[2]) / d[0])
        keeps[at + 3] -= 2 / d[0] * share
        later[2, :3] += share * of_noise
        later[2, 3] = share
    return noise_table(table, grid, first, memory, keeps=keeps, also=also)


def _corrected(
    table: Table,
    grid: Levels,
    orders: npt.NDArray[np.int64],
    taken: npt.NDArray[np.int64],
    *,
    predict_x0: bool,
    slope: str,
    eta: Float64 | None = None,
) -> Sampler:
    """The table of a predictor whose every step is taken again once its end has been evaluated.

    `orders` are those of the predictors, `taken` say through how many points each step is taken again, its end among
    them; 0 leaves it. With the corrected state x + d, d linear in the memory, correction and the next prediction are
    one row; the noise of a step is the same in both, and so in none of d.
    """
    n = len(grid.t)
    eta = np.zeros(n) if eta is None else eta
    a, s = _decay(grid, eta)
    memory, before = np.zeros((n, 4)), np.zeros(4)
    for i, width in enumerate(orders):
        predicted = np.zeros(4)
        predicted[:width] = _step(grid, i, _places(grid, i, width), eta[i], predict_x0, slope)
        memory[i] = grid.signal_next[i] * predicted if predict_x0 else predicted
        if width == 1 and not predict_x0:  # the rest is filled in by `noise_table`
            memory[i, 0] = eta[i] * (grid.ratio_next[i] - grid.ratio[i]) if eta[i] else 0.0
        if i and np.isfinite(grid.growth[i - 1]) and taken[i - 1]:
            change = -np.roll(before, 1)  # what predicted this row's state; its oldest entry is 0
            places = np.append(1.0, _places(grid, i - 1, taken[i - 1] - 1))
            change[: taken[i - 1]] += _step(grid, i - 1, places, eta[i - 1], predict_x0, slope)
            memory[i] += a[i] * grid.signal[i] * change if predict_x0 else change
        before = predicted
    if not predict_x0:
        return noise_table(table, grid, orders == 1, memory, s=grid.signal_next * np.sqrt(eta * _fallen(grid)))
    p, q = x0_from_output(grid.signal, grid.noise, table.prediction)
    return sampler(table, grid.t, p=p, q=q, a=a, s=s, **dict(zip(MEMORY, memory.T, strict=True)))


def _step(grid: Levels, i: int, places: Float64, eta: float, predict_x0: bool, slope: str) -> Float64:
    """Weights of what is known at places of step i, for x' / alpha' where the noise is continued.

    From noise alone the first-order weight of the noise is minus infinity: `noise_table` knows.
    """
    if predict_x0:
        return weights(places, _data_moments((1 + eta) * grid.growth[i], len(places), slope))
    if len(places) == 1:
        return (1 + eta) * np.array([grid.ratio_next[i] - grid.ratio[i]])
    return (1 + eta) * grid.ratio_next[i] * weights(places, _data_moments(-grid.growth[i], len(places), slope))


def _fallen(grid: Levels) -> Float64:
    """rho^2 - rho'^2, and 0 from noise alone and to none, where noise methods are deterministic."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(grid.growth), grid.ratio**2 - grid.ratio_next**2, 0.0)
