"""Tables of numbers, read from ``.csv`` and ``.npy`` files: which columns there are, and which are left out.

Whatever is wrong with a file is a :class:`~fastdiff.errors.DataError` that names the file and the line.
"""

from __future__ import annotations

import csv
import difflib
import io
import logging
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import doubts
from fastdiff.errors import ArgumentError, DataError, check_choice, check_int, shown
from fastdiff.files import load_npy, reading, writing

Column = int | str
MISSING = ("", "nan", "na", "n/a", "null", "none")  # what tables write where there is no value
DELIMITERS = {"tab": "\t", "\\t": "\t", "space": " "}
SIGNS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}  # that are looked for, in this order
_DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")  # 1,5 and 1.234,5
_COMMAS = "of decimal commas make points, or --decimal , reads them (decimal=',' in Python)"
_SWAP = str.maketrans(",.", ".,")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """How a file is to be read: see `fastdiff.data.load_curves`."""

    header: bool | None = None
    index: Sequence[Column] = ()
    drop: Sequence[Column] = ()
    columns: Sequence[Column] | None = None
    decimal: str = "."
    delimiter: str | None = None
    missing: bool = False

    def __post_init__(self) -> None:
        check_choice("decimal", self.decimal, ".,")
        if not (self.delimiter is None or isinstance(self.delimiter, str)):
            raise ArgumentError("delimiter", shown(self.delimiter), "a character, 'tab' or 'space', or None")
        wants = "one character that numbers do not have, 'tab' or 'space', or None: looks"
        sign = DELIMITERS.get(str(self.delimiter), self.delimiter)
        fit = isinstance(sign, str) and len(sign) == 1 and not (sign.isalnum() or sign in f"+-.\"'#_{self.decimal}")
        if sign is not None and not fit:
            raise ArgumentError("delimiter", shown(self.delimiter), wants)
        object.__setattr__(self, "delimiter", sign)

    @property
    def named(self) -> list[tuple[str, Sequence[Column]]]:
        """The arguments that name columns, and their columns."""
        return [("index", self.index), ("drop", self.drop), ("columns", self.columns or ())]


@dataclass(frozen=True)
class Table:
    """Numbers as a file has them.

    Attributes
    ----------
    path : Path
        The file.
    values : (N, columns) array
        The numbers, in float64 or as an ``.npy`` file has them.
    columns : sequence of int
        The number of each column in the file, from 1.
    called : sequence of str
        What each of them is called by `index` and `drop`.
    rows : sequence of str
        Where each row stands: ``line 3``, ``curve 0``.
    asked : Asked
        How it was to be read.
    names : sequence of str or None
        What the columns are called, if the file says so.
    separator : str or None
        What is between the cells of a CSV file; None: blanks.
    """

    path: Path
    values: npt.NDArray[Any]
    columns: Sequence[int]
    called: Sequence[str]
    rows: Sequence[str]
    asked: Asked
    names: Sequence[str] | None = None
    separator: str | None = ","

    def as_float32(self, *, missing: bool = False) -> npt.NDArray[np.float32]:
        """Return the values in float32, all of them finite, or NaN with `missing`; else raise `DataError`."""
        with np.errstate(over="ignore"):
            curves = np.ascontiguousarray(self.values, dtype=np.float32)
        bad = ~np.isfinite(curves)
        if missing:
            bad &= ~np.isnan(self.values)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            value = self.values[row, column]
            reason = "is too large for float32" if np.isfinite(value) else "is not a finite number"
            raise DataError(f"{self.path}, {self.rows[row]}, column {self.columns[column]}: {value} {reason}")
        return curves

    def doubts(self, *, header: bool | None) -> list[str]:
        """Return a sentence for each thing that looks like no value of a curve; `header` as it was asked for."""
        values, found = self.values, []
        if self.path.suffix.lower() == ".csv" and self.names is None and header is None:
            doubt = doubts.of_first_row(values)
            if doubt is not None:
                found.append(f"{self.rows[0]} {doubt}")
                values = values[1:]
        return found + doubts.of_columns(values, self.called, self.names)


