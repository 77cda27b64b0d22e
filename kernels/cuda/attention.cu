// Self-attention of images (N, L, 3 C): for every head of width d, S = q k^T / sqrt(d), P = exp(S - log sum exp S),
// y = P v; backward dS = P (dP - delta) with dP = dy v^T and delta the sum over the channels of dy y.
//
// All four results have one form: a row is a weighted sum of the rows of an operand, and the weights are made of
// products of rows. A block has a tile of rows (16 R, R for a thread) and a slab of the head's columns (64 J, 4 J for a
// thread) and goes over the other side in tiles of 64; the products of rows take chunks of DEPTH channels. So nothing
// depends on d but the number of chunks and slabs, and on L but the number of tiles; nothing is added up by two blocks.
//
//     result  rows     weights of      operand  products
//     y       queries  P, as it comes  v        q k
//     dv      keys     P               dy       k q
//     dk      keys     dS              q        k q, v dy
//     dq      queries  dS              k        q k, dy v
//
// Sums have a fixed order, which R and J do not change: over channels, and over the other side, ascending.
//
// Blocks have THREADS threads: 16 of them, half a warp, share the R rows.

#include "elementary.cuh"

#define THREADS 256
#define SIDE 16               // threads along rows, and along columns
#define TILE 64               // rows of the other side
#define DEPTH 32              // channels of a product that are staged at once
#define PITCH (DEPTH + 4)     // of staged rows: eight neighbours lie in different banks
#define WEIGHT_PITCH (TILE + 4)
#define ROLLED _Pragma("unroll 1")  // where more would not fit into the registers
#define MINUS_INFINITY fd_bits_float((int)0xff800000u)

// Rows of a matrix of an image's head.
struct Rows {
    const real *first;
    int pitch;
};

FD_DEVICE Rows rows_of(const real *array, int64 image, int length, int pitch, int at) {
    return {array + image * length * pitch + at, pitch};
}

// Stage `rows` rows from `begin` on, and of these the columns first .. first + 4 fours - 1; what is beyond the matrix,
// of `length` rows and `width` columns, is zero.
FD_DEVICE void stage(real *to, int to_pitch, const Rows &from, int begin, int rows, int length, int first, int fours,
                     int width, int at_once) {
    for (int i = threadIdx.x; i < rows * fours; i += THREADS) {
        const int row = i / fours, column = 4 * (i - row * fours), at = first + column;
        const bool inside = begin + row < length;
        const real *const source = from.first + (int64)(begin + row) * from.pitch + at;
        float4 four = make_float4(0, 0, 0, 0);
        if (inside && at_once && at + 3 < width) {
            four = fd_load4(source);
        } else if (inside) {
            if (at < width) four.x = source[0];
            if (at + 1 < width) four.y = source[1];
            if (at + 2 < width) four.z = source[2];
            if (at + 3 < width) four.w = source[3];
        }
        fd_store4(to + row * to_pitch + column, four);
    }
}

// products[i][j] = the product of row 16 i + y of a's tile and row 16 j + x of b's; x and y are the thread's place.
template <int R>
FD_DEVICE void multiply(real (&products)[R][4], const Rows &a, int a_begin, const Rows &b, int b_begin, int length,
                        int width, int at_once, real *a_staged, real *b_staged) {
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    FD_UNROLL
    for (int i = 0; i < R; i++) products[i][0] = products[i][1] = products[i][2] = products[i][3] = 0;
    for (int first = 0; first < width; first += DEPTH) {
        const int fours = min(DEPTH, width - first + 3) / 4;
        fd_syncthreads();
        stage(a_staged, PITCH, a, a_begin, SIDE * R, length, first, fours, width, at_once);
        stage(b_staged, PITCH, b, b_begin, TILE, length, first, fours, width, at_once);
        fd_syncthreads();
        ROLLED
        for (int k = 0; k < 4 * fours; k += 4) {
            float4 own[R];
            FD_UNROLL
            for (int i = 0; i < R; i++) own[i] = fd_load4(a_staged + (SIDE * i + y) * PITCH + k);
            FD_UNROLL
            for (int j = 0; j < 4; j++) {
                const float4 other = fd_load4(b_staged + (SIDE * j + x) * PITCH + k);
                FD_UNROLL
                for (int i = 0; i < R; i++) {
                    real sum = fmaf(own[i].x, other.x, products[i][j]);
                    sum = fmaf(own[i].y, other.y, sum);
                    sum = fmaf(own[i].z, other.z, sum);
                    products[i][j] = fmaf(own[i].w, other.w, sum);
                }
            }
        }
    }
}

