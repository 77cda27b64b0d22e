"""The work of `gpu.py` in PyTorch on a GPU: as it stands, compiled, and compiled and replayed as one CUDA graph.

Image networks are those of diffusers. Their ways are named as in `gpu.IMAGE_WAYS`, and come as functions that make
them, because that is where a minute of compiling goes; the results that are compared are computed without TF32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import peer_nets as nets
import torch
from peer_nets import drawing
from torch import nn
from torch.nn import functional as F

from fastdiff.bench.workload import PeerWork, Run

__all__ = ["drawing", "nets"]  # for `fastdiff.bench`
Make = Callable[[], tuple[Run, Any]]  # makes what is timed, and computes what is compared
DEVICE = "cuda"
WARM = 3  # calls before a capture
torch.backends.cudnn.benchmark = True  # as who wants speed sets it


def ways(work: PeerWork) -> dict[str, Run]:
    """Return the three ways of a piece of work; the last one is captured when it is first called."""
    return three_ways(work.run, PeerWork(torch.compile(work.function), work.tensors).run)


def three_ways(eager: Run, compiled: Run) -> dict[str, Run]:
    """Return the three ways, given the first two."""
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


def release() -> None:
    """Give back what a case has left: compiled functions, which share a limit, and memory."""
    torch.compiler.reset()
    torch.cuda.empty_cache()


def device(array: Any) -> Any:
    """A NumPy array on the GPU."""
    return nets.tensor(array).to(DEVICE)


def on_gpu(net: Any) -> Any:
    """Return a network on the GPU."""
    return net.to(DEVICE)


def chain(net: Any, betas: Any, n: int, width: int) -> dict[str, Run]:
    """Return ways to draw samples by DDPM."""
    rows = nets.coefficients(betas)
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

    return three_ways(lambda: sample(eager_step), lambda: sample(fast_step))


def training(net: Any, X: Any, betas: Any, batch: int) -> dict[str, Run]:
    """Return ways to take one training step: draws, noising, loss, gradient, clipping, AdamW. No loss is read."""
    X, parameters, loss = device(X), list(net.parameters()), _loss(betas, X.ndim)

    def loss_of(x0: Any, t: Any, eps: Any) -> Any:
        return loss(net, x0, t, eps)

    eager = _stepper(loss_of, X, len(betas), batch, parameters, torch.optim.AdamW(parameters, lr=1e-3))
    fast = _stepper(torch.compile(loss_of), X, len(betas), batch, parameters, _fast_adamw(parameters))
    return three_ways(eager, fast)


def _loss(betas: Any, ndim: int) -> Callable[..., Any]:
    """The loss of a network on samples in so many dimensions, timesteps and noise."""
    signal, noise = (level.to(DEVICE) for level in nets.levels(betas, ndim))

    def loss(net: Any, x0: Any, t: Any, eps: Any) -> Any:
        return F.mse_loss(net(signal[t] * x0 + noise[t] * eps, t), eps)

    return loss


def _fast_adamw(parameters: list[Any]) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True, capturable=True)


def _stepper(loss: Callable[..., Any], X: Any, T: int, batch: int, parameters: list[Any], optimizer: Any) -> Run:
    """Return a training step: draws, loss, gradient, clipping, optimiser."""

    def run() -> None:
        rows = torch.randint(len(X), (batch,), device=DEVICE)
        t = torch.randint(T, (batch,), device=DEVICE)
        eps = torch.randn(batch, *X.shape[1:], device=DEVICE)
        optimizer.zero_grad()
        loss(X[rows], t, eps).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return run


# -- image networks ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Convolutions and products in float32 proper."""
    saved = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = saved


def _nchw(array: Any) -> Any:
    """Our images on the GPU, in the memory that they have: channels-last."""
    return nets.nchw(array).to(DEVICE)


def _nhwc(tensor: Any) -> Any:
    return nets.nhwc(tensor.detach().float().cpu())


Form = tuple[Callable[..., Any], dict[str, Any]]  # a function, and the parameters of its network


