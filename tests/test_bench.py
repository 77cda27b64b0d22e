"""How work is timed and compared with what the machine can do: `fastdiff.bench`, its command, and programs on it."""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_array import DeviceRuntime
from host_cuda import HostRuntime, has_compiler

import fastdiff as fd
from fastdiff import bench, cli
from fastdiff.backends.cuda import CudaBackend

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
workloads, run, scaling, machine = map(importlib.import_module, ("workloads", "run", "scaling", "machine"))

FORWARD, CONV = bench.BY_NAME["forward-1000000x50"], bench.BY_NAME["conv-16x32x32x64"]

# ------------------------------------------------------------------------------------------- roofs and rates


def test_a_share_is_of_the_roof_that_binds():
    roofs = bench.Roofs(memory=1e9, arithmetic=1e10)
    assert roofs.share(FORWARD, 2 * FORWARD.bytes / 1e9) == (pytest.approx(0.5), "memory")
    assert roofs.share(CONV, 4 * CONV.operations / 1e10) == (pytest.approx(0.25), "arithmetic")


def test_a_rate_counts_the_work_of_a_unit():
    assert FORWARD.rate(0.5) == (12 * 50e6 + 8e6) / 0.5e9
    assert CONV.rate(0.5) == pytest.approx(2 * 9 * 64 * 64 * 16 * 32 * 32 / 0.5e9)
    assert bench.BY_NAME["train-tutorial-1000"].rate(0.5) == 2000
    assert workloads.BY_NAME["cold-start"].rate(1.0) is None


def test_a_time_is_the_median_of_runs(monkeypatch):
    clock = iter([0, 1, 1, 10, 10, 12])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert bench.median_seconds(lambda: None, 12) == 2


@pytest.mark.parametrize("name", ["cpu", "numpy"])
def test_the_roofs_of_the_host(name):
    roofs = bench.roofs_of(fd.get_backend(name), 1e-3)
    assert 1e8 < roofs.memory < 1e13
    assert 1e8 < roofs.arithmetic < 1e15


def test_a_row_of_the_results():
    workload, be = bench.BY_NAME["normals-960000x50"].at(1e-3), fd.get_backend("cpu")
    result = bench.timed(workload, be, bench.Roofs(1e9, 1e9), 0.01)
    assert result.rate == pytest.approx(workload.bytes / result.seconds / 1e9)
    assert result.share == pytest.approx(workload.bytes / 1e9 / result.seconds)
    assert (result.n, result.roof, result.unit, result.difference) == (960, "memory", "GB/s", 0)
    assert bench.timed(bench.BY_NAME["normals-960000x50"], fd.get_backend("numpy"), bench.Roofs(1, 1), 0).n == 20_000


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench.measure, "median_seconds", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(bench.layers.OptimizerStep, "tolerance", -1.0)
    with pytest.raises(AssertionError, match="cpu and numpy differ"):
        bench.timed(bench.BY_NAME["adamw-4000000"].at(1e-3), fd.get_backend("cpu"), bench.Roofs(1, 1))


def test_numbers_in_a_table():
    assert [bench.speed(value) for value in (0.01234, 6.709, 98.76, 751_879.7, 0)] == [
        "0.0123", "6.71", "98.8", "752,000", "0",
    ]  # fmt: skip
    result = bench.Result("a", "A", "cpu", 1, 0.00123, 5.0, "GB/s", 0.0512, "memory", 0.0)
    assert result.cells() == ["1.23 ms", "5.00 GB/s", "5.1% of memory"]
    assert result._replace(share=1.004).cells()[2] == "100% of memory"
    assert result._replace(rate=None).cells() == ["1.23 ms", "", ""]


def test_what_needs_the_source_tree_is_not_in_the_command():
    assert set(bench.QUICK) <= set(bench.BY_NAME) < set(workloads.BY_NAME)
    quick = {type(bench.BY_NAME[name]) for name in bench.QUICK}
    left = {type(workload) for workload in bench.WORKLOADS} - quick
    networks = {bench.networks.MemoryChain, bench.networks.ChainGiven}
    assert left == {bench.arrays.Reshape, bench.arrays.Standardise, *networks}


# ------------------------------------------------------------------------------------------- on a device

ON_DEVICE = [
    replace(bench.BY_NAME[name], n=2)
    for name in (
        "normals-960000x50", "forward-1000000x50", "step-64x256x256x3", "chain-tutorial-1000", "train-default-1000",
        "similarity-4096x128", "reshape-1000000x128", "standardise-1000000x128", "shaped-1000000x128",
        "posterior-1000x10000x64", "mlp-default-100000",
    )
]  # fmt: skip


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
@pytest.mark.parametrize("workload", ON_DEVICE, ids=lambda workload: workload.name)
def test_a_workload_on_a_device_agrees_and_is_waited_for(workload, monkeypatch):
    """On arrays that refuse to come to the host unasked."""
    if workload.name.startswith("step"):
        workload = replace(workload, shape=(8, 8, 3))
    be, waits = CudaBackend(DeviceRuntime()), []
    assert workload.agree_with_reference(be) <= workload.tolerance
    work = replace(workload, units=1).setup(be)
    to_numpy = be.to_numpy
    monkeypatch.setattr(be, "to_numpy", lambda array: waits.append(array.shape) or to_numpy(array))
    result = work.run()
    assert waits[-1] == (1,)
    work.check(result)


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
def test_the_roofs_of_a_device():
    roofs = bench.roofs_of(CudaBackend(HostRuntime()), 1e-4)
    assert roofs.memory > 0
    assert roofs.arithmetic > 0


