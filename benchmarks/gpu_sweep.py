"""Which tiles are the fastest on a GPU: of every convolution of the U-Net, and of every product of perceptrons.

Each is timed forward and backward on every tile that its kernel has, on tensor cores with every number of stages too,
as a CUDA graph of several. `tuning_of` makes of the times what the backend chooses by: `Tuning` in
`fastdiff.backends.cuda.tuning`, which says where it is to lie.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import bare  # noqa: F401 - so that the others are found

from fastdiff.backends.layers import Conv, ConvShapes
from fastdiff.bench.networks import Perceptron, Pictures
from fastdiff.bench.table import CURVE, PICTURE
from fastdiff.nn import Program
from fastdiff.noise import Draw, Stream

PICTURES, CURVES = (16, 256), (1000, 8192)  # of a batch
STAGES = (3, 2, 4)  # the first where all are alike
SECONDS = 0.005  # of a timing
TOGETHER, AT_ONCE = 8, 4e9  # in a graph: so many at most, and about so many operations
OUTPUT, INPUT, WEIGHTS = "conv", "conv_input", "conv_weights"  # kernels of conv.cu
MMA_OUTPUT, MMA_INPUT = "conv_mma", "conv_mma_adjoint"  # and of conv_mma.cu
ENTRIES = {"float32": (OUTPUT, INPUT, WEIGHTS), "bf16": (MMA_OUTPUT, MMA_INPUT)}

Run = Callable[[], None]


@dataclass(kw_only=True)
class Swept:
    """A product by one kernel.

    Attributes
    ----------
    name, entry, key : str
        Of the convolution, of the kernel, and of both for `Tuning`.
    stages : int
    seconds : dict
        By tile.
    speeds : dict
        Outputs a second of full blocks, all multiprocessors being at work until the last one is.
    """

    name: str
    entry: str
    key: str
    stages: int
    seconds: dict[str, float]
    speeds: dict[str, float]


def cases(quick: bool) -> dict[str, ConvShapes]:
    """Return what is swept, by name."""
    if quick:
        found = [ConvShapes(Conv((3, 3), pad=(1, 1, 1, 1)), (2, 3, 4, 8), (2, 3, 4, 12)), _product(5, 8, 4)]
    else:
        found = [conv for n in PICTURES for conv in unet_convs(Pictures("", "", n, PICTURE))]
        for net in ("tutorial", "default"):
            widths = Perceptron("", "", 1, CURVE, 1, net).widths
            found += [_product(n, a, b) for n in CURVES for a, b in pairwise(widths)]
    return {name_of(conv): conv for conv in found}


def _product(rows: int, inputs: int, outputs: int) -> ConvShapes:
    return ConvShapes(Conv(), (1, rows, 1, inputs), (1, rows, 1, outputs))


def unet_convs(pictures: Pictures) -> list[ConvShapes]:
    """Return the convolutions of a network's training step."""
    program = Program(pictures.n, "training")
    pictures.network().record(program)
    listing: Any = SimpleNamespace(prepare=lambda convs, backward: convs)
    found: Any = program.prepare(listing, backward=True)
    return list(found)


def name_of(conv: ConvShapes) -> str:
    """Name a convolution."""
    geometry, x, out = conv
    name = f"{geometry.kernel[0]}x{geometry.kernel[1]} of {'x'.join(map(str, x))} to {out[-1]}"
    changed = {"stride": geometry.stride, "up": geometry.up}
    return name + "".join(f" {word} {a}x{b}" for word, (a, b) in changed.items() if (a, b) != (1, 1))


