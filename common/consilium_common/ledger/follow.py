"""Follow a ledger's file: take in what was appended since, checked; refuse it once damaged."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.chain import BrokenChainError, take
from consilium_common.ledger.database import as_bytes, corrupt, read_lines, sqlite_errors
from consilium_common.ledger.entries import Entry, MalformedEntryError
from consilium_common.ledger.state import LedgerState


class Follower:
    """The meaning of a ledger's file, kept up to date with what any process appends to it.

    ``lock`` is held by whoever uses the connection; ``state`` is of the last :meth:`refresh`.
    """

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self.state = LedgerState()
        self.lock = threading.RLock()
        self._db = db
        self._head_line = b""
        self._damage: ConsiliumError | None = None
        self._process = os.getpid()

    @property
    def in_own_process(self) -> bool:
        """Whether this is the process that opened the file, and no fork of it."""
        return os.getpid() == self._process

    def require_own_process(self) -> None:
        """Do nothing, or raise ``internal.ledger-fork``: a connection must not cross a fork."""
        if not self.in_own_process:
            raise ConsiliumError(
                "internal.ledger-fork",
                "The ledger was opened before this process was forked.",
                hint="Open the ledger in the process that uses it.",
            )

    def refresh(self) -> None:
        """Read what was appended since, checking form, chain, rules and the head's signature.

        Raises
        ------
        ConsiliumError
            ``privacy.ledger-corrupt``, ``privacy.ledger-read``, ``internal.ledger-fork``.
        """
        self.require_own_process()
        with self.lock:
            if self._damage is not None:
                raise self._damage
            try:
                self._read_on()
            except ConsiliumError as error:
                # Found damaged once, it stays so: half of it may have been taken in.
                if error.code == "privacy.ledger-corrupt":
                    self._damage = error
                raise

    def appended(self, entry: Entry, line: bytes) -> None:
        """Take in an entry of our own, which is on the disk."""
        self.state.apply(entry)
        self._head_line = line

    def entries(self, first: int = 0, limit: int = -1) -> list[Entry]:
        """Return ``limit`` entries (-1: all) from sequence ``first`` on, as they are stored."""
        with self.lock:
            lines = list(read_lines(self._db, self.path, first=first, limit=limit))
        return [parsed(line, self.path) for line in lines]

    def _read_on(self) -> None:
        state = self.state
        known = state.head
        with sqlite_errors(self.path, writing=False):
            rows = self._db.execute(
                "SELECT line FROM entry WHERE sequence >= ? ORDER BY sequence",
                (known.sequence if known else 0,),
            ).fetchall()
        if known is not None:
            if not rows or rows[0][0] != self._head_line:
                raise corrupt(self.path, f"entry {known.sequence} is gone or was replaced")
            rows = rows[1:]
        last: Entry | None = None
        for (line,) in rows:
            try:
                last = take(as_bytes(line), state, None)
            except BrokenChainError as error:
                raise corrupt(self.path, str(error)) from error
            self._head_line = line
        if last is not None and not _signed(last, state.public_key):
            # The chain binds everything before to this one signature.
            raise corrupt(self.path, f"entry {last.sequence} is not signed by the site's key")


def parsed(line: bytes, path: Path) -> Entry:
    """Return the entry of a stored line, or raise ``privacy.ledger-corrupt``."""
    try:
        return Entry.parse(line)
    except MalformedEntryError as error:
        raise corrupt(path, f"an entry is not readable ({error})") from error


def _signed(entry: Entry, public_key: str) -> bool:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    except ValueError:
        return False
    return entry.signed_by(key)
