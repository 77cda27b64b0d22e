"""What the machine code of CUDA entries is like, read from the listing of nvdisasm, without a GPU.

Three numbers say what a kernel can reach, and what a lost unroll costs: how many reads of global memory a thread has on
their way at once, which hides their latency; how many instructions a value of a streaming kernel takes, since at 30 or
so for every value that is read or written once the processors are slower than memory; and which share of the
instructions of a matrix product's loop multiplies.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

SECONDS = 120
MISSING = "there is no nvdisasm: install the CUDA toolkit, or pip install nvidia-cuda-nvdisasm"


class Instruction(NamedTuple):
    """One instruction: without its predicate its name, what it is done to, the label that it may go to, and does."""

    name: str
    operands: str
    to: str
    always: bool


class Found(NamedTuple):
    """What the code of an entry reaches.

    Attributes
    ----------
    loads : int
        Reads of 16 bytes of global memory on their way at once, in the loop that has the most.
    instructions : float
        For a value, in a turn of the shortest loop that draws normals, by its longest way; 0 for an entry that is not
        in `VALUES`.
    products : float
        The share of multiplications, on tensor cores or fused with sums, where most of them follow each other.
    most : float
        As `instructions`, in the longest of these loops.
    """

    loads: int
    instructions: float
    products: float
    most: float = 0.0


# Values that a turn of an entry's loop makes, and how many instructions one of them may take, in its shortest loop and
# in its longest: what copies a value and makes a normal is as fast as memory with 62 of them. In steps the longest way
# is that of a row with all terms, which reads three values for each and writes two. Entries without _wide and _rows are
# for arrays that are not aligned, widths that tiles do not suit, and rows on both sides of a multiple of 2^32: they
# read and write value by value.
VALUES = {
    "normal": (4, 46.5, 46.5), "normal_wide": (16, 44, 44), "normal_rows": (16, 45.5, 45.5),
    "forward_noise": (4, 59, 59), "forward_noise_wide": (16, 49, 49), "forward_noise_rows": (16, 57, 57),
    "step_noisy": (4, 60, 70.5), "step_noisy_wide": (16, 54.5, 61), "step_noisy_rows": (16, 56, 62),
    "step_recorded": (4, 60, 69.5), "step_recorded_wide": (16, 54.5, 61), "step_recorded_rows": (16, 56, 62),
}  # fmt: skip
# Whatever the kept table says: at least so many loads at once, and such a share of products.
LEAST_LOADS = {
    "forward_noise_wide": 4,
    "forward_noise_rows": 4,
    "step_noisy_wide": 8,
    "step_noisy_rows": 8,
    "step_recorded_wide": 8,
    "step_recorded_rows": 8,
    "norm_forward": 4,
    "norm_chunks": 4,
    "norm_apply": 4,
    "norm_backward": 4,
    "conv_mma_128x128": 8,
    "conv_mma_adjoint_128x128": 8,
}
LEAST_PRODUCTS = {
    "conv_128x64": 0.85, "conv_input_128x64": 0.85, "conv_weights_128x64": 0.85, "conv_64x32": 0.75,
    "conv_weights_64x32": 0.75, "conv_mma_128x128": 0.25, "conv_mma_adjoint_128x128": 0.25, "conv_mma_weight_64": 0.35,
    "mlp_chain": 0.6, "mlp_chain_bf16x3": 0.45, "mlp_chain_bf16": 0.3, "map_rows": 0.7, "posterior_mean": 0.85,
}  # fmt: skip


def fault(entry: str, found: Found) -> str:
    """What is worse than it may be, in words, or nothing."""
    for taken, allowed in zip((found.instructions, found.most), VALUES.get(entry, ())[1:], strict=False):
        if not 0 < taken <= allowed:
            return f"takes {taken:.1f} instructions a value, allowed are {allowed}"
    if found.loads < (least := LEAST_LOADS.get(entry, 0)):
        return f"has {found.loads} loads of 16 bytes on their way at once, wanted are {least}"
    if found.products < (share := LEAST_PRODUCTS.get(entry, 0)):
        return f"multiplies with {found.products:.0%} of its instructions, wanted are {share:.0%}"
    return ""


def disassembler() -> str:
    """Return the path of nvdisasm, of the toolkit or of the wheel nvidia-cuda-nvdisasm; "" where there is none."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next((str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvdisasm*")), "")


def listing(program: str, code: bytes) -> str:
    """Return what nvdisasm makes of machine code."""
    with tempfile.TemporaryDirectory(prefix="fastdiff-code-") as folder:
        path = Path(folder) / "code.cubin"
        path.write_bytes(code)
        done = subprocess.run([program, "-c", str(path)], capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout


_ENTRY = re.compile(r"^\.text\.(\w+):$")
_LABEL = re.compile(r"^(\.L_x_\d+):$")
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_BARRIERS = ("BSSY", "BSYNC", "WARPSYNC")


def entries(text: str) -> dict[str, tuple[list[Instruction], dict[str, int]]]:
    """Return the instructions of every entry in a listing, and the numbers of those that labels stand before."""
    found: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, text.splitlines()):
        if match := _ENTRY.match(line):
            code, labels = found.setdefault(match[1], ([], {}))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif (match := _INSTRUCTION.match(line)) and match[2] != "NOP":
            predicate, name, operands = match.groups()
            target = _TARGET.search(operands)
            to = target[1] if target and not name.startswith(_BARRIERS) else ""
            code.append(Instruction(name, operands, to, bool(to) and not predicate and operands.startswith("`")))
    return found


