"""What a network must offer to be trained, sampled, saved and loaded by `Diffusion`, and the registry of their kinds.

A network of one's own is a subclass of `ProgramNetwork`. It says in `record` what it computes, as calls of a `Program`,
and which arguments of its constructor make it again; everything else follows from these:

    @fastdiff.nn.register
    class Plain(fastdiff.nn.ProgramNetwork):
        kind, options = "plain", ("shape", "T", "seed", "width")

        def __init__(self, shape, *, T=100, seed=0, width=8, dtype="float32", draw=True):
            self.describe(shape, T=T, seed=seed, dtype=dtype)
            self.width = width
            self.build(draw)

        def record(self, p):
            x, t = p.given("x", (p.n, *self.image)), p.given("t", (p.n,))
            table = p.parameter("time.weight", (self.T, self.width))
            h = p.silu(p.conv("layers.0", x, self.width, shift=p.take(table, t)))
            p.conv("layers.1", h, self.outputs)

A network that computes in its own way, as `MLP` does, is a subclass of `Network` with a `Runner` of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from fastdiff import noise
from fastdiff.backends import Array, Backend, LinearPart, backend_for
from fastdiff.denoiser import CovariateForm, asked_on, checked_asked
from fastdiff.errors import (
    ArgumentError,
    check_array,
    check_choice,
    check_flags,
    check_int,
    check_seed,
    check_timesteps,
    is_on_device,
    shown,
)
from fastdiff.forks import cached_property
from fastdiff.nn.layers import Program, Value
from fastdiff.nn.params import Layout
from fastdiff.nn.runner import Memories, ProgramRunner, Runner
from fastdiff.noise import Draw, Stream

MAX_WIDTH = 1 << 16
MAX_T, MAX_CLASSES = 1 << 16, 1 << 20
MAX_SIZE = 1 << 31  # of all parameters
CHUNK_VALUES = 1 << 24  # of activations: so many images as have these go through a network at once

Start = Literal["zero", "one", "normal", "uniform"]


class Network(ABC):
    """A network that predicts noise, x0 or v from x_t and t.

    Attributes
    ----------
    kind : str
        Names the class in files: see `register`.
    options : tuple of str
        Arguments of the constructor, attributes as well, that make the network again; besides these it takes `dtype`,
        and `draw`, without which the weights are zero, for a caller who fills them.
    widths : str
        Name of the argument to which a network owes its size: errors name it.
    usual_batch : int
        Rows of a training step where the caller does not say.
    in_parts : bool
        Whether a training step may take its batch in parts.
    marks_each : bool
        Whether it takes a 1 with the covariates of each point or pixel: see `fastdiff.denoiser.CovariateForm`.
    has_linear : bool
        Whether it takes a fixed linear part: see `set_linear`.
    shape : tuple of int
        Of one sample.
    image : (int, int, int)
        The sample as a program sees it: height, width, channels.
    outputs : int
        Channels of the output: those of the image, or twice as many with a learned variance.
    T : int
        Number of timesteps.
    classes : int or None
        Number of classes; None: it takes no labels.
    null_class : bool
        Whether label `classes` stands for no class.
    covariates : int or None
        How many numbers it is asked for beside a label; None: none. It sees them with a 1 after them, or all zeros
        where they are left out.
    pointwise : bool
        Whether it has so many for each point or pixel of a sample, and not for the sample.
    masked : bool
        Whether it is told which values of a sample are known, and what they are: see `fastdiff.masks`.
    seed : int
        Of the weights.
    dtype : numpy.dtype
        Of the weights; float64 networks run on the numpy backend only.
    layout : Layout
        Names, shapes and places of the tensors in `flat`.
    flat : (layout.size,) array
        All parameters in one buffer.
    prediction : {"noise", "x0", "v", "velocity"} or None
        What the output is, where that is known.
    arithmetic : int
        Which arithmetic trains it, as files name it: see `fastdiff.checkpoint`.

    Examples
    --------
    >>> net = fd.MLP(12, hidden=(8,), T=20)
    >>> isinstance(net, fd.nn.Network), net.shape, net.params["time.weight"].shape[1] > 0
    (True, (12,), True)
    """

    kind: str
    options: ClassVar[tuple[str, ...]]
    widths: ClassVar[str] = "network"
    usual_batch: ClassVar[int] = 64
    in_parts: ClassVar[bool] = True
    marks_each: ClassVar[bool] = True
    has_linear: ClassVar[bool] = False

    shape: tuple[int, ...]
    image: tuple[int, int, int]
    outputs: int
    T: int
    classes: int | None = None
    null_class: bool = False
    covariates: int | None = None
    pointwise: bool = False
    masked: bool = False
    seed: int
    dtype: np.dtype[Any]
    layout: Layout
    flat: npt.NDArray[Any]
    prediction: str | None = None
    arithmetic: int = 1

    @abstractmethod
    def runner(self, be: Backend, weights: Array = None) -> Runner:
        """Return the network on a backend, with its own weights or with others (layout.size,)."""

    @property
    def covariate_form(self) -> CovariateForm | None:
        """What covariates it has, and how it takes them."""
        if self.covariates is None:
            return None
        places = self.shape[: max(1, len(self.shape) - 1)] if self.pointwise else ()
        return CovariateForm((*places, self.covariates), self.marks_each and self.pointwise)

    @property
    def asked(self) -> int:
        """Columns of what is asked of a sample: its class in one of them, covariates with the 1, what is known."""
        form = self.covariate_form
        return (self.classes or 0) + (0 if form is None else form.columns) + self.known

    @property
    def known(self) -> int:
        """Columns of what is known of a sample: the values, and which they are; 0 of a network that is told nothing."""
        return 2 * math.prod(self.shape) if self.masked else 0

    @property
    def asked_freely(self) -> bool:
        """Whether it can be asked for nothing: guidance needs that."""
        return self.asked > self.known and (self.classes is None or self.null_class)

    @property
    def operations(self) -> int:
        """About how many a forward pass of a sample takes at most."""
        return 2 * self.layout.count * math.prod(self.image[:2])

    @property
    def learned_variance(self) -> bool:
        """Whether the output has, beside the prediction, where between two bounds the variance of a step lies."""
        return self.outputs == 2 * self.image[2]

    @property
    def narrow(self) -> bool:
        """Whether a layer is too narrow to carry all noise of a sample from the input to the output."""
        return False

    def set_linear(self, part: LinearPart | None) -> None:
        """Add a fixed linear part to the output from now on, or with None nothing.

        Only of a network that `has_linear`. It is neither trained nor part of the weights or the configuration.
        """
        if part is not None:
            raise ArgumentError("base", "'gaussian'", f"None: a network of kind {self.kind!r} has no linear part")

    # ------------------------------------------------------------------------------------------- building

    def describe(
        self,
        shape: Any,
        *,
        T: int,
        classes: int | None = None,
        covariates: int | None = None,
        null_class: bool = False,
        pointwise: bool = False,
        masked: bool = False,
        seed: int = 0,
        dtype: str = "float32",
        outputs: int | None = None,
    ) -> None:
        """Check what every network has, and set it.

        Raises
        ------
        ArgumentError
            A value is not what it should be.
        """
        if not isinstance(shape, (tuple, list)) or len(shape) not in (1, 2, 3):
            wants = "(height, width, channels) of an image, (points, channels) of a series or (points,) of a curve"
            raise ArgumentError("shape", shown(shape), wants)
        self.shape = tuple(check_int("shape", size, low=1, high=MAX_WIDTH) for size in shape)
        points_and_channels = (*self.shape, 1)[:2]
        height, width, channels = self.shape if len(self.shape) == 3 else (1, *points_and_channels)
        self.image = height, width, channels
        self.T = check_int("T", T, low=1, high=MAX_T)
        self.ask(classes, covariates, null_class=null_class, pointwise=pointwise, masked=masked)
        self.seed = check_seed(seed)
        self.dtype = np.dtype(check_choice("dtype", dtype, ["float32", "float64"]))
        self.outputs = channels if outputs is None else check_int("outputs", outputs, low=1, high=MAX_WIDTH)

    def ask(
        self, classes: Any, covariates: Any, *, null_class: bool, pointwise: bool = False, masked: bool = False
    ) -> None:
        """Check and set what the network is conditioned on."""
        check_flags(pointwise=pointwise, masked=masked)
        self.pointwise, self.masked = pointwise, masked
        if pointwise and covariates is None:
            raise ArgumentError("pointwise", "True", "covariates with it: how many each point has")
        self.classes = None if classes is None else check_int("classes", classes, low=1, high=MAX_CLASSES)
        self.covariates = None if covariates is None else check_int("covariates", covariates, low=1, high=MAX_WIDTH)
        self.null_class = null_class
        if covariates is not None and classes is not None and not null_class:
            raise ArgumentError("null_class", "False", "True, for a network with classes and covariates")

    def own(self, layout: Layout, draw: bool) -> None:
        """Have tensors of this layout, which `redraw` draws, or zeros without `draw`."""
        if layout.size > MAX_SIZE:
            raise ArgumentError(self.widths, f"{layout.size} parameters", f"at most {MAX_SIZE}")
        self.layout, self.flat = layout, layout.zeros(self.dtype)
        if draw:
            self.redraw()

    def start(self, name: str) -> Start:
        """How a tensor starts: at "zero" or "one", "normal", or "uniform" in +-1 / sqrt(fan in of its layer).

        By default gains and shifts of layers called norm are one and zero, and all others uniform.
        """
        layer, _, part = name.rpartition(".")
        if "norm" in layer.rpartition(".")[2]:
            return "one" if part == "weight" else "zero"
        return "uniform"

    @property
    def params(self) -> dict[str, Any]:
        """Named views into `flat`."""
        return self.layout.views(self.flat)

    def redraw(self) -> None:
        """Draw the weights anew from the network's seed: stream WEIGHTS, one row a tensor, as `start` says."""
        for name, view in self.params.items():
            view[...] = self._drawn(name)

    @property
    def is_new(self) -> bool:
        """Whether all weights are as they were drawn."""
        return all(np.array_equal(view, self._drawn(name)) for name, view in self.params.items())

    def _drawn(self, name: str) -> Array:
        shape, tensor = self.layout.shapes[name], list(self.layout.shapes).index(name)
        start = self.start(name)
        draw = Draw(self.seed, Stream.WEIGHTS, first_row=tensor)
        values = np.full((1, math.prod(shape)), start == "one", np.float64)
        if start == "normal":
            noise.fill_normal(values, draw)
        elif start == "uniform":
            noise.fill_uniform(values, draw)
            layer = f"{name.rpartition('.')[0]}.weight"
            values = (2 * values - 1) / math.sqrt(math.prod(self.layout.shapes.get(layer, shape)[:-1]))
        return values.reshape(shape).astype(self.dtype)

    # ------------------------------------------------------------------------------------------- in use

    def on(self, be: Backend, shape: tuple[int, ...]) -> Runner:
        """Return the network, with the weights that it has now, as a sampler takes it: see `Denoiser`."""
        return self.runner(be)

    def predict(
        self,
        x: Any,
        t: Any,
        labels: Any = None,
        *,
        covariates: Any = None,
        known: Any = None,
        backend: str | Backend = "auto",
        flat: Any = None,
    ) -> Any:
        """Return the network's output for x at timesteps t.

        Parameters
        ----------
        x : (n, *shape) array
            Noisy samples, in the network's own range.
        t : int or (n,) int array
            Timesteps, 0 .. T - 1.
        labels : int or (n,) int array, optional
            Classes, 0 .. classes - 1, for a network that has them.
        covariates : (k,) or (n, k) array, optional
            Numbers, in the network's own range, for a network that is asked for them; (n, points, k) or (n, height,
            width, k) for one that is `pointwise`.
        known : (n, *shape) array, optional
            What is known of the samples, NaN where nothing is, for a network that is `masked`. At these places x should
            be ``signal[t]`` times what is known. By default nothing is.
        backend : str or Backend, optional
        flat : (layout.size,) array, optional
            Other parameters than the network's own, for instance their average.

        Returns
        -------
        (n, *shape) array
            With `outputs` channels. float32; float64 for a float64 network, which needs the numpy backend.

        Raises
        ------
        ArgumentError
            Shape, dtype or range of an argument.
        BackendError
            The backend does not run such networks.
        """
        return self._call("fill", x, t, (labels, covariates, known), backend, flat)

    def vjp(
        self,
        x: Any,
        t: Any,
        cotangent: Any,
        labels: Any = None,
        *,
        covariates: Any = None,
        backend: str | Backend = "auto",
        flat: Any = None,
    ) -> Any:
        """Return J^T times a cotangent, J being the Jacobian of the output by x.

        Parameters
        ----------
        x, t, labels, covariates, backend, flat
            As for `predict`.
        cotangent : array like the output, or k of them
            (n, ...) or (k, n, ...).

        Returns
        -------
        (n, *shape) or (k, n, *shape) array
            The gradient of <output, cotangent> by x, exact up to rounding.

        Raises
        ------
        ArgumentError, BackendError
            As of `predict`.
        """
        return self._call("fill_vjp", x, t, (labels, covariates, None), backend, flat, ("cotangent", cotangent))

    def jvp(
        self,
        x: Any,
        t: Any,
        tangent: Any,
        labels: Any = None,
        *,
        covariates: Any = None,
        backend: str | Backend = "auto",
        flat: Any = None,
    ) -> Any:
        """Return J times a tangent (n, *shape) or (k, n, *shape): the derivative of the output along it; see `vjp`."""
        return self._call("fill_jvp", x, t, (labels, covariates, None), backend, flat, ("tangent", tangent))

    def _call(
        self,
        name: str,
        x: Any,
        t: Any,
        asked: tuple[Any, Any, Any],
        backend: Any,
        flat: Any,
        given: tuple[str, Any] | None = None,
    ) -> Any:
        """Check arguments, and let a runner's method of this name fill the result.

        What is `asked` are labels and covariates, and what is known; `flat` are weights, or a runner that has some.
        """
        labels, covariates, known = asked
        runner, flat = (flat, None) if isinstance(flat, Runner) else (None, flat)
        vectors = {} if given is None else {given[0]: given[1]}
        be = backend_for(backend, x=x, t=t, labels=labels, covariates=covariates, flat=flat, **vectors)
        self.check_backend(be)
        on_device = is_on_device(x)
        x = be.asarray(check_array("x", x, shape=(None, *self.shape), dtype=self.dtype), self.dtype)
        n = len(x)
        steps = be.asarray(check_timesteps(t, self.T, n), np.int64)
        columns = None if known is None else self._known_columns(be, known, n)
        labels = asked_on(be, self, *checked_asked(self, labels, covariates, n, dtype=self.dtype), columns)
        if runner is None:
            weights = self.flat if flat is None else flat
            weights = check_array("flat", weights, shape=self.flat.shape, finite=False, dtype=self.dtype)
            runner = self.runner(be, weights)
        image = (*self.image[:2], self.outputs)
        of_output = image[3 - len(self.shape) :] if len(self.shape) > 1 else self.shape if self.outputs == 1 else image
        if given is None:
            result = be.empty((n, *image), self.dtype)
            getattr(runner, name)(result, x, steps, labels)
            result = result.reshape(n, *of_output)
        else:
            like, made = (of_output, self.shape) if name == "fill_vjp" else (self.shape, of_output)
            vector, shape = check_array(*given, dtype=self.dtype), (n, *like)
            several = vector.shape[:1] if vector.ndim == len(shape) + 1 else ()
            if vector.shape != (*several, *shape):
                raise ArgumentError(given[0], f"shape {vector.shape}", f"shape {shape}, or several of them")
            result = be.empty((*several, n, *made), self.dtype)
            getattr(runner, name)(result, x, steps, be.asarray(vector, self.dtype), labels)
        return result if on_device else be.to_numpy(result)

    def _known_columns(self, be: Backend, known: Any, n: int) -> Array:
        """What is known of samples (n, *shape), with NaN, as (n, 2 D)."""
        if not self.masked:
            raise ArgumentError("known", type(known).__name__, "None: this network is not told what is known")
        values = np.asarray(check_array("known", known, shape=(n, *self.shape), finite=False, dtype=self.dtype))
        values = values.reshape(n, -1)
        return be.asarray(np.hstack([np.nan_to_num(values), ~np.isnan(values)], dtype=self.dtype), self.dtype)

    def check_backend(self, be: Backend) -> None:
        """Refuse a backend that cannot compute in the network's dtype."""
        if self.dtype == np.float64 and be.name != "numpy":
            raise ArgumentError("backend", shown(be.name), "'numpy': this network has float64 parameters")

    # ------------------------------------------------------------------------------------------- configuration

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration, as JSON types; the parameters are not in it."""
        config: dict[str, Any] = {"kind": self.kind}
        for name in self.options:
            value = getattr(self, name)
            config[name] = list(value) if isinstance(value, tuple) else value
        return config | {"dtype": self.dtype.name}

    @classmethod
    def from_dict(cls, config: Any, *, draw: bool = True) -> Self:
        """Return the network of a configuration, with weights drawn from its seed, or zero without `draw`.

        Raises
        ------
        ArgumentError
            A key is missing or unknown, or a value is not what it should be.
        """
        check_keys(config, {"kind", "dtype", *cls.options})
        check_choice("kind", config["kind"], [cls.kind])
        arguments: dict[str, Any] = {name: value for name, value in config.items() if name != "kind"}
        return cls(**arguments, draw=draw)  # type: ignore[call-arg]  # see `options`


class ProgramNetwork(Network):
    """A network that records its operations in a `Program`, and runs on every backend that has layers.

    Its constructor calls `describe`, sets what `record` needs, and calls `build`.

    Examples
    --------
    >>> class Scaled(fd.nn.ProgramNetwork):
    ...     kind, options = "scaled", ("shape", "T", "seed")
    ...
    ...     def __init__(self, shape, *, T=20, seed=0, dtype="float32", draw=True):
    ...         self.describe(shape, T=T, seed=seed, dtype=dtype)
    ...         self.build(draw)
    ...
    ...     def record(self, p):
    ...         p.conv("all", p.given("x", (p.n, *self.image)), self.outputs, fd.nn.Conv())
    >>> Scaled((50,)).predict(np.ones((2, 50)), 5, backend="numpy").shape
    (2, 50)
    """

    @cached_property
    def chunk(self) -> int:
        """Samples that go through it at once."""
        probe = Program(1, "output")
        self.record(probe)
        return _chunk(probe)

    @abstractmethod
    def record(self, p: Program) -> None:
        """Record the network on the n samples of a program: what it makes last is the output (n, H, W, outputs).

        A run is given "x" (n, H, W, C), "t" (n,) int64, "labels" (n,) int64 where there are classes, and `constants`;
        `inputs` has x with what else there is for every point.
        """

    def inputs(self, p: Program) -> Value:
        """Record x (n, H, W, ...), with channels for what is known, the mask, and covariates of every point."""
        x = p.given("x", (p.n, *self.image))
        if self.masked:
            x = p.concatenate(p.concatenate(x, p.given("known", x.shape)), p.given("marks", x.shape))
        if self.pointwise and self.covariates is not None:
            x = p.concatenate(x, p.given("covariates", (p.n, *self.image[:2], self.covariates + 1)))
        return x

    def constants(self) -> Mapping[str, npt.NDArray[Any]]:
        """Arrays that every run is given under their names: fixed ones, which no training changes."""
        return {}

    def build(self, draw: bool) -> None:
        """Find out by `record` which tensors there are, and have them."""
        probe = Program(1, "output")
        self.record(probe)
        if draw:  # else it is a file's, which says anything
            self.chunk = _chunk(probe)
        self._memories = Memories()
        self.arithmetic = 2 if probe.convolves_rows else 1
        self.own(Layout(probe.parameters), draw)

    def runner(self, be: Backend, weights: Array = None) -> Runner:
        weights = be.asarray(self.flat if weights is None else weights, self.dtype)
        return ProgramRunner(self, be, weights, self._memories.on(be))


def _chunk(probe: Program) -> int:
    probe.plan()
    return max(1, CHUNK_VALUES // probe.size)


def check_keys(config: Any, keys: set[str], optional: Iterable[str] = ()) -> None:
    """Refuse what is no configuration of these keys; some may be absent."""
    if not isinstance(config, Mapping) or set(config) - set(optional) != keys:
        shown = sorted(map(str, config)) if isinstance(config, Mapping) else type(config).__name__
        raise ArgumentError("config", str(shown), f"the keys {sorted(keys)}")


Kind = TypeVar("Kind", bound=type[Network])

_kinds: dict[str, type[Network]] = {}


def register(cls: Kind, *kinds: str) -> Kind:
    """Make files of networks of this class loadable; a decorator.

    Parameters
    ----------
    cls : subclass of Network
    *kinds : str
        What stands in their configuration; by default its `kind`.

    Examples
    --------
    >>> fd.nn.register(fd.MLP, "modulated") is fd.MLP  # as a rule a decorator: ``@fd.nn.register``
    True
    """
    for kind in kinds or (cls.kind,):
        known = _kinds.setdefault(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ArgumentError("kind", shown(kind), f"another name: {known.__module__}.{known.__qualname__} has it")
        _kinds[kind] = cls
    return cls


def network_of(config: Any, *, draw: bool = True) -> Network:
    """Return the network of a configuration: see `Network.from_dict`.

    Raises
    ------
    ArgumentError
        Its kind is not registered, or as of `Network.from_dict`.

    Examples
    --------
    >>> net = fd.MLP(12, hidden=(8,), T=20)
    >>> again = fd.nn.network_of(net.to_dict())
    >>> type(again).__name__, bool((again.flat == net.flat).all())
    ('MLP', True)
    """
    check_flags(draw=draw)
    if not isinstance(config, Mapping) or "kind" not in config:
        check_keys(config, {"kind"})
    return _kinds[check_choice("kind", config["kind"], sorted(_kinds))].from_dict(config, draw=draw)
