"""How round the shapes of pictures are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_int


def roundness(images: Any, *, rays: int = 64) -> npt.NDArray[np.float64]:
    """Return how far the outline of each picture's shape is from a circle.

    The shape is what is brighter than half of the picture's brightest value. From its centre of brightness rays go out,
    along which the picture is interpolated; the outline is where it falls below half for the first time.

    Parameters
    ----------
    images : (n, height, width) or (n, height, width, 1) array
        One bright shape each, on a dark ground.
    rays : int, optional
        How many, at least 8.

    Returns
    -------
    (n,) float64
        Standard deviation of the radius over its mean: 0 for a circle; NaN where a ray finds no outline, or nothing is
        bright.

    Raises
    ------
    ArgumentError
        Shape or values of the pictures.

    Examples
    --------
    >>> bool((fd.metrics.roundness(fd.data.circles(3, 32)) > 0).all())
    True
    """
    array = check_array("images", images)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise ArgumentError("images", f"shape {array.shape}", "gray pictures (n, height, width)")
    rays = check_int("rays", rays, low=8)
    turn = 2 * np.pi * np.arange(rays) / rays
    steps = np.arange(0, np.hypot(*array.shape[1:]), 0.25)
    return np.array([_deviation(picture.astype(np.float64), turn, steps) for picture in array], np.float64)


def _deviation(picture: npt.NDArray[np.float64], turn: npt.NDArray[Any], steps: npt.NDArray[Any]) -> float:
    half = picture.max(initial=0) / 2
    bright = np.where(picture > half / 2, picture, 0)  # without the ground
    if half <= 0:
        return float("nan")
    y, x = np.indices(picture.shape)
    centre = np.array([(bright * y).sum(), (bright * x).sum()]) / bright.sum()
    at = centre + steps[:, None, None] * np.stack([np.sin(turn), np.cos(turn)], axis=-1)  # steps, rays, 2
    padded = np.pad(picture, 1)
    rows, columns = (np.clip(at[..., axis] + 1, 0, padded.shape[axis] - 1.001) for axis in (0, 1))
    i, j = rows.astype(int), columns.astype(int)
    a, b = rows - i, columns - j
    upper = (1 - b) * padded[i, j] + b * padded[i, j + 1]
    lower = (1 - b) * padded[i + 1, j] + b * padded[i + 1, j + 1]
    along = (1 - a) * upper + a * lower
    first = (along < half).argmax(axis=0)
    if (first == 0).any():  # nothing falls below, or the centre is dark
        return float("nan")
    ray = np.arange(len(turn))
    inside, outside = along[first - 1, ray], along[first, ray]
    radius = steps[first - 1] + (steps[1] - steps[0]) * (inside - half) / (inside - outside)
    return float(radius.std() / radius.mean())
