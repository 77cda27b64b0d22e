"""Whether networks tell samples from real series, on TimeGAN's sines: ``python benchmarks/sines.py``.

10,000 series of 24 x 5 values sin(f j + p), f and p uniform in 0 .. 0.1 for every channel, in [0, 1] (Yoon et al. 2019,
and their code). The default network learns them as rows of 120 values, draws as many, and TimeGAN's discriminative
score is taken of both, and of the real series and as many others: the floor. Besides that: the score with a GRU of 32
units, the predictive score, energy distance and correlations, each with its floor.

Exits with 1 where a bound is missed. With all its defaults the results go to ``results/sines-cpu.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import header
from report import RESULTS, Estimate, SinesReport, SinesScore, finish

import fastdiff as fd
from fastdiff.metrics import Score

Array = npt.NDArray[Any]
ROWS, MOMENTS, CHANNELS = 10_000, 24, 5
SECONDS = 600.0  # of a training, on two cores
UNITS = {2: 0.006, 32: 0.03}  # of the networks, and how far above its floor a score may be


def sines(rows: int, seed: int) -> Array:
    """Real series (rows, 24, 5)."""
    random = np.random.default_rng(seed)
    f, p = random.uniform(0, 0.1, size=(2, rows, 1, CHANNELS))
    return np.asarray((np.sin(f * np.arange(MOMENTS)[:, None] + p) + 1) / 2)


def estimate(score: Score) -> Estimate:
    """A score for the table."""
    return Estimate(score.mean, score.stderr if len(score.values) > 1 else 0.0)


def measured(real: Array, others: Array, drawn: Array, units: list[int], options: dict[str, int]) -> list[SinesScore]:
    """All rows of the table."""
    metrics, rows = fd.metrics, []
    for each in units:
        scores = [metrics.discriminative_score(real, x, units=each, **options) for x in (drawn, others)]
        rows.append(SinesScore(f"discriminative score, GRU of {each}", *map(estimate, scores), UNITS.get(each)))
        print(*rows[-1].cells(), file=sys.stderr)
    longer = {**options, "steps": 5 * options["steps"] // 2}
    scores = [metrics.predictive_score(real, x, **longer) for x in (drawn, others)]
    rows.append(SinesScore("predictive score", *map(estimate, scores)))
    flat = [x[:2000].reshape(len(x[:2000]), -1) for x in (real, drawn, others)]
    distances = [metrics.energy_distance(flat[0], x, unbiased=True) for x in flat[1:]]
    rows.append(SinesScore("energy distance of 2,000", *(Estimate(one, 0.0) for one in distances)))
    for name, measure in (
        ("autocorrelation error", metrics.autocorrelation_error),
        ("cross-correlation error", metrics.cross_correlation_error),
    ):
        rows.append(SinesScore(name, *(Estimate(measure(real, x), 0.0) for x in (drawn, others))))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Train, draw, measure, print and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="sines.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help=f"series of each set (default {ROWS})")
    parser.add_argument("--steps", type=int, help="training steps (default: what the defaults take)")
    parser.add_argument("--units", type=int, action="append", help="of the networks (default: 2 and 32)")
    parser.add_argument("--networks", type=int, default=10, help="how many judge (default 10)")
    parser.add_argument("--judge-steps", type=int, default=2000, help="of each (default 2000)")
    args = parser.parse_args(argv)
    real, others = sines(args.rows, 0), sines(args.rows, 1)
    begin = time.perf_counter()
    model = fd.Diffusion(backend="cpu")
    model.fit(real.reshape(len(real), -1), steps=args.steps, judge=False, progress=False)
    seconds = time.perf_counter() - begin
    drawn = model.sample(args.rows).reshape(real.shape)
    print(f"{model.step} steps in {seconds:.0f} s", file=sys.stderr)
    units = args.units or list(UNITS)
    rows = measured(real, others, drawn, units, {"networks": args.networks, "steps": args.judge_steps})
    what = (
        f"{args.rows} series of {MOMENTS} x {CHANNELS} values, {model.step} training steps in {seconds:.0f} s; scores: "
        f"mean and standard error of {args.networks} networks. Floor: two real sets."
    )
    report = SinesReport(header(fd.get_backend("cpu").threads), what, rows)
    print(report.table(), end="")
    finish(report, "sines-cpu", RESULTS if argv is None and len(sys.argv) == 1 else None, [])
    return int(not all(row.met for row in rows) or seconds > SECONDS)


if __name__ == "__main__":
    sys.exit(main())
