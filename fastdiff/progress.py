"""How far a long loop is: a bar on a terminal or in a notebook, else lines, as a log holds them.

The library of bars is imported when one is shown.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Self

from fastdiff.forks import at_fork, uncut

log = logging.getLogger("fastdiff")

FIRST, SECONDS = 1.0, 5.0  # until the first line, and between two


class _Nothing:
    """A bar that is not shown."""

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix(self, **values: Any) -> None:
        pass


class _Lines:
    """A line every few seconds, where a bar cannot be drawn over itself; and one at the end of what is to stay."""

    def __init__(
        self, *, total: int, desc: str, unit: str = "", initial: int = 0, leave: bool = True, file: Any = None
    ) -> None:
        self.total, self.desc, self.unit, self.leave = total, desc, f" {unit}s" if unit else "", leave
        self.file = sys.stderr if file is None else file
        self.n, self.initial, self.first, self.words = initial, initial, initial, ""
        self.begun = time.monotonic()
        self.due = self.begun + FIRST

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.leave and self.n:
            self._say(f"in {_minutes(time.monotonic() - self.begun)}")

    def update(self, n: int = 1) -> None:
        now = time.monotonic()
        if self.n == self.initial:  # the first step, in which kernels may be compiled, says nothing of the others
            self.first, self.begun = self.n + n, now
        self.n += n
        if now >= self.due and self.n < self.total:
            self.due = now + SECONDS
            rate = (self.n - self.first) / max(now - self.begun, 1e-9)
            self._say(f"{rate:.3g} a second, {_minutes((self.total - self.n) / rate)} left" if rate else "begun")

    def set_postfix(self, *, refresh: bool = True, **values: Any) -> None:
        self.words = "".join(f", {name} {value}" for name, value in values.items())

    def compiling(self) -> None:
        self.file.write(f"fastdiff: {sys.modules['fastdiff.kernels.cpu.jit'].COMPILING}\n")
        self.file.flush()

    def _say(self, text: str) -> None:
        share = f"{self.n}/{self.total}{self.unit} ({100 * self.n // max(self.total, 1)} %)"
        self.file.write(f"fastdiff: {self.desc}: {share}{self.words}, {text}\n")
        self.file.flush()


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _in_notebook() -> bool:
    """Whether this is a notebook's kernel, as tqdm asks."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _draws(file: Any) -> bool:
    """Whether what is written to a file can be drawn over."""
    try:
        return bool(file.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no file, or a closed one
        return False


@contextmanager
def bar(*, show: bool, **options: Any) -> Iterator[Any]:
    """Show how far a loop is inside the block; without `show`, something that takes its place.

    On a terminal and in notebooks that is tqdm's bar with these options, elsewhere a line every `SECONDS`. The time of
    the first step, in which kernels may be compiled, says nothing of the others and counts for none; if some are, that
    is said.
    """
    if not show:
        yield _Nothing()
        return
    kind = _bar() if _in_notebook() or _draws(options.get("file", sys.stderr)) else _Lines
    compiler = sys.modules.get("fastdiff.kernels.cpu.jit")  # if it is in use
    with kind(**options) as shown, compiler.watching(shown.compiling) if compiler else nullcontext():
        yield shown


@cache
def _bar() -> Any:
    with uncut, warnings.catch_warnings(action="ignore"):  # that a notebook without ipywidgets gets a bar of text
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        # tqdm's own lock is shared with forked children: one that ends while it holds it would stop the parent's bars.
        _lock = threading.RLock()
        monitor_interval = 0  # no thread that watches the bars
        begun = False
        usual: str | None = None  # what stood before the bar while no kernel was compiled

        @classmethod
        def renew(cls) -> None:
            cls._lock = threading.RLock()

        def update(self, n: int = 1) -> None:
            if self.begun or self.disable:
                super().update(n)
                return
            self.begun = True
            self.n += n
            self.initial = self.last_print_n = self.n  # no rate is made of them
            self.start_t = self.last_print_t = self._time()
            if self.usual is not None:
                self.set_description_str(self.usual, refresh=False)
            self.refresh()

        def compiling(self) -> None:
            if not self.begun and self.usual is None:
                self.usual = self.desc or ""
                self.set_description(sys.modules["fastdiff.kernels.cpu.jit"].COMPILING)

    at_fork(Bar)
    return Bar


def say(text: str, *, show: bool) -> None:
    """Write a line to stderr, as a bar is; without `show`, log it."""
    if show:
        sys.stderr.write(f"fastdiff: {text}\n")
        sys.stderr.flush()
    else:
        log.info("%s", text)