def sweep(
    make: Callable[[str], Any], conv: ConvShapes, time: Callable[[Run], float], stages: tuple[int, ...] = STAGES
) -> Iterator[Swept]:
    """Yield the times of a convolution and its gradients.

    Parameters
    ----------
    make : callable
        Takes a precision, returns a `CudaBackend`.
    conv : ConvShapes
    time : callable
        Takes what is to be timed, returns the seconds of a call of it.
    stages : tuple of int
        On tensor cores.
    """
    from fastdiff.backends.cuda import conv as plain
    from fastdiff.backends.cuda import conv_mma
    from fastdiff.backends.cuda.tuning import Tuning, key

    for precision, entries in ENTRIES.items():
        be = make(precision)
        works, bf16 = works_of(be, conv), precision == "bf16"
        for entry, work in zip(entries, works, strict=False):
            adjoint = entry in (INPUT, MMA_INPUT)
            if not bf16 and entry != WEIGHTS and (conv.x if adjoint else conv.out)[1:3] == (1, 1):
                continue  # there is one tile
            named = key(entry, plain.product(*conv, adjoint).sizes)
            for count in stages if bf16 else STAGES[:1]:
                row = Swept(name=name_of(conv), entry=entry, key=named, stages=count, seconds={}, speeds={})
                for tile in (conv_mma if bf16 else plain).TILES:
                    kernel = f"{entry}_{tile.name}"
                    only: Any = {"rates": {kernel: math.inf}} if entry == WEIGHTS else {"tiles": {named: tile.name}}
                    retune(be, Tuning(**only, stages=count))
                    blocks = blocks_of(be, work, conv_mma.source_of(count) if bf16 else "conv", kernel)
                    if blocks:
                        row.seconds[tile.name] = seconds = seconds_of(be, work, conv, time)
                        turns = -(-blocks // be.runtime.multiprocessors)
                        row.speeds[tile.name] = turns * tile.pixels * tile.channels / seconds
                if row.seconds:
                    yield row


def works_of(be: Any, conv: ConvShapes) -> tuple[Run, Run, Run]:
    """Return what makes output, input gradient and weight gradient, on arrays of noise."""
    geometry, x_shape, out_shape = conv
    shapes = x_shape, (*geometry.kernel, x_shape[3], out_shape[3]), out_shape, out_shape[3:]
    x, w, dy, b = given = [be.empty(shape) for shape in shapes]
    for i, array in enumerate(given):
        be.normal(array.reshape(1, -1), Draw(i, Stream.INIT))
    dx, dw, out, db = (be.empty(shape) for shape in shapes)
    forward, backward = be.prepare([conv], True).run([w])[0]
    return (
        lambda: be.conv(geometry, x, forward, b, out),
        lambda: be.conv_backward(geometry, dy, x, backward, dx, None, None),
        lambda: be.conv_backward(geometry, dy, x, w, None, dw, db),
    )


def retune(be: Any, tuning: Any) -> None:
    """Have a backend choose by this."""
    from fastdiff.backends.cuda.conv_mma import TensorCores

    be._tuning, be._tensor_cores = tuning, TensorCores(be.runtime, be._scratch, tuning)


def blocks_of(be: Any, work: Run, source: str, kernel: str) -> int:
    """Return the blocks of a kernel in a piece of work, which is done; 0: the tile does not fit, another is taken."""
    from fastdiff.errors import BackendError

    blocks, launch = 0, be.runtime.launch

    def watch(of: str, entry: str, grid: int, *rest: Any) -> None:
        nonlocal blocks
        blocks += grid * ((of, entry) == (source, kernel))
        launch(of, entry, grid, *rest)

    be.runtime.launch = watch
    try:
        work()
    except BackendError:  # nor does any other
        return 0
    finally:
        del be.runtime.launch
    return blocks


def seconds_of(be: Any, work: Run, conv: ConvShapes, time: Callable[[Run], float]) -> float:
    """Return the time of a piece of work, a graph being several of it."""
    operations = 2.0 * math.prod(conv.out) * math.prod(conv.geometry.kernel) * conv.x[3]
    together = max(1, min(TOGETHER, int(AT_ONCE / operations)))

    def body() -> None:
        for _ in range(together):
            work()

    recording = be.record(body)
    for _ in range(2):  # issued, then captured
        recording.run()
    return time(recording.run) / together


def tuning_of(rows: list[Swept]) -> dict[str, Any]:
    """Return the fields of a `Tuning`."""
    of_stages: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.entry in ENTRIES["bf16"]:
            of_stages.setdefault(row.stages, {})[row.key] = min(row.seconds.values())
    common = set.intersection(*map(set, of_stages.values())) if of_stages else set()
    stages = min(of_stages or STAGES, key=lambda n: sum(of_stages[n][name] for name in common))
    known = [row for row in rows if row.entry in ENTRIES["float32"] or row.stages == stages]
    speeds = defaultdict(list)
    for row in known:
        widest = next(iter(row.speeds.values()))
        for tile, speed in row.speeds.items():
            speeds[f"{row.entry}_{tile}"].append(speed / widest)
    return {
        "tiles": {row.key: min(row.seconds, key=row.seconds.__getitem__) for row in known if row.entry != WEIGHTS},
        "rates": {kernel: statistics.median(of) for kernel, of in speeds.items()},
        "stages": stages,
    }
