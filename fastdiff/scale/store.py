"""The Zarr array that answers go to: what made it, which chunks are done, and whether they are what was written.

A chunk is a file or object of its own, written whole or not at all, and after it the mark ``done/NUMBER`` with its
checksum, which readers of Zarr do not look at. Who dies between the two has the chunk drawn again, to the same bits.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, DataError, FastdiffError, shown

KEY = "fastdiff"  # the attribute that says what made an array
MARKS = "done"
FULL = (errno.ENOSPC, errno.EDQUOT)


def _zarr() -> Any:
    try:
        import zarr
    except ImportError:
        raise FastdiffError("fastdiff.scale needs zarr 3: pip install 'fastdiff-engine[scale]'") from None
    if int(zarr.__version__.split(".")[0]) < 3:
        raise FastdiffError(f"fastdiff.scale needs zarr 3, and there is {zarr.__version__}")
    return zarr


def content_hash(value: Any) -> Any:
    """Return a value as JSON can hold it and compare it: an array, in memory or on disk, as a hash of its content."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): content_hash(one) for name, one in sorted(value.items())}
    if isinstance(value, (tuple, list)) and all(isinstance(one, (bool, int, float, str)) for one in value):
        return list(value)
    if isinstance(value, (tuple, list)):
        return [content_hash(one) for one in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        found = hashlib.sha256(f"{np.dtype(value.dtype).str} {tuple(value.shape)} ".encode())
        rows = max(1, (1 << 22) // max(1, int(np.prod(value.shape[1:], dtype=np.int64))))
        for start in range(0, value.shape[0], rows) if value.shape else ():
            found.update(np.ascontiguousarray(np.asarray(value[start : start + rows])).data)
        if not value.shape:
            found.update(np.asarray(value).tobytes())
        return f"sha256:{found.hexdigest()}"
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    parts = getattr(value, "__dict__", None)
    return {"type": type(value).__qualname__, **content_hash(parts)} if parts else shown(value)


class Contents(NamedTuple):
    """What is in a store: see `check`.

    Attributes
    ----------
    facts : dict
        What made it.
    done, total : int
        Chunks.
    damaged : list of int
        Chunks that are marked as done, and are not what was written.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(200, points=12)
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
    >>> fd.scale.sample_to("samples.zarr", model, 50, chunk=20, steps=5, progress=False).shape
    (50, 12)
    >>> found = fd.scale.check("samples.zarr")
    >>> found.facts["kind"], found.facts["seed"], found.done == found.total
    ('samples', 0, True)
    """

    facts: dict[str, Any]
    done: int
    total: int
    damaged: list[int]


def check(store: Any, *, repair: bool = False) -> Contents:
    """Read all of a store, and compare every chunk with the checksum that it was written with.

    Parameters
    ----------
    store : path, URL or zarr store
        Of an array that `fastdiff.scale` has written, or a part of one.
    repair : bool, optional
        Take the marks of damaged chunks away, so that the next call draws these again.

    Returns
    -------
    Contents

    Raises
    ------
    DataError
        There is no such array, or it cannot be read.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(200, points=12)
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
    >>> fd.scale.sample_to("samples.zarr", model, 50, chunk=20, steps=5, progress=False).shape
    (50, 12)
    >>> found = fd.scale.check("samples.zarr")
    >>> found.done, found.total, found.damaged
    (3, 3, [])
    """
    chunks = Chunked.existing(store)
    if chunks is None:
        raise DataError(f"{_name(store)}: there is no array that fastdiff has written")
    damaged, done = [], set(range(chunks.count)) - set(chunks.left())
    for number in sorted(done):
        with naming(chunks.name, "cannot be read"):
            if chunks.mark(number) != _checksum(chunks.read(number)):
                damaged.append(number)
                if repair:
                    chunks.unmark(number)
    return Contents(chunks.facts, len(done), chunks.count, damaged)


def chunk_of(store: Any) -> int | None:
    """Return the `chunk` that an array was begun with, or None where there is none yet.

    Examples
    --------
    >>> fd.scale.chunk_of("nothing-yet.zarr") is None
    True
    """
    chunks = Chunked.existing(store)
    return None if chunks is None else int(chunks.facts["chunk"])


@contextmanager
def naming(name: str, failure: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a `DataError`, where another try is no use: the disk is full, or read-only.

    Others, of a network as a rule, stay what they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DataError(f"{name}: the disk is full ({error.strerror}): make room, and call again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise DataError(f"{name}: {failure}: {error.strerror}") from error
        raise


def _name(store: Any) -> str:
    return os.fspath(store) if isinstance(store, (str, os.PathLike)) else shown(store)


def _checksum(block: npt.NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(block).data.cast("B"))


@dataclass(frozen=True)
class Chunked:
    """An array in chunks along one axis, of which some are done.

    Attributes
    ----------
    store : str or zarr store
        A worker can open it again.
    axis : int
    array : zarr.Array
    """

    store: Any
    axis: int
    array: Any

    @classmethod
    def at(
        cls,
        store: Any,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        axis: int,
        chunk: int,
        facts: dict[str, Any],
        *,
        resume: bool,
    ) -> Chunked:
        """Return the array of these facts, which is made if it is not there.

        Raises
        ------
        ArgumentError
            There is another one.
        DataError
            It cannot be made there.
        """
        facts = {**facts, "axis": axis, "chunk": chunk, "shape": list(shape), "dtype": np.dtype(dtype).str}
        found = cls.existing(store)
        if found is None:
            zarr, chunks = _zarr(), list(shape)
            chunks[axis] = min(chunk, shape[axis])
            place = os.path.abspath(store) if _is_folder(store) else store
            with naming(_name(store), "cannot be written"):
                try:
                    zarr.create_array(
                        place, shape=shape, chunks=tuple(chunks), dtype=np.dtype(dtype), compressors=None, filters=None,
                        attributes={KEY: facts}, fill_value=0, config={"write_empty_chunks": True},
                    )  # fmt: skip
                except (TypeError, ValueError, ImportError) as error:
                    raise ArgumentError("store", _name(store), f"a folder, a URL or a zarr store: {error}") from error
            found = cls.existing(store)
            assert found is not None
            return found
        if not resume:
            raise ArgumentError("store", f"{found.name}, which is there", "a new one, or resume=True to go on with it")
        if different := _differences(found.facts, json.loads(json.dumps(facts))):
            got = f"{found.name}, which was made otherwise: {'; '.join(different)}"
            raise ArgumentError("store", got, "the same arguments to go on with it, or a new store")
        return found

    @classmethod
    def existing(cls, store: Any) -> Chunked | None:
        """Return the array that is there, if any.

        Raises
        ------
        ArgumentError
            Something else is there.
        """
        zarr, place = _zarr(), os.path.abspath(store) if _is_folder(store) else store
        if isinstance(place, str) and os.path.isfile(place):
            raise ArgumentError("store", f"{place}, which is a file", "a folder, a URL or a zarr store")
        with naming(_name(store), "cannot be read"):
            try:
                array = zarr.open_array(place, mode="r+", config={"write_empty_chunks": True})
            except FileNotFoundError:
                if isinstance(place, str) and os.path.isdir(place) and os.listdir(place):
                    raise ArgumentError("store", f"{place}, a folder of other things", "a new folder") from None
                return None
            except (KeyError, TypeError, ValueError) as error:
                raise ArgumentError("store", f"{_name(store)}: {error}", "a folder, a URL or a zarr store") from error
        facts = array.attrs.get(KEY)
        if not isinstance(facts, dict) or not isinstance(facts.get("axis"), int):
            raise ArgumentError("store", f"{_name(store)}, an array that fastdiff has not written", "a new store")
        return cls(place, facts["axis"], array)

    @property
    def name(self) -> str:
        return _name(self.store)

    @property
    def facts(self) -> dict[str, Any]:
        """What made the array."""
        return dict(self.array.attrs[KEY])

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return -(-int(self.array.shape[self.axis]) // int(self.array.chunks[self.axis]))

    def bounds(self, number: int) -> tuple[int, int]:
        """Where a chunk begins and ends on the axis."""
        size = int(self.array.chunks[self.axis])
        return number * size, min((number + 1) * size, int(self.array.shape[self.axis]))

    def rows(self, number: int) -> int:
        start, stop = self.bounds(number)
        return stop - start

    def _part(self, number: int) -> tuple[slice, ...]:
        return (slice(None),) * self.axis + (slice(*self.bounds(number)),)

    def read(self, number: int) -> npt.NDArray[Any]:
        return np.asarray(self.array[self._part(number)])

    def write(self, number: int, block: npt.NDArray[Any]) -> None:
        """Write a chunk, and mark it."""
        with naming(self.name, "cannot be written"):
            self.array[self._part(number)] = block
            content = json.dumps({"crc32": _checksum(block)}).encode()
            self._sync(self._at(number).set(self._buffer(content)))

    def mark(self, number: int) -> int | None:
        """The checksum with which a chunk was marked."""
        found = self._sync(self._at(number).get())
        try:
            return None if found is None else int(json.loads(found.to_bytes())["crc32"])
        except (ValueError, KeyError, TypeError):
            return None

    def unmark(self, number: int) -> None:
        self._sync(self._at(number).delete())

    def left(self) -> list[int]:
        """The chunks that are not done."""
        path = self.array.store_path / MARKS
        with naming(self.name, "cannot be read"):
            names = self._sync(_listed(path.store, path.path))
        done = {int(name) for name in names if name.isdecimal()}
        return [number for number in range(self.count) if number not in done]

    def _at(self, number: int) -> Any:
        return self.array.store_path / f"{MARKS}/{number}"

    @staticmethod
    def _sync(coroutine: Any) -> Any:
        from zarr.core.sync import sync

        return sync(coroutine)

    @staticmethod
    def _buffer(content: bytes) -> Any:
        from zarr.buffer import default_buffer_prototype

        return default_buffer_prototype().buffer.from_bytes(content)

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "axis": self.axis, "array": None}

    def reopened(self) -> Chunked:
        """Return it for use in another process."""
        found = Chunked.existing(self.store)
        if found is None:
            raise DataError(
                f"{self.name}: this worker does not see the store: it must be where all workers can reach it"
            )
        return found


async def _listed(store: Any, path: str) -> list[str]:
    return [name.rsplit("/", 1)[-1] async for name in store.list_dir(path)]


def _is_folder(store: Any) -> bool:
    """Whether a store is a path of this machine, and no URL."""
    return isinstance(store, os.PathLike) or (isinstance(store, str) and "://" not in store)


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any], of: str = "") -> list[str]:
    """What differs, by name: there and asked."""
    found = []
    for name in dict.fromkeys([*asked, *there]):
        one, other = there.get(name), asked.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{of}{name} ")
        elif one != other:
            found.append(f"{of}{name} {_short(one)} there, {_short(other)} asked for")
    return found


def _short(value: Any) -> str:
    return f"{value[:15]}..." if isinstance(value, str) and value.startswith("sha256:") else shown(value)
