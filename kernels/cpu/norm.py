"""GroupNorm with modulation and SiLU: statistics in two passes over values in cache, and one pass for the output.

An image is read as rows of some pixels times all channels, so that the inner loops are long and run over contiguous
memory; what belongs to a channel (mean, scale, shift) is repeated to the length of such a row. A run of some rows is
summed in float32, its squares about its own mean, and runs are joined in float64 (Chan et al. 1983), always in the same
order: one thread may take whole images, or several the runs of one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastdiff.kernels.cpu.elementary import sigmoid
from fastdiff.kernels.cpu.jit import kernel

ROW = 1024  # values, or the channels of one pixel if they are more
RUN = 16  # rows summed in float32
LANES = 6  # rows of scratch

ZERO, ONE = np.float32(0), np.float32(1)


class Norm(NamedTuple):
    """A norm with its modulation (n, 2, channels), which may be empty, and the statistics (n, groups, 2), all flat.

    They are mean and 1 / deviation. Behind the norm there may be a SiLU.
    """

    gamma: Any
    beta: Any
    modulation: Any
    stats: Any
    groups: int
    silu: bool


@kernel
def row_of(pixels, channels):
    """Values of a row."""
    return max(1, min(pixels, ROW // channels)) * channels


@kernel
def runs_of(pixels, channels):
    """Runs of an image."""
    run = RUN * row_of(pixels, channels)
    return (pixels * channels + run - 1) // run


@kernel
def _repeat(values, count, row):
    """The first values times `count`."""
    n = len(values)
    for p in range(count):
        part = row[p * n : (p + 1) * n]
        for j in range(n):
            part[j] = values[j]


@kernel
def _fold(lanes, totals):
    """totals[c] += the lanes of channel c, which become 0."""
    channels = len(totals)
    for p in range(len(lanes) // channels):
        part = lanes[p * channels : (p + 1) * channels]
        for c in range(channels):
            totals[c] += np.float64(part[c])
    lanes[:] = ZERO


@kernel
def _moments(part, norm, length, mean, lanes, totals, sums):
    """sums[2 g], sums[2 g + 1] = the sum of a run's values in group g, and of squares about its mean, in float32."""
    channels, groups = len(norm.gamma), norm.groups
    size = channels // groups
    count = np.float64(len(part) // groups)
    for squares in range(2):
        totals[:] = 0.0
        lanes[:] = ZERO
        for at in range(0, len(part), length):
            row = part[at : min(at + length, len(part))]
            if squares:
                for i in range(len(row)):
                    d = row[i] - mean[i]
                    lanes[i] += d * d
            else:
                for i in range(len(row)):
                    lanes[i] += row[i]
        _fold(lanes, totals)
        for g in range(groups):
            total = 0.0
            for c in range(g * size, (g + 1) * size):
                total += totals[c]
            sums[2 * g + squares] = total
            if not squares:
                value = np.float32(total / count)
                for c in range(g * size, (g + 1) * size):
                    mean[c] = value
        if not squares:
            _repeat(mean[:channels], length // channels - 1, mean[channels:])


@kernel
def _statistics(n, norm, whole, run, sums, eps):
    """Mean and 1 / deviation of image n of `whole` values, from the sums of its runs of `run` values."""
    stats, groups = norm.stats, norm.groups
    count = np.float64(whole // groups)
    for g in range(groups):
        total = 0.0
        for at in range(2 * g, len(sums), 2 * groups):
            total += sums[at]
        mean = np.float32(total / count)
        squares = 0.0
        for k in range(len(sums) // (2 * groups)):
            own, of_squares = sums[2 * (k * groups + g)], sums[2 * (k * groups + g) + 1]
            values = np.float64((min(whole, (k + 1) * run) - k * run) // groups)
            about = np.float64(np.float32(own / values))
            away = about - np.float64(mean)
            squares += of_squares + away * (2.0 * (own - values * about) + values * away)
        stats[2 * (n * groups + g)] = mean
        stats[2 * (n * groups + g) + 1] = np.float32(1.0 / math.sqrt(squares / count + eps))


@kernel
def _affine(n, norm, rows, repeats, channels):
    """Rows 0, 1 and 2 of the scratch: v = (x - mean) scale + shift for image n, before SiLU."""
    gamma, beta, modulation, stats, groups, _ = norm
    mean, scale, shift = rows[0, :channels], rows[1, :channels], rows[2, :channels]
    size = channels // groups
    for c in range(channels):
        at = 2 * (n * groups + c // size)
        mean[c] = stats[at]
        scale[c], shift[c] = stats[at + 1] * gamma[c], beta[c]
    if len(modulation) > 0:
        gain = modulation[2 * n * channels : (2 * n + 1) * channels]
        added = modulation[(2 * n + 1) * channels : (2 * n + 2) * channels]
        for c in range(channels):
            scale[c] = scale[c] * (ONE + gain[c])
            shift[c] = shift[c] * (ONE + gain[c]) + added[c]
    for k in range(3):
        _repeat(rows[k, :channels], repeats - 1, rows[k, channels:])


@kernel
def norm_moments_range(start, stop, x, norm, pixels, sums, rows, totals):
    """Sums of runs start ... stop - 1 of all images, which have `runs_of` each: see `_moments`; x is flat."""
    channels = len(norm.gamma)
    runs, length = runs_of(pixels, channels), row_of(pixels, channels)
    for item in range(start, stop):
        n, at = item // runs, (item % runs) * RUN * length
        image = x[n * pixels * channels : (n + 1) * pixels * channels]
        _moments(image[at : min(at + RUN * length, len(image))], norm, length, rows[0], rows[3, :length], totals[0],
                 sums[2 * item * norm.groups : 2 * (item + 1) * norm.groups])  # fmt: skip


@kernel
def norm_output_range(start, stop, x, norm, out, pixels, eps, sums, rows):
    """Runs start ... stop - 1 of the output, from the sums of all of the image; eps has one value.

    Statistics are written with each part of an image that one thread takes, the same ones.
    """
    channels, groups = len(norm.gamma), norm.groups
    runs, length, whole = runs_of(pixels, channels), row_of(pixels, channels), pixels * channels
    mean, scale, shift = rows[0, :length], rows[1, :length], rows[2, :length]
    for item in range(start, stop):
        n, run = item // runs, item % runs
        if item == start or run == 0:
            own = sums[2 * n * runs * groups : 2 * (n + 1) * runs * groups]
            _statistics(n, norm, whole, RUN * length, own, eps[0])
            _affine(n, norm, rows, length // channels, channels)
        for at in range(n * whole + run * RUN * length, n * whole + min(whole, (run + 1) * RUN * length), length):
            end = min(at + length, (n + 1) * whole)
            row, y = x[at:end], out[at:end]
            if norm.silu:
                for i in range(len(row)):
                    v = (row[i] - mean[i]) * scale[i] + shift[i]
                    y[i] = v * sigmoid(v)
            else:
                for i in range(len(row)):
                    y[i] = (row[i] - mean[i]) * scale[i] + shift[i]


@kernel
def norm_range(start, stop, x, norm, out, pixels, eps, sums, rows, totals):
    """Images start ... stop - 1, one after another in the cache."""
    runs = runs_of(pixels, len(norm.gamma))
    for n in range(start, stop):
        norm_moments_range(n * runs, (n + 1) * runs, x, norm, pixels, sums, rows, totals)
        norm_output_range(n * runs, (n + 1) * runs, x, norm, out, pixels, eps, sums, rows)


@kernel
def norm_backward_range(start, stop, dy, x, norm, dx, sums, pixels, add, rows, totals, dv):
    """Images start ... stop - 1; sums[n] (2, channels) takes the sums of dv and dv (x - mean) r over the pixels.

    dv has room for an image; totals is (2, channels). dx may be dy unless `add`.
    """
    channels, stats, groups = len(norm.gamma), norm.stats, norm.groups
    size, whole, length = channels // groups, pixels * channels, row_of(pixels, channels)
    repeats = length // channels
    count = np.float64(pixels * size)
    for n in range(start, stop):
        image, above = x[n * whole : (n + 1) * whole], dy[n * whole : (n + 1) * whole]
        _affine(n, norm, rows, repeats, channels)
        mean, scale, shift = rows[0, :length], rows[1, :length], rows[2, :length]
        first, second = rows[3, :length], rows[4, :length]
        first[:] = ZERO
        second[:] = ZERO
        totals[:] = 0.0
        run = 0
        for at in range(0, whole, length):
            end = min(at + length, whole)
            row, d, to = image[at:end], above[at:end], dv[at:end]
            if norm.silu:
                for i in range(len(row)):
                    v = (row[i] - mean[i]) * scale[i] + shift[i]
                    g = sigmoid(v)
                    to[i] = d[i] * g * (ONE + v * (ONE - g))
            else:
                for i in range(len(row)):
                    to[i] = d[i]
            for i in range(len(row)):
                first[i] += to[i]
                second[i] += to[i] * (row[i] - mean[i])
            run += 1
            if run == RUN:
                _fold(first, totals[0])
                _fold(second, totals[1])
                run = 0
        _fold(first, totals[0])
        _fold(second, totals[1])
        # dx = r (dh - <dh> - h <dh h>) with dh = dv scale / r: factors of dv (row 1 as it is), of x - mean, and 1.
        own, by_mean, constant = sums[2 * n * channels : 2 * (n + 1) * channels], rows[2], rows[5]
        for g in range(groups):
            r = np.float64(stats[2 * (n * groups + g) + 1])
            of_dh, of_dhh = 0.0, 0.0
            for c in range(g * size, (g + 1) * size):
                totals[1, c] *= r
                own[c], own[channels + c] = np.float32(totals[0, c]), np.float32(totals[1, c])
                of_dh += np.float64(scale[c]) * totals[0, c]
                of_dhh += np.float64(scale[c]) * totals[1, c]
            for c in range(g * size, (g + 1) * size):
                constant[c] = np.float32(-of_dh / count)
                by_mean[c] = np.float32(-of_dhh * r / count)
        _repeat(by_mean[:channels], repeats - 1, by_mean[channels:])
        _repeat(constant[:channels], repeats - 1, constant[channels:])
        to = dx[n * whole : (n + 1) * whole]
        for at in range(0, whole, length):
            end = min(at + length, whole)
            row, d, out = image[at:end], dv[at:end], to[at:end]
            if add:
                for i in range(len(row)):
                    out[i] += (d[i] * scale[i] + (row[i] - mean[i]) * by_mean[i]) + constant[i]
            else:
                for i in range(len(row)):
                    out[i] = (d[i] * scale[i] + (row[i] - mean[i]) * by_mean[i]) + constant[i]


@kernel
def norm_tangent_range(start, stop, dh, x, norm, dmodulation, out, pixels, rows):
    """Images start ... stop - 1 of dv = (1 + gain) gamma dh + dgain u + dshift, through SiLU's derivative at v."""
    gamma, beta, modulation, stats, groups, silu = norm
    channels = len(gamma)
    whole, length = pixels * channels, row_of(pixels, channels)
    repeats = length // channels
    factor, by_x, added = rows[3, :length], rows[4, :length], rows[5, :length]
    plain = not silu and len(dmodulation) == 0
    for n in range(start, stop):
        for c in range(channels):
            factor[c], by_x[c], added[c] = gamma[c], ZERO, ZERO
            if len(modulation) > 0:
                factor[c] *= ONE + modulation[2 * n * channels + c]
            if len(dmodulation) > 0:
                dgain, dshift = dmodulation[2 * n * channels + c], dmodulation[(2 * n + 1) * channels + c]
                r = stats[2 * (n * groups + c // (channels // groups)) + 1]
                by_x[c], added[c] = dgain * (r * gamma[c]), dgain * beta[c] + dshift
        for k in range(3, 6):
            _repeat(rows[k, :channels], repeats - 1, rows[k, channels:])
        if not plain:
            _affine(n, norm, rows, repeats, channels)
        mean, scale, shift = rows[0, :length], rows[1, :length], rows[2, :length]
        image, given = x[n * whole : (n + 1) * whole], dh[n * whole : (n + 1) * whole]
        to = out[n * whole : (n + 1) * whole]
        for at in range(0, whole, length):
            end = min(at + length, whole)
            row, d, y = image[at:end], given[at:end], to[at:end]
            if plain:
                for i in range(len(row)):
                    y[i] = factor[i] * d[i]
                continue
            for i in range(len(row)):
                centred = row[i] - mean[i]
                v = centred * scale[i] + shift[i]
                dv = factor[i] * d[i] + (by_x[i] * centred + added[i])
                if silu:
                    g = sigmoid(v)
                    dv = dv * g * (ONE + v * (ONE - g))
                y[i] = dv


@kernel
def collect_norm(start, stop, sums, gamma, beta, modulation, dgamma, dbeta, dmodulation):
    """Gradients of channels start ... stop - 1 from the sums (n, 2, channels) of `norm_backward_range`, by images.

    With h = (x - mean) r and u = gamma h + beta: dgain = sum of dv u, dshift = sum of dv, and du = (1 + gain) dv.
    """
    channels = len(gamma)
    dgamma[start:stop] = ZERO
    dbeta[start:stop] = ZERO
    for at in range(0, len(sums), 2 * channels):
        plain, by_h = sums[at : at + channels], sums[at + channels : at + 2 * channels]
        if len(modulation) > 0:
            gain = modulation[at : at + channels]
            for c in range(start, stop):
                dgamma[c] += (ONE + gain[c]) * by_h[c]
                dbeta[c] += (ONE + gain[c]) * plain[c]
        else:
            for c in range(start, stop):
                dgamma[c] += by_h[c]
                dbeta[c] += plain[c]
        if len(dmodulation) > 0:
            dgain, dshift = dmodulation[at : at + channels], dmodulation[at + channels : at + 2 * channels]
            for c in range(start, stop):
                dgain[c] = gamma[c] * by_h[c] + beta[c] * plain[c]
                dshift[c] = plain[c]
