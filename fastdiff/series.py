"""Series: recordings of several channels, cut into windows, read from tables and frames, and given back so.

A recording is (time,) or (time, channels), NaN where nothing was seen; windows of it are (N, length) or (N, length,
channels). Frames of pandas, polars and xarray are known by what they can do: none of these is imported. Their columns
are channels; one of times is the clock, which no model learns, and which goes on in what is drawn after it.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, DataError, check_array, check_choice, check_int, is_on_device
from fastdiff.files import check_ending, load_npy, naming, writing

log = logging.getLogger("fastdiff")

if TYPE_CHECKING:
    from fastdiff.tables import Asked

Values = npt.NDArray[Any]

LAST = 8  # rows of a frame that tell how its clock goes on
EVEN = 1e-6  # by which steps of a clock may differ, relative to the first
FILLS = ("missing", "linear")
PERIODS = ("day", "week")  # that windows can be
DAY = 86_400 * 10**9  # nanoseconds
ENDINGS = (".csv", ".npy", ".parquet")  # of recordings
_DATE = re.compile(r"\d{4}-\d{1,2}|\d{1,4}[./]\d{1,2}[./]\d{1,4}|\d{1,2}:\d{2}")
# 31.12.2024, or 31.12.2024 23:00
_DOTTED = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(?:[ T]+(\d{1,2})(:\d{2}(?::\d{2}(?:\.\d+)?)?))?")


# ------------------------------------------------------------------------------------------- frames


def is_frame(x: Any) -> bool:
    """Whether this is a table of pandas or polars, or a data set of xarray."""
    return _kind(x) is not None


def _kind(x: Any) -> str | None:
    if isinstance(x, Columns):
        return "columns"
    if hasattr(x, "data_vars") or (hasattr(x, "dims") and hasattr(x, "coords") and hasattr(x, "to_dataset")):
        return "xarray"
    if hasattr(x, "iloc") and hasattr(x, "index"):
        return "pandas"
    if hasattr(x, "to_numpy") and (hasattr(x, "with_columns") or hasattr(x, "is_sorted")):
        return "polars"
    return None


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame as arrays, and how to make others of its kind.

    Attributes
    ----------
    like : object
        The frame itself, a table of columns.
    kind : {"pandas", "polars", "xarray", "columns"}
    names : list of str
        Of the columns that are values.
    keys : list
        What the frame calls them.
    values : (rows, columns) float64
        NaN where it has none.
    clock : object or None
        The times of the rows: the index, or the one column that is a time.
    clock_name : str
    """

    like: Any
    kind: str
    names: list[str]
    keys: list[Any]
    values: npt.NDArray[np.float64]
    clock: Any
    clock_name: str

    @classmethod
    def of(cls, x: Any, argument: str = "X") -> Frame:
        """Read a frame.

        Raises
        ------
        ArgumentError
            A column of text, two columns of one name, infinite values, or no column that is numbers.
        """
        kind = _kind(x)
        assert kind is not None
        x = _table(x, kind)
        keys = list(x.data_vars) if kind == "xarray" else list(x.columns)
        names = [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in keys]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ArgumentError(argument, f"{names.count(twice)} columns called {twice!r}", "a name for each column")
        clock, clock_name, kept, columns = None, "", [], []
        if kind == "pandas" and type(x.index).__name__ != "RangeIndex":
            clock, clock_name = x.index, str(x.index.name or "time")
        elif kind == "xarray":
            clock, clock_name = _clock_of_xarray(x, argument)
        for key, name in zip(keys, names, strict=True):
            cells = x[key]
            column = np.asarray(cells.values if kind == "xarray" else cells if kind == "columns" else cells.to_numpy())
            is_clock = kind == "columns" and key == x.clock
            if is_clock or column.dtype.kind in "Mm" or _is_dates(cells, column):
                if clock is None:
                    clock, clock_name = _library(x).Index(cells) if kind == "pandas" else cells, name
                if kind != "columns":
                    log.info("column %r is a clock: not learned", name)
                continue
            kept.append(key)
            columns.append(_numbers(column, argument, name))
        if not columns:
            raise ArgumentError(argument, f"a frame of the columns {names}", "one column of numbers, at least")
        if kind == "pandas" and clock is x.index:
            log.info("the index %r is a clock: not learned", clock_name)
        values = np.stack(columns, axis=1)
        return cls(x, kind, [names[keys.index(key)] for key in kept], kept, values, clock, clock_name)

    def check_clock(self) -> None:
        """Refuse a clock, where there is one, whose steps are neither even nor those of a calendar."""
        if self.clock is not None and not (_is_text(self.clock) or _by_calendar(self)):
            check_even(np.asarray(self.clock.values if hasattr(self.clock, "values") else self.clock))

    def filled(self, values: Values) -> Any:
        """Return a copy of the frame with other values (rows, columns) in its columns of values."""
        if self.kind == "polars":
            series = {key: _library(self.like).Series(str(key), values[:, k]) for k, key in enumerate(self.keys)}
            return self.like.with_columns(**series)
        if self.kind == "columns":
            return Columns(self.like.data | {key: values[:, k] for k, key in enumerate(self.keys)}, self.like.clock)
        out = self.like.copy(deep=True)
        for k, key in enumerate(self.keys):
            if self.kind == "xarray":
                out[key] = (out[key].dims, np.array(values[:, k]))
            else:
                out[key] = np.array(values[:, k])
        return out

    def ending(self) -> Frame:
        """Return the frame with its last rows only, which is all that it takes to go on."""
        x, kept = self.like, slice(-LAST, None)
        if self.kind == "pandas":
            x = x.iloc[kept]
        elif self.kind == "polars":
            x = x.tail(LAST)
        elif self.kind == "xarray":
            x = x.isel({next(iter(x.dims)): kept})
        else:
            x = Columns({name: column[kept] for name, column in x.data.items()}, x.clock)
        clock = None if self.clock is None else x.index if self._by_index else self.clock[kept]
        return replace(self, like=x, values=self.values[kept], clock=clock)

    @property
    def _by_index(self) -> bool:
        """Whether the clock is the index of pandas."""
        return self.kind == "pandas" and self.clock is self.like.index

    def rows(self, values: Values) -> Any:
        """Return a frame with the same columns and other rows (n, columns), which have no times."""
        named = {str(key): values[:, k] for k, key in enumerate(self.keys)}
        if self.kind == "xarray":
            (dim,) = next(iter(self.like.data_vars.values())).dims
            return type(self.like)({name: (dim, column) for name, column in named.items()})
        return type(self.like)(named)

    def samples(self, values: Values) -> Any:
        """Return a frame of series (n, points, columns), one after the other, each as if the recording went on so.

        A column "sample" tells them apart; of xarray a dimension does.
        """
        n, points, _ = values.shape
        flat = values.reshape(n * points, -1)
        has_clock = self.clock is not None and not _is_text(self.clock)
        if self.kind == "xarray":
            (dim,) = next(iter(self.like.data_vars.values())).dims
            data = {str(key): (("sample", dim), values[:, :, k]) for k, key in enumerate(self.keys)}
            return type(self.like)(data, coords={dim: self.times(points)} if has_clock else {})
        numbers = {"sample": np.repeat(np.arange(n), points)}
        if has_clock:
            return self.later(flat, columns=numbers, times=self._repeated(self.times(points), n))
        return self.later(flat, columns=numbers | {"step": np.tile(np.arange(points), n)}, times=None)

    def _repeated(self, times: Any, n: int) -> Any:
        return times * n if isinstance(times, list) else np.tile(times, n)

    def later(self, values: Values, columns: dict[str, Any] | None = None, times: Any = "after") -> Any:
        """Return a frame of values (rows, columns) at the times after the last one, or at others, or at none.

        `columns` stand before the values.
        """
        table: dict[str, Any] = dict(columns or {})
        if isinstance(times, str):
            times = None if self.clock is None or _is_text(self.clock) else self.times(len(values))
        named = {str(key): np.array(values[:, k]) for k, key in enumerate(self.keys)}
        if self.kind == "polars":
            if times is not None:
                table[self.clock_name] = times
            return type(self.like)(table | named)
        if self.kind == "xarray":
            (dim,) = next(iter(self.like.data_vars.values())).dims
            data = {name: (dim, np.asarray(column)) for name, column in (table | named).items()}
            return type(self.like)(data, coords={} if times is None else {dim: times})
        if self._by_index:
            made = type(self.like)(table | named, index=times)
            made.index.name = self.like.index.name
            return made
        if times is not None:
            table[self.clock_name] = times
        if self.kind == "columns":
            return Columns(table | named, None if times is None else self.clock_name)
        return type(self.like)(table | named)

    def times(self, count: int) -> Any:
        """Return the `count` times after the clock's last.

        Raises
        ------
        ArgumentError
            A clock whose steps differ.
        """
        clock = self.clock
        if self.kind == "pandas":
            step, name = getattr(clock, "freq", None), _by_calendar(self)
            if step is None and name:
                step = _library(self.like).tseries.frequencies.to_offset(name)
            if step is not None:
                return [clock[len(clock) - 1] + step * (k + 1) for k in range(count)]
        clock = np.asarray(clock.values if hasattr(clock, "values") else clock)
        check_even(clock)
        step = clock[-1] - clock[-2]
        return clock[-1] + step * (1 + np.arange(count))


