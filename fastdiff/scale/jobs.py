"""What is asked of a model, chunk by chunk, and how a worker answers."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.backends import get_backend
from fastdiff.errors import BackendError, FastdiffError
from fastdiff.files import locked
from fastdiff.model import Diffusion
from fastdiff.noise import NOISE_LAW_VERSION
from fastdiff.samplers import Sampler
from fastdiff.scale.store import Chunked, content_hash


def version() -> str:
    """The library's version, in this process."""
    import fastdiff

    return fastdiff.__version__


class Task(NamedTuple):
    """A chunk to be done: its number, where it begins and ends, and the options of its rows."""

    number: int
    start: int
    stop: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is asked.

    Attributes
    ----------
    kind : {"samples", "draws", "scores"}
        Of `Diffusion.sample`, `Diffusion.impute`, or `Diffusion.log_density`.
    model : Diffusion
    count, chunk : int
        Rows, and those of a chunk.
    first : int
        What the first row is by the noise law.
    options : dict
        The same for all rows.
    of_rows : dict of str to array
        What belongs to single rows.
    """

    kind: str
    model: Diffusion
    count: int
    chunk: int
    first: int
    options: dict[str, Any]
    of_rows: dict[str, Any]

    def row_options(self, start: int, stop: int) -> dict[str, Any]:
        """What belongs to some rows."""
        return {name: np.asarray(array[start:stop]) for name, array in self.of_rows.items()}

    def without_rows(self) -> Job:
        """What a worker has to know beforehand: of rows, the first one alone."""
        return replace(self, of_rows=self.row_options(0, 1))

    def identity(self) -> dict[str, Any]:
        """What the bits of the answer depend on, as JSON."""
        options = {k: v for k, v in self.options.items() if k not in ("seed", "sampler", "steps", "ema", "batch")}
        ema = self.options.get("ema", True)
        return {
            "kind": self.kind,
            "model": self.model.digest(ema=ema),
            "table": self._table(),
            "seed": int(self.options["seed"]),
            "first": self.first,
            "noise_law": NOISE_LAW_VERSION,
            "version": version(),
            "backend": get_backend(self.model.backend).name,
            "options": content_hash({name: value for name, value in options.items() if value is not None}),
            "rows": content_hash(self.of_rows),
        }

    def _table(self) -> dict[str, Any] | None:
        """The sampler's table: its hash, and what it is called."""
        sampler = self.options.get("sampler", None if self.kind == "scores" else "auto")
        if sampler is None:
            return None
        if not isinstance(sampler, Sampler):
            given = self.kind == "draws" or self.options.get("given") is not None
            if given and sampler == "auto" and self.options.get("method") == "repaint":
                sampler = "ddpm"
            sampler = self.model.named_sampler(sampler, self.options.get("steps"), given=given)
        parts = [np.array(sampler.rows, np.float64), sampler.clip, sampler.prediction, sampler.schedule.betas]
        found = hashlib.sha256(json.dumps(content_hash(parts)).encode())
        return {"name": sampler.label, "hash": f"sha256:{found.hexdigest()}"}

    def answer(self, start: int, stop: int, row_options: dict[str, Any]) -> npt.NDArray[Any]:
        """Answer for some rows, on the host."""
        options = {**self.options, **row_options}
        if self.kind == "samples":
            found = self.model.sample(stop - start, first_sample=self.first + start, **options)
        elif self.kind == "draws":
            found = self.model.impute(first_row=start, **options)
        else:
            found = self.model.log_density(first_sample=start, **options).values
        block: npt.NDArray[Any] = get_backend(self.model.backend).to_numpy(found)
        return block


@dataclass(frozen=True)
class Work:
    """A job and where its answers go: what a worker has of it."""

    job: Job
    chunks: Chunked

    def do(self, task: Task) -> None:
        """Do a chunk."""
        self.chunks.write(task.number, self.job.answer(task.start, task.stop, task.options))

    def packed(self) -> bytes:
        """Return it for other processes, with what they must agree on.

        Raises
        ------
        BackendError
            Something in it cannot be handed to another process, as a function of a script.
        """
        be = get_backend(self.job.model.backend)
        model = _on(self.job.model, be.name if isinstance(self.job.model.backend, str) else be)
        try:
            content = pickle.dumps(replace(self, job=replace(self.job, model=model)), protocol=5)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise BackendError(f"this cannot be sent to a worker: {error}") from error
        return pickle.dumps((version(), NOISE_LAW_VERSION, content), protocol=5)

    @classmethod
    def unpacked(cls, content: bytes) -> Work:
        """Return it as it is used in a worker: on a CPU with one thread, unless the model's backend says how many.

        Raises
        ------
        BackendError
            The worker has another version, or cannot compute on the backend.
        """
        theirs, law, content = pickle.loads(content)
        if (theirs, law) != (version(), NOISE_LAW_VERSION):
            words = f"fastdiff {version()} with noise law {NOISE_LAW_VERSION}, where the caller has {theirs} with {law}"
            raise BackendError(f"a worker has {words}: install the same version everywhere")
        work: Work = pickle.loads(content)
        model = work.job.model
        if model.backend == "cpu":
            model.backend = get_backend("cpu", threads=1)
        work = cls(work.job, work.chunks.reopened())
        work._compile()
        return work

    def _compile(self) -> None:
        """Have kernels compiled in one process of a machine, which keeps them on disk for the others."""
        be = get_backend(self.job.model.backend)
        if self.job.kind == "scores" or be.name == "numpy":
            return
        asked = {**self.job.options, **self.job.of_rows}
        options: dict[str, Any] = {name: asked.get(name) for name in ("labels", "covariates", "guidance")}
        path = Path(gettempdir()) / f"fastdiff-{os.getuid() if hasattr(os, 'getuid') else 0}.lock"
        with locked(path), suppress(FastdiffError, TypeError):  # what is wrong with it, the tasks tell
            self.job.model.sample(1, sampler="ddim", steps=1, **options)


class Parcel(NamedTuple):
    """Work on its way to a process, which opens it once.

    Attributes
    ----------
    name : str
        Hash of the content.
    path : str or None
        The file that has the content.
    """

    name: str
    path: str | None = None

    def opened(self, content: bytes | None = None) -> Work:
        """Return the work; of `content`, if there is no file."""
        with _opening:
            if self.name not in _open:
                if content is None:
                    assert self.path is not None
                    try:
                        content = Path(self.path).read_bytes()
                    except FileNotFoundError:
                        words = f"a worker does not see {self.path}: is it on another machine? Set TMPDIR here to a "
                        raise BackendError(f"{words}folder that all share, or take a Dask client") from None
                _open.clear()  # one at a time: weights may be large
                _open[self.name] = Work.unpacked(content)
            return _open[self.name]


_open: dict[str, Work] = {}
_opening = threading.Lock()


def do(parcel: Parcel, task: Task, content: bytes | None = None) -> None:
    """Do a task in a worker."""
    parcel.opened(content).do(task)


def attempt(parcel: Parcel, task: Task) -> tuple[int, Exception | None]:
    """Do a task in a worker, and return what went wrong."""
    try:
        do(parcel, task)
    except Exception as error:  # noqa: BLE001 - the caller decides what it means
        return task.number, error
    return task.number, None


def _on(model: Diffusion, backend: Any) -> Diffusion:
    """The model on a backend, without what only training needs."""
    other = copy.copy(model)
    other.backend = backend
    other._optimizer = None
    return other
