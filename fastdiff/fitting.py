"""One call of `Diffusion.fit`: what is asked is checked, rows are split, the first call decides what the model is, and
what is learned from them goes to the loop in `fastdiff.training`.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff import calibration, checkpoint, defaults, evaluation, judgement, sampling, series, split
from fastdiff.backends import Backend, SharingBackend, TrainingDraws, TrainState, get_backend
from fastdiff.backends.layers import PartsBackend
from fastdiff.base import GaussianBase
from fastdiff.callbacks import Reporter, listeners
from fastdiff.covariates import CovariateScale, checked_covariates, none_known
from fastdiff.errors import (
    ArgumentError,
    DataWarning,
    QualityWarning,
    TrainingError,
    check_callable,
    check_flags,
    check_float,
    check_int,
    shown,
)
from fastdiff.files import check_path, check_writable
from fastdiff.gaps import MOST_COPIES, Gaps, check_gaps, has_gaps
from fastdiff.jitter import Jitter
from fastdiff.model_file import Keeper
from fastdiff.nn import Network, NetworkDenoiser
from fastdiff.nn.optim import UNSET, TrainingPlan
from fastdiff.noise import MAX_STEP, NOISE_LAW_VERSION, Draw, Stream, targets
from fastdiff.normaliser import Normaliser, check_carried, settled
from fastdiff.ranks import PARTS, Ranks
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule
from fastdiff.split import Split
from fastdiff.stored import Feed, StoredRows, is_large
from fastdiff.training import (
    Counted,
    Optimizer,
    Patience,
    Saves,
    Trainer,
    Turns,
    Validation,
    loss_terms,
    plan_by_rule,
    train,
)

log = logging.getLogger("fastdiff")

SAVED_EVERY = 1000  # steps
ROWS_OF_TARGETS = 4096  # which tell what share of the values has a target, where a network is told of a mask

Float64 = npt.NDArray[np.float64]
Values = npt.NDArray[Any]


@dataclass(frozen=True)
class FitRequest:
    """What a call of `Diffusion.fit` is given beside rows and labels: see there.

    `plan` has the values of `TrainingPlan.changed`.
    """

    plan: dict[str, Any]
    covariates: Any
    validation: Any
    data_range: tuple[float, float] | None
    label_drop: float | None
    steps: int | None
    batch: int | None
    accumulate: int | None
    flip: bool
    crop: int | tuple[int, int] | None
    jitter: bool | None
    patience: int | None
    judge: bool | None
    calibrate: bool | None
    progress: bool
    callback: Callable[[int, float], Any] | None
    callbacks: Any
    checkpoint: str | os.PathLike[str] | None
    every: int | None
    keep: int
    keep_rows: int | None
    comm: Any

    def checked(self, *, writes: bool = True) -> FitRequest:
        """Return it with numbers and paths as they are used; `writes` says whether this process saves."""
        patience = None if self.patience is None else check_int("patience", self.patience, low=1)
        tell = listeners(self.callbacks)
        if self.checkpoint is None and (self.every is not None or self.keep != 1):
            raise ArgumentError("checkpoint", "None", "where to save, with every and keep")
        keep = check_int("keep", self.keep, low=1)
        every = SAVED_EVERY if self.every is None else check_int("every", self.every, low=1)
        path: Path | None = None
        if self.checkpoint is not None:
            path = check_path("checkpoint", self.checkpoint)
            if writes:
                check_writable(path)
        judge, calibrate, jitter = (
            False if each is None else each for each in (self.judge, self.calibrate, self.jitter)
        )
        check_flags(judge=judge, calibrate=calibrate, jitter=jitter, flip=self.flip, progress=self.progress)
        check_callable("callback", self.callback)
        keep_rows = None if self.keep_rows is None else check_int("keep_rows", self.keep_rows, low=0)
        return replace(
            self, keep_rows=keep_rows, patience=patience, callbacks=tell, checkpoint=path, every=every, keep=keep
        )


class Model(Counted, evaluation.Model, Protocol):
    """What a fit reads of a `Diffusion`, and changes."""

    schedule: Schedule | None
    normaliser: Normaliser | None
    scale: str
    base: str | None
    conditional: str | None
    channel_names: list[str] | None
    _own_net: bool
    _turns: Turns
    _optimizer: Optimizer | None
    _average: Values | None
    _arithmetic: int
    kept_rows: Values | None

    def named_sampler(self, name: str = "auto", steps: int | None = None, *, given: bool = False) -> Sampler: ...
    def impute(self, *args: Any, **options: Any) -> Any: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...


class Rows(NamedTuple):
    """All rows, and those learned from and held out, in the units of the data, and what they are asked with."""

    every: Values
    parts: Split
    classes: int | None
    covariates: Float64 | None
    of_unseen: Float64 | None

    @property
    def asked(self) -> dict[str, Any]:
        """What a network that is made for them is asked for, as arguments of it."""
        asked: dict[str, Any] = {} if self.classes is None else {"classes": self.classes}
        if self.covariates is None:
            return asked
        return asked | {"covariates": self.covariates.shape[-1]} | ({"pointwise": True} if self.pointwise else {})

    @property
    def pointwise(self) -> bool:
        """Whether there are covariates of every point or pixel."""
        return self.covariates is not None and self.covariates.ndim > 2


def fit(model: Model, X: Any, y: Any, request: FitRequest) -> None:
    """Train a model for further steps, as `Diffusion.fit` says."""
    ranks = None if request.comm is None else Ranks.of(request.comm)
    first_rank = ranks is None or ranks.rank == 0
    nobody: AbstractContextManager[dict[str, Any]] = nullcontext({})
    with nobody if ranks is None else ranks.agreeing() as facts:
        be = get_backend(model.backend)
        X, names, frame = series.taken(X)
        before, plan = _plan(model, request)
        steps = None if request.steps is None else check_int("steps", request.steps, low=0)
        if steps is not None:
            plan.check_named(request.plan["lr_plan"], request.plan["decay_steps"])
        request = request.checked(writes=first_rank)
        if model.normaliser is not None and model._optimizer is None:
            raise TrainingError("this model was saved with training=False: it can sample, but not go on training")
        found = _rows(model, X, y, request, be)
        parts = found.parts
        kind = type(model.net) if model.net is not None else defaults.network_kind(parts.rows.ndim)
        batch, accumulate = _batch(kind, request, be)
        if request.patience is not None and parts.held_out is None:
            raise ArgumentError("patience", str(request.patience), "rows that are held out: validation=0.1, or rows")
        if request.flip and parts.rows.ndim < 4:
            raise ArgumentError(
                "flip", shown(request.flip), f"False for {'curves' if parts.rows.ndim == 2 else 'series'}"
            )
        if request.crop is not None and (found.pointwise or model.conditional is not None):
            what = "covariates of each pixel" if found.pointwise else "a network that is told of a mask"
            raise ArgumentError("crop", shown(request.crop), f"None with {what}")
        if request.flip and found.pointwise:
            raise ArgumentError("flip", shown(request.flip), "False with covariates of each pixel")
        share = _share_dropped(model, request.label_drop, model.net or found.asked)
        if ranks is not None:
            facts |= _facts(model, found, request, be, (batch, accumulate))
    if model.normaliser is None and names is not None and parts.rows.ndim == 3:
        model.channel_names = names
    masked = {} if model.conditional is None else {"masked": True}
    gaps = _prepare(model, parts, found.asked | masked, plan, request.data_range)
    model._frame = frame or model._frame
    asked_plainly, found = found.of_unseen, _scaled(model, found)
    model._label_drop = share
    if (most := request.keep_rows) is not None:
        some = parts.rows[np.linspace(0, len(parts.rows) - 1, min(most, len(parts.rows))).astype(int)]
        model.kept_rows = some.astype(np.float64 if some.dtype == np.float64 else np.float32) if most else None
    net, _, _ = model._fitted()
    assert model._optimizer is not None and model._average is not None  # noqa: PT018
    by_rule = steps is None
    if steps is None:
        rank = 0 if model._gaussian is None else len(model._gaussian.variances)
        asked = request.plan["decay_steps"]
        decay = asked is not UNSET and asked is not None
        steps, plan = plan_by_rule(parts.rows.shape, batch, plan, model.step, net.layout.count, rank, decay=decay)
    if model.step and plan != before:
        log.info("from step %d on: %s", model.step, plan.difference(before))
        if plan.warmup > before.warmup and plan.warmup <= model.step:
            log.warning("warmup=%d has no effect: it is an absolute step, and has passed", plan.warmup)
    model._optimizer = optimizer = model._optimizer._replace(plan=plan)
    model._data = model._data or facts.get("data") or split.fingerprint(found.every)
    _doubts(model, parts.rows, steps, by_rule=by_rule, request=request)
    first, model.end_step = model.step, model.step + steps
    if steps > 0:
        _use_this_arithmetic(model)
    be = be if ranks is None else ranks.backend(model.backend)
    saver = None
    if request.checkpoint is not None and first_rank:
        saver = Keeper(model.save, request.checkpoint, request.keep)

    def save() -> None:
        if ranks is not None:
            ranks.same("weights", zlib.crc32(net.flat.data))
        if saver is not None and model.step > first:
            saver(model.step)

    kept = "" if saver is None else f"; what was saved last is in {request.checkpoint}"
    with nullcontext() if ranks is None else ranks.ending_together(kept):
        few = by_rule and _few(net, parts.rows)
        jitter = _jitters(model, parts.rows, gaps, request.jitter, few=few)
        data = _training_data(model, found, gaps, share, batch, flip=bool(request.flip), jitter=jitter)
        keeper = _keeper(model, data, request.patience, few=few)
        host = TrainState(net.flat, net.layout.zeros(net.dtype), optimizer.m, optimizer.v, model._average)
        trainer = Trainer(be, net, data.draws, host, batch, accumulate, ranks)
        trainer.turns, trainer.feed = model._turns, data.feed
        if trainer.feed is not None:
            trainer.feed.mine = trainer.mine
        if request.checkpoint is not None:
            assert request.every is not None
            trainer.saves = Saves(request.every, save)
        shows, tell = request.progress and first_rank, request.callbacks if first_rank else ()
        options: dict[str, Any] = {"validation": data.looks, "keeper": keeper, "progress": shows}
        trainer.reporter = Reporter(tell, model.history, optimizer.plan.rate) if tell else None
        try:
            train(trainer, model, optimizer.plan, callback=_agreed(request.callback, ranks), **options)
        finally:
            if saver is not None and model.step > first:
                saver(model.step)
        if ranks is not None:
            ranks.same("weights", zlib.crc32(net.flat.data))
        judge = request.judge
        if judge or (judge is None and (by_rule or model.step - first >= defaults.JUDGED_STEPS)):
            evaluation.judge(model, data.rows, data.unseen, (parts.labels, found.covariates), show=shows)
            if request.calibrate or (request.calibrate is None and parts.rows.ndim <= 3):
                _calibrate(model, parts.held_out, asked_plainly)
            if saver is not None:
                saver(model.step)  # with the report


def _batch(kind: type[Network], request: FitRequest, be: Backend) -> tuple[int, int]:
    """How many rows a step takes, and in how many parts."""
    batch = kind.usual_batch if request.batch is None else check_int("batch", request.batch, low=1, high=1 << 30)
    together = request.comm is not None
    in_parts = kind.in_parts or (together and isinstance(be, PartsBackend))
    usual = min(PARTS, batch) if together and in_parts else 1
    accumulate = usual if request.accumulate is None else check_int("accumulate", request.accumulate, low=1)
    if accumulate > (batch if in_parts else 1):
        wants = f"at most batch = {batch}" if in_parts else f"1, where {kind.__name__} takes a batch whole"
        raise ArgumentError("accumulate", str(accumulate), wants)
    if together and not (in_parts or isinstance(be, SharingBackend)):
        wants = f"None, or backend='cpu' instead of {be.name!r}: {kind.__name__} is not shared on that"
        raise ArgumentError("comm", shown(request.comm), wants)
    return batch, accumulate


def _agreed(callback: Callable[[int, float], Any] | None, ranks: Ranks | None) -> Callable[[int, float], Any] | None:
    """A callback that the first rank calls, and all heed."""
    if ranks is None or not ranks.first(callback is not None):
        return None if ranks is not None else callback

    def agreed(step: int, loss: float) -> bool:
        return bool(ranks.first(ranks.rank == 0 and callback is not None and bool(callback(step, loss))))

    return agreed


def _facts(model: Model, found: Rows, request: FitRequest, be: Backend, sizes: tuple[int, int]) -> dict[str, Any]:
    """What a training depends on, by name, so that ranks can compare it: small values, and checksums of arrays."""
    import fastdiff

    parts, net, optimizer = found.parts, model.net, model._optimizer
    names = (
        "steps", "label_drop", "data_range", "flip", "crop", "jitter", "patience", "judge", "calibrate", "every",
        "keep_rows",
    )  # fmt: skip
    plan = {name: value for name, value in request.plan.items() if value is not UNSET}
    learned = () if net is None else (net.flat, model._average, *(() if optimizer is None else optimizer[1:]))
    return {
        "the version of fastdiff": (fastdiff.__version__, NOISE_LAW_VERSION),
        "backend": _in_words(be),
        "data": split.fingerprint(found.every),
        "seed": int(model.seed),
        "step": model.step,
        "y": _checksum(parts.labels, None if parts.held_out is None else parts.held_out[1]),
        "covariates": _checksum(found.covariates, found.of_unseen),
        "validation": _checksum(parts.unseen),
        "batch": sizes[0],
        "accumulate": sizes[1],
        "checkpoint": request.checkpoint is not None,
        **{name: shown(getattr(request, name)) for name in names},
        **{name: shown(value) for name, value in plan.items()},
        "prediction, scale, base, conditional": (model.prediction, model.scale, model.base, model.conditional),
        "the schedule": None if model.schedule is None else _checksum(model.schedule.betas),
        "the network": None if net is None else shown(net),
        "weights": _checksum(*learned),
    }


def _in_words(be: Backend) -> str:
    """A backend with what its bits depend on."""
    options = (getattr(be, name, "") for name in ("precision", "convolutions"))
    return " ".join(filter(None, (be.name, *options)))


def _checksum(*arrays: Any) -> int:
    found = 0
    for array in arrays:
        found = zlib.crc32(b"None" if array is None else np.ascontiguousarray(array).data.cast("B"), found)
    return found


def _plan(model: Model, request: FitRequest) -> tuple[TrainingPlan, TrainingPlan]:
    """The plan before this call, and that of it."""
    before = TrainingPlan() if model._optimizer is None else model._optimizer.plan
    plan = before.changed(**request.plan)
    gamma = request.plan["snr_gamma"]
    if gamma is not UNSET and plan.weighting != "min_snr":
        raise ArgumentError("snr_gamma", str(gamma), f"weighting='min_snr' with it, not {plan.weighting!r}")
    aims = [(each.weighting, each.snr_gamma) for each in (plan, before)]
    if model._optimizer is not None and aims[0] != aims[1]:
        raise ArgumentError("weighting, snr_gamma", str(aims[0]), f"{aims[1]}, of the first fit; reset() starts anew")
    return before, plan


def _rows(model: Model, X: Any, y: Any, request: FitRequest, be: Backend) -> Rows:
    """Check rows and what they are asked with, and split them."""
    larger = request.crop is not None
    X, y, classes = split.checked(X, y, model.net, model.noise_shape, be, missing=True, larger=larger)
    size = None if request.crop is None else split.check_crop(request.crop, X, model.net)
    if size is not None and isinstance(X, StoredRows):
        raise ArgumentError("crop", shown(request.crop), "None for data on disk")
    if has_gaps(X):
        check_gaps(X, "X")
    known, of_unseen, validation = _known_covariates(model, request.covariates, X), None, request.validation
    if known is not None and isinstance(validation, (tuple, list)) and len(validation) > 1:
        *validation, of_unseen = validation
        validation = validation[0] if len(validation) == 1 else validation
    parts = split.split(X, y, validation, classes, model._held_out, model.seed, be)
    if known is not None and parts.held is not None:
        known, of_unseen = known[~parts.held], known[parts.held]
    parts = parts if size is None else parts.cut(size, model.seed)
    return Rows(X, parts, classes, known, of_unseen)


def _known_covariates(model: Model, covariates: Any, X: Values) -> Float64 | None:
    """Covariates of rows of data, in their own units: of each row, or of each of its points or pixels."""
    form = None if model.net is None else model.net.covariate_form
    if covariates is None and form is None:
        return None
    if model.net is not None and form is None:
        raise none_known(covariates)
    shape = None if form is None else form.shape
    if shape is None and getattr(covariates, "ndim", 0) > 2:
        shape = (*X.shape[1 : max(2, X.ndim - 1)], covariates.shape[-1])
    return checked_covariates(covariates, shape, len(X))


def _scaled(model: Model, rows: Rows) -> Rows:
    """Rows with covariates in the network's range."""
    if rows.covariates is None:
        return rows
    model._covariates = model._covariates or CovariateScale.of(rows.covariates)
    known, of_unseen = model._covariates.apply(rows.covariates), rows.of_unseen
    if rows.parts.held_out is not None:
        of_unseen = checked_covariates(of_unseen, known.shape[1:], len(rows.parts.held_out[0]))
        of_unseen = model._covariates.apply(of_unseen)
    return rows._replace(covariates=known, of_unseen=of_unseen)


