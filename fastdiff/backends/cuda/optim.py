"""AdamW on CUDA, and the end of a training step: ``optim.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdiff.backends.cuda.device import Device
from fastdiff.backends.protocol import AdamW, TrainState
from fastdiff.kernels.cuda import runtime as runtimes

Array = Any

SUM_CHUNK, SUM_THREADS = 4096, 256  # as in optim.cu


class OptimOperations(Device):
    """The step of the optimiser."""

    def adamw(self, state: TrainState, options: AdamW) -> float:
        with self._lock:
            norm = self._issue_adamw(state, options)
            return float(self.runtime.to_numpy(norm)[0])

    def finish_step(self, loss: Array, step: int, state: TrainState, options: AdamW, results: Array) -> None:
        with self._lock:
            self._issue_adamw(state, options, (loss, results, step))

    def _scalars_at(self) -> Array:
        return self._scratch("scalars", runtimes.STRUCTURES["AdamWScalars"].itemsize, np.uint8)

    def _issue_adamw(self, state: TrainState, o: AdamW, training: tuple[Array, Array, int] | None = None) -> Array:
        """Issue an optimiser step, of a training with its loss, its results and its number.

        Once the work is done, what is returned holds the norm.
        """
        params, grads, m, v, average = state
        launch, size = self.runtime.launch, params.size
        chunks = max(1, -(-size // SUM_CHUNK))
        sums, norm = self._scratch("square sums", chunks, np.float64), self._scratch("state", 2, np.float64)
        launch("optim", "square_sums", *self.runtime.grid_1d(chunks * SUM_THREADS, SUM_THREADS), (grads, size, sums))
        loss, results, step = training or (None, None, 0)
        rows = 0 if results is None else len(results)
        args = (sums, chunks, o.clip_norm, loss, norm, results, rows, step, self._step_at())
        launch("optim", "finish_norm", 1, SUM_THREADS, args)
        scalars = self._scalars(o), self._scalars_at() if self.runtime.capturing else None
        launch("optim", "adamw", *self.runtime.grid_1d(size), (params, grads, m, v, average, size, *scalars, norm))
        return norm

    def _scalars(self, o: AdamW) -> tuple[float, ...]:
        return (
            1 - o.beta1, 1 - o.beta2, o.correction2**-0.5, o.eps, 1 - o.rate * o.decay, o.rate / o.correction1,
            1 - o.ema,
        )  # fmt: skip
