"""The table of workloads under asv. The table and the roofs are those of this checkout, the library the commit's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _from_here(name: str, *path: str) -> None:
    """Import a module of the library from this checkout, so that old commits are measured by the same code."""
    place = ROOT.joinpath(*path)
    inside = [str(place.parent)] if place.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, place, submodule_search_locations=inside)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package, _, last = name.rpartition(".")
    setattr(importlib.import_module(package), last, module)


_from_here("fastdiff.kernels.cpu.roof", "kernels", "cpu", "roof.py")
_from_here("fastdiff.bench", "fastdiff", "bench", "__init__.py")
sys.path.append(str(ROOT / "benchmarks"))
