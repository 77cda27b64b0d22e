"""Functions of one float32, to be called from inside other kernels, where they are vectorised."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastdiff.kernels.cpu.gemm import host_width
from fastdiff.kernels.cpu.jit import bits_float, kernel

F = np.float32
HALF, ONE = F(0.5), F(1)

# exp(r) = 1 + r + r^2 EXP(r) for |r| <= ln(2) / 2, least maximum error 6.3e-8 in EXP.
E0, E1, E2, E3, E4 = F(0.5), F(0.16666576), F(0.041666374), F(0.008363235), F(0.0013941218)
EXP_LOW, EXP_HIGH = F(-87), F(88)
LOG2_E, LN2_HIGH, LN2_LOW = F(1.4426950408889634), F(0.693359375), F(-2.1219444e-4)
EXPONENT_BIAS, MANTISSA_BITS = np.int32(127), np.int32(23)


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a b + c in float32, rounded once where the CPU can."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args) if host_width() else builder.fadd(builder.fmul(args[0], args[1]), args[2])

    return types.float32(types.float32, types.float32, types.float32), codegen


@kernel
def exp(x):
    """exp(x) for x from -88 to 88; 0 where that is below some 1e-38."""
    whole = np.floor(multiply_add(x, LOG2_E, HALF))
    r = multiply_add(whole, -LN2_LOW, multiply_add(whole, -LN2_HIGH, x))
    y = multiply_add(multiply_add(multiply_add(multiply_add(E4, r, E3), r, E2), r, E1), r, E0)
    y = multiply_add(y * r, r, r) + ONE
    return y * bits_float((np.int32(whole) + EXPONENT_BIAS) << MANTISSA_BITS)


@kernel
def sigmoid(v):
    """1 / (1 + exp(-v))."""
    x = -v
    if x > EXP_HIGH:
        x = EXP_HIGH
    if x < EXP_LOW:
        x = EXP_LOW
    return ONE / (ONE + exp(x))
