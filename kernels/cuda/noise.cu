// Normals by the noise law, and forward noising.
//
// A thread takes one Philox block, or four neighbours of one row (the _wide entries, for widths that are multiples of
// 16: then every quarter of every row is 16-byte aligned where the array is). Neighbouring threads take neighbouring
// blocks, so each quarter of a row is read and written in one run. What is read is on its way while the normals are
// made. The _rows entries are those of tiles.cuh.

#include "store.cuh"
#include "tiles.cuh"

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

FD_KERNEL FD_BOUNDS(TILE_THREADS, 2) normal_rows(float *__restrict__ out_nd, int64 n, int64 width, uint64 first_row,
                                                 uint32 step, uint32 stream, RoundKeys keys, int rows) {
    FD_SHARED(real, tile);
    const auto take = [](uint32, const Tiles &, const bool *, float *) {};
    const auto draw = [&](uint32 row, uint32 block) {
        return fd_normals(fd_same_half(first_row, row), block, step, stream, keys);
    };
    const auto put = [](const Fours<TILE_LINES> &z, const bool *whole, float *out) { tile_put(out, z.v, whole); };
    const Tiles my = fd_tiles(tile, n, width, rows);
    const int64 row = (int64)blockIdx.x * rows, rest = fd_tile_rest(my, n, width);
    fd_each_tile<true>((uint32)(first_row + row), my, tile, take, draw, put, out_nd + row * width + 4 * threadIdx.x);
    if (rest >= 0) out_nd[rest] = tile[rest - (n - 1) / rows * rows * width];
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

// Lines know no rows: the factors of every row of a tile lie behind it, and a thread knows which of them its values
// take.
FD_KERNEL FD_BOUNDS(TILE_THREADS, 2)
    forward_noise_rows(const real *__restrict__ x0_nd, const int64 *__restrict__ t_n, const real *__restrict__ signal_t,
                       const real *__restrict__ noise_t, real *__restrict__ out_nd, real *__restrict__ eps_nd, int64 n,
                       int64 width, uint64 first_row, uint32 stream, RoundKeys keys, int rows) {
    FD_SHARED(real, tile);
    float2 *const factors = reinterpret_cast<float2 *>(tile + TILE_FLOATS);
    const Tiles my = fd_tiles(tile, n, width, rows);
    uint32 of[TILE_LINES][4];
    TILE_EACH {
        const uint32 first = 4 * threadIdx.x + TILE_LINE(k), wide = (uint32)width;
        uint32 row = first / wide, at = first - row * wide;
        FD_UNROLL
        for (int j = 0; j < 4; j++) {
            of[k][j] = fd_kept(row);
            at++;
            row += at == wide;
            at = at == wide ? 0 : at;
        }
    }
    float4 x0[TILE_LINES] = {};
    const auto take = [&](uint32 row, const Tiles &my, const bool *whole, const real *x, real *, real *) {
        row -= (uint32)first_row;
        tile_take(x0, x, whole);
        TILE_EACH {
            if (my.block[k] == 0 && row + my.row[k] < n) {
                const int t = (int)t_n[row + my.row[k]];
                factors[my.row[k]] = make_float2(signal_t[t], noise_t[t]);
            }
        }
    };
    const auto draw = [&](uint32 row, uint32 block) {
        return fd_normals(fd_same_half(first_row, row), block, 0, stream, keys);
    };
    const auto mix = [&](uint32 row, real x, real z) {
        const float2 c = factors[row];
        return c.x * x + c.y * z;
    };
    const auto put = [&](const Fours<TILE_LINES> &z, const bool *whole, const real *, real *out, real *eps) {
        TILE_EACH {
            if (whole[k]) {
                const float4 &x = x0[k], &e = z.v[k];
                fd_put4(out + TILE_LINE(k), make_float4(mix(of[k][0], x.x, e.x), mix(of[k][1], x.y, e.y),
                                                        mix(of[k][2], x.z, e.z), mix(of[k][3], x.w, e.w)));
                if (eps_nd) fd_put4(eps + TILE_LINE(k), e);
            }
        }
    };
    const int64 row = (int64)blockIdx.x * rows, from = row * width + 4 * threadIdx.x;
    fd_each_tile<true>((uint32)(first_row + row), my, tile, take, draw, put, x0_nd + from, out_nd + from,
                       (eps_nd ? eps_nd : out_nd) + from);
    const int64 rest = fd_tile_rest(my, n, width), before = (n - 1) / rows * rows;
    if (rest >= 0) {
        const real z = tile[rest - before * width];
        out_nd[rest] = mix((uint32)(rest / width - before), x0_nd[rest], z);
        if (eps_nd) eps_nd[rest] = z;
    }
}
