"""One curve, and a family
=======================

Learn the tutorial's single curve, then a family of curves, and draw what the models make of noise.

Run it with ``python examples/curves.py [-o FOLDER]``: seconds on a laptop, no GPU, four pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff import plots
from fastdiff.data import harmonic_curves


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("curves"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of each model (default 3000)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    # Noise enters in 100 steps, gently at first: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z.
    schedule = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)

    # One curve, 50 points over one second. fd.MLP.tutorial(50, T=100) as first argument of Diffusion would be
    # the tutorial's own network; it needs more steps.
    curve = harmonic_curves(1)
    model = fd.Diffusion(schedule=schedule).fit(curve, steps=args.steps)
    drawn, path = model.sample(100, trajectory=True)  # path: (rows + 1, 100, 50), noise first
    error = np.sqrt(np.mean((drawn - curve) ** 2))
    print(f"one curve: root mean square error {error:.3f} over {len(drawn)} generated curves")
    how = model.named_sampler().label  # what draws where nothing else is asked for: "dpmpp_2m, 50 steps"
    plots.save(plots.reverse_chain(path[:, 0], curve[0], rate=50, sampler=how), args.output / "one_reverse.png")

    # A family: sums of five cosines of random frequency and phase. No two are alike; what the samples share
    # with the training curves is how smooth they are and how far they swing.
    family = harmonic_curves(10_000)
    model = fd.Diffusion(schedule=schedule).fit(family, steps=args.steps)
    drawn, path = model.sample(200, trajectory=True)
    names = (f"Generated: {how}", "Real")
    plots.save(plots.generated(drawn, family, rate=50, names=names), args.output / "family.png")
    plots.moving_curves(path[:, :8], args.output / "family.gif", frames=32)
    plots.save(plots.loss(model.history, linear=model.linear_loss()), args.output / "family_loss.png")
    print(f"pictures in {args.output}")


if __name__ == "__main__":
    main()
