"""Tests that need a CUDA device. ``make gpu`` sets FASTDIFF_GPU and runs them; elsewhere they are not collected."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what they share with the tests of the host run

collect_ignore_glob = [] if os.environ.get("FASTDIFF_GPU", "0") != "0" else ["*"]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; make gpu runs these")
