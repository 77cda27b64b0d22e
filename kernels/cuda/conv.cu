// Convolutions in float32: forward, input gradient and weight gradient as matrix products whose operands are never
// laid out in memory; conv.cuh says which pixels meet.
//
// A block makes a tile of BM pixels (the weight gradient: taps and channels) times BN channels, DEPTH products at a
// time: two pairs of tiles in shared memory, one multiplied while the next is on its way through registers. A thread
// makes TM times TN values. A value that is read from global memory is used BM or BN times: 128 x 64 does 21 operations
// for every byte, 64 x 32 does 11. From shared memory, 8 x 8 reads 4 times 16 bytes for 64 fused multiply-adds, 4 x 4
// twice for 16. Estimated, not measured: 75 % and 50 % of the float32 peak.
//
// Every output is one chain of fused multiply-adds over taps and channels ascending, whatever its tile; only `rows`
// variants, for images of one pixel, cut it into SPLIT chains that are added in order. The weight gradient adds up
// pixels of fixed chunks, and conv_weights_finish the chunks. Offsets have 64 bits, tails are zeros in shared memory.
#include "conv.cuh"

enum { VECTOR_SOURCE = 1, VECTOR_WEIGHT = 2, VECTOR_TARGET = 4 };  // 16 bytes at once: aligned, channels in fours

// Four values from p on, of which `left` exist; then a multiple of 4 where `vector` says so.
FD_DEVICE float4 conv_load4(const real *p, int left, bool vector) {
    if (vector) return left > 0 ? fd_load4(p) : make_float4(0, 0, 0, 0);
    return make_float4(left > 0 ? p[0] : 0, left > 1 ? p[1] : 0, left > 2 ? p[2] : 0, left > 3 ? p[3] : 0);
}

// Column of a tile, from four values along a row of memory.
FD_DEVICE void conv_store_column(real *tile, int pitch, float4 v) {
    tile[0] = v.x;
    tile[pitch] = v.y;
    tile[2 * pitch] = v.z;
    tile[3 * pitch] = v.w;
}

// A tile and the threads that make it. Eight lanes lie side by side along the columns, so that a warp reads 4 x 8
// groups of four values: one pass over the banks for each operand.
template <int BM_, int BN_, int TM_, int TN_, int DEPTH_>
struct ConvTile {
    static constexpr int BM = BM_, BN = BN_, TM = TM_, TN = TN_, DEPTH = DEPTH_, THREADS = BM / TM * (BN / TN);
    static constexpr int A_PITCH = BM + 4, B_PITCH = BN + 4, A_SIZE = DEPTH * A_PITCH, B_SIZE = DEPTH * B_PITCH;
    static constexpr int ACROSS = BN / TN, LANES = ACROSS < 8 ? ACROSS : 8;
    // Groups of four values that are fetched, and how many of them by one thread.
    static constexpr int A_QUADS = BM * DEPTH / 4, A_LOADS = (A_QUADS + THREADS - 1) / THREADS;
    static constexpr int B_QUADS = BN * DEPTH / 4, B_LOADS = (B_QUADS + THREADS - 1) / THREADS;
    static_assert(A_QUADS % THREADS == 0 && THREADS % (BM / 4) == 0, "all threads fetch the same of A");
    static_assert(B_QUADS % THREADS == 0 || B_LOADS == 1, "threads fetch the same of B, or some of them nothing");

    // Value (r, c) of a thread; four neighbouring ones are side by side, the next four BM / (TM / 4) further.
    FD_DEVICE int row(int thread, int r) {
        const int warp_row = thread / FD_WARP / (ACROSS / LANES);
        return (warp_row * (FD_WARP / LANES) + thread % FD_WARP / LANES) * 4 + r % 4 + r / 4 * (BM * 4 / TM);
    }
    FD_DEVICE int column(int thread, int c) {
        const int warp_column = thread / FD_WARP % (ACROSS / LANES);
        return (warp_column * LANES + thread % LANES) * 4 + c % 4 + c / 4 * (BN * 4 / TN);
    }

