"""Training over ranks: processes with MPI, on one machine or many, that take the same steps, each a share of them.

A gradient is a sum that a batch's chunks are added to in their order: the tiles of a perceptron, the parts
(`accumulate`) of other networks. Each rank has chunks in a row, so the sum goes from rank to rank: everybody waits for
what those before have summed, adds chunk by chunk, and passes it on, and the last one gives the result to all. So the
order of additions is that of one process, whatever the number of ranks, and weights are equal to the bit. Of r ranks
each sends 2 (r - 1) / r gradients a step, as few as a sum for all can do with, and in pieces, so that all send at once.

GPUs take the batch of every network in parts. Where each rank has one, and CuPy has NCCL, all parts are gathered on all
of them, which add them in their order; else sums of parts go from rank to rank as well, in the memory of the hosts.

::

    from mpi4py import MPI

    model.fit(X, steps=1000, comm=MPI.COMM_WORLD)  # by every rank, with the same X: mpirun -n 4 python script.py
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, Gather, Segment, get_backend
from fastdiff.errors import ArgumentError, BackendError, FastdiffError, TrainingError, check_flags, shown

log = logging.getLogger("fastdiff")

PARTS = 8  # that the batch of a network other than a perceptron is taken in, over ranks
PIECE = 1 << 16  # values that travel together
LOOKS = 200  # at a message that has not come, before each further one waits
PAUSE = 5e-5  # seconds, then
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")  # of launchers; the last one where there is
PMIX = "PMIX_RANK"
METHODS = ("Get_rank", "Get_size", "Isend", "Irecv", "allgather", "bcast", "Abort")


def launched() -> int:
    """How many ranks a launcher of MPI programs has begun, as it says in the environment; 1: there is none."""
    for name in SIZES if PMIX in os.environ else SIZES[:-1]:
        if os.environ.get(name, "").isdecimal():
            return max(1, int(os.environ[name]))
    return 1


def world() -> Any:
    """Return the communicator of all ranks.

    Raises
    ------
    FastdiffError
        mpi4py is not there, or finds no MPI, or not that of the launcher.
    """
    count = launched()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        words = f"{count} ranks need mpi4py and the MPI that has begun them: pip install 'fastdiff-engine[mpi]'"
        raise FastdiffError(f"{words} ({str(error).splitlines()[0]})") from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != count:
        library = MPI.Get_library_version().split("\n")[0].strip()
        words = f"a launcher has begun {count} ranks, and mpi4py finds {comm.Get_size()}, for it uses another MPI"
        raise FastdiffError(f"{words}, {library}: take the mpirun of that one, or build mpi4py with yours")
    return comm


class Ranks:
    """What one rank knows of all: a `fastdiff.backends.Team`.

    Parameters
    ----------
    comm : communicator of mpi4py
        Or another with `METHODS`.
    nccl : bool, optional
        Whether sums of GPUs may go through NCCL.

    Attributes
    ----------
    rank, size : int
    sent : int
        Bytes of gradients that this rank has sent.
    wanted : callable
        Whether somebody here wants the training to stop, besides who interrupts it.
    wish : bool
        Whether this rank wants to stop after the next step.
    stops : bool
        Whether any wanted it when the last step was taken: all know.
    """

    def __init__(self, comm: Any, *, nccl: bool = True) -> None:
        try:
            known = all(callable(getattr(comm, name, None)) for name in METHODS)
        except Exception:  # noqa: BLE001 - whatever an object of somebody's does when it is asked
            known = False
        if not known:
            raise ArgumentError("comm", shown(comm), "a communicator of mpi4py, as MPI.COMM_WORLD")
        self.comm, self.rank, self.size = comm, int(comm.Get_rank()), int(comm.Get_size())
        check_flags(nccl=nccl)
        self.sent, self.wish, self.stops, self.nccl = 0, False, False, nccl
        self.wanted: Callable[[], bool] = lambda: False

    @classmethod
    def of(cls, comm: Any) -> Ranks:
        """Return those of a communicator, or what is already one."""
        return comm if isinstance(comm, Ranks) else cls(comm)

    # -------------------------------------------------------------------------------------------------- a step

    def shares(self, items: int) -> list[range]:
        """Which of so many items are each rank's; the first rank has one if anybody has."""
        ends = [-(-items * rank // self.size) for rank in range(self.size + 1)]
        return [range(*pair) for pair in pairwise(ends)]

    def share(self, items: int) -> range:
        """Which of so many items are this rank's."""
        if self.rank == 0 and items < self.size:
            words = "%d of %d ranks have nothing to do, for a batch has %d chunks: take a larger one, or accumulate"
            log.warning(words, self.size - items, self.size, items)
        return self.shares(items)[self.rank]

    def sum(self, segments: Sequence[Segment], losses: Sequence[float]) -> float:
        """Do `Team.sum`, and find out whether anybody wants to stop."""
        head = np.zeros(2)

        def add_head(_: slice) -> None:
            for loss in losses:
                head[0] += loss
            head[1] += self.wish

        segments = [*segments, Segment(head, add_head, head, in_pieces=False)]
        on_its_way = self._pass_on(segments)
        if self.rank + 1 < self.size:
            self._receive(segments, on_its_way)
        for request in on_its_way.values():
            _wait(request)
        self.stops = bool(head[1])
        return float(head[0])

    def _pass_on(self, segments: Sequence[Segment]) -> dict[Any, Any]:
        """Add to what those before have summed; the last rank begins to send results. Return what is on its way."""
        on_its_way: dict[Any, Any] = {}
        last = self.rank + 1 == self.size
        for i, segment in enumerate(segments):
            if segment.sums is not None:
                came = segment.sums if segment.came is None else segment.came
                for piece in _pieces(segment.sums, segment.in_pieces):
                    if self.rank:
                        _wait(self.comm.Irecv(came[piece], source=self.rank - 1))
                    segment.add(piece)
                    if not last:
                        on_its_way[i, piece.start] = self._send(segment.sums[piece], self.rank + 1)
                    elif segment.result is not None and segment.result is segment.sums:
                        on_its_way[i, piece.start] = self._send(segment.result[piece], 0)
            if last and segment.make is not None and segment.result is not None:
                segment.make()
                for piece in _pieces(segment.result, segment.in_pieces):
                    on_its_way[i, piece.start] = self._send(segment.result[piece], 0)
        return on_its_way

    def _receive(self, segments: Sequence[Segment], on_its_way: dict[Any, Any]) -> None:
        """Take results, and pass them on."""
        source = (self.rank or self.size) - 1
        for i, segment in enumerate(segments):
            if segment.result is None:
                continue
            for piece in _pieces(segment.result, segment.in_pieces):
                if (i, piece.start) in on_its_way:  # from the same place
                    _wait(on_its_way.pop((i, piece.start)))
                _wait(self.comm.Irecv(segment.result[piece], source=source))
                if self.rank + 2 < self.size:
                    on_its_way[i, piece.start] = self._send(segment.result[piece], self.rank + 1)

    def _send(self, array: npt.NDArray[Any], to: int) -> Any:
        if self.size == 1:
            return None
        self.sent += array.nbytes
        return self.comm.Isend(array, dest=to)

    # -------------------------------------------------------------------------------------------------- agreement

    def first(self, value: Any) -> Any:
        """What the first rank says."""
        return self.comm.bcast(value, root=0)

    def any(self, value: bool) -> bool:
        """Whether it is true of any rank."""
        return any(self.comm.allgather(bool(value)))

    @contextmanager
    def agreeing(self, argument: str = "comm") -> Iterator[dict[str, Any]]:
        """Have all ranks do a block, and then compare what each has put into the dictionary that this yields.

        Raises
        ------
        ArgumentError
            On all ranks: they disagree, and about what.
        TrainingError
            The block has failed on another rank; where it has failed, its own error.
        """
        facts: dict[str, Any] = {}
        try:
            yield facts
        except Exception as error:
            self.comm.allgather(f"{type(error).__name__}: {error}")
            raise
        found: list[Any] = self.comm.allgather(facts)
        for rank, other in enumerate(found):
            if isinstance(other, str):
                raise TrainingError(f"rank {rank} of {self.size} cannot begin: {other}")
        for rank, other in enumerate(found):
            if differing := _difference(found[0], other):
                name, ours, theirs = differing
                got = f"ranks that disagree about {name}: {shown(ours)} on rank 0, {shown(theirs)} on rank {rank}"
                raise ArgumentError(argument, got, "the same data, options and model on all")

    def same(self, what: str, value: Any) -> None:
        """Make sure that all ranks have it.

        Raises
        ------
        TrainingError
            On all ranks.
        """
        found = self.comm.allgather(value)
        if different := [rank for rank, other in enumerate(found) if other != found[0]]:
            words = f"rank {different[0]} of {self.size} has other {what} than rank 0"
            raise TrainingError(f"{words}: are their processors of different kinds? Train on one kind")

    @contextmanager
    def ending_together(self, kept: str = "") -> Iterator[None]:
        """End all ranks where the block fails on this one alone; `kept` says what stays."""
        try:
            yield
        except (TrainingError, KeyboardInterrupt):  # as it is on all
            raise
        except BaseException as error:
            if self.size > 1:
                words = f"rank {self.rank} of {self.size}: {type(error).__name__}: {error}"
                print(f"fastdiff: error: {words}: all ranks end{kept}", file=sys.__stderr__, flush=True)
                self.comm.Abort(1)
            raise

    def backend(self, backend: str | Backend) -> Backend:
        """Return a backend; of a CPU, where nothing says how many threads, with this rank's part of the cores."""
        be = get_backend(backend)
        if isinstance(backend, str) and be.name == "cpu":
            mine = platform.node(), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
            return get_backend("cpu", threads=max(1, be.threads // self.comm.allgather(mine).count(mine)))
        self.comm.allgather(None)
        return be

    # -------------------------------------------------------------------------------------------------- devices

    def gathering(self, be: Backend) -> Gather | None:
        """Return what gathers arrays of GPUs by NCCL; None: there is another way, and the log says once why."""
        if be.name != "cuda" or self.size == 1:
            return None
        runtime = cast(Any, be).runtime
        found = self.comm.allgather((platform.node(), runtime.place, runtime.nccl is not None, self.nccl))
        places = [place for *place, _, _ in found]
        why = "" if all(wanted for *_, wanted in found) else "as was asked for"
        if lacking := [rank for rank, (*_, there, _) in enumerate(found) if not there]:
            why = why or f"the CuPy of rank {lacking[0]} has no NCCL"
        if shared := [rank for rank, place in enumerate(places) if place in places[:rank]]:
            other = places.index(places[shared[0]])
            why = why or f"ranks {other} and {shared[0]} share a GPU, and NCCL wants one for each"
        if not why:
            return _Nccl(self, runtime)
        if self.rank == 0:
            log.info("gradients of GPUs are added in the memory of the hosts: %s", why)
        return None


class _Nccl:
    """Gathers arrays of GPUs, on the stream that a backend works on."""

    def __init__(self, ranks: Ranks, runtime: Any) -> None:
        self.ranks, self.runtime = ranks, runtime
        nccl = runtime.nccl
        self._types = {np.dtype(np.float32): nccl.NCCL_FLOAT32, np.dtype(np.float64): nccl.NCCL_FLOAT64}
        with self._named():
            number = ranks.first(nccl.get_unique_id() if ranks.rank == 0 else None)
            self._comm = nccl.NcclCommunicator(ranks.size, number, ranks.rank)

    def __call__(self, mine: Array, every: Array) -> None:
        address, size = self.runtime.address, mine.size
        with self._named():
            self._comm.check_async_error()  # of what was issued before
            self._comm.allGather(address(mine), address(every), size, self._types[mine.dtype], self.runtime.stream())
        self.ranks.sent += (self.ranks.size - 1) * mine.nbytes

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of an error of NCCL where it is, and what to do."""
        try:
            yield
        except self.runtime.nccl.NcclError as error:
            todo = "NCCL_DEBUG=INFO says more; fit(comm=fastdiff.ranks.Ranks(comm, nccl=False)) does without it"
            raise BackendError(f"NCCL fails on {self.runtime.device}: {error}; {todo}") from error


def _pieces(array: npt.NDArray[Any], in_pieces: bool) -> list[slice]:
    size = PIECE if in_pieces else max(1, len(array))
    return [slice(start, min(start + size, len(array))) for start in range(0, len(array), size)]


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first name whose values differ, and these."""
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            return name, one.get(name), other.get(name)
    return None


def _wait(request: Any) -> None:
    """Wait for a message, and let others have the core: there may be more ranks than cores. Signals are heeded."""
    looks = 0
    while request is not None and not request.Test():
        looks += 1
        if looks > LOOKS:
            time.sleep(PAUSE)
        elif hasattr(os, "sched_yield"):
            os.sched_yield()
