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


def sampler_step(x, out, memory, z, row, clip, real=F):
    """x' and what is remembered next, of single numbers; row is (p, q, a, b, c1, c2, c3, e, s), memory (m1, m2, m3)."""
    p, q, a, b, c1, c2, c3, e, s = (real(number) for number in row)
    m = real(0)
    for coefficient, value in ((p, x), (q, out)):
        if coefficient != 0:
            m = m + coefficient * value
    if clip is not None:
        low, high = real(clip[0]), real(clip[1])
        if m < low:
            m = low
        elif m > high:
            m = high
    following = real(0)
    for coefficient, value in ((a, x), (b, m), *zip((c1, c2, c3), memory, strict=True), (e, out), (s, z)):
        if coefficient != 0:
            following = following + coefficient * value
    evaluates = row[1] != 0 or row[7] != 0
    return following, (m, *memory[:2]) if evaluates else memory


# ------------------------------------------------------------------------------------------- covariance


def similarity(v):
    """exp(-(v_i - v_j)^2) of one curve."""
    return [[math.exp(-((a - b) ** 2)) for b in v] for a in v]


def scatter(rows, centre=False):
    """X^T X, about the mean where asked."""
    n = len(rows[0])
    mean = [sum(row[j] for row in rows) / len(rows) if centre else 0.0 for j in range(n)]
    return [[sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) for j in range(n)] for i in range(n)]


def map_row(x, scale=None, left=None, right=None, offset=None, standardise=False):
    """One row of x scale + (x left) right + offset."""

    def product(row, matrix):
        return [sum(row[i] * matrix[i][j] for i in range(len(row))) for j in range(len(matrix[0]))]

    parts = [] if scale is None else [[value * factor for value, factor in zip(x, scale, strict=True)]]
    if left is not None:
        parts.append(product(x, left) if right is None else product(product(x, left), right))
    if offset is not None:
        parts.append(offset)
    y = [sum(values) for values in zip(*parts, strict=True)]
    if standardise:
        if len(set(y)) == 1:
            return [0.0] * len(y)
        mean = sum(y) / len(y)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in y) / len(y))
        y = [(value - mean) / deviation for value in y]
    return y


def weighted_mean(exponents, parts):
    """The mean of the rows `parts` weighted by exp(exponents), and the logarithm of the sum of the weights."""
    top = max(exponents)
    weights = [math.exp(exponent - top) for exponent in exponents]
    total = sum(weights)
    mean = [
        sum(w * value for w, value in zip(weights, column, strict=True)) / total for column in zip(*parts, strict=True)
    ]
    return mean, top + math.log(total)


def posterior_mean(x, data, signal, noise):
    """E[x0 | x] of one row x = signal x0 + noise z, x0 being a row of data; and the logarithm of the weights' sum."""
    squares = [sum((a - signal * b) ** 2 for a, b in zip(x, row, strict=True)) for row in data]
    return weighted_mean([-square / (2 * noise**2) for square in squares], data)


# ------------------------------------------------------------------------------------------- networks


def time_features(T, t, width=32):
    half = width // 2
    angles = [1000 * t / T * 10000 ** (-i / half) for i in range(half)]
    return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]


def linear(x, weight, bias):
    return [bias[j] + sum(x[i] * weight[i][j] for i in range(len(x))) for j in range(len(bias))]


def silu(v):
    return v / (1 + math.exp(-v)) if v > -700 else 0.0


def gelu(v):
    return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def leaky_relu(v):
    return v if v > 0 else 0.01 * v


def with_linear(y, x, part, t):
    """y + basis diag(gains) basis^T x + rest x, for one sample."""
    d, rank = part.basis.shape
    h = [part.gains[t][k] * sum(part.basis[i][k] * x[i] for i in range(d)) for k in range(rank)]
    rest = 0 if part.rest is None else part.rest[t]
    return [y[i] + sum(part.basis[i][k] * h[k] for k in range(rank)) + rest * x[i] for i in range(d)]


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