    // acc += A B for two tiles in shared memory, from the thread's first row of A and column of B on.
    FD_DEVICE void multiply(real (&acc)[TM][TN], const real *a_tile, const real *b_tile) {
        FD_UNROLL
        for (int k = 0; k < DEPTH; k++) {
            float4 a[TM / 4], b[TN / 4];
            FD_UNROLL
            for (int r = 0; r < TM / 4; r++) a[r] = fd_load4(a_tile + k * A_PITCH + r * (BM * 4 / TM));
            FD_UNROLL
            for (int c = 0; c < TN / 4; c++) b[c] = fd_load4(b_tile + k * B_PITCH + c * (BN * 4 / TN));
            FD_UNROLL
            for (int r = 0; r < TM; r++) {
                const float4 v = a[r / 4];
                const real x = r % 4 == 0 ? v.x : r % 4 == 1 ? v.y : r % 4 == 2 ? v.z : v.w;
                FD_UNROLL
                for (int c = 0; c < TN; c += 4) {
                    acc[r][c] = fmaf(x, b[c / 4].x, acc[r][c]);
                    acc[r][c + 1] = fmaf(x, b[c / 4].y, acc[r][c + 1]);
                    acc[r][c + 2] = fmaf(x, b[c / 4].z, acc[r][c + 2]);
                    acc[r][c + 3] = fmaf(x, b[c / 4].w, acc[r][c + 3]);
                }
            }
        }
    }
};

template <int TM, int TN>
FD_DEVICE void conv_zero(real (&acc)[TM][TN]) {
    FD_UNROLL
    for (int r = 0; r < TM; r++) {
        FD_UNROLL
        for (int c = 0; c < TN; c++) acc[r][c] = 0;
    }
}

// A pixel of a tile: where it lies in the target (-1: nowhere) and what its first tap sees: row, column and number of a
// pixel of the source, which may be outside.
struct ConvSeen {
    int64 target, source;
    int row, column, image;
};

template <bool ADJOINT>
FD_DEVICE ConvSeen conv_see(const ConvSizes &sizes, const ConvPhase &rows, const ConvPhase &columns,
                            const ConvPixel &pixel) {
    const int *const size = ADJOINT ? sizes.output : sizes.input;
    const int row = pixel.row * rows.step + rows.low, column = pixel.column * columns.step + columns.low;
    return {conv_target<ADJOINT>(sizes, pixel, rows, columns), ((int64)pixel.image * size[0] + row) * size[1] + column,
            row, column, pixel.image};
}

// Four values to `to`, of which `left` exist, after those of up to three rows are added; any of these may be null.
FD_DEVICE void conv_finish4(real *to, float4 y, const real *first, const real *second, const real *third, int left,
                            bool vector) {
    const real *const added[3] = {first, second, third};
    FD_UNROLL
    for (int k = 0; k < 3; k++) {
        if (!added[k]) continue;
        const float4 v = conv_load4(added[k], left, vector);
        y = make_float4(y.x + v.x, y.y + v.y, y.z + v.z, y.w + v.w);
    }
    if (vector) {
        if (left > 0) fd_store4(to, y);
        return;
    }
    if (left > 0) to[0] = y.x;
    if (left > 1) to[1] = y.y;
    if (left > 2) to[2] = y.z;
    if (left > 3) to[3] = y.w;
}

// ------------------------------------------------------------------------------------------- forward, input gradient

