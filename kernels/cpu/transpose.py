"""The transpose of a matrix, in square blocks that are turned by shuffles."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from fastdiff.kernels.cpu.gemm import F32, FLOAT_BYTES, I32, I64
from fastdiff.kernels.cpu.jit import kernel

SIDE = 8  # of a block
LINE = 16  # values of a cache line
ZERO = np.float32(0)


def turned(builder, rows):
    """SIDE vectors of SIDE values, turned."""
    rows, span = list(rows), 1
    while span < SIDE:  # exchange the off-diagonal halves of blocks of twice the span
        upper = [lane if not lane & span else SIDE + lane - span for lane in range(SIDE)]
        lower = [lane + span if not lane & span else SIDE + lane for lane in range(SIDE)]
        for i in range(SIDE):
            if not i & span:
                pair = rows[i], rows[i + span]
                rows[i], rows[i + span] = (
                    builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, SIDE), mask))
                    for mask in (upper, lower)
                )
        span *= 2
    return rows


@intrinsic
def _transpose_block(typingctx, source, at, distance, target, to, target_distance, add):
    """target[to + j target_distance + i] = source[at + i distance + j] for i, j < SIDE, or has it added."""

    def codegen(context, builder, signature, args):
        def vectors(position):
            data = make_array(signature.args[position])(context, builder, args[position]).data
            starts = [builder.add(args[position + 1], builder.mul(I64(i), args[position + 2])) for i in range(SIDE)]
            return [builder.bitcast(builder.gep(data, [start]), vector.as_pointer()) for start in starts]

        vector = ir.VectorType(F32, SIDE)
        rows = [builder.load(place, align=FLOAT_BYTES) for place in vectors(0)]
        for row, place in zip(turned(builder, rows), vectors(3), strict=True):
            old = builder.select(args[6], builder.load(place, align=FLOAT_BYTES), ir.Constant(vector, [0.0] * SIDE))
            builder.store(builder.fadd(row, old), place, align=FLOAT_BYTES)
        return context.get_dummy_value()

    i = types.int64
    return types.void(source, i, i, target, i, i, types.boolean), codegen


@kernel
def transpose_part(source, at, distance, target, to, target_distance, rows, columns, add):
    """target[to + j target_distance + i] = source[at + i distance + j] for i < rows, j < columns, or has it added."""
    whole_rows, whole_columns = rows - rows % SIDE, columns - columns % SIDE
    for first in range(0, whole_rows, LINE):  # of few rows at once: those far apart meet in the same sets of a cache
        for j in range(0, whole_columns, SIDE):
            for i in range(first, min(first + LINE, whole_rows), SIDE):
                place = to + j * target_distance + i
                _transpose_block(source, at + i * distance + j, distance, target, place, target_distance, add)
    for j in range(columns):
        for i in range(whole_rows if j < whole_columns else 0, rows):
            place = to + j * target_distance + i
            old = target[place] if add else ZERO
            target[place] = source[at + i * distance + j] + old


@kernel
def transpose_into(source, target, rows, columns, add):
    """target (columns, rows) becomes the transpose of source (rows, columns), or has it added."""
    transpose_part(source, 0, columns, target, 0, rows, rows, columns, add)
