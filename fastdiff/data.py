"""Curves: made, read, written and compared; and, from `fastdiff.pictures`, what reads and writes pictures.

A set of curves is one array (N, points), one curve a row. Files are ``.csv`` (one curve a line) or ``.npy``.
Whatever is wrong with a file is a :class:`~fastdiff.errors.DataError` that names the file and the line.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import tables
from fastdiff.errors import (
    ArgumentError,
    DataWarning,
    check_array,
    check_flags,
    check_float,
    check_int,
    check_room,
    check_seed,
    shown,
)
from fastdiff.files import check_ending, check_writable, naming, writing
from fastdiff.metrics import energy_distance
from fastdiff.noise import Draw, Stream, check_rows, philox_words
from fastdiff.pictures import as_uint8, load_images, picture_files, save_images, tiles
from fastdiff.series import on_grid, windows
from fastdiff.tables import Column

__all__ = [
    "as_uint8",
    "check_writable",
    "circles",
    "energy_distance",
    "harmonic_curves",
    "load_curves",
    "load_images",
    "on_grid",
    "picture_files",
    "portraits",
    "save_curves",
    "save_images",
    "tiles",
    "windows",
    "writing",
]

ENDINGS = (".csv", ".npy")
CIRCLES_STEP, PORTRAITS_STEP = 2, 22  # of stream DATA
FINE = 4  # points on a side of a pixel of a portrait

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

    Examples
    --------
    >>> fd.data.harmonic_curves(3).shape
    (3, 50)
    >>> bool((fd.data.harmonic_curves(3)[2] == fd.data.harmonic_curves(1, first_sample=2)[0]).all())
    True
    """
    n = check_int("n", n, low=0)
    points = check_int("points", points, low=2)
    cosines = check_int("cosines", cosines, low=1)
    max_frequency = check_float("max_frequency", max_frequency, low=0, high=0.5, low_open=True)
    seed = check_seed(seed)
    first_sample = check_rows(first_sample, n)

    blocks = -(-2 * cosines // 4)
    check_room("points" if points > n else "n", (n, points), np.float64)
    check_room("cosines" if cosines > n else "n", (n, 4 * blocks), np.float64)
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


def read_table(
    path: str | os.PathLike[str],
    *,
    header: bool | None = None,
    index: Column | None = None,
    drop: Column | Sequence[Column] = (),
    columns: Column | Sequence[Column] | None = None,
    decimal: str = ".",
    delimiter: str | None = None,
    missing: bool = False,
) -> tables.Table:
    """Read what `load_curves` reads, as a table that knows where its numbers stand."""
    suffix = check_ending(path, ENDINGS)
    check_flags(missing=missing, header=bool(header) if header is None else header)
    for name, some in (("drop", drop), ("columns", columns)):
        known = some is None or isinstance(some, (int, np.integer, str, list, tuple))
        if not known or (
            isinstance(some, (list, tuple)) and not all(isinstance(k, (int, np.integer, str)) for k in some)
        ):
            raise ArgumentError(name, shown(some), "a name or number of a column, or a list of them")
    if not (index is None or isinstance(index, (int, np.integer, str))):
        raise ArgumentError("index", shown(index), "a name or number of a column")
    of_index = [] if index is None else [index]
    dropped, only = ([some] if isinstance(some, (int, np.integer, str)) else some for some in (drop, columns))
    asked = tables.Asked(header, of_index, list(dropped or ()), only, decimal, delimiter, missing)
    with naming(path, "cannot be read"):
        return (tables.read_csv if suffix == ".csv" else tables.read_npy)(Path(path), asked)


def load_curves(
    path: str | os.PathLike[str],
    *,
    header: bool | None = None,
    index: Column | None = None,
    drop: Column | Sequence[Column] = (),
    columns: Column | Sequence[Column] | None = None,
    decimal: str = ".",
    delimiter: str | None = None,
    missing: bool = False,
) -> npt.NDArray[np.float32]:
    """Read curves from a ``.csv`` or ``.npy`` file.

    A CSV file holds one curve a line, in UTF-8. Cells are separated by semicolons, tabs, commas, bars or blanks,
    whichever the first line has, in this order; the decimal sign is the point. What was taken for what is logged.
    Empty lines and lines that start with ``#`` are skipped. An ``.npy`` file holds one (N, points) array of real
    numbers; pickled objects are refused.

    Parameters
    ----------
    path : path
        The file; the ending decides how it is read.
    header : bool, optional
        Whether the first line of a CSV file names the columns. None (default) looks: it does when no cell
        is a number, or when the cells are 0, 1, 2, ... (which pandas writes above an array; this is logged).
        Columns that are left out do not count, and if one of them is named here, the first line has names.
    index : int or str, optional
        The column of the curves' own names or times, which is left out and may hold text: its number, from 1,
        or its name in the first line. Digits that are one of the numbers are taken for the number.
    drop : int, str or sequence of these, optional
        Further columns that are left out.
    columns : int, str or sequence of these, optional
        The columns that are read, in the order of the file, but for those above; "3-20" is a run of them. By default
        all.
    decimal : {".", ","}, optional
        The decimal sign of a CSV file. With "," cells are not separated by commas, and points are errors.
    delimiter : str, optional
        What is between the cells of a CSV file: one character, "tab" or "space" (any blanks). By default it looks.
    missing : bool, optional
        Empty cells, and the words nan, NA, N/A, null and None, are values that are missing, NaN in the result. By
        default they are errors. The first line must not be without values.

    Returns
    -------
    ndarray
        (N, points) float32, N and points at least 1, all values finite, or NaN with `missing`.

    Raises
    ------
    DataError
        Naming file and line, when the file cannot be read, is empty, ragged, truncated or foreign, or holds
        a cell that is not a finite number.
    ArgumentError
        There is no such column, or none would be left.

    Warns
    -----
    DataWarning
        A column looks like an index, a time or a label, the lines like the moments of curves (long format),
        or the first one like column names: what was seen, and the remedy. The values are as in the file.

    Examples
    --------
    >>> fd.data.save_curves('new.csv', [[0.0, 1.0], [2.0, 3.5]])
    >>> fd.data.load_curves('new.csv').tolist()
    [[0.0, 1.0], [2.0, 3.5]]
    """
    table = read_table(
        path, header=header, index=index, drop=drop, columns=columns, decimal=decimal, delimiter=delimiter,
        missing=missing,
    )  # fmt: skip
    curves = table.as_float32(missing=missing)
    for doubt in [] if np.isnan(curves).any() else table.doubts(header=header):
        warnings.warn(f"{path}: {doubt}", DataWarning, stacklevel=2)
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

    Examples
    --------
    >>> fd.data.save_curves('new.csv', [[0.0, 1.0], [2.0, 3.5]])
    >>> fd.data.load_curves('new.csv').tolist()
    [[0.0, 1.0], [2.0, 3.5]]
    """
    suffix = check_ending(path, ENDINGS)
    curves = check_array("X", X, shape=(None, None), dtype=np.float32)
    with writing(path) as file:
        if suffix == ".npy":
            np.lib.format.write_array(file, curves, allow_pickle=False)
        else:
            np.savetxt(file, curves, fmt="%.9g", delimiter=",")  # 9 digits: float32 comes back exactly


# --------------------------------------------------------------------------------------- pictures


def circles(
    n: int,
    size: int = 32,
    *,
    radius: tuple[float, float] = (0.15, 0.4),
    seed: int = 0,
    first_sample: int = 0,
) -> npt.NDArray[np.uint8]:
    """Draw pictures of one filled circle each, white on black, with a soft edge of one pixel.

    Radius and centre are uniform, the centre where the circle is whole. A pixel is as bright as the share of it that
    the circle covers, up to the curvature of the edge within it.

    Parameters
    ----------
    n : int
        Number of pictures.
    size : int, optional
        Pixels on a side, at least 8.
    radius : (float, float), optional
        Smallest and largest radius, as shares of the side; at least 0.05, and below 0.5.
    seed : int, optional
        Seed of the noise law. Picture k of a seed has the same bytes whatever `n` is.
    first_sample : int, optional
        Index of the first picture.

    Returns
    -------
    ndarray
        (n, size, size, 1) uint8.

    Raises
    ------
    ArgumentError
        A value is not what it should be.

    Examples
    --------
    >>> fd.data.circles(3, 16).shape
    (3, 16, 16, 1)
    """
    n, size = check_int("n", n, low=0), check_int("size", size, low=8)
    if not isinstance(radius, (tuple, list)) or len(radius) != 2:
        raise ArgumentError("radius", shown(radius), "the smallest and the largest, as in (0.15, 0.4)")
    least, most = (check_float("radius", share, low=0.05, high=0.5, high_open=True) for share in radius)
    if least > most:
        raise ArgumentError("radius", shown(radius), "the smaller one first")
    check_room("size" if size**2 > n else "n", (n, size, size), np.float64)
    check_room("n", (n, 4), np.uint64)
    draw = Draw(check_seed(seed), Stream.DATA, CIRCLES_STEP, check_rows(first_sample, n))
    uniform = philox_words(n, 1, draw)[:, 0, :3] * 2.0**-32
    r = size * (least + (most - least) * uniform[:, 0, None, None])
    x, y = (r + 0.5 + (size - 1 - 2 * r) * uniform[:, axis, None, None] for axis in (1, 2))
    at = np.arange(size) + 0.5
    distance = np.hypot(at - x, at[:, None] - y)
    return np.round(255 * np.clip(r + 0.5 - distance, 0, 1)).astype(np.uint8)[..., None]


def portraits(n: int, size: int = 32, *, seed: int = 0, first_sample: int = 0) -> npt.NDArray[np.uint8]:
    """Draw portraits in colour of round faces, each of somebody else.

    Ground, skin, hair, eyes and mouth are discs and bands whose sizes, places and colours are uniform in a range.

    Parameters
    ----------
    n : int
        Number of pictures.
    size : int, optional
        Pixels on a side, at least 8.
    seed : int, optional
        Seed of the noise law. Picture k of a seed has the same bytes whatever `n` is.
    first_sample : int, optional
        Index of the first picture.

    Returns
    -------
    ndarray
        (n, size, size, 3) uint8: red, green, blue.

    Raises
    ------
    ArgumentError
        A value is not what it should be.

    Examples
    --------
    >>> faces = fd.data.portraits(5, 32)
    >>> faces.shape, bool((fd.data.portraits(1, 32, first_sample=4)[0] == faces[4]).all())
    ((5, 32, 32, 3), True)
    """
    n, size = check_int("n", n, low=0), check_int("size", size, low=8)
    draw = Draw(check_seed(seed), Stream.DATA, PORTRAITS_STEP, check_rows(first_sample, n))
    uniform = philox_words(n, 4, draw).reshape(n, 16) * 2.0**-32
    at = (2 * np.arange(FINE * size) + 1) / (FINE * size) - 1
    fine = (_portrait(each, at, at[:, None]) for each in uniform)
    means = [each.reshape(size, FINE, size, FINE, 3).mean(axis=(1, 3)) for each in fine]
    return np.round(np.reshape(means, (n, size, size, 3))).astype(np.uint8)


def _portrait(share: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Any:
    """A face in [-1, 1]^2, y downwards, from 16 numbers in [0, 1)."""
    ground = 205 + 45 * np.cos(2 * np.pi * (share[0] + np.array([0, 1, 2]) / 3))
    skin = (1 - share[1]) * np.array([250, 222, 196]) + share[1] * np.array([128, 84, 58])
    light = np.array([226, 178, 84] if share[3] < 0.5 else [168, 74, 36])
    hair = (1 - share[2]) * np.array([40, 28, 24]) + share[2] * light
    radius = 0.56 + 0.12 * share[4]
    u, v = (x - 0.16 * (share[5] - 0.5)) / radius, (y - 0.12 - 0.08 * share[6]) / radius
    face, apart, height = np.hypot(u, v) < 1, 0.36 + 0.1 * share[7], 0.02 + 0.14 * share[8]
    picture = np.empty((len(y), len(x), 3))
    picture[...] = ground
    picture[np.hypot(u, v + 0.1 + 0.15 * share[9]) < 1.08 + 0.1 * share[10]] = hair
    picture[face] = skin
    picture[face & (v < -0.62 + 0.24 * share[11] + (share[12] - 0.3) * u**2)] = hair
    for side in (-1, 1):
        cheek = np.hypot(u - side * 0.56, v - 0.34) < 0.2
        picture[cheek] = 0.75 * skin + 0.25 * np.array([240, 90, 90])
        eye = np.hypot(u - side * apart, v + height)
        picture[eye < 0.17] = 250
        picture[eye < 0.1] = 30
    mouth = 0.5 + 0.06 * share[13] - (0.9 * share[14] - 0.2) * u**2
    picture[(abs(v - mouth) < 0.065) & (abs(u) < 0.28 + 0.14 * share[15])] = np.array([176, 48, 56])
    return picture