// target (.., T channels) = taps of source (.., S channels) times weights + bias + shift of the image + residual, each
// of which may be null; residual may be target. ADJOINT reads the weights (T, S), else (S, T). Blocks: tiles of
// channels within pairs of phases within tiles of pixels.
template <bool ADJOINT, class Tile, int SPLIT>
FD_DEVICE void conv_gather(const real *source, const real *weight, const real *bias, const real *shift,
                           const real *residual, real *target, const ConvSizes &sizes, int vectors, uint32 block) {
    constexpr int THREADS = Tile::THREADS, BM = Tile::BM, BN = Tile::BN, TM = Tile::TM, TN = Tile::TN;
    constexpr int DEPTH = Tile::DEPTH, LINE = DEPTH / 4;  // LINE groups of four are one row of memory
    FD_SHARED_ARRAY(real, a_tiles, SPLIT * 2 * Tile::A_SIZE);
    FD_SHARED_ARRAY(real, b_tiles, SPLIT * 2 * Tile::B_SIZE);
    FD_SHARED_ARRAY(ConvSeen, pixels, BM);
    FD_SHARED_ARRAY(ConvPhase, phases, 2);  // there, not in registers: needed rarely
    const int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
    real *const a_tile = a_tiles + group * 2 * Tile::A_SIZE, *const b_tile = b_tiles + group * 2 * Tile::B_SIZE;
    const int from = ADJOINT ? sizes.outputs : sizes.channels, to = ADJOINT ? sizes.channels : sizes.outputs;
    const int height = ADJOINT ? sizes.output[0] : sizes.input[0], width = ADJOINT ? sizes.output[1] : sizes.input[1];

    const int across = (to + BN - 1) / BN, pairs_across = conv_phases<ADJOINT>(sizes, 1);
    const int pairs = conv_phases<ADJOINT>(sizes, 0) * pairs_across;
    const uint32 item = block / across;
    const int pair = (int)(item % pairs), first_channel = (int)(block % across) * BN;
    if (threadIdx.x == 0) {
        phases[0] = conv_phase<ADJOINT>(sizes, 0, pair / pairs_across);
        phases[1] = conv_phase<ADJOINT>(sizes, 1, pair % pairs_across);
    }
    fd_syncthreads();
    const ConvPhase &rows = phases[0], &columns = phases[1];
    const int64 first_pixel = (int64)(item / pairs) * BM, count = (int64)sizes.images * rows.count * columns.count;
    if (first_pixel >= count) return;
    for (int r = threadIdx.x; r < BM; r += SPLIT * THREADS) {
        pixels[r].target = -1;
        if (first_pixel + r >= count) continue;
        pixels[r] = conv_see<ADJOINT>(sizes, rows, columns, conv_pixel(first_pixel + r, rows, columns));
    }
    fd_syncthreads();

    // Step k of group g is tile k SPLIT + g of the tiles (tap row, tap column, DEPTH channels).
    const int steps_of_tap = (from + DEPTH - 1) / DEPTH, end = steps_of_tap * DEPTH;
    const int steps = (rows.taps * columns.taps * steps_of_tap + SPLIT - 1) / SPLIT;
    int i = 0, j = 0, channel = group * DEPTH;
    const real *a_from[Tile::A_LOADS], *b_from[Tile::B_LOADS];
    int b_row[Tile::B_LOADS];
    float4 a[Tile::A_LOADS], b[Tile::B_LOADS];

    // Goes on to the tap that `channel` has come to, and finds where its values begin; null outside the source, and
    // beyond the last tap.
    const auto find = [&]() {
        for (; channel >= end && i < rows.taps; channel -= end) {
            if (++j == columns.taps) j = 0, i++;
        }
        const bool inside = i < rows.taps;
        FD_UNROLL
        for (int l = 0; l < Tile::A_LOADS; l++) {
            const ConvSeen &pixel = pixels[(l * THREADS + thread) / LINE];
            const bool there = inside && pixel.target >= 0 && (uint32)(pixel.row + i) < (uint32)height &&
                               (uint32)(pixel.column + j) < (uint32)width;
            a_from[l] = there ? source + (pixel.source + (int64)i * width + j) * from : nullptr;
        }
        const real *const matrix =
            weight + (int64)(inside ? conv_weight<ADJOINT>(sizes, rows, columns, i, j) : 0) * from * to;
        FD_UNROLL
        for (int l = 0; l < Tile::B_LOADS; l++) {
            const int quad = l * THREADS + thread;
            if (ADJOINT) {
                const int row = first_channel + quad / LINE;
                b_row[l] = 0;
                b_from[l] = inside && quad < Tile::B_QUADS && row < to ? matrix + (int64)row * from : nullptr;
            } else {
                b_row[l] = quad / (BN / 4);
                b_from[l] = inside && quad < Tile::B_QUADS ? matrix : nullptr;
            }
        }
    };
    const auto load = [&]() {
        const int place = thread % LINE * 4, left = from - channel - place;
        FD_UNROLL
        for (int l = 0; l < Tile::A_LOADS; l++) {
            a[l] = a_from[l] ? conv_load4(a_from[l] + channel + place, left, vectors & VECTOR_SOURCE)
                             : make_float4(0, 0, 0, 0);
        }
        FD_UNROLL
        for (int l = 0; l < Tile::B_LOADS; l++) {
            b[l] = make_float4(0, 0, 0, 0);
            if (!b_from[l]) continue;
            if (ADJOINT) {
                b[l] = conv_load4(b_from[l] + channel + place, left, vectors & VECTOR_WEIGHT);
            } else if (channel + b_row[l] < from) {
                const int column = first_channel + (l * THREADS + thread) % (BN / 4) * 4;
                b[l] = conv_load4(b_from[l] + (int64)(channel + b_row[l]) * to + column, to - column,
                                  vectors & VECTOR_WEIGHT);
            }
        }
    };
    const auto store = [&](int half) {
        FD_UNROLL
        for (int l = 0; l < Tile::A_LOADS; l++) {
            const int quad = l * THREADS + thread;
            real *const tile = a_tile + half * Tile::A_SIZE;
            conv_store_column(tile + quad % LINE * 4 * Tile::A_PITCH + quad / LINE, Tile::A_PITCH, a[l]);
        }
        FD_UNROLL
        for (int l = 0; l < Tile::B_LOADS; l++) {
            const int quad = l * THREADS + thread;
            if (quad >= Tile::B_QUADS) continue;
            real *const tile = b_tile + half * Tile::B_SIZE;
            if (ADJOINT)
                conv_store_column(tile + quad % LINE * 4 * Tile::B_PITCH + quad / LINE, Tile::B_PITCH, b[l]);
            else
                fd_store4(tile + quad / (BN / 4) * Tile::B_PITCH + quad % (BN / 4) * 4, b[l]);
        }
    };

    real acc[TM][TN];
    conv_zero(acc);
    const real *const a_first = a_tile + Tile::row(thread, 0), *const b_first = b_tile + Tile::column(thread, 0);
    if (steps > 0) {
        find();
        load();
        store(0);
        fd_syncthreads();
    }
    for (int step = 0; step < steps; step++) {
        const int half = step % 2;
        if (step + 1 < steps) {
            channel += SPLIT * DEPTH;
            if (channel >= end) find();
            load();
        }
        Tile::multiply(acc, a_first + half * Tile::A_SIZE, b_first + half * Tile::B_SIZE);
        if (step + 1 < steps) {
            store(1 - half);
            fd_syncthreads();
        }
    }
    if (SPLIT > 1) {  // the other groups' sums, in order
        FD_SHARED_ARRAY(real, sums, SPLIT > 1 ? BM * BN : 4);
        for (int g = 1; g < SPLIT; g++) {
            FD_UNROLL
            for (int r = 0; group == g && r < TM; r++) {
                FD_UNROLL
                for (int c = 0; c < TN; c++) sums[Tile::row(thread, r) * BN + Tile::column(thread, c)] = acc[r][c];
            }
            fd_syncthreads();
            FD_UNROLL
            for (int r = 0; group == 0 && r < TM; r++) {
                FD_UNROLL
                for (int c = 0; c < TN; c++) acc[r][c] += sums[Tile::row(thread, r) * BN + Tile::column(thread, c)];
            }
            fd_syncthreads();
        }
        if (group > 0) return;
    }
    FD_UNROLL
    for (int r = 0; r < TM; r++) {
        const ConvSeen &pixel = pixels[Tile::row(thread, r)];
        if (pixel.target < 0) continue;
        const int64 row = pixel.target * to, own = (int64)pixel.image * to;
        FD_UNROLL
        for (int c = 0; c < TN; c += 4) {
            const int k = first_channel + Tile::column(thread, c);
            const float4 y = make_float4(acc[r][c], acc[r][c + 1], acc[r][c + 2], acc[r][c + 3]);
            conv_finish4(target + row + k, y, bias ? bias + k : nullptr, shift ? shift + own + k : nullptr,
                         residual ? residual + row + k : nullptr, to - k, vectors & VECTOR_TARGET);
        }
    }
}

