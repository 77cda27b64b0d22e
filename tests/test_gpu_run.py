"""The program behind ``make gpu``: its stages, time and results, with processes that do as they are told."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import host_cuda
import numpy
import pytest

from fastdiff import backends
from fastdiff.backends.cuda import conv, conv_mma, tuning

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
gpu, gpu_run, gpu_sweep, report = map(importlib.import_module, ("gpu", "gpu_run", "gpu_sweep", "report"))

FORWARD, STEP, NORMALS = "forward-1000000x50", "step-64x256x256x3", "normals-48x1000000"
TRAIN, SAMPLE = "unet-train-16", "unet-ddim-50-16"
PATIENCE = 60.0
SILENT = f"killed, silent for {PATIENCE:g} s"
HANG, DIE, DEAD = ({"do": what} for what in ("hang", "die", "dead"))


def row(name, done=7, seconds=1.0, **others):
    """A step that tells a row."""
    found = gpu.row_of(gpu.BY_NAME[name], {"ours": seconds}, {}, 1e9, [])
    return {"tell": {"row": asdict(replace(found, rounds=(done, 7), **others))}}


class Run:
    """Runs the program in a folder; what is found there afterwards.

    Nobody waits for what hangs: as long as it lives, every look at the clock takes 20 seconds.
    """

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.jobs, self.hung, self.skipped = folder / "jobs", folder / "hung", 0
        self.hung.touch()
        monkeypatch.setattr(gpu_run, "time", SimpleNamespace(monotonic=self.clock, sleep=time.sleep))
        monkeypatch.setenv("FASTDIFF_TEST_JOBS", str(self.jobs))
        monkeypatch.setenv("FASTDIFF_TEST_HUNG", str(self.hung))

    def clock(self):
        for number in self.hung.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), 0)
                self.skipped += 20
        return time.monotonic() + self.skipped

    def __call__(self, *options, **plan):
        plan = {name.replace("_", "-"): steps for name, steps in plan.items()} | plan
        self.monkeypatch.setenv("FASTDIFF_TEST_PLAN", json.dumps(plan))
        self.jobs.write_text("")
        self.code = gpu_run.main(["--output", str(self.folder), *options])
        self.read()
        return self.code

    def read(self):
        self.results = json.loads((self.folder / "gpu.json").read_text())
        self.table = (self.folder / "gpu.md").read_text()
        self.header, self.left, self.faults = (self.results[name] for name in ("header", "left", "faults"))
        self.rows = {row["name"]: row for row in self.results["rows"]}

    def be_patient(self):
        """Wait for what is silent until there is no time left."""
        self.monkeypatch.setattr(gpu_run, "PATIENCE", dict.fromkeys(gpu_run.PATIENCE, 1e9))
        self.monkeypatch.setattr(gpu_run, "SHARE", 1)

    def asked(self, do="workloads"):
        """The workloads that processes were asked for, in order."""
        jobs = map(json.loads, self.jobs.read_text().splitlines())
        return [job["workloads"] if do == "workloads" else job for job in jobs if job["do"] == do]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "WORKER", (sys.executable, str(HERE / "fake_gpu_worker.py")))
    monkeypatch.setattr(gpu_run, "PATIENCE", dict.fromkeys(gpu_run.PATIENCE, PATIENCE))
    return Run(tmp_path, monkeypatch)


BENCHMARKS_ONLY = ("--stage", "benchmarks", "--only", FORWARD, "--only", STEP, "--only", NORMALS)


def test_what_matters_most_comes_first(run):
    assert run("--stage", "benchmarks") == 0
    (asked,) = run.asked()
    assert sorted(asked) == sorted(gpu.BY_NAME)
    assert tuple(asked[: len(gpu.FIRST)]) == gpu.FIRST
    assert run.header["complete"] == ["benchmarks"]
    assert (run.left, run.faults, run.results["ended"]) == ({}, {}, "all")


def test_a_workload_that_raises_costs_no_process(run):
    steps = {FORWARD: [{"fault": "AssertionError: they differ"}], STEP: [row(STEP)]}
    assert run(*BENCHMARKS_ONLY, **steps) == 1
    assert run.asked() == [[FORWARD, STEP, NORMALS]]
    assert run.faults == {FORWARD: "AssertionError: they differ"}
    assert set(run.rows) == {STEP}
    assert f"{FORWARD}: **AssertionError: they differ**." in run.table


@pytest.mark.parametrize(
    ("end", "why"),
    [(HANG, SILENT), (DIE, "died of SIGABRT"), (DEAD, "an illegal address")],
    ids=["hang", "die", "dead"],
)
def test_a_process_that_ends_costs_one_workload(run, end, why):
    """Of which is kept what was known."""
    assert run(*BENCHMARKS_ONLY, **{FORWARD: [row(FORWARD, 3), end], STEP: [row(STEP)]}) == 1
    assert run.asked() == [[FORWARD, STEP, NORMALS], [STEP, NORMALS]]
    assert run.faults == {FORWARD: why}
    assert {name: row["rounds"] for name, row in run.rows.items()} == {FORWARD: [3, 7], STEP: [7, 7]}
    assert run.header["complete"] == ["benchmarks"]


def test_a_way_that_ends_its_process_is_left_out_and_the_workload_done_again(run):
    """PyTorch's that hangs, in that workload; a variant of ours that hangs, in all."""
    failed = {"ours-bf16": SILENT}
    plan = {
        TRAIN: [{"way": "ours-bf16"}, HANG, {"way": "reduced"}, DIE, {"way": "graphs"}, row(TRAIN, failed=failed)],
        SAMPLE: [{"way": "ours-bf16"}, HANG, {"way": "reduced"}, row(SAMPLE)],
    }
    assert run("--stage", "benchmarks", "--only", TRAIN, "--only", SAMPLE, **plan) == 1
    assert run.asked() == [[TRAIN, SAMPLE]] * 3
    assert run.faults == {f"{TRAIN}, ours-bf16": SILENT}
    assert set(run.rows) == {TRAIN, SAMPLE}
    without = [job["without"] for job in map(json.loads, run.jobs.read_text().splitlines()) if job["do"] == "workloads"]
    assert without == [
        {TRAIN: {}, SAMPLE: {}},
        {TRAIN: failed, SAMPLE: failed},
        {TRAIN: failed | {"reduced": "died of SIGABRT"}, SAMPLE: failed},
    ]


