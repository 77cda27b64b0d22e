"""The exceptions of fastdiff, and the checks that raise them where the user calls.

Every exception derives from :class:`FastdiffError`, so ``except fastdiff.errors.FastdiffError`` catches all
that the library raises on purpose; the command line prints them without a traceback.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST = 300  # characters of what came
ROOM = 1 << 24  # values that there is always memory for


class FastdiffError(Exception):
    """Base of every exception that fastdiff raises on purpose.

    Examples
    --------
    >>> try:
    ...     fd.Schedule.cosine(0)
    ... except fd.errors.FastdiffError as error:  # whatever the library raises on purpose
    ...     print(type(error).__name__)
    ArgumentError
    """

    def __str__(self) -> str:
        return super().__str__().replace("\n", " ")  # a name of a file may have any character


class ArgumentError(FastdiffError, ValueError):
    """An argument has the wrong type, shape, dtype or value.

    Parameters
    ----------
    argument : str
        Name of the argument as the user wrote it.
    got : str
        What arrived.
    wants : str
        What would be right.

    Examples
    --------
    >>> try:
    ...     fd.Schedule.cosine(0)
    ... except fd.errors.ArgumentError as error:
    ...     print(error.argument, "|", error.got, "|", error.wants)
    T | 0 | an integer from 1 to 1000000
    """

    def __init__(self, argument: str, got: str, wants: str) -> None:
        got = got.replace("\n", " ")
        got = got if len(got) <= LONGEST else f"{got[: LONGEST - 3]}..."
        super().__init__(argument, got, wants)
        self.argument, self.got, self.wants = argument, got, wants

    def __str__(self) -> str:
        return f"{self.argument}: got {self.got}, wants {self.wants}"


@contextmanager
def as_named(**names: str) -> Iterator[None]:
    """Have the errors of a block call arguments as the caller does: ``as_named(values="X")``."""
    try:
        yield
    except ArgumentError as error:
        name = re.split(r"[.\[]", error.argument)[0]
        if name not in names:
            raise
        raise ArgumentError(names[name] + error.argument[len(name) :], error.got, error.wants) from error


class DataError(FastdiffError, ValueError):
    """A data file cannot be read as what it claims to be, or holds unusable values.

    Examples
    --------
    >>> from pathlib import Path
    >>> written = Path("words.csv").write_text("1,two")
    >>> try:
    ...     fd.data.load_curves("words.csv")
    ... except fd.errors.DataError as error:
    ...     print(str(error).partition(";")[0])
    words.csv, line 1, column 2: 'two' is not a number
    """


class CheckpointError(FastdiffError):
    """A checkpoint is truncated, foreign, damaged or from a newer format.

    Examples
    --------
    >>> from pathlib import Path
    >>> written = Path("m.safetensors").write_bytes(b"nothing of the kind")
    >>> try:
    ...     fd.load("m.safetensors")
    ... except fd.errors.CheckpointError as error:
    ...     print(error)
    m.safetensors: not a whole safetensors file (it ends within its header)
    """


class BackendError(FastdiffError, RuntimeError):
    """A backend cannot be used on this machine or in this process.

    Examples
    --------
    >>> issubclass(fd.errors.BackendError, RuntimeError)  # backend="cuda" without a GPU: it says what to install
    True
    """


class TrainingError(FastdiffError, RuntimeError):
    """Training stopped because it could not go on (for instance a loss that is not finite).

    Examples
    --------
    >>> try:
    ...     fd.Diffusion().sample(4)
    ... except fd.errors.TrainingError as error:
    ...     print(error)
    this model has not been trained: call fit first
    """


class ScheduleWarning(UserWarning):
    """The doctor's word on a schedule that is legal and probably not meant.

    Examples
    --------
    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     s = fd.Schedule.linear(50)  # ends long before there is noise alone
    >>> [one.category.__name__ for one in said]
    ['ScheduleWarning']
    """


class QualityWarning(UserWarning):
    """Samples that one should not trust, or data that cannot give better ones; it names what can be done.

    Examples
    --------
    >>> import warnings
    >>> law = fd.denoisers.Gaussian(np.zeros(1), np.eye(1), fd.Schedule.cosine(20))
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     squared = fd.product(law, law)  # whose samples are too narrow
    >>> [one.category.__name__ for one in said]
    ['QualityWarning']
    """


class ConversionWarning(UserWarning):
    """What another program's file asks for and fastdiff does otherwise.

    Examples
    --------
    >>> import warnings
    >>> from fastdiff.interop import save_scheduler
    >>> table = fd.samplers.dpm2(fd.Schedule.linear(1000), 20)
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     save_scheduler(table, "scheduler")  # which rounds the middles of steps there
    >>> [one.category.__name__ for one in said]
    ['ConversionWarning']
    """


class DataWarning(UserWarning):
    """A word on data that can be used and probably is not what it is taken for.

    Examples
    --------
    >>> import warnings
    >>> counted = np.column_stack([np.arange(24), fd.data.harmonic_curves(24, points=6)])
    >>> fd.data.save_curves("counted.csv", counted)
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     X = fd.data.load_curves("counted.csv")  # its first column only counts rows
    >>> [one.category.__name__ for one in said], X.shape
    (['DataWarning'], (24, 7))
    """


def shown(value: object) -> str:
    """Return a value as a message shows it, in one short line, whatever its ``repr`` does."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of an object of somebody's, or a number of thousands of digits
        text = f"a value of type {type(value).__name__}"
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


