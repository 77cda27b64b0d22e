"""Checkpoints: safetensors files with a JSON header under the metadata key ``fastdiff``.

Written to a temporary file, flushed and renamed, so a file is whole or absent. Nothing in them is executable.

The header says what wrote the file and what it takes to read it. Keys that 0.1.0 did not write are optional, and where
one is absent the file means what 0.1.0 meant; so formats 1 and 2 are read like 3.

format
    1: curves under white noise; 2: shaped noise and pictures; 3: all that follows.
noise_law
    Version of the law that all random numbers follow: another one is refused.
features
    What the file uses of `FEATURES`, sorted; absent: nothing. An unknown one is refused by name, so a new feature needs
    no new format.
arithmetic
    Which one trained the weights; absent: 1. 2 is that of networks that convolve along rows, curves among them, since
    these convolutions are Winograd's on the CPU. Others have `ARITHMETIC`.
digest, header_digest
    Checksums of the tensors, and of the header's other keys, against accidents; absent: they are not checked.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import tensor_file
from fastdiff.errors import CheckpointError
from fastdiff.files import writing
from fastdiff.noise import NOISE_LAW_VERSION
from fastdiff.tensor_file import Tensor, TensorFile

FORMAT_VERSION = 3
ARITHMETIC = 1
"""Of training, at least: with another number the same steps may end in other last bits, on the same CPU."""
FEATURES = frozenset(
    {
        "base",
        "column scale",
        "covariates",
        "flow schedule",
        "kept rows",
        "known inputs",
        "laplace schedule",
        "learned variance",
        "mask",
        "min snr",
        "null class",
        "rate plan",
        "series",
        "velocity",
        "zero terminal snr",
    }
)
"""What a file may use beyond 0.1.0 without which it must not be read. Add a name here, and give it to `write`."""
_KEY = "fastdiff"
_DTYPES = {"F32", "F64", "I64"}


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    features: Iterable[str] = (),
) -> None:
    """Write a checkpoint.

    Parameters
    ----------
    path : path
        The file; it appears whole or not at all.
    header : mapping
        JSON types. Format, noise law, arithmetic, features and digest are added; an arithmetic that is given stays.
    tensors : mapping of str to array
        float32, float64 or int64.
    features : iterable of str, optional
        Names out of `FEATURES` of what the file uses.
    """
    used = sorted(set(features))
    assert FEATURES.issuperset(used), used
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    facts = {
        "format": FORMAT_VERSION,
        "noise_law": NOISE_LAW_VERSION,
        "arithmetic": ARITHMETIC,
        **header,
        "features": used,
        "digest": digest(arrays),
    }
    facts = json.loads(json.dumps(facts, allow_nan=False))
    text = json.dumps({**facts, "header_digest": header_digest(facts)})
    with writing(path) as file:
        tensor_file.write(file, arrays, {_KEY: text})


Places = Callable[[dict[str, Any], Mapping[str, Tensor]], Mapping[str, npt.NDArray[Any]]]


def read(
    path: str | os.PathLike[str], places: Places | None = None
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return header and tensors of a checkpoint.

    `places` is given the header and what it says of tensors, and returns arrays to read some of them into.

    Raises
    ------
    CheckpointError
        The file is missing, truncated, not a fastdiff checkpoint, of a newer format or another noise law, needs a
        feature that is not there, or has other tensors than were written.
    """
    header: dict[str, Any] = {}

    def placed(file: TensorFile) -> Mapping[str, npt.NDArray[Any]]:
        header.update(_checked_header(path, file))
        return {} if places is None else places(header, file.tensors)

    file = tensor_file.read(path, places=placed)
    tensors = {name: file.array(name) for name in file.tensors}
    _check_digest(path, header.get("digest"), tensors)
    return header, tensors


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint says of itself, as JSON types, without reading the tensors' values.

    The header, ``tensors`` (name to shape) and ``parameters`` (their number, of the network alone).
    """
    file = tensor_file.read(path, values=False)
    header = _checked_header(path, file)
    shapes = {name: list(one.shape) for name, one in file.tensors.items()}
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("net."))
    return {**header, "parameters": parameters, "tensors": shapes}


_WIDTH, _DEPTH = 509, 61  # words and rows of a block: odd and prime, so that no power of two comes round in them


def digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the checksum of C-contiguous tensors, against accidents: it is no authentication.

    CRC-32 of name, dtype, shape and content of each, sorted by name. Content is read as little-endian words of 64 bits
    in rows of 509, of which 61 at a time are added modulo 2^64; the sums stand for them, and what fills no row stands
    for itself. Addition runs at the speed of memory, several times that of a CRC, and one altered word, or two words,
    sectors or pages that change places, alter some sum.
    """
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape} ".encode(), crc)
        content = tensor.reshape(-1).view(np.uint8)
        rows = content.size // (8 * _WIDTH)
        words = content[: rows * 8 * _WIDTH].view("<u8").reshape(rows, _WIDTH)
        for first in range(0, rows, _DEPTH):
            crc = zlib.crc32(words[first : first + _DEPTH].sum(axis=0, dtype="<u8").data, crc)
        crc = zlib.crc32(content[rows * 8 * _WIDTH :].data, crc)
    return f"sum64:{crc:08x}"


