"""AdamW on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cpu.workers import MIN_LIGHT_PIECE, Scripted
from fastdiff.backends.protocol import AdamW, TrainState
from fastdiff.kernels.cpu import optim as optim_kernels

Array = npt.NDArray[Any]


class OptimOperations(Scripted):
    """The step of the optimiser."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._lanes = [np.empty(optim_kernels.LANES) for _ in range(threads)]
        self._sums, self._scalars = np.empty(0), np.empty(8, np.float32)

    def adamw(self, state: TrainState, options: AdamW) -> float:
        (params, grads, m, v, average), o = state, options
        with self._workers.lock:
            blocks = -(-params.size // optim_kernels.BLOCK)
            if len(self._sums) != blocks:
                self._sums = np.empty(blocks)
            sums, scalars = self._sums, self._scalars
            self._workers.run(
                lambda worker, start, stop: optim_kernels.square_sums(start, stop, grads, sums, self._lanes[worker]),
                len(sums),
                MIN_LIGHT_PIECE // optim_kernels.BLOCK,
            )
            norm = math.sqrt(sum(sums.tolist()))
            if not math.isfinite(norm):
                return norm
            scalars[:] = (
                min(1.0, o.clip_norm / (norm + 1e-6)), 1 - o.beta1, 1 - o.beta2, o.correction2**-0.5,
                o.eps, 1 - o.rate * o.decay, o.rate / o.correction1, 1 - o.ema,
            )  # fmt: skip
            self._workers.run(
                lambda worker, start, stop: optim_kernels.adamw_range(
                    start, stop, params, grads, m, v, average, scalars
                ),
                params.size,
                MIN_LIGHT_PIECE,
            )
        return norm
