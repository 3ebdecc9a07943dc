"""One process at a time changes the aggregator's keys: two at once would mix their files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from consilium_common.processes import only_one
from consilium_server.home import ServerHome

#: Nothing is asked or fetched under the lock, so whoever holds it is done within a second.
WAIT_SECONDS = 10.0


@contextlib.contextmanager
def changing_keys(home: ServerHome) -> Iterator[None]:
    """Keep others from changing keys and certificates of this home; wait for who does already.

    A rotation, the running aggregator's hourly renewal, and the lock of the authority's key each
    replace a key and its certificate, one file after the other. The lock ends with its process.

    Raises
    ------
    ConsiliumError
        ``state.running`` when another holds it for longer than ``WAIT_SECONDS``; nothing was
        changed.
    """
    with only_one(
        home.run / "keys.lock",
        "Another command is changing the keys of this aggregator.",
        hint="Wait until it has ended and look at what it did (`consilium server log`); nothing was"
        " changed here.",
        wait=WAIT_SECONDS,
        where=home.path,
    ):
        yield