// sums[i][4 j + c] += the weights of row 16 i + y times column 64 j + 4 x + c of the operand's tile of TILE rows.
template <int R, int J>
FD_DEVICE void accumulate(real (&sums)[R][4 * J], const real (&weights)[R][4], const Rows &operand, int begin,
                          int length, int column, int width, int at_once, real *weights_staged, real *operand_staged) {
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE, pitch = TILE * J;
    fd_syncthreads();
    FD_UNROLL
    for (int i = 0; i < R; i++) {
        FD_UNROLL
        for (int j = 0; j < 4; j++) weights_staged[(SIDE * i + y) * WEIGHT_PITCH + SIDE * j + x] = weights[i][j];
    }
    stage(operand_staged, pitch, operand, begin, TILE, length, column, SIDE * J, width, at_once);
    fd_syncthreads();
    ROLLED
    for (int k = 0; k < TILE; k += 4) {
        float4 own[R];
        FD_UNROLL
        for (int i = 0; i < R; i++) own[i] = fd_load4(weights_staged + (SIDE * i + y) * WEIGHT_PITCH + k);
        FD_UNROLL
        for (int row = 0; row < 4; row++) {
            FD_UNROLL
            for (int j = 0; j < J; j++) {
                const float4 other = fd_load4(operand_staged + (k + row) * pitch + TILE * j + 4 * x);
                FD_UNROLL
                for (int i = 0; i < R; i++) {
                    const real weight = row == 0 ? own[i].x : row == 1 ? own[i].y : row == 2 ? own[i].z : own[i].w;
                    sums[i][4 * j] = fmaf(weight, other.x, sums[i][4 * j]);
                    sums[i][4 * j + 1] = fmaf(weight, other.y, sums[i][4 * j + 1]);
                    sums[i][4 * j + 2] = fmaf(weight, other.z, sums[i][4 * j + 2]);
                    sums[i][4 * j + 3] = fmaf(weight, other.w, sums[i][4 * j + 3]);
                }
            }
        }
    }
}

// The slab's columns of the rows of a block, each times its factor.
template <int R, int J>
FD_DEVICE void put_rows(real *to, int pitch, int begin, int length, int column, int width, int at_once,
                        const real (&sums)[R][4 * J], const real (&factors)[R]) {
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    FD_UNROLL
    for (int i = 0; i < R; i++) {
        const int row = begin + SIDE * i + y;
        if (row >= length) continue;
        FD_UNROLL
        for (int j = 0; j < J; j++) {
            const int at = column + TILE * j + 4 * x;
            const float4 four = make_float4(sums[i][4 * j] * factors[i], sums[i][4 * j + 1] * factors[i],
                                            sums[i][4 * j + 2] * factors[i], sums[i][4 * j + 3] * factors[i]);
            real *const target = to + (int64)row * pitch + at;
            if (at_once && at + 3 < width) {
                fd_store4(target, four);
            } else {
                if (at < width) target[0] = four.x;
                if (at + 1 < width) target[1] = four.y;
                if (at + 2 < width) target[2] = four.z;
                if (at + 3 < width) target[3] = four.w;
            }
        }
    }
}

// What a block works on, and its shared memory.
struct Work {
    int64 image;
    int result, head, begin, column;  // the first row of its tile, and the first column of its slab in the head
    real *a, *b, *weights, *operand;
};

FD_DEVICE int64 work_count(int results, int64 images, int length, int heads, int width, int rows, int columns) {
    return (int64)results * images * heads * ((length + rows - 1) / rows) * ((width + columns - 1) / columns);
}

