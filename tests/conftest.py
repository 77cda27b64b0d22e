"""Lanes that cannot run are skipped, counted and named; with FASTDIFF_REQUIRE_ALL=1 a skip fails the session.

With --quick (`make quick`) whole files, what is marked slow and tests of CUDA are left out, and counted; --rest is what
--quick leaves out.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

PEERS = Path(__file__).parent / "peers"
# Left out by --quick: what compiles and runs CUDA sources on the host, and what times, trains long or asks peers.
NOT_QUICK = (
    "peers", "gpu", "test_cuda_*", "test_gpu_*", "test_asv.py", "test_bench.py", "test_benchmarks.py",
    "test_precision.py", "test_speed_guard.py",
)  # fmt: skip
LEFT_OUT = pytest.StashKey[set[str]]()
REQUIRE_ALL = os.environ.get("FASTDIFF_REQUIRE_ALL", "0") != "0"

pytest_plugins = ["pytester"]

settings.register_profile("fastdiff", deadline=None, derandomize=True, database=None)
settings.load_profile("fastdiff")


class AbsentLane(pytest.Directory):
    """A folder of tests that stands for one skip."""

    reason = ""

    def collect(self):
        raise pytest.skip.Exception(self.reason, allow_module_level=True)


def pytest_addoption(parser):
    parts = parser.getgroup("parts of the suite").addoption
    parts("--quick", action="store_true", help="leave out CUDA, peers, benchmarks and slow tests")
    parts("--rest", action="store_true", help="only what --quick leaves out")


def pytest_configure(config):
    if config.getoption("quick") and config.getoption("rest"):
        raise pytest.UsageError("--quick and --rest: take one, or none for the whole suite")


def pytest_collection_modifyitems(config, items):
    quick, rest = config.getoption("quick"), config.getoption("rest")
    if quick or rest:
        parts = {True: [], False: []}
        for item in items:
            parts[_is_quick(item)].append(item)
        items[:] = parts[quick]
        config.hook.pytest_deselected(items=parts[not quick])


def _is_quick(item):
    on_cuda = hasattr(item, "callspec") and "cuda" in item.callspec.id.split("-")
    return not (item.get_closest_marker("slow") or on_cuda or _in_long_lane(item.path))


def _in_long_lane(path):
    return any(part.match(lane) for part in (path, path.parent) for lane in NOT_QUICK)


def pytest_ignore_collect(collection_path, config):
    if not config.getoption("quick") or not _in_long_lane(collection_path):
        return None  # as pytest decides
    config.stash.setdefault(LEFT_OUT, set()).add(collection_path.name)
    return True


def pytest_collect_directory(path, parent):
    missing = [name for name in ("torch", "diffusers") if find_spec(name) is None]
    if path != PEERS or not missing:
        return None
    lane = AbsentLane.from_parent(parent, path=path)
    lane.reason = f"the peers lane needs {' and '.join(missing)}: pip install 'fastdiff-engine[peers]'"
    return lane


def _skipped(config):
    return config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])


def pytest_sessionfinish(session):
    if REQUIRE_ALL and _skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if left_out := config.stash.get(LEFT_OUT, None):
        terminalreporter.write_line(f"--quick: {len(left_out)} files left out ({', '.join(NOT_QUICK)})")
    skipped = len(_skipped(config))
    if REQUIRE_ALL and skipped:
        terminalreporter.write_line(f"FASTDIFF_REQUIRE_ALL: {skipped} skipped, which counts as failure", red=True)


@pytest.fixture(params=["numpy", "cpu"])
def backend(request):
    """The name of every backend that works here."""
    from fastdiff.backends import available_backends

    if request.param not in available_backends():
        pytest.skip(f"backend {request.param} does not work on this machine")
    return request.param


@pytest.fixture(params=["numpy", "cpu", "cuda"])
def any_backend(request):
    """Every backend; cuda runs on the host."""
    import host_cuda

    from fastdiff.backends import get_backend
    from fastdiff.backends.cuda import CudaBackend

    if request.param != "cuda":
        return get_backend(request.param)
    if not host_cuda.has_compiler():
        pytest.skip("the host run of the CUDA kernels needs g++")
    return CudaBackend(host_cuda.HostRuntime())
