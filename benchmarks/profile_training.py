"""Where a training step of the tutorial's MLP spends its time: ``python benchmarks/profile_training.py``.

The kernels of one tile of samples, each alone, on one thread, in cache: the best of many calls. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from machine import header

import fastdiff as fd
from fastdiff.backends import TrainingDraws
from fastdiff.bench import BY_NAME, duration
from fastdiff.bench.arrays import T
from fastdiff.kernels.cpu import jit, mlp, noise
from fastdiff.kernels.cpu.gemm import gemm
from fastdiff.noise import Stream, round_keys

REPEATS, CALLS = 300, 10


@numba.njit(**jit.OPTIONS)
def forward_products(layers, arena, params, rows):
    for k in range(len(layers)):
        n, m = layers[k, mlp.INPUTS], layers[k, mlp.OUTPUTS]
        u, x, weight = layers[k, mlp.U], layers[k, mlp.X], layers[k, mlp.WEIGHT]
        gemm(arena, u, m, arena, x, n, 1, params, weight, m, rows, m, n, False)


@numba.njit(**jit.OPTIONS)
def weight_gradients(layers, arena, dy, partial, spare, rows):
    for k in range(len(layers)):
        mlp._weight_gradient(rows, layers[k], arena, dy, partial, spare)


@numba.njit(**jit.OPTIONS)
def input_gradients(layers, dy, transposed, dx, rows):
    for k in range(1, len(layers)):  # that of the data is not needed
        n, m = layers[k, mlp.INPUTS], layers[k, mlp.OUTPUTS]
        gemm(dx, 0, n, dy, 0, m, 1, transposed, layers[k, mlp.WEIGHT], n, rows, n, m, False)


@numba.njit(**jit.OPTIONS)
def square_product(a, b, c, n):
    gemm(c, 0, n, a, 0, n, 1, b, 0, n, n, n, n, False)


@numba.njit(**jit.OPTIONS)
def activations_backward(layers, arena, dy, times, dtime, partial):
    for k in range(len(layers)):
        mlp._layer_backward(len(times[3]), layers[k], arena, dy, times, dtime, partial)


def best(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call."""
    least = np.inf
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            function(*arguments)
        least = min(least, (time.perf_counter() - begin) / CALLS)
    return float(least)


def main() -> None:
    workload = BY_NAME["train-tutorial-8192"]
    be, net, s = fd.get_backend("cpu", threads=1), workload.network(), workload.schedule()
    ones = np.ones(T)
    draws = TrainingDraws(workload.curves(), s.signal, s.noise, ones, 0 * ones, seed=0)
    grads, rows = net.layout.zeros(np.float32), mlp.TILE
    be.mlp_train_gradient(net.plan, net.flat, draws, 0, rows, grads)  # makes the workspace, and leaves a tile in it
    space, room = be._network(net.plan), noise.Room(*be._rooms[0])
    network, asked = mlp.Network(*space.network(net.flat, space.t)[0]), mlp.Asked(*space.asked(None))
    layers, arena, width, slots, t = space.layers, space.arenas[0], network.width, space.slots, space.t
    sums, given = mlp.Sums(*space.sums[0]), mlp.Given(*space.not_given)
    partial, dtime, _ = sums
    dtable = grads[space.summed :]
    target, d_in, _ = space.deltas[0]
    zeros = np.zeros_like(d_in)  # a gradient that does not grow from call to call
    law = 0, int(Stream.TRAIN_NOISE), round_keys(0)
    batch = mlp.Batch(draws.data, space.indices, t, space.tables, rows, *law)
    times = network.table, width, slots, t
    n = 192
    a, b, c = (np.ones(n * n, np.float32) for _ in range(3))
    tile = (0, True, given, batch, network, asked, sums, room, arena, space.deltas[0])
    whole = best(mlp.gradient_tile, *tile)
    roof = 2 * n**3 / best(square_product, a, b, c, n)
    forward = 2 * rows * sum(workload.products)
    products = best(forward_products, layers, arena, net.flat, rows)
    parts = {
        "products, forward": (products, forward),
        "products, weight gradients": (best(weight_gradients, layers, arena, zeros, partial, d_in, rows), forward),
        "products, input gradients": (
            best(input_gradients, layers, zeros, space.transposed, d_in, rows),
            forward - 2 * rows * workload.products[0],
        ),
        "biases and activations": (
            best(mlp.forward_tile, rows, layers, net.flat, network.linear, network.rank, len(slots), arena, times, t)
            - products,
            0,
        ),
        "biases and activations, backward": (
            best(activations_backward, layers, arena, zeros, times, dtime, partial),
            0,
        ),
        "draws": (
            best(mlp._draw_tile, 0, rows, draws.data.shape[1], batch, arena, target, room),
            0,
        ),
        "sums over tiles": (
            best(mlp.collect_tile, True, grads[: space.summed], partial, dtime, t, slots, dtable, width),
            0,
        ),
    }
    print(f"{header(1).line()} A tile of {rows} samples; a product of {n} x {n} x {n} reaches {roof / 1e9:.0f} GF/s.\n")
    print("| part of a tile | time | share | of that product's speed |\n|---|---:|---:|---:|")
    for name, (seconds, operations) in parts.items():
        speed = f"{operations / seconds / roof:.0%}" if operations else ""
        print(f"| {name} | {duration(seconds)} | {seconds / whole:.0%} | {speed} |")
    print(f"| a whole tile but for the last | {duration(whole)} | | |")


if __name__ == "__main__":
    main()
