"""One process at a time changes the aggregator's keys: two at once would mix their files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_server.home import ServerHome

#: Nothing is asked or fetched under the lock, so whoever holds it is done within a second.
WAIT_SECONDS = 10.0
_AGAIN_SECONDS: Final = 0.05


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
    path = home.run / "keys.lock"
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+") as lock:
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise ConsiliumError(
                        "state.running",
                        "Another command is changing the keys of this aggregator.",
                        where=str(home.path),
                        hint="Wait until it has ended and look at what it did (`consilium server"
                        " log`); nothing was changed here.",
                    ) from error
                time.sleep(_AGAIN_SECONDS)
        yield
