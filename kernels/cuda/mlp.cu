// Multilayer perceptrons. Layer: u = x W + b, v = (1 + gain) u + shift, y = act(v); gain and shift are columns of the
// row of the time table that belongs to the sample's timestep.
//
// Two ways. mlp_chain holds a tile of samples in shared memory through all layers, and through all rows of a sampler's
// table; with no rows it is the network's forward pass, so that a chain and its steps have the same bits. Per layer,
// for training and for networks too wide for that, a product (conv.cu) is followed by one of the kernels below.
//
// Every sum has a fixed order: products over k ascending, batches in fixed chunks that are added in order.
#include "mlp.cuh"

// ------------------------------------------------------------------------------------------- elements

// 1 / (1 + exp(-v)): exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2, as in kernels/cpu/elementary.py.
FD_DEVICE real mlp_sigmoid(real v) {
    const real x = fminf(fmaxf(-v, -87.0f), 88.0f);
    const real whole = floorf(fmaf(x, 1.4426950408889634f, 0.5f));
    const real r = fmaf(whole, 2.1219444e-4f, fmaf(whole, -0.693359375f, x));
    real p = fmaf(0.0013941218f, r, 0.008363235f);
    p = fmaf(p, r, 0.041666374f);
    p = fmaf(p, r, 0.16666576f);
    p = fmaf(p, r, 0.5f);
    const real y = fmaf(p * r, r, r) + 1.0f;
    return 1.0f / (1.0f + y * fd_bits_float(((int)whole + 127) * (1 << 23)));
}

FD_DEVICE real mlp_activate(real v, int activation) {
    if (activation == SILU) return v * mlp_sigmoid(v);
    return activation == LEAKY_RELU && !(v > 0) ? FD_LEAKY_SLOPE * v : v;
}

// ------------------------------------------------------------------------------------------- per layer

// u holds the product x W (n, m): u += bias, y = act((1 + gain) u + shift). y may be u where u is not needed again.
FD_KERNEL mlp_bias_activate(real *u, real *y, const real *bias, const real *table, const int64 *t, int64 n, int64 m,
                            int64 table_width, int64 column, int mode, int activation) {
    for (Walk walk = fd_walk(m); walk.row < n; fd_walk_on(walk, m)) {
        const int64 row = walk.row, j = walk.item, i = row * m + j;
        const real *modulation = mode == TIME_NONE ? table : table + t[row] * table_width + column;
        const real biased = u[i] + bias[j];
        const real v = mlp_modulate(biased, mode, mlp_gain(modulation, mode, j), mlp_shift(modulation, mode, m, j));
        u[i] = biased;
        y[i] = mlp_activate(v, activation);
    }
}

// The sample of a row, where there are several rows of all samples, one after the other.
FD_DEVICE int64 mlp_sample(int64 row, int64 samples) { return row < samples ? row : row % samples; }

// d (n, m), which may be `from`, is dy made du, or du made dy: `from` times act'(v) (1 + gain) of its sample. Fills the
// layer's columns of dtime (n, table_width), where that is given and n is `samples`.
FD_KERNEL mlp_layer_backward(const real *from, real *d, const real *us, const real *ys, const real *table,
                             const int64 *t, real *dtime, int64 n, int64 samples, int64 m, int64 table_width,
                             int64 column, int mode, int activation) {
    for (Walk walk = fd_walk(m); walk.row < n; fd_walk_on(walk, m)) {
        const int64 row = mlp_sample(walk.row, samples), j = walk.item, i = walk.row * m + j;
        const real *const u = us + row * m, *const y = ys + row * m;
        const real *modulation = mode == TIME_NONE ? table : table + t[row] * table_width + column;
        const real gain = mlp_gain(modulation, mode, j);
        real value = from[i];
        if (activation == SILU) {
            const real v = mlp_modulate(u[j], mode, gain, mlp_shift(modulation, mode, m, j));
            const real g = mlp_sigmoid(v);
            value = value * g * (1.0f + v * (1.0f - g));
        } else if (activation == LEAKY_RELU) {
            value = y[j] > 0 ? value : FD_LEAKY_SLOPE * value;
        }
        if (mode != TIME_NONE && dtime) {
            real *to = dtime + row * table_width + column;
            if (mode == SCALE_SHIFT) {
                to[j] = value * u[j];
                to[m + j] = value;
            } else {
                to[j] = value;
            }
        }
        d[i] = mode == SCALE_SHIFT ? value * (1.0f + gain) : value;
    }
}

