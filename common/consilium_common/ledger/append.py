"""Append to a ledger's file: signed entries in one durable transaction, or none of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.conflict import refuse_conflict
from consilium_common.ledger.database import immediate, sqlite_errors
from consilium_common.ledger.entries import (
    GENESIS,
    Entry,
    Kind,
    MalformedEntryError,
    public_hex,
    sign_entry,
)
from consilium_common.ledger.follow import Follower

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

#: Appends one entry of a kind with a body, within the transaction it was made for.
Append = Callable[[Kind, dict[str, Any]], Entry]


class Appender:
    """Writes the entries of one site's ledger with its key."""

    def __init__(
        self, db: sqlite3.Connection, follower: Follower, signer: Ed25519PrivateKey, site: str
    ) -> None:
        self._db = db
        self._follower = follower
        self._signer = signer
        self._site = site
        self.public_key = public_hex(signer.public_key())

    def begin(self) -> None:
        """Write the first entry where there is none yet."""
        with sqlite_errors(self._follower.path, writing=True), immediate(self._db):
            if self._db.execute("SELECT 1 FROM entry LIMIT 1").fetchone() is None:
                self._insert(self._signed(0, GENESIS, "opened", {"public_key": self.public_key}))

    @contextmanager
    def transaction(self) -> Iterator[Append]:
        """One write transaction over an up-to-date state; what it yields appends to it.

        Raises
        ------
        ConsiliumError
            ``privacy.ledger-rolled-back``, ``privacy.ledger-corrupt``, ``privacy.ledger-write``,
            ``privacy.charge-invalid``. Nothing is appended then.
        """
        follower = self._follower
        follower.require_own_process()
        with follower.lock:
            fresh: list[tuple[Entry, bytes]] = []

            def append(kind: Kind, body: dict[str, Any]) -> Entry:
                head = fresh[-1][0].head if fresh else follower.state.head
                assert head is not None  # a ledger is opened by its first entry
                try:
                    entry = self._signed(head.sequence + 1, head.hash, kind, body)
                except MalformedEntryError as error:
                    raise ConsiliumError(
                        "privacy.charge-invalid", f"The ledger refuses this entry: {error}."
                    ) from error
                with sqlite_errors(follower.path, writing=True):
                    fresh.append((entry, self._insert(entry)))
                return entry

            with sqlite_errors(follower.path, writing=True), immediate(self._db):
                # Asked each time: the mark may appear while this object lives.
                refuse_conflict(follower.path)
                follower.refresh()
                yield append
            # Only what is on the disk counts here as well.
            for entry, line in fresh:
                follower.appended(entry, line)

    def _signed(self, sequence: int, previous: str, kind: Kind, body: dict[str, Any]) -> Entry:
        return sign_entry(
            self._signer,
            sequence=sequence,
            previous=previous,
            site=self._site,
            kind=kind,
            body=body,
        )

    def _insert(self, entry: Entry) -> bytes:
        line = entry.line()
        self._db.execute("INSERT INTO entry (sequence, line) VALUES (?, ?)", (entry.sequence, line))
        return line
