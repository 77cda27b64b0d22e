"""The training loop: steps are issued ahead, and their losses read late. What it aims at, and how far it goes."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from time import perf_counter, sleep
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastdiff import defaults
from fastdiff.backends import AdamW, Array, Backend, TrainingDraws, TrainState
from fastdiff.backends.layers import Batch
from fastdiff.backends.numpy.functions import squared_error
from fastdiff.callbacks import Reporter
from fastdiff.errors import ArgumentError, ScheduleWarning, TrainingError, all_finite, as_named
from fastdiff.forks import at_fork, free
from fastdiff.judgement import LOOK_EVERY, Watch
from fastdiff.nn import Network
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import MAX_STEP, Draw, Stream, targets
from fastdiff.process import forward_noise
from fastdiff.progress import bar as progress_bar
from fastdiff.ranks import Ranks
from fastdiff.samplers.table import x0_from_output
from fastdiff.schedule import Schedule
from fastdiff.signals import held_back
from fastdiff.stored import Feed

log = logging.getLogger("fastdiff")
P = ParamSpec("P")
R = TypeVar("R")

BOUND_WEIGHT = 1e-3  # of the variational bound beside the squared error, where a variance is learned
ANEW = "load one saved before, or reset()"
READ_SECONDS = 0.1  # at most, from one look at the losses to the next


def empty_history() -> dict[str, list[Any]]:
    """Return the history of a model that has taken no step."""
    return {"step": [], "loss": [], "validation_step": [], "validation_loss": []}


def history_table(history: dict[str, list[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return a history as columns of one length: see `Diffusion.history_table`."""
    step = np.union1d(*(np.array(history[name], np.int64) for name in ("step", "validation_step")))
    table: dict[str, npt.NDArray[Any]] = {"step": step}
    for at, name in (("step", "loss"), ("validation_step", "validation_loss")):
        table[name] = np.full(len(step), np.nan)
        table[name][np.searchsorted(step, np.array(history[at], np.int64))] = history[name]
    return table


class Optimizer(NamedTuple):
    """The moving parts of training, besides the weights; all in the layout of the flat buffer."""

    plan: TrainingPlan
    m: npt.NDArray[Any]
    v: npt.NDArray[Any]


