"""The project from its tree, on a machine where it is not installed: importing this makes it importable.

``fastdiff.kernels`` lies beside ``fastdiff``, not in it; only an installation says so. What is installed goes first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = "fastdiff.kernels"


class KernelsFinder(importlib.abc.MetaPathFinder):
    """Finds the package of kernels in the tree."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return where it lies; None for any other module."""
        if name != KERNELS:
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if not any(isinstance(finder, KernelsFinder) for finder in sys.meta_path):
    sys.meta_path.append(KernelsFinder())
    sys.path.append(str(ROOT))
