"""A perceptron's sampling chain given observations, by the method tmpd: a tile of samples through all rows of a table.

A tile is stored feature by feature, as in `mlp.chain_range`; what belongs to observations lies row by row too, in
float64 and with CHAIN_TILE lanes, one for each sample. Each evaluation is one forward pass that keeps the slopes of the
layers, a backward pass for each product with J^T, and a small solve. Where nothing is between layers, and their product
is smaller than they, a backward pass takes that. Where single values are told, the passes end before the first layer:
its rows of these values are all that the equations need, and it is the same for the sum of all products. What is done
with a lane depends on nothing in the others, so a sample's bits do not depend on its tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastdiff.backends.protocol import DAMPED, KRYLOV_LEAST, PIVOT, TINY
from fastdiff.kernels.cpu.elementary import sigmoid
from fastdiff.kernels.cpu.gemm import gemm, host_width
from fastdiff.kernels.cpu.jit import _element, kernel
from fastdiff.kernels.cpu.mlp import (
    ACTIVATION,
    BIAS,
    CHAIN_TILE,
    COLUMN,
    EVALUATES,
    INPUTS,
    LEAKY,
    MODE,
    ONE,
    OUTPUTS,
    SCALED,
    SHIFTED,
    SILU,
    SLOPE,
    STEP,
    WEIGHT,
    ZERO,
    Network,
    T,
    X,
    Y,
    _forget,
)  # fmt: skip
from fastdiff.kernels.cpu.noise import CHUNK, QUARTER, Law, Room, draw, law_at
from fastdiff.kernels.cpu.step import S, apply_row

LANES = 16  # samples that are solved for at once
TILE = CHAIN_TILE
# Of each of the chain's rows: m = p x + q out is the mean of x0; the gain that moves it, and that of the output;
# the square of the least singular value that counts; how far a slope may reach.
P, Q, GAIN, TO_OUTPUT, LEAST2, FARTHEST = range(6)
# A run of layers of a backward pass: widths of its input and output, where its weights lie, and the slopes of its
# output, or -1; its first layer and its last.
NARROW, WIDE, WEIGHTS, SLOPES, FIRST_LAYER, LAST_LAYER = range(6)
LANE, COUNT, OBSERVATION, FIRST = range(4)  # of a run of samples of one observation; FIRST is the row of its noise


class Observations(NamedTuple):
    """Observations, and a table: `rows` has for each of its rows P ... FARTHEST.

    Draw i is ``i % per`` of observation ``i // per``, whose first is sample `firsts` of it. Observations have rows of
    `matrix`, or where that is empty `places`: m of each, like those of y and variance; and one of reach.
    """

    rows: Any
    products: int
    per: int
    firsts: Any
    matrix: Any
    places: Any
    y: Any
    variance: Any
    reach: Any
    m: int


class Back(NamedTuple):
    """A backward pass: runs of layers NARROW ... LAST_LAYER, their weights, and where each layer's slopes begin."""

    runs: Any
    weights: Any
    ends: Any


class Matrices(NamedTuple):
    """The matrices A (m, d) of a tile's lanes: those of its runs, `count` of them, or each lane's places (m, TILE)."""

    m: int
    d: int
    matrix: Any
    places: Any
    runs: Any
    count: int


class Space(NamedTuple):
    """A thread's: of the memory, of gradients of a tile's layers, and what `chain_tmpd` cuts out of the rest."""

    memory: Any
    deltas: Any
    f32: Any
    f64: Any
    places: Any


def _products(sign):
    @intrinsic
    def products(typingctx, target, at, a, a_at, a_step, b, b_at, b_step, count):
        """target[at + l] += or -= the sum of a[a_at + i a_step + l] b[b_at + i b_step + l] over i, for LANES l."""
        array, i64 = types.Array(types.float64, 1, "C"), types.int64
        vector = ir.VectorType(ir.DoubleType(), LANES)

        def codegen(context, builder, signature, args):
            def place(k, index):
                sub = types.void(signature.args[k], i64)
                where = _element(context, builder, sub, (args[k], index))
                return builder.bitcast(where, vector.as_pointer())

            total = cgutils.alloca_once(builder, vector)
            builder.store(builder.load(place(0, args[1]), align=8), total)
            with cgutils.for_range(builder, args[8]) as loop:
                first, second = (
                    builder.load(place(k, builder.add(args[k + 1], builder.mul(loop.index, args[k + 2]))), align=8)
                    for k in (2, 5)
                )
                if sign < 0:
                    first = builder.fneg(first)
                if host_width():
                    fma = cgutils.get_or_insert_function(
                        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f64"
                    )
                    builder.store(builder.call(fma, [first, second, builder.load(total)]), total)
                else:
                    builder.store(builder.fadd(builder.load(total), builder.fmul(first, second)), total)
            builder.store(builder.load(total), place(0, args[1]), align=8)
            return context.get_dummy_value()

        return types.void(array, i64, array, i64, i64, array, i64, i64, i64), codegen

    return products


