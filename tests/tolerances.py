"""How results are compared, and every number that says how close is close enough.

Rounding errors of a sum of `terms` products grow like sqrt(terms), so tolerances are stated in units of the last place
of the dtype, times sqrt(terms), times the scale of the numbers that were added; below that, a floor for denormals.
"""

from __future__ import annotations

import math

import numpy as np

UNITS = 4.0  # units in the last place, for each of the sqrt(terms)
EPS = {np.dtype("float32"): 2.0**-23, np.dtype("float64"): 2.0**-52}
FLOOR = {np.dtype("float32"): 2.0**-126, np.dtype("float64"): 2.0**-1022}
BF16 = 2.0**-8  # largest relative error of a value rounded to bfloat16, which has 8 significant bits

# A perceptron's forward pass, or a row of its chain, in these precisions against float64, relative and in the norm: a
# factor is off by at most 2^-17 or 2^-9 of itself, and a layer adds up many. The worst that was seen is 7.4e-6, 3.5e-3.
MLP_ERRORS = {"bf16x3": 2.0**-15, "bf16": 2.0**-7}

GRADIENT = 1e-6  # relative error of a float64 gradient against central differences, every entry
GRADIENT_FLOOR = 1e-5  # entries below this share of the largest one count as this large
STEP = 2.0**-13  # of those differences; of fourth order, so that 1e-16 / STEP and STEP^4 are both below 1e-12

WINOGRAD_ERROR = 4e-6  # relative error, in the norm, of a convolution by F(4x4, 3x3); by plain products 5e-7

CUDNN_ERROR = 1e-4  # the same of one by cuDNN, which may use Winograd of any tile

PEER_OUTPUT = 5e-5  # relative error, in the norm, of a float32 image network against another float32 one
PEER_GRADIENT = 5e-4  # the same of the gradient of every tensor
PEER_FLOOR = 5e-5  # its norm counts as at least this share of the whole gradient's: some are zero but for rounding

# What three training steps of an image network change, on CUDA against the CPU, relative and in the norm: Adam divides
# a gradient by its own size, so a step is off by as much as the gradient, and the next by what that makes of it.
CUDA_STEPS = 2 * PEER_GRADIENT

# What a few training steps change, relative and in the norm, on another backend of the host or another kind of CPU: at
# most 1.4e-5 was seen. To mix up two buffers of the optimiser, or to be off by a step, changes much more.
CPU_STEPS = 1e-4

# Nats: a table's log density in float64 against its closed form, and with a denoiser in float32.
DENSITY, DENSITY_FLOAT32 = 1e-6, 1e-3
LANCZOS = 1e-6  # nats: bias of the trace of a log in a Krylov space, against the determinant's, for 64 values

# A few rows of a chain given observations, in one piece against row by row, relative to the largest value: float32
# networks whose Jacobian is solved with. The worst that was seen is 5e-5.
TMPD = 4e-4

PAGE, PAGE_FLOAT64 = 1e-5, 1e-9  # samples of the page, which computes in float64, against float32 and float64 ones
PAGE_TMPD = TMPD  # the same of a perceptron given observations: the library solves with float32 products
FIRST_PAINT_MS = 1000  # from the opening of the page's file to its first text
FRAME_MS = 8  # of script, in the median, for a frame of 100 draws of 50 points of an exact denoiser

STREAMED = 1e-6  # relative: moments measured block by block against those in one go, which scales float32 in float32

SIGMAS = 5.0  # a Monte Carlo estimate lies within this many standard errors
P_VALUE = 1e-3  # a test of a distribution fails below it; seeds are fixed, so it always or never does

WORKSPACE = 1 << 18  # bytes by which memory may grow besides what is returned
IMPORT_SECONDS = 0.4
HANG_SECONDS = 120.0


def allowed(want, *, terms=1, scale=None):
    """Largest difference from `want` that rounding explains; `scale` is the size of what was added up."""
    magnitude = np.abs(want)
    if scale is None:
        scale = magnitude.max(initial=0)
    return UNITS * EPS[want.dtype] * (math.sqrt(terms) * scale + magnitude) + FLOOR[want.dtype]


SPREAD_LINEAR = 1e-3  # where noise enters linearly: float32 rounding over (f - 1), through 20 rows


def assert_close(got, want, *, terms=1, scale=None, dtype=None):
    """Equal shapes, equal dtypes, and values equal up to rounding in `dtype`, by default that of `got`."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
    limit = allowed(want.astype(got.dtype if dtype is None else dtype), terms=terms, scale=scale)
    over = ~(difference <= limit)
    if over.any():
        at = tuple(np.argwhere(over)[0])
        raise AssertionError(
            f"{over.sum()} of {over.size} differ; first at {at}: {got[at]} for {want[at]}, "
            f"off by {difference[at]:.3g} with {limit[at]:.3g} allowed"
        )


def assert_close_in_bf16(got, want, absolute, *, terms):
    """Values equal up to the rounding of both factors of every product to bfloat16, and of the sums to float32.

    (1 + a)(1 + b) - 1 is at most 2 BF16 + BF16^2 for a product, so that many times `absolute`, the same sums over
    absolute values, is the most for all of them.
    """
    limit = (2 * BF16 + BF16**2) * absolute + allowed(want.astype(np.float32), terms=terms)
    difference = np.abs(got.astype(np.float64) - want)
    assert (difference <= limit).all(), f"off by {(difference / limit).max():.3g} times what is allowed"


def assert_close_in_norm(got, want, relative):
    """The difference in the Euclidean norm is at most that many times the norm of `want`."""
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert error <= relative, f"off by {error:.3g}, allowed are {relative:.3g}"


def assert_same_bits(got, want):
    """Equal shapes, dtypes and bits, the sign of zero included; one NaN is as good as another."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    different = (got != want) | (np.signbit(got) != np.signbit(want))
    different &= ~((got != got) & (want != want))
    if different.any():
        at = tuple(np.argwhere(different)[0])
        raise AssertionError(
            f"{different.sum()} of {different.size} differ; first at {at}: {got[at]!r} for {want[at]!r}"
        )


def assert_estimate(got, want, standard_error):
    """Monte Carlo estimates agree with what they estimate."""
    distance = np.abs(np.asarray(got) - want) / standard_error
    assert np.max(distance) <= SIGMAS, f"{np.max(distance):.3g} standard errors away"
