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

import numpy
import pytest

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
gpu, gpu_run = map(importlib.import_module, ("gpu", "gpu_run"))

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
