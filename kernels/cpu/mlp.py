"""Multilayer perceptrons on tiles of samples that stay in cache: forward, backward, and a whole sampling chain.

A tile is at most TILE rows. Which operations run on a row, and in which order, depends on the layers alone, so a
row's bits do not depend on its tile. Gradients of the parameters are summed over a tile in the order of its rows
(by the matrix product), and over tiles in the order of the tiles (`add_partials`).

Layers come as rows of an int64 table with the columns INPUTS ... Y; all numbers of a tile lie in one flat arena.
"""

from __future__ import annotations

import numpy as np

from fastdiff.backends import LEAKY_SLOPE
from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import bits_float, kernel
from fastdiff.kernels.cpu.noise import CHUNK, QUARTER, SHIFT, _words, chunks_of, draw, draw_chunk
from fastdiff.kernels.cpu.step import apply_row

TILE = 128
COLUMNS = 64  # samples of a tile that is stored feature by feature: 128 would make its rows collide in the cache

# Columns of the layer table: widths, offsets of W and bias in the parameters, codes, first column in the time table,
# and where the tile's input, u = x W + bias and y = activation lie in the arena (u = y where u is not needed again).
INPUTS, OUTPUTS, WEIGHT, BIAS, ACTIVATION, MODE, COLUMN, X, U, Y = range(10)
LAYER_COLUMNS = 10
ACTIVATIONS = {"none": 0, "leaky_relu": 1, "silu": 2}
MODES = {"none": 0, "shift": 1, "scale_shift": 2}
LEAKY, SILU = 1, 2
SHIFTED, SCALED = 1, 2

F = np.float32
ZERO, ONE, TWO, SLOPE = F(0), F(1), F(2), F(LEAKY_SLOPE)

# exp(r) = 1 + r + r^2 EXP(r) for |r| <= ln(2) / 2, least maximum error 6.3e-8 in EXP.
E0, E1, E2, E3, E4 = F(0.5), F(0.16666576), F(0.041666374), F(0.008363235), F(0.0013941218)
EXP_LOW, EXP_HIGH = F(-87), F(88)
LOG2_E, EXP_LN2_HIGH, EXP_LN2_LOW, HALF = F(1.4426950408889634), F(0.693359375), F(-2.1219444e-4), F(0.5)
EXPONENT_BIAS, MANTISSA_BITS = np.int32(127), np.int32(23)


@kernel
def sigmoid(v):
    """1 / (1 + exp(-v)) in float32."""
    x = -v
    if x > EXP_HIGH:
        x = EXP_HIGH
    if x < EXP_LOW:
        x = EXP_LOW
    whole = np.floor(x * LOG2_E + HALF)
    r = (x - whole * EXP_LN2_HIGH) - whole * EXP_LN2_LOW
    y = ((((E4 * r + E3) * r + E2) * r + E1) * r + E0) * r * r + r + ONE
    return ONE / (ONE + y * bits_float((np.int32(whole) + EXPONENT_BIAS) << MANTISSA_BITS))


@kernel
def _modulate_activate(rows, layer, arena, params, table, width, slots, t):
    """u = product + bias and y = act((1 + gain) u + shift), in the arena, for the rows of a tile."""
    n, mode, act = layer[OUTPUTS], layer[MODE], layer[ACTIVATION]
    bias = params[layer[BIAS] : layer[BIAS] + n]
    for i in range(rows):
        u = arena[layer[U] + i * n : layer[U] + (i + 1) * n]
        for j in range(n):
            u[j] = u[j] + bias[j]
        if layer[Y] != layer[U]:
            # One array where they are the same: the compiler does not vectorise over two that overlap.
            y = arena[layer[Y] + i * n : layer[Y] + (i + 1) * n]
            if mode == SCALED:
                at = slots[t[i]] * width + layer[COLUMN]
                gain, shift = table[at : at + n], table[at + n : at + 2 * n]
                if act == SILU:
                    for j in range(n):
                        v = (ONE + gain[j]) * u[j] + shift[j]
                        y[j] = v * sigmoid(v)
                    continue
                for j in range(n):
                    y[j] = (ONE + gain[j]) * u[j] + shift[j]
            else:
                for j in range(n):
                    y[j] = u[j]
            u = y
        if mode == SHIFTED:
            at = slots[t[i]] * width + layer[COLUMN]
            shift = table[at : at + n]
            for j in range(n):
                u[j] = u[j] + shift[j]
        if act == SILU:
            for j in range(n):
                u[j] = u[j] * sigmoid(u[j])
        elif act == LEAKY:
            for j in range(n):
                u[j] = u[j] if u[j] > ZERO else SLOPE * u[j]


