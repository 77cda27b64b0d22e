"""The workloads that only a source tree can run, beside the table of `fastdiff.bench`: append-only, like that table.

pytest-benchmark, `run.py` and asv take `WORKLOADS`; `peers.py` has more, `FOR_PEERS`: other U-Nets and pictures, and
convolutions of many shapes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import fastdiff as fd
from fastdiff import bench
from fastdiff.bench.arrays import IMAGE_T, drawn, white
from fastdiff.bench.layers import Conv, channels_last, conv_gradients
from fastdiff.bench.networks import (
    EMA,
    PEER_DDIM,
    PEER_STEPS,
    SEEN_NOISE,
    UNET,
    Chain,
    ChainGiven,
    PicturesForward,
    PicturesSampling,
    PicturesTraining,
    chain_noise,
    perturbed,
    training_draws,
    training_only,
    untrained,
    weights_of,
)
from fastdiff.bench.table import CURVE, PICTURE
from fastdiff.bench.workload import Arrays, PeerWork, Run, Work, Workload, fills

HERE = Path(__file__).parent
SERIES = 1000  # that training draws from


def process(*arguments: str, **environment: str) -> str:
    """Run a new interpreter, and return what it printed."""
    command, env = [sys.executable, *arguments], os.environ | environment
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


class ColdImport(Workload):
    """A new process imports the library."""

    rate_unit, example_values, needs = "", 0, "cpu"

    def counts(self) -> tuple[int, int]:
        return 4 * self.values, 0

    def ours(self, be: Any) -> Work:
        def check(printed: str) -> None:
            assert printed.strip() == fd.__version__

        return Work(lambda: process("-c", "import fastdiff; print(fastdiff.__version__)"), check)


class ColdStart(Chain):
    """A new process loads a model and draws curves, its kernels being cached."""

    rate_unit, example_values, needs = "", 0, "cpu"
    peer_name, peer_samples = "torch + diffusers", 16
    parity: ClassVar[dict[str, float]] = {"samples": 1e-4}

    def checkpoint(self, be: Any, path: Path) -> Any:
        """Save a briefly trained model without its moments, and return it."""
        model = untrained(self.network(), self.schedule(), be)
        model.fit(self.curves(), steps=2, batch=16, ema=None, **training_only())
        model.save(path, training=False)
        return model

    def start(self, script: str, path: Path, threads: int, **environment: str) -> str:
        """Run a script on a checkpoint in a new interpreter, and return what it printed."""
        return process(str(HERE / script), str(path), str(self.n), str(threads), **environment)

    @contextlib.contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """What the process finds in its environment beside the usual."""
        yield {}

    def ours(self, be: Any) -> Work:
        folder = tempfile.mkdtemp(prefix="fastdiff-")
        path = Path(folder) / "model.safetensors"

        def run() -> str:
            with self.environment() as environment:
                return self.start("cold_ours.py", path, be.threads, **environment)

        weakref.finalize(run, shutil.rmtree, folder)
        self.checkpoint(be, path)

        def check(printed: str) -> None:
            assert printed.split("\n")[0] == f"({self.n}, {self.shape[0]})"

        return Work(run, check)

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        path = folder / "model.safetensors"
        model = self.checkpoint(be, path)
        inputs = {"betas": self.schedule().betas, "noise": chain_noise(be, (self.n, *self.shape), model.seed)}
        inputs |= weights_of(model.net) | {"mean": model.normaliser.mean, "std": model.normaliser.std}
        return inputs, {"samples": fd.load(path, backend=be).sample(self.n)}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        from cold_peer import sample

        path = folder / "peer.safetensors"
        nets.save_tutorial(path, inputs)
        with nets.drawing(inputs["noise"]):
            samples = sample(str(path), self.n)
        threads = nets.torch.get_num_threads()
        return {"samples": samples.numpy()}, [lambda: self.start("cold_peer.py", path, threads)]


class FirstCompile(ColdStart):
    """The same with no kernel cached."""

    @contextlib.contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        with tempfile.TemporaryDirectory() as cache:
            yield {"NUMBA_CACHE_DIR": cache}


class ConvInputGradient(Conv):
    """The gradient of a convolution's input alone."""

    peer_name = "torch convolution_backward (oneDNN), channels-last"

    def filling(self, be: Any) -> Run:
        from fastdiff.backends.cpu import conv as cpu_conv

        (geometry, _, w, _, dy), dx = self.arrays(be), self.empty(be)
        nothing, product = cpu_conv.NOTHING, cpu_conv._product(geometry, dx.shape, dy.shape[3], True)
        flat = dy.reshape(-1), w.reshape(-1), dx.reshape(-1)

        # The part of conv_backward that fills dx.
        return fills(dx, lambda: be._do(*be._convolve(product, *flat, (True, nothing, nothing, nothing))))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        def gradient(*tensors: Any) -> Any:
            return conv_gradients(torch, *tensors, (True, False, False))[0].permute(0, 2, 3, 1)

        return PeerWork(gradient, channels_last(torch, given))