// Tiles by their pixels and channels; those of the input gradient have pixels and channels of the input.
FD_KERNEL FD_BOUNDS(128, 3)
    conv_128x64(const real *__restrict__ source, const real *__restrict__ weight, const real *bias, const real *shift,
                const real *residual, real *target, ConvSizes sizes, int vectors) {
    conv_gather<false, ConvTile<128, 64, 8, 8, 8>, 1>(source, weight, bias, shift, residual, target, sizes, vectors, blockIdx.x);
}

FD_KERNEL FD_BOUNDS(128, 4)
    conv_64x32(const real *__restrict__ source, const real *__restrict__ weight, const real *bias, const real *shift,
               const real *residual, real *target, ConvSizes sizes, int vectors) {
    conv_gather<false, ConvTile<64, 32, 4, 4, 16>, 1>(source, weight, bias, shift, residual, target, sizes, vectors, blockIdx.x);
}

FD_KERNEL FD_BOUNDS(64, 8)
    conv_128x8(const real *__restrict__ source, const real *__restrict__ weight, const real *bias, const real *shift,
               const real *residual, real *target, ConvSizes sizes, int vectors) {
    conv_gather<false, ConvTile<128, 8, 4, 4, 8>, 1>(source, weight, bias, shift, residual, target, sizes, vectors, blockIdx.x);
}

