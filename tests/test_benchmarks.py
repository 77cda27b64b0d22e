"""The table of workloads, the comparison with peers, and the script that fills the README."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import bench
from fastdiff.backends import get_backend
from fastdiff.backends.layers import Conv
from fastdiff.bench.arrays import Normals
from fastdiff.bench.networks import Network, Pictures, Save

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
peers, pictures, plans, quality, readme_numbers, report, sines, workloads = map(
    importlib.import_module, ("peers", "pictures", "plans", "quality", "readme_numbers", "report", "sines", "workloads")
)

TINY = 1e-3
HEADER = {
    "cpu": "a CPU", "threads": 1, "cores": 1, "system": "Linux", "python": "3", "numpy": "2", "numba": "0",
    "date": "today", "commit": "none",
}  # fmt: skip


def NAME(workload):
    return workload.name


# The table is append-only: new workloads are added at the end, here too.
SIZES = {
    "normals-48x1000000": (48, (1_000_000,)),
    "normals-960000x50": (960_000, (50,)),
    "forward-1000000x50": (1_000_000, (50,)),
    "step-64x256x256x3": (64, (256, 256, 3)),
    "chain-tutorial-1": (1, (50,)),
    "chain-tutorial-1000": (1000, (50,)),
    "chain-tutorial-100000": (100_000, (50,)),
    "train-tutorial-10": (10, (50,)),
    "train-tutorial-1000": (1000, (50,)),
    "train-tutorial-8192": (8192, (50,)),
    "cold-start": (16, (50,)),
    "chain-default-1": (1, (50,)),
    "chain-default-1000": (1000, (50,)),
    "chain-default-100000": (100_000, (50,)),
    "train-default-10": (10, (50,)),
    "train-default-1000": (1000, (50,)),
    "train-default-8192": (8192, (50,)),
    "similarity-4096x128": (4096, (128,)),
    "reshape-1000000x128": (1_000_000, (128,)),
    "standardise-1000000x128": (1_000_000, (128,)),
    "shaped-1000000x128": (1_000_000, (128,)),
    "posterior-1000x10000x64": (1000, (64,)),
    "unet-train-16": (16, (32, 32, 3)),
    "unet-forward-16": (16, (32, 32, 3)),
    "unet-ddim-16": (16, (32, 32, 3)),
    "unet-forward-1": (1, (32, 32, 3)),
    "mlp-tutorial-100000": (100_000, (50,)),
    "mlp-default-100000": (100_000, (50,)),
    "conv-4x64x64x64": (4, (64, 64, 64)),
    "conv-16x32x32x64": (16, (32, 32, 64)),
    "conv-16x16x16x128": (16, (16, 16, 128)),
    "conv-16x8x8x256": (16, (8, 8, 256)),
    "conv-back-16x32x32x64": (16, (32, 32, 64)),
    "conv-back-16x16x16x128": (16, (16, 16, 128)),
    "norm-64x32x32x64": (64, (32, 32, 64)),
    "attention-16x64x128": (16, (64, 128)),
    "attention-16x256x128": (16, (256, 128)),
    "adamw-4000000": (1, (4_000_000,)),
    "save-unet": (1, (32, 32, 3)),
    "load-unet": (1, (32, 32, 3)),
    "cold-import": (1, (1,)),
    "first-compile": (16, (50,)),
    "layer-norm-64x1024x128": (64, (1, 1024, 128)),
    "layer-norm-back-64x1024x128": (64, (1, 1024, 128)),
    "gelu-64x1024x256": (64, (1, 1024, 256)),
    "chain-memory-tutorial-1000": (1000, (50,)),
    "chain-given-tutorial-1000": (1000, (50,)),
    "chain-given-tutorial-100000": (100_000, (50,)),
}


def test_the_table_only_grows():
    assert {workload.name: (workload.n, workload.shape) for workload in workloads.WORKLOADS}.items() >= SIZES.items()
    assert len(workloads.BY_NAME) == len(workloads.WORKLOADS)
    assert len(workloads.OF_PEERS) == len(workloads.WORKLOADS) + len(workloads.FOR_PEERS)


@pytest.mark.parametrize("workload", [*workloads.WORKLOADS, *workloads.FOR_PEERS], ids=NAME)
def test_a_workload_counts_its_work(workload):
    assert workload.bytes >= 4 * workload.values > 0
    assert workload.normals == workload.draws * workload.values
    assert (workload.operations > 0) == (not isinstance(workload, (Normals, Save, workloads.ColdImport)))
    if isinstance(workload, Network):
        net = workload.network()
        assert workload.parameters == net.layout.count
        if isinstance(workload, Pictures):
            assert counted(net) == workload.forward
        else:
            assert workload.products == tuple(layer.inputs * layer.outputs for layer in net.plan.layers)
        assert all(view.any() for view in net.params.values())


def test_training_is_three_passes_less_the_gradient_of_the_input():
    curves, pictures = (bench.BY_NAME[name] for name in ("train-tutorial-10", "unet-train-16"))
    assert curves.operations == 10 * (3 * curves.forward_operations - 2 * 50 * 100) + 3 * curves.values
    assert pictures.operations == 16 * 3 * pictures.forward + 3 * pictures.values


def counted(net):
    """Multiplications and additions of a U-Net's forward pass for one picture."""
    be, total = get_backend("numpy"), 0

    class Counter(type(be)):
        def conv(self, geometry, x, w, b, out, **options):
            nonlocal total
            total += 2 * out.size * w[..., 0].size
            out[...] = 0

        def attention(self, qkv, out, log_sums, *, heads):
            nonlocal total
            total += 4 * out.size * out.shape[1]
            out[...] = 0

    net.predict(np.zeros((1, *net.shape), np.float32), 0, backend=Counter())
    return total


