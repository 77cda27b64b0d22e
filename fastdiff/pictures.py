"""Pictures: read from folders and arrays, cut into tiles, written.

A set of pictures is one array (N, H, W, C) of bytes, C = 1 (gray) or 3 (red, green, blue); on disk it is a folder of
picture files. Whatever is wrong with a file is a :class:`~fastdiff.errors.DataError` that names it.

Pillow is imported inside the functions that read or write pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from fastdiff.errors import (
    ArgumentError,
    BackendError,
    DataError,
    check_array,
    check_choice,
    check_flags,
    check_float,
    check_int,
    check_room,
    check_seed,
    check_several,
    shown,
)
from fastdiff.files import check_path, check_writable, load_npy, naming, reading, writing, writing_together
from fastdiff.noise import Draw, Stream, check_rows, philox_words
from fastdiff.progress import bar

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow's names of those formats. It reads many more, some with programs of their own; no file is handed to these.
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = ("auto", "gray", "rgb")
_NAMED = 10  # files that one message names
MOST_FILES = 1_000_000  # that are written at once
_LARGEST = 1 << 14  # pixels on a side that can be asked for
_LOOKED_AT = 4096  # pictures of a cache, for their range
_AHEAD = 64  # files that are decoded before they are wanted

_log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------- read


@overload
def load_images(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] | None = 64,
    *,
    mode: str = "auto",
    labels: Literal[False] = False,
    data_range: tuple[float, float] | None = None,
    skip_bad: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> npt.NDArray[np.uint8]: ...


@overload
def load_images(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] | None = 64,
    *,
    mode: str = "auto",
    labels: Literal[True],
    data_range: tuple[float, float] | None = None,
    skip_bad: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str]]: ...


def load_images(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] | None = 64,
    *,
    mode: str = "auto",
    labels: bool = False,
    data_range: tuple[float, float] | None = None,
    skip_bad: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Any:
    """Read a folder of pictures, all brought to one size, in the order of their names.

    A picture is turned upright (EXIF), laid on white where it is transparent, brought to 8 bits, and resized (bicubic)
    such that it just covers `size`; what sticks out is cut off on both sides alike. A picture of the right size keeps
    its values. Colour profiles are not applied. Hidden files are left out. What else is left out is logged, with how
    many there are: files whose names do not end like those of pictures, folders where there are no labels, classes
    without pictures; and so is how many pictures are enlarged, and pictures that use less than an eighth of the range.

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
        Whether `folder` holds one folder of pictures for each class, with whatever folders there are in it.
    data_range : pair of float, optional
        The values in the files that become 0 and 255, as (0, 4095) for 12 bits in files of 16; what is outside is an
        error. By default all that a file can hold: 0 and 255, or 0 and 65535.
    skip_bad : bool, optional
        Leave pictures out that cannot be used, and log which, instead of an error.
    cache : path, optional
        A folder, made where it is missing, for pictures that do not fit into memory: they are written to a file in it,
        a few at a time, and memory-mapped. A later call with the same files and arguments finds them there. Files of
        other calls stay.
    progress : bool, optional
        Show a progress bar.

    Returns
    -------
    images : ndarray
        (N, H, W, C) uint8, C = 1 or 3; with `cache` a memory map that cannot be written to. Files are ordered by the
        code points of their names, on every platform.
    labels : ndarray
        (N,) int64, with ``labels=True`` only: the class of each picture, a number from 0.
    names : list of str
        With ``labels=True`` only: the name of each class, in the same order as files.

    Raises
    ------
    ArgumentError
        No `cache`, where the pictures take more than the machine's memory.
    DataError
        No folder, no pictures, or pictures that cannot be used (see `skip_bad`), each named, up to ten: damaged or
        foreign files, animations, more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, values of no known range (32 bits),
        or outside of `data_range`. Or sizes that differ while `size` is None.
    BackendError
        Pillow is missing.

    Examples
    --------
    >>> fd.data.load_images("pictures", size=32).shape
    (4, 32, 32, 3)
    >>> fd.data.load_images("pictures", size=(20, 18), mode="gray").shape
    (4, 20, 18, 1)
    """
    path = check_path("folder", folder)
    wanted = _check_size(size)
    check_choice("mode", mode, _MODES)
    check_flags(labels=labels, skip_bad=skip_bad, progress=progress)
    between = None if data_range is None else _check_range(data_range)
    check_pillow()
    if path.suffix.lower() == ".npy" and not path.is_dir():
        if labels:
            raise ArgumentError("labels", "True for an .npy file", "a folder with one folder for each class")
        if cache is not None:
            raise ArgumentError("cache", shown(cache), "None for an .npy file: numpy.load(path, mmap_mode='r') maps it")
        return _from_npy(path, wanted, mode, between)
    files, folders, others = _listed(path)
    if labels and (files or not folders):
        state = f"of no class: {_some(files)}" if files else "no folders"
        raise DataError(f"{path}: {state}; with labels=True there is one folder for each class, and no other picture")
    trees = [_tree(sub) for sub in folders]
    classes = [(sub, members) for sub, (members, _) in zip(folders, trees, strict=True) if members]
    names = [sub.name for sub, _ in classes]
    if labels:
        others += [file for _, more in trees for file in more]
        files = [file for _, members in classes for file in members]
        if empty := [sub for sub in folders if sub.name not in names]:
            _log.warning("%s: left out %d classes without pictures: %s", path, len(empty), _some(empty))
    elif folders:
        inside, hint = sum(len(members) for _, members in classes), "as folders (labels=True reads them as classes)"
        _log.warning("%s: %d pictures left out, %s: %s", path, inside, hint, _some(folders))
    if others:
        what = "left out, as their names do not end like those of pictures"
        _log.warning("%s: %d files %s: %s", path, len(others), what, _some([_within(path, file) for file in others]))
    kept: list[Path] = []
    come = _decoded(path, files, wanted, mode, between, kept if skip_bad else None)
    if progress:
        come = _counted(come, len(files))
    if cache is None:
        images = _stacked(come, len(files))
    else:
        place = _place(check_path("cache", cache), path, files, (wanted, mode, between, skip_bad))
        images, kept = _cached(come, place, files, kept if skip_bad else None)
    _say_range(path, images if cache is None else images[:: 1 + len(images) // _LOOKED_AT])
    if not labels:
        return images
    left = set(kept) if skip_bad else set(files)
    counts = [sum(file in left for file in members) for _, members in classes]
    if lost := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise DataError(f"{path}: classes of which no picture can be used: {_some(lost)}")
    return images, np.repeat(np.arange(len(classes), dtype=np.int64), counts), names


def _check_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise ArgumentError("size", shown(size), "an integer, a pair (height, width) or None")
    height, width = (check_int("size", side, low=1, high=_LARGEST) for side in sides)
    return height, width


def _check_range(data_range: Any) -> tuple[float, float]:
    wants = "a pair of numbers (low, high), low below high"
    if not isinstance(data_range, (tuple, list)) or len(data_range) != 2:
        raise ArgumentError("data_range", shown(data_range), wants)
    low, high = (check_float("data_range", end) for end in data_range)
    if not low < high:
        raise ArgumentError("data_range", shown(data_range), wants)
    return low, high


def _say_range(path: Path, images: npt.NDArray[np.uint8]) -> None:
    low, high = int(images.min()), int(images.max())
    if 8 * (high - low) < 255:
        words = "%s: values from %d to %d of 0 to 255, less than an eighth of the range; data_range=(low, high) "
        hint = "(--data-range LOW,HIGH) says what is black and white in the files, as (0, 4095) for 12 bits in 16"
        _log.warning(words + hint, path, low, high)


def _within(folder: Path, file: Path) -> str:
    return str(file.relative_to(folder))


def _tree(folder: Path, above: tuple[Path, ...] = ()) -> tuple[list[Path], list[Path]]:
    """The pictures and the other files of a folder and of those in it; its own before theirs."""
    pictures, folders, others = _listed(folder)
    above = (*above, folder.resolve())
    for sub in folders:
        if sub.resolve() not in above:  # a link that leads back
            more, rest = _tree(sub, above)
            pictures, others = pictures + more, others + rest
    return pictures, others


def _listed(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The pictures, the folders and the other files in a folder, each in the order of their names."""
    pictures: list[Path] = []
    folders: list[Path] = []
    others: list[Path] = []
    with naming(folder, "cannot be read"):
        # One name may be composed on one platform and decomposed on another.
        for entry in sorted(folder.iterdir(), key=lambda entry: (unicodedata.normalize("NFC", entry.name), entry.name)):
            if not entry.name.startswith("."):
                known = entry.suffix.lower() in PICTURE_ENDINGS
                (folders if entry.is_dir() else pictures if known else others).append(entry)
    return pictures, folders, others


