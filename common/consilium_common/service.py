"""What systemd is told of a service: that it is ready, alive, or stopping (sd_notify(3)).

Outside systemd nothing is told, and nothing else changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Final

_SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG: Final = "WATCHDOG_USEC"
_WATCHDOG_PID: Final = "WATCHDOG_PID"


class Service:
    """The way to the service manager that has started this process, if one has.

    Parameters
    ----------
    environment : mapping
        Its variables are taken out, so that no child process speaks in this one's name.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        self._address = variables.pop(_SOCKET, "")
        self._watchdog_seconds = _watchdog(variables)
        for name in (_WATCHDOG, _WATCHDOG_PID):
            variables.pop(name, None)

    def ready(self, status: str) -> None:
        """Say that what the service is for can be used now; ``status`` is for people."""
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Say that it ends as it should."""
        self._tell("STOPPING=1\nSTATUS=stopping")

    async def alive_for_ever(self) -> None:
        """Say in time, again and again, that the event loop turns; returns where nobody asks.

        systemd restarts a service that stops saying so: one that hangs is not seen otherwise.
        """
        if not self._address or self._watchdog_seconds is None:
            return
        while True:
            self._tell("WATCHDOG=1")
            # Twice within the time allowed, as sd_watchdog_enabled(3) asks for.
            await asyncio.sleep(self._watchdog_seconds / 2)

    def _tell(self, words: str) -> None:
        if not self._address:
            return
        # A leading @ stands for the zero byte of Linux's abstract names.
        address = self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address
        # A manager that does not listen any more is no reason to stop working.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as way:
            way.connect(address)
            way.sendall(words.encode())


def _watchdog(variables: Mapping[str, str]) -> float | None:
    """Return the seconds within which systemd wants to hear of us; None: it does not."""
    pid = variables.get(_WATCHDOG_PID, "")
    if pid and pid != str(os.getpid()):
        return None
    try:
        seconds = int(variables.get(_WATCHDOG, "0")) / 1e6
    except ValueError:
        return None
    return seconds if seconds > 0 else None
