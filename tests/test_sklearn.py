"""The estimators in scikit-learn's own tests, and where they are used: pipelines, searches, copies."""

import pickle
import unittest

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from tolerances import SIGMAS

from fastdiff.errors import ArgumentError
from fastdiff.sklearn import DiffusionDensity, DiffusionImputer

SMALL = {"hidden": (4,), "timesteps": 5, "steps": 3, "batch": 8, "backend": "cpu"}
RANDOM = np.random.default_rng(0)
MIX = RANDOM.normal(size=(4, 4))
X = RANDOM.normal(size=(1000, 4)) @ MIX + [0, 3, 0, -2]
GAPS = np.where(RANDOM.random(X.shape) < 0.1, np.nan, X)
FEW, FEW_GAPS = X[:80], GAPS[:80]


@parametrize_with_checks([DiffusionDensity(**SMALL), DiffusionImputer(draws=2, **SMALL)])
def test_scikit_learn_takes_them_for_estimators(estimator, check):
    try:
        check(estimator)
    except unittest.SkipTest as reason:
        assert "SCIPY_ARRAY_API is not set" in str(reason)  # noqa: PT017 - arrays of other libraries are not for them


def test_a_row_is_scored_and_filled_alike_wherever_it_stands():
    order = RANDOM.permutation(80)
    density = DiffusionDensity(**SMALL).fit(FEW)
    scores = density.score_samples(FEW)
    np.testing.assert_array_equal(density.score_samples(FEW[order]), scores[order])
    np.testing.assert_array_equal(density.score_samples(FEW[7:8]), scores[7:8])
    assert density.score(FEW) == scores.mean()
    imputer = DiffusionImputer(draws=3, **SMALL).fit(FEW_GAPS)
    filled = imputer.transform(FEW_GAPS)
    np.testing.assert_array_equal(imputer.transform(FEW_GAPS[order]), filled[order])
    there = ~np.isnan(FEW_GAPS)
    np.testing.assert_array_equal(filled[there], FEW_GAPS[there])


def test_an_untrained_model_is_the_gaussian_of_the_rows():
    """Its density, and what is missing given the rest."""
    mean, cov = X.mean(axis=0), np.cov(X.T)
    options = {"hidden": (8,), "steps": 0, "validation": 0}
    scores = DiffusionDensity(**options).fit(X).score_samples(FEW)
    want = multivariate_normal(mean, cov).logpdf(FEW)
    assert scores.mean() == pytest.approx(want.mean(), abs=0.05)
    np.testing.assert_allclose(scores, want, atol=0.2)
    seen = np.array([0, 1, 3])
    pull = cov[2, seen] @ np.linalg.inv(cov[np.ix_(seen, seen)])
    want = mean[2] + (FEW[:, seen] - mean[seen]) @ pull.T
    spread = np.sqrt(cov[2, 2] - pull @ cov[seen, 2])
    rows, want = FEW[:20].copy(), want[:20]
    rows[:, 2] = np.nan
    imputer = DiffusionImputer(draws=64, **options).fit(X)
    error = SIGMAS * spread / np.sqrt(64)
    np.testing.assert_allclose(imputer.transform(rows)[:, 2], want, atol=error)
    one = clone(imputer).set_params(sample_posterior=True).fit(X).transform(rows)[:, 2]
    assert (one - want).std() == pytest.approx(spread, rel=0.5)
    draws = imputer.impute(rows, 64)
    assert draws.shape == (64, 20, 4)
    np.testing.assert_allclose(draws[..., 2].std(axis=0).mean(), spread, rtol=0.1)


def test_random_states():
    density = DiffusionDensity(**SMALL, random_state=3).fit(FEW)
    np.testing.assert_array_equal(density.sample(5), density.sample(5))
    np.testing.assert_array_equal(density.sample(5, random_state=1), density.sample(5, random_state=1))
    assert not np.array_equal(density.sample(5, random_state=1), density.sample(5))
    again = DiffusionDensity(**SMALL, random_state=np.random.RandomState(0)).fit(FEW).score_samples(FEW)
    same = DiffusionDensity(**SMALL, random_state=np.random.RandomState(0)).fit(FEW).score_samples(FEW)
    np.testing.assert_array_equal(again, same)
    assert not np.array_equal(again, density.score_samples(FEW))
    imputers = [DiffusionImputer(**SMALL, sample_posterior=True, random_state=seed).fit(FEW_GAPS) for seed in (0, 0, 1)]
    one, other, third = (imputer.transform(FEW_GAPS) for imputer in imputers)
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, third)


def test_indicators_are_columns_of_their_own():
    rows = FEW_GAPS.copy()
    rows[:, 1] = FEW[:, 1]
    imputer = DiffusionImputer(draws=2, add_indicator=True, **SMALL).fit(rows)
    filled = imputer.transform(rows)
    np.testing.assert_array_equal(filled[:, 4:], np.isnan(rows[:, [0, 2, 3]]))
    assert imputer.get_feature_names_out(list("abcd")).tolist() == [
        *"abcd", "missingindicator_a", "missingindicator_c", "missingindicator_d",
    ]  # fmt: skip
    assert clone(imputer).set_params(add_indicator=False).fit_transform(rows).shape == (80, 4)


def test_in_pipelines_searches_and_copies():
    labels = X[:80, 0] > 0
    imputer = DiffusionImputer(draws=2, **SMALL)
    chain = make_pipeline(StandardScaler(), imputer, LogisticRegression()).fit(FEW_GAPS, labels)
    assert chain.score(FEW_GAPS, labels) > 0.8
    search = GridSearchCV(DiffusionDensity(**SMALL), {"steps": [0, 2], "lr": [1e-3, 1e-2]}, cv=2).fit(FEW)
    assert set(search.best_params_) == {"steps", "lr"}
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.score(FEW) == search.best_estimator_.score(FEW)
    density = DiffusionDensity(**SMALL).fit(FEW)
    same = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(same.score_samples(FEW), density.score_samples(FEW))
    assert clone(density).get_params() == density.get_params()
    assert not hasattr(clone(density), "model_")


def test_by_default_the_model_is_chosen():
    made = DiffusionDensity(steps=2, backend="numpy").fit(FEW).model_
    assert made.net.hidden == (128, 128, 128)
    assert made.schedule.T == 200
    careful = DiffusionDensity(**{**SMALL, "steps": 300}, validation=0.2, patience=100, lr=0.3).fit(FEW).model_
    assert careful.history["validation_step"]


def test_rows_of_which_none_is_whole_are_learned_from():
    rows = FEW.copy()
    rows[np.arange(len(rows)), np.arange(len(rows)) % rows.shape[1]] = np.nan
    made = DiffusionImputer(**SMALL).fit(rows)
    filled, missing = made.transform(rows), np.isnan(rows)
    assert made.model_.step == SMALL["steps"]
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[~missing], rows[~missing])


def test_what_cannot_be_learned_from_is_refused():
    rows = FEW.copy()
    rows[:, 0] = np.nan
    with pytest.raises(ArgumentError, match="X: got point 0, missing in all rows"):
        DiffusionImputer(**SMALL).fit(rows)
    with pytest.raises(ArgumentError, match="draws: got 0"):
        DiffusionImputer(**SMALL, draws=0).fit(FEW_GAPS).transform(FEW_GAPS)
    with pytest.raises(ArgumentError, match="timesteps: got 1"):
        DiffusionDensity(**{**SMALL, "timesteps": 1}).fit(FEW)
    with pytest.raises(ArgumentError, match="random_state: got -1"):
        DiffusionDensity(**SMALL, random_state=-1).fit(FEW)