QUICK = [workload.at(TINY) for workload in workloads.WORKLOADS if workload.name != "first-compile"]


@pytest.mark.parametrize("workload", QUICK, ids=NAME)
def test_a_workload_runs(workload):
    work = workload.setup(fd.get_backend("cpu", threads=2))
    work.check(work.run())
    work.check(work.run())  # a run leaves the next one the same work


def test_the_first_compile_finds_no_kernel(monkeypatch):
    caches = []

    def process(*_, NUMBA_CACHE_DIR):
        caches.append(Path(NUMBA_CACHE_DIR))
        assert not list(caches[-1].iterdir())
        return "(16, 50)\n"

    monkeypatch.setattr(workloads, "process", process)
    work = workloads.BY_NAME["first-compile"].setup("cpu")
    work.check(work.run())
    work.check(work.run())
    assert len(set(caches)) == 2
    assert not any(cache.exists() for cache in caches)


@pytest.mark.parametrize("workload", {type(one): one for one in workloads.WORKLOADS}.values(), ids=NAME)
def test_a_workload_agrees_with_the_reference(workload):
    assert workload.agree_with_reference("cpu") <= workload.tolerance


@pytest.mark.parametrize("wrong", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize("name", ["normals-960000x50", "train-default-10", "conv-16x8x8x256"])
def test_a_backend_that_computes_something_else_is_noticed(name, wrong, monkeypatch):
    vector, sides = bench.workload.vector, iter([wrong, 1.0])
    monkeypatch.setattr(bench.workload, "vector", lambda result: vector(result) * next(sides))
    with pytest.raises(AssertionError, match=rf"{name}: cpu and numpy differ by (0\.0001|nan)"):
        bench.BY_NAME[name].agree_with_reference("cpu")


def test_a_wrong_result_is_noticed():
    check = bench.workload.finite((2, 3), 0.5, 2)
    good = np.array([[-1, 0, 1], [1, 0, -1]], np.float32)
    check(good)
    for bad in (good[:1], good * 9, good * np.float32("nan"), good.astype(np.float64)):
        with pytest.raises(AssertionError):
            check(bad)


# -- peers ------------------------------------------------------------------------------------------------------


def test_every_comparison_has_its_workload():
    assert len({comparison.name for comparison in peers.COMPARISONS}) == len(peers.COMPARISONS)
    for comparison in peers.COMPARISONS:
        workload = workloads.OF_PEERS[comparison.workload]
        assert workload.peer_name
        assert workload.parity
        assert workload.peer_example.n <= workload.n


def test_a_comparison_is_chosen_by_its_name_or_the_beginning_of_several():
    assert peers.choose(None) == list(peers.COMPARISONS)
    assert [comparison.name for comparison in peers.choose(["train-tutorial-10"])] == ["train-tutorial-10"]
    assert len(peers.choose(["normals", "step"])) == 3
    assert peers.choose(["nothing"]) == []


def test_without_the_peers_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["peers.py"])
    assert peers.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "peers.py: torch and diffusers not installed: pip install torch diffusers\n"


def test_rows_of_a_peer_that_is_not_installed_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name if name != "jax" else None)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--only", "chain-tutorial-1-jax"])
    assert peers.main() == 2
    assert capsys.readouterr().err == "rows of jax are left out: pip install jax\n"


def test_parity_is_a_condition(tmp_path):
    workload = bench.BY_NAME["train-tutorial-10"]
    start = {"w/a": np.zeros(4), "w/b": np.ones((2, 2))}
    ours = {"losses": np.array([2.0, 1.0]), "weights": np.arange(8.0)}
    np.savez(tmp_path / "inputs.npz", **start)
    np.savez(tmp_path / "ours.npz", **ours)

    def difference(**changed):
        np.savez(tmp_path / "peer.npz", **ours | changed)
        return {name: entry["difference"] for name, entry in peers.check_parity(workload, tmp_path).items()}

    assert difference() == {"losses": 0, "weights": 0}
    assert 0 < difference(losses=np.array([2.0, 1.000001]))["losses"] < 1e-6
    for changed in (
        {"losses": np.array([2.0, 1.1])},
        {"losses": np.array([2.0, np.nan])},
        {"losses": np.array([2.0])},
        {"weights": np.arange(8.0) + 0.01},
    ):
        with pytest.raises(peers.PeersError, match=next(iter(changed))):
            difference(**changed)


def test_moments_are_in_units_of_their_standard_error():
    assert np.abs(bench.arrays.moments(fd.normal((1000, 1000)))).max() < 5
    for wrong in (fd.normal((1000, 1000)) + 0.01, fd.normal((1000, 1000)) * 1.01):
        assert np.abs(bench.arrays.moments(wrong)).max() > 7