def _some(files: Sequence[Path | str]) -> str:
    more = len(files) - _NAMED
    names = [file if isinstance(file, str) else file.name for file in files[:_NAMED]]
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def _from_npy(
    path: Path, size: tuple[int, int] | None, mode: str, data_range: tuple[float, float] | None
) -> npt.NDArray[np.uint8]:
    wants = "(pictures, height, width) or (pictures, height, width, 1 or 3)"
    with naming(path, "cannot be read"):
        array = load_npy(path, (3, 4), wants)
    if data_range is not None:
        try:
            array = _as_bytes(array, data_range)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    if array.dtype != np.uint8:
        raise DataError(f"{path}: dtype {array.dtype}, where uint8 is wanted, or a data_range")
    if array.ndim == 3:
        array = array[..., None]
    if array.shape[3] not in (1, 3):
        raise DataError(f"{path}: shape {array.shape}, where {wants} is wanted")
    gray = _wants_gray(mode, array.shape[3] == 1)
    images = _stacked(((str(path), _pixels(to_pillow(one), size, gray)) for one in array), len(array))
    _say_range(path, images)
    return images


Named = Iterator[tuple[str, npt.NDArray[np.uint8]]]  # pictures, and the names of their files


def _counted(pictures: Named, count: int) -> Named:
    with bar(show=True, total=count, desc="pictures") as shown:
        for one in pictures:
            yield one
            shown.update()


