"""Noise, forward noising and a sampler's step on CUDA: ``noise.cu`` and ``step.cu``, or their Numba twins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.device import WARP, Device, crosses_half
from fastdiff.backends.protocol import DEPTH, Row
from fastdiff.errors import ArgumentError
from fastdiff.kernels.cuda import runtime as runtimes
from fastdiff.noise import Draw, round_keys

Array = Any


@lru_cache(maxsize=64)
def _keys(seed: int) -> npt.NDArray[Any]:
    keys = np.zeros(1, runtimes.STRUCTURES["RoundKeys"])
    keys["words"] = round_keys(seed).reshape(1, -1)
    return keys


def law_of(draw: Draw) -> tuple[int, int, int, npt.NDArray[Any]]:
    """First row, step, stream and keys, as the kernels take them."""
    return draw.first_row, draw.step, int(draw.stream), _keys(draw.seed)


def _crosses(array: Array, draw: Draw) -> bool:
    return crosses_half(draw.first_row, len(array))


def row_records(rows: Sequence[Row], clip: tuple[float, float] | None) -> npt.NDArray[Any]:
    """Return rows as "TableRow"s."""
    bounds = clip or (-np.inf, np.inf)
    with np.errstate(over="ignore"):
        return np.array([(*row[1:11], *bounds) for row in rows], runtimes.STRUCTURES["TableRow"])


def no_variance(row: Row) -> ArgumentError:
    """Return the error of a row that scales its noise by what the denoiser does not say."""
    return ArgumentError("rows (r)", f"{row.r:g} at t = {row.t}", "0: the denoiser has learned no variance")


def split_output(out: Array | None, row: Row) -> tuple[Array | None, Array | None]:
    """The output of a denoiser, and the second one of those that learned their variance, which the row may want."""
    if out is not None and out.ndim == 3:
        return out[0], out[1]
    if row.r != 0:
        raise no_variance(row)
    return out, None


LEAST_NOISE = 1e-18  # of s in step_noisy


class StepPlan(NamedTuple):
    """How a row runs over arrays.

    Attributes
    ----------
    far : bool
        Whether it reaches back further than to m1, or scales its noise: only the kernels for all rows do that.
    deep : bool
        Whether it takes these where it draws noise, or may; else those for rows that are like `_usual`.
    keep : int
        How many arrays of the memory take its m and each other's.
    record : (1,) array
        A "TableRow".
    """

    far: bool
    deep: bool
    keep: int
    record: npt.NDArray[Any]


def step_plan(row: Row, clip: tuple[float, float] | None, depth: int) -> StepPlan:
    """Return how a row runs beside a memory of this depth."""
    keep = depth if row.evaluates else 0
    if row.b == 0 and keep == 0:  # nothing takes m, nor the output that may be absent
        row = row._replace(p=0.0, q=0.0)
    record, far = row_records((row,), clip), keep > 1 or row.depth > keep or row.r != 0
    return StepPlan(far, far or not _usual(record[0], keep), keep, record)


def _usual(record: Any, keep: int) -> bool:
    """Whether a row of no more memory than m1 is one that ``step_some`` of step.cu takes, as those of samplers are."""
    *names, low, high = record.dtype.names
    terms = {name for name in names if record[name] != 0}
    if not (terms & {"a", "b"} and ("q" in terms or (terms <= {"a", "s"} and keep == 0))):
        return False
    if keep and "s" in terms and not terms >= {"a", "b"}:
        return False
    # The signs of its zeros: s z must not vanish, and no bound be -0.
    vanishes = "s" in terms and not abs(record["s"]) > LEAST_NOISE
    return not (vanishes or any(record[bound] == 0 and np.signbit(record[bound]) for bound in (low, high)))


class StepOperations(Device):
    """Noise, and what it goes into."""

    _twins: Any = None
    """The Numba kernels that take the place of ours, where they are asked for."""

    def normal(self, out: Array, draw: Draw) -> None:
        self._by_blocks("noise", "normal", (out,), (*out.shape, *law_of(draw)), crosses=_crosses(out, draw))

    def forward_noise(
        self,
        x0: Array,
        t: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        eps: Array,
        draw: Draw,
    ) -> None:
        tables = self._table(signal), self._table(noise)
        if self._twins:
            self._twins.forward_noise(x0, t, *tables, out, eps, draw, queue=self.runtime.queue())
            return
        first, _, stream, keys = law_of(draw)
        after = (*x0.shape, first, stream, keys)
        self._by_blocks("noise", "forward_noise", (x0, out, eps), after, (x0, t, *tables, out, eps), _crosses(x0, draw))

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        if self._twins:
            self._twins.sampler_step(x, out, memory, row, clip, draw, queue=self.runtime.queue())
            return
        (out, v), plan = split_output(out, row), step_plan(row, clip, len(memory))
        if plan.far or (plan.deep and row.s != 0):
            m1, m2, m3 = (*memory, None, None, None)[:DEPTH]
            grid, block = self.runtime.grid_1d(len(x) * -(-x.shape[1] // 4))
            args = (x, out, v, m1, m2, m3, plan.keep, plan.record, *x.shape, *law_of(draw))
            if x.size:
                self.runtime.launch("step", "step_deep", grid, block, args)
            return
        arrays = (x, out, memory[0] if plan.keep else None)
        if row.s != 0:
            after = (plan.record, *x.shape, *law_of(draw))
            self._by_blocks("step", "step_noisy", arrays, after, crosses=_crosses(x, draw))
        elif x.size:
            fours = self._aligned(*arrays)
            grid, block = self.runtime.grid_1d(-(-x.size // 4) if fours else x.size)
            self.runtime.launch("step", "step_quiet", grid, block, (*arrays, plan.record, x.size, fours))

    def guide(self, asked: Array, unasked: Array, weight: float, rescale: float, out: Array) -> None:
        if out.size == 0:
            return
        kept = asked
        if rescale and asked is out:
            kept = self.runtime.empty(out.shape)
            self.runtime.copy(kept, asked)
        grid, block = self.runtime.grid_1d(out.size)
        self.runtime.launch("step", "guide", grid, block, (asked, unasked, out, out.size, np.float32(weight)))
        if rescale:
            grid, block = self.runtime.grid_1d(len(out) * WARP, 8 * WARP)  # a warp takes a row
            args = (kept, out, *out.shape, np.float32(rescale))
            self.runtime.launch("step", "guide_rescale", grid, block, args)
