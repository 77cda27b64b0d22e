"""What a sampler needs of a denoiser, and how what a caller gives becomes one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, Row, TmpdPlan
from fastdiff.errors import ArgumentError, check_array, check_indices, is_on_device
from fastdiff.noise import Draw

ANY_CLASSES = 1 << 62  # of a denoiser that does not say how many it has, or whether it has any


class CovariateForm(NamedTuple):
    """The covariates of a sample, and how a denoiser takes them.

    Attributes
    ----------
    shape : tuple of int
        (k,), or with k numbers for each point or pixel (points, k) or (height, width, k).
    each : bool
        Whether the 1 that says that they are there follows those of each point, and not all of them.
    """

    shape: tuple[int, ...]
    each: bool = False

    @property
    def columns(self) -> int:
        """How many numbers a denoiser takes of a sample, the 1s among them."""
        return math.prod(self.shape) + (math.prod(self.shape[:-1]) if self.each else 1)

    def marked(self, be: Backend, covariates: Array) -> Array:
        """Return covariates (n, *shape) as a denoiser on a backend takes them, (n, columns)."""
        n, width = len(covariates), self.shape[-1] if self.each else math.prod(self.shape)
        numbers = be.empty((n, self.columns // (width + 1), width + 1), covariates.dtype)
        numbers[..., :-1] = be.asarray(covariates, covariates.dtype).reshape(n, -1, width)
        numbers[..., -1] = 1
        return numbers.reshape(n, -1)


def covariate_form(denoiser: Any) -> CovariateForm | None:
    """Return what covariates a denoiser has."""
    form: CovariateForm | None = getattr(denoiser, "covariate_form", None)
    count = getattr(denoiser, "covariates", None)
    return CovariateForm((count,)) if form is None and isinstance(count, int) else form


@dataclass(frozen=True, eq=False)
class Asked:
    """What samples are asked for: passed as `labels` where that is more than labels.

    Attributes
    ----------
    labels : (n,) int64 array or None
    covariates : (n, columns) array or None
        The numbers, and a 1 or several: see `CovariateForm`; or zeros, where nothing is asked.
    known : (n, 2 D) array or None
        What is known of the samples themselves, of a network that is told so: the values, 0 where they are not known,
        and then for each 1 where it is known, and 0.
    """

    labels: Array | None
    covariates: Array | None = None
    known: Array | None = None

    @property
    def parts(self) -> tuple[Array | None, Array | None, Array | None]:
        return self.labels, self.covariates, self.known

    def __len__(self) -> int:
        return len(next(part for part in self.parts if part is not None))

    def __getitem__(self, part: slice) -> Asked:
        return Asked(*(None if array is None else array[part] for array in self.parts))


def asked_parts(labels: Array | Asked | None) -> Asked:
    """Return what is passed as labels in its parts."""
    return labels if isinstance(labels, Asked) else Asked(labels)


def checked_asked(
    denoiser: Any, labels: Any, covariates: Any, n: int, *, dtype: npt.DTypeLike = np.float32
) -> tuple[Any, Any]:
    """Return the classes of n samples (n,) int64 and their covariates (n, ...), or None, as a denoiser wants them.

    Raises
    ------
    ArgumentError
        Something is asked for that it does not know, or is missing, or of another shape or range.
    """
    classes, form = denoiser.classes, covariate_form(denoiser)
    free = getattr(denoiser, "asks_nothing", False)
    if labels is not None:
        if classes is None:
            raise ArgumentError("labels", type(labels).__name__, "None: this network has no classes")
        labels = check_indices("labels", labels, classes, n)
    elif classes not in (None, ANY_CLASSES) and not free:
        wants = f"a class from 0 to {classes - 1} for each sample: this one has classes"
        raise ArgumentError("labels", "None", wants)
    if covariates is None:
        if form is not None and not free:
            wants = f"{_shown(form.shape)} numbers for each sample: this one has covariates"
            raise ArgumentError("covariates", "None", wants)
        return labels, None
    if form is None:
        raise ArgumentError("covariates", type(covariates).__name__, "None: this network has no covariates")
    return labels, check_covariates(covariates, form.shape, n, dtype)


def check_covariates(covariates: Any, shape: tuple[int, ...] | None, n: int, dtype: npt.DTypeLike = np.float64) -> Any:
    """Return covariates as (n, *shape): given so, as (n,) numbers for one column, or one sample's for all of them.

    `shape` None: as many columns as there are.
    """
    array = check_array("covariates", covariates, dtype=dtype)
    if shape is not None and len(shape) > 1:
        if array.shape == shape and not is_on_device(array):
            array = np.broadcast_to(array, (n, *shape))
        if array.shape != (n, *shape):
            wants = f"shape {(n, *shape)}: {shape[-1]} of each point, for each sample"
            raise ArgumentError("covariates", f"shape {array.shape}", wants)
        return array
    columns = None if shape is None else shape[0]
    if array.ndim == 1 and len(array) == n and columns in (None, 1):
        array = array.reshape(n, 1)
    elif array.ndim < 2 and array.size == columns and not is_on_device(array):
        array = np.broadcast_to(array.reshape(1, -1), (n, array.size))
    if array.ndim != 2 or len(array) != n or array.shape[1] not in ((columns,) if columns else range(1, 1 << 16)):
        wants = f"shape ({n}, {columns or 'k'}): so many numbers for each sample"
        raise ArgumentError("covariates", f"shape {array.shape}", wants)
    return array


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else " x ".join(map(str, shape))


def asked_on(be: Backend, denoiser: Any, labels: Any, covariates: Any, known: Any = None) -> Array | Asked | None:
    """Return what is asked of samples as a denoiser on a backend takes it.

    Of (n,) labels, covariates (n, ...), and what is known (n, 2 D), or None.
    """
    labels = None if labels is None else be.asarray(labels, np.int64)
    form = covariate_form(denoiser)
    if known is None and (covariates is None or form is None):
        return labels
    return Asked(labels, None if covariates is None or form is None else form.marked(be, covariates), known)


class Evaluator(ABC):
    """A denoiser on a backend, on flat states (n, D).

    Arrays are the backend's own and are not checked; labels are (n,) int64, or `Asked`. A subclass has `be`, and
    `evaluate`.
    """

    be: Backend

    @abstractmethod
    def evaluate(self, x: Array, t: int, labels: Array = None) -> Array:
        """Return the output (n, D) for x (n, D), or (2, n, D) with a learned variance; valid until the next call."""

    def vjp(self, x: Array, t: int, cotangent: Array, labels: Array = None) -> Array:
        """Return J^T times a cotangent, J being the Jacobian of the output by x.

        Parameters
        ----------
        x : (n, D) array
        t : int
        cotangent : (n, D) or (k, n, D) array
            One vector for each state, or k of them.
        labels : (n,) int64 array, optional

        Returns
        -------
        array like the cotangent
            The gradient of <output, cotangent> by x; valid until the next call.

        Raises
        ------
        ArgumentError
            Nothing is known of the denoiser's derivatives.
        """
        raise _no_derivatives("vjp")

    def pulled(self, x: Array, t: int, cotangent: Array, labels: Array = None) -> tuple[Array, Array]:
        """Return what `evaluate` and `vjp` return, from one forward pass where the denoiser can."""
        out = self.evaluate(x, t, labels)
        return out, self.vjp(x, t, cotangent, labels)

    def jvp(self, x: Array, t: int, tangent: Array, labels: Array = None) -> Array:
        """Return J times a tangent, the derivative of the output along it; see `vjp`."""
        raise _no_derivatives("jvp")

    def step(
        self,
        x: Array,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array = None,
    ) -> None:
        """Change x, and the memory of the rows before, by one row of a table: see `Backend.sampler_step`."""
        out = self.evaluate(x, row.t, labels) if row.evaluates else None
        if row.r != 0 and (out is None or out.ndim == x.ndim):
            wants = "shape (2, n, ...), a prediction and a variance, as the table asks for"
            raise ArgumentError("denoiser output", f"shape (n, ...) at t = {row.t}", wants)
        self.be.sampler_step(x, out, memory, row, clip, draw.at(row.step))

    def run_table(
        self, x: Array, rows: tuple[Row, ...], clip: tuple[float, float] | None, draw: Draw, labels: Array = None
    ) -> None:
        """Change x by all rows of a table, one after the other."""
        memory = memory_of(self.be, x, rows)
        for row in rows:
            self.step(x, memory, row, clip, draw, labels)

    def run_tmpd(self, x: Array, rows: tuple[Row, ...], draw: Draw, tmpd: TmpdPlan) -> bool:
        """Change x by all rows of a table as `fastdiff.conditioning` does by tmpd, in one piece; False: not here."""
        return False


def _no_derivatives(name: str) -> ArgumentError:
    wants = f"one with derivatives: a network, an exact denoiser, or an object with .{name}(x, t, vector)"
    return ArgumentError("denoiser", "a function", wants)


def memory_of(be: Backend, x: Array, rows: tuple[Row, ...]) -> tuple[Array, ...]:
    """Return room for m of the rows before: as many arrays like x as the table is deep, zero at first."""
    memory = tuple(be.empty(x.shape, x.dtype) for _ in range(max((row.depth for row in rows), default=0)))
    for array in memory:
        array.fill(0)
    return memory


@runtime_checkable
class Denoiser(Protocol):
    """What can be sampled from: a network, a network with frozen weights, an exact denoiser, or `denoiser_of` others.

    Attributes
    ----------
    T : int or None
        Number of timesteps; None: not known, as for the other two.
    prediction : {"noise", "x0", "v", "velocity"} or None
        What the output is.
    shape : tuple of int or None
        Shape of one sample.
    classes : int or None
        How many classes there are; None: it takes no labels. `ANY_CLASSES`: not known.

    It may have an attribute `learned_variance`: whether its output is (2, n, D), as tables with an r want it; and
    `covariates`: how many numbers it is asked for beside a label, where it is not None, or `covariate_form`;
    `asks_nothing`: whether it does without both; `masked`: whether it is told what is known of its samples; and
    `exact`: whether it is the mean given x, of which derivatives are covariances.
    """

    @property
    def T(self) -> int | None: ...

    @property
    def prediction(self) -> str | None: ...

    @property
    def shape(self) -> tuple[int, ...] | None: ...

    @property
    def classes(self) -> int | None: ...

    def on(self, be: Backend, shape: tuple[int, ...]) -> Evaluator:
        """Return it on a backend, for samples of this shape."""


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A denoiser around another one: what it does not say itself is that one's.

    Attributes
    ----------
    inner : Denoiser
    """

    inner: Denoiser

    @property
    def T(self) -> int | None:
        return self.inner.T

    @property
    def prediction(self) -> str | None:
        return self.inner.prediction

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.inner.shape

    @property
    def classes(self) -> int | None:
        return self.inner.classes

    @property
    def covariate_form(self) -> CovariateForm | None:
        return covariate_form(self.inner)

    @property
    def asks_nothing(self) -> bool:
        """Whether labels and covariates do not matter."""
        return bool(getattr(self.inner, "asks_nothing", False))

    @property
    def learned_variance(self) -> bool:
        return bool(getattr(self.inner, "learned_variance", False))


