"""The exact denoiser of data that are given rows."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array
from fastdiff.errors import ArgumentError, check_array
from fastdiff.exact.exact import Exact, Workspace
from fastdiff.exact.moments import Moments, frozen
from fastdiff.schedule import Schedule


class Empirical(Exact):
    """The exact denoiser of data drawn from the rows of X, each as likely as the others.

    ``E[x0 | x]`` is the mean of the rows weighted by ``exp(-|x - alpha X_k|^2 / (2 sigma^2))``, in one pass over the
    data. It is what a network of unlimited capacity would learn from X; where noise is small it is a row of X.

    Parameters
    ----------
    X : (N, ...) array_like
        The data, N >= 1; float32 is kept as such.
    schedule : Schedule
        The noise levels.
    prediction : {"noise", "x0", "v"}, optional
        What `predict` returns.

    Attributes
    ----------
    data : Moments
        Mean and covariance of the rows, normalised by N; made when it is asked for.
    shape, d, schedule, T, prediction
        As of `Exact`.

    Raises
    ------
    ArgumentError
        If X has no rows or no values, or values that are not finite.

    Notes
    -----
    In float32 an exponent is right to some 1e-7 of itself, so among rows of X that are all more than 1000 sigma from x
    the choice is uncertain. Where it matters, give x in float64.
    """

    _mixes_steps = True

    def __init__(self, X: npt.ArrayLike, schedule: Schedule, *, prediction: str = "noise") -> None:
        given = check_array("X", X, min_ndim=2)
        if given.size == 0:
            raise ArgumentError("X", f"shape {given.shape}", "at least one row of at least one value")
        super().__init__(given.shape[1:], schedule, prediction)
        dtype = np.float32 if given.dtype == np.float32 else np.float64
        self._rows = np.array(given, dtype, order="C").reshape(len(given), self.d)

    @property
    def X(self) -> npt.NDArray[Any]:
        """(N, ...) float32 or float64, read-only: the data."""
        return frozen(self._rows.reshape(-1, *self.shape))

    @cached_property
    def data(self) -> Moments:
        rows = self._rows.astype(np.float64)
        mean = rows.mean(axis=0)
        _, deviations, basis = np.linalg.svd((rows - mean) / math.sqrt(len(rows)), full_matrices=False)
        return Moments(mean, deviations, basis.T)

    def _expect(self, space: Workspace, prediction: str, x: Array, t: Any, out: Array) -> None:
        self._posterior(space, x, t, out, space("log_sum", (len(x),), x.dtype))
        if prediction == "x0":
            return
        # noise = (x - alpha x0) / sigma and v = (alpha x - x0) / sigma, as alpha^2 + sigma^2 = 1.
        alpha, sigma = self._levels(t)
        inner, outer = (alpha, 1 / sigma) if prediction == "noise" else (1 / alpha, alpha / sigma)
        if np.ndim(t):
            inner, outer = (space.be.asarray(column[:, None], x.dtype) for column in (inner, outer))
        else:
            inner, outer = float(inner), float(outer)
        out *= inner
        out -= x
        out *= -outer

    def _log_density(self, space: Workspace, x: Array, t: Any, out: Array) -> None:
        self._posterior(space, x, t, space("x0", x.shape, x.dtype), out)
        constant = -math.log(len(self._rows)) - self.d * np.log(math.sqrt(2 * math.pi) * self.schedule.noise[t])
        out += space.be.asarray(constant, x.dtype) if np.ndim(t) else float(constant)

    def _posterior(self, space: Workspace, x: Array, t: Any, out: Array, log_sum: Array) -> None:
        be = space.be
        data = self._kept((be, x.dtype), self._rows.size, lambda: be.asarray(self._rows, x.dtype))
        signal, noise = (np.broadcast_to(level, len(x)) for level in self._levels(t))
        be.posterior_mean(x, data, signal, noise, out, log_sum)
