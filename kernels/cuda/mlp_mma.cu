// Chains of perceptrons on tensor cores: mlp_chain of mlp.cu with other products, in one of two kinds of arithmetic.
//   SPLIT: each factor is the sum of two bf16, high and low, 16 bits of it; high high, high low and low high are added
//   up in float32, and low low, below 2^-16 of the product, is left out.
//   Else each factor is one bf16.
// Everything but the factors is float32: sums, biases, modulation, activations, states and the rows of the table.
//
// Weights are packed once a launch into the order in which the lanes of a warp want them: b0 and b1 of two neighbouring
// tiles of 16 x 8 are 16 bytes of a lane, 512 neighbouring ones of a warp, so that shared memory and the caches serve
// them alike, without ldmatrix. A block has them in shared memory (`staged`) or reads them through the caches.
// Activations lie in shared memory as matrices of bf16, the low parts behind the high ones, in rows of an odd multiple of
// 16 bytes: ldmatrix meets no bank twice. An output is one sum over k, in steps of 16 ascending, whatever the tile.
//
// Counted on sm_90: a step of a warp's 32 x 32 outputs is 45 instructions, of which 24 multiply, 4 read factors of the
// samples and 4 those of W; without SPLIT 23, 8, 2 and 2. W takes as many bytes as in float32, or half as many, but for
// the zeros that fill it up.
#include "elementary.cuh"
#include "mlp.cuh"

enum { STEP = 16, PAIR = 16 };  // values of a factor that a product adds up; columns of two tiles
enum { UNIT = 128 };            // words of a step of a pair of tiles

FD_DEVICE int mma_round(int n) { return (n + 15) / 16 * 16; }

// Distance of two rows of bf16.
FD_DEVICE int mma_pitch(int n) { return mma_round(n) + 8; }

// Two values as their high parts and, of what these leave, the low ones.
struct Halves {
    uint32 high, low;
};

FD_DEVICE Halves mma_split(real first, real second) {
    const uint32 high = fd_bf16x2(first, second);
    const real rest = first - fd_bits_float((int)(high << 16));
    return {high, fd_bf16x2(rest, second - fd_bits_float((int)(high & 0xffff0000u)))};
}

// packed: of each layer the words of W, then its bias as float, filled up with zeros to multiples of 16 rows and columns.
// Words: (step, pair, high or low, lane, b0 and b1 of the first tile, of the second); with `halves` 1 the high ones only.
FD_KERNEL mlp_mma_pack(const real *params, real *packed, const int *layers, int count, int64 size, int halves) {
    FD_GRID_STRIDE(i, size) {
        int k = 0;
        while (k + 1 < count && i >= layers[(k + 1) * LAYER_COLUMNS + WEIGHT]) k++;
        const int *layer = layers + k * LAYER_COLUMNS;
        const int inputs = layer[INPUTS], outputs = layer[OUTPUTS], pairs = mma_round(outputs) / PAIR;
        if (i >= layer[BIAS]) {
            const int j = (int)i - layer[BIAS];
            packed[i] = j < outputs ? params[layer[FROM_BIAS] + j] : 0;
            continue;
        }
        const int within = (int)i - layer[WEIGHT], word = within % 4, lane = within / 4 % FD_WARP;
        const int half = within / UNIT % halves, pair = within / UNIT / halves % pairs;
        const int row = within / UNIT / halves / pairs * STEP + word % 2 * 8 + lane % 4 * 2;
        const int column = pair * PAIR + word / 2 * 8 + lane / 4;
        real values[2];
        FD_UNROLL
        for (int r = 0; r < 2; r++) {
            const bool is = row + r < inputs && column < outputs;
            values[r] = is ? params[layer[FROM_WEIGHT] + (int64)(row + r) * outputs + column] : 0;
        }
        const Halves split = mma_split(values[0], values[1]);
        reinterpret_cast<uint32 *>(packed)[i] = half ? split.low : split.high;
    }
}

// What becomes of a product: the next layer's factors; the output; of the linear part, factors times the gains of a
// timestep, and what is added to the output.
enum { TO_FACTORS, TO_OUTPUT, SCALED, ADDED };

// What a layer finds and leaves in shared memory, of `rows` samples, and whether all of them have one timestep.
struct MmaBuffers {
    const bf16 *in;
    void *out;  // bf16, or the network's output
    const int *times;
    int rows;
    bool alike;
};

