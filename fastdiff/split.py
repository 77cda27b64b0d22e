"""The rows that a model learns from, and those that are held out."""

from __future__ import annotations

import numbers
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff import defaults, noise
from fastdiff.backends import Backend, backend_for
from fastdiff.backends.numpy.functions import cut
from fastdiff.errors import (
    ArgumentError,
    check_array,
    check_float,
    check_indices,
    check_int,
    check_size,
    is_on_device,
    shown,
)
from fastdiff.nn import Network
from fastdiff.noise import Draw, Stream
from fastdiff.noise_shape import NoiseShape
from fastdiff.normaliser import LARGEST, greatest
from fastdiff.stored import StoredRows, opened, parts

SAMPLE_KINDS = {1: "curve", 2: "series", 3: "picture"}  # what a sample of so many dimensions is
HELD_OUT_STEP = 3  # of stream DATA; 0 to 2 make data, which a split must not depend on
CUT_STEP = 21  # of stream DATA, see the table in docs/design.md

Rows = npt.NDArray[Any]


class Split(NamedTuple):
    """Training rows and their labels, those that are held out, and by which rule, for later calls."""

    rows: Rows
    labels: Rows | None
    held_out: tuple[Rows, Rows | None] | None
    rule: tuple[str, float]
    held: npt.NDArray[np.bool_] | None = None  # which rows are held out, where they are some of the data
    whole: Rows | None = None  # the pictures to learn from, where rows are parts of them

    @property
    def unseen(self) -> Rows | None:
        """The rows that are held out, without their labels."""
        return None if self.held_out is None else self.held_out[0]

    def cut(self, size: tuple[int, int], seed: int) -> Split:
        """Return one of parts of its pictures, those held out numbered after the others."""
        draw = Draw(seed, Stream.DATA, CUT_STEP)
        held_out = self.held_out
        if held_out is not None:
            held_out = cut(held_out[0], size, draw.after(len(self.rows))), held_out[1]
        return self._replace(rows=cut(self.rows, size, draw), held_out=held_out, whole=self.rows)


def checked(
    X: Any,
    y: Any,
    net: Network | None,
    noise_shape: NoiseShape | None,
    be: Backend,
    *,
    missing: bool = False,
    larger: bool = False,
) -> tuple[Rows, Rows | None, int | None]:
    """Return data and labels on the host, and how many classes the network has or is to have.

    With `missing` values of curves and series may be NaN, and data on disk come back as `StoredRows` if they are many;
    `larger` pictures may be of any size.
    """
    X = opened(X) if missing else X
    if isinstance(X, StoredRows):
        if noise_shape is not None:
            raise ArgumentError("X", "data on disk, with a noise_shape", "data that are read into memory")
        if X.shape[0] and X.ndim > 1:  # all but the values is looked at in one row
            checked(np.zeros((1, *X.shape[1:]), X.dtype), None if y is None else [0], net, None, be)
        X.check()
        given: Any = X
    else:
        given = check_array("X", _on_host(be, X), finite=False)
    if net is None and given.ndim == 3 and given.dtype == np.uint8:
        wants = "(N, ..., channels): X[..., None] pictures of gray ones, X.astype(float) a series of channels"
        raise ArgumentError("X", f"bytes of shape {given.shape}", wants)
    if net is not None:
        shape: tuple[int | None, ...] = (None, None, net.shape[2]) if larger and len(net.shape) == 3 else net.shape
    elif given.ndim in (3, 4) and noise_shape is None:
        shape = given.shape[1:]
    else:
        shape = (getattr(noise_shape, "d", None),)
        if given.ndim != 2:
            others = ", series (N, points, channels), or pictures (N, height, width, channels)"
            wants = "curves (N, points)" + (others if noise_shape is None else ", as the noise has a shape")
            raise ArgumentError("X", f"shape {given.shape}", wants)
    if given.ndim == 3 and len(shape) == 1:
        wants = f"curves (N, {shape[0]}); X.reshape(len(X), -1) makes curves of series (N, points, channels)"
        raise ArgumentError("X", f"shape {given.shape}", wants)
    if isinstance(given, np.ndarray):
        given = check_array("X", given, shape=(None, *shape), finite=not missing or len(shape) == 3)
    if isinstance(given, np.ndarray) and given.dtype.kind == "f" and np.isinf(given).any():
        at = tuple(int(i) for i in np.argwhere(np.isinf(given))[0])
        raise ArgumentError("X", f"{given[at]} at index {at}", "finite values, or NaN where they are missing")
    if given.size == 0:
        what = SAMPLE_KINDS[len(shape)] + (" of at least one point" if len(shape) < 3 else "")
        raise ArgumentError("X", f"shape {given.shape}", f"at least one {what}")
    if getattr(net, "dtype", None) != np.float64 and (largest := greatest(given)) > LARGEST:
        wants = f"at most {LARGEST:g}: samples are float32; divide X, and multiply its samples"
        if isinstance(given, np.ndarray):
            check_size("X", given, LARGEST, wants=wants)
        raise ArgumentError("X", f"values up to {largest:.3g}", wants)
    classes = getattr(net, "classes", None)
    if net is None and y is not None:
        y = check_indices("y", _on_host(be, y), 1 << 20, len(given))
        classes = int(y.max()) + 1
    if classes is None and y is not None:
        count = int(check_indices("y", _on_host(be, y), 1 << 20, len(given)).max()) + 1
        made = f"MLP({shape[0]}" if len(shape) == 1 else f"UNet({given.shape[1:]}"
        wants = f"None: this network has no classes; use fd.{made}, classes={count})"
        raise ArgumentError("y", "labels", wants)
    return given, _labels("y", y, classes, len(given), be), classes


