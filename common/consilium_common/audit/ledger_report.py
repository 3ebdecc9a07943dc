"""What an outsider recomputes from a verified ledger: ε by three accountants, from events alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium_common.audit.evidence import Evidence, check_site
from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import public_fingerprint
from consilium_common.ledger.database import connect_reader, read_export
from consilium_common.ledger.entries import Entry, Head
from consilium_common.ledger.spend import worst
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.verify import VerifyResult, jsonl_lines, verify_lines
from consilium_common.ledger.witness import WitnessRecord, is_witness_line
from consilium_common.privacy.accounting import CrossCheck, cross_check
from consilium_common.privacy.events import ADJACENCY, UNIT

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class StudyCost:
    """One study in a ledger, with ε of its worst patient from this study alone."""

    study: str
    rounds: int
    evaluations: int
    statistics: int
    released: int
    patients: int
    epsilon: CrossCheck

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self.__dict__, "epsilon": self.epsilon.to_dict()}


@dataclass(frozen=True)
class LedgerReport:
    """A verified ledger in figures; ε is for unit patient, adjacency add or remove one.

    ``worst`` is over all studies for the patient who has spent most (None before the first
    charge); ``key`` is the SHA-256 of the public key that every signature was checked with.
    """

    file: str
    site: str
    key: str
    entries: int
    head: Head
    witnessed: int
    witness_checked: bool
    patients: int
    charges: dict[str, int]
    studies: tuple[StudyCost, ...]
    worst: CrossCheck | None
    #: Egress receipts whose chain and signatures hold; None where none were handed over.
    receipts: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for ``--json``."""
        return {
            "file": self.file,
            "verified": True,
            "site": self.site,
            "key": self.key,
            "entries": self.entries,
            "head": str(self.head),
            "witnessed": {
                "entries": self.witnessed,
                "last": self.witnessed - 1 if self.witnessed else None,
                "checked": self.witness_checked,
            },
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "patients": self.patients,
            "charges": self.charges,
            "receipts": self.receipts,
            "studies": [study.to_dict() for study in self.studies],
            "worst_patient": None if self.worst is None else self.worst.to_dict(),
        }

    def print_to(self, console: Console) -> None:
        """Print the figures for a person."""
        from rich.table import Table

        console.print(f"{self.file}: verified", style="bold green", markup=False)
        counts = ", ".join(f"{number} {state}" for state, number in self.charges.items())
        console.print(
            f"  site {self.site}, {self.entries} entries, charges: {counts or 'none'}\n"
            f"  head {self.head}\n"
            f"  key  {self.key}\n"
            f"  seen {witness_words(self.witnessed, self.entries, checked=self.witness_checked)}",
            markup=False,
        )
        if self.receipts is not None:
            console.print(f"  egress receipts: {self.receipts}, chain and signatures hold")
        if self.worst is None:
            console.print("  Nothing was charged.")
            return
        console.print(
            f"  ε recomputed from the events of {self.patients} patients; unit patient, adjacency "
            "add or remove one.",
            markup=False,
        )
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        for name in ("", "rounds", "patients", "δ", "ε PLD", "ε PRV", "ε RDP", "PLD, PRV"):
            left = name in ("", "PLD, PRV")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for study in self.studies:
            table.add_row(
                f"  study {study.study[:12]}",
                str(study.rounds),
                str(study.patients),
                *_figures(study.epsilon),
            )
        table.add_row("  worst patient, all", "", str(self.patients), *_figures(self.worst))
        console.print(table)


@dataclass(frozen=True)
class Audited:
    """A ledger that verified: what it says, each entry's hash and time, and what was attested."""

    state: LedgerState
    result: VerifyResult
    hashes: tuple[str, ...]
    #: Time of each entry, as it says.
    times: tuple[str, ...]
    witnessed: tuple[WitnessRecord, ...]

    @property
    def head(self) -> Head:
        """The last entry."""
        assert self.state.head is not None  # a verified ledger has a first entry
        return self.state.head

    @property
    def entries(self) -> tuple[tuple[str, str], ...]:
        """Hash and time of every entry, in order."""
        return tuple(zip(self.hashes, self.times, strict=True))

    @property
    def last(self) -> int:
        """Sequence of the last entry."""
        return self.head.sequence