// The fixed linear part of a network, B_t x = basis diag(gains[t]) basis^T x + rest[t] x, between its two products:
// h (n, rank) *= gains[t], of its sample.
FD_KERNEL mlp_scale(real *h, const real *gains, const int64 *t, int64 n, int64 samples, int64 rank) {
    for (Walk walk = fd_walk(rank); walk.row < n; fd_walk_on(walk, rank)) {
        h[walk.row * rank + walk.item] *= gains[t[mlp_sample(walk.row, samples)] * rank + walk.item];
    }
}

// y (n, d) += part, and where there is a rest, += rest[t] x.
FD_KERNEL mlp_add_part(real *y, const real *part, const real *x, const real *rest, const int64 *t, int64 n,
                       int64 samples, int64 d) {
    for (Walk walk = fd_walk(d); walk.row < n; fd_walk_on(walk, d)) {
        const int64 i = walk.row * d + walk.item;
        const real sum = y[i] + part[i];
        y[i] = rest ? sum + fd_product(rest[t[mlp_sample(walk.row, samples)]], x[i]) : sum;
    }
}

// rows (n, width) += the rows of the time table that belong to the timesteps.
FD_KERNEL mlp_add_times(real *rows, const real *table, const int64 *t, int64 n, int64 width) {
    for (Walk walk = fd_walk(width); walk.row < n; fd_walk_on(walk, width)) {
        const int64 i = walk.row * width + walk.item;
        rows[i] = table[t[walk.row] * width + walk.item] + rows[i];
    }
}

// ------------------------------------------------------------------------------------------- the time table

// table (T, width) = features (T, F) W (F, width) + bias.
FD_KERNEL mlp_time_table(const real *features, const real *weight, const real *bias, real *table, int64 T, int64 F,
                         int64 width) {
    for (Walk walk = fd_walk(width); walk.row < T; fd_walk_on(walk, width)) {
        const int64 row = walk.row, j = walk.item;
        real sum = bias[j];
        for (int64 k = 0; k < F; k++) sum = fmaf(features[row * F + k], weight[k * width + j], sum);
        table[row * width + j] = sum;
    }
}

// Gradients of W and, as row F of the same loop, of the bias.
FD_KERNEL mlp_time_table_backward(const real *features, const real *dtable, real *dweight, real *dbias, int64 T,
                                  int64 F, int64 width) {
    for (Walk walk = fd_walk(width); walk.row <= F; fd_walk_on(walk, width)) {
        const int64 k = walk.row, j = walk.item;
        real sum = 0;
        for (int64 row = 0; row < T; row++) {
            const real d = dtable[row * width + j];
            sum = k < F ? fmaf(features[row * F + k], d, sum) : sum + d;
        }
        (k < F ? dweight[k * width + j] : dbias[j]) = sum;
    }
}

enum { AT_ONCE = 8 };  // loads on their way
enum { DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS, ORDER_WARPS = DIGITS / FD_WARP };

// The lanes of this warp whose digit is that of this lane, as bits; none where `is` does not hold.
FD_DEVICE uint32 mlp_same_digit(int digit, bool is) {
    uint32 same = fd_ballot(is);
    FD_UNROLL
    for (int bit = 0; bit < DIGIT_BITS; bit++) {
        const uint32 set = fd_ballot(digit >> bit & 1);
        same &= digit >> bit & 1 ? set : ~set;
    }
    return is ? same : 0;
}

