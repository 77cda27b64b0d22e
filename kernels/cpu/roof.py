"""What the machine can do at most, for `fastdiff.bench`: a triad through memory, and matrix products in cache."""

from __future__ import annotations

import numpy as np

from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import kernel

ROWS, COLUMNS, DEPTH = 96, 96, 256  # of the products: whole tiles of every width, a panel of B in the nearest cache
SIZE = ROWS * COLUMNS + ROWS * DEPTH + DEPTH * COLUMNS
OPERATIONS = 2 * ROWS * COLUMNS * DEPTH


@kernel
def triad_range(start, stop, a, b, c):
    """a = b + 3 c."""
    out, x, y = a[start:stop], b[start:stop], c[start:stop]
    for i in range(len(out)):
        out[i] = x[i] + np.float32(3) * y[i]


@kernel
def products(times, room):
    """Multiply matrices `times` times, all in `room` (SIZE,): C, A, B."""
    c, a, b = room[: ROWS * COLUMNS], room[ROWS * COLUMNS : SIZE - DEPTH * COLUMNS], room[SIZE - DEPTH * COLUMNS : SIZE]
    for _ in range(times):
        gemm(c, 0, COLUMNS, a, 0, DEPTH, 1, b, 0, COLUMNS, ROWS, COLUMNS, DEPTH, False)
