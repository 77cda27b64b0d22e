"""Workloads of networks: perceptrons on curves, U-Nets on pictures, and their checkpoints."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

import fastdiff as fd
from fastdiff.backends import ChainTable, Inputs
from fastdiff.bench.arrays import IMAGE_T, T, curve_schedule, drawn, image_schedule, white
from fastdiff.bench.workload import Arrays, RateUnit, Run, Work, Workload, agree, fills, finite, vector

CURVES, PICTURES = 10_000, 256  # that training draws from
HIDDEN = (128, 128, 128)  # of the default MLP
TIME_FEATURES = 32
CHANNELS = (32, 64, 128)  # of the U-Net
UNET: dict[str, Any] = {"blocks": 2, "head_width": 32, "groups": 8}
EMA = 0.999
DDIM_STEPS = 20
PEER_STEPS = 5  # of training, in the example that both sides compute
SEEN, SEEN_NOISE = 8, 0.1  # points of a curve that are known, and the deviation of their noise
PEER_DDIM, GPU_DDIM = 4, 2  # of sampling, there and on a GPU: an untrained network about doubles a difference at each


def untrained(net: Any, schedule: Any, be: Any) -> Any:
    """Return a model as every version of the library has it."""
    return fd.Diffusion(net, schedule, prediction="noise", backend=be, seed=0)


def training_only() -> dict[str, Any]:
    """Return the options of `fit` with which it does nothing but train, in any version of the library."""
    if "judge" in inspect.signature(fd.Diffusion.fit).parameters:
        return {"progress": False, "validation": 0, "judge": False}
    return {"progress": False}


def perturbed(net: Any) -> Any:
    """Return the network with no tensor at zero, as some of a fresh one are."""
    rng = np.random.default_rng(0)
    for view in net.params.values():
        view += rng.normal(size=view.shape, scale=0.02).astype(np.float32)
    return net


def chain_noise(be: Any, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Return all noise of a chain of T steps: the start, and then that of the timesteps from the last to 1."""
    rest = [drawn(be, shape, "step", t, seed) for t in range(T - 1, 0, -1)]
    return np.stack([drawn(be, shape, "init", seed=seed), *rest])


def training_draws(be: Any, n: int, shape: tuple[int, ...], rows: int, timesteps: int) -> Arrays:
    """Return data rows, timesteps and noise of the first training steps of seed 0."""
    stream = fd.noise.Stream
    draws = [fd.noise.Draw(0, stream.BATCH, step) for step in range(PEER_STEPS)]
    return {
        "rows": np.stack([fd.noise.scaled_words(n, rows, draw) for draw in draws]),
        "t": np.stack([fd.noise.scaled_words(n, timesteps, draw.of(stream.TRAIN_TIME)) for draw in draws]),
        "eps": np.stack([drawn(be, (n, *shape), "train_noise", draw.step) for draw in draws]),
    }


def weights_of(net: Any) -> Arrays:
    """Return a perceptron's parameters by name, and its table of features of the timesteps where it has one."""
    features = {} if net.plan.features is None else {"features": net.plan.features.astype(np.float32)}
    return {f"w/{name}": view.copy() for name, view in net.params.items()} | features


def joined(arrays: Arrays) -> Any:
    """Return the parameters among arrays as one vector, in the order of their names."""
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays) if name.startswith("w/")])


