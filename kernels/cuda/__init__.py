"""CUDA kernels in C++: the sources (``*.cu``, ``*.cuh``) and `runtime`, which loads, compiles and launches them."""
