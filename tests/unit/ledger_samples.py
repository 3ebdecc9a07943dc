"""Small ledgers for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consilium_common.ledger.entries import Entry, Purpose
from consilium_common.ledger.store import Ledger
from consilium_common.ledger.witness import WitnessRecord
from consilium_common.privacy.events import PrivacyEvent
from consilium_common.wire.statements import sign

#: Fixed, so that every run of a test looks at the same bytes.
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WITNESS_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(64, 96)))
WITNESS_TIME = "2031-05-06T07:08:09.000000Z"
STUDY = "a" * 64
OTHER_STUDY = "b" * 64
EVENT = PrivacyEvent(0.1, 2.0, 20)


def patients(number: int, start: int = 0) -> list[str]:
    """Return keyed hashes as a site would make them."""
    return [
        hashlib.sha256(b"patient %d" % index).hexdigest()[:32]
        for index in range(start, start + number)
    ]


def charge(
    ledger: Ledger,
    round_index: int = 0,
    *,
    study: str = STUDY,
    event: PrivacyEvent = EVENT,
    members: list[str] | None = None,
    purpose: Purpose = "training",
) -> Entry:
    """Charge one round."""
    return ledger.charge(
        study=study,
        round_index=round_index,
        event=event,
        clip_norm=1.0,
        delta=1e-3,
        patients=patients(3) if members is None else members,
        purpose=purpose,
    )


def open_ledger(path: Path, *, site: str = "north") -> Ledger:
    """Open a ledger for writing with the fixed key."""
    return Ledger.open(path, KEY, site=site)


def small_ledger(path: Path) -> Ledger:
    """Return an open ledger of eight entries with every kind in it."""
    ledger = open_ledger(path)
    ledger.record_policy({"budget": {"epsilon": 10.0, "delta": 1e-3}})
    first = charge(ledger, 0)
    ledger.release(first, "c" * 64)
    second = charge(ledger, 1)
    ledger.void(second, "no update was stored")
    charge(ledger, 0, study=OTHER_STUDY)
    return ledger


def witness(
    entry: Entry, *, key: Ed25519PrivateKey = WITNESS_KEY, time: str = WITNESS_TIME
) -> WitnessRecord:
    """Return the record that the aggregator would make of an entry."""
    unsigned = WitnessRecord(entry.site, entry.head, time, "")
    return WitnessRecord(entry.site, entry.head, time, sign(key, unsigned.statement()))


def witnessed_ledger(path: Path, number: int = 6) -> Ledger:
    """Return a small ledger whose first ``number`` entries are witnessed."""
    ledger = small_ledger(path)
    records = [witness(entry) for entry in ledger.from_entry(0, number)]
    ledger.add_witness(records, WITNESS_KEY.public_key())
    return ledger
