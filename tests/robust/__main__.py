"""``python -m robust [--share S] [--keep] [NAME ...]`` in tests/: the counts at full length, or a share, as a table."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from robust import accidents, calls, hostile

FULL = {
    accidents.loads_beside_a_saver: 20_000, accidents.killed_saves: 300, accidents.forks: 200,
    accidents.cold_interrupts: 600, hostile.flips: 5_000, hostile.mutations: 50_000, calls.calls: 100_000,
    accidents.repeats: 1_000, hostile.costs: 100, hostile.good_load: 51,
}  # fmt: skip
FEWEST = {hostile.costs: 100, hostile.good_load: 11}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MACHINE = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}"


def main() -> int:
    counts = {count.__name__: count for count in FULL}
    parser = argparse.ArgumentParser(prog="python -m robust", description=__doc__)
    parser.add_argument("counts", nargs="*", metavar="NAME", choices=[*counts, []], help=f"of {', '.join(counts)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the full length")
    parser.add_argument("--keep", action="store_true", help="put what is counted into the table; without names it is")
    asked = parser.parse_args()
    logging.getLogger("fastdiff").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    failures = 0
    for name in asked.counts or counts:
        start, count = time.monotonic(), counts[name]
        found = count(max(FEWEST.get(count, 1), round(FULL[count] * asked.share)))
        rows = []
        for one in found if isinstance(found, list) else [found]:
            failures += one.failures
            rows.append({"what": one.what, "tries": one.tries, "failures": one.failures, "note": one.note})
            print(f"{one.what}: {one.failures} of {one.tries}; {one.note}", flush=True)
            for problem in one.found:
                print(f"    {problem}".encode("utf-8", "replace").decode(), flush=True)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
        if asked.keep or not asked.counts:
            facts = {"machine": MACHINE, "date": f"{datetime.date.today()}", "share": asked.share}
            keep(name, [facts | row for row in rows])
    return int(failures > 0)


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a count into the table that the documents read, beside those of the others."""
    path = RESULTS / "robust.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    table[name] = rows
    path.write_text(json.dumps({count.__name__: table.get(count.__name__, []) for count in FULL}, indent=1) + "\n")
    lines = ["| what | tries | of these | note | of the full length | date |", "|---|---:|---:|---|---:|---|"]
    machines: list[str] = []
    for row in [row for count in FULL for row in table.get(count.__name__, [])]:
        machines += [row["machine"]] * (row["machine"] not in machines)
        lines.append(
            f"| {row['what']} | {row['tries']:,} | **{row['failures']}** | {row['note']} | {row['share']:.3g} "
            f"| {row['date']} |"
        )
    (RESULTS / "robust.md").write_text("\n".join([*machines, "", *lines]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
