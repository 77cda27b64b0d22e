"""All parameters of a network in one flat buffer, with named views into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 16  # values: every tensor starts on a 64-byte line of a float32 buffer


class Layout:
    """Where each named tensor lies in the flat buffer.

    Tensors are padded to `ALIGNMENT` values. The padding is zero and stays zero: its gradient is zero.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Shape of every tensor, in order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.size
            self.size += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT

    @property
    def count(self) -> int:
        """Number of parameters, padding not counted."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def views(self, flat: Any) -> dict[str, Any]:
        """Return named views into a flat buffer of length `size`."""
        return {
            name: flat[start : start + math.prod(self.shapes[name])].reshape(self.shapes[name])
            for name, start in self.offsets.items()
        }

    def zeros(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a zero buffer."""
        return np.zeros(self.size, dtype)
