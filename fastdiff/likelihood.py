"""How likely data are: the variational bound, and densities.

Everything here is in the denoiser's own space, in nats a row; `Diffusion.score_samples` adds the determinant of its
normaliser. Three answers, from the cheapest to the dearest:

- `bound`: the variational bound on -log p (Sohl-Dickstein et al. 2015; Ho et al. 2020, eq. 5), one term a timestep.
- `log_density(method="denoising")`: the integral of denoising errors over the signal-to-noise ratio (Kong et al. 2023).
- `log_density(method="table")`: the density of what a deterministic table samples. A row maps x to
  a x + b (p x + q out) + e out, with the Jacobian M = (a + b p) I + (b q + e) J, J being that of the output; rows are
  inverted one after the other, and log |det M| is added up.

The errors of all methods but the last are estimated with normals of stream PROBE, step t + 2^20 draw.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, Row, backend_for
from fastdiff.backends.protocol import VISIT
from fastdiff.denoiser import Asked, Evaluator, asked_on, checked_asked, denoiser_of
from fastdiff.errors import ArgumentError, check_array, check_choice, check_flags, check_int, check_seed
from fastdiff.noise import Draw, Stream, check_rows
from fastdiff.progress import bar as progress_bar
from fastdiff.samplers import Sampler, ddim
from fastdiff.samplers.table import x0_from_output
from fastdiff.sampling import check_agreement
from fastdiff.schedule import Schedule

__all__ = ["Bound", "LogDensity", "bound", "log_density"]

log = logging.getLogger("fastdiff")

EXACT_VALUES = 256  # of a row, up to which determinants are exact
MOST_DRAWS = 1 << 12  # so that t + 2^20 draw has 32 bits
BATCH_VALUES = 1 << 21  # of states, or of Jacobians, that are worked on at once
ROUNDINGS = 64.0  # units in the last place within which an inverted row is exact
MOST_TURNS, MOST_HALVINGS = 30, 10  # of Newton's method, and of one of its steps
STALLED = 0.9  # a step that leaves so much of what was missing is the last one
KRYLOV = 24  # dimension of the spaces that stand for M^T M where it is not built
BYTE = 2 / 255  # distance of two bytes in -1 .. 1

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bound:
    """The variational bound on -log p of some rows, in nats.

    Attributes
    ----------
    terms : (T + 1,) float64
        Their means over the rows: terms[0] of the decoder, -log p(x0 | x at t = 0); terms[k] the divergence of the step
        from t = k to k - 1; terms[T] that of the last x from the prior N(0, I).
    stderr : (T + 1,) float64
        Standard errors of the terms, of drawn rows and noise together; NaN for one row.
    per_row : (N,) float64
        The bound of every row.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> found = fd.likelihood.bound(law, [[0.0, 1.0], [2.0, 0.5]], backend="numpy")
    >>> found.terms.shape, bool(np.isclose(found.total, found.per_row.mean()))
    ((21,), True)
    """

    terms: Float64
    stderr: Float64
    per_row: Float64

    @property
    def total(self) -> float:
        """The mean of the bound over the rows."""
        return float(self.terms.sum())

    @property
    def total_stderr(self) -> float:
        """Its standard error; NaN for one row."""
        return float(_stderr(self.per_row[:, None])[0])


@dataclass(frozen=True, eq=False)
class LogDensity:
    """Log densities of some rows, in nats.

    Attributes
    ----------
    values : (N,) float64
    stderr : (N,) float64
        Standard errors of what was estimated; 0 where nothing was, NaN where one draw does not tell.
    residual : (N,) float64
        Of "table": by how much the worst row of the table misses the state that it was to reach, relative to the size
        of that. Beyond some 1e-10 in float64, or 1e-5 in float32, Newton's method has not found an inverse.
    negative : (N,) int64 or None
        Of "table": how many rows of the table turn the orientation around, det M < 0. Where there are some, several
        states lead to this one, and the value is the density of one branch. 0 does not prove that there is but one:
        long steps of a crooked network fold without it. None: the determinants had no sign.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> found = fd.likelihood.log_density(law, [[0.0, 1.0]], backend="numpy")
    >>> found.values.shape, found.stderr.tolist(), bool(found.residual.max() < 1e-6)
    ((1,), [0.0], True)
    """

    values: Float64
    stderr: Float64
    residual: Float64
    negative: npt.NDArray[np.int64] | None = None


class _Rows(NamedTuple):
    """Rows of data, and a denoiser on a backend."""

    be: Backend
    evaluator: Evaluator
    schedule: Schedule
    prediction: str
    x0: Array
    labels: Array | Asked | None
    first: int = 0

    def parts(self, values: int) -> Iterator[tuple[slice, _Rows]]:
        """Some rows at a time, of so many values."""
        count = max(1, BATCH_VALUES // values)
        for start in range(0, len(self.x0), count):
            part = slice(start, start + count)
            labels = None if self.labels is None else self.labels[part]
            yield part, self._replace(x0=self.x0[part], labels=labels, first=self.first + start)

    def predict(self, x: Array, t: int) -> Array:
        """The denoiser's prediction, without a variance that it may have learned."""
        out = self.evaluator.evaluate(x, t, self.labels)
        return out[0] if out.ndim > x.ndim else out

    def output(self, x: Float64, t: int) -> Float64:
        """The prediction for states of the host."""
        return self._host(self.predict(self._there(x), t))

    def vjp(self, x: Float64, t: int, cotangent: Float64) -> Float64:
        return self._host(self.evaluator.vjp(self._there(x), t, self._there(cotangent), self.labels))

    def jvp(self, x: Float64, t: int, tangent: Float64) -> Float64:
        return self._host(self.evaluator.jvp(self._there(x), t, self._there(tangent), self.labels))

    def _there(self, array: Float64) -> Array:
        return self.be.asarray(array, self.x0.dtype)

    def _host(self, array: Array) -> Float64:
        return self.be.to_numpy(array).astype(np.float64)


