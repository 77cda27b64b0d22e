"""`Diffusion`: a network, a schedule and a normaliser that are trained, sampled from, saved and loaded together."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from fastdiff import checkpoint, noise, process, samplers
from fastdiff.backends import Backend, TrainingDraws, TrainState, backend_for, get_backend
from fastdiff.backends.layers import Batch
from fastdiff.errors import (
    ArgumentError,
    CheckpointError,
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
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import Draw, Stream
from fastdiff.noise_shape import NoiseShape
from fastdiff.samplers import PREDICTIONS, Sampler
from fastdiff.schedule import Schedule
from fastdiff.training import Trainer

log = logging.getLogger("fastdiff")

PICTURE_T = 200
BLOCK_VALUES = 1 << 13  # that are normalised at once: fresh memory for more would cost more than the arithmetic


class Normaliser(NamedTuple):
    """Maps data to the network's range, (x - mean) / std, and back: one mean and one deviation for all values.

    With a noise shape x is first L^-1 x, where the noise is white. Pictures have a `data_range`, which becomes [-1, 1],
    and may be `whole`: bytes, as which they come back.
    """

    mean: float
    std: float
    noise_shape: NoiseShape | None = None
    data_range: tuple[float, float] | None = None
    whole: bool = False

    @classmethod
    def of(cls, X: npt.NDArray[Any], noise_shape: NoiseShape | None = None) -> Normaliser:
        """Return the normaliser of a data set; a deviation under 1e-6 max|x| counts as 1."""
        X = cls(0.0, 1.0, noise_shape)._white(X)
        scale = float(np.max(np.abs(X)))
        if scale == 0:
            return cls(0.0, 1.0, noise_shape)
        scaled = X / scale  # squares of huge values would overflow
        mean, std = float(np.mean(scaled, dtype=np.float64)), float(np.std(scaled, dtype=np.float64))
        return cls(mean * scale, std * scale if std >= 1e-6 else 1.0, noise_shape)

    @classmethod
    def of_pictures(cls, X: npt.NDArray[Any], data_range: Any = None) -> Normaliser:
        """Return the normaliser of pictures: by default of the range 0 .. 255 for bytes, else of their own."""
        whole, wants = X.dtype == np.uint8, "a pair of numbers (low, high), low below high"
        if data_range is None:
            low, high = (0.0, 255.0) if whole else (float(X.min()), float(X.max()))
            if low == high:
                raise ArgumentError("X", f"the value {low:g} only", "pictures of several values, or a data_range")
            if not whole:
                log.info("data_range: (%g, %g), as the pictures have it", low, high)
        else:
            if not isinstance(data_range, (tuple, list)) or len(data_range) != 2:
                raise ArgumentError("data_range", repr(data_range), wants)
            low, high = (check_float("data_range", end) for end in data_range)
            if not low < high:
                raise ArgumentError("data_range", repr(data_range), wants)
        return cls((low + high) / 2, (high - low) / 2, None, (low, high), whole)

    def check(self, argument: str, X: npt.NDArray[Any]) -> None:
        """Refuse pictures of another range: one outside, or not of bytes."""
        if self.data_range is None:
            return
        if self.whole and X.dtype != np.uint8:
            raise ArgumentError(argument, f"dtype {X.dtype}", "bytes (uint8), as in the first fit")
        low, high = float(X.min()), float(X.max())
        if low < self.data_range[0] or high > self.data_range[1]:
            wants = "values within data_range, ({:g}, {:g}) since the first fit".format(*self.data_range)
            raise ArgumentError(argument, f"values from {low:g} to {high:g}", wants)

    def apply(self, X: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the data in the network's range."""
        white = self._white(X)
        out = np.empty(white.shape, dtype)
        for start in range(0, len(out), rows := max(1, BLOCK_VALUES // max(1, white[:1].size))):
            part = slice(start, start + rows)
            out[part] = (np.asarray(white[part], np.float64) - self.mean) / self.std
        return out

    def restore(self, x: Any, be: Backend) -> Any:
        """Return samples as the data were: `invert`, and bytes where those were bytes."""
        x = self.invert(x, be)
        if self.data_range is None or not self.whole:
            return x
        return x.round().clip(*self.data_range).astype(np.uint8)

    def invert(self, x: Any, be: Backend) -> Any:
        """Return network values (n, ...) in the data's range, in place where the array is its own."""
        x *= x.dtype.type(self.std)
        x += x.dtype.type(self.mean)
        if self.noise_shape is None:
            return x
        rows = be.asarray(x.reshape(-1, self.noise_shape.d))
        out = be.empty(rows.shape, rows.dtype)
        self.noise_shape.apply(be, rows, out)
        return process.returned(be, out.reshape(x.shape), is_on_device(x))

    def log_det(self, points: int) -> float:
        """Return log |det| of `apply` for curves of so many points: log density of data less that of its image."""
        return -points * math.log(self.std) - (0.0 if self.noise_shape is None else self.noise_shape.log_det)

    def _white(self, X: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.noise_shape is None:
            return X
        return np.asarray(self.noise_shape.whiten(np.asarray(X, np.float64), backend="numpy"))


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
        pictures.
    schedule : Schedule, optional
        The noise levels; by default ``Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)`` for curves and
        ``Schedule.cosine(200)`` for pictures, or what fits net.T.
    prediction : {"noise", "x0", "v"}, optional
        What the network learns to predict.
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
    class_names : list of str or None
        What the classes are called; for the reader only, and saved with the model.

    Examples
    --------
    >>> X = fastdiff.data.harmonic_curves(1000)
    >>> new = fastdiff.Diffusion().fit(X).sample(16)  # doctest: +SKIP
    >>> images = fastdiff.data.load_images("pictures", size=32)  # doctest: +SKIP
    >>> new = fastdiff.Diffusion().fit(images, flip=True).sample(16)  # doctest: +SKIP
    """

    def __init__(
        self,
        net: Network | None = None,
        schedule: Schedule | None = None,
        *,
        prediction: str = "noise",
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
            schedule = default_schedule(net.T)
        if net is not None and schedule is not None and net.T != schedule.T:
            raise ArgumentError("schedule", f"T = {schedule.T}", f"T = {net.T}, as the network has")
        if noise_shape is not None and not isinstance(noise_shape, NoiseShape):
            raise ArgumentError("noise_shape", type(noise_shape).__name__, "a fastdiff.NoiseShape, or None: white")
        if net is not None and noise_shape is not None and net.shape != (noise_shape.d,):
            wants = f"one of {net.shape[0]} values, as the network has" if len(net.shape) == 1 else "None for pictures"
            raise ArgumentError("noise_shape", repr(noise_shape), wants)
        if net is not None and net.outputs != net.image[2]:
            raise ArgumentError("net", f"{net.outputs} outputs", f"{net.image[2]}, as many as there are channels")
        if net is not None and net.prediction not in (None, prediction):
            raise ArgumentError("prediction", repr(prediction), f"{net.prediction!r}, as the network was trained")
        get_backend(backend)  # an unusable one is reported here
        self.net, self.schedule, self.backend, self.noise_shape = net, schedule, backend, noise_shape
        self.prediction = check_choice("prediction", prediction, PREDICTIONS)
        self.seed = check_seed(seed)
        self._own_net = net is None
        self._forget()

    def _forget(self) -> None:
        self.normaliser: Normaliser | None = None
        self.step = self.ema_updates = 0
        self.history = _empty_history()
        self._optimizer: _Optimizer | None = None
        self._average: npt.NDArray[Any] | None = None
        self._frozen: tuple[tuple[int, Backend], NetworkDenoiser] | None = None  # averaged weights, and when
        self.class_names: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_frozen": None}

    def reset(self) -> Self:
        """Forget all training: weights are drawn again, normaliser, learning-rate plan and history are dropped."""
        self._forget()
        if self._own_net:
            self.net = None
        elif self.net is not None:
            self.net.redraw()
        return self

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        steps: int = 3000,
        batch: int | None = None,
        lr: float = 1e-3,
        warmup: int = 0,
        decay_steps: int | None = None,
        clip_norm: float | None = 1.0,
        ema: float | None = 0.999,
        validation: Any = None,
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
            How many more steps to take.
        batch : int, optional
            Rows drawn at a step, with replacement; by default 256 curves, or 64 for a U-Net.
        lr, warmup, decay_steps, clip_norm, ema
            See `TrainingPlan`; those of the first call stay until `reset`. Warm-up and decay are absolute steps.
        validation : float or array, optional
            A fraction of the rows to hold out (the same rows at each call with the same X), or other rows, with labels
            a pair (rows, labels). Their loss under the averaged weights, with fixed noise and timesteps, goes to
            `history` every 100 steps.
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
        steps = check_int("steps", steps, low=0)
        plan = TrainingPlan(lr, warmup, decay_steps, clip_norm, ema)
        if self._optimizer is not None and plan not in (self._optimizer.plan, TrainingPlan()):
            raise ArgumentError(
                "lr, warmup, decay_steps, clip_norm, ema",
                str(plan),
                f"those of the first fit, {self._optimizer.plan}; reset() starts anew",
            )
        if self.normaliser is not None and self._optimizer is None:
            raise TrainingError("this model was saved with training=False: it can sample, but not go on training")
        X, y, classes = self._checked(be, X, y)
        rows, labels, held_out = self._split(X, y, validation, classes)
        kind = (MLP if X.ndim == 2 else UNet) if self.net is None else type(self.net)
        batch = kind.usual_batch if batch is None else check_int("batch", batch, low=1, high=1 << 30)
        accumulate = check_int("accumulate", accumulate, low=1, high=batch if kind.in_parts else 1)
        if flip and X.ndim == 2:
            raise ArgumentError("flip", repr(flip), "False for curves")

        self._prepare(rows, None if held_out is None else held_out[0], classes, plan, data_range)
        assert self.net is not None and self.schedule is not None and self.normaliser is not None  # noqa: PT018
        assert self._optimizer is not None
        assert self._average is not None
        net, optimizer = self.net, self._optimizer
        data = be.asarray(self.normaliser.apply(rows, net.dtype), net.dtype)
        tables = self.schedule.signal, self.schedule.noise, *self._target_tables()
        draws = TrainingDraws(data, *tables, self.seed, labels, bool(flip))
        validate = None if held_out is None else partial(self._validate, be, self._validation_set(be, *held_out))
        host = TrainState(net.flat, net.layout.zeros(net.dtype), optimizer.m, optimizer.v, self._average)
        trainer = Trainer(be, net, draws, host, batch, accumulate)
        trainer.run(self, steps, optimizer.plan.options, validate=validate, progress=progress, callback=callback)
        return self

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
                raise ArgumentError("X", f"shape {given.shape}", f"curves (N, points){pictures}")
        given = check_array("X", given, shape=(None, *shape))
        if given.size == 0:
            what = "curve of at least one point" if len(shape) == 1 else "picture"
            raise ArgumentError("X", f"shape {given.shape}", f"at least one {what}")
        classes = getattr(self.net, "classes", None)
        if self.net is None and len(shape) == 3 and y is not None:
            y = check_indices("y", _on_host(be, y), 1 << 20, len(given))
            classes = int(y.max()) + 1
        return given, _labels("y", y, classes, len(given), be), classes

    def _split(
        self, X: npt.NDArray[Any], y: npt.NDArray[Any] | None, validation: Any, classes: int | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, tuple[npt.NDArray[Any], npt.NDArray[Any] | None] | None]:
        """Training rows and their labels, and those that are held out."""
        if validation is None:
            return X, y, None
        if classes is not None and isinstance(validation, (tuple, list)):
            if len(validation) != 2:
                raise ArgumentError("validation", f"{len(validation)} values", "a fraction, or a pair (rows, labels)")
            rows, labels = validation
        elif np.ndim(validation) > 0:
            rows, labels = validation, None
        else:
            fraction = check_float("validation", validation, low=0, high=1, low_open=True, high_open=True)
            count = round(fraction * len(X))
            if not 1 <= count < len(X):
                raise ArgumentError(
                    "validation",
                    f"{validation}",
                    f"a fraction that holds out 1 to {len(X) - 1} of the {len(X)} rows",
                )
            # Rows in the order of a word of their own: a choice that only seed and row number decide.
            words = noise.philox_words(len(X), 1, Draw(self.seed, Stream.DATA, 1))[:, 0, 0]
            order = np.argsort(words, kind="stable")
            held, kept = np.sort(order[:count]), np.sort(order[count:])
            return X[kept], None if y is None else y[kept], (X[held], None if y is None else y[held])
        rows = check_array("validation", rows, shape=(None, *X.shape[1:]))
        if len(rows) == 0:
            raise ArgumentError("validation", f"no {'curves' if X.ndim == 2 else 'pictures'}", "at least one")
        return X, y, (rows, _labels("the labels of validation", labels, classes, len(rows), get_backend(self.backend)))

    def _prepare(
        self,
        X: npt.NDArray[Any],
        held_out: npt.NDArray[Any] | None,
        classes: int | None,
        plan: TrainingPlan,
        data_range: Any,
    ) -> None:
        """What the first fit decides: network, schedule, normaliser, plan and buffers. Later ones are held to it."""
        if X.ndim == 2 and data_range is not None:
            raise ArgumentError(
                "data_range", repr(data_range), "None for curves: they have mean 0 and deviation 1 inside"
            )
        normaliser = self.normaliser
        if normaliser is None or data_range is not None:
            normaliser = Normaliser.of(X, self.noise_shape) if X.ndim == 2 else Normaliser.of_pictures(X, data_range)
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
            schedule = default_schedule() if X.ndim == 2 else default_schedule(PICTURE_T)
            if X.ndim > 2:
                log.info("chosen for the pictures: %r", schedule)
        if net is None:
            at: dict[str, Any] = {"T": schedule.T, "seed": self.seed}
            net = MLP(X.shape[1], **at) if X.ndim == 2 else picture_net(X.shape[1:], classes=classes, **at)
        if net.dtype == np.float64 and get_backend(self.backend).name != "numpy":
            raise ArgumentError("backend", repr(self.backend), "'numpy': this network has float64 parameters")
        self.schedule, self.net = schedule, net
        zeros = net.layout.zeros
        self._optimizer = _Optimizer(plan, zeros(net.dtype), zeros(net.dtype))
        self._average = net.flat.copy()
        self.normaliser = normaliser

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

    def sample(
        self,
        n: int = 16,
        *,
        labels: Any = None,
        sampler: str | Sampler = "ddpm",
        steps: int | None = None,
        seed: int | None = None,
        first_sample: int = 0,
        ema: bool = True,
        trajectory: bool = False,
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
        sampler : {"ddpm", "ddim", "dpmpp_2m"} or Sampler, optional
            A name, with its defaults, or a table of `fastdiff.samplers` for this model's schedule and prediction. A
            named one clips the x0 of pictures to their range; a table does what it says, and must not clip where the
            model has a noise shape.
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
            clip = None if normaliser.data_range is None else 1.0
            sampler = samplers.named(sampler, schedule, steps, prediction=self.prediction, clip=clip)
        elif steps is not None:
            raise ArgumentError("steps", str(steps), "None with a table: it has its own steps")
        elif sampler.schedule != schedule:
            raise ArgumentError("sampler", repr(sampler), f"a table for {schedule!r}")
        if normaliser.noise_shape is not None:
            process.refuse_clip(sampler)
        be = get_backend(self.backend)
        result = process.sample(
            self._sampled(ema), sampler, n=n, seed=self.seed if seed is None else seed, first_sample=first_sample,
            batch=batch, backend=self.backend, labels=labels, trajectory=trajectory, progress=progress,
        )  # fmt: skip
        if trajectory:
            return normaliser.restore(result[0], be), normaliser.invert(result[1], be)
        return normaliser.restore(result, be)

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
        header = {
            "network": net.to_dict(), "schedule": schedule.to_dict(), "prediction": self.prediction,
            "normaliser": {
                "mean": normaliser.mean, "std": normaliser.std, "data_range": normaliser.data_range,
                "bytes": normaliser.whole,
            },
            "noise_shape": "white" if noise_shape is None else noise_shape.kind, "seed": self.seed,
            "step": self.step, "ema_updates": self.ema_updates, "training": plan, "class_names": self.class_names,
        }  # fmt: skip
        checkpoint.write(path, header, tensors)

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
        Equal to the saved one to the bit.

    Raises
    ------
    CheckpointError
        The file is missing, truncated, foreign, of a newer format, or inconsistent.
    """
    header, tensors = checkpoint.read(path)
    try:
        return _restore(header, tensors, backend)
    except (ArgumentError, KeyError, TypeError) as error:
        reason = f"the header lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {reason}") from error


def _restore(header: dict[str, Any], tensors: dict[str, npt.NDArray[Any]], backend: str | Backend) -> Diffusion:
    schedule = Schedule.from_dict(header["schedule"])
    net = network_of(header["network"], draw=False)

    def stored(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if name not in tensors:
            raise ArgumentError(name, "no such tensor", f"shape {shape}, by the configuration")
        return check_array(name, tensors[name], shape=shape)

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
    model.normaliser = _restore_normaliser(header["normaliser"], noise_shape, pictures=len(net.shape) == 3)
    names = header.get("class_names")
    if names is not None:
        count = getattr(net, "classes", None)
        if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
            raise ArgumentError("class_names", repr(names), f"a list of {count or 0} names, or null")
    model.class_names = names
    model.step = check_int("step", header["step"], low=0)
    model.ema_updates = check_int("ema_updates", header["ema_updates"], low=0)

    def buffer(prefix: str) -> npt.NDArray[Any]:
        flat = net.layout.zeros(net.dtype)
        views = net.layout.views(flat)
        for name, shape in net.layout.shapes.items():
            tensor = stored(f"{prefix}.{name}", shape)
            if tensor.dtype != net.dtype:
                raise ArgumentError(f"{prefix}.{name}", f"dtype {tensor.dtype}", f"{net.dtype}")
            views[name][...] = tensor
        return flat

    net.flat = buffer("net")
    model._average = buffer("ema")
    if header["training"] is not None:
        model._optimizer = _Optimizer(TrainingPlan.from_dict(header["training"]), buffer("adam.m"), buffer("adam.v"))
    for name in model.history:
        model.history[name] = check_array(
            f"history.{name}", tensors[f"history.{name}"], shape=(None,), finite=False
        ).tolist()
    return model


def _restore_normaliser(config: Any, noise_shape: NoiseShape | None, *, pictures: bool) -> Normaliser:
    mean = check_float("normaliser.mean", config["mean"])
    std = check_float("normaliser.std", config["std"], low=0, low_open=True)
    data_range = config.get("data_range")  # neither in files of format 1
    if (data_range is not None) != pictures:
        raise ArgumentError("normaliser.data_range", repr(data_range), "a range for pictures, null for curves")
    if data_range is None:
        return Normaliser(mean, std, noise_shape)
    low, high = check_array("normaliser.data_range", data_range, shape=(2,)).tolist()
    return Normaliser(mean, std, noise_shape, (low, high), config["bytes"] is True)


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


def picture_net(
    shape: tuple[int, ...],
    *,
    T: int = PICTURE_T,
    classes: int | None = None,
    seed: int = 0,
    channels: Iterable[int] | None = None,
    dropout: float = 0.0,
) -> UNet:
    """Return a U-Net that suits small pictures, and log what was chosen: see `UNet`.

    By default the pictures are halved as long as 4 pixels are left on a side, at most three times.
    """
    side = max(shape[:2]) if 1 in shape[:2] else min(shape[:2])
    if channels is None:
        channels = (32, 64, 128, 128)[: min(4, max(1, side.bit_length() - 2))]
    net = UNet(shape, channels=channels, blocks=1, T=T, classes=classes, seed=seed, dropout=dropout)
    log.info("chosen for the pictures: %r, %d parameters", net, net.layout.count)
    return net


def default_schedule(T: int = 100) -> Schedule:
    """Return the schedule used where none is given: the source text's for T = 100, else cosine."""
    return Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1) if T == 100 else Schedule.cosine(T)
