"""What happens to a training: signals, full disks, a second thread, a fork; and a bad cache of kernels."""

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import zlib

import numba
import numpy as np
import pytest
from tolerances import HANG_SECONDS, assert_close

import fastdiff as fd
from fastdiff import cli, signals
from fastdiff.backends import get_backend
from fastdiff.errors import ArgumentError, BackendError, DataWarning, TrainingError
from fastdiff.kernels.cpu import cache, jit

X = fd.data.harmonic_curves(40, points=6)
FIT = {"batch": 8, "progress": False, "validation": 0}


def new(**options):
    return fd.Diffusion(fd.MLP(6, hidden=(8,), T=10), backend="numpy", **options)


def flat(model):
    return model.net.flat.tobytes() + model._average.tobytes()


@pytest.fixture
def _usual_signals():
    """As in a terminal."""
    numbers = [signal.SIGINT, *signals.ENDS]
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.usefixtures("_usual_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, *signals.ENDS])
def test_a_signal_ends_a_fit_after_the_step_and_its_state_is_saved(number, tmp_path):
    def after(step, loss):
        if step == 2:
            signal.raise_signal(number)

    model = new()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, steps=50, callback=after, checkpoint=tmp_path / "m.safetensors", **FIT)
    assert model.step == 3
    assert flat(fd.load(tmp_path / "m.safetensors")) == flat(model) == flat(new().fit(X, steps=3, **FIT))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("_usual_signals")
@pytest.mark.parametrize(("number", "most"), [(signal.SIGTERM, 5), (signal.SIGINT, 2)])
def test_signals_that_come_twice_are_held_back_and_the_third_ctrl_c_is_not(number, most):
    done = []

    def press():
        with signals.held_back() as asked:
            for _ in range(5):
                signal.raise_signal(number)
                done.append(asked())

    with pytest.raises(KeyboardInterrupt):
        press()
    assert done == [True] * most


@pytest.mark.usefixtures("_usual_signals")
def test_handlers_of_others_stay():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    with signals.held_back() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert not asked()
    assert seen == [1]


@pytest.mark.usefixtures("_usual_signals")
def test_ctrl_c_is_delayed_to_the_end_of_the_outermost_block():
    done = []

    def press():
        with signals.delayed():
            with signals.delayed():
                signal.raise_signal(signal.SIGINT)
                done.append(1)
            done.append(2)

    with pytest.raises(KeyboardInterrupt):
        press()
    assert done == [1, 2]


