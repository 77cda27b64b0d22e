"""Noising, the Markov chain, the posterior, and running a table over any denoiser."""

import itertools
import math
import tracemalloc

import naive
import numpy as np
import pytest
from gradcheck import scatter
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import three_back
from tolerances import WORKSPACE, assert_close, assert_estimate, assert_same_bits

from fastdiff import samplers
from fastdiff.backends import get_backend
from fastdiff.errors import ArgumentError
from fastdiff.exact import Gaussian
from fastdiff.nn import MLP
from fastdiff.noise import Stream, normal
from fastdiff.process import forward_chain, forward_noise, posterior
from fastdiff.samplers import Sampler, ddim, ddpm, dpmpp_2m
from fastdiff.sampling import sample
from fastdiff.schedule import Schedule

SCHEDULE = Schedule.cosine(12)
RNG = np.random.default_rng(0)
X0 = RNG.normal(size=(5, 7)).astype(np.float32)
T5 = np.array([0, 3, 11, 3, 7])


def refused(argument, function, *args, **kwargs):
    with pytest.raises(ArgumentError) as caught:
        function(*args, **kwargs)
    assert caught.value.argument == argument, caught.value
    return str(caught.value)


# ------------------------------------------------------------------------------------------- noising


@pytest.mark.parametrize("t", [T5, 4, np.uint8(4), T5.tolist(), T5.astype(np.int16)])
def test_forward_noise_is_its_formula(backend, t):
    x_t, eps = forward_noise(X0, t, SCHEDULE, seed=6, first_sample=2**32 - 2, backend=backend)
    z = naive.normal(5, 7, seed=6, stream=Stream.FORWARD, first_sample=2**32 - 2)
    steps = np.broadcast_to(t, 5)
    assert_same_bits(eps, z)
    assert_same_bits(x_t, naive.forward_noise(X0, steps, SCHEDULE.signal, SCHEDULE.noise, z))


def test_a_sample_has_the_same_noise_at_every_t_and_in_any_batch(backend):
    _, eps = forward_noise(X0, T5, SCHEDULE, seed=6, backend=backend)
    _, other = forward_noise(X0, 11, SCHEDULE, seed=6, backend=backend)
    assert_same_bits(other, eps)
    whole, _ = forward_noise(X0, T5, SCHEDULE, seed=6, backend=backend)
    part, _ = forward_noise(X0[3:], T5[3:], SCHEDULE, seed=6, first_sample=3, backend=backend)
    assert_same_bits(part, whole[3:])


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2), (0, 4), (2, 0), (4, 1)])
def test_any_shape(backend, shape):
    x0 = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    x_t, eps = forward_noise(x0, 5, SCHEDULE, backend=backend)
    flat, _ = forward_noise(x0.reshape(shape[0], math.prod(shape[1:])), 5, SCHEDULE, backend=backend)
    assert x_t.shape == eps.shape == shape
    assert_same_bits(x_t, flat.reshape(shape))
    assert forward_chain(x0, SCHEDULE, backend=backend).shape == (13, *shape)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "u1", "i8", "u8"])
def test_any_real_dtype(backend, dtype):
    x0 = (np.arange(35).reshape(5, 7) * 3).astype(dtype)
    wide = backend == "numpy" and dtype == "f8"
    x_t, eps = forward_noise(x0, T5, SCHEDULE, backend=backend)
    assert x_t.dtype == eps.dtype == (np.float64 if wide else np.float32)
    z = naive.normal(5, 7, seed=0, stream=Stream.FORWARD)
    real = np.float64 if wide else np.float32
    assert_same_bits(x_t, naive.forward_noise(x0.astype(real), T5, SCHEDULE.signal, SCHEDULE.noise, z, real))


def test_any_layout_is_read_and_left_alone(backend):
    want, _ = forward_noise(X0, T5, SCHEDULE, backend=backend)
    chain = forward_chain(X0, SCHEDULE, backend=backend)
    spaced = np.zeros((10, 14), np.float32)
    spaced[::2, ::2] = X0
    frozen = X0.copy()
    frozen.flags.writeable = False
    for x0 in (np.asfortranarray(X0), spaced[::2, ::2], X0[:, ::-1].copy()[:, ::-1], frozen):
        kept = np.array(x0)
        assert_same_bits(forward_noise(x0, T5, SCHEDULE, backend=backend)[0], want)
        assert_same_bits(forward_chain(x0, SCHEDULE, backend=backend), chain)
        assert np.array_equal(x0, kept)


