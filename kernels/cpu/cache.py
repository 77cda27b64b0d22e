"""Machine code kept on disk. What is not there as it was written is compiled again; what is wrong is said once."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile

log = logging.getLogger("fastdiff")

DIGEST = hashlib.sha256
SIZE = DIGEST().digest_size


@cache
def _say(folder: str) -> Callable[[object], None]:
    """What says, the first time, that the kernels in a folder are of no use."""
    said: list[object] = []

    def say(reason: object) -> None:
        if not said:
            words = "the kernels kept in %s cannot be used (%s): they are compiled anew. Empty the folder, or set "
            log.warning(words + "NUMBA_CACHE_DIR to another one", folder, reason)
        said.append(reason)

    return say


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """A kernel's files, each of which begins with the checksum of what follows."""

    def _load_index(self) -> dict[Any, str]:
        found = self._load(self._index_path)
        if found is None:
            return {}
        version, stamp, overloads = found
        return overloads if (version, stamp) == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._store(self._index_path, (self._version, self._source_stamp, overloads))

    def _load_data(self, name: str) -> Any:
        return self._load(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._store(self._data_path(name), data)

    def _load(self, path: str) -> Any:
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        if DIGEST(content[SIZE:]).digest() != content[:SIZE]:
            raise ValueError(f"{os.path.basename(path)} is empty or was altered")
        return pickle.loads(content[SIZE:])

    def _store(self, path: str, what: Any) -> None:
        content = self._dump(what)
        with self._open_for_write(path) as file:
            file.write(DIGEST(content).digest() + content)


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of a function, that is never more than a loss of time.

    Numba takes a cached function for good as long as its own file is unchanged, also when one that it inlines from
    another file has changed: here the stamp is the caller's.
    """

    def __init__(self, function: Callable[..., Any], stamp: str) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, f"{self._impl.filename_base}.checked", stamp)
        self._say = _say(self._cache_path)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001 - whatever a bad file leads to
            self._say(error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(sig, data)
            except ValueError:  # an index that cannot be read: a new one
                self._cache_file.flush()
                super().save_overload(sig, data)
        except Exception as error:  # noqa: BLE001
            self._say(error)
