#include "elementary.cuh"
#include "store.cuh"
#include "tiles.cuh"

// The fused sampler step: one row of a table over x, in place, the noise in registers. How threads share the work is
// said in noise.cu. `out` may be null where the row takes nothing from it.
//
// Most tables remember one row at most. For these `previous` is m1 and takes this row's m, and is null where none is
// kept. step_deep and step_deep_recorded run any row, and step_plan in step.py says which row needs them.

#define STEP_EACH \
    FD_UNROLL     \
    for (int k = 0; k < N; k++)

FD_DEVICE float4 step_times(real c, const float4 &v) { return make_float4(c * v.x, c * v.y, c * v.z, c * v.w); }

FD_DEVICE float4 step_plus(const float4 &u, const float4 &v) {
    return make_float4(u.x + v.x, u.y + v.y, u.z + v.z, u.w + v.w);
}

FD_DEVICE real step_clip(const TableRow &row, real m) { return fd_most(fd_least(m, row.high), row.low); }

FD_DEVICE float4 step_clip(const TableRow &row, const float4 &m) {
    return make_float4(step_clip(row, m.x), step_clip(row, m.y), step_clip(row, m.z), step_clip(row, m.w));
}

FD_DEVICE float4 step_noise(real s, const float4 &z) {
    return make_float4(fmaf(s, z.x, 0.0f), fmaf(s, z.y, 0.0f), fmaf(s, z.z, 0.0f), fmaf(s, z.w, 0.0f));
}

// No memory; see StepMemory.
template <int N>
struct StepForgets {
    FD_MEMBER Fours<N> take() const { return {}; }
    FD_MEMBER void put(const Fours<N> &) const {}
};

// Each kind of rows has a loop of its own. PLAIN rows have p, q, a, b and s, and nothing else; the others keep m, and
// then have q and may take m1, or do neither. Those without noise (s = 0) draw none; those that keep m and draw have a
// and b.
enum StepKind { PLAIN, FORGETS, KEEPS };

// x becomes x', and the memory m where one is kept, for rows that are like `_usual` of step.py. Which terms there are
// is asked once for all values.
//
// In the law a sum begins with 0, so that it is never -0. Here it may be till s z + 0 is added, which is s z rounded
// once and never -0, since normals are 0 or above 1e-10 and do not vanish. Nor is an m that is kept.
template <int KIND, bool NOISY, int N, class Memory>
FD_DEVICE void step_some(const TableRow &row, Fours<N> &x, const Fours<N> &out, const Fours<N> &z,
                         const Memory &memory) {
    const bool both = KIND == PLAIN || (KIND == KEEPS && NOISY);  // a and b
    Fours<N> m, sum;
    if (KIND == FORGETS && row.q == 0) {
        STEP_EACH x.v[k] = step_plus(step_times(row.a, x.v[k]), step_noise(row.s, z.v[k]));
        return;
    }
    STEP_EACH m.v[k] = step_times(row.q, out.v[k]);
    if (KIND == PLAIN || row.p != 0) {
        STEP_EACH m.v[k] = step_plus(step_times(row.p, x.v[k]), m.v[k]);
    }
    STEP_EACH m.v[k] = step_clip(row, m.v[k]);
    if (!both && row.a == 0) {
        STEP_EACH sum.v[k] = step_times(row.b, m.v[k]);
    } else {
        STEP_EACH sum.v[k] = step_times(row.a, x.v[k]);
        if (both || row.b != 0) {
            STEP_EACH sum.v[k] = step_plus(sum.v[k], step_times(row.b, m.v[k]));
        }
    }
    if (KIND == KEEPS && row.c1 != 0) {
        const Fours<N> m1 = memory.take();
        STEP_EACH sum.v[k] = step_plus(sum.v[k], step_times(row.c1, m1.v[k]));
    }
    if (KIND != PLAIN && row.e != 0) {
        STEP_EACH sum.v[k] = step_plus(sum.v[k], step_times(row.e, out.v[k]));
    }
    STEP_EACH x.v[k] = step_plus(sum.v[k], step_noise(row.s, z.v[k]));
    if (KIND == KEEPS) {
        STEP_EACH m.v[k] = step_plus(m.v[k], make_float4(0, 0, 0, 0));
        memory.put(m);
    }
}

