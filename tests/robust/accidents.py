"""Processes that save, load, fork and are killed or interrupted at random: counted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff import interop, tensor_file
from fastdiff.errors import FastdiffError
from robust.count import Count, bits

SECONDS = 60  # after which a process hangs
FIT = {"batch": 8, "progress": False, "validation": 0, "judge": False}
X = fd.data.harmonic_curves(40, points=16)
PICTURES = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 1)).astype(np.uint8)


def two_models() -> list[fd.Diffusion]:
    """Models that one file may hold, of one and of two steps."""
    return [fd.Diffusion(fd.MLP(16, hidden=(64,), T=10), backend="numpy").fit(X, steps=n, **FIT) for n in (1, 2)]


def state(model: fd.Diffusion) -> tuple[int, int]:
    return model.step, bits(model.net.flat, model._average, model._optimizer.v)


def child(body) -> int:
    """Fork; the child runs `body` and leaves with 0, or 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException as error:  # noqa: BLE001
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return pid


def ended(pid: int, seconds: float = SECONDS) -> int | None:
    """The exit code of a process; None, and killed, where it does not come in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def loads_beside_a_saver(tries: int) -> Count:
    """Loads of a file that another process saves all the time."""
    count, models = Count("mixed loads beside a process that saves"), two_models()
    whole = {state(model) for model in models}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        models[0].save(path)

        def save():
            while True:
                for model in models:
                    model.save(path)

        pid, seen = child(save), set()
        try:
            for _ in range(tries):
                found = state(fd.load(path, backend="numpy"))
                seen.add(found)
                count.add(found not in whole and f"step {found[0]} with other weights")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        count.note = f"both models seen: {len(seen) == 2}"
    return count


def killed_saves(tries: int) -> list[Count]:
    """Processes that save all the time, killed at random: files, and folders of diffusers."""
    lost = Count("checkpoints lost or mixed after a kill")
    mixed = Count("folders mixed after a kill")
    left = Count("leftovers after the next save")
    models, chance = two_models(), random.Random(0)
    whole = {state(model) for model in models}
    nets = [fd.UNet((8, 8, 1), channels=(32, 32), T=10, seed=k, dropout=k / 2) for k in range(2)]
    pairs = {(net.dropout, bits(net.flat)) for net in nets}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, place = folder / "m.safetensors", folder / "net"
        models[0].save(path)
        nets[0].save_diffusers(place)

        def save(begun: int, pause: float):
            replace = Path.replace
            Path.replace = lambda *paths: (replace(*paths), time.sleep(pause))
            while True:
                for model, net in zip(models, nets, strict=True):
                    model.save(path)
                    net.save_diffusers(place)
                    os.write(begun, b"1")

        between = 0
        for k in range(tries):
            begun, writes = os.pipe()
            pid = child(lambda writes=writes, k=k: save(writes, 0.004 * (k % 2)))
            os.read(begun, 1)
            start = time.monotonic()
            os.read(begun, 1)
            time.sleep(chance.uniform(0, 2) * (time.monotonic() - start))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(begun)
            os.close(writes)
            written = tensor_file.read(place / interop.WEIGHTS, values=False).metadata[interop.PAIRED]
            between += written != interop._checksum((place / interop.CONFIG).read_bytes())
            try:
                lost.add(state(fd.load(path, backend="numpy")) not in whole and "mixed")
            except FastdiffError as error:
                lost.add(error)
            try:
                net, _ = fd.load_diffusers(place)
                mixed.add((net.dropout, bits(net.flat)) not in pairs and f"dropout {net.dropout}")
            except FastdiffError as error:
                mixed.add(error)
        rests = len([*folder.glob(".*"), *place.glob(".*")])
        models[0].save(path)
        nets[0].save_diffusers(place)
        for rest in [*folder.glob(".*"), *place.glob(".*")]:
            left.add(rest)
        left.tries, left.note = tries, f"{rests} before it"
        mixed.note = f"{between} found one of both renamed"
    return [lost, mixed, left]


def works() -> dict[str, object]:
    """Every kind of work, as functions of nothing."""
    curves = fd.Diffusion(fd.MLP(16, hidden=(64,), T=10), backend=fd.get_backend("cpu", threads=2)).fit(
        X, steps=1, **FIT
    )
    pictures = fd.Diffusion(fd.UNet((8, 8, 1), channels=(4, 8), T=10), backend=fd.get_backend("cpu", threads=2))
    pictures.fit(PICTURES, steps=1, **FIT)
    exact = fd.denoisers.Gaussian(X.mean(axis=0), np.cov(X.T) + 0.01 * np.eye(16), fd.Schedule.cosine(10))
    be = fd.get_backend("cpu", threads=2)
    return {
        "a perceptron's training": lambda: curves.fit(X, steps=2, **FIT),
        "its samples": lambda: curves.sample(8),
        "a U-Net's training": lambda: pictures.fit(PICTURES, steps=1, **FIT),
        "pictures": lambda: pictures.sample(2, sampler="ddim", steps=2),
        "products with its Jacobian": lambda: pictures.net.vjp(
            np.zeros((2, 8, 8, 1), np.float32), 3, np.ones((2, 8, 8, 1), np.float32), backend=be
        ),
        "noise": lambda: fd.normal((1000, 100), backend=be),
        "exact samples": lambda: fd.sample(exact, fd.samplers.ddim(exact.schedule, 4), n=8, backend=be),
        "similarities": lambda: fd.covariance.similarity(X[0], backend=be),
        "a progress bar": lambda: curves.fit(X, steps=1, **{**FIT, "progress": True}),
    }


def forks(tries: int) -> Count:
    """Children forked while another thread works, which do the same work, and all others in turn."""
    count = Count("hangs and failures of forked children")
    kinds = works()
    quiet = os.open(os.devnull, os.O_WRONLY)
    before = os.dup(2)
    os.dup2(quiet, 2)
    try:
        for k in range(tries):
            name, work = list(kinds.items())[k % len(kinds)]
            stop = threading.Event()

            def busy(work=work, stop=stop):
                while not stop.is_set():
                    work()

            thread = threading.Thread(target=busy)
            thread.start()
            time.sleep(0.001 * (k % 17))
            other = list(kinds.values())[(k // len(kinds)) % len(kinds)]
            try:
                code = ended(child(lambda work=work, other=other: (work(), other())))
            finally:
                stop.set()
                thread.join()
            count.add("hangs" * (code is None) + f"exit code {code}" * bool(code) and f"{name}: {code}")
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(quiet)
    return count


COLD = """
import numpy as np, fastdiff as fd
be = fd.get_backend("cpu", threads=2)
fd.normal((100, 10), backend=be)
fd.Diffusion(fd.MLP(8, hidden=(16,), T=10), backend=be).fit(
    fd.data.harmonic_curves(40, points=8), steps=20, progress=False, judge=False, validation=0, batch=8).sample(4)