def test_out_is_filled_and_returned(backend):
    want, _ = forward_noise(X0, T5, SCHEDULE, backend=backend)
    out = np.full_like(X0, np.nan)
    got, _ = forward_noise(X0, T5, SCHEDULE, out=out, backend=backend)
    assert got is out
    assert_same_bits(out, want)


@pytest.mark.parametrize("shift", [-3, 0, 3])
def test_out_may_overlap_the_input(backend, shift):
    want, eps = forward_noise(X0, T5, SCHEDULE, backend=backend)
    buffer = np.zeros(41, np.float32)
    x0, out = buffer[3:38].reshape(5, 7), buffer[3 + shift : 38 + shift].reshape(5, 7)
    x0[...] = X0
    got, drawn = forward_noise(x0, T5, SCHEDULE, out=out, backend=backend)
    assert_same_bits(got, want)
    assert_same_bits(drawn, eps)


def test_out_of_the_wrong_kind_is_refused_and_left_alone(backend):
    frozen = np.zeros_like(X0)
    frozen.flags.writeable = False
    for out in (np.zeros((5, 7)), np.zeros((7, 5), np.float32), np.zeros((5, 14), np.float32)[:, ::2], frozen, [0.0]):
        refused("out", forward_noise, X0, T5, SCHEDULE, out=out, backend=backend)
        assert not np.any(out)


