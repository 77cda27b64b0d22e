"""The program behind ``make gpu``, as far as it runs without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fake_cudnn import Library
from host_cuda import HostRuntime, has_compiler

from fastdiff import bench
from fastdiff.backends.cuda import CudaBackend
from fastdiff.bench.layers import Attention
from fastdiff.bench.networks import Pictures, PicturesSampling

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
gpu, gpu_run, gpu_sweep = map(importlib.import_module, ("gpu", "gpu_run", "gpu_sweep"))
record = importlib.import_module("report").record

FORWARD = bench.BY_NAME["forward-1000000x50"]
HEADER = {
    "gpu": "NVIDIA H200", "cupy": "14.2.0", "numba-cuda": None, "torch": "2.13.0", "python": "3.12.1", "scale": 1.0,
    "system": "Linux x86_64", "date": "2026-01-02", "commit": "abc",
}  # fmt: skip


def row_of(name, seconds, failed=(), bandwidth=1e9, rounds=(7, 7), cut=()):
    return replace(gpu.row_of(gpu.BY_NAME[name], seconds, dict(failed), bandwidth, list(cut)), rounds=rounds)


def table(*rows, ended="all", **results):
    return gpu.Results(HEADER, list(rows), ended, **results).table()


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
    for bad in (["--only", "nothing"], ["--stage", "all"], ["more"], ["--minutes", "0"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit, match="2"):
            gpu_run.main(bad)
        assert "usage: gpu.py" in capsys.readouterr().err


def test_what_has_a_target_is_measured():
    names = set(gpu.BY_NAME)
    assert len(names) == len(gpu.WORKLOADS)
    assert set(gpu.TARGETS) <= set(gpu.FIRST) <= names
    assert gpu.in_order(sorted(names))[:9] == list(gpu.FIRST)
    assert all(set(targets) <= {*gpu.WAYS, "copy", "best"} for targets in gpu.TARGETS.values())
    assert set(gpu.BEST) <= set(gpu.IMAGE_WAYS)
    assert all(gpu.BY_NAME[name].memory_bound for name, targets in gpu.TARGETS.items() if "copy" in targets)


def test_a_size_is_in_the_name_and_the_title():
    found = {(w.name, w.title, w.n) for w in gpu.WORKLOADS if w.name not in bench.BY_NAME}
    assert found >= {
        ("chain-tutorial-1000000", "100-step chain, tutorial MLP, n = 1,000,000", 1_000_000),
        ("posterior-16384x10000x64", "denoiser of 10,000 x 64 data, 16,384 states", 16_384),
        ("norm-1024x32x32x64", "GroupNorm and SiLU, 1024 x 32 x 32 x 64", 1024),
        ("conv-back-256x16x16x128", "its gradients, 256 x 16 x 16 x 128", 256),
    }


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
@pytest.mark.parametrize("workload", gpu.WORKLOADS[1:], ids=lambda workload: workload.name)
def test_a_workload_runs_on_the_host(monkeypatch, workload):
    """Of image networks all four ways of ours, with a stand-in for cuDNN."""
    waits, runtime = [], HostRuntime()
    small = replace(workload.at(0.0001), n=2)
    if workload.image:
        is_network, is_attention = (isinstance(workload, kind) for kind in (Pictures, Attention))
        small = replace(small, shape=(4, 4, 3) if is_network else (5, 32) if is_attention else (4, 4, 8))
        small = replace(small, channels=(8, 8, 8)) if is_network else small
        small = replace(small, steps=2) if isinstance(small, PicturesSampling) else small
        for name, value in {"blocks": 1, "head_width": 8}.items():
            monkeypatch.setitem(bench.networks.UNET, name, value)
        monkeypatch.setitem(sys.modules, "cudnn", Library(runtime))
        find = gpu.importlib.util.find_spec
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name == "cudnn" or find(name))
    ways = gpu.prepare(CudaBackend(runtime), small, None, None)
    runs, failed, cut = gpu.make(ways, lambda: waits.append(1))
    seconds = next(gpu.measure(runs, ways.units, lambda: waits.append(1), 0.0001))
    assert not failed
    assert not cut
    precise = {f"ours-{precision}" for precision in workload.precisions}
    assert set(seconds) == (set(gpu.OUR_TITLES) if workload.convolves else {"ours"} | precise)
    assert min(seconds.values()) > 0
    assert waits
    row = gpu.row_of(small, seconds, failed, 1e9, [])
    assert record(gpu.Row, json.loads(json.dumps(asdict(row)))) == row


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


def broken():
    raise RuntimeError("no Triton\nand more")


def made(*names, **others):
    """Ways of which those that are named run."""
    makers = {name: lambda: int for name in names} | others
    return gpu.Ways(makers, dict.fromkeys(makers, 1))


def test_rounds_of_turns():
    ways = made("ours", "eager")
    units = {"ours": 10_000, "eager": 1}
    rounds = list(islice(gpu.measure(gpu.make(ways, int)[0], units, int, 0.001), 3))
    assert len(rounds) == 3
    assert all(set(seconds) == {"ours", "eager"} for seconds in rounds)
    assert all(seconds["ours"] < seconds["eager"] for seconds in rounds)


def test_a_way_that_fails_is_left_out():
    """Whether it cannot be made or cannot run; all of ours, and there is nothing to compare."""
    told = []
    ways = made("ours", "eager", compiled=broken, **{"ours-bf16": lambda: broken})
    runs, failed, cut = gpu.make(ways, int, told.append, without={"eager": "died", "graphs": "no such way"})
    assert (set(runs), cut, told) == ({"ours"}, [], ["ours", "compiled", "ours-bf16"])
    assert failed == dict.fromkeys(("compiled", "ours-bf16"), "RuntimeError: no Triton") | {"eager": "died"}
    with pytest.raises(RuntimeError, match="eager: died; ours: RuntimeError: no Triton"):
        gpu.make(made("eager", ours=broken), int, without={"eager": "died"})


def test_a_device_that_is_dead_ends_the_work():
    waits = iter([int, broken])
    with pytest.raises(gpu.DeadError, match="RuntimeError: no Triton"):
        gpu.make(made("ours", compiled=broken), lambda: next(waits)())


def test_what_is_late_is_cut():
    """But for ours and PyTorch as it stands; a target can still be missed then, and not met."""
    ways = made("ours", "ours-bf16", "eager", "graphs", "reduced")
    clock = iter([False, True])
    runs, failed, cut = gpu.make(ways, int, late=lambda: next(clock))
    assert (set(runs), failed, cut) == ({"ours", "ours-bf16", "eager", "graphs"}, {}, ["reduced"])
    fast, slow = (row_of("unet-train-16", {"ours": 1.0, "graphs": theirs}, cut=cut) for theirs in (1.6, 1.4))
    assert (fast.reached, fast.missed, fast.unknown) == ({}, [], ["best"])
    assert (slow.reached, slow.missed, slow.unknown) == ({"best": 1.4}, ["best"], [])
    assert row_of("unet-train-16", {"ours": 1.0, "graphs": 1.6}, cut=["channels"]).reached == {"best": 1.6}
    text = table(fast)
    assert "| no time |" in text
    assert text.count("by the fastest of ours: not measured") == 4  # its row, and three targets


def test_what_decides_a_target_is_made_first():
    assert gpu.deciding(gpu.BY_NAME["unet-ddim-50-16"]) == gpu.BEST
    assert gpu.deciding(FORWARD) == ("eager", "compiled")


def test_the_table():
    """Half the bandwidth of a copy that moves as many bytes a second as the workload has."""
    seconds, speed = {"ours": 2.0, "twin": 4.0, "eager": 8.0}, float(FORWARD.bytes)
    row = row_of(FORWARD.name, seconds, {"compiled": "RuntimeError: no"}, speed)
    assert row.ratios == {"eager": 4.0}
    assert row.share_of_copy == {"ours": 0.5, "twin": 0.25}
    assert row.missed == ["copy"]
    assert row.unknown == ["compiled"]
    fast = row_of(FORWARD.name, {"ours": 1.1, "compiled": 1.3, "eager": 3.2}, {}, speed, (3, 7))
    assert fast.missed == ["compiled", "eager"]
    chain = row_of("chain-tutorial-1000000", {"ours": 1.0, "graphs": 6.0})
    assert (chain.share_of_copy, chain.missed) == ({}, [])
    text = table(row, fast, chain, stages={"GPU tests": "2 passed"}, faults={"step": "died\nbadly"})
    lines = text.splitlines()
    assert "NVIDIA H200; cupy 14.2.0, torch 2.13.0; Python 3.12.1" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(cells) for cells in rows[:5]} == {10}
    assert rows[2][:9] == [FORWARD.title, "2.00 s", "", "", "50%", "4.00 s", "**4.0**", "failed", ""]
    assert rows[2][9] == "85% of the copy: 50%, **missed**, 3 x PyTorch: 4.00, met, 1.2 x compiled: not measured"
    assert rows[3][0] == f"{FORWARD.title} (3 of 7 rounds)"
    assert rows[4][8:] == ["**6.0**", "5 x compiled, CUDA graph: 6.00, met"]
    assert lines[-2:] == ["GPU tests: 2 passed.", "step: **died**."]


def test_every_target_is_accounted_for():
    row = row_of(FORWARD.name, {"ours": 2.0, "eager": 8.0}, {}, float(FORWARD.bytes))
    lines = table(row).splitlines()
    targets = lines[lines.index("| work | target |") + 2 :]
    assert sum(map(len, gpu.TARGETS.values())) == 12
    assert len([line for line in targets if line.startswith("|")]) == 12
    assert "Targets: 1 met, 1 missed, 10 not measured." in lines
    assert targets[:3] == [
        f"| {FORWARD.title} | {target} |"
        for target in ("85% of the copy: 50%, **missed**", "3 x PyTorch: 4.00, met", "1.2 x compiled: not measured")
    ]


def test_what_was_not_run_is_named():
    left = {"benchmarks": ["norm-1", "conv-2"], "full": ["test_a"]}
    for ended, why in (("time", "no time left"), ("", "not yet"), ("all", "given up")):
        lines = table(left=left, ended=ended).splitlines()
        assert lines[-2:] == [f"Not run, {why}: benchmarks: norm-1, conv-2.", f"Not run, {why}: full: test_a."]


def test_the_table_of_image_networks():
    """The fastest of ours against the fastest of their CUDA graphs, whatever the precision."""
    seconds = {"ours": 4.0, "ours-bf16": 2.0, "eager": 9.0, "channels": 8.0, "graphs": 5.0, "bf16-graphs": 2.9}
    slow = row_of("unet-train-16", seconds, {"reduced": "RuntimeError: no"})
    assert slow.ratios["graphs"] == 2.5
    assert (slow.reached, slow.missed, slow.unknown) == ({"best": 1.45}, ["best"], [])
    fast = row_of("unet-train-256", seconds)
    assert fast.missed == []
    alone = row_of("unet-ddim-50-16", {"ours": 1.0})
    assert alone.unknown == ["best"]
    norm = gpu.BY_NAME["norm-1024x32x32x64"]
    norm_row = row_of(norm.name, {"ours": 1.0}, {}, float(norm.bytes))
    text = table(slow, row_of(FORWARD.name, {"ours": 1.0}), fast, alone, norm_row)
    first, second = text.split("Image networks, and their layers alone")
    assert [line.count(" | ") for line in first.splitlines() if line.startswith("| ")] == [9, 9]
    second = second.split("Targets:")[0]
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


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
def test_the_whole_program_on_a_device_of_the_host(monkeypatch, tmp_path, capfd):
    """On arrays that refuse to come to the host unasked; one workload fails, another ends its process."""
    monkeypatch.setattr(gpu_run, "WORKER", (sys.executable, str(HERE / "gpu_on_host.py")))
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("FASTDIFF_TEST_BROKEN", "similarity-4096x128:reshape-1000000x128")
    options = ["--quick", "--stage", "benchmarks", "--output", str(tmp_path)]
    chosen = ["forward", "step", "similarity", "reshape", "normals"]
    assert gpu_run.main([*options, *(f"--only={name}" for name in chosen)]) == 1
    out, err = capfd.readouterr()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"].split("-")[0] for row in results["rows"]] == ["forward", "step", "normals"]
    assert all(set(row["share_of_copy"]) == {"ours"} for row in results["rows"])
    assert all(row["rounds"] == [1, 1] for row in results["rows"])
    compiled = ", ".join(f"{source} {seconds:.1f} s" for source, seconds in results["compile"].items())
    absent = dict.fromkeys(("PyTorch", "diffusers", "cudnn"), "not installed")
    launched = f"{len(gpu.FAMILIES)} of {len(gpu.FAMILIES)} families"
    assert results["stages"] == {"Kernels compiled": compiled, "First launches": launched} | absent
    variants = len(gpu_sweep.STAGES) - 1
    assert len(results["compile"]) == len(list((HERE.parent / "kernels" / "cuda").glob("*.cu"))) + variants
    assert results["faults"] == {
        "optim.cu": "optim.cu does not compile",
        "reshape-1000000x128": "RuntimeError: ours: RuntimeError: an illegal memory access was encountered",
        "similarity-4096x128": "AssertionError: they differ",
    }
    assert (results["header"]["gpu"], results["header"]["complete"]) == ("host", ["benchmarks"])
    assert (tmp_path / "gpu.md").read_text() in out
    assert "gpu.py: similarity-4096x128: AssertionError: they differ" in err


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
def test_a_worker_makes_one_way(tmp_path):
    events = tmp_path / "events"
    environment = os.environ | {"FASTDIFF_GPU_EVENTS": str(events), "FASTDIFF_GPU_PARENT": str(os.getpid())}
    for way, code, told in (("ours", 0, ""), ("theirs", 3, '{"dying": "KeyError: \'theirs\'"}\n')):
        events.write_text("")
        job = json.dumps({"do": "make", "workload": FORWARD.name, "way": way})
        command = [sys.executable, str(HERE / "gpu_on_host.py"), job]
        assert subprocess.run(command, capture_output=True, env=environment, check=False).returncode == code
        assert events.read_text() == told


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
def test_a_chain_is_timed_in_every_precision_and_a_wrong_one_is_not(monkeypatch):
    chain, be = replace(gpu.BY_NAME["chain-tutorial-1000"], n=2, shape=(8,)), CudaBackend(HostRuntime())
    ways = gpu.prepare(be, chain, None, None)
    assert set(ways.makers) == {"ours", "ours-bf16x3", "ours-bf16"}
    assert set(ways.units.values()) == {1}
    ways.makers["ours-bf16x3"]()
    assert be.runtime.launches[-1] == ("mlp_mma", "mlp_chain_bf16x3")
    monkeypatch.setitem(chain.precisions, "bf16", chain.precisions["bf16x3"])
    with pytest.raises(AssertionError, match="chain-tutorial-1000: bf16 and float32 differ by"):
        ways.makers["ours-bf16"]()
    row = row_of("chain-tutorial-1000", {"ours": 0.2, "ours-bf16x3": 0.1, "eager": 0.4}, {"ours-bf16": "no"})
    assert gpu.array_cells(row)[1:4] == ["200 ms", "100 ms", "failed"]
    assert row.ratios == {"eager": 2.0}


def test_results_that_differ_are_not_timed():
    ours = np.ones(3, np.float32)
    bench.workload.agree("case", ours, ours + np.float32(1e-6))
    with pytest.raises(AssertionError, match="case: ours and PyTorch's differ by"):
        bench.workload.agree("case", ours, ours + np.float32(1e-2))
    with pytest.raises(AssertionError):
        bench.workload.agree("case", ours * np.float32("nan"), ours)
