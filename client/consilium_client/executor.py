"""Runs ClientApps: takes tasks from the SuperNode and has the study's worker do them.

Started by `site start` as ``python -m consilium_client.executor``. This process stays light: it
moves messages, and imports neither torch nor MONAI.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from consilium_client.error_replies import error_reason
from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_common.errors import ConsiliumError

_log = logging.getLogger(__name__)

#: Exit status when the SuperNode that a task came from has gone.
SUPERNODE_LOST: Final = 3

#: Asks this often without being woken, in case a wake-up was lost.
_IDLE_SECONDS: Final = 4.0
#: After a wake-up the task may be a moment away.
_EAGER_SECONDS: Final = 1.0
_EAGER_PAUSE: Final = 0.02


def main(address: str, secret_file: str) -> None:
    """Take tasks until ended."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = SiteHome.existing(Path(os.environ[HOME_VARIABLE]))
    from consilium_client.app import pool

    pool().warm()
    from consilium_client.flower_private import TaskSource

    source = TaskSource(address, Path(secret_file).read_bytes())
    arrivals = Arrivals(home.wake_socket)
    eager_until = 0.0
    while True:
        token = source.acquire()
        if token is not None:
            _run(home, address, token, arrivals)
            eager_until = 0.0
            continue
        if time.monotonic() < eager_until:
            time.sleep(_EAGER_PAUSE)
            continue
        if arrivals.wait(_IDLE_SECONDS):
            eager_until = time.monotonic() + _EAGER_SECONDS
        else:
            _end_workers_of_ended_studies(home)


class Arrivals:
    """Hears from the link which message has come whole.

    Messages come one after the other: the SuperNode turns to the next one when it has sent the
    reply to the last, or when it has given it up because its run was stopped.

    Parameters
    ----------
    path : Path
        The socket; made anew.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._latest = ""
        self._taken: deque[str] = deque(maxlen=64)
        self._lock = threading.Lock()

    def wait(self, seconds: float) -> bool:
        """Return whether a message has come within ``seconds``."""
        self._socket.settimeout(seconds)
        try:
            self._latest = self._socket.recv(256).decode()
        except TimeoutError:
            return False
        return True

    def watch(self, message_id: str) -> Callable[[], bool]:
        """Take a message; the function returned says whether another came whole since."""
        self._taken.append(message_id)
        self._socket.setblocking(False)
        return self._newer

    def _newer(self) -> bool:
        with self._lock, contextlib.suppress(BlockingIOError):
            while True:
                self._latest = self._socket.recv(256).decode()
        return self._latest not in ("", *self._taken)


def _run(home: SiteHome, address: str, token: str, arrivals: Arrivals) -> None:
    from consilium_client.app import app
    from consilium_client.flower_private import run_client_task

    def reason(error: ConsiliumError) -> str:
        _log.error("%s", error)
        return error_reason(error)

    try:
        run_client_task(address, token, app, public_reason=reason, watch=arrivals.watch)
    except Exception:
        # The SuperNode reports the task as crashed; the next one must still be served.
        _log.exception("a task failed")
    finally:
        home.replied.touch()


def _end_workers_of_ended_studies(home: SiteHome) -> None:
    """A study that was stopped sends no last message: its worker would keep GPU and memory."""
    from consilium_client.app import pool

    with contextlib.suppress(OSError, ValueError):
        pool().end_all_but(set(json.loads(home.running.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except KeyboardInterrupt:
        # Flower interrupts a process when nobody hears its task's heartbeat any more. Nothing else
        # does: this one has a session of its own.
        sys.exit(SUPERNODE_LOST)
