"""Networks that are told what is known of a sample, and draw the rest.

Such a network has, beside the noisy values, two more for each: what is known, 0 where nothing is, and a mask, 1 where
something is (CSDI, Tashiro et al. 2021). It is trained with parts of the rows taken for known, drawn anew in every step
(`fastdiff.noise.targets`), and learns E[output | x_t, known values] for all masks at once; where a `fastdiff.sample` is
given values that are known without noise, the network needs no gradients and no approximation: what it has learned is
what it draws. A known value of x_t is ``signal[t]`` times what it is known to be, without noise, in training and in
sampling; so nothing of the noise law or of a table is different. With nothing known it is an unconditional network.

Where rows are few the default model, a Gaussian base given observations by ``tmpd``, is better: it is exact for normal
data, and this network has to learn every conditional from examples. Where rows are many it comes near to exact
conditionals, and a draw costs what a sample costs. ``benchmarks/series_answers.py`` measures the one, and with
``--conditional mask`` the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Array, Backend, ChainTable, Row
from fastdiff.denoiser import Asked, Denoiser, Evaluator, Wrapped, asked_parts
from fastdiff.errors import ArgumentError, shown
from fastdiff.noise import Draw
from fastdiff.schedule import Schedule

if TYPE_CHECKING:
    from fastdiff.conditioning import Draws
    from fastdiff.observations import Observations

Float64 = npt.NDArray[np.float64]


def known_columns(known: Observations) -> Float64:
    """Return exact values as a network takes them, (1 or N, 2 D): values, and marks.

    Raises
    ------
    ArgumentError
        Something else is known, or values contradict each other.
    """
    known_values = np.full((1 if known.count is None else known.count, known.d), np.nan)
    wants = "fd.Known without noise: this network is told which values are known, and of nothing else"
    if known.weights or any(len(A) for A, _, _ in known.linear):
        raise ArgumentError("given", "a Weight" if known.weights else "a Linear", wants)
    for values, noise in known.known:
        seen = np.broadcast_to(~np.isnan(values), known_values.shape)
        if (np.broadcast_to(noise, known_values.shape)[seen] > 0).any():
            raise ArgumentError("given", "values with noise", wants)
        if (seen & ~np.isnan(known_values) & (known_values != values)).any():
            raise ArgumentError("given", "different values for the same place", "exact values that can all be true")
        known_values = np.where(seen, values, known_values)
    return np.hstack([np.nan_to_num(known_values), ~np.isnan(known_values)])


@dataclass(frozen=True, eq=False)
class MaskDenoiser(Wrapped):
    """A network, or a guided one, that is told what is known of its samples.

    Attributes
    ----------
    inner : Denoiser
    schedule : Schedule
    known : (1 or N, 2 D) float64
        See `known_columns`.
    draws : Draws
        Which samples are given what, and whose noise they have.
    """

    schedule: Schedule
    known: Float64
    draws: Draws

    @classmethod
    def of(cls, inner: Denoiser, schedule: Schedule, known: Observations, method: str, draws: Draws) -> MaskDenoiser:
        """Return it for observations, all of which must be such as a network can be told."""
        if method != "auto":
            raise ArgumentError("method", shown(method), "'auto': this network is told what is known")
        return cls(inner, schedule, known_columns(known), draws)

    def on(self, be: Backend, shape: tuple[int, ...]) -> Evaluator:
        return _MaskEvaluator(self, be, self.inner.on(be, shape))


class _MaskEvaluator(Evaluator):
    """A network on a backend that is told what is known: states are numbered by `draw.first_row`."""

    def __init__(self, to: MaskDenoiser, be: Backend, inner: Evaluator) -> None:
        self.to, self.be, self.inner = to, be, inner
        self._last: tuple[Any, Any, Asked | None] = (
            None,
            None,
            None,
        )  # asked last, of which rows, and with what is known

    def _condition(self, x: Array, first: int, labels: Array | Asked | None) -> Asked:
        before, rows, condition = self._last
        if condition is None or before is not labels or rows != (first, len(x), x.dtype):
            known = self.to.known[self.to.draws.which(first, len(x))].astype(x.dtype)
            parts = asked_parts(labels)
            condition = Asked(parts.labels, parts.covariates, self.be.asarray(known, x.dtype))
            self._last = labels, (first, len(x), x.dtype), condition
        return condition

    def evaluate(self, x: Array, t: int, labels: Array | Asked | None = None) -> Array:
        return self.inner.evaluate(x, t, self._condition(x, 0, labels))

    def step(
        self,
        x: Array,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array | Asked | None = None,
    ) -> None:
        condition = self._condition(x, draw.first_row, labels)
        if row.evaluates:
            self.be.hold(x, condition.known, float(self.to.schedule.signal[row.t]))
        for part, first in self._runs(x, (row,), draw):
            remembered = tuple(array[part] for array in memory)
            asked = condition if len(x[part]) == len(condition) else condition[part]  # some keep the same one
            self.inner.step(x[part], remembered, row, clip, draw._replace(first_row=first), asked)

    def run_table(
        self,
        x: Array,
        rows: tuple[Row, ...],
        clip: tuple[float, float] | None,
        draw: Draw,
        labels: Array | Asked | None = None,
    ) -> None:
        """Run a perceptron's table in one piece, and others row by row, with the same bits."""
        in_one = getattr(self.inner, "run_chain", None)
        if in_one is None:
            super().run_table(x, rows, clip, draw, labels)
            return
        condition = self._condition(x, draw.first_row, labels)
        levels = self.to.schedule.signal[[row.t for row in rows]].astype(np.float32)
        table = ChainTable(rows, clip, levels=levels)
        for part, first in self._runs(x, rows, draw):
            in_one(x[part], table, draw._replace(first_row=first), condition[part])

    def _runs(self, x: Array, rows: tuple[Row, ...], draw: Draw) -> list[tuple[slice, int]]:
        """Parts whose noise follows each other; all at once where there is none."""
        if all(row.s == 0 for row in rows):
            return [(slice(0, len(x)), draw.first_row)]
        return list(self.to.draws.runs(draw.first_row, len(x)))