_denoisers: WeakSet[type] = WeakSet()  # known to be: to ask takes 12 us, some percent of sampling one curve


def denoiser_of(value: Any) -> Denoiser:
    """Return a denoiser: `value` itself, or one that calls a function or an object's ``predict``.

    Raises
    ------
    ArgumentError
        It is none of these.
    """
    outputs, image = getattr(value, "outputs", None), getattr(value, "image", None)
    if isinstance(outputs, int) and isinstance(image, tuple) and outputs not in (image[-1], 2 * image[-1]):
        wants = f"{image[-1]}, as many as there are channels, or twice as many for a learned variance"
        raise ArgumentError("denoiser", f"a network of {outputs} outputs", wants)
    if type(value) in _denoisers or isinstance(value, Denoiser):
        _denoisers.add(type(value))
        known: Denoiser = value
        return known
    function = getattr(value, "predict", value)
    if not callable(function):
        raise ArgumentError("denoiser", type(value).__name__, "a callable (x, t), or an object with .predict(x, t)")
    claims = {name: getattr(value, name, None) for name in ("T", "prediction", "shape")}
    return _Given(
        function,
        claims["T"],
        claims["prediction"] if isinstance(claims["prediction"], str) else None,
        claims["shape"] if isinstance(claims["shape"], tuple) else None,
        getattr(value, "classes", ANY_CLASSES),
        {name: product for name in ("vjp", "jvp") if callable(product := getattr(value, name, None))},
    )