def _share_dropped(model: Model, asked: Any, of: Network | dict[str, Any]) -> float:
    """The share of labels and covariates that are left out; `of` a network, or what one to be made is asked for."""
    free = of.asked_freely if isinstance(of, Network) else bool(of)
    if asked is None:
        return (0.1 if model._label_drop is None else model._label_drop) if free else 0.0
    share = check_float("label_drop", asked, low=0, high=1)
    if share and not free:
        wants = "0 or None: this network has no null class, as new networks with classes have"
        if isinstance(of, dict) or of.asked == of.known:
            wants = "0 or None: nothing is asked of this network; give y or covariates"
        raise ArgumentError("label_drop", shown(asked), wants)
    return share


def _doubts(model: Model, rows: Values, steps: int, *, by_rule: bool, request: FitRequest) -> None:
    """Say what makes it doubtful that so many steps teach what is in the rows; refuse too many."""
    net, _, _ = model._fitted()
    assert model._optimizer is not None
    plan = model._optimizer.plan
    judged = bool(by_rule or request.judge or steps >= defaults.JUDGED_STEPS)
    if doubt := judgement.doubt(rows, by_rule=by_rule, judged=judged):
        warnings.warn(doubt, QualityWarning, stacklevel=5)
    careless = not by_rule and request.patience is None and not model.step and steps >= defaults.JUDGED_STEPS
    if careless and (crowd := judgement.crowded(len(rows), net.layout.count)):
        warnings.warn(crowd, QualityWarning, stacklevel=5)
    decayed = None if plan.lr_plan == "constant" else plan.decay_steps
    if not by_rule and steps > 0 and decayed is not None and model.step >= decayed:
        words = "the rate has fallen to %g by step %d and stays there; give decay_steps, or leave steps out"
        log.info(words, plan.rate(model.step), decayed)
    if model.step + steps > MAX_STEP + 1:
        wants = f"at most {MAX_STEP + 1 - model.step}: after {MAX_STEP + 1} steps in all the draws would repeat"
        raise ArgumentError("steps", str(steps), wants)


