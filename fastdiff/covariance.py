"""Diffusion seen as covariance being replaced: similarity, scatter, spectra, reshaping of noise, propagation.

Similarities and reshaped rows are computed on a backend; the rest is float64 work on the host, with LAPACK's
symmetric solver. A *scatter* of m draws X (m, n) is X^T X; the *similarity* of a curve, which the tutorial calls its
covariance, is a kernel matrix of the curve's values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Backend, RowMap, backend_for
from fastdiff.errors import (
    ArgumentError,
    as_array,
    check_array,
    check_choice,
    check_flags,
    check_float,
    check_int,
    check_timesteps,
    is_on_device,
)
from fastdiff.forks import cached_property
from fastdiff.process import BATCH_VALUES, _states, to_caller
from fastdiff.schedule import Float64, Schedule
from fastdiff.stored import StoredRows, parts

__all__ = [
    "EmpiricalMoments",
    "Reshaping",
    "ShrunkMoments",
    "effective_rank",
    "empirical",
    "ledoit_wolf",
    "propagate",
    "propagate_chain",
    "reshaping",
    "scatter",
    "similarity",
    "spectrum",
]

Form = Literal["spectrum", "transport"]
FORMS = ("spectrum", "transport")
RANK_KINDS = ("entropy", "participation")

MOST_COLUMNS = 1 << 12  # whose covariance is formed of data on disk
BLOCK_VALUES = 1 << 18  # of data that are in float64 at once: 2 MB


class Spectral(NamedTuple):
    """A covariance and its eigenvalues.

    Attributes
    ----------
    cov : (d, d) float64
        Exactly symmetric.
    spectrum : (d,) float64
        Eigenvalues, descending, those below 0 by rounding as 0.
    basis : (d, d) float64
        Their eigenvectors, the columns.
    eps : float
        Rounding unit of the dtype that the matrix came in.
    """

    cov: Float64
    spectrum: Float64
    basis: Float64
    eps: float


def check_covariance(argument: str, value: Any, d: int | None = None, *, jitter: float | None = None) -> Spectral:
    """Return a covariance, symmetric and positive semi-definite to rounding of its dtype, or raise `ArgumentError`.

    Parameters
    ----------
    argument : str
        Name for the message.
    value : (d, d) array_like of real numbers
    d : int, optional
        Wanted size; any but 0 by default.
    jitter : float, optional
        Added to the diagonal; None where the caller's user cannot choose one.

    Returns
    -------
    Spectral
    """
    c, eps = _symmetric(argument, value, d)
    if jitter:
        np.fill_diagonal(c, c.diagonal() + jitter)
    values, basis = np.linalg.eigh(c)
    if values[0] < -np.sqrt(eps) * max(values[-1], 0.0):
        wants = "no negative eigenvalue"
        if jitter is not None:
            wants += f"; jitter={1.1 * (jitter - values[0]):.2g} on the diagonal would lift it"
        raise ArgumentError(argument, f"an eigenvalue of {values[0]:.3g}; the largest is {values[-1]:.3g}", wants)
    return Spectral(c, np.maximum(values[::-1], 0.0), np.ascontiguousarray(basis[:, ::-1]), eps)


def _symmetric(argument: str, value: Any, d: int | None = None) -> tuple[Float64, float]:
    """A symmetric matrix as float64, and the rounding unit of the dtype it came in."""
    given = check_array(argument, _host(argument, value), shape=(d, d))
    if given.shape[0] != given.shape[1] or not given.size:
        raise ArgumentError(argument, f"shape {given.shape}", "a square matrix")
    eps = float(np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps)
    c = given.astype(np.float64)
    skew = np.abs(c - c.T).max()
    if skew > np.sqrt(eps) * np.abs(c).max():
        raise ArgumentError(argument, f"entries that differ by {skew:.3g} from their mirror", "a symmetric matrix")
    return (c + c.T) / 2, eps


def _host(argument: str, value: Any) -> Any:
    if is_on_device(value):
        raise ArgumentError(argument, "an array on a GPU", "a NumPy array: this is computed on the host")
    return value


def similarity(v: Any, *, backend: str | Backend = "auto") -> Any:
    """Return C[i, j] = exp(-(v_i - v_j)^2): how alike the values of a curve are.

    Parameters
    ----------
    v : (n,) or (B, n) array
        A curve, or a batch of them.
    backend : str or Backend, optional

    Returns
    -------
    (n, n) or (B, n, n) array
        float32, float64 for float64 input to the numpy backend; of the caller's kind. Nothing else of its size is
        allocated.

    Raises
    ------
    ArgumentError
        Shape, dtype or value.

    Examples
    --------
    >>> fd.covariance.similarity(np.array([0.0, 0.0, 9.0]), backend='numpy').round(3).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    be = backend_for(backend, v=v)
    curves = _states("v", v, be)
    if curves.ndim > 2:
        raise ArgumentError("v", f"shape {curves.shape}", "a curve (n,) or curves (B, n)")
    shape = (*curves.shape, curves.shape[-1])
    out = be.empty((int(np.prod(shape[:-2])), *shape[-2:]), curves.dtype)
    be.similarity(curves.reshape(len(out), shape[-1]), out)
    return to_caller(be, out.reshape(shape), is_on_device(v))


