// LayerNorm over the channels of every row (pixel) of a matrix (rows, channels): y = gamma h + beta with
// h = (x - mean) scale and scale = 1 / sqrt(variance + eps).
//
// A team takes a row: `lanes` neighbouring threads of a warp, a power of two, so few that the row has a vector of V
// channels for each of them, or a whole warp. Lane l takes the vectors l, l + lanes, ..., and the team's sums are added
// as a tree. A row is read again for the variance around the mean and for the result, from the cache.
//
// `fours` is as in norm.cu: not 0 where there is a multiple of four channels, hence V = 4.

#include "elementary.cuh"
#include "norm.cuh"

#define THREADS 256
#define MOST_ROWS 256  // of a chunk

template <int V>
FD_DEVICE void normalise_rows(const real *x, const real *gamma, const real *beta, real *out, real *stats, int64 rows,
                              int channels, int lanes, real eps, bool at_once) {
    const int teams = blockDim.x / lanes, lane = threadIdx.x % lanes;
    for (int64 first = (int64)blockIdx.x * teams; first < rows; first += (int64)gridDim.x * teams) {
        const int64 row = first + threadIdx.x / lanes;
        const int end = row < rows ? channels : 0;  // all lanes of a warp take part in its sums
        const real *const from = x + row * channels;
        real values[V], sum = 0, squares = 0;
        for (int c = V * lane; c < end; c += V * lanes) {
            take<V>(values, from + c, at_once);
            sum += total<V>(values);
        }
        const real mean = fd_lane_sum(sum, lanes) / (real)channels;
        for (int c = V * lane; c < end; c += V * lanes) {
            take<V>(values, from + c, at_once);
            FD_UNROLL
            for (int j = 0; j < V; j++) squares = fmaf(values[j] - mean, values[j] - mean, squares);
        }
        const real scale = 1.0f / sqrtf(fd_lane_sum(squares, lanes) / (real)channels + eps);
        if (end && lane == 0) {
            stats[2 * row] = mean;
            stats[2 * row + 1] = scale;
        }
        for (int c = V * lane; c < end; c += V * lanes) {
            real factor[V], offset[V];
            take<V>(values, from + c, at_once);
            take<V>(factor, gamma + c, at_once);
            take<V>(offset, beta + c, at_once);
            FD_UNROLL
            for (int j = 0; j < V; j++) values[j] = fmaf(factor[j], (values[j] - mean) * scale, offset[j]);
            put<V>(out + row * channels + c, values, at_once);
        }
    }
}

FD_KERNEL layer_norm(const real *__restrict__ x, const real *__restrict__ gamma, const real *__restrict__ beta,
                     real *__restrict__ out, real *__restrict__ stats, int64 rows, int channels, int lanes, real eps,
                     int fours) {
    if (fours) {
        normalise_rows<4>(x, gamma, beta, out, stats, rows, channels, lanes, eps, fours == AT_ONCE);
    } else {
        normalise_rows<1>(x, gamma, beta, out, stats, rows, channels, lanes, eps, false);
    }
}

// What a block knows of a row: its mean and scale, and the means of dh and dh h, with dh = dy gamma.
template <int V>
FD_DEVICE void describe_rows(const real *dy, const real *x, const real *gamma, const real *stats, int64 first,
                             int count, int channels, int lanes, real *known, bool at_once) {
    const int teams = blockDim.x / lanes, lane = threadIdx.x % lanes;
    for (int begin = 0; begin < count; begin += teams) {
        const int own = begin + threadIdx.x / lanes, end = own < count ? channels : 0;
        const int64 row = first + own;
        const real mean = end ? stats[2 * row] : 0, scale = end ? stats[2 * row + 1] : 0;
        real sum = 0, by_h = 0;
        for (int c = V * lane; c < end; c += V * lanes) {
            real h[V], dh[V], factor[V];
            take<V>(h, x + row * channels + c, at_once);
            take<V>(dh, dy + row * channels + c, at_once);
            take<V>(factor, gamma + c, at_once);
            FD_UNROLL
            for (int j = 0; j < V; j++) {
                dh[j] *= factor[j];
                by_h = fmaf(dh[j], (h[j] - mean) * scale, by_h);
            }
            sum += total<V>(dh);
        }
        sum = fd_lane_sum(sum, lanes) / (real)channels;
        by_h = fd_lane_sum(by_h, lanes) / (real)channels;
        if (end && lane == 0) fd_store4(known + 4 * own, make_float4(mean, scale, sum, by_h));
    }
}

// dx = scale (dh - <dh> - h <dh h>), <.> being the mean over the channels. A block takes a chunk of `size` rows, first
// by rows and then, from the cache, by channels: a thread's rows in order, then a tree.
template <int V>
FD_DEVICE void differentiate_chunks(const real *dy, const real *x, const real *gamma, const real *stats, real *dx,
                                    real *sums_kc, real *sums_by_h_kc, int64 rows, int size, int channels, int lanes,
                                    int add, real *known, real *sums, bool at_once) {
    const int64 chunks = (rows + size - 1) / size;
    const Lanes block = lanes_of(channels / V, 1);
    for (int64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int64 first = chunk * size;
        const int count = (int)min((int64)size, rows - first);
        describe_rows<V>(dy, x, gamma, stats, first, count, channels, lanes, known, at_once);
        fd_syncthreads();
        for (int slab = 0; slab < block.count; slab += block.columns) {
            const int c = V * (slab + block.column);
            const bool here = block.active && c < channels;
            real factor[V], ab[2 * V] = {};
            if (here) {
                take<V>(factor, gamma + c, at_once);
                for (int own = block.row; own < count; own += block.rows) {
                    const int64 at = (first + own) * channels + c;
                    const float4 row = fd_load4(known + 4 * own);
                    real h[V], dv[V];
                    take<V>(h, x + at, at_once);
                    take<V>(dv, dy + at, at_once);
                    FD_UNROLL
                    for (int j = 0; j < V; j++) {
                        h[j] = (h[j] - row.x) * row.y;
                        ab[j] += dv[j];
                        ab[V + j] = fmaf(dv[j], h[j], ab[V + j]);
                    }
                    put_dx<V>(dx + at, dx + at, h, dv, factor, row.y, row.z, row.w, add, at_once);
                }
            }
            sum_rows<2 * V>(ab, block, sums);  // the barriers in it keep `known` until all have read it
            for (int j = 0; here && block.row == 0 && j < V; j++) {
                sums_kc[chunk * channels + c + j] = ab[j];
                sums_by_h_kc[chunk * channels + c + j] = ab[V + j];
            }
        }
    }
}

// dx, which may be dy, and of every chunk the sums of dy and of dy h over its rows.
FD_KERNEL FD_BOUNDS(THREADS, 4)
    layer_norm_backward(const real *dy, const real *__restrict__ x, const real *__restrict__ gamma,
                        const real *__restrict__ stats, real *dx, real *__restrict__ sums_kc,
                        real *__restrict__ sums_by_h_kc, int64 rows, int size, int channels, int lanes, int add,
                        int fours) {
    FD_SHARED_ARRAY(real, known, 4 * MOST_ROWS);
    FD_SHARED_ARRAY(real, sums, 8 * THREADS);
    if (fours) {
        differentiate_chunks<4>(dy, x, gamma, stats, dx, sums_kc, sums_by_h_kc, rows, size, channels, lanes, add, known,
                                sums, fours == AT_ONCE);
    } else {
        differentiate_chunks<1>(dy, x, gamma, stats, dx, sums_kc, sums_by_h_kc, rows, size, channels, lanes, add, known,
                                sums, false);
    }
}
