"""Whether the machine code of a kernel has packed instructions."""

import platform
import re

import llvmlite.binding as llvm
import numba

from fastdiff.kernels.cpu import jit

X86 = {
    "multiply": r"\bv?mulps\b.*{}",
    "add": r"\bv?addps\b.*{}",
    "divide": r"\bv?divps\b.*{}",
    "root": r"\bv?sqrtps\b.*{}",
    "multiply words": r"\bv?pmuludq\b.*{}",
    "multiply and add": r"\bvfn?m(add|sub)(132|213|231)ps\b.*{}",
}
ARM = {
    "multiply": r"\bfmul(\.4s|\s+v\d+\.4s)",
    "add": r"\bfadd(\.4s|\s+v\d+\.4s)",
    "divide": r"\bfdiv(\.4s|\s+v\d+\.4s)",
    "root": r"\bfsqrt(\.4s|\s+v\d+\.4s)",
    "multiply words": r"\bumull2?(\.2d|\s+v\d+\.2d)",
    "multiply and add": r"\bfml[as](\.4s|\s+v\d+\.4s)",
}


def assert_packed(kernel, arguments, operations):
    """Each of the operations is one of vectors, in the code of a kernel that is compiled for these arguments."""
    fresh = numba.njit(**jit.OPTIONS)(kernel.py_func)  # cached code has no text
    fresh(*arguments)
    (text,) = fresh.inspect_asm().values()
    if platform.machine().lower() in ("arm64", "aarch64"):
        patterns = ARM
    else:
        features = llvm.get_host_cpu_features()
        # LLVM takes half of the widest registers on Intel's processors.
        register = "[yz]mm" if features.get("avx512f") else "ymm" if features.get("avx") else "xmm"
        patterns = {operation: pattern.format(register) for operation, pattern in X86.items()}
    for operation in operations:
        assert re.search(patterns[operation], text), f"no packed {operation}"