def _prepare(model: Model, parts: Split, asked: dict[str, Any], plan: TrainingPlan, data_range: Any) -> Gaps | None:
    """What the first fit decides: network, schedule, normaliser, plan and buffers. Later ones are held to it.

    `asked` is what a network that is made is asked for, as arguments of it. Of rows with missing values return what is
    known of these.
    """
    X, gaps = parts.rows, None
    missing = has_gaps(X)
    if missing:
        if parts.held_out is not None:  # else these are all rows, which have been looked at
            check_gaps(X, "X, but for the rows held out")
        if model.noise_shape is not None or (model.net is not None and model.net.learned_variance):
            what = "a noise_shape" if model.noise_shape is not None else "a learned variance"
            raise ArgumentError("X", f"missing values, with {what}", "rows without any")
    names = model.channel_names
    whole = X if parts.whole is None else parts.whole
    normaliser = settled(model.normaliser, whole, parts.unseen, data_range, model.scale, model.noise_shape, names)
    if missing:  # of rows without a centre: the same in later fits, when there is one
        plain = replace(normaliser, centre=None).apply(X, np.float64)
        gaps = Gaps.of(plain.reshape(len(X), -1), model.seed)
    if model.normaliser is not None:
        return None if gaps is None else gaps.centred(normaliser.centre)
    if X.ndim == 4 and X.shape[1] in (1, 3) and min(X.shape[2:]) > 4:
        words = f"X of shape {X.shape} is taken for pictures of {X.shape[1]} x {X.shape[2]} pixels in {X.shape[3]} "
        hint = "channels; of (N, channels, height, width) X.transpose(0, 2, 3, 1) makes (N, height, width, channels)"
        warnings.warn(words + hint, DataWarning, stacklevel=5)
    if X.ndim < 4 and getattr(model.net, "dtype", None) != np.float64:
        scales = "all" if model.noise_shape is None and model.scale == "all" else "column"
        there = np.where(np.isnan(X), np.nanmean(X, axis=0), X) if missing else X
        check_carried(there.reshape(-1, X.shape[-1]), scales, "column" if X.ndim == 2 else "channel")
    net, schedule = defaults.network_and_schedule(
        model.net, model.schedule, X.shape, asked, base=model.base is not None, seed=model.seed
    )
    if net.dtype == np.float64 and get_backend(model.backend).name != "numpy":
        raise ArgumentError("backend", shown(model.backend), "'numpy': this network has float64 parameters")
    model._gaussian = None
    if net.has_linear and (model.base == "gaussian" or (model.base == "auto" and model._own_net)):
        if gaps is None:
            normaliser = normaliser.centred(X)
            model._gaussian = GaussianBase.of(_inner_rows(normaliser, X))
        else:
            normaliser = replace(normaliser, centre=gaps.mean.reshape(X.shape[1:]))
            gaps = gaps.centred(normaliser.centre)
            model._gaussian = GaussianBase.of(gaps.filled(1)[0], gaps.cov)
        new, first = net.is_new, net.params["layers.0.weight"]
        net.set_linear(model._gaussian.linear(schedule, model.prediction))
        if new:  # a trained one keeps its weights
            first[...] = model._gaussian.turned(first.astype(np.float64))
    model.schedule, model.net = schedule, net
    zeros = net.layout.zeros
    model._optimizer = Optimizer(plan, zeros(net.dtype), zeros(net.dtype))
    model._average = net.flat.copy()
    model.normaliser = normaliser
    model._held_out = parts.rule
    return gaps


