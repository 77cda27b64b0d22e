"""The two curve networks and the U-Net in PyTorch, with the training step and the sampling loop of a careful user."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


def tensor(array: Any) -> Tensor:
    """Return an array as a tensor."""
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def nchw(array: Any) -> Tensor:
    """Return our pictures as PyTorch takes them, in the memory that they have: channels-last."""
    return tensor(array).permute(0, 3, 1, 2)


def nhwc(pictures: Tensor) -> Any:
    """The other way round."""
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()


@contextlib.contextmanager
def drawing(noise: Any) -> Iterator[None]:
    """Let torch.randn and randn_like, and the schedulers of diffusers, draw the given arrays one after the other."""
    from diffusers.schedulers import scheduling_ddpm

    draws = iter(tensor(noise))

    def draw(*shape: Any, device: Any = None, **_: Any) -> Tensor:
        like = shape[0]
        if isinstance(like, Tensor):
            shape, device = like.shape, like.device
        elif isinstance(like, tuple):
            shape = like
        return next(draws).reshape(shape).to(device, copy=True)

    saved = torch.randn, torch.randn_like, scheduling_ddpm.randn_tensor
    torch.randn = torch.randn_like = scheduling_ddpm.randn_tensor = draw
    try:
        yield
    finally:
        torch.randn, torch.randn_like, scheduling_ddpm.randn_tensor = saved
    assert next(draws, None) is None


class Tutorial(nn.Module):
    """The tutorial's network."""

    def __init__(self, points: int, T: int) -> None:
        super().__init__()
        d = points
        self.down = nn.Sequential(nn.Linear(d, 2 * d), nn.LeakyReLU(0.01, inplace=True), nn.Linear(2 * d, 4 * d))
        self.time = nn.Embedding(T, 4 * d)
        self.up = nn.Sequential(nn.Linear(4 * d, 2 * d), nn.LeakyReLU(0.01, inplace=True), nn.Linear(2 * d, d))
        self.dense = [self.down[0], self.down[2], self.up[0], self.up[2]]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.up(self.down(x) + self.time(t))


class Modulated(nn.Module):
    """The default MLP: hidden layers silu((1 + gain(t)) (W x + b) + shift(t))."""

    def __init__(self, points: int, hidden: tuple[int, ...], features: Tensor) -> None:
        super().__init__()
        widths = (points, *hidden, points)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.time = nn.Linear(features.shape[1], 2 * sum(hidden))
        self.register_buffer("features", features)
        self.columns = [width for width in hidden for _ in range(2)]  # gain and shift of each layer
        self.dense = list(self.layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        columns = self.time(self.features[t]).split(self.columns, dim=1)
        for layer, gain, shift in zip(self.layers, columns[::2], columns[1::2], strict=False):
            x = F.silu(torch.addcmul(shift, 1 + gain, layer(x)))
        return self.layers[-1](x)


class Pictures(nn.Module):
    """The U-Net of diffusers, from a folder, for images (n, channels, height, width) in channels-last memory."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel.from_pretrained(folder).to(memory_format=torch.channels_last).train()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x.contiguous(memory_format=torch.channels_last), t).sample


class Halves(nn.Module):
    """A network that multiplies bf16 values, where autocast lets it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x, t).float()


def channels_first(series: Any) -> Tensor:
    """Return our series (n, points, channels) as PyTorch takes them."""
    return tensor(series).transpose(1, 2).contiguous()


