"""Noise with a covariance: its roots, the processes and the sampler with it, and models that learn under it."""

import copy
import gc
import math
import pickle
import tracemalloc
from unittest import mock

import naive
import numpy as np
import pytest
from device_array import DeviceArray, DeviceRuntime
from host_cuda import has_compiler
from safetensors.numpy import load_file
from test_checkpoint import rewritten
from tolerances import assert_close, assert_estimate, assert_same_bits

import fastdiff as fd
from fastdiff import NoiseShape, noise_shape, process, samplers
from fastdiff.backends import RowMap
from fastdiff.backends.cpu import CpuBackend
from fastdiff.backends.cuda import CudaBackend
from fastdiff.cli import main
from fastdiff.errors import ArgumentError, CheckpointError
from fastdiff.exact import Gaussian, exact_chain
from fastdiff.noise import Draw, Stream
from fastdiff.schedule import Schedule

SCHEDULE = Schedule.cosine(12)
KINDS = ["diagonal", "dense", "low_rank", "stationary"]
WAYS = [*KINDS, "fft"]  # a stationary shape as if it were large


def _close(got, want):
    assert_close(got, want, terms=200, scale=10)


SAME = {"cpu": assert_same_bits, "numpy": _close}  # in other batches: the BLAS of NumPy promises no bits


def refused(argument, function, *args, **kwargs):
    with pytest.raises(ArgumentError) as caught:
        function(*args, **kwargs)
    assert caught.value.argument == argument, caught.value
    return str(caught.value)


def covariance(kind, d=7):
    """S, from the definition of each kind, and the arguments of its constructor."""
    rng = np.random.default_rng(d)
    variances, factor, k = rng.uniform(0.3, 3, d), rng.normal(size=(d, 2)), np.arange(d)
    if kind == "diagonal":
        return np.diag(variances), (variances,)
    if kind == "dense":
        root = rng.normal(size=(d, d)) / math.sqrt(6 * d) + np.eye(d)
        return root @ root.T, (root @ root.T,)
    if kind == "low_rank":
        return np.diag(variances) + factor @ factor.T, (factor, variances)
    row = 0.1 * (k == 0) + np.exp(-np.minimum(k, d - k) / 2)
    return row[(k[:, None] - k) % d], (row,)


def make(kind, d=7):
    if kind == "fft":
        with mock.patch.object(noise_shape, "MATRIX_LIMIT", 0):
            return make("stationary", d)
    return None if kind == "white" else getattr(NoiseShape, kind)(*covariance(kind, d)[1])


def root(shape, d):
    """L, of which row i of the coloured unit matrix is column i; white noise has I."""
    return np.eye(d) if shape is None else shape.colour(np.eye(d), backend="numpy").T


# ------------------------------------------------------------------------------------------- the shape itself


@pytest.mark.parametrize("d", [1, 7, 8])
@pytest.mark.parametrize("kind", WAYS)
def test_the_root_is_a_root(kind, d):
    shape, want = make(kind, d), covariance(kind, d)[0]
    assert (shape.kind, shape.d) == ("stationary" if kind == "fft" else kind, d)
    L = root(shape, d)
    assert_close(L @ L.T, want, terms=10 * d)
    assert_close(shape.cov(), want, terms=10 * d)
    assert_close(np.array(shape.log_det), np.linalg.slogdet(L)[1], terms=d, scale=d)
    assert_close(np.array(shape.log_det), np.linalg.slogdet(want)[1] / 2, terms=d, scale=d)


@pytest.mark.parametrize("d", [7, 8, 30])
@pytest.mark.parametrize("kind", WAYS)
def test_colour_and_whiten(backend, kind, d):
    shape = make(kind, d)
    L = root(shape, d)
    for dtype in (np.float32, np.float64):
        x = np.random.default_rng(1).normal(size=(9, d)).astype(dtype)
        real = np.float64 if dtype == np.float64 and backend == "numpy" else np.float32
        coloured, white = shape.colour(x, backend=backend), shape.whiten(x, backend=backend)
        assert coloured.dtype == white.dtype == real
        assert_close(coloured, x @ L.T, terms=d)
        assert_close(white, np.linalg.solve(L, x.T).T, terms=d, scale=10)
        assert_close(shape.whiten(coloured, backend=backend), x, terms=d, scale=20)
    cube = x[:, :6].reshape(3, 2, 9)
    assert shape.colour(np.zeros((0, d)), backend=backend).shape == (0, d)
    assert_same_bits(make(kind, 18).colour(cube, backend=backend).reshape(3, 18),
                     make(kind, 18).colour(cube.reshape(3, 18), backend=backend))  # fmt: skip


