"""What a ledger's patients have spent: ε over equal histories, computed once per history."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from consilium_common.ledger.state import LedgerState, year_bounds
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import ADJACENCY, UNIT, History, PrivacyEvent, grouped

#: Bars of the histogram of spend.
BINS: Final = 10


@dataclass(frozen=True)
class Bin:
    """Patients with ε in [low, high), the last bin's upper end included."""

    low: float
    high: float
    patients: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class YearSpend:
    """One calendar year (UTC): standing charges, patients, and ε of the worst patient in it."""

    year: int
    charges: int
    patients: int
    epsilon: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class StudySpend:
    """One study's charges that stand, and ε of its worst patient from this study alone."""

    study: str
    rounds: int
    evaluations: int
    statistics: int
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
    """Distribution of ε over the charged patients, over all studies, at one δ.

    ``since`` is the time from which charges count; None where all do. ``studies`` and
    ``histogram`` keep to it, ``years`` are all of the ledger.
    """

    delta: float
    patients: int
    histories: int
    least: float
    median: float
    most: float
    studies: tuple[StudySpend, ...]
    histogram: tuple[Bin, ...]
    years: tuple[YearSpend, ...]
    since: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency."""
        return {
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "delta": self.delta,
            "since": self.since,
            "patients": self.patients,
            "histories": self.histories,
            "epsilon": {"least": self.least, "median": self.median, "most": self.most},
            "histogram": [part.to_dict() for part in self.histogram],
            "years": [year.to_dict() for year in self.years],
            "studies": [study.to_dict() for study in self.studies],
        }


@dataclass(frozen=True)
class Worst:
    """The history with the largest ε among some patients; no patient is named."""

    epsilon: float
    history: History


def spend(state: LedgerState, delta: float, since: str | None = None) -> Spend:
    """Return the distribution of ε over patients at ``delta``; the median is the lower one.

    Parameters
    ----------
    since : str, optional
        Count the charges from this time on, for a budget per period (default: all).
    """
    counts = state.histories(since=since)
    spent = sorted((epsilon_of(history, delta), number) for history, number in counts.items())
    patients = sum(number for _, number in spent)
    charged = dict.fromkeys(charge.study for charge in state.standing(since=since))
    return Spend(
        delta=delta,
        patients=patients,
        histories=len(spent),
        least=spent[0][0] if spent else 0.0,
        median=_median(spent, patients),
        most=spent[-1][0] if spent else 0.0,
        studies=tuple(_study_spend(state, study, delta, since) for study in charged),
        histogram=_histogram(spent),
        years=tuple(_year_spend(state, year, delta) for year in state.years()),
        since=since,
    )


def worst(
    state: LedgerState,
    delta: float,
    *,
    patients: Collection[str] | None = None,
    study: str | None = None,
    plus: PrivacyEvent | None = None,
    since: str | None = None,
    until: str | None = None,
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
    since, until : str, optional
        Count the charges in [since, until), times in the ledger's form.
    """
    found = Worst(0.0, ())
    for history in state.histories(patients, study=study, since=since, until=until):
        events = grouped((*history, plus)) if plus is not None else history
        epsilon = epsilon_of(events, delta)
        if epsilon > found.epsilon or not found.history:
            found = Worst(epsilon, events)
    return found


def _study_spend(state: LedgerState, study: str, delta: float, since: str | None) -> StudySpend:
    charges = state.standing(study, since=since)
    # A study states one δ; should charges differ, the smallest gives the largest ε.
    stated = min(charge.delta for charge in charges)
    return StudySpend(
        study=study,
        rounds=sum(charge.purpose == "training" for charge in charges),
        evaluations=sum(charge.purpose == "evaluation" for charge in charges),
        statistics=sum(charge.purpose == "statistics" for charge in charges),
        patients=sum(state.histories(study=study, since=since).values()),
        released=sum(charge.state == "released" for charge in charges),
        study_delta=stated,
        study_epsilon=worst(state, stated, study=study, since=since).epsilon,
        epsilon=worst(state, delta, study=study, since=since).epsilon,
        first=charges[0].entry.time,
        last=charges[-1].entry.time,
    )


def _year_spend(state: LedgerState, year: int, delta: float) -> YearSpend:
    since, until = year_bounds(year)
    return YearSpend(
        year=year,
        charges=len(state.standing(since=since, until=until)),
        patients=sum(state.histories(since=since, until=until).values()),
        epsilon=worst(state, delta, since=since, until=until).epsilon,
    )


def _histogram(spent: list[tuple[float, int]]) -> tuple[Bin, ...]:
    """Count patients in equal bins over [0, most]; one bin where all have spent nothing."""
    if not spent:
        return ()
    most = spent[-1][0]
    if most == 0:
        return (Bin(0.0, 0.0, sum(number for _, number in spent)),)
    counts = [0] * BINS
    for epsilon, number in spent:
        counts[min(int(epsilon / most * BINS), BINS - 1)] += number
    edges = [most * index / BINS for index in range(BINS)] + [most]
    return tuple(Bin(edges[i], edges[i + 1], number) for i, number in enumerate(counts))


def _median(spent: list[tuple[float, int]], patients: int) -> float:
    seen = 0
    for epsilon, number in spent:
        seen += number
        if 2 * seen >= patients:
            return epsilon
    return 0.0
