"""The workloads that are timed, what they are compared with, and how: ``fastdiff bench``.

One table serves this command, ``make bench``, asv, pytest-benchmark and the comparison with peers; what only a source
tree can run is added in ``benchmarks/workloads.py``. A workload is a class, and a row of the table an instance of it:
what ours does, what the peer does, its bytes and operations, the check of its result, and its sizes. Arrays are made in
`Workload.setup`, never in the part that is timed, except the results that a public call returns: a user pays for those
too. On a GPU a run ends when its work is done.

A roof is the speed of the machine in the same run: of memory, by the triad a = b + 3 c of McCalpin's STREAM (1995),
and of float32 arithmetic, by matrix products in cache; on a GPU by a copy and by one large product. A workload's share
of its roof is the time that the slower of its bytes and its operations must take, through the time that it took.
"""

from fastdiff.bench.measure import Result, cpu_model, duration, speed, timed
from fastdiff.bench.roofs import TURN, Roofs, median_seconds, roofs_of
from fastdiff.bench.table import BY_NAME, QUICK, WORKLOADS
from fastdiff.bench.workload import Work, Workload

__all__ = [
    "BY_NAME", "QUICK", "TURN", "WORKLOADS", "Result", "Roofs", "Work", "Workload", "cpu_model", "duration",
    "median_seconds", "roofs_of", "speed", "timed",
]  # fmt: skip
