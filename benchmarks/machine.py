"""What was measured where: machine, versions, date and commit, for the head of a results file."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from report import Header

from fastdiff.bench import cpu_model

HERE = Path(__file__).parent


def header(threads: int, *packages: str) -> Header:
    """Machine, versions of Python, our own dependencies and `packages`, date and commit."""
    names = {"fastdiff": "fastdiff-engine"} | {name: name for name in ("numpy", "numba", "safetensors", *packages)}
    return Header(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        commit=_commit(),
        cpu=cpu_model(),
        cores=cores(),
        threads=threads,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        **{name: version(package) for name, package in names.items()},
    )


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def installed_size(*packages: str) -> int:
    """Bytes on disk of installed packages with all that they need, an editable one counted as its wheel."""
    waiting, seen, total = list(packages), set[str](), 0
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # for another platform
        paths = [Path(str(file.locate())) for file in found.files or ()]
        if name == "fastdiff-engine":
            paths += [path for top in ("fastdiff", "kernels") for path in (HERE.parent / top).rglob("*.*")]
        total += sum(path.stat().st_size for path in paths if path.is_file() and "__pycache__" not in path.parts)
        needed = [line for line in found.requires or () if "extra ==" not in line]
        waiting += [re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in needed]
    return total
