"""`Diffusion`: a network, a schedule and a normaliser that are trained, sampled from, saved and loaded together."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from fastdiff import checkpoint, noise, process, samplers
from fastdiff.backends import Backend, TrainingDraws, backend_for, get_backend
from fastdiff.errors import (
    ArgumentError,
    CheckpointError,
    TrainingError,
    check_array,
    check_choice,
    check_float,
    check_int,
    check_seed,
    is_on_device,
)
from fastdiff.nn.mlp import MLP
from fastdiff.nn.optim import TrainingPlan
from fastdiff.noise import Stream
from fastdiff.noise_shape import NoiseShape
from fastdiff.samplers import PREDICTIONS, Sampler
from fastdiff.schedule import Schedule

VALIDATION_EVERY = 100  # steps, counted from 0


class Normaliser(NamedTuple):
    """Maps data to the network's range, (x - mean) / std, and back: one mean and one deviation for all values.

    With a noise shape x is first L^-1 x, where the noise is white.
    """

    mean: float
    std: float
    noise_shape: NoiseShape | None = None

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

    def apply(self, X: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the data in the network's range."""
        return np.ascontiguousarray((np.asarray(self._white(X), np.float64) - self.mean) / self.std, dtype)

    def invert(self, x: Any, be: Backend) -> Any:
        """Return network values (..., points) in the data's range, in place where the array is its own."""
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
    net : MLP
        The architecture.
    flat : array
        The weights in use.
    prediction : {"noise", "x0", "v"}
        What its output is.
    backend : Backend
        Where `predict` runs.
    """

    net: MLP
    flat: npt.NDArray[Any]
    prediction: str
    backend: Backend

    @property
    def plan(self) -> Any:
        return self.net.plan

    @property
    def T(self) -> int:
        return self.net.T

    @property
    def shape(self) -> tuple[int, ...]:
        return self.net.shape

    def predict(self, x: Any, t: Any, labels: Any = None) -> Any:
        """Return the output (n, ...) for x (n, ...) at timesteps t, an int or (n,)."""
        return self.net.predict(x, t, labels, backend=self.backend, flat=self.flat)


class _Optimizer(NamedTuple):
    """The moving parts of training, besides the weights; all in the layout of the flat buffer."""

    plan: TrainingPlan
    m: npt.NDArray[Any]
    v: npt.NDArray[Any]


def _empty_history() -> dict[str, list[Any]]:
    return {"step": [], "loss": [], "validation_step": [], "validation_loss": []}


class Diffusion:
    """A diffusion model of curves.

    Parameters
    ----------
    net : MLP, optional
        The network; by default an `MLP` that fits the data, made at the first `fit`.
    schedule : Schedule, optional
        The noise levels; by default ``Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)``, or what fits net.T.
    prediction : {"noise", "x0", "v"}, optional
        What the network learns to predict.
    backend : str or Backend, optional
    seed : int, optional
        Of the weights, of all training draws, and of the samples unless `sample` names another.
    noise_shape : NoiseShape, optional
        Covariance S of the noise; by default white. The network learns L^-1 x, whose noise is white. As that is
        normalised, a multiple of S makes the same model.

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

    Examples
    --------
    >>> X = fastdiff.data.harmonic_curves(1000)
    >>> new = fastdiff.Diffusion().fit(X).sample(16)  # doctest: +SKIP
    """

    def __init__(
        self,
        net: MLP | None = None,
        schedule: Schedule | None = None,
        *,
        prediction: str = "noise",
        backend: str | Backend = "auto",
        seed: int = 0,
        noise_shape: NoiseShape | None = None,
    ) -> None:
        if net is not None and not isinstance(net, MLP):
            raise ArgumentError("net", type(net).__name__, "a fastdiff.MLP")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ArgumentError("schedule", type(schedule).__name__, "a fastdiff.Schedule")
        if net is not None and schedule is None:
            schedule = default_schedule(net.T)
        if net is not None and schedule is not None and net.T != schedule.T:
            raise ArgumentError("schedule", f"T = {schedule.T}", f"T = {net.T}, as the network has")
        if noise_shape is not None and not isinstance(noise_shape, NoiseShape):
            raise ArgumentError("noise_shape", type(noise_shape).__name__, "a fastdiff.NoiseShape, or None: white")
        if net is not None and noise_shape is not None and noise_shape.d != net.points:
            raise ArgumentError("noise_shape", repr(noise_shape), f"one of {net.points} values, as the network has")
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
        batch: int = 256,
        lr: float = 1e-3,
        warmup: int = 0,
        decay_steps: int | None = None,
        clip_norm: float | None = 1.0,
        ema: float | None = 0.999,
        validation: Any = None,
        progress: bool = True,
        callback: Callable[[int, float], Any] | None = None,
    ) -> Self:
        """Train for further steps, on from `step`.

        The loss is the mean squared error of the prediction at uniformly drawn timesteps (Ho et al. 2020, eq. 14).

        Parameters
        ----------
        X : (N, points) array
            Curves.
        y : None
            Class labels; this network has none.
        steps : int, optional
            How many more steps to take.
        batch : int, optional
            Rows drawn at a step, with replacement.
        lr, warmup, decay_steps, clip_norm, ema
            See `TrainingPlan`; those of the first call stay until `reset`. Warm-up and decay are absolute steps.
        validation : float or (M, points) array, optional
            A fraction of the rows to hold out (the same rows at each call with the same X), or other curves. Their
            loss under the averaged weights, with fixed noise and timesteps, goes to `history` every 100 steps.
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
        if y is not None:
            raise ArgumentError("y", type(y).__name__, "None: this network has no classes")
        be = get_backend(self.backend)
        steps, batch = check_int("steps", steps, low=0), check_int("batch", batch, low=1, high=1 << 30)
        plan = TrainingPlan(lr, warmup, decay_steps, clip_norm, ema)
        if self._optimizer is not None and plan not in (self._optimizer.plan, TrainingPlan()):
            raise ArgumentError(
                "lr, warmup, decay_steps, clip_norm, ema",
                str(plan),
                f"those of the first fit, {self._optimizer.plan}; reset() starts anew",
            )
        if self.normaliser is not None and self._optimizer is None:
            raise TrainingError("this model was saved with training=False: it can sample, but not go on training")
        points = getattr(self.noise_shape, "d", None) if self.net is None else self.net.points
        curves = check_array("X", _on_host(be, X), shape=(None, points))
        if curves.size == 0:
            raise ArgumentError("X", f"shape {curves.shape}", "at least one curve of at least one point")
        curves, held_out = self._split(curves, validation)

        self._prepare(curves, plan)
        assert self.net is not None and self.schedule is not None and self.normaliser is not None  # noqa: PT018
        assert self._optimizer is not None
        assert self._average is not None
        net, optimizer = self.net, self._optimizer
        data = be.asarray(self.normaliser.apply(curves, net.dtype), net.dtype)
        draws = TrainingDraws(data, self.schedule.signal, self.schedule.noise, *self._target_tables(), self.seed)
        checks = None if held_out is None else self._validation_set(be, held_out)
        grads = be.asarray(net.layout.zeros(net.dtype), net.dtype)
        # The same arrays on the CPU; on a GPU copies, that are brought back below.
        host = (net.flat, optimizer.m, optimizer.v, self._average)
        params, m, v, average = state = [be.asarray(array, net.dtype) for array in host]

        def bring_back() -> None:
            for ours, theirs in zip(host, state, strict=True):
                if ours is not theirs:
                    ours[...] = be.to_numpy(theirs)

        with (
            ExitStack() as last,
            _deferred_interrupt() as interrupted,
            tqdm(total=steps, disable=not progress, desc="training") as bar,
        ):
            last.callback(bring_back)
            for _ in range(steps):
                if checks is not None and self.step % VALIDATION_EVERY == 0:
                    self._validate(be, average, checks)
                options = optimizer.plan.options(self.step, self.ema_updates)
                loss, norm = be.mlp_train_step(net.plan, params, draws, self.step, batch, grads, m, v, average, options)
                if not math.isfinite(norm):
                    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} at loss {loss:g}"
                    raise TrainingError(
                        f"{what} in step {self.step}: stopped; the model keeps the state before it, try a smaller lr"
                    )
                self.history["step"].append(self.step)
                self.history["loss"].append(loss)
                self.step += 1
                self.ema_updates += 1
                bar.update()
                if progress and self.step % 50 == 0:
                    bar.set_postfix(loss=f"{np.mean(self.history['loss'][-50:]):.4f}", refresh=False)
                if interrupted():
                    raise KeyboardInterrupt
                if callback is not None:
                    bring_back()
                    if callback(self.step - 1, loss):
                        break
            if checks is not None and self.step % VALIDATION_EVERY == 0:
                self._validate(be, average, checks)
        return self

    def _split(self, X: npt.NDArray[Any], validation: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Training rows and held-out rows."""
        if validation is None:
            return X, None
        if np.ndim(validation) > 0:
            rows = check_array("validation", validation, shape=(None, X.shape[1]))
            if len(rows) == 0:
                raise ArgumentError("validation", "no curves", "at least one")
            return X, rows
        fraction = check_float("validation", validation, low=0, high=1, low_open=True, high_open=True)
        count = round(fraction * len(X))
        if not 1 <= count < len(X):
            raise ArgumentError(
                "validation",
                f"{validation}",
                f"a fraction that holds out 1 to {len(X) - 1} of the {len(X)} rows",
            )
        # Rows in the order of a word of their own: a choice that only seed and row number decide.
        words = noise.philox_words(len(X), 1, seed=self.seed, stream=Stream.DATA, step=1)[:, 0, 0]
        order = np.argsort(words, kind="stable")
        return X[np.sort(order[count:])], X[np.sort(order[:count])]

    def _prepare(self, X: npt.NDArray[Any], plan: TrainingPlan) -> None:
        """What the first fit decides: network, schedule, normaliser, plan and buffers."""
        if self.normaliser is not None:
            return
        normaliser = Normaliser.of(X, self.noise_shape)
        if self.schedule is None:
            self.schedule = default_schedule()
        if self.net is None:
            self.net = MLP(X.shape[1], T=self.schedule.T, seed=self.seed)
        if self.net.dtype == np.float64 and get_backend(self.backend).name != "numpy":
            raise ArgumentError("backend", repr(self.backend), "'numpy': this network has float64 parameters")
        zeros = self.net.layout.zeros
        self._optimizer = _Optimizer(plan, zeros(self.net.dtype), zeros(self.net.dtype))
        self._average = self.net.flat.copy()
        self.normaliser = normaliser

    def _target_tables(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Factors of noise and data in the training target at every t."""
        assert self.schedule is not None
        zeros, ones = np.zeros(self.schedule.T), np.ones(self.schedule.T)
        if self.prediction == "v":
            return self.schedule.signal, -self.schedule.noise
        return (ones, zeros) if self.prediction == "noise" else (zeros, ones)

    def _validation_set(self, be: Backend, rows: npt.NDArray[Any]) -> tuple[Any, Any, Any]:
        """x_t, t and target of the held-out rows: noise of stream FORWARD, timesteps spread evenly."""
        assert self.net is not None and self.schedule is not None and self.normaliser is not None  # noqa: PT018
        x0 = self.normaliser.apply(rows, self.net.dtype)
        t = np.arange(len(x0)) * self.schedule.T // len(x0)
        x, eps = process.forward_noise(x0, t, self.schedule, seed=self.seed, backend=be)
        of_noise, of_data = (table[t, None] for table in self._target_tables())
        target = (of_noise * eps + of_data * x0).astype(x.dtype)
        return be.asarray(x), be.asarray(t, np.int64), target

    def _validate(self, be: Backend, average: Any, checks: tuple[Any, Any, Any]) -> None:
        assert self.net is not None
        if self.history["validation_step"][-1:] == [self.step]:
            return  # an earlier fit ended here
        x, t, target = checks
        out = be.to_numpy(be.mlp_forward(self.net.plan, average, x, t))
        self.history["validation_step"].append(self.step)
        self.history["validation_loss"].append(float(np.mean(np.square(out - target, dtype=np.float64))))

    def _fitted(self) -> tuple[MLP, Schedule, Normaliser]:
        if self.net is None or self.schedule is None or self.normaliser is None:
            raise TrainingError("this model has not been trained: call fit first")
        return self.net, self.schedule, self.normaliser

    def denoiser(self, *, ema: bool = True) -> NetworkDenoiser:
        """Return the network with a copy of its averaged (or raw) weights, in the model's inner range (white noise)."""
        net, _, _ = self._fitted()
        flat = self._average if ema and self._average is not None else net.flat
        be = get_backend(self.backend)
        return NetworkDenoiser(net, be.asarray(flat.copy(), net.dtype), self.prediction, be)

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
        """Draw new curves.

        Parameters
        ----------
        n : int, optional
            How many.
        labels : None
            This network has no classes.
        sampler : {"ddpm", "ddim", "dpmpp_2m"} or Sampler, optional
            A name, with its defaults, or a table of `fastdiff.samplers` for this model's schedule and prediction. It
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
        batch : int, optional
            At most this many at once.
        progress : bool, optional
            Show a progress bar.

        Returns
        -------
        x : (n, points) float32
            In the range of the data.
        path : (steps + 1, n, points), if `trajectory`
            Noise first, through the same map.

        Raises
        ------
        ArgumentError
            An argument's value, or a table that disagrees with the model.
        TrainingError
            The model has not been trained.
        """
        if labels is not None:
            raise ArgumentError("labels", type(labels).__name__, "None: this network has no classes")
        _, schedule, normaliser = self._fitted()
        if not isinstance(sampler, Sampler):
            sampler = samplers.named(sampler, schedule, steps, prediction=self.prediction)
        elif steps is not None:
            raise ArgumentError("steps", str(steps), "None with a table: it has its own steps")
        elif sampler.schedule != schedule:
            raise ArgumentError("sampler", repr(sampler), f"a table for {schedule!r}")
        if normaliser.noise_shape is not None:
            process.refuse_clip(sampler)
        be = get_backend(self.backend)
        result = process.sample(
            self.denoiser(ema=ema), sampler, n=n, seed=self.seed if seed is None else seed, first_sample=first_sample,
            batch=batch, backend=self.backend, trajectory=trajectory, progress=progress,
        )  # fmt: skip
        if trajectory:
            return tuple(normaliser.invert(part, be) for part in result)
        return normaliser.invert(result, be)

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
            "normaliser": {"mean": normaliser.mean, "std": normaliser.std},
            "noise_shape": "white" if noise_shape is None else noise_shape.kind, "seed": self.seed,
            "step": self.step, "ema_updates": self.ema_updates, "training": plan,
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
    net = MLP.from_dict(header["network"], draw=False)
    kind = "white" if header["format"] == 1 else header["noise_shape"]
    prefix = "noise_shape."
    arrays = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    noise_shape = None if kind == "white" else NoiseShape(kind, arrays)
    model = Diffusion(
        net, schedule, prediction=header["prediction"], backend=backend, seed=header["seed"], noise_shape=noise_shape
    )
    mean, std = (check_float(f"normaliser.{name}", header["normaliser"][name]) for name in ("mean", "std"))
    model.normaliser = Normaliser(mean, check_float("normaliser.std", std, low=0, low_open=True), noise_shape)
    model.step = check_int("step", header["step"], low=0)
    model.ema_updates = check_int("ema_updates", header["ema_updates"], low=0)

    def buffer(prefix: str) -> npt.NDArray[Any]:
        flat = net.layout.zeros(net.dtype)
        views = net.layout.views(flat)
        for name, shape in net.layout.shapes.items():
            tensor = tensors[f"{prefix}.{name}"]
            if tensor.dtype != net.dtype:
                raise ArgumentError(f"{prefix}.{name}", f"dtype {tensor.dtype}", f"{net.dtype}")
            views[name][...] = check_array(f"{prefix}.{name}", tensor, shape=shape)
        return flat

    # Shapes first: a header that claims a huge network must not make us allocate one.
    for name, shape in net.layout.shapes.items():
        check_array(f"net.{name}", tensors[f"net.{name}"], shape=shape)
    net.flat = buffer("net")
    model._average = buffer("ema")
    if header["training"] is not None:
        model._optimizer = _Optimizer(TrainingPlan.from_dict(header["training"]), buffer("adam.m"), buffer("adam.v"))
    for name in model.history:
        model.history[name] = check_array(
            f"history.{name}", tensors[f"history.{name}"], shape=(None,), finite=False
        ).tolist()
    return model


def _on_host(be: Backend, X: Any) -> Any:
    """Training data as NumPy: it is normalised on the host, once."""
    if not is_on_device(X):
        return X
    be, array = backend_for(be, X=X), check_array("X", X)
    return be.to_numpy(be.asarray(array, array.dtype))


def default_schedule(T: int = 100) -> Schedule:
    """Return the schedule used where none is given: the source text's for T = 100, else cosine."""
    return Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1) if T == 100 else Schedule.cosine(T)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back two Ctrl-C in the main thread; yields a function that says whether one came.

    A handler that somebody else has set stays: it decides itself what an interrupt does.
    """
    seen = 0
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return

    def hold(number: int, frame: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            signal.signal(number, signal.default_int_handler)

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: seen > 0
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