def _alike(pictures: Named) -> Iterator[npt.NDArray[np.uint8]]:
    """Named pictures, all of one size."""
    first: tuple[str, tuple[int, ...]] | None = None
    for name, pixels in pictures:
        first = first or (name, pixels.shape)
        if pixels.shape != first[1]:
            (height, width), (h, w) = pixels.shape[:2], first[1][:2]
            raise DataError(
                f"{name}: {height} x {width} pixels (height x width), where {first[0]} has {h} x {w}; "
                "give the size that all of them are to have"
            )
        yield pixels


def _stacked(pictures: Named, count: int) -> npt.NDArray[np.uint8]:
    """Named pictures as one array; at most `count` come."""
    images: npt.NDArray[np.uint8] | None = None
    for i, pixels in enumerate(_alike(pictures)):
        if images is None:
            wanted, memory = count * pixels.size, _memory()
            if wanted > memory:
                wants = f"a folder: {count} pictures take {wanted / 1e9:.3g} GB, where there are {memory / 1e9:.3g}"
                raise ArgumentError("cache", "None", wants)
            images = np.empty((count, *pixels.shape), np.uint8)
        images[i] = pixels
    assert images is not None
    return images[: i + 1]


def _memory() -> float:
    """Bytes of memory of this machine, as far as it says."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def _place(cache: Path, folder: Path, files: Sequence[Path], how: tuple[Any, ...]) -> Path:
    """The file of a cache for these files, as they are now, read in this way."""
    import PIL

    with naming(cache, "cannot be made as a folder"):
        cache.mkdir(exist_ok=True)
    with naming(folder, "cannot be read"):
        stats = [(file, os.stat(file)) for file in files]
    known = [(_within(folder, file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    key = hashlib.sha256(json.dumps([PIL.__version__, how, known]).encode()).hexdigest()[:24]
    return cache / f"{key}.npy"


def _cached(
    pictures: Named, place: Path, files: Sequence[Path], kept: list[Path] | None
) -> tuple[npt.NDArray[np.uint8], list[Path]]:
    """Named pictures memory-mapped from a file, which they are written to first if it is not there; and which came.

    Which ones have been kept, where some may be bad, is in a second file.
    """
    beside = place.with_name(f"{place.stem}-kept.npy")
    if place.exists() and beside.exists():
        _log.info("%d pictures as they are in %s", len(files), place)
    else:
        with writing_together([beside, place]) as (marks, rows):
            count = 0
            for count, pixels in enumerate(_alike(pictures), 1):
                if count == 1:
                    shape = pixels.shape
                    start = _header(rows, (len(files), *shape))
                rows.write(pixels.tobytes())
            rows.seek(0)
            if _header(rows, (count, *shape)) != start:  # it has room for any number
                raise DataError(f"{place}: the header of an .npy file of {count} pictures is not as long as expected")
            left = set(files if kept is None else kept)
            np.lib.format.write_array(marks, np.array([file in left for file in files], np.uint8))
    try:
        images, marked = np.load(place, mmap_mode="r", allow_pickle=False), np.load(beside, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({error}): remove it, and the pictures are read again") from error
    return images, [file for file, mark in zip(files, marked.tolist(), strict=True) if mark]


def _header(file: Any, shape: tuple[int, ...]) -> int:
    """Write the header of bytes of a shape; return where the data begin."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return int(file.tell())


