"""A mean and a covariance by eigenvectors, and how far two of them are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import RowMap
from fastdiff.errors import ArgumentError, check_array

Float64 = npt.NDArray[np.float64]

WEIGHTS_SLACK = 1e-6  # by which the sum of given weights may miss 1


@dataclass(frozen=True, eq=False)
class Moments:
    """A mean and a covariance, the latter by eigenvectors and the standard deviations along them.

    Attributes
    ----------
    mean : (d,) float64
    deviations : (r,) float64
        Standard deviation along each column of `basis`.
    basis : (d, r) float64
        Orthonormal columns, r <= d.
    rest : float
        Standard deviation along everything orthogonal to the columns; of no meaning where r = d.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> law.data.mean.tolist(), law.data.cov.tolist(), np.sort(law.data.spectrum).tolist()
    ([0.0, 0.0], [[4.0, 0.0], [0.0, 1.0]], [0.0, 1.0, 4.0])
    """

    mean: Float64
    deviations: Float64
    basis: Float64
    rest: float = 0.0

    def __post_init__(self) -> None:
        for array in (self.mean, self.deviations, self.basis):
            frozen(array)

    @property
    def cov(self) -> Float64:
        """(d, d) float64: ``basis diag(deviations^2) basis^T + rest^2 (I - basis basis^T)``."""
        factor = self.basis * self.deviations
        cov: Float64 = factor @ factor.T
        d, r = self.basis.shape
        return cov if r == d else cov + self.rest**2 * (np.eye(d) - self.basis @ self.basis.T)

    @property
    def spectrum(self) -> Float64:
        """(r + 1,) float64: the variance along each column of `basis`, then that along the rest."""
        return np.append(self.deviations, self.rest) ** 2

    def log_volume(self) -> float:
        """Half the logarithm of the covariance's determinant.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> bool(np.isclose(law.data.log_volume(), np.log(4) / 2))
        True
        """
        d, r = self.basis.shape
        return float(np.log(self.deviations).sum()) + ((d - r) * math.log(self.rest) if r < d else 0.0)

    def scaled(self, factors: Float64, vector: Float64) -> Float64:
        """`vector` (d,) times factors (r + 1,), one for each column of `basis` and one for the rest.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> law.data.scaled(np.array([2.0, 2.0, 1.0]), np.array([1.0, 3.0])).tolist()
        [2.0, 6.0]
        """
        rest = factors[-1] if self._is_thin else 0.0
        result: Float64 = self.basis @ ((factors[:-1] - rest) * (vector @ self.basis)) + rest * vector
        return result

    def scaling(self, factors: Float64, offset: Float64) -> RowMap:
        """The map of rows by `scaled`, with an offset (d,) added.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> double = law.data.scaling(np.array([2.0, 2.0, 1.0]), np.ones(2))
        >>> (np.array([[1.0, 3.0]]) @ (double.left @ double.right) + double.offset).tolist()
        [[3.0, 7.0]]
        """
        d, r = self.basis.shape
        rest = factors[-1] if self._is_thin else 0.0
        scale = np.full(d, rest) if self._is_thin else None
        if r == 0:
            return RowMap(scale=scale, offset=offset)
        return RowMap(scale, self.basis, (factors[:-1] - rest)[:, None] * self.basis.T, offset)

    @property
    def _is_thin(self) -> bool:
        return self.basis.shape[1] < self.basis.shape[0]

    def w2(self, other: Moments) -> float:
        """The 2-Wasserstein distance to another Gaussian (Givens & Shortt 1984, proposition 7).

        ``W2^2 = |mean - mean'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)``. The trace cancels when C is close
        to C', so it is computed as a sum of squares: in a shared eigenbasis
        ``sum (deviation - deviation')^2``, else ``min over orthogonal U of |F - F' U|^2`` with C = F F^T and
        C' = F' F'^T (Bhatia, Jain & Lim 2019, theorem 1), where U is the polar factor of F'^T F. Outside the span
        of both bases the covariances are multiples of I, and share every basis.

        Parameters
        ----------
        other : Moments
            Of the same d.

        Returns
        -------
        float

        Raises
        ------
        ArgumentError
            If d differs.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> other = fd.denoisers.Gaussian(np.array([3.0, 4.0]), np.diag([4.0, 1.0]), s)
        >>> round(law.data.w2(other.data), 6)  # the means are so far apart
        5.0
        """
        if self.mean.shape != other.mean.shape:
            raise ArgumentError("other", f"{other.mean.size} dimensions", f"{self.mean.size} dimensions")
        d, r = self.basis.shape
        shape_gap: Float64
        if np.array_equal(self.basis, other.basis):
            shape_gap, outside = self.deviations - other.deviations, d - r
        else:
            both = np.hstack([self.basis, other.basis])
            span = np.linalg.qr(both)[0] if both.shape[1] < d else np.eye(d)
            here, there = self.root_in(span), other.root_in(span)
            left, _, right = np.linalg.svd(there.T @ here)
            shape_gap, outside = here - there @ (left @ right), d - span.shape[1]
        rest_gap = math.sqrt(outside) * (self.rest - other.rest)
        return math.hypot(np.linalg.norm(self.mean - other.mean), np.linalg.norm(shape_gap), rest_gap)

    def root_in(self, span: Float64) -> Float64:
        """A square root of the covariance within the span (d, k) of orthonormal columns that contains `basis`.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> root = law.data.root_in(np.eye(2))
        >>> np.allclose(root @ root.T, np.diag([4.0, 1.0]))
        True
        """
        inner = span.T @ self.basis
        if not self._is_thin:
            return inner * self.deviations
        root: Float64 = (inner * (self.deviations - self.rest)) @ inner.T + self.rest * np.eye(len(inner))
        return root


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array


def probabilities(weights: npt.ArrayLike, n: int) -> Float64:
    """Return n checked weights, none of them negative, that sum to 1 to within `WEIGHTS_SLACK`, and then do."""
    given = check_array("weights", weights, shape=(n,), dtype=np.float64)
    if given.min() < 0:
        raise ArgumentError("weights", f"{given.min():.3g}", "no negative weight")
    if abs(given.sum() - 1) > WEIGHTS_SLACK:
        raise ArgumentError("weights", f"a sum of {given.sum():.9g}", "a sum of 1")
    result: Float64 = given / given.sum()
    return result
