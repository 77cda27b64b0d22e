"""What is said on stderr: notes, errors, what the library logs and warns of; and Ctrl-C while a model trains."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastdiff.errors import DataWarning, QualityWarning, ScheduleWarning

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> int:
    line = text.replace("\n", " ")
    note(f"fastdiff: error: {line}")
    return 2


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        note(f"fastdiff: {level}{record.getMessage()}")


@contextmanager
def plain_messages() -> Iterator[None]:
    """Show what the library logs and warns of as plain lines on stderr, while a command runs."""
    log, handler = logging.getLogger("fastdiff"), _Handler()
    level = log.level

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        note(f"fastdiff: warning: {message}")

    log.addHandler(handler)
    log.setLevel(logging.INFO)
    with warnings.catch_warnings():
        for kind in (ScheduleWarning, DataWarning, QualityWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = show
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)


class PatientInterrupt:
    """Ctrl-C while a model trains.

    The first one stops the training after the step, so the state is sound and worth saving. A second one stops at
    once: an exception in the middle of a step may leave weights and moments that belong to different steps.
    """

    def __init__(self) -> None:
        self.presses = 0
        self.gave_up = False

    def wanted(self, step: int, loss: float) -> bool:
        """Whether to stop: `fit` asks after each step."""
        return self.presses > 0

    def __enter__(self) -> None:
        self._before = None
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job
            self._before = signal.signal(signal.SIGINT, self._press)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self.presses += 1
        if self.presses > 1:
            self.gave_up = True
            raise KeyboardInterrupt
        note("\nfastdiff: stopping after this step; once more to stop at once, without saving")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C inside the block: an impatient second one must not cost the training."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no Ctrl-C arrives here
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