FD_DEVICE Work work_of(int64 item, int results, int length, int heads, int width, int rows, int columns,
                       real *shared) {
    const int slabs = (width + columns - 1) / columns;
    const int tiles = (length + rows - 1) / rows;
    Work work;
    work.result = (int)(item % results);
    item /= results;
    work.column = (int)(item % slabs) * columns;
    item /= slabs;
    work.begin = (int)(item % tiles) * rows;
    item /= tiles;
    work.head = (int)(item % heads);
    work.image = item / heads;
    work.a = shared;
    work.b = work.a + rows * PITCH;
    work.weights = work.b + TILE * PITCH;
    work.operand = work.weights + rows * WEIGHT_PITCH;
    return work;
}

// ------------------------------------------------------------------------------------------- forward

template <int R, int J>
FD_DEVICE void attention_items(const real *qkv, real *out, real *log_sums, int64 images, int length, int heads,
                               int width, real scale, int at_once, real *shared) {
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    const int channels = heads * width;
    const int64 items = work_count(1, images, length, heads, width, SIDE * R, TILE * J);
    for (int64 item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_of(item, 1, length, heads, width, SIDE * R, TILE * J, shared);
        const int head = work.head * width;
        const Rows queries = rows_of(qkv, work.image, length, 3 * channels, head);
        const Rows keys = rows_of(qkv, work.image, length, 3 * channels, channels + head);
        const Rows values = rows_of(qkv, work.image, length, 3 * channels, 2 * channels + head);
        // Of every row: the greatest score so far, and this lane's part of the sum of exponentials relative to it.
        real top[R], sum[R], sums[R][4 * J];
        FD_UNROLL
        for (int i = 0; i < R; i++) {
            top[i] = MINUS_INFINITY;
            sum[i] = 0;
            FD_UNROLL
            for (int j = 0; j < 4 * J; j++) sums[i][j] = 0;
        }
        for (int begin = 0; begin < length; begin += TILE) {
            real weights[R][4];
            multiply<R>(weights, queries, work.begin, keys, begin, length, width, at_once, work.a, work.b);
            FD_UNROLL
            for (int i = 0; i < R; i++) {
                real most = top[i];
                FD_UNROLL
                for (int j = 0; j < 4; j++) {
                    weights[i][j] = begin + SIDE * j + x < length ? weights[i][j] * scale : MINUS_INFINITY;
                    most = fmaxf(most, weights[i][j]);
                }
                for (int mask = 1; mask < SIDE; mask *= 2) most = fmaxf(most, fd_shuffle_xor(most, mask));
                const real kept = fd_exp(top[i] - most);
                top[i] = most;
                sum[i] *= kept;
                FD_UNROLL
                for (int j = 0; j < 4; j++) {
                    weights[i][j] = fd_exp(weights[i][j] - most);
                    sum[i] += weights[i][j];
                }
                FD_UNROLL
                for (int j = 0; j < 4 * J; j++) sums[i][j] *= kept;
            }
            accumulate<R, J>(sums, weights, values, begin, length, work.column, width, at_once, work.weights,
                             work.operand);
        }
        real factors[R];
        FD_UNROLL
        for (int i = 0; i < R; i++) {
            const real all = fd_lane_sum(sum[i], SIDE);
            const int row = work.begin + SIDE * i + y;
            factors[i] = 1.0f / all;
            if (x == 0 && work.column == 0 && row < length) {
                log_sums[(work.image * heads + work.head) * length + row] = top[i] + logf(all);
            }
        }
        put_rows<R, J>(out + work.image * length * channels + head, channels, work.begin, length, work.column, width,
                       at_once, sums, factors);
    }
}

