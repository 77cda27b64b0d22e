// Normals by the noise law, and forward noising.
//
// A thread takes one Philox block, or four neighbours of one row (the _wide entries, for widths that are multiples of
// 16: then every quarter of every row is 16-byte aligned where the array is). Neighbouring threads take neighbouring
// blocks, so each quarter of a row is read and written in one run. What is read is on its way while the normals are
// made.

#include "store.cuh"

FD_KERNEL normal(float *__restrict__ out_nd, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                 RoundKeys keys) {
    const auto draw = [&](uint64 row, uint32 block, const Places &places, float *out) {
        fd_scatter(out, places, fd_normals(row, block, step, stream, keys));
    };
    fd_each_block(first_row, n, width, draw, out_nd);
}

FD_KERNEL normal_wide(float *__restrict__ out_nd, int64 n, int64 width, uint64 first_row, uint32 step, uint32 stream,
                      RoundKeys keys) {
    const auto draw = [&](int64 row, uint32 block, uint32 quarter, float *out) {
        const Quads z = fd_quads(first_row + row, block, step, stream, keys);
        fd_put4(out, z.z0);
        fd_put4(out += quarter, z.z1);
        fd_put4(out += quarter, z.z2);
        fd_put4(out += quarter, z.z3);
    };
    fd_each_group(n, width, draw, out_nd);
}

FD_DEVICE float4 noise_four(const float4 &x, real a, real b, const float4 &z) {
    return make_float4(a * x.x + b * z.x, a * x.y + b * z.y, a * x.z + b * z.z, a * x.w + b * z.w);
}

// out = signal[t] x0 + noise[t] eps; eps is stored where it is wanted.
FD_KERNEL forward_noise(const real *__restrict__ x0_nd, const int64 *__restrict__ t_n,
                        const real *__restrict__ signal_t, const real *__restrict__ noise_t, real *__restrict__ out_nd,
                        real *__restrict__ eps_nd, int64 n, int64 width, uint64 first_row, uint32 stream,
                        RoundKeys keys) {
    const auto noise = [&](uint64 row, uint32 block, const Places &places, const real *x, real *out, real *eps) {
        const int t = (int)t_n[row];
        const float4 x0 = fd_gather(x, places);
        const real a = signal_t[t], b = noise_t[t];
        const float4 z = fd_normals(first_row + row, block, 0, stream, keys);
        fd_scatter(out, places, noise_four(x0, a, b, z));
        if (eps_nd) fd_scatter(eps, places, z);
    };
    fd_each_block(0, n, width, noise, x0_nd, out_nd, eps_nd ? eps_nd : out_nd);
}

FD_KERNEL FD_BOUNDS(256, 2) forward_noise_wide(const real *__restrict__ x0_nd, const int64 *__restrict__ t_n,
                             const real *__restrict__ signal_t, const real *__restrict__ noise_t,
                             real *__restrict__ out_nd, real *__restrict__ eps_nd, int64 n, int64 width,
                             uint64 first_row, uint32 stream, RoundKeys keys) {
    const auto noise = [&](int64 row, uint32 block, uint32 quarter, const real *x, real *out, real *eps) {
        const int t = (int)t_n[row];
        const float4 x0 = fd_take4(x), x1 = fd_take4(x += quarter), x2 = fd_take4(x += quarter),
                     x3 = fd_take4(x += quarter);
        const real a = signal_t[t], b = noise_t[t];
        const Quads z = fd_quads(first_row + row, block, 0, stream, keys);
        fd_put4(out, noise_four(x0, a, b, z.z0));
        fd_put4(out += quarter, noise_four(x1, a, b, z.z1));
        fd_put4(out += quarter, noise_four(x2, a, b, z.z2));
        fd_put4(out += quarter, noise_four(x3, a, b, z.z3));
        if (eps_nd) {
            fd_put4(eps, z.z0);
            fd_put4(eps += quarter, z.z1);
            fd_put4(eps += quarter, z.z2);
            fd_put4(eps += quarter, z.z3);
        }
    };
    fd_each_group(n, width, noise, x0_nd, out_nd, eps_nd ? eps_nd : out_nd);
}
