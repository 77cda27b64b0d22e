// Normals by the noise law, and forward noising.
//
// A thread takes one Philox block, or four neighbours of one row (the _wide entries, for widths that are multiples of
// 16: then every quarter of every row is 16-byte aligned where the array is). Neighbouring threads take neighbouring
// blocks, so each quarter of a row is read and written in one run.

FD_KERNEL normal(float *__restrict__ out_nd, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                 RoundKeys keys) {
    const int64 quarter = (width + 3) / 4;
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        const Normals z = fd_normals(first_row + walk.row, (uint32)walk.item, step, stream, keys);
        float *const out = out_nd + walk.row * width + walk.item;
        const int64 left = width - walk.item;  // values of the row from here on
        out[0] = z.z0;
        if (quarter < left) out[quarter] = z.z1;
        if (2 * quarter < left) out[2 * quarter] = z.z2;
        if (3 * quarter < left) out[3 * quarter] = z.z3;
    }
}

FD_KERNEL normal_wide(float *__restrict__ out_nd, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                      RoundKeys keys) {
    const int64 quarter = width / 4, groups = width / 16;
    for (Walk walk = fd_walk(groups); walk.row < n; fd_walk_on(walk, groups)) {
        const Quads z = fd_quads(first_row + walk.row, 4 * (uint32)walk.item, step, stream, keys);
        float *const out = out_nd + walk.row * width + 4 * walk.item;
        fd_store4(out, z.z0);
        fd_store4(out + quarter, z.z1);
        fd_store4(out + 2 * quarter, z.z2);
        fd_store4(out + 3 * quarter, z.z3);
    }
}

// out = signal[t] x0 + noise[t] eps; eps is stored where it is wanted.
FD_DEVICE void noise_one(const real *x0, real *out, real *eps, int64 at, real a, real b, float z) {
    out[at] = a * x0[at] + b * z;
    if (eps) eps[at] = z;
}

FD_DEVICE void noise_four(const real *x0, real *out, real *eps, int64 at, real a, real b, float4 z) {
    const float4 x = fd_load4(x0 + at);
    fd_store4(out + at, make_float4(a * x.x + b * z.x, a * x.y + b * z.y, a * x.z + b * z.z, a * x.w + b * z.w));
    if (eps) fd_store4(eps + at, z);
}

FD_KERNEL forward_noise(const real *__restrict__ x0_nd, const int64 *__restrict__ t_n,
                        const real *__restrict__ signal_t, const real *__restrict__ noise_t, real *__restrict__ out_nd,
                        real *__restrict__ eps_nd, int64 n, int64 width, uint64 first_row, uint32 stream,
                        RoundKeys keys) {
    const int64 quarter = (width + 3) / 4;
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        const Normals z = fd_normals(first_row + walk.row, (uint32)walk.item, 0, stream, keys);
        const int64 t = t_n[walk.row], at = walk.row * width + walk.item, left = width - walk.item;
        const real a = signal_t[t], b = noise_t[t];
        noise_one(x0_nd, out_nd, eps_nd, at, a, b, z.z0);
        if (quarter < left) noise_one(x0_nd, out_nd, eps_nd, at + quarter, a, b, z.z1);
        if (2 * quarter < left) noise_one(x0_nd, out_nd, eps_nd, at + 2 * quarter, a, b, z.z2);
        if (3 * quarter < left) noise_one(x0_nd, out_nd, eps_nd, at + 3 * quarter, a, b, z.z3);
    }
}

FD_KERNEL forward_noise_wide(const real *__restrict__ x0_nd, const int64 *__restrict__ t_n,
                             const real *__restrict__ signal_t, const real *__restrict__ noise_t,
                             real *__restrict__ out_nd, real *__restrict__ eps_nd, int64 n, int64 width,
                             uint64 first_row, uint32 stream, RoundKeys keys) {
    const int64 quarter = width / 4, groups = width / 16;
    for (Walk walk = fd_walk(groups); walk.row < n; fd_walk_on(walk, groups)) {
        const Quads z = fd_quads(first_row + walk.row, 4 * (uint32)walk.item, 0, stream, keys);
        const int64 t = t_n[walk.row], at = walk.row * width + 4 * walk.item;
        const real a = signal_t[t], b = noise_t[t];
        noise_four(x0_nd, out_nd, eps_nd, at, a, b, z.z0);
        noise_four(x0_nd, out_nd, eps_nd, at + quarter, a, b, z.z1);
        noise_four(x0_nd, out_nd, eps_nd, at + 2 * quarter, a, b, z.z2);
        noise_four(x0_nd, out_nd, eps_nd, at + 3 * quarter, a, b, z.z3);
    }
}
