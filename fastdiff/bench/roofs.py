"""The roofs of a machine: how many bytes and float32 operations it can do at most, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastdiff.bench.workload import Workload

TURN = 0.5  # seconds of runs that make one time
# Values in each array of the triad, more than a cache holds; of a GPU's copy; side of a GPU's product.
TRIAD, GPU_COPY, GPU_SIDE = 1 << 25, 1 << 28, 8192


def median_seconds(run: Callable[[], Any], seconds: float = TURN) -> float:
    """Return the median time of a call, warm from an earlier one: of as many as take so many seconds."""
    times: list[float] = []
    total = 0.0
    while not times or total < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
        total += times[-1]
    return statistics.median(times)


class Roofs(NamedTuple):
    """What a machine can do at most: bytes and float32 operations a second."""

    memory: float
    arithmetic: float

    def share(self, workload: Workload, seconds: float) -> tuple[float, str]:
        """Return the least time that a unit of the work can take, through the time that it took, and what binds it."""
        least = {"memory": workload.bytes / self.memory, "arithmetic": workload.operations / self.arithmetic}
        binding = max(least, key=lambda roof: least[roof])
        return least[binding] / seconds, binding


def roofs_of(be: Any, scale: float = 1.0) -> Roofs:
    """Measure the roofs of a backend: of the host with as many threads as it uses, or of its GPU.

    Parameters
    ----------
    be : Backend
        Of the reference, the roofs are those of the CPU.
    scale : float, optional
        Below 1 sooner, and wrong: does it work?
    """
    if be.name == "cuda":
        return _device_roofs(be, scale)
    from fastdiff.backends import get_backend
    from fastdiff.kernels.cpu import roof

    workers = get_backend("cpu" if be.name == "numpy" else be)._workers  # type: ignore[attr-defined]
    size = max(1000, round(TRIAD * scale))
    a, b, c = (np.full(size, k, np.float32) for k in range(3))
    rooms = [np.ones(roof.SIZE, np.float32) for _ in range(workers.threads)]
    times, items = max(1, round(200 * scale)), 8 * workers.threads

    def triad() -> None:
        workers.run(lambda _, start, stop: roof.triad_range(start, stop, a, b, c), size, 1 << 18)

    def products() -> None:
        workers.run(lambda worker, start, stop: roof.products(times * (stop - start), rooms[worker]), items, 1)

    with workers.lock:
        triad()
        products()
        assert (a == 7).all()
        assert any((room[: roof.ROWS * roof.COLUMNS] == roof.DEPTH).all() for room in rooms)  # one may do all
        return Roofs(12 * size / median_seconds(triad), items * times * roof.OPERATIONS / median_seconds(products))


def _device_roofs(be: Any, scale: float) -> Roofs:
    side, last = max(8, round(GPU_SIDE * scale)), be.asarray(np.zeros(1))
    source, target = (be.runtime.zeros((max(1000, round(GPU_COPY * scale)),)) for _ in range(2))
    a, b, out = (be.runtime.zeros((side, side)) for _ in range(3))

    def seconds(work: Callable[..., None], *arrays: Any) -> float:
        def run() -> None:
            work(*arrays)
            be.to_numpy(last)  # waits

        run()
        return median_seconds(run)

    memory = seconds(be.runtime.copy, target, source)
    return Roofs(2 * source.nbytes / memory, 2 * side**3 / seconds(be.runtime.matmul, a, b, out))
