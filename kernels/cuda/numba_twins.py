"""Forward noising, the fused sampler step and maps of rows for Numba's CUDA target.

The noise is made by the element functions of the CPU kernels: a thread makes the four normals of one Philox
block and takes the four values of its row that they belong to, and since neighbouring threads have neighbouring blocks,
loads and stores are contiguous. A map is a matrix product on tiles of rows in shared memory. Numba's CUDA simulator
(``NUMBA_ENABLE_CUDASIM=1``) runs the same kernels on NumPy arrays.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numba import config, cuda, float32

from fastdiff.kernels.cpu import elementary
from fastdiff.kernels.cpu import noise as cpu_noise
from fastdiff.noise import PHILOX_ROUNDS, PHILOX_W

THREADS = 256  # of a block
BLOCKS_PER_MULTIPROCESSOR = 8  # so many are resident; a grid-stride loop covers the rest

MAP_ROWS, MAP_DEPTH = 8, 32  # of a tile in shared memory

W0, W1 = np.uint64(PHILOX_W[0]), np.uint64(PHILOX_W[1])
MINUS_TWO, ZERO = np.float32(-2), np.float32(0)

if config.ENABLE_CUDASIM:  # it has no libdevice: the same in NumPy
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    mul = operator.mul

    def float_bits(x: Any) -> Any:
        """The bits of a float32 as int32."""
        return x.view(np.int32)

    def bits_float(x: Any) -> Any:
        """The float32 of the bits in an int32."""
        return x.view(np.float32)

else:
    from numba.cuda import libdevice

    # Numba has no switch for contraction: a * b + c becomes one fused operation. A product that states its rounding
    # is never fused.
    mul = libdevice.fmul_rn
    float_bits, bits_float = libdevice.float_as_int, libdevice.int_as_float


class _Products(ast.NodeTransformer):
    """Every a * b becomes mul(a, b)."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult):
            return node
        return ast.Call(ast.Name("mul", ast.Load()), [node.left, node.right], [])


