"""Recordings on CUDA.

What is issued again and again, a network's passes, a whole training step and a whole sampling step, becomes a CUDA
graph when it comes for the second time: one launch instead of hundreds, on the same memory. Numbers that differ from
step to step are then read from device memory. Losses stay there too, until many steps have been issued. What a graph
launches is one chain, but for weight gradients, which lie beside it (`Runtime.aside`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastdiff.backends.cuda.device import crosses_half
from fastdiff.backends.cuda.optim import OptimOperations
from fastdiff.backends.cuda.step import StepOperations, law_of, split_output, step_plan
from fastdiff.backends.layers import Recording, Sampling
from fastdiff.backends.protocol import DEPTH, AdamW, Row, Training, TrainState
from fastdiff.kernels.cuda import runtime as runtimes
from fastdiff.noise import Draw

log = logging.getLogger("fastdiff")

Array = Any


class RecordingOperations(OptimOperations, StepOperations):
    """Operations that are done again, as graphs."""

    graphs = True

    def record(self, body: Callable[[], None], places: Sequence[Array | None] = ()) -> Recording:
        return _Call(_Graph(self), body)

    def record_training(self, gradient: Callable[[int], Array], state: TrainState, results: Array) -> Training:
        return _Training(self, gradient, state, results)

    def record_sampling(self, output: Callable[[], Array], state: Array) -> Sampling:
        return _Sampling(self, output, state)

    def _set_step(self, step: int, scalars: tuple[float, ...] = (0.0,) * 7) -> None:
        """Put the number of a training step, and the optimiser's scalars, where graphs find them."""
        if self.graphs:
            places = self._scratch("step", 1, np.uint32), self._scalars_at()
            self.runtime.launch("optim", "set_step", 1, 1, (step, scalars, *places))

    def _row_at(self) -> Array:
        """Where a recorded step finds its row and the noise law."""
        return self._scratch("row", runtimes.STRUCTURES["RowRecord"].itemsize, np.uint8)

    def _set_row(self, row: Array, draw: Draw) -> None:
        """Put a "TableRow" and the noise law there."""
        record = np.zeros(1, runtimes.STRUCTURES["RowRecord"])
        record["first_row"], record["step"], record["stream"], record["keys"] = law_of(draw)
        record["row"] = row
        self.runtime.launch("step", "set_row", 1, 1, (record, self._row_at()))

    def _step_deep_recorded(
        self, x: Array, out: Array | None, v: Array | None, memory: Sequence[Array], keep: int, rows: Array = None
    ) -> None:
        """Issue a step with the row that was set, of any kind, and noise of the `rows` (n,), where they are given."""
        m1, m2, m3 = (*memory, None, None, None)[:DEPTH]
        grid, block = self.runtime.grid_1d(len(x) * -(-x.shape[1] // 4))
        args = (x, out, v, m1, m2, m3, keep, self._row_at(), rows, *x.shape)
        self.runtime.launch("step", "step_deep_recorded", grid, block, args)


class _Graph:
    """Launches that come again: issued one by one the first time, when kernels are loaded and scratch grows, and from
    the second time on as a CUDA graph, made anew where the queue or memory of the backend's own has changed.
    """

    def __init__(self, be: RecordingOperations) -> None:
        self.be = be
        self._issued: tuple[int, int] | None = None  # on which queue, and after how many moves of memory
        self._replay: Callable[[], None] | None = None

    def run(self, issue: Callable[[], Any]) -> None:
        """Do issue(), which has done the same whenever it was given before."""
        be = self.be
        if not be.graphs or be.runtime.capturing:
            issue()
            return
        with be._lock:
            if self._issued != (be.runtime.queue(), be._moves):
                self._replay = None
                issue()
                self._issued = be.runtime.queue(), be._moves
                return
            if self._replay is None:
                try:
                    self._replay = be.runtime.capture(issue)
                except runtimes.CaptureError as error:
                    log.warning("no CUDA graphs from here on, every kernel is launched by itself: %s", error)
                    be.graphs = False
                    issue()
                    return
            self._replay()


class _Call(NamedTuple):
    """A recorded body."""

    graph: _Graph
    body: Callable[[], None]

    def run(self) -> None:
        self.graph.run(self.body)


class _Training:
    """A training step as one graph, which reads its number and the optimiser's scalars from device memory."""

    def __init__(
        self, be: RecordingOperations, gradient: Callable[[int], Array], state: TrainState, results: Array
    ) -> None:
        self.be, self.gradient, self.state, self.results = be, gradient, state, results
        self._graph, self._clip_norm = _Graph(be), math.nan

    def run(self, step: int, options: AdamW) -> None:
        be = self.be
        with be._lock:
            if options.clip_norm != self._clip_norm:  # a number in the graph
                self._graph, self._clip_norm = _Graph(be), options.clip_norm
            be._set_step(step, be._scalars(options))
            self._graph.run(lambda: be._issue_adamw(self.state, options, (self.gradient(step), self.results, step)))


class _Sampling:
    """A network and a sampler's step as one graph, which reads row and noise law from device memory."""

    def __init__(self, be: RecordingOperations, output: Callable[[], Array], state: Array) -> None:
        self.be, self.output, self.state = be, output, state
        self._graphs: dict[tuple[int, bool, bool, bool], _Graph] = {}

    def run(self, x: Array, memory: tuple[Array, ...], row: Row, clip: tuple[float, float] | None, draw: Draw) -> None:
        be, state = self.be, self.state
        if not be.graphs or be._twins or x.size == 0 or not row.evaluates:
            be.sampler_step(x, self.output() if row.evaluates else None, memory, row, clip, draw)
            return
        with be._lock:
            # The graph finds the memory at places of its own.
            space = be._scratch("memory", len(memory) * x.size)
            room = [space[k * x.size : (k + 1) * x.size].reshape(x.shape) for k in range(len(memory))]
            for own, array in zip(room, memory, strict=True):
                be.runtime.copy(own, array)
            plan = step_plan(row, clip, len(memory))
            crosses = crosses_half(draw.first_row, len(x))
            be._set_row(plan.record, draw)

            def issue() -> None:
                out, v = split_output(self.output(), row)
                if plan.deep:
                    be._step_deep_recorded(state, out, v, room, plan.keep)
                else:
                    arrays = state, out, room[0] if memory else None
                    after = be._row_at(), *x.shape
                    be._by_blocks("step", "step_recorded", arrays, after, crosses=crosses)

            self._graphs.setdefault((len(memory), plan.deep, row.r != 0, crosses), _Graph(be)).run(issue)
            be.runtime.copy(x, state)
            for own, array in zip(room, memory, strict=True):
                be.runtime.copy(array, own)
