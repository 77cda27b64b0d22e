// GroupNorm of images (N, pixels, channels), with its modulation and SiLU: u = gamma h + beta with h = (x - mean) scale
// and scale = 1 / sqrt(variance + eps), v = (1 + gain) u + shift, y = SiLU(v).
//
// A block takes a bundle: neighbouring groups of an image, so many that the channels it reads of a pixel lie in whole
// sectors of memory. Where the bundle's values of all pixels fit into shared memory they are read once (norm_forward,
// norm_backward); else pixels are taken in chunks, first for the sums and then for the result (_chunks, _apply). The
// layer's sizes decide which, and how many threads a block has, never the batch. The variance is that around the mean,
// in a second pass. Sums have a fixed order: a thread's own values, then a tree, then chunks, then images.
//
// `fours`: not 0 where a group has a multiple of four channels: a thread takes four neighbours. Where it is
// AT_ONCE all arrays are 16-byte aligned; that changes no bits.

#include "elementary.cuh"
#include "norm.cuh"

#define MOST_THREADS 256  // but for norm_forward, which may have twice as many

// What a block works on.
struct Item {
    int64 image, chunk, first, last;  // its pixels
    int begin, width;                 // its channels
};

FD_DEVICE Item item_of(int64 item, int64 pixels, int64 rows, int64 chunks, int channels, int bundle) {
    const int64 bundles = (channels + bundle - 1) / bundle, pair = item / chunks;
    Item found;
    found.chunk = item - pair * chunks;
    found.image = pair / bundles;
    found.begin = (int)(pair - found.image * bundles) * bundle;
    found.width = min(bundle, channels - found.begin);
    found.first = found.chunk * rows;
    found.last = min(found.first + rows, pixels);
    return found;
}

// Channels of images that lie in `whole` or, where `left` is not 0, in two arrays side by side: their first `left` in the
// first. `at` is where one of them lies in pixel 0, `pitch` how far pixels are from each other there.
template <class T>
struct Side {
    T *at;
    int pitch;
};

template <class T>
FD_DEVICE Side<T> side_of(T *whole, T *first, T *second, int left, int64 pixel, int channels, int channel) {
    if (!left) return {whole + pixel * channels + channel, channels};
    if (channel < left) return {first + pixel * left + channel, left};
    const int right = channels - left;
    return {second + pixel * right + channel - left, right};
}

// The sums of the first row's values over the members of each group, in all lanes of the group.
template <int K>
FD_DEVICE void sum_members(real (&values)[K], const Lanes &lanes, real *sums) {
    const int thread = threadIdx.x, threads = blockDim.x;
    FD_UNROLL
    for (int k = 0; k < K; k++) sums[k * threads + thread] = values[k];
    for (int n = lanes.members; n > 1;) {
        const int half = (n + 1) / 2;
        fd_syncthreads();
        if (lanes.row == 0 && lanes.member + half < n) {
            FD_UNROLL
            for (int k = 0; k < K; k++) sums[k * threads + thread] += sums[k * threads + thread + half];
        }
        n = half;
    }
    fd_syncthreads();
    FD_UNROLL
    for (int k = 0; k < K; k++) values[k] = sums[k * threads + lanes.column - lanes.member];
    fd_syncthreads();
}

FD_DEVICE real sum_group(real value, const Lanes &lanes, real *sums) {
    real values[1] = {value};
    sum_rows<1>(values, lanes, sums);
    sum_members<1>(values, lanes, sums);
    return values[0];
}

// Factor and offset of V channels: v = factor h + offset.
template <int V>
FD_DEVICE void affine(real (&factor)[V], real (&offset)[V], const real *gamma, const real *beta,
                      const real *modulation, int64 image, int channels, int channel, bool at_once) {
    take<V>(factor, gamma + channel, at_once);
    take<V>(offset, beta + channel, at_once);
    if (!modulation) return;
    real gain[V], shift[V];
    take<V>(gain, modulation + image * 2 * channels + channel, at_once);
    take<V>(shift, modulation + image * 2 * channels + channels + channel, at_once);
    FD_UNROLL
    for (int j = 0; j < V; j++) {
        factor[j] *= 1.0f + gain[j];
        offset[j] = fmaf(1.0f + gain[j], offset[j], shift[j]);
    }
}

// ------------------------------------------------------------------------------------------- forward