// One layer on a tile of samples. A warp makes MT x 16 rows times NT x 8 columns at a time.
template <int MT, int NT, bool SPLIT>
FD_DEVICE void mma_layer(const int *layer, const real *packed, const MmaBuffers &at, int kind, const real *table,
                         int64 table_width, const LinearPart &part) {
    constexpr int HALVES = SPLIT ? 2 : 1, ROWS = 2 * MT;
    const int outputs = layer[OUTPUTS], steps = mma_round(layer[INPUTS]) / STEP, pairs = mma_round(outputs) / PAIR;
    const int in_pitch = mma_pitch(layer[INPUTS]), out_pitch = mma_pitch(outputs), lane = threadIdx.x % FD_WARP;
    const int across = (outputs + NT * 8 - 1) / (NT * 8), pieces = at.rows / (MT * 16) * across;
    const int low = at.rows * in_pitch;  // from a high part to its low one
    FD_ROLL
    for (int piece = threadIdx.x / FD_WARP; piece < pieces; piece += blockDim.x / FD_WARP) {
        const int first = piece / across * (MT * 16), first_pair = piece % across * (NT / 2);
        const bf16 *a_from = at.in + (first + lane % 16) * in_pitch + lane / 16 * 8;
        const uint4 *weights[NT / 2];
        FD_UNROLL
        for (int n = 0; n < NT / 2; n++) {  // beyond the last pair another's work is done
            const int unit = min(first_pair + n, pairs - 1) * HALVES;
            weights[n] = reinterpret_cast<const uint4 *>(packed + layer[WEIGHT]) + unit * FD_WARP + lane;
        }
        float acc[MT][NT][4];
        FD_UNROLL
        for (int m = 0; m < MT; m++) {
            FD_UNROLL
            for (int n = 0; n < NT; n++) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
        }
        uint4 b[HALVES][NT / 2];
        const auto load = [&](int half) {
            FD_UNROLL
            for (int n = 0; n < NT / 2; n++) b[half][n] = weights[n][half * FD_WARP];
        };
        const auto multiply = [&](const uint32(&a)[MT][4], int half) {
            FD_UNROLL
            for (int n = 0; n < NT; n++) {
                const uint4 &w = b[half][n / 2];
                FD_UNROLL
                for (int m = 0; m < MT; m++) {
                    fd_mma_m16n8k16(acc[m][n], a[m], n % 2 ? w.z : w.x, n % 2 ? w.w : w.y);
                }
            }
        };
        load(0);
        if (SPLIT) load(HALVES - 1);
        FD_ROLL
        for (int left = steps - 1; left >= 0; left--, a_from += STEP) {
            uint32 a[HALVES][MT][4];
            FD_UNROLL
            for (int m = 0; m < MT; m++) {
                FD_UNROLL
                for (int h = 0; h < HALVES; h++) fd_ldmatrix_x4(a[h][m], a_from + h * low + m * 16 * in_pitch);
            }
            FD_UNROLL
            for (int n = 0; n < NT / 2; n++) weights[n] += left ? pairs * HALVES * FD_WARP : 0;  // the last again
            // A factor of the next step is read once this step's last product with it has begun.
            if (SPLIT) {
                multiply(a[0], HALVES - 1);
                load(HALVES - 1);
                multiply(a[HALVES - 1], 0);
            }
            multiply(a[0], 0);
            load(0);
        }

        // By columns; what all values go through is chosen once.
        const int mode = layer[MODE], activation = layer[ACTIVATION];
        FD_UNROLL
        for (int n = 0; n < NT; n++) {
            const int j = first_pair * PAIR + n * 8 + lane % 4 * 2;
            real v[ROWS][2];
            FD_UNROLL
            for (int c = 0; c < 2; c++) {
                const int column = min(j + c, outputs - 1);
                const real bias = packed[layer[BIAS] + column];
                FD_UNROLL
                for (int i = 0; i < ROWS; i++) v[i][c] = acc[i / 2][n][i % 2 * 2 + c] + bias;
                if (mode == TIME_NONE && kind != SCALED) continue;
                real factor = 1, shift = 0;
                FD_UNROLL
                for (int i = 0; i < ROWS; i++) {
                    if (i == 0 || !at.alike) {
                        const int64 time = at.times[first + i * 8 + lane / 4];
                        const real *const modulation = table + time * table_width + layer[COLUMN];
                        factor = kind == SCALED ? part.values[part.gains + time * part.rank + column]
                                                : 1.0f + mlp_gain(modulation, mode, column);
                        shift = mlp_shift(modulation, mode, outputs, column);
                    }
                    v[i][c] = factor * v[i][c] + shift;
                }
            }
            if (activation == SILU) {
                FD_UNROLL
                for (int i = 0; i < ROWS; i++) v[i][0] = fd_silu(v[i][0]), v[i][1] = fd_silu(v[i][1]);
            }
            if (activation == LEAKY_RELU) {
                FD_UNROLL
                for (int i = 0; i < ROWS; i++) {
                    FD_UNROLL
                    for (int c = 0; c < 2; c++) v[i][c] = v[i][c] > 0 ? v[i][c] : FD_LEAKY_SLOPE * v[i][c];
                }
            }
            if (j >= pairs * PAIR) continue;
            if (kind == TO_FACTORS || kind == SCALED) {
                const bool here = j < outputs, both = j + 1 < outputs;  // the next layer multiplies the others by zeros
                FD_UNROLL
                for (int i = 0; i < ROWS; i++) {
                    const int to = ((first + i * 8 + lane / 4) * out_pitch + j) / 2;
                    const Halves split = mma_split(here ? v[i][0] : 0, both ? v[i][1] : 0);
                    reinterpret_cast<uint32 *>(at.out)[to] = split.high;
                    if (SPLIT) reinterpret_cast<uint32 *>(at.out)[to + at.rows * out_pitch / 2] = split.low;
                }
                continue;
            }
            FD_UNROLL
            for (int i = 0; i < ROWS; i++) {
                const int row = first + i * 8 + lane / 4;
                real *const to = reinterpret_cast<real *>(at.out) + row * mlp_pitch(outputs) + j;
                FD_UNROLL
                for (int c = 0; c < 2; c++) {
                    if (j + c < outputs) to[c] = kind == ADDED ? to[c] + v[i][c] : v[i][c];
                }
            }
        }
    }
}

