"""The CPU backend: what its files hold, put together."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cpu.covariance import CovarianceOperations
from fastdiff.backends.cpu.layers import LayerOperations
from fastdiff.backends.cpu.mlp import MLPOperations
from fastdiff.backends.cpu.optim import OptimOperations
from fastdiff.backends.numpy.host import HostBackend

Array = npt.NDArray[Any]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CpuBackend(CovarianceOperations, LayerOperations, MLPOperations, OptimOperations, HostBackend):
    """Numba kernels on the CPU, float32.

    Parameters
    ----------
    threads : int or None
        Number of threads; None: one per core that this process may run on.
    """

    name = "cpu"
    repeats_resize = False

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads or _cores())

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return CpuBackend, (self.threads,)

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        return np.ascontiguousarray(value, np.float32 if dtype is None else dtype)
