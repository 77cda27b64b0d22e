"""The Gaussian base: a model before its first step is the exact denoiser of a Gaussian, and files keep it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import checkpoint
from fastdiff.base import GaussianBase
from fastdiff.covariance import ledoit_wolf
from fastdiff.errors import ArgumentError, CheckpointError

RANDOM = np.random.default_rng(0)
ROWS = (RANDOM.normal(size=(60, 9)) @ np.diag(np.linspace(3, 0.2, 9)) @ RANDOM.normal(size=(9, 9)) + 4).astype(
    np.float32
)
QUIET = {"progress": False, "judge": False}


def untrained(rows=ROWS, *, validation=None, **options):
    return fd.Diffusion(base="gaussian", **options).fit(rows, steps=0, validation=validation, **QUIET)


@pytest.mark.parametrize("prediction", ["v", "noise", "x0", "velocity"])
def test_before_its_first_step_a_model_is_the_gaussian(prediction, backend):
    made = untrained(prediction=prediction, backend=backend)
    inner = made.normaliser.apply(ROWS, np.float64)
    np.testing.assert_allclose(inner.mean(axis=0), 0, atol=1e-12)
    base = made._gaussian
    cov = base.axes @ np.diag(base.variances) @ base.axes.T
    exact = fd.denoisers.Gaussian(np.zeros(9), cov, made.schedule, prediction=prediction)
    x = RANDOM.normal(size=(7, 9)).astype(np.float32)
    for t in (0, 60, 199):
        want = exact.predict(x.astype(np.float64), t, backend="numpy")
        assert_close(made.denoiser().predict(x, t), want, terms=40)


@pytest.mark.slow
def test_its_samples_have_the_moments_of_the_data(backend):
    made = untrained(backend=backend)
    drawn = made.sample(20_000).astype(np.float64)
    moments = ledoit_wolf(ROWS)
    error = np.sqrt(np.outer(np.diag(moments.cov), np.diag(moments.cov)) * 2 / len(drawn))
    assert (np.abs(np.cov(drawn.T) - moments.cov) < 5 * error + 0.02 * np.abs(moments.cov).max()).all()
    assert (np.abs(drawn.mean(axis=0) - moments.mean) < 5 * np.sqrt(np.diag(moments.cov) / len(drawn))).all()


def test_of_many_values_the_leading_axes_are_kept(monkeypatch):
    monkeypatch.setattr("fastdiff.base.SHARES", (1.0,))
    monkeypatch.setattr("fastdiff.base.MOST_AXES", 4)
    made = untrained()
    base = made._gaussian
    assert base.axes.shape == (9, 4)
    cov = ledoit_wolf(made.normaliser.apply(ROWS, np.float64)).cov
    variances = np.linalg.eigvalsh(cov)[::-1]
    np.testing.assert_allclose(base.variances, variances[:4])
    assert base.rest == pytest.approx(variances[4:].mean())
    model_cov = base.axes @ np.diag(base.variances - base.rest) @ base.axes.T + base.rest * np.eye(9)
    exact = fd.denoisers.Gaussian(np.zeros(9), model_cov, made.schedule, prediction="v")
    x = RANDOM.normal(size=(5, 9)).astype(np.float32)
    want = exact.predict(x.astype(np.float64), 70, backend="numpy")
    assert_close(made.denoiser().predict(x, 70), want, terms=40)


@pytest.mark.slow
def test_training_adds_to_it_and_a_file_keeps_it(tmp_path, backend):
    made = fd.Diffusion(base="gaussian", backend=backend).fit(ROWS, steps=6, **QUIET)
    made.save(tmp_path / "m.safetensors")
    again = fd.load(tmp_path / "m.safetensors", backend=backend)
    assert again.base == "gaussian"
    assert_same_bits(again.sample(5), made.sample(5))
    for one in (made, again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        one.fit(ROWS, steps=4, **QUIET)
        assert_same_bits(one.net.flat, made.net.flat)
        assert_same_bits(one.sample(3, seed=1), made.sample(3, seed=1))
    whole = fd.Diffusion(base="gaussian", backend=backend).fit(ROWS, steps=10, **QUIET)
    if backend == "cpu":
        assert_same_bits(whole.net.flat, made.net.flat)


@pytest.mark.parametrize("rank", [6, 2])
def test_a_first_layer_is_turned_to_the_axes(rank):
    """By a matrix with the axes of the base and roots of roots of its variances, of as many squares as the identity."""
    axes = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
    variances = np.array([9.0, 4.0, 1.0, 0.5, 0.5, 0.0])
    variances[rank:] = 0.25
    base = GaussianBase(np.ascontiguousarray(axes[:, :rank]), variances[:rank], 0.25)
    turned = base.turned(np.eye(6))
    floor = np.maximum(variances, 9e-6)
    np.testing.assert_allclose(turned, axes @ np.diag(np.sqrt(np.sqrt(floor) / np.sqrt(floor).mean())) @ axes.T)
    assert np.sum(turned**2) == pytest.approx(6)
    none = GaussianBase(axes, np.zeros(6), 0.0)
    assert none.turned(axes) is axes


def test_a_new_network_starts_along_the_axes_and_a_trained_one_as_it_is(tmp_path):
    plain = fd.MLP(9, hidden=(128,) * 3, T=200)
    chosen, given = fd.Diffusion().fit(ROWS, steps=0, **QUIET), untrained(net=fd.MLP(9, hidden=(128,) * 3, T=200))
    first = plain.params["layers.0.weight"]
    assert_same_bits(given.net.params["layers.0.weight"], chosen.net.params["layers.0.weight"])
    trained = fd.MLP(9, hidden=(128,) * 3, T=200)
    trained.params["layers.0.weight"][3, 5] += 1
    before = trained.params["layers.0.weight"].copy()
    assert_same_bits(untrained(net=trained).net.params["layers.0.weight"], before)
    want = chosen._gaussian.turned(first.astype(np.float64))
    np.testing.assert_allclose(chosen.net.params["layers.0.weight"], want, rtol=1e-6)
    assert not np.allclose(want, first, rtol=0.1)
    assert_same_bits(chosen._average, chosen.net.flat)
    assert_same_bits(chosen.net.params["layers.1.weight"], plain.params["layers.1.weight"])
    chosen.save(tmp_path / "m.safetensors")
    for again in (chosen, fd.load(tmp_path / "m.safetensors")):
        again.reset().fit(ROWS, steps=0, **QUIET)
        np.testing.assert_allclose(again.net.params["layers.0.weight"], want, rtol=1e-6)


def test_one_axis_of_many_is_learned():
    """The level of curves is uniform, and has nearly all of their variance: no few steps taught it before."""
    random = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 6, 52) + random.uniform(0, 2 * np.pi, (100, 1)))
    X = random.uniform(-10, 10, (100, 1)) + 0.6 * waves + 0.1 * random.normal(size=(100, 52))
    levels = fd.Diffusion().fit(X, steps=400, jitter=True, **QUIET).sample(500).mean(axis=1)
    fourth = np.mean((levels - levels.mean()) ** 4) / levels.var() ** 2
    assert fourth < 2.6  # 1.8 of a uniform law, 3 of a Gaussian


def test_a_batch_and_a_trajectory_change_no_bits():
    made = fd.Diffusion(base="gaussian", backend="cpu").fit(ROWS, steps=6, **QUIET)
    whole = made.sample(200)
    assert_same_bits(made.sample(200, batch=7), whole)
    assert_same_bits(made.sample(3, trajectory=True)[0], whole[:3])
    assert_same_bits(made.sample(3, trajectory=True)[1][-1], whole[:3])


def test_smooth_rows_want_less_shrinkage_and_noisy_ones_all_of_it():
    t, phase = np.arange(40), RANDOM.uniform(0, 6, size=(60, 3, 1))
    smooth = np.sum(RANDOM.normal(size=(60, 3, 1)) * np.sin(0.1 * t + phase), axis=1)
    whole = ledoit_wolf(smooth - smooth.mean(axis=0))
    assert GaussianBase.of(smooth).rest < 0.1 * whole.shrinkage * whole.variance
    noisy = RANDOM.normal(size=(60, 40))
    whole = ledoit_wolf(noisy)
    assert GaussianBase.of(noisy).rest == whole.shrinkage * whole.variance


def test_who_gets_one():
    own = fd.MLP(9, hidden=(8,), T=20)
    assert fd.Diffusion().fit(ROWS, steps=0, **QUIET)._gaussian is not None
    assert fd.Diffusion(base=None).fit(ROWS, steps=0, **QUIET)._gaussian is None
    assert fd.Diffusion(own).fit(ROWS, steps=0, **QUIET)._gaussian is None
    made = fd.Diffusion(own, base="gaussian").fit(ROWS, steps=0, **QUIET)
    assert made.net.plan.linear is not None
    assert made.reset().net.plan.linear is None
    assert fd.Diffusion(fd.MLP.tutorial(9, T=20), base="gaussian").fit(ROWS, steps=2, **QUIET).sample(2).shape == (2, 9)


@pytest.mark.parametrize("rows", [np.ones((9, 4)), RANDOM.normal(size=(2, 30)), np.eye(3), RANDOM.normal(size=(1, 5))])
def test_odd_rows_have_one_as_well(rows):
    drawn = untrained(rows.astype(np.float32)).sample(50)
    assert np.isfinite(drawn).all()
    if (rows == rows[0]).all():
        np.testing.assert_allclose(drawn, np.broadcast_to(rows[0], drawn.shape), atol=1e-3)


def test_networks_of_pictures_have_none():
    with pytest.raises(ArgumentError, match="base: got 'gaussian', wants None: a network of kind 'unet'"):
        fd.Diffusion(fd.UNet((8, 8, 1), channels=(4,)), base="gaussian")
    with pytest.raises(ArgumentError, match="base: got 'normal', wants one of"):
        fd.Diffusion(base="normal")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("base.axes", np.ones((9, 9)), "off orthonormal"),
        ("base.axes", np.where(np.eye(9, dtype=bool), -1e200, 1e200), "off orthonormal"),
        ("base.axes", np.eye(9)[:, :0], "1 to 9 axes"),
        ("base.axes", np.eye(8), "base.axes: got shape"),
        ("base.variances", -np.ones(9), "at least 0"),
        ("base.rest", np.full(1, np.nan), "base.rest"),
        ("base.rest", None, "base.rest: got no such tensor"),
        ("normaliser.centre", np.ones(3), "normaliser.centre"),
    ],
)
def test_a_file_with_another_base_is_refused(name, value, message, tmp_path):
    made = untrained()
    path = tmp_path / "m.safetensors"
    made.save(path)
    header, tensors = checkpoint.read(path)
    tensors = {key: array for key, array in {**tensors, name: value}.items() if array is not None}
    checkpoint.write(path, header, tensors, features=header["features"])
    with pytest.raises(CheckpointError, match=message):
        fd.load(path)


@pytest.mark.parametrize("prediction", ["v", "noise", "x0", "velocity"])
def test_the_linear_loss_is_that_of_the_linear_prediction(prediction):
    """In closed form, against the expectation by covariances: of f z + g x0 - A x with the base's own A at every t."""
    rng = np.random.default_rng(0)
    schedule = fd.Schedule.flow(7, shift=1.0) if prediction == "velocity" else fd.Schedule.cosine(7)
    schedule = fd.Schedule.cosine(7) if prediction == "noise" else schedule
    axes = np.linalg.qr(rng.standard_normal((5, 5)))[0][:, :3]
    base = GaussianBase(axes, np.array([3.0, 1.0, 0.2]), 0.05)
    cov = axes @ np.diag(base.variances - base.rest) @ axes.T + base.rest * np.eye(5)
    weight = rng.random(7) + 0.5
    linear, expected = base.linear(schedule, prediction), []
    of_noise, of_x0 = schedule.target(prediction)
    for t in range(7):
        A = axes @ np.diag(linear.gains[t]) @ axes.T + linear.rest[t] * np.eye(5)
        on_x0 = of_x0[t] * np.eye(5) - schedule.signal[t] * A
        on_noise = of_noise[t] * np.eye(5) - schedule.noise[t] * A
        expected.append(np.trace(on_x0 @ cov @ on_x0.T + on_noise @ on_noise.T) / 5)
    np.testing.assert_allclose(base.loss(schedule, prediction), np.mean(expected), rtol=1e-12)
    np.testing.assert_allclose(base.loss(schedule, prediction, weight), np.mean(weight * expected), rtol=1e-12)


