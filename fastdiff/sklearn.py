"""Diffusion models as scikit-learn estimators: a density, and an imputer. This module needs scikit-learn.

Thin: `model_` is the `fastdiff.Diffusion` inside, with everything that it can do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, DensityMixin, OneToOneFeatureMixin, TransformerMixin
from sklearn.impute import MissingIndicator
from sklearn.utils import check_random_state
from sklearn.utils.validation import FLOAT_DTYPES, check_is_fitted, validate_data

from fastdiff import defaults
from fastdiff.errors import check_int
from fastdiff.model import Diffusion
from fastdiff.nn import MLP
from fastdiff.observations import Known, observations

Rows = npt.NDArray[Any]


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """What both have in common: how a model is made and trained out of the parameters."""

    def __init__(
        self,
        *,
        hidden: tuple[int, ...] | None = None,
        timesteps: int | None = None,
        steps: int | None = None,
        batch: int | None = None,
        lr: float = 1e-3,
        validation: float | None = None,
        patience: int | None = None,
        backend: str = "auto",
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        self.hidden, self.timesteps, self.steps, self.batch, self.lr = hidden, timesteps, steps, batch, lr
        self.validation, self.patience, self.backend = validation, patience, backend
        self.random_state, self.verbose = random_state, verbose

    def _train(self, X: Rows) -> None:
        seed = _seed(self.random_state)
        T = 200 if self.timesteps is None else check_int("timesteps", self.timesteps, low=2)
        levels = defaults.curve_schedule(base=True) if T == defaults.BASE_T else defaults.usual_schedule(T)
        net = None if self.hidden is None else MLP(X.shape[1], hidden=self.hidden, T=T, seed=seed)
        base = "auto" if net is None else "gaussian"
        self.model_ = Diffusion(net, levels, base=base, backend=self.backend, seed=seed)
        # How good the samples are is for `score`, and for whoever asks model_.evaluate.
        self.model_.fit(
            X, steps=self.steps, batch=self.batch, lr=self.lr, validation=self.validation, patience=self.patience,
            judge=False, progress=self.verbose,
        )  # fmt: skip


class DiffusionDensity(DensityMixin, _Estimator):  # type: ignore[misc]
    """Density estimation by a diffusion model.

    Parameters
    ----------
    hidden : tuple of int, optional
        Widths of the network's hidden layers; by default chosen for the data.
    timesteps : int, optional
        Levels of noise; by default 200.
    steps, batch, lr, validation, patience
        Of training, see `fastdiff.Diffusion.fit`. By default as long as suits the data.
    backend : str, optional
    random_state : int, RandomState or None, optional
        Of weights, training and samples.
    verbose : bool, optional
        Show a progress bar.

    Attributes
    ----------
    model_ : fastdiff.Diffusion
    n_features_in_ : int

    Examples
    --------
    >>> from fastdiff.sklearn import DiffusionDensity
    >>> X = np.random.default_rng(0).normal(size=(200, 3))
    >>> density = DiffusionDensity(hidden=(32,), steps=200).fit(X)
    >>> density.score_samples(X).shape, density.sample(5).shape
    ((200,), (5, 3))
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the density of rows X (N, d), at least 2; y is ignored.

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionDensity
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> density = DiffusionDensity(hidden=(16,), steps=20, backend="numpy")
        >>> density.fit(X).n_features_in_, density.model_.step
        (3, 20)
        """
        self._train(validate_data(self, X, dtype=FLOAT_DTYPES, ensure_min_samples=2))
        return self

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """Return the log density (N,) of every row, in nats of the data's units.

        That of the samples of a deterministic table, with exact traces: d products with a Jacobian at every step. It
        is a row's own: no other row and no random number is in it, to the bit on "cpu".

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionDensity
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> density = DiffusionDensity(hidden=(16,), steps=20, backend="numpy")
        >>> values = density.fit(X).score_samples([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
        >>> bool(values[0] > values[1])
        True
        """
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=FLOAT_DTYPES, reset=False)
        return self.model_.score_samples(rows, method="table", trace="exact")

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log density of rows: larger is better.

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionDensity
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> density = DiffusionDensity(hidden=(16,), steps=20, backend="numpy")
        >>> density.fit(X).score(X[:10]) > density.score(X[:10] + 3)
        True
        """
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> npt.NDArray[np.float32]:
        """Draw rows (n_samples, d); without a `random_state` the same ones at each call.

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionDensity
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> density = DiffusionDensity(hidden=(16,), steps=20, backend="numpy")
        >>> density.fit(X).sample(5).shape, bool((density.sample(2) == density.sample(5)[:2]).all())
        ((5, 3), True)
        """
        check_is_fitted(self)
        return self.model_.sample(n_samples, seed=None if random_state is None else _seed(random_state))


class DiffusionImputer(OneToOneFeatureMixin, TransformerMixin, _Estimator):  # type: ignore[misc]
    """Fill what is missing, NaN, by draws of a diffusion model given what is there.

    Parameters
    ----------
    draws : int, optional
        Of which the mean is filled in.
    sample_posterior : bool, optional
        Fill in one draw instead, so that imputed data vary as real data do. The draw of a row depends on its position.
    add_indicator : bool, optional
        Add a column of 0 and 1 for every feature that had missing values in `fit`, as scikit-learn's imputers do.
    hidden, timesteps, steps, batch, lr, validation, patience, backend, random_state, verbose
        As of `DiffusionDensity`.

    Attributes
    ----------
    model_ : fastdiff.Diffusion
        Learned from all rows; where values are missing, from the others: see `fastdiff.gaps`.
    indicator_ : sklearn.impute.MissingIndicator or None
    n_features_in_ : int

    Examples
    --------
    >>> from fastdiff.sklearn import DiffusionImputer
    >>> X = np.random.default_rng(0).normal(size=(200, 3))
    >>> X[:50, 0] = np.nan
    >>> filled = DiffusionImputer(hidden=(32,), steps=200, draws=5).fit_transform(X)
    >>> bool(np.isfinite(filled).all())
    True
    """

    def __init__(
        self,
        *,
        draws: int = 20,
        sample_posterior: bool = False,
        add_indicator: bool = False,
        hidden: tuple[int, ...] | None = None,
        timesteps: int | None = None,
        steps: int | None = None,
        batch: int | None = None,
        lr: float = 1e-3,
        validation: float | None = None,
        patience: int | None = None,
        backend: str = "auto",
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            hidden=hidden, timesteps=timesteps, steps=steps, batch=batch, lr=lr, validation=validation,
            patience=patience, backend=backend, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.draws, self.sample_posterior, self.add_indicator = draws, sample_posterior, add_indicator

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from rows X (N, d) with NaN where values are missing; y is ignored.

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionImputer
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> X[:5, 0] = np.nan
        >>> imputer = DiffusionImputer(hidden=(16,), steps=20, draws=5, backend="numpy")
        >>> imputer.fit(X).n_features_in_
        3
        """
        rows = self._validated(X, reset=True, ensure_min_samples=2)
        self._train(rows)
        self.indicator_ = MissingIndicator(error_on_new=False).fit(rows) if self.add_indicator else None
        return self

    def transform(self, X: Any) -> Rows:
        """Return rows with what is missing filled in, and the indicator's columns if there are any.

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionImputer
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> X[:5, 0] = np.nan
        >>> imputer = DiffusionImputer(hidden=(16,), steps=20, draws=5, backend="numpy")
        >>> filled = imputer.fit(X).transform(X)
        >>> bool(np.isnan(filled).any()), bool((filled[:, 1] == X[:, 1]).all())
        (False, True)
        """
        check_is_fitted(self)
        rows = self._validated(X, reset=False)
        filled = rows.copy()
        missing = np.flatnonzero(np.isnan(rows).any(axis=1))
        if len(missing):
            filled[missing] = self._filled(rows, missing)
        return filled if self.indicator_ is None else np.hstack([filled, self.indicator_.transform(rows)])

    def impute(self, X: Any, draws: int = 100) -> Rows:
        """Return many draws of every row, (draws, N, d), as `fastdiff.Diffusion.impute` does.

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionImputer
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> X[:5, 0] = np.nan
        >>> imputer = DiffusionImputer(hidden=(16,), steps=20, draws=5, backend="numpy")
        >>> imputer.fit(X).impute(X[:5], draws=4).shape
        (4, 5, 3)
        """
        check_is_fitted(self)
        return self.model_.impute(self._validated(X, reset=False), draws)

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:
        """Return the names of the columns of `transform`.

        Examples
        --------
        >>> from fastdiff.sklearn import DiffusionImputer
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> X[:5, 0] = np.nan
        >>> imputer = DiffusionImputer(hidden=(16,), steps=20, draws=5, backend="numpy")
        >>> imputer.set_params(add_indicator=True).fit(X).get_feature_names_out(["a", "b", "c"]).tolist()
        ['a', 'b', 'c', 'missingindicator_a']
        """
        check_is_fitted(self)
        names = super().get_feature_names_out(input_features)
        if self.indicator_ is None:
            return names
        return np.concatenate([names, self.indicator_.get_feature_names_out(names)])

    def _filled(self, rows: Rows, missing: npt.NDArray[np.int64]) -> Rows:
        known = observations(Known(rows), (rows.shape[1],)).some(missing)
        if self.sample_posterior:
            drawn: Rows = self.model_.sample(1, given=known)[0]
        else:  # the noise of row 0 for every row, or a mean would depend on where its row stands
            known = replace(known, numbers=(0,) * len(missing))
            drawn = self.model_.sample(check_int("draws", self.draws, low=1), given=known).mean(axis=0)
        return np.where(np.isnan(rows[missing]), drawn, rows[missing])  # a mean of equal values may round

    def _validated(self, X: Any, **options: Any) -> Rows:
        rows: Rows = validate_data(self, X, dtype=FLOAT_DTYPES, ensure_all_finite="allow-nan", **options)
        return rows

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


def _seed(random_state: Any) -> int:
    """A seed of the noise law out of what scikit-learn takes for one."""
    if isinstance(random_state, (int, np.integer)):
        return check_int("random_state", random_state, low=0)
    return int(check_random_state(random_state).randint(2**32, dtype=np.uint64))
