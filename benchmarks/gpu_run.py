"""Tests, tuning and benchmarks on a machine with a GPU: ``make gpu``, which is ``python benchmarks/gpu.py``.

First the kernels are compiled, and of each source one is launched. Then stages, in this order: the tests in tests/gpu
but for those at full size ("tests"); every tile of every convolution, see `gpu_sweep.py` ("sweep"); where the time of a
training step goes, see `gpu_profile.py` ("profile"); the times of our kernels beside a copy and PyTorch, see `gpu.py`,
what has a target first, on the tiles that were just found ("benchmarks"); the tests at full size ("full"); the small
parity tests under compute-sanitizer, where it is installed ("sanitizer").

This program never touches the GPU. Processes do, one after the other: one that dies or says nothing for too long costs
the test, or the way of a workload, that it had in hand, and another goes on behind it.

The results go to ``gpu.json`` and ``.md`` in benchmarks/results, unless only a part was run, after every test and every
round of times; once the small tests have all passed, beside them is what the package may have of this family of GPUs,
such as ``sm_90.json``. With ``--minutes`` all ends at that time, every stage leaves some to those behind it, and the
results name what was not run; then PyTorch's networks are compiled, and a few tests run under compute-sanitizer, beside
the first stage, by processes of their own. ``--continue`` goes on with the results of an earlier run of the same card,
source and versions; ``--continue FOLDER`` takes them from there.

Nothing needs to be installed but Python, what fastdiff imports, CuPy and pytest; what is missing, such as diffusers for
PyTorch's networks, may be carried along as unpacked wheels on PYTHONPATH. Where only one folder of the machine comes
back, ``--output`` names it.

Exit code 1: something failed; 2: there is no usable GPU; 3: nothing failed, and time was up.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu
import gpu_events
import gpu_sweep
from machine import cores, header
from report import RESULTS, plain, record, write

from fastdiff.bench.networks import Pictures

HERE = Path(__file__).parent
ROOT = HERE.parent
TESTS = ROOT / "tests" / "gpu"
WORKER = (sys.executable, str(HERE / "gpu_worker.py"))
STAGES = ("tests", "sweep", "profile", "benchmarks", "full", "sanitizer")
TIMED = ("sweep", "profile", "benchmarks")  # nothing else may run beside them
# Checks that are run under tools beside the tests: a family each, of those that use shared memory.
SOME = ("norms", "layer_norms", "attentions", "chains", "maps_of_rows", "weight_gradients", "conv_mma_outputs")
SELECTED = {
    "tests": "not full] and not test_cudnn",
    "full": "full] or test_cudnn",
    "sanitizer": "test_parity and small",
    "some": " or ".join(f"{name}-small" for name in SOME),
}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TICK = 0.05  # seconds between two looks at a process
PATIENCE = {  # seconds of silence
    "start": 300, "tests": 120, "full": 300, "sanitizer": 600, "some": 600, "ours": 90, "theirs": 240,
}  # fmt: skip
RESTARTS = 10  # a stage in which so many processes die in a row is given up
SHARE = 1 / 4  # of the time: no way of a workload is begun later, and none of PyTorch's may be silent for longer
AHEAD = 1 / 4  # of the time, after which nothing is compiled ahead
# Of the time that is left: when it is over a stage waits for those behind it, and goes on after them. Each has some
# seconds in any case.
SHARES, LEAST = {"tests": 1 / 4, "sweep": 1 / 10, "profile": 1 / 20, "benchmarks": 5 / 6}, 6.0
NO_TIME = "no time left"
Event = dict[str, Any]


# -- processes -----------------------------------------------------------------------------------------------------


def follow(
    command: tuple[str, ...], events: Path, until: float, patience: Callable[[Event], float], **environment: str
) -> Iterator[Event]:
    """Run a command in a process; yield what it tells, and at last why it is over ("": it ended well).

    It ends at `until`, and where nothing has been told for longer than `patience` of the last event. What it started
    ends with it.
    """
    if time.monotonic() >= until:
        yield {"over": NO_TIME}
        return
    names = {gpu_events.FILE: str(events), gpu_events.PARENT: str(os.getpid())}
    events.touch()
    with events.open(encoding="utf-8") as lines:
        lines.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | names | environment, stdin=subprocess.DEVNULL, process_group=0
        )
        heard, last, text, over = time.monotonic(), {}, "", None
        try:
            while over is None:
                code = process.poll()  # before reading: nothing is missed
                *whole, text = (text + lines.read()).split("\n")
                for line in whole:
                    heard, last = time.monotonic(), json.loads(line)
                    yield last
                if code is not None:
                    over = f"exit code {code}" if code > 0 else f"died of {signal.Signals(-code).name}" if code else ""
                elif time.monotonic() >= until:
                    over = NO_TIME
                elif time.monotonic() >= heard + patience(last):
                    over = f"killed, silent for {patience(last):g} s"
                else:
                    time.sleep(TICK)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
    yield {"over": last.get("dying", over)}


def drive(
    left: list[str],
    start: Callable[[], Iterator[Event]],
    take: Callable[[Event], None],
    lost: Callable[[str, str], bool],
) -> str:
    """Have processes do what is left, in order, until nothing is or time is up; return why they could not, or "".

    Parameters
    ----------
    left : list of str
        What is not done yet; names are taken out as they are done. A process may replace it by what it plans.
    start : callable
        Starts a process for what is left.
    take : callable
        Gets every event.
    lost : callable
        Gets what a process had in hand when it ended, and why it did; returns whether that is to be tried again.
    """
    died = 0
    while left:
        in_hand, before = "", list(left)
        for event in start():
            take(event)
            if "planned" in event:
                left[:] = event["planned"]
            if "begin" in event:
                in_hand = event["begin"]
            if "end" in event:
                left.remove(event["end"])
                in_hand, died = "", 0 if event["good"] else died
        why = event["over"] or "the process ended"
        if event["over"] == NO_TIME:
            return ""
        if in_hand:
            if not lost(in_hand, why):
                left.remove(in_hand)
        elif left == before:
            return why
        died += 1
        if left and died == RESTARTS:
            return f"given up after {died} processes; the last one: {why}"
    return ""


# -- what is known -------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """The results so far, where they are written, and the time that there is."""

    results: gpu.Results
    left: dict[str, list[str]]
    """Names of what is planned and not done, by stage."""
    output: Path | None
    quick: bool
    end: float
    seconds: float
    """From the start until that end."""
    folder: Path
    """For the files of the processes."""
    until: float = float("inf")
    """When the stage ends."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def follow(
        self, name: str, command: tuple[str, ...], patience: Callable[[Event], str], **more: str
    ) -> Iterator[Event]:
        """Follow a process; `patience` names one of `PATIENCE`."""

        def seconds(event: Event) -> float:
            name = patience(event)
            return min(PATIENCE[name], SHARE * self.seconds) if name == "theirs" else PATIENCE[name]

        return follow(command, self.folder / name, self.until, seconds, **more)

    def fault(self, name: str, why: str) -> None:
        """Add what failed, and say so."""
        with self.lock:
            self.results.faults[name] = why
        print(f"gpu.py: {name}: {why}", file=sys.stderr, flush=True)

    def add(self, row: gpu.Row) -> None:
        """Add a row, in place of one of no more rounds."""
        rows = self.results.rows
        old = next((old for old in rows if old.name == row.name), None)
        if old is None or old.rounds[0] <= row.rounds[0]:
            order = gpu.in_order(list(gpu.BY_NAME))
            rows[:] = sorted([*(r for r in rows if r is not old), row], key=lambda r: order.index(r.name))
        self.save()

    def save(self) -> None:
        """Write what is known."""
        with self.lock:
            self._save()

    def _save(self) -> None:
        results = self.results
        ways = [f"{row.title}: {way}" for row in results.rows for way in row.cut]
        results.left = {stage: names for stage, names in (self.left | {"ways": ways}).items() if names}
        results.header["complete"] = [stage for stage, names in self.left.items() if not names]
        results.header["workloads"] = [row.name for row in results.rows if row.complete]
        for stage, outcomes in results.tests.items():
            bad = [name.split("::")[-1] for name, outcome in outcomes.items() if outcome.startswith("failed")]
            passed = f"{sum(outcome == 'passed' for outcome in outcomes.values())} passed"
            failed = f", **{len(bad)} failed**: {', '.join(bad)}" if bad else ""
            if outcomes:
                results.stages[f"GPU tests, {stage}"] = passed + failed
        if results.sweep:
            names = {row.name for row in results.sweep}
            results.stages["Tiles"] = f"timed of {len(names)} convolutions and products, in {len(results.sweep)} ways"
        self._save_measured()
        if self.output is not None:
            results.save(self.output, "gpu")

    def _save_measured(self) -> None:
        """Write what the package is to know: for the benchmarks, and beside the results once the tests have passed.

        Not of a quick run, and the package refuses what one wrote.
        """
        results = self.results
        if not (arch := results.header.get("arch")):
            return
        name, text = f"sm_{arch}.json", json.dumps(plain(results.measured()), indent=1) + "\n"
        write(self.folder / name, text)
        passed = "tests" in results.header["complete"] and not results.wrong and not self.quick
        results.stages.pop("For the package", None)
        if passed:
            results.stages["For the package"] = (
                f"{name}, in fastdiff/backends/cuda/measured: there 'auto' is 'cuda' on GPUs of sm_{arch}, and the "
                "tiles are those measured here"
            )
        if self.output is not None and passed:
            self.output.mkdir(parents=True, exist_ok=True)
            write(self.output / name, text)
        elif self.output is not None and "tests" in self.left:
            (self.output / name).unlink(missing_ok=True)


