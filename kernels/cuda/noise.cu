// Normals by the noise law, and forward noising.
//
// A thread takes one Philox block, or four neighbours of one row (the _wide entries, for widths that are multiples of
// 16: then every quarter of every row is 16-byte aligned where the array is). Neighbouring threads take neighbouring
// blocks, so each quarter of a row is read and written in one run. What is read is on its way while the normals are
// made; within a row offsets have 32 bits, but for the _wide entries.

#include "store.cuh"

FD_KERNEL normal(float *__restrict__ out_nd, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                 RoundKeys keys) {
    const int quarter = (int)((width + 3) / 4);
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        const Normals z = fd_normals(first_row + walk.row, (uint32)walk.item, step, stream, keys);
        float *const out = out_nd + walk.row * width + walk.item;
        const int left = (int)width - (int)walk.item;  // values of the row from here on
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
        fd_put4(out, z.z0);
        fd_put4(out + quarter, z.z1);
        fd_put4(out + 2 * quarter, z.z2);
        fd_put4(out + 3 * quarter, z.z3);
    }
}

// out = signal[t] x0 + noise[t] eps; eps is stored where it is wanted.
FD_DEVICE void noise_four(const float4 &x, real *out, real *eps, real a, real b, const float4 &z) {
    fd_put4(out, make_float4(a * x.x + b * z.x, a * x.y + b * z.y, a * x.z + b * z.z, a * x.w + b * z.w));
    if (eps) fd_put4(eps, z);
}

FD_KERNEL forward_noise(const real *__restrict__ x0_nd, const int64 *__restrict__ t_n,
                        const real *__restrict__ signal_t, const real *__restrict__ noise_t, real *__restrict__ out_nd,
                        real *__restrict__ eps_nd, int64 n, int64 width, uint64 first_row, uint32 stream,
                        RoundKeys keys) {
    const int quarter = (int)((width + 3) / 4);
    for (Walk walk = fd_walk(quarter); walk.row < n; fd_walk_on(walk, quarter)) {
        const int64 t = t_n[walk.row], at = walk.row * width + walk.item;
        const int left = (int)width - (int)walk.item;
        const bool second = quarter < left, third = 2 * quarter < left, fourth = 3 * quarter < left;
        const real *const x = x0_nd + at;
        const real x0 = x[0], x1 = second ? x[quarter] : 0, x2 = third ? x[2 * quarter] : 0,
                   x3 = fourth ? x[3 * quarter] : 0;
        const real a = signal_t[t], b = noise_t[t];
        const Normals z = fd_normals(first_row + walk.row, (uint32)walk.item, 0, stream, keys);
        real *const out = out_nd + at;
        out[0] = a * x0 + b * z.z0;
        if (second) out[quarter] = a * x1 + b * z.z1;
        if (third) out[2 * quarter] = a * x2 + b * z.z2;
        if (fourth) out[3 * quarter] = a * x3 + b * z.z3;
        if (eps_nd) {
            real *const eps = eps_nd + at;
            eps[0] = z.z0;
            if (second) eps[quarter] = z.z1;
            if (third) eps[2 * quarter] = z.z2;
            if (fourth) eps[3 * quarter] = z.z3;
        }
    }
}

FD_KERNEL forward_noise_wide(const real *__restrict__ x0_nd, const int64 *__restrict__ t_n,
                             const real *__restrict__ signal_t, const real *__restrict__ noise_t,
                             real *__restrict__ out_nd, real *__restrict__ eps_nd, int64 n, int64 width,
                             uint64 first_row, uint32 stream, RoundKeys keys) {
    const int64 quarter = width / 4, groups = width / 16;
    for (Walk walk = fd_walk(groups); walk.row < n; fd_walk_on(walk, groups)) {
        const int64 t = t_n[walk.row], at = walk.row * width + 4 * walk.item;
        const real *const x = x0_nd + at;
        const float4 x0 = fd_load4(x), x1 = fd_load4(x + quarter), x2 = fd_load4(x + 2 * quarter),
                     x3 = fd_load4(x + 3 * quarter);
        const real a = signal_t[t], b = noise_t[t];
        const Quads z = fd_quads(first_row + walk.row, 4 * (uint32)walk.item, 0, stream, keys);
        real *const out = out_nd + at, *const eps = eps_nd ? eps_nd + at : nullptr;
        noise_four(x0, out, eps, a, b, z.z0);
        noise_four(x1, out + quarter, eps ? eps + quarter : nullptr, a, b, z.z1);
        noise_four(x2, out + 2 * quarter, eps ? eps + 2 * quarter : nullptr, a, b, z.z2);
        noise_four(x3, out + 3 * quarter, eps ? eps + 3 * quarter : nullptr, a, b, z.z3);
    }
}
