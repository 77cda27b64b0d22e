"""Exact denoisers, and the exact law of what a sampler makes of them.

Data with a known distribution has a known best denoiser, here on every backend. With `Gaussian` in the place of a
network every sampler is an affine map of its noise, so `exact_chain` follows the mean and covariance of the samples
without drawing one: the ground truth for samplers. `Mixture` and `Empirical` have no such chain; their densities and
conditional means are exact, and a deterministic sampler ends on the rows of `Empirical`'s data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, RowMap, backend_for
from fastdiff.covariance import check_covariance
from fastdiff.denoiser import Evaluator
from fastdiff.errors import ArgumentError, check_array, check_choice, check_float, check_timesteps, is_on_device
from fastdiff.samplers import Sampler, named
from fastdiff.schedule import PREDICTIONS, Schedule, target

Float64 = npt.NDArray[np.float64]

PLAN_VALUES = 1 << 22  # of maps of rows that a denoiser keeps for their next use
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
    """

    mean: Float64
    deviations: Float64
    basis: Float64
    rest: float = 0.0

    def __post_init__(self) -> None:
        for array in (self.mean, self.deviations, self.basis):
            _frozen(array)

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
        """Half the logarithm of the covariance's determinant."""
        d, r = self.basis.shape
        return float(np.log(self.deviations).sum()) + ((d - r) * math.log(self.rest) if r < d else 0.0)

    def scaled(self, factors: Float64, vector: Float64) -> Float64:
        """`vector` (d,) times factors (r + 1,), one for each column of `basis` and one for the rest."""
        rest = factors[-1] if self._is_thin else 0.0
        result: Float64 = self.basis @ ((factors[:-1] - rest) * (vector @ self.basis)) + rest * vector
        return result

    def scaling(self, factors: Float64, offset: Float64) -> RowMap:
        """The map of rows by `scaled`, with an offset (d,) added."""
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
            here, there = self._root_in(span), other._root_in(span)
            left, _, right = np.linalg.svd(there.T @ here)
            shape_gap, outside = here - there @ (left @ right), d - span.shape[1]
        rest_gap = math.sqrt(outside) * (self.rest - other.rest)
        return math.hypot(np.linalg.norm(self.mean - other.mean), np.linalg.norm(shape_gap), rest_gap)

    def _root_in(self, span: Float64) -> Float64:
        """A square root of the covariance within the span (d, k) of orthonormal columns that contains `basis`."""
        inner = span.T @ self.basis
        if not self._is_thin:
            return inner * self.deviations
        root: Float64 = (inner * (self.deviations - self.rest)) @ inner.T + self.rest * np.eye(len(inner))
        return root


class _Workspace:
    """Arrays of a backend by name, made anew where another shape is asked for."""

    def __init__(self, be: Backend) -> None:
        self.be = be
        self._arrays: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            array = self._arrays[name] = self.be.empty(shape, dtype)
        return array


