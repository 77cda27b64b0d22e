"""The table of workloads under asv, which keeps its results over commits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "benchmarks" / "asv.conf.json"


@pytest.fixture(scope="module")
def asv(tmp_path_factory):
    """Run asv on our table, with its results in a folder of their own; return what it printed."""
    home = tmp_path_factory.mktemp("asv")
    places = {"repo": ROOT, "benchmark_dir": ROOT / "benchmarks" / "asv_suite"}
    places |= {name: home / name for name in ("env_dir", "results_dir", "html_dir")}
    config = home / "asv.conf.json"
    config.write_text(json.dumps(json.loads(CONFIG.read_text()) | {name: str(path) for name, path in places.items()}))

    def run(*arguments):
        command = [sys.executable, "-m", "asv", "--config", str(config), *arguments]
        environment = os.environ | {"HOME": str(home), "COLUMNS": "200"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("machine", "--yes")
    return run


def test_the_suite_is_sound(asv):
    assert "No problems found" in asv("check", "--python=same")


def test_two_cases_run(asv):
    printed = asv("run", "--python=same", "--quick", "--bench", r"Time\.time_case\('(normals-960000x50|adamw-4000000)'")
    assert "failed" not in printed
    shown = dict(re.findall(r"^ +([\w-]+) +(\S+) *$", printed, re.MULTILINE))
    assert {name for name, value in shown.items() if value.endswith("s") and value != "n/a"} == {
        "normals-960000x50",
        "adamw-4000000",
    }


def test_results_stay_out_of_the_repository():
    config = json.loads(CONFIG.read_text())
    assert all(config[name].startswith(".asv/") for name in ("env_dir", "results_dir", "html_dir"))
    assert ".asv/" in (ROOT / ".gitignore").read_text().split()