def rounded(function: Callable[..., Any]) -> Any:
    """Make a device function of a Python function of float32, each of its products rounded by itself.

    Parameters
    ----------
    function : callable
        A function or a CPU kernel; its text is compiled anew, with this module's `mul` for its products and this
        module's bit casts.
    """
    function = getattr(function, "py_func", function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    tree = ast.fix_missing_locations(_Products().visit(tree))
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    names = {**function.__globals__, "mul": mul, "float_bits": float_bits, "bits_float": bits_float}
    exec(compile(tree, function.__code__.co_filename, "exec"), names)
    return cuda.jit(device=True)(names[definition.name])


log_uniform = rounded(cpu_noise.log_uniform)
cos_sin_turn = rounded(cpu_noise.cos_sin_turn)
philox_round = cuda.jit(device=True)(cpu_noise.philox_round.py_func)  # integers


@rounded
def noised(signal, clean, noise, z):
    """One value of x_t."""
    return signal * clean + noise * z


@rounded
def remembered(x, out, p, q, low, high):
    """One value of m = clip(p x + q out). A term with a zero coefficient is not evaluated."""
    m = ZERO
    if p != ZERO:
        m = m + p * x
    if q != ZERO:
        m = m + q * out
    if m > high:
        m = high
    if m < low:
        m = low
    return m


@rounded
def advanced(x, m, m1, m2, m3, out, z, a, b, c1, c2, c3, e, s):
    """One value of a x + b m + c1 m1 + c2 m2 + c3 m3 + e out + s z, in the same way."""
    value = ZERO
    if a != ZERO:
        value = value + a * x
    if b != ZERO:
        value = value + b * m
    if c1 != ZERO:
        value = value + c1 * m1
    if c2 != ZERO:
        value = value + c2 * m2
    if c3 != ZERO:
        value = value + c3 * m3
    if e != ZERO:
        value = value + e * out
    if s != ZERO:
        value = value + s * z
    return value


@rounded
def scaled(z, v, r):
    """One value of exp(r v) z, the power between -87 and 88: `elementary.exp` without fused operations."""
    power = r * v
    if power != power:
        return power
    power = min(max(power, elementary.EXP_LOW), elementary.EXP_HIGH)
    turns = power * elementary.LOG2_E + elementary.HALF
    whole = np.int32(turns)
    if float32(whole) > turns:
        whole = np.int32(whole - 1)
    rest = power - float32(whole) * elementary.LN2_HIGH - float32(whole) * elementary.LN2_LOW
    y = elementary.E4 * rest + elementary.E3
    y = y * rest + elementary.E2
    y = y * rest + elementary.E1
    y = y * rest + elementary.E0
    y = y * rest * rest + rest + elementary.ONE
    return y * bits_float(np.int32((whole + elementary.EXPONENT_BIAS) << elementary.MANTISSA_BITS)) * z


@rounded
def box_muller(wa, wb):
    """Two normals of two words, the cosine first."""
    radius = float32(math.sqrt(MINUS_TWO * log_uniform(wa)))
    cosine, sine = cos_sin_turn(wb)
    return radius * cosine, radius * sine


@cuda.jit(device=True)
def draw(block, row, step, tag, k0, k1):
    """The four normals of one block of a row: value j belongs to column block + j Q, Q being the blocks of a row."""
    c0, c1, c2 = np.uint64(block), step, row | tag
    c3 = c2 >> cpu_noise.SHIFT
    for _ in range(PHILOX_ROUNDS):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        k0, k1 = k0 + W0, k1 + W1  # 64-bit lanes: what goes over the low half is dropped
    z0, z1 = box_muller(np.uint32(c0), np.uint32(c1))
    z2, z3 = box_muller(np.uint32(c2), np.uint32(c3))
    return z0, z1, z2, z3


@cuda.jit
def forward_noise_kernel(x0, t, signal, noise, out, eps, first_row, tag, k0, k1):
    """out = signal[t] x0 + noise[t] eps, for arrays (n, width)."""
    n, width = x0.shape
    blocks = (width + 3) // 4
    for i in range(cuda.grid(1), n * blocks, cuda.gridsize(1)):
        row, block = i // blocks, i % blocks
        z = draw(block, first_row + np.uint64(row), np.uint64(0), tag, k0, k1)
        a, b = signal[t[row]], noise[t[row]]
        for j in range(4):
            column = block + j * blocks
            if column < width:
                out[row, column] = noised(a, x0[row, column], b, z[j])
                eps[row, column] = z[j]


@cuda.jit
def step_kernel(x, out, v, m1, m2, m3, coefficients, low, high, keep, first_row, step, tag, k0, k1):
    """One row of a sampler's table, in place; `coefficients` is (p, q, a, b, c1, c2, c3, e, s, r).

    The first `keep` of m1, m2 and m3 take this row's m, and each other's.
    """
    p, q, a, b, c1, c2, c3, e, s, r = coefficients
    n, width = x.shape
    blocks = (width + 3) // 4
    for i in range(cuda.grid(1), n * blocks, cuda.gridsize(1)):
        row, block = i // blocks, i % blocks
        z = ZERO, ZERO, ZERO, ZERO  # a tuple stays in registers, where an array would lie in local memory
        if s != ZERO:
            z = draw(block, first_row + np.uint64(row), step, tag, k0, k1)
        for j in range(4):
            column = block + j * blocks
            if column < width:
                zj = z[j]
                output = out[row, column] if q != ZERO or e != ZERO else ZERO
                before = (
                    m1[row, column] if c1 != ZERO or keep > 1 else ZERO,
                    m2[row, column] if c2 != ZERO or keep > 2 else ZERO,
                    m3[row, column] if c3 != ZERO else ZERO,
                )
                if s != ZERO and r != ZERO:
                    zj = scaled(zj, v[row, column], r)
                m = remembered(x[row, column], output, p, q, low, high)
                x[row, column] = advanced(x[row, column], m, *before, output, zj, a, b, c1, c2, c3, e, s)
                if keep > 2:
                    m3[row, column] = before[1]
                if keep > 1:
                    m2[row, column] = before[0]
                if keep > 0:
                    m1[row, column] = m


@cuda.jit
def map_kernel(out, x, matrix, source, terms, scaled, shifted):
    """out = source scale + x matrix + offset; `terms` is (scale, offset). A thread makes MAP_ROWS rows of a column."""
    tile = cuda.shared.array((MAP_ROWS, MAP_DEPTH), float32)
    sums = cuda.local.array(MAP_ROWS, float32)
    (m, n), k = x.shape, out.shape[1]
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    tiles, across = (m + MAP_ROWS - 1) // MAP_ROWS, (k + threads - 1) // threads
    for item in range(cuda.blockIdx.x, tiles * across, cuda.gridDim.x):
        begin, column = item // across * MAP_ROWS, item % across * threads + thread
        for r in range(MAP_ROWS):
            sums[r] = ZERO
        for first in range(0, n, MAP_DEPTH):
            cuda.syncthreads()
            for i in range(thread, MAP_ROWS * MAP_DEPTH, threads):
                row, j = begin + i // MAP_DEPTH, first + i % MAP_DEPTH
                tile[i // MAP_DEPTH, i % MAP_DEPTH] = x[row, j] if row < m and j < n else ZERO
            cuda.syncthreads()
            if column < k:
                for j in range(min(MAP_DEPTH, n - first)):
                    weight = matrix[first + j, column]
                    for r in range(MAP_ROWS):
                        sums[r] += tile[r, j] * weight
        if column < k:
            for r in range(MAP_ROWS):
                if begin + r < m:
                    value = sums[r]
                    if scaled:
                        value += source[begin + r, column] * terms[0, column]
                    if shifted:
                        value += terms[1, column]
                    out[begin + r, column] = value


def forward_noise(
    x0: Any,
    t: Any,
    signal: Any,
    noise: Any,
    out: Any,
    eps: Any,
    draw: Any,
    *,
    queue: Any = 0,
    threads: int = THREADS,
) -> None:
    """Fill `eps` (n, D) with noise and `out` with signal[t] x0 + noise[t] eps.

    Parameters
    ----------
    x0, out, eps : (n, D) float32 device arrays
        Anything with ``__cuda_array_interface__``, on the device that x0 is on; NumPy arrays under the simulator.
    t : (n,) int64 device array
    signal, noise : (T,) float32 device arrays
    draw : Draw
        Which noise.
    queue : int or stream, optional
        The CUDA stream, as an address or one of Numba's.
    threads : int, optional
        Threads of a block.
    """
    arguments = (x0, t, signal, noise, out, eps, np.uint64(draw.first_row))
    _launch(forward_noise_kernel, queue, threads, *arguments, _tag(draw.stream), *_key(draw.seed))


def sampler_step(
    x: Any,
    out: Any,
    memory: tuple[Any, ...],
    row: Any,
    clip: tuple[float, float] | None,
    draw: Any,
    *,
    queue: Any = 0,
    threads: int = THREADS,
) -> None:
    """Change `x` (n, D) by one row of a table, and the memory of the rows before, if the row evaluates.

    Parameters
    ----------
    x : (n, D) float32 device array
    out : like x, or None
        The denoiser's output; (2, n, D) with v where r is not 0.
    memory : tuple of arrays like x
        m of the rows before.
    row : Row
        Of the sampler's table.
    clip : (low, high) or None
    draw : Draw
        Which noise.
    queue, threads
        As for `forward_noise`.
    """
    keep = len(memory) if row.evaluates else 0
    low, high = (np.float32(v) for v in clip or (-np.inf, np.inf))
    with np.errstate(over="ignore"):
        coefficients = tuple(np.array(row[1:11], np.float32))
    # What is not needed is not touched: any array will do.
    outs = (x, x) if out is None else (out, x) if out.ndim == 2 else (out[0], out[1])
    m1, m2, m3 = (*memory, x, x, x)[:3]
    arguments = (x, *outs, m1, m2, m3, coefficients, low, high, keep)
    counter = (np.uint64(draw.first_row), np.uint64(draw.step), _tag(draw.stream))
    _launch(step_kernel, queue, threads, *arguments, *counter, *_key(draw.seed))


def map_rows(
    x: Any,
    out: Any,
    left: Any,
    right: Any,
    scale: bool,
    offset: bool,
    terms: Any,
    inner: Any,
    *,
    queue: Any = 0,
    threads: int = THREADS,
) -> None:
    """Fill `out` (m, k) with x scale + (x left) right + offset.

    Parameters
    ----------
    x, out : (m, n) and (m, k) float32 device arrays
    left, right : (n, r) and (r, k) float32 device arrays
        Where `right` is None, `left` is (n, k) and x left is the product itself.
    scale, offset : bool
        Whether they are there; a scale needs k = n.
    terms : (2, k) float32 device array
        Scale and offset.
    inner : (m, r) float32 device array, or None
        Room for x left.
    queue, threads
        As for `forward_noise`.
    """
    first, matrix = x, left
    if right is not None:
        _launch(map_kernel, queue, threads, inner, x, left, x, terms, False, False)
        first, matrix = inner, right
    _launch(map_kernel, queue, threads, out, first, matrix, x, terms, scale, offset)


def _tag(stream: int) -> Any:
    return np.uint64(int(stream) << 56)


def _key(seed: int) -> tuple[Any, Any]:
    return np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)


def _launch(kernel: Any, queue: Any, threads: int, *arguments: Any) -> None:
    """Launch a kernel whose threads take noise blocks of its first argument, (n, width)."""
    n, width = arguments[0].shape
    _start(kernel, -(-n * -(-width // 4) // threads), queue, threads, arguments)


def _launch_map(queue: Any, threads: int, *arguments: Any) -> None:
    """Launch `map_kernel`, whose blocks take tiles of its last argument, (m, k)."""
    m, k = arguments[-1].shape
    _start(map_kernel, -(-m // MAP_ROWS) * -(-k // threads), queue, threads, arguments)


def _start(kernel: Any, blocks: int, queue: Any, threads: int, arguments: tuple[Any, ...]) -> None:
    """Launch a kernel that goes round in its grid, on the device of its first argument."""
    if blocks == 0:
        return
    with _device(arguments[0]):
        if config.ENABLE_CUDASIM:
            queue, grid = 0, -(-blocks // 2)  # each goes round twice
            # The simulator copies NumPy arrays in and out: one given twice would lose what was written to it.
            arguments = tuple(FakeCUDAArray(a) if isinstance(a, np.ndarray) else a for a in arguments)
        else:
            queue = cuda.external_stream(queue) if isinstance(queue, int) and queue else queue
            grid = min(blocks, BLOCKS_PER_MULTIPROCESSOR * cuda.get_current_device().MULTIPROCESSOR_COUNT)
            # Numba would wait for the stream that each array names, but the launch is on that stream already.
            arguments = tuple(
                cuda.as_cuda_array(a, sync=False) if hasattr(a, "__cuda_array_interface__") else a for a in arguments
            )
        kernel[grid, threads, queue](*arguments)


def _device(array: Any) -> Any:
    """A context in which the array's device is Numba's current one; it stays as it is where the array tells none."""
    number = getattr(getattr(array, "device", None), "id", None)
    return nullcontext() if number is None else cuda.gpus[number]