def test_a_way_of_pytorch_has_its_share_of_the_time(run):
    """And no more patience than that, whatever it compiles; it is told how much."""
    plan = {TRAIN: [{"way": "reduced"}, HANG, {"way": "graphs"}, row(TRAIN)]}
    assert run("--minutes", "3", "--stage", "benchmarks", "--only", TRAIN, **plan) == 0
    first, second = (job for job in map(json.loads, run.jobs.read_text().splitlines()) if job["do"] == "workloads")
    assert first["share"] == 45
    assert second["without"] == {TRAIN: {"reduced": "killed, silent for 45 s"}}


def test_processes_that_only_die_are_given_up(run, monkeypatch):
    monkeypatch.setattr(gpu_run, "RESTARTS", 3)
    names = ["normals", "forward", "step", "chain", "train-default", "similarity"]
    plan = {name: [DIE] for name in gpu.BY_NAME if name != STEP}
    assert run("--stage", "benchmarks", *(f"--only={name}" for name in names), **plan) == 1
    assert [len(asked) for asked in run.asked()] == [8, 7, 5, 4]  # a workload that was done in between counts
    assert run.faults["benchmarks"] == "given up after 3 processes; the last one: died of SIGABRT"
    assert len(run.left["benchmarks"]) == 3


def test_a_worker_that_cannot_start(run, tmp_path, monkeypatch, capfd):
    """Is no endless loop; nor is one that has no GPU any more."""
    monkeypatch.setattr(gpu_run, "WORKER", (sys.executable, "-c", "import sys; sys.exit(4)"))
    assert gpu_run.main(["--output", str(tmp_path / "none")]) == 2
    assert capfd.readouterr().err == "gpu.py: exit code 4\n"
    assert not (tmp_path / "none").exists()
    left = ["a"]
    over = gpu_run.drive(left, lambda: iter([{"over": "exit code 4"}]), lambda event: None, lambda name, why: False)
    assert (over, left) == ("exit code 4", ["a"])


