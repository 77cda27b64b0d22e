// What image networks do value by value, or row by row, besides convolutions, norms and attention.
//
// `fours`: sizes are multiples of four and arrays are 16-byte aligned, so that four values are taken at once. That
// changes no bits.

#include "elementary.cuh"

// ------------------------------------------------------------------------------------------- values

enum { SILU, GELU, SUM, SILU_BACKWARD, ADD_SILU_BACKWARD, GELU_BACKWARD, ADD_GELU_BACKWARD };

template <int OPERATION>
FD_DEVICE real one(real a, real b, real old) {
    if (OPERATION == SILU) return fd_silu(a);
    if (OPERATION == GELU) return fd_gelu(a);
    if (OPERATION == SILU_BACKWARD) return fd_silu_backward(a, b);
    if (OPERATION == ADD_SILU_BACKWARD) return old + fd_silu_backward(a, b);
    if (OPERATION == GELU_BACKWARD) return fd_gelu_backward(a, b);
    return OPERATION == ADD_GELU_BACKWARD ? old + fd_gelu_backward(a, b) : a + b;
}

// out may be a or b.
template <int OPERATION>
FD_DEVICE void each(const real *a, const real *b, real *out, int64 size, int fours) {
    const bool alone = OPERATION == SILU || OPERATION == GELU;
    const bool adds = OPERATION == ADD_SILU_BACKWARD || OPERATION == ADD_GELU_BACKWARD;
    if (!fours) {
        FD_GRID_STRIDE(i, size) out[i] = one<OPERATION>(a[i], b[i], adds ? out[i] : 0);
        return;
    }
    FD_GRID_STRIDE(i, size / 4) {
        const float4 x = fd_load4(a + 4 * i), y = alone ? x : fd_load4(b + 4 * i);
        const float4 old = adds ? fd_load4(out + 4 * i) : x;
        fd_store4(out + 4 * i, make_float4(one<OPERATION>(x.x, y.x, old.x), one<OPERATION>(x.y, y.y, old.y),
                                           one<OPERATION>(x.z, y.z, old.z), one<OPERATION>(x.w, y.w, old.w)));
    }
}

FD_KERNEL silu(const real *x, real *out, int64 size, int fours) { each<SILU>(x, x, out, size, fours); }

FD_KERNEL silu_backward(const real *dy, const real *x, real *dx, int64 size, int add, int fours) {
    if (add) {
        each<ADD_SILU_BACKWARD>(dy, x, dx, size, fours);
    } else {
        each<SILU_BACKWARD>(dy, x, dx, size, fours);
    }
}

FD_KERNEL gelu(const real *x, real *out, int64 size, int fours) { each<GELU>(x, x, out, size, fours); }

FD_KERNEL gelu_backward(const real *dy, const real *x, real *dx, int64 size, int add, int fours) {
    if (add) {
        each<ADD_GELU_BACKWARD>(dy, x, dx, size, fours);
    } else {
        each<GELU_BACKWARD>(dy, x, dx, size, fours);
    }
}

FD_KERNEL add(const real *a, const real *b, real *out, int64 size, int fours) { each<SUM>(a, b, out, size, fours); }

// ------------------------------------------------------------------------------------------- columns

FD_DEVICE real plus(real a, real b) { return a + b; }
FD_DEVICE float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

template <class T>
FD_DEVICE void join(const T *a, const T *b, T *out, int64 rows, int64 left, int64 right) {
    for (Walk walk = fd_walk(left + right); walk.row < rows; fd_walk_on(walk, left + right)) {
        const int64 row = walk.row, column = walk.item;
        out[row * (left + right) + column] = column < left ? a[row * left + column] : b[row * right + column - left];
    }
}

template <class T>
FD_DEVICE void part(const T *x, T *a, T *b, int64 rows, int64 left, int64 right, int add) {
    for (Walk walk = fd_walk(left + right); walk.row < rows; fd_walk_on(walk, left + right)) {
        const int64 row = walk.row, column = walk.item;
        const T value = x[row * (left + right) + column];
        if (column >= left) {
            b[row * right + column - left] = value;
        } else {
            T *const to = a + row * left + column;
            *to = add ? plus(*to, value) : value;
        }
    }
}

// out (rows, left + right) from a (rows, left) and b (rows, right).
FD_KERNEL concatenate(const real *__restrict__ a, const real *__restrict__ b, real *__restrict__ out, int64 rows,
                      int64 left, int64 right, int fours) {
    if (fours) {
        join((const float4 *)a, (const float4 *)b, (float4 *)out, rows, left / 4, right / 4);
    } else {
        join(a, b, out, rows, left, right);
    }
}

