"""Where the numbers of a training go while it runs: files, and the loggers of other libraries as they are.

``model.fit(X, callbacks=[...])`` takes any of these, and tells each of them numbers by name at a step: the mean "loss"
of the last `EVERY` steps with the "lr" of the last of them, and the "validation_loss" where there is one.

- ``FileLogger("run.csv")`` or ``FileLogger("run.jsonl")``;
- a SummaryWriter of TensorBoard, or anything else with its ``add_scalar(name, value, step)``;
- the module mlflow, or anything else with its ``log_metrics(numbers, step=step)``;
- ``wandb.init()``, or anything else with its ``log(numbers, step=step)``;
- a function of ``(step, numbers)``.

TensorBoard::

    from torch.utils.tensorboard import SummaryWriter  # or tensorboardX

    with SummaryWriter("runs/1") as board:
        model.fit(X, callbacks=[board])

MLflow::

    import mlflow

    with mlflow.start_run():
        model.fit(X, callbacks=[mlflow])
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastdiff.errors import ArgumentError, DataError

__all__ = ["FileLogger"]

EVERY = 10  # steps
NUMBERS = ("loss", "lr", "validation_loss")
HEADER = ",".join(["step", *NUMBERS])

Logger = Callable[[int, dict[str, float]], Any]


class FileLogger:
    """Write the numbers of a training into a file, line by line.

    Parameters
    ----------
    path : path
        A ``.csv`` file with the columns step, loss, lr and validation_loss, empty where there is none, or a ``.jsonl``
        file with an object a line. To a file that is there lines are added: a training that goes on goes on there.

    Raises
    ------
    ArgumentError
        Another ending.
    DataError
        The file is a ``.csv`` file with other columns; while training: it cannot be written.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(100, points=12)
    >>> log = fd.callbacks.FileLogger("run.csv")
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False, callbacks=[log])
    >>> from pathlib import Path
    >>> Path("run.csv").read_text().split()[0]
    'step,loss,lr,validation_loss'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".csv", ".jsonl"):
            raise ArgumentError("path", str(path), "a .csv or .jsonl file")
        if self.path.suffix == ".csv" and self.path.exists():
            with self.path.open(encoding="utf-8", errors="replace") as file:
                there = file.readline().strip()
            if there and there != HEADER:
                raise DataError(f"{self.path}: has the columns {there!r}, wants {HEADER!r}")

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                if self.path.suffix == ".jsonl":
                    line = json.dumps({"step": step, **numbers})
                else:
                    line = ",".join(
                        [str(step), *(repr(float(numbers[name])) if name in numbers else "" for name in NUMBERS)]
                    )
                    line = line if file.tell() else f"{HEADER}\n{line}"
                file.write(line + "\n")  # whole: a reader sees no half of it
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def listeners(callbacks: Any) -> list[Logger]:
    """Return functions of (step, numbers) that tell each of the callbacks in its own way."""
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, (str, bytes)):
        raise ArgumentError("callbacks", type(callbacks).__name__, "a list of loggers or functions")
    return [_listener(each) for each in callbacks]


def _listener(logger: Any) -> Logger:
    if hasattr(logger, "log_metrics"):
        return lambda step, numbers: logger.log_metrics(numbers, step=step)
    if hasattr(logger, "add_scalar"):
        return lambda step, numbers: [logger.add_scalar(name, value, step) for name, value in numbers.items()]
    if hasattr(logger, "log"):
        return lambda step, numbers: logger.log(numbers, step=step)
    if callable(logger):
        function: Logger = logger
        return function
    wants = "a fastdiff.callbacks.FileLogger, an object with log_metrics, add_scalar or log, or a function"
    raise ArgumentError("callbacks", type(logger).__name__, wants)


class Reporter:
    """Tells listeners what is new in a history.

    Parameters
    ----------
    tell : list of callable
        Of (step, numbers).
    history : dict
        See `Diffusion.history`.
    rate : callable
        The learning rate of a step.
    """

    def __init__(self, tell: list[Logger], history: dict[str, list[Any]], rate: Callable[[int], float]) -> None:
        self.tell, self.history, self.rate = tell, history, rate
        self.losses, self.held = len(history["loss"]), len(history["validation_loss"])

    def report(self, *, end: bool = False) -> None:
        """Tell of steps that are whole tens since the last report, and at the end of the rest."""
        steps, losses = self.history["step"], self.history["loss"]
        while self.losses < len(losses):
            until = self.losses + EVERY - steps[self.losses] % EVERY
            if until > len(losses):
                if not end:
                    break
                until = len(losses)
            some, self.losses = losses[self.losses : until], until  # first counted: one that raises is told no more
            step = steps[until - 1]
            self._say(step, {"loss": sum(some) / len(some), "lr": self.rate(step)})
        while self.held < len(self.history["validation_loss"]):
            at, self.held = self.held, self.held + 1
            self._say(self.history["validation_step"][at], {"validation_loss": self.history["validation_loss"][at]})

    def _say(self, step: int, numbers: dict[str, float]) -> None:
        for tell in self.tell:
            tell(step, dict(numbers))