FD_DEVICE bool step_is_plain(const TableRow &row, const real *previous_nd) {
    const bool full = row.p != 0 && row.q != 0 && row.a != 0 && row.b != 0 && row.s != 0;
    return full && row.c1 == 0 && row.e == 0 && !previous_nd;
}

// What stays the same for all rows of a launch.
struct StepLaw {
    uint64 first_row;
    uint32 step, stream;
    const RoundKeys &keys;
    FD_MEMBER float4 normals(uint64 row, uint32 block) const { return fd_normals(row, block, step, stream, keys); }
};

// ------------------------------------------------------------------------------------------- rows of any width

// What is remembered of a block.
struct StepMemory {
    real *at;
    const Places &places;
    FD_MEMBER Fours<1> take() const { return {fd_gather(at, places)}; }
    FD_MEMBER void put(const Fours<1> &m) const { fd_scatter(at, places, m.v[0]); }
};

// In each of the three forms an array that is not there is x, which is read for nothing.
struct StepNarrow {
    template <int KIND, bool NOISY>
    FD_MEMBER void run(real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row, int64 n, int64 width,
                       const StepLaw &law) const {
        const auto one = [&](uint64 i, uint32 block, const Places &places, real *at, const real *from, real *kept) {
            Fours<1> x = {fd_gather(at, places)}, z = {};
            const Fours<1> out = {fd_gather(from, places)};
            if (NOISY) z.v[0] = law.normals(i, block);
            if (KIND == KEEPS)
                step_some<KIND, NOISY>(row, x, out, z, StepMemory{kept, places});
            else
                step_some<KIND, NOISY>(row, x, out, z, StepForgets<1>());
            fd_scatter(at, places, x.v[0]);
        };
        fd_each_block(law.first_row, n, width, one, x_nd, out_nd ? out_nd : x_nd, KIND == KEEPS ? previous_nd : x_nd);
    }
};

// ------------------------------------------------------------------------------------------- rows of 16, 32, .. values

FD_DEVICE Fours<4> step_take(const real *p, uint32 quarter) {
    const float4 v0 = fd_take4(p), v1 = fd_take4(p += quarter), v2 = fd_take4(p += quarter), v3 = fd_take4(p += quarter);
    return {v0, v1, v2, v3};
}
FD_DEVICE void step_put(real *p, uint32 quarter, const Fours<4> &fours) {
    FD_UNROLL
    for (int k = 0; k < 4; k++, p += quarter) fd_put4(p, fours.v[k]);
}

// The same of four neighbours.
struct StepMemoryWide {
    real *at;
    uint32 quarter;
    FD_MEMBER Fours<4> take() const { return step_take(at, quarter); }
    FD_MEMBER void put(const Fours<4> &m) const { step_put(at, quarter, m); }
};

struct StepWide {
    template <int KIND, bool NOISY>
    FD_MEMBER void run(real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row, int64 n, int64 width,
                       const StepLaw &law) const {
        const auto four = [&](int64 i, uint32 block, uint32 quarter, real *at, const real *from, real *kept) {
            Fours<4> x = step_take(at, quarter), z = {};
            const Fours<4> out = step_take(from, quarter);
            if (NOISY) {
                const Quads drawn = fd_quads(law.first_row + i, block, law.step, law.stream, law.keys);
                z = {drawn.z0, drawn.z1, drawn.z2, drawn.z3};
            }
            if (KIND == KEEPS)
                step_some<KIND, NOISY>(row, x, out, z, StepMemoryWide{kept, quarter});
            else
                step_some<KIND, NOISY>(row, x, out, z, StepForgets<4>());
            step_put(at, quarter, x);
        };
        fd_each_group(n, width, four, x_nd, out_nd ? out_nd : x_nd, KIND == KEEPS ? previous_nd : x_nd);
    }
};

// ------------------------------------------------------------------------------------------- tiles of rows

// The same of lines; m1 of those that may not be touched is what it was.
struct StepMemoryLines {
    real *at;
    Fours<TILE_LINES> &m1;
    const bool *whole;
    FD_MEMBER Fours<TILE_LINES> take() const {
        tile_take(m1.v, at, whole);
        return m1;
    }
    FD_MEMBER void put(const Fours<TILE_LINES> &m) const { tile_put(at, m.v, whole); }
};

