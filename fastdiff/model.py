"""`Diffusion`: a network, a schedule and a normaliser that are trained, sampled from, saved and loaded together."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff import checkpoint, defaults, judgement, likelihood, samplers, sampling, series, split
from fastdiff.backends import Backend, TrainingDraws, TrainState, get_backend
from fastdiff.backends.protocol import DRAWS
from fastdiff.base import GaussianBase
from fastdiff.callbacks import Reporter, listeners
from fastdiff.conditioning import inside, log_units, put_exact
from fastdiff.covariates import CovariateScale, checked_covariates, none_known
from fastdiff.errors import (
    ArgumentError,
    DataWarning,
    QualityWarning,
    TrainingError,
    all_finite,
    check_array,
    check_callable,
    check_choice,
    check_flags,
    check_float,
    check_int,
    check_seed,
    is_on_device,
    shown,
)
from fastdiff.files import check_path, check_writable
from fastdiff.gaps import MOST_COPIES, Gaps, check_gaps
from fastdiff.likelihood import Bound, LogDensity
from fastdiff.model_file import Keeper, Saved, naming_faults
from fastdiff.nn import Network, NetworkDenoiser
from fastdiff.nn.optim import UNSET, TrainingPlan, Unset
from fastdiff.noise import MAX_STEP
from fastdiff.noise_shape import NoiseShape
from fastdiff.normaliser import SCALES, Normaliser, check_carried, settled
from fastdiff.observations import Given, Known, Observations, observations
from fastdiff.progress import say
from fastdiff.recordings import (
    BLOCK_VALUES,
    Step,
    blocks_of,
    check_quantiles,
    filled,
    forecast_plan,
    steps_of,
    summary,
)
from fastdiff.samplers import Sampler
from fastdiff.schedule import PREDICTIONS, Schedule
from fastdiff.split import Split
from fastdiff.training import (
    Optimizer,
    Patience,
    Saves,
    Trainer,
    Turns,
    Validation,
    alone,
    empty_history,
    loss_terms,
    plan_by_rule,
    train,
)

log = logging.getLogger("fastdiff")

SAVED_EVERY = 1000  # steps
LEAST_DEVIATION = 1e-3  # of draws, relative to the data's: a value that never varies is not infinitely strange


class Diffusion:
    """A diffusion model of curves, series of several channels, or pictures.

    Parameters
    ----------
    net : MLP or UNet, optional
        The network; by default one that fits the data, made at the first `fit`: an `MLP` for curves and series, a
        `UNet` for pictures (`fastdiff.defaults` has the rules).
    schedule : Schedule, optional
        The noise levels; by default ``Schedule.sigmoid(200, beta_start=1e-5, beta_end=0.1)`` for curves and series (100
        without a base) and ``Schedule.cosine(200)`` for pictures, or what fits net.T.
    prediction : {"v", "noise", "x0", "velocity"}, optional
        What the network learns to predict; by default v = signal noise - noise x0 (Salimans and Ho 2022), the velocity
        noise - x0 for a flow, or what a network that was read from a file predicts. An error of the noise counts
        1 / signal times in the sample, 14 times at the end of the source text's schedule; a schedule that ends in noise
        alone (a flow, or zero terminal SNR) refuses that prediction.
    scale : {"auto", "all", "column", "channel"}, optional
        What has a mean and a deviation of its own inside: all values together, each column of curves, or each channel
        of series. "auto" scales each channel, and each column where their deviations differ by more than a factor of
        10. Pictures have a `data_range`.
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
    class_names, covariate_names, channel_names : list of str or None
        What the classes, the covariates, and the channels of series, are called; for the reader only, and saved with
        the model.

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
            alone = len(net.shape) == 1
            wants = f"one of {net.shape[0]} values, as the network has" if alone else "None for series and pictures"
            raise ArgumentError("noise_shape", shown(noise_shape), wants)
        if net is not None and net.outputs != net.image[2] and not net.learned_variance:
            wants = f"{net.image[2]}, as many as there are channels, or twice as many for a learned variance"
            raise ArgumentError("net", f"{net.outputs} outputs", wants)
        if net is not None and net.learned_variance and noise_shape is not None:
            raise ArgumentError(
                "noise_shape", shown(noise_shape), "None: this network learns the variance of white noise"
            )
        if prediction is None:
            usual = "velocity" if schedule is not None and schedule.kind == "flow" else "v"
            prediction = (None if net is None else net.prediction) or usual
        if net is not None and net.prediction not in (None, prediction):
            raise ArgumentError("prediction", shown(prediction), f"{net.prediction!r}, as the network was trained")
        get_backend(backend)  # an unusable one is reported here
        self.net, self.schedule, self.backend, self.noise_shape = net, schedule, backend, noise_shape
        self.prediction = check_choice("prediction", prediction, PREDICTIONS)
        if schedule is not None:
            schedule.target(prediction)  # one that ends in noise alone refuses its prediction
        self.scale = check_choice("scale", scale, SCALES)
        self.base = None if base is None else check_choice("base", base, ["auto", "gaussian"])
        if net is not None and base == "gaussian" and not net.has_linear:
            raise ArgumentError("base", "'gaussian'", f"None: a network of kind {net.kind!r} has no linear part")
        if scale in ("column", "channel") and noise_shape is not None:
            raise ArgumentError("scale", shown(scale), "'all' or 'auto' with a noise_shape: it has the scales")
        self.seed = check_seed(seed)
        self._turns = Turns()
        self._own_net = net is None
        self._forget()

    def _forget(self) -> None:
        self.normaliser: Normaliser | None = None
        self.step = self.end_step = self.ema_updates = 0
        self.history = empty_history()
        self._optimizer: Optimizer | None = None
        self._average: npt.NDArray[Any] | None = None
        self._frozen: tuple[tuple[int, Backend], NetworkDenoiser] | None = None  # averaged weights, and when
        self.class_names: list[str] | None = None
        self.covariate_names: list[str] | None = None
        self._covariates: CovariateScale | None = None
        self._label_drop: float | None = None  # the share of the last fit; the first one decides
        self.channel_names: list[str] | None = None
        self._frame: series.Frame | None = None  # how frames are made that are like those of the data
        self.report_: dict[str, Any] | None = None
        self._held_out: tuple[str, float] | None = None  # how rows are held out; the first fit decides
        self._data: list[int] | None = None  # fingerprint of the first fit's rows
        self._gaussian: GaussianBase | None = None
        self._arithmetic = checkpoint.ARITHMETIC  # of the weights; only a file may have another one

    def __getstate__(self) -> dict[str, Any]:
        with self._turns.looking():
            return {**vars(self), "_frozen": None, "_turns": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turns=Turns())

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

    @alone
    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        covariates: Any = None,
        steps: int | None = None,
        batch: int | None = None,
        label_drop: float | None = None,
        lr: float | Unset = UNSET,
        warmup: int | Unset = UNSET,
        decay_steps: int | Unset | None = UNSET,
        clip_norm: float | Unset | None = UNSET,
        ema: float | Unset | None = UNSET,
        weighting: str | Unset = UNSET,
        snr_gamma: float | Unset = UNSET,
        lr_plan: str | Unset = UNSET,
        validation: Any = None,
        patience: int | None = None,
        judge: bool | None = None,
        flip: bool = False,
        accumulate: int = 1,
        data_range: tuple[float, float] | None = None,
        progress: bool = True,
        callback: Callable[[int, float], Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int | None = None,
        keep: int = 1,
        callbacks: Any = (),
    ) -> Self:
        """Train for further steps, on from `step`.

        The loss is the mean squared error of the prediction at uniformly drawn timesteps (Ho et al. 2020, eq. 14).

        Parameters
        ----------
        X : (N, points), (N, points, channels) or (N, height, width, channels) array, a frame, or windows of one
            Curves, series, or pictures. Values of curves and series may be missing (NaN): then the loss is that of the
            others, and the network is given draws in their place: see `fastdiff.gaps`. Of a frame (pandas, polars,
            xarray) each row is a curve; `fastdiff.data.windows` makes series of a recording.
        y : (N,) int array, optional
            Class labels, 0 .. classes - 1, for a network that has them. A network that is made here has as many as y
            needs.
        covariates : (N, k) or (N,) array, optional
            Numbers that belong to every row, a temperature or a price, which samples can be asked for. A network that
            is made here takes as many; inside each has mean 0 and deviation 1.
        steps : int, optional
            How many more steps to take, at a constant rate unless `decay_steps` is given. By default as many as suit
            the data (see `fastdiff.defaults`; 3,000 for pictures), over which the rate falls by a cosine.
        batch : int, optional
            Rows drawn at a step, with replacement; by default 256 curves, or 64 for a U-Net.
        label_drop : float, optional
            The share of positions whose label, and of those whose covariates, are left out, by stream DROP of the noise
            law, so that the network also learns what is true without them: `guidance` needs that. By default 0.1, or
            what the fit before had, for a network that can be asked for nothing (new ones with classes or covariates
            can), and 0 for others.
        lr, warmup, decay_steps, clip_norm, ema, weighting, snr_gamma, lr_plan
            See `TrainingPlan`, which has the defaults of the first call. Later calls go on with the values before them,
            but for the decay of calls without `steps`, and change those that are named, except the weighting, which
            says what is learned: moments and averages stay, the change is logged, and files keep the latest plan.
            Warm-up and decay are absolute steps. With `steps` an `lr_plan` "cosine" or "one-cycle" wants `decay_steps`.
        validation : float or array, optional
            A fraction of the rows to hold out (the same rows at each call with the same X; 0: none), or other rows,
            with labels a pair (rows, labels), and with covariates these come last. Their loss under the averaged
            weights, with fixed noise and timesteps, goes to `history` every 100 steps. By default the rows that the
            first call held out; in that one 5 % where there are 100 rows or more, at most 1,024 (256 pictures): row k
            where word 0 of stream DATA, step 3, row k, is small enough. It depends on nothing but seed and row number.
        patience : int, optional
            Stop where the loss on held-out rows has not been smaller for so many steps, and keep the averaged weights
            that had the smallest, also where training ends before that. It takes the place of the look at samples that
            calls without `steps` keep weights by. That loss is looked at every 100 steps.
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
        checkpoint : path, optional
            Save the model there, as `save` does, at every step that is a multiple of `every`, and when training ends,
            be it by an interrupt or an error.
        every : int, optional
            By default 1,000.
        keep : int, optional
            How many of these states stay: the last one is `checkpoint`, and with more than 1 the last so many that this
            call has saved are ``NAME-STEP`` beside it, STEP in six digits.
        callbacks : list, optional
            Loggers, which do not slow the training down: `fastdiff.callbacks.FileLogger`, a SummaryWriter of
            TensorBoard, the module mlflow, ...: see `fastdiff.callbacks`.

        Returns
        -------
        Diffusion
            self.

        Raises
        ------
        ArgumentError
            Shape, dtype or value of an argument; another weighting than that of the first call.
        TrainingError
            A loss or gradient that is not finite: the model keeps the state before that step. Or another thread trains
            this model.
        KeyboardInterrupt
            Ctrl-C, SIGTERM and SIGHUP take effect after a whole step, so the state is sound; the third Ctrl-C at once.
            A handler of your own for one of them stays, and is none of ours.
        """
        be = get_backend(self.backend)
        X, names, frame = series.taken(X)
        before = TrainingPlan() if self._optimizer is None else self._optimizer.plan
        plan = before.changed(
            lr=lr, warmup=warmup, decay_steps=decay_steps, clip_norm=clip_norm, ema=ema, weighting=weighting,
            snr_gamma=snr_gamma, lr_plan=lr_plan,
        )  # fmt: skip
        if snr_gamma is not UNSET and plan.weighting != "min_snr":
            raise ArgumentError("snr_gamma", str(snr_gamma), f"weighting='min_snr' with it, not {plan.weighting!r}")
        aims = [(each.weighting, each.snr_gamma) for each in (plan, before)]
        if self._optimizer is not None and aims[0] != aims[1]:
            raise ArgumentError(
                "weighting, snr_gamma", str(aims[0]), f"{aims[1]}, of the first fit; reset() starts anew"
            )
        if steps is not None:
            steps = check_int("steps", steps, low=0)
            plan.check_named(lr_plan, decay_steps)
        patience = None if patience is None else check_int("patience", patience, low=1)
        tell = listeners(callbacks)
        if checkpoint is None and (every is not None or keep != 1):
            raise ArgumentError("checkpoint", "None", "where to save, with every and keep")
        keep = check_int("keep", keep, low=1)
        every = SAVED_EVERY if every is None else check_int("every", every, low=1)
        if checkpoint is not None:
            checkpoint = check_path("checkpoint", checkpoint)
            check_writable(checkpoint)
        check_flags(judge=False if judge is None else judge, flip=flip, progress=progress)
        check_callable("callback", callback)
        if self.normaliser is not None and self._optimizer is None:
            raise TrainingError("this model was saved with training=False: it can sample, but not go on training")
        X, y, classes = split.checked(X, y, self.net, self.noise_shape, be, missing=True)
        if X.dtype.kind == "f" and np.isnan(X).any():
            check_gaps(X, "X")
        known, of_unseen = self._known_covariates(covariates, len(X)), None
        if known is not None and isinstance(validation, (tuple, list)) and len(validation) > 1:
            *validation, of_unseen = validation
            validation = validation[0] if len(validation) == 1 else validation
        parts = split.split(X, y, validation, classes, self._held_out, self.seed, be)
        if known is not None and parts.held is not None:
            known, of_unseen = known[~parts.held], known[parts.held]
        rows, labels = parts.rows, parts.labels
        kind = type(self.net) if self.net is not None else defaults.network_kind(X.ndim)
        batch = kind.usual_batch if batch is None else check_int("batch", batch, low=1, high=1 << 30)
        accumulate = check_int("accumulate", accumulate, low=1, high=batch if kind.in_parts else 1)
        if patience is not None and parts.held_out is None:
            raise ArgumentError("patience", str(patience), "rows that are held out: validation=0.1, or rows")
        if flip and X.ndim < 4:
            raise ArgumentError("flip", shown(flip), f"False for {'curves' if X.ndim == 2 else 'series'}")

        share = self._share_dropped(label_drop, self.net or (classes, None if known is None else known.shape[1]))
        if self.normaliser is None and names is not None and X.ndim == 3:
            self.channel_names = names
        gaps = self._prepare(parts, (classes, None if known is None else known.shape[1]), plan, data_range)
        self._frame = frame or self._frame
        if known is not None:
            self._covariates = self._covariates or CovariateScale.of(known)
            known = self._covariates.apply(known)
            if parts.held_out is not None:
                of_unseen = checked_covariates(of_unseen, known.shape[1], len(parts.held_out[0]))
                of_unseen = self._covariates.apply(of_unseen)
        self._label_drop = share
        net, schedule, normaliser = self._fitted()
        assert self._optimizer is not None and self._average is not None  # noqa: PT018
        by_rule = steps is None
        if steps is None:
            rank = 0 if self._gaussian is None else len(self._gaussian.variances)
            decay = decay_steps is not UNSET and decay_steps is not None
            steps, plan = plan_by_rule(rows.shape, batch, plan, self.step, net.layout.count, rank, decay=decay)
        if self.step and plan != before:
            log.info("from step %d on: %s", self.step, plan.difference(before))
            if plan.warmup > before.warmup and plan.warmup <= self.step:
                log.warning("warmup=%d has no effect: it is an absolute step, and has passed", plan.warmup)
        self._optimizer = optimizer = self._optimizer._replace(plan=plan)
        self._data = self._data or split.fingerprint(X)
        judged = bool(by_rule or judge or steps >= defaults.JUDGED_STEPS)
        if doubt := judgement.doubt(rows, by_rule=by_rule, judged=judged):
            warnings.warn(doubt, QualityWarning, stacklevel=3)
        careless = not by_rule and patience is None and not self.step and steps >= defaults.JUDGED_STEPS
        if careless and (crowd := judgement.crowded(len(rows), net.layout.count)):
            warnings.warn(crowd, QualityWarning, stacklevel=3)
        decayed = None if optimizer.plan.lr_plan == "constant" else optimizer.plan.decay_steps
        if not by_rule and steps > 0 and decayed is not None and self.step >= decayed:
            words = "the rate has fallen to %g by step %d and stays there; give decay_steps, or leave steps out"
            log.info(words, optimizer.plan.rate(self.step), decayed)
        if self.step + steps > MAX_STEP + 1:
            wants = f"at most {MAX_STEP + 1 - self.step}: after {MAX_STEP + 1} steps in all the draws would repeat"
            raise ArgumentError("steps", str(steps), wants)
        first, self.end_step = self.step, self.step + steps
        if steps > 0:
            self._use_this_arithmetic()
        inner = normaliser.apply(rows, net.dtype) if gaps is None else gaps.training_data()
        data = be.asarray(inner, net.dtype)
        tables = schedule.signal, schedule.noise, *schedule.target(self.prediction)
        terms = loss_terms(schedule, self.prediction, optimizer.plan, learned_variance=net.learned_variance)
        if gaps is not None:  # the loss is that of what is there
            terms = (np.ones((schedule.T, 1)) if terms is None else terms) / gaps.share
            rows = self._whole(gaps.filled(1)[0], rows.shape)
        repeats = len(data) // len(rows)  # copies of rows with gaps
        numbers = None if known is None else np.column_stack([known, np.ones(len(known))]).astype(net.dtype)
        told = (None if part is None else np.concatenate([part] * repeats) for part in (labels, numbers))
        of_rows, of_numbers = told if repeats > 1 else (labels, numbers)
        draws = TrainingDraws(
            data, *tables, self.seed, of_rows, bool(flip), terms, of_numbers, share, net.classes or 0, gaps is not None
        )
        unseen = parts.unseen
        looks: Validation | None = None
        keeper: judgement.Watch | Patience | None = None
        if parts.held_out is not None:
            x0, hidden = normaliser.apply(parts.held_out[0], net.dtype), None
            if gaps is not None:
                hidden = np.where(np.isnan(x0), np.nan, 0.0)
                flat = normaliser.apply(parts.held_out[0], np.float64).reshape(len(x0), -1)
                x0 = gaps.filled(1, flat, first=MOST_COPIES)[0].reshape(x0.shape)
                unseen = self._whole(x0, x0.shape)
            of_held = parts.held_out[1], of_unseen
            looks = Validation(be, net, x0.astype(net.dtype), of_held, schedule, draws, hidden)
        # Samples that are asked for what a row is lie near that row: of these a watch would take good ones for copies.
        if patience is not None and looks is not None:
            keeper = Patience(patience, looks)
        elif by_rule and 2 <= len(rows) <= defaults.WATCHED_ROWS and rows.ndim < 4 and not net.asked:
            learned = be.to_numpy(data) if gaps is None else normaliser.apply(rows, net.dtype)
            learned = learned.reshape(len(rows), -1)
            keeper = judgement.Watch(learned, partial(self._drawn_inside, be), self.step, self.end_step)
        host = TrainState(net.flat, net.layout.zeros(net.dtype), optimizer.m, optimizer.v, self._average)
        trainer = Trainer(be, net, draws, host, batch, accumulate)
        trainer.turns, saver = self._turns, None if checkpoint is None else Keeper(self.save, checkpoint, keep)
        if saver is not None:
            trainer.saves = Saves(every, lambda: saver(self.step))
        options: dict[str, Any] = {"validation": looks, "keeper": keeper, "progress": progress}
        options["reporter"] = Reporter(tell, self.history, optimizer.plan.rate) if tell else None
        try:
            train(trainer, self, optimizer.plan, callback=callback, **options)
        finally:
            if saver is not None and self.step > first:
                saver(self.step)
        if judge or (judge is None and (by_rule or self.step - first >= defaults.JUDGED_STEPS)):
            self._judge(rows, (labels, known), unseen, show=progress)
            if saver is not None:
                saver(self.step)  # with the report
        return self

    def _whole(self, inner: npt.NDArray[np.float64], shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Rows whose missing values were drawn, in the data's units."""
        assert self.normaliser is not None
        whole: npt.NDArray[np.float64] = self.normaliser.invert(inner.reshape(shape).copy(), get_backend("numpy"))
        return whole

    def _known_covariates(self, covariates: Any, n: int) -> npt.NDArray[np.float64] | None:
        """Covariates of n rows of data, in their own units."""
        columns = None if self.net is None else self.net.covariates
        if covariates is None and columns is None:
            return None
        if self.net is not None and columns is None:
            raise none_known(covariates)
        return checked_covariates(covariates, columns, n)

    def _share_dropped(self, asked: Any, of: Network | tuple[int | None, int | None]) -> float:
        """The share of labels and covariates that are left out; `of` a network, or the classes of one to be made."""
        free = of.asked_freely if isinstance(of, Network) else of != (None, None)
        if asked is None:
            return (0.1 if self._label_drop is None else self._label_drop) if free else 0.0
        share = check_float("label_drop", asked, low=0, high=1)
        if share and not free:
            wants = "0 or None: this network has no null class, as new networks with classes have"
            if isinstance(of, tuple) or not of.asked:
                wants = "0 or None: nothing is asked of this network; give y or covariates"
            raise ArgumentError("label_drop", shown(asked), wants)
        return share

    def _drawn_inside(self, be: Backend, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Samples of some weights of the network, in its own range."""
        net, _, _ = self._fitted()
        denoiser = NetworkDenoiser(net, be.asarray(weights, net.dtype), self.prediction, be)
        drawn = sampling.sample(denoiser, self.named_sampler(), n=judgement.SAMPLES, seed=self.seed, backend=be)
        return be.to_numpy(drawn).reshape(len(drawn), -1)

    def evaluate(
        self,
        X: Any,
        y: Any = None,
        *,
        covariates: Any = None,
        training: Any = None,
        samples: int | None = None,
        seed: int | None = None,
    ) -> judgement.Evaluation:
        """Draw samples and measure how like the data they are.

        Parameters
        ----------
        X : (N, ...) array
            Rows of the data, at least 2. Where they are those of the first fit, the samples are compared with the rows
            that it held out; of others half are taken for training rows.
        y : (N,) int array, optional
            Their labels, for a network that has classes: the samples are asked for in the same shares.
        covariates : (N, k) array, optional
            Their covariates, for a network that has them: the samples are asked for these.
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
        X, y, _ = split.checked(X, y, self.net, self.noise_shape, get_backend(self.backend))
        asked = y, self._inner_covariates(covariates, len(X))
        if len(X) < 2:
            raise ArgumentError("X", "1 row", "at least 2 rows")
        if training is not None:
            learned, held_out = check_array("training", training, shape=(None, *X.shape[1:])), X
            if len(learned) < 2:
                raise ArgumentError("training", f"{len(learned)} rows", "at least 2")
        elif split.fingerprint(X) == self._data:
            parts = split.hold_out(X, y, *(self._held_out or ("fraction", 0.0)), self.seed)
            learned, held_out = parts.rows, parts.unseen
        elif len(X) < 4:
            raise ArgumentError("X", f"{len(X)} rows, none of them learned from", "at least 4 rows, or `training`")
        else:
            parts = split.hold_out(X, y, "fraction", 0.5, self.seed)
            learned, held_out = parts.rows, parts.unseen
        samples = 4 * judgement.SAMPLES if samples is None else check_int("samples", samples, low=2)
        return self._measured(learned, asked, held_out, samples=samples, seed=seed)

    def _judge(
        self, rows: npt.NDArray[Any], asked: tuple[Any, Any], held_out: npt.NDArray[Any] | None, *, show: bool
    ) -> None:
        """Draw samples, measure them, and say what was found."""
        if len(rows) < 2:
            return
        found = self._measured(rows, asked, held_out, samples=judgement.SAMPLES, seed=None)
        self.report_ = {"step": self.step, **found.report.to_dict()}
        say(found.report.sentence, show=show)
        if found.complaint:
            warnings.warn(found.complaint, QualityWarning, stacklevel=4)

    def _measured(
        self,
        rows: npt.NDArray[Any],
        asked: tuple[Any, Any],
        held_out: npt.NDArray[Any] | None,
        *,
        samples: int,
        seed: int | None,
    ) -> judgement.Evaluation:
        """Draw samples, asked for labels and inner covariates as those are, and measure them."""
        assert self.net is not None and self.normaliser is not None  # noqa: PT018
        n, sampler, steps = samples, "auto", None
        if self.net.operations * self.net.T * n > judgement.MOST_WORK or len(self.net.shape) == 3:
            n, sampler, steps = judgement.PICTURES, "ddim", min(judgement.PICTURE_STEPS, self.net.T)
        labels, numbers = _some(asked, n)
        if numbers is not None and self._covariates is not None:
            numbers = numbers * self._covariates.deviation + self._covariates.mean
        drawn = self.sample(n, labels=labels, covariates=numbers, sampler=sampler, steps=steps, seed=seed)
        drawn = get_backend(self.backend).to_numpy(drawn)
        report = judgement.measure(drawn, rows, held_out, self.normaliser, seed=self.seed)
        found = report.complaints
        remedy = judgement.remedy(report, self.net, self.prediction, base=self._gaussian is not None)
        complaint = f"{'; '.join(found)}: {remedy}" if found else None
        return judgement.Evaluation(report, complaint, drawn, rows if held_out is None else held_out, rows)

    def _prepare(
        self, parts: Split, asked: tuple[int | None, int | None], plan: TrainingPlan, data_range: Any
    ) -> Gaps | None:
        """What the first fit decides: network, schedule, normaliser, plan and buffers. Later ones are held to it.

        `asked` is how many classes and covariates a network has that is made. Of rows with missing values return what
        is known of these.
        """
        X, gaps = parts.rows, None
        missing = X.dtype.kind == "f" and bool(np.isnan(X).any())
        if missing:
            check_gaps(X, "X, but for the rows held out")
            if self.noise_shape is not None or (self.net is not None and self.net.learned_variance):
                what = "a noise_shape" if self.noise_shape is not None else "a learned variance"
                raise ArgumentError("X", f"missing values, with {what}", "rows without any")
        names = self.channel_names
        normaliser = settled(self.normaliser, X, parts.unseen, data_range, self.scale, self.noise_shape, names)
        if missing:  # of rows without a centre: the same in later fits, when there is one
            plain = replace(normaliser, centre=None).apply(X, np.float64)
            gaps = Gaps.of(plain.reshape(len(X), -1), self.seed)
        if self.normaliser is not None:
            return None if gaps is None else gaps.centred(normaliser.centre)
        if X.ndim == 4 and X.shape[1] in (1, 3) and min(X.shape[2:]) > 4:
            words = f"X of shape {X.shape} is taken for pictures of {X.shape[1]} x {X.shape[2]} pixels in {X.shape[3]} "
            hint = (
                "channels; of (N, channels, height, width) X.transpose(0, 2, 3, 1) makes (N, height, width, channels)"
            )
            warnings.warn(words + hint, DataWarning, stacklevel=4)
        if X.ndim < 4 and getattr(self.net, "dtype", None) != np.float64:
            scales = "all" if self.noise_shape is None and self.scale == "all" else "column"
            there = np.where(np.isnan(X), np.nanmean(X, axis=0), X) if missing else X
            check_carried(there.reshape(-1, X.shape[-1]), scales, "column" if X.ndim == 2 else "channel")
        net, schedule = defaults.network_and_schedule(
            self.net, self.schedule, X.shape, asked, base=self.base is not None, seed=self.seed
        )
        if net.dtype == np.float64 and get_backend(self.backend).name != "numpy":
            raise ArgumentError("backend", shown(self.backend), "'numpy': this network has float64 parameters")
        self._gaussian = None
        if net.has_linear and (self.base == "gaussian" or (self.base == "auto" and self._own_net)):
            if gaps is None:
                normaliser = normaliser.centred(X)
                self._gaussian = GaussianBase.of(normaliser.apply(X, np.float64).reshape(len(X), -1))
            else:
                normaliser = replace(normaliser, centre=gaps.mean.reshape(X.shape[1:]))
                gaps = gaps.centred(normaliser.centre)
                self._gaussian = GaussianBase.of(gaps.filled(1)[0], gaps.cov)
            net.set_linear(self._gaussian.linear(schedule, self.prediction))
        self.schedule, self.net = schedule, net
        zeros = net.layout.zeros
        self._optimizer = Optimizer(plan, zeros(net.dtype), zeros(net.dtype))
        self._average = net.flat.copy()
        self.normaliser = normaliser
        self._held_out = parts.rule
        return gaps

    def _use_this_arithmetic(self) -> None:
        """Say once that a file was trained with other bits than those that follow."""
        assert self.net is not None
        before, self._arithmetic = self._arithmetic, max(checkpoint.ARITHMETIC, self.net.arithmetic)
        if before != self._arithmetic and self.step > 0:
            words = "trained with arithmetic %d so far, now with %d: equal to one run up to rounding, not to the bit"
            log.warning(words, before, self._arithmetic)

    def _fitted(self) -> tuple[Network, Schedule, Normaliser]:
        if self.net is None or self.schedule is None or self.normaliser is None:
            raise TrainingError("this model has not been trained: call fit first")
        return self.net, self.schedule, self.normaliser

    def denoiser(self, *, ema: bool = True) -> NetworkDenoiser:
        """Return the network with a copy of its averaged (or raw) weights, in the model's inner range (white noise)."""
        net, schedule, _ = self._fitted()
        check_flags(ema=ema)
        with self._turns.looking():
            flat = (self._average if ema and self._average is not None else net.flat).copy()
        if not all_finite(flat):
            raise TrainingError("the weights of this model are not finite: load one that was saved before, or reset()")
        be = get_backend(self.backend)
        return NetworkDenoiser(net, be.asarray(flat, net.dtype), self.prediction, be, schedule)

    def _sampled(self, ema: bool) -> NetworkDenoiser:
        """`denoiser`, the same one until the model is trained further: a backend may keep what it has made for it."""
        check_flags(ema=ema)
        if not ema or self._average is None:
            return self.denoiser(ema=ema)  # anybody may have changed these weights
        now = self.step, get_backend(self.backend)
        if self._frozen is None or self._frozen[0] != now:
            self._frozen = now, self.denoiser()
        return self._frozen[1]

    def named_sampler(self, name: str = "auto", steps: int | None = None, *, given: bool = False) -> Sampler:
        """Return the table that `sample` runs for the name of a sampler, alone or with observations: see there."""
        check_flags(given=given)
        net, schedule, normaliser = self._fitted()
        if not isinstance(name, str):
            raise ArgumentError("sampler", shown(name), "a name, or a table of fastdiff.samplers")
        if name == "auto":
            name, usual = defaults.curve_sampler(schedule, base=self._gaussian is not None)
            steps = usual if steps is None else steps
        clip = None if normaliser.data_range is None or name in samplers.UNCLIPPED else 1.0
        if name == "ddpm" and net.learned_variance and not given:  # the one learned is not that given observations
            return samplers.ddpm(schedule, steps, variance="learned_range", prediction=self.prediction, clip=clip)
        options = {"reclip": True} if clip is not None and name in samplers.RECLIPPED else {}
        return samplers.named(name, schedule, steps, prediction=self.prediction, clip=clip, **options)

    def sample(
        self,
        n: int = 16,
        *,
        labels: Any = None,
        covariates: Any = None,
        guidance: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        rescale: float = 0.0,
        sampler: str | Sampler = "auto",
        steps: int | None = None,
        seed: int | None = None,
        first_sample: int = 0,
        ema: bool = True,
        trajectory: bool = False,
        round: bool = False,  # noqa: A002 - what it is called everywhere
        as_frame: bool = False,
        batch: int | None = None,
        progress: bool = False,
        given: Given | None = None,
        method: str = "auto",
        return_evidence: bool = False,
    ) -> Any:
        """Draw new curves, series or pictures.

        Parameters
        ----------
        n : int, optional
            How many.
        labels : int or (n,) int array, optional
            The class of each, for a network that has classes.
        covariates : (k,) or (n, k) array, optional
            The numbers that each is asked for, in the units of those of `fit`, for a network that has them.
        guidance : float, optional
            How much what is asked for counts, of a model that was trained with labels left out at times: see
            `fastdiff.Guided`. 1 is as in the data, and what is drawn without it; above it samples are more typical and
            less various; 0 asks for nothing, and needs neither labels nor covariates.
        guidance_interval : (int, int), optional
            Guide at timesteps from the first to the second alone.
        rescale : float, optional
            From 0 to 1, how far to take back what guidance adds to the deviation of the network's output.
        sampler : str or Sampler, optional
            "auto", a name of `fastdiff.samplers.names` with its defaults, or a table of `fastdiff.samplers` for this
            model's schedule and prediction. Of pictures x0 is clipped to their range, but for "deis" and "lms", which
            have no x0, and "ddim" takes the noise from the clipped x0 (``reclip``).
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
        as_frame : bool, optional
            Return a frame as the data were, of pandas, polars or xarray: with the same columns, of series after a
            column "sample", and with the clock that goes on after the recording's end. Of a model that was fitted on
            one, in this process: files do not hold frames.
        batch : int, optional
            At most this many at once.
        progress : bool, optional
            Show a progress bar.
        given : Known, Linear or Weight, or a list of them, optional
            What is known of the samples, in the units of the data: n draws are made for each observation. What lies
            far outside of the data is drawn far from what the network has learnt.
        method : {"auto", "tmpd", "pigdm", "dps", "replace", "repaint", "smc"}, optional
            How, see `fastdiff.conditioning`. The first three do not clip; "repaint" and "smc" take "ddpm" by default.
        return_evidence : bool, optional
            With "smc": also return the log density of each observation, in nats and the units of the data.

        Returns
        -------
        x : (n, points), (n, points, channels) or (n, height, width, channels) float32
            In the range of the data; uint8, rounded, for a model of bytes. (n, N, ...) for N observations; what is
            known without noise is to the bit what was given, in a dtype that holds it.
        path : (steps + 1, n, ...) float32, if `trajectory`
            Noise first, through the same map, and not rounded: noise is wider than any range of pictures.

        Raises
        ------
        ArgumentError
            An argument's value, or a table that disagrees with the model.
        TrainingError
            The model has not been trained.
        """
        check_flags(round=round, ema=ema)
        net, schedule, normaliser = self._fitted()
        self._check_guidance(guidance)
        if as_frame and (self._frame is None or trajectory or given is not None):
            wants = "a model fitted on a frame, or on windows of one, in this process; no trajectory, nothing given"
            raise ArgumentError("as_frame", "True", wants)
        known = None if given is None else self._observations(given)
        if not isinstance(sampler, Sampler):
            if known is not None and isinstance(sampler, str) and sampler == "auto":
                sampler = "ddpm" if isinstance(method, str) and method in ("repaint", "smc") else sampler
            sampler = self.named_sampler(sampler, steps, given=known is not None)
            if known is not None and not (isinstance(method, str) and method in ("replace", "repaint")):
                sampler = sampler.unclipped()
        elif steps is not None:
            raise ArgumentError("steps", str(steps), "None with a table: it has its own steps")
        elif sampler.prediction != self.prediction:
            wants = f"one made with prediction={self.prediction!r}, as this model predicts"
            raise ArgumentError("sampler", f"a table for prediction {sampler.prediction!r}", wants)
        elif found := sampler.schedule.difference(schedule):
            raise ArgumentError("sampler", f"a table for {sampler.schedule!r}: {found}", f"one for {schedule!r}")
        if normaliser.noise_shape is not None:
            sampling.refuse_clip(sampler)
        be = get_backend(self.backend)
        asked = n if known is None or known.count is None else known.count
        result = sampling.sample(
            self._sampled(ema), sampler, n=n, seed=self.seed if seed is None else seed, first_sample=first_sample,
            batch=batch, backend=self.backend, labels=labels, trajectory=trajectory, progress=progress,
            covariates=None if covariates is None else self._inner_covariates(covariates, asked), guidance=guidance,
            guidance_interval=guidance_interval, rescale=rescale,
            given=None if known is None else inside(known, *normaliser.affine(net.shape), normaliser.noise_shape),
            method=method,
            return_evidence=return_evidence,
        )  # fmt: skip
        x, other = result if trajectory or return_evidence else (result, None)
        if not is_on_device(x) and not all_finite(x):
            raise TrainingError(
                "samples that are not finite: the weights are too large for it, train with a smaller lr"
            )
        drawn = normaliser.restore(x, be)
        drawn = drawn.round() if round else drawn
        if known is not None:
            drawn = put_exact(drawn, known)
        if as_frame:
            return self._as_frame(be.to_numpy(drawn))
        if trajectory:
            return drawn, normaliser.invert(other, be)
        if known is None or not return_evidence:
            return drawn
        if normaliser.noise_shape is not None:  # what is seen is in the data's units
            return drawn, other
        return drawn, other - log_units(known, normaliser.affine(net.shape)[0])

    def _as_frame(self, drawn: npt.NDArray[Any]) -> Any:
        assert self._frame is not None
        return self._frame.samples(drawn) if drawn.ndim == 3 else self._frame.rows(drawn)

    def _check_guidance(self, guidance: Any) -> None:
        """Refuse to guide what was not trained for it."""
        net, _, _ = self._fitted()
        if guidance is not None and check_float("guidance", guidance, low=0) != 1 and not self._label_drop:
            wants = "None or 1: this network is asked for nothing; give fit labels or covariates"
            if net.asked_freely:
                wants = "None or 1: this model was trained without leaving labels out; fit with label_drop=0.1"
            elif net.asked:
                wants = "None or 1: this network has no null class; train a new one, and fit leaves labels out at times"
            raise ArgumentError("guidance", shown(guidance), wants)

    def _inner_covariates(self, covariates: Any, n: int) -> npt.NDArray[np.float64] | None:
        """Covariates of n samples in the network's range."""
        net, _, _ = self._fitted()
        if net.covariates is None and covariates is None:
            return None
        if net.covariates is None or self._covariates is None:
            raise none_known(covariates)
        return self._covariates.apply(checked_covariates(covariates, net.covariates, n))

    def impute(
        self,
        X: Any,
        draws: int = 100,
        *,
        quantiles: Any = None,
        method: str = "auto",
        sampler: str | Sampler = "auto",
        steps: int | None = None,
        labels: Any = None,
        covariates: Any = None,
        guidance: float | None = None,
        seed: int | None = None,
        first_draw: int = 0,
        ema: bool = True,
        progress: bool = False,
    ) -> Any:
        """Draw what is missing, many times: samples of the law of the missing values given the others.

        Parameters
        ----------
        X : (N, ...) array, a recording (time,) or (time, channels), or a frame
            With NaN where nothing is known; what is known is taken as exact. A recording is filled in window by window
            from left to right, each given what the same draw has finished: see `fastdiff.recordings`.
        draws : int, optional
            How many of each row.
        quantiles : float or sequence of float, optional
            Return these quantiles of the draws instead, without holding all of them at once.
        method, sampler, steps, guidance, seed, ema, progress
            As for `sample`.
        labels : int or (N,) int array, optional
            The class of each row, for a network that has classes.
        covariates : (k,) or (N, k) array, optional
            The covariates of each row, for a network that has them.
        first_draw : int, optional
            Draw k of a call is draw ``first_draw + k``: 50 draws are the first 50 of 100.

        Returns
        -------
        (draws, N, ...) or (draws, time, ...) array
            In a dtype that holds what was given, to the bit. Rows where nothing is missing are repeated. With
            `quantiles` these instead of the draws, in float64.
        list of frames, or dict of float to frame
            Of a frame: copies of it, filled in, a list of draws or, with `quantiles`, one for each of them.

        Raises
        ------
        ArgumentError
            Rows of another shape, infinite values, or as for `sample`.
        TrainingError
            The model has not been trained.
        """
        net, _, _ = self._fitted()
        draws, levels = check_int("draws", draws, low=1), check_quantiles(quantiles)
        options: dict[str, Any] = {
            "method": method, "sampler": sampler, "steps": steps, "seed": seed, "ema": ema, "progress": progress,
            "guidance": guidance,
        }  # fmt: skip
        X, frame, whole = self._asked("X", X)
        if whole:
            if covariates is not None:
                raise ArgumentError("covariates", type(covariates).__name__, "None for a recording")
            points, T = len(X), net.shape[0]
            padded = np.full((1, max(points, T), *net.shape[1:]), np.nan)
            padded[0, :points] = X
            parts = self._filled(padded, draws, steps_of(padded.shape[1], T), labels, first_draw, options)
            found = summary(parts, levels, axis=2)[:, 0, :points]
            return found if frame is None else _answers([frame.filled(_columns(one)) for one in found], levels)
        seen = Known(X)
        if seen.values.shape[1:] != net.shape:
            raise ArgumentError("X", f"shape {seen.values.shape}", f"rows of shape {net.shape}: (N, ...)")
        known = observations(seen, net.shape)
        values = known.known[0][0]
        missing = np.flatnonzero(np.isnan(values).any(axis=1))
        dtype = np.dtype(np.float64) if levels else np.result_type(np.float32, known.dtype)
        out = np.empty((len(levels or range(draws)), len(values), *net.shape), dtype)
        out[...] = values.astype(dtype).reshape(len(values), *net.shape)
        told = None if covariates is None else checked_covariates(covariates, net.covariates, len(values))
        at_once = len(missing) if levels is None else max(1, BLOCK_VALUES // (draws * values.shape[1]))
        for start in range(0, len(missing), max(1, at_once)):
            some = missing[start : start + at_once]
            drawn = self.sample(
                draws, labels=labels if labels is None or np.ndim(labels) == 0 else np.asarray(labels)[some],
                covariates=None if told is None else told[some],
                first_sample=first_draw, given=known.some(some), **options,
            )  # fmt: skip
            out[:, some] = drawn if levels is None else np.quantile(drawn, levels, axis=0)
        return out if frame is None else _answers([frame.filled(one) for one in out], levels)

    def forecast(
        self,
        past: Any,
        horizon: int,
        draws: int = 100,
        *,
        quantiles: Any = None,
        method: str = "auto",
        sampler: str | Sampler = "auto",
        steps: int | None = None,
        labels: Any = None,
        seed: int | None = None,
        first_draw: int = 0,
        ema: bool = True,
        progress: bool = False,
    ) -> Any:
        """Draw what comes after the past, many times: the end of a window given its beginning.

        Where past and horizon together are longer than a window it rolls on: each draw goes on from what it has drawn,
        half a window at a time.

        Parameters
        ----------
        past : (N, rows, ...) array, a recording (time,) or (time, channels), or a frame
            NaN where nothing is known. N pasts have no more rows than a window; of a recording the last ones are used.
        horizon : int
            How many rows.
        draws, quantiles, method, sampler, steps, labels, seed, first_draw, ema, progress
            As for `impute`.

        Returns
        -------
        (draws, N, horizon, ...) or (draws, horizon, ...) array
            With `quantiles` these instead of the draws.
        list of frames, or dict of float to frame
            Of a frame: with its columns, and its clock that goes on.

        Raises
        ------
        ArgumentError, TrainingError
            As for `impute`; a horizon below 1, or a past without rows or longer than a window.
        """
        net, _, _ = self._fitted()
        T = net.shape[0]
        if len(net.shape) > 2:
            raise ArgumentError("past", "a model of pictures", "a model of curves or series")
        draws, levels = check_int("draws", draws, low=1), check_quantiles(quantiles)
        horizon = check_int("horizon", horizon, low=1)
        options: dict[str, Any] = {
            "method": method, "sampler": sampler, "steps": steps, "seed": seed, "ema": ema, "progress": progress,
        }  # fmt: skip
        past, frame, whole = self._asked("past", past)
        seen = check_array("past", past, finite=False, dtype=np.float64)
        seen = seen[None] if whole else seen
        if seen.ndim != len(net.shape) + 1 or seen.shape[2:] != net.shape[1:] or not seen.shape[1]:
            wants = ("rows", *net.shape[1:]) if whole else ("N", "rows", *net.shape[1:])
            raise ArgumentError("past", f"shape {seen.shape[whole:]}", f"shape ({', '.join(map(str, wants))})")
        if np.isinf(seen).any():
            raise ArgumentError("past", "infinite values", "finite values, or NaN where nothing is known")
        rows = seen.shape[1]
        if rows > T and not whole:
            raise ArgumentError("past", f"{rows} rows", f"at most {T}, as a window has: past[:, -{T}:]")
        first, windows = forecast_plan(rows, horizon, T)
        if first > 0:
            log.info("forecast: the last %d of %d rows are used", rows - first, rows)
        laid = np.full((len(seen), windows[-1].start + T, *net.shape[1:]), np.nan)
        laid[:, max(0, -first) : rows - first] = seen[:, max(0, first) :]
        parts = self._filled(laid, draws, windows, labels, first_draw, options)
        found = summary(parts, levels, axis=2)[:, :, rows - first : rows - first + horizon]
        if frame is not None:
            return _answers([frame.later(_columns(one)) for one in found[:, 0]], levels)
        return found[:, 0] if whole else found

    def anomaly(self, X: Any, *, block: int | None = None, draws: int = 32, **options: Any) -> Any:
        """Return how strange each value is, given all that is not in its block.

        The values of a block of rows are drawn given the others; with mean m and deviation s of the draws a value x has
        (x - m)^2 / (2 s^2), in nats: half on average where the model is right. A recording is looked at in windows that
        overlap, of which the middle counts.

        Parameters
        ----------
        X : (N, ...) array, a recording (time,) or (time, channels), or a frame
            NaN where nothing is known: there the result is NaN.
        block : int, optional
            Rows of a block; by default an eighth of a window.
        draws : int, optional
        **options
            As for `impute`.

        Returns
        -------
        array like X, float64, or a frame
        """
        net, _, _ = self._fitted()
        T = net.shape[0]
        block = max(1, T // 8) if block is None else check_int("block", block, low=1, high=T)
        draws = check_int("draws", draws, low=2)
        X, frame, whole = self._asked("X", X)
        values = check_array("X", X, finite=False, dtype=np.float64)
        windows = steps_of(len(values), T) if whole and len(values) >= T else []
        if whole and not windows:
            raise ArgumentError("X", f"{len(values)} rows", f"at least {T}, as a window has")
        rows = np.stack([values[step.start : step.start + T] for step in windows]) if whole else values
        found = np.full(rows.shape, np.nan)
        least = (
            LEAST_DEVIATION * np.broadcast_to(self.normaliser.std, net.shape) if self.normaliser is not None else 0.0
        )
        for part in blocks_of(T, block):
            holed = rows.copy()
            holed[:, part] = np.nan
            drawn = self.impute(holed, draws, **options)[:, :, part]
            m, s = drawn.mean(axis=0), np.maximum(drawn.std(axis=0, ddof=1), np.asarray(least)[part])
            found[:, part] = ((rows[:, part] - m) / s) ** 2 / 2
        if not whole:
            return found if frame is None else frame.filled(found)
        out, done = np.full(values.shape, np.nan), 0
        for step, one in zip(windows, found, strict=True):
            out[done : step.finished] = one[done - step.start : step.finished - step.start]
            done = step.finished
        return out if frame is None else frame.filled(_columns(out))

    def _asked(self, argument: str, X: Any) -> tuple[Any, series.Frame | None, bool]:
        """Return what a question is about as an array, the frame that it was, and whether it is one recording."""
        net, _, _ = self._fitted()
        if isinstance(X, series.Windows):
            return X.values, None, False
        if not series.is_frame(X):
            return X, None, np.ndim(X) == len(net.shape) < 3
        frame = series.Frame.of(X, argument)
        columns = frame.values.shape[1]
        if len(net.shape) == 1:
            if columns not in (1, net.shape[0]):
                raise ArgumentError(
                    argument, f"{columns} columns", f"curves of {net.shape[0]} columns, or one of values"
                )
            return (frame.values, frame, False) if columns > 1 else (frame.values[:, 0], frame, True)
        if columns != net.shape[-1] or (self.channel_names is not None and frame.names != self.channel_names):
            wants = f"the {net.shape[-1]} of the model" + (f": {self.channel_names}" if self.channel_names else "")
            raise ArgumentError(argument, f"the columns {frame.names}", wants)
        return frame.values, frame, True

    def _filled(
        self,
        seen: npt.NDArray[np.float64],
        draws: int,
        windows: list[Step],
        labels: Any,
        first_draw: int,
        options: dict[str, Any],
    ) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Yield what has been drawn of recordings: see `fastdiff.recordings.filled`."""
        net, _, _ = self._fitted()
        first_draw = check_int("first_draw", first_draw, low=0, high=DRAWS - draws)

        def drawn(known: Observations, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
            chosen = labels if labels is None or np.ndim(labels) == 0 else np.asarray(labels)[rows]
            got: npt.NDArray[Any] = get_backend(self.backend).to_numpy(
                self.sample(1, labels=chosen, given=known, **options)
            )
            return got[0]

        return filled(seen, net.shape, draws, drawn, windows, first_draw)

    def _observations(self, given: Given) -> Observations:
        """What is known of samples, in the units of the data."""
        return observations(given, self._fitted()[0].shape)

    def score_samples(self, X: Any, y: Any = None, **options: Any) -> npt.NDArray[np.float64]:
        """Return the log density of every row, in nats of the data's units: the values of `log_density`."""
        return self.log_density(X, y, **options).values

    def score(self, X: Any, y: Any = None, **options: Any) -> float:
        """Return the mean of `score_samples`."""
        return float(self.score_samples(X, y, **options).mean())

    def log_density(
        self,
        X: Any,
        y: Any = None,
        *,
        covariates: Any = None,
        method: str | None = None,
        ema: bool = True,
        **options: Any,
    ) -> LogDensity:
        """Return the log density of rows of data, in nats of their units.

        Parameters
        ----------
        X : (N, points), (N, points, channels) or (N, height, width, channels) array
        y : (N,) int array, optional
            Their labels, for a network that has classes: the density is that given the class.
        covariates : (N, k) array, optional
            Their covariates, for a network that has them: the density is that given these too.
        method : {"table", "denoising"}, optional
            See `fastdiff.likelihood.log_density`. By default "table" for rows of up to 256 values, whose determinants
            are exact, else "denoising", which needs none; the choice is logged.
        ema : bool, optional
            Use the averaged weights.
        **options
            `sampler`, `trace`, `probes`, `progress`, and `seed`, by default the model's, of that function.

        Returns
        -------
        LogDensity
            Of the normaliser and the noise shape the determinants are in it. A column that was constant in training has
            no scale of its own and counts as it is inside the network. Bytes are taken for the numbers that they are:
            theirs is a density too, of which `bound` with decoder "bytes" makes a probability.

        Raises
        ------
        ArgumentError
            Shape, dtype or value of an argument.
        TrainingError
            The model has not been trained.
        """
        inside, asked, log_det = self._inside(X, y, covariates)
        if method is None:
            width = inside[0].size
            method = "table" if width <= likelihood.EXACT_VALUES else "denoising"
            log.info("log density of rows of %d values: method %r", width, method)
        options = {"seed": self.seed, **options}
        backend = get_backend(self.backend)
        denoiser = self._sampled(ema)
        found = likelihood.log_density(denoiser, inside, method=method, backend=backend, **asked, **options)
        return replace(found, values=found.values + log_det)

    def bound(self, X: Any, y: Any = None, *, covariates: Any = None, ema: bool = True, **options: Any) -> Bound:
        """Return the variational bound on -log p of rows of data, in nats of their units.

        As `log_density`, with the options of `fastdiff.likelihood.bound`. With decoder "bytes" it bounds the
        probability of bytes, which has no units.
        """
        inside, asked, log_det = self._inside(X, y, covariates)
        options = {"seed": self.seed, **asked, **options}
        found = likelihood.bound(self._sampled(ema), inside, backend=get_backend(self.backend), **options)
        if options.get("decoder") == "bytes":
            return found
        terms = found.terms.copy()
        terms[0] -= log_det
        return replace(found, terms=terms, per_row=found.per_row - log_det)

    def _inside(self, X: Any, y: Any, covariates: Any) -> tuple[npt.NDArray[Any], dict[str, Any], float]:
        """Rows in the network's range, what they are, and the log of the determinant of the map that brought them."""
        net, _, normaliser = self._fitted()
        X, y, _ = split.checked(X, y, self.net, self.noise_shape, get_backend(self.backend))
        normaliser.check("X", X)
        asked = {"labels": y, "covariates": self._inner_covariates(covariates, len(X))}
        return normaliser.apply(X, net.dtype), asked, normaliser.log_det(X.shape[1:])

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
        CheckpointError
            `load` would refuse the file, as where weights are not finite; one that is there stays.
        DataError
            The path cannot be written.
        TrainingError
            The model has not been trained.
        """
        check_flags(training=training)
        with self._turns.looking():  # a fit in another thread goes on when the file is there
            net, schedule, normaliser = self._fitted()
            assert self._average is not None
            Saved(
                net=net, schedule=schedule, prediction=self.prediction, seed=self.seed, normaliser=normaliser,
                base=self._gaussian, average=self._average, optimizer=self._optimizer if training else None,
                history=self.history, step=self.step, ema_updates=self.ema_updates, held_out=self._held_out,
                data=self._data, report=self.report_, class_names=self.class_names, channel_names=self.channel_names,
                covariates=self._covariates, covariate_names=self.covariate_names, label_drop=self._label_drop or 0.0,
                arithmetic=self._arithmetic,
            ).write(path)  # fmt: skip

    def history_table(self) -> dict[str, npt.NDArray[Any]]:
        """Return the history as columns of one length, which ``pandas.DataFrame(...)`` and others take.

        Returns
        -------
        dict of str to array
            "step" (int64), "loss" and "validation_loss" (float64), NaN where there is none: a row for every step, and
            one for what was evaluated after the last.
        """
        step = np.union1d(*(np.array(self.history[name], np.int64) for name in ("step", "validation_step")))
        table: dict[str, npt.NDArray[Any]] = {"step": step}
        for at, name in (("step", "loss"), ("validation_step", "validation_loss")):
            table[name] = np.full(len(step), np.nan)
            table[name][np.searchsorted(step, np.array(self.history[at], np.int64))] = self.history[name]
        return table

    def __repr__(self) -> str:
        return f"<Diffusion {self.net!r}, {self.schedule!r}, predicts {self.prediction!r}, step {self.step}>"


def _some(asked: tuple[Any, Any], n: int) -> tuple[Any, ...]:
    """Labels and covariates of n samples, from those of rows: in the same shares."""
    return tuple(None if part is None else part[np.arange(n) * len(part) // n] for part in asked)


def _columns(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A recording as columns."""
    return values if values.ndim == 2 else values[:, None]


def _answers(frames: list[Any], levels: list[float] | None) -> Any:
    """Frames of draws as a list, of quantiles under their levels."""
    return frames if levels is None else dict(zip(levels, frames, strict=True))


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
    path = check_path("path", path)
    with naming_faults(path):
        saved = Saved.read(path)
        model = Diffusion(
            saved.net, saved.schedule, prediction=saved.prediction, backend=backend, seed=saved.seed,
            noise_shape=saved.normaliser.noise_shape,
        )  # fmt: skip
    model.normaliser, model._gaussian = saved.normaliser, saved.base
    model.scale, model.base = saved.normaliser.scale, None if saved.base is None else "gaussian"
    model._average, model._optimizer, model.history = saved.average, saved.optimizer, saved.history
    model.step, model.ema_updates, model._arithmetic = saved.step, saved.ema_updates, saved.arithmetic
    model._held_out, model._data, model.report_ = saved.held_out, saved.data, saved.report
    model.class_names, model.channel_names = saved.class_names, saved.channel_names
    model._covariates, model._label_drop = saved.covariates, saved.label_drop
    model.covariate_names = saved.covariate_names
    return model
