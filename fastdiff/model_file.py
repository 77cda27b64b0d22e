"""What a file holds of a model, and how it comes back; `fastdiff.checkpoint` is the format."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastdiff import checkpoint
from fastdiff.base import GaussianBase
from fastdiff.covariates import CovariateScale
from fastdiff.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    DataWarning,
    as_named,
    check_array,
    check_choice,
    check_float,
    check_int,
    check_seed,
    shown,
)
from fastdiff.nn import Network, network_of
from fastdiff.nn.optim import MOST_STEPS, TrainingPlan
from fastdiff.noise import MAX_STEP, TARGETS
from fastdiff.noise_shape import NoiseShape
from fastdiff.normaliser import Normaliser
from fastdiff.schedule import PREDICTIONS, Schedule
from fastdiff.tensor_file import NAMES, Tensor
from fastdiff.training import Optimizer, empty_history

Tensors = dict[str, npt.NDArray[Any]]

KEPT = "kept_rows"  # the tensor of training rows, in the data's units; NaN where a value is missing
WIDEST = 100.0  # what a spread may be, at most
OF_MODEL = {
    "base": "_gaussian",
    "average": "_average",
    "optimizer": "_optimizer",
    "held_out": "_held_out",
    "data": "_data",
    "report": "report_",
    "arithmetic": "_arithmetic",
    "covariates": "_covariates",
    "label_drop": "_label_drop",
}  # the names of attributes of a `Diffusion`, where they differ from those of `Saved`


@contextmanager
def naming_faults(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what is wrong with a file's content into a `CheckpointError` that names the file."""
    try:
        yield
    except (ArgumentError, KeyError, TypeError, MemoryError) as error:  # the last: a network of any size can be claimed
        reason = f"the header lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {reason}") from error


def _network(header: dict[str, Any]) -> Network:
    with as_named(config="network"):
        return network_of(header["network"], draw=False)