@pytest.mark.usefixtures("_usual_signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_saves_and_reports_the_signal(number, code, tmp_path, monkeypatch, capsys):
    def wanted(self, step, loss):
        if step == 4:
            signal.raise_signal(number)
            if number != signal.SIGINT:
                signal.raise_signal(number)  # as schedulers do
        return self.asked

    monkeypatch.setattr(cli.train.PatientInterrupt, "wanted", wanted)
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    command = [
        "train",
        "x.npy",
        "-o",
        "m.safetensors",
        "--backend",
        "numpy",
        "--quiet",
        "--steps",
        "50",
        "--batch",
        "8",
    ]
    assert cli.main(command) == code
    assert fd.load("m.safetensors").step == 5
    assert "continue with: fastdiff train" in capsys.readouterr().err
    assert os.listdir() == ["m.safetensors", "x.npy"] or os.listdir() == ["x.npy", "m.safetensors"]


# ------------------------------------------------------------------------------------------- states that are saved


def test_states_are_saved_on_the_way_and_the_last_few_stay(tmp_path):
    path, seen = tmp_path / "m.safetensors", {}

    def after(step, loss):
        seen[step + 1] = fd.load(path).step if path.exists() else 0

    model = new().fit(X, steps=11, callback=after, checkpoint=path, every=3, keep=2, **FIT)
    assert seen == {1: 0, 2: 0, 3: 0, 4: 3, 5: 3, 6: 3, 7: 6, 8: 6, 9: 6, 10: 9, 11: 9}
    assert sorted(os.listdir(tmp_path)) == ["m-000009.safetensors", "m-000011.safetensors", "m.safetensors"]
    assert flat(fd.load(path)) == flat(model)
    again = fd.load(tmp_path / "m-000009.safetensors", backend="numpy").fit(X, steps=2, **FIT)
    assert flat(again) == flat(model)


def test_a_disk_that_is_full_costs_a_warning_and_not_the_training(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    new().fit(X, steps=1, **FIT).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(DataWarning, match=r"not saved after step \d: .*m\.safetensors: .*No space left"):
        model = new().fit(X, steps=4, checkpoint=path, every=2, **FIT)
    assert model.step == 4
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("options", "named"), [({"every": 2}, "checkpoint"), ({"keep": 2}, "checkpoint"), ({"every": 0}, "every")]
)
def test_bad_options_of_saves(options, named, tmp_path):
    more = {} if named == "checkpoint" else {"checkpoint": tmp_path / "m"}
    with pytest.raises(ArgumentError, match=f"^{named}: "):
        new().fit(X, steps=1, **options, **more, **FIT)


def test_a_model_that_is_there_is_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    command = ["train", "x.npy", "-o", "m.safetensors", "--backend", "numpy", "--quiet", "--steps", "2", "--batch", "8"]
    assert cli.main(command) == 0
    assert cli.main(command) == 2
    assert "--overwrite replaces it, and --resume m.safetensors goes on" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--save-every", "1", "--keep", "2"]) == 0
    assert sorted(os.listdir()) == ["m-000001.safetensors", "m-000002.safetensors", "m.safetensors", "x.npy"]
    assert cli.main([*command, "--resume", "m.safetensors"]) == 0
    assert fd.load("m.safetensors").step == 4


# ------------------------------------------------------------------------------------------- threads and forks


def test_a_second_fit_of_a_model_is_refused():
    refused = []

    def after(step, loss):
        for act in (lambda: model.fit(X, steps=1, **FIT), lambda: thread(model.fit, X, steps=1, **FIT)):
            with pytest.raises(TrainingError, match=r"<Diffusion .* is being trained by another call of fit"):
                act()
            refused.append(step)

    def thread(function, *args, **options):
        found = []

        def run():
            try:
                function(*args, **options)
            except Exception as error:  # noqa: BLE001
                found.append(error)

        one = threading.Thread(target=run)
        one.start()
        one.join(HANG_SECONDS)
        raise found[0]

    model = new()
    model.fit(X, steps=2, callback=after, **FIT)
    assert refused == [0, 0, 1, 1]
    assert model.fit(X, steps=1, **FIT).step == 3


@pytest.mark.parametrize("slow", [False, True])
def test_a_model_saved_beside_a_fit_is_whole(slow, tmp_path):
    """Also by a thread that the callback waits for."""
    model, states, saved = new(), {}, []
    model.fit(X, steps=1, **FIT)
    stop = threading.Event()

    def save():
        while not stop.is_set():
            path = tmp_path / f"{len(saved)}.safetensors"
            model.save(path)
            pickle.dumps(model)
            saved.append(path)

    def after(step, loss):
        states[step + 1] = zlib.crc32(flat(model))
        if slow:
            one = threading.Thread(target=model.save, args=(tmp_path / "waited.safetensors",))
            one.start()
            one.join(HANG_SECONDS)
            assert not one.is_alive()
        return len(saved) > 5

    beside = threading.Thread(target=save)
    beside.start()
    model.fit(X, steps=1_000_000, callback=after, **FIT)
    stop.set()
    beside.join(HANG_SECONDS)
    for path in saved[1:]:  # the first may be of before
        found = fd.load(path)
        assert len(found.history["loss"]) == found.step
        assert found.step == 1 or zlib.crc32(flat(found)) == states[found.step]


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this platform has no fork"
)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_works_can_do_all_the_same():
    net = fd.UNet((8, 8, 1), channels=(4, 8), T=10)
    pictures = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 1)).astype(np.uint8)
    model = fd.Diffusion(net, backend=get_backend("cpu", threads=2))
    fit = {"batch": 4, "progress": False, "validation": 0, "judge": False}
    model.fit(pictures, steps=1, **fit)
    want = model.sample(2).tobytes()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            model.fit(pictures, steps=1, **fit)
            model.net.predict(np.zeros((2, 8, 8, 1)), 3, backend=model.backend)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                signal.alarm(int(HANG_SECONDS))
                code = 1
                try:
                    model.fit(pictures, steps=1, **fit)
                    model.sample(2)
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        thread.join(HANG_SECONDS)
    assert len(want) == 2 * 64


