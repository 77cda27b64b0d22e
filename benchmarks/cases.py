"""The workloads that are timed: one table, for pytest-benchmark, for `peers.py` and for asv.

The table is append-only: a case keeps its name, its sizes and what it does, so that old results stay comparable.
Arrays are made in `Case.setup`, never in the part that is timed, except the results that a public call returns:
a user pays for those too.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

T = 100  # timesteps of the curve networks: the tutorial's sigmoid schedule
POINTS = 50
CURVES = 10_000  # that training draws from
HIDDEN = (128, 128, 128)  # of the default MLP
TIME_FEATURES = 32
IMAGE_T, IMAGE_STEP = 1000, 500  # schedule and timestep of the image step
DATA_ROWS, DATA_STEP = 10_000, 70  # of the denoiser whose data are rows
PICTURES = 256  # that training draws from
UNET = {"channels": (32, 64, 128), "blocks": 2, "head_width": 32, "groups": 8}
UNET_PARAMETERS, UNET_OPERATIONS = 3_940_547, 1_080_819_712  # of UNET on 32 x 32 x 3; forward, for one picture
DDIM_STEPS = 20
HERE = Path(__file__).parent


class Work(NamedTuple):
    """One thing to time.

    Attributes
    ----------
    run : callable
        Does `units` units of the work, returns what it made.
    check : callable
        Takes what `run` returned and raises `AssertionError` if it is wrong; cheap, and not for timing.
    units : int
        Training steps in one run; 1 for all other work.
    """

    run: Callable[[], Any]
    check: Callable[[Any], None]
    units: int = 1


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    name : str
        Never changes.
    title : str
        What is done, in words.
    kind : str
        Which setup, a key of `KINDS`.
    n : int
        Samples: rows, curves, images, or a training batch.
    shape : tuple of int
        Of one sample.
    net : {"", "tutorial", "default", "unet"}
        The network, where there is one.
    units : int
        Training steps in one run, so many that what a call of `fit` costs once does not count.
    """

    name: str
    title: str
    kind: str
    n: int
    shape: tuple[int, ...]
    net: str = ""
    units: int = 1

    def at(self, scale: float) -> Case:
        """Return the case with that fraction of its samples and training steps, at least one of each."""
        return replace(self, n=max(1, round(self.n * scale)), units=max(1, round(self.units * scale)))

    def setup(self, backend: Any = "cpu") -> Work:
        """Make the arrays and objects, and return what is to be timed. Compiles nothing: run it once to be warm."""
        import fastdiff as fd

        return KINDS[self.kind](fd, self, fd.get_backend(backend))

    @property
    def values(self) -> int:
        """Numbers in all samples."""
        return self.n * math.prod(self.shape)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the network's layers, input and output included."""
        d = self.shape[0]
        return {"": (), "unet": (), "tutorial": (d, 2 * d, 4 * d, 2 * d, d), "default": (d, *HIDDEN, d)}[self.net]

    @property
    def products(self) -> tuple[int, ...]:
        """Multiplications of each layer for one sample."""
        return tuple(a * b for a, b in pairwise(self.widths))

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        if self.net == "unet":
            return UNET_PARAMETERS
        modulated = 2 * sum(HIDDEN)
        time = {"": 0, "tutorial": T * 4 * self.shape[0], "default": (TIME_FEATURES + 1) * modulated}[self.net]
        return sum(self.products) + sum(self.widths[1:]) + time

    @property
    def normals(self) -> int:
        """Normals drawn for one unit of the work."""
        if self.kind in ("similarity", "reshape", "standardise", "posterior", "unet"):
            return 0
        return self.values * (T if self.kind in ("chain", "cold") else 1)

    @property
    def bytes(self) -> int:
        """Bytes of one unit that have to cross memory at least once: arguments, results, parameters and moments."""
        return {
            "normals": 4 * self.values,
            "forward": 12 * self.values + 8 * self.n,  # x0 in, x_t and the noise out; t
            "step": 12 * self.values,  # x and the network's output in, x out
            "chain": 4 * self.values + 4 * self.parameters,
            "training": 4 * self.values + 24 * self.parameters,  # parameters and two moments, in and out
            "cold": 4 * self.values + 4 * self.parameters,
            "similarity": 4 * self.values * (1 + self.shape[0]),
            "reshape": 8 * self.values + 4 * self.shape[0] ** 2,
            "standardise": 8 * self.values + 4 * self.shape[0] ** 2,
            "shaped": 4 * self.values + 4 * self.shape[0] ** 2,
            "posterior": 8 * self.values + 4 * DATA_ROWS * self.shape[0],
            "unet": 8 * self.values + 4 * self.parameters,
            "unet-training": 4 * self.values + 24 * self.parameters,
            "unet-ddim": 4 * self.values + 4 * self.parameters,
        }[self.kind]

    @property
    def operations(self) -> int:
        """Multiplications and additions of one unit: matrix products, and the formulas of noising and of a step.

        Draws, activations, exponentials, the time table and the optimiser are not counted.
        """
        forward = 2 * sum(self.products)
        backward = 4 * sum(self.products) - 2 * (self.products or (0,))[0]  # the input needs no gradient
        return {
            "normals": 0,
            "forward": 3 * self.values,
            "step": 8 * self.values,
            "chain": T * (self.n * forward + 8 * self.values),
            "training": self.n * (forward + backward) + 3 * self.values,
            "cold": T * (self.n * forward + 8 * self.values),
            "similarity": 3 * self.values * self.shape[0],  # and as many exponentials
            "reshape": 2 * self.values * self.shape[0],
            "standardise": 2 * self.values * self.shape[0] + 5 * self.values,
            "shaped": 2 * self.values * self.shape[0],
            "posterior": 6 * self.values * DATA_ROWS,  # and as many exponentials as states and rows
            "unet": self.n * UNET_OPERATIONS,
            "unet-training": 3 * self.n * UNET_OPERATIONS + 3 * self.values,
            "unet-ddim": DDIM_STEPS * (self.n * UNET_OPERATIONS + 8 * self.values),
        }[self.kind]