@pytest.mark.peers
@pytest.mark.skipif(find_spec("torch") is None or find_spec("diffusers") is None, reason="torch and diffusers")
@pytest.mark.parametrize(
    "name", ["step-64x256x256x3", "train-default-10", "conv-input-gradient", "unet-train-ema-16-fused"]
)
def test_a_comparison_runs(name, tmp_path):
    command = [sys.executable, BENCHMARKS / "peers.py", "--quick", "--only", name, "--output", tmp_path / "results"]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((tmp_path / "results" / "peers-cpu.json").read_text())
    (row,) = results["rows"]
    assert row["name"] == name
    assert len(row["rounds"]) == 2
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert all(entry["difference"] <= entry["tolerance"] for entry in row["parity"].values())
    assert "mean nothing" in (tmp_path / "results" / "peers-cpu.md").read_text()


@pytest.mark.peers
@pytest.mark.skipif(find_spec("torch") is None or find_spec("diffusers") is None, reason="torch and diffusers")
def test_the_footprint(tmp_path):
    command = [sys.executable, BENCHMARKS / "footprint.py", "--rounds", "1", "--output", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "footprint-cpu.json").read_text())["footprint"]
    warm, compiled, peer = (found[side] for side in ("ours", "ours, no kernel cached", "peer"))
    assert warm["seconds"] < peer["seconds"]
    assert warm["seconds"] + 1 < compiled["seconds"]  # it does compile
    assert 1e8 < warm["memory"] < peer["memory"]
    assert warm["installed"] == compiled["installed"] < peer["installed"]
    assert "| torch + diffusers |" in (tmp_path / "footprint-cpu.md").read_text()


def test_a_sweep_counts_the_work_of_its_parts():
    for sweep in workloads.FOR_PEERS[-3:]:
        assert len(sweep.parts) == 12
        assert {(part.shape[0], part.n) for part in sweep.parts} == {(8, 16), (16, 16), (32, 16), (64, 4)}
        assert sweep.values == sum(part.values for part in sweep.parts)
        assert sweep.operations == sum(18 * part.values * part.shape[-1] for part in sweep.parts)


@pytest.mark.parametrize("workload", [workload.at(TINY) for workload in workloads.FOR_PEERS[:2]], ids=NAME)
def test_a_workload_of_the_peers_runs(workload):
    work = workload.setup(fd.get_backend("cpu", threads=2))
    work.check(work.run())
    model = work.run()
    assert model._optimizer.plan.ema == (bench.networks.EMA if workload.ema else None)


def test_convolutions_of_the_peers_are_those_of_the_reference(monkeypatch):
    monkeypatch.setattr(workloads, "CONV_CHANNELS", (8, 64))
    monkeypatch.setattr(workloads, "CONV_SIZES", (4, 8))
    be, reference, same = fd.get_backend("cpu", threads=2), fd.get_backend("numpy"), Conv((3, 3), pad=(1, 1, 1, 1))
    sweeps = [sweep.at(1 / 8) for sweep in workloads.FOR_PEERS[-3:]]
    for parts in zip(*(sweep.parts for sweep in sweeps), strict=True):
        runs = [part.operation(be) for part in parts]
        ours = [[run() for _ in range(2)][-1] for run in runs]  # the second one repeats the first
        assert parts[0].n == 2
        x, w, b, dy = parts[0].inputs().values()
        y, dx, dw, db = (np.empty_like(array) for array in (dy, x, w, b))
        reference.conv(same, x, w, b, y)
        reference.conv_backward(same, dy, x, w, dx, dw, db)
        for mine, other in zip(ours, (y, dx, dw), strict=True):
            assert np.abs(mine - other).max() < parts[0].parity["conv"] * np.abs(other).max()


class Clock:
    """A worker of `peers.compare` that takes as long as it is told: `times[side]` by part."""

    times = {"ours": [1.0, 2.0, 4.0], "peer": [1.5, 6.0, 8.0]}  # noqa: RUF012
    prepared = 0.0
    memory = {"ours": 60, "peer": 100}  # noqa: RUF012

    def __init__(self, side, *_):
        self.side, self.peak, self.turns = side, self.memory[side], []

    def turn(self, seconds, part=0):
        self.turns.append((part, seconds))
        return self.times[self.side][part]

    def close(self):
        taken = [part for part, _ in self.turns]
        assert taken == sorted(taken)  # a part's rounds are not apart


HOW = {"scale": TINY, "rounds": 3, "turn": 0.5, "pause": 0.0, "threads": 2}


def test_a_row_of_many_shapes_has_the_median_of_their_ratios(monkeypatch):
    monkeypatch.setattr(peers, "Worker", Clock)
    monkeypatch.setattr(peers, "check_parity", lambda *_: {})
    monkeypatch.setattr(workloads, "CONV_CHANNELS", (64,))
    monkeypatch.setattr(workloads, "CONV_SIZES", (8, 16, 32))
    for target, met in ((1.5, True), (2.5, False)):
        row = peers.compare(peers.Comparison("conv-forward", target), **HOW)
        assert row.ratio == report.Ratio(median=2.0, min=1.5, max=3.0)
        assert row.seconds == report.Sides(7.0, 15.5)
        assert [shape.ratio.median for shape in row.shapes] == [1.5, 3.0, 2.0]
        assert row.met is met
        assert row.memory is None
    row = peers.compare(peers.Comparison("unet-train-ema-16", memory=0.5), **HOW)
    assert row.ratio == report.Ratio(1.5, 1.5, 1.5)
    assert row.memory == report.Memory(60, 100, 0.5)
    assert row.memory.line() == "0 MB, theirs 0 MB: 0.60 of it, target at most 0.5: **missed**"
    assert "missed" not in report.Memory(60, 100, 0.6).line()


