"""The workloads that are timed, what they are held against, and how: ``fastdiff bench``.

One table serves this command, ``make bench``, asv, pytest-benchmark and the comparison with peers; what only a source
tree can run is added in ``benchmarks/cases.py``. The table is append-only: a case keeps its name, its sizes and what
it does, so that old results stay comparable. Arrays are made in `Case.setup`, never in the part that is timed, except
the results that a public call returns: a user pays for those too. On a GPU a run ends when its work is done.

A roof is the speed of the machine in the same run: of memory, by the triad a = b + 3 c of McCalpin's STREAM (1995),
and of float32 arithmetic, by matrix products in cache; on a GPU by a copy and by one large product. A case's share of
its roof is the time that the slower of its bytes and its operations must take, through the time that it took.
"""

from __future__ import annotations

import inspect
import itertools
import math
import platform
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
HEAD, GROUPS = 32, 8  # width of an attention head, groups of a norm, where they stand alone

TURN = 0.5  # seconds of runs that make one time
EXAMPLE_UNITS = 2  # training steps of the example that is compared with the reference
# Of a roof: values in each array of the triad, more than a cache holds; side of a GPU's product.
TRIAD, GPU_COPY, GPU_SIDE = 1 << 25, 1 << 28, 8192


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


class Kind(NamedTuple):
    """What the cases of one kind have in common.

    Attributes
    ----------
    setup : callable
        (fastdiff, case, backend) -> Work.
    rate : {"GB/s", "GF/s", "samples/s", ""}
        What its speed is told in; "" where only the time means something.
    bytes : callable
        Bytes of one unit that have to cross memory at least once: arguments, results, parameters and moments.
    operations : callable
        Multiplications and additions of one unit: matrix products, and the formulas of noising, of a step and of the
        optimiser. Draws, activations, exponentials and the time table are not counted.
    example : int
        Values, about, in the samples of the example that is compared with the reference; 0: its check is all.
    tolerance : float
        How far the example may be from the reference, in the Euclidean norm, through the reference's own.
    draws : int
        Normals drawn for each value.
    needs : {"", "layers", "cpu"}
        What it runs on: every backend, those for image networks, or the CPU backend.
    """

    setup: Callable[[Any, Case, Any], Work]
    rate: Literal["GB/s", "GF/s", "samples/s", ""]
    bytes: Callable[[Case], int]
    operations: Callable[[Case], int]
    example: int
    tolerance: float = 1e-6
    draws: int = 0
    needs: Literal["", "layers", "cpu"] = ""


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

    @property
    def example(self) -> Case:
        """The small case that backends and the reference both compute."""
        most = max(1, KINDS[self.kind].example // math.prod(self.shape))
        return replace(self, n=min(self.n, most), units=min(self.units, EXAMPLE_UNITS))

    def runs_on(self, backend: Any) -> bool:
        """Whether a backend has what the case needs."""
        needs = KINDS[self.kind].needs
        if needs == "layers":
            from fastdiff.backends.layers import LayerBackend

            return isinstance(backend, LayerBackend)
        return not needs or backend.name == needs

    def setup(self, backend: Any = "cpu") -> Work:
        """Make the arrays and objects, and return what is to be timed. Compiles nothing: run it once to be warm."""
        import fastdiff as fd

        be = fd.get_backend(backend)
        work = KINDS[self.kind].setup(fd, self, be)
        if be.name != "cuda":
            return work
        last = be.asarray(np.zeros(1))

        def run() -> Any:
            result = work.run()
            be.to_numpy(last)  # waits for all work before it
            return result

        return work._replace(run=run, check=lambda result: work.check(on_host(be, result)))

    def parity(self, backend: Any) -> float:
        """Compute the example on a backend and on the reference; return how far they differ, through the reference.

        Raises
        ------
        AssertionError
            They differ by more than the kind's tolerance.
        """
        import fastdiff as fd

        if not KINDS[self.kind].example:
            return 0.0
        be, results = fd.get_backend(backend), []
        for side in (be, fd.get_backend("numpy")):
            work = self.example.setup(side)
            result = work.run()
            work.check(result)
            results.append(numbers(on_host(side, result)))
        ours, reference = results
        error = float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
        if not error <= KINDS[self.kind].tolerance:  # NaN fails
            allowed = f"allowed are {KINDS[self.kind].tolerance:g}"
            raise AssertionError(f"{self.name}: {be.name} and numpy differ by {error:.3g}, {allowed}")
        return error

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
        return KINDS[self.kind].draws * self.values

    @property
    def bytes(self) -> int:
        """Bytes of one unit that have to cross memory; see `Kind`."""
        return KINDS[self.kind].bytes(self)

    @property
    def operations(self) -> int:
        """Multiplications and additions of one unit; see `Kind`."""
        return KINDS[self.kind].operations(self)

    def rate(self, seconds: float) -> tuple[float, str] | None:
        """Speed and its unit, where a unit of the work takes so long; None where only the time means something."""
        unit = KINDS[self.kind].rate
        amount = {"GB/s": self.bytes / 1e9, "GF/s": self.operations / 1e9, "samples/s": self.n, "": 0}[unit]
        return (amount / seconds, unit) if unit else None


def on_host(be: Any, result: Any) -> Any:
    """Return what a run made, with NumPy arrays in place of a backend's own."""
    if isinstance(result, tuple):
        return tuple(on_host(be, part) for part in result)
    return be.to_numpy(result) if be.owns(result) else result


def numbers(result: Any) -> Any:
    """Return what a run made as one float64 vector; of a model, its parameters."""
    if isinstance(result, tuple):
        return np.concatenate([numbers(part) for part in result])
    net = getattr(result, "net", None)
    return np.asarray(result if net is None else net.flat, np.float64).reshape(-1)


# -- the set-ups: (fastdiff, case, backend) -> Work ------------------------------------------------------------


def schedule(fd: Any, case: Case) -> Any:
    """Return the schedule that a case runs on."""
    if case.kind in ("forward", "step") or case.net == "unet":
        return fd.Schedule.linear(IMAGE_T)
    return fd.Schedule.sigmoid(T, beta_start=1e-5, beta_end=0.1)


def untrained(fd: Any, net: Any, noise_levels: Any, be: Any) -> Any:
    """Return a model as every version of the library has it."""
    return fd.Diffusion(net, noise_levels, prediction="noise", backend=be, seed=0)


def training_only(fd: Any) -> dict[str, Any]:
    """Return the options of `fit` with which it does nothing but train, in any version of the library."""
    if "judge" in inspect.signature(fd.Diffusion.fit).parameters:
        return {"progress": False, "validation": 0, "judge": False}
    return {"progress": False}


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
    given = be.asarray(x0), be.asarray(t, np.int64)

    def check(result: Any) -> None:
        x, eps = result
        finite(x0.shape, 0.8, 1.2)(x)
        k = slice(0, 100)
        exact = s.signal[t[k], None] * x0[k] + s.noise[t[k], None] * eps[k]
        np.testing.assert_allclose(x[k], exact, rtol=0, atol=1e-5)

    return Work(lambda: fd.forward_noise(*given, s, seed=0, backend=be), check)


def _step(fd: Any, case: Case, be: Any) -> Work:
    host_x, host_out, row, clip = image_step(fd, case)
    x, out = be.asarray(host_x), be.asarray(host_out)
    draw, seeds = fd.noise.Draw(0, fd.noise.Stream.STEP, row.t), itertools.count()  # the same noise would add up

    def run() -> Any:
        be.sampler_step(x, out, (), row, clip, draw._replace(seed=next(seeds)))
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
    model = untrained(fd, network(fd, case), schedule(fd, case), be)
    how = training_only(fd)
    # The moving average is off: peers do without it.
    model.fit(X, steps=1, batch=case.n, ema=None, **how)

    def run() -> Any:
        return model.fit(X, steps=case.units, batch=case.n, **how)

    def check(result: Any) -> None:
        assert result.step >= 1 + case.units
        assert np.isfinite(result.net.flat).all()

    return Work(run, check, case.units)


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
    given = be.asarray(v)

    def check(C: Any) -> None:
        assert C.shape == (*v.shape, *case.shape)
        for k in (0, len(v) - 1):
            exact = np.exp(-((v[k, :, None] - v[k].astype(np.float64)) ** 2))
            np.testing.assert_allclose(C[k], exact, rtol=0, atol=1e-6)

    return Work(lambda: fd.covariance.similarity(given, backend=be), check)


def _reshape(fd: Any, case: Case, be: Any) -> Work:
    x, reshaping, standardise = white_rows(case), shape_of_noise(fd, case), case.kind == "standardise"
    given = be.asarray(x)

    def check(y: Any) -> None:
        assert y.shape == x.shape
        exact = x[:100] @ reshaping.matrix
        if standardise:
            exact = (exact - exact.mean(axis=1, keepdims=True)) / exact.std(axis=1, keepdims=True)
        np.testing.assert_allclose(y[:100], exact, rtol=0, atol=1e-5 * np.abs(exact).max())

    return Work(lambda: reshaping.apply(given, standardise=standardise, backend=be), check)


def _shaped(fd: Any, case: Case, be: Any) -> Work:
    from fastdiff.backends import RowMap

    plan, shape = RowMap(left=shape_of_noise(fd, case).matrix), (case.n, *case.shape)
    draw = fd.noise.Draw(0, fd.noise.Stream.FORWARD)

    def run() -> Any:
        out = be.empty(shape)
        be.mapped_normal(out, plan, draw)
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
    given = be.asarray(x)

    def check(x0: Any) -> None:
        assert x0.shape == x.shape
        gaps = np.square((x[:10, None] - signal * data) / noise, dtype=np.float64).sum(axis=2)
        weights = np.exp(0.5 * (gaps.min(axis=1, keepdims=True) - gaps))
        exact = weights @ data / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(x0[:10], exact, rtol=0, atol=1e-4)

    return Work(lambda: denoiser.predict(given, DATA_STEP, backend=be), check)


def pictures(case: Case, n: int = PICTURES) -> Any:
    """Return pictures in [-1, 1]."""
    return np.tanh(np.random.default_rng(0).standard_normal((n, *case.shape), np.float32))


def ddim(fd: Any, case: Case, steps: int = DDIM_STEPS) -> Any:
    """Return the sampler of the U-Net, whose x0 is clipped to the range of pictures."""
    return fd.samplers.ddim(schedule(fd, case), steps, clip=1.0)


def _unet(fd: Any, case: Case, be: Any) -> Work:
    net, x, t = network(fd, case), be.asarray(pictures(case, case.n)), be.asarray(np.arange(case.n) % IMAGE_T, np.int64)
    return Work(lambda: net.predict(x, t, backend=be), finite(x.shape, 1e-3, 1e3))


def _unet_training(fd: Any, case: Case, be: Any) -> Work:
    X = pictures(case)
    model = untrained(fd, network(fd, case), schedule(fd, case), be)
    how = {"batch": case.n, "data_range": (-1.0, 1.0), **training_only(fd)}
    model.fit(X, steps=1, ema=None, **how)

    def check(result: Any) -> None:
        assert result.step >= 1 + case.units
        assert np.isfinite(result.net.flat).all()

    return Work(lambda: model.fit(X, steps=case.units, **how), check, case.units)


def _unet_ddim(fd: Any, case: Case, be: Any) -> Work:
    net, sampler = network(fd, case), ddim(fd, case)
    return Work(lambda: fd.sample(net, sampler, n=case.n, seed=0, backend=be), finite((case.n, *case.shape), 0.01, 1.1))


def _mlp(fd: Any, case: Case, be: Any) -> Work:
    net, x, t = network(fd, case), be.asarray(white_rows(case)), be.asarray(np.arange(case.n) % T, np.int64)
    return Work(lambda: net.predict(x, t, backend=be), finite(x.shape, 1e-3, 1e3))


def _images(be: Any, case: Case) -> tuple[Any, Any, Any]:
    """Images, weights of a 3 x 3 convolution that keeps their size, and room for the result."""
    c = case.shape[-1]
    w = np.random.default_rng(1).standard_normal((3, 3, c, c), np.float32) / math.sqrt(9 * c)
    return be.asarray(white_rows(case)), be.asarray(w), be.empty((case.n, *case.shape))


def _conv(fd: Any, case: Case, be: Any) -> Work:
    from fastdiff.backends.layers import Conv

    del fd
    (x, w, out), b = _images(be, case), be.asarray(np.zeros(case.shape[-1], np.float32))

    def run() -> Any:
        be.conv(Conv((3, 3), pad=(1, 1, 1, 1)), x, w, b, out)
        return out

    return Work(run, finite(out.shape, 0.8, 1.2))


def _conv_backward(fd: Any, case: Case, be: Any) -> Work:
    from fastdiff.backends.layers import Conv

    del fd
    x, w, dx = _images(be, case)
    dy, dw, db = be.asarray(white_rows(case)[::-1]), be.empty(w.shape), be.empty((case.shape[-1],))

    def run() -> Any:
        be.conv_backward(Conv((3, 3), pad=(1, 1, 1, 1)), dy, x, w, dx, dw, db)
        return dx, dw, db

    return Work(run, lambda result: finite(dx.shape, 0.8, 1.2)(result[0]))


def _norm(fd: Any, case: Case, be: Any) -> Work:
    del fd
    x, out, stats = be.asarray(white_rows(case)), be.empty((case.n, *case.shape)), be.empty((case.n, GROUPS, 2))
    gamma, beta = (be.asarray(np.full(case.shape[-1], value, np.float32)) for value in (1, 0))

    def run() -> Any:
        be.norm(x, gamma, beta, out, stats, groups=GROUPS, eps=1e-5, silu=True)
        return out

    return Work(run, finite(out.shape, 0.5, 0.8))


def _layer_norm_arrays(case: Case, be: Any) -> tuple[Any, ...]:
    """x, gamma, beta, out and statistics."""
    gamma, beta = (be.asarray(np.full(case.shape[-1], value, np.float32)) for value in (1, 0))
    out, stats = be.empty((case.n, *case.shape)), be.empty((case.n, *case.shape[:-1], 2))
    return be.asarray(white_rows(case)), gamma, beta, out, stats


def _layer_norm(fd: Any, case: Case, be: Any) -> Work:
    del fd
    arrays = _layer_norm_arrays(case, be)
    out = arrays[3]

    def run() -> Any:
        be.layer_norm(*arrays, eps=1e-5)
        return out

    return Work(run, finite(out.shape, 0.8, 1.2))


def _layer_norm_backward(fd: Any, case: Case, be: Any) -> Work:
    del fd
    x, gamma, beta, dx, stats = _layer_norm_arrays(case, be)
    dy, dgamma, dbeta = be.asarray(white_rows(case)[..., ::-1]), be.empty(gamma.shape), be.empty(gamma.shape)
    be.layer_norm(x, gamma, beta, dx, stats, eps=1e-5)

    def run() -> Any:
        be.layer_norm_backward(dy, x, gamma, stats, dx, dgamma, dbeta)
        return dx, dgamma, dbeta

    return Work(run, lambda result: finite(dx.shape, 0.8, 1.2)(result[0]))


def _gelu(fd: Any, case: Case, be: Any) -> Work:
    del fd
    x, out = be.asarray(white_rows(case)), be.empty((case.n, *case.shape))

    def run() -> Any:
        be.gelu(x, out)
        return out

    return Work(run, finite(out.shape, 0.5, 0.8))


def _attention(fd: Any, case: Case, be: Any) -> Work:
    del fd
    length, channels = case.shape
    heads = channels // HEAD
    qkv = be.asarray(np.random.default_rng(0).standard_normal((case.n, length, 3 * channels), np.float32))
    out, log_sums = be.empty((case.n, *case.shape)), be.empty((case.n, heads, length))

    def run() -> Any:
        be.attention(qkv, out, log_sums, heads=heads)
        return out

    return Work(run, finite(out.shape, 0.05, 1))


def _adamw(fd: Any, case: Case, be: Any) -> Work:
    from fastdiff.backends import AdamW, TrainState

    del fd
    rng, size = np.random.default_rng(0), case.values
    params, grads, m = (be.asarray(rng.standard_normal(size, np.float32)) for _ in range(3))
    v, average = be.asarray(np.ones(size, np.float32)), be.asarray(np.zeros(size, np.float32))
    options = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.01, 0.5, 0.5, 1.0, 0.999)

    def run() -> Any:
        be.adamw(TrainState(params, grads, m, v, average), options)
        return params

    return Work(run, lambda p: finite((1, size), 0.5, 2)(p[None]))


