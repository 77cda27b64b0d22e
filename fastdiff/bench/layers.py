"""Workloads of one layer alone, on arrays that are there, as in a network; and the optimiser's step."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from fastdiff.backends.layers import Affine, Norm
from fastdiff.bench.arrays import white
from fastdiff.bench.workload import Arrays, PeerWork, Run, Work, Workload, fills, finite, first

HEAD, GROUPS = 32, 8  # width of an attention head, groups of a norm


class Layer(Workload):
    """What workloads of layers have in common: what a run fills is made before, and the deviation of it is checked."""

    needs = "layers"
    example_values = 70_000
    image = True
    deviation: ClassVar[tuple[float, float]] = (0.8, 1.2)

    def empty(self, be: Any) -> Any:
        """Room for a result like the samples."""
        return be.empty((self.n, *self.shape))

    def filling(self, be: Any) -> Run:
        """Return what fills arrays and returns them, the one of the samples' shape first."""
        raise NotImplementedError

    def ours(self, be: Any) -> Work:
        check = finite((self.n, *self.shape), *self.deviation)
        return Work(self.filling(be), lambda result: check(first(result)))

    def operation(self, be: Any) -> Run:
        fill = self.filling(be)
        filled: list[Any] = []

        def body() -> None:
            filled[:] = [fill()]

        recording = be.record(body)

        def run() -> Any:
            recording.run()
            return filled[0]

        return run

    def gpu_forms(self, peers: Any, folder: Any) -> Any:
        given = {name: peers.device(value) for name, value in self.inputs().items()}
        return peers.layer(self.peer(peers.torch, given))


class Conv(Layer):
    """A convolution 3 x 3 that keeps size and channels."""

    rate_unit = "GF/s"
    tolerance = 5e-6
    convolves = True
    peer_name, peer_samples = "torch conv2d (oneDNN), channels-last", 2
    parity: ClassVar[dict[str, float]] = {"conv": 1e-5}

    def counts(self) -> tuple[int, int]:
        # of the direct sum; an algorithm may need fewer
        return 8 * self.values + 36 * self.shape[-1] ** 2, 18 * self.values * self.shape[-1]

    def inputs(self) -> Arrays:
        x, c = white(self.n, self.shape), self.shape[-1]
        w = white(3, (3, c, c), seed=1) / np.float32(math.sqrt(9 * c))
        return {"x": x, "w": w, "b": white(1, (c,), seed=2)[0] / 10, "dy": x[::-1].copy()}

    def arrays(self, be: Any) -> tuple[Any, ...]:
        """Return the geometry and the inputs on a backend."""
        from fastdiff.backends.layers import Conv as Geometry

        return Geometry((3, 3), pad=(1, 1, 1, 1)), *(be.asarray(value) for value in self.inputs().values())

    def filling(self, be: Any) -> Run:
        (geometry, x, w, b, _), out = self.arrays(be), self.empty(be)
        return fills(out, lambda: be.conv(geometry, x, w, b, out))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        def conv(x: Any, w: Any, b: Any) -> Any:
            return torch.nn.functional.conv2d(x, w, b, padding=1).permute(0, 2, 3, 1)

        return PeerWork(conv, channels_last(torch, given)[:3])


class ConvBackward(Conv):
    """Its gradients, of input, weights and bias."""

    def counts(self) -> tuple[int, int]:
        return 12 * self.values + 72 * self.shape[-1] ** 2, 36 * self.values * self.shape[-1]

    def filling(self, be: Any) -> Run:
        (geometry, x, w, b, dy), dx = self.arrays(be), self.empty(be)
        dw, db = be.empty(w.shape), be.empty(b.shape)
        return fills((dx, dw, db), lambda: be.conv_backward(geometry, dy, x, w, dx, dw, db))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        def gradients(x: Any, w: Any, b: Any, dy: Any) -> Any:
            dx, dw, db = conv_gradients(torch, x, w, b, dy, (True, True, True))
            return dx.permute(0, 2, 3, 1), dw.permute(2, 3, 1, 0), db

        return PeerWork(gradients, channels_last(torch, given))


def channels_last(torch: Any, given: Arrays) -> tuple[Any, ...]:
    """Return x, w, b and dy of a convolution as PyTorch takes them, in channels-last memory."""
    x, dy = (given[name].permute(0, 3, 1, 2) for name in ("x", "dy"))
    return x, given["w"].permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last), given["b"], dy


def conv_gradients(torch: Any, x: Any, w: Any, b: Any, dy: Any, which: tuple[bool, bool, bool]) -> Any:
    """Return gradients of input, weights and bias, None for those that are not asked for."""
    ones = [1, 1]
    bias = list(b.shape) if which[2] else None
    return torch.ops.aten.convolution_backward(dy, x, w, bias, ones, ones, ones, False, [0, 0], 1, which)


