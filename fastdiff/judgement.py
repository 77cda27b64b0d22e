"""Whether samples can be trusted: measured against rows that the model has not learned from.

Distances are in units of the data's deviation, as the model's normaliser has them, so that columns of different units
count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.covariance import ledoit_wolf
from fastdiff.metrics import distances, energy_distance, nearest_distances
from fastdiff.nn import Network
from fastdiff.noise import Draw, Stream, fill_normal
from fastdiff.normaliser import Normaliser

SAMPLES = 256  # that a judgement draws
PICTURES, PICTURE_STEPS = 64, 20  # of ddim: each costs a pass of a U-Net
MOST_ROWS = 1024  # of training rows that are looked at: distances take the square of their number
MOST_WORK = 1e12  # operations of a network, beyond which curves are drawn as pictures are
LOOKS, LOOK_EVERY = 20, 100  # at samples while a model trains by the rule; steps
SLACK = 0.25  # standard errors by which an earlier look may be worse than the best: with 1, most sets stopped too early
NEAREST = 0.95  # of the training rows' distances from each other
CROWDED = 4000  # parameters for each row: by default there are at most half as many
FEWEST_ROWS = 8  # that can be told from a Gaussian, or from copies, at all

Rows = npt.NDArray[Any]

EQUAL = 1e-9, 1e-3  # deviations that count as none: of the data; of samples of such data

# Where a judgement turns into a warning. Deviations of 256 good samples of few rows stray by a tenth.
DEVIATION = (0.75, 4 / 3)  # of the samples, over that of the data
OUTSIDE = 0.02  # of all values, beyond the training rows' range by half of it
WORSE = 2.0, 0.005  # standard errors, and units, by which the energy distance exceeds a Gaussian's
COPIES = 0.9, 0.8  # share of samples nearer to a training row than unseen rows are; ratio of the median distances


class Report(NamedTuple):
    """What was measured of some samples.

    Attributes
    ----------
    samples, rows : int
        How many were compared.
    held_out : bool
        Whether the rows are unseen ones; else they are the training rows themselves.
    energy_distance, gaussian : float
        Estimated energy distance to the law of these rows, of the samples and of as many draws of a Gaussian fitted to
        the training rows with Ledoit-Wolf shrinkage. What the training rows' own distance has in common with it, which
        is the noise of few held-out rows, is taken off.
    real : float
        Energy distance of two halves of the training rows: how far two sets of one law lie apart.
    stderr : float
        Of the `energy_distance`: a few held-out rows say little.
    excess, excess_stderr : float
        Energy distance of the samples less that of the Gaussian, and its standard error, to training and held-out rows
        together: a few held-out rows would not tell them apart.
    deviation : float
        Root mean square deviation of the samples' columns over that of the training rows'; 1 where neither has any.
    low, high : float
        The smallest and the largest value, in the data's own units.
    outside : float
        Share of values beyond the training rows' range in their column by more than half of that range.
    nearer : float
        Probability that a sample lies nearer to a training row than an unseen row does (or, where none is held out,
        a training row to the others): 0.5 for rows of the same law, 1 for copies.
    nearest_ratio : float
        Median distance of samples to the nearest training row, over that of unseen rows.
    """

    samples: int
    rows: int
    held_out: bool
    energy_distance: float
    gaussian: float
    real: float
    stderr: float
    excess: float
    excess_stderr: float
    deviation: float
    low: float
    high: float
    outside: float
    nearer: float
    nearest_ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types; what was not measured is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self._asdict().items()
        }

    @property
    def sentence(self) -> str:
        """What was found, in one sentence."""
        beside = f"a fitted Gaussian {self.gaussian:.3f}, two real sets {self.real:.3f}"
        rows = f"{self.rows} {'held-out' if self.held_out else 'training'} rows"
        return (
            f"{self.samples} samples: energy distance {self.energy_distance:.3f} +- {self.stderr:.3f} to {rows} "
            f"({beside}), deviation {self.deviation:.2f} x the data's, {self.outside:.1%} of values out of range, "
            f"{self.nearer:.0%} nearer to a training row than {self._others} are"
        )

    @property
    def _others(self) -> str:
        """With what rows the samples' distances to training rows are compared."""
        return "unseen rows" if self.held_out else "the other ones"

    @property
    def complaints(self) -> list[str]:
        """What is off, each with what can be done; empty where nothing is."""
        if not math.isfinite(self.deviation):
            return ["the samples are not finite"]
        found = []
        errors, units = WORSE
        if self.excess > errors * self.excess_stderr + units:
            found.append(
                f"the samples are worse than a fitted Gaussian's (energy distance {self.energy_distance:.3f} against "
                f"{self.gaussian:.3f})"
            )
        if not DEVIATION[0] <= self.deviation <= DEVIATION[1]:
            found.append(f"the samples' deviation is {self.deviation:.2f} times the data's")
        if self.outside > OUTSIDE:
            found.append(f"{self.outside:.0%} of the samples' values are far out of the data's range")
        if self.nearer > COPIES[0] and self.nearest_ratio < COPIES[1]:
            found.append(
                f"{self.nearer:.0%} of the samples lie nearer to a training row than {self._others} do: they are close "
                "to copies"
            )
        return found


