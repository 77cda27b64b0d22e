"""Convolutions of bf16 values in the tiles of a CPU's matrix unit: how a layer is laid out (`kernels.cpu.amx`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastdiff.backends.cpu.phases import Phase, Sides
from fastdiff.backends.cpu.workers import PIECES, Array, Job, Phases, Scripted, aligned
from fastdiff.backends.layers import Conv, ConvShapes
from fastdiff.kernels.cpu import amx, conv

GROUP_BYTES, MOST_GROUPS, GROUP_CELLS = 1 << 20, 8, 512  # of a weight gradient: all its sums; groups; cells of one
CELLS, LEAST_CELLS = 512, 64  # of an item: at most, and where there would be too few items
# Floating-point operations that last as long as what is done to a value in passing, and as four products of tiles.
LIGHT_WORK, PRODUCTS = 30, 4 * amx.SIDE * amx.SIDE * amx.DEEP // 8


class _Axis(NamedTuple):
    """Cells along an axis: of the input, with those of zeros; how many taps reach before it and beyond; the stride."""

    cells: int
    before: int
    beyond: int
    stride: int

    @classmethod
    def of(cls, along: list[Phase], size: int, outputs: int) -> _Axis:
        stride = along[0].stride
        inside, most = -(-size // stride), max(phase.count(outputs) for phase in along)
        reach = [
            (phase.offset + i) // stride + end
            for phase in along
            for i, taps in enumerate(phase.taps)
            if taps
            for end in (0, phase.count(outputs) - 1)
        ] or [0]
        before, beyond = max(0, -min(reach)), max(0, max(reach) - inside + 1)
        return cls(max(inside + max(before, beyond), most), before, beyond, stride)

    def part(self, first: int, size: int) -> tuple[int, int, int]:
        """Which positions a grid has: the first one, the stride, how many."""
        return first, self.stride, -(-(size - first) // self.stride)


class _Layer:
    """How one convolution, or its input gradient (a convolution of dy, `adjoint`), lies in cells and tiles.

    Parameters
    ----------
    geometry : Conv
    shape : (int, int, int, int)
        Of x.
    k : int
        Output channels.
    adjoint : bool
    """

    def __init__(self, geometry: Conv, shape: tuple[int, int, int, int], k: int, adjoint: bool) -> None:
        (in_height, in_width, c), (height, width, k), down, across = Sides.of(geometry, shape, k, adjoint)
        images, kernel_columns = shape[0], geometry.kernel[1]
        rows, columns = _Axis.of(down, in_height, height), _Axis.of(across, in_width, width)
        wide = -(-c // amx.DEEP) * amx.DEEP
        head = -(-(rows.before * columns.cells + columns.before) // amx.DEEP) * amx.DEEP
        of_image = rows.cells * columns.cells
        self.edge = head + rows.beyond * columns.cells + columns.beyond + amx.BLOCK
        total = self.edge + images * of_image
        pairs: list[tuple[int, ...]] = []
        taps: list[tuple[int, int]] = []
        sources: list[list[int]] = []
        for r in down:
            for s in across:
                first = len(taps)
                for i, of_rows in enumerate(r.taps):
                    for j, of_columns in enumerate(s.taps):
                        if of_rows and of_columns:
                            y, x = r.offset + i, s.offset + j
                            grid = y % rows.stride * columns.stride + x % columns.stride
                            place = y // rows.stride * columns.cells + x // columns.stride
                            taps.append((grid * total + head + place, len(sources)))
                            sources.append([a * kernel_columns + b for a in of_rows for b in of_columns])
                there = (r.first, r.step, r.count(height), s.first, s.step, s.count(width))
                pairs.append((*there, first, len(taps)))
        self.pairs = np.array(pairs, np.int64).reshape(-1, 8)
        self.taps, self.blocks = np.array(taps, np.int64).reshape(-1, 2), len(sources)
        self.firsts = np.cumsum([0, *map(len, sources)]).astype(np.int64)
        self.sources = np.array([source for block in sources for source in block], np.int64)
        self.collected = np.array([(b, s) for b, block in enumerate(sources) for s in block], np.int64).reshape(-1, 2)
        self.grids, self.wide, self.total, self.adjoint = rows.stride * columns.stride, wide, total, adjoint
        self.images, self.channels, self.cells = images, (c, k), images * of_image
        self.shape, self.rows = np.array([height, width, k], np.int64), images * rows.cells
        self.columns = -(-k // amx.SIDE)
        self.tiles = self.columns * self.blocks * (wide // amx.DEEP) * amx.TILE // 2
        groups = max(1, min(images, MOST_GROUPS, GROUP_BYTES // max(4 * self.blocks * c * k, 1)))
        together = max(1, -(-images // groups), -(-GROUP_CELLS // max(of_image, 1)))
        pitch = -(-together * of_image // amx.CHUNK) * amx.CHUNK
        self.groups = -(-images // together)
        self.group_cells = self.groups * pitch
        self.layout = np.array([images, rows.cells, columns.cells, together, pitch], np.int64)
        self.sub_grids = np.array(
            [
                (*rows.part(y, in_height), *columns.part(x, in_width))
                for y in range(rows.stride)
                for x in range(columns.stride)
            ], np.int64,
        )  # fmt: skip
        # Of the weights' gradient: the first pair that a tap sees, of the copy for even or for odd cells.
        at, column_pairs = self.taps[:, 0] % total, -(-(self.edge + self.group_cells + 2) // 2)
        self.copies = 1 + int((at % 2).any())
        rows_of_pairs = (self.taps[:, 0] // total * self.copies + at % 2) * -(-c // amx.SIDE)
        self.seen = np.stack([rows_of_pairs * column_pairs + at // 2, self.taps[:, 1]], axis=1)
        self.pair_sizes = np.array([in_height, in_width, c, head, self.copies, column_pairs], np.int64)
        self.grid = np.array(
            [
                images, in_height, in_width, c, wide, rows.cells, columns.cells, rows.stride, columns.stride, head,
                total,
            ], np.int64,
        )  # fmt: skip
        # Of the products of two tiles each of cells and channels, for a cell, and for a group's cells.
        self.work = float(PRODUCTS * len(taps) * (wide // amx.DEEP) * -(-k // amx.BLOCK)) / amx.BLOCK


_layer = lru_cache(maxsize=1024)(_Layer)


class TiledWeights:
    """Weights of convolutions in tiles, in memory of its own: see `Prepared`."""

    def __init__(self, be: Scripted, convs: Sequence[ConvShapes], backward: bool) -> None:
        adjoints = (False, True)[: 1 + backward]
        self._be = be
        self._layers = [[_layer(geometry, x, out[3], adjoint) for adjoint in adjoints] for geometry, x, out in convs]
        self._forms = [[aligned(layer.tiles).view(np.uint32) for layer in layers] for layers in self._layers]

    def run(self, weights: Sequence[Array]) -> list[list[Array]]:
        be, jobs = self._be, []
        for layers, forms, w in zip(self._layers, self._forms, weights, strict=True):
            jobs += [_tiling(be, layer, w.reshape(-1), tiles) for layer, tiles in zip(layers, forms, strict=True)]
        with be._workers.lock:
            be._do(jobs)
        return [[forms[0], forms[-1]] for forms in self._forms]


def _tiling(be: Scripted, layer: _Layer, w: Array, tiles: Array) -> Job:
    """What puts weights into tiles."""
    c, k = layer.channels
    arguments = layer.firsts, layer.sources, w, tiles, c, k, layer.adjoint, be._each("block", amx.TILE)
    return amx.weights_tiles_range, arguments, layer.columns, float(LIGHT_WORK * len(layer.sources) * c * amx.SIDE)


def convolve(
    be: Scripted,
    geometry: Conv,
    shape: tuple[int, ...],
    k: int,
    adjoint: bool,
    arrays: tuple[Array, Array, Array],
    begin: tuple[Any, ...],
) -> Phases:
    """The phases of a convolution, or of an input gradient: of flat x, w and y; `begin` as of `amx.Begin`.

    w may be in tiles, as of `TiledWeights`.
    """
    layer, (x, w, y) = _layer(geometry, shape, k, adjoint), arrays
    if not layer.images:
        return []
    k = layer.channels[1]
    cells = be._scratch("cells", layer.grids * layer.total * layer.wide // 2).view(np.uint16)
    of_row = float(LIGHT_WORK * layer.grids * layer.wide * layer.cells / layer.rows)
    before: list[Job] = [(amx.grid_range, (layer.grid, x, cells), layer.rows + 1, of_row)]
    if w.dtype != np.uint32:
        tiles = be._scratch("tiles", layer.tiles).view(np.uint32)
        before.append(_tiling(be, layer, w, tiles))
        w = tiles
    per, share = _cut(be.threads, layer.cells * len(layer.pairs), layer.columns)
    items = len(layer.pairs) * -(-layer.cells // per) * -(-layer.columns // share)
    arguments = (
        per, share, amx.Layer(layer.grid, layer.pairs, layer.taps, layer.blocks, layer.shape), cells, w, y,
        amx.Begin(*begin),
        be._each("sums", amx.BLOCK * amx.BLOCK), be._each("base", amx.BLOCK),
    )  # fmt: skip
    work = (layer.work + LIGHT_WORK * k * len(layer.pairs)) * layer.cells / items
    return [before, [(amx.conv_range, arguments, items, work)]]


def _cut(threads: int, cells: int, columns: int) -> tuple[int, int]:
    """Cells and columns of tiles of an item, so that all threads have some. The bits do not depend on it."""
    wanted = PIECES * threads
    per = max(LEAST_CELLS, min(CELLS, -(-cells // wanted)))
    per = -(-per // amx.BLOCK) * amx.BLOCK
    shares = max(1, min(-(-columns // 2), -(-wanted // -(-cells // per))))
    return per, -(-columns // (2 * shares)) * 2


def weights(be: Scripted, geometry: Conv, shape: tuple[int, ...], k: int, arrays: tuple[Array, Array, Array]) -> Phases:
    """The phases of the weights' gradient, the last of the flat arrays: of x and dy."""
    layer, (x, dy, dw) = _layer(geometry, shape, k, False), arrays
    if not layer.images:
        return [[(conv.clear, (dw,), dw.size, 1.0)]]
    c, phases, chunks = layer.channels[0], len(layer.pairs), layer.group_cells // amx.CHUNK
    columns, parts, half = -(-c // amx.SIDE), -(-k // amx.BLOCK), int(layer.pair_sizes[-1])
    # A multiple of 64 bytes, and an odd one: lines that are a power of two apart would meet in the cache.
    distance = layer.group_cells + amx.DEEP * (layer.group_cells // amx.DEEP % 2 == 0)
    lines = be._scratch("lines", phases * parts * amx.SIDE * distance).view(np.uint16)
    pairs = be._scratch("pairs", layer.grids * layer.copies * columns * half * amx.SIDE)
    whole = layer.groups == 1 and [*map(tuple, layer.collected)] == [(i, i) for i in range(dw.size // (c * k))]
    sums = dw if whole else be._scratch("sums", layer.groups * layer.blocks * c * k)
    turned = (
        layer.layout, layer.shape, layer.pairs, dy, lines, distance, be._each("places", 2 * amx.SIDE, dtype=np.int64),
    )  # fmt: skip
    items = layer.groups * parts * -(-columns // 2)
    arguments = (
        layer.layout, layer.pairs, layer.seen, layer.blocks, np.array([c, k, distance, half]), lines, pairs, sums,
        be._each("held", layer.blocks * 4 * amx.SIDE * amx.SIDE),
    )  # fmt: skip
    found: Phases = [
        [
            (amx.turned_range, turned, chunks, float(LIGHT_WORK * phases * k * amx.CHUNK)),
            (amx.pairs_range, (layer.layout, layer.pair_sizes, layer.sub_grids, x, pairs), half, 2.0 * LIGHT_WORK * c),
        ],
        [(amx.weights_range, arguments, items, layer.work * layer.group_cells / items)],
    ]
    if not whole:
        collect = layer.collected, sums, layer.groups, dw, c * k
        found.append([(conv.collect_weights, collect, dw.size // (c * k), float(LIGHT_WORK * c * k * layer.groups))])
    return found