# -- the stages ----------------------------------------------------------------------------------------------------


def job(**what: Any) -> tuple[str, ...]:
    """The command of a worker."""
    return (*WORKER, json.dumps(what))


def start(session: Session, ready: Callable[[], None]) -> str:
    """Start the backend, call `ready`, compile and launch the kernels; return "", or why there is no GPU."""
    unusable, launched = "", []

    def take(event: Event) -> None:
        nonlocal unusable
        unusable = event.get("unusable", unusable)
        if "gpu" in event:
            session.results.header |= event
            ready()
        if "end" in event:
            session.results.compile[event["end"]] = round(event["seconds"], 2)
            if event["fault"]:
                session.fault(f"{event['end']}.cu", event["fault"])
        if "launched" in event:
            launched.append(event["launched"])
            if event["fault"]:
                session.fault(f"{event['launched']}.cu, first launch", event["fault"])

    for event in session.follow("start", job(do="start"), lambda event: "start"):
        take(event)
    if "gpu" not in session.results.header:
        return unusable or event["over"]
    times = ", ".join(f"{source} {seconds:.1f} s" for source, seconds in session.results.compile.items())
    session.results.stages["Kernels compiled"] = times
    if launched:
        session.results.stages["First launches"] = f"{len(launched)} of {len(gpu.FAMILIES)} families"
    print(f"kernels compiled: {times}", flush=True)
    if event["over"] not in ("", NO_TIME):
        session.fault("start", event["over"])
    return ""


