"""Threads of the user, forks, fresh processes, interrupts: right bits every time, never a hang."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import pytest
from gradcheck import scatter
from tolerances import HANG_SECONDS

from fastdiff.backends import TrainingDraws, TrainState, get_backend
from fastdiff.backends.cpu import CpuBackend
from fastdiff.backends.cpu.backend import usable_cores
from fastdiff.backends.cpu.workers import Each, Script, Task, Workers
from fastdiff.kernels.cpu import mlp as mlp_kernels
from fastdiff.kernels.cpu.jit import OPTIONS, kernel
from fastdiff.nn import MLP
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import Draw, normal
from fastdiff.process import forward_noise
from fastdiff.samplers import ddpm
from fastdiff.sampling import sample
from fastdiff.schedule import Schedule


def work(be):
    """A digest of everything a backend does, in sizes that occupy several threads."""
    schedule = Schedule.cosine(20)
    net = scatter(MLP(33, hidden=(40, 17), T=20))
    x0 = normal((5000, 33), seed=1, backend=be)
    x_t, eps = forward_noise(x0, 7, schedule, seed=2, backend=be)
    drawn = sample(net, ddpm(schedule, 4, clip=2.0), n=300, seed=3, backend=be)
    draws = TrainingDraws(x0, schedule.signal, schedule.noise, np.ones(20), np.zeros(20), seed=4)
    grads, m, v, average = (net.layout.zeros(np.float32) for _ in range(4))
    loss = be.mlp_train_gradient(net.plan, net.flat, draws, 5, 600, grads)
    norm = be.adamw(TrainState(net.flat, grads, m, v, average), TrainingPlan().options(0, 0))
    digest = hashlib.sha256(repr((loss, norm)).encode())
    for array in (x_t, eps, drawn, grads, net.flat, m, v, average):
        digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def expected():
    return work(get_backend("cpu", threads=1))


def test_the_number_of_threads_changes_nothing(expected):
    assert work(get_backend("cpu")) == work(get_backend("cpu", threads=3)) == expected


def test_two_threads_use_one_backend_and_several_at_once(expected):
    cpu, numpy = get_backend("cpu", threads=2), get_backend("numpy")
    jobs = [cpu, cpu, get_backend("cpu", threads=3), numpy, cpu, get_backend("cpu", threads=1), numpy, cpu] * 2
    want = {"cpu": expected, "numpy": work(numpy)}
    barrier = threading.Barrier(4)

    def job(k):
        if k < 4:
            barrier.wait(HANG_SECONDS)
        return work(jobs[k])

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(job, range(len(jobs)), timeout=HANG_SECONDS))
    assert results == [want[be.name] for be in jobs]


def test_long_draws_of_several_threads_do_not_mix():
    """They overlap for sure: a backend's buffers serve one of them at a time."""
    be = get_backend("cpu", threads=2)
    want = normal((100_000, 21), seed=1, backend=get_backend("cpu", threads=1))
    with ThreadPoolExecutor(4) as pool:
        drawn = pool.map(lambda _: normal((100_000, 21), seed=1, backend=be), range(12), timeout=HANG_SECONDS)
        assert all(np.array_equal(z, want) for z in drawn)


# ------------------------------------------------------------------------------------------- other processes


def child(be, sender):
    sender.send(work(be))
    sender.close()


def answer(context, be):
    """What a child of the context computes; a child that hangs or dies is a failure."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(be, sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(HANG_SECONDS), "the child hangs"
        return receiver.recv()
    finally:
        process.join(1)
        if process.is_alive():
            process.kill()
            process.join()


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this platform has no fork"
)
forking = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it is deprecated is known


@needs_fork
@forking
def test_a_fork_after_work_works(expected):
    be = get_backend("cpu", threads=2)
    assert work(be) == expected
    assert any(thread.name == "fastdiff" for thread in threading.enumerate())
    context = multiprocessing.get_context("fork")
    assert answer(context, be) == expected
    assert answer(context, get_backend("cpu")) == expected
    assert work(be) == expected


@needs_fork
@forking
def test_a_fork_during_work_works(expected):
    """The parent's other thread holds the backend's lock; the child must not wait for it."""
    be = get_backend("cpu", threads=2)
    stop = threading.Event()
    results = []

    def busy():
        while not stop.is_set():
            results.append(work(be))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        context = multiprocessing.get_context("fork")
        assert [answer(context, be) for _ in range(4)] == [expected] * 4
    finally:
        stop.set()
        thread.join(HANG_SECONDS)
    assert set(results) == {expected}


def test_a_spawned_process_takes_a_pickled_backend(expected):
    assert answer(multiprocessing.get_context("spawn"), get_backend("cpu", threads=2)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_numbas_threading_layer_changes_nothing(layer, expected):
    """Nor does the number of Numba's threads: the backend has its own."""
    env = os.environ | {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "1"}
    code = "from test_threads import *; print(work(get_backend('cpu', threads=2)))"
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.stdout.strip() == expected, done.stderr