def bound(
    denoiser: Any,
    X: Any,
    *,
    draws: int = 1,
    seed: int = 0,
    decoder: str = "noise",
    labels: Any = None,
    covariates: Any = None,
    schedule: Schedule | None = None,
    backend: str | Backend = "auto",
    progress: bool = False,
) -> Bound:
    """Return the variational bound on -log p of rows (Sohl-Dickstein et al. 2015; Ho et al. 2020, eq. 5).

    A step from t to t - 1 with the posterior's own variance costs

        L_t = (SNR_{t-1} - SNR_t) / 2 E |x0 - x0_hat(x_t)|^2,    SNR = signal^2 / noise^2,

    and the last x of the forward process the divergence of N(signal x0, noise^2) from N(0, I), which needs no draw.

    Parameters
    ----------
    denoiser : Denoiser
        An exact one, a network's, ``model.denoiser()``, or another with a prediction.
    X : (N, ...) array
        Rows in the denoiser's space.
    draws : int, optional
        Noises for each row and timestep, of stream PROBE: row i, step t + 2^20 draw.
    seed : int, optional
    decoder : {"noise", "bytes"}, optional
        What p(x0 | x at t = 0) is. "noise": for continuous data, Gaussian around x0_hat with variance noise_0^2 /
        signal_0^2, so that the bound is one on a density. "bytes": for pictures in -1 .. 1 of 256 levels, that Gaussian
        summed over the width of a level, the outermost ones taking all beyond them (Ho et al. 2020, eq. 13), so that
        the bound is one on a probability.
    labels, covariates : optional
        What every row is, of a denoiser that knows it: as of `fastdiff.sample`.
    schedule : Schedule, optional
        By default the denoiser's own.
    backend : str or Backend, optional
    progress : bool, optional

    Returns
    -------
    Bound

    Raises
    ------
    ArgumentError
        Shapes or values that are not finite; no schedule; a prediction of the noise where the signal is 0; with
        "bytes" values that are none of 256 levels.

    Notes
    -----
    It exceeds -log p by the divergence of the chain from the truth, also for an exact denoiser: its reverse steps are
    Gaussian with one variance, the data's are not; a variance that a network has learned is not used. For 16 correlated
    values (entropy 10.25) the exact denoiser's bound is 17.47 with 1,000 timesteps and 17.59 with the tutorial's 100,
    and it does not go away with more draws.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> X = np.random.default_rng(0).normal(size=(200, 2)) * [2, 1]
    >>> found = fd.likelihood.bound(law, X, backend="numpy")
    >>> entropy = np.log(2 * np.pi * np.e) + np.log(2)  # -E log p of the law
    >>> bool(found.total > entropy - 0.2)
    True
    """
    check_choice("decoder", decoder, ["noise", "bytes"])
    check_flags(progress=progress)
    rows = _rows(denoiser, X, (labels, covariates), schedule, backend)
    draws = _checked_draws("draws", draws)
    s, n = rows.schedule, len(rows.x0)
    host = rows.be.to_numpy(rows.x0).astype(np.float64)
    if decoder == "bytes":
        _check_bytes(host)
    terms = np.empty((n, s.T + 1))
    signal, noise = s.signal[-1], s.noise[-1]
    terms[:, s.T] = 0.5 * np.sum(np.square(signal * host) + noise**2 - 1 - 2 * np.log(noise), axis=1)
    errors, first = _errors(rows, draws, check_seed(seed), progress, keep=decoder == "bytes")
    terms[:, : s.T] = _costs(s) * errors.mean(axis=0)
    if first is None:
        terms[:, 0] -= 0.5 * host.shape[1] * math.log(s.signal[0] ** 2 / s.noise[0] ** 2 / (2 * np.pi))
    else:
        terms[:, 0] = np.mean([-_log_bytes(host, x0, s.noise[0] / s.signal[0]) for x0 in first], axis=0)
    return Bound(terms.mean(axis=0), _stderr(terms), terms.sum(axis=1))


