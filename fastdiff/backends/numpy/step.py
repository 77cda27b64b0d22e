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
        memory: tuple[Array, ...],
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

        v = None
        if out is not None and out.ndim > x.ndim:
            out, v = out
        keeps = len(memory) > 0 and row.evaluates
        m = z = None
        if row.b != 0 or keeps:
            m = total((row.p, x), (row.q, out))
            if clip is not None:
                low, high = real(clip[0]), real(clip[1])
                m = np.where(m < low, low, np.where(m > high, high, m))
        if row.s != 0:
            z = np.empty_like(x)
            self.normal(z, draw)
            if row.r != 0:
                z *= np.exp(real(row.r) * v)
        remembered = zip((row.c1, row.c2, row.c3), memory, strict=False)
        x[...] = total((row.a, x), (row.b, m), *remembered, (row.e, out), (row.s, z))
        if keeps:
            for later, earlier in zip(memory[:0:-1], memory[-2::-1], strict=True):
                later[...] = earlier
            memory[0][...] = m
