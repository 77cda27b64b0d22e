"""The exact denoiser of a mixture of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array
from fastdiff.errors import ArgumentError, as_named, check_array
from fastdiff.exact.exact import Exact, Workspace
from fastdiff.exact.gaussian import Gaussian, average
from fastdiff.exact.moments import Moments, frozen, probabilities
from fastdiff.exact.posterior import condition, impossible, linear_observations
from fastdiff.forks import cached_property
from fastdiff.observations import Given
from fastdiff.schedule import Schedule


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

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Mixture([0.5, 0.5], [[-3.0], [3.0]], [[[0.1]], [[0.1]]], s)
    >>> draws = fd.sample(law, fd.samplers.ddim(s, 20), n=200, backend="numpy")
    >>> bool((np.abs(np.abs(draws) - 3) < 2).all()), bool(0.3 < (draws > 0).mean() < 0.7)
    (True, True)
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

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> parts = [fd.denoisers.Gaussian.low_rank(np.full(2, m), np.ones((2, 1)), 0.1, s) for m in (-1.0, 3.0)]
        >>> fd.denoisers.Mixture.of([0.5, 0.5], parts).data.mean.round(6).tolist()
        [1.0, 1.0]
        """
        if not isinstance(components, (list, tuple)):
            raise ArgumentError("components", type(components).__name__, "a list of Gaussians")
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
        checked = probabilities(weights, len(components))
        first = components[0]
        super().__init__(first.shape, first.schedule, first.prediction)
        self.weights = frozen(checked)
        self.components = tuple(components)

    @as_named(given="obs")
    def given(self, obs: Given) -> Mixture | list[Mixture]:
        """The law of x0 when something of it has been observed: a mixture again.

        Its components are those of this one, each under the observations, weighted also by how likely it was to make
        what was seen. Where some see fewer independent values without noise than others, only those remain that see
        the fewest: beside theirs, the others' densities vanish.

        Parameters
        ----------
        obs : fd.Known, fd.Linear, or a list of them
            As of `Gaussian.given`.

        Returns
        -------
        Mixture, or a list of N where `obs` holds N observations
            With `log_evidence`; components that cannot have made what was seen are gone.

        Raises
        ------
        ArgumentError
            As of `Gaussian.given`, where no component can have made what was seen.

        Examples
        --------
        >>> s, eye = fd.Schedule.cosine(20), np.eye(2)
        >>> law = fd.denoisers.Mixture([0.5, 0.5], [[-3.0, 0.0], [3.0, 7.0]], [eye, eye], s)
        >>> law.given(fd.Known([3.0, np.nan])).data.mean.round(3).tolist()  # the second component, surely
        [3.0, 7.0]
        """
        observed = linear_observations(obs, self.shape, "a mixture of Gaussians")
        found = {}
        for group in observed.groups():
            weighted = self._weighted()
            each = [condition(component.data, group, component._floor) for _, component in weighted]
            for row, i in enumerate(group.indices.tolist()):
                likely = np.array([one.log_evidence[row] for one in each])
                ranks = np.array([one.rank for one in each])
                if (likely == -math.inf).all():
                    raise impossible(observed, i)
                kept = np.flatnonzero((likely > -math.inf) & (ranks == ranks[likely > -math.inf].min()))
                logs = likely[kept] + np.log([weighted[k][0] for k in kept])
                top = logs.max()
                weights = np.exp(logs - top)
                components = [weighted[k][1]._with(each[k].laws[row]) for k in kept]
                found[i] = Mixture.of(weights / weights.sum(), components)
                found[i].log_evidence = float(top + np.log(weights.sum()))
        return found[0] if observed.count is None else [found[i] for i in range(observed.count)]

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

    def _product(self, space: Workspace, prediction: str, x: Array, t: int, vectors: Array, out: Array) -> None:
        # The derivative of r_k is r_k (s_k - the mean of s), with the scores s_k = -noise_k / sigma.
        be, sigma = space.be, float(self._levels(t)[1])
        weighted = self._weighted()
        logs, parts = be.empty((len(weighted), len(x)), x.dtype), be.empty(x.shape, x.dtype)
        for k, (probability, component) in enumerate(weighted):
            whitening, top = component._whitening(t)
            be.map_rows(x, parts, whitening)
            logs[k] = math.log(probability) + top - (parts * parts).sum(axis=1) / 2
        shares = np.exp(logs - logs.max(axis=0))
        shares /= shares.sum(axis=0)
        mean = be.empty(x.shape, x.dtype)
        self._expect(space, prediction, x, t, mean)
        out[...] = 0
        scaled = be.empty(vectors.shape, x.dtype)
        for share, (_, component) in zip(shares, weighted, strict=True):
            component._product(space, prediction, x, t, vectors, scaled)
            component._expect(space, "noise", x, t, parts)
            slope = share * (vectors * parts).sum(axis=-1) / -sigma
            component._expect(space, prediction, x, t, parts)
            out += share[:, None] * scaled + slope[..., None] * (parts - mean)

    def _weighted(self) -> list[tuple[float, Gaussian]]:
        return [(float(w), g) for w, g in zip(self.weights, self.components, strict=True) if w > 0]
