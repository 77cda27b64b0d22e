#include "elementary.cuh"
#include "store.cuh"

// The fused sampler step: one row of a table over x, in place, the noise in registers. How threads share the work is
// said in noise.cu. `out` may be null where the row takes nothing from it.
//
// Most tables remember one row at most. For these `previous` is m1 and takes this row's m, and is null where none is
// kept. step_deep and step_deep_recorded run any row. Rows that draw noise are plain more often than not, and have
// loops of their own for that: what is not there need not be left out value by value.

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

// x' = a x + b m + s z with m = clip(p x + q out), all of them there and nothing remembered.
FD_DEVICE bool step_is_plain(const TableRow &row, const real *previous_nd) {
    const bool terms = row.p != 0 && row.q != 0 && row.a != 0 && row.b != 0 && row.c1 == 0 && row.e == 0;
    return terms && fabsf(row.s) > 1e-18f && !previous_nd;
}

// The bits of step_one. There a sum begins with 0, so that it is never -0. Here m may be -0, which changes no other sum,
// and x' is not: s z + 0 is never -0, which is s z rounded once, since normals are 0 or above 1e-10 and do not vanish.
FD_DEVICE real step_plain_one(const TableRow &row, real x, real out, real z) {
    const real m = fd_most(fd_least(row.p * x + row.q * out, row.high), row.low);
    return row.a * x + row.b * m + fmaf(row.s, z, 0.0f);
}

FD_DEVICE float4 step_plain_four(const TableRow &row, const float4 &x, const float4 &out, const float4 &z) {
    return make_float4(step_plain_one(row, x.x, out.x, z.x), step_plain_one(row, x.y, out.y, z.y),
                       step_plain_one(row, x.z, out.z, z.z), step_plain_one(row, x.w, out.w, z.w));
}

// A row without noise (s = 0) draws none.
FD_DEVICE void step_rows(real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row, int64 n, int64 width,
                         uint64 first_row, uint32 step, uint32 stream, const RoundKeys &keys) {
    const auto normals = [&](uint64 i, uint32 block) {
        return fd_normals(i, block, step, stream, keys);
    };
    if (step_is_plain(row, previous_nd)) {
        fd_each_block(first_row, n, width, [&](uint64 i, uint32 block, const Places &places) {
            const float4 x = fd_gather(x_nd, places), out = fd_gather(out_nd, places);
            fd_scatter(x_nd, places, step_plain_four(row, x, out, normals(i, block)));
        });
        return;
    }
    const float4 none = make_float4(0, 0, 0, 0);
    fd_each_block(first_row, n, width, [&](uint64 i, uint32 block, const Places &places) {
        float4 x = fd_gather(x_nd, places);
        const float4 out = row.q != 0 || row.e != 0 ? fd_gather(out_nd, places) : none;
        float4 previous = row.c1 != 0 ? fd_gather(previous_nd, places) : none;
        step_four(row, x, out, previous, row.s != 0 ? normals(i, block) : none);
        fd_scatter(x_nd, places, x);
        if (previous_nd) fd_scatter(previous_nd, places, previous);
    });
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

FD_DEVICE void step_rows_wide(real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row, int64 n,
                              int64 width, uint64 first_row, uint32 step, uint32 stream, const RoundKeys &keys) {
    const int64 quarter = width / 4, groups = width / 16;
    if (step_is_plain(row, previous_nd)) {
        for (Walk walk = fd_walk(groups); walk.row < n; fd_walk_on(walk, groups)) {
            const int64 at = walk.row * width + 4 * walk.item;
            real *const to = x_nd + at;
            const real *const from = out_nd + at;
            const float4 x0 = fd_take4(to), x1 = fd_take4(to + quarter), x2 = fd_take4(to + 2 * quarter),
                         x3 = fd_take4(to + 3 * quarter);
            const float4 out0 = fd_take4(from), out1 = fd_take4(from + quarter), out2 = fd_take4(from + 2 * quarter),
                         out3 = fd_take4(from + 3 * quarter);
            const Quads z = fd_quads(first_row + walk.row, 4 * (uint32)walk.item, step, stream, keys);
            fd_put4(to, step_plain_four(row, x0, out0, z.z0));
            fd_put4(to + quarter, step_plain_four(row, x1, out1, z.z1));
            fd_put4(to + 2 * quarter, step_plain_four(row, x2, out2, z.z2));
            fd_put4(to + 3 * quarter, step_plain_four(row, x3, out3, z.z3));
        }
        return;
    }
    for (Walk walk = fd_walk(groups); walk.row < n; fd_walk_on(walk, groups)) {
        Quads z = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}};
        if (row.s != 0) z = fd_quads(first_row + walk.row, 4 * (uint32)walk.item, step, stream, keys);
        const int64 at = walk.row * width + 4 * walk.item;
        step_wide_four(row, x_nd, out_nd, previous_nd, at, z.z0);
        step_wide_four(row, x_nd, out_nd, previous_nd, at + quarter, z.z1);
        step_wide_four(row, x_nd, out_nd, previous_nd, at + 2 * quarter, z.z2);
        step_wide_four(row, x_nd, out_nd, previous_nd, at + 3 * quarter, z.z3);
    }
}

FD_KERNEL step_noisy(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd,
                     TableRow row, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                     RoundKeys keys) {
    step_rows(x_nd, out_nd, previous_nd, row, n, width, first_row, step, stream, keys);
}

FD_KERNEL step_noisy_wide(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd,
                          TableRow row, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                          RoundKeys keys) {
    step_rows_wide(x_nd, out_nd, previous_nd, row, n, width, first_row, step, stream, keys);
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
    step_rows(x_nd, out_nd, previous_nd, r.row, n, width, r.first_row, r.step, r.stream, r.keys);
}

FD_KERNEL step_recorded_wide(real *__restrict__ x_nd, const real *__restrict__ out_nd, real *__restrict__ previous_nd,
                             const RowRecord *__restrict__ record_at, int64 n, int64 width) {
    const RowRecord r = *record_at;
    step_rows_wide(x_nd, out_nd, previous_nd, r.row, n, width, r.first_row, r.step, r.stream, r.keys);
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
