// The noise law and the table law as device functions: the operations of fastdiff.noise and of the NumPy backend in
// the same order, one rounding each, hence the same bits. FD_LOG_0 and the like are made from fastdiff.noise.

struct Words {
    uint32 w0, w1, w2, w3;
};

// The normals of one block: z0 is value q of its row, z1 value q + Q, z2 value q + 2Q, z3 value q + 3Q.
struct Normals {
    float z0, z1, z2, z3;
};

FD_DEVICE Words fd_philox(Words c, const RoundKeys &keys) {
    FD_UNROLL
    for (int round = 0; round < 10; round++) {
        const uint64 product0 = (uint64)FD_PHILOX_M0 * c.w0, product1 = (uint64)FD_PHILOX_M1 * c.w2;
        c = {(uint32)(product1 >> 32) ^ c.w1 ^ keys.words[2 * round], (uint32)product1,
             (uint32)(product0 >> 32) ^ c.w3 ^ keys.words[2 * round + 1], (uint32)product0};
    }
    return c;
}

FD_DEVICE Words fd_words(uint64 row, uint32 block, uint32 step, uint32 stream, const RoundKeys &keys) {
    const Words counter = {block, step, (uint32)row, (uint32)(row >> 32) | stream << 24};
    return fd_philox(counter, keys);
}

// ln((float(w) + 0.5) 2^-32)
FD_DEVICE float fd_log_uniform(uint32 w) {
    const int bits = fd_float_bits(((float)w + 0.5f) * FD_UNIFORM_UNIT);
    const int exponent = (bits - FD_SQRT_HALF_BITS) >> 23;
    const float m = fd_bits_float(bits - exponent * (1 << 23)) - 1.0f;
    const float e = (float)exponent, square = m * m;
    float y = FD_LOG_8 * m + FD_LOG_7;
    y = y * m + FD_LOG_6;
    y = y * m + FD_LOG_5;
    y = y * m + FD_LOG_4;
    y = y * m + FD_LOG_3;
    y = y * m + FD_LOG_2;
    y = y * m + FD_LOG_1;
    y = y * m + FD_LOG_0;
    y = y * m * square;
    y = y + e * FD_LN2_LOW;
    y = y - 0.5f * square;
    return (m + y) + e * FD_LN2_HIGH;
}

// Two words into two normals: the radius from the first, the angle 2 pi (w >> 8) 2^-24 from the second.
FD_DEVICE void fd_box_muller(uint32 wa, uint32 wb, float &za, float &zb) {
    const float radius = sqrtf(-2.0f * fd_log_uniform(wa));
    const int k = (int)(wb >> 8), quarter = (k + (1 << 21)) >> 22;
    const float x = (float)(k - quarter * (1 << 22)) * FD_ANGLE_UNIT, z = x * x;
    const float s = ((FD_SIN_2 * z + FD_SIN_1) * z + FD_SIN_0) * z * x + x;
    const float c = ((FD_COS_2 * z + FD_COS_1) * z + FD_COS_0) * z * z - 0.5f * z + 1.0f;
    const float cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
    za = radius * ((quarter + 1) & 2 ? -cosine : cosine);
    zb = radius * (quarter & 2 ? -sine : sine);
}

FD_DEVICE Normals fd_normals(uint64 row, uint32 block, uint32 step, uint32 stream, const RoundKeys &keys) {
    const Words w = fd_words(row, block, step, stream, keys);
    Normals n;
    fd_box_muller(w.w0, w.w1, n.z0, n.z1);
    fd_box_muller(w.w2, w.w3, n.z2, n.z3);
    return n;
}

// The same of four neighbouring blocks: z0 holds the values q .. q + 3 of the row, and so on.
struct Quads {
    float4 z0, z1, z2, z3;
};

FD_DEVICE Quads fd_quads(uint64 row, uint32 block, uint32 step, uint32 stream, const RoundKeys &keys) {
    const Normals a = fd_normals(row, block, step, stream, keys);
    const Normals b = fd_normals(row, block + 1, step, stream, keys);
    const Normals c = fd_normals(row, block + 2, step, stream, keys);
    const Normals d = fd_normals(row, block + 3, step, stream, keys);
    return {make_float4(a.z0, b.z0, c.z0, d.z0), make_float4(a.z1, b.z1, c.z1, d.z1),
            make_float4(a.z2, b.z2, c.z2, d.z2), make_float4(a.z3, b.z3, c.z3, d.z3)};
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
