"""``fastdiff demo``: train on curves, draw new ones, and measure them.

A short script on the public API does the same without the measuring: ``examples/curves.py``.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastdiff import plots, samplers
from fastdiff.data import energy_distance, harmonic_curves, save_curves
from fastdiff.errors import QualityWarning
from fastdiff.files import naming

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastdiff.backends import Backend
    from fastdiff.schedule import Schedule

POINTS, RATE = 50, 50.0  # points a curve, points a second
GENERATED = 2000  # curves that are drawn from each model and measured
BATCH = 256
CURVE_STEPS, CURVE_RATE = 3000, 1e-3
CURVE_ERROR = 0.1  # above it a reader sees that the curves are wrong
FAMILY_STEPS, FAMILY_RATE = 12000, 2e-3
FAMILY_WARMUP = 200
FAMILY_CURVES = 20000  # to learn from
QUICK = 10  # --quick trains this many times shorter


def run(
    folder: str | os.PathLike[str],
    *,
    backend: str | Backend = "auto",
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    say: Callable[[str], None],
) -> None:
    """Train both models, write models, curves and figures into `folder`, and say how good they are.

    Parameters
    ----------
    folder : path
        Made if missing; files of an earlier run are replaced.
    backend : str or Backend, optional
        Where to compute.
    seed : int, optional
        Seed of data, weights, batches and noise.
    quick : bool, optional
        Train a tenth as long.
    progress : bool, optional
        Whether training shows a bar.
    say : callable
        Takes the lines of the report.
    """
    from fastdiff.schedule import Schedule

    plots.check_available()
    start = time.perf_counter()
    out = _Folder(folder, say)
    schedule = Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    out.draw("schedule.png", plots.schedule_factors(schedule), "the two factors of the noising")
    shorter = QUICK if quick else 1
    _single_curve(out, schedule, CURVE_STEPS // shorter, backend=backend, seed=seed, progress=progress)
    _family(out, schedule, FAMILY_STEPS // shorter, backend=backend, seed=seed, progress=progress)
    say(f"\nAll in {out.path}{os.sep}, {time.perf_counter() - start:.0f} s in all. Next:")
    say(f"  fastdiff info {out.path / 'family.safetensors'}")
    say(f"  fastdiff sample {out.path / 'family.safetensors'} -n 100 -o new.csv --plot new.png")


def _single_curve(
    out: _Folder, schedule: Schedule, steps: int, *, backend: str | Backend, seed: int, progress: bool
) -> None:
    import fastdiff as fd

    out.say("\nOne curve, 50 points over 1 s: every sample should be this curve again.")
    curve = harmonic_curves(1, points=POINTS, seed=seed)
    model = fd.Diffusion(fd.MLP(POINTS, T=schedule.T), schedule, backend=backend, seed=seed)
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)  # one curve is to be learned by heart
        model.fit(curve, steps=steps, batch=BATCH, lr=CURVE_RATE, progress=progress)
    out.measured(f"training, {steps} steps of {BATCH}: seconds", time.perf_counter() - begun, 1)
    as_numpy = fd.get_backend(backend).to_numpy
    drawn = as_numpy(model.sample(GENERATED))
    error = float(np.sqrt(np.mean((drawn - curve) ** 2, dtype=np.float64)))
    out.measured(f"root mean square error of {GENERATED} generated curves", error)
    if error > CURVE_ERROR:
        out.say(f"  That is much, of a curve of deviation 1: {steps} steps are too few. Leave --quick out.")

    chain = fd.forward_chain(curve, schedule, seed=seed, backend=backend)[:, 0]
    path = as_numpy(model.sample(1, trajectory=True)[1])
    timesteps, how = np.arange(schedule.T)[::-1], samplers.ddpm(schedule).label
    out.draw(
        "curve_forward.png",
        plots.forward_diffusion(chain, rate=RATE, schedule=schedule),
        "the curve on its way to noise",
    )
    out.draw("curve_loss.png", plots.loss(model.history), "the loss")
    out.draw(
        "curve_reverse.png", plots.reverse_chain(path[:, 0], curve[0], rate=RATE, sampler=how), "noise on its way back"
    )
    out.draw("curve_lines.png", plots.reverse_lines(path[:, 0], timesteps, sampler=how), "the same, by points")
    around = plots.around_target(drawn, curve[0], rate=RATE, sampler=how)
    out.draw("curve_generated.png", around, "generated curves, target")
    model.save(out.file("curve.safetensors", "the model"))


def _family(out: _Folder, schedule: Schedule, steps: int, *, backend: str | Backend, seed: int, progress: bool) -> None:
    import fastdiff as fd

    out.say("\nA family of such curves: samples should be new ones of the same kind.")

    def curves(n: int, first: int) -> npt.NDArray[np.float32]:
        return harmonic_curves(n, points=POINTS, seed=seed, first_sample=first)

    seen = curves(FAMILY_CURVES, 0)
    unseen = curves(GENERATED, FAMILY_CURVES)
    others = curves(GENERATED, FAMILY_CURVES + GENERATED)
    model = fd.Diffusion(fd.MLP(POINTS, T=schedule.T), schedule, backend=backend, seed=seed)
    begun = time.perf_counter()
    model.fit(
        seen,
        steps=steps,
        batch=BATCH,
        lr=FAMILY_RATE,
        warmup=min(FAMILY_WARMUP, steps // 2),
        decay_steps=steps,
        validation=others,
        progress=progress,
    )
    out.measured(f"training, {steps} steps of {BATCH}: seconds", time.perf_counter() - begun, 1)
    drawn = fd.get_backend(backend).to_numpy(model.sample(GENERATED))
    out.measured(f"energy distance, {GENERATED} generated to {GENERATED} unseen", energy_distance(drawn, unseen))
    out.measured("the same between two unseen sets", energy_distance(others, unseen))

    names = (f"Generated: {samplers.ddpm(schedule).label}", "Unseen in training")
    beside = plots.generated(drawn, unseen, rate=RATE, names=names)
    out.draw("family_generated.png", beside, "generated curves beside unseen ones")
    out.draw("family_loss.png", plots.loss(model.history, linear=model.linear_loss(seen)), "the loss")
    save_curves(out.file("family.csv", "the generated curves"), drawn)
    model.save(out.file("family.safetensors", "the model"))


class _Folder:
    """Where the files go; says each of them, and each measure, in one column."""

    def __init__(self, path: str | os.PathLike[str], say: Callable[[str], None]) -> None:
        self.path, self.say = Path(path), say
        with naming(path, "no folder can be made there"):
            self.path.mkdir(parents=True, exist_ok=True)

    def measured(self, what: str, value: float, digits: int = 4) -> None:
        self.say(f"  {what:52} {value:.{digits}f}")

    def file(self, name: str, what: str) -> Path:
        self.say(f"  {self.path / name}: {what}")
        return self.path / name

    def draw(self, name: str, figure: Figure, what: str) -> None:
        plots.save(figure, self.file(name, what))