def log_density(
    denoiser: Any,
    X: Any,
    *,
    method: str = "table",
    sampler: Sampler | None = None,
    trace: str = "exact",
    probes: int = 1,
    seed: int = 0,
    first_sample: int = 0,
    labels: Any = None,
    covariates: Any = None,
    schedule: Schedule | None = None,
    backend: str | Backend = "auto",
    progress: bool = False,
) -> LogDensity:
    """Return the log density of rows.

    Parameters
    ----------
    denoiser : Denoiser
        For "table" one that has products with its Jacobian (see `Evaluator.vjp`).
    X : (N, ...) array
        Rows in the denoiser's space.
    method : {"table", "denoising"}, optional
        "table": the density of what `sampler` samples, which is not that of the data: few rows and an imperfect
        network are in it. "denoising": the integral of denoising errors (Kong et al. 2023, eq. 9),

            -log p = d / 2 log(2 pi e) - 1/2 int [d / (1 + g) - E |x - x0_hat(sqrt(g) x + eps)|^2] dg,

        by the trapezoidal rule over the log of the schedule's signal-to-noise ratios g: a density of the data, and a
        bound for a denoiser that is not the best one.
    sampler : Sampler, optional
        A table without noise, memory and clipping; by default ddim over all timesteps.
    trace : {"exact", "hutchinson"}, optional
        Of "table". "exact": the determinant of M, for rows of at most 256 values. "hutchinson": log |det M| is half the
        trace of log M^T M, by Lanczos' method with `probes` vectors of signs (Ubaru, Chen & Saad 2017), for any size.
    probes : int, optional
        Vectors of "hutchinson", or noises for each row and timestep of "denoising"; stream PROBE as in `bound`.
    first_sample : int, optional
        What row 0 of X is for stream PROBE.
    seed, labels, covariates, schedule, backend, progress
        As of `bound`.

    Returns
    -------
    LogDensity

    Raises
    ------
    ArgumentError
        Shapes or values that are not finite; no schedule; a table that draws, remembers or clips; a denoiser without
        products; "exact" for more than 256 values.

    Notes
    -----
    How far from exact, measured on Gaussians:

    - "table" with "exact": 1e-6 of a nat and better in float64; for 16 values and a denoiser in float32 2e-5 with 100
      rows and 6e-4 with 1,000. `residual` says what Newton's method has missed.
    - "hutchinson": the standard error of one probe is 2 nats (ddim in 50 rows) to 12 (10 rows) for 64 to 256 correlated
      values, and falls like 1 / sqrt(probes). Beside it the bias of Krylov spaces of 24 dimensions is nothing there:
      below 1e-12 of the exact value; it grows where M is badly conditioned.
    - "denoising": the trapezoidal rule, and the end at the schedule's largest signal-to-noise ratio, miss 0.01 to 0.03
      nats for 16 values, with 1,000 and with 100 timesteps; no standard error has that. One draw has one of 3.6 nats.

    Examples
    --------
    >>> s = fd.Schedule.cosine(200)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
    >>> found = fd.likelihood.log_density(law, [[0.0, 0.0]], backend="numpy").values
    >>> bool(abs(found[0] + np.log(2 * np.pi * 2)) < 0.1)  # of N(0, diag(4, 1)) at its mean
    True
    """
    check_choice("method", method, ["table", "denoising"])
    check_choice("trace", trace, ["exact", "hutchinson"])
    check_flags(progress=progress)
    seed, probes = check_seed(seed), _checked_draws("probes", probes)
    if sampler is not None and schedule is None and isinstance(sampler, Sampler):
        schedule = sampler.schedule
    rows = _rows(denoiser, X, (labels, covariates), schedule, backend)
    rows = rows._replace(first=check_rows(first_sample, len(rows.x0)))
    if method == "denoising":
        if sampler is not None:
            raise ArgumentError("sampler", "a table", "None for method 'denoising'")
        return _by_denoising(rows, probes, seed, progress)
    width = rows.x0.shape[1]
    if trace == "exact" and width > EXACT_VALUES:
        raise ArgumentError("trace", f"'exact' for {width} values", f"'hutchinson' beyond {EXACT_VALUES}")
    sampler = ddim(rows.schedule, rows.schedule.T, prediction=rows.prediction) if sampler is None else sampler
    check_agreement(denoiser_of(denoiser), _without_chance(sampler))
    solver = _Exact if trace == "exact" else _Krylov
    return _by_table(rows, sampler, lambda some: solver(some, probes, seed), progress)


