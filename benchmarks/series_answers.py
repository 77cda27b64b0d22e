"""How good answers are, of real series and of AR(1): ``python benchmarks/series_answers.py [--data FOLDER]``.

Values of unseen series are hidden, 10, 50 or 90 % of them at random, or the last ones, and drawn by the default model
and by a Gaussian fitted to the same training rows (off-diagonals of its covariance times 0.9), exactly. Of the draws:
the fair CRPS, and the shares of hidden values in bands, means over the unseen series of all seeds. The ratio of the
CRPS is paired: of every seed, which has its own network, series and hidden values. Of AR(1) data the exact conditional
is known, and stands in the Gaussian's place.

Exits with 1 where a bound is missed. With all its defaults the results go to ``results/series-cpu.json`` and ``.md``;
with --only beside those of other data sets that the same commit has left there.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from answers import estimate, exact_draws, judged
from machine import header
from report import RESULTS, Answered, Estimate, SeriesReport, finish

import fastdiff as fd
from fastdiff.noise import TARGETS

Array = npt.NDArray[Any]
BANDS = (0.5, 0.8, 0.9, 0.95)
SECONDS = 180.0  # of a training, of all threads together
HIDDEN = ("10 %", "50 %", "90 %", "end")
AR = "AR(1)"
NAME, IN_PARTS = "series-cpu", ("data", "output", "only")  # of the results; options that they may be made in parts with


class Data(NamedTuple):
    """A data set: series of points x channels, how many train and are answered, and how many points a forecast has.

    `targets` are bounds of the CRPS through the Gaussian's, in the order of `HIDDEN`.
    """

    points: int
    channels: int
    training: int
    unseen: int
    end: int
    targets: tuple[float, ...]


SETS = {
    "ItalyPowerDemand": Data(24, 1, 67, 100, 8, (0.9, 0.9, 1.0, 1.0)),
    "JapaneseVowels_eq": Data(25, 12, 270, 16, 6, (0.9, 0.9, 1.0, 1.0)),
    AR: Data(16, 1, 2000, 40, 8, (1.05,) * 4),
}


def data_set(name: str, folder: Path) -> tuple[Array, Array, fd.denoisers.Gaussian]:
    """Rows to learn from, unseen ones, (N, points, channels), and the Gaussian to compare with."""
    of = SETS[name]
    if name == AR:
        mean, cov = np.zeros(of.points), 0.9 ** np.abs(np.subtract.outer(*[np.arange(of.points)] * 2))
        X = np.random.default_rng(0).multivariate_normal(mean, cov, of.training + 1000)[..., None]
    else:
        X = np.load(folder / f"{name}.npy").reshape(-1, of.channels, of.points).swapaxes(1, 2)
        flat = X[: of.training].reshape(of.training, -1)
        mean, cov = flat.mean(axis=0), np.cov(flat.T, bias=True)
        cov = 0.9 * cov + 0.1 * np.diag(np.diag(cov))
    return X[: of.training], X[of.training :], fd.denoisers.Gaussian(mean, cov, fd.Schedule.cosine(10))


def hidden_of(truth: Array, what: str, end: int, seed: int) -> Array:
    """Where values are hidden."""
    if what != "end":
        return np.random.default_rng(seed).random(truth.shape) < int(what[:2]) / 100
    gone = np.zeros(truth.shape, bool)
    gone[:, -end:] = True
    return gone


def scores(model: fd.Diffusion, law: fd.denoisers.Gaussian, truth: Array, gone: Array, draws: int) -> list[Any]:
    """What `judged` says of the model's draws, and of the Gaussian's, for the series that have something hidden."""
    some = gone.reshape(len(gone), -1).any(axis=1)
    truth, holes = truth[some], np.where(gone, np.nan, truth)[some]
    flat, flat_holes = (x.reshape(len(x), -1) for x in (truth, holes))
    ours = model.impute(holes, draws).reshape(draws, *flat.shape)
    return [judged(each, flat_holes, flat, BANDS) for each in (ours, exact_draws(law, flat_holes, draws))]


def answered(name: str, folder: Path, args: argparse.Namespace) -> list[Answered]:
    """The rows of a data set."""
    seen, unseen, law = data_set(name, folder)
    of, seconds, spreads = SETS[name], [], []
    series = of.unseen if args.rows is None else args.rows
    found: dict[str, list[list[dict[str, Array]]]] = {what: [] for what in HIDDEN}
    for seed in range(args.seeds):
        begin = time.process_time()
        model = fd.Diffusion(seed=seed, conditional=args.conditional).fit(seen, steps=args.steps, progress=False)
        seconds.append(time.process_time() - begin)
        spreads.append(model.spread)
        truth = unseen[np.random.default_rng(seed).permutation(len(unseen))[:series]]
        for what, each in found.items():
            each.append(scores(model, law, truth, hidden_of(truth, what, of.end, seed), args.draws))
            ratio = each[-1][0]["CRPS"].mean() / each[-1][1]["CRPS"].mean()
            print(f"{name}, seed {seed}, {what} hidden: {ratio:.3f} of the Gaussian's CRPS", file=sys.stderr)
    rows = []
    for (what, each), target in zip(found.items(), of.targets, strict=True):
        both = [
            {key: estimate(np.concatenate([one[side][key] for one in each])) for key in each[0][side]}
            for side in (0, 1)
        ]
        ratios = [one[0]["CRPS"].mean() / one[1]["CRPS"].mean() for one in each]
        missed = [
            f"{band} ({value.mean:.1%})"
            for band, value in both[0].items()
            if name == AR and band != "CRPS" and abs(value.mean - float(band[3:-1]) / 100) > 3 * value.error
        ]
        ratio = estimate(np.array(ratios)) if len(ratios) > 1 else Estimate(float(ratios[0]), 0.0)
        rows.append(
            Answered(name, what, both[0], both[1], ratio, target, missed, max(seconds), float(np.mean(spreads)), series)
        )
    return rows


def others(report: SeriesReport, folder: Path | None) -> dict[str, list[Answered]]:
    """Results in a folder, by data set, where the same commit has left them there with the same sizes."""
    path = None if folder is None else folder / f"{NAME}.json"
    if path is None or not path.exists():
        return {}
    before = SeriesReport.read(path)
    same = ("draws", "seeds")
    if before.header.commit != report.header.commit or any(getattr(before, k) != getattr(report, k) for k in same):
        return {}
    return {name: [row for row in before.rows if row.data == name] for name in SETS}


def main(argv: list[str] | None = None) -> int:
    """Train, draw, judge, print and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="series_answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data", help="what real_data.py wrote")
    parser.add_argument("--only", action="append", choices=list(SETS), help="data sets (default: all)")
    parser.add_argument("--draws", type=int, default=39, help="of each series (default 39)")
    parser.add_argument("--rows", type=int, help="unseen series of each seed (default: what a set has in `SETS`)")
    parser.add_argument("--seeds", type=int, default=5, help="networks, and choices of series (default 5)")
    parser.add_argument("--steps", type=int, help="training steps (default: what suits the data)")
    parser.add_argument("--conditional", choices=TARGETS, help="a network that is told of a mask (default: none)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the table there in any case")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", fd.errors.QualityWarning)
    found = {name: answered(name, args.data, args) for name in args.only or SETS}
    whole = all(value == parser.get_default(name) for name, value in vars(args).items() if name not in IN_PARTS)
    folder = args.output or (RESULTS if whole else None)
    report = SeriesReport(header(fd.get_backend("cpu").threads), args.draws, args.seeds, SECONDS, [])
    found = others(report, folder) | found
    report.rows += [row for name in SETS for row in found.get(name, [])]
    print(report.table(), end="")
    finish(report, NAME, folder, [])
    return int(not all(row.met for row in report.rows) or max(row.seconds for row in report.rows) > SECONDS)


if __name__ == "__main__":
    sys.exit(main())
