"""What an error counts: min-SNR weights, and the bound that a variance is learned by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gradcheck import assert_gradient
from tolerances import assert_close, assert_same_bits

import fastdiff as fd
from fastdiff import checkpoint, samplers
from fastdiff.backends.layers import Batch
from fastdiff.backends.numpy.functions import squared_error
from fastdiff.errors import ArgumentError, ScheduleWarning
from fastdiff.nn.optim import TrainingPlan
from fastdiff.schedule import PREDICTIONS, Schedule
from fastdiff.training import loss_terms

MIN_SNR = TrainingPlan(weighting="min_snr")
ROWS = np.random.default_rng(0).normal(size=(40, 6))
QUIET = {"progress": False, "judge": False}


def weights(schedule, prediction, plan=MIN_SNR):
    return loss_terms(schedule, prediction, plan)[:, 0]


def test_golden_min_snr():
    linear = Schedule.linear()
    assert weights(linear, "noise")[[0, 100, 300]] == pytest.approx([5.0005e-4, 0.585709, 1], rel=2e-6)
    assert weights(linear, "v")[[0, 100, 300]] == pytest.approx([5e-4, 0.524292, 0.394011], rel=2e-6)
    snr = np.exp(linear.log_snr)
    np.testing.assert_allclose(weights(linear, "x0"), np.minimum(snr, 5), rtol=1e-9)
    np.testing.assert_allclose(
        weights(linear, "x0", TrainingPlan(weighting="min_snr", snr_gamma=0.3)), np.minimum(snr, 0.3), rtol=1e-9
    )
    assert loss_terms(linear, "v", TrainingPlan()) is None


@pytest.mark.parametrize("schedule", [Schedule.cosine(20), Schedule.flow(20)])
def test_the_weight_is_that_of_an_error_of_x0(schedule):
    """An error d of the prediction is one of x0, whose square counts min(SNR, 5)."""
    x0, noise, d = 0.7, -0.3, 1e-3
    for prediction in PREDICTIONS if schedule.signal[-1] > 0 else PREDICTIONS[1:]:
        of_noise, of_data = schedule.target(prediction)
        found = loss_terms(schedule, prediction, MIN_SNR) if schedule.signal[-1] else None
        if found is None:
            with pytest.warns(ScheduleWarning, match="no weight: .* Take weighting='uniform'"):
                found = loss_terms(schedule, prediction, MIN_SNR)
        for t in range(schedule.T):
            alpha, sigma = schedule.signal[t], schedule.noise[t]
            out = of_noise[t] * noise + of_data[t] * x0 + d
            there = np.linalg.solve([[alpha, sigma], [of_data[t], of_noise[t]]], [alpha * x0 + sigma * noise, out])[0]
            want = min((alpha / sigma) ** 2, 5) * (there - x0) ** 2
            assert found[t, 0] * d**2 == pytest.approx(want, rel=1e-7)


def test_a_model_learns_with_weights(any_backend, tmp_path):
    """The loss is that of the weighted rows, goes to the file, and goes on from there."""
    schedule, fit = Schedule.cosine(20), {"weighting": "min_snr", "snr_gamma": 2.0, "batch": 200, **QUIET}

    def made():
        return fd.Diffusion(fd.MLP(6, hidden=(8,), T=20), schedule, seed=1, backend=any_backend)

    model, even = made(), made()
    model.fit(ROWS, steps=2, validation=0.2, **fit)
    even.fit(ROWS, steps=2, validation=0.2, batch=200, **QUIET)
    want = weights(schedule, "v", TrainingPlan(weighting="min_snr", snr_gamma=2.0)).mean()
    assert model.history["loss"][0] == pytest.approx(want * even.history["loss"][0], rel=0.2)
    assert model.history["validation_loss"][0] == pytest.approx(want * even.history["validation_loss"][0], rel=0.5)
    assert not np.array_equal(model.net.flat, even.net.flat)
    model.save(tmp_path / "m.safetensors")
    assert checkpoint.describe(tmp_path / "m.safetensors")["features"] == ["min snr"]
    again = fd.load(tmp_path / "m.safetensors", backend=any_backend)
    for one in (model, again):
        one.fit(ROWS, steps=2, validation=0.2, **fit)
    assert_same_bits(again.net.flat, model.net.flat)
    with pytest.raises(ArgumentError, match=r"weighting, snr_gamma: got"):
        model.fit(ROWS, steps=1, weighting="min_snr", snr_gamma=3.0, **QUIET)
    model.save(tmp_path / "s.safetensors", training=False)
    assert checkpoint.describe(tmp_path / "s.safetensors")["features"] == []


def test_pictures_are_learned_with_weights(any_backend):
    """A weight of 1 everywhere has the bits of none; in parts the loss is the same."""
    pictures, schedule = np.random.default_rng(1).normal(size=(9, 4, 4, 1)), Schedule.cosine(10)

    def losses(**options):
        net = fd.UNet((4, 4, 1), channels=(4,), groups=2, blocks=1, T=10)
        model = fd.Diffusion(net, schedule, prediction="x0", seed=1, backend=any_backend)
        model.fit(pictures, steps=3, batch=6, validation=0, **QUIET, **options)
        return model

    huge = 1e-9  # below every SNR: the weight is the same everywhere
    even, weighted = losses(), losses(weighting="min_snr", snr_gamma=huge)
    assert weighted.history["loss"][0] == pytest.approx(huge * even.history["loss"][0], rel=1e-5)
    parts, whole = losses(weighting="min_snr", accumulate=2), losses(weighting="min_snr")
    assert parts.history["loss"] == pytest.approx(whole.history["loss"], rel=1e-4)
    assert whole.history["loss"] != even.history["loss"]


def test_a_bound_that_nothing_uses_is_refused():
    model = fd.Diffusion(fd.MLP(ROWS.shape[1], hidden=(4,), T=20), Schedule.cosine(20), backend="numpy")
    for weighting in ({}, {"weighting": "uniform"}):
        with pytest.raises(ArgumentError, match=r"snr_gamma: got 5\.0, wants weighting='min_snr' with it"):
            model.fit(ROWS, steps=1, snr_gamma=5.0, **weighting, **QUIET)
    assert model.step == 0


@pytest.mark.parametrize("bad", [{"weighting": "snr"}, {"snr_gamma": 0}, {"snr_gamma": math.nan}])
def test_bad_weightings(bad):
    with pytest.raises(ArgumentError, match=f"{next(iter(bad))}: got"):
        fd.Diffusion().fit(ROWS, steps=1, **bad)


# -- a learned variance ------------------------------------------------------------------------------------


def bound(schedule, prediction, t, d, v):
    """A term of the bound at t, of data x0 = 0: of Gaussians whose means a prediction that is d off makes, in nats."""
    alpha, beta, before = schedule.alphas[t], schedule.betas[t], schedule.noise[t - 1] ** 2 if t else 0.0
    signal, noise = schedule.signal[t], schedule.noise[t]
    of_noise, of_data = (table[t] for table in schedule.target(prediction))
    x = noise * 0.3  # x0 = 0
    there = np.linalg.solve([[signal, noise], [of_data, of_noise]], [x, of_noise * 0.3 + d])[0]
    signal_before = schedule.signal[t - 1] if t else 1.0
    apart = signal_before * beta / noise**2 * there  # of the means: x0 is `there` for 0
    posterior = 1 / (alpha / beta + 1 / before) if t else 0.0
    least = math.log(posterior if t else schedule.posterior_variance[1])
    log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * least
    if t == 0:
        return (math.log(2 * math.pi) + log_variance + apart**2 / math.exp(log_variance)) / 2
    return (log_variance - math.log(posterior) + (posterior + apart**2) / math.exp(log_variance) - 1) / 2


@pytest.mark.parametrize("prediction", ["v", "x0", "velocity", "noise"])
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_the_terms_are_the_variational_bound(name, prediction):
    schedule = Schedule.cosine(12) if name == "cosine" else Schedule.flow(12)
    if name == "flow" and prediction == "noise":
        return
    terms = loss_terms(schedule, prediction, TrainingPlan(), learned_variance=True)
    d, v = np.array([0.3, -0.2, 0.05]), np.array([-1.0, 0.4, 1.2])
    for t in range(12):
        row, y = terms[t : t + 1], np.concatenate([d, v])[None]
        loss, _ = squared_error(y, np.zeros((1, 3)), row)
        bounds = [bound(schedule, prediction, t, *pair) for pair in zip(d, v, strict=True)]
        assert loss == pytest.approx(np.mean(d**2) + 1e-3 * 12 * np.mean(bounds), rel=1e-9)


def learner(**options):
    return fd.UNet((4, 3, 2), channels=(4,), groups=2, blocks=1, T=10, outputs=4, seed=2, **options)


@pytest.mark.slow
def test_the_gradient_stops_at_the_mean():
    """Every entry of a network's gradient, in float64: of the loss whose bound has the errors that there were."""
    net = fd.UNet((3,), channels=(2,), groups=1, blocks=1, embedding=2, T=10, outputs=2, dtype="float64")
    schedule, random = Schedule.cosine(10), np.random.default_rng(3)
    for view in net.params.values():
        view[...] += random.normal(scale=0.3, size=view.shape)
    t = np.array([0, 3, 9])
    x, target = random.normal(size=(3, 3)), random.normal(size=(3, 1, 3, 1))
    terms = loss_terms(schedule, "v", TrainingPlan(weighting="min_snr"), learned_variance=True)[t]
    terms[:, 1] *= 50  # the bound shows
    grads = net.layout.zeros(np.float64)
    loss = net.runner(fd.get_backend("numpy")).gradient(Batch(x, t, target, None, terms), grads)
    w, g, h, V, K, A = (column[:, None, None, None] for column in terms.T)
    there = net.predict(x, t, backend="numpy")[..., :1] - target

    def value():
        mean, v = np.split(net.predict(x, t, backend="numpy"), 2, axis=-1)
        of_bound = g * (h * v + (V + K * there**2) * np.exp(-h * v) + A)
        return np.mean(w * (mean - target) ** 2 + of_bound)

    assert value() == pytest.approx(loss[0], rel=1e-12)
    assert_gradient(value, net.flat, grads)


