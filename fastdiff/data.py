"""Curves and pictures: made, read, written and compared.

A set of curves is one array (N, points), one curve a row. Files are ``.csv`` (one curve a line) or ``.npy``.
A set of pictures is one array (N, H, W, C) of bytes, C = 1 (gray) or 3 (red, green, blue); on disk it is a folder of
picture files. Whatever is wrong with a file is a :class:`~fastdiff.errors.DataError` that names the file and the line.

Pillow is imported inside the functions that read or write pictures.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import secrets
import tokenize
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from fastdiff.errors import (
    ArgumentError,
    BackendError,
    DataError,
    check_array,
    check_choice,
    check_float,
    check_int,
    check_seed,
)
from fastdiff.noise import Stream, check_rows, philox_words

# What NumPy's reader of .npy headers, a Python literal, raises on hostile ones.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    OverflowError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)

ENDINGS = (".csv", ".npy")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow's names of those formats. It reads many more, some with programs of their own; no file is handed to these.
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_NAMED = 10  # files that one message names
_LARGEST = 1 << 14  # pixels on a side that can be asked for

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
    words = philox_words(n, blocks, seed=seed, stream=Stream.DATA, first_sample=first_sample)
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
    try:
        if suffix == ".csv":
            return _load_csv(Path(path), header)
        values = _load_npy(Path(path), (2,), "(curves, points)")
        return _as_float32(values, lambda row: f"{path}, curve {row}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


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
    width = 0
    first = True
    named = False
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                text = line.strip(" \r\n")
                if not text.strip() or text.startswith("#"):
                    continue
                where = f"{path}, line {number}"
                if first:
                    separator = next((sign for sign in ";\t," if sign in text), None)
                cells = _cells(text, separator)
                if first:
                    first = False
                    width, width_line = len(cells), number
                    if len(cells) > 1 and not cells[0] and all(cells[1:]):
                        raise DataError(
                            f"{where}: the first column has no name and looks like a row index; "
                            "write the file without it (pandas: index=False)"
                        )
                    if header or (header is None and _is_header(cells, where)):
                        named = True
                        continue
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
        raise DataError(f"{path}: {'column names and no curves' if named else 'empty file'}")
    wide = np.frombuffer(values, dtype=np.float64).reshape(len(lines), width)
    return _as_float32(wide, lambda row: f"{path}, line {lines[row]}")


def _load_npy(path: Path, ndims: Sequence[int], wants: str) -> npt.NDArray[Any]:
    # np.load would fall back to pickle and zip files, and believe a header that promises terabytes.
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
            else:
                raise DataError(f"{path}: unknown .npy format {version[0]}.{version[1]}")
        except _HEADER_ERRORS:
            raise DataError(f"{path}: not an .npy file, or a damaged one") from None
        if dtype.kind not in "fiu":
            raise DataError(f"{path}: dtype {dtype}, where real floats or integers are wanted")
        if len(shape) not in ndims or min(shape) < 1:
            raise DataError(f"{path}: shape {shape}, where {wants} is wanted")
        count = math.prod(shape)
        wanted = count * dtype.itemsize
        present = os.fstat(file.fileno()).st_size - file.tell()
        if present != wanted:
            state = "truncated" if present < wanted else "something follows the array"
            raise DataError(f"{path}: {state}: {present} bytes of data, where {shape} {dtype} has {wanted}")
        flat = np.fromfile(file, dtype=dtype, count=count)
    return flat.reshape(shape, order="F" if fortran else "C")


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


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under `path` only when the block ends well.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and the file is renamed.
    An exception in the block removes it and leaves whatever was at `path` as it was.

    Raises
    ------
    DataError
        If the folder is missing or the path cannot be written.
    """
    # A link is written through, as open() would; the replaced file is the one it points at.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "is a folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(0, "the file there is read-only")
        if not target.parent.is_dir():
            raise FileNotFoundError(0, f"there is no folder {str(target.parent)!r}")
        file = temporary.open("xb")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        finally:
            file.close()
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
        raise


def check_writable(path: str | os.PathLike[str], endings: Sequence[str] = ()) -> None:
    """Raise if `path` cannot be written: asked before long work whose result goes there.

    Writes and removes an empty temporary file beside it; `path` itself is not touched.

    Parameters
    ----------
    path : path
        The file that will be written.
    endings : sequence of str, optional
        What its name may end in, like ``(".csv", ".npy")``; anything by default.

    Raises
    ------
    ArgumentError
        If it ends in something else.
    DataError
        If it cannot be written.
    """
    if endings:
        check_ending(path, endings)
    with suppress(_Tried), writing(path):
        raise _Tried


