"""Multilayer perceptrons for curves, conditioned on the timestep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff import noise
from fastdiff.backends import Activation, Backend, DenseLayer, MLPPlan, TimeMode, backend_for
from fastdiff.errors import (
    ArgumentError,
    check_array,
    check_choice,
    check_int,
    check_seed,
    check_timesteps,
    is_on_device,
)
from fastdiff.nn.params import Layout
from fastdiff.noise import Stream

TIME_FEATURES = 32
MAX_PERIOD = 10_000.0
MAX_WIDTH = 1 << 16
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


class MLP:
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

    def __init__(
        self,
        points: int,
        *,
        hidden: Iterable[int] = (128, 128, 128),
        T: int = 100,
        seed: int = 0,
        dtype: str = "float32",
    ) -> None:
        if not isinstance(hidden, Iterable):
            raise ArgumentError("hidden", repr(hidden), "layer widths, as in (128, 128)")
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
        self.shape = (d,)
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
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            shapes[f"layers.{i}.weight"] = (inputs, outputs)
            shapes[f"layers.{i}.bias"] = (outputs,)
        embedded = kind == "tutorial"
        if sum(columns):
            shapes["time.weight"] = (self.T if embedded else TIME_FEATURES, sum(columns))
            if not embedded:
                shapes["time.bias"] = (sum(columns),)
        self.layout = Layout(shapes)
        at = self.layout.offsets
        self.plan = MLPPlan(
            layers=tuple(
                DenseLayer(
                    inputs, outputs, at[f"layers.{i}.weight"], at[f"layers.{i}.bias"], *kinds[i], sum(columns[:i])
                )
                for i, (inputs, outputs) in enumerate(pairwise(widths))
            ),
            T=self.T,
            size=self.layout.size,
            time_width=sum(columns),
            time_weight=at.get("time.weight", 0),
            time_bias=at.get("time.bias", 0),
            features=None if embedded or not sum(columns) else sinusoidal_features(self.T),
        )
        self.flat = self.layout.zeros(self.dtype)
        if draw:
            self.redraw()

    @property
    def params(self) -> dict[str, Any]:
        return self.layout.views(self.flat)

    def redraw(self) -> None:
        """Draw the weights anew from the network's seed."""
        for tensor, (name, view) in enumerate(self.params.items()):
            if self.kind == "modulated" and (name.startswith("time.") or name == f"layers.{len(self.hidden)}.weight"):
                view[...] = 0  # no modulation, and the best constant guess at the noise
                continue
            fan_in = self.layout.shapes[name.replace("bias", "weight")][0]
            draw = np.empty((1, view.size))
            at = {"seed": self.seed, "stream": Stream.WEIGHTS, "step": 0, "first_sample": tensor}
            if name == "time.weight":
                noise.fill_normal(draw, **at)
            else:
                noise.fill_uniform(draw, **at)
                draw = (2 * draw - 1) / math.sqrt(fan_in)
            view[...] = draw.reshape(view.shape)

    def predict(self, x: Any, t: Any, labels: Any = None, *, backend: str | Backend = "auto", flat: Any = None) -> Any:
        """Return the network's output for x at timesteps t.

        Parameters
        ----------
        x : (n, points) array
            Noisy curves, in the network's own range.
        t : int or (n,) int array
            Timesteps, 0 .. T - 1.
        labels : None
            This network has no classes.
        backend : str or Backend, optional
        flat : (layout.size,) array, optional
            Other parameters than the network's own, for instance their average.

        Returns
        -------
        (n, points) array
            float32; float64 for a float64 network, which needs the numpy backend.

        Raises
        ------
        ArgumentError
            Shape, dtype or range of an argument.
        """
        if labels is not None:
            raise ArgumentError("labels", type(labels).__name__, "None: this network has no classes")
        be = backend_for(backend, x=x, t=t, flat=flat)
        if self.dtype == np.float64 and be.name != "numpy":
            raise ArgumentError("backend", repr(be.name), "'numpy': this network has float64 parameters")
        on_device = is_on_device(x)
        x = be.asarray(check_array("x", x, shape=(None, self.points), dtype=self.dtype))
        steps = be.asarray(check_timesteps(t, self.T, len(x)), np.int64)
        weights = self.flat
        if flat is not None:
            weights = check_array("flat", flat, shape=self.flat.shape, finite=False, dtype=self.dtype)
        y = be.mlp_forward(self.plan, be.asarray(weights, self.dtype), x, steps)
        return y if on_device else be.to_numpy(y)

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
        keys = {"kind", "points", "hidden", "T", "dtype", "seed"}
        if not isinstance(config, Mapping) or set(config) != keys:
            shown = sorted(map(str, config)) if isinstance(config, Mapping) else type(config).__name__
            raise ArgumentError("network", str(shown), f"the keys {sorted(keys)}")
        self = cls.__new__(cls)
        kind = check_choice("kind", config["kind"], KINDS)
        hidden = config["hidden"]
        if not isinstance(hidden, list) or (kind == "tutorial" and hidden):
            raise ArgumentError("hidden", repr(hidden), "a list of layer widths, empty for the tutorial network")
        widths = tuple(check_int("hidden", width, low=1, high=MAX_WIDTH) for width in hidden)
        self._build(kind, config["points"], widths, config["T"], config["seed"], config["dtype"], draw)
        return self

    def __repr__(self) -> str:
        if self.kind == "tutorial":
            return f"MLP.tutorial({self.points}, T={self.T})"
        return f"MLP({self.points}, hidden={self.hidden}, T={self.T})"
