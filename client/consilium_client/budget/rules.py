"""What a site's policy permits of a study, whatever was spent so far; each no with its remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from consilium_client.budget.policy import Policy
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Purpose
from consilium_common.privacy.accounting import epsilon_of
from consilium_common.privacy.events import PrivacyEvent, PrivacyParameters

if TYPE_CHECKING:
    from consilium_common.study.schema import Study


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


def policy_refusal(
    policy: Policy,
    study: Study,
    plan: PrivacyParameters | None,
    patients: int,
    *,
    purpose: Purpose = "training",
) -> Refusal | None:
    """Return why the policy refuses a study; None where it does not.

    Parameters
    ----------
    plan : PrivacyParameters or None
        The study's mechanism, None without privacy.
    patients : int
        Patients that the training (and the statistics), or the evaluation, would touch.
    purpose : str
        The minimal cohort is not asked of an evaluation: that is of few patients by nature, and
        its noise does not shrink with their number.
    """
    refused = _study_refusal(policy, study, plan)
    if refused is not None:
        return refused
    if purpose != "evaluation" and patients < policy.minimal_cohort:
        # How many there are stays at the site: it is a fact about its data.
        return Refusal(
            "privacy.cohort-too-small",
            f"The site has fewer than {policy.minimal_cohort} patients for this study, the "
            "fewest its policy permits.",
            "Import more cases, or lower minimal_cohort in the site's policy.yaml.",
        )
    delta = policy.budget.delta
    if plan is not None and delta * patients >= 1:
        return Refusal(
            "privacy.delta-too-large",
            f"δ {delta:g} of the site's policy is not below 1 / number of patients, so the "
            "promise would be empty.",
            "Lower budget.delta in the site's policy.yaml, best to 1 / (10 × patients).",
        )
    return None


def _study_refusal(policy: Policy, study: Study, plan: PrivacyParameters | None) -> Refusal | None:
    """Return why the policy refuses the study for what stands in it; None where it does not."""
    if study.privacy.mode == "none":
        if not policy.permit_non_private:
            return Refusal(
                "privacy.non-private-refused",
                "The study has no differential privacy, which this site's policy does not permit.",
                "Give the study privacy, or set permit_non_private in the site's policy.yaml.",
            )
    elif study.privacy.model not in policy.permitted_threat_models:
        return Refusal(
            "privacy.threat-model-refused",
            f"The study's threat model is {study.privacy.model}, which this site's policy does "
            "not permit.",
            "Add it to permitted_threat_models in the site's policy.yaml, if you trust it.",
        )
    if study.federation.quorum < policy.minimal_sites:
        return Refusal(
            "privacy.too-few-sites",
            f"The study needs only {study.federation.quorum} sites for a round; this site's "
            f"policy asks for {policy.minimal_sites}.",
            "Raise federation.quorum in the study, or lower minimal_sites in the site's "
            "policy.yaml.",
        )
    if study.evaluation.release == "exact" and not policy.release_exact_metrics:
        return Refusal(
            "privacy.metrics-refused",
            "The study releases exact evaluation figures, which this site's policy does not "
            "permit.",
            "Set evaluation.release to none, or release_exact_metrics in the site's policy.yaml.",
        )
    return _metrics_refusal(policy, plan)


def _metrics_refusal(policy: Policy, plan: PrivacyParameters | None) -> Refusal | None:
    """Return why noised figures are refused: those of test patients, or the statistics.

    The cap holds for each alone: evaluations are of test patients and statistics of training
    patients, so nobody pays for both.
    """
    counted = None if plan is None else plan.statistics_event
    for event, what, key in (
        (whole_evaluation(plan), "evaluation figures", "evaluation"),
        (counted, "statistics", "statistics"),
    ):
        refused = None if event is None else _noised_refusal(policy, event, what, key)
        if refused is not None:
            return refused
    return None


def _noised_refusal(policy: Policy, event: PrivacyEvent, what: str, key: str) -> Refusal | None:
    cap = policy.private_metrics_epsilon
    if cap is None:
        off = "evaluation.release to none" if key == "evaluation" else "statistics to null"
        return Refusal(
            "privacy.metrics-refused",
            f"The study releases noised {what}, which this site's policy does not permit.",
            f"Set {off}, or private_metrics_epsilon in the site's policy.yaml.",
        )
    delta = policy.budget.delta
    cost = epsilon_of([event], delta)
    if cost > cap:
        return Refusal(
            "privacy.metrics-refused",
            f"The study's {what} cost ε {cost:.2f} at δ {delta:g}; this site's policy "
            f"permits {cap:g}.",
            f"Lower {key}.epsilon in the study, or raise private_metrics_epsilon in the "
            "site's policy.yaml.",
        )
    return None


def whole_evaluation(plan: PrivacyParameters | None) -> PrivacyEvent | None:
    """Return what all released evaluations of a study cost a test patient; None without any."""
    if plan is None or plan.evaluation_noise is None or not plan.evaluations:
        return None
    return PrivacyEvent(1.0, plan.evaluation_noise, plan.evaluations)
