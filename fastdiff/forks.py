"""Forked children: what threads of the parent held or had half done at the fork is renewed, as they are not there."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet


class Renewable(Protocol):
    """What has locks, or what they guard."""

    def renew(self) -> None:
        """Be ready for use in a forked child."""


_owners: WeakSet[Any] = WeakSet()


def at_fork(owner: Renewable) -> None:
    """Have `owner.renew` called in every forked child, as long as the owner lives."""
    _owners.add(owner)


def free(lock: Any) -> Any:
    """Return a reentrant lock, or a new one in the place of one that a thread that is gone holds."""
    if lock.acquire(blocking=False):
        lock.release()
        return lock
    return threading.RLock()


def _renew() -> None:
    for owner in list(_owners):
        owner.renew()


uncut = threading.RLock()
"""Held while another thread's fork must wait: a child would find a module half imported, and wait for ever."""

if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew)
    os.register_at_fork(before=uncut.acquire, after_in_parent=uncut.release, after_in_child=uncut.release)


if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property(functools.cached_property):
        """Without the lock of Python 3.11, which all objects of a class share, and which a fork would not renew."""

        def __init__(self, func: Any) -> None:
            super().__init__(func)
            self.lock = contextlib.nullcontext()


__all__ = ["at_fork", "cached_property", "free", "uncut"]
