"""The exact law of what a sampler makes of a Gaussian, and how it nears the data with more steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError
from fastdiff.exact.gaussian import Gaussian
from fastdiff.exact.moments import Float64, Moments
from fastdiff.samplers import Sampler, named


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
    >>> gaussian = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 0.01]), fd.Schedule.linear(1000))
    >>> distances = fd.denoisers.convergence(gaussian, "dpmpp_2m", [5, 10, 20, 40])
    """

    def table(n: int) -> Sampler:
        if callable(sampler):
            return sampler(n)
        return named(sampler, gaussian.schedule, n, prediction=gaussian.prediction)

    return np.array([exact_chain(gaussian, table(int(n))).w2() for n in steps])
