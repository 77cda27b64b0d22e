"""The table of workloads, the comparison with peers, and the script that fills the README."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import fastdiff as fd
from fastdiff.backends import get_backend

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
cases, peers, readme_numbers = map(importlib.import_module, ("cases", "peers", "readme_numbers"))

TINY = 1e-3
# The table is append-only: new cases are added at the end, here too.
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
}


def test_the_table_only_grows():
    assert {case.name: (case.n, case.shape) for case in cases.CASES[: len(SIZES)]} == SIZES
    assert len(cases.BY_NAME) == len(cases.CASES)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_case_counts_its_work(case):
    assert case.kind in cases.KINDS
    assert case.bytes >= 4 * case.values > 0
    assert case.normals >= case.values or case.kind in ("similarity", "reshape", "standardise", "posterior", "unet")
    assert (case.operations > 0) == (case.kind != "normals")
    if case.net:
        net = cases.network(fd, case)
        assert case.parameters == net.layout.count
        if case.net == "unet":
            assert counted(net) == cases.UNET_OPERATIONS
        else:
            assert case.products == tuple(layer.inputs * layer.outputs for layer in net.plan.layers)
        assert all(view.any() for view in net.params.values())


def counted(net):
    """Multiplications and additions of a U-Net's forward pass for one picture."""
    be, total = get_backend("numpy"), 0

    class Counter(type(be)):
        def conv(self, geometry, x, w, b, out, **options):
            nonlocal total
            total += 2 * out.size * w[..., 0].size
            super().conv(geometry, x, w, b, out, **options)

        def attention(self, qkv, out, log_sums, *, heads):
            nonlocal total
            total += 4 * out.size * out.shape[1]
            super().attention(qkv, out, log_sums, heads=heads)

    net.predict(np.zeros((1, *net.shape), np.float32), 0, backend=Counter())
    return total


@pytest.mark.parametrize("case", [case.at(TINY) for case in cases.CASES], ids=lambda case: case.name)
def test_a_case_runs(case):
    work = case.setup(fd.get_backend("cpu", threads=2))
    work.check(work.run())
    work.check(work.run())  # a run leaves the next one the same work


def test_a_wrong_result_is_noticed():
    check = cases.finite((2, 3), 0.5, 2)
    good = np.array([[-1, 0, 1], [1, 0, -1]], np.float32)
    check(good)
    for bad in (good[:1], good * 9, good * np.float32("nan"), good.astype(np.float64)):
        with pytest.raises(AssertionError):
            check(bad)


# -- peers ------------------------------------------------------------------------------------------------------


def test_every_comparison_has_its_case():
    assert {comparison.case for comparison in peers.COMPARISONS} == set(SIZES)
    assert len({comparison.name for comparison in peers.COMPARISONS}) == len(peers.COMPARISONS)
    assert set(peers.PEERS) == set(peers.EXAMPLE) == set(cases.KINDS)


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


def test_parity_is_a_condition(tmp_path):
    case = cases.BY_NAME["train-tutorial-10"]
    start = {"w/a": np.zeros(4), "w/b": np.ones((2, 2))}
    ours = {"losses": np.array([2.0, 1.0]), "weights": np.arange(8.0)}
    np.savez(tmp_path / "inputs.npz", **start)
    np.savez(tmp_path / "ours.npz", **ours)

    def difference(**changed):
        np.savez(tmp_path / "peer.npz", **ours | changed)
        return {name: entry["difference"] for name, entry in peers.check_parity(case, tmp_path).items()}

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
    assert np.abs(peers.moments(fd.normal((1000, 1000)))).max() < 5
    for wrong in (fd.normal((1000, 1000)) + 0.01, fd.normal((1000, 1000)) * 1.01):
        assert np.abs(peers.moments(wrong)).max() > 7


@pytest.mark.peers
@pytest.mark.skipif(find_spec("torch") is None or find_spec("diffusers") is None, reason="torch and diffusers")
@pytest.mark.parametrize("name", ["step-64x256x256x3", "train-default-10"])
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
            "title": "a step", "peer": "torch", "ratio": {"median": 3.14, "min": 3.0, "max": 3.5}, "target": 3.0,
            "met": True, "seconds": {"ours": 0.000123456, "peer": 0.02},
        },
        {
            "title": "a chain", "peer": "torch", "ratio": {"median": 1.5, "min": 1.4, "max": 1.6}, "target": 2.0,
            "met": False, "seconds": {"ours": 1.0, "peer": 15.04},
        },
        {
            "title": "a draw", "peer": "torch", "ratio": {"median": 2.0, "min": 1.4, "max": 2.6}, "target": None,
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
    return readme_numbers.main(["--readme", str(readme), "--results", str(readme.parent / "results"), *options])


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
    assert "| a chain | torch | 1.00 s | 15.0 s | **1.5** (1.4 .. 1.6) | 2: **missed** |" in text
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
    ],
)
def test_a_readme_that_cannot_be_filled_stays_as_it_is(readme, text, message, capsys):
    readme.write_text(text)
    assert fill(readme) == 1
    assert readme.read_text() == text
    assert message in capsys.readouterr().err
