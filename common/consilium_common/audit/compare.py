"""Two accounts of one site's history: what one has and the other has not, line by line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilium_common.audit.documents import Records
from consilium_common.audit.ends import Ends, Later, NotCompared
from consilium_common.audit.evidence import Evidence
from consilium_common.audit.ledger_report import Audited, audited
from consilium_common.audit.reconcile import Difference, reconcile
from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import public_fingerprint
from consilium_common.ledger.witness import WitnessRecord
from consilium_common.report.wording import plural

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Comparison:
    """Both accounts by name, the site, every difference, and what could not be compared."""

    a: str
    b: str
    site: str
    differences: tuple[Difference, ...]
    not_compared: tuple[NotCompared, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both say the same, as far as both can know."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for ``--json``."""
        return {
            "a": self.a,
            "b": self.b,
            "site": self.site,
            "same": self.same,
            "differences": [one.to_dict() for one in self.differences],
            "not_compared": [one.to_dict() for one in self.not_compared],
        }

    def print_to(self, console: Console) -> None:
        """Print a line for each difference."""
        console.print(f"A {self.a}\nB {self.b}\nsite {self.site}", markup=False)
        for one in self.differences:
            console.print(f"{'!' if one.serious else '·'} {one.message}", markup=False)
        for left in self.not_compared:
            console.print(f"– Not compared: {left.message}", markup=False)
        if self.same:
            words = "No difference in what was compared." if self.not_compared else "No difference."
            console.print(words, style="bold green", markup=False)
            return
        serious = sum(one.serious for one in self.differences)
        console.print(
            f"{plural(len(self.differences), 'difference')}, {serious} of them (!) of a kind that "
            "honest records never have.",
            markup=False,
        )


def compare_ledgers(a: Evidence, b: Evidence) -> Comparison:
    """Verify two ledgers of one site and compare their entries and attested heads.

    Raises
    ------
    ConsiliumError
        ``privacy.ledger-broken`` when either does not verify; ``usage.compare`` for ledgers of
        two sites.
    """
    first, second = audited(a), audited(b)
    site = _one_site(first.state.site, second.state.site, b.where)
    found: list[Difference] = []
    if public_fingerprint(a.key) != public_fingerprint(b.key):
        found.append(Difference("key-differs", "A and B are signed by different keys.", True))
    found += _entries(first, second)
    found += _attested(first.witnessed, second.witnessed, "A", "B")
    found += _attested(second.witnessed, first.witnessed, "B", "A")
    return Comparison(a.where, b.where, site, tuple(found))


def compare_records(ledger: Evidence, records: Records) -> Comparison:
    """Verify a ledger and compare it with the aggregator's records of the site.

    Raises
    ------
    ConsiliumError
        ``privacy.ledger-broken``; ``usage.compare`` for records of another site;
        ``privacy.evidence-mismatch`` for records of another consortium than the evidence's.
    """
    check_consortium(ledger, records)
    found = audited(ledger)
    site = _one_site(found.state.site, records.site, records.path)
    differences: list[Difference] = []
    if public_fingerprint(ledger.key) != records.signer.fingerprint:
        differences.append(
            Difference(
                "key-differs",
                "The ledger is signed by another key than the one the aggregator knows.",
                serious=True,
            )
        )
    ends, later = Ends.of(found.state.latest, ledger.taken, ledger.receipts, records), Later()
    held = [
        one
        for one in found.witnessed
        if not later.holds("attestation", one.head, one.time, ends.records)
    ]
    differences += _attested(held, records.witnessed, "the ledger", "the aggregator")
    # The site's own list is compared in its report; here it is the ledger against the records.
    reconciled = reconcile(
        found.state,
        records=records,
        receipts=ledger.receipts,
        studies=ledger.studies,
        entries=found.entries,
        taken=ledger.taken,
    )
    differences += reconciled.differences
    left = (*later.set_aside(), *reconciled.not_compared)
    return Comparison(ledger.where, records.path, site, tuple(differences), left)


def check_consortium(evidence: Evidence, records: Records) -> None:
    """Check that a folder and the aggregator's records are of one consortium, or raise.

    Raises
    ------
    ConsiliumError
        ``privacy.evidence-mismatch``.
    """
    if evidence.trust is None:
        return
    # The consortium's identifier outlives its authorities.
    if evidence.trust.consortium != records.trust.consortium:
        raise ConsiliumError(
            "privacy.evidence-mismatch",
            "The evidence and the aggregator's records are of two consortia.",
            where=records.path,
            hint="Ask for the records of the aggregator that this site joined.",
        )


def _one_site(a: str, b: str, where: str) -> str:
    if a != b:
        raise ConsiliumError(
            "usage.compare",
            f"One is of site {a}, the other of site {b}.",
            where=where,
            hint="Compare two accounts of the same site.",
        )
    return a


def _entries(a: Audited, b: Audited) -> list[Difference]:
    common = min(a.last, b.last)
    fork = next((n for n in range(common + 1) if a.hashes[n] != b.hashes[n]), None)
    if fork is not None:
        # Each hash holds the one before, so from here on nothing can agree.
        return [
            Difference(
                "entry-differs",
                f"Entry {fork} is {a.hashes[fork][:12]} in A and {b.hashes[fork][:12]} in B; "
                f"they share {fork} entries before it, then A has {a.last + 1 - fork} and B has "
                f"{b.last + 1 - fork} of their own: two histories.",
                serious=True,
            )
        ]
    longer, name, other = (a, "A", "B") if a.last > b.last else (b, "B", "A")
    return [
        Difference(
            "entry-missing",
            f"Entry {sequence} ({longer.hashes[sequence][:12]}) is in {name} and not in {other}, "
            "which ends before it.",
            serious=False,
        )
        for sequence in range(common + 1, longer.last + 1)
    ]


def _attested(
    here: Iterable[WitnessRecord], there: Iterable[WitnessRecord], has: str, has_not: str
) -> list[Difference]:
    known = {(one.head.sequence, one.head.hash) for one in there}
    return [
        Difference(
            "attestation-missing",
            f"The attestation of entry {one.head.sequence} is in {has} and not in {has_not}.",
            serious=False,
        )
        for one in here
        if (one.head.sequence, one.head.hash) not in known
    ]
