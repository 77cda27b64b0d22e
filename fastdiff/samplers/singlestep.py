"""Samplers that start anew at every timestep: of first order, and of two stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_choice, check_float, shown
from fastdiff.samplers.levels import Levels, Table, check_growth, gap_variance, levels, sampler
from fastdiff.samplers.table import Clip, Sampler, check_schedule, noise_from_output, x0_from_output
from fastdiff.schedule import Array, Schedule

log = logging.getLogger("fastdiff")

VARIANCE_FLOOR = 1e-20
MOST_CHURN = math.sqrt(2) - 1  # of a level at a time, as in Karras et al. 2022, algorithm 2


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    variance: str = "small",
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "trailing",
    final: str = "zero",
) -> Sampler:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): draws from q(x' | x, x0) with the predicted x0.

    With beta_t the variance that the forward process adds across the gap to the next timestep, which is
    1 - abar / abar' where variance is preserved::

        x' = alpha sigma'^2 / (alpha' sigma^2)  x  +  alpha' beta_t / sigma^2  x0  +  s z

    (equations 6 and 7). The last row adds no noise and returns x0.

    Parameters
    ----------
    schedule : Schedule
        The schedule of the network.
    steps : int, optional
        Number of rows; None (default) visits all T timesteps.
    variance : {"small", "large", "learned_range"}, optional
        s^2: the posterior's, beta_t sigma'^2 / sigma^2 (floored at 1e-20), or beta_t; the two extreme choices
        of Ho et al. 2020, section 3.2, right for data of no spread and of unit variance. Or, for a network that has
        learned it, exp of what lies the fraction (v + 1) / 2 of the way from the logarithm of the former to that of
        the latter (Nichol & Dhariwal 2021, equation 15), v being its second output.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : str, optional
        What the network predicts, one of `PREDICTIONS`.
    spacing : str, optional
        Which timesteps, see `Schedule.timesteps`.
    final : {"zero", "sigma_min"}, optional
        Where the last row leads: to the clean sample, or to the noise level of t = 0 (the last timestep must
        then be above 0).

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
        If the first timestep is far from noise ("leading" spacing can do that).
    """
    check_schedule(schedule)
    grid = levels(schedule, schedule.T if steps is None else steps, spacing, final)
    check_choice("variance", variance, ("small", "large", "learned_range"))
    beta, ratio = gap_variance(grid), (grid.noise_next / grid.noise) ** 2
    small, large = np.maximum(beta * ratio, VARIANCE_FLOOR), np.maximum(beta, VARIANCE_FLOOR)
    deviation, r = np.sqrt(small if variance == "small" else large), np.zeros_like(beta)
    if variance == "learned_range":
        deviation = (small * large) ** 0.25
        r = np.where(grid.noise_next > 0, np.log(large / small) / 4, 0.0)
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    table = Table("ddpm", schedule, prediction, clip, None)
    a, b = grid.signal / grid.signal_next * ratio, grid.signal_next * beta / grid.noise**2
    return sampler(table, grid.t, p=p, q=q, a=a, b=b, s=np.where(grid.noise_next > 0, deviation, 0.0), r=r)


