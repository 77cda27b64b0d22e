"""Every formula once more, as loops over single numbers: an oracle that imports nothing of fastdiff.

What must agree to the bit is written in np.float32 scalars (or in the `real` given), one rounding an operation; the
rest in Python floats.
"""

from __future__ import annotations

import math

import numpy as np

F = np.float32

# ------------------------------------------------------------------------------------------- the noise law

LOG = (
    0.3333333,
    -0.2499998,
    0.20000689,
    -0.16669151,
    0.14251156,
    -0.123967,
    0.11634664,
    -0.11659936,
    0.073325336,
)
SIN = (-0.16666664, 0.008332749, -0.00019588009)
COS = (0.041666664, -0.0013888304, 2.454804e-05)


def philox(counter, key):
    """Philox4x32-10 of a counter (4 words) and a key (2 words)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 % 2**32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def words(block, *, seed, stream, step, row):
    """The four words of one block of a row."""
    return philox((block, step, row % 2**32, stream << 24 | row >> 32), (seed % 2**32, seed >> 32))


def polynomial(coefficients, x):
    y = F(0)
    for coefficient in reversed(coefficients):
        y = y * x + F(coefficient)
    return y


def log_uniform(word):
    """ln((word + 0.5) 2^-32)."""
    m, e = math.frexp((F(word) + F(0.5)) * F(2.0**-32))
    m = F(m)
    if m < F(0.70710677):
        m, e = m + m, e - 1
    m, e = m - F(1), F(e)
    y = polynomial(LOG, m) * m * (m * m)
    y = y + e * F(-2.1219444e-4)
    y = y - F(0.5) * (m * m)
    return (m + y) + e * F(0.693359375)


def cos_sin(word):
    """Cosine and sine of 2 pi (word >> 8) 2^-24."""
    k = word >> 8
    quarter = (k + 2**21) // 2**22
    x = F(k - quarter * 2**22) * F(3.7450703e-07)
    z = x * x
    s = polynomial(SIN, z) * z * x + x
    c = polynomial(COS, z) * z * z - F(0.5) * z + F(1)
    return ((c, s), (-s, c), (-c, -s), (s, -c))[quarter % 4]


def box_muller(word0, word1):
    radius = np.sqrt(F(-2) * log_uniform(word0))
    cosine, sine = cos_sin(word1)
    return radius * cosine, radius * sine


def normal(n, width, *, seed, stream, step=0, first_sample=0):
    """Standard normals (n, width) float32."""
    z = np.zeros((n, width), F)
    blocks = (width + 3) // 4
    for k in range(n):
        for q in range(blocks):
            w0, w1, w2, w3 = words(q, seed=seed, stream=stream, step=step, row=first_sample + k)
            for quarter, value in enumerate((*box_muller(w0, w1), *box_muller(w2, w3))):
                if q + quarter * blocks < width:
                    z[k, q + quarter * blocks] = value
    return z


def uniform(n, width, *, seed, stream, step=0, first_sample=0):
    """Uniforms (n, width) in [0, 1), as Python floats."""
    return [
        [
            (words(j // 4, seed=seed, stream=stream, step=step, row=first_sample + k)[j % 4] >> 8) / 2**24
            for j in range(width)
        ]
        for k in range(n)
    ]


def scaled(n, bound, *, seed, stream, step, first_sample=0):
    """Integers 0 .. bound - 1, one a row."""
    return [words(0, seed=seed, stream=stream, step=step, row=first_sample + k)[0] * bound >> 32 for k in range(n)]


# ------------------------------------------------------------------------------------------- the process


def forward_noise(x0, t, signal, noise, z, real=F):
    """signal[t] x0 + noise[t] z of (n, width)."""
    out = np.zeros(np.shape(x0), real)
    for k, row in enumerate(x0):
        for j, value in enumerate(row):
            out[k, j] = real(signal[t[k]]) * real(value) + real(noise[t[k]]) * real(z[k][j])
    return out


def forward_chain(x0, betas, noise, real=F):
    """States (T + 1, n, width) of x' = sqrt(1 - beta) x + sqrt(beta) z; `noise` maps t to z."""
    n, width = np.shape(x0)
    chain = np.zeros((len(betas) + 1, n, width), real)
    chain[0] = x0
    for t, beta in enumerate(betas):
        a, s, z = real(math.sqrt(1 - beta)), real(math.sqrt(beta)), noise(t)
        for k in range(n):
            for j in range(width):
                chain[t + 1, k, j] = a * chain[t, k, j] + s * real(z[k, j])
    return chain