def _file(fd: Any, case: Case, be: Any) -> tuple[Any, Path]:
    """Return a model of one training step, with its moments, and where to save it."""
    folder = tempfile.mkdtemp(prefix="fastdiff-")
    model = untrained(fd, network(fd, case), schedule(fd, case), be)
    weakref.finalize(model, shutil.rmtree, folder)
    model.fit(pictures(case, 2), steps=1, batch=1, data_range=(-1.0, 1.0), progress=False)
    return model, Path(folder) / "model.safetensors"


def _save(fd: Any, case: Case, be: Any) -> Work:
    model, path = _file(fd, case, be)

    def run() -> Any:
        model.save(path)
        return model

    return Work(run, lambda saved: np.testing.assert_array_equal(fd.load(path).net.flat, saved.net.flat))


def _load(fd: Any, case: Case, be: Any) -> Work:
    model, path = _file(fd, case, be)
    model.save(path)
    return Work(
        lambda: fd.load(path, backend=be), lambda loaded: np.testing.assert_array_equal(loaded.net.flat, model.net.flat)
    )


def _forward_operations(case: Case) -> int:
    """Of a network for one sample."""
    return UNET_OPERATIONS if case.net == "unet" else 2 * sum(case.products)


def _training_operations(case: Case) -> int:
    first = 0 if case.net == "unet" else 2 * case.products[0]  # the input needs no gradient
    return case.n * (3 * _forward_operations(case) - first) + 3 * case.values