# ------------------------------------------------------------------------------------------- what is given


def _rows(denoiser: Any, X: Any, asked: tuple[Any, Any], schedule: Schedule | None, backend: str | Backend) -> _Rows:
    source = denoiser_of(denoiser)
    if schedule is None:
        schedule = getattr(denoiser, "schedule", None)
    if not isinstance(schedule, Schedule):
        raise ArgumentError("schedule", "None", "a fastdiff.Schedule: this denoiser does not tell its own")
    if source.T not in (None, schedule.T):
        raise ArgumentError("schedule", f"T = {schedule.T}", f"T = {source.T}, as the denoiser has")
    if source.prediction is None:
        raise ArgumentError("denoiser", "no prediction", "one that says what its output is, by .prediction")
    X = check_array("X", X, min_ndim=2)
    if len(X) == 0 or X[:1].size == 0:
        raise ArgumentError("X", f"shape {X.shape}", "rows with values")
    if source.shape not in (None, X.shape[1:]):
        raise ArgumentError("X", f"shape {X.shape}", f"rows of shape {source.shape}, as the denoiser takes them")
    be = backend_for(backend, X=X)
    rows = be.asarray(X).reshape(len(X), -1)
    conditions = asked_on(be, source, *checked_asked(source, *asked, len(X), dtype=rows.dtype))
    on = source.on(be, X.shape[1:])
    return _Rows(be, on, schedule, source.prediction, rows, conditions)


def _checked_draws(name: str, value: int) -> int:
    return check_int(name, value, low=1, high=MOST_DRAWS)


def _without_chance(sampler: Any) -> Sampler:
    """A table whose samples are a function of x_T, row by row."""
    if not isinstance(sampler, Sampler):
        raise ArgumentError("sampler", type(sampler).__name__, "a table from fastdiff.samplers")
    faults = {
        "draws noise": any(row.s != 0 for row in sampler.rows),
        "remembers rows": any(row.depth for row in sampler.rows),
        "clips": sampler.clip is not None,
        "forgets the state": any(_factors(row) == (0.0, 0.0) for row in sampler.rows),
    }
    for fault, is_so in faults.items():
        if is_so:
            raise ArgumentError("sampler", f"{sampler.name}, which {fault}", "a deterministic table, as that of ddim")
    return sampler


