"""Figures of covariances and of what reshaping does to noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastdiff import covariance
from fastdiff.errors import ArgumentError, check_array
from fastdiff.plots.layout import blank, blues, horizontal, legend, one_axes, whole_numbers
from fastdiff.plots.style import BLUE, GREY, ORANGE, RED, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FLOOR = 1e-6  # of the largest eigenvalue: below it there is rounding, or nothing


def covariances(matrices: Mapping[str, npt.ArrayLike]) -> Figure:
    """Draw matrices as heat maps of one scale, and below them their spectra: how much lies in how few directions.

    Parameters
    ----------
    matrices : mapping of str to (n, n) array_like
        Titles and symmetric matrices, of any sizes. The effective rank (entropy form) stands with each. Eigenvalues
        below a millionth of the largest are drawn at that floor.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> matrices = {"one curve": fd.covariance.similarity(X[0], backend="numpy"), "noise": np.eye(50)}
    >>> len(plots.covariances(matrices).axes)
    4
    """
    given = {title: check_array("matrices", matrix, shape=(None, None)) for title, matrix in matrices.items()}
    if not given:
        raise ArgumentError("matrices", "none", "at least one")
    with styled():
        figure = blank(max(2.6 * len(given) + 0.8, 4.6), 5.0)
        top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2.4), squeeze=False)[:, 0]
        panels = top.subplots(1, len(given), squeeze=False)[0]
        low, high = (float(end([end(matrix) for matrix in given.values()])) for end in (np.min, np.max))
        for axes, (title, matrix) in zip(panels, given.items(), strict=True):
            image = axes.imshow(matrix, cmap="viridis", interpolation="nearest", vmin=low, vmax=high)
            axes.grid(visible=False)
            axes.set(title=title, xticks=[], yticks=[])
            rank = f"effective rank {covariance.effective_rank(matrix):.1f} of {len(matrix)}"
            axes.set_xlabel(rank, loc="left")
        bar = top.colorbar(image, ax=list(panels), fraction=0.05, pad=0.02, aspect=25)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7.5)
        axes = bottom.subplots()
        spectra = {title: covariance.spectrum(matrix) for title, matrix in given.items()}
        floor = FLOOR * max(float(values[0]) for values in spectra.values())
        styles = ("-", "--", ":", "-.") * len(given)
        colours = (GREY, BLUE, ORANGE, RED) * len(given)
        for (title, values), colour, style in zip(spectra.items(), colours, styles, strict=False):
            at = np.arange(1, len(values) + 1)
            axes.semilogy(at, np.maximum(values, floor), color=colour, linestyle=style, label=title)
        axes.axhline(floor, color=GREY, linewidth=0.6)
        axes.set(xlabel="eigenvalue", ylabel="size; floor: rounding", ylim=(0.5 * floor, None))
        whole_numbers(axes)
        legend(axes)
    return figure


def spectra(source: npt.ArrayLike, target: npt.ArrayLike) -> Figure:
    """Draw the spectra of two covariances and, on the same axes, the gain that turns one into the other.

    Parameters
    ----------
    source, target : (n, n) array_like
        Of `covariance.reshaping`; the gain of a direction is the root of the ratio of its eigenvalues.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> len(plots.spectra(np.eye(50), fd.covariance.similarity(X[0], backend="numpy")).axes)
    1
    """
    here, there = covariance.spectrum(source), covariance.spectrum(target)
    if len(here) != len(there):
        raise ArgumentError("target", f"size {len(there)}", f"size {len(here)}, as the source has")
    at, shown = np.arange(1, len(here) + 1), there > 1e-10 * there[0]
    with one_axes(6.4, 3.6) as (figure, axes):
        axes.semilogy(at, here, color=GREY, label="source")
        axes.semilogy(at[shown], there[shown], color=BLUE, label="target")
        gain = np.sqrt(there[shown] / here[shown])
        axes.semilogy(at[shown], gain, color=ORANGE, linestyle="--", label="gain")
        axes.set(title="What reshaping does to each direction", xlabel="eigenvalue", ylabel="size")
        whole_numbers(axes)
        legend(axes)
    return figure


def reshaped(
    before: npt.ArrayLike, after: npt.ArrayLike, signal: npt.ArrayLike, *, rate: float | None = None
) -> Figure:
    """Draw curves before and after a reshaping, coloured by how far from a signal each ends.

    Parameters
    ----------
    before, after : (m, n) array_like
        The same curves in the same order.
    signal : (n,) array_like
    rate : float, optional
        Points a second: the horizontal axis is in seconds.

    Examples
    --------
    >>> from fastdiff import plots
    >>> X = fd.data.harmonic_curves(40)
    >>> noise = fd.normal((40, 50), seed=0, backend="numpy")
    >>> shaped = fd.covariance.reshaping(np.eye(50), fd.covariance.similarity(X[0], backend="numpy")).apply(noise)
    >>> len(plots.reshaped(noise, shaped, X[0]).axes)
    3
    """
    first = check_array("before", before, shape=(None, None))
    last = check_array("after", after, shape=first.shape)
    wanted = check_array("signal", signal, shape=first.shape[1:])
    if not first.size:
        raise ArgumentError("before", f"shape {first.shape}", "at least one curve")
    with styled():
        from matplotlib.collections import LineCollection

        figure = blank(7.4, 3.4)
        panels = figure.subplots(1, 2, sharey=True)
        x, label = horizontal(first.shape[1], rate)
        distance = np.sqrt(np.mean((last - wanted) ** 2, axis=1))
        order = np.argsort(-distance)  # the nearest on top
        for axes, curves, title in zip(panels, (first, last), ("Noise", "Reshaped noise"), strict=True):
            lines = LineCollection(
                [np.column_stack([x, curve]) for curve in curves[order]],
                cmap=blues().reversed(), linewidths=0.8, array=distance[order],
            )  # fmt: skip
            axes.add_collection(lines)
            axes.plot(x, wanted, color=RED, linewidth=1.6, label="signal")
            axes.autoscale_view()
            axes.set(title=title, xlabel=label)
        panels[0].set_ylabel("value")
        legend(panels[1])
        bar = figure.colorbar(lines, ax=panels, pad=0.02, fraction=0.04, aspect=30)
        bar.set_label("distance to the signal in the end")
        bar.outline.set_visible(False)
    return figure
