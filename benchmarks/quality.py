"""How well the networks learn curves: ``python benchmarks/quality.py``.

The source text's task: one curve of 50 points, its schedule, 5,000 steps of batch 1,000, 2,000 generated curves. For a
family of curves, the energy distance of generated curves to unseen ones, beside that between two unseen sets. Exits
with 1 where a bound is missed.
"""

from __future__ import annotations

import sys

import numpy as np

import fastdiff as fd

STEPS, BATCH, GENERATED = 5000, 1000, 2000
BOUNDS = {"tutorial": 0.20, "default": 0.03}  # root mean square error against the target


def main() -> int:
    """Train, sample, print; return the exit code."""
    schedule = fd.Schedule.sigmoid(100, beta_start=1e-5, beta_end=0.1)
    curve = fd.data.harmonic_curves(1)
    missed = False
    for name, make in (("tutorial", fd.MLP.tutorial), ("default", fd.MLP)):
        model = fd.Diffusion(make(50, T=100), schedule, seed=0)
        model.fit(curve, steps=STEPS, batch=BATCH, progress=False)
        error = float(np.sqrt(np.mean((model.sample(GENERATED) - curve) ** 2, dtype=np.float64)))
        missed |= error > BOUNDS[name]
        print(f"{name} network, one curve: root mean square error {error:.4f}, at most {BOUNDS[name]:.2f} wanted")

    seen, unseen, others = np.split(fd.data.harmonic_curves(20_000 + 2 * GENERATED), [20_000, 20_000 + GENERATED])
    model = fd.Diffusion(fd.MLP(50, T=100), schedule, prediction="v", seed=0)
    model.fit(seen, steps=12_000, batch=256, progress=False)
    drawn = fd.data.energy_distance(model.sample(GENERATED), unseen)
    print(f"family of curves: energy distance of generated to unseen {drawn:.4f}, ", end="")
    print(f"of two unseen sets {fd.data.energy_distance(others, unseen):.4f}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