def _use_this_arithmetic(model: Model) -> None:
    """Say once that a file was trained with other bits than those that follow."""
    assert model.net is not None
    before, model._arithmetic = model._arithmetic, max(checkpoint.ARITHMETIC, model.net.arithmetic)
    if before != model._arithmetic and model.step > 0:
        words = "trained with arithmetic %d so far, now with %d: equal to one run up to rounding, not to the bit"
        log.warning(words, before, model._arithmetic)


class TrainingData(NamedTuple):
    """What a network learns from, in its range, and is looked at with; `rows` and `unseen` are whole, in data units.

    The `feed` brings rows that are on disk.
    """

    draws: TrainingDraws
    looks: Validation | None
    rows: Values
    unseen: Values | None
    feed: Feed | None = None
    jittered: bool = False


def _training_data(
    model: Model, found: Rows, gaps: Gaps | None, share: float, batch: int, *, flip: bool, jitter: bool
) -> TrainingData:
    net, schedule, normaliser = model._fitted()
    assert model._optimizer is not None
    be, parts = get_backend(model.backend), found.parts
    rows, unseen, known = parts.rows, parts.unseen, found.covariates
    whole = rows if parts.whole is None else parts.whole
    stored, jittered = rows if isinstance(rows, StoredRows) else None, False
    if stored is None:
        data = normaliser.apply(whole, net.dtype) if gaps is None else gaps.training_data()
        if jitter:
            assert model._gaussian is not None
            inner = _inner_rows(normaliser, whole)
            how = Jitter.of(model._gaussian, inner)
            jittered = how is not None
            data = data if how is None else how.copies(inner, model.seed).reshape(-1, *whole.shape[1:])
        data = be.asarray(data, net.dtype)
    tables = schedule.signal, schedule.noise, *schedule.target(model.prediction)
    terms = loss_terms(schedule, model.prediction, model._optimizer.plan, learned_variance=net.learned_variance)
    if gaps is not None:  # the loss is that of what is there
        terms = (np.ones((schedule.T, 1)) if terms is None else terms) / gaps.share
        rows = _whole(normaliser, gaps.filled(1)[0], rows.shape)
    repeats = 1 if stored is not None else len(data) // len(rows)  # copies of rows with gaps
    aims = None if model.conditional is None else (model.conditional, net.image)
    if aims is not None:  # as large as if every value had a target
        share_of_targets = targets(ROWS_OF_TARGETS, net.image, aims[0], Draw(model.seed, Stream.DROP)).mean()
        terms = (np.ones((schedule.T, 1)) if terms is None else terms) / share_of_targets
    form, numbers = net.covariate_form, None
    if known is not None and form is not None:
        numbers = form.marked(get_backend("numpy"), known.astype(net.dtype))
    repeated = (None if part is None else np.concatenate([part] * repeats) for part in (parts.labels, numbers))
    of_rows, of_numbers = repeated if repeats > 1 else (parts.labels, numbers)
    feed: Feed | None = None
    if stored is not None:
        inner = partial(normaliser.apply, dtype=net.dtype)
        feed = Feed(be, stored, inner, batch, model.seed, (parts.labels, numbers))
        data, (of_rows, of_numbers) = feed.data, feed.asked
    draws = TrainingDraws(
        data, *tables, model.seed, of_rows, flip, terms, of_numbers, share, net.classes or 0, gaps is not None,
        aims, stored is not None,
    )  # fmt: skip
    looks: Validation | None = None
    if parts.held_out is not None:
        x0, hidden = normaliser.apply(parts.held_out[0], net.dtype), None
        if gaps is not None:
            hidden = np.where(np.isnan(x0), np.nan, 0.0)
            flat = normaliser.apply(parts.held_out[0], np.float64).reshape(len(x0), -1)
            x0 = gaps.filled(1, flat, first=MOST_COPIES)[0].reshape(x0.shape)
            unseen = _whole(normaliser, x0, x0.shape)
        of_held = parts.held_out[1], found.of_unseen
        looks = Validation(be, net, x0.astype(net.dtype), of_held, schedule, draws, hidden)
    return TrainingData(draws, looks, rows, unseen, feed, jittered)