def _chain_operations(case: Case) -> int:
    steps = DDIM_STEPS if case.net == "unet" else T
    return steps * (case.n * _forward_operations(case) + 8 * case.values)


def _through_network(case: Case) -> int:
    return 8 * case.values + 4 * case.parameters


def _through_sampling(case: Case) -> int:
    return 4 * case.values + 4 * case.parameters


def _through_training(case: Case) -> int:
    return 4 * case.values + 24 * case.parameters  # parameters and two moments, in and out


def _through_map(case: Case) -> int:
    return 8 * case.values + 4 * case.shape[0] ** 2


def _file_size(case: Case) -> int:
    return 16 * case.parameters  # parameters, their average and two moments


# fmt: off
KINDS: dict[str, Kind] = {
    "normals": Kind(_normals, "GB/s", lambda c: 4 * c.values, lambda c: 0, 1_000_000, 0.0, draws=1),
    "forward": Kind(
        _forward, "GB/s",
        lambda c: 12 * c.values + 8 * c.n,  # x0 in, x_t and the noise out; t
        lambda c: 3 * c.values, 1_000_000, 0.0, draws=1,
    ),
    "step": Kind(
        _step, "GB/s",
        lambda c: 12 * c.values,  # x and the network's output in, x out
        lambda c: 8 * c.values, 200_000, 0.0, draws=1,
    ),
    "chain": Kind(_chain, "samples/s", _through_sampling, _chain_operations, 50_000, 1e-4, draws=T),
    "training": Kind(_training, "samples/s", _through_training, _training_operations, 50_000, 1e-5, draws=1),
    "similarity": Kind(
        _similarity, "GB/s",
        lambda c: 4 * c.values * (1 + c.shape[0]),
        lambda c: 3 * c.values * c.shape[0],  # and as many exponentials
        8192,
    ),
    "reshape": Kind(_reshape, "GF/s", _through_map, lambda c: 2 * c.values * c.shape[0], 1_000_000),
    "standardise": Kind(
        _reshape, "GF/s", _through_map, lambda c: 2 * c.values * c.shape[0] + 5 * c.values, 1_000_000, 1e-5,
    ),
    "shaped": Kind(
        _shaped, "GF/s",
        lambda c: 4 * c.values + 4 * c.shape[0] ** 2, lambda c: 2 * c.values * c.shape[0], 1_000_000, draws=1,
    ),
    "posterior": Kind(
        _posterior, "GF/s",
        lambda c: 8 * c.values + 4 * DATA_ROWS * c.shape[0],
        lambda c: 6 * c.values * DATA_ROWS,  # and as many exponentials as states and rows
        6400, 1e-4,
    ),
    "unet": Kind(
        _unet, "GF/s", _through_network, lambda c: c.n * UNET_OPERATIONS, 6000, 5e-5, needs="layers",
    ),
    "unet-training": Kind(
        _unet_training, "GF/s", _through_training, _training_operations, 6000, 5e-5, draws=1, needs="layers",
    ),
    "unet-ddim": Kind(  # an untrained network almost doubles a difference at each step
        _unet_ddim, "GF/s", _through_sampling, _chain_operations, 3000, 0.1, draws=1, needs="layers",
    ),
    "mlp": Kind(_mlp, "GF/s", _through_network, lambda c: c.n * _forward_operations(c), 50_000),
    "conv": Kind(
        _conv, "GF/s",
        lambda c: 8 * c.values + 36 * c.shape[-1] ** 2,
        lambda c: 18 * c.values * c.shape[-1],  # of the direct sum; an algorithm may need fewer
        70_000, 5e-6, needs="layers",
    ),
    "conv-backward": Kind(
        _conv_backward, "GF/s",
        lambda c: 12 * c.values + 72 * c.shape[-1] ** 2, lambda c: 36 * c.values * c.shape[-1],
        70_000, 5e-6, needs="layers",
    ),
    "norm": Kind(_norm, "GB/s", lambda c: 8 * c.values, lambda c: 9 * c.values, 70_000, needs="layers"),
    "layer-norm": Kind(_layer_norm, "GB/s", lambda c: 8 * c.values, lambda c: 8 * c.values, 70_000, needs="layers"),
    "layer-norm-backward": Kind(
        _layer_norm_backward, "GB/s", lambda c: 12 * c.values, lambda c: 13 * c.values, 70_000, 5e-6, needs="layers",
    ),
    "gelu": Kind(_gelu, "GB/s", lambda c: 8 * c.values, lambda c: 5 * c.values, 70_000, needs="layers"),
    "attention": Kind(
        _attention, "GF/s", lambda c: 16 * c.values, lambda c: 4 * c.values * c.shape[0], 70_000, needs="layers",
    ),
    "adamw": Kind(
        _adamw, "GB/s",
        lambda c: 36 * c.values,  # parameters, gradient, two moments and the average in, all but the gradient out
        lambda c: 20 * c.values, 100_000,
    ),
    "save": Kind(_save, "GB/s", _file_size, lambda c: 0, 1, 1e-4, needs="layers"),
    "load": Kind(_load, "GB/s", _file_size, lambda c: 0, 1, 1e-4, needs="layers"),
}
# fmt: on

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
    Case("mlp-tutorial-100000", "forward pass, tutorial MLP, n = 100,000", "mlp", 100_000, CURVE, "tutorial"),
    Case("mlp-default-100000", "forward pass, default MLP, n = 100,000", "mlp", 100_000, CURVE, "default"),
    Case("conv-4x64x64x64", "convolution 3 x 3, 4 x 64 x 64 x 64", "conv", 4, (64, 64, 64)),
    Case("conv-16x32x32x64", "convolution 3 x 3, 16 x 32 x 32 x 64", "conv", 16, (32, 32, 64)),
    Case("conv-16x16x16x128", "convolution 3 x 3, 16 x 16 x 16 x 128", "conv", 16, (16, 16, 128)),
    Case("conv-16x8x8x256", "convolution 3 x 3, 16 x 8 x 8 x 256", "conv", 16, (8, 8, 256)),
    Case("conv-back-16x32x32x64", "its gradients, 16 x 32 x 32 x 64", "conv-backward", 16, (32, 32, 64)),
    Case("conv-back-16x16x16x128", "its gradients, 16 x 16 x 16 x 128", "conv-backward", 16, (16, 16, 128)),
    Case("norm-64x32x32x64", "GroupNorm and SiLU, 64 x 32 x 32 x 64", "norm", 64, (32, 32, 64)),
    Case("attention-16x64x128", "attention, 16 x 64 x 128", "attention", 16, (64, 128)),
    Case("attention-16x256x128", "attention, 16 x 256 x 128", "attention", 16, (256, 128)),
    Case("adamw-4000000", "AdamW, clipping, average; 4 M parameters", "adamw", 1, (4_000_000,)),
    Case("save-unet", "checkpoint of the U-Net saved, with moments", "save", 1, (32, 32, 3), "unet"),
    Case("load-unet", "checkpoint of the U-Net loaded", "load", 1, (32, 32, 3), "unet"),
    Case("layer-norm-64x1024x128", "LayerNorm, 64 x 1024 x 128", "layer-norm", 64, (1, 1024, 128)),
    Case("layer-norm-back-64x1024x128", "its gradients, 64 x 1024 x 128", "layer-norm-backward", 64, (1, 1024, 128)),
    Case("gelu-64x1024x256", "GELU, 64 x 1024 x 256", "gelu", 64, (1, 1024, 256)),
)
# fmt: on
BY_NAME = {case.name: case for case in CASES}
# What `fastdiff bench` runs: every sort of work, under a gigabyte, in about a minute.
QUICK = (
    "normals-48x1000000", "forward-1000000x50", "step-64x256x256x3", "similarity-4096x128", "shaped-1000000x128",
    "posterior-1000x10000x64", "mlp-default-100000", "chain-tutorial-1", "chain-default-1000", "train-default-10",
    "train-default-1000", "conv-16x32x32x64", "conv-back-16x32x32x64", "norm-64x32x32x64", "attention-16x256x128",
    "layer-norm-64x1024x128", "layer-norm-back-64x1024x128", "gelu-64x1024x256",
    "unet-forward-16", "unet-train-16", "unet-ddim-16", "adamw-4000000", "save-unet", "load-unet",
)  # fmt: skip


