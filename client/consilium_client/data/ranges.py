"""A range of numbers as a person writes it: ``<40``, ``40..65``, ``>=65``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

_NUMBER: Final = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_ONE_SIDED: Final = re.compile(rf"(<=|>=|<|>)\s*({_NUMBER})")
_TWO_SIDED: Final = re.compile(rf"({_NUMBER})\s*\.\.\s*({_NUMBER})")


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds; ``math.inf`` where a side is open.

    Parameters
    ----------
    low, high : float
        Bounds, ``low <= high``.
    with_low, with_high : bool
        Whether the bound itself belongs to the range.
    """

    low: float
    high: float
    with_low: bool
    with_high: bool

    def __contains__(self, number: float) -> bool:
        above = number > self.low or (self.with_low and number == self.low)
        below = number < self.high or (self.with_high and number == self.high)
        return above and below

    def overlaps(self, other: Range) -> bool:
        """Whether a number lies in both ranges."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return low < high or (low == high and low in self and low in other)


def parse_range(text: str) -> Range | None:
    """Read a range; None where the text is none.

    ``a..b`` holds a and not b, so that ranges written one after the other share no number.

    Raises
    ------
    ValueError
        The range holds no number: ``65..40``.
    """
    plain = text.strip()
    if match := _ONE_SIDED.fullmatch(plain):
        sign, bound = match[1], float(match[2])
        if sign.startswith("<"):
            return Range(-math.inf, bound, False, sign == "<=")
        return Range(bound, math.inf, sign == ">=", False)
    if match := _TWO_SIDED.fullmatch(plain):
        low, high = float(match[1]), float(match[2])
        if low >= high:
            raise ValueError(f"the range {plain} holds no number")
        return Range(low, high, True, False)
    return None


def parse_number(text: str) -> float | None:
    """Return a finite number as a person or a DICOM tag writes it; None where it is none."""
    if not re.fullmatch(_NUMBER, text.strip()):
        return None
    number = float(text)
    return number if math.isfinite(number) else None
