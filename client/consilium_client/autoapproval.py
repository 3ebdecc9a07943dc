"""Approves by the site's policy, within its bounds and never beyond, while the site runs.

The running site looks at new proposals every few seconds. What passes the bounds that need no
data is reviewed in a process of its own (``python -m consilium_client.autoapproval``): preparing
cases and building networks must not slow the link. That process judges everything anew, all bounds
included, and approves as a person would: signed, noted, told to the aggregator.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_client.budget.policy import Policy, load_policy
from consilium_client.budget.policy_automatic import Asked
from consilium_client.deciding import Decided, approve, tell_over
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.proposals import Proposal, find, proposals, proposals_over
from consilium_client.standing import now_here
from consilium_client.store import Decision, StudyStore, decided_already
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.processes import die_with_parent
from consilium_common.wire.channel import Caller

if TYPE_CHECKING:
    from consilium_client.reviewing import Review

LOOK_SECONDS: Final = 5.0
#: A study that was refused is looked at again: other charges lapse, data is added.
_AGAIN_SECONDS: Final = 3600.0
#: States of a study in which an approval still means something.
_OPEN_STATES: Final = frozenset(
    {"proposed", "approved", "queued", "running", "paused", "stopped", "failed"}
)


async def approve_for_ever(
    home: SiteHome, identity: SiteIdentity, say: Callable[[str], None]
) -> None:
    """Approve what the policy approves, and tell the aggregator what it has not heard yet.

    Ends only when it is cancelled; whatever goes wrong is said once and tried again.
    """
    watch = Watch(home, identity, say)
    while True:
        await watch.look()
        await asyncio.sleep(LOOK_SECONDS)


class Watch:
    """What is remembered from one look at the proposals to the next.

    Parameters
    ----------
    say : callable
        Tells the site operator what they should know; the same only once.
    clock : callable
        Returns the time by which the hours count (default: this machine's).
    """

    def __init__(
        self,
        home: SiteHome,
        identity: SiteIdentity,
        say: Callable[[str], None],
        *,
        clock: Callable[[], dt.datetime] = now_here,
    ) -> None:
        self._home = home
        self._identity = identity
        self._say = say
        self._clock = clock
        #: By study and policy: when it was refused.
        self._refused: dict[tuple[str, bytes], dt.datetime] = {}
        self._problem = ""

    async def look(self) -> None:
        """Look once."""
        try:
            untold, policy = await asyncio.to_thread(self._work)
            candidates = []
            if untold or policy is not None:
                caller = self._identity.caller()
                try:
                    await asyncio.to_thread(self._tell, caller, untold)
                    if policy is not None:
                        candidates = await asyncio.to_thread(self._candidates, caller, policy)
                finally:
                    caller.close()  # of a site that stops nobody waits for an answer
            for digest in candidates:
                await self._review(digest)
            self._problem = ""
        except (ConsiliumError, OSError) as error:
            # The link itself says when there is no connection.
            problem = str(error)
            quiet = isinstance(error, ConsiliumError) and error.code.startswith("network.")
            if problem != self._problem and not quiet:
                self._say(f"nothing is approved automatically: {problem}")
            self._problem = problem

    def _work(self) -> tuple[list[Decision], Policy | None]:
        """Return what is to be told, and the policy where it approves something at this hour."""
        untold = StudyStore(self._home).untold()
        if not self._home.policy.exists():
            return untold, None  # said when the site started
        policy = load_policy(self._home)
        rule = policy.approve_automatically
        within = rule is not None and not rule.time_refusal(self._clock())
        return untold, policy if within else None

    def _tell(self, caller: Caller, untold: list[Decision]) -> None:
        for decision in untold:
            name = f"{decision.study.name} ({decision.study.digest[:12]})"
            try:
                if tell_over(caller, self._home, self._identity, decision) is not None:
                    return  # no connection: later
                self._say(f"told the aggregator that {name} is {decision.decision} here")
            except ConsiliumError as error:
                self._say(
                    f"the aggregator does not take that {name} is {decision.decision}: {error}"
                )

    def _candidates(self, caller: Caller, policy: Policy) -> list[str]:
        """Return the studies of operators and tasks that the policy names, not decided yet."""
        rule, now = policy.approve_automatically, self._clock()
        assert rule is not None
        key = canonical_json(policy.to_canonical())
        store, found = StudyStore(self._home), []
        for proposal in proposals_over(caller, self._identity):
            study = proposal.study
            since = self._refused.get((study.digest, key))
            fresh = since is None or (now - since).total_seconds() > _AGAIN_SECONDS
            if not fresh or not undecided(store, proposal):
                continue
            # Noted before the review: one that dies is not tried again at once.
            self._refused[study.digest, key] = now
            # ε is the reviewing process's: computing it here would slow the link.
            refusal = rule.study_refusal(Asked(proposal.proposed_by, study.task.kind, 0.0))
            if not refusal:
                found.append(study.digest)
            elif since is None:
                name = f"{study.name} ({study.digest[:12]})"
                self._say(f"{name} waits for a person: not approved automatically, {refusal}")
        return found

    async def _review(self, digest: str) -> None:
        log = os.open(
            self._home.logs / "autoapproval.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        try:
            self._say(await self._reviewed(digest, log))
        finally:
            os.close(log)

    async def _reviewed(self, digest: str, log: int) -> str:
        """Have a study reviewed in a process of its own; returns what came of it, in words."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "consilium_client.autoapproval"),
            *(str(self._home.path), digest),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            preexec_fn=die_with_parent,
        )
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        try:
            return str(json.loads(output)["said"])
        except (ValueError, KeyError, TypeError):
            return f"the review of {digest[:12]} for automatic approval ended without an answer"


