"""What the first run of a fresh install costs: ``python benchmarks/compile_time.py``.

A new process imports fastdiff, draws noise, trains and samples, once with an empty kernel cache and then with the
cache that this left; another one does so with a U-Net. Medians over the rounds go to ``results/compile-cpu.json`` and
``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from machine import cores, header
from report import RESULTS, CacheTimes, CompileReport, Stage

BEGIN = """
import json, time
marks = [("start", time.perf_counter())]
def mark(what):
    marks.append((what, time.perf_counter()))
import fastdiff as fd
mark("import fastdiff")
be = fd.get_backend("cpu")
"""
CURVES = """
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
"""
UNET = """
X = fd.normal((64, 32, 32, 3), backend=be).clip(-1, 1)
mark("the backend and the first normals")
net = fd.UNet((32, 32, 3), channels=(32, 64, 128), blocks=2, head_width=32, groups=8)
model = fd.Diffusion(net, fd.Schedule.linear(1000), backend=be)
model.fit(X, steps=1, batch=16, data_range=(-1.0, 1.0), progress=False)
mark("its first training step, batch 16")
fd.sample(net, fd.samplers.ddim(model.schedule, 2, clip=1.0), n=16, backend=be)
mark("its first two steps of DDIM, 16 pictures")
"""
END = """
print(json.dumps([(what, at - before) for (_, before), (what, at) in zip(marks, marks[1:])]))
"""
TARGET = CacheTimes(cold=60.0, warm=3.0)  # seconds, at most, for all that a U-Net needs


def run(work: str, cache: Path) -> dict[str, float]:
    """Seconds of each stage in a new process with this kernel cache."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", BEGIN + work + END]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    stages = dict(json.loads(done.stdout))
    return stages | {"all of it": sum(stages.values())}


def measure(work: str, rounds: int) -> tuple[list[Stage], int]:
    """Median seconds of each stage, with nothing and with everything cached, and how many functions are."""
    cold, warm = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            cold.append(run(work, cache))
            kernels = len(list(cache.rglob("*.nbi")))
            warm.append(run(work, cache))
    middle = [{what: statistics.median(r[what] for r in done) for what in done[0]} for done in (cold, warm)]
    return [Stage(middle[0][what], middle[1][what], what) for what in middle[0]], kernels


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="compile_time.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    stages, kernels = measure(CURVES, args.rounds)
    of_unet, more = measure(UNET, args.rounds)
    of_unet[-1] = replace(of_unet[-1], what=f"all of it, {more} functions", target=TARGET)
    stages += [replace(stage, what=f"U-Net: {stage.what}") for stage in of_unet]
    report = CompileReport(header(cores()), kernels, stages)
    report.save(args.output, "compile-cpu")
    print(report.table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
