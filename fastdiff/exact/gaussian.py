"""The exact denoiser of a Gaussian, dense or of low rank."""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, RowMap
from fastdiff.covariance import check_covariance
from fastdiff.errors import ArgumentError, as_named, check_array, check_float
from fastdiff.exact.exact import Exact, Workspace
from fastdiff.exact.moments import Float64, Moments, frozen
from fastdiff.exact.posterior import condition, impossible, linear_observations
from fastdiff.forks import cached_property
from fastdiff.observations import Given
from fastdiff.schedule import Schedule, target

EPS = float(np.finfo(np.float64).eps)


class Gaussian(Exact):
    """The exact denoiser of data drawn from N(mean, cov).

    The state at timestep t has the law N(alpha mean, V) with ``V = alpha^2 cov + sigma^2 I``, and the best predictions
    are the conditional expectations given x::

        E[noise | x] = sigma V^-1 (x - alpha mean)
        E[x0 | x]    = mean + alpha cov V^-1 (x - alpha mean)
        E[v | x]     = alpha E[noise | x] - sigma E[x0 | x]

    evaluated in the eigenbasis of `cov`, where V is diagonal.

    Parameters
    ----------
    mean : array_like
        Mean of the data, of the shape of one sample; d is its size.
    cov : (d, d) array_like
        Covariance of the flattened sample: symmetric, positive semi-definite, possibly singular. See `low_rank` for
        one of many dimensions and few directions.
    schedule : Schedule
        The noise levels.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What `predict` returns.

    Attributes
    ----------
    mean : float64 of shape `shape`, read-only
    cov : (d, d) float64, read-only
        Made when it is asked for, if the denoiser is of low rank.
    data : Moments
        The law of the data, with the eigenbasis.
    shape, d, schedule, T, prediction
        As of `Exact`.

    Raises
    ------
    ArgumentError
        If shapes disagree, values are not finite, or `cov` is not symmetric and positive semi-definite to
        within rounding of the dtype it came in.

    Examples
    --------
    >>> s = fd.Schedule.cosine(100)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> draws = fd.sample(law, fd.samplers.ddpm(s), n=2000, backend="numpy")
    >>> draws.var(axis=0).round().tolist()
    [4.0, 1.0]
    """

    def __init__(
        self, mean: npt.ArrayLike, cov: npt.ArrayLike, schedule: Schedule, *, prediction: str = "noise"
    ) -> None:
        self._begin(mean, schedule, prediction)
        law = check_covariance("cov", cov, self.d)
        self.cov = frozen(law.cov)
        self._data = Moments(self.mean.reshape(-1), np.sqrt(law.spectrum), law.basis)
        self._floor = math.sqrt(self.d * EPS) * float(self._data.deviations.max())  # an eigenvalue's error, as a root

    @classmethod
    def low_rank(
        cls,
        mean: npt.ArrayLike,
        factor: npt.ArrayLike,
        variance: float,
        schedule: Schedule,
        *,
        prediction: str = "noise",
    ) -> Self:
        """The denoiser of N(mean, ``factor factor^T + variance I``), at a cost of O(d r) a sample.

        Parameters
        ----------
        mean : array_like
            Mean of the data, of the shape of one sample; d is its size.
        factor : (d, r) array_like
            Directions in which the data vary, times their standard deviations. They need not be orthogonal.
        variance : float
            What is added in every direction, at least 0.
        schedule, prediction
            As of `Gaussian`.

        Returns
        -------
        Gaussian
            It makes no (d, d) array, unless for its `cov`.

        Raises
        ------
        ArgumentError
            If shapes disagree, values are not finite, or `variance` is negative.

        Examples
        --------
        >>> law = fd.denoisers.Gaussian.low_rank(np.zeros(3), [[1.0], [2.0], [0.0]], 0.5, fd.Schedule.cosine(20))
        >>> law.cov.round(6).tolist()
        [[1.5, 2.0, 0.0], [2.0, 4.5, 0.0], [0.0, 0.0, 0.5]]
        """
        self = cls.__new__(cls)
        self._begin(mean, schedule, prediction)
        columns = check_array("factor", factor, shape=(self.d, None), dtype=np.float64)
        rest = math.sqrt(check_float("variance", variance, low=0))
        basis, deviations, _ = np.linalg.svd(columns, full_matrices=False)
        self._data = Moments(self.mean.reshape(-1), np.hypot(deviations, rest), basis, rest)
        self._floor = self.d * EPS * float(self._data.deviations.max(initial=rest))
        return self

    def _begin(self, mean: npt.ArrayLike, schedule: Schedule, prediction: str) -> None:
        self.mean = frozen(check_array("mean", mean, min_ndim=1, dtype=np.float64).copy())
        if self.mean.size == 0:
            raise ArgumentError("mean", f"shape {self.mean.shape}", "at least one value")
        super().__init__(self.mean.shape, schedule, prediction)

    @property
    def data(self) -> Moments:
        return self._data

    @cached_property
    def cov(self) -> Float64:
        return frozen(self.data.cov)

    @as_named(given="obs")
    def given(self, obs: Given) -> Gaussian | list[Gaussian]:
        """The law of x0 when something of it has been observed, which is a Gaussian again.

        Parameters
        ----------
        obs : fd.Known, fd.Linear, or a list of them
            ``y = A x0 + noise z``; the noise may be 0, rows of A may depend on each other.

        Returns
        -------
        Gaussian, or a list of N where `obs` holds N observations
            With the schedule and prediction of this one, and `log_evidence`, the log density of y. Where nothing is
            known it is this law. Values without noise that depend on each other, or are constant under this law, add
            nothing: the density is that on the subspace where they can lie.

        Raises
        ------
        ArgumentError
            Observations of another shape, an `fd.Weight`, or values without noise that contradict each other or this
            law by more than a millionth.

        Examples
        --------
        >>> law = fd.denoisers.Gaussian(np.zeros(2), [[1.0, 0.9], [0.9, 1.0]], fd.Schedule.cosine(20))
        >>> seen = law.given(fd.Known([2.0, np.nan]))
        >>> seen.data.mean.round(6).tolist(), round(float(seen.cov[1, 1]), 6), round(seen.log_evidence, 4)
        ([2.0, 1.8], 0.19, -2.9189)
        """
        observed = linear_observations(obs, self.shape, "a Gaussian")
        found = {}
        for group in observed.groups():
            laws, evidence, _ = condition(self.data, group, self._floor)
            for i, law, log_density in zip(group.indices.tolist(), laws, evidence.tolist(), strict=True):
                if log_density == -math.inf:
                    raise impossible(observed, i)
                found[i] = self._with(law, log_density)
        return found[0] if observed.count is None else [found[i] for i in range(observed.count)]

    def _with(self, law: Moments, log_evidence: float = 0.0) -> Gaussian:
        """The denoiser of data of another law, in all else like this one."""
        other = Gaussian.__new__(Gaussian)
        other._begin(law.mean.reshape(self.shape), self.schedule, self.prediction)
        other._data, other.log_evidence = law, log_evidence
        other._floor = self.d * EPS * float(self._data.deviations.max(initial=self._data.rest))
        return other

    def affine(self, prediction: str, t: int) -> tuple[Float64, Float64]:
        """The prediction at timestep t as an affine map ``A x + offset``: see `Affine`.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> A, offset = law.affine("x0", 5)
        >>> np.allclose(np.ones((1, 2)) @ A.T + offset, law.mean_x0(np.ones((1, 2)), 5))
        True
        """
        gain, drift = self.gains(prediction, t)
        basis, d = self.data.basis, self.d
        outside = gain[-1] * (np.eye(d) - basis @ basis.T) if basis.shape[1] < d else 0.0
        return (basis * gain[:-1]) @ basis.T + outside, self.data.scaled(drift, self.data.mean)

    def gains(self, prediction: str, t: int) -> tuple[Float64, Float64]:
        """The prediction at timestep t as an affine map, ``gain x + drift mean`` along each eigenvector.

        Parameters
        ----------
        prediction : {"noise", "x0", "v", "velocity"}
            Which one.
        t : int
            Timestep.

        Returns
        -------
        gain, drift : (r + 1,) float64
            Along the r columns of ``data.basis``, and along everything orthogonal to them.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> gain, drift = law.gains("x0", 5)
        >>> len(gain), np.allclose(np.sort(gain[:2]), np.sort(np.diag(law.affine("x0", 5)[0])))
        (3, True)
        """
        alpha, sigma = self._levels(t)
        spectrum = self.data.spectrum
        variance = alpha**2 * spectrum + sigma**2
        if prediction == "noise":
            return sigma / variance, -sigma * alpha / variance
        if prediction == "x0":
            return alpha * spectrum / variance, sigma**2 / variance
        if prediction == "velocity":
            return (sigma - alpha * spectrum) / variance, -sigma * (alpha + sigma) / variance
        return alpha * sigma * (1 - spectrum) / variance, -sigma * self.schedule.power[t] / variance

    def _expect(self, space: Workspace, prediction: str, x: Array, t: int, out: Array) -> None:
        def make() -> RowMap:
            gain, drift = self.gains(prediction, t)
            return self.data.scaling(gain, self.data.scaled(drift, self.data.mean))

        space.be.map_rows(x, out, self._kept((prediction, t), self.data.basis.size, make))

    def _product(self, space: Workspace, prediction: str, x: Array, t: int, vectors: Array, out: Array) -> None:
        rows = (-1, self.d)
        space.be.map_rows(vectors.reshape(rows), out.reshape(rows), self._jacobian(prediction, t))

    def _jacobian(self, prediction: str, t: int) -> RowMap:
        def make() -> RowMap:
            return self.data.scaling(self.gains(prediction, t)[0], np.zeros(self.d))

        jacobian: RowMap = self._kept(("jacobian", prediction, t), self.data.basis.size, make)
        return jacobian

    def _log_density(self, space: Workspace, x: Array, t: int, out: Array) -> None:
        average(space, [(1.0, self)], None, x, t, space("x0", x.shape, x.dtype), out)

    def _whitening(self, t: int) -> tuple[RowMap, float]:
        """The map of x to residuals of law N(0, I), and the logarithm of the density where they are 0."""

        def make() -> tuple[RowMap, float]:
            law = self.moments(t)
            factors = 1 / np.sqrt(law.spectrum)
            top = -law.log_volume() - self.d / 2 * math.log(2 * math.pi)
            if law.basis.shape[1] < self.d:
                return law.scaling(factors, -law.scaled(factors, law.mean)), top
            left = law.basis * factors[:-1]
            return RowMap(left=left, offset=-(law.mean @ left)), top

        whitening: tuple[RowMap, float] = self._kept(("whitening", t), self.data.basis.size, make)
        return whitening

    def _colouring(self, prediction: str, t: int) -> RowMap:
        """The map of those residuals to a prediction."""

        def make() -> RowMap:
            law, gain = self.moments(t), self.gains(prediction, t)[0]
            factors = gain * np.sqrt(law.spectrum)
            centre = float(target(prediction, *self._levels(t))[1]) * self.data.mean
            if law.basis.shape[1] < self.d:
                return law.scaling(factors, centre)
            return RowMap(left=factors[:-1, None] * law.basis.T, offset=centre)

        colouring: RowMap = self._kept(("colouring", prediction, t), self.data.basis.size, make)
        return colouring


def average(
    space: Workspace,
    components: list[tuple[float, Gaussian]],
    prediction: str | None,
    x: Array,
    t: int,
    out: Array,
    log_density: Array | None,
) -> None:
    """Fill `out` (n, d) with a mixture's prediction, where one is named, and `log_density` (n,) where it is given."""
    be = space.be
    state = space("state", (len(x), 2), x.dtype)
    state[:, 0], state[:, 1], out[...] = -np.inf, 0, 0
    residuals = parts = space("residuals", x.shape, x.dtype)
    for probability, component in components:
        whitening, top = component._whitening(t)
        be.map_rows(x, residuals, whitening)
        if prediction is not None:
            parts = space("parts", x.shape, x.dtype)
            be.map_rows(residuals, parts, component._colouring(prediction, t))
        be.blend(out, state, parts, residuals, math.log(probability) + top)
    if log_density is not None:
        log_density[...] = state[:, 0] + np.log(state[:, 1])
