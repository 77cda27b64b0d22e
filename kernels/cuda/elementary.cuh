// Functions of one value, and sums over a warp, for the layers of image networks.

// exp(x), and zero below exp(-87): exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2, as in kernels/cpu/elementary.py.
// For x up to 88.
FD_DEVICE real fd_exp(real x) {
    const real whole = floorf(fmaf(x, 1.4426950408889634f, 0.5f));
    const real r = fmaf(whole, 2.1219444e-4f, fmaf(whole, -0.693359375f, x));
    real p = fmaf(0.0013941218f, r, 0.008363235f);
    p = fmaf(p, r, 0.041666374f);
    p = fmaf(p, r, 0.16666576f);
    p = fmaf(p, r, 0.5f);
    const real y = fmaf(p * r, r, r) + 1.0f;
    return x < -87.0f ? 0 : y * fd_bits_float((int)(((uint32)(int)fmaxf(whole, -127.0f) + 127u) << 23));
}

// 1 / (1 + exp(-v)), within 2^-21 of it, and below -87 what it is there; a NaN stays. exp(-v) = 2^t 2^rest, t being
// -v log2(e) rounded, and the rest what was lost of t and of log2(e). A step of Newton's makes 1 of an about 1 / 1.
FD_DEVICE real fd_sigmoid(real v) {
    const real x = fd_least(fd_most(v, -87.0f), 87.0f), t = x * -1.44269502f;
    const real rest = fmaf(x, -1.92596303e-8f, fmaf(x, -1.44269502f, -t));
    const real power = fd_exp2(t), sum = fmaf(power, 0.693147182f * rest, power) + 1.0f, near = fd_reciprocal(sum);
    return fmaf(near, fmaf(-sum, near, 1.0f), near);
}

FD_DEVICE real fd_silu(real v) { return v * fd_sigmoid(v); }

// dv where y = SiLU(v): dy g (1 + v (1 - g)) with g = 1 / (1 + exp(-v)).
FD_DEVICE real fd_silu_backward(real dy, real v) {
    const real g = fd_sigmoid(v);
    return dy * g * fmaf(v, 1.0f - g, 1.0f);
}

// GELU in its tanh form, x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): x g with g = 1 / (1 + exp(-2 u))
// and 2 u = x (A + B x^2). Beyond FD_GELU_END g is 0 or 1 in float32. A NaN stays.
#define FD_GELU_A 1.5957691216f
#define FD_GELU_B 0.0713548163f
#define FD_GELU_3B 0.2140644488f
#define FD_GELU_END 10.0f

FD_DEVICE real fd_gelu_gate(real v) { return fd_sigmoid(v * fmaf(FD_GELU_B, v * v, FD_GELU_A)); }

FD_DEVICE real fd_gelu(real x) {
    const real low = x < -FD_GELU_END ? -FD_GELU_END : x;
    return low * fd_gelu_gate(low);
}

// dx: dy g (1 + x (1 - g) (A + 3 B x^2)).
FD_DEVICE real fd_gelu_backward(real dy, real x) {
    const real low = x < -FD_GELU_END ? -FD_GELU_END : x, v = low > FD_GELU_END ? FD_GELU_END : low;
    const real g = fd_gelu_gate(v);
    return dy * g * fmaf(v * (1.0f - g), fmaf(FD_GELU_3B, v * v, FD_GELU_A), 1.0f);
}

// The sum over `lanes` neighbouring lanes, a power of two, in all of them.
template <class T>
FD_DEVICE T fd_lane_sum(T value, int lanes = FD_WARP) {
    for (int mask = 1; mask < lanes; mask *= 2) value += fd_shuffle_xor(value, mask);
    return value;
}
