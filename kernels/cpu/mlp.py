"""Multilayer perceptrons on tiles of samples that stay in cache: forward, backward, and a whole sampling chain.

A tile is at most TILE rows. Which operations run on a row, and in which order, depends on the layers alone, so a
row's bits do not depend on its tile. Gradients of the parameters are summed over a tile in the order of its rows
(by the matrix product), and over tiles in the order of the tiles (`gradient_tiles`).

Layers come as rows of an int64 table with the columns INPUTS ... Y; all numbers of a tile lie in one flat arena.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastdiff.backends.protocol import LEAKY_SLOPE
from fastdiff.kernels.cpu.elementary import sigmoid
from fastdiff.kernels.cpu.gemm import TILES, gemm, gemm_bias, host_width
from fastdiff.kernels.cpu.jit import atomic_load, atomic_store, atomic_take, kernel, part
from fastdiff.kernels.cpu.noise import CHUNK, QUARTER, SHIFT, Law, Room, _words, chunks_of, draw, draw_chunk, law_at
from fastdiff.kernels.cpu.step import S, apply_row
from fastdiff.kernels.cpu.transpose import transpose_into

TILE = 128
PATIENCE = 20_000  # looks at whose turn it is, some 20 ns each
CHAIN_TILE = 64  # stored feature by feature: rows of 128 samples would collide in the cache

# Columns of the layer table: widths, offsets of W and bias in the parameters, codes, first column in the time table,
# and where the tile's input, u = x W + bias and y = activation lie in the arena (u = y where u is not needed again).
INPUTS, OUTPUTS, WEIGHT, BIAS, ACTIVATION, MODE, COLUMN, X, U, Y = range(10)
LAYER_COLUMNS = 10
ACTIVATIONS = {"none": 0, "leaky_relu": 1, "silu": 2}
MODES = {"none": 0, "shift": 1, "scale_shift": 2}
# Columns of a chain's rows: the timestep, the step of the noise, and whether the network is needed.
T, STEP, EVALUATES = range(3)
LEAKY, SILU = 1, 2
SHIFTED, SCALED = 1, 2

F = np.float32
ZERO, ONE, TWO, SLOPE = F(0), F(1), F(2), F(LEAKY_SLOPE)
UNIT = np.ones(1, F)  # with distances 0 a matrix of ones, whose product is a sum
LANES = TILES[host_width()][0]


class Network(NamedTuple):
    """Layers with their weights, and W^T of each; the row of timestep t in the time table is slots[t].

    `linear` has the basis of the linear part, its transpose, the gains of all timesteps, and where the basis is not
    complete their rest; it is empty where there is none.
    """

    layers: Any
    params: Any
    transposed: Any
    table: Any
    width: int
    slots: Any
    linear: Any
    rank: int


class Asked(NamedTuple):
    """What is asked of all samples, flat, its columns, and the offset of their W.

    Besides room for TILE rows of the time table, the numbers 0 to TILE - 1, and how many of the columns, the last ones,
    are what is known.
    """

    values: Any
    columns: int
    weight: int
    room: Any
    own: Any
    known: int


class Chain(NamedTuple):
    """A sampler's table: T ... EVALUATES and the numbers of its rows, and how far back they reach.

    There may be weights of guidance, and levels at which what is known is held: one a row, else none.
    """

    steps: Any
    numbers: Any
    depth: int
    weights: Any
    levels: Any


class Turned(NamedTuple):
    """Room for a tile of `asked_chain_range`, feature by feature: what is asked, state, and guided output."""

    asked: Any
    state: Any
    output: Any


class Given(NamedTuple):
    """A batch with its targets, flat; dx takes the gradient of x."""

    x: Any
    targets: Any
    dx: Any


class Batch(NamedTuple):
    """Samples of a training step: rows of the data and timesteps, the tables of both (`_draw_tile`), how many there
    are, and what besides their numbers is the law of their noise."""

    data: Any
    indices: Any
    t: Any
    tables: Any
    size: int
    step: int
    stream: int
    keys: Any


class Sums(NamedTuple):
    """Gradients of W and bias, of rows of the time table, and the sum of squared errors: of a tile or of a batch."""

    grads: Any
    times: Any
    loss: Any


@kernel
def _modulate_activate(rows, layer, arena, params, times):
    """u = x W + bias and y = act((1 + gain) u + shift), in the arena, for the rows of a tile."""
    table, width, slots, t = times
    inputs, n, mode, act, column = layer[INPUTS], layer[OUTPUTS], layer[MODE], layer[ACTIVATION], layer[COLUMN]
    gemm_bias(
        arena, layer[U], n, arena, layer[X], inputs, 1, params, layer[WEIGHT], n, rows, n, inputs, params, layer[BIAS],
    )  # fmt: skip
    us, ys = arena[layer[U] : layer[U] + rows * n], arena[layer[Y] : layer[Y] + rows * n]
    # u and y are one place unless u is needed again (SiLU, or a gain): each loop below writes through one of the
    # two names only where they are, since the compiler does not vectorise over arrays that overlap.
    for i in range(rows if mode != 0 else 0):
        u, y = us[i * n : (i + 1) * n], ys[i * n : (i + 1) * n]
        at = slots[t[i]] * width + column
        if mode == SHIFTED:
            shift = table[at : at + n]
            if act == SILU:
                for j in range(n):
                    v = u[j] + shift[j]
                    y[j] = v * sigmoid(v)
            else:
                for j in range(n):
                    y[j] = y[j] + shift[j]
            continue
        gain, shift = table[at : at + n], table[at + n : at + 2 * n]
        if act == SILU:
            for j in range(n):
                v = (ONE + gain[j]) * u[j] + shift[j]
                y[j] = v * sigmoid(v)
        else:
            for j in range(n):
                y[j] = (ONE + gain[j]) * u[j] + shift[j]
    # Without rows where they are not needed: cutting out a row costs as much as what is done with it.
    if act == LEAKY:
        for i in range(rows * n):
            ys[i] *= ONE if ys[i] > ZERO else SLOPE
    elif act == SILU and mode == 0:
        for i in range(rows * n):
            ys[i] = us[i] * sigmoid(us[i])


@kernel
def _linear_part(rows, d, packed, rank, steps, x, x_at, y, y_at, add, arena, t):
    """y = B_t x of a tile's rows, or y += it; at the end of the arena there is room for TILE rows of x basis.

    Every array of an argument is a reference to count, so that here and below only those come that are used.
    """
    at, gains = len(arena) - TILE * rank, 2 * d * rank
    gemm(arena, at, rank, x, x_at, d, 1, packed, 0, rank, rows, rank, d, False)
    for i in range(rows):
        h, gain = arena[at + i * rank : at + (i + 1) * rank], packed[gains + t[i] * rank : gains + (t[i] + 1) * rank]
        for j in range(rank):
            h[j] *= gain[j]
    gemm(y, y_at, d, arena, at, rank, 1, packed, d * rank, d, rows, d, rank, add)
    rest = gains + steps * rank
    for i in range(rows if len(packed) > rest else 0):
        gain_of_rest = packed[rest + t[i]]
        source, target = x[x_at + i * d : x_at + (i + 1) * d], y[y_at + i * d : y_at + (i + 1) * d]
        for j in range(d):
            target[j] += gain_of_rest * source[j]


@kernel
def _linear_part_columns(rows, net, arena, step):
    """`_linear_part` added to a tile that is stored feature by feature and whose rows share a timestep."""
    packed, rank, d, steps = net.linear, net.rank, net.layers[0, INPUTS], len(net.slots)
    x_at, y_at = net.layers[0, X], net.layers[-1, Y]
    at, gains = len(arena) - TILE * rank, 2 * d * rank
    gemm(arena, at, rows, packed, 0, 1, rank, arena, x_at, rows, rank, rows, d, False)
    for j in range(rank):
        h, gain = arena[at + j * rows : at + (j + 1) * rows], packed[gains + step * rank + j]
        for i in range(rows):
            h[i] *= gain
    gemm(arena, y_at, rows, packed, d * rank, 1, d, arena, at, rows, d, rows, rank, True)
    rest = gains + steps * rank
    if len(packed) > rest:
        gain_of_rest = packed[rest + step]
        source, target = arena[x_at : x_at + d * rows], arena[y_at : y_at + d * rows]
        for i in range(d * rows):
            target[i] += gain_of_rest * source[i]


@kernel
def _times(rows, first, asked, params, table, width, slots, t):
    """Where a tile's rows of the time table are: (table, width, slots, places); that of row i is slots[places[i]].

    They are those of their timesteps, plus what is asked times W where anything is.
    """
    if asked.columns == 0:  # first: every array taken out of a tuple is a reference to count
        return table, width, slots, t
    values, columns, weight, room, own, _ = asked
    gemm(room, 0, width, values, first * columns, columns, 1, params, weight, width, rows, width, columns, False)
    for i in range(rows):
        at = slots[t[i]] * width
        source, row = table[at : at + width], room[i * width : (i + 1) * width]
        for j in range(width):
            row[j] = source[j] + row[j]
    return room, width, own, own[:rows]


@kernel
def forward_tile(rows, layers, params, linear, rank, steps, arena, times, t):
    """Run the layers on the tile's input at arena[layers[0, X]]; the output is at arena[layers[-1, Y]].

    `times` is what `_times` returns. The linear part is added where it is not empty; it has gains of so many `steps`.
    """
    for k in range(len(layers)):
        _modulate_activate(rows, layers[k], arena, params, times)
    if len(linear) > 0:
        at, to = layers[0, X], layers[-1, Y]
        _linear_part(rows, layers[0, INPUTS], linear, rank, steps, arena, at, arena, to, True, arena, t)


@kernel
def _copy(target, source, count):
    for i in range(count):
        target[i] = source[i]


@kernel
def forward_range(start, stop, x, y, t, net, asked, arena):
    """Tiles start ... stop - 1 of a network's forward pass; x and y are flat."""
    net, asked = Network(*net), Asked(*asked)
    layers, params, _, table, width, slots, linear, rank = net
    d, e, n = layers[0, INPUTS], layers[-1, OUTPUTS], len(t)
    for tile in range(start, stop):
        begin = tile * TILE
        rows = min(TILE, n - begin)
        _copy(arena[layers[0, X] :], x[begin * d :], rows * d)
        times = t[begin : begin + rows]
        own = _times(rows, begin, asked, params, table, width, slots, times)
        forward_tile(rows, layers, params, linear, rank, len(slots), arena, own, times)
        _copy(y[begin * e :], arena[layers[-1, Y] :], rows * e)


