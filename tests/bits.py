"""Records the bits of small trainings and samples as hashes, and says where two records differ.

    python tests/bits.py -o before.json
    python tests/bits.py --against before.json [--only 'cpu.*unet']

For a change that may not change a bit: record, change, compare. Hashes depend on the CPU and on the versions of NumPy,
Numba and the compiler, so both records are made in one environment, and none is committed. Only public names are used,
and every option whose default may change one day is given.

Lanes: numpy; cpu with one and with two threads; cuda, the host run of the kernels (needs g++); bf16, the same with
convolutions rounded to bfloat16; gpu, a real one, only where it is asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

import fastdiff as fd

LANES = ("numpy", "cpu-1", "cpu-2", "cuda", "bf16")
HOST = LANES[:3]
FIT = {"lr": 3e-3, "warmup": 2, "decay_steps": 20, "clip_norm": 1.0, "ema": 0.99, "validation": 0}
QUIET = {"progress": False, "callback": None}
NET = {"groups": 2, "blocks": 1, "T": 6, "seed": 5, "dtype": "float32", "padding": 1, "flip": True}
UNETS: dict[str, dict[str, Any]] = {
    "plain": {"shape": (8, 8, 1), "channels": (4, 8)},
    "odd sizes": {"shape": (7, 5, 3), "channels": (4, 6, 8)},
    "Winograd": {"shape": (9, 8, 3), "channels": (16, 32)},
    "scale and shift": {"shape": (6, 6, 2), "channels": (4, 8), "scale_shift": True, "dropout": 0.2},
    "attention": {"shape": (8, 4, 1), "channels": (8, 8), "attention": (True, True), "head_width": 4},
    "other conventions": {
        "shape": (5, 6, 1), "channels": (6, 8), "attention": (True, False), "up_attention": (False, True), "padding": 0,
        "middle_attention": False, "flip": False, "frequency_shift": 1, "embedding": 10, "eps": 1e-3,
    },
    "height 1": {"shape": (1, 13, 2), "channels": (4, 8)},
    "curves": {"shape": (13,), "channels": (4, 8)},
}  # fmt: skip


class Case(NamedTuple):
    run: Callable[[Any], Iterator[tuple[str, Any]]]
    lanes: tuple[str, ...]
    on_device: bool
    """Whether the host run pretends that its arrays lie on a device; the pretended ones have no FFT, among others."""


CASES: dict[str, Case] = {}


def case(name: str, *options: Any, lanes: tuple[str, ...] = LANES[:4], on_device: bool = False) -> Callable[..., Any]:
    """Register a function of a backend, and of these options, that yields named arrays."""

    def add(function: Callable[..., Iterator[tuple[str, Any]]]) -> Callable[..., Any]:
        assert name not in CASES
        CASES[name] = Case(lambda be: function(be, *options), lanes, on_device)
        return function

    return add


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pictures(shape: tuple[int, ...], n: int = 11) -> Any:
    return np.random.default_rng(1).integers(0, 256, (n, *shape), np.uint8)


# --------------------------------------------------------------------------------------- models


def state(model: Any) -> Iterator[tuple[str, Any]]:
    """All that a model has learned, as a checkpoint has it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(path := Path(folder, "model.safetensors"), training=True)
        tensors = load_file(path)
    for group in ("net", "ema", "adam.m", "adam.v", "noise_shape"):
        yield group, [tensors[name] for name in sorted(tensors) if name.startswith(f"{group}.")]
    for name in ("step", "loss", "validation_step", "validation_loss"):
        yield f"history of {name}", np.array(model.history[name], np.float64)


