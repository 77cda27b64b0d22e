"""What makes the CPU kernels fast, as far as it can be asserted: vector code, no arrays made in a loop, its cache."""

from __future__ import annotations

import tracemalloc

import numba
import numpy as np
import pytest
from assembly import assert_packed

import fastdiff as fd
from fastdiff.backends import AdamW, RowMap, TrainingDraws, TrainState
from fastdiff.kernels.cpu import covariance, gemm, jit, mlp, noise, optim, posterior, step
from fastdiff.noise import Draw, round_keys

N = 64
F32, I64 = np.float32, np.int64


def arrays(*shapes, dtype=F32):
    return [np.zeros(shape, dtype) for shape in shapes]


def layer(activation, mode):
    """A one-layer table of width N, with u and y apart."""
    row = np.zeros(mlp.LAYER_COLUMNS, I64)
    row[[mlp.INPUTS, mlp.OUTPUTS]] = N
    row[[mlp.ACTIVATION, mlp.MODE]] = activation, mode
    row[[mlp.U, mlp.Y]] = N * N, 2 * N * N
    return row


def hot_kernels():
    """Name: (kernel, arguments, packed operations that its loops must hold)."""
    words = np.zeros((4, noise.CHUNK), np.uint32)
    keys, row, one = round_keys(0), np.ones(12, F32), F32(1)
    x, out, kept, drawn, m2, m3 = arrays(N, N, N, N, N, N)
    arena, params, table = arrays(4 * N * N, N * N, 4 * N)
    slots, t = arrays(N, N, dtype=I64)
    times = table, 2 * N, slots, t
    p, g, m, v, a = arrays(N, N, N, N, N)
    silu = layer(mlp.SILU, mlp.SCALED)
    lane = np.ones(posterior.TILE, F32)
    columns, squares = arrays(9 * posterior.TILE, 4 * posterior.TILE)
    fused = ["multiply and add"] if gemm.host_width() else ["multiply", "add"]
    return {
        "Philox": (noise._words, (N, 0, np.uint64(0), N, False, 0, 0, keys, words), ["multiply words"]),
        "Box-Muller": (noise._pair, (N, words[0], words[1], x, out), ["multiply", "add", "root"]),
        "sampler step": (
            step._apply,
            (0, N, x, out, (kept, m2, m3), drawn, 0, row, (one, one, one), one, 3),
            ["multiply", "add"],
        ),
        "scaled noise": (step.scale_noise, (drawn, x, one), fused),
        "activation by samples": (
            mlp._modulate_activate,
            (N, silu, arena, params, times),
            ["multiply", "add", "divide"],
        ),
        "activation by features": (
            mlp._modulate_activate_columns,
            (N, silu, arena, params, table, 0),
            ["multiply", "add", "divide"],
        ),
        "activation backward": (
            mlp._layer_backward,
            (N, silu, arena, arena[:N], times, arena, params),
            ["multiply", "add", "divide"],
        ),
        "similarity": (covariance.similarity_range, (0, 1, x, out, N), ["multiply", "add"]),
        "standardised rows": (covariance._standardise, (1, x, N, out, kept, drawn), ["multiply"]),
        "sums of tiles": (mlp.collect_tile, (True, g, p, arena, t, slots, v, 0), ["add"]),
        "squared distances": (
            posterior._distances,
            (4, posterior.TILE, columns, lane, np.ones(36, F32), 9, squares),
            fused,
        ),
        "weights": (
            posterior._weigh,
            (4, posterior.TILE, squares, lane, lane.copy(), lane.copy(), lane.copy()),
            ["multiply", "add"],
        ),
        "AdamW": (optim.adamw_range, (0, N, p, g, m, v, a, np.ones(8, F32)), ["multiply", "add", "divide", "root"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", hot_kernels())
def test_hot_kernels_are_vectorised(name):
    assert_packed(*hot_kernels()[name])


@pytest.mark.parametrize("m", [1, gemm.TILES[gemm.host_width()][0], 50, 100])
@pytest.mark.parametrize("n", [1, 9, 50, 200])
def test_weight_gradients_have_the_bits_of_the_product(n, m):
    """Also in the columns that are computed as rows of the transpose, from one row of samples to a whole tile."""
    rng = np.random.default_rng(0)
    for rows in (1, 7, mlp.TILE):
        x, dy = rng.standard_normal((rows, n), F32), rng.standard_normal((rows, m), F32)
        row = np.zeros(mlp.LAYER_COLUMNS, I64)
        row[[mlp.INPUTS, mlp.OUTPUTS, mlp.WEIGHT]] = n, m, 3
        partial, spare, wanted = np.full(n * m + 6, -1, F32), np.full(mlp.TILE * max(n, m), np.nan, F32), arrays(n * m)
        mlp._weight_gradient(rows, row, x.reshape(-1), dy.reshape(-1), partial, spare)
        product(*wanted, x.reshape(-1), dy.reshape(-1), rows, n, m)
        np.testing.assert_array_equal(partial[3:-3].view(np.uint32), wanted[0].view(np.uint32))
        assert (partial[:3] == -1).all()
        assert (partial[-3:] == -1).all()


@numba.njit(**jit.OPTIONS)
def product(dw, x, dy, rows, n, m):
    gemm.gemm(dw, 0, m, x, 0, 1, n, dy, 0, m, n, m, rows, False)


def peak_of(work):
    """Bytes of Python and NumPy memory that a warm call has at once beyond what there was before."""
    for _ in range(3):
        work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SMALL = 16 * 1024  # bytes of frames, closures and views; one tile of the narrowest layer here has 25 KB


@pytest.mark.parametrize("make", [fd.MLP, fd.MLP.tutorial])
def test_a_warm_training_step_allocates_no_arrays(make):
    net = make(50, T=100)
    be = fd.get_backend("cpu", threads=2)
    schedule = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    data = fd.data.harmonic_curves(64)
    draws = TrainingDraws(data, schedule.signal, schedule.noise, np.ones(100), np.zeros(100), 0)
    options = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.001, 1.0, 0.9)
    grads, m, v = (net.layout.zeros(F32) for _ in range(3))
    average = net.flat.copy()

    def train():
        be.mlp_train_gradient(net.plan, net.flat, draws, 7, 300, grads)
        be.adamw(TrainState(net.flat, grads, m, v, average), options)

    assert peak_of(train) < SMALL


def test_a_warm_map_of_rows_allocates_no_arrays():
    be = fd.get_backend("cpu", threads=2)
    v, x, out = arrays((20, 60), (3000, 40), (3000, 40))
    similarities = np.empty((20, 60, 60), F32)
    plan = RowMap(scale=np.ones(40), left=np.ones((40, 7)), right=np.ones((7, 40)), standardise=True)

    def work():
        be.similarity(v, similarities)
        be.map_rows(x, out, plan)
        be.mapped_normal(out, plan, Draw(0, 0))

    assert peak_of(work) < SMALL


def test_a_warm_sampling_loop_allocates_no_arrays():
    net = fd.MLP.tutorial(50, T=100)
    be = fd.get_backend("cpu", threads=2)
    smp = fd.samplers.dpmpp_2m(fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1), 20)
    n = 500
    seen = []

    def watch(i, t, x):
        """Memory in use after each row: a loop that made an array a row and kept it would show it."""
        current, peak = tracemalloc.get_traced_memory()
        seen.append(peak - current)
        tracemalloc.reset_peak()
        return False

    def run(callback=None):
        return fd.sample(net, smp, n=n, backend=be, callback=callback)

    run()
    tracemalloc.start()
    try:
        run(watch)
        stepwise = max(seen[1:])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        x = run()
        fused = tracemalloc.get_traced_memory()[1] - before - x.nbytes
    finally:
        tracemalloc.stop()
    assert stepwise < SMALL
    assert fused < 2 * SMALL


def test_a_warm_exact_denoiser_allocates_no_arrays():
    """Nothing of the size of the states (60 KB), nor of the data (60 KB) or of their differences."""
    rng = np.random.default_rng(0)
    schedule = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    be = fd.get_backend("cpu", threads=2)
    x = rng.normal(size=(300, 50)).astype(F32)
    law = rng.normal(size=50), np.eye(50)
    for denoiser in (
        fd.denoisers.Gaussian(*law, schedule),
        fd.denoisers.Mixture([0.5, 0.5], [law[0]] * 2, [law[1]] * 2, schedule),
        fd.denoisers.Empirical(x, schedule),
    ):
        evaluate = denoiser.on(be).evaluate
        assert peak_of(lambda evaluate=evaluate: evaluate(x, 60)) < SMALL


def test_the_cache_knows_all_kernel_sources():
    """Numba compares a stamp of the one file; ours is of all of them, so an inlined function counts as well."""
    for kernel in (noise._pair, step.step_range, mlp.chain_range, optim.adamw_range, posterior.blend_range):
        assert kernel._cache._cache_file._source_stamp == jit._sources_digest()
