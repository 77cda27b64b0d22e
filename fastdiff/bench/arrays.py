"""Workloads without a network: normals, noising, a sampler's step, covariance, the denoiser whose data are rows."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import numpy as np

import fastdiff as fd
from fastdiff.bench.workload import Arrays, PeerWork, Run, Work, Workload, fills, finite, on_host

T = 100  # timesteps of the tutorial's sigmoid schedule
IMAGE_T, IMAGE_STEP = 1000, 500  # schedule of pictures, and timestep of the step alone
DATA_ROWS, DATA_STEP = 10_000, 70  # of the denoiser whose data are rows


def curve_schedule() -> Any:
    """Return the tutorial's schedule."""
    return fd.Schedule.sigmoid(T, beta_start=1e-5, beta_end=0.1)


def image_schedule() -> Any:
    """Return the schedule of pictures."""
    return fd.Schedule.linear(IMAGE_T)


def white(n: int, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Return float32 normals that do not come from our own generator."""
    return np.random.default_rng(seed).standard_normal((n, *shape), np.float32)


def drawn(be: Any, shape: tuple[int, ...], stream: str, step: int = 0, seed: int = 0) -> Any:
    """Return our normals of a stream, on the host."""
    return on_host(be, fd.normal(shape, seed=seed, stream=stream, step=step, backend=be))


class Normals(Workload):
    """Standard normals of a seed."""

    tolerance, draws, memory_bound = 0.0, 1, True
    peer_name, peer_samples, parity = "torch.randn", 1_000_000, {"moments": 7.0}

    def counts(self) -> tuple[int, int]:
        return 4 * self.values, 0

    @property
    def peer_example(self) -> Normals:
        return self.at(self.peer_samples / max(self.values, self.peer_samples))

    def ours(self, be: Any) -> Work:
        shape = (self.n, *self.shape)
        return Work(lambda: fd.normal(shape, seed=0, backend=be), finite(shape, 0.8, 1.2))

    def operation(self, be: Any) -> Run:
        out, draw = be.empty((self.n, *self.shape)), fd.noise.Draw(0, fd.noise.Stream.INIT)
        return fills(out, lambda: be.normal(out, draw))

    def compare(self, be: Any, folder: Any) -> tuple[Arrays, Arrays]:
        return {}, {"moments": moments(self.setup(be).run())}

    def peer_side(self, nets: Any, inputs: Arrays, folder: Any, variant: str) -> tuple[Arrays, list[Run]]:
        return {"moments": moments(self.peer_example.peer(nets.torch, {}).run())}, [self.peer(nets.torch, {}).run]

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        return PeerWork(torch.randn, (self.n, *self.shape))

    def gpu_ways(self, peers: Any, be: Any, run: Run) -> dict[str, Run]:
        out = peers.torch.empty((self.n, *self.shape), device=peers.DEVICE)
        return {"eager": out.normal_}


def moments(x: Any) -> Any:
    """Return mean, variance, skewness and kurtosis of normals, as deviations in units of their standard errors."""
    z = np.asarray(x, np.float64).reshape(-1)
    raw = [z.mean(), (z**2).mean() - 1, (z**3).mean(), (z**4).mean() - 3]
    return np.array(raw) / np.sqrt(np.array([1, 2, 15, 96]) / z.size)


class ForwardNoising(Workload):
    """x_t of clean rows, each at its own timestep."""

    draws, memory_bound = 1, True
    tolerance = 0.0
    peer_name, parity = "torch: randn_like, gather, two multiplies, add", {"x_t": 1e-6}

    def counts(self) -> tuple[int, int]:
        return 12 * self.values + 8 * self.n, 3 * self.values  # x0 in, x_t and the noise out; t

    def inputs(self) -> Arrays:
        rng = np.random.default_rng(0)
        x0 = rng.standard_normal((self.n, *self.shape), np.float32)
        return {"x0": x0, "t": rng.integers(0, IMAGE_T, self.n), "betas": image_schedule().betas}

    def ours(self, be: Any) -> Work:
        x0, t, _ = self.inputs().values()
        given, s = (be.asarray(x0), be.asarray(t, np.int64)), image_schedule()

        def check(result: Any) -> None:
            x, eps = result
            finite(x0.shape, 0.8, 1.2)(x)
            k = slice(0, 100)
            exact = s.signal[t[k], None] * x0[k] + s.noise[t[k], None] * eps[k]
            np.testing.assert_allclose(x[k], exact, rtol=0, atol=1e-5)

        return Work(lambda: fd.forward_noise(*given, s, seed=0, backend=be), check)

    def _on_device(self, be: Any) -> tuple[Any, ...]:
        """x0, t, room for x_t and for the noise, and the draw."""
        x0, t, _ = self.inputs().values()
        draw = fd.noise.Draw(0, fd.noise.Stream.FORWARD)
        return be.asarray(x0), be.asarray(t, np.int64), be.empty(x0.shape), be.empty(x0.shape), draw

    def operation(self, be: Any) -> Run:
        x0, t, out, eps, draw = self._on_device(be)
        s = image_schedule()
        return fills((out, eps), lambda: be.forward_noise(x0, t, s.signal, s.noise, out, eps, draw))

    def twin(self, be: Any, twins: Any) -> Run:
        (x0, t, *rest), s = self._on_device(be), image_schedule()
        levels = be.asarray(s.signal), be.asarray(s.noise)
        return lambda: twins.forward_noise(x0, t, *levels, *rest, queue=be.runtime.queue())

    def noise(self, be: Any, result: Any) -> Any:
        return result[1][None]

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        abar = (1 - given["betas"]).cumprod(0)
        signal, noise = (level.sqrt().float()[:, None] for level in (abar, 1 - abar))

        def forward(x0: Any, t: Any, signal: Any, noise: Any) -> Any:
            eps = torch.randn_like(x0)
            return signal[t] * x0 + noise[t] * eps, eps

        return PeerWork(forward, (given["x0"], given["t"], signal, noise))


class SamplerStep(Workload):
    """A step of DDPM with clipping, given what the network said."""

    example_values, draws, memory_bound = 200_000, 1, True
    tolerance = 0.0
    peer_name, peer_samples, parity = "diffusers DDPMScheduler.step", 1, {"x": 1e-5}

    def counts(self) -> tuple[int, int]:
        return 12 * self.values, 8 * self.values  # x and the network's output in, x out

    def inputs(self) -> Arrays:
        rng = np.random.default_rng(0)
        shape = (self.n, math.prod(self.shape))
        return {name: rng.standard_normal(shape, np.float32) for name in ("x", "out")}

    def _row(self) -> tuple[Any, Any]:
        """The row of the sampler's table, and its clip."""
        sampler = fd.samplers.ddpm(image_schedule(), clip=1.0)
        return sampler.rows[list(sampler.timesteps).index(IMAGE_STEP)], sampler.clip

    def _run(self, be: Any, step: Any) -> Run:
        x, out = (be.asarray(value) for value in self.inputs().values())
        row, clip = self._row()
        draw, seeds = fd.noise.Draw(0, fd.noise.Stream.STEP, row.t), itertools.count()  # the same noise would add up

        return fills(x, lambda: step(x, out, (), row, clip, draw._replace(seed=next(seeds))))

    def ours(self, be: Any) -> Work:
        return Work(self._run(be, be.sampler_step), finite((self.n, math.prod(self.shape)), 0.5, 2))

    def operation(self, be: Any) -> Run:
        return self.ours(be).run

    def twin(self, be: Any, twins: Any) -> Run:
        return self._run(be, lambda *given: twins.sampler_step(*given, queue=be.runtime.queue()))

    def noise(self, be: Any, result: Any) -> Any:
        return drawn(be, result.shape, "step", IMAGE_STEP)[None]

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(num_train_timesteps=IMAGE_T, beta_schedule="linear")  # clips x0 to [-1, 1]
        channels_first = (self.n, *self.shape[-1:], *self.shape[:-1])
        x, out = (given[name].reshape(channels_first) for name in ("x", "out"))

        def step(x: Any, out: Any) -> Any:
            return scheduler.step(out, IMAGE_STEP, x).prev_sample.reshape(len(x), -1)

        return PeerWork(step, (x, out))

    def peer_on_gpu(self, torch: Any, given: Arrays) -> PeerWork:
        row, clip = self._row()

        def step(x: Any, out: Any) -> Any:
            x0 = (row.p * x + row.q * out).clamp(*clip)
            return row.a * x + row.b * x0 + row.s * torch.randn_like(x)

        return PeerWork(step, (given["x"], given["out"]))


class Similarity(Workload):
    """exp(-(v_i - v_j)^2) of the points of every curve."""

    example_values, memory_bound = 8192, True
    peer_name, peer_samples, parity = "torch broadcasting", 64, {"similarity": 1e-6}

    def counts(self) -> tuple[int, int]:
        return 4 * self.values * (1 + self.shape[0]), 3 * self.values * self.shape[0]  # and as many exponentials

    def inputs(self) -> Arrays:
        return {"v": white(self.n, self.shape)}

    def ours(self, be: Any) -> Work:
        v = self.inputs()["v"]
        given = be.asarray(v)

        def check(C: Any) -> None:
            assert C.shape == (*v.shape, *self.shape)
            for k in (0, len(v) - 1):
                exact = np.exp(-((v[k, :, None] - v[k].astype(np.float64)) ** 2))
                np.testing.assert_allclose(C[k], exact, rtol=0, atol=1e-6)

        return Work(lambda: fd.covariance.similarity(given, backend=be), check)

    def operation(self, be: Any) -> Run:
        v, out = be.asarray(self.inputs()["v"]), be.empty((self.n, *self.shape, *self.shape))
        return fills(out, lambda: be.similarity(v, out))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        return PeerWork(lambda v: torch.exp(-((v[:, :, None] - v[:, None, :]) ** 2)), (given["v"],))


class Reshape(Workload):
    """Rows through the reshaping of white noise to the scatter of smooth curves, of full rank."""

    rate_unit = "GF/s"
    memory_bound = True
    peer_name, parity = "torch.matmul", {"reshaped": 1e-6}
    standardise: ClassVar[bool] = False

    def counts(self) -> tuple[int, int]:
        return 8 * self.values + 4 * self.shape[0] ** 2, 2 * self.values * self.shape[0]

    def reshaping(self) -> Any:
        """Return the matrix, as the library has it."""
        d = self.shape[0]
        curves = fd.data.harmonic_curves(4 * d, points=d)
        target = fd.covariance.scatter(curves, normalise=True) + 1e-2 * np.eye(d)
        return fd.covariance.reshaping(np.eye(d), target)

    def inputs(self) -> Arrays:
        return {"x": white(self.n, self.shape), "matrix": self.reshaping().matrix.astype(np.float32)}

    def ours(self, be: Any) -> Work:
        x, reshaping = white(self.n, self.shape), self.reshaping()
        given = be.asarray(x)

        def check(y: Any) -> None:
            assert y.shape == x.shape
            exact = x[:100] @ reshaping.matrix
            if self.standardise:
                exact = (exact - exact.mean(axis=1, keepdims=True)) / exact.std(axis=1, keepdims=True)
            np.testing.assert_allclose(y[:100], exact, rtol=0, atol=1e-5 * np.abs(exact).max())

        return Work(lambda: reshaping.apply(given, standardise=self.standardise, backend=be), check)

    def operation(self, be: Any) -> Run:
        from fastdiff.backends import RowMap

        x, out = be.asarray(white(self.n, self.shape)), be.empty((self.n, *self.shape))
        plan = RowMap(left=self.reshaping().matrix, standardise=self.standardise)
        return fills(out, lambda: be.map_rows(x, out, plan))

    def twin(self, be: Any, twins: Any) -> Run | None:
        from fastdiff.backends.cuda import CudaBackend

        return None if self.standardise else self.operation(CudaBackend(be.runtime, "numba"))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        return PeerWork(torch.matmul, (given["x"], given["matrix"]))


class Standardise(Reshape):
    """The same, and every row then has mean 0 and deviation 1."""

    tolerance = 1e-5
    peer_name = "torch: matmul, mean, std, subtract, divide"
    parity: ClassVar[dict[str, float]] = {"standardised": 1e-5}  # rows of small deviation are divided by it
    standardise = True

    def counts(self) -> tuple[int, int]:
        moved, work = super().counts()
        return moved, work + 5 * self.values

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        def reshape(x: Any, matrix: Any) -> Any:
            y = torch.matmul(x, matrix)
            y = y - y.mean(1, keepdim=True)
            return y / y.std(1, correction=0, keepdim=True)

        return PeerWork(reshape, (given["x"], given["matrix"]))


class ShapedNoise(Reshape):
    """White noise drawn and reshaped at once."""

    draws = 1
    peer_name = "torch: randn, matmul"
    parity: ClassVar[dict[str, float]] = {"shaped": 1e-6}

    def counts(self) -> tuple[int, int]:
        return 4 * self.values + 4 * self.shape[0] ** 2, super().counts()[1]

    def inputs(self) -> Arrays:
        return {"matrix": self.reshaping().matrix.astype(np.float32)}

    def ours(self, be: Any) -> Work:
        from fastdiff.backends import RowMap

        plan, shape = RowMap(left=self.reshaping().matrix), (self.n, *self.shape)
        draw = fd.noise.Draw(0, fd.noise.Stream.FORWARD)

        def run() -> Any:
            out = be.empty(shape)
            be.mapped_normal(out, plan, draw)
            return out

        def check(y: Any) -> None:
            assert y.shape == shape
            exact = fd.normal((min(100, self.n), *self.shape), seed=0).astype(np.float64) @ plan.left
            np.testing.assert_allclose(y[:100], exact, rtol=0, atol=1e-5 * np.abs(exact).max())

        return Work(run, check)

    def operation(self, be: Any) -> Run:
        return self.ours(be).run

    def twin(self, be: Any, twins: Any) -> None:
        return None

    def noise(self, be: Any, result: Any) -> Any:
        return drawn(be, result.shape, "forward")[None]

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        matrix, shape = given["matrix"], (self.n, *self.shape)
        return PeerWork(lambda matrix: torch.matmul(torch.randn(shape, device=matrix.device), matrix), (matrix,))


class PosteriorMean(Workload):
    """The exact denoiser of rows of data, at one timestep."""

    rate_unit = "GF/s"
    example_values, tolerance = 6400, 1e-4
    peer_name, peer_samples = "torch: addmm, softmax, matmul", 100
    parity: ClassVar[dict[str, float]] = {"posterior": 1e-4}  # the peer's squares cancel

    def counts(self) -> tuple[int, int]:
        # and as many exponentials as states and rows
        return 8 * self.values + 4 * DATA_ROWS * self.shape[0], 6 * self.values * DATA_ROWS

    def inputs(self) -> Arrays:
        s, rng = curve_schedule(), np.random.default_rng(0)
        data = rng.standard_normal((DATA_ROWS, *self.shape), np.float32)
        signal, noise = s.signal[DATA_STEP], s.noise[DATA_STEP]
        x = signal * data[rng.integers(0, DATA_ROWS, self.n)] + noise * white(self.n, self.shape)
        return {"x": x.astype(np.float32), "data": data, "levels": np.array([signal, noise])}

    def ours(self, be: Any) -> Work:
        x, data, (signal, noise) = self.inputs().values()
        denoiser = fd.denoisers.Empirical(data, curve_schedule(), prediction="x0")
        given = be.asarray(x)

        def check(x0: Any) -> None:
            assert x0.shape == x.shape
            gaps = np.square((x[:10, None] - signal * data) / noise, dtype=np.float64).sum(axis=2)
            weights = np.exp(0.5 * (gaps.min(axis=1, keepdims=True) - gaps))
            exact = weights @ data / weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(x0[:10], exact, rtol=0, atol=1e-4)

        return Work(lambda: denoiser.predict(given, DATA_STEP, backend=be), check)

    def operation(self, be: Any) -> Run:
        x, data, levels = self.inputs().values()
        given, out, log_sum = (be.asarray(x), be.asarray(data)), be.empty(x.shape), be.empty((self.n,))
        signal, noise = (np.full(self.n, level) for level in levels)
        return fills(out, lambda: be.posterior_mean(*given, signal, noise, out, log_sum))

    def peer(self, torch: Any, given: Arrays) -> PeerWork:
        signal, noise = given["levels"].tolist()

        def mean(x: Any, data: Any) -> Any:
            squares = (signal * signal * data.square().sum(1))[None]  # |x|^2 is the same for all rows
            exponents = torch.addmm(squares, x, data.T, beta=-0.5 / noise**2, alpha=signal / noise**2)
            return torch.matmul(torch.softmax(exponents, 1), data)

        return PeerWork(mean, (given["x"], given["data"]))
