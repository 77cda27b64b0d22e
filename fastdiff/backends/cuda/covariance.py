"""The covariance operations of the CUDA backend: similarity, maps of rows and posterior means, by ``covariance.cu``.

How a map runs is a fixed rule of its sizes: `map_tile`. Its sums have one order whatever the rule says, so a row's bits
depend neither on its batch nor on the device, and `mapped_normal` has those of `map_rows` of the stored normals.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fastdiff.backends.cuda.step import StepOperations
from fastdiff.backends.protocol import RowMap
from fastdiff.forks import cached_property
from fastdiff.kernels.cuda.runtime import Runtime
from fastdiff.noise import Draw, round_keys

Array = Any

THREADS = 256  # of a block, as in covariance.cu
STRIP, SPAN = 32, 1024  # rows and columns of a similarity that a block fills
VECTOR = 16  # bytes
# Maps of rows: a block makes `rows` times `PRODUCTS / rows` values. The floats of its row tile and of x left together
# with its result are at most 96 KB: what a block may have on every device.
PRODUCTS = 8192
TILE_VALUES, INNER_VALUES = 9216, 6144
VALUE = 4  # bytes
# Posterior means: rows of a block, or few where more would leave multiprocessors idle.
ROWS, FEW_ROWS = 64, 16
DATA_TILE, DEPTH_PITCH, WEIGHT_PITCH = 128, 68, 132


class MapTile(NamedTuple):
    """How `map_rows` runs a map.

    Attributes
    ----------
    rows : int
        Rows of a block: as many as leave it no more columns than there are.
    chunk : int
        Columns of x that are staged at once.
    fused : bool
        Whether x left stays in shared memory; else it is a launch and an array of its own.
    shared : int
        Bytes of shared memory.
    """

    rows: int
    chunk: int
    fused: bool
    shared: int


def _round4(n: int) -> int:
    return -(-n // 4) * 4


def _pitch(n: int) -> int:
    return (n + 3) // 8 * 8 + 4  # cov_pitch in covariance.cu


def map_tile(inputs: int, outputs: int, rank: int = 0) -> MapTile:
    """Return how a map of rows of `inputs` values to rows of `outputs` runs, through `rank` values if not 0."""
    columns = _round4(outputs)
    rows = next((rows for rows in (256, 128, 64) if columns <= PRODUCTS // rows), 32)
    most = (TILE_VALUES // rows - 4) // 8 * 8 + 4  # its pitch is itself
    chunk, inner = min(_round4(inputs), most), rows * _pitch(_round4(rank))
    fused = rank > 0 and inner <= INNER_VALUES
    values = rows * (_pitch(chunk) + _pitch(min(PRODUCTS // rows, columns))) + (inner if fused else 0)
    return MapTile(rows, chunk, fused, VALUE * values)


def packed(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the array as the kernels take it: every axis padded with zeros to fours, place 4 q + j holding q + j Q."""
    with np.errstate(over="ignore"):
        padded = np.pad(array.astype(np.float32), [(0, -n % 4) for n in array.shape])
    return padded[np.ix_(*(np.arange(n).reshape(4, -1).T.ravel() for n in padded.shape))]


class _DeviceMap:
    """A plan on the device, in the form that the kernels take."""

    def __init__(self, plan: RowMap, runtime: Runtime) -> None:
        product = (None, None) if plan.right is not None and len(plan.right) == 0 else (plan.left, plan.right)
        arrays = (plan.scale, *product, plan.offset)
        self.scale, self.left, self.right, self.offset = (
            None if array is None else runtime.asarray(packed(array)) for array in arrays
        )


class _TwinMap:
    """A plan on the device, in the form that the Numba twin takes: its arguments between `out` and `inner`."""

    def __init__(self, plan: RowMap, runtime: Runtime) -> None:
        terms = np.zeros((2, plan.shape[1]))
        for row, values in zip(terms, (plan.scale, plan.offset), strict=True):
            if values is not None:
                row[...] = values
        right = None if plan.right is None else runtime.asarray(plan.right, np.float32)
        self.arguments = (
            runtime.asarray(plan.left, np.float32), right, plan.scale is not None, plan.offset is not None,
            runtime.asarray(terms, np.float32),
        )  # fmt: skip


_Form = TypeVar("_Form", _DeviceMap, _TwinMap)