# -- the set-ups: (fastdiff, case, backend) -> Work ------------------------------------------------------------


def schedule(fd: Any, case: Case) -> Any:
    """Return the schedule that a case runs on."""
    if case.kind in ("forward", "step") or case.net == "unet":
        return fd.Schedule.linear(IMAGE_T)
    return fd.Schedule.sigmoid(T, beta_start=1e-5, beta_end=0.1)


def network(fd: Any, case: Case) -> Any:
    """Return the network of a case; no tensor is zero, as some of a fresh one are."""
    points = case.shape[0]
    if case.net == "unet":
        net = fd.UNet(case.shape, T=IMAGE_T, **UNET)
    else:
        net = fd.MLP.tutorial(points, T=T) if case.net == "tutorial" else fd.MLP(points, hidden=HIDDEN, T=T)
    rng = np.random.default_rng(0)
    for view in net.params.values():
        view += rng.normal(size=view.shape, scale=0.02).astype(np.float32)
    return net


def curves(fd: Any, case: Case) -> Any:
    """Return the curves that a case trains on."""
    return fd.data.harmonic_curves(CURVES, points=case.shape[0])


def noising(fd: Any, case: Case) -> tuple[Any, Any, Any]:
    """Return clean samples, their timesteps and the schedule."""
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal((case.n, *case.shape), np.float32)
    return x0, rng.integers(0, IMAGE_T, case.n), schedule(fd, case)


def image_step(fd: Any, case: Case) -> tuple[Any, Any, Any, tuple[float, float]]:
    """Return flat noisy images, a network's output for them, the row of the sampler's table and its clip."""
    rng = np.random.default_rng(0)
    x, out = (rng.standard_normal((case.n, math.prod(case.shape)), np.float32) for _ in range(2))
    sampler = fd.samplers.ddpm(schedule(fd, case), clip=1.0)
    row = sampler.rows[list(sampler.timesteps).index(IMAGE_STEP)]
    return x, out, row, sampler.clip


def finite(shape: tuple[int, ...], low: float, high: float) -> Callable[[Any], None]:
    """Return a check of an array's shape, and of the standard deviation of a part of it."""

    def check(x: Any) -> None:
        assert x.shape == shape
        assert x.dtype == np.float32
        part = x.reshape(len(x), -1)[:1000, :100_000]
        assert np.isfinite(part).all()
        assert low < part.std() < high

    return check


