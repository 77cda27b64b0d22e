"""The work of `gpu.py` in PyTorch on a GPU: as it stands, compiled, and compiled and replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Run = Callable[[], Any]
DEVICE = "cuda"
WARM = 3  # calls before a capture


def ways(eager: Run, compiled: Run) -> dict[str, Run]:
    """Return the three ways of a piece of work; the last one is captured when it is first called."""
    return {"eager": eager, "compiled": compiled, "graphs": _Replayed(compiled)}


class _Replayed:
    """A function without arguments as one CUDA graph."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.graph: Any = None

    def __call__(self) -> None:
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        self.graph.replay()


def device(array: Any) -> Any:
    """A NumPy array on the GPU."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def normals(n: int, width: int) -> dict[str, Run]:
    """Return ways to draw normals."""
    out = torch.empty(n, width, device=DEVICE)
    return {"eager": out.normal_}


def _noised(x0: Any, t: Any, signal: Any, noise: Any, eps: Any) -> tuple[Any, Any]:
    return signal[t] * x0 + noise[t] * eps, eps


def forward(x0: Any, t: Any, signal: Any, noise: Any, eps: Any) -> tuple[dict[str, Run], Any]:
    """Return ways to noise a batch, and x_t for the given noise."""
    x0, t, eps = device(x0), device(t), device(eps)
    signal, noise = (device(np.asarray(v, np.float32))[:, None] for v in (signal, noise))

    def work(x0: Any, t: Any, signal: Any, noise: Any) -> tuple[Any, Any]:
        return _noised(x0, t, signal, noise, torch.randn_like(x0))

    fast = torch.compile(work)
    x_t = _noised(x0, t, signal, noise, eps)[0].cpu().numpy()
    return ways(lambda: work(x0, t, signal, noise), lambda: fast(x0, t, signal, noise)), x_t


def step(x: Any, out: Any, row: Any, clip: tuple[float, float], z: Any) -> tuple[dict[str, Run], Any]:
    """Return ways to take a DDPM step with clipping, and x for the given noise."""
    x, out, z = device(x), device(out), device(z)

    def formula(x: Any, out: Any, z: Any) -> Any:
        x0 = (row.p * x + row.q * out).clamp(*clip)
        return row.a * x + row.b * x0 + row.s * z

    def work(x: Any, out: Any) -> Any:
        return formula(x, out, torch.randn_like(x))

    fast = torch.compile(work)
    return ways(lambda: work(x, out), lambda: fast(x, out)), formula(x, out, z).cpu().numpy()


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[dict[str, Run], Any]:
    """Return ways to do a piece of work on arrays of the device, and what it makes of them."""
    fast = torch.compile(work)
    return ways(lambda: work(*arguments), lambda: fast(*arguments)), work(*arguments).cpu().numpy()


def similarity(v: Any) -> tuple[dict[str, Run], Any]:
    """Return ways to compare the points of every curve with each other, and the result."""
    return _timed(lambda v: torch.exp(-((v[:, :, None] - v[:, None, :]) ** 2)), device(v))


def reshape(x: Any, matrix: Any, standardise: bool) -> tuple[dict[str, Run], Any]:
    """Return ways to multiply rows by a matrix, and to standardise the results, and the result."""

    def work(x: Any, matrix: Any) -> Any:
        y = torch.matmul(x, matrix)
        if standardise:
            y = y - y.mean(1, keepdim=True)
            y = y / y.std(1, correction=0, keepdim=True)
        return y

    return _timed(work, device(x), device(np.asarray(matrix, np.float32)))


def shaped(z: Any, matrix: Any) -> tuple[dict[str, Run], Any]:
    """Return ways to draw noise and to multiply it by a matrix, and the result for the given noise."""
    z, matrix = device(z), device(np.asarray(matrix, np.float32))

    def work(z: Any, matrix: Any) -> Any:
        return torch.matmul(torch.randn_like(z), matrix)

    return _timed(work, z, matrix)[0], torch.matmul(z, matrix).cpu().numpy()


def posterior(x: Any, data: Any, signal: float, noise: float) -> tuple[dict[str, Run], Any]:
    """Return ways to compute posterior means by products, the squares being expanded, and the result."""

    def work(x: Any, data: Any) -> Any:
        squares = (signal * signal * data.square().sum(1))[None]  # |x|^2 is the same for all rows
        exponents = torch.addmm(squares, x, data.T, beta=-0.5 / noise**2, alpha=signal / noise**2)
        return torch.matmul(torch.softmax(exponents, 1), data)

    return _timed(work, device(x), device(data))


def network(case: Any, weights: dict[str, Any], T: int, hidden: tuple[int, ...], features: Any) -> Any:
    """Return the network of a case with our weights, on the GPU."""
    import peer_nets

    if case.net == "tutorial":
        net: Any = peer_nets.Tutorial(case.shape[0], T)
    else:
        net = peer_nets.Modulated(case.shape[0], hidden, torch.from_numpy(features))
    return peer_nets.load(net, weights).to(DEVICE)


def output(net: Any, x: Any, t: int) -> Any:
    """Return what a network says to x at one timestep."""
    with torch.no_grad():
        return net(device(x), torch.full((len(x),), t, device=DEVICE)).cpu().numpy()


def chain(net: Any, betas: Any, n: int, width: int) -> dict[str, Run]:
    """Return ways to draw samples by DDPM."""
    import peer_nets

    rows = peer_nets.coefficients(betas)
    steps = [torch.tensor([row[0]], device=DEVICE) for row in rows]
    table = torch.tensor([row[1:] for row in rows], dtype=torch.float32, device=DEVICE)

    def eager_step(x: Any, t: Any, row: Any) -> Any:
        return row[0] * x + row[1] * net(x, t) + row[2] * torch.randn_like(x)

    fast_step = torch.compile(eager_step)

    def sample(one_step: Callable[..., Any]) -> Any:
        with torch.no_grad():
            x = torch.randn(n, width, device=DEVICE)
            for t, row in zip(steps, table, strict=True):
                x = one_step(x, t, row)
        return x

    return ways(lambda: sample(eager_step), lambda: sample(fast_step))


def training(net: Any, X: Any, betas: Any, batch: int) -> dict[str, Run]:
    """Return ways to take one training step: draws, noising, loss, gradient, clipping, AdamW. No loss is read."""
    X = device(X)
    abar = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    signal, noise = abar.sqrt().float().to(DEVICE)[:, None], (1 - abar).sqrt().float().to(DEVICE)[:, None]
    parameters = list(net.parameters())

    def loss_of(rows: Any, t: Any, eps: Any) -> Any:
        return F.mse_loss(net(_noised(X[rows], t, signal, noise, eps)[0], t), eps)

    fast_loss = torch.compile(loss_of)

    def stepper(loss: Callable[..., Any], optimizer: Any) -> Run:
        def run() -> None:
            rows = torch.randint(len(X), (batch,), device=DEVICE)
            t = torch.randint(len(signal), (batch,), device=DEVICE)
            eps = torch.randn(batch, X.shape[1], device=DEVICE)
            optimizer.zero_grad()
            loss(rows, t, eps).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return run

    eager = stepper(loss_of, torch.optim.AdamW(parameters, lr=1e-3))
    fast = stepper(fast_loss, torch.optim.AdamW(parameters, lr=1e-3, fused=True, capturable=True))
    return ways(eager, fast)
