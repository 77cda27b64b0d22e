"""Which sampler, for how many evaluations
=======================================

Which sampler for how many evaluations: exact distances on three laws, and samples of a trained network.

Run it with ``python examples/samplers.py [-o FOLDER]``: a minute or two on a laptop, no GPU, one picture.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff import covariance, plots, samplers
from fastdiff.data import harmonic_curves
from fastdiff.denoisers import Gaussian, exact_chain
from fastdiff.metrics import energy_distance

# euler is ddim by another name, euler_ancestral nearly ddpm, ipndm nearly pndm, and dpmsolver nearly deis; lcm, tcd and
# consistency are for networks that were distilled, and dpm2_ancestral and dpmpp_sde lie where ddpm does.
SHOWN = [
    "unipc", "dpmpp_2m", "dpmpp_3m", "deis", "lms", "dpm2", "dpmpp_2s", "heun", "ddim", "ddpm", "pndm", "sa_solver",
]  # fmt: skip
TWO_EVALUATIONS = ("dpm2", "dpmpp_2s", "heun")  # a step, but for the last one
COUNTS = np.array([5, 7, 9, 11, 15, 21, 31, 51, 75, 99])


def measured(make: Callable[[str, int], samplers.Sampler], distance: Callable[[samplers.Sampler], float]):
    """For each sampler, evaluations and distances; `make` takes its name and a number of timesteps."""
    found = {}
    for name in SHOWN:
        tables = [make(name, (count + 1) // 2 if name in TWO_EVALUATIONS else int(count)) for count in COUNTS]
        found[name] = [table.evaluations for table in tables], [distance(table) for table in tables]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("samplers"), help="folder of the picture")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the network (default 3000)")
    parser.add_argument("--draws", type=int, default=4000, help="samples for each point of its panel (default 4000)")
    parser.add_argument("--backend", default="auto", help="where the network is trained and sampled")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    # Of Gaussian data the best network is known, and so is what a sampler makes of it: no network, no drawing.
    curves = harmonic_curves(20_000)
    family = covariance.empirical((curves - curves.mean()) / curves.std())
    apart = np.abs(np.subtract.outer(np.arange(16), np.arange(16)))
    laws = {
        "Smooth curves of 50 points": (family.mean, family.cov),
        "Autoregression, 16 values": (np.sin(np.arange(16) / 2), 0.9**apart),
        "Stiff: deviations from 0.01 to 10": (np.zeros(24), np.diag(np.logspace(-4, 2, 24))),
    }
    schedule = fd.Schedule.linear(1000)
    panels = {}
    for law, (mean, cov) in laws.items():
        exact, size = Gaussian(mean, cov, schedule), np.sqrt(np.trace(cov))
        panels[law] = measured(
            lambda name, steps: samplers.named(name, schedule, steps),
            lambda table, exact=exact, size=size: exact_chain(exact, table).w2() / size,
        )
        print(f"{law}: exact distance over the size of the data, at {COUNTS.tolist()} evaluations")
        for name, (_, values) in panels[law].items():
            print(f"{name:>10} " + " ".join(f"{value:7.4f}" for value in values))

    # A trained network has errors of its own, and its samples are told from unseen curves by their energy distance.
    levels = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    model = fd.Diffusion(schedule=levels, backend=args.backend)
    model.fit(curves, steps=args.steps, judge=False, progress=False)
    unseen = harmonic_curves(20_000 + 3 * args.draws)[20_000:] / curves.std()
    parts = np.array_split(unseen, 3)

    def distance(table: samplers.Sampler, part: int = 0) -> float:
        drawn = model.sample(args.draws, sampler=table, first_sample=part * args.draws) / curves.std()
        return energy_distance(drawn, parts[part], unbiased=True)

    trained = "A perceptron, trained on 20,000 curves"
    panels[trained] = measured(
        lambda name, steps: samplers.named(name, levels, steps, prediction=model.prediction), distance
    )
    among = [energy_distance(parts[i], parts[j], unbiased=True) for i, j in ((0, 1), (0, 2), (1, 2))]
    print(f"{trained}: energy distance to unseen curves")
    for name, (_, values) in panels[trained].items():
        print(f"{name:>10} " + " ".join(f"{value:7.4f}" for value in values))
    print("  unseen to unseen: " + " ".join(f"{value:.5f}" for value in among))
    for name, steps in (("unipc", 10), ("ddpm", None)):
        table = samplers.named(name, levels, steps, prediction=model.prediction)
        thrice = [distance(table, part) for part in range(3)]
        print(f"{table.label}: {np.mean(thrice):.4f} +- {np.std(thrice, ddof=1) / 3**0.5:.4f}")

    figure = plots.tradeoff(
        panels,
        ylabels={**dict.fromkeys(laws, "exact W2 / size of the data"), trained: "energy distance to unseen"},
        floors={trained: float(np.max(np.abs(among)))},
        title="How far samples are from the data, by network evaluations",
    )
    plots.save(figure, args.output / "samplers.png")
    print(f"pictures in {args.output}")


if __name__ == "__main__":
    main()
