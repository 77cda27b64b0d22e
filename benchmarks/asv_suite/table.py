"""Time, peak memory and share of the roof of every workload."""

from __future__ import annotations

import resource
from functools import cache

import workloads

import fastdiff as fd
from fastdiff import bench

NAMES = [workload.name for workload in workloads.WORKLOADS]
BACKENDS = [name for name in fd.available_backends() if name != "numpy"]


@cache
def prepared(name: str, backend: str) -> bench.Work:
    """Assert parity, make a workload and run it: once in a process, where asv calls `setup` before every sample."""
    workload, be = workloads.BY_NAME[name], fd.get_backend(backend)
    if not workload.runs_on(be):
        raise NotImplementedError  # asv leaves it out
    workload.agree_with_reference(be)
    work = workload.setup(be)
    work.check(work.run())
    return work


class Table:
    """One workload on one backend."""

    params = (NAMES, BACKENDS)
    param_names = ("case", "backend")
    timeout = 300.0

    def setup(self, name: str, backend: str) -> None:
        self.work = prepared(name, backend)


class Time(Table):
    """Seconds of a run: of `units` training steps, where it trains."""

    rounds, warmup_time, sample_time = 1, 0.0, 0.1
    repeat = (3, 10, 3.0)  # at least, at most, seconds

    def time_case(self, name: str, backend: str) -> None:
        """Work."""
        self.work.run()


class Memory(Table):
    """What the process needed at most, libraries, inputs and results included."""

    def track_peak_megabytes(self, name: str, backend: str) -> float:
        """Work, and ask the system."""
        self.work.run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    track_peak_megabytes.unit = "MB"  # type: ignore[attr-defined]


class Roof(Table):
    """The least time that bytes and operations must take, through the time taken, in the same process."""

    params = ([workload.name for workload in workloads.WORKLOADS if workload.rate_unit], BACKENDS)

    def track_share(self, name: str, backend: str) -> float:
        """Work, and measure the roofs."""
        taken = bench.median_seconds(self.work.run) / self.work.units
        return bench.roofs_of(fd.get_backend(backend)).share(workloads.BY_NAME[name], taken)[0]

    track_share.unit = "of the roof"  # type: ignore[attr-defined]
