"""Proposals as this site sees them: checked, priced, approved or declined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from consilium_client.budget import Price, price
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.policy import load_policy
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
    patients: int  #: training patients, exact; stays here
    cohort_size: int  #: what would be declared
    price: Price


def review(home: SiteHome, identity: SiteIdentity, which: str, cohort_size: int | None) -> Review:
    """Open the cohort that the study would train on, and price the study for it.

    Parameters
    ----------
    cohort_size : int or None
        Number to declare; None declares the number of training patients rounded down to a multiple
        of five (of one below ten), so that the public number is not the exact one.

    Raises
    ------
    ConsiliumError
        ``data.*`` when the data does not fit the study, ``study.*``, ``identity.*``.
    """
    from consilium_client.data.cohort import open_cohort
    from consilium_common.ledger.store import Ledger

    proposal = find(identity, which)
    validate_network(proposal.study)
    cohort = open_cohort(home, proposal.study)
    patients = [patient.key for patient in cohort.patients("train")]
    policy = load_policy(home)
    with Ledger.open(home.ledger, identity.signer(), site=identity.config.name) as ledger:
        cost = price(ledger, policy, proposal.study, patients)
    return Review(proposal, len(patients), cohort_size or declared_size(len(patients)), cost)


def declared_size(patients: int) -> int:
    """Return the cohort size to declare: rounded down, so one patient more or less rarely shows."""
    step = 5 if patients >= 10 else 1
    return max(1, patients // step * step)


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
        home, identity, study, decision="approved", cohort_size=review.cohort_size, why=""
    )


def decline(home: SiteHome, identity: SiteIdentity, which: str, why: str) -> dict[str, Any]:
    """Decline a study; needs no data, so that it can always be done."""
    study = find(identity, which).study
    return _send_decision(home, identity, study, decision="declined", cohort_size=0, why=why)


def _send_decision(
    home: SiteHome,
    identity: SiteIdentity,
    study: Study,
    *,
    decision: str,
    cohort_size: int,
    why: str,
) -> dict[str, Any]:
    statement = approval_statement(study.digest, identity.config.name, decision, cohort_size, why)
    # Here first: what this site runs is decided by its own record, whatever the aggregator hears.
    StudyStore(home).decide(study, decision, cohort_size, why)
    with identity.caller() as caller:
        answer: dict[str, Any] = caller.call(
            SITE_DECIDE,
            {
                "digest": study.digest,
                "decision": decision,
                "cohort_size": cohort_size,
                "why": why,
                "signature": sign(identity.signer(), statement),
            },
        )
    return answer
