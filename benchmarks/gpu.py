"""What ``make gpu`` times on a GPU: the workloads, the ways to do each, their times and the table of them.

The times of our kernels stand beside a device-to-device copy of the same run and, where torch is installed, beside
PyTorch: as it stands, compiled, and compiled and replayed as a CUDA graph. Image networks and their layers are timed in
float32 and in bf16, by our own convolutions and, where the extra `cudnn` is installed, by cuDNN's; the network of
PyTorch is that of diffusers, also in channels-last memory, in compile's mode "reduce-overhead" and under bf16 autocast.
In float32 PyTorch's convolutions are left TF32, its default, and ours do without; only where results are compared
neither has it.

A time is what one call takes in a row of calls that is waited for at its end, arguments and results on the device.
All ways take turns; the table shows medians of the rounds. What is bound by memory, or could be, is compared with the
bandwidth of the copy by the bytes that have to cross memory.

`gpu_run.py` is the program, ``python benchmarks/gpu.py`` starts it, and `gpu_worker.py` its side that touches the GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bare  # noqa: F401 - so that the others are found
import numpy as np
from gpu_profile import Profile
from gpu_sweep import Swept, tuning_of
from report import Report, markdown

from fastdiff import bench
from fastdiff.bench import Workload, duration
from fastdiff.bench.networks import Pictures, PicturesSampling
from fastdiff.bench.table import PICTURE
from fastdiff.bench.workload import Run

ROUNDS, TURN = 7, 0.3  # seconds of calls in one turn
COPY_BYTES = 1 << 30
WAYS = {"eager": "PyTorch", "compiled": "compiled", "graphs": "compiled, CUDA graph"}
IMAGE_WAYS = {
    "eager": "PyTorch", "channels": "channels-last", "compiled": "compiled", "reduced": "reduce-overhead",
    "graphs": "compiled, CUDA graph", "bf16": "bf16", "bf16-graphs": "bf16, compiled, CUDA graph",
}  # fmt: skip
BEST = ("graphs", "bf16-graphs", "reduced")  # of these the fastest, against the fastest of ours
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-bf16": {"precision": "bf16"},
    "ours-cudnn": {"convolutions": "cudnn"},
    "ours-cudnn-bf16": {"precision": "bf16", "convolutions": "cudnn"},
    "ours-bf16x3": {"precision": "bf16x3"},
}
OPTIONAL = ("cupy", "numba-cuda", "torch", "diffusers", "nvidia-cudnn-frontend")
# Of image networks, and of what else has `Workload.precisions`.
OUR_TITLES = {"ours": "ours", "ours-bf16": "bf16", "ours-cudnn": "cuDNN", "ours-cudnn-bf16": "cuDNN, bf16"}
PRECISE_TITLES = {"ours-bf16x3": "bf16x3", "ours-bf16": "bf16"}
TRAINING_UNITS = 100  # steps of a call, whose end brings the state to the host


def sized(name: str, n: int, **changed: Any) -> Workload:
    """Return a workload of the table with another n, in its name and title too."""
    workload = bench.BY_NAME[name]
    commas = "," if workload.n >= 1000 else ""
    title = workload.title.replace(format(workload.n, commas), format(n, commas), 1)
    return replace(workload, name=name.replace(str(workload.n), str(n), 1), title=title, n=n, **changed)


WORKLOADS: tuple[Workload, ...] = (
    *(
        bench.BY_NAME[name]
        for name in (
            "normals-48x1000000", "forward-1000000x50", "step-64x256x256x3", "chain-tutorial-1000",
            "chain-default-100000", "train-tutorial-1000", "train-tutorial-8192", "train-default-1000",
            "similarity-4096x128", "reshape-1000000x128", "standardise-1000000x128", "shaped-1000000x128",
        )
    ),
    sized("chain-tutorial-100000", 1_000_000),
    sized("posterior-1000x10000x64", 16_384),
    sized("unet-train-16", 16, units=TRAINING_UNITS),
    sized("unet-train-16", 256, units=TRAINING_UNITS),
    bench.BY_NAME["unet-forward-16"],
    PicturesSampling("unet-ddim-50-16", "50 DDIM steps, U-Net, 32 x 32 x 3, n = 16", 16, PICTURE, steps=50),
    sized("norm-64x32x32x64", 1024),
    bench.BY_NAME["attention-16x256x128"],
    sized("attention-16x256x128", 512),
    *(
        sized(name, n)
        for name in (
            "conv-16x32x32x64", "conv-16x16x16x128", "conv-16x8x8x256", "conv-back-16x32x32x64",
            "conv-back-16x16x16x128",
        )
        for n in (16, 256)
    ),
)  # fmt: skip
BY_NAME = {workload.name: workload for workload in WORKLOADS}
# What must be reached: a share of the copy's bandwidth, and times of the ways through ours; "best": see `BEST`.
TARGETS: dict[str, dict[str, float]] = {
    "forward-1000000x50": {"copy": 0.85, "eager": 3.0, "compiled": 1.2},
    "step-64x256x256x3": {"copy": 0.85, "eager": 3.0, "compiled": 1.2},
    "chain-tutorial-1000000": {"graphs": 5.0},
    "train-tutorial-1000": {"eager": 3.0},
    "unet-train-16": {"best": 1.5},
    "unet-train-256": {"best": 0.9},
    "unet-ddim-50-16": {"best": 2.0},
    "norm-1024x32x32x64": {"copy": 0.8},
}
SAME_IMAGES, SAME_BF16 = 1e-4, 0.1  # of image networks, in the Euclidean norm, since a step may amplify one value much
# In the order of what matters: the mission's kernels, the targets, what `WORKLOADS` has besides.
FIRST = (
    "forward-1000000x50", "step-64x256x256x3", "reshape-1000000x128", "chain-tutorial-1000000", "train-tutorial-1000",
    "unet-train-16", "unet-ddim-50-16", "norm-1024x32x32x64", "unet-train-256",
)  # fmt: skip


class Ways(NamedTuple):
    """The ways to do one piece of work, as functions that make them, and how many units of it one call does."""

    makers: dict[str, Callable[[], Run]]
    units: dict[str, int]


def in_order(names: list[str]) -> list[str]:
    """Return names of workloads, those of `FIRST` in front."""
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def deciding(workload: Workload) -> tuple[str, ...]:
    """The ways of PyTorch that the targets of a workload are about."""
    targets = TARGETS.get(workload.name, {})
    return (*(BEST if "best" in targets else ()), *(name for name in targets if name in WAYS))


# What is launched first of each source, tiny.
FAMILIES: dict[str, tuple[str, tuple[int, ...]]] = {
    "noise": ("normals-48x1000000", (20,)),
    "step": ("step-64x256x256x3", (4, 4, 3)),
    "covariance": ("similarity-4096x128", (8,)),
    "mlp": ("mlp-tutorial-100000", (10,)),
    "mlp_mma": ("mlp-tutorial-100000", (10,)),
    "optim": ("adamw-4000000", (100,)),
    "pointwise": ("gelu-64x1024x256", (1, 4, 8)),
    "norm": ("norm-64x32x32x64", (4, 4, 8)),
    "layer_norm": ("layer-norm-64x1024x128", (1, 4, 8)),
    "attention": ("attention-16x64x128", (5, 32)),
    "conv": ("conv-back-16x32x32x64", (4, 4, 8)),
    "conv_mma": ("conv-back-16x32x32x64", (4, 4, 8)),
    "tmpd": ("chain-given-tutorial-1000", (10,)),
}


def launch_first(be: Any, source: str) -> None:
    """Launch something of a source, and what that needs of others; its numbers are finite."""
    from fastdiff.backends.cuda import CudaBackend

    name, shape = FAMILIES[source]
    if precision := {"conv_mma": "bf16", "mlp_mma": "bf16x3"}.get(source):
        be = CudaBackend(be.runtime, precision=precision)
    work = replace(bench.BY_NAME[name], n=2, shape=shape).ours(be)
    if not np.isfinite(bench.workload.on_host(be, bench.workload.first(work.run()))).all():
        raise AssertionError("not all numbers are finite")


# -- the work ------------------------------------------------------------------------------------------------------


def sides(be: Any) -> dict[str, Any]:
    """Return the backends that take a turn: `be`, and others on its runtime."""
    from fastdiff.backends.cuda import CudaBackend
    from fastdiff.errors import BackendError

    found = {"ours": be}
    for name in OUR_TITLES:
        if options := OURS[name]:
            try:
                found[name] = CudaBackend(be.runtime, **options)
            except BackendError as error:  # no cuDNN, or none that starts
                if "convolutions" not in options:
                    raise
                print(f"{name}: left out: {error}", flush=True)
    return found


def prepare(be: Any, workload: Workload, peers: Any, twins: Any) -> Ways:
    """Make the arrays of a workload on the device; return what makes the ways that are to be timed.

    That both sides agree is checked here, or where it takes compiling by the maker of a way. Ours come first, then
    PyTorch as it stands, which the others are compared with, then what decides a target. `peers` is the module
    `gpu_peers` or None, `twins` the module with the Numba kernels or None.
    """
    if workload.image:
        makers = image_ways(be, workload, peers)
    else:
        runs = {"ours": workload.operation(be)}
        twin = workload.twin(be, twins) if twins else None
        runs |= ({"twin": twin} if twin else {}) | (workload.gpu_ways(peers, be, runs["ours"]) if peers else {})
        makers = {name: partial(lambda run: run, run) for name, run in runs.items()}
        makers |= {f"ours-{name}": partial(in_precision, be, workload, name) for name in workload.precisions}
    order = [name for name in (*OURS, "eager", *deciding(workload), *makers) if name in makers]
    return Ways({name: makers[name] for name in order}, {name: workload.units if name in OURS else 1 for name in order})


def in_precision(be: Any, workload: Workload, precision: str) -> Run:
    """Return a workload in a precision, after a check of it."""
    from fastdiff.backends.cuda import CudaBackend

    return workload.in_precision(be, CudaBackend(be.runtime, precision=precision))


def image_ways(be: Any, workload: Workload, peers: Any) -> dict[str, Callable[[], Run]]:
    """Return makers of the ways of an image network; where there is PyTorch, each compares with it as it stands."""
    ours = sides(be) if workload.convolves else {"ours": be}
    theirs, network = {}, isinstance(workload, Pictures)
    if peers and not (network and importlib.util.find_spec("diffusers") is None):
        with tempfile.TemporaryDirectory() as folder:
            if network:  # as diffusers reads it
                workload.network().save_diffusers(Path(folder) / "unet")
            theirs = workload.gpu_forms(peers, Path(folder))

    def check(name: str, found: Any) -> None:
        found, reference = (np.reshape(result, -1) for result in (found, theirs["eager"]()[1]))
        error = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
        allowed = SAME_BF16 if "bf16" in name else SAME_IMAGES
        if not error <= allowed:  # NaN fails
            raise AssertionError(
                f"{workload.name}, {name}: ours and PyTorch's differ by {error:.3g}, allowed are {allowed:g}"
            )

    def our(name: str) -> Run:
        if theirs:
            check(name, workload.gpu_result(ours[name]))
        return workload.operation(ours[name])

    def their(name: str) -> Run:
        run, found = theirs[name]()
        check(name, found)
        return run

    return {name: partial(our, name) for name in ours} | {name: partial(their, name) for name in theirs}


# -- timing --------------------------------------------------------------------------------------------------------


class DeadError(Exception):
    """The GPU takes no more work of this process; the message says since when."""


def make(
    ways: Ways,
    wait: Run,
    tell: Callable[[str], None] = lambda name: None,
    late: Callable[[], bool] = lambda: False,
    without: dict[str, str] | None = None,
) -> tuple[dict[str, Run], dict[str, str], list[str]]:
    """Make and warm the ways; return those that work, why others do not, and those there was no time for.

    `tell` gets the name of a way before it is made. Ways of PyTorch are not begun once it is `late`, but for PyTorch
    as it stands, which is quick. `without` says which ways not to make, and why.
    """
    runs: dict[str, Run] = {}
    failed = {name: why for name, why in (without or {}).items() if name in ways.makers}
    cut = []
    for name, maker in ways.makers.items():
        if name in failed:
            continue
        if name not in (*OURS, "eager") and late():
            cut.append(name)
            continue
        tell(name)
        try:
            run = maker()
            for _ in range(3):
                run()
            wait()
            runs[name] = run
        except Exception as error:  # noqa: BLE001 - of whatever kind: it is told, and the others are timed
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            check_alive(wait, error)
    if not runs.keys() & OURS.keys():
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    return runs, failed, cut


def check_alive(wait: Run, error: Exception) -> None:
    """Raise where an error has left nothing to go on with, as an illegal address does."""
    try:
        wait()
    except Exception as dead:
        raise DeadError(f"{type(error).__name__}: {error}") from dead


def turn(run: Run, wait: Run, seconds: float, calls: int = 1) -> float:
    """Return the time of one call: of as many in a row as take so many seconds, waited for at the end.

    `calls` is a guess of how many these are.
    """
    taken = 0.0
    while taken < seconds:
        if taken:
            calls = max(2 * calls, min(100 * calls, int(1.2 * calls * seconds / taken)))
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        taken = time.perf_counter() - start
    return taken / calls


def measure(runs: dict[str, Run], units: dict[str, int], wait: Run, seconds: float) -> Iterator[dict[str, float]]:
    """Yield the median times of a unit of every way, after one round of turns more each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    while True:
        for name, times in taken.items():
            calls = int(1.2 * seconds / (times[0] * units[name])) if times else 1
            times.append(turn(runs[name], wait, seconds, max(1, calls)) / units[name])
        yield {name: statistics.median(times) for name, times in taken.items()}


