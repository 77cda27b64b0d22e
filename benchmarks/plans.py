"""Machines that are not there, simulated: samples on many workers, and training steps over many ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Workers(NamedTuple):
    """What sampling on workers is made of, in seconds.

    Attributes
    ----------
    start : float
        Until a process is ready.
    chunk : float
        Of a chunk, in a worker.
    hand_out : float
        Of the one process that hands out a chunk and hears that it is done.
    write : float
        Of the store, which takes one chunk after the other.
    """

    start: float
    chunk: float
    hand_out: float
    write: float

    def seconds(self, chunks: int, workers: int) -> tuple[float, dict[str, float]]:
        """Return how long so many chunks take, and what share of that time each of all is at work.

        Chunk by chunk: whoever is free first is handed the next one, computes it, and writes it when the store is free.
        """
        free = [self.start] * min(workers, chunks)  # when each worker is, a heap
        driver = store = end = 0.0
        for _ in range(chunks):
            driver = max(driver, free[0]) + self.hand_out
            store = max(store, driver + self.chunk) + self.write
            heapq.heapreplace(free, store)
            end = max(end, store)
        busy = {
            "workers": chunks * (self.chunk + self.write) / (workers * end),
            "the driver": chunks * self.hand_out / end,
            "the store": chunks * self.write / end,
        }
        return end, busy


class Network(NamedTuple):
    """Links between neighbouring ranks, both directions at once.

    Attributes
    ----------
    seconds_of_a_byte : float
    delay : float
        Of a message.
    """

    seconds_of_a_byte: float
    delay: float

    def sum_seconds(self, ranks: int, up: Sequence[float], down: Sequence[float], adding: float = 0.0) -> float:
        """Return how long the ordered sum of `fastdiff.ranks` takes.

        `up` are the bytes of the messages that go from rank to rank, and `down` of those that bring the result to all,
        one for each. A message goes out when it has come and been added to, and when the one before it is gone. All
        ranks together add for so many seconds.
        """
        came = [0.0] * len(up)  # when this rank has each message
        for rank in range(ranks):
            busy = gone = 0.0
            for i, size in enumerate(up):
                busy = max(busy, came[i]) + adding / ranks * size / sum(up)
                gone = max(gone, busy) + size * self.seconds_of_a_byte
                came[i] = busy if rank == ranks - 1 else gone + self.delay
        for _ in range(ranks - 1):
            gone = 0.0
            for i, size in enumerate(down):
                gone = max(gone, came[i]) + size * self.seconds_of_a_byte
                came[i] = gone + self.delay
        return came[-1]
