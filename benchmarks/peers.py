"""The same work here and in PyTorch with diffusers, timed side by side: ``python benchmarks/peers.py``.

For each case of `cases.py` there are two processes, one for each side, that never work at the same time. Both first
compute the same small example from the same weights, inputs and noise, and a case is timed only if the results
agree. Then they take turns: one of ours, one of theirs, and again. A round's ratio is their time through ours; the
table shows the median of the rounds' ratios with the smallest and the largest.

What a time is: the median of the calls in one turn, warm, with the arguments in memory, and with the results newly
allocated where the call under test returns new ones; for the cold start, from the start of a process to its exit,
its files in the page cache. Both sides use the same number of threads. PyTorch runs eagerly, under no_grad where it
samples, with its default AdamW; rows with the fused one, and with the network through torch.compile (default mode,
compiled before the first turn), are added. `peer_nets.py` and `cold_peer.py` are its code. The ratio of a row of many
shapes is the median of theirs.

The memory of a side is the most that its process had while it worked, less what it had with its libraries imported.

Without --only, --quick or --threads the results go to ``results/peers-cpu.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cases
import numpy as np
import unet_cases
from cases import Case, T
from machine import header
from readme_numbers import BUSY, RESULTS, memory_words, table, write
from unet_cases import ConvCase, UNetCase

BY_NAME = cases.BY_NAME | unet_cases.BY_NAME


@dataclass(frozen=True)
class Comparison:
    """A case, what it is compared with, and the ratio that must be reached on two cores."""

    case: str
    target: float | None = None
    variant: str = ""  # how the peer works, a key of `VARIANTS`
    memory: float | None = None  # its peak is shown as well, and is to be at most so much of the peer's

    @property
    def name(self) -> str:
        return self.case + (f"-{self.variant}" if self.variant else "")

    @property
    def against(self) -> str:
        case = BY_NAME[self.case]
        what = PEERS[case.kind] + (", EMA" if isinstance(case, UNetCase) and case.ema else "")
        return VARIANTS[self.variant].format(what.replace("AdamW", "fused AdamW") if self.variant else what)


VARIANTS = {"": "{}", "fused": "{}", "compiled": "torch.compile, {}", "numpy": "NumPy broadcasting"}
PEERS = {
    "normals": "torch.randn",
    "forward": "torch: randn_like, gather, two multiplies, add",
    "step": "diffusers DDPMScheduler.step",
    "chain": "torch, no_grad",
    "training": "torch, AdamW, clipping",
    "cold": "torch + diffusers",
    "similarity": "torch broadcasting",
    "reshape": "torch.matmul",
    "standardise": "torch: matmul, mean, std, subtract, divide",
    "shaped": "torch: randn, matmul",
    "posterior": "torch: addmm, softmax, matmul",
    "unet": "diffusers UNet2DModel, no_grad",
    "unet-training": "diffusers UNet2DModel, AdamW, clipping",
    "unet-ddim": "diffusers UNet2DModel, DDIMScheduler",
    "conv-forward": "torch conv2d (oneDNN), channels-last",
    "conv-input-gradient": "torch convolution_backward (oneDNN), channels-last",
    "conv-weight-gradient": "torch convolution_backward (oneDNN), channels-last",
}
COMPARISONS = (
    Comparison("normals-48x1000000", 5.0),
    Comparison("normals-960000x50", 5.0),
    Comparison("forward-1000000x50", 4.0),
    Comparison("step-64x256x256x3", 6.0),
    Comparison("chain-tutorial-1", 10.0),
    Comparison("chain-tutorial-1000", 2.0),
    Comparison("chain-tutorial-100000", 3.5),
    Comparison("train-tutorial-10", 8.0),
    Comparison("train-tutorial-1000", 2.0),
    Comparison("train-tutorial-8192", 3.0),
    Comparison("cold-start", 3.0),
    Comparison("train-tutorial-10", variant="fused"),
    Comparison("train-tutorial-1000", variant="fused"),
    Comparison("chain-default-1"),
    Comparison("chain-default-1000"),
    Comparison("chain-default-100000"),
    Comparison("train-default-10"),
    Comparison("train-default-1000"),
    Comparison("train-default-8192"),
    Comparison("similarity-4096x128", 2.0),
    Comparison("similarity-4096x128", 5.0, variant="numpy"),
    Comparison("reshape-1000000x128", 0.95),
    Comparison("standardise-1000000x128", 1.5),
    Comparison("shaped-1000000x128", 1.5),
    Comparison("posterior-1000x10000x64"),
    Comparison("unet-train-16", 1.0),
    Comparison("unet-forward-16", 1.6),
    Comparison("unet-ddim-16", 1.6),
    Comparison("unet-forward-1"),
    Comparison("unet-train-ema-16", 1.8, variant="fused", memory=0.8),
    Comparison("unet-train-ema-16", 1.6, variant="compiled"),
    Comparison("unet-forward-16", 1.4, variant="compiled"),
    Comparison("unet-ddim-16", 1.4, variant="compiled"),
    Comparison("unet-train-64px-4"),
    Comparison("unet-forward-64px-4"),
    Comparison("unet-train-wide-16"),
    Comparison("unet-forward-wide-16"),
    Comparison("conv-forward", 1.5),
    Comparison("conv-input-gradient", 1.5),
    Comparison("conv-weight-gradient", 1.2),
)
# Samples in the example that both sides compute before they are timed; a compiled network is made for one batch.
EXAMPLE = {
    "normals": 1_000_000, "forward": 10_000, "step": 1, "chain": 64, "training": 8192, "cold": 16,
    "similarity": 64, "reshape": 10_000, "standardise": 10_000, "shaped": 10_000,
    "posterior": 100, "unet": 16, "unet-training": 16, "unet-ddim": 2,
    "conv-forward": 2, "conv-input-gradient": 2, "conv-weight-gradient": 2,
}  # fmt: skip
# How far the two results of an example may differ, through the size of the peer's result. Moments are in units of
# their standard error; a weight may differ by a part of how far training moved the weights.
TOLERANCES = {
    "moments": 7.0,
    "x_t": 1e-6,
    "x": 1e-5,
    "output": 1e-5,
    "samples": 1e-4,
    "losses": 1e-5,
    "weights": 1e-3,
    "similarity": 1e-6,
    "reshaped": 1e-6,
    "standardised": 1e-5,  # rows of small deviation are divided by it
    "shaped": 1e-6,
    "posterior": 1e-4,  # the peer's squares cancel
    "output of the U-Net": 5e-5,
    "losses of the U-Net": 5e-5,
    "pictures": 1e-4,
    "conv": 1e-5,
}
EXAMPLE_STEPS = 5  # of training
EXAMPLE_DDIM = 4  # of sampling: an untrained network more than doubles a difference at each
ROUNDS, LEAST_ROUNDS, PATIENCE = 7, 3, 20.0  # fewer rounds once a case has taken this many seconds
TURN = 0.3  # seconds of calls in one turn
SHAPE_TURN = 0.1  # the same where many shapes take turns
LONG = 0.8  # seconds: a call of this length is not repeated for warmth
PAUSE = 0.2  # between turns: threads of the other side stop spinning


class PeersError(Exception):
    """A case that cannot be compared; the message says why."""


# -- the workers -----------------------------------------------------------------------------------------------


Example = tuple[dict[str, Any], dict[str, Any]]  # inputs that both sides take, and our outputs


def example_of(case: Case) -> Case:
    """The small case that both sides compute."""
    most = EXAMPLE[case.kind]
    return replace(case, n=max(1, min(case.n, most // case.shape[0] if case.kind == "normals" else most)))


def moments(x: Any) -> Any:
    """Mean, variance, skewness and kurtosis of standard normals, as deviations in units of their standard errors."""
    z = np.asarray(x, np.float64).reshape(-1)
    raw = [z.mean(), (z**2).mean() - 1, (z**3).mean(), (z**4).mean() - 3]
    return np.array(raw) / np.sqrt(np.array([1, 2, 15, 96]) / z.size)


def our_example(fd: Any, be: Any, case: Case, folder: Path) -> Example:
    """Inputs and our results of the example of a case."""
    case = example_of(case)
    if isinstance(case, ConvCase):
        runs = zip(case.layers, case.setups(be), strict=True)
        return {}, {f"conv/{layer.title}": run() for layer, run in runs}
    s = cases.schedule(fd, case)
    inputs: dict[str, Any] = {"betas": s.betas}
    if case.kind == "normals":
        return inputs, {"moments": moments(case.setup(be).run())}
    if case.kind == "forward":
        x0, t, _ = cases.noising(fd, case)
        x_t, eps = case.setup(be).run()
        return inputs | {"x0": x0, "t": t, "eps": eps}, {"x_t": x_t, "moments": moments(eps)}
    if case.kind == "step":
        x, out, row, _ = cases.image_step(fd, case)
        z = fd.normal(x.shape, seed=0, stream="step", step=row.t, backend=be)
        return inputs | {"x": x, "out": out, "z": z}, {"x": case.setup(be).run()}
    if case.kind in ("similarity", "reshape", "standardise", "shaped"):
        return _covariance_example(fd, be, case)
    if case.kind == "posterior":
        x, data, signal, noise = cases.posterior_of(fd, case)
        inputs |= {"x": x, "data": data, "levels": np.array([signal, noise])}
        return inputs, {"posterior": case.setup(be).run()}
    if case.kind == "chain":
        net = cases.network(fd, case)
        x = fd.normal((case.n, *case.shape), seed=0, stream="init", backend=be)
        inputs |= _weights(net) | {"noise": _noise(fd, be, case, 0, T)}
        output = net.predict(x, T // 2, backend=be)
        return inputs, {"output": output, "samples": case.setup(be).run()}
    if case.kind == "training":
        return _training_example(fd, be, case, inputs)
    if case.net == "unet":
        return _unet_example(fd, be, case, inputs, folder)
    model = cases.checkpoint(fd, case, be, folder / "model.safetensors")
    loaded = fd.load(folder / "model.safetensors", backend=be)
    inputs |= _weights(model.net) | {"noise": _noise(fd, be, case, model.seed, T)}
    inputs |= {"mean": model.normaliser.mean, "std": model.normaliser.std}
    return inputs, {"samples": loaded.sample(case.n)}


def _covariance_example(fd: Any, be: Any, case: Case) -> Example:
    inputs, result = {"x": cases.white_rows(case)}, case.setup(be).run()
    if case.kind == "similarity":
        return inputs, {"similarity": result}
    inputs["matrix"] = cases.shape_of_noise(fd, case).matrix.astype(np.float32)
    if case.kind == "shaped":
        inputs["x"] = fd.normal((case.n, *case.shape), seed=0, backend=be)
        return inputs, {"shaped": result, "moments": moments(inputs["x"])}
    return inputs, {"reshaped" if case.kind == "reshape" else "standardised": result}


def _weights(net: Any) -> dict[str, Any]:
    features = {} if net.plan.features is None else {"features": net.plan.features.astype(np.float32)}
    return {f"w/{name}": view.copy() for name, view in net.params.items()} | features


def _noise(fd: Any, be: Any, case: Case, seed: int, steps: int) -> Any:
    """All noise of a chain, (steps, n, ...): the start, and then that of the timesteps from the last to 1."""
    shape = (case.n, *case.shape)
    start = fd.normal(shape, seed=seed, stream="init", backend=be)
    rest = [fd.normal(shape, seed=seed, stream="step", step=t, backend=be) for t in range(steps - 1, 0, -1)]
    return np.stack([start, *rest])


def _training_example(fd: Any, be: Any, case: Case, inputs: dict[str, Any]) -> Example:
    X, net = cases.curves(fd, case), cases.network(fd, case)
    inputs |= _weights(net)
    model = cases.untrained(fd, net, cases.schedule(fd, case), be)
    model.fit(X, steps=EXAMPLE_STEPS, batch=case.n, ema=None, **cases.training_only(fd))
    inputs |= _draws(fd, be, case, len(X), T)
    inputs["X"] = (X - np.float32(model.normaliser.mean)) / np.float32(model.normaliser.std)
    return inputs, {"losses": np.array(model.history["loss"]), "weights": _flat(_weights(model.net))}


def _draws(fd: Any, be: Any, case: Case, rows: int, T: int) -> dict[str, Any]:
    """Data rows, timesteps and noise of the example's training steps."""
    draws: dict[str, list[Any]] = {"rows": [], "t": [], "eps": []}
    for step in range(EXAMPLE_STEPS):
        draw = fd.noise.Draw(0, fd.noise.Stream.BATCH, step)
        draws["rows"].append(fd.noise.scaled_words(case.n, rows, draw))
        draws["t"].append(fd.noise.scaled_words(case.n, T, draw.of(fd.noise.Stream.TRAIN_TIME)))
        draws["eps"].append(fd.normal((case.n, *case.shape), seed=0, stream="train_noise", step=step, backend=be))
    return {name: np.stack(values) for name, values in draws.items()}