def run_tests(session: Session, stage: str, under: tuple[str, ...] = (), name: str = "") -> str:
    """Run tests of tests/gpu that have not run yet; return how a process ended badly, or ""."""
    # Their own conftest only: that of tests/ needs packages which a GPU machine need not have.
    pytest = (sys.executable, "-m", "pytest", str(TESTS), f"--confcutdir={TESTS}", "-W", "default", "-q")
    name, over = name or stage, ""
    with session.lock:
        outcomes = session.results.tests.setdefault(name, {})
    if under:  # a tool says at its end what it has found
        outcomes.clear()
    with (session.folder / name).open("w", encoding="utf-8") as events:
        events.writelines(json.dumps({"begin": test}) + "\n" for test in outcomes)
    left = session.left[stage] if name == stage else [name]

    def process() -> Iterator[Event]:
        command = (*under, *pytest, "-k", SELECTED[stage])
        pool = "0" if under else "1"  # a tool knows where memory ends that is no part of a pool
        return session.follow(name, command, lambda event: stage, FASTDIFF_GPU="1", FASTDIFF_GPU_POOL=pool)

    def take(event: Event) -> None:
        nonlocal over
        over = over or event.get("over", "")
        if "end" in event:
            with session.lock:
                outcomes[event["end"]] = event["outcome"]
            session.save()

    def lost(test: str, why: str) -> bool:
        outcomes[test] = f"failed: {why}"
        return False

    if why := drive(left, process, take, lost):
        session.fault(name, why)
    return over