class ConvWeightGradient(ConvInputGradient):
    """The gradients of its weights and bias."""

    def filling(self, be: Any) -> Run:
        geometry, x, w, b, dy = self.arrays(be)
        dw, db = be.empty(w.shape), be.empty(b.shape)
        return fills(dw, lambda: be.conv_backward(geometry, dy, x, w, None, dw, db))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        def gradient(*tensors: Any) -> Any:
            return conv_gradients(torch, *tensors, (False, True, True))[1].permute(2, 3, 1, 0)

        return PeerWork(gradient, channels_last(torch, given))


class Series:
    """A U-Net on series (points, channels), and the same layers in PyTorch."""

    def network(self) -> Any:
        return perturbed(fd.UNet(self.shape, T=IMAGE_T, channels=self.channels, **UNET))

    def pictures(self, n: int = SERIES) -> Any:
        return white(n, self.shape)

    def weights_of(self, net: Any) -> Arrays:
        """Return the parameters by name, and the table of features of the timesteps."""
        return {f"w/{name}": view.copy() for name, view in net.params.items()} | dict(net.constants())

    def peer_network(self, nets: Any, inputs: Arrays) -> Any:
        weights = {name[2:]: nets.tensor(value) for name, value in inputs.items() if name.startswith("w/")}
        net = fd.UNet(self.shape, T=IMAGE_T, channels=self.channels, draw=False, **UNET)
        return nets.Series(net, weights, nets.tensor(inputs["features"]))


class SeriesTraining(Series, PicturesTraining):
    """A training step."""

    peer_name = "the same layers in torch, fused AdamW, clipping"

    def ours(self, be: Any) -> Work:
        return self.fitting(be, self.pictures(), EMA if self.ema else None)

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        X, inputs = self.pictures(), self.weights_of(self.network())
        model = self.few_steps(be, X)
        inputs |= training_draws(be, self.n, self.shape, len(X), IMAGE_T) | {"betas": self.schedule().betas}
        inputs["X"] = model.normaliser.apply(X, np.float32)
        return inputs, {"losses": np.array(model.history["loss"])}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net, X = self.peer_network(nets, inputs), nets.channels_first(inputs["X"])
        trainer = nets.Trainer(net, X, inputs["betas"], self.n, fused=True, ema=EMA if self.ema else None)
        draws = {name: map(nets.tensor, inputs[name]) for name in ("rows", "t")}
        run = self.peer_training(trainer, draws | {"eps": map(nets.channels_first, inputs["eps"])})
        return {"losses": np.array(trainer.losses[:PEER_STEPS])}, [run]


class SeriesSampling(Series, PicturesSampling):
    """Sampling by DDIM, x0 clipped."""

    peer_name = "the same layers in torch, DDIMScheduler"

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        inputs = {"x": drawn(be, (self.n, *self.shape), "init"), "betas": self.schedule().betas}
        inputs |= self.weights_of(self.network())
        return inputs, {"series": replace(self, steps=PEER_DDIM).setup(be).run()}

    parity: ClassVar[dict[str, float]] = {"series": 1e-4}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        net, first = self.peer_network(nets, inputs), (self.n, *self.shape[::-1])
        few, ddim = (nets.ddim(net, inputs["betas"], steps) for steps in (PEER_DDIM, self.steps))
        series = few(nets.channels_first(inputs["x"])).transpose(1, 2).numpy()
        return {"series": series}, [lambda: ddim(nets.torch.randn(*first))]


CONV_CHANNELS, CONV_SIZES = (64, 128, 256), (8, 16, 32, 64)
LARGE = 64  # pixels: pictures of this size come in batches of a quarter


class Imputation(ChainGiven):
    """Series of 24 x 5 values, a tenth of which are known, as the rows of a perceptron."""

    seen: ClassVar[int] = 12

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        samples, runs = super().peer_side(nets, inputs, folder, variant)
        if variant != "looped":
            return samples, runs
        net, given, known = self.peer_network(nets, inputs), self.peer_inputs(), self.known()

        def run() -> Any:
            """Draw after draw, as CSDI's evaluation does."""
            return [
                nets.tmpd_chain(net, given["rows"], given["levels"], known, SEEN_NOISE)
                for _ in range(self.draws_of_each)
            ]

        return samples, [run]


