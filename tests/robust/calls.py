"""Public functions called with one argument that is something else: only errors of ours may come of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastdiff as fd
from fastdiff import covariance, denoisers, interop, likelihood, metrics, samplers
from fastdiff.errors import ArgumentError, FastdiffError
from robust.accidents import FIT, PICTURES, X
from robust.count import Count

SECONDS, WAITING = 10, 120  # of the processor, and of the clock, that a call may take


class Unshown:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise ValueError("nothing to see")


class Empty:
    """One without anything."""

    __slots__ = ()


JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**5000, 1 << 63, 1 << 32, 0.5, -0.0, float("nan"), float("inf"), 1e308, 1j, "", "x",
    "auto", "\ud800", "a\0b", b"", b"x", (), [], {}, set(), [None], [[1], [1, 2]], (1, 2), (1 << 40, 1 << 40), ("a",), range(3),
    object(), Unshown(), Empty(), print, int, np.nan, np.float32(1), np.int8(-128), np.bool_(True), np.array(3), np.zeros(0),
    np.zeros((2, 0)), np.zeros(3, bool), np.array(["a"]), np.array([None]), np.zeros(4, complex), np.full((4, 16), np.nan),
    np.full((4, 16), 1e300), np.zeros((4, 16), np.float16), np.ma.masked_array([1.0, 2.0], [True, False]), np.arange(3),
    np.datetime64("2020-01-01"), np.zeros(2, "V4"), np.array([10**30], object), lambda *_: None, iter([1]), Ellipsis, NotImplemented,
    Path("nowhere"), os.devnull, fd.Schedule.cosine(7), fd.MLP(5, hidden=(4,), T=7), "\n",
]  # fmt: skip


def cases(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public function, with arguments by name that it takes."""
    T, d = 10, 16
    schedule, net = fd.Schedule.cosine(T), fd.MLP(d, hidden=(8,), T=T)
    unet = fd.UNet((8, 8, 1), channels=(4,), blocks=1, T=T, classes=2)
    model = fd.Diffusion(net, schedule, backend="numpy").fit(X, steps=2, weighting="min_snr", **FIT)
    pictures = fd.Diffusion(unet, backend="numpy").fit(PICTURES, np.arange(16) % 2, steps=1, **FIT)
    cov = np.cov(X.T) + 0.01 * np.eye(d)
    gaussian = denoisers.Gaussian(X.mean(axis=0), cov, schedule)
    table = samplers.ddim(schedule, 4)
    model.save(folder / "m.safetensors")
    unet.save_diffusers(folder / "net")
    interop.save_scheduler(samplers.dpmpp_2m(fd.Schedule.linear(), 5), folder / "plan")
    np.save(folder / "x.npy", X)
    fd.data.save_curves(folder / "x.csv", X)
    fd.data.save_images(PICTURES[:3], folder / "shown")
    seen = np.full(d, np.nan)
    seen[::4] = X[0, ::4]
    given = fd.Known(seen)
    fit = {**FIT, "steps": 1}

    def again(method: str, of: Any = model) -> Callable[..., Any]:
        """A method of a copy: a failed call must leave the next one alone."""

        def call(**arguments: Any) -> Any:
            import copy

            return getattr(copy.deepcopy(of), method)(**arguments)

        call.checked = getattr(type(of), method)
        return call

    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "normal": (fd.normal, {"shape": (3, 4), "seed": 1, "stream": "forward", "step": 0, "first_sample": 0, "backend": "numpy"}),
        "forward_noise": (fd.forward_noise, {"x0": X[:4], "t": 3, "schedule": schedule, "seed": 0, "first_sample": 0, "out": None, "backend": "numpy", "noise_shape": None}),
        "forward_chain": (fd.forward_chain, {"x0": X[:4], "schedule": schedule, "seed": 0, "first_sample": 0, "backend": "numpy", "noise_shape": None}),
        "posterior": (fd.posterior, {"x_t": X[:4], "t": 3, "schedule": schedule, "x0": X[:4], "backend": "numpy"}),
        "get_backend": (fd.get_backend, {"backend": "cpu", "threads": 1, "kernels": None, "precision": None, "graphs": None, "convolutions": None}),
        "sample": (fd.sample, {"denoiser": gaussian, "sampler": table, "n": 3, "shape": None, "seed": 0, "first_sample": 0, "batch": 2, "backend": "numpy", "initial": None, "labels": None, "trajectory": False, "callback": None, "progress": False}),
        "sample a function": (fd.sample, {"denoiser": lambda x, t: x * 0.1, "sampler": table, "n": 3, "shape": (4,), "backend": "numpy"}),
        "condition": (fd.condition, {"denoiser": gaussian, "given": given, "method": "auto", "schedule": None, "prediction": None}),
        "load": (fd.load, {"path": folder / "m.safetensors", "backend": "numpy"}),
        "load_diffusers": (fd.load_diffusers, {"folder": folder / "net", "shape": (8, 8, 1), "T": 10, "seed": 0, "dtype": "float32"}),
        "load_scheduler": (interop.load_scheduler, {"path": folder / "plan", "steps": 5}),
        "save_scheduler": (interop.save_scheduler, {"sampler": samplers.dpmpp_2m(fd.Schedule.linear(), 5), "folder": folder / "plan2"}),
        "Diffusion": (fd.Diffusion, {"net": net, "schedule": schedule, "prediction": "v", "scale": "auto", "base": None, "backend": "numpy", "seed": 0, "noise_shape": None}),
        "Diffusion.fit": (again("fit"), {"X": X, **fit, "lr": 1e-3, "warmup": 0, "decay_steps": None, "clip_norm": 1.0, "ema": 0.9, "weighting": "min_snr", "snr_gamma": 5.0, "flip": False, "accumulate": 1, "data_range": None, "callback": None, "checkpoint": folder / "c.safetensors", "every": 2, "keep": 1, "y": None}),
        "Diffusion.fit pictures": (again("fit", pictures), {"X": PICTURES, "y": np.arange(16) % 2, **fit, "flip": True, "accumulate": 2, "data_range": (0, 255)}),
        "Diffusion.sample": (again("sample"), {"n": 2, "labels": None, "sampler": "ddim", "steps": 2, "seed": 0, "first_sample": 0, "ema": True, "trajectory": False, "round": False, "batch": 2, "progress": False, "given": None, "method": "auto", "return_evidence": False}),
        "Diffusion.sample given": (again("sample"), {"n": 2, "sampler": "ddim", "steps": 2, "given": given, "method": "tmpd"}),
        "Diffusion.sample pictures": (again("sample", pictures), {"n": 2, "labels": 1, "sampler": "ddim", "steps": 2}),
        "Diffusion.impute": (again("impute"), {"X": np.stack([seen, X[1]]), "draws": 2, "method": "auto", "sampler": "ddim", "steps": 2, "labels": None, "seed": 0, "first_draw": 0, "ema": True, "progress": False}),
        "Diffusion.evaluate": (again("evaluate"), {"X": X[:20], "y": None, "training": X[20:], "samples": 4, "seed": 0}),
        "Diffusion.score_samples": (again("score_samples"), {"X": X[:2], "y": None, "method": "denoising", "ema": True, "seed": 0}),
        "Diffusion.bound": (again("bound"), {"X": X[:2], "y": None, "ema": True, "draws": 1, "seed": 0, "decoder": "noise", "progress": False}),
        "Diffusion.save": (again("save"), {"path": folder / "s.safetensors", "training": True}),
        "Diffusion.denoiser": (again("denoiser"), {"ema": True}),
        "Diffusion.named_sampler": (again("named_sampler"), {"name": "ddim", "steps": 3, "given": False}),
        "Known": (fd.Known, {"values": seen, "noise": 0.0}),
        "Linear": (fd.Linear, {"A": np.ones((1, d)), "y": np.ones(1), "noise": 0.1}),
        "Schedule": (fd.Schedule, {"betas": schedule.betas, "name": "custom", "signal": None, "noise": None}),
        "Schedule.linear": (fd.Schedule.linear, {"T": 50, "beta_start": 1e-3, "beta_end": 0.2}),
        "Schedule.scaled_linear": (fd.Schedule.scaled_linear, {"T": 50, "beta_start": 1e-3, "beta_end": 0.2}),
        "Schedule.sigmoid": (fd.Schedule.sigmoid, {"T": 50, "beta_start": 1e-3, "beta_end": 0.2}),
        "Schedule.cosine": (fd.Schedule.cosine, {"T": 50}),
        "Schedule.laplace": (fd.Schedule.laplace, {"T": 50, "mean": 0.0, "scale": 0.5}),
        "Schedule.flow": (fd.Schedule.flow, {"T": 50, "shift": 1.0}),
        "Schedule.from_betas": (fd.Schedule.from_betas, {"betas": schedule.betas}),
        "Schedule.from_dict": (fd.Schedule.from_dict, {"stored": schedule.to_dict()}),
        "Schedule.timesteps": (schedule.timesteps, {"steps": 3, "spacing": "trailing"}),
        "Schedule.target": (schedule.target, {"prediction": "v"}),
        "Sampler": (fd.Sampler, {"rows": [(t, 0, 0, 1.0, 0, 0, -0.1, 0.1) for t in reversed(range(T))], "schedule": schedule, "prediction": "noise", "name": "mine"}),
        "MLP": (fd.MLP, {"points": 8, "hidden": (4, 4), "T": 10, "seed": 0, "dtype": "float32"}),
        "MLP.tutorial": (fd.MLP.tutorial, {"points": 8, "T": 10, "seed": 0, "dtype": "float32"}),
        "UNet": (fd.UNet, {"shape": (8, 8, 1), "channels": (4, 8), "blocks": 1, "attention": (False, True), "T": 10, "classes": 2, "head_width": 4, "groups": 2, "dropout": 0.1, "scale_shift": False, "seed": 0, "dtype": "float32", "outputs": 1, "embedding": 8, "up_attention": None, "middle_attention": True, "padding": 1, "flip": True, "frequency_shift": 0, "eps": 1e-5}),
        "UNet.like_diffusers": (fd.UNet.like_diffusers, {"config": {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 2, "attention_head_dim": 2}, "T": 10}),
        "UNet.save_diffusers": (unet.save_diffusers, {"folder": folder / "net2"}),
        "UNet.predict": (unet.predict, {"x": np.zeros((2, 8, 8, 1)), "t": 3, "labels": 1, "backend": "numpy", "flat": None}),
        "MLP.predict": (net.predict, {"x": X[:2], "t": 3, "labels": None, "backend": "numpy", "flat": None}),
        "MLP.vjp": (net.vjp, {"x": X[:2], "t": 3, "cotangent": X[:2], "backend": "numpy"}),
        "MLP.jvp": (net.jvp, {"x": X[:2], "t": 3, "tangent": X[:2], "backend": "numpy"}),
        "network_of": (fd.nn.network_of, {"config": net.to_dict(), "draw": False}),
        "NoiseShape.diagonal": (fd.NoiseShape.diagonal, {"variances": np.ones(4)}),
        "NoiseShape.dense": (fd.NoiseShape.dense, {"cov": np.eye(4), "jitter": 0.0}),
        "NoiseShape.stationary": (fd.NoiseShape.stationary, {"autocovariance": np.array([1.0, 0.5, 0.1, 0.5]), "power": None, "jitter": 0.0}),
        "Gaussian": (denoisers.Gaussian, {"mean": np.zeros(3), "cov": np.eye(3), "schedule": schedule}),
        "Gaussian.predict": (gaussian.predict, {"x": X[:2], "t": 3}),
        "Gaussian.given": (gaussian.given, {"obs": given}),
        "Mixture.of": (denoisers.Mixture.of, {"weights": [0.4, 0.6], "components": [gaussian, gaussian]}),
        "Empirical": (denoisers.Empirical, {"X": X[:5], "schedule": schedule, "prediction": "noise", "weights": None}),
        "exact_chain": (denoisers.exact_chain, {"gaussian": gaussian, "sampler": table}),
        "convergence": (denoisers.convergence, {"gaussian": gaussian, "sampler": "ddim", "steps": [2, 4]}),
        "likelihood.bound": (likelihood.bound, {"denoiser": gaussian, "X": X[:2], "draws": 1, "seed": 0, "decoder": "noise", "labels": None, "schedule": None, "backend": "numpy", "progress": False}),
        "likelihood.log_density": (likelihood.log_density, {"denoiser": gaussian, "X": X[:2], "method": "table", "sampler": None, "trace": "exact", "probes": 1, "seed": 0, "labels": None, "schedule": None, "backend": "numpy", "progress": False}),
        "covariance.effective_rank": (covariance.effective_rank, {"C": cov, "kind": "entropy"}),
        "covariance.empirical": (covariance.empirical, {"X": X}),
        "covariance.ledoit_wolf": (covariance.ledoit_wolf, {"X": X}),
        "covariance.propagate": (covariance.propagate, {"S0": cov, "schedule": schedule, "t": 3}),
        "covariance.propagate_chain": (lambda **k: list(covariance.propagate_chain(**k)), {"S0": cov, "schedule": schedule}),
        "covariance.reshaping": (covariance.reshaping, {"source": cov, "target": np.eye(d), "form": "spectrum", "rank_tol": None, "jitter": 0.0}),
        "covariance.scatter": (covariance.scatter, {"X": X, "centre": True, "normalise": False}),
        "covariance.similarity": (covariance.similarity, {"v": X[0], "backend": "numpy"}),
        "covariance.spectrum": (covariance.spectrum, {"C": cov}),
        "data.harmonic_curves": (fd.data.harmonic_curves, {"n": 3, "points": 10, "seed": 0, "cosines": 2, "max_frequency": 0.1, "first_sample": 0}),
        "data.load_curves": (fd.data.load_curves, {"path": folder / "x.csv", "header": None, "index": None, "drop": (), "columns": None, "decimal": ".", "delimiter": None, "missing": False}),
        "data.save_curves": (fd.data.save_curves, {"path": folder / "y.csv", "X": X}),
        "data.load_images": (fd.data.load_images, {"folder": folder / "shown", "size": 8, "mode": "auto", "labels": False, "data_range": None, "skip_bad": False}),
        "data.save_images": (fd.data.save_images, {"images": PICTURES[:2], "folder": folder / "shown2", "data_range": (0, 255), "first": 0, "overwrite": True}),
        "data.tiles": (fd.data.tiles, {"pictures": [PICTURES[0]], "size": 4, "count": 2, "seed": 0, "short": None, "mode": "auto", "first_sample": 0}),
        "data.energy_distance": (fd.data.energy_distance, {"X": X[:4], "Y": X[4:8], "unbiased": False}),
        "data.as_uint8": (fd.data.as_uint8, {"images": PICTURES, "data_range": (0, 255), "argument": "images"}),
        "Guided": (fd.Guided, {"denoiser": gaussian, "unconditional": gaussian, "guidance": 1.0, "interval": None, "rescale": 0.0}),
        "product": (fd.product, {"denoiser1": gaussian, "denoiser2": gaussian, "schedule": None}),
        "Weight": (fd.Weight, {"function": lambda x: (-(x**2).sum(axis=1), -2 * x)}),
        "Diffusion.forecast": (again("forecast"), {"past": X[:2, :8], "horizon": 3, "draws": 2, "quantiles": None, "method": "auto", "sampler": "ddim", "steps": 2, "labels": None, "seed": 0, "first_draw": 0, "ema": True, "progress": False}),
        "Diffusion.anomaly": (again("anomaly"), {"X": X[:2], "block": 8, "draws": 2, "steps": 2}),
        "Diffusion.log_density": (again("log_density"), {"X": X[:2], "y": None, "covariates": None, "method": "denoising", "ema": True}),
        "Schedule.difference": (schedule.difference, {"other": schedule}),
        "NoiseShape.low_rank": (fd.NoiseShape.low_rank, {"factor": np.ones((4, 1)), "variances": 1.0}),
        "NoiseShape.whiten": (fd.NoiseShape.diagonal(np.ones(4)).whiten, {"x": np.ones((2, 4))}),
        "Gaussian.low_rank": (denoisers.Gaussian.low_rank, {"mean": np.zeros(3), "factor": np.ones((3, 1)), "variance": 0.1, "schedule": schedule}),
        "Gaussian.log_density": (gaussian.log_density, {"x": X[:2], "t": 3}),
        "Gaussian.mean_x0": (gaussian.mean_x0, {"x": X[:2], "t": 3}),
        "Gaussian.vjp": (gaussian.vjp, {"x": X[:2], "t": 3, "cotangent": X[:2]}),
        "Empirical.given": (denoisers.Empirical(X[:5], schedule).given, {"obs": fd.Known(seen, 0.1)}),
        "data.circles": (fd.data.circles, {"n": 2, "size": 8, "radius": (0.2, 0.4), "seed": 0, "first_sample": 0}),
        "data.windows": (fd.data.windows, {"x": X[0], "length": 4, "stride": 2}),
        "data.picture_files": (fd.data.picture_files, {"folder": folder / "shown3", "n": 2, "first": 0, "overwrite": True}),
        "metrics.crps": (metrics.crps, {"draws": X[:4], "y": X[4], "fair": True}),
        "metrics.crps_normal": (metrics.crps_normal, {"mean": X[:2], "deviation": np.ones(16), "y": X[2]}),
        "metrics.crps_sum": (metrics.crps_sum, {"draws": X[:12].reshape(3, 4, 8, 2), "y": X[:4].reshape(4, 8, 2), "convention": "csdi", "levels": None}),
        "metrics.quantile_crps": (metrics.quantile_crps, {"draws": X[:4], "y": X[4], "convention": "csdi", "levels": None, "relative": True}),
        "metrics.energy_score": (metrics.energy_score, {"draws": X[:6].reshape(3, 2, 16), "y": X[:2], "fair": True}),
        "metrics.coverage": (metrics.coverage, {"draws": X[:4], "y": X[4], "levels": (0.2, 0.5)}),
        "metrics.autocorrelation": (metrics.autocorrelation, {"X": X, "lags": 3}),
        "metrics.autocorrelation_error": (metrics.autocorrelation_error, {"X": X[:9], "Y": X[9:], "lags": 3}),
        "metrics.cross_correlation_error": (metrics.cross_correlation_error, {"X": X[:8].reshape(8, 8, 2), "Y": X[8:16].reshape(8, 8, 2), "lags": 1}),
        "metrics.discriminative_score": (metrics.discriminative_score, {"real": X[:20], "generated": X[20:], "units": 2, "networks": 1, "steps": 1, "batch": 4, "seed": 0}),
        "metrics.predictive_score": (metrics.predictive_score, {"real": X[:20], "generated": X[20:], "units": 2, "networks": 1, "steps": 1, "batch": 4, "seed": 0}),
        "metrics.mmd": (metrics.mmd, {"X": X[:4], "Y": X[4:8], "bandwidth": None, "unbiased": False}),
        "metrics.nearest_distances": (metrics.nearest_distances, {"X": X[:4], "Y": X[4:8]}),
        "metrics.roundness": (metrics.roundness, {"images": np.pad(np.ones((1, 4, 4)), ((0, 0), (4, 4), (4, 4))), "rays": 16}),
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import pandas

        clock = pandas.to_datetime([0, 1, 2, 4, 6], unit="D")
        frame = pandas.DataFrame({"a": X[0, :5]}, index=clock)
        found["data.on_grid"] = fd.data.on_grid, {"x": frame, "fill": "linear"}
    for name in samplers.names():
        usual = {"schedule": schedule, "steps": 4} | samplers.options_of(getattr(samplers, name))
        found[f"samplers.{name}"] = getattr(samplers, name), usual
    found["samplers.named"] = (
        samplers.named,
        {"name": "ddim", "schedule": schedule, "steps": 4, "prediction": "v", "clip": 1.0},
    )
    return found