@dataclass(frozen=True)
class Network(Workload):
    """What workloads of networks have in common: their network and schedule, and its counts."""

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        raise NotImplementedError

    @property
    def forward_operations(self) -> int:
        """Operations of a forward pass, for one sample."""
        raise NotImplementedError

    @property
    def input_operations(self) -> int:
        """Those of its first layer, whose input needs no gradient."""
        return 0

    def training_counts(self) -> tuple[int, int]:
        """Return the counts of a training step, for which parameters and two moments are read and written."""
        passes = self.n * (3 * self.forward_operations - self.input_operations)
        return 4 * self.values + 24 * self.parameters, passes + 3 * self.values

    def network(self) -> Any:
        """Return the network."""
        raise NotImplementedError

    def schedule(self) -> Any:
        """Return the schedule."""
        raise NotImplementedError

    def fitting(self, be: Any, X: Any, ema: float | None = None, **options: Any) -> Work:
        """Return training steps of a model that has taken one; without a moving average, as peers do without it."""
        model = untrained(self.network(), self.schedule(), be)
        how = {"batch": self.n, **options, **training_only()}
        model.fit(X, steps=1, ema=ema, **how)

        def check(result: Any) -> None:
            assert result.step >= 1 + self.units
            assert np.isfinite(result.net.flat).all()

        return Work(lambda: model.fit(X, steps=self.units, **how), check, self.units)

    def few_steps(self, be: Any, X: Any, **options: Any) -> Any:
        """Return a model after the steps of the example that both sides compute."""
        model = untrained(self.network(), self.schedule(), be)
        return model.fit(X, steps=PEER_STEPS, batch=self.n, ema=None, **options, **training_only())

    def peer_training(self, trainer: Any, inputs: Arrays) -> Run:
        """Take the example's steps with a trainer of `peer_nets`; return more of its steps."""
        for rows, t, eps in zip(*(inputs[name] for name in ("rows", "t", "eps")), strict=True):
            trainer.step(rows, t, eps)

        def run() -> None:
            for _ in range(self.units):
                trainer.step(*trainer.draw())

        return run