# -- the roofs, and the time -----------------------------------------------------------------------------------


def measure(run: Callable[[], Any], seconds: float = TURN) -> float:
    """Return the median time of a call, warm from an earlier one: of as many as take so many seconds."""
    times: list[float] = []
    total = 0.0
    while not times or total < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
        total += times[-1]
    return statistics.median(times)


class Roofs(NamedTuple):
    """What a machine can do at most: bytes and float32 operations a second."""

    memory: float
    arithmetic: float

    def share(self, case: Case, seconds: float) -> tuple[float, str]:
        """Return the least time that a unit of the work can take, through the time that it took, and what binds it."""
        least = {"memory": case.bytes / self.memory, "arithmetic": case.operations / self.arithmetic}
        binding = max(least, key=lambda roof: least[roof])
        return least[binding] / seconds, binding


def roofs(be: Any, scale: float = 1.0) -> Roofs:
    """Measure the roofs of a backend: of the host with as many threads as it uses, or of its GPU.

    Parameters
    ----------
    be : Backend
        Of the reference, the roofs are those of the CPU.
    scale : float, optional
        Below 1 sooner, and wrong: does it work?
    """
    if be.name == "cuda":
        return _device_roofs(be, scale)
    from fastdiff.backends import get_backend
    from fastdiff.kernels.cpu import roof

    workers = get_backend("cpu" if be.name == "numpy" else be)._workers  # type: ignore[attr-defined]
    size = max(1000, round(TRIAD * scale))
    a, b, c = (np.full(size, k, np.float32) for k in range(3))
    rooms = [np.ones(roof.SIZE, np.float32) for _ in range(workers.threads)]
    times, items = max(1, round(200 * scale)), 8 * workers.threads

    def triad() -> None:
        workers.run(lambda _, start, stop: roof.triad_range(start, stop, a, b, c), size, 1 << 18)

    def products() -> None:
        workers.run(lambda worker, start, stop: roof.products(times * (stop - start), rooms[worker]), items, 1)

    with workers.lock:
        triad()
        products()
        assert (a == 7).all()
        assert any((room[: roof.ROWS * roof.COLUMNS] == roof.DEPTH).all() for room in rooms)  # one may do all
        return Roofs(12 * size / measure(triad), items * times * roof.OPERATIONS / measure(products))


