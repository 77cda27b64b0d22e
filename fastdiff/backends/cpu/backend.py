"""The CPU backend: what its files hold, put together."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cpu.covariance import CovarianceOperations
from fastdiff.backends.cpu.layers import LayerOperations
from fastdiff.backends.cpu.mlp import MLPOperations
from fastdiff.backends.cpu.optim import OptimOperations
from fastdiff.backends.numpy.host import HostBackend
from fastdiff.errors import BackendError
from fastdiff.kernels.cpu import tiles

Array = npt.NDArray[Any]

log = logging.getLogger("fastdiff")


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may run on, and has the time of.

    A container has a quota of time (``docker run --cpus=2``) and yet sees all cores of its machine: more threads than
    that would be stopped for most of it. Below a whole core counts as one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """The quotas, in cores, of this process's control groups and of those that they are in."""
    found = []
    for line in _words(root / "proc/self/cgroup"):
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        place = Path(group.lstrip("/"))
        for each in (place, *place.parents):  # from inside a container its group may not be there: its mount is
            if controllers:
                numbers = [_words(mount / each / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
                words = [one[0] for one in numbers if one]
            else:
                words = (_words(mount / each / "cpu.max") or [""])[0].split()
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
                found.append(int(words[0]) / int(words[1]))
    return found


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")[:64]
    except (OSError, ValueError):
        return []


@cache
def _say_crowded(threads: int, cores: int) -> None:
    log.info("%d threads, where there is the time of %d: they take turns", threads, cores)


class CpuBackend(CovarianceOperations, LayerOperations, MLPOperations, OptimOperations, HostBackend):
    """Numba kernels on the CPU, float32.

    Parameters
    ----------
    threads : int or None
        Number of threads; None: one per core that this process may run on, and no more than its container's quota.
    precision : {"float32", "bf16"}, optional
        What convolutions multiply; their sums and everything else are float32. "bf16" needs a CPU with AMX.

    Raises
    ------
    BackendError
        "bf16", and the CPU or the system has no AMX for this process.
    """

    name = "cpu"
    repeats_resize = False

    def __init__(self, threads: int | None = None, precision: str = "float32") -> None:
        if precision == "bf16" and (why := tiles.why_not()):
            raise BackendError(f"precision 'bf16' on a CPU: {why}; 'float32' runs everywhere")
        cores = usable_cores()
        if threads is not None and threads > cores:
            _say_crowded(threads, cores)
        super().__init__(threads or cores)
        self.precision = precision

    def __reduce__(self) -> tuple[Any, tuple[int, str]]:
        return CpuBackend, (self.threads, self.precision)

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        return np.ascontiguousarray(value, np.float32 if dtype is None else dtype)
