"""Pictures: digits and tiles
==========================

Learn pictures, and draw new ones: handwritten digits, or tiles of a few photographs.

``python examples/images.py`` learns scikit-learn's 1,797 digits of 8 x 8 pixels, some four minutes on two cores, and
judges what it draws with a classifier. ``python examples/images.py tiles [--folder FOLDER]`` cuts tiles out of the
pictures of a folder, or of scikit-learn's two photographs, and learns those. No GPU; needs scikit-learn
(``pip install "fastdiff-engine[examples]"``).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

import fastdiff as fd
from fastdiff import plots
from fastdiff.data import energy_distance, tiles

T = 200
HOW = f"ddpm, {T} steps"  # what draws where nothing else is asked for
RATE = 1e-3
STEPS, BATCH = {"digits": 4000, "tiles": 2000}, {"digits": 128, "tiles": 64}  # three to four minutes on two cores
SEEN = 1400  # digits to learn from; the others judge
ANY = 10  # the class of a digit that is not asked for
GUIDANCE = 2.0  # of those that are
CONFIDENT = 0.9
LEVELS = (0, 16)  # of a digit's pixels
TILE = 16

Named = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # pictures and their classes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("digits", "tiles"), default="digits")
    parser.add_argument("--folder", type=Path, help="tiles of these pictures, not of scikit-learn's photographs")
    parser.add_argument("-o", "--output", type=Path, default=Path("images"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, help="training steps (default 4000 for digits, 2000 for tiles)")
    parser.add_argument("--batch", type=int, help="pictures a step (default 128 for digits, 64 for tiles)")
    parser.add_argument("--drawn", type=int, default=1000, help="digits that are drawn and judged (default 1000)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.folder:
        args.what = "tiles"
    (digits if args.what == "digits" else photographs)(args)
    print(f"pictures in {args.output}")


def digits(args: argparse.Namespace) -> None:
    (seen, names), (unseen, _) = digit_sets()
    plots.save(grid(seen[:16], "Training pictures"), args.output / "digits_training.png")
    model = fit(digit_network(), *shown_twice(seen, names), args, data_range=LEVELS)

    some, path = model.sample(args.drawn, labels=ANY, trajectory=True)  # path: (201, drawn, 8, 8, 1), noise first
    asked = np.arange(args.drawn) % 10
    named = model.sample(args.drawn, labels=asked, guidance=GUIDANCE, first_sample=args.drawn)
    plots.save(grid(some[:16], f"Generated digits: {HOW}"), args.output / "digits_generated.png")
    columns = {"columns": 10, "labels": range(10)}
    plots.save(
        grid(named[:50], f"Drawn as asked: {HOW}, guidance {GUIDANCE:g}", **columns), args.output / "digits_asked.png"
    )
    chain(path, LEVELS, args.output / "digits")

    classify = classifier(seen.reshape(-1, 64), names)
    share, found = classify(some)
    print(f"confident classifications: {share:.1%} of generated digits, {classify(unseen)[0]:.1%} of unseen real ones")
    counts = np.bincount(found, minlength=10) / len(found)
    print("classes of generated digits: " + ", ".join(f"{k}: {part:.1%}" for k, part in enumerate(counts)))
    share, found = classify(named)
    print(f"drawn as asked: {np.mean(found == asked):.1%} are classified so, {share:.1%} are confident")
    flat = [part.reshape(len(part), 64) for part in (some, unseen, seen)]
    drawn, floor = energy_distance(flat[0], flat[1]), energy_distance(flat[2][: args.drawn], flat[1])
    print(f"energy distance to unseen digits: generated {drawn:.3f}, as many real ones {floor:.3f}")


def digit_sets() -> tuple[Named, Named]:
    """The digits to learn from, and the others."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X.reshape(-1, 8, 8, 1)[order].astype(np.float32), y[order]
    return (X[:SEEN], y[:SEEN]), (X[SEEN:], y[SEEN:])


def shown_twice(X: npt.NDArray[Any], y: npt.NDArray[Any]) -> Named:
    """Every digit with its name, and once more as "any": one network for both."""
    return np.concatenate([X, X]), np.concatenate([y, np.full(len(y), ANY)])


def digit_network() -> fd.UNet:
    return fd.UNet((8, 8, 1), channels=(32, 64), blocks=1, T=T, classes=11)


def photographs(args: argparse.Namespace) -> None:
    if args.folder:
        pictures: Any = args.folder
    else:
        from sklearn.datasets import load_sample_images

        pictures = load_sample_images().images
    X = tiles(pictures, size=TILE, count=4096, short=3 * TILE)
    plots.save(grid(X[:16], "Training pictures"), args.output / "tiles_training.png")
    net = fd.UNet(X.shape[1:], channels=(32, 64, 128), blocks=1, T=T)
    model = fit(net, X, None, args, flip=True)
    drawn, path = model.sample(16, trajectory=True)
    plots.save(grid(drawn, f"Generated tiles: {HOW}"), args.output / "tiles_generated.png")
    chain(path, (0, 255), args.output / "tiles")


def fit(net: fd.UNet, X: npt.NDArray[Any], y: Any, args: argparse.Namespace, **options: Any) -> fd.Diffusion:
    """Train and save a model."""
    steps, batch, begun = args.steps or STEPS[args.what], args.batch or BATCH[args.what], perf_counter()
    model = learn(net, X, y, steps=steps, batch=batch, progress=not args.quiet, **options)
    print(f"{net}, {net.layout.count} parameters: {steps} steps in {perf_counter() - begun:.0f} s")
    model.save(args.output / f"{args.what}.safetensors")
    return model


def learn(
    net: fd.UNet, X: npt.NDArray[Any], y: Any, *, steps: int, backend: Any = "auto", **options: Any
) -> fd.Diffusion:
    """Train a model."""
    model = fd.Diffusion(net, fd.Schedule.cosine(T), prediction="noise", backend=backend)
    return model.fit(X, y, steps=steps, lr=RATE, warmup=min(100, steps // 2), decay_steps=steps, **options)


def grid(images: npt.NDArray[Any], title: str, **more: Any) -> Any:
    bounds = (0, 255) if images.dtype == np.uint8 else LEVELS
    return plots.image_grid(images, title=title, data_range=bounds, **more)


def chain(path: npt.NDArray[Any], bounds: tuple[float, float], name: Path) -> None:
    """Draw how noise becomes pictures: four chains in 11 frames, and sixteen as a moving picture."""
    plots.save(plots.image_trace(path[:, :4], data_range=bounds, sampler=HOW), f"{name}_trace.png")
    plots.animation(path[:, :16], f"{name}_chain.gif", data_range=bounds)


def classifier(X: npt.NDArray[Any], y: npt.NDArray[Any]) -> Any:
    """A judge of digits: the share with a top probability above `CONFIDENT`, and the class of each.

    Of those at hand it is the plainest that is not also sure of noise, of blends of two digits and of faint ones.
    """
    from sklearn.linear_model import LogisticRegression

    judge = LogisticRegression(C=0.01, max_iter=3000).fit(X, y)

    def classify(images: npt.NDArray[Any]) -> tuple[float, npt.NDArray[Any]]:
        sure = judge.predict_proba(images.reshape(len(images), -1))
        return float(np.mean(sure.max(axis=1) > CONFIDENT)), sure.argmax(axis=1)

    return classify


if __name__ == "__main__":
    main()
