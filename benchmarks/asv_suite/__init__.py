"""The table of workloads under asv. The table and the roofs are those of this checkout, the library the commit's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _from_here(name: str, *path: str) -> None:
    """Import a module of the library from this checkout, so that old commits are measured by the same code."""
    spec = importlib.util.spec_from_file_location(name, ROOT.joinpath(*path))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package, _, last = name.rpartition(".")
    setattr(importlib.import_module(package), last, module)


_from_here("fastdiff.kernels.cpu.roof", "kernels", "cpu", "roof.py")
_from_here("fastdiff.bench", "fastdiff", "bench.py")
sys.path.append(str(ROOT / "benchmarks"))