add_products, subtract_products = _products(1), _products(-1)


@kernel
def damped(inputs, K, rows, H, rhs, least2, normal, pivots, v, w):
    """w (K, TILE), by which H w is the right-hand side (inputs, TILE), for H (inputs, K, TILE): `conditioning.damped`.

    All flat; `normal` (K, K, LANES), `pivots` and v (K, LANES) are room. Lanes from `rows` on have to be finite.
    """
    for b in range(0, rows, LANES):
        v[: K * LANES] = 0.0
        for j in range(K):
            for k in range(j + 1):
                at = (j * K + k) * LANES
                normal[at : at + LANES] = 0.0
                add_products(normal, at, H, j * TILE + b, K * TILE, H, k * TILE + b, K * TILE, inputs)
            diagonal = (j * K + j) * LANES
            for i in range(LANES):
                normal[diagonal + i] += least2
                pivots[j * LANES + i] = PIVOT * normal[diagonal + i]
            add_products(v, j * LANES, H, j * TILE + b, K * TILE, rhs, b, TILE, inputs)
        for j in range(K):  # Cholesky's factor, with the inverse of its diagonal
            for i in range(j, K):
                subtract_products(
                    normal, (i * K + j) * LANES, normal, i * K * LANES, LANES, normal, j * K * LANES, LANES, j
                )  # fmt: skip
            diagonal = (j * K + j) * LANES
            for i in range(LANES):
                normal[diagonal + i] = 1.0 / math.sqrt(max(normal[diagonal + i], pivots[j * LANES + i]))
            for k in range(j + 1, K):
                at = (k * K + j) * LANES
                for i in range(LANES):
                    normal[at + i] *= normal[diagonal + i]
        for term in range(DAMPED):
            for j in range(K):
                subtract_products(v, j * LANES, normal, j * K * LANES, LANES, v, 0, LANES, j)
                for i in range(LANES):
                    v[j * LANES + i] *= normal[(j * K + j) * LANES + i]
            for j in range(K - 1, -1, -1):
                subtract_products(
                    v, j * LANES, normal, ((j + 1) * K + j) * LANES, K * LANES, v, (j + 1) * LANES, LANES, K - 1 - j
                )  # fmt: skip
                for i in range(LANES):
                    v[j * LANES + i] *= normal[(j * K + j) * LANES + i]
            for j in range(K):
                for i in range(LANES):
                    at = j * TILE + b + i
                    w[at] = v[j * LANES + i] if term == 0 else w[at] + v[j * LANES + i]
                    v[j * LANES + i] *= least2


@kernel
def _forward(rows, layer, arena, params, table, at, slopes, slopes_at):
    """A layer on a tile, in place at Y, with its slopes: dy / du = act'(v) (1 + gain)."""
    n, mode, act = layer[OUTPUTS], layer[MODE], layer[ACTIVATION]
    inputs, column = layer[INPUTS], at + layer[COLUMN]
    gemm(arena, layer[Y], rows, params, layer[WEIGHT], 1, n, arena, layer[X], rows, n, rows, inputs, False)
    for j in range(n):
        y = arena[layer[Y] + j * rows : layer[Y] + (j + 1) * rows]
        slope = slopes[slopes_at + j * rows : slopes_at + (j + 1) * rows]
        bias, gain, shift = params[layer[BIAS] + j], ONE, ZERO
        if mode == SCALED:
            gain, shift = ONE + table[column + j], table[column + n + j]
            for i in range(rows):
                y[i] = gain * (y[i] + bias) + shift
        elif mode == SHIFTED:
            shift = table[column + j]
            for i in range(rows):
                y[i] = (y[i] + bias) + shift
        else:
            for i in range(rows):
                y[i] = y[i] + bias
        if act == SILU:
            for i in range(rows):
                v = y[i]
                g = sigmoid(v)
                slope[i] = gain * (g * (ONE + v * (ONE - g)))
                y[i] = v * g
        elif act == LEAKY:
            for i in range(rows):
                v = y[i]
                s = ONE if v > ZERO else SLOPE
                slope[i] = gain * s
                y[i] = v if v > ZERO else SLOPE * v
        elif mode == SCALED:
            for i in range(rows):
                slope[i] = gain


