"""The program behind ``make gpu``, as far as it runs without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from device_array import DeviceRuntime
from fake_cudnn import Library
from host_cuda import HostRuntime, has_compiler

from fastdiff import bench
from fastdiff.backends.cuda import CudaBackend

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
gpu, cases = map(importlib.import_module, ("gpu", "cases"))

FORWARD = cases.BY_NAME["forward-1000000x50"]
HEADER = {
    "gpu": "NVIDIA H200", "cupy": "14.2.0", "numba-cuda": None, "torch": "2.13.0", "python": "3.12.1", "scale": 1.0,
    "system": "Linux x86_64", "date": "2026-01-02", "commit": "abc",
}  # fmt: skip


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gpu.py: backend 'cuda' needs ")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(capsys):
    for bad in (["--only", "nothing"], ["--stage", "all"], ["more"]):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(bad)
        assert "usage: gpu.py" in capsys.readouterr().err


def test_what_is_wanted_is_measured():
    names = {case.name for case in gpu.CASES}
    assert set(gpu.WANTED) <= names
    assert all(set(wanted) <= {*gpu.WAYS, "copy", "best"} for wanted in gpu.WANTED.values())
    assert set(gpu.BEST) <= set(gpu.IMAGE_WAYS)
    by_name = {case.name: case for case in gpu.CASES}
    assert all(by_name[name].kind in gpu.MEMORY_BOUND for name, wanted in gpu.WANTED.items() if "copy" in wanted)


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
@pytest.mark.parametrize("case", [case for case in gpu.CASES if case.kind != "normals"], ids=lambda case: case.name)
def test_a_case_runs_on_the_host(monkeypatch, case):
    """Of image networks all four ways of ours, with a stand-in for cuDNN."""
    waits, runtime = [], HostRuntime()
    small = replace(case.at(0.0001), n=2)
    if case.kind in gpu.IMAGES:
        small = replace(small, shape=(4, 4, 3) if case.net else (5, 32) if case.kind == "attention" else (4, 4, 8))
        small = replace(small, steps=2) if case.kind == "unet-ddim" else small
        for name, value in {"channels": (8, 8, 8), "blocks": 1, "head_width": 8}.items():
            monkeypatch.setitem(bench.UNET, name, value)
        monkeypatch.setitem(sys.modules, "cudnn", Library(runtime))
        find = gpu.importlib.util.find_spec
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name == "cudnn" or find(name))
    ways = gpu.prepare(CudaBackend(runtime), small, None, None)
    seconds, failed = gpu.measure(ways, lambda: waits.append(1), 1, 0.0001)
    assert not failed
    alone = case.kind not in gpu.IMAGES or case.kind in ("norm", "attention")
    assert set(seconds) == ({"ours"} if alone else set(gpu.OURS))
    assert min(seconds.values()) > 0
    assert waits
    row = gpu.row_of(small, seconds, failed, 1e9)
    assert json.loads(json.dumps(row)) == row


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
def test_the_whole_program_on_a_device_of_the_host(monkeypatch, tmp_path, capsys):
    """All stages but the test runs themselves, on arrays that refuse to come to the host unasked."""
    be, asked = CudaBackend(DeviceRuntime()), []
    cupy = SimpleNamespace(
        __version__="14.2.0",
        cuda=SimpleNamespace(runtime=SimpleNamespace(deviceSynchronize=lambda: asked.append("wait"))),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr("fastdiff.backends.cuda.CudaBackend", lambda *args: be)
    monkeypatch.setattr(gpu, "run_tests", lambda *options, under=(): asked.append(("tests", *under, *options)) or "")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/compute-sanitizer")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    chosen = ["--only", "forward", "--only", "step", "--only", "normals"]
    assert gpu.main(["--quick", "--output", str(tmp_path), *chosen]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"].split("-")[0] for row in results["rows"]] == ["normals", "forward", "step"]
    assert all(set(row["share of copy"]) == {"ours"} for row in results["rows"])
    absent = dict.fromkeys(("PyTorch", "diffusers", "cudnn"), "not installed")
    assert results["stages"] == {"GPU tests": "passed", "compute-sanitizer": "no errors"} | absent
    assert results["header"]["gpu"] == "host"
    assert (tmp_path / "gpu.md").read_text() in out
    assert [call[2:4] for call in asked if call[1:2] == ("compute-sanitizer",)] == [("--tool", t) for t in gpu.TOOLS]
    assert "wait" in asked
    monkeypatch.setattr(gpu, "run_tests", lambda *options, under=(): "1 failed")
    assert gpu.main(["--quick", "--stage", "tests", "--stage", "sanitizer"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "gpu.py: tests: 1 failed", "gpu.py: sanitizer: errors found by memcheck, racecheck, synccheck",
    ]  # fmt: skip


def test_a_turn_times_many_calls_and_waits_for_them(monkeypatch):
    now, calls = [0.0], [0]

    def run():
        calls[0] += 1

    def wait():  # what was issued takes 2 ms a call, and is done only now
        now[0] += 0.002 * calls[0]
        calls[0] = 0

    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    assert gpu.turn(run, wait, 0.1) == pytest.approx(0.002)
    assert now[0] > 0.1


def test_a_peer_that_fails_is_left_out_and_we_are_not():
    def broken():
        raise RuntimeError("no Triton\nand more")

    ways = gpu.Ways({"ours": int, "eager": int, "compiled": broken}, {"ours": 10, "eager": 1, "compiled": 1})
    seconds, failed = gpu.measure(ways, int, 1, 0.001)
    assert set(seconds) == {"ours", "eager"}
    assert seconds["ours"] < seconds["eager"]
    assert failed == {"compiled": "RuntimeError: no Triton"}
    with pytest.raises(RuntimeError, match="no Triton"):
        gpu.measure(gpu.Ways({"ours": broken}, {"ours": 1}), int, 1, 0.001)


def test_the_table():
    """Half the bandwidth of a copy that moves as many bytes a second as the case has."""
    seconds = {"ours": 2.0, "twin": 4.0, "eager": 8.0}
    row = gpu.row_of(FORWARD, seconds, {"compiled": "RuntimeError: no"}, float(FORWARD.bytes))
    assert row["ratios"] == {"eager": 4.0}
    assert row["share of copy"] == {"ours": 0.5, "twin": 0.25}
    assert row["missed"] == ["copy"]
    assert row["unknown"] == ["compiled"]
    fast = gpu.row_of(FORWARD, {"ours": 1.1, "compiled": 1.3, "eager": 3.2}, {}, float(FORWARD.bytes))
    assert fast["missed"] == ["compiled", "eager"]
    chain = gpu.row_of(gpu.CASES[4], {"ours": 1.0, "graphs": 6.0}, {}, 1e9)
    assert (chain["share of copy"], chain["missed"]) == ({}, [])
    text = gpu.table({"header": HEADER, "stages": {"GPU tests": "passed"}, "rows": [row, fast, chain]})
    lines = text.splitlines()
    assert "NVIDIA H200; cupy 14.2.0, torch 2.13.0; Python 3.12.1" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(cells) for cells in rows} == {8}
    assert rows[2][:7] == [FORWARD.title, "2.00 s", "50%", "4.00 s", "**4.0**", "failed", ""]
    assert rows[2][7] == "85% of the copy: 50%, **missed**, 3 x PyTorch: 4.00, met, 1.2 x compiled: not measured"
    assert rows[4][6:] == ["**6.0**", "5 x compiled, CUDA graph: 6.00, met"]
    assert lines[-1] == "GPU tests: passed."


def test_the_table_of_image_networks():
    """The fastest of ours against the fastest of their CUDA graphs, whatever the precision."""
    by_name = {case.name: case for case in gpu.CASES}
    seconds = {"ours": 4.0, "ours-bf16": 2.0, "eager": 9.0, "channels": 8.0, "graphs": 5.0, "bf16-graphs": 2.9}
    slow = gpu.row_of(by_name["unet-train-16"], seconds, {"reduced": "RuntimeError: no"}, 1e9)
    assert slow["ratios"]["graphs"] == 2.5
    assert (slow["reached"], slow["missed"], slow["unknown"]) == ({"best": 1.45}, ["best"], [])
    fast = gpu.row_of(by_name["unet-train-256"], seconds, {}, 1e9)
    assert fast["missed"] == []
    alone = gpu.row_of(by_name["unet-ddim-50-16"], {"ours": 1.0}, {}, 1e9)
    assert alone["unknown"] == ["best"]
    norm = by_name["norm-1024x32x32x64"]
    norm_row = gpu.row_of(norm, {"ours": 1.0}, {}, float(norm.bytes))
    curve = gpu.row_of(FORWARD, {"ours": 1.0}, {}, 1e9)
    text = gpu.table({"header": HEADER, "stages": {}, "rows": [slow, curve, fast, alone, norm_row]})
    first, second = text.split("Image networks, and their layers alone")
    assert [line.count(" | ") for line in first.splitlines() if line.startswith("| ")] == [7, 7]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in second.splitlines() if line[:1] == "|"]
    assert {len(cells) for cells in rows} == {14}
    assert rows[0][:7] == ["work", "ours", "bf16", "cuDNN", "cuDNN, bf16", "of the copy", "PyTorch"]
    assert rows[2][1:] == [
        "4.00 s", "2.00 s", "", "", "", "9.00 s", "8.00 s", "", "failed", "5.00 s", "", "2.90 s",
        "1.5 x the fastest CUDA graph of PyTorch, by the fastest of ours: 1.45, **missed**",
    ]  # fmt: skip
    assert rows[3][-1].endswith(": 1.45, met")
    assert rows[4][-1].endswith(": not measured")
    assert (rows[5][5], rows[5][-1]) == ("100%", "80% of the copy: 100%, met")


def test_a_case_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    """Its fault is told at the end, and what went before and comes after is written."""
    be = CudaBackend(HostRuntime())
    cupy = SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=SimpleNamespace(deviceSynchronize=int)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr("fastdiff.backends.cuda.CudaBackend", lambda *args: be)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    prepare = gpu.prepare

    def broken(be, case, *args):
        if case.kind == "normals":
            raise AssertionError("they differ")
        return prepare(be, case, *args)

    monkeypatch.setattr(gpu, "prepare", broken)
    chosen = ["--only", "normals", "--only", "step"]
    assert gpu.main(["--quick", "--stage", "benchmarks", "--output", str(tmp_path), *chosen]) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["step"]
    assert "gpu.py: normals-48x1000000: AssertionError: they differ" in capsys.readouterr().err


def test_results_that_differ_are_not_timed():
    ours = np.ones(3, np.float32)
    gpu.agree("case", ours, ours + np.float32(1e-6))
    with pytest.raises(AssertionError, match="case: ours and PyTorch's differ by"):
        gpu.agree("case", ours, ours + np.float32(1e-2))
    with pytest.raises(AssertionError):
        gpu.agree("case", ours * np.float32("nan"), ours)
