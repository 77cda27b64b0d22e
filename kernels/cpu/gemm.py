"""Register-tiled float32 matrix multiplication, to be called from inside other Numba kernels.

``gemm(c, c_off, ldc, a, a_off, a_rs, a_cs, b, b_off, ldb, m, n, k, accumulate)`` computes, for i < m, j < n,

    C[i, j] = (C[i, j] if accumulate else 0) + sum over k of A[i, k] * B[k, j]

where C[i, j] is ``c[c_off + i * ldc + j]``, A[i, k] is ``a[a_off + i * a_rs + k * a_cs]`` and B[k, j] is
``b[b_off + k * ldb + j]``.  With (a_rs, a_cs) = (ld, 1) it is y = x W; with (1, ld) it is dW = x^T dy.
``gemm_bias`` takes ``bias, bias_off`` instead of ``accumulate``, and adds bias[bias_off + j] to the sum at the end.

**The bits.**  Every C[i, j] is one chain of fused multiply-adds over ascending k, starting from C[i, j] or
from +0.  Vectors run along j, rows are independent, and k is never split into partial sums.  So the bits
depend neither on m and n, nor on the place of the element, nor on the tile that computed it; and a product
split along k into several accumulating calls has the bits of the whole.  Widths 16, 8 and 4 agree to the bit;
width 0, for machines without fused multiply-add, rounds each product and agrees with itself only.

**The tiles.**  A tile is up to 6 rows by up to 4 vectors of sums, held in registers while k runs: each step
loads one row of B, broadcasts one A for each row, and multiplies.  That is enough independent chains to hide
the latency of the multiply-add, and few enough loads to keep it fed.  A single row takes up to 16 vectors
instead, so that a matrix-vector product reads B nearly in order.  Rows and vectors are divided into tiles as
evenly as can be: 13 vectors are 3 + 3 + 3 + 4, not 4 + 4 + 4 + 1, so that no tile has too few chains.  The
last vector of a row ends with the row, so it may share elements with the one before, which is in the same tile: both
compute the same.  Only where n is less than a vector is there a mask, which is slow on many CPUs.  Nothing outside the
m x n, m x k and k x n elements is read or written.  Lanes that compute an element once more are wasted: where the
layout is free, let n be the size that the vector length divides.

**One compiled copy.**  The machine code is made once (`export`), and ``gemm`` is a mere call of its symbol, so a
kernel that uses it compiles fast, and can be cached as well.
"""

from __future__ import annotations

from functools import partial

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_jitable
from numba.np.arrayobj import make_array

from fastdiff.kernels.cpu.jit import export, kernel

I1, I32, I64, F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOAT_BYTES = 4

# width: (lanes of a vector, most rows of a tile, most vectors of a tile, most vectors of a tile of one row).
# 6 x 4 sums suit 32 registers (AVX-512, NEON), 6 x 2 the 16 of AVX2 and SSE.
TILES = {16: (16, 6, 4, 16), 8: (8, 6, 2, 8), 4: (4, 6, 4, 8), 0: (4, 6, 2, 8)}
# Where a tile has 2 vectors, a third one beside them would be a tile of its own with too few chains: 4 x 3 sums are
# enough, and fit as well.
PAIR, ROWS_OF_THREE = 2, 4
DRIVER_ARGS = (types.int64,) * 12


