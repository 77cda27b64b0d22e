"""The worker of `make gpu` without a GPU: its jobs on the host run of the kernels.

FASTDIFF_TEST_BROKEN names a workload that raises, and after a colon one that finds the device dead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from device_array import DeviceRuntime

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_worker

from fastdiff.backends import cuda
from fastdiff.kernels.cuda import runtime

be, dead = cuda.CudaBackend(DeviceRuntime()), []
be.runtime.arch = "90"
be.runtime.kernel = lambda source, entry: runtime.entries(source)[entry]


def wait():
    if dead:
        raise RuntimeError("an illegal memory access was encountered")


def compiled(nvrtc, source, arch):
    assert (nvrtc, arch) == ("nvrtc", "90")
    if source == "optim":
        raise RuntimeError("optim.cu does not compile")


prepare = gpu.prepare
raises, _, dies = os.environ.get("FASTDIFF_TEST_BROKEN", ":").partition(":")


def broken(be, workload, *others):
    ways = prepare(be, workload, *others)
    if workload.name == raises:
        raise AssertionError("they differ")
    if workload.name == dies:
        dead.append(workload.name)
        ways.makers["ours"] = wait
    return ways


gpu.prepare = broken
gpu.importlib.util.find_spec = lambda name: None
cuda.CudaBackend = lambda *args, **options: be
runtime.cached_cubin = compiled
sys.modules["cupy"] = SimpleNamespace(
    __version__="14.2.0",
    cuda=SimpleNamespace(runtime=SimpleNamespace(deviceSynchronize=wait), nvrtc="nvrtc"),
    get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
)

if __name__ == "__main__":
    gpu_worker.main(sys.argv[1:])