@dataclass(kw_only=True)
class Row:
    """What was measured of a workload. Ways and their targets are named as in `WAYS` and `TARGETS`."""

    name: str
    title: str
    bytes: int
    operations: int
    image: bool
    seconds: dict[str, float]
    ratios: dict[str, float]  # of PyTorch's times through ours
    share_of_copy: dict[str, float]
    targets: dict[str, float]
    reached: dict[str, float]
    missed: list[str]
    unknown: list[str]
    failed: dict[str, str]  # ways that do not work, and why
    cut: list[str]  # ways that there was no time for
    rounds: tuple[int, int] = (ROUNDS, ROUNDS)  # done, and planned

    @property
    def complete(self) -> bool:
        """Whether it lacks no round and no way."""
        return self.rounds[0] == self.rounds[1] and not self.cut

    @property
    def heading(self) -> str:
        """The title, and how many rounds there are where some are missing."""
        done, rounds = self.rounds
        return self.title + ("" if done == rounds else f" ({done} of {rounds} rounds)")

    def absent(self, way: str) -> str:
        """Why there is no time of a way."""
        return "failed" if way in self.failed else "no time" if way in self.cut else ""

    def outcome(self, target: str) -> str:
        """One of `OUTCOMES`."""
        met, missed, unknown = OUTCOMES
        return unknown if target in self.unknown else missed if target in self.missed else met

    def verdict(self, target: str) -> str:
        """What must be reached, what was, and whether that is enough."""
        least, copy = self.targets[target], target == "copy"
        words = f"{least:.0%} of the copy" if copy else f"{least:g} x {TARGET_TITLES[target]}"
        if target in self.unknown:
            return f"{words}: {self.outcome(target)}"
        reached = self.reached[target]
        return f"{words}: {f'{reached:.0%}' if copy else f'{reached:.2f}'}, {self.outcome(target)}"

    @property
    def verdicts(self) -> str:
        """Of all targets."""
        return ", ".join(map(self.verdict, self.targets))