def check_ending(path: str | os.PathLike[str], known: Sequence[str]) -> str:
    """Return the ending of a file name in lower case if it is one of `known`, or raise `ArgumentError`."""
    ending = Path(path).suffix.lower()
    if ending not in known:
        wanted = " or ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
        raise ArgumentError("path", repr(os.fspath(path)), f"a file name that ends in {wanted}")
    return ending


class _Tried(Exception):
    """Leaves a `writing` block without writing."""


# --------------------------------------------------------------------------------------- pictures


@overload
def load_images(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] | None = 64,
    *,
    mode: str = "auto",
    labels: Literal[False] = False,
) -> npt.NDArray[np.uint8]: ...


@overload
def load_images(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] | None = 64,
    *,
    mode: str = "auto",
    labels: Literal[True],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str]]: ...


def load_images(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] | None = 64,
    *,
    mode: str = "auto",
    labels: bool = False,
) -> Any:
    """Read a folder of pictures, all brought to one size, in the order of their names.

    A picture is turned upright (EXIF), laid on white where it is transparent, brought to 8 bits, and resized (bicubic)
    such that it just covers `size`; what sticks out is cut off on both sides alike. A picture of the right size keeps
    its values. Colour profiles are not applied. Hidden files are left out, files whose names do not end like those
    of pictures too, which is logged, and so is how many pictures are enlarged.

    Parameters
    ----------
    folder : path
        A folder of PNG, JPEG, WebP, BMP, GIF, TIFF, PPM or PGM files. Or an .npy file with one array of bytes (uint8),
        (N, H, W) or (N, H, W, C), whose pictures are treated alike.
    size : int, pair of int or None, optional
        Height and width; one number for a square. None: as they are, all of one size.
    mode : {"auto", "gray", "rgb"}, optional
        "auto" gives gray where all files are stored as gray (1, 8 or 16 bits, a palette of
        grays), else colour.
    labels : bool, optional
        Whether `folder` holds one folder of pictures for each class.

    Returns
    -------
    images : ndarray
        (N, H, W, C) uint8, C = 1 or 3. Files are ordered by the code points of their names, on every platform.
    labels : ndarray
        (N,) int64, with ``labels=True`` only: the class of each picture, a number from 0.
    names : list of str
        With ``labels=True`` only: the name of each class, in the same order as files.

    Raises
    ------
    DataError
        No folder, no pictures, or pictures that cannot be used, each named (up to ten): damaged or foreign files,
        animations, more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, values of no known range (32 bits). Or sizes that
        differ while `size` is None.
    BackendError
        Pillow is missing.
    """
    path = Path(folder)
    wanted = _check_size(size)
    check_choice("mode", mode, ("auto", "gray", "rgb"))
    check_pillow()
    if path.suffix.lower() == ".npy" and not path.is_dir():
        if labels:
            raise ArgumentError("labels", "True for an .npy file", "a folder with one folder for each class")
        return _from_npy(path, wanted, mode)
    files, folders = _listed(path)
    if not labels:
        if folders:
            _log.warning("%s: left out, as folders (labels=True reads them as classes): %s", path, _some(folders))
        return _stacked(_decoded(path, files, wanted, mode), len(files))
    if files or not folders:
        state = f"of no class: {_some(files)}" if files else "no folders"
        raise DataError(f"{path}: {state}; with labels=True there is one folder for each class, and no other picture")
    classes = [_listed(sub)[0] for sub in folders]
    if empty := [sub for sub, members in zip(folders, classes, strict=True) if not members]:
        raise DataError(f"{path}: classes without pictures: {_some(empty)}")
    files = [file for members in classes for file in members]
    numbers = np.repeat(np.arange(len(classes), dtype=np.int64), [len(members) for members in classes])
    return _stacked(_decoded(path, files, wanted, mode), len(files)), numbers, [sub.name for sub in folders]


