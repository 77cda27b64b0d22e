"""The reference backend: plain NumPy formulas, in float32 or float64. It is the specification of every operation."""

from fastdiff.backends.numpy.backend import NumpyBackend

__all__ = ["NumpyBackend"]
