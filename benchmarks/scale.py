"""Samples to a store on one and on two processes: what the store costs, what memory, and a plan for more of both.

``python benchmarks/scale.py`` writes results/workers-cpu.json and .md. On a machine that does other things only the
overhead, which is of processor time, means something.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from machine import cores, header
from report import RESULTS, Growth, WorkersReport

import fastdiff as fd

POINTS, SEED = 50, 0
ROUNDS = 5


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


def throughput(one: fd.Diffusion, workers: int, chunk: int, chunks: int) -> tuple[float, float]:
    """Samples a second of so many processes, by when chunks were done after the first of each; and their start."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        fd.scale.sample_to(f"{folder}/a", one, chunks * chunk, chunk=chunk, client=workers, progress=False)
        done = sorted(path.stat().st_mtime for path in Path(folder, "a", "done").iterdir())
    first = done[workers - 1]
    return (chunks - workers) * chunk / (done[-1] - first), first - begun


def peak(one: fd.Diffusion, chunk: int) -> int:
    """Bytes that the memory of a worker has reached."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        fd.scale.sample_to(f"{folder}/a", one, 3 * chunk, chunk=chunk, client=pool, progress=False)
        return 1024 * pool.submit(_peak).result()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(one: fd.Diffusion, n: int, chunk: int, workers: int) -> Growth:
    """Time and memory of many samples."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fd.scale.sample_to(f"{folder}/a", one, n, chunk=chunk, client=workers, progress=False)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    of_all = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Growth(n, time.perf_counter() - begun, size, 1024 * of_all)


def step_seconds(one: fd.Diffusion, batch: int = 256, steps: int = 300) -> float:
    """Processor seconds of a training step."""
    X = fd.data.harmonic_curves(2000, points=POINTS)
    return processor_seconds(one.fit, X, steps=steps, batch=batch, progress=False, judge=False) / steps


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a chunk")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the long run; 0: none")
    args = parser.parse_args(argv)
    one = model()
    one.sample(1000)
    chunk = max(100, int(2000 * args.seconds / processor_seconds(one.sample, 2000)))
    seconds, share = overhead(one, chunk, max(2, args.chunks // 4))
    rates = {workers: throughput(one, workers, chunk, args.chunks) for workers in (1, 2)}
    small, large = peak(one, 1000), peak(one, 20 * chunk)
    assert one.net is not None
    report = WorkersReport(
        header(cores(), "zarr"),
        points=POINTS,
        chunk=chunk,
        seconds=seconds,
        overhead=share,
        start=rates[1][1],
        rates={str(workers): rate for workers, (rate, _) in rates.items()},
        worker=small,
        chunks_of_memory=(large - small) / (19.9 * chunk * POINTS * 4),
        step=step_seconds(one),
        parameters=one.net.layout.count,
        growth=[growth(one, args.rows // k, chunk, 2) for k in (10, 1)] if args.rows else [],
    )
    report.save(args.output, "workers-cpu")
    print(report.table(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
