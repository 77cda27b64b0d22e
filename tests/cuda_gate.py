"""Compile every CUDA source for every architecture, without a GPU, and show what its entries cost.

``python tests/cuda_gate.py`` prints a table of registers, shared memory, stack, spills and bytes of parameters. It
fails (exit code 1) where an entry spills or keeps a stack in local memory, where a source does not compile, where the
compiler finds other entries than `runtime.entries` does or parameters of other sizes, and where the table is not that
of ``cuda_resources.txt``, which ``--renew`` writes. It takes NVRTC, which compiles in production, through the wheels
cuda-core and nvidia-cuda-nvrtc, or else nvcc; with neither it says so (exit code 2). Numbers are compared where the
compiler is the one that the kept table names.

Where nvdisasm is (of the toolkit, or the wheel nvidia-cuda-nvdisasm) the table also shows what the machine code is
like: loads of 16 bytes that are on their way at once, instructions for a value that streams, the share of
multiplications in a matrix product; ``cuda_code.py`` has what may not be worse. Without it they are left out.
"""

from __future__ import annotations

import argparse
import difflib
import io
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cuda_code
import numpy as np

from fastdiff.kernels.cuda import runtime

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
# Sources with other numbers of stages, which `make gpu` tries: entries that depend on it are "conv_mma_64x32.4" here.
STAGES = ("conv_mma.2", "conv_mma.4")
NVCC_SECONDS = 300
KEPT = Path(__file__).with_name("cuda_resources.txt")


class Compiled(NamedTuple):
    """What ptxas says, and the machine code."""

    log: str
    code: bytes


Compile = Callable[[str, str], Compiled]


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
    parameters: int = 0
    code: cuda_code.Found | None = None

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if self.spills:
            return f"spills {self.spills} bytes of registers"
        if self.stack:
            return f"keeps {self.stack} bytes in local memory"
        return "" if self.code is None else cuda_code.fault(self.entry.partition(".")[0], self.code)


# -- compilers ---------------------------------------------------------------------------------------------------


def nvcc(text: str, arch: str) -> Compiled:
    """Compile with nvcc."""
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
        return Compiled(done.stdout + done.stderr, path.with_suffix(".cubin").read_bytes())


