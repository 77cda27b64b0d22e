"""What every part of the CUDA backend holds: a runtime, and memory that is kept on it."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import BackendError
from fastdiff.kernels.cuda import runtime as runtimes

Array = Any

WARP = 32
VECTOR = 16  # bytes that are read and written at once where everything is aligned to them
WIDE = 16  # a row of a multiple of this many values has four aligned quarters
MOST_WIDTH = 1 << 31  # of other rows
TILE_THREADS, TILE_LINES = 192, 4  # of tiles.cuh
TILE_BYTES = 4 * TILE_THREADS * (4 * TILE_LINES + 1)
FACTOR_BYTES = 8 * TILE_THREADS * TILE_LINES  # behind the tile in forward_noise_rows, for one row a Philox block
LEAST_FILL = 0.85  # of the lanes of warps that draw: with fewer, threads that take a Philox block each are as good
TABLES = 32  # kept on the device
# Shared memory that a block may have, by compute capability (CUDA C++ programming guide, "Compute Capabilities").
SHARED_LIMITS = {"8.0": 163 * 1024, "9.0": 227 * 1024, "12.0": 99 * 1024}


@lru_cache(maxsize=256)
def tile_rows(n: int, width: int, blocks: int) -> int:
    """Return how many of n rows a tile of tiles.cuh takes, 0 where tiles do not suit rows of this width.

    Tiles begin at multiples of 16 bytes, and the lanes of warps that draw have something to draw, nearly all. There are
    enough tiles for so many `blocks`, unless that left most lanes of a single warp without a Philox block.
    """
    quarter, step, turn = -(-width // 4), 4 // math.gcd(4, width), WARP * TILE_LINES

    def fullest(most: int) -> tuple[float, int]:
        choice = range(step, most + 1, step)[-(most // step + 1) // 2 :]  # the upper half
        return max((rows * quarter / (-(-rows * quarter // turn) * turn), rows) for rows in choice)

    most = TILE_THREADS * TILE_LINES // quarter // step * step
    if most == 0 or fullest(most)[0] < LEAST_FILL:
        return 0
    few = max(-(-n // blocks), turn // quarter, 1)
    return fullest(min(most, -(-few // step) * step))[1]


def crosses_half(first_row: int, n: int) -> bool:
    """Whether the upper halves of the numbers of n rows of noise differ."""
    return first_row >> 32 != (first_row + n - 1) >> 32


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
        crosses: bool = False,
    ) -> None:
        """Launch an entry whose threads take Philox blocks; `arrays` decide which form: _wide, _rows or neither.

        The entry takes `before`, by default the arrays, and `after`. `crosses`: see `crosses_half`. Arrays that are
        not aligned, rows too wide for a tile, and those that cross take the form that reads value by value.
        """
        first = arrays[0]
        n, width = first.shape  # type: ignore[union-attr]
        if n == 0 or width == 0:
            return
        args = (*(arrays if before is None else before), *after)
        aligned = self._aligned(*arrays)
        if aligned and width % WIDE == 0:
            self.runtime.launch(source, f"{entry}_wide", *self.runtime.grid_1d(n * (width // WIDE)), args)
            return
        rows = tile_rows(n, width, self.runtime.grid_1d(n * TILE_THREADS, TILE_THREADS)[0])
        shared = TILE_BYTES + (FACTOR_BYTES if entry == "forward_noise" else 0)
        if aligned and rows and not crosses and shared <= self.runtime.shared_limit:
            grid, block = self.runtime.grid_1d(-(-n // rows) * TILE_THREADS, TILE_THREADS)
            self.runtime.launch(source, f"{entry}_rows", grid, block, (*args, rows), shared)
            return
        if width >= MOST_WIDTH:
            raise BackendError(f"rows of {width} values: backend 'cuda' takes fewer than {MOST_WIDTH}")
        self.runtime.launch(source, entry, *self.runtime.grid_1d(n * -(-width // 4)), args)

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
