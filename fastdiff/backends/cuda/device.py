"""What every part of the CUDA backend holds: a runtime, and memory that is kept on it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import BackendError
from fastdiff.kernels.cuda import runtime as runtimes

Array = Any

VECTOR = 16  # bytes that are read and written at once where everything is aligned to them
WIDE = 16  # a row of a multiple of this many values has four aligned quarters
MOST_WIDTH = 1 << 31  # of other rows
TABLES = 32  # kept on the device
# Shared memory that a block may have, by compute capability (CUDA C++ programming guide, "Compute Capabilities").
SHARED_LIMITS = {"8.0": 163 * 1024, "9.0": 227 * 1024, "12.0": 99 * 1024}


class Device:
    """A runtime, its lock, scratch and tables."""

    def __init__(self, runtime: runtimes.Runtime) -> None:
        self.runtime = runtime
        self._lock = threading.RLock()  # two launches that share a buffer follow each other
        self._tables: OrderedDict[tuple[int, bytes], Array] = OrderedDict()
        self._scratches: dict[tuple[int, str], Array] = {}
        self._moves = 0  # how often scratch or a table that graphs may use has gone

    def _step_at(self) -> Array | None:
        """Where a graph that is being captured finds the training step; None: it is a number."""
        return self._scratch("step", 1, np.uint32) if self.runtime.capturing else None

    def _by_blocks(
        self,
        source: str,
        entry: str,
        arrays: tuple[Array | None, ...],
        after: tuple[Any, ...],
        before: tuple[Any, ...] | None = None,
    ) -> None:
        """Launch an entry whose threads take Philox blocks; `arrays` decide which form: wide or not.

        The entry takes `before`, by default the arrays, and `after`.
        """
        first = arrays[0]
        n, width = first.shape  # type: ignore[union-attr]
        if n == 0 or width == 0:
            return
        wide = width % WIDE == 0 and self._aligned(*arrays)
        if not wide and width >= MOST_WIDTH:
            raise BackendError(f"rows of {width} values: backend 'cuda' takes fewer than {MOST_WIDTH}")
        items = n * (width // WIDE if wide else -(-width // 4))
        grid, block = self.runtime.grid_1d(items)
        args = (*(arrays if before is None else before), *after)
        self.runtime.launch(source, f"{entry}_wide" if wide else entry, grid, block, args)

    def _aligned(self, *arrays: Array | None) -> bool:
        return all(array is None or self.runtime.address(array) % VECTOR == 0 for array in arrays)

    def _scratch(self, name: str, size: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """An array of at least `size` values, for the current queue alone: kept, and grown only.

        Hold the lock while it is in use. A name has one dtype.
        """
        key = self.runtime.queue(), name
        if key not in self._scratches or self._scratches[key].size < size:
            if self._scratches.pop(key, None) is not None:  # the old one goes before the new one comes
                self._moves += 1
            self._scratches[key] = self.runtime.empty((size,), dtype)
        return self._scratches[key]

    def _table(self, values: npt.NDArray[np.float64]) -> Array:
        """A float64 table as float32 on the device; the last few are kept."""
        key = (self.runtime.queue(), values.tobytes())
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            else:
                self._tables[key] = self.runtime.asarray(values, np.float32)
                if len(self._tables) > TABLES:
                    self._tables.popitem(last=False)
                    self._moves += 1
            return self._tables[key]
