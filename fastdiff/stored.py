"""Rows that stay on disk: read block by block to be measured, and a batch at a time to be learned from.

What is measured of many values is measured block by block in memory too, so that a model has the same bits whether its
data fitted into memory or not. What has no more than `FEW_VALUES` is read, and then is an array like any other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import noise
from fastdiff.backends import Backend
from fastdiff.errors import ArgumentError, DataError, all_finite, shown
from fastdiff.noise import Draw, Stream

Rows = npt.NDArray[Any]

FEW_VALUES = 1 << 24  # of a data set that is read whole, or measured in one go
PART_VALUES = 1 << 20  # of a block
AHEAD_VALUES = 1 << 22  # that are read together for steps to come, in sorted order


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows (N, ...) of an array on disk, as far as one looks at them.

    Attributes
    ----------
    source : array
        Of NumPy (memory-mapped), zarr, Dask, or another with a shape, a dtype and slices.
    picked : (N,) int64 array, optional
        Which of its rows these are, rising; by default all.
    columns : bool array, optional
        Which columns these are of rows that are one-dimensional; by default all.
    width : int, optional
        The values of all rows, one after the other, are taken for rows of so many.
    through : callable, optional
        What becomes of a block of rows, as these are, before anybody sees it.
    """

    source: Any
    picked: npt.NDArray[np.int64] | None = None
    columns: npt.NDArray[np.bool_] | None = None
    width: int | None = None
    through: Callable[[Rows], Rows] | None = None

    @property
    def _row(self) -> tuple[int, ...]:
        """The shape of a row, before `width`."""
        shape = tuple(map(int, self.source.shape[1:]))
        return shape if self.columns is None else (int(self.columns.sum()),)

    @property
    def shape(self) -> tuple[int, ...]:
        count = int(self.source.shape[0]) if self.picked is None else len(self.picked)
        return (count, *self._row) if self.width is None else (count * math.prod(self._row) // self.width, self.width)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64) if self.through is not None else np.dtype(self.source.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Rows:
        """Read rows: of a number, a slice, or an array of numbers or of booleans."""
        if isinstance(key, slice):
            key = range(*key.indices(len(self)))
        elif not np.ndim(key):
            return self[int(key) : int(key) + 1][0]
        if isinstance(key, range) and key.step == 1 and self.width is not None:
            per_row = math.prod(self._row) // self.width
            first = key.start // per_row
            block = self._read(range(first, -(-key.stop // per_row))).reshape(-1, self.width)
            return self._seen(block[key.start - first * per_row : key.stop - first * per_row])
        numbers = key if isinstance(key, range) else np.asarray(key)
        if not isinstance(numbers, range) and numbers.dtype == bool:
            numbers = np.flatnonzero(numbers)
        assert self.width is None, "rows of another width are read in order"
        return self._seen(self._read(numbers))

    def _seen(self, block: Rows) -> Rows:
        return block if self.through is None else self.through(block)

    def _read(self, numbers: range | npt.NDArray[np.int64]) -> Rows:
        """Rows of the source; in sorted order, each once, whatever is asked for."""
        if self.picked is not None:
            numbers = self.picked[numbers.start : numbers.stop : numbers.step] if isinstance(numbers, range) else (
                self.picked[numbers]
            )  # fmt: skip
        back = None
        if isinstance(numbers, range) and numbers.step == 1:
            found: Any = self.source[numbers.start : numbers.stop]
        else:
            rising, back = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
            select = getattr(self.source, "oindex", self.source)  # of zarr
            found = select[rising] if rising.size else self.source[:0]
        block: Rows = np.ascontiguousarray(np.asarray(found.compute() if hasattr(found, "compute") else found))
        block = block if back is None else block[back]
        return block if self.columns is None else np.ascontiguousarray(block[:, self.columns])

    def some(self, which: npt.NDArray[np.bool_]) -> StoredRows:
        """Those of the rows for which `which` is true."""
        numbers = np.flatnonzero(which)
        return replace(self, picked=numbers if self.picked is None else self.picked[numbers])

    def reshape(self, *shape: int) -> StoredRows:
        """The same values as rows of another width: (-1, width)."""
        before, width = shape
        assert before == -1
        return replace(self, width=width)

    def check(self) -> None:
        """Look at all values.

        Raises
        ------
        ArgumentError
            Some are not finite.
        """
        start = 0
        for part in parts(self):
            if part.dtype.kind == "f" and not all_finite(part):
                at = np.argwhere(~np.isfinite(part))[0]
                value, where = part[tuple(at)], (start + int(at[0]), *map(int, at[1:]))
                wants = "finite values; with missing ones, data that are read into memory"
                raise ArgumentError("X", f"{value} at index {where}", wants)
            start += len(part)


def opened(X: Any) -> Any:
    """Return data as they are, in memory, or as `StoredRows` where they are on disk and too many to be read."""
    if isinstance(X, (str, os.PathLike)):
        if os.path.splitext(os.fspath(X))[1] != ".npy":
            raise ArgumentError("X", shown(X), "an array, or the path of an .npy file; fd.data.load_curves reads .csv")
        try:
            X = np.load(X, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{os.fspath(X)}: not an .npy file that can be read: {error}") from error
    on_disk = isinstance(X, np.memmap) or (
        not isinstance(X, np.ndarray) and all(hasattr(X, name) for name in ("chunks", "shape", "dtype", "ndim"))
    )
    if not on_disk:
        return X
    if X.ndim == 0 or not isinstance(X.shape[0], (int, np.integer)):
        raise ArgumentError("X", f"shape {X.shape}", "rows, as many as are known")
    rows = StoredRows(X)
    return rows if rows.size > FEW_VALUES else rows[:]


def is_large(X: Any) -> bool:
    """Whether rows are measured block by block."""
    return isinstance(X, StoredRows) or bool(X.size > FEW_VALUES)


def parts(X: Any) -> Iterator[Rows]:
    """Rows in order, a block at a time; all at once where there are few values."""
    if not is_large(X):
        yield X
        return
    rows = max(1, PART_VALUES // max(1, math.prod(X.shape[1:])))
    for start in range(0, len(X), rows):
        yield X[start : min(start + rows, len(X))]


def moments(X: Any, unit: Any = None, axis: int | None = 0) -> tuple[Any, Any]:
    """Mean and variance of ``X / unit``, of everything or along the rows, in float64, by Chan, Golub & LeVeque 1979."""
    count, mean, total = 0, np.zeros(()), np.zeros(())
    for part in parts(X):
        scaled = part if unit is None else part / unit
        n = scaled.size if axis is None else len(scaled)
        middle = np.mean(scaled, axis=axis, dtype=np.float64)
        step = middle - mean
        mean = mean + step * (n / (count + n))
        total = total + np.var(scaled, axis=axis, dtype=np.float64) * n + step * step * (count * n / (count + n))
        count += n
    return mean, total / count


class Feed:
    """Brings the rows that a step draws to where the step reads them.

    Position i of the batch at a step is row (w0 N) >> 32 of stream BATCH, as ever; what is here is which row that is,
    and a thread that reads those of the next steps while these are taken.

    Parameters
    ----------
    be : Backend
    rows : StoredRows
        What is learned from.
    inner : callable
        Rows of data in the network's range.
    batch, seed : int
        Positions, and the seed of the draws.
    asked : pair of (N, ...) array
        Labels and covariates of all rows, or None.

    Attributes
    ----------
    data : (batch, ...) array
    asked : pair of (batch, ...) array or None
        Of the step that was put last.
    mine : slice
        The positions that are read: all, but for a rank that computes a share of the steps.
    """

    def __init__(
        self,
        be: Backend,
        rows: StoredRows,
        inner: Callable[[Rows], Rows],
        batch: int,
        seed: int,
        asked: tuple[Rows | None, Rows | None],
    ) -> None:
        self.be, self.rows, self.inner, self.batch, self.seed = be, rows, inner, batch, seed
        first = inner(rows[:1])
        self.data = be.asarray(np.repeat(first, batch, axis=0), first.dtype)
        self._all, self.mine = asked, slice(None)
        self.asked = tuple(None if a is None else be.asarray(a[np.zeros(batch, np.int64)], a.dtype) for a in asked)
        self._steps = max(1, AHEAD_VALUES // max(1, batch * math.prod(rows.shape[1:])))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastdiff-rows")
        self._next: tuple[int, Future[list[tuple[Rows, Rows]]]] | None = None
        self._now: tuple[int, list[tuple[Rows, Rows]]] = (0, [])

    def put(self, step: int, end: int) -> None:
        """Put the rows of a step where it reads them, and have those read of the steps after it, before `end`."""
        first, read = self._now
        if not first <= step < first + len(read):
            if self._next is None or self._next[0] != step:
                self._next = self._ask(step, end)
            first, read = self._now = step, self._next[1].result()
            after = step + len(read)
            self._next = self._ask(after, end) if after < end else None
        numbers, block = read[step - first]
        for place, what in ((self.data, block), *zip(self.asked, self._all, strict=True)):
            if what is not None:
                place[self.mine] = self.be.asarray(what if what is block else what[numbers], place.dtype)

    def _ask(self, first: int, end: int) -> tuple[int, Future[list[tuple[Rows, Rows]]]]:
        return first, self._thread.submit(self._read, range(first, min(end, first + self._steps)))

    def _read(self, steps: range) -> list[tuple[Rows, Rows]]:
        """Numbers of the rows that steps draw, and these in the network's range."""
        draws = (Draw(self.seed, Stream.BATCH, k) for k in steps)
        drawn = [noise.scaled_words(self.batch, len(self.rows), draw)[self.mine] for draw in draws]
        block = self.inner(self.rows[np.concatenate(drawn)])
        return list(zip(drawn, np.split(block, len(drawn)), strict=True))

    def close(self) -> None:
        """End the thread."""
        with suppress(RuntimeError):
            self._thread.shutdown(cancel_futures=True)
