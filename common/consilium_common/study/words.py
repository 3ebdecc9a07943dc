"""Numbers, sizes and durations as the plan says them."""

from __future__ import annotations

from collections.abc import Sequence


def size_in_words(count: int) -> str:
    """Return a number of bytes in decimal units: ``549 kB``."""
    if count < 1000:
        return count_of(count, "byte")
    amount = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        amount /= 1000
        if amount < 999.5 or unit == "TB":
            break
    return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"


def count_of(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, in the plural where it is not one: ``2 classes``."""
    plural = many or (f"{one}es" if one.endswith("s") else f"{one}s")
    return f"{number:,} {one if number == 1 else plural}"


def number_of(value: float | None) -> str:
    """Return a number to six digits; a dash for none."""
    return "–" if value is None else f"{value:.6g}"


def sizes_of(values: Sequence[float]) -> str:
    """Return one number per axis: ``64 × 64 × 32``."""
    return " × ".join(number_of(value) for value in values)


def duration_of(seconds: float) -> str:
    """Return seconds in the unit that reads best: ``30 min``."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"