class Evaluation(NamedTuple):
    """What `Diffusion.evaluate` drew, and what it compared that with, in the data's units.

    Attributes
    ----------
    report : Report
    complaint : str or None
        What is off and what can be done, or None.
    drawn, real, training : array
        Samples, rows that the model has not learned from, and rows that it has.
    """

    report: Report
    complaint: str | None
    drawn: Rows
    real: Rows
    training: Rows


def measure(drawn: Rows, training: Rows, held_out: Rows | None, normaliser: Normaliser, *, seed: int = 0) -> Report:
    """Compare samples with rows of the data.

    Parameters
    ----------
    drawn : (n, ...) array
        Samples, in the data's units.
    training : (N, ...) array
        The rows that were learned from, at least 2.
    held_out : (M, ...) array or None
        Others of the same kind. With fewer than 2 the training rows take their place.
    normaliser : Normaliser
        The model's: the unit of distances.
    seed : int, optional
        Of the Gaussian's draws.

    Returns
    -------
    Report
    """
    units = Normaliser.of(training.reshape(len(training), -1)) if normaliser.noise_shape is not None else normaliser
    picked = training[np.arange(min(len(training), MOST_ROWS)) * len(training) // min(len(training), MOST_ROWS)]
    x, learned = (units.apply(rows, np.float64).reshape(len(rows), -1) for rows in (drawn, picked))
    unseen = None
    if held_out is not None and len(held_out) >= 2:
        unseen = units.apply(held_out[:MOST_ROWS], np.float64).reshape(-1, x.shape[1])
    y = learned if unseen is None else unseen
    low, high = float(drawn.min()), float(drawn.max())
    if not np.isfinite(x).all():
        nan = math.nan
        return Report(len(x), len(y), unseen is not None, *(nan,) * 7, low, high, *(nan,) * 3)
    width, spread = (float(np.sqrt(np.mean(rows.var(axis=0)))) for rows in (learned, x))
    varied = width > EQUAL[0]
    unit = width if varied else 1.0
    z = _gaussian(learned, len(x), seed)
    every = learned if unseen is None else np.concatenate([learned, unseen])
    of_samples, of_gaussian = _Cross.of(x, y), _Cross.of(z, y)
    excess, error = _Cross.of(x, every).less(_Cross.of(z, every))
    if unseen is None:
        own = float(_means(learned, learned).mean())
        distance, stderr, gaussian = of_samples.mean - own, math.sqrt(of_samples.variance), of_gaussian.mean - own
    else:
        of_learned = _Cross.of(learned, y)
        (distance, stderr), gaussian = of_samples.less(of_learned), of_gaussian.less(of_learned)[0]
    least, most = learned.min(axis=0), learned.max(axis=0)
    room = (most - least) / 2 + 1e-3  # rounding, of a constant column
    to_learned = nearest_distances(x, learned)
    others = nearest_distances(unseen, learned) if unseen is not None else distances(learned, learned).least
    return Report(
        samples=len(x),
        rows=len(y),
        held_out=unseen is not None,
        energy_distance=distance / unit,
        gaussian=gaussian / unit,
        real=energy_distance(learned[::2], learned[1::2], unbiased=True) / unit if len(learned) > 3 else math.nan,
        stderr=stderr / unit,
        excess=excess / unit,
        excess_stderr=error / unit,
        deviation=spread / width if varied else max(1.0, spread / EQUAL[1]),
        low=low,
        high=high,
        outside=float(np.mean((x < least - room) | (x > most + room))),
        nearer=float(np.mean(to_learned[:, None] < others)),
        nearest_ratio=float(np.median(to_learned) / (np.median(others) or 1.0)),
    )


def how(net: Network, samples: int) -> tuple[int, dict[str, Any]]:
    """Return how many samples are drawn where so many are asked for, and by which sampler: fewer of slow networks."""
    if net.operations * net.T * samples > MOST_WORK or len(net.shape) == 3:
        return PICTURES, {"sampler": "ddim", "steps": min(PICTURE_STEPS, net.T)}
    return samples, {}


def complaint(report: Report, net: Network, prediction: str, *, base: bool) -> str | None:
    """Return what is off with the samples of a network, with or without a base, and what to try; or None."""
    found = report.complaints
    return f"{'; '.join(found)}: {remedy(report, net, prediction, base=base)}" if found else None


def remedy(report: Report, net: Network, prediction: str, *, base: bool) -> str:
    """Return what to try where the samples of a network, with or without a base, are not good."""
    if not math.isfinite(report.deviation):
        return "train with a smaller lr"
    if report.nearer > COPIES[0] and report.nearest_ratio < COPIES[1]:
        return "take fewer steps, a smaller network, or more rows"
    if prediction == "noise":
        return "fit a Diffusion(prediction='v')"
    if not base and net.narrow:
        return "fit a network whose hidden layers are wider than its curves, or let Diffusion choose it"
    if not base and net.has_linear:
        return "fit a Diffusion(base='gaussian'), or let it choose the network"
    return "train longer (fit again, or steps=), or bring more rows"


def doubt(rows: Rows, *, by_rule: bool, judged: bool) -> str | None:
    """Return why so few rows, or rows so alike, cannot teach what a judgement would ask for; None: nothing is said."""
    if len(rows) < FEWEST_ROWS and judged:
        return f"{len(rows)} rows can be learned by heart only: new samples of their kind want at least {FEWEST_ROWS}"
    if by_rule and rows.ndim == 2 and isinstance(rows, np.ndarray) and (rows == rows[:1]).all():
        return "all rows are the same, and so will all samples be"
    return None


def crowded(rows: int, parameters: int) -> str | None:
    """Return why so many parameters would learn so few rows by heart; None: they need not."""
    if rows < FEWEST_ROWS or parameters <= CROWDED * rows:
        return None
    words = f"{rows} rows meet {parameters} parameters, which can learn them by heart"
    return f"{words}: patience= stops before that, fewer units help, or let Diffusion choose network and steps"


class Watch:
    """Looks at samples while a model trains on few rows, and says which weights to keep.

    Those whose samples are no nearer to the training rows than these are to each other, and of these the first whose
    energy distance to the training rows is the smallest, up to a quarter of a standard error. So a network that has
    nothing to add to its Gaussian base adds nothing, and one that begins to learn rows by heart is stopped.

    Parameters
    ----------
    rows : (N, d) array
        The training rows, in the network's range.
    draw : callable
        Takes weights and returns samples (n, d), in the network's range.
    first, last : int
        Steps between which the training goes.
    ends : bool, optional
        Look at the first and the last weights only, and keep those whose samples are nearer to the training rows: all
        that is asked where rows have jitter, which can be no copies.

    Attributes
    ----------
    stopped : bool
        Whether a look has ended the training.
    reason : str
        Why others than the last weights looked at are kept; empty where they are not.
    """

    def __init__(self, rows: Rows, draw: Callable[[Rows], Rows], first: int, last: int, *, ends: bool = False) -> None:
        from scipy.spatial.distance import cdist

        self.rows, self.draw = np.asarray(rows, np.float64), draw
        self.every, self.last = max(1, round((last - first) / LOOKS / LOOK_EVERY)) * LOOK_EVERY, last
        self.ends, self.every = ends, last + 1 if ends else self.every
        picked = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLES)).astype(int)
        to_all = cdist(self.rows[picked], self.rows)
        to_all[np.arange(len(picked)), picked] = np.inf
        self.usual = float(np.median(to_all.min(axis=1)))
        self.looks: list[tuple[int, Rows, _Cross]] = []
        self.reason, self.stopped = "", False

    def look(self, step: int, weights: Rows) -> bool:
        """Draw with the weights of a step, if it is one to look at; true where samples have become copies."""
        if self.looks and (step == self.looks[-1][0] or (step % self.every and step != self.last)):
            return False
        drawn = np.asarray(self.draw(weights), np.float64)
        if not np.isfinite(drawn).all():
            return False
        nearest = float(np.median(nearest_distances(drawn, self.rows)))
        if self.looks and not self.ends and nearest < NEAREST * self.usual:
            self.reason = "after more, samples are nearer to training rows than these are to each other"
            self.stopped = True
            return True
        self.looks.append((step, weights.copy(), _Cross.of(drawn, self.rows)))
        return False

    def best(self) -> tuple[int, Rows]:
        """Return the step and the weights to keep, if any look has seen samples that are finite."""
        smallest = min(self.looks, key=lambda look: look[2].mean)
        for step, weights, cross in self.looks:
            excess, error = cross.less(smallest[2])
            if excess <= (0.0 if self.ends else SLACK * error):
                if step < self.looks[-1][0]:
                    self.reason = "samples of later ones are no nearer to the data's law"
                return step, weights
        raise AssertionError("the smallest is as small as itself")