def test_backends_agree_on_the_gradient(any_backend):
    net, schedule, random = learner(), Schedule.cosine(10), np.random.default_rng(3)
    t = np.array([0, 3, 9])
    x, target = random.normal(size=(2, 3, 4, 3, 2)).astype(np.float32)
    terms = loss_terms(schedule, "v", TrainingPlan(), learned_variance=True)[t]
    wide = learner(dtype="float64")
    want = wide.layout.zeros(np.float64)
    arrays = (array.astype(np.float64) for array in (x, target))
    x64, target64 = arrays
    wide_loss = wide.runner(fd.get_backend("numpy")).gradient(Batch(x64, t, target64, None, terms), want)
    be = any_backend
    grads = be.asarray(net.layout.zeros(np.float32))
    batch = Batch(be.asarray(x), be.asarray(t, np.int64), be.asarray(target), None, be.asarray(terms, np.float32))
    loss = net.runner(be, be.asarray(net.flat)).gradient(batch, grads)
    assert_close(be.to_numpy(loss), wide_loss, dtype=np.float32, terms=100)
    views = net.layout.views(be.to_numpy(grads))
    for name, view in wide.layout.views(want).items():
        assert_close(views[name], view, terms=400)


def test_the_table_of_a_learned_variance():
    schedule = Schedule.cosine(50)
    small, large, learned = (
        np.array(samplers.ddpm(schedule, 9, variance=kind, prediction="v").rows)
        for kind in ("small", "large", "learned_range")
    )
    s, r = 9, 10
    for v, want in ((-1, small), (1, large)):
        np.testing.assert_allclose(learned[:, s] * np.exp(learned[:, r] * v), want[:, s], rtol=1e-12)
    assert learned[-1, r] == learned[-1, s] == 0
    np.testing.assert_array_equal(learned[:, :s], small[:, :s])