// `shape`: 10 R + J. Shared memory: that of Work.
FD_KERNEL FD_BOUNDS(256, 2) attention(const real *__restrict__ qkv, real *__restrict__ out,
                                      real *__restrict__ log_sums, int64 images, int length, int heads, int width,
                                      real scale, int shape, int at_once) {
    FD_SHARED(real, shared);
    if (shape == 42) {
        attention_items<4, 2>(qkv, out, log_sums, images, length, heads, width, scale, at_once, shared);
    } else if (shape == 41) {
        attention_items<4, 1>(qkv, out, log_sums, images, length, heads, width, scale, at_once, shared);
    } else if (shape == 12) {
        attention_items<1, 2>(qkv, out, log_sums, images, length, heads, width, scale, at_once, shared);
    } else {
        attention_items<1, 1>(qkv, out, log_sums, images, length, heads, width, scale, at_once, shared);
    }
}

// ------------------------------------------------------------------------------------------- backward

// deltas (N, heads, L): a warp takes a row.
FD_KERNEL attention_deltas(const real *__restrict__ dy, const real *__restrict__ y, real *__restrict__ deltas,
                           int64 images, int length, int heads, int width) {
    const int lane = threadIdx.x % FD_WARP, warps = THREADS / FD_WARP;
    const int64 rows = images * heads * length;
    for (int64 i = (int64)blockIdx.x * warps + threadIdx.x / FD_WARP; i < rows; i += (int64)gridDim.x * warps) {
        const int64 pair = i / length, image = pair / heads;
        const int64 at = ((image * length + i - pair * length) * heads + pair - image * heads) * width;
        real sum = 0;
        for (int c = lane; c < width; c += FD_WARP) sum = fmaf(dy[at + c], y[at + c], sum);
        sum = fd_lane_sum(sum);
        if (lane == 0) deltas[i] = sum;
    }
}

template <int R, int J>
FD_DEVICE void attention_backward_items(const real *dy, const real *qkv, const real *log_sums, const real *deltas,
                                        real *dqkv, int64 images, int length, int heads, int width, real scale,
                                        int at_once, real *shared) {
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    const int channels = heads * width;
    const int64 items = work_count(3, images, length, heads, width, SIDE * R, TILE * J);
    enum { DV, DK, DQ };
    for (int64 item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_of(item, 3, length, heads, width, SIDE * R, TILE * J, shared);
        const int64 row_at = (work.image * heads + work.head) * length;
        const int head = work.head * width;
        const bool by_query = work.result == DQ;
        const Rows queries = rows_of(qkv, work.image, length, 3 * channels, head);
        const Rows keys = rows_of(qkv, work.image, length, 3 * channels, channels + head);
        const Rows values = rows_of(qkv, work.image, length, 3 * channels, 2 * channels + head);
        const Rows douts = rows_of(dy, work.image, length, channels, head);
        const Rows a = by_query ? queries : keys, b = by_query ? keys : queries;
        const Rows da = by_query ? douts : values, db = by_query ? values : douts;
        const Rows operand = by_query ? keys : work.result == DK ? queries : douts;
        real sums[R][4 * J], factors[R];
        FD_UNROLL
        for (int i = 0; i < R; i++) {
            factors[i] = 1;
            FD_UNROLL
            for (int j = 0; j < 4 * J; j++) sums[i][j] = 0;
        }
        for (int begin = 0; begin < length; begin += TILE) {
            real weights[R][4], changes[R][4];
            multiply<R>(weights, a, work.begin, b, begin, length, width, at_once, work.a, work.b);
            if (work.result != DV) {
                multiply<R>(changes, da, work.begin, db, begin, length, width, at_once, work.a, work.b);
            }
            FD_UNROLL
            for (int i = 0; i < R; i++) {
                const int row = work.begin + SIDE * i + y;
                FD_UNROLL
                for (int j = 0; j < 4; j++) {
                    const int column = begin + SIDE * j + x, query = by_query ? row : column;
                    if (row >= length || column >= length) {
                        weights[i][j] = 0;
                        continue;
                    }
                    const real p = fd_exp(fmaf(weights[i][j], scale, -log_sums[row_at + query]));
                    weights[i][j] = work.result == DV ? p : p * (changes[i][j] - deltas[row_at + query]) * scale;
                }
            }
            accumulate<R, J>(sums, weights, operand, begin, length, work.column, width, at_once, work.weights,
                             work.operand);
        }
        const int part = by_query ? 0 : work.result == DK ? channels : 2 * channels;
        put_rows<R, J>(dqkv + work.image * length * 3 * channels + part + head, 3 * channels, work.begin, length,
                       work.column, width, at_once, sums, factors);
    }
}

