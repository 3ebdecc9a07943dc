"""What a study costs this site's patients, and whether they can still afford it.

Budgets are kept per patient over all studies: the ledger's events of every patient are composed
with the rest of the study's plan, so a study that would overrun anybody is refused before it
starts and again before each round. Patients of equal history share one computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from consilium_client.budget_table import BudgetTable, budget_command, budget_table
from consilium_client.policy import Policy
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Entry
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import epsilon_of, parameters
from consilium_common.privacy.events import (
    ADJACENCY,
    UNIT,
    PrivacyEvent,
    PrivacyParameters,
    grouped,
)

if TYPE_CHECKING:
    from consilium_common.study.schema import Study

__all__ = [
    "BudgetTable",
    "Price",
    "Refusal",
    "budget_command",
    "budget_table",
    "charge_round",
    "price",
    "record_policy",
    "require_affordable",
    "require_permitted",
]


@dataclass(frozen=True)
class Price:
    """What a study costs the patients of one site; ε is for unit patient, add or remove one.

    Parameters
    ----------
    study : str
        Digest of the study.
    private : bool
        False: no differential privacy, and every ε is None.
    patients : int
        Patients in the cohort.
    delta : float
        The policy's δ, at which ``study_epsilon``, ``before`` and ``after`` are computed.
    declared_delta, declared_epsilon : float or None
        The study's own δ, and ε of the whole study at it.
    study_epsilon : float or None
        ε of the whole study on its own.
    before, after : float or None
        ε over all studies of the patient who will have spent most: now, and once the rest of the
        study has run.
    budget, remaining : float
        ε a patient may spend, and what that patient has left now.
    overrun : int
        Patients whose budget the rest of the study would overrun.
    rounds_charged, rounds_left : int
        Rounds of this study that are charged and stand, and those still to come.
    allowed : bool
        Whether policy and budget permit it; ``code`` and ``reason`` say why not.
    """

    study: str
    private: bool
    patients: int
    delta: float
    declared_delta: float | None
    declared_epsilon: float | None
    study_epsilon: float | None
    before: float | None
    after: float | None
    budget: float
    remaining: float
    overrun: int
    rounds_charged: int
    rounds_left: int
    allowed: bool
    code: str = ""
    reason: str = ""
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with unit and adjacency."""
        return {"unit": UNIT, "adjacency": ADJACENCY, **asdict(self)}

    def sentence(self) -> str:
        """Say the price in words, for approval by a person."""
        if not self.private:
            return f"No differential privacy: no formal protection of {self.patients} patients."
        return (
            f"ε {self.study_epsilon:.2f} at δ {self.delta:g} for {self.patients} patients; the "
            f"patient who has spent most goes from {self.before:.2f} to {self.after:.2f} of "
            f"{self.budget:g} (unit patient, add or remove one)."
        )


@dataclass(frozen=True)
class Refusal:
    """Why a study may not run here."""

    code: str
    reason: str
    hint: str

    def error(self, study: Study) -> ConsiliumError:
        """Return the refusal as the error that stops the study."""
        return ConsiliumError(
            self.code, self.reason, where=f"study {study.digest[:12]}", hint=self.hint
        )


