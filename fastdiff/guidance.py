"""Guidance: what is asked of samples counts more than it does in the data.

Classifier-free guidance (Ho and Salimans 2022) evaluates a denoiser twice, with what is asked for, c, and without it,
u, and goes on from the one through the other:

    out = u + g (c - u)

g = 1 asks as the data do, g = 0 asks nothing. A g above 1 makes samples more typical of what is asked for, and less
various. They are not those of the powered law p(x) (p(x | c) / p(x))^g: scores of noised laws do not add up to that
of the noised product, and what comes out depends on the sampler (Bradley and Nakkiran 2024).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, ChainTable, Row, backend_for
from fastdiff.conditioning import Conditioned
from fastdiff.denoiser import (
    ANY_CLASSES,
    Asked,
    Denoiser,
    Evaluator,
    Wrapped,
    asked_on,
    asked_parts,
    checked_asked,
    denoiser_of,
)
from fastdiff.errors import (
    ArgumentError,
    QualityWarning,
    as_named,
    check_array,
    check_float,
    check_int,
    check_timesteps,
    shown,
)
from fastdiff.noise import Draw
from fastdiff.schedule import Schedule

MOST_GUIDANCE = 1e6


class Guided(Wrapped):
    """A denoiser that follows what is asked of it with a weight: u + g (c - u).

    Parameters
    ----------
    denoiser : denoiser of any kind
        What gives c: a network that was trained with labels or covariates left out at times (`fit` does so with
        networks that have a null class), a function ``(x, t, labels)``, or another denoiser.
    guidance : float
        g, at least 0. With 1 the denoiser is evaluated once, and has its own bits; with 0 it is asked for nothing.
    unconditional : denoiser, optional
        What gives u. By default the denoiser itself, asked for nothing: a network for its null class and with no
        covariates, and a function ``(x, t)`` without labels.
    interval : (int, int), optional
        Guide at timesteps from the first to the second alone, and take c elsewhere (Kynkaanniemi et al. 2024). By
        default everywhere.
    rescale : float, optional
        phi from 0 to 1: the output is multiplied by phi std(c) / std(out) + 1 - phi, which takes back what guidance
        adds to its deviation (Lin et al. 2024).

    Raises
    ------
    ArgumentError
        A value is not what it should be; a network that cannot be asked for nothing; denoisers that disagree.

    Examples
    --------
    >>> schedule = fd.Schedule.cosine(100)
    >>> of_class, of_all = (fd.denoisers.Gaussian(np.zeros(2), v * np.eye(2), schedule) for v in (1.0, 2.0))
    >>> new = fd.sample(fd.Guided(of_class, 3.0, of_all), fd.samplers.ddim(schedule, 50), n=16)
    """

    def __init__(
        self,
        denoiser: Any,
        guidance: float,
        unconditional: Any = None,
        *,
        interval: tuple[int, int] | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(source := denoiser_of(denoiser))
        self.guidance = check_float("guidance", guidance, low=0, high=MOST_GUIDANCE)
        self.rescale = check_float("rescale", rescale, low=0, high=1)
        with as_named(denoiser="unconditional"):
            self.unconditional = None if unconditional is None else denoiser_of(unconditional)
        self._joint = getattr(source, "asked_freely", None) is not None and unconditional is None
        self.interval = None if interval is None else _checked_interval(interval, source.T)
        if self.unconditional is not None:
            for name in ("T", "prediction", "shape"):
                ours, theirs = getattr(source, name), getattr(self.unconditional, name)
                if None not in (ours, theirs) and ours != theirs:
                    raise ArgumentError("unconditional", f"{name} {theirs!r}", f"{ours!r}, as the denoiser has")
        elif self._joint and not getattr(source, "asked_freely", False):
            if source.classes is None:
                raise ArgumentError(
                    "guidance", shown(guidance), "None: this network has neither classes nor covariates"
                )
            wants = "None, or a network with a null class, which new ones with classes have: make and train one"
            raise ArgumentError("guidance", shown(guidance), wants)
        elif isinstance(source, Conditioned):
            wants = "a denoiser that is not given observations: fd.condition(fd.Guided(...), given)"
            raise ArgumentError("denoiser", type(source).__name__, wants)
        elif not self._joint and source.classes is None:
            raise ArgumentError("unconditional", "None", "a second denoiser: the first one takes no labels")

    @property
    def schedule(self) -> Schedule | None:
        return getattr(self.inner, "schedule", None)

    @property
    def masked(self) -> bool:
        """Whether it is told what is known of its samples."""
        return bool(getattr(self.inner, "masked", False))

    @property
    def asks_nothing(self) -> bool:
        """Whether labels and covariates do not matter."""
        return self.guidance == 0 and self.interval is None

    def weight(self, t: int) -> float:
        """Return g at a timestep.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> guided = fd.Guided(law, 3.0, law, interval=(5, 15))
        >>> guided.weight(4), guided.weight(5)
        (1.0, 3.0)
        """
        low, high = self.interval or (0, t)
        return self.guidance if low <= t <= high else 1.0

    def predict(
        self, x: Any, t: int, labels: Any = None, *, covariates: Any = None, backend: str | Backend = "auto"
    ) -> Array:
        """Return the guided output (n, ...) for x (n, ...) at a timestep.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> wide = fd.denoisers.Gaussian(np.zeros(2), 9 * np.eye(2), s)
        >>> x, g = np.ones((1, 2)), 3.0
        >>> u, c = wide.predict(x, 9), law.predict(x, 9)
        >>> np.allclose(fd.Guided(law, g, wide).predict(x, 9, backend="numpy"), u + g * (c - u))
        True
        """
        be = backend_for(backend, x=x)
        given = check_array("x", x, min_ndim=2)
        shape = tuple(given.shape[1:])
        if self.T is not None:
            check_timesteps(t, self.T, len(given))
        asked = asked_on(be, self, *checked_asked(self, labels, covariates, len(given)))
        flat = be.asarray(given, np.float32 if be.name != "numpy" else None).reshape(len(given), -1)
        out = be.to_numpy(self.on(be, shape).evaluate(flat, check_int("t", t), asked))
        return (out if out.ndim == flat.ndim else out[0]).reshape(given.shape)

    def affine(self, prediction: str, t: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return A (d, d) and offset (d,) of the output, where both denoisers are affine; see `exact_chain`.

        Examples
        --------
        >>> s = fd.Schedule.cosine(20)
        >>> law = fd.denoisers.Gaussian(np.zeros(2), np.diag([4.0, 1.0]), s)
        >>> wide = fd.denoisers.Gaussian(np.zeros(2), 9 * np.eye(2), s)
        >>> guided = fd.Guided(law, 3.0, wide)
        >>> A, offset = guided.affine("noise", 9)
        >>> np.allclose(np.ones((1, 2)) @ A.T + offset, guided.predict(np.ones((1, 2)), 9, backend="numpy"))
        True
        """
        if self.rescale:
            raise ArgumentError("rescale", f"{self.rescale:g}", "0: a rescaled output is not affine")
        asked = _affine(self.inner, prediction, t)
        if self.weight(t) == 1:
            return asked
        unasked = _affine(self.unconditional, prediction, t)
        A, offset = (u + self.weight(t) * (c - u) for c, u in zip(asked, unasked, strict=True))
        return A, offset

    def on(self, be: Backend, shape: tuple[int, ...]) -> Evaluator:
        """Return it on a backend; the denoiser itself where g is 1."""
        inner = self.inner.on(be, shape)
        if self.guidance == 1:
            return inner
        other = None if self.unconditional is None else self.unconditional.on(be, shape)
        return _GuidedEvaluator(self, be, inner, other)

    def __repr__(self) -> str:
        return f"Guided({self.inner!r}, {self.guidance:g})"


