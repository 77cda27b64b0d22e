"""One call of `Diffusion.sample`: the table that runs, and the way of what is asked and of what is drawn between the
units of the data and the range of the network.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff import defaults, samplers, sampling, series
from fastdiff.backends import Backend, get_backend
from fastdiff.base import GaussianBase
from fastdiff.conditioning import inside, log_units, put_exact
from fastdiff.covariates import CovariateScale, checked_covariates, none_known
from fastdiff.errors import (
    ArgumentError,
    TrainingError,
    all_finite,
    as_named,
    check_float,
    check_size,
    is_on_device,
    shown,
)
from fastdiff.nn import Network, NetworkDenoiser
from fastdiff.normaliser import Normaliser
from fastdiff.observations import Given, Known, Linear, Observations, observations
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule

MOST_ASKED = 1e30  # of a value that is asked about: float32 holds it, and what it is scaled to
REPLACING = ("replace", "repaint")  # methods that leave a table's clip
TABLES = 8  # named ones that a model keeps


class Model(Protocol):
    """What sampling reads of a `Diffusion`."""

    prediction: str
    backend: str | Backend
    spread: float
    _gaussian: GaussianBase | None
    _covariates: CovariateScale | None
    _label_drop: float | None
    _frame: series.Frame | None
    _tables: dict[tuple[Any, ...], Sampler]

    def _fitted(self) -> tuple[Network, Schedule, Normaliser]: ...
    def _sampled(self, ema: bool) -> NetworkDenoiser: ...


class Form(NamedTuple):
    """How samples are drawn and in what form they come, as `Diffusion.sample` says."""

    sampler: str | Sampler
    steps: int | None
    ema: bool
    round: bool
    as_frame: bool


def sample(model: Model, form: Form, given: Given | None, covariates: Any, options: dict[str, Any]) -> Any:
    """Draw samples; `options` are those of `fastdiff.sample` that need no change."""
    net, _, normaliser = model._fitted()
    check_guidance(options["guidance"], net, model._label_drop)
    trajectory, evidence, method = (options[name] for name in ("trajectory", "return_evidence", "method"))
    frame = model._frame if form.as_frame else None
    if form.as_frame and (frame is None or trajectory or given is not None):
        wants = "a model fitted on a frame, or on windows of one, in this process; no trajectory, nothing given"
        raise ArgumentError("as_frame", "True", wants)
    known = None if given is None else _observations(given, net)
    table = _table(model, form, known, method)
    if normaliser.noise_shape is not None:
        sampling.refuse_clip(table)
    be = get_backend(model.backend)
    asked = options["n"] if known is None or known.count is None else known.count
    result = sampling.sample(
        model._sampled(form.ema),
        table,
        backend=model.backend,
        covariates=None if covariates is None else inner_covariates(model, covariates, asked),
        given=None if known is None else inside(known, *normaliser.affine(net.shape), normaliser.noise_shape),
        **options,
    )
    x, other = result if trajectory or evidence else (result, None)
    if not is_on_device(x) and not all_finite(x):
        raise TrainingError("samples that are not finite: the weights are too large for it, train with a smaller lr")
    drawn = normaliser.restore(x, be)
    drawn = drawn.round() if form.round else drawn
    if known is not None:
        drawn = put_exact(drawn, known)
    if frame is not None:
        drawn = be.to_numpy(drawn)
        return frame.samples(drawn) if drawn.ndim == 3 else frame.rows(drawn)
    if trajectory:
        return drawn, normaliser.invert(other, be)
    if known is None or not evidence:
        return drawn
    if normaliser.noise_shape is not None:  # what is seen is in the data's units
        return drawn, other
    return drawn, other - log_units(known, normaliser.affine(net.shape)[0])


def named_sampler(model: Model, name: str, steps: int | None, *, given: bool) -> Sampler:
    """Return the table of a name, which the model keeps: to make one takes longer than to draw a curve."""
    net, schedule, normaliser = model._fitted()
    if not isinstance(name, str):
        raise ArgumentError("name", shown(name), "a name, or a table of fastdiff.samplers")
    if name == "auto":
        name, usual = defaults.curve_sampler(schedule, base=model._gaussian is not None)
        steps = usual if steps is None else steps
    clip = None if normaliser.data_range is None or name in samplers.UNCLIPPED else 1.0
    options: dict[str, Any] = {"prediction": model.prediction, "clip": clip}
    if name == "ddpm" and net.learned_variance and not given:  # the one learned is not that given observations
        options["variance"] = "learned_range"
    if clip is not None and name in samplers.RECLIPPED:
        options["reclip"] = True
    if steps is not None and type(steps) is not int:
        return samplers.named(name, schedule, steps, **options)
    key = name, steps, id(schedule), *options.items()
    table = model._tables.get(key)
    if table is None:
        table = samplers.named(name, schedule, steps, **options)
        if len(model._tables) >= TABLES:
            model._tables.clear()
        model._tables[key] = table
    return table


def _table(model: Model, form: Form, known: Observations | None, method: Any) -> Sampler:
    """Return the table that runs: a named one as observations need it, or that of the caller, checked."""
    net, schedule, _ = model._fitted()
    sampler = form.sampler
    if not isinstance(sampler, Sampler):
        by_name = method if isinstance(method, str) else ""  # what is no name is refused when the table runs
        if known is not None and isinstance(sampler, str) and sampler == "auto" and by_name in ("repaint", "smc"):
            sampler = "ddpm"
        with as_named(name="sampler"):
            table = named_sampler(model, sampler, form.steps, given=known is not None)
        if known is not None and not net.masked and by_name not in REPLACING:
            table = table.unclipped()
        if known is not None and model.spread != 1 and by_name in ("auto", "tmpd"):
            table = table.unclipped().widened(model.spread)
        return table
    if form.steps is not None:
        raise ArgumentError("steps", str(form.steps), "None with a table: it has its own steps")
    if sampler.prediction != model.prediction:
        wants = f"one made with prediction={model.prediction!r}, as this model predicts"
        raise ArgumentError("sampler", f"a table for prediction {sampler.prediction!r}", wants)
    if found := sampler.schedule.difference(schedule):
        raise ArgumentError("sampler", f"a table for {sampler.schedule!r}: {found}", f"one for {schedule!r}")
    return sampler


def _observations(given: Given, net: Network) -> Observations:
    """What is known of samples, in the units of the data."""
    for k, item in enumerate(given if isinstance(given, (list, tuple)) else [given]):
        name = f"given[{k}]" if isinstance(given, (list, tuple)) else "given"
        if isinstance(item, (Known, Linear)):
            check_size(name, item.values if isinstance(item, Known) else item.y, MOST_ASKED)
    return observations(given, net.shape)


def inner_covariates(model: Model, covariates: Any, n: int) -> npt.NDArray[np.float64] | None:
    """Return covariates of n samples in the network's range."""
    form = model._fitted()[0].covariate_form
    if form is None and covariates is None:
        return None
    if form is None or model._covariates is None:
        raise none_known(covariates)
    return model._covariates.apply(checked_covariates(covariates, form.shape, n))


def check_guidance(guidance: Any, net: Network, label_drop: float | None) -> None:
    """Refuse to guide what was not trained for it."""
    if guidance is not None and check_float("guidance", guidance, low=0) != 1 and not label_drop:
        wants = "None or 1: this network is asked for nothing; give fit labels or covariates"
        if net.asked_freely:
            wants = "None or 1: this model was trained without leaving labels out; fit with label_drop=0.1"
        elif net.asked > net.known:
            wants = "None or 1: this network has no null class; train a new one, and fit leaves labels out at times"
        raise ArgumentError("guidance", shown(guidance), wants)