class Exact(ABC):
    """What the exact denoisers share.

    At timestep t the state is ``x = alpha x0 + sigma noise``, with alpha the signal and sigma the noise of the
    schedule, and the best predictions are conditional expectations given x: ``E[x0 | x]``, ``E[noise | x]``, which is
    ``-sigma`` times the gradient of ``log_density``, and ``E[v | x] = alpha E[noise | x] - sigma E[x0 | x]``; the
    velocity is noise - x0. alpha^2 + sigma^2 need not be 1.

    Attributes
    ----------
    shape : tuple of int
        Shape of one sample.
    d : int
        Its size.
    schedule : Schedule
        The noise levels.
    T : int
        Number of timesteps of the schedule.
    prediction : {"noise", "x0", "v", "velocity"}
        What `predict` returns.
    data : Moments
        Mean and covariance of the data.
    """

    classes: int | None = None
    _mixes_steps = False  # whether `_expect` and `_log_density` take a t for each row

    def __init__(self, shape: tuple[int, ...], schedule: Schedule, prediction: str) -> None:
        if not isinstance(schedule, Schedule):
            raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule")
        self.prediction = check_choice("prediction", prediction, PREDICTIONS)
        self.schedule, self.T = schedule, schedule.T
        self.shape, self.d = shape, math.prod(shape)
        self._plans: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    @property
    @abstractmethod
    def data(self) -> Moments: ...

    def predict(self, x: Any, t: Any, labels: Any = None, *, backend: str | Backend = "auto") -> Array:
        """The best prediction at x, in the form named by `prediction`.

        Parameters
        ----------
        x : (n, ...) array of real numbers
            States; each row holds d values, in any shape.
        t : int or (n,) integers
            Timesteps.
        labels : optional
            Not used: there are no classes.
        backend : str or Backend, optional
            What computes. "auto": where x is, for an array on a GPU; the cpu backend for float32; NumPy in float64 for
            any other dtype.

        Returns
        -------
        (n, ...) float32 or float64
            Of the shape of x and of its kind. float64 where NumPy was given it, or chosen by "auto".

        Raises
        ------
        ArgumentError
            If x is not finite or its rows are not of size d, or t is out of range.
        """
        return self._conditional(self.prediction, x, t, backend)

    def mean_x0(self, x: Any, t: Any, *, backend: str | Backend = "auto") -> Array:
        """E[x0 | x_t = x], with arguments, result and errors as `predict`."""
        return self._conditional("x0", x, t, backend)

    def log_density(self, x: Any, t: Any, *, backend: str | Backend = "auto") -> Array:
        """log q_t(x), the log density of the states at timestep t.

        Parameters
        ----------
        x : (n, ...) array of real numbers
            States; each row holds d values.
        t : int or (n,) integers
            Timesteps.
        backend : str or Backend, optional
            As in `predict`.

        Returns
        -------
        (n,) float32 or float64
            In what `predict` would return.

        Raises
        ------
        ArgumentError
            As `predict`.
        """
        be, given, rows, steps = self._checked(x, t, backend)
        out = be.empty((len(rows),), rows.dtype)
        self._run(_Workspace(be), self._log_density, rows, steps, out)
        return out if is_on_device(given) else be.to_numpy(out)

    def moments(self, t: int) -> Moments:
        """Mean and covariance of x_t: alpha mean and ``alpha^2 cov + sigma^2 I``.

        Parameters
        ----------
        t : int
            Timestep.

        Returns
        -------
        Moments

        Raises
        ------
        ArgumentError
            If t is out of range.
        """
        alpha, sigma = self._levels(int(check_timesteps(t, self.T, 1)[0]))
        data = self.data
        spread, rest = np.hypot(alpha * data.deviations, sigma), math.hypot(alpha * data.rest, sigma)
        return Moments(alpha * data.mean, spread, data.basis, rest)

    def on(self, be: Backend, shape: tuple[int, ...] | None = None) -> Evaluator:
        """The prediction on flat states (n, d) of a backend: see `Denoiser`."""
        return _Expects(self, be)

    @abstractmethod
    def _expect(self, space: _Workspace, prediction: str, x: Array, t: Any, out: Array) -> None:
        """Fill `out` (n, d) with a prediction at x (n, d), n > 0."""

    @abstractmethod
    def _log_density(self, space: _Workspace, x: Array, t: Any, out: Array) -> None:
        """Fill `out` (n,) with the log density at x (n, d), n > 0."""

    def _conditional(self, prediction: str, x: Any, t: Any, backend: str | Backend) -> Array:
        be, given, rows, steps = self._checked(x, t, backend)
        out = be.empty(rows.shape, rows.dtype)

        def expect(space: _Workspace, x: Array, t: Any, out: Array) -> None:
            self._expect(space, prediction, x, t, out)

        self._run(_Workspace(be), expect, rows, steps, out)
        out = out.reshape(given.shape)
        return out if is_on_device(given) else be.to_numpy(out)

    def _checked(self, x: Any, t: Any, backend: str | Backend) -> tuple[Backend, Array, Array, Array]:
        """The backend, x, its rows (n, d) as the backend takes them, and their timesteps on the host."""
        given = check_array("x", x, min_ndim=1)
        if math.prod(given.shape[1:]) != self.d:
            raise ArgumentError("x", f"shape {given.shape}", f"rows of {self.d} values")
        kind = None
        if isinstance(backend, str) and backend == "auto" and not is_on_device(given) and given.dtype != np.float32:
            backend, kind = "numpy", np.dtype(np.float64)
        be = backend_for(backend, x=given, t=t)
        kind = be.asarray(given[:0], kind).dtype
        rows = be.asarray(check_array("x", given, dtype=kind), kind).reshape(len(given), self.d)
        steps = check_timesteps(t, self.T, len(rows))
        return be, given, rows, be.to_numpy(steps) if is_on_device(steps) else steps

    def _run(self, space: _Workspace, work: Callable[..., None], x: Array, t: Array, out: Array) -> None:
        """``work(space, x, t, out)``, once for the rows of each timestep where it takes but one."""
        if len(x) == 0:
            return
        if (t == t[0]).all():
            work(space, x, int(t[0]), out)
        elif self._mixes_steps:
            work(space, x, t, out)
        else:
            for step in np.unique(t):
                rows = space.be.asarray(np.flatnonzero(t == step), np.int64)
                part = space.be.empty((len(rows), *out.shape[1:]), out.dtype)
                work(space, x[rows], int(step), part)
                out[rows] = part

    def _levels(self, t: Any) -> tuple[Any, Any]:
        return self.schedule.signal[t], self.schedule.noise[t]

    def _kept(self, key: Any, values: int, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key, of so many values; at most `PLAN_VALUES` of them are kept."""
        found = self._plans.get(key)
        if found is None:
            if (len(self._plans) + 1) * values > PLAN_VALUES:
                self._plans.clear()
            found = self._plans[key] = make()
        return found


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
    """

    def __init__(
        self, mean: npt.ArrayLike, cov: npt.ArrayLike, schedule: Schedule, *, prediction: str = "noise"
    ) -> None:
        self._begin(mean, schedule, prediction)
        law = check_covariance("cov", cov, self.d)
        self.cov = _frozen(law.cov)
        self._data = Moments(self.mean.reshape(-1), np.sqrt(law.spectrum), law.basis)

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
        """
        self = cls.__new__(cls)
        self._begin(mean, schedule, prediction)
        columns = check_array("factor", factor, shape=(self.d, None), dtype=np.float64)
        rest = math.sqrt(check_float("variance", variance, low=0))
        basis, deviations, _ = np.linalg.svd(columns, full_matrices=False)
        self._data = Moments(self.mean.reshape(-1), np.hypot(deviations, rest), basis, rest)
        return self

    def _begin(self, mean: npt.ArrayLike, schedule: Schedule, prediction: str) -> None:
        self.mean = _frozen(check_array("mean", mean, min_ndim=1, dtype=np.float64).copy())
        if self.mean.size == 0:
            raise ArgumentError("mean", f"shape {self.mean.shape}", "at least one value")
        super().__init__(self.mean.shape, schedule, prediction)

    @property
    def data(self) -> Moments:
        return self._data

    @cached_property
    def cov(self) -> Float64:
        return _frozen(self.data.cov)

    def affine(self, prediction: str, t: int) -> tuple[Float64, Float64]:
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

    def _expect(self, space: _Workspace, prediction: str, x: Array, t: int, out: Array) -> None:
        def make() -> RowMap:
            gain, drift = self.affine(prediction, t)
            return self.data.scaling(gain, self.data.scaled(drift, self.data.mean))

        space.be.map_rows(x, out, self._kept((prediction, t), self.data.basis.size, make))

    def _log_density(self, space: _Workspace, x: Array, t: int, out: Array) -> None:
        _average(space, [(1.0, self)], None, x, t, space("x0", x.shape, x.dtype), out)

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
            law, gain = self.moments(t), self.affine(prediction, t)[0]
            factors = gain * np.sqrt(law.spectrum)
            centre = float(target(prediction, *self._levels(t))[1]) * self.data.mean
            if law.basis.shape[1] < self.d:
                return law.scaling(factors, centre)
            return RowMap(left=factors[:-1, None] * law.basis.T, offset=centre)

        colouring: RowMap = self._kept(("colouring", prediction, t), self.data.basis.size, make)
        return colouring


class Mixture(Exact):
    """The exact denoiser of data drawn from one of K Gaussians, component k with probability ``weights[k]``.

    The predictions are those of the components, weighted by how likely each is to have made x::

        r_k(x) = weights[k] N(x; alpha mean_k, V_k) / sum over l of weights[l] N(x; alpha mean_l, V_l)

    which is a running average relative to the greatest term so far: no weight underflows.

    Parameters
    ----------
    weights : (K,) array_like
        Probabilities: not negative, of sum 1.
    means : (K, ...) array_like
        The components' means, each of the shape of one sample; d is its size.
    covs : (K, d, d) array_like
        Their covariances, as of `Gaussian`.
    schedule : Schedule
        The noise levels.
    prediction : {"noise", "x0", "v", "velocity"}, optional
        What `predict` returns.

    Attributes
    ----------
    weights : (K,) float64, read-only
    components : tuple of K Gaussian
    data : Moments
        Mean and covariance of the data; made when it is asked for.
    shape, d, schedule, T, prediction
        As of `Exact`.

    Raises
    ------
    ArgumentError
        If shapes disagree, values are not finite, weights are negative or do not sum to 1, or a covariance is not
        symmetric and positive semi-definite.
    """

    def __init__(
        self,
        weights: npt.ArrayLike,
        means: npt.ArrayLike,
        covs: npt.ArrayLike,
        schedule: Schedule,
        *,
        prediction: str = "noise",
    ) -> None:
        centres = check_array("means", means, min_ndim=2, dtype=np.float64)
        if centres.size == 0:
            raise ArgumentError("means", f"shape {centres.shape}", "at least one mean of at least one value")
        d = math.prod(centres.shape[1:])
        spreads = check_array("covs", covs, shape=(len(centres), d, d))
        components = []
        for k, (mean, cov) in enumerate(zip(centres, spreads, strict=True)):
            try:
                components.append(Gaussian(mean, cov, schedule, prediction=prediction))
            except ArgumentError as error:
                if error.argument != "cov":
                    raise
                raise ArgumentError(f"covs[{k}]", error.got, error.wants) from None
        self._begin(weights, components)

    @classmethod
    def of(cls, weights: npt.ArrayLike, components: Sequence[Gaussian]) -> Self:
        """The mixture of given components, for instance of low rank.

        Parameters
        ----------
        weights : (K,) array_like
            Probabilities.
        components : sequence of K Gaussian
            Of one shape, schedule and prediction, which become the mixture's.

        Returns
        -------
        Mixture

        Raises
        ------
        ArgumentError
            If the components disagree, or a weight is negative, or they do not sum to 1.
        """
        self = cls.__new__(cls)
        for k, component in enumerate(components):
            if not isinstance(component, Gaussian):
                raise ArgumentError(f"components[{k}]", type(component).__name__, "a fastdiff.denoisers.Gaussian")
            for name in ("shape", "schedule", "prediction"):
                got, first = getattr(component, name), getattr(components[0], name)
                if got != first:
                    raise ArgumentError(f"components[{k}]", f"{name} {got!r}", f"{first!r}, that of components[0]")
        self._begin(weights, components)
        return self

    def _begin(self, weights: npt.ArrayLike, components: Sequence[Gaussian]) -> None:
        if not components:
            raise ArgumentError("components", "none", "at least one")
        given = check_array("weights", weights, shape=(len(components),), dtype=np.float64)
        if given.min() < 0:
            raise ArgumentError("weights", f"{given.min():.3g}", "no negative weight")
        if abs(given.sum() - 1) > WEIGHTS_SLACK:
            raise ArgumentError("weights", f"a sum of {given.sum():.9g}", "a sum of 1")
        first = components[0]
        super().__init__(first.shape, first.schedule, first.prediction)
        self.weights = _frozen(given / given.sum())
        self.components = tuple(components)

    @cached_property
    def data(self) -> Moments:
        means = np.array([component.data.mean for component in self.components])
        mean = self.weights @ means
        scaled = np.sqrt(self.weights)[:, None] * (means - mean)
        pairs = zip(self.weights, self.components, strict=True)
        cov = sum((w * component.cov for w, component in pairs), start=scaled.T @ scaled)
        spectrum, basis = np.linalg.eigh(cov)
        return Moments(mean, np.sqrt(np.maximum(spectrum, 0.0)), basis)

    def _expect(self, space: _Workspace, prediction: str, x: Array, t: int, out: Array) -> None:
        _average(space, self._weighted(), prediction, x, t, out, None)

    def _log_density(self, space: _Workspace, x: Array, t: int, out: Array) -> None:
        _average(space, self._weighted(), None, x, t, space("x0", x.shape, x.dtype), out)

    def _weighted(self) -> list[tuple[float, Gaussian]]:
        return [(float(w), g) for w, g in zip(self.weights, self.components, strict=True) if w > 0]


def _average(
    space: _Workspace,
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
    prediction : {"noise", "x0", "v", "velocity"}, optional
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
        return _frozen(self._rows.reshape(-1, *self.shape))

    @cached_property
    def data(self) -> Moments:
        rows = self._rows.astype(np.float64)
        mean = rows.mean(axis=0)
        _, deviations, basis = np.linalg.svd((rows - mean) / math.sqrt(len(rows)), full_matrices=False)
        return Moments(mean, deviations, basis.T)

    def _expect(self, space: _Workspace, prediction: str, x: Array, t: Any, out: Array) -> None:
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

    def _log_density(self, space: _Workspace, x: Array, t: Any, out: Array) -> None:
        self._posterior(space, x, t, space("x0", x.shape, x.dtype), out)
        constant = -math.log(len(self._rows)) - self.d * np.log(math.sqrt(2 * math.pi) * self.schedule.noise[t])
        out += space.be.asarray(constant, x.dtype) if np.ndim(t) else float(constant)

    def _posterior(self, space: _Workspace, x: Array, t: Any, out: Array, log_sum: Array) -> None:
        be = space.be
        data = self._kept((be, x.dtype), self._rows.size, lambda: be.asarray(self._rows, x.dtype))
        signal, noise = (np.broadcast_to(level, len(x)) for level in self._levels(t))
        be.posterior_mean(x, data, signal, noise, out, log_sum)


@dataclass(frozen=True, eq=False)
class ExactChain:
    """The law of what a sampler makes of a Gaussian denoiser, row by row.

    Attributes
    ----------
    gaussian : Gaussian
        The denoiser.
    trace : tuple of R + 1 Moments
        The law of the state: ``trace[0]`` is the N(0, I) it starts from, ``trace[i]`` the state after i
        rows, as in the path of a trajectory. Each has ``.mean``, ``.cov`` and ``.w2(other)``.
    """

    gaussian: Gaussian
    trace: tuple[Moments, ...]

    @property
    def mean(self) -> Float64:
        """(d,) float64: the mean of the finished samples."""
        return self.trace[-1].mean

    @property
    def cov(self) -> Float64:
        """(d, d) float64: the covariance of the finished samples."""
        return self.trace[-1].cov

    def w2(self, gaussian: Gaussian | None = None) -> float:
        """The 2-Wasserstein distance from the finished samples to the data.

        Parameters
        ----------
        gaussian : Gaussian, optional
            Whose data; by default the denoiser's own.

        Returns
        -------
        float

        Raises
        ------
        ArgumentError
            If `gaussian` is none, or is of another size.
        """
        target = self.gaussian if gaussian is None else gaussian
        if not isinstance(target, Gaussian):
            raise ArgumentError("gaussian", type(target).__name__, "a fastdiff.denoisers.Gaussian")
        if target.d != self.gaussian.d:
            raise ArgumentError("gaussian", f"{target.d} dimensions", f"{self.gaussian.d} dimensions")
        return self.trace[-1].w2(target.data)


def exact_chain(gaussian: Gaussian, sampler: Sampler) -> ExactChain:
    """Follow the exact mean and covariance of a sampler's state, started from N(0, I).

    With an affine denoiser each row maps the pair (x, x0_previous) to the next by an affine map plus
    independent noise, and all of it is diagonal in the eigenbasis of the data's covariance: O(d) a row.
    Instead of the 2 x 2 covariance of the pair its triangular factor is carried, ``x = f w1`` and
    ``x0 = g w1 + h w2`` with independent w1, w2 of unit variance, so that no variance is ever a difference.

    Parameters
    ----------
    gaussian : Gaussian
        The denoiser.
    sampler : Sampler
        With the same schedule and prediction, and no clip, which is not affine.

    Returns
    -------
    ExactChain

    Raises
    ------
    ArgumentError
        If the sampler clips, or schedule or prediction differ.
    """
    if not isinstance(gaussian, Gaussian):
        raise ArgumentError("gaussian", type(gaussian).__name__, "a fastdiff.denoisers.Gaussian")
    if not isinstance(sampler, Sampler):
        raise ArgumentError("sampler", type(sampler).__name__, "a fastdiff.samplers.Sampler")
    if sampler.clip is not None:
        raise ArgumentError("sampler", f"clip {sampler.clip}", "clip None: a clipped chain is not Gaussian")
    if sampler.schedule != gaussian.schedule:
        raise ArgumentError("sampler", repr(sampler.schedule), f"the denoiser's schedule, {gaussian.schedule!r}")
    if sampler.prediction != gaussian.prediction:
        raise ArgumentError("sampler", f"prediction {sampler.prediction!r}", f"the denoiser's, {gaussian.prediction!r}")
    data = gaussian.data
    # A coordinate for each eigenvector, and one for what the mean has outside their span, where the variance is `rest`.
    along = data.mean @ data.basis
    axes = np.column_stack([data.basis, data.mean - data.basis @ along])
    centre = np.append(along, 1.0)
    mean, mean_x0 = np.zeros_like(centre), np.zeros_like(centre)
    f, g, h = np.ones_like(centre), np.zeros_like(centre), np.zeros_like(centre)
    trace = [Moments(axes @ mean, f[:-1], data.basis, f[-1])]
    for row in sampler.rows:
        gain, drift = gaussian.affine(gaussian.prediction, row.t)
        offset = drift * centre
        x0_gain, x0_offset = row.p + row.q * gain, row.q * offset
        x_gain = row.a + row.b * x0_gain + row.e * gain
        x_offset = row.b * x0_offset + row.e * offset
        mean, mean_x0 = x_gain * mean + row.c1 * mean_x0 + x_offset, x0_gain * mean + x0_offset
        # x' = shared w1 + fresh w, with w independent of w1; x0 = spread w1.
        shared = x_gain * f + row.c1 * g
        fresh = np.hypot(row.c1 * h, row.s)
        spread = x0_gain * f
        f = np.hypot(shared, fresh)
        along = np.divide(shared, f, out=np.zeros_like(f), where=f > 0)
        across = np.divide(fresh, f, out=np.ones_like(f), where=f > 0)
        g, h = spread * along, spread * across
        trace.append(Moments(axes @ mean, f[:-1], data.basis, f[-1]))
    return ExactChain(gaussian, tuple(trace))


def convergence(
    gaussian: Gaussian, sampler: str | Callable[[int], Sampler], steps: Sequence[int] | npt.NDArray[Any]
) -> Float64:
    """Error against steps: the distance from a sampler's samples to the data, for several numbers of rows.

    A sampler of order p has errors that fall like ``steps ** -p``.

    Parameters
    ----------
    gaussian : Gaussian
        The denoiser.
    sampler : {"ddpm", "ddim", "dpmpp_2m"} or callable
        A name stands for the sampler with its defaults; a callable returns a table for a number of steps.
    steps : sequence of int
        Numbers of steps.

    Returns
    -------
    (len(steps),) float64
        2-Wasserstein distances, exactly (`exact_chain`).

    Raises
    ------
    ArgumentError
        As `exact_chain` and `fastdiff.samplers.named`.

    Examples
    --------
    >>> gaussian = Gaussian(np.zeros(2), np.diag([4.0, 0.01]), Schedule.linear(1000))
    >>> distances = convergence(gaussian, "dpmpp_2m", [5, 10, 20, 40])
    """

    def table(n: int) -> Sampler:
        if callable(sampler):
            return sampler(n)
        return named(sampler, gaussian.schedule, n, prediction=gaussian.prediction)

    return np.array([exact_chain(gaussian, table(int(n))).w2() for n in steps])


class _Expects(Evaluator):
    """An exact denoiser on a backend."""

    def __init__(self, denoiser: Exact, be: Backend) -> None:
        self.be, self.denoiser, self._space = be, denoiser, _Workspace(be)

    def evaluate(self, x: Array, t: int, labels: Array = None) -> Array:
        out = self._space("out", x.shape, x.dtype)
        if len(x):
            self.denoiser._expect(self._space, self.denoiser.prediction, x, t, out)
        return out


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array