template <int V>
FD_DEVICE void normalise(const real (&values)[V], real *to, real mean, real scale, const real (&factor)[V],
                         const real (&offset)[V], int silu, bool at_once) {
    real y[V];
    FD_UNROLL
    for (int j = 0; j < V; j++) {
        const real v = fmaf(factor[j], (values[j] - mean) * scale, offset[j]);
        y[j] = silu ? fd_silu(v) : v;
    }
    put<V>(to, y, at_once);
}

// Of x, or where `left` is not 0 of `first` and `second` side by side, which `joined` is filled with.
template <int V, bool at_once>
FD_DEVICE void norm_items(const real *x, const real *first, const real *second, int left, real *joined,
                          const real *gamma, const real *beta, const real *modulation, real *out, real *stats,
                          int64 images, int64 pixels, int channels, int group, int bundle, real eps, int silu,
                          real *tile, real *sums) {
    const int64 items = images * ((channels + bundle - 1) / bundle);
    const int step = V * blockDim.x;
    for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
        const Item item = item_of(i, pixels, pixels, 1, channels, bundle);
        const Lanes lanes = lanes_of(item.width / V, group / V);
        const int64 at = item.image * pixels * channels + item.begin;
        real values[V], sum = 0, squares = 0;
        real *own = tile + V * threadIdx.x;  // a thread finds again what it put there itself
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            const Side<const real> from =
                side_of<const real>(x, first, second, left, item.image * pixels, channels, item.begin + V * c);
            int64 p = lanes.row;
            for (; p + 3 * lanes.rows < pixels; p += 4 * lanes.rows, own += 4 * step) {
                real some[4][V];
                take_pixels<V, 4>(some, from.at + p * from.pitch, lanes.rows * from.pitch, at_once);
                FD_UNROLL
                for (int k = 0; k < 4; k++) {
                    put<V>(own + k * step, some[k]);
                    sum += total<V>(some[k]);
                }
            }
            for (; p < pixels; p += lanes.rows, own += step) {
                take<V>(values, from.at + p * from.pitch, at_once);
                put<V>(own, values);
                sum += total<V>(values);
            }
        }
        const real size = (real)(pixels * group), mean = sum_group(sum, lanes, sums) / size;
        own = tile + V * threadIdx.x;
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            for (int64 p = lanes.row; p < pixels; p += lanes.rows, own += step) {
                take<V>(values, own);
                FD_UNROLL
                for (int j = 0; j < V; j++) squares = fmaf(values[j] - mean, values[j] - mean, squares);
            }
        }
        const real scale = 1.0f / sqrtf(sum_group(squares, lanes, sums) / size + eps);
        if (lanes.row == 0 && lanes.member == 0) {
            const int64 g = item.image * (channels / group) + item.begin / group + lanes.column / lanes.members;
            stats[2 * g] = mean;
            stats[2 * g + 1] = scale;
        }
        own = tile + V * threadIdx.x;
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            real factor[V], offset[V];
            affine<V>(factor, offset, gamma, beta, modulation, item.image, channels, item.begin + V * c, at_once);
            for (int64 p = lanes.row; p < pixels; p += lanes.rows, own += step) {
                take<V>(values, own);
                if (left) put<V>(joined + at + p * channels + V * c, values, at_once);
                normalise<V>(values, out + at + p * channels + V * c, mean, scale, factor, offset, silu, at_once);
            }
        }
    }
}

// Shared memory: a bundle's values of all pixels, rounded up to whole rows of lanes.
FD_KERNEL FD_BOUNDS(512, 2) norm_forward(const real *__restrict__ x, const real *__restrict__ gamma,
                                         const real *__restrict__ beta, const real *__restrict__ modulation,
                                         real *__restrict__ out, real *__restrict__ stats, int64 images, int64 pixels,
                                         int channels, int group, int bundle, real eps, int silu, int fours) {
    FD_SHARED(real, tile);
    FD_SHARED_ARRAY(real, sums, 2 * MOST_THREADS);
    if (fours == AT_ONCE) {
        norm_items<4, true>(x, nullptr, nullptr, 0, nullptr, gamma, beta, modulation, out, stats, images, pixels, channels, group, bundle, eps, silu, tile, sums);
    } else if (fours) {
        norm_items<4, false>(x, nullptr, nullptr, 0, nullptr, gamma, beta, modulation, out, stats, images, pixels, channels, group, bundle, eps, silu, tile, sums);
    } else {
        norm_items<1, false>(x, nullptr, nullptr, 0, nullptr, gamma, beta, modulation, out, stats, images, pixels, channels, group, bundle, eps, silu, tile, sums);
    }
}

