"""Noise, forward noising and a sampler's step on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cpu.workers import MIN_LIGHT_PIECE, MIN_PIECE, Array, Body, Scripted
from fastdiff.backends.protocol import DEPTH, Row
from fastdiff.kernels.cpu import noise as noise_kernels
from fastdiff.kernels.cpu import step as step_kernels
from fastdiff.noise import Draw, round_keys

keys_of = lru_cache(maxsize=64)(round_keys)  # which take longer than many a draw


def law_of(draw: Draw) -> tuple[Any, int, int, Array]:
    """A draw as the kernels take it: a `noise_kernels.Law`."""
    return np.uint64(draw.first_row), draw.step, int(draw.stream), keys_of(draw.seed)


def numbers_of(rows: Sequence[Row], clip: tuple[float, float] | None) -> Array:
    """The numbers of rows as the kernels take them: columns `step_kernels.P` ... `step_kernels.HIGH`."""
    return np.array([(*row[1:11], *(clip or (-np.inf, np.inf))) for row in rows], np.float32)


def _room() -> tuple[Array, Array, Array]:
    """What a thread draws in, made once: a `noise_kernels.Room`."""
    k = noise_kernels
    return np.empty((4, k.CHUNK), np.uint32), np.empty(k.WORKSPACE, np.float32), np.empty((4, 3), np.int64)


class StepOperations(Scripted):
    """Noise, and what it goes into."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._rooms = [_room() for _ in range(threads)]

    def normal(self, out: Array, draw: Draw) -> None:
        flat, law = out.reshape(-1), law_of(draw)

        def body(worker: int, start: int, stop: int) -> None:
            noise_kernels.normal_range(start, stop, flat, *out.shape, law, self._rooms[worker])

        self._chunks(body, out.shape)

    def forward_noise(
        self,
        x0: Array,
        t: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        eps: Array,
        draw: Draw,
    ) -> None:
        arrays = (
            x0.reshape(-1),
            t,
            signal.astype(np.float32),
            noise.astype(np.float32),
            out.reshape(-1),
            eps.reshape(-1),
        )
        law = law_of(draw)

        def body(worker: int, start: int, stop: int) -> None:
            step_kernels.forward_noise_range(start, stop, *arrays, *x0.shape, law, self._rooms[worker])

        self._chunks(body, x0.shape)

    def _chunks(self, body: Body, shape: tuple[int, ...]) -> None:
        if 0 in shape:
            return
        chunks = noise_kernels.chunks_of(*shape)
        with self._workers.lock:
            self._workers.run(body, chunks, max(1, MIN_PIECE // (4 * noise_kernels.CHUNK)))

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        flat = x.reshape(-1)
        outs = flat if out is None else out.reshape(-1)
        outs, v = (outs, outs) if row.r == 0 else outs.reshape(2, flat.size)
        remembered = (*(m.reshape(-1) for m in memory), flat, flat, flat)[:DEPTH]
        numbers = numbers_of((row,), clip)[0]
        depth = len(memory) if row.evaluates else 0
        law = law_of(draw)

        def noisy(worker: int, start: int, stop: int) -> None:
            step_kernels.step_range(
                start, stop, flat, outs, v, remembered, numbers, depth, *x.shape, law, self._rooms[worker]
            )

        def quiet(worker: int, start: int, stop: int) -> None:
            del worker
            step_kernels.row_range(start, stop, flat, outs, remembered, numbers, depth)

        if row.s != 0:
            self._chunks(noisy, x.shape)
        else:
            with self._workers.lock:
                self._workers.run(quiet, flat.size, MIN_LIGHT_PIECE)
