"""Which tiles convolutions take: those measured on this family of GPUs, else the estimates of `conv` and `conv_mma`.

``make gpu`` measures, and writes what ``measured/sm_90.json`` is for GPUs of that compute capability. Whatever it says,
no bit depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends.protocol import measured

MEASURED = Path(__file__).with_name("measured")


class Tuning(NamedTuple):
    """What is known of a family.

    Attributes
    ----------
    tiles : dict
        The fastest tile of a product, by `key`.
    rates : dict
        Of a kernel on a tile, as "conv_64x32": outputs in the same time, compared with the widest tile.
    stages : int
        Of weights, that a kernel of ``conv_mma.cu`` holds in shared memory: so many less one are under way.

    A tile or a number of stages that does not fit where it was not measured is passed over.
    """

    tiles: Mapping[str, str] = {}
    rates: Mapping[str, float] = {}
    stages: int = 3

    def of(self, entry: str, tiles: Sequence[Any], sizes: npt.NDArray[Any] | None = None) -> Sequence[Any]:
        """Return the tiles that a kernel has for a product of these "ConvSizes": the fastest one, or all with rates."""
        fastest = None if sizes is None or not self.tiles else self.tiles.get(key(entry, sizes))
        known = [tile for tile in tiles if tile.name == fastest]
        if known or not self.rates:
            return known or tiles
        return [tile._replace(rate=self.rates.get(f"{entry}_{tile.name}", tile.rate)) for tile in tiles]


def key(entry: str, sizes: npt.NDArray[Any]) -> str:
    """Return what names a product of a kernel."""
    return " ".join(map(str, [entry, *sizes.view(np.int32).tolist()]))


@cache
def tuning(arch: str) -> Tuning:
    """Return what is known of GPUs of a compute capability, such as "90"."""
    path = MEASURED / f"sm_{arch}.json"
    if not path.exists():
        return Tuning()
    return Tuning(**measured(path).get("tuning", {}))
