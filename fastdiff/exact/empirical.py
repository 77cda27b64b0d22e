"""The exact denoiser of data that are given rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array
from fastdiff.errors import ArgumentError, as_named, check_array
from fastdiff.exact.exact import Exact, Workspace
from fastdiff.exact.moments import Float64, Moments, frozen, probabilities
from fastdiff.exact.posterior import DISAGREE, impossible
from fastdiff.forks import cached_property
from fastdiff.observations import Given, observations
from fastdiff.schedule import Schedule, target

LEAST_SIGNAL = 1e-30  # with which weights are divided by the signal
LEAST_WEIGHT = 1e-300  # that is not 0
BLOCK_VALUES = 1 << 22  # of a matrix of states by rows


class Empirical(Exact):
    """The exact denoiser of data drawn from the rows of X, row k with probability ``weights[k]``.

    ``E[x0 | x]`` is the mean of the rows weighted by ``weights[k] exp(-|x - alpha X_k|^2 / (2 sigma^2))``, in one pass
    over the data. It is what a network of unlimited capacity would learn from X; where noise is small it is a row of X.

    Parameters
    ----------
    X : (N, ...) array_like
        The data, N >= 1; float32 is kept as such.
    schedule : Schedule
        The noise levels.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What `predict` returns.
    weights : (N,) array_like, optional
        Probabilities of the rows: not negative, of sum 1. By default all are the same.

    Attributes
    ----------
    weights : (N,) float64, read-only
    data : Moments
        Mean and covariance of the rows, normalised by N; made when it is asked for.
    shape, d, schedule, T, prediction
        As of `Exact`.

    Raises
    ------
    ArgumentError
        If X has no rows or no values, or values that are not finite; if weights are negative or do not sum to 1.

    Notes
    -----
    In float32 an exponent is right to some 1e-7 of itself, so among rows of X that are all more than 1000 sigma from x
    the choice is uncertain. Where it matters, give x in float64.

    Examples
    --------
    >>> X, s = fd.data.harmonic_curves(8), fd.Schedule.cosine(20)
    >>> new = fd.sample(fd.denoisers.Empirical(X, s), fd.samplers.ddim(s, 20), n=3, backend="numpy")
    >>> [bool(np.abs(X - one).max(axis=1).min() < 0.1) for one in new]  # each is one of the rows
    [True, True, True]
    """

    @property
    def _mixes_steps(self) -> bool:  # type: ignore[override]
        return not self._uneven

    def __init__(
        self,
        X: npt.ArrayLike,
        schedule: Schedule,
        *,
        prediction: str = "noise",
        weights: npt.ArrayLike | None = None,
    ) -> None:
        given = check_array("X", X, min_ndim=2)
        if given.size == 0:
            raise ArgumentError("X", f"shape {given.shape}", "at least one row of at least one value")
        super().__init__(given.shape[1:], schedule, prediction)
        dtype = np.float32 if given.dtype == np.float32 else np.float64
        self._rows = np.array(given, dtype, order="C").reshape(len(given), self.d)
        even = np.full(len(given), 1 / len(given))
        self.weights = frozen(even if weights is None else probabilities(weights, len(given)))
        self._uneven = bool((self.weights != self.weights[0]).any())

    @property
    def X(self) -> npt.NDArray[Any]:
        """(N, ...) float32 or float64, read-only: the data."""
        return frozen(self._rows.reshape(-1, *self.shape))

    @as_named(given="obs")
    def given(self, obs: Given) -> Empirical | list[Empirical]:
        """The law of x0 when something of it has been observed: the same rows, with other weights.

        Parameters
        ----------
        obs : fd.Known, fd.Linear, fd.Weight, or a list of them
            What is seen without noise must agree with a row to within a millionth of what it is made of. The function
            of an `fd.Weight` gets the rows (N, ...) in float64; its gradients are not looked at.

        Returns
        -------
        Empirical, or a list of N where `obs` holds N observations
            Of the rows that are possible still. Its `log_evidence` is the logarithm of the sum of all weights: of
            densities where there is noise, of probabilities where there is none, of the weights that a function gives.

        Raises
        ------
        ArgumentError
            Observations of another shape, or with which no row agrees; log weights that are not numbers.

        Examples
        --------
        >>> law = fd.denoisers.Empirical([[0.0, 1.0], [5.0, 2.0]], fd.Schedule.cosine(20))
        >>> law.given(fd.Known([0.1, np.nan], noise=0.5)).data.mean.round(3).tolist()
        [0.0, 1.0]
        """
        observed = observations(obs, self.shape)
        X = self._rows.astype(np.float64)
        with np.errstate(divide="ignore"):  # rows of weight 0
            logs = np.log(self.weights)
        for weight in observed.weights:
            logs = logs + weight.log_weights(X.reshape(-1, *self.shape))
        found = {}
        for group in observed.groups():
            exact, noise = group.noise == 0, group.noise[group.noise > 0]
            made, sizes = X @ group.A.T, np.abs(X) @ np.abs(group.A.T)
            normal = np.log(noise).sum() + len(noise) / 2 * math.log(2 * math.pi)
            for i, y in zip(group.indices.tolist(), group.y, strict=True):
                misses = np.abs(made - y) > DISAGREE * (sizes + np.abs(y))
                likely = logs - np.square((made - y)[:, ~exact] / noise).sum(axis=1) / 2 - normal
                likely[misses[:, exact].any(axis=1)] = -math.inf
                top = likely.max()
                if top == -math.inf:
                    raise impossible(observed, i)
                weights = np.exp(likely - top)
                rows, weights = self._rows[weights > 0], weights[weights > 0]
                shares = weights / weights.sum()
                options: dict[str, Any] = {"prediction": self.prediction, "weights": shares}
                found[i] = Empirical(rows.reshape(-1, *self.shape), self.schedule, **options)
                found[i].log_evidence = float(top + np.log(weights.sum()))
        return found[0] if observed.count is None else [found[i] for i in range(observed.count)]

    @cached_property
    def data(self) -> Moments:
        rows = self._rows.astype(np.float64)
        if self._uneven:
            mean = self.weights @ rows
            scaled = np.sqrt(self.weights)[:, None] * (rows - mean)
        else:
            mean = rows.mean(axis=0)
            scaled = (rows - mean) / math.sqrt(len(rows))
        _, deviations, basis = np.linalg.svd(scaled, full_matrices=False)
        return Moments(mean, deviations, basis.T)

    def _expect(self, space: Workspace, prediction: str, x: Array, t: Any, out: Array) -> None:
        self._posterior(space, x, t, out, space("log_sum", (len(x),), x.dtype))
        if prediction == "x0":
            return
        # noise = (x - alpha x0) / sigma, and what is made of it is outer (x - inner x0). For v outer is alpha / sigma;
        # where alpha is 0, so small a number takes its place that x does not count.
        alpha, sigma = self._levels(t)
        inner, outer = alpha, 1 / sigma
        if prediction == "velocity":
            inner = alpha + sigma
        elif prediction == "v":
            alpha = np.maximum(alpha, 1e-20)
            inner, outer = self.schedule.power[t] / alpha, alpha / sigma
        if np.ndim(t):
            inner, outer = (space.be.asarray(column[:, None], x.dtype) for column in (inner, outer))
        else:
            inner, outer = float(inner), float(outer)
        out *= inner
        out -= x
        out *= -outer

    def _product(self, space: Workspace, prediction: str, x: Array, t: int, vectors: Array, out: Array) -> None:
        """In float64: signal / noise^2 of the rows' covariance, its weights times deviations from the mean."""
        be = space.be
        levels = self._levels(t)
        alpha, sigma, of_noise, of_data = (float(level) for level in (*levels, *target(prediction, *levels)))
        mean: Any = self.data.mean
        rows = self._kept((be, "centred"), self._rows.size, lambda: be.asarray(self._rows - mean, np.float64))
        centre = be.asarray(alpha * mean, np.float64)
        logs = be.asarray(self._log_ratios, np.float64) - alpha**2 / (2 * sigma**2) * (rows * rows).sum(axis=1)
        for start in range(0, len(x), size := max(1, BLOCK_VALUES // len(rows))):
            part = slice(start, start + size)
            shares = logs + (x[part].astype(np.float64) - centre) @ rows.T * (alpha / sigma**2)
            shares = np.exp(shares - shares.max(axis=1)[:, None])
            shares /= shares.sum(axis=1)[:, None]
            centred = shares @ rows
            for vector, result in zip(vectors[:, part], out[:, part], strict=True):
                u = vector.astype(np.float64)
                slopes = shares * (u @ rows.T - (u * centred).sum(axis=1)[:, None])
                product = alpha / sigma**2 * (slopes @ rows)  # the slopes sum to 0
                if prediction != "x0":
                    product = of_noise / sigma * (u - alpha * product) + of_data * product
                result[...] = product

    def _log_density(self, space: Workspace, x: Array, t: Any, out: Array) -> None:
        self._posterior(space, x, t, space("x0", x.shape, x.dtype), out)
        top = math.log(self.weights.max()) if self._uneven else -math.log(len(self._rows))
        constant = top - self.d * np.log(math.sqrt(2 * math.pi) * self.schedule.noise[t])
        out += space.be.asarray(constant, x.dtype) if np.ndim(t) else float(constant)

    def _posterior(self, space: Workspace, x: Array, t: Any, out: Array, log_sum: Array) -> None:
        be = space.be
        data = self._kept((be, x.dtype), self._rows.size, lambda: be.asarray(self._rows, x.dtype))
        signal, noise = (np.broadcast_to(level, len(x)) for level in self._levels(t))
        if not self._uneven:
            be.posterior_mean(x, data, signal, noise, out, log_sum)
            return
        # One coordinate more, where a state is 0 and row k at sqrt(-2 log(weights[k] / their greatest)) noise / signal,
        # adds the weight's logarithm to the exponent.
        n, d = x.shape
        sizes = {"weighted state": n, "weighted rows": len(data), "weighted mean": n}
        state, rows, mean = (space(name, (size, d + 1), x.dtype) for name, size in sizes.items())
        alpha, sigma = max(float(signal[0]), LEAST_SIGNAL), float(noise[0])
        state[:, :d], state[:, d], rows[:, :d] = x, 0, data
        rows[:, d] = be.asarray(np.sqrt(-2 * self._log_ratios) * (sigma / alpha), x.dtype)
        be.posterior_mean(state, rows, np.full(n, alpha), noise, mean, log_sum)
        out[...] = mean[:, :d]

    @cached_property
    def _log_ratios(self) -> Float64:
        """The logarithm of the weights over the greatest one; what is 0 counts as the least."""
        ratios: Float64 = np.log(np.maximum(self.weights / self.weights.max(), LEAST_WEIGHT))
        return ratios
