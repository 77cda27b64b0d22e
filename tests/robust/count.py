"""What the commands of this folder count: tries, and how many of them ended as they must not."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field


@dataclass
class Count:
    """A row of the table.

    Attributes
    ----------
    what : str
        What is counted.
    tries, failures : int
    found : list of str
        The first few failures.
    note : str
        A figure beside it.
    """

    what: str
    tries: int = 0
    failures: int = 0
    found: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, problem: object = None) -> None:
        """Count a try, and what was wrong with it."""
        self.tries += 1
        if problem:
            self.failures += 1
            if len(self.found) < 20:
                self.found.append(str(problem))


def bits(*arrays) -> int:
    """A checksum of arrays."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.tobytes(), crc)
    return crc
