"""Progress bars, whose library is imported when one is shown."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

log = logging.getLogger("fastdiff")


class _Nothing:
    """A bar that is not shown."""

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix(self, **values: Any) -> None:
        pass


def bar(*, show: bool, **options: Any) -> AbstractContextManager[Any]:
    """Return tqdm's bar with these options; without `show`, something that takes its place."""
    if not show:
        return nullcontext(_Nothing())
    from tqdm.auto import tqdm

    shown: AbstractContextManager[Any] = tqdm(**options)
    return shown


def say(text: str, *, show: bool) -> None:
    """Write a line to stderr, as a bar is; without `show`, log it."""
    if show:
        sys.stderr.write(f"fastdiff: {text}\n")
        sys.stderr.flush()
    else:
        log.info("%s", text)
