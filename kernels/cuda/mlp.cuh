// What the chains of perceptrons have in common, whatever multiplies: the tables that they read, and a row of a sampler's
// table on a tile of samples.

enum { ACTIVATION_NONE, LEAKY_RELU, SILU };
enum { TIME_NONE, SHIFT, SCALE_SHIFT };

FD_DEVICE real mlp_modulate(real u, int mode, real gain, real shift) {
    if (mode == SCALE_SHIFT) return (1.0f + gain) * u + shift;
    return mode == SHIFT ? u + shift : u;
}

// Gain and shift of column j; a layer with both has its `width` gains first.
FD_DEVICE real mlp_gain(const real *row, int mode, int64 j) { return mode == SCALE_SHIFT ? row[j] : 0; }

FD_DEVICE real mlp_shift(const real *row, int mode, int64 width, int64 j) {
    return mode == SCALE_SHIFT ? row[width + j] : mode == SHIFT ? row[j] : 0;
}

// Columns of the layer table. WEIGHT and BIAS are offsets in the packed parameters, which the packing kernel of a chain
// lays out; FROM_WEIGHT and FROM_BIAS are those in the network's own buffer.
enum { INPUTS, OUTPUTS, WEIGHT, BIAS, FROM_WEIGHT, FROM_BIAS, ACTIVATION, MODE, COLUMN, LAYER_COLUMNS };

// Distance of two rows in shared memory: 4 beyond a multiple of 8, so that four rows lie in different banks.
FD_DEVICE int mlp_pitch(int n) { return (n + 3) / 8 * 8 + 4; }

// A network's fixed linear part. The products with the basis and its transpose are two layers that follow the others in
// their table. `values` has their parameters, packed as others are, at `gains` the gains (T, rank), and at `rest`, where
// that is not 0, the rest (T).
struct LinearPart {
    const real *values;
    int rank, gains, rest;
};

// Whether row r evaluates the network; asked again where it matters, for want of registers.
FD_DEVICE bool mlp_evaluates(const int64 *steps, int step_count, int r) {
    return step_count == 0 || steps[2 * step_count + r];
}

// What the rows of a table remember: m1 in shared memory where `depth` is not 0, and where it is 2 or 3 both m2 and m3
// in `deep` (2, n, d). There they cost no block its place on a multiprocessor, and a thread finds what it wrote itself.
struct ChainMemory {
    int depth;
    real *deep;
};

// Where a thread works: block q of the noise of sample `row`, of n with d values.
struct ChainPlace {
    int64 row, n;
    int d, q, quarter;
};

// Row r of the table on four values of a sample, whose state, memory and output begin at `state`, `previous` and `out`.
// mlp_tiles of mlp.cu has it in its own text, for want of registers.
FD_DEVICE void mlp_step(const ChainPlace &at, real *state, real *previous, const real *out,
                        const TableRow &coefficients, const int64 *steps, int step_count, int r, ChainMemory memory,
                        uint64 first_row, const RoundKeys &keys) {
    real z[4] = {0, 0, 0, 0};
    if (coefficients.s != 0) {
        const float4 normals =
            fd_normals(first_row + at.row, at.q, (uint32)steps[step_count + r], FD_STREAM_STEP, keys);
        z[0] = normals.x, z[1] = normals.y, z[2] = normals.z, z[3] = normals.w;
    }
    const int depth = memory.depth;
    FD_UNROLL
    for (int c = 0; c < 4; c++) {
        const int j = at.q + c * at.quarter;
        if (j >= at.d) break;
        real &value = state[j];
        const real output = out[j];
        const real m = fd_row_m(coefficients, value, output);
        const real m1 = depth ? previous[j] : 0;
        if (depth > 1) {
            real *const deep = memory.deep + at.row * at.d + j;
            real &m2 = deep[0], &m3 = deep[at.n * at.d];
            value = fd_row_x<true>(coefficients, value, m, {m1, m2, m3}, output, z[c]);
            if (mlp_evaluates(steps, step_count, r)) m3 = m2, m2 = m1;
        } else {
            value = fd_row_x<false>(coefficients, value, m, {m1, 0, 0}, output, z[c]);
        }
        if (depth && mlp_evaluates(steps, step_count, r)) previous[j] = m;
    }
}