class CovarianceOperations(StepOperations):
    """Similarity, maps of rows, and averages over data."""

    @cached_property
    def _maps(self) -> weakref.WeakKeyDictionary[RowMap, dict[tuple[int, type], Any]]:
        return weakref.WeakKeyDictionary()

    def _placed(self, plan: RowMap, form: type[_Form]) -> _Form:
        """The plan on the device in a form: made once for each queue, since what one uploads, another may not have."""
        key = (self.runtime.queue(), form)
        with self._lock:
            kept = self._maps.setdefault(plan, {})
            if key not in kept:
                kept[key] = form(plan, self.runtime)
            return kept[key]

    def _launch_blocks(self, entry: str, blocks: int, args: tuple[Any, ...], shared_bytes: int = 0) -> None:
        """Launch a kernel whose blocks take one of so many pieces of work after another."""
        grid, block = self.runtime.grid_1d(blocks * THREADS, THREADS)
        self.runtime.launch("covariance", entry, grid, block, args, shared_bytes)

    def similarity(self, v: Array, out: Array) -> None:
        batch, n = v.shape
        vectors = self.runtime.address(out) % VECTOR == 0 and (n <= SPAN or n % 4 == 0)
        if out.size:
            blocks = -(-batch * n // STRIP) * -(-n // SPAN)
            self._launch_blocks("similarity", blocks, (v, out, batch * n, n, vectors))

    def map_rows(self, x: Array, out: Array, plan: RowMap) -> None:
        if out.size == 0:
            return
        if self._twins is None or plan.left is None:
            self._map(x, out, plan, (0, 0, 0, round_keys(0)))
            return
        inner = None if plan.right is None else self.runtime.empty((len(x), len(plan.right)))
        self._twins.map_rows(x, out, *self._placed(plan, _TwinMap).arguments, inner, queue=self.runtime.queue())
        if plan.standardise:
            self._standardise(out)

    def mapped_normal(self, out: Array, plan: RowMap, draw: Draw) -> None:
        if out.size:
            self._map(None, out, plan, (draw.first_row, draw.step, int(draw.stream), round_keys(draw.seed)))

    def _map(self, x: Array | None, out: Array, plan: RowMap, where: tuple[Any, ...]) -> None:
        """Map the rows of x, or, where it is None, normals: `where` is first row, step, stream and keys."""
        (n, k), rows = plan.shape, len(out)
        matrices, rank = self._placed(plan, _DeviceMap), 0 if plan.right is None else len(plan.right)
        tile, source, left, right = map_tile(n, k, rank), x, matrices.left, matrices.right
        if rank and not tile.fused:
            source = self.runtime.empty((rows, rank))
            first = map_tile(n, rank)
            sizes = (rows, n, 0, rank, first.rows, first.chunk, False)
            self._launch_map(first, (x, x, source, None, left, None, None, *sizes, *where))
            tile, left, right, n, rank = map_tile(rank, k), right, None, rank, 0
        whole = rank > 0 or _round4(k) <= PRODUCTS // tile.rows  # a block makes whole rows
        sizes = (rows, n, rank, k, tile.rows, tile.chunk, plan.standardise and whole)
        self._launch_map(tile, (source, x, out, matrices.scale, left, right, matrices.offset, *sizes, *where))
        if plan.standardise and not whole:
            self._standardise(out)

    def _launch_map(self, tile: MapTile, args: tuple[Any, ...]) -> None:
        rows, rank, k = args[7], args[9], args[10]
        groups = 1 if rank else -(-_round4(k) * tile.rows // PRODUCTS)
        self._launch_blocks("map_rows", -(-rows // tile.rows) * groups, args, tile.shared)

    def _standardise(self, out: Array) -> None:
        warps = THREADS // 32
        self._launch_blocks("standardise_rows", -(-len(out) // warps), (out, *out.shape))

    def posterior_mean(
        self,
        x: Array,
        data: Array,
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
        out: Array,
        log_sum: Array,
    ) -> None:
        m, d = x.shape
        if m == 0:
            return
        with np.errstate(divide="ignore", over="ignore"):
            levels = np.array([signal, 0.5 / np.square(noise)])
            if (levels == levels[:, :1]).all():  # as in a step of a sampler
                levels = levels[:, :1]
            levels = levels.astype(np.float32)
        rows = ROWS if -(-m // ROWS) >= self.runtime.multiprocessors else FEW_ROWS  # changes no bits
        shared = VALUE * ((rows + DATA_TILE) * DEPTH_PITCH + rows * (WEIGHT_PITCH + 3))
        sizes = (m, len(data), d, levels.shape[1], rows)
        args = (x, data, self.runtime.asarray(levels), out, log_sum, *sizes)
        self._launch_blocks("posterior_mean", -(-m // rows), args, shared)

    def blend(self, out: Array, state: Array, parts: Array, residuals: Array, constant: float) -> None:
        m, d = out.shape
        if m:
            args = (out, state, parts, residuals, m, d, residuals.shape[1], constant)
            self._launch_blocks("blend", -(-m * 32 // THREADS), args)
