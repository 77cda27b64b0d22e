"""Lanes that cannot run are skipped, counted and named; with FASTDIFF_REQUIRE_ALL=1 a skip fails the session.

The suite has four parts, of which --part runs one: quick (`make quick`), cuda, timed, which wants a machine to itself,
and rest. What --part=quick leaves out is counted. tests/scale, which needs the extra [scale] and starts clusters, runs
where it is named (`make scale-test`).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

PEERS, SCALE = (Path(__file__).parent / name for name in ("peers", "scale"))
# Files of a part, or of its folder; a test's own mark, or a parameter "cuda", says so too.
CUDA = ("gpu", "test_cuda_*", "test_gpu_*")
REST = ("peers", "test_asv.py", "test_bench.py", "test_benchmarks.py", "test_precision.py")
TIMED = ("test_speed_guard.py",)
PARTS = ("quick", "cuda", "timed", "rest")
# Of a part: its files, and the mark that is in the text of others that have tests of it.
FILES = {"timed": (TIMED, "mark.timed"), "rest": (REST, "mark.slow")}
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
    parser.getgroup("parts of the suite").addoption("--part", choices=PARTS, help="run one part; by default all")


def pytest_collection_modifyitems(config, items):
    if wanted := config.getoption("part"):
        others = [item for item in items if _part(item) != wanted]
        items[:] = [item for item in items if _part(item) == wanted]
        config.hook.pytest_deselected(items=others)


def _part(item):
    if item.get_closest_marker("timed") or _in(TIMED, item.path):
        return "timed"
    if _in(CUDA, item.path) or (hasattr(item, "callspec") and "cuda" in item.callspec.id.split("-")):
        return "cuda"
    return "rest" if item.get_closest_marker("slow") or _in(REST, item.path) else "quick"


def _in(lane, path):
    return any(part.match(name) for part in (path, path.parent) for name in lane)


def pytest_ignore_collect(collection_path, config):
    named = (Path(argument.split("::")[0]).resolve() for argument in config.args)
    if collection_path == SCALE and not any(path.is_relative_to(SCALE) for path in named):
        return True
    part = config.getoption("part")
    if part == "quick" and _in(CUDA + REST + TIMED, collection_path):
        config.stash.setdefault(LEFT_OUT, set()).add(collection_path.name)
        return True
    if part in FILES and collection_path.suffix == ".py":  # to import all files takes long
        lane, mark = FILES[part]
        if not _in(lane, collection_path) and mark not in collection_path.read_text(encoding="utf-8"):
            return True
    return None  # as pytest decides


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
        lanes = ", ".join(CUDA + REST + TIMED)
        terminalreporter.write_line(f"--part=quick: {len(left_out)} files left out ({lanes})")
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
