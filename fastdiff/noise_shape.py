"""Noise with a covariance: the shapes that a diffusion can have instead of white.

Diffusing x with noise N(0, S) is diffusing L^-1 x with white noise, for any L with L L^T = S: every sampler and every
likelihood of white noise holds for it, the latter with log |det L|. `NoiseShape` is such an L.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, RowMap, backend_for
from fastdiff.covariance import check_covariance
from fastdiff.errors import ArgumentError, as_named, check_array, check_choice, check_float, is_on_device
from fastdiff.noise import Draw
from fastdiff.process import BATCH_VALUES, _states, _width, to_caller

Float64 = npt.NDArray[np.float64]

MATRIX_LIMIT = 512  # of the size of a circulant that is applied as a matrix: two cores are as fast with it as the FFT
FFT_VALUES = 1 << 15  # that NumPy transforms at once: larger temporary arrays are slow, each being mapped anew


class _Filter(NamedTuple):
    """A symmetric circulant map of rows, by its eigenvalues at the frequencies of ``rfft``."""

    gain: Float64
    kept: WeakKeyDictionary[Backend, dict[np.dtype[Any], Array]]  # the gain as each backend has it


class _Maps(NamedTuple):
    """z -> z L^T, x -> x L^-T and log |det L|."""

    root: RowMap | _Filter
    inverse: RowMap | _Filter
    log_det: float


@dataclass(frozen=True, eq=False, repr=False)
class NoiseShape:
    """The covariance S of a noise N(0, S), through a root L with L L^T = S.

    Use the constructors `diagonal`, `dense`, `low_rank` and `stationary`; this one restores. Where the library takes a
    ``noise_shape``, None stands for white noise, S = I. Equal shapes have the same kind and the same numbers.

    Parameters
    ----------
    kind : {"diagonal", "dense", "low_rank", "stationary"}
    arrays : mapping of str to array
        What defines it, as `arrays` had it.

    Attributes
    ----------
    kind : str
    arrays : dict of str to float64 array, read-only
        diagonal: variances (d,). dense: root (d, d), the Cholesky factor. low_rank: factor (d, r) and variances (d,).
        stationary: power (d,).
    d : int
        Number of values in a row.
    log_det : float
        log |det L|, which is log det S / 2. The density of x is that of L^-1 x divided by exp(log_det).

    Raises
    ------
    ArgumentError
        Shape or value of an array.

    Examples
    --------
    >>> smooth = fd.NoiseShape.stationary(np.exp(-np.minimum(np.arange(50), 50 - np.arange(50)) / 5))
    >>> x_t, eps = fd.forward_noise(fd.data.harmonic_curves(9), 30, fd.Schedule.linear(1000), noise_shape=smooth)
    """

    kind: str
    arrays: Mapping[str, npt.NDArray[Any]]
    d: int = field(init=False)
    log_det: float = field(init=False)
    _root: RowMap | _Filter = field(init=False)
    _inverse: RowMap | _Filter = field(init=False)

    def __post_init__(self) -> None:
        names, build = _KINDS[check_choice("kind", self.kind, _KINDS)]
        if set(self.arrays) != set(names):
            got = ", ".join(sorted(self.arrays)) or "nothing"
            raise ArgumentError(f"arrays of a {self.kind} noise shape", got, ", ".join(names))
        # A copy, and of zeros only one kind: equal shapes have equal hashes.
        arrays = {name: check_array(name, self.arrays[name], dtype=np.float64) + 0.0 for name in names}
        for array in arrays.values():
            array.setflags(write=False)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # found below
            root, inverse, log_det = build(**arrays)
        limit = np.finfo(np.float32).max
        for plan in (root, inverse):
            parts = (plan.scale, plan.left, plan.right) if isinstance(plan, RowMap) else (plan.gain,)
            if not all(part is None or (np.abs(part) < limit).all() for part in parts):
                wants = "variances whose roots, and one over them, float32 can hold: scale the data"
                raise ArgumentError(names[-1], "a noise too large or too small", wants)
        values = {"arrays": arrays, "d": len(arrays[names[0]]), "log_det": float(log_det)}
        for name, value in {**values, "_root": root, "_inverse": inverse}.items():
            object.__setattr__(self, name, value)

    # -- constructors --------------------------------------------------------------------------------------

    @classmethod
    def diagonal(cls, variances: npt.ArrayLike) -> NoiseShape:
        """Independent values, each with its own variance: S = diag(variances), L = S^1/2.

        Parameters
        ----------
        variances : (d,) array_like
            Above 0.

        Returns
        -------
        NoiseShape

        Raises
        ------
        ArgumentError
            Shape or value.

        Examples
        --------
        >>> fd.NoiseShape.diagonal([1.0, 4.0]).cov().tolist()
        [[1.0, 0.0], [0.0, 4.0]]
        """
        return cls("diagonal", {"variances": check_array("variances", variances, shape=(None,))})

    @classmethod
    def dense(cls, cov: npt.ArrayLike, *, jitter: float = 0.0) -> NoiseShape:
        """Any covariance: S = cov + jitter I, L its lower Cholesky factor.

        Parameters
        ----------
        cov : (d, d) array_like
            Symmetric to rounding of its dtype, and positive definite beyond it: what is left of a value's variance
            given the values before it is more than rounding.
        jitter : float, optional
            Variance added to every value, for a singular matrix.

        Returns
        -------
        NoiseShape

        Raises
        ------
        ArgumentError
            Shape or value; a matrix that is not symmetric, or not positive definite.

        Examples
        --------
        >>> shape = fd.NoiseShape.dense([[2.0, 1.0], [1.0, 2.0]])
        >>> shape.cov().round(6).tolist()
        [[2.0, 1.0], [1.0, 2.0]]
        """
        c, spectrum, _, eps = check_covariance("cov", cov, jitter=check_float("jitter", jitter, low=0))
        try:
            root = np.linalg.cholesky(c)
        except np.linalg.LinAlgError:
            root = np.zeros_like(c)
        if (np.diag(root) ** 2 <= len(c) * eps * np.diag(c)).any():
            got = f"a singular matrix, of eigenvalues from {spectrum[-1]:.3g} to {spectrum[0]:.3g}"
            enough = max(2 * len(c) * eps, 1e-6) * (spectrum[0] or 1)
            wants = f"a positive definite one; jitter={enough:.2g} on the diagonal would make it one"
            raise ArgumentError("cov", got, wants)
        with as_named(root="cov, jitter"):
            return cls("dense", {"root": root})

    @classmethod
    def low_rank(cls, factor: npt.ArrayLike, variances: npt.ArrayLike = 1.0) -> NoiseShape:
        """Few directions over independent values: S = diag(variances) + factor factor^T.

        With D = diag(variances) and the singular values of D^-1/2 factor = Q s R^T, L = D^1/2 (I + Q g Q^T) where
        g = (1 + s^2)^1/2 - 1: nothing of size (d, d), and a row costs O(d r).

        Parameters
        ----------
        factor : (d, r) array_like
        variances : (d,) array_like or float, optional
            Above 0.

        Returns
        -------
        NoiseShape

        Raises
        ------
        ArgumentError
            Shape or value.

        Examples
        --------
        >>> fd.NoiseShape.low_rank(np.ones((2, 1)), 0.5).cov().round(6).tolist()
        [[1.5, 1.0], [1.0, 1.5]]
        """
        columns = check_array("factor", factor, shape=(None, None))
        given = check_array("variances", variances)
        if given.shape not in ((), columns.shape[:1]):
            raise ArgumentError("variances", f"shape {given.shape}", f"a number or shape ({len(columns)},)")
        if (low := np.flatnonzero(given <= 0)).size:
            raise ArgumentError("variances", f"{given.flat[low[0]]:g} at index {low[0]}", "numbers above 0")
        with as_named(variances="factor, variances"):
            return cls("low_rank", {"factor": columns, "variances": np.broadcast_to(given, columns.shape[:1])})

    @classmethod
    def stationary(
        cls, autocovariance: npt.ArrayLike | None = None, *, power: npt.ArrayLike | None = None, jitter: float = 0.0
    ) -> NoiseShape:
        """A noise that looks the same all along the row, which counts as periodic: S[i, j] = c[(i - j) mod d].

        L is the symmetric root, circulant too. Up to 512 values it is applied as a matrix; beyond, through the FFT:
        O(d log d) a row, and O(d) memory for the shape.

        Parameters
        ----------
        autocovariance : (d,) array_like
            c, at lags 0 .. d - 1; c[k] = c[d - k]. Exactly one of it and `power`.
        power : (d,) array_like
            The eigenvalues of S, sum_k c[k] exp(-2 pi i j k / d) at frequencies j = 0 .. d - 1 in the order of
            ``numpy.fft.fft``: power[j] = power[d - j], above 0. Their mean is the variance of a value.
        jitter : float, optional
            Variance of a white part that is added, for a spectrum that reaches 0.

        Returns
        -------
        NoiseShape

        Raises
        ------
        ArgumentError
            Neither or both; shape or value; a row that is not symmetric, or a power that is not positive.

        Examples
        --------
        >>> smooth = fd.NoiseShape.stationary([1.0, 0.5, 0.25, 0.5])  # covariances at distances 0, 1, 2, 1
        >>> smooth.cov()[0].round(6).tolist()
        [1.0, 0.5, 0.25, 0.5]
        """
        if (autocovariance is None) == (power is None):
            got = "neither" if power is None else "both"
            raise ArgumentError("autocovariance, power", got, "exactly one of them")
        name, value = ("power", power) if autocovariance is None else ("autocovariance", autocovariance)
        row, eps = _symmetric(name, value)
        spectrum = (row if autocovariance is None else np.fft.fft(row).real) + check_float("jitter", jitter, low=0)
        limit = len(row) * eps * max(spectrum.max(), 0.0)
        if spectrum.min() <= limit:
            got = f"a power of {spectrum.min():.3g} at frequency {spectrum.argmin()}"
            enough = 1.1 * (limit - spectrum.min()) + 1e-6 * (spectrum.max() or 1)
            wants = f"more than {limit:.3g} at all of them; jitter={enough:.2g} would lift them"
            raise ArgumentError(name, got, wants)
        with as_named(power=f"{name}, jitter"):
            return cls("stationary", {"power": spectrum})

    # -- what it does --------------------------------------------------------------------------------------

    def cov(self) -> Float64:
        """Return S, (d, d) float64.

        Examples
        --------
        >>> fd.NoiseShape.low_rank([[1.0], [0.0]]).cov().round(6).tolist()
        [[2.0, 0.0], [0.0, 1.0]]
        """
        root = self.colour(np.eye(self.d), backend="numpy")
        return np.asarray(root.T @ root, np.float64)

    def spread(self, x: Float64) -> Float64:
        """Return rows x (..., d) of float64 times S.

        Examples
        --------
        >>> fd.NoiseShape.diagonal([1.0, 4.0]).spread(np.ones((1, 2))).tolist()
        [[1.0, 4.0]]
        """
        a = self.arrays
        if self.kind == "dense":
            return np.asarray(x @ a["root"] @ a["root"].T)
        if self.kind == "stationary":
            return np.fft.irfft(np.fft.rfft(x) * a["power"][: self.d // 2 + 1], self.d)
        across = 0.0 if self.kind == "diagonal" else (x @ a["factor"]) @ a["factor"].T
        return np.asarray(x * a["variances"] + across)

    def colour(self, z: Any, *, backend: str | Backend = "auto") -> Array:
        """Return z L^T: N(0, S) where z is white.

        Parameters
        ----------
        z : (n, ...) array
            Each row holds d values, in any shape.
        backend : str or Backend, optional

        Returns
        -------
        (n, ...) array
            float32; float64 for float64 input to the numpy backend.

        Raises
        ------
        ArgumentError
            Shape, dtype or value of z.

        Examples
        --------
        >>> shape = fd.NoiseShape.diagonal([1.0, 4.0])
        >>> shape.colour(np.ones((1, 2)), backend="numpy").tolist()
        [[1.0, 2.0]]
        """
        return self._rows("z", z, backend, inverse=False)

    def whiten(self, x: Any, *, backend: str | Backend = "auto") -> Array:
        """Return x L^-T, which undoes `colour`; arguments, result and errors as there.

        Examples
        --------
        >>> shape = fd.NoiseShape.diagonal([1.0, 4.0])
        >>> shape.whiten([[1.0, 2.0]], backend="numpy").tolist()
        [[1.0, 1.0]]
        """
        return self._rows("x", x, backend, inverse=True)

    def apply(self, be: Backend, x: Array, out: Array, *, inverse: bool = False) -> None:
        """Fill `out` (n, d) with x L^T, or with x L^-T; C-contiguous arrays of the backend.

        Examples
        --------
        >>> be, x = fd.get_backend("numpy"), np.ones((1, 2), np.float32)
        >>> out = np.empty_like(x)
        >>> fd.NoiseShape.diagonal([1.0, 4.0]).apply(be, x, out)
        >>> out.tolist()
        [[1.0, 2.0]]
        """
        plan = self._inverse if inverse else self._root
        if isinstance(plan, RowMap):
            be.map_rows(x, out, plan)
        else:
            _filter(be, x, out, plan)

    def fill(self, be: Backend, out: Array, draw: Draw) -> None:
        """Fill `out` (n, d) with L z, where z has the bits of white noise.

        Examples
        --------
        >>> from fastdiff.noise import Draw, Stream
        >>> out = np.empty((3, 2), np.float32)
        >>> fd.NoiseShape.diagonal([1.0, 4.0]).fill(fd.get_backend("numpy"), out, Draw(0, Stream.FORWARD))
        >>> np.allclose(out, fd.normal((3, 2), seed=0, stream="forward", backend="numpy") * [1, 2])
        True
        """
        if isinstance(self._root, RowMap):
            be.mapped_normal(out, self._root, draw)
        else:
            be.normal(out, draw)
            _filter(be, out, out, self._root)

    def _rows(self, argument: str, value: Any, backend: str | Backend, *, inverse: bool) -> Array:
        be = backend_for(backend, **{argument: value})
        given = _states(argument, value, be)
        if _width(given.shape) != self.d:
            raise ArgumentError(argument, f"shape {given.shape}", f"rows of {self.d} values")
        rows = given.reshape(len(given), self.d)
        out = be.empty(rows.shape, rows.dtype)
        self.apply(be, rows, out, inverse=inverse)
        return to_caller(be, out.reshape(given.shape), is_on_device(value))

    def __eq__(self, other: object) -> bool:
        """Whether both have the same kind and the same numbers, to the bit."""
        if not isinstance(other, NoiseShape):
            return NotImplemented
        return self.kind == other.kind and all(np.array_equal(a, other.arrays[n]) for n, a in self.arrays.items())

    def __hash__(self) -> int:
        return hash((self.kind, *(array.tobytes() for array in self.arrays.values())))

    def __repr__(self) -> str:
        return f"<NoiseShape {self.kind}: {self.d} values>"

    def __reduce__(self) -> tuple[Callable[..., NoiseShape], tuple[str, dict[str, Float64]]]:
        return NoiseShape, (self.kind, dict(self.arrays))


# -- the kinds -------------------------------------------------------------------------------------------------


def _diagonal(variances: Float64) -> _Maps:
    deviations = np.sqrt(_positive("variances", variances))
    return _Maps(RowMap(scale=deviations), RowMap(scale=1 / deviations), np.log(deviations).sum())


def _dense(root: Float64) -> _Maps:
    from scipy.linalg import solve_triangular

    check_array("root", root, min_ndim=2, shape=root.shape[:1] * 2)
    if np.triu(root, 1).any():
        raise ArgumentError("root", "values above its diagonal", "a lower triangular matrix")
    diagonal = _positive("root", np.diag(root))
    inverse = solve_triangular(root, np.eye(len(root)), lower=True)
    there, back = (RowMap(left=np.ascontiguousarray(matrix.T)) for matrix in (root, inverse))
    return _Maps(there, back, np.log(diagonal).sum())


def _low_rank(factor: Float64, variances: Float64) -> _Maps:
    deviations = np.sqrt(_positive("variances", variances))
    check_array("factor", factor, shape=(len(deviations), None))
    if factor.size == 0:
        raise ArgumentError("factor", f"shape {factor.shape}", "at least one column")
    basis, s, _ = np.linalg.svd(check_array("factor", factor / deviations[:, None]), full_matrices=False)
    across = np.ascontiguousarray(basis.T)
    stretch = np.hypot(1, s)  # (1 + s^2)^1/2
    rise = s * (s / (1 + stretch))  # that less 1, without cancellation
    return _Maps(
        RowMap(scale=deviations, left=basis, right=rise[:, None] * (across * deviations)),
        RowMap(scale=1 / deviations, left=basis / deviations[:, None], right=(-rise / stretch)[:, None] * across),
        np.log(deviations).sum() + np.log(stretch).sum(),
    )


def _stationary(power: Float64) -> _Maps:
    row = _positive("power", _symmetric("power", power)[0])
    deviations = np.sqrt(row)
    return _Maps(_circulant(deviations), _circulant(1 / deviations), np.log(row).sum() / 2)


def _circulant(eigenvalues: Float64) -> RowMap | _Filter:
    """A symmetric circulant map, from its eigenvalues (d,) in the order of ``fft``."""
    d = len(eigenvalues)
    gain = eigenvalues[: d // 2 + 1]
    if d > MATRIX_LIMIT:
        return _Filter(gain, WeakKeyDictionary())
    row, k = np.fft.irfft(gain, d), np.arange(d)
    return RowMap(left=row[(k[:, None] - k) % d])


_KINDS: dict[str, tuple[tuple[str, ...], Callable[..., _Maps]]] = {
    "diagonal": (("variances",), _diagonal),
    "dense": (("root",), _dense),
    "low_rank": (("factor", "variances"), _low_rank),
    "stationary": (("power",), _stationary),
}


def _positive(argument: str, values: Float64) -> Float64:
    row = _row(argument, values)
    if row.min() <= 0:
        raise ArgumentError(argument, f"{row.min():.3g} at index {row.argmin()}", "numbers above 0")
    return row


def _symmetric(argument: str, given: Any) -> tuple[Float64, float]:
    """A row (d,) with row[k] = row[d - k] to rounding of its dtype, and that rounding unit."""
    row = _row(argument, given)
    eps = float(np.finfo(row.dtype if row.dtype.kind == "f" else np.float64).eps)
    values = row.astype(np.float64)
    mirror = np.roll(values[::-1], 1)
    skew = np.abs(values - mirror)
    if skew.max() > np.sqrt(eps) * np.abs(values).max():
        k, d = int(skew.argmax()), len(row)
        wants = "the same at k and d - k, for rows are periodic: a function of min(k, d - k)"
        raise ArgumentError(argument, f"{row[k]:.6g} at index {k} and {row[-k]:.6g} at {d - k}", wants)
    return (values + mirror) / 2, eps


def _row(argument: str, given: Any) -> npt.NDArray[Any]:
    row = check_array(argument, given, shape=(None,))
    if row.size == 0:
        raise ArgumentError(argument, "no values", "at least one")
    return row


def _filter(be: Backend, x: Array, out: Array, plan: _Filter) -> None:
    """The circulant map in `out` (n, d), which may be x; NumPy hands the arrays of other libraries to their own FFT."""
    kept = plan.kept.setdefault(be, {})
    if x.dtype not in kept:
        kept[x.dtype] = be.asarray(plan.gain, x.dtype)
    d = x.shape[1]
    rows = max(1, (FFT_VALUES if isinstance(x, np.ndarray) else BATCH_VALUES) // d)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        out[part] = np.fft.irfft(np.fft.rfft(x[part]) * kept[x.dtype], d)
