"""Multilayer perceptrons for curves, conditioned on the timestep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends import (
    Activation,
    Array,
    Backend,
    DenseLayer,
    LinearPart,
    MLPPlan,
    Row,
    TimeMode,
    Training,
    TrainingDraws,
    TrainState,
)
from fastdiff.errors import ArgumentError, check_array, check_choice, check_int, check_seed, shown
from fastdiff.nn.network import MAX_WIDTH, Network, Start, check_keys, register
from fastdiff.nn.params import Layout
from fastdiff.nn.runner import Runner
from fastdiff.noise import Draw

TIME_FEATURES = 32
MAX_LAYERS = 1000  # hidden ones
MAX_PERIOD = 10_000.0
KINDS = ("modulated", "tutorial")
TIME_COLUMNS: dict[TimeMode, int] = {"none": 0, "shift": 1, "scale_shift": 2}  # for each output of a layer


def sinusoidal_features(T: int, width: int = TIME_FEATURES) -> npt.NDArray[np.float64]:
    """Return sinusoidal features of the timesteps 0 .. T - 1.

    cos and sin of 1000 t / T at frequencies falling geometrically from 1 to nearly 1 / 10000 (Vaswani et al. 2017,
    section 3.5, with the scale of Ho et al. 2020), so that networks of different T see the same range.

    Returns
    -------
    (T, width) float64
        The cosines, then the sines.
    """
    half = width // 2
    frequencies = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / half)
    angles = (1000.0 / T) * np.arange(T)[:, None] * frequencies
    return np.hstack([np.cos(angles), np.sin(angles)])


class MLP(Network):
    """A perceptron on curves of `points` values: x_t and t in, one value a point out.

    Hidden layer i computes silu((1 + g_i(t)) (x W_i + b_i) + s_i(t)); gain g and shift s are linear in sinusoidal
    features of t (feature-wise modulation, Perez et al. 2018). `tutorial` builds the source text's network instead.

    Parameters
    ----------
    points : int
        Length of a curve.
    hidden : iterable of int, optional
        Widths of the hidden layers.
    T : int, optional
        Number of timesteps.
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
        Shape of one sample, (points,).
    """

    widths, usual_batch = "hidden", 256
    in_parts, has_linear = False, True

    def __init__(
        self,
        points: int,
        *,
        hidden: Iterable[int] = (128, 128, 128),
        T: int = 100,
        seed: int = 0,
        dtype: str = "float32",
    ) -> None:
        if not isinstance(hidden, Iterable) or np.ndim(hidden) == 0:  # type: ignore[arg-type]
            raise ArgumentError("hidden", shown(hidden), "layer widths, as in (128, 128)")
        widths = tuple(check_int("hidden", width, low=1, high=MAX_WIDTH) for width in hidden)
        self._build("modulated", points, widths, T, seed, dtype)

    @classmethod
    def tutorial(cls, points: int, *, T: int = 100, seed: int = 0, dtype: str = "float32") -> Self:
        """Return the source text's network for curves of `points` values.

        Linear d -> 2d, LeakyReLU(0.01), Linear 2d -> 4d, add Embedding(T, 4d)[t], Linear 4d -> 2d, LeakyReLU,
        Linear 2d -> d. Weights and biases start uniform in +-1 / sqrt(in), the embedding standard normal.
        """
        self = cls.__new__(cls)
        self._build("tutorial", points, (), T, seed, dtype)
        return self

    def _build(
        self,
        kind: str,
        points: int,
        hidden: tuple[int, ...],
        T: int,
        seed: int,
        dtype: str,
        draw: bool = True,
    ) -> None:
        self.kind = kind
        self.points = d = check_int("points", points, low=1, high=MAX_WIDTH)
        self.hidden = hidden
        self.T = check_int("T", T, low=1, high=1 << 20)
        self.seed = check_seed(seed)
        self.dtype = np.dtype(check_choice("dtype", dtype, ["float32", "float64"]))
        self.shape, self.image, self.outputs = (d,), (1, d, 1), 1
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
        )
        self.own(layout, draw)

    def start(self, name: str) -> Start:
        """The tutorial's embedding starts normal; else modulation and the last layer start at zero.

        That is no modulation, and the best constant guess at the noise; or nothing but the linear part, with one.
        """
        if self.kind == "tutorial":
            return "normal" if name == "time.weight" else "uniform"
        last = f"layers.{len(self.hidden)}"
        still = name.startswith("time.") or name == f"{last}.weight"
        return "zero" if still or (self.plan.linear is not None and name == f"{last}.bias") else "uniform"

    def runner(self, be: Backend, weights: Array = None) -> Runner:
        return MLPRunner(self, be, be.asarray(self.flat if weights is None else weights, self.dtype))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration, as JSON types; the parameters are not in it."""
        return {
            "kind": self.kind, "points": self.points, "hidden": list(self.hidden), "T": self.T,
            "dtype": self.dtype.name, "seed": self.seed,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, config: Any, *, draw: bool = True) -> Self:
        """Return the network of a configuration, with weights drawn from its seed, or zero without `draw`.

        Raises
        ------
        ArgumentError
            A key is missing or unknown, or a value is not what it should be.
        """
        check_keys(config, {"kind", "points", "hidden", "T", "dtype", "seed"})
        self = cls.__new__(cls)
        kind = check_choice("kind", config["kind"], KINDS)
        hidden = config["hidden"]
        if not isinstance(hidden, list) or (kind == "tutorial" and hidden):
            raise ArgumentError("hidden", shown(hidden), "a list of layer widths, empty for the tutorial network")
        widths = tuple(check_int("hidden", width, low=1, high=MAX_WIDTH) for width in hidden)
        self._build(kind, config["points"], widths, config["T"], config["seed"], config["dtype"], draw)
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
    def operations(self) -> int:
        return 2 * self.layout.count

    @property
    def narrow(self) -> bool:
        return min(self.hidden, default=self.points) < self.points

    def __repr__(self) -> str:
        if self.kind == "tutorial":
            return f"MLP.tutorial({self.points}, T={self.T})"
        return f"MLP({self.points}, hidden={self.hidden}, T={self.T})"


