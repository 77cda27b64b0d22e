"""Samples of a model beside rows of the data: `Diffusion.evaluate`, and the judgement that ends a fit."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff import generation, judgement, split
from fastdiff.backends import get_backend
from fastdiff.errors import ArgumentError, QualityWarning, check_array, check_int
from fastdiff.nn import Network
from fastdiff.noise_shape import NoiseShape
from fastdiff.progress import say

Rows = npt.NDArray[Any]


class Model(generation.Model, Protocol):
    """What an evaluation reads of a `Diffusion`, and changes."""

    net: Network | None
    seed: int
    step: int
    noise_shape: NoiseShape | None
    report_: dict[str, Any] | None
    _data: list[int] | None
    _held_out: tuple[str, float] | None

    def sample(self, *args: Any, **options: Any) -> Any: ...


def evaluate(
    model: Model, data: tuple[Any, Any, Any], training: Any, samples: int | None, seed: int | None
) -> judgement.Evaluation:
    """Measure samples beside rows with labels and covariates, as `Diffusion.evaluate` says."""
    model._fitted()
    X, y, covariates = data
    X, y, _ = split.checked(X, y, model.net, model.noise_shape, get_backend(model.backend))
    asked = y, generation.inner_covariates(model, covariates, len(X))
    if len(X) < 2:
        raise ArgumentError("X", "1 row", "at least 2 rows")
    if training is None:
        rows = split.for_evaluation(X, model._data, model._held_out, model.seed)
    else:
        rows = check_array("training", training, shape=(None, *X.shape[1:])), X
        if len(rows[0]) < 2:
            raise ArgumentError("training", f"{len(rows[0])} rows", "at least 2")
    samples = 4 * judgement.SAMPLES if samples is None else check_int("samples", samples, low=2)
    return _measured(model, rows, asked, samples, seed)


def judge(model: Model, rows: Rows, held_out: Rows | None, asked: tuple[Any, Any], *, show: bool) -> None:
    """Draw samples, measure them, and say what was found."""
    if len(rows) < 2:
        return
    found = _measured(model, (rows, held_out), asked, judgement.SAMPLES, None)
    model.report_ = {"step": model.step, **found.report.to_dict()}
    say(found.report.sentence, show=show)
    if found.complaint:
        warnings.warn(found.complaint, QualityWarning, stacklevel=5)


def _measured(
    model: Model, beside: tuple[Rows, Rows | None], asked: tuple[Any, Any], samples: int, seed: int | None
) -> judgement.Evaluation:
    """Measure samples beside training and held-out rows, `asked` for labels and inner covariates in their shares."""
    net, _, normaliser = model._fitted()
    rows, held_out = beside
    n, how = judgement.how(net, samples)
    labels, numbers = (None if part is None else part[np.arange(n) * len(part) // n] for part in asked)
    if numbers is not None and model._covariates is not None:
        numbers = numbers * model._covariates.deviation + model._covariates.mean
    drawn = model.sample(n, labels=labels, covariates=numbers, seed=seed, **how)
    drawn = get_backend(model.backend).to_numpy(drawn)
    report = judgement.measure(drawn, rows, held_out, normaliser, seed=model.seed)
    complaint = judgement.complaint(report, net, model.prediction, base=model._gaussian is not None)
    return judgement.Evaluation(report, complaint, drawn, rows if held_out is None else held_out, rows)