// order = the samples sorted by timestep, those of one timestep in the order of the batch, of T timesteps. One block of
// DIGITS threads, whose warps have pieces of the batch: a counting sort for each digit of the timesteps, the lowest
// first, that keeps what is equal as it was. `spare` is as large as `order`.
FD_KERNEL FD_BOUNDS(DIGITS, 1) mlp_order_times(const int64 *t, int *order, int *spare, int64 n, int64 T) {
    FD_SHARED_ARRAY(int, places, ORDER_WARPS * DIGITS);  // of a warp's digits: how many, then where the next one goes
    FD_SHARED_ARRAY(int, sums, ORDER_WARPS);
    const int thread = threadIdx.x, lane = thread % FD_WARP, warp = thread / FD_WARP;
    const uint32 before = (1u << lane) - 1;
    const int64 piece = (n + DIGITS - 1) / DIGITS * FD_WARP, begin = warp * piece, end = min(begin + piece, n);
    int passes = 1;
    while ((T - 1) >> (passes * DIGIT_BITS)) passes++;
    for (int pass = 0; pass < passes; pass++) {
        const int *const from = (passes - pass) % 2 ? spare : order;
        int *const to = (passes - pass) % 2 ? order : spare;
        const auto sample = [&](int64 at) { return pass ? from[at] : (int)at; };
        const auto digit_of = [&](int64 at) { return (int)(t[sample(at)] >> (pass * DIGIT_BITS)) & (DIGITS - 1); };
        for (int w = 0; w < ORDER_WARPS; w++) places[w * DIGITS + thread] = 0;
        fd_syncthreads();
        for (int64 at = begin + lane; at - lane < end; at += FD_WARP) {
            const int digit = at < end ? digit_of(at) : 0;
            const uint32 same = mlp_same_digit(digit, at < end);
            if (same && !(same & before)) places[warp * DIGITS + digit] += fd_count_bits(same);
            fd_syncwarp();
        }
        fd_syncthreads();
        // Smaller digits go first, and of one digit the pieces in their order.
        int count = 0;
        for (int w = 0; w < ORDER_WARPS; w++) count += places[w * DIGITS + thread];
        int sum = count;  // of the digits up to this one, in the warp
        for (int delta = 1; delta < FD_WARP; delta *= 2) {
            const int other = fd_shuffle(sum, (lane + FD_WARP - delta) % FD_WARP);
            if (lane >= delta) sum += other;
        }
        if (lane == FD_WARP - 1) sums[warp] = sum;
        fd_syncthreads();
        int place = sum - count;
        for (int w = 0; w < warp; w++) place += sums[w];
        for (int w = 0; w < ORDER_WARPS; w++) {
            const int here = places[w * DIGITS + thread];
            places[w * DIGITS + thread] = place;
            place += here;
        }
        fd_syncthreads();
        for (int64 at = begin + lane; at - lane < end; at += FD_WARP) {
            const int digit = at < end ? digit_of(at) : 0;
            const uint32 same = mlp_same_digit(digit, at < end);
            if (same) to[places[warp * DIGITS + digit] + fd_count_bits(same & before)] = sample(at);
            fd_syncwarp();
            if (same && !(same & before)) places[warp * DIGITS + digit] += fd_count_bits(same);
            fd_syncwarp();
        }
        fd_syncthreads();
    }
}

// dtable[s] = sum of dtime[i] over the samples with t[i] = s, in the order of the batch. One thread per column and
// place in `order`; the first place of a timestep adds them up. Other rows of dtable are left alone.
FD_KERNEL mlp_time_gradient(const real *dtime, const int64 *t, const int *order, real *dtable, int64 n, int64 width) {
    for (Walk walk = fd_walk(width); walk.row < n; fd_walk_on(walk, width)) {
        int64 place = walk.row;
        const int64 j = walk.item;
        const int64 step = t[order[place]];
        if (place > 0 && t[order[place - 1]] == step) continue;
        // Where the timestep ends: before that many loads can be on their way at once.
        int64 end = place + 1;
        for (int64 beyond = n; end < beyond;) {
            const int64 middle = (end + beyond) / 2;
            if (t[order[middle]] == step)
                end = middle + 1;
            else
                beyond = middle;
        }
        real sum = 0;
        for (; place + AT_ONCE <= end; place += AT_ONCE) {
            real values[AT_ONCE];
            FD_UNROLL
            for (int k = 0; k < AT_ONCE; k++) values[k] = dtime[order[place + k] * width + j];
            FD_UNROLL
            for (int k = 0; k < AT_ONCE; k++) sum = sum + values[k];
        }
        for (; place < end; place++) sum = sum + dtime[order[place] * width + j];
        dtable[step * width + j] = sum;
    }
}

// ------------------------------------------------------------------------------------------- training draws