def audited(evidence: Evidence, *, expected_head: Head | None = None) -> Audited:
    """Verify a ledger: every link, signature, rule and witness record, and whose it is.

    Raises
    ------
    ConsiliumError
        ``privacy.ledger-broken`` naming the first broken entry; ``privacy.evidence-mismatch``
        when the ledger is not of the site whose key was certified; and what reading raises.
    """
    path = evidence.ledger
    lines: list[bytes] = []

    def kept() -> Iterator[bytes]:
        for line in _lines(path):
            lines.append(line)
            yield line

    found = verify_lines(
        kept(), evidence.key, expected_head=expected_head, witness_key=evidence.witness
    )
    if found.problem is not None:
        sound = f"{found.entries} entries before it hold" if found.entries else "none before it"
        # An export has lines that a person can look at; a database has none.
        export = path.suffix == ".jsonl" and found.problem.line is not None
        at = f", line {found.problem.line}" if export else ""
        raise ConsiliumError(
            "privacy.ledger-broken",
            f"The ledger does not verify: {found.problem.message} ({found.problem.code}; {sound}).",
            where=f"{path}, entry {found.problem.position}{at}",
            hint="Check that the key is this site's. If it is, the ledger was changed or damaged "
            "from this entry on: compare it with an earlier export.",
        )
    check_site(evidence, found.state.site)
    entries = [Entry.parse(line) for line in lines if not is_witness_line(line)]
    return Audited(
        state=found.state,
        result=found,
        hashes=tuple(one.hash for one in entries),
        times=tuple(one.time for one in entries),
        witnessed=tuple(WitnessRecord.parse(line) for line in lines if is_witness_line(line)),
    )


def ledger_report(
    evidence: Evidence, *, expected_head: Head | None = None, delta: float | None = None
) -> LedgerReport:
    """Verify a ledger and recompute what its patients have spent.

    Parameters
    ----------
    evidence : Evidence
        The ledger and its keys.
    expected_head : Head, optional
        A head noted earlier, which the ledger must contain.
    delta : float, optional
        δ for the worst patient over all studies (default: that of the policy recorded last, else
        the smallest that a study states). Each study is computed at its own δ.

    Raises
    ------
    ConsiliumError
        What :func:`audited` raises.
    """
    found = audited(evidence, expected_head=expected_head)
    return report_of(evidence, found, delta=delta)


def report_of(evidence: Evidence, found: Audited, *, delta: float | None = None) -> LedgerReport:
    """Recompute the figures of a ledger that was verified; as :func:`ledger_report`."""
    state = found.state
    charges: dict[str, int] = {}
    for charge in state.charges.values():
        charges[charge.state] = charges.get(charge.state, 0) + 1
    studies = tuple(_study(state, study) for study in state.studies())
    overall = None
    if studies:
        at = delta if delta is not None else _delta_of(state)
        overall = cross_check(worst(state, at).history, at)
    return LedgerReport(
        file=evidence.where,
        site=state.site,
        key=public_fingerprint(evidence.key),
        entries=found.result.entries,
        head=found.head,
        witnessed=found.result.witnessed,
        witness_checked=found.result.witness_checked,
        patients=sum(state.histories().values()),
        charges=charges,
        studies=studies,
        worst=overall,
        receipts=None if evidence.receipts is None else len(evidence.receipts),
    )


def _delta_of(state: LedgerState) -> float:
    """Return the δ of the policy recorded last, else the smallest of the standing charges."""
    budget = (state.policy or {}).get("budget")
    recorded = budget.get("delta") if isinstance(budget, dict) else None
    if isinstance(recorded, float) and 0 < recorded < 1:
        return recorded
    return min(charge.delta for charge in state.standing())


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".jsonl":
        yield from jsonl_lines(path)
        return
    db = connect_reader(path)
    try:
        yield from read_export(db, path)
    finally:
        db.close()


def _study(state: LedgerState, study: str) -> StudyCost:
    charges = state.standing(study)
    delta = min(charge.delta for charge in charges)
    return StudyCost(
        study=study,
        rounds=sum(charge.purpose == "training" for charge in charges),
        evaluations=sum(charge.purpose == "evaluation" for charge in charges),
        statistics=sum(charge.purpose == "statistics" for charge in charges),
        released=sum(charge.state == "released" for charge in charges),
        patients=sum(state.histories(study=study).values()),
        epsilon=cross_check(worst(state, delta, study=study).history, delta),
    )


def witness_words(witnessed: int, entries: int, *, checked: bool) -> str:
    """Say how many entries the aggregator attested, and whether its signatures were checked."""
    if not witnessed:
        return "by no witness"
    words = f"by the aggregator: all {entries} entries"
    if witnessed < entries:
        words = f"by the aggregator: the first {witnessed} of {entries} entries"
    return words if checked else f"{words} (signatures not checked: no witness key given)"


def _figures(check: CrossCheck) -> tuple[str, str, str, str, str]:
    return (
        f"{check.delta:g}",
        f"{check.pld:.3f}",
        "–" if check.prv is None else f"{check.prv:.3f}",
        f"{check.rdp:.3f}" + ("" if check.below_ceiling else " (below PLD!)"),
        check.agreement.replace("-", " "),
    )
