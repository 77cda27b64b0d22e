"""The safetensors format, read without trust and written: length of a JSON header, header, values.

A file is opened once, so that one that takes its place meanwhile is not seen. Sizes are checked before memory is taken:
what costs time or memory out of proportion to the file's length is refused.

Not the library safetensors: `safe_open` takes a path, which it opens itself and maps (a file that is cut meanwhile
ends the process), its NumPy side reads no bfloat16, and `deserialize` copies twice, after a header of any cost.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import CheckpointError
from fastdiff.files import check_path, reading

Array = npt.NDArray[Any]

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "BF16": np.uint16,  # the upper half of a float32
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}
ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "F16", "U16", "I16", "I8", "U8", "BOOL")  # wide ones first: aligned
METADATA = "__metadata__"
MOST_HEADER = 1 << 27  # bytes
MOST_VALUES = 400_000  # in a header, or one in SPARSE bytes: each may take a hundred bytes of memory
SPARSE = 16


class _Bad(Exception):
    """Why a file is none."""


@dataclass(frozen=True)
class Tensor:
    """What a header says of a tensor, and where its values are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A file that has been read, or its header alone: then there are no `arrays`."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    arrays: dict[str, Array] = field(default_factory=dict)

    def array(self, name: str) -> Array:
        """Return the values of a tensor; bfloat16 as float32."""
        array = self.arrays[name]
        return array if self.tensors[name].dtype != "BF16" else (array.astype(np.uint32) << 16).view(np.float32)


Places = Callable[[TensorFile], Mapping[str, Array]]


def read(path: str | os.PathLike[str], *, values: bool = True, places: Places | None = None) -> TensorFile:
    """Read a file, or without `values` its header alone.

    `places` is shown the header and gives arrays that tensors are read into, contiguous and of their shape and type;
    others get new ones. Thus a large file is in memory once.

    Raises
    ------
    CheckpointError
        It is missing, or not a whole safetensors file.
    ArgumentError
        The path is none.
    """
    check_path("path", path)
    try:
        with reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _Bad("it ends within its header")
            if length > MOST_HEADER:
                raise _Bad(f"a header of {length} bytes, where {MOST_HEADER} are the most")
            found = TensorFile(*_header(file.read(length), size - 8 - length))
            if values:
                arrays = {} if places is None else places(found)
                for name, one in sorted(found.tensors.items(), key=lambda item: item[1].start):
                    found.arrays[name] = _values(file, one, arrays.get(name))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (_Bad, OSError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: not a whole safetensors file ({reason})") from error
    return found


def _values(file: IO[bytes], one: Tensor, place: Array | None) -> Array:
    """The values of the tensor that comes next in a file."""
    dtype = np.dtype(DTYPES[one.dtype]).newbyteorder("<")
    array = np.empty(one.shape, dtype) if place is None else place
    assert (array.shape, array.dtype) == (one.shape, dtype)
    if array.size and file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
        raise _Bad("it was cut while it was read")
    return array


def write(file: Any, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays of the types of `DTYPES` to a binary file, as the library safetensors does, to the byte."""
    order = sorted(arrays, key=lambda name: (ORDER.index(NAMES[arrays[name].dtype]), name))
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        array = np.ascontiguousarray(arrays[name], arrays[name].dtype.newbyteorder("<"))
        file.write(array.data.cast("B") if array.size else b"")


def _header(text: bytes, size: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a header over so many bytes of values."""
    if text[:1] != b"{":
        raise _Bad("no header")
    most = max(MOST_VALUES, len(text) // SPARSE)
    if text.count(b",") + text.count(b":") > most:
        raise _Bad(f"a header of more than {most} values")
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise _Bad(f"its header is not JSON: {str(error)[:80]}") from error
    if not isinstance(found, dict):
        raise _Bad("its header is no list of names")
    metadata = found.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Bad("its metadata are no text")
    tensors = {name: _tensor(name, one) for name, one in found.items()}
    at = 0
    for one in sorted(tensors.values(), key=lambda one: (one.start, one.end)):
        if one.start != at:
            raise _Bad(f"values that no tensor has, or two have, at byte {min(at, one.start)}")
        at = one.end
    if at != size:
        raise _Bad(f"{size} bytes of values, where the header has {at}")
    return metadata, tensors


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Bad(f"{name!r} is in its header twice")
        found[name] = value
    return found


def _tensor(name: str, said: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = said["dtype"], said["shape"], said["data_offsets"]
        sizes = [*shape, start, end]
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _Bad(f"what it says of {name!r:.60} is no dtype, shape and place") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Bad(f"{name!r:.60} has the type {dtype!r:.20}, which is not read")
    if len(shape) > 32 or math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - start:
        raise _Bad(f"{name!r:.60} has {end - start} bytes, which is not its shape's")
    return Tensor(dtype, tuple(shape), start, end)
