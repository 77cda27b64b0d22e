"""`Diffusion`: a network, a schedule and a normaliser that are trained, sampled from, saved and loaded together."""

from __future__ import annotations

import logging
import math
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from fastdiff import checkpoint, defaults, judgement, noise, process, samplers
from fastdiff.backends import Backend, TrainingDraws, TrainState, backend_for, get_backend
from fastdiff.backends.layers import Batch
from fastdiff.base import GaussianBase
from fastdiff.errors import (
    ArgumentError,
    CheckpointError,
    QualityWarning,
    TrainingError,
    check_array,
    check_choice,
    check_float,
    check_indices,
    check_int,
    check_seed,
    is_on_device,
)
from fastdiff.nn import MLP, Network, Runner, UNet, network_of
from fastdiff.nn.optim import MOST_STEPS, TrainingPlan
from fastdiff.noise import Draw, Stream
from fastdiff.noise_shape import NoiseShape
from fastdiff.normaliser import SCALES, Normaliser
from fastdiff.progress import say
from fastdiff.samplers import PREDICTIONS, Sampler
from fastdiff.schedule import Schedule
from fastdiff.training import Trainer

log = logging.getLogger("fastdiff")

HELD_OUT_STEP = 3  # of stream DATA; 0 to 2 make data, which a split must not depend on
LARGEST = 1e37  # value of the data: their samples have room above it
HeldOut = tuple[npt.NDArray[Any], npt.NDArray[Any] | None]  # rows and their labels


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network with frozen weights, as `fastdiff.sample` takes it; it works in the network's own range.

    Attributes
    ----------
    net : Network
        The architecture.
    flat : array
        The weights in use.
    prediction : {"noise", "x0", "v"}
        What its output is.
    backend : Backend
        Where `predict` runs.
    """

    net: Network
    flat: npt.NDArray[Any]
    prediction: str
    backend: Backend
    _runners: dict[Backend, Runner] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.net, self.flat, self.prediction, self.backend)

    @property
    def classes(self) -> int | None:
        return self.net.classes

    @property
    def T(self) -> int:
        return self.net.T

    @property
    def shape(self) -> tuple[int, ...]:
        return self.net.shape

    def predict(self, x: Any, t: Any, labels: Any = None) -> Any:
        """Return the output (n, ...) for x (n, ...) at timesteps t, an int or (n,)."""
        return self.net.predict(x, t, labels, backend=self.backend, flat=self.flat)

    def on(self, be: Backend, shape: tuple[int, ...] | None = None) -> Runner:
        """Return the network with these weights on a backend, always the same one."""
        if be not in self._runners:
            flat = self.flat if be.owns(self.flat) else self.backend.to_numpy(self.flat)
            self._runners[be] = self.net.runner(be, flat)
        return self._runners[be]


class _Optimizer(NamedTuple):
    """The moving parts of training, besides the weights; all in the layout of the flat buffer."""

    plan: TrainingPlan
    m: npt.NDArray[Any]
    v: npt.NDArray[Any]


def _empty_history() -> dict[str, list[Any]]:
    return {"step": [], "loss": [], "validation_step": [], "validation_loss": []}


class Diffusion:
    """A diffusion model of curves or pictures.

    Parameters
    ----------
    net : MLP or UNet, optional
        The network; by default one that fits the data, made at the first `fit`: an `MLP` for curves, a `UNet` for
        pictures (`fastdiff.defaults` has the rules).
    schedule : Schedule, optional
        The noise levels; by default ``Schedule.sigmoid(200, beta_start=1e-5, beta_end=0.1)`` for curves (100 without a
        base) and ``Schedule.cosine(200)`` for pictures, or what fits net.T.
    prediction : {"v", "noise", "x0"}, optional
        What the network learns to predict; by default v = signal noise - noise x0 (Salimans and Ho 2022), or what a
        network that was read from a file predicts. An error of the noise counts 1 / signal times in the sample, 14
        times at the end of the source text's schedule.
    scale : {"auto", "all", "column"}, optional
        What has a mean and a deviation of its own inside: all values of the curves together, or each column; "auto"
        scales each column where their deviations differ by more than a factor of 10. Pictures have a `data_range`.
    base : {"auto", "gaussian", None}, optional
        "gaussian": the network starts from the best linear denoiser of the curves and learns what is not Gaussian in
        them (see `fastdiff.base`). "auto" does so where the network is chosen from the data; for perceptrons only.
    backend : str or Backend, optional
    seed : int, optional
        Of the weights, of all training draws, and of the samples unless `sample` names another.
    noise_shape : NoiseShape, optional
        Covariance S of the noise of curves; by default white. The network learns L^-1 x, whose noise is white. As
        that is normalised, a multiple of S makes the same model.

    Attributes
    ----------
    step : int
        Training steps taken.
    history : dict of str to list
        "step" and "loss" for every step; "validation_step" and "validation_loss" for every evaluation. A loss
        belongs to the weights before its step.
    normaliser : Normaliser or None
        Set by the first fit: the map from data to the network's range, with the log of its determinant.
    ema_updates : int
        Number of updates of the averaged weights.
    end_step : int
        Where the last call of `fit` was to end.
    report_ : dict or None
        What the last judgement measured of the samples, after the step named "step": see
        `fastdiff.judgement.Report`.
    class_names : list of str or None
        What the classes are called; for the reader only, and saved with the model.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(1000)
    >>> new = fd.Diffusion().fit(X).sample(16)
    >>> images = fd.data.load_images("pictures", size=32)
    >>> new = fd.Diffusion().fit(images, flip=True).sample(16)
    """

    def __init__(
        self,
        net: Network | None = None,
        schedule: Schedule | None = None,
        *,
        prediction: str | None = None,
        scale: str = "auto",
        base: str | None = "auto",
        backend: str | Backend = "auto",
        seed: int = 0,
        noise_shape: NoiseShape | None = None,
    ) -> None:
        if net is not None and not isinstance(net, Network):
            wants = "a fastdiff.MLP, a fastdiff.UNet, or another fastdiff.nn.Network"
            raise ArgumentError("net", type(net).__name__, wants)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule")
        if net is not None and schedule is None:
            schedule = defaults.schedule(net.T)
        if net is not None and schedule is not None and net.T != schedule.T:
            raise ArgumentError("schedule", f"T = {schedule.T}", f"T = {net.T}, as the network has")
        if noise_shape is not None and not isinstance(noise_shape, NoiseShape):
            raise ArgumentError("noise_shape", type(noise_shape).__name__, "a fastdiff.NoiseShape, or None: white")
        if net is not None and noise_shape is not None and net.shape != (noise_shape.d,):
            wants = f"one of {net.shape[0]} values, as the network has" if len(net.shape) == 1 else "None for pictures"
            raise ArgumentError("noise_shape", repr(noise_shape), wants)
        if net is not None and net.outputs != net.image[2]:
            raise ArgumentError("net", f"{net.outputs} outputs", f"{net.image[2]}, as many as there are channels")
        if prediction is None:
            prediction = (None if net is None else net.prediction) or "v"
        if net is not None and net.prediction not in (None, prediction):
            raise ArgumentError("prediction", repr(prediction), f"{net.prediction!r}, as the network was trained")
        get_backend(backend)  # an unusable one is reported here
        self.net, self.schedule, self.backend, self.noise_shape = net, schedule, backend, noise_shape
        self.prediction = check_choice("prediction", prediction, PREDICTIONS)
        self.scale = check_choice("scale", scale, SCALES)
        self.base = None if base is None else check_choice("base", base, ["auto", "gaussian"])
        if net is not None and base == "gaussian" and not net.has_linear:
            raise ArgumentError("base", "'gaussian'", f"None: a network of kind {net.kind!r} has no linear part")
        if scale == "channel":
            raise ArgumentError("scale", "'channel'", "'auto', 'all' or 'column': curves have one channel")
        if scale == "column" and noise_shape is not None:
            raise ArgumentError("scale", "'column'", "'all' or 'auto' with a noise_shape: it has the scales")
        self.seed = check_seed(seed)
        self._own_net = net is None
        self._forget()

    def _forget(self) -> None:
        self.normaliser: Normaliser | None = None
        self.step = self.end_step = self.ema_updates = 0
        self.history = _empty_history()
        self._optimizer: _Optimizer | None = None
        self._average: npt.NDArray[Any] | None = None
        self._frozen: tuple[tuple[int, Backend], NetworkDenoiser] | None = None  # averaged weights, and when
        self.class_names: list[str] | None = None
        self.report_: dict[str, Any] | None = None
        self._held_out: tuple[str, float] | None = None  # how rows are held out; the first fit decides
        self._data: list[int] | None = None  # fingerprint of the first fit's rows
        self._gaussian: GaussianBase | None = None
        self._arithmetic = checkpoint.ARITHMETIC  # of the weights; only a file may have another one

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_frozen": None}

    def reset(self) -> Self:
        """Forget all training: weights are drawn again, normaliser, learning-rate plan and history are dropped."""
        self._forget()
        if self._own_net:
            self.net = None
        elif self.net is not None:
            self.net.redraw()
            if self.net.has_linear:
                self.net.set_linear(None)
        return self

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        steps: int | None = None,
        batch: int | None = None,
        lr: float = 1e-3,
        warmup: int = 0,
        decay_steps: int | None = None,
        clip_norm: float | None = 1.0,
        ema: float | None = 0.999,
        validation: Any = None,
        judge: bool | None = None,
        flip: bool = False,
        accumulate: int = 1,
        data_range: tuple[float, float] | None = None,
        progress: bool = True,
        callback: Callable[[int, float], Any] | None = None,
    ) -> Self:
        """Train for further steps, on from `step`.

        The loss is the mean squared error of the prediction at uniformly drawn timesteps (Ho et al. 2020, eq. 14).

        Parameters
        ----------
        X : (N, points) or (N, height, width, channels) array
            Curves, or pictures.
        y : (N,) int array, optional
            Class labels, 0 .. classes - 1, for a network that has them. A network that is made for pictures has as many
            as y needs.
        steps : int, optional
            How many more steps to take, at a constant rate unless `decay_steps` is given. By default as many as suit
            the data (see `fastdiff.defaults`; 3,000 for pictures), over which the rate falls by a cosine.
        batch : int, optional
            Rows drawn at a step, with replacement; by default 256 curves, or 64 for a U-Net.
        lr, warmup, decay_steps, clip_norm, ema
            See `TrainingPlan`; those of the first call stay until `reset`, but for the decay of further calls without
            `steps`. Warm-up and decay are absolute steps.
        validation : float or array, optional
            A fraction of the rows to hold out (the same rows at each call with the same X; 0: none), or other rows,
            with labels a pair (rows, labels). Their loss under the averaged weights, with fixed noise and timesteps,
            goes to `history` every 100 steps. By default the rows that the first call held out; in that one 5 % where
            there are 100 rows or more, at most 1,024 (256 pictures): row k where word 0 of stream DATA, step 3, row k,
            is small enough. It depends on nothing but seed and row number.
        judge : bool, optional
            Whether to end with a judgement: samples are drawn and compared with held-out rows (see
            `fastdiff.judgement`), the numbers go to `report_`, and a `QualityWarning` says what is off. By default
            after 1,000 steps or more, and where `steps` is not given.
        flip : bool, optional
            Mirror half of the pictures of a batch, left to right, by stream AUGMENT of the noise law.
        accumulate : int, optional
            Take a U-Net's batch in so many parts, whose gradients are added: less memory, and the same step up to
            the rounding of those sums.
        data_range : pair of float, optional
            The values of pictures that become -1 and 1 in the network. By default 0 and 255 for bytes, else the
            smallest and the largest one of X, which is logged; it stays that of the first call.
        progress : bool, optional
            Show a progress bar.
        callback : callable, optional
            ``callback(step, loss)`` after each step; a true result stops.

        Returns
        -------
        Diffusion
            self.

        Raises
        ------
        ArgumentError
            Shape, dtype or value of an argument; a plan that differs from that of the first call.
        TrainingError
            A loss or gradient that is not finite: the model keeps the state before that step.
        KeyboardInterrupt
            Ctrl-C takes effect after a whole step, so the state is sound; the third one at once.
        """
        be = get_backend(self.backend)
        plan = TrainingPlan(lr, warmup, decay_steps, clip_norm, ema)
        if steps is not None:
            steps = check_int("steps", steps, low=0)
        if judge not in (None, True, False):
            raise ArgumentError("judge", repr(judge), "True, False or None")
        if self._optimizer is not None and plan not in (self._optimizer.plan, TrainingPlan()):
            raise ArgumentError(
                "lr, warmup, decay_steps, clip_norm, ema",
                str(plan),
                f"those of the first fit, {self._optimizer.plan}; reset() starts anew",
            )
        if self.normaliser is not None and self._optimizer is None:
            raise TrainingError("this model was saved with training=False: it can sample, but not go on training")
        X, y, classes = self._checked(be, X, y)
        rows, labels, held_out, rule = self._split(X, y, validation, classes)
        kind = (MLP if X.ndim == 2 else UNet) if self.net is None else type(self.net)
        batch = kind.usual_batch if batch is None else check_int("batch", batch, low=1, high=1 << 30)
        accumulate = check_int("accumulate", accumulate, low=1, high=batch if kind.in_parts else 1)
        if flip and X.ndim == 2:
            raise ArgumentError("flip", repr(flip), "False for curves")

        by_rule = steps is None
        self._prepare(rows, None if held_out is None else held_out[0], classes, plan, data_range, rule)
        assert self.net is not None and self.schedule is not None and self.normaliser is not None  # noqa: PT018
        assert self._optimizer is not None
        assert self._average is not None
        if steps is None:
            steps = self._plan_by_rule(rows, batch)
        self._data = self._data or _fingerprint(X)
        if len(rows) < judgement.FEWEST_ROWS and (by_rule or judge or steps >= defaults.JUDGED_STEPS):
            warnings.warn(
                f"{len(rows)} rows can be learned by heart only: new samples of their kind want at least "
                f"{judgement.FEWEST_ROWS}",
                QualityWarning,
                stacklevel=2,
            )
        elif by_rule and rows.ndim == 2 and (rows == rows[:1]).all():
            warnings.warn("all rows are the same, and so will all samples be", QualityWarning, stacklevel=2)
        decayed = self._optimizer.plan.decay_steps
        if not by_rule and steps > 0 and decayed is not None and self.step >= decayed:
            words = "the rate has fallen to %g by step %d and stays there; leave steps (--steps) out for another decay"
            log.info(words, self._optimizer.plan.rate(self.step), decayed)
        first, self.end_step = self.step, self.step + steps
        if steps > 0:
            self._use_this_arithmetic()
        net, optimizer = self.net, self._optimizer
        data = be.asarray(self.normaliser.apply(rows, net.dtype), net.dtype)
        tables = self.schedule.signal, self.schedule.noise, *self._target_tables()
        draws = TrainingDraws(data, *tables, self.seed, labels, bool(flip))
        validate = None if held_out is None else partial(self._validate, be, self._validation_set(be, *held_out))
        watch = None
        if by_rule and 2 <= len(rows) <= defaults.WATCHED_ROWS and rows.ndim == 2:
            watch = judgement.Watch(be.to_numpy(data), partial(self._drawn_inside, be), self.step, self.end_step)
            watch.look(self.step, self._average)

        def look(average: Any) -> bool:
            if validate is not None:
                validate(average)
            return watch is not None and watch.look(self.step, be.to_numpy(average))

        host = TrainState(net.flat, net.layout.zeros(net.dtype), optimizer.m, optimizer.v, self._average)
        trainer = Trainer(be, net, draws, host, batch, accumulate)
        looking = look if validate is not None or watch is not None else None
        trainer.run(self, steps, optimizer.plan.options, look=looking, progress=progress, callback=callback)
        if watch is not None:
            if self.step == self.end_step and not watch.stopped:
                watch.look(self.step, self._average)
            if watch.stopped:
                self.end_step = self.step
            if watch.looks:
                step, self._average[...] = watch.best()
                if step < self.step and watch.reason:
                    log.info("of %d steps the averaged weights after %d are kept: %s", self.step, step, watch.reason)
        if judge or (judge is None and (by_rule or self.step - first >= defaults.JUDGED_STEPS)):
            self._judge(rows, labels, None if held_out is None else held_out[0], show=progress)
        return self

    def _drawn_inside(self, be: Backend, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Samples of some weights of the network, in its own range."""
        net, _, _ = self._fitted()
        denoiser = NetworkDenoiser(net, be.asarray(weights, net.dtype), self.prediction, be)
        drawn = process.sample(denoiser, self.named_sampler(), n=judgement.SAMPLES, seed=self.seed, backend=be)
        return be.to_numpy(drawn)

    def _plan_by_rule(self, rows: npt.NDArray[Any], batch: int) -> int:
        """How many steps suit the data; the rate falls until then, by a cosine from the first step of all."""
        assert self.net is not None
        assert self._optimizer is not None
        if rows.ndim == 2:
            rank = 0 if self._gaussian is None else len(self._gaussian.variances)
            steps = defaults.curve_steps(len(rows), rows.shape[1], batch, self.net.layout.count, rank)
        else:
            steps = defaults.PICTURE_STEPS
        plan = self._optimizer.plan
        if self.step or plan.decay_steps is None:
            end = max(self.step + steps, plan.warmup + 1)
            self._optimizer = self._optimizer._replace(plan=replace(plan, decay_steps=end))
        what = "x".join(map(str, rows.shape[1:]))
        log.info("chosen for %d rows of %s values: %d steps of %d, a falling rate", len(rows), what, steps, batch)
        return steps

    def evaluate(
        self, X: Any, y: Any = None, *, training: Any = None, samples: int | None = None, seed: int | None = None
    ) -> judgement.Evaluation:
        """Draw samples and measure how like the data they are.

        Parameters
        ----------
        X : (N, ...) array
            Rows of the data, at least 2. Where they are those of the first fit, the samples are compared with the rows
            that it held out; of others half are taken for training rows.
        y : (N,) int array, optional
            Their labels, for a network that has classes: the samples are asked for in the same shares.
        training : (M, ...) array, optional
            The rows that the model has learned from; then X are others.
        samples : int, optional
            How many to draw; by default 1,024. Of pictures, and of curves by a large network, 64 in 20 steps of ddim.
        seed : int, optional
            By default the model's.

        Returns
        -------
        fastdiff.judgement.Evaluation
            With the `report`, a `complaint` or None, and the rows compared.

        Raises
        ------
        ArgumentError
            Shape, dtype or value of an argument.
        TrainingError
            The model has not been trained.
        """
        self._fitted()
        X, y, _ = self._checked(get_backend(self.backend), X, y)
        if len(X) < 2:
            raise ArgumentError("X", "1 row", "at least 2 rows")
        if training is not None:
            learned, held_out = check_array("training", training, shape=(None, *X.shape[1:])), X
            if len(learned) < 2:
                raise ArgumentError("training", f"{len(learned)} rows", "at least 2")
        elif _fingerprint(X) == self._data:
            learned, _, unseen, _ = self._hold_out(X, y, *(self._held_out or ("fraction", 0.0)))
            held_out = None if unseen is None else unseen[0]
        elif len(X) < 4:
            raise ArgumentError("X", f"{len(X)} rows, none of them learned from", "at least 4 rows, or `training`")
        else:
            learned, _, unseen, _ = self._hold_out(X, y, "fraction", 0.5)
            held_out = None if unseen is None else unseen[0]
        samples = 4 * judgement.SAMPLES if samples is None else check_int("samples", samples, low=2)
        return self._measured(learned, y, held_out, samples=samples, seed=seed)

    def _judge(self, rows: npt.NDArray[Any], labels: Any, held_out: npt.NDArray[Any] | None, *, show: bool) -> None:
        """Draw samples, measure them, and say what was found."""
        if len(rows) < 2:
            return
        found = self._measured(rows, labels, held_out, samples=judgement.SAMPLES, seed=None)
        self.report_ = {"step": self.step, **found.report.to_dict()}
        say(found.report.sentence, show=show)
        if found.complaint:
            warnings.warn(found.complaint, QualityWarning, stacklevel=3)

    def _measured(
        self, rows: npt.NDArray[Any], labels: Any, held_out: npt.NDArray[Any] | None, *, samples: int, seed: int | None
    ) -> judgement.Evaluation:
        assert self.net is not None and self.normaliser is not None  # noqa: PT018
        n, sampler, steps = samples, "auto", None
        if self.net.operations * self.net.T * n > judgement.MOST_WORK or len(self.net.shape) == 3:
            n, sampler, steps = judgement.PICTURES, "ddim", min(judgement.PICTURE_STEPS, self.net.T)
        asked = None if labels is None else labels[np.arange(n) * len(labels) // n]
        drawn = self.sample(n, labels=asked, sampler=sampler, steps=steps, seed=seed)
        drawn = get_backend(self.backend).to_numpy(drawn)
        report = judgement.measure(drawn, rows, held_out, self.normaliser, seed=self.seed)
        found = report.complaints
        complaint = f"{'; '.join(found)}: {self._remedy(report)}" if found else None
        return judgement.Evaluation(report, complaint, drawn, rows if held_out is None else held_out, rows)

    def _remedy(self, report: judgement.Report) -> str:
        """What to try where samples are not good."""
        assert self.net is not None
        if not math.isfinite(report.deviation):
            return "train with a smaller lr"
        if report.nearer > judgement.COPIES[0] and report.nearest_ratio < judgement.COPIES[1]:
            return "take fewer steps, a smaller network, or more rows"
        if self.prediction == "noise":
            return "fit a Diffusion(prediction='v')"
        if self._gaussian is None and self.net.narrow:
            return "fit a network whose hidden layers are wider than its curves, or let Diffusion choose it"
        if self._gaussian is None and self.net.has_linear:
            return "fit a Diffusion(base='gaussian'), or let it choose the network"
        return "train longer (fit again, or steps=), or bring more rows"

    def _checked(self, be: Backend, X: Any, y: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, int | None]:
        """Data and labels on the host, and how many classes the network has or is to have."""
        given = check_array("X", _on_host(be, X), finite=False)
        if self.net is not None:
            shape: tuple[int | None, ...] = self.net.shape
        elif given.ndim == 4 and self.noise_shape is None:
            shape = given.shape[1:]
        else:
            shape = (getattr(self.noise_shape, "d", None),)
            if given.ndim != 2:
                pictures = ", or pictures (N, height, width, channels)" if self.noise_shape is None else ""
                hint = "; X.reshape(len(X), -1) makes curves of series" if given.ndim == 3 else ""
                hint += ", X[..., None] pictures of gray ones" if hint and pictures else ""
                raise ArgumentError("X", f"shape {given.shape}", f"curves (N, points){pictures}{hint}")
        if given.ndim == 3 and len(shape) == 1:
            wants = f"curves (N, {shape[0]}); X.reshape(len(X), -1) makes curves of series (N, points, channels)"
            raise ArgumentError("X", f"shape {given.shape}", wants)
        given = check_array("X", given, shape=(None, *shape))
        if given.size == 0:
            what = "curve of at least one point" if len(shape) == 1 else "picture"
            raise ArgumentError("X", f"shape {given.shape}", f"at least one {what}")
        if getattr(self.net, "dtype", None) != np.float64 and (largest := float(np.max(np.abs(given)))) > LARGEST:
            raise ArgumentError("X", f"values up to {largest:.3g}", f"at most {LARGEST:g}: samples are float32")
        classes = getattr(self.net, "classes", None)
        if self.net is None and len(shape) == 3 and y is not None:
            y = check_indices("y", _on_host(be, y), 1 << 20, len(given))
            classes = int(y.max()) + 1
        if classes is None and y is not None:
            count = int(check_indices("y", _on_host(be, y), 1 << 20, len(given)).max()) + 1
            wants = f"None: this network has no classes; use fd.UNet({given.shape[1:]}, classes={count})"
            raise ArgumentError("y", "labels", wants)
        return given, _labels("y", y, classes, len(given), be), classes

    def _split(
        self, X: npt.NDArray[Any], y: npt.NDArray[Any] | None, validation: Any, classes: int | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, HeldOut | None, tuple[str, float]]:
        """Training rows and their labels, those that are held out, and by which rule, for later calls."""
        if validation is None:
            most = defaults.MOST_HELD_OUT if X.ndim == 2 else defaults.MOST_HELD_OUT_PICTURES
            rule = self._held_out or ("share", defaults.held_out_share(len(X), most))
            return self._hold_out(X, y, *rule)
        if classes is not None and isinstance(validation, (tuple, list)):
            if len(validation) != 2:
                raise ArgumentError("validation", f"{len(validation)} values", "a fraction, or a pair (rows, labels)")
            rows, labels = validation
        elif np.ndim(validation) > 0:
            rows, labels = validation, None
        else:
            fraction = check_float("validation", validation, low=0, high=1, high_open=True)
            if fraction and not 1 <= round(fraction * len(X)) < len(X):
                raise ArgumentError(
                    "validation",
                    f"{validation}",
                    f"a fraction that holds out 1 to {len(X) - 1} of the {len(X)} rows, or 0: none",
                )
            return self._hold_out(X, y, "fraction", fraction)
        rows = check_array("validation", rows, shape=(None, *X.shape[1:]))
        if len(rows) == 0:
            raise ArgumentError("validation", f"no {'curves' if X.ndim == 2 else 'pictures'}", "at least one")
        labels = _labels("the labels of validation", labels, classes, len(rows), get_backend(self.backend))
        return X, y, (rows, labels), ("fraction", 0.0)

    def _hold_out(
        self, X: npt.NDArray[Any], y: npt.NDArray[Any] | None, rule: str, part: float
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, HeldOut | None, tuple[str, float]]:
        """Split rows by a word that only seed and row number decide.

        A "fraction" takes the rows of the smallest words, exactly so many; a "share" those below a bound, so a row
        stays where it is when others are added.
        """
        if part == 0:
            return X, y, None, (rule, part)
        step = 1 if rule == "fraction" else HELD_OUT_STEP
        words = noise.philox_words(len(X), 1, Draw(self.seed, Stream.DATA, step))[:, 0, 0]
        if rule == "fraction":
            held = np.zeros(len(X), bool)
            held[np.argsort(words, kind="stable")[: round(part * len(X))]] = True
        else:
            held = words < part * 2.0**32
        if held.all() or not held.any():
            return X, y, None, (rule, part)
        unseen = X[held], None if y is None else y[held]
        return X[~held], None if y is None else y[~held], unseen, (rule, part)

    def _prepare(
        self,
        X: npt.NDArray[Any],
        held_out: npt.NDArray[Any] | None,
        classes: int | None,
        plan: TrainingPlan,
        data_range: Any,
        held_out_by: tuple[str, float],
    ) -> None:
        """What the first fit decides: network, schedule, normaliser, plan and buffers. Later ones are held to it."""
        if X.ndim == 2 and data_range is not None:
            raise ArgumentError(
                "data_range", repr(data_range), "None for curves: they have mean 0 and deviation 1 inside"
            )
        normaliser = self.normaliser
        if normaliser is None or data_range is not None:
            if X.ndim > 2 and self.scale not in ("auto", "all"):
                raise ArgumentError("scale", repr(self.scale), "'auto' for pictures: they have a data_range")
            of_curves = X.ndim == 2
            normaliser = (
                Normaliser.of(X, self.noise_shape, self.scale) if of_curves else Normaliser.of_pictures(X, data_range)
            )
        if self.normaliser is not None and normaliser.data_range != self.normaliser.data_range:
            wants = f"{self.normaliser.data_range}, that of the first fit; reset() starts anew"
            raise ArgumentError("data_range", repr(data_range), wants)
        normaliser.check("X", X)
        if held_out is not None:
            normaliser.check("validation", held_out)
        if self.normaliser is not None:
            return
        schedule, net = self.schedule, self.net
        if schedule is None:
            pictures = X.ndim > 2
            base = self.base is not None
            schedule = defaults.schedule(defaults.PICTURE_T) if pictures else defaults.curve_schedule(base=base)
            if X.ndim > 2:
                log.info("chosen for the pictures: %r", schedule)
        if net is None:
            at: dict[str, Any] = {"T": schedule.T, "seed": self.seed}
            if X.ndim == 2:
                net = defaults.curve_net(*X.shape, base=self.base is not None, **at)
            else:
                net = defaults.picture_net(X.shape[1:], classes=classes, **at)
        if net.dtype == np.float64 and get_backend(self.backend).name != "numpy":
            raise ArgumentError("backend", repr(self.backend), "'numpy': this network has float64 parameters")
        self._gaussian = None
        if net.has_linear and (self.base == "gaussian" or (self.base == "auto" and self._own_net)):
            normaliser = normaliser.centred(X)
            self._gaussian = GaussianBase.of(normaliser.apply(X, np.float64))
            net.set_linear(self._gaussian.linear(schedule, self.prediction))
        self.schedule, self.net = schedule, net
        zeros = net.layout.zeros
        self._optimizer = _Optimizer(plan, zeros(net.dtype), zeros(net.dtype))
        self._average = net.flat.copy()
        self.normaliser = normaliser
        self._held_out = held_out_by

    def _use_this_arithmetic(self) -> None:
        """Say once that a file was trained with other bits than those that follow."""
        before, self._arithmetic = self._arithmetic, checkpoint.ARITHMETIC
        if before != self._arithmetic:
            words = "trained with arithmetic %d so far, now with %d: equal to one run up to rounding, not to the bit"
            log.warning(words, before, self._arithmetic)

    def _target_tables(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Factors of noise and data in the training target at every t."""
        assert self.schedule is not None
        zeros, ones = np.zeros(self.schedule.T), np.ones(self.schedule.T)
        if self.prediction == "v":
            return self.schedule.signal, -self.schedule.noise
        return (ones, zeros) if self.prediction == "noise" else (zeros, ones)

    def _validation_set(self, be: Backend, rows: npt.NDArray[Any], labels: npt.NDArray[Any] | None) -> Batch:
        """x_t, t, target and labels of the held-out rows: noise of stream FORWARD, timesteps spread evenly."""
        assert self.net is not None and self.schedule is not None and self.normaliser is not None  # noqa: PT018
        x0 = self.normaliser.apply(rows, self.net.dtype)
        t = np.arange(len(x0)) * self.schedule.T // len(x0)
        x, eps = process.forward_noise(x0, t, self.schedule, seed=self.seed, backend=be)
        of_noise, of_data = (table[t].reshape(-1, *(1,) * (x0.ndim - 1)) for table in self._target_tables())
        target = (of_noise * eps + of_data * x0).astype(x.dtype)
        return Batch(be.asarray(x), be.asarray(t, np.int64), target, labels)

    def _validate(self, be: Backend, checks: Batch, average: Any) -> None:
        assert self.net is not None
        if self.history["validation_step"][-1:] == [self.step]:
            return  # an earlier fit ended here
        x, t, target, labels = checks
        out = be.to_numpy(self.net.predict(x, t, labels, backend=be, flat=average))
        self.history["validation_step"].append(self.step)
        self.history["validation_loss"].append(float(np.mean(np.square(out - target, dtype=np.float64))))

    def _fitted(self) -> tuple[Network, Schedule, Normaliser]:
        if self.net is None or self.schedule is None or self.normaliser is None:
            raise TrainingError("this model has not been trained: call fit first")
        return self.net, self.schedule, self.normaliser

    def denoiser(self, *, ema: bool = True) -> NetworkDenoiser:
        """Return the network with a copy of its averaged (or raw) weights, in the model's inner range (white noise)."""
        net, _, _ = self._fitted()
        flat = self._average if ema and self._average is not None else net.flat
        be = get_backend(self.backend)
        return NetworkDenoiser(net, be.asarray(flat.copy(), net.dtype), self.prediction, be)

    def _sampled(self, ema: bool) -> NetworkDenoiser:
        """`denoiser`, the same one until the model is trained further: a backend may keep what it has made for it."""
        if not ema or self._average is None:
            return self.denoiser(ema=ema)  # anybody may have changed these weights
        now = self.step, get_backend(self.backend)
        if self._frozen is None or self._frozen[0] != now:
            self._frozen = now, self.denoiser()
        return self._frozen[1]

    def named_sampler(self, name: str = "auto", steps: int | None = None) -> Sampler:
        """Return the table that `sample` runs for the name of a sampler: see there."""
        _, schedule, normaliser = self._fitted()
        if name == "auto":
            name, usual = defaults.curve_sampler(schedule, base=self._gaussian is not None)
            steps = usual if steps is None else steps
        clip = None if normaliser.data_range is None else 1.0
        return samplers.named(name, schedule, steps, prediction=self.prediction, clip=clip)

    def sample(
        self,
        n: int = 16,
        *,
        labels: Any = None,
        sampler: str | Sampler = "auto",
        steps: int | None = None,
        seed: int | None = None,
        first_sample: int = 0,
        ema: bool = True,
        trajectory: bool = False,
        round: bool = False,  # noqa: A002 - what it is called everywhere
        batch: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Draw new curves or pictures.

        Parameters
        ----------
        n : int, optional
            How many.
        labels : int or (n,) int array, optional
            The class of each, for a network that has classes.
        sampler : {"auto", "ddpm", "ddim", "dpmpp_2m"} or Sampler, optional
            A name, with its defaults, or a table of `fastdiff.samplers` for this model's schedule and prediction.
            "auto" is "dpmpp_2m" in 50 steps where the model has a Gaussian base, which that samples best, and "ddpm"
            elsewhere. A named one clips the x0 of pictures to their range; a table does what it says, and
            must not clip where the model has a noise shape.
        steps : int, optional
            Number of steps of a named sampler.
        seed : int, optional
            By default the model's, so that each call gives the same samples.
        first_sample : int, optional
            Sample k of a call is sample ``first_sample + k`` of the seed.
        ema : bool, optional
            Use the averaged weights.
        trajectory : bool, optional
            Also return the states of all steps.
        round : bool, optional
            Round the samples to whole numbers, for data that are; those of bytes always are.
        batch : int, optional
            At most this many at once.
        progress : bool, optional
            Show a progress bar.

        Returns
        -------
        x : (n, points) or (n, height, width, channels) float32
            In the range of the data; uint8, rounded, for a model of bytes.
        path : (steps + 1, n, ...) float32, if `trajectory`
            Noise first, through the same map, and not rounded: noise is wider than any range of pictures.

        Raises
        ------
        ArgumentError
            An argument's value, or a table that disagrees with the model.
        TrainingError
            The model has not been trained.
        """
        _, schedule, normaliser = self._fitted()
        if not isinstance(sampler, Sampler):
            sampler = self.named_sampler(sampler, steps)
        elif steps is not None:
            raise ArgumentError("steps", str(steps), "None with a table: it has its own steps")
        elif sampler.prediction != self.prediction:
            wants = f"one made with prediction={self.prediction!r}, as this model predicts"
            raise ArgumentError("sampler", f"a table for prediction {sampler.prediction!r}", wants)
        elif sampler.schedule != schedule:
            raise ArgumentError("sampler", repr(sampler), f"a table for {schedule!r}")
        if normaliser.noise_shape is not None:
            process.refuse_clip(sampler)
        be = get_backend(self.backend)
        result = process.sample(
            self._sampled(ema), sampler, n=n, seed=self.seed if seed is None else seed, first_sample=first_sample,
            batch=batch, backend=self.backend, labels=labels, trajectory=trajectory, progress=progress,
        )  # fmt: skip
        drawn = normaliser.restore(result[0] if trajectory else result, be)
        drawn = drawn.round() if round else drawn
        return (drawn, normaliser.invert(result[1], be)) if trajectory else drawn

    def save(self, path: str | os.PathLike[str], *, training: bool = True) -> None:
        """Write a checkpoint; the file appears whole or not at all.

        Parameters
        ----------
        path : path
            Usually ``name.safetensors``.
        training : bool, optional
            Keep the optimiser's moments, so that training can go on bit for bit. Without them the file is half as
            large, and for sampling only.

        Raises
        ------
        DataError
            The path cannot be written.
        TrainingError
            The model has not been trained.
        """
        net, schedule, normaliser = self._fitted()
        buffers = {"net": net.flat, "ema": self._average}
        plan = None
        if training and self._optimizer is not None:
            buffers |= {"adam.m": self._optimizer.m, "adam.v": self._optimizer.v}
            plan = self._optimizer.plan.to_dict()
        tensors = {
            f"{prefix}.{name}": view
            for prefix, flat in buffers.items()
            for name, view in net.layout.views(flat).items()
        }
        for name, values in self.history.items():
            tensors[f"history.{name}"] = np.array(values, np.int64 if name.endswith("step") else np.float64)
        noise_shape = normaliser.noise_shape
        if noise_shape is not None:
            tensors |= {f"noise_shape.{name}": array for name, array in noise_shape.arrays.items()}
        tensors |= normaliser.arrays | ({} if self._gaussian is None else self._gaussian.arrays)
        header = {
            "network": net.to_dict(), "schedule": schedule.to_dict(), "prediction": self.prediction,
            "normaliser": normaliser.to_dict(), "held_out": self._held_out, "data": self._data, "report": self.report_,
            "noise_shape": "white" if noise_shape is None else noise_shape.kind, "seed": self.seed,
            "step": self.step, "ema_updates": self.ema_updates, "training": plan, "class_names": self.class_names,
            "arithmetic": self._arithmetic,
        }  # fmt: skip
        checkpoint.write(
            path, header, tensors, features=normaliser.features + ([] if self._gaussian is None else ["base"])
        )

    def __repr__(self) -> str:
        return f"<Diffusion {self.net!r}, {self.schedule!r}, predicts {self.prediction!r}, step {self.step}>"


def load(path: str | os.PathLike[str], *, backend: str | Backend = "auto") -> Diffusion:
    """Load a model saved by `Diffusion.save`.

    Parameters
    ----------
    path : path
    backend : str or Backend, optional

    Returns
    -------
    Diffusion
        Equal to the saved one to the bit. Training goes on to the same bits on the same kind of CPU, unless the file
        is of another arithmetic (see `fastdiff.checkpoint`), which the first `fit` logs.

    Raises
    ------
    CheckpointError
        The file is missing, truncated, damaged, foreign, of a newer format, inconsistent, or needs a feature that is
        not here.
    """
    header, tensors = checkpoint.read(path)
    try:
        return _restore(header, tensors, backend)
    except (ArgumentError, KeyError, TypeError, MemoryError) as error:  # the last: a network of any size can be claimed
        reason = f"the header lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {reason}") from error


def _restore(header: dict[str, Any], tensors: dict[str, npt.NDArray[Any]], backend: str | Backend) -> Diffusion:
    schedule = Schedule.from_dict(header["schedule"])
    net = network_of(header["network"], draw=False)

    def stored(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        tensor = tensors.get(name)
        if tensor is None:
            raise ArgumentError(name, "no such tensor", f"shape {shape}, by the configuration")
        return tensor if tensor.shape == shape else check_array(name, tensor, shape=shape)

    # Shapes first: a header that claims a huge network must not make us allocate one.
    for name, shape in net.layout.shapes.items():
        stored(f"net.{name}", shape)
    for name in tensors:
        if name.startswith("net.") and name[4:] not in net.layout.shapes:
            raise ArgumentError(name, "a tensor in the file", "none of this name, by the configuration")
    kind = "white" if header["format"] == 1 else header["noise_shape"]
    prefix = "noise_shape."
    arrays = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    noise_shape = None if kind == "white" else NoiseShape(kind, arrays)
    model = Diffusion(
        net, schedule, prediction=header["prediction"], backend=backend, seed=header["seed"], noise_shape=noise_shape
    )
    model.normaliser = Normaliser.from_dict(header["normaliser"], tensors, noise_shape, net.shape)
    model.scale, model.base = model.normaliser.scale, None
    if "base" in header.get("features", ()):
        model.base, model._gaussian = "gaussian", GaussianBase.from_arrays(tensors, net.shape[0])
        net.set_linear(model._gaussian.linear(schedule, model.prediction))
    model._held_out, model._data, model.report_ = _restore_habits(header)
    names = header.get("class_names")
    if names is not None:
        count = getattr(net, "classes", None)
        if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
            raise ArgumentError("class_names", repr(names), f"a list of {count or 0} names, or null")
    model.class_names = names
    model.step = check_int("step", header["step"], low=0, high=MOST_STEPS)
    model.ema_updates = check_int("ema_updates", header["ema_updates"], low=0, high=MOST_STEPS)
    model._arithmetic = check_int("arithmetic", header.get("arithmetic", 1), low=1)

    def buffer(prefix: str) -> npt.NDArray[Any]:
        flat = net.layout.zeros(net.dtype)
        views = net.layout.views(flat)
        for name, shape in net.layout.shapes.items():
            tensor = stored(f"{prefix}.{name}", shape)
            if tensor.dtype != net.dtype:
                raise ArgumentError(f"{prefix}.{name}", f"dtype {tensor.dtype}", f"{net.dtype}")
            views[name][...] = tensor
        try:
            check_array(prefix, flat)  # all at once: there may be hundreds
        except ArgumentError:
            for name, view in views.items():  # which of them it is
                check_array(f"{prefix}.{name}", view)
            raise
        return flat

    net.flat = buffer("net")
    model._average = buffer("ema")
    if header["training"] is not None:
        model._optimizer = _Optimizer(TrainingPlan.from_dict(header["training"]), buffer("adam.m"), buffer("adam.v"))
    for name in model.history:
        model.history[name] = check_array(
            f"history.{name}", tensors[f"history.{name}"], shape=(None,), finite=False
        ).tolist()
    for steps, losses in (("step", "loss"), ("validation_step", "validation_loss")):
        if len(model.history[steps]) != len(model.history[losses]):
            got, wants = (f"{len(model.history[name])} values" for name in (losses, steps))
            raise ArgumentError(f"history.{losses}", got, f"{wants}, as history.{steps} has")
    return model


def _restore_habits(header: dict[str, Any]) -> tuple[tuple[str, float], list[int] | None, dict[str, Any] | None]:
    """What a file says of rows held out, of the data, and of the samples; files of 0.1.0 say nothing."""
    held_out = header.get("held_out") or ["fraction", 0.0]
    if not isinstance(held_out, list) or len(held_out) != 2:
        raise ArgumentError("held_out", repr(held_out), "a rule and a share")
    rule = check_choice("held_out", held_out[0], ["fraction", "share"])
    part = check_float("held_out", held_out[1], low=0, high=1, high_open=True)
    data, report = header.get("data"), header.get("report")
    if data is not None:
        if not isinstance(data, list) or len(data) != 2:
            raise ArgumentError("data", repr(data), "a number of rows and a checksum, or null")
        data = [check_int("data", value, low=0) for value in data]
    if report is not None and not isinstance(report, dict):
        raise ArgumentError("report", repr(report), "names and numbers, or null")
    return (rule, part), data, report


def _fingerprint(X: npt.NDArray[Any]) -> list[int]:
    """Number of rows, and a checksum: tells whether a data set is the one that was learned from."""
    single = X.astype(np.float32) if X.dtype == np.float64 else X  # as files have it
    return [len(X), zlib.crc32(np.ascontiguousarray(single).data)]


def _labels(argument: str, y: Any, classes: int | None, n: int, be: Backend) -> npt.NDArray[Any] | None:
    """Labels (n,) on the host, for a network with so many classes."""
    if classes is None:
        if y is not None:
            raise ArgumentError(argument, type(y).__name__, "None: this network has no classes")
        return None
    if y is None:
        raise ArgumentError(argument, "None", f"a class from 0 to {classes - 1} for each row: this network has classes")
    checked: npt.NDArray[Any] = check_indices(argument, _on_host(be, y), classes, n)
    return checked


def _on_host(be: Backend, X: Any) -> Any:
    """Training data as NumPy: it is normalised on the host, once."""
    if not is_on_device(X):
        return X
    be, array = backend_for(be, X=X), check_array("X", X)
    return be.to_numpy(be.asarray(array, array.dtype))
