"""Threads of the CPU backend, and the two ways in which they share work.

A *job* is a Python function over a range of items; a helper wakes for it in some 20 to 50 us. A *script* is what many
kernels do one after another, written down once: helpers run it inside compiled code (`kernels.cpu.crew`), where the
next kernel starts within a microsecond, and it can be run again as often as its arrays keep their places.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends.layers import Recording
from fastdiff.forks import at_fork
from fastdiff.kernels.cpu import crew

Body = Callable[[int, int, int], None]
Array = npt.NDArray[Any]
Job = tuple[Any, tuple[Any, ...], int, float]  # kernel, arguments after its range, items, work of an item
Phases = list[list[Job]]

# Values in a piece of work: less is not worth waking a thread, which takes some 20 us.
MIN_PIECE = 1 << 16
MIN_LIGHT_PIECE = 1 << 18  # where little is done with each
MIN_WORK = 5e5  # floating-point operations of a piece of work: less is not worth sharing
PIECES = 4  # for each thread, so that all end at about the same time
ALIGNMENT = 64  # bytes: a cache line


class Each(tuple[Any, ...]):
    """An argument of a task that differs from thread to thread: one value for each."""


class Task(NamedTuple):
    """A kernel ``kernel(start, stop, *arguments)`` over a range of items, in pieces of `grain`.

    Arguments are C-contiguous arrays, integers, named tuples of these, or `Each` of one.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    items: int
    grain: int


