"""A study's long lists in pages, so that no answer is larger than a message may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.wire.methods import MAX_MESSAGE_BYTES

#: What of a study grows with its rounds.
LISTS: Final = ("rounds", "evaluations")
#: Bytes of one list in one answer: both lists leave half of it to everything else.
_ROOM: Final = MAX_MESSAGE_BYTES // 4


def fitting(rows: Iterable[Any]) -> list[Any]:
    """Return as many of the first rows as go into one answer; the very first in any case."""
    found: list[Any] = []
    room = _ROOM
    for row in rows:
        room -= len(json.dumps(row)) + 1  # never less than its bytes on the wire
        if room < 0 and found:
            break
        found.append(row)
    return found


def first_page(study: dict[str, Any]) -> dict[str, Any]:
    """Return a study's overview with the beginning of each list, and in ``lengths`` their lengths.

    What is missing is asked for page by page, as :func:`whole_study` does.
    """
    return {
        **study,
        **{name: fitting(study[name]) for name in LISTS},
        "lengths": {name: len(study[name]) for name in LISTS},
    }


def whole_study(ask: Callable[[dict[str, Any]], Any], study: str) -> dict[str, Any]:
    """Ask for a study, page after page, and return all of it.

    Parameters
    ----------
    ask : callable
        Takes a request and returns the aggregator's answer.
    study : str
        Its name, or the first digits of its digest.

    Raises
    ------
    ConsiliumError
        ``network.garbage`` when a page is empty, and what ``ask`` raises.
    """
    shown: dict[str, Any] = ask({"digest": study})
    lengths = shown.pop("lengths", {})
    for name in LISTS:
        rows, length = shown[name], lengths.get(name, 0)
        while len(rows) < length:
            request = {"digest": shown["digest"], "list": name, "from": len(rows)}
            more = ask(request)["rows"]
            if not more:
                raise ConsiliumError(
                    "network.garbage",
                    f"The aggregator announced {length} {name} and has no more than {len(rows)}.",
                    hint="Ask again; if it stays so, tell the aggregator operator.",
                )
            rows.extend(more)
    return shown
