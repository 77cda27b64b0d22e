"""What a sampler is: a table of rows, what it was made for, and the rules that it keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, ParamSpec

import numpy as np
import numpy.typing as npt

from fastdiff.backends import MAX_VISITS, Row
from fastdiff.errors import (
    ArgumentError,
    check_array,
    check_choice,
    check_float,
    check_int,
    shown,
)
from fastdiff.schedule import PREDICTIONS, Float64, Schedule, power

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
    options : dict
        Of a table that one of `fastdiff.samplers` made, by name: its number of steps, and the options that are not the
        usual ones. Not part of what makes two tables equal.

    Raises
    ------
    ArgumentError
        If the table breaks one of these rules.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> rows = np.array(fd.samplers.ddim(s, 5).rows)  # (t, p, q, a, b, c1, c2, c3, e, s, r, visit)
    >>> mine = fd.Sampler(rows, s, prediction="noise", name="mine")
    >>> mine.timesteps.tolist(), mine.evaluations
    ([19, 15, 11, 7, 3], 5)
    """

    rows: tuple[Row, ...]
    schedule: Schedule
    prediction: str
    clip: tuple[float, float] | None
    name: str
    order: int | None
    timesteps: npt.NDArray[np.int64]
    options: Mapping[str, Any]

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
        check_schedule(schedule)
        if not isinstance(name, str) or not name:
            raise ArgumentError("name", shown(name), "a text")
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
            "options": MappingProxyType({}),
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

    @cached_property
    def learned_variance(self) -> bool:
        """Whether the noise of some row follows the variance that a network has learned."""
        return any(row.r != 0 for row in self.rows)

    @property
    def depth(self) -> int:
        """How many evaluations back the table reaches for m, 0 to 3."""
        return max(row.depth for row in self.rows)

    def unclipped(self) -> Sampler:
        """Return the table without its clip.

        Examples
        --------
        >>> table = fd.samplers.ddpm(fd.Schedule.cosine(20), clip=1.0)
        >>> table.clip, table.unclipped().clip
        ((-1.0, 1.0), None)
        """
        options = {name: value for name, value in self.options.items() if name != "clip"}
        return _restored(self.rows, self.schedule, self.prediction, None, self.name, self.order, options)

    def widened(self, factor: float) -> Sampler:
        """Return the table with so many times the noise: draws of a normal law are so many times as far from its mean.

        Parameters
        ----------
        factor : float
            Above 0. The state is multiplied by it before the first row, and s in all rows.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> table = fd.samplers.ddpm(s, 20)
        >>> plain, wide = (fd.denoisers.exact_chain(law, one).cov for one in (table, table.widened(1.5)))
        >>> bool((np.diag(wide) > np.diag(plain)).all())
        True
        """
        factor = check_float("factor", factor, low=0, low_open=True)
        if self.learned_variance:
            raise ArgumentError("factor", f"{factor:g}, of a table for a learned variance", "another table")
        first = Row(self.rows[0].t, 0.0, 0.0, factor, *(0.0,) * 7)
        rows = (first, *(row._replace(s=factor * row.s) for row in self.rows))
        return _restored(rows, self.schedule, self.prediction, self.clip, self.name, self.order, self.options)

    @property
    def label(self) -> str:
        """Name and number of steps, for legends: ``ddim, 50 steps``; of evaluations, where steps have several."""
        count, what = self.evaluations, "step" if len(set(self.timesteps.tolist())) == len(self) else "evaluation"
        return f"{self.name}, {count} {what}{'s' if count > 1 else ''}"

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

    def _repr_html_(self) -> str:
        from fastdiff.display import sampler_html

        return sampler_html(self)

    def __reduce__(self) -> tuple[Callable[..., Sampler], tuple[Any, ...]]:
        given = self.rows, self.schedule, self.prediction, self.clip, self.name, self.order, dict(self.options)
        return _restored, given


def x0_from_output(signal: Float64, noise: Float64, prediction: str) -> tuple[Float64, Float64]:
    """(p, q) with x0 = p x + q out; x = signal x0 + noise z, v = signal z - noise x0, velocity = z - x0."""
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "noise":
        if (signal == 0).any():
            wants = "'v', 'velocity' or 'x0': where the signal is 0 the noise says nothing of x0"
            raise ArgumentError("prediction", "'noise' for timesteps without signal", wants)
        return 1 / signal, -noise / signal
    if prediction == "x0":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction == "velocity":
        return 1 / (signal + noise), -noise / (signal + noise)
    return signal / power(signal, noise), -noise / power(signal, noise)


def noise_from_output(signal: Float64, noise: Float64, prediction: str) -> tuple[Float64, Float64]:
    """(f, g) with z = f x + g out, as `x0_from_output`."""
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "noise":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction == "x0":
        return 1 / noise, -signal / noise
    if prediction == "velocity":
        return 1 / (signal + noise), signal / (signal + noise)
    return noise / power(signal, noise), signal / power(signal, noise)


def check_schedule(schedule: Any) -> None:
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
        raise ArgumentError(
            "rows", f"shape {table.shape}", "rows of numbers (t, p, q, a, b, c1, c2, c3, e, s), or with r as well"
        )
    if table.shape[1] == 8:
        table = np.insert(table, (6, 6), 0.0, axis=1)
    t, s = table[:, 0], table[:, 9]
    outside = t[(t != np.rint(t)) | (t < 0) | (t >= schedule.T)]
    if outside.size:
        raise ArgumentError("rows (t)", f"{outside[0]:g}", f"whole timesteps of the schedule, 0 to {schedule.T - 1}")
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
    forms = zip(*noise_from_output(schedule.signal[t], schedule.noise[t], prediction), strict=True)
    if any(row.evaluates and np.allclose((row.p, row.q), form, 1e-6, 0) for row, form in zip(rows, forms, strict=True)):
        raise ArgumentError("clip", "bounds, for a table that remembers the noise", "None: there is no x0 to clip")


def _restored(
    rows: tuple[Row, ...],
    schedule: Schedule,
    prediction: str,
    clip: tuple[float, float] | None,
    name: str,
    order: int | None,
    options: Mapping[str, Any],
) -> Sampler:
    sampler = Sampler(rows, schedule, prediction=prediction, clip=clip, name=name, order=order)
    object.__setattr__(sampler, "options", MappingProxyType(dict(options)))
    return sampler


def options_of(make: Callable[..., Sampler]) -> dict[str, Any]:
    """The options of a constructor, with their defaults.

    Examples
    --------
    >>> fd.samplers.options_of(fd.samplers.ddim)['eta']
    0.0
    """
    return {
        name: each.default for name, each in signature(make).parameters.items() if each.kind is Parameter.KEYWORD_ONLY
    }


P = ParamSpec("P")


def constructor(make: Callable[P, Sampler]) -> Callable[P, Sampler]:
    """Write down with a table what made it."""
    usual = options_of(make)

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Sampler:
        sampler = make(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name in usual and name != "prediction"}
        if not isinstance(given.get("spacing", ""), str):
            given["spacing"] = tuple(sorted(set(sampler.timesteps.tolist()), reverse=True))
        given = {name: value for name, value in given.items() if value != usual[name]}
        steps = args[1] if len(args) > 1 else kwargs.get("steps")
        options = {"steps": sampler.schedule.T if steps is None else steps, **given}
        object.__setattr__(sampler, "options", MappingProxyType(options))
        return sampler

    return made
