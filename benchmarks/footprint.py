"""What a user feels before anything is computed, here and with PyTorch: ``python benchmarks/footprint.py``.

Seconds from the start of an interpreter to the last of 16 curves of a trained model, with our kernels compiled already
and with none in the cache, the most memory that this process had, and the size of what is installed. Both sides first
draw the same curves from the same weights and noise. A figure is the median of the rounds, in which the sides take
turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peers
from machine import header, installed_size
from report import RESULTS, FootprintReport, Process, finish
from workloads import BY_NAME, HERE, ColdStart

ROUNDS = 5
# Runs a script as if it had been called, and then prints VmHWM. (What wait4 tells of a child includes its parent.)
WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
SIDES = ("ours", "ours, no kernel cached", "peer")


def process(script: str, path: Path, workload: ColdStart, threads: int, cache: str | None) -> tuple[float, int]:
    """Run a script on a checkpoint in a new interpreter; return its seconds and the most bytes of memory it had."""
    command = [sys.executable, "-c", WATCHED, str(HERE / script), str(path), str(workload.n), str(threads)]
    env = os.environ | ({} if cache is None else {"NUMBA_CACHE_DIR": cache})
    begin = time.perf_counter()
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=env)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise peers.PeersError(f"{script} failed: see its traceback above")
    return seconds, 1024 * int(done.stdout.split()[-1])


def measure(threads: int, rounds: int) -> dict[str, Process]:
    """Return seconds and bytes of the three processes, and the installed sizes."""
    workload = BY_NAME["cold-start"]
    done: dict[str, list[tuple[float, int]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="fastdiff-footprint-") as name:
        folder = Path(name)
        peers.our_worker(workload, folder, threads)
        import peer_nets  # not before ours has run: it brings torch

        with np.load(folder / "inputs.npz") as file:
            outputs, _ = workload.peer_side(peer_nets, dict(file), folder, "")
        np.savez(folder / "peer.npz", **outputs)
        peers.check_parity(workload, folder)
        ours, peer = folder / "model.safetensors", folder / "peer.safetensors"
        for number in range(rounds + 1):  # the first is not counted: it reads files into memory, and compiles
            for side in SIDES:
                script, path = ("cold_peer.py", peer) if side == "peer" else ("cold_ours.py", ours)
                cache = str(folder / f"cache-{number}") if side == SIDES[1] else None
                done[side].append(process(script, path, workload, threads, cache))
    return {
        side: Process(
            *(statistics.median(figures) for figures in zip(*runs[1:], strict=True)),
            installed_size(*(("torch", "diffusers") if side == "peer" else ("fastdiff-engine",))),
        )
        for side, runs in done.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the results; return the exit code."""
    parser = argparse.ArgumentParser(prog="footprint.py", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="another number writes nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write the results there in any case")
    args = parser.parse_args(argv)
    try:
        results = measure(args.threads, args.rounds)
    except peers.PeersError as error:
        print(error, file=sys.stderr)
        return 1
    report = FootprintReport(header(args.threads, "torch", "diffusers"), results, args.rounds)
    print(report.table())
    return finish(report, "footprint-cpu", args.output or (RESULTS if args.rounds == ROUNDS else None), [])


if __name__ == "__main__":
    sys.exit(main())
