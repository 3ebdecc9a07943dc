"""When each account of a site ends: what came later the other account cannot hold.

A site's evidence and the aggregator's records are taken at two moments, and a study may run
meanwhile. What only the later one holds, and dates after the end of the earlier one, says nothing
about honesty: it is counted, named and not compared. Everything else is compared. Where an account
does not say when it was taken, all is compared.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from consilium_common.report.wording import moment, plural

if TYPE_CHECKING:
    from consilium_common.audit.documents import Records
    from consilium_common.audit.receipts import Receipt

Kind = Literal["received", "attested", "released", "unattested", "attestation"]

_WHAT: Final[dict[Kind, tuple[str, str]]] = {
    "received": ("thing", "that the aggregator received"),
    "attested": ("entry", "of the ledger that the aggregator attested"),
    "released": ("thing", "that the site released"),
    "unattested": ("entry", "that the site wrote into its ledger"),
    "attestation": ("attestation", "that the ledger holds"),
}
_EVIDENCE: Final = ("the site's evidence was taken", "Newer evidence")
_RECORDS: Final = ("the aggregator's records were written", "Newer records")
#: The account that ended too early to hold it.
_ENDED: Final[dict[Kind, tuple[str, str]]] = {
    "received": _EVIDENCE,
    "attested": _EVIDENCE,
    "released": _RECORDS,
    "unattested": _RECORDS,
    "attestation": _RECORDS,
}


@dataclass(frozen=True)
class Ends:
    """Up to when each account is complete; None where it does not say when it was taken.

    ``ledger`` and ``receipts`` by the site's clock, ``records`` by the aggregator's.
    """

    ledger: datetime | None = None
    receipts: datetime | None = None
    records: datetime | None = None

    @classmethod
    def of(
        cls,
        latest: str,
        taken: str | None,
        receipts: Sequence[Receipt] | None,
        records: Records | None,
    ) -> Ends:
        """Return the ends of a site's evidence and of the aggregator's records.

        Parameters
        ----------
        latest : str
            Time of the ledger's newest entry.
        taken : str or None
            When the evidence says it was taken.
        """
        return cls(
            ledger=_end(taken, [latest]),
            receipts=_end(taken, [one.time for one in receipts or ()]),
            records=None if records is None else _end(records.written_at, _times(records)),
        )


@dataclass(frozen=True)
class NotCompared:
    """Things that date after the other account's end: how many, from when to when, and the end."""

    kind: Kind
    number: int
    first: datetime
    last: datetime
    end: datetime

    @property
    def message(self) -> str:
        """What was not compared, why, and what would settle it."""
        noun, rest = _WHAT[self.kind]
        ended, newer = _ENDED[self.kind]
        when = moment(self.first)
        if moment(self.last) != when:
            when = f"{when} to {moment(self.last)}"
        return (
            f"{plural(self.number, noun)} {rest} ({when}) after {ended}, by its own word"
            f" {moment(self.end)}. {newer} would show whether both sides agree on that."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "kind": self.kind,
            "number": self.number,
            "first": self.first.isoformat(),
            "last": self.last.isoformat(),
            "end": self.end.isoformat(),
            "message": self.message,
        }


@dataclass
class Later:
    """Gathers what is set aside while two accounts are compared."""

    _found: dict[tuple[Kind, datetime], dict[Hashable, datetime]] = field(default_factory=dict)

    def holds(self, kind: Kind, key: Hashable, time: str, end: datetime | None) -> bool:
        """Whether something dates after ``end``; it is set aside then, under ``key`` once."""
        at = _moment(time)
        if at is None or end is None or at <= end:
            return False
        self._found.setdefault((kind, end), {})[key] = at
        return True

    def set_aside(self) -> tuple[NotCompared, ...]:
        """Return all that was set aside."""
        return tuple(
            NotCompared(kind, len(times), min(times.values()), max(times.values()), end)
            for (kind, end), times in self._found.items()
        )


def _end(stated: str | None, held: Iterable[str]) -> datetime | None:
    """Return when an account ends: never before the newest thing that it holds itself."""
    said = None if stated is None else _moment(stated)
    if said is None:
        return None
    return max([said, *(at for time in held if (at := _moment(time)) is not None)])


def _times(records: Records) -> list[str]:
    return [one.time for one in records.received] + [one.time for one in records.witnessed]


def _moment(time: str) -> datetime | None:
    """Read an ISO time that names its zone; None for anything else, which is then compared."""
    try:
        found = datetime.fromisoformat(time)
    except ValueError:
        return None
    return None if found.tzinfo is None else found.astimezone(UTC)