@dataclass(frozen=True)
class ConvSweep(Workload):
    """Convolutions of many shapes, each timed alone: it fills an array that is there, as in a network."""

    layer: type[Conv] = Conv

    peer_samples = 2

    @property
    def peer_name(self) -> str:
        return self.layer.peer_name

    @property
    def parity(self) -> dict[str, float]:
        return self.layer.parity

    @property
    def parts(self) -> tuple[Conv, ...]:
        return tuple(
            self.layer(f"{self.name}/{title}", title, n, (size, size, channels))
            for channels in CONV_CHANNELS
            for size in CONV_SIZES
            for n in [max(1, self.n // (4 if size == LARGE else 1))]
            for title in [f"{channels} channels, {size} x {size}, batch {n}"]
        )

    @property
    def values(self) -> int:
        return sum(part.values for part in self.parts)

    def counts(self) -> tuple[int, int]:
        return sum(part.bytes for part in self.parts), sum(part.operations for part in self.parts)

    def compare(self, be: Any, folder: Path) -> tuple[Arrays, Arrays]:
        return {}, {f"conv/{part.title}": part.operation(be)() for part in self.parts}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Path, variant: str) -> tuple[Arrays, list[Run]]:
        def works(sweep: ConvSweep) -> list[PeerWork]:
            return [
                part.peer(nets.torch, {name: nets.tensor(value) for name, value in part.inputs().items()})
                for part in sweep.parts
            ]

        few = self.peer_example
        outputs = {
            f"conv/{part.title}": np.asarray(work.run()) for part, work in zip(few.parts, works(few), strict=True)
        }
        return outputs, [work.run for work in works(self)]


WORKLOADS: tuple[Workload, ...] = (
    *bench.WORKLOADS,
    ColdStart("cold-start", "new process, load, 16 curves", 16, CURVE),
    ColdImport("cold-import", "new process, import fastdiff", 1, (1,)),
    FirstCompile("first-compile", "new process, no kernel cached, load, 16 curves", 16, CURVE),
)
LARGE_PICTURES = {"shape": (LARGE, LARGE, 3), "forward": 4_473_094_144}
WIDE = {"shape": PICTURE, "channels": (128, 128, 128), "weights": 9_092_483, "forward": 6_044_254_208}
ON_LARGE, ON_WIDE = "U-Net, 64 x 64 x 3, batch 4", "U-Net of 128 channels, 32 x 32 x 3, batch 16"
LONG_SERIES = {"shape": (128, 5), "channels": (64, 128, 256, 512), "weights": 27_351_173, "forward": 1_100_972_032}
ON_SERIES = "U-Net of 64 to 512 channels, 128 x 5, batch 32"
# fmt: off
FOR_PEERS: tuple[Workload, ...] = (
    PicturesTraining(
        "unet-train-ema-16", "training step with average, U-Net, 32 x 32 x 3, batch 16", 16, PICTURE, 4, ema=True,
    ),
    PicturesTraining("unet-train-64px-4", f"training step, {ON_LARGE}", 4, units=4, **LARGE_PICTURES),
    PicturesForward("unet-forward-64", "forward pass, U-Net, 32 x 32 x 3, batch 64", 64, PICTURE),
    PicturesForward("unet-forward-64px-4", f"forward pass, {ON_LARGE}", 4, **LARGE_PICTURES),
    PicturesTraining("unet-train-wide-16", f"training step, {ON_WIDE}", 16, **WIDE),
    PicturesForward("unet-forward-wide-16", f"forward pass, {ON_WIDE}", 16, **WIDE),
    Chain("chain-tutorial-16", "100-step chain, tutorial MLP, n = 16", 16, CURVE),
    SeriesTraining("unet-series-train-32", f"training step, {ON_SERIES}", 32, units=2, **LONG_SERIES),
    SeriesSampling("unet-series-ddim-32", f"20 DDIM steps, {ON_SERIES}", 32, **LONG_SERIES),
    Imputation(
        "impute-24x5-100", "100 series of 24 x 5 seen at 12 values, 100 draws, 50 rows", 10_000, (120,), net="default",
    ),
    ConvSweep("conv-forward", "conv 3x3, forward", 16, ()),
    ConvSweep("conv-input-gradient", "conv 3x3, input gradient", 16, (), layer=ConvInputGradient),
    ConvSweep("conv-weight-gradient", "conv 3x3, weight and bias gradient", 16, (), layer=ConvWeightGradient),
)
# fmt: on
BY_NAME = {workload.name: workload for workload in WORKLOADS}
OF_PEERS = BY_NAME | {workload.name: workload for workload in FOR_PEERS}
