// The noise law and the table law as device functions: the operations of fastdiff.noise and of the NumPy backend in
// the same order, one rounding each, hence the same bits. FD_LOG_0 and the like are made from fastdiff.noise.

struct Words {
    uint32 w0, w1, w2, w3;
};

FD_DEVICE Words fd_philox(Words c, const RoundKeys &keys) {
    FD_UNROLL
    for (int round = 0; round < 10; round++) {
        const uint64 product0 = fd_wide_product(c.w0, FD_PHILOX_M0), product1 = fd_wide_product(c.w2, FD_PHILOX_M1);
        c = {(uint32)(product1 >> 32) ^ c.w1 ^ keys.words[2 * round], (uint32)product1,
             (uint32)(product0 >> 32) ^ c.w3 ^ keys.words[2 * round + 1], (uint32)product0};
    }
    return c;
}

// Rows have 56 bits, so that stream and step are a part of the first keys, once for all rows.
FD_DEVICE Words fd_words(uint64 row, uint32 block, uint32 step, uint32 stream, const RoundKeys &keys) {
    RoundKeys first = keys;
    first.words[0] ^= step;
    first.words[1] ^= stream << 24;
    return fd_philox({block, 0, (uint32)row, (uint32)(row >> 32)}, first);
}

// 2 ln((float(w) + 0.5) 2^-32). Twice the law's logarithm rounds as that does, and so does a product by a power of two;
// every fmaf of this file has an exact product, so that it rounds as the law's product and sum.
FD_DEVICE float fd_log_uniform_twice(uint32 w) {
    const int bits = fd_float_bits((float)w + 0.5f), unit = 32 << 23;  // of the exponent, 2^32
    const int octaves = (bits - (FD_SQRT_HALF_BITS + unit)) & -(1 << 23);
    const float m = fd_bits_float(bits - octaves - unit) - 1.0f;
    const float e = (float)octaves, square = m * m;
    float y = 2.0f * FD_LOG_8 * m + 2.0f * FD_LOG_7;
    y = y * m + 2.0f * FD_LOG_6;
    y = y * m + 2.0f * FD_LOG_5;
    y = y * m + 2.0f * FD_LOG_4;
    y = y * m + 2.0f * FD_LOG_3;
    y = y * m + 2.0f * FD_LOG_2;
    y = y * m + 2.0f * FD_LOG_1;
    y = y * m + 2.0f * FD_LOG_0;
    y = y * m * square;
    y = y + e * (FD_LN2_LOW / (1 << 22));
    y = y - square;
    return fmaf(e, FD_LN2_HIGH / (1 << 22), fmaf(2.0f, m, y));
}

// The root of x by an approximate 1 / sqrt(x) and one step of Newton's: the nearest float, since compilers take the same
// steps for sqrtf, behind a test for numbers that are not normal or nearly not.
FD_DEVICE float fd_root_by(float x, float reciprocal) {
    const float root = x * reciprocal;
    return fmaf(fmaf(-root, root, x), 0.5f * reciprocal, root);
}

// sqrtf(x) for zeros of both signs, and for x from 2^-100 to 2^100.
FD_DEVICE float fd_root(float x) { return fd_root_by(x, fminf(fabsf(fd_rsqrt(x)), 1e18f)); }

// x with its sign changed where the highest bit is set.
FD_DEVICE float fd_signed(float x, uint32 sign) {
    return fd_bits_float((int)((uint32)fd_float_bits(x) ^ (sign & 0x80000000u)));
}

// Two words into two normals: the radius from the first, the angle 2 pi (w >> 8) 2^-24 from the second. Its nearest
// quarter turn is (w + 2^29) >> 30; what is left of the angle are the lower 30 bits of w, with the sign of the highest.
FD_DEVICE void fd_box_muller(uint32 wa, uint32 wb, float &za, float &zb) {
    const float radius = fd_root(-fd_log_uniform_twice(wa));
    const float x = (float)((int)(wb << 2) >> 10) * FD_ANGLE_UNIT, z = x * x;
    float s = ((FD_SIN_2 * z + FD_SIN_1) * z + FD_SIN_0) * z * x + x;
    float c = fmaf(-0.5f, z, ((FD_COS_2 * z + FD_COS_1) * z + FD_COS_0) * z * z) + 1.0f;
    const uint32 quarter = wb + (1u << 29);  // in its two highest bits
    fd_turn_if(quarter & (1u << 30), c, s);
    const float signed_radius = fd_signed(radius, quarter);  // of a half turn
    za = signed_radius * c;
    zb = signed_radius * s;
}

// The normals of one block: values q, q + Q, q + 2Q and q + 3Q of its row.
FD_DEVICE float4 fd_normals(uint64 row, uint32 block, uint32 step, uint32 stream, const RoundKeys &keys) {
    const Words w = fd_words(row, block, step, stream, keys);
    float4 z;
    fd_box_muller(w.w0, w.w1, z.x, z.y);
    fd_box_muller(w.w2, w.w3, z.z, z.w);
    return z;
}

// The same of four neighbouring blocks: z0 holds the values q .. q + 3 of the row, and so on.
struct Quads {
    float4 z0, z1, z2, z3;
};

FD_DEVICE Quads fd_quads(uint64 row, uint32 block, uint32 step, uint32 stream, const RoundKeys &keys) {
    const float4 a = fd_normals(row, block, step, stream, keys);
    const float4 b = fd_normals(row, block + 1, step, stream, keys);
    const float4 c = fd_normals(row, block + 2, step, stream, keys);
    const float4 d = fd_normals(row, block + 3, step, stream, keys);
    return {make_float4(a.x, b.x, c.x, d.x), make_float4(a.y, b.y, c.y, d.y),
            make_float4(a.z, b.z, c.z, d.z), make_float4(a.w, b.w, c.w, d.w)};
}

// m = clip(p x + q out). A term with a zero coefficient is not evaluated; a NaN stays.
FD_DEVICE real fd_row_m(const TableRow &row, real x, real out) {
    real m = 0;
    if (row.p != 0) m = m + row.p * x;
    if (row.q != 0) m = m + row.q * out;
    if (m > row.high) m = row.high;
    if (m < row.low) m = row.low;
    return m;
}

// The m of earlier rows.
struct Remembered {
    real m1, m2, m3;
};

// x' = a x + b m + c1 m1 + c2 m2 + c3 m3 + e out + s z; without DEEP, of a row whose c2 and c3 are 0.
template <bool DEEP>
FD_DEVICE real fd_row_x(const TableRow &row, real x, real m, const Remembered &memory, real out, real z) {
    real value = 0;
    if (row.a != 0) value = value + row.a * x;
    if (row.b != 0) value = value + row.b * m;
    if (row.c1 != 0) value = value + row.c1 * memory.m1;
    if (DEEP && row.c2 != 0) value = value + row.c2 * memory.m2;
    if (DEEP && row.c3 != 0) value = value + row.c3 * memory.m3;
    if (row.e != 0) value = value + row.e * out;
    if (row.s != 0) value = value + row.s * z;
    return value;
}
