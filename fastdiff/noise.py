"""The noise law: every random number of fastdiff, as a function of seed, stream, step and row.

All randomness is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key is
the 64-bit seed, the counter names the draw,

    counter = (block q within the row, step, row bits 0..31, stream << 24 | row bits 32..55),

so a value depends on *which* value it is and on nothing else: not on the batch it is drawn in, the number of
threads, or the backend. A row of D values has Q = ceil(D / 4) blocks; the four words of block q make two
Box-Muller pairs, (w0, w1) for the values q and q + Q, (w2, w3) for the values q + 2Q and q + 3Q, and values at or
beyond D are dropped. Quarters instead of neighbours, because then every load and store is contiguous.

This module is the NumPy form, and the specification: logarithm, sine and cosine are float32 polynomials
evaluated in the order written here, one rounding per operation, so that any backend can repeat their bits.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdiff.errors import ArgumentError, check_choice, check_int, check_seed

NOISE_LAW_VERSION = 1
"""Stored in checkpoints; it changes whenever a bit of any draw changes."""

MAX_STEP = 2**32 - 1
MAX_ROW = 2**56 - 1


class Stream(IntEnum):
    """What a draw is for. Append only: the numbers are part of the noise law."""

    INIT = 0
    STEP = 1
    TRAIN_NOISE = 2
    TRAIN_TIME = 3
    BATCH = 4
    WEIGHTS = 5
    FORWARD = 6
    DATA = 7
    DROPOUT = 8
    CHAIN = 9
    AUGMENT = 10
    KNOWN = 11  # noise on observed values
    PROBE = 12  # normals and signs of estimates
    RESAMPLE = 13  # particles
    DROP = 14  # labels, covariates and masks that a training step leaves out


class Draw(NamedTuple):
    """Where noise comes from: rows of a stream of a seed, at a step, by the noise law.

    Attributes
    ----------
    seed : int
    stream : Stream
    step : int
    first_row : int
        Row of the first sample; those of the others follow.
    """

    seed: int
    stream: Stream | int
    step: int = 0
    first_row: int = 0

    def at(self, step: int) -> Draw:
        """The same at another step."""
        return self._replace(step=step)

    def of(self, stream: Stream) -> Draw:
        """The same of another stream."""
        return self._replace(stream=stream)

    def after(self, rows: int) -> Draw:
        """The draw of what comes so many rows later."""
        return self._replace(first_row=self.first_row + rows)


# Philox4x32: multipliers of the two products, and the Weyl increments of the two key words.
PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

# log(1 + m) = m - m^2/2 + m^3 LOG(m) for m from sqrt(1/2) - 1 to sqrt(2) - 1, least maximum error 2.2e-8 in LOG;
# sin x = x + x^3 SIN(x^2), cos x = 1 - x^2/2 + x^4 COS(x^2) for |x| <= pi/4, errors 2e-8 and 2e-9. Constant term first.
LOG_COEFFICIENTS = (
    0.3333333, -0.2499998, 0.20000689, -0.16669151, 0.14251156, -0.123967, 0.11634664, -0.11659936, 0.073325336,
)  # fmt: skip
SIN_COEFFICIENTS = (-0.16666664, 0.008332749, -0.00019588009)
COS_COEFFICIENTS = (0.041666664, -0.0013888304, 2.454804e-05)
# ln 2 in two parts: the first has few bits, so that its product with an exponent is exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.1219444e-4
SQRT_HALF_BITS = 0x3F3504F3  # of sqrt(1/2) in float32
ANGLE_UNIT = 3.7450703e-07  # 2 pi 2^-24: an angle is a whole number of these
UNIFORM_UNIT = 2.0**-32

_CHUNK_BLOCKS = 1 << 15  # blocks drawn at once: a workspace of a few MB, whatever is asked for

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]


def resolve_stream(stream: Stream | str | int) -> Stream:
    """Return the `Stream` that a member, its number or its name in any case stands for."""
    if isinstance(stream, str):
        return Stream[check_choice("stream", stream.lower(), [s.name.lower() for s in Stream]).upper()]
    return Stream(check_int("stream", stream, low=0, high=max(Stream)))


def round_keys(seed: int) -> npt.NDArray[np.uint32]:
    """Return the ten key pairs of Philox4x32-10 for a seed, (10, 2) uint32."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    keys = [(low + i * PHILOX_W[0], high + i * PHILOX_W[1]) for i in range(PHILOX_ROUNDS)]
    return np.array([[a & 0xFFFFFFFF, b & 0xFFFFFFFF] for a, b in keys], np.uint32)