"""


NURSERY = """
import json, os, signal, sys, tempfile, time
import numba, scipy.linalg, scipy.special
import fastdiff.model
from robust.accidents import COLD, ended

def forked(wait, warm):  # how a child ends that is interrupted after a share of the time that one takes
    with tempfile.TemporaryFile() as said:
        start = time.monotonic()
        if not (pid := os.fork()):
            os.dup2(said.fileno(), 2)
            os.dup2(2, 1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            exec(COLD)
            sys.exit()
        due = start + (600 if wait is None else wait * warm)
        while time.monotonic() < due and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        taken = time.monotonic() - start
        os.kill(pid, signal.SIGINT)  # where it has ended nobody is told
        code = ended(pid)
        said.seek(0)
        return code, said.read().decode(), taken

found, warm = [], forked(None, 0)[2]
for wait in map(float, sys.argv[1:]):
    code, said, taken = forked(wait, warm)
    found.append((code, said[-1000:]))
    warm = 0.9 * warm + 0.15 * taken if code == 0 else warm  # two of three come before the end, on any machine
print(json.dumps(found))
"""


def cold_interrupts(tries: int, fresh: int = 20) -> Count:
    """Ctrl-C at a random time of a process in which kernels are loaded for the first time.

    Most are forked from one that has imported nothing but libraries. In every `fresh`-th Python starts too, and every
    second of these compiles.
    """
    count, chance = Count("hangs and crashes of cold interrupts"), random.Random(0)
    subprocess.run([sys.executable, "-c", COLD], check=True, capture_output=True)  # now they are compiled
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", COLD], check=True, capture_output=True)
    warm = time.monotonic() - start
    ends: dict[str, int] = {}

    def add(code: int | None, said: str) -> None:
        # Python itself may leave by the signal, or with 1 and a traceback of KeyboardInterrupt.
        good = code in (0, -signal.SIGINT, 130) or (code == 1 and "KeyboardInterrupt" in said)
        ends[str(code)] = ends.get(str(code), 0) + 1
        count.add(None if good else f"{code}: {said[-300:]}")

    alone = tries // fresh
    waits = [f"{chance.random():.4f}" for _ in range(tries - alone)]
    nurseries = [
        subprocess.Popen([sys.executable, "-c", NURSERY, *some], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        for some in (waits[0::3], waits[1::3], waits[2::3])
    ]
    for nursery in nurseries:
        for code, said in json.loads(nursery.communicate()[0]):
            add(code, said)
    for k in range(alone):
        with tempfile.TemporaryDirectory() as folder:
            environment = dict(os.environ) | ({"NUMBA_CACHE_DIR": folder} if k % 2 == 0 else {})
            process = subprocess.Popen(
                [sys.executable, "-c", COLD], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip
            time.sleep(chance.uniform(0.05, 1.5 * warm))
            process.send_signal(signal.SIGINT)
            try:
                said = process.communicate(timeout=SECONDS)[1].decode()
                add(process.returncode, said)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                add(None, "hangs")
    count.note = f"exit codes {ends}"
    return count


def repeats(tries: int) -> Count:
    """One training and its samples over splits, threads, a busy core and resumes: distinct results beyond one."""
    count, chance = Count("other results over splits, threads, a busy core and resumes"), random.Random(0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    want = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for k in range(tries):
                be = fd.get_backend("cpu", threads=chance.choice([1, 2, 3]))
                model, left = fd.Diffusion(fd.MLP(16, hidden=(32,), T=10), backend=be), 6
                while left:
                    steps = chance.randint(1, left)
                    model.fit(X, steps=steps, **FIT)
                    left -= steps
                    if chance.random() < 0.5:
                        model.save(Path(folder) / "m")
                        model = fd.load(Path(folder) / "m", backend=be)
                batch = chance.choice([None, 1, 3, 7])
                found = bits(model.net.flat, model._average, model.sample(8, batch=batch))
                want = found if want is None else want
                count.add(found != want and f"run {k}")
    finally:
        busy.kill()
        busy.wait()
    return count