def ddim(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    reclip: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "trailing",
    final: str = "zero",
) -> Sampler:
    """Denoising diffusion implicit models (Song, Meng & Ermon 2021, equation 12)::

        x' = alpha' x0 + sqrt(sigma'^2 - s^2) noise + s z,      s^2 = eta^2 beta_t sigma'^2 / sigma^2

    (equation 16; beta_t as in `ddpm`). eta = 0 is deterministic and of first order; eta = 1 is `ddpm` with the small
    variance.

    Parameters
    ----------
    schedule : Schedule
        The schedule of the network.
    steps : int
        Number of rows.
    eta : float, optional
        Share of the ancestral noise, 0 to 1.
    reclip : bool, optional
        Where x0 is clipped, whether ``noise`` is (x - alpha x0) / sigma of the clipped x0, so that both agree, or the
        network's own (default, and what other programs do). With few rows there is little between them; with many
        the network's own leads away from what x0 says.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : str, optional
        What the network predicts, one of `PREDICTIONS`.
    spacing : str, optional
        Which timesteps, see `Schedule.timesteps`.
    final : {"zero", "sigma_min"}, optional
        As of `ddpm`.

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
    return _implicit("ddim", levels(schedule, steps, spacing, final), schedule, eta, reclip, clip, prediction)


def euler(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    reclip: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "trailing",
    final: str = "zero",
) -> Sampler:
    """Euler's method for the probability-flow equation in rho = sigma / alpha: the same table as `ddim`.

    On a flow schedule it is Euler's method along straight paths. Arguments, result and errors as of `ddim`.
    """
    return _implicit("euler", levels(schedule, steps, spacing, final), schedule, eta, reclip, clip, prediction)


def euler_ancestral(
    schedule: Schedule,
    steps: int,
    *,
    reclip: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "trailing",
    final: str = "zero",
) -> Sampler:
    """Euler's method to below the next level, and noise up to it: the same table as `ddim` with eta = 1.

    Arguments, result and errors as of `ddim`.
    """
    return _implicit(
        "euler_ancestral", levels(schedule, steps, spacing, final), schedule, 1.0, reclip, clip, prediction
    )


def _implicit(
    name: str, grid: Levels, schedule: Schedule, eta: float, reclip: bool, clip: Clip, prediction: str
) -> Sampler:
    eta = check_float("eta", eta, low=0, high=1)
    if not isinstance(reclip, bool):
        raise ArgumentError("reclip", shown(reclip), "True or False")
    ancestral = gap_variance(grid) * (grid.noise_next / grid.noise) ** 2
    direction = np.sqrt(np.maximum(grid.noise_next**2 - eta**2 * ancestral, 0.0))
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    if reclip:
        a = direction / grid.noise
        b, e = grid.signal_next - grid.signal * a, np.zeros_like(a)
    else:
        along_x, along_out = noise_from_output(grid.signal, grid.noise, prediction)
        a, b, e = direction * along_x, grid.signal_next, direction * along_out
    table = Table(name, schedule, prediction, clip, 1 if eta == 0 else None)
    return sampler(table, grid.t, p=p, q=q, a=a, b=b, e=e, s=eta * np.sqrt(ancestral))


# -- two stages ----------------------------------------------------------------------------------------------


def heun(
    schedule: Schedule,
    steps: int,
    *,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "karras",
    final: str = "zero",
) -> Sampler:
    """Heun's method in rho = sigma / alpha, with churn (Karras et al. 2022, EDM, algorithms 1 and 2): second order.

    A step of `euler` from rho to rho', an evaluation there, and the step is taken again with the mean of both slopes::

        x'' = x' + alpha' (rho - rho') / (2 rho') (x0' - x0)

    which leads from where the first stage ended, so the start need not be kept. The last step, to no noise, is Euler's.

    Churn raises the noise before a step, from rho to (1 + gamma) rho with gamma = min(churn / steps, sqrt(2) - 1). The
    level that is reached is that of the nearest timestep, and the noise that is added leads exactly there; above the
    last timestep of the schedule there is none.

    Parameters
    ----------
    schedule : Schedule
        The schedule of the network.
    steps : int
        Number of timesteps n; the network is evaluated 2 n - 1 times, and once less from noise alone.
    churn : float, optional
        How much noise is added on the way, in all; EDM's values for pictures are 40 and 80.
    s_tmin, s_tmax : float, optional
        Levels rho between which there is churn.
    s_noise : float, optional
        Factor of the standard deviation of what churn adds; EDM takes 1.003 or 1.007.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : str, optional
        What the network predicts, one of `PREDICTIONS`.
    spacing : str, optional
        Which timesteps, see `Schedule.timesteps`.
    final : {"zero", "sigma_min"}, optional
        As of `ddpm`.

    Returns
    -------
    Sampler

    Raises
    ------
    ArgumentError
        If an argument is none of these, or if churn raises no timestep to another one.

    Warns
    -----
    ScheduleWarning
        If the first timestep is far from noise.
    """
    grid = levels(schedule, steps, spacing, final)
    raised = _churned(schedule, grid, churn, s_tmin, s_tmax)
    s_noise = check_float("s_noise", s_noise, low=0)
    table = Table("heun", schedule, prediction, clip, 2 if churn == 0 else None)
    return _two_stages(table, grid, np.append(grid.t[1:], 0), _slopes_in_ratio, raised, s_noise)


def dpm2(
    schedule: Schedule,
    steps: int,
    *,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "trailing",
    final: str = "zero",
) -> Sampler:
    """The midpoint method in rho = sigma / alpha (Karras et al. 2022, algorithm 3, alpha = 1/2): second order.

    The first stage is a step of `euler` to the timestep m whose lambda is nearest to the middle; the second one weighs
    both slopes, so that it is of second order wherever m is. With c = (rho_m - rho) / (rho' - rho)::

        x' / alpha' = x / alpha + (rho' - rho) ((1 - 1 / (2 c)) slope + 1 / (2 c) slope_m)

    Between neighbouring timesteps it is a step of `heun`.

    Arguments, result, errors and warnings as of `heun`.
    """
    grid = levels(schedule, steps, spacing, final)
    table = Table("dpm2", schedule, prediction, clip, 2)
    return _two_stages(table, grid, _middles(schedule, grid), _slopes_in_ratio)


def dpmpp_2s(
    schedule: Schedule,
    steps: int,
    *,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "linspace_open",
    final: str = "zero",
) -> Sampler:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, algorithm 1): second order, nothing remembered between steps.

    With r = (lambda_m - lambda) / h for the timestep m that is nearest to the middle of the step in lambda::

        x_m = sigma_m / sigma x + alpha_m (1 - exp(-r h)) x0
        x'  = sigma' / sigma x + alpha' (1 - exp(-h)) ((1 - 1 / (2 r)) x0 + 1 / (2 r) x0_m)

    Arguments, result, errors and warnings as of `heun`.
    """
    grid = levels(schedule, steps, spacing, final)
    table = Table("dpmpp_2s", schedule, prediction, clip, 2)
    return _two_stages(table, grid, _middles(schedule, grid), _slopes_in_lambda)


def _middles(schedule: Schedule, grid: Levels) -> npt.NDArray[np.int64]:
    """Of every step the timestep below its first one that is nearest to its middle in lambda."""
    half_log_snr = schedule.log_snr / 2
    middles = np.append(grid.t[1:], 0)
    for i, (first, last) in enumerate(zip(grid.t, middles, strict=True)):
        if np.isfinite(grid.growth[i]):
            middle = grid.half_log_snr[i] + grid.growth[i] / 2
            middles[i] = last + np.abs(half_log_snr[last:first] - middle).argmin()
    return middles


def _slopes_in_ratio(grid: Levels, middle: Levels) -> tuple[Array, Array]:
    """(b, c1) of the second stage of a method in rho."""
    step = grid.ratio_next - grid.ratio
    c = (middle.ratio - grid.ratio) / step
    pull = -grid.signal_next * step / middle.ratio
    return pull / (2 * c), pull * (1 - c - 1 / (2 * c))


def _slopes_in_lambda(grid: Levels, middle: Levels) -> tuple[Array, Array]:
    """(b, c1) of the second stage of a method in lambda."""
    r = (middle.half_log_snr - grid.half_log_snr) / grid.growth
    pull = grid.signal_next * -np.expm1(-grid.growth)
    first_stage = middle.signal - grid.signal * middle.noise / grid.noise
    return pull / (2 * r), pull * (1 - 1 / (2 * r)) - grid.noise_next / middle.noise * first_stage


def _churned(schedule: Schedule, grid: Levels, churn: float, s_tmin: float, s_tmax: float) -> npt.NDArray[np.int64]:
    """Where churn leads from every timestep."""
    churn, s_tmin = check_float("churn", churn, low=0), check_float("s_tmin", s_tmin, low=0)
    if not (isinstance(s_tmax, float) and s_tmax == math.inf):
        s_tmax = check_float("s_tmax", s_tmax, low=s_tmin)
    inside = (grid.ratio >= s_tmin) & (grid.ratio <= s_tmax)
    gain = math.log1p(min(churn / len(grid.t), MOST_CHURN))
    raised = grid.t.copy()
    for i in np.flatnonzero(inside & np.isfinite(grid.half_log_snr)):
        raised[i] += np.abs(schedule.log_snr[grid.t[i] :] / 2 - (grid.half_log_snr[i] - gain)).argmin()
    changed = np.count_nonzero(raised != grid.t)
    if churn > 0 and not changed:
        got = f"{churn:g}, which is {math.expm1(gain):.3g} of a level at each of {len(grid.t)} steps"
        raise ArgumentError("churn", got, "so much that another timestep is reached, or fewer steps, or a larger T")
    if churn > 0:
        log.info("churn raises %d of %d timesteps to others", changed, len(grid.t))
    return raised


def _moved(schedule: Schedule, grid: Levels, t: npt.NDArray[np.int64]) -> Levels:
    """The same steps, from other timesteps."""
    half_log_snr = schedule.log_snr[t] / 2
    with np.errstate(invalid="ignore"):  # a level of pure noise stays where it is
        growth = np.where(t == grid.t, grid.growth, grid.half_log_snr + grid.growth - half_log_snr)
    return grid._replace(
        t=t, signal=schedule.signal[t], noise=schedule.noise[t], half_log_snr=half_log_snr, growth=growth
    )


def _two_stages(
    table: Table,
    grid: Levels,
    middles: npt.NDArray[np.int64],
    slopes: Callable[[Levels, Levels], tuple[Array, Array]],
    raised: npt.NDArray[np.int64] | None = None,
    s_noise: float = 1.0,
) -> Sampler:
    """Rows of steps from `raised`, by way of `middles`; those from pure noise or to none have one stage."""
    check_growth(grid)
    start = grid if raised is None else _moved(table.schedule, grid, raised)
    middle = _moved(table.schedule, grid, middles)
    two = np.isfinite(start.growth)
    ends = np.where(two, middle.signal, grid.signal_next), np.where(two, middle.noise, grid.noise_next)
    stages = np.stack([start.t != grid.t, np.ones_like(two), two], axis=1)  # churn, first stage, second stage
    t = np.stack([start.t, start.t, middles], axis=1)
    a, b, c1, s = np.zeros((4, *t.shape))
    with np.errstate(divide="ignore", invalid="ignore"):  # where there is no second stage
        a[:, 0] = start.signal / grid.signal
        b[:, 2], c1[:, 2] = slopes(start, middle)
    s[:, 0] = s_noise * np.sqrt(np.maximum(start.noise**2 - (a[:, 0] * grid.noise) ** 2, 0.0))
    a[:, 1], a[:, 2] = ends[1] / start.noise, grid.noise_next / middle.noise
    b[:, 1] = ends[0] - start.signal * a[:, 1]
    t, a, b, c1, s = (column[stages] for column in (t, a, b, c1, s))
    p, q = x0_from_output(table.schedule.signal[t], table.schedule.noise[t], table.prediction)
    evaluates = np.broadcast_to([False, True, True], stages.shape)[stages]
    return sampler(table, t, p=p * evaluates, q=q * evaluates, a=a, b=b, c1=c1, s=s)