def undecided(store: StudyStore, proposal: Proposal) -> bool:
    """Return whether nobody here has decided about a study, and it may still run.

    What a person has declined or withdrawn from is never approved by a machine.
    """
    return (
        store.decision(proposal.study.digest) is None
        and proposal.decision is None
        and proposal.missing == 0
        and proposal.state in _OPEN_STATES
    )


def public_refusal(policy: Policy, proposal: Proposal) -> str:
    """Return which bound a study exceeds by what stands in it, whatever the data; empty if none.

    It comes before the review, so that nobody's proposal makes this site prepare its cases in vain.
    """
    from consilium_common.privacy.accounting import epsilon_of, parameters

    rule = policy.approve_automatically
    if rule is None:
        return "the policy approves nothing automatically"
    study = proposal.study
    task = study.task.kind
    plan = parameters(study)
    epsilon = None
    if plan is not None:
        epsilon = epsilon_of(plan.events_of(plan.rounds), policy.budget.delta)
    return rule.study_refusal(Asked(proposal.proposed_by, task, epsilon))


def asked_of(review: Review) -> Asked:
    """Return what the bounds are held against: the study's price at this site."""
    return Asked(
        operator=review.proposal.proposed_by,
        task=review.proposal.study.task.kind,
        epsilon=review.price.study_epsilon,
        evaluation_epsilon=review.price.evaluation_epsilon,
    )


def automatic_refusal(policy: Policy, review: Review, moment: dt.datetime) -> str:
    """Return why the policy does not approve a reviewed study by itself; empty where it does."""
    rule = policy.approve_automatically
    if rule is None:
        return "the policy approves nothing automatically"
    if not review.price.allowed:
        return review.price.reason
    return rule.refusal(asked_of(review), moment)


def approve_automatically(
    home: SiteHome,
    identity: SiteIdentity,
    digest: str,
    *,
    clock: Callable[[], dt.datetime] = now_here,
) -> Decided:
    """Review a study and approve it if it is within every bound of the policy.

    The policy in force stands in the ledger before the approval does, and the signed approval
    names that entry.

    Raises
    ------
    ConsiliumError
        ``study.not-automatic`` when a bound is exceeded; ``study.decided`` when somebody decided
        meanwhile; those of the review and of the ledger.
    """
    from consilium_client.budget.policy_record import policy_entry
    from consilium_client.reviewing import review as review_study

    _refuse(public_refusal(load_policy(home), find(proposals(identity), digest)))
    review = review_study(home, identity, digest, None)
    # Read after the review, which may take long: what is said now counts.
    policy = load_policy(home)
    _refuse(automatic_refusal(policy, review, clock()))
    if not undecided(StudyStore(home), review.proposal):
        raise decided_already()
    entry = policy_entry(home, identity, policy)
    return approve(
        home,
        identity,
        review,
        automatic=asked_of(review),
        why=f"approved automatically by the policy of ledger entry {entry}",
    )


def _refuse(refusal: str) -> None:
    if refusal:
        raise ConsiliumError(
            "study.not-automatic",
            f"The policy does not approve it by itself: {refusal}.",
            hint="Look at it with `consilium site review` and decide.",
        )


def _main(home: Path, digest: str) -> dict[str, Any]:
    site = SiteHome.existing(home)
    try:
        decided = approve_automatically(site, SiteIdentity.load(site), digest)
    except ConsiliumError as error:
        said = f"{digest[:12]} waits for a person: {error.message} ({error.code})"
        return {"approved": False, "said": said}
    study = decided.decision.study
    said = f"approved {study.name} ({study.digest[:12]}) automatically, as the policy says"
    return {"approved": True, "said": said}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(Path(sys.argv[1]), sys.argv[2])) + "\n")