// All rows of a sampler's table on the tiles of this block, or with none of them one forward pass; as mlp_tiles of
// mlp.cu. Shared memory: packed parameters (`staged`), x, m1 (depth > 0), what even layers leave, what odd layers leave,
// timesteps. The factors of x lie where the next layer's output does not.
template <bool SPLIT>
FD_DEVICE void mma_tiles(real *shared, real *x, real *y, const int64 *t, const TableRow *table_rows, const int64 *steps,
                         int step_count, ChainMemory memory, const int *layers, int layer_count, const real *packed,
                         int packed_size, const real *table, int64 table_width, LinearPart part, int64 n, int rows,
                         int even_bytes, int odd_bytes, bool staged, uint64 first_row, const RoundKeys &keys) {
    const int thread = threadIdx.x, threads = blockDim.x;
    const int d = layers[INPUTS], e = layers[(layer_count - 1) * LAYER_COLUMNS + OUTPUTS], quarter = (d + 3) / 4;
    const int pitch = mlp_pitch(d), factors_pitch = mma_pitch(d), depth = memory.depth;
    real *const state = shared + (staged ? packed_size : 0);
    real *const previous = state + rows * pitch;
    unsigned char *const even = reinterpret_cast<unsigned char *>(previous + (depth ? rows * pitch : 0));
    unsigned char *const odd = even + rows * even_bytes;
    int *const times = reinterpret_cast<int *>(odd + rows * odd_bytes);
    const bool out_is_even = layer_count % 2;
    real *const out = reinterpret_cast<real *>(out_is_even ? even : odd);
    if (staged) {
        for (int i = 4 * thread; i < packed_size; i += 4 * threads) fd_store4(shared + i, fd_load4(packed + i));
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
            // The linear part's two products follow the layers.
            FD_ROLL
            for (int k = 0; mlp_evaluates(steps, step_count, r) && k < layer_count + (part.values ? 2 : 0); k++) {
                const bool of_part = k >= layer_count, second = k > layer_count;
                // Even layers read `odd`; the part reads and writes where the output is not, and then adds to it.
                unsigned char *in = k % 2 ? even : odd, *to = k % 2 ? odd : even;
                if (of_part) {
                    in = out_is_even ? odd : even;
                    to = in + rows * factors_pitch * (SPLIT ? 4 : 2);
                    if (second) in = to, to = out_is_even ? even : odd;
                }
                if (k == 0 || k == layer_count) {
                    bf16 *const factors = reinterpret_cast<bf16 *>(in);
                    const int half = mma_round(d) / 2;
                    for (int i = thread; i < rows * half; i += threads) {
                        const int row = i / half, j = i % half * 2;
                        const real *const from = state + row * pitch + j;
                        const Halves split = mma_split(j < d ? from[0] : 0, j + 1 < d ? from[1] : 0);
                        uint32 *const pair = reinterpret_cast<uint32 *>(factors + row * factors_pitch + j);
                        pair[0] = split.high;
                        if (SPLIT) pair[rows * factors_pitch / 2] = split.low;
                    }
                    fd_syncthreads();
                }
                const int *const layer = layers + k * LAYER_COLUMNS;
                const int kind = second ? ADDED : of_part ? SCALED : k == layer_count - 1 ? TO_OUTPUT : TO_FACTORS;
                const MmaBuffers at = {reinterpret_cast<const bf16 *>(in), to, times, rows, step_count != 0};
                const real *const parameters = of_part ? part.values : staged ? shared : packed;
                // Large pieces where every warp gets one.
                if (rows % 32 == 0 && rows / 32 * ((layer[OUTPUTS] + 31) / 32) >= threads / FD_WARP)
                    mma_layer<2, 4, SPLIT>(layer, parameters, at, kind, table, table_width, part);
                else
                    mma_layer<1, 2, SPLIT>(layer, parameters, at, kind, table, table_width, part);
                fd_syncthreads();
                if (!second || !part.rest) continue;
                for (int i = thread; i < rows * d; i += threads) {
                    const int row = i / d, j = i % d;
                    out[row * mlp_pitch(e) + j] +=
                        fd_product(part.values[part.rest + times[row]], state[row * pitch + j]);
                }
                fd_syncthreads();
            }
            if (step_count == 0) {
                for (int i = thread; i < here * e; i += threads) y[begin * e + i] = out[i / e * mlp_pitch(e) + i % e];
                continue;
            }
            const TableRow coefficients = table_rows[r];
            for (int i = thread; i < here * quarter; i += threads) {
                const int row = i / quarter, q = i % quarter;
                mlp_step({begin + row, n, d, q, quarter}, state + row * pitch, previous + row * pitch,
                         out + row * mlp_pitch(e), coefficients, steps, step_count, r, memory, first_row, keys);
            }
        }
        // A thread stores the values of `state` that it loads again for its next tile: no barrier after this.
        fd_syncthreads();
        for (int i = thread; step_count && i < here * d; i += threads) {
            x[begin * d + i] = state[i / d * pitch + i % d];
        }
    }
}