FD_KERNEL FD_BOUNDS(256, 1)
    conv_rows(const real *__restrict__ source, const real *__restrict__ weight, const real *bias, const real *shift,
              const real *residual, real *target, ConvSizes sizes, int vectors) {
    conv_gather<false, ConvTile<32, 32, 4, 4, 16>, 4>(source, weight, bias, shift, residual, target, sizes, vectors, blockIdx.x);
}

FD_KERNEL FD_BOUNDS(128, 3)
    conv_input_128x64(const real *__restrict__ source, const real *__restrict__ weight, const real *residual,
                      real *target, ConvSizes sizes, int vectors) {
    conv_gather<true, ConvTile<128, 64, 8, 8, 8>, 1>(source, weight, nullptr, nullptr, residual, target, sizes, vectors, blockIdx.x);
}

FD_KERNEL FD_BOUNDS(128, 4)
    conv_input_64x32(const real *__restrict__ source, const real *__restrict__ weight, const real *residual,
                     real *target, ConvSizes sizes, int vectors) {
    conv_gather<true, ConvTile<64, 32, 4, 4, 16>, 1>(source, weight, nullptr, nullptr, residual, target, sizes, vectors, blockIdx.x);
}

FD_KERNEL FD_BOUNDS(64, 8)
    conv_input_128x8(const real *__restrict__ source, const real *__restrict__ weight, const real *residual,
                     real *target, ConvSizes sizes, int vectors) {
    conv_gather<true, ConvTile<128, 8, 4, 4, 8>, 1>(source, weight, nullptr, nullptr, residual, target, sizes, vectors, blockIdx.x);
}

FD_KERNEL FD_BOUNDS(256, 1)
    conv_input_rows(const real *__restrict__ source, const real *__restrict__ weight, const real *residual,
                    real *target, ConvSizes sizes, int vectors) {
    conv_gather<true, ConvTile<32, 32, 4, 4, 16>, 4>(source, weight, nullptr, nullptr, residual, target, sizes, vectors, blockIdx.x);
}

// The same for many layers of rows, with their own weights and targets; sources too, for input gradients.
FD_KERNEL FD_BOUNDS(256, 1) conv_rows_many(const real *__restrict__ source, const real *__restrict__ weight,
                                           const real *bias, real *target, GatherTasks tasks) {
    FD_SHARED_ARRAY(GatherTask, mine, 1);
    const int block = fd_find_task(tasks, mine);
    conv_gather<false, ConvTile<32, 32, 4, 4, 16>, 4>(source + mine->source, weight + mine->weight, bias + mine->bias,
                                                      nullptr, nullptr, target + mine->target, mine->sizes,
                                                      mine->vectors, block);
}

FD_KERNEL FD_BOUNDS(256, 1) conv_input_rows_many(const real *__restrict__ source, const real *__restrict__ weight,
                                                 real *target, GatherTasks tasks) {
    FD_SHARED_ARRAY(GatherTask, mine, 1);
    const int block = fd_find_task(tasks, mine);
    conv_gather<true, ConvTile<32, 32, 4, 4, 16>, 4>(source + mine->source, weight + mine->weight, nullptr, nullptr,
                                                     nullptr, target + mine->target, mine->sizes, mine->vectors, block);
}

// Folded weights (places, C, K) of a convolution with upsampling: each place is the sum, over taps (r, s) ascending, of
// the matrices of w that meet one input value; `adjoint` for the input gradient.
FD_KERNEL conv_fold(const real *__restrict__ w, real *folded, ConvSizes sizes, int adjoint) {
    const int64 matrix = (int64)sizes.channels * sizes.outputs;
    const int across = adjoint ? conv_places<true>(sizes, 1) : conv_places<false>(sizes, 1);
    const int64 places = (int64)across * (adjoint ? conv_places<true>(sizes, 0) : conv_places<false>(sizes, 0));
    for (Walk walk = fd_walk(matrix); walk.row < places; fd_walk_on(walk, matrix)) {
        int output[2], input[2];
        FD_UNROLL
        for (int axis = 0; axis < 2; axis++) {
            const int place = (int)(axis ? walk.row % across : walk.row / across), phase = place / sizes.fold[axis];
            const ConvPhase p = adjoint ? conv_phase<true>(sizes, axis, phase) : conv_phase<false>(sizes, axis, phase);
            const int at = p.low + place % sizes.fold[axis];
            output[axis] = adjoint ? at : phase, input[axis] = adjoint ? phase : at;
        }
        real sum = 0;
        for (int r = 0; r < sizes.kernel[0]; r++) {
            if (!conv_meets(sizes, 0, output[0], r, input[0])) continue;
            for (int s = 0; s < sizes.kernel[1]; s++) {
                if (!conv_meets(sizes, 1, output[1], s, input[1])) continue;
                sum = sum + w[((int64)r * sizes.kernel[1] + s) * matrix + walk.item];
            }
        }
        folded[walk.row * matrix + walk.item] = sum;
    }
}

