"""The NumPy backend: what its files hold, put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.numpy.covariance import CovarianceOperations
from fastdiff.backends.numpy.host import HostBackend
from fastdiff.backends.numpy.layers import LayerOperations
from fastdiff.backends.numpy.mlp import MLPOperations
from fastdiff.backends.numpy.optim import OptimOperations

Array = npt.NDArray[Any]


class NumpyBackend(CovarianceOperations, LayerOperations, MLPOperations, OptimOperations, HostBackend):
    """Plain NumPy. Arrays are ``numpy.ndarray``; float64 input is computed in float64."""

    name = "numpy"
    threads = 1

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        array = np.asarray(value)
        if dtype is None:
            dtype = np.float64 if array.dtype == np.float64 else np.float32
        return np.ascontiguousarray(array, dtype)
