"""The workloads that are timed: the table of `fastdiff.bench`, and what only a source tree can run.

Append-only, like that table. pytest-benchmark, `peers.py`, `gpu.py`, `run.py` and asv take their cases from here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from fastdiff import bench
from fastdiff.bench import (
    CURVE,
    DDIM_STEPS,
    HIDDEN,
    IMAGE_STEP,
    IMAGE_T,
    KINDS,
    UNET,
    UNET_OPERATIONS,
    UNET_PARAMETERS,
    Case,
    Kind,
    T,
    Work,
    curves,
    ddim,
    finite,
    image_step,
    network,
    noising,
    pictures,
    posterior_of,
    schedule,
    shape_of_noise,
    training_only,
    untrained,
    white_rows,
)

__all__ = [
    "BY_NAME", "CASES", "DDIM_STEPS", "HIDDEN", "IMAGE_STEP", "IMAGE_T", "KINDS", "UNET", "UNET_OPERATIONS",
    "UNET_PARAMETERS", "Case", "T", "Work", "checkpoint", "cold_process", "curves", "ddim", "finite", "image_step",
    "network", "noising", "pictures", "posterior_of", "schedule", "shape_of_noise", "training_only",
    "untrained", "white_rows",
]  # fmt: skip

HERE = Path(__file__).parent


def checkpoint(fd: Any, case: Case, be: Any, path: Path) -> Any:
    """Save a briefly trained model without its moments, and return it."""
    model = untrained(fd, network(fd, case), schedule(fd, case), be)
    model.fit(curves(fd, case), steps=2, batch=16, ema=None, **training_only(fd))
    model.save(path, training=False)
    return model


def process(*arguments: str, **environment: str) -> str:
    """Run a new interpreter, and return what it printed."""
    command, env = [sys.executable, *arguments], os.environ | environment
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def cold_process(script: str, path: Path, case: Case, threads: int, **environment: str) -> str:
    """Run a script on a checkpoint in a new interpreter, and return what it printed."""
    return process(str(HERE / script), str(path), str(case.n), str(threads), **environment)


def _cold(fd: Any, case: Case, be: Any) -> Work:
    folder = tempfile.mkdtemp(prefix="fastdiff-")
    path = Path(folder) / "model.safetensors"

    def run() -> str:
        if case.kind == "cold":
            return cold_process("cold_ours.py", path, case, be.threads)
        with tempfile.TemporaryDirectory() as cache:
            return cold_process("cold_ours.py", path, case, be.threads, NUMBA_CACHE_DIR=cache)

    weakref.finalize(run, shutil.rmtree, folder)
    checkpoint(fd, case, be, path)

    def check(printed: str) -> None:
        assert printed.split("\n")[0] == f"({case.n}, {case.shape[0]})"

    return Work(run, check)


def _import(fd: Any, case: Case, be: Any) -> Work:
    del case, be

    def check(printed: str) -> None:
        assert printed.strip() == fd.__version__

    return Work(lambda: process("-c", "import fastdiff; print(fastdiff.__version__)"), check)


KINDS |= {
    kind: Kind(setup, "", KINDS["chain"].bytes, KINDS["chain"].operations, 0, draws=T, needs="cpu")
    for kind, setup in (("cold", _cold), ("compile", _cold))
}
KINDS["import"] = Kind(_import, "", lambda c: 4 * c.values, lambda c: 0, 0, needs="cpu")

CASES: tuple[Case, ...] = (
    *bench.CASES,
    Case("cold-start", "new process, load, 16 curves", "cold", 16, CURVE, "tutorial"),
    Case("cold-import", "new process, import fastdiff", "import", 1, (1,)),
    Case("first-compile", "new process, no kernel cached, load, 16 curves", "compile", 16, CURVE, "tutorial"),
)
BY_NAME = {case.name: case for case in CASES}
