"""What in a table of numbers looks like no value of a curve: an index, a label, a time, a line of names.

Nothing here changes data: it is said what was seen and how to leave it out, and nothing where that is not sure. A
column has to keep its pattern in every row, and where most columns do, the table is like that.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

FEWEST = 8  # rows: fewer say too little
SCREENED = 256  # rows that a column has to pass before all of it is looked at
FEW_COLUMNS = 6  # at most, of a long format
MOST_LABELS = 60
RATIO = 4  # rows for each label, at least
NEAR = 0.02  # of a step: times are rounded when they are written
FAR = 3  # ranges of the values below
AGAIN = "again and again"

ROW_WORDS = frozenset({"index", "idx", "id", "ids", "row", "unnamed"})
TIME_WORDS = frozenset({"year", "quarter", "month", "week", "day", "hour", "date", "datetime", "time", "timestamp"})
LABEL_WORDS = frozenset({"label", "labels", "class", "target", "category", "species"})


def of_columns(X: npt.NDArray[np.generic], called: Sequence[str], names: Sequence[str] | None = None) -> list[str]:
    """Return a sentence for each thing in a table of curves that looks like something else.

    Parameters
    ----------
    X : (N, d) array
        Finite real numbers.
    called : sequence of str
        What each column is called in a sentence, and by ``--index`` and ``--drop``.
    names : sequence of str, optional
        The columns' names, of which some mean something: year, id, class.
    """
    n, d = X.shape
    if n < FEWEST or d < 2:
        return []
    words = [_words(name) for name in names or [""] * d]
    long = _long_format(X, words) if 3 <= d <= FEW_COLUMNS else None
    if long is not None:
        return [_says_long(called, *long, [k for k in range(d) if k not in long])]
    patterns = {k: text for k in range(d) if (text := _pattern(X[:, k])) is not None}
    if 2 * len(patterns) > d:
        patterns = {}
    labels = _labels(X, words)
    found = []
    for k in range(d):
        text = patterns.get(k) or _by_name(X[:, k], words[k])
        if text is not None:
            narrow = text.endswith(AGAIN) and d <= FEW_COLUMNS and sum(bool(w & TIME_WORDS) for w in words) < 2
            long_too = ", or a line one moment of a curve (long format)" if narrow else ""
            found.append(f"column {called[k]} {text}: is it an index{long_too}? {remedy(called[k])}")
        elif k in labels:
            found.append(f"column {called[k]} {labels[k]}: is it a label? {remedy(called[k], index=False)}")
    return found


def of_first_row(X: npt.NDArray[np.generic]) -> str | None:
    """Return half a sentence if the first row looks like column names that are numbers: 1970, 1971, 1972, ...

    They have one step; or they only rise or fall, and none is among the values below it: far from these, or in the
    only row that rises or falls.
    """
    if len(X) < FEWEST or X.shape[1] < 4:
        return None
    first, others = _column(X[0]), X[1:SCREENED]
    even = _step(first) is not None and not any(_step(_column(row)) is not None for row in others)
    low, high = _column(X[1:].min(axis=0)), _column(X[1:].max(axis=0))
    gap = np.maximum(low - first, first - high)
    alone = (gap > FAR * (high - low)).all() or not any(_one_way(_column(row)) for row in others)
    uneven = _one_way(first) and bool((gap > 0).all() and alone)
    if not (even or uneven):
        return None
    shown = f"{X[0, 0]:g}, {X[0, 1]:g}, {X[0, 2]:g}, ..."
    return f"({shown}) looks like column names: --header takes it for them (header=True in Python)"


def remedy(*called: str, index: bool = True) -> str:
    """How to leave columns out."""
    word = shlex.quote(",".join(called))
    index = index and len(called) == 1
    ways = f"--index {word} or --drop {word}" if index else f"--drop {word}"
    what = "it" if len(called) == 1 else "them"
    return f"{ways} leaves {what} out ({'index= or drop=' if index else 'drop='} in Python)"


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", name.lower()))


def _column(values: npt.NDArray[np.generic]) -> Float64:
    return values.astype(np.float64)


def _step(column: Float64) -> float | None:
    """The constant by which a column rises or falls from row to row."""
    step = (column[-1] - column[0]) / (len(column) - 1)
    line = column[0] + step * np.arange(len(column))
    return float(step) if step and np.abs(column - line).max() <= NEAR * abs(step) else None


def _one_way(row: Float64) -> bool:
    """Whether a row rises or falls all along."""
    change = np.diff(row)
    return bool((change > 0).all() or (change < 0).all())


def _pattern(values: npt.NDArray[np.generic]) -> str | None:
    """What a column does in every row, if it is one of the things that counters do."""
    if not _rises_or_returns(np.diff(_column(values[:SCREENED]))):
        return None
    column = _column(values)
    step = _step(column)
    if step is not None:
        return f"{'rises' if step > 0 else 'falls'} by {abs(step):.6g} in every row"
    change = np.diff(column)
    if not (_rises_or_returns(change) and _returns_evenly(change)):
        return None
    first = int(np.argmin(change)) + 1
    return f"runs from {column[first]:.6g} to {column[first - 1]:.6g} {AGAIN}"


def _rises_or_returns(change: Float64) -> bool:
    """Whether all changes are one and the same step, or one and the same return."""
    low, high = change.min(), change.max()
    if low >= 0 or high <= 0:
        return bool(high - low <= 4 * NEAR * max(abs(low), abs(high)) and (low or high))
    middle = (low + high) / 2
    return bool(np.where(change < middle, change - low, high - change).max() <= 4 * NEAR * high)


def _returns_evenly(change: Float64) -> bool:
    """Whether there are as many rows from each return to the next, and three returns at least."""
    lengths = np.diff(np.flatnonzero(change < 0))
    return len(lengths) > 1 and bool((lengths == lengths[0]).all())


def _by_name(values: npt.NDArray[np.generic], words: frozenset[str]) -> str | None:
    """What a column does that is called a time or an index, if it does what those do."""
    if not words & (ROW_WORDS | TIME_WORDS):
        return None
    column = _column(values)
    change = np.diff(column)
    if (change >= 0).all() and change.any():
        return "never falls"
    if (change <= 0).all() and change.any():
        return "never rises"
    if words & ROW_WORDS and (column == np.rint(column)).all() and len(np.unique(column)) == len(column):
        return "has another whole number in every row"
    return None


def _labels(X: npt.NDArray[np.generic], words: Sequence[frozenset[str]]) -> dict[int, str]:
    """Columns of few small whole numbers: those called so, or the first or last one where the others are real."""
    whole = [bool((column == np.rint(column)).all()) for column in X[:SCREENED].T]
    found = {}
    for k in range(len(whole)):
        edge = k in (0, len(whole) - 1) and 2 * (sum(whole) - whole[k]) < len(whole) - 1
        if not whole[k] or not (edge or words[k] & LABEL_WORDS):
            continue
        values = np.unique(X[:, k])
        low, high, count = float(values[0]), float(values[-1]), len(values)
        few = 2 <= count <= min(MOST_LABELS, len(X) // RATIO)
        if few and (values == np.rint(values)).all() and abs(low) <= 10 and high - low < 2 * count:
            others = ", where others are real" if edge else ""
            found[k] = f"holds {count} whole numbers from {low:g} to {high:g} only{others}"
    return found


def _long_format(X: npt.NDArray[np.generic], words: Sequence[frozenset[str]]) -> tuple[int, int] | None:
    """The columns of the curve's number and of the time where a row is one moment of one curve."""
    columns = [_column(values) for values in X.T]
    for outer, inner in permutations(range(len(columns)), 2):
        date = words[outer] & TIME_WORDS and words[inner] & TIME_WORDS  # in two parts, 1972 and 3
        if not date and _runs_within(columns[outer], columns[inner]):
            by_time = words[outer] & TIME_WORDS or words[inner] & ROW_WORDS
            return (inner, outer) if by_time else (outer, inner)
    return None


def _runs_within(outer: Float64, inner: Float64) -> bool:
    """Whether `outer` stays in runs, each of a value of its own, and `inner` rises in each and starts again."""
    new = np.diff(outer) != 0
    starts = np.concatenate([[0], np.flatnonzero(new) + 1, [len(outer)]])
    runs = len(starts) - 1
    if runs < 2 or np.diff(starts).min() < 2 or len(np.unique(outer)) != runs:
        return False
    change = np.diff(inner)
    return bool((change[~new] > 0).all() and (change[new] < 0).all())


def _says_long(called: Sequence[str], curve: int, time: int, others: Sequence[int]) -> str:
    value = called[others[0]] if len(others) == 1 else "..."
    return (
        f"column {called[curve]} repeats while column {called[time]} runs through its values: is a line one moment of "
        f"a curve (long format)? It is to be a whole curve; in pandas df.pivot(index={called[curve]!r}, "
        f"columns={called[time]!r}, values={value!r})"
    )