def test_a_workload_that_cannot_be_compared_is_named_in_the_results(monkeypatch, tmp_path, capsys):
    def compared(comparison, **_):
        if comparison.name == "train-tutorial-10":
            raise peers.PeersError("parity of weights: differs by 2, allowed 1")
        ratio, seconds = report.Ratio(2.0, 1, 3), report.Sides(1e-3, 2e-3)
        return report.Compared(comparison.name, "a step", "theirs", ratio, seconds, None, None)

    monkeypatch.setattr(peers, "compare", compared)
    argv = ["peers.py", "--quick", "--only", "train-tutorial-10", "train-tutorial-1000", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert peers.main() == 1  # and what was measured is not lost
    found = report.load(tmp_path / "peers-cpu.json")
    assert [row.name for row in found.rows] == ["train-tutorial-1000"]
    assert found.failed == ["train-tutorial-10: parity of weights: differs by 2, allowed 1"]
    assert "Not compared: train-tutorial-10: parity of weights" in (tmp_path / "peers-cpu.md").read_text()
    assert found.failed[0] in capsys.readouterr().out


def test_a_row_says_what_it_is_compared_with():
    against = {comparison.name: comparison.against for comparison in peers.COMPARISONS}
    assert against["unet-train-16"] == "diffusers UNet2DModel, AdamW, clipping"
    assert against["unet-train-ema-16-fused"] == "diffusers UNet2DModel, fused AdamW, clipping, EMA"
    assert against["unet-train-ema-16-compiled"].startswith("torch.compile, diffusers UNet2DModel, fused AdamW")
    assert against["similarity-4096x128-numpy"] == "NumPy broadcasting"


def test_the_shapes_of_a_row_are_a_table_of_their_own():
    ratio, seconds = report.Ratio(1.234, 1, 2), report.Sides(1e-3, 1.234e-3)
    shapes = [report.Shape(title, ratio, seconds) for title in ("8 x 8", "16 x 16")]
    row = {"name": "", "peer": "", "ratio": ratio, "seconds": seconds, "target": None, "met": None}
    rows = [report.Compared(title=title, shapes=shapes, **row) for title in ("forward", "backward")]
    lines = report.PeersReport(report.record(report.Header, HEADER), rows).lines()[6:]
    cells = " 1.00 ms | 1.23 ms | **1.23** |"
    assert lines[-2:] == [f"| 8 x 8 |{cells}{cells}", f"| 16 x 16 |{cells}{cells}"]
    assert {line.count("|") for line in lines[1:]} == {8}


def test_compile_times_are_compared_with_their_targets(monkeypatch, tmp_path, capsys):
    times = iter([10.0, 1.0, 61.0, 3.0])
    compile_time = importlib.import_module("compile_time")
    monkeypatch.setattr(compile_time, "run", lambda work, cache: {"all of it": next(times)})
    assert compile_time.main(["--rounds", "1", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| all of it | 10.0 s | 1.00 s |"
    assert lines[-1] == "| U-Net: all of it, 0 functions | 61.0 s (target 60 s: **missed**) | 3.00 s (target 3 s) |"
    assert json.loads((tmp_path / "compile-cpu.json").read_text())["stages"][1]["target"] == {"cold": 60, "warm": 3}


def test_the_profile_by_layer(monkeypatch, tmp_path, capsys):
    profile = importlib.import_module("profile_layers")
    monkeypatch.setattr(bench, "roofs_of", lambda be: bench.Roofs(1e10, 1e11))
    how = ["--size", "8", "--batch", "2", "--channels", "32", "64", "--passes", "2", "--output", str(tmp_path)]
    assert profile.main(how) == 0
    results = json.loads((tmp_path / "profile-cpu.json").read_text())
    training, forward = results["passes"]
    work = 2 * counted(bench.networks.PicturesForward("", "", 2, (8, 8, 3), channels=(32, 64)).network())
    given = 2 * 2 * (64 * 9 * 3 * 32 + 32 * 128)  # pictures and features of the timestep need no gradient
    for found, way, expected in (
        (forward, "forward", work),
        (training, "forward", work),
        (training, "backward", 2 * work),
    ):
        done = sum(row[way]["operations"] for row in found["rows"])
        assert done == expected - (way == "backward") * given
        assert all(row[way]["seconds"] >= 0 for row in found["rows"])
    for found in (training, forward):
        whole = sum(row[way]["seconds"] for row in found["rows"] for way in ("forward", "backward"))
        assert 0.5 * found["seconds"] < whole < 2 * found["seconds"]
        shares = [sum(row[way]["seconds"] for way in ("forward", "backward")) for row in found["rows"]]
        assert shares == sorted(shares, reverse=True)
    kinds = {row["what"]: row for row in training["rows"]}
    assert {"conv 3x3, 8 x 8", "conv 1x1", "GroupNorm + SiLU", "attention"} <= set(kinds)
    assert kinds["clipping, AdamW, average"]["backward"]["seconds"] == 0
    assert "| of peak |" in (tmp_path / "profile-cpu.md").read_text()
    for what, error in results["rounding"]["ours"].items():
        assert 1e-8 < results["rounding"]["numpy"][what] < error < 1e-5
    assert profile.main([*how[:-1], str(tmp_path / "other"), "--shapes", "--only", "forward"]) == 0
    assert "conv 3x3, 8 x 8, 32 to 32" in capsys.readouterr().out
    assert profile.main([*how, "--points", "8", "--only", "training"]) == 0
    assert "conv 1x3, 1 x 8" in capsys.readouterr().out


def test_the_profile_of_a_training_step(monkeypatch, capsys):
    profile = importlib.import_module("profile_training")
    monkeypatch.setattr(profile, "REPEATS", 1)
    monkeypatch.setattr(profile, "CALLS", 1)
    profile.main()
    parts = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert parts[1:4] == [f"products, {what}" for what in ("forward", "weight gradients", "input gradients")]
    assert len(parts) == 9


# -- the README's numbers ---------------------------------------------------------------------------------------

RESULT = {
    "header": {
        "date": "2026-01-02", "commit": "abc1234", "cpu": "A CPU", "cores": 4, "threads": 2, "system": "Linux x86_64",
        "python": "3.11", "numpy": "2.0", "numba": "0.60", "torch": "2.4", "diffusers": "0.35", "scale": 1.0,
    },
    "rows": [
        {
            "name": "step", "title": "a step", "peer": "torch",
            "ratio": {"median": 3.14, "min": 3.0, "max": 3.5}, "target": 3.0,
            "met": True, "seconds": {"ours": 0.000123456, "peer": 0.02},
        },
        {
            "name": "chain", "title": "a chain", "peer": "torch",
            "ratio": {"median": 1.5, "min": 1.4, "max": 1.6}, "target": 2.0,
            "met": False, "seconds": {"ours": 1.0, "peer": 15.04}, "others": 0.07,
        },
        {
            "name": "draw", "title": "a draw", "peer": "torch",
            "ratio": {"median": 2.0, "min": 1.4, "max": 2.6}, "target": None,
            "met": None, "seconds": {"ours": 1.5e-7, "peer": 3e-6}, "memory": {"ours": 2e6, "peer": 3.4e6},
        },
    ],
}  # fmt: skip


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "peers-cpu.json").write_text(json.dumps(RESULT))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- numbers:peers-cpu -->\nold\n<!-- /numbers -->\nafter, in ü\n", encoding="utf-8")
    return path


def fill(readme, *options):
    return readme_numbers.main([str(readme), "--results", str(readme.parent / "results"), *options])


def test_the_readme_is_filled_once_and_for_all(readme, capsys):
    assert fill(readme, "--check") == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert fill(readme) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- numbers:peers-cpu -->\nA CPU, 2 threads on 4 cores")
    memory = "Peak memory beyond the imported libraries, a draw: 2 MB, theirs 3 MB."
    assert text.endswith(f"|\n\n{memory}\n<!-- /numbers -->\nafter, in ü\n")
    assert "old" not in text
    assert "| a step | torch | 123 µs | 20.0 ms | **3.1** (3.0 .. 3.5) | 3 |" in text
    disturbed = "(other programs used 7% of the machine)"
    assert f"| a chain | torch | 1.00 s | 15.0 s | **1.5** (1.4 .. 1.6) | 2: **missed** {disturbed} |" in text
    assert "| a draw | torch | 0.15 µs | 3.00 µs | **2.0** (1.4 .. 2.6) |  |" in text
    assert fill(readme, "--check") == 0
    assert fill(readme) == 0
    assert readme.read_text(encoding="utf-8") == text
    assert "up to date" in capsys.readouterr().out


def test_new_results_make_the_readme_stale(readme, capsys):
    fill(readme)
    changed = RESULT | {"header": RESULT["header"] | {"date": "2026-01-03"}}
    (readme.parent / "results" / "peers-cpu.json").write_text(json.dumps(changed))
    assert fill(readme, "--check") == 1
    assert "make readme-numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing to fill\n", "pairs"),
        ("<!-- numbers:peers-cpu -->\nno end\n", "pairs"),
        ("<!-- numbers:peers-cpu -->\n<!-- numbers:peers-cpu -->\n<!-- /numbers -->\n", "pairs"),
        ("<!-- numbers:other -->\n<!-- /numbers -->\n", "no other.json"),
        ("<!-- numbers:peers-cpu:long -->\n<!-- /numbers -->\n", "pairs"),
        ("<!-- numbers:peers-cpu:short -->\n<!-- /numbers -->\n", "no row forward-1000000x50"),
        ("<!-- numbers:peers-none:short -->\n<!-- /numbers -->\n", "peers-none has no short form"),
    ],
)
def test_a_readme_that_cannot_be_filled_stays_as_it_is(readme, text, message, capsys):
    (readme.parent / "results" / "peers-none.json").write_text(json.dumps(RESULT))
    readme.write_text(text)
    assert fill(readme) == 1
    assert readme.read_text() == text
    assert message in capsys.readouterr().err


