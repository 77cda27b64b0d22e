"""What an error counts: min-SNR weights, and the bound that a variance is learned by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tolerances import assert_same_bits

import fastdiff as fd
from fastdiff import checkpoint
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


@pytest.mark.parametrize("bad", [{"weighting": "snr"}, {"snr_gamma": 0}, {"snr_gamma": math.nan}])
def test_bad_weightings(bad):
    with pytest.raises(ArgumentError, match=f"{next(iter(bad))}: got"):
        fd.Diffusion().fit(ROWS, steps=1, **bad)
