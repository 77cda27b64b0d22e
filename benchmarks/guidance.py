"""What guidance costs: n guided samples beside 2 n others, by the CPU time of one thread.

``python benchmarks/guidance.py`` prints the median of the ratios of runs that take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

import fastdiff as fd

ROUNDS = 9


def seconds(run: Callable[[], object]) -> float:
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def ratio(net: fd.MLP | fd.UNet, table: fd.Sampler, n: int) -> float:
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
    found = [(seconds(plain), seconds(guided)) for _ in range(ROUNDS)]
    return float(np.median([double / single for single, double in found]))


def main() -> None:
    schedule = fd.Schedule.cosine(100)
    curves, chain = fd.MLP(50, T=100, classes=10), fd.samplers.ddpm(schedule, prediction="v")
    pictures = fd.UNet((16, 16, 1), channels=(32, 64), blocks=1, T=100, classes=10)
    for what, net, table, n in (
        ("curves, 1000", curves, chain, 1000),
        ("curves, 8", curves, chain, 8),
        ("pictures, 16", pictures, fd.samplers.ddim(schedule, 4, prediction="v"), 16),
    ):
        print(f"{what}: {ratio(net, table, n):.3f} x that of twice as many")


if __name__ == "__main__":
    main()