def test_the_noise_follows_the_second_output():
    schedule = Schedule.cosine(30)
    table = {kind: samplers.ddpm(schedule, 6, variance=kind) for kind in ("small", "large", "learned_range")}

    def denoiser(x, t):
        return np.tanh(x) + 0.01 * t

    for v, kind in ((-1.0, "small"), (1.0, "large")):

        def both(x, t, v=v):
            return np.stack([denoiser(x, t), np.full_like(x, v)])

        want = fd.sample(denoiser, table[kind], n=5, shape=(4,), backend="numpy")
        got = fd.sample(both, table["learned_range"], n=5, shape=(4,), backend="numpy")
        assert_close(got, want, terms=20)
        assert_same_bits(fd.sample(both, table[kind], n=5, shape=(4,), backend="numpy"), want)  # v is not looked at
    refusals = (
        (denoiser, r"denoiser output: got shape \(n, \.\.\.\) at t = 29"),
        (fd.UNet((4, 3, 2), channels=(4,), groups=2, blocks=1, T=30), "one without a learned variance"),
        (fd.denoisers.Gaussian(np.zeros(4), np.eye(4), schedule), "one without a learned variance"),
    )
    for refused, said in refusals:
        with pytest.raises(ArgumentError, match=said):
            fd.sample(
                refused, table["learned_range"], n=2, shape=None if hasattr(refused, "T") else (4,), backend="numpy"
            )


