"""Where the U-Net's time goes, layer by layer: ``python benchmarks/profile_layers.py``.

Training steps and forward passes run as a user runs them, on a backend that notes how long each operation takes.
Calls are added up by the kind of layer, or with --shapes for every shape apart. Operations are those of the direct
formula, whatever form a kernel has (Winograd's needs up to four times fewer, so its speed may exceed the peak), and
those of a backward pass are twice the forward's, or as many where the input needs no gradient. The peak is the
arithmetic roof of `fastdiff.bench`: matrix products in cache, on all threads. A time is the median of the passes.

Without options the results go to ``results/profile-cpu.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import header
from report import RESULTS, Cost, LayerCost, Pass, ProfileReport, finish

import fastdiff as fd
from fastdiff import bench
from fastdiff.backends.cpu import CpuBackend
from fastdiff.backends.cpu.workers import Script
from fastdiff.backends.layers import Conv, LayerBackend
from fastdiff.bench.networks import CHANNELS, PicturesForward, training_only, untrained

PASSES = 9
OTHER = "outside of the layers"
# Calls that are no layers, or made of them.
OUTER = {"address", "asarray", "empty", "owns", "prepare", "queue", "to_numpy"}
STEP_END = "finish_step"
LABELS = {
    "attention": "attention",
    "silu": "SiLU, sums, tables",
    "add": "SiLU, sums, tables",
    "take": "SiLU, sums, tables",
    "concatenate": "concatenation",
    "split": "concatenation",
    "squared_error": "loss",
    "draw_batch": "noise",
    STEP_END: "clipping, AdamW, average",
}


class Call(NamedTuple):
    """A call of the backend: its name, when it ended, how long it took, and its arguments."""

    name: str
    end: float
    seconds: float
    positional: tuple[Any, ...]
    named: dict[str, Any]


class Part(NamedTuple):
    """What is added up: calls of a kind of layer, of one shape where shapes are apart, in one direction."""

    kind: str
    shape: str
    backward: bool


Timed = tuple[float, list[Call]]  # a pass: its seconds, and the calls in it


def watched(be: CpuBackend) -> list[Call]:
    """Make a backend note every call from outside in the list that is returned.

    What is recorded becomes one script for each of its operations, instead of one for all of them.
    """
    calls: list[Call] = []
    written: list[tuple[Script, str, tuple[Any, ...], dict[str, Any]]] | None = None
    inside = False

    def watch(name: str, method: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        nonlocal inside
        if inside:
            return method(*positional, **named)
        if written is not None:
            be._recorded.append([])
        inside, begin = True, time.perf_counter()
        try:
            return method(*positional, **named)
        finally:
            end, inside = time.perf_counter(), False
            if written is None:
                calls.append(Call(name, end, end - begin, positional, named))
            else:
                written.append((Script(be.threads, be._recorded.pop()), name, positional, named))

    class Scripts:
        """A recording."""

        def __init__(self, body: Callable[[], None], places: Any = ()) -> None:
            self.body, self.scripts = body, None

        def run(self) -> None:
            nonlocal written
            if self.scripts is None:
                self.scripts = written = []
                try:
                    self.body()
                finally:
                    written = None
            for script, name, positional, named in self.scripts:
                begin = time.perf_counter()
                be._workers.perform(script)
                end = time.perf_counter()
                calls.append(Call(name, end, end - begin, positional, named))

    for name in dir(LayerBackend):
        method = getattr(be, name, None)
        if name not in OUTER and not name.startswith(("_", "record")) and callable(method):
            setattr(be, name, partial(watch, name, method))
    be.record = Scripts  # type: ignore[method-assign]
    return calls


def layer_of(call: Call, ends: tuple[int, int]) -> tuple[str, str, float]:
    """Kind and shape of the layer of a call, and its operations; `ends` are channels of the pictures in and out."""
    arguments, base = call.positional, call.name.removesuffix("_backward")
    backward = base != call.name
    if base == "conv":
        if backward:
            geometry, y, x, products = arguments[0], arguments[1], arguments[2], 1 + (arguments[4] is not None)
        else:
            geometry, y, x, products = arguments[0], arguments[4], arguments[1], 1
        (_, height, width, k), (rows, columns), c = y.shape, geometry.kernel, x.shape[3]
        kernel, size, channels = f"conv {rows}x{columns}", f"{height} x {width}", f"{c} to {k}"
        operations = 2.0 * products * y.size * rows * columns * c
        if height * width == 1:
            return "linear layers", channels, operations
        if c == ends[0] or k == ends[1]:
            return "first conv" if c == ends[0] else "last conv", channels, operations
        if max(geometry.stride) > 1 or max(geometry.up) > 1:
            kernel += ", strided" if max(geometry.stride) > 1 else ", upsampling"
        elif max(rows, columns) > 1:
            return f"{kernel}, {size}", channels, operations
        return kernel, f"{size}, {channels}", operations
    if base == "norm":
        layer = arguments[0]
        _, height, width, c = layer.x.shape
        return "GroupNorm" + (" + SiLU" if layer.silu else ""), f"{height} x {width}, {c} channels", 0.0
    if base == "attention":
        y, length = arguments[0 if backward else 1], arguments[0].shape[1]
        shape = f"{length} pixels, {y.shape[2]} channels"
        return LABELS[base], shape, 4.0 * (1 + backward) * y.size * length
    return LABELS.get(base, base), "", 0.0


def profile(title: str, passes: list[Timed], ends: tuple[int, int], shapes: bool) -> Pass:
    """Add up the calls of each pass; return the seconds of a pass, and its rows, the longest first.

    Whatever comes after the loss, up to the optimiser, is the backward pass.
    """
    times: dict[Part, list[float]] = defaultdict(lambda: [0.0] * len(passes))
    operations: Counter[Part] = Counter()
    count: Counter[Part] = Counter()
    for i, (whole, calls) in enumerate(passes):
        backward = False
        for call in calls:
            backward = backward and call.name != STEP_END
            kind, shape, work = layer_of(call, ends)
            part = Part(kind, shape if shapes else "", backward)
            times[part][i] += call.seconds
            if i == 0:
                operations[part] += work
                count[part] += 1
            backward = backward or call.name == "squared_error"
        times[Part(OTHER, "", False)][i] = whole - sum(call.seconds for call in calls)
    rows: dict[str, LayerCost] = {}
    for part, seconds in times.items():
        what = ", ".join(filter(None, part[:2]))
        row = rows.setdefault(what, LayerCost(what))
        setattr(row, "backward" if part.backward else "forward", Cost(statistics.median(seconds), operations[part]))
        row.calls = max(row.calls, count[part])
    longest = sorted(rows.values(), key=lambda row: row.forward.seconds + row.backward.seconds, reverse=True)
    return Pass(title, statistics.median(seconds for seconds, _ in passes), longest)


def training_passes(be: Any, calls: list[Call], workload: PicturesForward, passes: int) -> list[Timed]:
    """Training steps; a step ends where the optimiser does."""
    model = untrained(workload.network(), workload.schedule(), be)
    how = {"batch": workload.n, **training_only()} | ({"data_range": (-1.0, 1.0)} if len(workload.shape) > 2 else {})
    X = workload.pictures(4 * workload.n)
    model.fit(X, steps=1, **how)
    calls.clear()
    model.fit(X, steps=passes + 1, **how)
    ends = [i for i, call in enumerate(calls) if call.name == STEP_END]
    return [(calls[b].end - calls[a].end, calls[a + 1 : b + 1]) for a, b in pairwise(ends)]


def forward_passes(be: Any, calls: list[Call], workload: PicturesForward, passes: int) -> list[Timed]:
    """Forward passes without gradients."""
    run = workload.ours(be).run
    run()
    done = []
    for _ in range(passes):
        calls.clear()
        begin = time.perf_counter()
        run()
        done.append((time.perf_counter() - begin, list(calls)))
    return done


def rounding(be: Any, channels: int) -> dict[str, dict[str, float]]:
    """Relative errors, in the norm, of a 3x3 convolution and its gradients against float64: ours and NumPy's."""
    draw = np.random.default_rng(0).standard_normal
    x, dy, w = draw((8, 16, 16, channels)), draw((8, 16, 16, channels)), draw((3, 3, channels, channels))

    def results(be: Any, dtype: Any) -> dict[str, Any]:
        given = [a.astype(dtype) for a in (x, dy, w)]
        y, dx, dw = (np.empty_like(a) for a in given)
        b, same = np.zeros(channels, dtype), Conv((3, 3), pad=(1, 1, 1, 1))
        be.conv(same, given[0], given[2], b, y)
        be.conv_backward(same, given[1], given[0], given[2], dx, dw, b.copy())
        return {"output": y, "input gradient": dx, "weight gradient": dw}

    numpy = fd.get_backend("numpy")
    exact = results(numpy, np.float64)
    return {
        side: {
            what: float(np.linalg.norm(found - exact[what]) / np.linalg.norm(exact[what]))
            for what, found in results(backend, np.float32).items()
        }
        for side, backend in (("ours", be), ("numpy", numpy))
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="profile_layers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", action="store_true", help="every shape of a layer apart; writes nothing")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="height and width of the pictures")
    parser.add_argument("--points", type=int, help="series of so many, of 5 channels, instead of pictures")
    parser.add_argument("--channels", type=int, nargs="+", default=list(CHANNELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--only", choices=["training", "forward"], help="one of the two; writes nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    args = parser.parse_args(argv)
    defaults = all(getattr(args, name) == parser.get_default(name) for name in vars(args) if name != "output")
    output = args.output or (RESULTS if defaults else None)

    shape = (args.points, 5) if args.points else (args.size, args.size, 3)
    channels = tuple(args.channels)
    workload = PicturesForward("", "", args.batch, shape, channels=channels)
    be = CpuBackend(args.threads)
    report = ProfileReport(header(args.threads), bench.roofs_of(be).arithmetic, [], rounding(be, max(channels)))
    calls = watched(be)
    where = f"U-Net, {' x '.join(map(str, shape))}, channels {channels}, batch {args.batch}"
    for what, run in (("training step", training_passes), ("forward pass", forward_passes)):
        if args.only is None or what.startswith(args.only):
            passes = run(be, calls, workload, args.passes)
            report.passes.append(profile(f"{what}, {where}", passes, (shape[-1],) * 2, args.shapes))
    print(report.table(), end="")
    return finish(report, "profile-cpu", output, [])


if __name__ == "__main__":
    sys.exit(main())
