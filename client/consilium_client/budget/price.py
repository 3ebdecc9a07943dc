"""The price of a study for each patient: the past, what is reserved, and the study's own rest.

Patients of equal past and equal plans share one computation. Whether a patient is left out depends
on that patient's own charges and on public plans alone, never on another patient or on any image.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from consilium_client.budget.policy import Budget, Policy
from consilium_client.budget.reserved import Reservation
from consilium_client.budget.rules import whole_evaluation
from consilium_common.ledger.state import LedgerState
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import (
    ADJACENCY,
    UNIT,
    History,
    PrivacyEvent,
    PrivacyParameters,
    grouped,
)

if TYPE_CHECKING:
    from consilium_common.study.schema import Study


@dataclass(frozen=True)
class Price:
    """What a study costs the patients of one site; ε is for unit patient, add or remove one.

    Parameters
    ----------
    study : str
        Digest of the study.
    private : bool
        False: no differential privacy, and every ε is None.
    threat_model : str or None
        Who adds the noise.
    patients, evaluated : int
        Patients who would take part: those trained on, and those whom released evaluation figures
        would be about (0 where none are released). Those left out are not among them.
    left_out, evaluated_left_out : int
        Patients left out, because the rest of the study would overrun their budget.
    delta : float
        The policy's δ, at which every ε but the declared one is computed.
    declared_delta, declared_epsilon : float or None
        The study's own δ, and ε of the training of the whole study at it, statistics included.
    study_epsilon, evaluation_epsilon : float or None
        ε of the whole study on its own, for a training patient (statistics included) and for a
        test patient.
    statistics_epsilon : float or None
        ε of the released statistics alone, for a training patient; None where none are released.
    before, after : float or None
        ε of the training patient who will have spent most: now, and once the rest of this study
        and of ``reserving`` other ones has run.
    evaluation_before, evaluation_after : float or None
        The same of test patients.
    budget, remaining : float
        ε a patient may spend, and what that training patient has left now.
    period_days : int or None
        Charges older than that do not count.
    reserving : int
        Other approved studies whose rest is counted in ``after``.
    rounds_charged, rounds_left, evaluations_left, statistics_left : int
        Rounds of this study that are charged and stand; rounds, released evaluations and released
        statistics (0 or 1) to come.
    leaves_out : frozenset of str
        Keyed hashes of the patients left out. They stay at the site: :meth:`to_dict` omits them.
    allowed : bool
        Whether policy and budget permit it; ``code``, ``reason`` and ``hint`` say why not.
    """

    study: str
    private: bool
    threat_model: str | None
    patients: int
    evaluated: int
    left_out: int
    evaluated_left_out: int
    delta: float
    declared_delta: float | None
    declared_epsilon: float | None
    study_epsilon: float | None
    evaluation_epsilon: float | None
    before: float | None
    after: float | None
    evaluation_before: float | None
    evaluation_after: float | None
    budget: float
    remaining: float
    period_days: int | None
    reserving: int
    rounds_charged: int
    rounds_left: int
    evaluations_left: int
    statistics_epsilon: float | None = None
    statistics_left: int = 0
    leaves_out: frozenset[str] = field(default=frozenset(), repr=False)
    allowed: bool = True
    code: str = ""
    reason: str = ""
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency; nobody is named."""
        plain = asdict(self)
        del plain["leaves_out"]
        return {"unit": UNIT, "adjacency": ADJACENCY, **plain}

    def sentence(self) -> str:
        """Say the price in words, for approval by a person."""
        return " ".join(self.sentences())

    def sentences(self) -> list[str]:
        """Say the price in words, a fact at a time."""
        if not self.private:
            return [f"No differential privacy: no formal protection of {people(self.patients)}."]
        span = "for ever" if self.period_days is None else f"in any {self.period_days} days"
        said = [
            f"ε {self.study_epsilon:.2f} of {self.remaining:.2f} left for {people(self.patients)}"
            f"{_out(self.left_out)}.",
            f"The patient who has spent most goes from {self.before:.2f} to {self.after:.2f} of "
            f"{self.budget:g} at δ {self.delta:g} {span} (unit patient, adjacency add or remove "
            "one; ε of several studies compose, they do not add up).",
        ]
        if self.reserving:
            said.append(
                f"Counted with it: what {self.reserving} other approved "
                f"{'study' if self.reserving == 1 else 'studies'} may still spend; "
                "`consilium site decline` frees it."
            )
        if self.evaluation_epsilon is None:
            said.append("No evaluation figure leaves the site, so test patients spend nothing.")
        else:
            said.append(
                f"Noised evaluation figures leave the site: ε {self.evaluation_epsilon:.2f} for "
                f"{people(self.evaluated, 'test patient')}{_out(self.evaluated_left_out)}; the one "
                f"who has spent most goes from {self.evaluation_before:.2f} to "
                f"{self.evaluation_after:.2f}."
            )
        if self.statistics_epsilon is not None:
            said.append(
                f"Noised statistics of the training patients leave the site: ε "
                f"{self.statistics_epsilon:.2f} by themselves, counted in the figures above."
            )
        said.append(
            f"Threat model {self.threat_model}: the noise is added here, before anything leaves."
        )
        return said