def test_a_short_form_has_a_few_of_the_rows(readme, monkeypatch):
    monkeypatch.setitem(readme_numbers.SHORT, "peers-cpu", ("draw", "step"))
    readme.write_text("<!-- numbers:peers-cpu:short -->\n<!-- /numbers -->\n")
    assert fill(readme) == 0
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines[5:-1]] == ["| a draw", "| a step"]
    assert lines[0] == "<!-- numbers:peers-cpu:short -->"
    assert fill(readme, "--check") == 0


def test_short_forms_are_of_results_that_exist():
    for name in readme_numbers.SHORT:
        results = report.load(report.RESULTS / f"{name}.json")
        assert len(readme_numbers.shortened(name, results).rows) == len(readme_numbers.SHORT[name])


def test_the_short_form_of_quality_is_the_data_sets_by_their_sizes():
    results = report.load(report.RESULTS / "quality-cpu.json")
    assert results.curves
    lines = readme_numbers.shortened("quality-cpu", results).table().splitlines()
    assert len(lines) == len(results.quality) + 4
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    sizes = [(int(row[1]), int(row[2])) for row in rows]
    assert sizes == sorted((one.rows, one.d) for one in results.quality)
    one = next(one for one in results.quality if one.name == rows[0][0])
    assert rows[0][-1] == f"**{one.ours.mean:.3f}**"


