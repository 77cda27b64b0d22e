"""A worker of `make gpu` that does what FASTDIFF_TEST_PLAN says of each workload or case, and keeps its jobs in a file.

A plan is a list of steps: {"way": name} says what is made next, and what follows is left out with it; {"do": "hang"},
"die" or "dead" ends the process, {"tell": event} tells. Who hangs leaves its number in FASTDIFF_TEST_HUNG.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from gpu_events import end_with_parent, tell


def do(what):
    if what == "hang":
        with Path(os.environ["FASTDIFF_TEST_HUNG"]).open("a") as hung:
            hung.write(f"{os.getpid()}\n")
        time.sleep(600)
    elif what == "die":
        os.abort()
    elif what == "dead":
        tell(dying="an illegal address")
        os._exit(3)


def main():
    end_with_parent()
    job = json.loads(sys.argv[1])
    plans = json.loads(os.environ["FASTDIFF_TEST_PLAN"])
    with Path(os.environ["FASTDIFF_TEST_JOBS"]).open("a") as jobs:
        jobs.write(json.dumps(job) + "\n")
    if job["do"] == "start":
        tell(gpu=plans.get("gpu", "a card"), cupy="14", threads=1, arch=plans.get("arch"))
        do(plans.get("start"))
    if job["do"] == "make":
        do(plans.get("ahead"))
    for name in job.get("workloads", job.get("cases", ())):
        tell(begin=name)
        left_out, fault = False, ""
        for step in plans.get(name, ()):
            if "way" in step:
                left_out = step["way"] in job["without"].get(name, {})
                if not left_out:
                    tell(way=step["way"])
            elif not left_out:
                if "tell" in step:
                    tell(**step["tell"])
                do(step.get("do"))
                fault = step.get("fault", fault)
        tell(end=name, fault=fault, good=not fault)


main()
