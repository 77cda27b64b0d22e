"""How good answers are, of curves seen at 8 of 50 points: ``python benchmarks/answers.py``.

The default network learns 20,000 harmonic curves, and of some that are held out how widely to draw with tmpd. Of unseen
ones 8 points at random are told, and the others are drawn, by several methods, beside draws from the exact conditional
of a Gaussian that was fitted to a million curves. Of the draws: how many of the hidden values lie in their bands of 50,
80 and 95 %, and the fair CRPS (Gneiting & Raftery 2007), with standard errors over the curves, for the values of a
curve are not independent. The same of curves of which 25 points in a row are hidden. There the Gaussian continues what
it sees from its seventh digit on, which the curves, sums of five cosines without noise, have: beside it stands the
Gaussian that takes values for right to a hundredth.

Then the mixture of MCGdiff (Cardoso et al. 2023), whose posterior is known: the sliced Wasserstein distance of draws by
several methods to exact ones, and, as the least that can be had, of other exact ones to these.

Last, what draws cost: processor time of tmpd given 1, 8 and 16 values through that of plain samples, which take turns.
``--only cost`` measures just that, for a machine must be idle for it.

Without --quick the tables go to ``results/answers-cpu.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import header
from report import RESULTS, Answers, AnswersReport, Estimate, Posterior, Price, finish, load

import fastdiff as fd
from fastdiff.metrics import crps

Array = npt.NDArray[Any]
SEEN, BANDS = 8, (0.5, 0.8, 0.95)
WAYS = (
    ("tmpd", "ddpm", 100), ("tmpd", "dpmpp_2m", 50), ("pigdm", "ddpm", 100), ("pigdm", "dpmpp_2m", 50),
    ("replace", "ddpm", 100), ("replace", "dpmpp_2m", 50),
)  # fmt: skip
GAP_WAYS = (("tmpd", "ddpm", 100), ("tmpd", "dpmpp_2m", 50), ("pigdm", "dpmpp_2m", 50))
GAP, ROUGH = 25, 0.01  # points that are hidden in a row; noise of the Gaussian that sees less
TOLD, ROUNDS = (1, 8, 16), 9  # values that are known where costs are measured; turns
DIMENSIONS, SEEN_THROUGH, OF_MIXTURES = (8, 80), (1, 2, 4), ("tmpd", "pigdm", "dps", "smc")
WANTED = 1.15  # CRPS through that of the Gaussian


def gaussian(rows: int, points: int = 50) -> fd.denoisers.Gaussian:
    """The Gaussian with the moments of so many curves."""
    count, first, second = 0, np.zeros(points), np.zeros((points, points))
    for seed in range(1, 1 + -(-rows // 100_000)):
        X = fd.data.harmonic_curves(min(rows - count, 100_000), points=points, seed=seed).astype(np.float64)
        count, first, second = count + len(X), first + X.sum(axis=0), second + X.T @ X
    mean = first / count
    return fd.denoisers.Gaussian(mean, second / count - np.outer(mean, mean), fd.Schedule.cosine(10))


def judged(draws: Array, holes: Array, truth: Array, bands: tuple[float, ...] = BANDS) -> dict[str, Array]:
    """Of each curve, over its hidden values: the CRPS, and the shares in bands."""
    hidden = np.isnan(holes)

    def mean(values: Array) -> Array:
        return np.asarray((values * hidden).sum(axis=1) / hidden.sum(axis=1))

    found = {"CRPS": mean(crps(draws, truth))}
    # The rank of the truth among n draws is uniform over n + 1 places where the law is right; of 40, 80, ... places the
    # bands have whole numbers.
    place = ((draws < truth).sum(axis=0) + 0.5) / (len(draws) + 1)
    return found | {f"in {band:.0%}": mean(np.abs(place - 0.5) < band / 2) for band in bands}


def exact_draws(law: fd.denoisers.Gaussian, holes: Array, draws: int, noise: float = 0.0) -> Array:
    """Draws (draws, N, points) of the conditional of a Gaussian."""
    rng, out = np.random.default_rng(0), np.empty((draws, *holes.shape))
    for k, row in enumerate(holes):
        data = law.given(fd.Known(row, noise)).data
        out[:, k] = rng.multivariate_normal(data.mean, data.cov, draws, method="eigh")
    return out


def scattered(n: int, points: int) -> Array:
    """Which points of n curves are seen: SEEN of each at random."""
    return np.random.default_rng(1).random((n, points)).argsort(axis=1) < SEEN


def around_a_gap(n: int, points: int) -> Array:
    """Which points are seen where half of them are hidden in a row, anywhere."""
    start = np.random.default_rng(2).integers(0, points - GAP + 1, size=n)[:, None]
    return (np.arange(points) < start) | (np.arange(points) >= start + GAP)


def rows(
    model: fd.Diffusion,
    law: fd.denoisers.Gaussian,
    curves: int,
    draws: int,
    seen: Callable[[int, int], Array] = scattered,
    methods: tuple[tuple[str, str, int], ...] = WAYS,
) -> list[tuple[str, dict[str, Array]]]:
    """What was found for every way, the Gaussian's first."""
    truth = fd.data.harmonic_curves(curves, seed=2**20).astype(np.float64)
    holes = np.where(seen(*truth.shape), truth, np.nan)
    ways: dict[str, Callable[[], Array]] = {"Gaussian, exact": lambda: exact_draws(law, holes, draws)}
    if seen is around_a_gap:
        ways[f"Gaussian, to {ROUGH}"] = lambda: exact_draws(law, holes, draws, ROUGH)
    for method, sampler, steps in methods:
        ways[f"{method}, {sampler} {steps}"] = lambda m=method, s=sampler, k=steps: model.impute(  # type: ignore[misc]
            holes, draws, method=m, sampler=s, steps=k
        )
    found = []
    for name, way in ways.items():
        found.append((name, judged(way(), holes, truth)))
        print(name, *(f"{what} {values.mean():.4f}" for what, values in found[-1][1].items()), file=sys.stderr)
    return found