BAD_ARRAYS = [*(np.ones((5, 7), dtype) for dtype in (complex, bool, object, str)), 1.0, None, [[1], [1, 2]]]
BAD_VALUES = [np.full((5, 7), bad) for bad in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize("x0", [*BAD_ARRAYS, *BAD_VALUES], ids=repr)
def test_bad_arrays_are_refused(backend, x0):
    refused("x0", forward_noise, x0, 3, SCHEDULE, backend=backend)
    refused("x0", forward_chain, x0, SCHEDULE, backend=backend)
    refused("x_t", posterior, x0, 3, SCHEDULE, x0=X0)
    if x0 is not None:
        refused("noise", posterior, X0, 3, SCHEDULE, noise=x0)


def test_values_that_float32_cannot_hold_are_refused():
    refused("x0", forward_noise, np.full((5, 7), 1e300), 3, SCHEDULE, backend="cpu")
    refused("x0", forward_chain, np.full((5, 7), 1e300), SCHEDULE, backend="cpu")
    assert np.isfinite(forward_noise(np.full((5, 7), 1e300), 3, SCHEDULE, backend="numpy")[0]).all()


@pytest.mark.parametrize("t", [-1, 12, [0, 0, 0, 0, 12], [0, 1], 1.0, True, None, "3"])
def test_bad_timesteps_are_refused(backend, t):
    refused("t", forward_noise, X0, t, SCHEDULE, backend=backend)
    refused("t", posterior, X0, t, SCHEDULE, x0=X0)


def test_other_bad_input_is_refused(backend):
    for function, args in ((forward_noise, (X0, 3)), (forward_chain, (X0,))):
        refused("schedule", function, *args, [0.1, 0.2], backend=backend)
        refused("seed", function, *args, SCHEDULE, seed=-1, backend=backend)
        refused("first_sample", function, *args, SCHEDULE, first_sample=2**56 - 4, backend=backend)
        refused("backend", function, *args, SCHEDULE, backend="gpu")
    refused("schedule", posterior, X0, 3, None, x0=X0)


# ------------------------------------------------------------------------------------------- the chain


def chain_noise(first=0, seed=6):
    return lambda t: naive.normal(5, 7, seed=seed, stream=Stream.CHAIN, step=t, first_sample=first)


def test_forward_chain_is_its_formula(backend):
    chain = forward_chain(X0, SCHEDULE, seed=6, first_sample=2**32 - 2, backend=backend)
    assert_same_bits(chain, naive.forward_chain(X0, SCHEDULE.betas, chain_noise(2**32 - 2)))


def test_forward_chain_in_float64():
    x0 = X0.astype(np.float64)
    chain = forward_chain(x0, SCHEDULE, seed=6, backend="numpy")
    assert_same_bits(chain, naive.forward_chain(x0, SCHEDULE.betas, chain_noise(), np.float64))


def test_chain_and_jump_have_the_same_distribution():
    schedule = Schedule([0.1, 0.3, 0.2, 0.5, 0.7, 0.9])
    n, x0 = 60_000, 1.7
    chain = forward_chain(np.full((n, 1), x0), schedule, seed=11)
    for t in range(schedule.T):
        jump, _ = forward_noise(np.full((n, 1), x0), t, schedule, seed=12)
        for state in (chain[t + 1], jump):
            assert_estimate(state.mean(), schedule.signal[t] * x0, schedule.noise[t] / math.sqrt(n))
            assert_estimate(state.var(), schedule.noise[t] ** 2, schedule.noise[t] ** 2 * math.sqrt(2 / n))


# ------------------------------------------------------------------------------------------- the posterior


def test_both_forms_of_the_posterior_are_bayes_rule():
    x0, noise = RNG.normal(size=(2, 5, 2, 3))
    signal, sigma = SCHEDULE.signal[T5][:, None, None], SCHEDULE.noise[T5][:, None, None]
    x_t = signal * x0 + sigma * noise
    for known in ({"x0": x0}, {"noise": noise}):
        mean, var = posterior(x_t, T5, SCHEDULE, **known)
        assert mean.shape == (5, 2, 3)
        assert mean.dtype == var.dtype == np.float64
        assert var.shape == (5, 1, 1)
        for k, i, j in np.ndindex(mean.shape):
            want = naive.posterior(x_t[k, i, j], x0[k, i, j], T5[k], SCHEDULE.betas)
            # near t = 0 the noise is small, and what is divided by it loses that many digits
            assert_close(mean[k, i, j], want[0], scale=4 / SCHEDULE.noise[T5[k]] ** 2)
            assert_close(var[k, 0, 0], want[1], scale=4)


def test_the_posterior_is_what_the_chain_does():
    """Given x_t and x_0, the state before is normal with this mean and this variance."""
    schedule = Schedule([0.1, 0.3, 0.2, 0.5])
    n = 60_000
    x0 = np.full((n, 1), -0.8)
    chain = forward_chain(x0, schedule, seed=3, backend="cpu").astype(np.float64)
    for t in range(1, schedule.T):
        mean, var = posterior(chain[t + 1], t, schedule, x0=x0)
        residual = chain[t] - mean
        variance = float(var[0, 0])
        assert_estimate(residual.mean(), 0, math.sqrt(variance / n))
        assert_estimate(residual.var(), variance, variance * math.sqrt(2 / n))
        centred = chain[t + 1] - chain[t + 1].mean()
        assert_estimate((residual * centred).mean(), 0, math.sqrt(variance * centred.var() / n))
    mean, var = posterior(chain[1], 0, schedule, x0=x0)
    assert_close(mean, x0)
    assert not var.any()


def test_the_posterior_keeps_float32(backend):
    x_t, noise = forward_noise(X0, T5, SCHEDULE, backend=backend)
    assert posterior(x_t, T5, SCHEDULE, x0=X0)[0].dtype == np.float32
    assert posterior(x_t, T5, SCHEDULE, noise=noise)[0].dtype == np.float32
    assert posterior(x_t, T5, SCHEDULE, noise=noise.astype(np.float64))[0].dtype == np.float64


def test_the_posterior_takes_exactly_one():
    assert "neither" in refused("x0, noise", posterior, X0, 3, SCHEDULE)
    assert "both" in refused("x0, noise", posterior, X0, 3, SCHEDULE, x0=X0, noise=X0)
    refused("x0", posterior, X0, 3, SCHEDULE, x0=X0[:, :3])


# ------------------------------------------------------------------------------------------- sampling

TABLES = {
    "ddpm": lambda: ddpm(SCHEDULE, clip=0.8),
    "ddim": lambda: ddim(SCHEDULE, 5, eta=0.7, prediction="v"),
    "dpmpp_2m": lambda: dpmpp_2m(SCHEDULE, 6, clip=(-0.5, 2.0), prediction="x0"),
    "every term": lambda: Sampler(
        [
            (9, 1.1, -0.4, 0.3, 0.7, 0, 0.1, 0.5),
            (9, 0.9, 0.2, 0.8, -0.1, 0.3, 0, 0),
            (2, 0.1, 1, 0, 0.5, -0.6, 0.3, 0.2),
        ],
        SCHEDULE,
        clip=(-0.7, 0.6),
    ),
    "three back": lambda: three_back(SCHEDULE, clip=(-0.7, 0.6)),
}
tables = pytest.mark.parametrize("name", TABLES)


def wave(x, t):
    """Some denoiser, elementwise, so that its bits depend on no batch."""
    return np.float32(0.5) * x + np.float32(math.cos(t))


class Predictor:
    """The same, as an object."""

    def predict(self, x, t):
        return wave(x, t)


def loop(smp, n, width, *, seed, first=0, initial=None):
    """The states of `smp` over `wave`, one number at a time."""
    x = naive.normal(n, width, seed=seed, stream=Stream.INIT, first_sample=first) if initial is None else initial.copy()
    memory, states = np.zeros((*x.shape, 3), x.dtype), [x.copy()]
    for row in smp.rows:
        z = naive.normal(n, width, seed=seed, stream=Stream.STEP, step=row.step, first_sample=first)
        out = wave(x, row.t)
        for at in np.ndindex(x.shape):
            x[at], memory[at] = naive.sampler_step(x[at], out[at], tuple(memory[at]), z[at], row[1:10], smp.clip)
        states.append(x.copy())
    return np.array(states)


@tables
def test_sampling_is_the_table_law(backend, name):
    smp = TABLES[name]()
    want = loop(smp, 4, 6, seed=2**64 - 1, first=2**32 - 1)
    at = {"n": 4, "shape": (3, 2), "seed": 2**64 - 1, "first_sample": 2**32 - 1, "backend": backend}
    x, path = sample(wave, smp, **at, trajectory=True)
    assert_same_bits(path, want.reshape(-1, 4, 3, 2))
    assert_same_bits(x, path[-1])
    assert_same_bits(sample(wave, smp, **at), x)
    assert_same_bits(sample(Predictor(), smp, **at), x)
    assert_same_bits(sample(lambda x, t: wave(x, t).tolist(), smp, **at), x)


@given(st.sampled_from(sorted(TABLES)), st.integers(0, 11), st.integers(1, 12), st.integers(0, 2**64 - 1))
@settings(max_examples=25)
def test_samples_do_not_depend_on_batch_or_backend(name, cut, batch, seed):
    smp = TABLES[name]()
    whole = sample(wave, smp, n=11, shape=5, seed=seed, backend="numpy")
    for be in ("numpy", "cpu"):
        first = sample(wave, smp, n=cut, shape=5, seed=seed, batch=batch, backend=be)
        rest = sample(wave, smp, n=11 - cut, shape=5, seed=seed, first_sample=cut, batch=batch, backend=be)
        assert_same_bits(np.concatenate([first, rest]), whole)
        watched = sample(wave, smp, n=11, shape=5, seed=seed, batch=batch, backend=be, callback=lambda i, t, x: None)
        assert_same_bits(watched, whole)


def test_a_batch_bounds_what_the_denoiser_sees(backend):
    seen = []

    def watch(x, t):
        seen.append((len(x), t))
        return wave(x, t)

    sample(watch, ddim(SCHEDULE, 2), n=5, shape=(3,), batch=2, backend=backend)
    assert seen == [(2, 11), (2, 5), (2, 11), (2, 5), (1, 11), (1, 5)]


def test_the_timestep_is_an_int_and_the_state_is_the_denoisers_own(backend):
    smp = TABLES["every term"]()
    want = sample(wave, smp, n=3, shape=(4,), backend=backend)

    def vandal(x, t):
        assert type(t) is int
        out = wave(x, t)
        x[...] = np.nan
        return out

    assert_same_bits(sample(vandal, smp, n=3, shape=(4,), backend=backend), want)


@pytest.mark.parametrize("net", [MLP(7, hidden=(9, 5), T=12), MLP.tutorial(7, T=12)], ids=["default", "tutorial"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "three back"])
def test_a_network_gives_the_same_bits_fused_and_stepwise(net, name):
    smp, at = TABLES[name](), {"n": 141, "seed": 5, "backend": "cpu"}
    fused = sample(scatter(net), smp, **at)
    path = sample(net, smp, **at, trajectory=True)[1]
    assert_same_bits(path[-1], fused)
    assert_same_bits(sample(net, smp, **at, callback=lambda i, t, x: None), fused)
    assert_same_bits(sample(net, smp, **at, batch=13), fused)
    assert_same_bits(sample(lambda x, t: net.predict(x, t, backend="cpu"), smp, shape=7, **at), fused)
    assert_same_bits(sample(net, smp, n=20, seed=5, first_sample=121, backend="cpu"), fused[121:])
    for threads in (1, 3):
        assert_same_bits(sample(net, smp, n=141, seed=5, backend=get_backend("cpu", threads=threads)), fused)
    assert_same_bits(path[0], normal((141, 7), seed=5, stream="init"))


@pytest.mark.parametrize("name", ["ddpm", "three back"])
def test_backends_agree_on_a_network(name):
    net = scatter(MLP(7, hidden=(9, 5), T=12))
    smp = TABLES[name]()
    assert_close(sample(net, smp, n=9, backend="cpu"), sample(net, smp, n=9, backend="numpy"), terms=12 * 32)


def test_a_float64_network_runs_where_float64_runs():
    net = scatter(MLP(7, hidden=(9,), T=12, dtype="float64"))
    smp = ddpm(SCHEDULE, clip=1.0)
    initial = RNG.normal(size=(3, 7))
    assert sample(net, smp, initial=initial, backend="numpy").dtype == np.float64
    for extra in ({}, {"trajectory": True}):
        refused("backend", sample, net, smp, n=3, backend="cpu", **extra)


def test_defaults_and_initial(backend):
    gaussian = Gaussian(np.zeros(3), np.eye(3), SCHEDULE)
    smp = ddim(SCHEDULE, 4)
    assert sample(gaussian, smp, backend=backend).shape == (16, 3)
    assert sample(gaussian, smp, n=0, backend=backend).shape == (0, 3)
    assert sample(wave, smp, shape=np.int64(3), backend=backend).shape == (16, 3)
    assert sample(wave, smp, shape=[3, 2], backend=backend).shape == (16, 3, 2)
    start = X0.copy()
    want = loop(smp, 5, 7, seed=0, initial=start)
    x, path = sample(wave, smp, initial=start, trajectory=True, backend=backend)
    assert_same_bits(path, want)
    assert_same_bits(start, X0)
    assert x.dtype == np.float32
    whole = sample(wave, smp, initial=(X0 * 4).astype(np.int8), backend=backend)
    assert_same_bits(whole, sample(wave, smp, initial=(X0 * 4).astype(np.int8).astype(np.float32), backend=backend))


def test_float64_stays_on_numpy_only():
    start = RNG.normal(size=(4, 3))
    smp = TABLES["every term"]()
    x, path = sample(lambda x, t: 0.5 * x, smp, initial=start, trajectory=True, backend="numpy")
    assert x.dtype == path.dtype == np.float64
    assert sample(lambda x, t: 0.5 * x, smp, initial=start, backend="cpu").dtype == np.float32


def test_no_samples(backend):
    for smp in (make() for make in TABLES.values()):
        x, path = sample(wave, smp, n=0, shape=(4,), trajectory=True, backend=backend)
        assert x.shape == (0, 4)
        assert path.shape == (len(smp) + 1, 0, 4)


def test_the_callback_sees_every_state_and_can_stop(backend):
    smp = TABLES["every term"]()
    path = sample(wave, smp, n=3, shape=(2, 2), trajectory=True, backend=backend)[1]
    seen = []

    def watch(i, t, x):
        seen.append((i, t))
        assert_same_bits(x, path[i + 1])
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0
        return i == 1

    x, stopped = sample(wave, smp, n=3, shape=(2, 2), trajectory=True, callback=watch, backend=backend)
    assert seen == [(0, 9), (1, 9)]
    assert_same_bits(stopped, path[:3])
    assert_same_bits(x, path[2])
    x[...] = 0  # the result is the caller's
    assert sample(wave, smp, n=3, shape=(2, 2), callback=lambda i, t, x: False, backend=backend).shape == (3, 2, 2)


def test_progress_changes_nothing(backend, capsys, monkeypatch):
    monkeypatch.setattr("fastdiff.progress.FIRST", 0)
    smp = TABLES["ddpm"]()
    want = sample(wave, smp, n=3, shape=(4,), backend=backend)
    assert_same_bits(sample(wave, smp, n=3, shape=(4,), progress=True, backend=backend), want)
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    "output", [np.ones((3, 2)), np.ones((1, 4)), np.ones((3, 4), complex), None, "no", [[1], [1, 2]], 1.0], ids=repr
)
def test_a_denoiser_that_returns_something_else_is_refused(backend, output):
    refused("denoiser output", sample, lambda x, t: output, ddim(SCHEDULE, 2), n=3, shape=4, backend=backend)


