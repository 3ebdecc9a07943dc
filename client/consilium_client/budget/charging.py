"""Whether this site's patients can still afford a study: asked at approval and at every charge.

Budgets are kept per patient over all studies. At approval the patients whose budget the rest of
the study would overrun are left out, and stay left out; before each round and each released
evaluation the others are checked again, and one who would overrun by then refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from consilium_client.budget.policy import Policy
from consilium_client.budget.price import Price, compute_price
from consilium_client.budget.reserved import reservations
from consilium_client.budget.rules import Refusal, policy_refusal, whole_evaluation
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Entry, Purpose
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import parameters
from consilium_common.privacy.events import SCORE_SENSITIVITY, PrivacyEvent, PrivacyParameters

if TYPE_CHECKING:
    from consilium_client.store import Decision
    from consilium_common.study.schema import Study

__all__ = [
    "Price",
    "Refusal",
    "charge_round",
    "price",
    "record_policy",
    "require_affordable",
    "require_permitted",
]


def price(
    ledger: Ledger | LedgerState,
    policy: Policy,
    study: Study,
    patients: Sequence[str],
    evaluated: Sequence[str] = (),
    *,
    others: Iterable[Decision] = (),
) -> Price:
    """Price the rest of a study for these patients against the site's policy, for approval.

    Rounds of the study that are charged and stand count once, with what was really charged; what
    is still to come is added to every patient's history over all studies, and so is the rest of
    the other studies that were approved. Patients who would overrun are left out.

    Parameters
    ----------
    ledger : Ledger or LedgerState
        The site's ledger.
    policy, study
        What the site permits and what is asked.
    patients, evaluated : sequence of str
        Keyed hashes of the training cohort, and of the test patients.
    others : iterable of Decision
        This site's decisions about all studies; see :mod:`consilium_client.budget.reserved`.

    Raises
    ------
    ConsiliumError
        ``privacy.unreachable`` when no noise keeps the study's own ε. A refusal is no error here:
        see ``allowed``; :func:`require_affordable` raises.
    """
    state = _state(ledger)
    plan = parameters(study)
    reserved = reservations(state, others, study) if plan is not None else ()
    since = policy.budget.since()
    scored = frozenset(evaluated) if whole_evaluation(plan) is not None else frozenset()
    found = compute_price(
        state,
        policy,
        study,
        plan=plan,
        patients=patients,
        evaluated=scored,
        reserved=reserved,
        since=since,
    )
    refused = (
        policy_refusal(policy, study, plan, len(frozenset(patients)))
        or policy_refusal(policy, study, plan, len(scored), purpose="evaluation")
        or _cap_refusal(found, policy)
        or _left_out_refusal(found, policy)
    )
    return found if refused is None else _refused(found, refused)


def require_affordable(
    ledger: Ledger | LedgerState,
    policy: Policy,
    study: Study,
    patients: Sequence[str],
    *,
    purpose: Purpose = "training",
) -> Price:
    """Return the price of the rest of a study's training or evaluation, or refuse it.

    Nobody is left out here: that was done when the study was approved. What other studies may
    still spend is not counted again either.

    Raises
    ------
    ConsiliumError
        ``privacy.budget``, and what :func:`require_permitted` raises.
    """
    return _require(
        _state(ledger), policy, study, patients, purpose=purpose, since=policy.budget.since()
    )


def require_permitted(
    policy: Policy, study: Study, patients: Sequence[str], *, purpose: Purpose = "training"
) -> None:
    """Refuse a study that the policy does not permit, whatever was spent so far.

    Raises
    ------
    ConsiliumError
        ``privacy.non-private-refused``, ``privacy.threat-model-refused``,
        ``privacy.too-few-sites``, ``privacy.metrics-refused``, ``privacy.cohort-too-small``,
        ``privacy.delta-too-large``.
    """
    count = len(frozenset(patients))
    refused = policy_refusal(policy, study, parameters(study), count, purpose=purpose)
    if refused is not None:
        raise refused.error(study)


def charge_round(
    ledger: Ledger,
    policy: Policy,
    study: Study,
    round_index: int,
    patients: Sequence[str],
    *,
    event: PrivacyEvent,
    clip_norm: float,
    purpose: Purpose = "training",
) -> Entry:
    """Charge one round, one evaluation or the statistics if policy and budget permit the rest.

    Check and charge are one transaction: no other process can spend in between. The mechanism
    that will run must be the one the study names.

    Parameters
    ----------
    ledger, policy, study
        As for :func:`price`.
    round_index : int
        Round, from 0, below the study's number of rounds; of an evaluation the number of rounds
        done, one of ``study.evaluations``; of statistics 0.
    patients : sequence of str
        Keyed hashes of those whom the round may sample, or whom the evaluation scores, or whom
        the statistics count.
    event : PrivacyEvent
        What the mechanism that will run says of itself.
    clip_norm : float
        C of that mechanism; 1/2 for an evaluation, √tables for statistics. With adaptive clipping
        any C: the noise follows it, so that the event stays the same.
    purpose : str
        ``training``, ``evaluation`` or ``statistics`` (default: training).

    Raises
    ------
    ConsiliumError
        What :func:`require_affordable` and :meth:`Ledger.charge` raise;
        ``privacy.mechanism-differs`` when event or clip norm are not the study's,
        ``privacy.round-unknown``, ``privacy.nothing-to-charge``.
    """
    plan = parameters(study)
    expected = None
    if plan is not None:
        expected = {
            "training": plan.event_per_round,
            "evaluation": plan.evaluation_event,
            "statistics": plan.statistics_event,
        }[purpose]
    if plan is None or expected is None or study.privacy.mode == "none":
        what = "no privacy" if plan is None else f"no released {purpose} figures"
        raise ConsiliumError("privacy.nothing-to-charge", f"The study has {what} to charge for.")
    if event != expected or not _same_clip_norm(plan, study, clip_norm, purpose):
        raise ConsiliumError(
            "privacy.mechanism-differs",
            "The mechanism that would run is not the one the study names (sampling rate, noise, "
            "steps or clip norm).",
            hint="This is a fault of the program: nothing was charged and nothing ran. Report it.",
        )
    _require_known_round(plan, study, round_index, purpose)
    record_policy(ledger, policy)
    # One moment for both checks. The charge itself is a little later, when no more charges count.
    since = policy.budget.since()
    # The price is computed before as well: what follows finds it cached and holds the lock briefly.
    _require(ledger.state, policy, study, patients, purpose=purpose, since=since)
    return ledger.charge(
        study=study.digest,
        round_index=round_index,
        event=event,
        clip_norm=clip_norm,
        delta=plan.delta,
        patients=patients,
        purpose=purpose,
        model=study.privacy.model,
        guard=lambda state: _require(state, policy, study, patients, purpose=purpose, since=since),
    )


def record_policy(ledger: Ledger, policy: Policy) -> None:
    """Write the policy into the ledger where it differs from the last one recorded."""
    if ledger.state.policy != policy.to_canonical():
        ledger.record_policy(policy.to_canonical())


def _state(ledger: Ledger | LedgerState) -> LedgerState:
    return ledger.state if isinstance(ledger, Ledger) else ledger


def _require(
    state: LedgerState,
    policy: Policy,
    study: Study,
    patients: Sequence[str],
    *,
    purpose: Purpose,
    since: str | None,
) -> Price:
    require_permitted(policy, study, patients, purpose=purpose)
    evaluating = purpose == "evaluation"
    found = compute_price(
        state,
        policy,
        study,
        plan=parameters(study),
        patients=() if evaluating else patients,
        evaluated=patients if evaluating else (),
        reserved=(),
        since=since,
    )
    refused = _cap_refusal(found, policy) or _overrun_refusal(found)
    if refused is not None:
        raise refused.error(study)
    return found


def _same_clip_norm(
    plan: PrivacyParameters, study: Study, clip_norm: float, purpose: Purpose
) -> bool:
    if purpose == "evaluation":
        return float(clip_norm) == SCORE_SENSITIVITY
    if purpose == "statistics":
        return float(clip_norm) == plan.statistics_sensitivity
    if study.privacy.mode == "patient" and study.privacy.clipping.kind == "adaptive":
        return float(clip_norm) > 0
    return float(clip_norm) == plan.clip_norm


def _require_known_round(
    plan: PrivacyParameters, study: Study, round_index: int, purpose: Purpose
) -> None:
    if purpose == "training" and not 0 <= round_index < plan.rounds:
        raise ConsiliumError(
            "privacy.round-unknown",
            f"The study has {plan.rounds} rounds; round {round_index} is not one of them.",
            hint="Rounds are counted from 0.",
        )
    if purpose == "evaluation" and round_index not in study.evaluations:
        known = ", ".join(str(number) for number in study.evaluations)
        raise ConsiliumError(
            "privacy.round-unknown",
            f"The study does not evaluate after {round_index} rounds.",
            hint=f"It evaluates after these numbers of rounds: {known}.",
        )
    if purpose == "statistics" and round_index != 0:
        raise ConsiliumError(
            "privacy.round-unknown",
            "The study's statistics are gathered once, before the first round.",
            hint="They are asked for as round 0.",
        )


def _refused(found: Price, refusal: Refusal) -> Price:
    return replace(
        found, allowed=False, code=refusal.code, reason=refusal.reason, hint=refusal.hint
    )


def _cap_refusal(found: Price, policy: Policy) -> Refusal | None:
    """Return why the cap for one study refuses it; None where it does not."""
    cap = policy.per_study_epsilon
    cost = max(found.study_epsilon or 0.0, found.evaluation_epsilon or 0.0)
    if cap is None or cost <= cap:
        return None
    return Refusal(
        "privacy.budget",
        f"The study costs ε {cost:.2f} at δ {found.delta:g}; this site's policy permits {cap:g} "
        "for one study.",
        "Propose fewer rounds or more noise, or raise per_study_epsilon in policy.yaml.",
    )


def _overrun_refusal(found: Price) -> Refusal | None:
    """Return why a study that may leave out nobody is refused; None where all can afford it."""
    if not found.leaves_out:
        return None
    return Refusal(
        "privacy.budget",
        "The study would overrun the privacy budget of patients at this site: "
        f"ε {found.budget:g} at δ {found.delta:g} per patient over all studies.",
        "Approve the study again, which leaves those patients out, or propose fewer rounds or "
        "more noise. `consilium site budget` shows what is left.",
    )


def _left_out_refusal(found: Price, policy: Policy) -> Refusal | None:
    """Return why too few remain once those who would overrun are left out; None where enough."""
    if not found.private:
        return None
    if found.patients < policy.minimal_cohort:
        return Refusal(
            "privacy.budget",
            "The study would overrun the privacy budget of patients at this site (ε "
            f"{found.budget:g} at δ {found.delta:g} per patient over all studies); without them "
            f"fewer than {policy.minimal_cohort} remain, the fewest its policy permits.",
            "Propose fewer rounds or more noise, or decline approved studies that will not run. "
            "`consilium site budget` shows what is left.",
        )
    if found.evaluation_epsilon is not None and not found.evaluated:
        return Refusal(
            "privacy.no-test-patients",
            "The study releases noised evaluation figures, and no test patient remains for them.",
            "Raise the share of test patients in site.yaml, or ask for evaluation.release none.",
        )
    return None
