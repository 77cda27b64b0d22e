"""Running a sampler's table over a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from fastdiff.backends import Backend, Row, backend_for
from fastdiff.conditioning import METHODS, OWN_NOISE, ConditionedEvaluator, plan
from fastdiff.denoiser import Denoiser, Evaluator, asked_on, checked_asked, denoiser_of, memory_of
from fastdiff.errors import (
    ArgumentError,
    check_array,
    check_callable,
    check_choice,
    check_flags,
    check_int,
    check_room,
    check_seed,
    is_on_device,
)
from fastdiff.guidance import guided
from fastdiff.noise import Draw, Stream, check_rows
from fastdiff.noise_shape import NoiseShape
from fastdiff.observations import Given, observations
from fastdiff.process import (
    BATCH_VALUES,
    NoiseSource,
    ShapedNoise,
    _copy,
    _shaped,
    _states,
    _stepper,
    _width,
    to_caller,
)
from fastdiff.progress import bar as progress_bar
from fastdiff.samplers import Sampler

Array = Any


def sample(
    denoiser: Any,
    sampler: Sampler,
    *,
    n: int | None = None,
    shape: tuple[int, ...] | int | None = None,
    seed: int = 0,
    first_sample: int = 0,
    batch: int | None = None,
    backend: str | Backend = "auto",
    initial: Any = None,
    labels: Any = None,
    covariates: Any = None,
    guidance: float | None = None,
    guidance_interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
    trajectory: bool = False,
    callback: Callable[[int, int, Array], Any] | None = None,
    progress: bool = False,
    noise_shape: ShapedNoise | None = None,
    given: Given | None = None,
    method: str = "auto",
    return_evidence: bool = False,
) -> Any:
    """Draw samples by running a sampler's table over a denoiser.

    Parameters
    ----------
    denoiser : callable, object with ``predict``, or `Denoiser`
        Called as ``denoiser(x, t)``, or ``denoiser(x, t, labels)``, with x (n, ...) and an int t, it returns an array
        like x in the table's prediction. Where it has attributes ``T``, ``prediction`` or ``shape``, they must agree
        with the table.
    sampler : Sampler
        From `fastdiff.samplers`.
    n : int, optional
        Number of samples; 16, or as many as `initial` holds.
    shape : tuple of int, optional
        Shape of one sample; by default the denoiser's.
    seed, first_sample : int, optional
        Sample k has the noise of row ``first_sample + k``, whatever n and `batch` are.
    batch : int, optional
        At most this many samples go to the denoiser at once; by default as many as have four million values. Bounds
        memory, changes no bits of our networks.
    backend : str or Backend, optional
    initial : (n, ...) array, optional
        Start from this state at the table's first timestep, instead of from noise.
    labels : int or (n,) int array, optional
        The class of every sample, for a denoiser that has classes; it gets them as (n,) int64.
    covariates : (k,), (n, k) or (n, ..., k) array, optional
        Numbers that every sample, or each of its points, is asked for, in the denoiser's own range, for one that has
        covariates.
    guidance, guidance_interval, rescale : optional
        Take the denoiser `fastdiff.Guided` with this weight, interval and rescaling; see there.
    trajectory : bool, optional
        Also return the states of all rows.
    callback : callable, optional
        ``callback(i, t, x)`` after row i; x (n, ...) is a read-only view of the state, to be copied if it is kept. A
        true result stops, and the samples are returned as they are.
    progress : bool, optional
        Show a progress bar.
    noise_shape : NoiseShape, optional
        Covariance S of the noise that the denoiser takes away; by default white. The samples are L times those of the
        white sampler with the denoiser u -> L^-1 denoiser(L u). Denoiser, `initial`, callback and results are in the
        data's space. The table must not clip. Observations are of samples, A being A L for whitened states.
    given : Known, Linear or Weight, or a list of them, optional
        What is known of the samples, in the denoiser's space: n draws are made for each observation. Draw k for
        observation i has the noise of sample ``i 2^20 + first_sample + k``. Labels are one for each observation.
    method : {"auto", "tmpd", "pigdm", "dps", "replace", "repaint", "smc"}, optional
        How, see `fastdiff.conditioning`; "auto" is "tmpd", and the only one for a network that is told what is known,
        see `fastdiff.masks`. Of these "smc" is right in the limit of many draws, and the
        others are approximations: "tmpd" is exact for normal data in the limit of many rows.
    return_evidence : bool, optional
        With "smc": also return the logarithm of the density of each observation under the table's samples.

    Returns
    -------
    x : (n, ...) float32
        float64 on the numpy backend where `initial` is float64. (n, N, ...) for N observations; values that are known
        without noise are to the bit those that were given, in a dtype that holds these.
    evidence : (N,) float64, or float, if `return_evidence`
    path : (rows + 1, n, ...), if `trajectory`
        The states, noise first.

    Raises
    ------
    ArgumentError
        An argument's shape, dtype or value; a denoiser that disagrees with the table, or whose output has another
        shape than x; a table that clips, with a noise shape.

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> exact = fd.denoisers.Gaussian(np.zeros(2), np.eye(2), s)
    >>> fd.sample(exact, fd.samplers.ddim(s, 10), n=4, shape=(2,), seed=0).shape
    (4, 2)
    """
    if not isinstance(sampler, Sampler):
        raise ArgumentError("sampler", type(sampler).__name__, "a table from fastdiff.samplers")
    check_flags(trajectory=trajectory, progress=progress, return_evidence=return_evidence)
    check_callable("callback", callback)
    be = backend_for(backend, initial=initial)
    source = denoiser_of(denoiser)
    if guidance is not None:
        source = guided(source, guidance, interval=guidance_interval, rescale=rescale)
    elif guidance_interval is not None or rescale:
        raise ArgumentError("guidance_interval, rescale", f"{guidance_interval}, {rescale}", "a guidance beside them")
    check_agreement(source, sampler)
    states = None if initial is None else _states("initial", initial, be)
    shape = _sample_shape(source.shape, shape, states)
    width = _width((0, *shape))
    shaped = _shaped(noise_shape, width)
    if shaped is not None:
        refuse_clip(sampler)
        if sampler.learned_variance:
            raise ArgumentError("sampler", "a table for a learned variance", "another, with a noise_shape")
    on_device = is_on_device(initial) if states is not None else backend != "auto"
    n = check_int("n", (16 if states is None else len(states)) if n is None else n, low=0)
    seed, first_sample = check_seed(seed), check_rows(first_sample, n)
    planned = None
    check_choice("method", method, ("auto", *METHODS))
    if given is not None:
        if shaped is not None and not isinstance(shaped, NoiseShape):
            raise ArgumentError("noise_shape", type(shaped).__name__, "a fastdiff.NoiseShape, with observations")
        planned = plan(source, sampler, observations(given, shape), method, n, first_sample, shaped)
        source, sampler = planned.source, planned.sampler
    particles = planned is not None and planned.method == "smc"
    if return_evidence and not particles:
        raise ArgumentError("return_evidence", "True", "given observations and method='smc'")
    if particles and (trajectory or callback is not None):
        raise ArgumentError("method", "'smc' with a trajectory or a callback", "another: resampled states have no path")
    rows = n if planned is None else planned.draws.rows
    check_room("n" if n > width else "shape", (rows, width), np.float64)
    if states is not None and rows != n:
        raise ArgumentError("initial", "a state, with several observations", "None")
    if states is not None:
        x = _copy(be, check_array("initial", states, shape=(n, *shape), finite=False).reshape(n, width))
    else:
        x = be.empty((rows, width))
    asked = checked_asked(source, labels, covariates, n if planned is None else planned.known.count or n, dtype=x.dtype)
    if planned is not None and planned.known.count is not None:
        asked = cast(tuple[Any, Any], tuple(part if part is None else np.repeat(part, n, axis=0) for part in asked))
    draw, evaluator = Draw(seed, Stream.STEP, first_row=first_sample if planned is None else 0), source.on(be, shape)
    filler = planned.draws if planned is not None else shaped
    if batch is None:
        batch = max(1, BATCH_VALUES // (width * (1 if planned is None else planned.most)))
    else:
        batch = check_int("batch", batch, low=1)
    if particles:  # of one observation, they stay together
        batch = max(1, batch // max(n, 1)) * max(n, 1)
    if initial is None:
        fill = be.normal if filler is None else partial(filler.fill, be)
        fill(x, draw.of(Stream.INIT))

    table, clip = sampler.rows, sampler.clip
    batches = [slice(i, min(i + batch, rows)) for i in range(0, rows, batch)]
    inputs = [asked_on(be, source, *(None if array is None else array[part] for array in asked)) for part in batches]
    parts = [(part, draw.after(part.start), chosen) for part, chosen in zip(batches, inputs, strict=True)]

    def finished(states: Array) -> Array:
        if planned is None:
            return to_caller(be, states.reshape(n, *shape), on_device)
        done = planned.finished(be.to_numpy(states), shape)
        return be.asarray(done, done.dtype) if on_device else done

    if planned is not None and particles:
        evidence = planned.run_particles(evaluator, x, parts)
        x = finished(x)
        return (x, evidence if planned.known.count is not None else float(evidence[0])) if return_evidence else x
    after = None if planned is None else planned.replacement(be)
    own_noise = filler is None or (planned is not None and planned.method in OWN_NOISE)
    whole = not progress or (isinstance(evaluator, ConditionedEvaluator) and evaluator.whole(x, table, draw))
    if own_noise and whole and not (trajectory or callback):
        with progress_bar(show=progress, total=rows, desc="sampling", leave=False) as bar:
            for part, drawn, chosen in parts:
                evaluator.run_table(x[part], table, clip, drawn, chosen)
                bar.update(len(x[part]))
        return finished(x)

    step = evaluator.step if filler is None or own_noise else _shaped_step(evaluator, x[:batch], filler)
    path = be.empty((len(table) + 1, rows, width), x.dtype) if trajectory else None
    if path is not None:
        path[0] = x
    # A callback sees all samples after each row; without one a batch runs to its end before the next one starts.
    groups = [parts] if callback is not None else [[part] for part in parts]
    done = len(table)
    with progress_bar(show=progress, total=len(table) * len(groups), desc="sampling", leave=False) as bar:
        for group in groups:
            memories = [memory_of(be, x[part], table) for part, _, _ in group]
            for done, row in enumerate(table, start=1):
                for (part, drawn, chosen), memory in zip(group, memories, strict=True):
                    step(x[part], memory, row, clip, drawn, chosen)
                    if after is not None:
                        after(done - 1, x[part], drawn)
                    if path is not None:
                        path[done, part] = x[part]
                bar.update()
                if callback is not None:
                    shown = x.reshape(n, *shape) if planned is None else planned.shaped(x, shape)
                    if isinstance(shown, np.ndarray):  # others cannot be protected
                        shown.flags.writeable = False
                    if callback(done - 1, row.t, shown):
                        break
    if path is None:
        return finished(x)
    path = path[: done + 1].reshape(done + 1, n, *shape) if planned is None else planned.shaped(path[: done + 1], shape)
    return finished(x), to_caller(be, path, on_device)


def refuse_clip(sampler: Sampler) -> None:
    """Shaped noise is white noise on L^-1 x, and bounds of that x0 would not be bounds of the data."""
    if sampler.clip is not None:
        raise ArgumentError("sampler", f"clip {sampler.clip}", "clip None with a noise_shape: it would bound L^-1 x0")


def _shaped_step(evaluator: Evaluator, like: Array, shaped: NoiseSource) -> Callable[..., None]:
    """`Evaluator.step` with shaped noise, for states no longer than `like`."""
    take = _stepper(evaluator.be, like, shaped)

    def step(x: Array, memory: tuple[Array, ...], row: Row, clip: Any, draw: Draw, labels: Array = None) -> None:
        out = evaluator.evaluate(x, row.t, labels) if row.evaluates else None
        take(x, out, memory, row, clip, draw)

    return step


def check_agreement(denoiser: Denoiser, sampler: Sampler) -> None:
    if denoiser.T not in (None, sampler.schedule.T):
        raise ArgumentError("denoiser", f"T = {denoiser.T}", f"T = {sampler.schedule.T}, the sampler's schedule")
    if denoiser.prediction not in (None, sampler.prediction):
        what = f"prediction {denoiser.prediction!r}"
        raise ArgumentError("denoiser", what, f"{sampler.prediction!r}, the sampler's prediction")
    if sampler.learned_variance and not getattr(denoiser, "learned_variance", False):
        wants = "one that has: the table says how far a step's noise follows it"
        raise ArgumentError("denoiser", "one without a learned variance", wants)


def _sample_shape(known: tuple[int, ...] | None, shape: Any, initial: Any) -> tuple[int, ...]:
    if shape is None:
        if known is not None:
            return known
        if initial is not None:
            return tuple(initial.shape[1:])
        raise ArgumentError("shape", "None", "the shape of one sample: this denoiser does not tell it")
    sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
    wanted = tuple(check_int("shape", size, low=1) for size in sizes)
    if known is not None and known != wanted:
        raise ArgumentError("shape", str(wanted), f"{known}, the shape that the denoiser works on")
    return wanted