def test_a_model_knows_the_loss_of_its_base():
    X = fd.data.harmonic_curves(4000, points=8)
    model = untrained(X, net=fd.MLP(8, hidden=(8,), T=20), backend="numpy", validation=0.0)
    z, s, errors = model.normaliser.apply(X, np.float64), model.schedule, []
    denoiser = model.denoiser(ema=False)
    for t in range(s.T):
        eps = fd.normal(z.shape, seed=t, backend="numpy")
        out = denoiser.predict((s.signal[t] * z + s.noise[t] * eps).astype(np.float32), t)
        errors.append(np.mean((out - (s.signal[t] * eps - s.noise[t] * z)) ** 2))
    assert np.mean(errors) == pytest.approx(model.linear_loss(), rel=0.01)
    assert model.linear_loss(X) == pytest.approx(model.linear_loss(), rel=1e-3)
    plain = fd.Diffusion(fd.MLP(8, hidden=(8,), T=20), fd.Schedule.cosine(20), backend="numpy")
    with pytest.raises(fd.errors.TrainingError):
        plain.linear_loss(X)
    plain.fit(X, steps=1, batch=4, progress=False)
    assert plain.linear_loss(X) == pytest.approx(model.linear_loss(), rel=0.02)
    for given in (None, X[:, :4]):
        with pytest.raises(fd.errors.ArgumentError, match=r"^X"):
            plain.linear_loss(given)
