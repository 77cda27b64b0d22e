"""How alike two sets of rows are: energy distance, kernel distance, and distances to the nearest row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_flags, check_float

BLOCK_ROWS = 256  # whose distances to all others are held at once
MEDIAN_ROWS = 1000  # whose distances are looked at for a bandwidth


def energy_distance(X: npt.ArrayLike, Y: npt.ArrayLike, *, unbiased: bool = False) -> float:
    """Energy distance of two samples: 0 for equal distributions and positive for any others.

    ``2 E|x - y| - E|x - x'| - E|y - y'|`` with Euclidean norms (Szekely and Rizzo 2013, there E or D^2; no
    square root).

    Parameters
    ----------
    X : array_like
        (N, d) real numbers, N at least 1.
    Y : array_like
        (M, d) real numbers, M at least 1.
    unbiased : bool, optional
        By default the V-statistic: the means run over all pairs, each point with itself included. So it is never
        negative, and two samples of one distribution lie a little above 0, by about ``E|x - x'| (1/N + 1/M)``: compare
        with the distance of two samples that are known to be alike. True: the U-statistic, over pairs of different
        points, whose expectation is the distance of the distributions; it may be negative, and N and M are at least 2.

    Returns
    -------
    float
        In the unit of the data. Takes O((N + M)^2 d) time and O(N + M) memory.

    Examples
    --------
    >>> fd.metrics.energy_distance([[0.0], [1.0]], [[0.0], [1.0]])
    0.0
    """
    check_flags(unbiased=unbiased)
    x, y = _checked(X, Y, 2 if unbiased else 1)

    def within(a: npt.NDArray[np.float64]) -> float:
        pairs = len(a) * (len(a) - 1) if unbiased else len(a) ** 2
        return float(distances(a, a).sum.sum()) / pairs

    distance = 2 * float(distances(x, y).sum.sum()) / (len(x) * len(y)) - within(x) - within(y)
    return distance if unbiased else max(0.0, distance)


def mmd(X: npt.ArrayLike, Y: npt.ArrayLike, *, bandwidth: float | None = None, unbiased: bool = False) -> float:
    """Squared maximum mean discrepancy of two samples, by a Gaussian kernel: 0 for equal distributions.

    ``E k(x, x') + E k(y, y') - 2 E k(x, y)`` with ``k(x, y) = exp(-|x - y|^2 / (2 s^2))`` (Gretton et al. 2012,
    equations 3 and 5; no square root).

    Parameters
    ----------
    X : array_like
        (N, d) real numbers.
    Y : array_like
        (M, d) real numbers.
    bandwidth : float, optional
        The s of the kernel, in the unit of the data; by default the median distance of different rows of both samples
        together, of 1,000 of them, evenly spaced, where there are more. Values compare at one bandwidth only.
    unbiased : bool, optional
        As for `energy_distance`: by default over all pairs, each row with itself included, and never negative.

    Returns
    -------
    float
        Between 0 and 2, without a unit. Takes O((N + M)^2 d) time and O(N + M) memory.

    Examples
    --------
    >>> fd.metrics.mmd([[0.0], [1.0]], [[0.0], [1.0]])
    0.0
    """
    from scipy.spatial.distance import pdist

    check_flags(unbiased=unbiased)
    x, y = _checked(X, Y, 2 if unbiased else 1)
    if bandwidth is None:
        both = np.concatenate([x, y])
        picked = both[np.arange(min(len(both), MEDIAN_ROWS)) * len(both) // min(len(both), MEDIAN_ROWS)]
        bandwidth = float(np.median(pdist(picked))) or 1.0  # most rows the same: any will do
        if not math.isfinite(bandwidth):
            raise ArgumentError("X, Y", "rows whose distances overflow", "smaller values: divide them by a constant")
    bandwidth = check_float("bandwidth", bandwidth, low=0, low_open=True)
    scale = -0.5 / bandwidth / bandwidth

    def mean(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        alike = sum(float(np.exp(scale * between**2).sum()) for _, between in _blocks(a, b))
        without = unbiased and a is b  # a row and itself are alike by 1
        return (alike - len(a) * without) / (len(a) * (len(b) - without))

    distance = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    return distance if unbiased else max(0.0, distance)


def nearest_distances(X: npt.ArrayLike, Y: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the distance (N,) of every row of X (N, d) to the nearest row of Y (M, d); where Y is X, to the others.

    Where samples lie much nearer to the training rows than unseen rows do, a model has learned those by heart.

    Examples
    --------
    >>> fd.metrics.nearest_distances([[0.0], [5.0]], [[1.0], [4.0], [9.0]]).tolist()
    [1.0, 1.0]
    """
    x = check_array("X", X, shape=(None, None), dtype=np.float64)
    y = check_array("Y", Y, shape=(None, x.shape[1]), dtype=np.float64)
    if not len(y):
        raise ArgumentError("Y", "no rows", "at least one")
    return distances(x, y).least


class Distances(NamedTuple):
    """Of every row of one set to all rows of another, or to the others of its own: sum and smallest, (N,) each.

    Examples
    --------
    >>> found = fd.metrics.distances(np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]]))
    >>> found.sum.tolist(), found.least.tolist()
    ([8.0, 6.0], [3.0, 2.0])
    """

    sum: npt.NDArray[np.float64]
    least: npt.NDArray[np.float64]


def distances(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Distances:
    """Measure Euclidean distances of rows, of which no more than a block are in memory at once.

    Parameters
    ----------
    x : (N, d) float64 array
    y : (M, d) float64 array
        The same array as x: every row is compared with the others.

    Returns
    -------
    Distances

    Examples
    --------
    >>> found = fd.metrics.distances(np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]]))
    >>> found.sum.tolist(), found.least.tolist()
    ([8.0, 6.0], [3.0, 2.0])
    """
    result = Distances(np.empty(len(x)), np.empty(len(x)))
    for part, between in _blocks(x, y):
        result.sum[part] = between.sum(axis=1)
        if x is y:
            between[np.arange(len(between)), part.start + np.arange(len(between))] = np.inf
        result.least[part] = between.min(axis=1)
    return result


def _blocks(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    """Distances of some rows of x after others to all of y, (rows, M), and which rows."""
    from scipy.spatial.distance import cdist

    for start in range(0, len(x), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield part, cdist(x[part], y)


def _checked(X: Any, Y: Any, least: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x = check_array("X", X, shape=(None, None), dtype=np.float64)
    y = check_array("Y", Y, shape=(None, x.shape[1]), dtype=np.float64)
    for name, sample in (("X", x), ("Y", y)):
        if len(sample) < least:
            raise ArgumentError(name, f"{len(sample)} rows", f"at least {least}")
    return x, y
