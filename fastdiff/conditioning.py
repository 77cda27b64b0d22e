"""Sampling given observations: conditioned denoisers, replacement, and particles.

What is known of a sample changes the denoiser, and no table. The score of the conditional law is that of the prior plus
the gradient of log p(y | x_t); where x_t = signal x0 + noise z, this moves the mean of x0 by

    x0 += (noise^2 / signal) g,      g = J^T A^T R^-1 (y - A x0)

with J the Jacobian of the mean of x0 by x_t, and R what is taken for the covariance of y given x_t:

- ``tmpd`` (Boys et al. 2023): A (noise^2 / signal) J A^T + s^2 I, the second moment by Tweedie's formula. Exact for
  Gaussian data, but for the steps of the table. J of a network is not symmetric; with A (noise^2 / signal) J^T A^T,
  which is the same where it is, no step leads away from what was seen. GMRES solves with it, by products alone.
  What a smooth curve hides behind what was seen of it shows in small singular values of R, down to what the
  derivative errs by.
- ``pigdm`` (Song et al. 2023): r^2 A A^T + s^2 I with r^2 = noise^2 / (signal^2 + noise^2), as if x0 were N(0, I).
- ``dps`` (Chung et al. 2023): no R; every row ends with x += 2 J^T A^T (y - A x0) / |y - A x0|.

``replace`` overwrites what is known after every row by a noised copy of it, which is biased however many rows there
are; ``repaint`` (Lugmayr et al. 2022) does it in a table that goes back up and down at every row. ``smc`` (Wu et al.
2023) weighs and resamples particles, which is right in the limit of many.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Backend, Row, TmpdPlan, backend_for, get_backend
from fastdiff.backends.numpy.tmpd import arnoldi, damped, rows_of, times, transposed
from fastdiff.backends.protocol import DRAWS, KRYLOV, TINY, TmpdWorkspace
from fastdiff.denoiser import Denoiser, Evaluator, Wrapped, denoiser_of
from fastdiff.errors import ArgumentError, check_array, check_choice, check_int, check_timesteps, shown
from fastdiff.masks import MaskDenoiser
from fastdiff.noise import UNIFORM_UNIT, Draw, Stream, philox_words
from fastdiff.noise_shape import NoiseShape
from fastdiff.observations import Given, Observations, Weight, observations
from fastdiff.process import _stepper as stepper
from fastdiff.samplers import Sampler
from fastdiff.samplers.table import x0_from_output
from fastdiff.schedule import Schedule

log = logging.getLogger("fastdiff")

Array = Any
Float64 = npt.NDArray[np.float64]

METHODS = ("tmpd", "pigdm", "dps", "replace", "repaint", "smc")
GUIDED = ("tmpd", "pigdm", "dps")  # those that are a denoiser
OWN_NOISE = (*GUIDED, "mask")  # those whose evaluator draws the noise of its rows
MOST_DENSE = 64  # observations of a sample up to which R of pigdm and smc is a matrix, and not its row sums
REPEATS = 10  # of a row of a table, by RePaint
LEAST = 1e-4  # of a singular value of R, relative to that of N(0, I) given x_t: a network errs
LEAST_EXACT = 1e-7  # the same of an exact denoiser: normal equations in float64 tell less from nothing
REACH = 4.0  # farthest move of a network's mean of x0, in root mean square deviations of N(0, I) given x_t
LEAST_OF_TWIST = 0.01  # the same of an eigenvalue, for particles
FLOOR = 1e-10  # of R, relative to its largest entry: exact values that the prior knows already


class Rows:
    """What all observations say of a sample, as rows of one matrix A: y = A x0 + s z.

    Samples of which less is known have rows of zeros, y of 0 and a variance of 1, which say nothing.

    Attributes
    ----------
    m : int
        Number of rows.
    y, variance : (N, m) float64
        What was seen, and s^2.
    places : (N, m) int64, or None
        Which value each row is, D where it says nothing, if that is all that is known.
    A : (N, m, D) float64, or None
        Otherwise.
    """

    def __init__(self, known: Observations) -> None:
        groups, n = list(known.groups()), 1 if known.count is None else known.count
        self.m, self.d = max(len(group.A) for group in groups), known.d
        self.y, self.variance = np.zeros((n, self.m)), np.ones((n, self.m))
        # Single values are known by where they are: a matrix of them may be large.
        single = not known.linear and known.root is None
        self.places = np.full((n, self.m), known.d) if single else None
        self.A = None if single else np.zeros((n, self.m, known.d))
        for group in groups:
            rows = len(group.A)
            self.y[group.indices, :rows], self.variance[group.indices, :rows] = group.y, group.noise**2
            if self.A is not None:
                self.A[group.indices, :rows] = group.A
            elif self.places is not None and rows:
                self.places[group.indices, :rows] = group.A.argmax(axis=1)
            _check_consistent(group.A[group.noise == 0], group.y[:, group.noise == 0])

    def scale(self, noise_shape: NoiseShape | None) -> Float64:
        """Return how large samples (N,) are by what was seen of them, 1 at least: N(0, I) lies within."""
        if self.places is not None and noise_shape is None:
            size: Any = 1.0
        else:
            A = self.matrix(np.arange(len(self.y)))
            size = np.sqrt((_spread(A, noise_shape) * A).sum(axis=2))
        with np.errstate(divide="ignore", invalid="ignore"):
            largest = np.where(size == 0, 0.0, np.abs(self.y) / size)
        return np.maximum(largest.max(axis=1, initial=0.0), 1.0)

    def matrix(self, which: npt.NDArray[np.int64]) -> Float64:
        """Return A (n, m, D) of samples."""
        return rows_of(self.places, self.A, which, self.d)

    def times(self, x: Float64, which: npt.NDArray[np.int64]) -> Float64:
        """Return A x (n, m) of samples x (n, D)."""
        return times(self.places, self.A, x, which)

    def transposed(self, y: Float64, which: npt.NDArray[np.int64]) -> Float64:
        """Return A^T y (n, D) of vectors y (n, m)."""
        return transposed(self.places, self.A, y, which, self.d)

    def counts(self, which: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many rows of samples say something (n,)."""
        if self.places is None:
            return np.count_nonzero(self.matrix(which).any(axis=2), axis=1)
        return np.count_nonzero(self.places[which] < self.d, axis=1)


