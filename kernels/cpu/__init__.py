"""CPU kernels in Numba.

Every kernel works on flat arrays and on a range of its work, in one thread and without the GIL: the backend cuts the
work and hands the pieces to its threads.
"""