def price(
    ledger: Ledger | LedgerState, policy: Policy, study: Study, patients: Sequence[str]
) -> Price:
    """Price the rest of a study for these patients against the site's policy.

    Rounds of the study that are charged and stand count once, with what was really charged; the
    rounds still to come are added to every patient's history over all studies.

    Parameters
    ----------
    ledger : Ledger or LedgerState
        The site's ledger.
    policy, study
        What the site permits and what is asked.
    patients : sequence of str
        Keyed hashes of the training cohort.

    Raises
    ------
    ConsiliumError
        ``privacy.unreachable`` when no noise keeps the study's own ε. A refusal is no error here:
        see ``allowed``; :func:`require_affordable` raises.
    """
    state = ledger.state if isinstance(ledger, Ledger) else ledger
    cohort = frozenset(patients)
    plan = parameters(study)
    if plan is None:
        return _non_private(policy, study, len(cohort))
    delta = policy.budget.delta
    charged = {charge.round_index for charge in state.standing(study.digest)}
    left = sum(index not in charged for index in range(plan.rounds))
    rest = plan.event_of(left) if left else None
    now: list[float] = []
    then: list[tuple[float, float, int]] = []
    for history, number in state.histories(cohort).items():
        before = epsilon_of(history, delta)
        after = epsilon_of(grouped((*history, rest)), delta) if rest else before
        now.append(before)
        then.append((after, before, number))
    after, before, _ = max(then, default=(0.0, 0.0, 0))
    alone = _alone(state, study, cohort, rest, delta)
    budget = policy.budget.epsilon
    overrun = sum(number for epsilon, _, number in then if epsilon > budget)
    found = Price(
        study=study.digest,
        private=True,
        patients=len(cohort),
        delta=delta,
        declared_delta=plan.delta,
        declared_epsilon=epsilon_of([plan.event_total], plan.delta),
        study_epsilon=alone,
        before=before,
        after=after,
        budget=budget,
        remaining=max(0.0, budget - before),
        overrun=overrun,
        rounds_charged=len(charged),
        rounds_left=left,
        allowed=True,
    )
    return _judged(found, policy, study)


def require_affordable(
    ledger: Ledger | LedgerState, policy: Policy, study: Study, patients: Sequence[str]
) -> Price:
    """Return the price of the rest of a study, or refuse it.

    Raises
    ------
    ConsiliumError
        ``privacy.budget``, ``privacy.delta-too-large``, ``privacy.non-private-refused``,
        ``privacy.metrics-refused``, ``privacy.cohort-too-small``.
    """
    found = price(ledger, policy, study, patients)
    if not found.allowed:
        raise Refusal(found.code, found.reason, found.hint).error(study)
    return found


def require_permitted(policy: Policy, study: Study, patients: Sequence[str]) -> None:
    """Refuse a study that the policy does not permit, whatever was spent so far.

    Raises
    ------
    ConsiliumError
        ``privacy.non-private-refused``, ``privacy.metrics-refused``,
        ``privacy.cohort-too-small``, ``privacy.delta-too-large``.
    """
    refused = _policy_refusal(policy, study, len(set(patients)))
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
) -> Entry:
    """Charge one round if policy and budget still permit the rest of the study.

    Check and charge are one transaction: no other process can spend in between. The mechanism
    that will run must be the one the study names.

    Parameters
    ----------
    ledger, policy, study, patients
        As for :func:`price`.
    round_index : int
        Round, from 0, below the study's number of rounds.
    event : PrivacyEvent
        What the mechanism that will run says of itself for one round.
    clip_norm : float
        C of that mechanism.

    Raises
    ------
    ConsiliumError
        What :func:`require_affordable` and :meth:`Ledger.charge` raise;
        ``privacy.mechanism-differs`` when event or clip norm are not the study's.
    """
    plan = parameters(study)
    if plan is None:
        raise ConsiliumError("privacy.nothing-to-charge", "The study has no privacy to charge for.")
    _same_mechanism(plan, event, clip_norm, round_index)
    record_policy(ledger, policy)
    # The price is computed before as well: what follows finds it cached and holds the lock briefly.
    require_affordable(ledger, policy, study, patients)
    return ledger.charge(
        study=study.digest,
        round_index=round_index,
        event=event,
        clip_norm=clip_norm,
        delta=plan.delta,
        patients=patients,
        guard=lambda state: require_affordable(state, policy, study, patients),
    )


def record_policy(ledger: Ledger, policy: Policy) -> None:
    """Write the policy into the ledger where it differs from the last one recorded."""
    if ledger.state.policy != policy.to_canonical():
        ledger.record_policy(policy.to_canonical())


def _alone(
    state: LedgerState,
    study: Study,
    cohort: frozenset[str],
    rest: PrivacyEvent | None,
    delta: float,
) -> float:
    """Return ε of the whole study on its own: what it has charged and what is to come."""
    return max(
        (
            epsilon_of(grouped((*history, rest)) if rest else history, delta)
            for history in state.histories(cohort, study=study.digest)
        ),
        default=0.0,
    )