@dataclass(frozen=True)
class Draws:
    """Which states are draws for which observation, and whose noise they have: the n draws of one after the other's.

    Attributes
    ----------
    count : int
        Number of observations.
    n : int
        Draws of each.
    first : int
        Which draw comes first.
    numbers : tuple of int, optional
        Which observations they are; by default 0, 1, ...
    firsts : (count,) int64 array, optional
        Of one draw each: its sample index.
    noise_shape : NoiseShape, optional
        Of the noise that is drawn; by default white.
    """

    count: int
    n: int
    first: int = 0
    numbers: tuple[int, ...] | None = None
    firsts: npt.NDArray[np.int64] | None = None
    noise_shape: NoiseShape | None = None

    @property
    def rows(self) -> int:
        """How many states there are."""
        return self.count * self.n

    def which(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return the observation of each of so many rows."""
        if self.count == 1:
            return np.zeros(length, np.int64)
        return np.arange(start, start + length) // self.n

    @property
    def begins(self) -> npt.NDArray[np.int64]:
        """The sample index (count,) of the first draw for each observation."""
        if self.firsts is not None:
            return self.firsts
        numbers = range(self.count) if self.numbers is None else self.numbers
        return np.array(numbers, np.int64) * DRAWS + self.first

    def fill(self, be: Backend, out: Array, draw: Draw) -> None:
        """Fill `out` with the noise of rows from `draw.first_row` on."""
        fill = be.normal if self.noise_shape is None else partial(self.noise_shape.fill, be)
        for part, first in self.runs(draw.first_row, len(out)):
            fill(out[part], draw._replace(first_row=first))

    def runs(self, start: int, length: int) -> Iterator[tuple[slice, int]]:
        """Yield parts of so many rows whose samples follow each other, and the index of the first one."""
        if self.firsts is not None:
            index = self.firsts[start : start + length]
            ends = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), length]
            for begin, stop in pairwise(ends):
                yield slice(begin, stop), int(index[begin])
            return
        done = 0
        while done < length:
            i, k = divmod(start + done, self.n)
            count = min(self.n - k, length - done)
            number = i if self.numbers is None else self.numbers[i]
            yield slice(done, done + count), number * DRAWS + self.first + k
            done += count


def _check_consistent(A: Float64, y: Float64) -> None:
    """Exact observations must not contradict each other."""
    if not len(A):
        return
    found = np.linalg.lstsq(A, y.T, rcond=None)[0]
    off = np.abs(A @ found - y.T).max(initial=0.0)
    if off > 1e-6 * (1 + np.abs(y).max(initial=0.0)):
        wants = "exact observations that can all be true; give them a noise where they cannot"
        raise ArgumentError("given", f"observations without noise that contradict each other by {off:.3g}", wants)


class ConditionedEvaluator(Evaluator):
    """A denoiser on a backend whose mean of x0 is moved towards observations.

    Parameters
    ----------
    inner : Evaluator
    to : Conditioned
        What it is given.
    shape : tuple of int
        Of one sample, for the weights.
    """

    def __init__(self, inner: Evaluator, to: Conditioned, shape: tuple[int, ...]) -> None:
        self.be, self.inner, self.shape = inner.be, inner, shape
        self.known, self.method, self.draws, self.noise_shape = to.known, to.method, to.draws, to.draws.noise_shape
        self.exact, self.most = to.exact, to.most
        signal, noise = to.schedule.signal, to.schedule.noise
        with np.errstate(divide="ignore", invalid="ignore"):
            self.p, self.q = x0_from_output(signal, noise, to.prediction)
            self.gain = np.where(signal > 0, noise**2 / signal, 0.0)
        self.power = noise**2 / (signal**2 + noise**2)
        self.rows = Rows(to.known)
        self.reach = REACH * math.sqrt(to.known.d) * self.rows.scale(self.noise_shape)
        self.dense = self.rows.m <= MOST_DENSE
        self._noise: Array = None  # room for it, and the step that draws it there
        self._take: Any = None
        if self.method == "tmpd" and self.rows.m > self.most:
            log.info("tmpd: %d observations of a sample: %d iterations of GMRES", self.rows.m, KRYLOV)
        if self.method == "pigdm" and not self.dense:
            log.info("pigdm: %d observations of a sample: the covariance is taken by its row sums", self.rows.m)
        if self.method == "smc" and not self.dense:
            wants = f"at most {MOST_DENSE} values for 'smc', whose weights take the determinant of a dense matrix"
            raise ArgumentError("given", f"{self.rows.m} values", wants)
        self._tmpd = self._tmpd_plan()
        self._room: TmpdWorkspace | None = None  # the last

    def evaluate(self, x: Array, t: int, labels: Array = None) -> Array:
        return self.moved(x, t, labels, self.draws.which(0, len(x)))[0]

    def step(
        self,
        x: Array,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array = None,
    ) -> None:
        out = push = None
        if row.evaluates:
            out, push = self.moved(x, row.t, labels, self.draws.which(draw.first_row, len(x)))
        if self._take is None or len(self._noise) < len(x):
            self._noise = self.be.empty(x.shape, x.dtype)
            self._take = stepper(self.be, self._noise, self.draws)
        self._take(x, out, memory, row, clip, draw)
        if push is not None and self.method == "dps":
            x += push

    def run_table(
        self, x: Array, rows: tuple[Row, ...], clip: tuple[float, float] | None, draw: Draw, labels: Array = None
    ) -> None:
        if self._tmpd is None or labels is not None or not self.inner.run_tmpd(x, rows, draw, self._tmpd):
            super().run_table(x, rows, clip, draw, labels)

    def whole(self, x: Array, rows: tuple[Row, ...], draw: Draw) -> bool:
        """Whether the backend runs a table in one piece."""
        return self._tmpd is not None and self.inner.run_tmpd(x[:0], rows, draw, self._tmpd)

    def _tmpd_plan(self) -> TmpdPlan | None:
        """The plan of a backend that moves outputs by itself: of networks, by tmpd and white noise."""
        rows, draws = self.rows, self.draws
        if self.method != "tmpd" or self.exact or self.known.weights or rows.m == 0 or self.noise_shape is not None:
            return None
        blind = np.array([self._blind(t) for t in range(len(self.gain))])
        least, farthest = np.maximum(LEAST * self.power, TINY), np.sqrt(self.power)
        return TmpdPlan(
            rows.y, rows.variance, rows.places, rows.A, draws.n, draws.begins, min(rows.m, KRYLOV),
            self.p, self.q, np.where(blind, 0.0, self.gain), least, farthest, self.reach,
        )  # fmt: skip

    def _moved_there(self, tmpd: TmpdPlan, x: Array, t: int, labels: Array, which: npt.NDArray[np.int64]) -> Array:
        """Return the output (n, D), moved by the backend: no state comes to the host."""
        room = self._room
        if room is None or room.shape != x.shape or room.dtype != x.dtype:
            room = self._room = TmpdWorkspace(self.be, tmpd, x.shape, x.dtype)
        room.place(which)
        room.t.fill(t)
        if tmpd.direct:  # all products at once, from one forward pass
            out, products = self.inner.pulled(x, t, room.rows, labels)
            out = self._own(x, out)
            room.move(x, out, lambda rows: products)
        else:
            out = self._plain(x, t, labels)
            room.move(x, out, lambda cotangent: self.inner.vjp(x, t, cotangent, labels))
        return out

    def moved(self, x: Array, t: int, labels: Array, which: npt.NDArray[np.int64]) -> tuple[Array, Array | None]:
        """Return the output (n, D), whose mean of x0 is moved for all methods but dps, and the move of x for that."""
        if self._blind(t):
            return self._plain(x, t, labels), None
        if self._tmpd is not None:
            return self._moved_there(self._tmpd, x, t, labels, which), None
        few = self.method == "tmpd" and 0 < self.rows.m <= self.most
        if few:  # all products at once, from one forward pass
            A = self.rows.matrix(which)
            out, back = self._pulled(x, t, labels, A.transpose(1, 0, 2))
        else:
            out = self._plain(x, t, labels)
        mean, rest = self._rest(x, t, out, which)
        slope = self._of_weights(x, t, labels, mean)
        if few:
            M = self.gain[t] * np.einsum("nid,jnd->nij", A, back) + self._diagonal(which)
            of_seen = np.einsum("nj,jnd->nd", damped(M, rest, self._least(x, t)), back)
            slope = slope + self._bounded(of_seen, t, which)
        elif rest.shape[1]:
            slope = slope + self._bounded(self._slope(x, t, labels, which, rest), t, which)
        if self.method == "dps":
            size = np.linalg.norm(rest, axis=1, keepdims=True) if rest.shape[1] else np.ones((len(mean), 1))
            return out, self.be.asarray(2 * slope / np.maximum(size, TINY), x.dtype)
        out += self.be.asarray(self.gain[t] / self.q[t] * slope, x.dtype)
        return out, None

    def twisted(
        self, x: Array, t: int, labels: Array, which: npt.NDArray[np.int64], plain: Array
    ) -> tuple[Float64, Array]:
        """Return the logarithm (n,) of tmpd's p(y | x), and the output (n, D) that it moves from the `plain` one."""
        if self._blind(t):
            return np.zeros(len(x)), plain
        mean, rest = self._rest(x, t, plain, which)
        twist = np.zeros(len(x))
        slope = np.zeros_like(mean)
        if rest.shape[1]:
            back, R = self._second_moment(x, t, labels, which)
            R = R + self._diagonal(which)
            solved = np.linalg.solve(R, rest[..., None])[..., 0]
            slope = np.einsum("jnd,nj->nd", back, solved)
            twist = self._log_normal(rest, solved, np.linalg.slogdet(R)[1], which)
        for weight in self.known.weights:
            twist = twist + weight.log_weights(mean.reshape(-1, *self.shape), self._where(t))
        slope = slope + self._of_weights(x, t, labels, mean)
        return twist, plain + self.be.asarray(self.gain[t] / self.q[t] * slope, x.dtype)

    def log_likelihood(self, x0: Float64, which: npt.NDArray[np.int64]) -> Float64:
        """Return the logarithm (n,) of the observations' density, and weights, at samples x0 (n, D)."""
        variance = self.rows.variance[which]
        rest = self.rows.y[which] - self.rows.times(x0, which)
        total = self._log_normal(rest, rest / variance, np.log(variance).sum(axis=1), which)
        for weight in self.known.weights:
            total = total + weight.log_weights(x0.reshape(-1, *self.shape), " at the end")
        return total

    def _plain(self, x: Array, t: int, labels: Array) -> Array:
        return self._own(x, self.inner.evaluate(x, t, labels))

    def _own(self, x: Array, out: Array) -> Array:
        return self.be.asarray(out if out.ndim == x.ndim else out[0], x.dtype).copy()  # not a learned variance

    def _least(self, x: Array, t: int) -> float:
        """What singular values of a covariance given x_t are to be trusted from."""
        least = LEAST if not self.exact else LEAST_EXACT if x.dtype == np.float64 else 32 * np.finfo(np.float32).eps
        return max(float(least * self.power[t]), TINY)

    def _bounded(self, slope: Float64, t: int, which: npt.NDArray[np.int64]) -> Float64:
        """The slope (n, D), made smaller where it would move the mean of x0 farther than that can be from where it is.

        The derivatives of a network that has learnt little are of any size; those of an exact denoiser are right.
        """
        if self.exact or self.method == "dps":
            return slope
        with np.errstate(over="ignore"):
            size = self.gain[t] * np.linalg.norm(_whitened(slope, self.noise_shape), axis=1)
        farthest = math.sqrt(self.power[t]) * self.reach[which]
        return slope * np.minimum(farthest / np.maximum(size, TINY), 1.0)[:, None]

    @staticmethod
    def _where(t: int) -> str:
        return f" of the batch, in the row at t = {t}"

    def _blind(self, t: int) -> bool:
        """Whether the state says nothing of x0, or the output nothing of the mean of x0."""
        return self.gain[t] == 0 or self.q[t] == 0 or not math.isfinite(self.q[t])

    def _rest(self, x: Array, t: int, out: Array, which: npt.NDArray[np.int64]) -> tuple[Float64, Float64]:
        """The mean of x0 (n, D), and y - A of it (n, m)."""
        mean = self.p[t] * _host(self.be, x) + self.q[t] * _host(self.be, out)
        return mean, self.rows.y[which] - self.rows.times(mean, which)

    def _of_weights(self, x: Array, t: int, labels: Array, mean: Float64) -> Float64:
        slope = np.zeros_like(mean)
        for weight in self.known.weights:
            gradient = weight.gradients(mean.reshape(-1, *self.shape), self._where(t)).reshape(mean.shape)
            slope += self._back(x, t, labels, gradient)
        return slope

    def _back(self, x: Array, t: int, labels: Array, cotangent: Float64) -> Float64:
        """J^T times cotangents (n, D) or (k, n, D), J the Jacobian of the mean of x0.

        With noise of covariance S = L L^T these are S J^T times them: in whitened states L^-1 x the Jacobian is
        L^-1 J L and A is A L, and what moves these states moves x by L times that.
        """
        given = self.be.asarray(np.ascontiguousarray(cotangent), x.dtype)
        product = _host(self.be, self.inner.vjp(x, t, given, labels))
        return _spread(self.p[t] * cotangent + self.q[t] * product, self.noise_shape)

    def _pulled(self, x: Array, t: int, labels: Array, cotangent: Float64) -> tuple[Array, Float64]:
        """The output, and J^T times cotangents."""
        given = self.be.asarray(np.ascontiguousarray(cotangent), x.dtype)
        out, product = self.inner.pulled(x, t, given, labels)
        pulled = self.p[t] * cotangent + self.q[t] * _host(self.be, product)
        return self._own(x, out), _spread(pulled, self.noise_shape)

    def _second_moment(self, x: Array, t: int, labels: Array, which: npt.NDArray[np.int64]) -> tuple[Float64, Float64]:
        """J^T A^T (m, n, D), and (noise^2 / signal) A J A^T (n, m, m), made symmetric and without negative eigenvalues.

        For an exact denoiser it is both already; the Jacobian of a network need not be.
        """
        A = self.rows.matrix(which)
        back = self._back(x, t, labels, A.transpose(1, 0, 2))
        R = self.gain[t] * np.einsum("nid,jnd->nij", A, back)
        values, vectors = np.linalg.eigh((R + R.transpose(0, 2, 1)) / 2)
        values = np.maximum(values, LEAST_OF_TWIST * self.power[t])
        return back, (vectors * values[:, None]) @ vectors.transpose(0, 2, 1)

    def _slope(self, x: Array, t: int, labels: Array, which: npt.NDArray[np.int64], rest: Float64) -> Float64:
        """J^T A^T R^-1 (y - A x0), R being 1 for dps."""
        rows, variance = self.rows, self.rows.variance[which]
        if self.method == "tmpd":
            return self._krylov(x, t, labels, which, rest)
        if self.method == "pigdm" and self.dense:
            unique, place = np.unique(which, return_inverse=True)
            A = rows.matrix(unique)
            R = self.power[t] * np.einsum("nid,njd->nij", A, _spread(A, self.noise_shape))
            rest = _solved(R[place.reshape(-1)], variance, rest)
        elif self.method == "pigdm":
            sums = _spread(rows.transposed(np.ones_like(rest), which), self.noise_shape)
            squares = rows.times(sums, which)  # row sums of A A^T
            rest = rest / (self.power[t] * squares + variance)
        return self._back(x, t, labels, rows.transposed(rest, which))

    def _krylov(self, x: Array, t: int, labels: Array, which: npt.NDArray[np.int64], rest: Float64) -> Float64:
        """J^T A^T w (n, D), with w from GMRES (Saad & Schultz 1986) for (gain A J^T A^T + s^2 I) w = y - A x0.

        A of the result, times the gain, is what the equation has on its left: it lessens |y - A x0| whatever J is.
        """
        rows, variance, (n, m) = self.rows, self.rows.variance[which], rest.shape
        size = np.linalg.norm(rest, axis=1)
        K = min(KRYLOV, m)
        basis, H, back = np.zeros((n, K + 1, m)), np.zeros((n, K + 1, K)), np.zeros((K, n, rows.d))
        basis[:, 0] = rest / np.maximum(size, TINY)[:, None]
        for k in range(K):
            back[k] = self._back(x, t, labels, rows.transposed(basis[:, k], which))
            arnoldi(k, self.gain[t] * rows.times(back[k], which) + variance * basis[:, k], basis, H)
        first = np.zeros((n, K + 1))
        first[:, 0] = size
        return np.einsum("nk,knd->nd", damped(H, first, self._least(x, t)), back)

    def _diagonal(self, which: npt.NDArray[np.int64]) -> Float64:
        variance = self.rows.variance[which]
        return np.eye(variance.shape[1]) * variance[:, None]

    def _log_normal(
        self, rest: Float64, solved: npt.NDArray[Any], log_det: npt.NDArray[Any], which: npt.NDArray[np.int64]
    ) -> Float64:
        """Log density (n,) of normals; rows that say nothing have a part of 0."""
        counts = self.rows.counts(which)
        return -((rest * solved).sum(axis=1) + log_det + counts * math.log(2 * math.pi)) / 2


@dataclass(frozen=True, eq=False)
class Conditioned(Wrapped):
    """A denoiser given observations, which any table takes: see `condition`.

    Attributes
    ----------
    inner : Denoiser
    schedule : Schedule
    known : Observations
    method : str
    draws : Draws
    output : str
        What is predicted.
    """

    schedule: Schedule
    known: Observations
    method: str
    draws: Draws
    output: str

    learned_variance = False  # what is moved is the mean alone

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return self.schedule.T

    @property
    def prediction(self) -> str:
        """What the output is."""
        return self.output

    @property
    def exact(self) -> bool:
        """Whether the denoiser's Jacobian is that of a mean of x0 to rounding."""
        return bool(getattr(self.inner, "exact", False))

    @property
    def most(self) -> int:
        """How many vector-Jacobian products are taken of a state at once, at most."""
        return {"tmpd": MOST_DENSE if self.exact else KRYLOV, "smc": MOST_DENSE}.get(self.method, 0)

    def on(self, be: Backend, shape: tuple[int, ...]) -> ConditionedEvaluator:
        """Return it on a backend."""
        return ConditionedEvaluator(self.inner.on(be, shape), self, shape)

    def predict(self, x: Any, t: int, labels: Any = None, *, backend: str | Backend = "auto") -> Array:
        """Return the output (n, ...) for x (n, ...), all at the timestep t."""
        be = backend_for(backend, x=x)
        shape = self.shape or tuple(x.shape[1:])
        given = check_array("x", x, shape=(len(x), *shape))
        t = int(check_timesteps(t, self.T, 1)[0])
        flat = be.asarray(given).reshape(len(given), -1)
        return be.to_numpy(self.on(be, shape).evaluate(flat, t, labels)).reshape(given.shape)


def condition(
    denoiser: Any,
    given: Given,
    method: str = "auto",
    *,
    schedule: Schedule | None = None,
    prediction: str | None = None,
) -> Conditioned:
    """Return a denoiser of the law given one observation, which any table takes.

    Parameters
    ----------
    denoiser : Denoiser
        With derivatives: a network, an exact denoiser, or an object with ``vjp(x, t, cotangent)``.
    given : Known, Linear or Weight, or a list of them
        One observation, in the denoiser's space; `fastdiff.sample` takes several.
    method : {"auto", "tmpd", "pigdm", "dps"}, optional
        "auto" is "tmpd". See the module's text. A `Weight` adds J^T times its gradient at the mean of x0 to g, by
        which its spread given x_t is left out.
    schedule : Schedule, optional
        Needed where the denoiser does not have one.
    prediction : {"noise", "x0", "v", ...}, optional
        Likewise.

    Returns
    -------
    Conditioned
        ``.predict(x, t)``, and what `fastdiff.sample` needs.

    Raises
    ------
    ArgumentError
        Observations of another shape, that contradict each other, or several of them; a method that is no denoiser.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> prior = fd.denoisers.Gaussian(np.zeros(2), np.array([[1.0, 0.9], [0.9, 1.0]]), s)
    >>> given = fd.condition(prior, fd.Known(np.array([1.0, np.nan])))
    >>> draws = fd.sample(given, fd.samplers.ddim(s, 20), n=500, shape=(2,), seed=0)
    >>> bool(abs(draws[:, 1].mean() - 0.9) < 0.1)
    True
    """
    source = denoiser_of(denoiser)
    schedule = getattr(denoiser, "schedule", None) if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule: this denoiser has none")
    prediction = source.prediction if prediction is None else prediction
    if prediction is None:
        raise ArgumentError("prediction", "None", "what the denoiser predicts: it does not say")
    if source.shape is None:
        raise ArgumentError("denoiser", "one that tells no shape", "one with a shape")
    known = observations(given, source.shape)
    if known.count not in (None, 1):
        raise ArgumentError("given", f"{known.count} observations", "one; fd.sample(given=...) takes several")
    if not isinstance(method, str) or method not in ("auto", *GUIDED):
        raise ArgumentError("method", shown(method), f"'auto', {', '.join(map(repr, GUIDED))}: others are no denoisers")
    chosen = "tmpd" if method == "auto" else method
    return Conditioned(source, schedule, known, chosen, Draws(1, DRAWS), prediction)


@dataclass(frozen=True, eq=False)
class Plan:
    """How samples given observations are drawn: `fastdiff.sample` runs it.

    Attributes
    ----------
    known : Observations
    method : str
        Of `METHODS`, or "mask": the network takes them as inputs, or "none": nothing is known.
    draws : Draws
    sampler : Sampler
        The table, or RePaint's of it.
    source : Denoiser
        Conditioned, or as it was.
    """

    known: Observations
    method: str
    draws: Draws
    sampler: Sampler
    source: Denoiser

    @property
    def most(self) -> int:
        """How many states' worth of memory a state takes."""
        m = sum(values.shape[1] for values, _ in self.known.known) + sum(len(A) for A, _, _ in self.known.linear)
        return 1 + min(m, self.source.most if isinstance(self.source, Conditioned) else 0)

    def shaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Return states (..., rows, D) as (..., n, *shape), or (..., n, N, *shape) of several observations."""
        x = x.reshape(*x.shape[:-2], self.draws.count, self.draws.n, *shape)
        observation = x.ndim - len(shape) - 2
        return x.swapaxes(observation, observation + 1) if self.known.count is not None else x.squeeze(observation)

    def replacement(self, be: Backend) -> Replacement | None:
        """Return what overwrites known values after a row, where the method does."""
        if self.method not in ("replace", "repaint"):
            return None
        return Replacement(be, self.sampler, self.known, self.draws)

    def run_particles(self, guided: Any, x: Array, parts: Sequence[tuple[slice, Draw, Array]]) -> Float64:
        """Change all states x to samples by particles; return log Z of each observation."""
        particles = Particles(guided, self.sampler, self.draws)
        return np.concatenate([particles.run(x[part], draw, labels) for part, draw, labels in parts])

    def finished(self, x: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return the samples (n, ...), or (n, N, ...) of several observations, with exact values as they were given.

        Raises
        ------
        ArgumentError
            Samples that are not finite: a network that is not trained has steep derivatives, of which some methods make
            more and more.
        """
        if not np.isfinite(x).all():
            other = "" if self.method in ("tmpd", "none") else "'tmpd', which holds back more; or "
            wants = f"{other}a network that is trained longer, or more steps"
            raise ArgumentError("method", f"{self.method!r}, whose samples are not finite", wants)
        return put_exact(np.ascontiguousarray(self.shaped(x, shape)), self.known)


def put_exact(x: npt.NDArray[Any], known: Observations) -> npt.NDArray[Any]:
    """Return samples (n, ...), or (n, N, ...), with the values that are known exactly in place of theirs."""
    if known.root is not None:  # they are values of other samples
        return x
    count = 1 if known.count is None else known.count
    flat = x.reshape(len(x), count, known.d)
    for values, noise in known.known:
        exact = np.broadcast_to(~np.isnan(values) & (noise == 0), (count, known.d))
        if exact.any():
            dtype = np.result_type(x, known.dtype)
            flat = np.where(exact, values.astype(dtype), flat.astype(dtype, copy=False))
    return flat.reshape(x.shape)


def log_units(known: Observations, factor: Any) -> Any:
    """Return what the log density of observations of ``factor x`` is less than that of x: (N,), or a number for one."""
    logs = np.log(np.broadcast_to(np.ravel(np.where(np.equal(factor, 0), 1.0, factor)), (known.d,)))
    total = np.zeros(1 if known.count is None else known.count)
    for values, _ in known.known:
        total = total + np.where(np.isnan(values), 0.0, logs).sum(axis=1)
    return total if known.count is not None else float(total[0])


def inside(known: Observations, factor: Any, offset: Any, noise_shape: NoiseShape | None = None) -> Observations:
    """Return observations of ``factor x + offset`` as observations of x; factor and offset are numbers, or a sample's.

    With a noise shape they are of L times that, so A is A L for x. Values whose factor is 0 are constants, of which
    nothing can be learnt.
    """
    factor, offset = (np.broadcast_to(np.ravel(array), (known.d,)) for array in (factor, offset))
    if noise_shape is not None:
        root = np.asarray(noise_shape.colour(np.eye(known.d), backend="numpy"), np.float64).T
        values, shift, root = (
            [(seen - root @ offset, noise) for seen, noise in known.known],
            root @ offset,
            root * factor,
        )
        linear = [(A, y - A @ shift, noise) for A, y, noise in known.linear]

        def data(x: Any) -> Any:
            return (x.reshape(-1, known.d) @ root.T + shift).reshape(x.shape)

        def back(slopes: Any) -> Any:
            return (slopes.reshape(-1, known.d) @ root).reshape(slopes.shape)
    else:
        root = None
        with np.errstate(divide="ignore", invalid="ignore"):
            values = [
                (np.where(factor == 0, np.nan, (seen - offset) / factor), np.where(factor == 0, 0.0, noise / factor))
                for seen, noise in known.known
            ]
        linear = [(A * factor, y - A @ offset, noise) for A, y, noise in known.linear]

        def data(x: Any) -> Any:
            return x * factor.reshape(x.shape[1:]) + offset.reshape(x.shape[1:])

        def back(slopes: Any) -> Any:
            return slopes * factor.reshape(slopes.shape[1:])

    weights = tuple(_through(weight, data, back) for weight in known.weights)
    return replace(known, known=tuple(values), linear=tuple(linear), weights=weights, root=root)


def _through(weight: Weight, data: Callable[[Any], Any], back: Callable[[Any], Any]) -> Weight:
    """A weight of data(x) as one of x; `back` takes its gradients through the map."""

    def function(x: Any) -> tuple[Any, Any]:
        return weight.log_weights(data(x)), back(weight.gradients(data(x)))

    return Weight(function)


def plan(
    source: Denoiser,
    sampler: Sampler,
    known: Observations,
    method: str,
    n: int,
    first_sample: int,
    noise_shape: NoiseShape | None = None,
) -> Plan:
    """Return how n draws for each observation are made.

    Raises
    ------
    ArgumentError
        A method that does not fit the observations or the table.
    """
    check_choice("method", method, ("auto", *METHODS))
    count = 1 if known.count is None else known.count
    if known.count is not None:
        check_int("first_sample", first_sample, low=0, high=DRAWS - n)
    draws = Draws(count, n, first_sample, known.numbers, known.firsts, noise_shape)
    if known.nothing:
        return Plan(known, "none", draws, sampler, source)
    if getattr(source, "masked", False):
        return Plan(known, "mask", draws, sampler, MaskDenoiser.of(source, sampler.schedule, known, method, draws))
    method = "tmpd" if method == "auto" else method
    if method in ("replace", "repaint"):
        table = resampled(sampler) if method == "repaint" else sampler
        return Plan(known, method, draws, table, source)
    if sampler.clip is not None:
        wants = f"clip None with {method!r}: bounds of x0 are not those of the conditional mean; or 'replace'"
        raise ArgumentError("sampler", f"clip {sampler.clip}", wants)
    guided = Conditioned(source, sampler.schedule, known, method, draws, sampler.prediction)
    return Plan(known, method, draws, sampler, guided)


# ------------------------------------------------------------------------------------------- replacement


def levels_after(sampler: Sampler) -> tuple[Float64, Float64]:
    """Return signal and noise (rows,) of the state after every row of a table: those of the next row's timestep.

    A row that evaluates nothing and goes up says by its factor where it starts from. After the last row they are 1, 0.
    """
    schedule, rows = sampler.schedule, sampler.rows
    signal, noise = np.ones(len(rows)), np.zeros(len(rows))
    for i, row in enumerate(rows[1:]):
        signal[i], noise[i] = schedule.signal[row.t], schedule.noise[row.t]
        if not row.evaluates and row.a != 0:  # to noise alone it goes from anywhere
            signal[i], noise[i] = signal[i] / row.a, math.sqrt(max(noise[i] ** 2 - row.s**2, 0.0)) / row.a
    return signal, noise


def resampled(sampler: Sampler, repeats: int = REPEATS) -> Sampler:
    """Return RePaint's table: every row but the last done so many times, the noise it took away added again in between.

    Going up from signal a', noise s' to a, s is x = (a / a') x' + sqrt(s^2 - (a s' / a')^2) z (Lugmayr et al. 2022,
    algorithm 1, with the root and the index that belong there).

    Raises
    ------
    ArgumentError
        A table with a memory, which would remember rows of another pass, or one that goes up already.
    """
    if sampler.depth or sampler.evaluations != len(sampler):
        came = (
            f"{sampler.name}, whose rows remember others" if sampler.depth else f"{sampler.name}, which goes up itself"
        )
        raise ArgumentError("sampler", came, "a table without memory for 'repaint', such as ddpm or ddim")
    schedule = sampler.schedule
    signal, noise = levels_after(sampler)
    rows: list[tuple[float, ...]] = []
    for i, row in enumerate(sampler.rows):
        factor = schedule.signal[row.t] / signal[i]
        spread = math.sqrt(max(schedule.noise[row.t] ** 2 - (factor * noise[i]) ** 2, 0.0))
        up = (row.t, 0, 0, factor, 0, 0, 0, 0, 0, spread, 0)
        again = repeats - 1 if i + 1 < len(sampler) else 0
        rows += [*[tuple(row[:11]), up] * again, tuple(row[:11])]
    name = f"{sampler.name}, repaint"
    return Sampler(np.array(rows), schedule, prediction=sampler.prediction, clip=sampler.clip, name=name)


class Replacement:
    """Overwrites the known values of a state after each row of a table, by what they are at that level of noise."""

    def __init__(self, be: Backend, sampler: Sampler, known: Observations, draws: Draws) -> None:
        if known.root is not None:
            raise ArgumentError("method", "'replace' or 'repaint', for a model with a noise shape", "another")
        if known.linear or known.weights:
            raise ArgumentError("given", "fd.Linear or fd.Weight", "fd.Known for 'replace' and 'repaint'")
        self.be, self.draws, self.rows = be, draws, sampler.rows
        self.signal, self.noise = levels_after(sampler)
        n = 1 if known.count is None else known.count
        values, variance = np.full((n, known.d), np.nan), np.zeros((n, known.d))
        for seen, noise in known.known:
            there = ~np.isnan(seen)
            values = np.where(there, seen, values)
            variance = np.where(there, noise**2, variance)
        self.values, self.spread = values, np.sqrt(variance)
        visits: Counter[int] = Counter()
        self.steps = []
        for row in self.rows:
            self.steps.append(row._replace(visit=visits[row.t]).step)
            visits[row.t] += 1

    def __call__(self, i: int, x: Array, draw: Draw) -> None:
        """Overwrite what is known in states x after row i."""
        be, start = self.be, draw.first_row
        which = self.draws.which(start, len(x))
        values = self.values[which]
        there = ~np.isnan(values)
        z = be.empty(x.shape, x.dtype)
        self.draws.fill(be, z, draw._replace(stream=Stream.KNOWN, step=self.steps[i]))
        signal, noise = self.signal[i], self.noise[i]
        # Noise that was seen is a part of the level's noise, as far as that goes.
        scale = np.sqrt(np.maximum(noise**2, (signal * self.spread[which]) ** 2)) if noise == 0 else noise
        seen = signal * values + scale * _host(be, z)
        x[...] = be.asarray(np.where(there, seen, _host(be, x)), x.dtype)


# ------------------------------------------------------------------------------------------- particles


class Particles:
    """Twisted sequential Monte Carlo (Wu et al. 2023): the draws of an observation are its particles.

    Particles move by the guided denoiser, with ``tmpd``'s p(y | x_t) for the twist. Their weights make up for what is
    wrong with it, so the mean weight estimates without bias the density of y under the *table's own* samples.

    Raises
    ------
    ArgumentError
        Exact observations, whose density no weight can be; a table that remembers, clips, or adds no noise.
    """

    def __init__(self, guided: ConditionedEvaluator, sampler: Sampler, draws: Draws) -> None:
        if (guided.rows.variance == 0).any():
            raise ArgumentError("given", "an observation without noise", "noise above 0 for 'smc'")
        rows = sampler.rows
        if sampler.depth or sampler.clip is not None or any(row.s == 0 for row in rows[:-1]) or rows[-1].s != 0:
            wants = "noise in every row but the last, no memory and no clip for 'smc', such as ddpm"
            raise ArgumentError("sampler", sampler.name, wants)
        self.guided, self.sampler, self.draws = guided, sampler, draws

    def run(self, x: Array, draw: Draw, labels: Array) -> Float64:
        """Change states x, of whole observations, and return log Z of each of these."""
        be, guided, draws, start = self.guided.be, self.guided, self.draws, draw.first_row
        which = draws.which(start, len(x))
        weights = np.zeros(len(x))
        evidence = np.zeros(len(x) // draws.n)
        before = np.zeros(len(x))  # the twist that is in the weights already
        z = be.empty(x.shape, x.dtype)
        for i, row in enumerate(self.sampler.rows):
            plain = guided._plain(x, row.t, labels)
            twist, moved = guided.twisted(x, row.t, labels, which, plain)
            weights += twist - before
            evidence += self._resample(x, (plain, moved), (weights, twist), start, i, draw)
            before = twist
            if row.s == 0:  # the last row: nothing is drawn, so nothing may be moved
                be.sampler_step(x, plain, (), row, None, draw)
                break
            shift = (row.b * row.q + row.e) * (_host(be, moved) - _host(be, plain))
            be.sampler_step(x, moved, (), row._replace(s=0.0), None, draw)
            draws.fill(be, z, draw.at(row.step))
            be.sampler_step(x, z, (), Row(row.t, p=0, q=0, a=1, b=0, e=row.s), None, draw)
            noise, shift = _whitened(_host(be, z), draws.noise_shape), _whitened(shift, draws.noise_shape)
            weights += -((2 * row.s * noise + shift) * shift).sum(axis=1) / (2 * row.s**2)
        weights += guided.log_likelihood(_host(be, x), which) - before
        return evidence + self._resample(x, (), (weights,), start, len(self.sampler), draw)

    def _resample(
        self, x: Array, arrays: tuple[Array, ...], logs: tuple[Float64, ...], start: int, i: int, draw: Draw
    ) -> Float64:
        """Draw each observation's particles anew by their weights, systematically; return the mean weights' logs."""
        be, n = self.guided.be, self.draws.n
        weights = logs[0].reshape(-1, n)
        top = weights.max(axis=1, keepdims=True)
        if not np.isfinite(top).all():
            bad = int(np.flatnonzero(~np.isfinite(top[:, 0]))[0]) + start // n
            raise ArgumentError("given", f"no particle with a weight above 0 for observation {bad} in row {i}", "some")
        relative = np.exp(weights - top)
        total = relative.sum(axis=1)
        cumulative = np.cumsum(relative, axis=1) / total[:, None]
        first = start // n
        words = philox_words(len(weights), 1, Draw(draw.seed, Stream.RESAMPLE, i, first))
        u = (words.reshape(len(weights), -1)[:, 0].astype(np.float64) + 0.5) * UNIFORM_UNIT
        places = (np.arange(n) + u[:, None]) / n
        chosen = np.stack([np.searchsorted(c, at, side="right") for c, at in zip(cumulative, places, strict=True)])
        index = (np.minimum(chosen, n - 1) + n * np.arange(len(weights))[:, None]).reshape(-1)
        for array in (x, *arrays):
            array[...] = array[be.asarray(index, np.int64)]
        for values in logs[1:]:
            values[...] = values[index]
        logs[0][...] = 0.0
        mean: Float64 = np.asarray(top[:, 0] + np.log(total / n), np.float64)
        return mean


# ------------------------------------------------------------------------------------------- small things


def _host(be: Backend, array: Array) -> Float64:
    return np.asarray(be.to_numpy(array), np.float64)


def _spread(rows: Float64, noise_shape: NoiseShape | None) -> Float64:
    """Rows (..., D) times the covariance of the noise."""
    return rows if noise_shape is None else noise_shape.spread(rows)


def _whitened(rows: Float64, noise_shape: NoiseShape | None) -> Float64:
    """L^-1 of rows (n, D), for noise L z."""
    if noise_shape is None:
        return rows
    out = np.empty_like(rows)
    noise_shape.apply(get_backend("numpy"), np.ascontiguousarray(rows), out, inverse=True)
    return out


def _solved(R: Float64, variance: Float64, rest: Float64) -> Float64:
    """(R + diag(variance))^-1 rest, least squares where an exact value tells what others tell."""
    m = rest.shape[1]
    scale = np.maximum(np.abs(R).max(axis=(1, 2)), variance.max(axis=1))
    R = R + np.eye(m) * (variance + FLOOR * scale[:, None])[:, None]
    solved: Float64 = np.linalg.solve(R, rest[..., None])[..., 0].astype(np.float64)
    return solved
