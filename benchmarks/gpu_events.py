"""What the processes of `gpu_run.py` tell it: lines of JSON at the end of a file, so that they may die at any time.

They say what they plan ("planned"), begin ("begin") and end ("end", and whether it is "good"); why they die ("dying").
What else a line holds is between two ends.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

FILE, PARENT = "FASTDIFF_GPU_EVENTS", "FASTDIFF_GPU_PARENT"


def tell(**event: Any) -> None:
    """Append an event, in one go."""
    with Path(os.environ[FILE]).open("ab", buffering=0) as file:
        file.write(json.dumps(event).encode() + b"\n")


def read() -> list[dict[str, Any]]:
    """Return what was told so far, by earlier processes too."""
    return [json.loads(line) for line in Path(os.environ[FILE]).read_text(encoding="utf-8").splitlines()]


def end_with_parent() -> None:
    """End this process when the program that it works for has gone, which may have been killed."""

    def watch() -> None:
        while True:
            try:
                os.kill(int(os.environ[PARENT]), 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