def _normals(fd: Any, case: Case, be: Any) -> Work:
    shape = (case.n, *case.shape)
    return Work(lambda: fd.normal(shape, seed=0, backend=be), finite(shape, 0.8, 1.2))


def _forward(fd: Any, case: Case, be: Any) -> Work:
    x0, t, s = noising(fd, case)

    def check(result: Any) -> None:
        x, eps = result
        finite(x0.shape, 0.8, 1.2)(x)
        k = slice(0, 100)
        exact = s.signal[t[k], None] * x0[k] + s.noise[t[k], None] * eps[k]
        np.testing.assert_allclose(x[k], exact, rtol=0, atol=1e-5)

    return Work(lambda: fd.forward_noise(x0, t, s, seed=0, backend=be), check)


def _step(fd: Any, case: Case, be: Any) -> Work:
    x, out, row, clip = image_step(fd, case)
    seeds = itertools.count()  # the same noise again and again would add up

    def run() -> Any:
        be.sampler_step(x, out, None, row, clip, seed=next(seeds), stream=fd.noise.Stream.STEP, first_sample=0)
        return x

    return Work(run, finite(x.shape, 0.5, 2))


def _chain(fd: Any, case: Case, be: Any) -> Work:
    net, sampler = network(fd, case), fd.samplers.ddpm(schedule(fd, case))
    return Work(
        lambda: fd.sample(net, sampler, n=case.n, seed=0, backend=be),
        finite((case.n, *case.shape), 0.01, 1e4),
    )


def _training(fd: Any, case: Case, be: Any) -> Work:
    X = curves(fd, case)
    model = fd.Diffusion(network(fd, case), schedule(fd, case), backend=be, seed=0)
    # The moving average is off: peers do without it.
    model.fit(X, steps=1, batch=case.n, ema=None, progress=False)

    def run() -> Any:
        return model.fit(X, steps=case.units, batch=case.n, progress=False)

    def check(result: Any) -> None:
        assert result.step >= 1 + case.units
        assert np.isfinite(result.net.flat).all()

    return Work(run, check, case.units)


def checkpoint(fd: Any, case: Case, be: Any, path: Path) -> Any:
    """Save a briefly trained model without its moments, and return it."""
    model = fd.Diffusion(network(fd, case), schedule(fd, case), backend=be, seed=0)
    model.fit(curves(fd, case), steps=2, batch=16, ema=None, progress=False)
    model.save(path, training=False)
    return model


