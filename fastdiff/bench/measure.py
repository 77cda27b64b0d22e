"""How work is timed, and how times, rates and shares are written."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.bench.roofs import TURN, Roofs, median_seconds
from fastdiff.bench.workload import Workload


class Result(NamedTuple):
    """What was measured of a workload on a backend; no rate and no share where only the time means something."""

    name: str
    title: str
    backend: str
    n: int  # samples
    seconds: float  # of a unit of the work
    rate: float | None
    unit: str | None  # of the rate
    share: float | None  # the least time that its bytes and its operations take, through the time that it took
    roof: str | None  # "memory" or "arithmetic": which of the two takes longer
    difference: float  # from the reference, in the example that both computed

    def cells(self) -> list[str]:
        """Return what a table shows: the time of a unit, the rate, the share of the roof and which roof it is."""
        if self.rate is None or self.share is None:
            return [duration(self.seconds), "", ""]
        share = f"{self.share:.0%}" if self.share >= 0.095 else f"{self.share:.1%}"
        return [duration(self.seconds), f"{speed(self.rate)} {self.unit}", f"{share} of {self.roof}"]


def timed(workload: Workload, be: Any, roofs: Roofs, seconds: float = TURN) -> Result:
    """Time a workload on a backend, once it agrees with the reference.

    The reference computes the example only: at full size it would take minutes. Its result says that size.

    Raises
    ------
    AssertionError
        The backend and the reference differ, or a result is wrong.
    """
    reference = be.name == "numpy"
    difference = 0.0 if reference else workload.agree_with_reference(be)
    sized = workload.example if reference else workload
    work = sized.setup(be)
    work.check(work.run())  # compiles, and touches the memory
    taken = median_seconds(work.run, seconds) / work.units
    rate, (share, roof) = sized.rate(taken), roofs.share(sized, taken)
    result = Result(workload.name, workload.title, be.name, sized.n, taken, None, None, None, None, difference)
    return result if rate is None else result._replace(rate=rate, unit=sized.rate_unit, share=share, roof=roof)


def cpu_model() -> str:
    """Return the processor's name, and its widest vectors where they are known."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in lines.items()}
        flags = known.get("flags", "").split()
        widest = next((name for name in ("avx512f", "avx2") if name in flags), "")
        if "model name" in known:
            return known["model name"] + (f" ({widest})" if widest else "")
    return platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError


def speed(rate: float) -> str:
    """Return a rate with three digits."""
    digits = 2 - math.floor(math.log10(rate)) if rate > 0 else 0
    return f"{round(rate, digits):,.{max(0, digits)}f}"
