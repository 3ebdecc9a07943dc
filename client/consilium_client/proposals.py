"""What is proposed to this site: each study's digest and every signature checked here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from consilium_client.identity import SiteIdentity
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role
from consilium_common.identity.trust import Trust
from consilium_common.study import Study
from consilium_common.study.approval import standing
from consilium_common.study.load import study_from_canonical
from consilium_common.wire.channel import Caller
from consilium_common.wire.methods import SITE_STUDIES
from consilium_common.wire.statements import (
    check_signed,
    cosignature_statement,
    proposal_statement,
)

#: More signatures of one study than any can ask for.
_MOST_SIGNATURES = 64


@dataclass(frozen=True)
class Proposal:
    """A proposed study, its signatures checked."""

    study: Study
    proposed_by: str
    proposed_at: str
    state: str
    decision: str | None
    #: Further operators whose signatures are good.
    cosigned_by: tuple[str, ...] = ()

    @property
    def signed_by(self) -> tuple[str, ...]:
        """Everybody whose signature is good, the proposer first."""
        return tuple(dict.fromkeys((self.proposed_by, *self.cosigned_by)))

    @property
    def missing(self) -> int:
        """How many signatures the study still lacks before it may be approved."""
        approval = self.study.approval
        return 0 if approval is None else approval.missing(self.signed_by)

    @property
    def standing(self) -> str:
        """In words, who has signed."""
        return standing(self.study.approval, self.signed_by, self.proposed_by)

    def require_signed(self) -> None:
        """Raise ``study.signatures-missing`` unless all the study asks for have signed."""
        if self.missing:
            raise ConsiliumError(
                "study.signatures-missing",
                f"The study lacks signatures: {self.standing}.",
                where=f"study {self.study.digest[:12]}",
                hint="The operators named in it sign with `consilium study sign`.",
            )


def proposals(identity: SiteIdentity) -> list[Proposal]:
    """Ask the aggregator for all proposals and check each one's digest and signatures.

    Raises
    ------
    ConsiliumError
        ``identity.bad-signature`` or ``study.digest`` when the aggregator shows a study that its
        operator did not sign: one bad proposal hides nothing, it is an alarm. ``network.garbage``.
    """
    with identity.caller() as caller:
        return proposals_over(caller, identity)


def proposals_over(caller: Caller, identity: SiteIdentity) -> list[Proposal]:
    """Ask over a connection that is open already; as :func:`proposals`."""
    answer = caller.call(SITE_STUDIES, {})
    trust = identity.trust
    try:
        return [_checked(row, trust) for row in answer["studies"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConsiliumError(
            "network.garbage",
            "The aggregator's list of studies cannot be read.",
            hint="Site and aggregator may run releases that do not fit; update the older one.",
        ) from error


def find(known: list[Proposal], which: str) -> Proposal:
    """Return the proposal of that name or beginning of its digest."""
    found = [p for p in known if which and p.study.digest.startswith(which)]
    found = found or [p for p in known if p.study.name == which]
    if len(found) != 1:
        raise unclear(which, len(found))
    return found[0]


def unclear(which: str, count: int) -> ConsiliumError:
    """Return what is said when a name or some digits stand for none or several studies."""
    return ConsiliumError(
        "study.unknown" if not count else "study.ambiguous",
        f"{which!r} stands for {count or 'no'} proposed studies.",
        hint="See `consilium site studies` and give more digits of the digest.",
    )


def _checked(row: dict[str, Any], trust: Trust) -> Proposal:
    study = study_from_canonical(row["canonical"])
    if study.digest != row["digest"]:
        raise ConsiliumError(
            "study.digest", "The aggregator shows a study under another study's digest."
        )
    proposer = str(row["proposed_by"])
    check_signed(
        proposal_statement(study.digest, proposer),
        str(row["signature"]),
        str(row["signer_pem"]),
        trust,
        name=proposer,
        role=Role.PROPOSER,
        kept=True,
    )
    decision = row["decision"]
    return Proposal(
        study,
        proposer,
        str(row["proposed_at"]),
        str(row["state"]),
        None if decision is None else str(decision),
        # A release before several could sign shows none, and its studies ask for none.
        _cosigners(study, row.get("signatures", [])[:_MOST_SIGNATURES], trust),
    )


def _cosigners(study: Study, rows: list[dict[str, Any]], trust: Trust) -> tuple[str, ...]:
    """Return who has signed too; of those whom the study does not name nothing is asked."""
    named = () if study.approval is None else study.approval.operators
    found = []
    for row in rows:
        operator = str(row["operator"])
        if operator in named:
            check_signed(
                cosignature_statement(study.digest, operator),
                str(row["signature"]),
                str(row["signer_pem"]),
                trust,
                name=operator,
                role=Role.PROPOSER,
                kept=True,
            )
            found.append(operator)
    return tuple(found)