def test_at_the_end_of_the_time_all_ends(run):
    """What was being done, too; what is left is named, and the exit code does not say that all is well."""
    plan = {FORWARD: [row(FORWARD)], STEP: [row(STEP, 2), HANG]}
    run.be_patient()
    run.monkeypatch.setattr(gpu_run, "SHARES", {})
    run.monkeypatch.setattr(gpu_run.shutil, "which", lambda name: name)
    assert run("--minutes", "5", *BENCHMARKS_ONLY, "--stage", "full", "--stage", "sanitizer", **plan) == 3
    assert len(run.asked()) == 1
    assert (run.faults, run.results["ended"], run.header["complete"]) == ({}, "time", [])
    assert run.left == {"benchmarks": [STEP, NORMALS], "full": ["all"], "sanitizer": list(gpu_run.TOOLS)}
    assert f"Not run, no time left: benchmarks: {STEP}, {NORMALS}.\n" in run.table
    assert "(2 of 7 rounds)" in run.table
    assert run.header["workloads"] == [FORWARD]


def test_ways_that_were_cut_are_named(run):
    assert run("--stage", "benchmarks", "--only", TRAIN, **{TRAIN: [row(TRAIN, cut=["reduced"])]}) == 3
    title = run.rows[TRAIN]["title"]
    assert run.left == {"ways": [f"{title}: reduced"]}
    assert f"Not run, no time left: ways: {title}: reduced." in run.table


