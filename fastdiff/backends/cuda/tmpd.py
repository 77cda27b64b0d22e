"""Outputs that are moved towards observations on CUDA: ``tmpd.cu``, in which a warp takes a state."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.device import WARP, Device
from fastdiff.backends.protocol import Equations, TmpdPlan, TmpdStates
from fastdiff.forks import cached_property
from fastdiff.kernels.cuda.runtime import Runtime

Array = Any

THREADS = 128  # TMPD_WARPS of tmpd.cu are in a block


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


class _DeviceTmpd:
    """A plan on the device."""

    def __init__(self, tmpd: TmpdPlan, d: int, runtime: Runtime) -> None:
        self.chosen = None if tmpd.places is None else runtime.asarray(chosen(tmpd.places, d))
        self.matrix = None if tmpd.matrix is None else runtime.asarray(tmpd.matrix, np.float32)
        self.seen = runtime.asarray(np.stack([tmpd.y, tmpd.variance], axis=1), np.float64)
        self.reach = runtime.asarray(tmpd.reach, np.float64)
        self.numbers = runtime.asarray(tmpd.numbers, np.float64)


class TmpdOperations(Device):
    """Outputs that are moved towards observations."""

    @cached_property
    def _tmpd(self) -> weakref.WeakKeyDictionary[TmpdPlan, dict[int, _DeviceTmpd]]:
        return weakref.WeakKeyDictionary()

    def _tmpd_there(self, tmpd: TmpdPlan, d: int) -> _DeviceTmpd:
        """It on the device: made once for each queue, since what one uploads, another may not have."""
        queue = self.runtime.queue()
        with self._lock:
            kept = self._tmpd.setdefault(tmpd, {})
            if queue not in kept:
                kept[queue] = _DeviceTmpd(tmpd, d, self.runtime)
            return kept[queue]

    def _launch_states(
        self, entry: str, shape: tuple[int, int], args: tuple[Any, ...], states: TmpdStates, *more: int
    ) -> None:
        """Launch one with these arguments, then the plan of the states (n, D), and more numbers."""
        (tmpd, which, t), (n, d), there = states, shape, self._tmpd_there(states.tmpd, shape[1])
        seen = there.chosen, there.matrix, there.seen, there.numbers
        self._launch_warps(entry, n, (*args, *seen, which, t, n, tmpd.y.shape[1], d, *more))

    def _launch_warps(self, entry: str, n: int, args: tuple[Any, ...]) -> None:
        """Launch a kernel whose warps take a state each."""
        if n:
            self.runtime.launch("tmpd", entry, *self.runtime.grid_1d(n * WARP, THREADS), args)

    def tmpd_rows(self, tmpd: TmpdPlan, which: Array, out: Array) -> None:
        m, n, d = out.shape
        there = self._tmpd_there(tmpd, d)
        if out.size:
            grid, block = self.runtime.grid_1d(out.size)
            self.runtime.launch("tmpd", "tmpd_rows", grid, block, (out, there.chosen, there.matrix, which, n, m, d))

    def tmpd_direct(self, states: TmpdStates, x: Array, out: Array, products: Array, equations: Equations) -> None:
        self._launch_states("tmpd_direct", x.shape, (x, out, products, *equations[:3]), states)

    def tmpd_begin(self, states: TmpdStates, x: Array, out: Array, cotangent: Array, equations: Equations) -> None:
        args = x, out, equations.basis, equations.residual, cotangent
        self._launch_states("tmpd_begin", x.shape, args, states, states.tmpd.products)

    def tmpd_arnoldi(self, states: TmpdStates, k: int, product: Array, cotangent: Array, equations: Equations) -> None:
        args = k, product, cotangent, equations.back, equations.basis, equations.H
        self._launch_states("tmpd_arnoldi", cotangent.shape, args, states, states.tmpd.products)

    def tmpd_move(self, states: TmpdStates, out: Array, equations: Equations) -> None:
        (tmpd, which, t), (n, d), there = states, out.shape, self._tmpd_there(states.tmpd, out.shape[1])
        args = equations.H, equations.residual, equations.back, out, there.reach, there.numbers
        self._launch_warps("tmpd_move", n, (*args, which, t, n, d, tmpd.equations, tmpd.products))
