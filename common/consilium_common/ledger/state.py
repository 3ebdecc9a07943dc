"""What a chain of entries means: cohorts, charges and their fate, events of every patient.

The store and the offline verifier read entries through this one place, so they cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from consilium_common.ledger.entries import Entry, Head
from consilium_common.privacy.events import History, PrivacyEvent, grouped

ChargeState = Literal["open", "released", "voided"]


class RuleBrokenError(ValueError):
    """An entry that says what a ledger may not say; the message names the rule."""


@dataclass(frozen=True)
class Charge:
    """One charged round and what became of it.

    ``state`` is ``open`` (charged, nothing has left), ``released`` (``update`` is the SHA-256 of
    what left or may leave) or ``voided`` (counts nothing). ``fate`` is the entry that decided it.
    """

    entry: Entry
    study: str
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
    #: Sequence of the newest charge of a (study, round).
    rounds: dict[tuple[str, int], int] = field(default_factory=dict)

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

    def _charge(self, entry: Entry) -> None:
        body = entry.body
        if body["cohort"] not in self.cohorts:
            raise RuleBrokenError("its cohort was not recorded before")
        key = (body["study"], body["round"])
        if (before := self.charge_of(*key)) is not None and before.stands:
            raise RuleBrokenError(
                f"this round was charged in entry {before.entry.sequence}, which stands"
            )
        self.charges[entry.sequence] = Charge(
            entry=entry,
            study=body["study"],
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

    def charge_of(self, study: str, round_index: int) -> Charge | None:
        """Return the newest charge of a round, standing or voided."""
        sequence = self.rounds.get((study, round_index))
        return None if sequence is None else self.charges[sequence]

    def standing(self, study: str | None = None) -> list[Charge]:
        """Return the charges that count, in order; of one study where it is given."""
        return [
            c for c in self.charges.values() if c.stands and (study is None or c.study == study)
        ]

    def studies(self) -> list[str]:
        """Return the digests of all studies with a standing charge, in order of first charge."""
        return list(dict.fromkeys(c.study for c in self.standing()))

    def events_of(self, patient: str, study: str | None = None) -> History:
        """Return one patient's standing events, grouped; empty for a patient never charged."""
        inside = {digest for digest, members in self.cohorts.items() if patient in members}
        return grouped(c.event for c in self.standing(study) if c.cohort in inside)

    def histories(
        self, patients: Collection[str] | None = None, *, study: str | None = None
    ) -> dict[History, int]:
        """Return how many patients share each history.

        Parameters
        ----------
        patients : collection of str, optional
            Count these; those never charged have the empty history (default: every patient with
            a standing charge).
        study : str, optional
            Look at this study's charges alone.
        """
        members = self._memberships(study)
        history = self._history_of_cohorts(study)
        if patients is None:
            sets = Counter(members.values())
        else:
            sets = Counter(members.get(patient, frozenset()) for patient in patients)
        counts: dict[History, int] = {}
        for cohorts, number in sets.items():
            events = history(cohorts)
            counts[events] = counts.get(events, 0) + number
        return counts

    def _memberships(self, study: str | None) -> dict[str, frozenset[str]]:
        """Return for each charged patient the set of charged cohorts with that patient in it."""
        memberships: dict[str, frozenset[str]] = {}
        interned: dict[frozenset[str], frozenset[str]] = {}
        for digest in dict.fromkeys(c.cohort for c in self.standing(study)):
            added: dict[frozenset[str], frozenset[str]] = {}
            for patient in self.cohorts[digest]:
                before = memberships.get(patient, frozenset())
                if before not in added:
                    after = before | {digest}
                    added[before] = interned.setdefault(after, after)
                memberships[patient] = added[before]
        return memberships

    def _history_of_cohorts(self, study: str | None) -> Callable[[frozenset[str]], History]:
        events: dict[str, list[PrivacyEvent]] = {}
        for charge in self.standing(study):
            events.setdefault(charge.cohort, []).append(charge.event)
        per_cohort = {digest: grouped(listed) for digest, listed in events.items()}

        def history(cohorts: frozenset[str]) -> History:
            return grouped(event for digest in cohorts for event in per_cohort[digest])

        return history
