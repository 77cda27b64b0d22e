"""How good answers are, of curves seen at 8 of 50 points: ``python benchmarks/answers.py``.

The default network learns 20,000 harmonic curves. Of unseen ones 8 points at random are told, and the others are drawn,
by several methods, beside draws from the exact conditional of a Gaussian that was fitted to a million curves. Of the
draws: how many of the hidden values lie in their bands of 50, 80 and 95 %, and the fair CRPS (Gneiting & Raftery 2007),
with standard errors over the curves, for the values of a curve are not independent.

Without --quick the table goes to ``results/answers-cpu.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import header
from readme_numbers import RESULTS, place, write

import fastdiff as fd

Array = npt.NDArray[Any]
SEEN, BANDS = 8, (0.5, 0.8, 0.95)
WAYS = (
    ("tmpd", "ddpm", 100), ("tmpd", "dpmpp_2m", 50), ("pigdm", "ddpm", 100), ("pigdm", "dpmpp_2m", 50),
    ("replace", "ddpm", 100), ("replace", "dpmpp_2m", 50),
)  # fmt: skip
WANTED = 1.15  # CRPS through that of the Gaussian


def gaussian(rows: int, points: int = 50) -> fd.denoisers.Gaussian:
    """The Gaussian with the moments of so many curves."""
    count, first, second = 0, np.zeros(points), np.zeros((points, points))
    for seed in range(1, 1 + -(-rows // 100_000)):
        X = fd.data.harmonic_curves(min(rows - count, 100_000), points=points, seed=seed).astype(np.float64)
        count, first, second = count + len(X), first + X.sum(axis=0), second + X.T @ X
    mean = first / count
    return fd.denoisers.Gaussian(mean, second / count - np.outer(mean, mean), fd.Schedule.cosine(10))


def crps(draws: Array, truth: Array) -> Array:
    """The fair CRPS of draws (n, ...), like the truth (...)."""
    n = len(draws)
    ranks = (2 * np.arange(n) - n + 1).reshape(n, *[1] * truth.ndim)
    spread = (ranks * np.sort(draws, axis=0)).sum(axis=0) / (n * (n - 1))
    return np.asarray(np.abs(draws - truth).mean(axis=0) - spread)


def judged(draws: Array, holes: Array, truth: Array) -> dict[str, Array]:
    """Of each curve, over its hidden values: the CRPS, and the shares in bands."""
    hidden = np.isnan(holes)

    def mean(values: Array) -> Array:
        return np.asarray((values * hidden).sum(axis=1) / hidden.sum(axis=1))

    found = {"CRPS": mean(crps(draws, truth))}
    # The rank of the truth among n draws is uniform over n + 1 places where the law is right; of 40, 80, ... places the
    # bands have whole numbers.
    place = ((draws < truth).sum(axis=0) + 0.5) / (len(draws) + 1)
    return found | {f"in {band:.0%}": mean(np.abs(place - 0.5) < band / 2) for band in BANDS}


def exact_draws(law: fd.denoisers.Gaussian, holes: Array, draws: int) -> Array:
    """Draws (draws, N, points) of the conditional of a Gaussian."""
    rng, out = np.random.default_rng(0), np.empty((draws, *holes.shape))
    for k, row in enumerate(holes):
        data = law.given(fd.Known(row)).data
        out[:, k] = rng.multivariate_normal(data.mean, data.cov, draws, method="eigh")
    return out


def rows(
    model: fd.Diffusion, law: fd.denoisers.Gaussian, curves: int, draws: int
) -> list[tuple[str, dict[str, Array]]]:
    """What was found for every way, the Gaussian's first."""
    truth = fd.data.harmonic_curves(curves, seed=2**20).astype(np.float64)
    seen = np.random.default_rng(1).random(truth.shape).argsort(axis=1) < SEEN
    holes = np.where(seen, truth, np.nan)
    ways: dict[str, Callable[[], Array]] = {"Gaussian, exact": lambda: exact_draws(law, holes, draws)}
    for method, sampler, steps in WAYS:
        table = model.named_sampler(sampler, steps)
        ways[f"{method}, {sampler} {steps}"] = lambda m=method, s=table: model.impute(  # type: ignore[misc]
            holes, draws, method=m, sampler=s
        )
    found = []
    for name, way in ways.items():
        found.append((name, judged(way(), holes, truth)))
        print(name, *(f"{what} {values.mean():.4f}" for what, values in found[-1][1].items()), file=sys.stderr)
    return found


def table(found: list[tuple[str, dict[str, Array]]], where: dict[str, Any], draws: int) -> str:
    """The table as Markdown, and what falls short."""
    base, short = found[0][1]["CRPS"].mean(), []
    columns = list(found[0][1])
    lines = [
        f"{place(where)} {len(found[0][1]['CRPS'])} curves of 50 points, {SEEN} of them seen, {draws} draws each; mean "
        "and standard error over the curves.",
        "",
        f"| draws by | {' | '.join(columns)} | CRPS through the Gaussian's |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    for name, values in found:
        cells = [f"{v.mean():.4f} ± {v.std(ddof=1) / np.sqrt(len(v)):.4f}" for v in values.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['CRPS'].mean() / base:.2f} |")
        off = [
            f"{band:.0%} ({values[f'in {band:.0%}'].mean():.1%})"
            for band in BANDS
            if abs(values[f"in {band:.0%}"].mean() - band)
            > 3 * values[f"in {band:.0%}"].std(ddof=1) / np.sqrt(len(values["CRPS"]))
        ]
        if values["CRPS"].mean() > WANTED * base:
            off.append(f"a CRPS of at most {WANTED} x the Gaussian's")
        short += [f"{name}: {', '.join(off)}"] if off else []
    lines += ["", "Missed (bands by more than three standard errors): " + ("; ".join(short) or "nothing") + "."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Learn, draw, print and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="answers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", metavar="FILE", type=Path, help="learnt before; written where it is not there")
    parser.add_argument("--steps", type=int, help="training steps (default: what the defaults take)")
    parser.add_argument("--curves", type=int, default=200, help="unseen curves (default 200)")
    parser.add_argument("--draws", type=int, default=79, help="of each (default 79)")
    parser.add_argument("--quick", action="store_true", help="does it work? The numbers mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the table there in any case")
    args = parser.parse_args(argv)
    fitted, million, steps, curves, draws = 20_000, 1_000_000, args.steps, args.curves, args.draws
    if args.quick:
        fitted, million, steps, curves, draws = 200, 2000, 4, 3, 8
    if args.model is not None and args.model.exists():
        model = fd.load(args.model, backend="cpu")
    else:
        model = fd.Diffusion(backend="cpu")
        model.fit(fd.data.harmonic_curves(fitted), steps=steps, judge=False, progress=False)
        if args.model is not None:
            model.save(args.model)
    where = header(fd.get_backend("cpu").threads)
    text = table(rows(model, gaussian(million), curves, draws), where, draws)
    text = text.replace("; mean and", f"; {model.step} training steps; mean and")
    print(text, end="")
    output = args.output or (None if args.quick else RESULTS)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write(output / "answers-cpu.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