def test_a_model_learns_its_variance(any_backend, tmp_path):
    """Where the mean is right the best variance is the posterior's: v falls to -1 and the bound with it."""
    schedule, pictures = Schedule.cosine(10), np.zeros((8, 4, 3, 2)) + 0.5
    model = fd.Diffusion(learner(), schedule, prediction="x0", seed=1, backend=any_backend)
    model.fit(pictures, steps=6, batch=8, lr=1e-2, data_range=(-1, 1), validation=0.25, **QUIET)
    assert model.history["loss"][-1] < model.history["loss"][0]
    assert np.isfinite(model.history["validation_loss"]).all()
    assert model.named_sampler("ddpm").rows[0].r > 0
    model.save(tmp_path / "m.safetensors")
    assert "learned variance" in checkpoint.describe(tmp_path / "m.safetensors")["features"]
    again = fd.load(tmp_path / "m.safetensors", backend=any_backend)
    assert_same_bits(again.net.flat, model.net.flat)
    for sampler in ("ddpm", "ddim"):
        drawn = model.sample(5, sampler=sampler)
        assert drawn.shape == (5, 4, 3, 2)
        assert_same_bits(again.sample(5, sampler=sampler), drawn)
        whole, _ = model.sample(5, sampler=sampler, trajectory=True)
        assert_same_bits(whole, drawn)
        on_host = fd.load(tmp_path / "m.safetensors", backend="numpy").sample(5, sampler=sampler)
        assert_close(any_backend.to_numpy(drawn), on_host, terms=400)


def test_derivatives_are_those_of_the_prediction(any_backend):
    """And observations move the prediction alone."""
    net, random, be = learner(), np.random.default_rng(0), any_backend
    x, vectors = random.normal(size=(3, 24)).astype(np.float32), random.normal(size=(2, 3, 24)).astype(np.float32)
    on = net.runner(be, be.asarray(net.flat))
    images = x.reshape(3, 4, 3, 2)
    back, forth = (be.to_numpy(getattr(on, name)(be.asarray(x), 4, be.asarray(vectors))) for name in ("vjp", "jvp"))
    for k in range(2):
        vector = vectors[k].reshape(images.shape)
        want = net.vjp(images, 4, np.concatenate([vector, 0 * vector], axis=-1), backend="numpy")
        assert_close(back[k], want.reshape(3, -1), terms=400)
        want = net.jvp(images, 4, vector, backend="numpy")[..., :2]
        assert_close(forth[k], want.reshape(3, -1), terms=400)
    assert back.shape == forth.shape == vectors.shape
    schedule, values = Schedule.cosine(10), np.full((4, 3, 2), np.nan)
    values[0] = 0.3
    table = samplers.ddpm(schedule, 5, prediction="v")
    drawn = fd.sample(net, table, n=2, given=fd.Known(values), method="tmpd", backend=any_backend)
    assert_close(be.to_numpy(drawn)[:, 0], np.full((2, 3, 2), 0.3), terms=1000)


def test_other_numbers_of_outputs_are_refused():
    with pytest.raises(ArgumentError, match=r"net: got 3 outputs, wants 2, .* or twice as many for a learned variance"):
        fd.Diffusion(fd.UNet((4, 3, 2), channels=(4,), groups=2, blocks=1, T=10, outputs=3))
    with pytest.raises(ArgumentError, match="T = 1"):
        loss_terms(Schedule.from_betas([0.999]), "v", TrainingPlan(), learned_variance=True)