class Series(nn.Module):
    """Our U-Net on series (n, channels, points), layer by layer.

    Convolutions are 2-D ones of kernels (1, 3) in channels-last memory: faster on a CPU than `nn.Conv1d`.
    """

    def __init__(self, like: Any, weights: dict[str, Tensor], features: Tensor) -> None:
        super().__init__()
        self.like, self.layers = like, nn.ModuleDict()
        self.register_buffer("features", features)
        for name in (name.removesuffix(".weight") for name in weights if name.endswith(".weight")):
            w, layer = weights[f"{name}.weight"], None
            if w.ndim == 1:
                layer = nn.GroupNorm(like.groups, len(w), eps=like.eps)
            elif any(part in name for part in ("time_emb", "to_")):
                layer, w = nn.Linear(*w.shape[2:]), w[0, 0].T
            else:
                _, columns, inputs, outputs = w.shape
                at = {"stride": (1, 2 if "downsamplers" in name else 1), "padding": (0, columns // 2)}
                layer, w = nn.Conv2d(inputs, outputs, (1, columns), **at), w.permute(3, 2, 0, 1)
            with torch.no_grad():
                layer.weight.copy_(w)
                layer.bias.copy_(weights[f"{name}.bias"])
            self.layers[name.replace(".", "/")] = layer
        self.to(memory_format=torch.channels_last)

    def layer(self, name: str, x: Tensor) -> Tensor:
        return self.layers[name.replace(".", "/")](x)

    def residual(self, name: str, x: Tensor, time: Tensor) -> Tensor:
        h = self.layer(f"{name}.conv1", F.silu(self.layer(f"{name}.norm1", x)))
        h = h + self.layer(f"{name}.time_emb_proj", time)[:, :, None, None]
        h = self.layer(f"{name}.conv2", F.silu(self.layer(f"{name}.norm2", h)))
        shortcut = f"{name}.conv_shortcut"
        return h + (self.layer(shortcut, x) if shortcut.replace(".", "/") in self.layers else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        n, c, _, points = x.shape
        heads = c // (self.like.head_width or c)
        h = self.layer(f"{name}.group_norm", x)[:, :, 0].transpose(1, 2)
        parts = self.layer(f"{name}.to_qkv", h).reshape(n, points, 3, heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(n, points, c)
        return x + self.layer(f"{name}.to_out.0", h).transpose(1, 2)[:, :, None]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        levels = len(self.like.channels)
        time = F.silu(self.layer("time_embedding.linear_1", self.features[t.reshape(-1)]))
        time = F.silu(self.layer("time_embedding.linear_2", time))
        h = self.layer("conv_in", x[:, :, None].contiguous(memory_format=torch.channels_last))
        skips = [h]
        for i in range(levels):
            for j in range(self.like.blocks):
                h = self.residual(f"down_blocks.{i}.resnets.{j}", h, time)
                if self.like.attention[i]:
                    h = self.attend(f"down_blocks.{i}.attentions.{j}", h)
                skips.append(h)
            if i < levels - 1:
                h = self.layer(f"down_blocks.{i}.downsamplers.0.conv", h)
                skips.append(h)
        h = self.attend("mid_block.attentions.0", self.residual("mid_block.resnets.0", h, time))
        h = self.residual("mid_block.resnets.1", h, time)
        for k, i in enumerate(reversed(range(levels))):
            for j in range(self.like.blocks + 1):
                h = self.residual(f"up_blocks.{k}.resnets.{j}", torch.cat([h, skips.pop()], 1), time)
                if self.like.up_attention[i]:
                    h = self.attend(f"up_blocks.{k}.attentions.{j}", h)
            if i:
                h = self.layer(f"up_blocks.{k}.upsamplers.0.conv", F.interpolate(h, scale_factor=(1, 2)))
        return self.layer("conv_out", F.silu(self.layer("conv_norm_out", h)))[:, :, 0]


def expand_upsampling(net: Any) -> Any:
    """Return a network whose nearest upsampling is written as expand and reshape.

    Through torch.compile of PyTorch 2.13.0 on a CPU, `interpolate` gives the layers before it no gradient here.
    """
    from diffusers.models.upsampling import Upsample2D

    def double(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        n, c, height, width = given[0].shape
        x = given[0][:, :, :, None, :, None].expand(n, c, height, 2, width, 2).reshape(n, c, 2 * height, 2 * width)
        return x.contiguous(memory_format=torch.channels_last), *given[1:]

    for layer in net.modules():
        if isinstance(layer, Upsample2D):
            layer.interpolate = False
            layer.register_forward_pre_hook(double)
    return net


def load(net: Any, weights: dict[str, Any]) -> Any:
    """Fill a network with our weights: matrices are (in, out) there, (out, in) here."""
    with torch.no_grad():
        for i, layer in enumerate(net.dense):
            layer.weight.copy_(torch.from_numpy(weights[f"layers.{i}.weight"]).T)
            layer.bias.copy_(torch.from_numpy(weights[f"layers.{i}.bias"]))
        time = torch.from_numpy(weights["time.weight"])
        net.time.weight.copy_(time if isinstance(net.time, nn.Embedding) else time.T)
        if "time.bias" in weights:
            net.time.bias.copy_(torch.from_numpy(weights["time.bias"]))
    return net


@torch.no_grad()
def weights_of(net: Any) -> dict[str, Any]:
    """The other way round; names begin with "w/"."""
    weights = {}
    for i, layer in enumerate(net.dense):
        weights[f"w/layers.{i}.weight"] = layer.weight.T.numpy()
        weights[f"w/layers.{i}.bias"] = layer.bias.numpy()
    embedded = isinstance(net.time, nn.Embedding)
    weights["w/time.weight"] = (net.time.weight if embedded else net.time.weight.T).numpy()
    if not embedded:
        weights["w/time.bias"] = net.time.bias.numpy()
    return weights


def save_tutorial(path: Path, ours: dict[str, Any]) -> None:
    """Save a checkpoint for `cold_peer.py` with the parameters of ours."""
    from safetensors.torch import save_file

    names = {"down.0": "layers.0", "down.2": "layers.1", "up.0": "layers.2", "up.2": "layers.3"}
    state = {f"{theirs}.weight": ours[f"w/{name}.weight"].T for theirs, name in names.items()}
    state |= {f"{theirs}.bias": ours[f"w/{name}.bias"] for theirs, name in names.items()}
    state |= {"time.weight": ours["w/time.weight"], "betas": ours["betas"]}
    state |= {name: np.array(ours[name], np.float32) for name in ("mean", "std")}
    save_file({name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()}, path)


@torch.no_grad()
def evaluated(net: Any, x: Tensor, t: Tensor) -> Tensor:
    """Return what a network makes of x at the timesteps t."""
    return net(x, t)


def output(net: Any, x: Tensor, t: int) -> Any:
    """Return the same at one timestep, on the host."""
    return evaluated(net, x, torch.full((len(x),), t, device=x.device)).cpu().numpy()


def coefficients(betas: Any) -> list[tuple[int, float, float, float]]:
    """Rows (t, a, e, s) of the DDPM step x' = a x + e out + s z (Ho et al. 2020, algorithm 2), t descending."""
    betas = torch.tensor(betas, dtype=torch.float64)
    alphas = 1 - betas
    abar = alphas.cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    a = 1 / alphas.sqrt()
    e = -betas / (1 - abar).sqrt() * a
    s = (betas * (1 - before) / (1 - abar)).sqrt()
    return list(zip(range(len(betas)), a.tolist(), e.tolist(), s.tolist(), strict=True))[::-1]


@torch.no_grad()
def chain(net: Any, rows: list[tuple[int, float, float, float]], shape: tuple[int, ...]) -> Tensor:
    """Draw samples by DDPM. The coefficients are Python numbers, the timesteps one tensor, and x is kept in place."""
    steps = torch.tensor([row[0] for row in rows])
    x = torch.randn(shape)
    for i, (t, a, e, s) in enumerate(rows):
        out = net(x, steps[i : i + 1])
        x.mul_(a).add_(out, alpha=e)
        if t > 0:
            x.add_(torch.randn(shape), alpha=s)
    return x


@torch.no_grad()
def tmpd_chain(net: Any, rows: Any, levels: Any, known: Any, noise: float, most: int = 5000) -> Tensor:
    """Draw a sample for each row of `known`, which has as many numbers among its NaN as any other, by the method tmpd.

    All products with J^T of a step are one call of a vectorised `torch.func.vjp`; the small systems are float64. So
    many samples are drawn together that nothing leaves the caches for long.
    """
    places = tensor(np.nonzero(~np.isnan(known))[1].reshape(len(known), -1))
    y = tensor(known[~np.isnan(known)].reshape(places.shape)).double()
    x = torch.randn(known.shape)
    draws = [torch.randn(known.shape) if row[9] else None for row in rows] if len(known) <= most else None
    for begin in range(0, len(x), most):
        some = slice(begin, begin + most)
        _tmpd_chain(net, rows, levels, places[some], y[some], noise, x[some], draws)
    return x


def _tmpd_chain(
    net: Any, rows: Any, levels: Any, places: Tensor, y: Tensor, noise: float, x: Tensor, draws: Any
) -> None:
    """Change x by all rows."""
    (n, m), d = places.shape, x.shape[1]
    A = F.one_hot(places, d).float().transpose(0, 1).contiguous()
    where = places.expand(m, n, m)
    unit = torch.eye(m, dtype=torch.float64)
    reach = 4 * d**0.5 * y.abs().amax(dim=1, keepdim=True).clamp(min=1.0).float()
    for i, ((t, p, q, a, b, _, _, _, e, s, _), (signal, level)) in enumerate(zip(rows, levels, strict=True)):
        steps, gain, power = torch.tensor([int(t)]), level**2 / signal, level**2 / (signal**2 + level**2)
        least = 1e-4 * power
        out, pull = torch.func.vjp(lambda x, steps=steps: net(x, steps), x)
        p0, q0 = 1 / signal, -level / signal  # the mean of x0 is p0 x + q0 out
        back = torch.func.vmap(lambda v, pull=pull: pull(v)[0])(A).mul_(q0).add_(A, alpha=p0)
        M = (gain * back.gather(2, where)).permute(1, 2, 0).double() + noise**2 * unit
        rest = y - (p0 * x + q0 * out).gather(1, places)
        factor = torch.linalg.cholesky(M.mT @ M + least**2 * unit)
        w = term = torch.cholesky_solve((M.mT @ rest[..., None]), factor)
        for _ in range(2):
            term = torch.cholesky_solve(least**2 * term, factor)
            w = w + term
        slope = gain * torch.einsum("nj,jnd->nd", w[..., 0].float(), back)
        slope *= (power**0.5 * reach / slope.norm(dim=1, keepdim=True)).clamp(max=1.0)
        out = out + slope / q0
        x.mul_(a + b * p).add_(out, alpha=b * q + e)
        if s:
            x.add_(torch.randn_like(x) if draws is None else draws[i], alpha=s)


def ddim(net: Any, betas: Any, steps: int) -> Callable[[Tensor], Tensor]:
    """Return what draws pictures from noise by diffusers' DDIM, x0 clipped to [-1, 1], with trailing timesteps."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(len(betas), trained_betas=betas, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x).prev_sample
        return x

    return run


def levels(betas: Any, ndim: int) -> tuple[Tensor, Tensor]:
    """Return signal and noise of every timestep, as factors of samples in so many dimensions."""
    abar = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    each = (-1, *(1,) * (ndim - 1))
    return abar.sqrt().float().reshape(each), (1 - abar).sqrt().float().reshape(each)


class Trainer:
    """Training of the noise prediction: AdamW with PyTorch's defaults, gradients clipped at norm 1.

    `net` may be compiled. With `ema` the parameters' moving average is kept, by one call for all of them.
    """

    def __init__(
        self, net: Any, X: Tensor, betas: Any, batch: int, *, fused: bool = False, ema: float | None = None
    ) -> None:
        self.net, self.X, self.batch, self.ema = net, X, batch, ema
        self.signal, self.noise = levels(betas, X.ndim)
        self.parameters = list(net.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=fused or None)
        self.average = [] if ema is None else [p.detach().clone() for p in self.parameters]
        self.losses: list[float] = []

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw rows of the data, timesteps and noise."""
        rows = torch.randint(len(self.X), (self.batch,))
        t = torch.randint(len(self.signal), (self.batch,))
        return rows, t, torch.randn(self.batch, *self.X.shape[1:])

    def step(self, rows: Tensor, t: Tensor, eps: Tensor) -> None:
        """Take one step on a batch."""
        x = self.signal[t] * self.X[rows] + self.noise[t] * eps
        loss = F.mse_loss(self.net(x, t), eps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.ema is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.ema)
        self.losses.append(loss.item())