@kernel
def _forget(memory, count):
    for m in memory:
        m[:count] = ZERO


@kernel
def _hold(rows, first, d, x, level, asked):
    """Change what is known of a tile's rows x, flat, to `level` times the known values."""
    values, columns = asked.values, asked.columns
    for i in range(rows):
        known = values[(first + i) * columns + columns - 2 * d : (first + i + 1) * columns]
        for j in range(d):
            if known[d + j] != ZERO:
                x[i * d + j] = level * known[j]


@kernel
def chain_few(x, chain, net, asked, law, room, arena, memory, t):
    """All rows of a sampler's table on at most TILE samples x (n, D), flat, sample by sample.

    Where the chain has levels, what is known is held. The law is that of the first row, at any step.
    """
    net, asked, law, room = Network(*net), Asked(*asked), Law(*law), Room(*room)
    layers, params, _, table, width, slots, linear, rank = net
    z, segments = room.z, room.segments
    steps, numbers, depth, _, levels = chain
    d = layers[0, INPUTS]
    rows = len(x) // d
    m1, m2, m3 = memory[0], memory[1], memory[2]
    _forget(memory[:depth], rows * d)
    out = arena[layers[-1, Y] : layers[-1, Y] + rows * d]
    for r in range(len(steps)):
        keep = 0
        if steps[r, EVALUATES]:
            keep = depth
            t[:rows] = steps[r, T]
            if len(levels) > 0:
                _hold(rows, 0, d, x, levels[r], asked)
            _copy(arena[layers[0, X] :], x, rows * d)
            own = _times(rows, 0, asked, params, table, width, slots, t[:rows])
            forward_tile(rows, layers, params, linear, rank, len(slots), arena, own, t[:rows])
        row = numbers[r]
        if row[S] == ZERO:
            apply_row(0, rows * d, x, out, m1, m2, m3, z, 0, row, keep)
            continue
        here = law_at(law, law.first_row, steps[r, STEP])
        for chunk in range(chunks_of(rows, d)):
            for k in range(draw_chunk(chunk, rows, d, here, room)):
                a, length, at = segments[k]
                apply_row(a, a + length, x, out, m1, m2, m3, z, at, row, keep)