@kernel
def backward_weights(layers, back, params, weights, product, spare):
    """Fill `weights` with those of the backward pass: each row of `back` is the product of a run of layers."""
    for k in range(len(back)):
        first, last = back[k, FIRST_LAYER], back[k, LAST_LAYER]
        n, m, at = layers[first, INPUTS], layers[first, OUTPUTS], layers[first, WEIGHT]
        product[: n * m] = params[at : at + n * m]
        for j in range(first + 1, last + 1):
            wide = layers[j, OUTPUTS]
            spare[: n * m] = product[: n * m]
            gemm(product, 0, wide, spare, 0, m, 1, params, layers[j, WEIGHT], wide, n, wide, m, False)
            m = wide
        weights[back[k, WEIGHTS] : back[k, WEIGHTS] + n * m] = product[: n * m]


@kernel
def _backward(rows, back, slopes, last, here, other, result):
    """result (WIDE of run 0, rows): `here` through the runs of layers last ... 1 and the slopes of run 0.

    `here` is changed. What is left of J^T are the weights of run 0: see `_first`.
    """
    for k in range(last, 0, -1):
        layer = back.runs[k]
        n, at = layer[WIDE] * rows, layer[SLOPES]
        if at >= 0:
            d, s = here[:n], slopes[at : at + n]
            for i in range(n):
                d[i] *= s[i]
        gemm(
            other, 0, rows, back.weights, layer[WEIGHTS], layer[WIDE], 1, here, 0, rows, layer[NARROW], rows,
            layer[WIDE], False,
        )  # fmt: skip
        here, other = other, here
    n, at = back.runs[0, WIDE] * rows, back.runs[0, SLOPES]
    d, to = here[:n], result[:n]
    if at >= 0:
        s = slopes[at : at + n]
        for i in range(n):
            to[i] = d[i] * s[i]
    else:
        to[:] = d


@kernel
def _first(rows, back, x, result):
    """result (D, rows): x (WIDE, rows) through the weights of run 0."""
    n, wide = back.runs[0, NARROW], back.runs[0, WIDE]
    gemm(result, 0, rows, back.weights, back.runs[0, WEIGHTS], wide, 1, x, 0, rows, n, rows, wide, False)


@kernel
def _unit_backward(rows, k, A, back, slopes, here, other, result):
    """`_backward` of the unit vectors of value k of what is told, one for every lane."""
    d, places, runs, count = A.d, A.places, A.runs, A.count
    final = len(back.runs) - 1
    if final == 0 or back.runs[final, SLOPES] >= 0:
        _row_of_A(rows, k, A, here)
        _backward(rows, back, slopes, final, here, other, result)
        return
    # W^T of a unit vector is a column of W.
    weights, weight, outputs = back.weights, back.runs[final, WEIGHTS], back.runs[final, WIDE]
    for e in range(back.runs[final, NARROW]):
        for c in range(count):
            place = places[k * TILE + runs[c, LANE]]
            value = weights[weight + e * outputs + place] if place < d else ZERO
            beginning = e * rows + runs[c, LANE]
            here[beginning : beginning + runs[c, COUNT]] = value
    _backward(rows, back, slopes, final - 1, here, other, result)


@kernel
def _chosen(A, back, chosen):
    """The rows (runs, m, WIDE) of the weights of run 0 at the places of each run, 0 where nothing is told."""
    m, d, places, runs, count = A.m, A.d, A.places, A.runs, A.count
    weight, wide = back.runs[0, WEIGHTS], back.runs[0, WIDE]
    for r in range(count):
        for j in range(m):
            place, to = places[j * TILE + runs[r, LANE]], (r * m + j) * wide
            if place < d:
                chosen[to : to + wide] = back.weights[weight + place * wide : weight + (place + 1) * wide]
            else:
                chosen[to : to + wide] = ZERO


