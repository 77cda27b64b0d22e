"""Scores of draws against what came: a smaller score is better, and the smallest expected one is that of the true law.

Draws are (M, ...) for values (...), as `Diffusion.impute` returns them. A value that is NaN is none that was asked
for: scores leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_choice, check_float

CHUNK_VALUES = 1 << 21  # of the draws that are sorted at once, in float64: 16 MB

Floats = npt.NDArray[np.float64]


class Convention(NamedTuple):
    """Levels of quantiles, and what of sorted draws is the quantile of a level: a method of `numpy.quantile`."""

    levels: tuple[float, ...]
    method: str


CONVENTIONS = {
    "csdi": Convention(tuple(k / 20 for k in range(1, 20)), "linear"),
    "gluonts": Convention(tuple(k / 10 for k in range(1, 10)), "nearest"),
}


def crps(draws: Any, y: Any, *, fair: bool = True) -> Floats:
    """Continuous ranked probability score of draws, value by value.

    ``E|x - y| - E|x - x'| / 2`` (Gneiting and Raftery 2007, equation 21), which is the integral of the squared
    difference of the distribution functions.

    Parameters
    ----------
    draws : (M, ...) array
    y : (...) array
        What came; NaN where nothing did.
    fair : bool, optional
        By default the second mean runs over pairs of different draws (Ferro 2014): the expected score is that of the
        law that was drawn from, however few draws there are. False: over all pairs, each draw with itself included,
        as most papers have it; that score is (1 + 1 / M) times as large, for draws of the true law.

    Returns
    -------
    (...) float64
        In the unit of the data; NaN where y is, so ``np.nanmean`` is the mean over what was asked for.

    Raises
    ------
    ArgumentError
        Shapes that do not fit, draws that are not finite, or a single draw for a fair score.

    Examples
    --------
    >>> fd.metrics.crps(np.array([[0.0], [1.0]]), np.array([0.5]), fair=False).tolist()
    [0.25]
    """
    draws, y = _checked(draws, y, 2 if fair else 1)
    M = len(draws)
    # Of sorted draws the sum of all |x - x'| is 2 sum_i (2 i - M + 1) x_i, with i from 0.
    weights = (2 * np.arange(M) - M + 1) / (M * (M - fair))
    score = np.empty(y.size)
    for part, some in _chunks(draws):
        some.sort(axis=0)
        score[part] = np.abs(some - y.reshape(-1)[part]).mean(axis=0) - weights @ some
    return score.reshape(y.shape)


def crps_normal(mean: Any, deviation: Any, y: Any) -> Floats:
    """Continuous ranked probability score of a normal law, in closed form.

    ``s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))`` with ``z = (y - m) / s`` (Gneiting and Raftery 2007, section
    4.2).

    Parameters
    ----------
    mean, deviation, y : array_like that broadcast
        A deviation of 0 is a point: the score is |y - m|.

    Returns
    -------
    array of float64

    Examples
    --------
    >>> fd.metrics.crps_normal(0.0, 1.0, 0.0).round(4).tolist()
    0.2337
    """
    from scipy.special import ndtr

    m, s = (check_array(name, value, dtype=np.float64) for name, value in (("mean", mean), ("deviation", deviation)))
    value = check_array("y", y, dtype=np.float64, finite=False)
    if (s < 0).any():
        raise ArgumentError("deviation", f"{s.min():g}", "at least 0 everywhere")
    off = value - m
    z = np.divide(off, s, out=np.zeros(np.broadcast(off, s).shape), where=s > 0)
    of_normal = s * (z * (2 * ndtr(z) - 1) + 2 * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi))
    return np.asarray(np.where(s > 0, of_normal, np.abs(off)))


def quantile_crps(
    draws: Any, y: Any, *, convention: str = "csdi", levels: Sequence[float] | None = None, relative: bool = True
) -> float:
    """Mean quantile loss over some levels, as papers on imputation and forecasts report the CRPS.

    ``2 sum |q_a - y| |1[y <= q_a] - a|`` over all values, its mean over the levels a, over ``sum |y|``.

    Parameters
    ----------
    draws : (M, ...) array
    y : (...) array
        NaN where nothing was asked for: CSDI's evaluation points are the others.
    convention : {"csdi", "gluonts"}, optional
        "csdi": 19 levels .05 .. .95, quantiles interpolated between draws (Tashiro et al. 2021, appendix D). "gluonts":
        nine levels .1 .. .9, and of the sorted draws that at the place round(a (M - 1)): the
        ``mean_wQuantileLoss`` of GluonTS' Evaluator. Both add up a whole data set before they divide by its sum |y|.
    levels : sequence of float, optional
        Others than those of the convention.
    relative : bool, optional
        False: the mean over the values, in the unit of the data, not divided by that of |y|. Few levels take the score
        for larger than the CRPS is: of the true normal law by 5 % (19 levels) or 9 % (nine).

    Returns
    -------
    float

    Examples
    --------
    >>> y = np.ones((2, 3, 2))
    >>> fd.metrics.quantile_crps(np.stack([y, y, y]), y)
    0.0
    """
    draws, y = _checked(draws, y, 1)
    usual, method = CONVENTIONS[check_choice("convention", convention, CONVENTIONS)]
    at = np.array([check_float("levels", level, low=0, high=1) for level in (usual if levels is None else levels)])
    if not len(at):
        raise ArgumentError("levels", "none", "at least one, between 0 and 1")
    flat, total = y.reshape(-1), 0.0
    targets = np.isfinite(flat)
    if not targets.any():
        raise ArgumentError("y", "no value that is not NaN", "at least one")
    for part, some in _chunks(draws):
        asked = targets[part]
        value = flat[part][asked]
        q = np.quantile(some[:, asked], at, axis=0, method=method)  # type: ignore[call-overload]
        total += 2 * float(np.abs((q - value) * ((value <= q) - at[:, None])).sum()) / len(at)
    over = float(np.abs(flat[targets]).sum()) if relative else float(targets.sum())
    if over == 0:
        raise ArgumentError("y", "nothing but 0", "other values, or relative=False")
    return total / over


def crps_sum(draws: Any, y: Any, *, convention: str = "csdi", levels: Sequence[float] | None = None) -> float:
    """`quantile_crps` of the sum over the channels (Salinas et al. 2019): it sees whether they go together.

    Parameters
    ----------
    draws : (M, ..., C) array
    y : (..., C) array
        A moment at which a channel is NaN is left out.
    convention, levels
        As for `quantile_crps`.

    Returns
    -------
    float
        Relative to the sum of |sum over channels of y|.

    Examples
    --------
    >>> y = np.ones((2, 3, 2))
    >>> fd.metrics.crps_sum(np.stack([y, y, y]), y)
    0.0
    """
    draws, y = _checked(draws, y, 1)
    if y.ndim < 2:
        raise ArgumentError("y", f"shape {y.shape}", "channels on the last of at least 2 axes")
    return quantile_crps(draws.sum(axis=-1, dtype=np.float64), y.sum(axis=-1), convention=convention, levels=levels)


def energy_score(draws: Any, y: Any, *, fair: bool = True) -> Floats:
    """Energy score of draws, row by row: the CRPS of several values together.

    ``E|x - y| - E|x - x'| / 2`` with Euclidean norms over all values of a row (Gneiting and Raftery 2007, equation 22).

    Parameters
    ----------
    draws : (M, N, ...) array
    y : (N, ...) array
        The norms leave out what is NaN.
    fair : bool, optional
        As for `crps`.

    Returns
    -------
    (N,) float64
        In the unit of the data; NaN where a row has nothing but NaN. Takes O(M^2) time a value.

    Examples
    --------
    >>> fd.metrics.energy_score(np.zeros((4, 1, 2)), np.array([[3.0, 4.0]])).tolist()
    [5.0]
    """
    from scipy.spatial.distance import cdist, pdist

    draws, y = _checked(draws, y, 2 if fair else 1)
    if y.ndim < 1:
        raise ArgumentError("y", "a number", "rows (N, ...)")
    M, score = len(draws), np.full(len(y), np.nan)
    for row, value in enumerate(y.reshape(len(y), -1)):
        asked = np.isfinite(value)
        if asked.any():
            some = draws[:, row].reshape(M, -1)[:, asked].astype(np.float64)
            apart = pdist(some).sum() / (M * (M - fair)) if M > 1 else 0.0  # each pair once: half of all
            score[row] = cdist(some, value[None, asked]).mean() - apart
    return score


def coverage(draws: Any, y: Any, *, levels: Sequence[float] = (0.5, 0.8, 0.95)) -> Floats:
    """Return which share of the values lies in the central intervals of some levels.

    The quantile of level a is that at the place a (M + 1) of the sorted draws, counted from 1 ("weibull"): where y is a
    draw like the others, the expected share is the level, however few draws there are. The usual interpolation makes
    intervals of 100 draws too narrow by 1 %.

    Parameters
    ----------
    draws : (M, ...) array
    y : (...) array
        NaN where nothing was asked for.
    levels : sequence of float, optional
        Between 0 and 1; one of M draws is at most (M - 1) / (M + 1).

    Returns
    -------
    (levels,) float64
        Values of one row go together, so a standard error is that of the rows' means.

    Examples
    --------
    >>> draws = np.random.default_rng(0).normal(size=(1000, 50))
    >>> fd.metrics.coverage(draws, np.zeros(50), levels=(0.5,)).tolist()
    [1.0]
    """
    draws, y = _checked(draws, y, 1)
    most = (len(draws) - 1) / (len(draws) + 1)
    inside = np.array([check_float("levels", level, low=0, high=1, high_open=True) for level in levels])
    if (inside > most + 1e-12).any():
        got, wants = f"{inside.max():g} of {len(draws)} draws", f"at most {most:g}, or more draws"
        raise ArgumentError("levels", got, wants)
    flat = y.reshape(-1)
    targets = np.isfinite(flat)
    if not targets.any():
        raise ArgumentError("y", "no value that is not NaN", "at least one")
    found = np.zeros(len(inside))
    for part, some in _chunks(draws):
        asked = targets[part]
        value = flat[part][asked]
        tails = np.quantile(some[:, asked], [(1 - inside) / 2, (1 + inside) / 2], axis=0, method="weibull")
        found += ((tails[0] <= value) & (value <= tails[1])).sum(axis=1)
    return np.asarray(found / targets.sum())


def _checked(draws: Any, y: Any, least: int) -> tuple[npt.NDArray[Any], Floats]:
    value = check_array("y", y, dtype=np.float64, finite=False)
    if np.isinf(value).any():
        raise ArgumentError("y", "infinite values", "finite ones, or NaN where nothing was asked for")
    many = check_array("draws", draws, shape=(None, *value.shape))
    if len(many) < least:
        raise ArgumentError("draws", f"{len(many)} draws", f"at least {least}")
    return many, value


def _chunks(draws: npt.NDArray[Any]) -> Iterator[tuple[slice, Floats]]:
    """All draws of some values after others, (M, values) float64 of their own, and which values."""
    flat = draws.reshape(len(draws), -1)
    size = max(1, CHUNK_VALUES // len(draws))
    for start in range(0, flat.shape[1], size):
        part = slice(start, start + size)
        yield part, flat[:, part].astype(np.float64)
