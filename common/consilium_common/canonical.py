"""Canonical JSON: one byte sequence per value, so that digests and signatures mean something."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Serialise ``value`` with sorted keys, no white space, UTF-8 and no NaN or infinity.

    Floats are written by ``repr`` (shortest form that reads back exactly, as RFC 8785 asks of the
    common range); integers stay integers.

    Raises
    ------
    ValueError
        A float is not finite.
    TypeError
        A value is not JSON (only dict, list, tuple, str, int, float, bool, None are).
    """
    _check_finite(value)
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``value``, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _check_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no canonical JSON form")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"JSON object key {key!r} is not a string")
            _check_finite(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_finite(item)