@dataclass(frozen=True)
class _Given:
    """A function (x, t), or (x, t, labels), as a denoiser; it may return a prediction and a variance."""

    learned_variance = True

    function: Callable[..., Any]
    T: int | None
    prediction: str | None
    shape: tuple[int, ...] | None
    classes: int | None
    products: dict[str, Callable[..., Any]]

    def on(self, be: Backend, shape: tuple[int, ...]) -> Evaluator:
        return _Calls(be, self.function, shape, self.products)


class _Calls(Evaluator):
    """A caller's function, which gets a copy of the states and returns arrays of any kind."""

    def __init__(
        self,
        be: Backend,
        function: Callable[..., Any],
        shape: tuple[int, ...],
        products: dict[str, Callable[..., Any]],
    ) -> None:
        self.be, self.function, self.shape, self.products = be, function, shape, products

    def evaluate(self, x: Array, t: int, labels: Array = None) -> Array:
        return self._call(self.function, "output", x, t, labels)

    def vjp(self, x: Array, t: int, cotangent: Array, labels: Array = None) -> Array:
        return self._product("vjp", x, t, cotangent, labels)

    def jvp(self, x: Array, t: int, tangent: Array, labels: Array = None) -> Array:
        return self._product("jvp", x, t, tangent, labels)

    def _product(self, name: str, x: Array, t: int, vector: Array, labels: Array) -> Array:
        if name not in self.products:
            raise _no_derivatives(name)
        if vector.ndim == x.ndim:
            return self._call(self.products[name], name, x, t, labels, vector)
        out = self.be.empty(vector.shape, x.dtype)
        for i in range(len(vector)):
            out[i] = self._call(self.products[name], name, x, t, labels, vector[i])
        return out

    def _call(self, function: Callable[..., Any], name: str, x: Array, t: int, labels: Array, *vectors: Array) -> Array:
        state, *others = (self._copy(array) for array in (x, *vectors))
        given = function(state, t, *others) if labels is None else function(state, t, *others, labels)
        out = check_array(f"denoiser {name}", given, finite=False, dtype=x.dtype)  # host arrays are sent
        if out.shape != state.shape and (name != "output" or out.shape != (2, *state.shape)):
            raise ArgumentError(f"denoiser {name}", f"shape {out.shape}", f"shape {state.shape}, like x")
        return self.be.asarray(out, x.dtype).reshape(*out.shape[: out.ndim - state.ndim], *x.shape)

    def _copy(self, x: Array) -> Array:
        copy = self.be.empty((len(x), *self.shape), x.dtype)
        copy[...] = x.reshape(copy.shape)
        return copy