def _library(x: Any) -> Any:
    """The module that a frame comes from, which is imported already."""
    return sys.modules[type(x).__module__.split(".")[0]]


def _table(x: Any, kind: str) -> Any:
    """The frame as a table of columns: of a single column, or an array of xarray, one is made."""
    if hasattr(x, "columns") or hasattr(x, "data_vars"):
        return x
    if kind == "xarray":
        name = x.name or "value"
        if x.ndim == 2:
            return x.to_dataset(dim=x.dims[1])
        return x.to_dataset(name=name)
    return x.to_frame() if x.name not in (None, "") else x.to_frame("value")


def _clock_of_xarray(x: Any, argument: str) -> tuple[Any, str]:
    dims = {variable.dims for variable in x.data_vars.values()}
    if len(dims) != 1 or len(next(iter(dims))) != 1:
        raise ArgumentError(
            argument, f"variables along {sorted(map(str, dims))}", "variables along one dimension, time"
        )
    ((dim,),) = dims
    return (x.coords[dim], str(dim)) if dim in x.coords else (None, "")


def _is_dates(column: Any, values: Values) -> bool:
    """Whether a column holds times that are no NumPy times: those with a time zone are objects."""
    dtype = str(getattr(column, "dtype", ""))
    return values.dtype.kind == "O" and dtype.lower().startswith(("datetime", "date", "period"))