def _gaussian(rows: Rows, n: int, seed: int) -> Rows:
    """Draw from the Gaussian fitted to rows: normals of stream PROBE, sample by sample."""
    moments = ledoit_wolf(rows)
    normals = np.empty((n, sum(rows.shape)))
    fill_normal(normals, Draw(seed, Stream.PROBE))
    return moments.sample(normals[:, : len(rows)], normals[:, len(rows) :])


def _means(a: Rows, b: Rows) -> Rows:
    """Mean distance of every row of a to the rows of b, or to the others where b is a."""
    means: Rows = distances(a, b).sum / (len(b) - (a is b))
    return means


class _Cross(NamedTuple):
    """What an energy distance of x to y has of x: 2 E|x - y| - E|x - x'|, as means over x and over y.

    Attributes
    ----------
    of_x : (n,) array
        2 E_y|x - y| - 2 E_x'|x - x'| for each x: how the mean would change with it.
    of_y : (m,) array
        2 E_x|x - y| for each y.
    """

    mean: float
    of_x: Rows
    of_y: Rows

    @classmethod
    def of(cls, x: Rows, y: Rows) -> _Cross:
        inner, outer, of_y = _means(x, x), 2 * _means(x, y), 2 * _means(y, x)
        return cls(float(outer.mean() - inner.mean()), outer - 2 * inner, of_y)

    @property
    def variance(self) -> float:
        return float(np.var(self.of_x) / len(self.of_x) + np.var(self.of_y) / len(self.of_y))

    def less(self, other: _Cross) -> tuple[float, float]:
        """The difference to another set's, and its standard error: what the rows of y have in common cancels."""
        of_y = self.of_y - other.of_y
        variance = np.var(self.of_x) / len(self.of_x) + np.var(other.of_x) / len(other.of_x) + np.var(of_y) / len(of_y)
        return self.mean - other.mean, math.sqrt(float(variance))