// The batch of a training step by the noise law: t, x = signal[t] x0 + noise[t] eps and
// target = target_noise[t] eps + target_data[t] x0, with x0 a drawn row of data (N, d). tables (4, T) holds signal,
// noise, target_noise, target_data. A row of data has `pitch` values: where these are more than d, those behind x0 are
// added to the target. N = 0: the data are those of the batch, by position. Where `step_at` is not null it holds the
// step. One thread per noise block: it draws
// its sample's row and timestep again, which is cheaper than a launch.
FD_KERNEL mlp_draw_batch(const real *data, const real *tables, real *x, real *target, int64 *t, int64 n, int64 d,
                         int64 pitch, int64 N, int64 T, uint32 step, const uint32 *step_at, RoundKeys keys) {
    const int64 quarter = (d + 3) / 4;
    if (step_at) step = *step_at;
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        const int64 row = walk.row, q = walk.item;
        const uint64 time_word = fd_words(row, 0, step, FD_STREAM_TRAIN_TIME, keys).w0;
        const uint64 data_word = fd_words(row, 0, step, FD_STREAM_BATCH, keys).w0;
        const int64 s = (int64)((time_word * (uint64)T) >> 32);
        const real *x0 = data + (N ? (int64)((data_word * (uint64)N) >> 32) : row) * pitch;
        const real signal = tables[s], noise = tables[T + s];
        const real target_noise = tables[2 * T + s], target_data = tables[3 * T + s];
        const float4 normals = fd_normals(row, (uint32)q, step, FD_STREAM_TRAIN_NOISE, keys);
        const real z[4] = {normals.x, normals.y, normals.z, normals.w};
        FD_UNROLL
        for (int k = 0; k < 4; k++) {
            const int64 j = q + k * quarter;
            if (j >= d) break;
            x[row * d + j] = signal * x0[j] + noise * z[k];
            real wanted = target_noise * z[k] + target_data * x0[j];
            if (pitch > d) wanted += x0[d + j];
            target[row * d + j] = wanted;
        }
        if (q == 0) t[row] = s;
    }
}

// What is asked of the rows of a training step, asked (n, pitch): 1 in the column of the class, then the `columns`
// covariates; columns beyond these are left alone. labels (N,) are null where there are no classes; words of stream DROP
// below `limit` leave out the one and the other. N = 0 as above.
FD_KERNEL mlp_draw_asked(const int64 *labels, const real *covariates, real *asked, int64 n, int64 N, int64 classes,
                         int64 columns, int64 pitch, uint64 limit, uint32 step, const uint32 *step_at,
                         RoundKeys keys) {
    const int64 width = classes + columns;
    if (step_at) step = *step_at;
    for (Walk walk = fd_walk(width); walk.row < n; fd_walk_on(walk, width)) {
        const int64 row = walk.row, j = walk.item;
        const uint64 data_word = fd_words(row, 0, step, FD_STREAM_BATCH, keys).w0;
        const int64 from = N ? (int64)((data_word * (uint64)N) >> 32) : row;
        const Words drop = fd_words(row, 0, step, FD_STREAM_DROP, keys);
        real value = 0;
        if (j < classes) {
            if (drop.w0 >= limit && labels[from] == j) value = 1;
        } else if (drop.w1 >= limit) {
            value = covariates[from * columns + j - classes];
        }
        asked[row * pitch + j] = value;
    }
}

// ------------------------------------------------------------------------------------------- tiles of samples

FD_DEVICE int mlp_round4(int n) { return (n + 3) / 4 * 4; }

// A row of W is padded to a multiple of four values with zeros.
FD_KERNEL mlp_pack(const real *params, real *packed, const int *layers, int count, int64 size) {
    FD_GRID_STRIDE(i, size) {
        int k = 0;
        while (k + 1 < count && i >= layers[(k + 1) * LAYER_COLUMNS + WEIGHT]) k++;
        const int *layer = layers + k * LAYER_COLUMNS;
        const int outputs = layer[OUTPUTS], pitch = mlp_round4(outputs);
        const int within = (int)(i - layer[WEIGHT]), row = within / pitch, j = within % pitch;
        // The bias follows the last row of W.
        const int64 from = row < layer[INPUTS] ? layer[FROM_WEIGHT] + (int64)row * outputs : layer[FROM_BIAS];
        packed[i] = j < outputs ? params[from + j] : 0;
    }
}

