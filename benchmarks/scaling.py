"""Time against the number of samples, batch, resolution and threads: ``python benchmarks/scaling.py``.

The workloads are those of the table at other sizes. Where torch and diffusers are installed, the same work in PyTorch
stands in the same axes, by the code of `peers.py`: each side in a process of its own, one after the other, parity
asserted before the peer is timed. NumPy is our reference, where that is quick.

The results go to ``results/scaling-cpu.json``, a part with --only into its place there, and the figure to
``docs/scaling.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from machine import cores, header
from report import RESULTS, Lines, ScalingReport, plain, write

from fastdiff import bench, plots
from fastdiff.bench.workload import Workload
from fastdiff.errors import BackendError

FIGURE = Path(__file__).parents[1] / "docs" / "scaling.png"
SIDES = {"ours": "fastdiff", "peer": "PyTorch", "numpy": "NumPy reference"}
PATIENCE = 0.1  # seconds: where the reference took longer, it does not take the next size up


class Panel(NamedTuple):
    """One axes: a workload at several sizes."""

    title: str
    label: str
    workload: Workload
    vary: str  # "n", "size" or "threads"
    sizes: tuple[int, ...]

    def at(self, size: int) -> Workload:
        """The workload at a size."""
        if self.vary == "n":
            return replace(self.workload, n=size, units=max(1, min(self.workload.units, 20_000 // size)))
        return replace(self.workload, shape=(size, size, 3)) if self.vary == "size" else self.workload


PANELS = {
    "samples": Panel(
        "100-step sampling, default MLP", "curves", bench.BY_NAME["chain-default-1000"], "n",
        (1, 10, 100, 1000, 10_000, 100_000),
    ),
    "batch": Panel(
        "training step, default MLP", "batch", bench.BY_NAME["train-default-1000"], "n",
        (1, 10, 100, 1000, 10_000),
    ),
    "resolution": Panel(
        "forward pass, U-Net, 4 pictures", "pixels on a side",
        replace(bench.BY_NAME["unet-forward-16"], n=4), "size", (16, 32, 64, 128),
    ),
    "threads": Panel(
        "forward pass, U-Net, 16 pictures of 32 x 32", "threads", bench.BY_NAME["unet-forward-16"], "threads",
        tuple(sorted({*(2**k for k in range(8) if 2**k <= cores()), cores()})),
    ),
}  # fmt: skip


def serve(side: str, panel: Panel, size: int, threads: int, folder: Path) -> None:
    """Be one side at one size: print the seconds of a unit."""
    import fastdiff as fd

    workload = panel.at(size)
    if side == "numpy":
        work = workload.setup("numpy")
        runs, units = [work.run], work.units
    elif importlib.util.find_spec("torch") is None:
        work = workload.setup(fd.get_backend("cpu", threads=threads))
        runs, units = [work.run], work.units
    else:
        import peers

        if side == "ours":
            fd.get_backend("cpu", threads=threads)
            runs, units = peers.our_worker(workload, folder, threads)
        else:
            runs, units = peers.peer_worker(workload, folder, threads, "")
            peers.check_parity(workload, folder)
    (run,) = runs
    run()
    print(json.dumps(bench.median_seconds(run) / units))


def timed(side: str, name: str, size: int, threads: int, folder: Path) -> float:
    """Return the seconds of one side at one size, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--only", name, "--size", str(size)]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    done = subprocess.run(
        [*command, "--threads", str(threads), "--output", str(folder)],
        env=os.environ | dict.fromkeys(names, str(threads)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measured(name: str, threads: int) -> Lines:
    """Return a panel's results: of each side the sizes and the seconds."""
    panel, lines = PANELS[name], dict[str, list[Any]]()
    sides = [side for side in SIDES if side != "peer" or importlib.util.find_spec("diffusers")]
    for size in panel.sizes:
        with tempfile.TemporaryDirectory(prefix="fastdiff-scaling-") as folder:
            for side in sides:
                line = lines.setdefault(SIDES[side], [])
                if side == "numpy" and (panel.vary == "threads" or (line and line[-1][1] > PATIENCE)):
                    continue
                used = size if panel.vary == "threads" else threads
                line.append((size, timed(side, name, size, used, Path(folder))))
                print(f"{name:10} {size:7} {SIDES[side]:16} {bench.duration(line[-1][1])}", flush=True)
    return Lines(panel.title, panel.label, {side: line for side, line in lines.items() if line})


def draw(results: ScalingReport, path: Path) -> None:
    """Draw the panels of results."""
    panels = [results.panels[name] for name in PANELS if name in results.panels]
    lines = {
        panel.title: {side: tuple(zip(*line, strict=True)) for side, line in panel.lines.items()} for panel in panels
    }
    plots.save(plots.scaling(lines, [panel.label for panel in panels]), path)  # type: ignore[arg-type]


def main(argv: list[str] | None = None) -> int:
    """Measure, write the results, and draw them; return the exit code."""
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PANELS, action="append", help="this panel; the others stay as they are")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the results that are there")
    parser.add_argument("--threads", type=int, default=cores(), help="of all sides (default: one per core)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write results and figure there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        serve(args.side, PANELS[args.only[0]], args.size, args.threads, args.output)
        return 0
    path = (args.output or RESULTS) / "scaling-cpu.json"
    results = ScalingReport(header(args.threads), {})
    if (args.only or args.draw) and path.exists():
        results = ScalingReport.read(path)
    if not args.draw:
        peers = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name)]
        results.header = header(args.threads, *peers)
        for name in args.only or PANELS:
            results.panels[name] = measured(name, args.threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(plain(results), indent=1) + "\n")
    if not results.panels:
        parser.error(f"there are no results in {path}")
    figure = args.output / "scaling.png" if args.output else FIGURE
    try:
        draw(results, figure)
    except BackendError as error:
        print(f"{path}\n{error}; then --draw", file=sys.stderr)
        return 2
    print(f"{path}\n{figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