FD_KERNEL split(const real *__restrict__ x, real *__restrict__ a, real *__restrict__ b, int64 rows, int64 left,
                int64 right, int add, int fours) {
    if (fours) {
        part((const float4 *)x, (float4 *)a, (float4 *)b, rows, left / 4, right / 4, add);
    } else {
        part(x, a, b, rows, left, right, add);
    }
}

// out (n, to_height, to_width, channels) from x (n, height, width, channels): cut off at the end, or zeros there.
FD_KERNEL resize(const real *__restrict__ x, real *__restrict__ out, int64 n, int64 height, int64 width,
                 int64 to_height, int64 to_width, int64 channels) {
    const int64 line = width * channels, to_line = to_width * channels;
    for (Walk walk = fd_walk(to_line); walk.row < n * to_height; fd_walk_on(walk, to_line)) {
        const int64 image = walk.row / to_height, row = walk.row - image * to_height;
        const bool inside = row < height && walk.item < line;
        out[walk.row * to_line + walk.item] = inside ? x[(image * height + row) * line + walk.item] : 0;
    }
}

// ------------------------------------------------------------------------------------------- the same row for all

template <class T>
FD_DEVICE void shifted(const T *x, const T *p, T *out, int64 n, int64 size) {
    for (Walk walk = fd_walk(size); walk.row < n; fd_walk_on(walk, size)) {
        const int64 at = walk.row * size + walk.item;
        out[at] = plus(x[at], p[walk.item]);
    }
}

// out = x + p for every row of x (n, size); out may be x.
FD_KERNEL offset(const real *x, const real *__restrict__ p, real *out, int64 n, int64 size, int fours) {
    if (fours) {
        shifted((const float4 *)x, (const float4 *)p, (float4 *)out, n, size / 4);
    } else {
        shifted(x, p, out, n, size);
    }
}

#define SUM_THREADS 256
#define SUM_COLUMNS 8
#define SUM_LANES 32

// The sums of the columns of x (rows, size). Each has SUM_LANES threads, of which each takes every SUM_LANES-th row,
// in order; then a tree.
FD_KERNEL column_sums(const real *__restrict__ x, real *__restrict__ out, int64 rows, int64 size) {
    FD_SHARED_ARRAY(real, sums, SUM_THREADS);
    const int thread = threadIdx.x, lane = thread / SUM_COLUMNS;
    for (int64 begin = (int64)blockIdx.x * SUM_COLUMNS; begin < size; begin += (int64)gridDim.x * SUM_COLUMNS) {
        const int64 column = begin + thread % SUM_COLUMNS, last = column < size ? rows : 0;
        real sum = 0;
        for (int64 row = lane; row < last; row += SUM_LANES) sum += x[row * size + column];
        sums[thread] = sum;
        for (int half = SUM_LANES / 2; half > 0; half /= 2) {
            fd_syncthreads();
            if (lane < half) sums[thread] += sums[thread + half * SUM_COLUMNS];
        }
        if (lane == 0 && column < size) out[column] = sums[thread];
        fd_syncthreads();
    }
}

// ------------------------------------------------------------------------------------------- rows of tables

FD_KERNEL fill(real *x, int64 size, real value) { FD_GRID_STRIDE(i, size) x[i] = value; }

FD_KERNEL take(const real *__restrict__ table, const int64 *__restrict__ index, real *__restrict__ out, int64 n,
               int64 width, int add) {
    for (Walk walk = fd_walk(width); walk.row < n; fd_walk_on(walk, width)) {
        const real value = table[index[walk.row] * width + walk.item];
        real *const to = out + walk.row * width + walk.item;
        *to = add ? *to + value : value;
    }
}

// The rows of dtable that an index names, as sums in the order of the batch; the others are left alone. A block takes
// a place of the batch: the first one with its index makes the row.
FD_KERNEL take_backward(const real *__restrict__ dy, const int64 *__restrict__ index, real *__restrict__ dtable,
                        int64 n, int64 width) {
    FD_SHARED_ARRAY(int, earlier, 1);
    for (int64 i = blockIdx.x; i < n; i += gridDim.x) {
        const int64 mine = index[i];
        fd_syncthreads();
        if (threadIdx.x == 0) *earlier = 0;
        fd_syncthreads();
        for (int64 k = threadIdx.x; k < i; k += blockDim.x) {
            if (index[k] == mine) fd_atomic_add(earlier, 1);
        }
        fd_syncthreads();
        if (*earlier) continue;
        for (int64 column = threadIdx.x; column < width; column += blockDim.x) {
            real sum = 0;
            for (int64 k = i; k < n; k++) {
                if (index[k] == mine) sum += dy[k * width + column];
            }
            dtable[mine * width + column] = sum;
        }
    }
}

