"""Samples to a store and training over ranks, on one and two processes: what both cost, and a plan for more of them.

``python benchmarks/scale.py`` writes results/workers-cpu.json and .md, in some six minutes of two cores. On a machine
that does other things only the overhead, which is of processor time, means something.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from machine import cores, header
from report import RESULTS, Growth, OverRanks, WorkersReport, load

import fastdiff as fd

POINTS, SEED = 50, 0
ROUNDS = 5
FEW = 1000  # rows of a chunk that needs no memory to speak of


def model() -> fd.Diffusion:
    """A model of curves; how good it is does not matter."""
    X = fd.data.harmonic_curves(2000, points=POINTS)
    made = fd.Diffusion(backend=fd.get_backend("cpu", threads=1))
    return made.fit(X, steps=50, progress=False, judge=False)


def processor_seconds(run: object, *args: object, **options: object) -> float:
    begun = time.process_time()
    run(*args, **options)  # type: ignore[operator]
    return time.process_time() - begun


def overhead(one: fd.Diffusion, chunk: int, chunks: int) -> tuple[float, float]:
    """Processor seconds of a chunk of `sample`, and the share that `sample_to` takes besides, in turns."""
    plain, stored = [], []
    for k in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            plain.append(sum(processor_seconds(one.sample, chunk, first_sample=i * chunk) for i in range(chunks)))
            options = {"chunk": chunk, "progress": False}
            stored.append(processor_seconds(fd.scale.sample_to, f"{folder}/{k}", one, chunks * chunk, **options))
    ratios = [b / a for a, b in zip(plain, stored, strict=True)]
    return min(plain) / chunks, statistics.median(ratios) - 1


def throughput(one: fd.Diffusion, workers: int, chunk: int, chunks: int) -> tuple[float, float, float]:
    """Samples a second of so many processes, by when chunks were done after the first of each; their start; all."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        fd.scale.sample_to(f"{folder}/a", one, chunks * chunk, chunk=chunk, client=workers, progress=False)
        done = sorted(path.stat().st_mtime for path in Path(folder, "a", "done").iterdir())
    first = done[workers - 1]
    return (chunks - workers) * chunk / (done[-1] - first), first - begun, done[-1] - begun


def hand_out(one: fd.Diffusion, chunks: int) -> float:
    """Seconds in which this process hands out a chunk and hears that it is done: those of chunks of nothing."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"chunk": 1, "client": 2, "progress": False, "sampler": "ddim", "steps": 1}
        fd.scale.sample_to(f"{folder}/a", one, chunks, **options)
        done = sorted(path.stat().st_mtime for path in Path(folder, "a", "done").iterdir())
    return (done[-1] - done[1]) / (chunks - 2)


def peak(one: fd.Diffusion, chunk: int) -> int:
    """Bytes that the memory of a worker has reached; how many steps a sample takes does not matter."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        options = {"chunk": chunk, "client": pool, "progress": False, "steps": 2}
        fd.scale.sample_to(f"{folder}/a", one, 3 * chunk, **options)
        return 1024 * pool.submit(_peak).result()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(one: fd.Diffusion, n: int, chunk: int, workers: int, steps: int) -> Growth:
    """Time and memory of many samples."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"chunk": chunk, "client": workers, "progress": False, "steps": steps}
        fd.scale.sample_to(f"{folder}/a", one, n, **options)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    of_all = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Growth(n, time.perf_counter() - begun, size, 1024 * of_all)


def over_ranks(steps: int) -> list[OverRanks]:
    """Training on two ranks beside one, by a launcher of MPI; nothing where there is none."""
    launcher = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if launcher is None:
        print("no mpiexec: no training over ranks (pip install mpi4py mpich)", file=sys.stderr)
        return []
    script = str(Path(__file__).with_name("scale_ranks.py"))
    program = [launcher, "-n", "2", sys.executable, "-m", "mpi4py", script, str(steps)]
    found = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [OverRanks(**row) for row in json.loads(found)]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a chunk")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the long run; 0: none")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler of the long run")
    parser.add_argument("--many", type=int, default=500_000, help="rows of a chunk whose memory is measured")
    parser.add_argument("--train", type=int, default=30, help="steps of a training over ranks; 0: none")
    parser.add_argument("--only", choices=["ranks"], help="measure that anew, and keep the rest of the results")
    args = parser.parse_args(argv)
    if args.only:
        kept = load(args.output / "workers-cpu.json")
        assert isinstance(kept, WorkersReport)
        now = header(cores(), "mpi4py")
        at = f" ({now.date}, commit {now.commit})"
        return written(replace(kept, ranks=over_ranks(args.train), ranks_at=at), args.output)
    one = model()
    one.sample(1000)
    chunk = max(100, int(2000 * args.seconds / processor_seconds(one.sample, 2000)))
    seconds, share = overhead(one, chunk, max(2, args.chunks // 4))
    runs = {workers: throughput(one, workers, chunk, args.chunks) for workers in (1, 2)}
    grown = [growth(one, args.rows // k, chunk, 2, args.steps) for k in (10, 1)] if args.rows else []
    small, large = peak(one, FEW), peak(one, args.many)  # after that the most memory of a process is that of these
    ranks = over_ranks(args.train) if args.train else []
    report = WorkersReport(
        header(cores(), "zarr", *(["mpi4py"] if ranks else [])),
        points=POINTS,
        chunk=chunk,
        seconds=seconds,
        overhead=share,
        start=runs[1][1] - chunk / runs[1][0],
        hand_out=hand_out(one, 20 * args.chunks),
        rates={str(workers): rate for workers, (rate, _, _) in runs.items()},
        whole={str(workers): whole for workers, (_, _, whole) in runs.items()},
        chunks=args.chunks,
        worker=small,
        chunks_of_memory=(large - small) / ((args.many - FEW) * POINTS * 4),
        growth=grown,
        growth_steps=args.steps,
        ranks=ranks,
    )
    return written(report, args.output)


def written(report: WorkersReport, output: Path) -> int:
    """Write and print the results."""
    report.save(output, "workers-cpu")
    print(report.table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
