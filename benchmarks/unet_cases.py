"""More workloads for `peers.py`, beside those of `cases.py`: other U-Nets and pictures, and convolutions alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cases
import numpy as np
from cases import Case, Work

EMA = 0.999
CONV_CHANNELS, CONV_SIZES = (64, 128, 256), (8, 16, 32, 64)
LARGE = 64  # pixels: pictures of this size come in batches of a quarter


@dataclass(frozen=True)
class UNetCase(Case):
    """A U-Net like that of `cases`, or trained as a user trains it.

    Attributes
    ----------
    channels : tuple of int
    weights : int
        Its parameters.
    forward : int
        Operations of a forward pass, for one picture.
    ema : bool
        Whether training keeps the moving average.
    """

    channels: tuple[int, ...] = (32, 64, 128)
    weights: int = cases.UNET_PARAMETERS
    forward: int = cases.UNET_OPERATIONS
    ema: bool = False

    def setup(self, backend: Any = "cpu") -> Work:
        import fastdiff as fd

        be = fd.get_backend(backend)
        if self.kind == "unet":
            net, x, t = network(fd, self), cases.pictures(self, self.n), np.arange(self.n) % cases.IMAGE_T
            return Work(lambda: net.predict(x, t, backend=be), cases.finite(x.shape, 1e-3, 1e3))
        X = cases.pictures(self)
        model = cases.untrained(fd, network(fd, self), cases.schedule(fd, self), be)
        how = {"batch": self.n, "data_range": (-1.0, 1.0), **cases.training_only(fd)}
        model.fit(X, steps=1, ema=EMA if self.ema else None, **how)

        def check(result: Any) -> None:
            assert result.step >= 1 + self.units
            assert np.isfinite(result.net.flat).all()

        return Work(lambda: model.fit(X, steps=self.units, **how), check, self.units)

    @property
    def parameters(self) -> int:
        return self.weights

    @property
    def operations(self) -> int:
        passes = 3 if self.kind == "unet-training" else 1
        return super().operations + passes * self.n * (self.forward - cases.UNET_OPERATIONS)


def network(fd: Any, case: Case) -> Any:
    """`cases.network`, with the channels of the case."""
    if not isinstance(case, UNetCase) or case.channels == cases.UNET["channels"]:
        return cases.network(fd, case)
    net = fd.UNet(case.shape, T=cases.IMAGE_T, **cases.UNET | {"channels": case.channels})
    rng = np.random.default_rng(0)
    for view in net.params.values():
        view += rng.normal(size=view.shape, scale=0.02).astype(np.float32)
    return net


class Layer(NamedTuple):
    """A convolution 3x3 of n square pictures, into as many channels as they have."""

    n: int
    size: int
    channels: int

    @property
    def title(self) -> str:
        return f"{self.channels} channels, {self.size} x {self.size}, batch {self.n}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.size, self.size, self.channels

    @property
    def operations(self) -> int:
        return 2 * 9 * self.channels * math.prod(self.shape)

    def arrays(self) -> dict[str, Any]:
        """Return x, w, b and the gradient dy of the output."""
        rng = np.random.default_rng(self.size * self.channels)
        c = self.channels
        shapes = {"x": self.shape, "w": (3, 3, c, c), "b": (c,), "dy": self.shape}
        arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        arrays["w"] /= np.float32(3 * c**0.5)
        return arrays


def input_gradient(be: Any, geometry: Any, dy: Any, w: Any, dx: Any) -> None:
    """The part of `conv_backward` that fills dx."""
    from fastdiff.backends.cpu import conv as cpu_conv

    product = cpu_conv._product(geometry, dx.shape, dy.shape[3], True)
    nothing = cpu_conv.NOTHING
    flat = dy.reshape(-1), w.reshape(-1), dx.reshape(-1)
    be._do(*be._convolve(product, *flat, (True, nothing, nothing, nothing)))


@dataclass(frozen=True)
class ConvCase(Case):
    """Convolutions of many shapes, each timed alone: forward, or one of the two gradients."""

    @property
    def layers(self) -> list[Layer]:
        return [
            Layer(max(1, self.n // (4 if size == LARGE else 1)), size, channels)
            for channels in CONV_CHANNELS
            for size in CONV_SIZES
        ]

    def setups(self, be: Any) -> list[Callable[[], Any]]:
        """Return what is to be timed for each layer: as in a network, it fills an array that is there."""
        return [self._setup(be, layer) for layer in self.layers]

    def _setup(self, be: Any, layer: Layer) -> Callable[[], Any]:
        from fastdiff.backends.layers import Conv

        same = Conv((3, 3), pad=(1, 1, 1, 1))
        x, w, b, dy = layer.arrays().values()
        like = {"conv-forward": dy, "conv-input-gradient": x, "conv-weight-gradient": w}
        out, db = np.empty_like(like[self.kind]), np.empty_like(b)
        call = {
            "conv-forward": lambda: be.conv(same, x, w, b, out),
            "conv-input-gradient": lambda: input_gradient(be, same, dy, w, out),
            "conv-weight-gradient": lambda: be.conv_backward(same, dy, x, w, None, out, db),
        }[self.kind]

        recording = be.record(call)

        def run() -> Any:
            recording.run()
            return out

        return run

    @property
    def values(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def normals(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return sum(8 * math.prod(layer.shape) + 36 * layer.channels**2 for layer in self.layers)

    @property
    def operations(self) -> int:
        return sum(layer.operations for layer in self.layers)


PICTURE = (32, 32, 3)
LARGE_PICTURES = {"shape": (LARGE, LARGE, 3), "net": "unet", "forward": 4_473_094_144}
WIDE = {
    "shape": PICTURE, "net": "unet", "channels": (128, 128, 128), "weights": 9_092_483, "forward": 6_044_254_208,
}  # fmt: skip
ON_LARGE, ON_WIDE = "U-Net, 64 x 64 x 3, batch 4", "U-Net of 128 channels, 32 x 32 x 3, batch 16"

# fmt: off
CASES: tuple[Case, ...] = (
    UNetCase(
        "unet-train-ema-16", "training step with average, U-Net, 32 x 32 x 3, batch 16", "unet-training", 16,
        PICTURE, "unet", 4, ema=True,
    ),
    UNetCase("unet-train-64px-4", f"training step, {ON_LARGE}", "unet-training", 4, units=4, **LARGE_PICTURES),
    UNetCase("unet-forward-64px-4", f"forward pass, {ON_LARGE}", "unet", 4, **LARGE_PICTURES),
    UNetCase("unet-train-wide-16", f"training step, {ON_WIDE}", "unet-training", 16, **WIDE),
    UNetCase("unet-forward-wide-16", f"forward pass, {ON_WIDE}", "unet", 16, **WIDE),
    ConvCase("conv-forward", "conv 3x3, forward", "conv-forward", 16, ()),
    ConvCase("conv-input-gradient", "conv 3x3, input gradient", "conv-input-gradient", 16, ()),
    ConvCase("conv-weight-gradient", "conv 3x3, weight and bias gradient", "conv-weight-gradient", 16, ()),
)
# fmt: on
BY_NAME = {case.name: case for case in CASES}