FD_DEVICE void mlp_fma4(real (&acc)[4], real x, const float4 w) {
    acc[0] = fmaf(x, w.x, acc[0]);
    acc[1] = fmaf(x, w.y, acc[1]);
    acc[2] = fmaf(x, w.z, acc[2]);
    acc[3] = fmaf(x, w.w, acc[3]);
}

// One layer on a tile of `rows` samples, a multiple of 4 R: in and out lie in shared memory with their pitches. A warp
// makes 4 R rows times 32 columns at a time; a lane R rows (4 apart) times 4 columns. With `add` the sums start from what
// is in out.
template <int R>
FD_DEVICE void mlp_dense(const int *layer, const real *packed, const real *in, int in_pitch, real *out, int out_pitch,
                         const real *table, int64 table_width, const int *times, int rows, bool add) {
    const int inputs = layer[INPUTS], outputs = layer[OUTPUTS], mode = layer[MODE], activation = layer[ACTIVATION];
    const int pitch = mlp_round4(outputs), column = layer[COLUMN];
    const real *weight = packed + layer[WEIGHT], *bias = packed + layer[BIAS];
    const int lane = threadIdx.x % FD_WARP, across = (outputs + 31) / 32, pieces = rows / (4 * R) * across;
    for (int piece = threadIdx.x / FD_WARP; piece < pieces; piece += blockDim.x / FD_WARP) {
        const int first = piece / across * (4 * R) + lane / 8, j = piece % across * 32 + lane % 8 * 4;
        const real *w = weight + min(j, pitch - 4);  // lanes beyond the last column do another's work
        const real *a = in + first * in_pitch;
        real acc[R][4];
        FD_UNROLL
        for (int r = 0; r < R; r++) {
            FD_UNROLL
            for (int c = 0; c < 4; c++) {
                acc[r][c] = add && j + c < outputs ? out[(first + 4 * r) * out_pitch + j + c] : 0;
            }
        }
        int k = 0;
        for (; k + 4 <= inputs; k += 4, w += 4 * pitch) {
            const float4 w0 = fd_load4(w), w1 = fd_load4(w + pitch), w2 = fd_load4(w + 2 * pitch),
                        w3 = fd_load4(w + 3 * pitch);
            FD_UNROLL
            for (int r = 0; r < R; r++) {
                const float4 x = fd_load4(a + 4 * r * in_pitch + k);
                mlp_fma4(acc[r], x.x, w0);
                mlp_fma4(acc[r], x.y, w1);
                mlp_fma4(acc[r], x.z, w2);
                mlp_fma4(acc[r], x.w, w3);
            }
        }
        FD_ROLL
        for (; k < inputs; k++, w += pitch) {
            const float4 w0 = fd_load4(w);
            FD_UNROLL
            for (int r = 0; r < R; r++) mlp_fma4(acc[r], a[4 * r * in_pitch + k], w0);
        }
        if (j >= outputs) continue;
        FD_UNROLL
        for (int r = 0; r < R; r++) {
            const int row = first + 4 * r;
            const real *modulation = mode == TIME_NONE ? table : table + times[row] * table_width + column;
            FD_UNROLL
            for (int c = 0; c < 4; c++) {
                const int at = min(j + c, outputs - 1);  // values beyond the last column are never read
                const real u = acc[r][c] + bias[at];
                const real v =
                    mlp_modulate(u, mode, mlp_gain(modulation, mode, at), mlp_shift(modulation, mode, outputs, at));
                out[row * out_pitch + j + c] = mlp_activate(v, activation);
            }
        }
    }
}

