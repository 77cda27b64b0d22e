"""Signals that ask a process to stop: Ctrl-C, SIGTERM (Slurm, Docker, timeout) and SIGHUP (a terminal that goes).

A handler that somebody has set, and a signal that is ignored, stay as they are. Signals come to the main thread alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))  # no Ctrl-C


def usual() -> list[int]:
    """Return those that would end this process now, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    found = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL]
    return [signal.SIGINT, *found] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else found


@contextmanager
def handled(handler: Any, numbers: list[int]) -> Iterator[None]:
    """Have a handler for signals inside the block, and those before it again after that."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, usual_handler in before.items():
            signal.signal(number, usual_handler)


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Hold back what asks to stop, and two Ctrl-C at most; yields a function that says whether one came.

    Where the block ends well after that, KeyboardInterrupt is raised then.
    """
    presses, came = 0, False

    def hold(number: int, frame: Any) -> None:
        nonlocal presses, came
        came = True
        presses += number == signal.SIGINT
        if presses == 2:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    with handled(hold, usual()):
        yield lambda: came
    if came:
        raise KeyboardInterrupt


@contextmanager
def delayed() -> Iterator[None]:
    """Let Ctrl-C take effect after the block, whatever its handler does; one inside another waits for the outer one."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    presses = 0

    def hold(number: int, frame: Any) -> None:
        nonlocal presses
        presses += 1

    try:
        with handled(hold, [signal.SIGINT]):
            yield
    finally:
        if presses:
            signal.raise_signal(signal.SIGINT)
