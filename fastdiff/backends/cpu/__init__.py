"""The CPU backend: compiled Numba kernels in float32, on threads of its own.

The kernels release the GIL and take a range of their work, so plain Python threads run them: no OpenMP and no Numba
threading layer. Two user threads may therefore use a backend at once on any platform (they take turns), a forked
child works, and nothing global is set. A result does not depend on the number of threads, because a kernel's pieces
write disjoint memory and sums over pieces are added in the order of the pieces.
"""

from fastdiff.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