def _factors(row: Row) -> tuple[float, float]:
    """(A, B) with x' = A x + B out."""
    return row.a + row.b * row.p, row.b * row.q + row.e


# ------------------------------------------------------------------------------------------- denoising errors


def _errors(
    rows: _Rows, draws: int, seed: int, progress: bool, *, keep: bool = False
) -> tuple[Float64, Float64 | None]:
    """|x0 - x0_hat|^2 (draws, N, T); with `keep`, also x0_hat at t = 0 (draws, N, d).

    As x0 = p x + q out for the right output, the error is q (out - right): nothing cancels where the signal is small.
    """
    s, (n, width) = rows.schedule, rows.x0.shape
    (p, q), (of_noise, of_data) = x0_from_output(s.signal, s.noise, rows.prediction), s.target(rows.prediction)
    errors, kept = np.empty((draws, n, s.T)), np.empty((draws, n, width)) if keep else None
    parts = list(rows.parts(width))
    with progress_bar(show=progress, total=s.T * len(parts), desc="scoring", leave=False) as bar:
        for part, some in parts:
            be, x0 = some.be, some.x0
            x, eps, real = be.empty(x0.shape, x0.dtype), be.empty(x0.shape, x0.dtype), x0.dtype.type
            for t in range(s.T):
                for draw in range(draws):
                    be.normal(eps, Draw(seed, Stream.PROBE, t + VISIT * draw, some.first))
                    x[...] = real(s.signal[t]) * x0 + real(s.noise[t]) * eps
                    out = some.predict(x, t)
                    if kept is not None and t == 0:
                        kept[draw, part] = be.to_numpy(x) * p[0] + be.to_numpy(out) * q[0]
                    eps *= real(of_noise[t])
                    eps += real(of_data[t]) * x0
                    eps -= out
                    errors[draw, part, t] = be.to_numpy((eps * eps).sum(axis=1)) * q[t] ** 2
                bar.update(1)
    return errors, kept


def _costs(s: Schedule) -> Float64:
    """(T,) factors of |x0 - x0_hat|^2 in the terms of the bound."""
    ratios = s.signal**2 / s.noise**2
    return np.append(ratios[0], ratios[:-1] - ratios[1:]) / 2


def _stderr(values: Float64) -> Float64:
    """Standard errors of the means of columns."""
    n = len(values)
    return values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1], np.nan)


def _check_bytes(x0: Float64) -> None:
    levels = (x0 + 1) / BYTE
    if np.abs(levels - levels.round()).max() > 1e-3 or np.abs(x0).max() > 1 + 1e-6:
        raise ArgumentError("decoder", "'bytes' for other values", "rows of the 256 levels from -1 to 1")


def _log_bytes(x0: Float64, mean: Float64, deviation: float) -> Float64:
    """(N,): the sum over values of the log probability of their levels under a Gaussian around `mean`."""
    from scipy.special import log_ndtr

    low, high = ((x0 + side * BYTE / 2 - mean) / deviation for side in (-1, 1))
    low[x0 <= -1 + BYTE / 2], high[x0 >= 1 - BYTE / 2] = -np.inf, np.inf
    swap = low > 0  # of the two tails take the one that is small
    low, high = np.where(swap, -high, low), np.where(swap, -low, high)
    top, bottom = log_ndtr(high), log_ndtr(low)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = top + np.log1p(-np.exp(bottom - top))
    result: Float64 = np.sum(logs, axis=1)
    return result


def _by_denoising(rows: _Rows, draws: int, seed: int, progress: bool) -> LogDensity:
    s, (n, width) = rows.schedule, rows.x0.shape
    errors, _ = _errors(rows, draws, seed, progress)
    weights = _quadrature(s)
    costs = 0.5 * weights * errors
    mean = costs.mean(axis=0)
    known = 0.5 * width * (math.log1p(s.signal[0] ** 2 / s.noise[0] ** 2) - math.log(2 * math.pi * math.e))
    if draws > 1:
        variance = costs.var(axis=0, ddof=1).sum(axis=1) / draws
    else:  # neighbours have nearly the same expectation, and noise of their own
        variance = 0.5 * np.square(np.diff(mean, axis=1)).sum(axis=1) if s.T > 2 else np.full(n, np.nan)
    return LogDensity(known - mean.sum(axis=1), np.sqrt(variance), np.zeros(n))