def _unet_example(fd: Any, be: Any, case: Case, inputs: dict[str, Any], folder: Path) -> Example:
    net = unet_cases.network(fd, case)
    net.save_diffusers(folder / "unet")
    if case.kind == "unet":
        return inputs | {"x": cases.pictures(case, case.n)}, {"output of the U-Net": case.setup(be).run()}
    if case.kind == "unet-ddim":
        inputs |= {"x": fd.normal((case.n, *case.shape), seed=0, stream="init", backend=be)}
        few = fd.sample(net, cases.ddim(fd, case, EXAMPLE_DDIM), n=case.n, seed=0, backend=be)
        return inputs, {"pictures": few}
    X = cases.pictures(case)
    model = cases.untrained(fd, net, cases.schedule(fd, case), be)
    model.fit(X, steps=EXAMPLE_STEPS, batch=case.n, ema=None, data_range=(-1.0, 1.0), **cases.training_only(fd))
    inputs |= {"X": X} | _draws(fd, be, case, len(X), cases.IMAGE_T)
    return inputs, {"losses of the U-Net": np.array(model.history["loss"])}


def _flat(weights: dict[str, Any]) -> Any:
    return np.concatenate([weights[name].reshape(-1) for name in sorted(weights) if name != "features"])


Runs = tuple[list[Callable[[], Any]], int]  # for each shape of the case, or the one; and the units of one run