def under_tool(session: Session, tool: str, stage: str, name: str) -> bool:
    """Run tests under a tool of compute-sanitizer; return whether there was time for all of them."""
    log = session.folder / f"{name}.log"
    options = ("--error-exitcode", "1", "--target-processes", "all", "--log-file", str(log))
    over = run_tests(session, stage, ("compute-sanitizer", "--tool", tool, *options), name)
    if over == NO_TIME or time.monotonic() >= session.until:
        return False
    if over:
        session.fault(name, over + (f"\n{log.read_text()[:4000]}" if log.exists() else ""))
    return True


def sanitize_some(session: Session) -> None:
    """Run a few of them, beside the tests."""
    for tool in TOOLS[:2]:
        if not under_tool(session, tool, "some", f"{tool}, some"):
            return


def sanitize(session: Session) -> None:
    """Run the small parity tests under the tools of compute-sanitizer."""
    if not shutil.which("compute-sanitizer"):
        session.results.stages["compute-sanitizer"] = "not installed"
        session.left["sanitizer"] = []
        return
    for tool in list(session.left["sanitizer"]):
        if not under_tool(session, tool, "sanitizer", tool):
            return
        session.left["sanitizer"].remove(tool)


def collect(session: Session, stage: str, kind: type, rows: list[Any]) -> None:
    """Have a worker do what is left of a stage; its rows are of a kind, and of the name of what they belong to."""

    def process() -> Iterator[Event]:
        command = job(do=stage, cases=session.left[stage], quick=session.quick, measured=str(session.folder))
        return session.follow(stage, command, lambda event: "ours")

    def take(event: Event) -> None:
        if "begin" in event:  # again, perhaps
            rows[:] = [row for row in rows if row.name != event["begin"]]
        if "row" in event:
            rows.append(record(kind, event["row"]))
        if event.get("fault"):
            session.fault(event["end"], event["fault"])
        if "end" in event:
            session.save()

    def lost(name: str, why: str) -> bool:
        session.fault(name, why)
        return False

    if why := drive(session.left[stage], process, take, lost):
        session.fault(stage, why)


def benchmarks(session: Session) -> None:
    """Time the workloads that are left."""
    way = ""
    dead: dict[str, dict[str, str]] = {}  # ways that ended their process, and how, by workload
    hung: dict[str, str] = {}  # variants of ours that did so by silence: once is enough
    for package in ("torch", "diffusers", "cudnn"):
        if importlib.util.find_spec(package) is None:
            session.results.stages[{"torch": "PyTorch"}.get(package, package)] = "not installed"

    def process() -> Iterator[Event]:
        left, share = session.left["benchmarks"], SHARE * session.seconds
        without = {name: hung | dead.get(name, {}) for name in left}
        how = {"quick": session.quick, "share": share, "without": without, "measured": str(session.folder)}
        command = job(do="workloads", workloads=left, **how)
        return session.follow(
            "workloads", command, lambda event: "theirs" if event.get("way") in gpu.IMAGE_WAYS else "ours"
        )

    def take(event: Event) -> None:
        nonlocal way
        way = "" if "begin" in event else event.get("way", way)
        if "row" in event:
            session.add(record(gpu.Row, event["row"]))
        if "end" in event:
            failed = next((row.failed for row in session.results.rows if row.name == event["end"]), {})
            for name in failed.keys() & gpu.OURS.keys():
                session.fault(f"{event['end']}, {name}", failed[name])
            if event["fault"]:
                session.fault(event["end"], event["fault"])
            print(f"{event['end']}: {'failed' if event['fault'] else 'done'}", flush=True)

    def lost(name: str, why: str) -> bool:
        if not way:
            session.fault(name, why)
            return False
        dead.setdefault(name, {})[way] = why
        if gpu.OURS.get(way) and "silent" in why:
            hung[way] = why
        return True

    if why := drive(session.left["benchmarks"], process, take, lost):
        session.fault("benchmarks", why)


