"""Files: written whole or not at all, and .npy files read without trust.

Whatever is wrong with one is a :class:`~fastdiff.errors.DataError` that names it.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import stat
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, DataError, shown
from fastdiff.signals import delayed

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


_LEFTOVER = re.compile(r"[0-9a-f]{12}\.tmp")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip


def _kind(mode: int) -> str:
    return next((f"{words}, not a file" for known, words in _KINDS if known(mode)), "not a file")


def check_path(argument: str, value: Any) -> Path:
    """Return a path, or raise an `ArgumentError` where it is none: another type, or with characters none can have."""
    wants = "a path: text, bytes or os.PathLike"
    try:
        text = os.fspath(value)
        path = Path(os.fsdecode(text))
        os.fsencode(path)
    except (TypeError, ValueError) as error:  # lone surrogates that are no bytes of a name
        raise ArgumentError(argument, shown(value), wants) from error
    if not text:  # which Path takes for the folder one is in
        raise ArgumentError(argument, shown(value), f"{wants}, and not empty")
    if "\0" in str(path):
        raise ArgumentError(argument, shown(value), f"{wants}, without the character 0")
    return path


@contextmanager
def naming(path: str | os.PathLike[str], failure: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a `DataError`: the path, the failure, the system's reason."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {failure}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------- read


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file to be read; an `OSError` where it is something else, as a pipe, which is not waited for."""
    mode = os.stat(path).st_mode  # to open a device may do something
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is {_kind(mode)}")
    with os.fdopen(os.open(path, _READ), "rb") as file:
        if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, f"is {_kind(mode)}")
        yield file


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
    with reading(path) as file:
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
    """Open a file for writing that appears under `path` only when the block ends well: see `writing_together`.

    Examples
    --------
    >>> with fd.data.writing("new.bin") as file:
    ...     _ = file.write(b"all of it")
    >>> from pathlib import Path
    >>> Path("new.bin").read_bytes()
    b'all of it'
    """
    with writing_together([path]) as files:
        yield files[0]


@contextmanager
def writing_together(paths: Sequence[str | os.PathLike[str]]) -> Iterator[list[IO[bytes]]]:
    """Open files for writing that appear, all of them, when the block ends well.

    The bytes go to temporary files in the same folders and are flushed to the disk; then the files are renamed, one
    process after the other. An exception in the block removes them and leaves whatever was there as it was. The mode
    of a file that is replaced stays. What a process that was killed has left there of the same files is removed: of
    all but the first only at the end, since a process that is killed between two renames leaves there what belongs to
    the first file. So does one whose second rename fails.

    Raises
    ------
    DataError
        If a folder is missing, or a path cannot be written or is something else than a file.
    """
    paths = [check_path("path", path) for path in paths]
    with ExitStack() as removals:
        files: list[tuple[IO[bytes], Path, Path]] = []
        for path in paths:
            with naming(path, "cannot be written"):
                # A link is written through, as open() would; the replaced file is the one it points at.
                target = Path(os.path.realpath(path))
                if not files:
                    _remove_leftovers(target)
                file, temporary = _temporary(target)
                # One that belongs to a first file which has been renamed stays.
                removals.callback(_remove, temporary, files[0][1] if files else temporary)
                removals.callback(file.close)
                files.append((file, temporary, target))
        with naming(paths[0], "cannot be written"):
            yield [file for file, _, _ in files]
        for path, (file, _, _) in zip(paths, files, strict=True):
            with naming(path, "cannot be written"):
                file.flush()
                os.fsync(file.fileno())
                if os.name == "nt":  # renames no open file
                    file.close()
        # Ctrl-C comes after both renames; another process that writes the same files does its own before or after.
        with delayed(), _alone(files[0][2].parent) if len(files) > 1 else nullcontext():
            for path, (_, temporary, target) in zip(paths, files, strict=True):
                with naming(path, "cannot be written"):
                    temporary.replace(target)
            for _, _, target in files[1:]:
                _remove_leftovers(target)


def _temporary(target: Path) -> tuple[IO[bytes], Path]:
    """A new file beside the target, locked, and its name."""
    if not target.parent.is_dir():
        raise FileNotFoundError(0, f"there is no folder {str(target.parent)!r}")
    before = None
    with suppress(FileNotFoundError):
        before = os.stat(target)
        if not stat.S_ISREG(before.st_mode):
            raise OSError(0, f"is {_kind(before.st_mode)}")
        if not os.access(target, os.W_OK):
            raise PermissionError(0, "the file there is read-only")
    while True:
        temporary = target.with_name(f"{_start(target)}{secrets.token_hex(6)}.tmp")
        mode = 0o666 if before is None else stat.S_IMODE(before.st_mode) & 0o777
        file = os.fdopen(os.open(temporary, _CREATE, mode), "wb")
        _lock(file.fileno(), wait=True)
        if temporary.exists():  # nobody has taken it for a leftover before it was locked
            break
        file.close()
    if before is not None and hasattr(os, "fchmod"):
        with suppress(OSError):
            os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
    return file, temporary


def _remove(path: Path, first: Path) -> None:
    """Remove a temporary file, if the first of those written with it is still one."""
    with suppress(OSError):
        if first.exists():
            path.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same folder, where folders can be locked."""
    with ExitStack() as stack:
        with suppress(OSError):  # Windows opens no folder, and some file systems lock none
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _lock(descriptor, wait=True)
        yield


def _start(target: Path) -> str:
    """What the names of a file's temporary files begin with."""
    return f".{target.name[:50]}."  # at most 200 bytes, and a name may have 255


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of a file whose writers are no more: these had a lock on them."""
    start = _start(target)
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if not (name.startswith(start) and _LEFTOVER.fullmatch(name[len(start) :])):
                continue
            with suppress(OSError), reading(left := target.with_name(name)) as file:
                if _lock(file.fileno(), wait=False):
                    left.unlink()


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let one process of this machine at a time into the block, where files can be locked; the file stays, empty."""
    with ExitStack() as last:
        with suppress(OSError):
            file = last.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)))
            _lock(file.fileno(), wait=True)
        yield


def _lock(file: int, *, wait: bool) -> bool:
    """Lock an open file until it is closed; False: somebody else has, or nobody can here."""
    try:
        import fcntl
    except ImportError:  # Windows, where an open file cannot be removed
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


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

    Examples
    --------
    >>> fd.data.check_writable("new.csv", (".csv", ".npy"))
    >>> fd.data.check_writable("new.png", (".csv", ".npy"))
    Traceback (most recent call last):
        ...
    fastdiff.errors.ArgumentError: path: got 'new.png', wants a file name that ends in .csv or .npy
    """
    if endings:
        check_ending(path, endings)
    with suppress(_Tried), writing(path):
        raise _Tried


def check_ending(path: str | os.PathLike[str], known: Sequence[str]) -> str:
    """Return the ending of a file name in lower case if it is one of `known`, or raise `ArgumentError`."""
    ending = check_path("path", path).suffix.lower()
    if ending not in known:
        wanted = " or ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
        raise ArgumentError("path", repr(os.fspath(path)), f"a file name that ends in {wanted}")
    return ending


class _Tried(Exception):
    """Leaves a `writing` block without writing."""
