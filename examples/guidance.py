"""What guidance does to a distribution
====================================

Samples that are guided with exact scores, beside the law that one might take theirs for.

Run it with ``python examples/guidance.py [-o FOLDER]``: seconds on a laptop, no GPU, one picture.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff.denoisers import Gaussian, Mixture, exact_chain

WEIGHTS = [0, 1, 2, 5]
# Three classes of two Gaussians each; the one asked for has a lobe near its neighbours, and one apart.
MEANS = np.array([[-2.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.2, -0.6], [0.0, -2.5], [-1.8, -2.5]])
SPREAD, ASKED = 0.35, [1, 3]


def laws(schedule: fd.Schedule) -> tuple[Mixture, Mixture]:
    """The exact denoisers of the class that is asked for, and of all."""
    of_class, of_all = (
        Mixture(np.full(len(means), 1 / len(means)), means, [SPREAD**2 * np.eye(2)] * len(means), schedule)
        for means in (MEANS[ASKED], MEANS)
    )
    return of_class, of_all


def variances(g: float, steps: int = 400) -> tuple[float, float]:
    """Of ddim and ddpm, guided from p(x) = N(0, 2) to p(x | c) = N(0, 1), where variance explodes."""
    levels = np.geomspace(2e-3, 200, steps)
    alphas_bar = 1 / (1 + levels**2)
    schedule = fd.Schedule.from_betas(1 - alphas_bar / np.append(1, alphas_bar[:-1]))
    of_class, of_all = (Gaussian(np.zeros(1), [[variance]], schedule) for variance in (1.0, 2.0))
    guided = fd.Guided(of_class, g, of_all)
    tables = fd.samplers.ddim(schedule, steps), fd.samplers.ddpm(schedule)
    ddim, ddpm = (float(exact_chain(guided, table).cov[0, 0]) for table in tables)
    return ddim, ddpm


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("guidance"), help="folder of the picture")
    parser.add_argument("-n", type=int, default=1500, help="samples in a panel (default 1500)")
    parser.add_argument("--steps", type=int, default=400, help="rows of the chains with a closed form (default 400)")
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure

    schedule = fd.Schedule.cosine(100)
    of_class, of_all = laws(schedule)
    table = fd.samplers.ddim(schedule, 100)
    side = np.linspace(-3.4, 3.4, 120)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    log_class, log_all = (each.log_density(grid, 0) for each in (of_class, of_all))
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, g in zip(figure.subplots(1, len(WEIGHTS)), WEIGHTS, strict=True):
        x = fd.sample(fd.Guided(of_class, g, of_all), table, n=args.n, seed=1)
        powered = log_all + g * (log_class - log_all)
        density = np.exp(powered - powered.max()).reshape(len(side), -1)
        axes.contour(side, side, density, levels=[0.02, 0.2, 0.6], colors="tab:orange", linewidths=1)
        axes.plot(*x.T, ".", markersize=1.5, alpha=0.6, color="tab:blue")
        axes.set(title=f"g = {g}", aspect="equal", xticks=[], yticks=[], xlim=side[[0, -1]], ylim=side[[0, -1]])
        upper = np.mean(x[:, 1] > 0.2)
        print(f"g = {g}: {upper:.3f} of the samples in the upper half, deviation {x.std(axis=0).round(3)}")
    figure.suptitle("Guided samples (dots), and the powered law p(x) (p(x|c) / p(x))^g (lines), from exact scores")
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "guidance.png", dpi=110)
    print(f"{args.output / 'guidance.png'}")
    print("   g   ddim   2^(1-g)   ddpm   (2-2^(2-2g))/(2g-1)   the power, 2/(g+1)")
    for g in (1, 2, 3, 5):
        ddim, ddpm = variances(g, args.steps)
        forms = 2.0 ** (1 - g), (2 - 2.0 ** (2 - 2 * g)) / (2 * g - 1), 2 / (g + 1)
        print(f"   {g}  {ddim:.4f}  {forms[0]:.4f}  {ddpm:.4f}  {forms[1]:.4f}  {forms[2]:.4f}")


if __name__ == "__main__":
    main()