// x (n, d) is changed by the `step_count` rows of a table, or, where there are none, y becomes the network's output at
// the timesteps t. `rows` samples are a tile, 16 or a multiple of 32; `staged` keeps the packed parameters in shared
// memory. Neither changes a bit. part_values is null where the network has no linear part.
FD_KERNEL FD_BOUNDS(512, 1)
    mlp_chain_bf16x3(real *x, real *y, const int64 *t, const TableRow *table_rows, const int64 *steps, int step_count,
                     int depth, real *deep, const int *layers, int layer_count, const real *packed, int packed_size,
                     const real *table, int64 table_width, const real *part_values, int part_rank, int part_gains,
                     int part_rest, int64 n, int rows, int even_bytes, int odd_bytes, int staged, uint64 first_row,
                     RoundKeys keys) {
    FD_SHARED(real, shared);
    const LinearPart part = {part_values, part_rank, part_gains, part_rest};
    mma_tiles<true>(shared, x, y, t, table_rows, steps, step_count, {depth, deep}, layers, layer_count, packed, packed_size,
                    table, table_width, part, n, rows, even_bytes, odd_bytes, staged, first_row, keys);
}

FD_KERNEL FD_BOUNDS(512, 1)
    mlp_chain_bf16(real *x, real *y, const int64 *t, const TableRow *table_rows, const int64 *steps, int step_count,
                   int depth, real *deep, const int *layers, int layer_count, const real *packed, int packed_size,
                   const real *table, int64 table_width, const real *part_values, int part_rank, int part_gains,
                   int part_rest, int64 n, int rows, int even_bytes, int odd_bytes, int staged, uint64 first_row,
                   RoundKeys keys) {
    FD_SHARED(real, shared);
    const LinearPart part = {part_values, part_rank, part_gains, part_rest};
    mma_tiles<false>(shared, x, y, t, table_rows, steps, step_count, {depth, deep}, layers, layer_count, packed, packed_size,
                    table, table_width, part, n, rows, even_bytes, odd_bytes, staged, first_row, keys);
}
