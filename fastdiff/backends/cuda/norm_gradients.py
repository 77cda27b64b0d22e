"""Gradients of norms' parameters on CUDA: what a backward pass leaves in sums over images, many by one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastdiff.kernels.cuda.runtime import TASKS, Runtime, tasks_of

Array = Any

CHANNELS, THREADS = 32, 256  # of a block


class NormGradient(NamedTuple):
    """The sums of a norm's backward pass, of so many images, and what is to be made of them."""

    sums: Array
    modulation: Array | None
    dgamma: Array
    dbeta: Array
    images: int


class NormGradients:
    """Gradients that wait to be finished.

    Parameters
    ----------
    runtime : Runtime
    apart : callable
        Takes two arrays and returns how many values the first lies behind the second.
    """

    def __init__(self, runtime: Runtime, apart: Callable[[Array, Array], int]) -> None:
        self.runtime, self.apart = runtime, apart
        self.waiting: list[NormGradient] = []

    def finish(self) -> None:
        """Fill dgamma and dbeta."""
        for begin in range(0, len(self.waiting), TASKS["NormTask"]):
            some, rows, blocks = self.waiting[begin : begin + TASKS["NormTask"]], [], 0
            first, modulated = some[0], next((each.modulation for each in some if each.modulation is not None), None)
            for sums, modulation, dgamma, dbeta, images in some:
                pairs = (sums, first.sums), (modulation, modulated), (dgamma, first.dgamma), (dbeta, first.dbeta)
                places = (0 if array is None else self.apart(array, base) for array, base in pairs)
                rows.append((*places, images, dgamma.size, modulation is not None, blocks))
                blocks += -(-dgamma.size // CHANNELS)
            args = (first.sums, modulated, first.dgamma, first.dbeta, tasks_of("NormTask", rows))
            self.runtime.launch("norm", "norm_parameters", blocks, THREADS, args)
        self.waiting.clear()
