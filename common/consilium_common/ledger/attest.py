"""Keep the aggregator's witness records beside the entries they attest."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.database import corrupt, immediate, last_witness, sqlite_errors
from consilium_common.ledger.entries import Head
from consilium_common.ledger.follow import Follower
from consilium_common.ledger.witness import MalformedRecordError, WitnessRecord

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def last_witnessed(db: sqlite3.Connection, follower: Follower) -> Head | None:
    """Return the entry witnessed last; None where none is.

    Raises
    ------
    ConsiliumError
        ``privacy.ledger-corrupt`` when the record is unreadable, or of an entry that is not this
        ledger's.
    """
    path = follower.path
    with follower.lock:
        line = last_witness(db, path)
        if line is None:
            return None
        try:
            head = WitnessRecord.parse(line).head
        except MalformedRecordError as error:
            raise corrupt(path, f"a witness record is not readable ({error})") from error
        ours = follower.entries(head.sequence, 1)
    if not ours or ours[0].head != head:
        raise corrupt(path, f"the witnessed entry {head.sequence} is gone or was replaced")
    return head


def keep_records(
    db: sqlite3.Connection,
    follower: Follower,
    records: Sequence[WitnessRecord],
    witness_key: Ed25519PublicKey,
) -> Head | None:
    """Check every record against our entry and keep the new ones; return the entry witnessed last.

    Those kept before are not kept twice; the others continue where these end.

    Raises
    ------
    ConsiliumError
        ``privacy.witness-invalid``, ``privacy.ledger-*``. Nothing is kept then.
    """
    with follower.lock:
        follower.refresh()
        # Checked before the transaction, which a charge may be waiting for: entries never change.
        for record in records:
            _check(record, follower, witness_key)
        with sqlite_errors(follower.path, writing=True), immediate(db):
            last = last_witnessed(db, follower)
            for record in records:
                following = 0 if last is None else last.sequence + 1
                if record.head.sequence > following:
                    raise _invalid(record, f"entry {following} has none yet", follower.path)
                if record.head.sequence == following:
                    db.execute(
                        "INSERT INTO witness (sequence, line) VALUES (?, ?)",
                        (following, record.line()),
                    )
                    last = record.head
    return last


def _check(record: WitnessRecord, follower: Follower, key: Ed25519PublicKey) -> None:
    why = ""
    if [entry.head for entry in follower.entries(record.head.sequence, 1)] != [record.head]:
        why = "it is not of this ledger's entry"
    elif record.site != follower.state.site:
        why = "it is of another site"
    elif not record.signed_by(key):
        why = "it is not signed by the witness"
    if why:
        raise _invalid(record, why, follower.path)


def _invalid(record: WitnessRecord, why: str, path: Path) -> ConsiliumError:
    return ConsiliumError(
        "privacy.witness-invalid",
        f"The aggregator's record of entry {record.head.sequence} does not hold: {why}.",
        where=str(path),
        hint="Tell the aggregator operator. The record was not stored; the ledger is as it was.",
    )
