"""Machines that are not there, simulated: samples on many workers, and training steps over many ranks."""

from __future__ import annotations

import heapq
import math
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
    add : float
        Seconds in which a rank adds its share to a byte of a sum.
    """

    seconds_of_a_byte: float
    delay: float
    add: float = 0.0

    def sum_seconds(self, ranks: int, size: int, piece: int) -> float:
        """Return how long the ordered sum of `fastdiff.ranks` takes for `size` bytes, in pieces.

        Piece by piece and rank by rank: a piece goes out when it has come and been added to, and when the one before
        it is gone.
        """
        pieces = max(1, math.ceil(size / piece))
        wire, add = size / pieces * self.seconds_of_a_byte, size / pieces * self.add
        came = [0.0] * pieces  # when this rank has each piece
        for _ in range(2 * (ranks - 1)):  # from the first to the last, and round to the one before that
            gone = 0.0
            for i in range(pieces):
                gone = max(gone, came[i] + add) + wire
                came[i] = gone + self.delay
        return came[-1] if ranks > 1 else 0.0
