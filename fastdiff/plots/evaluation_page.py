"""The page of generated rows beside real ones: `evaluation`, its numbers and its panels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_int
from fastdiff.plots.layout import blank, heading, horizontal, whole_numbers
from fastdiff.plots.style import BLUE, GREY, RED, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Float64 = npt.NDArray[np.float64]

FEW_COLUMNS = 8  # fewer are no curve
JUMP, JUMPS = 3, 0.2  # nor are columns whose deviation is so many times its neighbour's, for more than this share
WIDE_APART = 10  # columns whose deviations differ by more are drawn in their own
NAMED_COLUMNS = 40  # at most, that have a tick each
MOST_ROWS = 512  # generated and real ones, whose nearest rows are looked for
MOST_TRAINING = 20_000
BAND = (5, 50, 95)  # percentiles
LETTERS = 112  # of a measured line, its name included
WIDTH = 9.6  # inches
BINS = 40


def evaluation(
    real: npt.ArrayLike,
    generated: npt.ArrayLike,
    training: npt.ArrayLike | None = None,
    *,
    names: tuple[str, str] = ("real", "generated"),
    measures: Mapping[str, str] | None = None,
    title: str = "Generated beside real",
    count: int = 12,
    rate: float | None = None,
    columns: Sequence[str] | None = None,
    ordered: bool | None = None,
) -> Figure:
    """Draw on one page how generated rows compare with real ones.

    From above: what was measured; a dozen rows of each; percentiles, mean and standard deviation of every column;
    autocorrelation and power spectrum within rows, or, of a table of different things, its correlations; all values;
    the distances to the nearest training rows, and three generated rows over their nearest one.

    Parameters
    ----------
    real : array_like
        (N, d), N at least 1: rows that were not learned from, if there are any.
    generated : array_like
        (M, d), M at least 1.
    training : array_like, optional
        (K, d), the rows learned from. Without them nearest rows are looked for among the real ones.
    names : pair of str, optional
        What the legend calls real and generated rows; the second one may name the sampler: `Sampler.label`.
    measures : mapping of str to str, optional
        Lines for the head of the page: what was measured, and the result.
    title : str, optional
        The heading.
    count : int, optional
        Rows of each kind that are drawn one by one, evenly spaced.
    rate : float, optional
        Points a second: horizontal axes are in seconds and hertz. Otherwise they count points.
    columns : sequence of str, optional
        (d,) names, for tables.
    ordered : bool, optional
        Whether the columns follow one another, as those of curves do. By default they do if there are at least eight,
        and the real rows' deviation seldom jumps from one to the next: at most a fifth by more than three times. If
        they do not, and some deviations are ten times others, columns are drawn, and distances taken, as standard
        scores of the real rows.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> figure = plots.evaluation(X[:20], X[20:], count=4)
    >>> len(figure.axes) > 4
    True
    """
    rows = {"real": real, "generated": generated, "training": training}
    given = {name: check_array(name, value, shape=(None, None)) for name, value in rows.items() if value is not None}
    shape = (None, given["real"].shape[1])
    for name, value in given.items():
        given[name] = check_array(name, value, shape=shape, dtype=np.float64)
        if not value.size:
            raise ArgumentError(name, f"shape {value.shape}", "at least one row of at least one value")
    if columns is not None and len(columns) != shape[1]:
        raise ArgumentError("columns", f"{len(columns)} names", f"one for each of {shape[1]} columns")
    with styled():
        page = page_of(
            given["real"], given["generated"], given.get("training"), ordered=ordered, rate=rate, columns=columns
        )
        return draw(page, names=names, measures=measures or {}, title=title, count=check_int("count", count, low=1))


# --------------------------------------------------------------------------------------- numbers


def autocorrelation(X: Float64) -> Float64:
    """Mean autocorrelation of curves (N, d) at lags 0 .. d // 2.

    ``r_k = sum_i x_i x_(i + k) / sum_i x_i^2`` of each curve less its own mean (Box and Jenkins 1970, 2.1.5). Constant
    curves have none; without any other curve the result is NaN.
    """
    d = X.shape[1]
    centred = X - X.mean(axis=1, keepdims=True)
    power = np.abs(np.fft.rfft(centred, 2 * d)) ** 2
    products = np.fft.irfft(power, 2 * d)[:, : d // 2 + 1]
    varied = products[:, 0] > 1e-12 * np.square(X).sum(axis=1)
    if not varied.any():
        return np.full(d // 2 + 1, np.nan)
    mean: Float64 = (products[varied] / products[varied, :1]).mean(axis=0)
    return mean


def spectrum(X: Float64) -> Float64:
    """Mean power ``|sum_k x_k exp(-2 pi i j k / d)|^2 / d`` of curves (N, d), each less its mean; j = 1 .. d // 2."""
    centred = X - X.mean(axis=1, keepdims=True)
    power: Float64 = np.square(np.abs(np.fft.rfft(centred))).mean(axis=0)[1:] / X.shape[1]
    return power


