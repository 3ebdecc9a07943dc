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
import time
from pathlib import Path
from typing import Any, Final

from consilium_client.egress import error_reason
from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_client.store import StudyStore
from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import instructions_of

_log = logging.getLogger(__name__)

#: Asks this often without being woken, in case a wake-up was lost.
#: A task that is taken while its message is still coming waits a second in Flower: seldom.
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
    wake = _wake_socket(home)
    eager_until = 0.0
    while True:
        token = source.acquire()
        if token is not None:
            _run(home, address, token, wake)
            eager_until = 0.0
            continue
        if time.monotonic() < eager_until:
            time.sleep(_EAGER_PAUSE)
            continue
        wake.settimeout(_IDLE_SECONDS)
        try:
            wake.recv(16)
            eager_until = time.monotonic() + _EAGER_SECONDS
        except TimeoutError:
            _end_workers_of_ended_studies(home)


def _run(home: SiteHome, address: str, token: str, wake: socket.socket) -> None:
    from consilium_client.app import app
    from consilium_client.flower_private import run_client_task

    store = StudyStore(home)

    def permit(message: Any, reply: Any, object_ids: list[str]) -> None:
        # One message at a time: what woke us up to now was about this one.
        _forget_wake_ups(wake)
        if reply.has_error():
            store.permit_outgoing(object_ids, "", None, "error")
        else:
            asked = instructions_of(message.content)
            kind = str(message.metadata.message_type)
            store.permit_outgoing(object_ids, asked.study, asked.round_index, kind)

    def reason(error: ConsiliumError) -> str:
        _log.error("%s", error)
        return error_reason(error)

    try:
        run_client_task(address, token, app, permit, reason)
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


def _forget_wake_ups(wake: socket.socket) -> None:
    wake.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            wake.recv(16)


def _wake_socket(home: SiteHome) -> socket.socket:
    path = home.wake_socket
    path.unlink(missing_ok=True)
    wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    wake.bind(str(path))
    return wake


if __name__ == "__main__":
    main(*sys.argv[1:3])
