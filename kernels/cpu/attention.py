"""Self-attention of one head at a time, on tiles of queries: no matrix of scores is larger than (keys, TILE).

Scores lie with the queries side by side, S^T = k q^T, so maxima and sums over keys run over whole vectors of queries;
every product takes its operands as they lie, except for a tile of queries, which is turned first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.kernels.cpu.jit import kernel
from fastdiff.kernels.cpu.posterior import weight

ZERO, ONE = np.float32(0), np.float32(1)
TILE = 64  # queries


class Room(NamedTuple):
    """A thread's: scores and what is like them (length, TILE), two turned tiles, and two lanes of queries."""

    scores: Any
    dscores: Any
    turned: Any
    other: Any
    lanes: Any


@kernel
def _turn(source, begin, distance, rows, columns, target):
    """target (columns, rows) is the transpose of `rows` rows that begin at `begin`, `distance` apart."""
    for i in range(rows):
        row = source[begin + i * distance : begin + i * distance + columns]
        to = target[i : i + (columns - 1) * rows + 1]
        for j in range(columns):
            to[j * rows] = row[j]


@kernel
def attention_range(start, stop, qkv, out, log_sums, length, channels, heads, scores, turned, lanes):
    """Items start ... stop - 1: TILE queries of a head of an image; `scores` is (length, TILE), `lanes` (2, TILE)."""
    d, tiles, width = channels // heads, (length + TILE - 1) // TILE, 3 * channels
    scale = np.float32(1.0 / math.sqrt(d))
    for item in range(start, stop):
        first = (item % tiles) * TILE
        head, n = (item // tiles) % heads, item // (tiles * heads)
        m = min(TILE, length - first)
        q = n * length * width + head * d
        k, v = q + channels, q + 2 * channels
        _turn(qkv, q + first * width, width, m, d, turned)
        gemm(scores, 0, m, qkv, k, width, 1, turned, 0, m, length, m, d, False)
        top, total = lanes[0, :m], lanes[1, :m]
        top[:] = scores[:m]
        for key in range(1, length):
            row = scores[key * m : (key + 1) * m]
            for i in range(m):
                top[i] = row[i] if row[i] > top[i] else top[i]
        total[:] = ZERO
        for key in range(length):
            row = scores[key * m : (key + 1) * m]
            for i in range(m):
                e = weight((row[i] - top[i]) * scale)
                row[i] = e
                total[i] += e
        to = (n * length + first) * channels + head * d
        gemm(out, to, channels, scores, 0, 1, m, qkv, v, width, m, d, length, False)
        sums = log_sums[(n * heads + head) * length + first :]
        for i in range(m):
            sums[i] = np.float32(np.float64(top[i]) * scale + math.log(np.float64(total[i])))
            row = out[to + i * channels : to + i * channels + d]
            factor = ONE / total[i]
            for j in range(d):
                row[j] = row[j] * factor


@kernel
def attention_tangent_range(start, stop, dqkv, qkv, out, log_sums, dout, length, channels, heads, room):
    """Items start ... stop - 1: TILE queries of a head of an image.

    With P = exp(S - log sum) and dS = (dq k^T + q dk^T) / sqrt(d): dy = (P dS) v + P dv - <P dS> y.
    """
    scores, dscores, turned, other, lanes = room
    d, tiles, width = channels // heads, (length + TILE - 1) // TILE, 3 * channels
    scale = np.float32(1.0 / math.sqrt(d))
    for item in range(start, stop):
        first = (item % tiles) * TILE
        head, n = (item // tiles) % heads, item // (tiles * heads)
        m = min(TILE, length - first)
        q = n * length * width + head * d
        k, v = q + channels, q + 2 * channels
        _turn(qkv, q + first * width, width, m, d, turned)
        _turn(dqkv, q + first * width, width, m, d, other)
        gemm(scores, 0, m, qkv, k, width, 1, turned, 0, m, length, m, d, False)
        gemm(dscores, 0, m, qkv, k, width, 1, other, 0, m, length, m, d, False)
        gemm(dscores, 0, m, dqkv, k, width, 1, turned, 0, m, length, m, d, True)
        at = (n * heads + head) * length + first
        sums, total = log_sums[at : at + m], lanes[0, :m]
        total[:] = ZERO
        for key in range(length):
            row, drow = scores[key * m : (key + 1) * m], dscores[key * m : (key + 1) * m]
            for i in range(m):
                p = weight(row[i] * scale - sums[i])
                row[i] = p
                drow[i] = p * (drow[i] * scale)
                total[i] += drow[i]
        to = (n * length + first) * channels + head * d
        gemm(dout, to, channels, dscores, 0, 1, m, qkv, v, width, m, d, length, False)
        gemm(dout, to, channels, scores, 0, 1, m, dqkv, v, width, m, d, length, True)
        for i in range(m):
            y, dy = out[to + i * channels :], dout[to + i * channels :]
            for j in range(d):
                dy[j] -= total[i] * y[j]


@kernel
def attention_backward_range(start, stop, dy, qkv, out, log_sums, dqkv, length, channels, heads, room):
    """Items start ... stop - 1: one head of one image.

    With P = exp(S - log sum): dv = P^T dy, dP = dy v^T, dS = P (dP - <dy y>), dq = dS k and dk = dS^T q, scaled.
    """
    scores, dscores, turned, other, lanes = room
    d, width = channels // heads, 3 * channels
    scale = np.float32(1.0 / math.sqrt(d))
    for item in range(start, stop):
        head, n = item % heads, item // heads
        q = n * length * width + head * d
        k, v = q + channels, q + 2 * channels
        for first in range(0, length, TILE):
            m = min(TILE, length - first)
            at, row_at = q + first * width, (n * length + first) * channels + head * d
            inner = lanes[0, :m]
            inner[:] = ZERO
            _turn(out, row_at, channels, m, d, other)
            _turn(dy, row_at, channels, m, d, turned)
            for j in range(d):
                a, b = turned[j * m : (j + 1) * m], other[j * m : (j + 1) * m]
                for i in range(m):
                    inner[i] += a[i] * b[i]
            gemm(dscores, 0, m, qkv, v, width, 1, turned, 0, m, length, m, d, False)
            _turn(qkv, at, width, m, d, turned)
            gemm(scores, 0, m, qkv, k, width, 1, turned, 0, m, length, m, d, False)
            sums = log_sums[item * length + first : item * length + first + m]
            for key in range(length):
                row, drow = scores[key * m : (key + 1) * m], dscores[key * m : (key + 1) * m]
                for i in range(m):
                    p = weight(row[i] * scale - sums[i])
                    row[i] = p
                    drow[i] = p * (drow[i] - inner[i]) * scale
            gemm(dqkv, v, width, scores, 0, m, 1, dy, row_at, channels, length, d, m, first > 0)
            gemm(dqkv, k, width, dscores, 0, m, 1, qkv, at, width, length, d, m, first > 0)
            gemm(dqkv, at, width, dscores, 0, 1, m, qkv, k, width, m, d, length, False)
