"""What differs between two versions of a study, key by key."""

from __future__ import annotations

from typing import Any

from consilium_common.study.document import dotted, printable
from consilium_common.study.schema import Study
from consilium_common.study.words import number_of


def compare(old: Study, new: Study) -> list[str]:
    """Return one line for each value that differs, by key path; empty when the studies are one."""
    before, after = _flat(old.to_canonical(), ()), _flat(new.to_canonical(), ())
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            lines.append(f"{key}: {_plain(before[key])} is gone")
        elif key not in before:
            lines.append(f"{key}: {_plain(after[key])} is new")
        elif before[key] != after[key] or type(before[key]) is not type(after[key]):
            lines.append(f"{key}: {_plain(before[key])} → {_plain(after[key])}")
    return lines


def _flat(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """Return the leaves by key path; lists are leaves, and so are empty mappings."""
    if isinstance(value, dict) and value:
        return {
            key: leaf
            for name, item in value.items()
            for key, leaf in _flat(item, (*path, name)).items()
        }
    return {dotted(path): value} if value != {} else {}


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"[{', '.join(_plain(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return number_of(value) if isinstance(value, float) else printable(str(value))
