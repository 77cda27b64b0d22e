"""The rest of a curve
===================

Ask a model for the rest of a curve of which 8 of 50 points are known, and draw 200 answers beside the exact ones.

Run it with ``python examples/answers.py [-o FOLDER]``: less than a minute on a laptop, no GPU, one picture.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fastdiff as fd
from fastdiff import covariance, plots
from fastdiff.data import harmonic_curves

SEEN = np.array([2, 9, 14, 20, 27, 33, 41, 47])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("answers"), help="folder of the picture")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default 1500)")
    parser.add_argument("--draws", type=int, default=200, help="answers (default 200)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    X = harmonic_curves(10_000)
    model = fd.Diffusion().fit(X, steps=args.steps, judge=False)

    # A curve that the model has not seen, and of this one 8 points. NaN: not known.
    truth = harmonic_curves(1, seed=2)[0]
    known = np.full_like(truth, np.nan)
    known[SEEN] = truth[SEEN]
    drawn = model.impute(known[None], args.draws)  # (draws, 1, 50)

    # A Gaussian fitted to the same curves has an answer in closed form, as good as covariances can be.
    data = covariance.empirical(X)
    law = fd.denoisers.Gaussian(data.mean, data.cov, fd.Schedule.cosine(10)).given(fd.Known(known)).data
    rng = np.random.default_rng(0)
    exact = rng.multivariate_normal(law.mean, law.cov, args.draws, method="eigh")
    exact[:, SEEN] = truth[SEEN]  # their variance is 0 but for rounding

    both = np.stack([drawn[:, 0], exact], axis=1)
    names = (f"The model's answers: {model.named_sampler(given=True).label}", "A Gaussian's, exact")
    figure = plots.imputed(np.stack([known, known]), both, truth=np.stack([truth, truth]), names=names, rate=50)
    plots.save(figure, args.output / "answers.png")
    hidden = np.isnan(known)
    for name, answers in zip(names, both.swapaxes(0, 1), strict=True):
        low, high = np.quantile(answers[:, hidden], (0.025, 0.975), axis=0)
        inside = np.mean((truth[hidden] >= low) & (truth[hidden] <= high))
        print(
            f"{name}: bands {np.mean(high - low):.2f} wide on average, with {inside:.0%} of the hidden points in them"
        )
    print(f"picture in {args.output}")


if __name__ == "__main__":
    main()
