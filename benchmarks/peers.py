"""The same work here and in PyTorch with diffusers, timed side by side: ``python benchmarks/peers.py``.

For each workload there are two processes, one for each side, that never work at the same time. Both first
compute the same small example from the same weights, inputs and noise, and a workload is timed only if the results
agree. Then they take turns: one of ours, one of theirs, and again. A round's ratio is their time through ours; the
table shows the median of the rounds' ratios with the smallest and the largest.

What a time is: the median of the calls in one turn, warm, with the arguments in memory, and with the results newly
allocated where the call under test returns new ones; for the cold start, from the start of a process to its exit,
its files in the page cache. Both sides use the same number of threads. PyTorch runs eagerly, under no_grad where it
samples, with its default AdamW; rows with the fused one, and with the network through torch.compile (default mode,
compiled before the first turn), are added. `peer_nets.py` and `cold_peer.py` are its code. The ratio of a row of many
shapes is the median of theirs.

The memory of a side is the most that its process had while it worked, less what it had with its libraries imported.

Without --only, --quick or --threads the results go to ``results/peers-cpu.json`` and ``.md``, with the reason where
a workload could not be compared; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import header
from report import BUSY, RESULTS, Compared, Memory, PeersReport, Ratio, Shape, Sides, finish
from workloads import OF_PEERS

from fastdiff.bench.networks import joined
from fastdiff.bench.workload import Run, Workload
from fastdiff.kernels.cpu.tiles import why_not


@dataclass(frozen=True)
class Comparison:
    """A workload, what it is compared with, and the ratio that must be reached on two cores."""

    workload: str
    target: float | None = None
    variant: str = ""  # how the peer works, a key of `VARIANTS`
    memory: float | None = None  # its peak is shown as well, and is to be at most so much of the peer's

    @property
    def name(self) -> str:
        return self.workload + (f"-{self.variant}" if self.variant else "")

    @property
    def against(self) -> str:
        what = OF_PEERS[self.workload].peer_name
        return VARIANTS[self.variant].format(what.replace("AdamW", "fused AdamW") if self.variant else what)


VARIANTS = {
    "": "{}", "fused": "{}", "compiled": "torch.compile, {}", "numpy": "NumPy broadcasting",
    "looped": "{}, draw by draw", "jax": "JAX, jit of the whole",
    "openvino": "OpenVINO, float32, diffusers UNet2DModel",
    "openvino-bf16": "OpenVINO, bf16, diffusers UNet2DModel", "bf16": "bf16 autocast, {}",
}  # fmt: skip
OPENVINO = ("diffusers.models", "openvino")
LIBRARIES = {"jax": ("jax",), "openvino": OPENVINO, "openvino-bf16": OPENVINO}  # of variants: more than PyTorch
HALVES = ("bf16", "openvino-bf16")  # variants in which both sides multiply bf16 values
PARITY_HALVES = 0.05  # of their results: bf16 has 8 bits, and a network is deep
COMPARISONS = (
    Comparison("normals-48x1000000", 5.0),
    Comparison("normals-960000x50", 5.0),
    Comparison("forward-1000000x50", 4.0),
    Comparison("step-64x256x256x3", 6.0),
    Comparison("chain-tutorial-1", 10.0),
    Comparison("chain-tutorial-1000", 2.0),
    Comparison("chain-tutorial-100000", 3.5),
    Comparison("train-tutorial-10", 8.0),
    Comparison("train-tutorial-1000", 2.0),
    Comparison("train-tutorial-8192", 3.0),
    Comparison("cold-start", 3.0),
    Comparison("train-tutorial-10", variant="fused"),
    Comparison("train-tutorial-1000", variant="fused"),
    Comparison("chain-tutorial-1", 2.0, "jax"),
    Comparison("chain-tutorial-16", 1.8, "jax"),
    Comparison("chain-tutorial-1000", 1.8, "jax"),
    Comparison("chain-tutorial-100000", 2.5, "jax"),
    Comparison("train-tutorial-10", 1.8, "jax"),
    Comparison("train-tutorial-1000", 1.5, "jax"),
    Comparison("train-tutorial-8192", 1.5, "jax"),
    Comparison("chain-default-1"),
    Comparison("chain-default-1000"),
    Comparison("chain-default-100000"),
    Comparison("train-default-10"),
    Comparison("train-default-1000"),
    Comparison("train-default-8192"),
    Comparison("chain-given-tutorial-1000", 3.0),
    Comparison("chain-given-tutorial-100000", 3.0),
    Comparison("similarity-4096x128", 2.0),
    Comparison("similarity-4096x128", 5.0, variant="numpy"),
    Comparison("reshape-1000000x128", 0.95),
    Comparison("standardise-1000000x128", 1.5),
    Comparison("shaped-1000000x128", 1.5),
    Comparison("posterior-1000x10000x64"),
    Comparison("unet-train-16", 1.0),
    Comparison("unet-forward-16", 1.6),
    Comparison("unet-ddim-16", 1.6),
    Comparison("unet-forward-1"),
    Comparison("unet-train-ema-16", 1.8, variant="fused", memory=0.8),
    Comparison("unet-train-ema-16", 1.6, variant="compiled"),
    Comparison("unet-forward-16", 1.4, variant="compiled"),
    Comparison("unet-ddim-16", 1.4, variant="compiled"),
    Comparison("unet-forward-1", 1.5, "openvino"),
    Comparison("unet-forward-16", 2.0, "openvino"),
    Comparison("unet-forward-64", 1.7, "openvino"),
    Comparison("unet-forward-1", 1.2, "openvino-bf16"),
    Comparison("unet-forward-16", 1.2, "openvino-bf16"),
    Comparison("unet-forward-64", 1.2, "openvino-bf16"),
    Comparison("unet-train-ema-16", 1.8, "bf16"),
    Comparison("unet-train-64px-4"),
    Comparison("unet-forward-64px-4"),
    Comparison("unet-train-wide-16"),
    Comparison("unet-forward-wide-16"),
    Comparison("unet-series-train-32", 2.0),
    Comparison("unet-series-ddim-32", 2.0),
    Comparison("impute-24x5-100", 3.0),
    Comparison("impute-24x5-100", 10.0, variant="looped"),
    Comparison("conv-forward", 1.5),
    Comparison("conv-input-gradient", 1.5),
    Comparison("conv-weight-gradient", 1.2),
)
SIDES = ("ours", "peer")
ROUNDS, LEAST_ROUNDS, PATIENCE = 7, 3, 20.0  # fewer rounds once a workload has taken this many seconds
TURN = 0.3  # seconds of calls in one turn
SHAPE_TURN = 0.1  # the same where many shapes take turns
LONG = 0.8  # seconds: a call of this length is not repeated for warmth
PAUSE = 0.2  # between turns: threads of the other side stop spinning


class PeersError(Exception):
    """A workload that cannot be compared; the message says why."""


# -- the workers -----------------------------------------------------------------------------------------------


def our_backend(threads: int, variant: str) -> Any:
    """Return the backend of a variant's comparison."""
    import fastdiff as fd

    return fd.get_backend("cpu", threads=threads, precision="bf16" if variant in HALVES else "float32")