// ------------------------------------------------------------------------------------------- draws

// A part of a training batch of pictures: positions first_row .. first_row + n - 1 of a step, as mlp_draw_batch draws
// it; with `flip`, mirrored where stream AUGMENT says so. A row is `width` pixels of `channels` values side by side, cut
// out, where stream AUGMENT says, of data of `tall` rows of `wide` pixels.
// `labels` and `chosen` may be null, and `step_at`, which holds the step where a graph repeats this. So may `covariates`
// (N, columns) and `asked`, which takes those of the batch. Words of stream DROP below `limit` make a label `classes`, the
// null class, and covariates zeros. Of `masked` data what is added to the target lies behind x0. N = 0: data,
// labels and covariates are those of the batch, by position.
FD_KERNEL draw_batch(const real *__restrict__ data, const int64 *__restrict__ labels,
                     const real *__restrict__ signal_t, const real *__restrict__ noise_t,
                     const real *__restrict__ of_noise_t, const real *__restrict__ of_data_t, real *__restrict__ x,
                     int64 *__restrict__ t, real *__restrict__ target, int64 *__restrict__ chosen,
                     const real *__restrict__ covariates, real *__restrict__ asked, int64 n, int64 size, int64 tall,
                     int64 wide, int masked, int64 width, int64 channels, int64 columns, int64 classes, uint64 limit, int64 N, int64 T,
                     uint64 first_row, uint32 step, const uint32 *__restrict__ step_at, int flip, RoundKeys keys) {
    if (step_at) step = *step_at;
    const int64 quarter = (size + 3) / 4, height = size / (width * channels), whole = tall * wide * channels;
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        const uint64 row = first_row + walk.row;
        const uint64 time_word = fd_words(row, 0, step, FD_STREAM_TRAIN_TIME, keys).w0;
        const uint64 data_word = fd_words(row, 0, step, FD_STREAM_BATCH, keys).w0;
        Words places = {0, 0, 0, 0};
        if (flip || whole > size) places = fd_words(row, 0, step, FD_STREAM_AUGMENT, keys);
        const bool mirrored = flip && places.w0 < 1u << 31;
        const int64 top = (int64)((uint64)places.w1 * (uint64)(tall - height + 1) >> 32);
        const int64 left = (int64)((uint64)places.w2 * (uint64)(wide - width + 1) >> 32);
        const int64 s = (int64)((time_word * (uint64)T) >> 32);
        const int64 from = N ? (int64)((data_word * (uint64)N) >> 32) : (int64)row;
        const float4 normals = fd_normals(row, (uint32)walk.item, step, FD_STREAM_TRAIN_NOISE, keys);
        const real z[4] = {normals.x, normals.y, normals.z, normals.w};
        FD_UNROLL
        for (int k = 0; k < 4; k++) {
            const int64 j = walk.item + k * quarter;
            if (j >= size) break;
            int64 at = from * whole * (1 + masked) + ((top + j / (width * channels)) * wide + left) * channels;
            at += j % (width * channels);
            if (mirrored) at += (width - 1 - 2 * (j / channels % width)) * channels;
            const real x0 = data[at];
            x[walk.row * size + j] = signal_t[s] * x0 + noise_t[s] * z[k];
            real wanted = of_noise_t[s] * z[k] + of_data_t[s] * x0;
            if (masked) wanted += data[at + whole];
            target[walk.row * size + j] = wanted;
        }
        if (walk.item == 0) {
            t[walk.row] = s;
            Words drop = {0, 0, 0, 0};
            if (limit) drop = fd_words(row, 0, step, FD_STREAM_DROP, keys);
            if (chosen) chosen[walk.row] = drop.w0 < limit ? classes : labels[from];
            for (int64 j = 0; j < columns; j++) {
                asked[walk.row * columns + j] = drop.w1 < limit ? 0 : covariates[from * columns + j];
            }
        }
    }
}

enum { ALL_TARGETS, RANDOM_TARGETS, BLOCK_TARGETS, TAIL_TARGETS };  // as in fastdiff/noise.py

FD_DEVICE int64 scaled_word(uint32 word, int64 bound) { return (int64)(((uint64)word * (uint64)bound) >> 32); }