def _few(net: Network, rows: Any) -> bool:
    """Whether there are so few curves or series that a network may learn them by heart, and that it shows in samples.

    Samples that are asked for what a row is lie near that row: of these a watch would take good ones for copies.
    """
    return 2 <= len(rows) <= defaults.WATCHED_ROWS and rows.ndim < 4 and net.asked == net.known


def _jitters(model: Model, rows: Any, gaps: Gaps | None, asked: bool | None, *, few: bool) -> bool:
    """Whether rows are learned from with jitter."""
    why = {
        "with a Gaussian base": model._gaussian is None,
        "where no values are missing": gaps is not None,
        "of rows in memory": isinstance(rows, StoredRows),
        "for a network that is not told of a mask": model.conditional is not None,
    }
    lacking = [what for what, lacks in why.items() if lacks]
    if asked and lacking:
        raise ArgumentError("jitter", "True", f"None or False: there is jitter only {lacking[0]}")
    return few and not lacking if asked is None else asked


def _keeper(model: Model, data: TrainingData, patience: int | None, *, few: bool) -> judgement.Watch | Patience | None:
    """What looks at the weights of a training, and says which stay."""
    net, _, normaliser = model._fitted()
    rows = data.rows
    if patience is not None and data.looks is not None:
        return Patience(patience, data.looks)
    if few:
        be = get_backend(model.backend)
        learned = normaliser.apply(rows[:], net.dtype).reshape(len(rows), -1)
        return judgement.Watch(
            learned, partial(_drawn_inside, model, be), model.step, model.end_step, ends=data.jittered
        )
    return None