def tiles(
    pictures: str | os.PathLike[str] | Sequence[npt.ArrayLike],
    size: int | tuple[int, int] = 64,
    count: int = 1024,
    *,
    seed: int = 0,
    short: int | None = None,
    mode: str = "auto",
    first_sample: int = 0,
) -> npt.NDArray[np.uint8]:
    """Cut tiles out of a few large pictures, at random places: many training pictures from a handful.

    Tile k is row k of stream DATA at step 1 of the noise law: of its words, ``(w0 P) >> 32`` is the picture (all P
    are as likely, whatever their sizes), ``(w1 (H - h + 1)) >> 32`` the top row, ``(w2 (W - w + 1)) >> 32`` the left
    column.

    Parameters
    ----------
    pictures : path or sequence of array_like
        A folder (see `load_images`), or uint8 arrays (H, W), (H, W, 1) or (H, W, 3) of any sizes. All of them are in
        memory at once.
    size : int or pair of int, optional
        Height and width of a tile, h and w.
    count : int, optional
        Number of tiles.
    seed : int, optional
        Tile k of a seed is the same whatever `count` is.
    short : int, optional
        Scale every picture first, such that its shorter side has so many pixels: a small tile of a photograph shows
        hardly more than a texture. None: as they are.
    mode : {"auto", "gray", "rgb"}, optional
        As for `load_images`.
    first_sample : int, optional
        Index of the first tile.

    Returns
    -------
    ndarray
        (count, h, w, C) uint8, C = 1 or 3.

    Raises
    ------
    ArgumentError
        A picture is smaller than a tile.
    DataError
        As of `load_images`.
    """
    wanted = _check_size(size)
    if wanted is None:
        raise ArgumentError("size", "None", "the height and width of a tile")
    height, width = wanted
    count, seed = check_int("count", count, low=0), check_seed(seed)
    first_sample = check_rows(first_sample, count)
    short = None if short is None else check_int("short", short, low=1, high=_LARGEST)
    check_choice("mode", mode, ("auto", "gray", "rgb"))
    check_pillow()
    if isinstance(pictures, (str, os.PathLike)):
        files, _ = _listed(Path(pictures))
        whole = list(_decoded(Path(pictures), files, None, mode))
    else:
        arrays = [(f"pictures[{i}]", _check_picture(f"pictures[{i}]", one)) for i, one in enumerate(pictures)]
        gray = _wants_gray(mode, all(one.shape[2] == 1 for _, one in arrays))
        whole = [(name, _pixels(to_pillow(one), None, gray)) for name, one in arrays]
    if not whole:
        raise ArgumentError("pictures", "none", "at least one picture")
    if short is not None:
        whole = [(name, _shortened(one, short)) for name, one in whole]
    for name, one in whole:
        if one.shape[0] < height or one.shape[1] < width:
            raise ArgumentError("size", str((height, width)), f"tiles that fit into {name}, {one.shape[:2]}")

    words = philox_words(count, 1, seed=seed, stream=Stream.DATA, step=1, first_sample=first_sample)[:, 0]
    out = np.empty((count, height, width, whole[0][1].shape[2]), np.uint8)
    for tile, (w0, w1, w2, _) in zip(out, words.tolist(), strict=True):
        one = whole[w0 * len(whole) >> 32][1]
        top = w1 * (one.shape[0] - height + 1) >> 32
        left = w2 * (one.shape[1] - width + 1) >> 32
        tile[...] = one[top : top + height, left : left + width]
    return out


def save_images(
    images: npt.ArrayLike,
    folder: str | os.PathLike[str],
    *,
    data_range: tuple[float, float] = (0, 255),
    first: int = 0,
    overwrite: bool = False,
) -> list[Path]:
    """Write pictures as 0000.png, 0001.png, ...; `load_images` with ``size=None`` reads the same bytes back.

    Parameters
    ----------
    images : array_like
        (N, H, W, C) real numbers, C = 1 or 3.
    folder : path
        Made where it is missing.
    data_range : pair of float, optional
        The values of black and white (`as_uint8`).
    first : int, optional
        Number of the first file.
    overwrite : bool, optional
        Whether files of these names may be replaced. Each appears whole or not at all.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    DataError
        A file of one of these names is there (nothing is written then), or they cannot be written.
    """
    pixels = as_uint8(images, data_range=data_range)
    files = picture_files(folder, len(pixels), first=first, overwrite=overwrite)
    for one, path in zip(pixels, files, strict=True):
        with writing(path) as file:
            to_pillow(one).save(file, format="PNG")
    return files


def picture_files(folder: str | os.PathLike[str], n: int, *, first: int = 0, overwrite: bool = False) -> list[Path]:
    """Return the files that `save_images` will write, or raise as it would: asked before long work.

    The folder is made; see `save_images` for the arguments.
    """
    check_pillow()
    first, path = check_int("first", first, low=0), Path(folder)
    digits = max(4, len(str(first + n - 1)))
    files = [path / f"{k:0{digits}}.png" for k in range(first, first + n)]
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be made as a folder: {error.strerror or error}") from error
    if not overwrite and (there := [file for file in files if file.exists()]):
        raise DataError(f"{path}: not overwritten: {_some(there)}")
    for file in files[:1]:
        check_writable(file)
    return files