@kernel
def _observed_rows(rows, x, A, back, chosen, whole, out):
    """out (m, TILE) = the rows that are told of x (WIDE, rows) through the weights of run 0.

    `chosen` has these rows of the weights, or where it is empty `whole` takes all values (D, rows).
    """
    m, d, places, runs, count = A.m, A.d, A.places, A.runs, A.count
    wide = back.runs[0, WIDE]
    if len(chosen) == 0:
        _first(rows, back, x, whole)
    for r in range(count):
        lane, lanes = runs[r, LANE], runs[r, COUNT]
        if len(chosen) > 0:
            gemm(out, lane, TILE, chosen, r * m * wide, wide, 1, x, lane, rows, m, lanes, wide, False)
            continue
        for j in range(m):
            place, to = places[j * TILE + lane], j * TILE + lane
            for i in range(lanes):
                out[to + i] = whole[place * rows + lane + i] if place < d else ZERO


@kernel
def _equations(k, K, p, q, gain, A, linear, seen, H):
    """Column k of H (m, K, TILE) from the rows that are told (m, TILE) of the product with J^T of value k.

    Of the mean of x0, that is p of the value itself, and q of the network and its `linear` part (D, D).
    """
    m, d, places, runs, count = A.m, A.d, A.places, A.runs, A.count
    for r in range(count):
        lane, lanes = runs[r, LANE], runs[r, COUNT]
        of = places[k * TILE + lane]
        for j in range(m):
            place, to, at = places[j * TILE + lane], (j * K + k) * TILE + lane, j * TILE + lane
            told = place < d and of < d
            own, more = p if told and place == of else ZERO, ZERO
            if told and len(linear) > 0:
                more = linear[place * d + of]
            for i in range(lanes):
                H[to + i] = gain * np.float64(own + q * (seen[at + i] + more))


@kernel
def _slope_of_places(rows, K, by_output, A, back, linear, pulled, w, f32, here, other, out):
    """out (D, rows): the sum over k of w[k] times the product with J^T of value k, for `pulled` (K, WIDE, rows).

    `by_output` is (p, q) with x0 = p x + q output; f32 (K, TILE) is room; `here` and `other` are changed.
    """
    d, places, (p, q) = A.d, A.places, by_output
    wide = back.runs[0, WIDE]
    other[: d * rows] = ZERO
    for k in range(K):
        for i in range(rows):
            f32[k * TILE + i] = np.float32(w[k * TILE + i])
            place = places[k * TILE + i]
            if place < d:
                other[place * rows + i] += f32[k * TILE + i]
    for e in range(wide):
        target = here[e * rows : (e + 1) * rows]
        target[:] = ZERO
        for k in range(K):
            factor, source = f32[k * TILE :][:rows], pulled[(k * wide + e) * rows :][:rows]
            for i in range(rows):
                target[i] += factor[i] * source[i]
    _first(rows, back, here, out)
    if len(linear) > 0:
        gemm(out, 0, rows, linear, 0, d, 1, other, 0, rows, d, rows, d, True)
    for i in range(d * rows):
        out[i] = p * other[i] + q * out[i]


@kernel
def _dense_part(net, step, scaled, B):
    """B (D, D), the linear part of the network at a timestep."""
    packed, rank, d, steps = net.linear, net.rank, net.layers[0, INPUTS], len(net.slots)
    gains = 2 * d * rank
    for i in range(d):
        for j in range(rank):
            scaled[i * rank + j] = packed[i * rank + j] * packed[gains + step * rank + j]
    gemm(B, 0, d, scaled, 0, rank, 1, packed, d * rank, d, d, d, rank, False)
    rest = gains + steps * rank
    if len(packed) > rest:
        for i in range(d):
            B[i * d + i] += packed[rest + step]


@kernel
def _observed(rows, A, x, f32, out):
    """out (m, TILE) = A x of every lane, for x (D, rows) in float32; f32 (m, TILE) is room."""
    m, d, matrix, places, runs, count = A
    if len(matrix) == 0:
        for j in range(m):
            for i in range(rows):
                at = places[j * TILE + i]
                out[j * TILE + i] = np.float64(x[at * rows + i]) if at < d else 0.0
        return
    for r in range(count):
        lane, lanes, of = runs[r, LANE], runs[r, COUNT], runs[r, OBSERVATION]
        gemm(f32, lane, TILE, matrix, of * m * d, d, 1, x, lane, rows, m, lanes, d, False)
    for j in range(m):
        for i in range(rows):
            out[j * TILE + i] = np.float64(f32[j * TILE + i])


