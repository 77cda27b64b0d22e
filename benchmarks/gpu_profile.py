"""Where the time of the U-Net's training step goes on a GPU, kernel by kernel: CUDA events around every launch.

Launches are issued one by one behind a row of copies, which keep the device busy meanwhile: so kernels follow each
other as in a graph, and the time between two events is that of a kernel, with what a launch costs the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdiff.bench import Workload

STEPS = 3
FIRST = "draw_batch"  # with which a step begins
COPIES = 64  # in front of it
SHOWN = 12  # rows of the table

Run = Callable[[], None]


class Kernel(NamedTuple):
    """What a kernel costs in a step: launches, and seconds of all."""

    name: str
    launches: float
    seconds: float


@dataclass(kw_only=True)
class Profile:
    """A step, the longest kernel first."""

    name: str
    kernels: list[Kernel]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def launches(self) -> float:
        """Of a step."""
        return sum(kernel.launches for kernel in self.kernels)

    def rows(self) -> Iterator[list[str]]:
        """Yield cells of a table: kernel, launches, microseconds, share."""
        shown, rest = self.kernels[:SHOWN], self.kernels[SHOWN:]
        if rest:
            launches, seconds = (sum(kernel[i] for kernel in rest) for i in (1, 2))
            shown = [*shown, Kernel(f"{len(rest)} others", launches, seconds)]
        for name, launches, seconds in shown:
            yield [name, f"{launches:g}", f"{1e6 * seconds:.1f}", f"{seconds / self.seconds:.0%}"]


def profile(be: Any, workload: Workload, cuda: Any, copies: Run, name: str) -> Profile:
    """Profile some training steps.

    Parameters
    ----------
    be : CudaBackend
        Without graphs.
    workload : Workload
        `STEPS` of them are a run.
    cuda : module
        `cupy.cuda`: of it `Event` and `get_elapsed_time`.
    copies : callable
        Keeps the device busy while a step is issued.
    name : str
        Of the profile.
    """
    work, launch = workload.ours(be), be.runtime.launch
    marks: list[tuple[str, Any, Any]] = []

    def watch(source: str, entry: str, *rest: Any) -> None:
        if entry == FIRST:
            copies()
        begin, end = cuda.Event(), cuda.Event()
        begin.record()
        launch(source, entry, *rest)
        end.record()
        marks.append((entry, begin, end))

    be.runtime.launch = watch
    try:
        result = work.run()  # waits at its end
    finally:
        del be.runtime.launch
    work.check(result)
    steps = sum(entry == FIRST for entry, *_ in marks)
    times: dict[str, list[float]] = defaultdict(list)
    for entry, begin, end in marks:
        end.synchronize()
        times[entry].append(cuda.get_elapsed_time(begin, end) / 1e3)
    kernels = [Kernel(entry, len(of) / steps, sum(of) / steps) for entry, of in times.items()]
    return Profile(name=name, kernels=sorted(kernels, key=lambda kernel: -kernel.seconds))