def philox(
    c0: Words, c1: Words, c2: Words, c3: Words, keys: npt.NDArray[np.uint32]
) -> tuple[Words, Words, Words, Words]:
    """Apply Philox4x32-10 to counters.

    Parameters
    ----------
    c0, c1, c2, c3 : uint32 arrays that broadcast
        The four counter words.
    keys : (10, 2) uint32
        From `round_keys`.

    Returns
    -------
    tuple of four uint32 arrays
        The four output words.
    """
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    m0, m1 = (np.uint64(m) for m in PHILOX_M)
    for k0, k1 in keys:
        product0, product1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (
            (product1 >> shift).astype(np.uint32) ^ c1 ^ k0,
            (product1 & low32).astype(np.uint32),
            (product0 >> shift).astype(np.uint32) ^ c3 ^ k1,
            (product0 & low32).astype(np.uint32),
        )
    return c0, c1, c2, c3


def _row_words(
    rows: npt.NDArray[np.uint64], blocks: Words, keys: npt.NDArray[np.uint32], stream: int, step: int
) -> tuple[Words, ...]:
    """Words of flat (row, block) pairs: `rows` uint64 and `blocks` uint32 of one length."""
    low = (rows & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (rows >> np.uint64(32)).astype(np.uint32) | np.uint32(stream << 24)
    return philox(blocks, np.full_like(blocks, step), low, high, keys)


def philox_words(n: int, blocks: int, draw: Draw, first_block: int = 0) -> npt.NDArray[np.uint32]:
    """Return raw words of n rows.

    Parameters
    ----------
    n, blocks : int
        Number of rows, and of blocks in a row.
    draw : Draw
    first_block : int, optional
        Block of a row that comes first.

    Returns
    -------
    (n, blocks, 4) uint32
    """
    keys = round_keys(draw.seed)
    rows = np.repeat(np.arange(draw.first_row, draw.first_row + n, dtype=np.uint64), blocks)
    columns = np.tile(np.arange(first_block, first_block + blocks, dtype=np.uint32), n)
    words = _row_words(rows, columns, keys, draw.stream, draw.step)
    return np.stack(words, axis=-1).reshape(n, blocks, 4)


def _horner(coefficients: tuple[float, ...], x: Floats) -> Floats:
    value: Floats = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + np.float32(c)
    return value


def log_uniform(w: Words) -> Floats:
    """Return ln u in float32 for u = (float32(w) + 0.5) 2^-32, which lies in [2^-33, 1]."""
    u = (w.astype(np.float32) + np.float32(0.5)) * np.float32(UNIFORM_UNIT)
    bits = u.view(np.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23  # u = m 2^exponent with m in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).view(np.float32) - np.float32(1)
    e = exponent.astype(np.float32)
    square = m * m
    y = _horner(LOG_COEFFICIENTS, m) * m * square
    y = y + e * np.float32(LN2_LOW)
    y = y - np.float32(0.5) * square
    return (m + y) + e * np.float32(LN2_HIGH)


def cos_sin_turn(w: Words) -> tuple[Floats, Floats]:
    """Return cosine and sine in float32 of the angle 2 pi (w >> 8) 2^-24."""
    k = (w >> np.uint32(8)).astype(np.int32)
    quarter = (k + (1 << 21)) >> 22
    x = (k - (quarter << 22)).astype(np.float32) * np.float32(ANGLE_UNIT)  # exact reduction to |x| <= pi/4
    z = x * x
    s = _horner(SIN_COEFFICIENTS, z) * z * x + x
    c = _horner(COS_COEFFICIENTS, z) * z * z - np.float32(0.5) * z + np.float32(1)
    odd = (quarter & 1) == 1
    cosine, sine = np.where(odd, s, c), np.where(odd, c, s)
    cosine = np.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = np.where((quarter & 2) != 0, -sine, sine)
    return cosine, sine


def box_muller(w0: Words, w1: Words) -> tuple[Floats, Floats]:
    """Turn two words into two independent standard normals, cosine first.

    The radius sqrt(-2 ln u) is at most 6.77.
    """
    radius = np.sqrt(np.float32(-2) * log_uniform(w0))
    cosine, sine = cos_sin_turn(w1)
    return radius * cosine, radius * sine


def fill_normal(out: npt.NDArray[Any], draw: Draw) -> None:
    """Fill `out` (n, D), float32 or float64, with normals."""
    n, width = out.shape
    blocks = -(-width // 4)
    keys = round_keys(draw.seed)
    for start in range(0, n * blocks, _CHUNK_BLOCKS):
        flat = np.arange(start, min(start + _CHUNK_BLOCKS, n * blocks), dtype=np.uint64)
        row, block = flat // np.uint64(blocks), (flat % np.uint64(blocks)).astype(np.uint32)
        w0, w1, w2, w3 = _row_words(row + np.uint64(draw.first_row), block, keys, draw.stream, draw.step)
        for quarter, values in enumerate((*box_muller(w0, w1), *box_muller(w2, w3))):
            column = block.astype(np.int64) + quarter * blocks
            kept = column < width
            out[row[kept].astype(np.int64), column[kept]] = values[kept]


def fill_uniform(out: npt.NDArray[Any], draw: Draw) -> None:
    """Fill `out` (n, D) with uniforms (w >> 8) 2^-24 in [0, 1): value 4 q + j of a row is word j of its block q."""
    n, width = out.shape
    words = philox_words(n, -(-width // 4), draw)
    out[...] = (words.reshape(n, -1)[:, :width] >> np.uint32(8)) * 2.0**-24


def scaled_words(n: int, bound: int, draw: Draw) -> npt.NDArray[np.int64]:
    """Return n integers (w0 bound) >> 32 in 0 .. bound - 1, one per row: the law's batch rows and timesteps."""
    w0 = philox_words(n, 1, draw)[:, 0, 0]
    return ((w0.astype(np.uint64) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def flips(n: int, draw: Draw) -> npt.NDArray[np.bool_]:
    """Return which of n pictures of a training batch are mirrored left to right: those with w0 < 2^31, (n,) bool.

    Stream AUGMENT: the row is the position in the batch, the step the training step, as for BATCH.
    """
    return scaled_words(n, 2, draw) == 0


def cuts(n: int, room: tuple[int, int], draw: Draw) -> npt.NDArray[np.int64]:
    """Return where n pictures are cut that are larger than wanted by `room`, rows and columns: top and left, (n, 2).

    Words 1 and 2 of block 0, of stream AUGMENT in training: ``(w1 (rows + 1)) >> 32`` and ``(w2 (columns + 1)) >> 32``.
    """
    words = philox_words(n, 1, draw)[:, 0, 1:3].astype(np.uint64)
    return (words * (np.array(room, np.uint64) + np.uint64(1)) >> np.uint64(32)).astype(np.int64)


def drop_limit(share: float) -> int:
    """Return below which word something is dropped that is to be dropped in this share of all cases."""
    return round(share * 2.0**32)


def dropped(n: int, share: float, draw: Draw) -> npt.NDArray[np.bool_]:
    """Return of n positions of a training batch whether labels, and covariates, are left out, (n, 2) bool.

    Stream DROP: labels are where word 0 of block 0 is below `share` 2^32, and covariates where word 1 is. The row is
    the position in the batch, the step the training step, as for BATCH.
    """
    words = philox_words(n, 1, draw)[:, 0, :2]
    return words.astype(np.uint64) < np.uint64(drop_limit(share))


def check_rows(first_sample: Any, n: int) -> int:
    """Return `first_sample` as an int such that the n rows after it exist in the noise law."""
    first = check_int("first_sample", first_sample, low=0, high=MAX_ROW)
    if first + n - 1 > MAX_ROW:
        raise ArgumentError(
            "first_sample", str(first), f"at most 2**56 - n for n = {n}: rows are numbered with 56 bits"
        )
    return first


def normal(
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    stream: Stream | str | int = "forward",
    step: int = 0,
    first_sample: int = 0,
    backend: Any = "auto",
) -> Any:
    """Draw standard normals by the noise law.

    Parameters
    ----------
    shape : tuple of int
        (n, ...): n samples; the values of one sample are numbered in C order.
    seed : int, optional
        0 .. 2^64 - 1.
    stream : Stream, str or int, optional
        What the noise is for: "init", "step", "forward", ... (`Stream`).
    step : int, optional
        The step within the stream, 0 .. 2^32 - 1.
    first_sample : int, optional
        Index of the first sample: rows k of two calls are equal where their indices are.
    backend : str or Backend, optional
        The result has the same bits on all of them.

    Returns
    -------
    array of `shape`, float32
        NumPy, unless ``backend="cuda"`` was named.

    Raises
    ------
    ArgumentError
        A negative size, or a seed, step or row outside its range.

    Examples
    --------
    >>> fd.normal((3, 2), seed=0, backend='numpy').shape
    (3, 2)
    >>> bool((fd.normal((3, 2), seed=0)[1:] == fd.normal((2, 2), seed=0, first_sample=1)).all())
    True
    """
    from fastdiff.backends import get_backend

    shape = tuple(check_int("shape", size, low=0) for size in (shape if isinstance(shape, (tuple, list)) else (shape,)))
    if not shape:
        raise ArgumentError("shape", "()", "at least one axis: (n, ...)")
    seed, stream = check_seed(seed), resolve_stream(stream)
    step = check_int("step", step, low=0, high=MAX_STEP)
    first_sample = check_rows(first_sample, shape[0])
    be = get_backend(backend)
    out = be.empty((shape[0], int(np.prod(shape[1:], dtype=np.int64))))
    be.normal(out, Draw(seed, stream, step, first_sample))
    return out.reshape(shape) if backend != "auto" else be.to_numpy(out).reshape(shape)
