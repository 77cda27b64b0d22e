"""Training over ranks, measured: ``mpiexec -n 2 python benchmarks/scale_ranks.py STEPS`` prints JSON.

Each network takes steps alone, on one thread, and then together with the other ranks. What a plan is made of is
measured apart: steps of ranks that have all chunks, one after the other and beside each other, steps of one chunk, and
sums while nothing is computed. See `report.OverRanks`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

import fastdiff as fd
from fastdiff.backends import Segment
from fastdiff.ranks import PARTS, Ranks

ROUNDS = 3
TILE = 128  # rows that are a chunk of a perceptron
# Name, batch, and how many times the steps of the least one are a fair part of the time.
CASES = {"perceptron of curves": (4096, 4), "U-Net of 16 x 16 pixels": (64, 1)}


class Listening:
    """A communicator that writes down the sizes of messages, in bytes."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Isend(self, array: Any, dest: int) -> Any:
        self.sizes.append(array.nbytes)
        return self.comm.Isend(array, dest=dest)


class Timed(Ranks):
    """Ranks that know how long they have been adding, or waiting for others."""

    adding = 0.0

    def sum(self, segments: Sequence[Segment], losses: Sequence[float]) -> float:
        begun = time.perf_counter()
        found = super().sum(segments, losses)
        self.adding += time.perf_counter() - begun
        return found


def model(name: str) -> fd.Diffusion:
    be = fd.get_backend("cpu", threads=1)
    if not name.startswith("U-Net"):
        return fd.Diffusion(backend=be)
    net = fd.UNet((16, 16, 1), channels=(32, 64), blocks=1, attention=(False, True), T=100)
    return fd.Diffusion(net, backend=be)


def how(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Data of a network, how it is trained, and how on one chunk."""
    batch, _ = CASES[name]
    if name.startswith("U-Net"):
        X = np.random.default_rng(0).integers(0, 255, (256, 16, 16, 1), np.uint8)
        return X, {"batch": batch, "accumulate": PARTS}, {"batch": batch // PARTS, "accumulate": 1}
    return fd.data.harmonic_curves(2000), {"batch": batch}, {"batch": TILE}


def seconds_of_steps(model: fd.Diffusion, X: Any, steps: int, **options: Any) -> float:
    """Seconds of a step."""
    begun = time.perf_counter()
    model.fit(X, steps=steps, progress=False, judge=False, **options)
    return (time.perf_counter() - begun) / steps


def seconds_of_adding(size: int) -> float:
    """Seconds in which so many values are added to as many: a rank that has all parts adds them as they come."""
    sums, part = np.zeros((2, size), np.float32)
    begun = time.perf_counter()
    for _ in range(100):
        sums += part
    return (time.perf_counter() - begun) / 100


def seconds_of_a_sum(ranks: Ranks, size: int, rounds: int = 20) -> float:
    """Seconds in which so many values are summed in order, and nothing else is done."""
    sums, share = np.zeros((2, size), np.float32)

    def add(part: slice) -> None:
        sums[part] += share[part]

    segments = [Segment(sums, add, sums)] if size else []
    ranks.sum(segments, [0.0])
    begun = time.perf_counter()
    for _ in range(rounds):
        ranks.sum(segments, [0.0])
    return (time.perf_counter() - begun) / rounds


def measured(name: str, steps: int, world: Any) -> dict[str, Any]:
    """What `report.OverRanks` says of a network; on the first rank all of it."""
    ranks, by_itself = Ranks(world), Timed(MPI.COMM_SELF)
    X, options, of_one = how(name)
    models = {each: model(name) for each in ("alone", "lone", "beside", "few", "together")}
    ways = {each: options | {"comm": by_itself} for each in models} | {"alone": options, "together": options}
    ways["few"], ways["together"] = of_one | {"comm": by_itself}, options | {"comm": ranks}
    took: dict[str, list[float]] = {each: [] for each in models}

    def meet() -> None:
        """Wait for the others without taking their core."""
        request = world.Ibarrier()
        while not request.Test():
            time.sleep(1e-3)

    def step(each: str, count: int) -> None:
        meet()
        if ranks.rank == 0 or each not in ("alone", "lone"):
            by_itself.adding = 0.0
            took[each].append(seconds_of_steps(models[each], X, count, **ways[each]))

    for each in models:  # the first steps compile, and look at the data
        step(each, 2)
        took[each].clear()
    adding, sent = [], 0.0
    for _ in range(ROUNDS):
        for each in models:
            ranks.sent = 0
            step(each, steps)
            if each == "beside":
                adding.append(by_itself.adding / steps)
        sent = sum(world.allgather(ranks.sent)) / steps
    trained = models["together"]
    assert trained.net is not None
    size = trained.net.layout.size
    same = ranks.rank > 0 or trained.digest(ema=False) == models["alone"].digest(ema=False)
    listening = Listening(world)
    seconds_of_steps(trained, X, 1, comm=Ranks(listening), **options)
    messages = world.allgather(listening.sizes)
    chunks = options.get("accumulate", -(-options["batch"] // TILE))
    return {each: statistics.median(times) for each, times in took.items() if times} | {
        "what": f"{name}, batch {options['batch']}", "ranks": ranks.size, "parameters": size, "chunks": chunks,
        "adding": statistics.median(adding) if "accumulate" not in options else chunks * seconds_of_adding(size),
        "nothing": seconds_of_a_sum(ranks, 0), "summed": seconds_of_a_sum(ranks, size), "up": messages[0],
        "down": messages[-1], "sent": sent, "least": 2 * (ranks.size - 1) * 4 * size, "equal": same,
    }  # fmt: skip


def main() -> None:
    steps, world = int(sys.argv[1]), MPI.COMM_WORLD
    found = [measured(name, share * steps, world) for name, (_, share) in CASES.items()]
    if world.Get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