@kernel
def _transposed(rows, A, q, q_at, f32, out):
    """out (D, rows) in float32 = A^T q of every lane, for q (m, TILE) from q_at on."""
    m, d, matrix, places, runs, count = A
    if len(matrix) == 0:
        out[: d * rows] = ZERO
        for j in range(m):
            for i in range(rows):
                at = places[j * TILE + i]
                if at < d:
                    out[at * rows + i] += np.float32(q[q_at + j * TILE + i])
        return
    for j in range(m):
        for i in range(rows):
            f32[j * TILE + i] = np.float32(q[q_at + j * TILE + i])
    for r in range(count):
        lane, lanes, of = runs[r, LANE], runs[r, COUNT], runs[r, OBSERVATION]
        gemm(out, lane, rows, matrix, of * m * d, 1, d, f32, lane, TILE, d, lanes, m, False)


@kernel
def _row_of_A(rows, k, A, out):
    """out (D, rows) in float32: row k of A of every lane."""
    m, d, matrix, places, runs, count = A
    out[: d * rows] = ZERO
    if len(matrix) == 0:
        for i in range(rows):
            at = places[k * TILE + i]
            if at < d:
                out[at * rows + i] = ONE
        return
    for r in range(count):
        lane, lanes, at = runs[r, LANE], runs[r, COUNT], (runs[r, OBSERVATION] * m + k) * d
        for f in range(d):
            out[f * rows + lane : f * rows + lane + lanes] = matrix[at + f]


@kernel
def _norms(m, rows, x, out):
    """Norms out (TILE) of the columns of x (m, TILE)."""
    for b in range(0, rows, LANES):
        out[b : b + LANES] = 0.0
        add_products(out, b, x, b, TILE, x, b, TILE, m)
        for i in range(b, b + LANES):
            out[i] = math.sqrt(out[i])


@kernel
def _orthogonalise(k, K, m, rows, basis, image, H, part, size, whole):
    """Arnoldi's step: column k of H, and vector k + 1 of the basis from the image of vector k, which is changed."""
    _norms(m, rows, image, whole)
    H_k = k * TILE
    for i in range((k + 1) * TILE):
        part[i] = 0.0
    for again in range(2):  # once is not enough in finite precision
        for b in range(0, rows, LANES):
            for j in range(k + 1):
                at = j * TILE + b
                part[at : at + LANES] = 0.0
                add_products(part, at, basis, j * m * TILE + b, TILE, image, b, TILE, m)
                to = (j * K) * TILE + H_k + b
                for i in range(LANES):
                    H[to + i] = part[at + i] if again == 0 else H[to + i] + part[at + i]
            for e in range(m):
                subtract_products(image, e * TILE + b, part, b, TILE, basis, e * TILE + b, m * TILE, k + 1)
    _norms(m, rows, image, size)
    to = (k + 1) * K * TILE + H_k
    for i in range(rows):
        H[to + i] = size[i]
        # Where nothing is left the answer is found: vectors of 0 add nothing to it.
        size[i] = 1.0 / max(size[i], TINY) if size[i] > KRYLOV_LEAST * whole[i] else 0.0
    for e in range(m):
        at = ((k + 1) * m + e) * TILE
        for i in range(rows):
            basis[at + i] = image[e * TILE + i] * size[i]


@kernel
def _normals(rows, A, law, room, out):
    """The noise out (D, rows) of a tile, whose runs say the rows of the law."""
    d, runs, z = A.d, A.runs, room.z
    blocks = (d + 3) // 4
    for r in range(A.count):
        lane, lanes, first = runs[r, LANE], runs[r, COUNT], np.uint64(runs[r, FIRST])
        together = CHUNK // lanes
        for block in range(0, blocks, together):
            some = min(together, blocks - block)
            draw(some * lanes, block, first, lanes, True, law.step, law.stream, law.keys, room.words, z)
            for quarter in range(4):
                for q in range(some):
                    f = block + q + quarter * blocks
                    if f < d:
                        to, at = f * rows + lane, quarter * QUARTER + q * lanes
                        out[to : to + lanes] = z[at : at + lanes]


