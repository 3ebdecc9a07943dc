"""Which image a channel is, by a pattern that a person gives for its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from consilium_client.data.findings import Finding
from consilium_common.errors import ConsiliumError

T = TypeVar("T")


def matching(candidates: Iterable[T], pattern: str, names: Callable[[T], Sequence[str]]) -> list[T]:
    """Return the candidates one of whose names fits the pattern, whatever the case.

    A pattern with ``*``, ``?`` or ``[`` fits as a file name's does. Any other fits the whole name
    or, where none does, a part of one: ``T2`` is ``T2_reg``, unless a series is called just T2.
    """
    wanted = pattern.strip().casefold()
    listed = [(one, [name.casefold() for name in names(one) if name]) for one in candidates]
    whole = [one for one, known in listed if any(fnmatchcase(name, wanted) for name in known)]
    if whole or any(sign in wanted for sign in "*?["):
        return whole
    return [one for one, known in listed if any(wanted in name for name in known)]


def unfit_channel(case: str, channel: str, count: int, where: str) -> Finding:
    """Return the finding for a case in which a channel's pattern fits no image, or several."""
    if count:
        return Finding.of(
            case,
            ConsiliumError(
                "data.several-series",
                f"{count} images could be the channel {channel}.",
                where=where,
                hint=f"Give a narrower pattern with --channel {channel}=PATTERN, or list the cases "
                "in a CSV file.",
            ),
        )
    return Finding.of(
        case,
        ConsiliumError(
            "data.missing",
            f"No image is the channel {channel}.",
            where=where,
            hint=f"Correct the pattern in --channel {channel}=PATTERN, restore the image, or leave "
            "the case out (--skip-bad does).",
        ),
    )
