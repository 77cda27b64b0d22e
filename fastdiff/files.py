"""Files: written whole or not at all, and .npy files read without trust.

Whatever is wrong with one is a :class:`~fastdiff.errors.DataError` that names it.
"""

from __future__ import annotations

import math
import os
import secrets
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, DataError

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


@contextmanager
def naming(path: str | os.PathLike[str], failure: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a `DataError`: the path, the failure, the system's reason."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {failure}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------- read


def load_npy(path: Path, ndims: Sequence[int], wants: str) -> npt.NDArray[Any]:
    """Read an ``.npy`` file of real numbers; an `OSError` is left to the caller.

    Parameters
    ----------
    path : path
        The file.
    ndims : sequence of int
        The numbers of axes that are wanted; each axis has a length of at least 1.
    wants : str
        What is wanted, for the message.

    Raises
    ------
    DataError
        Something else is in it, or it is damaged.
    """
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
        except DataError:  # a ValueError
            raise
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


# --------------------------------------------------------------------------------------- written


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
    # 50 characters are at most 200 bytes, and a name may have 255.
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.tmp")
    with naming(path, "cannot be written"):
        if target.is_dir():
            raise IsADirectoryError(0, "is a folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(0, "the file there is read-only")
        if not target.parent.is_dir():
            raise FileNotFoundError(0, f"there is no folder {str(target.parent)!r}")
        file = temporary.open("xb")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
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