# ------------------------------------------------------------------------------------------- the cache of kernels


def _plus(a, b):
    return a + b


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    cache._say.cache_clear()
    jit.kernel(_plus)(1, 2)
    yield tmp_path / "kernels"
    cache._say.cache_clear()


def empty(path):
    path.write_bytes(b"")


def altered(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def folders(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("which", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("damage", [empty, altered, cut, folders])
def test_a_bad_file_is_compiled_anew_and_said_once(folder, which, damage, caplog):
    files = list(folder.rglob(which))
    assert files
    for path in files:
        damage(path)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert [jit.kernel(_plus)(1, 2), jit.kernel(_plus)(1.0, 2.0)] == [3, 3.0]
    assert [str(files[0].parent) in record.getMessage() for record in caplog.records] == [True]
    if damage is not folders:
        again = jit.kernel(_plus)
        assert again(1, 2) == 3
        assert sum(again.stats.cache_hits.values()) == 1, "the cache is whole again"


def test_a_cache_that_goes_away_is_no_error(folder, caplog):
    shutil.rmtree(folder)
    assert jit.kernel(_plus)(1, 2) == 3
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with caplog.at_level(logging.WARNING, "fastdiff"):
        one = jit.kernel(_plus)
        assert [one(1, 2), one(1.0, 2.0)] == [3, 3.0]
    assert len(caplog.records) <= 1  # Numba may find another folder


def test_a_full_disk_is_no_error(folder, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache._Files, "_store", full)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert jit.kernel(_plus)(1.0, 2) == 3
    assert ["No space left" in record.getMessage() for record in caplog.records] == [True]


def test_without_a_compiler_auto_is_numpy(monkeypatch):
    from fastdiff import backends

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.setattr(backends, "_choose_auto", backends._choose_auto.__wrapped__)
    assert backends.get_backend("auto").name == "numpy"
    assert "cpu" not in backends.available_backends()
    monkeypatch.setattr(backends, "_shared", backends._shared.__wrapped__)
    with pytest.raises(BackendError, match="NUMBA_DISABLE_JIT"):
        backends.get_backend("cpu")


@pytest.mark.usefixtures("_usual_signals")
def test_ctrl_c_in_a_compilation_takes_effect_after_it(folder, monkeypatch):
    inside = cache.KernelCache.save_overload

    def pressed(self, sig, data):
        signal.raise_signal(signal.SIGINT)
        inside(self, sig, data)

    monkeypatch.setattr(cache.KernelCache, "save_overload", pressed)
    one = jit.kernel(_plus)
    with pytest.raises(KeyboardInterrupt):
        one(1, 2.0)
    assert len(one.overloads) == 1
    assert one(1, 2.0) == 3


# ------------------------------------------------------------------------------------------- what any shape leads to


@pytest.mark.parametrize("shape", [(28, 1, 1), (1, 28, 1), (1, 1, 3), (2, 2, 1), (5, 3, 3), (1,), (2,)])
def test_what_is_chosen_fits_every_shape(shape):
    rows = np.random.default_rng(0).normal(size=(9, *shape)).astype(np.float32)
    model = fd.Diffusion(backend="numpy").fit(rows, steps=1, judge=False, **FIT)
    assert model.sample(2, sampler="ddim", steps=2).shape == (2, *shape)


def test_a_network_of_other_outputs_is_refused():
    net = fd.UNet((4, 4, 1), channels=(4,), T=10, outputs=3)
    with pytest.raises(ArgumentError, match="denoiser: got a network of 3 outputs, wants 1, as many as there are"):
        fd.sample(net, fd.samplers.ddim(fd.Schedule.cosine(10), 2), n=2)


def test_steps_whose_draws_would_repeat_are_refused():
    model = new().fit(X, steps=1, **FIT)
    with pytest.raises(ArgumentError, match="steps: got 4294967296, wants at most 4294967295: "):
        model.fit(X, steps=1 << 32, **FIT)
    assert model.step == 1


OTHER_CPU = {  # one without vectors of 256 bits and fused multiply-add, for Numba, NumPy and the C library
    "NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_ICL AVX512_SPR",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F,-AVX2_Usable,-FMA_Usable",
}  # fmt: skip
CPUS = """
import sys, warnings, zlib, numpy as np, fastdiff as fd
warnings.simplefilter("ignore")
where = sys.argv[1]
be = fd.get_backend("cpu", threads=2)
z = fd.normal((200, 13), seed=3, backend=be)
sigmoid = fd.Schedule.sigmoid(20, beta_start=1e-4, beta_end=0.1)
x, _ = fd.forward_noise(z, 5, sigmoid, seed=1, backend=be)
T = 1000
schedules = [
    sigmoid, fd.Schedule.linear(T), fd.Schedule.scaled_linear(T), fd.Schedule.cosine(T), fd.Schedule.laplace(T),
    fd.Schedule.flow(T, shift=3.0), fd.Schedule.linear(T).zero_terminal_snr(),
]
tables = [table for s in schedules for table in (s.betas, s.signal, s.noise, s.alphas_bar)]
print(*(zlib.crc32(array.tobytes()) for array in (z, x, fd.MLP(13, hidden=(8,), T=T).flat, *tables)))
model = fd.load(f"{where}/made", backend=be)
model.save(f"{where}/again")
np.save(f"{where}/samples", model.sample(8, sampler="ddpm", batch=3))
"""


@pytest.mark.slow
def test_what_is_the_same_on_cpus_of_other_types(tmp_path):
    """Noise, first weights, schedules and files, to the bit; samples, which are sums of products, up to rounding."""
    import subprocess
    import sys

    model = fd.Diffusion(fd.MLP(13, hidden=(8,), T=20), fd.Schedule.cosine(20), backend="numpy")
    model.fit(fd.data.harmonic_curves(40, points=13), steps=2, **FIT, judge=False)
    found = []
    for name, cpu in (("own", {}), ("other", OTHER_CPU)):
        place = tmp_path / name
        place.mkdir()
        model.save(place / "made")
        env = os.environ | cpu | ({"NUMBA_CACHE_DIR": str(place)} if cpu else {})
        run = subprocess.run([sys.executable, "-c", CPUS, str(place)], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        again, samples = (place / "again").read_bytes(), np.load(place / "samples.npy")
        assert again == (place / "made").read_bytes()
        found.append((run.stdout, samples))
    (printed, samples), (printed_there, samples_there) = found
    assert printed == printed_there
    assert_close(samples_there, samples, terms=20 * 13 * 4)  # of 20 rows of the table


DAEMON = """
import sys, threading, time, fastdiff as fd
model = fd.Diffusion(fd.MLP(16, hidden=(400, 400), T=10), backend="numpy")
model.fit(fd.data.harmonic_curves(40, points=16), steps=1, batch=8, progress=False, validation=0, judge=False)
begun = threading.Event()

def save():
    while True:
        model.save(sys.argv[1])
        begun.set()

threading.Thread(target=save, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[2]))
"""


def test_a_daemon_thread_that_saves_at_exit_ends_with_the_process(tmp_path):
    """Without a crash, and with a whole file."""
    import subprocess
    import sys

    for wait in (0.0, 0.003, 0.006):
        run = subprocess.run(
            [sys.executable, "-c", DAEMON, str(tmp_path / "m"), str(wait)], capture_output=True, text=True, timeout=60
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert fd.load(tmp_path / "m", backend="numpy").step == 1
