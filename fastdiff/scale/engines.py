"""Who does the work: this process, processes of its own, an executor, joblib, or a Dask cluster.

All have one method, `outcomes`, which takes tasks as it needs them, so that no more are in memory than are worked on or
come next, and yields what became of each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from itertools import islice
from typing import Any, Protocol

from fastdiff.errors import ArgumentError, BackendError, FastdiffError, check_int
from fastdiff.scale.jobs import Parcel, Task, Work, attempt, do

Outcome = tuple[int, BaseException | None]

AHEAD = 2  # tasks for each worker that are handed out: one that is worked on, and the next
SECONDS = 30  # that a scheduler or a worker is waited for


class LostEngine(Exception):
    """What does the work does no more: it is not known which tasks were under way."""


class Engine(Protocol):
    """Who does the work."""

    comes_again: bool  # whether it can be asked again after `LostEngine`

    def outcomes(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield the number of each task that has ended, and its error, in any order."""


@contextmanager
def engine(client: Any, work: Work) -> Iterator[Engine]:
    """Return who does the work that a `client` stands for; inside the block it can.

    Raises
    ------
    ArgumentError
        It stands for nothing.
    BackendError
        It cannot be reached.
    """
    if client is None:
        yield InProcess(work)
        return
    with ExitStack() as last:
        if isinstance(client, str) or _is_from(client, "distributed"):
            yield Dask(last.enter_context(_client(client)), work)
            return
        if not isinstance(client, (int, Executor)) and not _is_from(client, "joblib"):
            wants = "None, a number of processes, a dask.distributed.Client or its address, a joblib.Parallel, or an "
            raise ArgumentError("client", type(client).__name__, f"{wants}Executor of concurrent.futures")
        if not isinstance(client, (int, Executor)) and not client.return_generator:
            wants = "return_as='generator_unordered', so that what is done is known"
            raise ArgumentError("client", "a joblib.Parallel that returns a list", wants)
        workers = check_int("client", client, low=1) if isinstance(client, int) else 0
        parcel = last.enter_context(_parcel(work))
        if workers:
            yield last.enter_context(Crew(workers, parcel))
        elif isinstance(client, Executor):
            yield Futures(client, parcel)
        else:
            yield Joblib(client, parcel)


def _is_from(client: Any, package: str) -> bool:
    return any(kind.__module__.split(".")[0] == package for kind in type(client).__mro__)


@contextmanager
def _parcel(work: Work) -> Iterator[Parcel]:
    """A file that the processes of this machine open, once each."""
    content = work.packed()
    handle, path = tempfile.mkstemp(prefix="fastdiff-", suffix=".work")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        yield Parcel(sha256(content).hexdigest(), path)
    finally:
        with suppress(OSError):
            os.unlink(path)


class InProcess:
    """This process."""

    comes_again = False

    def __init__(self, work: Work) -> None:
        self.work = work

    def outcomes(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        for task in tasks:
            try:
                self.work.do(task)
            except Exception as error:  # noqa: BLE001 - the caller decides what it means
                yield task.number, error
            else:
                yield task.number, None


class Futures:
    """An executor of the user's."""

    comes_again = False

    def __init__(self, executor: Executor, parcel: Parcel) -> None:
        self.executor, self.parcel = executor, parcel
        self.ahead = AHEAD * (getattr(executor, "_max_workers", None) or os.cpu_count() or 1)

    def outcomes(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        running: dict[Future[None], int] = {}
        tasks = iter(tasks)
        try:
            while True:
                for task in islice(tasks, self.ahead - len(running)):
                    running[self.executor.submit(do, self.parcel, task)] = task.number
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    number, error = running.pop(future), future.exception()
                    if isinstance(error, BrokenExecutor):
                        raise error
                    yield number, error
        except BrokenExecutor as error:
            raise LostEngine(f"the executor has lost a worker and takes no more work ({error})") from error
        finally:
            for future in running:
                future.cancel()


class Crew:
    """Processes of this machine, each a pool of its own: where one dies the others do not notice."""

    comes_again = True

    def __init__(self, workers: int, parcel: Parcel) -> None:
        self.parcel, self.pools = parcel, [_pool() for _ in range(workers)]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self.pools:
            pool.shutdown()

    def outcomes(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        running: dict[Future[None], tuple[int, int]] = {}
        idle, tasks = list(range(len(self.pools))), iter(tasks)
        while True:
            for task in islice(tasks, len(idle)):
                who = idle.pop()
                try:
                    future = self.pools[who].submit(do, self.parcel, task)
                except BrokenExecutor:  # it has died without work
                    self.pools[who] = _pool()
                    future = self.pools[who].submit(do, self.parcel, task)
                running[future] = who, task.number
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                (who, number), error = running.pop(future), future.exception()
                if isinstance(error, BrokenExecutor):
                    self.pools[who].shutdown(wait=False)
                    self.pools[who] = _pool()
                    error = RuntimeError("its worker has died, and was replaced")
                idle.append(who)
                yield number, error


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_follow_parent)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when that has ended, for it may have been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Joblib:
    """A `joblib.Parallel`, with whatever backend it has; loky's processes are replaced when one has died."""

    comes_again = True

    def __init__(self, parallel: Any, parcel: Parcel) -> None:
        self.parallel, self.parcel = parallel, parcel

    def outcomes(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        import joblib

        call = joblib.delayed(attempt)
        try:
            yield from self.parallel(call(self.parcel, task) for task in tasks)
        except BrokenExecutor as error:
            raise LostEngine(f"joblib has lost a worker ({type(error).__name__})") from error


class Dask:
    """A Dask cluster."""

    comes_again = True

    def __init__(self, client: Any, work: Work) -> None:
        self.client, content = client, work.packed()
        self.parcel = Parcel(sha256(content).hexdigest())
        try:
            client.wait_for_workers(1, timeout=SECONDS)
        except (TimeoutError, OSError) as error:
            raise BackendError(f"no worker has joined the Dask scheduler within {SECONDS} s") from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sending large graph")  # once, and then from worker to worker
            # The scheduler keeps the task that makes it: it is not lost with the workers that hold it.
            self.content = client.submit(bytes, content, key=f"fastdiff-{self.parcel.name}")

    def outcomes(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        from distributed import as_completed

        running: dict[Any, int] = {}
        tasks, ended = iter(tasks), as_completed([])
        try:
            while True:
                ahead = AHEAD * max(1, sum(self.client.nthreads().values()))
                for task in islice(tasks, max(0, ahead - len(running))):
                    future = self.client.submit(do, self.parcel, task, self.content, pure=False)
                    running[future] = task.number
                    ended.add(future)
                if not running:
                    return
                future = next(ended)
                number = running.pop(future)
                if future.status in ("cancelled", "lost"):
                    raise LostEngine("the Dask scheduler has forgotten its tasks")
                yield number, future.exception()
        except (OSError, TimeoutError) as error:
            raise LostEngine(f"the Dask scheduler cannot be reached any more ({error})") from error
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                self.client.cancel(list(running))


@contextmanager
def _client(client: Any) -> Iterator[Any]:
    """A Dask client, or that of a scheduler's address."""
    if not isinstance(client, str):
        yield client
        return
    try:
        from distributed import Client
    except ImportError:
        raise FastdiffError("a Dask scheduler needs distributed: pip install 'fastdiff-engine[scale]'") from None
    try:
        connected = Client(client, timeout=SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise BackendError(f"no Dask scheduler at {client} within {SECONDS} s: {error}") from error
    with connected:
        yield connected
