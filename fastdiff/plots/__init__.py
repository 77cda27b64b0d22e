"""Figures: each function takes arrays and returns a matplotlib ``Figure``; `save` writes it. `animation` and
`moving_curves` write GIFs.

A notebook shows a figure that is the last value of a cell.

matplotlib is imported inside the functions only, and never through pyplot: nothing global is touched, no
window opens, and a figure drawn in a thread or on a machine without a display is the same figure. One style
serves them all; colours and maps are safe for colour-blind readers (Okabe and Ito 2008; blues, viridis). Legends
and colour bars stand outside the axes, so they hide no data.
"""

from fastdiff.plots.covariance import covariances, reshaped, spectra
from fastdiff.plots.curves import (
    around_target,
    forward_diffusion,
    generated,
    imputed,
    moving_curves,
    reverse_chain,
    reverse_lines,
)
from fastdiff.plots.evaluation_page import evaluation
from fastdiff.plots.likelihood import bound
from fastdiff.plots.pictures import animation, image_grid, image_trace
from fastdiff.plots.samplers import tradeoff
from fastdiff.plots.series import BANDS, anomaly, bands, series
from fastdiff.plots.speed import scaling, shares
from fastdiff.plots.style import BLUE, ENDINGS, GREY, ORANGE, RED, STYLE, check_available, save, write
from fastdiff.plots.training import convergence, loss, schedule_factors

__all__ = [
    "BANDS",
    "BLUE",
    "ENDINGS",
    "GREY",
    "ORANGE",
    "RED",
    "STYLE",
    "animation",
    "anomaly",
    "around_target",
    "bands",
    "bound",
    "check_available",
    "convergence",
    "covariances",
    "evaluation",
    "forward_diffusion",
    "generated",
    "image_grid",
    "image_trace",
    "imputed",
    "loss",
    "moving_curves",
    "reshaped",
    "reverse_chain",
    "reverse_lines",
    "save",
    "scaling",
    "schedule_factors",
    "series",
    "shares",
    "spectra",
    "tradeoff",
    "write",
]
