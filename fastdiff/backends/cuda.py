"""The CUDA backend: kernels of our own on CuPy arrays, float32.

Arrays and launches belong to a runtime (`fastdiff.kernels.cuda.runtime`), so that the same code runs where there is
no GPU, on a runtime that executes the kernels on the CPU. Work is issued on the current stream and not waited for,
except where a Python number is returned.

What is issued again and again, a network's passes, a whole training step and a whole sampling step, becomes a CUDA
graph when it comes for the second time: one launch instead of hundreds, on the same memory. Numbers that differ from
step to step are then read from device memory. Losses stay there too, until many steps have been issued.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import CONVOLUTIONS, PRECISIONS, AdamW, Row, Training, TrainState
from fastdiff.backends.cuda_conv import ConvOperations
from fastdiff.backends.cuda_covariance import CovarianceOperations
from fastdiff.backends.cuda_cudnn import Cudnn
from fastdiff.backends.cuda_layers import LayerOperations
from fastdiff.backends.cuda_mlp import MLPOperations
from fastdiff.backends.layers import Recording, Sampling
from fastdiff.errors import ArgumentError, BackendError, check_choice
from fastdiff.noise import Draw, round_keys

try:
    from fastdiff.kernels.cuda import runtime as runtimes
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("fastdiff"):
        raise
    raise BackendError("fastdiff is imported from a source tree that is not installed: run pip install -e .") from error

log = logging.getLogger("fastdiff")

Array = Any

VECTOR = 16  # bytes that are read and written at once where everything is aligned to them
WIDE = 16  # a row of a multiple of this many values has four aligned quarters
SUM_CHUNK, SUM_THREADS = 4096, 256  # as in optim.cu
TABLES = 32  # kept on the device


@lru_cache(maxsize=64)
def _keys(seed: int) -> npt.NDArray[Any]:
    keys = np.zeros(1, runtimes.STRUCTURES["RoundKeys"])
    keys["words"] = round_keys(seed).reshape(1, -1)
    return keys


def _law(draw: Draw) -> tuple[int, int, int, npt.NDArray[Any]]:
    """First row, step, stream and keys, as the kernels take them."""
    return draw.first_row, draw.step, int(draw.stream), _keys(draw.seed)


def _row_record(row: Row, clip: tuple[float, float] | None, *, wanted: bool) -> tuple[Any, ...]:
    """A "TableRow"; without `wanted` only the row's own terms take x0."""
    with np.errstate(over="ignore"):
        p, q, a, b, c, e, s = np.array((row.p, row.q, row.a, row.b, row.c1, row.e, row.s), np.float32)
    if b == 0 and not wanted:
        p = q = np.float32(0)
    return p, q, a, b, c, e, s, *(clip or (-np.inf, np.inf))


def _numba_twins() -> Any:
    try:
        from fastdiff.kernels.cuda import numba_twins
    except ImportError as error:
        raise BackendError(
            f"kernels='numba' needs Numba's CUDA target: pip install 'fastdiff-engine[cuda13]' ({error})"
        ) from error
    return numba_twins


