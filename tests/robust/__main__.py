"""``python -m robust [SHARE]`` in tests/: the counts at full length, or a share of it, as a table."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import sys
import time
import warnings
from pathlib import Path

from robust import accidents, calls, hostile

FULL = (
    (accidents.loads_beside_a_saver, 20_000), (accidents.killed_saves, 300), (accidents.forks, 200),
    (accidents.cold_interrupts, 600), (hostile.flips, 5_000), (hostile.mutations, 50_000), (calls.calls, 100_000),
    (accidents.repeats, 1_000), (hostile.costs, 100), (hostile.good_load, 51),
)  # fmt: skip
FEWEST = {hostile.costs: 100, hostile.good_load: 11}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def main() -> int:
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    only = sys.argv[2:]
    logging.getLogger("fastdiff").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = []
    for count, full in FULL:
        if only and count.__name__ not in only:
            continue
        start = time.monotonic()
        found = count(max(FEWEST.get(count, 1), round(full * share)))
        for one in found if isinstance(found, list) else [found]:
            rows.append([one.what, one.tries, one.failures, one.note])
            print(f"{one.what}: {one.failures} of {one.tries}; {one.note}", flush=True)
            for problem in one.found:
                print(f"    {problem}".encode("utf-8", "replace").decode(), flush=True)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
    if not only:
        write(rows, share)
    return int(any(row[2] for row in rows))


def write(rows: list[list[object]], share: float) -> None:
    """Write the table where the documents read it."""
    where = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}"
    facts = {"machine": where, "date": f"{datetime.date.today()}", "share": share, "rows": rows}
    (RESULTS / "robust.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [
        f"{where}; {facts['date']}; {share:g} of the full length.",
        "",
        "| what | tries | of these | note |",
        "|---|---:|---:|---|",
    ]
    lines += [f"| {what} | {tries:,} | **{failures}** | {note} |" for what, tries, failures, note in rows]
    (RESULTS / "robust.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