def _forms(folder: Any, work: Callable[[Any], Callable[..., Any]]) -> dict[str, Form]:
    """What `work` returns for a network, in all forms but those replayed as one graph."""
    plain, last = (nets.Pictures(folder).to(DEVICE) for _ in range(2))
    plain.unet.to(memory_format=torch.contiguous_format)

    def contiguous(x: Any, t: Any) -> Any:
        return plain.unet(x.contiguous(), t).sample

    def half(x: Any, t: Any) -> Any:
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            return last(x, t)

    reduced = torch.compile(work(last), mode="reduce-overhead")

    def once(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return reduced(*arguments).clone()  # the next call writes there again

    forms = {
        "eager": work(contiguous), "channels": work(last), "compiled": torch.compile(work(last)), "reduced": once,
        "bf16": work(half), "bf16-graphs": torch.compile(work(half)),
    }  # fmt: skip
    of_plain, of_last = (dict(net.unet.named_parameters()) for net in (plain, last))
    return {name: (form, of_plain if name == "eager" else of_last) for name, form in forms.items()}


def _makers(make: dict[str, Make]) -> dict[str, Make]:
    """What makes the forms, each once, and those as one graph."""
    forms = {name: cache(once) for name, once in make.items()}

    def replayed(name: str) -> tuple[Run, Any]:
        run, result = forms[name]()
        return _Replayed(run), result

    return forms | {"graphs": partial(replayed, "compiled"), "bf16-graphs": partial(replayed, "bf16-graphs")}


def image_forward(folder: Any, x: Any, t: Any) -> dict[str, Make]:
    """Return ways of a forward pass; compared is the output."""
    x, t = _nchw(x), device(t)

    def make(form: Callable[..., Any]) -> tuple[Run, Any]:
        def forward() -> Any:
            with torch.no_grad():
                return form(x, t)

        with exactly():
            return forward, _nhwc(forward())

    return _makers({name: partial(make, form) for name, (form, _) in _forms(folder, lambda net: net).items()})


def image_training(folder: Any, X: Any, betas: Any, batch: int, example: tuple[Any, Any, Any]) -> dict[str, Make]:
    """Return ways of a training step; compared is the gradient for x0, t and noise.

    A gradient is one vector, the parameters in the order of their names.
    """
    loss, X = _loss(betas, X.ndim), _nchw(X)
    given = _nchw(example[0]), device(example[1]), _nchw(example[2])

    def work(net: Any) -> Callable[..., Any]:
        return lambda x0, t, eps: loss(net, x0, t, eps)

    forms = _forms(folder, work)
    weights = {key: value.detach().clone() for key, value in forms["eager"][1].items()}

    def make(name: str) -> tuple[Run, Any]:
        form, by_name = forms[name]
        for key, parameter in by_name.items():  # another way may have trained them
            parameter.grad = None
            parameter.data.copy_(weights[key])
        with exactly():
            form(*given).backward()
        gradient = torch.cat([by_name[key].grad.reshape(-1) for key in sorted(by_name)]).cpu().numpy()
        parameters = list(by_name.values())
        for parameter in parameters:
            parameter.grad = None
        optimizer = torch.optim.AdamW(parameters, lr=1e-3) if name == "eager" else _fast_adamw(parameters)
        return _stepper(form, X, len(betas), batch, parameters, optimizer), gradient

    return _makers({name: partial(make, name) for name in forms})


def image_sampling(folder: Any, start: Any, few: Any, rows: Any, clip: tuple[float, float]) -> dict[str, Make]:
    """Return ways to draw pictures by rows of a table; compared are those after `few` rows from given noise."""
    start = _nchw(start)

    def work(net: Any) -> Callable[..., Any]:
        def step(x: Any, t: Any, row: Any) -> Any:
            out = net(x, t.expand(len(x)))
            x0 = (row[0] * x + row[1] * out).clamp(*clip)
            return row[2] * x + row[3] * x0 + row[7] * out  # DDIM remembers no x0 and draws no noise

        return step

    def run(form: Callable[..., Any], rows: Any) -> Callable[[Any], Any]:
        steps = [torch.tensor([row.t], device=DEVICE) for row in rows]
        table = torch.tensor([row[1:] for row in rows], dtype=torch.float32, device=DEVICE)

        def sample(x: Any) -> Any:
            with torch.no_grad():
                for t, row in zip(steps, table, strict=True):
                    x = form(x, t, row)
            return x

        return sample

    forms = {name: form for name, (form, _) in _forms(folder, work).items()}

    def make(form: Callable[..., Any]) -> tuple[Run, Any]:
        sample = run(form, rows)
        with exactly():  # one call of the form: a second one of "reduced" would be recorded, without TF32 for good
            pictures = run(forms["eager"], few[1:])(run(form, few[:1])(start))
        return lambda: sample(torch.randn_like(start)), _nhwc(pictures)

    return _makers({name: partial(make, form) for name, form in forms.items()})


def layer(work: PeerWork) -> dict[str, Make]:
    """Return ways of a layer alone; compared is what it makes of our arrays, in our layout and as one vector.

    With `eager`, images lie plane by plane, in all other ways channels-last. In bf16 the inputs are bf16 already.
    """
    last = work.tensors
    planes = tuple(
        tensor.contiguous() if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) else tensor
        for tensor in last
    )
    half = tuple(tensor.bfloat16() for tensor in last)

    def make(function: Callable[..., Any], tensors: tuple[Any, ...]) -> tuple[Run, Any]:
        run = torch.no_grad()(lambda: function(*tensors))
        with exactly():
            result = run()
            parts = result if isinstance(result, tuple) else (result,)
            return run, np.concatenate([part.float().reshape(-1).cpu().numpy() for part in parts])

    fast = torch.compile(work.function)
    forms = {
        "eager": (work.function, planes), "channels": (work.function, last), "compiled": (fast, last),
        "bf16": (work.function, half), "bf16-graphs": (fast, half),
    }  # fmt: skip
    return _makers({name: partial(make, *form) for name, form in forms.items()})