// The same of `first`, with `left` channels, and `second` side by side, which x is filled with. It has twice the registers.
FD_KERNEL FD_BOUNDS(512, 1) norm_joined(real *__restrict__ x, const real *__restrict__ first,
                                        const real *__restrict__ second, int left, const real *__restrict__ gamma,
                                        const real *__restrict__ beta, const real *__restrict__ modulation,
                                        real *__restrict__ out, real *__restrict__ stats, int64 images, int64 pixels,
                                        int channels, int group, int bundle, real eps, int silu, int fours) {
    FD_SHARED(real, tile);
    FD_SHARED_ARRAY(real, sums, 2 * MOST_THREADS);
    if (fours == AT_ONCE) {
        norm_items<4, true>(nullptr, first, second, left, x, gamma, beta, modulation, out, stats, images, pixels, channels, group, bundle, eps, silu, tile, sums);
    } else if (fours) {
        norm_items<4, false>(nullptr, first, second, left, x, gamma, beta, modulation, out, stats, images, pixels, channels, group, bundle, eps, silu, tile, sums);
    } else {
        norm_items<1, false>(nullptr, first, second, left, x, gamma, beta, modulation, out, stats, images, pixels, channels, group, bundle, eps, silu, tile, sums);
    }
}

template <int V, bool at_once>
FD_DEVICE void norm_chunk_items(const real *x, real *chunks_ngk, int64 images, int64 pixels, int64 rows, int64 chunks,
                                int channels, int group, int bundle, real *sums) {
    const int64 items = images * ((channels + bundle - 1) / bundle) * chunks;
    for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
        const Item item = item_of(i, pixels, rows, chunks, channels, bundle);
        const Lanes lanes = lanes_of(item.width / V, group / V);
        const real *const from = x + item.image * pixels * channels + item.begin;
        real values[V], sum = 0, squares = 0;
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            int64 p = item.first + lanes.row;
            for (; p + 3 * lanes.rows < item.last; p += 4 * lanes.rows) {
                real some[4][V];
                take_pixels<V, 4>(some, from + p * channels + V * c, lanes.rows * channels, at_once);
                FD_UNROLL
                for (int k = 0; k < 4; k++) sum += total<V>(some[k]);
            }
            for (; p < item.last; p += lanes.rows) {
                take<V>(values, from + p * channels + V * c, at_once);
                sum += total<V>(values);
            }
        }
        const real mean = sum_group(sum, lanes, sums) / (real)((item.last - item.first) * group);
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            for (int64 p = item.first + lanes.row; p < item.last; p += lanes.rows) {  // in the cache
                take<V>(values, from + p * channels + V * c, at_once);
                FD_UNROLL
                for (int j = 0; j < V; j++) squares = fmaf(values[j] - mean, values[j] - mean, squares);
            }
        }
        squares = sum_group(squares, lanes, sums);
        if (lanes.row == 0 && lanes.member == 0) {
            const int64 g = item.image * (channels / group) + item.begin / group + lanes.column / lanes.members;
            chunks_ngk[2 * (g * chunks + item.chunk)] = mean;
            chunks_ngk[2 * (g * chunks + item.chunk) + 1] = squares;
        }
    }
}

// Of every chunk of `rows` pixels and every group, the mean and the sum of the squares around it.
FD_KERNEL norm_chunks(const real *__restrict__ x, real *__restrict__ chunks_ngk, int64 images, int64 pixels, int64 rows,
                      int64 chunks, int channels, int group, int bundle, int fours) {
    FD_SHARED_ARRAY(real, sums, MOST_THREADS);
    if (fours == AT_ONCE) {
        norm_chunk_items<4, true>(x, chunks_ngk, images, pixels, rows, chunks, channels, group, bundle, sums);
    } else if (fours) {
        norm_chunk_items<4, false>(x, chunks_ngk, images, pixels, rows, chunks, channels, group, bundle, sums);
    } else {
        norm_chunk_items<1, false>(x, chunks_ngk, images, pixels, rows, chunks, channels, group, bundle, sums);
    }
}