def test_the_readme_counts_accidents_as_the_table_does():
    table = json.loads((report.RESULTS / "robust.json").read_text())
    text = " ".join(readme_numbers.ROOT.joinpath("README.md").read_text().split())
    said = text[text.index("[Accidents are counted]") : text.index("strange calls") + 20]
    for name, what in {
        "loads_beside_a_saver": "loads", "killed_saves": "killed saves", "flips": "flipped bits",
        "mutations": "mutated files", "cold_interrupts": "interrupts", "forks": "forks",
        "repeats": "repeated trainings", "calls": "strange calls",
    }.items():  # fmt: skip
        rows = table[name] if name == "mutations" else table[name][:1]
        assert f"{sum(row['tries'] for row in rows):,} {what}" in said
        assert not any(row["failures"] for row in table[name])


def test_every_file_with_numbers_shows_the_results(monkeypatch, tmp_path, capsys):
    names = [path.name for path in readme_numbers.files_with_numbers()]
    assert names == ["README.md", "choose.md", "guidance.md", "performance.md", "quality.md", "scaling.md"]
    assert readme_numbers.main(["--check"]) == 0
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- numbers:peers-cpu:short -->\n<!-- /numbers -->\n")
    (tmp_path / "docs" / "a.md").write_text("<!-- numbers:peers-cpu -->\n<!-- /numbers -->\n")
    (tmp_path / "docs" / "b.md").write_text("no numbers\n")
    monkeypatch.setattr(readme_numbers, "ROOT", tmp_path)
    assert readme_numbers.main([]) == 0
    assert capsys.readouterr().out == "README.md: filled\na.md: filled\n"
    (tmp_path / "docs" / "a.md").write_text("<!-- numbers:peers-cpu -->\n<!-- /numbers -->\n")
    assert readme_numbers.main(["--check"]) == 1


# --------------------------------------------------------------------------------------- sines


def test_sines_are_measured_against_their_floor():
    """Of rows that no sine looks like the score is far above it."""
    real, others = sines.sines(300, 0), sines.sines(300, 1)
    assert real.shape == (300, 24, 5)
    assert 0.5 < real.min() < 0.51 < 0.99 < real.max() <= 1
    options = {"networks": 2, "steps": 60}
    rows = sines.measured(real, others, others - 0.4, [2, 8], options)
    assert [row.name for row in rows][:3] == [
        "discriminative score, GRU of 2", "discriminative score, GRU of 8", "predictive score",
    ]  # fmt: skip
    assert [row.bound for row in rows] == [0.006, *[None] * 5]
    energy, autocorrelation = rows[3], rows[4]
    assert energy.ours.mean > 1 > abs(energy.floor.mean)
    assert autocorrelation.ours.mean == pytest.approx(autocorrelation.floor.mean)  # a constant changes none
    told = report.SinesScore("score", report.Estimate(0.02, 0.001), report.Estimate(0.01, 0.0), 0.006)
    assert not told.met
    assert told.cells() == ["score", "**0.0200 ± 0.0010**", "0.0100", "floor + 0.006: **missed**"]
    assert told._replace(bound=0.011).met


# --------------------------------------------------------------------------------------- quality


def quality_runs(**changed):
    run = {
        "ours": 0.01, "gaussian": 0.1, "real": 0.0, "nearest": 1.0, "seconds": 3.0, "rows": 9, "d": 2, "network": "MLP",
        "steps": 500, "scale": "all",
    }  # fmt: skip
    return [run | changed, run | changed | {"gaussian": 0.11}]


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, True),
        ({"ours": 0.03}, False),
        ({"ours": 0.2}, False),
        ({"nearest": 0.5}, False),
        ({"seconds": 121.0}, False),
    ],
)
def test_quality_says_what_is_missed(changed, met):
    row = quality.summary("digits", quality_runs(**changed))
    assert row.met is met
    assert row.excess.mean == pytest.approx(changed.get("ours", 0.01) - 0.105)
    text = report.QualityReport(report.record(report.Header, HEADER), 2, [row], []).table()
    assert ("**missed**" in text) is not met


