"""Convolutions by phases: outputs that see their inputs through the same taps, under strides and upsampling."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastdiff.backends.layers import Conv


class Phase(NamedTuple):
    """Output positions first, first + step, ... along one axis, which see the input through the same taps.

    Position first + m step sees input m stride + offset + i through the i-th of `taps`, each the sum of these taps of
    the kernel.
    """

    first: int
    step: int
    stride: int
    offset: int
    taps: tuple[tuple[int, ...], ...]

    def count(self, size: int) -> int:
        """How many of `size` outputs."""
        return max(0, -(-(size - self.first) // self.step))

    def segments(self, low: int, high: int, size: int) -> list[tuple[int, int, int, int]]:
        """Output positions low ... high - 1 by the taps that lie in an input of `size`: (m, count, first tap, taps)."""
        found: list[tuple[int, int, int, int]] = []
        for m in range(-(-(low - self.first) // self.step), -(-(high - self.first) // self.step)):
            at = m * self.stride + self.offset
            begin, end = max(0, -at), min(len(self.taps), size - at)
            if begin >= end:
                continue
            last = found[-1] if found else None
            if last is not None and last[2:] == (begin, end - begin) and last[0] + last[1] == m:
                found[-1] = (last[0], last[1] + 1, begin, end - begin)
            else:
                found.append((m, 1, begin, end - begin))
        return found


def _phase(first: int, step: int, stride: int, pairs: list[tuple[int, int]]) -> Phase:
    """A phase of pairs (offset, tap)."""
    offsets = [offset for offset, _ in pairs] or [0]
    span = range(min(offsets), max(offsets) + 1) if pairs else range(0)
    taps = tuple(tuple(tap for offset, tap in pairs if offset == at) for at in span)
    return Phase(first, step, stride, min(offsets), taps)


def phases_of(kernel: int, stride: int, pad: int, up: int) -> list[Phase]:
    """Output o sees input (o stride + s - pad) // up through tap s: taps that meet one input value are one tap."""
    period = up // math.gcd(stride, up)
    return [
        _phase(p, period, period * stride // up, [((p * stride + s - pad) // up, s) for s in range(kernel)])
        for p in range(period)
    ]


def adjoint_phases_of(kernel: int, stride: int, pad: int, up: int) -> list[Phase]:
    """Input q gets the gradient of output o through tap s where o stride + s - pad = q up + d for some d < up."""
    period = stride // math.gcd(stride, up)
    return [
        _phase(
            p,
            period,
            period * up // stride,
            [
                (place // stride, s)
                for s in range(kernel)
                for d in range(up)
                if (place := p * up + d + pad - s) % stride == 0
            ],
        )
        for p in range(period)
    ]


class Sides(NamedTuple):
    """What a convolution reads and writes, (height, width, channels) each, and its phases down and across."""

    read: tuple[int, int, int]
    written: tuple[int, int, int]
    down: list[Phase]
    across: list[Phase]

    @classmethod
    def of(cls, geometry: Conv, shape: tuple[int, int, int, int], k: int, adjoint: bool) -> Sides:
        """Of images of a shape to k channels, or of the input gradient, which is a convolution of dy."""
        x, y = shape[1:], (*geometry.size(*shape[1:3]), k)
        make = adjoint_phases_of if adjoint else phases_of
        down, across = (
            make(geometry.kernel[axis], geometry.stride[axis], geometry.pad[2 * axis], geometry.up[axis])
            for axis in range(2)
        )
        return cls(*((y, x) if adjoint else (x, y)), down, across)
