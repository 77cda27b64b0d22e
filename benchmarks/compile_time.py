"""What the first run of a fresh install costs: ``python benchmarks/compile_time.py``.

A new process imports fastdiff, draws noise, trains and samples, once with an empty kernel cache and then with the
cache that this left; medians over the rounds go to ``results/compile-cpu.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import header
from readme_numbers import RESULTS, table, write

WORK = """
import json, time
marks = [("start", time.perf_counter())]
def mark(what):
    marks.append((what, time.perf_counter()))
import fastdiff as fd
mark("import fastdiff")
be = fd.get_backend("cpu")
fd.normal((1000, 50), backend=be)
mark("the backend and the first normals")
X = fd.data.harmonic_curves(256)
model = fd.Diffusion(backend=be).fit(X, steps=1, progress=False)
mark("the first training step")
model.sample(100)
mark("the first 100 sampled curves")
fd.forward_noise(X, 5, model.schedule, backend=be)
fd.sample(model.denoiser(), fd.samplers.ddpm(model.schedule), n=2, backend=be, trajectory=True)
mark("forward noising and the stepwise path")
print(json.dumps([(what, at - before) for (_, before), (what, at) in zip(marks, marks[1:])]))
"""


def run(cache: Path) -> dict[str, float]:
    """Seconds of each stage in a new process with this kernel cache."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", WORK]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    stages = dict(json.loads(done.stdout))
    return stages | {"all of it": sum(stages.values())}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="compile_time.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    cold, warm = [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            cold.append(run(cache))
            kernels = len(list(cache.rglob("*.nbi")))
            warm.append(run(cache))
    middle = [{what: statistics.median(r[what] for r in rounds) for what in rounds[0]} for rounds in (cold, warm)]
    results = {
        "header": header(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "kernels": kernels,
        "stages": [{"what": what, "cold": middle[0][what], "warm": middle[1][what]} for what in middle[0]],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "compile-cpu.json", json.dumps(results, indent=1) + "\n")
    write(args.output / "compile-cpu.md", table(results))
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
