"""The same bits whoever draws, and whoever dies."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import driver
import joblib
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster

import fastdiff as fd
from fastdiff.errors import BackendError
from fastdiff.scale import engines, jobs
from fastdiff.scale.store import Chunked

N, CHUNK = 1010, 90  # they do not divide


def processes(workers, initializer=None):
    return ProcessPoolExecutor(workers, get_context("forkserver"), initializer=initializer)


def cluster(**options):
    return LocalCluster(threads_per_worker=1, dashboard_address=None, **options)


def draw(path, model, client=None, n=N, **options):
    options = {"chunk": CHUNK, "seed": 3, **options}
    return fd.scale.sample_to(path, model, n, client=client, progress=False, **options)


def test_processes_and_threads(tmp_path, model):
    want = model.sample(N, seed=3)
    np.testing.assert_array_equal(draw(tmp_path / "here.zarr", model)[:], want)
    np.testing.assert_array_equal(draw(tmp_path / "two.zarr", model, 2)[:], want)
    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_array_equal(draw(tmp_path / "threads.zarr", model, pool)[:], want)
    with processes(7) as pool:
        np.testing.assert_array_equal(draw(tmp_path / "seven.zarr", model, pool)[:], want)


def test_joblib(tmp_path, model):
    parallel = joblib.Parallel(2, return_as="generator_unordered")
    np.testing.assert_array_equal(draw(tmp_path / "a.zarr", model, parallel)[:], model.sample(N, seed=3))
    with pytest.raises(fd.errors.ArgumentError, match="generator_unordered"):
        draw(tmp_path / "b.zarr", model, joblib.Parallel(2))


def test_dask(tmp_path, model, monkeypatch):
    want = model.sample(N, seed=3)
    with cluster(n_workers=7, processes=False) as seven, Client(seven) as client:
        np.testing.assert_array_equal(draw(tmp_path / "seven.zarr", model, client)[:], want)
        np.testing.assert_array_equal(draw(tmp_path / "address.zarr", model, seven.scheduler_address)[:], want)
    with cluster(n_workers=0, processes=False) as none, Client(none) as client:
        monkeypatch.setattr(engines, "SECONDS", 1)
        with pytest.raises(BackendError, match="no worker has joined"):
            draw(tmp_path / "none.zarr", model, client)


def test_dask_worker_that_is_killed(tmp_path, model, monkeypatch):
    """It costs its chunk: the scheduler hands it to another."""
    n = 30 * CHUNK
    with cluster(n_workers=2) as two, Client(two) as client:
        victims, handed_out, submit = [*client.run(os.getpid).values()], [], client.submit

        def submit_and_kill(*args, **options):
            handed_out.append(args)
            if len(handed_out) == 10:
                os.kill(victims[0], signal.SIGKILL)
            return submit(*args, **options)

        monkeypatch.setattr(client, "submit", submit_and_kill)
        array = draw(tmp_path / "a.zarr", model, client, n=n)
        assert len(handed_out) >= 31
    np.testing.assert_array_equal(array[:], model.sample(n, seed=3))


def test_unreachable_scheduler(tmp_path, model, monkeypatch):
    monkeypatch.setattr(engines, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(BackendError, match=r"no Dask scheduler at tcp://127.0.0.1:9 within 0.5 s"):
        draw(tmp_path / "a.zarr", model, "tcp://127.0.0.1:9")
    assert time.monotonic() - begun < 10


def _other_version():
    fd.__version__ = "9.9"


def test_worker_of_another_version(tmp_path, model):
    with processes(1, _other_version) as pool, pytest.raises(BackendError, match=r"a worker has fastdiff 9\.9"):
        draw(tmp_path / "a.zarr", model, pool)


def _dies():
    do = jobs.Work.do

    def dying(self, task):
        if task.number == 3:
            os._exit(9)
        do(self, task)

    jobs.Work.do = dying


def test_executor_that_loses_a_worker(tmp_path, model):
    """An executor of the user's is no use then; what it has drawn is."""
    path = tmp_path / "a.zarr"
    words = r"lost a worker.*3 of 12 chunks are in .* the same call goes on there"
    with processes(1, _dies) as pool, pytest.raises(BackendError, match=words):
        draw(path, model, pool)
    left = Chunked.existing(path).left()
    assert left == list(range(3, 12))
    np.testing.assert_array_equal(draw(path, model)[:], model.sample(N, seed=3))


def test_tasks_wait_for_workers(model, tmp_path):
    """No more tasks are made than are worked on or come next."""
    made = []

    def tasks():
        for number in range(50):
            made.append(number)
            yield jobs.Task(number, 0, 1, {})

    with ThreadPoolExecutor(2) as pool:
        futures = engines.Futures(pool, jobs.Parcel("none", str(tmp_path / "absent")))
        for done, (_, error) in enumerate(futures.outcomes(tasks()), 1):
            assert isinstance(error, BackendError)  # there is no such file
            assert len(made) <= done + 2 * engines.AHEAD


def test_kills(tmp_path, model):
    """SIGKILL of workers, which are replaced, and of the driver, which is called again: nothing lost, nothing twice."""
    store, saved, chance = tmp_path / "a.zarr", tmp_path / "m.safetensors", random.Random(0)
    model.save(saved)
    command = [sys.executable, driver.__file__, str(store), str(saved), "2"]
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    killed = {"driver": 0, "worker": 0}
    process = subprocess.Popen(command, env=environment)
    marks = Path(store) / "done"

    def done():
        return len(list(marks.glob("*"))) if marks.is_dir() else 0

    try:
        seen = 0
        while process.poll() is None or process.returncode < 0:
            if process.poll() is not None:
                process = subprocess.Popen(command, env=environment)
            time.sleep(0.01)
            if sum(killed.values()) < driver.KILLS and done() > seen:
                time.sleep(chance.random() * 0.1)
                who = "driver" if chance.random() < 0.3 else "worker"
                workers = _workers(process)
                if who == "worker" and not workers:
                    continue
                victim = process if who == "driver" else chance.choice(workers)
                seen = done()
                victim.kill()
                killed[who] += 1
                if who == "driver":
                    process.wait()
                    _, alive = psutil.wait_procs(workers, timeout=20)
                    assert not alive, "workers live on without their driver"
        assert process.returncode == 0
    finally:
        process.kill()
    assert sum(killed.values()) == driver.KILLS, killed
    assert all(killed.values())
    found = fd.scale.check(store)
    assert (found.done, found.total, found.damaged) == (driver.CHUNKS, driver.CHUNKS, [])
    import zarr

    want = model.sample(driver.ROWS, seed=driver.SEED)
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[:], want)


def _workers(process):
    try:
        children = psutil.Process(process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []
