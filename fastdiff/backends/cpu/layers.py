"""The layers of image networks on the CPU: the Numba kernels behind `LayerBackend`.

A sample's bits depend neither on the batch nor on the threads: its own sums have a fixed order, and sums over the
batch (gradients of parameters) run over groups that the layer's sizes and the batch decide, added in their order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastdiff.backends.cpu.conv import LIGHT_WORK, NOTHING, ConvOperations
from fastdiff.backends.cpu.step import law_of
from fastdiff.backends.cpu.workers import PIECES, Array, Each, Job
from fastdiff.backends.layers import Affine, Norm
from fastdiff.kernels.cpu import attention as attention_kernels
from fastdiff.kernels.cpu import conv as conv_kernels
from fastdiff.kernels.cpu import layer_norm as layer_norm_kernels
from fastdiff.kernels.cpu import norm as norm_kernels
from fastdiff.kernels.cpu import pointwise as pointwise_kernels
from fastdiff.kernels.cpu.noise import CHUNK, Law
from fastdiff.noise import Draw

SILU_WORK = 120  # floating-point operations of a convolution that last as long, for each value
# Rows of LayerNorm whose gradients of parameters are summed apart; so many that they have about CHUNK_VALUES values.
LEAST_ROWS, MOST_ROWS, CHUNK_VALUES = 16, 128, 1 << 14


class LayerOperations(ConvOperations):
    """`LayerBackend` for `CpuBackend`, on its workers."""

    def norm(self, layer: Norm, out: Array, *, eps: float, parts: tuple[Array, Array] | None = None) -> None:
        x, (gamma, beta, modulation), stats, silu = layer
        if parts is not None:
            self.concatenate(*parts, x)
        k, images, pixels, channels = norm_kernels, len(x), x.shape[1] * x.shape[2], len(gamma)
        given, runs = NOTHING if modulation is None else modulation.reshape(-1), k.runs_of(pixels, channels)
        flat = x.reshape(-1), k.Norm(gamma, beta, given, stats.reshape(-1), stats.shape[1], silu)
        with self._workers.lock:
            rows, totals = self._rows(channels)
            sums = self._scratch("sums of runs", 4 * images * runs * stats.shape[1]).view(np.float64)
            output, moments = (out.reshape(-1), pixels, np.array([eps]), sums, rows), (pixels, sums, rows, totals)
            work = _work(silu, pixels * channels)
            if runs == 1 or self.threads == 1 or images >= PIECES * self.threads:
                self._do([(k.norm_range, (*flat, *output, totals), images, work)])
            else:  # the bits do not depend on it
                self._do(
                    [(k.norm_moments_range, (*flat, *moments), images * runs, _work(False, pixels * channels) / runs)],
                    [(k.norm_output_range, (*flat, *output), images * runs, work / runs)],
                )

    def norm_backward(
        self,
        layer: Norm,
        dy: Array,
        dx: Array,
        grads: Affine,
        *,
        add: bool = False,
        parts: tuple[Array, Array] | None = None,
    ) -> None:
        x, (gamma, beta, modulation), stats, silu = layer
        images, pixels, channels = len(x), x.shape[1] * x.shape[2], len(gamma)
        given, wanted = (NOTHING if a is None else a.reshape(-1) for a in (modulation, grads.modulation))
        norm = norm_kernels.Norm(gamma, beta, given, stats.reshape(-1), stats.shape[1], silu)
        with self._workers.lock:
            sums = self._scratch("shifts", 2 * images * channels)
            rows, totals = self._rows(channels)
            dv = self._each("image", pixels * channels)
            arguments = (dy.reshape(-1), x.reshape(-1), norm, dx.reshape(-1), sums, pixels, add, rows, totals, dv)
            self._do(
                [(norm_kernels.norm_backward_range, arguments, images, 2 * _work(silu, pixels * channels))],
                [(norm_kernels.collect_norm, (sums, gamma, beta, given, *grads[:2], wanted), channels,
                  float(4 * images))],
            )  # fmt: skip
        if parts is not None:
            self.split(dx, *parts)

    def norm_tangent(self, layer: Norm, dh: Array, out: Array, *, modulation_tangent: Array | None = None) -> None:
        x, (gamma, beta, modulation), stats, silu = layer
        images, pixels, channels = len(x), x.shape[1] * x.shape[2], len(gamma)
        groups = 1 if stats is None else stats.shape[1]
        given, tangent, of_groups = (
            NOTHING if a is None else a.reshape(-1) for a in (modulation, modulation_tangent, stats)
        )
        norm = norm_kernels.Norm(gamma, beta, given, of_groups, groups, silu)
        with self._workers.lock:
            arguments = (dh.reshape(-1), x.reshape(-1), norm, tangent, out.reshape(-1), pixels, self._rows(channels)[0])
            self._do([(norm_kernels.norm_tangent_range, arguments, images, _work(silu, pixels * channels))])

    def layer_norm(self, layer: Norm, out: Array, *, eps: float) -> None:
        x, (gamma, beta, _), stats, _ = layer
        channels = len(gamma)
        flat = x.reshape(-1), gamma, beta, out.reshape(-1), stats.reshape(-1)
        with self._workers.lock:
            arguments = (*flat, np.array([eps], np.float32), self._each("rows", channels))
            self._do([(layer_norm_kernels.layer_norm_range, arguments, stats.size // 2, _work(False, channels))])

    def layer_norm_backward(self, layer: Norm, dy: Array, dx: Array, grads: Affine, *, add: bool = False) -> None:
        x, (gamma, *_), stats, _ = layer
        channels, k = len(gamma), layer_norm_kernels
        rows = min(MOST_ROWS, max(LEAST_ROWS, CHUNK_VALUES // channels))
        chunks = -(-(stats.size // 2) // rows)
        flat = dy.reshape(-1), x.reshape(-1), gamma, stats.reshape(-1), dx.reshape(-1)
        with self._workers.lock:
            sums = self._scratch("shifts", 2 * chunks * channels)
            plain, by_h = sums[: chunks * channels], sums[chunks * channels :]
            arguments = (rows, *flat, plain, by_h, add, self._each("rows", k.ROWS * channels, (k.ROWS, channels)))
            self._do(
                [(k.layer_norm_backward_range, arguments, chunks, 2 * _work(False, rows * channels))],
                [
                    (conv_kernels.row_sums, (part, channels, to), channels, float(LIGHT_WORK * chunks))
                    for part, to in ((by_h, grads.gamma), (plain, grads.beta))
                ],
            )

    def _rows(self, channels: int) -> tuple[Each, Each]:
        """Scratch of the norm kernels: rows of values and sums in float64."""
        lanes, length = norm_kernels.LANES, norm_kernels.ROW + channels
        return (
            self._each("rows", lanes * length, (lanes, length)),
            self._each("totals", 4 * channels, (2, channels), np.float64),
        )

    def attention(self, qkv: Array, out: Array, log_sums: Array, *, heads: int) -> None:
        (images, length, channels), k = out.shape, attention_kernels
        work = float(k.TILE * length * (4 * channels // heads + SILU_WORK))
        with self._workers.lock:
            arguments = (
                qkv.reshape(-1), out.reshape(-1), log_sums.reshape(-1), length, channels, heads,
                self._each("scores", length * k.TILE), self._each("turned", channels * k.TILE),
                self._each("lanes", 2 * k.TILE, (2, k.TILE)),
            )  # fmt: skip
            self._do([(k.attention_range, arguments, images * heads * -(-length // k.TILE), work)])

    def attention_backward(
        self, dy: Array, qkv: Array, out: Array, log_sums: Array, dqkv: Array, *, heads: int
    ) -> None:
        (images, length, channels), k = out.shape, attention_kernels
        work = float(length * length * (10 * channels // heads + SILU_WORK))
        with self._workers.lock:
            arguments = (
                dy.reshape(-1), qkv.reshape(-1), out.reshape(-1), log_sums.reshape(-1), dqkv.reshape(-1),
                length, channels, heads, self._attention_room(length, channels),
            )  # fmt: skip
            self._do([(k.attention_backward_range, arguments, images * heads, work)])

    def attention_tangent(
        self, dqkv: Array, qkv: Array, out: Array, log_sums: Array, dout: Array, *, heads: int
    ) -> None:
        (images, length, channels), k = out.shape, attention_kernels
        work = float(k.TILE * length * (10 * channels // heads + SILU_WORK))
        with self._workers.lock:
            arguments = (
                dqkv.reshape(-1), qkv.reshape(-1), out.reshape(-1), log_sums.reshape(-1), dout.reshape(-1), length,
                channels, heads, self._attention_room(length, channels),
            )  # fmt: skip
            self._do([(k.attention_tangent_range, arguments, images * heads * -(-length // k.TILE), work)])

    def _attention_room(self, length: int, channels: int) -> Each:
        k = attention_kernels
        parts = (
            self._each("scores", length * k.TILE), self._each("dscores", length * k.TILE),
            self._each("turned", channels * k.TILE), self._each("other", channels * k.TILE),
            self._each("lanes", 2 * k.TILE, (2, k.TILE)),
        )  # fmt: skip
        return Each(map(k.Room, *parts))

    def silu(self, x: Array, out: Array) -> None:
        self._values(SILU_WORK, pointwise_kernels.silu_range, x, out)

    def silu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        self._values(SILU_WORK, pointwise_kernels.silu_backward_range, dy, x, dx, options=(add,))

    def gelu(self, x: Array, out: Array) -> None:
        self._values(SILU_WORK, pointwise_kernels.gelu_range, x, out)

    def gelu_backward(self, dy: Array, x: Array, dx: Array, *, add: bool = False) -> None:
        self._values(SILU_WORK, pointwise_kernels.gelu_backward_range, dy, x, dx, options=(add,))

    def offset(self, x: Array, p: Array, out: Array) -> None:
        arguments = x.reshape(-1), p.reshape(-1), out.reshape(-1)
        with self._workers.lock:
            self._do([(pointwise_kernels.offset_range, arguments, len(x), float(LIGHT_WORK * p.size))])

    def offset_backward(self, dy: Array, dp: Array) -> None:
        arguments = dy.reshape(-1), dp.size, dp.reshape(-1)
        with self._workers.lock:
            self._do([(conv_kernels.row_sums, arguments, dp.size, float(LIGHT_WORK * len(dy)))])

    def add(self, a: Array, b: Array, out: Array) -> None:
        self._values(LIGHT_WORK, pointwise_kernels.add_range, a, b, out)

    def _values(self, work: int, kernel: Any, *arrays: Array, options: tuple[Any, ...] = ()) -> None:
        """Run a kernel over ranges of the values of arrays of one size."""
        flat = [array.reshape(-1) for array in arrays]
        with self._workers.lock:
            self._do([(kernel, (*flat, *options), flat[0].size, float(work))])

    def concatenate(self, a: Array, b: Array, out: Array) -> None:
        left, right = a.shape[-1], b.shape[-1]
        self._copy(
            (a, 0, left, out, 0, left + right, left, False), (b, 0, right, out, left, left + right, right, False)
        )

    def split(self, x: Array, a: Array, b: Array, *, add: bool = False) -> None:
        left, right = a.shape[-1], b.shape[-1]
        self._copy((x, 0, left + right, a, 0, left, left, add), (x, left, left + right, b, 0, right, right, False))

    def _copy(self, *pieces: tuple[Any, ...]) -> None:
        jobs: list[Job] = []
        for source, at, source_width, target, to, target_width, width, add in pieces:
            flat = source.reshape(-1), at, source_width, target.reshape(-1), to, target_width, width, add
            rows = source.size // source_width
            jobs.append((pointwise_kernels.copy_columns, flat, rows, float(LIGHT_WORK * width)))
        with self._workers.lock:
            self._do(jobs)

    def take(self, table: Array, index: Array, out: Array, *, add: bool = False) -> None:
        width = table.shape[1]
        arguments = table.reshape(-1), index, out.reshape(-1), width, add
        with self._workers.lock:
            self._do([(pointwise_kernels.take_rows, arguments, len(index), float(LIGHT_WORK * width))])

    def take_backward(self, dy: Array, index: Array, dtable: Array) -> None:
        rows, width = dtable.shape
        arguments = dy.reshape(-1), index, dtable.reshape(-1), width
        with self._workers.lock:
            work = float(LIGHT_WORK * width * (1 + len(index) // max(rows, 1)))
            self._do([(pointwise_kernels.take_rows_backward, arguments, rows, work)])

    def dropout(self, x: Array, out: Array, rate: float, first_block: int, draw: Draw) -> None:
        size, limit, scale = x.size // max(len(x), 1), math.ceil(rate * 2.0**32), np.float32(1 / (1 - rate))
        with self._workers.lock:
            words = self._each("words", 4 * CHUNK, (4, CHUNK), np.uint32)
            law = Law(*law_of(draw))
            arguments = x.reshape(-1), out.reshape(-1), size, limit, np.array([scale]), first_block, law, words
            self._do([(pointwise_kernels.dropout_range, arguments, len(x), float(SILU_WORK * size))])

    def squared_error(self, y: Array, target: Array, dy: Array, loss: Array, terms: Array | None = None) -> None:
        k, size = pointwise_kernels, target.size
        if terms is not None:
            n, values = len(target), size // max(1, len(target))
            with self._workers.lock:
                sums = self._scratch("errors", 2 * n).view(np.float64)
                scale = np.array([2 / max(size, 1)], np.float32)
                flat = y.reshape(-1), target.reshape(-1), dy.reshape(-1), terms
                self._do(
                    [(k.weighted_error_range, (*flat, values, target.shape[-1], scale, sums), n, _work(True, values))],
                    [(k.mean_of_blocks, (sums, size, loss), 1, 0.0)],
                )
            return
        blocks = -(-size // k.BLOCK)
        with self._workers.lock:
            sums = self._scratch("errors", 2 * blocks).view(np.float64)
            lanes = self._each("lanes in float64", 2 * k.LANES, dtype=np.float64)
            scale = np.array([2 / max(size, 1)], np.float32)
            arguments = y.reshape(-1), target.reshape(-1), dy.reshape(-1), scale, sums, lanes
            self._do(
                [(k.squared_error_range, arguments, blocks, float(LIGHT_WORK * k.BLOCK))],
                [(k.mean_of_blocks, (sums, size, loss), 1, 0.0)],
            )


def _work(silu: bool, values: int) -> float:
    return float((SILU_WORK if silu else LIGHT_WORK) * values)
