"""How alike two sets of series are: correlations over time and between channels, and whether networks tell them apart.

Series are (N, T), or (N, T, C) with several channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_array, check_int, check_room, check_seed
from fastdiff.metrics.gru import GRUs, sigmoid
from fastdiff.noise import Draw, Stream, philox_words

CHUNK_ROWS = 1024  # that are looked at at once
SEEN = 0.8  # of the rows, from which a network learns to tell them apart

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


class Score(NamedTuple):
    """Of several networks: the mean, its standard error, and each network's.

    Examples
    --------
    >>> score = fd.metrics.Score.of(np.array([1.0, 3.0]))
    >>> float(score.mean), float(score.stderr)
    (2.0, 1.0)
    """

    mean: float
    stderr: float
    values: Floats

    @classmethod
    def of(cls, values: Floats) -> Score:
        """Return the mean of some networks' scores, with its standard error: NaN where there is one alone.

        Examples
        --------
        >>> float(fd.metrics.Score.of(np.array([1.0, 3.0])).mean)
        2.0
        """
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(values.mean()), error, values)


def autocorrelation(X: Any, *, lags: int | None = None) -> Floats:
    """Autocorrelation of series, channel by channel.

    ``mean (x_t - m)(x_{t + k} - m) / mean (x_t - m)^2``, the means over all rows and all moments that there are, m that
    of the channel: series are taken for stationary, and a trend counts as correlation.

    Parameters
    ----------
    X : (N, T) or (N, T, C) array
    lags : int, optional
        The largest k, by default T - 1.

    Returns
    -------
    (lags + 1, C) float64
        1 at lag 0; NaN in a channel that is constant. Takes O(N T lags) time for a channel.

    Examples
    --------
    >>> x = np.sin(np.arange(400) * np.pi / 2).reshape(1, 400, 1)
    >>> fd.metrics.autocorrelation(x, lags=2).round(2).ravel().tolist()
    [1.0, 0.0, -1.0]
    """
    x, lags = _lags(X, lags, "X")
    return np.einsum("kcc->kc", _correlations(x, lags))


def autocorrelation_error(X: Any, Y: Any, *, lags: int | None = None) -> float:
    """Mean absolute difference of `autocorrelation` over lags 1 .. `lags` and channels.

    Parameters
    ----------
    X : (N, T) or (N, T, C) array
    Y : (M, T) or (M, T, C) array
    lags : int, optional
        By default T - 1; the last ones are means over few moments.

    Returns
    -------
    float
        Between 0 and 2; that of two real sets is the floor. Channels that are constant in both count 0, in one of them
        1 at every lag.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(20, 30, 2))
    >>> fd.metrics.autocorrelation_error(x, x)
    0.0
    """
    x, y, lags = _two(X, Y, lags)
    if lags < 1:
        raise ArgumentError("lags", str(lags), "at least 1")
    found = (np.nan_to_num(np.einsum("kcc->kc", _correlations(each, lags))[1:]) for each in (x, y))
    constant = [each.max(axis=(0, 1)) == each.min(axis=(0, 1)) for each in (x, y)]
    difference = np.abs(np.subtract(*found))
    difference[:, constant[0] != constant[1]] = 1.0
    return float(difference.mean())


def cross_correlation_error(X: Any, Y: Any, *, lags: int = 0) -> float:
    """Mean absolute difference of the correlations of different channels, over pairs and lags 0 .. `lags`.

    That of channels i and j at lag k is ``mean (x_it - m_i)(x_jt+k - m_j) / (s_i s_j)``, as in `autocorrelation`.

    Parameters
    ----------
    X : (N, T, C) array
        At least 2 channels.
    Y : (M, T, C) array
    lags : int, optional
        By default 0: at the same moment. (Diffusion-TS, Yuan and Qiao 2024, adds these up and divides by 10.)

    Returns
    -------
    float
        Between 0 and 2. A channel that is constant is correlated with none.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(20, 30, 2))
    >>> fd.metrics.cross_correlation_error(x, x)
    0.0
    """
    x, y, lags = _two(X, Y, lags)
    C = x.shape[2]
    if C < 2:
        raise ArgumentError("X", f"shape {np.shape(X)}", "at least 2 channels: (N, T, C)")
    others = ~np.eye(C, dtype=bool)
    found = (np.nan_to_num(_correlations(each, lags)[:, others]) for each in (x, y))
    return float(np.abs(np.subtract(*found)).mean())


def discriminative_score(
    real: Any,
    generated: Any,
    *,
    units: int | None = None,
    networks: int = 10,
    steps: int = 2000,
    batch: int = 128,
    seed: int = 0,
) -> Score:
    """TimeGAN's discriminative score: how well a recurrent network tells generated series from real ones.

    A GRU reads four fifths of each set, learns from its last state which set a series is of, and is asked about the
    others: the score is |accuracy - 1/2|, 0 where it can only guess (Yoon et al. 2019, section 5, and their code).

    Parameters
    ----------
    real : (N, T) or (N, T, C) array
    generated : (M, T) or (M, T, C) array
        All values are divided by the real ones' range, channel by channel.
    units : int, optional
        Of the GRU; by default C // 2, as TimeGAN has it, but at least 2. So few see little: 32 see more.
    networks : int, optional
        How many are trained, each with a split, weights and batches of its own.
    steps, batch : int, optional
        Steps of Adam, and rows of each set in a batch, drawn with replacement.
    seed : int, optional
        Of all of that: stream PROBE of the noise law.

    Returns
    -------
    Score
        Mean over the networks, standard error, and each network's. An absolute value is not 0 by chance: the score of
        two real sets of these sizes is the floor to compare with.

    Notes
    -----
    Ten networks of 2 units over 24 x 5 values take about 25 s on one core, of 32 units 5 minutes; memory is that of
    the data in float32 and of a batch of every network.

    Examples
    --------
    >>> real, generated = np.random.default_rng(0).normal(size=(2, 20, 6, 1))
    >>> 0 <= fd.metrics.discriminative_score(real, generated, networks=2, steps=2).mean < 9
    True
    """
    both = _scaled(real, generated, least=5)
    options = check_int("networks", networks, low=1), check_int("batch", batch, low=1)
    networks, batch = options
    units = max(2, both[0].shape[2] // 2) if units is None else check_int("units", units, low=1)
    _check_size(networks, units, batch, both[0])
    draw = Draw(check_seed(seed), Stream.PROBE)
    splits = [_orders(networks, len(rows), draw.after(networks * k)) for k, rows in enumerate(both)]
    seen = [orders[:, : int(orders.shape[1] * SEEN)] for orders in splits]
    nets = GRUs(networks, both[0].shape[2], units, draw.at(1))

    def slope(out: Array) -> Array:
        """Of the mean cross entropy of each set: real series are of class 1."""
        sigmoid(out)
        out[:, :, :batch] -= 1
        out /= batch
        return out

    def drawn(step: int) -> tuple[Array, Callable[[Array], Array]]:
        picked = _picked(networks, batch, [orders.shape[1] for orders in seen], draw.at(2 + step))
        rows = (
            each[np.take_along_axis(orders, at, axis=1)] for each, orders, at in zip(both, seen, picked, strict=True)
        )
        return _in_time(np.concatenate(list(rows), axis=1)), slope

    nets.train(check_int("steps", steps, low=0), drawn, last=True)
    right = np.zeros(networks)
    held = [orders[:, int(orders.shape[1] * SEEN) :] for orders in splits]
    for rows, orders, is_real in zip(both, held, (True, False), strict=True):
        for start in range(0, orders.shape[1], CHUNK_ROWS):
            out = nets.outputs(_in_time(rows[orders[:, start : start + CHUNK_ROWS]]), last=True)
            right += ((out > 0) == is_real).sum(axis=(1, 2))
    return Score.of(np.abs(right / sum(orders.shape[1] for orders in held) - 0.5))


def predictive_score(
    real: Any,
    generated: Any,
    *,
    units: int | None = None,
    networks: int = 10,
    steps: int = 5000,
    batch: int = 128,
    seed: int = 0,
) -> Score:
    """TimeGAN's predictive score: how well a network that learned from generated series predicts real ones.

    A GRU reads all channels but the last up to a moment and says the last channel's next value; it learns from
    generated series, and its mean absolute error on all real ones is the score (Yoon et al. 2019, section 5, and their
    code: a sigmoid of its output, the absolute error as the loss).

    Parameters
    ----------
    real, generated, units, networks, steps, batch, seed
        As for `discriminative_score`; series of one channel are predicted from themselves.

    Returns
    -------
    Score
        In units of the real last channel's range. The score of real series, learned from others, is the floor.

    Examples
    --------
    >>> real, generated = np.random.default_rng(0).normal(size=(2, 20, 6, 1))
    >>> 0 <= fd.metrics.predictive_score(real, generated, networks=2, steps=2).mean < 9
    True
    """
    x, y = _scaled(real, generated, least=1)
    if x.shape[1] < 2:
        raise ArgumentError("real", f"{x.shape[1]} moments", "at least 2")
    networks, batch = check_int("networks", networks, low=1), check_int("batch", batch, low=1)
    C = x.shape[2]
    units = max(2, C // 2) if units is None else check_int("units", units, low=1)
    draw = Draw(check_seed(seed), Stream.PROBE)
    given = slice(None) if C == 1 else slice(None, -1)
    _check_size(networks, units, batch, x)
    nets = GRUs(networks, max(1, C - 1), units, draw.at(1))

    def drawn(step: int) -> tuple[Array, Callable[[Array], Array]]:
        rows = _in_time(y[_picked(networks, batch, [len(y)], draw.at(2 + step))[0]])
        target = rows[:, 1:, -1]

        def slope(out: Array) -> Array:
            sigmoid(out)
            return np.asarray(np.sign(out - target) * out * (1 - out) / (batch * target.shape[1]), out.dtype)

        return np.ascontiguousarray(rows[:, :-1, given]), slope

    nets.train(check_int("steps", steps, low=0), drawn, last=False)
    error = np.zeros(networks)
    for start in range(0, len(x), CHUNK_ROWS):
        rows = _in_time(np.repeat(x[None, start : start + CHUNK_ROWS], networks, axis=0))
        out = nets.outputs(np.ascontiguousarray(rows[:, :-1, given]), last=False)
        sigmoid(out)
        error += np.abs(out - rows[:, 1:, -1]).sum(axis=(1, 2), dtype=np.float64)
    return Score.of(error / (len(x) * (x.shape[1] - 1)))


def _check_size(networks: int, units: int, batch: int, x: Array) -> None:
    """Refuse networks that cannot be, by the larger of their matrices and of their states."""
    largest = max((networks, "networks"), (units, "units"), (batch, "batch"))[1]
    check_room(largest, (networks, units, max(3 * units, batch * x.shape[1])))


def _series(name: str, X: Any) -> Array:
    """Series as (N, T, C)."""
    x = check_array(name, X)
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ArgumentError(name, f"shape {x.shape}", "series (N, T) or (N, T, C)")
    return x if x.ndim == 3 else x[:, :, None]


def _lags(X: Any, lags: int | None, name: str) -> tuple[Array, int]:
    x = _series(name, X)
    last = x.shape[1] - 1
    return x, last if lags is None else check_int("lags", lags, low=0, high=last)


def _two(X: Any, Y: Any, lags: int | None) -> tuple[Array, Array, int]:
    x, lags = _lags(X, lags, "X")
    y = _series("Y", Y)
    if y.shape[1:] != x.shape[1:]:
        raise ArgumentError("Y", f"shape {np.shape(Y)}", f"rows like those of X, of shape {np.shape(X)}")
    return x, y, lags


def _correlations(x: Array, lags: int) -> Floats:
    """Correlations of channel i with channel j later by k, (lags + 1, C, C); NaN where one is constant."""
    _, T, C = x.shape
    mean = x.mean(axis=(0, 1), dtype=np.float64)
    sums = np.zeros((lags + 1, C, C))
    for start in range(0, len(x), CHUNK_ROWS):
        some = x[start : start + CHUNK_ROWS] - mean
        for k in range(lags + 1):
            sums[k] += np.tensordot(some[:, : T - k], some[:, k:], axes=((0, 1), (0, 1)))
    moments = sums / (len(x) * (T - np.arange(lags + 1)))[:, None, None]
    varied = x.max(axis=(0, 1)) > x.min(axis=(0, 1))
    deviation = np.sqrt(np.where(varied, np.diagonal(moments[0]), np.nan))
    return np.asarray(moments / np.multiply.outer(deviation, deviation))


def _scaled(real: Any, generated: Any, least: int) -> tuple[Array, Array]:
    """Both sets in the real one's range, as (N, T, C) float32."""
    x, y = _series("real", real), _series("generated", generated)
    if y.shape[1:] != x.shape[1:]:
        raise ArgumentError("generated", f"shape {np.shape(generated)}", f"rows like the real ones, {np.shape(real)}")
    for name, rows in (("real", x), ("generated", y)):
        if len(rows) < least:
            raise ArgumentError(name, f"{len(rows)} rows", f"at least {least}")
    low = x.min(axis=(0, 1)).astype(np.float64)
    width = x.max(axis=(0, 1)) - low
    width[width == 0] = 1
    return ((x - low) / width).astype(np.float32), ((y - low) / width).astype(np.float32)


def _orders(networks: int, rows: int, draw: Draw) -> npt.NDArray[np.int64]:
    """For every network the rows in an order of its own, (networks, rows)."""
    words = philox_words(networks, -(-rows // 4), draw).reshape(networks, -1)[:, :rows]
    return np.argsort(words, axis=1, kind="stable")


def _picked(networks: int, batch: int, counts: list[int], draw: Draw) -> list[npt.NDArray[np.int64]]:
    """For every network places (networks, batch) in each of some sets of so many rows, with replacement."""
    words = philox_words(networks, -(-batch * len(counts) // 4), draw).reshape(networks, -1).astype(np.uint64)
    return [
        ((words[:, k * batch : (k + 1) * batch] * np.uint64(count)) >> np.uint64(32)).astype(np.int64)
        for k, count in enumerate(counts)
    ]


def _in_time(rows: Array) -> Array:
    """(K, rows, T, C) as (K, T, C, rows)."""
    return np.ascontiguousarray(np.moveaxis(rows, 1, 3))
