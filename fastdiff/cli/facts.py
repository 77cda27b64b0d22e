"""Facts as aligned lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def aligned(facts: Mapping[str, Any]) -> list[str]:
    """Lines ``key  value`` with all values in one column; a mapping within is indented below its key."""
    rows = list(_rows(facts, "  "))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:{width}}  {value}".rstrip() for name, value in rows]


def _rows(facts: Mapping[str, Any], indent: str) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = indent + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield name, "" if value else "none"
            yield from _rows(value, indent + "  ")
        else:
            yield name, shown(value)


def shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        if len(value) > 8:
            return f"{len(value)} values, {shown(value[0])} to {shown(value[-1])}"
        return ", ".join(map(shown, value)) if value else "none"
    return str(value)