def test_a_denoiser_may_return_values_that_are_not_finite(backend):
    with np.errstate(invalid="ignore"):
        x = sample(lambda x, t: x * np.float32(math.nan), ddim(SCHEDULE, 2), n=3, shape=4, backend=backend)
    assert np.isnan(x).all()


@pytest.mark.parametrize(
    ("bad", "argument"),
    [
        ({"denoiser": 3}, "denoiser"),
        ({"denoiser": None}, "denoiser"),
        ({"denoiser": MLP(4, T=11)}, "denoiser"),
        ({"denoiser": Gaussian(np.zeros(4), np.eye(4), SCHEDULE, prediction="v")}, "denoiser"),
        ({"denoiser": MLP(5, T=12)}, "shape"),
        ({"sampler": "ddpm"}, "sampler"),
        ({"sampler": None}, "sampler"),
        ({"n": -1}, "n"),
        ({"n": 2.0}, "n"),
        ({"shape": None}, "shape"),
        ({"shape": ("a",)}, "shape"),
        ({"shape": 4.0}, "shape"),
        ({"shape": (0,)}, "shape"),
        ({"shape": (-4,)}, "shape"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"first_sample": 2**56 - 2}, "first_sample"),
        ({"batch": 0}, "batch"),
        ({"batch": 1.5}, "batch"),
        ({"backend": "gpu"}, "backend"),
        ({"initial": np.zeros((2, 4))}, "initial"),
        ({"initial": np.zeros((3, 5))}, "initial"),
        ({"initial": np.full((3, 4), math.nan)}, "initial"),
        ({"initial": np.ones((3, 4), complex)}, "initial"),
        ({"initial": 3.0}, "initial"),
        ({"initial": 3.0, "n": None, "shape": None}, "initial"),
    ],
)
def test_bad_input_is_refused_by_name(bad, argument):
    good = {"denoiser": wave, "sampler": ddim(SCHEDULE, 2), "n": 3, "shape": (4,)}
    refused(argument, sample, **good | bad)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
def test_memory_grows_by_what_is_returned(name):
    net = scatter(MLP(256, hidden=(8,), T=12))
    for denoiser, smp in itertools.product((net, wave), (TABLES[name](),)):
        excess = []
        for n in (600, 3000):
            tracemalloc.start()
            try:
                x = sample(denoiser, smp, n=n, shape=(256,), batch=64)
                excess.append(tracemalloc.get_traced_memory()[1] - x.nbytes)
            finally:
                tracemalloc.stop()
        assert excess[1] - excess[0] < WORKSPACE


def test_every_name_of_a_table_runs(backend):
    for name in ("ddpm", "ddim", "dpmpp_2m"):
        assert np.isfinite(sample(wave, samplers.named(name, SCHEDULE), n=2, shape=3, backend=backend)).all()
