"""A recording with gaps
=====================

Learn a recording of two channels with gaps, fill them with bands, go on beyond its end, find what is strange.

Run it with ``python examples/series.py [-o FOLDER]``: about a minute on a laptop, no GPU, three pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff import plots

NAMES = ("level", "temperature")
LEVELS = (0.025, 0.25, 0.5, 0.75, 0.975)


def recording(rows: int, seed: int = 0) -> np.ndarray:
    """Two channels of a day of 24 rows, whose height drifts, with noise that remembers."""
    rng, t = np.random.default_rng(seed), np.arange(rows)
    noise = rng.normal(size=(rows, 2))
    for k in range(1, rows):
        noise[k] = 0.8 * noise[k - 1] + 0.6 * noise[k]
    height = 1 + 0.3 * np.sin(t / 97)
    day = 2 * np.pi * t / 24
    return np.column_stack([height * np.sin(day), 15 + 8 * height * np.cos(day - 0.5)]) + noise * [0.1, 0.8]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("series"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default 1500)")
    parser.add_argument("--draws", type=int, default=100, help="draws (default 100)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    truth = recording(2000)
    seen = truth.copy()
    seen[np.random.default_rng(1).random(seen.shape) < 0.05] = np.nan  # here and there
    seen[1700:1714, 0] = seen[1740:1760] = np.nan  # and for a while
    model = fd.Diffusion().fit(fd.data.windows(seen, 48, 6), steps=args.steps, judge=False)

    how = model.named_sampler(given=True).label
    part = slice(1660, 1800)
    bands = model.impute(seen[part], args.draws, quantiles=LEVELS)
    figure = plots.bands(
        seen[part], dict(zip(LEVELS, bands, strict=True)), truth=truth[part], names=NAMES, title=f"Gaps: {how}"
    )
    plots.save(figure, args.output / "gaps.png")
    gone = np.isnan(seen[part])
    inside = np.mean((bands[0] <= truth[part])[gone] & (truth[part] <= bands[-1])[gone])
    print(f"{inside:.0%} of the {gone.sum()} missing values are in their bands of 95 %")

    past, ahead = truth[:1600], 60
    fan = model.forecast(past, ahead, args.draws, quantiles=LEVELS)
    whole = truth[1500 : 1600 + ahead]
    known, room = np.where(np.arange(len(whole))[:, None] < 100, whole, np.nan), np.full((100, 2), np.nan)
    lines = {level: np.concatenate([room, one]) for level, one in zip(LEVELS, fan, strict=True)}
    figure = plots.bands(known, lines, truth=whole, names=NAMES, title=f"What comes next: {how}")
    plots.save(figure, args.output / "fan.png")

    strange = truth[1000:1100].copy()
    strange[40, 0] += 0.8  # a spike
    strange[63:67, 1] = strange[63, 1]  # a sensor that sticks while the temperature falls
    found = model.anomaly(strange, draws=24)
    plots.save(plots.anomaly(strange, found, names=NAMES), args.output / "strange.png")
    spike, stuck = found.argmax(axis=0)
    print(
        f"strangest of all: level in row {spike}, a spike was put into 40; temperature in row {stuck}, stuck from 63 on"
    )
    print(f"pictures in {args.output}")


if __name__ == "__main__":
    main()