@kernel
def chain_tmpd(start, stop, x, chain, net, back_pass, observations, law, room, arena, space):
    """All rows of a table on the tiles start ... stop - 1 of x (n, D), flat, with tmpd's guidance.

    A gain of 0 is a row whose state says nothing. State i is draw law.first_row + i.
    """
    net, back_pass = Network(*net), Back(*back_pass)
    law, room = Law(*law), Room(*room)
    layers, params, slots = net.layers, net.params, net.slots
    steps, numbers, depth, _, _ = chain
    back_layers, _, ends = back_pass
    gains, K, per, firsts, matrix, all_places, all_y, all_variance, all_reach, m = observations
    memory, deltas, f32, f64, places = space
    here, other, last_delta, first = deltas[0], deltas[1], deltas[2], np.int64(law.first_row)
    d = layers[0, INPUTS]
    n, last = len(x) // d, len(layers) - 1
    m1, m2, m3 = memory[0], memory[1], memory[2]
    observations = len(all_y) // m
    direct = m <= K
    of_places = direct and len(matrix) == 0
    inputs = K if direct else K + 1
    final, wide = len(back_layers) - 1, back_layers[0, WIDE]
    slope_count = ends[last + 1]
    # Rooms in the two buffers.
    slopes = f32[:slope_count]
    a = slope_count + K * max(d, wide) * TILE
    back = f32[slope_count:a]  # (K, D, rows), or before the weights of the first run
    noise = f32[a : a + d * TILE]
    seen = f32[a + d * TILE : a + (d + m) * TILE]
    a += (d + m) * TILE
    chosen, a = f32[a : a + d * wide], a + d * wide
    B = f32[a : a + d * d] if len(net.linear) > 0 else f32[:0]
    scaled = f32[a + d * d :]
    vectors = m * TILE
    y, variance, rest, image = (
        f64[:vectors],
        f64[vectors : 2 * vectors],
        f64[2 * vectors : 3 * vectors],
        f64[3 * vectors : 4 * vectors],
    )
    a = 4 * vectors
    H, a = f64[a : a + (K + 1) * K * TILE], a + (K + 1) * K * TILE
    normal, a = f64[a : a + K * K * LANES], a + K * K * LANES
    pivots, a = f64[a : a + K * LANES], a + K * LANES
    v, a = f64[a : a + K * LANES], a + K * LANES
    w, a = f64[a : a + K * TILE], a + K * TILE
    part, a = f64[a : a + (K + 1) * TILE], a + (K + 1) * TILE
    rhs, a = f64[a : a + (K + 1) * TILE], a + (K + 1) * TILE
    size, a = f64[a : a + TILE], a + TILE
    whole, a = f64[a : a + TILE], a + TILE
    reach, a = f64[a : a + TILE], a + TILE
    basis = f64[a:]
    runs = np.zeros((TILE, 4), np.int64)
    for tile in range(start, stop):
        begin = tile * TILE
        rows = min(TILE, n - begin)
        at = layers[0, X]
        for i in range(rows):
            for j in range(d):
                arena[at + j * rows + i] = x[(begin + i) * d + j]
        state = arena[at : at + d * rows]
        out = arena[layers[last, Y] : layers[last, Y] + d * rows]
        _forget(memory[:depth], d * rows)
        f64[:] = 0.0  # lanes that are not in use
        count, lane = 0, 0
        while lane < rows:
            of = 0 if observations == 1 else (first + begin + lane) // per
            k = (first + begin + lane) - of * per
            lanes = rows - lane if observations == 1 else min(rows - lane, per - k)
            runs[count, LANE], runs[count, COUNT] = lane, lanes
            runs[count, OBSERVATION], runs[count, FIRST] = of, firsts[of] + k
            reach[lane : lane + lanes] = all_reach[of]
            for j in range(m):
                for i in range(lane, lane + lanes):
                    y[j * TILE + i], variance[j * TILE + i] = all_y[of * m + j], all_variance[of * m + j]
                    if len(matrix) == 0:
                        places[j * TILE + i] = all_places[of * m + j]
            count += 1
            lane += lanes
        A = Matrices(m, d, matrix, places, runs, count)
        rows_of_weights = chosen[: count * m * wide if of_places and count * m <= d else 0]
        if len(rows_of_weights) > 0:
            _chosen(A, back_pass, rows_of_weights)
        for r in range(len(steps)):
            keep = 0
            if steps[r, EVALUATES]:
                keep, t = depth, steps[r, T]
                for k in range(last + 1):
                    _forward(rows, layers[k], arena, params, net.table, slots[t] * net.width, slopes, ends[k])
                if len(net.linear) > 0:
                    _dense_part(net, t, scaled, B)
                    gemm(out, 0, rows, B, 0, d, 1, state, 0, rows, d, rows, d, True)
                gain, p, q = gains[r, GAIN], np.float32(gains[r, P]), np.float32(gains[r, Q])
                if gain != 0.0:
                    for i in range(d * rows):
                        noise[i] = p * state[i] + q * out[i]
                    _observed(rows, A, noise, seen, image)
                    for j in range(m):
                        for i in range(rows):
                            rest[j * TILE + i] = y[j * TILE + i] - image[j * TILE + i]
                    if not direct:
                        _norms(m, rows, rest, size)
                        for i in range(rows):
                            rhs[i] = size[i]
                        for j in range(m):
                            for i in range(rows):
                                basis[j * TILE + i] = rest[j * TILE + i] / max(size[i], TINY)
                    for k in range(K):
                        if of_places:
                            result = back[k * wide * rows : (k + 1) * wide * rows]
                            _unit_backward(rows, k, A, back_pass, slopes, here, other, result)
                            _observed_rows(rows, result, A, back_pass, rows_of_weights, noise, seen)
                            _equations(k, K, p, q, gain, A, B, seen, H)
                            for i in range(rows):
                                H[(k * K + k) * TILE + i] += variance[k * TILE + i]
                            continue
                        result = back[k * d * rows : (k + 1) * d * rows]
                        cotangent = noise  # (D, rows); the noise is drawn later
                        if direct:
                            _row_of_A(rows, k, A, cotangent)
                        else:
                            _transposed(rows, A, basis, k * vectors, seen, cotangent)
                        here[: d * rows] = cotangent[: d * rows]
                        _backward(rows, back_pass, slopes, final, here, other, last_delta)
                        _first(rows, back_pass, last_delta, result)
                        if len(net.linear) > 0:
                            gemm(result, 0, rows, B, 0, d, 1, cotangent, 0, rows, d, rows, d, True)
                        for i in range(d * rows):
                            result[i] = p * cotangent[i] + q * result[i]
                        if direct:
                            _observed(rows, A, result, seen, image)
                            for j in range(m):
                                for i in range(rows):
                                    H[(j * K + k) * TILE + i] = gain * image[j * TILE + i]
                            for i in range(rows):
                                H[(k * K + k) * TILE + i] += variance[k * TILE + i]
                        else:
                            _observed(rows, A, result, seen, image)
                            for j in range(m):
                                for i in range(rows):
                                    e = j * TILE + i
                                    image[e] = gain * image[e] + variance[e] * basis[k * vectors + e]
                            _orthogonalise(k, K, m, rows, basis, image, H, part, size, whole)
                    damped(inputs, K, rows, H, rest if direct else rhs, gains[r, LEAST2], normal, pivots, v, w)
                    slope = noise
                    if of_places:
                        _slope_of_places(rows, K, (p, q), A, back_pass, B, back, w, seen, here, other, slope)
                    for k in range(0 if of_places else K):
                        for i in range(rows):
                            seen[i] = np.float32(w[k * TILE + i])
                        for f in range(d):
                            target, source = slope[f * rows :], back[(k * d + f) * rows :]
                            if k == 0:
                                for i in range(rows):
                                    target[i] = seen[i] * source[i]
                            else:
                                for i in range(rows):
                                    target[i] += seen[i] * source[i]
                    whole[:rows] = 0.0
                    for f in range(d):
                        for i in range(rows):
                            whole[i] += np.float64(slope[f * rows + i]) ** 2
                    for i in range(rows):
                        bound = min(gains[r, FARTHEST] * reach[i] / max(math.sqrt(whole[i]), TINY), 1.0)
                        seen[i] = np.float32(gains[r, TO_OUTPUT] * bound)
                    for f in range(d):
                        target, source = out[f * rows :], slope[f * rows :]
                        for i in range(rows):
                            target[i] += seen[i] * source[i]
            row = numbers[r]
            if row[S] != ZERO:
                _normals(rows, A, law_at(law, law.first_row, steps[r, STEP]), room, noise)
            apply_row(0, d * rows, state, out, m1, m2, m3, noise, 0, row, keep)
        for i in range(rows):
            for j in range(d):
                x[(begin + i) * d + j] = state[j * rows + i]
