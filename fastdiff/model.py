"""`Diffusion`: a network, a schedule and a normaliser that are trained, sampled from, saved and loaded together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff import (
    answers,
    checkpoint,
    defaults,
    evaluation,
    fitting,
    generation,
    judgement,
    likelihood,
    series,
    split,
)
from fastdiff.backends import Backend, get_backend
from fastdiff.base import GaussianBase
from fastdiff.covariates import CovariateScale
from fastdiff.display import Summary
from fastdiff.display import summary as summary_of
from fastdiff.errors import (
    ArgumentError,
    TrainingError,
    all_finite,
    check_array,
    check_choice,
    check_flags,
    check_float,
    check_seed,
    shown,
)
from fastdiff.files import check_path
from fastdiff.likelihood import Bound, LogDensity
from fastdiff.model_file import WIDEST, Saved, naming_faults
from fastdiff.nn import Network, NetworkDenoiser
from fastdiff.nn.optim import UNSET, Unset
from fastdiff.noise_shape import NoiseShape
from fastdiff.normaliser import SCALES, Normaliser
from fastdiff.observations import Given
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule
from fastdiff.training import Optimizer, Turns, alone, empty_history, history_table, loss_terms

log = logging.getLogger("fastdiff")


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
    conditional : {"mask", "random", "block", "tail", None}, optional
        The network is told which values of a row are known, and what they are, and learns to draw the others (see
        `fastdiff.masks`): single values, pieces, the end, or with "mask" any of these. `sample` with what is known,
        `impute` and `forecast` are then one run of the sampler, without derivatives.
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
        `fastdiff.judgement.Report`, and `fastdiff.calibration.Spread`.
    spread : float
        How many times as far from their mean draws given something are as the network says, with "tmpd" and a named
        sampler, be it of `sample`, `impute`, `forecast` or `anomaly`: learned from held-out rows by a fit that ends
        with a judgement; see `fastdiff.calibration`. 1 changes no bit.
    kept_rows : array or None
        Training rows that `fit` was asked to keep, in the data's units.
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
        conditional: str | None = None,
        backend: str | Backend = "auto",
        seed: int = 0,
        noise_shape: NoiseShape | None = None,
    ) -> None:
        get_backend(backend)  # an unusable one is reported here
        self.scale = check_choice("scale", scale, SCALES)
        self.base = None if base is None else check_choice("base", base, ["auto", "gaussian"])
        self.net, self.backend, self.noise_shape = net, backend, noise_shape
        self.schedule, self.prediction, self.conditional = defaults.checked_parts(
            net, schedule, prediction, conditional, noise_shape
        )
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
        self._tables: dict[tuple[Any, ...], Sampler] = {}  # named ones: to make one takes longer than to draw a curve
        self.class_names: list[str] | None = None
        self.covariate_names: list[str] | None = None
        self._covariates: CovariateScale | None = None
        self._label_drop: float | None = None  # the share of the last fit; the first one decides
        self.channel_names: list[str] | None = None
        self._frame: series.Frame | None = None  # how frames are made that are like those of the data
        self.report_: dict[str, Any] | None = None
        self._spread = 1.0
        self._held_out: tuple[str, float] | None = None  # how rows are held out; the first fit decides
        self._data: list[int] | None = None  # fingerprint of the first fit's rows
        self._gaussian: GaussianBase | None = None
        self.kept_rows: npt.NDArray[Any] | None = None
        self._arithmetic = checkpoint.ARITHMETIC  # of the weights; only a file may have another one

    def __getstate__(self) -> dict[str, Any]:
        with self._turns.looking():
            return {**vars(self), "_frozen": None, "_tables": {}, "_turns": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turns=Turns())

    def reset(self) -> Self:
        """Forget all training: weights are drawn again, normaliser, learning-rate plan and history are dropped.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> model.reset().step
        0
        """
        self._forget()
        if self._own_net:
            self.net = None
        elif self.net is not None:
            if self.net.has_linear:
                self.net.set_linear(None)
            self.net.redraw()
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
        calibrate: bool | None = None,
        flip: bool = False,
        crop: int | tuple[int, int] | None = None,
        jitter: bool | None = None,
        accumulate: int | None = None,
        data_range: tuple[float, float] | None = None,
        progress: bool = True,
        callback: Callable[[int, float], Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int | None = None,
        keep: int = 1,
        keep_rows: int | None = None,
        callbacks: Any = (),
        comm: Any = None,
    ) -> Self:
        """Train for further steps, on from `step`.

        The loss is the mean squared error of the prediction at uniformly drawn timesteps (Ho et al. 2020, eq. 14).

        Parameters
        ----------
        X : (N, points), (N, points, channels) or (N, height, width, channels) array, a frame, or windows of one
            Curves, series, or pictures. An array on disk, of zarr, of Dask or memory-mapped, or the path of an ``.npy``
            file, is read whole where it has up to 2^24 values; of others the rows that steps draw are read, and the
            model is that of the same array in memory, to the bit. Values of curves and series may be missing (NaN),
            but for those on disk that are not read whole: then the loss is that of the others, and the network is given
            draws in their place: see `fastdiff.gaps`. Of a frame (pandas, polars, xarray) each row is a curve;
            `fastdiff.data.windows` makes series of a recording.
        y : (N,) int array, optional
            Class labels, 0 .. classes - 1, for a network that has them. A network that is made here has as many as y
            needs.
        covariates : (N, k) or (N,), (N, points, k) or (N, height, width, k) array, optional
            Numbers that belong to every row, a temperature or a price, or k of them to every point of it or every
            pixel: known inputs, such as the hour. Samples can be asked for them. A network that is made here takes as
            many; inside each has mean 0 and deviation 1.
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
            calls without `steps` and without jitter keep weights by. That loss is looked at every 100 steps.
        judge : bool, optional
            Whether to end with a judgement: samples are drawn and compared with held-out rows (see
            `fastdiff.judgement`), the numbers go to `report_`, and a `QualityWarning` says what is off. By default
            after 1,000 steps or more, and where `steps` is not given.
        calibrate : bool, optional
            Whether a judgement also learns `spread` from held-out rows: by default of curves and series. Pictures have
            none.
        flip : bool, optional
            Mirror half of the pictures of a batch, left to right, by stream AUGMENT of the noise law.
        crop : int or pair of int, optional
            Height and width of what is learned: at each step another part of every picture, by stream AUGMENT of the
            noise law. Held-out rows, and those that a judgement compares with, are cut once.
        jitter : bool, optional
            Learn from copies of the curves or series that are moved towards draws of the Gaussian base, as far as rows
            that are left out allow (see `fastdiff.jitter`), and which cannot be learned by heart. By default in calls
            without `steps` on up to 4,096 rows without missing values, asked for nothing.
        accumulate : int, optional
            Take a U-Net's batch in so many parts, whose gradients are added: less memory, and the same step up to
            the rounding of those sums. By default 1, with `comm` 8; there a perceptron's on "cuda" too.
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
        keep_rows : int, optional
            Keep so many of the training rows, evenly spaced, in `kept_rows` and in files, for figures that show samples
            beside real data; 0 forgets them. By default none are kept, for data may be private, or those kept before.
        callbacks : list, optional
            Loggers, which do not slow the training down: `fastdiff.callbacks.FileLogger`, a SummaryWriter of
            TensorBoard, the module mlflow, ...: see `fastdiff.callbacks`.
        comm : communicator of mpi4py, optional
            Train together: every rank makes this call with the same model, data and options, computes its share of each
            batch, and has in the end the same model, to the bit that of one process: see `fastdiff.ranks`. The first
            rank alone shows progress, calls callbacks, whose stop is for all, and saves. On "cpu" and "cuda", U-Nets
            also on "numpy".

        Returns
        -------
        Diffusion
            self.

        Raises
        ------
        ArgumentError
            Shape, dtype or value of an argument; another weighting than that of the first call; ranks that disagree.
        TrainingError
            A loss or gradient that is not finite: the model keeps the state before that step. Or another thread trains
            this model. Or another rank cannot begin; one that fails later ends all processes.
        KeyboardInterrupt
            Ctrl-C, SIGTERM and SIGHUP take effect after a whole step, so the state is sound; the third Ctrl-C at once.
            A handler of your own for one of them stays, and is none of ours.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> model.fit(X, steps=10, lr=3e-4, progress=False).step  # further steps, as if it had never stopped
        30
        >>> [len(model.history[name]) for name in ("step", "loss")]
        [30, 30]
        """
        plan = {
            "lr": lr, "warmup": warmup, "decay_steps": decay_steps, "clip_norm": clip_norm, "ema": ema,
            "weighting": weighting, "snr_gamma": snr_gamma, "lr_plan": lr_plan,
        }  # fmt: skip
        request = fitting.FitRequest(
            plan=plan, covariates=covariates, validation=validation, data_range=data_range, label_drop=label_drop,
            steps=steps, batch=batch, accumulate=accumulate, flip=flip, crop=crop, jitter=jitter, patience=patience,
            judge=judge, calibrate=calibrate, progress=progress, callback=callback, callbacks=callbacks,
            checkpoint=checkpoint, every=every, keep=keep, keep_rows=keep_rows, comm=comm,
        )  # fmt: skip
        fitting.fit(self, X, y, request)
        return self

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

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> found = model.evaluate(fd.data.harmonic_curves(100, points=12, seed=1))
        >>> found.drawn.shape[1] == found.real.shape[1], abs(found.report.energy_distance) < 1
        (True, True)
        """
        return evaluation.evaluate(self, (X, y, covariates), training, samples, seed)

    def _fitted(self) -> tuple[Network, Schedule, Normaliser]:
        if self.net is None or self.schedule is None or self.normaliser is None:
            raise TrainingError("this model has not been trained: call fit first")
        return self.net, self.schedule, self.normaliser

    def denoiser(self, *, ema: bool = True) -> NetworkDenoiser:
        """Return the network with a copy of its averaged (or raw) weights, in the model's inner range (white noise).

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> fd.sample(model.denoiser(), model.named_sampler("ddim", 5), n=3).shape  # in the network's range
        (3, 12)
        """
        net, schedule, _ = self._fitted()
        check_flags(ema=ema)
        with self._turns.looking():
            flat = (self._average if ema and self._average is not None else net.flat).copy()
        if not all_finite(flat):
            raise TrainingError("the weights of this model are not finite: load one that was saved before, or reset()")
        be = get_backend(self.backend)
        return NetworkDenoiser(net, be.asarray(flat, net.dtype), self.prediction, be, schedule)

    @property
    def spread(self) -> float:
        """How many times as far from their mean answers are drawn as the network says; may be set."""
        return self._spread

    @spread.setter
    def spread(self, value: float) -> None:
        self._spread = check_float("spread", value, low=0, low_open=True, high=WIDEST)

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
        """Return the table that `sample` runs for the name of a sampler, alone or with observations: see there.

        With observations `sample` widens it by `spread`, and a table that it is given stays as it is.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> table = model.named_sampler("unipc", 10)
        >>> same = model.sample(2, sampler=table) == model.sample(2, sampler="unipc", steps=10)
        >>> table.evaluations, bool(same.all())
        (10, True)
        """
        check_flags(given=given)
        return generation.named_sampler(self, name, steps, given=given)

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
        covariates : (k,), (n, k) or (n, ..., k) array, optional
            The numbers that each, or each point of it, is asked for, in the units of those of `fit`, for a network that
            has them.
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
            What is known of the samples, in the units of the data: n draws are made for each observation, as widely as
            `spread` says. What lies far outside of the data is drawn far from what the network has learnt.
        method : {"auto", "tmpd", "pigdm", "dps", "replace", "repaint", "smc"}, optional
            How, see `fastdiff.conditioning`; of a network that is told of a mask "auto" is the only one, and takes
            values that are known without noise. The first three do not clip; "repaint" and "smc" take "ddpm" by
            default.
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

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> new = model.sample(16)
        >>> new.shape, bool((new[8:] == model.sample(8, first_sample=8)).all())
        ((16, 12), True)
        >>> seen = np.where(np.arange(12) < 6, X[0], np.nan)
        >>> model.sample(5, given=fd.Known(seen), steps=5).shape
        (5, 12)
        """
        check_flags(round=round, ema=ema)
        options = {
            "n": n, "labels": labels, "guidance": guidance, "guidance_interval": guidance_interval, "rescale": rescale,
            "seed": self.seed if seed is None else seed, "first_sample": first_sample, "batch": batch,
            "trajectory": trajectory, "progress": progress, "method": method, "return_evidence": return_evidence,
        }  # fmt: skip
        form = generation.Form(sampler, steps, ema=ema, round=round, as_frame=as_frame)
        return generation.sample(self, form, given, covariates, options)

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
        first_row: int = 0,
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
        covariates : (k,), (N, k) or (N, points, k) array, optional
            The covariates of each row, for a network that has them; (time, k) of a recording.
        first_draw : int, optional
            Draw k of a call is draw ``first_draw + k``: 50 draws are the first 50 of 100.
        first_row : int, optional
            Row i of a call is row ``first_row + i``: X[100:] with 100 gets the draws that it gets as a part of X. Of a
            recording: 0.

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

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> gaps = X[:2].copy()
        >>> gaps[:, 4:8] = np.nan
        >>> filled = model.impute(gaps, draws=5, steps=5)
        >>> filled.shape, bool((filled[:, :, :4] == gaps[:, :4]).all())
        ((5, 2, 12), True)
        >>> low, high = model.impute(gaps, draws=5, steps=5, quantiles=(0.05, 0.95))
        """
        options = {
            "method": method, "sampler": sampler, "steps": steps, "guidance": guidance, "seed": seed, "ema": ema,
            "progress": progress,
        }  # fmt: skip
        asked = answers.Draws(draws, quantiles, first_draw, labels, covariates, options, first_row)
        return answers.impute(self, X, asked)

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
        covariates: Any = None,
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
        covariates : (k,), (N, k) or (N, rows + horizon, k) array, optional
            As for `impute`. Of every point they are known inputs of the past and of the horizon; (rows + horizon, k) of
            a recording. Beyond these a window has those of the last row.

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

        Examples
        --------
        >>> recording = np.sin(np.arange(200) / 5)[:, None]  # (time, channels)
        >>> model = fd.Diffusion().fit(fd.data.windows(recording, 24, 4), steps=20, progress=False)
        >>> model.forecast(recording, horizon=6, draws=5, steps=5).shape
        (5, 6, 1)
        """
        options = {"method": method, "sampler": sampler, "steps": steps, "seed": seed, "ema": ema, "progress": progress}
        how = answers.Draws(draws, quantiles, first_draw, labels, covariates, options)
        return answers.forecast(self, past, horizon, how)

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

        Examples
        --------
        >>> recording = np.sin(np.arange(200) / 5)[:, None]
        >>> model = fd.Diffusion().fit(fd.data.windows(recording, 24, 4), steps=20, progress=False)
        >>> strange = recording[:24].copy()
        >>> strange[12] += 9
        >>> int(model.anomaly(strange, draws=4, steps=5).argmax())
        12
        """
        return answers.anomaly(self, X, block, draws, options)

    def score_samples(self, X: Any, y: Any = None, **options: Any) -> npt.NDArray[np.float64]:
        """Return the log density of every row, in nats of the data's units: the values of `log_density`.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> values = model.score_samples(np.stack([X[0], 9 * X[0]]))
        >>> bool(values[0] > values[1])  # nine times as tall is less likely
        True
        """
        return self.log_density(X, y, **options).values

    def score(self, X: Any, y: Any = None, **options: Any) -> float:
        """Return the mean of `score_samples`.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> model.score(X[:4]) == float(model.score_samples(X[:4]).mean())
        True
        """
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

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> found = model.log_density(X[:3])
        >>> found.values.shape, float(found.stderr.max()), bool(found.residual.max() < 1e-3)
        ((3,), 0.0, True)
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

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> found = model.bound(X[:20])
        >>> found.terms.shape, found.total > -model.score(X[:20]) - 3 * found.total_stderr  # it bounds -log p
        ((201,), True)
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
        asked = {"labels": y, "covariates": generation.inner_covariates(self, covariates, len(X))}
        return normaliser.apply(X, net.dtype), asked, normaliser.log_det(X.shape[1:])

    def save(self, path: str | os.PathLike[str], *, training: bool = True, rows: bool | None = None) -> None:
        """Write a checkpoint; the file appears whole or not at all.

        Parameters
        ----------
        path : path
            Usually ``name.safetensors``.
        training : bool, optional
            Keep the optimiser's moments, so that training can go on bit for bit. Without them the file is half as
            large, and for sampling only.
        rows : bool, optional
            Whether the file has the rows of `kept_rows`; by default with `training` only, so that a file that is made
            to be passed on has no data in it.

        Raises
        ------
        CheckpointError
            `load` would refuse the file, as where weights are not finite; one that is there stays.
        DataError
            The path cannot be written.
        TrainingError
            The model has not been trained.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> model.save("m.safetensors")
        >>> bool((fd.load("m.safetensors").sample(2) == model.sample(2)).all())
        True
        """
        check_flags(training=training, rows=training if rows is None else rows)
        rows = training if rows is None else rows
        with self._turns.looking():  # a fit in another thread goes on when the file is there
            self._fitted()
            saved = Saved.of(self)
            saved = saved if training else replace(saved, optimizer=None)
            (saved if rows else replace(saved, kept_rows=None)).write(path)

    def linear_loss(self, X: Any = None) -> float:
        """Return the loss of the best linear denoiser: what a network has to come below, to be of use.

        It is that of a Gaussian with the covariance of the data, in closed form (see `fastdiff.base`), weighted over t
        as the training was.

        Parameters
        ----------
        X : (N, ...) array, optional
            Rows of the data, for a model without a Gaussian base, which knows that covariance.

        Returns
        -------
        float
            As the losses of `history`: a mean over values and timesteps, in the normalised range.

        Raises
        ------
        ArgumentError
            X is wanted and not given, or has another shape; the network learns its variance, so that its loss is none
            of squares alone.
        TrainingError
            The model has not been trained.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(256, points=8)
        >>> model = fd.Diffusion(fd.MLP(8, hidden=(8,), T=10), backend="numpy").fit(X, steps=1, progress=False)
        >>> 0 < model.linear_loss(X) < 1
        True
        """
        net, schedule, normaliser = self._fitted()
        if net.learned_variance:
            raise ArgumentError("linear_loss", "a network that learns its variance", "one whose loss is of squares")
        base = self._gaussian
        if X is not None:
            inner = normaliser.apply(check_array("X", X, shape=(None, *net.shape)), np.float64)
            flat = inner.reshape(len(inner), -1)
            base = GaussianBase.of(flat - flat.mean(axis=0))
        if base is None:
            raise ArgumentError("X", "None", "rows of the data: this model has no Gaussian base")
        terms = None
        if self._optimizer is not None:
            terms = loss_terms(schedule, self.prediction, self._optimizer.plan)
        return base.loss(schedule, self.prediction, None if terms is None else terms[:, 0])

    def digest(self, *, ema: bool = True) -> str:
        """Return the SHA-256 of all that samples depend on: weights, network, schedule, normaliser, prediction.

        It does not depend on the backend, the seed, or the file that the model was read from.

        Parameters
        ----------
        ema : bool, optional
            Of the averaged weights.

        Raises
        ------
        TrainingError
            The model has not been trained.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> model.save("m.safetensors")
        >>> fd.load("m.safetensors").digest() == model.digest(), len(model.digest())
        (True, 71)
        """
        check_flags(ema=ema)
        self._fitted()
        with self._turns.looking():
            return Saved.of(self).digest(ema=ema)

    def history_table(self) -> dict[str, npt.NDArray[Any]]:
        """Return the history as columns of one length, which ``pandas.DataFrame(...)`` and others take.

        Returns
        -------
        dict of str to array
            "step" (int64), "loss" and "validation_loss" (float64), NaN where there is none: a row for every step, and
            one for what was evaluated after the last.

        Examples
        --------
        >>> X = fd.data.harmonic_curves(200, points=12)
        >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
        >>> table = model.history_table()  # pandas.DataFrame(table)
        >>> sorted(table), len(table["loss"])
        (['loss', 'step', 'validation_loss'], 20)
        """
        return history_table(self.history)

    def __repr__(self) -> str:
        return f"<Diffusion {self.net!r}, {self.schedule!r}, predicts {self.prediction!r}, step {self.step}>"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def summary(self) -> Summary:
        """Return what the model is and how far: layers and their parameters, schedule, losses, judgement.

        Returns
        -------
        fastdiff.display.Summary
            Lines of text when printed, a table in a notebook, and `facts` as a dictionary.

        Examples
        --------
        >>> fd.Diffusion(fd.MLP.tutorial(50, T=100)).summary().facts["parameters"]
        '70,450'
        """
        return summary_of(self)


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

    Examples
    --------
    >>> X = fd.data.harmonic_curves(200, points=12)
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
    >>> model.save("m.safetensors")
    >>> again = fd.load("m.safetensors")
    >>> again.step == model.step, again.fit(X, steps=5, progress=False).step - model.step  # goes on
    (True, 5)
    """
    path = check_path("path", path)
    with naming_faults(path):
        saved = Saved.read(path)
        model = Diffusion(
            saved.net, saved.schedule, prediction=saved.prediction, backend=backend, seed=saved.seed,
            conditional=saved.conditional, noise_shape=saved.normaliser.noise_shape,
        )  # fmt: skip
    saved.give(model)
    return model
