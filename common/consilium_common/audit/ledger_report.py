"""What an outsider recomputes from a verified ledger: ε by three accountants, from events alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import public_fingerprint
from consilium_common.ledger.entries import Head
from consilium_common.ledger.spend import worst
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.verify import VerifyResult, verify_file
from consilium_common.privacy.accounting import CrossCheck, cross_check
from consilium_common.privacy.events import ADJACENCY, UNIT

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from rich.console import Console


@dataclass(frozen=True)
class StudyCost:
    """One study in a ledger, with ε of its worst patient from this study alone."""

    study: str
    rounds: int
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
    patients: int
    charges: dict[str, int]
    studies: tuple[StudyCost, ...]
    worst: CrossCheck | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for ``--json``."""
        return {
            "file": self.file,
            "verified": True,
            "site": self.site,
            "key": self.key,
            "entries": self.entries,
            "head": str(self.head),
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "patients": self.patients,
            "charges": self.charges,
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
            f"  key  {self.key}",
            markup=False,
        )
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


def verified(
    path: Path, key: Ed25519PublicKey, *, expected_head: Head | None = None
) -> tuple[LedgerState, VerifyResult]:
    """Verify a ledger file.

    Raises
    ------
    ConsiliumError
        ``privacy.ledger-broken`` naming the first broken entry; and what
        :func:`consilium_common.ledger.verify.verify_file` raises.
    """
    found = verify_file(path, key, expected_head=expected_head)
    if found.problem is not None:
        sound = f"{found.entries} entries before it hold" if found.entries else "none before it"
        raise ConsiliumError(
            "privacy.ledger-broken",
            f"The ledger does not verify: {found.problem.message} ({found.problem.code}; {sound}).",
            where=f"{path}, entry {found.problem.position}",
            hint="Check that the key is this site's. If it is, the ledger was changed or damaged "
            "from this entry on: compare it with an earlier export.",
        )
    return found.state, found


def ledger_report(
    path: Path,
    key: Ed25519PublicKey,
    *,
    expected_head: Head | None = None,
    delta: float | None = None,
) -> LedgerReport:
    """Verify a ledger and recompute what its patients have spent.

    Parameters
    ----------
    path, key, expected_head
        As for :func:`verified`.
    delta : float, optional
        δ for the worst patient over all studies (default: that of the policy recorded last, else
        the smallest that a study states). Each study is computed at its own δ.

    Raises
    ------
    ConsiliumError
        What :func:`verified` raises.
    """
    state, found = verified(path, key, expected_head=expected_head)
    assert found.head is not None  # a verified ledger has a first entry
    charges: dict[str, int] = {}
    for charge in state.charges.values():
        charges[charge.state] = charges.get(charge.state, 0) + 1
    studies = tuple(_study(state, study) for study in state.studies())
    overall = None
    if studies:
        at = delta if delta is not None else _delta_of(state)
        overall = cross_check(worst(state, at).history, at)
    return LedgerReport(
        file=str(path),
        site=state.site,
        key=public_fingerprint(key),
        entries=found.entries,
        head=found.head,
        patients=sum(state.histories().values()),
        charges=charges,
        studies=studies,
        worst=overall,
    )


def _study(state: LedgerState, study: str) -> StudyCost:
    charges = state.standing(study)
    delta = min(charge.delta for charge in charges)
    return StudyCost(
        study=study,
        rounds=len(charges),
        released=sum(charge.state == "released" for charge in charges),
        patients=sum(state.histories(study=study).values()),
        epsilon=cross_check(worst(state, delta, study=study).history, delta),
    )


def _delta_of(state: LedgerState) -> float:
    budget = (state.policy or {}).get("budget")
    recorded = budget.get("delta") if isinstance(budget, dict) else None
    if isinstance(recorded, float) and 0 < recorded < 1:
        return recorded
    return min(charge.delta for charge in state.standing())


def _figures(check: CrossCheck) -> tuple[str, str, str, str, str]:
    return (
        f"{check.delta:g}",
        f"{check.pld:.3f}",
        "–" if check.prv is None else f"{check.prv:.3f}",
        f"{check.rdp:.3f}" + ("" if check.below_ceiling else " (below PLD!)"),
        check.agreement.replace("-", " "),
    )
