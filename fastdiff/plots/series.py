"""Figures of series: a panel for each channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array
from fastdiff.plots.curves import FEWEST, LINES, QUANTILES
from fastdiff.plots.layout import blank, heading
from fastdiff.plots.style import BLUE, GREY, ORANGE, RED, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CHANNELS = 8  # that are drawn
LEAST_SHOWN = 10.0  # nats, on the scale of strangeness: noise alone stays near its foot
BANDS = (0.025, 0.25, 0.5, 0.75, 0.975)  # quantiles that are drawn where none are named


def series(
    drawn: npt.ArrayLike,
    reference: npt.ArrayLike | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str = "Generated",
) -> Figure:
    """Draw series over each other, a panel for each channel, and real ones below them in grey.

    Of 20 real ones and more and drawn there are bands that hold the middle 90 % at each point, and five of each.

    Parameters
    ----------
    drawn : array_like
        (n, points, channels).
    reference : array_like, optional
        (m, points, channels).
    names : sequence of str, optional
        Of the channels.
    title : str, optional
        The heading.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40).reshape(40, 25, 2)
    >>> len(plots.series(X[:5], X, names=["left", "right"]).axes)
    2
    """
    made = check_array("drawn", drawn, shape=(None, None, None))
    if not made.size:
        raise ArgumentError("drawn", f"shape {made.shape}", "at least one series")
    real = (
        None if reference is None else check_array("reference", reference, shape=(None, *made.shape[1:]), finite=False)
    )
    with styled():
        figure, panels = _panels(made.shape[2], names)
        for k, axes in enumerate(panels):
            banded = real is not None and min(len(real), len(made)) >= FEWEST
            for rows, colour, name in ((real, GREY, "real"), (made, BLUE, "generated")):
                if rows is not None and banded:
                    low, high = np.nanquantile(rows[..., k], QUANTILES, axis=0)
                    at = np.arange(len(low))
                    axes.fill_between(at, low, high, color=colour, alpha=0.25, lw=0, label=f"5 to 95 %, {name}")
                for row in () if rows is None else rows[: LINES if banded else None, :, k]:
                    axes.plot(row, color=colour, linewidth=0.8, alpha=0.7, label=name)
        panels[-1].set_xlabel("point")
        _finish(figure, panels, title)
    return figure


def bands(
    known: npt.ArrayLike,
    quantiles: Mapping[float, npt.ArrayLike],
    *,
    truth: npt.ArrayLike | None = None,
    times: Any = None,
    names: Sequence[str] | None = None,
    title: str = "Given what is known",
) -> Figure:
    """Draw a recording with its gaps, or its end, and the bands of what was drawn there; a panel for each channel.

    Parameters
    ----------
    known : array_like
        (time,) or (time, channels), NaN where nothing is known.
    quantiles : mapping of float to array_like
        Of the draws, each like `known`. Levels that are as far from 0 as others from 1 are a band.
    truth : array_like, optional
        Like `known`; drawn as well.
    times : array_like, optional
        (time,); by default rows are counted.
    names : sequence of str, optional
        Of the channels.
    title : str, optional
        The heading.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> known = np.where(np.arange(50) < 30, X[0], np.nan)
    >>> figure = plots.bands(known, {0.05: X[0] - 0.5, 0.5: X[0], 0.95: X[0] + 0.5}, truth=X[0])
    >>> len(figure.axes[0].collections) > 0  # the band of 90 %
    True
    """
    seen = check_array("known", known, finite=False)
    if seen.ndim not in (1, 2) or not seen.size:
        raise ArgumentError("known", f"shape {seen.shape}", "(time,) or (time, channels)")
    of_levels = {q: check_array("quantiles", v, shape=seen.shape, finite=False) for q, v in sorted(quantiles.items())}
    levels = list(of_levels)
    hidden = None if truth is None else check_array("truth", truth, shape=seen.shape, finite=False)
    at = np.arange(len(seen)) if times is None else np.asarray(times)
    with styled():
        figure, panels = _panels(1 if seen.ndim == 1 else seen.shape[1], names)
        for k, axes in enumerate(panels):

            def of(values: Any, k: int = k) -> Any:
                return values if seen.ndim == 1 else values[:, k]

            for j, level in enumerate(levels):
                other = next((q for q in levels if abs(q + level - 1) < 1e-9), None)
                if level < 0.5 and other is not None:
                    label, shade = f"{other - level:.0%} of draws", 0.2 + 0.2 * min(j, 2)
                    axes.fill_between(
                        at, of(of_levels[level]), of(of_levels[other]), color=BLUE, alpha=shade, lw=0, label=label
                    )
                elif level == 0.5 or other is None:
                    axes.plot(
                        at,
                        of(of_levels[level]),
                        color=BLUE,
                        linewidth=1.0,
                        label="median" if level == 0.5 else f"{level:g}",
                    )
            if hidden is not None:
                axes.plot(at, of(hidden), color=RED, linewidth=1.0, label="the truth")
            size = 2.5 if len(seen) <= 200 else 1.2
            axes.plot(at, of(seen), color=ORANGE, marker="o", markersize=size, linewidth=0.8, label="known")
        _finish(figure, panels, title)
        _label_times(figure, panels, at)
    return figure


def anomaly(
    X: npt.ArrayLike, scores: npt.ArrayLike, *, names: Sequence[str] | None = None, times: Any = None
) -> Figure:
    """Draw a recording (time, channels), and below each channel how strange each of its values is, on one scale.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(1).reshape(25, 2)
    >>> len(plots.anomaly(X, np.abs(X)).axes)  # a recording and its scores, for each channel
    4
    """
    values = check_array("X", X, finite=False)
    found = check_array("scores", scores, shape=values.shape, finite=False)
    values, found = (v[:, None] if v.ndim == 1 else v for v in (values, found))
    at = np.arange(len(values)) if times is None else np.asarray(times)
    most = max(LEAST_SHOWN, float(np.nanmax(found, initial=0.0)))
    with styled():
        figure, panels = _panels(values.shape[1], names)
        for k, axes in enumerate(panels):
            axes.plot(at, values[:, k], color=BLUE, linewidth=1.0, label="value")
            other = axes.twinx()
            other.grid(visible=False)
            other.set_ylim(0, 1.05 * most)
            other.fill_between(at, 0, found[:, k], color=RED, alpha=0.35, lw=0)
            axes.set_zorder(other.get_zorder() + 1)  # values over it, on a page that shows it
            axes.patch.set_visible(False)
            axes.fill_between([], [], color=RED, alpha=0.35, lw=0, label="strangeness, nats (right)")
        panels[-1].set_xlabel("row")
        _finish(figure, panels, "What is strange")
        _label_times(figure, panels, at)
    return figure


def _panels(channels: int, names: Sequence[str] | None) -> tuple[Figure, list[Any]]:
    shown = min(channels, MOST_CHANNELS)
    figure = blank(7.8, 1.35 * shown + 1.1)
    panels = list(figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0])
    for k, axes in enumerate(panels):
        axes.set_ylabel(names[k] if names else "value" if channels == 1 else f"channel {k + 1}")
    return figure, panels


def _label_times(figure: Figure, panels: Sequence[Any], at: npt.NDArray[Any]) -> None:
    if at.dtype.kind == "M":
        figure.autofmt_xdate(rotation=20)
    else:
        panels[-1].set_xlabel("row")


def _finish(figure: Figure, panels: Sequence[Any], title: str) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    heading(figure, title, list(unique.values()), list(unique))