def _device_roofs(be: Any, scale: float) -> Roofs:
    side, last = max(8, round(GPU_SIDE * scale)), be.asarray(np.zeros(1))
    source, target = (be.runtime.zeros((max(1000, round(GPU_COPY * scale)),)) for _ in range(2))
    a, b, out = (be.runtime.zeros((side, side)) for _ in range(3))

    def seconds(work: Callable[..., None], *arrays: Any) -> float:
        def run() -> None:
            work(*arrays)
            be.to_numpy(last)  # waits

        run()
        return measure(run)

    memory = seconds(be.runtime.copy, target, source)
    return Roofs(2 * source.nbytes / memory, 2 * side**3 / seconds(be.runtime.matmul, a, b, out))


def timed(case: Case, be: Any, limits: Roofs, seconds: float = TURN) -> dict[str, Any]:
    """Assert parity, time a case on a backend, and return its row of the results.

    The reference computes the example only: at full size it would take minutes. Its row tells that size.

    Raises
    ------
    AssertionError
        The backend and the reference differ, or a result is wrong.
    """
    error = 0.0 if be.name == "numpy" else case.parity(be)
    sized = case.example if be.name == "numpy" else case
    work = sized.setup(be)
    work.check(work.run())  # compiles, and touches the memory
    taken = measure(work.run, seconds) / work.units
    rate, (share, binding) = sized.rate(taken), limits.share(sized, taken)
    return {
        "name": case.name,
        "title": case.title,
        "backend": be.name,
        "n": sized.n,
        "seconds": taken,
        "rate": rate and rate[0],
        "unit": rate and rate[1],
        "share": share if rate else None,
        "roof": binding if rate else None,
        "difference": error,
    }


def cpu_model() -> str:
    """Return the processor's name, and its widest vectors where they are known."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in lines.items()}
        flags = known.get("flags", "").split()
        widest = next((name for name in ("avx512f", "avx2") if name in flags), "")
        if "model name" in known:
            return known["model name"] + (f" ({widest})" if widest else "")
    return platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError


def speed(rate: float) -> str:
    """Return a rate with three digits."""
    digits = 2 - math.floor(math.log10(rate)) if rate > 0 else 0
    return f"{round(rate, digits):,.{max(0, digits)}f}"


def cells(row: dict[str, Any]) -> list[str]:
    """Return what a table shows of a row: the time of a unit, the rate, the share of the roof and which roof it is."""
    if row["rate"] is None:
        return [duration(row["seconds"]), "", ""]
    share = f"{row['share']:.0%}" if row["share"] >= 0.095 else f"{row['share']:.1%}"
    return [duration(row["seconds"]), f"{speed(row['rate'])} {row['unit']}", f"{share} of {row['roof']}"]