def correlations(X: Float64) -> Float64:
    """Correlations of all pairs of columns of (N, d), NaN with a constant one."""
    centred = X - X.mean(axis=0)
    norm = np.sqrt(np.square(centred).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = (centred.T @ centred) / np.outer(norm, norm)
    pairs: Float64 = matrix[np.triu_indices(X.shape[1], 1)]
    return pairs


def nearest(X: Float64, rows: Float64, *, others: bool = False) -> tuple[Float64, npt.NDArray[np.int64]]:
    """Root mean square distance of each row of X to the nearest of `rows`, and which that is.

    With `others` X is the beginning of `rows`, and no row counts as its own neighbour.
    """
    squares = np.square(rows).sum(axis=1)
    index = np.empty(len(X), np.int64)
    for start in range(0, len(X), 64):
        part = X[start : start + 64]
        apart = squares - 2 * part @ rows.T  # squared distances but for |x|^2
        if others:
            apart[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        index[start : start + 64] = apart.argmin(axis=1)
    return np.sqrt(np.square(X - rows[index]).mean(axis=1)), index


# --------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Page:
    """What all panels share.

    Attributes
    ----------
    real, made : (N, d), (M, d) float64
        In the units that are drawn.
    training : (K, d) float64 or None
        Rows learned from; None: `real` is taken for them.
    ordered : bool
        Whether the columns follow one another.
    x, along, value : (d,) array, str, str
        Where the columns are drawn, what that axis counts, and what the values are.
    words : sequence of str
        What each column is called, if they have ticks of their own; at most 24 letters.
    """

    real: Float64
    made: Float64
    training: Float64 | None
    ordered: bool
    x: Float64
    along: str
    value: str
    words: Sequence[str]

    @property
    def upright(self) -> bool:
        """Whether words side by side would run into each other."""
        return sum(map(len, self.words)) + 2 * len(self.words) > 105

    @property
    def pair(self) -> tuple[tuple[Float64, str], tuple[Float64, str]]:
        """Real and generated rows with their colours, in the order of drawing."""
        return (self.real, GREY), (self.made, BLUE)


def page_of(
    real: Float64,
    made: Float64,
    training: Float64 | None,
    *,
    ordered: bool | None,
    rate: float | None,
    columns: Sequence[str] | None,
) -> Page:
    """What is drawn of these rows: as they are, or, of columns of different sizes, in their deviations."""
    d = real.shape[1]
    deviation = real.std(axis=0)
    some = deviation[deviation > 0]
    if ordered is None:
        jumps = np.abs(np.diff(np.log(some))) > np.log(JUMP)
        ordered = d >= FEW_COLUMNS and (len(some) < 2 or bool(jumps.mean() <= JUMPS))
    value = "value"
    if not ordered and len(some) and some.max() > WIDE_APART * some.min():
        whole = real if training is None else training  # few real rows have moments of their own
        mean, unit = whole.mean(axis=0), whole.std(axis=0)
        unit = np.where(unit > 0, unit, 1.0)
        real, made = (real - mean) / unit, (made - mean) / unit
        training = None if training is None else (training - mean) / unit
        value = "standard score"
    if ordered:
        x, along = horizontal(d, rate)
    else:
        x, along = np.arange(1.0, d + 1), "column"
    words = [] if ordered or d > NAMED_COLUMNS else list(columns or map(str, range(1, d + 1)))
    words = [word if len(word) <= 24 else f"{word[:23]}…" for word in words]
    return Page(real, made, training, ordered, x, along, value, words)


def draw(page: Page, *, names: tuple[str, str], measures: Mapping[str, str], title: str, count: int) -> Figure:
    """The whole page."""
    from matplotlib.lines import Line2D

    lines = _lines(measures)
    heights = [0.215 * len(lines) - 0.25] * bool(lines) + [1.7, 1.9, 1.5, 1.7, 1.7, 1.3]
    figure = blank(WIDTH, sum(heights) + 0.6 * len(heights) + 0.2)
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.06)  # type: ignore[union-attr,call-arg]
    if lines:
        _say(figure.add_subplot(grid[0, :]), lines)
    rows = iter(range(bool(lines), len(heights)))

    def panels(many: int, *, shared: bool = False) -> list[Axes]:
        row, wide = next(rows), 6 // many
        made: list[Axes] = []
        for k in range(many):
            place = grid[row, k * wide : (k + 1) * wide]
            made.append(figure.add_subplot(place, sharey=made[0] if shared and made else None))
        return made

    _overlay(panels(2, shared=True), page, count)
    _bands(panels(1)[0], page)
    _moments(panels(2), page)
    (_in_order if page.ordered else _in_pairs)(panels(2), page)
    left, right = panels(2)
    _histogram(left, [(rows.ravel(), color) for rows, color in page.pair], page.value)
    left.set_title("All values", **SMALL)
    of_train = "training" if page.training is not None else "real"
    chosen = _distances(right, page)
    _neighbours(panels(3, shared=True), page, chosen)

    handles = [Line2D([], [], color=color) for color in (GREY, BLUE, RED)]
    heading(figure, title, handles, [*names, f"nearest {of_train} row"])
    return figure


SMALL: dict[str, Any] = {"fontsize": 9, "fontweight": "normal", "pad": 4}


def _lines(measures: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and values, each value in lines that fit the page."""
    lines = []
    room = max(40, LETTERS - max(map(len, measures), default=0))
    for name, value in measures.items():
        first, *more = textwrap.wrap(str(value), room) or [""]
        lines += [(name, first), *(("", line) for line in more)]
    return lines


def _say(axes: Axes, lines: Sequence[tuple[str, str]]) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, WIDTH), ylim=(len(lines) - 0.5, -0.5))
    at = 0.25 + 0.073 * max(len(name) for name, _ in lines)  # inches
    for k, (name, value) in enumerate(lines):
        axes.text(0, k, name, va="center", color=GREY)
        axes.text(at, k, value, va="center")


def _columns(axes: Axes, page: Page, *, named: bool = False) -> None:
    """Label the axis along which the columns stand."""
    axes.set_xlabel(page.along)
    if page.ordered:
        return
    axes.set_xlim(0.4, len(page.x) + 0.6)
    if len(page.x) > 15:
        whole_numbers(axes)
    else:
        axes.set_xticks(page.x, [f"{x:.0f}" for x in page.x])
    if named and page.words:
        size = 8.5 if len(page.x) < 25 else 7
        axes.set_xticks(page.x, page.words, rotation=90 if page.upright else 0, fontsize=size)


def _series(axes: Axes, page: Page, values: Float64, color: str, side: int, **options: Any) -> None:
    """One value at each column: a line where they follow one another, else a mark beside the middle."""
    if page.ordered:
        axes.plot(page.x, values, color=color, linewidth=1.4, **options)
    else:
        axes.plot(page.x + 0.14 * side, values, color=color, marker="o", markersize=4, linestyle="none", **options)


def _overlay(panels: Sequence[Axes], page: Page, count: int) -> None:
    for axes, (rows, color), name in zip(panels, page.pair, ("real", "generated"), strict=True):
        shown = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
        mark: dict[str, Any] = {} if page.ordered else {"marker": "o", "markersize": 2.5}
        axes.plot(page.x, shown.T, color=color, linewidth=0.8, alpha=0.75, **mark)
        axes.set_title(f"{len(shown)} of {len(rows):,} {name} rows", **SMALL)
        _columns(axes, page)
    panels[0].set_ylabel(page.value)


def _bands(axes: Axes, page: Page) -> None:
    for side, (rows, color) in zip((-1, 1), page.pair, strict=True):
        low, middle, high = np.percentile(rows, BAND, axis=0)
        if page.ordered:
            axes.fill_between(page.x, low, high, color=color, alpha=0.25, linewidth=0)
        else:
            axes.vlines(page.x + 0.14 * side, low, high, color=color, linewidth=3, alpha=0.45)
        _series(axes, page, middle, color, side)
    axes.set_title(f"{BAND[0]} to {BAND[2]} % of the values, and the median", **SMALL)
    axes.set_ylabel(page.value)
    _columns(axes, page, named=True)


def _moments(panels: Sequence[Axes], page: Page) -> None:
    left, right = panels
    for side, (rows, color) in zip((-1, 1), page.pair, strict=True):
        _series(left, page, rows.mean(axis=0), color, side)
        _series(right, page, rows.std(axis=0), color, side)
    for axes, name in ((left, "Mean"), (right, "Standard deviation")):
        axes.set_title(name, **SMALL)
        _columns(axes, page)
    left.set_ylabel(page.value)
    right.set_ylim(0, 1.08 * max(float(rows.std(axis=0).max()) for rows, _ in page.pair) or 1)


def _in_order(panels: Sequence[Axes], page: Page) -> None:
    """What columns that follow one another have: autocorrelation and spectrum."""
    left, right = panels
    step = page.x[1] - page.x[0] if len(page.x) > 1 else 1.0
    d = len(page.x)
    powers = []
    for rows, color in page.pair:
        left.plot(np.arange(d // 2 + 1) * step, autocorrelation(rows), color=color, linewidth=1.4)
        powers.append(spectrum(rows))
        right.plot(np.arange(1, d // 2 + 1) / (d * step), powers[-1], color=color, linewidth=1.4)
    left.axhline(0, color="black", linewidth=0.6)
    left.set_title("Autocorrelation within a row, mean of the rows", **SMALL)
    left.set(xlabel=page.along.replace("point", "lag (points)").replace("time", "lag"), ylabel="correlation")
    _logarithmic(right, np.concatenate(powers))
    right.set_title("Power spectrum, mean of the rows", **SMALL)
    right.set(xlabel="cycles a point" if page.along == "point" else "frequency (Hz)", ylabel="power")


def _logarithmic(axes: Axes, powers: Float64) -> None:
    """A log axis, where there is something to show, and not all of what is only rounding."""
    some = powers[powers > 0]
    if len(some):
        axes.set_yscale("log")
        axes.set_ylim(max(some.min(), 1e-8 * some.max()) / 2, 2 * some.max())


def _in_pairs(panels: Sequence[Axes], page: Page) -> None:
    """What columns of different things have: correlations, and the two that belong together most."""
    left, right = panels
    real, made = correlations(page.real), correlations(page.made)
    left.plot([-1, 1], [-1, 1], color=GREY, linewidth=1)
    left.plot(real, made, color=BLUE, marker="o", markersize=2.5, linestyle="none", alpha=0.7)
    left.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xlabel="among real rows", ylabel="among generated rows")
    left.set_title("Correlation of each pair of columns", **SMALL)
    strength = np.where(np.isnan(real), -1.0, np.abs(real))
    first, second = (int(k[strength.argmax()]) for k in np.triu_indices(len(page.x), 1)) if len(real) else (0, 0)
    for rows, color in reversed(page.pair):  # a few real rows lie over many generated ones
        right.plot(
            rows[:MOST_ROWS, first],
            rows[:MOST_ROWS, second],
            color=color,
            marker="o",
            markersize=2.5,
            linestyle="none",
            alpha=0.5,
        )
    names = [page.words[k] if page.words else str(k + 1) for k in (first, second)]
    right.set(xlabel=f"column {names[0]}", ylabel=f"column {names[1]}")
    right.set_title("The two columns that go together most", **SMALL)


def _histogram(axes: Axes, sets: Sequence[tuple[Float64, str]], label: str) -> None:
    """Densities of several sets of values, over the range of all."""
    every = np.concatenate([values for values, _ in sets])
    low, high = float(every.min()), float(every.max())
    margin = 0.02 * (high - low) or 0.5 * abs(low) or 0.5
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    for values, color in sets:
        weights = np.full(len(values), 1 / (max(1, len(values)) * (edges[1] - edges[0])))
        options: dict[str, Any] = {"bins": edges, "weights": weights, "color": color}
        axes.hist(values, histtype="stepfilled", alpha=0.25, linewidth=0, **options)
        axes.hist(values, histtype="step", linewidth=1.4, **options)
    axes.set(xlabel=label, ylabel="density")


def _distances(axes: Axes, page: Page) -> list[tuple[str, Float64, Float64]]:
    """Draw how far generated and real rows are from the nearest row learned from; return three with their nearest."""
    every = page.real if page.training is None else page.training
    learned = every[:: -(-len(every) // MOST_TRAINING)]
    made = page.made[:MOST_ROWS]
    of_made, index = nearest(made, learned)
    of_real = np.zeros(1) if page.training is None else nearest(page.real[:MOST_ROWS], learned)[0]
    sets = [(of_made, BLUE)]
    if of_real.any() or len(learned) > 1:
        if not of_real.any():  # they were learned from
            of_real, _ = nearest(learned[:MOST_ROWS], learned, others=True)
        sets.insert(0, (of_real, GREY))
    _histogram(axes, sets, "root mean square distance")
    for values, color in sets:
        axes.axvline(float(np.median(values)), color=color, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_xlim(left=0)
    words = "Distance to the nearest " + ("training row" if page.training is not None else "other real row")
    some = f"{len(learned):,} of the {len(every):,} rows; " if len(learned) < len(every) else ""
    axes.set_title(f"{words} ({some}dashed: median)", **SMALL)
    order = np.argsort(of_made, kind="stable")
    places = ((0, "Nearest of all"), (len(order) // 2, "In the middle"), (len(order) - 1, "Farthest"))
    return [(f"{word}: {of_made[order[k]]:.3g} away", made[order[k]], learned[index[order[k]]]) for k, word in places]


def _neighbours(panels: Sequence[Axes], page: Page, chosen: Sequence[tuple[str, Float64, Float64]]) -> None:
    """Generated rows over their nearest rows of training."""
    mark: dict[str, Any] = {} if page.ordered else {"marker": "o", "markersize": 3}
    for axes, (word, row, neighbour) in zip(panels, chosen, strict=True):
        axes.plot(page.x, neighbour, color=RED, linewidth=1.4, **mark)
        axes.plot(page.x, row, color=BLUE, linewidth=1.2, **mark)
        axes.set_title(word, **SMALL)
        _columns(axes, page)
    panels[0].set_ylabel(page.value)
