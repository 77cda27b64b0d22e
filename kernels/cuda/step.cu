// The fused sampler step: one row of a table over x, in place, the noise in registers. How threads share the work is
// said in noise.cu. `out` may be null where the row takes nothing from it, `previous` where no x0 is kept.

FD_DEVICE void step_one(const TableRow &row, real *x_nd, const real *out_nd, real *previous_nd, int64 at, float z) {
    const real x = x_nd[at];
    const real out = row.q != 0 || row.e != 0 ? out_nd[at] : 0;
    const real previous = row.c != 0 ? previous_nd[at] : 0;
    const real x0 = fd_row_x0(row, x, out);
    x_nd[at] = fd_row_x(row, x, x0, previous, out, z);
    if (previous_nd) previous_nd[at] = x0;
}

FD_DEVICE void step_four(const TableRow &row, real *x_nd, const real *out_nd, real *previous_nd, int64 at, float4 z) {
    const float4 none = make_float4(0, 0, 0, 0);
    float4 x = fd_load4(x_nd + at);
    const float4 out = row.q != 0 || row.e != 0 ? fd_load4(out_nd + at) : none;
    const float4 previous = row.c != 0 ? fd_load4(previous_nd + at) : none;
    const float4 x0 = make_float4(fd_row_x0(row, x.x, out.x), fd_row_x0(row, x.y, out.y),
                                  fd_row_x0(row, x.z, out.z), fd_row_x0(row, x.w, out.w));
    x.x = fd_row_x(row, x.x, x0.x, previous.x, out.x, z.x);
    x.y = fd_row_x(row, x.y, x0.y, previous.y, out.y, z.y);
    x.z = fd_row_x(row, x.z, x0.z, previous.z, out.z, z.z);
    x.w = fd_row_x(row, x.w, x0.w, previous.w, out.w, z.w);
    fd_store4(x_nd + at, x);
    if (previous_nd) fd_store4(previous_nd + at, x0);
}

// A row without noise (s = 0) draws none.
FD_DEVICE void step_rows(real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row, int64 n, int64 width,
                         uint64 first_row, uint32 step, uint32 stream, const RoundKeys &keys) {
    const int64 quarter = (width + 3) / 4;
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        Normals z = {0, 0, 0, 0};
        if (row.s != 0) z = fd_normals(first_row + walk.row, (uint32)walk.item, step, stream, keys);
        const int64 at = walk.row * width + walk.item, left = width - walk.item;
        step_one(row, x_nd, out_nd, previous_nd, at, z.z0);
        if (quarter < left) step_one(row, x_nd, out_nd, previous_nd, at + quarter, z.z1);
        if (2 * quarter < left) step_one(row, x_nd, out_nd, previous_nd, at + 2 * quarter, z.z2);
        if (3 * quarter < left) step_one(row, x_nd, out_nd, previous_nd, at + 3 * quarter, z.z3);
    }
}

FD_DEVICE void step_rows_wide(real *x_nd, const real *out_nd, real *previous_nd, const TableRow &row, int64 n,
                              int64 width, uint64 first_row, uint32 step, uint32 stream, const RoundKeys &keys) {
    const int64 quarter = width / 4, groups = width / 16;
    for (Walk walk = fd_walk(groups); walk.row < n; fd_walk_on(walk, groups)) {
        Quads z = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}};
        if (row.s != 0) z = fd_quads(first_row + walk.row, 4 * (uint32)walk.item, step, stream, keys);
        const int64 at = walk.row * width + 4 * walk.item;
        step_four(row, x_nd, out_nd, previous_nd, at, z.z0);
        step_four(row, x_nd, out_nd, previous_nd, at + quarter, z.z1);
        step_four(row, x_nd, out_nd, previous_nd, at + 2 * quarter, z.z2);
        step_four(row, x_nd, out_nd, previous_nd, at + 3 * quarter, z.z3);
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

// A row without noise does not look at rows and columns. `vectors` says that all arrays are 16-byte aligned.
FD_KERNEL step_quiet(real *__restrict__ x, const real *__restrict__ out, real *__restrict__ previous, TableRow row,
                     int64 size, int vectors) {
    const int64 fours = vectors ? size / 4 : 0;
    FD_GRID_STRIDE(i, fours) step_four(row, x, out, previous, 4 * i, make_float4(0, 0, 0, 0));
    FD_GRID_STRIDE(i, size - 4 * fours) step_one(row, x, out, previous, 4 * fours + i, 0);
}