def host_width():
    """The best width for the CPU that Numba compiles for: 16 (AVX-512), 8 (AVX2), 4 (NEON) or 0 (no FMA)."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    have = set(features.split(","))
    if "+avx512f" in have:
        return 16
    if {"+avx2", "+fma"} <= have:
        return 8
    return 4 if triple.startswith(("aarch64", "arm64")) else 0


def _int(value, bits=I64):
    return ir.Constant(bits, value)


class Rows:
    """Code for rows of vectors; the vector numbered `masked` (or None) has only its first `used` lanes.

    The one numbered `last` (or None) is a whole one: its last `used` lanes follow the vector before.
    """

    def __init__(self, builder, lanes, masked, used, last=None):
        self.builder, self.lanes, self.masked, self.last = builder, lanes, masked, last
        self.overlap = builder.sub(used, _int(lanes))
        self.type = ir.VectorType(F32, lanes)
        self.zero = ir.Constant(self.type, [0.0] * lanes)
        index = ir.VectorType(I64, lanes)
        self.mask = builder.icmp_signed("<", ir.Constant(index, list(range(lanes))), self.splat(used, index))

    def splat(self, scalar, vector):
        blank = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(blank, scalar, _int(0, I32))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, blank, zeros)

    def call(self, name, result, *args):
        declared = ir.FunctionType(result, [arg.type for arg in args])
        function = cgutils.get_or_insert_function(self.builder.module, declared, f"llvm.{name}")
        return self.builder.call(function, args)

    def address(self, row, j):
        at = _int(j * self.lanes)
        if j == self.last:
            at = self.builder.add(at, self.overlap)
        return self.builder.bitcast(self.builder.gep(row, [at]), self.type.as_pointer())

    def load(self, row, j):
        place = self.address(row, j)
        if j != self.masked:
            return self.builder.load(place, align=FLOAT_BYTES)
        name = f"masked.load.v{self.lanes}f32.p0v{self.lanes}f32"
        return self.call(name, self.type, place, _int(FLOAT_BYTES, I32), self.mask, self.zero)

    def store(self, value, row, j):
        place = self.address(row, j)
        if j != self.masked:
            self.builder.store(value, place, align=FLOAT_BYTES)
        else:
            name = f"masked.store.v{self.lanes}f32.p0v{self.lanes}f32"
            self.call(name, ir.VoidType(), value, place, _int(FLOAT_BYTES, I32), self.mask)


def opaque(builder, value):
    """The integer, of which LLVM knows nothing: else it adds from row to row, and each address waits for the last."""
    return builder.call(ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0"), [value])


def loop_back(builder, loop):
    """Branch to the head of a loop, which is not to be unrolled: no faster, and twice the code to compile."""
    module = builder.module
    wish = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    name = module.add_metadata([wish, wish])
    name.operands = name, wish  # how LLVM wants it: a loop's list names itself first
    builder.branch(loop).set_metadata("llvm.loop", name)


def _emit_tile(builder, vec, fused, rows, vectors, operands, bias=None):
    """Write one tile: fetch C or zeros, run over k, add the bias where its address is not 0, store C."""
    c, ldc, a, a_rs, a_cs, b, ldb, k, accumulate = operands
    a_starts = [opaque(builder, builder.mul(_int(i), a_rs)) for i in range(rows)]
    c_rows = [builder.gep(c, [builder.mul(_int(i), ldc)]) for i in range(rows)]
    tile = [(i, j) for i in range(rows) for j in range(vectors)]

    start = builder.block
    fetch, loop, step, finish = map(builder.append_basic_block, ("fetch", "loop", "step", "finish"))
    builder.cbranch(accumulate, fetch, loop)
    builder.position_at_end(fetch)
    old = {(i, j): vec.load(c_rows[i], j) for i, j in tile}
    builder.branch(loop)

    builder.position_at_end(loop)

    def variable(from_start, from_fetch):
        phi = builder.phi(from_start.type)
        phi.add_incoming(from_start, start)
        phi.add_incoming(from_fetch, fetch)
        return phi

    count, a_k, b_k = variable(_int(0), _int(0)), variable(a, a), variable(b, b)
    sums = {ij: variable(vec.zero, old[ij]) for ij in tile}
    builder.cbranch(builder.icmp_signed("<", count, k), step, finish)

    builder.position_at_end(step)
    b_row = [vec.load(b_k, j) for j in range(vectors)]
    for i in range(rows):
        a_ik = vec.splat(builder.load(builder.gep(a_k, [a_starts[i]]), align=FLOAT_BYTES), vec.type)
        for j in range(vectors):
            if fused:
                total = vec.call(f"fma.v{vec.lanes}f32", vec.type, a_ik, b_row[j], sums[i, j])
            else:
                total = builder.fadd(builder.fmul(a_ik, b_row[j]), sums[i, j])
            sums[i, j].add_incoming(total, step)
    count.add_incoming(builder.add(count, _int(1)), step)
    a_k.add_incoming(builder.gep(a_k, [a_cs]), step)
    b_k.add_incoming(builder.gep(b_k, [ldb]), step)
    loop_back(builder, loop)

    builder.position_at_end(finish)
    if bias is not None:
        with builder.if_then(builder.icmp_signed("!=", bias, ir.Constant(bias.type, None))):
            added = [vec.load(bias, j) for j in range(vectors)]
            shifted = {(i, j): builder.fadd(sums[i, j], added[j]) for i, j in tile}
            inside = builder.block
        for ij in tile:
            total = builder.phi(vec.type)
            total.add_incoming(sums[ij], finish)
            total.add_incoming(shifted[ij], inside)
            sums[ij] = total
    for i, j in tile:
        vec.store(sums[i, j], c_rows[i], j)


def emit_tiles(builder, width, most_in_a_row, rows, vectors, used, emit):
    """Write ``emit(code for rows of vectors, rows, vectors)`` for each size of tile, and the jump to the wanted one.

    `most_in_a_row` is how many vectors a tile of one row has at most; the last vector has `used` lanes.
    """
    lanes, most_rows, most_vectors, _ = TILES[width]
    # 0 vectors is one with a mask.
    part = builder.and_(builder.icmp_signed("==", vectors, _int(1)), builder.icmp_signed("<", used, _int(lanes)))
    choice = builder.add(builder.shl(rows, _int(8)), builder.select(part, _int(0), vectors))
    never, leave = builder.append_basic_block("never"), builder.append_basic_block("leave")
    switch = builder.switch(choice, never)
    builder.position_at_end(never)
    builder.unreachable()
    for r in range(1, most_rows + 1):
        most = most_vectors + (most_vectors == PAIR and r <= ROWS_OF_THREE)
        for v in range(1 + (max(most, most_in_a_row) if r == 1 else most)):
            case = builder.append_basic_block(f"tile_{r}x{v}")
            switch.add_case(_int((r << 8) + v), case)
            builder.position_at_end(case)
            masked, last = (None if v else 0), (v - 1 if v > 1 else None)
            emit(Rows(builder, lanes, masked, used, last), r, max(1, v))
            builder.branch(leave)
    builder.position_at_end(leave)


@intrinsic(prefer_literal=True)
def _tile(typingctx, width, rows, vectors, used, c, ldc, a, a_rs, a_cs, b, ldb, k, accumulate, bias):
    """One tile of `rows` x `vectors` at the addresses c, a, b, bias; its last vectors have `used` lanes."""
    most_in_a_row = TILES[width.literal_value][3]

    def codegen(context, builder, signature, args):
        _, rows, vectors, used, c, ldc, a, a_rs, a_cs, b, ldb, k, accumulate, bias = args
        c, a, b, bias = (builder.inttoptr(address, F32.as_pointer()) for address in (c, a, b, bias))
        operands = c, ldc, a, a_rs, a_cs, b, ldb, k, builder.trunc(accumulate, I1)
        emit_tiles(
            builder, width.literal_value, most_in_a_row, rows, vectors, used,
            lambda vec, r, v: _emit_tile(builder, vec, width.literal_value > 0, r, v, operands, bias),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(width, *[types.int64] * 13), codegen


@register_jitable
def panels_of(vectors, most):
    """Number of panels of at most `most` vectors, or of 2 or 3 where `most` is 2."""
    return max(1, vectors // PAIR) if most == PAIR else (vectors + most - 1) // most


@register_jitable
def row_tiles_of(m, vectors, most, most_rows):
    """Number of tiles of m rows of so many vectors."""
    rows = ROWS_OF_THREE if vectors > most else most_rows
    return (m + rows - 1) // rows


@register_jitable
def share(count, parts, part):
    """Size of an even part of `count`: the last one is of the largest."""
    return count // parts + (parts - part <= count % parts)


def make_driver(width):
    """The loops over the tiles: gemm with addresses for arrays and offsets, and 0 or 1 for accumulate.

    The bias is added to every row of C at the end; address 0 is none.
    """
    lanes, most_rows, most_vectors, most_in_a_row = TILES[width]

    @kernel
    def driver(c, ldc, a, a_rs, a_cs, b, ldb, m, n, k, accumulate, bias):
        if m <= 0 or n <= 0:
            return
        vectors = (n + lanes - 1) // lanes
        most = most_in_a_row if m == 1 else most_vectors
        panels = panels_of(vectors, most)
        j = 0
        for panel in range(panels):  # the outer loop, so that the panel of B stays in the cache for all rows
            v = share(vectors, panels, panel)
            used = min(lanes, n - j - (v - 1) * lanes)
            row_tiles = row_tiles_of(m, v, most, most_rows)
            i = 0
            for row_tile in range(row_tiles):
                r = share(m, row_tiles, row_tile)
                c_tile, a_tile, b_tile = c + 4 * (i * ldc + j), a + 4 * i * a_rs, b + 4 * j
                bias_tile = bias + 4 * j if bias else 0
                _tile(width, r, v, used, c_tile, ldc, a_tile, a_rs, a_cs, b_tile, ldb, k, accumulate, bias_tile)
                i += r
            j += v * lanes

    return driver


def check_operands(name, c, *others):
    """Raise `TypingError` where the types of C and the others are not those of a product."""
    for array in (c, *others):
        if not (isinstance(array, types.Array) and array.dtype == types.float32 and array.ndim == 1):
            raise TypingError(f"{name} wants 1-D float32 arrays, got {array}")
        if array.layout != "C" or not array.aligned:
            raise TypingError(f"{name} wants contiguous arrays, got {array}")
    if not c.mutable:
        raise TypingError(f"{name} cannot write to a read-only array")


def make_gemm(width):
    """Compile the kernel of one width (16, 8, 4 or 0), or read it from the cache, and return its `gemm`.

    The result is callable from nopython code only.  It checks nothing; its parameters are, in order,

    c, c_off, ldc : float32 (any,), contiguous; offset of C (m, n) in it; distance between rows of C
    a, a_off, a_rs, a_cs : the same for A (m, k), with a distance between rows and one between columns
    b, b_off, ldb : the same for B (k, n)
    m, n, k : int64, each may be 0; where k is 0, C becomes +0 or stays
    accumulate : bool, whether the sums start from C rather than from +0

    Offsets and distances count elements.  C may not overlap A or B.
    """
    driver = make_driver(width)
    emit = export(driver, DRIVER_ARGS, f"gemm_{width}")

    def call(context, builder, signature, args, bias):
        def address(position):
            data = make_array(signature.args[position])(context, builder, args[position]).data
            return builder.ptrtoint(builder.gep(data, [args[position + 1]]), I64)

        _, _, ldc, _, _, a_rs, a_cs, _, _, ldb, m, n, k, last, *_ = args
        start, added = (_int(0), address(13)) if bias else (builder.zext(last, I64), _int(0))
        return emit(context, builder, (address(0), ldc, address(3), a_rs, a_cs, address(7), ldb, m, n, k, start, added))

    i = types.int64

    @intrinsic
    def gemm(typingctx, c, c_off, ldc, a, a_off, a_rs, a_cs, b, b_off, ldb, m, n, k, accumulate):
        check_operands("gemm", c, a, b)
        return types.void(c, i, i, a, i, i, i, b, i, i, i, i, i, types.boolean), partial(call, bias=False)

    @intrinsic
    def with_bias(typingctx, c, c_off, ldc, a, a_off, a_rs, a_cs, b, b_off, ldb, m, n, k, bias, bias_off):
        check_operands("gemm", c, a, b, bias)
        return types.void(c, i, i, a, i, i, i, b, i, i, i, i, i, bias, i), partial(call, bias=True)

    gemm.driver = driver  # keeps the machine code alive
    gemm.with_bias = with_bias
    return gemm


gemm = make_gemm(host_width())
gemm_bias = gemm.with_bias
