"""Samplers as tables.

A sampler is a float64 table with the columns (t, p, q, a, b, c1, c2, c3, e, s, r). Whoever runs it starts from
x ~ N(0, I) and, row by row, calls the network and takes one fused step::

    out = network(x, t)
    m   = clip(p x + q out)
    x'  = a x + b m + c1 m1 + c2 m2 + c3 m3 + e out + s exp(r v) z,      z ~ N(0, I)

with the terms added in this order and a term with a zero coefficient not evaluated. m is what p and q make it: x0, or
the noise. m1, m2 and m3 are the m of the last three rows that called the network; a row with q = e = 0 calls no network
and is not remembered. v is the second output of a network that has learned its variance. The constructors here write
such tables; `Sampler` itself takes any other, so every sampler with three steps of memory is a new table and no new
code.

Throughout, ``alpha`` is the signal and ``sigma`` the noise of the schedule at a row's timestep; ``alpha'`` and
``sigma'`` are those of the next row, and 1 and 0 after the last. alpha^2 + sigma^2 need not be 1.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import MAX_VISITS, Row
from fastdiff.errors import (
    ArgumentError,
    ScheduleWarning,
    check_array,
    check_choice,
    check_float,
    check_int,
    check_timesteps,
)
from fastdiff.schedule import END_LIMIT, PREDICTIONS, Array, Schedule, power, target

VARIANCE_FLOOR = 1e-20
WIDTHS = (8, 10, 11, 12)  # of tables that are accepted

Clip = float | tuple[float, float] | None


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Sampler:
    """A sampler: a table of rows (t, p, q, a, b, c1, c2, c3, e, s, r), and what it was made for.

    Parameters
    ----------
    rows : sequence of R rows, or (R, 8), (R, 10), (R, 11) or (R, 12) array_like
        Numbers in the order (t, p, q, a, b, c1, c2, c3, e, s, r, visit); without visit, which is always counted
        anew; without r, which is then 0; or in the order (t, p, q, a, b, c1, e, s). A row calls the network unless
        q = e = 0. Timesteps fall or stay; only a row that does not call the network may raise them. A row remembers
        no more rows that called it than came before.
    schedule : Schedule
        The schedule that the timesteps index.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What the network's output is: see `fastdiff.schedule.target`.
    clip : float or (float, float), optional
        Bounds of x0; a number v means (-v, v). None (default) leaves x0 as it is.
    name : str, optional
        For people.
    order : int, optional
        Order of convergence of a deterministic sampler, where known: the error falls like R ** -order.

    Attributes
    ----------
    rows : tuple of R Row
        Named tuples: ``rows[0].t``, ``rows[0].a``. ``rows[0].visit`` says how many rows before it draw noise at its
        timestep: that noise has step t + 2^20 visit by the noise law. ``np.array(rows)`` is the whole table, (R, 12)
        float64.
    timesteps : (R,) int64, read-only
        The column t.
    clip : (float, float) or None
        Lower and upper bound.
    schedule, prediction, name, order
        As given.

    Raises
    ------
    ArgumentError
        If the table breaks one of these rules.
    """

    rows: tuple[Row, ...]
    schedule: Schedule
    prediction: str
    clip: tuple[float, float] | None
    name: str
    order: int | None
    timesteps: npt.NDArray[np.int64]

    def __init__(
        self,
        rows: npt.ArrayLike | Sequence[Row],
        schedule: Schedule,
        *,
        prediction: str = "noise",
        clip: Clip = None,
        name: str = "custom",
        order: int | None = None,
    ) -> None:
        _check_schedule(schedule)
        if not isinstance(name, str) or not name:
            raise ArgumentError("name", repr(name), "a text")
        table = _checked_rows(rows, schedule)
        clip = _checked_clip(clip)
        check_choice("prediction", prediction, PREDICTIONS)
        if clip is not None:
            _check_clipped(table, schedule, prediction)
        timesteps = np.array([row.t for row in table], np.int64)
        timesteps.setflags(write=False)
        values = {
            "rows": table,
            "schedule": schedule,
            "prediction": prediction,
            "clip": clip,
            "name": name,
            "order": None if order is None else check_int("order", order, low=1),
            "timesteps": timesteps,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def evaluations(self) -> int:
        """Number of rows that call the network."""
        return sum(row.evaluates for row in self.rows)

    @property
    def depth(self) -> int:
        """How many evaluations back the table reaches for m, 0 to 3."""
        return max(row.depth for row in self.rows)

    @property
    def label(self) -> str:
        """Name and number of steps, for legends: ``ddim, 50 steps``."""
        return f"{self.name}, {len(self)} step{'s' if len(self) > 1 else ''}"

    def __eq__(self, other: object) -> bool:
        """Whether both do the same: equal table, schedule, prediction and clip."""
        if not isinstance(other, Sampler):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.rows, self.schedule, self.prediction, self.clip

    def __repr__(self) -> str:
        clip = "" if self.clip is None else f", x0 clipped to [{self.clip[0]:g}, {self.clip[1]:g}]"
        takes = f"{len(self)} rows of T={self.schedule.T}, {self.prediction} prediction"
        return f"<Sampler {self.name}: {takes}{clip}>"

    def __reduce__(self) -> tuple[Callable[..., Sampler], tuple[Any, ...]]:
        return _restored, (self.rows, self.schedule, self.prediction, self.clip, self.name, self.order)


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    variance: str = "small",
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "trailing",
) -> Sampler:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): draws from q(x' | x, x0) with the predicted x0.

    With alpha_t = (alpha / alpha')^2 and beta_t = sigma^2 - alpha_t sigma'^2 across the gap to the next timestep::

        x' = sqrt(alpha_t) sigma'^2 / sigma^2  x  +  alpha' beta_t / sigma^2  x0  +  s z

    (equations 6 and 7). The last row adds no noise and returns x0.

    Parameters
    ----------
    schedule : Schedule
        The schedule of the network.
    steps : int, optional
        Number of rows; None (default) visits all T timesteps.
    variance : {"small", "large"}, optional
        s^2: the posterior's, beta_t sigma'^2 / sigma^2 (floored at 1e-20), or beta_t; the two extreme choices
        of Ho et al. 2020, section 3.2, right for data of no spread and of unit variance.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What the network predicts.
    spacing : str, optional
        Which timesteps, see `Schedule.timesteps`.

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
    _check_schedule(schedule)
    check_choice("variance", variance, ("small", "large"))
    grid = _grid(schedule, schedule.T if steps is None else steps, spacing)
    beta = _gap_beta(grid)
    ratio = (grid.noise_next / grid.noise) ** 2
    spread = np.maximum(beta * ratio if variance == "small" else beta, VARIANCE_FLOOR)
    p, q = _x0_from_output(grid.signal, grid.noise, prediction)
    columns = {
        "p": p,
        "q": q,
        "a": grid.signal / grid.signal_next * ratio,
        "b": grid.signal_next * beta / grid.noise**2,
        "s": np.append(np.sqrt(spread[:-1]), 0.0),
    }
    return _sampler("ddpm", grid, columns, schedule, prediction, clip, None)


def ddim(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "trailing",
) -> Sampler:
    """Denoising diffusion implicit models (Song, Meng & Ermon 2021, equation 12)::

        x' = alpha' x0 + sqrt(sigma'^2 - s^2) noise + s z,      s^2 = eta^2 beta_t sigma'^2 / sigma^2

    (equation 16; beta_t as in `ddpm`). ``noise`` is the network's own, not one recomputed from a clipped x0.
    eta = 0 is deterministic and of first order; eta = 1 is `ddpm` with the small variance.

    Parameters
    ----------
    schedule : Schedule
        The schedule of the network.
    steps : int
        Number of rows.
    eta : float, optional
        Share of the ancestral noise, 0 to 1.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What the network predicts.
    spacing : str, optional
        Which timesteps, see `Schedule.timesteps`.

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
    _check_schedule(schedule)
    eta = check_float("eta", eta, low=0, high=1)
    grid = _grid(schedule, steps, spacing)
    ancestral = _gap_beta(grid) * (grid.noise_next / grid.noise) ** 2
    direction = np.sqrt(np.maximum(grid.noise_next**2 - eta**2 * ancestral, 0.0))
    p, q = _x0_from_output(grid.signal, grid.noise, prediction)
    along_x, along_out = _noise_from_output(grid.signal, grid.noise, prediction)
    columns = {
        "p": p,
        "q": q,
        "a": direction * along_x,
        "b": grid.signal_next,
        "e": direction * along_out,
        "s": eta * np.sqrt(ancestral),
    }
    return _sampler("ddim", grid, columns, schedule, prediction, clip, 1 if eta == 0 else None)


def dpmpp_2m(
    schedule: Schedule,
    steps: int,
    *,
    clip: Clip = None,
    prediction: str = "noise",
    spacing: str = "linspace_open",
    final: str = "zero",
) -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, deterministic.

    With lambda = log(alpha / sigma), h its growth over this step and h_previous over the one before::

        x' = sigma' / sigma  x + alpha' (1 - exp(-h)) ((1 + r) x0 - r x0_previous),   r = h / (2 h_previous)

    The first row has r = 0, and so has the last with ``final="zero"``, where h is infinite.

    Parameters
    ----------
    schedule : Schedule
        The schedule of the network.
    steps : int
        Number of rows.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What the network predicts.
    spacing : str, optional
        Which timesteps, see `Schedule.timesteps`.
    final : {"zero", "sigma_min"}, optional
        Where the last row leads: to the clean sample, or to the noise level of t = 0 (the last timestep must
        then be above 0, so "linspace_open", or "trailing" with at most T / 2 steps or so).

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
    _check_schedule(schedule)
    check_choice("final", final, ("zero", "sigma_min"))
    grid = _grid(schedule, steps, spacing)
    half_log_snr = schedule.log_snr[grid.t] / 2
    if final == "zero":
        growth = np.append(np.diff(half_log_snr), np.inf)
    else:
        if grid.t[-1] == 0:
            raise ArgumentError("final", "'sigma_min' for timesteps that end at 0", "'zero', or fewer steps")
        grid.signal_next[-1], grid.noise_next[-1] = schedule.signal[0], schedule.noise[0]
        growth = np.diff(half_log_snr, append=schedule.log_snr[0] / 2)
    if (growth <= 0).any():
        raise ArgumentError("schedule", "timesteps between which abar does not change", "larger betas")
    r = np.zeros(len(growth))
    r[1:] = growth[1:] / (2 * growth[:-1])
    if final == "zero":
        r[-1] = 0.0
    pull = grid.signal_next * -np.expm1(-growth)
    p, q = _x0_from_output(grid.signal, grid.noise, prediction)
    columns = {"p": p, "q": q, "a": grid.noise_next / grid.noise, "b": pull * (1 + r), "c1": -pull * r}
    return _sampler("dpmpp_2m", grid, columns, schedule, prediction, clip, 2)


def named(
    name: str, schedule: Schedule, steps: int | None = None, *, prediction: str = "noise", clip: Clip = None
) -> Sampler:
    """The sampler of this name with its defaults.

    Parameters
    ----------
    name : {"ddpm", "ddim", "dpmpp_2m"}
        Which one.
    schedule : Schedule
        The schedule of the network.
    steps : int, optional
        Number of rows. None: all T for "ddpm", 50 for "ddim", 20 for "dpmpp_2m", or as many as T allows.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What the network predicts.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.

    Returns
    -------
    Sampler

    Raises
    ------
    ArgumentError
        If the name is unknown (the message lists those known), or another argument is wrong.
    """
    _check_schedule(schedule)
    check_choice("sampler", name, ("ddpm", "ddim", "dpmpp_2m"))
    if name == "ddpm":
        return ddpm(schedule, steps, prediction=prediction, clip=clip)
    if name == "ddim":
        steps = min(50, schedule.T) if steps is None else steps
        return ddim(schedule, steps, prediction=prediction, clip=clip)
    steps = max(1, min(20, schedule.T - 1)) if steps is None else steps
    return dpmpp_2m(schedule, steps, prediction=prediction, clip=clip)


# -- the parts that the constructors share -------------------------------------------------------------------


class _Grid(NamedTuple):
    """Timesteps with the signal and noise there and at the next one; each (n,)."""

    t: npt.NDArray[np.int64]
    signal: Array
    noise: Array
    signal_next: Array
    noise_next: Array


def _grid(schedule: Schedule, steps: int, spacing: str) -> _Grid:
    t = schedule.timesteps(steps, spacing=spacing)
    start = max(schedule.alphas_bar[t[0]], 1 - schedule.noise[t[0]] ** 2)
    if start > END_LIMIT >= schedule.alphas_bar[-1]:
        short = "abar is" if schedule.kind != "flow" else "the noise lacks a variance of"
        warnings.warn(
            f"{spacing!r} spacing begins at t = {t[0]}, where {short} {start:.3g}: sampling starts there "
            "from pure noise and misses. Take spacing='trailing', or pass an initial state of that noise.",
            ScheduleWarning,
            stacklevel=3,
        )
    signal, noise = schedule.signal[t], schedule.noise[t]
    return _Grid(t, signal, noise, np.append(signal[1:], 1.0), np.append(noise[1:], 0.0))


def _gap_beta(grid: _Grid) -> Array:
    """beta_t of `ddpm`: where variance is preserved (sigma^2 - sigma'^2) / alpha'^2, good near abar = 1 too."""
    here, there = power(grid.signal, grid.noise), power(grid.signal_next, grid.noise_next)
    return (there * grid.noise**2 - here * grid.noise_next**2) / grid.signal_next**2


def _x0_from_output(signal: Array, noise: Array, prediction: str) -> tuple[Array, Array]:
    """(p, q) with x0 = p x + q out, where x = signal x0 + noise z."""
    of_noise, _, determinant = _solved(signal, noise, prediction)
    return of_noise / determinant, -noise / determinant


def _noise_from_output(signal: Array, noise: Array, prediction: str) -> tuple[Array, Array]:
    """(f, g) with z = f x + g out, where x = signal x0 + noise z."""
    _, of_data, determinant = _solved(signal, noise, prediction)
    return -of_data / determinant, signal / determinant


def _solved(signal: Array, noise: Array, prediction: str) -> tuple[Array, Array, Array]:
    """Factors of z and x0 in the output, and the determinant ``signal of_noise - noise of_data`` of the two equations.

    It is the signal for the noise, the power for v, and signal + noise for the velocity.
    """
    of_noise, of_data = target(prediction, signal, noise)
    if prediction == "noise" and (signal == 0).any():
        wants = "'v', 'velocity' or 'x0': x is noise alone there, and says nothing of x0"
        raise ArgumentError("prediction", "'noise' at a timestep where the signal is 0", wants)
    return of_noise, of_data, power(signal, noise) if prediction == "v" else signal * of_noise - noise * of_data


def _sampler(
    name: str,
    grid: _Grid,
    columns: dict[str, Array],
    schedule: Schedule,
    prediction: str,
    clip: Clip,
    order: int | None,
) -> Sampler:
    rows = np.zeros((len(grid.t), 11))
    rows[:, 0] = grid.t
    for column, values in columns.items():
        rows[:, Row._fields.index(column)] = values
    return Sampler(rows, schedule, prediction=prediction, clip=clip, name=name, order=order)


def _check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule")


def _checked_clip(clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    if isinstance(clip, (tuple, list)):
        if len(clip) != 2:
            raise ArgumentError("clip", f"{len(clip)} values", "None, a positive number or a pair (low, high)")
        low, high = (check_float("clip", bound) for bound in clip)
        if low >= high:
            raise ArgumentError("clip", f"({low:g}, {high:g})", "a pair with low below high")
        return low, high
    bound = check_float("clip", clip, low=0, low_open=True)
    return -bound, bound


def _checked_rows(rows: npt.ArrayLike | Sequence[Row], schedule: Schedule) -> tuple[Row, ...]:
    """The rows as named tuples of plain numbers, if they keep the rules of the table."""
    table = check_array("rows", rows, dtype=np.float64) + 0.0  # no negative zeros
    if table.ndim != 2 or table.shape[1] not in WIDTHS or not len(table):
        raise ArgumentError("rows", f"shape {table.shape}", "rows of numbers (t, p, q, a, b, c1, c2, c3, e, s)")
    if table.shape[1] == 8:
        table = np.insert(table, (6, 6), 0.0, axis=1)
    t, s = table[:, 0], table[:, 9]
    if (t != np.rint(t)).any():
        raise ArgumentError("rows (t)", str(t[t != np.rint(t)][0]), "whole timesteps")
    check_timesteps(t.astype(np.int64), schedule.T, len(t))
    if (s < 0).any():
        raise ArgumentError("rows (s)", f"{s.min():g}", "standard deviations of at least 0")
    made: list[Row] = []
    evaluated, drawn = 0, Counter[int]()
    for i, numbers in enumerate(table):
        row = Row(int(numbers[0]), *numbers[1:11].tolist())
        if row.evaluates and made and row.t > made[-1].t:
            raise ArgumentError(
                "rows (t)", f"{row.t} after {made[-1].t} in row {i}, which evaluates", "timesteps that fall or stay"
            )
        if row.depth > evaluated:
            came = f"c{row.depth} = {row[4 + row.depth]:g} in row {i}, before which {evaluated} evaluate"
            raise ArgumentError(f"rows (c{row.depth})", came, "0 there: nothing so far back is remembered")
        if row.r != 0 and not row.evaluates:
            raise ArgumentError("rows (r)", f"{row.r:g} in row {i}, which does not evaluate", "0 there")
        if drawn[row.t] == MAX_VISITS:
            raise ArgumentError("rows (s)", f"more than {MAX_VISITS} rows with noise at t = {row.t}", "fewer")
        made.append(row._replace(visit=drawn[row.t]))
        evaluated += row.evaluates
        drawn[row.t] += row.s > 0
    return tuple(made)


def _check_clipped(rows: tuple[Row, ...], schedule: Schedule, prediction: str) -> None:
    """A table that remembers the noise must not clip it: the bounds are those of data."""
    if not any(row.depth for row in rows):
        return
    t = np.array([row.t for row in rows])
    forms = zip(*_noise_from_output(schedule.signal[t], schedule.noise[t], prediction), strict=True)
    if any(row.evaluates and np.allclose((row.p, row.q), form, 1e-6, 0) for row, form in zip(rows, forms, strict=True)):
        raise ArgumentError("clip", "bounds, for a table that remembers the noise", "None: there is no x0 to clip")


def _restored(
    rows: tuple[Row, ...],
    schedule: Schedule,
    prediction: str,
    clip: tuple[float, float] | None,
    name: str,
    order: int | None,
) -> Sampler:
    return Sampler(rows, schedule, prediction=prediction, clip=clip, name=name, order=order)