def nvrtc(text: str, arch: str) -> Compiled:
    """Compile with NVRTC."""
    from cuda.core import Program, ProgramOptions

    known = {"-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"}
    if unknown := set(runtime.COMPILE_OPTIONS) - known:
        raise CompileError(f"the gate does not know how to give NVRTC the options {sorted(unknown)}")
    options = ProgramOptions(
        std="c++17", arch=arch, fma=False, ftz=False, prec_div=True, prec_sqrt=True, ptxas_options="-v"
    )
    log = io.StringIO()
    try:
        code = Program(text, "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # of several kinds; all of them carry the compiler's log
        raise CompileError(f"{error}\n{log.getvalue()}") from error
    return Compiled(log.getvalue(), bytes(code))


def nvrtc_version() -> str:
    """Return the version of NVRTC, "" where there is none."""
    try:
        from cuda.bindings import nvrtc as library
        from cuda.core import Program  # noqa: F401 - here, because importing it is not safe in threads

        return ".".join(map(str, library.nvrtcVersion()[1:]))
    except (ImportError, RuntimeError):  # the wheel cuda-core, or the library, is missing
        return ""


def find_compiler(wanted: str = "") -> tuple[str, Compile]:
    """Return the name and the function of the compiler to use: the one wanted, or the first that is here."""
    if wanted in ("", "nvrtc") and (version := nvrtc_version()):
        return f"NVRTC {version}", nvrtc
    if wanted in ("", "nvcc") and shutil.which("nvcc"):
        return "nvcc", nvcc
    missing = {"": "neither nvcc nor NVRTC is here", "nvcc": "nvcc is not here", "nvrtc": "NVRTC is not here"}[wanted]
    raise NoCompilerError(f"{missing}: install the CUDA toolkit, or pip install cuda-core nvidia-cuda-nvrtc")


# -- what ptxas says -----------------------------------------------------------------------------------------------

_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_TILE = re.compile(r"_\d+x\d+$")


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


# Of the header of an ELF file: where the table of sections lies; the size and number of its entries, that of the names.
_SECTIONS = struct.Struct("<40x Q 10x HHH")
_SECTION = struct.Struct("<I 20x QQ")  # of an entry: where its name begins, where it lies, how long it is
# A section .nv.info.ENTRY is a list of attributes; those of format 4 have their value behind them.
_ATTRIBUTE, _LONG, _PARAMETER_SIZE = struct.Struct("<BBH"), 4, 0x19


def parameter_sizes(code: bytes) -> dict[str, int]:
    """Return the bytes of parameters of each entry in machine code."""
    table_at, size, count, name_table = _SECTIONS.unpack_from(code)
    sections = [_SECTION.unpack_from(code, table_at + i * size) for i in range(count)]
    found = {}
    for name_at, at, length in sections:
        begin = sections[name_table][1] + name_at
        name = code[begin : code.index(b"\0", begin)].decode()
        end = at + length if name.startswith(".nv.info.") else at
        while at < end:
            form, attribute, value = _ATTRIBUTE.unpack_from(code, at)
            if attribute == _PARAMETER_SIZE:
                found[name.removeprefix(".nv.info.")] = value
            at += _ATTRIBUTE.size + (value if form == _LONG else 0)
    return found


def _alignment(dtype: np.dtype[Any]) -> int:
    return max(_alignment(dtype[name].base) for name in dtype.names) if dtype.names else dtype.alignment


def declared_size(parameters: Sequence[runtime.Parameter]) -> int:
    """Return the bytes of parameters as they are passed: each begins at a multiple of its alignment."""
    end = 0
    for parameter in parameters:
        size, align = (8, 8) if parameter.pointer else (parameter.dtype.itemsize, _alignment(parameter.dtype))
        end = -(-end // align) * align + size
    return end


COLUMNS = ("registers", "shared", "stack", "spills", "parameters", "loads", "a value", "products")
OF_CODE = 3  # of them


def _code(found: cuda_code.Found | None) -> tuple[str, ...]:
    if found is None:
        return ("",) * OF_CODE
    taken = f"{found.instructions:.1f}" if found.instructions else "-"
    if found.most > found.instructions:
        taken += f"/{found.most:.1f}"
    return str(found.loads), taken, f"{found.products:.2f}"


def table(rows: Sequence[Use]) -> str:
    """Return the rows as text."""
    heads = ("entry", "arch", *COLUMNS, "")
    cells = [heads, *((r.entry, r.arch, *map(str, r[2:7]), *_code(r.code), "FAILS" if r.fault else "") for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = []
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join((*left, *right)).rstrip())
    return "\n".join(lines)


# -- the gate ------------------------------------------------------------------------------------------------------


def examine(
    sources: dict[str, str],
    wanted: dict[str, dict[str, int]] | None,
    compile_text: Compile,
    architectures: Sequence[str],
    disassembler: str = "",
    at_once: int = 2,
) -> tuple[list[Use], list[str]]:
    """Compile sources for architectures.

    Parameters
    ----------
    sources : dict
        Whole texts by name.
    wanted : dict or None
        The entries that each must have, and the bytes of their parameters; None: any.
    compile_text : callable
        Takes a text and an architecture.
    architectures : sequence of str
    disassembler : str, optional
        The path of nvdisasm; "": the machine code is not looked at.
    at_once : int, optional
        How many compilations run beside each other.

    Returns
    -------
    rows, faults
        What each entry needs, and everything that is wrong.
    """
    jobs = [(name, arch) for name in sources for arch in architectures]

    def work(job: tuple[str, str]) -> tuple[Compiled, dict[str, cuda_code.Found]] | CompileError:
        try:
            made = compile_text(sources[job[0]], job[1])
        except CompileError as error:
            return error
        return made, cuda_code.found(disassembler, made.code) if disassembler else {}

    rows: list[Use] = []
    faults: list[str] = []
    with ThreadPoolExecutor(at_once) as pool:
        for (name, arch), done in zip(jobs, pool.map(work, jobs), strict=True):
            if isinstance(done, CompileError):
                faults.append(f"{name}.cu does not compile for {arch}:\n{done}")
                continue
            made, code = done
            sizes = parameter_sizes(made.code)
            found = [
                use._replace(parameters=sizes.get(use.entry, 0), code=code.get(use.entry))
                for use in uses(made.log, arch)
            ]
            if name in STAGES:
                stages = name.partition(".")[2]
                found = [use._replace(entry=f"{use.entry}.{stages}") for use in found if _TILE.search(use.entry)]
            rows += found
            faults += [f"{name}.cu: {use.entry} {use.fault} on {arch}" for use in found if use.fault]
            if wanted is None:
                continue
            compiled, declared = set(_ENTRY.findall(made.log)), wanted[name]
            for entry in sorted(compiled ^ declared.keys()):
                blind = "runtime.entries" if entry in compiled else "the compiler"
                faults.append(f"{name}.cu: {entry} on {arch}: {blind} does not see this entry")
            faults += [
                f"{name}.cu: {entry} on {arch} takes {sizes.get(entry, 0)} bytes of parameters, declared are {size}"
                for entry, size in declared.items()
                if entry in compiled and sizes.get(entry, 0) != size
            ]
    return sorted(rows, key=lambda row: (row.entry, architectures.index(row.arch))), faults


def _named(source: str, entries: Iterable[str]) -> set[str]:
    """The names that the entries of a source have in the table."""
    return {f"{entry}.{source.partition('.')[2]}" if source in STAGES else entry for entry in entries} | {*entries}


def changes(text: str) -> list[str]:
    """Return the lines in which a table differs from the kept one, if that is of the same compiler."""
    kept, now = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else [], text.splitlines()
    if kept and kept[0] != now[0]:
        print(f"not compared with {KEPT.name}, which is of {kept[0]}\n")  # noqa: T201
        return []
    least = min((len(line.split()) for line in now[2:]), default=0)
    if least < 2 + len(COLUMNS):  # without what the machine code is like
        kept, now = ([*lines[:1], *(" ".join(line.split()[:least]) for line in lines[2:])] for lines in (kept, now))
    lines = difflib.unified_diff(kept, now, "kept", "now", n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table, return the exit code."""
    parser = argparse.ArgumentParser(prog="cuda_gate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--compiler", choices=["nvcc", "nvrtc"], default="", help="by default nvrtc where it is")
    parser.add_argument("--arch", action="append", help=f"by default {', '.join(ARCHITECTURES)}")
    parser.add_argument("--renew", action="store_true", help=f"write {KEPT.name}")
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
        sources = {source: runtime.source_text(source) for source in (*runtime.source_names(), *STAGES)}
        wanted = {
            source: {entry: declared_size(parameters) for entry, parameters in runtime.entries(source).items()}
            for source in sources
        }
    architectures = args.arch or list(ARCHITECTURES)
    if not (disassembler := cuda_code.disassembler()):
        print(f"the machine code is not looked at: {cuda_code.MISSING}\n")  # noqa: T201
    rows, faults = examine(sources, wanted, compile_text, architectures, disassembler)
    if not rows and not faults:
        faults = ["there is nothing to compile"]
    counted = f"{len(sources)} sources, {len({row.entry for row in rows})} entries"
    # Compilers that run beside each other have now and then ordered two rows' instructions otherwise: what differs from
    # the kept table is compiled once more, alone.
    first = f"{name}, options {' '.join(runtime.COMPILE_OPTIONS)}\n"
    differing = {line[1:].split()[0] for line in changes(f"{first}{table(rows)}\n")} if not args.files else set()
    again = {source: text for source, text in sources.items() if wanted and differing & _named(source, wanted[source])}
    if again and not (args.arch or args.renew):
        anew, _ = examine(again, None, compile_text, architectures, disassembler, at_once=1)
        rows = [next((use for use in anew if (use.entry, use.arch) == (row.entry, row.arch)), row) for row in rows]
    text = table(rows)
    print(f"{counted}, compiled by {name} for {', '.join(architectures)}\n\n{text}")  # noqa: T201
    if not (args.files or args.arch):
        text = f"{first}{text}\n"
        if args.renew:
            KEPT.write_text(text, encoding="utf-8")
        elif changed := changes(text):
            faults.append("\n".join([f"{KEPT.name} says otherwise; --renew writes it:", *changed]))
    for fault in faults:
        print(f"cuda_gate.py: {fault}", file=sys.stderr)  # noqa: T201
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