def conv(x, w, b, *, stride=(1, 1), pad=(0, 0, 0, 0), up=(1, 1), shift=None, residual=None):
    """Correlation of x (N, H, W, C), repeated `up` times and padded, with w (rows, columns, C, K)."""
    n, height, width, channels = x.shape
    rows, columns, _, outputs = w.shape
    tall, wide = height * up[0], width * up[1]
    out_height = (tall + pad[0] + pad[1] - rows) // stride[0] + 1
    out_width = (wide + pad[2] + pad[3] - columns) // stride[1] + 1
    y = np.empty((n, out_height, out_width, outputs))
    for image, i, j, k in np.ndindex(y.shape):
        total = b[k]
        for r, s, c in np.ndindex(rows, columns, channels):
            row, column = i * stride[0] + r - pad[0], j * stride[1] + s - pad[2]
            if 0 <= row < tall and 0 <= column < wide:
                total += x[image, row // up[0], column // up[1], c] * w[r, s, c, k]
        total += 0 if shift is None else shift[image, k]
        y[image, i, j, k] = total + (0 if residual is None else residual[image, i, j, k])
    return y


def norm(x, gamma, beta, *, groups, eps, activated, modulation=None):
    """GroupNorm of x (N, H, W, C); `modulation` (N, 2 C) holds gain and shift."""
    n, height, width, channels = x.shape
    size = channels // groups
    y = np.empty(x.shape)
    for image, group in np.ndindex(n, groups):
        inside = [(i, j, group * size + c) for i, j, c in np.ndindex(height, width, size)]
        values = [x[image, i, j, c] for i, j, c in inside]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps)
        for i, j, c in inside:
            v = gamma[c] * (x[image, i, j, c] - mean) / deviation + beta[c]
            if modulation is not None:
                v = (1 + modulation[image, c]) * v + modulation[image, channels + c]
            y[image, i, j, c] = silu(v) if activated else v
    return y


def layer_norm(x, gamma, beta, eps):
    """LayerNorm over the channels of x (N, H, W, C)."""
    y = np.empty(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        values = [float(v) for v in x[at]]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps)
        for c, v in enumerate(values):
            y[(*at, c)] = gamma[c] * (v - mean) / deviation + beta[c]
    return y


def offset(x, p):
    """x (N, H, W, C) plus p (H, W, C)."""
    y = np.empty(x.shape)
    for at in np.ndindex(x.shape):
        y[at] = x[at] + p[at[1:]]
    return y


def attention(qkv, heads):
    """Softmax attention of qkv (N, L, 3 C), and the logarithm of every row's sum of exponentials."""
    n, length, width = qkv.shape
    size = width // 3 // heads
    y, log_sums = np.zeros((n, length, width // 3)), np.empty((n, heads, length))
    for image, head, i in np.ndindex(n, heads, length):
        q, k, v = ([row[(part * heads + head) * size :][:size] for row in qkv[image]] for part in range(3))
        scores = [sum(a * b for a, b in zip(q[i], k[j], strict=True)) / math.sqrt(size) for j in range(length)]
        total = sum(math.exp(score - max(scores)) for score in scores)
        log_sums[image, head, i] = max(scores) + math.log(total)
        for j, c in np.ndindex(length, size):
            y[image, i, head * size + c] += math.exp(scores[j] - max(scores)) / total * v[j][c]
    return y, log_sums


def dropout(x, *, rate, seed, step, first_block, first_sample=0, stream=8):
    """Every image of x (N, ...) is a row of the noise law; value j has word j % 4 of block first_block + j // 4."""
    y = np.zeros(x.shape)
    for row, (values, kept) in enumerate(zip(x.reshape(len(x), -1), y.reshape(len(x), -1), strict=True)):
        for j, value in enumerate(values):
            at = {"seed": seed, "stream": stream, "step": step, "row": first_sample + row}
            if words(first_block + j // 4, **at)[j % 4] >= rate * 2**32:
                kept[j] = value / (1 - rate)
    return y


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