def _decoded(
    folder: Path,
    files: Sequence[Path],
    size: tuple[int, int] | None,
    mode: str,
    data_range: tuple[float, float] | None = None,
    kept: list[Path] | None = None,
) -> Named:
    """Decode the pictures of a folder, a few at a time; those that cannot be used raise in the end, together.

    With `kept`, a list that gets the others, they are logged.
    """
    from concurrent.futures import ThreadPoolExecutor

    if not files:
        raise DataError(f"{folder}: no pictures ({', '.join(PICTURE_ENDINGS)})")
    gray = _wants_gray(mode, mode == "auto" and all(map(_stored_gray, files)))
    bad: list[str] = []
    small: list[Path] = []

    def decode(file: Path) -> npt.NDArray[np.uint8] | str:
        try:
            with _opened(file) as image:
                if size is not None and min(image.size) < min(size):
                    small.append(file)
                return _pixels(image, size, gray, data_range)
        except DataError as error:
            return str(error)

    def ahead(some: Sequence[Path]) -> Iterator[tuple[Path, npt.NDArray[np.uint8] | str]]:
        return zip(some, pool.map(decode, some), strict=True)

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for file, pixels in (pair for i in range(0, len(files), _AHEAD) for pair in ahead(files[i : i + _AHEAD])):
            name = str(file.relative_to(folder))
            if isinstance(pixels, str):
                bad.append(f"{name} ({pixels})")
            else:
                if kept is not None:
                    kept.append(file)
                yield name, pixels
    finally:
        pool.shutdown(cancel_futures=True)
    if bad and not kept:
        hint = "skip_bad=True (--skip-bad) leaves out what is bad; " if kept is None and len(bad) < len(files) else ""
        raise DataError(f"{folder}: {hint}{len(bad)} of {len(files)} pictures cannot be used: {_some(bad)}")
    if bad:
        _log.warning("%s: %d of %d pictures left out: %s", folder, len(bad), len(files), "; ".join(bad))
    if small:
        _log.warning("%s: %d of %d pictures are smaller than wanted: enlarged", folder, len(small), len(files))


def _wants_gray(mode: str, all_gray: bool) -> bool:
    return mode == "gray" or (mode == "auto" and all_gray)


def _stored_gray(file: Path) -> bool:
    """Whether a picture has no colours; True for what cannot be read, which is reported when it is decoded."""
    try:
        with _opened(file) as image:
            if image.mode == "P":
                palette = np.reshape(image.getpalette(), (-1, 3))
                return bool((palette == palette[:, :1]).all())
            # Pillow reads gray of 16 bits with an alpha channel as RGBA.
            return image.mode in ("1", "L", "LA") or image.mode.startswith("I") or _stored(image).startswith("LA")
    except DataError:
        return True


def _stored(image: Any) -> str:
    """How Pillow calls the values of a file whose pixels have not been read."""
    how = image.tile[0][3] if image.tile else ""
    return str(how[0] if isinstance(how, tuple) and how else how)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open one still picture, its pixels not read yet; a `DataError` without its name says what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with reading(file) as content, Image.open(content, formats=_PICTURE_FORMATS) as image:
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


