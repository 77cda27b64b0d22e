"""What is said on stderr: notes, errors, what the library logs and warns of; and what asks a training to stop."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastdiff.errors import DataWarning, QualityWarning, ScheduleWarning
from fastdiff.signals import ENDS, handled

BROKEN = 1  # what was looked at does not work
REFUSED = 2  # bad input, an unknown option: as argparse has it
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> int:
    line = text.replace("\n", " ")
    note(f"fastdiff: error: {line}")
    return REFUSED


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
    """What asks a training to stop: Ctrl-C, SIGTERM, SIGHUP.

    It stops after the step, so the state is sound and worth saving. A second Ctrl-C stops at once: an exception in the
    middle of a step may leave weights and moments that belong to different steps.
    """

    def __init__(self) -> None:
        self.presses = 0  # Ctrl-C
        self.ended_by = 0  # number of another signal
        self.gave_up = False

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self.presses > 0 or self.ended_by > 0

    @property
    def code(self) -> int:
        """What a shell reports for a program that ends so."""
        return 128 + self.ended_by if self.ended_by else INTERRUPTED

    def wanted(self, step: int, loss: float) -> bool:
        """Whether to stop: `fit` asks after each step."""
        return self.asked

    def __enter__(self) -> None:
        self._inside = ExitStack()
        if threading.current_thread() is threading.main_thread():
            # SIGINT is ignored in a shell's background job, SIGHUP under nohup.
            heard = [n for n in (signal.SIGINT, *ENDS) if signal.getsignal(n) is not signal.SIG_IGN]
            self._inside.enter_context(handled(self._press, heard))

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    def _press(self, number: int, *_: object) -> None:
        first = not self.asked
        if number != signal.SIGINT:
            self.ended_by = number
            if first:
                note(f"\nfastdiff: {signal.Signals(number).name}: stopping after this step")
            return
        self.presses += 1
        if self.presses > 1:
            self.gave_up = True
            raise KeyboardInterrupt
        note("\nfastdiff: stopping after this step; once more to stop at once, without saving")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore what asks to stop inside the block: an impatient second one must not cost the training."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal arrives here
        return
    with handled(signal.SIG_IGN, [signal.SIGINT, *ENDS]):
        yield
