"""Multilayer perceptrons for curves and series, conditioned on the timestep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends import (
    Activation,
    Array,
    Backend,
    ChainTable,
    DenseLayer,
    Inputs,
    LinearPart,
    MLPPlan,
    Row,
    SharingBackend,
    Team,
    TimeMode,
    TmpdPlan,
    Training,
    TrainingDraws,
    TrainState,
)
from fastdiff.backends.layers import PartsBackend
from fastdiff.denoiser import Asked, asked_parts
from fastdiff.errors import ArgumentError, check_array, check_choice, check_int, check_seed, check_several, shown
from fastdiff.nn.network import MAX_WIDTH, Network, Start, check_keys, register
from fastdiff.nn.params import Layout
from fastdiff.nn.runner import Runner, in_parts
from fastdiff.noise import Draw

TIME_FEATURES = 32
MAX_LAYERS = 1000  # hidden ones
MAX_PERIOD = 10_000.0
KINDS = ("modulated", "tutorial")
ASKED = ("classes", "covariates")  # in the configuration of a network that has them
FLAGS = ("pointwise", "masked")  # likewise
TIME_COLUMNS: dict[TimeMode, int] = {"none": 0, "shift": 1, "scale_shift": 2}  # for each output of a layer


def sinusoidal_features(T: int, width: int = TIME_FEATURES) -> npt.NDArray[np.float64]:
    """Return sinusoidal features of the timesteps 0 .. T - 1.

    cos and sin of 1000 t / T at frequencies falling geometrically from 1 to nearly 1 / 10000 (Vaswani et al. 2017,
    section 3.5, with the scale of Ho et al. 2020), so that networks of different T see the same range.

    Returns
    -------
    (T, width) float64
        The cosines, then the sines.

    Examples
    --------
    >>> features = fd.nn.sinusoidal_features(100, 32)
    >>> features.shape, features[0, :16].tolist() == [1.0] * 16  # cosines, then sines
    ((100, 32), True)
    """
    half = width // 2
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / half)
    angles = (1000.0 / T) * np.arange(T)[:, None] * frequencies
    return np.hstack([np.cos(angles), np.sin(angles)])


class MLP(Network):
    """A perceptron on curves of `points` values, or series of several channels: x_t and t in, one value a value out.

    Hidden layer i computes silu((1 + g_i(t)) (x W_i + b_i) + s_i(t)); gain g and shift s are linear in sinusoidal
    features of t, and in what is asked of a sample, its class, covariates and known values (feature-wise modulation,
    Perez et al. 2018), whose share does not depend on t and is computed once for a chain. `tutorial` builds the source
    text's network instead.

    Parameters
    ----------
    points : int or (int, int)
        Length of a curve, or (points, channels) of a series, of which a layer sees all values at once.
    hidden : iterable of int, optional
        Widths of the hidden layers.
    T : int, optional
        Number of timesteps.
    classes : int, optional
        Number of classes, beside which there is a null class; None: no labels.
    covariates : int, optional
        How many numbers are asked of a sample beside that; None: none.
    pointwise : bool, optional
        Whether so many are asked of each point, and not of the sample.
    masked : bool, optional
        Whether it is told which values of a sample are known, and what they are: see `fastdiff.masks`.
    seed : int, optional
        The weights are drawn from stream WEIGHTS, one row a tensor.
    dtype : {"float32", "float64"}, optional
        float64 networks run on the numpy backend only.

    Attributes
    ----------
    flat : (layout.size,) array
        All parameters in one buffer.
    params : dict of str to array
        Named views into `flat`: ``layers.0.weight`` (in, out), ``layers.0.bias`` (out,), ...
    shape : tuple of int
        Shape of one sample, (points,) or (points, channels).
    points : int
        How many values a sample has.

    Examples
    --------
    >>> net = fd.MLP(50, hidden=(64, 64), T=100)
    >>> net.predict(np.zeros((3, 50)), 99, backend="numpy").shape
    (3, 50)
    """

    widths, usual_batch = "hidden", 256
    in_parts, has_linear, marks_each = False, True, False

    def __init__(
        self,
        points: int | tuple[int, int],
        *,
        hidden: Iterable[int] = (128, 128, 128),
        T: int = 100,
        classes: int | None = None,
        covariates: int | None = None,
        pointwise: bool = False,
        masked: bool = False,
        seed: int = 0,
        dtype: str = "float32",
    ) -> None:
        several = check_several("hidden", hidden, "layer widths, as in (128, 128)")
        widths = tuple(check_int("hidden", width, low=1, high=MAX_WIDTH) for width in several)
        asked = {"classes": classes, "covariates": covariates, "pointwise": pointwise, "masked": masked}
        config = {"kind": "modulated", "points": points, "hidden": widths, "T": T, "seed": seed, "dtype": dtype}
        self._build(config, asked)

    @classmethod
    def tutorial(cls, points: int | tuple[int, int], *, T: int = 100, seed: int = 0, dtype: str = "float32") -> Self:
        """Return the source text's network for curves of `points` values.

        Linear d -> 2d, LeakyReLU(0.01), Linear 2d -> 4d, add Embedding(T, 4d)[t], Linear 4d -> 2d, LeakyReLU,
        Linear 2d -> d. Weights and biases start uniform in +-1 / sqrt(in), the embedding standard normal.

        Examples
        --------
        >>> [layer.outputs for layer in fd.MLP.tutorial(50).plan.layers]
        [100, 200, 100, 50]
        """
        self = cls.__new__(cls)
        self._build({"kind": "tutorial", "points": points, "hidden": (), "T": T, "seed": seed, "dtype": dtype})
        return self

    def _build(self, config: Mapping[str, Any], asked: Mapping[str, Any] | None = None, draw: bool = True) -> None:
        """Become the network of a configuration, `asked` being what it has of `ASKED` and `FLAGS`."""
        kind, points, hidden = config["kind"], config["points"], config["hidden"]
        self.kind = kind
        sizes = tuple(points) if isinstance(points, (tuple, list)) else (points,)
        if len(sizes) not in (1, 2):
            raise ArgumentError("points", shown(points), "the points of a curve, or (points, channels) of a series")
        self.shape = tuple(check_int("points", size, low=1, high=MAX_WIDTH) for size in sizes)
        self.points = d = check_int("points", math.prod(self.shape), low=1, high=MAX_WIDTH)
        self.image = (1, self.shape[0], self.shape[1] if len(self.shape) == 2 else 1)
        self.outputs = self.image[2]
        self.hidden = hidden
        self.T = check_int("T", config["T"], low=1, high=1 << 20)
        self.seed = check_seed(config["seed"])
        self.dtype = np.dtype(check_choice("dtype", config["dtype"], ["float32", "float64"]))
        asked = {"classes": None, "covariates": None} | dict(asked or {})
        self.ask(**asked, null_class=asked["classes"] is not None)
        if self.asked and not hidden:
            raise ArgumentError("hidden", "()", "at least one layer, for a network that is asked for something")
        hidden_kind: tuple[Activation, TimeMode] = ("silu", "scale_shift")
        kinds: list[tuple[Activation, TimeMode]]
        if kind == "tutorial":
            widths = [d, 2 * d, 4 * d, 2 * d, d]
            kinds = [("leaky_relu", "none"), ("none", "shift"), ("leaky_relu", "none"), ("none", "none")]
        else:
            widths = [d, *hidden, d]
            kinds = [*(hidden_kind for _ in hidden), ("none", "none")]
        columns = [TIME_COLUMNS[mode] * outputs for (_, mode), outputs in zip(kinds, widths[1:], strict=True)]
        shapes: dict[str, tuple[int, ...]] = {}
        check_int("the number of hidden layers", len(hidden), low=0, high=MAX_LAYERS)
        before = [0, *accumulate(columns)]
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            shapes[f"layers.{i}.weight"] = (inputs, outputs)
            shapes[f"layers.{i}.bias"] = (outputs,)
        embedded = kind == "tutorial"
        if self.asked:
            shapes["asked.weight"] = (self.asked, sum(columns))
        if sum(columns):
            shapes["time.weight"] = (self.T if embedded else TIME_FEATURES, sum(columns))
            if not embedded:
                shapes["time.bias"] = (sum(columns),)
        layout = Layout(shapes)
        at = layout.offsets
        self.plan = MLPPlan(
            layers=tuple(
                DenseLayer(inputs, outputs, at[f"layers.{i}.weight"], at[f"layers.{i}.bias"], *kinds[i], before[i])
                for i, (inputs, outputs) in enumerate(pairwise(widths))
            ),
            T=self.T,
            size=layout.size,
            time_width=sum(columns),
            time_weight=at.get("time.weight", 0),
            time_bias=at.get("time.bias", 0),
            features_of=None if embedded or not sum(columns) else sinusoidal_features,
            asked=self.asked,
            asked_weight=at.get("asked.weight", 0),
            classes=self.classes or 0,
            known=self.known,
        )
        self.own(layout, draw)

    def start(self, name: str) -> Start:
        """The tutorial's embedding starts normal; else modulation and the last layer start at zero.

        That is no modulation, and the best constant guess at the noise; or nothing but the linear part, with one.
        """
        if self.kind == "tutorial":
            return "normal" if name == "time.weight" else "uniform"
        last = f"layers.{len(self.hidden)}"
        still = name.startswith(("time.", "asked.")) or name == f"{last}.weight"
        return "zero" if still or (self.plan.linear is not None and name == f"{last}.bias") else "uniform"

    def runner(self, be: Backend, weights: Array = None) -> Runner:
        return MLPRunner(self, be, be.asarray(self.flat if weights is None else weights, self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration, as JSON types; the parameters are not in it."""
        return {
            "kind": self.kind, "points": self._sizes, "hidden": list(self.hidden), "T": self.T,
            "dtype": self.dtype.name, "seed": self.seed,
        } | self._asked_for  # fmt: skip

    @property
    def _asked_for(self) -> dict[str, Any]:
        """Arguments of the constructor that say what it is conditioned on."""
        counts = {name: count for name in ASKED if (count := getattr(self, name)) is not None}
        return counts | {name: True for name in FLAGS if getattr(self, name)}

    @classmethod
    def from_dict(cls, config: Any, *, draw: bool = True) -> Self:
        """Return the network of a configuration, with weights drawn from its seed, or zero without `draw`.

        Raises
        ------
        ArgumentError
            A key is missing or unknown, or a value is not what it should be.
        """
        check_keys(config, {"kind", "points", "hidden", "T", "dtype", "seed"}, (*ASKED, *FLAGS))
        self = cls.__new__(cls)
        kind = check_choice("kind", config["kind"], KINDS)
        asked = {name: config[name] for name in (*ASKED, *FLAGS) if config.get(name) is not None}
        if kind == "tutorial" and asked:
            raise ArgumentError("kind", "'tutorial'", "'modulated', for a network that is asked for something")
        hidden = config["hidden"]
        if not isinstance(hidden, list) or (kind == "tutorial" and hidden):
            raise ArgumentError("hidden", shown(hidden), "a list of layer widths, empty for the tutorial network")
        widths = tuple(check_int("hidden", width, low=1, high=MAX_WIDTH) for width in hidden)
        self._build({**config, "hidden": widths}, asked, draw)
        return self

    def set_linear(self, part: LinearPart | None) -> None:
        if part is not None:
            check_array("basis", part.basis, shape=(self.points, None))
            check_array("gains", part.gains, shape=(self.T, part.rank))
            last = f"layers.{len(self.plan.layers) - 1}"
            if not self.params[f"{last}.weight"].any():  # an untrained one: its output is to be the linear part alone
                self.params[f"{last}.bias"][...] = 0
        self.plan = replace(self.plan, linear=part)

    @property
    def _sizes(self) -> int | list[int]:
        """`points` as it is given."""
        return self.points if len(self.shape) == 1 else list(self.shape)

    @property
    def operations(self) -> int:
        return 2 * self.layout.count

    @property
    def narrow(self) -> bool:
        return min(self.hidden, default=self.points) < self.points

    def __repr__(self) -> str:
        shown = self.points if len(self.shape) == 1 else self.shape
        if self.kind == "tutorial":
            return f"MLP.tutorial({shown}, T={self.T})"
        asked = "".join(f", {name}={value}" for name, value in self._asked_for.items())
        return f"MLP({shown}, hidden={self.hidden}, T={self.T}{asked})"