class Turns:
    """Who may look at a model, or train it: one fit at a time, and other threads between two of its steps."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: list[object] = []
        self._training: dict[str, object] = {}
        at_fork(self)

    def renew(self) -> None:
        self._lock, self._waiting, self._training = free(self._lock), [], {}

    @contextmanager
    def training(self, model: object) -> Iterator[None]:
        """Train inside the block; `TrainingError` where a fit of the model is under way."""
        me = object()
        if self._training.setdefault("fit", me) is not me:
            raise TrainingError(f"{model!r} is being trained by another call of fit: wait for it, or train a copy")
        try:
            with self._lock:
                yield
        finally:
            self._training.pop("fit", None)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the model inside the block: no step of another thread is under way, and none begins."""
        me = object()
        self._waiting.append(me)
        try:
            with self._lock:
                yield
        finally:
            self._waiting.remove(me)

    def wanted(self) -> bool:
        """Whether somebody waits for the step to end."""
        return bool(self._waiting)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let others look inside the block, and until all have looked who wait at its end: called by what trains."""
        self._lock.release()
        try:
            yield
            waiting = list(self._waiting)
            while any(one in self._waiting for one in waiting):
                sleep(1e-4)
        finally:
            self._lock.acquire()


def alone(fit: Callable[P, R]) -> Callable[P, R]:
    """Make a method take its turn of ``self._turns`` for training."""

    @wraps(fit)
    def inside(*args: P.args, **options: P.kwargs) -> R:
        model: Any = args[0]
        with model._turns.training(model):
            return fit(*args, **options)

    return inside


class Saves(NamedTuple):
    """A function that is called after every so many steps."""

    every: int
    save: Callable[[], None]


class Counted(Protocol):
    """What a trainer counts in: a `Diffusion` is one."""

    step: int
    end_step: int
    ema_updates: int
    history: dict[str, list[Any]]


class Trainer:
    """Training of a network on a backend.

    Parameters
    ----------
    be : Backend
    net : Network
    draws : TrainingDraws
        What a step draws its batch from, the data on the backend.
    host : TrainState
        Arrays on the host, but for the gradient; where the backend works on copies they are brought back.
    batch, parts : int
        See `Runner.training`.
    ranks : Ranks, optional
        Who takes the same steps.
    """

    def __init__(
        self,
        be: Backend,
        net: Network,
        draws: TrainingDraws,
        host: TrainState,
        batch: int,
        parts: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.be, self.host, self.ranks = be, host, ranks
        # The same arrays on the CPU; on a GPU copies.
        self.state = TrainState(*(be.asarray(array, net.dtype) for array in host))
        self.results = be.asarray(np.zeros((be.steps_ahead, 2)), np.float64)
        runner = net.runner(be, self.state.params)
        team = {} if ranks is None else {"team": ranks}
        self.steps = runner.training(draws, batch, parts, self.state, self.results, **team)
        self.brought = True  # whether the host has what has been trained
        self.saves: Saves | None = None
        self.turns: Turns | None = None  # of whoever is trained
        self.reporter: Reporter | None = None  # it reports whenever losses have been read
        self.feed: Feed | None = None  # of data that are on disk
        self.mine: slice = getattr(self.steps, "rows", slice(None))  # the positions of a batch that are computed here

    def bring_back(self) -> None:
        """Bring what has been trained to the host."""
        for name, ours, theirs in zip(self.host._fields, self.host, self.state, strict=True):
            if ours is not theirs and name != "grads" and not self.brought:
                ours[...] = self.be.to_numpy(theirs)
        self.brought = True

    def unsound(self) -> str | None:
        """Return what of the state is not finite: the next loss would show it, but for the last step's."""
        self.bring_back()
        for name, array in zip(self.host._fields, self.host, strict=True):
            if name != "grads" and not all_finite(array):
                return "weights" if name in ("params", "average") else "moments of the gradient"
        return None

    def run(
        self,
        model: Counted,
        steps: int,
        options: Callable[[int, int], AdamW],
        *,
        look: Callable[[Array], bool] | None = None,
        progress: bool = True,
        callback: Callable[[int, float], Any] | None = None,
    ) -> None:
        """Take so many steps.

        Parameters
        ----------
        model : Counted
            Its counts and its history go on.
        steps : int
        options : callable
            Of the step and of how many averages there were before it: see `TrainingPlan.options`.
        look : callable, optional
            Called with the averaged weights at every step that is a multiple of `LOOK_EVERY`; a true result stops.
        progress, callback
            As of `Diffusion.fit`.
        """
        be, results, saves, turns, ranks = self.be, self.results, self.saves, self.turns, self.ranks
        first = issued = model.step
        read_at = perf_counter()

        def check() -> None:
            if issued > first and (found := self.unsound()):
                raise TrainingError(f"{found} not finite after step {issued - 1}: stopped; {ANEW}, try a smaller lr")

        def settle() -> None:
            """Wait for the steps that have been issued, and count them."""
            nonlocal issued, read_at
            rows = be.to_numpy(results) if issued > model.step else ()
            while model.step < issued:
                loss, norm = rows[model.step % len(rows)].tolist()
                if not math.isfinite(norm):
                    issued = model.step  # the others have done nothing
                    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} at loss {loss:g}"
                    before = self.unsound()
                    kept = "the model keeps the state before it" if before is None else f"{before} not finite, {ANEW}"
                    raise TrainingError(f"{what} in step {model.step}: stopped; {kept}, try a smaller lr")
                model.history["step"].append(model.step)
                model.history["loss"].append(loss)
                model.step += 1
                model.ema_updates += 1
                bar.update()
                if progress and model.step % 50 == 0:
                    bar.set_postfix(loss=f"{np.mean(model.history['loss'][-50:]):.4f}", refresh=False)
            read_at = perf_counter()

        with (
            ExitStack() as last,
            held_back() as interrupted,
            progress_bar(show=progress, total=steps, desc="training") as bar,
        ):
            if self.feed is not None:
                last.callback(self.feed.close)
            last.callback(self.bring_back)
            last.callback(settle)
            end = model.step + steps
            while issued < end:
                if saves is not None and issued > first and issued % saves.every == 0:
                    settle()
                    check()
                    saves.save()
                if turns is not None and turns.wanted():
                    settle()
                    self.bring_back()
                    with turns.pause():
                        pass
                if look is not None and issued % LOOK_EVERY == 0:
                    settle()
                    if look(self.state.average):
                        return
                if self.feed is not None:
                    self.feed.put(issued, end)
                if ranks is not None:
                    ranks.wish = interrupted() or ranks.wanted()
                self.steps.run(issued, options(issued, model.ema_updates + issued - model.step))
                self.brought = False
                issued += 1
                stops = interrupted() if ranks is None else ranks.stops
                late = issued - model.step >= be.steps_ahead
                if ranks is None:  # else all read losses after the same steps
                    late = late or perf_counter() - read_at > READ_SECONDS
                if not (late or callback is not None or stops or issued == end):
                    continue
                settle()
                if self.reporter is not None:
                    self.reporter.report()
                if callback is not None:
                    self.bring_back()
                    with turns.pause() if turns is not None else nullcontext():
                        stop = callback(model.step - 1, model.history["loss"][-1])
                    if stop:
                        break
                if interrupted() if ranks is None else stops:  # a callback may have been interrupted
                    raise KeyboardInterrupt
            check()
            if look is not None and model.step % LOOK_EVERY == 0:
                look(self.state.average)
            if ranks is not None and ranks.any(interrupted() or ranks.wanted()):
                raise KeyboardInterrupt