// All rows of a sampler's table on the tiles of this block, or with none of them one forward pass.
// `steps` (3, step_count) holds timesteps, the steps of the noise, and whether a row evaluates the network.
// Shared memory: packed parameters (STAGED), x, m1 (depth > 0), outputs of even layers, of odd layers, timesteps.
template <int R, bool STAGED, bool PART>
FD_DEVICE void mlp_tiles(real *shared, real *x, real *y, const int64 *t, const TableRow *table_rows,
                         const int64 *steps, int step_count, ChainMemory memory, const int *layers, int layer_count,
                         const real *packed, int packed_size, const real *table, int64 table_width, LinearPart part,
                         int64 n, int rows, int even_width, int odd_width, uint64 first_row, const RoundKeys &keys) {
    const int thread = threadIdx.x, threads = blockDim.x;
    const int d = layers[INPUTS], e = layers[(layer_count - 1) * LAYER_COLUMNS + OUTPUTS], quarter = (d + 3) / 4;
    const int pitch = mlp_pitch(d), even_pitch = mlp_pitch(even_width), odd_pitch = mlp_pitch(odd_width);
    real *const state = shared + (STAGED ? packed_size : 0);
    real *const previous = state + rows * pitch;
    const int depth = memory.depth;
    real *const even = previous + (depth ? rows * pitch : 0), *const odd = even + rows * even_pitch;
    int *const times = reinterpret_cast<int *>(odd + rows * odd_pitch);
    const bool out_is_even = layer_count % 2;
    real *const out = out_is_even ? even : odd, *const other = out_is_even ? odd : even;
    const int out_pitch = out_is_even ? even_pitch : odd_pitch, other_pitch = out_is_even ? odd_pitch : even_pitch;
    if (STAGED) {
        for (int i = thread; i < packed_size; i += threads) shared[i] = packed[i];
    }
    for (int64 begin = (int64)blockIdx.x * rows; begin < n; begin += (int64)gridDim.x * rows) {
        const int here = (int)min((int64)rows, n - begin);
        for (int i = thread; i < rows * d; i += threads) {
            const int row = i / d, j = i % d;
            state[row * pitch + j] = row < here ? x[begin * d + i] : 0;
            if (depth) previous[row * pitch + j] = 0;
            if (depth > 1 && row < here) memory.deep[begin * d + i] = memory.deep[(n + begin) * d + i] = 0;
        }
        for (int r = 0; r < max(step_count, 1); r++) {
            for (int row = thread; row < rows; row += threads) {
                times[row] = (int)(step_count ? steps[r] : row < here ? t[begin + row] : 0);
            }
            fd_syncthreads();
            // The linear part's two products follow the layers: one call for all of them, or registers run out.
            FD_ROLL
            for (int k = 0; mlp_evaluates(steps, step_count, r) && k < layer_count + (PART ? 2 : 0); k++) {
                const bool of_part = PART && k >= layer_count, second = PART && k > layer_count;
                const bool from_state = k == 0 || (PART && k == layer_count), to_odd = of_part ? second != out_is_even : k % 2;
                mlp_dense<R>(layers + k * LAYER_COLUMNS, of_part ? part.values : STAGED ? shared : packed,
                             from_state ? state : to_odd ? even : odd, from_state ? pitch : to_odd ? even_pitch : odd_pitch,
                             to_odd ? odd : even, to_odd ? odd_pitch : even_pitch, table, table_width, times, rows,
                             second);
                fd_syncthreads();
                if (!of_part) continue;
                FD_ROLL
                for (int i = thread; !second && i < rows * part.rank; i += threads) {
                    const int row = i / part.rank, j = i % part.rank;
                    other[row * other_pitch + j] *= part.values[part.gains + times[row] * part.rank + j];
                }
                FD_ROLL
                for (int i = thread; second && part.rest && i < rows * d; i += threads) {
                    const int row = i / d, j = i % d;
                    out[row * out_pitch + j] += fd_product(part.values[part.rest + times[row]], state[row * pitch + j]);
                }
                fd_syncthreads();
            }
            if (step_count == 0) {
                for (int i = thread; i < here * e; i += threads) y[begin * e + i] = out[i / e * out_pitch + i % e];
                continue;
            }
            const TableRow coefficients = table_rows[r];
            for (int i = thread; i < here * quarter; i += threads) {
                const int row = i / quarter, q = i % quarter;
                real z[4] = {0, 0, 0, 0};
                if (coefficients.s != 0) {
                    const float4 normals =
                        fd_normals(first_row + begin + row, q, (uint32)steps[step_count + r], FD_STREAM_STEP,
                                   keys);
                    z[0] = normals.x, z[1] = normals.y, z[2] = normals.z, z[3] = normals.w;
                }
                FD_UNROLL
                for (int c = 0; c < 4; c++) {
                    const int j = q + c * quarter;
                    if (j >= d) break;
                    real &value = state[row * pitch + j];
                    const real output = out[row * out_pitch + j];
                    const real m = fd_row_m(coefficients, value, output);
                    const real m1 = depth ? previous[row * pitch + j] : 0;
                    if (depth > 1) {
                        real *const deep = memory.deep + (begin + row) * d + j;
                        real &m2 = deep[0], &m3 = deep[n * d];
                        value = fd_row_x<true>(coefficients, value, m, {m1, m2, m3}, output, z[c]);
                        if (mlp_evaluates(steps, step_count, r)) m3 = m2, m2 = m1;
                    } else {
                        value = fd_row_x<false>(coefficients, value, m, {m1, 0, 0}, output, z[c]);
                    }
                    if (depth && mlp_evaluates(steps, step_count, r)) previous[row * pitch + j] = m;
                }
            }
        }
        // A thread stores the values of `state` that it loads again for its next tile: no barrier after this.
        fd_syncthreads();
        for (int i = thread; step_count && i < here * d; i += threads) {
            x[begin * d + i] = state[i / d * pitch + i % d];
        }
    }
}

