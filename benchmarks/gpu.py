"""What ``make gpu`` times on a GPU: the cases, the ways to do each, their times and the table of them.

The times of our kernels stand beside a device-to-device copy of the same run and, where torch is installed, beside
PyTorch: as it stands, compiled, and compiled and replayed as a CUDA graph. Image networks and their layers are timed in
float32 and in bf16, by our own convolutions and, where the extra `cudnn` is installed, by cuDNN's; the network of
PyTorch is that of diffusers, also in channels-last memory, in compile's mode "reduce-overhead" and under bf16 autocast.
In float32 PyTorch's convolutions are left TF32, its default, and ours do without; only where results are compared
neither has it.

A time is what one call takes in a row of calls that is waited for at its end, arguments and results on the device.
All ways take turns; the table shows medians of the rounds. What is bound by memory, or could be, is compared with the
bandwidth of the copy by the bytes that have to cross memory.

`gpu_run.py` is the program, ``python benchmarks/gpu.py`` starts it, and `gpu_worker.py` its side that touches the GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bare  # noqa: F401 - so that the others are found
import cases
import numpy as np
from readme_numbers import duration

from fastdiff.bench import GROUPS, HEAD

ROUNDS, TURN = 7, 0.3  # seconds of calls in one turn
COPY_BYTES = 1 << 30
WAYS = {"eager": "PyTorch", "compiled": "compiled", "graphs": "compiled, CUDA graph"}
IMAGE_WAYS = {
    "eager": "PyTorch", "channels": "channels-last", "compiled": "compiled", "reduced": "reduce-overhead",
    "graphs": "compiled, CUDA graph", "bf16": "bf16", "bf16-graphs": "bf16, compiled, CUDA graph",
}  # fmt: skip
BEST = ("graphs", "bf16-graphs", "reduced")  # of these the fastest, against the fastest of ours
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-bf16": {"precision": "bf16"},
    "ours-cudnn": {"convolutions": "cudnn"},
    "ours-cudnn-bf16": {"precision": "bf16", "convolutions": "cudnn"},
}
OPTIONAL = ("cupy", "numba-cuda", "torch", "diffusers", "nvidia-cudnn-frontend")
OUR_TITLES = {"ours": "ours", "ours-bf16": "bf16", "ours-cudnn": "cuDNN", "ours-cudnn-bf16": "cuDNN, bf16"}
TRAINING_UNITS = 100  # steps of a call, whose end brings the state to the host


@dataclass(frozen=True)
class Sampling(cases.Case):
    """Sampling by DDIM in so many steps."""

    steps: int = 50

    @property
    def operations(self) -> int:
        return super().operations // cases.DDIM_STEPS * self.steps


def at_batch(name: str, n: int) -> cases.Case:
    """A case of another batch, by the name that begins like its own."""
    case = cases.BY_NAME[name]
    return replace(
        case, name=name.replace(str(case.n), str(n), 1), title=case.title.replace(str(case.n), str(n), 1), n=n
    )


PICTURE = (32, 32, 3)
CASES = (
    cases.BY_NAME["normals-48x1000000"],
    cases.BY_NAME["forward-1000000x50"],
    cases.BY_NAME["step-64x256x256x3"],
    cases.BY_NAME["chain-tutorial-1000"],
    replace(
        cases.BY_NAME["chain-tutorial-100000"],
        name="chain-tutorial-1000000",
        title="100-step chain, tutorial MLP, n = 1,000,000",
        n=1_000_000,
    ),
    cases.BY_NAME["chain-default-100000"],
    cases.BY_NAME["train-tutorial-1000"],
    cases.BY_NAME["train-tutorial-8192"],
    cases.BY_NAME["train-default-1000"],
    cases.BY_NAME["similarity-4096x128"],
    cases.BY_NAME["reshape-1000000x128"],
    cases.BY_NAME["standardise-1000000x128"],
    cases.BY_NAME["shaped-1000000x128"],
    replace(
        cases.BY_NAME["posterior-1000x10000x64"],
        name="posterior-16384x10000x64",
        title="denoiser of 10,000 x 64 data, 16,384 states",
        n=16_384,
    ),
    replace(cases.BY_NAME["unet-train-16"], units=TRAINING_UNITS),
    replace(at_batch("unet-train-16", 256), units=TRAINING_UNITS),
    cases.BY_NAME["unet-forward-16"],
    Sampling("unet-ddim-50-16", "50 DDIM steps, U-Net, 32 x 32 x 3, n = 16", "unet-ddim", 16, PICTURE, "unet"),
    at_batch("norm-64x32x32x64", 1024),
    cases.BY_NAME["attention-16x256x128"],
    at_batch("attention-16x256x128", 512),
    *(
        at_batch(f"{what}-16x{shape}", n)
        for what, shapes in {
            "conv": ("32x32x64", "16x16x128", "8x8x256"),
            "conv-back": ("32x32x64", "16x16x128"),
        }.items()
        for shape in shapes
        for n in (16, 256)
    ),
)
# What must be reached: a share of the copy's bandwidth, and times of the ways through ours; "best": see `BEST`.
WANTED: dict[str, dict[str, float]] = {
    "forward-1000000x50": {"copy": 0.85, "eager": 3.0, "compiled": 1.2},
    "step-64x256x256x3": {"copy": 0.85, "eager": 3.0, "compiled": 1.2},
    "chain-tutorial-1000000": {"graphs": 5.0},
    "train-tutorial-1000": {"eager": 3.0},
    "unet-train-16": {"best": 1.5},
    "unet-train-256": {"best": 0.9},
    "unet-ddim-50-16": {"best": 2.0},
    "norm-1024x32x32x64": {"copy": 0.8},
}
MEMORY_BOUND = ("normals", "forward", "step", "similarity", "reshape", "standardise", "shaped", "norm")
IMAGES = ("unet", "unet-training", "unet-ddim", "norm", "attention", "conv", "conv-backward")
SAME = 1e-4  # largest difference of the two sides' results on the same inputs, through the largest value
SAME_IMAGES, SAME_BF16 = 1e-4, 0.1  # of image networks, in the Euclidean norm, since a step may amplify one value much
EXAMPLE_DDIM = 2  # steps that are compared: an untrained network almost doubles a difference at each


# In the order of what matters: the mission's kernels, the marks, what `CASES` has besides.
FIRST = (
    "forward-1000000x50", "step-64x256x256x3", "reshape-1000000x128", "chain-tutorial-1000000", "train-tutorial-1000",
    "unet-train-16", "unet-ddim-50-16", "norm-1024x32x32x64", "unet-train-256",
)  # fmt: skip

Run = Callable[[], Any]


class Ways(NamedTuple):
    """The ways to do one piece of work, as functions that make them, and how many units of it one call does."""

    makers: dict[str, Callable[[], Run]]
    units: dict[str, int]


def in_order(names: list[str]) -> list[str]:
    """Return names of cases, those of `FIRST` in front."""
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def deciding(case: cases.Case) -> tuple[str, ...]:
    """The ways of PyTorch that the marks of a case are about."""
    wanted = WANTED.get(case.name, {})
    return (*(BEST if "best" in wanted else ()), *(name for name in wanted if name in WAYS))


# -- the work ------------------------------------------------------------------------------------------------------


def agree(name: str, ours: Any, theirs: Any) -> None:
    """Raise where two results on the same inputs differ."""
    _agree(name, float(np.abs(ours - theirs).max() / np.abs(theirs).max()), SAME)


def _agree(name: str, error: float, allowed: float) -> None:
    if not error <= allowed:  # NaN fails
        raise AssertionError(f"{name}: ours and PyTorch's differ by {error:.3g}, allowed are {allowed:g}")


def compared(
    case: cases.Case,
    ours: dict[str, Callable[[], Run]],
    result: Callable[[str], Any],
    theirs: dict[str, Callable[[], tuple[Run, Any]]],
) -> dict[str, Callable[[], Run]]:
    """Return makers of the ways of image networks; where there is PyTorch, each compares with it as it stands.

    `result` computes what ours of a name makes of the inputs that all share.
    """

    def check(name: str, found: Any) -> None:
        reference = theirs["eager"]()[1]
        error = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
        _agree(f"{case.name}, {name}", error, SAME_BF16 if "bf16" in name else SAME_IMAGES)

    def our(name: str) -> Run:
        if theirs:
            check(name, result(name))
        return ours[name]()

    def their(name: str) -> Run:
        run, found = theirs[name]()
        check(name, found)
        return run

    return {name: partial(our, name) for name in ours} | {name: partial(their, name) for name in theirs}


def sides(be: Any) -> dict[str, Any]:
    """Return the backends that take a turn: `be`, and others on its runtime."""
    from fastdiff.backends.cuda import CudaBackend
    from fastdiff.errors import BackendError

    found = {"ours": be}
    for name, options in OURS.items():
        if options:
            try:
                found[name] = CudaBackend(be.runtime, **options)
            except BackendError as error:  # no cuDNN, or none that starts
                if "convolutions" not in options:
                    raise
                print(f"{name}: left out: {error}", flush=True)
    return found


def prepare(be: Any, case: cases.Case, peers: Any, twins: Any) -> Ways:
    """Make the arrays of a case on the device; return what makes the ways that are to be timed.

    That both sides agree is checked here, or where it takes compiling by the maker of a way. Ours come first, then
    PyTorch as it stands, which the others are compared with, then what decides a mark. `peers` is the module
    `gpu_peers` or None, `twins` the module with the Numba kernels or None.
    """
    ways = {
        "normals": _normals, "forward": _forward, "step": _step, "chain": _chain, "training": _training,
        "similarity": _similarity, "reshape": _reshape, "standardise": _reshape, "shaped": _shaped,
        "posterior": _posterior, "unet": _unet, "unet-training": _unet_training, "unet-ddim": _unet_ddim,
        "norm": _layer, "attention": _layer, "conv": _layer, "conv-backward": _layer,
    }  # fmt: skip
    makers, units = ways[case.kind](be, case, peers, twins)
    order = [name for name in (*OURS, "eager", *deciding(case), *makers) if name in makers]
    makers = {name: makers[name] for name in order}
    return Ways(makers, {name: units if name in OURS else 1 for name in makers})


Prepared = tuple[dict[str, Callable[[], Run]], int]


def _ready(runs: dict[str, Run], units: int = 1) -> Prepared:
    """Ways that need no making."""
    return {name: partial(lambda run: run, run) for name, run in runs.items()}, units


def _normals(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    from fastdiff.noise import Draw, Stream

    del twins
    shape = (case.n, case.values // case.n)
    out, draw = be.empty(shape), Draw(0, Stream.INIT)
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: be.normal(out, draw)}
    return _ready(runs | (peers.normals(*shape) if peers else {}))


def _forward(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd

    x0, t, s = cases.noising(fd, case)
    arrays = be.asarray(x0), be.asarray(t, np.int64)
    out, eps = be.empty(x0.shape), be.empty(x0.shape)
    draw = fd.noise.Draw(0, fd.noise.Stream.FORWARD)

    def ours() -> None:
        be.forward_noise(*arrays, s.signal, s.noise, out, eps, draw)

    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    if twins:
        tables = be.asarray(s.signal), be.asarray(s.noise)
        runs["twin"] = lambda: twins.forward_noise(*arrays, *tables, out, eps, draw, queue=be.runtime.queue())
    if peers:
        ours()
        theirs, x_t = peers.forward(x0, t, s.signal, s.noise, be.to_numpy(eps))
        agree(case.name, be.to_numpy(out), x_t)
        runs |= theirs
    return _ready(runs)


def _step(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd

    host_x, host_out, row, clip = cases.image_step(fd, case)
    x, out = be.asarray(host_x), be.asarray(host_out)
    seeds = itertools.count(1)  # the same noise again and again would add up
    draw = fd.noise.Draw(0, fd.noise.Stream.STEP, row.t)

    def ours() -> None:
        be.sampler_step(x, out, (), row, clip, draw._replace(seed=next(seeds)))

    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    if twins:
        runs["twin"] = lambda: twins.sampler_step(
            x, out, None, row, clip, draw._replace(seed=next(seeds)), queue=be.runtime.queue()
        )
    if peers:
        z = be.empty(host_x.shape)
        be.normal(z, draw)
        theirs, wanted = peers.step(host_x, host_out, row, clip, be.to_numpy(z))
        be.sampler_step(x, out, (), row, clip, draw)
        agree(case.name, be.to_numpy(x), wanted)
        runs |= theirs
    return _ready(runs)


def _peer_network(case: cases.Case, net: Any, peers: Any) -> Any:
    features = None if net.plan.features is None else net.plan.features.astype(np.float32)
    return peers.network(case, dict(net.params), cases.T, cases.HIDDEN, features)


def _chain(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd

    del twins
    net, s = cases.network(fd, case), cases.schedule(fd, case)
    sampler = fd.samplers.ddpm(s)
    params, x = be.asarray(net.flat), be.empty((case.n, *case.shape))

    def ours() -> None:
        be.normal(x, fd.noise.Draw(0, fd.noise.Stream.INIT))
        be.mlp_chain(net.plan, params, x, sampler.rows, sampler.clip, fd.noise.Draw(0, fd.noise.Stream.STEP))

    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    if peers:
        theirs = _peer_network(case, net, peers)
        few = np.random.default_rng(0).standard_normal((64, *case.shape), np.float32)
        t = be.asarray(np.full(64, cases.T // 2), np.int64)
        y = be.to_numpy(be.mlp_forward(net.plan, params, be.asarray(few), t))
        agree(case.name, y, peers.output(theirs, few, cases.T // 2))
        runs |= peers.chain(theirs, s.betas, case.n, case.shape[0])
    return _ready(runs)


def _training(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd

    del twins
    work = case.setup(be)
    work.check(work.run())
    runs: dict[str, Callable[[], Any]] = {"ours": work.run}
    if peers:
        net = _peer_network(case, cases.network(fd, case), peers)
        X = cases.curves(fd, case)
        X = (X - X.mean()) / X.std()
        runs |= peers.training(net, X, cases.schedule(fd, case).betas, case.n)
    return _ready(runs, work.units)


def _similarity(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    del twins
    host_v = cases.white_rows(case)
    v, out = be.asarray(host_v), be.empty((*host_v.shape, *case.shape))

    def ours() -> None:
        be.similarity(v, out)

    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    if peers:
        ours()
        theirs, wanted = peers.similarity(host_v)
        agree(case.name, be.to_numpy(out), wanted)
        runs |= theirs
    return _ready(runs)


def _reshape(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd
    from fastdiff.backends import RowMap
    from fastdiff.backends.cuda import CudaBackend

    standardise = case.kind == "standardise"
    host_x, plan = cases.white_rows(case), RowMap(left=cases.shape_of_noise(fd, case).matrix, standardise=standardise)
    x, out = be.asarray(host_x), be.empty(host_x.shape)

    def ours() -> None:
        be.map_rows(x, out, plan)

    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    if twins and not standardise:
        numba = CudaBackend(be.runtime, "numba")
        runs["twin"] = lambda: numba.map_rows(x, out, plan)
    if peers:
        ours()
        theirs, wanted = peers.reshape(host_x, plan.left, standardise)
        agree(case.name, be.to_numpy(out), wanted)
        runs |= theirs
    return _ready(runs)


def _shaped(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd
    from fastdiff.backends import RowMap

    del twins
    plan, out = RowMap(left=cases.shape_of_noise(fd, case).matrix), be.empty((case.n, *case.shape))
    draw = fd.noise.Draw(0, fd.noise.Stream.FORWARD)

    def ours() -> None:
        be.mapped_normal(out, plan, draw)

    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    if peers:
        ours()
        z = be.empty(out.shape)
        be.normal(z, draw)
        theirs, wanted = peers.shaped(be.to_numpy(z), plan.left)
        agree(case.name, be.to_numpy(out), wanted)
        runs |= theirs
    return _ready(runs)


def _posterior(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd

    del twins
    host_x, host_data, *levels = cases.posterior_of(fd, case)
    x, data = be.asarray(host_x), be.asarray(host_data)
    out, log_sum = be.empty(x.shape), be.empty((case.n,))
    signal, noise = (np.full(case.n, level) for level in levels)

    def ours() -> None:
        be.posterior_mean(x, data, signal, noise, out, log_sum)

    runs: dict[str, Callable[[], Any]] = {"ours": ours}
    if peers:
        ours()
        theirs, wanted = peers.posterior(host_x, host_data, *levels)
        agree(case.name, be.to_numpy(out), wanted)
        runs |= theirs
    return _ready(runs)


@contextlib.contextmanager
def _folder(net: Any, peers: Any) -> Iterator[Path | None]:
    """A folder with the network as diffusers reads it; None where there is nobody to read it."""
    if peers is None or importlib.util.find_spec("diffusers") is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        net.save_diffusers(folder)
        yield Path(folder)


def _unet(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd

    del twins
    net, host_x, host_t = cases.network(fd, case), cases.pictures(case, case.n), np.arange(case.n) % cases.IMAGE_T
    x, t = be.asarray(host_x), be.asarray(host_t, np.int64)

    def run(side: Any) -> Callable[[], Any]:
        return lambda: net.predict(x, t, backend=side)

    runs = {name: run(side) for name, side in sides(be).items()}
    with _folder(net, peers) as folder:
        theirs = peers.image_forward(folder, host_x, host_t) if folder else {}
    return compared(case, _ready(runs)[0], lambda name: be.to_numpy(runs[name]()), theirs), 1


def _unet_training(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd
    from fastdiff.backends.layers import Batch
    from fastdiff.interop import diffusers_views

    del twins
    all_sides, net, s = sides(be), cases.network(fd, case), cases.schedule(fd, case)
    X, rng = cases.pictures(case), np.random.default_rng(1)
    x0, t = X[:: max(1, len(X) // case.n)][: case.n], rng.integers(0, cases.IMAGE_T, min(case.n, len(X)))
    eps = rng.standard_normal(x0.shape, np.float32)

    def gradient(name: str) -> Any:
        x_t = be.asarray(s.signal[t][:, None, None, None] * x0 + s.noise[t][:, None, None, None] * eps, np.float32)
        grads = be.asarray(net.layout.zeros(np.float32))
        batch = Batch(x_t, be.asarray(t, np.int64), be.asarray(eps))
        net.runner(all_sides[name], be.asarray(net.flat)).gradient(batch, grads)
        views = diffusers_views(net, be.to_numpy(grads))
        return np.concatenate([views[name].reshape(-1) for name in sorted(views)])

    def make(side: Any) -> Run:
        work = cases.KINDS[case.kind].setup(fd, case, side)
        work.check(work.run())
        return work.run

    with _folder(net, peers) as folder:
        theirs = peers.image_training(folder, X, s.betas, case.n, (x0, t, eps)) if folder else {}
    return compared(case, {name: partial(make, side) for name, side in all_sides.items()}, gradient, theirs), case.units


def _unet_ddim(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    import fastdiff as fd
    from fastdiff.nn import NetworkDenoiser

    del twins
    net, all_sides = cases.network(fd, case), sides(be)
    assert isinstance(case, Sampling)

    def run(side: Any, steps: int) -> Callable[[], Any]:
        sampler = cases.ddim(fd, case, steps)
        denoiser = NetworkDenoiser(net, be.asarray(net.flat), sampler.prediction, side)  # weights there, as PyTorch's
        return lambda: fd.sample(denoiser, sampler, n=case.n, seed=0, backend=side)

    runs = {name: run(side, case.steps) for name, side in all_sides.items()}
    theirs = {}
    with _folder(net, peers) as folder:
        if folder:
            few, all_steps = cases.ddim(fd, case, EXAMPLE_DDIM), cases.ddim(fd, case, case.steps)
            start = fd.normal((case.n, *case.shape), seed=0, stream="init")
            theirs = peers.image_sampling(folder, start, few.rows, all_steps.rows, all_steps.clip)
    example = {name: run(side, EXAMPLE_DDIM) for name, side in all_sides.items()}
    return compared(case, _ready(runs)[0], lambda name: be.to_numpy(example[name]()), theirs), 1


def _layer(be: Any, case: cases.Case, peers: Any, twins: Any) -> Prepared:
    """A layer alone: as in a network, on arrays that stay where they are."""
    import fastdiff as fd

    del twins
    everybody = sides(be) if case.kind.startswith("conv") else {"ours": be}
    works = {name: cases.KINDS[case.kind].setup(fd, case, side).run for name, side in everybody.items()}

    def run(side: Any, work: Callable[[], Any]) -> Callable[[], Any]:
        return side.record(work).run

    def result(name: str) -> Any:
        return np.concatenate([be.to_numpy(part).reshape(-1) for part in _parts(works[name]())])

    runs = {name: run(side, works[name]) for name, side in everybody.items()}
    return compared(case, _ready(runs)[0], result, peers.layer(case.kind, **_arrays_of(case)) if peers else {}), 1


def _arrays_of(case: cases.Case) -> dict[str, Any]:
    """The inputs of a layer, as the set-up of its kind makes them."""
    if case.kind == "attention":
        length, channels = case.shape
        qkv = np.random.default_rng(0).standard_normal((case.n, length, 3 * channels), np.float32)
        return {"x": qkv, "heads": channels // HEAD}
    x, c = cases.white_rows(case), case.shape[-1]
    if case.kind == "norm":
        return {"x": x, "groups": GROUPS}
    w = np.random.default_rng(1).standard_normal((3, 3, c, c), np.float32) / np.float32((9 * c) ** 0.5)
    return {"x": x, "w": w, "dy": np.ascontiguousarray(x[::-1])}


def _parts(result: Any) -> tuple[Any, ...]:
    """The arrays of a result, but for the gradient of a bias, which is no convolution."""
    return result[:2] if isinstance(result, tuple) else (result,)


# -- timing --------------------------------------------------------------------------------------------------------


class DeadError(Exception):
    """The GPU takes no more work of this process; the message says since when."""


def make(
    ways: Ways,
    wait: Run,
    tell: Callable[[str], None] = lambda name: None,
    late: Callable[[], bool] = lambda: False,
    without: dict[str, str] | None = None,
) -> tuple[dict[str, Run], dict[str, str], list[str]]:
    """Make and warm the ways; return those that work, why others do not, and those there was no time for.

    `tell` gets the name of a way before it is made. Ways of PyTorch are not begun once it is `late`, but for PyTorch
    as it stands, which is quick. `without` says which ways not to make, and why.
    """
    runs: dict[str, Run] = {}
    failed = {name: why for name, why in (without or {}).items() if name in ways.makers}
    cut = []
    for name, maker in ways.makers.items():
        if name in failed:
            continue
        if name not in (*OURS, "eager") and late():
            cut.append(name)
            continue
        tell(name)
        try:
            run = maker()
            for _ in range(3):
                run()
            wait()
            runs[name] = run
        except Exception as error:  # noqa: BLE001 - of whatever kind: it is told, and the others are timed
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            check_alive(wait, error)
    if not runs.keys() & OURS.keys():
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    return runs, failed, cut


def check_alive(wait: Run, error: Exception) -> None:
    """Raise where an error has left nothing to go on with, as an illegal address does."""
    try:
        wait()
    except Exception as dead:
        raise DeadError(f"{type(error).__name__}: {error}") from dead


def turn(run: Run, wait: Run, seconds: float, calls: int = 1) -> float:
    """Return the time of one call: of as many in a row as take so many seconds, waited for at the end.

    `calls` is a guess of how many these are.
    """
    taken = 0.0
    while taken < seconds:
        if taken:
            calls = max(2 * calls, min(100 * calls, int(1.2 * calls * seconds / taken)))
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        taken = time.perf_counter() - start
    return taken / calls


def measure(runs: dict[str, Run], units: dict[str, int], wait: Run, seconds: float) -> Iterator[dict[str, float]]:
    """Yield the median times of a unit of every way, after one round of turns more each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    while True:
        for name, times in taken.items():
            calls = int(1.2 * seconds / (times[0] * units[name])) if times else 1
            times.append(turn(runs[name], wait, seconds, max(1, calls)) / units[name])
        yield {name: statistics.median(times) for name, times in taken.items()}


