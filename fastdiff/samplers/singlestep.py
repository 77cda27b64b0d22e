"""Samplers that start anew at every timestep: of first order, and of two stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Row
from fastdiff.errors import ArgumentError, check_bool, check_choice, check_float, check_int
from fastdiff.samplers.levels import (
    Levels,
    Table,
    check_growth,
    gap_variance,
    kernel_moments,
    levels,
    noise_table,
    refuse_clip,
    sampler,
    weights,
)
from fastdiff.samplers.table import Clip, Sampler, check_schedule, constructor, noise_from_output, x0_from_output
from fastdiff.schedule import Float64, Schedule, Spacing

log = logging.getLogger("fastdiff")

Columns = tuple[Float64, Float64, Float64, Float64]

VARIANCE_FLOOR = 1e-20
MOST_CHURN = math.sqrt(2) - 1  # of a level at a time, as in Karras et al. 2022, algorithm 2


@constructor
def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    variance: str = "small",
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
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
    spacing : str or (steps,) array_like of int, optional
        Which timesteps, see `Schedule.timesteps`.
    final : {"zero", "sigma_min"}, optional
        Where the last row leads: to the clean sample, or to the noise level of t = 0. With timesteps that end at 0 the
        last row then stays there.

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

    Examples
    --------
    >>> fd.samplers.ddpm(fd.Schedule.cosine(20))
    <Sampler ddpm: 20 rows of T=20, noise prediction>
    >>> fd.samplers.ddpm(fd.Schedule.cosine(20), 5).timesteps
    array([19, 15, 11,  7,  3])
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
    s = np.where((grid.noise_next > 0) & ~grid.stays, deviation, 0.0)
    return sampler(table, grid.t, p=p, q=q, a=a, b=b, s=s, r=r)


@constructor
def ddim(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    reclip: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
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
    spacing : str or (steps,) array_like of int, optional
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

    Examples
    --------
    >>> fd.samplers.ddim(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid, eta = levels(schedule, steps, spacing, final), check_float("eta", eta, low=0, high=1)
    table = Table("ddim", schedule, prediction, clip, 1 if eta == 0 else None)
    return sampler(table, grid.t, **_implicit(table, grid, eta, reclip))


@constructor
def euler(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    reclip: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """Euler's method for the probability-flow equation in rho = sigma / alpha: the same table as `ddim`, and churn.

    On a flow schedule it is Euler's method along straight paths.

    Parameters
    ----------
    schedule, steps, eta, reclip, clip, prediction, spacing, final
        As of `ddim`.
    churn, s_tmin, s_tmax, s_noise : float, optional
        Noise before steps, as of `heun`: Karras et al. 2022, algorithm 2, without its correction.

    Returns, errors and warnings as of `ddim`.

    Examples
    --------
    >>> fd.samplers.euler(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid, eta = levels(schedule, steps, spacing, final), check_float("eta", eta, low=0, high=1)
    start = _moved(schedule, grid, _churned(schedule, grid, churn, s_tmin, s_tmax))
    s_noise = check_float("s_noise", s_noise, low=0)
    table = Table("euler", schedule, prediction, clip, 1 if eta == churn == 0 else None)
    columns = _implicit(table, start, eta, reclip)
    return _raised_first(table, grid, start, s_noise, np.arange(len(grid.t)), t=start.t, **columns)


@constructor
def euler_ancestral(
    schedule: Schedule,
    steps: int,
    *,
    reclip: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """Euler's method to below the next level, and noise up to it: the same table as `ddim` with eta = 1.

    Arguments, result and errors as of `ddim`.

    Examples
    --------
    >>> fd.samplers.euler_ancestral(fd.Schedule.cosine(20), 5).evaluations
    5
    """
    grid = levels(schedule, steps, spacing, final)
    table = Table("euler_ancestral", schedule, prediction, clip, None)
    return sampler(table, grid.t, **_implicit(table, grid, 1.0, reclip))


def _implicit(table: Table, grid: Levels, eta: float, reclip: bool) -> dict[str, Float64]:
    ancestral = gap_variance(grid) * (grid.noise_next / grid.noise) ** 2
    direction = np.sqrt(np.maximum(grid.noise_next**2 - eta**2 * ancestral, 0.0))
    return _towards(table, grid, direction, eta * np.sqrt(ancestral), reclip)


def _towards(table: Table, grid: Levels, direction: Float64, s: Float64, reclip: bool) -> dict[str, Float64]:
    """Columns of x' = alpha' x0 + direction noise + s z, the noise taken from x0 where it is to be `reclip`."""
    check_bool("reclip", reclip)
    p, q = x0_from_output(grid.signal, grid.noise, table.prediction)
    if reclip:
        a = direction / grid.noise
        b, e = grid.signal_next - grid.signal * a, np.zeros_like(a)
    else:
        along_x, along_out = noise_from_output(grid.signal, grid.noise, table.prediction)
        a, b, e = direction * along_x, grid.signal_next, direction * along_out
    return {"p": p, "q": q, "a": a, "b": b, "e": e, "s": s}


@constructor
def lcm(
    schedule: Schedule,
    steps: int,
    *,
    timestep_scaling: float = 10.0,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """Multistep sampling of latent consistency models (LCM, Luo et al. 2023, arXiv 2310.04378).

    For networks that were distilled to jump to the data: x0 is taken for a sample, and noised anew to the next level::

        x' = alpha' (c_out x0 + c_skip x) + sigma' z

    with c_skip = 0.25 / (u^2 + 0.25), c_out = u / sqrt(u^2 + 0.25) and u = timestep_scaling t. Of another network,
    whose x0 is a mean, the samples lack variance.

    Parameters
    ----------
    schedule, steps, clip, prediction, spacing, final
        As of `ddpm`.
    timestep_scaling : float, optional
        At least 0: how soon x0 counts for all; infinity is x0 alone, at t = 0 too.

    Returns, errors and warnings as of `ddpm`.

    Examples
    --------
    >>> fd.samplers.lcm(fd.Schedule.cosine(20), 4).evaluations
    4
    """
    grid = levels(schedule, steps, spacing, final)
    if not (isinstance(timestep_scaling, float) and timestep_scaling == math.inf):
        timestep_scaling = check_float("timestep_scaling", timestep_scaling, low=0)
    with np.errstate(invalid="ignore"):
        u = np.where(timestep_scaling == math.inf, np.inf, timestep_scaling * grid.t)
        skip, out = 0.25 / (u**2 + 0.25), np.where(np.isinf(u), 1.0, u / np.sqrt(u**2 + 0.25))
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    table = Table("lcm", schedule, prediction, clip, None)
    a, b, s = grid.signal_next * skip, grid.signal_next * out, grid.noise_next.copy()
    s[-1] = 0.0
    return sampler(table, grid.t, p=p, q=q, a=a, b=b, s=s)


@constructor
def consistency(
    schedule: Schedule,
    steps: int,
    *,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1 and appendix C).

    For networks that were distilled to jump to the data. What they say counts for less the nearer the noise is to the
    least one, rho_0 = sigma / alpha at t = 0, where the state itself is the answer; and noise is added anew::

        f  = (1 - rho_0 / rho) x0 + (1 / (1 + (rho - rho_0)^2) - (1 - rho_0 / rho) / (1 + rho^2)) x / alpha
        x' = alpha' (f + sqrt(rho'^2 - rho_0^2) z)

    f is clipped, not x0. With the authors' scalings c_in, c_out and c_skip for data of deviation d, their network is
    one of v with the sign turned, for data divided by d and a schedule of rho = their sigma / d.

    Arguments, result, errors and warnings as of `ddpm`.

    Examples
    --------
    >>> fd.samplers.consistency(fd.Schedule.cosine(20), 2).evaluations
    2
    """
    grid = levels(schedule, steps, spacing, final)
    least = schedule.noise[0] / schedule.signal[0]
    keep, a = 1 - least * grid.signal / grid.noise, grid.signal
    skip = a / ((grid.noise - least * a) ** 2 + a**2) - keep * a / (a**2 + grid.noise**2)  # of x
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    s = np.sqrt(np.maximum(grid.noise_next**2 - (least * grid.signal_next) ** 2, 0.0))
    s[-1] = 0.0
    table = Table("consistency", schedule, prediction, clip, None)
    return sampler(table, grid.t, p=keep * p + skip, q=keep * q, b=grid.signal_next, s=s)


@constructor
def tcd(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.3,
    reclip: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """Strategic stochastic sampling (TCD, Zheng et al. 2024, arXiv 2402.19159, algorithm 4).

    A step of `ddim` to the timestep s = floor((1 - eta) t') below the next one, t', and forward noise up to it::

        x' = (alpha' / alpha_s) (alpha_s x0 + sigma_s noise) + sqrt(sigma'^2 - (alpha' / alpha_s)^2 sigma_s^2) z

    Made for networks that were distilled along trajectories. With others a leap of `ddim` below every level remains,
    however many there are: more steps do not come nearer.

    Parameters
    ----------
    schedule, steps, reclip, clip, prediction, spacing, final
        As of `ddim`.
    eta : float, optional
        0 to 1: 0 is `ddim`; with 1 all is noised anew from t = 0. The authors' gamma.

    Returns, errors and warnings as of `ddpm`.

    Examples
    --------
    >>> fd.samplers.tcd(fd.Schedule.cosine(20), 4).evaluations
    4
    """
    grid = levels(schedule, steps, spacing, final)
    eta = check_float("eta", eta, low=0, high=1)
    below = np.append(np.floor((1 - eta) * grid.t[1:]).astype(np.int64), 0)
    signal, noise = schedule.signal[below], schedule.noise[below]
    signal[-1], noise[-1] = grid.signal_next[-1], grid.noise_next[-1]
    rise = grid.signal_next / signal
    s = np.sqrt(np.maximum(grid.noise_next**2 - (rise * noise) ** 2, 0.0))
    table = Table("tcd", schedule, prediction, clip, 1 if eta == 0 else None)
    return sampler(table, grid.t, **_towards(table, grid, rise * noise, s, reclip))


# -- two stages ----------------------------------------------------------------------------------------------


@constructor
def heun(
    schedule: Schedule,
    steps: int,
    *,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    velocity: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "karras",
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
    velocity : bool, optional
        On a flow schedule: Heun's method in sigma, with slopes noise - x0, which are finite at both ends, so that the
        first step from noise alone has two stages as well. Without churn and clip.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : str, optional
        What the network predicts, one of `PREDICTIONS`.
    spacing : str or (steps,) array_like of int, optional
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

    Examples
    --------
    >>> fd.samplers.heun(fd.Schedule.cosine(20), 5).evaluations
    7
    """
    grid = levels(schedule, steps, spacing, final)
    if check_bool("velocity", velocity):
        return _heun_of_velocity(schedule, grid, prediction, churn, clip)
    raised = _churned(schedule, grid, churn, s_tmin, s_tmax)
    s_noise = check_float("s_noise", s_noise, low=0)
    table = Table("heun", schedule, prediction, clip, 2 if churn == 0 else None)
    return _two_stages(table, grid, np.append(grid.t[1:], 0), _slopes_in_ratio, raised, s_noise)


def _heun_of_velocity(schedule: Schedule, grid: Levels, prediction: str, churn: float, clip: Clip) -> Sampler:
    if schedule.kind != "flow":
        raise ArgumentError("velocity", "True", "False for a schedule that is no flow")
    if churn != 0:
        raise ArgumentError("churn", f"{churn!r} with velocity=True", "0 there")
    if clip is not None:
        raise ArgumentError("clip", f"{clip!r} with velocity=True", "None there: what is remembered is the velocity")
    two = (grid.noise_next > 0) & ~grid.stays
    stages = np.stack([np.ones_like(two), two], axis=1)
    t = np.stack([grid.t, np.append(grid.t[1:], 0)], axis=1)[stages]
    step = grid.noise_next - grid.noise
    b, c1 = np.stack([step, step / 2], axis=1)[stages], np.stack([0 * step, -step / 2], axis=1)[stages]
    signal, noise = schedule.signal[t], schedule.noise[t]
    p, q = (
        of_noise - of_x0
        for of_noise, of_x0 in zip(
            noise_from_output(signal, noise, prediction), x0_from_output(signal, noise, prediction), strict=True
        )
    )
    return sampler(Table("heun", schedule, prediction, None, 2), t, p=p, q=q, a=1.0, b=b, c1=c1)


@constructor
def dpm2(
    schedule: Schedule,
    steps: int,
    *,
    published: bool = False,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """The midpoint method in rho = sigma / alpha (Karras et al. 2022, algorithm 3, alpha = 1/2): second order.

    The first stage is a step of `euler` to the timestep m whose lambda is nearest to the middle; the second one weighs
    both slopes, so that it is of second order wherever m is. With c = (rho_m - rho) / (rho' - rho)::

        x' / alpha' = x / alpha + (rho' - rho) ((1 - 1 / (2 c)) slope + 1 / (2 c) slope_m)

    Between neighbouring timesteps it is a step of `heun`.

    Parameters
    ----------
    schedule, steps, clip, prediction, spacing, final
        As of `heun`.
    published : bool, optional
        slope_m alone, as other programs have it: of second order only where m is in the middle, which few steps are.

    Returns, errors and warnings as of `heun`.

    Examples
    --------
    >>> fd.samplers.dpm2(fd.Schedule.cosine(20), 5).evaluations
    9
    """
    grid = levels(schedule, steps, spacing, final)
    slopes = _slope_of_middle if check_bool("published", published) else _slopes_in_ratio
    table = Table("dpm2", schedule, prediction, clip, None if published else 2)
    return _two_stages(table, grid, _middles(schedule, grid), slopes)


@constructor
def dpmpp_2s(
    schedule: Schedule,
    steps: int,
    *,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
    final: str = "zero",
) -> Sampler:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, algorithm 1): second order, nothing remembered between steps.

    With r = (lambda_m - lambda) / h for the timestep m that is nearest to the middle of the step in lambda::

        x_m = sigma_m / sigma x + alpha_m (1 - exp(-r h)) x0
        x'  = sigma' / sigma x + alpha' (1 - exp(-h)) ((1 - 1 / (2 r)) x0 + 1 / (2 r) x0_m)

    Arguments, result, errors and warnings as of `heun`.

    Examples
    --------
    >>> fd.samplers.dpmpp_2s(fd.Schedule.cosine(20), 5).evaluations
    9
    """
    grid = levels(schedule, steps, spacing, final)
    table = Table("dpmpp_2s", schedule, prediction, clip, 2)
    return _two_stages(table, grid, _middles(schedule, grid), _slopes_in_lambda)


@constructor
def dpm2_ancestral(
    schedule: Schedule,
    steps: int,
    *,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """The midpoint method in rho to below the next level, and noise up to it (Karras' ``sample_dpm_2_ancestral``).

    It leads to rho_down = rho'^2 / rho, and noise of deviation sqrt(rho'^2 - rho_down^2) leads back. The middle in the
    logarithm between rho and rho_down is rho' itself: the next timestep is evaluated twice, and no middle is rounded::

        x' / alpha' = x / alpha + (rho_down - rho) slope_m + sqrt(rho'^2 - rho_down^2) z

    A step from noise alone is one of `euler`.

    Arguments, result, errors and warnings as of `heun`.

    Examples
    --------
    >>> fd.samplers.dpm2_ancestral(fd.Schedule.cosine(20), 5).evaluations
    9
    """
    grid = levels(schedule, steps, spacing, final)
    table = Table("dpm2_ancestral", schedule, prediction, clip, None)
    return _two_stages(table, grid, np.append(grid.t[1:], 0), _slopes_to_below)


@constructor
def dpmpp_sde(
    schedule: Schedule,
    steps: int,
    *,
    clip: None = None,
    prediction: str = "noise",
    spacing: Spacing = "trailing",
    final: str = "zero",
) -> Sampler:
    """DPM-Solver++ for the reverse stochastic equation in two stages (Karras' ``sample_dpmpp_sde``).

    With rho = sigma / alpha and x0_m that of the timestep m nearest to the middle of the step in lambda, to which the
    first stage leads as the second one leads to the end::

        x' / alpha' = (rho' / rho)^2 x / alpha + (1 - (rho' / rho)^2) x0_m + rho' sqrt(1 - (rho' / rho)^2) z

    The two stages share the noise of a Brownian motion in rho: that of the first is in z with a correlation of
    sqrt((rho - rho_m) / (rho - rho')). A step from noise alone is one of `euler`.

    Parameters
    ----------
    schedule, steps, prediction, spacing, final
        As of `heun`.
    clip : None
        What is remembered is a mixture of x and x0, which has no bounds.

    Returns, errors and warnings as of `heun`.

    Examples
    --------
    >>> fd.samplers.dpmpp_sde(fd.Schedule.cosine(20), 5).evaluations
    9
    """
    grid = levels(schedule, steps, spacing, final)
    check_growth(grid)
    refuse_clip("dpmpp_sde", clip)
    middles = _middles(schedule, grid)
    middle, two = _moved(schedule, grid, middles), np.isfinite(grid.growth) & ~grid.stays
    p, q = x0_from_output(grid.signal, grid.noise, prediction)
    columns = np.zeros((2, len(Row._fields), len(grid.t)))
    first, second = (dict(zip(Row._fields, stage, strict=True)) for stage in columns)
    first["t"][:], second["t"][:] = grid.t, middles
    with np.errstate(divide="ignore", invalid="ignore"):  # where there is no second stage
        keep_m, keep = (middle.ratio / grid.ratio) ** 2, (grid.ratio_next / grid.ratio) ** 2
        up_m, up = middle.ratio * np.sqrt(1 - keep_m), grid.ratio_next * np.sqrt(1 - keep)
        share = np.sqrt(np.minimum((grid.ratio - middle.ratio) / (grid.ratio - grid.ratio_next), 1.0))
        again = up * share / up_m  # of the state in the middle, for its noise
        of_x, of_x0 = (keep - again * keep_m) / grid.signal, -again * (1 - keep_m)
        first["p"][:], first["q"][:] = of_x + of_x0 * p, of_x0 * q
        first["a"][:] = middle.signal * (keep_m / grid.signal + (1 - keep_m) * p)
        first["e"][:], first["s"][:] = middle.signal * (1 - keep_m) * q, middle.signal * up_m
    one = ~two
    straight = grid.noise_next / grid.noise
    first["p"][one], first["q"][one], first["e"][one], first["s"][one] = p[one], q[one], 0.0, 0.0
    first["a"][one], first["b"][one] = straight[one], (grid.signal_next - grid.signal * straight)[one]
    second["p"][:], second["q"][:] = x0_from_output(middle.signal, middle.noise, prediction)
    second["a"][:], second["b"][:] = again * grid.signal_next / middle.signal, grid.signal_next * (1 - keep)
    second["c1"][:], second["s"][:] = grid.signal_next, grid.signal_next * up * np.sqrt(1 - share**2)
    rows = columns.transpose(2, 0, 1)[np.stack([np.ones_like(two), two], axis=1)]
    table = Table("dpmpp_sde", schedule, prediction, None, None)
    return sampler(table, rows[:, 0], **dict(zip(Row._fields[1:], rows.T[1:], strict=True)))


@constructor
def dpmsolver_single(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    eta: float = 0.0,
    solver: str = "midpoint",
    predict_x0: bool = True,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: Spacing = "linspace_open",
    final: str = "zero",
) -> Sampler:
    """DPM-Solver and DPM-Solver++, single step, along given timesteps (Lu et al. 2022, 2206.00927 and 2211.01095).

    `order` rows in turn begin from the state x of the first of them, with the polynomial through what the network said
    at the first two and then three of their timesteps; x is read back from the state that was reached, in which only
    what is remembered was added. What is left of the rows at the end, at least one, is of lower order.

    With ``solver="midpoint"`` a straight line has half of its first moment, and what follows the third timestep is a
    straight line as well, through the first and the last: right for three steps of equal lengths in lambda.
    "heun" has the moments of the polynomial. See `dpmpp_2s` for steps that have timesteps of their own inside.

    Parameters
    ----------
    schedule, steps, prediction, spacing, final
        As of `dpmpp_2m`; a row is one evaluation.
    order : {1, 2, 3}, optional
        How many rows begin from one state.
    eta : float, optional
        0, or 1 for orders 1 and 2: SDE-DPM-Solver++. Noise of a row that is not the last of its turn is in what the
        network sees, and then left behind.
    solver : {"midpoint", "heun"}, optional
    predict_x0 : bool, optional
        Whether x0 is continued (DPM-Solver++), or the noise (DPM-Solver), without a clip.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`; None for the noise, and with eta = 1 and order 2, which remember something else.

    Returns, errors and warnings as for `dpmpp_2m`.

    Examples
    --------
    >>> fd.samplers.dpmsolver_single(fd.Schedule.cosine(20), 6).evaluations
    6
    """
    grid = levels(schedule, steps, spacing, final)
    check_growth(grid)
    order, eta = check_int("order", order, low=1, high=3), check_float("eta", eta, low=0, high=1)
    check_choice("solver", solver, ("midpoint", "heun"))
    check_bool("predict_x0", predict_x0)
    if eta and (order == 3 or eta < 1 or not predict_x0):
        raise ArgumentError(
            "eta", f"{eta:g} for order {order}, predict_x0={predict_x0}", "0, or 1 for x0 and order 1, 2"
        )
    if not check_bool("predict_x0", predict_x0) or (eta and order == 2):
        refuse_clip("dpmsolver_single that remembers something else", clip)
    name = Table("dpmsolver_single", schedule, prediction, clip, None if eta else order)
    turn = _turns(grid, order, final)
    return _turns_with_noise(name, grid, turn, solver) if eta else _turns_in(name, grid, turn, solver, predict_x0)


def _middles(schedule: Schedule, grid: Levels) -> npt.NDArray[np.int64]:
    """Of every step the timestep below its first one that is nearest to its middle in lambda."""
    half_log_snr = schedule.log_snr / 2
    middles = np.append(grid.t[1:], 0)
    for i, (first, last) in enumerate(zip(grid.t, middles, strict=True)):
        if np.isfinite(grid.growth[i]) and first > last:
            middle = grid.half_log_snr[i] + grid.growth[i] / 2
            middles[i] = last + np.abs(half_log_snr[last:first] - middle).argmin()
    return middles


def _slopes_in_ratio(grid: Levels, middle: Levels, weight: float | None = None) -> Columns:
    """(a, b, c1, s) of the second stage of a method in rho, whose slope has this weight, or that of second order."""
    step = grid.ratio_next - grid.ratio
    c = (middle.ratio - grid.ratio) / step
    pull = -grid.signal_next * step / middle.ratio
    share = 1 / (2 * c) if weight is None else weight
    return grid.noise_next / middle.noise, pull * share, pull * (1 - c - share), np.zeros_like(c)


def _slope_of_middle(grid: Levels, middle: Levels) -> Columns:
    return _slopes_in_ratio(grid, middle, 1.0)


def _slopes_to_below(grid: Levels, middle: Levels) -> Columns:
    """(a, b, c1, s) of the second stage of `dpm2_ancestral`."""
    fall = grid.ratio_next / grid.ratio
    noise = grid.noise_next * np.sqrt(1 - fall**2)
    return fall, grid.signal_next * (1 / fall - fall), grid.signal_next * (1 - 1 / fall), noise


def _slopes_in_lambda(grid: Levels, middle: Levels) -> Columns:
    """(a, b, c1, s) of the second stage of a method in lambda."""
    r = (middle.half_log_snr - grid.half_log_snr) / grid.growth
    pull = grid.signal_next * -np.expm1(-grid.growth)
    first_stage = middle.signal - grid.signal * middle.noise / grid.noise
    a = grid.noise_next / middle.noise
    return a, pull / (2 * r), pull * (1 - 1 / (2 * r)) - a * first_stage, np.zeros_like(a)


def _churned(schedule: Schedule, grid: Levels, churn: float, s_tmin: float, s_tmax: float) -> npt.NDArray[np.int64]:
    """Where churn leads from every timestep."""
    churn, s_tmin = check_float("churn", churn, low=0), check_float("s_tmin", s_tmin, low=0)
    if not (isinstance(s_tmax, float) and s_tmax == math.inf):
        s_tmax = check_float("s_tmax", s_tmax)
        if s_tmax < s_tmin:
            raise ArgumentError("s_tmax", f"{s_tmax:g}", f"at least s_tmin = {s_tmin:g}")
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
    slopes: Callable[[Levels, Levels], Columns],
    raised: npt.NDArray[np.int64] | None = None,
    s_noise: float = 1.0,
) -> Sampler:
    """Rows of steps from `raised`, by way of `middles`; those from pure noise or to none have one stage."""
    check_growth(grid)
    start = grid if raised is None else _moved(table.schedule, grid, raised)
    middle = _moved(table.schedule, grid, middles)
    two = np.isfinite(start.growth) & (start.growth != 0)
    ends = np.where(two, middle.signal, grid.signal_next), np.where(two, middle.noise, grid.noise_next)
    stages = np.stack([np.ones_like(two), two], axis=1)
    t = np.stack([start.t, middles], axis=1)
    a, b, c1, s = np.zeros((4, *t.shape))
    with np.errstate(divide="ignore", invalid="ignore"):  # where there is no second stage
        a[:, 1], b[:, 1], c1[:, 1], s[:, 1] = slopes(start, middle)
    a[:, 0] = ends[1] / start.noise
    b[:, 0] = ends[0] - start.signal * a[:, 0]
    t, a, b, c1, s = (column[stages] for column in (t, a, b, c1, s))
    p, q = x0_from_output(table.schedule.signal[t], table.schedule.noise[t], table.prediction)
    begins = np.cumsum(1 + two) - 1 - two
    return _raised_first(table, grid, start, s_noise, begins, t=t, p=p, q=q, a=a, b=b, c1=c1, s=s)


def _raised_first(
    table: Table,
    grid: Levels,
    start: Levels,
    s_noise: float,
    begins: npt.NDArray[np.int64],
    **columns: npt.NDArray[Any],
) -> Sampler:
    """The table of these columns, with noise up to where a step begins, if that is not where the last one led.

    Step i begins in row ``begins[i]``.
    """
    raised = start.t != grid.t
    keep = start.signal[raised] / grid.signal[raised]
    s = s_noise * np.sqrt(np.maximum(start.noise[raised] ** 2 - (keep * grid.noise[raised]) ** 2, 0.0))
    first = {"t": start.t[raised], "a": keep, "s": s}
    columns = {name: np.insert(column, begins[raised], first.get(name, 0.0)) for name, column in columns.items()}
    return sampler(table, **columns)


# -- turns of rows that begin from one state ----------------------------------------------------------------


def _turns(grid: Levels, order: int, final: str) -> npt.NDArray[np.int64]:
    """Of every row how many of its turn have come, with itself; 1 from noise alone, and in the last row to none.

    As the authors' code has it: turns are whole, but for the last, which has less by one at least, and goes alone.
    """
    start = int(np.isinf(grid.half_log_snr[0]))
    count = len(grid.t) - start
    whole = count // order if final == "sigma_min" and count % order == 0 else (count - 1) // order
    rest = count - whole * order
    lengths = [1] * start + [order] * whole + ([order - 1, 1] if rest == order else [rest])
    turn = np.concatenate([np.arange(1, length + 1) for length in lengths])
    if final == "zero":
        turn[-1] = 1
    return turn


def _turn_step(grid: Levels, i: int, turn: int, solver: str, sign: float) -> tuple[float, Float64]:
    """(growth, weights) from the first row of a turn to the end of row i: of what rows i, i - 1 .. said.

    `sign` is 1 + eta for x0, and -1 for the noise.
    """
    base = i + 1 - turn
    growth = float(grid.growth[base : i + 1].sum())
    if turn == 1:
        return growth, -np.expm1(-np.array([sign * growth]))
    places = (grid.half_log_snr[i - np.arange(turn)] - grid.half_log_snr[base]) / growth
    moments = kernel_moments(sign * growth, turn)
    if solver == "heun":
        return growth, weights(places, moments)
    if turn == 2:
        moments[1] = moments[0] / 2
    found = np.zeros(turn)
    found[[0, -1]] = weights(places[[0, -1]], moments[:2])
    return growth, found


def _turns_in(table: Table, grid: Levels, turn: npt.NDArray[np.int64], solver: str, predict_x0: bool) -> Sampler:
    """The deterministic table: from the state of row i back to the first of its turn, and on."""
    memory, a = np.zeros((len(turn), 3)), np.ones(len(turn))
    before, kept = np.zeros(3), 1.0
    for i, width in enumerate(turn):
        if width == 1:
            before, kept = np.zeros(3), 1.0
        step, keep = np.zeros(3), 1.0
        if predict_x0:
            keep = grid.noise_next[i] / grid.noise[i + 1 - width]
            step[:width] = grid.signal_next[i] * _turn_step(grid, i, width, solver, 1.0)[1]
        elif width > 1:
            step[:width] = grid.ratio_next[i] * _turn_step(grid, i, width, solver, -1.0)[1]
        elif np.isfinite(grid.growth[i]):
            step[0] = grid.ratio_next[i] - grid.ratio[i]
        a[i] = keep / kept
        memory[i] = step - a[i] * np.append(0.0, before[:-1])
        before, kept = step, keep
    if not predict_x0:
        memory[turn == 1] = 0.0  # filled in there
        return noise_table(table, grid, turn == 1, memory)
    p, q = x0_from_output(grid.signal, grid.noise, table.prediction)
    return sampler(table, grid.t, p=p, q=q, a=a, **dict(zip(("b", "c1", "c2"), memory.T, strict=True)))


def _turns_with_noise(table: Table, grid: Levels, turn: npt.NDArray[np.int64], solver: str) -> Sampler:
    """The stochastic table: the first row of a turn of two remembers the part of the second step that it knows."""
    p, q = x0_from_output(grid.signal, grid.noise, table.prediction)
    rows = np.zeros((len(turn), len(Row._fields)))
    for i, width in enumerate(turn):
        growth, found = _turn_step(grid, i, width, solver, 2.0)
        found = grid.signal_next[i] * found
        keep = grid.noise_next[i] / grid.noise[i + 1 - width] * math.exp(-growth)
        s = grid.noise_next[i] * math.sqrt(-math.expm1(-2 * growth))
        columns = {"t": grid.t[i], "p": p[i], "q": q[i], "a": keep, "b": found[0], "s": s}
        if width == 2:
            columns |= {"a": 0.0, "c1": 1.0}
            earlier = rows[i - 1]
            of = {name: Row._fields.index(name) for name in "pqabe"}
            earlier[of["a"]] += earlier[of["b"]] * p[i - 1]
            earlier[of["e"]], earlier[of["b"]] = earlier[of["b"]] * q[i - 1], 0.0
            earlier[of["p"]], earlier[of["q"]] = keep + found[1] * p[i - 1], found[1] * q[i - 1]
        rows[i] = [columns.get(name, 0.0) for name in Row._fields]
    return sampler(table, rows[:, 0], **dict(zip(Row._fields[1:], rows.T[1:], strict=True)))