// What is known of the positions first_row ... of a training batch that draw_batch, or mlp_draw_batch, has drawn: all that
// has been seen and is no target, by stream DROP (fastdiff.noise.targets has the law). Of each value `known` and `marks`,
// whose rows are `stride` apart, take x0 and 1, or 0 and 0; a known one has no noise in x, and a target of NaN.
FD_KERNEL draw_known(const real *__restrict__ data, const real *__restrict__ signal_t, const int64 *__restrict__ t,
                     real *__restrict__ x, real *__restrict__ target, real *__restrict__ known,
                     real *__restrict__ marks, int64 n, int64 stride, int64 pitch, int64 height, int64 width,
                     int64 channels, int kind, int64 N, uint64 first_row, uint32 step,
                     const uint32 *__restrict__ step_at, int flip, RoundKeys keys) {
    if (step_at) step = *step_at;
    const int64 size = height * width * channels;
    for (Walk walk = fd_walk(size); walk.row < n; fd_walk_on(walk, size)) {
        const uint64 row = first_row + walk.row;
        const int64 j = walk.item, pixel = j / channels, channel = j % channels, i = pixel / width, k = pixel % width;
        const Words words = fd_words(row, 1, step, FD_STREAM_DROP, keys);
        const int64 tenth = scaled_word(words.w0, 10), lines = scaled_word(words.w1, height) + 1,
                    columns = scaled_word(words.w1, width) + 1;
        const int64 which = kind == ALL_TARGETS ? (tenth + 2) / 3 : tenth ? kind : ALL_TARGETS;
        bool drawn = which == ALL_TARGETS;
        if (which == RANDOM_TARGETS) {
            const int64 cell = height > 1 ? pixel : j;
            const Words own = fd_words(row, (uint32)(2 + cell / 4), step, FD_STREAM_DROP, keys);
            const uint32 word = cell % 4 == 0 ? own.w0 : cell % 4 == 1 ? own.w1 : cell % 4 == 2 ? own.w2 : own.w3;
            drawn = word <= words.w1;
        } else if (which == BLOCK_TARGETS) {
            const int64 top = scaled_word(words.w3, height - lines + 1), left = scaled_word(words.w2, width - columns + 1);
            const int64 of = height > 1 ? channels : scaled_word(words.w3, channels + 1);
            drawn = i >= top && i < top + lines && k >= left && k < left + columns && (of == channels || of == channel);
        } else if (which == TAIL_TARGETS) {
            drawn = height > 1 ? i >= height - lines : k >= width - columns;
        }
        const uint64 data_word = fd_words(row, 0, step, FD_STREAM_BATCH, keys).w0;
        const bool mirrored = flip && fd_words(row, 0, step, FD_STREAM_AUGMENT, keys).w0 < 1u << 31;
        int64 at = (int64)((data_word * (uint64)N) >> 32) * pitch + j;
        if (mirrored) at += (width - 1 - 2 * k) * channels;
        const bool is_known = !drawn && (pitch == size || data[at + size] == 0);
        known[walk.row * stride + j] = is_known ? data[at] : 0;
        marks[walk.row * stride + j] = is_known ? 1 : 0;
        if (is_known) {
            x[walk.row * size + j] = signal_t[t[walk.row]] * data[at];
            target[walk.row * size + j] = fd_bits_float(0x7fc00000);
        }
    }
}

// x (n, d) becomes level times what is known, where something is: `known` has the values and then the marks of a row,
// rows being `stride` apart.
FD_KERNEL hold(real *__restrict__ x, const real *__restrict__ known, int64 n, int64 d, int64 stride, real level) {
    for (Walk walk = fd_walk(d); walk.row < n; fd_walk_on(walk, d)) {
        const real *const of_row = known + walk.row * stride;
        if (of_row[d + walk.item] != 0) x[walk.row * d + walk.item] = level * of_row[walk.item];
    }
}

// ------------------------------------------------------------------------------------------- dropout

