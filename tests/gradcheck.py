"""Gradients against central differences of fourth order, every entry."""

from __future__ import annotations

import math

import numpy as np
from tolerances import GRADIENT, GRADIENT_FLOOR, STEP

from fastdiff.backends import LinearPart


def differences(function, array):
    """The gradient of a scalar ``function()`` with respect to `array`, which it reads, one entry at a time."""
    gradient = np.empty(array.shape)
    for at in np.ndindex(array.shape):
        kept = array[at]
        values = []
        for shift in (-2, -1, 1, 2):
            array[at] = kept + shift * STEP
            values.append(function())
        array[at] = kept
        gradient[at] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * STEP)
    return gradient


def assert_gradient(function, array, gradient):
    """Check `gradient`, every entry; a vanishing one is checked against the largest."""
    assert gradient.shape == array.shape
    assert gradient.dtype == array.dtype == np.float64
    want = differences(function, array)
    scale = np.maximum(np.abs(want), GRADIENT_FLOOR * np.abs(want).max(initial=0))
    worst = np.max(np.abs(gradient - want) / np.where(scale > 0, scale, 1), initial=0)
    assert worst <= GRADIENT, f"relative error {worst:.3g}"


def with_linear(net, rank=None):
    """Give a network a fixed linear part, complete or with a rest; as a base's, it makes nothing longer."""
    random, rank = np.random.default_rng(4), net.points if rank is None else rank
    gains, rest = random.uniform(-1, 1, size=(net.T, rank)), random.uniform(-1, 1, size=net.T)
    basis, _ = np.linalg.qr(random.normal(size=(net.points, rank)))
    net.set_linear(LinearPart(basis, gains, None if rank == net.points else rest))
    return net


def scatter(net, seed=0):
    """Give every parameter of a network a random value of a useful size, and leave the padding alone."""
    random = np.random.default_rng(seed)
    for view in net.params.values():
        fan_in = view.shape[0] if view.ndim == 2 else 1
        view[...] = random.normal(size=view.shape) / math.sqrt(fan_in)
    return net