def _non_private(policy: Policy, study: Study, patients: int) -> Price:
    found = Price(
        study=study.digest,
        private=False,
        patients=patients,
        delta=policy.budget.delta,
        declared_delta=None,
        declared_epsilon=None,
        study_epsilon=None,
        before=None,
        after=None,
        budget=policy.budget.epsilon,
        remaining=policy.budget.epsilon,
        overrun=0,
        rounds_charged=0,
        rounds_left=study.federation.rounds,
        allowed=True,
    )
    return _judged(found, policy, study)


def _judged(found: Price, policy: Policy, study: Study) -> Price:
    """Return the price with the first reason why policy or budget refuse it, if there is one."""
    refused = _refusal(found, policy, study)
    if refused is None:
        return found
    return replace(
        found, allowed=False, code=refused.code, reason=refused.reason, hint=refused.hint
    )


def _refusal(found: Price, policy: Policy, study: Study) -> Refusal | None:
    """Return why policy or budget refuse a study at its price; None where they do not."""
    refused = _policy_refusal(policy, study, found.patients)
    if refused is not None or not found.private:
        return refused
    assert found.study_epsilon is not None
    cap = policy.per_study_epsilon
    if cap is not None and found.study_epsilon > cap:
        return Refusal(
            "privacy.budget",
            f"The study costs ε {found.study_epsilon:.2f} at δ {found.delta:g}; this site's policy "
            f"permits {cap:g} for one study.",
            "Propose fewer rounds or more noise, or raise per_study_epsilon in policy.yaml.",
        )
    if found.overrun:
        return Refusal(
            "privacy.budget",
            f"The study would overrun the privacy budget of patients at this site: "
            f"ε {found.budget:g} at δ {found.delta:g} per patient over all studies.",
            "Propose fewer rounds or more noise. `consilium site budget` shows what is left.",
        )
    return None


def _policy_refusal(policy: Policy, study: Study, patients: int) -> Refusal | None:
    """Return why the policy refuses a study, whatever was spent; None where it does not."""
    private = study.privacy.mode != "none"
    if not private and not policy.permit_non_private:
        return Refusal(
            "privacy.non-private-refused",
            "The study has no differential privacy, which this site's policy does not permit.",
            "Give the study privacy, or set permit_non_private in the site's policy.yaml.",
        )
    if study.evaluation.release == "exact" and not policy.release_exact_metrics:
        return Refusal(
            "privacy.metrics-refused",
            "The study releases exact evaluation figures, which this site's policy does not "
            "permit.",
            "Set evaluation.release to none, or release_exact_metrics in the site's policy.yaml.",
        )
    if patients < policy.minimal_cohort:
        # How many there are stays at the site: it is a fact about its data.
        return Refusal(
            "privacy.cohort-too-small",
            f"The site has fewer than {policy.minimal_cohort} patients for this study, the "
            "fewest its policy permits.",
            "Import more cases, or lower minimal_cohort in the site's policy.yaml.",
        )
    delta = policy.budget.delta
    if private and delta * patients >= 1:
        return Refusal(
            "privacy.delta-too-large",
            f"δ {delta:g} of the site's policy is not below 1 / number of patients, so the "
            "promise would be empty.",
            "Lower budget.delta in the site's policy.yaml, best to 1 / (10 × patients).",
        )
    return None


def _same_mechanism(
    plan: PrivacyParameters, event: PrivacyEvent, clip_norm: float, round_index: int
) -> None:
    if event != plan.event_per_round or float(clip_norm) != plan.clip_norm:
        raise ConsiliumError(
            "privacy.mechanism-differs",
            "The mechanism that would run is not the one the study names (sampling rate, noise, "
            "steps or clip norm).",
            hint="This is a fault of the program: nothing was charged and nothing ran. Report it.",
        )
    if not 0 <= round_index < plan.rounds:
        raise ConsiliumError(
            "privacy.round-unknown",
            f"The study has {plan.rounds} rounds; round {round_index} is not one of them.",
            hint="Rounds are counted from 0.",
        )
