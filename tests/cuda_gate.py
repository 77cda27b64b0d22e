"""Compile every CUDA source for every architecture, without a GPU, and show what its entries cost.

``python tests/cuda_gate.py`` prints a table of registers, shared memory, stack and spills, and fails (exit code 1)
where an entry spills or keeps a stack in local memory, where a source does not compile, and where the compiler finds
other entries than `runtime.entries` does. It takes nvcc, or else NVRTC through the wheels cuda-core and
nvidia-cuda-nvrtc; with neither it says so (exit code 2).
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fastdiff.kernels.cuda import runtime

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
NVCC_SECONDS = 300
Compile = Callable[[str, str], str]


class NoCompilerError(Exception):
    """There is neither nvcc nor NVRTC; the message says what to install."""


class CompileError(Exception):
    """A source does not compile; the message is the compiler's."""


class Use(NamedTuple):
    """What one entry, or one function that it calls, needs on one architecture; sizes in bytes."""

    arch: str
    entry: str
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if self.spills:
            return f"spills {self.spills} bytes of registers"
        return f"keeps {self.stack} bytes in local memory" if self.stack else ""


# -- compilers ---------------------------------------------------------------------------------------------------


def nvcc(text: str, arch: str) -> str:
    """Compile with nvcc; return what ptxas says."""
    with tempfile.TemporaryDirectory(prefix="fastdiff-gate-") as folder:
        path = Path(folder) / "source.cu"
        path.write_text(text, encoding="utf-8")
        command = ["nvcc", "-cubin", f"-arch={arch}", "-Xptxas", "-v", *runtime.COMPILE_OPTIONS]
        done = subprocess.run(
            [*command, "-o", str(path.with_suffix(".cubin")), str(path)],
            capture_output=True,
            text=True,
            timeout=NVCC_SECONDS,
            check=False,
        )
    if done.returncode:
        raise CompileError(done.stdout + done.stderr)
    return done.stdout + done.stderr


def nvrtc(text: str, arch: str) -> str:
    """Compile with NVRTC; return what ptxas says."""
    from cuda.core import Program, ProgramOptions

    known = {"-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"}
    if unknown := set(runtime.COMPILE_OPTIONS) - known:
        raise CompileError(f"the gate does not know how to give NVRTC the options {sorted(unknown)}")
    options = ProgramOptions(
        std="c++17", arch=arch, fma=False, ftz=False, prec_div=True, prec_sqrt=True, ptxas_options="-v"
    )
    log = io.StringIO()
    try:
        Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:  # of several kinds; all of them carry the compiler's log
        raise CompileError(f"{error}\n{log.getvalue()}") from error
    return log.getvalue()


def _has_nvrtc() -> bool:
    try:
        from cuda.bindings import nvrtc as library
        from cuda.core import Program  # noqa: F401 - here, because importing it is not safe in threads

        library.nvrtcVersion()
    except (ImportError, RuntimeError):  # the wheel cuda-core, or the library, is missing
        return False
    return True


def find_compiler(wanted: str = "") -> tuple[str, Compile]:
    """Return the name and the function of the compiler to use: the one wanted, or the first that is here."""
    if wanted in ("", "nvcc") and shutil.which("nvcc"):
        return "nvcc", nvcc
    if wanted in ("", "nvrtc") and _has_nvrtc():
        return "nvrtc", nvrtc
    missing = {"": "neither nvcc nor NVRTC is here", "nvcc": "nvcc is not here", "nvrtc": "NVRTC is not here"}[wanted]
    raise NoCompilerError(f"{missing}: install the CUDA toolkit, or pip install cuda-core nvidia-cuda-nvrtc")


# -- what ptxas says -----------------------------------------------------------------------------------------------

