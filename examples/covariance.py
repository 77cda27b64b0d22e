"""Covariance being replaced
=========================

See diffusion as covariance being replaced: reshape noise into curves, then judge samplers against exact answers.

Run it with ``python examples/covariance.py [-o FOLDER]``: seconds on a laptop, no GPU, four pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff import covariance, plots
from fastdiff.data import harmonic_curves
from fastdiff.denoisers import Gaussian, convergence


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("covariance"), help="folder of the pictures")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    # A curve's similarity matrix, exp(-(v_i - v_j)^2), is far simpler than that of noise.
    signal = harmonic_curves(1)[0].astype(np.float64)
    signal = (signal - signal.mean()) / signal.std()
    noise = fd.normal((20_000, len(signal)), seed=0)
    target = covariance.similarity(signal, backend="numpy")  # float64
    source = covariance.scatter(noise, normalise=True)
    reshape = covariance.reshaping(source, target)
    curves = reshape.apply(noise)
    result = covariance.scatter(curves, normalise=True)
    ranks = [covariance.effective_rank(C) for C in (source, target)]
    print("effective rank: noise {:.1f}, signal {:.1f}".format(*ranks))
    print(f"reshaped noise: {reshape.rank} directions, scatter off by {np.abs(result - target).max():.0e}")
    panels = {"Noise": source, "Signal": target, "Reshaped noise": result}
    plots.save(plots.covariances(panels), args.output / "matrices.png")
    plots.save(plots.spectra(source, target), args.output / "spectra.png")
    shown = reshape.apply(noise[:60], standardise=True)
    plots.save(plots.reshaped(noise[:60], shown, signal, rate=50), args.output / "curves.png")

    # A Gaussian has an exact denoiser, and a sampler over it has an exact result: no network, no drawing.
    family = covariance.empirical(harmonic_curves(20_000))
    schedule = fd.Schedule.linear(1000)
    exact = Gaussian(family.mean, family.cov, schedule)
    steps = [5, 10, 20, 50, 100, 200, 500]
    distances = {name: convergence(exact, name, steps) for name in ("ddpm", "ddim", "dpmpp_2m")}
    # However many steps: a chain starts from N(0, I), where the data still have their mean times the last signal,
    # and an exact flow stretches what starts along an axis of variance l by sqrt(l / (signal^2 l + noise^2)).
    variances, axes = np.linalg.eigh(family.cov)
    signal_T, noise_T = schedule.signal[-1], schedule.noise[-1]
    stretch = np.sqrt(np.maximum(variances, 0) / (signal_T**2 * variances + noise_T**2))
    left = float(np.linalg.norm(stretch * signal_T * (axes.T @ family.mean)))
    plateau = left, "the mean of the data, which is not quite gone at the start"
    plots.save(plots.convergence(steps, distances, plateau=plateau), args.output / "convergence.png")
    for name, values in distances.items():
        print(f"{name:>8}: " + ", ".join(f"{n} steps {value:.3f}" for n, value in zip(steps, values, strict=True)))
    print(f"pictures in {args.output}")


if __name__ == "__main__":
    main()
