"""U-Nets for images and long curves, conditioned on the timestep and, where there are classes, on a label."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff import noise
from fastdiff.backends import Array, Backend, Row, backend_for
from fastdiff.backends.layers import Conv, LayerBackend
from fastdiff.errors import (
    ArgumentError,
    BackendError,
    check_array,
    check_choice,
    check_float,
    check_indices,
    check_int,
    check_seed,
    check_timesteps,
    is_on_device,
)
from fastdiff.nn.layers import Program, Value, Workspace
from fastdiff.nn.mlp import MAX_PERIOD, MAX_WIDTH
from fastdiff.nn.params import Layout
from fastdiff.noise import Stream

log = logging.getLogger("fastdiff")

MAX_GROUPS = 32
MAX_LEVELS = 12
MAX_SIZE = 1 << 31
CHUNK_VALUES = 1 << 24  # of activations: `predict` takes as many images at once


class UNet:
    """A U-Net: x_t and t in, one value for every value of the image out.

    The blocks are those of Ho et al. 2020 (appendix B), in the form of diffusers' UNet2DModel: residual blocks of two
    GroupNorm, SiLU and 3x3 convolutions with the time embedding added between them, self-attention where asked for,
    strided convolutions down, nearest upsampling and a convolution up, skip connections by concatenation. A size that
    the depth does not divide is padded with zeros inside, and cropped again. Images of height 1, curves among them,
    have kernels of height 1.

    Parameters
    ----------
    shape : tuple of int
        Of one image, (height, width, channels); (1, points, channels) or (points,) of one curve.
    channels : iterable of int, optional
        Widths of the levels, each of half the size of the one before.
    blocks : int, optional
        Residual blocks in a level on the way down; there is one more on the way up.
    attention : iterable of bool, optional
        For each level, whether attention follows its blocks; by default in the last level only.
    T : int, optional
        Number of timesteps.
    classes : int, optional
        Number of classes; None: no labels.
    head_width : int, optional
        Channels of an attention head; None: one head has all channels.
    groups : int, optional
        Groups of every GroupNorm, a divisor of all `channels`. By default the largest one up to 32 that leaves four
        channels or more in a group.
    dropout : float, optional
        Share of the values dropped in each block in training.
    scale_shift : bool, optional
        The time embedding also scales (feature-wise modulation, Perez et al. 2018) instead of being added.
    seed : int, optional
        The weights are drawn from stream WEIGHTS, one row a tensor.
    dtype : {"float32", "float64"}, optional
        float64 networks run on the numpy backend only.
    outputs : int, optional
        Channels of the output, by default those of the image.
    embedding : int, optional
        Width of the time embedding, by default four times the first level's.
    up_attention : iterable of bool, optional
        `attention` on the way up, in the same order; by default the same.
    middle_attention : bool, optional
        Whether the middle block has attention.
    padding : {1, 0}, optional
        Strided convolutions pad all around, or only below and to the right.
    flip : bool, optional
        The sinusoids of t are cosines, then sines, or the other way round.
    frequency_shift : int, optional
        Frequency i of h is 10000^(-i / (h - frequency_shift)).
    eps : float, optional
        Of GroupNorm.
    draw : bool, optional
        Without it the weights are zero, for a caller who fills them.

    Attributes
    ----------
    flat : (layout.size,) array
        All parameters in one buffer.
    params : dict of str to array
        Named views into `flat`, with UNet2DModel's names; convolutions are (rows, columns, in, out), linear layers
        (1, 1, in, out), and queries, keys and values are one layer, ``to_qkv``.
    shape : tuple of int
        Shape of one image.
    prediction : {"noise", "x0", "v"} or None
        What the output is, where a file that the network came from said so.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        channels: Iterable[int] = (32, 64, 128),
        blocks: int = 2,
        attention: Iterable[bool] | None = None,
        T: int = 1000,
        classes: int | None = None,
        head_width: int | None = None,
        groups: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        seed: int = 0,
        dtype: str = "float32",
        outputs: int | None = None,
        embedding: int | None = None,
        up_attention: Iterable[bool] | None = None,
        middle_attention: bool = True,
        padding: int = 1,
        flip: bool = True,
        frequency_shift: int = 0,
        eps: float = 1e-5,
        draw: bool = True,
    ) -> None:
        if not isinstance(shape, (tuple, list)) or len(shape) not in (1, 3):
            raise ArgumentError("shape", repr(shape), "(height, width, channels) of an image, or (points,) of a curve")
        self.shape = tuple(check_int("shape", size, low=1, high=MAX_WIDTH) for size in shape)
        self.channels = widths = _several("channels", channels, "widths of the levels, as in (32, 64, 128)")
        for width in widths:
            check_int("channels", width, low=2, high=MAX_WIDTH)
        levels = check_int("the number of channels", len(widths), low=1, high=MAX_LEVELS)
        self.blocks = check_int("blocks", blocks, low=1, high=64)
        last = (False,) * (levels - 1) + (True,)
        self.attention = _flags("attention", last if attention is None else attention, levels)
        self.up_attention = _flags("up_attention", self.attention if up_attention is None else up_attention, levels)
        self.middle_attention = _flag("middle_attention", middle_attention)
        self.T = check_int("T", T, low=1, high=1 << 16)
        self.classes = _optional("classes", classes, high=1 << 20)
        attending = [width for width, *on in zip(widths, self.attention, self.up_attention, strict=True) if any(on)]
        narrowest = min([*attending, *widths[-1:] * self.middle_attention], default=MAX_WIDTH)
        self.head_width = _optional("head_width", head_width, high=narrowest)
        self.groups = _groups(widths, groups)
        self.dropout = check_float("dropout", dropout, low=0, high=1, high_open=True)
        self.scale_shift = _flag("scale_shift", scale_shift)
        self.seed = check_seed(seed)
        self.dtype = np.dtype(check_choice("dtype", dtype, ["float32", "float64"]))
        self.image = self.shape if len(self.shape) == 3 else (1, *self.shape, 1)
        self.outputs = self.image[2] if outputs is None else check_int("outputs", outputs, low=1, high=MAX_WIDTH)
        self.embedding = 4 * widths[0] if embedding is None else check_int("embedding", embedding, low=1, high=1 << 20)
        self.padding = check_int("padding", padding, low=0, high=1)
        self.flip = _flag("flip", flip)
        self.frequency_shift = check_int("frequency_shift", frequency_shift, low=0, high=widths[0] // 2 - 1)
        self.eps = check_float("eps", eps, low=0, low_open=True)
        self.prediction: str | None = None

        self.flat_images = self.image[0] == 1
        depth = 1 << (levels - 1)
        smallest = self.image[1] if self.flat_images else min(self.image[:2])
        if smallest < depth:
            raise ArgumentError("shape", str(self.shape), f"a size of at least {depth} for {levels} levels")
        height, width = (-(-size // depth) * depth for size in self.image[:2])
        self._padded = (1 if self.flat_images else height, width)
        probe = Program(1, training=False)
        self._record(probe)
        probe.plan()
        self._chunk = max(1, CHUNK_VALUES // probe.size)
        self.layout = Layout(probe.parameters)
        if self.layout.size > MAX_SIZE:
            raise ArgumentError("channels", str(widths), f"a network of at most {MAX_SIZE} parameters")
        self._workspace = Workspace()
        self.flat = self.layout.zeros(self.dtype)
        if draw:
            self.redraw()

    @classmethod
    def like_diffusers(cls, config: Mapping[str, Any], **options: Any) -> Self:
        """Return the architecture of a UNet2DModel, with weights drawn from a seed.

        Parameters
        ----------
        config : mapping
            As in its config.json; what it leaves out has the default of diffusers.
        **options
            Of `UNet`, before those of `config`: shape where it has no sample_size, T, seed, dtype.

        Raises
        ------
        ArgumentError
            The configuration names blocks or options that we do not have, or is inconsistent.
        """
        from fastdiff.interop import options_from_diffusers

        options = {**options_from_diffusers(config), **options}
        if "shape" not in options:
            raise ArgumentError("shape", "nothing", "(height, width, channels): the configuration has no sample_size")
        return cls(**options)

    def save_diffusers(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors, as ``UNet2DModel.from_pretrained`` reads them.

        Parameters
        ----------
        folder : path
            Made where there is none.

        Raises
        ------
        ArgumentError
            UNet2DModel does not have this architecture (images of height 1).
        DataError
            The folder cannot be written.
        """
        from fastdiff.interop import save_diffusers

        save_diffusers(self, folder)

    def _record(self, p: Program) -> None:
        """Record the network on the images of a program."""
        rows = 1 if self.flat_images else 3
        around, after = ((1, 1), (self.padding, 1))
        side = ((0, 0), (0, 0)) if self.flat_images else (around, after)
        same = Conv((rows, 3), pad=(*side[0], *around))
        up = same._replace(up=(1 if self.flat_images else 2, 2))
        down = Conv((rows, 3), up.up, (*side[1], *after))

        def norm(name: str, x: Value, silu: bool = True, modulation: Value | None = None) -> Value:
            return p.norm(name, x, groups=self.groups, eps=self.eps, silu=silu, modulation=modulation)

        def residual(name: str, x: Value, width: int) -> Value:
            time = p.conv(f"{name}.time_emb_proj", condition, width * (2 if self.scale_shift else 1))
            shift, modulation = (None, time) if self.scale_shift else (time, None)
            h = p.conv(f"{name}.conv1", norm(f"{name}.norm1", x), width, same, shift=shift)
            h = p.dropout(norm(f"{name}.norm2", h, modulation=modulation), self.dropout)
            if x.width != width:
                x = p.conv(f"{name}.conv_shortcut", x, width)
            return p.conv(f"{name}.conv2", h, width, same, residual=x)

        def attend(name: str, x: Value, normalised: bool = True) -> Value:
            head = self.head_width or x.width
            heads = x.width // head
            h = norm(f"{name}.group_norm", x, silu=False) if normalised else x
            h = p.attention(p.conv(f"{name}.to_qkv", h, 3 * heads * head), heads)
            return p.conv(f"{name}.to_out.0", h, x.width, residual=x)

        h = p.take(p.given("features", (self.T, self.channels[0]), fixed=True), p.given("t", (p.n,)))
        h = p.silu(p.conv("time_embedding.linear_1", h, self.embedding))
        label = None
        if self.classes is not None:
            table = p.parameter("class_embedding.weight", (self.classes, self.embedding))
            label = p.take(table, p.given("labels", (p.n,)))
        condition = p.silu(p.conv("time_embedding.linear_2", h, self.embedding, shift=label))

        x = p.resize(p.given("x", (p.n, *self.image)), *self._padded)
        h = p.conv("conv_in", x, self.channels[0], same)
        skips = [h]
        for i, width in enumerate(self.channels):
            name = f"down_blocks.{i}"
            for j in range(self.blocks):
                h = residual(f"{name}.resnets.{j}", h, width)
                if self.attention[i]:
                    h = attend(f"{name}.attentions.{j}", h)
                skips.append(h)
            if i < len(self.channels) - 1:
                h = p.conv(f"{name}.downsamplers.0.conv", h, width, down)
                skips.append(h)
        h = residual("mid_block.resnets.0", h, h.width)
        if self.middle_attention:
            h = attend("mid_block.attentions.0", h, normalised=not self.scale_shift)
        h = residual("mid_block.resnets.1", h, h.width)
        for k, i in enumerate(reversed(range(len(self.channels)))):
            name, width = f"up_blocks.{k}", self.channels[i]
            for j in range(self.blocks + 1):
                h = residual(f"{name}.resnets.{j}", p.concatenate(h, skips.pop()), width)
                if self.up_attention[i]:
                    h = attend(f"{name}.attentions.{j}", h)
            if i:
                h = p.conv(f"{name}.upsamplers.0.conv", h, width, up)
        p.resize(p.conv("conv_out", norm("conv_norm_out", h), self.outputs, same), *self.image[:2])

    @cached_property
    def _features(self) -> npt.NDArray[Any]:
        """(T, channels[0]): cos and sin of t at falling frequencies (Vaswani et al. 2017, section 3.5)."""
        half = self.channels[0] // 2
        angles = np.exp(-math.log(MAX_PERIOD) * np.arange(half) / (half - self.frequency_shift))
        angles = np.arange(self.T)[:, None] * angles
        parts = (np.cos(angles), np.sin(angles))
        features = [*(parts if self.flip else parts[::-1]), np.zeros((self.T, self.channels[0] % 2))]
        return np.hstack(features).astype(self.dtype)

    @property
    def params(self) -> dict[str, Any]:
        return self.layout.views(self.flat)

    def redraw(self) -> None:
        """Draw the weights anew from the network's seed: uniform in +-1 / sqrt(fan in), a class embedding normal.

        The last layer of every block and that of the network start at zero (Ho et al. 2020): each block begins as
        the identity, and the network with the best constant guess at the noise. Gains are one.
        """
        for tensor, (name, view) in enumerate(self.params.items()):
            layer, _, part = name.rpartition(".")
            at = {"seed": self.seed, "stream": Stream.WEIGHTS, "step": 0, "first_sample": tensor}
            draw = np.empty((1, view.size))
            if "norm" in layer.rpartition(".")[2] or layer == "conv_norm_out":
                draw[...] = part == "weight"
            elif layer.endswith(("conv2", "to_out.0", "conv_out")):
                draw[...] = 0
            elif layer == "class_embedding":
                noise.fill_normal(draw, **at)
            else:
                noise.fill_uniform(draw, **at)
                draw = (2 * draw - 1) / math.sqrt(math.prod(self.layout.shapes[f"{layer}.weight"][:-1]))
            view[...] = draw.reshape(view.shape)

    def predict(self, x: Any, t: Any, labels: Any = None, *, backend: str | Backend = "auto", flat: Any = None) -> Any:
        """Return the network's output for x at timesteps t.

        Parameters
        ----------
        x : (n, *shape) array
            Noisy images, in the network's own range.
        t : int or (n,) int array
            Timesteps, 0 .. T - 1.
        labels : int or (n,) int array
            Classes, 0 .. classes - 1, for a network that has them.
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
            The backend does not run image networks.
        """
        be = self._layers(backend_for(backend, x=x, t=t, labels=labels, flat=flat))
        on_device = is_on_device(x)
        x = be.asarray(check_array("x", x, shape=(None, *self.shape), dtype=self.dtype), self.dtype)
        n = len(x)
        rows = {"t": be.asarray(check_timesteps(t, self.T, n), np.int64)}
        if self.classes is None and labels is not None:
            raise ArgumentError("labels", type(labels).__name__, "None: this network has no classes")
        if self.classes is not None:
            if labels is None:
                raise ArgumentError("labels", "None", f"a class from 0 to {self.classes - 1} for each image")
            rows["labels"] = be.asarray(check_indices("labels", labels, self.classes, n), np.int64)
        if flat is None:
            flat = self.flat
        flat = check_array("flat", flat, shape=self.flat.shape, finite=False, dtype=self.dtype)
        params = self.layout.views(be.asarray(flat, self.dtype))
        y = be.empty((n, *self.image[:2], self.outputs), self.dtype)
        self._fill(y, be, params, {"x": x.reshape(n, *self.image), **rows})
        y = y if len(self.shape) == 3 or self.outputs > 1 else y.reshape(x.shape)
        return y if on_device else be.to_numpy(y)

    def evaluator(self, be: Backend, flat: Any = None) -> Callable[..., Array]:
        """Return the network as a function of flat states (n, D), t and labels, on a backend: for `fastdiff.sample`.

        Arrays are the backend's own and are not checked; a result is valid until the next call. `flat` is as for
        `predict`.
        """
        layers = self._layers(be)
        params = self.layout.views(be.asarray(self.flat if flat is None else flat, self.dtype))
        y = steps = None

        def evaluate(x: Array, t: int, labels: Array = None) -> Array:
            nonlocal y, steps
            n = len(x)
            if y is None or len(y) != n:  # the last batch may be smaller
                y, steps = be.empty((n, *self.image[:2], self.outputs), self.dtype), be.empty((n,), np.int64)
            steps.fill(t)
            given = {"x": be.asarray(x, self.dtype).reshape(n, *self.image), "t": steps}
            self._fill(y, layers, params, given if labels is None else {**given, "labels": labels})
            return be.asarray(y, x.dtype).reshape(x.shape)

        return evaluate

    def stepper(self, be: Backend, flat: Any = None) -> Callable[..., None]:
        """Return a function that takes a step of a sampler: for `fastdiff.sample`.

        ``step(x, previous, row, clip, labels=None, *, seed, stream, first_sample)`` changes flat states x (n, D), and
        where it is given the x0 of the row before, as `Backend.sampler_step` does with the network's output. Arrays
        are the backend's own and are not checked. `flat` is as for `predict`, and stays as it is.
        """
        layers = self._layers(be)
        weights = be.asarray(self.flat if flat is None else flat, self.dtype)
        params, forms = self.layout.views(weights), {}

        def one(row: Row, clip: Any, x: Array, previous: Array, labels: Array, **law: Any) -> None:
            n = len(x)
            program = self._program(layers, n, False)
            given = {"x": program.own(layers, "x", (n, *self.image), self.dtype)}
            given["x"][...] = layers.asarray(x, self.dtype).reshape(given["x"].shape)
            given["t"] = program.own(layers, "t", (n,), np.int64)
            given["t"].fill(row.t)
            if labels is not None:
                given["labels"] = program.own(layers, "labels", (n,), np.int64)
                given["labels"][...] = labels
            queue = layers.queue()
            if queue not in forms:
                forms[queue] = program.prepare(layers, {}, params)

            def output() -> Array:
                return self._run(layers, params, given, forms=forms[queue]).reshape(x.shape)

            state, places = given["x"].reshape(x.shape), [weights, forms[queue][0][0]]
            layers.sample_step(program.kept_steps, places, output, state, x, previous, row, clip, **law)

        def step(
            x: Array, previous: Array, row: Row, clip: Any, labels: Array = None, *, first_sample: int, **law: Any
        ) -> None:
            if row.q == 0 and row.e == 0:
                be.sampler_step(x, None, previous, row, clip, first_sample=first_sample, **law)
                return
            for start in range(0, len(x), self._chunk):
                end = start + self._chunk
                parts = [None if array is None else array[start:end] for array in (x, previous, labels)]
                with self._workspace.lock:
                    one(row, clip, *parts, first_sample=first_sample + start, **law)

        return step

    def _fill(self, y: Array, be: LayerBackend, params: Mapping[str, Array], given: Mapping[str, Array]) -> None:
        """Fill y with the outputs for all rows of what is given, so many at once as the arena is to hold."""
        for start in range(0, len(y), self._chunk):
            part = slice(start, start + self._chunk)
            with self._workspace.lock:
                y[part] = self._run(be, params, {name: array[part] for name, array in given.items()})

    def gradient(
        self,
        be: LayerBackend,
        params: Array,
        x: Array,
        t: Array,
        target: Array,
        grads: Array,
        labels: Array = None,
        *,
        seed: int = 0,
        step: int = 0,
        first_sample: int = 0,
    ) -> Array:
        """Fill `grads` with the gradient of the mean squared error, and return that as an array of one value.

        Arrays are the backend's own and are not checked. The padding between the tensors of `grads` must be zero, and
        stays so. Memory is reused from step to step.

        Parameters
        ----------
        be : LayerBackend
        params, grads : (layout.size,) array
        x : (n, *shape) array
        t : (n,) int64 array
        target : (n, ...) array
            Like the output.
        labels : (n,) int64 array, optional
            For a network with classes.
        seed, step, first_sample : int, optional
            Of dropout: the training step, and the position in the batch of the first image.

        Returns
        -------
        (1,) array
            The backend's own, valid until the next call.
        """
        n = len(x)
        given = {"x": _shaped(x, (n, *self.image)), "t": t, "labels": labels}
        target = _shaped(target, (n, *self.image[:2], self.outputs))
        parts = self.layout.views(params), given, self.layout.views(grads), target
        with self._workspace.lock:
            return self._run(self._layers(be), *parts, seed=seed, step=step, first_sample=first_sample)

    def batch(self, be: LayerBackend, n: int, *, labels: bool) -> tuple[Array, Array, Array, Array | None]:
        """Return the places where `gradient` looks for a batch: what it finds there it does not copy.

        Parameters
        ----------
        be : LayerBackend
        n : int
            Number of images.
        labels : bool
            Whether there are labels.

        Returns
        -------
        x : (n, height, width, channels) array
        t : (n,) int64 array
        target : (n, height, width, outputs) array
        labels : (n,) int64 array or None
            Unfilled. The network's, and valid until it is given more images than ever before.
        """
        with self._workspace.lock:
            program = self._program(self._layers(be), n, True)
            x = program.own(be, "x", (n, *self.image), self.dtype)
            t = program.own(be, "t", (n,), np.int64)
            target = program.own(be, "target", (n, *self.image[:2], self.outputs), self.dtype)
            return x, t, target, program.own(be, "labels", (n,), np.int64) if labels else None

    def train_step(
        self,
        be: LayerBackend,
        kept: MutableMapping[Program, dict[Any, Any]],
        gradient: Callable[[], Array],
        n: int,
        step: int,
        *arrays: Any,
    ) -> None:
        """Do `LayerBackend.train_step`.

        Parameters
        ----------
        be : LayerBackend
        kept : mapping
            The caller's, empty at first, with weak keys: what is kept lives no longer than the arena that it uses.
        gradient : callable
            Without arguments it draws n images into `batch`, calls `gradient` for them, and returns the loss. All else
            that it uses is the same whenever it is called with this `kept`.
        n, step : int
        *arrays
            params, grads, m, v, average, all (layout.size,), an `AdamW`, and results (rows, 2).
        """
        with self._workspace.lock:
            be.train_step(kept.setdefault(self._program(be, n, True), {}), gradient, step, *arrays)

    def _program(self, be: LayerBackend, n: int, training: bool) -> Program:
        return self._workspace.program(be, n, training, self.dtype, self._record)

    def _run(
        self,
        be: LayerBackend,
        params: Mapping[str, Array],
        given: Mapping[str, Array],
        grads: Mapping[str, Array] | None = None,
        target: Array = None,
        **options: Any,
    ) -> Array:
        program = self._program(be, len(given["x"]), grads is not None)
        features = self._workspace.constant(be, "features", self._features)
        return program.run(be, params, {**given, "features": features}, grads, target, **options)

    def _layers(self, be: Backend) -> LayerBackend:
        """The backend, if it can run this network."""
        if self.dtype == np.float64 and be.name != "numpy":
            raise ArgumentError("backend", repr(be.name), "'numpy': this network has float64 parameters")
        if not isinstance(be, LayerBackend):
            raise BackendError(f"backend {be.name!r} does not run image networks: use backend='cpu'")
        return be

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration, as JSON types; the parameters are not in it."""
        config: dict[str, Any] = {"kind": "unet"}
        for name in _OPTIONS:
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
        keys = {"kind", "dtype", *_OPTIONS}
        if not isinstance(config, Mapping) or set(config) != keys:
            shown = sorted(map(str, config)) if isinstance(config, Mapping) else type(config).__name__
            raise ArgumentError("network", str(shown), f"the keys {sorted(keys)}")
        check_choice("kind", config["kind"], ["unet"])
        return cls(**{name: config[name] for name in keys - {"kind"}}, draw=draw)

    def __repr__(self) -> str:
        options = "" if self.classes is None else f", classes={self.classes}"
        return f"UNet({self.shape}, channels={self.channels}, blocks={self.blocks}, T={self.T}{options})"


_OPTIONS = (
    "shape", "channels", "blocks", "attention", "T", "classes", "head_width", "groups", "dropout", "scale_shift",
    "seed", "outputs", "embedding", "up_attention", "middle_attention", "padding", "flip", "frequency_shift", "eps",
)  # fmt: skip


def _groups(widths: tuple[int, ...], groups: int | None) -> int:
    """The number of groups of every norm; concatenations are sums of widths, so what divides these divides them."""
    common = math.gcd(*widths)
    if groups is not None:
        if common % check_int("groups", groups, low=1, high=MAX_WIDTH):
            raise ArgumentError("groups", str(groups), f"a divisor of all channels, {widths}")
        return groups
    most = max(1, min(MAX_GROUPS, min(widths) // 4))
    groups = max(divisor for divisor in range(1, most + 1) if common % divisor == 0)
    log.info("UNet with channels %s: %d groups in every GroupNorm", widths, groups)
    return groups


def _several(argument: str, value: Any, wants: str) -> tuple[Any, ...]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise ArgumentError(argument, repr(value), wants)
    return tuple(value)


def _flags(argument: str, value: Any, levels: int) -> tuple[bool, ...]:
    flags = _several(argument, value, "one bool for each level, as in (False, False, True)")
    if len(flags) != levels:
        raise ArgumentError(argument, str(flags), f"one bool for each of the {levels} levels")
    return tuple(_flag(argument, flag) for flag in flags)


def _flag(argument: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(argument, repr(value), "True or False")
    return bool(value)


def _shaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array in another shape, itself where it has that."""
    return array if array.shape == shape else array.reshape(shape)


def _optional(argument: str, value: Any, *, high: int) -> int | None:
    return None if value is None else check_int(argument, value, low=1, high=high)
