"""What is chosen from the data: networks, lengths of training, held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_same_bits

import fastdiff as fd
from fastdiff import defaults
from fastdiff.backends import get_backend
from fastdiff.errors import ArgumentError, QualityWarning
from fastdiff.split import split

RANDOM = np.random.default_rng(0)
CURVES = RANDOM.normal(size=(120, 6)).astype(np.float32)
QUIET = {"progress": False, "judge": False}


def model(**options):
    return fd.Diffusion(fd.MLP(6, hidden=(8,), T=10), fd.Schedule.cosine(10), **options)


def test_the_default_predicts_v():
    assert fd.Diffusion().prediction == "v"
    assert fd.Diffusion(fd.MLP.tutorial(50)).prediction == "v"


@pytest.mark.parametrize(("points", "width"), [(1, 128), (24, 128), (50, 192), (150, 544), (427, 1024)])
def test_without_a_base_hidden_layers_are_wider_than_curves(points, width):
    assert defaults.curve_net(100, (points,), T=100, seed=0, base=False).hidden == (width,) * 3


def test_beside_a_base_width_follows_the_rows():
    widths = [defaults.curve_net(rows, (427,), T=100, seed=0, base=True).hidden[0] for rows in (30, 3000, 20_000)]
    assert widths == [128, 128, 256]


def test_steps_grow_with_the_data_and_are_affordable():
    steps = [defaults.curve_steps(rows, 50, 256, 100_000) for rows in (1, 100, 1000, 20_000)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (defaults.FEWEST_STEPS, defaults.MOST_STEPS)
    large = 3_000_000
    assert defaults.curve_steps(20_000, 50, 256, large) * 6 * 256 * large <= 1.001 * defaults.MOST_WORK


def test_without_steps_the_rate_falls_to_its_floor(monkeypatch):
    monkeypatch.setattr(defaults, "curve_steps", lambda *_: 12)
    made = model().fit(CURVES, **QUIET)
    assert (made.step, made.end_step, made._optimizer.plan.decay_steps) == (12, 12, 12)
    made.fit(CURVES, **QUIET)
    assert (made.step, made._optimizer.plan.decay_steps) == (24, 24)
    steady = model().fit(CURVES, steps=12, **QUIET)
    assert steady._optimizer.plan.decay_steps is None


def test_without_steps_and_with_them_are_the_same_training(monkeypatch, backend):
    monkeypatch.setattr(defaults, "curve_steps", lambda *_: 12)
    ruled = model(backend=backend).fit(CURVES, **QUIET)
    told = model(backend=backend).fit(CURVES, steps=12, decay_steps=12, **QUIET)
    assert_same_bits(ruled.net.flat, told.net.flat)


# --------------------------------------------------------------------------------------- held-out rows


def held_rows(made, X):
    parts = split(X, None, None, None, made._held_out, made.seed, get_backend("numpy"))
    return parts.rows, parts.unseen


def test_a_twentieth_of_many_rows_is_held_out():
    many = RANDOM.normal(size=(4000, 1))
    kept, held = held_rows(fd.Diffusion(), many)
    assert abs(len(held) - 200) < 5 * np.sqrt(200)
    assert_same_bits(np.sort(np.concatenate([kept, held]), axis=0), np.sort(many, axis=0))
    assert held_rows(fd.Diffusion(), many[:99])[1] is None
    assert len(held_rows(fd.Diffusion(), RANDOM.normal(size=(100_000, 1)))[1]) < 1.2 * defaults.MOST_HELD_OUT


def test_which_rows_depends_on_seed_and_number_only():
    X = np.arange(500.0)[:, None]
    held = held_rows(fd.Diffusion(seed=1), X)[1]
    assert_same_bits(held_rows(fd.Diffusion(seed=1), X * 2)[1], held * 2)
    assert not np.array_equal(held_rows(fd.Diffusion(seed=2), X)[1], held)


def test_the_first_fit_decides_for_all(tmp_path):
    made = model().fit(CURVES, steps=3, **QUIET)
    made.save(tmp_path / "m.safetensors")
    again = fd.load(tmp_path / "m.safetensors")
    held = held_rows(made, CURVES)[1]
    assert len(held) > 0
    assert_same_bits(held_rows(again, CURVES)[1], held)
    grown = np.concatenate([CURVES, CURVES + 9])
    assert_same_bits(held_rows(again, grown)[1][: len(held)], held)  # what was unseen stays so
    made.fit(CURVES, steps=3, **QUIET)
    again.fit(CURVES, steps=3, **QUIET)
    assert_same_bits(again.net.flat, made.net.flat)
    assert again.history["validation_loss"] == made.history["validation_loss"]


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0.25, 30), (CURVES[:7], 0)])
def test_what_the_first_fit_was_told_stays(first, count):
    made = model().fit(CURVES, steps=1, validation=first, **QUIET)
    held = held_rows(made, CURVES)[1]
    assert (0 if held is None else len(held)) == count


@pytest.mark.parametrize("validation", [1.0, -0.1, 1e-9])
def test_shares_that_hold_out_nothing_or_all_are_refused(validation):
    with pytest.raises(ArgumentError, match="validation: got"):
        model().fit(CURVES, steps=1, validation=validation, **QUIET)


def test_few_rows_are_warned_of():
    with pytest.warns(QualityWarning, match="7 rows can be learned by heart only"):
        model().fit(CURVES[:7], judge=False, progress=False)
