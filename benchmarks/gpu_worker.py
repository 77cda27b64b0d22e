"""The side of `gpu_run.py` that touches the GPU: does one job, given as JSON, and tells how far it is."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_profile
import gpu_sweep
from gpu_events import end_with_parent, tell
from report import plain

from fastdiff.backends.cuda import tuning


def start(job: dict[str, Any]) -> None:
    """Start the backend; compile and load all sources, as many at a time as there are cores."""
    del job
    from fastdiff.errors import BackendError

    try:
        from fastdiff.backends.cuda import CudaBackend

        be = CudaBackend()
    except BackendError as error:
        tell(unusable=str(error))
        return
    import cupy

    tell(gpu=be.runtime.device, arch=be.runtime.arch, cupy=cupy.__version__, threads=be.threads)
    from fastdiff.kernels.cuda.runtime import cached_cubin, entries, source_names

    def build(source: str) -> None:
        began, fault = time.perf_counter(), ""
        try:
            cached_cubin(cupy.cuda.nvrtc, source, be.runtime.arch)
            be.runtime.kernel(source, next(iter(entries(source))))  # the driver takes it
        except Exception as error:  # noqa: BLE001 - the others may compile
            fault = str(error)
        tell(end=source, fault=fault, seconds=time.perf_counter() - began)

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, [*source_names(), *(f"conv_mma.{n}" for n in gpu_sweep.STAGES[1:])]))
    for source in gpu.FAMILIES:
        fault = ""
        try:
            gpu.launch_first(be, source)
        except Exception as error:  # noqa: BLE001 - of whatever kind: the others may run
            fault = f"{type(error).__name__}: {error}"
            gpu.check_alive(cupy.cuda.runtime.deviceSynchronize, error)
        tell(launched=source, fault=fault)


def each(names: list[str], one: Callable[[str], None], after: Callable[[], None] = lambda: None) -> None:
    """Do work by name, and tell of each how it ended."""
    import cupy

    wait = cupy.cuda.runtime.deviceSynchronize
    for name in names:
        fault = ""
        tell(begin=name)
        try:
            one(name)
        except gpu.DeadError:
            raise
        except Exception as error:  # noqa: BLE001 - of whatever kind: the others are done
            traceback.print_exc()
            fault = f"{type(error).__name__}: {error}"
            gpu.check_alive(wait, error)
        tell(end=name, fault=fault, good=not fault)
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        after()


def run_workloads(job: dict[str, Any]) -> None:
    """Time workloads, one after the other."""
    import cupy

    from fastdiff.backends.cuda import CudaBackend

    be, wait = CudaBackend(), cupy.cuda.runtime.deviceSynchronize

    def one(name: str) -> None:
        for row in gpu.benchmark(
            be, wait, gpu.BY_NAME[name], quick=job["quick"], share=job["share"],
            tell=lambda way: tell(way=way), without=job["without"].get(name),
        ):  # fmt: skip
            tell(row=plain(row))

    def release() -> None:
        if peers := gpu.companions()[0]:
            peers.release()

    each(job["workloads"], one, release)


def make_way(job: dict[str, Any]) -> None:
    """Make one way of one workload, so that its compiled code is found by who times it."""
    from fastdiff.backends.cuda import CudaBackend

    gpu.prepare(CudaBackend(), gpu.BY_NAME[job["workload"]], *gpu.companions()).makers[job["way"]]()


def sweep(job: dict[str, Any]) -> None:
    """Time products on every tile."""
    import cupy

    from fastdiff.backends.cuda import CudaBackend

    runtime, cases, wait = CudaBackend().runtime, gpu_sweep.cases(job["quick"]), cupy.cuda.runtime.deviceSynchronize
    seconds, stages = gpu_sweep.SECONDS, gpu_sweep.STAGES
    if job["quick"]:
        seconds, stages = seconds / 50, stages[:2]

    def one(name: str) -> None:
        for row in gpu_sweep.sweep(
            lambda precision: CudaBackend(runtime, precision=precision),
            cases[name],
            lambda run: gpu.turn(run, wait, seconds),
            stages,
        ):
            tell(row=plain(row))

    each(job["cases"], one)


def profile(job: dict[str, Any]) -> None:
    """Say where the time of a training step goes, by precision."""
    import cupy

    from fastdiff.backends.cuda import CudaBackend

    runtime = CudaBackend().runtime
    workload = replace(gpu.BY_NAME["unet-train-16"], units=gpu_profile.STEPS)
    if job["quick"]:
        workload = replace(workload, n=1, shape=(4, 4, 3), channels=(32,))
    source = runtime.zeros((gpu.COPY_BYTES // 4 // (10_000 if job["quick"] else 1),))
    target = runtime.zeros(source.shape)

    def copies() -> None:
        for _ in range(gpu_profile.COPIES):
            runtime.copy(target, source)

    def one(precision: str) -> None:
        be = CudaBackend(runtime, precision=precision, graphs=False)
        tell(row=plain(gpu_profile.profile(be, workload, cupy.cuda, copies, precision)))

    each(job["cases"], one)


def main(argv: list[str]) -> None:
    """Do the job; what goes wrong with the process as a whole is told before it ends."""
    job = json.loads(argv[0])
    end_with_parent()
    try:
        jobs = {"start": start, "workloads": run_workloads, "make": make_way, "sweep": sweep, "profile": profile}
        if "measured" in job:
            tuning.MEASURED = Path(job["measured"])
        jobs[job["do"]](job)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        tell(dying=str(error) if isinstance(error, gpu.DeadError) else f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(3)  # a device that is dead may hang whoever takes leave of it


if __name__ == "__main__":
    main(sys.argv[1:])