@kernel
def _modulate_activate_columns(rows, layer, arena, params, table, at):
    """`_modulate_activate` in place at Y, for a tile that is stored feature by feature and whose rows share a timestep.

    `at` is where the timestep's row of the time table begins.
    """
    n, mode, act = layer[OUTPUTS], layer[MODE], layer[ACTIVATION]
    at += layer[COLUMN]
    for j in range(n):
        y = arena[layer[Y] + j * rows : layer[Y] + (j + 1) * rows]
        bias = params[layer[BIAS] + j]
        if mode == SCALED:
            gain, shift = ONE + table[at + j], table[at + n + j]
            if act == SILU:
                for i in range(rows):
                    v = gain * (y[i] + bias) + shift
                    y[i] = v * sigmoid(v)
                continue
            for i in range(rows):
                y[i] = gain * (y[i] + bias) + shift
        elif mode == SHIFTED:
            shift = table[at + j]
            for i in range(rows):
                y[i] = (y[i] + bias) + shift
        else:
            for i in range(rows):
                y[i] = y[i] + bias
        if act == SILU:
            for i in range(rows):
                y[i] = y[i] * sigmoid(y[i])
        elif act == LEAKY:
            for i in range(rows):
                y[i] = y[i] if y[i] > ZERO else SLOPE * y[i]


