"""``fastdiff doctor``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.cli.messages import BROKEN
from fastdiff.cli.parser import add_command, installed, installed_version

EXTRAS = {  # what is installed beside fastdiff: what for, and what pip installs
    "matplotlib": ("figures", "fastdiff-engine[plot]"),
    "pillow": ("pictures", "fastdiff-engine[plot]"),
    "pandas": ("frames, where they are of pandas", "pandas"),
    "pyarrow": ("Parquet files", "fastdiff-engine[series]"),
    "scikit-learn": ("its estimators", "fastdiff-engine[sklearn]"),
    "zarr": ("sample --to, and arrays on disk", "fastdiff-engine[scale]"),
    "dask": ("workers of a cluster", "fastdiff-engine[scale]"),
    "mpi4py": ("training over ranks", "fastdiff-engine[mpi]"),
}


class Finding(NamedTuple):
    """What is so of one part: "ok", "none" (not needed by all), or "bad"."""

    state: str
    part: str
    text: str


def add(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        "say whether this installation works, and what is missing",
        "Tries what fastdiff needs: Python and its packages, the compiler and the folder\n"
        "where kernels are kept, the noise of each backend against the reference, to the\n"
        "bit, and a GPU. Exit code 1 where something is bad; what only some need and is\n"
        "not there (none) counts for nothing.",
        "examples:\n  fastdiff doctor\n  fastdiff doctor --json\n",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = []
    if not args.json:
        print(f"fastdiff {installed_version()}")
    for finding in examine():
        findings.append(finding)
        if not args.json:
            print(f"  {finding.state:4}  {finding.part:12}  {finding.text}", flush=True)
    if args.json:
        facts = {"version": installed_version(), "findings": [finding._asdict() for finding in findings]}
        print(json.dumps(facts, indent=2))
    return BROKEN if any(finding.state == "bad" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Look at each part in turn; one that fails is a finding, and the next is looked at."""
    import platform

    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("numpy", "scipy", "numba", "tqdm"):
        yield Finding("ok" if installed(name) else "bad", name, installed(name) or "not installed")
    for part, look in (("processor", _processor), ("kernels", _kernels), ("noise, cpu", lambda: _noise("cpu"))):
        try:
            yield Finding(*_state(part, look()))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was asked for
            yield Finding("bad", part, _line(error))
    yield from _gpu()
    for name, (what, source) in EXTRAS.items():
        missing = f'not installed; {what}: pip install "{source}"'
        yield Finding("ok" if installed(name) else "none", name, installed(name) or missing)


def _state(part: str, found: str | tuple[str, str]) -> tuple[str, str, str]:
    return ("ok", part, found) if isinstance(found, str) else (found[0], part, found[1])


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _processor() -> str:
    from fastdiff.backends import get_backend
    from fastdiff.bench import cpu_model
    from fastdiff.kernels.cpu.gemm import host_width
    from fastdiff.kernels.cpu.tiles import why_not

    threads, width = get_backend("cpu").threads, host_width()
    vectors = f"products of {width} numbers at once" if width else "no fused multiply-add: products are slow"
    unit = "" if why_not() else ", a matrix unit for bf16"
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}, {vectors}{unit}"


def _kernels() -> tuple[str, str]:
    from fastdiff.kernels.cpu.jit import cache_folder

    folder = cache_folder()
    if folder is None:
        return "bad", "no folder to keep them in: set NUMBA_CACHE_DIR to one that can be written to"
    sizes = [path.stat().st_size for path in Path(folder).glob("*.nb[ic]")]
    return "ok", f"{sum(sizes) / 1e6:.0f} MB kept in {folder}" if sizes else f"none yet in {folder}"


def _noise(backend: str) -> str:
    """Compare the noise of a backend with the reference."""
    import numpy as np

    import fastdiff as fd

    z = fd.get_backend(backend).to_numpy(fd.normal((64, 50), seed=7, backend=backend))
    if not np.array_equal(z, fd.normal((64, 50), seed=7, backend="numpy")):
        raise ArithmeticError("other bits than those of the reference: samples of a seed are not those of others")
    return "the bits of the reference"


def _gpu() -> Iterator[Finding]:
    from fastdiff.backends import get_backend
    from fastdiff.errors import BackendError

    try:
        runtime: Any = get_backend("cuda").runtime  # type: ignore[attr-defined]
        yield Finding("ok", "GPU", f"{runtime.device}, compute capability {runtime.arch}")
        yield Finding("ok", "noise, cuda", _noise("cuda"))
    except BackendError as error:
        there = Path("/proc/driver/nvidia/version").exists()
        yield Finding("bad" if there else "none", "GPU", _line(error) if there else f"no NVIDIA driver; {_line(error)}")
    except Exception as error:  # noqa: BLE001
        yield Finding("bad", "noise, cuda", _line(error))