struct StepTiles {
    int rows;
    template <int KIND, bool NOISY>
    FD_MEMBER void run(real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row, int64 n, int64 width,
                       const StepLaw &law) const {
        FD_SHARED(real, tile);
        const real *const from_nd = out_nd ? out_nd : x_nd;
        Fours<TILE_LINES> x = {}, out = {}, m1 = {};
        const auto take = [&](uint32, const Tiles &, const bool *whole, real *at, const real *from, real *) {
            tile_take(x.v, at, whole);
            tile_take(out.v, from, whole);
        };
        const auto draw = [&](uint32 i, uint32 block) { return law.normals(fd_same_half(law.first_row, i), block); };
        const auto put = [&](const Fours<TILE_LINES> &z, const bool *whole, real *at, const real *, real *kept) {
            if (KIND == KEEPS)
                step_some<KIND, NOISY>(row, x, out, z, StepMemoryLines{kept, m1, whole});
            else
                step_some<KIND, NOISY>(row, x, out, z, StepForgets<TILE_LINES>());
            tile_put(at, x.v, whole);
        };
        const Tiles my = fd_tiles(tile, n, width, rows);
        const int64 begin = (int64)blockIdx.x * rows, at = begin * width + 4 * threadIdx.x;
        fd_each_tile<NOISY>((uint32)(law.first_row + begin), my, tile, take, draw, put, x_nd + at, from_nd + at,
                            (KIND == KEEPS ? previous_nd : x_nd) + at);
        const int64 rest = fd_tile_rest(my, n, width);
        if (rest >= 0) {
            const Places none = {0, 0, 0};
            const real drawn = NOISY ? tile[rest - (n - 1) / rows * rows * width] : 0.0f;
            Fours<1> one = {make_float4(x_nd[rest], 0, 0, 0)};
            const Fours<1> from = {make_float4(from_nd[rest], 0, 0, 0)}, z = {make_float4(drawn, 0, 0, 0)};
            if (KIND == KEEPS)
                step_some<KIND, NOISY>(row, one, from, z, StepMemory{previous_nd + rest, none});
            else
                step_some<KIND, NOISY>(row, one, from, z, StepForgets<1>());
            x_nd[rest] = one.v[0].x;
        }
    }
};

// ------------------------------------------------------------------------------------------- entries

template <bool MAY_BE_QUIET, class Form>
FD_DEVICE void step_rows(const Form &form, real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row,
                         int64 n, int64 width, const StepLaw &law) {
    if (MAY_BE_QUIET && row.s == 0) {
        if (previous_nd)
            form.template run<KEEPS, false>(x_nd, out_nd, previous_nd, row, n, width, law);
        else
            form.template run<FORGETS, false>(x_nd, out_nd, previous_nd, row, n, width, law);
    } else if (step_is_plain(row, previous_nd)) {
        form.template run<PLAIN, true>(x_nd, out_nd, previous_nd, row, n, width, law);
    } else if (previous_nd) {
        form.template run<KEEPS, true>(x_nd, out_nd, previous_nd, row, n, width, law);
    } else {
        form.template run<FORGETS, true>(x_nd, out_nd, previous_nd, row, n, width, law);
    }
}

FD_KERNEL step_noisy(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd,
                     TableRow row, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                     RoundKeys keys) {
    step_rows<false>(StepNarrow(), x_nd, out_nd, previous_nd, row, n, width, {first_row, step, stream, keys});
}

FD_KERNEL FD_BOUNDS(256, 2)
    step_noisy_wide(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd, TableRow row,
                    int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream, RoundKeys keys) {
    step_rows<false>(StepWide(), x_nd, out_nd, previous_nd, row, n, width, {first_row, step, stream, keys});
}

FD_KERNEL FD_BOUNDS(TILE_THREADS, 2)
    step_noisy_rows(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd, TableRow row,
                    int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream, RoundKeys keys, int rows) {
    step_rows<false>(StepTiles{rows}, x_nd, out_nd, previous_nd, row, n, width, {first_row, step, stream, keys});
}

// ------------------------------------------------------------------------------------------- guidance