def scatter(X: npt.ArrayLike, centre: bool = False, normalise: bool = False) -> Float64:
    """Return the scatter X^T X of the rows of X, in float64.

    Parameters
    ----------
    X : (m, n) array
        Real numbers, memory-mapped or not; read in blocks.
    centre : bool, optional
        Subtract the mean row first.
    normalise : bool, optional
        Divide by m: the mean of x x^T, which with `centre` is the covariance of most likelihood.

    Returns
    -------
    (n, n) float64

    Raises
    ------
    ArgumentError
        Shape, dtype or value; no row.

    Examples
    --------
    >>> fd.covariance.scatter([[1.0, 0.0], [0.0, 2.0]]).tolist()
    [[1.0, 0.0], [0.0, 4.0]]
    """
    check_flags(centre=centre, normalise=normalise)
    count, _, total = _accumulate(check_array("X", _host("X", X), shape=(None, None), finite=False), centre)
    if count < 1:
        raise ArgumentError("X", "no row", "at least 1 row")
    if normalise:
        total /= count
    return total


def spectrum(C: npt.ArrayLike) -> Float64:
    """Return the eigenvalues of a symmetric matrix, descending.

    Parameters
    ----------
    C : (n, n) array_like
        Symmetric to rounding of its dtype.

    Returns
    -------
    (n,) float64
        As they are computed: those of a singular matrix are 0 up to rounding, of either sign.

    Raises
    ------
    ArgumentError
        Shape or value; a matrix that is not symmetric.

    Examples
    --------
    >>> fd.covariance.spectrum(np.diag([1.0, 4.0])).tolist()
    [4.0, 1.0]
    """
    return np.asarray(np.linalg.eigvalsh(_symmetric("C", C)[0])[::-1], np.float64)


def effective_rank(C: npt.ArrayLike, kind: Literal["entropy", "participation"] = "entropy") -> float:
    """Return how many directions a covariance has in effect: from 1 to n, n for the identity.

    With the eigenvalues as shares p of their sum: ``exp(-sum p ln p)`` (Roy & Vetterli 2007), or the participation
    ratio ``1 / sum p^2``, which is never larger.

    Parameters
    ----------
    C : (n, n) array_like
        Symmetric, positive semi-definite, not zero.
    kind : {"entropy", "participation"}, optional

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        Shape or value; a matrix that is no covariance, or zero.

    Examples
    --------
    >>> round(fd.covariance.effective_rank(np.eye(5)), 6)
    5.0
    """
    check_choice("kind", kind, RANK_KINDS)
    values = check_covariance("C", C).spectrum
    if values[0] == 0:
        raise ArgumentError("C", "no eigenvalue above 0", "a matrix other than zero")
    p = values[values > 0] / values.sum()
    return float(1 / np.sum(p**2) if kind == "participation" else np.exp(-np.sum(p * np.log(p))))


