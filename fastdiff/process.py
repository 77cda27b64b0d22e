"""The forward process and its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastdiff.backends import Backend, Row, backend_for
from fastdiff.errors import (
    ArgumentError,
    check_array,
    check_seed,
    check_timesteps,
    is_on_device,
    shown,
)
from fastdiff.noise import Draw, Stream, check_rows
from fastdiff.schedule import Schedule

Array = Any

BATCH_VALUES = 1 << 22  # that go to a denoiser at once where the caller does not say
BLOCK_VALUES = 1 << 18  # of a sum that NumPy takes: its terms stay in cache


class NoiseSource(Protocol):
    """What fills states with noise in place of `Backend.normal`."""

    def fill(self, be: Backend, out: Array, draw: Draw) -> None:
        """Fill `out` (n, d) with the noise that takes the place of the white noise of the noise law."""


@runtime_checkable
class ShapedNoise(NoiseSource, Protocol):
    """What a process needs of noise that is not white: `fastdiff.NoiseShape` is one."""

    d: int


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

    Examples
    --------
    >>> x0 = fd.data.harmonic_curves(4)
    >>> x_t, eps = fd.forward_noise(x0, 10, fd.Schedule.cosine(20), seed=0)
    >>> x_t.shape, eps.shape
    ((4, 50), (4, 50))
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
    noisy, eps = (to_caller(be, array.reshape(given.shape), is_on_device(x0)) for array in (noisy, eps))
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

    Examples
    --------
    >>> fd.forward_chain(fd.data.harmonic_curves(4), fd.Schedule.cosine(20), seed=0).shape
    (21, 4, 50)
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
    return to_caller(be, chain.reshape(schedule.T + 1, *given.shape), is_on_device(x0))


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

    Examples
    --------
    >>> s = fd.Schedule.cosine(20)
    >>> mean, var = fd.posterior(np.ones((1, 2)), 0, s, x0=np.zeros((1, 2)), backend='numpy')
    >>> mean.tolist(), float(np.max(var))
    ([[0.0, 0.0]], 0.0)
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
    return to_caller(be, mean, on_device), to_caller(be, spread, on_device)


def _shaped(noise_shape: Any, width: int) -> ShapedNoise | None:
    if noise_shape is None:
        return None
    if not isinstance(noise_shape, ShapedNoise):
        raise ArgumentError("noise_shape", type(noise_shape).__name__, "a fastdiff.NoiseShape, or None for white noise")
    if noise_shape.d != width:
        raise ArgumentError("noise_shape", shown(noise_shape), f"one of {width} values, as a sample has")
    return noise_shape


def _stepper(be: Backend, like: Array, shaped: NoiseSource | None) -> Callable[..., None]:
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


def to_caller(be: Backend, array: Array, on_device: bool) -> Array:
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