LONG = ("steps", "n", "draws", "samples", "count", "shape", "networks")  # arguments that may ask for a long time
OWN = ("callback", "denoiser", "function")  # functions of the caller, whose exceptions are his


class Slow(BaseException):
    """A call that has taken too long."""


@contextlib.contextmanager
def limited():
    def stop(*_: object) -> None:
        raise Slow

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITING))
    before = {number: signal.signal(number, stop) for number, _, _ in timers}
    try:
        for _, timer, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for number, timer, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def problem(function: Callable[..., Any], arguments: dict[str, Any], changed: str) -> str | None:
    """What is wrong with how a call ends."""
    try:
        with limited():
            function(**arguments)
    except FastdiffError as error:
        try:
            text = str(error)
        except Exception as worse:  # noqa: BLE001
            return f"the message raises {type(worse).__name__}"
        if len(text) > 2000 or "\n" in text:
            return f"a message of {len(text)} characters"
        if not changed:
            return text
        # Of two shapes that disagree either may be named.
        if isinstance(error, ArgumentError) and changed not in text and not error.got.startswith("shape"):
            UNNAMED.append(f"{changed}: {text[:150]}")
        return None
    except Slow:
        if changed in LONG:
            return None
        return f"more than {SECONDS} s"
    except MemoryError:
        return "MemoryError"
    except Exception as error:  # noqa: BLE001
        if changed in OWN and callable(arguments[changed]):
            return None
        try:
            return f"{type(error).__name__}: {error}"[:200]
        except Exception:  # noqa: BLE001
            return type(error).__name__
    return None


UNNAMED: list[str] = []  # messages that do not name the argument that was changed


def calls(tries: int, every: int = 1) -> list[Count]:
    """So many calls, or with a tries of 0 all, or each `every`-th, of one changed argument."""
    count = Count("calls of public functions that end in an exception that is not ours")
    UNNAMED.clear()
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = cases(Path(name))
        os.chdir(name)
        try:
            for what, (function, arguments) in known.items():
                said = problem(function, arguments, "")
                count.add(said and f"{what} as it should be: {said}")
            all_of = [
                (what, argument, k) for what, (_, some) in known.items() for argument in some for k in range(len(JUNK))
            ]
            if tries:
                all_of = random.Random(0).sample(all_of, min(tries, len(all_of)))
            for what, argument, k in all_of[::every]:
                function, arguments = known[what]
                said = problem(function, {**arguments, argument: JUNK[k]}, argument)
                count.add(said and f"{what}({argument}=JUNK[{k}] {type(JUNK[k]).__name__}): {said}")
        finally:
            os.chdir(here)
    unnamed = Count("messages of these that do not name the argument", count.tries, len(UNNAMED), UNNAMED[:20])
    return [count, unnamed]
