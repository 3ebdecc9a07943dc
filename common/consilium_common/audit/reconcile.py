"""Does what left agree with the ledger: every difference, in each direction, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from consilium_common.audit.documents import Egress, Records, Update
from consilium_common.audit.ends import Ends, Later, NotCompared
from consilium_common.audit.receipts import Receipt
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.witness import WitnessRecord

if TYPE_CHECKING:
    from consilium_common.study.schema import Study


_WHAT: Final = {"training": "an update", "evaluation": "an evaluation", "statistics": "statistics"}


@dataclass(frozen=True)
class Difference:
    """One thing that one side has and the other has not.

    ``serious`` says that honest parties' records never differ so, whatever was lost on the way.
    """

    code: str
    message: str
    serious: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Reconciliation:
    """What left, by the ledger, the site's store, its receipts and the aggregator's records.

    ``stored``, ``receipted`` and ``received`` are None where those were not handed over;
    ``bytes_out`` is by the receipts, or by the site's list where there are none.
    ``without_privacy`` counts what left for studies without differential privacy, which no ledger
    entry covers.
    """

    released: int
    stored: int | None
    receipted: int | None
    received: int | None
    without_privacy: int
    bytes_out: int | None
    differences: tuple[Difference, ...]
    #: What dates after the end of the account that lacks it.
    not_compared: tuple[NotCompared, ...] = ()

    @property
    def serious(self) -> tuple[Difference, ...]:
        """The differences that honest records cannot have."""
        return tuple(one for one in self.differences if one.serious)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **self.__dict__,
            "differences": [one.to_dict() for one in self.differences],
            "not_compared": [one.to_dict() for one in self.not_compared],
        }


def released_updates(state: LedgerState) -> set[Update]:
    """Return everything that the ledger released."""
    return set(_release_times(state))


def _release_times(state: LedgerState) -> dict[Update, str]:
    return {
        Update(charge.study, charge.purpose, charge.round_index, charge.update): charge.fate.time
        for charge in state.charges.values()
        if charge.update is not None and charge.fate is not None
    }


def reconcile(
    state: LedgerState,
    *,
    egress: Egress | None = None,
    receipts: Sequence[Receipt] | None = None,
    records: Records | None = None,
    studies: Mapping[str, Study] | None = None,
    entries: Sequence[tuple[str, str]] = (),
    taken: str | None = None,
) -> Reconciliation:
    """Compare a verified ledger's releases with what was stored to leave and what arrived.

    Evidence and records are taken at two moments. What dates after the end of the account that
    lacks it is not compared but named; whatever that account could have held is compared.

    Parameters
    ----------
    state : LedgerState
        Of a verified ledger.
    egress, records : optional
        The site's list, and the aggregator's.
    receipts : sequence of Receipt, optional
        The site's egress receipts, their chain checked.
    studies : mapping, optional
        Documents by digest: one without privacy needs no entry in the ledger.
    entries : sequence of (str, str), optional
        Hash and time of every entry of the ledger, in order: with records they are held against
        the heads that the aggregator attested.
    taken : str, optional
        When the evidence says it was taken; without it the ledger is held to all of the records.
    """
    ends, later = Ends.of(state.latest, taken, receipts, records), Later()
    open_studies = {
        digest for digest, study in (studies or {}).items() if study.privacy.mode == "none"
    }
    released = released_updates(state)
    differences: list[Difference] = []
    stored: set[Update] | None = None
    received: set[Update] | None = None
    uncovered: set[Update] = set()
    receipted = None if receipts is None else {one.release.update for one in receipts}
    if receipts is not None:
        uncovered |= {one for one in receipted or () if one.study in open_studies}
        differences += receipt_differences(
            state,
            receipts,
            egress=egress,
            records=records,
            open_studies=open_studies,
            ends=ends,
            later=later,
        )
    if egress is not None:
        stored = {one.update for one in egress.released}
        uncovered |= {one for one in stored if one.study in open_studies}
        waiting = {
            (charge.study, charge.purpose, charge.round_index)
            for charge in state.charges.values()
            if charge.state == "open"
        }
        differences += [
            _stored(one, charged=one[:3] in waiting)
            for one in sorted(stored - released - uncovered)
        ]
        differences += [
            Difference(
                "released-not-stored",
                f"The ledger released {_named(one)}, and the site's store does not have it.",
                serious=True,
            )
            for one in sorted(released - stored)
        ]
    if records is not None:
        if entries:
            differences[:0] = _witness_differences(entries, records.witnessed, ends, later)
        times = {one.update: one.time for one in reversed(records.received)}  # the earliest
        received = set(times)
        uncovered |= {one for one in received if one.study in open_studies}
        decided = {one[:3] for one in released}
        differences += [
            Difference(
                "received-without-release",
                f"The aggregator received {_named(one)}, and the ledger released no such thing.",
                serious=True,
            )
            for one in sorted(received - released - uncovered)
            # A round that is released stays so: other bytes for it differ whenever they came.
            if one[:3] in decided or not later.holds("received", one, times[one], ends.ledger)
        ]
        answered = {one[:3] for one in received}
        left = _release_times(state)
        differences += [
            _not_received(one, receipted)
            for one in sorted(released - received)
            if one[:3] in answered or not later.holds("released", one, left[one], ends.records)
        ]
    return Reconciliation(
        released=len(released),
        stored=None if stored is None else len(stored),
        receipted=None if receipted is None else len(receipted),
        received=None if received is None else len(received),
        without_privacy=len(uncovered),
        bytes_out=_bytes_out(egress, receipts),
        differences=tuple(differences),
        not_compared=later.set_aside(),
    )


def receipt_differences(
    state: LedgerState,
    receipts: Sequence[Receipt],
    *,
    egress: Egress | None,
    records: Records | None,
    open_studies: Collection[str],
    ends: Ends,
    later: Later,
) -> list[Difference]:
    """Compare egress receipts with the ledger, the site's store and the aggregator's records.

    Parameters
    ----------
    open_studies : collection of str
        Digests of studies without privacy, as far as their documents are at hand.
    ends, later
        When each account ends; what dates after that is gathered, and is no difference.
    """
    found = [
        Difference("receipt-without-charge", f"{_receipt(one)} {problem}.", serious=True)
        for one in receipts
        if (problem := _unpaid(state, one, open_studies))
    ]
    by_round = {one.release.update[:3]: one for one in receipts}
    # A site that is older than receipts has released before its first one.
    began = receipts[0].time if receipts else ""
    if egress is not None:
        stored = {one.update[:3]: one for one in egress.released}
        for one in receipts:
            kept = stored.get(one.release.update[:3])
            if kept is None or (kept.sha256, kept.bytes) != (one.release.sha256, one.release.bytes):
                has = "does not have it" if kept is None else "has something else for that round"
                found.append(
                    Difference(
                        "receipt-not-stored",
                        f"{_receipt(one)} is in no store: the site {has}.",
                        serious=True,
                    )
                )
    if records is None:
        return found
    arrived = set()
    for came in records.received:
        arrived.add(came.update)
        receipt = by_round.get(came.update[:3])
        if receipt is None and later.holds("received", came.update, came.time, ends.receipts):
            continue
        if receipt is None:
            early = not began or came.time < began
            words = "before its first receipt" if early else "and the site has no receipt of it"
            found.append(
                Difference(
                    "received-before-receipts" if early else "received-without-receipt",
                    f"The aggregator received {_named(came.update)}, {words}.",
                    serious=not early,
                )
            )
        elif (receipt.release.sha256, receipt.release.bytes) != (came.sha256, came.bytes):
            found.append(
                Difference(
                    "received-other-than-receipt",
                    f"The aggregator received {_named(came.update)}, {came.bytes} bytes, and "
                    f"{_receipt(receipt)} is of SHA-256 {receipt.release.sha256[:12]}, "
                    f"{receipt.release.bytes} bytes.",
                    serious=True,
                )
            )
    released = released_updates(state)
    found += [
        # What the ledger released too is named there, with the receipt.
        Difference(
            "receipt-not-received",
            f"{_receipt(one)} left, and the aggregator did not accept it: late, lost or refused.",
            serious=False,
        )
        for one in receipts
        if one.release.update not in arrived | released
        and not later.holds("released", one.release.update, one.time, ends.records)
    ]
    return found


def _unpaid(state: LedgerState, receipt: Receipt, open_studies: Collection[str]) -> str:
    """Return what the ledger lacks to cover a receipt; empty when it covers it."""
    release = receipt.release
    if release.event is None:
        return "" if release.study in open_studies else "names no charge"
    charge = state.charges.get(release.event.sequence)
    if charge is None or charge.entry.hash != release.event.hash:
        return f"names entry {release.event.sequence} as its charge, and the ledger has no such one"
    if (charge.study, charge.purpose, charge.round_index) != release.update[:3]:
        return f"names entry {release.event.sequence}, the charge of something else"
    if charge.update != release.sha256:
        return f"is not what entry {release.event.sequence} was released for"
    return ""


def _not_received(update: Update, receipted: set[Update] | None) -> Difference:
    how = "late, lost or refused"
    if receipted is not None:
        sent = update in receipted
        how = (
            "it was sent, by its receipt, and was late, lost or refused"
            if sent
            else ("it has no receipt, so it was not sent")
        )
    return Difference(
        "released-not-received",
        f"The ledger released {_named(update)}, and the aggregator did not accept it: {how}. "
        "It is paid for all the same.",
        serious=False,
    )


def _bytes_out(egress: Egress | None, receipts: Sequence[Receipt] | None) -> int | None:
    if receipts is not None:
        return sum(one.release.bytes for one in receipts)
    return None if egress is None else sum(one.bytes for one in egress.released)


def _receipt(receipt: Receipt) -> str:
    return f"Receipt {receipt.sequence}, of {_named(receipt.release.update)},"


def _witness_differences(
    entries: Sequence[tuple[str, str]],
    witnessed: Iterable[WitnessRecord],
    ends: Ends,
    later: Later,
) -> list[Difference]:
    """Compare the heads that the aggregator attested with a ledger's entries.

    Parameters
    ----------
    entries : sequence of (str, str)
        Hash and time of every entry of the ledger, in order.
    witnessed : iterable of WitnessRecord
        Attested heads, their signatures checked.
    """
    found: list[Difference] = []
    last, newest = len(entries) - 1, -1
    for record in sorted(witnessed, key=lambda one: one.head.sequence):
        sequence, hash_ = record.head.sequence, record.head.hash
        newest = max(newest, sequence)
        if sequence > last:
            if later.holds("attested", sequence, record.time, ends.ledger):
                continue
            found.append(
                Difference(
                    "entry-cut-off",
                    f"The aggregator saw entry {sequence} ({hash_[:12]}), and the ledger ends "
                    f"with entry {last}: entries were cut off.",
                    serious=True,
                )
            )
        elif entries[sequence][0] != hash_:
            found.append(
                Difference(
                    "entry-rewritten",
                    f"Entry {sequence} is {entries[sequence][0][:12]} in the ledger, and the "
                    f"aggregator saw {hash_[:12]}: history was rewritten.",
                    serious=True,
                )
            )
    unattested = [
        sequence
        for sequence in range(newest + 1, last + 1)
        if not later.holds("unattested", sequence, entries[sequence][1], ends.records)
    ]
    if unattested:
        first, last = unattested[0], unattested[-1]
        which = f"entry {last}" if first == last else f"entries {first} to {last}"
        found.append(
            Difference(
                "not-witnessed",
                f"The aggregator has not attested {which} of the ledger.",
                serious=False,
            )
        )
    return found


def _stored(update: Update, *, charged: bool) -> Difference:
    if charged:
        return Difference(
            "stored-not-released",
            f"The site stored {_named(update)}, under a charge that stands, and never released it: "
            "it was stopped in between. It is paid for, and was not to be sent.",
            serious=False,
        )
    return Difference(
        "stored-without-release",
        f"The site stored {_named(update)} to send, and its ledger released no such thing.",
        serious=True,
    )


def _named(update: Update) -> str:
    return (
        f"{_WHAT[update.purpose]} of study {update.study[:12]}, round {update.round}, "
        f"SHA-256 {update.sha256[:12]}"
    )
