"""Exact denoisers, and the exact law of what a sampler makes of them.

Data with a known distribution has a known best denoiser. With `Gaussian` in the place of a network every
sampler is an affine map of its noise, so `exact_chain` follows the mean and covariance of the samples without
drawing one: the ground truth for samplers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_choice, check_timesteps
from fastdiff.samplers import PREDICTIONS, Sampler
from fastdiff.schedule import Array, Schedule


class Gaussian:
    """The exact denoiser of data drawn from N(mean, cov).

    At timestep t the state is ``x = alpha x0 + sigma noise``, of law N(alpha mean, V) with
    ``V = alpha^2 cov + sigma^2 I``, and the best predictions are the conditional expectations given x::

        E[noise | x] = sigma V^-1 (x - alpha mean)
        E[x0 | x]    = mean + alpha cov V^-1 (x - alpha mean)
        E[v | x]     = alpha E[noise | x] - sigma E[x0 | x]

    evaluated in the eigenbasis of `cov`, where V is diagonal.

    Parameters
    ----------
    mean : array_like
        Mean of the data, of the shape of one sample; d is its size.
    cov : (d, d) array_like
        Covariance of the flattened sample: symmetric, positive semi-definite, possibly singular.
    schedule : Schedule
        The noise levels.
    prediction : {"noise", "x0", "v"}, optional
        What `predict` returns.

    Attributes
    ----------
    mean : float64 of shape `shape`, read-only
    cov : (d, d) float64, read-only
    data : Moments
        The law of the data, with the eigenbasis.
    shape : tuple of int
        Shape of one sample.
    d : int
        Its size.
    T : int
        Number of timesteps of the schedule.
    schedule, prediction
        As given.

    Raises
    ------
    ArgumentError
        If shapes disagree, values are not finite, or `cov` is not symmetric and positive semi-definite to
        within rounding of the dtype it came in.
    """

    def __init__(
        self, mean: npt.ArrayLike, cov: npt.ArrayLike, schedule: Schedule, *, prediction: str = "noise"
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule")
        self.prediction = check_choice("prediction", prediction, PREDICTIONS)
        self.schedule = schedule
        self.T = schedule.T
        self.mean = _frozen(check_array("mean", mean, min_ndim=1, dtype=np.float64).copy())
        self.shape = self.mean.shape
        self.d = d = self.mean.size
        if d == 0:
            raise ArgumentError("mean", f"shape {self.shape}", "at least one value")
        given = check_array("cov", cov, shape=(d, d))
        slack = np.sqrt(np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps)
        c = given.astype(np.float64)
        skew = np.abs(c - c.T).max()
        if skew > slack * np.abs(c).max():
            raise ArgumentError("cov", f"entries that differ by {skew:.3g} from their mirror", "a symmetric matrix")
        self.cov = _frozen((c + c.T) / 2)
        spectrum, basis = np.linalg.eigh(self.cov)
        if spectrum[0] < -slack * max(spectrum[-1], 0.0):
            raise ArgumentError("cov", f"an eigenvalue of {spectrum[0]:.3g}", "no negative eigenvalue")
        self.data = Moments(self.mean.reshape(-1), np.sqrt(np.maximum(spectrum, 0.0)), basis)

    def predict(self, x: npt.ArrayLike, t: Any, labels: Any = None) -> npt.NDArray[Any]:
        """The best prediction at x, in the form named by `prediction`.

        Parameters
        ----------
        x : (n, ...) array_like of real numbers
            States; each row holds d values, in any shape.
        t : int or (n,) integers
            Timesteps.
        labels : optional
            Not used: Gaussian data has no classes.

        Returns
        -------
        (n, ...) float32 or float64
            As x; float64 for any other dtype. Computed in float64.

        Raises
        ------
        ArgumentError
            If x is not finite or its rows are not of size d, or t is out of range.
        """
        return self._apply(self.prediction, x, t)

    def mean_x0(self, x: npt.ArrayLike, t: Any) -> npt.NDArray[Any]:
        """E[x0 | x_t = x], with arguments, result and errors as `predict`."""
        return self._apply("x0", x, t)

    def log_density(self, x: npt.ArrayLike, t: Any) -> Array:
        """log q_t(x), the log density of the states at timestep t, exactly.

        Parameters
        ----------
        x : (n, ...) array_like of real numbers
            States; each row holds d values.
        t : int or (n,) integers
            Timesteps.

        Returns
        -------
        (n,) float64

        Raises
        ------
        ArgumentError
            As `predict`.
        """
        rows, t = self._checked(x, t)
        signal, noise = self._levels(t)
        variance = (signal * self.data.deviations) ** 2 + noise**2
        u = (rows - signal * self.data.mean) @ self.data.basis
        log_volume = np.log(2 * np.pi * variance).sum(axis=-1)
        density: Array = -0.5 * ((u**2 / variance).sum(axis=1) + log_volume)
        return density

    def affine(self, prediction: str, t: Any) -> tuple[Array, Array]:
        """The prediction at timestep t as an affine map in the eigenbasis: ``gain * y + offset``.

        Parameters
        ----------
        prediction : {"noise", "x0", "v"}
            Which one.
        t : int or (n,) int64
            Timesteps.

        Returns
        -------
        gain, offset : (d,) or (n, d) float64
            y is ``x @ data.basis`` for a flattened row x, and so is the result.
        """
        signal, noise = self._levels(t)
        spectrum, mean = self.data.deviations**2, self.data.mean @ self.data.basis
        variance = signal**2 * spectrum + noise**2
        if prediction == "noise":
            return noise / variance, -noise * signal * mean / variance
        if prediction == "x0":
            return signal * spectrum / variance, noise**2 * mean / variance
        return signal * noise * (1 - spectrum) / variance, -noise * mean / variance

    def _apply(self, prediction: str, x: npt.ArrayLike, t: Any) -> npt.NDArray[Any]:
        rows, t = self._checked(x, t)
        gain, offset = self.affine(prediction, t)
        out = (gain * (rows @ self.data.basis) + offset) @ self.data.basis.T
        given = np.asarray(x)
        dtype = np.float32 if given.dtype == np.float32 else np.float64
        return np.asarray(out.reshape(given.shape), dtype=dtype)

    def _checked(self, x: npt.ArrayLike, t: Any) -> tuple[Array, npt.NDArray[np.int64]]:
        array = check_array("x", x, min_ndim=1, dtype=np.float64)
        if int(np.prod(array.shape[1:])) != self.d:
            raise ArgumentError("x", f"shape {array.shape}", f"rows of {self.d} values")
        return array.reshape(len(array), self.d), check_timesteps(t, self.T, len(array))

    def _levels(self, t: Any) -> tuple[Array, Array]:
        signal, noise = self.schedule.signal, self.schedule.noise
        return np.expand_dims(signal[t], -1), np.expand_dims(noise[t], -1)


@dataclass(frozen=True, eq=False)
class Moments:
    """A mean and a covariance, the latter by its eigenvectors and the standard deviations along them.

    Attributes
    ----------
    mean : (d,) float64
    deviations : (d,) float64
        Standard deviation along each column of `basis`.
    basis : (d, d) float64
        Orthonormal columns.
    """

    mean: Array
    deviations: Array
    basis: Array

    def __post_init__(self) -> None:
        for array in (self.mean, self.deviations, self.basis):
            _frozen(array)

    @property
    def cov(self) -> Array:
        """(d, d) float64: ``basis diag(deviations^2) basis^T``."""
        factor = self.basis * self.deviations
        return np.asarray(factor @ factor.T)

    def w2(self, other: Moments) -> float:
        """The 2-Wasserstein distance to another Gaussian (Givens & Shortt 1984, proposition 7).

        ``W2^2 = |mean - mean'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)``. The trace cancels when C is close
        to C', so it is computed as a sum of squares: in a shared eigenbasis
        ``sum (deviation - deviation')^2``, else ``min over orthogonal U of |F - F' U|^2`` with C = F F^T and
        C' = F' F'^T (Bhatia, Jain & Lim 2019, theorem 1), where U is the polar factor of F'^T F.

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
        if np.array_equal(self.basis, other.basis):
            shape_gap = self.deviations - other.deviations
        else:
            here, there = self.basis * self.deviations, other.basis * other.deviations
            left, _, right = np.linalg.svd(there.T @ here)
            shape_gap = here - there @ (left @ right)
        return float(np.hypot(np.linalg.norm(self.mean - other.mean), np.linalg.norm(shape_gap)))


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
    def mean(self) -> Array:
        """(d,) float64: the mean of the finished samples."""
        return self.trace[-1].mean

    @property
    def cov(self) -> Array:
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
    basis = gaussian.data.basis
    mean, mean_x0 = np.zeros(gaussian.d), np.zeros(gaussian.d)
    f, g, h = np.ones(gaussian.d), np.zeros(gaussian.d), np.zeros(gaussian.d)
    trace = [Moments(basis @ mean, f, basis)]
    for row in sampler.rows:
        gain, offset = gaussian.affine(gaussian.prediction, row.t)
        x0_gain, x0_offset = row.p + row.q * gain, row.q * offset
        x_gain = row.a + row.b * x0_gain + row.e * gain
        x_offset = row.b * x0_offset + row.e * offset
        mean, mean_x0 = x_gain * mean + row.c * mean_x0 + x_offset, x0_gain * mean + x0_offset
        # x' = shared w1 + fresh w, with w independent of w1; x0 = spread w1.
        shared = x_gain * f + row.c * g
        fresh = np.hypot(row.c * h, row.s)
        spread = x0_gain * f
        f = np.hypot(shared, fresh)
        along = np.divide(shared, f, out=np.zeros_like(f), where=f > 0)
        across = np.divide(fresh, f, out=np.ones_like(f), where=f > 0)
        g, h = spread * along, spread * across
        trace.append(Moments(basis @ mean, f, basis))
    return ExactChain(gaussian, tuple(trace))


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array
