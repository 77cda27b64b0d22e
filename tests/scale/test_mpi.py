"""Training over ranks, processes of MPI: weights to the bit those of one process, whatever happens on the way."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import trainer
from host_cuda import has_compiler

import fastdiff as fd
from fastdiff.ranks import PARTS


def launcher():
    """The mpiexec of the MPI that mpi4py uses: as a rule beside this Python."""
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "no mpiexec: pip install mpich"
    return found


def mpi(size, *command):
    """Run a command on so many ranks; there are fewer cores."""
    command = [launcher(), "-n", str(size), *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def one_process():
    """What one process without MPI learns."""
    digests = {}
    for case, (batch, X) in trainer.CASES.items():
        options = {"batch": batch, "accumulate": PARTS if case == "pictures" else 1, **trainer.QUIET}
        digests[case] = trainer.made(case).fit(X, steps=trainer.STEPS, **options)
    return digests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize(("size", "other"), [(1, 0), (2, 1), (4, 2)])
def test_weights_are_equal_to_the_bit(size, other, one_process, folder):
    """And so are those of what another number of ranks has begun."""
    here = folder / str(size)
    here.mkdir()
    run = mpi(size, sys.executable, trainer.__file__, here, folder / str(other))
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        case, sent, *digests = line.split()
        model = one_process[case]
        assert digests == [model.digest(ema=False)]
        assert fd.load(here / f"{case}.safetensors").digest(ema=False) == digests[0]
        assert (here / f"{case}-{trainer.STEPS // 2:06}.safetensors").exists()
        least = trainer.STEPS * (size - 1) * 2 * model.net.flat.nbytes
        # Of a perceptron the gradients of the few timesteps are summed, and not those of what makes them.
        assert (0.7 if case == "curves" else 1) * least <= int(sent) <= 1.05 * least
    assert len(run.stdout.splitlines()) == len(trainer.CASES)


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
def test_gpus_have_the_same_bits_on_1_2_and_4_ranks(tmp_path):
    """By the host run: in the memory of the hosts, and gathered by what stands in for NCCL."""
    found = {}
    for size, way in ((1, "hosts"), (2, "hosts"), (2, "nccl"), (4, "hosts"), (4, "nccl")):
        run = mpi(size, sys.executable, trainer.__file__, tmp_path, way)
        assert run.returncode == 0, run.stderr
        for line in run.stdout.splitlines():
            case, sent, *digests = line.split()
            assert found.setdefault(case, digests) == digests, (size, way)
            assert len(digests) == 1
            parameters = trainer.made(case).net.flat.nbytes
            # Through the hosts a sum goes there and back; NCCL brings all parts to everybody.
            least = (size - 1) * trainer.FEW * parameters * (2 if way == "hosts" else PARTS)
            assert least <= int(sent) <= 1.05 * least
    assert found.keys() == trainer.CASES.keys()


def test_a_rank_that_is_killed_ends_all(tmp_path):
    """What was saved last is whole."""
    run = mpi(3, sys.executable, trainer.__file__, tmp_path, "victim")
    assert run.returncode != 0
    (path,) = tmp_path.iterdir()
    saved, (batch, X) = fd.load(path), trainer.CASES["curves"]
    assert saved.step == trainer.KILLED_AT // trainer.EVERY * trainer.EVERY
    want = trainer.made("curves").fit(X, steps=saved.step, batch=batch, **trainer.QUIET)
    assert saved.digest(ema=False) == want.digest(ema=False)


def test_the_command_works_as_it_stands(tmp_path):
    np.savetxt(tmp_path / "curves.csv", trainer.CASES["curves"][1], delimiter=",")
    program = [sys.executable, "-m", "fastdiff", "train", str(tmp_path / "curves.csv"), "--batch", "500", "--quiet"]
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    run = mpi(2, *program, "--steps", "30", "-o", two, "--save-every", "10")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("2 ranks train together") == 1
    assert run.stdout.count("two.safetensors: 30 steps") == 1
    subprocess.run([*program, "--steps", "30", "-o", one], check=True, stdout=subprocess.PIPE)
    assert fd.load(one).digest(ema=False) == fd.load(two).digest(ema=False)

    again = mpi(2, *program, "--steps", "3", "-o", two)
    assert again.returncode != 0
    assert again.stderr.count("fastdiff: error:") == 1
    assert "is there; --overwrite replaces it" in again.stderr


def test_a_signal_to_one_rank_stops_all_and_saves(tmp_path):
    np.savetxt(tmp_path / "curves.csv", trainer.CASES["curves"][1], delimiter=",")
    path = tmp_path / "m.safetensors"
    command = [sys.executable, "-m", "fastdiff", "train", tmp_path / "curves.csv", "-o", path, "--steps", "1000000"]
    command = [launcher(), "-n", "2", *map(str, command), "--save-every", "10", "--quiet"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            time.sleep(0.1)
            if path.exists():
                break
        ranks = [one for one in psutil.Process(run.pid).children(recursive=True) if "fastdiff" in one.cmdline()]
        assert len(ranks) == 2
        before = fd.load(path).step
        max(ranks, key=lambda one: int(one.environ()["PMI_RANK"])).terminate()
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    (step,) = (int(number) for number in re.findall(r"fastdiff: stopped after step (\d+), saved to", said))
    assert fd.load(path).step == step >= before
    assert "continue with: fastdiff train" in said


@pytest.mark.parametrize("words", ["ranks that disagree about data", "rank 1 of 2 cannot begin"])
def test_data_of_one_rank_that_differ(words, tmp_path):
    """Two programs of one launch: each reads a file of its own, or none."""
    for name, rows in (("a", 100), ("b", 99)):
        np.savetxt(tmp_path / f"{name}.csv", trainer.CASES["curves"][1][:rows], delimiter=",")
    other = "b.csv" if "disagree" in words else "none.csv"
    programs = [
        [sys.executable, "-m", "fastdiff", "train", tmp_path / name, "-o", tmp_path / "m.safetensors", "--steps", "3"]
        for name in ("a.csv", other)
    ]
    run = mpi(1, *programs[0], ":", "-n", "1", *programs[1])
    assert run.returncode != 0
    assert run.stderr.count("fastdiff: error:") == 1
    assert words in run.stderr
    assert not (tmp_path / "m.safetensors").exists()