# ------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_draws_it(tmp_path, capsys):
    picture = tmp_path / "bench.png"
    code = cli.main(
        [
            "bench",
            "--tiny",
            "--backend",
            "cpu",
            "--threads",
            "1",
            "--only",
            "normals",
            "--only",
            "chain-default",
            "--plot",
            str(picture),
        ]
    )
    printed = capsys.readouterr()
    assert code == 0
    lines = printed.out.splitlines()
    assert "backend cpu" in lines[0]
    assert "1 thread" in lines[0]
    assert [line.split("  ")[0] for line in lines[4:]] == [
        "48 M normals, 48 rows",
        "100-step chain, default MLP, n = 1000",
    ]
    assert "samples/s" in lines[5]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "\r" not in printed.err  # progress is for a terminal


def test_the_command_prints_json(capsys):
    assert cli.main(["bench", "--tiny", "--backend", "numpy", "--only", "normals", "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["backend"] == "numpy"
    assert facts["roofs"]["memory"] > 0
    assert [row["name"] for row in facts["rows"]] == ["normals-48x1000000"]
    assert not printed.err


def test_the_command_refuses(capsys):
    for wrong, words in (
        (["--only", "nothing"], "there is no such work; there are normals-48x1000000, "),
        (["--plot", "x.txt"], "x.txt"),
        (["--threads", "0"], "--threads"),
        (["--threads", "1", "--backend", "numpy"], "threads"),
    ):
        assert cli.main(["bench", *wrong]) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert words in printed.err
        assert len(printed.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------- make bench, make scaling


@pytest.mark.timed
def test_backends_stand_side_by_side(tmp_path, capsys):
    assert run.main(["--quick", "--only", "norm-", "--only", "cold-import", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert [(row["name"], row["backend"]) for row in results["cases"]] == [
        ("norm-64x32x32x64", "numpy"), ("norm-64x32x32x64", "cpu"), ("cold-import", "cpu"),
    ]  # fmt: skip
    text = (tmp_path / "bench-cpu.md").read_text()
    assert "mean nothing" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| GroupNorm")]
    assert row.count("GB/s") == 2
    assert row.count("% of ") == 1
    assert text in capsys.readouterr().out


def test_a_failure_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.layers.GroupNorm, "tolerance", -1.0)
    assert run.main(["--quick", "--only", "norm-", "--output", str(tmp_path)]) == 1
    assert "failed: norm-64x32x32x64; nothing written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_panels_are_measured_one_by_one_and_drawn(tmp_path, monkeypatch, capsys):
    asked = []

    def timed(side, name, size, threads, folder):
        asked.append((side, name, size, threads))
        assert folder.is_dir()
        return 10.0 if side == "numpy" else 1e-3 * size

    monkeypatch.setattr(scaling, "timed", timed)
    monkeypatch.setattr(scaling.importlib.util, "find_spec", lambda name: None)
    where = ["--output", str(tmp_path), "--threads", "3"]
    assert scaling.main(["--only", "batch", *where]) == 0
    assert scaling.main(["--only", "threads", *where]) == 0
    results = json.loads((tmp_path / "scaling-cpu.json").read_text())
    assert list(results["panels"]) == ["batch", "threads"]
    lines = results["panels"]["batch"]["lines"]
    assert lines["fastdiff"] == [[n, 1e-3 * n] for n in (1, 10, 100, 1000, 10_000)]
    assert lines["NumPy reference"] == [[1, 10.0]]  # and no more, as it took so long
    assert ("ours", "threads", 1, 1) in asked
    assert ("ours", "batch", 10, 3) in asked
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "scaling.png").unlink()
    assert scaling.main(["--draw", *where]) == 0
    assert (tmp_path / "scaling.png").exists()


def test_a_side_of_a_panel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling.importlib.util, "find_spec", lambda name: None)
    for side in ("ours", "numpy"):
        scaling.main(["--side", side, "--only", "batch", "--size", "1000", "--threads", "1", "--output", str(tmp_path)])
        assert 1e-6 < json.loads(capsys.readouterr().out) < 1


def test_the_size_of_what_is_installed():
    size = machine.installed_size("numpy")
    assert 5e6 < size < 500e6
    assert machine.installed_size("fastdiff-engine") > size  # with all it needs
    assert machine.installed_size("no-such-package") == 0
    np.testing.assert_equal(machine.installed_size("numpy", "numpy"), size)
