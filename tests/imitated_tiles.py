"""AMX without a CPU that has it: the kernels of `kernels.cpu.amx` with functions in the place of its instructions.

They do what Intel's text says: in a product the sums of the even and of the odd values of a row are apart, and are
added to the tile at the end. Tiles are an array of the machine code, so that kernels run on one thread only, and
nothing is cached.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from unittest import mock

import numba.core
from llvmlite import ir
from numba.core import cgutils

from fastdiff.kernels.cpu import amx, jit, tiles

I8, I16, I32, I64, F32 = *map(ir.IntType, (8, 16, 32, 64)), ir.FloatType()
SIDE = tiles.SIDE
ROW = ir.VectorType(F32, SIDE)
TILES = ir.ArrayType(ir.ArrayType(ROW, SIDE), 8)


def _at(builder, address, offset, kind):
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _row(builder, tile, i):
    """Where a row of a tile begins."""
    module = builder.module
    if "imitated" not in module.globals:
        memory = ir.GlobalVariable(module, TILES, "imitated")
        memory.linkage, memory.initializer = "internal", ir.Constant(TILES, None)
    return builder.gep(module.globals["imitated"], [I64(0), builder.zext(tile, I64), i])


def _zero(builder, tile):
    with cgutils.for_range(builder, I64(SIDE)) as loop:
        builder.store(ir.Constant(ROW, [0.0] * SIDE), _row(builder, tile, loop.index), align=1)


def _moved(builder, tile, address, distance, load):
    first = builder.ptrtoint(address, I64)
    with cgutils.for_range(builder, I64(SIDE)) as loop:
        there = _at(builder, first, builder.mul(loop.index, distance), ROW)
        here = _row(builder, tile, loop.index)
        source, target = (there, here) if load else (here, there)
        builder.store(builder.load(source, align=1), target, align=1)


def _value(builder, place):
    """The float32 of a bf16; one with too few digits counts as 0."""
    bits = builder.load(place)
    wide = builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), F32)
    few = builder.icmp_unsigned("==", builder.and_(bits, I16(0x7F80)), I16(0))
    return builder.select(few, F32(0.0), wide)


def _product(builder, sums, rows, columns):
    totals = [cgutils.alloca_once(builder, F32) for _ in range(2)]
    with cgutils.for_range(builder, I64(SIDE)) as down, cgutils.for_range(builder, I64(SIDE)) as across:
        for total in totals:
            builder.store(F32(0.0), total)
        with cgutils.for_range(builder, I64(SIDE)) as pair:
            of_row = builder.ptrtoint(_row(builder, rows, down.index), I64)
            of_column = builder.ptrtoint(_row(builder, columns, pair.index), I64)
            for odd, total in enumerate(totals):
                places = (
                    _at(builder, start, builder.add(builder.mul(index, I64(4)), I64(2 * odd)), I16)
                    for start, index in ((of_row, pair.index), (of_column, across.index))
                )
                a, b = (_value(builder, place) for place in places)
                builder.store(builder.fma(a, b, builder.load(total)), total)
        start = builder.ptrtoint(_row(builder, sums, down.index), I64)
        place = _at(builder, start, builder.mul(across.index, I64(4)), F32)
        both = builder.fadd(*map(builder.load, totals))
        builder.store(builder.fadd(builder.load(place), both), place)


BODIES = {
    "ldtilecfg": lambda builder, plan: None,
    "tilerelease": lambda builder: None,
    "tilezero": _zero,
    "tileloadd64": lambda *args: _moved(*args, load=True),
    "tilestored64": lambda *args: _moved(*args, load=False),
    "tdpbf16ps": _product,
}


def _function(module, kind, name):
    """In the place of an instruction, by its name in LLVM."""
    found = cgutils.get_or_insert_function(module, kind, name.replace("llvm.x86", "imitated"))
    if not found.blocks:
        found.linkage = "internal"
        builder = ir.IRBuilder(found.append_basic_block())
        BODIES[name.removeprefix("llvm.x86.")](builder, *found.args)
        builder.ret_void()
    return found


def _copy_of(module, **others):
    """The module once more, with others in the place of those that it imports."""
    spec = importlib.util.spec_from_file_location(f"imitated_{module.__name__.rsplit('.', 1)[1]}", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    names = {f"fastdiff.kernels.cpu.{name}": other for name, other in others.items()}
    with mock.patch.dict(sys.modules, {spec.name: copy, **names}):
        spec.loader.exec_module(copy)
    return copy


@cache
def kernels():
    """`kernels.cpu.amx` on tiles in memory."""
    helpers = SimpleNamespace(**vars(cgutils) | {"get_or_insert_function": _function})
    with mock.patch.object(numba.core, "cgutils", helpers):
        imitated = _copy_of(tiles)
    plain = ModuleType("plain_jit")
    plain.kernel, plain.part = numba.njit(**jit.OPTIONS), jit.part
    return _copy_of(amx, tiles=imitated, jit=plain)
