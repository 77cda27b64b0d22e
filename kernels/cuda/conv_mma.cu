// Convolutions on tensor cores: factors rounded to bf16, products added up in float32; conv.cuh says which pixels meet.
//
// Weights are converted beforehand, all of a network's in one launch (conv_mma_prepare), or one by one (conv_mma_pack),
// folded where there is upsampling: every block reads all of its channels' weights, and so copies them as they are, at
// half the size, STAGES - 1 taps ahead. Activations stay float32
// in memory, because a block reads each of them once: it holds a box of source pixels with all that the taps of its
// pixels meet, DEPTH channels at a time, converted on the way, and a tap is an offset into it (`box`). A box that
// would not fit holds one tap at a time. The float32 values of the next channels are copied meanwhile, and each thread
// converts what it copied itself. Rows in shared memory are an odd multiple of 16 bytes: ldmatrix meets no bank twice.
//
// An output is a chain over (DEPTH channels, tap, 16 channels), whatever its tile, so its bits depend on no batch. The
// weight gradient adds up pixels of fixed chunks, and conv_mma_sum the chunks.
#include "conv.cuh"

#ifndef FD_STAGES
#define FD_STAGES 3  // as `Tuning` of the backend has it
#endif
enum { DEPTH = 32, GROUP = 8, GROUPS = DEPTH / GROUP, PITCH = DEPTH + 8, STAGES = FD_STAGES };
enum { COPY_SOURCE = 1, COPY_GRADIENT = 2, PAIRS = 4 };  // 16 bytes at once; float2 in the results

// How a kernel cuts its work, from the backend's conv_mma.py: a tile is (images, 2^rows_log, 2^columns_log) pixels.
struct MmaTile {
    int rows_log, columns_log, rows, columns, images;
};

FD_DEVICE MmaTile mma_tile(int pixels, int rows_log, int columns_log) {
    return {rows_log, columns_log, 1 << rows_log, 1 << columns_log, pixels >> (rows_log + columns_log)};
}

// Pixel m of a tile.
FD_DEVICE ConvPixel mma_pixel(const MmaTile &tile, int m) {
    return {m >> (tile.rows_log + tile.columns_log), m >> tile.columns_log & (tile.rows - 1), m & (tile.columns - 1)};
}

struct Eight {
    float4 low, high;
};

// Values on their way from global memory to bf16 in shared memory, in groups of eight that one thread moves. Where rows
// begin at multiples of 16 bytes, mma_begin copies group `unit` of `units` to a waiting room and mma_copied takes it
// from there; else mma_loaded. Of the values from p on `left` exist; p is null where there are none.
FD_DEVICE void mma_begin(float *room, int unit, int units, const real *p, int left, const real *anywhere) {
    FD_UNROLL
    for (int half = 0; half < 2; half++) {
        const bool is = p && left > 4 * half;
        fd_cp_async16(room + (half * units + unit) * 4, is ? p + 4 * half : anywhere, is ? 16 : 0);
    }
}

FD_DEVICE Eight mma_copied(const float *room, int unit, int units) {
    return {fd_load4(room + unit * 4), fd_load4(room + (units + unit) * 4)};
}

FD_DEVICE Eight mma_loaded(const real *p, int left) {
    float v[8];
    FD_UNROLL
    for (int i = 0; i < 8; i++) v[i] = p && i < left ? p[i] : 0;
    return {make_float4(v[0], v[1], v[2], v[3]), make_float4(v[4], v[5], v[6], v[7])};
}

FD_DEVICE void mma_store8(bf16 *to, const Eight &v) {
    *reinterpret_cast<uint4 *>(to) = make_uint4(fd_bf16x2(v.low.x, v.low.y), fd_bf16x2(v.low.z, v.low.w),
                                                fd_bf16x2(v.high.x, v.high.y), fd_bf16x2(v.high.z, v.high.w));
}

// Two values to `to`, of which `left` exist.
FD_DEVICE void mma_store2(real *to, float first, float second, int left, bool pairs) {
    if (pairs && left > 1) {
        *reinterpret_cast<float2 *>(to) = make_float2(first, second);
        return;
    }
    if (left > 0) to[0] = first;
    if (left > 1) to[1] = second;
}

// ------------------------------------------------------------------------------------------- weights

// Whether tap r of the kernel is part of a place of the weights.
template <bool ADJOINT>
FD_DEVICE bool mma_is_part(const ConvSizes &sizes, int axis, int place, int tap) {
    const int fold = sizes.fold[axis];
    if (!fold) return place == tap;
    const int phase = place / fold, source = conv_phase<ADJOINT>(sizes, axis, phase).low + place % fold;
    return ADJOINT ? conv_meets(sizes, axis, source, tap, phase) : conv_meets(sizes, axis, phase, tap, source);
}