def people(number: int, one: str = "patient") -> str:
    """Return a number of patients in words: ``1 patient``, ``214 patients``."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def _out(number: int) -> str:
    if not number:
        return ""
    verb = "is" if number == 1 else "are"
    return f"; {people(number)} would overrun and {verb} left out"


@dataclass(frozen=True)
class _Alike:
    """Patients of one past and one plan, so of one ε."""

    members: tuple[str, ...]
    trained: bool
    evaluated: bool
    past: History
    after: float


def compute_price(
    state: LedgerState,
    policy: Policy,
    study: Study,
    *,
    plan: PrivacyParameters | None,
    patients: Collection[str],
    evaluated: Collection[str],
    reserved: Sequence[Reservation],
    since: str | None,
) -> Price:
    """Compute what the rest of a study costs these patients, whether it is permitted or not.

    Parameters
    ----------
    plan : PrivacyParameters or None
        The study's mechanism, None without privacy.
    patients, evaluated : collection of str
        Keyed hashes of those to train on, and of those to evaluate on.
    reserved : sequence of Reservation
        What other studies may still spend.
    since : str or None
        Charges before it do not count against the budget.
    """
    budget = policy.budget
    if plan is None:
        return _without_privacy(policy, study, len(frozenset(patients)))
    charges = state.standing(study.digest)
    charged = {c.round_index for c in charges if c.purpose == "training"}
    scored = {c.round_index for c in charges if c.purpose == "evaluation"}
    left = sum(index not in charged for index in range(plan.rounds))
    counted = plan.statistics_event
    to_count = int(counted is not None and not any(c.purpose == "statistics" for c in charges))
    training = grouped(
        [
            *([plan.event_of(left)] if left else []),
            *([counted] if counted is not None and to_count else []),
        ]
    )
    whole = whole_evaluation(plan)
    to_score = sum(n not in scored for n in study.evaluations) if whole is not None else 0
    evaluation = grouped(
        [PrivacyEvent(1.0, whole.noise_multiplier, to_score)]
        if whole is not None and to_score
        else []
    )
    found = _alike(
        state,
        frozenset(patients),
        frozenset(evaluated) if whole is not None else frozenset(),
        rest=(training, evaluation),
        reserved=reserved,
        delta=budget.delta,
        since=since,
    )
    out = [group for group in found if group.after > budget.epsilon]
    trained = _Side([g for g in found if g.trained], budget)
    tested = _Side([g for g in found if g.evaluated], budget)
    return Price(
        study=study.digest,
        private=True,
        threat_model=study.privacy.model if study.privacy.mode == "patient" else None,
        patients=trained.inside,
        evaluated=tested.inside,
        left_out=trained.outside,
        evaluated_left_out=tested.outside,
        delta=budget.delta,
        declared_delta=plan.delta,
        declared_epsilon=epsilon_of(plan.events_of(plan.rounds), plan.delta),
        study_epsilon=_alone(state, study, trained.shown, training, budget.delta),
        evaluation_epsilon=None
        if whole is None
        else _alone(state, study, tested.shown, evaluation, budget.delta),
        before=trained.before,
        after=trained.after,
        evaluation_before=None if whole is None else tested.before,
        evaluation_after=None if whole is None else tested.after,
        budget=budget.epsilon,
        remaining=max(0.0, budget.epsilon - trained.before),
        period_days=budget.period_days,
        reserving=len(reserved),
        rounds_charged=len(charged),
        rounds_left=left,
        evaluations_left=to_score,
        statistics_epsilon=None if counted is None else epsilon_of([counted], budget.delta),
        statistics_left=to_count,
        leaves_out=frozenset(patient for group in out for patient in group.members),
    )


class _Side:
    """The training patients, or the test patients: who stays, who is left out, the worst ε."""

    def __init__(self, groups: list[_Alike], budget: Budget) -> None:
        inside = [group for group in groups if group.after <= budget.epsilon]
        self.inside = sum(len(group.members) for group in inside)
        self.outside = sum(len(group.members) for group in groups) - self.inside
        # Where everybody would overrun, the figures of a refusal are about them.
        shown = inside or groups
        self.after = max((group.after for group in shown), default=0.0)
        # The past is computed for the worst alone: each ε takes a while.
        worst = [group.past for group in shown if group.after == self.after]
        self.before = max((epsilon_of(past, budget.delta) for past in worst), default=0.0)
        self.shown = [patient for group in shown for patient in group.members]


def _alike(
    state: LedgerState,
    trained: frozenset[str],
    evaluated: frozenset[str],
    *,
    rest: tuple[History, History],
    reserved: Sequence[Reservation],
    delta: float,
    since: str | None,
) -> list[_Alike]:
    """Part the patients so that all of one part have the same past and the same plans."""
    charged = dict.fromkeys(charge.cohort for charge in state.standing(since=since))
    cohorts = {digest: frozenset(state.cohorts[digest]) for digest in charged}
    parts: dict[tuple[Any, ...], list[str]] = {}
    for patient in trained | evaluated:
        roles = (patient in trained, patient in evaluated)
        inside = tuple(digest for digest, members in cohorts.items() if patient in members)
        plans = tuple(
            event
            for other in reserved
            for event in other.events(patient, trained=roles[0], evaluated=roles[1])
        )
        parts.setdefault((roles, inside, plans), []).append(patient)
    found = []
    for ((in_training, in_evaluation), _, plans), members in parts.items():
        roles = (in_training, in_evaluation)
        own = [e for events, mine in zip(rest, roles, strict=True) if mine for e in events]
        past = state.events_of(members[0], since=since)
        found.append(
            _Alike(
                members=tuple(members),
                trained=in_training,
                evaluated=in_evaluation,
                past=past,
                after=epsilon_of(grouped((*past, *plans, *own)), delta),
            )
        )
    return found


def _alone(
    state: LedgerState,
    study: Study,
    patients: Iterable[str],
    rest: History,
    delta: float,
) -> float:
    """Return ε of the whole study on its own: what it has charged and what is to come."""
    # Of a cohort of nobody the price is that of somebody who joins now.
    histories = state.histories(frozenset(patients), study=study.digest) or {(): 0}
    return max(epsilon_of(grouped((*history, *rest)), delta) for history in histories)


def _without_privacy(policy: Policy, study: Study, patients: int) -> Price:
    return Price(
        study=study.digest,
        private=False,
        threat_model=None,
        patients=patients,
        evaluated=0,
        left_out=0,
        evaluated_left_out=0,
        delta=policy.budget.delta,
        declared_delta=None,
        declared_epsilon=None,
        study_epsilon=None,
        evaluation_epsilon=None,
        before=None,
        after=None,
        evaluation_before=None,
        evaluation_after=None,
        budget=policy.budget.epsilon,
        remaining=policy.budget.epsilon,
        period_days=policy.budget.period_days,
        reserving=0,
        rounds_charged=0,
        rounds_left=study.federation.rounds,
        evaluations_left=0,
    )