OUTCOMES = ("met", "**missed**", "not measured")
TARGET_TITLES = WAYS | {"best": "the fastest CUDA graph of PyTorch, by the fastest of ours"}


def row_of(
    workload: Workload, seconds: dict[str, float], failed: dict[str, str], bandwidth: float, cut: list[str]
) -> Row:
    """Return a row of the results; `bandwidth` is that of the copy, in bytes a second.

    As long as a way was cut that decides a target, the target can be missed and not met.
    """
    image = workload.image
    fastest = min((value for name, value in seconds.items() if name in (OURS if image else ("ours",))), default=0.0)
    ratios = {name: value / fastest for name, value in seconds.items() if name in (IMAGE_WAYS if image else WAYS)}
    best = [ratios[name] for name in BEST if name in ratios]
    share = {
        name: workload.bytes / seconds[name] / bandwidth
        for name in ("ours", "twin")
        if workload.memory_bound and name in seconds
    }
    reached = ratios | ({"copy": share["ours"]} if share else {}) | ({"best": min(best)} if image and best else {})
    targets = TARGETS.get(workload.name, {})
    if set(BEST) & set(cut) and reached.get("best", 0) >= targets.get("best", 0):
        reached.pop("best", None)
    return Row(
        name=workload.name, title=workload.title, bytes=workload.bytes, operations=workload.operations, image=image,
        seconds=seconds, ratios=ratios, share_of_copy=share, targets=targets,
        reached={name: reached[name] for name in targets if name in reached},
        missed=sorted(name for name, least in targets.items() if name in reached and reached[name] < least),
        unknown=sorted(set(targets) - set(reached)), failed=failed, cut=cut,
    )  # fmt: skip


