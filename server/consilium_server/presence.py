"""Which sites are there: heard by the gateway, written to the registry for many at a time."""

from __future__ import annotations

import threading
import time
from typing import Any, Final

from sqlalchemy import update

from consilium_server.registry import Registry
from consilium_server.tables import Member, heard_now, now

#: What has only been heard again is written this late: a write for each greeting of a thousand
#: sites would be five hundred a second, each with a flush of the disk.
_FLUSH_SECONDS: Final = 1.0


class Presence:
    """What sites said of themselves last.

    Parameters
    ----------
    registry : Registry
        Where others look whether a site is online.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._said: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, dict[str, Any]] = {}
        self._flushed = 0.0
        self._lock = threading.Lock()

    def heard(self, name: str, said: dict[str, Any], *, counts: bool = True) -> None:
        """Note what a site says of itself, columns of :class:`Member` by name.

        Anything new is written at once; that it is still there, together with others'.

        Parameters
        ----------
        counts : bool
            Whether it counts as online.
        """
        with self._lock:
            news = self._said.get(name) != said
            self._said[name] = said
            seen = {"last_seen": now(), "heard": heard_now()} if counts else {}
            self._waiting[name] = {**said, **seen}
            if not news and time.monotonic() < self._flushed + _FLUSH_SECONDS:
                return
            waiting, self._waiting = self._waiting, {}
            self._flushed = time.monotonic()
        with self._registry.transaction() as session:
            for member, values in waiting.items():
                session.execute(update(Member).where(Member.name == member).values(**values))