def as_uint8(
    images: npt.ArrayLike, *, data_range: tuple[float, float] = (0, 255), argument: str = "images"
) -> npt.NDArray[np.uint8]:
    """Return pictures as bytes: `data_range` becomes 0 .. 255, rounded, and what is outside is clipped.

    Parameters
    ----------
    images : array_like
        (N, H, W, C) real numbers, C = 1 or 3.
    data_range : pair of float, optional
        The values of black and white, (0, 255) as `load_images` gives them.
    argument : str, optional
        Name of `images` for the message.
    """
    array = check_array(argument, images, shape=(None, None, None, None))
    if array.shape[3] not in (1, 3) or 0 in array.shape[1:3]:
        raise ArgumentError(argument, f"shape {array.shape}", "shape (N, H, W, C) with C = 1 (gray) or 3 (RGB)")
    try:
        low, high = (check_float("data_range", end) for end in data_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high:
        raise ArgumentError("data_range", repr(data_range), "a pair of numbers (low, high), low below high")
    if array.dtype == np.uint8 and (low, high) == (0, 255):
        return array
    with np.errstate(over="ignore"):
        scaled = (array.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)


def check_pillow() -> None:
    """Raise `BackendError` if Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise BackendError(f'pictures need Pillow: pip install "fastdiff-engine[plot]" ({error})') from error


def to_pillow(pixels: npt.NDArray[np.uint8]) -> Any:
    """Return bytes (H, W, C), C = 1 or 3, as a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _check_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise ArgumentError("size", repr(size), "an integer, a pair (height, width) or None")
    height, width = (check_int("size", side, low=1, high=_LARGEST) for side in sides)
    return height, width


def _check_picture(argument: str, value: Any) -> npt.NDArray[np.uint8]:
    """Return an array of bytes (H, W), (H, W, 1) or (H, W, 3) with its channel axis."""
    array = check_array(argument, value)
    if array.dtype != np.uint8:
        raise ArgumentError(argument, f"dtype {array.dtype}", "bytes (uint8)")
    whole = array[:, :, None] if array.ndim == 2 else array
    if whole.ndim != 3 or whole.shape[2] not in (1, 3) or not whole.size:
        raise ArgumentError(argument, f"shape {array.shape}", "(H, W), (H, W, 1) or (H, W, 3)")
    return whole


def _some(files: Sequence[Path | str]) -> str:
    more = len(files) - _NAMED
    names = [file if isinstance(file, str) else file.name for file in files[:_NAMED]]
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures and the folders in a folder, each in the order of their names."""
    pictures: list[Path] = []
    folders: list[Path] = []
    others: list[Path] = []
    try:
        # One name may be composed on one platform and decomposed on another.
        for entry in sorted(folder.iterdir(), key=lambda entry: (unicodedata.normalize("NFC", entry.name), entry.name)):
            if not entry.name.startswith("."):
                known = entry.suffix.lower() in PICTURE_ENDINGS
                (folders if entry.is_dir() else pictures if known else others).append(entry)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if others:
        _log.warning("%s: left out, as their names do not end like those of pictures: %s", folder, _some(others))
    return pictures, folders


def _wants_gray(mode: str, all_gray: bool) -> bool:
    return mode == "gray" or (mode == "auto" and all_gray)


def _from_npy(path: Path, size: tuple[int, int] | None, mode: str) -> npt.NDArray[np.uint8]:
    wants = "(pictures, height, width) or (pictures, height, width, 1 or 3)"
    try:
        array = _load_npy(path, (3, 4), wants)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if array.dtype != np.uint8:
        raise DataError(f"{path}: dtype {array.dtype}, where uint8 is wanted")
    if array.ndim == 3:
        array = array[..., None]
    if array.shape[3] not in (1, 3):
        raise DataError(f"{path}: shape {array.shape}, where {wants} is wanted")
    gray = _wants_gray(mode, array.shape[3] == 1)
    return _stacked(((str(path), _pixels(to_pillow(one), size, gray)) for one in array), len(array))


def _stacked(pictures: Iterable[tuple[str, npt.NDArray[np.uint8]]], count: int) -> npt.NDArray[np.uint8]:
    """Named pictures as one array; at most `count` come."""
    images: npt.NDArray[np.uint8] | None = None
    for i, (name, pixels) in enumerate(pictures):
        if images is None:
            first, images = name, np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            (height, width), (h, w) = pixels.shape[:2], images.shape[1:3]
            raise DataError(
                f"{name}: {height} x {width} pixels (height x width), where {first} has {h} x {w}; "
                "give the size that all of them are to have"
            )
        images[i] = pixels
    assert images is not None
    return images


def _decoded(
    folder: Path, files: Sequence[Path], size: tuple[int, int] | None, mode: str
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Decode the pictures of a folder, a few at a time; those that cannot be used raise in the end, together."""
    from concurrent.futures import ThreadPoolExecutor

    if not files:
        raise DataError(f"{folder}: no pictures ({', '.join(PICTURE_ENDINGS)})")
    gray = _wants_gray(mode, mode == "auto" and all(map(_stored_gray, files)))

    def decode(file: Path) -> npt.NDArray[np.uint8] | str:
        try:
            with _opened(file) as image:
                if size is not None and min(image.size) < min(size):
                    small.append(file)
                return _pixels(image, size, gray)
        except DataError as error:
            return str(error)

    bad: list[str] = []
    small: list[Path] = []
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for file, pixels in zip(files, pool.map(decode, files), strict=True):
            name = str(file.relative_to(folder))
            if isinstance(pixels, str):
                bad.append(f"{name} ({pixels})")
            else:
                yield name, pixels
    finally:
        pool.shutdown(cancel_futures=True)
    if bad:
        raise DataError(f"{folder}: {len(bad)} of {len(files)} pictures cannot be used: {_some(bad)}")
    if small:
        _log.warning("%s: %d of %d pictures are smaller than wanted: enlarged", folder, len(small), len(files))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open one still picture, its pixels not read yet; a `DataError` without its name says what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=_PICTURE_FORMATS) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise DataError(f"{image.height} x {image.width} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {most}")
            # An MPO is a JPEG with further views, as some cameras write it; the first is the picture.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise DataError(f"{image.n_frames} pictures in one file")
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise DataError(f"mode {image.mode}: values of no known range")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("not a picture") from None
    except OSError as error:
        raise DataError(error.strerror or str(error)) from error
    except Exception as error:  # Pillow raises whatever a damaged file brings about
        raise DataError(f"{type(error).__name__}: {error}") from error