template <int V, bool at_once>
FD_DEVICE void norm_apply_items(const real *x, const real *chunks_ngk, const real *gamma, const real *beta,
                                const real *modulation, real *out, real *stats, int64 images, int64 pixels, int64 rows,
                                int64 chunks, int channels, int group, int bundle, real eps, int silu, real *found) {
    const int64 items = images * ((channels + bundle - 1) / bundle) * chunks;
    const int warp = threadIdx.x / FD_WARP, lane = threadIdx.x % FD_WARP, warps = blockDim.x / FD_WARP;
    for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
        const Item item = item_of(i, pixels, rows, chunks, channels, bundle);
        const Lanes lanes = lanes_of(item.width / V, group / V);
        const real size = (real)(pixels * group);
        fd_syncthreads();
        // sum (x - mean)^2 is, chunk by chunk, that around the chunk's mean and count (chunk's mean - mean)^2.
        for (int own = warp; own < item.width / group; own += warps) {
            const int64 g = item.image * (channels / group) + item.begin / group + own;
            const real *const parts = chunks_ngk + 2 * g * chunks;
            real sum = 0, squares = 0;
            for (int64 k = lane; k < chunks; k += FD_WARP) {
                sum = fmaf((real)((min((k + 1) * rows, pixels) - k * rows) * group), parts[2 * k], sum);
            }
            const real mean = fd_lane_sum(sum) / size;
            for (int64 k = lane; k < chunks; k += FD_WARP) {
                const real off = parts[2 * k] - mean;
                squares += fmaf((real)((min((k + 1) * rows, pixels) - k * rows) * group), off * off, parts[2 * k + 1]);
            }
            const real scale = 1.0f / sqrtf(fd_lane_sum(squares) / size + eps);
            if (lane == 0) {
                found[2 * own] = mean;
                found[2 * own + 1] = scale;
                if (item.chunk == 0) {
                    stats[2 * g] = mean;
                    stats[2 * g + 1] = scale;
                }
            }
        }
        fd_syncthreads();
        const int own = lanes.column / lanes.members;
        const real mean = found[2 * own], scale = found[2 * own + 1];
        const int64 at = item.image * pixels * channels + item.begin;
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            real factor[V], offset[V], values[V];
            affine<V>(factor, offset, gamma, beta, modulation, item.image, channels, item.begin + V * c, at_once);
            int64 p = item.first + lanes.row;
            for (; p + 3 * lanes.rows < item.last; p += 4 * lanes.rows) {
                const int64 from = at + p * channels + V * c, stride = lanes.rows * channels;
                real some[4][V];
                take_pixels<V, 4>(some, x + from, stride, at_once);
                FD_UNROLL
                for (int k = 0; k < 4; k++) {
                    normalise<V>(some[k], out + from + k * stride, mean, scale, factor, offset, silu, at_once);
                }
            }
            for (; p < item.last; p += lanes.rows) {
                take<V>(values, x + at + p * channels + V * c, at_once);
                normalise<V>(values, out + at + p * channels + V * c, mean, scale, factor, offset, silu, at_once);
            }
        }
    }
}

#define MOST_GROUPS 32  // of a bundle

FD_KERNEL norm_apply(const real *__restrict__ x, const real *__restrict__ chunks_ngk, const real *__restrict__ gamma,
                     const real *__restrict__ beta, const real *__restrict__ modulation, real *__restrict__ out,
                     real *__restrict__ stats, int64 images, int64 pixels, int64 rows, int64 chunks, int channels,
                     int group, int bundle, real eps, int silu, int fours) {
    FD_SHARED_ARRAY(real, found, 2 * MOST_GROUPS);
    if (fours == AT_ONCE) {
        norm_apply_items<4, true>(x, chunks_ngk, gamma, beta, modulation, out, stats, images, pixels, rows, chunks, channels, group, bundle, eps, silu, found);
    } else if (fours) {
        norm_apply_items<4, false>(x, chunks_ngk, gamma, beta, modulation, out, stats, images, pixels, rows, chunks, channels, group, bundle, eps, silu, found);
    } else {
        norm_apply_items<1, false>(x, chunks_ngk, gamma, beta, modulation, out, stats, images, pixels, rows, chunks, channels, group, bundle, eps, silu, found);
    }
}

// ------------------------------------------------------------------------------------------- backward
//
// With m values in a group, <.> their mean, and dh = dv factor: dx = scale (dh - <dh> - h <dh h>). Everything else
// comes from two sums over the pixels of an image, for each channel: a of dv and b of dv h. Then the sums of dh and of
// dh h are those of factor a and factor b over the group's channels; dshift = a, dgain = gamma b + beta a, and dgamma
// and dbeta are the sums of (1 + gain) b and (1 + gain) a over the images.

// h, and dv in the place of dy.
template <int V>
FD_DEVICE void differentiate(real (&h)[V], real (&dv)[V], real mean, real scale, const real (&factor)[V],
                             const real (&offset)[V], int silu) {
    FD_UNROLL
    for (int j = 0; j < V; j++) {
        h[j] = (h[j] - mean) * scale;
        if (silu) dv[j] = fd_silu_backward(dv[j], fmaf(factor[j], h[j], offset[j]));
    }
}

