"""The matrix unit of a CPU (AMX): registers of 16 x 16 sums, and products of bf16 values that are added to them.

A *tile* is a register of 16 rows of 64 bytes. One instruction adds the product of a tile of 16 x 32 values and one of
32 x 16, whose rows lie in pairs, value by value (rows 2i and 2i + 1 side by side), to a tile of 16 x 16 float32 sums.
Sums of 32 x 32 are held in four tiles, so that two tiles of each factor make four products.

Measured on an Emerald Rapids core (2026-12-01): four products 25 ns, 2.6 TF/s; a tile whose rows lie in cache lines is
loaded in 3.4 ns, and in 22 ns where its rows cross them.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

SIDE, DEEP = 16, 32  # rows, and columns of sums, of a tile; bf16 values of a row of one
TILE_BYTES, ROW_BYTES = 1024, 64

I8 = ir.IntType(8)
POINTER = I8.as_pointer()
PERMIT, TILES_STATE, NUMBER = 0x1023, 18, {"x86_64": 158}  # ARCH_REQ_XCOMP_PERM; XTILEDATA; of arch_prctl


@cache
def why_not() -> str:
    """Why this process cannot use tiles; empty where it can. Linux gives them to a process that asks, once."""
    if not sys.platform.startswith("linux") or platform.machine() not in NUMBER:
        return f"AMX is used on Linux on x86-64 only, not on {sys.platform} on {platform.machine()}"
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    if not {"+amx-tile", "+amx-bf16", "+avx512f"} <= features:
        return "this CPU, or the one that Numba compiles for, has no AMX (Intel's since Sapphire Rapids have)"
    if ctypes.CDLL(None).syscall(NUMBER[platform.machine()], PERMIT, TILES_STATE):
        return "the system does not let this process use AMX (Linux does since 5.16)"
    return ""


def _tile_instruction(name, tiles, addressed):
    """Make an intrinsic for an instruction of certain tiles, with an address and a distance of rows or without."""

    def emit(context, builder, signature, args):
        values = [ir.Constant(I8, tile) for tile in tiles]
        if args:
            values += [builder.inttoptr(args[0], POINTER), *args[1:]]
        function = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), values)
        return context.get_dummy_value()

    if addressed:

        @intrinsic
        def instruction(typingctx, address, distance):
            return types.void(types.int64, types.int64), emit

    else:

        @intrinsic
        def instruction(typingctx):
            return types.void(), emit

    return instruction


@intrinsic
def tiles_begin(typingctx):
    """Let the thread's tiles have 16 rows of 64 bytes."""
    plan = bytearray(64)
    plan[0] = 1
    for tile in range(8):
        plan[16 + 2 * tile], plan[48 + tile] = ROW_BYTES, SIDE

    def emit(context, builder, signature, args):
        place = cgutils.global_constant(builder.module, "fastdiff_tiles", cgutils.make_bytearray(bytes(plan)))
        function = ir.FunctionType(ir.VoidType(), [POINTER])
        load = cgutils.get_or_insert_function(builder.module, function, "llvm.x86.ldtilecfg")
        builder.call(load, [builder.bitcast(place, POINTER)])
        return context.get_dummy_value()

    return types.void(), emit


tiles_end = _tile_instruction("tilerelease", (), False)
# Tiles 0 to 3 hold sums, of upper and lower rows and left and right columns; 4 and 5 the rows, 6 and 7 the columns.
clear_0, clear_1, clear_2, clear_3 = (_tile_instruction("tilezero", (tile,), False) for tile in range(4))
load_0, load_1, load_2, load_3, load_upper, load_lower, load_left, load_right = (
    _tile_instruction("tileloadd64", (tile,), True) for tile in range(8)
)
store_0, store_1, store_2, store_3 = (_tile_instruction("tilestored64", (tile,), True) for tile in range(4))
upper_left, upper_right, lower_left, lower_right = (
    _tile_instruction("tdpbf16ps", (2 * row + column, 4 + row, 6 + column), False)
    for row in range(2)
    for column in range(2)
)
