"""Rows with missing values, to learn from: the Gaussian that fits what is there, and draws of what is not.

The Gaussian is the maximum of the likelihood of the values that are there (EM, Dempster et al. 1977), with the
Ledoit-Wolf shrinkage of `fastdiff.base` in every step, so that few rows do not make it too sure. Where values are
missing at random (whether one is missing may depend on those that are there) it tends to the law of whole rows.

A network learns from rows whose missing values are drawn from that Gaussian given the others of the row. A state x_t
of such a row is distributed as it is in sampling, up to what is not Gaussian in the missing values, and these are no
part of the loss. Of every row there are several copies, drawn anew: the missing values of copy k are made of normals
of stream DATA, step ``4 + k``, row of the data, by the noise law, on the host and so the same for all backends. Row i
of copy k is row ``k N + i`` for stream BATCH. Rows held out have one copy, of step 20.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.covariance import ledoit_wolf
from fastdiff.errors import ArgumentError
from fastdiff.noise import Draw, Stream, fill_normal

log = logging.getLogger("fastdiff")

Float64 = npt.NDArray[np.float64]
Index = npt.NDArray[Any]

FIRST_STEP = 4  # of stream DATA: before it there are made data, and rows that are held out
MOST_COPIES, MOST_VALUES = 16, 1 << 22  # of a row; of all copies together
ITERATIONS, CLOSE = 30, 1e-3  # of EM; relative change of the covariance
SETTLED = 4  # steps after which the shrinkage stays
MOST_WORK = 2e11  # operations of EM
BLOCK_VALUES = 1 << 21  # of covariances at once
JITTER = 1e-9  # of a covariance that is singular, relative to the mean variance
MOST_WIDTH = 4096  # values of a row


@dataclass(frozen=True, eq=False)
class Gaps:
    """Rows with missing values, in a network's range, and the Gaussian that fits them.

    Attributes
    ----------
    rows : (N, d) float64
        NaN where a value is missing.
    mean : (d,) float64
    cov : (d, d) float64
        Shrunk.
    shrinkage : float
        By which: cov = (1 - shrinkage) S + shrinkage tr(S) / d.
    seed : int
    """

    rows: Float64
    mean: Float64
    cov: Float64
    shrinkage: float
    seed: int

    @classmethod
    def of(cls, rows: Float64, seed: int) -> Gaps:
        """Fit rows (N, d), each column and row of which has some value."""
        n, d = rows.shape
        if d > MOST_WIDTH:
            raise ArgumentError("X", f"missing values in rows of {d} values", f"rows of at most {MOST_WIDTH}")
        missing = np.isnan(rows)
        mean = np.nanmean(rows, axis=0)
        spread = np.nanstd(rows, axis=0)
        found = cls(rows, mean, np.diag(np.maximum(spread**2, 1e-12)), 1.0, seed)
        groups = len(np.unique(missing, axis=0))
        most = int(np.clip(MOST_WORK / (groups * d**3 / 3 + n * d**2), 2, ITERATIONS))
        for step in range(most):
            before = found.cov
            # How much rows tell of a covariance is seen in drawn rows; means given the rest would look too sure.
            share = ledoit_wolf(found.filled(1)[0]).shrinkage if step < SETTLED else found.shrinkage
            found = found._better(share)
            change = float(np.abs(found.cov - before).max() / np.abs(found.cov).max())
            if change < CLOSE:
                break
        words = "a Gaussian of %d rows with %.1f %% of values missing: %d steps of EM, the last changed it by %.1g"
        log.info(words, n, 100 * missing.mean(), step + 1, change)
        return found

    def _better(self, share: float) -> Gaps:
        """One step of EM, with this shrinkage."""
        n, d = self.rows.shape
        whole, spread = np.empty((n, d)), np.zeros((d, d))
        for some, mean, cov, which in self._conditionals(self.rows):
            whole[some] = mean
            spread += np.tensordot(np.bincount(which, minlength=len(cov)), cov, axes=1)
        mean = whole.mean(axis=0)
        S = (whole - mean).T @ (whole - mean) / n + spread / n
        cov = (1 - share) * S
        cov[np.diag_indices(d)] += share * np.trace(S) / d
        return replace(self, mean=mean, cov=cov, shrinkage=share)

    def _conditionals(self, rows: Float64) -> Iterator[tuple[Index, Float64, Float64, Index]]:
        """Yield parts of the rows: their numbers, means given what is there, covariances, and whose each row has.

        Rows and columns of a covariance are 0 where the value is there.
        """
        d = rows.shape[1]
        patterns, which = np.unique(np.isnan(rows), axis=0, return_inverse=True)
        which = which.reshape(-1)
        order, at_once = np.argsort(which, kind="stable"), max(1, BLOCK_VALUES // d**2)
        for start in range(0, len(patterns), at_once):
            gone = patterns[start : start + at_once]
            low, high = np.searchsorted(which[order], (start, start + len(gone)))
            some = order[low:high]
            there = ~gone[:, :, None] & ~gone[:, None, :]
            # Where a value is not there, the identity: then the inverse is that of what is there.
            inverse = np.linalg.inv(np.where(there, self.cov, 0.0) + gone[:, :, None] * np.eye(d))
            gain = self.cov @ np.where(there, inverse, 0.0)
            cov = self.cov - gain @ self.cov
            cov = np.where(gone[:, :, None] & gone[:, None, :], (cov + cov.transpose(0, 2, 1)) / 2, 0.0)
            of_row = which[some] - start
            off = np.where(gone[of_row], 0.0, rows[some] - self.mean)
            mean = self.mean + np.einsum("nij,nj->ni", gain[of_row], off)
            yield some, np.where(gone[of_row], mean, rows[some]), cov, of_row

    def centred(self, centre: Float64 | None) -> Gaps:
        """Return it for rows of which this is taken away."""
        if centre is None:
            return self
        flat = centre.reshape(-1)
        return replace(self, rows=self.rows - flat, mean=self.mean - flat)

    @property
    def share(self) -> float:
        """How much of the rows is there."""
        return 1 - float(np.isnan(self.rows).mean())

    def filled(self, copies: int, rows: Float64 | None = None, first: int = 0) -> Float64:
        """Return copies (copies, N, d) of rows, by default those that were fitted, with missing values drawn."""
        rows = self.rows if rows is None else rows
        n, d = rows.shape
        whole = np.empty((copies, n, d))
        normals = np.empty((copies, n, d))
        for copy in range(copies):
            fill_normal(normals[copy], Draw(self.seed, Stream.DATA, FIRST_STEP + first + copy))
        for some, mean, cov, of_row in self._conditionals(rows):
            root = np.linalg.cholesky(cov + (JITTER * np.trace(self.cov) / d) * np.eye(d))
            drawn = mean + np.einsum("nij,knj->kni", root[of_row], normals[:, some])
            whole[:, some] = np.where(np.isnan(rows[some]), drawn, mean)
        return whole

    def training_data(self) -> Float64:
        """Return what a network learns from, (copies N, 2, d): see `TrainingDraws`."""
        n, d = self.rows.shape
        copies = int(np.clip(MOST_VALUES // (n * d), 1, MOST_COPIES))
        data = np.empty((copies, n, 2, d))
        data[:, :, 1] = np.where(np.isnan(self.rows), np.nan, 0.0)
        data[:, :, 0] = self.filled(copies)
        return data.reshape(copies * n, 2, d)


def has_gaps(X: Any) -> bool:
    """Whether values are missing; those on disk have been looked at, and none are."""
    return isinstance(X, np.ndarray) and X.dtype.kind == "f" and bool(np.isnan(X).any())


def check_gaps(X: npt.NDArray[Any], what: str) -> None:
    """Say how much is missing of rows (N, ...), and refuse what nothing can be learned of.

    Raises
    ------
    ArgumentError
        A row, a channel or a point in time without any value.
    """
    missing = np.isnan(X)
    some = _in_rows(missing).any(axis=1).sum()
    log.info("%.2f %% of the values are missing, in %d of %d rows", 100 * missing.mean(), some, len(X))
    of_rows = _in_rows(missing).all(axis=1)
    if of_rows.any():
        row = int(np.flatnonzero(of_rows)[0])
        wants = "rows with a value: X[~np.isnan(X).reshape(len(X), -1).all(axis=1)] leaves them out"
        raise ArgumentError(what, f"{of_rows.sum()} rows without any value, the first is row {row}", wants)
    if X.ndim == 3 and (of_channels := missing.all(axis=(0, 1))).any():
        raise ArgumentError(what, f"channel {int(np.argmax(of_channels)) + 1}, never seen", "channels with values")
    of_places = missing.all(axis=0)
    if of_places.any():
        at = tuple(int(i) for i in np.argwhere(of_places)[0])
        place = f"point {at[0]}" + (f" of channel {at[1] + 1}" if X.ndim == 3 else "")
        raise ArgumentError(what, f"{place}, missing in all rows", "each point seen in some row")


def _in_rows(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return mask.reshape(len(mask), -1)