// out = u + weight (c - u), of n values; out may be c.
FD_KERNEL guide(const real *c, const real *u, real *out, int64 n, real weight) {
    FD_GRID_STRIDE(i, n) { out[i] = (c[i] - u[i]) * weight + u[i]; }
}

// Sum of what the lanes of a warp have, the same in all of them.
FD_DEVICE real guide_sum(real value) {
    FD_UNROLL
    for (int mask = FD_WARP / 2; mask > 0; mask /= 2) value = value + fd_shuffle_xor(value, mask);
    return value;
}

// Standard deviation of a row of `width` values, by a warp.
FD_DEVICE real guide_deviation(const real *row, int64 width, int lane) {
    real sum = 0;
    for (int64 j = lane; j < width; j += FD_WARP) sum = sum + row[j];
    const real mean = guide_sum(sum) / (real)width;
    sum = 0;
    for (int64 j = lane; j < width; j += FD_WARP) sum = sum + (row[j] - mean) * (row[j] - mean);
    return sqrtf(guide_sum(sum) / (real)width);
}

// Rows of out times share std(c) / std(out) + 1 - share. A warp takes a row.
FD_KERNEL guide_rescale(const real *c, real *out, int64 n, int64 width, real share) {
    const int lane = threadIdx.x % FD_WARP;
    const int64 warps = (int64)gridDim.x * blockDim.x / FD_WARP;
    for (int64 i = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / FD_WARP; i < n; i += warps) {
        real *row = out + i * width;
        const real narrow = guide_deviation(c + i * width, width, lane), wide = guide_deviation(row, width, lane);
        const real scale = share * narrow / (wide > 0 ? wide : 1.0f) + (1.0f - share);
        for (int64 j = lane; j < width; j += FD_WARP) row[j] = row[j] * scale;
    }
}

// One thread. What differs from one repetition of a sampling step to the next, where its graph reads it.
FD_KERNEL set_row(RowRecord record, RowRecord *__restrict__ record_at) { *record_at = record; }

FD_KERNEL step_recorded(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd,
                        const RowRecord *__restrict__ record_at, int64 n, int64 width) {
    const RowRecord r = *record_at;
    step_rows<true>(StepNarrow(), x_nd, out_nd, previous_nd, r.row, n, width, {r.first_row, r.step, r.stream, r.keys});
}

FD_KERNEL FD_BOUNDS(256, 2)
    step_recorded_wide(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd,
                       const RowRecord *__restrict__ record_at, int64 n, int64 width) {
    const RowRecord r = *record_at;
    step_rows<true>(StepWide(), x_nd, out_nd, previous_nd, r.row, n, width, {r.first_row, r.step, r.stream, r.keys});
}

FD_KERNEL FD_BOUNDS(TILE_THREADS, 2)
    step_recorded_rows(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd,
                       const RowRecord *__restrict__ record_at, int64 n, int64 width, int rows) {
    const RowRecord r = *record_at;
    step_rows<true>(StepTiles{rows}, x_nd, out_nd, previous_nd, r.row, n, width,
                    {r.first_row, r.step, r.stream, r.keys});
}

// m1, m2 and m3 of a table that reaches back so far. The first `keep` of them take this row's m, and each other's.
struct Memory {
    real *m1, *m2, *m3;
    int keep;
};

FD_DEVICE void step_deep_one(const TableRow &row, real *x_nd, const real *out_nd, const real *v_nd,
                             const Memory &memory, int64 at, float z) {
    const real x = x_nd[at];
    const real out = row.q != 0 || row.e != 0 ? out_nd[at] : 0;
    const real m1 = row.c1 != 0 || memory.keep > 1 ? memory.m1[at] : 0;
    const real m2 = row.c2 != 0 || memory.keep > 2 ? memory.m2[at] : 0;
    const real m3 = row.c3 != 0 ? memory.m3[at] : 0;
    const real m = fd_row_m(row, x, out);
    if (row.r != 0 && row.s != 0) {
        const real power = row.r * v_nd[at];
        z = z * fd_exp(power > 88.0f ? 88.0f : power);
    }
    x_nd[at] = fd_row_x<true>(row, x, m, {m1, m2, m3}, out, z);
    if (memory.keep > 2) memory.m3[at] = m2;
    if (memory.keep > 1) memory.m2[at] = m1;
    if (memory.keep > 0) memory.m1[at] = m;
}