def _numbers(column: Values, argument: str, name: str) -> npt.NDArray[np.float64]:
    if column.dtype.kind in "fiub":
        numbers = column.astype(np.float64)
    else:
        numbers = np.empty(len(column))
        for row, cell in enumerate(column):
            if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
                numbers[row] = np.nan
                continue
            try:
                numbers[row] = float(cell) if not isinstance(cell, str) else np.nan
            except (TypeError, ValueError):
                numbers[row] = np.nan
            if np.isnan(numbers[row]) and not (isinstance(cell, float) and np.isnan(cell)):
                got = f"column {name!r} with {cell!r} in row {row}"
                raise ArgumentError(argument, got, f"numbers: drop the column, or parse it (drop(columns={name!r}))")
    if np.isinf(numbers).any():
        row = int(np.flatnonzero(np.isinf(numbers))[0])
        raise ArgumentError(
            argument, f"column {name!r} with an infinite value in row {row}", "finite or missing values"
        )
    return numbers


def check_even(clock: Values) -> None:
    """Refuse a clock that does not go on by one step.

    Raises
    ------
    ArgumentError
        It says which steps there are, and what puts a recording on a grid.
    """
    if len(clock) < 2:
        raise ArgumentError("clock", f"{len(clock)} times", "at least two")
    steps = np.diff(clock)
    steps = steps.astype("timedelta64[ns]").astype(np.float64) if steps.dtype.kind == "m" else steps.astype(np.float64)
    if not (steps > 0).all():
        row = int(np.flatnonzero(~(steps > 0))[0]) + 1
        raise ArgumentError(
            "clock", f"{clock[row]} after {clock[row - 1]}, in row {row}", "times that rise: sort the rows"
        )
    if np.ptp(steps) > EVEN * steps[0]:
        shown = np.diff(clock)
        wants = (
            "even steps: fd.data.on_grid(frame) makes missing rows of gaps, on_grid(frame, fill='linear') interpolates"
        )
        raise ArgumentError("clock", f"steps from {shown.min()} to {shown.max()}", wants)