class Script:
    """Tasks in phases: those of a phase run at once, and each phase after the one before.

    Parameters
    ----------
    threads : int
        How many may run it.
    phases : list of list of Task
    """

    def __init__(self, threads: int, phases: list[list[Task]]) -> None:
        tasks: list[list[int]] = []
        bounds: list[list[int]] = []
        self._kept: list[Array] = []  # tasks know arrays by their addresses only
        for phase in phases:
            begin, pieces = len(tasks), 0
            for task in phase:
                if task.items < 1:
                    continue
                kinds = tuple(crew.kind_of(a[0] if isinstance(a, Each) else a) for a in task.arguments)
                lanes = threads if any(isinstance(a, Each) for a in task.arguments) else 1
                words = np.zeros((lanes, crew.WORDS), np.int64)
                for lane, row in enumerate(words):
                    values = [
                        word for a in task.arguments for word in crew.words_of(a[lane] if isinstance(a, Each) else a)
                    ]
                    row[: len(values)] = values
                self._kept += [words, *(array for a in task.arguments for array in crew.arrays_of(a))]
                distance = words.strides[0] if lanes > 1 else 0
                tasks.append(
                    [_address(task.kernel, kinds), words.ctypes.data, distance, task.items, task.grain, pieces]
                )
                pieces += -(-task.items // task.grain)
            if pieces:
                bounds.append([begin, len(tasks), pieces])
        self.tasks = np.array(tasks, np.int64).reshape(-1, crew.FIRST + 1)
        self.phases = np.array(bounds, np.int64).reshape(-1, crew.PIECES + 1)
        self.counters = np.zeros(2 * crew.SPREAD * len(bounds), np.int64)
        self.widest = int(self.phases[:, crew.PIECES].max(initial=0))
        arrays = self.tasks, self.phases, self.counters
        self.table = np.array([part for a in arrays for part in (a.ctypes.data, len(a))], np.int64)

    def release(self, arrays: Sequence[Array | None]) -> None:
        """Keep the memory of these alive no longer: the caller brings it whenever the script is run."""
        owners = {id(_owner(array)) for array in arrays}
        self._kept = [array for array in self._kept if id(_owner(array)) not in owners]


def _owner(array: Any) -> Any:
    """The object whose memory an array shows."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


_address = functools.cache(crew.address_of)


class Workers:
    """Threads that share the pieces of a job or a script.

    Parameters
    ----------
    threads : int
        How many work at once, the caller included.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._start()
        at_fork(self)

    def renew(self) -> None:
        self._start()  # the parent's threads do not exist in a forked child

    def _start(self) -> None:
        self.lock = threading.RLock()
        self._jobs: list[SimpleQueue[Any]] = []
        self._board = np.zeros(crew.SPREAD * self.threads, np.int64)
        weakref.finalize(self, _dismiss, self._jobs)
        self._settled = True  # False where an interrupt may have left a helper at work

    def run(self, body: Body, items: int, grain: int) -> None:
        """Call ``body(worker, start, stop)`` over ranges of at most `grain` of `items`; return when all are done."""
        if not self._settled:
            self._share(lambda worker: None, len(self._jobs))
        pieces = -(-items // grain)
        helpers = min(self.threads, pieces) - 1
        if helpers < 1:
            if items:
                body(0, 0, items)
            return
        self._hire(helpers)
        counter = itertools.count()

        def share(worker: int) -> None:
            while (piece := next(counter)) < pieces:
                body(worker, piece * grain, min(items, (piece + 1) * grain))

        self._share(share, helpers)

    def perform(self, script: Script) -> None:
        """Run a script; return when all is done."""
        if not self._settled:
            self._share(lambda worker: None, len(self._jobs))
        helpers = max(1, min(self.threads, script.widest)) - 1
        self._hire(helpers)
        parts = script.tasks, script.phases, script.counters
        try:
            if crew.call(self._board, helpers, script.table):
                for h, queue in enumerate(self._jobs[:helpers], 1):
                    if self._board[h * crew.SPREAD + crew.WOKEN]:
                        queue.put((_nothing, _NOBODY, self._board))
            crew.work(0, *parts)
        finally:
            crew.dismiss(self._board, helpers)

    def _hire(self, helpers: int) -> None:
        while len(self._jobs) < helpers:
            queue: SimpleQueue[Any] = SimpleQueue()
            threading.Thread(target=_serve, args=(queue, len(self._jobs) + 1), name="fastdiff", daemon=True).start()
            self._jobs.append(queue)

    def _share(self, job: Callable[[int], None], helpers: int) -> None:
        """Call ``job(worker)`` here, as worker 0, and in the first `helpers` helpers; return when all are done."""
        self._settled = False
        crew.recall(self._board, helpers)
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        for queue in self._jobs[:helpers]:
            queue.put((job, done, self._board))
        failures: list[BaseException | None] = []
        try:
            job(0)
        finally:
            crew.await_recalled(self._board, helpers)
            failures = [done.get() for _ in range(helpers)]
            self._settled = True
        for failure in failures:
            if failure is not None:
                raise failure


class _Nobody:
    """Who waits for a helper that answers on the board."""

    def put(self, failure: BaseException | None) -> None:
        pass


_NOBODY = _Nobody()


def _dismiss(jobs: list[SimpleQueue[Any]]) -> None:
    for queue in jobs:
        queue.put(None)


def _serve(queue: SimpleQueue[Any], worker: int) -> None:
    while (task := queue.get()) is not None:
        job, done, board = task
        crew.acknowledge(board, worker)
        try:
            job(worker)
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            done.put(error)
        else:
            done.put(None)
        task = job = done = None
        crew.serve(board, worker)  # for a while: to be woken takes longer than many a job


def _nothing(worker: int) -> None:
    pass


def aligned(size: int) -> Array:
    """Room for float32 values that begins with a cache line."""
    spare = np.empty(size + ALIGNMENT // 4, np.float32)
    start = -spare.ctypes.data % ALIGNMENT // 4
    return spare[start : start + size]


class _Scratch:
    """Named float32 buffers, made once and grown where more is needed."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Array] = {}

    def __call__(self, name: Any, size: int) -> Array:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = aligned(size)
        return buffer if len(buffer) == size else buffer[:size]


class Scripted:
    """What operations written as phases of jobs need of a backend: scratch, workers, and a way to write them down."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._workers = Workers(threads)
        self._scratch = _Scratch()
        self._recorded: list[list[list[Task]]] = []
        """Phases that are being written down instead of run, innermost last."""
        at_fork(self)

    def renew(self) -> None:
        self._recorded = []

    def _each(self, name: str, size: int, shape: tuple[int, ...] = (-1,), dtype: npt.DTypeLike = np.float32) -> Each:
        """Scratch of `size` float32 for every worker."""
        return Each(self._scratch((name, w), size).view(dtype).reshape(shape) for w in range(self.threads))

    def _do(self, *phases: list[Job]) -> None:
        """Run the jobs of every phase at once, one phase after another, or write them down."""
        tasks = []
        for jobs in phases:
            alone = self.threads == 1 or sum(items * work for _, _, items, work in jobs) < 2 * MIN_WORK
            tasks.append(
                [
                    Task(kernel, arguments, items, max(1, items if alone else self._grain_of(items, work)))
                    for kernel, arguments, items, work in jobs
                ]
            )
        if self._recorded:
            self._recorded[-1] += tasks
        else:
            self._workers.perform(Script(self.threads, tasks))

    def _grain_of(self, items: int, work: float) -> int:
        return max(math.ceil(MIN_WORK / max(work, 1)), -(-items // (PIECES * self.threads)))

    def record(self, body: Callable[[], None], places: Sequence[Array | None] = ()) -> Recording:
        """Return what does body(): the first time it writes down a script, which it then performs."""
        return Recorded(self, body, places)


class Recorded:
    """Operations as a script."""

    def __init__(self, be: Scripted, body: Callable[[], None], places: Sequence[Array | None]) -> None:
        self._be = be
        self._pending: tuple[Callable[[], None], Sequence[Array | None]] | None = body, places
        self._script: Script | None = None

    def run(self) -> None:
        workers = self._be._workers
        with workers.lock:
            if self._script is None:
                self._script = self._written()
            workers.perform(self._script)

    def _written(self) -> Script:
        assert self._pending is not None
        (body, places), be = self._pending, self._be
        be._recorded.append([])
        try:
            body()
        finally:
            phases = be._recorded.pop()
        script = Script(be.threads, phases)
        script.release(places)
        self._pending = None
        return script
