"""The exact denoiser of a mixture of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array
from fastdiff.errors import ArgumentError, check_array
from fastdiff.exact.exact import Exact, Workspace
from fastdiff.exact.gaussian import Gaussian, average
from fastdiff.exact.moments import Moments, frozen
from fastdiff.schedule import Schedule

WEIGHTS_SLACK = 1e-6  # by which the sum of given weights may miss 1


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
    prediction : {"noise", "x0", "v"}, optional
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
        self.weights = frozen(given / given.sum())
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

    def _expect(self, space: Workspace, prediction: str, x: Array, t: int, out: Array) -> None:
        average(space, self._weighted(), prediction, x, t, out, None)

    def _log_density(self, space: Workspace, x: Array, t: int, out: Array) -> None:
        average(space, self._weighted(), None, x, t, space("x0", x.shape, x.dtype), out)

    def _weighted(self) -> list[tuple[float, Gaussian]]:
        return [(float(w), g) for w, g in zip(self.weights, self.components, strict=True) if w > 0]
