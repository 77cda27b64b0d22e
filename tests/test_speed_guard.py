"""That the CPU kernels are much faster than the NumPy reference in the same run: a lost vectorisation, or a fallback
that says nothing, fails here; a busy machine does not.

A ratio is NumPy's time through ours, each on one thread and in the time of that thread alone, which stands still
while others have the core; the median of short runs in alternation. It must be half of
what is normal for a CPU with such vectors; a workload that misses it has a second chance.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from fastdiff.backends import get_backend
from fastdiff.bench import BY_NAME

ROUNDS, TURN = 7, 0.01  # seconds of runs in one turn
# NumPy's time through ours on x86-64 with AVX-512, and with AVX2 alone; measured with NumPy restricted likewise.
NORMAL = {
    "normals-960000x50": (22.5, 12.7),
    "forward-1000000x50": (15.0, 10.3),
    "step-64x256x256x3": (14.0, 10.5),
    "similarity-4096x128": (3.0, 2.5),
    "conv-16x32x32x64": (2.8, 1.2),
    "chain-default-1000": (8.3, 4.2),
    "train-default-1000": (7.0, 4.1),
}
# Samples where the example is large: small results keep to memory that the process has.
FEW = {"chain-default-1000": 100, "forward-1000000x50": 2000, "similarity-4096x128": 16}


def vectors():
    """The column of `NORMAL` for this CPU, and the part of it that is normal, by what NumPy knows of it."""
    has = np._core._multiarray_umath.__cpu_features__
    if has.get("AVX512_SKX"):
        return 0, 1.0
    return (1, 1.0) if has.get("AVX2") else (1, 0.5)  # NEON: vectors half as long, by estimate


def turn(work):
    """Seconds of a run, in as many as take `TURN`."""
    runs, begin = 0, time.thread_time()
    while (taken := time.thread_time() - begin) < TURN or not runs:
        work.run()
        runs += 1
    return taken / runs


@pytest.fixture(autouse=True)
def _results_in_memory_that_is_there():
    """Large blocks once freed, glibc takes those up to their size from the heap, and not from the system again."""
    np.ones(1 << 22)


def ratio(name):
    workload = BY_NAME[name].example
    workload = replace(workload, n=min(workload.n, FEW.get(name, workload.n)))
    with threadpool_limits(1):
        works = [workload.setup(be) for be in (get_backend("numpy"), get_backend("cpu", threads=1))]
        for work in works:
            work.check(work.run())
        return statistics.median(turn(works[0]) / turn(works[1]) for _ in range(ROUNDS))


@pytest.mark.parametrize("name", NORMAL)
def test_the_kernels_are_as_much_faster_than_numpy_as_ever(name):
    column, part = vectors()
    floor = 0.5 * part * NORMAL[name][column]
    measured = ratio(name)
    if measured < floor:
        measured = max(measured, ratio(name))
    assert measured >= floor, f"{measured:.1f} times as fast as NumPy, where {2 * floor:.0f} is normal"