def companions() -> tuple[Any, Any]:
    """Return the modules `gpu_peers` and `numba_twins`, or None where what they need is not installed."""
    peers: Any = None
    if importlib.util.find_spec("torch") is not None:
        import gpu_peers as peers
    twins: Any = None
    if importlib.util.find_spec("numba_cuda") is not None:
        from fastdiff.kernels.cuda import numba_twins as twins
    return peers, twins


def benchmark(
    be: Any,
    wait: Run,
    workload: Workload,
    *,
    quick: bool,
    tell: Callable[[str], None] = lambda name: None,
    without: dict[str, str] | None = None,
    share: float = float("inf"),
) -> Iterator[Row]:
    """Time a workload; yield its row after every round, the last one being the row.

    Parameters
    ----------
    be, wait
        A `CudaBackend`, and what waits for its device.
    workload : Workload
    quick : bool
        Tiny, and one round.
    tell : callable
        Gets the name of a way before it is made, and "" before the first round.
    without : dict
        Ways to be left out, and why.
    share : float
        Seconds after which no further way is made.
    """
    late = time.monotonic() + share
    rounds, seconds = (1, 0.01) if quick else (ROUNDS, TURN)
    source = be.runtime.zeros((COPY_BYTES // 4 // (100 if quick else 1),))
    target = be.runtime.zeros(source.shape)
    workload = workload.at(0.001) if quick else workload
    ways = prepare(be, workload, *companions())
    runs, failed, cut = make(ways, wait, tell, lambda: time.monotonic() > late, without)
    runs["copy"] = lambda: be.runtime.copy(target, source)
    tell("")
    medians = measure(runs, ways.units | {"copy": 1}, wait, seconds)
    for done, times in enumerate(itertools.islice(medians, rounds), 1):
        row = row_of(workload, times, failed, 2 * source.nbytes / times.pop("copy"), cut)
        yield replace(row, rounds=(done, rounds))


# -- the report ----------------------------------------------------------------------------------------------------


@dataclass
class Results(Report):
    """All that a run knows."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ended: str = ""  # "time" or "all", once it has
    left: dict[str, list[str]] = field(default_factory=dict)  # what was not run, by stage
    stages: dict[str, str] = field(default_factory=dict)  # what came of each, in words
    faults: dict[str, str] = field(default_factory=dict)
    compile: dict[str, float] = field(default_factory=dict)  # seconds of each source
    ahead: dict[str, str] = field(default_factory=dict)  # what came of compiling PyTorch's networks
    tests: dict[str, dict[str, str]] = field(default_factory=dict)  # outcomes, by stage
    sweep: list[Swept] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Tests that failed."""
        outcomes = [each for stage in self.tests.values() for each in stage.items()]
        return [name.split("::")[-1] for name, outcome in outcomes if outcome.startswith("failed")]

    def measured(self) -> dict[str, Any]:
        """What the package is to know of this family of GPUs."""
        names = ("gpu", "arch", "date", "commit", "sources", "scale", *OPTIONAL)
        targets = {row.title: {target: row.verdict(target) for target in row.targets} for row in targeted(self.rows)}
        tests = {stage: Counter(line.split(":")[0] for line in each.values()) for stage, each in self.tests.items()}
        head = {name: self.header.get(name) for name in names}
        return {**head, "tests": tests, "targets": targets, "tuning": tuning_of(self.sweep) if self.sweep else {}}

    def lines(self) -> list[str]:
        h = self.header
        versions = ", ".join(f"{name} {h[name]}" for name in OPTIONAL if h.get(name))
        tiny = "" if h["scale"] == 1 else f"**At {h['scale']:g} of the sizes: the numbers mean nothing.** "
        lines = [
            f"{tiny}{h['gpu']}; {versions}; Python {h['python']}, {h['system']}; {h['date']}, commit {h['commit']}. "
            "Of the copy: bytes that must cross memory, through the bandwidth of a device-to-device copy of the same "
            "run. Ratios: their time through ours.",
            "",
            *markdown(
                ["work", "ours", *PRECISE_TITLES.values(), "of the copy", "Numba twin", *WAYS.values(), "target"],
                [array_cells(row) for row in self.rows if not row.image],
            ),
        ]
        if images := [row for row in self.rows if row.image]:
            names = ["work", *OUR_TITLES.values(), "of the copy", "PyTorch"]
            names += [*(f"PyTorch: {way}" for way in list(IMAGE_WAYS.values())[1:]), "target"]
            lines += ["", "Image networks, and their layers alone: times of ours and of PyTorch's.", ""]
            lines += markdown(names, [image_cells(row) for row in images])
        lines += ["", *target_lines(self.rows)]
        lines += ["", *(line for profile in self.profiles for line in profile_lines(profile))]
        lines += [f"{name}: {outcome}." for name, outcome in self.stages.items()]
        lines += [f"{name}: **{fault.splitlines()[0]}**." for name, fault in self.faults.items()]
        why = {"": "not yet", "time": "no time left", "all": "given up"}[self.ended]
        for stage, names in self.left.items():
            lines.append(f"Not run, {'no time left' if stage == 'ways' else why}: {stage}: {', '.join(names)}.")
        return lines


def array_cells(row: Row) -> list[str]:
    """Return the cells of a row."""
    share, ratios = row.share_of_copy.get("ours"), row.ratios
    cells = [row.heading, duration(row.seconds["ours"])]
    cells += [duration(row.seconds[way]) if way in row.seconds else row.absent(way) for way in PRECISE_TITLES]
    cells.append("" if share is None else f"{share:.0%}")
    cells.append(duration(row.seconds["twin"]) if "twin" in row.seconds else "")
    cells += [f"**{ratios[way]:.1f}**" if way in ratios else row.absent(way) for way in WAYS]
    return [*cells, row.verdicts]


def image_cells(row: Row) -> list[str]:
    """Return the cells of a row of image networks."""
    share, seconds = row.share_of_copy.get("ours"), row.seconds
    ours, theirs = (
        [duration(seconds[way]) if way in seconds else row.absent(way) for way in ways]
        for ways in (OUR_TITLES, IMAGE_WAYS)
    )
    return [row.heading, *ours, "" if share is None else f"{share:.0%}", *theirs, row.verdicts]


def targeted(rows: list[Row]) -> list[Row]:
    """Return a row for all that has a target."""
    measured = {row.name: row for row in rows}
    return [measured.get(name) or row_of(BY_NAME[name], {}, {}, 1.0, []) for name in TARGETS]


def profile_lines(profile: Profile) -> list[str]:
    """Return lines that say where the time of a step goes."""
    whole = f"A training step of the U-Net in {profile.name}, kernel by kernel: {profile.launches:g} launches, "
    head = ["kernel", "launches", "microseconds", "share"]
    return [f"{whole}{duration(profile.seconds)}.", "", *markdown(head, list(profile.rows())), ""]


def target_lines(rows: list[Row]) -> Iterator[str]:
    """Return lines that say of every target whether it was met."""
    every = targeted(rows)
    outcomes = [row.outcome(target) for row in every for target in row.targets]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome.strip('*')}" for outcome in OUTCOMES)
    yield f"Targets: {counts}."
    yield ""
    yield from markdown(["work", "target"], [[row.title, row.verdict(t)] for row in every for t in row.targets], left=2)


if __name__ == "__main__":
    from gpu_run import main

    sys.exit(main())