def cold_process(script: str, path: Path, case: Case, threads: int) -> str:
    """Run a script on a checkpoint in a new interpreter, and return what it printed."""
    command = [sys.executable, str(HERE / script), str(path), str(case.n), str(threads)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cold(fd: Any, case: Case, be: Any) -> Work:
    folder = tempfile.mkdtemp(prefix="fastdiff-")
    path = Path(folder) / "model.safetensors"

    def run() -> str:
        return cold_process("cold_ours.py", path, case, be.threads)

    weakref.finalize(run, shutil.rmtree, folder)
    checkpoint(fd, case, be, path)

    def check(printed: str) -> None:
        assert printed.split("\n")[0] == f"({case.n}, {case.shape[0]})"

    return Work(run, check)


def shape_of_noise(fd: Any, case: Case) -> Any:
    """Return the reshaping of white noise to the scatter of smooth curves, of full rank."""
    d = case.shape[0]
    curves = fd.data.harmonic_curves(4 * d, points=d)
    target = fd.covariance.scatter(curves, normalise=True) + 1e-2 * np.eye(d)
    return fd.covariance.reshaping(np.eye(d), target)


def white_rows(case: Case) -> Any:
    """Return the curves whose similarity is computed, or the rows that are reshaped."""
    return np.random.default_rng(0).standard_normal((case.n, *case.shape), np.float32)


def _similarity(fd: Any, case: Case, be: Any) -> Work:
    v = white_rows(case)

    def check(C: Any) -> None:
        assert C.shape == (*v.shape, *case.shape)
        for k in (0, len(v) - 1):
            exact = np.exp(-((v[k, :, None] - v[k].astype(np.float64)) ** 2))
            np.testing.assert_allclose(C[k], exact, rtol=0, atol=1e-6)

    return Work(lambda: fd.covariance.similarity(v, backend=be), check)


def _reshape(fd: Any, case: Case, be: Any) -> Work:
    x, reshaping, standardise = white_rows(case), shape_of_noise(fd, case), case.kind == "standardise"

    def check(y: Any) -> None:
        assert y.shape == x.shape
        exact = x[:100] @ reshaping.matrix
        if standardise:
            exact = (exact - exact.mean(axis=1, keepdims=True)) / exact.std(axis=1, keepdims=True)
        np.testing.assert_allclose(y[:100], exact, rtol=0, atol=1e-5 * np.abs(exact).max())

    return Work(lambda: reshaping.apply(x, standardise=standardise, backend=be), check)


def _shaped(fd: Any, case: Case, be: Any) -> Work:
    from fastdiff.backends import RowMap

    plan, shape = RowMap(left=shape_of_noise(fd, case).matrix), (case.n, *case.shape)
    at = {"seed": 0, "stream": fd.noise.Stream.FORWARD, "step": 0, "first_sample": 0}

    def run() -> Any:
        out = be.empty(shape)
        be.mapped_normal(out, plan, **at)
        return out

    def check(y: Any) -> None:
        assert y.shape == shape
        exact = fd.normal((min(100, case.n), *case.shape), seed=0).astype(np.float64) @ plan.left
        np.testing.assert_allclose(y[:100], exact, rtol=0, atol=1e-5 * np.abs(exact).max())

    return Work(run, check)


def posterior_of(fd: Any, case: Case) -> tuple[Any, Any, float, float]:
    """Return states that are noised rows of data, the data, and the signal and noise of their timestep."""
    s = schedule(fd, case)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((DATA_ROWS, *case.shape), np.float32)
    signal, noise = s.signal[DATA_STEP], s.noise[DATA_STEP]
    x = signal * data[rng.integers(0, DATA_ROWS, case.n)] + noise * white_rows(case)
    return x.astype(np.float32), data, float(signal), float(noise)


def _posterior(fd: Any, case: Case, be: Any) -> Work:
    x, data, signal, noise = posterior_of(fd, case)
    denoiser = fd.denoisers.Empirical(data, schedule(fd, case), prediction="x0")

    def check(x0: Any) -> None:
        assert x0.shape == x.shape
        gaps = np.square((x[:10, None] - signal * data) / noise, dtype=np.float64).sum(axis=2)
        weights = np.exp(0.5 * (gaps.min(axis=1, keepdims=True) - gaps))
        exact = weights @ data / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(x0[:10], exact, rtol=0, atol=1e-4)

    return Work(lambda: denoiser.predict(x, DATA_STEP, backend=be), check)


def pictures(case: Case, n: int = PICTURES) -> Any:
    """Return pictures in [-1, 1]."""
    return np.tanh(np.random.default_rng(0).standard_normal((n, *case.shape), np.float32))


def ddim(fd: Any, case: Case, steps: int = DDIM_STEPS) -> Any:
    """Return the sampler of the U-Net, whose x0 is clipped to the range of pictures."""
    return fd.samplers.ddim(schedule(fd, case), steps, clip=1.0)


def _unet(fd: Any, case: Case, be: Any) -> Work:
    net, x, t = network(fd, case), pictures(case, case.n), np.arange(case.n) % IMAGE_T
    return Work(lambda: net.predict(x, t, backend=be), finite(x.shape, 1e-3, 1e3))


def _unet_training(fd: Any, case: Case, be: Any) -> Work:
    X = pictures(case)
    model = fd.Diffusion(network(fd, case), schedule(fd, case), backend=be, seed=0)
    how = {"batch": case.n, "data_range": (-1.0, 1.0), "progress": False}
    model.fit(X, steps=1, ema=None, **how)

    def check(result: Any) -> None:
        assert result.step >= 1 + case.units
        assert np.isfinite(result.net.flat).all()

    return Work(lambda: model.fit(X, steps=case.units, **how), check, case.units)


def _unet_ddim(fd: Any, case: Case, be: Any) -> Work:
    net, sampler = network(fd, case), ddim(fd, case)
    return Work(lambda: fd.sample(net, sampler, n=case.n, seed=0, backend=be), finite((case.n, *case.shape), 0.01, 1.1))


KINDS: dict[str, Callable[[Any, Case, Any], Work]] = {
    "normals": _normals,
    "forward": _forward,
    "step": _step,
    "chain": _chain,
    "training": _training,
    "cold": _cold,
    "similarity": _similarity,
    "reshape": _reshape,
    "standardise": _reshape,
    "shaped": _shaped,
    "posterior": _posterior,
    "unet": _unet,
    "unet-training": _unet_training,
    "unet-ddim": _unet_ddim,
}

CURVE = (POINTS,)

# fmt: off
CASES: tuple[Case, ...] = (
    Case("normals-48x1000000", "48 M normals, 48 rows", "normals", 48, (1_000_000,)),
    Case("normals-960000x50", "48 M normals, 960,000 rows", "normals", 960_000, (50,)),
    Case("forward-1000000x50", "forward noising, 1,000,000 x 50", "forward", 1_000_000, (50,)),
    Case("step-64x256x256x3", "DDPM step, 64 x 256 x 256 x 3", "step", 64, (256, 256, 3)),
    Case("chain-tutorial-1", "100-step chain, tutorial MLP, n = 1", "chain", 1, CURVE, "tutorial"),
    Case("chain-tutorial-1000", "100-step chain, tutorial MLP, n = 1000", "chain", 1000, CURVE, "tutorial"),
    Case("chain-tutorial-100000", "100-step chain, tutorial MLP, n = 100,000", "chain", 100_000, CURVE, "tutorial"),
    Case("train-tutorial-10", "training step, tutorial MLP, batch 10", "training", 10, CURVE, "tutorial", 1000),
    Case("train-tutorial-1000", "training step, tutorial MLP, batch 1000", "training", 1000, CURVE, "tutorial", 200),
    Case("train-tutorial-8192", "training step, tutorial MLP, batch 8192", "training", 8192, CURVE, "tutorial", 20),
    Case("cold-start", "new process, load, 16 curves", "cold", 16, CURVE, "tutorial"),
    Case("chain-default-1", "100-step chain, default MLP, n = 1", "chain", 1, CURVE, "default"),
    Case("chain-default-1000", "100-step chain, default MLP, n = 1000", "chain", 1000, CURVE, "default"),
    Case("chain-default-100000", "100-step chain, default MLP, n = 100,000", "chain", 100_000, CURVE, "default"),
    Case("train-default-10", "training step, default MLP, batch 10", "training", 10, CURVE, "default", 1000),
    Case("train-default-1000", "training step, default MLP, batch 1000", "training", 1000, CURVE, "default", 200),
    Case("train-default-8192", "training step, default MLP, batch 8192", "training", 8192, CURVE, "default", 20),
    Case("similarity-4096x128", "similarity of 4,096 curves of 128 points", "similarity", 4096, (128,)),
    Case("reshape-1000000x128", "reshaping, 1,000,000 x 128", "reshape", 1_000_000, (128,)),
    Case("standardise-1000000x128", "reshaping, standardising, 1,000,000 x 128", "standardise", 1_000_000, (128,)),
    Case("shaped-1000000x128", "shaped noise, 1,000,000 x 128", "shaped", 1_000_000, (128,)),
    Case("posterior-1000x10000x64", "denoiser of 10,000 x 64 data, 1,000 states", "posterior", 1000, (64,)),
    Case("unet-train-16", "training step, U-Net, 32 x 32 x 3, batch 16", "unet-training", 16, (32, 32, 3), "unet", 4),
    Case("unet-forward-16", "forward pass, U-Net, 32 x 32 x 3, batch 16", "unet", 16, (32, 32, 3), "unet"),
    Case("unet-ddim-16", "20 DDIM steps, U-Net, 32 x 32 x 3, n = 16", "unet-ddim", 16, (32, 32, 3), "unet"),
    Case("unet-forward-1", "forward pass, U-Net, 32 x 32 x 3, one picture", "unet", 1, (32, 32, 3), "unet"),
)
# fmt: on
BY_NAME = {case.name: case for case in CASES}
