"""The table under pytest-benchmark, at full size: ``pytest benchmarks``; one case: ``-k step``."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CASES, Case

import fastdiff as fd


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, benchmark: Any) -> None:
    be = fd.get_backend("cpu")
    case.parity(be)
    work = case.setup(be)
    work.check(work.run())  # compiles, and touches the memory
    benchmark.extra_info |= {
        "threads": be.threads,
        "units": work.units,
        "bytes": case.bytes,
        "operations": case.operations,
        "normals": case.normals,
    }
    result = benchmark(work.run)
    work.check(result)
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median / work.units
        benchmark.extra_info |= {
            "seconds": seconds,
            "GB/s": case.bytes / seconds / 1e9,
            "GFLOP/s": case.operations / seconds / 1e9,
            "normals/s": case.normals / seconds,
        }
