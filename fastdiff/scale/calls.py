"""What a user calls, and how it goes on: chunks that are not done are handed out, and again where that failed."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.conditioning import GUIDED
from fastdiff.errors import ArgumentError, BackendError, FastdiffError, check_array, check_flags, check_int, shown
from fastdiff.model import Diffusion
from fastdiff.observations import observations
from fastdiff.progress import bar as progress_bar
from fastdiff.scale.engines import Engine, LostEngine, engine
from fastdiff.scale.jobs import Job, Task, Work
from fastdiff.scale.store import Chunked

if TYPE_CHECKING:
    import zarr

log = logging.getLogger("fastdiff")

RETRIES = 3  # of a chunk, and of rounds in which nothing was done
ALONE = ("trajectory", "return_evidence", "as_frame", "progress")  # options of `sample` that are not of single samples


def sample_to(
    store: Any,
    model: Diffusion,
    n: int,
    *,
    chunk: int,
    client: Any = None,
    resume: bool = True,
    progress: bool = True,
    **options: Any,
) -> zarr.Array[Any]:
    """Draw n samples into a Zarr array: to the bit those of ``model.sample(n, **options)``.

    Parameters
    ----------
    store : path, URL or zarr store
        Of the array: a folder, what fsspec opens ("s3://bucket/samples.zarr"), or a store of zarr that every worker can
        reach. Where it holds a part of these very samples, the others are drawn.
    model : Diffusion
    n : int
        How many; draws for each observation with `given`.
    chunk : int
        Samples of a chunk, the last one may have fewer. A worker holds about three chunks; one should take a second or
        more.
    client : int, Client, Parallel or Executor, optional
        Who does the work: see `fastdiff.scale`.
    resume : bool, optional
        Go on where an earlier call stopped. False: refuse a store that is there.
    progress : bool, optional
        Show a progress bar.
    **options
        Those of `Diffusion.sample`: `labels`, `covariates`, `guidance`, `sampler`, `steps`, `seed`, `first_sample`,
        `ema`, `given`, `method`, ... Arrays of labels and of covariates are of the n samples, or of the observations.
        A function in a `Weight` is known to the store by its name alone.

    Returns
    -------
    zarr.Array
        (n, ...), or (n, N, ...) for N observations, of the dtype that `sample` returns, in chunks of `chunk` samples.
        Its attribute "fastdiff" says what made it: hashes of model, table and of what was asked, the seed, the versions
        of the noise law and of the library.

    Raises
    ------
    ArgumentError
        As of `Diffusion.sample`; a store that something else made, and what is different.
    DataError
        The store cannot be written, as when the disk is full. What is done stays valid.
    BackendError
        Nobody to do the work: no scheduler or no worker within 30 seconds, a pool that has lost its workers, a worker
        with another version of fastdiff, or a chunk that failed four times.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(200, points=12)
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
    >>> array = fd.scale.sample_to("samples.zarr", model, 50, chunk=20, steps=5, progress=False)
    >>> array.shape, bool((array[30:34] == model.sample(4, first_sample=30, steps=5)).all())
    ((50, 12), True)
    """
    n, chunk = check_int("n", n, low=1), check_int("chunk", chunk, low=1)
    for name in ALONE:
        if options.get(name):
            raise ArgumentError(name, shown(options[name]), "nothing, where samples go to a store")
    if options.get("method") == "smc":
        wants = f"{', '.join(GUIDED)}, 'replace' or 'repaint': the draws of 'smc' are no draws without each other"
        raise ArgumentError("method", "'smc'", wants)
    options = _resolved(model, options)
    of_rows: dict[str, Any] = {}
    several = options["given"] is not None and options["given"].count is not None
    for name, single in (("labels", 0), ("covariates", 1)):
        value = options.get(name)
        if value is not None and np.ndim(value) > single and not several:
            of_rows[name] = check_array(name, options.pop(name), shape=(n, *(None,) * single), finite=False)
    first = check_int("first_sample", options.pop("first_sample", 0), low=0)
    # Nothing is drawn, but all that is asked for is looked at.
    nobody = {name: array[:0] for name, array in of_rows.items()}
    none = model.sample(0, first_sample=first + n - 1, **nobody, **options)
    shape, dtype = (n, *none.shape[1:]), none.dtype
    return _run(store, Job("samples", model, n, chunk, first, options, of_rows), shape, dtype, client, resume, progress)


def impute_to(
    store: Any,
    model: Diffusion,
    X: Any,
    draws: int = 100,
    *,
    chunk: int,
    client: Any = None,
    resume: bool = True,
    progress: bool = True,
    **options: Any,
) -> zarr.Array[Any]:
    """Draw what is missing in rows into a Zarr array: to the bit ``model.impute(X, draws, **options)``.

    Parameters
    ----------
    store, client, resume, progress
        As of `sample_to`.
    model : Diffusion
    X : (N, ...) array
        NaN where nothing is known. An array on disk, as of ``np.load(path, mmap_mode="r")`` or zarr, is read chunk by
        chunk.
    draws : int, optional
        Of each row.
    chunk : int
        Rows of a chunk, with all their draws.
    **options
        Those of `Diffusion.impute` but `quantiles`: `labels`, `covariates`, `method`, `sampler`, `steps`, `guidance`,
        `seed`, `first_draw`, `ema`.

    Returns
    -------
    zarr.Array
        (draws, N, ...) in chunks of `chunk` rows.

    Raises
    ------
    ArgumentError, DataError, BackendError
        As of `sample_to`, and of `Diffusion.impute`.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(200, points=12)
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
    >>> gaps = np.where(np.arange(12) < 6, X[:4], np.nan)
    >>> fd.scale.impute_to("draws.zarr", model, gaps, 3, chunk=2, steps=5, progress=False).shape
    (3, 4, 12)
    """
    draws = check_int("draws", draws, low=1)
    if options.get("quantiles") is not None:
        raise ArgumentError("quantiles", shown(options["quantiles"]), "None, where draws go to a store")
    options = {"draws": draws} | _resolved(model, options, given=True)
    job = _of_rows("draws", model, X, chunk, options, {"labels": 0, "covariates": 1})
    first = job.row_options(0, 1)
    first["X"] = np.zeros_like(first["X"])  # where nothing is missing nothing takes time
    some = model.impute(**first, **job.options)
    dtype = np.result_type(some.dtype, job.of_rows["X"].dtype)
    return _run(store, job, (draws, job.count, *some.shape[2:]), dtype, client, resume, progress)


def score_to(
    store: Any,
    model: Diffusion,
    X: Any,
    y: Any = None,
    *,
    chunk: int,
    client: Any = None,
    resume: bool = True,
    progress: bool = True,
    **options: Any,
) -> zarr.Array[Any]:
    """Write the log density of rows into a Zarr array: ``model.score_samples(X, y, **options)``.

    Parameters
    ----------
    store, client, resume, progress
        As of `sample_to`.
    model : Diffusion
    X : (N, ...) array
        In memory or on disk, as of `impute_to`.
    y : (N,) int array, optional
    chunk : int
        Rows of a chunk.
    **options
        Those of `Diffusion.log_density`: `covariates`, `method`, `sampler`, `trace`, `probes`, `seed`, `ema`.

    Returns
    -------
    zarr.Array
        (N,) float64, in nats of the data's units.

    Raises
    ------
    ArgumentError, DataError, BackendError
        As of `sample_to`, and of `Diffusion.log_density`.

    Examples
    --------
    >>> X = fd.data.harmonic_curves(200, points=12)
    >>> model = fd.Diffusion().fit(X, steps=20, progress=False)
    >>> array = fd.scale.score_to("scores.zarr", model, X[:6], chunk=3, progress=False)
    >>> np.allclose(array[:], model.score_samples(X[:6]))
    True
    """
    options = {"y": y, "seed": model.seed, **options}
    job = _of_rows("scores", model, X, chunk, options, {"y": 0, "covariates": 1})
    return _run(store, job, (job.count,), np.dtype(np.float64), client, resume, progress)


def _resolved(model: Diffusion, options: dict[str, Any], *, given: bool = False) -> dict[str, Any]:
    """Options with the seed that they mean, and observations in one form."""
    model._fitted()
    seed = options.get("seed")
    options = {**options, "seed": model.seed if seed is None else seed}
    if not given:
        known = options.get("given")
        options["given"] = None if known is None else observations(known, model._fitted()[0].shape)
    return options


def _of_rows(kind: str, model: Diffusion, X: Any, chunk: int, options: dict[str, Any], names: dict[str, int]) -> Job:
    """What is asked of rows X; `names` are the options that belong to single rows, and axes of a single value."""
    chunk = check_int("chunk", chunk, low=1)
    net, _, _ = model._fitted()
    if not (hasattr(X, "shape") and hasattr(X, "dtype")):
        X = check_array("X", X, finite=False)
    if len(X.shape) != len(net.shape) + 1 or tuple(X.shape[1:]) != net.shape or not X.shape[0]:
        raise ArgumentError("X", f"shape {tuple(X.shape)}", f"at least one row of shape {net.shape}: (N, ...)")
    of_rows: dict[str, Any] = {"X": X}
    rest = {name: value for name, value in options.items() if value is not None}
    for name, single in names.items():
        if name in rest and np.ndim(rest[name]) > single:
            shape = (int(X.shape[0]), *(None,) * single)
            of_rows[name] = check_array(name, rest.pop(name), shape=shape, finite=False)
    return Job(kind, model, int(X.shape[0]), chunk, 0, rest, of_rows)


def _run(
    store: Any, job: Job, shape: tuple[int, ...], dtype: Any, client: Any, resume: bool, progress: bool
) -> zarr.Array[Any]:
    """Do what is not done of a job."""
    check_flags(resume=resume, progress=progress)
    axis = 1 if job.kind == "draws" else 0
    chunks = Chunked.at(store, shape, dtype, axis, job.chunk, job.identity(), resume=resume)
    left = chunks.left()
    if len(left) < chunks.count:
        log.info("%s: %d of %d chunks are there", chunks.name, chunks.count - len(left), chunks.count)
    if left:
        there = job.count - sum(chunks.rows(number) for number in left)
        work = Work(job.without_rows(), chunks)
        with (
            progress_bar(show=progress, total=job.count, initial=there, desc=job.kind, unit="row", leave=False) as bar,
            engine(client, work) as workers,
        ):
            _finish(workers, job, chunks, left, bar)
    return chunks.array


def _finish(workers: Engine, job: Job, chunks: Chunked, left: list[int], bar: Any) -> None:
    """Hand out chunks until all are done: those that fail, and those whose worker has died, once more a round."""
    failed: Counter[int] = Counter()
    waited = 0  # rounds in which nothing was done
    done = chunks.count - len(left)

    def so_far() -> str:
        return f"{done} of {chunks.count} chunks are in {chunks.name} and stay valid; the same call goes on there"

    while left:
        finished, last = set(), None
        tasks = (Task(number, *(where := chunks.bounds(number)), job.row_options(*where)) for number in left)
        try:
            for number, error in workers.outcomes(tasks):
                if error is None:
                    finished.add(number)
                    done += 1
                    bar.update(chunks.rows(number))
                elif isinstance(error, FastdiffError):
                    error.add_note(so_far())
                    raise error
                else:
                    failed[number] += 1
                    last = error
                    log.warning("chunk %d: %s: %s", number, type(error).__name__, error)
                    if failed[number] > RETRIES:
                        words = f"chunk {number} has failed {failed[number]} times: {type(error).__name__}: {error}"
                        raise BackendError(f"{words}. {so_far()}") from error
        except LostEngine as error:
            last = error
            if not workers.comes_again:
                raise BackendError(f"{error}. {so_far()}") from error
            log.warning("%s", error)
        left = [number for number in left if number not in finished]
        waited = 0 if finished else waited + 1
        if left and waited > RETRIES:
            raise BackendError(f"nothing was done in {waited} rounds: {last}. {so_far()}") from last
