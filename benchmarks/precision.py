"""Whether a network with bf16 convolutions learns as well as in float32: ``python benchmarks/precision.py``.

The digits of ``examples/images.py`` are learnt twice on the CPU, in float32 and with every product of a convolution
as ``get_backend("cuda", precision="bf16")`` makes it (kernels/cuda/conv_mma.cu): both factors rounded to bf16, to
nearest even, and the products added up in float32. The factors are pixels and weights for the output, its gradient and
weights for the input gradient, pixels and gradient for the weight gradient. Of an upsampling convolution the taps that
meet one pixel are added up before they are rounded, here as there. What is not a product is not rounded: the gradients
of biases and of the time embedding's rows are sums of float32 values, and norms, attention, loss and AdamW stay
float32. tests/test_precision.py holds this against the CUDA kernels.

Both runs see the same batches, timesteps and noise, so their losses are compared step by step; those on unseen digits
are of the averaged weights, with the same noise for all. Exits with 1 where a loss is too high.

Without --steps and --quick the results go to ``results/precision-cpu.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import header
from report import RESULTS, Precision, PrecisionReport, finish

from fastdiff.backends.cpu import CpuBackend
from fastdiff.backends.cpu.workers import Array
from fastdiff.backends.numpy import NumpyBackend
from fastdiff.data import energy_distance

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import images

STEPS, BATCH = images.STEPS["digits"], images.BATCH["digits"]
LAST = 500  # steps whose losses are compared
DRAWN = 1000
BOUND = 1.02  # of the losses, through those of float32


def rounded(values: Array) -> Array:
    """Finite float32 values rounded to bf16, to nearest even."""
    bits = values.view(np.uint32)
    result = bits >> np.uint32(16)
    result &= np.uint32(1)
    result += np.uint32(0x7FFF)
    result += bits
    result &= np.uint32(0xFFFF0000)
    return result.view(np.float32)


class RoundedBackend(CpuBackend):
    """The CPU backend with both factors of every product of a convolution rounded to bf16."""

    record = NumpyBackend.record  # a script would repeat the products, and not the rounding

    def _convolve(self, product: Any, x: Array, w: Array, y: Array, begin: tuple[Any, ...]) -> Any:
        as_given = product.direct or product.linear or product.by_rows
        phases = super()._convolve(product, rounded(x), rounded(w) if as_given else w, y, begin)
        if not as_given:
            self._do(phases.pop(0))  # lays out the weights, and adds up taps
            weights = self._scratch("weights", product.weights)
            weights[...] = rounded(weights)
        return phases

    def _weights_by_product(self, product: Any, x: Array, dy: Array, dw: Array) -> Any:
        return super()._weights_by_product(product, rounded(x), rounded(dy), dw)

    def _weights_by_winograd(self, product: Any, x: Array, dy: Array, dw: Array) -> Any:
        return super()._weights_by_winograd(product, rounded(x), rounded(dy), dw)


def train(be: CpuBackend, steps: int, batch: int, drawn: int) -> tuple[Array, dict[str, float]]:
    """Learn the digits; return the losses of the last steps, and how good the model is."""
    (seen, names), unseen = images.digit_sets()
    model = images.learn(
        images.digit_network(), *images.shown_twice(seen, names), steps=steps, batch=batch, backend=be,
        data_range=images.LEVELS, validation=unseen, progress=False,
    )  # fmt: skip
    new = model.sample(drawn, labels=images.ANY).reshape(drawn, 64)
    confident, _ = images.classifier(seen.reshape(-1, 64), names)(new)
    distance = energy_distance(new, unseen[0].reshape(-1, 64))
    losses = np.array(model.history["loss"][-LAST:])
    return losses, {
        f"training loss, mean of the last {len(losses)} steps": float(losses.mean()),
        "loss of the averaged weights on unseen digits": model.history["validation_loss"][-1],
        "share of drawn digits that the classifier is sure of": confident,
        "energy distance of drawn to unseen digits": distance,
    }


def compare(steps: int, batch: int, drawn: int, threads: int) -> list[Precision]:
    """Learn with both precisions; return the rows of the table."""
    losses, found = [], []
    for name, backend in (("float32", CpuBackend), ("bf16", RoundedBackend)):
        begin = time.perf_counter()
        last, figures = train(backend(threads), steps, batch, drawn)
        losses.append(last)
        found.append(figures)
        print(f"{name}: {steps} steps and {drawn} digits in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    rows = [Precision(what=what, float32=ours, bf16=found[1][what]) for what, ours in found[0].items()]
    deviation = float(np.std(losses[1] - losses[0]) / np.sqrt(len(losses[0])) / losses[0].mean())
    for i, error in enumerate((deviation, None)):
        rows[i] = rows[i]._replace(ratio=rows[i].bf16 / rows[i].float32, target=BOUND, error=error)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Learn, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="precision.py", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--quick", action="store_true", help="four steps: does it work? The numbers mean nothing")
    parser.add_argument("--threads", type=int, default=2, help="of both (default 2)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    args = parser.parse_args(argv)
    sizes = (4, 8, 8) if args.quick else (args.steps, BATCH, DRAWN)
    report = PrecisionReport(header(args.threads), *sizes[:2], compare(*sizes, args.threads))
    print(report.table(), end="")
    finish(report, "precision-cpu", args.output or (RESULTS if sizes == (STEPS, BATCH, DRAWN) else None), [])
    return int(any(row.ratio is not None and not row.ratio <= row.target for row in report.precision))


if __name__ == "__main__":
    sys.exit(main())
