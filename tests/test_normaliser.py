"""The map of curves to a network's range: one scale, or one for each column."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_close

import fastdiff as fd
from fastdiff.errors import ArgumentError
from fastdiff.normaliser import Normaliser

RANDOM = np.random.default_rng(0)
CURVES = RANDOM.normal(size=(60, 5)) + np.arange(5)
UNITS = np.array([1.0, 40.0, 1e-3, 1.0, 2.0])
QUIET = {"progress": False, "judge": False}


@pytest.mark.parametrize(
    ("X", "scale", "want"),
    [
        (CURVES, "auto", "all"),
        (CURVES * UNITS, "auto", "column"),
        (CURVES * [1, 1, 1, 1, 5], "auto", "all"),
        (CURVES * [1, 1, 1, 1, 0], "auto", "column"),  # of equal scales, but for the constant one
        (CURVES * [1, 1, 1, 1, 0], "all", "all"),
        (CURVES + 1e6 * np.arange(5), "column", "column"),
        (CURVES * UNITS, "all", "all"),
        (CURVES, "column", "column"),
        (np.ones((9, 5)), "column", "all"),
        (CURVES[:1], "auto", "all"),
    ],
)
def test_the_scale_follows_the_deviations(X, scale, want):
    assert Normaliser.of(X, scale=scale).scale == want


def test_columns_have_mean_0_and_deviation_1_inside():
    X = CURVES * UNITS
    made = Normaliser.of(X, scale="column")
    inner = made.apply(X, np.float64)
    np.testing.assert_allclose(inner.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(inner.std(axis=0), 1)
    assert_close(made.invert(inner, fd.get_backend("numpy")), X, terms=100)


def test_a_constant_column_comes_back_as_it_was(backend):
    X = np.column_stack([CURVES * UNITS, np.full(60, 0.1)]).astype(np.float32)
    made = fd.Diffusion(scale="column", backend=backend).fit(X, steps=2, **QUIET)
    assert (made.sample(7)[:, -1] == np.float32(0.1)).all()


def test_constant_columns_come_back_and_the_others_keep_one_scale(backend, caplog):
    X = np.insert(CURVES, 2, 0.1, axis=1).astype(np.float32)
    with caplog.at_level("INFO"):
        made = fd.Diffusion(backend=backend).fit(X, steps=2, **QUIET)
    assert "1 columns are constant" in caplog.text
    assert (made.sample(7)[:, 2] == np.float32(0.1)).all()
    others = Normaliser.of(np.delete(X, 2, axis=1))
    np.testing.assert_allclose(made.normaliser.std, np.insert(np.full(5, others.std), 2, 0))
    np.testing.assert_allclose(made.normaliser.mean, np.insert(np.full(5, others.mean), 2, X[0, 2]))


def test_a_column_far_from_zero_is_not_constant():
    X = 1e6 + CURVES
    np.testing.assert_allclose(Normaliser.of(X, scale="column").std, X.std(axis=0), rtol=1e-9)


def test_the_log_determinant_is_that_of_the_map():
    X = np.column_stack([CURVES * UNITS, np.ones(60)])
    made = Normaliser.of(X, scale="column")
    slopes = np.diff(made.apply(np.stack([np.zeros(6), np.ones(6)]), np.float64), axis=0)[0, :5]
    assert made.log_det(6) == pytest.approx(np.log(slopes).sum())


def test_a_model_of_unlike_columns_draws_them_in_their_units(backend):
    X = (CURVES * UNITS).astype(np.float32)
    made = fd.Diffusion(fd.MLP(5, hidden=(32,)), backend=backend).fit(X, steps=30, **QUIET)
    drawn = made.sample(200)
    assert (drawn.std(axis=0) / X.std(axis=0) < 10).all()
    path = made.sample(3, trajectory=True)[1]
    np.testing.assert_allclose(path[-1], made.sample(3), rtol=1e-6)


def test_samples_of_whole_numbers_are_rounded_where_asked(backend):
    X = RANDOM.integers(0, 9, size=(40, 5))
    made = fd.Diffusion(fd.MLP(5, hidden=(16,)), backend=backend).fit(X, steps=3, **QUIET)
    drawn, rounded = made.sample(8), made.sample(8, round=True)
    np.testing.assert_array_equal(rounded, np.rint(drawn))
    assert (rounded != drawn).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "row"}, "scale: got 'row', wants one of"),
        ({"scale": "channel"}, "scale: got 'channel'.*one channel"),
        ({"scale": "column", "noise_shape": fd.NoiseShape.diagonal(np.arange(1.0, 6.0))}, "scale: got 'column'"),
    ],
)
def test_scales_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        fd.Diffusion(**options)


def test_pictures_have_no_columns():
    with pytest.raises(ArgumentError, match="scale: got 'column', wants 'auto' for pictures"):
        fd.Diffusion(scale="column").fit(np.zeros((9, 4, 4, 1), np.uint8), steps=1)