@dataclass(frozen=True, eq=False)
class Saved:
    """What a file holds: the attributes of a `Diffusion`, with its averaged weights and what training needs.

    `optimizer` is None in files for sampling only.
    """

    net: Network
    schedule: Schedule
    prediction: str
    seed: int
    normaliser: Normaliser
    base: GaussianBase | None
    average: npt.NDArray[Any]
    optimizer: Optimizer | None
    history: dict[str, list[Any]]
    step: int
    ema_updates: int
    held_out: tuple[str, float] | None
    data: list[int] | None
    report: dict[str, Any] | None
    class_names: list[str] | None
    channel_names: list[str] | None
    arithmetic: int
    covariates: CovariateScale | None = None
    covariate_names: list[str] | None = None
    label_drop: float | None = None
    spread: float = 1.0
    kept_rows: npt.NDArray[Any] | None = None
    conditional: str | None = None

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return what a file holds of a `Diffusion` that has been trained."""
        return cls(**{field.name: getattr(model, OF_MODEL.get(field.name, field.name)) for field in fields(cls)})

    def give(self, model: Any) -> None:
        """Set the attributes of a `Diffusion`."""
        for field in fields(self):
            setattr(model, OF_MODEL.get(field.name, field.name), getattr(self, field.name))
        model.scale, model.base = self.normaliser.scale, None if self.base is None else "gaussian"

    def digest(self, *, ema: bool) -> str:
        """Return the checksum of all that samples depend on: see `Diffusion.digest`."""
        net, normaliser = self.net, self.normaliser
        arrays = {"weights": self.average if ema else net.flat, **normaliser.arrays}
        for part in (normaliser.noise_shape, self.base, self.covariates):
            arrays |= {} if part is None else part.arrays
        facts = [net.to_dict(), self.schedule.to_dict(), normaliser.to_dict(), self.prediction, self.spread]
        found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, array in sorted(arrays.items()):
            found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array).data)
        return f"sha256:{found.hexdigest()}"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, whole or not at all, and only one that `read` takes back.

        Raises
        ------
        CheckpointError
            Something in it would be refused when it is read: weights that are not finite, a name that is no text.
        """
        net, normaliser = self.net, self.normaliser
        buffers = {"net": net.flat, "ema": self.average}
        plan = None
        if self.optimizer is not None:
            buffers |= {"adam.m": self.optimizer.m, "adam.v": self.optimizer.v}
            plan = self.optimizer.plan.to_dict()
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
        tensors |= normaliser.arrays | ({} if self.base is None else self.base.arrays)
        tensors |= {} if self.covariates is None else self.covariates.arrays
        tensors |= {} if self.kept_rows is None else {KEPT: self.kept_rows}
        header = {
            "network": net.to_dict(), "schedule": self.schedule.to_dict(), "prediction": self.prediction,
            "normaliser": normaliser.to_dict(), "held_out": self.held_out, "data": self.data, "report": self.report,
            "noise_shape": "white" if noise_shape is None else noise_shape.kind, "seed": self.seed,
            "step": self.step, "ema_updates": self.ema_updates, "training": plan, "class_names": self.class_names,
            "channel_names": self.channel_names, "arithmetic": self.arithmetic, "label_drop": self.label_drop or 0.0,
            "covariate_names": self.covariate_names, "spread": self.spread,
            "kept_rows": 0 if self.kept_rows is None else len(self.kept_rows),
            "conditional": self.conditional,
        }  # fmt: skip
        features = normaliser.features + self.schedule.features + ([] if self.base is None else ["base"])
        features += [] if self.kept_rows is None else ["kept rows"]
        features += ["velocity"] if self.prediction == "velocity" else []
        features += ["learned variance"] if net.learned_variance else []
        features += ["null class"] if net.null_class else []
        features += ["covariates"] if net.covariates is not None else []
        features += ["known inputs"] if net.pointwise else []
        features += ["mask"] if net.masked else []
        features += ["series"] if len(net.shape) == 2 else []
        features += [] if self.optimizer is None else self.optimizer.plan.features
        try:
            stored = json.loads(json.dumps(header, allow_nan=False))
            self._of(stored | {"format": checkpoint.FORMAT_VERSION, "features": features}, tensors)
        except (ArgumentError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not saved, as it could not be read again: {error}") from error
        checkpoint.write(path, header, tensors, features=features)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a checkpoint."""
        made: list[tuple[Network, Tensors]] = []

        def places(header: dict[str, Any], stored: Mapping[str, Tensor]) -> Tensors:
            """Flat buffers for tensors that fit; what is wrong with others is said when all are there."""
            net = _network(header)
            flats: Tensors = {}
            made.append((net, flats))
            known, dtype = net.layout.shapes.items(), NAMES[np.dtype(net.dtype)]
            for prefix in _prefixes(header):
                for name, shape in known:
                    one = stored.get(f"{prefix}.{name}")
                    if one is None or (one.shape, one.dtype) != (shape, dtype):
                        return {}
            # In one piece, of which the system makes large pages where it can: four times 4 kB at a time takes longer
            # than to read them.
            block = np.zeros((len(_prefixes(header)), net.layout.size), net.dtype)
            flats |= dict(zip(_prefixes(header), block, strict=True))
            views = {prefix: net.layout.views(flat) for prefix, flat in flats.items()}
            return {f"{prefix}.{name}": view for prefix, some in views.items() for name, view in some.items()}

        header, tensors = checkpoint.read(path, places)
        return cls._of(header, tensors, *made)

    @classmethod
    def _of(cls, header: dict[str, Any], tensors: Tensors, made: tuple[Network, Tensors] | None = None) -> Self:
        """Return what header and tensors of a file say, checked; they may have been read into buffers of a network."""
        schedule = Schedule.from_dict(header["schedule"])
        net, flats = made or (_network(header), {})
        # Shapes first: a header that claims a huge network must not make us allocate one.
        for name, shape in net.layout.shapes.items():
            _stored(tensors, f"net.{name}", shape)
        kind = "white" if header["format"] == 1 else header["noise_shape"]
        prefix = "noise_shape."
        arrays = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        noise_shape = None if kind == "white" else NoiseShape(kind, arrays)
        base = None
        if "base" in header.get("features", ()):
            base = GaussianBase.from_arrays(tensors, math.prod(net.shape))
            prediction = check_choice("prediction", header["prediction"], PREDICTIONS)
            net.set_linear(base.linear(schedule, prediction))  # before the weights: of zeros it changes some
        held_out, data, report = _habits(header)
        plan = header["training"]
        net.flat, average, *moments = (_buffer(net, tensors, name, flats.get(name)) for name in _prefixes(header))
        if plan is not None and (moments[1] < 0).any():
            raise ArgumentError("adam.v", str(moments[1].min()), "averages of squares, at least 0")
        normaliser = Normaliser.from_dict(header["normaliser"], tensors, noise_shape, net.shape)
        step, history = check_int("step", header["step"], low=0, high=MAX_STEP + 1), _history(tensors)
        _check_steps(history, step)
        others = {f"noise_shape.{name}" for name in (() if noise_shape is None else noise_shape.arrays)}
        others |= {*normaliser.arrays, *(() if base is None else base.arrays)}
        covariates = None if net.covariates is None else CovariateScale.from_arrays(tensors, net.covariates)
        others |= set() if covariates is None else {*covariates.arrays}
        kept = check_int("kept_rows", header.get("kept_rows", 0), low=0)
        others |= {KEPT} if kept else set()
        _check_names(tensors, net, _prefixes(header), others)
        return cls(
            net=net,
            schedule=schedule,
            prediction=check_choice("prediction", header["prediction"], PREDICTIONS),
            seed=check_seed(header["seed"]),
            normaliser=normaliser,
            base=base,
            average=average,
            optimizer=None if plan is None else Optimizer(TrainingPlan.from_dict(plan), *moments),
            history=history,
            step=step,
            ema_updates=check_int("ema_updates", header["ema_updates"], low=0, high=MOST_STEPS),
            held_out=held_out,
            data=data,
            report=report,
            class_names=_names(header, "class_names", net.classes),
            channel_names=_names(header, "channel_names", net.shape[-1] if len(net.shape) == 2 else None),
            arithmetic=check_int("arithmetic", header.get("arithmetic", 1), low=1),
            covariates=covariates,
            covariate_names=_names(header, "covariate_names", net.covariates),
            label_drop=check_float("label_drop", header.get("label_drop", 0.0), low=0, high=1),
            spread=check_float("spread", header.get("spread", 1.0), low=0, low_open=True, high=WIDEST),
            kept_rows=_stored(tensors, KEPT, (kept, *net.shape)) if kept else None,
            conditional=check_choice("conditional", header.get("conditional"), TARGETS) if net.masked else None,
        )


class Keeper:
    """Saves a model while it trains; the last few of these files stay.

    Parameters
    ----------
    save : callable
        Writes the model under a path.
    path : path
        Where the last one is.
    keep : int
        With more than 1 the last so many are also called ``NAME-STEP``.
    """

    def __init__(self, save: Callable[[Path], None], path: str | os.PathLike[str], keep: int) -> None:
        self.save, self.path, self.keep = save, Path(path), keep
        self.kept: list[Path] = []

    def __call__(self, step: int) -> None:
        """Save it as it is after so many steps; what goes wrong costs a warning, and not the training."""
        one = self.path.with_name(f"{self.path.stem}-{step:06}{self.path.suffix}")
        try:
            self.save(self.path)
            if self.keep > 1 and one not in self.kept:
                self.save(one)
                self.kept.append(one)
            while len(self.kept) > self.keep:
                self.kept.pop(0).unlink(missing_ok=True)
        except (CheckpointError, DataError, OSError) as error:
            warnings.warn(f"not saved after step {step}: {error}", DataWarning, stacklevel=2)


def _stored(tensors: Tensors, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    tensor = tensors.get(name)
    if tensor is None:
        raise ArgumentError(name, "no such tensor", f"shape {shape}, by the configuration")
    return tensor if tensor.shape == shape else check_array(name, tensor, shape=shape)


def _prefixes(header: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of tensors in the flat layout begin with."""
    return ("net", "ema", *(() if header["training"] is None else ("adam.m", "adam.v")))


def _buffer(net: Network, tensors: Tensors, prefix: str, read: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """The flat buffer of a network out of the tensors of a prefix, or `read`, which they were read into."""
    flat = net.layout.zeros(net.dtype) if read is None else read
    views = net.layout.views(flat)
    for name, shape in net.layout.shapes.items() if read is None else ():
        tensor = _stored(tensors, f"{prefix}.{name}", shape)
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


def _history(tensors: Tensors) -> dict[str, list[Any]]:
    history = empty_history()
    for name in history:
        history[name] = check_array(f"history.{name}", tensors[f"history.{name}"], shape=(None,)).tolist()
    for steps, losses in (("step", "loss"), ("validation_step", "validation_loss")):
        if len(history[steps]) != len(history[losses]):
            got, wants = (f"{len(history[name])} values" for name in (losses, steps))
            raise ArgumentError(f"history.{losses}", got, f"{wants}, as history.{steps} has")
    return history


def _check_steps(history: dict[str, list[Any]], step: int) -> None:
    """Refuse a history that is of another number of steps."""
    taken, looked = history["step"], history["validation_step"]
    if taken != list(range(len(taken))) or len(taken) != step:
        raise ArgumentError("history.step", f"{len(taken)} steps", f"0 to {step - 1}, as the model has taken {step}")
    if any(later <= earlier for earlier, later in pairwise(looked)) or (
        looked and not 0 <= looked[0] <= looked[-1] <= step
    ):
        raise ArgumentError("history.validation_step", "other numbers", f"rising ones from 0 to {step}")


def _check_names(tensors: Tensors, net: Network, prefixes: Iterable[str], others: set[str]) -> None:
    """Refuse tensors that are no part of the model."""
    known = {f"{prefix}.{name}" for prefix in prefixes for name in net.layout.shapes} | others
    known |= {f"history.{name}" for name in empty_history()}
    for name in sorted(tensors, key=lambda name: not name.startswith("net.")):
        if name not in known:
            raise ArgumentError(name, "a tensor in the file", "none of this name, by the configuration")


def _names(header: dict[str, Any], key: str, count: int | None) -> list[str] | None:
    names = header.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ArgumentError(key, shown(names), f"a list of {count or 0} names, or null")
    return names


def _habits(header: dict[str, Any]) -> tuple[tuple[str, float], list[int] | None, dict[str, Any] | None]:
    """What a file says of rows held out, of the data, and of the samples; files of 0.1.0 say nothing."""
    held_out = header.get("held_out") or ["fraction", 0.0]
    if not isinstance(held_out, list) or len(held_out) != 2:
        raise ArgumentError("held_out", shown(held_out), "a rule and a share")
    rule = check_choice("held_out", held_out[0], ["fraction", "share"])
    part = check_float("held_out", held_out[1], low=0, high=1, high_open=True)
    data, report = header.get("data"), header.get("report")
    if data is not None:
        if not isinstance(data, list) or len(data) != 2:
            raise ArgumentError("data", shown(data), "a number of rows and a checksum, or null")
        data = [check_int("data", value, low=0) for value in data]
    if report is not None and not isinstance(report, dict):
        raise ArgumentError("report", shown(report), "names and numbers, or null")
    return (rule, part), data, report