def _calibrate(model: Model, held_out: tuple[Values, Values | None] | None, covariates: Float64 | None) -> None:
    """Learn from held-out rows how widely a model of curves or series has to draw what is missing."""
    net, _, normaliser = model._fitted()
    if held_out is None or held_out[0].ndim > 3 or normaliser.noise_shape is not None or model.report_ is None:
        return
    rows = held_out[0][: calibration.most_rows(net, model.named_sampler(given=True).evaluations)]
    if len(rows) < calibration.FEWEST:
        return
    model.spread, (n, labels) = 1.0, (len(rows), held_out[1])
    holes = calibration.hidden(rows.astype(np.float64), model.seed)
    asked = {"labels": None if labels is None else labels[:n]}
    asked["covariates"] = None if covariates is None else covariates[:n]
    found = calibration.measure(rows, holes, model.impute(holes, calibration.DRAWS, **asked))
    if found is not None:
        log.info(found.sentence)
        model.spread = found.factor
        model.report_ |= found.to_dict()


def _inner_rows(normaliser: Normaliser, X: Any) -> Any:
    """Rows in the network's range as they are flat, in float64."""
    if not is_large(X):
        return normaliser.apply(X, np.float64).reshape(len(X), -1)
    return normaliser.seen(X).reshape(-1, math.prod(X.shape[1:]))


def _whole(normaliser: Normaliser, inner: Float64, shape: tuple[int, ...]) -> Float64:
    """Rows whose missing values were drawn, in the data's units."""
    whole: Float64 = normaliser.invert(inner.reshape(shape).copy(), get_backend("numpy"))
    return whole


def _drawn_inside(model: Model, be: Backend, weights: Values) -> Values:
    """Samples of some weights of the network, in its own range."""
    net, _, _ = model._fitted()
    denoiser = NetworkDenoiser(net, be.asarray(weights, net.dtype), model.prediction, be)
    drawn = sampling.sample(denoiser, model.named_sampler(), n=judgement.SAMPLES, seed=model.seed, backend=be)
    return be.to_numpy(drawn).reshape(len(drawn), -1)