def answers(found: list[tuple[str, dict[str, Array]]]) -> list[Answers]:
    """Return the records of what was found, with what falls short."""
    base, records = found[0][1]["CRPS"].mean(), []
    for name, values in found:
        figures = {what: estimate(each) for what, each in values.items()}
        off = [
            f"{band:.0%} ({figures[f'in {band:.0%}'].mean:.1%})"
            for band in BANDS
            if abs(figures[f"in {band:.0%}"].mean - band) > 3 * figures[f"in {band:.0%}"].error
        ]
        ratio = figures["CRPS"].mean / base
        off += [f"a CRPS of at most {WANTED} x the Gaussian's"] if ratio > WANTED else []
        records.append(Answers(name, figures, ratio, off))
    return records


def estimate(values: Array) -> Estimate:
    """The mean of values, and its standard error."""
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


# -- a mixture, whose posterior is known -----------------------------------------------------------------------


def mixture(d: int, rng: np.random.Generator) -> fd.denoisers.Mixture:
    """25 unit Gaussians at (8 i, 8 j, 8 i, ...), i and j from -2 to 2, with weights like squared normals."""
    grid = 8.0 * np.stack(np.meshgrid(*[np.arange(-2, 3)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = rng.normal(size=len(grid)) ** 2
    covs = np.broadcast_to(np.eye(d), (len(grid), d, d))
    return fd.denoisers.Mixture(weights / weights.sum(), np.tile(grid, (1, d // 2)), covs, fd.Schedule.linear())


def drawn(law: fd.denoisers.Mixture, n: int, rng: np.random.Generator) -> Array:
    """Draws (n, d) of a mixture."""
    which = rng.choice(len(law.weights), size=n, p=law.weights)
    roots = [np.linalg.cholesky(one.data.cov + 1e-12 * np.eye(law.shape[0])) for one in law.components]
    means = np.array([one.data.mean for one in law.components])
    return means[which] + np.einsum("nij,nj->ni", np.array(roots)[which], rng.normal(size=(n, law.shape[0])))


def seen_through(law: fd.denoisers.Mixture, m: int, rng: np.random.Generator) -> fd.Linear:
    """An observation of a draw through a matrix (m, d) with sorted uniform singular values, and uniform noise."""
    d = law.shape[0]
    U, V = np.linalg.qr(rng.normal(size=(m, m)))[0], np.linalg.qr(rng.normal(size=(d, m)))[0]
    values = np.sort(rng.random(m))[::-1]
    A, noise = U * values @ V.T, rng.random() * values[0]
    return fd.Linear(A, A @ drawn(law, 1, rng)[0] + noise * rng.normal(size=m), noise)


def sliced_wasserstein(x: Array, y: Array, directions: int = 1000) -> float:
    """The root of the mean square of W2 over random directions, of as many points each."""
    along = np.random.default_rng(0).normal(size=(x.shape[1], directions))
    along /= np.linalg.norm(along, axis=0)
    return float(np.sqrt(np.mean((np.sort(x @ along, axis=0) - np.sort(y @ along, axis=0)) ** 2)))


def posteriors(problems: int, particles: int, steps: int) -> list[Posterior]:
    """Distances of every method's draws to the exact posterior's, and of other draws of that."""
    found = []
    for d in DIMENSIONS:
        for m in SEEN_THROUGH:
            each: dict[str, list[float]] = {"exact": [], **{method: [] for method in OF_MIXTURES}}
            for problem in range(problems):
                rng = np.random.default_rng((d, m, problem))
                law = mixture(d, rng)
                seen = seen_through(law, m, rng)
                truth = law.given(seen)
                exact = drawn(truth, particles, rng)
                each["exact"].append(sliced_wasserstein(drawn(truth, particles, rng), exact))
                for method in OF_MIXTURES:
                    x = fd.sample(
                        law, fd.samplers.ddpm(law.schedule, steps), n=particles, given=seen, method=method,
                        seed=problem, backend="cpu",
                    )  # fmt: skip
                    each[method].append(sliced_wasserstein(x.astype(np.float64), exact))
            found.append(Posterior(d, m, {name: estimate(np.array(values)) for name, values in each.items()}))
            print(f"d = {d}, m = {m}:", *found[-1].cells()[2:], file=sys.stderr)
    return found


# -- costs -----------------------------------------------------------------------------------------------------


def costs(model: fd.Diffusion, n: int, rounds: int = ROUNDS) -> list[Price]:
    """Processor time of n draws given so many values of a curve, through that of n plain ones: medians of rounds."""
    curve, table = fd.data.harmonic_curves(1, seed=2**20)[0].astype(np.float64), model.named_sampler("ddpm", 50)
    places = np.random.default_rng(1).permutation(len(curve))
    taken: dict[int, list[float]] = {m: [] for m in (0, *TOLD)}
    for turn in range(rounds + 1):
        for m, times in taken.items():
            known = np.full(len(curve), np.nan)
            known[places[:m]] = curve[places[:m]]
            start = time.process_time()
            model.sample(n, given=fd.Known(known) if m else None, sampler=table)
            times += [time.process_time() - start] if turn else []  # the first compiles
    found = []
    for m in TOLD:
        ratios = [given / plain for given, plain in zip(taken[m], taken[0], strict=True)]
        found.append(Price(m, statistics.median(ratios), min(ratios), max(ratios), m + 2))
        print("cost:", *found[-1].cells(), file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> int:
    """Learn, draw, print and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", metavar="FILE", type=Path, help="learnt before; written where it is not there")
    parser.add_argument("--steps", type=int, help="training steps (default: what the defaults take)")
    parser.add_argument("--curves", type=int, default=150, help="unseen curves (default 150)")
    parser.add_argument("--draws", type=int, default=39, help="of each (default 39)")
    parser.add_argument("--problems", type=int, default=5, help="mixtures of each size (default 5)")
    parser.add_argument("--particles", type=int, default=200, help="draws given each (default 200)")
    parser.add_argument("--only", choices=("cost",), help="renew a part of the results, where they are")
    parser.add_argument("--without", choices=("cost",), help="leave out a part, for a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="does it work? The numbers mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the tables there in any case")
    args = parser.parse_args(argv)
    fitted, million, steps, curves, draws, rows_of_table = 20_000, 1_000_000, args.steps, args.curves, args.draws, 100
    problems, particles = args.problems, args.particles
    if args.quick:
        fitted, million, steps, curves, draws, rows_of_table = 200, 2000, 4, 3, 8, 4
        problems, particles = 2, 8
    if args.model is not None and args.model.exists():
        model = fd.load(args.model, backend="cpu")
    else:
        model = fd.Diffusion(backend="cpu")
        model.fit(fd.data.harmonic_curves(fitted), steps=steps, judge=True, progress=False)
        if args.model is not None:
            model.save(args.model)
    folder = args.output or (None if args.quick else RESULTS)
    priced = [] if args.without == "cost" else costs(model, 8 if args.quick else 1000)
    if args.only:
        report = load((folder or RESULTS) / "answers-cpu.json")
        assert isinstance(report, AnswersReport)
        report.costs = priced
    else:
        law = gaussian(million)
        gaps = answers(rows(model, law, curves, draws, around_a_gap, GAP_WAYS))
        report = AnswersReport(
            header(fd.get_backend("cpu").threads), SEEN, draws, curves, model.step, model.spread,
            answers(rows(model, law, curves, draws)), problems, particles, rows_of_table,
            posteriors(problems, particles, rows_of_table), gaps, priced,
        )  # fmt: skip
    print(report.table(), end="")
    return finish(report, "answers-cpu", folder, [])


if __name__ == "__main__":
    sys.exit(main())