register(MLP, *KINDS)


class MLPRunner(Runner):
    """A perceptron on a backend: its plan runs in one piece, and so does a whole table."""

    net: MLP
    _output: tuple[Array, Array] | None = None
    _asked: tuple[Any, Array] | None = None  # what was asked last, and as the backend takes it

    def _asks(self, labels: Array | Asked | None) -> Array | None:
        """What is asked of samples, as the backend takes it: brought there once for a run of a table."""
        if labels is None or not self.net.asked:
            return None
        if self._asked is None or self._asked[0] is not labels:
            parts = (None if part is None else self.be.to_numpy(part) for part in asked_parts(labels).parts)
            chosen, numbers, known = parts
            asked = self.net.plan.asks(chosen, numbers, self.net.dtype, known)
            self._asked = labels, self.be.asarray(asked, self.net.dtype)
        return self._asked[1]

    def fill(self, y: Array, x: Array, t: Array, labels: Array | Asked | None = None) -> None:
        self.be.mlp_forward(self.net.plan, self.weights, self._inputs(x, t, labels), self._rows(y))

    def _room(self, x: Array) -> tuple[Array, Array]:
        if self._output is None or self._output[0].shape != x.shape:  # the last batch may be smaller
            self._output = self.be.empty(x.shape, x.dtype), self.be.empty((len(x),), np.int64)
        return self._output

    def evaluate(self, x: Array, t: int, labels: Array | Asked | None = None) -> Array:
        out, steps = self._room(x)
        steps[...] = t
        return self.be.mlp_forward(self.net.plan, self.weights, Inputs(x, steps, self._asks(labels)), out)

    def pulled(self, x: Array, t: int, cotangent: Array, labels: Array | Asked | None = None) -> tuple[Array, Array]:
        if x.dtype != self.net.dtype:
            return super().pulled(x, t, cotangent, labels)
        out, _ = self._room(x)

        def fill(dx: Array, x: Array, t: Array, dy: Array, labels: Array | Asked | None) -> None:
            self.fill_vjp(dx, x, t, dy, labels, y=out)

        return out, self._product("vjp", fill, x, t, cotangent, labels)

    def fill_vjp(
        self, dx: Array, x: Array, t: Array, dy: Array, labels: Array | Asked | None = None, y: Array | None = None
    ) -> None:
        arrays = self._rows(dy, x), self._rows(dx, x), None if y is None else self._rows(y)
        self.be.mlp_vjp(self.net.plan, self.weights, self._inputs(x, t, labels), *arrays)

    def fill_jvp(self, dy: Array, x: Array, t: Array, dx: Array, labels: Array | Asked | None = None) -> None:
        arrays = self._rows(dx, x), self._rows(dy, x)
        self.be.mlp_jvp(self.net.plan, self.weights, self._inputs(x, t, labels), *arrays)

    def _inputs(self, x: Array, t: Array, labels: Array | Asked | None) -> Inputs:
        return Inputs(self._rows(x), t, self._asks(labels))

    def _rows(self, array: Array, x: Array = None) -> Array:
        """An array like x (n, ...), or several (k, n, ...), with its samples as rows."""
        several = () if x is None else array.shape[: array.ndim - x.ndim]
        return array.reshape(*several, array.shape[len(several)], self.net.points)

    def run_table(
        self,
        x: Array,
        rows: tuple[Row, ...],
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array | Asked | None = None,
    ) -> None:
        self.run_chain(x, ChainTable(rows, clip), draw, labels)

    def run_chain(self, x: Array, table: ChainTable, draw: Draw, labels: Array | Asked | None) -> None:
        """Run a table that is guided, or holds what is known."""
        self.be.mlp_chain(self.net.plan, self.weights, x, table, draw, self._asks(labels))

    def run_tmpd(self, x: Array, rows: tuple[Row, ...], draw: Draw, tmpd: TmpdPlan) -> bool:
        if self.net.asked:  # the kernel knows of no labels
            return False
        return self.be.mlp_chain_tmpd(self.net.plan, self.weights, x, rows, draw, tmpd)

    def training(
        self,
        draws: TrainingDraws,
        batch: int,
        parts: int,
        state: TrainState,
        results: Array,
        team: Team | None = None,
    ) -> Training:
        lead = (len(draws.data), 2) if draws.masked else (len(draws.data),)
        draws = draws._replace(data=draws.data.reshape(*lead, self.net.points))
        if team is None:
            return self.be.mlp_training(self.net.plan, draws, batch, state, results)
        if isinstance(self.be, SharingBackend):
            return self.be.mlp_shared_training(self.net.plan, draws, batch, state, results, team)
        assert isinstance(self.be, PartsBackend)
        gradient = self.be.mlp_parts(self.net.plan, self.weights, draws)
        return in_parts(self.be, gradient, (batch, parts), state, results, team)
