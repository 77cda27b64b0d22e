"""Pictures side by side, on their way from noise, and moving."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_float, check_int
from fastdiff.files import check_ending, writing
from fastdiff.pictures import as_uint8, check_pillow, to_pillow
from fastdiff.plots.layout import blank, named_by
from fastdiff.plots.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, GAP, MARGIN = 960, 6, 24  # pixels: of a usual figure, between pictures, around them


def image_grid(
    images: npt.ArrayLike,
    *,
    columns: int = 4,
    labels: Sequence[object] | None = None,
    title: str = "Generated pictures",
    data_range: tuple[float, float] = (0, 255),
    reference: npt.ArrayLike | None = None,
) -> Figure:
    """Draw pictures side by side, row by row; small ones enlarged by a whole number, pixel for pixel.

    With a reference these are on the left, and as many real ones on the right.

    Parameters
    ----------
    images : array_like
        (N, H, W, C) real numbers, C = 1 (gray) or 3 (RGB).
    columns : int, optional
        Pictures in a row.
    labels : sequence, optional
        A word or number above each picture, or, where there are as many as columns, above each column.
    title : str, optional
        The heading.
    data_range : pair of float, optional
        The values of black and white; what is outside is clipped.
    reference : array_like, optional
        (M, H, W, C): real pictures. Then there are no labels.

    Examples
    --------
    >>> from fastdiff import plots
    >>> faces = fd.data.portraits(8, 16)
    >>> figure = plots.image_grid(faces, columns=4, labels=range(8))
    >>> len(figure.axes) > 0
    True
    """
    pixels = as_uint8(images, data_range=data_range)
    columns = min(check_int("columns", columns, low=1), len(pixels))
    if not len(pixels):
        raise ArgumentError("images", "none", "at least one")
    words = [] if labels is None else [str(label) for label in labels]
    if labels is not None and len(words) not in (len(pixels), columns):
        wants = f"one for each of {len(pixels)} pictures or {columns} columns"
        raise ArgumentError("labels", f"{len(words)} words", wants)
    if reference is None:
        return _pictures(pixels, columns, title, words)
    if words:
        raise ArgumentError(
            "labels", f"{len(words)} words", "None with a reference: columns are named by what they are"
        )
    real = as_uint8(reference, data_range=data_range, argument="reference")
    if real.shape[1:] != pixels.shape[1:] or not len(real):
        raise ArgumentError("reference", f"shape {real.shape}", f"pictures of shape {pixels.shape[1:]}")
    blank_one = np.full_like(pixels[:1], 255)
    rows = -(-len(pixels) // columns)
    halves = [
        np.concatenate([half[: rows * columns], *[blank_one] * (rows * columns - len(half))]) for half in (pixels, real)
    ]
    left, right = (half.reshape(rows, columns, *pixels.shape[1:]) for half in halves)
    between = np.broadcast_to(blank_one, (rows, 1, *pixels.shape[1:]))
    whole = np.concatenate([left, between, right], axis=1).reshape(-1, *pixels.shape[1:])
    names = ["generated", *[""] * columns, "real", *[""] * (columns - 1)]
    return _pictures(whole, 2 * columns + 1, title, names)


def image_trace(
    path: npt.ArrayLike,
    *,
    frames: int = 11,
    data_range: tuple[float, float] = (0, 255),
    sampler: str | None = None,
) -> Figure:
    """Draw chains from noise to picture, a row each, in frames that are evenly spaced over the steps.

    Parameters
    ----------
    path : array_like
        (steps + 1, n, H, W, C), noise first: a trajectory, every chain of which is drawn. Or that of one chain,
        (steps + 1, H, W, C).
    frames : int, optional
        Pictures of each chain, at least 2; all of them where there are fewer.
    data_range : pair of float, optional
        The values of black and white; what is outside is clipped, so early frames show less contrast than they have.
    sampler : str, optional
        What drew them, for the heading: `Sampler.label`.

    Examples
    --------
    >>> from fastdiff import plots
    >>> faces = fd.data.portraits(8, 16)
    >>> path = np.linspace(faces[::-1], faces, 4)
    >>> len(plots.image_trace(path[:, :2], frames=3).axes) > 0
    True
    """
    pixels, steps = _frames(path, frames, data_range)
    shown = np.swapaxes(pixels, 0, 1).reshape(-1, *pixels.shape[2:])
    words = [str(step) for step in steps]
    title = named_by("From noise to a picture", sampler)
    return _pictures(shown, len(steps), title, words, caption="sampling steps done")


def animation(
    path: npt.ArrayLike,
    file: str | os.PathLike[str],
    *,
    columns: int = 4,
    frames: int = 50,
    seconds: float = 4.0,
    hold: float = 2.0,
    data_range: tuple[float, float] = (0, 255),
) -> None:
    """Write chains from noise to picture as an animated GIF that repeats for ever; needs Pillow, not matplotlib.

    Gray pictures keep every value; in colour each frame has the 255 colours that suit it best, and the gaps are white.

    Parameters
    ----------
    path : array_like
        (steps + 1, n, H, W, C), noise first: a trajectory, whose n chains run side by side. Or that of one chain,
        (steps + 1, H, W, C).
    file : path
        A file name that ends in .gif. It appears whole or not at all.
    columns : int, optional
        Pictures in a row.
    frames : int, optional
        States shown, at least 2, evenly spaced over the steps; all of them where there are fewer.
    seconds, hold : float, optional
        Time for all frames, and how much longer the last one stands.
    data_range : pair of float, optional
        The values of black and white; what is outside is clipped.

    Examples
    --------
    >>> from fastdiff import plots
    >>> faces = fd.data.portraits(8, 16)
    >>> path = np.linspace(faces[::-1], faces, 4)  # (4, 8, 16, 16, 3)
    >>> plots.animation(path, "faces.gif", frames=4)
    >>> from pathlib import Path
    >>> Path("faces.gif").read_bytes()[:3]
    b'GIF'
    """
    check_pillow()
    check_ending(file, (".gif",))
    pixels, steps = _frames(path, frames, data_range)
    columns = min(check_int("columns", columns, low=1), pixels.shape[1])
    times = check_times(seconds, hold, len(steps))
    scale = _enlargement(pixels.shape[2:4], columns, 96)
    write_gif([_indexed(frame, columns, scale) for frame in pixels], file, times)


def check_times(seconds: float, hold: float, frames: int) -> list[int]:
    """How long each of so many frames stands, in milliseconds."""
    # GIF counts hundredths of a second, and many viewers take less than two of them for ten.
    each = max(20, round(1000 * check_float("seconds", seconds, low=0, low_open=True) / frames))
    return [each] * (frames - 1) + [each + round(1000 * check_float("hold", hold, low=0, high=600))]


def write_gif(images: Sequence[Any], file: str | os.PathLike[str], times: Sequence[int]) -> None:
    """Write pictures of Pillow as a GIF that repeats for ever, each for so many milliseconds."""
    with writing(file) as out:
        images[0].save(
            out, format="GIF", save_all=True, append_images=images[1:], loop=0, optimize=False, duration=list(times)
        )


def _enlargement(size: Sequence[int], columns: int, most: int) -> int:
    """The whole number by which pictures (H, W) are enlarged: to at most so many pixels, and a row to `WIDTH`."""
    return max(1, min(most // max(size), WIDTH // (columns * size[1])))


def _mosaic(
    pictures: npt.NDArray[np.uint8], columns: int, scale: int, gap: tuple[int, int] = (GAP, GAP)
) -> npt.NDArray[np.uint8]:
    """Pictures (n, H, W, C) enlarged and laid out in rows on 255, (rows (scale H + gap) - gap, ..., C)."""
    n, height, width, channels = pictures.shape
    rows, high, wide = -(-n // columns), height * scale, width * scale
    cells = np.full((rows * columns, high + gap[0], wide + gap[1], channels), 255, np.uint8)
    cells[:n, :high, :wide] = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return grid.reshape(rows * (high + gap[0]), -1, channels)[: -gap[0], : -gap[1]]


def _pictures(
    pixels: npt.NDArray[np.uint8], columns: int, title: str, words: Sequence[str], caption: str | None = None
) -> Figure:
    """Pictures in rows, a pixel of theirs a square of whole pixels of the figure, with words above the first ones."""
    scale = _enlargement(pixels.shape[1:3], columns, 160)
    line = 26  # pixels of a line of words
    gap = (GAP + line if len(words) > columns else GAP, GAP)
    mosaic = _mosaic(pixels, columns, scale, gap)
    height, width = mosaic.shape[:2]
    with styled():
        figure = blank(1, 1)
        figure.set_layout_engine("none")  # places are given in pixels
        heading = figure.suptitle(title, ha="left", va="top", fontsize=10.5, fontweight="bold")
        room = heading.get_window_extent().width
        above = MARGIN + 34 + (line if words else 0)
        below = MARGIN + (line if caption else 0)
        whole_width, whole_height = max(width, int(room) + 1) + 2 * MARGIN, above + height + below
        figure.set_size_inches(whole_width / figure.dpi, whole_height / figure.dpi)
        heading.set_position((MARGIN / whole_width, 1 - MARGIN / whole_height))
        axes = figure.add_axes(
            (MARGIN / whole_width, below / whole_height, width / whole_width, height / whole_height), frameon=False
        )
        axes.imshow(mosaic.repeat(3 // mosaic.shape[2], axis=2), interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        cell = (pixels.shape[1] * scale + gap[0], pixels.shape[2] * scale + gap[1])
        for k, word in enumerate(words):
            row, column = divmod(k, columns)
            axes.text(
                column * cell[1] + (cell[1] - gap[1]) / 2 - 0.5, row * cell[0] - 0.5 - GAP, word,
                ha="center", va="bottom", fontsize=8.5,
            )  # fmt: skip
        if caption:
            axes.set_xlabel(caption, loc="left")
    return figure


def _frames(
    path: npt.ArrayLike, frames: int, data_range: tuple[float, float]
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """States of a trajectory as bytes (frames, n, H, W, C), evenly spaced, and the number of steps before each."""
    states = check_array("path", path, min_ndim=4, finite=False)
    if states.ndim == 4:
        states = states[:, None]
    if states.ndim != 5 or len(states) < 2 or not states.shape[1]:
        raise ArgumentError("path", f"shape {states.shape}", "(steps + 1, n, H, W, C) with at least one step")
    count = min(check_int("frames", frames, low=2), len(states))
    steps = np.linspace(0, len(states) - 1, count).round().astype(int).tolist()
    shown = states[steps]
    pixels = as_uint8(shown.reshape(-1, *shown.shape[2:]), data_range=data_range, argument="path")
    return pixels.reshape(shown.shape), steps


def _indexed(pictures: npt.NDArray[np.uint8], columns: int, scale: int) -> Any:
    """A mosaic as a GIF frame with at most 256 colours, 255 the white of the gaps."""
    n, height, width, channels = pictures.shape
    if channels == 1:
        return to_pillow(_mosaic(pictures, columns, scale))
    from PIL import Image

    # Colours are chosen before the enlargement and without the gaps: neither changes them.
    strip = to_pillow(pictures.reshape(n * height, width, 3)).quantize(255, Image.Quantize.MEDIANCUT, kmeans=1)
    frame = to_pillow(_mosaic(np.asarray(strip).reshape(n, height, width, 1), columns, scale))
    palette = strip.getpalette()[: 3 * 255]
    frame.putpalette(palette + [0] * (3 * 255 - len(palette)) + [255] * 3)
    return frame