def plan_by_rule(
    shape: tuple[int, ...], batch: int, plan: TrainingPlan, step: int, parameters: int, rank: int, *, decay: bool
) -> tuple[int, TrainingPlan]:
    """Return how many steps suit data of a shape (N, ...), and the plan: its rate falls from the first step of all.

    `parameters` are those of the network, `rank` is that of its base; `decay` says that the plan's is not to change.
    """
    if len(shape) < 4:
        steps = defaults.curve_steps(shape[0], math.prod(shape[1:]), batch, parameters, rank)
    else:
        steps = defaults.PICTURE_STEPS
    falls = plan.lr_plan != "constant"
    if not decay and falls:
        plan = replace(plan, decay_steps=max(step + steps, plan.warmup + 1))
    what, goes = "x".join(map(str, shape[1:])), "a falling rate" if falls else "a constant rate"
    log.info("chosen for %d rows of %s values: %d steps of %d, %s", shape[0], what, steps, batch, goes)
    return steps, plan


def loss_terms(
    schedule: Schedule, prediction: str, plan: TrainingPlan, *, learned_variance: bool = False
) -> npt.NDArray[np.float64] | None:
    """Return what a row's loss is made of at its timestep, (T, columns): see `LayerBackend.squared_error`.

    The error of x0 is q times that of the prediction (`fastdiff.samplers.table.x0_from_output`). With "min_snr" the
    latter counts min(SNR, gamma) q^2: min(SNR, gamma) / SNR for the noise, and / (SNR + 1) for v where variance is
    preserved. None: it counts 1.

    A learned variance adds the variational bound, as its expectation over t, in nats a value, times `BOUND_WEIGHT`
    (Nichol and Dhariwal 2021, equation 16). With log variance M + h v, between that of the posterior and log beta, and
    the means k d apart where the prediction is d off, a term of the bound is half of

        M + h v - log var + (var + k^2 d^2) exp(-M - h v) - 1,

    var being the posterior's variance; at t = 0 it is the density of the data, half of M + h v + log 2 pi +
    k^2 d^2 exp(-M - h v).
    """
    _, q = x0_from_output(schedule.signal, schedule.noise, prediction)
    weight = np.ones(schedule.T)
    if plan.weighting == "min_snr":
        weight = np.minimum((schedule.signal / schedule.noise) ** 2, plan.snr_gamma) * q**2
    if weight[-1] == 0:
        words = "min_snr gives the last timestep, whose signal is 0, no weight: samples start from what is not learned"
        warnings.warn(f"{words}. Take weighting='uniform'", ScheduleWarning, stacklevel=6)
    if not learned_variance:
        return None if plan.weighting == "uniform" else np.asarray(weight[:, None])
    least, most = learned_range(schedule)
    M, h, variance = (most + least) / 2, (most - least) / 2, schedule.posterior_variance
    k = np.append(1.0, schedule.signal[:-1]) * schedule.betas / schedule.noise**2 * q
    rest = np.append(M[0] + math.log(2 * math.pi), M[1:] - np.log(variance[1:]) - 1)
    share = np.full(schedule.T, BOUND_WEIGHT * schedule.T / 2)
    return np.stack([weight, share, h, variance * np.exp(-M), k**2 * np.exp(-M), rest], axis=1)


def learned_range(schedule: Schedule) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Logarithms of the variances between which a learned one lies: the posterior's, at t = 0 as at 1, and beta."""
    if schedule.T < 2:
        raise ArgumentError("schedule", "T = 1", "at least 2 steps for a learned variance")
    variance = schedule.posterior_variance
    return np.log(np.append(variance[1], variance[1:])), np.log(schedule.betas)


