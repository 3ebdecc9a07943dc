"""What one patient has spent and has left; the hospital's identifier is hashed and never shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from consilium_client.budget.policy import Policy
from consilium_client.data.manifest import existing_manifest
from consilium_client.data.split import open_patient_key
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.state import Charge, LedgerState
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import ADJACENCY, UNIT, History, grouped


@dataclass(frozen=True)
class Part:
    """A patient's charges of one study, or of one year."""

    name: str
    rounds: int
    evaluations: int
    statistics: int
    epsilon: float

    def to_dict(self, key: str) -> dict[str, Any]:
        """Return plain values, the name under ``key``."""
        return {
            key: self.name,
            "rounds": self.rounds,
            "evaluations": self.evaluations,
            "statistics": self.statistics,
            "epsilon": self.epsilon,
        }


@dataclass(frozen=True)
class PatientBudget:
    """One patient's spend; ε at the policy's δ, unit patient, adjacency add or remove one."""

    policy: Policy
    #: Digest of the one study that counts; None: all do.
    study: str | None
    events: History
    spent: float
    studies: tuple[Part, ...]
    years: tuple[Part, ...]

    @property
    def remaining(self) -> float | None:
        """ε that is left; None where one study alone is looked at."""
        return None if self.study else max(0.0, self.policy.budget.epsilon - self.spent)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency; the patient is not named."""
        return {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "budget": self.policy.budget.model_dump(),
            "study": self.study,
            "spent": self.spent,
            "remaining": self.remaining,
            "events": [event.to_dict() for event in self.events],
            "studies": [part.to_dict("study") for part in self.studies],
            "years": [part.to_dict("year") for part in self.years],
        }

    def lines(self) -> list[str]:
        """Say it in words."""
        budget = self.policy.budget
        if self.study:
            said = f"This patient has spent ε {self.spent:.3f} at δ {budget.delta:g} in this study"
        else:
            said = (
                f"This patient has spent ε {self.spent:.3f} of {budget.epsilon:g} at "
                f"δ {budget.delta:g}, {budget.span}; {self.remaining:.3f} is left"
            )
        lines = [f"{said} (unit patient, adjacency add or remove one)."]
        for what, parts in (("study", self.studies), ("year", self.years)):
            lines += [
                f"  {what} {part.name[:12]}: ε {part.epsilon:.3f} "
                f"({part.rounds} rounds, {part.evaluations} evaluations"
                + (f", {part.statistics} statistics)" if part.statistics else ")")
                for part in parts
            ]
        return lines


def patient_budget(
    home: SiteHome, state: LedgerState, policy: Policy, patient_id: str, study: str | None = None
) -> PatientBudget:
    """Return what one patient has spent, and has left, by the policy's budget and period.

    Parameters
    ----------
    patient_id : str
        The patient as the hospital knows it.
    study : str, optional
        Digest of a study: count its charges alone, of all times.

    Raises
    ------
    ConsiliumError
        ``data.unknown-patient``, which does not repeat the identifier; ``state.patient-key``.
    """
    key = _known_key(home, state, patient_id)
    delta = policy.budget.delta
    charges = state.charges_of(key, study, since=None if study else policy.budget.since())
    events = grouped(charge.event for charge in charges)
    return PatientBudget(
        policy=policy,
        study=study,
        events=events,
        spent=epsilon_of(events, delta),
        studies=_parts(((charge.study, charge) for charge in charges), delta),
        years=_parts(((charge.time[:4], charge) for charge in charges), delta),
    )


def _parts(named: Iterable[tuple[str, Charge]], delta: float) -> tuple[Part, ...]:
    """Return the charges of each name together, in the order in which the names first came."""
    groups: dict[str, list[Charge]] = {}
    for name, charge in named:
        groups.setdefault(name, []).append(charge)
    return tuple(
        Part(
            name,
            rounds=sum(charge.purpose == "training" for charge in charges),
            evaluations=sum(charge.purpose == "evaluation" for charge in charges),
            statistics=sum(charge.purpose == "statistics" for charge in charges),
            epsilon=epsilon_of([charge.event for charge in charges], delta),
        )
        for name, charges in groups.items()
    )


def _known_key(home: SiteHome, state: LedgerState, patient_id: str) -> str:
    """Return the patient's keyed hash, if this site has data of the patient or ever charged it."""
    unknown = ConsiliumError(
        "data.unknown-patient",
        "No patient of that identifier is known here: neither in cases.csv nor in the ledger.",
        hint="Give patient_id as it stands in cases.csv; `consilium site data list` shows cases.",
    )
    # Asking must not make a key: a site without one has named no patient yet.
    if (
        not (home.identity / "patient_key").exists()
        and not (home.data / "patient_key.check").exists()
    ):
        raise unknown
    key = open_patient_key(home)
    name = key.name(patient_id)
    if any(name in members for members in state.cohorts.values()):
        return name
    manifest = existing_manifest(home)
    if manifest is None or all(key.name(case.patient_id) != name for case in manifest.cases):
        raise unknown
    return name