def guided(denoiser: Denoiser, guidance: Any, *, interval: Any = None, rescale: Any = 0.0) -> Guided:
    """Return a denoiser guided as `fastdiff.sample` is told, whose arguments errors name."""
    try:
        return Guided(denoiser, guidance, interval=interval, rescale=rescale)
    except ArgumentError as error:
        if error.argument == "unconditional":
            wants = "None: this denoiser takes no labels; fd.Guided takes two denoisers"
            raise ArgumentError("guidance", shown(guidance), wants) from None
        names = {"interval": "guidance_interval"}
        raise ArgumentError(names.get(error.argument, error.argument), error.got, error.wants) from None


def _checked_interval(interval: Any, T: int | None) -> tuple[int, int]:
    wants = "two timesteps, the lower one first"
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise ArgumentError("interval", shown(interval), wants)
    low, high = (check_int("interval", t, low=0, high=None if T is None else T - 1) for t in interval)
    if low > high:
        raise ArgumentError("interval", shown(interval), wants)
    return low, high


def _affine(denoiser: Any, prediction: str, t: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if not callable(getattr(denoiser, "affine", None)):
        wants = "two with .affine(prediction, t), such as fastdiff.denoisers.Gaussian"
        raise ArgumentError("denoiser", type(denoiser).__name__, wants)
    A, offset = denoiser.affine(prediction, t)
    return A, offset


@dataclass(eq=False)
class _Both:
    """Samples twice, asked and not: what was asked of them, and room for their states."""

    labels: Array | Asked | None
    twice: Array | Asked | None
    states: Array


class _GuidedEvaluator(Evaluator):
    """A guided denoiser on a backend. A network gets both halves in one batch."""

    def __init__(self, to: Guided, be: Backend, inner: Evaluator, other: Evaluator | None) -> None:
        self.to, self.be, self.inner, self.other = to, be, inner, other
        self._both: _Both | None = None
        self._nothing: tuple[int, Array | None, Array | Asked | None] = (-1, None, None)

    def evaluate(self, x: Array, t: int, labels: Array | Asked | None = None) -> Array:
        return self._guided(x, t, labels, self.inner.evaluate)

    def _guided(self, x: Array, t: int, labels: Array | Asked | None, evaluate: Any) -> Array:
        weight = self.to.weight(t)
        if weight == 1:
            return evaluate(x, t, labels)
        if weight == 0:
            return self._unasked(x, t, labels)
        n = len(x)
        if self.to._joint:
            both = self._twice(x, labels)
            out = evaluate(both.states, t, both.twice)
            c, u = out[..., :n, :], out[..., n:, :]
        else:
            c = self.be.asarray(evaluate(x, t, labels), x.dtype).copy()
            u = self._unasked(x, t, labels)
        if c.ndim == x.ndim:
            self.be.guide(c, u if u.ndim == x.ndim else u[0], weight, self.to.rescale, c)
            return c
        # A learned variance is that of c.
        parts = self.be.empty(c.shape, x.dtype)
        parts[...] = c
        self.be.guide(parts[0], u[0] if u.ndim > x.ndim else u, weight, self.to.rescale, parts[0])
        return parts

    def _unasked(self, x: Array, t: int, labels: Array | Asked | None) -> Array:
        if self.other is not None:
            return self.other.evaluate(x, t)
        return self.inner.evaluate(x, t, self._of_nothing(x, labels))

    def _of_nothing(self, x: Array, labels: Array | Asked | None) -> Array | Asked | None:
        """What asks samples for nothing; what is known of them stays."""
        if not self.to._joint:
            return None
        known = asked_parts(labels).known
        if self._nothing[0] != len(x) or self._nothing[1] is not known:
            self._nothing = len(x), known, self._asks(len(x), None, known, x.dtype)
        return self._nothing[2]

    def _asks(self, n: int, labels: Array | Asked | None, known: Array | None, dtype: Any) -> Array | Asked | None:
        """What asks samples, if there are any, and after them n for nothing."""
        parts = asked_parts(labels)
        chosen, numbers = parts.labels, parts.covariates
        first, classes, form = 0 if labels is None else len(labels), self.to.classes, self.to.covariate_form
        result = covariates = None
        if known is not None and first:
            twice = self.be.empty((first + n, known.shape[1]), dtype)
            twice[:first], twice[first:] = known, known
            known = twice
        if classes not in (None, ANY_CLASSES):
            result = self.be.empty((first + n,), np.int64)
            result.fill(classes)
            if chosen is not None:
                result[:first] = chosen
        if form is not None:
            covariates = self.be.empty((first + n, form.columns), dtype)
            covariates.fill(0)
            if numbers is not None:
                covariates[:first] = numbers
        return result if known is None and covariates is None else Asked(result, covariates, known)

    def _twice(self, x: Array, labels: Array | Asked | None) -> _Both:
        n = len(x)
        if self._both is None or self._both.labels is not labels or len(self._both.states) != 2 * n:
            both = self._asks(n, labels, asked_parts(labels).known, x.dtype)
            self._both = _Both(labels, both, self.be.empty((2 * n, x.shape[1]), x.dtype))
        self._both.states[:n], self._both.states[n:] = x, x
        return self._both

    def step(
        self,
        x: Array,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array | Asked | None = None,
    ) -> None:
        frozen = getattr(self.inner, "evaluate_frozen", self.inner.evaluate)
        out = self._guided(x, row.t, labels, frozen) if row.evaluates else None
        self.be.sampler_step(x, out, memory, row, clip, draw.at(row.step))

    def run_table(
        self,
        x: Array,
        rows: tuple[Row, ...],
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array | Asked | None = None,
    ) -> None:
        """Run a perceptron's table in one piece, but for a rescaled output; others row by row, with the same bits."""
        in_one = getattr(self.inner, "run_chain", None)
        if in_one is None or not self.to._joint or self.to.rescale:
            super().run_table(x, rows, clip, draw, labels)
        elif self.to.asks_nothing:
            self.inner.run_table(x, rows, clip, draw, self._of_nothing(x, labels))
        else:
            weights = np.array([self.to.weight(row.t) for row in rows], np.float32)
            in_one(x, ChainTable(rows, clip, weights), draw, labels)

    def vjp(self, x: Array, t: int, cotangent: Array, labels: Array | Asked | None = None) -> Array:
        return self._product("vjp", x, t, cotangent, labels)

    def jvp(self, x: Array, t: int, tangent: Array, labels: Array | Asked | None = None) -> Array:
        return self._product("jvp", x, t, tangent, labels)

    def _product(self, name: str, x: Array, t: int, vector: Array, labels: Array | Asked | None) -> Array:
        """The same sum of products with both Jacobians."""
        if self.to.rescale:
            raise ArgumentError("rescale", f"{self.to.rescale:g}", "0: nothing is known of its derivatives")
        of_asked, weight = getattr(self.inner, name), self.to.weight(t)
        if weight == 1:
            return of_asked(x, t, vector, labels)
        c = self.be.asarray(of_asked(x, t, vector, labels), x.dtype).copy()
        if self.other is not None:
            u = getattr(self.other, name)(x, t, vector)
        else:
            u = of_asked(x, t, vector, self._of_nothing(x, labels))
        flat = c.reshape(-1, c.shape[-1])
        self.be.guide(flat, self.be.asarray(u, x.dtype).reshape(flat.shape), weight, 0.0, flat)
        return flat.reshape(c.shape)


class Product:
    """A denoiser whose score is the sum of those of two others: see `product`.

    Parameters
    ----------
    first, second : Denoiser
    schedule : Schedule
    """

    def __init__(self, first: Denoiser, second: Denoiser, schedule: Schedule) -> None:
        self.parts, self.schedule, self.T = (first, second), schedule, schedule.T
        self.prediction, self.shape = first.prediction, first.shape or second.shape
        self.classes = next((part.classes for part in self.parts if part.classes is not None), None)
        # Every prediction is k x plus a multiple of the score.
        signal, noise = schedule.signal, schedule.noise
        with np.errstate(divide="ignore"):
            self.k = {"noise": 0 * signal, "x0": 1 / signal, "v": -noise / signal, "velocity": -1 / signal}[
                str(self.prediction)
            ]

    def predict(self, x: Any, t: int, labels: Any = None, *, backend: str | Backend = "auto") -> Array:
        """Return the output (n, ...) for x (n, ...) at a timestep."""
        be = backend_for(backend, x=x)
        given = check_array("x", x, min_ndim=2)
        check_timesteps(t, self.T, len(given))
        asked = asked_on(be, self, *checked_asked(self, labels, None, len(given)))
        flat = be.asarray(given, np.float32 if be.name != "numpy" else None).reshape(len(given), -1)
        out = self.on(be, tuple(given.shape[1:])).evaluate(flat, check_int("t", t), asked)
        return be.to_numpy(out).reshape(given.shape)

    def affine(self, prediction: str, t: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return A (d, d) and offset (d,) of the output, where both denoisers are affine; see `exact_chain`."""
        (A, a), (B, b) = (_affine(part, prediction, t) for part in self.parts)
        return A + B - self.k[t] * np.eye(len(A)), a + b

    def on(self, be: Backend, shape: tuple[int, ...]) -> Evaluator:
        """Return it on a backend."""
        return _ProductEvaluator(self, be, [part.on(be, shape) for part in self.parts])


class _ProductEvaluator(Evaluator):
    """A product on a backend."""

    def __init__(self, to: Product, be: Backend, parts: list[Evaluator]) -> None:
        self.to, self.be, self.parts = to, be, parts

    def evaluate(self, x: Array, t: int, labels: Array | Asked | None = None) -> Array:
        return self._sum("evaluate", x, t, x, labels)

    def vjp(self, x: Array, t: int, cotangent: Array, labels: Array | Asked | None = None) -> Array:
        return self._sum("vjp", x, t, cotangent, labels, cotangent)

    def jvp(self, x: Array, t: int, tangent: Array, labels: Array | Asked | None = None) -> Array:
        return self._sum("jvp", x, t, tangent, labels, tangent)

    def _sum(self, name: str, x: Array, t: int, like: Array, labels: Array | Asked | None, *vectors: Array) -> Array:
        total = -float(self.to.k[t]) * like
        for part, of in zip(self.to.parts, self.parts, strict=True):
            asked = labels if part.classes is not None else None
            out = getattr(of, name)(x, t, *vectors, asked)
            total = total + self.be.asarray(out if out.ndim == like.ndim else out[0], x.dtype)
        return self.be.asarray(total, x.dtype)


def product(denoiser1: Any, denoiser2: Any, *, schedule: Schedule | None = None) -> Product:
    """Return a denoiser whose score is the sum of two others': a way towards the product of their densities.

    It is not the denoiser of that product, whose noised score no sum gives, and a table samples something narrower:
    the product of N(0, 1) with itself is N(0, 1/2), and ddim of the sums ends in a single point. Right in the limit of
    many draws are samples of the one weighed by the density of the other,

        fd.sample(denoiser1, table, n=4096, given=fd.Weight(log_density2), method="smc")

    Parameters
    ----------
    denoiser1, denoiser2 : denoiser
        With the same timesteps and prediction.
    schedule : Schedule, optional
        That of the timesteps, where neither tells it.

    Returns
    -------
    Product

    Raises
    ------
    ArgumentError
        They disagree, do not tell what they predict, or know no schedule.

    Warns
    -----
    QualityWarning
        Always, for the reason above.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> one, other = (fd.denoisers.Gaussian(np.full(1, m), np.eye(1), s) for m in (0.0, 2.0))
    >>> import warnings
    >>> with warnings.catch_warnings(action="ignore"):  # it says when a sum of scores is not that of the product
    ...     both = fd.product(one, other)
    >>> draws = fd.sample(both, fd.samplers.ddim(s, 20), n=500, shape=(1,), seed=0)
    >>> bool(abs(draws.mean() - 1) < 0.2)
    True
    """
    with as_named(denoiser="denoiser1"):
        first = denoiser_of(denoiser1)
    with as_named(denoiser="denoiser2"):
        second = denoiser_of(denoiser2)
    schedules = [schedule, *(getattr(part, "schedule", None) for part in (first, second))]
    known = next((found for found in schedules if found is not None), None)
    if not isinstance(known, Schedule):
        raise ArgumentError("schedule", shown(known), "a fastdiff.Schedule: neither denoiser tells its own")
    if any(found is not None and found != known for found in schedules):
        raise ArgumentError("denoiser2", "another schedule", f"{known!r}, as the first has")
    for name, ours in (("T", known.T), ("prediction", first.prediction), ("shape", first.shape)):
        theirs = getattr(second, name)
        if None not in (ours, theirs) and ours != theirs:
            raise ArgumentError("denoiser2", f"{name} {theirs!r}", f"{ours!r}, as the first has")
    if first.T not in (None, known.T):
        raise ArgumentError("denoiser1", f"T {first.T}", f"{known.T}, as the schedule has")
    if first.prediction is None or second.prediction is None:
        raise ArgumentError("denoiser1, denoiser2", "no prediction", "denoisers that say what their output is")
    if None not in (first.classes, second.classes) and first.classes != second.classes:
        raise ArgumentError("denoiser2", f"{second.classes} classes", f"{first.classes}, as the first has")
    if first.prediction != "noise" and known.signal[-1] == 0:
        raise ArgumentError("schedule", "one that ends in noise alone", "predictions of the noise, or another")
    words = "a sum of scores is not the score of the noised product, and its samples are too narrow; for the product "
    words += "weigh samples of one by the density of the other: given=fd.Weight(...), method='smc'"
    warnings.warn(words, QualityWarning, stacklevel=2)
    return Product(first, second, known)
