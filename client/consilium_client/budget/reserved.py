"""What other approved studies may still spend of this site's patients: kept free for them.

Two approved studies must not collide midway, so pricing a new one counts the rest of every other
study that this site approved and that has not ended. A study ends when its last round is charged,
or when the site declines it; one that was stopped early keeps its share until it is declined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from consilium_common.ledger.entries import Purpose
from consilium_common.ledger.state import LedgerState
from consilium_common.privacy.accounting import parameters
from consilium_common.privacy.events import PrivacyEvent

if TYPE_CHECKING:
    from consilium_client.store import Decision
    from consilium_common.study.schema import Study


@dataclass(frozen=True)
class Share:
    """What one purpose of a study may still cost each of its patients."""

    event: PrivacyEvent
    #: Keyed hashes of the patients; None while nothing was charged and the ledger cannot know.
    members: frozenset[str] | None


@dataclass(frozen=True)
class Reservation:
    """The rest of one approved study.

    Who its patients are is read from its newest charge. Before the first one, whoever is trained
    (or evaluated) on in the study that is priced is taken to be in this one too, but for those
    whom it leaves out: a patient's split does not change from study to study.
    """

    study: str
    training: Share | None
    evaluation: Share | None
    statistics: Share | None
    left_out: frozenset[str]

    def events(self, patient: str, *, trained: bool, evaluated: bool) -> list[PrivacyEvent]:
        """Return what the study may still cost a patient with these roles in the priced one."""
        found = []
        shares = (
            (self.training, trained),
            (self.statistics, trained),
            (self.evaluation, evaluated),
        )
        for share, assumed in shares:
            if share is None or patient in self.left_out:
                continue
            if assumed if share.members is None else patient in share.members:
                found.append(share.event)
        return found


def reservations(
    state: LedgerState, decisions: Iterable[Decision], priced: Study
) -> tuple[Reservation, ...]:
    """Return the rest of every approved private study but the one that is priced."""
    found = []
    for decision in decisions:
        if decision.decision != "approved" or decision.study.digest == priced.digest:
            continue
        rest = _rest(state, decision)
        if any(share is not None for share in (rest.training, rest.evaluation, rest.statistics)):
            found.append(rest)
    return tuple(found)


def _rest(state: LedgerState, decision: Decision) -> Reservation:
    study = decision.study
    plan = parameters(study)
    if plan is None:
        return Reservation(study.digest, None, None, None, decision.left_out)
    charges = state.standing(study.digest)
    trained = [c.round_index for c in charges if c.purpose == "training"]
    scored = {c.round_index for c in charges if c.purpose == "evaluation"}
    # Rounds run in order: those before the newest charge were missed, and do not come back.
    done = max([0, *(index + 1 for index in trained), *scored])
    training = evaluation = statistics = None
    if plan.rounds > done:
        training = Share(plan.event_of(plan.rounds - done), _members(state, study, "training"))
    left = [n for n in study.evaluations if n >= done and n not in scored]
    if plan.evaluation_noise is not None and left:
        event = PrivacyEvent(1.0, plan.evaluation_noise, len(left))
        evaluation = Share(event, _members(state, study, "evaluation"))
    # Gathered before the first round; kept free until the last one, in case they still come.
    counted = plan.statistics_event
    if counted is not None and plan.rounds > done and _members(state, study, "statistics") is None:
        statistics = Share(counted, _members(state, study, "training"))
    return Reservation(study.digest, training, evaluation, statistics, decision.left_out)


def _members(state: LedgerState, study: Study, purpose: Purpose) -> frozenset[str] | None:
    newest = [c for c in state.standing(study.digest) if c.purpose == purpose][-1:]
    return frozenset(state.cohorts[newest[0].cohort]) if newest else None