FD_DEVICE void step_deep_rows(real *x_nd, const real *out_nd, const real *v_nd, const Memory &memory,
                              const TableRow &row, const int64 *rows, int64 n, int64 width, uint64 first_row,
                              uint32 step, uint32 stream, const RoundKeys &keys) {
    const int64 quarter = (width + 3) / 4;
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        float4 normals = make_float4(0, 0, 0, 0);
        const uint64 index = rows ? (uint64)rows[walk.row] : first_row + walk.row;
        if (row.s != 0) normals = fd_normals(index, (uint32)walk.item, step, stream, keys);
        const real z[4] = {normals.x, normals.y, normals.z, normals.w};
        FD_UNROLL
        for (int k = 0; k < 4; k++) {
            const int64 j = walk.item + k * quarter;
            if (j < width) step_deep_one(row, x_nd, out_nd, v_nd, memory, walk.row * width + j, z[k]);
        }
    }
}

// v_nd is the second output of a denoiser that learned its variance, and is read where r is not 0.
FD_KERNEL step_deep(real *__restrict__ x_nd, const real *__restrict__ out_nd, const real *__restrict__ v_nd,
                    real *__restrict__ m1, real *__restrict__ m2, real *__restrict__ m3, int keep, TableRow row,
                    int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream, RoundKeys keys) {
    step_deep_rows(x_nd, out_nd, v_nd, {m1, m2, m3, keep}, row, nullptr, n, width, first_row, step, stream, keys);
}

// `rows` (n,) are the rows of the noise; null: those from the record's first on.
FD_KERNEL step_deep_recorded(real *__restrict__ x_nd, const real *__restrict__ out_nd, const real *__restrict__ v_nd,
                             real *__restrict__ m1, real *__restrict__ m2, real *__restrict__ m3, int keep,
                             const RowRecord *__restrict__ record_at, const int64 *__restrict__ rows, int64 n,
                             int64 width) {
    const RowRecord r = *record_at;
    step_deep_rows(x_nd, out_nd, v_nd, {m1, m2, m3, keep}, r.row, rows, n, width, r.first_row, r.step, r.stream,
                   r.keys);
}

// x becomes x', and previous m.
FD_DEVICE void step_one(const TableRow &row, real &x, real out, real &previous, real z) {
    const real m = fd_row_m(row, x, out);
    x = fd_row_x<false>(row, x, m, {previous, 0, 0}, out, z);
    previous = m;
}

FD_DEVICE void step_four(const TableRow &row, float4 &x, const float4 &out, float4 &previous, const float4 &z) {
    step_one(row, x.x, out.x, previous.x, z.x);
    step_one(row, x.y, out.y, previous.y, z.y);
    step_one(row, x.z, out.z, previous.z, z.z);
    step_one(row, x.w, out.w, previous.w, z.w);
}

FD_DEVICE void step_wide_four(const TableRow &row, real *x_nd, const real *out_nd, real *previous_nd, int64 at,
                              const float4 &z) {
    const float4 none = make_float4(0, 0, 0, 0);
    float4 x = fd_load4(x_nd + at);
    const float4 out = row.q != 0 || row.e != 0 ? fd_load4(out_nd + at) : none;
    float4 previous = row.c1 != 0 ? fd_load4(previous_nd + at) : none;
    step_four(row, x, out, previous, z);
    fd_store4(x_nd + at, x);
    if (previous_nd) fd_store4(previous_nd + at, previous);
}

// A row without noise does not look at rows and columns. `vectors` says that all arrays are 16-byte aligned.
FD_KERNEL step_quiet(real *__restrict__ x, const real *__restrict__ out, real *__restrict__ previous, TableRow row,
                     int64 size, int vectors) {
    const int64 fours = vectors ? size / 4 : 0;
    FD_GRID_STRIDE(i, fours) step_wide_four(row, x, out, previous, 4 * i, make_float4(0, 0, 0, 0));
    FD_GRID_STRIDE(k, size - 4 * fours) {
        const int64 i = 4 * fours + k;
        real before = row.c1 != 0 ? previous[i] : 0;
        step_one(row, x[i], row.q != 0 || row.e != 0 ? out[i] : 0, before, 0);
        if (previous) previous[i] = before;
    }
}
