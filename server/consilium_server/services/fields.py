"""Reading the fields of a request that came from outside."""

from __future__ import annotations

from typing import Any

from consilium_common.errors import ConsiliumError


def text(request: dict[str, Any], key: str) -> str:
    """Return a field that must be text, or raise ``network.garbage``."""
    value = request.get(key)
    # A lone surrogate is a character in JSON and in nothing else.
    if not isinstance(value, str) or len(value) > 100_000 or not _encodable(value):
        raise ConsiliumError("network.garbage", f"The request's {key} is missing or not text.")
    return value


def number(request: dict[str, Any], key: str) -> int:
    """Return a whole number from 0 that may be missing (then 0), or raise ``network.garbage``."""
    value = request.get(key, 0)
    if type(value) is not int or not 0 <= value < 2**53:
        raise ConsiliumError("network.garbage", f"The request's {key} is not a number from 0.")
    return value


def count(request: dict[str, Any], key: str) -> int:
    """Return a number of patients, or raise ``study.bad-decision``."""
    value = request.get(key)
    if type(value) is not int or not 0 <= value < 2**53:
        raise ConsiliumError(
            "study.bad-decision",
            f"The decision's {key} is missing or not a number of patients.",
            hint="Site and aggregator may run releases that do not fit; update the older one.",
        )
    return value


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