class Validation:
    """The loss on rows that are held out: noise of stream FORWARD, timesteps spread evenly.

    Parameters
    ----------
    be : Backend
    net : Network
    x0 : array
        The rows in the network's range.
    asked : pair of array
        Their classes and their covariates, or None.
    schedule : Schedule
    draws : TrainingDraws
        With the targets, the terms of the loss, and the seed. Where a network is told of a mask, it is that of stream
        DROP at the last step of all.
    hidden : array, optional
        Like the rows, NaN where a value was missing and has no error, and 0 elsewhere.
    """

    def __init__(
        self,
        be: Backend,
        net: Network,
        x0: Array,
        asked: tuple[Array | None, Array | None],
        schedule: Schedule,
        draws: TrainingDraws,
        hidden: Array | None = None,
    ) -> None:
        self.be, self.net = be, net
        t = np.arange(len(x0)) * schedule.T // len(x0)
        with as_named(x0="validation"):
            x, eps = forward_noise(x0, t, schedule, seed=draws.seed, backend=be)
        tables = draws.target_noise, draws.target_data
        of_noise, of_data = (table[t].reshape(-1, *(1,) * (x0.ndim - 1)) for table in tables)
        target = (of_noise * eps + of_data * x0 + (0 if hidden is None else hidden)).astype(x.dtype)
        self.known = None
        if draws.targets is not None:
            given = ~targets(len(x0), draws.targets[1], draws.targets[0], Draw(draws.seed, Stream.DROP, MAX_STEP))
            given = given.reshape(x0.shape) & ~np.isnan(target)
            self.known = np.where(given, x0, np.nan)
            signal = schedule.signal.astype(x.dtype)[t].reshape(-1, *(1,) * (x0.ndim - 1))
            np.copyto(x, signal * x0, where=given)
            np.copyto(target, np.nan, where=given)
        terms = None if draws.terms is None else draws.terms[t]
        labels, covariates = asked
        self.batch = Batch(be.asarray(x), be.asarray(t, np.int64), target, labels, terms, covariates)

    def loss(self, average: Array) -> float:
        """Return the loss of these weights."""
        x, t, target, labels, terms, covariates = self.batch[:6]
        options: dict[str, Any] = {"covariates": covariates, "backend": self.be, "flat": average, "known": self.known}
        out = self.be.to_numpy(self.net.predict(x, t, labels, **options))
        return squared_error(out, target, terms)[0]

    def look(self, model: Counted, average: Array) -> float | None:
        """Write the loss of these weights into the history, and return it."""
        if model.history["validation_step"][-1:] == [model.step]:
            return None  # an earlier fit ended here
        model.history["validation_step"].append(model.step)
        model.history["validation_loss"].append(self.loss(average))
        return float(model.history["validation_loss"][-1])


class Patience:
    """Waits for a smaller loss on held-out rows, and keeps the averaged weights that had the smallest.

    Parameters
    ----------
    steps : int
        How long to wait.
    validation : Validation

    Attributes
    ----------
    stopped : bool
        Whether it has ended the training.
    """

    def __init__(self, steps: int, validation: Validation) -> None:
        self.steps, self.validation, self.stopped = steps, validation, False
        self.best: tuple[float, int, npt.NDArray[Any]] | None = None  # loss, step, weights

    def look(self, step: int, average: Array, loss: float | None = None) -> bool:
        """Look at the weights after so many steps, or at their loss; true where it has waited long enough."""
        if self.best is not None and step == self.best[1]:
            return False
        loss = self.validation.loss(average) if loss is None else loss
        if self.best is None or loss < self.best[0]:
            self.best = loss, step, np.array(self.validation.be.to_numpy(average))
        self.stopped = step - self.best[1] >= self.steps
        return self.stopped


def train(
    trainer: Trainer,
    model: Counted,
    plan: TrainingPlan,
    *,
    validation: Validation | None = None,
    keeper: Watch | Patience | None = None,
    progress: bool = True,
    callback: Callable[[int, float], Any] | None = None,
) -> None:
    """Train a model up to its `end_step`, looking at held-out rows and at weights; of those the best stay.

    The `keeper` is what looks: at samples (`Watch`), or at held-out rows (`Patience`).
    """
    be, average, ranks = trainer.be, trainer.host.average, trainer.ranks
    if isinstance(keeper, Watch):
        keeper.look(model.step, average)

    def looked(average: Any) -> bool:
        loss = None if validation is None else validation.look(model, average)
        if isinstance(keeper, Patience):
            return keeper.look(model.step, average, loss)
        return keeper is not None and keeper.look(model.step, be.to_numpy(average))

    def look(average: Any) -> bool:
        ends = looked(average)
        return ends if ranks is None else bool(ranks.first(ends))

    looking = look if validation is not None or keeper is not None else None
    steps = model.end_step - model.step
    try:
        trainer.run(model, steps, plan.options, look=looking, progress=progress, callback=callback)
    finally:
        if trainer.reporter is not None:
            trainer.reporter.report(end=True)
    if keeper is None:
        return
    if model.step == model.end_step and not keeper.stopped:
        keeper.look(model.step, be.asarray(average) if isinstance(keeper, Patience) else average)
    if keeper.stopped:
        model.end_step = model.step
    if isinstance(keeper, Patience):
        assert keeper.best is not None
        loss, step, average[...] = keeper.best
        if step < model.step:
            words = "of %d steps the averaged weights after %d are kept: their loss on held-out rows is the least, %.4g"
            log.info(words, model.step, step, loss)
    elif keeper.looks:
        step, average[...] = keeper.best()
        if step < model.step and keeper.reason:
            log.info("of %d steps the averaged weights after %d are kept: %s", model.step, step, keeper.reason)
