"""What is known of a sample: single values, linear maps of it, or how likely one takes it to be.

For `fastdiff.sample` and exact models observations are in the denoiser's space, for a `Diffusion` in the data's units.
One of them may hold one observation or N of them, which are of N different samples; a list of them is of the same
samples, where one that holds one counts for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import backend_for
from fastdiff.errors import ArgumentError, check_array, check_float, is_on_device

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Known:
    """Some values of a sample, seen exactly or with normal noise.

    Attributes
    ----------
    values : array of the shape of one sample, or (N, ...)
        NaN: unknown. Real floats or integers; kept as a copy of the same dtype.
    noise : float or array that broadcasts to one sample
        Standard deviation of what was seen about what is; 0: exact.

    Raises
    ------
    ArgumentError
        Values that are infinite or no real numbers; a noise that is negative or not finite.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), [[1.0, 0.9], [0.9, 1.0]], s)
    >>> law.given(fd.Known([1.0, np.nan])).data.mean.round(6).tolist()  # the second follows the first
    [1.0, 0.9]
    >>> law.given(fd.Known([1.0, np.nan], noise=1.0)).data.mean.round(6).tolist()  # seen with an error
    [0.5, 0.45]
    """

    values: Any
    noise: Any = 0.0

    def __post_init__(self) -> None:
        values = _on_host("values", self.values)
        if np.isinf(values).any():
            raise ArgumentError("values", "infinity", "finite values, and NaN where nothing is known")
        _put(self, values=values, noise=_deviations(self.noise))


@dataclass(frozen=True, eq=False)
class Linear:
    """Values of ``A x + noise z``, with z standard normal: means, differences, blurs, projections of a sample x.

    Attributes
    ----------
    A : (m, d) or (m, ...) array
        A row for each observed value, flat or of the shape of one sample.
    y : (m,) or (N, m) array
        What was seen.
    noise : float or (m,) array
        Standard deviation; 0: exact.

    Raises
    ------
    ArgumentError
        Shapes that disagree; values that are not finite; a negative noise.

    Examples
    --------
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.eye(2), fd.Schedule.cosine(20))
    >>> total = fd.Linear([[1.0, 1.0]], [3.0], noise=0.0)  # the sum of both is 3
    >>> law.given(total).data.mean.round(6).tolist()
    [1.5, 1.5]
    """

    A: Any
    y: Any
    noise: Any

    def __post_init__(self) -> None:
        A, y = check_array("A", _on_host("A", self.A), min_ndim=2), check_array("y", _on_host("y", self.y), min_ndim=1)
        noise = _deviations(self.noise)
        if y.ndim > 2 or y.shape[-1] != len(A):
            raise ArgumentError("y", f"shape {y.shape}", f"shape ({len(A)},) or (N, {len(A)}), one for each row of A")
        if noise.shape not in ((), (len(A),)):
            raise ArgumentError("noise", f"shape {noise.shape}", f"one number, or ({len(A)},)")
        _put(self, A=A, y=y, noise=noise)


@dataclass(frozen=True, eq=False)
class Weight:
    """Any other law to multiply with, known by the logarithm of a weight: the result's density is p(x) w(x) / Z.

    Attributes
    ----------
    function : callable
        Of samples x0 (n, ...), it returns their log weights (n,) and the gradients (n, ...) of these by x0. A log
        weight of minus infinity excludes a sample.
    scale : float, optional
        The weight's power, above 0: log weights and gradients are multiplied by it. With the log probability of a class
        it is the scale of classifier guidance (Dhariwal and Nichol 2021).

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(1), np.eye(1), s)
    >>> larger = fd.Weight(lambda x: (x[:, 0], np.ones_like(x)))  # w(x) = exp(x): N(0, 1) becomes N(1, 1)
    >>> draws = fd.sample(law, fd.samplers.ddpm(s), n=400, given=larger, method="smc", backend="numpy")
    >>> bool(abs(draws.mean() - 1) < 0.3)
    True
    """

    function: Callable[[Any], tuple[Any, Any]]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError("function", type(self.function).__name__, "a callable x0 -> (log weights, gradients)")
        object.__setattr__(self, "scale", check_float("scale", self.scale, low=0, low_open=True))

    def log_weights(self, x0: Any, where: str = "") -> Float64:
        """Return the checked log weights (n,) of samples (n, ...); `where` tells an error what they are of.

        Raises
        ------
        ArgumentError
            Another shape than (n,), NaN or plus infinity; it names the sample.

        Examples
        --------
        >>> fd.Weight(lambda x: (x[:, 0], np.ones_like(x)), scale=2.0).log_weights(np.array([[1.0], [3.0]])).tolist()
        [2.0, 6.0]
        """
        given = self._called(x0)
        weights = check_array("Weight.function", given[0], shape=(len(x0),), finite=False, dtype=np.float64)
        bad = np.flatnonzero(np.isnan(weights) | (weights == np.inf))
        if len(bad):
            wants = "numbers, or minus infinity"
            raise ArgumentError("Weight.function", f"log weight {weights[bad[0]]} for sample {bad[0]}{where}", wants)
        return weights if self.scale == 1 else weights * self.scale

    def gradients(self, x0: Any, where: str = "") -> Float64:
        """Return the checked gradients of the log weights, like x0; `where` tells an error what they are of.

        Raises
        ------
        ArgumentError
            Another shape than that of x0, or values that are not finite; it names the sample.

        Examples
        --------
        >>> fd.Weight(lambda x: (x[:, 0], np.ones_like(x)), scale=2.0).gradients(np.array([[1.0], [3.0]])).tolist()
        [[2.0], [2.0]]
        """
        given = self._called(x0)
        slopes = check_array("Weight.function", given[1], shape=tuple(x0.shape), finite=False, dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(slopes.reshape(len(slopes), -1)).all(axis=1))
        if len(bad):
            came = f"a gradient for sample {bad[0]}{where} that is not finite"
            raise ArgumentError("Weight.function", came, "finite ones")
        return slopes if self.scale == 1 else slopes * self.scale

    def _called(self, x0: Any) -> Any:
        given = self.function(x0)
        if not isinstance(given, tuple) or len(given) != 2:
            raise ArgumentError("Weight.function", type(given).__name__, "a pair (log weights, gradients)")
        return given


class Group(NamedTuple):
    """Observations of several samples through the same rows: ``y = A x + noise z``.

    Attributes
    ----------
    indices : (g,) int64
        Which of the N samples.
    A : (m, d) float64
    y : (g, m) float64
    noise : (m,) float64
    """

    indices: npt.NDArray[np.int64]
    A: Float64
    y: Float64
    noise: Float64


@dataclass(frozen=True, eq=False)
class Observations:
    """All that is known of one sample, or of N of them, in one form: see `observations`.

    Attributes
    ----------
    d : int
        Size of a sample.
    count : int or None
        N; None: what was given holds one observation.
    known : tuple of (values, noise)
        Of each `Known`: (1 or N, d) float64 with NaN where nothing is known, and (d,) float64.
    linear : tuple of (A, y, noise)
        Of each `Linear`: (m, d), (1 or N, m) and (m,) float64.
    weights : tuple of Weight
    dtype : dtype
        That holds all known values as they were given.
    numbers : tuple of int, optional
        Which observations these are, by the noise law, where they are a part of others.
    firsts : (N,) int64 array, optional
        Instead of that, the sample index of the one draw of each.
    root : (d, d) float64 array, optional
        What is seen is ``root x``, of which a row of A, or a known value, takes its part.
    """

    d: int
    count: int | None
    known: tuple[tuple[Float64, Float64], ...]
    linear: tuple[tuple[Float64, Float64, Float64], ...]
    weights: tuple[Weight, ...]
    dtype: npt.DTypeLike = np.float32
    numbers: tuple[int, ...] | None = None
    firsts: npt.NDArray[np.int64] | None = None
    root: Float64 | None = None

    @property
    def nothing(self) -> bool:
        """Whether nothing at all is known."""
        return not self.weights and not any(len(A) for A, _, _ in self.linear) and not self.mask.any()

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """(1 or N, d): which values some `Known` tells."""
        mask = np.zeros((1, self.d), bool)
        for values, _ in self.known:
            mask = mask | ~np.isnan(values)
        return mask

    def some(self, indices: npt.NDArray[np.int64], first: int = 0) -> Observations:
        """Return those of some of the N samples, which are observations from number `first` on by the noise law."""
        known = tuple((values[indices] if len(values) > 1 else values, noise) for values, noise in self.known)
        linear = tuple((A, y[indices] if len(y) > 1 else y, noise) for A, y, noise in self.linear)
        return replace(self, count=len(indices), known=known, linear=linear, numbers=tuple((indices + first).tolist()))

    def groups(self) -> Iterator[Group]:
        """Yield the linear observations, those together whose rows are the same; their indices cover 0 .. N - 1."""
        n = 1 if self.count is None else self.count
        masks = [np.broadcast_to(~np.isnan(values), (n, self.d)) for values, _ in self.known]
        joined = np.concatenate(masks, axis=1) if masks else np.zeros((n, 0), bool)
        patterns, which = np.unique(joined, axis=0, return_inverse=True)
        for k, pattern in enumerate(patterns):
            indices = np.flatnonzero(which.reshape(-1) == k)
            A, y, noise = [np.zeros((0, self.d))], [np.zeros((len(indices), 0))], [np.zeros(0)]
            for (values, deviation), seen in zip(self.known, pattern.reshape(-1, self.d), strict=True):
                A.append(np.zeros((int(seen.sum()), self.d)))
                A[-1][np.arange(len(A[-1])), np.flatnonzero(seen)] = 1
                y.append(np.broadcast_to(values, (n, self.d))[indices][:, seen])
                noise.append(deviation[seen])
            for rows, values, deviation in self.linear:
                A.append(rows)
                y.append(np.broadcast_to(values, (n, len(rows)))[indices])
                noise.append(deviation)
            rows = np.concatenate(A) if self.root is None else np.concatenate(A) @ self.root
            yield Group(indices, rows, np.concatenate(y, axis=1), np.concatenate(noise))


Given = Known | Linear | Weight | Sequence[Known | Linear | Weight] | Observations


def observations(given: Given, shape: tuple[int, ...]) -> Observations:
    """Return what is known of samples of a shape, in one form.

    Parameters
    ----------
    given : Known, Linear or Weight, or a list of them
    shape : tuple of int
        Of one sample.

    Returns
    -------
    Observations

    Raises
    ------
    ArgumentError
        It is none of these, is of samples of another shape, or its numbers of observations differ.
    """
    d = math.prod(shape)
    if isinstance(given, Observations):
        if given.d != d:
            raise ArgumentError("given", f"observations of {given.d} values", f"of {d} values, shape {shape}")
        return given
    items = [given] if isinstance(given, (Known, Linear, Weight)) else given
    if not isinstance(items, (list, tuple)):
        raise ArgumentError("given", type(given).__name__, "fd.Known, fd.Linear, fd.Weight, or a list of them")
    known, linear, weights, counts = [], [], [], []
    for k, item in enumerate(items):
        name = "given" if item is given else f"given[{k}]"
        if isinstance(item, Known):
            values = item.values
            if values.shape[-len(shape) :] != shape or values.ndim > len(shape) + 1:
                raise ArgumentError(name, f"values of shape {values.shape}", f"shape {shape}, or N of them")
            try:
                noise = np.broadcast_to(item.noise, shape)
            except ValueError:
                wants = f"one number, or what broadcasts to {shape}"
                raise ArgumentError(name, f"noise of shape {item.noise.shape}", wants) from None
            known.append((values.reshape(-1, d).astype(np.float64), noise.reshape(d)))
            counts += [(name, len(values))] if values.ndim > len(shape) else []
        elif isinstance(item, Linear):
            m = len(item.A)
            if item.A.shape[1:] not in ((d,), shape):
                raise ArgumentError(name, f"A of shape {item.A.shape}", f"({m}, {d}), or rows of shape {shape}")
            A, y = item.A.reshape(m, d).astype(np.float64), np.atleast_2d(item.y).astype(np.float64)
            linear.append((A, y, np.broadcast_to(item.noise, (m,))))
            counts += [(name, len(item.y))] if item.y.ndim > 1 else []
        elif isinstance(item, Weight):
            weights.append(item)
        else:
            raise ArgumentError(name, type(item).__name__, "fd.Known, fd.Linear or fd.Weight")
    for name, count in counts:
        if count != counts[0][1]:
            raise ArgumentError(name, f"{count} observations", f"{counts[0][1]}, as {counts[0][0]} has, or one for all")
    dtype = np.result_type(np.float32, *(item.values.dtype for item in items if isinstance(item, Known)))
    return Observations(d, counts[0][1] if counts else None, tuple(known), tuple(linear), tuple(weights), dtype)


def _on_host(argument: str, value: Any) -> npt.NDArray[Any]:
    """A copy in NumPy."""
    array = check_array(argument, value, finite=False)
    if is_on_device(array):
        be = backend_for("auto", **{argument: array})
        array = be.to_numpy(be.asarray(array, array.dtype))
    return np.array(array)


def _deviations(noise: Any) -> Float64:
    array = check_array("noise", _on_host("noise", noise)).astype(np.float64)
    if array.size and array.min() < 0:
        raise ArgumentError("noise", f"{array.min():g}", "a standard deviation, at least 0")
    return array


def _put(item: Known | Linear, **arrays: npt.NDArray[Any]) -> None:
    for name, array in arrays.items():
        array.setflags(write=False)
        object.__setattr__(item, name, array)
