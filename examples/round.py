"""Pictures: round things
======================

Learn circles, and a handful of portraits, and see how white noise becomes pictures like them.

The source text trains a network on five round portraits, and finds what it draws "not too round". ``python
examples/round.py`` learns drawn portraits, of which every step sees another part, and circles, whose roundness is
measured: how far the outline's radius is from being the same all around, beside the same of the training pictures,
which have pixels. Minutes on a laptop, no GPU. ``--portraits 200`` learns from more than a handful, and draws faces
that are not among them.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastdiff as fd
from fastdiff import plots

T, SIZE, MARGIN, CHANNELS = 200, 32, 2, (16, 32, 64)
CIRCLES, CIRCLE_STEPS, CIRCLE_BATCH, CIRCLE_RATE = 20_000, 6000, 16, 2e-3
PORTRAIT_STEPS, PORTRAIT_BATCH = 1500, 8


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("round"), help="folder of the pictures")
    parser.add_argument("--portraits", type=int, default=5, help="how many are learned (default 5)")
    parser.add_argument("--steps", type=int, help="training steps of both")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    X = fd.data.portraits(args.portraits, SIZE + 2 * MARGIN)
    plots.save(plots.image_grid(X[:16], columns=5, title="Training portraits"), args.output / "portraits_training.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fd.errors.QualityWarning)  # five are learned by heart, and are to be
        model = learn(X, args.steps or PORTRAIT_STEPS, PORTRAIT_BATCH, not args.quiet, crop=SIZE, flip=True)
    drawn(model, "portraits", args.output)

    X = fd.data.circles(CIRCLES, SIZE)
    model = learn(X, args.steps or CIRCLE_STEPS, CIRCLE_BATCH, not args.quiet, lr=CIRCLE_RATE)
    circles = drawn(model, "circles", args.output)
    of_pixels, of_drawn = (deviations(some) for some in (X[: len(circles)], circles))
    print(f"deviation of the radius: {of_drawn:.4f} of drawn circles, {of_pixels:.4f} of the pixels' own")
    print(f"pictures in {args.output}")


def learn(X: npt.NDArray[np.uint8], steps: int, batch: int, progress: bool = True, **options: Any) -> fd.Diffusion:
    """Train a small U-Net."""
    net = fd.UNet((SIZE, SIZE, X.shape[3]), channels=CHANNELS, blocks=1, T=T)
    options = {"warmup": min(100, steps - 1), "decay_steps": steps, "judge": False, "progress": progress, **options}
    return fd.Diffusion(net, fd.Schedule.cosine(T)).fit(X, steps=steps, batch=batch, validation=0, **options)


def drawn(model: fd.Diffusion, name: str, folder: Path) -> npt.NDArray[np.uint8]:
    """Draw a grid, and one chain in 11 frames; return the pictures."""
    new, path = model.sample(16, trajectory=True)
    plots.save(plots.image_grid(new, title=f"Generated {name}"), folder / f"{name}_generated.png")
    plots.save(plots.image_trace(path[:, :3], sampler=f"ddpm, {T} steps"), folder / f"{name}_trace.png")
    return new


def deviations(circles: npt.NDArray[np.uint8]) -> float:
    """The median of the relative deviations of the outlines' radii."""
    return float(np.median(fd.metrics.roundness(circles)))


if __name__ == "__main__":
    main()