def our_worker(workload: Workload, folder: Path, threads: int, variant: str = "") -> tuple[list[Run], int]:
    """Compute the example, leave it in the folder; return what is to be timed, by part, and the units of a run."""
    be = our_backend(threads, variant)
    inputs, outputs = workload.peer_example.compare(be, folder)
    np.savez(folder / "inputs.npz", **inputs)
    np.savez(folder / "ours.npz", **outputs)
    if len(workload.parts) > 1:
        return [part.operation(be) for part in workload.parts], 1
    work = workload.setup(be)
    work.check(work.run())
    assert "torch" not in sys.modules
    return [work.run], work.units


def peer_worker(workload: Workload, folder: Path, threads: int, variant: str) -> tuple[list[Run], int]:
    """Compute the example from the inputs in the folder, and return the same of the peer."""
    with np.load(folder / "inputs.npz") as file:
        inputs = {name: file[name] for name in file.files}
    if variant == "jax":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA has as many threads as cores
        import peer_jax

        outputs, runs = peer_jax.SIDES[type(workload).__name__](workload, inputs)
    elif variant.startswith("openvino"):
        import peer_openvino

        outputs, runs = peer_openvino.forward_side(workload, inputs, folder, threads, variant in HALVES)
    else:
        import peer_nets

        peer_nets.torch.set_num_threads(threads)
        peer_nets.torch.manual_seed(0)
        outputs, runs = workload.peer_side(peer_nets, inputs, folder, variant)
    np.savez(folder / "peer.npz", **outputs)
    assert "fastdiff.backends.cpu" not in sys.modules
    return runs, workload.units