class CudaBackend(ConvOperations, CovarianceOperations, LayerOperations, MLPOperations):
    """CUDA kernels, float32.

    Parameters
    ----------
    runtime : Runtime, optional
        Where arrays and kernels live; by default CuPy on the current device.
    kernels : {"raw", "numba"}, optional
        "numba": forward noising and the sampler step in Numba's CUDA target, of the same bits; for comparison.
    precision : {"float32", "bf16"}, optional
        "bf16": convolutions of image networks on tensor cores, which round what they multiply to bfloat16 and add in
        float32. Parameters, activations and everything else stay float32.
    graphs : bool, optional
        Whether work that comes again is launched as a CUDA graph. Changes no bits. It ends with a line in the log
        where a device refuses to capture one.
    convolutions : {"own", "cudnn"}, optional
        "cudnn": what cuDNN can do is done by it; see `fastdiff.backends.cuda_cudnn`.

    Raises
    ------
    BackendError
        CuPy, the driver or a GPU is missing, or the driver is too old; or cuDNN, where it is asked for.
    """

    name = "cuda"
    threads = 1
    steps_ahead = 64

    def __init__(
        self,
        runtime: runtimes.Runtime | None = None,
        kernels: str = "raw",
        precision: str = "float32",
        graphs: bool = True,
        convolutions: str = "own",
    ) -> None:
        self.kernels = check_choice("kernels", kernels, ["raw", "numba"])
        self.precision = check_choice("precision", precision, PRECISIONS)
        if not isinstance(graphs, bool):
            raise ArgumentError("graphs", repr(graphs), "True or False")
        self.graphs = graphs
        self.convolutions = check_choice("convolutions", convolutions, CONVOLUTIONS)
        self.runtime: runtimes.Runtime = runtimes.CupyRuntime() if runtime is None else runtime
        self._twins = _numba_twins() if kernels == "numba" else None
        self._lock = threading.RLock()  # two launches that share a buffer follow each other
        self._tables: OrderedDict[tuple[int, bytes], Array] = OrderedDict()
        self._scratches: dict[tuple[int, str], Array] = {}
        self._moves = 0  # how often scratch or a table that graphs may use has gone
        self._cudnn = Cudnn(self.runtime, precision, self._scratch) if convolutions == "cudnn" else None

    def __reduce__(self) -> tuple[Any, tuple[Any, str, str, bool, str]]:
        return type(self), (self.runtime, self.kernels, self.precision, self.graphs, self.convolutions)

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        return self.runtime.asarray(value, np.float32 if dtype is None else dtype)

    def owns(self, value: Any) -> bool:
        return self.runtime.owns(value)

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        return self.runtime.to_numpy(array)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return self.runtime.empty(shape, dtype)

    def queue(self) -> int:
        return self.runtime.queue()

    def normal(self, out: Array, draw: Draw) -> None:
        self._by_blocks("noise", "normal", (out,), (*out.shape, *_law(draw)))

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
        tables = self._table(signal), self._table(noise)
        if self._twins:
            self._twins.forward_noise(x0, t, *tables, out, eps, draw, queue=self.runtime.queue())
            return
        first, _, stream, keys = _law(draw)
        after = (*x0.shape, first, stream, keys)
        self._by_blocks("noise", "forward_noise", (x0, out, eps), after, (x0, t, *tables, out, eps))

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        if self._twins:
            self._twins.sampler_step(x, out, memory, row, clip, draw, queue=self.runtime.queue())
            return
        previous = memory[0] if memory and (row.evaluates or row.c1 != 0) else None
        if previous is not None and not row.evaluates:
            previous = previous.copy()  # what the kernel writes there is not remembered
        record = _row_record(row, clip, wanted=previous is not None)
        arrays = (x, out, previous)
        if record[6] != 0:
            after = (record, *x.shape, *_law(draw))
            self._by_blocks("step", "step_noisy", arrays, after)
        elif x.size:
            fours = self._aligned(*arrays)
            grid, block = self.runtime.grid_1d(-(-x.size // 4) if fours else x.size)
            self.runtime.launch("step", "step_quiet", grid, block, (*arrays, record, x.size, fours))

    def address(self, array: Array) -> int:
        return self.runtime.address(array)

    def record(self, body: Callable[[], None], places: Sequence[Array | None] = ()) -> Recording:
        return _Call(_Graph(self), body)

    def record_training(self, gradient: Callable[[int], Array], state: TrainState, results: Array) -> Training:
        return _Training(self, gradient, state, results)

    def record_sampling(self, output: Callable[[], Array], state: Array) -> Sampling:
        return _Sampling(self, output, state)

    def adamw(self, state: TrainState, options: AdamW) -> float:
        with self._lock:
            norm = self._issue_adamw(state, options)
            return float(self.runtime.to_numpy(norm)[0])

    def finish_step(self, loss: Array, step: int, state: TrainState, options: AdamW, results: Array) -> None:
        with self._lock:
            self._issue_adamw(state, options, (loss, results, step))

    def _step_at(self) -> Array | None:
        """Where a graph that is being captured finds the training step; None: it is a number."""
        return self._scratch("step", 1, np.uint32) if self.runtime.capturing else None

    def _scalars_at(self) -> Array:
        return self._scratch("scalars", runtimes.STRUCTURES["AdamWScalars"].itemsize, np.uint8)

    def _issue_adamw(self, state: TrainState, o: AdamW, training: tuple[Array, Array, int] | None = None) -> Array:
        """Issue an optimiser step, of a training with its loss, its results and its number.

        Once the work is done, what is returned holds the norm.
        """
        params, grads, m, v, average = state
        launch, size = self.runtime.launch, params.size
        chunks = max(1, -(-size // SUM_CHUNK))
        sums, norm = self._scratch("square sums", chunks, np.float64), self._scratch("state", 2, np.float64)
        launch("optim", "square_sums", *self.runtime.grid_1d(chunks * SUM_THREADS, SUM_THREADS), (grads, size, sums))
        loss, results, step = training or (None, None, 0)
        rows = 0 if results is None else len(results)
        args = (sums, chunks, o.clip_norm, loss, norm, results, rows, step, self._step_at())
        launch("optim", "finish_norm", 1, SUM_THREADS, args)
        scalars = self._scalars(o), self._scalars_at() if self.runtime.capturing else None
        launch("optim", "adamw", *self.runtime.grid_1d(size), (params, grads, m, v, average, size, *scalars, norm))
        return norm

    def _scalars(self, o: AdamW) -> tuple[float, ...]:
        return (
            1 - o.beta1, 1 - o.beta2, o.correction2**-0.5, o.eps, 1 - o.rate * o.decay, o.rate / o.correction1,
            1 - o.ema,
        )  # fmt: skip

    def _by_blocks(
        self,
        source: str,
        entry: str,
        arrays: tuple[Array | None, ...],
        after: tuple[Any, ...],
        before: tuple[Any, ...] | None = None,
    ) -> None:
        """Launch an entry whose threads take Philox blocks; `arrays` decide which form: wide or not.

        The entry takes `before`, by default the arrays, and `after`.
        """
        first = arrays[0]
        n, width = first.shape  # type: ignore[union-attr]
        if n == 0 or width == 0:
            return
        wide = width % WIDE == 0 and self._aligned(*arrays)
        items = n * (width // WIDE if wide else -(-width // 4))
        grid, block = self.runtime.grid_1d(items)
        args = (*(arrays if before is None else before), *after)
        self.runtime.launch(source, f"{entry}_wide" if wide else entry, grid, block, args)

    def _aligned(self, *arrays: Array | None) -> bool:
        return all(array is None or self.runtime.address(array) % VECTOR == 0 for array in arrays)

    def _scratch(self, name: str, size: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """An array of at least `size` values, for the current queue alone: kept, and grown only.

        Hold the lock while it is in use. A name has one dtype.
        """
        key = self.runtime.queue(), name
        if key not in self._scratches or self._scratches[key].size < size:
            if self._scratches.pop(key, None) is not None:  # the old one goes before the new one comes
                self._moves += 1
            self._scratches[key] = self.runtime.empty((size,), dtype)
        return self._scratches[key]

    def _table(self, values: npt.NDArray[np.float64]) -> Array:
        """A float64 table as float32 on the device; the last few are kept."""
        key = (self.runtime.queue(), values.tobytes())
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            else:
                self._tables[key] = self.runtime.asarray(values, np.float32)
                if len(self._tables) > TABLES:
                    self._tables.popitem(last=False)
                    self._moves += 1
            return self._tables[key]


class _Graph:
    """Launches that come again: issued one by one the first time, when kernels are loaded and scratch grows, and from
    the second time on as a CUDA graph, made anew where the queue or memory of the backend's own has changed.
    """

    def __init__(self, be: CudaBackend) -> None:
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

    def __init__(self, be: CudaBackend, gradient: Callable[[int], Array], state: TrainState, results: Array) -> None:
        self.be, self.gradient, self.state, self.results = be, gradient, state, results
        self._graph, self._clip_norm = _Graph(be), math.nan

    def run(self, step: int, options: AdamW) -> None:
        be = self.be
        with be._lock:
            if options.clip_norm != self._clip_norm:  # a number in the graph
                self._graph, self._clip_norm = _Graph(be), options.clip_norm
            if be.graphs:
                record = step, be._scalars(options), be._scratch("step", 1, np.uint32), be._scalars_at()
                be.runtime.launch("optim", "set_step", 1, 1, record)
            self._graph.run(lambda: be._issue_adamw(self.state, options, (self.gradient(step), self.results, step)))


class _Sampling:
    """A network and a sampler's step as one graph, which reads row and noise law from device memory."""

    def __init__(self, be: CudaBackend, output: Callable[[], Array], state: Array) -> None:
        self.be, self.output, self.state = be, output, state
        self._graphs = {remembers: _Graph(be) for remembers in (False, True)}

    def run(self, x: Array, memory: tuple[Array, ...], row: Row, clip: tuple[float, float] | None, draw: Draw) -> None:
        be, state = self.be, self.state
        if not be.graphs or be._twins or x.size == 0 or not row.evaluates:
            be.sampler_step(x, self.output() if row.evaluates else None, memory, row, clip, draw)
            return
        with be._lock:
            before, previous = None, memory[0] if memory else None
            if previous is not None:
                before = be._scratch("previous", x.size)[: x.size].reshape(x.shape)
                be.runtime.copy(before, previous)
            record = np.zeros(1, runtimes.STRUCTURES["RowRecord"])
            record["first_row"], record["step"], record["stream"], record["keys"] = _law(draw)
            record["row"] = _row_record(row, clip, wanted=previous is not None)
            there = be._scratch("row", record.nbytes, np.uint8)
            be.runtime.launch("step", "set_row", 1, 1, (record, there))

            def issue() -> None:
                arrays = state, self.output(), before
                be._by_blocks("step", "step_recorded", arrays, (there, *x.shape))

            self._graphs[previous is not None].run(issue)
            be.runtime.copy(x, state)
            if previous is not None:
                be.runtime.copy(previous, before)