register(MLP, *KINDS)


class MLPRunner(Runner):
    """A perceptron on a backend: its plan runs in one piece, and so does a whole table."""

    net: MLP
    _output: tuple[Array, Array] | None = None

    def fill(self, y: Array, x: Array, t: Array, labels: Array = None) -> None:
        self.be.mlp_forward(self.net.plan, self.weights, x, t, y.reshape(x.shape))

    def evaluate(self, x: Array, t: int, labels: Array = None) -> Array:
        if self._output is None or self._output[0].shape != x.shape:  # the last batch may be smaller
            self._output = self.be.empty(x.shape, x.dtype), self.be.empty((len(x),), np.int64)
        out, steps = self._output
        steps[...] = t
        return self.be.mlp_forward(self.net.plan, self.weights, x, steps, out)

    def fill_vjp(self, dx: Array, x: Array, t: Array, dy: Array, labels: Array = None) -> None:
        self.be.mlp_vjp(self.net.plan, self.weights, x, t, dy, dx)

    def fill_jvp(self, dy: Array, x: Array, t: Array, dx: Array, labels: Array = None) -> None:
        self.be.mlp_jvp(self.net.plan, self.weights, x, t, dx, dy)

    def run_table(
        self, x: Array, rows: tuple[Row, ...], clip: tuple[float, float] | None, draw: Draw, labels: Array = None
    ) -> None:
        self.be.mlp_chain(self.net.plan, self.weights, x, rows, clip, draw)

    def training(self, draws: TrainingDraws, batch: int, parts: int, state: TrainState, results: Array) -> Training:
        return self.be.mlp_training(self.net.plan, draws, batch, state, results)
