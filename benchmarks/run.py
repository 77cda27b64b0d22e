"""The table on every backend, side by side, against the roofs of this machine: ``python benchmarks/run.py``.

Each workload is first computed at a small size on the backend and on the reference, and timed only if they agree. A
time is the median of warm calls on arrays that are in memory already; on a GPU a call ends when its work is done. NumPy
computes the small size only, so compare rates. What is of a roof is explained in `fastdiff.bench`.

The whole table goes to ``results/bench-cpu.json`` and ``.md``; where there is a GPU, to ``bench-gpu``.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from machine import header
from report import RESULTS, BenchReport, finish
from workloads import WORKLOADS

import fastdiff as fd
from fastdiff import bench
from fastdiff.errors import FastdiffError


def main(argv: list[str] | None = None) -> int:
    """Time, print, and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="a workload, or the beginning of its name")
    parser.add_argument("--backend", choices=fd.available_backends(), action="append", help="by default all there are")
    parser.add_argument("--threads", type=int, help="of the CPU backend (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work? The numbers mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    args = parser.parse_args(argv)
    chosen = [workload for workload in WORKLOADS if any(map(workload.name.startswith, args.only or [""]))]
    if not chosen:
        parser.error(f"no such workload; there are {', '.join(workload.name for workload in WORKLOADS)}")
    scale, turn = (1e-3, 0.01) if args.quick else (1.0, bench.TURN)
    backends = [
        fd.get_backend(name, threads=args.threads if name == "cpu" else None)
        for name in args.backend or fd.available_backends()
    ]
    begin = time.perf_counter()
    roofs = {be.name: bench.roofs_of(be, scale) for be in backends}
    report = BenchReport(replace(header(max(be.threads for be in backends)), scale=scale), roofs, [])
    failed = []
    for workload in chosen:
        for be in filter(workload.runs_on, backends):
            try:
                result = bench.timed(workload.at(scale), be, roofs[be.name], turn)
            except (AssertionError, FastdiffError, MemoryError) as error:
                failed.append(workload.name)
                print(f"{workload.name}, {be.name}: {error}", flush=True)
                continue
            report.cases.append(result)
            print(f"{workload.name:28} {be.name:6} {' '.join(result.cells())}", flush=True)
    print(f"\n{report.table()}\n{time.perf_counter() - begin:.0f} s")
    output = args.output or (None if args.only or args.backend or args.threads or args.quick else RESULTS)
    return finish(report, "bench-gpu" if "cuda" in roofs else "bench-cpu", output, failed)


if __name__ == "__main__":
    sys.exit(main())