LARGEST = (1 << 63) - 1  # integer that arrays hold


def check_int(argument: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """Return `value` as an int within ``low..high`` (both inclusive), or raise `ArgumentError`."""
    if low is not None and high is not None:
        wants = f"an integer from {low} to {high}"
    elif low is not None:
        wants = f"an integer of at least {low}"
    else:
        wants = "an integer"
    if isinstance(value, (bool, np.bool_)):
        raise ArgumentError(argument, shown(value), wants)
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(argument, shown(value), wants) from None
    too_high = number > (LARGEST if high is None else high)
    if (low is not None and number < low) or number < -LARGEST or too_high:
        raise ArgumentError(argument, shown(number), wants)
    return number


def check_float(
    argument: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Return `value` as a finite float within the bounds (open where said), or raise `ArgumentError`."""
    bounds = []
    if low is not None:
        bounds.append(f"{'above' if low_open else 'at least'} {low:g}")
    if high is not None:
        bounds.append(f"{'below' if high_open else 'at most'} {high:g}")
    wants = "a finite number" + (f", {' and '.join(bounds)}" if bounds else "")
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise ArgumentError(argument, shown(value), wants)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(argument, shown(value), wants) from None
    too_low = low is not None and (number < low or (low_open and number == low))
    too_high = high is not None and (number > high or (high_open and number == high))
    if not math.isfinite(number) or too_low or too_high:
        raise ArgumentError(argument, shown(value), wants)
    return number


def check_bool(argument: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ArgumentError(argument, shown(value), "True or False")
    return value


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, or raise an `ArgumentError` that lists them."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        near = []
        if isinstance(value, str):
            from difflib import get_close_matches

            near = get_close_matches(value.lower(), known, 1, 0.7)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(argument, shown(value), f"one of {', '.join(map(repr, known))}{meant}")
    return value


def check_several(argument: str, value: Any, wants: str) -> tuple[Any, ...]:
    """Return the items of something that has them and is no text, or raise `ArgumentError`."""
    try:
        if not isinstance(value, (str, bytes)):
            return tuple(value)
    except TypeError:  # an array without axes as well
        pass
    raise ArgumentError(argument, shown(value), wants)


def check_room(argument: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> None:
    """Raise `ArgumentError` where there can be no array of such a shape: no memory is touched."""
    try:
        if math.prod(shape) >= ROOM:
            np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        got = f"what takes an array of shape {shown(shape)}"
        raise ArgumentError(argument, got, "what there is memory for") from error


def check_flags(**flags: Any) -> None:
    """Raise `ArgumentError` for the first of these arguments that is not True or False (1 and 0 are)."""
    for argument, value in flags.items():
        if not isinstance(value, (bool, np.bool_, int)) or value not in (0, 1):
            raise ArgumentError(argument, shown(value), "True or False")


def check_callable(argument: str, value: Any) -> None:
    """Raise `ArgumentError` for what is neither None nor can be called."""
    if value is not None and not callable(value):
        raise ArgumentError(argument, shown(value), "a function, or None")


def check_seed(value: Any, argument: str = "seed") -> int:
    """Return a seed as an int in ``0 .. 2**64 - 1``, or raise `ArgumentError`."""
    return check_int(argument, value, low=0, high=2**64 - 1)


def check_array(
    argument: str,
    value: Any,
    *,
    shape: tuple[int | None, ...] | None = None,
    min_ndim: int = 0,
    finite: bool = True,
    dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """Return `value` as an array of real numbers (see `as_array`), or raise `ArgumentError`.

    The values of an array on a GPU are not looked at.

    Parameters
    ----------
    argument : str
        Name for the message.
    value : array_like
        Any real float or integer array; complex, object, bool and text are refused.
    shape : tuple of int or None, optional
        Wanted shape; None stands for any length on that axis.
    min_ndim : int, optional
        Least number of axes.
    finite : bool, optional
        Whether NaN and infinity are refused (default).
    dtype : dtype, optional
        Convert to this dtype after the checks; a value that overflows it counts as infinity.
    """
    on_device, array = is_on_device(value), as_array(argument, value, "a rectangular array of real numbers")
    if array.dtype.kind == "O" and array.ndim > 0:
        array = _of_objects(argument, array, frame=hasattr(value, "to_numpy"), missing=not finite)
    if array.dtype.kind not in "fiu":
        raise ArgumentError(argument, f"dtype {array.dtype}", "real floats or integers")
    if array.ndim < min_ndim:
        raise ArgumentError(argument, f"shape {array.shape}", f"at least {min_ndim} axes")
    if shape is not None and (
        array.ndim != len(shape)
        or any(want is not None and got != want for got, want in zip(array.shape, shape, strict=True))
    ):
        text = ", ".join("any" if want is None else str(want) for want in shape)
        raise ArgumentError(argument, f"shape {array.shape}", f"shape ({text}{',' if len(shape) == 1 else ''})")
    if dtype is not None and array.dtype != dtype:
        with np.errstate(over="ignore"):
            array = array.astype(dtype)
    if finite and not on_device and array.dtype.kind == "f" and not all_finite(array):
        bad = np.argwhere(~np.isfinite(array))[0]
        at = tuple(int(i) for i in bad)
        raise ArgumentError(argument, f"{array[at]} at index {at}", "finite values")
    return array


def _of_objects(argument: str, array: npt.NDArray[Any], *, frame: bool, missing: bool) -> npt.NDArray[Any]:
    """Numbers of a table with types of its own, whose array is one of objects; or what in it is no number.

    With `missing` a value that the table does not have is NaN.
    """
    array = array.copy()
    for at in np.ndindex(array.shape):
        one = array[at]
        where = f" at index {at}"
        if one is None or type(one).__name__ in MISSING_TYPES:
            if frame and missing:
                array[at] = np.nan
                continue
            raise ArgumentError(
                argument, f"a missing value ({shown(one)}){where}", "real floats or integers everywhere"
            )
        if isinstance(one, (bool, np.bool_)) or not isinstance(one, numbers.Real):
            got = f"dtype object, with {shown(one)}{where}"
            raise ArgumentError(argument, got, "real floats or integers")
    return array.astype(np.float64) if frame else array


def _refuse_masks(argument: str, value: Any) -> None:
    """Refuse hidden values: the array that NumPy makes of a masked one, or of rows of them, would show them."""
    rows = value if isinstance(value, (list, tuple)) else [value]
    masked = sum(int(np.ma.getmaskarray(row).sum()) for row in rows if isinstance(row, np.ma.MaskedArray))
    if masked:
        wants = (
            "an array without a mask: X.filled(...) puts numbers there, and rows can be left out by X[~X.mask.any(1)]"
        )
        raise ArgumentError(argument, f"{masked} masked values", wants)


MISSING_TYPES = ("NAType", "NaTType")  # of pandas, which is not imported for it
CUDA_DEVICES = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


def is_on_device(value: Any) -> bool:
    """Whether `value` is an array in the memory of a GPU, of CuPy or another library."""
    if isinstance(value, (np.ndarray, np.generic)) or not hasattr(value, "__dlpack_device__"):
        return hasattr(value, "__cuda_array_interface__")
    return value.__dlpack_device__()[0] in CUDA_DEVICES


def as_array(argument: str, value: Any, wants: str) -> Any:
    """Return an argument as a NumPy array, or, where it is on a GPU, as an array there with NumPy's attributes.

    Arrays of other libraries (``torch.Tensor``, ...) are taken through DLPack, without a copy: those of the host become
    NumPy arrays, those of a GPU CuPy arrays. Hence results for them are NumPy and CuPy arrays, which have DLPack
    themselves.

    Raises
    ------
    ArgumentError
        It is no array, or one that DLPack does not hand over (a tensor that needs gradients, bfloat16).
    """
    _refuse_masks(argument, value)
    on_device = is_on_device(value)
    if on_device and isinstance(getattr(value, "dtype", None), np.dtype):
        return value
    try:
        if on_device:
            import cupy

            return cupy.from_dlpack(value) if hasattr(value, "__dlpack__") else cupy.asarray(value)
        if hasattr(value, "__dlpack__") and not isinstance(value, (np.ndarray, np.generic)):
            return np.from_dlpack(value)
        return np.asarray(value)
    except ImportError:
        raise ArgumentError(argument, "an array on a GPU", "CuPy for it, or an array of the host") from None
    except ValueError:
        raise ArgumentError(argument, "rows of different lengths", wants) from None
    except (BufferError, RuntimeError, TypeError) as error:
        raise ArgumentError(argument, f"{type(value).__name__} ({error})", wants) from error


def check_size(argument: str, array: Any, most: float, *, wants: str | None = None, names: Any = None) -> None:
    """Refuse finite values beyond `most` of a host array, naming the place of the first; `names` are of columns."""
    if is_on_device(array) or array.dtype.kind != "f":
        return
    beyond = np.isfinite(array) & (np.abs(array) > most)
    if beyond.any():
        at = tuple(int(i) for i in np.argwhere(beyond)[0])
        where = f"at index {at}" if names is None else f"in column {names[at[1]]!r}, row {at[0]}"
        raise ArgumentError(argument, f"{array[at]:.3g} {where}", wants or f"values of at most {most:g}")


def all_finite(array: npt.NDArray[Any]) -> bool:
    """Whether all values are finite, in one pass and without an array of booleans as long as `array`."""
    if array.flags.c_contiguous and array.dtype.itemsize >= 4:
        flat = array.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(np.dot(flat, flat)):  # a sum of squares is finite only if all of them are
                return True
    return all(bool(np.isfinite(part).all()) for part in array) if array.ndim > 1 else bool(np.isfinite(array).all())


def check_timesteps(t: Any, T: int, n: int) -> Any:
    """Return timesteps as (n,) int64 within 0 .. T - 1, or raise `ArgumentError`.

    Those on a GPU stay there, and their values are not looked at.
    """
    return check_indices("t", t, T, n)


def check_indices(argument: str, value: Any, count: int, n: int) -> Any:
    """Return indices as (n,) int64 within 0 .. count - 1, as `check_timesteps` does."""
    on_device, array = is_on_device(value), as_array(argument, value, f"an integer or shape ({n},)")
    if array.dtype.kind not in "iu":
        words = f": np.unique({argument}, return_inverse=True)[1] numbers words" if array.dtype.kind in "OUT" else ""
        raise ArgumentError(argument, f"dtype {array.dtype}", f"integers{words}")
    if array.shape not in ((), (n,)):
        raise ArgumentError(argument, f"shape {array.shape}", f"an integer or shape ({n},)")
    if on_device:
        return (array if array.shape == (n,) else array.reshape(1).repeat(n)).astype(np.int64)
    if array.size and (array.min() < 0 or array.max() >= count):
        bad = array.min() if array.min() < 0 else array.max()
        raise ArgumentError(argument, str(bad), f"integers from 0 to {count - 1}")
    return np.ascontiguousarray(np.broadcast_to(array, (n,)), np.int64)