def test_the_roots_are_those_promised():
    """Lower triangular for a dense shape, symmetric for a stationary one, D^1/2 times symmetric for low rank."""
    assert_same_bits(np.triu(root(make("dense"), 7), 1), np.zeros((7, 7)))
    stationary = root(make("stationary"), 7)
    assert_close(stationary, stationary.T)
    assert_close(stationary, root(make("fft"), 7))
    assert_close(stationary[1:, 1:], stationary[:-1, :-1])
    shape = make("low_rank")
    inner = root(shape, 7) / np.sqrt(shape.arrays["variances"])[:, None]
    assert_close(inner, inner.T, terms=7)


def test_nothing_quadratic_where_the_kind_is_not():
    d = 40_000
    tracemalloc.start()
    try:
        few = NoiseShape.low_rank(np.ones((d, 3)) * [1, 2, 3], 0.5)
        smooth = NoiseShape.stationary(power=np.ones(d))
        for shape in (few, smooth):
            assert shape.whiten(shape.colour(np.ones((2, d)), backend="numpy"), backend="numpy") == pytest.approx(1)
        assert tracemalloc.get_traced_memory()[1] < 200 * d * 8
    finally:
        tracemalloc.stop()
    assert few.log_det == pytest.approx((d * math.log(0.5) + math.log1p(14 * d / 0.5)) / 2)
    assert smooth.log_det == 0


def test_a_power_spectrum_is_the_transform_of_the_autocovariance():
    for d in (7, 8):
        row = covariance("stationary", d)[1][0]
        power = [sum(row[k] * math.cos(2 * math.pi * j * k / d) for k in range(d)) for j in range(d)]
        shape = NoiseShape.stationary(power=power)
        assert_close(shape.cov(), covariance("stationary", d)[0], terms=10 * d)
        assert_close(shape.arrays["power"], NoiseShape.stationary(row).arrays["power"], terms=10 * d)


def test_jitter_is_a_variance_of_every_value():
    cov, (row,) = covariance("stationary")
    for shape in (NoiseShape.dense(cov, jitter=0.25), NoiseShape.stationary(row, jitter=0.25)):
        assert_close(shape.cov(), cov + 0.25 * np.eye(7), terms=70)


