"""Figures of likelihoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array
from fastdiff.plots.layout import legend, one_axes, whole_numbers
from fastdiff.plots.style import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bound(terms: npt.ArrayLike, stderr: npt.ArrayLike) -> Figure:
    """Draw the variational bound's terms against the timestep, and their sum from t = 1 on.

    Parameters
    ----------
    terms, stderr : (T + 1,) array_like
        As of `fastdiff.likelihood.Bound`. Those of the decoder and of the prior are numbers below: the first is of
        another kind, and the last one small.

    Examples
    --------
    >>> from fastdiff import plots
    >>> s = fd.Schedule.cosine(20)
    >>> law = fd.denoisers.Gaussian(np.zeros(2), np.eye(2), s)
    >>> found = fd.likelihood.bound(law, np.ones((4, 2)), backend="numpy")
    >>> len(plots.bound(found.terms, found.stderr).axes)
    1
    """
    terms = check_array("terms", terms, shape=(None,), dtype=np.float64)
    stderr = check_array("stderr", stderr, shape=terms.shape, finite=False, dtype=np.float64)
    if len(terms) < 3:
        raise ArgumentError("terms", f"{len(terms)} terms", "at least 3")
    steps, spread = terms[1:-1], np.where(np.isfinite(stderr[1:-1]), stderr[1:-1], 0.0)
    t = np.arange(1, len(terms) - 1)
    with one_axes(6.4, 3.8) as (figure, axes):
        axes.fill_between(t, steps - spread, steps + spread, color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(t, steps, color=BLUE, linewidth=1.2, label="one step")
        axes.plot(t, np.cumsum(steps), color=ORANGE, linewidth=1.2, label="all up to here")
        axes.axhline(0, color=GREY, linewidth=0.6)
        # The steps next to the data cost many times what the others do.
        axes.set_yscale("symlog", linthresh=max(float(np.median(np.abs(steps))), 1e-12))
        others = f"and decoder {terms[0]:.4g}, prior {terms[-1]:.2g} nats"
        axes.set(title=f"Bound: {terms.sum():.4g} nats", xlabel=f"timestep t; {others}", ylabel="nats")
        whole_numbers(axes)
        legend(axes)
    return figure
