"""How good answers are, of real series and of AR(1): ``python benchmarks/series_answers.py [--data FOLDER]``.

Values of unseen series are hidden, 10, 50 or 90 % of them at random, or the last ones, and drawn by the default model
and by a Gaussian fitted to the same training rows (off-diagonals of its covariance times 0.9), exactly. Of the draws:
the fair CRPS over the hidden values, and the shares of these in bands of 50, 80 and 95 %. Of AR(1) data the exact
conditional is known, and stands in the Gaussian's place.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastdiff as fd
from fastdiff.metrics import crps

Array = npt.NDArray[Any]
BANDS = (0.5, 0.8, 0.95)
ENDS = {"ItalyPowerDemand": (24, 1, 67, 8), "JapaneseVowels_eq": (25, 12, 270, 6), "AR(1)": (16, 1, 2000, 8)}


def data_set(name: str, folder: Path) -> tuple[Array, Array]:
    """Rows to learn from, and unseen ones, (N, points, channels)."""
    points, channels, training, _ = ENDS[name]
    if name == "AR(1)":
        cov = 0.9 ** np.abs(np.subtract.outer(np.arange(points), np.arange(points)))
        X = np.random.default_rng(0).multivariate_normal(np.zeros(points), cov, training + 1000)[..., None]
    else:
        X = np.load(folder / f"{name}.npy").reshape(-1, channels, points).swapaxes(1, 2)
    return X[:training], X[training:]


def law(X: Array, name: str) -> tuple[Array, Array]:
    """Mean and covariance of the Gaussian to compare with."""
    flat = X.reshape(len(X), -1)
    if name == "AR(1)":
        d = flat.shape[1]
        return np.zeros(d), 0.9 ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))
    cov = np.cov(flat.T, bias=True)
    return flat.mean(axis=0), 0.9 * cov + 0.1 * np.diag(np.diag(cov))


def gaussian_draws(mean: Array, cov: Array, holes: Array, draws: int) -> Array:
    """Draws of its conditionals."""
    rng, flat = np.random.default_rng(1), holes.reshape(len(holes), -1)
    out = np.repeat(flat[None], draws, axis=0)
    for k, row in enumerate(flat):
        gone = np.isnan(row)
        gain = np.linalg.solve(cov[np.ix_(~gone, ~gone)], cov[np.ix_(~gone, gone)]).T
        rest = cov[np.ix_(gone, gone)] - gain @ cov[np.ix_(~gone, gone)]
        root = np.linalg.cholesky(rest + 1e-10 * np.eye(len(rest)))
        out[:, k, gone] = mean[gone] + gain @ (row - mean)[~gone] + rng.normal(size=(draws, gone.sum())) @ root.T
    return out.reshape(draws, *holes.shape)


def judged(draws: Array, truth: Array, gone: Array) -> dict[str, float]:
    place = ((draws < truth).sum(axis=0) + 0.5) / (len(draws) + 1)
    found = {"CRPS": float(crps(draws, truth)[gone].mean())}
    return found | {f"in {b:.0%}": float((np.abs(place - 0.5) < b / 2)[gone].mean()) for b in BANDS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="series_answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data", help="what real_data.py wrote")
    parser.add_argument("--only", action="append", default=[], choices=list(ENDS), help="data sets")
    parser.add_argument("--draws", type=int, default=39)
    parser.add_argument("--rows", type=int, default=100, help="unseen rows")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="training steps (default: what suits the data)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", fd.errors.QualityWarning)
    print("| data | hidden | CRPS | in 50, 80, 95 % | Gaussian's | in 50, 80, 95 % | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in args.only or ENDS:
        seen, unseen = data_set(name, args.data)
        mean, cov = law(seen, name)
        ratios: dict[str, list[float]] = {}
        for seed in range(args.seeds):
            begin = time.perf_counter()
            model = fd.Diffusion(seed=seed).fit(seen, steps=args.steps, progress=False, judge=False)
            seconds = time.perf_counter() - begin
            truth = unseen[np.random.default_rng(seed).permutation(len(unseen))[: args.rows]]
            for what in ("10 %", "50 %", "90 %", "end"):
                gone = np.zeros(truth.shape, bool)
                if what == "end":
                    gone[:, -ENDS[name][3] :] = True
                else:
                    gone = np.random.default_rng(seed).random(truth.shape) < int(what[:2]) / 100
                holes = np.where(gone, np.nan, truth)
                ours = judged(model.impute(holes, args.draws), truth, gone)
                base = judged(gaussian_draws(mean, cov, holes, args.draws), truth, gone)
                ratios.setdefault(what, []).append(ours["CRPS"] / base["CRPS"])
                cells = [
                    f"{one['CRPS']:.4f} | {', '.join(f'{v:.0%}' for v in list(one.values())[1:])}"
                    for one in (ours, base)
                ]
                print(
                    f"| {name}, {seconds:.0f} s | {what} | {' | '.join(cells)} | {ratios[what][-1]:.3f} |", flush=True
                )
        for what, values in ratios.items():
            error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            print(f"| {name}, {len(values)} seeds | {what} | | | | | {np.mean(values):.3f} ± {error:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
