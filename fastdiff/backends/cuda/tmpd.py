"""Outputs that are moved towards observations on CUDA: ``told.cu``, in which a warp takes a state."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.device import Device
from fastdiff.backends.protocol import Equations, Told, ToldStates
from fastdiff.forks import cached_property
from fastdiff.kernels.cuda.runtime import Runtime

Array = Any

WARP, THREADS = 32, 128  # TOLD_WARPS of told.cu are in a block


def chosen(places: npt.NDArray[np.int64], d: int) -> npt.NDArray[np.int32]:
    """Return places (N, m) as the kernels take them, (N, 2 m + d).

    After those of an observation come, for each row, the next one of the same place, and for each place its first row,
    -1 where there is none.
    """
    n, m = places.shape
    out = np.full((n, 2 * m + d + 1), -1, np.int32)  # the last one is the first row of those that say nothing
    out[:, :m] = places
    every = np.arange(n)
    for j in reversed(range(m)):
        first = out[every, 2 * m + places[:, j]]
        out[:, m + j] = first
        out[every, 2 * m + places[:, j]] = j
    return np.ascontiguousarray(out[:, :-1])


class _DeviceTold:
    """What is told, on the device."""

    def __init__(self, told: Told, d: int, runtime: Runtime) -> None:
        self.chosen = None if told.places is None else runtime.asarray(chosen(told.places, d))
        self.matrix = None if told.matrix is None else runtime.asarray(told.matrix, np.float32)
        self.seen = runtime.asarray(np.stack([told.y, told.variance], axis=1), np.float64)
        self.reach = runtime.asarray(told.reach, np.float64)
        self.numbers = runtime.asarray(told.numbers, np.float64)


class ToldOperations(Device):
    """Outputs that are moved towards observations."""

    @cached_property
    def _told(self) -> weakref.WeakKeyDictionary[Told, dict[int, _DeviceTold]]:
        return weakref.WeakKeyDictionary()

    def _told_there(self, told: Told, d: int) -> _DeviceTold:
        """It on the device: made once for each queue, since what one uploads, another may not have."""
        queue = self.runtime.queue()
        with self._lock:
            kept = self._told.setdefault(told, {})
            if queue not in kept:
                kept[queue] = _DeviceTold(told, d, self.runtime)
            return kept[queue]

    def _launch_states(
        self, entry: str, shape: tuple[int, int], args: tuple[Any, ...], states: ToldStates, *more: int
    ) -> None:
        """Launch one with these arguments, then what is told of the states (n, D), and more numbers."""
        (told, which, t), (n, d), there = states, shape, self._told_there(states.told, shape[1])
        seen = there.chosen, there.matrix, there.seen, there.numbers
        self._launch_warps(entry, n, (*args, *seen, which, t, n, told.y.shape[1], d, *more))

    def _launch_warps(self, entry: str, n: int, args: tuple[Any, ...]) -> None:
        """Launch a kernel whose warps take a state each."""
        if n:
            self.runtime.launch("told", entry, *self.runtime.grid_1d(n * WARP, THREADS), args)

    def told_rows(self, told: Told, which: Array, out: Array) -> None:
        m, n, d = out.shape
        there = self._told_there(told, d)
        if out.size:
            grid, block = self.runtime.grid_1d(out.size)
            self.runtime.launch("told", "told_rows", grid, block, (out, there.chosen, there.matrix, which, n, m, d))

    def told_direct(self, states: ToldStates, x: Array, out: Array, products: Array, equations: Equations) -> None:
        self._launch_states("told_direct", x.shape, (x, out, products, *equations[:3]), states)

    def told_begin(self, states: ToldStates, x: Array, out: Array, cotangent: Array, equations: Equations) -> None:
        args = x, out, equations.basis, equations.rest, cotangent
        self._launch_states("told_begin", x.shape, args, states, states.told.products)

    def told_arnoldi(self, states: ToldStates, k: int, product: Array, cotangent: Array, equations: Equations) -> None:
        args = k, product, cotangent, equations.back, equations.basis, equations.H
        self._launch_states("told_arnoldi", cotangent.shape, args, states, states.told.products)

    def told_move(self, states: ToldStates, out: Array, equations: Equations) -> None:
        (told, which, t), (n, d), there = states, out.shape, self._told_there(states.told, out.shape[1])
        args = equations.H, equations.rest, equations.back, out, there.reach, there.numbers
        self._launch_warps("told_move", n, (*args, which, t, n, d, told.equations, told.products))