@pytest.mark.parametrize("kind", WAYS)
def test_plans_are_as_backends_want_them(kind):
    shape = make(kind)
    for plan in (shape._root, shape._inverse):
        for part in (plan.scale, plan.left, plan.right) if isinstance(plan, RowMap) else (plan.gain,):
            assert part is None or (part.flags.c_contiguous and part.dtype == np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_values(kind):
    shape, z = make(kind), np.ones((2, 7))
    for other in (make(kind), pickle.loads(pickle.dumps(shape)), copy.deepcopy(shape), copy.copy(shape)):
        assert other == shape
        assert hash(other) == hash(shape)
        assert other.log_det == shape.log_det
        assert_same_bits(other.colour(z), shape.colour(z))
        for array in other.arrays.values():
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    for other in (*map(make, KINDS), make(kind, 8), "dense"):
        assert (other == shape) == (isinstance(other, NoiseShape) and other.kind == kind and other.d == 7)
    assert NoiseShape.diagonal([1, 2]) != NoiseShape.diagonal([1, 3])
    assert NoiseShape.low_rank([[1.0], [2.0]], [1, 2]) != NoiseShape.low_rank([[1.0], [2.0]], [1, 3])
    assert hash(NoiseShape.low_rank([[0.0]])) == hash(NoiseShape.low_rank([[-0.0]]))
    assert kind in repr(shape)


def test_what_is_given_is_copied():
    given = np.ones(3)
    shape = NoiseShape.diagonal(given)
    given[:] = 4
    assert_same_bits(shape.cov(), np.eye(3))


# ------------------------------------------------------------------------------------------- bad shapes


def test_a_singular_matrix_is_refused_and_the_advice_helps():
    for dtype in (np.float64, np.float32):
        for d in (1, 2, 4, 50):
            for seed in range(5):
                rng = np.random.default_rng(seed)
                thin = rng.normal(size=(d, d // 2)) * np.geomspace(1, 1e3, d)[:, None]
                cov = (thin @ thin.T).astype(dtype)
                message = refused("cov", NoiseShape.dense, cov)
                assert "jitter=" in message
                advice = float(message.split("jitter=")[1].split()[0])
                assert NoiseShape.dense(cov, jitter=advice).d == d


def test_values_of_very_different_size_are_not_singular():
    scales = np.geomspace(1e-12, 1e12, 7)
    shape = NoiseShape.dense(covariance("dense")[0] * scales * scales[:, None])
    assert shape.log_det == pytest.approx(make("dense").log_det + np.log(scales).sum())


BAD = np.array([[1.0, 2.0], [2.0, 1.0]])
NAN = np.array([1.0, np.nan])


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "argument", "words"),
    [
        ("diagonal", ([1, -0.5],), {}, "variances", "-0.5 at index 1"),
        ("diagonal", ([1, 0],), {}, "variances", "0 at index 1"),
        ("diagonal", ([],), {}, "variances", "no values"),
        ("diagonal", (1.0,), {}, "variances", "shape ()"),
        ("diagonal", (NAN,), {}, "variances", "nan"),
        ("diagonal", (["a"],), {}, "variances", "dtype"),
        ("diagonal", ([1j],), {}, "variances", "complex"),
        ("diagonal", ([1e-90, 1],), {}, "variances", "float32"),
        ("diagonal", ([1e90, 1],), {}, "variances", "float32"),
        ("dense", (BAD,), {}, "cov", "-1"),
        ("dense", (np.ones((2, 3)),), {}, "cov", "(2, 3)"),
        ("dense", (np.zeros((0, 0)),), {}, "cov", "(0, 0)"),
        ("dense", (np.ones(2),), {}, "cov", "(2,)"),
        ("dense", ([[1, 0.5], [0.4, 1]],), {}, "cov", "0.1"),
        ("dense", ([[1, np.inf], [np.inf, 1]],), {}, "cov", "inf"),
        ("dense", (np.zeros((2, 2)),), {}, "cov", "jitter="),
        ("dense", (np.eye(2),), {"jitter": -1}, "jitter", "at least 0"),
        ("dense", (np.eye(2),), {"jitter": math.nan}, "jitter", "nan"),
        ("low_rank", (np.ones((3, 1)), -1), {}, "variances", "-1"),
        ("low_rank", (np.ones((3, 1)), [1, 2]), {}, "variances", "(2,)"),
        ("low_rank", (np.ones((3, 0)),), {}, "factor", "(3, 0)"),
        ("low_rank", (np.ones(3),), {}, "factor", "(3,)"),
        ("low_rank", (np.full((3, 1), np.nan),), {}, "factor", "nan"),
        ("low_rank", (np.full((3, 1), 1e300), 1e-300), {}, "factor", "inf"),
        ("stationary", ([1, 0.5, 0.4],), {}, "autocovariance", "0.5 at index 1 and 0.4 at 2"),
        ("stationary", ([1, -1, -1],), {}, "autocovariance", "-1 at frequency 0"),
        ("stationary", ([1, 1, 1],), {}, "autocovariance", "jitter="),
        ("stationary", (NAN,), {}, "autocovariance", "nan"),
        ("stationary", ([],), {}, "autocovariance", "no values"),
        ("stationary", (), {"power": [1, 0.5, 0.4]}, "power", "0.4 at 2"),
        ("stationary", (), {"power": [1, -0.25, -0.25]}, "power", "-0.25 at frequency 1"),
        ("stationary", (), {"power": [1, 0, 0]}, "power", "0 at frequency 1"),
        ("stationary", (), {}, "autocovariance, power", "neither"),
        ("stationary", ([1.0],), {"power": [1.0]}, "autocovariance, power", "both"),
        ("stationary", ([1.0],), {"jitter": -1}, "jitter", "-1"),
    ],
)
def test_bad_shapes_are_refused(kind, arguments, options, argument, words):
    assert words in refused(argument, getattr(NoiseShape, kind), *arguments, **options)


def test_the_advice_for_a_power_of_zero_helps():
    for row in ([1.0, 1, 1], [1.0, -1, -1], [0.0, 0, 0]):
        advice = refused("autocovariance", NoiseShape.stationary, row).split("jitter=")[1].split()[0]
        assert NoiseShape.stationary(row, jitter=float(advice)).d == 3


def test_bad_rows_are_refused(backend):
    shape = make("dense")
    for function, name in ((shape.colour, "z"), (shape.whiten, "x")):
        assert "rows of 7 values" in refused(name, function, np.ones((2, 6)), backend=backend)
        assert "nan" in refused(name, function, np.full((2, 7), np.nan), backend=backend)
        refused(name, function, np.ones(()), backend=backend)


# ------------------------------------------------------------------------------------------- the processes

X0 = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
T5 = np.array([0, 3, 11, 3, 7])


@pytest.mark.parametrize("kind", WAYS)
def test_forward_noise_is_its_formula(backend, kind, monkeypatch):
    shape = make(kind)
    z = naive.normal(5, 7, seed=6, stream=Stream.FORWARD, first_sample=2)
    options = {"seed": 6, "first_sample": 2, "backend": backend, "noise_shape": shape}
    x_t, eps = fd.forward_noise(X0, T5, SCHEDULE, **options)
    assert_close(eps, z @ root(shape, 7).T, terms=7)
    assert_same_bits(x_t, naive.forward_noise(X0, T5, SCHEDULE.signal, SCHEDULE.noise, eps))
    monkeypatch.setattr(process, "BLOCK_VALUES", 20)  # two rows at once
    out = np.empty_like(X0)
    assert fd.forward_noise(X0, T5, SCHEDULE, out=out, **options)[0] is out
    assert_same_bits(out, x_t)
    part, _ = fd.forward_noise(X0[3:], T5[3:], SCHEDULE, **options | {"first_sample": 5})
    SAME[backend](part, x_t[3:])
    cubes, _ = fd.forward_noise(X0.reshape(5, 1, 7, 1), T5, SCHEDULE, **options)
    assert_same_bits(cubes.reshape(5, 7), x_t)
    assert fd.forward_noise(X0[:0], 0, SCHEDULE, **options)[0].shape == (0, 7)


def test_the_unit_shape_has_the_bits_of_white_noise(backend):
    unit = NoiseShape.diagonal(np.ones(7))
    for got, want in zip(
        fd.forward_noise(X0, T5, SCHEDULE, backend=backend, noise_shape=unit),
        fd.forward_noise(X0, T5, SCHEDULE, backend=backend),
        strict=True,
    ):
        assert_same_bits(got, want)
    assert_same_bits(
        fd.forward_chain(X0, SCHEDULE, seed=3, backend=backend, noise_shape=unit),
        fd.forward_chain(X0, SCHEDULE, seed=3, backend=backend),
    )
    for table in (samplers.ddpm(SCHEDULE), samplers.dpmpp_2m(SCHEDULE, 6)):
        options = {"n": 5, "shape": 7, "backend": backend}
        want = fd.sample(_denoiser, table, **options)
        assert_same_bits(fd.sample(_denoiser, table, noise_shape=unit, batch=2, **options), want)
        net = fd.MLP(7, hidden=(8,), T=12)
        want = fd.sample(net, table, n=5, backend=backend)
        assert_close(fd.sample(net, table, n=5, backend=backend, noise_shape=unit), want, terms=30, scale=10)


def _denoiser(x, t):
    """Nothing linear, nor alike for all values."""
    return np.tanh(x * np.linspace(0.1, 0.9, x.shape[1], dtype=x.dtype) + x.dtype.type(t / 12) * np.roll(x, 1, axis=1))


@pytest.mark.parametrize("kind", WAYS)
def test_the_chain_takes_shaped_steps(backend, kind):
    shape = make(kind)
    chain = fd.forward_chain(X0, SCHEDULE, seed=3, first_sample=4, backend=backend, noise_shape=shape)
    x = X0.astype(np.float64)
    assert_same_bits(chain[0], X0)
    for t, beta in enumerate(SCHEDULE.betas):
        z = naive.normal(5, 7, seed=3, stream=Stream.CHAIN, step=t, first_sample=4)
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * z @ root(shape, 7).T
        assert_close(chain[t + 1], x, terms=7 * (t + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_that_of_shaped_noise(kind):
    """Against Gaussian conditioning in full matrices: q(x_{t-1} | x_t, x0) = N(mean, var S)."""
    shape, S = make(kind), covariance(kind)[0]
    x_t, x0 = np.random.default_rng(1).normal(size=(2, 1, 7))
    for t in (1, 5, 11):
        alpha, before, after = SCHEDULE.alphas[t], SCHEDULE.alphas_bar[t - 1], SCHEDULE.alphas_bar[t]
        gain = math.sqrt(alpha) * (1 - before) * S @ np.linalg.inv((1 - after) * S)
        want = math.sqrt(before) * x0[0] + gain @ (x_t[0] - math.sqrt(after) * x0[0])
        spread = (1 - before) * S - gain @ (math.sqrt(alpha) * (1 - before) * S)
        mean, var = fd.posterior(x_t, t, SCHEDULE, x0=x0, noise_shape=shape)
        assert_close(mean[0], want, terms=50, scale=10)
        assert_close(var[0] * S, spread, terms=50, scale=10)
        eps = (x_t - math.sqrt(after) * x0) / math.sqrt(1 - after)
        from_noise, _ = fd.posterior(x_t, t, SCHEDULE, noise=eps, noise_shape=shape)
        assert_close(from_noise, mean, terms=50, scale=10)


def test_a_network_takes_shaped_steps(backend):
    """Step by step, for the fused chain draws white noise."""
    net, shape, table = fd.MLP(7, hidden=(8,), T=12), make("dense"), samplers.ddpm(SCHEDULE, 5)
    options = {"n": 5, "shape": 7, "seed": 1, "backend": backend, "noise_shape": shape}
    want = fd.sample(lambda x, t: net.predict(x, t, backend=backend), table, **options)
    assert_close(fd.sample(net, table, **options), want, terms=100, scale=10)


def test_a_shape_that_does_not_fit_is_refused(backend):
    table = samplers.ddim(SCHEDULE, 3)
    calls = {
        "forward_noise": lambda s: fd.forward_noise(X0, 3, SCHEDULE, backend=backend, noise_shape=s),
        "forward_chain": lambda s: fd.forward_chain(X0, SCHEDULE, backend=backend, noise_shape=s),
        "posterior": lambda s: fd.posterior(X0, 3, SCHEDULE, x0=X0, noise_shape=s),
        "sample": lambda s: fd.sample(_denoiser, table, n=2, shape=7, backend=backend, noise_shape=s),
    }
    for call in calls.values():
        assert "7 values" in refused("noise_shape", call, make("dense", 8))
        assert "NoiseShape" in refused("noise_shape", call, np.eye(7))
        assert "NoiseShape" in refused("noise_shape", call, "dense")
    clipped = samplers.ddim(SCHEDULE, 3, clip=1.0)
    assert "clip None" in refused("sampler", fd.sample, _denoiser, clipped, n=2, shape=7, noise_shape=make("dense"))


# ------------------------------------------------------------------------------------------- sampling

TABLES = {
    "ddpm": samplers.ddpm(SCHEDULE),
    "x0": samplers.ddpm(SCHEDULE, 5, prediction="x0"),
    "v": samplers.ddim(SCHEDULE, 6, eta=0.7, prediction="v"),
    "dpmpp_2m": samplers.dpmpp_2m(SCHEDULE, 6),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", WAYS)
def test_sampling_is_white_sampling_of_the_wrapped_denoiser(backend, kind, name):
    table, shape = TABLES[name], make(kind)

    def wrapped(u, t):
        return shape.whiten(_denoiser(shape.colour(u, backend=backend), t), backend=backend)

    options = {"seed": 2, "first_sample": 3, "backend": backend}
    want, want_path = fd.sample(wrapped, table, n=9, shape=7, trajectory=True, **options)
    seen = []
    got, path = fd.sample(_denoiser, table, n=9, shape=7, trajectory=True, noise_shape=shape, batch=4,
                          callback=lambda i, t, x: seen.append(x.copy()) and None, **options)  # fmt: skip
    assert_close(got, shape.colour(want, backend=backend), terms=2000, scale=10)
    for state, coloured in zip(path, want_path, strict=True):
        assert_close(state, shape.colour(coloured, backend=backend), terms=2000, scale=10)
    assert_same_bits(np.array(seen), path[1:])
    whole = fd.sample(_denoiser, table, n=9, shape=7, noise_shape=shape, **options)
    SAME[backend](whole, got)
    start = np.random.default_rng(5).normal(size=(9, 7))
    got = fd.sample(_denoiser, table, initial=shape.colour(start, backend=backend), noise_shape=shape, **options)
    want = fd.sample(wrapped, table, initial=start, **options)
    assert_close(got, shape.colour(want, backend=backend), terms=2000, scale=10)


MEAN = np.array([0.5, -1.0, 2.0, 0.0])
COV = np.array([[1.0, 0.6, 0.1, 0.0], [0.6, 2.0, -0.4, 0.2], [0.1, -0.4, 0.5, 0.1], [0.0, 0.2, 0.1, 0.3]])
DRAWS = 100_000


def assert_moments(x, mean, cov):
    """Mean and covariance of draws from a Gaussian are these, within Monte Carlo error."""
    n, variances = len(x), np.diag(cov)
    assert_estimate(x.mean(axis=0, dtype=np.float64), mean, np.sqrt(variances / n))
    errors = np.sqrt((cov**2 + np.outer(variances, variances)) / n)
    assert_estimate(np.cov(x, rowvar=False, dtype=np.float64), cov, errors)


def noise_given(shape, schedule):
    """E[eps | x] for data from N(MEAN, COV) under noise N(0, S): sigma S (abar COV + sigma^2 S)^-1 (x - alpha MEAN)."""
    S = np.eye(4) if shape is None else shape.cov()

    def denoiser(x, t):
        alpha, sigma = schedule.signal[t], schedule.noise[t]
        gain = sigma * np.linalg.solve(alpha**2 * COV + sigma**2 * S, S)
        return (x - (alpha * MEAN).astype(x.dtype)) @ gain.astype(x.dtype)

    return denoiser


def white_model(shape, schedule):
    """The exact denoiser of L^-1 x under white noise."""
    inverse = np.linalg.inv(root(shape, 4))
    return Gaussian(inverse @ MEAN, inverse @ COV @ inverse.T, schedule)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_denoiser_is_that_of_whitened_data(kind):
    schedule, shape = Schedule.cosine(12), make(kind, 4)
    x = np.random.default_rng(3).normal(size=(20, 4))
    for t in (0, 6, 11):
        white = white_model(shape, schedule).predict(shape.whiten(x, backend="numpy"), t)
        assert_close(shape.colour(white, backend="numpy"), noise_given(shape, schedule)(x, t), terms=100, scale=10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["white", *KINDS])
def test_samples_of_an_exact_model_have_the_law_of_the_data(kind):
    """Every kind of noise ends at the same data; the table's own error is below that of Monte Carlo."""
    schedule, shape = Schedule.cosine(1000), make(kind, 4)
    table = samplers.dpmpp_2m(schedule, 200)
    assert exact_chain(white_model(shape, schedule), table).w2() < 1 / math.sqrt(DRAWS)
    options = {"shape": 4, "seed": 1, "backend": "cpu", "noise_shape": shape}
    assert_moments(fd.sample(noise_given(shape, schedule), table, n=DRAWS, **options), MEAN, COV)


@pytest.mark.parametrize("kind", ["white", *WAYS])
def test_samples_have_the_law_of_the_exact_chain(kind):
    """A stochastic table of few steps, whose own error is far above Monte Carlo's."""
    schedule, shape = Schedule.cosine(1000), make(kind, 4)
    table, L = samplers.ddpm(schedule, 6), root(shape, 4)
    options = {"n": DRAWS, "shape": 4, "seed": 2, "backend": "cpu", "noise_shape": shape}
    x = fd.sample(noise_given(shape, schedule), table, **options)
    law = exact_chain(white_model(shape, schedule), table)
    assert law.w2() > 0.1
    assert_moments(x, L @ law.mean, L @ law.cov @ L.T)


@pytest.mark.parametrize("kind", ["white", *KINDS])
def test_noised_data_have_the_covariance_of_the_closed_form(kind):
    schedule, shape = Schedule.cosine(10), make(kind, 4)
    S = np.eye(4) if shape is None else covariance(kind, 4)[0]
    z = fd.normal((DRAWS, 4), stream="data", backend="cpu")
    x0 = MEAN + z @ np.linalg.cholesky(COV).T
    for t in (0, 5, 9):
        x_t, eps = fd.forward_noise(x0, t, schedule, seed=4, backend="cpu", noise_shape=shape)
        abar = schedule.alphas_bar[t]
        assert_moments(x_t, math.sqrt(abar) * MEAN, abar * COV + (1 - abar) * S)
        assert_moments(eps, np.zeros(4), S)


def test_another_root_gives_other_samples_of_the_same_law():
    """The Cholesky and the symmetric root of one matrix."""
    schedule, S = Schedule.cosine(1000), covariance("stationary", 4)[0]
    table, made = samplers.ddpm(schedule, 6), []
    for shape in (make("stationary", 4), NoiseShape.dense(S)):
        options = {"n": DRAWS, "shape": 4, "seed": 3, "backend": "cpu", "noise_shape": shape}
        x = fd.sample(noise_given(shape, schedule), table, **options)
        law, L = exact_chain(white_model(shape, schedule), table), root(shape, 4)
        assert_moments(x, L @ law.mean, L @ law.cov @ L.T)
        made.append((x, L @ law.cov @ L.T))
    assert_close(made[0][1], made[1][1], terms=1000)
    assert np.abs(made[0][0] - made[1][0]).mean() > 0.05


# ------------------------------------------------------------------------------------------- arrays on a device


def _with_fft(self, function, types, args, kwargs):
    """NumPy's FFT is handed to the array's own, as CuPy has it; nothing else is."""
    assert function.__module__ == "numpy.fft"
    unpacked = [arg._memory if isinstance(arg, DeviceArray) else arg for arg in args]
    return DeviceArray(function(*unpacked, **kwargs), self.where)


@pytest.mark.skipif(not has_compiler(), reason="the host run of the CUDA kernels needs g++")
@pytest.mark.parametrize("kind", WAYS)
def test_arrays_stay_on_their_device(kind, monkeypatch):
    monkeypatch.setattr(DeviceArray, "__array_function__", _with_fft)
    be, shape, table = CudaBackend(DeviceRuntime()), make(kind), samplers.ddpm(SCHEDULE)
    options, x0 = {"seed": 3, "noise_shape": shape}, be.asarray(X0)

    def denoiser(x, t):
        return x * 0.25

    got = [
        shape.colour(x0, backend=be),
        shape.whiten(x0, backend=be),
        *fd.forward_noise(x0, be.asarray(T5, np.int64), SCHEDULE, backend=be, **options),
        fd.forward_chain(x0, SCHEDULE, backend=be, **options),
        *fd.posterior(x0, 3, SCHEDULE, x0=x0, backend=be, noise_shape=shape),
        fd.sample(denoiser, table, n=9, shape=7, batch=4, backend=be, **options),
    ]
    assert be.runtime.reads == []
    want = [
        shape.colour(X0, backend="numpy"),
        shape.whiten(X0, backend="numpy"),
        *fd.forward_noise(X0, T5, SCHEDULE, backend="numpy", **options),
        fd.forward_chain(X0, SCHEDULE, backend="numpy", **options),
        *fd.posterior(X0, 3, SCHEDULE, x0=X0),
        fd.sample(denoiser, table, n=9, shape=7, batch=4, backend="numpy", **options),
    ]
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours._memory, theirs, terms=2000)
    model = fitted(make(kind, 12), backend=be)
    other = fitted(make(kind, 12), backend="numpy")
    x = model.sample(4, sampler="ddim", steps=3)
    assert be.owns(x)
    assert_close(x._memory, other.sample(4, sampler="ddim", steps=3), terms=1000, scale=20)


# ------------------------------------------------------------------------------------------- models

CURVES = fd.data.harmonic_curves(64, points=12, seed=1)
OPTIONS = {"batch": 16, "progress": False}


def fitted(shape, X=CURVES, steps=3, backend="cpu", **options):
    return fd.Diffusion(backend=backend, seed=5, noise_shape=shape).fit(X, steps=steps, **OPTIONS | options)


@pytest.mark.parametrize("kind", WAYS)
def test_a_model_is_a_white_model_of_whitened_data(backend, kind):
    shape = make(kind, 12)
    white = shape.whiten(CURVES.astype(np.float64), backend="numpy")
    model = fitted(shape, backend=backend, validation=0.25)
    other = fitted(None, white, backend=backend, validation=0.25)
    assert_same_bits(model.net.flat, other.net.flat)
    assert model.history == other.history
    for options in ({"sampler": "ddpm", "steps": 9}, {"sampler": "dpmpp_2m", "steps": 5, "ema": False}):
        want = other.sample(5, seed=9, **options)
        assert_same_bits(model.sample(5, seed=9, **options), shape.colour(want, backend=backend))
    x, path = model.sample(5, sampler="ddim", steps=3, trajectory=True)
    want = other.sample(5, sampler="ddim", steps=3, trajectory=True)[1]
    SAME[backend](path[-1], x)
    for state, inner in zip(path, want, strict=True):
        SAME[backend](state, shape.colour(inner, backend=backend))
    assert model.sample(0).shape == (0, 12)


def test_a_multiple_of_the_covariance_is_the_same_model():
    cov = covariance("dense", 12)[0]
    one, four = fitted(NoiseShape.dense(cov)), fitted(NoiseShape.dense(4 * cov))
    assert_same_bits(one.net.flat, four.net.flat)
    assert_same_bits(one.sample(3), four.sample(3))
    assert one.normaliser.log_det(12) == pytest.approx(four.normaliser.log_det(12))


@pytest.mark.parametrize("kind", ["white", *KINDS])
def test_the_log_determinant_is_that_of_the_map(kind):
    normaliser = fitted(make(kind, 12), steps=0).normaliser
    at, step = CURVES[:1].astype(np.float64), 1e-3
    moved = normaliser.apply(at + step * np.eye(12), np.float64) - normaliser.apply(at - step * np.eye(12), np.float64)
    sign, want = np.linalg.slogdet(moved.T / (2 * step))
    assert abs(sign) == 1
    assert normaliser.log_det(12) == pytest.approx(want, rel=1e-9)
    be = fd.get_backend("numpy")
    assert_close(normaliser.invert(normaliser.apply(CURVES, np.float64), be), CURVES.astype(np.float64), terms=100)


@pytest.mark.parametrize("kind", ["white", *KINDS])
def test_a_model_is_saved_and_goes_on(kind, tmp_path, capsys):
    shape, path = make(kind, 12), tmp_path / "m.safetensors"
    model = fitted(shape)
    model.save(path)
    other = fd.load(path, backend="cpu")
    assert other.noise_shape == model.noise_shape == shape
    assert other.normaliser == model.normaliser
    assert_same_bits(other.sample(3), model.sample(3))
    for each in (model, other):
        each.fit(CURVES, steps=2, **OPTIONS)
    assert_same_bits(other.net.flat, model.net.flat)
    assert_same_bits(copy.deepcopy(other).sample(3), model.sample(3))
    assert_same_bits(pickle.loads(pickle.dumps(other)).sample(3), model.sample(3))
    assert main(["info", str(path)]) == 0
    assert f"noise shape {kind}" in " ".join(capsys.readouterr().out.split())
    assert other.reset().noise_shape == shape
    assert_same_bits(other.fit(CURVES, steps=3, **OPTIONS).net.flat, fitted(shape).net.flat)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("dense", {"noise_shape": "sparse"}, "kind"),
        ("dense", {"noise_shape": ["dense"]}, "kind"),
        ("dense", {"noise_shape": None}, "kind"),
        ("dense", {"noise_shape": "diagonal"}, "variances"),
        ("dense", {}, "noise_shape"),
    ],
)
def test_hostile_headers_are_refused(kind, change, words, tmp_path):
    path = tmp_path / "m.safetensors"
    fitted(make(kind, 12)).save(path)
    rewritten(path, lambda header, tensors: header.update(change) if change else header.pop("noise_shape"))
    with pytest.raises(CheckpointError, match=words):
        fd.load(path)


HOSTILE = {
    "absent": ("diagonal", "variances", lambda array: None),
    "negative": ("diagonal", "variances", lambda array: -array),
    "of another size": ("low_rank", "factor", lambda array: array[:-1]),
    "not finite": ("low_rank", "factor", lambda array: array * np.nan),
    "with an axis more": ("low_rank", "factor", lambda array: array[None]),
    "not triangular": ("dense", "root", lambda array: array.T),
    "with a zero on its diagonal": ("dense", "root", lambda array: np.tril(array, -1)),
    "not square": ("dense", "root", lambda array: array[:, :-1]),
    "a number": ("dense", "root", lambda array: array[0, 0]),
    "not symmetric": ("stationary", "power", np.cumsum),
    "without power": ("stationary", "power", np.zeros_like),
    "without values": ("stationary", "power", lambda array: array[:0]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arrays_are_refused(case, tmp_path):
    kind, name, change = HOSTILE[case]
    path = tmp_path / "m.safetensors"
    fitted(make(kind, 12)).save(path)

    def other_array(header, tensors):
        changed = change(tensors.pop(f"noise_shape.{name}"))
        if changed is not None:
            tensors[f"noise_shape.{name}"] = np.array(changed)

    assert name in refused_file(rewritten(path, other_array))


def refused_file(path):
    with pytest.raises(CheckpointError) as caught:
        fd.load(path)
    return str(caught.value)


def test_an_array_too_many_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    fitted(make("dense", 12)).save(path)
    rewritten(path, lambda header, tensors: tensors.update({"noise_shape.factor": np.ones((12, 1))}))
    assert "factor, root" in refused_file(path)


def test_a_file_holds_what_defines_the_shape_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    for kind in KINDS:
        shape = make(kind, 12)
        fitted(shape).save(path, training=False)
        held = {name: array for name, array in load_file(path).items() if name.startswith("noise_shape.")}
        assert held.keys() == {f"noise_shape.{name}" for name in shape.arrays}
        assert fd.load(path).noise_shape == shape


def test_bad_models_are_refused():
    shape = make("dense", 12)
    assert "NoiseShape" in refused("noise_shape", fd.Diffusion, noise_shape=np.eye(3))
    assert "10 values" in refused("noise_shape", fd.Diffusion, fd.MLP(10), noise_shape=shape)
    empty = fd.Diffusion(noise_shape=shape)
    assert "12" in refused("X", empty.fit, CURVES[:, :10], steps=1, progress=False)
    assert empty.normaliser is None
    model = fitted(shape)
    clipped = samplers.ddpm(model.schedule, clip=1.0, prediction="v")
    assert "clip None" in refused("sampler", model.sample, 2, sampler=clipped)


def test_what_a_shape_keeps_for_a_backend_is_its_own():
    """Two backends of one name may be two devices."""
    shape, backends = make("fft", 7), [CpuBackend(threads=1) for _ in range(2)]
    for be in backends:
        shape.fill(be, np.empty((2, 7), np.float32), Draw(0, Stream.INIT))
    first, second = (shape._root.kept[be][np.dtype(np.float32)] for be in backends)
    assert not np.shares_memory(first, second)
    del backends, be
    gc.collect()
    assert len(shape._root.kept) == 0