def serve(side: str, workload: Workload, folder: Path, threads: int, variant: str) -> None:
    """Be a worker: prepare, then take one turn for each line of stdin: how many seconds it lasts, and which part."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    if side == "ours":
        our_backend(threads, variant)
        before = resident("VmRSS")
        runs, units = our_worker(workload, folder, threads, variant)
    else:
        for library in LIBRARIES.get(variant, ("torch", "diffusers.models")):
            importlib.import_module(library)
        before = resident("VmRSS")
        runs, units = peer_worker(workload, folder, threads, variant)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    say(ready=True)
    last = [0.0] * len(runs)
    for line in sys.stdin:
        length, part = float(line.split()[0]), int(line.split()[1])
        run = runs[part]
        # Memory that was given back in the pause is slow at its first touch: a call that is not counted takes it.
        if last[part] < LONG:
            run()
        seconds: list[float] = []
        begin = time.perf_counter()
        while not seconds or time.perf_counter() - begin < length:
            start = time.perf_counter()
            run()
            last[part] = time.perf_counter() - start
            seconds.append(last[part] / units)
        say(seconds=statistics.median(seconds), calls=len(seconds), peak=resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of memory that this process has (VmRSS), or had at most (VmHWM). Linux only; 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


# -- the comparison --------------------------------------------------------------------------------------------


class Worker:
    """The process of one side of a workload."""

    def __init__(self, side: str, comparison: Comparison, scale: float, folder: Path, threads: int) -> None:
        self.side, self.peak, begin = side, 0, time.perf_counter()
        command = [
            sys.executable,
            __file__,
            "--worker",
            side,
            "--workload",
            comparison.workload,
            "--scale",
            repr(scale),
        ]
        command += ["--variant", comparison.variant]
        self.process = subprocess.Popen(
            [*command, "--folder", str(folder), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")} | _environment(threads),
        )
        try:
            self._answer()
        except PeersError:
            self.close()
            raise
        self.prepared = time.perf_counter() - begin

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeersError(f"the process of {self.side} failed: see its traceback above")
        return json.loads(line)

    def turn(self, seconds: float, part: int = 0) -> float:
        """Let it work for about that long, on one of the parts; return its time for one unit of the work."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(f"{seconds} {part}\n")
            self.process.stdin.flush()
        answer = self._answer()
        self.peak = answer["peak"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.terminate()  # it has nothing to save
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def check_parity(workload: Workload, folder: Path, variant: str = "") -> dict[str, dict[str, float]]:
    """Compare the two results of the example; return what they differ by, or raise `PeersError`."""
    loaded = [np.load(folder / name) for name in ("inputs.npz", "ours.npz", "peer.npz")]
    inputs, ours, theirs = ({key: file[key] for key in file.files} for file in loaded)
    for file in loaded:
        file.close()
    parity: dict[str, dict[str, float]] = {}
    if ours.keys() != theirs.keys():
        raise PeersError(f"results to compare: {sorted(ours)} of ours, {sorted(theirs)} of the peer")
    for name, value in ours.items():
        other = theirs[name]
        if value.shape != other.shape:
            raise PeersError(f"parity of {name}: shapes {value.shape} and {other.shape}")
        if name == "moments":
            error = max(np.abs(value - other).max(), np.abs(value).max(), np.abs(other).max())
        elif name == "weights":
            error = np.linalg.norm(value - other) / np.linalg.norm(other - joined(inputs))
        else:
            error = np.abs(value - other).max() / np.abs(other).max()
        tolerance = PARITY_HALVES if variant in HALVES else workload.parity[name.partition("/")[0]]
        parity[name] = {"difference": float(error), "tolerance": tolerance}
        if not error <= tolerance:  # NaN fails
            raise PeersError(f"parity of {name} in {workload.name}: differs by {error:.3g}, allowed {tolerance:g}")
    return parity


class Others:
    """How much of the machine other programs use, seen while both workers rest. Linux only; 0 elsewhere."""

    def __init__(self) -> None:
        self.busy = self.all = 0

    @staticmethod
    def _ticks() -> tuple[int, int]:
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except OSError:
            return 0, 0
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less what was idle, or waited for a disk

    def rest(self, seconds: float) -> None:
        """Wait, and look who works."""
        busy, everything = self._ticks()
        time.sleep(seconds)
        busy_after, everything_after = self._ticks()
        self.busy, self.all = self.busy + busy_after - busy, self.all + everything_after - everything

    @property
    def share(self) -> float:
        return self.busy / max(1, self.all)


def compare(comparison: Comparison, *, scale: float, rounds: int, turn: float, pause: float, threads: int) -> Compared:
    """Time one workload on both sides, in alternation; return its row of the results."""
    workload, others = OF_PEERS[comparison.workload].at(scale), Others()
    parts = workload.parts
    with tempfile.TemporaryDirectory(prefix="fastdiff-peers-") as name, contextlib.ExitStack() as stack:
        folder, workers = Path(name), []
        for side in SIDES:
            workers.append(Worker(side, comparison, scale, folder, threads))
            stack.callback(workers[-1].close)
        parity = check_parity(workload, folder, comparison.variant)
        how = {"rounds": rounds, "turn": min(turn, SHAPE_TURN) if len(parts) > 1 else turn, "pause": pause}
        turns = [alternate(workers, part, others, **how) for part in range(len(parts))]
    done = [Sides(*(sum(getattr(one, side) for one in each) for side in SIDES)) for each in zip(*turns, strict=False)]
    ratio, seconds = summary(done)
    shapes: list[Shape] = []
    if len(parts) > 1:
        each = zip(parts, map(summary, turns), strict=True)
        shapes = [Shape(part.title, *figures, part.operations) for part, figures in each]
        ratio = spread([shape.ratio.median for shape in shapes])
    ours, peer = workers
    seen = comparison.memory is not None and ours.peak and peer.peak
    return Compared(
        name=comparison.name, title=workload.title, peer=comparison.against, bytes=workload.bytes,
        operations=workload.operations, normals=workload.normals, ratio=ratio, seconds=seconds,
        target=comparison.target, met=None if comparison.target is None else ratio.median >= comparison.target,
        rounds=done, others=round(others.share, 3), prepared=Sides(ours.prepared, peer.prepared), parity=parity,
        shapes=shapes, memory=Memory(ours.peak, peer.peak, comparison.memory) if seen else None,
    )  # fmt: skip


def alternate(
    workers: list[Worker], part: int, others: Others, *, rounds: int, turn: float, pause: float
) -> list[Sides]:
    """Let the workers take turns on a part; return their times of each round."""
    for worker in workers:
        worker.turn(0, part)  # warm
    done: list[Sides] = []
    begin = time.perf_counter()
    while len(done) < rounds and (len(done) < LEAST_ROUNDS or time.perf_counter() - begin < PATIENCE):
        seconds = []
        for worker in workers:
            others.rest(pause)
            seconds.append(worker.turn(turn, part))
        done.append(Sides(*seconds))
    return done


def spread(ratios: list[float]) -> Ratio:
    """Return the median with the smallest and the largest."""
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def summary(rounds: list[Sides]) -> tuple[Ratio, Sides]:
    """Return ratio and seconds of rounds."""
    seconds = (statistics.median(getattr(one, side) for one in rounds) for side in SIDES)
    return spread([one.peer / one.ours for one in rounds]), Sides(*seconds)


# -- the report ------------------------------------------------------------------------------------------------


def choose(names: list[str] | None) -> list[Comparison]:
    """Return the comparisons of these names, or whose names begin so; all by default."""
    known = {comparison.name for comparison in COMPARISONS}

    def named(comparison: Comparison, name: str) -> bool:
        return comparison.name == name if name in known else comparison.name.startswith(name)

    return [comparison for comparison in COMPARISONS if any(named(comparison, name) for name in names or [""])]


def main() -> int:
    """Compare, print, and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="peers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="NAME", nargs="+", help="workloads, or the beginnings of their names")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"at most so many (default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work? The ratios mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    parser.add_argument("--name", default="peers-cpu", help="of the files with the results (default peers-cpu)")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, OF_PEERS[args.workload].at(args.scale), args.folder, args.threads, args.variant)
        return 0

    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"peers.py: {' and '.join(missing)} not installed: pip install torch diffusers", file=sys.stderr)
        return 2
    chosen = choose(args.only)
    if not chosen:
        parser.error(f"no such workload; there are {', '.join(c.name for c in COMPARISONS)}")
    for variant in {each.variant for each in chosen} & LIBRARIES.keys():
        if importlib.util.find_spec(LIBRARIES[variant][-1]) is None:
            print(f"rows of {variant} are left out: pip install {LIBRARIES[variant][-1]}", file=sys.stderr)
            chosen = [each for each in chosen if each.variant != variant]
    if (why := why_not()) and any(each.variant in HALVES for each in chosen):
        print(f"rows of bf16 are left out: {why}", file=sys.stderr)
        chosen = [each for each in chosen if each.variant not in HALVES]
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if not chosen:
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave nothing behind
    output = args.output or (RESULTS if not (args.only or args.quick or args.threads != 2) else None)

    rounds = min(args.rounds, 2) if args.quick else args.rounds
    how = {"scale": 0.001, "turn": 0.01, "pause": 0.01} if args.quick else {"scale": 1.0, "turn": TURN, "pause": PAUSE}
    libraries = sorted({LIBRARIES[each.variant][-1] for each in chosen if each.variant in LIBRARIES})
    head = replace(header(args.threads, "torch", "diffusers", *libraries), scale=how["scale"])
    report, begin = PeersReport(head, []), time.perf_counter()
    for comparison in chosen:
        try:
            row = compare(comparison, rounds=rounds, threads=args.threads, **how)
        except PeersError as error:
            report.failed.append(f"{comparison.name}: {error}")
            print(report.failed[-1], flush=True)
            continue
        report.rows.append(row)
        words = [f"{comparison.name}: {row.ratio.median:.2f} ({row.ratio.min:.2f} .. {row.ratio.max:.2f})"]
        if row.target is not None:
            words.append(f"target {row.target:g}: {'met' if row.met else 'MISSED'}")
        if row.others > BUSY and not args.quick:
            words.append(f"DOUBTFUL: other programs used {row.others:.0%} of the machine")
        if row.memory is not None:
            words.append(row.memory.line())
        print("  ".join(words), flush=True)
    print(f"\n{report.table()}\n{time.perf_counter() - begin:.0f} s")
    return finish(report, args.name, output, []) or int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
