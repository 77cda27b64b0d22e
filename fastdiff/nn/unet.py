"""U-Nets for images, series and curves, conditioned on the timestep and, where there are classes, on a label."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff.backends.layers import Conv
from fastdiff.errors import ArgumentError, check_choice, check_float, check_int, check_several, shown
from fastdiff.forks import cached_property
from fastdiff.nn.layers import Program, Value
from fastdiff.nn.mlp import MAX_PERIOD
from fastdiff.nn.network import MAX_WIDTH, ProgramNetwork, Start, check_keys, register

log = logging.getLogger("fastdiff")

MAX_GROUPS = 32
MAX_LEVELS = 12
NEWER = ("null_class", "covariates", "pointwise", "masked")  # in the configuration of a network that has them


@register
class UNet(ProgramNetwork):
    """A U-Net: x_t and t in, one value for every value of the image out.

    The blocks are those of Ho et al. 2020 (appendix B), in the form of diffusers' UNet2DModel: residual blocks of two
    GroupNorm, SiLU and 3x3 convolutions with the time embedding added between them, self-attention where asked for,
    strided convolutions down, nearest upsampling and a convolution up, skip connections by concatenation. A size that
    the depth does not divide is padded with zeros inside, and cropped again. Of series, curves, and images of height 1
    the kernels have three taps along time, and a level has half as many points as the one before.

    Parameters
    ----------
    shape : tuple of int
        Of one image, (height, width, channels); (points, channels) of one series, or (points,) of one curve.
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
    null_class : bool, optional
        Whether there is a null class beside them, which stands for none of them; by default there is, for guidance.
    covariates : int, optional
        How many numbers are asked of a sample beside that; None: none.
    pointwise : bool, optional
        Whether so many are asked of each point or pixel, and not of the sample: they are channels beside x.
    masked : bool, optional
        Whether it is told which values of a sample are known, and what they are, as channels beside x: see
        `fastdiff.masks`.
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
        Channels of the output, by default those of the image; twice as many for a learned variance.
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
        Shape of one sample.
    prediction : {"noise", "x0", "v", "velocity"} or None
        What the output is, where a file that the network came from said so.

    Examples
    --------
    >>> net = fd.UNet((8, 8, 3), channels=(8, 8), blocks=1, T=20)
    >>> net.predict(np.zeros((1, 8, 8, 3)), 5, backend="numpy").shape
    (1, 8, 8, 3)
    """

    kind, widths = "unet", "channels"
    options = (
        "shape", "channels", "blocks", "attention", "T", "classes", "head_width", "groups", "dropout", "scale_shift",
        "seed", "outputs", "embedding", "up_attention", "middle_attention", "padding", "flip", "frequency_shift", "eps",
    )  # fmt: skip

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        channels: Iterable[int] = (32, 64, 128),
        blocks: int = 2,
        attention: Iterable[bool] | None = None,
        T: int = 1000,
        classes: int | None = None,
        null_class: bool | None = None,
        covariates: int | None = None,
        pointwise: bool = False,
        masked: bool = False,
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
        null = classes is not None and (True if null_class is None else _flag("null_class", null_class))
        asked: dict[str, Any] = {"classes": classes, "covariates": covariates, "null_class": null}
        asked |= {"pointwise": pointwise, "masked": masked}
        self.describe(shape, T=T, seed=seed, dtype=dtype, outputs=outputs, **asked)
        several = check_several("channels", channels, "widths of the levels, as in (32, 64, 128)")
        self.channels = widths = tuple(check_int("channels", width, low=2, high=MAX_WIDTH) for width in several)
        levels = check_int("the number of channels", len(widths), low=1, high=MAX_LEVELS)
        self.blocks = check_int("blocks", blocks, low=1, high=64)
        last = (False,) * (levels - 1) + (True,)
        self.attention = _flags("attention", last if attention is None else attention, levels)
        self.up_attention = _flags("up_attention", self.attention if up_attention is None else up_attention, levels)
        self.middle_attention = _flag("middle_attention", middle_attention)
        attending = [width for width, *on in zip(widths, self.attention, self.up_attention, strict=True) if any(on)]
        narrowest = min([*attending, *widths[-1:] * self.middle_attention], default=MAX_WIDTH)
        self.head_width = _optional("head_width", head_width, high=narrowest)
        self.groups = _groups(widths, groups)
        self.dropout = check_float("dropout", dropout, low=0, high=1, high_open=True)
        self.scale_shift = _flag("scale_shift", scale_shift)
        self.embedding = 4 * widths[0] if embedding is None else check_int("embedding", embedding, low=1, high=1 << 20)
        self.padding = check_int("padding", padding, low=0, high=1)
        self.flip = _flag("flip", flip)
        self.frequency_shift = check_int("frequency_shift", frequency_shift, low=0, high=widths[0] // 2 - 1)
        self.eps = check_float("eps", eps, low=0, low_open=True)
        self.flat_images = self.image[0] == 1
        depth = 1 << (levels - 1)
        smallest = self.image[1] if self.flat_images else min(self.image[:2])
        if smallest < depth:
            raise ArgumentError("shape", str(self.shape), f"a size of at least {depth} for {levels} levels")
        height, width = (-(-size // depth) * depth for size in self.image[:2])
        self._padded = (1 if self.flat_images else height, width)
        self.build(draw)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration, as JSON types; what only newer networks have is in theirs alone."""
        return super().to_dict() | {name: value for name in NEWER if (value := getattr(self, name))}

    @classmethod
    def from_dict(cls, config: Any, *, draw: bool = True) -> Self:
        given = dict(config) if isinstance(config, Mapping) else config
        newer = {name: given.pop(name) for name in NEWER if name in given} if isinstance(given, dict) else {}
        newer.setdefault("null_class", False)
        check_keys(given, {"kind", "dtype", *cls.options})
        check_choice("kind", given.pop("kind"), [cls.kind])
        return cls(**given, **newer, draw=draw)

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

        Examples
        --------
        >>> config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8]}
        >>> config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        >>> config |= {"layers_per_block": 1, "norm_num_groups": 4}
        >>> fd.UNet.like_diffusers(config, T=20).shape
        (8, 8, 1)
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

        Examples
        --------
        >>> net = fd.UNet((8, 8, 1), channels=(8, 8), blocks=1, T=20)
        >>> net.save_diffusers("unet")
        >>> bool((fd.load_diffusers("unet")[0].flat == net.flat).all())
        True
        """
        from fastdiff.interop import save_diffusers

        save_diffusers(self, folder)

    def record(self, p: Program) -> None:
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
        label = numbers = None
        if self.classes is not None:
            table = p.parameter("class_embedding.weight", (self.classes + self.null_class, self.embedding))
            label = p.take(table, p.given("labels", (p.n,)))
        if self.covariates is not None and not self.pointwise:
            numbers = p.given("covariates", (p.n, 1, 1, self.covariates + 1))
            numbers = p.silu(p.conv("covariate_embedding.linear_1", numbers, self.embedding))
            numbers = p.conv("covariate_embedding.linear_2", numbers, self.embedding)
        condition = p.silu(p.conv("time_embedding.linear_2", h, self.embedding, shift=label, residual=numbers))

        x = p.resize(self.inputs(p), *self._padded)
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

    def constants(self) -> Mapping[str, npt.NDArray[Any]]:
        return {"features": self._features}

    def start(self, name: str) -> Start:
        """Uniform, a class embedding normal; the last layers of every block and of the network zero; gains one.

        Each block begins as the identity, and the network with the best constant guess at the noise (Ho et al. 2020).
        """
        layer, _, part = name.rpartition(".")
        if "norm" in layer.rpartition(".")[2]:
            return "one" if part == "weight" else "zero"
        if layer.endswith(("conv2", "to_out.0", "conv_out")):
            return "zero"
        return "normal" if layer == "class_embedding" else "uniform"

    def __repr__(self) -> str:
        options = "" if self.classes is None else f", classes={self.classes}"
        options += "" if self.covariates is None else f", covariates={self.covariates}"
        options += "".join(f", {name}=True" for name in ("pointwise", "masked") if getattr(self, name))
        return f"UNet({self.shape}, channels={self.channels}, blocks={self.blocks}, T={self.T}{options})"


def _groups(widths: tuple[int, ...], groups: int | None) -> int:
    """The number of groups of every norm; concatenations are sums of widths, so what divides these divides them."""
    common = math.gcd(*widths)
    if groups is not None:
        groups = check_int("groups", groups, low=1, high=MAX_WIDTH)
        if common % groups:
            raise ArgumentError("groups", str(groups), f"a divisor of all channels, {widths}")
        return groups
    most = max(1, min(MAX_GROUPS, min(widths) // 4))
    groups = max(divisor for divisor in range(1, most + 1) if common % divisor == 0)
    log.info("UNet with channels %s: %d groups in every GroupNorm", widths, groups)
    return groups


def _flags(argument: str, value: Any, levels: int) -> tuple[bool, ...]:
    flags = check_several(argument, value, "one bool for each level, as in (False, False, True)")
    if len(flags) != levels:
        raise ArgumentError(argument, str(flags), f"one bool for each of the {levels} levels")
    return tuple(_flag(argument, flag) for flag in flags)


def _flag(argument: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(argument, shown(value), "True or False")
    return bool(value)


def _optional(argument: str, value: Any, *, high: int) -> int | None:
    return None if value is None else check_int(argument, value, low=1, high=high)
