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

GRADIENT = 1e-6  # relative error of a float64 gradient against central differences, every entry
GRADIENT_FLOOR = 1e-5  # entries below this share of the largest one count as this large
STEP = 2.0**-13  # of those differences; of fourth order, so that 1e-16 / STEP and STEP^4 are both below 1e-12

PEER_OUTPUT = 5e-5  # relative error, in the norm, of a float32 image network against another float32 one
PEER_GRADIENT = 5e-4  # the same of the gradient of every tensor
PEER_FLOOR = 5e-5  # its norm counts as at least this share of the whole gradient's: some are zero but for rounding

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