// Two values of packed (places, C, K rounded up to a multiple of 8), bf16 in an array of float = w (taps, C, K): channels
// 2 item and the next one of row (place, channel). The taps of a place are added up before they are rounded.
template <bool ADJOINT>
FD_DEVICE uint32 mma_pair(const real *w, const ConvSizes &sizes, int64 row, int item) {
    const int C = sizes.channels, K = sizes.outputs, columns = conv_places<ADJOINT>(sizes, 1);
    const int k = item * 2, left = K - k;
    const int place = (int)conv_divide(row, C), channel = (int)(row - (int64)place * C);
    float first = 0, second = 0;
    const auto add = [&](int tap) {
        const real *const from = w + ((int64)tap * C + channel) * K + k;
        first += left > 0 ? from[0] : 0;
        second += left > 1 ? from[1] : 0;
    };
    if (!sizes.fold[0] && !sizes.fold[1]) {
        add(place);
    } else {
        for (int r = 0; r < sizes.kernel[0]; r++) {
            if (!mma_is_part<ADJOINT>(sizes, 0, place / columns, r)) continue;
            for (int s = 0; s < sizes.kernel[1]; s++) {
                if (mma_is_part<ADJOINT>(sizes, 1, place % columns, s)) add(r * sizes.kernel[1] + s);
            }
        }
    }
    return fd_bf16x2(first, second);
}

template <bool ADJOINT>
FD_DEVICE void mma_pack(const real *w, uint32 *packed, const ConvSizes &sizes) {
    const int across = (sizes.outputs + 7) / 8 * 4;
    const int64 rows = (int64)conv_places<ADJOINT>(sizes, 0) * conv_places<ADJOINT>(sizes, 1) * sizes.channels;
    for (Walk walk = fd_walk(across); walk.row < rows; fd_walk_on(walk, across)) {
        packed[walk.row * across + walk.item] = mma_pair<ADJOINT>(w, sizes, walk.row, (int)walk.item);
    }
}

FD_KERNEL conv_mma_pack(const real *w, real *packed, ConvSizes sizes) {
    mma_pack<false>(w, reinterpret_cast<uint32 *>(packed), sizes);
}

FD_KERNEL conv_mma_pack_adjoint(const real *w, real *packed, ConvSizes sizes) {
    mma_pack<true>(w, reinterpret_cast<uint32 *>(packed), sizes);
}

// The same for many weights: their pairs follow each other. Row r of `places` holds the number of the first pair of
// weights r, where they begin behind `base`, and whether they are for an input gradient.
FD_KERNEL conv_mma_prepare(const real *base, real *packed, const int64 *places_r3, const ConvSizes *sizes_r, int weights,
                           int64 pairs) {
    FD_GRID_STRIDE(i, pairs) {
        int r = 0;
        for (int end = weights; r + 1 < end;) {
            const int middle = (r + end) / 2;
            if (places_r3[3 * middle] <= i) {
                r = middle;
            } else {
                end = middle;
            }
        }
        const ConvSizes &sizes = sizes_r[r];
        const real *const w = base + places_r3[3 * r + 1];
        const int across = (sizes.outputs + 7) / 8 * 4;
        const int64 pair = i - places_r3[3 * r], row = conv_divide(pair, across);
        const int item = (int)(pair - row * across);
        reinterpret_cast<uint32 *>(packed)[i] =
            places_r3[3 * r + 2] ? mma_pair<true>(w, sizes, row, item) : mma_pair<false>(w, sizes, row, item);
    }
}

// ------------------------------------------------------------------------------------------- forward, input gradient