def read_npy(path: Path, asked: Asked) -> Table:
    """Read an ``.npy`` file of one (N, points) array, without some columns, which have numbers only."""
    values = load_npy(path, (2,), "(curves, points)")
    width = values.shape[1]
    kept = _kept(path, width, asked)
    rows, columns = _Rows("curve", range(len(values))), [k + 1 for k in kept]
    wide = values if len(kept) == width else values[:, kept]
    return Table(path, wide, columns, [str(k) for k in columns], rows, asked)


def read_csv(path: Path, asked: Asked) -> Table:
    """Read a ``.csv`` file of one row a line, without some columns: see `fastdiff.data.load_curves`."""
    values = array("d")
    lines: list[int] = []  # the line of each row, for messages
    layout: _Layout | None = None  # until the first line is seen
    try:
        with reading(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                text = line.strip("\r\n" if asked.delimiter == "\t" else " \r\n")
                if not text.strip() or text.startswith("#"):
                    continue
                if layout is None:
                    layout = _layout(path, number, text, asked)
                    if layout.names is not None:
                        continue
                values.extend(layout.numbers(text, number))
                lines.append(number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file: {error}") from error
    if layout is None or not lines:
        raise DataError(f"{path}: {'empty file' if layout is None else 'column names and no curves'}")
    wide = np.frombuffer(values, dtype=np.float64).reshape(len(lines), len(layout.kept))
    names = None if layout.names is None else [layout.names[k] for k in layout.kept]
    called = [_called(layout.names, k) for k in layout.kept]
    columns = [k + 1 for k in layout.kept]
    return Table(path, wide, columns, called, _Rows("line", lines), asked, names, layout.separator)


def text_column(table: Table) -> tuple[str, list[str]]:
    """Return name and cells, as text, of the column that was taken for the index of a CSV file."""
    names, lines = _lines(table)
    (place,) = _places(table.path, "index", table.asked.index, len(_cells(lines[0], table.separator)), names)
    return (names[place] if names else "") or "time", [_cells(line, table.separator)[place] for line in lines]


def save_filled(path: str | os.PathLike[str], values: npt.NDArray[Any], table: Table, levels: Any = None) -> None:
    """Write rows (times, N, d) as the file writes them that they come from, with values where it has none.

    All other cells are the file's, those of columns that were left out too, and so are the line of names, separator
    and decimal sign. Of several draws there is a column "draw" before them, if the file has names; of quantiles there
    are columns "quantile" and "row", from 1, and a line of names.
    """
    names, lines = _lines(table)
    if levels is not None:
        labels = ["quantile", "row"]
        names = names or [f"column_{k + 1}" for k in range(len(_cells(lines[0], table.separator)))]
    else:
        labels = ["draw"] if names and len(values) > 1 else []

    def text(number: float) -> str:
        return f"{number:.9g}".replace(".", table.asked.decimal)

    with writing(path) as binary:
        file = io.TextIOWrapper(binary, "utf-8", newline="")
        out = csv.writer(file, delimiter=table.separator or " ", lineterminator="\n")
        if names:
            out.writerow([*labels, *names])
        for k, rows in enumerate(values):
            for number, (line, seen, row) in enumerate(zip(lines, table.values, rows, strict=True), 1):
                cells = _cells(line, table.separator)
                for place in np.flatnonzero(np.isnan(seen)).tolist():
                    cells[table.columns[place] - 1] = text(row[place])
                label: tuple[Any, ...] = (k,) if labels else ()
                out.writerow([*(label if levels is None else (text(levels[k]), number)), *cells])
        file.detach()  # which writes what is left, and leaves the file open


def _lines(table: Table) -> tuple[list[str], list[str]]:
    """Return the names of all columns of a file that was read, if it has any, and the lines of its rows, as text."""
    if table.path.suffix.lower() != ".csv":
        whole = load_npy(table.path, (2,), "(curves, points)")
        return [], [",".join(f"{value:.9g}" for value in row) for row in whole]
    numbers = {int(where.split()[-1]) for where in table.rows}
    names: list[str] = []
    lines: list[str] = []
    with table.path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            text = line.strip("\r\n" if table.asked.delimiter == "\t" else " \r\n")
            if number in numbers:
                lines.append(text)
            elif text.strip() and not text.startswith("#"):  # before them all
                names = _cells(text, table.separator)
    return names, lines


@dataclass(frozen=True)
class _Rows(Sequence[str]):
    """Where rows stand; the words are made when they are asked for."""

    what: str
    numbers: Sequence[int]

    def __getitem__(self, row: Any) -> Any:
        return f"{self.what} {self.numbers[row]}"

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class _Layout:
    """What the first line of a CSV file says of all others."""

    path: Path
    first: int  # number of that line
    separator: str | None
    width: int  # cells of a line
    kept: Sequence[int]  # places of the values among them
    names: Sequence[str] | None  # of all columns, if the first line has names
    missing: bool  # whether a cell may say that there is no value
    comma: bool  # whether the decimal sign is one
    doubt: DataError | None  # what is wrong, unless the first row tells of more: decimal commas

    def numbers(self, text: str, line: int) -> array[float]:
        """Return the values of a line."""
        where = f"{self.path}, line {line}"
        text = text.translate(_SWAP) if self.comma else text
        cells = _cells(text, self.separator)
        if len(cells) != self.width:
            raise DataError(f"{where}: {len(cells)} cells, where line {self.first} has {self.width}")
        if self.doubt is not None:
            raise self._decimal_comma(cells, range(self.width), line) or self.doubt
        if len(self.kept) < self.width:
            cells = [cells[k] for k in self.kept]
            text = "".join(cells)
        if self.missing:
            cells = ["nan" if cell.lower() in MISSING else cell for cell in cells]
            text = "".join(cells)
        try:
            if not _plain(text):
                raise ValueError
            return array("d", map(float, cells))
        except ValueError:
            if all(_number(cell) is not None for cell in cells):  # blanks of other scripts are around them
                return array("d", map(float, cells))
            raise self._bad_cell(cells, line) from None

    def _decimal_comma(self, cells: Sequence[str], places: Sequence[int], line: int) -> DataError | None:
        """What is said of the first decimal comma, where the sign is the point: it comes before all other advice."""
        for place, cell in zip(places, cells, strict=True):
            if not self.comma and _DECIMAL_COMMA.fullmatch(cell):
                return DataError(f"{self.path}, line {line}, column {place + 1}: {cell!r} is not a number; {_COMMAS}")
        return None

    def _bad_cell(self, cells: Sequence[str], line: int) -> DataError:
        if (commas := self._decimal_comma(cells, self.kept, line)) is not None:
            return commas
        bad = [k for k, cell in enumerate(cells) if _number(cell) is None]
        cells = [cell.translate(_SWAP) for cell in cells] if self.comma else cells  # as the file has them
        at, first = f"{self.path}, line {line}, column {self.kept[bad[0]] + 1}", cells[bad[0]]
        if not first:
            return DataError(f"{at}: empty cell; train --missing takes it for a missing value (missing=True in Python)")
        shown = first if len(first) <= 30 else f"{first[:27]}..."
        texts = [_called(self.names, self.kept[k]) for k in bad if cells[k]]
        hint = f"; {doubts.remedy(*texts)}" if len(texts) < len(cells) else ""
        if self.comma and (_number(first) is not None or _DECIMAL_COMMA.fullmatch(first)):
            hint = "; the decimal sign is to be a comma, and points between thousands are not read"
        if line == self.first:
            hint += "; --header if these are column names (header=True)"
        return DataError(f"{at}: {shown!r} is not a number{hint}")


def _layout(path: Path, line: int, text: str, asked: Asked) -> _Layout:
    comma, header = asked.decimal == ",", asked.header
    separator = asked.delimiter
    if separator is None:
        separator = next((sign for sign in SIGNS if sign in text and not (comma and sign == ",")), None)
    elif separator == " ":
        separator = None
    where, words = f"{path}, line {line}", text.split()
    if separator == "," and asked.delimiter is None and len(words) > 1 and all(map(_DECIMAL_COMMA.fullmatch, words)):
        raise DataError(f"{where}: {words[0]!r} is not a number; {_COMMAS}")
    top = _cells(text, separator)
    width = len(top)
    names = [] if header is False else top
    of_index = _places(path, "index", asked.index, width, names)
    kept = _kept(path, width, asked, names)
    doubt = None
    if 0 in kept and width > 1 and not top[0] and all(top[1:]):
        doubt = DataError(
            f"{where}: the first column has no name and looks like a row index; {doubts.remedy('1', index=True)}; "
            "or write the file without it (pandas: index=False)"
        )
    if header is None:
        named = any(_number_of(column, width) is None for _, columns in asked.named for column in columns)
        plain = [top[k].translate(_SWAP) if comma else top[k] for k in kept]
        numbers = any(_number(cell) is not None for cell in plain)
        if not (comma or named or numbers) and any(map(_DECIMAL_COMMA.fullmatch, plain)):  # no line of names
            place = next(k for k in kept if _DECIMAL_COMMA.fullmatch(top[k]))
            raise DataError(f"{where}, column {place + 1}: {top[place]!r} is not a number; {_COMMAS}")
        header = named or any(not top[k] for k in of_index) or _is_header(plain, where)
    left = [str(k + 1) for k in sorted({*range(width)} - {*kept})]
    _log.info(
        "%s: cells between %s; line %d has %s; %d columns are values%s", path,
        "blanks" if separator is None else SIGNS.get(separator, repr(separator)), line,
        "column names" if header else "the first curve", len(kept),
        f", left out: {', '.join(left[:10])}{', ...' * (len(left) > 10)}" if left else "",
    )  # fmt: skip
    return _Layout(path, line, separator, width, kept, top if header else None, asked.missing, comma, doubt)


def _places(path: Path, argument: str, columns: Sequence[Column], width: int, names: Sequence[str] = ()) -> list[int]:
    """The places of columns among the cells of a line, from 0."""
    places: list[int] = []
    for column in columns:
        run = re.fullmatch(r"(\d+)-(\d+)", column) if isinstance(column, str) and column not in names else None
        if run is not None and 1 <= int(run[1]) <= int(run[2]) <= width:
            places += range(int(run[1]) - 1, int(run[2]))
            continue
        number = _number_of(column, width)
        if number is None and names.count(str(column)) != 1:
            count = names.count(str(column))
            near = difflib.get_close_matches(str(column), names, 1)
            got = repr(column) + (f", of which there are {count}" if count else "")
            by = "by its name, or by its number" if names else "by its number"
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ArgumentError(argument, got, f"a column of {path} {by} from 1 to {width}{hint}")
        places.append(names.index(str(column)) if number is None else number - 1)
    return places


def _number_of(column: Column, width: int) -> int | None:
    """The number, from 1, that is meant; None: a name is."""
    if isinstance(column, str):
        return int(column) if column.isdecimal() and 1 <= int(column) <= width else None
    return check_int("index, drop and columns", column, low=1, high=width)


def _kept(path: Path, width: int, asked: Asked, names: Sequence[str] = ()) -> list[int]:
    """The places of the values."""
    index, drop, only = (set(_places(path, name, columns, width, names)) for name, columns in asked.named)
    stay = set(range(width)) if asked.columns is None else only
    if not stay - index - drop:
        argument, got = ("drop", "every column") if asked.columns is None else ("columns", "none that stays")
        raise ArgumentError(argument, got, f"one column of {path} that stays, at least")
    return sorted(stay - index - drop)


def _called(names: Sequence[str] | None, place: int) -> str:
    """What `index` and `drop` call a column: its name where that is clear, else its number."""
    name = "" if names is None else names[place]
    plain = bool(name) and not name.isdecimal() and "," not in name
    return name if plain and names is not None and names.count(name) == 1 else str(place + 1)


def _cells(line: str, separator: str | None) -> list[str]:
    if separator is not None and '"' in line:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
    return [cell.strip() for cell in line.split(separator)]


def _number(cell: str) -> float | None:
    try:
        return float(cell) if _plain(cell) else None
    except ValueError:
        return None


def _plain(text: str) -> bool:
    # float() also reads 1_000 and digits of other scripts; no other reader of CSV does.
    return "_" not in text and text.isascii()


def _is_header(cells: Sequence[str], where: str) -> bool:
    if cells == [str(i) for i in range(len(cells))] and len(cells) > 2:
        _log.warning("%s: 0, 1, 2, ... is taken as a line of column names, not as a curve", where)
        return True
    return all(_number(cell) is None for cell in cells)