def row_of(
    case: cases.Case, seconds: dict[str, float], failed: dict[str, str], bandwidth: float, cut: list[str] | None = None
) -> dict[str, Any]:
    """Return a row of the results; `bandwidth` is that of the copy, in bytes a second.

    As long as a way was cut that decides a mark, the mark can be missed and not met.
    """
    image = case.kind in IMAGES
    fastest = min(value for name, value in seconds.items() if name in (OURS if image else ("ours",)))
    ratios = {name: value / fastest for name, value in seconds.items() if name in (IMAGE_WAYS if image else WAYS)}
    best = {"best": min(ratios[name] for name in BEST if name in ratios)} if set(BEST) & set(ratios) else {}
    share = {
        name: case.bytes / seconds[name] / bandwidth
        for name in ("ours", "twin")
        if case.kind in MEMORY_BOUND and name in seconds
    }
    reached = ratios | ({"copy": share["ours"]} if share else {}) | (best if image else {})
    wanted, cut = WANTED.get(case.name, {}), cut or []
    if set(BEST) & set(cut) and reached.get("best", 0) >= wanted.get("best", 0):
        reached.pop("best", None)
    return {
        "name": case.name,
        "kind": case.kind,
        "title": case.title,
        "bytes": case.bytes,
        "operations": case.operations,
        "seconds": seconds,
        "ratios": ratios,
        "share of copy": share,
        "wanted": wanted,
        "reached": {name: reached[name] for name in wanted if name in reached},
        "missed": sorted(name for name, least in wanted.items() if name in reached and reached[name] < least),
        "unknown": sorted(set(wanted) - set(reached)),
        "failed": failed,
        "cut": cut,
    }