def test_a_killed_run_leaves_what_was_done(run, tmp_path):
    """And no process behind it."""
    plan = {FORWARD: [row(FORWARD)], STEP: [row(STEP, 2), HANG]}
    script = f"import sys; sys.path.append({str(BENCHMARKS)!r}); import gpu_run; gpu_run.WORKER = {gpu_run.WORKER}\n"
    command = [sys.executable, "-c", f"{script}gpu_run.main({['--output', str(tmp_path), *BENCHMARKS_ONLY]})"]
    environment = os.environ | {"FASTDIFF_TEST_PLAN": json.dumps(plan)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as program:
        try:
            while not ((tmp_path / "gpu.md").exists() and (run.read() or len(run.rows) == 2)):
                assert program.poll() is None
                time.sleep(0.05)
            workers = Path(f"/proc/{program.pid}/task/{program.pid}/children")
            worker = int(workers.read_text()) if workers.exists() else None
        finally:
            program.send_signal(signal.SIGKILL)
    run.read()
    assert {name: row["rounds"] for name, row in run.rows.items()} == {FORWARD: [7, 7], STEP: [2, 7]}
    assert (run.left, run.results["ended"]) == ({"benchmarks": [STEP, NORMALS]}, "")
    assert "Not run, not yet: benchmarks: " in run.table
    if worker:
        for _ in range(100):
            if not Path(f"/proc/{worker}").exists():
                break
            time.sleep(0.1)
        else:
            pytest.fail("the worker goes on")


def test_a_later_run_goes_on(run):
    """With what is missing, then what lacks a way that decides; a row gives way to one of no fewer rounds only."""
    failing = {NORMALS: [{"fault": "RuntimeError: no"}]}
    cut = row(TRAIN, cut=["bf16"], unknown=[], reached={"best": 2.0})
    options = (*BENCHMARKS_ONLY, "--only", TRAIN, "--only", SAMPLE)
    first = {
        FORWARD: [row(FORWARD)],
        STEP: [row(STEP, 2), DIE],
        TRAIN: [cut],
        SAMPLE: [row(SAMPLE, cut=["reduced"], unknown=["best"])],
    }
    assert run(*options, **first | failing) == 1
    del run.results["faults"][STEP]  # as if it had been cut off
    (run.folder / "gpu.json").write_text(json.dumps(run.results))
    second = {STEP: [row(STEP, 7, 2.0)], TRAIN: [row(TRAIN, 7, 2.0)], SAMPLE: [row(SAMPLE, 6, 2.0), DIE]}
    assert run("--continue", *options, **second) == 1
    assert run.asked()[0] == [STEP, SAMPLE, TRAIN]
    assert {name: row["seconds"]["ours"] for name, row in run.rows.items()} == {
        FORWARD: 1.0, STEP: 2.0, TRAIN: 2.0, SAMPLE: 1.0,
    }  # fmt: skip
    assert run.rows[SAMPLE]["rounds"] == [7, 7]
    assert run.faults == {NORMALS: "RuntimeError: no", SAMPLE: "died of SIGABRT"}
    assert run(*BENCHMARKS_ONLY) == 0  # without the option all is done anew
    assert run.asked() == [[FORWARD, STEP, NORMALS]]
    assert not run.rows


def test_goes_on_with_results_of_another_folder(run, tmp_path):
    assert run(*BENCHMARKS_ONLY, **{FORWARD: [row(FORWARD)]}) == 0
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name in ("gpu.json", "gpu.md"):
        (tmp_path / name).rename(earlier / name)
    assert run("--continue", str(earlier), *BENCHMARKS_ONLY, **{STEP: [row(STEP)]}) == 0
    assert run.asked() == [[STEP, NORMALS]]
    assert set(run.rows) == {FORWARD, STEP}
    assert set(json.loads((earlier / "gpu.json").read_text())["header"]["workloads"]) == {FORWARD}


def test_results_of_another_card_are_not_gone_on_with(run, capfd):
    assert run(*BENCHMARKS_ONLY, **{FORWARD: [row(FORWARD)]}) == 0
    assert run("--continue", *BENCHMARKS_ONLY, gpu="another card") == 0
    assert run.asked() == [[FORWARD, STEP, NORMALS]]
    assert "starts anew: " in (out := capfd.readouterr().out)
    assert "differs in ['gpu']" in out
    run.monkeypatch.setattr(gpu_run, "sources", lambda: "other")
    assert run("--continue", *BENCHMARKS_ONLY, gpu="another card") == 0
    assert run.asked() == [[FORWARD, STEP, NORMALS]]
    assert run("--continue", *BENCHMARKS_ONLY, gpu="another card") == 0
    assert run.asked() == [[FORWARD, STEP, NORMALS]]


def test_networks_are_compiled_ahead(run):
    """Beside the tests, and not for longer than is left for it."""
    run.monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: True)
    run.monkeypatch.setattr(gpu_run.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    run.be_patient()
    options = ("--stage", "benchmarks", "--only", TRAIN, "--only", STEP)
    assert run("--minutes", "10", *options) == 0
    assert sorted(job["way"] for job in run.asked("make")) == sorted(gpu.BEST)
    assert {job["workload"] for job in run.asked("make")} == {TRAIN}
    assert all(outcome.endswith(" s") for outcome in run.results["ahead"].values())
    assert f"Compiled ahead: {TRAIN}, graphs {run.results['ahead'][f'{TRAIN}, graphs']}; " in run.table
    assert run("--minutes", "10", *options, ahead="hang") == 0
    assert set(run.results["ahead"].values()) == {"no time left"}
    assert run(*options) == 0  # there is time to compile where it is timed
    assert run.asked("make") == []


# -- a bare machine ------------------------------------------------------------------------------------------------

BARE = ("fastdiff", "kernels", "benchmarks", "tests")


@pytest.fixture
def bare(tmp_path):
    """Run Python in a copy of the tree, where packages are found and the project is not installed."""
    root, python = tmp_path / "tree", tmp_path / "bare" / "bin" / "python"
    for name in BARE:
        shutil.copytree(HERE.parent / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "results"))
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    packages = os.pathsep.join({str(Path(module.__file__).parents[1]) for module in (numpy, pytest)})
    # What a folder on this path says of the project is not read: only those of a site are.
    environment = {**os.environ, "PYTHONPATH": packages, "FASTDIFF_GPU": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(*command):
        return subprocess.run(
            [str(python), *command], cwd=root, env=environment, capture_output=True, text=True, check=False
        )

    assert "No module named 'fastdiff" in run("-c", "import sys; sys.path.remove(''); import fastdiff").stderr
    return run


def test_nothing_has_to_be_installed(bare, tmp_path):
    """The program, its worker and the tests find the project where it lies; a result is written where it is told."""
    done = bare("benchmarks/gpu.py", "--quick", "--output", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("gpu.py: backend 'cuda' needs CuPy: pip install"), (
        done.stderr
    )
    tests = bare(
        "-m", "pytest", "tests/gpu", "--confcutdir=tests/gpu", "-q", "-p", "no:cacheprovider", "--collect-only"
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "test_gpu.py::test_graphs" in tests.stdout


# -- tests ---------------------------------------------------------------------------------------------------------

SUITE = """
import os
import cupy
import pytest

from fastdiff import backends
from fastdiff.backends.cuda import conv, conv_mma, tuning

@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_parity(name, size):
    assert (name, size) != ("b", "full"), "they differ"

def test_abort(): os.abort()
def test_leaves_the_device_dead():
    cupy.dead = True
    raise RuntimeError("an illegal address")
def test_finds_it_alive(): assert not cupy.dead
def test_cudnn(): pytest.skip("not here")
"""
CUPY = """
from types import SimpleNamespace
dead = False

def wait():
    if dead:
        raise RuntimeError("the device is dead")

pool = [True]

def set_allocator(allocator):
    assert allocator is None
    pool.clear()

cuda = SimpleNamespace(runtime=SimpleNamespace(deviceSynchronize=wait), set_allocator=set_allocator)
"""


@pytest.fixture
def suite(run, tmp_path):
    """A folder of tests with the real conftest; its tool finds errors where it is racecheck."""
    tests, tools = tmp_path / "tests" / "gpu", tmp_path / "bin"
    tests.mkdir(parents=True)
    tools.mkdir()
    (tmp_path / "benchmarks").symlink_to(BENCHMARKS)
    (tests / "conftest.py").symlink_to(HERE / "gpu" / "conftest.py")
    (tests / "test_suite.py").write_text(SUITE)
    (tests / "cupy.py").write_text(CUPY)
    (tools / "compute-sanitizer").write_text(
        f"#!{sys.executable}\nimport pathlib, subprocess, sys\ni = sys.argv.index({sys.executable!r})\n"
        'log = sys.argv[sys.argv.index("--log-file") + 1]\npathlib.Path(log).write_text("a hazard")\n'
        'sys.exit(subprocess.call(sys.argv[i:]) or "racecheck" in sys.argv)\n'
    )
    (tools / "compute-sanitizer").chmod(0o755)
    run.monkeypatch.setattr(gpu_run, "TESTS", tests)
    run.monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    run.monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tests


def outcomes(run, stage):
    return {name.split("::")[-1]: outcome for name, outcome in run.results["tests"][stage].items()}


def test_tests_that_crash_leave_the_others(run, suite):
    """As do those that leave the device dead, and those that fail."""
    assert run("--stage", "tests", "--stage", "full") == 1
    small, full = outcomes(run, "tests"), outcomes(run, "full")
    dead = small.pop("test_leaves_the_device_dead")
    assert small == {
        "test_parity[a-small]": "passed", "test_parity[b-small]": "passed", "test_abort": "failed: died of SIGABRT",
        "test_finds_it_alive": "passed",
    }  # fmt: skip
    assert dead.startswith("failed: ")
    assert "RuntimeError: an illegal address" in dead
    differ = full.pop("test_parity[b-full]")
    assert full == {"test_parity[a-full]": "passed", "test_cudnn": "skipped"}
    assert "they differ" in differ
    assert "GPU tests, tests: 3 passed, **2 failed**: test_abort, test_leaves_the_device_dead." in run.table
    assert "GPU tests, full: 1 passed, **1 failed**: test_parity[b-full]." in run.table
    assert (run.left, run.header["complete"]) == ({}, ["tests", "full"])


def test_tests_that_hang_are_ended_and_those_left_are_named(run, suite):
    hang = f"open({str(run.hung)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(99)"
    text = f"import os, time\n\ndef test_a(): pass\ndef test_b(): {hang}\ndef test_c(): pass"
    (suite / "test_suite.py").write_text(text)
    assert run("--stage", "tests") == 1
    assert outcomes(run, "tests") == {"test_a": "passed", "test_b": f"failed: {SILENT}", "test_c": "passed"}
    run.be_patient()
    assert run("--stage", "tests", "--minutes", "5") == 3
    assert outcomes(run, "tests") == {"test_a": "passed"}
    assert [name.split("::")[-1] for name in run.left["tests"]] == ["test_b", "test_c"]
    (suite / "test_suite.py").write_text("def test_a(): raise OSError\ndef test_b(): pass\ndef test_c(): pass")
    for _ in range(2):  # the second has nothing to do
        assert run("--stage", "tests", "--continue") == 0
        assert outcomes(run, "tests") == dict.fromkeys(("test_a", "test_b", "test_c"), "passed")


def test_the_tools(run, suite, monkeypatch):
    """One of them finds errors, though all tests pass."""
    assert run("--stage", "sanitizer") == 1
    assert set(run.results["tests"]) == set(gpu_run.TOOLS)
    for tool in gpu_run.TOOLS:
        assert outcomes(run, tool) == dict.fromkeys(("test_parity[a-small]", "test_parity[b-small]"), "passed")
    assert run.faults == {"racecheck": "exit code 1\na hazard"}
    assert run.header["complete"] == ["sanitizer"]
    assert "initcheck" in gpu_run.TOOLS


def test_the_tools_see_where_arrays_end(run, suite):
    """CuPy's pool is off under them, and only there."""
    (suite / "test_suite.py").write_text("import cupy\n\ndef test_parity_small(): assert not cupy.pool")
    assert run("--stage", "sanitizer") == 1
    assert set(run.faults) == {"racecheck"}  # it always finds something
    assert {name: len(found) for name, found in run.results["tests"].items()} == dict.fromkeys(gpu_run.TOOLS, 1)
    (suite / "test_suite.py").write_text("import cupy\n\ndef test_parity_small(): assert cupy.pool")
    assert run("--stage", "tests") == 0
    assert set(outcomes(run, "tests").values()) == {"passed"}


def test_no_tools(run, suite, monkeypatch):
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name: None)
    assert run("--stage", "sanitizer") == 0
    assert run.results["stages"]["compute-sanitizer"] == "not installed"


# -- tiles, profiles, and what the package may have ------------------------------------------------------------------

CASES = [f"3x3 of {n}x4x4x8 to 8" for n in (1, 2, 3)]


def swept(name, **seconds):
    """A step that tells the times of tiles."""
    found = {tile.removeprefix("t"): value for tile, value in seconds.items()}
    speeds = {tile: 1 / value for tile, value in found.items()}
    row = gpu_sweep.Swept(name=name, entry="conv", key=f"conv {name}", stages=3, seconds=found, speeds=speeds)
    return {"tell": {"row": asdict(row)}}


def profiled(name):
    return {"tell": {"row": {"name": name, "kernels": [{"name": "adamw", "launches": 1.0, "seconds": 1e-3}]}}}


@pytest.fixture
def sweeping(run):
    run.monkeypatch.setattr(gpu_run.gpu_sweep, "cases", lambda quick: dict.fromkeys(CASES))
    return ("--stage", "sweep", "--stage", "profile")


def test_a_sweep_and_profiles(run, sweeping):
    """A case whose process dies is left out; one that was cut off is done again, and has its rows once."""
    a, b, c = CASES
    plan = {a: [swept(a, t128x64=2.0, t64x32=1.0)], b: [swept(b, t128x64=1.0), DIE], c: [{"fault": "ValueError: no"}]}
    assert run(*sweeping, float32=[profiled("float32")], bf16=[HANG], **plan) == 1
    assert run.faults == {b: "died of SIGABRT", c: "ValueError: no", "bf16": SILENT}
    assert [row["name"] for row in run.results["sweep"]] == [a, b]
    assert [each["name"] for each in run.results["profiles"]] == ["float32"]
    assert "| adamw | 1 | 1000.0 | 100% |" in run.table
    assert "Tiles: timed of 2 convolutions and products, in 2 ways." in run.table
    assert run.header["complete"] == ["sweep", "profile"]
    assert not list(run.folder.glob("sm_*")), "of no family that was told"
    run.be_patient()
    assert run("--minutes", "5", *sweeping, **{a: [swept(a, t128x64=2.0)], b: [swept(b, t64x32=3.0), HANG]}) == 3
    assert (run.left, run.header["complete"]) == ({"sweep": [b, c]}, ["profile"])
    again = {b: [swept(b, t64x32=4.0)], c: [swept(c, t64x32=5.0)]}
    assert run("--continue", *sweeping, **again) == 0
    assert [(row["name"], row["seconds"]) for row in run.results["sweep"]] == [
        (a, {"128x64": 2.0}), (b, {"64x32": 4.0}), (c, {"64x32": 5.0}),
    ]  # fmt: skip
    assert [job["cases"] for job in map(json.loads, run.jobs.read_text().splitlines()) if job["do"] == "sweep"] == [
        [b, c]
    ]


def test_what_the_package_may_have(run, suite, sweeping, monkeypatch):
    """A file that the package reads, once the tests have passed; the benchmarks choose tiles by it in any case."""
    plan = {CASES[0]: [swept(CASES[0], t128x64=2.0, t64x32=1.0)]}
    (suite / "test_suite.py").write_text("def test_a(): pass\ndef test_b(): raise OSError")
    file = run.folder / "sm_90.json"
    assert run("--stage", "tests", *sweeping, arch="90", **plan) == 1
    assert not file.exists()
    (suite / "test_suite.py").write_text("def test_a(): pass")
    only = ("--stage", "benchmarks", "--only", FORWARD)
    assert run("--stage", "tests", *sweeping, *only, arch="90", **plan, **{FORWARD: [row(FORWARD)]}) == 0
    told = run.results["stages"]["For the package"]
    assert told.startswith("sm_90.json, in fastdiff/backends/cuda/measured: ")
    assert f"For the package: {told}." in run.table
    found = json.loads(file.read_text())
    assert (found["gpu"], found["arch"], found["scale"]) == ("a card", "90", 1.0)
    assert found["tests"] == {"tests": {"passed": 1}}
    assert sum(map(len, found["targets"].values())) == sum(map(len, gpu.TARGETS.values()))
    monkeypatch.setattr(backends, "MEASURED", run.folder)
    on_gpu = SimpleNamespace(runtime=SimpleNamespace(arch="90"))
    monkeypatch.setattr(backends, "_shared", lambda *options: on_gpu)
    assert backends._choose_auto.__wrapped__() == "cuda"
    monkeypatch.setattr(tuning, "MEASURED", run.folder)
    tuning.tuning.cache_clear()
    rates = {"conv_128x64": 1.0, "conv_64x32": 2.0}
    assert tuning.tuning("90") == tuning.Tuning({f"conv {CASES[0]}": "64x32"}, rates)
    tuning.tuning.cache_clear()
    (folder,) = {job["measured"] for job in map(json.loads, run.jobs.read_text().splitlines()) if "measured" in job}
    assert folder != str(run.folder)
    (suite / "test_suite.py").write_text("def test_a(): raise OSError")
    assert run("--stage", "tests", arch="90") == 1
    assert not file.exists()
    (suite / "test_suite.py").write_text("def test_a(): pass")
    assert run("--stage", "tests", *sweeping, "--quick", arch="90", **plan) == 0
    assert "For the package" not in run.results["stages"]
    assert not file.exists(), "of a quick run"


def test_every_stage_leaves_time_to_those_behind_it(run, sweeping):
    """And goes on when they are done."""
    a, b, _ = CASES
    run.be_patient()
    plan = {a: [swept(a, t128x64=1.0)], b: [HANG], FORWARD: [row(FORWARD)], STEP: [row(STEP)], NORMALS: [row(NORMALS)]}
    assert run("--minutes", "50", *sweeping, *BENCHMARKS_ONLY, **plan) == 3
    assert [json.loads(line)["do"] for line in run.jobs.read_text().splitlines()] == [
        "start", "sweep", "profile", "workloads", "sweep",
    ]  # fmt: skip
    assert set(run.rows) == {FORWARD, STEP, NORMALS}
    assert run.header["complete"] == ["profile", "benchmarks"]
    assert run.left == {"sweep": [b, CASES[2]]}


def test_some_tests_run_under_tools_beside_the_others(run, suite):
    """Where there is a limit of time, and before anything is timed."""
    (suite / "test_suite.py").write_text("def test_a(): pass\ndef test_of_norms_small(): pass")
    run.monkeypatch.setattr(gpu_run, "SELECTED", gpu_run.SELECTED | {"some": "norms_small", "sanitizer": "norms_small"})
    order = []
    for name in ("run_tests", "sanitize_some", "benchmarks", "sanitize"):
        real = getattr(gpu_run, name)

        def noted(*args, name=name, real=real):
            order.append(name)
            found = real(*args)
            order.append(f"end of {name}")
            return found

        run.monkeypatch.setattr(gpu_run, name, noted)
    stages = ("--stage", "tests", "--stage", "sanitizer", "--stage", "benchmarks", "--only", FORWARD)
    assert run("--minutes", "50", *stages, **{FORWARD: [row(FORWARD)]}) == 1  # racecheck always finds something
    assert order.index("sanitize_some") < order.index("end of sanitize_some") < order.index("benchmarks")
    assert order.index("end of benchmarks") < order.index("sanitize")
    assert set(run.results["tests"]) == {"tests", "memcheck, some", "racecheck, some", *gpu_run.TOOLS}
    assert run.faults == dict.fromkeys(("racecheck, some", "racecheck"), "exit code 1\na hazard")


def test_checks_under_tools_are_known():
    known = importlib.import_module("cuda_parity").CHECKS
    for name in ("cuda_parity_conv", "cuda_parity_conv_mma", "cuda_parity_layers", "cuda_parity_mlp"):
        importlib.import_module(name)
    importlib.import_module("cuda_parity_covariance")
    assert set(gpu_run.SOME) <= set(known)


# -- a rehearsal ------------------------------------------------------------------------------------------------------

REHEARSED = {  # of every stage something that the host run does in a second or two
    "tests": "optimiser-small or guidance-small", "full": "constants-small", "sanitizer": "constants-small",
    "some": "constants-small",
}  # fmt: skip


@pytest.mark.skipif(not host_cuda.has_compiler(), reason="the host run of the CUDA kernels needs g++")
def test_a_rehearsal(tmp_path):
    """The program itself on a stand-in for CuPy, in 20 seconds; then what was left. All files are whole at any time."""
    host_cuda.build_all()
    host_cuda.build(host_cuda.host_text("conv_mma.2"))
    out, tools = tmp_path / "out", tmp_path / "bin"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(
        f"#!{sys.executable}\nimport os, sys\ni = sys.argv.index({sys.executable!r})\n"
        "os.execv(sys.argv[i], sys.argv[i:])\n"
    )
    (tools / "compute-sanitizer").chmod(0o755)
    script = (
        f"import sys; sys.path.append({str(BENCHMARKS)!r}); import gpu_run; gpu_run.SELECTED = {REHEARSED}\n"
        "sys.exit(gpu_run.main(sys.argv[1:]))"
    )
    environment = os.environ | {
        "PYTHONPATH": str(HERE / "gpu_stand_in"), "FASTDIFF_CACHE_DIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1",
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip

    def run(*options):
        command = [sys.executable, "-c", script, "--quick", "--output", str(out), "--only=forward", "--only=norm-"]
        begin = time.monotonic()
        with subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True) as program:
            while program.poll() is None:
                for path in out.glob("[!.]*.json"):
                    json.loads(path.read_text())
                time.sleep(0.1)
            said = program.stdout.read()
        return program.returncode, time.monotonic() - begin, said, json.loads((out / "gpu.json").read_text())

    code, took, said, first = run("--minutes", str(20 / 60))
    assert code in (0, 3), said  # whether there was time for all of it
    assert took < 30
    assert first["faults"] == {}
    assert set(first["header"]["complete"]) | first["left"].keys() == set(gpu_run.STAGES)
    assert first["stages"]["First launches"] == f"{len(gpu.FAMILIES)} of {len(gpu.FAMILIES)} families"
    code, _, said, second = run("--continue")
    assert code == 0, said
    assert "goes on with" in said
    assert (second["left"], second["faults"], second["ended"]) == ({}, {}, "all")
    assert second["header"]["complete"] == list(gpu_run.STAGES)
    left = {name for names in first["left"].values() for name in names}
    for name in ("rows", "sweep", "profiles"):
        assert all(each in second[name] for each in first[name] if each["name"] not in left)
    assert {each["name"] for each in second["rows"]} == {"forward-1000000x50", "norm-1024x32x32x64"}
    assert {each["name"] for each in second["sweep"]} == set(gpu_sweep.cases(quick=True))
    assert {each["name"] for each in second["profiles"]} == {"float32", "bf16"}
    for stage in ("tests", "full", *gpu_run.TOOLS):
        assert set(second["tests"][stage].values()) == {"passed"}
    table = (out / "gpu.md").read_text()
    for name, targets in gpu.TARGETS.items():
        title = gpu.BY_NAME[name].title
        assert table.count(f"\n| {title} | ") >= len(targets)
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.md"], "a quick run is nothing to choose by"
    found = tuning.Tuning(**gpu_sweep.tuning_of([report.record(gpu_sweep.Swept, each) for each in second["sweep"]]))
    assert set(found.tiles.values()) <= {tile.name for module in (conv, conv_mma) for tile in module.TILES}
    assert len(found.tiles) == 8
    assert found.stages in gpu_sweep.STAGES[:2]