// The sums of V channels to where the parameters' gradients, and the modulation's, are made of them.
FD_DEVICE void put_sums(real a, real b, real *sums_nc, real *dmodulation, const real *gamma, const real *beta,
                        int64 image, int channels, int channel) {
    sums_nc[2 * (image * channels + channel)] = a;
    sums_nc[2 * (image * channels + channel) + 1] = b;
    if (dmodulation) {
        real *const row = dmodulation + image * 2 * channels;
        row[channel] = fmaf(gamma[channel], b, beta[channel] * a);
        row[channels + channel] = a;
    }
}

template <int V, bool at_once>
FD_DEVICE void norm_backward_items(const real *dy, const real *x, const real *gamma, const real *beta,
                                   const real *modulation, const real *stats, real *dx, real *first, real *second,
                                   int left, real *sums_nc, real *dmodulation, int64 images, int64 pixels, int channels,
                                   int group, int bundle, int silu, int add, real *tile, real *sums) {
    const int64 items = images * ((channels + bundle - 1) / bundle);
    const int step = V * blockDim.x;
    for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
        const Item item = item_of(i, pixels, pixels, 1, channels, bundle);
        const Lanes lanes = lanes_of(item.width / V, group / V);
        const int64 at = item.image * pixels * channels + item.begin;
        const int64 g = item.image * (channels / group) + item.begin / group + lanes.column / lanes.members;
        const real mean = stats[2 * g], scale = stats[2 * g + 1];
        real h[V], dv[V], both[2] = {0, 0};  // both: the sums of dh and dh h
        real *own = tile + V * threadIdx.x;
        for (int slab = 0; slab < lanes.count; slab += lanes.columns) {
            const int c = slab + lanes.column, channel = item.begin + V * c;
            const bool here = lanes.active && c < lanes.count;
            real factor[V], offset[V], ab[2 * V] = {};
            if (here) {
                affine<V>(factor, offset, gamma, beta, modulation, item.image, channels, channel, at_once);
                int64 p = lanes.row;
                const auto add_pixel = [&](real (&of_x)[V], real (&of_dy)[V]) {
                    differentiate<V>(of_x, of_dy, mean, scale, factor, offset, silu);
                    put<V>(own, of_dy);
                    own += step;
                    FD_UNROLL
                    for (int j = 0; j < V; j++) {
                        ab[j] += of_dy[j];
                        ab[V + j] = fmaf(of_dy[j], of_x[j], ab[V + j]);
                    }
                };
                for (; p + lanes.rows < pixels; p += 2 * lanes.rows) {
                    const int64 from = at + p * channels + V * c, stride = lanes.rows * channels;
                    real some[2][V], of_dy[2][V];
                    take_pixels<V, 2>(some, x + from, stride, at_once);
                    take_pixels<V, 2>(of_dy, dy + from, stride, at_once);
                    add_pixel(some[0], of_dy[0]);
                    add_pixel(some[1], of_dy[1]);
                }
                for (; p < pixels; p += lanes.rows) {
                    take<V>(h, x + at + p * channels + V * c, at_once);
                    take<V>(dv, dy + at + p * channels + V * c, at_once);
                    add_pixel(h, dv);
                }
            }
            sum_rows<2 * V>(ab, lanes, sums);
            if (here && lanes.row == 0) {
                FD_UNROLL
                for (int j = 0; j < V; j++) {
                    put_sums(ab[j], ab[V + j], sums_nc, dmodulation, gamma, beta, item.image, channels, channel + j);
                    both[0] = fmaf(factor[j], ab[j], both[0]);
                    both[1] = fmaf(factor[j], ab[V + j], both[1]);
                }
            }
        }
        sum_members<2>(both, lanes, sums);
        const real size = (real)(pixels * group), dh = both[0] / size, dhh = both[1] / size;
        own = tile + V * threadIdx.x;
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            real factor[V], offset[V];
            affine<V>(factor, offset, gamma, beta, modulation, item.image, channels, item.begin + V * c, at_once);
            const Side<real> to =
                side_of<real>(dx, first, second, left, item.image * pixels, channels, item.begin + V * c);
            for (int64 p = lanes.row; p < pixels; p += lanes.rows, own += step) {
                take<V>(h, x + at + p * channels + V * c, at_once);  // from the cache
                take<V>(dv, own);
                FD_UNROLL
                for (int j = 0; j < V; j++) h[j] = (h[j] - mean) * scale;
                const real *const before = dx + at + p * channels + V * c;
                put_dx<V>(to.at + p * to.pitch, before, h, dv, factor, scale, dh, dhh, add, at_once);
            }
        }
    }
}