# ------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one recording or several; a NumPy array of them where one is wanted.

    Attributes
    ----------
    values : (N, length) or (N, length, channels) array
    names : list of str or None
        Of the channels.
    frame : Frame or None
        The last recording, if it was a frame.
    """

    values: Values
    names: list[str] | None = None
    frame: Frame | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Values:
        return np.array(self.values, dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, at: Any) -> Any:
        return self.values[at]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype


def windows(x: Any, length: int | str, stride: int | None = None) -> Any:
    """Cut recordings into windows that all have one length.

    Window k begins `stride` k rows after the first; what is left at the ends is logged. Missing values (NaN) stay.

    Parameters
    ----------
    x : (time,) or (time, channels) array, a frame, or a list of these
        A recording, or several of the same channels. Of frames (pandas, polars, xarray) columns are channels; an index
        or a column of times is the clock, and dropped.
    length : int or {"day", "week"}
        Rows of a window; or windows that are whole days, which begin at midnight, or whole weeks, which begin on
        Monday, by the clock of a frame.
    stride : int, optional
        Rows from one window to the next; by default `length`: they do not overlap.

    Returns
    -------
    (N, length) or (N, length, channels) array, or Windows
        Of frames `Windows`, which know the names of the channels and the clock, and which `Diffusion.fit` takes.

    Raises
    ------
    ArgumentError
        A recording shorter than a window, other channels, infinite values, text, or a clock whose steps differ; whole
        days or weeks without a clock of dates, or with a step that does not divide them.

    Examples
    --------
    >>> fd.data.windows(np.arange(6.0), 4, 1)
    array([[0., 1., 2., 3.],
           [1., 2., 3., 4.],
           [2., 3., 4., 5.]])
    """
    period = check_choice("length", length, PERIODS) if isinstance(length, str) else None
    rows = None if period else check_int("length", length, low=1)
    stride = None if stride is None else check_int("stride", stride, low=1)
    recordings = x if isinstance(x, (list, tuple)) and len(x) and not np.isscalar(x[0]) else [x]
    parts: list[Values] = []
    frame = None
    names: list[str] | None = None
    for k, one in enumerate(recordings):
        name = "x" if one is x else f"x[{k}]"
        values, of = recording(one, name)
        if of is not None:
            frame, found = of, of.names
            of.check_clock()
            if names is not None and names != found:
                raise ArgumentError(name, f"the channels {found}", f"{names}, as the recording before has")
            names = found
        if parts and values.shape[1:] != parts[0].shape[2:]:
            raise ArgumentError(name, f"shape {values.shape}", "as many channels as the recording before has")
        first = 0
        if period:
            first, in_period = _whole_periods(of, period, name)
            if rows not in (None, in_period):
                raise ArgumentError(name, f"{in_period} rows a {period}", f"{rows}, as the recording before has")
            rows = in_period
        assert rows is not None
        if len(values) - first < rows:
            least = f"at least {first + rows}: to the end of the first whole {period}" if period else f"at least {rows}"
            raise ArgumentError(name, f"{len(values)} rows", least if period else f"{least}: the length of a window")
        view = np.lib.stride_tricks.sliding_window_view(values[first:], rows, axis=0)[:: stride or rows]
        parts.append(np.ascontiguousarray(np.moveaxis(view, -1, 1)))
        if first:
            log.info("windows: the first %d of %d rows are before the first whole %s", first, len(values), period)
        left = (len(values) - first - rows) % (stride or rows)
        if left:
            log.info("windows: the last %d of %d rows are in no window", left, len(values))
    cut = np.concatenate(parts)
    return cut if frame is None else Windows(cut, names, frame)


def _whole_periods(frame: Frame | None, period: str, argument: str) -> tuple[int, int]:
    """Return in which row of a frame the first whole day or week begins, and how many rows one has."""
    wants = f"a frame whose clock has dates, for windows of a whole {period}"
    if frame is None or frame.clock is None:
        raise ArgumentError(argument, "a recording without a clock", wants)
    clock = frame.clock.tz_localize(None) if getattr(frame.clock, "tz", None) is not None else frame.clock
    times = np.asarray(clock.values if hasattr(clock, "values") else clock)
    if times.dtype.kind != "M" or len(times) < 2:
        raise ArgumentError(argument, f"a clock of {len(times)} {times.dtype} values", wants)
    check_even(times)  # by local time: a day of 23 hours is no day like the others
    ns = times.astype("M8[ns]").astype(np.int64)
    # Days and weeks of Mondays since 1970-01-01, which was a Thursday.
    since, size = (ns, DAY) if period == "day" else (ns + 3 * DAY, 7 * DAY)
    step = int(ns[1] - ns[0])
    begins = np.flatnonzero(since % size == 0)
    if size % step or not len(begins):
        what = "midnight" if period == "day" else "midnight of a Monday"
        raise ArgumentError(
            argument, f"a clock from {times[0]} with steps of {step / 1e9:g} s", f"one that meets {what}"
        )
    return int(begins[0]), size // step


def _is_text(clock: Any) -> bool:
    """Whether a clock is of words that nobody could read as times."""
    return isinstance(clock, np.ndarray) and clock.dtype.kind == "O"


def _by_calendar(frame: Frame) -> str | None:
    """By what a clock of pandas goes on, if it goes on evenly: months and the like have steps that differ."""
    if len(frame.clock) <= 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 3.1 says that it will be an offset and no name: both are read
        found = getattr(frame.clock, "inferred_freq", None)
    name: str | None = getattr(found, "freqstr", found)
    return name


def recording(x: Any, argument: str = "X") -> tuple[Values, Frame | None]:
    """Return a recording as an array (time,) or (time, channels), and the frame that it was.

    Raises
    ------
    ArgumentError
        As of `windows`.
    """
    if is_frame(x):
        frame = Frame.of(x, argument)
        return frame.values, frame
    values = check_array(argument, x, finite=False)
    if values.ndim not in (1, 2) or not values.size:
        raise ArgumentError(argument, f"shape {values.shape}", "a recording (time,) or (time, channels)")
    if not is_on_device(values) and np.isinf(values).any():
        at = tuple(int(i) for i in np.argwhere(np.isinf(values))[0])
        raise ArgumentError(argument, f"{values[at]} at index {at}", "finite values, or NaN where they are missing")
    return values, None


def on_grid(x: Any, *, fill: str = "missing") -> Any:
    """Put a recording with an irregular clock on an even one.

    Parameters
    ----------
    x : frame
        With a clock, whose times rise: an index, or a column of times.
    fill : {"missing", "linear"}, optional
        "missing": the grid has the smallest step there is, times between have rows of missing values, and all times
        must lie on it. "linear": the grid has the median step, and values are interpolated, none over a missing one.

    Returns
    -------
    frame
        Of the same kind, its columns of values only.

    Raises
    ------
    ArgumentError
        No clock, times that do not rise or, with "missing", do not lie on one grid.

    Examples
    --------
    >>> import pandas as pd
    >>> days = pd.to_datetime(["2026-01-01", "2026-01-02", "2026-01-04"])
    >>> frame = pd.DataFrame({"y": [1.0, 2.0, 4.0]}, index=days)
    >>> fd.data.on_grid(frame)["y"].tolist()
    [1.0, 2.0, nan, 4.0]
    """
    check_choice("fill", fill, FILLS)
    if not is_frame(x):
        raise ArgumentError("x", type(x).__name__, "a frame with a clock")
    frame = Frame.of(x, "x")
    if frame.clock is None:
        raise ArgumentError("x", "a frame without a clock", "an index or a column of times")
    clock = np.asarray(frame.clock.values if hasattr(frame.clock, "values") else frame.clock)
    if clock.dtype.kind == "M":
        clock = clock.astype("datetime64[ns]")
    at = (clock - clock[0]).astype(np.float64)
    steps = np.diff(at)
    if not len(steps) or not (steps > 0).all():
        raise ArgumentError("x", "times that do not rise", "a clock that rises: sort the rows")
    step = steps.min() if fill == "missing" else float(np.median(steps))
    count = int(np.floor(at[-1] / step + EVEN)) + 1
    grid, values = step * np.arange(count), np.full((count, len(frame.keys)), np.nan)
    if fill == "missing":
        place = np.rint(at / step).astype(np.int64)
        off = np.abs(at - place * step) > EVEN * step
        if off.any():
            row = int(np.flatnonzero(off)[0])
            wants = "times on a grid of the smallest step, or fill='linear'"
            raise ArgumentError("x", f"{clock[row]} in row {row}, which is on no grid of the smallest step", wants)
        values[place] = frame.values
    else:
        for k, column in enumerate(frame.values.T):
            values[:, k] = np.interp(grid, at, column)
    whole = grid.astype(np.int64).astype("timedelta64[ns]") if clock.dtype.kind == "M" else grid
    log.info("on a grid: %d rows of %d times", count, len(clock))
    times = clock[0] + whole
    named = {str(key): values[:, k] for k, key in enumerate(frame.keys)}
    if frame.kind == "xarray":
        return type(frame.like)({name: (frame.clock_name, v) for name, v in named.items()}, {frame.clock_name: times})
    if frame.kind == "pandas" and frame.clock is frame.like.index:
        made = type(frame.like)(named, index=times)
        made.index.name = frame.like.index.name
        return made
    return type(frame.like)({frame.clock_name: times} | named)


# ------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Style:
    """How a CSV file writes: what is between cells (None: blanks), the decimal sign, and 31.12.2024 for 2024-12-31."""

    separator: str | None = ","
    decimal: str = "."
    dotted: bool = False

    def cells(self, column: Values) -> list[str]:
        """Return a column as text."""
        if column.dtype.kind == "f":
            return ["" if np.isnan(value) else f"{value:.9g}".replace(".", self.decimal) for value in column]
        if column.dtype.kind != "M":
            return [str(value) for value in column]
        parts = [str(value).partition("T") for value in column]
        if self.dotted:
            parts = [(".".join(reversed(date.split("-"))), sign, time) for date, sign, time in parts]
        return [f"{date} {time}" if time else date for date, _, time in parts]


class Columns:
    """The least of a frame: named columns of one length, as files have them, one of them perhaps the clock."""

    def __init__(self, data: Mapping[str, Any], clock: str | None = None, style: Style | None = None) -> None:
        self.data = {name: np.asarray(column) for name, column in data.items()}
        self.clock, self.style = clock, style or Style()

    @property
    def columns(self) -> list[str]:
        """The names, in order."""
        return list(self.data)

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def __len__(self) -> int:
        return len(next(iter(self.data.values()), ()))

    def head(self, rows: int) -> Columns:
        """Return the first rows."""
        return Columns({name: column[:rows] for name, column in self.data.items()}, self.clock, self.style)


def load_recording(path: str | os.PathLike[str], **reading: Any) -> Any:
    """Read a recording of a ``.csv`` or ``.parquet`` file as `Columns`, or the array of an ``.npy`` file.

    A CSV file has a line for each time. Its first column is taken for the clock where its cells are dates or times of
    day, or where it is the `index`; that is logged. Of dates 2024-12-31 and 31.12.2024 are read. Empty cells are
    missing values.

    Parameters
    ----------
    path : path
    **reading
        As of `fastdiff.data.load_curves`, for CSV files; of others `columns` and `drop`, by name.

    Returns
    -------
    Columns, or (time,), (time, channels) or (N, points, channels) array

    Raises
    ------
    DataError
        Naming file, line and column: a cell that is no number, lines of other lengths, no rows.
    """
    path = Path(path)
    suffix = check_ending(path, ENDINGS)
    with naming(path, "cannot be read"):
        if suffix == ".npy":
            return load_npy(path, (1, 2, 3), "(time,), (time, channels) or (series, points, channels)")
        if suffix == ".parquet":
            names, left_out = reading.get("columns"), reading.get("drop") or ()
            found = {name: column for name, column in _parquet(path).items() if name not in left_out}
            return Columns({name: found[name] for name in found if names is None or name in names})
        return _csv(path, **reading)


def _parquet(path: Path) -> dict[str, Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    table = parquet.read_table(path)
    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: several columns are called {twice!r}")
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _csv(path: Path, index: Any = None, drop: Any = (), columns: Any = None, **reading: Any) -> Columns:
    from fastdiff import tables

    asked = tables.Asked(
        index=[] if index is None else [index], drop=list(drop), columns=columns, missing=True, **reading
    )
    if index is None and (first := _first_cells(path, asked)) and all(map(_DATE.match, first)):
        log.info("%s: the first column is a clock: not learned", path)
        asked = replace(asked, index=[1])
    table = tables.read_csv(path, asked)
    names = [str(name) for name in table.names or [f"column {number}" for number in table.columns]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: {names.count(twice)} columns are called {twice!r}: give each a name of its own")
    table.as_float32(missing=True)  # which says where a value is infinite, or too large
    found: dict[str, Any] = {}
    clock, dotted = None, False
    if asked.index:
        clock, cells = tables.text_column(table)
        found[clock], dotted = _times(cells, table.asked.decimal)
    style = Style(table.separator, table.asked.decimal, dotted)
    return Columns(found | dict(zip(names, table.values.T, strict=True)), clock, style)


def _first_cells(path: Path, asked: Asked) -> list[str]:
    """The first cells of a few lines after the first one."""
    between = r"[;\t,|]" if asked.delimiter is None else re.escape(asked.delimiter)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = [line for line in islice(file, 1, 20) if line.strip() and not line.startswith("#")]
    return [re.split(between, line)[0].strip().strip('"') for line in lines]


def _times(cells: Sequence[str], decimal: str) -> tuple[Values, bool]:
    """Times as NumPy has them where it can read them, else numbers, or text as it is; and whether days come first."""
    parts = [_DOTTED.fullmatch(cell) for cell in cells]
    days = [f"{p[3]}-{p[2]:0>2}-{p[1]:0>2}" + (f"T{p[4]:0>2}{p[5]}" if p[4] else "") for p in parts if p]
    dotted = len(days) == len(cells)
    numbers = [cell.replace(decimal, ".") for cell in cells]
    for dtype, written in (("datetime64", days if dotted else cells), (np.float64, numbers)):
        try:
            found = np.array(written, dtype)
        except ValueError:
            continue
        if not (np.isnat(found) if dtype == "datetime64" else np.isnan(found)).any():
            return found, dotted
    return np.array(cells, object), False


def save_recording(path: str | os.PathLike[str], table: Columns) -> None:
    """Write columns into a ``.csv`` file with a header, missing values as empty cells, or a ``.parquet`` file."""
    if check_ending(path, (".csv", ".parquet")) == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"{path}: writing Parquet needs pyarrow: pip install pyarrow") from None
        columns = {name: _in_seconds(column) for name, column in table.data.items()}
        with writing(path) as file:
            parquet.write_table(pyarrow.table(columns), file)
        return
    cells = [table.style.cells(column) for column in table.data.values()]
    with writing(path) as file:
        text = io.StringIO(newline="")
        lines = csv.writer(text, delimiter=table.style.separator or "\t", lineterminator="\n")
        lines.writerow(table.columns)
        lines.writerows(zip(*cells, strict=True))
        file.write(text.getvalue().encode())


def _in_seconds(column: Values) -> Values:
    """Times in a unit that Parquet has."""
    hours = column.dtype.kind == "M" and np.datetime_data(column.dtype)[0] in ("Y", "M", "W", "h", "m")
    return column.astype("datetime64[s]") if hours else column


# ------------------------------------------------------------------------------------------- for models


def taken(X: Any) -> tuple[Any, list[str] | None, Frame | None]:
    """Return the rows of `Windows`, or of a frame of curves, as an array, and names of channels and frame if there are.

    A frame without missing values and columns of other things is what NumPy makes of it.
    """
    if isinstance(X, Windows):
        return X.values, X.names, None if X.frame is None else X.frame.ending()
    if not is_frame(X) or isinstance(X, Columns):
        return X, None, None
    frame = Frame.of(X)
    plain = frame.kind != "xarray" and len(frame.keys) == len(getattr(frame.like, "columns", ()))
    return X if plain and frame.like is X else frame.values, None, frame.ending()


def described(shape: tuple[int, ...], names: Sequence[str] | None) -> str:
    """Say what series of a shape (points, channels) are."""
    of = f": {', '.join(names)}" if names else ""
    return f"series of {shape[0]} points in {shape[1]} channel{'s' if shape[1] > 1 else ''}{of}"


def save_series(path: str | os.PathLike[str], X: Values, names: Sequence[str] | None) -> None:
    """Write series (n, points, channels): an ``.npy`` array, or a table with a line for each point of each."""
    if check_ending(path, ENDINGS) == ".npy":
        with writing(path) as file:
            np.lib.format.write_array(file, X, allow_pickle=False)
        return
    n, points, channels = X.shape
    called = list(names or [f"channel {k + 1}" for k in range(channels)])
    table: dict[str, Any] = {"sample": np.repeat(np.arange(n), points), "step": np.tile(np.arange(points), n)}
    save_recording(path, Columns(table | {name: X[..., k].reshape(-1) for k, name in enumerate(called)}))


def save_answers(
    path: str | os.PathLike[str],
    values: Values,
    frame: Frame | None,
    levels: Sequence[float] | None,
    names: Sequence[str] | None,
    *,
    later: bool = True,
) -> None:
    """Write draws (draws, rows, ...) of a recording, or its quantiles, which are then columns side by side.

    Of several draws there is a column "draw". `later`: rows after those of the frame, instead of these.
    """
    if check_ending(path, ENDINGS) == ".npy":
        with writing(path) as file:
            np.lib.format.write_array(file, values, allow_pickle=False)
        return
    values = values.reshape(*values.shape[:2], -1)
    count, rows, channels = values.shape
    called = (None if frame is None else frame.names) or names or [f"channel {k + 1}" for k in range(channels)]
    table: dict[str, Any] = {}
    if frame is not None and frame.clock is not None and later and _is_text(frame.clock):
        words = "%s has no times: those of the recording, like %r, are not read; 2024-12-31 and 31.12.2024 would be"
        log.info(words, path, frame.clock[-1])
    elif frame is not None and frame.clock is not None:
        table[frame.clock_name] = np.asarray(frame.times(rows) if later else frame.clock)
    if levels is None:
        numbers = {"draw": np.repeat(np.arange(count), rows)} if count > 1 else {}
        table = numbers | {k: np.tile(v, count) for k, v in table.items()}
        table |= {name: values[:, :, k].reshape(-1) for k, name in enumerate(called)}
    else:
        for k, name in enumerate(called):
            table |= {f"{name} {level:g}": values[q, :, k] for q, level in enumerate(levels)}
    style = frame.like.style if frame is not None and frame.kind == "columns" else None
    save_recording(path, Columns(table, style=style))