def check_crop(crop: Any, X: Rows, net: Network | None) -> tuple[int, int]:
    """Return the height and width of the parts of pictures that are learned."""
    if X.ndim < 4:
        raise ArgumentError("crop", shown(crop), f"None for {'curves' if X.ndim == 2 else 'series'}")
    sides = tuple(crop) if isinstance(crop, (tuple, list)) else (crop, crop)
    if len(sides) != 2:
        raise ArgumentError("crop", shown(crop), "an integer, or a pair (height, width)")
    height, width = (check_int("crop", side, low=1, high=most) for side, most in zip(sides, X.shape[1:], strict=False))
    if net is not None and (height, width) != net.shape[:2]:
        raise ArgumentError("crop", shown(crop), f"{net.shape[:2]}, as the network has")
    return height, width


def split(
    X: Rows,
    y: Rows | None,
    validation: Any,
    classes: int | None,
    known: tuple[str, float] | None,
    seed: int,
    be: Backend,
) -> Split:
    """Split rows as `Diffusion.fit` says of `validation`; `known` is the rule of the first fit, if there was one."""
    if validation is None:
        most = defaults.MOST_HELD_OUT if X.ndim < 4 else defaults.MOST_HELD_OUT_PICTURES
        rule = known or ("share", defaults.held_out_share(len(X), most))
        return hold_out(X, y, *rule, seed)
    if classes is not None and isinstance(validation, (tuple, list)):
        if len(validation) != 2:
            raise ArgumentError("validation", f"{len(validation)} values", "a fraction, or a pair (rows, labels)")
        rows, labels = validation
    elif (
        not isinstance(validation, (numbers.Real, str)) and check_array("validation", validation, finite=False).ndim > 0
    ):
        rows, labels = validation, None
    else:
        fraction = check_float("validation", validation, low=0, high=1, high_open=True)
        if fraction and not 1 <= round(fraction * len(X)) < len(X):
            raise ArgumentError(
                "validation",
                f"{validation}",
                f"a fraction that holds out 1 to {len(X) - 1} of the {len(X)} rows, or 0: none",
            )
        return hold_out(X, y, "fraction", fraction, seed)
    rows = check_array("validation", rows, shape=(None, *X.shape[1:]))
    if len(rows) == 0:
        raise ArgumentError(
            "validation", f"no {'curves' if X.ndim == 2 else 'series' if X.ndim == 3 else 'pictures'}", "at least one"
        )
    labels = _labels("the labels of validation", labels, classes, len(rows), be)
    return Split(X, y, (rows, labels), ("fraction", 0.0))


def hold_out(X: Rows, y: Rows | None, rule: str, part: float, seed: int) -> Split:
    """Split rows by a word that only seed and row number decide.

    A "fraction" takes the rows of the smallest words, exactly so many; a "share" those below a bound, so a row
    stays where it is when others are added.
    """
    if part == 0:
        return Split(X, y, None, (rule, part))
    step = 1 if rule == "fraction" else HELD_OUT_STEP
    words = noise.philox_words(len(X), 1, Draw(seed, Stream.DATA, step))[:, 0, 0]
    if rule == "fraction":
        held = np.zeros(len(X), bool)
        held[np.argsort(words, kind="stable")[: round(part * len(X))]] = True
    else:
        held = words < part * 2.0**32
    if held.all() or not held.any():
        return Split(X, y, None, (rule, part))
    unseen = X[held], None if y is None else y[held]
    rest = X.some(~held) if isinstance(X, StoredRows) else X[~held]
    return Split(rest, None if y is None else y[~held], unseen, (rule, part), held)


def for_evaluation(
    X: Rows, data: list[int] | None, rule: tuple[str, float] | None, seed: int
) -> tuple[Rows, Rows | None]:
    """Return the rows that a model has learned from, and others that its samples are compared with.

    Where X are the data of its first fit, these are the rows that it held out; of others half are taken for learned.
    """
    if fingerprint(X) != data:
        if len(X) < 4:
            raise ArgumentError("X", f"{len(X)} rows, none of them learned from", "at least 4 rows, or `training`")
        rule = "fraction", 0.5
    parts = hold_out(X, None, *(rule or ("fraction", 0.0)), seed)
    return parts.rows, parts.unseen


def fingerprint(X: Rows) -> list[int]:
    """Number of rows, and a checksum: tells whether a data set is the one that was learned from."""
    found = 0
    for part in parts(X):
        single = part.astype(np.float32) if part.dtype == np.float64 else part  # as files have it
        found = zlib.crc32(np.ascontiguousarray(single).data, found)
    return [len(X), found]


def _labels(argument: str, y: Any, classes: int | None, n: int, be: Backend) -> Rows | None:
    """Labels (n,) on the host, for a network with so many classes."""
    if classes is None:
        if y is not None:
            raise ArgumentError(argument, type(y).__name__, "None: this network has no classes")
        return None
    if y is None:
        raise ArgumentError(argument, "None", f"a class from 0 to {classes - 1} for each row: this network has classes")
    found: Rows = check_indices(argument, _on_host(be, y), classes, n)
    return found


def _on_host(be: Backend, X: Any) -> Any:
    """Training data as NumPy: it is normalised on the host, once."""
    if not is_on_device(X):
        return X
    be, array = backend_for(be, X=X), check_array("X", X)
    return be.to_numpy(be.asarray(array, array.dtype))