# -- perceptrons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perceptron(Network):
    """A perceptron on curves: the tutorial's, or the default."""

    net: Literal["tutorial", "default"] = "tutorial"

    example_values = 50_000

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the layers, input and output included."""
        d = self.shape[0]
        return (d, 2 * d, 4 * d, 2 * d, d) if self.net == "tutorial" else (d, *HIDDEN, d)

    @property
    def products(self) -> tuple[int, ...]:
        """Multiplications of each layer for one sample."""
        return tuple(a * b for a, b in pairwise(self.widths))

    @property
    def parameters(self) -> int:
        time = T * 4 * self.shape[0] if self.net == "tutorial" else (TIME_FEATURES + 1) * 2 * sum(HIDDEN)
        return sum(self.products) + sum(self.widths[1:]) + time

    @property
    def forward_operations(self) -> int:
        return 2 * sum(self.products)

    @property
    def input_operations(self) -> int:
        return 2 * self.products[0]

    def network(self) -> Any:
        points = self.shape[0]
        return perturbed(fd.MLP.tutorial(points, T=T) if self.net == "tutorial" else fd.MLP(points, hidden=HIDDEN, T=T))

    def schedule(self) -> Any:
        return curve_schedule()

    def curves(self) -> Any:
        """Return the curves that training draws from."""
        return fd.data.harmonic_curves(CURVES, points=self.shape[0])

    def peer_network(self, nets: Any, inputs: Arrays) -> Any:
        """Return it in PyTorch, with the weights of `weights_of`."""
        weights = {name[2:]: np.asarray(value) for name, value in inputs.items() if name.startswith("w/")}
        if self.net == "tutorial":
            return nets.load(nets.Tutorial(self.shape[0], T), weights)
        return nets.load(nets.Modulated(self.shape[0], HIDDEN, nets.tensor(inputs["features"])), weights)


class PerceptronForward(Perceptron):
    """A forward pass."""

    rate_unit = "GF/s"

    def counts(self) -> tuple[int, int]:
        return 8 * self.values + 4 * self.parameters, self.n * self.forward_operations

    def ours(self, be: Any) -> Work:
        net, x, t = self.network(), be.asarray(white(self.n, self.shape)), be.asarray(np.arange(self.n) % T, np.int64)
        return Work(lambda: net.predict(x, t, backend=be), finite(x.shape, 1e-3, 1e3))


class Chain(Perceptron):
    """The 100-step chain of DDPM."""

    rate_unit = "samples/s"
    tolerance, draws = 1e-4, T
    precisions: ClassVar[dict[str, float]] = {"bf16x3": 2.0**-14, "bf16": 2.0**-6}
    peer_name, peer_samples = "torch, no_grad", 64
    parity: ClassVar[dict[str, float]] = {"output": 1e-5, "samples": 1e-4}

    def counts(self) -> tuple[int, int]:
        return 4 * self.values + 4 * self.parameters, T * (self.n * self.forward_operations + 8 * self.values)

    def sampler(self) -> Any:
        """Return the table."""
        return fd.samplers.ddpm(self.schedule())

    def ours(self, be: Any) -> Work:
        net, sampler = self.network(), self.sampler()
        check = finite((self.n, *self.shape), 0.01, 1e4)
        return Work(lambda: fd.sample(net, sampler, n=self.n, seed=0, backend=be), check)

    def operation(self, be: Any) -> Run:
        net, sampler = self.network(), self.sampler()
        params, x = be.asarray(net.flat), be.empty((self.n, *self.shape))
        start, draw = (fd.noise.Draw(0, stream) for stream in (fd.noise.Stream.INIT, fd.noise.Stream.STEP))

        def chain() -> None:
            be.normal(x, start)
            be.mlp_chain(net.plan, params, x, ChainTable(sampler.rows, sampler.clip), draw)

        return fills(x, chain)

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        net, noise = self.network(), chain_noise(be, (self.n, *self.shape))
        inputs = {"betas": self.schedule().betas, "noise": noise, **weights_of(net)}
        return inputs, {"output": net.predict(noise[0], T // 2, backend=be), "samples": self.setup(be).run()}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net, rows, noise = self.peer_network(nets, inputs), nets.coefficients(inputs["betas"]), inputs["noise"]
        with nets.drawing(noise):
            samples = nets.chain(net, rows, noise[0].shape)
        outputs = {"output": nets.output(net, nets.tensor(noise[0]), T // 2), "samples": samples.numpy()}
        return outputs, [lambda: nets.chain(net, rows, (self.n, *self.shape))]

    def outputs(self, be: Any) -> Any:
        net, x = self.network(), be.asarray(white(64, self.shape))
        t = be.asarray(np.full(len(x), T // 2), np.int64)
        return be.to_numpy(be.mlp_forward(net.plan, be.asarray(net.flat), Inputs(x, t)))

    def gpu_ways(self, peers: Any, be: Any, run: Run) -> dict[str, Run]:
        theirs = peers.on_gpu(self.peer_network(peers.nets, weights_of(self.network())))
        x = peers.device(white(64, self.shape))
        agree(self.name, self.outputs(be), peers.nets.output(theirs, x, T // 2))
        return peers.chain(theirs, self.schedule().betas, self.n, self.shape[0])


class MemoryChain(Chain):
    """As many evaluations through a table whose rows remember three earlier ones: LMS, which draws no noise."""

    draws = 1
    peer_name = ""

    def sampler(self) -> Any:
        return fd.samplers.lms(self.schedule(), T)

    def counts(self) -> tuple[int, int]:
        moved, work = super().counts()
        return moved, work + 6 * T * self.values  # three more products and sums at every row


class ChainGiven(Chain):
    """Draws of curves that are known at a few of their points, 100 of each, by tmpd in half as many rows."""

    precisions: ClassVar[dict[str, float]] = {}  # it goes layer by layer
    seen: ClassVar[int] = SEEN
    rows: ClassVar[int] = T // 2
    draws = T // 2
    peer_name, peer_samples = "torch.func.vjp, torch.linalg", 200
    parity: ClassVar[dict[str, float]] = {"samples": 1e-3}

    @property
    def draws_of_each(self) -> int:
        return min(self.n, 100)

    @property
    def curves_seen(self) -> int:
        return self.n // self.draws_of_each

    def at(self, scale: float) -> Self:
        return replace(self, n=max(1, round(self.curves_seen * scale)) * self.draws_of_each)

    def counts(self) -> tuple[int, int]:
        passes = (
            self.n * (1 + self.seen) * self.forward_operations
        )  # forward, and backward for each value that is known
        return 4 * self.values + 4 * self.parameters, self.rows * (passes + 8 * self.values)

    def sampler(self) -> Any:
        return fd.samplers.ddpm(self.schedule(), self.rows)

    def known(self) -> Any:
        """Return what is known of the curves: (curves, points) with NaN."""
        curves = fd.data.harmonic_curves(self.curves_seen, points=self.shape[0])
        hidden = np.random.default_rng(0).random(curves.shape).argsort(axis=1) >= self.seen
        return np.where(hidden, np.nan, curves)

    def ours(self, be: Any) -> Work:
        net, sampler, known = self.network(), self.sampler(), fd.Known(self.known(), SEEN_NOISE)
        check = finite((self.draws_of_each, self.curves_seen, *self.shape), 0.01, 1e4)

        def draw() -> Any:
            return fd.sample(net, sampler, n=self.draws_of_each, seed=0, given=known, backend=be)

        return Work(draw, check)

    def operation(self, be: Any) -> Run:
        return self.ours(be).run

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        known, sampler = self.known(), self.sampler()
        from fastdiff.conditioning import Draws

        draws, stream = Draws(len(known), self.draws_of_each), fd.noise.Stream
        noise = np.empty((self.rows, self.n, *self.shape), np.float32)
        draws.fill(be, noise[0], fd.noise.Draw(0, stream.INIT))
        for out, row in zip(noise[1:], sampler.rows, strict=False):
            draws.fill(be, out, fd.noise.Draw(0, stream.STEP, row.step))
        inputs = {"noise": noise, "known": known, **self.peer_inputs(), **weights_of(self.network())}
        samples = self.setup(be).run()
        return inputs, {"samples": samples.swapaxes(0, 1).reshape(self.n, *self.shape)}

    def peer_inputs(self) -> Arrays:
        """Return the numbers of the table's rows, and signal and noise there."""
        schedule, rows = self.schedule(), np.array([row[:11] for row in self.sampler().rows])
        t = rows[:, 0].astype(int)
        return {"rows": rows, "levels": np.stack([schedule.signal[t], schedule.noise[t]], axis=1)}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net, given = self.peer_network(nets, inputs), self.peer_inputs()

        def run(known: Any, n: int) -> Any:
            return nets.tmpd_chain(net, given["rows"], given["levels"], np.repeat(known, n, axis=0), SEEN_NOISE)

        with nets.drawing(inputs["noise"]):
            samples = run(inputs["known"], inputs["noise"].shape[1] // len(inputs["known"]))
        return {"samples": samples.numpy()}, [lambda: run(self.known(), self.draws_of_each)]

    def gpu_ways(self, peers: Any, be: Any, run: Run) -> dict[str, Run]:
        return {}


class Training(Perceptron):
    """A training step."""

    rate_unit = "samples/s"
    tolerance, draws = 1e-5, 1
    peer_name, peer_samples = "torch, AdamW, clipping", 8192
    parity: ClassVar[dict[str, float]] = {"losses": 1e-5, "weights": 1e-3}

    def counts(self) -> tuple[int, int]:
        return self.training_counts()

    def ours(self, be: Any) -> Work:
        return self.fitting(be, self.curves())

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        X, inputs = self.curves(), weights_of(self.network()) | {"betas": self.schedule().betas}
        model = self.few_steps(be, X)
        inputs |= training_draws(be, self.n, self.shape, len(X), T)
        inputs["X"] = (X - np.float32(model.normaliser.mean)) / np.float32(model.normaliser.std)
        return inputs, {"losses": np.array(model.history["loss"]), "weights": joined(weights_of(model.net))}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net, X = self.peer_network(nets, inputs), nets.tensor(inputs["X"])
        trainer = nets.Trainer(net, X, inputs["betas"], self.n, fused=variant == "fused")
        run = self.peer_training(trainer, {name: nets.tensor(inputs[name]) for name in ("rows", "t", "eps")})
        return {"losses": np.array(trainer.losses), "weights": joined(nets.weights_of(net)).copy()}, [run]

    def gpu_ways(self, peers: Any, be: Any, run: Run) -> dict[str, Run]:
        X, net = self.curves(), peers.on_gpu(self.peer_network(peers.nets, weights_of(self.network())))
        return peers.training(net, (X - X.mean()) / X.std(), self.schedule().betas, self.n)


# -- U-Nets ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures(Network):
    """A U-Net on pictures. Its counts are numbers here: tests count."""

    channels: tuple[int, ...] = CHANNELS
    weights: int = 3_940_547
    forward: int = 1_080_819_712  # operations of a forward pass, for one picture of 32 x 32 x 3

    rate_unit: ClassVar[RateUnit] = "GF/s"
    needs = "layers"
    example_values, tolerance = 6000, 5e-5
    peer_samples = 16  # no more than the batch, for which a compiled network is made
    image = convolves = True

    @property
    def parameters(self) -> int:
        return self.weights

    @property
    def forward_operations(self) -> int:
        return self.forward

    def network(self) -> Any:
        return perturbed(fd.UNet(self.shape, T=IMAGE_T, channels=self.channels, **UNET))

    def schedule(self) -> Any:
        return image_schedule()

    def pictures(self, n: int = PICTURES) -> Any:
        """Return pictures in [-1, 1]."""
        return np.tanh(white(n, self.shape))

    def peer_network(self, nets: Any, folder: Path, variant: str, training: bool = False) -> Any:
        """Return the network that `compare` has left in the folder."""
        net = nets.Pictures(folder / "unet").train(training)
        if variant == "bf16":
            return nets.Halves(net)
        if variant != "compiled":
            return net
        return nets.torch.compile(nets.expand_upsampling(net) if training else net, dynamic=False)


class PicturesForward(Pictures):
    """A forward pass."""

    peer_name = "diffusers UNet2DModel, no_grad"
    parity: ClassVar[dict[str, float]] = {"output": 5e-5}

    def counts(self) -> tuple[int, int]:
        return 8 * self.values + 4 * self.parameters, self.n * self.forward

    def inputs(self) -> Arrays:
        return {"x": self.pictures(self.n), "t": np.arange(self.n) % IMAGE_T}

    def ours(self, be: Any) -> Work:
        from fastdiff.nn import NetworkDenoiser

        (x, t), net = self.inputs().values(), self.network()
        given = be.asarray(x), be.asarray(t, np.int64)
        denoiser = NetworkDenoiser(net, be.asarray(net.flat), "noise", be)  # weights stay, as in a compiled peer
        return Work(lambda: denoiser.predict(*given), finite(x.shape, 1e-3, 1e3))

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        self.network().save_diffusers(folder / "unet")
        return self.inputs(), {"output": self.setup(be).run()}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net = self.peer_network(nets, folder, variant)
        small, large = ((nets.nchw(given["x"]), nets.tensor(given["t"])) for given in (inputs, self.inputs()))
        return {"output": nets.nhwc(nets.evaluated(net, *small))}, [lambda: nets.evaluated(net, *large)]

    def gpu_forms(self, peers: Any, folder: Any) -> Any:
        return peers.image_forward(folder / "unet", **self.inputs())


@dataclass(frozen=True)
class PicturesTraining(Pictures):
    """A training step, also with the moving average of the weights, as a user has it."""

    ema: bool = False

    draws = 1
    parity: ClassVar[dict[str, float]] = {"losses": 5e-5}

    @property
    def peer_name(self) -> str:  # type: ignore[override]
        return f"diffusers UNet2DModel, AdamW, clipping{', EMA' if self.ema else ''}"

    def counts(self) -> tuple[int, int]:
        return self.training_counts()

    def ours(self, be: Any) -> Work:
        return self.fitting(be, self.pictures(), EMA if self.ema else None, data_range=(-1.0, 1.0))

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        self.network().save_diffusers(folder / "unet")
        X = self.pictures()
        model = self.few_steps(be, X, data_range=(-1.0, 1.0))
        inputs = {"X": X, "betas": self.schedule().betas} | training_draws(be, self.n, self.shape, len(X), IMAGE_T)
        return inputs, {"losses": np.array(model.history["loss"])}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net, X = self.peer_network(nets, folder, variant, training=True), nets.nchw(inputs["X"])
        options = {"fused": bool(variant), "ema": EMA if self.ema else None}
        trainer = nets.Trainer(net, X, inputs["betas"], self.n, **options)
        draws = {name: map(nets.tensor, inputs[name]) for name in ("rows", "t")}
        run = self.peer_training(trainer, draws | {"eps": map(nets.nchw, inputs["eps"])})
        return {"losses": np.array(trainer.losses[:PEER_STEPS])}, [run]

    def example_batch(self) -> tuple[Any, Any, Any]:
        """Return pictures, timesteps and noise."""
        X, rng = self.pictures(), np.random.default_rng(1)
        x0, t = X[:: max(1, len(X) // self.n)][: self.n], rng.integers(0, IMAGE_T, min(self.n, len(X)))
        return x0, t, rng.standard_normal(x0.shape, np.float32)

    def gpu_result(self, be: Any) -> Any:
        """Return the gradient of `example_batch`, as diffusers has the parameters, in the order of their names."""
        from fastdiff.backends.layers import Batch
        from fastdiff.interop import diffusers_views

        net, s, (x0, t, eps) = self.network(), self.schedule(), self.example_batch()
        x_t = s.signal[t][:, None, None, None] * x0 + s.noise[t][:, None, None, None] * eps
        grads = be.asarray(net.layout.zeros(np.float32))
        batch = Batch(be.asarray(x_t, np.float32), be.asarray(t, np.int64), be.asarray(eps))
        net.runner(be, be.asarray(net.flat)).gradient(batch, grads)
        views = diffusers_views(net, be.to_numpy(grads))
        return np.concatenate([views[name].reshape(-1) for name in sorted(views)])

    def gpu_forms(self, peers: Any, folder: Any) -> Any:
        return peers.image_training(
            folder / "unet", self.pictures(), self.schedule().betas, self.n, self.example_batch()
        )


@dataclass(frozen=True)
class PicturesSampling(Pictures):
    """Sampling by DDIM, x0 clipped to the range of pictures."""

    steps: int = DDIM_STEPS

    draws = 1
    example_values, tolerance = 3000, 0.1  # an untrained network almost doubles a difference at each step
    peer_name, peer_samples = "diffusers UNet2DModel, DDIMScheduler", 2
    parity: ClassVar[dict[str, float]] = {"pictures": 1e-4}

    def counts(self) -> tuple[int, int]:
        return 4 * self.values + 4 * self.parameters, self.steps * (self.n * self.forward + 8 * self.values)

    def sampler(self) -> Any:
        """Return the table."""
        return fd.samplers.ddim(self.schedule(), self.steps, clip=1.0)

    def ours(self, be: Any) -> Work:
        net, sampler = self.network(), self.sampler()
        check = finite((self.n, *self.shape), 0.01, 1.1)
        return Work(lambda: fd.sample(net, sampler, n=self.n, seed=0, backend=be), check)

    def operation(self, be: Any) -> Run:
        from fastdiff.nn import NetworkDenoiser

        net, sampler = self.network(), self.sampler()
        denoiser = NetworkDenoiser(net, be.asarray(net.flat), sampler.prediction, be)  # weights there, as PyTorch's
        return lambda: fd.sample(denoiser, sampler, n=self.n, seed=0, backend=be)

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        self.network().save_diffusers(folder / "unet")
        inputs = {"x": drawn(be, (self.n, *self.shape), "init"), "betas": self.schedule().betas}
        return inputs, {"pictures": replace(self, steps=PEER_DDIM).setup(be).run()}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net, channels_first = self.peer_network(nets, folder, variant), (self.n, *self.shape[-1:], *self.shape[:-1])
        few, ddim = (nets.ddim(net, inputs["betas"], steps) for steps in (PEER_DDIM, self.steps))
        pictures = nets.nhwc(few(nets.nchw(inputs["x"])))
        return {"pictures": pictures}, [lambda: ddim(nets.torch.randn(*channels_first))]

    def gpu_result(self, be: Any) -> Any:
        return vector(be.to_numpy(replace(self, steps=GPU_DDIM).operation(be)()))

    def gpu_forms(self, peers: Any, folder: Any) -> Any:
        few, table = replace(self, steps=GPU_DDIM).sampler(), self.sampler()
        start = fd.normal((self.n, *self.shape), seed=0, stream="init")
        return peers.image_sampling(folder / "unet", start, few.rows, table.rows, table.clip)


class Save(Pictures):
    """A checkpoint of the U-Net saved, with its moments."""

    rate_unit: ClassVar[RateUnit] = "GB/s"
    example_values, tolerance = 1, 1e-4

    def counts(self) -> tuple[int, int]:
        return 16 * self.parameters, 0  # parameters, their average and two moments

    def saved(self, be: Any) -> tuple[Any, Path]:
        """Return a model of one training step, with its moments, and where it is saved."""
        folder = tempfile.mkdtemp(prefix="fastdiff-")
        model = untrained(self.network(), self.schedule(), be)
        weakref.finalize(model, shutil.rmtree, folder)
        model.fit(self.pictures(2), steps=1, batch=1, data_range=(-1.0, 1.0), progress=False)
        path = Path(folder) / "model.safetensors"
        model.save(path)
        return model, path

    def ours(self, be: Any) -> Work:
        model, path = self.saved(be)

        def check(saved: Any) -> None:
            np.testing.assert_array_equal(vector(fd.load(path)), vector(saved))

        return Work(fills(model, lambda: model.save(path)), check)


class Load(Save):
    """That checkpoint loaded."""

    def ours(self, be: Any) -> Work:
        model, path = self.saved(be)

        def check(loaded: Any) -> None:
            np.testing.assert_array_equal(vector(loaded), vector(model))

        return Work(lambda: fd.load(path, backend=be), check)
