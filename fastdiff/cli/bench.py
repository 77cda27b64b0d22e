"""``fastdiff bench``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fastdiff.cli.inputs import check_picture
from fastdiff.cli.messages import note
from fastdiff.cli.parser import BACKENDS, add_command, add_overwrite, installed_version
from fastdiff.errors import FastdiffError, check_int


def add(commands: Any) -> None:
    bench = add_command(
        commands,
        "bench",
        "say how fast this machine is",
        "Times noise, noising, sampling, training and the layers of image networks, in about\n"
        "a minute (and a first time another, for compiling). Each is first compared with the\n"
        "NumPy reference at a small size. The last column is the share of what the machine can\n"
        "do at most, measured in the same run: bytes that must cross memory, or arithmetic.\n"
        "More than all of it is possible: an algorithm may need fewer operations than are\n"
        "counted, and a cache is faster than memory.",
        "examples:\n  fastdiff bench\n  fastdiff bench --plot bench.png\n"
        "  fastdiff bench --backend numpy --only train --json\n",
    )
    bench.add_argument("--only", metavar="NAME", action="append", help="work whose name begins so: normals, train, ...")
    bench.add_argument("--plot", metavar="FILE", help="draw the shares into this .png file")
    add_overwrite(bench)
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="where (default: the fastest; numpy: small sizes only)"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="of the CPU backend (default: one for each core)")
    bench.add_argument("--quiet", action="store_true", help="no progress")
    bench.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # does it work? The numbers mean nothing
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import fastdiff as fd
    from fastdiff import bench

    if args.plot:
        check_picture(args, args.plot)
    threads = None if args.threads is None else check_int("--threads", args.threads, low=1)
    names = [name for name in bench.QUICK if any(map(name.startswith, args.only or [""]))]
    if not names:
        raise FastdiffError(f"--only: there is no such work; there are {', '.join(bench.QUICK)}")
    be = fd.get_backend(args.backend, threads=threads)
    place = bench.cpu_model() if be.name != "cuda" else be.runtime.device  # type: ignore[attr-defined]
    if be.name == "cpu":
        place += f", {be.threads} thread{'s' if be.threads > 1 else ''}"
    scale = 0.001 if args.tiny else 1.0

    def show(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    show(f"fastdiff {installed_version()}, backend {be.name}, on {place}")
    if not args.quiet:
        note("measuring the machine itself; a first run also compiles the kernels")
    roofs = bench.roofs_of(be, scale)
    show(
        f"at most {bench.speed(roofs.memory / 1e9)} GB/s through memory, "
        f"{bench.speed(roofs.arithmetic / 1e9)} GF/s of float32 arithmetic\n"
    )
    layout = "{:42}  {:>8}  {:>18}  {:>18}"
    show(layout.format("work", "time", "rate", "of the roof").rstrip())
    rows = []
    for k, name in enumerate(names):
        workload = bench.BY_NAME[name].at(scale)
        if not workload.runs_on(be):
            continue
        if not args.quiet and sys.stderr.isatty():
            print(f"\r{k + 1} of {len(names)}: {workload.title}", end="", file=sys.stderr, flush=True)
        try:
            rows.append(bench.timed(workload, be, roofs, 0.01 if args.tiny else bench.TURN))
        finally:
            if not args.quiet and sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        show(layout.format(workload.title, *rows[-1].cells()).rstrip())
    if args.json:
        facts = {
            "version": installed_version(),
            "backend": be.name,
            "machine": place,
            "roofs": roofs._asdict(),
            "rows": [row._asdict() for row in rows],
        }
        print(json.dumps(facts, indent=2))
    if args.plot:
        from fastdiff import plots

        plots.save(plots.shares({row.title: (row.share or 0.0, row.cells()[1]) for row in rows}, place), args.plot)
        note(f"figure in {args.plot}")
    return 0