// target (.., T channels) = taps of source (.., S channels) times packed weights + bias + shift of the image +
// residual, each of which may be null; residual may be target. WM x WN warps make MT x NT tiles of 16 pixels times 8
// channels each. Blocks: tiles of channels within pairs of phases within tiles of pixels.
template <bool ADJOINT, int WM, int WN, int MT, int NT>
FD_DEVICE void mma_gather(const real *source, const real *packed, const real *bias, const real *shift,
                          const real *residual, real *target, const ConvSizes &sizes, int rows_log, int columns_log,
                          int box, int flags) {
    constexpr int THREADS = WM * WN * FD_WARP, BM = WM * MT * 16, BN = WN * NT * 8;
    // A stage of weights: DEPTH rows of BN target channels; ADJOINT, BN rows of DEPTH source channels.
    constexpr int LINES = ADJOINT ? BN : DEPTH, LINE = ADJOINT ? DEPTH : BN, LINE_PITCH = LINE + 8;
    static_assert(NT % 2 == 0, "a lane names rows for two tiles of weights");
    FD_SHARED(unsigned char, shared);
    const bf16 *const matrices = reinterpret_cast<const bf16 *>(packed);
    const int thread = threadIdx.x, lane = thread % FD_WARP, warp = thread / FD_WARP;
    const int from = ADJOINT ? sizes.outputs : sizes.channels, to = ADJOINT ? sizes.channels : sizes.outputs;
    const int packed_width = (sizes.outputs + 7) / 8 * 8;
    const int *const size = ADJOINT ? sizes.output : sizes.input;

    const int across = (to + BN - 1) / BN, pairs_across = conv_phases<ADJOINT>(sizes, 1);
    const int pairs = conv_phases<ADJOINT>(sizes, 0) * pairs_across;
    const int first_channel = (int)(blockIdx.x % across) * BN, pair = (int)(blockIdx.x / across % pairs);
    const ConvPhase rows = conv_phase<ADJOINT>(sizes, 0, pair / pairs_across);
    const ConvPhase columns = conv_phase<ADJOINT>(sizes, 1, pair % pairs_across);
    // Tiles are counted in phase 0, which has the most pixels.
    const MmaTile tile = mma_tile(BM, rows_log, columns_log);
    const int tiles_across = (conv_phase<ADJOINT>(sizes, 1, 0).count + tile.columns - 1) / tile.columns;
    const int tiles_down = (conv_phase<ADJOINT>(sizes, 0, 0).count + tile.rows - 1) / tile.rows;
    const int at = (int)(blockIdx.x / across / pairs), line = at / tiles_across;
    const ConvPixel first = {line / tiles_down * tile.images, line % tiles_down * tile.rows,
                             at % tiles_across * tile.columns};
    if (first.row >= rows.count || first.column >= columns.count) return;

    // The source pixels of a box, or of one for every tap; pixel (r, c) of the tile meets box pixel (r spread_rows + i,
    // c spread_columns + j) through tap (i, j).
    const int taps = rows.taps * columns.taps, boxes = box ? 1 : taps;
    const int spread_rows = box ? rows.step : 1, spread_columns = box ? columns.step : 1;
    const int box_rows = box ? (tile.rows - 1) * rows.step + rows.taps : tile.rows;
    const int box_columns = box ? (tile.columns - 1) * columns.step + columns.taps : tile.columns;
    const int box_pixels = tile.images * box_rows * box_columns, units = box_pixels * GROUPS;
    bf16 *const weights = reinterpret_cast<bf16 *>(shared);                   // STAGES of LINES * LINE_PITCH
    bf16 *const values = weights + STAGES * LINES * LINE_PITCH;               // 2 of box_pixels * PITCH
    float *const room = reinterpret_cast<float *>(values + 2 * box_pixels * PITCH);
    int *const places = reinterpret_cast<int *>(room + (flags & COPY_SOURCE ? box_pixels * DEPTH : 0));
    // Where the box's pixels lie in the source, from the tile's first image on; -1 outside.
    for (int p = thread; p < boxes * box_pixels; p += THREADS) {
        const int tap = p / box_pixels, within = p - tap * box_pixels;
        const int box_line = within / box_columns, column = within - box_line * box_columns;
        const int image = box_line / box_rows, row = box_line - image * box_rows;
        const int i = box ? row : row * rows.step + tap / columns.taps;
        const int j = box ? column : column * columns.step + tap % columns.taps;
        const int y = first.row * rows.step + rows.low + i, x = first.column * columns.step + columns.low + j;
        const bool inside = (uint32)y < (uint32)size[0] && (uint32)x < (uint32)size[1];
        places[p] = inside && first.image + image < sizes.images ? (image * size[0] + y) * size[1] + x : -1;
    }
    fd_syncthreads();

    const real *const images = source + (int64)first.image * size[0] * size[1] * from;
    const int chunks = (from + DEPTH - 1) / DEPTH, steps = chunks * taps;
    // Group `unit` of box number `n`: boxes of the taps, and then those of the next channels.
    const auto value = [&](int n, int unit, int &left) -> const real * {
        const int chunk = n / boxes, place = places[(n - chunk * boxes) * box_pixels + unit / GROUPS];
        const int channel = chunk * DEPTH + unit % GROUPS * GROUP;
        left = from - channel;
        return place < 0 || left <= 0 ? nullptr : images + (int64)place * from + channel;
    };
    const auto begin_box = [&](int n) {
        if (n >= chunks * boxes || !(flags & COPY_SOURCE)) return;
        for (int unit = thread, left; unit < units; unit += THREADS) {
            const real *const p = value(n, unit, left);
            mma_begin(room, unit, units, p, left, source);
        }
    };
    const auto end_box = [&](int n) {
        bf16 *const to_box = values + n % 2 * box_pixels * PITCH;
        FD_ROLL
        for (int unit = thread, left; unit < units; unit += THREADS) {
            bf16 *const group = to_box + unit / GROUPS * PITCH + unit % GROUPS * GROUP;
            if (flags & COPY_SOURCE) {
                mma_store8(group, mma_copied(room, unit, units));
            } else {
                const real *const p = value(n, unit, left);
                mma_store8(group, mma_loaded(p, left));
            }
        }
    };
    int next_i = 0, next_j = 0, next_channel = 0, next_stage = 0;  // of the weights
    const auto begin_weights = [&]() {
        if (next_channel >= from) return;
        const int matrix = conv_weight<ADJOINT>(sizes, rows, columns, next_i, next_j);
        bf16 *const stage = weights + next_stage * LINES * LINE_PITCH;
        FD_UNROLL
        for (int u = 0; u < LINES * LINE / 8; u += THREADS) {
            const int unit = u + thread, row = unit / (LINE / 8), place = unit % (LINE / 8) * 8;
            if (LINES * LINE / 8 % THREADS != 0 && unit >= LINES * LINE / 8) break;
            const int channel = (ADJOINT ? first_channel : next_channel) + row;  // C
            const int output = (ADJOINT ? next_channel : first_channel) + place;  // K
            const bool is = channel < sizes.channels && output < packed_width;
            const int64 offset = is ? ((int64)matrix * sizes.channels + channel) * packed_width + output : 0;
            fd_cp_async16(stage + row * LINE_PITCH + place, matrices + offset, is ? 16 : 0);
        }
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
        if (++next_j == columns.taps) next_j = 0, next_i++;
        if (next_i == rows.taps) next_i = 0, next_channel += DEPTH;
    };

    float acc[MT][NT][4];
    FD_UNROLL
    for (int m = 0; m < MT; m++) {
        FD_UNROLL
        for (int n = 0; n < NT; n++) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
    }
    // The rows that this lane names to ldmatrix, those of matrix `which`.
    const int which = lane / 8, row_of = lane % 8, first_m = warp / WN * MT * 16, first_n = warp % WN * NT * 8;
    int value_row[MT];
    FD_UNROLL
    for (int m = 0; m < MT; m++) {
        const ConvPixel pixel = mma_pixel(tile, first_m + m * 16 + which % 2 * 8 + row_of);
        const int box_pixel =
            (pixel.image * box_rows + pixel.row * spread_rows) * box_columns + pixel.column * spread_columns;
        value_row[m] = box_pixel * PITCH + which / 2 * 8;
    }
    const int weight_row = ADJOINT ? (first_n + which / 2 * 8 + row_of) * LINE_PITCH + which % 2 * 8
                                   : (which % 2 * 8 + row_of) * LINE_PITCH + first_n + which / 2 * 8;

    // Group g of copies brings the weights of step g. A box is begun with step - STAGES + 1, so that it is there if it
    // lasts for so many steps; one of fewer is waited for by itself.
    if (steps > 0) begin_box(0);
    for (int g = 0; g < STAGES - 1; g++) {
        if (taps > 0) begin_weights();
        fd_cp_async_commit();
    }
    int i = 0, j = 0, channel = 0, stage = 0, boxes_begun = 0;
    for (int step = 0; step < steps; step++) {
        const bool new_box = !box || (i == 0 && j == 0);
        if (new_box && (!box || taps < STAGES - 1))
            fd_cp_async_wait(0);
        else
            fd_cp_async_wait(STAGES - 2);
        if (new_box) end_box(boxes_begun++);
        fd_syncthreads();
        if (new_box) begin_box(boxes_begun);
        begin_weights();
        fd_cp_async_commit();

        const bf16 *const a_from =
            values + (boxes_begun - 1) % 2 * box_pixels * PITCH + (box ? (i * box_columns + j) * PITCH : 0);
        const bf16 *const b_from = weights + stage * LINES * LINE_PITCH + weight_row;
        const int left = from - channel;
        FD_UNROLL
        for (int k = 0; k < DEPTH; k += 16) {
            if (k >= left) break;
            uint32 a[MT][4];
            FD_UNROLL
            for (int m = 0; m < MT; m++) fd_ldmatrix_x4(a[m], a_from + value_row[m] + k);
            FD_UNROLL
            for (int n = 0; n < NT; n += 2) {
                uint32 b[4];
                if (ADJOINT)
                    fd_ldmatrix_x4(b, b_from + n * 8 * LINE_PITCH + k);
                else
                    fd_ldmatrix_x4_trans(b, b_from + k * LINE_PITCH + n * 8);
                FD_UNROLL
                for (int m = 0; m < MT; m++) {
                    fd_mma_m16n8k16(acc[m][n], a[m], b[0], b[1]);
                    fd_mma_m16n8k16(acc[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (++j == columns.taps) j = 0, i++;
        if (i == rows.taps) i = 0, channel += DEPTH;
    }

    FD_UNROLL
    for (int m = 0; m < 2 * MT; m++) {
        ConvPixel pixel = mma_pixel(tile, first_m + m * 8 + lane / 4);
        pixel = {pixel.image + first.image, pixel.row + first.row, pixel.column + first.column};
        if (pixel.image >= sizes.images || pixel.row >= rows.count || pixel.column >= columns.count) continue;
        const int64 row = conv_target<ADJOINT>(sizes, pixel, rows, columns) * to, own = (int64)pixel.image * to;
        FD_UNROLL
        for (int n = 0; n < NT; n++) {
            const int k = first_channel + first_n + n * 8 + lane % 4 * 2, count = to - k;
            float y[2] = {acc[m / 2][n][m % 2 * 2], acc[m / 2][n][m % 2 * 2 + 1]};
            FD_UNROLL
            for (int c = 0; c < 2; c++) {
                if (c >= count) break;
                if (bias) y[c] += bias[k + c];
                if (shift) y[c] += shift[own + k + c];
                if (residual) y[c] += residual[row + k + c];
            }
            mma_store2(target + row + k, y[0], y[1], count, flags & PAIRS);
        }
    }
}

// Tiles by their pixels and channels; those of the input gradient have pixels and channels of the input.
FD_KERNEL FD_BOUNDS(256, 2)
    conv_mma_128x128(const real *source, const real *packed, const real *bias, const real *shift,
                     const real *residual, real *target, ConvSizes sizes, int rows_log, int columns_log, int box,
                     int flags) {
    mma_gather<false, 4, 2, 2, 8>(source, packed, bias, shift, residual, target, sizes,
                                  rows_log, columns_log, box, flags);
}

FD_KERNEL FD_BOUNDS(256, 2)
    conv_mma_128x64(const real *source, const real *packed, const real *bias, const real *shift,
                    const real *residual, real *target, ConvSizes sizes, int rows_log, int columns_log, int box,
                    int flags) {
    mma_gather<false, 4, 2, 2, 4>(source, packed, bias, shift, residual, target, sizes,
                                  rows_log, columns_log, box, flags);
}

FD_KERNEL FD_BOUNDS(256, 2)
    conv_mma_128x32(const real *source, const real *packed, const real *bias, const real *shift,
                    const real *residual, real *target, ConvSizes sizes, int rows_log, int columns_log, int box,
                    int flags) {
    mma_gather<false, 4, 2, 2, 2>(source, packed, bias, shift, residual, target, sizes,
                                  rows_log, columns_log, box, flags);
}

FD_KERNEL FD_BOUNDS(128, 4)
    conv_mma_64x32(const real *source, const real *packed, const real *bias, const real *shift, const real *residual,
                   real *target, ConvSizes sizes, int rows_log, int columns_log, int box, int flags) {
    mma_gather<false, 2, 2, 2, 2>(source, packed, bias, shift, residual, target, sizes,
                                  rows_log, columns_log, box, flags);
}

FD_KERNEL FD_BOUNDS(256, 2)
    conv_mma_adjoint_128x128(const real *source, const real *packed, const real *bias, const real *shift,
                             const real *residual, real *target, ConvSizes sizes, int rows_log, int columns_log,
                             int box, int flags) {
    mma_gather<true, 4, 2, 2, 8>(source, packed, bias, shift, residual, target, sizes,
                                 rows_log, columns_log, box, flags);
}

FD_KERNEL FD_BOUNDS(256, 2)
    conv_mma_adjoint_128x64(const real *source, const real *packed, const real *bias, const real *shift,
                            const real *residual, real *target, ConvSizes sizes, int rows_log, int columns_log,
                            int box, int flags) {
    mma_gather<true, 4, 2, 2, 4>(source, packed, bias, shift, residual, target, sizes,
                                 rows_log, columns_log, box, flags);
}

FD_KERNEL FD_BOUNDS(256, 2)
    conv_mma_adjoint_128x32(const real *source, const real *packed, const real *bias, const real *shift,
                            const real *residual, real *target, ConvSizes sizes, int rows_log, int columns_log,
                            int box, int flags) {
    mma_gather<true, 4, 2, 2, 2>(source, packed, bias, shift, residual, target, sizes,
                                 rows_log, columns_log, box, flags);
}

FD_KERNEL FD_BOUNDS(128, 4)
    conv_mma_adjoint_64x32(const real *source, const real *packed, const real *bias, const real *shift,
                           const real *residual, real *target, ConvSizes sizes, int rows_log, int columns_log, int box,
                           int flags) {
    mma_gather<true, 2, 2, 2, 2>(source, packed, bias, shift, residual, target, sizes,
                                 rows_log, columns_log, box, flags);
}

// ------------------------------------------------------------------------------------------- weight gradient

// dw (taps, C, K) = sum over output pixels of x at a tap times dy, and db (K) = sum of dy, for every chunk of pixels;
// those of the next chunk lie `row` values further. A warp makes DEPTH channels of x times 32 of dy for one tap; a
// block, tap_rows x tap_columns taps of channel_blocks * DEPTH channels times WN * 32, by as many threads as its task
// says; others, which other tasks need, stand by. A chunk is `chunk` tiles of PIXELS. Blocks: tiles of dy's channels
// within channels of x within taps within chunks, of one task after the other.
enum { PIXELS = 64 };

template <int WN>
FD_DEVICE void mma_weight(const real *x, const real *dy, real *dw, real *db, const MmaTasks &tasks) {
    constexpr int NT = 4, BN = WN * NT * 8, DY_PITCH = BN + 8, DY_GROUPS = BN / GROUP;
    FD_SHARED(unsigned char, shared);
    FD_SHARED_ARRAY(MmaTask, mine, 1);
    int at = fd_find_task(tasks, mine);
    const ConvSizes &sizes = mine->sizes;
    const int64 row = mine->row;
    const int tap_rows = mine->tap_rows, tap_columns = mine->tap_columns, channel_blocks = mine->channel_blocks;
    const int flags = mine->flags, threads = mine->threads, lane = threadIdx.x % FD_WARP;
    const bool stands_by = (int)threadIdx.x >= threads;
    const int thread = stands_by ? 1 << 30 : threadIdx.x, warp = threadIdx.x / FD_WARP / WN;
    x += mine->x, dy += mine->dy, dw += mine->dw, db += mine->db;
    if (mine->chunk == 0) {  // sums over images, of dy, to dw
        conv_sum_image(dy, dw, at, (int64)sizes.output[0] * sizes.output[1], sizes.outputs,
                       reinterpret_cast<real *>(shared));
        return;
    }
    const int C = sizes.channels, K = sizes.outputs;
    const int *const kernel = sizes.kernel;
    const MmaTile tile = mma_tile(PIXELS, mine->rows_log, mine->columns_log);
    const int tiles_across = (sizes.output[1] + tile.columns - 1) / tile.columns;
    const int tiles_down = (sizes.output[0] + tile.rows - 1) / tile.rows;
    const int tiles = (sizes.images + tile.images - 1) / tile.images * tiles_down * tiles_across;

    const auto take = [&](int size, int block) {  // which of the blocks of a size, and the rest of the number
        const int count = (size + block - 1) / block, which = at % count;
        at /= count;
        return which * block;
    };
    const int first_output = take(K, BN), first_channel = take(C, channel_blocks * DEPTH);
    const int first_s = take(kernel[1], tap_columns), first_r = take(kernel[0], tap_rows), number = at;
    // What this warp makes.
    const int channel = first_channel + warp % channel_blocks * DEPTH;
    const int r = warp / channel_blocks / tap_columns, s = warp / channel_blocks % tap_columns;
    const bool works = !stands_by && channel < C && first_r + r < kernel[0] && first_s + s < kernel[1];

    const int box_rows = (tile.rows - 1) * sizes.stride[0] + tap_rows;
    const int box_columns = (tile.columns - 1) * sizes.stride[1] + tap_columns;
    const int box_pixels = tile.images * box_rows * box_columns, x_groups = channel_blocks * GROUPS;
    const int x_pitch = channel_blocks * DEPTH + 8, x_units = box_pixels * x_groups, dy_units = PIXELS * DY_GROUPS;
    bf16 *const dy_values = reinterpret_cast<bf16 *>(shared);                 // 2 of PIXELS * DY_PITCH
    int *const x_rows = reinterpret_cast<int *>(dy_values + 2 * PIXELS * DY_PITCH);
    int *const box = x_rows + PIXELS;
    bf16 *const x_values = reinterpret_cast<bf16 *>(box + (box_pixels + 3) / 4 * 4);  // 2 of box_pixels * x_pitch
    float *const x_room = reinterpret_cast<float *>(x_values + 2 * box_pixels * x_pitch);
    float *const dy_room = x_room + (flags & COPY_SOURCE ? x_units * GROUP : 0);
    for (int p = thread; p < box_pixels; p += threads) {  // image, row and column within the box, 10 bits each
        const int line = p / box_columns, image = line / box_rows;
        box[p] = image << 20 | (line - image * box_rows) << 10 | (p - line * box_columns);
    }
    for (int p = thread; p < PIXELS; p += threads) {  // where the box pixel begins that it meets through the first tap
        const ConvPixel pixel = mma_pixel(tile, p);
        const int line = pixel.image * box_rows + pixel.row * sizes.stride[0];
        x_rows[p] = (line * box_columns + pixel.column * sizes.stride[1]) * x_pitch;
    }
    fd_syncthreads();

    const auto first_of = [&](int t) -> ConvPixel {
        const int line = t / tiles_across, image = line / tiles_down;
        return {image * tile.images, (line - image * tiles_down) * tile.rows, (t - line * tiles_across) * tile.columns};
    };
    const auto x_value = [&](const ConvPixel &first, int unit, int &left) -> const real * {
        const int pixel = unit / x_groups, channel = first_channel + (unit - pixel * x_groups) * GROUP;
        const int image = first.image + (box[pixel] >> 20);
        int row = first.row * sizes.stride[0] + first_r - sizes.pad[0] + (box[pixel] >> 10 & 1023);
        int column = first.column * sizes.stride[1] + first_s - sizes.pad[1] + (box[pixel] & 1023);
        left = C - channel;
        if (image >= sizes.images || left <= 0 || row < 0 || column < 0) return nullptr;
        if (sizes.up[0] > 1) row /= sizes.up[0];
        if (sizes.up[1] > 1) column /= sizes.up[1];
        if (row >= sizes.input[0] || column >= sizes.input[1]) return nullptr;
        return x + (((int64)image * sizes.input[0] + row) * sizes.input[1] + column) * C + channel;
    };
    const auto dy_value = [&](const ConvPixel &first, int unit, int &left) -> const real * {
        const ConvPixel pixel = mma_pixel(tile, unit / DY_GROUPS);
        const int image = first.image + pixel.image, row = first.row + pixel.row, column = first.column + pixel.column;
        const int output = first_output + unit % DY_GROUPS * GROUP;
        left = K - output;
        if (image >= sizes.images || row >= sizes.output[0] || column >= sizes.output[1] || left <= 0) return nullptr;
        return dy + (((int64)image * sizes.output[0] + row) * sizes.output[1] + column) * K + output;
    };
    const auto begin_tile = [&](int t) {
        const ConvPixel first = first_of(t);
        int left;
        if (flags & COPY_SOURCE) {
            FD_ROLL
            for (int unit = thread; unit < x_units; unit += threads) {
                const real *const p = x_value(first, unit, left);
                mma_begin(x_room, unit, x_units, p, left, x);
            }
        }
        if (flags & COPY_GRADIENT) {
            FD_ROLL
            for (int unit = thread; unit < dy_units; unit += threads) {
                const real *const p = dy_value(first, unit, left);
                mma_begin(dy_room, unit, dy_units, p, left, dy);
            }
        }
        fd_cp_async_commit();
    };
    float sums[GROUP] = {};  // of dy, over the pixels that this thread moves: its channels are always the same
    const auto end_tile = [&](int t) {
        const ConvPixel first = first_of(t);
        int left = 0;
        FD_ROLL
        for (int unit = thread; unit < x_units; unit += threads) {
            const int pixel = unit / x_groups;
            bf16 *const to = x_values + (t % 2 * box_pixels + pixel) * x_pitch + (unit - pixel * x_groups) * GROUP;
            if (flags & COPY_SOURCE) {
                mma_store8(to, mma_copied(x_room, unit, x_units));
            } else {
                const real *const p = x_value(first, unit, left);
                mma_store8(to, mma_loaded(p, left));
            }
        }
        FD_ROLL
        for (int unit = thread; unit < dy_units; unit += threads) {
            Eight v;
            if (flags & COPY_GRADIENT) {
                v = mma_copied(dy_room, unit, dy_units);
            } else {
                const real *const p = dy_value(first, unit, left);
                v = mma_loaded(p, left);
            }
            mma_store8(dy_values + (t % 2 * PIXELS + unit / DY_GROUPS) * DY_PITCH + unit % DY_GROUPS * GROUP, v);
            const float of_pixel[GROUP] = {v.low.x, v.low.y, v.low.z, v.low.w, v.high.x, v.high.y, v.high.z, v.high.w};
            FD_UNROLL
            for (int i = 0; i < GROUP; i++) sums[i] += of_pixel[i];
        }
    };

    float acc[2][NT][4];
    FD_UNROLL
    for (int m = 0; m < 2; m++) {
        FD_UNROLL
        for (int n = 0; n < NT; n++) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
    }
    // The rows that this lane names to ldmatrix are pixels; both operands are read across.
    const int which = lane / 8, row_of = lane % 8;
    const int x_row = (r * box_columns + s) * x_pitch + channel - first_channel + which % 2 * 8;
    const int first_n = (int)threadIdx.x / FD_WARP % WN * NT * 8;
    const int dy_row = (which % 2 * 8 + row_of) * DY_PITCH + first_n + which / 2 * 8;

    const int begin = number * mine->chunk, end = min(tiles, begin + mine->chunk);
    if (begin < end) begin_tile(begin);
    for (int t = begin; t < end; t++) {
        fd_cp_async_wait(0);
        end_tile(t);
        fd_syncthreads();
        if (t + 1 < end) begin_tile(t + 1);
        if (!works) continue;
        const bf16 *const a_from = x_values + t % 2 * box_pixels * x_pitch + x_row;
        const bf16 *const b_from = dy_values + t % 2 * PIXELS * DY_PITCH + dy_row;
        FD_UNROLL
        for (int k = 0; k < PIXELS / 16; k++) {
            const bf16 *const pixel = a_from + x_rows[k * 16 + which / 2 * 8 + row_of];
            uint32 a[2][4];
            fd_ldmatrix_x4_trans(a[0], pixel);
            fd_ldmatrix_x4_trans(a[1], pixel + 16);
            FD_UNROLL
            for (int n = 0; n < NT; n += 2) {
                uint32 b[4];
                fd_ldmatrix_x4_trans(b, b_from + k * 16 * DY_PITCH + n * 8);
                FD_UNROLL
                for (int m = 0; m < 2; m++) {
                    fd_mma_m16n8k16(acc[m][n], a[m], b[0], b[1]);
                    fd_mma_m16n8k16(acc[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
    if (first_channel == 0 && first_r == 0 && first_s == 0) {  // threads in rising order
        float *const columns = reinterpret_cast<float *>(shared);
        fd_syncthreads();
        FD_UNROLL
        for (int i = 0; !stands_by && i < GROUP; i++) columns[thread * GROUP + i] = sums[i];
        fd_syncthreads();
        if (thread < BN && first_output + thread < K) {
            float sum = 0;
            for (int other = thread / GROUP; other < threads; other += DY_GROUPS) {
                sum += columns[other * GROUP + thread % GROUP];
            }
            db[number * row + first_output + thread] = sum;
        }
    }
    if (!works) return;
    const int tap = (first_r + r) * kernel[1] + first_s + s;
    FD_UNROLL
    for (int m = 0; m < 4; m++) {
        const int c = channel + m * 8 + lane / 4;
        if (c >= C) break;
        FD_UNROLL
        for (int n = 0; n < NT; n++) {
            const int k = first_output + first_n + n * 8 + lane % 4 * 2;
            mma_store2(dw + number * row + ((int64)tap * C + c) * K + k, acc[m / 2][n][m % 2 * 2],
                       acc[m / 2][n][m % 2 * 2 + 1], K - k, flags & PAIRS);
        }
    }
}

FD_KERNEL FD_BOUNDS(576, 1)
    conv_mma_weight_64(const real *x, const real *dy, real *dw, real *db, MmaTasks tasks) {
    mma_weight<2>(x, dy, dw, db, tasks);
}

FD_KERNEL FD_BOUNDS(288, 2)
    conv_mma_weight_32(const real *x, const real *dy, real *dw, real *db, MmaTasks tasks) {
    mma_weight<1>(x, dy, dw, db, tasks);
}

// Row g of (dw, db) = rows g fan, g fan + 1, ... of partials (count, row), added in this order; the first `size` values
// of a row are those of dw, the rest those of db. A thread makes a value of a task.
FD_KERNEL FD_BOUNDS(256, 4)
    conv_mma_sum(const real *partials, real *dw, real *db, SumTasks tasks, int fan) {
    FD_SHARED_ARRAY(SumTask, mine, 1);
    const int64 block = fd_find_task(tasks, mine), row = mine->row, count = mine->count;
    const int64 at = block * blockDim.x + threadIdx.x, g = at / row, i = at - g * row, first = g * fan;
    if (first >= count) return;
    const real *const from = partials + mine->partials + i;
    real sum = 0;
    for (int64 k = first; k < min(count, first + fan); k++) sum += from[k * row];
    (i < mine->size ? dw + mine->dw + i : db + mine->db + (i - mine->size))[g * row] = sum;
}
