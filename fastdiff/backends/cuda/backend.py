"""The CUDA backend: what its files hold, put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.covariance import CovarianceOperations
from fastdiff.backends.cuda.cudnn import Cudnn
from fastdiff.backends.cuda.mlp import MLPOperations
from fastdiff.backends.protocol import CONVOLUTIONS, PRECISIONS
from fastdiff.errors import ArgumentError, BackendError, check_choice, shown
from fastdiff.kernels.cuda import runtime as runtimes

Array = Any


def _numba_twins() -> Any:
    try:
        from fastdiff.kernels.cuda import numba_twins
    except ImportError as error:
        raise BackendError(
            f"kernels='numba' needs Numba's CUDA target: pip install 'fastdiff-engine[cuda13]' ({error})"
        ) from error
    return numba_twins


class CudaBackend(CovarianceOperations, MLPOperations):
    """CUDA kernels, float32.

    Parameters
    ----------
    runtime : Runtime, optional
        Where arrays and kernels live; by default CuPy on the current device.
    kernels : {"raw", "numba"}, optional
        "numba": forward noising and the sampler step in Numba's CUDA target, of the same bits; for comparison.
    precision : {"float32", "bf16x3", "bf16"}, optional
        "bf16": convolutions of image networks, and perceptrons in one launch, on tensor cores, which round what they
        multiply to bfloat16 and add in float32. "bf16x3": such perceptrons alone, each factor as the sum of two
        bfloat16; image networks are those of "float32". Parameters, activations of image networks, training of
        perceptrons and everything else stay float32.
    graphs : bool, optional
        Whether work that comes again is launched as a CUDA graph, with weight gradients on a second stream. Changes no
        bits. It ends with a line in the log where a device refuses to capture one.
    convolutions : {"own", "cudnn"}, optional
        "cudnn": what cuDNN can do is done by it; see `fastdiff.backends.cuda.cudnn`.

    Raises
    ------
    BackendError
        CuPy, the driver or a GPU is missing, or the driver is too old; or cuDNN, where it is asked for.
    """

    name = "cuda"
    threads = 1
    steps_ahead = 64

    def __init__(
        self,
        runtime: runtimes.Runtime | None = None,
        kernels: str = "raw",
        precision: str = "float32",
        graphs: bool = True,
        convolutions: str = "own",
    ) -> None:
        self.kernels = check_choice("kernels", kernels, ["raw", "numba"])
        self.precision = check_choice("precision", precision, PRECISIONS)
        if not isinstance(graphs, bool):
            raise ArgumentError("graphs", shown(graphs), "True or False")
        self.graphs = graphs
        self.convolutions = check_choice("convolutions", convolutions, CONVOLUTIONS)
        super().__init__(runtimes.CupyRuntime() if runtime is None else runtime)
        self._twins = _numba_twins() if kernels == "numba" else None
        self._cudnn = Cudnn(self.runtime, precision, self._scratch) if convolutions == "cudnn" else None

    def __reduce__(self) -> tuple[Any, tuple[Any, str, str, bool, str]]:
        return type(self), (self.runtime, self.kernels, self.precision, self.graphs, self.convolutions)

    def asarray(self, value: Any, dtype: npt.DTypeLike | None = None) -> Array:
        return self.runtime.asarray(value, np.float32 if dtype is None else dtype)

    def owns(self, value: Any) -> bool:
        return self.runtime.owns(value)

    def to_numpy(self, array: Array) -> npt.NDArray[Any]:
        return self.runtime.to_numpy(array)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return self.runtime.empty(shape, dtype)

    def queue(self) -> int:
        return self.runtime.queue()

    def address(self, array: Array) -> int:
        return self.runtime.address(array)
