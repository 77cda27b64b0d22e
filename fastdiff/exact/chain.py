"""The exact law of what a sampler makes of a Gaussian, and how it nears the data with more steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, as_named, check_array, check_int, shown
from fastdiff.exact.gaussian import Gaussian
from fastdiff.exact.moments import Float64, Moments
from fastdiff.samplers import Sampler, named
from fastdiff.schedule import Schedule


@runtime_checkable
class Affine(Protocol):
    """A denoiser that is an affine map at every timestep, such as a conditioned `Gaussian`.

    Attributes
    ----------
    shape : tuple of int
        Shape of one sample, d its size.
    schedule : Schedule
    prediction : {"noise", "x0", "v"}

    Examples
    --------
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.eye(2), fd.Schedule.cosine(20))
    >>> isinstance(law, fd.denoisers.Affine), isinstance(fd.MLP(2), fd.denoisers.Affine)
    (True, False)
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def prediction(self) -> str: ...

    def affine(self, prediction: str, t: int) -> tuple[Float64, Float64]:
        """Return A (d, d) and offset (d,) of a prediction ``A x + offset`` of flat states at a timestep.

        Examples
        --------
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.eye(2), fd.Schedule.cosine(20))
        >>> A, offset = law.affine("x0", 9)
        >>> np.allclose(A, law.schedule.signal[9] * np.eye(2)), offset.tolist()
        (True, [0.0, 0.0])
        """