@dataclass(frozen=True, eq=False)
class Reshaping:
    """A linear map of rows that gives them another scatter; from `reshaping`.

    Attributes
    ----------
    before, after : (n, r) float64
        Orthonormal columns: where a row's components are read, and where they go.
    gains : (r,) float64
        What each component is multiplied by, all above 0.
    form : {"spectrum", "transport"}

    Examples
    --------
    >>> r = fd.covariance.reshaping(np.eye(2), np.diag([4.0, 1.0]))
    >>> r.rank, (r.matrix.T @ r.matrix).round(6).tolist()
    (2, [[4.0, 0.0], [0.0, 1.0]])
    """

    before: Float64
    gains: Float64
    after: Float64
    form: Form

    @property
    def rank(self) -> int:
        """Number r of components that the map keeps."""
        return len(self.gains)

    @cached_property
    def matrix(self) -> Float64:
        """(n, n) float64, read-only: ``before diag(gains) after^T``; a row x becomes x @ matrix."""
        matrix = (self.before * self.gains) @ self.after.T
        matrix.setflags(write=False)
        return matrix

    @cached_property
    def inverse(self) -> Reshaping:
        """The way back: after this map it is the projection on the columns of `before`, the kept subspace."""
        return Reshaping(self.after, 1 / self.gains, self.before, self.form)

    @cached_property
    def _plans(self) -> tuple[RowMap, RowMap]:
        """Without and with standardisation; two products where they are less work than one."""
        left, right = self.matrix, None
        if 2 * self.rank < len(self.before):
            left, right = self.before * self.gains, self.after.T
        return RowMap(left=left, right=right), RowMap(left=left, right=right, standardise=True)

    def apply(
        self, X: Any, *, standardise: bool = False, backend: str | Backend = "auto", batch: int | None = None
    ) -> Any:
        """Map the rows of X: X V P V1^T, and on request what the tutorial's code does afterwards.

        Parameters
        ----------
        X : (m, n) array
            Real numbers, memory-mapped or not.
        standardise : bool, optional
            Afterwards subtract from each row its mean and divide it by its standard deviation; a constant row
            becomes 0.
        backend : str or Backend, optional
        batch : int, optional
            At most this many rows are converted, checked and mapped at once; by default as many as have four million
            values. Bounds the memory besides X and the result, changes no bits where our own kernels run.

        Returns
        -------
        (m, n) array
            float32, float64 for float64 input to the numpy backend; of the caller's kind.

        Raises
        ------
        ArgumentError
            Shape, dtype or value of an argument.

        Examples
        --------
        >>> r = fd.covariance.reshaping(np.eye(2), np.diag([4.0, 1.0]))
        >>> x = r.apply(fd.normal((5000, 2), seed=0, backend="numpy"), backend="numpy")
        >>> fd.covariance.scatter(x, normalise=True).round().tolist()
        [[4.0, 0.0], [0.0, 1.0]]
        """
        check_flags(standardise=standardise)
        be, on_device = backend_for(backend, X=X), is_on_device(X)
        rows = check_array("X", X, shape=(None, len(self.before)), finite=False)
        m, n = rows.shape
        batch = max(1, BATCH_VALUES // n) if batch is None else check_int("batch", batch, low=1)
        plan, out = self._plans[bool(standardise)], None
        for start in range(0, max(m, 1), batch):
            part = slice(start, min(start + batch, m))
            given = _states("X" if batch >= m else f"X[{start}:{part.stop}]", rows[part], be)
            if out is None:
                out = (be.empty if on_device else np.empty)((m, n), given.dtype)
            if be.owns(out):
                be.map_rows(given, out[part], plan)
            else:
                mapped = be.empty(given.shape, given.dtype)
                be.map_rows(given, mapped, plan)
                out[part] = be.to_numpy(mapped)
        return out


def reshaping(
    source: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    form: Form = "spectrum",
    rank_tol: float | None = None,
    jitter: float = 0.0,
) -> Reshaping:
    """Return the linear map A of rows that turns the scatter C (source) into C1 (target): A^T C A = C1.

    There are many; with C = V L V^T and C1 = V1 L1 V1^T, eigenvalues descending:

    - "spectrum", the tutorial's: A = V P V1^T with P = sqrt(L1 / L) pairs the first direction of the source with the
      first of the target, the second with the second, and so on. Eigenvectors have no sign of their own; those of
      the target get the one that makes V_k . V1_k >= 0, so that equal matrices give the identity.
    - "transport": A = C^-1/2 (C^1/2 C1 C^1/2)^1/2 C^-1/2, symmetric, the optimal map between N(0, C) and N(0, C1)
      (Olkin & Pukelsheim 1982; Knott & Smith 1984): of all maps that reach the target it moves the points
      least, their mean squared displacement tr((I - A)^T C (I - A)) being the squared Wasserstein distance. It is
      computed as F1 U F^-1 with C = F F^T, C1 = F1 F1^T and the orthogonal polar factor U of F1^T F.

    The two agree where C and C1 have the same eigenvectors in the same order.

    Parameters
    ----------
    source, target : (n, n) array_like
        Symmetric, positive semi-definite; the target's rank is at most the source's.
    form : {"spectrum", "transport"}, optional
    rank_tol : float, optional
        Eigenvalues up to this part of the largest count as 0; by default n times the rounding unit of the dtype.
    jitter : float, optional
        Added to the diagonal of both matrices, for one that is singular or, by rounding, indefinite.

    Returns
    -------
    Reshaping
        ``.matrix`` is A, ``.apply(X)`` maps rows, ``.inverse`` maps back.

    Raises
    ------
    ArgumentError
        Shape or value; a matrix that is not symmetric or has a negative eigenvalue; a target of higher rank than the
        source, or, for "transport", outside the source's range.

    Examples
    --------
    >>> r = fd.covariance.reshaping(np.eye(2), np.diag([4.0, 1.0]))
    >>> r.apply(np.ones((1, 2)), backend='numpy').tolist()
    [[2.0, 1.0]]
    """
    check_choice("form", form, FORMS)
    jitter = check_float("jitter", jitter, low=0)
    here = check_covariance("source", source, jitter=jitter)
    there = check_covariance("target", target, len(here.cov), jitter=jitter)
    tol = check_float(
        "rank_tol", len(here.cov) * max(here.eps, there.eps) if rank_tol is None else rank_tol, low=0, high=1
    )
    have, r = (int(np.sum(c.spectrum > tol * c.spectrum[0])) for c in (here, there))
    enough = max(2 * tol, 1e-6) * (here.spectrum[0] or 1.0)
    lift = f"jitter={enough:.2g} on the diagonal of both"
    if r > have:
        got = f"rank {r} for a source of rank {have}, with rank_tol={tol:.2g}"
        raise ArgumentError("target", got, f"at most rank {have}, or {lift}")
    basis, deviations = there.basis[:, :r], np.sqrt(there.spectrum[:r])
    if form == "spectrum":
        before = here.basis[:, :r].copy()
        signs = np.where(np.sum(before * basis, axis=0) < 0, -1.0, 1.0)
        return Reshaping(before, deviations / np.sqrt(here.spectrum[:r]), basis * signs, form)
    own, scales = here.basis[:, :have], np.sqrt(here.spectrum[:have])
    factor = basis * deviations
    outside = np.sum((factor - own @ (own.T @ factor)) ** 2) / max(there.spectrum.sum(), np.finfo(float).tiny)
    if outside > tol:
        raise ArgumentError(
            "target", f"{outside:.2g} of its trace outside the range of the source", f"form='spectrum', or {lift}"
        )
    left, _, right = np.linalg.svd(factor.T @ (own * scales), full_matrices=False)
    matrix = factor @ left @ (right / scales) @ own.T
    gains, axes = np.linalg.eigh((matrix + matrix.T) / 2)
    kept = slice(len(gains) - r, None)
    axes = np.ascontiguousarray(axes[:, kept][:, ::-1])
    return Reshaping(axes, gains[kept][::-1].copy(), axes, form)


def propagate(S0: npt.ArrayLike, schedule: Schedule, t: Any) -> Float64:
    """Return the covariance signal_t^2 S_0 + noise_t^2 I of x_t, in closed form.

    Parameters
    ----------
    S0 : (n, n) array_like
        Covariance of the data.
    schedule : Schedule
    t : int or (k,) int array
        Timesteps, 0 .. T - 1.

    Returns
    -------
    (n, n) or (k, n, n) float64

    Raises
    ------
    ArgumentError
        Shape or value; a matrix that is no covariance.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> S = fd.covariance.propagate(4 * np.eye(2), s, 3)
    >>> np.allclose(S, (4 * s.alphas_bar[3] + 1 - s.alphas_bar[3]) * np.eye(2))
    True
    """
    start, schedule = check_covariance("S0", S0).cov, _schedule(schedule)
    t = as_array("t", _host("t", t), "integers")
    steps = check_timesteps(t, schedule.T, t.size)[..., None, None]
    chain = schedule.alphas_bar[steps] * start + schedule.noise[steps] ** 2 * np.eye(len(start))
    return chain if t.ndim else chain[0]


def propagate_chain(S0: npt.ArrayLike, schedule: Schedule) -> Iterator[Float64]:
    """Follow the covariance step by step: S_t = alpha_t S_{t-1} + beta_t I.

    An iterator, since T + 1 matrices may be large: ``np.stack(list(...))`` keeps them, ``zip(range(...), ...)`` the
    first of them.

    Parameters
    ----------
    S0 : (n, n) array_like
        Covariance of the data.
    schedule : Schedule

    Returns
    -------
    iterator of T + 1 (n, n) float64
        S_0, and then the covariance after each timestep.

    Raises
    ------
    ArgumentError
        At once: shape or value; a matrix that is no covariance.

    Examples
    --------
    >>> len(list(fd.covariance.propagate_chain(np.eye(2), fd.Schedule.cosine(20))))
    21
    """
    return _chain(check_covariance("S0", S0).cov, _schedule(schedule))


def _chain(state: Float64, schedule: Schedule) -> Iterator[Float64]:
    yield state
    identity = np.eye(len(state))
    for alpha, beta in zip(schedule.alphas, schedule.betas, strict=True):
        state = alpha * state + beta * identity
        yield state


def _schedule(value: Any) -> Schedule:
    if not isinstance(value, Schedule):
        raise ArgumentError("schedule", type(value).__name__, "a fastdiff.Schedule")
    return value


@dataclass(frozen=True, eq=False)
class EmpiricalMoments:
    """What `empirical` measures.

    Attributes
    ----------
    count : int
        Number of rows.
    mean : (n,) float64
    cov : (n, n) float64
        Unbiased: the centred scatter divided by count - 1.

    Examples
    --------
    >>> found = fd.covariance.empirical(np.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> found.count, found.mean.tolist(), found.cov.tolist()
    (2, [1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """

    count: int
    mean: Float64
    cov: Float64


def empirical(X: Any) -> EmpiricalMoments:
    """Measure mean and covariance of rows in one pass, in float64; the data may be larger than memory.

    A chunk of b rows with mean m_b updates (count, mean, M) by Chan, Golub & LeVeque 1979:
    ``M += M_b + (m_b - mean)(m_b - mean)^T count b / (count + b)``.

    Parameters
    ----------
    X : (m, n) array, or iterable of (m_i, n) arrays
        An array may be memory-mapped. Of an iterable one chunk is held at a time; the chunks may differ in length.

    Returns
    -------
    EmpiricalMoments
        Besides it and a chunk, two megabytes and little more are used, or a row.

    Raises
    ------
    ArgumentError
        Shape, dtype or value; chunks of different widths; fewer than two rows.

    Examples
    --------
    >>> fd.covariance.empirical(np.array([[0.0, 1.0], [2.0, 1.0]])).mean.tolist()
    [1.0, 1.0]
    """
    count, mean, total = _accumulate(_host("X", X), True)
    if count < 2:
        raise ArgumentError("X", f"{count} row{'s' * (count != 1)}", "at least 2 rows, for a covariance")
    total /= count - 1
    return EmpiricalMoments(count, mean, total)


@dataclass(frozen=True, eq=False)
class ShrunkMoments:
    """What `ledoit_wolf` estimates: the Gaussian N(mean, (1 - shrinkage) S + shrinkage variance I).

    Attributes
    ----------
    mean : (n,) float64
    factor : (m, n) float64
        The centred rows divided by sqrt(m): S = factor^T factor. Of many rows (n, n), with the same product.
    shrinkage : float
        From 0 to 1.
    variance : float
        The mean of the diagonal of S.

    Examples
    --------
    >>> found = fd.covariance.ledoit_wolf(np.random.default_rng(0).normal(size=(10, 30)))
    >>> found.cov.shape, bool(np.linalg.eigvalsh(found.cov)[0] > 0)  # though 10 rows have rank 9
    ((30, 30), True)
    """

    mean: Float64
    factor: Float64
    shrinkage: float
    variance: float

    @property
    def cov(self) -> Float64:
        """The shrunk covariance, (n, n) float64."""
        cov: Float64 = (1 - self.shrinkage) * (self.factor.T @ self.factor)
        cov[np.diag_indices_from(cov)] += self.shrinkage * self.variance
        return cov

    def sample(self, of_rows: Float64, of_columns: Float64) -> Float64:
        """Return k draws (k, n) made of normals (k, m) and (k, n), without forming the covariance.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> found = fd.covariance.ledoit_wolf(rng.normal(size=(10, 3)))
        >>> found.sample(rng.normal(size=(5, 10)), rng.normal(size=(5, 3))).shape
        (5, 3)
        """
        of_data = np.sqrt(1 - self.shrinkage) * (of_rows @ self.factor)
        drawn: Float64 = self.mean + of_data + np.sqrt(self.shrinkage * self.variance) * of_columns
        return drawn


def ledoit_wolf(X: Any) -> ShrunkMoments:
    """Estimate mean and covariance of few rows: shrunk towards a multiple of the identity (Ledoit and Wolf 2004).

    With S = sum of x x^T / m over the centred rows and mu = tr S / n, the shrinkage is b^2 / d^2, where
    d^2 = |S - mu I|^2 and b^2 = min(d^2, (sum |x|^4 / m - |S|^2) / m), in Frobenius norms (their equation 14).

    Parameters
    ----------
    X : (m, n) array_like
        At least one row. Takes O(m n min(m, n)) time and O(m n) memory; of `fastdiff.stored.StoredRows` O(n n) memory,
        and of more than 4,096 columns as many rows as would fit there are looked at, evenly spread.

    Returns
    -------
    ShrunkMoments

    Examples
    --------
    >>> moments = fd.covariance.ledoit_wolf(np.random.default_rng(0).normal(size=(10, 3)))
    >>> 0 <= moments.shrinkage <= 1
    True
    """
    if isinstance(X, StoredRows):
        if X.shape[1] <= MOST_COLUMNS:
            return _ledoit_wolf_of_parts(X)
        X = X[:: -(-X.size // MOST_COLUMNS**2)]
    rows = check_array("X", X, shape=(None, None), dtype=np.float64)
    m, n = rows.shape
    if rows.size == 0:
        raise ArgumentError("X", f"shape {rows.shape}", "at least one row, of at least one value")
    mean = rows.mean(axis=0)
    factor = (rows - mean) / np.sqrt(m)
    variance = float(np.sum(factor**2)) / n
    gram = factor @ factor.T if m < n else factor.T @ factor
    fourth = m * float(np.sum(np.sum(factor**2, axis=1) ** 2))
    return ShrunkMoments(mean, factor, _shrinkage(gram, fourth, variance, (m, n)), variance)


def _ledoit_wolf_of_parts(X: StoredRows) -> ShrunkMoments:
    """The same of many rows, in two passes: their mean, and what is made of them less that."""
    m, n = X.shape
    mean, gram, fourth = np.zeros(n), np.zeros((n, n)), 0.0
    for part in parts(X):
        mean += part.sum(axis=0)
    mean /= m
    for part in parts(X):
        centred = part - mean
        gram += centred.T @ centred
        fourth += float(np.sum(np.sum(centred**2, axis=1) ** 2))
    gram /= m
    variance = float(np.trace(gram)) / n
    values, vectors = np.linalg.eigh(gram)
    factor = (vectors * np.sqrt(np.maximum(values, 0.0))).T[::-1]
    return ShrunkMoments(mean, factor, _shrinkage(gram, fourth / m, variance, (m, n)), variance)


def _shrinkage(gram: Float64, fourth: float, variance: float, shape: tuple[int, int]) -> float:
    """Ledoit and Wolf's share of rows (m, n): of the products of rows or columns, and the mean of |x|^4 over rows."""
    m, n = shape
    square = float(np.sum(gram**2))  # of the norm of S, either way
    distance = square - n * variance**2
    error = (fourth - square) / m
    return 1.0 if distance <= 0 else min(1.0, max(0.0, error / distance))


def _accumulate(X: Any, centre: bool) -> tuple[int, Float64, Float64]:
    """Number of rows, their mean or 0, and their scatter about it."""
    from scipy.linalg.blas import dsyrk

    count, mean, total = 0, np.zeros(0), np.zeros((0, 0))
    for block in _blocks(X):
        rows, n = len(block) - 1, block.shape[1]
        if not count:
            mean, total = np.zeros(n), np.zeros((n, n), order="F")
        part, between = block[:-1], block[-1]
        if centre:
            part -= (middle := part.mean(axis=0))
            step = middle - mean
            between[:] = step * np.sqrt(count * rows / (count + rows))  # the rank-one term, as one more row
            mean += step * (rows / (count + rows))
        count += rows
        # In place, and half the work: only the upper triangle is added to.
        total = dsyrk(1.0, block.T, beta=1.0, c=total, overwrite_c=1) if n else total
    for i in range(len(total)):
        total[i + 1 :, i] = total[i, i + 1 :]
    return count, mean, total.T


def _blocks(X: Any) -> Iterator[Float64]:
    """The rows of an array, or of an iterable of chunks, in float64, some at a time; each with a row of zeros last."""
    chunks: Iterable[tuple[str, Any]] = [("X", X)]
    if not (hasattr(X, "__array__") or hasattr(X, "__dlpack__")):
        if not isinstance(X, Iterable):
            raise ArgumentError("X", type(X).__name__, "an array (m, n), or chunks of one")
        chunks = ((f"X, chunk {i}", chunk) for i, chunk in enumerate(X))
    width = None
    for name, chunk in chunks:
        rows = check_array(name, _host(name, chunk), shape=(None, width), finite=False)
        width = rows.shape[1]
        size = max(1, BLOCK_VALUES // max(1, width))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            where = name if len(part) == len(rows) else f"{name}, rows from {start}"
            block = np.zeros((len(part) + 1, width))
            block[:-1] = check_array(where, part)
            yield block
