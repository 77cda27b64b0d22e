"""Noise, forward noising and a sampler's step on CUDA: ``noise.cu`` and ``step.cu``, or their Numba twins."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.device import Device
from fastdiff.backends.protocol import Row
from fastdiff.kernels.cuda import runtime as runtimes
from fastdiff.noise import Draw, round_keys

Array = Any


@lru_cache(maxsize=64)
def _keys(seed: int) -> npt.NDArray[Any]:
    keys = np.zeros(1, runtimes.STRUCTURES["RoundKeys"])
    keys["words"] = round_keys(seed).reshape(1, -1)
    return keys


def law_of(draw: Draw) -> tuple[int, int, int, npt.NDArray[Any]]:
    """First row, step, stream and keys, as the kernels take them."""
    return draw.first_row, draw.step, int(draw.stream), _keys(draw.seed)


def row_record(row: Row, clip: tuple[float, float] | None, *, wanted: bool) -> tuple[Any, ...]:
    """A "TableRow"; without `wanted` only the row's own terms take x0."""
    with np.errstate(over="ignore"):
        p, q, a, b, c, e, s = np.array((row.p, row.q, row.a, row.b, row.c1, row.e, row.s), np.float32)
    if b == 0 and not wanted:
        p = q = np.float32(0)
    return p, q, a, b, c, e, s, *(clip or (-np.inf, np.inf))


class StepOperations(Device):
    """Noise, and what it goes into."""

    _twins: Any = None
    """The Numba kernels that take the place of ours, where they are asked for."""

    def normal(self, out: Array, draw: Draw) -> None:
        self._by_blocks("noise", "normal", (out,), (*out.shape, *law_of(draw)))

    def forward_noise(
        self,
        x0: Array,
        t: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        eps: Array,
        draw: Draw,
    ) -> None:
        tables = self._table(signal), self._table(noise)
        if self._twins:
            self._twins.forward_noise(x0, t, *tables, out, eps, draw, queue=self.runtime.queue())
            return
        first, _, stream, keys = law_of(draw)
        after = (*x0.shape, first, stream, keys)
        self._by_blocks("noise", "forward_noise", (x0, out, eps), after, (x0, t, *tables, out, eps))

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        if self._twins:
            self._twins.sampler_step(x, out, memory, row, clip, draw, queue=self.runtime.queue())
            return
        previous = memory[0] if memory and (row.evaluates or row.c1 != 0) else None
        if previous is not None and not row.evaluates:
            previous = previous.copy()  # what the kernel writes there is not remembered
        record = row_record(row, clip, wanted=previous is not None)
        arrays = (x, out, previous)
        if record[6] != 0:
            after = (record, *x.shape, *law_of(draw))
            self._by_blocks("step", "step_noisy", arrays, after)
        elif x.size:
            fours = self._aligned(*arrays)
            grid, block = self.runtime.grid_1d(-(-x.size // 4) if fours else x.size)
            self.runtime.launch("step", "step_quiet", grid, block, (*arrays, record, x.size, fours))