@kernel
def forward_tile(rows, layers, arena, params, table, width, slots, t):
    """Run the layers on the tile's input at arena[layers[0, X]]; the output is at arena[layers[-1, Y]]."""
    for k in range(len(layers)):
        layer = layers[k]
        inputs, outputs = layer[INPUTS], layer[OUTPUTS]
        gemm(
            arena, layer[U], outputs, arena, layer[X], inputs, 1, params, layer[WEIGHT], outputs,
            rows, outputs, inputs, False,
        )  # fmt: skip
        _modulate_activate(rows, layer, arena, params, table, width, slots, t)


@kernel
def forward_range(start, stop, x, y, t, layers, params, table, width, slots, arena):
    """Tiles start ... stop - 1 of a network's forward pass; x and y are flat."""
    d, e, n = layers[0, INPUTS], layers[-1, OUTPUTS], len(t)
    for tile in range(start, stop):
        begin = tile * TILE
        rows = min(TILE, n - begin)
        for i in range(rows * d):
            arena[layers[0, X] + i] = x[begin * d + i]
        forward_tile(rows, layers, arena, params, table, width, slots, t[begin:])
        for i in range(rows * e):
            y[begin * e + i] = arena[layers[-1, Y] + i]


@kernel
def chain_range(
    start, stop, x, steps, coefficients, low, high, keep, layers, params, table, width, slots, first_row, stream,
    keys, words, z, segments, arena, previous, t,
):  # fmt: skip
    """All rows of a sampler's table on the tiles start ... stop - 1 of x (n, D), flat."""
    d = layers[0, INPUTS]
    n = len(x) // d
    for tile in range(start, stop):
        begin = tile * TILE
        rows = min(TILE, n - begin)
        state = x[begin * d : (begin + rows) * d]
        kept = previous[: rows * d] if keep else state
        first = first_row + np.uint64(begin)
        for r in range(len(steps)):
            for i in range(rows):
                t[i] = steps[r]
            for i in range(rows * d):
                arena[layers[0, X] + i] = state[i]
            forward_tile(rows, layers, arena, params, table, width, slots, t)
            out = arena[layers[-1, Y] : layers[-1, Y] + rows * d]
            row = coefficients[r]
            if row[6] == ZERO:
                apply_row(state, out, kept, state, row, low, high, keep)
                continue
            for chunk in range(chunks_of(rows, d)):
                for k in range(draw_chunk(chunk, rows, d, first, steps[r], stream, keys, words, z, segments)):
                    a, length, at = segments[k]
                    b = a + length
                    apply_row(state[a:b], out[a:b], kept[a:b], z[at : at + length], row, low, high, keep)


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
def chain_columns_range(
    start, stop, x, steps, coefficients, low, high, keep, layers, params, table, width, slots, first_row, stream,
    keys, words, z, arena, previous,
):  # fmt: skip
    """`chain_range` on tiles of COLUMNS samples that are stored feature by feature, with the same bits.

    The samples are the vector lanes: no lane is wasted whatever the widths of the layers, and noise is drawn in the
    order in which it is used. A tile is turned once before the chain and once after it.
    """
    d = layers[0, INPUTS]
    n = len(x) // d
    blocks = (d + 3) // 4
    for tile in range(start, stop):
        begin = tile * COLUMNS
        rows = min(COLUMNS, n - begin)
        at = layers[0, X]
        for i in range(rows):
            for j in range(d):
                arena[at + j * rows + i] = x[(begin + i) * d + j]
        state = arena[at : at + d * rows]
        out = arena[layers[-1, Y] : layers[-1, Y] + d * rows]
        kept = previous[: d * rows] if keep else state
        first = first_row + np.uint64(begin)
        together = CHUNK // rows  # blocks of all rows that are drawn at once
        for r in range(len(steps)):
            for k in range(len(layers)):
                layer = layers[k]
                inputs, outputs = layer[INPUTS], layer[OUTPUTS]
                gemm(
                    arena, layer[Y], rows, params, layer[WEIGHT], 1, outputs, arena, layer[X], rows,
                    outputs, rows, inputs, False,
                )  # fmt: skip
                _modulate_activate_columns(rows, layer, arena, params, table, slots[steps[r]] * width)
            row = coefficients[r]
            if row[6] == ZERO:
                apply_row(state, out, kept, state, row, low, high, keep)
                continue
            for block in range(0, blocks, together):
                count = min(together, blocks - block)
                draw(count * rows, block, first, rows, True, steps[r], stream, keys, words, z)
                for quarter in range(4):
                    a = (block + quarter * blocks) * rows
                    b = min(a + count * rows, d * rows)
                    if a < b:
                        apply_row(state[a:b], out[a:b], kept[a:b], z[quarter * QUARTER :], row, low, high, keep)
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
        for j in range(n):
            rows[i * n + j] = features[used[i], j]
        for j in range(width):
            table[i * width + j] = params[bias + j]
    gemm(table, 0, width, rows, 0, n, 1, params, weight, width, count, width, n, True)