@kernel
def chain_range(start, stop, x, chain, net, law, room, arena, memory):
    """All rows of a sampler's table on the tiles start ... stop - 1 of x (n, D), flat, with the bits of `chain_few`.

    A tile is stored feature by feature, so the samples are the vector lanes: no lane is wasted whatever the widths of
    the layers, and noise is drawn in the order in which it is used. A tile is turned once before the chain and once
    after it.
    """
    net, law, room = Network(*net), Law(*law), Room(*room)
    layers, params, table, slots = net.layers, net.params, net.table, net.slots
    steps, numbers, depth, _, _ = chain
    d = layers[0, INPUTS]
    n = len(x) // d
    kept = memory[0], memory[1], memory[2]
    for tile in range(start, stop):
        begin = tile * CHAIN_TILE
        rows = min(CHAIN_TILE, n - begin)
        at = layers[0, X]
        for i in range(rows):
            for j in range(d):
                arena[at + j * rows + i] = x[(begin + i) * d + j]
        state = arena[at : at + d * rows]
        out = arena[layers[-1, Y] : layers[-1, Y] + d * rows]
        _forget(memory[:depth], d * rows)
        first = law.first_row + np.uint64(begin)
        for r in range(len(steps)):
            keep = 0
            if steps[r, EVALUATES]:
                keep, t = depth, steps[r, T]
                for k in range(len(layers)):
                    layer = layers[k]
                    inputs, outputs = layer[INPUTS], layer[OUTPUTS]
                    gemm(
                        arena, layer[Y], rows, params, layer[WEIGHT], 1, outputs, arena, layer[X], rows,
                        outputs, rows, inputs, False,
                    )  # fmt: skip
                    _modulate_activate_columns(rows, layer, arena, params, table, slots[t] * net.width)
                if len(net.linear) > 0:
                    _linear_part_columns(rows, net, arena, t)
            here = law_at(law, first, steps[r, STEP])
            _apply_columns(rows, d, state, out, kept, numbers[r], keep, here, room)
        for i in range(rows):
            for j in range(d):
                x[(begin + i) * d + j] = state[j * rows + i]


@kernel
def _apply_columns(rows, d, state, out, memory, row, keep, law, room):
    """A row of a table on a tile that is stored feature by feature; `memory` is m1, m2 and m3."""
    z, (m1, m2, m3) = room.z, memory
    if row[S] == ZERO:
        apply_row(0, d * rows, state, out, m1, m2, m3, z, 0, row, keep)
        return
    blocks = (d + 3) // 4
    together = CHUNK // rows  # blocks of all rows that are drawn at once
    for block in range(0, blocks, together):
        count = min(together, blocks - block)
        draw(count * rows, block, law.first_row, rows, True, law.step, law.stream, law.keys, room.words, z)
        for quarter in range(4):
            a = (block + quarter * blocks) * rows
            b = min(a + count * rows, d * rows)
            apply_row(a, b, state, out, m1, m2, m3, z, quarter * QUARTER, row, keep)


@kernel
def _modulate_activate_asked(lanes, layer, arena, params, table, at, room):
    """`_modulate_activate_columns` where `room` (time_width, lanes) has what is asked times W."""
    n, column = layer[OUTPUTS], layer[COLUMN]
    for j in range(n):
        y = arena[layer[Y] + j * lanes : layer[Y] + (j + 1) * lanes]
        bias = params[layer[BIAS] + j]
        if layer[MODE] != SCALED:
            for i in range(lanes):
                y[i] = y[i] + bias
            continue
        gain, shift = table[at + column + j], table[at + column + n + j]
        gains = room[(column + j) * lanes : (column + j + 1) * lanes]
        shifts = room[(column + n + j) * lanes : (column + n + j + 1) * lanes]
        for i in range(lanes):
            v = (ONE + (gain + gains[i])) * (y[i] + bias) + (shift + shifts[i])
            y[i] = v * sigmoid(v)