def ahead(session: Session) -> list[Future[dict[str, str]]]:
    """Compile PyTorch's networks beside the first stages, one process a way; PyTorch's own cache keeps the code."""
    pool = ThreadPoolExecutor(max(1, cores() // 2))
    until = session.end - (1 - AHEAD) * session.seconds

    def run(name: str, way: str) -> dict[str, str]:
        began, events = time.monotonic(), session.folder / f"{name}-{way}"
        command = job(do="make", workload=name, way=way)
        *_, last = follow(command, events, until, lambda event: session.seconds, TORCHINDUCTOR_COMPILE_THREADS="2")
        outcome = last["over"] or f"{time.monotonic() - began:.0f} s"
        print(f"compiled ahead, {name}, {way}: {outcome}", flush=True)
        return {f"{name}, {way}": outcome}

    networks = {name for name in gpu.TARGETS if isinstance(gpu.BY_NAME[name], Pictures)}
    return [pool.submit(run, name, way) for name in session.left["benchmarks"] if name in networks for way in gpu.BEST]


# -- the program ---------------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    """Return the version of a distribution, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sources() -> str:
    """Return a digest of what is tested and measured, and of what does it."""
    digest = hashlib.sha256()
    for folder in ("fastdiff", "kernels", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def go_on(session: Session, folder: Path) -> None:
    """Take over the results of an earlier run from a folder, and leave out what it has done."""
    path, results = folder / "gpu.json", session.results
    earlier = gpu.Results.read(path) if path.exists() else None
    same = ("gpu", "system", "python", "sources", "scale", *gpu.OPTIONAL)
    other = [name for name in same if earlier and earlier.header.get(name) != results.header.get(name)]
    if earlier is None or other:
        print(f"starts anew: {f'{path} differs in {other}' if other else f'there is no {path}'}", flush=True)
        return
    kept = {*gpu.BY_NAME, *TOOLS}.union(*session.left.values())
    results.faults |= {name: why for name, why in earlier.faults.items() if name.split(",")[0] in kept}
    results.rows, results.tests, results.ahead = earlier.rows, earlier.tests, earlier.ahead
    results.sweep[:], results.profiles[:] = earlier.sweep, earlier.profiles
    rows = {row.name: row for row in results.rows if row.rounds[0] == row.rounds[1]}
    done = {name for name, row in rows.items() if row.complete} | results.faults.keys()
    for stage, left in session.left.items():
        if stage == "benchmarks":  # what is missing, then what lacks a way that decides a target, then another way
            left[:] = [name for name in left if name not in done]
            left.sort(key=lambda name: (name in rows, name in rows and not rows[name].unknown))
        elif stage in earlier.header["complete"]:
            left.clear()
        elif stage in ("sweep", "profile", "sanitizer"):
            left[:] = earlier.left.get(stage, left)
    print(f"goes on with {path}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the stages, print, and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, metavar="M", help="end after so many; without it all is run")
    parser.add_argument(
        "--continue", nargs="?", type=Path, const=Path(), dest="go_on", metavar="FOLDER",
        help="do what an earlier run did not get to, whose results are there; by default where they are written",
    )  # fmt: skip
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one; may be given again")
    parser.add_argument("--only", metavar="NAME", action="append", help="a workload, or the beginning of its name")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work? The numbers mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    args = parser.parse_args(argv)
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"argument --minutes: got {args.minutes:g}, must be more than 0")
    names = list(gpu.BY_NAME)
    chosen = [name for name in names if any(name.startswith(beginning) for beginning in args.only or [""])]
    if not chosen:
        parser.error(f"no such workload; there are {', '.join(names)}")
    stages = [stage for stage in STAGES if stage in (args.stage or STAGES)]
    plan = {
        "tests": ["all"], "sweep": list(gpu_sweep.cases(args.quick)) if "sweep" in stages else [],
        "profile": list(gpu_sweep.ENTRIES), "benchmarks": gpu.in_order(chosen), "full": ["all"],
        "sanitizer": list(TOOLS),
    }  # fmt: skip
    seconds = 60 * args.minutes if args.minutes else float("inf")
    head = {**plain(header(1)), "sources": sources(), "scale": 0.001 if args.quick else 1.0, "minutes": args.minutes}
    results = gpu.Results(head | {name: installed(name) for name in gpu.OPTIONAL})
    with tempfile.TemporaryDirectory() as folder:
        session = Session(
            results,
            {stage: plan[stage] for stage in stages},
            args.output or (None if args.only or args.quick or args.stage else RESULTS),
            args.quick,
            time.monotonic() + seconds,
            seconds,
            Path(folder),
        )
        session.until = session.end
        compiling: list[Future[dict[str, str]]] = []
        both = all(map(importlib.util.find_spec, ("torch", "diffusers")))

        def ready() -> None:
            if args.go_on is not None:
                go_on(session, session.output or RESULTS if args.go_on == Path() else args.go_on)
            session.save()
            if args.minutes and both and "benchmarks" in stages and not args.quick:
                compiling.extend(ahead(session))

        if why := start(session, ready):
            print(f"gpu.py: {why}", file=sys.stderr)
            return 2
        session.save()
        run_stages(session, stages, compiling)
        results.ended = "time" if time.monotonic() >= session.end else "all"
        session.save()
    print(f"\n{results.table()}")
    if session.output is not None:
        print(f"written to {session.output}")
    return 1 if results.wrong or results.faults else 3 if results.left else 0


def run_stages(session: Session, stages: list[str], compiling: list[Future[dict[str, str]]]) -> None:
    """Run the stages, each for its share of the time, then what was cut off; `compiling` goes on beside the tests."""
    results = session.results
    collected: dict[str, tuple[type, list[Any]]] = {
        "sweep": (gpu.Swept, results.sweep), "profile": (gpu.Profile, results.profiles)
    }  # fmt: skip
    done: list[str] = []  # in full, or given up

    def run(stage: str) -> None:
        if stage == "benchmarks":
            benchmarks(session)
        elif stage == "sanitizer":
            sanitize(session)
        elif stage in collected:
            collect(session, stage, *collected[stage])
        else:
            run_tests(session, stage)

    with ThreadPoolExecutor(1) as pool:
        beside: Future[None] | None = None
        for last in (False, True):
            for stage in [stage for stage in stages if stage not in done]:
                if stage in TIMED and beside is not None:
                    beside.result()
                if stage in TIMED and compiling:
                    results.ahead |= {what: how for each in compiling for what, how in each.result().items()}
                    compiling.clear()
                    words = (f"{what} {outcome}" for what, outcome in results.ahead.items())
                    results.stages["Compiled ahead"] = "; ".join(words)
                now = time.monotonic()
                share = 1.0 if last or stage == stages[-1] else SHARES.get(stage, 1.0)
                session.until = min(session.end, now + max(LEAST, share * (session.end - now)))
                under_tools = stage == "tests" and not last and "sanitizer" in stages and math.isfinite(session.end)
                if under_tools and shutil.which("compute-sanitizer"):
                    beside = pool.submit(sanitize_some, session)
                run(stage)
                if time.monotonic() < session.until:
                    done.append(stage)
                session.save()
