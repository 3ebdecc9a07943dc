"""The ledger of one site: every charge is durable before it returns, and nothing is ever undone."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.ledger.append import Append, Appender
from consilium_common.ledger.attest import keep_records, last_witnessed
from consilium_common.ledger.conflict import refuse_conflict
from consilium_common.ledger.database import (
    connect_reader,
    connect_writer,
    corrupt,
    read_export,
    read_lines,
    sqlite_errors,
)
from consilium_common.ledger.entries import Entry, Head, Purpose, ThreatModel, cohort_digest
from consilium_common.ledger.follow import Follower, parsed
from consilium_common.ledger.state import Charge, LedgerState
from consilium_common.ledger.witness import WitnessRecord, is_witness_line
from consilium_common.privacy.events import History, PrivacyEvent

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    from consilium_common.ledger.spend import Spend


class Ledger:
    """An append-only, hash-chained, signed record of what was charged to which patients.

    Several processes may append to one file; each sees what the others wrote before it writes.
    Use one object per process: a connection must not cross a fork.
    """

    def __init__(
        self, path: Path, db: sqlite3.Connection, signer: Ed25519PrivateKey | None, site: str
    ) -> None:
        self.path = path
        self.site = site
        self._db = db
        self._follower = Follower(path, db)
        self._appender = None if signer is None else Appender(db, self._follower, signer, site)
        self._state = self._follower.state
        self._lock = self._follower.lock

    @classmethod
    def open(cls, path: Path, signer: Ed25519PrivateKey | None = None, *, site: str = "") -> Self:
        """Open a site's ledger; check its whole chain and the signature of its head.

        Parameters
        ----------
        path : Path
            The SQLite file. With a signer it is created where it is missing.
        signer : Ed25519PrivateKey, optional
            The site's ledger key; None opens read-only.
        site : str
            Name of the site; needed with a signer. Read-only, an empty name accepts any.

        Raises
        ------
        ConsiliumError
            ``privacy.no-ledger``, ``privacy.ledger-write`` (disk full, no permission),
            ``privacy.ledger-corrupt``, ``privacy.ledger-key`` (another key opened it),
            ``privacy.ledger-site`` (another site's); with a signer ``privacy.ledger-rolled-back``
            while the aggregator contradicts it.
        """
        path = Path(path)
        if signer is not None and not site:
            raise ConsiliumError("usage.site", "A ledger is opened for a named site.")
        if signer is not None:
            refuse_conflict(path)
        db = connect_reader(path) if signer is None else connect_writer(path)
        ledger = cls(path, db, signer, site)
        try:
            ledger._start()
        except BaseException:
            db.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file. Everything acknowledged is already on the disk."""
        # A forked child must not touch its parent's connection, not even to close it.
        if self._follower.in_own_process:
            with self._lock:
                self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Appending ---------------------------------------------------------------------------------

    def charge(
        self,
        *,
        study: str,
        round_index: int,
        event: PrivacyEvent,
        clip_norm: float,
        delta: float,
        patients: Sequence[str],
        purpose: Purpose = "training",
        model: ThreatModel = "silo-local",
        guard: Callable[[LedgerState], object] | None = None,
    ) -> Entry:
        """Charge one round to every patient of the cohort; durable when it returns.

        Parameters
        ----------
        study : str
            Digest of the study, 64 hexadecimal digits.
        round_index : int
            Round, from 0.
        event : PrivacyEvent
            What the round does to each patient.
        clip_norm, delta : float
            C of the mechanism and δ of the study, for the record.
        patients : sequence of str
            Keyed hashes of all patients that may be sampled, sampled or not.
        purpose : str
            ``training`` or ``evaluation`` (default: training).
        model : str
            Threat model (default: silo-local).
        guard : callable, optional
            Called with the ledger's state inside the write transaction, after which no other
            process can charge; raises to refuse (a budget check that cannot be overtaken).

        Raises
        ------
        ConsiliumError
            ``privacy.already-charged`` while a charge of this round stands;
            ``privacy.charge-invalid``; ``privacy.ledger-write``; what ``guard`` raises.
        """
        members, cohort = _named(tuple(patients))
        with self._writing() as append:
            if guard is not None:
                guard(self._state)
            before = self._state.charge_of(study, round_index, purpose)
            if before is not None and before.stands:
                raise ConsiliumError(
                    "privacy.already-charged",
                    f"Round {round_index} of study {study[:12]} is already charged "
                    f"(entry {before.entry.sequence}, {before.state}).",
                    where=str(self.path),
                    hint="Return the stored update of that charge, or void it if none was made.",
                )
            if cohort not in self._state.cohorts:
                append("cohort", {"cohort": cohort, "patients": list(members)})
            return append(
                "charge",
                {
                    "study": study,
                    "purpose": purpose,
                    "model": model,
                    "round": round_index,
                    "event": event.to_dict(),
                    "clip_norm": float(clip_norm),
                    "delta": float(delta),
                    "cohort": cohort,
                },
            )

    def release(self, charge: Entry | Charge, update_sha256: str) -> Entry:
        """Record, before anything is sent, which update leaves under a charge.

        Asked again with the same update it returns the entry that stands.

        Raises
        ------
        ConsiliumError
            ``privacy.already-released`` for another update, ``privacy.charge-voided``,
            ``privacy.unknown-charge``, ``privacy.ledger-write``.
        """
        with self._writing() as append:
            found = self._find(charge)
            if found.state == "voided":
                raise self._refused(
                    "privacy.charge-voided", found, "was voided, so no update may leave under it"
                )
            if found.fate is not None:
                if found.update == update_sha256:
                    return found.fate
                raise self._refused(
                    "privacy.already-released", found, "has another update released under it"
                )
            return append("released", {**_reference(found), "update": update_sha256})

    def void(self, charge: Entry | Charge, reason: str) -> Entry:
        """Record that a charge's update provably never left; the charge then counts nothing.

        Asked again it returns the entry that stands.

        Raises
        ------
        ConsiliumError
            ``privacy.charge-released`` when an update was released under it,
            ``privacy.unknown-charge``, ``privacy.ledger-write``.
        """
        with self._writing() as append:
            found = self._find(charge)
            if found.state == "released":
                raise self._refused(
                    "privacy.charge-released", found, "has an update released, so it stands"
                )
            if found.fate is not None:
                return found.fate
            return append("voided", {**_reference(found), "reason": reason})

    def record_policy(self, policy: Mapping[str, Any]) -> Entry | None:
        """Record the site's policy where it differs from the last one; None where it does not."""
        with self._writing() as append:
            if self._state.policy == dict(policy):
                return None
            return append("policy", {"policy": dict(policy)})

    # Reading -----------------------------------------------------------------------------------

    @property
    def state(self) -> LedgerState:
        """What the ledger says now, with what other processes appended meanwhile."""
        self._follower.refresh()
        return self._state

    @property
    def head(self) -> Head:
        """Sequence and hash of the last entry."""
        head = self.state.head
        assert head is not None  # a ledger is opened by its first entry
        return head

    @property
    def public_key(self) -> str:
        """The site's public ledger key as the first entry names it, 64 hexadecimal digits."""
        return self._state.public_key

    def find_charge(
        self, study: str, round_index: int, purpose: Purpose = "training"
    ) -> Charge | None:
        """Return the newest charge of a round with its fate; None where it was never charged."""
        return self.state.charge_of(study, round_index, purpose)

    def events_of(self, patient: str) -> History:
        """Return what one patient (keyed hash) took part in, over all studies, grouped."""
        return self.state.events_of(patient)

    def histories(self, patients: Collection[str] | None = None) -> dict[History, int]:
        """Return how many patients share each history (default: all ever charged)."""
        return self.state.histories(patients)

    def spent(self, delta: float, since: str | None = None) -> Spend:
        """Return the distribution of ε over patients, per study and year, at ``delta``."""
        from consilium_common.ledger.spend import spend

        return spend(self.state, delta, since)

    def entries(self) -> Iterator[Entry]:
        """Yield every entry in order."""
        for line in read_lines(self._db, self.path):
            yield parsed(line, self.path)

    def export_jsonl(self, path: Path) -> Head:
        """Write every entry, each followed by its witness record, as lines of canonical JSON.

        The file is durable when this returns the head written.
        """
        with self._lock:
            lines = list(read_export(self._db, self.path))
        write_atomic(path, b"".join(line + b"\n" for line in lines))
        return next(
            parsed(line, self.path).head for line in reversed(lines) if not is_witness_line(line)
        )

    # Witnessing --------------------------------------------------------------------------------

    @property
    def witnessed(self) -> Head | None:
        """The entry that the aggregator witnessed last; None where it has witnessed none."""
        return last_witnessed(self._db, self._follower)

    def from_entry(self, first: int, limit: int) -> list[Entry]:
        """Return at most ``limit`` entries from sequence ``first`` on."""
        self._follower.refresh()
        return self._follower.entries(first, limit)

    def add_witness(
        self, records: Sequence[WitnessRecord], witness_key: Ed25519PublicKey
    ) -> Head | None:
        """Keep witness records of our entries, durably; return the entry witnessed last.

        Those kept before are not kept twice; the others continue where these end.

        Raises
        ------
        ConsiliumError
            ``privacy.witness-invalid`` when a record is not signed by the witness, not of this
            ledger's entry, or does not follow the one before; ``privacy.ledger-write``. Nothing is
            kept then.
        """
        self._writer()  # raises where the ledger is open for reading only
        return keep_records(self._db, self._follower, records, witness_key)

    def change_counter(self) -> int:
        """Return a number that changes when another connection has appended; cheap to ask."""
        with self._lock, sqlite_errors(self.path, writing=False):
            self._follower.require_own_process()
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    # Inside ------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._appender is not None:
            self._appender.begin()
        self._follower.refresh()
        last_witnessed(self._db, self._follower)  # raises where the witness saw another ledger
        if self._state.head is None:
            raise corrupt(self.path, "it has no first entry")
        if self.site and self._state.site != self.site:
            raise ConsiliumError(
                "privacy.ledger-site",
                f"The ledger belongs to the site {self._state.site}, not to {self.site}.",
                where=str(self.path),
                hint="Use the ledger of this site; ledgers are never shared or renamed.",
            )
        self.site = self._state.site
        if self._appender is not None and self._appender.public_key != self._state.public_key:
            raise ConsiliumError(
                "privacy.ledger-key",
                "The ledger was opened with another signing key.",
                where=str(self.path),
                hint="Restore the site's ledger key from its backup.",
            )

    def _writing(self) -> AbstractContextManager[Append]:
        """One write transaction; the function it yields appends to it."""
        return self._writer().transaction()

    def _writer(self) -> Appender:
        if self._appender is None:
            raise ConsiliumError(
                "privacy.ledger-read-only",
                "The ledger is open for reading only.",
                where=str(self.path),
            )
        return self._appender

    def _find(self, charge: Entry | Charge) -> Charge:
        entry = charge.entry if isinstance(charge, Charge) else charge
        found = self._state.charges.get(entry.sequence)
        if found is None or found.entry.hash != entry.hash:
            raise ConsiliumError(
                "privacy.unknown-charge",
                f"Entry {entry.sequence} is no charge of this ledger.",
                where=str(self.path),
                hint="Look the charge up by its study and round.",
            )
        return found

    def _refused(self, code: str, charge: Charge, what: str) -> ConsiliumError:
        return ConsiliumError(
            code,
            f"The charge of round {charge.round_index} of study {charge.study[:12]} "
            f"(entry {charge.entry.sequence}) {what}.",
            where=str(self.path),
            hint="Send the update that was released first, or charge the round anew.",
        )


@functools.lru_cache(maxsize=8)  # a study charges the same cohort every round
def _named(patients: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    members = sorted(set(patients))
    return tuple(members), cohort_digest(members)


def _reference(charge: Charge) -> dict[str, Any]:
    return {"charge": charge.entry.sequence, "charge_hash": charge.entry.hash}