def posterior(x_t, x0, t, betas):
    """Mean and variance of q(x' | x_t, x0) by Bayes' rule for two Gaussians, one number."""
    before = 1.0
    for beta in betas[:t]:
        before *= 1 - beta
    if t == 0:
        return x0, 0.0
    # x' ~ N(sqrt(before) x0, 1 - before), and x_t | x' ~ N(sqrt(1 - beta) x', beta).
    beta = betas[t]
    precision = 1 / (1 - before) + (1 - beta) / beta
    weighted = math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * x_t / beta
    return weighted / precision, 1 / precision


def sampler_step(x, out, previous, z, row, clip, real=F):
    """(x', x0) of single numbers; row is (p, q, a, b, c, e, s)."""
    p, q, a, b, c, e, s = (real(number) for number in row)
    x0 = real(0)
    for coefficient, value in ((p, x), (q, out)):
        if coefficient != 0:
            x0 = x0 + coefficient * value
    if clip is not None:
        low, high = real(clip[0]), real(clip[1])
        if x0 < low:
            x0 = low
        elif x0 > high:
            x0 = high
    following = real(0)
    for coefficient, value in ((a, x), (b, x0), (c, previous), (e, out), (s, z)):
        if coefficient != 0:
            following = following + coefficient * value
    return following, x0


# ------------------------------------------------------------------------------------------- networks


def time_features(T, t, width=32):
    half = width // 2
    angles = [1000 * t / T * 10000 ** (-i / half) for i in range(half)]
    return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]


def linear(x, weight, bias):
    return [bias[j] + sum(x[i] * weight[i][j] for i in range(len(x))) for j in range(len(bias))]


def silu(v):
    return v / (1 + math.exp(-v)) if v > -700 else 0.0


def leaky_relu(v):
    return v if v > 0 else 0.01 * v


def mlp(params, x, t, T):
    """The modulated perceptron for one sample; `params` maps names to nested lists."""
    depth = sum(name.endswith("weight") and name.startswith("layers") for name in params)
    column = 0
    if depth > 1:
        time = linear(time_features(T, t), params["time.weight"], params["time.bias"])
    for i in range(depth):
        x = linear(x, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])
        if i < depth - 1:
            width = len(x)
            gain, shift = time[column : column + width], time[column + width : column + 2 * width]
            column += 2 * width
            x = [silu((1 + g) * v + b) for v, g, b in zip(x, gain, shift, strict=True)]
    return x


def tutorial(params, x, t):
    """The tutorial's perceptron for one sample."""

    def layer(i, x):
        return linear(x, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])

    h = layer(1, [leaky_relu(v) for v in layer(0, x)])
    h = [v + b for v, b in zip(h, params["time.weight"][t], strict=True)]
    return layer(3, [leaky_relu(v) for v in layer(2, h)])


def adamw(state, gradient, *, step, rate, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.01, clip=math.inf, ema=0.0):
    """One step, counted from 0, of (p, m, v, average) lists; returns the new ones."""
    norm = math.sqrt(sum(g * g for g in gradient))
    following = []
    for p, m, v, average, g in zip(*state, gradient, strict=True):
        g *= min(1.0, clip / (norm + 1e-6))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        p = p - rate * decay * p - rate * m_hat / (math.sqrt(v_hat) + eps)
        following.append((p, m, v, ema * average + (1 - ema) * p))
    return [list(column) for column in zip(*following, strict=True)]