@kernel
def time_table_backward(count, rows, features, dtable, width, grads, weight, bias):
    """Gradients of W and bias of `time_table`."""
    gemm(grads, weight, width, rows, 0, 1, features, dtable, 0, width, features, width, count, False)
    for j in range(width):
        grads[bias + j] = ZERO
    for i in range(count):
        for j in range(width):
            grads[bias + j] += dtable[i * width + j]


@kernel
def scatter_rows(start, stop, dtime, t, slots, dtable, width):
    """Columns start ... stop - 1 of dtable[slots[t[i]]] += dtime[i], in the order of i."""
    for i in range(len(t)):
        source, target = i * width, slots[t[i]] * width
        for j in range(start, stop):
            dtable[target + j] += dtime[source + j]


@kernel
def transpose_weights(layers, params, transposed):
    """W^T of every layer, at the offset of W."""
    for k in range(len(layers)):
        n, m, at = layers[k, INPUTS], layers[k, OUTPUTS], layers[k, WEIGHT]
        source, target = params[at : at + n * m], transposed[at : at + n * m]
        for j in range(m):
            for i in range(n):
                target[j * n + i] = source[i * m + j]


@kernel
def _layer_backward(rows, layer, arena, dy, table, width, slots, t, dtime, begin, partial):
    """dy becomes du, in place; fills the tile's rows of dtime and its bias gradient."""
    n, mode, act = layer[OUTPUTS], layer[MODE], layer[ACTIVATION]
    db = partial[layer[BIAS] : layer[BIAS] + n]
    db[:] = ZERO
    for i in range(rows):
        u = arena[layer[U] + i * n : layer[U] + (i + 1) * n]
        y = arena[layer[Y] + i * n : layer[Y] + (i + 1) * n]
        d = dy[i * n : (i + 1) * n]
        at = slots[t[i]] * width + layer[COLUMN]
        to = (begin + i) * width + layer[COLUMN]
        if act == LEAKY:
            for j in range(n):
                d[j] = d[j] if y[j] > ZERO else SLOPE * d[j]
        elif act == SILU:
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
                d[j] = d[j] * (ONE + gain[j])
        elif mode == SHIFTED:
            dshift = dtime[to : to + n]
            for j in range(n):
                dshift[j] = d[j]
        for j in range(n):
            db[j] += d[j]


