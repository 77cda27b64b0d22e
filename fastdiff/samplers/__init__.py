"""Samplers as tables.

A sampler is a float64 table with the columns (t, p, q, a, b, c1, c2, c3, e, s, r). Whoever runs it starts from
x ~ N(0, I) and, row by row, calls the network and takes one fused step::

    out = network(x, t)
    m   = clip(p x + q out)
    x'  = a x + b m + c1 m1 + c2 m2 + c3 m3 + e out + s exp(r v) z,      z ~ N(0, I)

with the terms added in this order and a term with a zero coefficient not evaluated. m is what p and q make it: x0, or
the noise. m1, m2 and m3 are the m of the last three rows that called the network; a row with q = e = 0 calls no network
and is not remembered. v is the second output of a network that has learned its variance. The constructors here write
such tables; `Sampler` itself takes any other, so every sampler with three steps of memory is a new table and no new
code.

Throughout, ``alpha`` is the signal and ``sigma`` the noise of the schedule at a row's timestep; ``alpha'`` and
``sigma'`` are those of the next row, and 1 and 0 after the last. Nothing takes alpha^2 + sigma^2 for 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastdiff.errors import check_choice
from fastdiff.samplers.multistep import deis, dpmpp_2m, dpmpp_3m, dpmsolver, ipndm, lms, pndm, sa_solver, unipc
from fastdiff.samplers.singlestep import (
    consistency,
    ddim,
    ddpm,
    dpm2,
    dpm2_ancestral,
    dpmpp_2s,
    dpmpp_sde,
    dpmsolver_single,
    euler,
    euler_ancestral,
    heun,
    lcm,
    tcd,
)
from fastdiff.samplers.table import Clip, Sampler, check_schedule, options_of
from fastdiff.schedule import PREDICTIONS, Schedule

__all__ = [
    "PREDICTIONS",
    "Clip",
    "Sampler",
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_sde",
    "dpmsolver",
    "dpmsolver_single",
    "euler",
    "euler_ancestral",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "named",
    "names",
    "options_of",
    "pndm",
    "sa_solver",
    "tcd",
    "unipc",
]


class _Named(NamedTuple):
    make: Callable[..., Sampler]
    steps: int | None
    about: str


_SAMPLERS = {
    "ddpm": _Named(ddpm, None, "ancestral, all timesteps: the reference, for 100 and more"),
    "ddim": _Named(ddim, 50, "first order: the same start gives the same sample"),
    "dpmpp_2m": _Named(dpmpp_2m, 20, "second order: the usual choice, for 15 to 50 evaluations"),
    "dpmpp_3m": _Named(dpmpp_3m, 20, "third order: from 15 evaluations on"),
    "dpmpp_2s": _Named(dpmpp_2s, 10, "second order, two evaluations a step, remembers nothing"),
    "unipc": _Named(unipc, 10, "predictor and corrector: the choice for 5 to 15"),
    "deis": _Named(deis, 10, "continues the noise in log(noise / signal); no clipping"),
    "lms": _Named(lms, 20, "continues the noise in noise / signal, order 4; no clipping"),
    "heun": _Named(heun, 18, "EDM's, second order, two evaluations a step; has churn"),
    "dpm2": _Named(dpm2, 20, "midpoint rule, second order, two evaluations a step"),
    "pndm": _Named(pndm, 20, "continues the noise with fixed weights, order 2; no clipping"),
    "ipndm": _Named(ipndm, 20, "pndm that starts with lower orders; no clipping"),
    "dpmsolver": _Named(dpmsolver, 20, "dpmpp_2m before its improvement, of the noise; no clipping"),
    "dpmsolver_single": _Named(dpmsolver_single, 20, "orders 1 to 3 that begin anew every so many rows"),
    "sa_solver": _Named(sa_solver, 20, "predictor, corrector and noise on the way: for 30 and more"),
    "dpmpp_sde": _Named(dpmpp_sde, 20, "stochastic, two evaluations a step; no clipping"),
    "dpm2_ancestral": _Named(dpm2_ancestral, 20, "midpoint rule with ancestral noise"),
    "lcm": _Named(lcm, 4, "only for networks distilled to jump to the data"),
    "tcd": _Named(tcd, 8, "ddim that noises anew: for networks distilled to leap"),
    "consistency": _Named(consistency, 2, "lcm with the scalings of consistency models"),
    "euler": _Named(euler, 50, "ddim by another name, and churn; on flow, straight paths"),
    "euler_ancestral": _Named(euler_ancestral, 50, "ddim with ancestral noise: forgets errors, wants steps"),
}

UNCLIPPED = ("deis", "lms", "pndm", "ipndm", "dpmsolver", "dpmpp_sde")  # they remember the noise, or a mixture
RECLIPPED = ("ddim", "euler", "euler_ancestral", "tcd")  # they take ``reclip``
_OPEN = (
    dpmpp_2m,
    dpmpp_3m,
    dpmpp_2s,
    unipc,
    deis,
    dpmsolver,
    dpmsolver_single,
    sa_solver,
)  # by default they leave out t = 0


def names() -> list[str]:
    """Names of the samplers, as `named`, ``model.sample(sampler=)`` and ``fastdiff sample --sampler`` take them.

    Examples
    --------
    >>> fd.samplers.names()[:3]
    ['ddpm', 'ddim', 'dpmpp_2m']
    """
    return list(_SAMPLERS)


def about(name: str) -> str:
    """One line on the sampler of this name: what it is, and when to take it."""
    return _SAMPLERS[check_choice("name", name, _SAMPLERS)].about


def named(
    name: str,
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "noise",
    clip: Clip = None,
    **options: Any,
) -> Sampler:
    """The sampler of this name with its defaults.

    Parameters
    ----------
    name : str
        One of `names`.
    schedule : Schedule
        The schedule of the network.
    steps : int, optional
        Number of timesteps, which is the number of rows but for methods of two stages. None: all T for "ddpm", and
        otherwise as many as the method is usually run with (10 to 50), or as T allows.
    prediction : str, optional
        What the network predicts, one of `PREDICTIONS`.
    clip : float or (float, float), optional
        Bounds of x0, see `Sampler`.
    **options
        Of the function of that name.

    Returns
    -------
    Sampler

    Raises
    ------
    ArgumentError
        If the name is unknown (the message lists those known), or another argument is wrong.

    Examples
    --------
    >>> fd.samplers.named('ddim', fd.Schedule.cosine(20), 5, eta=1.0)
    <Sampler ddim: 5 rows of T=20, noise prediction>
    """
    check_schedule(schedule)
    make, usual, _ = _SAMPLERS[check_choice("name", name, _SAMPLERS)]
    if steps is None and usual is not None:
        steps = max(1, min(usual, schedule.T - 1 if make in _OPEN else schedule.T))
    return make(schedule, steps, prediction=prediction, clip=clip, **options)