class GroupNorm(Layer):
    """GroupNorm and SiLU in one pass."""

    deviation = (0.5, 0.8)
    memory_bound = True

    def counts(self) -> tuple[int, int]:
        return 8 * self.values, 9 * self.values

    def inputs(self) -> Arrays:
        return {"x": white(self.n, self.shape)}

    def filling(self, be: Any) -> Run:
        x, affine, out = be.asarray(self.inputs()["x"]), scale_and_shift(be, self.shape[-1]), self.empty(be)
        layer = Norm(x, affine, be.empty((self.n, GROUPS, 2)), silu=True)
        return fills(out, lambda: be.norm(layer, out, eps=1e-5))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        F, groups = torch.nn.functional, GROUPS

        def norm(x: Any) -> Any:
            return F.silu(F.group_norm(x, groups)).permute(0, 2, 3, 1)

        return PeerWork(norm, (given["x"].permute(0, 3, 1, 2),))


def scale_and_shift(be: Any, channels: int) -> Affine:
    """Return gamma and beta of a norm that change nothing."""
    return Affine(be.asarray(np.ones(channels, np.float32)), be.asarray(np.zeros(channels, np.float32)))


class LayerNorm(Layer):
    """LayerNorm over the channels."""

    def counts(self) -> tuple[int, int]:
        return 8 * self.values, 8 * self.values

    def layer(self, be: Any) -> Norm:
        x, affine = be.asarray(white(self.n, self.shape)), scale_and_shift(be, self.shape[-1])
        return Norm(x, affine, be.empty((self.n, *self.shape[:-1], 2)))

    def filling(self, be: Any) -> Run:
        layer, out = self.layer(be), self.empty(be)
        return fills(out, lambda: be.layer_norm(layer, out, eps=1e-5))


class LayerNormBackward(LayerNorm):
    """Its gradients."""

    tolerance = 5e-6

    def counts(self) -> tuple[int, int]:
        return 12 * self.values, 13 * self.values

    def filling(self, be: Any) -> Run:
        layer, dx = self.layer(be), self.empty(be)
        dy = be.asarray(white(self.n, self.shape)[..., ::-1])
        grads = Affine(be.empty(self.shape[-1:]), be.empty(self.shape[-1:]))
        be.layer_norm(layer, dx, eps=1e-5)
        return fills((dx, grads.gamma, grads.beta), lambda: be.layer_norm_backward(layer, dy, dx, grads))


class Gelu(Layer):
    """The activation alone."""

    deviation = (0.5, 0.8)

    def counts(self) -> tuple[int, int]:
        return 8 * self.values, 5 * self.values

    def filling(self, be: Any) -> Run:
        x, out = be.asarray(white(self.n, self.shape)), self.empty(be)
        return fills(out, lambda: be.gelu(x, out))


class Attention(Layer):
    """Softmax attention of several heads, from queries, keys and values in one array."""

    rate_unit = "GF/s"
    deviation = (0.05, 1)

    @property
    def heads(self) -> int:
        """How many."""
        return self.shape[1] // HEAD

    def counts(self) -> tuple[int, int]:
        return 16 * self.values, 4 * self.values * self.shape[0]

    def inputs(self) -> Arrays:
        length, channels = self.shape
        return {"qkv": white(self.n, (length, 3 * channels))}

    def filling(self, be: Any) -> Run:
        qkv, out = be.asarray(self.inputs()["qkv"]), self.empty(be)
        log_sums, heads = be.empty((self.n, self.heads, self.shape[0])), self.heads
        return fills(out, lambda: be.attention(qkv, out, log_sums, heads=heads))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        length, channels = self.shape
        parts = given["qkv"].reshape(self.n, length, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)

        def attend(*parts: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)

        return PeerWork(attend, tuple(parts))


class OptimizerStep(Workload):
    """AdamW with clipping and a moving average."""

    example_values = 100_000

    def counts(self) -> tuple[int, int]:
        # parameters, gradient, two moments and the average in, all but the gradient out
        return 36 * self.values, 20 * self.values

    def ours(self, be: Any) -> Work:
        from fastdiff.backends import AdamW, TrainState

        rng, size = np.random.default_rng(0), self.values
        params, grads, m = (be.asarray(rng.standard_normal(size, np.float32)) for _ in range(3))
        v, average = be.asarray(np.ones(size, np.float32)), be.asarray(np.zeros(size, np.float32))
        options = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.01, 0.5, 0.5, 1.0, 0.999)

        state = TrainState(params, grads, m, v, average)
        run = fills(params, lambda: be.adamw(state, options))
        return Work(run, lambda p: finite((1, size), 0.5, 2)(p[None]))