def _quadrature(s: Schedule) -> Float64:
    """(T,) weights of errors in the integral over g: the trapezoidal rule in log g, and a rectangle from 0 on."""
    ratios = s.signal**2 / s.noise**2
    seen = ratios > 0
    logs = np.log(ratios[seen])
    steps = np.zeros(len(logs))
    steps[1:] += (logs[:-1] - logs[1:]) / 2
    steps[:-1] += (logs[:-1] - logs[1:]) / 2
    steps[-1] += 1
    weights = np.zeros(s.T)
    weights[seen] = ratios[seen] * steps
    return weights


# ------------------------------------------------------------------------------------------- tables


class _Exact:
    """Rows of a table whose Jacobians M are built."""

    def __init__(self, rows: _Rows, probes: int, seed: int) -> None:
        self.rows = rows
        n, d = rows.x0.shape
        self.units = np.broadcast_to(np.eye(d)[:, None], (d, n, d))

    @staticmethod
    def values(width: int) -> int:
        return width * width

    def at(self, x: Float64, t: int, factors: tuple[float, float]) -> Any:
        """M (n, d, d) at x."""
        jacobians = self.rows.vjp(x, t, self.units).transpose(1, 0, 2)
        return factors[0] * np.eye(x.shape[1]) + factors[1] * jacobians

    def solve(self, M: Any, right: Float64) -> Float64:
        result: Float64 = np.linalg.solve(M, right[..., None])[..., 0]
        return result

    def log_det(self, M: Any, t: int) -> tuple[Float64, Float64, npt.NDArray[np.int64] | None]:
        """log |det M|, its variance, and whether det M < 0."""
        signs, logs = np.linalg.slogdet(M)
        return logs, np.zeros(len(logs)), (signs < 0).astype(np.int64)


class _Krylov:
    """Rows of a table of which only products M v and M^T v are made."""

    def __init__(self, rows: _Rows, probes: int, seed: int) -> None:
        self.rows, self.probes, self.seed = rows, probes, seed

    @staticmethod
    def values(width: int) -> int:
        return width * KRYLOV

    def at(self, x: Float64, t: int, factors: tuple[float, float]) -> Any:
        """The products with M and with its transpose at x."""
        (a, b), rows = factors, self.rows

        def product(v: Float64) -> Float64:
            return a * v + b * rows.jvp(x, t, v)

        def transposed(v: Float64) -> Float64:
            return a * v + b * rows.vjp(x, t, v)

        return product, transposed

    def solve(self, M: Any, right: Float64) -> Float64:
        """Conjugate gradients on M^T M x = M^T right, every row by itself."""
        product, transposed = M
        x, residual = np.zeros_like(right), right.copy()
        g = transposed(residual)
        direction, power = g.copy(), _dots(g, g)
        for _ in range(2 * KRYLOV):
            image = product(direction)
            step = _quotient(power, _dots(image, image))
            x += step * direction
            residual -= step * image
            g = transposed(residual)
            before, power = power, _dots(g, g)
            direction = g + _quotient(power, before) * direction
            if (power <= 1e-24 * _dots(right, right)).all():
                break
        return x

    def log_det(self, M: Any, t: int) -> tuple[Float64, Float64, npt.NDArray[np.int64] | None]:
        product, transposed = M
        n, d = self.rows.x0.shape
        be, estimates = self.rows.be, []
        for probe in range(self.probes):
            signs = be.empty((n, d))
            be.normal(signs, Draw(self.seed, Stream.PROBE, t + VISIT * probe, self.rows.first))
            z = np.where(be.to_numpy(signs) < 0, -1.0, 1.0)
            estimates.append(0.5 * d * _log_form(lambda v: transposed(product(v)), z))
        variance = np.var(estimates, axis=0, ddof=1) / self.probes if self.probes > 1 else np.full(n, np.nan)
        return np.mean(estimates, axis=0), variance, None


def _dots(a: Float64, b: Float64) -> Float64:
    return np.sum(a * b, axis=1, keepdims=True)


