"""Proposals as this site sees them: checked, priced, approved or declined."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from consilium_client.budget.charging import Price, price
from consilium_client.budget.policy import load_policy
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.store import StudyStore
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import validate_network
from consilium_common.study import Study
from consilium_common.study.load import study_from_canonical
from consilium_common.wire.methods import SITE_DECIDE, SITE_STUDIES
from consilium_common.wire.statements import (
    approval_statement,
    check_signed,
    proposal_statement,
    sign,
)


@dataclass(frozen=True)
class Proposal:
    """A proposed study, its signature checked."""

    study: Study
    proposed_by: str
    proposed_at: str
    state: str
    decision: str | None


def proposals(identity: SiteIdentity) -> list[Proposal]:
    """Ask the aggregator for all proposals and check each one's digest and signature.

    Raises
    ------
    ConsiliumError
        ``identity.bad-signature`` or ``study.digest`` when the aggregator shows a study that its
        operator did not sign: one bad proposal hides nothing, it is an alarm.
    """
    with identity.caller() as caller:
        rows: list[dict[str, Any]] = caller.call(SITE_STUDIES, {})["studies"]
    found = []
    for row in rows:
        study = study_from_canonical(row["canonical"])
        if study.digest != row["digest"]:
            raise ConsiliumError(
                "study.digest", "The aggregator shows a study under another study's digest."
            )
        check_signed(
            proposal_statement(study.digest, row["proposed_by"]),
            row["signature"],
            row["signer_pem"],
            identity.authority,
            name=row["proposed_by"],
        )
        found.append(
            Proposal(study, row["proposed_by"], row["proposed_at"], row["state"], row["decision"])
        )
    return found


def find(identity: SiteIdentity, which: str) -> Proposal:
    """Return the proposal of that name or beginning of its digest."""
    everything = proposals(identity)
    found = [p for p in everything if which and p.study.digest.startswith(which)]
    found = found or [p for p in everything if p.study.name == which]
    if len(found) != 1:
        raise ConsiliumError(
            "study.unknown" if not found else "study.ambiguous",
            f"{which!r} stands for {len(found) or 'no'} proposed studies.",
            hint="See `consilium site studies` and give more digits of the digest.",
        )
    return found[0]


@dataclass(frozen=True)
class Review:
    """What approving would mean here."""

    proposal: Proposal
    patients: int  #: training patients who would take part, exact; stays here
    evaluated: int  #: test patients whom evaluations would score, exact; stays here
    cohort_size: int  #: training patients as they would be declared
    evaluation_size: int  #: test patients as they would be declared; 0 where no figure leaves
    price: Price


def review(
    home: SiteHome,
    identity: SiteIdentity,
    which: str,
    cohort_size: int | None,
    evaluation_size: int | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Review:
    """Open the cohort that the study would train and evaluate on, and price the study for it.

    Parameters
    ----------
    cohort_size : int or None
        Number of training patients to declare; None declares :func:`declared_size` of those who
        are not left out.
    evaluation_size : int or None
        Number of test patients to declare, the denominator of the released mean score; None
        declares :func:`declared_evaluation_size`. Only for a study that releases noised figures.
    say : callable, optional
        Takes a line on how much room the prepared cases will take, before they are made.

    Raises
    ------
    ConsiliumError
        ``data.*`` when the data does not fit the study, ``study.*``, ``identity.*``;
        ``usage.evaluation-size`` where the study releases no noised figures.
    """
    from consilium_client.data.cohort import open_cohort
    from consilium_common.ledger.store import Ledger

    proposal = find(identity, which)
    study = proposal.study
    releases = study.evaluation.release == "private"
    if evaluation_size is not None and not releases:
        raise ConsiliumError(
            "usage.evaluation-size",
            "The study releases no noised evaluation figures, so no number of test patients is "
            "declared.",
            hint="Leave --evaluation-size out.",
        )
    validate_network(study)
    cohort = open_cohort(home, study, say=say)
    patients = [patient.key for patient in cohort.patients("train")]
    tested = [patient.key for patient in cohort.patients("test")]
    policy = load_policy(home)
    others = StudyStore(home).decisions()
    with Ledger.open(home.ledger, identity.signer(), site=identity.config.name) as ledger:
        cost = price(ledger, policy, study, patients, tested, others=others)
    return Review(
        proposal=proposal,
        patients=cost.patients,
        evaluated=cost.evaluated,
        cohort_size=cohort_size or declared_size(cost.patients),
        evaluation_size=(evaluation_size or declared_evaluation_size(cost.evaluated))
        if releases
        else 0,
        price=cost,
    )


def declared_size(patients: int) -> int:
    """Return the cohort size to declare: rounded down, so one patient more or less rarely shows."""
    step = 5 if patients >= 10 else 1
    return max(1, patients // step * step)


def declared_evaluation_size(patients: int) -> int:
    """Return the number of test patients to declare: from ten on the nearest multiple of five.

    It is the denominator of the released mean. Scores are centred before they are summed, so a
    denominator that is off by a share scales only the mean's distance from 1/2 by that share: at
    20 patients and a mean of .8 one of two off moves it by .03. Nearest, and not down as for the
    cohort, because rounding down would show every mean better than it is.
    """
    return max(1, patients if patients < 10 else (patients + 2) // 5 * 5)


def approve(home: SiteHome, identity: SiteIdentity, review: Review) -> dict[str, Any]:
    """Sign the approval, remember it here, and tell the aggregator.

    Raises
    ------
    ConsiliumError
        ``privacy.*`` when the site's policy or a patient's budget refuses the study.
    """
    study, cost = review.proposal.study, review.price
    if not cost.allowed:
        raise ConsiliumError(cost.code, cost.reason, where=study.digest[:12], hint=cost.hint)
    return _send_decision(
        home,
        identity,
        study,
        decision="approved",
        cohort_size=review.cohort_size,
        evaluation_size=review.evaluation_size,
        left_out=cost.leaves_out,
    )


def decline(home: SiteHome, identity: SiteIdentity, which: str, why: str) -> dict[str, Any]:
    """Decline a study; needs no data, so that it can always be done."""
    study = find(identity, which).study
    return _send_decision(home, identity, study, decision="declined", why=why)


def _send_decision(
    home: SiteHome,
    identity: SiteIdentity,
    study: Study,
    *,
    decision: str,
    cohort_size: int = 0,
    evaluation_size: int = 0,
    why: str = "",
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    sizes = {"cohort_size": cohort_size, "evaluation_size": evaluation_size}
    statement = approval_statement(study.digest, identity.config.name, decision, **sizes, why=why)
    # Here first: what this site runs is decided by its own record, whatever the aggregator hears.
    StudyStore(home).decide(
        study, decision, cohort_size, why, evaluation_size=evaluation_size, left_out=left_out
    )
    with identity.caller() as caller:
        answer: dict[str, Any] = caller.call(
            SITE_DECIDE,
            {
                "digest": study.digest,
                "decision": decision,
                **sizes,
                "why": why,
                "signature": sign(identity.signer(), statement),
            },
        )
    return answer
