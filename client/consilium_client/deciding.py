"""A site's decisions about studies: kept here first, signed, then told to the aggregator."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.leftovers import forget
from consilium_client.proposals import find, proposals, unclear
from consilium_client.store import Decision, StudyStore
from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.wire.channel import Caller
from consilium_common.wire.methods import SITE_DECIDE
from consilium_common.wire.statements import approval_statement, sign

if TYPE_CHECKING:
    from consilium_client.budget.policy_automatic import Asked
    from consilium_client.reviewing import Review


@dataclass(frozen=True)
class Decided:
    """A decision as it now stands here, and whether the aggregator knows."""

    decision: Decision
    #: Why the aggregator could not be told; None: it was. A running site tells it when it can.
    untold: ConsiliumError | None
    #: Results that were stored and now stay here for good.
    withheld: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "digest": self.decision.study.digest,
            "name": self.decision.study.name,
            "decision": self.decision.decision,
            "automatic": self.decision.automatic is not None,
            "told": self.untold is None,
            "withheld": self.withheld,
        }


def approve(
    home: SiteHome,
    identity: SiteIdentity,
    review: Review,
    *,
    automatic: Asked | None = None,
    why: str = "",
) -> Decided:
    """Sign the approval, remember it here, and tell the aggregator.

    Parameters
    ----------
    automatic : Asked, optional
        Of an approval by the policy itself: what its bounds were held against.
    why : str
        Signed with it; names the entry of the ledger that holds the policy of an automatic one.

    Raises
    ------
    ConsiliumError
        ``study.signatures-missing``; ``privacy.*`` when the site's policy or a patient's budget
        refuses the study.
    """
    review.proposal.require_signed()
    study, cost = review.proposal.study, review.price
    if not cost.allowed:
        raise ConsiliumError(cost.code, cost.reason, where=study.digest[:12], hint=cost.hint)
    decision = StudyStore(home).decide(
        study,
        "approved",
        review.cohort_size,
        why,
        evaluation_size=review.evaluation_size,
        left_out=cost.leaves_out,
        automatic=automatic,
    )
    return Decided(decision, tell(home, identity, decision))


def decline(home: SiteHome, identity: SiteIdentity, which: str, why: str) -> Decided:
    """Decline a study, approved before or not; needs no data, so that it can always be done."""
    known = _decided(home, which)
    study = known[0].study if len(known) == 1 else find(proposals(identity), which).study
    return _against(home, identity, study, why)


def withdraw(home: SiteHome, identity: SiteIdentity, which: str, why: str) -> Decided:
    """Take an approval back: training stops at its next step, and nothing stored is sent any more.

    It needs neither data nor a connection: what this site runs is decided by its own record. The
    ledger keeps what was charged, because a charge is made before anything is computed.

    Raises
    ------
    ConsiliumError
        ``study.not-approved``, ``study.ambiguous``.
    """
    found = [one for one in _decided(home, which) if one.decision == "approved"]
    if not found:
        raise ConsiliumError(
            "study.not-approved",
            f"{which!r} stands for no study that this site has approved.",
            hint="Decline what was not approved with `consilium site decline`.",
        )
    if len(found) > 1:
        raise unclear(which, len(found))
    return _against(home, identity, found[0].study, why)


def tell(home: SiteHome, identity: SiteIdentity, decision: Decision) -> ConsiliumError | None:
    """Tell the aggregator a decision; returns why it could not be reached, None when it knows.

    Raises
    ------
    ConsiliumError
        What the aggregator refuses. The decision stands here all the same.
    """
    with identity.caller() as caller:
        return tell_over(caller, home, identity, decision)


def tell_over(
    caller: Caller, home: SiteHome, identity: SiteIdentity, decision: Decision
) -> ConsiliumError | None:
    """Tell it over a connection that is open already; as :func:`tell`."""
    sizes = {
        "cohort_size": decision.cohort_size,
        "evaluation_size": decision.evaluation_size,
    }
    digest = decision.study.digest
    statement = approval_statement(
        digest, identity.config.name, decision.decision, **sizes, why=decision.why
    )
    store = StudyStore(home)
    try:
        caller.call(
            SITE_DECIDE,
            {
                "digest": digest,
                "decision": decision.decision,
                **sizes,
                "why": decision.why,
                "signature": sign(identity.signer(), statement),
            },
        )
    except ConsiliumError as error:
        if error.code.startswith("network."):
            return error
        store.note_told(decision)  # it was heard, and saying it again would change nothing
        raise
    store.note_told(decision)
    return None


def _decided(home: SiteHome, which: str) -> list[Decision]:
    """Return the decisions about studies of that name or beginning of their digest."""
    known = StudyStore(home).decisions()
    found = [one for one in known if which and one.study.digest.startswith(which)]
    return found or [one for one in known if one.study.name == which]


def _against(home: SiteHome, identity: SiteIdentity, study: Study, why: str) -> Decided:
    store = StudyStore(home)
    # Here first: what this site runs is decided by its own record, whatever the aggregator hears.
    decision = store.decide(study, "declined", 0, why)
    withheld = sum(bool(row["withheld"]) for row in store.updates(study.digest))
    with suppress(ConsiliumError):  # the decision stands all the same; `site start` tries again
        forget(home, decision)
    return Decided(decision, tell(home, identity, decision), withheld)
