"""Does what left agree with the ledger: every difference, in each direction, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from consilium_common.audit.documents import Egress, Records, Update
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
    """What left, by the ledger, by the site's store and by the aggregator's records.

    ``stored`` and ``received`` are None where those were not handed over. ``without_privacy``
    counts what left for studies without differential privacy, which no ledger entry covers.
    """

    released: int
    stored: int | None
    received: int | None
    without_privacy: int
    bytes_out: int | None
    differences: tuple[Difference, ...]

    @property
    def serious(self) -> tuple[Difference, ...]:
        """The differences that honest records cannot have."""
        return tuple(one for one in self.differences if one.serious)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.__dict__, "differences": [one.to_dict() for one in self.differences]}


def released_updates(state: LedgerState) -> set[Update]:
    """Return everything that the ledger released."""
    return {
        Update(charge.study, charge.purpose, charge.round_index, charge.update)
        for charge in state.charges.values()
        if charge.update is not None
    }


def reconcile(
    state: LedgerState,
    *,
    egress: Egress | None = None,
    records: Records | None = None,
    studies: Mapping[str, Study] | None = None,
) -> Reconciliation:
    """Compare a verified ledger's releases with what was stored to leave and what arrived.

    Parameters
    ----------
    state : LedgerState
        Of a verified ledger.
    egress, records : optional
        The site's list, and the aggregator's.
    studies : mapping, optional
        Documents by digest: one without privacy needs no entry in the ledger.
    """
    open_studies = {
        digest for digest, study in (studies or {}).items() if study.privacy.mode == "none"
    }
    released = released_updates(state)
    differences: list[Difference] = []
    stored: set[Update] | None = None
    received: set[Update] | None = None
    uncovered: set[Update] = set()
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
        received = {one.update for one in records.received}
        uncovered |= {one for one in received if one.study in open_studies}
        differences += [
            Difference(
                "received-without-release",
                f"The aggregator received {_named(one)}, and the ledger released no such thing.",
                serious=True,
            )
            for one in sorted(received - released - uncovered)
        ]
        differences += [
            Difference(
                "released-not-received",
                f"The ledger released {_named(one)}, and the aggregator did not accept it: "
                "late, lost or refused. It is paid for all the same.",
                serious=False,
            )
            for one in sorted(released - received)
        ]
    return Reconciliation(
        released=len(released),
        stored=None if stored is None else len(stored),
        received=None if received is None else len(received),
        without_privacy=len(uncovered),
        bytes_out=None if egress is None else sum(one.bytes for one in egress.released),
        differences=tuple(differences),
    )


def witness_differences(
    hashes: Sequence[str], witnessed: Iterable[WitnessRecord]
) -> list[Difference]:
    """Compare the heads that the aggregator attested with a ledger's entries.

    Parameters
    ----------
    hashes : sequence of str
        Hash of every entry of the ledger, in order.
    witnessed : iterable of WitnessRecord
        Attested heads, their signatures checked.
    """
    found: list[Difference] = []
    last, newest = len(hashes) - 1, -1
    for record in sorted(witnessed, key=lambda one: one.head.sequence):
        sequence, hash_ = record.head.sequence, record.head.hash
        newest = max(newest, sequence)
        if sequence > last:
            found.append(
                Difference(
                    "entry-cut-off",
                    f"The aggregator saw entry {sequence} ({hash_[:12]}), and the ledger ends "
                    f"with entry {last}: entries were cut off.",
                    serious=True,
                )
            )
        elif hashes[sequence] != hash_:
            found.append(
                Difference(
                    "entry-rewritten",
                    f"Entry {sequence} is {hashes[sequence][:12]} in the ledger, and the "
                    f"aggregator saw {hash_[:12]}: history was rewritten.",
                    serious=True,
                )
            )
    if newest < last:
        entries = f"entry {last}" if newest + 1 == last else f"entries {newest + 1} to {last}"
        found.append(
            Difference(
                "not-witnessed",
                f"The aggregator has not attested {entries} of the ledger.",
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