def companions() -> tuple[Any, Any]:
    """Return the modules `gpu_peers` and `numba_twins`, or None where what they need is not installed."""
    peers: Any = None
    if importlib.util.find_spec("torch") is not None:
        import gpu_peers as peers
    twins: Any = None
    if importlib.util.find_spec("numba_cuda") is not None:
        from fastdiff.kernels.cuda import numba_twins as twins
    return peers, twins


def benchmark(
    be: Any,
    wait: Run,
    case: cases.Case,
    *,
    quick: bool,
    tell: Callable[[str], None] = lambda name: None,
    without: dict[str, str] | None = None,
    share: float = float("inf"),
) -> Iterator[dict[str, Any]]:
    """Time a case; yield its row after every round, the last one being the row.

    Parameters
    ----------
    be, wait
        A `CudaBackend`, and what waits for its device.
    case : Case
    quick : bool
        Tiny, and one round.
    tell : callable
        Gets the name of a way before it is made, and "" before the first round.
    without : dict
        Ways to be left out, and why.
    share : float
        Seconds after which no further way is made.
    """
    late = time.monotonic() + share
    rounds, seconds = (1, 0.01) if quick else (ROUNDS, TURN)
    source = be.runtime.zeros((COPY_BYTES // 4 // (100 if quick else 1),))
    target = be.runtime.zeros(source.shape)
    case = case.at(0.001) if quick else case
    ways = prepare(be, case, *companions())
    runs, failed, cut = make(ways, wait, tell, lambda: time.monotonic() > late, without)
    runs["copy"] = lambda: be.runtime.copy(target, source)
    tell("")
    medians = measure(runs, ways.units | {"copy": 1}, wait, seconds)
    for done, times in enumerate(itertools.islice(medians, rounds), 1):
        row = row_of(case, times, failed, 2 * source.nbytes / times.pop("copy"), cut)
        yield row | {"rounds": (done, rounds)}


# -- the report ----------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown; `results` has a header, rows, the outcomes of stages, and what was not run."""
    h = results["header"]
    versions = ", ".join(f"{name} {h[name]}" for name in OPTIONAL if h.get(name))
    tiny = "" if h["scale"] == 1 else f"**At {h['scale']:g} of the sizes: the numbers mean nothing.** "
    lines = [
        f"{tiny}{h['gpu']}; {versions}; Python {h['python']}, {h['system']}; {h['date']}, commit {h['commit']}. "
        "Of the copy: bytes that must cross memory, through the bandwidth of a device-to-device copy of the same run. "
        "Ratios: their time through ours.",
        "",
        "| work | ours | of the copy | Numba twin | " + " | ".join(WAYS.values()) + " | wanted |",
        "|---|---:|---:|---:|" + "---:|" * (len(WAYS) + 1),
    ]
    for row in results["rows"]:
        if row["kind"] in IMAGES:
            continue
        seconds, share = row["seconds"], row["share of copy"]
        cells = [_title(row), duration(seconds["ours"])]
        cells.append(f"{share['ours']:.0%}" if "ours" in share else "")
        cells.append(duration(seconds["twin"]) if "twin" in seconds else "")
        for way in WAYS:
            ratio = row["ratios"].get(way)
            cells.append(f"**{ratio:.1f}**" if ratio is not None else _absent(way, row))
        cells.append(", ".join(_wish(name, least, row) for name, least in row["wanted"].items()))
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["kind"] in IMAGES for row in results["rows"]):
        lines += ["", *image_table(results["rows"])]
    lines += ["", *marks(results["rows"])]
    lines += ["", *(f"{name}: {outcome}." for name, outcome in results["stages"].items())]
    lines += [f"{name}: **{fault.splitlines()[0]}**." for name, fault in results["faults"].items()]
    why = {"": "not yet", "time": "no time left", "all": "given up"}[results["ended"]]
    for stage, names in results["left"].items():
        lines.append(f"Not run, {'no time left' if stage == 'ways' else why}: {stage}: {', '.join(names)}.")
    return "\n".join(lines) + "\n"


def marks(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Return lines that say of every mark whether it was met."""
    by_name = {case.name: case for case in CASES}
    measured = {row["name"]: row for row in rows}
    lines = []
    for name, wanted in WANTED.items():
        row = measured.get(name, {"unknown": wanted, "wanted": wanted})
        lines += [f"| {by_name[name].title} | {_wish(mark, least, row)} |" for mark, least in row["wanted"].items()]
    counts = (f"{sum(line.endswith(f'{end} |') for line in lines)} {end.strip('*')}" for end in OUTCOMES)
    yield f"Marks: {', '.join(counts)}."
    yield ""
    yield "| work | mark |"
    yield "|---|---|"
    yield from lines


def _title(row: dict[str, Any]) -> str:
    """The title of a row, and how many rounds there are where some are missing."""
    done, rounds = row["rounds"]
    return row["title"] + ("" if done == rounds else f" ({done} of {rounds} rounds)")


def _absent(way: str, row: dict[str, Any]) -> str:
    return "failed" if way in row["failed"] else "no time" if way in row["cut"] else ""


def image_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Return lines of times of image networks and their layers."""
    names = (*OUR_TITLES.values(), "of the copy", *(f"PyTorch: {way}" for way in list(IMAGE_WAYS.values())[1:]))
    names = (*names[:5], "PyTorch", *names[5:])
    yield "Image networks, and their layers alone: times of ours and of PyTorch's."
    yield ""
    yield "| work | " + " | ".join(names) + " | wanted |"
    yield "|---|" + "---:|" * len(names) + "---|"
    for row in rows:
        if row["kind"] not in IMAGES:
            continue
        seconds, share = row["seconds"], row["share of copy"]
        times = {way: _absent(way, row) for way in (*OURS, *IMAGE_WAYS)}
        times |= {way: duration(value) for way, value in seconds.items() if way in times}
        cells = [_title(row), *(times[way] for way in OURS), f"{share['ours']:.0%}" if "ours" in share else ""]
        cells += [times[way] for way in IMAGE_WAYS]
        cells.append(", ".join(_wish(name, least, row) for name, least in row["wanted"].items()))
        yield "| " + " | ".join(cells) + " |"


OUTCOMES = ("met", "**missed**", "not measured")


def _wish(name: str, least: float, row: dict[str, Any]) -> str:
    titles = WAYS | {"best": "the fastest CUDA graph of PyTorch, by the fastest of ours"}
    words = f"{least:.0%} of the copy" if name == "copy" else f"{least:g} x {titles[name]}"
    met, missed, unknown = OUTCOMES
    if name in row["unknown"]:
        return f"{words}: {unknown}"
    reached = row["reached"][name]
    shown = f"{reached:.0%}" if name == "copy" else f"{reached:.2f}"
    return f"{words}: {shown}, {missed if name in row['missed'] else met}"


if __name__ == "__main__":
    from gpu_run import main

    sys.exit(main())