// Fills dx, dmodulation and the sums a and b (N, channels, 2); dx may be dy. Where `left` is not 0 dx is only read, and
// the sum goes on to `first` and `second`. Shared memory: as of norm_forward, for dv.
FD_KERNEL FD_BOUNDS(256, 3) norm_backward(const real *dy, const real *__restrict__ x, const real *__restrict__ gamma,
                                          const real *__restrict__ beta, const real *__restrict__ modulation,
                                          const real *__restrict__ stats, real *dx, real *__restrict__ first,
                                          real *__restrict__ second, int left, real *__restrict__ sums_nc,
                                          real *__restrict__ dmodulation, int64 images, int64 pixels, int channels,
                                          int group, int bundle, int silu, int add, int fours) {
    FD_SHARED(real, tile);
    FD_SHARED_ARRAY(real, sums, 8 * MOST_THREADS);
    if (fours == AT_ONCE) {
        norm_backward_items<4, true>(dy, x, gamma, beta, modulation, stats, dx, first, second, left, sums_nc, dmodulation, images, pixels, channels, group, bundle, silu, add, tile, sums);
    } else if (fours) {
        norm_backward_items<4, false>(dy, x, gamma, beta, modulation, stats, dx, first, second, left, sums_nc, dmodulation, images, pixels, channels, group, bundle, silu, add, tile, sums);
    } else {
        norm_backward_items<1, false>(dy, x, gamma, beta, modulation, stats, dx, first, second, left, sums_nc, dmodulation, images, pixels, channels, group, bundle, silu, add, tile, sums);
    }
}

template <int V, bool at_once>
FD_DEVICE void norm_backward_chunk_items(const real *dy, const real *x, const real *gamma, const real *beta,
                                         const real *modulation, const real *stats, real *sums_nkc, int64 images,
                                         int64 pixels, int64 rows, int64 chunks, int channels, int group, int bundle,
                                         int silu, real *sums) {
    const int64 items = images * ((channels + bundle - 1) / bundle) * chunks;
    for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
        const Item item = item_of(i, pixels, rows, chunks, channels, bundle);
        const Lanes lanes = lanes_of(item.width / V, group / V);
        const int64 at = item.image * pixels * channels + item.begin;
        const int64 g = item.image * (channels / group) + item.begin / group + lanes.column / lanes.members;
        const real mean = stats[2 * g], scale = stats[2 * g + 1];
        for (int slab = 0; slab < lanes.count; slab += lanes.columns) {
            const int c = slab + lanes.column, channel = item.begin + V * c;
            const bool here = lanes.active && c < lanes.count;
            real factor[V], offset[V], ab[2 * V] = {};
            if (here) {
                affine<V>(factor, offset, gamma, beta, modulation, item.image, channels, channel, at_once);
                for (int64 p = item.first + lanes.row; p < item.last; p += lanes.rows) {
                    real h[V], dv[V];
                    take<V>(h, x + at + p * channels + V * c, at_once);
                    take<V>(dv, dy + at + p * channels + V * c, at_once);
                    differentiate<V>(h, dv, mean, scale, factor, offset, silu);
                    FD_UNROLL
                    for (int j = 0; j < V; j++) {
                        ab[j] += dv[j];
                        ab[V + j] = fmaf(dv[j], h[j], ab[V + j]);
                    }
                }
            }
            sum_rows<2 * V>(ab, lanes, sums);
            if (here && lanes.row == 0) {
                real *const to = sums_nkc + 2 * ((item.image * chunks + item.chunk) * channels + channel);
                FD_UNROLL
                for (int j = 0; j < V; j++) {
                    to[2 * j] = ab[j];
                    to[2 * j + 1] = ab[V + j];
                }
            }
        }
    }
}

