"""What was measured where: machine, versions, date and commit, for the head of a results file."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def header(threads: int, *packages: str) -> dict[str, Any]:
    """Machine, versions of Python, our own dependencies and `packages`, date and commit."""
    names = {"fastdiff": "fastdiff-engine"} | {name: name for name in ("numpy", "numba", "safetensors", *packages)}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(package) for name, package in names.items()},
    }


def _commit() -> str:
    """The commit, with a plus sign where tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in lines.items()}
        flags = known.get("flags", "").split()
        widest = next((name for name in ("avx512f", "avx2") if name in flags), "")
        if "model name" in known:
            return known["model name"] + (f" ({widest})" if widest else "")
    return platform.processor() or platform.machine()
