"""exp, log and cos of float64 arrays, rounded correctly: NumPy's and the system's differ in last bits between CPUs.

Sums of two float64 (Dekker 1971) carry about 100 bits. Nothing is used but + - * /, which IEEE 754 defines to the bit.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Pair = tuple[Float64, Float64]  # a value is the sum of both, and the first one is that sum, rounded

HALVINGS = 9


def _pair(value: Fraction) -> tuple[float, float]:
    return float(value), float(value - Fraction(float(value)))


LN2 = 0.6931471805599453, 2.3190468138462996e-17
INVERSE_FACTORIALS = [_pair(Fraction(1, math.factorial(n))) for n in range(35)]


def _sum(a: Float64, b: Float64 | float) -> Pair:
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _product(a: Float64, b: Float64 | float) -> Pair:
    (a1, a2), (b1, b2) = ((high := 134217729.0 * c - (134217729.0 * c - c), c - high) for c in (a, b))
    p = a * b
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def _add(a: Pair, b: Pair | tuple[float, float]) -> Pair:
    s, e = _sum(a[0], b[0])
    return _sum(s, e + (a[1] + b[1]))


def _multiply(a: Pair, b: Pair | tuple[float, float]) -> Pair:
    p, e = _product(a[0], b[0])
    return _sum(p, e + (a[0] * b[1] + a[1] * b[0]))


def _series(x: Pair, coefficients: list[tuple[float, float]]) -> Pair:
    """The polynomial of x whose coefficients are given from the constant one on."""
    total = np.full_like(x[0], coefficients[-1][0]), np.full_like(x[0], coefficients[-1][1])
    for one in coefficients[-2::-1]:
        total = _add(_multiply(total, x), one)
    return total


def _exp(x: Pair) -> Pair:
    k = np.rint(x[0] / LN2[0])
    r = _add(x, _multiply((-k, np.zeros_like(k)), LN2))
    r = r[0] / 2**HALVINGS, r[1] / 2**HALVINGS
    less = _multiply(r, _series(r, INVERSE_FACTORIALS[1:10]))  # exp(r) - 1
    for _ in range(HALVINGS):
        less = _add((2 * less[0], 2 * less[1]), _multiply(less, less))
    whole = _add(less, (1.0, 0.0))
    return np.ldexp(whole[0], k.astype(int)), np.ldexp(whole[1], k.astype(int))


def exp(x: Float64) -> Float64:
    """e^x of values from -700 to 700."""
    return _exp((x, np.zeros_like(x)))[0]


def log(x: Float64) -> Float64:
    """log x of values from e^-700 to e^700, if not within 1e-9 of 1: a step of Newton's method from what NumPy has."""
    start = np.log(x)
    off = _add(_multiply(_exp((-start, np.zeros_like(x))), (x, np.zeros_like(x))), (-1.0, 0.0))
    return _add((start, np.zeros_like(x)), off)[0]


def cos(x: Float64) -> Float64:
    """cos x of values from 0 to pi / 2."""
    signed = [(h * (-1) ** n, low * (-1) ** n) for n, (h, low) in enumerate(INVERSE_FACTORIALS[::2])]
    return _series(_product(x, x), signed)[0]


__all__ = ["cos", "exp", "log"]