// a and b of every chunk of `rows` pixels.
FD_KERNEL norm_backward_chunks(const real *__restrict__ dy, const real *__restrict__ x,
                               const real *__restrict__ gamma, const real *__restrict__ beta,
                               const real *__restrict__ modulation, const real *__restrict__ stats,
                               real *__restrict__ sums_nkc, int64 images, int64 pixels, int64 rows, int64 chunks,
                               int channels, int group, int bundle, int silu, int fours) {
    FD_SHARED_ARRAY(real, sums, 8 * MOST_THREADS);
    if (fours == AT_ONCE) {
        norm_backward_chunk_items<4, true>(dy, x, gamma, beta, modulation, stats, sums_nkc, images, pixels, rows, chunks, channels, group, bundle, silu, sums);
    } else if (fours) {
        norm_backward_chunk_items<4, false>(dy, x, gamma, beta, modulation, stats, sums_nkc, images, pixels, rows, chunks, channels, group, bundle, silu, sums);
    } else {
        norm_backward_chunk_items<1, false>(dy, x, gamma, beta, modulation, stats, sums_nkc, images, pixels, rows, chunks, channels, group, bundle, silu, sums);
    }
}

#define SUM_LANES 8  // that share the sum of a channel; a block has 256 threads

// The sums over `lane` of a channel's two values, in lane 0.
FD_DEVICE void sum_lanes(real &a, real &b, real *sums) {
    const int lane = threadIdx.x / FD_WARP, column = threadIdx.x % FD_WARP;
    fd_syncthreads();
    sums[2 * threadIdx.x] = a;
    sums[2 * threadIdx.x + 1] = b;
    fd_syncthreads();
    for (int k = 1; lane == 0 && k < SUM_LANES; k++) {
        a += sums[2 * (k * FD_WARP + column)];
        b += sums[2 * (k * FD_WARP + column) + 1];
    }
}

// a and b of the images from those of their chunks, and dmodulation.
FD_KERNEL norm_backward_images(const real *__restrict__ sums_nkc, const real *__restrict__ gamma,
                               const real *__restrict__ beta, real *__restrict__ sums_nc,
                               real *__restrict__ dmodulation, int64 images, int64 chunks, int channels) {
    FD_SHARED_ARRAY(real, sums, 2 * SUM_LANES * FD_WARP);
    const int lane = threadIdx.x / FD_WARP, column = threadIdx.x % FD_WARP, across = (channels + FD_WARP - 1) / FD_WARP;
    for (int64 i = blockIdx.x; i < images * across; i += gridDim.x) {
        const int64 image = i / across;
        const int channel = (int)(i - image * across) * FD_WARP + column;
        real a = 0, b = 0;
        for (int64 k = lane; channel < channels && k < chunks; k += SUM_LANES) {
            a += sums_nkc[2 * ((image * chunks + k) * channels + channel)];
            b += sums_nkc[2 * ((image * chunks + k) * channels + channel) + 1];
        }
        sum_lanes(a, b, sums);
        if (lane == 0 && channel < channels) {
            put_sums(a, b, sums_nc, dmodulation, gamma, beta, image, channels, channel);
        }
    }
}

template <int V, bool at_once>
FD_DEVICE void norm_backward_apply_items(const real *dy, const real *x, const real *gamma, const real *beta,
                                         const real *modulation, const real *stats, const real *sums_nc, real *dx,
                                         int64 images, int64 pixels, int64 rows, int64 chunks, int channels, int group,
                                         int bundle, int silu, int add, real *sums) {
    const int64 items = images * ((channels + bundle - 1) / bundle) * chunks;
    for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
        const Item item = item_of(i, pixels, rows, chunks, channels, bundle);
        const Lanes lanes = lanes_of(item.width / V, group / V);
        const int64 at = item.image * pixels * channels + item.begin;
        const int64 g = item.image * (channels / group) + item.begin / group + lanes.column / lanes.members;
        const real mean = stats[2 * g], scale = stats[2 * g + 1], size = (real)(pixels * group);
        real factor[V], offset[V], both[2] = {0, 0};
        for (int c = lanes.column; lanes.row == 0 && c < lanes.count; c += lanes.columns) {
            affine<V>(factor, offset, gamma, beta, modulation, item.image, channels, item.begin + V * c, at_once);
            const real *const own = sums_nc + 2 * (item.image * channels + item.begin + V * c);
            FD_UNROLL
            for (int j = 0; j < V; j++) {
                both[0] = fmaf(factor[j], own[2 * j], both[0]);
                both[1] = fmaf(factor[j], own[2 * j + 1], both[1]);
            }
        }
        sum_members<2>(both, lanes, sums);
        const real dh = both[0] / size, dhh = both[1] / size;
        for (int c = lanes.column; lanes.active && c < lanes.count; c += lanes.columns) {
            affine<V>(factor, offset, gamma, beta, modulation, item.image, channels, item.begin + V * c, at_once);
            for (int64 p = item.first + lanes.row; p < item.last; p += lanes.rows) {
                real h[V], dv[V];
                take<V>(h, x + at + p * channels + V * c, at_once);
                take<V>(dv, dy + at + p * channels + V * c, at_once);
                differentiate<V>(h, dv, mean, scale, factor, offset, silu);
                real *const to = dx + at + p * channels + V * c;
                put_dx<V>(to, to, h, dv, factor, scale, dh, dhh, add, at_once);
            }
        }
    }
}