// ------------------------------------------------------------------------------------------- weight gradient

#define AHEAD 64  // pixels that a block has found before it needs them

// What a block makes. It lies in shared memory, because it is needed rarely: registers are for the sums.
struct ConvTask {
    ConvPhase rows, columns;
    ConvPixel begin;          // of its pixels
    int count, pair, number;  // of them; of its phases; of its chunk
    int row, column, height;  // where its tile begins, and all rows
};

// partials (chunks, places, C, K), with the places of forward weights: sums over the pixels of a chunk of one phase,
// `chunk` pixels each, of x under the tap times dy; sums (chunks, phases, K): those of dy. Rows of a tile are taps
// times channels, these rounded up to fours. Blocks: tiles of K within tiles of rows within pairs of phases within
// chunks, of one task after the other. A task of chunk 0 is sums over images, of dy, to where partials would be.
template <class Tile>
FD_DEVICE void conv_outer(const real *x, const real *dy, real *partials, real *sums, const WeightTasks &tasks) {
    constexpr int THREADS = Tile::THREADS, BM = Tile::BM, BN = Tile::BN, TM = Tile::TM, TN = Tile::TN;
    constexpr int DEPTH = Tile::DEPTH;
    FD_SHARED_ARRAY(real, a_tiles, 2 * Tile::A_SIZE);
    FD_SHARED_ARRAY(real, b_tiles, 2 * Tile::B_SIZE);
    FD_SHARED_ARRAY(ConvSeen, pixels, 2 * AHEAD);
    FD_SHARED_ARRAY(ConvTask, task, 1);
    FD_SHARED_ARRAY(WeightTask, mine, 1);
    const int block = fd_find_task(tasks, mine), vectors = mine->vectors;
    const ConvSizes &sizes = mine->sizes;
    x += mine->x, dy += mine->dy, partials += mine->partials, sums += mine->sums;
    if (mine->chunk == 0) {
        conv_sum_image(dy, partials, block, (int64)sizes.output[0] * sizes.output[1], sizes.outputs, a_tiles);
        return;
    }
    const int thread = threadIdx.x, C = sizes.channels, K = sizes.outputs, wide = (C + 3) / 4 * 4;
    const int height = sizes.input[0], width = sizes.input[1];
    if (thread == 0) {
        const int pairs_across = conv_phases<false>(sizes, 1), pairs = conv_phases<false>(sizes, 0) * pairs_across;
        const int places = conv_places<false>(sizes, 0) * conv_places<false>(sizes, 1);
        const int across = (K + BN - 1) / BN, down = (int)(((int64)places / pairs * wide + BM - 1) / BM);
        const int item = block / across / down;
        const int64 chunk = mine->chunk;
        task->pair = item % pairs, task->number = item / pairs;
        task->row = block / across % down * BM, task->column = block % across * BN;
        task->rows = conv_phase<false>(sizes, 0, task->pair / pairs_across);
        task->columns = conv_phase<false>(sizes, 1, task->pair % pairs_across);
        const int64 all = (int64)sizes.images * task->rows.count * task->columns.count;
        task->count = (int)max((int64)0, min(chunk, all - task->number * chunk));
        if (task->count > 0) task->begin = conv_pixel(task->number * chunk, task->rows, task->columns);
        task->height = task->rows.taps * task->columns.taps * wide;
    }
    fd_syncthreads();
    const int count = task->count;
    if (task->row >= task->height) return;

    // A thread fetches four channels of one tap, and four of dy, of every DEPTH-th pixel.
    const int a_row = task->row + thread % (BM / 4) * 4, channel = a_row % wide;
    const int i = a_row / wide / task->columns.taps, j = a_row / wide % task->columns.taps;
    const int a_left = C - channel, b_column = task->column + thread % (BN / 4) * 4;
    const int64 tap_offset = (int64)i * width + j;
    float4 a[Tile::A_LOADS], b[Tile::B_LOADS];

    const auto look = [&](int first) {  // at AHEAD pixels
        if (thread >= AHEAD) return;
        const uint32 at = first + thread;
        pixels[at % (2 * AHEAD)].target = -1;
        if (at >= (uint32)count) return;
        ConvPixel pixel = task->begin;
        conv_advance(pixel, conv_pixel(at, task->rows, task->columns), task->rows, task->columns);
        pixels[at % (2 * AHEAD)] = conv_see<false>(sizes, task->rows, task->columns, pixel);
    };
    const auto load = [&](int first) {
        FD_UNROLL
        for (int l = 0; l < Tile::A_LOADS; l++) {
            const ConvSeen &pixel = pixels[(first + (l * THREADS + thread) / (BM / 4)) % (2 * AHEAD)];
            const bool there = a_left > 0 && pixel.target >= 0 && (uint32)(pixel.row + i) < (uint32)height &&
                               (uint32)(pixel.column + j) < (uint32)width;
            a[l] = there ? conv_load4(x + (pixel.source + tap_offset) * C + channel, a_left, vectors & VECTOR_SOURCE)
                         : make_float4(0, 0, 0, 0);
        }
        FD_UNROLL
        for (int l = 0; l < Tile::B_LOADS; l++) {
            const int quad = l * THREADS + thread;
            const int64 at = quad < Tile::B_QUADS ? pixels[(first + quad / (BN / 4)) % (2 * AHEAD)].target : -1;
            b[l] = at < 0 ? make_float4(0, 0, 0, 0)
                          : conv_load4(dy + at * K + b_column, K - b_column, vectors & VECTOR_WEIGHT);
        }
    };
    const auto store = [&](int half) {
        FD_UNROLL
        for (int l = 0; l < Tile::A_LOADS; l++) {
            const int quad = l * THREADS + thread;
            fd_store4(a_tiles + half * Tile::A_SIZE + quad / (BM / 4) * Tile::A_PITCH + quad % (BM / 4) * 4, a[l]);
        }
        FD_UNROLL
        for (int l = 0; l < Tile::B_LOADS; l++) {
            const int quad = l * THREADS + thread;
            if (quad >= Tile::B_QUADS) continue;
            fd_store4(b_tiles + half * Tile::B_SIZE + quad / (BN / 4) * Tile::B_PITCH + quad % (BN / 4) * 4, b[l]);
        }
    };

    const bool summing = task->row == 0 && thread < BN;
    real acc[TM][TN], sum = 0;
    conv_zero(acc);
    const real *const a_first = a_tiles + Tile::row(thread, 0), *const b_first = b_tiles + Tile::column(thread, 0);
    look(0);
    fd_syncthreads();
    load(0);
    store(0);
    fd_syncthreads();
    for (int pixel = 0, half = 0; pixel < count; pixel += DEPTH, half = 1 - half) {
        const bool more = pixel + DEPTH < count;
        if (pixel % AHEAD == 0) look(pixel + AHEAD);
        if (more) load(pixel + DEPTH);
        Tile::multiply(acc, a_first + half * Tile::A_SIZE, b_first + half * Tile::B_SIZE);
        FD_UNROLL
        for (int k = 0; summing && k < DEPTH; k++) {
            sum = sum + b_tiles[half * Tile::B_SIZE + k * Tile::B_PITCH + thread];
        }
        if (more) {
            store(1 - half);
            fd_syncthreads();
        }
    }
    const int pairs = conv_phases<false>(sizes, 0) * conv_phases<false>(sizes, 1);
    if (summing && task->column + thread < K) {
        sums[((int64)task->number * pairs + task->pair) * K + task->column + thread] = sum;
    }
    const int places = conv_places<false>(sizes, 0) * conv_places<false>(sizes, 1);
    FD_UNROLL
    for (int r = 0; r < TM; r += 4) {
        const int row = task->row + Tile::row(thread, r), tap = row / wide, c = row % wide;
        if (row >= task->height) continue;
        const int across = task->columns.taps;
        const int place = conv_weight<false>(sizes, task->rows, task->columns, tap / across, tap % across);
        real *const to = partials + (((int64)task->number * places + place) * C + c) * K;
        FD_UNROLL
        for (int q = 0; q < 4; q++) {
            if (c + q >= C) continue;
            FD_UNROLL
            for (int k = 0; k < TN; k += 4) {
                const int column = task->column + Tile::column(thread, k);
                const float4 y = make_float4(acc[r + q][k], acc[r + q][k + 1], acc[r + q][k + 2], acc[r + q][k + 3]);
                conv_finish4(to + (int64)q * K + column, y, nullptr, nullptr, nullptr, K - column,
                             vectors & VECTOR_TARGET);
            }
        }
    }
}