@kernel
def asked_chain_range(start, stop, x, chain, net, asked, law, room, arena, memory, turned):
    """`chain_range` of a network that is asked for something, guided where the chain has weights.

    Samples of a guided tile come twice, asked and not, side by side in the lanes: half as many samples, and every row
    of a table whose weight is not 1 takes u + w (c - u). What is known is told to both, and where the chain has levels,
    it is held.
    """
    net, law, room, turned = Network(*net), Law(*law), Room(*room), Turned(*turned)
    values, columns, weight, times, _, known = asked
    layers, params, table, width, slots = net.layers, net.params, net.table, net.width, net.slots
    steps, numbers, depth, weights, levels = chain
    d = layers[0, INPUTS]
    n = len(x) // d
    kept = memory[0], memory[1], memory[2]
    size = CHAIN_TILE // 2 if len(weights) > 0 else CHAIN_TILE
    for tile in range(start, stop):
        begin = tile * size
        rows = min(size, n - begin)
        for i in range(rows):
            for j in range(d):
                turned.state[j * rows + i] = x[(begin + i) * d + j]
        # Of lanes with their neighbours that are not asked, and alone.
        double = 2 * rows if len(weights) > 0 else 0
        alone, beside = times[: rows * width], times[rows * width : (rows + double) * width]
        for lanes in (rows, double):
            for j in range(columns if lanes > 0 else 0):
                for i in range(rows):
                    turned.asked[j * lanes + i] = values[(begin + i) * columns + j]
                for i in range(rows, lanes):
                    value = values[(begin + i - rows) * columns + j]
                    turned.asked[j * lanes + i] = value if j >= columns - known else ZERO
            if lanes > 0:
                to = alone if lanes == rows else beside
                gemm(to, 0, lanes, params, weight, 1, width, turned.asked, 0, lanes, width, lanes, columns, False)
        state = turned.state[: d * rows]
        _forget(memory[:depth], d * rows)
        first = law.first_row + np.uint64(begin)
        out = turned.output[: d * rows]
        for r in range(len(steps)):
            keep = 0
            if steps[r, EVALUATES]:
                keep, t = depth, steps[r, T]
                both = len(weights) > 0 and weights[r] != ONE
                lanes = 2 * rows if both else rows
                for i in range(rows if len(levels) > 0 else 0):
                    of_row = values[(begin + i + 1) * columns - known : (begin + i + 1) * columns]
                    for j in range(d):
                        if of_row[d + j] != ZERO:
                            state[j * rows + i] = levels[r] * of_row[j]
                for j in range(d):
                    for half in range(lanes // rows):
                        _copy(arena[layers[0, X] + j * lanes + half * rows :], state[j * rows :], rows)
                for k in range(len(layers)):
                    layer = layers[k]
                    inputs, outputs = layer[INPUTS], layer[OUTPUTS]
                    gemm(
                        arena, layer[Y], lanes, params, layer[WEIGHT], 1, outputs, arena, layer[X], lanes,
                        outputs, lanes, inputs, False,
                    )  # fmt: skip
                    asked_here = beside if both else alone
                    _modulate_activate_asked(lanes, layer, arena, params, table, slots[t] * width, asked_here)
                y = layers[-1, Y]
                if len(net.linear) > 0:
                    _linear_part_columns(lanes, net, arena, t)
                if both:
                    for j in range(d):
                        c, u = arena[y + j * lanes : y + j * lanes + rows], arena[y + j * lanes + rows :]
                        to = out[j * rows : (j + 1) * rows]
                        for i in range(rows):
                            to[i] = (c[i] - u[i]) * weights[r] + u[i]
                else:
                    _copy(out, arena[y:], d * rows)
            here = law_at(law, first, steps[r, STEP])
            _apply_columns(rows, d, state, out, kept, numbers[r], keep, here, room)
        for i in range(rows):
            for j in range(d):
                x[(begin + i) * d + j] = state[j * rows + i]


@kernel
def scaled_words(out, bound, step, stream, keys, words):
    """out[i] = (w0 bound) >> 32 with the word of row i: timesteps and batch rows of the noise law."""
    factor = np.uint64(bound)
    for begin in range(0, len(out), CHUNK):
        count = min(CHUNK, len(out) - begin)
        _words(count, 0, np.uint64(begin), CHUNK, True, step, stream, keys, words)
        for i in range(count):
            out[begin + i] = np.int64((np.uint64(words[0, i]) * factor) >> SHIFT)


@kernel
def number_slots(t, slots, used):
    """Number the timesteps that occur in t, in rising order: slots[t] is the number, used[number] is t."""
    slots[:] = -1
    for i in range(len(t)):
        slots[t[i]] = 0
    count = 0
    for step in range(len(slots)):
        if slots[step] == 0:
            slots[step] = count
            used[count] = step
            count += 1
    return count


@kernel
def time_table(count, used, features, rows, params, weight, bias, width, table):
    """Time table rows of the timesteps used[:count]: features W + bias; `rows` gets their features, in order."""
    n = features.shape[1]
    for i in range(count):
        _copy(rows[i * n :], features[used[i]], n)
        _copy(table[i * width :], params[bias:], width)
    gemm(table, 0, width, rows, 0, n, 1, params, weight, width, count, width, n, True)


@kernel
def time_table_backward(count, rows, features, dtable, width, grads, weight, bias):
    """Gradients of W and bias of `time_table`."""
    gemm(grads, weight, width, rows, 0, 1, features, dtable, 0, width, features, width, count, False)
    sums = grads[bias : bias + width]
    sums[:] = ZERO
    for i in range(count):
        row = dtable[i * width : (i + 1) * width]
        for j in range(width):
            sums[j] += row[j]


@kernel
def transpose_weights(layers, params, transposed):
    """W^T of every layer, at the offset of W."""
    for k in range(len(layers)):
        n, m, at = layers[k, INPUTS], layers[k, OUTPUTS], layers[k, WEIGHT]
        transpose_into(params[at : at + n * m], transposed[at : at + n * m], n, m, False)


@kernel
def _gradient_place(layer, width, dtime, other):
    """Where the gradient of a layer's output belongs: in `dtime` itself where a shift is all that this has."""
    return dtime if layer[MODE] == SHIFTED and layer[OUTPUTS] == width else other


@kernel
def _layer_backward(rows, layer, arena, dy, times, dtime, partial):
    """dy becomes du, in place; fills the tile's rows of dtime, and the bias gradient in `partial`."""
    table, width, slots, t = times
    n, mode, act, column = layer[OUTPUTS], layer[MODE], layer[ACTIVATION], layer[COLUMN]
    us, ys = arena[layer[U] : layer[U] + rows * n], arena[layer[Y] : layer[Y] + rows * n]
    if act == LEAKY:
        for i in range(rows * n):
            dy[i] *= ONE if ys[i] > ZERO else SLOPE
    for i in range(rows if mode != 0 or act == SILU else 0):
        u, d = us[i * n : (i + 1) * n], dy[i * n : (i + 1) * n]
        at, to = slots[t[i]] * width + column, i * width + column
        if act == SILU:
            gain, shift = table[at : at + n], table[at + n : at + 2 * n]
            for j in range(n):
                v = u[j]
                if mode == SCALED:
                    v = (ONE + gain[j]) * v + shift[j]
                elif mode == SHIFTED:
                    v = v + gain[j]
                g = sigmoid(v)
                d[j] = d[j] * g * (ONE + v * (ONE - g))
        if mode == SCALED:
            gain = table[at : at + n]
            dgain, dshift = dtime[to : to + n], dtime[to + n : to + 2 * n]
            for j in range(n):
                dgain[j] = d[j] * u[j]
                dshift[j] = d[j]
            for j in range(n):
                d[j] = d[j] * (ONE + gain[j])
        elif mode == SHIFTED and n < width:
            dshift = dtime[to : to + n]
            for j in range(n):
                dshift[j] = d[j]
    gemm(partial, layer[BIAS], n, UNIT, 0, 0, 0, dy, 0, n, 1, n, rows, False)


@kernel
def _times_slope(rows, layer, arena, d, times):
    """d (rows, outputs) times dy / du = act'(v) (1 + gain) of a layer that has run on the tile."""
    table, width, slots, t = times
    n, mode, act, column = layer[OUTPUTS], layer[MODE], layer[ACTIVATION], layer[COLUMN]
    us, ys = arena[layer[U] : layer[U] + rows * n], arena[layer[Y] : layer[Y] + rows * n]
    if act == LEAKY:
        for i in range(rows * n):
            d[i] *= ONE if ys[i] > ZERO else SLOPE
    for i in range(rows if mode == SCALED or act == SILU else 0):
        u, row = us[i * n : (i + 1) * n], d[i * n : (i + 1) * n]
        at = slots[t[i]] * width + column
        gain, shift = table[at : at + n], table[at + n : at + 2 * n]
        if act == SILU:
            for j in range(n):
                v = u[j]
                if mode == SCALED:
                    v = (ONE + gain[j]) * v + shift[j]
                elif mode == SHIFTED:
                    v = v + gain[j]
                g = sigmoid(v)
                row[j] = row[j] * g * (ONE + v * (ONE - g))
        if mode == SCALED:
            for j in range(n):
                row[j] = row[j] * (ONE + gain[j])


@kernel
def vjp_range(start, stop, x, t, dy, dx, y, net, asked, arena, deltas):
    """Tiles start ... stop - 1: dx = J^T dy, the layers running once for all dy (k, n, outputs) of a tile.

    Everything is flat; y takes the output, unless it is empty.
    """
    net, asked = Network(*net), Asked(*asked)
    layers, params, transposed, table, width, slots, linear, rank = net
    steps, none, d_in, d_out = len(slots), linear[:0], deltas[0], deltas[1]
    d, e, n = layers[0, INPUTS], layers[-1, OUTPUTS], len(t)
    for tile in range(start, stop):
        begin = tile * TILE
        rows = min(TILE, n - begin)
        times = t[begin : begin + rows]
        _copy(arena[layers[0, X] :], x[begin * d :], rows * d)
        own = _times(rows, begin, asked, params, table, width, slots, times)
        forward_tile(rows, layers, params, none, 0, steps, arena, own, times)
        if len(y) > 0:
            _copy(y[begin * e :], arena[layers[-1, Y] :], rows * e)
            if len(linear) > 0:
                _linear_part(rows, d, linear, rank, steps, x, begin * d, y, begin * e, True, arena, times)
        for first in range(begin, len(dx) // d, n):
            here, other = d_in, d_out
            _copy(here, dy[first * e :], rows * e)
            for k in range(len(layers) - 1, -1, -1):
                inputs, outputs = layers[k, INPUTS], layers[k, OUTPUTS]
                _times_slope(rows, layers[k], arena, here, own)
                gemm(
                    other, 0, inputs, here, 0, outputs, 1, transposed, layers[k, WEIGHT], inputs, rows, inputs,
                    outputs, False,
                )  # fmt: skip
                here, other = other, here
            _copy(dx[first * d :], here, rows * d)
            if len(linear) > 0:
                _linear_part(rows, d, linear, rank, steps, dy, first * d, dx, first * d, True, arena, times)


@kernel
def jvp_range(start, stop, x, t, dx, dy, net, asked, arena, deltas):
    """Tiles start ... stop - 1: dy = J dx, the layers running once for all dx (k, n, inputs) of a tile."""
    net, asked = Network(*net), Asked(*asked)
    layers, params, _, table, width, slots, linear, rank = net
    steps, none, d_in, d_out = len(slots), linear[:0], deltas[0], deltas[1]
    d, e, n = layers[0, INPUTS], layers[-1, OUTPUTS], len(t)
    for tile in range(start, stop):
        begin = tile * TILE
        rows = min(TILE, n - begin)
        times = t[begin : begin + rows]
        _copy(arena[layers[0, X] :], x[begin * d :], rows * d)
        own = _times(rows, begin, asked, params, table, width, slots, times)
        forward_tile(rows, layers, params, none, 0, steps, arena, own, times)
        for first in range(begin, len(dx) // d, n):
            here, other = d_in, d_out
            _copy(here, dx[first * d :], rows * d)
            for k in range(len(layers)):
                inputs, outputs = layers[k, INPUTS], layers[k, OUTPUTS]
                gemm(
                    other, 0, outputs, here, 0, inputs, 1, params, layers[k, WEIGHT], outputs, rows, outputs,
                    inputs, False,
                )  # fmt: skip
                _times_slope(rows, layers[k], arena, other, own)
                here, other = other, here
            _copy(dy[first * e :], here, rows * e)
            if len(linear) > 0:
                _linear_part(rows, d, linear, rank, steps, dx, first * d, dy, first * d, True, arena, times)


@kernel
def _weight_gradient(rows, layer, arena, dy, partial, spare):
    """W's gradient, x^T dy, into `partial`.

    Columns beyond the last whole vector would cost every row a vector. Where it is less work they are the rows of
    dy^T x instead, of the same bits.
    """
    n, m, at = layer[INPUTS], layer[OUTPUTS], layer[WEIGHT]
    rest = m % LANES
    if 4 * rest * ((n + LANES - 1) // LANES) > 3 * n:
        rest = 0
    gemm(partial, at, m, arena, layer[X], 1, n, dy, 0, m, n, m - rest, rows, False)
    gemm(spare, 0, n, dy, m - rest, 1, m, arena, layer[X], n, rest, n, rows, False)
    for j in range(rest):
        column, row = partial[at + m - rest + j :], spare[j * n : (j + 1) * n]
        for i in range(n):
            column[i * m] = row[i]


@kernel
def _draw_tile(begin, rows, d, batch, x, target, room):
    """Draw a tile's noise; x = signal x0 + noise eps, target = target_noise eps + target_data x0.

    Rows of data with more than d values have behind x0 what is added to the target.
    """
    data, indices, t, tables, z = batch.data, batch.indices, batch.t, batch.tables, room.z
    masked = data.shape[1] > d
    law = Law(np.uint64(begin), batch.step, batch.stream, batch.keys)
    for chunk in range(chunks_of(rows, d)):
        for k in range(draw_chunk(chunk, rows, d, law, room)):
            at, length, source = room.segments[k]
            end = at + length
            while at < end:
                i = at // d
                count = min(end, (i + 1) * d) - at
                first = at - i * d
                s = t[begin + i]
                signal, noise, of_noise, of_data = tables[0, s], tables[1, s], tables[2, s], tables[3, s]
                x0, eps = data[indices[begin + i], first : first + count], z[source : source + count]
                noisy, wanted = x[at : at + count], target[at : at + count]
                for j in range(count):
                    noisy[j] = signal * x0[j] + noise * eps[j]
                    wanted[j] = of_noise * eps[j] + of_data * x0[j]
                if masked:
                    hidden = data[indices[begin + i], d + first : d + first + count]
                    for j in range(count):
                        wanted[j] += hidden[j]
                at += count
                source += count


@part
def gradient_tile(tile, drawn, given, batch, net, asked, sums, room, arena, deltas):
    """One tile of a training step: draws, forward, loss, backward.

    The batch is `drawn`, or it is given at the timesteps batch.t. The sums become those of the tile. A fifth table,
    where there is one, weights a row's squared errors by its timestep.
    """
    layers, width, tables = net.layers, net.width, batch.tables
    partial, dtime, loss = sums
    target, d_in, d_out = deltas[0], deltas[1], deltas[2]
    d, e = layers[0, INPUTS], layers[-1, OUTPUTS]
    scale = TWO / F(batch.size * e)
    loss[0] = 0.0
    begin = tile * TILE
    rows = min(TILE, batch.size - begin)
    at = layers[0, X]
    if drawn:
        _draw_tile(begin, rows, d, batch, arena[at:], target, room)
    else:
        _copy(arena[at:], given.x[begin * d :], rows * d)
        _copy(target, given.targets[begin * e :], rows * e)
    times = batch.t[begin : begin + rows]
    for i in range(rows if asked.known > 0 and drawn else 0):
        known = asked.values[(begin + i + 1) * asked.columns - 2 * d : (begin + i + 1) * asked.columns]
        for j in range(d):
            if known[d + j] != ZERO:
                arena[at + i * d + j] = tables[0, times[i]] * known[j]
                target[i * d + j] = np.nan
    own = _times(rows, begin, asked, net.params, net.table, width, net.slots, times)
    forward_tile(rows, layers, net.params, net.linear, net.rank, len(net.slots), arena, own, times)

    # The gradient of layer k's output is in d_in where k is even, else in d_out, or in dtime.
    last = len(layers) - 1
    dy = _gradient_place(layers[last], width, dtime, d_out if last % 2 else d_in)
    y, squares, sums = arena[layers[last, Y] :], target, d_in if last % 2 else d_out
    for i in range(rows * e):
        difference = y[i] - target[i] if target[i] == target[i] else ZERO  # NaN: it has not been seen
        dy[i] = difference * scale
        squares[i] = difference * difference
    for i in range(rows if len(tables) > 4 else 0):
        weight, slopes, errors = tables[4, times[i]], dy[i * e : (i + 1) * e], squares[i * e : (i + 1) * e]
        for j in range(e):
            slopes[j] *= weight
            errors[j] *= weight
    if not drawn and len(net.linear) > 0:
        _linear_part(rows, d, net.linear, net.rank, len(net.slots), dy, 0, given.dx, begin * d, False, arena, times)
    gemm(sums, 0, e, UNIT, 0, 0, 0, squares, 0, e, 1, e, rows, False)
    for j in range(e):
        loss[0] += np.float64(sums[j])

    for k in range(last, -1, -1):
        layer, spare = layers[k], d_in if k % 2 else d_out
        n, m = layer[INPUTS], layer[OUTPUTS]
        _layer_backward(rows, layer, arena, dy, own, dtime, partial)
        _weight_gradient(rows, layer, arena, dy, partial, spare)
        if k > 0 or not drawn:
            dnext = _gradient_place(layers[k - 1], width, dtime, spare) if k > 0 else spare
            gemm(dnext, 0, n, dy, 0, m, 1, net.transposed, layer[WEIGHT], n, rows, n, m, False)
            dy = dnext
    columns = asked.columns
    if columns > 0:
        gemm(
            partial, asked.weight, width, asked.values, begin * columns, 1, columns, dtime, 0, width, columns, width,
            rows, False,
        )  # fmt: skip
    if not drawn:
        to = given.dx[begin * d : (begin + rows) * d]
        if len(net.linear) > 0:
            for i in range(rows * d):
                to[i] += dy[i]
        else:
            _copy(to, dy, rows * d)


@part
def collect_tile(add, grads, partial, dtime, t, slots, dtable, width):
    """grads += partial where `add`, and dtable[slots[t[i]]] += dtime[i] in the order of i."""
    if add:
        for j in range(len(grads)):
            grads[j] += partial[j]
    if width == 0:
        return
    for i in range(len(t)):
        at = slots[t[i]] * width
        source, target = dtime[i * width : (i + 1) * width], dtable[at : at + width]
        for j in range(width):
            target[j] += source[j]


@kernel
def gradient_tiles(held, turns, drawn, given, batch, net, asked, total, sums, room, arena, deltas):
    """Tiles of a training step, one after another until none is left; returns -1.

    Threads that run this at once share turns [tile to take next, tile to add next], and `total`. A tile's sums are
    added to it when all before them are. Where that takes long, perhaps because the thread that has them waits for a
    core, the tile's number is returned: call again with it as `held`, else -1. A negative turns[1] ends all.
    """
    given, batch, net, asked = Given(*given), Batch(*batch), Network(*net), Asked(*asked)
    total, sums, room = Sums(*total), Sums(*sums), Room(*room)
    tiles = (batch.size + TILE - 1) // TILE
    while True:
        if held < 0:
            held = atomic_take(turns, 0)
            if held >= tiles:
                return -1
            here = Sums(sums.grads if held > 0 else total.grads, sums.times, sums.loss)  # tile 0 needs no sum
            gradient_tile(held, drawn, given, batch, net, asked, here, room, arena, deltas)
        patience = PATIENCE
        while atomic_load(turns, 1) != held:
            patience -= 1
            if atomic_load(turns, 1) < 0:
                return -1
            if patience == 0:
                return held
        times = batch.t[held * TILE : min((held + 1) * TILE, batch.size)]
        collect_tile(held > 0, total.grads, sums.grads, sums.times, times, net.slots, total.times, net.width)
        total.loss[0] += sums.loss[0]
        atomic_store(turns, 1, held + 1)
        held = -1


@kernel
def gradient_share(start, stop, first, nothing, batch, net, asked, sums, room, arena, deltas):
    """Tiles first + start ... first + stop - 1 of a training step, each of which keeps its sums for itself."""
    batch, net, asked, room = Batch(*batch), Network(*net), Asked(*asked), Room(*room)
    nothing, sums = Given(*nothing), Sums(*sums)
    for at in range(start, stop):
        here = Sums(sums.grads[at], sums.times[at], sums.loss[at : at + 1])
        gradient_tile(first + at, True, nothing, batch, net, asked, here, room, arena, deltas)


@kernel
def collect_times(dtime, t, slots, dtable, width):
    """dtable[slots[t[i]]] += dtime[i] in the order of i."""
    collect_tile(False, dtable, dtable, dtime, t, slots, dtable, width)