def test_quality_measures_a_data_set():
    X = np.random.default_rng(0).normal(size=(40, 3))
    run = quality.one(X, 0)
    assert run["rows"] == 20
    assert abs(run["ours"]) < 1
    seen, unseen = quality.halves(X, 0)
    assert len({tuple(row) for row in np.concatenate([seen, unseen])}) == 40


def test_answers_measure_draws_of_a_mixture(monkeypatch, tmp_path):
    """Exact draws are closest to exact draws, and the records come back from their file."""
    answers = importlib.import_module("answers")
    monkeypatch.setattr(answers, "DIMENSIONS", (2,))
    monkeypatch.setattr(answers, "SEEN_THROUGH", (1,))
    monkeypatch.setattr(answers, "OF_MIXTURES", ("dps",))  # whose steps are too large here
    found = answers.posteriors(problems=2, particles=40, steps=3)
    assert found[0].distances["exact"].mean < found[0].distances["dps"].mean
    x = np.random.default_rng(0).normal(size=(50, 3))
    moved = answers.sliced_wasserstein(x, x + np.array([3, 0, 4]))
    assert moved == pytest.approx(5 / np.sqrt(3), rel=0.1)  # the mean square of a projection is |v|^2 / d
    values = {name: np.linspace(0.5, 0.6, 4) for name in ("CRPS", "in 50%", "in 80%", "in 95%")}
    records = answers.answers([("exact", values), ("worse", {**values, "CRPS": 2 * values["CRPS"]})])
    assert "a CRPS of at most 1.15 x the Gaussian's" in records[1].missed
    priced = [report.Price(8, 3.5, 3.4, 3.6, 10), report.Price(16, 18.5, 18.4, 19.6, 18)]
    made = report.AnswersReport(report.Header(**HEADER), 8, 79, 4, 10, 0.9, records, 2, 40, 3, found, records, priced)
    made.save(tmp_path, "answers-cpu")
    assert report.load(tmp_path / "answers-cpu.json") == made
    assert "| 2 | 1 |" in made.table()
    assert "worse: 80%" in made.table()
    assert "| 8 | 3.50 | 3.40 .. 3.60 | 10 |" in made.table()
    assert "| 18: **missed** |" in made.table()
    seen = answers.around_a_gap(20, 50)
    assert (seen.sum(axis=1) == 25).all()
    assert (np.abs(np.diff(seen.astype(int), axis=1)).sum(axis=1) <= 2).all()  # one gap


def test_answers_of_series_are_measured_beside_a_gaussian(monkeypatch, tmp_path):
    """Draws of the law itself miss nothing, and draws of a narrower one do; records come back from their file."""
    of_series, answers = (importlib.import_module(name) for name in ("series_answers", "answers"))
    points, _, _, _, end, _ = of_series.SETS[of_series.AR]
    law = of_series.data_set(of_series.AR, tmp_path)[2]

    class Model:
        """What the benchmark asks of a `Diffusion`: it is the law, but for the width of its draws."""

        spread, width = 1.0, 1.0

        def __init__(self, seed, conditional):
            self.seed = seed

        def fit(self, X, **options):
            return self

        def impute(self, holes, draws):
            flat = holes.reshape(len(holes), -1)
            drawn = answers.exact_draws(law, flat, 2 * draws)[draws:]  # others than the Gaussian's
            return (drawn.mean(axis=0) + self.width * (drawn - drawn.mean(axis=0))).reshape(draws, *holes.shape)

    monkeypatch.setattr(of_series.fd, "Diffusion", Model)
    options = SimpleNamespace(seeds=2, rows=40, draws=39, steps=None, conditional=None)
    right = of_series.answered(of_series.AR, tmp_path, options)
    assert all(row.met and abs(row.ratio.mean - 1) < 0.05 for row in right)
    monkeypatch.setattr(Model, "width", 0.5)
    narrow = of_series.answered(of_series.AR, tmp_path, options)
    assert not any(row.met for row in narrow)
    assert "in 90%" in narrow[1].missed[2]
    gone = of_series.hidden_of(np.zeros((3, points, 1)), "end", end, 0)
    assert gone.sum() == 3 * end
    assert gone[:, -end:].all()
    made = report.SeriesReport(report.Header(**HEADER), 39, 2, 1e-9, [*right, *narrow])
    made.save(tmp_path, "series-cpu")
    assert report.load(tmp_path / "series-cpu.json") == made
    assert made.table().count("AR(1) (40)") == 8
    assert made.table().count("missed") > 4


# --------------------------------------------------------------------------------------- pictures