FD_KERNEL FD_BOUNDS(256, 2) attention_backward(const real *__restrict__ dy, const real *__restrict__ qkv,
                                               const real *__restrict__ log_sums, const real *__restrict__ deltas,
                                               real *__restrict__ dqkv, int64 images, int length, int heads,
                                               int width, real scale, int shape, int at_once) {
    FD_SHARED(real, shared);
    if (shape == 22) {
        attention_backward_items<2, 2>(dy, qkv, log_sums, deltas, dqkv, images, length, heads, width, scale, at_once,
                                       shared);
    } else if (shape == 21) {
        attention_backward_items<2, 1>(dy, qkv, log_sums, deltas, dqkv, images, length, heads, width, scale, at_once,
                                       shared);
    } else if (shape == 12) {
        attention_backward_items<1, 2>(dy, qkv, log_sums, deltas, dqkv, images, length, heads, width, scale, at_once,
                                       shared);
    } else {
        attention_backward_items<1, 1>(dy, qkv, log_sums, deltas, dqkv, images, length, heads, width, scale, at_once,
                                       shared);
    }
}

// The tangent of y for that of qkv: dy = (P dS) v + P dv - <P dS> y with dS = (dq k^T + q dk^T) scale, <.> being the sum
// over the keys. A warp has a query and up to TANGENT_COLUMNS of its head's columns; keys are added in their order.
enum { TANGENT_COLUMNS = 128, LANE_COLUMNS = TANGENT_COLUMNS / FD_WARP };

FD_KERNEL FD_BOUNDS(THREADS, 1)
    attention_tangent(const real *__restrict__ dqkv, const real *__restrict__ qkv, const real *__restrict__ y,
                      const real *__restrict__ log_sums, real *__restrict__ dy, int64 images, int length, int heads,
                      int width, real scale) {
    const int lane = threadIdx.x % FD_WARP, slabs = (width + TANGENT_COLUMNS - 1) / TANGENT_COLUMNS;
    const int64 channels = (int64)heads * width, pitch = 3 * channels;
    const int64 items = images * heads * length * slabs, warps = (int64)gridDim.x * blockDim.x / FD_WARP;
    for (int64 item = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / FD_WARP; item < items; item += warps) {
        const int64 row = item / slabs;  // of (images, heads, length)
        const int first = (int)(item % slabs) * TANGENT_COLUMNS, query = (int)(row % length);
        const int64 head = row / length % heads, image = row / length / heads;
        const int64 begin = image * length * pitch + head * width, at = begin + query * pitch;
        const real sum = log_sums[row];
        real acc[LANE_COLUMNS] = {0, 0, 0, 0}, total = 0;
        for (int key = 0; key < length; key++) {
            const int64 of_key = begin + key * pitch + channels;
            real s = 0, ds = 0;
            for (int j = lane; j < width; j += FD_WARP) {
                s = fmaf(qkv[at + j], qkv[of_key + j], s);
                ds = fmaf(dqkv[at + j], qkv[of_key + j], ds);
                ds = fmaf(qkv[at + j], dqkv[of_key + j], ds);
            }
            const real p = fd_exp(fd_lane_sum(s) * scale - sum), dp = p * (fd_lane_sum(ds) * scale);
            total += dp;
            FD_UNROLL
            for (int c = 0; c < LANE_COLUMNS; c++) {
                const int j = first + c * FD_WARP + lane;
                if (j >= width) break;
                acc[c] = fmaf(dp, qkv[of_key + channels + j], fmaf(p, dqkv[of_key + channels + j], acc[c]));
            }
        }
        FD_UNROLL
        for (int c = 0; c < LANE_COLUMNS; c++) {
            const int j = first + c * FD_WARP + lane;
            if (j >= width) break;
            const int64 to = (image * length + query) * channels + head * width + j;
            dy[to] = acc[c] - total * y[to];
        }
    }
}
