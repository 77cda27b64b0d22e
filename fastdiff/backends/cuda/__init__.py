"""The CUDA backend: kernels of our own on CuPy arrays, float32.

Arrays and launches belong to a runtime (`fastdiff.kernels.cuda.runtime`), so that the same code runs where there is
no GPU, on a runtime that executes the kernels on the CPU. Work is issued on the current stream and not waited for,
except where a Python number is returned.
"""

from fastdiff.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
