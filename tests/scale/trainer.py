"""Trainings over ranks, as a program that a launcher begins: FOLDER OTHER, FOLDER victim, FOLDER hosts or FOLDER nccl.

It trains each of `CASES` into FOLDER, and goes on with what OTHER, a folder of another number of ranks, had halfway;
or it trains curves, until one rank is killed; or each case for a few steps on the host run of the CUDA kernels.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

import fastdiff as fd
from fastdiff.ranks import Ranks

CASES = {
    "curves": (1000, fd.data.harmonic_curves(400, points=12)),
    "pictures": (16, np.random.default_rng(0).integers(0, 255, (60, 8, 8, 1), np.uint8)),
}
STEPS, EVERY, KILLED_AT = 200, 20, 50
FEW = 4  # steps, and so large batches, on the host run
FEW_ROWS = {"curves": 24, "pictures": 8}
QUIET = {"progress": False, "judge": False}


def made(case, backend="cpu"):
    if case == "curves":
        return fd.Diffusion(fd.MLP(12, hidden=(32, 32), T=20), backend=backend, seed=3)
    net = fd.UNet((8, 8, 1), channels=(8, 16), blocks=1, attention=(False, True), T=10)
    return fd.Diffusion(net, backend=backend, seed=3)


def trained(folder, other, comm):
    """Digests by case, and the bytes that were sent."""
    found = []
    for case, (batch, X) in CASES.items():
        ranks = Ranks(comm)
        options = {"batch": batch, "comm": ranks, "every": STEPS // 2, "keep": 2, **QUIET}
        model = made(case).fit(X, steps=STEPS, checkpoint=folder / f"{case}.safetensors", **options)
        sent = sum(comm.allgather(ranks.sent))
        digests = {model.digest(ema=False)}
        half = other / f"{case}-{STEPS // 2:06}.safetensors"
        if half.exists():
            again = fd.load(half, backend="cpu").fit(X, steps=STEPS // 2, batch=batch, comm=comm, **QUIET)
            digests.add(again.digest(ema=False))
        found.append((case, sent, *set().union(*comm.allgather(digests))))
    return found


def killed(folder, comm):
    """Train for ever; the first rank kills the last one."""
    last = comm.allgather(os.getpid())[-1]

    def callback(step, loss):
        if comm.Get_rank() == 0 and step == KILLED_AT:
            os.kill(last, signal.SIGKILL)

    batch, X = CASES["curves"]
    path = folder / "curves.safetensors"
    made("curves").fit(
        X, steps=1 << 20, batch=batch, comm=comm, callback=callback, checkpoint=path, every=EVERY, **QUIET
    )


def on_host_run(comm, nccl):
    """Digests by case, of the host run of the CUDA kernels on a pretended device, and the bytes that were sent."""
    sys.path.append(str(Path(__file__).parents[1]))
    from device_array import DeviceRuntime
    from fake_nccl import FakeNccl

    from fastdiff.backends.cuda import CudaBackend

    found = []
    for case, (_, X) in CASES.items():
        be, ranks = CudaBackend(DeviceRuntime()), Ranks(comm)
        if nccl:
            be.runtime.place, be.runtime.nccl = f"GPU {ranks.rank}", FakeNccl(comm)
        model = made(case, be).fit(X, steps=FEW, batch=FEW_ROWS[case], comm=ranks, **QUIET)
        digests = set(comm.allgather(model.digest(ema=False)))
        found.append((case, sum(comm.allgather(ranks.sent)), *digests))
    return found


if __name__ == "__main__":
    folder, other = map(Path, sys.argv[1:])
    world = MPI.COMM_WORLD
    if other == Path("victim"):
        killed(folder, world)
    on_host = str(other) in ("hosts", "nccl")
    found = on_host_run(world, str(other) == "nccl") if on_host else trained(folder, other, world)
    if world.Get_rank() == 0:
        for line in found:
            sys.stdout.write(" ".join(map(str, line)) + "\n")