FD_KERNEL FD_BOUNDS(128, 3)
    conv_weights_128x64(const real *__restrict__ x, const real *__restrict__ dy, real *partials, real *sums,
                        WeightTasks tasks) {
    conv_outer<ConvTile<128, 64, 8, 8, 8>>(x, dy, partials, sums, tasks);
}

FD_KERNEL FD_BOUNDS(128, 4)
    conv_weights_64x32(const real *__restrict__ x, const real *__restrict__ dy, real *partials, real *sums,
                       WeightTasks tasks) {
    conv_outer<ConvTile<64, 32, 4, 4, 16>>(x, dy, partials, sums, tasks);
}

FD_KERNEL FD_BOUNDS(64, 8)
    conv_weights_128x8(const real *__restrict__ x, const real *__restrict__ dy, real *partials, real *sums,
                       WeightTasks tasks) {
    conv_outer<ConvTile<128, 8, 4, 4, 8>>(x, dy, partials, sums, tasks);
}

// Element e of dw (kernel, C, K) and, behind it, db (K) from partials and sums of `chunks` chunks: a tap adds up the
// places that it is part of, one in every phase, and each of them its chunks in order. Row kernel C of the same loop is
// db.
FD_DEVICE void conv_finish(const real *partials, const real *sums, real *dw, real *db, const ConvSizes &sizes,
                           int64 chunks, int64 e) {
    const int C = sizes.channels, K = sizes.outputs, taps = sizes.kernel[0] * sizes.kernel[1];
    const int pairs_across = conv_phases<false>(sizes, 1), pairs = conv_phases<false>(sizes, 0) * pairs_across;
    const int64 size = (int64)conv_places<false>(sizes, 0) * conv_places<false>(sizes, 1) * C * K;
    const int64 matrix = (int64)C * K, total = taps * matrix + K;
    if (e >= total) return;
    const int tap = (int)(e / matrix);
    real sum = 0;
    for (int pair = 0; pair < pairs; pair++) {
        const real *from;
        int64 stride;
        if (tap == taps) {
            from = sums + (int64)pair * K + (e - taps * matrix), stride = (int64)pairs * K;
        } else {
            int place[2];
            FD_UNROLL
            for (int axis = 0; axis < 2; axis++) {
                const int phase = axis ? pair % pairs_across : pair / pairs_across;
                const int at = axis ? tap % sizes.kernel[1] : tap / sizes.kernel[1];
                const ConvPhase p = conv_phase<false>(sizes, axis, phase);
                const int meets = conv_floor(phase * sizes.stride[axis] + at - sizes.pad[axis], sizes.up[axis]);
                place[axis] = p.weight + (meets - p.low) * p.weight_step;
            }
            const int64 first = (int64)place[0] * conv_places<false>(sizes, 1) + place[1];
            from = partials + first * matrix + (e - tap * matrix), stride = size;
        }
        real part = 0;
        int64 chunk = 0;
        for (; chunk + 4 <= chunks; chunk += 4, from += 4 * stride) {
            const real v0 = from[0], v1 = from[stride], v2 = from[2 * stride], v3 = from[3 * stride];
            part = part + v0 + v1 + v2 + v3;
        }
        for (; chunk < chunks; chunk++, from += stride) part = part + *from;
        sum = sum + part;
    }
    (tap < taps ? dw[e] : db[e - taps * matrix]) = sum;
}

// What is left of tasks, an element a thread.
FD_KERNEL FD_BOUNDS(256, 4)
    conv_weights_finish(const real *__restrict__ partials, const real *__restrict__ sums, real *dw, real *db,
                        FinishTasks tasks) {
    FD_SHARED_ARRAY(FinishTask, mine, 1);
    const int64 block = fd_find_task(tasks, mine);
    conv_finish(partials + mine->partials, sums + mine->sums, dw + mine->dw, db + mine->db, mine->sizes, mine->chunks,
                block * blockDim.x + threadIdx.x);
}

FD_KERNEL conv_image_sums(const real *__restrict__ dy, real *dshift, int64 images, int64 pixels, int K) {
    FD_SHARED_ARRAY(real, parts, 8 * FD_WARP);
    const int64 items = images * ((K + FD_WARP - 1) / FD_WARP);
    for (int64 item = blockIdx.x; item < items; item += gridDim.x) {
        conv_sum_image(dy, dshift, item, pixels, K, parts);
    }
}
