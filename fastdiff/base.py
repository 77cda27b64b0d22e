"""The Gaussian base: the best linear denoiser, which a network only has to correct.

Of Gaussian data N(0, C), C = U diag(l) U^T, the best prediction is linear in x_t:

    E[x0 | x_t] = U diag(signal l / (signal^2 l + noise^2)) U^T x_t,

and what follows from it for the noise and for v. A network whose output is added to that *is* the Gaussian before it
has learned anything (its last layer starts at zero), and at high noise there is nothing else to learn (Wang and
Vastola 2024, "The unreasonable effectiveness of Gaussian score approximation for diffusion models").

C is fitted with Ledoit-Wolf shrinkage, or with as small a share of it as the rows ask for: it gives white noise to
directions that smooth curves do not have, and samples show it. Of more than `MOST_AXES` values a row the leading axes
are kept, and the others share one variance.

Where variances lie far apart, what is not Gaussian shows along a few axes, at noise that hides it in the sum over
values that a unit of a network makes. So the first layer of a new network starts with weights along an axis
of variance l in proportion to l^(1/4) (`GaussianBase.turned`). Of windows of CO2, whose level is uniform and has 51 of
52 parts of the variance, a perceptron with weights of all directions alike learned nothing in 2,200 steps in four
splits of five. Energy distance to unseen rows, alike and turned (2026-12-01; means over five splits of CO2 and wine,
three of GunPoint, two of the others, one of OSULeaf): CO2 0.272 and 0.172, OSULeaf 0.069 and 0.063, GunPoint 0.049 and
0.048, ArrowHead 0.061 and 0.060, wine and breast cancer less by 0.0005, JapaneseVowels 0.013 and 0.016.

Networks of pictures have no base. One of the mean of each pixel and the spectrum of a stationary Gaussian did not help
a small convolutional network of PyTorch on few digits of 8 x 8 (2026-12-01; three splits, 2,000 steps of 32): without
and with it the energy distance was 0.366 and 0.365 from 30 pictures, 0.097 and 0.096 from 100, and samples no further
from the training pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import LinearPart
from fastdiff.covariance import ShrunkMoments, ledoit_wolf
from fastdiff.errors import ArgumentError, check_array, check_float
from fastdiff.schedule import Schedule
from fastdiff.stored import StoredRows

MOST_AXES = 512
SHARES, FOLDS = (1.0, 0.3, 0.1, 0.03, 0.01), 5  # of the shrinkage; each is tried on rows that were left out
MOST_FITTED = 2048  # rows, when they are tried
NEGLIGIBLE = 1e-6  # share of the largest variance, below which an axis counts no less to a first layer
ORTHONORMAL = 1e-6  # that the axes of a file may be off

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GaussianBase:
    """A Gaussian of mean zero, by its principal axes.

    Attributes
    ----------
    axes : (d, r) float64
        Orthonormal columns.
    variances : (r,) float64
        Along the axes, none of them negative.
    rest : float
        The variance along every direction across all axes.
    """

    axes: Float64
    variances: Float64
    rest: float

    @classmethod
    def of(cls, rows: Any, cov: Float64 | None = None) -> GaussianBase:
        """Fit rows (N, d), whose means are taken for zero; with a covariance (d, d) only its shrinkage by them."""
        moments = ledoit_wolf(rows)
        if cov is not None:
            values, vectors = np.linalg.eigh(cov)
            factor = (vectors * np.sqrt(np.maximum(values, 0.0))).T[::-1]
            share = _least_share(np.asarray(rows, np.float64))
            moments = ShrunkMoments(moments.mean, factor, moments.shrinkage * share, float(np.trace(cov)) / len(cov))
            return cls._of(moments)
        whole = rows if isinstance(rows, StoredRows) else np.asarray(rows, np.float64)
        moments = replace(moments, shrinkage=moments.shrinkage * _least_share(whole))
        return cls._of(moments)

    @classmethod
    def _of(cls, moments: ShrunkMoments) -> GaussianBase:
        n, d = moments.factor.shape
        rest = moments.shrinkage * moments.variance
        if d <= MOST_AXES:
            variances, axes = np.linalg.eigh(moments.cov)
            return cls(np.ascontiguousarray(axes[:, ::-1]), np.maximum(variances[::-1], 0.0), rest)
        _, singular, axes = np.linalg.svd(moments.factor, full_matrices=False)
        kept = min(MOST_AXES, n, d)
        variances = (1 - moments.shrinkage) * singular**2 + rest
        others = np.concatenate([variances[kept:], np.full(d - len(variances), rest)])
        return cls(np.ascontiguousarray(axes[:kept].T), variances[:kept], float(others.mean()))

    @classmethod
    def from_arrays(cls, tensors: Mapping[str, npt.NDArray[Any]], d: int) -> GaussianBase:
        """Return the base of a file for rows of d values.

        Raises
        ------
        ArgumentError
            An array is missing, or has a shape or values that no base has.
        """
        for name in ("base.axes", "base.variances", "base.rest"):
            if name not in tensors:
                raise ArgumentError(name, "no such tensor", "one, as there are others of a base")
        axes = check_array("base.axes", tensors["base.axes"], shape=(d, None), dtype=np.float64)
        rank = axes.shape[1]
        if not 1 <= rank <= d:
            raise ArgumentError("base.axes", f"shape {axes.shape}", f"1 to {d} axes")
        variances = check_array("base.variances", tensors["base.variances"], shape=(rank,), dtype=np.float64)
        rest = check_float("base.rest", check_array("base.rest", tensors["base.rest"], shape=(1,))[0], low=0)
        if (variances < 0).any():
            raise ArgumentError("base.variances", str(variances.min()), "numbers of at least 0")
        with np.errstate(over="ignore", invalid="ignore"):
            off = float(np.abs(axes.T @ axes - np.eye(rank)).max())
        if not off <= ORTHONORMAL:  # it may be NaN
            raise ArgumentError("base.axes", f"columns {off:.2g} off orthonormal ones", "orthonormal columns")
        return cls(axes, variances, rest)

    @property
    def arrays(self) -> dict[str, Float64]:
        """What a file keeps."""
        return {"base.axes": self.axes, "base.variances": self.variances, "base.rest": np.array([self.rest])}

    def linear(self, schedule: Schedule, prediction: str) -> LinearPart:
        """Return the best linear prediction at every t."""
        along = _gains(self.variances, schedule, prediction)
        if self.axes.shape[0] == self.axes.shape[1]:
            return LinearPart(self.axes, along)
        across = _gains(np.array([self.rest]), schedule, prediction)
        return LinearPart(self.axes, along - across, across[:, 0])

    def turned(self, weights: Float64) -> Float64:
        """Weights (d, n) of inputs, as many as they were in sum of squares, but more of them along axes of variance."""
        d, rank = self.axes.shape
        scale = np.append(self.variances, self.rest)
        scale = np.maximum(scale, NEGLIGIBLE * scale.max()) ** 0.25
        if not scale.any():
            return weights
        scale /= np.sqrt(np.append(np.ones(rank), d - rank) @ scale**2 / d)
        along = (self.axes * (scale[:-1] - scale[-1])) @ (self.axes.T @ weights)
        return np.asarray(along + scale[-1] * weights)

    def loss(self, schedule: Schedule, prediction: str, weight: Float64 | None = None) -> float:
        """Return the mean squared error of the best linear prediction, over values and timesteps.

        Along an axis of variance l, the error of f noise + g x0 given x = signal x0 + noise z is that of Gaussians,
        l (f signal - g noise)^2 / (signal^2 l + noise^2).

        Parameters
        ----------
        schedule : Schedule
        prediction : str
        weight : (T,) float64, optional
            What an error at each timestep counts.
        """
        d, rank = self.axes.shape
        variances = np.append(self.variances, self.rest)
        signal, noise = schedule.signal[:, None], schedule.noise[:, None]
        of_noise, of_x0 = (factor[:, None] for factor in schedule.target(prediction))
        errors = variances * (of_noise * signal - of_x0 * noise) ** 2 / (signal**2 * variances + noise**2)
        at_t = errors @ np.append(np.ones(rank), d - rank) / d
        return float(np.mean(at_t if weight is None else weight * at_t))


def _gains(variances: Float64, schedule: Schedule, prediction: str) -> Float64:
    """The factors (T, r) of x_t in the best prediction of a value of each variance."""
    signal, noise = schedule.signal[:, None], schedule.noise[:, None]
    power = signal**2 * variances + noise**2
    if prediction == "x0":
        return np.asarray(signal * variances / power)
    if prediction == "noise":
        return np.asarray(noise / power)
    if prediction == "velocity":
        return np.asarray((noise - signal * variances) / power)
    return np.asarray(signal * noise * (1 - variances) / power)  # v = signal noise - noise x0


def some_rows(rows: Any) -> Any:
    """Evenly spaced ones of many, on which a share or a ratio is tried."""
    step = len(rows) // MOST_FITTED or 1
    return rows[: MOST_FITTED * step : step]


def _least_share(rows: Any) -> float:
    """The share of the shrinkage under which rows that were left out are likeliest, fold by fold."""
    rows = some_rows(rows)
    if len(rows) < 2 * FOLDS:
        return 1.0
    likelihood = np.zeros(len(SHARES))
    for fold in range(FOLDS):
        left_out = np.arange(len(rows)) % FOLDS == fold
        moments = ledoit_wolf(rows[~left_out])
        if moments.variance == 0:
            return 1.0
        likelihood += [
            _log_likelihood(replace(moments, shrinkage=moments.shrinkage * s), rows[left_out]) for s in SHARES
        ]
    return SHARES[int(np.argmax(likelihood))]


def _log_likelihood(moments: ShrunkMoments, rows: Float64) -> float:
    """Of rows (n, d) under a Gaussian, but for a constant; minus infinity where it has directions without variance."""
    rest = moments.shrinkage * moments.variance
    if rest <= 0:
        return -np.inf
    _, singular, axes = np.linalg.svd(moments.factor, full_matrices=False)
    variances = (1 - moments.shrinkage) * singular**2 + rest
    centred = rows - moments.mean
    along = centred @ axes.T
    across = np.maximum(np.sum(centred**2, axis=1) - np.sum(along**2, axis=1), 0.0)
    squares = np.sum(along**2 / variances, axis=1) + across / rest
    logs = np.sum(np.log(variances)) + (rows.shape[1] - len(variances)) * np.log(rest)
    return -0.5 * float(np.sum(squares) + len(rows) * logs)