def our_worker(case: Case, folder: Path, threads: int) -> Runs:
    """Compute the example, leave it in the folder, and return what is to be timed."""
    import fastdiff as fd

    be = fd.get_backend("cpu", threads=threads)
    inputs, outputs = our_example(fd, be, case, folder)
    np.savez(folder / "inputs.npz", **inputs)
    np.savez(folder / "ours.npz", **outputs)
    if case.kind == "cold":
        return [lambda: cases.cold_process("cold_ours.py", folder / "model.safetensors", case, threads)], 1
    if isinstance(case, ConvCase):
        return case.setups(be), 1
    work = case.setup(be)
    work.check(work.run())
    assert "torch" not in sys.modules
    return [work.run], work.units


def peer_worker(case: Case, folder: Path, threads: int, variant: str) -> Runs:
    """Compute the example from the inputs in the folder, and return what is to be timed."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with np.load(folder / "inputs.npz") as file:
        inputs = {name: file[name] for name in file.files}
    if isinstance(case, ConvCase):
        outputs, run = _peer_conv(case)
    elif case.kind == "training":
        outputs, run = _peer_training(case, inputs, variant == "fused")
    elif case.kind == "cold":
        outputs, run = _peer_cold(case, inputs, folder, threads)
    elif case.net == "unet":
        outputs, run = _peer_unet(case, inputs, folder / "unet", variant)
    elif variant == "numpy":
        outputs, run = _numpy_similarity(case, inputs)
    else:
        outputs, run = PEER_KINDS[case.kind](case, inputs)
    np.savez(folder / "peer.npz", **outputs)
    assert "fastdiff.backends.cpu" not in sys.modules
    return run if isinstance(run, list) else [run], case.units


PeerSide = tuple[dict[str, Any], Any]  # its results of the example, and what is to be timed


def _peer_conv(case: ConvCase) -> PeerSide:
    import peer_nets

    def runs(layers: list[unet_cases.Layer]) -> list[Callable[[], Any]]:
        return [peer_nets.conv(case.kind, layer.arrays()) for layer in layers]

    few = example_of(case).layers
    outputs = {f"conv/{layer.title}": run().numpy() for layer, run in zip(few, runs(few), strict=True)}
    return outputs, runs(case.layers)


def _peer_normals(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch

    del inputs
    few = example_of(case)
    shape = (case.n, *case.shape)
    return {"moments": moments(torch.randn((few.n, *few.shape)))}, lambda: torch.randn(shape)


def _peer_forward(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch

    abar = np.cumprod(1 - inputs["betas"])
    signal, noise = (torch.from_numpy(np.sqrt(v).astype(np.float32))[:, None] for v in (abar, 1 - abar))

    def forward(x0: Any, t: Any, randn_like: Callable[[Any], Any]) -> Any:
        eps = randn_like(x0)
        return signal[t] * x0 + noise[t] * eps, eps

    eps = torch.from_numpy(inputs["eps"])
    x_t, _ = forward(torch.from_numpy(inputs["x0"]), torch.from_numpy(inputs["t"]), lambda _: eps)
    _, own = forward(torch.from_numpy(inputs["x0"]), torch.from_numpy(inputs["t"]), torch.randn_like)
    x0, t = torch.randn(case.n, *case.shape), torch.randint(len(signal), (case.n,))
    return {"x_t": x_t.numpy(), "moments": moments(own)}, lambda: forward(x0, t, torch.randn_like)


def _peer_step(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=len(inputs["betas"]), beta_schedule="linear")  # clips x0 to [-1, 1]
    channels = case.shape[-1:] + case.shape[:-1]

    def step(x: Any, out: Any) -> Any:
        return scheduler.step(out, cases.IMAGE_STEP, x).prev_sample

    x, out = (torch.from_numpy(inputs[name]).reshape(-1, *channels) for name in ("x", "out"))
    with fed(inputs["z"].reshape(1, *x.shape)):
        result = step(x, out)
    x, out = torch.randn(case.n, *channels), torch.randn(case.n, *channels)
    return {"x": result.reshape(len(result), -1).numpy()}, lambda: step(x, out)


def _peer_net(case: Case, inputs: dict[str, Any]) -> Any:
    import peer_nets
    import torch

    if case.net == "tutorial":
        net = peer_nets.Tutorial(case.shape[0], T)
    else:
        net = peer_nets.Modulated(case.shape[0], cases.HIDDEN, torch.from_numpy(inputs["features"]))
    return peer_nets.load(net, {name[2:]: value for name, value in inputs.items() if name.startswith("w/")})


def _peer_chain(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import peer_nets
    import torch

    net, rows = _peer_net(case, inputs), peer_nets.coefficients(inputs["betas"])
    noise = torch.from_numpy(inputs["noise"])
    draws = iter(noise.clone())
    with torch.no_grad():
        output = net(noise[0], torch.full((noise.shape[1],), T // 2))
    samples = peer_nets.chain(net, rows, tuple(noise.shape[1:]), lambda _: next(draws))
    shape = (case.n, *case.shape)
    outputs = {"output": output.numpy(), "samples": samples.numpy()}
    return outputs, lambda: peer_nets.chain(net, rows, shape, torch.randn)


def _peer_training(case: Case, inputs: dict[str, Any], fused: bool) -> PeerSide:
    import peer_nets
    import torch

    X = torch.from_numpy(inputs["X"])
    trainer = peer_nets.Trainer(_peer_net(case, inputs), X, inputs["betas"], case.n, fused=fused)
    for rows, t, eps in zip(*(torch.from_numpy(inputs[name]) for name in ("rows", "t", "eps")), strict=True):
        trainer.step(rows, t, eps)
    weights = {f"w/{name}": value for name, value in peer_nets.weights_of(trainer.net).items()}
    outputs = {"losses": np.array(trainer.losses), "weights": _flat(weights).copy()}

    def run() -> None:
        for _ in range(case.units):
            trainer.step(*trainer.draw())

    return outputs, run


def _peer_cold(case: Case, inputs: dict[str, Any], folder: Path, threads: int) -> PeerSide:
    import torch
    from cold_peer import sample
    from safetensors.torch import save_file

    names = {"down.0": "layers.0", "down.2": "layers.1", "up.0": "layers.2", "up.2": "layers.3"}
    state = {f"{theirs}.weight": inputs[f"w/{ours}.weight"].T for theirs, ours in names.items()}
    state |= {f"{theirs}.bias": inputs[f"w/{ours}.bias"] for theirs, ours in names.items()}
    state |= {"time.weight": inputs["w/time.weight"], "betas": inputs["betas"]}
    state |= {name: np.array(inputs[name], np.float32) for name in ("mean", "std")}
    path = folder / "peer.safetensors"
    save_file({name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()}, path)
    with fed(inputs["noise"]):
        samples = sample(str(path), case.n)
    return {"samples": samples.numpy()}, lambda: cases.cold_process("cold_peer.py", path, case, threads)


def _peer_unet(case: Case, inputs: dict[str, Any], folder: Path, variant: str) -> PeerSide:
    import peer_nets
    import torch

    def nchw(x: Any) -> Any:  # ours are channels-last, and so is their memory
        return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)

    def nhwc(x: Any) -> Any:
        return x.permute(0, 2, 3, 1).contiguous().numpy()

    net: Any = peer_nets.Pictures(folder).train(case.kind == "unet-training")
    if variant == "compiled":
        if case.kind == "unet-training":
            peer_nets.expand_upsampling(net)
        net = torch.compile(net, dynamic=False)
    if case.kind == "unet-training":
        ema = unet_cases.EMA if isinstance(case, UNetCase) and case.ema else None
        trainer = peer_nets.Trainer(net, nchw(inputs["X"]), inputs["betas"], case.n, fused=bool(variant), ema=ema)
        for rows, t, eps in zip(*(inputs[name] for name in ("rows", "t", "eps")), strict=True):
            trainer.step(torch.from_numpy(rows), torch.from_numpy(t), nchw(eps))

        def run() -> None:
            for _ in range(case.units):
                trainer.step(*trainer.draw())

        return {"losses of the U-Net": np.array(trainer.losses[:EXAMPLE_STEPS])}, run
    if case.kind == "unet-ddim":
        result = peer_nets.ddim(net, inputs["betas"], EXAMPLE_DDIM)(nchw(inputs["x"]))
        ddim, channels = peer_nets.ddim(net, inputs["betas"], cases.DDIM_STEPS), case.shape[-1:] + case.shape[:-1]
        return {"pictures": nhwc(result)}, lambda: ddim(torch.randn(case.n, *channels))

    @torch.no_grad()
    def forward(x: Any) -> Any:
        return net(x, torch.arange(len(x)) % cases.IMAGE_T)

    x = nchw(cases.pictures(case, case.n))
    return {"output of the U-Net": nhwc(forward(nchw(inputs["x"])))}, lambda: forward(x)


def _numpy_similarity(case: Case, inputs: dict[str, Any]) -> PeerSide:
    def similarity(v: Any) -> Any:
        return np.exp(-((v[:, :, None] - v[:, None, :]) ** 2))

    v = cases.white_rows(case)
    return {"similarity": similarity(inputs["x"])}, lambda: similarity(v)


def _peer_similarity(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch

    def similarity(v: Any) -> Any:
        return torch.exp(-((v[:, :, None] - v[:, None, :]) ** 2))

    v = torch.randn(case.n, *case.shape)
    return {"similarity": similarity(torch.from_numpy(inputs["x"])).numpy()}, lambda: similarity(v)


def _peer_reshape(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch

    matrix, x = torch.from_numpy(inputs["matrix"]), torch.randn(case.n, *case.shape)
    return {"reshaped": torch.matmul(torch.from_numpy(inputs["x"]), matrix).numpy()}, lambda: torch.matmul(x, matrix)


def _peer_standardise(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch

    matrix, x = torch.from_numpy(inputs["matrix"]), torch.randn(case.n, *case.shape)

    def reshape(x: Any) -> Any:
        y = torch.matmul(x, matrix)
        y = y - y.mean(1, keepdim=True)
        return y / y.std(1, correction=0, keepdim=True)

    return {"standardised": reshape(torch.from_numpy(inputs["x"])).numpy()}, lambda: reshape(x)


def _peer_shaped(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch

    matrix, shape = torch.from_numpy(inputs["matrix"]), (case.n, *case.shape)
    shaped = torch.matmul(torch.from_numpy(inputs["x"]), matrix)
    outputs = {"shaped": shaped.numpy(), "moments": moments(torch.randn(inputs["x"].shape))}
    return outputs, lambda: torch.matmul(torch.randn(shape), matrix)


def _peer_posterior(case: Case, inputs: dict[str, Any]) -> PeerSide:
    import torch

    data = torch.from_numpy(inputs["data"])
    signal, noise = inputs["levels"].tolist()

    def mean(x: Any) -> Any:
        squares = (signal * signal * data.square().sum(1))[None]  # |x|^2 is the same for all rows
        exponents = torch.addmm(squares, x, data.T, beta=-0.5 / noise**2, alpha=signal / noise**2)
        return torch.matmul(torch.softmax(exponents, 1), data)

    x = signal * data[torch.randint(len(data), (case.n,))] + noise * torch.randn(case.n, *case.shape)
    return {"posterior": mean(torch.from_numpy(inputs["x"])).numpy()}, lambda: mean(x)


@contextlib.contextmanager
def fed(noise: Any) -> Iterator[None]:
    """Let torch.randn, and with it the schedulers of diffusers, draw the given arrays one after the other."""
    import torch
    from diffusers.schedulers import scheduling_ddpm

    draws = iter(torch.from_numpy(noise))

    def draw(*args: Any, **options: Any) -> Any:
        del args, options
        return next(draws).clone()

    saved = torch.randn, scheduling_ddpm.randn_tensor
    torch.randn = scheduling_ddpm.randn_tensor = draw
    try:
        yield
    finally:
        torch.randn, scheduling_ddpm.randn_tensor = saved
    assert next(draws, None) is None


PEER_KINDS: dict[str, Callable[[Case, dict[str, Any]], PeerSide]] = {
    "normals": _peer_normals,
    "forward": _peer_forward,
    "step": _peer_step,
    "chain": _peer_chain,
    "similarity": _peer_similarity,
    "reshape": _peer_reshape,
    "standardise": _peer_standardise,
    "shaped": _peer_shaped,
    "posterior": _peer_posterior,
}


def serve(side: str, case: Case, folder: Path, threads: int, variant: str) -> None:
    """Be a worker: prepare, then take one turn for each line of stdin: how many seconds it lasts, and which shape."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    if side == "ours":
        import fastdiff

        fastdiff.get_backend("cpu", threads=threads)
        before = resident("VmRSS")
        runs, units = our_worker(case, folder, threads)
    else:
        import diffusers.models  # noqa: F401
        import torch  # noqa: F401

        before = resident("VmRSS")
        runs, units = peer_worker(case, folder, threads, variant)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    say(ready=True)
    last = [0.0] * len(runs)
    for line in sys.stdin:
        length, shape = float(line.split()[0]), int(line.split()[1])
        run = runs[shape]
        # Memory that was given back in the pause is slow at its first touch: a call that is not counted takes it.
        if last[shape] < LONG:
            run()
        seconds: list[float] = []
        begin = time.perf_counter()
        while not seconds or time.perf_counter() - begin < length:
            start = time.perf_counter()
            run()
            last[shape] = time.perf_counter() - start
            seconds.append(last[shape] / units)
        say(seconds=statistics.median(seconds), calls=len(seconds), peak=resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of memory that this process has (VmRSS), or had at most (VmHWM). Linux only; 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


# -- the comparison --------------------------------------------------------------------------------------------


class Worker:
    """The process of one side of a case."""

    def __init__(self, side: str, comparison: Comparison, scale: float, folder: Path, threads: int) -> None:
        self.side, self.peak, begin = side, 0, time.perf_counter()
        command = [sys.executable, __file__, "--worker", side, "--case", comparison.case, "--scale", repr(scale)]
        command += ["--variant", comparison.variant]
        self.process = subprocess.Popen(
            [*command, "--folder", str(folder), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")} | _environment(threads),
        )
        try:
            self._answer()
        except PeersError:
            self.close()
            raise
        self.prepared = time.perf_counter() - begin

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeersError(f"the process of {self.side} failed: see its traceback above")
        return json.loads(line)

    def turn(self, seconds: float, shape: int = 0) -> float:
        """Let it work for about that long, on one of the shapes; return its time for one unit of the work."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(f"{seconds} {shape}\n")
            self.process.stdin.flush()
        answer = self._answer()
        self.peak = answer["peak"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.terminate()  # it has nothing to save
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def check_parity(case: Case, folder: Path) -> dict[str, dict[str, float]]:
    """Compare the two results of the example; return what they differ by, or raise `PeersError`."""
    loaded = [np.load(folder / name) for name in ("inputs.npz", "ours.npz", "peer.npz")]
    inputs, ours, theirs = ({key: file[key] for key in file.files} for file in loaded)
    for file in loaded:
        file.close()
    parity: dict[str, dict[str, float]] = {}
    if ours.keys() != theirs.keys():
        raise PeersError(f"results to compare: {sorted(ours)} of ours, {sorted(theirs)} of the peer")
    for name, value in ours.items():
        other = theirs[name]
        if value.shape != other.shape:
            raise PeersError(f"parity of {name}: shapes {value.shape} and {other.shape}")
        if name == "moments":
            error = max(np.abs(value - other).max(), np.abs(value).max(), np.abs(other).max())
        elif name == "weights":
            start = _flat({key: view for key, view in inputs.items() if key.startswith("w/")})
            error = np.linalg.norm(value - other) / np.linalg.norm(other - start)
        else:
            error = np.abs(value - other).max() / np.abs(other).max()
        tolerance = TOLERANCES[name.partition("/")[0]]
        parity[name] = {"difference": float(error), "tolerance": tolerance}
        if not error <= tolerance:  # NaN fails
            raise PeersError(f"parity of {name} in {case.name}: differs by {error:.3g}, allowed {tolerance:g}")
    return parity


class Others:
    """How much of the machine other programs use, seen while both workers rest. Linux only; 0 elsewhere."""

    def __init__(self) -> None:
        self.busy = self.all = 0

    @staticmethod
    def _ticks() -> tuple[int, int]:
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except OSError:
            return 0, 0
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less what was idle, or waited for a disk

    def rest(self, seconds: float) -> None:
        """Wait, and look who works."""
        busy, everything = self._ticks()
        time.sleep(seconds)
        busy_after, everything_after = self._ticks()
        self.busy, self.all = self.busy + busy_after - busy, self.all + everything_after - everything

    @property
    def share(self) -> float:
        return self.busy / max(1, self.all)


def compare(
    comparison: Comparison, *, scale: float, rounds: int, turn: float, pause: float, threads: int
) -> dict[str, Any]:
    """Time one case on both sides, in alternation; return its row of the results."""
    case = BY_NAME[comparison.case].at(scale)
    layers = case.layers if isinstance(case, ConvCase) else None
    others = Others()
    with tempfile.TemporaryDirectory(prefix="fastdiff-peers-") as name, contextlib.ExitStack() as stack:
        folder, workers = Path(name), []
        for side in ("ours", "peer"):
            workers.append(Worker(side, comparison, scale, folder, threads))
            stack.callback(workers[-1].close)
        parity = check_parity(case, folder)
        how = {"rounds": rounds, "turn": min(turn, SHAPE_TURN) if layers else turn, "pause": pause}
        shapes = [alternate(workers, shape, others, **how) for shape in range(len(layers or [case]))]
    done = [{side: sum(r[side] for r in turns) for side in ("ours", "peer")} for turns in zip(*shapes, strict=False)]
    row = {
        "name": comparison.name,
        "title": case.title,
        "peer": comparison.against,
        "bytes": case.bytes,
        "operations": case.operations,
        "normals": case.normals,
        **summary(done),
        "target": comparison.target,
        "rounds": done,
        "others": round(others.share, 3),
        "prepared": {worker.side: worker.prepared for worker in workers},
        "parity": parity,
    }
    if layers is not None:
        row["shapes"] = [
            {"title": layer.title, "operations": layer.operations, **summary(turns)}
            for layer, turns in zip(layers, shapes, strict=True)
        ]
        ratios = [shape["ratio"]["median"] for shape in row["shapes"]]
        row["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    row["met"] = None if comparison.target is None else row["ratio"]["median"] >= comparison.target
    if comparison.memory is not None and all(worker.peak for worker in workers):
        row["memory"] = {worker.side: worker.peak for worker in workers} | {"wanted": comparison.memory}
    return row


def alternate(
    workers: list[Worker], shape: int, others: Others, *, rounds: int, turn: float, pause: float
) -> list[dict[str, float]]:
    """Let the workers take turns on a shape; return their times of each round."""
    for worker in workers:
        worker.turn(0, shape)  # warm
    done: list[dict[str, float]] = []
    begin = time.perf_counter()
    while len(done) < rounds and (len(done) < LEAST_ROUNDS or time.perf_counter() - begin < PATIENCE):
        done.append({})
        for worker in workers:
            others.rest(pause)
            done[-1][worker.side] = worker.turn(turn, shape)
    return done


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ratio and seconds of rounds."""
    ratios = [r["peer"] / r["ours"] for r in rounds]
    return {
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "seconds": {side: statistics.median(r[side] for r in rounds) for side in ("ours", "peer")},
    }


# -- the report ------------------------------------------------------------------------------------------------


def choose(names: list[str] | None) -> list[Comparison]:
    """Return the comparisons of these names, or whose names begin so; all by default."""
    known = {comparison.name for comparison in COMPARISONS}

    def named(comparison: Comparison, name: str) -> bool:
        return comparison.name == name if name in known else comparison.name.startswith(name)

    return [comparison for comparison in COMPARISONS if any(named(comparison, name) for name in names or [""])]


def main() -> int:
    """Compare, print, and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="peers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="NAME", nargs="+", help="cases, or the beginnings of their names")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"at most so many (default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work? The ratios mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    parser.add_argument("--name", default="peers-cpu", help="of the files with the results (default peers-cpu)")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, BY_NAME[args.case].at(args.scale), args.folder, args.threads, args.variant)
        return 0

    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"peers.py: {' and '.join(missing)} not installed: pip install torch diffusers", file=sys.stderr)
        return 2
    chosen = choose(args.only)
    if not chosen:
        parser.error(f"no such case; there are {', '.join(c.name for c in COMPARISONS)}")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads want at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave nothing behind
    output = args.output or (RESULTS if not (args.only or args.quick or args.threads != 2) else None)

    rounds = min(args.rounds, 2) if args.quick else args.rounds
    how = {"scale": 0.001, "turn": 0.01, "pause": 0.01} if args.quick else {"scale": 1.0, "turn": TURN, "pause": PAUSE}
    results: dict[str, Any] = {
        "header": header(args.threads, "torch", "diffusers") | {"scale": how["scale"]},
        "rows": [],
    }
    failed, begin = [], time.perf_counter()
    for comparison in chosen:
        try:
            row = compare(comparison, rounds=rounds, threads=args.threads, **how)
        except PeersError as error:
            failed.append(comparison.name)
            print(f"{comparison.name}: {error}", flush=True)
            continue
        results["rows"].append(row)
        ratio, target = row["ratio"], row["target"]
        words = [f"{comparison.name}: {ratio['median']:.2f} ({ratio['min']:.2f} .. {ratio['max']:.2f})"]
        if target is not None:
            words.append(f"target {target:g}: {'met' if row['met'] else 'MISSED'}")
        if row["others"] > BUSY and not args.quick:
            words.append(f"DOUBTFUL: other programs used {row['others']:.0%} of the machine")
        if "memory" in row:
            words.append(memory_words(row["memory"]))
        print("  ".join(words), flush=True)
    print(f"\n{table(results)}\n{time.perf_counter() - begin:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}; nothing written", file=sys.stderr)
        return 1
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write(output / f"{args.name}.json", json.dumps(results, indent=1) + "\n")
        write(output / f"{args.name}.md", table(results))
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