def resumed(model: Any, be: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save(path := Path(folder, "model.safetensors"), training=True)
        return fd.load(path, backend=be)


def tables(model: Any, *, clip: float | None) -> Iterator[tuple[str, Any]]:
    at = {"clip": clip, "prediction": model.prediction}
    schedule = model.schedule
    yield "ddpm", fd.samplers.ddpm(schedule, None, variance="small", spacing="trailing", **at)
    yield "ddpm large", fd.samplers.ddpm(schedule, 3, variance="large", spacing="linspace", **at)
    yield "ddim", fd.samplers.ddim(schedule, 3, eta=0.0, spacing="trailing", **at)
    yield "ddim eta", fd.samplers.ddim(schedule, 3, eta=0.7, spacing="trailing", **at)
    yield "dpmpp_2m", fd.samplers.dpmpp_2m(schedule, 3, spacing="linspace_open", final="zero", **at)


def samples(model: Any, *, clip: float | None, labels: Any = None, many: int = 9) -> Iterator[tuple[str, Any]]:
    """Samples by every sampler, of both kinds of weights, in batches, from a later row, with their way."""
    at = {"steps": None, "seed": 8, "first_sample": 3, "progress": False, "labels": labels}
    for name, table in tables(model, clip=clip):
        yield f"{name}, several", model.sample(many, sampler=table, ema=False, trajectory=False, batch=2, **at)
    alone = {"ema": True, "batch": None, **at}
    yield f"{name}, one", model.sample(1, sampler=table, trajectory=False, **alone)
    end, way = model.sample(2, sampler=table, trajectory=True, **alone)
    yield from {"end": end, "way": way}.items()


def trained(
    model: Any,
    be: Any,
    X: Any,
    y: Any = None,
    *,
    steps: tuple[int, int] = (4, 3),
    clip: float | None = None,
    labels: Any = None,
    many: int = 9,
    **options: Any,
) -> Iterator[tuple[str, Any]]:
    """State and samples after some steps, and after some more by the model that was saved and loaded."""
    options = {**FIT, **QUIET, **options}
    model.fit(X, y, steps=steps[0], **options)
    yield from (("first " + name, array) for name, array in state(model))
    yield from samples(model, clip=clip, labels=labels, many=many)
    again = resumed(model, be).fit(X, y, steps=steps[1], **options)
    model.fit(X, y, steps=steps[1], **options)
    for words, each in (("resumed ", again), ("went on ", model)):
        yield from ((words + name, array) for name, array in state(each))


# --------------------------------------------------------------------------------------- perceptrons


def mlp(kind: str, points: int, T: int, dtype: str = "float32", hidden: tuple[int, ...] = (24, 17)) -> Any:
    if kind == "tutorial":
        return fd.MLP.tutorial(points, T=T, seed=2, dtype=dtype)
    return fd.MLP(points, hidden=hidden, T=T, seed=2, dtype=dtype)


def curve_model(be: Any, net: Any, prediction: str, noise_shape: Any = None) -> Any:
    schedule = fd.Schedule.cosine(net.T)
    return fd.Diffusion(net, schedule, prediction=prediction, backend=be, seed=4, noise_shape=noise_shape)


for _kind in ("modulated", "tutorial"):
    for _prediction in ("noise", "x0", "v"):

        @case(f"mlp {_kind} {_prediction}", _kind, _prediction, on_device=True)
        def _(be: Any, kind: str, prediction: str) -> Iterator[tuple[str, Any]]:
            model = curve_model(be, mlp(kind, 13, 12), prediction)
            yield from trained(model, be, 3 * values(40, 13), batch=21, many=70)

    @case(f"mlp {_kind} float64", _kind, lanes=("numpy",))
    def _(be: Any, kind: str) -> Iterator[tuple[str, Any]]:
        model = curve_model(be, mlp(kind, 13, 12, "float64"), "v")
        yield from trained(model, be, values(40, 13).astype(np.float64), batch=21)

    @case(f"mlp {_kind} of the usual size", _kind, on_device=True)
    def _(be: Any, kind: str) -> Iterator[tuple[str, Any]]:
        schedule = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
        net = mlp(kind, 50, 100, hidden=(128, 128, 128))
        model = fd.Diffusion(net, schedule, prediction="noise", backend=be, seed=4, noise_shape=None)
        model.fit(fd.data.harmonic_curves(200, points=50, seed=1), steps=3, batch=256, **FIT, **QUIET)
        yield from state(model)
        table = fd.samplers.ddpm(schedule, None, variance="small", clip=None, prediction="noise", spacing="trailing")
        for n in (1, 40):
            yield f"samples of {n}", model.sample(n, sampler=table, seed=1, first_sample=0, ema=True)


@case("mlp without clipping or average", on_device=True)
def _(be: Any) -> Iterator[tuple[str, Any]]:
    bare = {"clip_norm": None, "ema": None, "warmup": 0, "decay_steps": None}
    yield from trained(curve_model(be, mlp("modulated", 13, 12), "noise"), be, values(40, 13), batch=10, **bare)


@case("mlp with validation and callback", on_device=True)
def _(be: Any) -> Iterator[tuple[str, Any]]:
    for words, validation in (("a share", 0.25), ("rows", values(9, 13, seed=7))):
        model, seen = curve_model(be, mlp("modulated", 13, 12), "v"), []
        options = {"validation": validation, "callback": lambda step, loss, seen=seen: seen.append((step, loss))}
        for name, array in trained(model, be, values(40, 13), steps=(101, 2), batch=8, **options):
            yield f"{words}, {name}", array
        yield f"{words}, seen", np.array(seen)


@case("mlp predicts", on_device=True)
def _(be: Any) -> Iterator[tuple[str, Any]]:
    for kind in ("modulated", "tutorial"):
        net = mlp(kind, 13, 12)
        net.flat[...] = values(net.flat.size, seed=3) / 4
        for n in (1, 6, 70):
            x, t = values(n, 13), np.arange(n) % 12
            yield f"{kind}, {n} at one t", net.predict(x, 7, None, backend=be, flat=None)
            yield f"{kind}, {n} at several", net.predict(x, t, None, backend=be, flat=net.flat)


# --------------------------------------------------------------------------------------- shapes of noise


def noise_shapes(d: int) -> Iterator[tuple[str, Any]]:
    random = np.random.default_rng(5)
    lags = np.minimum(np.arange(d), d - np.arange(d))
    factor = random.normal(size=(d, d))
    yield "diagonal", fd.NoiseShape.diagonal(1 + random.uniform(size=d))
    yield "dense", fd.NoiseShape.dense(factor @ factor.T / d, jitter=0.1)
    yield "low rank", fd.NoiseShape.low_rank(factor[:, :3], 0.5)
    yield "stationary", fd.NoiseShape.stationary(np.exp(-lags / 4.0), jitter=0.0)


for _name, _shape in noise_shapes(13):

    @case(f"mlp under {_name} noise", _shape)
    def _(be: Any, shape: Any) -> Iterator[tuple[str, Any]]:
        yield from trained(curve_model(be, mlp("modulated", 13, 12), "noise", shape), be, values(40, 13), batch=12)


def shaped(be: Any, X: Any, shape: Any) -> Iterator[tuple[str, Any]]:
    schedule = fd.Schedule.linear(9, beta_start=1e-3, beta_end=0.2)
    at = {"backend": be, "noise_shape": shape}
    t = np.arange(len(X)) % 9
    x, eps = fd.forward_noise(X, t, schedule, seed=3, first_sample=2, out=None, **at)
    yield from {"x": x, "eps": eps}.items()
    yield "chain", fd.forward_chain(X, schedule, seed=3, first_sample=2, **at)
    for name, other in (("x0", X), ("noise", values(*X.shape, seed=2))):
        mean, var = fd.posterior(X + 1, t, schedule, **{name: other}, **at)
        yield from {f"mean by {name}": mean, f"variance by {name}": var}.items()


for _d in (13, 520):
    for _name, _shape in [("white", None), *noise_shapes(_d)]:

        @case(f"process {_name} {_d}", _d, _shape)
        def _(be: Any, d: int, shape: Any) -> Iterator[tuple[str, Any]]:
            yield from shaped(be, values(21, d), shape)
            if shape is not None:
                yield "coloured", shape.colour(values(21, d), backend=be)
                yield "white", shape.whiten(values(21, d), backend=be)


@case("process of pictures")
def _(be: Any) -> Iterator[tuple[str, Any]]:
    yield from shaped(be, values(5, 4, 3, 2), None)


@case("process float64", lanes=("numpy",))
def _(be: Any) -> Iterator[tuple[str, Any]]:
    yield from shaped(be, values(5, 13).astype(np.float64), None)


@case("normals")
def _(be: Any) -> Iterator[tuple[str, Any]]:
    for stream in ("init", "step", "forward", "chain"):
        for shape in ((1, 1), (5, 13), (3, 4, 5), (300, 64)):
            at = {"seed": 2**63 + 11, "stream": stream, "step": 5, "first_sample": 2**40 + 3}
            yield f"{stream} {shape}", fd.normal(shape, backend=be, **at)


# --------------------------------------------------------------------------------------- U-Nets


def unet(options: dict[str, Any], **more: Any) -> Any:
    """With weights of which none is zero, so that everything matters."""
    net = fd.UNet(
        **{**NET, "scale_shift": False, "dropout": 0.0, "classes": None, "null_class": False, **options, **more}
    )
    for i, name in enumerate(sorted(net.params)):
        view = net.params[name]
        scale = 1.0 if view.ndim < 2 else np.sqrt(view[..., 0].size)
        view[...] = values(*view.shape, seed=i) / scale + ("norm" in name and name.endswith("weight"))
    return net


def picture_model(be: Any, net: Any, prediction: str = "noise") -> Any:
    return fd.Diffusion(net, fd.Schedule.cosine(net.T), prediction=prediction, backend=be, seed=4, noise_shape=None)


def picture_case(be: Any, options: dict[str, Any], prediction: str = "noise", **fit: Any) -> Iterator[tuple[str, Any]]:
    net = unet(options)
    plain = {"batch": 5, "flip": False, "accumulate": 1, **fit}
    model = picture_model(be, net, prediction)
    if len(net.shape) == 1:
        plain["data_range"] = None
        yield from trained(model, be, values(11, *net.shape), steps=(2, 2), many=3, **plain)
        return
    y, labels = (None, None) if net.classes is None else (np.arange(11) % net.classes, net.classes - 1)
    plain |= {"data_range": (0.0, 255.0), "clip": 1.0, "labels": labels}
    yield from trained(model, be, pictures(net.shape), y, steps=(2, 2), many=3, **plain)


for _name, _options in UNETS.items():
    _lanes = LANES if _name in ("plain", "Winograd", "attention") else LANES[:4]
    case(f"unet {_name}", _options, lanes=_lanes, on_device=True)(picture_case)


@case("unet everything", on_device=True)
def _(be: Any) -> Iterator[tuple[str, Any]]:
    everything = {**UNETS["plain"], "classes": 3, "dropout": 0.2, "scale_shift": True, "attention": (True, True)}
    validation = pictures((8, 8, 1), 4), np.arange(4) % 3
    yield from picture_case(be, everything, "v", flip=True, accumulate=2, batch=7, validation=validation)


for _name, _options, _fit in (
    ("labels", {"classes": 3}, {}),
    ("dropout", {"dropout": 0.3}, {}),
    ("flips", {}, {"flip": True}),
    ("parts", {"dropout": 0.3}, {"accumulate": 3}),
):

    @case(f"unet with {_name}", _options, _fit, on_device=True)
    def _(be: Any, options: dict[str, Any], fit: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        yield from picture_case(be, {**UNETS["plain"], **options}, **fit)


for _prediction in ("x0", "v"):

    @case(f"unet predicts {_prediction}", _prediction, on_device=True)
    def _(be: Any, prediction: str) -> Iterator[tuple[str, Any]]:
        yield from picture_case(be, UNETS["plain"], prediction)


@case("unet of floats", on_device=True)
def _(be: Any) -> Iterator[tuple[str, Any]]:
    model, X = picture_model(be, unet(UNETS["odd sizes"])), values(11, 7, 5, 3)
    plain = {"batch": 5, "flip": False, "accumulate": 1, "data_range": (-6.0, 6.0)}
    yield from trained(model, be, X, steps=(2, 2), clip=1.0, many=3, **plain)


@case("unet float64", lanes=("numpy",))
def _(be: Any) -> Iterator[tuple[str, Any]]:
    yield from picture_case(be, {**UNETS["plain"], "dtype": "float64", "classes": 2, "dropout": 0.2})


@case("weights as drawn", lanes=("numpy",))
def _(be: Any) -> Iterator[tuple[str, Any]]:
    for kind in ("modulated", "tutorial"):
        yield kind, mlp(kind, 13, 12).flat
    for name, options in UNETS.items():
        yield name, fd.UNet(**{**NET, **options}).flat


# --------------------------------------------------------------------------------------- samplers


class Wave:
    """A denoiser that is no network of ours; exact in float32."""

    shape, T, prediction = (13,), 12, "noise"

    def predict(self, x: Any, t: int) -> Any:
        return x * x.dtype.type(0.5 + t / 32)


@case("sampling with a callable")
def _(be: Any) -> Iterator[tuple[str, Any]]:
    class At:
        prediction, schedule = "noise", fd.Schedule.cosine(12)

    at = {"shape": None, "seed": 3, "labels": None, "progress": False, "backend": be, "trajectory": False}
    shape = dict(noise_shapes(13))["dense"]
    for name, table in tables(At, clip=2.0):
        start = be.asarray(values(9, 13, seed=6))
        yield f"{name} from noise", fd.sample(Wave(), table, n=9, first_sample=4, batch=2, initial=None, **at)
        yield f"{name} from a state", fd.sample(Wave(), table, n=None, first_sample=0, batch=None, initial=start, **at)
    for name, table in tables(At, clip=None):
        shown: list[Any] = []

        def keep(i: int, t: int, x: Any, shown: list[Any] = shown) -> bool:
            shown.append(np.array(x if isinstance(x, np.ndarray) else be.to_numpy(x)))
            return i == 2

        options = {**at, "noise_shape": shape, "callback": keep}
        yield f"{name} stopped", fd.sample(Wave(), table, n=5, first_sample=1, batch=2, initial=None, **options)
        yield f"{name} shown", shown


# --------------------------------------------------------------------------------------- exact denoisers


def exact(kind: str, prediction: str, shape: tuple[int, ...] = (6,)) -> Any:
    schedule, d = fd.Schedule.cosine(12), int(np.prod(shape))
    factor = values(d, d, seed=4).astype(np.float64)
    mean, cov = values(*shape, seed=5), factor @ factor.T / d
    if kind == "gaussian":
        return fd.denoisers.Gaussian(mean, cov, schedule, prediction=prediction)
    if kind == "low rank":
        return fd.denoisers.Gaussian.low_rank(mean, factor[:, :2], 0.3, schedule, prediction=prediction)
    if kind == "mixture":
        means, covs = np.stack([mean, mean - 2]), np.stack([cov, cov + np.eye(d)])
        return fd.denoisers.Mixture([0.25, 0.75], means, covs, schedule, prediction=prediction)
    return fd.denoisers.Empirical(values(30, *shape, seed=6), schedule, prediction=prediction)


for _kind in ("gaussian", "low rank", "mixture", "empirical"):

    @case(f"exact {_kind}", _kind)
    def _(be: Any, kind: str) -> Iterator[tuple[str, Any]]:
        x = values(11, 6)
        for prediction in ("noise", "x0", "v"):
            denoiser = exact(kind, prediction)
            for name, t in (("one t", 7), ("several", np.arange(11) % 12)):
                yield f"{prediction} at {name}", denoiser.predict(x, t, None, backend=be)
                yield f"mean of {prediction} at {name}", denoiser.mean_x0(x, t, backend=be)
                yield f"density of {prediction} at {name}", denoiser.log_density(x, t, backend=be)
            for name, table in tables(denoiser, clip=None):
                at = {"seed": 1, "first_sample": 2, "batch": 4, "backend": be, "progress": False}
                yield f"{prediction} by {name}", fd.sample(denoiser, table, n=9, initial=None, **at)


@case("exact chains", lanes=("numpy",))
def _(be: Any) -> Iterator[tuple[str, Any]]:
    for kind in ("gaussian", "low rank"):
        denoiser = exact(kind, "v")
        for name, table in tables(denoiser, clip=None):
            chain = fd.denoisers.exact_chain(denoiser, table)
            yield from {f"{kind} {name} mean": chain.mean, f"{kind} {name} cov": chain.cov}.items()
        yield f"{kind} spectrum", denoiser.moments(5).spectrum


# --------------------------------------------------------------------------------------- covariance, schedules, data


@case("covariance")
def _(be: Any) -> Iterator[tuple[str, Any]]:
    X, Y = values(40, 13), values(40, 13, seed=2) * np.linspace(1, 2, 13, dtype=np.float32)
    yield "similarity", fd.covariance.similarity(values(3, 17), backend=be)
    source, target = (fd.covariance.scatter(rows, centre=True, normalise=True) for rows in (X, Y))
    for form in ("spectrum", "transport"):
        mapping = fd.covariance.reshaping(source, target, form=form, rank_tol=None, jitter=0.0)
        yield form, mapping.matrix
        for standardise in (False, True):
            yield f"{form} {standardise}", mapping.apply(X, standardise=standardise, backend=be, batch=7)
            yield f"{form} {standardise} back", mapping.inverse.apply(X, standardise=standardise, backend=be, batch=7)


@case("covariance on the host", lanes=("numpy",))
def _(be: Any) -> Iterator[tuple[str, Any]]:
    schedule, moments = fd.Schedule.cosine(12), fd.covariance.empirical(values(40, 13))
    yield from {"mean": moments.mean, "cov": moments.cov}.items()
    yield "propagated", fd.covariance.propagate(moments.cov, schedule, np.arange(12))
    yield "chain", list(fd.covariance.propagate_chain(moments.cov, schedule))
    yield "spectrum", fd.covariance.spectrum(moments.cov)
    yield "ranks", [fd.covariance.effective_rank(moments.cov, kind) for kind in ("entropy", "participation")]


@case("schedules", lanes=("numpy",))
def _(be: Any) -> Iterator[tuple[str, Any]]:
    for schedule in (
        fd.Schedule.linear(1000, beta_start=1e-4, beta_end=0.02),
        fd.Schedule.scaled_linear(1000, beta_start=1e-4, beta_end=0.02),
        fd.Schedule.cosine(1000),
        fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1),
    ):
        yield repr(schedule), [schedule.betas, schedule.signal, schedule.noise, schedule.posterior_variance]


@case("harmonic curves", lanes=("numpy",))
def _(be: Any) -> Iterator[tuple[str, Any]]:
    yield "curves", fd.data.harmonic_curves(50, points=50, seed=3, cosines=5, max_frequency=0.1, first_sample=7)


# --------------------------------------------------------------------------------------- records


def backend_of(lane: str, on_device: bool) -> Any:
    if lane.startswith("cpu"):
        return fd.get_backend("cpu", threads=int(lane[-1]))
    if lane in ("numpy", "gpu"):
        return fd.get_backend("cuda" if lane == "gpu" else lane)
    from device_array import DeviceRuntime
    from host_cuda import HostRuntime

    from fastdiff.backends.cuda import CudaBackend

    here = (DeviceRuntime if on_device else HostRuntime)("forward")
    return CudaBackend(here, precision="bf16" if lane == "bf16" else "float32")


def usable(lane: str) -> bool:
    from host_cuda import has_compiler

    return lane in HOST or lane == "gpu" or has_compiler()


def digest(be: Any, result: Any) -> str:
    """Hash of an array or of a list of them: types, shapes and bytes."""
    told = hashlib.sha256()
    for item in result if isinstance(result, list) else [result]:
        array = np.asarray(item if isinstance(item, (np.ndarray, float)) else be.to_numpy(item))
        told.update(f"{array.dtype.str} {array.shape};".encode())
        told.update(np.ascontiguousarray(array).tobytes())
    return told.hexdigest()


def environment() -> dict[str, str]:
    import numba

    return {"python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__}


def selected(lanes: tuple[str, ...], only: str) -> list[tuple[str, str, Case]]:
    """Name, lane and case of all that a regular expression finds."""
    named = [(f"{lane}/{name}", lane, each) for lane in lanes for name, each in CASES.items()]
    return [
        (name, lane, each)
        for name, lane, each in named
        if ("cuda" if lane == "gpu" else lane) in each.lanes and re.search(only, name)
    ]


def record(chosen: list[tuple[str, str, Case]], say: Callable[[str], Any] = lambda text: None) -> dict[str, Any]:
    """The hashes of some cases; of one that raises, what it raised."""
    backend = cache(backend_of)
    cases: dict[str, dict[str, str]] = {}
    for name, lane, each in chosen:
        be, start = backend(lane, each.on_device), perf_counter()
        found: dict[str, str] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fd.errors.ScheduleWarning)
                for key, result in each.run(be):
                    assert key not in found, f"two results are called {key!r}"
                    found[key] = digest(be, result)
        except Exception as error:  # noqa: BLE001 - the other cases still tell something
            traceback.print_exc()
            found["raised"] = repr(error)
        cases[name] = found
        say(f"{perf_counter() - start:6.2f} s  {name}")
    return {"environment": environment(), "cases": cases}


def differences(before: dict[str, Any], after: dict[str, Any], names: set[str]) -> list[str]:
    """A line for each of these cases that is not the same in both records."""
    lines = []
    for name in sorted(names):
        old, new = before["cases"].get(name), after["cases"].get(name)
        if old is None or new is None:
            lines.append(f"{name}: only {'after' if old is None else 'before'}")
            continue
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if keys or "raised" in new:
            lines.append(f"{name}: {', '.join(keys) or new['raised']}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the record here")
    parser.add_argument("--against", type=Path, help="compare with this record; exit code 1 where something differs")
    parser.add_argument("--only", default="", help="a regular expression on lane/case, such as 'cuda/unet'")
    parser.add_argument("--lanes", nargs="+", choices=(*LANES, "gpu"), default=LANES)
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(arguments)
    lanes = tuple(lane for lane in options.lanes if usable(lane))
    if len(lanes) < len(options.lanes):
        print("without g++: no host run of the CUDA kernels", file=sys.stderr)
    chosen = selected(lanes, options.only)
    if options.list or not chosen:
        print("\n".join(name for name, *_ in chosen) or "no such case")
        return 0 if chosen else 2
    after = record(chosen, say=lambda text: print(text, file=sys.stderr, flush=True))
    if options.output is not None:
        options.output.write_text(json.dumps(after, indent=1))
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    if before["environment"] != after["environment"]:
        print(f"made with {before['environment']}, this is {after['environment']}: hashes may differ", file=sys.stderr)
    # A case that is gone counts; one that was not asked for does not.
    asked = {name for name in before["cases"] if name.split("/")[0] in lanes and re.search(options.only, name)}
    lines = differences(before, after, asked | set(after["cases"]))
    print("\n".join(lines) or f"{len(after['cases'])} cases: the same bits")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