template <bool PART>
FD_DEVICE void mlp_run(real *shared, real *x, real *y, const int64 *t, const TableRow *table_rows, const int64 *steps,
                       int step_count, ChainMemory memory, const int *layers, int layer_count, const real *packed,
                       int packed_size, const real *table, int64 table_width, LinearPart part, int64 n, int rows,
                       int even_width, int odd_width, bool staged, uint64 first_row, const RoundKeys &keys) {
    if (rows % 32 == 0) {
        if (staged)
            mlp_tiles<8, true, PART>(shared, x, y, t, table_rows, steps, step_count, memory, layers, layer_count,
                                     packed, packed_size, table, table_width, part, n, rows, even_width, odd_width,
                                     first_row, keys);
        else
            mlp_tiles<8, false, PART>(shared, x, y, t, table_rows, steps, step_count, memory, layers, layer_count,
                                      packed, packed_size, table, table_width, part, n, rows, even_width, odd_width,
                                      first_row, keys);
    } else {
        if (staged)
            mlp_tiles<2, true, PART>(shared, x, y, t, table_rows, steps, step_count, memory, layers, layer_count,
                                     packed, packed_size, table, table_width, part, n, rows, even_width, odd_width,
                                     first_row, keys);
        else
            mlp_tiles<2, false, PART>(shared, x, y, t, table_rows, steps, step_count, memory, layers, layer_count,
                                      packed, packed_size, table, table_width, part, n, rows, even_width, odd_width,
                                      first_row, keys);
    }
}

// x (n, d) is changed by the `step_count` rows of a table, or, where there are none, y becomes the network's output at
// the timesteps t. `rows` samples are a tile, 8 or a multiple of 32; `staged` keeps the packed parameters in shared
// memory. Neither changes a bit.
FD_KERNEL FD_BOUNDS(256, 2)
    mlp_chain(real *x, real *y, const int64 *t, const TableRow *table_rows, const int64 *steps, int step_count,
              int depth, real *deep, const int *layers, int layer_count, const real *packed, int packed_size,
              const real *table, int64 table_width, int64 n, int rows, int even_width, int odd_width, int staged,
              uint64 first_row, RoundKeys keys) {
    FD_SHARED(real, shared);
    const LinearPart none = {nullptr, 0, 0, 0};
    mlp_run<false>(shared, x, y, t, table_rows, steps, step_count, {depth, deep}, layers, layer_count, packed,
                   packed_size, table, table_width, none, n, rows, even_width, odd_width, staged, first_row, keys);
}

// The same for a network with a linear part, whose products want more registers: one block of it on a multiprocessor.
FD_KERNEL FD_BOUNDS(256, 1)
    mlp_chain_part(real *x, real *y, const int64 *t, const TableRow *table_rows, const int64 *steps, int step_count,
                   int depth, real *deep, const int *layers, int layer_count, const real *packed, int packed_size,
                   const real *table, int64 table_width, const real *part_values, int part_rank, int part_gains,
                   int part_rest, int64 n, int rows, int even_width, int odd_width, int staged, uint64 first_row,
                   RoundKeys keys) {
    FD_SHARED(real, shared);
    const LinearPart part = {part_values, part_rank, part_gains, part_rest};
    mlp_run<true>(shared, x, y, t, table_rows, steps, step_count, {depth, deep}, layers, layer_count, packed,
                  packed_size, table, table_width, part, n, rows, even_width, odd_width, staged, first_row, keys);
}