def header_digest(header: Mapping[str, Any]) -> str:
    """Return the checksum of a header's keys but this one: CRC-32 of its JSON text, sorted and without blanks."""
    facts = {key: value for key, value in header.items() if key != "header_digest"}
    return f"crc32:{zlib.crc32(json.dumps(facts, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _earlier_digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """The checksum of the first files of format 3: CRC-32 of every byte."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape} ".encode(), crc)
        crc = zlib.crc32(tensor.data.cast("B") if tensor.size else b"", crc)
    return f"crc32:{crc:08x}"


_DIGESTS = {"sum64": digest, "crc32": _earlier_digest}


def _check_digest(path: str | os.PathLike[str], stated: Any, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Refuse tensors that are not what the header states; files of 0.1.0 state nothing."""
    if stated is None:
        return
    kind = stated.partition(":")[0] if isinstance(stated, str) else ""
    if kind not in _DIGESTS:
        raise CheckpointError(
            f"{path}: its digest {stated!r:.40} is of no kind that this fastdiff knows ({', '.join(_DIGESTS)}): "
            "altered or damaged after it was written, or written by a newer version"
        )
    if stated != _DIGESTS[kind](tensors):
        raise CheckpointError(f"{path}: its content was altered or damaged after it was written: the digest differs")


def _checked_header(path: str | os.PathLike[str], file: TensorFile) -> dict[str, Any]:
    """The header of a file that this version can read."""
    metadata = file.metadata
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a fastdiff checkpoint (no {_KEY!r} header)")
    try:
        header = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the fastdiff header is not JSON ({error})") from error
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path}: the fastdiff header has no format version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, this fastdiff reads up to {FORMAT_VERSION}: update fastdiff"
        )
    _check_features(path, header.get("features", []))
    if header.get("noise_law") != NOISE_LAW_VERSION:
        raise CheckpointError(
            f"{path}: noise law {header.get('noise_law')!r}, this fastdiff has {NOISE_LAW_VERSION}: "
            "its samples would differ from those the checkpoint was made for"
        )
    try:
        whole = header.get("header_digest") in (None, header_digest(header))
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: its header was altered or damaged after it was written: the digest differs")
    dtypes = {one.dtype for one in file.tensors.values()}
    if not dtypes <= _DTYPES:
        raise CheckpointError(
            f"{path}: tensors of type {', '.join(sorted(dtypes - _DTYPES))}, wants {', '.join(sorted(_DTYPES))}"
        )
    return header


def _check_features(path: str | os.PathLike[str], features: Any) -> None:
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise CheckpointError(f"{path}: features {features!r}, where a list of names is wanted")
    unknown = [repr(name) for name in features if name not in FEATURES]
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{path}: this file needs the feature{plural} {', '.join(unknown)}, which this fastdiff does not have: "
            "update fastdiff"
        )