def test_what_was_asked_for_is_counted(tmp_path):
    asked = np.arange(100) % 10
    assert pictures.share_as_asked(np.where(asked < 9, asked, 3), asked) == pytest.approx((0.9, 0.03))
    random = np.random.default_rng(0)
    rows, labels = random.integers(0, 256, (800, 4, 4, 1), np.uint8), np.arange(800) % 10
    alike, error = pictures.distances(rows[:400], labels[:400], rows[400:], labels[400:])
    assert abs(alike) < 4 * error < 0.2
    assert pictures.distances(rows[:400] // 2, labels[:400], rows[400:], labels[400:])[0] > 10 * error
    rows = [report.Asked("share", 0.96, 0.01, at_least=0.97), report.Asked("ratio", 1.5, at_most=1.5)]
    assert [row.met for row in rows] == [False, True]
    made = report.PicturesReport(report.Header(**HEADER), rows)
    made.save(tmp_path, "pictures-cpu")
    assert report.load(tmp_path / "pictures-cpu.json") == made
    lines = made.table().splitlines()
    assert lines[4:] == [
        "| share | **0.9600 ± 0.0100** | at least 0.97: **missed** |",
        "| ratio | **1.5000** | at most 1.5 |",
    ]


def test_a_training_that_was_stopped_goes_on(tmp_path):
    X = fd.data.harmonic_curves(60, points=8)
    net = [fd.MLP(8, hidden=(8,), T=10) for _ in range(3)]
    once = pictures.Models(None, 1).learned("x", net[0], X, 6, progress=False)

    def stop(step, _):
        return step == 2

    models = pictures.Models(tmp_path, 1)
    half = models.learned("x", net[1], X, 6, progress=False, callback=stop)
    assert half.step == 3
    whole = models.learned("x", net[2], X, 6, progress=False)
    assert (whole.step, whole.net.flat.tolist()) == (6, once.net.flat.tolist())
    assert models.learned("x", None, X, 6).step == 6


def test_the_cost_of_guidance_is_that_of_twice_as_many():
    """Loosely: this machine may be busy."""
    net = fd.MLP(8, hidden=(32,), T=10, classes=2)
    table = fd.samplers.ddpm(fd.Schedule.cosine(10), prediction="v")
    assert 0.2 < pictures.cost_of(net, table, 64, 5) < 5


# --------------------------------------------------------------------------------------- workers and ranks


def test_plans_of_workers():
    """What waits decides: the workers, the one that hands out, or the store."""
    assert plans.Workers(start=2, chunk=1, hand_out=0, write=0).seconds(10, 2)[0] == 7
    assert plans.Workers(start=2, chunk=1, hand_out=0, write=0).seconds(11, 2)[0] == 8
    end, busy = plans.Workers(start=0, chunk=1, hand_out=0.25, write=0).seconds(100, 50)
    assert end == 26
    assert busy["the driver"] == pytest.approx(25 / 26)
    end, busy = plans.Workers(start=0, chunk=1, hand_out=0, write=0.5).seconds(100, 50)
    assert end == 51
    assert busy["the store"] == pytest.approx(50 / 51)


@pytest.mark.parametrize(("ranks", "pieces"), [(1, 1), (2, 1), (2, 100), (4, 10), (32, 400)])
def test_plans_of_sums(ranks, pieces):
    """A piece goes over 2 (r - 1) links, one after the other, and pieces follow each other."""
    link, messages = plans.Network(seconds_of_a_byte=1e-3, delay=0.5), [8000 / pieces] * pieces
    want = 0 if ranks == 1 else (1 + (2 * (ranks - 1) - 1) / pieces) * 8 + 2 * (ranks - 1) * 0.5
    assert link.sum_seconds(ranks, messages, messages) == pytest.approx(want)
    # What is added is so by one rank after the other; while one does others add to earlier messages.
    added = plans.Network(0.0, 0.0).sum_seconds(ranks, messages, messages, 4.0)
    assert added == pytest.approx(4.0 / ranks * (1 + (ranks - 1) / pieces))


def test_the_table_of_workers():
    over = report.OverRanks(
        "net, batch 64", 2, 1000, alone=0.1, together=0.06, summed=0.01, sent=8800, least=8000, equal=True,
        chunks=8, lone=0.1, beside=0.11, few=0.02, up=(4000,), down=(4000,),
    )  # fmt: skip
    header = report.load(report.RESULTS / "quality-cpu.json").header
    made = report.WorkersReport(
        header, points=50, chunk=10_000, seconds=1.0, overhead=0.01, start=4.0, hand_out=1e-3,
        rates={"1": 1e4, "2": 1.9e4}, whole={"1": 20.0, "2": 12.5}, chunks=16, worker=200_000_000,
        chunks_of_memory=2.5, growth=[report.Growth(10**7, 100.0, 2 * 10**9, 3 * 10**8)], growth_steps=10, ranks=[over],
    )  # fmt: skip
    text = made.table()
    assert "| two processes | 19,000 samples/s, 1.90 x | at least 1.8 x |" in text
    assert f"| 16 chunks on two processes | {bench.duration(12.5)} | planned {bench.duration(12.009)} |" in text
    steps = f"{bench.duration(0.1)} | {bench.duration(0.06)}"
    assert f"| net, batch 64 | {steps} | 1.67 x | 1.14 | {bench.duration(0.01)} | 0.009 MB | 1.10 | yes |" in text
    # More ranks than chunks gain nothing but a longer way; on machines of their own they do not slow each other down.
    assert over.planned(8) < over.planned(16)
    assert over.planned(2, plans.Network(0.0, 0.0)) == pytest.approx(0.1 / 0.11 * (over.each + (0.11 - over.each) / 2))
    assert "missed" not in text
    slow = replace(made, overhead=0.06, rates={"1": 1e4, "2": 1.7e4}, chunks_of_memory=3.2)
    assert slow.table().count("**missed**") == 3
    assert report.record(report.WorkersReport, report.plain(made)) == made
