"""The reference formulas of noise, forward noising and a sampler's step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff import noise as law
from fastdiff.backends.protocol import Row
from fastdiff.noise import Draw

Array = npt.NDArray[Any]


class StepOperations:
    """Noise, and what it goes into."""

    def normal(self, out: Array, draw: Draw) -> None:
        law.fill_normal(out, draw)

    def forward_noise(
        self,
        x0: Array,
        t: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        eps: Array,
        draw: Draw,
    ) -> None:
        self.normal(eps, draw)
        real = out.dtype.type
        np.multiply(signal.astype(real)[t, None], x0, out=out)
        out += noise.astype(real)[t, None] * eps

    def sampler_step(
        self,
        x: Array,
        out: Array | None,
        previous: Array | None,
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        real = x.dtype.type

        def total(*terms: tuple[float, Array | None]) -> Array:
            value = np.zeros_like(x)
            for coefficient, array in terms:
                if real(coefficient) != 0:
                    value += real(coefficient) * array
            return value

        x0 = z = None
        if row.b != 0 or previous is not None:
            x0 = total((row.p, x), (row.q, out))
            if clip is not None:
                low, high = real(clip[0]), real(clip[1])
                x0 = np.where(x0 < low, low, np.where(x0 > high, high, x0))
        if row.s != 0:
            z = np.empty_like(x)
            self.normal(z, draw)
        x[...] = total((row.a, x), (row.b, x0), (row.c, previous), (row.e, out), (row.s, z))
        if previous is not None:
            previous[...] = x0