def _as_bytes(values: npt.NDArray[Any], data_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Return numbers with `data_range` at 0 .. 255, rounded; a `DataError` without a name where some are outside."""
    low, high = data_range
    if values.size and not (low <= values.min() and values.max() <= high):
        raise DataError(f"values from {values.min()} to {values.max()}, outside of data_range ({low:g}, {high:g})")
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


def _pixels(
    image: Any, size: tuple[int, int] | None, gray: bool, data_range: tuple[float, float] | None = None
) -> npt.NDArray[np.uint8]:
    """Decode a picture: upright, opaque, 8 bits, of the wanted size; (H, W, 1) or (H, W, 3)."""
    from PIL import Image, ImageOps

    if data_range is not None and ";16" in _stored(image) and not image.mode.startswith("I"):
        raise DataError("colour of 16 bits, which is read as 8: no data_range")
    if size is not None:
        image.draft(None, (3 * max(size), 3 * max(size)))  # a large JPEG is decoded at a fraction of its size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        deep = np.asarray(image)
        shallow = ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)
        shallow = shallow if data_range is None else _as_bytes(deep, data_range)
        if isinstance(clear := image.info.get("transparency"), int):
            shallow = np.where(deep == clear, np.uint8(255), shallow)
        image, data_range = Image.fromarray(shallow), None
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if gray else "RGB")
    if data_range is not None:
        image = Image.fromarray(_as_bytes(np.asarray(image), data_range))
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


def load_known(
    path: str | os.PathLike[str], shape: tuple[int, ...], mask: str | os.PathLike[str] | None = None
) -> npt.NDArray[np.float32]:
    """Read a picture of which a part is known.

    Parameters
    ----------
    path : path
        A picture of the size wanted. Its transparent pixels are unknown.
    shape : (height, width, channels)
        What is wanted; 1 channel is gray.
    mask : path, optional
        A picture of the same size: pixels that are nearer to white than to black are unknown, and no others.

    Returns
    -------
    (height, width, channels) float32
        0 .. 255, and NaN where nothing is known.

    Raises
    ------
    DataError
        A file that is no picture, of another size, or without a transparent pixel where there is no mask.
    """
    check_pillow()
    unknown: npt.NDArray[np.bool_] | None = None
    with _sized(Path(path), shape) as image:
        pixels = _pixels(image, None, shape[2] == 1).astype(np.float32)
        if mask is None:
            unknown = np.asarray(image.convert("RGBA"))[..., 3] == 0
    if mask is not None:
        with _sized(Path(mask), shape) as image:
            unknown = _pixels(image, None, gray=True)[..., 0] >= 128
    assert unknown is not None
    if not unknown.any():
        raise DataError(f"{path}: no pixel is unknown: make some transparent, or give a mask that is white there")
    pixels[unknown] = np.nan
    return pixels


@contextmanager
def _sized(file: Path, shape: tuple[int, ...]) -> Iterator[Any]:
    try:
        with _opened(file) as image:
            if (image.height, image.width) != tuple(shape[:2]):
                wants = f"{shape[0]} x {shape[1]}, as the model's are"
                raise DataError(f"{image.height} x {image.width} pixels, where {wants}")
            yield image
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


# --------------------------------------------------------------------------------------- cut


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

    Examples
    --------
    >>> fd.data.tiles("pictures", size=16, count=20).shape  # of four pictures
    (20, 16, 16, 3)
    """
    wanted = _check_size(size)
    if wanted is None:
        raise ArgumentError("size", "None", "the height and width of a tile")
    height, width = wanted
    count, seed = check_int("count", count, low=0), check_seed(seed)
    first_sample = check_rows(first_sample, count)
    short = None if short is None else check_int("short", short, low=1, high=_LARGEST)
    check_choice("mode", mode, _MODES)
    check_pillow()
    if isinstance(pictures, (str, os.PathLike)):
        folder = check_path("pictures", pictures)
        whole = list(_decoded(folder, _listed(folder)[0], None, mode))
    else:
        several = check_several("pictures", pictures, "a folder, or a list of pictures")
        arrays = [(f"pictures[{i}]", _check_picture(f"pictures[{i}]", one)) for i, one in enumerate(several)]
        gray = _wants_gray(mode, all(one.shape[2] == 1 for _, one in arrays))
        whole = [(name, _pixels(to_pillow(one), None, gray)) for name, one in arrays]
    if not whole:
        raise ArgumentError("pictures", "none", "at least one picture")
    if short is not None:
        whole = [(name, _shortened(one, short)) for name, one in whole]
    for name, one in whole:
        if one.shape[0] < height or one.shape[1] < width:
            scaled = "" if short is None else f" with short={short}"
            raise ArgumentError("size", str((height, width)), f"tiles that fit into {name}, {one.shape[:2]}{scaled}")

    check_room("count", (count, 4), np.uint64)
    words = philox_words(count, 1, Draw(seed, Stream.DATA, 1, first_sample))[:, 0]
    out = np.empty((count, height, width, whole[0][1].shape[2]), np.uint8)
    for tile, (w0, w1, w2, _) in zip(out, words.tolist(), strict=True):
        one = whole[w0 * len(whole) >> 32][1]
        top = w1 * (one.shape[0] - height + 1) >> 32
        left = w2 * (one.shape[1] - width + 1) >> 32
        tile[...] = one[top : top + height, left : left + width]
    return out


def _check_picture(argument: str, value: Any) -> npt.NDArray[np.uint8]:
    """Return an array of bytes (H, W), (H, W, 1) or (H, W, 3) with its channel axis."""
    array = check_array(argument, value)
    if array.dtype != np.uint8:
        raise ArgumentError(argument, f"dtype {array.dtype}", "bytes (uint8)")
    whole = array[:, :, None] if array.ndim == 2 else array
    if whole.ndim != 3 or whole.shape[2] not in (1, 3) or not whole.size:
        raise ArgumentError(argument, f"shape {array.shape}", "(H, W), (H, W, 1) or (H, W, 3)")
    return whole


def _shortened(pixels: npt.NDArray[np.uint8], short: int) -> npt.NDArray[np.uint8]:
    height, width = (max(1, round(side * short / min(pixels.shape[:2]))) for side in pixels.shape[:2])
    return _pixels(to_pillow(pixels), (height, width), pixels.shape[2] == 1)


# --------------------------------------------------------------------------------------- written


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

    Examples
    --------
    >>> faces = fd.data.portraits(2, 16)
    >>> [path.name for path in fd.data.save_images(faces, "new")]
    ['0000.png', '0001.png']
    >>> bool((fd.data.load_images("new", size=None) == faces).all())
    True
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

    Examples
    --------
    >>> [path.name for path in fd.data.picture_files("new", 2)]
    ['0000.png', '0001.png']
    """
    check_pillow()
    check_flags(overwrite=overwrite)
    n = check_int("n", n, low=0, high=MOST_FILES)
    first, path = check_int("first", first, low=0), check_path("folder", folder)
    digits = max(4, len(str(first + n - 1)))
    files = [path / f"{k:0{digits}}.png" for k in range(first, first + n)]
    with naming(path, "cannot be made as a folder"):
        path.mkdir(exist_ok=True)
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

    Examples
    --------
    >>> fd.data.as_uint8([[[[-1.0], [0.0], [2.0]]]], data_range=(-1, 1)).ravel().tolist()
    [0, 128, 255]
    """
    array = check_array(argument, images, shape=(None, None, None, None))
    if array.shape[3] not in (1, 3) or 0 in array.shape[1:3]:
        raise ArgumentError(argument, f"shape {array.shape}", "shape (N, H, W, C) with C = 1 (gray) or 3 (RGB)")
    try:
        low, high = (check_float("data_range", end) for end in data_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high:
        raise ArgumentError("data_range", shown(data_range), "a pair of numbers (low, high), low below high")
    if array.dtype == np.uint8 and (low, high) == (0, 255):
        return array
    with np.errstate(over="ignore"):
        scaled = (array.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)


# --------------------------------------------------------------------------------------- Pillow


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
