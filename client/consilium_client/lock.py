"""One process at a time on a site's state: two on one ledger and one node key would fight."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator

from consilium_client.home import SiteHome
from consilium_common import processes
from consilium_common.files import write_atomic


@contextlib.contextmanager
def only_one(home: SiteHome) -> Iterator[None]:
    """Hold the site's lock, and say in ``status.json`` who does.

    Raises
    ------
    ConsiliumError
        ``state.running`` when another process holds it.
    """
    with processes.only_one(
        home.run / "lock",
        "This site is running already.",
        hint="Stop the other `consilium site start` first.",
        where=home.path,
    ):
        status = home.run / "status.json"
        write_atomic(status, json.dumps({"pid": os.getpid()}).encode())
        try:
            yield
        finally:
            status.unlink(missing_ok=True)


@contextlib.contextmanager
def renewing(home: SiteHome) -> Iterator[None]:
    """Wait for whoever renews the certificate now, and keep others waiting.

    Of two certificates that are asked for at once the aggregator takes only the later: written in
    the other order they would lock the site out.
    """
    path = str(home.run / "renewal.lock")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