// dx, which may be dy, from a and b of the images.
FD_KERNEL norm_backward_apply(const real *dy, const real *__restrict__ x, const real *__restrict__ gamma,
                              const real *__restrict__ beta, const real *__restrict__ modulation,
                              const real *__restrict__ stats, const real *__restrict__ sums_nc, real *dx, int64 images,
                              int64 pixels, int64 rows, int64 chunks, int channels, int group, int bundle, int silu,
                              int add, int fours) {
    FD_SHARED_ARRAY(real, sums, 2 * MOST_THREADS);
    if (fours == AT_ONCE) {
        norm_backward_apply_items<4, true>(dy, x, gamma, beta, modulation, stats, sums_nc, dx, images, pixels, rows, chunks, channels, group, bundle, silu, add, sums);
    } else if (fours) {
        norm_backward_apply_items<4, false>(dy, x, gamma, beta, modulation, stats, sums_nc, dx, images, pixels, rows, chunks, channels, group, bundle, silu, add, sums);
    } else {
        norm_backward_apply_items<1, false>(dy, x, gamma, beta, modulation, stats, sums_nc, dx, images, pixels, rows, chunks, channels, group, bundle, silu, add, sums);
    }
}

// dgamma and dbeta of many norms: every eighth image in order, then the eight sums. A block takes 32 channels.
FD_KERNEL norm_parameters(const real *__restrict__ sums_nc, const real *__restrict__ modulation, real *dgamma,
                          real *dbeta, NormTasks tasks) {
    FD_SHARED_ARRAY(real, sums, 2 * SUM_LANES * FD_WARP);
    FD_SHARED_ARRAY(NormTask, mine, 1);
    const int lane = threadIdx.x / FD_WARP, block = fd_find_task(tasks, mine), channels = mine->channels;
    const int64 channel = (int64)block * FD_WARP + threadIdx.x % FD_WARP, images = mine->images;
    const bool modulated = mine->modulated;
    sums_nc += mine->sums;
    modulation += modulated ? mine->modulation : 0;
    real a = 0, b = 0;
    for (int64 n = lane; channel < channels && n < images; n += SUM_LANES) {
        const real factor = modulated ? 1.0f + modulation[n * 2 * channels + channel] : 1.0f;
        a = fmaf(factor, sums_nc[2 * (n * channels + channel)], a);
        b = fmaf(factor, sums_nc[2 * (n * channels + channel) + 1], b);
    }
    sum_lanes(a, b, sums);
    if (lane == 0 && channel < channels) {
        dbeta[mine->dbeta + channel] = a;
        dgamma[mine->dgamma + channel] = b;
    }
}

// out, which may be dh, is the tangent of GroupNorm's result for that of the normalised values h: with
// u = gamma h + beta and v = (1 + gain) u + shift, dv = (1 + gain) gamma dh + dgain u + dshift, through SiLU'(v).
FD_KERNEL norm_tangent(const real *dh, const real *x, const real *gamma, const real *beta, const real *modulation,
                       const real *dmodulation, const real *stats, real *out, int64 images, int64 pixels,
                       int64 channels, int64 group, int silu) {
    const int64 groups = channels / group, size = pixels * channels;
    for (Walk walk = fd_walk(size); walk.row < images; fd_walk_on(walk, size)) {
        const int64 n = walk.row, at = n * size + walk.item, c = walk.item % channels, row = 2 * n * channels + c;
        const real gain = modulation ? modulation[row] : 0, shift = modulation ? modulation[row + channels] : 0;
        real dv = (1.0f + gain) * (gamma[c] * dh[at]);
        if (silu || dmodulation) {
            const real *const moments = stats + 2 * (n * groups + c / group);
            const real u = gamma[c] * ((x[at] - moments[0]) * moments[1]) + beta[c];
            if (dmodulation) dv += dmodulation[row] * u + dmodulation[row + channels];
            if (silu) dv = fd_silu_backward(dv, (1.0f + gain) * u + shift);
        }
        out[at] = dv;
    }
}
