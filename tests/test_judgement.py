"""Whether a judgement sees what is wrong with samples, and nothing where nothing is."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

import fastdiff as fd
from fastdiff import judgement
from fastdiff.covariance import ledoit_wolf
from fastdiff.errors import ArgumentError, QualityWarning
from fastdiff.metrics import energy_distance
from fastdiff.normaliser import Normaliser

RANDOM = np.random.default_rng(0)


def bananas(n):
    """Rows of a law that no Gaussian comes near."""
    x = RANDOM.normal(size=n)
    return np.column_stack([x, x**2 + 0.1 * RANDOM.normal(size=n), RANDOM.normal(size=(n, 2))])


TRAINING, UNSEEN = bananas(400), bananas(60)


def measured(drawn, training=TRAINING, held_out=UNSEEN):
    return judgement.measure(drawn, training, held_out, Normaliser.of(training, scale="auto"))


def test_good_samples_draw_no_complaint():
    report = measured(bananas(256))
    assert report.complaints == []
    assert report.excess < 0  # better than a Gaussian
    assert report.deviation == pytest.approx(1, abs=0.2)
    assert report.nearer == pytest.approx(0.5, abs=0.15)
    assert report.outside < 0.01
    assert "256 samples: energy distance" in report.sentence


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        (lambda: 8 * bananas(256), "worse than a fitted Gaussian's.*deviation is.*out of the data's range"),
        (lambda: 0.05 * bananas(256), "deviation is 0.0. times"),
        (lambda: TRAINING[:256] + 1e-3, "lie nearer to a training row .* close to copies"),
        (lambda: np.full((256, 4), np.nan), "not finite"),
    ],
)
def test_bad_samples_are_called_so(drawn, words):
    assert re.search(words, "; ".join(measured(drawn()).complaints))


def test_a_gaussian_s_own_draws_are_no_worse_than_it():
    moments = ledoit_wolf(TRAINING)
    draws = moments.sample(RANDOM.normal(size=(256, 400)), RANDOM.normal(size=(256, 4)))
    report = measured(draws)
    assert report.complaints == []
    assert abs(report.excess) < 5 * report.excess_stderr


def test_the_distances_are_energy_distances():
    drawn = bananas(256)
    units = Normaliser.of(TRAINING)
    x, y, learned = (units.apply(rows, np.float64) for rows in (drawn, UNSEEN, TRAINING))
    unit = np.sqrt(np.mean(learned.var(axis=0)))
    # What few unseen rows add by chance is in both, and taken off.
    difference = energy_distance(x, y, unbiased=True) - energy_distance(learned, y, unbiased=True)
    report = measured(drawn)
    assert report.energy_distance == pytest.approx(difference / unit)
    halves = energy_distance(learned[::2], learned[1::2], unbiased=True)
    assert report.real == pytest.approx(halves / unit)


def test_the_standard_error_is_that_of_repetitions():
    units = Normaliser.of(TRAINING)
    reports = [judgement.measure(bananas(128), bananas(200), bananas(30), units) for _ in range(60)]
    found = np.std([report.excess for report in reports])
    assert found == pytest.approx(np.mean([report.excess_stderr for report in reports]), rel=0.4)


def test_units_do_not_matter_where_columns_have_their_own():
    units = np.array([1.0, 1e4, 1e-3, 1.0])
    drawn = bananas(100)
    plain = judgement.measure(drawn, TRAINING, UNSEEN, Normaliser.of(TRAINING, scale="column"))
    other = judgement.measure(
        drawn * units, TRAINING * units, UNSEEN * units, Normaliser.of(TRAINING * units, scale="auto")
    )
    assert other.energy_distance == pytest.approx(plain.energy_distance)
    assert other.nearer == plain.nearer


def test_without_held_out_rows_the_training_rows_serve():
    report = measured(bananas(100), held_out=None)
    assert not report.held_out
    assert report.nearer == pytest.approx(0.5, abs=0.15)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("training", [np.ones((9, 3)), np.eye(3)[:2], np.arange(40.0)[:, None]])
def test_odd_data_are_measured_too(training):
    report = judgement.measure(np.zeros((5, training.shape[1])), training, None, Normaliser.of(training))
    assert math.isfinite(report.energy_distance)


def test_equal_samples_of_equal_rows_have_the_right_deviation():
    training = np.full((9, 3), 0.1)
    units = Normaliser.of(training)
    equal = judgement.measure(training[:5] + 1e-7, training, None, units)
    assert equal.deviation == 1
    assert equal.complaints == []
    assert judgement.measure(RANDOM.normal(size=(5, 3)), training, None, units).complaints


def test_samples_are_compared_with_the_rows_that_there_are():
    assert measured(bananas(50)).sentence.endswith("than unseen rows are")
    alone = measured(TRAINING[:256] + 1e-3, held_out=None)
    assert alone.sentence.endswith("than the other ones are")
    assert "than the other ones do" in alone.complaints[0]


# --------------------------------------------------------------------------------------- models


def trained(steps, **options):
    made = fd.Diffusion(fd.MLP(4, hidden=(32,), T=20), fd.Schedule.cosine(20))
    return made.fit(TRAINING, steps=steps, progress=False, **options)


def test_a_long_fit_ends_with_a_judgement(capsys):
    made = trained(1000)
    assert made.report_["step"] == 1000
    assert made.report_["held_out"]
    assert capsys.readouterr().err == ""
    short = trained(5)
    assert short.report_ is None


def test_it_says_one_sentence_beside_the_bar(capsys):
    fd.Diffusion(fd.MLP(4, hidden=(32,))).fit(TRAINING, steps=300, judge=True, lr=3e-3)
    assert "256 samples: energy distance" in capsys.readouterr().err


def test_a_bad_model_warns_with_a_remedy():
    made = fd.Diffusion(fd.MLP(4, hidden=(2,)), prediction="noise")
    with pytest.warns(QualityWarning, match=r"worse than a fitted Gaussian's.*prediction='v'"):
        made.fit(TRAINING, steps=30, judge=True, progress=False)
    narrow = fd.Diffusion(fd.MLP(4, hidden=(2,)))
    with pytest.warns(QualityWarning, match="wider than its curves"):
        narrow.fit(TRAINING, steps=2, judge=True, progress=False)


def test_the_remedy_is_one_for_this_model():
    plain = fd.Diffusion(fd.MLP(4, hidden=(8,)))
    with pytest.warns(QualityWarning, match=r"base='gaussian'"):
        plain.fit(TRAINING, steps=2, judge=True, progress=False)
    report = measured(8 * bananas(64))
    narrow = fd.Diffusion(fd.MLP(4, hidden=(2,)), base="gaussian").fit(TRAINING, steps=2, progress=False)
    model = narrow.net, narrow.prediction
    assert "wider" not in judgement.remedy(report, *model, base=True)  # what is narrow corrects a base only
    assert judgement.remedy(measured(np.full((9, 4), np.nan)), *model, base=True) == "train with a smaller lr"


def test_a_fit_by_the_rule_is_judged_however_short_and_says_what_is_equal():
    with pytest.warns(QualityWarning, match="all rows are the same") as seen:
        made = fd.Diffusion().fit(np.ones((9, 2)), progress=False)
    assert made.step < 1000
    assert made.report_["deviation"] == 1
    assert [str(warning.message) for warning in seen] == ["all rows are the same, and so will all samples be"]


def test_judging_changes_no_bits():
    np.testing.assert_array_equal(trained(1000).net.flat, trained(1000, judge=False).net.flat)


def test_the_report_is_saved(tmp_path):
    made = trained(1000)
    made.save(tmp_path / "m.safetensors")
    assert fd.load(tmp_path / "m.safetensors").report_ == made.report_


def test_pictures_with_labels_are_judged():
    y = np.arange(120) % 3
    X = (40 * y[:, None, None, None] + RANDOM.integers(0, 90, size=(120, 4, 4, 1))).astype(np.uint8)
    made = fd.Diffusion(fd.UNet((4, 4, 1), channels=(8,), blocks=1, T=20, classes=3), fd.Schedule.cosine(20))
    with pytest.warns(QualityWarning):
        made.fit(X, y, steps=2, batch=8, judge=True, progress=False)
    assert made.report_["samples"] == judgement.PICTURES


def test_evaluation_knows_the_rows_of_the_training():
    made = trained(1000)
    found = made.evaluate(TRAINING)
    assert len(found.real) == made.report_["rows"]
    assert len(found.real) + len(found.training) == len(TRAINING)
    others = made.evaluate(UNSEEN, samples=50)
    assert (len(others.real), len(others.training), len(others.drawn)) == (30, 30, 50)
    told = made.evaluate(UNSEEN, training=TRAINING, samples=50)
    assert (len(told.real), len(told.training)) == (60, 400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"X": UNSEEN[:1]}, "X: got 1 row"),
        ({"X": UNSEEN, "training": UNSEEN[:1]}, "training: got 1 rows"),
        ({"X": UNSEEN[:, :2]}, "X: got shape"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options, message):
    made = trained(1)
    with pytest.raises(ArgumentError, match=message):
        made.evaluate(**options)


# --------------------------------------------------------------------------------------- while a model trains


def test_a_watch_keeps_the_first_weights_that_are_as_good_as_the_best(monkeypatch):
    """Weights are scales of the samples here: 1 is the law of the rows."""
    monkeypatch.setattr(judgement, "NEAREST", 0.5)
    rows = RANDOM.normal(size=(300, 3))
    noise = RANDOM.normal(size=(256, 3))
    watch = judgement.Watch(rows, lambda weights: weights * noise, 0, 2000)
    for step, scale in enumerate([3.0, 2.0, 1.0, 1.001, 1.5]):
        assert not watch.look(100 * step, np.array([scale]))
    step, weights = watch.best()
    assert (step, weights) == (200, 1.0)
    assert "no nearer to the data's law" in watch.reason


def test_a_watch_stops_at_copies():
    rows = RANDOM.normal(size=(60, 3))
    watch = judgement.Watch(rows, lambda weights: rows + weights * RANDOM.normal(size=rows.shape), 0, 2000)
    assert not watch.look(0, np.array([1.0]))
    assert not watch.look(150, np.array([1e-6]))  # no step to look at
    assert watch.look(200, np.array([1e-6]))
    assert watch.best()[0] == 0


def test_a_training_by_the_rule_keeps_what_the_watch_says():
    few = bananas(40)
    made = fd.Diffusion(backend="cpu", seed=1).fit(few, progress=False)
    assert made.step <= made._optimizer.plan.decay_steps
    inner = made.normaliser.apply(few, np.float64)
    drawn = made.normaliser.apply(made.sample(256), np.float64)
    nearest = np.median(np.sqrt(((drawn[:, None] - inner) ** 2).sum(-1)).min(axis=1))
    between = np.sqrt(((inner[:, None] - inner) ** 2).sum(-1)) + np.diag([np.inf] * len(inner))
    assert nearest >= judgement.NEAREST * np.median(between.min(axis=1))
    again = fd.Diffusion(backend="cpu", seed=1).fit(few, progress=False)
    np.testing.assert_array_equal(again.sample(5), made.sample(5))


def test_too_few_rows_to_evaluate_with_are_refused():
    made = trained(2)
    for rows, options in ((UNSEEN[:3], {}), (TRAINING, {"samples": 1})):
        with pytest.raises(ArgumentError, match=r"samples|X: got 3 rows"):
            made.evaluate(rows, **options)
    assert made.evaluate(UNSEEN[:4], samples=2).report.samples == 2


def test_a_watch_passes_over_samples_that_are_not_finite():
    rows = RANDOM.normal(size=(60, 3))
    watch = judgement.Watch(rows, lambda weights: weights * RANDOM.normal(size=rows.shape), 0, 2000)
    assert not watch.look(0, np.array([np.nan]))
    assert watch.looks == []
    assert not watch.look(100, np.array([1.0]))
    assert watch.best()[0] == 100
