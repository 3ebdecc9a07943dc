"""How figures are written for people: an ε never smaller than it is, no digits without use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

#: Stands where there is no value.
NONE: Final = "–"


def epsilon(value: float | None) -> str:
    """Write ε with two decimals, rounded up: a report must not promise more than was kept."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞"
    # The small term forgives the last bits of a float: 7.1 must not become 7.11.
    return f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def number(value: float | None) -> str:
    """Write a parameter or a figure with up to four significant digits."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def figure(value: float | None) -> str:
    """Write a figure of a round, such as a loss, with three decimals where they say something."""
    if value is not None and (1e-3 <= abs(value) < 1e4 or value == 0):
        return f"{value:.3f}"
    return number(value)


def score(value: float | None) -> str:
    """Write a score between 0 and 1 with three decimals."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3f}"


def plus_minus(value: float, error: float) -> str:
    """Write a noised score with the standard error of its noise: .82 ± .04."""

    def short(number: float) -> str:
        return f"{number:.2f}".replace("0.", ".", 1) if abs(number) < 1 else f"{number:.2f}"

    return f"{short(value)} ± {short(error)}"


def percent(value: float) -> str:
    """Write a share as a percentage, rounded up at its last digit: it is a bound."""
    scaled = value * 100
    if scaled >= 99.95:
        return f"{math.ceil(scaled * 100 - 1e-7) / 100:.2f} %" if scaled < 100 else "100 %"
    return f"{math.ceil(scaled * 10 - 1e-7) / 10:.1f} %"


def data_size(value: int) -> str:
    """Write a number of bytes in decimal units: 812 bytes, 4.0 kB, 1.3 MB."""
    if value < 1000:
        return f"{value} bytes"
    size = float(value)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        # Below 999.95, because one decimal would show 1000.0 otherwise.
        if size < 999.95 or unit == "TB":
            return f"{size:.1f} {unit}"
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Write a time span: 0.42 s, 12.3 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return NONE
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def moment(value: datetime | None) -> str:
    """Write a moment in UTC to the minute; a moment without a zone counts as UTC."""
    if value is None:
        return NONE
    aware = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return aware.strftime("%Y-%m-%d %H:%M UTC")


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: 1 site, 3 sites, 2 entries."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}s"


def listed(names: Iterable[str]) -> str:
    """Join names: a, b and c."""
    items = list(names)
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"