def _stored_gray(file: Path) -> bool:
    """Whether a picture has no colours; True for what cannot be read, which is reported when it is decoded."""
    try:
        with _opened(file) as image:
            if image.mode == "P":
                palette = np.reshape(image.getpalette(), (-1, 3))
                return bool((palette == palette[:, :1]).all())
            return image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    except DataError:
        return True


def _pixels(image: Any, size: tuple[int, int] | None, gray: bool) -> npt.NDArray[np.uint8]:
    """Decode a picture: upright, opaque, 8 bits, of the wanted size; (H, W, 1) or (H, W, 3)."""
    from PIL import Image, ImageOps

    if size is not None:
        image.draft(None, (3 * max(size), 3 * max(size)))  # a large JPEG is decoded at a fraction of its size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if gray else "RGB")
    if size is not None:
        height, width = size
        w, h = image.width, image.height
        if w * height > h * width:
            w = h * width / height
        else:
            h = w * height / width
        left, top = (image.width - w) / 2, (image.height - h) / 2
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    return np.asarray(image).reshape(image.height, image.width, -1)


def _shortened(pixels: npt.NDArray[np.uint8], short: int) -> npt.NDArray[np.uint8]:
    height, width = (max(1, round(side * short / min(pixels.shape[:2]))) for side in pixels.shape[:2])
    return _pixels(to_pillow(pixels), (height, width), pixels.shape[2] == 1)


# --------------------------------------------------------------------------------------- compared


def energy_distance(X: npt.ArrayLike, Y: npt.ArrayLike) -> float:
    """Energy distance of two samples: 0 for equal distributions and positive for any others.

    ``2 E|x - y| - E|x - x'| - E|y - y'|`` with Euclidean norms (Szekely and Rizzo 2013, there E or D^2; no
    square root). The V-statistic: the means run over all pairs, each point with itself included. So it is
    never negative, and two samples of one distribution lie a little above 0, by about
    ``E|x - x'| (1/N + 1/M)``: compare with the distance of two samples that are known to be alike.

    Parameters
    ----------
    X : array_like
        (N, d) real numbers, N at least 1.
    Y : array_like
        (M, d) real numbers, M at least 1.

    Returns
    -------
    float
        In the unit of the data. Takes O((N + M)^2 d) time and O(N + M) memory.
    """
    from scipy.spatial.distance import cdist

    x = check_array("X", X, shape=(None, None), dtype=np.float64)
    y = check_array("Y", Y, shape=(None, x.shape[1]), dtype=np.float64)
    for name, sample in (("X", x), ("Y", y)):
        if not len(sample):
            raise ArgumentError(name, "no rows", "at least one")

    def mean_distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        total = sum(float(cdist(a[i : i + 256], b).sum()) for i in range(0, len(a), 256))
        return total / (len(a) * len(b))

    return max(0.0, 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y))