def _quotient(a: Float64, b: Float64) -> Float64:
    """a / b, and 0 where there is nothing left to divide by."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _log_form(operator: Callable[[Float64], Float64], z: Float64) -> Float64:
    """(n,): z^T log(S) z / |z|^2 of symmetric operators S, one a row, by Lanczos' method."""
    n, d = z.shape
    size = min(d, KRYLOV)
    basis, matrix = np.zeros((size, n, d)), np.zeros((n, size, size))
    v = z / np.sqrt(_dots(z, z))
    for k in range(size):
        basis[k] = v
        w = operator(v)
        for _ in range(2):  # once more for what rounding left
            along = np.einsum("knd,nd->kn", basis[: k + 1], w)
            matrix[:, k, k] += along[k]
            w = w - np.einsum("kn,knd->nd", along, basis[: k + 1])
        norm = np.sqrt(_dots(w, w))
        norm[norm <= 1e-10 * np.abs(matrix[:, :1, 0])] = 0  # the space is complete
        if k + 1 < size:
            matrix[:, k, k + 1] = matrix[:, k + 1, k] = norm[:, 0]
        v = _quotient(w, np.broadcast_to(norm, w.shape))
    values, vectors = np.linalg.eigh(matrix)
    weights = np.square(vectors[:, 0])
    logs = np.log(np.where(weights > 0, np.maximum(values, np.finfo(np.float64).tiny), 1.0))
    return np.sum(np.where(weights > 1e-30, weights * logs, 0.0), axis=1)


def _by_table(rows: _Rows, sampler: Sampler, solver: Callable[[_Rows], _Exact | _Krylov], progress: bool) -> LogDensity:
    n, d = rows.x0.shape
    values, variance, residual = np.empty(n), np.zeros(n), np.zeros(n)
    negative: npt.NDArray[np.int64] | None = np.zeros(n, np.int64)
    parts = list(rows.parts(solver(rows).values(d)))
    with progress_bar(show=progress, total=len(parts) * len(sampler.rows), desc="scoring", leave=False) as bar:
        for part, some in parts:
            x, how = some.be.to_numpy(some.x0).astype(np.float64), solver(some)
            total = np.zeros(len(x))
            for row in reversed(sampler.rows):
                x, M, missed = _inverted(some, how, row, x)
                logs, spread, turned = how.log_det(M, row.t)
                total += logs
                variance[part] += spread
                residual[part] = np.maximum(residual[part], missed)
                if turned is None:
                    negative = None
                elif negative is not None:
                    negative[part] += turned
                bar.update(1)
            values[part] = -0.5 * (_dots(x, x)[:, 0] + d * math.log(2 * math.pi)) - total
    return LogDensity(values, np.sqrt(variance), residual, negative)


def _inverted(rows: _Rows, how: _Exact | _Krylov, row: Row, y: Float64) -> tuple[Float64, Any, Float64]:
    """x with A x + B out(x) = y by Newton's method, M there, and how far off it is, relative to y.

    A row of data whose step no longer helps keeps its x: it depends on no other.
    """
    (a, b), t = _factors(row), row.t
    scale = np.maximum(1.0, np.sqrt(np.mean(np.square(y), axis=1)))
    tolerance = ROUNDINGS * np.finfo(rows.x0.dtype).eps

    def missing(x: Float64) -> tuple[Float64, Float64]:
        rest = y - a * x - (b * rows.output(x, t) if b else 0.0)
        return rest, np.abs(rest).max(axis=1) / scale

    x = y / a if b == 0 else y.copy()
    rest, missed = missing(x)
    M = how.at(x, t, (a, b))
    going = missed > tolerance
    for _ in range(MOST_TURNS):
        if not going.any():
            break
        before = missed.copy()
        step = how.solve(M, rest)
        better, factor = np.zeros(len(x), bool), np.ones(len(x))
        for _ in range(MOST_HALVINGS):
            tried = x + factor[:, None] * step
            there, miss = missing(tried)
            taken = going & ~better & (miss < missed)
            x[taken], rest[taken], missed[taken] = tried[taken], there[taken], miss[taken]
            better |= taken
            if (better | ~going).all():
                break
            factor[going & ~better] /= 2
        going &= (missed > tolerance) & (missed < STALLED * before)
        if better.any():
            M = how.at(x, t, (a, b))
    return x, M, missed