@dataclass(frozen=True, eq=False)
class ExactChain:
    """The law of what a sampler makes of a Gaussian or another affine denoiser, row by row.

    Attributes
    ----------
    gaussian : Gaussian or Affine
        The denoiser.
    trace : tuple of R + 1 Moments
        The law of the state: ``trace[0]`` is the N(0, I) it starts from, ``trace[i]`` the state after i
        rows, as in the path of a trajectory. Each has ``.mean``, ``.cov`` and ``.w2(other)``.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> chain = fd.denoisers.exact_chain(law, fd.samplers.ddim(s, 10))
    >>> len(chain.trace), [round(float(one.w2(law.data)), 2) for one in chain.trace[::5]]  # nearer and nearer
    (11, [1.0, 0.62, 0.31])
    """

    gaussian: Affine
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
            Whose data; by default the denoiser's own, which a Gaussian has.

        Returns
        -------
        float

        Raises
        ------
        ArgumentError
            If it is no Gaussian, or is of another size.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> few, many = (fd.denoisers.exact_chain(law, fd.samplers.ddim(s, n)).w2() for n in (5, 20))
        >>> few > many > 0
        True
        """
        target = self.gaussian if gaussian is None else gaussian
        if not isinstance(target, Gaussian):
            raise ArgumentError("gaussian", type(target).__name__, "a fastdiff.denoisers.Gaussian")
        if target.d != self.mean.size:
            raise ArgumentError("gaussian", f"{target.d} dimensions", f"{self.mean.size} dimensions")
        return self.trace[-1].w2(target.data)


def exact_chain(gaussian: Affine, sampler: Sampler) -> ExactChain:
    """Follow the exact mean and covariance of a sampler's state, started from N(0, I).

    With an affine denoiser each row maps the state (x, m1, .., mK) of a table that reaches back K rows to the next by
    an affine map plus independent noise, and all of it is diagonal in the eigenbasis of the data's covariance: O(d) a
    row.
    Instead of the covariance of the state its triangular factor is carried, x = F_00 w_0, m1 = F_10 w_0 + F_11 w_1, ..
    with independent w of unit variance, so that no variance is ever a difference.

    Parameters
    ----------
    gaussian : Gaussian or Affine
        The denoiser. One that is no `Gaussian` is followed with dense matrices, O(d^3) a row.
    sampler : Sampler
        With the same schedule and prediction, and no clip, which is not affine.

    Returns
    -------
    ExactChain

    Raises
    ------
    ArgumentError
        If the sampler clips or scales its noise by a learned variance, or schedule or prediction differ.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> chain = fd.denoisers.exact_chain(law, fd.samplers.ddim(s, 10))
    >>> chain.mean.tolist(), bool(chain.w2() < 0.5)
    ([0.0, 0.0], True)
    """
    if not isinstance(gaussian, Affine):
        wants = "a fastdiff.denoisers.Gaussian, or another denoiser with .affine(prediction, t)"
        raise ArgumentError("gaussian", type(gaussian).__name__, wants)
    if not isinstance(sampler, Sampler):
        raise ArgumentError("sampler", type(sampler).__name__, "a fastdiff.samplers.Sampler")
    if sampler.clip is not None:
        raise ArgumentError("sampler", f"clip {sampler.clip}", "clip None: a clipped chain is not Gaussian")
    if any(row.r != 0 for row in sampler.rows):
        raise ArgumentError("sampler", "a learned variance", "r = 0 in every row: noise of a known variance")
    if sampler.schedule != gaussian.schedule:
        raise ArgumentError("sampler", shown(sampler.schedule), f"the denoiser's schedule, {gaussian.schedule!r}")
    if sampler.prediction != gaussian.prediction:
        raise ArgumentError("sampler", f"prediction {sampler.prediction!r}", f"the denoiser's, {gaussian.prediction!r}")
    if not isinstance(gaussian, Gaussian):
        return ExactChain(gaussian, _dense_moments(gaussian, sampler))
    data = gaussian.data
    # A coordinate for each eigenvector, and one for what the mean has outside their span, where the variance is `rest`.
    along = data.mean @ data.basis
    axes = np.column_stack([data.basis, data.mean - data.basis @ along])
    centre = np.append(along, 1.0)
    depth = sampler.depth
    mean = np.zeros((depth + 1, len(centre)))  # of x, m1, .., mK
    factor = np.zeros((depth + 1, depth + 1, len(centre)))
    factor[0, 0] = 1.0
    trace = [Moments(axes @ mean[0], factor[0, 0, :-1], data.basis, factor[0, 0, -1])]
    for row in sampler.rows:
        gain = offset = np.zeros_like(centre)
        if row.evaluates:
            gain, drift = gaussian.gains(gaussian.prediction, row.t)
            offset = drift * centre
        m_gain, m_offset = row.p + row.q * gain, row.q * offset
        x_gain, x_offset = row.a + row.b * m_gain + row.e * gain, row.b * m_offset + row.e * offset
        back = np.array(row[5 : 5 + depth])  # c1, c2, ..
        state, wide = mean.copy(), np.zeros((depth + 1, depth + 2, len(centre)))
        mean[0] = x_gain * state[0] + back @ state[1:] + x_offset
        wide[0, :-1] = x_gain * factor[0] + np.tensordot(back, factor[1:], 1)
        wide[0, -1] = row.s
        if row.evaluates and depth:
            mean[1], mean[2:] = m_gain * state[0] + m_offset, state[1:-1]
            wide[1, :-1], wide[2:, :-1] = m_gain * factor[0], factor[1:-1]
        else:
            wide[1:, :-1] = factor[1:]
        factor = _triangular(wide)
        trace.append(Moments(axes @ mean[0], factor[0, 0, :-1], data.basis, factor[0, 0, -1]))
    return ExactChain(gaussian, tuple(trace))


def _triangular(wide: Float64) -> Float64:
    """Lower triangular L (n, n, d), its diagonal at least 0, with L L^T = W W^T for each of the d W (n, n + 1, d).

    Each entry above the diagonal is turned into it; W is overwritten.
    """
    for i in range(len(wide)):
        for j in range(i + 1, wide.shape[1]):
            length = np.hypot(wide[i, i], wide[i, j])
            along = np.divide(wide[i, i], length, out=np.ones_like(length), where=length > 0)
            across = np.divide(wide[i, j], length, out=np.zeros_like(length), where=length > 0)
            kept, other = wide[i:, i].copy(), wide[i:, j].copy()
            wide[i:, i] = along * kept + across * other
            wide[i:, j] = along * other - across * kept
            wide[i, i], wide[i, j] = length, 0.0
    return wide[:, :-1]


def convergence(
    gaussian: Gaussian, sampler: str | Callable[[int], Sampler], steps: Sequence[int] | npt.NDArray[Any]
) -> Float64:
    """Error against steps: the distance from a sampler's samples to the data, for several numbers of rows.

    A sampler of order p has errors that fall like ``steps ** -p``.

    Parameters
    ----------
    gaussian : Gaussian
        The denoiser.
    sampler : str or callable
        A name (`fastdiff.samplers.names`) stands for the sampler with its defaults; a callable returns a table for a
        number of steps.
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
    >>> gaussian = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 0.01]), fd.Schedule.linear(1000))
    >>> distances = fd.denoisers.convergence(gaussian, "dpmpp_2m", [5, 10, 20, 40])
    """

    if not isinstance(gaussian, Affine):
        raise ArgumentError("gaussian", type(gaussian).__name__, "a Gaussian of fastdiff.denoisers")
    numbers = check_array("steps", steps, shape=(None,)).tolist()

    def table(n: int) -> Sampler:
        if callable(sampler):
            return sampler(n)
        with as_named(name="sampler"):
            return named(sampler, gaussian.schedule, n, prediction=gaussian.prediction)

    return np.array([exact_chain(gaussian, table(check_int("steps", n, low=1))).w2() for n in numbers])


def _dense_moments(denoiser: Affine, sampler: Sampler) -> tuple[Moments, ...]:
    """The law of the state before and after each row, of a denoiser whose maps share no eigenvectors.

    Mean and a factor F of the covariance F F^T of the state (x, m1, .., mK) are carried.
    """
    d, one = math.prod(denoiser.shape), np.eye(math.prod(denoiser.shape))
    depth = sampler.depth
    mean, factor = np.zeros((depth + 1, d)), np.zeros((depth + 1, d, d))
    factor[0] = one
    trace = [Moments(np.zeros(d), np.ones(d), one)]
    for row in sampler.rows:
        gain, offset = denoiser.affine(denoiser.prediction, row.t) if row.evaluates else (0 * one, np.zeros(d))
        m_gain, m_offset = row.p * one + row.q * gain, row.q * offset
        x_gain, x_offset = row.a * one + row.b * m_gain + row.e * gain, row.b * m_offset + row.e * offset
        back = np.array([row.c1, row.c2, row.c3])[:depth]
        x = x_gain @ mean[0] + back @ mean[1:] + x_offset
        spread = x_gain @ factor[0] + np.tensordot(back, factor[1:], 1)
        if row.evaluates and depth:
            mean[2:], mean[1] = mean[1:-1].copy(), m_gain @ mean[0] + m_offset
            factor[2:], factor[1] = factor[1:-1].copy(), m_gain @ factor[0]
        mean[0], factor[0] = x, spread
        if row.s:
            fresh = np.zeros((depth + 1, d, d))
            fresh[0] = row.s * one
            wide = np.concatenate([factor, fresh], axis=2).reshape((depth + 1) * d, -1)
            factor = np.linalg.qr(wide.T)[1].T.reshape(depth + 1, d, -1)
        basis, deviations, _ = np.linalg.svd(factor[0], full_matrices=False)
        trace.append(Moments(mean[0].copy(), deviations, basis))
    return tuple(trace)