// A thread takes a block of the noise law: four neighbours of an image of `size` values. What has a word of `limit` or
// more is kept, times `scale`. out may be x. `step_at` is as in draw_batch.
FD_KERNEL dropout(const real *x, real *out, int64 n, int64 size, uint64 limit, real scale, uint32 first_block,
                  uint64 first_row, uint32 step, const uint32 *__restrict__ step_at, RoundKeys keys, int fours) {
    if (step_at) step = *step_at;
    const int64 blocks = (size + 3) / 4;
    for (Walk walk = fd_walk(blocks); walk.row < n; fd_walk_on(walk, blocks)) {
        const Words words =
            fd_words(first_row + walk.row, first_block + (uint32)walk.item, step, FD_STREAM_DROPOUT, keys);
        const int64 at = walk.row * size + 4 * walk.item;
        const bool k0 = words.w0 >= limit, k1 = words.w1 >= limit, k2 = words.w2 >= limit, k3 = words.w3 >= limit;
        if (fours) {
            const float4 v = fd_load4(x + at);
            fd_store4(out + at, make_float4(k0 ? v.x * scale : 0, k1 ? v.y * scale : 0, k2 ? v.z * scale : 0,
                                            k3 ? v.w * scale : 0));
            continue;
        }
        const int64 left = size - 4 * walk.item;
        out[at] = k0 ? x[at] * scale : 0;
        if (left > 1) out[at + 1] = k1 ? x[at + 1] * scale : 0;
        if (left > 2) out[at + 2] = k2 ? x[at + 2] * scale : 0;
        if (left > 3) out[at + 3] = k3 ? x[at + 3] * scale : 0;
    }
}

// ------------------------------------------------------------------------------------------- the loss

#define CHUNK 4096

// The sum over the block, in thread 0. sums holds SUM_THREADS values.
FD_DEVICE double sum_block(double value, double *sums) {
    sums[threadIdx.x] = value;
    for (int half = SUM_THREADS / 2; half > 0; half /= 2) {
        fd_syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) value = sums[0];
    fd_syncthreads();  // before the next sum uses the memory
    return value;
}

// dy = (y - target) scale, and for every chunk the sum of (y - target)^2; where the target is NaN y - target is 0.
FD_KERNEL squared_error(const real *__restrict__ y, const real *__restrict__ target, real *__restrict__ dy, int64 size,
                        real scale, double *__restrict__ sums_chunks) {
    FD_SHARED_ARRAY(double, sums, SUM_THREADS);
    const int64 chunks = (size + CHUNK - 1) / CHUNK;
    for (int64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int64 end = min((chunk + 1) * CHUNK, size);
        double sum = 0;
        for (int64 i = chunk * CHUNK + threadIdx.x; i < end; i += SUM_THREADS) {
            const real wanted = target[i], difference = wanted == wanted ? y[i] - wanted : (real)0;
            sum += (double)difference * difference;
            dy[i] = difference * scale;
        }
        sum = sum_block(sum, sums);
        if (threadIdx.x == 0) sums_chunks[chunk] = sum;
    }
}

// The same for a loss by terms, (n, columns) with one row for `values` values of target: a weight w, or, where y has
// twice the channels, w, g, h, V, K, A. See LayerBackend.squared_error.
FD_KERNEL weighted_error(const real *__restrict__ y, const real *__restrict__ target, const real *__restrict__ terms,
                         real *__restrict__ dy, int64 size, int64 values, int64 channels, int columns, real scale,
                         double *__restrict__ sums_chunks) {
    FD_SHARED_ARRAY(double, sums, SUM_THREADS);
    const int64 chunks = (size + CHUNK - 1) / CHUNK;
    for (int64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int64 end = min((chunk + 1) * CHUNK, size);
        double sum = 0;
        for (int64 i = chunk * CHUNK + threadIdx.x; i < end; i += SUM_THREADS) {
            const real *of = terms + i / values * columns;
            const int64 at = columns > 1 ? i + i / channels * channels : i;
            const real wanted = target[i];
            const real difference = wanted == wanted ? y[at] - wanted : (real)0, square = difference * difference;
            sum += (double)(of[0] * square);
            dy[at] = difference * (scale * of[0]);
            if (columns == 1) continue;
            const real g = of[1], h = of[2], hv = h * y[at + channels];
            const real left = (of[3] + of[4] * square) * fd_exp(min(max(-hv, (real)-87), (real)88));
            sum += (double)(g * (hv + left + of[5]));
            dy[at + channels] = g * h * (1 - left) * (scale / 2);
        }
        sum = sum_block(sum, sums);
        if (threadIdx.x == 0) sums_chunks[chunk] = sum;
    }
}

// One block: the mean of `size` values whose sums over chunks these are, NaN of none.
FD_KERNEL mean_of_chunks(const double *__restrict__ sums_chunks, int64 chunks, int64 size, double *__restrict__ mean) {
    FD_SHARED_ARRAY(double, sums, SUM_THREADS);
    double sum = 0;
    for (int64 i = threadIdx.x; i < chunks; i += SUM_THREADS) sum += sums_chunks[i];
    sum = sum_block(sum, sums);
    if (threadIdx.x == 0) *mean = sum / (double)size;
}
