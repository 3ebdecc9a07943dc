"""What a ledger's patients have spent: ε over equal histories, computed once per history."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from consilium_common.ledger.state import LedgerState
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import ADJACENCY, UNIT, History, PrivacyEvent, grouped


@dataclass(frozen=True)
class StudySpend:
    """One study's charges that stand, and ε of its worst patient from this study alone."""

    study: str
    rounds: int
    patients: int
    released: int
    #: δ that the study states; ``epsilon`` is at the δ of the enclosing :class:`Spend`.
    study_delta: float
    study_epsilon: float
    epsilon: float
    first: str
    last: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Spend:
    """Distribution of ε over the patients that were ever charged, over all studies, at one δ."""

    delta: float
    patients: int
    histories: int
    least: float
    median: float
    most: float
    studies: tuple[StudySpend, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency."""
        return {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "delta": self.delta,
            "patients": self.patients,
            "histories": self.histories,
            "epsilon": {"least": self.least, "median": self.median, "most": self.most},
            "studies": [study.to_dict() for study in self.studies],
        }


@dataclass(frozen=True)
class Worst:
    """The history with the largest ε among some patients; no patient is named."""

    epsilon: float
    history: History


def spend(state: LedgerState, delta: float) -> Spend:
    """Return the distribution of ε over patients at ``delta``; the median is the lower one."""
    counts = state.histories()
    spent = sorted((epsilon_of(history, delta), number) for history, number in counts.items())
    patients = sum(number for _, number in spent)
    return Spend(
        delta=delta,
        patients=patients,
        histories=len(spent),
        least=spent[0][0] if spent else 0.0,
        median=_median(spent, patients),
        most=spent[-1][0] if spent else 0.0,
        studies=tuple(_study_spend(state, study, delta) for study in state.studies()),
    )


def worst(
    state: LedgerState,
    delta: float,
    *,
    patients: Collection[str] | None = None,
    study: str | None = None,
    plus: PrivacyEvent | None = None,
) -> Worst:
    """Return the largest ε over patients at ``delta``, each with the event ``plus`` added.

    Parameters
    ----------
    state, delta
        The ledger, and δ of ε.
    patients : collection of str, optional
        (default: all that were ever charged).
    study : str, optional
        Count this study's charges alone.
    plus : PrivacyEvent, optional
        What is planned on top of the past.
    """
    found = Worst(0.0, ())
    for history in state.histories(patients, study=study):
        events = grouped((*history, plus)) if plus is not None else history
        epsilon = epsilon_of(events, delta)
        if epsilon > found.epsilon or not found.history:
            found = Worst(epsilon, events)
    return found


def _study_spend(state: LedgerState, study: str, delta: float) -> StudySpend:
    charges = state.standing(study)
    # A study states one δ; should charges differ, the smallest gives the largest ε.
    stated = min(charge.delta for charge in charges)
    return StudySpend(
        study=study,
        rounds=len(charges),
        patients=sum(state.histories(study=study).values()),
        released=sum(charge.state == "released" for charge in charges),
        study_delta=stated,
        study_epsilon=worst(state, stated, study=study).epsilon,
        epsilon=worst(state, delta, study=study).epsilon,
        first=charges[0].entry.time,
        last=charges[-1].entry.time,
    )


def _median(spent: list[tuple[float, int]], patients: int) -> float:
    seen = 0
    for epsilon, number in spent:
        seen += number
        if 2 * seen >= patients:
            return epsilon
    return 0.0
