"""The table on every backend, side by side, against the roofs of this machine: ``python benchmarks/run.py``.

Each case is first computed at a small size on the backend and on the reference, and timed only if they agree. A time
is the median of warm calls on arrays that are in memory already; on a GPU a call ends when its work is done. NumPy
computes the small size only, so compare rates. What is of a roof is explained in `fastdiff.bench`.

The whole table goes to ``results/bench-cpu.json`` and ``.md``; where there is a GPU, to ``bench-gpu``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import cases
from machine import header
from readme_numbers import RESULTS, table, write

import fastdiff as fd
from fastdiff import bench
from fastdiff.errors import FastdiffError


def main(argv: list[str] | None = None) -> int:
    """Time, print, and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="a case, or the beginning of its name")
    parser.add_argument("--backend", choices=fd.available_backends(), action="append", help="by default all there are")
    parser.add_argument("--threads", type=int, help="of the CPU backend (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work? The numbers mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    args = parser.parse_args(argv)
    chosen = [case for case in cases.CASES if any(case.name.startswith(name) for name in args.only or [""])]
    if not chosen:
        parser.error(f"no such case; there are {', '.join(cases.BY_NAME)}")
    scale, turn = (1e-3, 0.01) if args.quick else (1.0, bench.TURN)
    backends = [
        fd.get_backend(name, threads=args.threads if name == "cpu" else None)
        for name in args.backend or fd.available_backends()
    ]
    begin = time.perf_counter()
    roofs = {be.name: bench.roofs(be, scale) for be in backends}
    results: dict[str, Any] = {
        "header": header(max(be.threads for be in backends)) | {"scale": scale},
        "roofs": {name: roof._asdict() for name, roof in roofs.items()},
        "cases": [],
    }
    failed = []
    for case in chosen:
        for be in backends:
            if not case.runs_on(be):
                continue
            try:
                row = bench.timed(case.at(scale), be, roofs[be.name], turn)
            except (AssertionError, FastdiffError, MemoryError) as error:
                failed.append(case.name)
                print(f"{case.name}, {be.name}: {error}", flush=True)
                continue
            results["cases"].append(row)
            print(f"{case.name:28} {be.name:6} {' '.join(bench.cells(row))}", flush=True)
    print(f"\n{table(results)}\n{time.perf_counter() - begin:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}; nothing written", file=sys.stderr)
        return 1
    output = args.output or (None if args.only or args.backend or args.threads or args.quick else RESULTS)
    if output is not None:
        name = "bench-gpu" if "cuda" in roofs else "bench-cpu"
        output.mkdir(parents=True, exist_ok=True)
        write(output / f"{name}.json", json.dumps(results, indent=1) + "\n")
        write(output / f"{name}.md", table(results))
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
