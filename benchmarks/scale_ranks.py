"""Training over ranks, measured: ``mpiexec -n 2 python benchmarks/scale_ranks.py STEPS`` prints JSON.

Each network takes steps alone, on one thread, and then together with the other ranks; and sums of its size travel while
nothing is computed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from mpi4py import MPI

import fastdiff as fd
from fastdiff.backends import Segment
from fastdiff.ranks import PARTS, Ranks

ROUNDS = 3
# Name, batch, and how many times the steps of the least one are a fair part of the time.
CASES = {"perceptron of curves": (4096, 4), "U-Net of 16 x 16 pixels": (64, 1)}


def made(name: str) -> tuple[fd.Diffusion, Any, dict[str, Any]]:
    """A model, its data, and how it is trained."""
    batch, _ = CASES[name]
    be = fd.get_backend("cpu", threads=1)
    if name.startswith("U-Net"):
        net = fd.UNet((16, 16, 1), channels=(32, 64), blocks=1, attention=(False, True), T=100)
        X = np.random.default_rng(0).integers(0, 255, (256, 16, 16, 1), np.uint8)
        return fd.Diffusion(net, backend=be), X, {"batch": batch, "accumulate": PARTS}
    return fd.Diffusion(backend=be), fd.data.harmonic_curves(2000), {"batch": batch}


def seconds_of_steps(model: fd.Diffusion, X: Any, steps: int, **options: Any) -> float:
    """Seconds of a step."""
    begun = time.perf_counter()
    model.fit(X, steps=steps, progress=False, judge=False, **options)
    return (time.perf_counter() - begun) / steps


def seconds_of_a_sum(ranks: Ranks, size: int, rounds: int = 20) -> float:
    """Seconds in which so many values are summed in order, and nothing else is done."""
    sums = np.zeros(size, np.float32)
    share = np.ones(size, np.float32)

    def add(part: slice) -> None:
        sums[part] += share[part]

    ranks.sum([Segment(sums, add, sums)], [0.0])
    begun = time.perf_counter()
    for _ in range(rounds):
        ranks.sum([Segment(sums, add, sums)], [0.0])
    return (time.perf_counter() - begun) / rounds


def main() -> None:
    steps, world = int(sys.argv[1]), MPI.COMM_WORLD
    found = []

    def meet() -> None:
        """Wait for the others without taking their core."""
        request = world.Ibarrier()
        while not request.Test():
            time.sleep(1e-3)

    for name, (batch, share) in CASES.items():
        ranks = Ranks(world)
        (alone, X, options), (together, _, _) = made(name), made(name)
        if ranks.rank == 0:
            seconds_of_steps(alone, X, 2, **options)  # compiles
        meet()
        seconds_of_steps(together, X, 2, comm=ranks, **options)
        by_itself, shared, sent = [0.0] * ROUNDS, [0.0] * ROUNDS, 0.0
        for i in range(ROUNDS):
            if ranks.rank == 0:
                by_itself[i] = seconds_of_steps(alone, X, share * steps, **options)
            meet()
            ranks.sent = 0
            shared[i] = seconds_of_steps(together, X, share * steps, comm=ranks, **options)
            sent = sum(world.allgather(ranks.sent)) / (share * steps)
        assert together.net is not None
        size = together.net.layout.size
        found.append(
            {
                "what": f"{name}, batch {batch}", "ranks": ranks.size, "parameters": size,
                "alone": statistics.median(by_itself), "together": statistics.median(shared),
                "summed": seconds_of_a_sum(ranks, size), "sent": sent, "least": 2 * (ranks.size - 1) * 4 * size,
                "equal": ranks.rank > 0 or together.digest(ema=False) == alone.digest(ema=False),
            }
        )  # fmt: skip
    if world.Get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
