"""The map of curves to a network's range: one scale, or one for each column."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from tolerances import assert_close

import fastdiff as fd
from fastdiff.errors import ArgumentError, DataWarning
from fastdiff.normaliser import Normaliser, check_carried

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
        (CURVES + 1e6 * np.arange(5), "auto", "column"),  # of equal scales, and far from each other
        (CURVES + 20 * np.arange(5), "auto", "all"),
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
    assert "constant columns: 1;" in caplog.text
    assert (made.sample(7)[:, 2] == np.float32(0.1)).all()
    others = Normaliser.of(np.delete(X, 2, axis=1))
    np.testing.assert_allclose(made.normaliser.std, np.insert(np.full(5, others.std), 2, 0))
    np.testing.assert_allclose(made.normaliser.mean, np.insert(np.full(5, others.mean), 2, X[0, 2]))


def test_a_column_far_from_zero_is_not_constant():
    X = 1e6 + CURVES
    np.testing.assert_allclose(Normaliser.of(X, scale="column").std, X.std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "float16"])
@pytest.mark.parametrize("scale", ["all", "column"])
def test_integers_have_the_moments_of_their_values(dtype, scale):
    """The least value of a type has no opposite in it."""
    ends = np.iinfo(dtype) if dtype != "float16" else np.finfo(dtype)
    X = np.full((6, 3), ends.min, dtype)
    X[::2] = 0
    made, wide = Normaliser.of(X, scale=scale), X.astype(np.float64)
    axis = None if scale == "all" else 0
    np.testing.assert_allclose(made.mean, wide.mean(axis=axis), rtol=1e-6)
    np.testing.assert_allclose(made.std, wide.std(axis=axis), rtol=1e-6)


WHITE = RANDOM.normal(size=(60, 3))
OFFSET, OWN = r"subtract the offset in float64 \(X - X\.mean\(axis=0\)\)", r"scale='column' \(--scale column\)"


@pytest.mark.parametrize(
    ("X", "scale", "error", "warning"),
    [
        (WHITE, "all", None, None),
        (WHITE + 1e4, "column", None, None),
        (np.ones((9, 3)), "column", None, None),
        (WHITE * 1e-60, "column", "multiply X, and divide its samples", None),
        (WHITE * 1e-39, "all", "multiply X, and divide its samples", None),
        (WHITE * [1, 1, 1e-60], "column", None, "1 columns like number 3 vary by .* multiply such columns"),
        (WHITE * 1e-30, "all", None, None),
        (WHITE + 1e8, "all", rf"^X: got 3 columns like number 1, which varies by .* its steps are 8: {OFFSET}", None),
        (WHITE + 1e8 * np.eye(3)[1], "column", r"^X: got 1 columns like number 2", None),
        (np.rint(WHITE * 9).astype(np.int64) + 10**9, "all", OFFSET, None),
        ((WHITE * 9 + 1e8).astype(np.float32), "column", None, OFFSET),  # what float32 took is gone
        (WHITE + 1e6, "column", None, rf"where float32 has steps of 0\.0625: {OFFSET}"),
        (WHITE + 1e15, "all", None, OFFSET),  # what float64 took may be rounding
        (WHITE * [1, 1, 1e5], "all", None, OWN),
        (WHITE + 1e4 * np.eye(3)[2], "all", None, f"3 columns like number 1 vary .*{OWN}"),
        (WHITE * [1, 1, 50], "all", None, None),
        (WHITE * [1, 1, 1e5], "column", None, None),
        (np.where(np.arange(60)[:, None] % 2, 0.1, 0.1 + 2e-17) * np.ones(3), "column", None, None),
    ],
)
def test_what_samples_cannot_show_is_said(X, scale, error, warning):
    if error:
        with pytest.raises(ArgumentError, match=error):
            check_carried(X, scale)
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_carried(X, scale)
    assert len(seen) == (warning is not None)
    if warning:
        assert seen[0].category is DataWarning
        assert re.search(warning, str(seen[0].message))


def test_fit_says_it_at_the_caller_s_line(backend):
    net = lambda: fd.MLP(3, hidden=(8,))  # noqa: E731
    with pytest.warns(DataWarning, match=OWN) as seen:
        fd.Diffusion(net(), scale="all", backend=backend).fit(WHITE * [1, 1, 1e5], steps=1, **QUIET)
    assert seen[0].filename == __file__
    with pytest.raises(ArgumentError, match=OFFSET):
        fd.Diffusion(net(), backend=backend).fit(WHITE + 1e8, steps=1, **QUIET)
    with pytest.raises(ArgumentError, match="divide X, and multiply its samples"):
        fd.Diffusion(net(), backend=backend).fit(WHITE * 1e200, steps=1, **QUIET)
    made = fd.Diffusion(net(), backend=backend).fit(
        WHITE + 1e4 * np.eye(3)[2], steps=200, **QUIET
    )  # auto: each its own
    drawn = made.sample(200)
    np.testing.assert_allclose(drawn.std(axis=0), WHITE.std(axis=0), rtol=0.7)


def test_an_offset_that_is_subtracted_comes_back():
    X = WHITE + 1e8
    mean = X.mean(axis=0)
    made = fd.Diffusion(fd.MLP(3, hidden=(8,)), backend="numpy").fit(X - mean, steps=2, **QUIET)
    assert len(np.unique(made.sample(50) + mean)) == 150


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
        ({"scale": "channel", "noise_shape": fd.NoiseShape.diagonal(np.arange(1.0, 6.0))}, "scale: got 'channel'"),
        ({"scale": "column", "noise_shape": fd.NoiseShape.diagonal(np.arange(1.0, 6.0))}, "scale: got 'column'"),
    ],
)
def test_scales_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        fd.Diffusion(**options)


def test_pictures_have_no_columns():
    with pytest.raises(ArgumentError, match="scale: got 'column', wants 'auto' for pictures"):
        fd.Diffusion(scale="column").fit(np.zeros((9, 4, 4, 1), np.uint8), steps=1)
