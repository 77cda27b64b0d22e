"""The side of `gpu_run.py` that touches the GPU: does one job, given as JSON, and tells how far it is."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gpu
from gpu_events import end_with_parent, tell
from report import plain


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

    tell(gpu=be.runtime.device, cupy=cupy.__version__, threads=be.threads)
    from fastdiff.kernels.cuda.runtime import cached_cubin, entries, source_names
    from fastdiff.noise import Draw, Stream

    def build(source: str) -> None:
        began, fault = time.perf_counter(), ""
        try:
            cached_cubin(cupy.cuda.nvrtc, source, be.runtime.arch)
            be.runtime.kernel(source, next(iter(entries(source))))  # the driver takes it
        except Exception as error:  # noqa: BLE001 - the others may compile
            fault = str(error)
        tell(end=source, fault=fault, seconds=time.perf_counter() - began)

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, source_names()))
    out = be.empty((1000, 64))
    be.normal(out, Draw(0, Stream.INIT))
    if abs(be.to_numpy(out).std() - 1) > 0.1:
        raise AssertionError("normals have another deviation than 1")


def run_workloads(job: dict[str, Any]) -> None:
    """Time workloads, one after the other."""
    import cupy

    from fastdiff.backends.cuda import CudaBackend

    be, wait = CudaBackend(), cupy.cuda.runtime.deviceSynchronize
    for name in job["workloads"]:
        fault = ""
        tell(begin=name)
        try:
            for row in gpu.benchmark(
                be, wait, gpu.BY_NAME[name], quick=job["quick"], share=job["share"],
                tell=lambda way: tell(way=way), without=job["without"].get(name),
            ):  # fmt: skip
                tell(row=plain(row))
        except gpu.DeadError:
            raise
        except Exception as error:  # noqa: BLE001 - of whatever kind: the others are timed
            traceback.print_exc()
            fault = f"{type(error).__name__}: {error}"
            gpu.check_alive(wait, error)
        tell(end=name, fault=fault, good=not fault)
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        if peers := gpu.companions()[0]:
            peers.release()


def make_way(job: dict[str, Any]) -> None:
    """Make one way of one workload, so that its compiled code is found by who times it."""
    from fastdiff.backends.cuda import CudaBackend

    gpu.prepare(CudaBackend(), gpu.BY_NAME[job["workload"]], *gpu.companions()).makers[job["way"]]()


def main(argv: list[str]) -> None:
    """Do the job; what goes wrong with the process as a whole is told before it ends."""
    job = json.loads(argv[0])
    end_with_parent()
    try:
        {"start": start, "workloads": run_workloads, "make": make_way}[job["do"]](job)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        tell(dying=str(error) if isinstance(error, gpu.DeadError) else f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(3)  # a device that is dead may hang whoever takes leave of it


if __name__ == "__main__":
    main(sys.argv[1:])