@kernel
def _draw_tile(
    begin, rows, data, indices, t, tables, x, target, step, stream, keys, words, z, segments
):  # fmt: skip
    """Draw a tile's noise; x = signal x0 + noise eps, target = target_noise eps + target_data x0."""
    d = data.shape[1]
    for chunk in range(chunks_of(rows, d)):
        for k in range(draw_chunk(chunk, rows, d, np.uint64(begin), step, stream, keys, words, z, segments)):
            at, length, source = segments[k]
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
                at += count
                source += count


@kernel
def gradient_range(
    start, stop, first_tile, given, x, targets, dx, data, indices, t, tables, batch, layers, params, transposed, table,
    width, slots, dtime, grads, partials, losses, step, stream, keys, words, z, segments, arena, target, d_in, d_out,
):  # fmt: skip
    """Tiles first_tile + start ... of a training step: draws, forward, loss, backward.

    With `given`, x and targets hold the batch and dx takes the gradient of x; else the batch is drawn from `data`.
    Tile 0 writes its gradients to `grads`, another to row (tile - first_tile) of `partials`; losses[tile - first_tile]
    is the tile's sum of squared errors. `dtime` holds the rows of this group of tiles.
    """
    d, e = layers[0, INPUTS], layers[-1, OUTPUTS]
    scale = TWO / F(batch * e)
    for local in range(start, stop):
        tile = first_tile + local
        begin = tile * TILE
        rows = min(TILE, batch - begin)
        partial = grads if tile == 0 else partials[local]
        at = layers[0, X]
        if given:
            for i in range(rows * d):
                arena[at + i] = x[begin * d + i]
            for i in range(rows * e):
                target[i] = targets[begin * e + i]
        else:
            _draw_tile(
                begin,
                rows,
                data,
                indices,
                t,
                tables,
                arena[at:],
                target,
                step,
                stream,
                keys,
                words,
                z,
                segments,
            )
        times = t[begin : begin + rows]
        forward_tile(rows, layers, arena, params, table, width, slots, times)

        sums, dy, dnext = d_in[:e], d_out, d_in
        sums[:] = ZERO  # squared errors, column by column
        for i in range(rows):
            y, wanted, dyi = arena[layers[-1, Y] + i * e :], target[i * e :], dy[i * e :]
            for j in range(e):
                difference = y[j] - wanted[j]
                sums[j] += difference * difference
                dyi[j] = difference * scale
        total = 0.0
        for j in range(e):
            total += np.float64(sums[j])
        losses[local] = total

        for k in range(len(layers) - 1, -1, -1):
            layer = layers[k]
            n, m = layer[INPUTS], layer[OUTPUTS]
            _layer_backward(rows, layer, arena, dy, table, width, slots, times, dtime, local * TILE, partial)
            gemm(partial, layer[WEIGHT], m, arena, layer[X], 1, n, dy, 0, m, n, m, rows, False)
            if k > 0 or given:
                gemm(dnext, 0, n, dy, 0, m, 1, transposed, layer[WEIGHT], n, rows, n, m, False)
                dy, dnext = dnext, dy
        if given:
            for i in range(rows * d):
                dx[begin * d + i] = dy[i]


@kernel
def add_partials(start, stop, grads, partials, first, count):
    """grads[start:stop] += partials[first], ..., partials[count - 1], in this order."""
    for k in range(first, count):
        target, source = grads[start:stop], partials[k, start:stop]
        for j in range(stop - start):
            target[j] += source[j]
