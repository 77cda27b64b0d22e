"""The forward process, its posterior, and running a sampler over a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Backend, Row, backend_for
from fastdiff.denoiser import ANY_CLASSES, Denoiser, Evaluator, denoiser_of, memory_of
from fastdiff.errors import (
    ArgumentError,
    check_array,
    check_indices,
    check_int,
    check_seed,
    check_timesteps,
    is_on_device,
)
from fastdiff.noise import Draw, Stream, check_rows
from fastdiff.progress import bar as progress_bar
from fastdiff.samplers import Sampler
from fastdiff.schedule import Schedule

Array = Any

BATCH_VALUES = 1 << 22  # that go to a denoiser at once where the caller does not say
BLOCK_VALUES = 1 << 18  # of a sum that NumPy takes: its terms stay in cache


@runtime_checkable
class ShapedNoise(Protocol):
    """What a process needs of noise that is not white: `fastdiff.NoiseShape` is one."""

    d: int

    def fill(self, be: Backend, out: Array, draw: Draw) -> None:
        """Fill `out` (n, d) with the noise that takes the place of the white noise of the noise law."""


def _schedule(value: Any) -> Schedule:
    if not isinstance(value, Schedule):
        raise ArgumentError("schedule", type(value).__name__, "a fastdiff.Schedule")
    return value


def forward_noise(
    x0: Any,
    t: Any,
    schedule: Schedule,
    *,
    seed: int = 0,
    first_sample: int = 0,
    out: Any = None,
    backend: str | Backend = "auto",
    noise_shape: ShapedNoise | None = None,
) -> tuple[Array, Array]:
    """Draw x_t from q(x_t | x_0): x_t = signal_t x_0 + noise_t eps (Ho et al. 2020, eq. 4).

    Parameters
    ----------
    x0 : (N, ...) array
        Clean samples, floats or integers.
    t : int or (N,) int array
        Timesteps, 0 .. T - 1.
    schedule : Schedule
    seed, first_sample : int, optional
        Sample k of the seed gets the noise of row ``first_sample + k`` of stream FORWARD: the same at every t.
    out : (N, ...) array, optional
        Where x_t is written; C-contiguous, of the dtype of the result.
    backend : str or Backend, optional
    noise_shape : NoiseShape, optional
        Covariance S of eps; by default white. eps = L z with the z that white noise would be.

    Returns
    -------
    x_t, eps : (N, ...) arrays
        float32; float64 for float64 input to the numpy backend.

    Raises
    ------
    ArgumentError
        Shape, dtype or value of an argument.
    """
    be, schedule = backend_for(backend, x0=x0, t=t), _schedule(schedule)
    given = _states("x0", x0, be)
    clean = given.reshape(len(given), _width(given.shape))
    steps = be.asarray(check_timesteps(t, schedule.T, len(clean)), np.int64)
    shaped = _shaped(noise_shape, clean.shape[1])
    seed, first_sample = check_seed(seed), check_rows(first_sample, len(clean))
    eps = be.empty(clean.shape, clean.dtype)
    target = None
    if out is not None:
        _check_out(out, given, be, like=x0)
        if be.owns(out):
            target = out.reshape(clean.shape)
            clean = _copy(be, clean) if is_on_device(out) or np.may_share_memory(out, clean) else clean
    noisy = be.empty(clean.shape, clean.dtype) if target is None else target
    tables, draw = (schedule.signal, schedule.noise), Draw(seed, Stream.FORWARD, first_row=first_sample)
    if shaped is None:
        be.forward_noise(clean, steps, *tables, noisy, eps, draw)
    else:
        shaped.fill(be, eps, draw)
        signal, noise = (be.asarray(table, clean.dtype)[steps, None] for table in tables)
        for start in range(0, len(clean), rows := max(1, BLOCK_VALUES // clean.shape[1])):
            part = slice(start, start + rows)
            noisy[part] = signal[part] * clean[part] + noise[part] * eps[part]
    noisy, eps = (returned(be, array.reshape(given.shape), is_on_device(x0)) for array in (noisy, eps))
    if out is not None and target is None:
        out[...] = noisy
    return noisy if out is None else out, eps


def forward_chain(
    x0: Any,
    schedule: Schedule,
    *,
    seed: int = 0,
    first_sample: int = 0,
    backend: str | Backend = "auto",
    noise_shape: ShapedNoise | None = None,
) -> Array:
    """Run the Markov chain x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z (Ho et al. 2020, eq. 2), step by step.

    Parameters
    ----------
    x0 : (N, ...) array
        Clean samples.
    schedule : Schedule
    seed, first_sample : int, optional
        Noise of stream CHAIN: row ``first_sample + k``, step t.
    backend : str or Backend, optional
    noise_shape : NoiseShape, optional
        Covariance of the noise; by default white.

    Returns
    -------
    (T + 1, N, ...) array
        Entry 0 is x_0, entry t + 1 the state after timestep t.

    Raises
    ------
    ArgumentError
        Shape, dtype or value of an argument.
    """
    be, schedule = backend_for(backend, x0=x0), _schedule(schedule)
    given = _states("x0", x0, be)
    clean = given.reshape(len(given), _width(given.shape))
    seed, first_sample = check_seed(seed), check_rows(first_sample, len(clean))
    shaped, draw = _shaped(noise_shape, clean.shape[1]), Draw(seed, Stream.CHAIN, first_row=first_sample)
    step = _stepper(be, clean, shaped)
    chain = be.empty((schedule.T + 1, *clean.shape), clean.dtype)
    chain[0] = clean
    for t, (alpha, beta) in enumerate(zip(schedule.alphas, schedule.betas, strict=True)):
        chain[t + 1] = chain[t]
        row = Row(t, p=0, q=0, a=math.sqrt(alpha), b=0, s=math.sqrt(beta))
        step(chain[t + 1], None, (), row, None, draw)
    return returned(be, chain.reshape(schedule.T + 1, *given.shape), is_on_device(x0))


def posterior(
    x_t: Any,
    t: Any,
    schedule: Schedule,
    *,
    x0: Any = None,
    noise: Any = None,
    backend: str | Backend = "auto",
    noise_shape: ShapedNoise | None = None,
) -> tuple[Array, Array]:
    """Return mean and variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 6-7 and 11).

    From x_0: mean = signal_{t-1} beta_t / noise_t^2 x_0 + sqrt(alpha_t) noise_{t-1}^2 / noise_t^2 x_t.
    From the noise: mean = (x_t - beta_t / noise_t eps) / sqrt(alpha_t).
    Variance = noise_{t-1}^2 / noise_t^2 beta_t, which is 0 at t = 0.

    Parameters
    ----------
    x_t : (N, ...) array
        States at t.
    t : int or (N,) int array
        Timesteps, 0 .. T - 1.
    schedule : Schedule
    x0, noise : (N, ...) array
        Exactly one of them: the clean samples, or the noise in x_t.
    backend : str or Backend, optional
    noise_shape : NoiseShape, optional
        Covariance S of the noise; by default white. The law is N(mean, var S): neither result depends on S.

    Returns
    -------
    mean : (N, ...) array
        float32, or float64 for float64 input; computed in float64 on every backend.
    var : (N, 1, ...) float64
        Broadcasts against the mean.

    Raises
    ------
    ArgumentError
        None or both of x0 and noise, or shape, dtype or value of an argument; the noise, where the signal is 0.
    """
    schedule = _schedule(schedule)
    if (x0 is None) == (noise is None):
        raise ArgumentError("x0, noise", "both" if x0 is not None else "neither", "exactly one of them")
    be = backend_for(backend, x_t=x_t, x0=x0, noise=noise, t=t)
    given = check_array("x_t", x_t, min_ndim=1)
    name, value = ("x0", x0) if noise is None else ("noise", noise)
    other = check_array(name, value, shape=given.shape)
    _shaped(noise_shape, _width(given.shape))
    dtype = np.float64 if np.float64 in (given.dtype, other.dtype) else np.float32
    steps = be.asarray(check_timesteps(t, schedule.T, len(given)), np.int64)

    def at_steps(table: npt.NDArray[np.float64]) -> Array:
        return be.asarray(table, np.float64)[steps].reshape(-1, *(1,) * (given.ndim - 1))

    beta, alpha, variance = schedule.betas, schedule.alphas, schedule.noise**2
    if noise is None:
        signal, quieter = np.append(1.0, schedule.signal[:-1]), np.append(0.0, variance[:-1])
        of_state, of_other = np.sqrt(alpha) * quieter / variance, signal * beta / variance
    else:
        if schedule.signal[-1] == 0 and bool((steps == schedule.T - 1).any()):
            wants = "x0 there: the signal is 0, and the noise says nothing of it"
            raise ArgumentError("noise", f"the noise at t = {schedule.T - 1}", wants)
        root = np.sqrt(np.append(alpha[:-1], alpha[-1] or 1.0))
        of_state, of_other = 1 / root, -beta / (schedule.noise * root)
    state, other = (be.asarray(array, array.dtype) for array in (given, other))
    mean = (at_steps(of_state) * state + at_steps(of_other) * other).astype(dtype)
    spread, on_device = at_steps(schedule.posterior_variance), is_on_device(x_t)
    return returned(be, mean, on_device), returned(be, spread, on_device)


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
    trajectory: bool = False,
    callback: Callable[[int, int, Array], Any] | None = None,
    progress: bool = False,
    noise_shape: ShapedNoise | None = None,
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
        data's space. The table must not clip.

    Returns
    -------
    x : (n, ...) float32
        float64 on the numpy backend where `initial` is float64.
    path : (rows + 1, n, ...), if `trajectory`
        The states, noise first.

    Raises
    ------
    ArgumentError
        An argument's shape, dtype or value; a denoiser that disagrees with the table, or whose output has another
        shape than x; a table that clips, with a noise shape.
    """
    if not isinstance(sampler, Sampler):
        raise ArgumentError("sampler", type(sampler).__name__, "a table from fastdiff.samplers")
    be = backend_for(backend, initial=initial)
    source = denoiser_of(denoiser)
    _check_agreement(source, sampler)
    states = None if initial is None else _states("initial", initial, be)
    shape = _sample_shape(source.shape, shape, states)
    width = _width((0, *shape))
    shaped = _shaped(noise_shape, width)
    if shaped is not None:
        refuse_clip(sampler)
    on_device = is_on_device(initial) if states is not None else backend != "auto"
    if states is not None:
        n = check_int("n", len(states) if n is None else n, low=0)
        x = _copy(be, check_array("initial", states, shape=(n, *shape), finite=False).reshape(n, width))
    else:
        n = check_int("n", 16 if n is None else n, low=0)
        x = be.empty((n, width))
    given = _labels(source.classes, labels, n)
    seed, first_sample = check_seed(seed), check_rows(first_sample, n)
    draw, evaluator = Draw(seed, Stream.STEP, first_row=first_sample), source.on(be, shape)
    batch = max(1, BATCH_VALUES // width) if batch is None else check_int("batch", batch, low=1)
    if initial is None:
        fill = be.normal if shaped is None else partial(shaped.fill, be)
        fill(x, draw.of(Stream.INIT))

    rows, clip = sampler.rows, sampler.clip
    batches = [slice(i, min(i + batch, n)) for i in range(0, n, batch)]
    classes = [None if given is None else be.asarray(given[part], np.int64) for part in batches]
    parts = [(part, draw.after(part.start), chosen) for part, chosen in zip(batches, classes, strict=True)]
    if not (trajectory or callback or progress or shaped is not None):
        for part, drawn, chosen in parts:
            evaluator.run_table(x[part], rows, clip, drawn, chosen)
        return returned(be, x.reshape(n, *shape), on_device)

    step = evaluator.step if shaped is None else _shaped_step(evaluator, x[:batch], shaped)
    path = be.empty((len(rows) + 1, n, width), x.dtype) if trajectory else None
    if path is not None:
        path[0] = x
    # A callback sees all samples after each row; without one a batch runs to its end before the next one starts.
    groups = [parts] if callback is not None else [[part] for part in parts]
    done = len(rows)
    with progress_bar(show=progress, total=len(rows) * len(groups), desc="sampling", leave=False) as bar:
        for group in groups:
            memories = [memory_of(be, x[part], rows) for part, _, _ in group]
            for done, row in enumerate(rows, start=1):
                for (part, drawn, chosen), memory in zip(group, memories, strict=True):
                    step(x[part], memory, row, clip, drawn, chosen)
                    if path is not None:
                        path[done, part] = x[part]
                bar.update()
                if callback is not None:
                    shown = x.reshape(n, *shape)
                    if isinstance(shown, np.ndarray):  # others cannot be protected
                        shown.flags.writeable = False
                    if callback(done - 1, row.t, shown):
                        break
    x = returned(be, x.reshape(n, *shape), on_device)
    if path is None:
        return x
    return x, returned(be, path[: done + 1].reshape(done + 1, n, *shape), on_device)


def refuse_clip(sampler: Sampler) -> None:
    """Shaped noise is white noise on L^-1 x, and bounds of that x0 would not be bounds of the data."""
    if sampler.clip is not None:
        raise ArgumentError("sampler", f"clip {sampler.clip}", "clip None with a noise_shape: it would bound L^-1 x0")


def _shaped(noise_shape: Any, width: int) -> ShapedNoise | None:
    if noise_shape is None:
        return None
    if not isinstance(noise_shape, ShapedNoise):
        raise ArgumentError("noise_shape", type(noise_shape).__name__, "a fastdiff.NoiseShape, or None for white noise")
    if noise_shape.d != width:
        raise ArgumentError("noise_shape", repr(noise_shape), f"one of {width} values, as a sample has")
    return noise_shape


def _stepper(be: Backend, like: Array, shaped: ShapedNoise | None) -> Callable[..., None]:
    """`Backend.sampler_step` for states no longer than `like`: (x, out, memory, row, clip, draw).

    Shaped noise is drawn by itself and added as the e term of a second row, which rounds like the s term of the first.
    """
    noise = like if shaped is None else be.empty(like.shape, like.dtype)

    def step(
        x: Array,
        out: Array | None,
        memory: tuple[Array, ...],
        row: Row,
        clip: tuple[float, float] | None,
        draw: Draw,
    ) -> None:
        draw = draw.at(row.step)
        be.sampler_step(x, out, memory, row if shaped is None else row._replace(s=0.0), clip, draw)
        if shaped is not None and row.s != 0:
            z = noise[: len(x)]
            shaped.fill(be, z, draw)
            be.sampler_step(x, z, (), Row(row.t, p=0, q=0, a=1, b=0, e=row.s), None, draw)

    return step


def _shaped_step(evaluator: Evaluator, like: Array, shaped: ShapedNoise) -> Callable[..., None]:
    """`Evaluator.step` with shaped noise, for states no longer than `like`."""
    take = _stepper(evaluator.be, like, shaped)

    def step(x: Array, memory: tuple[Array, ...], row: Row, clip: Any, draw: Draw, labels: Array = None) -> None:
        out = evaluator.evaluate(x, row.t, labels) if row.evaluates else None
        take(x, out, memory, row, clip, draw)

    return step


def returned(be: Backend, array: Array, on_device: bool) -> Array:
    """A result as the caller's kind of array: NumPy, or left where the backend has it."""
    return array if on_device else be.to_numpy(array)


def _copy(be: Backend, array: Array) -> Array:
    """A copy in memory that the backend has allocated: it knows what to say where there is none."""
    copy = be.empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _check_out(out: Any, given: Array, be: Backend, *, like: Any) -> None:
    """`out` must be able to hold a result of the shape and dtype of `given`, and be of the kind of `like`."""
    kind = "a CuPy array on the backend's GPU" if is_on_device(like) else "a NumPy array"
    if not (be.owns(out) if is_on_device(like) else isinstance(out, np.ndarray)):
        where = f" on GPU {out.device.id}" if is_on_device(out) and hasattr(out, "device") else ""
        raise ArgumentError("out", type(out).__name__ + where, f"{kind} of {given.dtype} {given.shape}")
    if out.shape != given.shape or out.dtype != given.dtype:
        raise ArgumentError("out", f"{out.dtype} {out.shape}", f"{kind} of {given.dtype} {given.shape}")
    if not (out.flags.c_contiguous and (is_on_device(out) or out.flags.writeable)):
        raise ArgumentError("out", "a read-only or strided view", "a writable C-contiguous array")


def _states(argument: str, value: Any, be: Backend) -> Array:
    """`value` (N, ...) in the float type that the backend computes in; what that cannot hold is refused as infinite."""
    given = check_array(argument, value, min_ndim=1, finite=False)
    return be.asarray(check_array(argument, given, dtype=be.asarray(given[:0]).dtype))


def _width(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _check_agreement(denoiser: Denoiser, sampler: Sampler) -> None:
    if denoiser.T not in (None, sampler.schedule.T):
        raise ArgumentError("denoiser", f"T = {denoiser.T}", f"T = {sampler.schedule.T}, the sampler's schedule")
    if denoiser.prediction not in (None, sampler.prediction):
        what = f"prediction {denoiser.prediction!r}"
        raise ArgumentError("denoiser", what, f"{sampler.prediction!r}, the sampler's prediction")


def _labels(known: int | None, labels: Any, n: int) -> Any:
    """The class of every sample (n,) int64, or None, for a denoiser with so many classes."""
    if labels is None:
        if known not in (None, ANY_CLASSES):
            wants = f"a class from 0 to {known - 1} for each sample: this one has classes"
            raise ArgumentError("labels", "None", wants)
        return None
    if known is None:
        raise ArgumentError("labels", type(labels).__name__, "None: this network has no classes")
    return check_indices("labels", labels, known, n)


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
