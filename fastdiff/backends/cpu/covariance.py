"""Maps of rows, similarities and posterior means on the CPU."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cpu.step import StepOperations, law_of
from fastdiff.backends.cpu.workers import MIN_PIECE, Array, Body
from fastdiff.backends.protocol import RowMap
from fastdiff.kernels.cpu import covariance as covariance_kernels
from fastdiff.kernels.cpu import posterior as posterior_kernels
from fastdiff.noise import Draw

FRESH_PIECE = 1 << 20  # values in a piece of a new result, at most: two huge pages of 2 MB


class _MapSpace:
    """A map of rows in float32, and what the kernels need besides, made once."""

    def __init__(self, plan: RowMap, threads: int) -> None:
        n, k = plan.shape
        products = 0 if plan.left is None else 1 if plan.right is None else 2
        r = len(plan.right) if plan.left is not None and plan.right is not None else 0
        rows = covariance_kernels.tile_rows(n, k, products > 0)
        parts = (
            np.array([] if part is None else part, np.float32).reshape(-1)
            for part in (plan.scale, plan.left, plan.right, plan.offset)
        )
        self.map = covariance_kernels.Map(rows, n, k, r, products, plan.standardise, *parts)
        self.given = tuple(self.map)  # a kernel takes it so in a fifth of the time
        sizes = (rows * r, rows * k, rows, k) if plan.standardise else (rows * r, 0, 0, 0)
        self.rooms = [
            tuple(covariance_kernels.MapRoom(*(np.full(size, 1 / max(1, k), np.float32) for size in sizes)))
            for _ in range(threads)
        ]
        self._drawn: list[Array] = []

    def drawn(self) -> list[Array]:
        """Room for a tile of normals, for each worker."""
        while len(self._drawn) < len(self.rooms):
            self._drawn.append(np.empty(self.map.tile * self.map.n, np.float32))
        return self._drawn


class CovarianceOperations(StepOperations):
    """Similarity, maps of rows, and averages over data."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._maps: weakref.WeakKeyDictionary[RowMap, _MapSpace] = weakref.WeakKeyDictionary()
        self._arenas = [np.empty(posterior_kernels.LANES, np.float32) for _ in range(threads)]

    def renew(self) -> None:
        super().renew()
        self._maps = weakref.WeakKeyDictionary()

    def similarity(self, v: Array, out: Array) -> None:
        flat, flat_out, n = v.reshape(-1), out.reshape(-1), max(1, v.shape[1])

        def body(worker: int, start: int, stop: int) -> None:
            del worker
            covariance_kernels.similarity_range(start, stop, flat, flat_out, n)

        with self._workers.lock:
            self._workers.run(body, flat.size, max(1, self._grain(flat_out.size) // n))

    def _grain(self, values: int) -> int:
        """Values in a piece of a result that may be fresh memory: threads should not be on one page of it at once."""
        return max(MIN_PIECE, min(FRESH_PIECE, values // (8 * self.threads)))

    def _row_map(self, plan: RowMap) -> _MapSpace:
        space = self._maps.get(plan)
        if space is None:
            space = self._maps[plan] = _MapSpace(plan, self.threads)
        return space

    def _run_tiles(self, body: Body, space: _MapSpace, out: Array) -> None:
        """Call `body` over the tiles of a map's result."""
        if out.size:
            tile = space.map.tile
            tiles, values = -(-len(out) // tile), tile * max(space.map.n, space.map.k)
            self._workers.run(body, tiles, max(1, self._grain(out.size) // values))

    def map_rows(self, x: Array, out: Array, plan: RowMap) -> None:
        flat, flat_out = x.reshape(-1), out.reshape(-1)
        with self._workers.lock:
            space = self._row_map(plan)

            def body(worker: int, start: int, stop: int) -> None:
                covariance_kernels.map_range(start, stop, flat, flat_out, space.given, space.rooms[worker])

            self._run_tiles(body, space, out)

    def mapped_normal(self, out: Array, plan: RowMap, draw: Draw) -> None:
        flat, law = out.reshape(-1), law_of(draw)
        with self._workers.lock:
            space = self._row_map(plan)
            drawn = space.drawn()

            def body(worker: int, start: int, stop: int) -> None:
                covariance_kernels.mapped_normal_range(
                    start, stop, drawn[worker], flat, space.given, space.rooms[worker], law, self._rooms[worker]
                )

            self._run_tiles(body, space, out)

    def posterior_mean(
        self,
        x: Array,
        data: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        log_sum: Array,
    ) -> None:
        k, (m, d) = posterior_kernels, x.shape
        flat = x.reshape(-1), data.reshape(-1), np.array([-signal, -0.5 / noise**2], np.float32), out.reshape(-1)
        rows = min(k.TILE, -(-m // (self.threads * k.LANES)) * k.LANES)  # the bits are the same in any tile
        with self._workers.lock:
            if len(self._arenas[0]) < k.arena_size(d):
                self._arenas = [np.empty(k.arena_size(d), np.float32) for _ in range(self.threads)]

            def body(worker: int, start: int, stop: int) -> None:
                k.posterior_mean_range(start, stop, rows, *flat, log_sum, d, self._arenas[worker])

            self._workers.run(body, -(-m // max(rows, 1)), 1)

    def blend(self, out: Array, state: Array, parts: Array, residuals: Array, constant: float) -> None:
        k, (m, d), r = posterior_kernels, out.shape, residuals.shape[1]
        flat = out.reshape(-1), state.reshape(-1), parts.reshape(-1), residuals.reshape(-1)

        def body(worker: int, start: int, stop: int) -> None:
            k.blend_range(start, stop, *flat, d, r, np.float32(constant), self._arenas[worker][: k.LANES])

        with self._workers.lock:
            self._workers.run(body, m, max(1, MIN_PIECE // (d + r)))
