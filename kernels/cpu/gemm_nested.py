"""Register-tiled float32 matrix multiplication whose sum runs over two nested indices.

``gemm_nested(c, c_off, ldc, a, a_off, a_rs, a_cs, a_us, b, b_off, ldb, b_us, m, n, k, blocks)`` computes, for i < m
and j < n,

    C[i, j] += sum over u < blocks, over k' < k of A[u, i, k'] * B[u, k', j]

where A[u, i, k'] is ``a[a_off + u * a_us + i * a_rs + k' * a_cs]`` and B[u, k', j] is
``b[b_off + u * b_us + k' * ldb + j]``.  A convolution sums so over the rows of its kernel, a weight gradient over the
rows of an image, with the sums in registers from the first product to the last.

Tiles and bits are those of `gemm`: every C[i, j] is one chain of fused multiply-adds over ascending (u, k'),
starting from C[i, j], and nothing outside the elements named is read or written.
"""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from fastdiff.kernels.cpu.gemm import (
    F32,
    FLOAT_BYTES,
    I64,
    TILES,
    _int,
    check_operands,
    emit_tiles,
    host_width,
    loop_back,
    opaque,
    panels_of,
    row_tiles_of,
    share,
)
from fastdiff.kernels.cpu.jit import export, kernel

DRIVER_ARGS = (types.int64,) * 13


def _emit_tile(builder, vec, fused, rows, vectors, operands):
    """Write one tile: fetch C, run over both indices, store C."""
    c, ldc, a, a_rs, a_cs, a_us, b, ldb, b_us, k, blocks = operands
    a_starts = [opaque(builder, builder.mul(_int(i), a_rs)) for i in range(rows)]
    c_rows = [builder.gep(c, [builder.mul(_int(i), ldc)]) for i in range(rows)]
    tile = [(i, j) for i in range(rows) for j in range(vectors)]
    outer, inner, step, following, finish = map(
        builder.append_basic_block, ("outer", "inner", "step", "following", "finish")
    )

    def variables(block, values):
        """Loop variables with these values at the start; `advance` gives them their next ones."""
        phis = [builder.phi(value.type) for value in values]
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)
        return phis

    def advance(phis, values):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, builder.block)

    old = [vec.load(c_rows[i], j) for i, j in tile]
    start = builder.block
    builder.branch(outer)

    builder.position_at_end(outer)
    u, a_u, b_u, *begun = outside = variables(start, [_int(0), a, b, *old])
    builder.cbranch(builder.icmp_signed("<", u, blocks), inner, finish)

    builder.position_at_end(inner)
    count, a_k, b_k, *sums = inside = variables(outer, [_int(0), a_u, b_u, *begun])
    builder.cbranch(builder.icmp_signed("<", count, k), step, following)

    builder.position_at_end(step)
    b_row = [vec.load(b_k, j) for j in range(vectors)]
    totals = []
    for i in range(rows):
        a_ik = vec.splat(builder.load(builder.gep(a_k, [a_starts[i]]), align=FLOAT_BYTES), vec.type)
        for j in range(vectors):
            if fused:
                totals.append(vec.call(f"fma.v{vec.lanes}f32", vec.type, a_ik, b_row[j], sums[i * vectors + j]))
            else:
                totals.append(builder.fadd(builder.fmul(a_ik, b_row[j]), sums[i * vectors + j]))
    following_k = builder.add(count, _int(1)), builder.gep(a_k, [a_cs]), builder.gep(b_k, [ldb])
    advance(inside, [*following_k, *totals])
    loop_back(builder, inner)

    builder.position_at_end(following)
    advance(outside, [builder.add(u, _int(1)), builder.gep(a_u, [a_us]), builder.gep(b_u, [b_us]), *sums])
    loop_back(builder, outer)

    builder.position_at_end(finish)
    for (i, j), total in zip(tile, begun, strict=True):
        vec.store(total, c_rows[i], j)


@intrinsic(prefer_literal=True)
def _tile(typingctx, width, rows, vectors, used, c, ldc, a, a_rs, a_cs, a_us, b, ldb, b_us, k, blocks):
    """One tile of `rows` x `vectors` at the addresses c, a, b; its last vectors have `used` lanes."""
    most_vectors = TILES[width.literal_value][2]

    def codegen(context, builder, signature, args):
        _, rows, vectors, used, c, ldc, a, a_rs, a_cs, a_us, b, ldb, b_us, k, blocks = args
        c, a, b = (builder.inttoptr(address, F32.as_pointer()) for address in (c, a, b))
        operands = c, ldc, a, a_rs, a_cs, a_us, b, ldb, b_us, k, blocks
        emit_tiles(
            builder, width.literal_value, most_vectors, rows, vectors, used,
            lambda vec, r, v: _emit_tile(builder, vec, width.literal_value > 0, r, v, operands),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(width, *[types.int64] * 14), codegen


def make_driver(width):
    """The loops over the tiles: gemm_nested with addresses for arrays and offsets."""
    lanes, most_rows, most, _ = TILES[width]

    @kernel
    def driver(c, ldc, a, a_rs, a_cs, a_us, b, ldb, b_us, m, n, k, blocks):
        if m <= 0 or n <= 0:
            return
        vectors = (n + lanes - 1) // lanes
        panels = panels_of(vectors, most)
        j = 0
        for panel in range(panels):
            v = share(vectors, panels, panel)
            used = min(lanes, n - j - (v - 1) * lanes)
            row_tiles = row_tiles_of(m, v, most, most_rows)
            i = 0
            for row_tile in range(row_tiles):
                r = share(m, row_tiles, row_tile)
                c_tile, a_tile, b_tile = c + 4 * (i * ldc + j), a + 4 * i * a_rs, b + 4 * j
                _tile(width, r, v, used, c_tile, ldc, a_tile, a_rs, a_cs, a_us, b_tile, ldb, b_us, k, blocks)
                i += r
            j += v * lanes

    return driver


def make_gemm_nested(width):
    """Compile the kernel of one width (16, 8, 4 or 0), or read it from the cache, and return its `gemm_nested`.

    The result is callable from nopython code only, and checks nothing. Arrays are 1-D and contiguous float32; offsets
    and distances count elements; any size may be 0. C may not overlap A or B.
    """
    driver = make_driver(width)
    emit = export(driver, DRIVER_ARGS, f"gemm_nested_{width}")

    @intrinsic
    def gemm_nested(
        typingctx, c, c_off, ldc, a, a_off, a_rs, a_cs, a_us, b, b_off, ldb, b_us, m, n, k, blocks
    ):  # fmt: skip
        check_operands("gemm_nested", c, a, b)

        def codegen(context, builder, signature, args):
            def address(position):
                data = make_array(signature.args[position])(context, builder, args[position]).data
                return builder.ptrtoint(builder.gep(data, [args[position + 1]]), I64)

            _, _, ldc, _, _, a_rs, a_cs, a_us, _, _, ldb, b_us, m, n, k, blocks = args
            values = address(0), ldc, address(3), a_rs, a_cs, a_us, address(8), ldb, b_us, m, n, k, blocks
            return emit(context, builder, values)

        i = types.int64
        return types.void(c, i, i, a, i, i, i, i, b, i, i, i, i, i, i, i), codegen

    gemm_nested.driver = driver  # keeps the machine code alive
    return gemm_nested


gemm_nested = make_gemm_nested(host_width())
