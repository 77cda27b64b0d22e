"""The map from data to a network's range, and back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import process
from fastdiff.backends import Backend
from fastdiff.errors import ArgumentError, DataWarning, check_array, check_choice, check_float, is_on_device, shown
from fastdiff.noise_shape import NoiseShape
from fastdiff.stored import StoredRows, is_large, moments, parts

log = logging.getLogger("fastdiff")

Rows = npt.NDArray[Any]

SCALES = ("auto", "all", "column", "channel")
UNLIKE = 10.0  # columns whose deviations differ by more than this factor are taken for different quantities
CONSTANT = 1e-6  # a deviation below this share of the greatest |x| is rounding
LARGEST = 1e37  # value of the data: their samples have room above it
SMALLEST = 1e-35  # deviation of the data: smaller ones have few digits in float32, or none
FINE, COARSE = 4, 64  # float32 steps in a deviation: below the first nothing comes back, below the second it shows
BLOCK_VALUES = 1 << 13  # that are normalised at once: fresh memory for more would cost more than the arithmetic


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Maps data to the network's range, (x - mean) / std, and back.

    Attributes
    ----------
    mean, std : float, (d,) float64, or (channels,) float64 of series
        Of all values, or of each column or channel. The deviation of a constant column is 0: inside it is 0, and it
        comes back as the constant.
    noise_shape : NoiseShape or None
        With one, x is first L^-1 x, where the noise is white.
    data_range : pair of float or None
        Of pictures: becomes [-1, 1].
    whole : bool
        Whether pictures are bytes, as which they come back.
    series : bool
        Whether rows are series (points, channels).
    centre : (d,) or (points, channels) float64 or None
        Subtracted from what comes out of all this, so that every column has mean zero.
    """

    mean: Any
    std: Any
    noise_shape: NoiseShape | None = None
    data_range: tuple[float, float] | None = None
    whole: bool = False
    centre: npt.NDArray[np.float64] | None = None
    series: bool = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Normaliser):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(a is b or np.array_equal(a, b) for a, b in pairs)

    @property
    def scale(self) -> str:
        """What has a mean and a deviation of its own: "all" values together, each "column", or each "channel"."""
        return ("channel" if self.series else "column") if np.ndim(self.std) else "all"

    @classmethod
    def of(cls, X: Any, noise_shape: NoiseShape | None = None, scale: str = "all") -> Normaliser:
        """Return the normaliser of rows (N, d), of the values that are not missing (NaN).

        "auto" takes columns whose deviations differ by more than a factor of 10, or are below a hundredth of that of
        all values (as their means differ), for quantities of different units, and scales each by itself, unless the
        noise has a shape; else, where some are constant, all others together.
        Where all rows are the same there is one scale; a deviation of all values under 1e-6 max|x| counts as 1.
        """
        X = cls(0.0, 1.0, noise_shape)._white(X)
        if X.dtype == np.float16:
            X = replace(_of_disk(X), through=_single) if is_large(X) else _single(X)
        largest = greatest(X)
        if largest == 0:
            return cls(0.0, 1.0, noise_shape)
        missing = has_missing(X)
        if is_large(X) and not missing:
            mean, variance = moments(X, largest, axis=None)
            centre, spread = float(mean), float(np.sqrt(variance))
        else:
            scaled = X / largest  # squares of huge values would overflow
            mean_of, std_of = (np.nanmean, np.nanstd) if missing else (np.mean, np.std)
            centre, spread = float(mean_of(scaled, dtype=np.float64)), float(std_of(scaled, dtype=np.float64))
        if scale != "all":
            mean, std = _column_moments(X)
            varied = std[std > 0]
            ratio = 0.0 if varied.size == 0 else float(varied.max() / varied.min())
            if scale == "auto" and ratio > UNLIKE and noise_shape is None:
                log.info("scale: each column its own, as their deviations differ by a factor of %.3g", ratio)
                scale = "column"
            elif scale == "auto" and ratio and spread * largest > UNLIKE**2 * varied.min() and noise_shape is None:
                log.info("scale: each column its own, as their means differ by many deviations")
                scale = "column"
            if scale == "column" and varied.size:
                return cls(mean, std, noise_shape)
            equal = std == 0 if missing else np.logical_and.reduce([(X[0] == part).all(axis=0) for part in parts(X)])
            if scale == "auto" and equal.any() and not equal.all() and noise_shape is None:
                log.info("scale: constant columns: %d; samples will be constant there too", equal.sum())
                others = cls.of(replace(X, columns=~equal) if isinstance(X, StoredRows) else X[:, ~equal])
                return cls(np.where(equal, mean if missing else X[0], others.mean), np.where(equal, 0.0, others.std))
        return cls(centre * largest, spread * largest if spread >= CONSTANT else 1.0, noise_shape)

    @classmethod
    def of_series(cls, X: npt.NDArray[Any], scale: str = "auto", names: Sequence[str] | None = None) -> Normaliser:
        """Return the normaliser of series (N, points, channels): of each channel its own, or one for "all" values.

        Raises
        ------
        ArgumentError
            A channel without any value but one, of which there is nothing to learn.
        """
        channels = X.shape[2]
        of_channels = X.reshape(-1, channels)
        mean, std = _column_moments(of_channels)
        flat = np.flatnonzero(std == 0)
        if flat.size and channels > 1:
            k = int(flat[0])
            called = f"channel {k + 1}" + (f" ({names[k]})" if names else "")
            raise ArgumentError("X", f"{called} that is {mean[k]:g} everywhere", "channels that vary: leave it out")
        if scale == "all" or channels == 1:
            return replace(cls.of(X.reshape(-1, 1)), series=True)
        log.info("scale: each of %d channels its own", channels)
        return cls(mean, std, series=True)

    @classmethod
    def of_pictures(cls, X: npt.NDArray[Any], data_range: Any = None) -> Normaliser:
        """Return the normaliser of pictures: by default of the range 0 .. 255 for bytes, else of their own."""
        whole, wants = X.dtype == np.uint8, "a pair of numbers (low, high), low below high"
        if data_range is None:
            low, high = (0.0, 255.0) if whole else ends(X)
            if low == high:
                raise ArgumentError("X", f"the value {low:g} only", "pictures of several values, or a data_range")
            if not whole:
                log.info("data_range: (%g, %g), as the pictures have it", low, high)
        else:
            if not isinstance(data_range, (tuple, list)) or len(data_range) != 2:
                raise ArgumentError("data_range", shown(data_range), wants)
            low, high = (check_float("data_range", end) for end in data_range)
            if not low < high:
                raise ArgumentError("data_range", shown(data_range), wants)
        least, most = ends(X)
        if 0 < 8 * (most - least) < high - low:
            words = f"pictures from {least:g} to {most:g} use less than an eighth of the range, ({low:g}, {high:g})"
            warnings.warn(f"{words}: data_range=(low, high) says what is black and white", DataWarning, stacklevel=7)
        return cls((low + high) / 2, (high - low) / 2, None, (low, high), whole)

    def check(self, argument: str, X: npt.NDArray[Any]) -> None:
        """Refuse pictures of another range: one outside, or not of bytes."""
        if self.data_range is None:
            return
        if self.whole and X.dtype != np.uint8:
            raise ArgumentError(argument, f"dtype {X.dtype}", "bytes (uint8), as in the first fit")
        low, high = ends(X)
        if low < self.data_range[0] or high > self.data_range[1]:
            wants = "values within data_range, ({:g}, {:g}) since the first fit".format(*self.data_range)
            raise ArgumentError(argument, f"values from {low:g} to {high:g}", wants)

    def apply(self, X: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the data in the network's range."""
        white = self._white(X)
        out = np.empty(white.shape, dtype)
        std = np.where(self.std == 0, 1.0, self.std) if np.ndim(self.std) else self.std
        for start in range(0, len(out), rows := max(1, BLOCK_VALUES // max(1, white[:1].size))):
            part = slice(start, start + rows)
            inner = (np.asarray(white[part], np.float64) - self.mean) / std
            out[part] = inner if self.centre is None else inner - self.centre
        return out

    def centred(self, X: npt.NDArray[Any]) -> Normaliser:
        """Return this one with the centre of a data set."""
        if is_large(X):
            return replace(self, centre=moments(self.seen(X))[0])
        return replace(self, centre=np.mean(self.apply(X, np.float64), axis=0))

    def seen(self, X: Any) -> StoredRows:
        """Return many rows in the network's range, in float64, of which a block at a time is made."""
        return replace(_of_disk(X), through=lambda part: self.apply(part, np.float64))

    def restore(self, x: Any, be: Backend) -> Any:
        """Return samples as the data were: `invert`, and bytes where those were bytes."""
        x = self.invert(x, be)
        if self.data_range is None or not self.whole:
            return x
        return x.round().clip(*self.data_range).astype(np.uint8)

    def invert(self, x: Any, be: Backend) -> Any:
        """Return network values (n, ...) in the data's range, in place where the array is its own."""
        if self.centre is not None:
            x += be.asarray(self.centre, x.dtype)
        one = x.dtype.type
        x *= be.asarray(self.std, x.dtype) if np.ndim(self.std) else one(self.std)
        x += be.asarray(self.mean, x.dtype) if np.ndim(self.mean) else one(self.mean)
        if self.noise_shape is None:
            return x
        rows = be.asarray(x.reshape(-1, self.noise_shape.d))
        out = be.empty(rows.shape, rows.dtype)
        self.noise_shape.apply(be, rows, out)
        return process.to_caller(be, out.reshape(x.shape), is_on_device(x))

    def affine(self, shape: tuple[int, ...] | None = None) -> tuple[Any, Any]:
        """Return factor and offset of `invert`, data = factor x + offset, as they are or for each value of a sample."""
        offset = self.mean + (0.0 if self.centre is None else self.std * self.centre)
        return (
            (self.std, offset) if shape is None else (np.broadcast_to(self.std, shape), np.broadcast_to(offset, shape))
        )

    def log_det(self, shape: int | tuple[int, ...]) -> float:
        """Return log |det| of `apply` for samples of a shape: log density of data less that of its image.

        A constant column has no density: it is left out.
        """
        stds = np.broadcast_to(self.std, shape)
        of_shape = 0.0 if self.noise_shape is None else self.noise_shape.log_det
        return -float(np.sum(np.log(stds[stds > 0]))) - of_shape

    @property
    def features(self) -> list[str]:
        """What a file of it uses of `fastdiff.checkpoint.FEATURES`."""
        return ["column scale"] if self.scale == "column" else []

    @property
    def arrays(self) -> dict[str, npt.NDArray[np.float64]]:
        """What a file keeps as tensors: the moments of columns."""
        of_columns = {} if self.scale == "all" else {"normaliser.mean": self.mean, "normaliser.std": self.std}
        return of_columns if self.centre is None else of_columns | {"normaliser.centre": self.centre}

    def to_dict(self) -> dict[str, Any]:
        """Return the rest as JSON types; the noise shape is not in it."""
        of_all = self.scale == "all"
        return {
            "scale": self.scale,
            "mean": self.mean if of_all else None,
            "std": self.std if of_all else None,
            "data_range": self.data_range,
            "bytes": self.whole,
        }

    @classmethod
    def from_dict(
        cls,
        config: Any,
        tensors: Mapping[str, npt.NDArray[Any]],
        noise_shape: NoiseShape | None,
        shape: tuple[int, ...],
    ) -> Normaliser:
        """Return the normaliser of a file for samples of a shape; a file of 0.1.0 says nothing of a scale.

        Raises
        ------
        ArgumentError
            A value that no normaliser has.
        """
        if not isinstance(config, Mapping):
            raise ArgumentError("normaliser", type(config).__name__, "names and values")
        data_range = config.get("data_range")  # neither in files of format 1
        if (data_range is not None) != (len(shape) == 3):
            raise ArgumentError("normaliser.data_range", shown(data_range), "a range for pictures, null for curves")
        centre = tensors.get("normaliser.centre")
        if centre is not None:
            centre = check_array("normaliser.centre", centre, shape=shape, dtype=np.float64)
        series = len(shape) == 2
        scales = ["all", "channel" if series else "column"]
        if check_choice("normaliser.scale", config.get("scale", "all"), scales) != "all":
            moments = []
            of_each = shape[-1:]  # the columns of curves, the channels of series
            for name in ("normaliser.mean", "normaliser.std"):
                if name not in tensors:
                    raise ArgumentError(name, "no such tensor", f"shape {of_each}, as the scale is not of all values")
                moments.append(check_array(name, tensors[name], shape=of_each, dtype=np.float64))
            if (moments[1] < 0).any():
                raise ArgumentError("normaliser.std", str(moments[1].min()), "numbers of at least 0")
            return cls(moments[0], moments[1], noise_shape, centre=centre, series=series)
        mean = check_float("normaliser.mean", config["mean"])
        std = check_float("normaliser.std", config["std"], low=0, low_open=True)
        if data_range is None:
            return cls(mean, std, noise_shape, centre=centre, series=series)
        low, high = check_array("normaliser.data_range", data_range, shape=(2,)).tolist()
        return cls(mean, std, noise_shape, (low, high), config["bytes"] is True)

    def _white(self, X: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.noise_shape is None:
            return X
        return np.asarray(self.noise_shape.whiten(np.asarray(X, np.float64), backend="numpy"))


def greatest(X: npt.NDArray[Any], axis: int | None = None) -> Any:
    """Return max |x|, of everything or along an axis, in float64: |x| of the least integer of a type is not in it.

    Values that are missing (NaN) do not count.
    """
    largest = np.zeros(())
    for part in [X] if isinstance(X, np.ndarray) else parts(X):
        of_part = (np.nanmin, np.nanmax) if has_missing(part) else (np.min, np.max)
        low, high = (np.asarray(end(part, axis=axis), np.float64) for end in of_part)
        largest = np.maximum(largest, np.maximum(-low, high))
    return float(largest) if axis is None else largest


def has_missing(X: Any) -> bool:
    """Whether values are NaN; those on disk have been looked at, and none are."""
    return isinstance(X, np.ndarray) and X.dtype.kind == "f" and bool(np.isnan(np.min(X)))


def ends(X: Any) -> tuple[float, float]:
    """Return the least and the greatest value."""
    low, high = zip(*((part.min(), part.max()) for part in parts(X)), strict=True)
    return float(min(low)), float(max(high))


def _of_disk(X: Any) -> StoredRows:
    return X if isinstance(X, StoredRows) else StoredRows(X)


def _single(X: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return X.astype(np.float32)


def check_carried(X: npt.NDArray[Any], scale: str, what: str = "column") -> None:
    """Say what of curves (N, d) their samples, in float32, could not show, or one scale could not.

    `what` is what a column is called.

    Raises
    ------
    ArgumentError
        Columns of finer types than float32 that vary by less than 4 float32 steps at their size; or all values are so
        close to zero that float32 has no digits for them.

    Warns
    -----
    DataWarning
        As above, of a few columns or of fewer steps than 64; or `scale` is "all", and some columns vary by less than a
        hundredth of the deviation of all values.
    """
    largest = greatest(X, axis=0)
    unit = np.where(largest == 0, 1.0, largest)
    mean, std = (moment * unit for moment in _scaled_moments(X, unit))
    varied = std > 2 * np.finfo(np.float64).eps * largest  # less is one rounding
    real = std > 1e-12 * largest  # less may be several
    if not varied.any():
        return
    most = unit.max()
    total = most * float(np.sqrt(np.mean((std / most) ** 2) + np.var(mean / most)))
    if total < SMALLEST:
        wants = f"at least {SMALLEST:g}: samples are float32; multiply X, and divide its samples"
        raise ArgumentError("X", f"values with a deviation of {total:.3g}", wants)
    step = np.spacing(largest.astype(np.float32)).astype(np.float64)
    offset = "subtract the offset in float64 (X - X.mean(axis=0)), and add it to the samples"
    bad = np.flatnonzero(real & (std < FINE * step) & (std >= SMALLEST))
    if bad.size and not np.can_cast(X.dtype, np.float32, "safe"):
        k = bad[0]
        got = f"{bad.size} {what}s like number {k + 1}, which varies by {std[k]:.3g} around {mean[k]:.10g}"
        raise ArgumentError(
            "X", got, f"{what}s that float32 samples can show, and there its steps are {step[k]:.3g}: {offset}"
        )
    coarse = varied & (std < COARSE * step) & (std >= SMALLEST)
    tiny = real & (std < SMALLEST)
    hidden = real & (std * UNLIKE**2 < total) if scale == "all" else np.zeros_like(real)
    for columns, why in (
        (coarse, f"where float32 has steps of {{step:.3g}}: {offset}"),
        (tiny, f"for which float32 samples have no digits: multiply such {what}s, and divide their samples"),
        (hidden, f"and all values together by {total:.3g}: scale={what!r} (--scale {what}) gives each its own scale"),
    ):
        if columns.any():
            k = int(np.argmax(columns))
            words = f"{columns.sum()} {what}s like number {k + 1} vary by {std[k]:.3g} around {mean[k]:.10g}, "
            warnings.warn(words + why.format(step=step[k]), DataWarning, stacklevel=6)


def _scaled_moments(
    X: npt.NDArray[Any], unit: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and deviation (d,) of X / unit: in float64, less the first row, a few rows at a time."""
    first, rows = X[0].astype(np.float64), max(1, BLOCK_VALUES // X.shape[1])
    total, squares = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    for block in parts(X):
        for start in range(0, len(block), rows):
            part = (block[start : start + rows].astype(np.float64) - first) / unit
            total += part.sum(axis=0)
            squares += (part**2).sum(axis=0)
    mean = total / len(X)
    return mean + first / unit, np.sqrt(np.maximum(squares / len(X) - mean**2, 0))


def _column_moments(X: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and deviation (d,) of every column, 0 where it is constant but for rounding."""
    largest = np.asarray(greatest(X, axis=0))
    unit, missing = np.where(largest == 0, 1.0, largest), has_missing(X)
    if is_large(X) and not missing:
        mean, variance = moments(X, unit)
        std = np.sqrt(variance)
    else:
        scaled = X / unit
        mean_of, std_of = (np.nanmean, np.nanstd) if missing else (np.mean, np.std)
        mean, std = mean_of(scaled, axis=0, dtype=np.float64), std_of(scaled, axis=0, dtype=np.float64)
    constant = std < np.finfo(np.float32).eps  # which samples could not show
    return np.where(constant, mean * largest if missing else X[0], mean * largest), np.where(
        constant, 0.0, std * largest
    )


def settled(
    known: Normaliser | None,
    X: Rows,
    held_out: Rows | None,
    data_range: Any,
    scale: str,
    noise_shape: NoiseShape | None,
    names: Sequence[str] | None = None,
) -> Normaliser:
    """Return the normaliser of a fit, the known one or else that of its rows, to which both kinds of rows are held."""
    if X.ndim < 4 and data_range is not None:
        raise ArgumentError(
            "data_range", shown(data_range), "None for curves and series: they have mean 0 and deviation 1 inside"
        )
    found = known
    if found is None or data_range is not None:
        if X.ndim > 3 and scale not in ("auto", "all"):
            raise ArgumentError("scale", shown(scale), "'auto' for pictures: they have a data_range")
        other = {2: "channel", 3: "column"}.get(X.ndim)
        if scale == other:
            what = "curves have one channel" if X.ndim == 2 else "series have channels"
            wants = f"'auto', 'all' or {'column' if X.ndim == 2 else 'channel'!r}: {what}"
            raise ArgumentError("scale", shown(scale), wants)
        if X.ndim == 3:
            found = Normaliser.of_series(X, scale, names)
        else:
            found = Normaliser.of(X, noise_shape, scale) if X.ndim == 2 else Normaliser.of_pictures(X, data_range)
    if known is not None and found.data_range != known.data_range:
        wants = f"{known.data_range}, that of the first fit; reset() starts anew"
        raise ArgumentError("data_range", shown(data_range), wants)
    found.check("X", X)
    if held_out is not None:
        found.check("validation", held_out)
    return found if known is None else known