_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def uses(log: str, arch: str) -> list[Use]:
    """Return what the entries in a log of ``ptxas -v`` need.

    A function that was not inlined has a stack of its own, and a line of its own with no registers.
    """
    found: dict[str, Use] = {}
    entry = function = ""
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry = match[1]
            found[entry] = Use(arch, entry, 0, 0, 0, 0)
        elif match := _PROPERTIES.search(line):
            function = match[1]
            found.setdefault(function, Use(arch, function, 0, 0, 0, 0))
        elif match := _STACK.search(line):
            stack, stores, loads = map(int, match.groups())
            found[function] = found[function]._replace(stack=stack, spills=stores + loads)
        elif match := _USED.search(line):
            shared = _SHARED.search(line)
            found[entry] = found[entry]._replace(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return list(found.values())


def table(rows: Sequence[Use]) -> str:
    """Return the rows as text."""
    heads = ("entry", "arch", "registers", "shared", "stack", "spills", "")
    cells = [heads, *((r.entry, r.arch, *map(str, r[2:]), "FAILS" if r.fault else "") for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = []
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join((*left, *right)).rstrip())
    return "\n".join(lines)


# -- the gate ------------------------------------------------------------------------------------------------------


def examine(
    sources: dict[str, str], wanted: dict[str, set[str]] | None, compile_text: Compile, architectures: Sequence[str]
) -> tuple[list[Use], list[str]]:
    """Compile sources for architectures.

    Parameters
    ----------
    sources : dict
        Whole texts by name.
    wanted : dict or None
        The entries that each must have; None: any.
    compile_text : callable
        Takes a text and an architecture, returns a log of ``ptxas -v``.
    architectures : sequence of str

    Returns
    -------
    rows, faults
        What each entry needs, and everything that is wrong.
    """
    jobs = [(name, arch) for name in sources for arch in architectures]

    def work(job: tuple[str, str]) -> str | CompileError:
        try:
            return compile_text(sources[job[0]], job[1])
        except CompileError as error:
            return error

    rows: list[Use] = []
    faults: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        for (name, arch), log in zip(jobs, pool.map(work, jobs), strict=True):
            if isinstance(log, CompileError):
                faults.append(f"{name}.cu does not compile for {arch}:\n{log}")
                continue
            found = uses(log, arch)
            rows += found
            faults += [f"{name}.cu: {use.entry} {use.fault} on {arch}" for use in found if use.fault]
            compiled = set(_ENTRY.findall(log))
            for entry in sorted(compiled ^ (compiled if wanted is None else wanted[name])):
                blind = "runtime.entries" if entry in compiled else "the compiler"
                faults.append(f"{name}.cu: {entry} on {arch}: {blind} does not see this entry")
    return sorted(rows, key=lambda row: (row.entry, architectures.index(row.arch))), faults


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table, return the exit code."""
    parser = argparse.ArgumentParser(prog="cuda_gate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--compiler", choices=["nvcc", "nvrtc"], default="", help="by default nvcc where there is one")
    parser.add_argument("--arch", action="append", help=f"by default {', '.join(ARCHITECTURES)}")
    parser.add_argument("files", nargs="*", type=Path, help="other sources, as they are, instead of the kernels")
    args = parser.parse_args(argv)
    try:
        name, compile_text = find_compiler(args.compiler)
    except NoCompilerError as error:
        print(f"cuda_gate.py: {error}", file=sys.stderr)  # noqa: T201
        return 2
    if args.files:
        sources, wanted = {path.stem: path.read_text(encoding="utf-8") for path in args.files}, None
    else:
        sources = {source: runtime.source_text(source) for source in runtime.source_names()}
        wanted = {source: set(runtime.entries(source)) for source in sources}
    architectures = args.arch or list(ARCHITECTURES)
    rows, faults = examine(sources, wanted, compile_text, architectures)
    if not rows and not faults:
        faults = ["there is nothing to compile"]
    counted = f"{len(sources)} sources, {len({row.entry for row in rows})} entries"
    print(f"{counted}, compiled by {name} for {', '.join(architectures)}\n\n{table(rows)}")  # noqa: T201
    for fault in faults:
        print(f"cuda_gate.py: {fault}", file=sys.stderr)  # noqa: T201
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
