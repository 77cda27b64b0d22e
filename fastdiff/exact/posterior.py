"""The law of a Gaussian given linear observations, and how likely these were."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastdiff.errors import ArgumentError
from fastdiff.exact.moments import Float64, Moments
from fastdiff.observations import Given, Group, Observations, observations

DISAGREE = 1e-6
"""Share of what was seen by which exact observations may miss what a model can make: more than float32 rounds."""
SIGMAS = 10.0  # by which a value of no deviation but rounding may miss its mean


class Conditioned(NamedTuple):
    """What one Gaussian becomes under the observations of a `Group`.

    Attributes
    ----------
    laws : list of g Moments
    log_evidence : (g,) float64
        The log density of what was seen; minus infinity where the Gaussian cannot have made it.
    rank : int
        How many independent values were seen exactly. Where they are fewer than rows without noise, the density is
        that on the subspace on which the seen values can lie.
    """

    laws: list[Moments]
    log_evidence: Float64
    rank: int


def condition(law: Moments, group: Group, floor: float) -> Conditioned:
    """Return the posterior of a Gaussian x under ``y = A x + noise z``.

    With x = mean + F w, w standard normal, rows without noise are solved for w by a singular value decomposition of
    A F, which leaves directions of w that they do not see; rows with noise then narrow those by 1 / sqrt(1 + s^2), s
    being the singular values of A F / noise. So no variance is ever a difference. Deviations of the law up to `floor`
    are rounding, and count as 0.
    """
    g, m = group.y.shape
    if m == 0:
        return Conditioned([law] * g, np.zeros(g), 0)
    span, root = _coordinates(law, group.A, floor)
    rows, gap = group.A @ span, group.y - group.A @ law.mean
    exact = group.noise == 0
    shift, evidence, rank = np.zeros((g, span.shape[1])), np.zeros(g), 0
    if exact.any():
        seen = rows[exact] @ root
        left, spread, right = np.linalg.svd(seen)
        constant = floor * np.linalg.norm(group.A[exact], axis=1)  # so small a deviation of a seen value is rounding
        rank = int((spread > constant.max()).sum())
        left, spread = left[:, :rank], spread[:rank]
        along = gap[:, exact] @ left
        sizes = np.abs(group.y[:, exact]) + np.abs(group.A[exact]) @ np.abs(law.mean) + np.linalg.norm(seen, axis=1)
        missed = (np.abs(gap[:, exact] - along @ left.T) > DISAGREE * sizes + SIGMAS * constant).any(axis=1)
        weights = along / spread
        evidence -= np.square(weights).sum(axis=1) / 2 + np.log(spread).sum() + rank / 2 * math.log(2 * math.pi)
        evidence[missed] = -math.inf
        shift += weights @ right[:rank] @ root.T
        root = root @ right[rank:].T
    if not exact.all():
        noise = group.noise[~exact]
        left, spread, right = np.linalg.svd(rows[~exact] @ root / noise[:, None])
        gap = (gap[:, ~exact] - shift @ rows[~exact].T) / noise
        along = gap @ left[:, : len(spread)]
        beyond = np.square(gap - along @ left[:, : len(spread)].T).sum(axis=1)
        evidence -= (np.square(along / np.hypot(1, spread)).sum(axis=1) + beyond) / 2
        evidence -= np.log(np.hypot(1, spread)).sum() + np.log(noise).sum() + len(noise) / 2 * math.log(2 * math.pi)
        shift += (along * (spread / (1 + spread**2))) @ right[: len(spread)] @ root.T
        narrowed = np.ones(len(right))
        narrowed[: len(spread)] = 1 / np.hypot(1, spread)
        root = root @ right.T * narrowed
    basis, some, _ = np.linalg.svd(root)
    deviations = np.zeros(len(basis))
    deviations[: len(some)] = some
    basis, rest = span @ basis, law.rest if span.shape[1] < len(span) else 0.0
    return Conditioned([Moments(law.mean + span @ each, deviations, basis, rest) for each in shift], evidence, rank)


def _coordinates(law: Moments, A: Float64, floor: float) -> tuple[Float64, Float64]:
    """Orthonormal columns (d, k) outside which nothing is seen or varies but by `rest`, and a root (k, r) in them."""
    d, r = law.basis.shape
    if r == d or law.rest == 0:
        return law.basis, np.diag(np.where(law.deviations > floor, law.deviations, 0.0))
    span = np.linalg.qr(np.hstack([law.basis, A.T]))[0] if r + len(A) < d else np.eye(d)
    return span, law.root_in(span)


def linear_observations(given: Given, shape: tuple[int, ...], of: str) -> Observations:
    """Return observations under which a Gaussian, or a mixture of them, remains one.

    Raises
    ------
    ArgumentError
        There is a `Weight` among them, or as of `observations`.
    """
    observed = observations(given, shape)
    if observed.weights:
        wants = f"fd.Known or fd.Linear: with a weight {of} does not remain one (Empirical takes weights)"
        raise ArgumentError("given", "an fd.Weight", wants)
    return observed


def impossible(observed: Observations, i: int) -> ArgumentError:
    """Return the error for an observation that a model cannot have made."""
    which = "values seen" if observed.count is None else f"observation {i}: values seen"
    return ArgumentError(
        "given",
        f"{which} without noise that contradict each other, or what the model can make",
        "values that agree, or a noise above 0",
    )
