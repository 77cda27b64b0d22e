"""Progress bars, whose library is imported when one is shown."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

from fastdiff.forks import at_fork, uncut

log = logging.getLogger("fastdiff")


class _Nothing:
    """A bar that is not shown."""

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix(self, **values: Any) -> None:
        pass


@contextmanager
def bar(*, show: bool, **options: Any) -> Iterator[Any]:
    """Show tqdm's bar with these options inside the block; without `show`, something that takes its place.

    The time of the first step, in which kernels may be compiled, says nothing of the others and counts for none; if
    some are, the bar says so.
    """
    if not show:
        yield _Nothing()
        return
    compiler = sys.modules.get("fastdiff.kernels.cpu.jit")  # if it is in use
    with _bar()(**options) as shown, compiler.watching(shown.compiling) if compiler else nullcontext():
        yield shown


@cache
def _bar() -> Any:
    with uncut:
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