def loops(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return first and last instruction of every loop: a branch back, but for one to itself, which ends a program."""
    ends: dict[int, int] = {}
    for at, instruction in enumerate(code):
        first = labels.get(instruction.to, at)
        if first < at:
            ends[first] = at
    return sorted(ends.items())


def inner_loops(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return those of the loops that have no other in them."""
    bounds = loops(code, labels)
    return [(f, t) for f, t in bounds if not any(f <= first and last <= t for first, last in set(bounds) - {(f, t)})]


def _registers(operand: str, width: int) -> set[int]:
    return {int(number) + i for number in _REGISTER.findall(operand) for i in range(width)}


def loads_at_once(body: list[Instruction]) -> int:
    """Return how many reads of 16 bytes of global memory a loop has on their way before it needs one of them.

    Copies to shared memory that nothing waits for, LDGSTS, count till the loop waits for a group of them.
    """
    waiting: list[set[int]] = []
    copies = most = 0
    for name, operands, *_ in [*body, *body]:  # twice: what a turn reads the next one may need
        if name.startswith("LDGDEPBAR"):
            copies = 0
        if name.startswith("LDG.") and ".128" in name:
            to, _, rest = operands.partition(",")
            used = _registers(rest, 1)
            waiting = [registers for registers in waiting if not registers & used]
            waiting.append(_registers(to, 4))
        elif name.startswith("LDGSTS"):
            copies += 1
        else:
            used = _registers(operands, 1)
            waiting = [registers for registers in waiting if not registers & used]
        most = max(most, len(waiting) + copies)
    return most


def _runs(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First instructions and ends of what is run through without a branch to it or from it."""
    starts = {*labels.values(), *(at + 1 for at, instruction in enumerate(code) if instruction.to)}
    return list(pairwise(sorted({0, len(code), *starts})))


def product_share(code: list[Instruction], labels: dict[str, int]) -> float:
    """Return the share of multiplications in the run without branches that has the most of them.

    A loop that is no longer unrolled has short runs, with all that a turn costs in each. Where there are tensor cores'
    multiplications, the others are not what the time goes into.
    """
    of_tensor_cores = any(instruction.name.startswith("HMMA") for instruction in code)
    kind, products, size = "HMMA" if of_tensor_cores else "FFMA", 0, 1
    for first, end in _runs(code, labels):
        count = sum(name.startswith(kind) for name, *_ in code[first:end])
        if count > products:
            products, size = count, end - first
    return products / size


def longest_way(code: list[Instruction], labels: dict[str, int], first: int, last: int) -> int:
    """Return how many instructions a turn of a loop takes at most, which has no other in it.

    What branches go around counts on the way through it. All conditions count as independent of each other.
    """
    ways = [0] * (last + 2)  # from each instruction on
    for at in range(last, first - 1, -1):
        to, always = labels.get(code[at].to, 0), code[at].always
        ways[at] = 1 + max(ways[to] if at < to <= last else 0, 0 if always else ways[at + 1])
    return ways[first]


def lengths(code: list[Instruction], labels: dict[str, int]) -> list[int]:
    """Return the longest ways through the loops that draw normals, which take roots, the shortest first."""
    drawing = [
        bounds
        for bounds in inner_loops(code, labels)
        if any(name.startswith("MUFU.RSQ") for name, *_ in code[bounds[0] : bounds[1] + 1])
    ]
    return sorted(longest_way(code, labels, *bounds) for bounds in drawing)


def look(code: list[Instruction], labels: dict[str, int], values: int = 0, inner: bool = False) -> Found:
    """Return what the code of an entry reaches; `values`: those of a turn of its loops.

    With `inner` only loads in loops without another in them count.
    """
    bodies = [code[first : last + 1] for first, last in (inner_loops if inner else loops)(code, labels)]
    drawn = [size / values for size in lengths(code, labels)] if values else []
    reads = [body for body in bodies if any(name.startswith("LDG") and ".128" in name for name, *_ in body)]
    return Found(
        max(map(loads_at_once, reads), default=0),
        min(drawn, default=0),
        product_share(code, labels),
        max(drawn, default=0),
    )


def found(program: str, code: bytes) -> dict[str, Found]:
    """Return what every entry in machine code reaches; `program` as from `disassembler`."""
    return {
        entry: look(*parts, VALUES.get(entry, (0,))[0], entry in LEAST_LOADS and "norm" in entry)
        for entry, parts in entries(listing(program, code)).items()
    }
