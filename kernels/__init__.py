"""The compiled kernels of fastdiff, and nothing else: ``cpu`` (Numba)."""
