"""Whether bands of drawn values hold, and how wide draws have to be for that.

Of rows that a model has not learned from, from few values of the first to nearly all of the last are hidden and drawn:
draws given much are often wide by another factor than draws given little. With mean m and deviation s of the
draws, |x - m| / s of the hidden values x has a 0.9 quantile, and that of Student's law for as many draws is what it has
where bands of 90 % hold. The ratio of both is by how much draws must be spread: a number above 1 for a model that is
too sure. Values of a row depend on each other, so its variance is that over rows (the jackknife), and what the rows do
not tell from 1 is taken off: f = 1 + (f - 1) max(0, 1 - variance / (f - 1)^2), a James-Stein estimate. Few rows change
nothing that way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.nn import Network
from fastdiff.noise import Draw, Stream, philox_words

FEWEST, MOST = 8, 128  # rows that are looked at
DRAWS = 19  # of each
HELD = 0.9  # the band that is to hold
HIDING_STEP = 23  # of stream DATA: which values are hidden
LEAST, GREATEST = 0.5, 2.0  # factors beyond these say that something else is wrong
MOST_WORK = 1e12  # operations of the draws: a few seconds
PASSES = 40  # of a network, that a step given half of the values costs, with its derivatives

Values = npt.NDArray[Any]


def most_rows(net: Network, steps: int) -> int:
    """Return how many rows are looked at, in so many steps of a sampler; 0 where too few can be."""
    rows = min(MOST, int(MOST_WORK / (net.operations * PASSES * steps * DRAWS)))
    return rows if rows >= FEWEST else 0


class Spread(NamedTuple):
    """What was found.

    Attributes
    ----------
    factor : float
        By which draws are spread from now on.
    held : float
        Share of hidden values in their bands of 90 %, before.
    held_now : float
        The same with the factor.
    rows : int
        How many were looked at.
    """

    factor: float
    held: float
    held_now: float
    rows: int

    @property
    def sentence(self) -> str:
        """What was found, in one sentence."""
        words = f"{self.held:.0%} of the values hidden of {self.rows} held-out rows lie in their bands of {HELD:.0%}"
        if self.factor == 1:
            return f"{words}: draws stay as they are"
        return f"{words}: draws are spread by {self.factor:.2f} from now on, for {self.held_now:.0%} of them"

    def to_dict(self) -> dict[str, float]:
        """Return it as `Diffusion.report_` has it."""
        return {"spread": self.factor, "held": self.held, "held_spread": self.held_now, "rows_hidden": self.rows}


def hidden(rows: Values, seed: int) -> Values:
    """Return rows (N, ...) with NaN in half of their values, a share of (k + 1/2) / N of row k."""
    n, count = len(rows), rows[0].size
    words = philox_words(n, -(-count // 4), Draw(seed, Stream.DATA, HIDING_STEP)).reshape(n, -1)[:, :count]
    gone = words < ((2**33 * np.arange(n) + 2**32) // (2 * n))[:, None]
    return np.where(gone.reshape(rows.shape), np.nan, rows)


def measure(truth: Values, holes: Values, draws: Values) -> Spread | None:
    """Return how draws (draws, N, ...) of what is missing of holes (N, ...) must be spread.

    Values that are missing of the truth too are left out; None: of too few rows anything is hidden.
    """
    from scipy.special import stdtrit

    gone = np.isnan(holes) & ~np.isnan(truth)
    mean, deviation = draws.mean(axis=0, dtype=np.float64), draws.std(axis=0, ddof=1, dtype=np.float64)
    off = np.abs(truth - mean) / np.where(deviation > 0, deviation, 1.0)
    per_row = [row[where] for row, where in zip(off, gone, strict=True) if where.any()]
    if len(per_row) < FEWEST:
        return None
    n, expected = len(per_row), stdtrit(len(draws) - 1, (1 + HELD) / 2) * np.sqrt(1 + 1 / len(draws))

    def factor(of: list[Values]) -> float:
        return float(np.quantile(np.concatenate(of), HELD) / expected)

    whole = factor(per_row)
    without = np.array([factor(per_row[:k] + per_row[k + 1 :]) for k in range(n)])
    variance = (n - 1) / n * float(((without - without.mean()) ** 2).sum())
    sure = max(0.0, 1 - variance / (whole - 1) ** 2) if whole != 1 else 0.0
    found = float(np.clip(1 + (whole - 1) * sure, LEAST, GREATEST))
    every = np.concatenate(per_row)
    return Spread(found, float(np.mean(every <= expected)), float(np.mean(every <= expected * found)), n)
