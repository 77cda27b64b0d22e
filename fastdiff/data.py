"""Curves: made, read, written and compared; and, from `fastdiff.pictures`, what reads and writes pictures.

A set of curves is one array (N, points), one curve a row. Files are ``.csv`` (one curve a line) or ``.npy``.
Whatever is wrong with a file is a :class:`~fastdiff.errors.DataError` that names the file and the line.
"""

from __future__ import annotations

import csv
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import DataError, check_array, check_float, check_int, check_seed
from fastdiff.files import check_ending, check_writable, load_npy, naming, writing
from fastdiff.metrics import energy_distance
from fastdiff.noise import Draw, Stream, check_rows, philox_words
from fastdiff.pictures import as_uint8, load_images, picture_files, save_images, tiles

__all__ = [
    "as_uint8",
    "check_writable",
    "energy_distance",
    "harmonic_curves",
    "load_curves",
    "load_images",
    "picture_files",
    "save_curves",
    "save_images",
    "tiles",
    "writing",
]

ENDINGS = (".csv", ".npy")

_log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------- made


def harmonic_curves(
    n: int,
    *,
    points: int = 50,
    seed: int = 0,
    cosines: int = 5,
    max_frequency: float = 0.1,
    first_sample: int = 0,
) -> npt.NDArray[np.float32]:
    """Draw random sums of cosines, each divided by its own standard deviation.

    ``v[k] = sum_j cos(2 pi f_j k + phi_j)``, ``f_j`` uniform in ``[0, max_frequency)`` cycles a point,
    ``phi_j`` uniform in ``[0, pi)``; the curve is ``v / std(v)``. The defaults are the tutorial's: 50 points
    over 1 s, so 50 Hz, and frequencies from 0 to 5 Hz. The mean is not removed: a curve of low frequencies
    only stays far from zero, which gives the family a long tail.

    Parameters
    ----------
    n : int
        Number of curves.
    points : int, optional
        Points of a curve, at least 2.
    seed : int, optional
        Seed of the noise law. Curve k of a seed has the same bits whatever `n` is.
    cosines : int, optional
        Cosines in each sum.
    max_frequency : float, optional
        Upper end of the frequencies in cycles a point, above 0 and at most 0.5 (where sampling folds them).
    first_sample : int, optional
        Index of the first curve: ``harmonic_curves(9)[4:]`` equals ``harmonic_curves(5, first_sample=4)``.

    Returns
    -------
    ndarray
        (n, points) float32, computed in float64.
    """
    n = check_int("n", n, low=0)
    points = check_int("points", points, low=2)
    cosines = check_int("cosines", cosines, low=1)
    max_frequency = check_float("max_frequency", max_frequency, low=0, high=0.5, low_open=True)
    seed = check_seed(seed)
    first_sample = check_rows(first_sample, n)

    blocks = -(-2 * cosines // 4)
    words = philox_words(n, blocks, Draw(seed, Stream.DATA, first_row=first_sample))
    uniform = (words.reshape(n, 4 * blocks) >> np.uint32(8)) * 2.0**-24  # [0, 1), 24 bits, float64
    turn = 2 * np.pi * max_frequency * uniform[:, :cosines]  # radians a point
    phase = np.pi * uniform[:, cosines : 2 * cosines]
    k = np.arange(points, dtype=np.float64)
    curves = np.zeros((n, points))
    for j in range(cosines):  # one (n, points) term at a time: memory does not grow with `cosines`
        curves += np.cos(turn[:, j, None] * k + phase[:, j, None])
    spread = curves.std(axis=1, keepdims=True)
    spread[spread == 0] = 1  # all frequencies exactly 0: a flat line stays one
    curves /= spread
    return curves.astype(np.float32)


# --------------------------------------------------------------------------------------- read


def load_curves(path: str | os.PathLike[str], *, header: bool | None = None) -> npt.NDArray[np.float32]:
    """Read curves from a ``.csv`` or ``.npy`` file.

    A CSV file holds one curve a line, in UTF-8. Cells are separated by semicolons, tabs, commas or blanks,
    whichever the first line has, in this order; the decimal sign is the point. Empty lines and lines that
    start with ``#`` are skipped. An ``.npy`` file holds one (N, points) array of real numbers; pickled
    objects are refused.

    Parameters
    ----------
    path : path
        The file; the ending decides how it is read.
    header : bool, optional
        Whether the first line of a CSV file names the columns. None (default) looks: it does when no cell
        is a number, or when the cells are 0, 1, 2, ... (which pandas writes above an array; this is logged).

    Returns
    -------
    ndarray
        (N, points) float32, N and points at least 1, all values finite.

    Raises
    ------
    DataError
        Naming file and line, when the file cannot be read, is empty, ragged, truncated or foreign, or holds
        a cell that is not a finite number.
    """
    suffix = check_ending(path, ENDINGS)
    with naming(path, "cannot be read"):
        if suffix == ".csv":
            return _load_csv(Path(path), header)
        values = load_npy(Path(path), (2,), "(curves, points)")
        return _as_float32(values, lambda row: f"{path}, curve {row}")


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


def _bad_cell(cells: Sequence[str], where: str) -> DataError:
    for column, cell in enumerate(cells, 1):
        if not cell:
            return DataError(f"{where}, column {column}: empty cell")
        if _number(cell) is None:
            shown = cell if len(cell) <= 30 else f"{cell[:27]}..."
            return DataError(f"{where}, column {column}: {shown!r} is not a number")
    raise AssertionError("every cell is a number")


def _load_csv(path: Path, header: bool | None) -> npt.NDArray[np.float32]:
    values = array("d")
    lines: list[int] = []  # the line of each curve, for messages
    separator: str | None = None
    width = 0  # until the first line is seen
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                text = line.strip(" \r\n")
                if not text.strip() or text.startswith("#"):
                    continue
                where = f"{path}, line {number}"
                if not width:
                    separator = next((sign for sign in ";\t," if sign in text), None)
                    top = _cells(text, separator)
                    width, width_line = len(top), number
                    if width > 1 and not top[0] and all(top[1:]):
                        raise DataError(
                            f"{where}: the first column has no name and looks like a row index; "
                            "write the file without it (pandas: index=False)"
                        )
                    if header or (header is None and _is_header(top, where)):
                        continue
                cells = _cells(text, separator)
                if len(cells) != width:
                    raise DataError(f"{where}: {len(cells)} cells, where line {width_line} has {width}")
                try:
                    if not _plain(text):
                        raise ValueError
                    row = array("d", map(float, cells))
                except ValueError:
                    raise _bad_cell(cells, where) from None
                values.extend(row)
                lines.append(number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file: {error}") from error
    if not lines:
        raise DataError(f"{path}: {'column names and no curves' if width else 'empty file'}")
    wide = np.frombuffer(values, dtype=np.float64).reshape(len(lines), width)
    return _as_float32(wide, lambda row: f"{path}, line {lines[row]}")


def _as_float32(values: npt.NDArray[Any], where: Callable[[int], str]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        curves = np.ascontiguousarray(values, dtype=np.float32)
    bad = ~np.isfinite(curves)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        value = values[row, column]
        reason = "is too large for float32" if np.isfinite(value) else "is not a finite number"
        raise DataError(f"{where(row)}, column {column + 1}: {value} {reason}")
    return curves


# --------------------------------------------------------------------------------------- written


def save_curves(path: str | os.PathLike[str], X: npt.ArrayLike) -> None:
    """Write curves to a ``.csv`` or ``.npy`` file; `load_curves` gives the same float32 bits back.

    The file appears whole or not at all.

    Parameters
    ----------
    path : path
        The file; the ending decides how it is written. An existing file is replaced.
    X : array_like
        (N, points) real numbers, finite; stored as float32. In CSV: one curve a line, commas, no header.
    """
    suffix = check_ending(path, ENDINGS)
    curves = check_array("X", X, shape=(None, None), dtype=np.float32)
    with writing(path) as file:
        if suffix == ".npy":
            np.lib.format.write_array(file, curves, allow_pickle=False)
        else:
            np.savetxt(file, curves, fmt="%.9g", delimiter=",")  # 9 digits: float32 comes back exactly
