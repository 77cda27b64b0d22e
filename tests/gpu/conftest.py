"""Tests that need a CUDA device. ``make gpu`` sets FASTDIFF_GPU and runs them; elsewhere they are not collected.

It also names a file in which every test leaves what became of it. A test that leaves the device dead ends the process:
``make gpu`` starts another, which goes on behind it. FASTDIFF_GPU_POOL=0: every array is memory of its own, whose end
compute-sanitizer knows; of CuPy's pool it knows nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # what they share with the tests of the host run
sys.path.append(str(HERE.parents[1] / "benchmarks"))
import bare  # noqa: E402, F401 - so that the project is found

collect_ignore_glob = [] if os.environ.get("FASTDIFF_GPU", "0") != "0" else ["*"]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; make gpu runs these")
    if os.environ.get("FASTDIFF_GPU_POOL", "1") == "0":
        import cupy

        cupy.cuda.set_allocator(None)
    if "FASTDIFF_GPU_EVENTS" in os.environ:
        config.pluginmanager.register(Events())


class Events:
    """Tells `benchmarks/gpu_run.py` what becomes of the tests."""

    def __init__(self):
        import gpu_events

        self.events, self.outcome = gpu_events, ""
        gpu_events.end_with_parent()

    @pytest.hookimpl(trylast=True)  # what is deselected by name has gone
    def pytest_collection_modifyitems(self, items):
        begun = {event.get("begin") for event in self.events.read()}
        items[:] = [item for item in items if item.nodeid not in begun]
        self.events.tell(planned=[item.nodeid for item in items])

    def pytest_runtest_logstart(self, nodeid):
        self.outcome = "passed"
        self.events.tell(begin=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.outcome = f"failed: {report.longreprtext[-2000:]}"
        elif report.skipped:
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid):
        good = not self.outcome.startswith("failed")
        self.events.tell(end=nodeid, outcome=self.outcome, good=good)
        if not good:
            import cupy

            try:
                cupy.cuda.runtime.deviceSynchronize()
            except Exception as error:  # noqa: BLE001 - of CuPy or the driver
                self.events.tell(dying=f"{type(error).__name__}: {error}")
                os._exit(3)
