"""How good the defaults are on real data: ``python benchmarks/quality.py [--data FOLDER] [--only NAME] [--seeds N]``.

For every data set of `real_data.py` and every seed half of the rows train ``fd.Diffusion().fit(rows)``, and 500
samples are compared with the other half: energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, unbiased, where columns
are divided by their training deviation (at least a hundredth of that of all values), over the deviation of all
held-out values.
Beside it stand the same distance of the training rows and of a Gaussian fitted to them (Ledoit-Wolf), and the median
distance of samples to the nearest training row over that of held-out rows: copies would win the table otherwise.

Then the source text's task: one curve of 50 points, 5,000 steps of batch 1,000; and a family of such curves.

Exits with 1 where a bound is missed. Without --only and --seeds the results go to ``results/quality-cpu.json`` and
``.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from machine import header
from report import RESULTS, CurveFigure, Estimate, Quality, QualityReport, finish

import fastdiff as fd
from fastdiff.covariance import ledoit_wolf
from fastdiff.metrics import energy_distance, nearest_distances

SEEDS, SAMPLES = 5, 500
# What the distance is to be at most; None: not above the Gaussian's by more than noise.
TARGETS: dict[str, float | None] = {
    "ItalyPowerDemand": 0.01, "GunPoint": 0.08, "OSULeaf": 0.03, "BasicMotions": None, "digits": 0.02, "wine": 0.015,
    "breast cancer": 0.012, "random walks": None, "elnino": None, "macrodata": None, "co2": None,
    "Seattle weather": None, "harmonic curves": None, "ArrowHead": None, "JapaneseVowels": None,
}  # fmt: skip
NOISE = 2.0, 0.005  # standard errors, and units, that a mean difference to the Gaussian may have
NEAREST = 0.8  # of held-out rows' distance to the training rows
SECONDS = 120.0  # of processor time of a training: a minute of two cores

STEPS, BATCH, GENERATED = 5000, 1000, 2000
COST, ROUNDS = 1.15, 7
BOUNDS = {"tutorial": 0.20, "default": 0.03}  # root mean square error against the curve


def halves(X: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to compare with."""
    order = np.random.default_rng(seed).permutation(len(X))
    return X[order[: len(X) // 2]], X[order[len(X) // 2 :]]


def one(X: np.ndarray, seed: int) -> dict[str, Any]:
    """Train with every default and measure."""
    seen, unseen = halves(X, seed)
    unit = np.maximum(seen.std(axis=0), 0.01 * seen.std())
    normals = np.random.default_rng(seed).standard_normal((SAMPLES, sum(seen.shape)))
    begin = time.process_time()
    model = fd.Diffusion(seed=seed).fit(seen, progress=False, judge=False)
    seconds = time.process_time() - begin
    x, learned, y = (rows / unit for rows in (model.sample(SAMPLES).astype(np.float64), seen, unseen))
    gaussian = ledoit_wolf(learned).sample(normals[:, : len(seen)], normals[:, len(seen) :])
    deviation = float(y.std())
    return {
        **{
            name: energy_distance(rows, y, unbiased=True) / deviation
            for name, rows in (("ours", x), ("gaussian", gaussian), ("real", learned))
        },
        "nearest": float(np.median(nearest_distances(x, learned)) / np.median(nearest_distances(y, learned))),
        "seconds": seconds,
        "steps": model.step,
        "network": repr(model.net),
        "rows": len(seen),
        "d": X.shape[1],
        "scale": model.normaliser.scale if model.normaliser is not None else "",
    }


def summary(name: str, runs: list[dict[str, Any]]) -> Quality:
    """Means and standard errors over the seeds, and whether the bounds hold."""

    def estimate(values: np.ndarray) -> Estimate:
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        return Estimate(float(values.mean()), error)

    columns = {key: np.array([run[key] for run in runs]) for key in ("ours", "gaussian", "real", "nearest", "seconds")}
    means = {key: estimate(values) for key, values in columns.items()}
    excess = estimate(columns["ours"] - columns["gaussian"])
    target, (errors, units) = TARGETS[name], NOISE
    good = excess.mean <= errors * excess.error + units and means["nearest"].mean >= NEAREST
    good = good and (target is None or means["ours"].mean <= target)
    shared = {key: runs[0][key] for key in ("rows", "d", "network", "steps", "scale")}
    met = bool(good and columns["seconds"].max() <= SECONDS)
    return Quality(name=name, **shared, **means, excess=excess, target=target, met=met)


def real_rows(folder: Path, seeds: int, only: list[str]) -> list[Quality]:
    """The rows of the table of real data."""
    rows = []
    for name in TARGETS:
        if only and not any(name.startswith(start) for start in only):
            continue
        if name == "harmonic curves":
            X = fd.data.harmonic_curves(3000).astype(np.float64)
        else:
            X = np.load(folder / f"{name}.npy", allow_pickle=False)
        rows.append(summary(name, [one(X, seed) for seed in range(seeds)]))
        print(f"{name}: {rows[-1].ours.mean:.4f}, {rows[-1].seconds.mean:.0f} s", file=sys.stderr)
    return rows


def curves() -> list[CurveFigure]:
    """The source text's tasks."""
    schedule = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    curve = fd.data.harmonic_curves(1)
    rows = []
    for name, make in (("tutorial", fd.MLP.tutorial), ("default", fd.MLP)):
        model = fd.Diffusion(make(50, T=100), schedule, prediction="noise", seed=0)
        model.fit(curve, steps=STEPS, batch=BATCH, progress=False, judge=False)
        error = float(np.sqrt(np.mean((model.sample(GENERATED) - curve) ** 2, dtype=np.float64)))
        what = f"{name} network, one curve: root mean square error"
        rows.append(CurveFigure(what, error, BOUNDS[name], error <= BOUNDS[name]))

    seen, unseen, others = np.split(fd.data.harmonic_curves(20_000 + 2 * GENERATED), [20_000, 20_000 + GENERATED])
    model = fd.Diffusion(seed=0).fit(seen, progress=False, judge=False)
    drawn = energy_distance(model.sample(GENERATED), unseen)
    rows.append(CurveFigure("20,000 curves: energy distance of generated to unseen ones", drawn))
    rows.append(CurveFigure("of two unseen sets", energy_distance(others, unseen)))
    return rows


def cost() -> list[CurveFigure]:
    """What a base of all directions costs curves of 50 points: medians of ratios, in alternation."""
    X = fd.data.harmonic_curves(2000)
    models = [fd.Diffusion(fd.MLP(50, T=100), base=base) for base in ("gaussian", None)]
    options = {"batch": 256, "progress": False, "judge": False, "validation": 0}
    rows = []
    for what, run in (
        ("training step of 256", lambda model: model.fit(X, steps=300, **options)),
        ("chain of 1,000 curves", lambda model: model.sample(1000, sampler="ddpm")),
    ):
        ratios = []
        for _ in range(ROUNDS + 1):  # the first one warms up
            seconds = []
            for model in models:
                begin = time.perf_counter()
                run(model)
                seconds.append(time.perf_counter() - begin)
            ratios.append(seconds[0] / seconds[1])
        ratio = float(np.median(ratios[1:]))
        rows.append(CurveFigure(f"{what}: time with a base through without", ratio, COST, ratio <= COST))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Train, sample, print; return the exit code."""
    parser = argparse.ArgumentParser(prog="quality.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data", help="what real_data.py wrote")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="data sets whose name begins so")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds and splits of each (default {SEEDS})")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", fd.errors.QualityWarning)  # the table says it
    threads = fd.get_backend("auto").threads
    rows = real_rows(args.data, args.seeds, args.only)
    report = QualityReport(header(threads), args.seeds, rows, [] if args.only else [*curves(), *cost()])
    print(report.table(), end="")
    finish(report, "quality-cpu", RESULTS if not args.only and args.seeds == SEEDS else None, [])
    return int(not all(row.met for row in (*report.quality, *report.curves)))


if __name__ == "__main__":
    sys.exit(main())
