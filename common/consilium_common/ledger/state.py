"""What a chain of entries means: cohorts, charges and their fate, events of every patient.

The store and the offline verifier read entries through this one place, so they cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from consilium_common.ledger.entries import Entry, Head, Purpose, ThreatModel
from consilium_common.privacy.events import History, PrivacyEvent, grouped

ChargeState = Literal["open", "released", "voided"]


class RuleBrokenError(ValueError):
    """An entry that says what a ledger may not say; the message names the rule."""


@dataclass(frozen=True)
class Charge:
    """One charged round and what became of it.

    ``state`` is ``open`` (charged, nothing has left), ``released`` (``update`` is the SHA-256 of
    what left or may leave) or ``voided`` (counts nothing). ``fate`` is the entry that decided it.
    ``time`` is the latest time that the ledger names up to this charge: a clock set back never
    makes a charge older than what came before it.
    """

    entry: Entry
    time: str
    study: str
    purpose: Purpose
    model: ThreatModel
    round_index: int
    event: PrivacyEvent
    clip_norm: float
    delta: float
    cohort: str
    state: ChargeState = "open"
    update: str | None = None
    fate: Entry | None = None

    @property
    def stands(self) -> bool:
        """Whether the charge counts against its patients."""
        return self.state != "voided"


@dataclass
class LedgerState:
    """The meaning of the entries read so far. ``apply`` them in order; nothing is ever removed."""

    site: str = ""
    public_key: str = ""
    head: Head | None = None
    policy: Mapping[str, Any] | None = None
    cohorts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: By sequence of the charge's entry.
    charges: dict[int, Charge] = field(default_factory=dict)
    #: Sequence of the newest charge of a (study, purpose, round).
    rounds: dict[tuple[str, Purpose, int], int] = field(default_factory=dict)
    #: The latest time of any entry so far.
    latest: str = ""

    def apply(self, entry: Entry) -> None:
        """Take in the next entry, whose form, chain and signature the caller has checked.

        Raises
        ------
        RuleBrokenError
            The entry contradicts the ones before; the state is as it was.
        """
        if (entry.kind == "opened") != (self.head is None):
            raise RuleBrokenError("the first entry, and no other, opens the ledger")
        if self.head is not None and entry.site != self.site:
            raise RuleBrokenError("it belongs to another site")
        match entry.kind:
            case "opened":
                self.site = entry.site
                self.public_key = entry.body["public_key"]
            case "cohort":
                if entry.body["cohort"] in self.cohorts:
                    raise RuleBrokenError("its cohort was recorded before")
                self.cohorts[entry.body["cohort"]] = tuple(entry.body["patients"])
            case "charge":
                self._charge(entry)
            case "released":
                charge = self._open_charge(entry)
                self.charges[charge.entry.sequence] = replace(
                    charge, state="released", update=entry.body["update"], fate=entry
                )
            case "voided":
                charge = self._open_charge(entry)
                self.charges[charge.entry.sequence] = replace(charge, state="voided", fate=entry)
            case "policy":
                self.policy = entry.body["policy"]
        self.head = entry.head
        self.latest = max(self.latest, entry.time)

    def _charge(self, entry: Entry) -> None:
        body = entry.body
        if body["cohort"] not in self.cohorts:
            raise RuleBrokenError("its cohort was not recorded before")
        key = (body["study"], body["purpose"], body["round"])
        before = self.charge_of(body["study"], body["round"], body["purpose"])
        if before is not None and before.stands:
            raise RuleBrokenError(
                f"this round was charged in entry {before.entry.sequence}, which stands"
            )
        self.charges[entry.sequence] = Charge(
            entry=entry,
            time=max(self.latest, entry.time),
            study=body["study"],
            purpose=body["purpose"],
            model=body["model"],
            round_index=body["round"],
            event=PrivacyEvent.from_dict(body["event"]),
            clip_norm=float(body["clip_norm"]),
            delta=float(body["delta"]),
            cohort=body["cohort"],
        )
        self.rounds[key] = entry.sequence

    def _open_charge(self, entry: Entry) -> Charge:
        charge = self.charges.get(entry.body["charge"])
        if charge is None or charge.entry.hash != entry.body["charge_hash"]:
            raise RuleBrokenError("it names a charge that is not in this ledger")
        if charge.state != "open":
            raise RuleBrokenError(f"its charge, entry {charge.entry.sequence}, is {charge.state}")
        return charge

    def charge_of(
        self, study: str, round_index: int, purpose: Purpose = "training"
    ) -> Charge | None:
        """Return the newest charge of a round, standing or voided."""
        sequence = self.rounds.get((study, purpose, round_index))
        return None if sequence is None else self.charges[sequence]

    def standing(
        self, study: str | None = None, *, since: str | None = None, until: str | None = None
    ) -> list[Charge]:
        """Return the charges that count, in order.

        Parameters
        ----------
        study : str, optional
            Those of this study alone.
        since, until : str, optional
            Those whose ``time`` is in [since, until); times in the ledger's own form.
        """
        return [
            charge
            for charge in self.charges.values()
            if charge.stands
            and (study is None or charge.study == study)
            and (since is None or charge.time >= since)
            and (until is None or charge.time < until)
        ]

    def studies(self) -> list[str]:
        """Return the digests of all studies with a standing charge, in order of first charge."""
        return list(dict.fromkeys(c.study for c in self.standing()))

    def years(self) -> list[int]:
        """Return the calendar years (UTC) with a standing charge, in order."""
        return sorted({int(charge.time[:4]) for charge in self.standing()})

    def charges_of(
        self,
        patient: str,
        study: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> list[Charge]:
        """Return the standing charges of one patient, in order; arguments as :meth:`standing`."""
        inside = {digest for digest, members in self.cohorts.items() if patient in members}
        return [c for c in self.standing(study, since=since, until=until) if c.cohort in inside]

    def events_of(
        self,
        patient: str,
        study: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> History:
        """Return one patient's standing events, grouped; empty for a patient never charged."""
        return grouped(c.event for c in self.charges_of(patient, study, since, until))

    def histories(
        self,
        patients: Collection[str] | None = None,
        *,
        study: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> dict[History, int]:
        """Return how many patients share each history.

        Parameters
        ----------
        patients : collection of str, optional
            Count these; those with no such charge have the empty history (default: every patient
            with one).
        study, since, until : str, optional
            Which charges count, as :meth:`standing`.
        """
        charges = self.standing(study, since=since, until=until)
        members = self._memberships(charges)
        history = _history_of_cohorts(charges)
        if patients is None:
            sets = Counter(members.values())
        else:
            sets = Counter(members.get(patient, frozenset()) for patient in patients)
        counts: dict[History, int] = {}
        for cohorts, number in sets.items():
            events = history(cohorts)
            counts[events] = counts.get(events, 0) + number
        return counts

    def _memberships(self, charges: list[Charge]) -> dict[str, frozenset[str]]:
        """Return for each charged patient the set of charged cohorts with that patient in it."""
        memberships: dict[str, frozenset[str]] = {}
        interned: dict[frozenset[str], frozenset[str]] = {}
        for digest in dict.fromkeys(c.cohort for c in charges):
            added: dict[frozenset[str], frozenset[str]] = {}
            for patient in self.cohorts[digest]:
                before = memberships.get(patient, frozenset())
                if before not in added:
                    after = before | {digest}
                    added[before] = interned.setdefault(after, after)
                memberships[patient] = added[before]
        return memberships


def _history_of_cohorts(charges: list[Charge]) -> Callable[[frozenset[str]], History]:
    events: dict[str, list[PrivacyEvent]] = {}
    for charge in charges:
        events.setdefault(charge.cohort, []).append(charge.event)
    per_cohort = {digest: grouped(listed) for digest, listed in events.items()}

    def history(cohorts: frozenset[str]) -> History:
        return grouped(event for digest in cohorts for event in per_cohort[digest])

    return history


def year_bounds(year: int) -> tuple[str, str]:
    """Return ``since`` and ``until`` of a calendar year (UTC) in the ledger's form of time."""
    return f"{year:04d}-01-01T00:00:00.000000Z", f"{year + 1:04d}-01-01T00:00:00.000000Z"
