"""The table under pytest-benchmark, at full size: ``pytest benchmarks``; one case: ``-k step``."""

from __future__ import annotations

from typing import Any

import pytest
from workloads import WORKLOADS

import fastdiff as fd
from fastdiff.bench import Workload


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_workload(workload: Workload, benchmark: Any) -> None:
    be = fd.get_backend("cpu")
    workload.agree_with_reference(be)
    work = workload.setup(be)
    work.check(work.run())  # compiles, and touches the memory
    benchmark.extra_info |= {
        "threads": be.threads,
        "units": work.units,
        "bytes": workload.bytes,
        "operations": workload.operations,
        "normals": workload.normals,
    }
    result = benchmark(work.run)
    work.check(result)
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median / work.units
        benchmark.extra_info |= {
            "seconds": seconds,
            "GB/s": workload.bytes / seconds / 1e9,
            "GFLOP/s": workload.operations / seconds / 1e9,
            "normals/s": workload.normals / seconds,
        }