# ------------------------------------------------------------------------------------------- the workers


def covered(workers, items, grain):
    seen = np.zeros(items, int)

    def body(worker, start, stop):
        assert 0 <= worker < workers.threads
        assert start < stop <= items
        seen[start:stop] += 1

    workers.run(body, items, grain)
    return seen


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("items", "grain"), [(0, 4), (1, 4), (4, 4), (5, 4), (103, 10), (7, 1)])
def test_workers_do_every_item_once(threads, items, grain):
    workers = Workers(threads)
    for _ in range(3):
        assert (covered(workers, items, grain) == 1).all()


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_a_failure_in_any_worker_reaches_the_caller(where):
    workers = Workers(2)
    both = threading.Barrier(2)

    def body(worker, start, stop):
        both.wait(HANG_SECONDS)  # each worker has one piece
        if (worker == 0) == (where == "caller"):
            raise ValueError("broken piece")

    with pytest.raises(ValueError, match="broken piece"):
        workers.run(body, 2, 1)
    assert (covered(workers, 100, 3) == 1).all()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timer signals")
def test_an_interrupt_leaves_the_workers_in_step():
    """Ctrl-C while the caller waits for a helper; the next job must not mistake the late helper for its own."""
    workers = Workers(2)
    both = threading.Barrier(2)
    late = []

    def slow(worker, start, stop):
        both.wait(HANG_SECONDS)
        if worker == 1:
            time.sleep(0.3)
            late.append(worker)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            workers.run(slow, 2, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    finished = []

    def steady(worker, start, stop):
        assert late == [1]  # its buffers are free
        both.wait(HANG_SECONDS)
        time.sleep(0.05 * worker)
        finished.append(worker)

    workers.run(steady, 2, 1)
    assert sorted(finished) == [0, 1]


@kernel
def count_range(start, stop, own, seen, stage, wrong):
    own[0] += stop - start
    for i in range(start, stop):
        wrong[0] += seen[i, 0] != stage
        seen[i, 0] += 1


@kernel
def check_range(start, stop, seen, stage, wrong):
    for i in range(seen.shape[0]):
        wrong[start] += seen[i, 0] != stage


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_script_does_every_item_of_a_phase_once_and_before_the_next(threads):
    workers, wrong = Workers(threads), np.zeros(3, np.int64)
    seen, own = np.zeros((103, 2), np.int64), [np.zeros(1, np.int64) for _ in range(threads)]
    failed = Each(np.zeros(1, np.int64) for _ in range(threads))
    phases = []
    for stage in range(20):
        phases.append(
            [
                Task(count_range, (Each(own), seen[:40], stage, failed), 40, 7),
                Task(count_range, (Each(own), seen[:0], stage, failed), 0, 1),
                Task(count_range, (Each(own), seen[40:], stage, failed), 63, 1),
            ]
        )
        phases.append([Task(check_range, (seen, stage + 1, wrong), 3, 1)])
    script = Script(threads, phases)
    for pause in (0, 0, 0.01, 0):  # helpers watch, and sleep
        time.sleep(pause)
        seen[:] = 0
        workers.perform(script)
        assert (seen[:, 0] == 20).all()
        assert (covered(workers, 100, 3) == 1).all()
    assert not wrong.any()
    assert not any(failed)
    assert sum(count[0] for count in own) == 4 * 20 * 103
    workers.perform(Script(threads, []))


class Pair(NamedTuple):
    values: np.ndarray
    factor: int


class Whole(NamedTuple):
    pair: Pair
    sums: np.ndarray


@kernel
def weighted_sum(start, stop, whole, more):
    for i in range(start, stop):
        whole.sums[i] = whole.pair.values[i] * whole.pair.factor + more


def test_a_script_takes_named_tuples():
    values, sums = np.arange(6), np.zeros((2, 6), np.int64)
    whole = Whole(Pair(values, 3), sums[0])
    each = Each([Whole(Pair(values, 5), sums[1])])
    script = Script(1, [[Task(weighted_sum, (whole, 2), 6, 6), Task(weighted_sum, (each, 4), 6, 2)]])
    sums[:] = 0
    Workers(1).perform(script)
    assert sums.tolist() == [(values * 3 + 2).tolist(), (values * 5 + 4).tolist()]


def test_a_script_keeps_the_arrays_of_named_tuples_alive():
    values, sums = np.arange(6), np.zeros(6, np.int64)
    seen = weakref.ref(values)
    script = Script(1, [[Task(weighted_sum, (Whole(Pair(values, 3), sums), 2), 6, 6)]])
    del values
    assert seen() is not None
    script.release([seen()])
    assert seen() is None


def test_a_script_refuses_what_a_kernel_cannot_take():
    with pytest.raises(TypeError, match="contiguous"):
        Script(1, [[Task(check_range, (np.zeros((4, 4), np.int64)[:, :2], 0, np.zeros(3, np.int64)), 4, 1)]])


@pytest.mark.slow
def test_threads_that_tire_of_waiting_for_their_turn_change_nothing(monkeypatch, expected):
    monkeypatch.setattr(mlp_kernels, "PATIENCE", 1)
    kernel = numba.njit(**OPTIONS)(mlp_kernels.gradient_tiles.py_func)
    held = []

    def counted(*arguments):
        held.append(kernel(*arguments))
        return held[-1]

    monkeypatch.setattr(mlp_kernels, "gradient_tiles", counted)
    be, deadline = CpuBackend(3), time.monotonic() + HANG_SECONDS
    while max(held, default=-1) < 0:  # which thread waits is for the machine to decide
        assert work(be) == expected
        assert time.monotonic() < deadline


def test_a_training_step_that_fails_in_one_thread_ends_in_all(monkeypatch, expected):
    kernel, be = mlp_kernels.gradient_tiles, CpuBackend(3)
    taken = threading.Event()

    def failing(held, turns, *rest):
        if threading.current_thread() is threading.main_thread():
            turns[0] = 1  # takes the first tile, which the others then wait for
            taken.set()
            time.sleep(0.05)
            raise KeyboardInterrupt
        assert taken.wait(HANG_SECONDS)
        return kernel(held, turns, *rest)

    monkeypatch.setattr(mlp_kernels, "gradient_tiles", failing)
    with pytest.raises(KeyboardInterrupt):
        work(be)
    monkeypatch.undo()
    assert work(be) == expected


def test_a_pickled_backend_keeps_its_threads():
    other = pickle.loads(pickle.dumps(CpuBackend(threads=3)))
    assert isinstance(other, CpuBackend)
    assert other.threads == 3


def test_where_there_is_no_fork_there_are_threads(monkeypatch, expected):
    monkeypatch.delattr(os, "register_at_fork", raising=False)  # as on Windows
    assert work(CpuBackend(threads=2)) == expected


def test_a_dropped_backend_ends_its_threads():
    before = set(threading.enumerate())
    be = CpuBackend(threads=3)
    be.normal(np.empty((4000, 100), np.float32), Draw(0, 0))
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    del be
    for thread in helpers:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()


def control_groups(root, groups, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return usable_cores(root)


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"a/b/cpu.max": "250000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),  # of the group around it
        ("0::/a/b\n", {"cpu.max": "50000 100000\n"}, 1),  # as a container has it
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        ("4:cpu,cpuacct:/c\n1:name=systemd:/c\n",
         {"cpu,cpuacct/c/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/c/cpu.cfs_period_us": "100000\n"}, 4),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ("0::/../x\nnonsense\n", {"cpu.max": "many few\n"}, 64),
    ],
)  # fmt: skip
def test_no_more_threads_than_a_container_has_the_time_of(tmp_path, monkeypatch, groups, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert control_groups(tmp_path, groups, files) == cores


def test_more_threads_than_cores_work_and_are_told_of_once(caplog):
    cores = usable_cores()
    with caplog.at_level("INFO", logger="fastdiff"):
        for threads in (cores + 5, cores, cores + 5):
            assert CpuBackend(threads=threads).threads == threads
    said = [record.getMessage() for record in caplog.records if "take turns" in record.getMessage()]
    assert said == [f"{cores + 5} threads, where there is the time of {cores}: they take turns"]
