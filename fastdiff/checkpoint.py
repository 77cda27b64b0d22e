"""Checkpoints: safetensors files with a JSON header under the metadata key ``fastdiff``.

Written to a temporary file, flushed and renamed, so a file is whole or absent. Nothing in them is executable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import CheckpointError
from fastdiff.files import writing
from fastdiff.noise import NOISE_LAW_VERSION

FORMAT_VERSION = 2  # 2 may have a noise shape
_KEY = "fastdiff"
_DTYPES = {"F32", "F64", "I64"}


def write(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a checkpoint.

    Parameters
    ----------
    path : path
        The file; it appears whole or not at all.
    header : mapping
        JSON types. Format and noise-law version are added.
    tensors : mapping of str to array
        float32, float64 or int64.
    """
    from safetensors.numpy import save

    versions = {"format": FORMAT_VERSION, "noise_law": NOISE_LAW_VERSION}
    text = json.dumps({**versions, **header}, allow_nan=False)
    content = save({name: np.asarray(t, order="C") for name, t in tensors.items()}, metadata={_KEY: text})
    with writing(path) as file:
        file.write(content)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return header and tensors of a checkpoint.

    Raises
    ------
    CheckpointError
        The file is missing, truncated, not a fastdiff checkpoint, of a newer format or another noise law.
    """
    header, names = _open(path)
    tensors = {}
    with _safe_open(path) as file:
        for name in names:
            tensors[name] = file.get_tensor(name)
    return header, tensors


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint says of itself, as JSON types, without reading the tensors' values.

    The header, ``tensors`` (name to shape) and ``parameters`` (their number, of the network alone).
    """
    header, _ = _open(path)
    with _safe_open(path) as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    parameters = sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith("net."))
    return {**header, "parameters": parameters, "tensors": shapes}


def _safe_open(path: str | os.PathLike[str]) -> Any:
    from safetensors import safe_open

    return safe_open(os.fspath(path), framework="np")


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """Checked header and tensor names."""
    from safetensors import SafetensorError

    try:
        with _safe_open(path) as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            dtypes = {file.get_slice(name).get_dtype() for name in names}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
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
    if header.get("noise_law") != NOISE_LAW_VERSION:
        raise CheckpointError(
            f"{path}: noise law {header.get('noise_law')!r}, this fastdiff has {NOISE_LAW_VERSION}: "
            "its samples would differ from those the checkpoint was made for"
        )
    if not dtypes <= _DTYPES:
        raise CheckpointError(
            f"{path}: tensors of type {', '.join(sorted(dtypes - _DTYPES))}, wants {', '.join(sorted(_DTYPES))}"
        )
    return header, names
