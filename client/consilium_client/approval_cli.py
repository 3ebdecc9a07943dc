"""`consilium site studies`, `review`, `approve`, `decline`, `withdraw`: what may run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_client.home import SiteHome
from consilium_client.identity_cli import DEFAULT_HOME, Home
from consilium_common.console import command, note, result

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_client.deciding import Decided
    from consilium_client.reviewing import Review

Which = Annotated[str, typer.Argument(help="Name of the study, or first digits of its digest.")]
Cohort = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Cohort size to declare in public (default: training patients, rounded down).",
    ),
]
Tested = Annotated[
    int | None,
    typer.Option(
        "--evaluation-size",
        min=1,
        help="Test patients to declare in public, where noised evaluation figures leave "
        "(default: to the nearest five).",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        help="Study to compare with, by name or digest (default: the one of the same name that "
        "was approved last)."
    ),
]


@command
def studies(home: Home = DEFAULT_HOME) -> None:
    """List proposed studies: who signed each, and what this site decided."""
    from consilium_client.identity import SiteIdentity
    from consilium_client.proposals import proposals
    from consilium_client.store import StudyStore

    site = SiteHome.existing(home)
    known = proposals(SiteIdentity.load(site))
    # What runs here is decided by the site's own record, whatever the aggregator shows.
    decided = {one.study.digest: one for one in StudyStore(site).decisions()}
    rows: list[dict[str, Any]] = []
    for proposal in known:
        ours = decided.get(proposal.study.digest)
        rows.append(
            {
                "digest": proposal.study.digest,
                "name": proposal.study.name,
                "privacy": proposal.study.privacy.mode,
                "proposed_by": proposal.proposed_by,
                "proposed_at": proposal.proposed_at,
                "signed_by": list(proposal.signed_by),
                "signatures_missing": proposal.missing,
                "signatures": proposal.standing,
                "state": proposal.state,
                "decision": None if ours is None else ours.decision,
                "decision_at_aggregator": proposal.decision,
                "decided_at": None if ours is None else ours.decided_at,
                "automatic": ours is not None and ours.automatic is not None,
                "why": "" if ours is None else ours.why,
            }
        )

    def people(console: Console) -> None:
        from rich.table import Table

        table = Table("study", "digest", "privacy", "signatures", "state", "our decision")
        for row in rows:
            table.add_row(
                row["name"],
                str(row["digest"])[:12],
                row["privacy"],
                row["signatures"],
                row["state"],
                f"{row['decision'] or 'open'}{' by policy' if row['automatic'] else ''}",
            )
        console.print(table if rows else "No study was proposed yet.")

    result({"studies": rows}, people)


@command
def review(
    study: Which,
    cohort_size: Cohort = None,
    evaluation_size: Tested = None,
    against: Against = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Show in words what a study would do here, on which cases, what would leave, what it costs,
    and what changed against the version that was approved last.
    """
    found = _review(home, study, cohort_size, evaluation_size, against)
    result(_review_data(found), "\n".join(_review_lines(found)))


@command
def approve(
    study: Which,
    cohort_size: Cohort = None,
    evaluation_size: Tested = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Approve a study: sign its digest. Nothing else may ever run under this approval.

    Patients whose privacy budget the study would overrun are left out of it from here on.
    """
    from consilium_client.deciding import approve as approve_study
    from consilium_client.identity import SiteIdentity

    found = _review(home, study, cohort_size, evaluation_size)
    if not yes:
        note("\n".join(_review_lines(found)))
        typer.confirm("Approve?", abort=True, err=True)
    site = SiteHome.existing(home)
    answer = approve_study(site, SiteIdentity.load(site), found)
    tested = f" and {found.evaluation_size} test patients" if found.evaluation_size else ""
    result(
        {**_review_data(found), **answer.to_dict()},
        f"Approved {found.proposal.study.name} ({found.proposal.study.digest[:12]}), declaring"
        f" {found.cohort_size} patients{tested}. {found.price.sentences()[0]}{_untold(answer)}",
    )


@command
def decline(
    study: Which,
    why: Annotated[str, typer.Option(help="Shown to the aggregator operator.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Decline a study; one that was approved is withdrawn from."""
    from consilium_client.deciding import decline as decline_study
    from consilium_client.identity import SiteIdentity

    site = SiteHome.existing(home)
    answer = decline_study(site, SiteIdentity.load(site), study, why)
    result(
        answer.to_dict(),
        f"Declined {_named(answer)}.{_stays(answer)}{_own(site, answer)}{_untold(answer)}",
    )


@command
def withdraw(
    study: Which,
    why: Annotated[str, typer.Option(help="Shown to the aggregator operator.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Take an approval back: training stops at its next step, nothing more is stored or sent.

    Needs no connection. What has left stays out, and the ledger keeps what was charged for.
    """
    from consilium_client.deciding import withdraw as withdraw_from
    from consilium_client.identity import SiteIdentity

    site = SiteHome.existing(home)
    answer = withdraw_from(site, SiteIdentity.load(site), study, why)
    result(
        answer.to_dict(),
        f"Withdrawn from {_named(answer)}. Training stops at its next step, and nothing more is "
        f"stored or sent.{_stays(answer)}{_own(site, answer)} The ledger keeps what was charged: "
        f"it is charged before anything is computed.{_untold(answer)}",
    )


def _named(answer: Decided) -> str:
    study = answer.decision.study
    return f"{study.name} ({study.digest[:12]})"


def _stays(answer: Decided) -> str:
    """Say what becomes of results that were stored and that nobody may be sent any more."""
    if not answer.withheld:
        return ""
    results = "1 stored result stays" if answer.withheld == 1 else f"{answer.withheld} stored "
    results += "" if answer.withheld == 1 else "results stay"
    return f" {results} here for good, whether sent before or not."


def _own(home: SiteHome, answer: Decided) -> str:
    """Say where the personal model lies that the site has of the study, if it has one."""
    from consilium_client.leftovers import own_model

    path = own_model(home, answer.decision.study.digest)
    return "" if path is None else f" This site's own part of the model stays in {path}."


def _untold(answer: Decided) -> str:
    if answer.untold is None:
        return ""
    return (
        f"\nThe aggregator could not be told ({answer.untold.code}); `consilium site start` tells "
        "it when it can. Here the decision holds from now on."
    )


def _review(
    home: Path,
    study: str,
    cohort_size: int | None,
    evaluation_size: int | None,
    against: str | None = None,
) -> Review:
    from consilium_client.identity import SiteIdentity
    from consilium_client.reviewing import review as review_study

    site = SiteHome.existing(home)
    identity = SiteIdentity.load(site)
    return review_study(
        site, identity, study, cohort_size, evaluation_size, against=against, say=note
    )


def _review_data(found: Review) -> dict[str, Any]:
    return {
        "digest": found.proposal.study.digest,
        "name": found.proposal.study.name,
        "signed_by": list(found.proposal.signed_by),
        "patients": found.patients,
        "evaluated": found.evaluated,
        "cohort_size": found.cohort_size,
        "evaluation_size": found.evaluation_size,
        "cases": found.cases.to_dict(),
        "leaves": {
            "tensors": found.cost.tensors,
            "bytes_per_round": found.cost.bytes_per_round,
            "rounds": found.proposal.study.federation.rounds,
        },
        "price": found.price.to_dict(),
        "changed": None if found.change is None else found.change.to_dict(),
    }


def _review_lines(found: Review) -> list[str]:
    from consilium_common.study.plan import describe

    here = f"Here: {found.patients} training patients; {found.cohort_size} would be declared."
    if found.evaluation_size:
        here += (
            f" {found.evaluated} test patients; {found.evaluation_size} would be declared. Scores"
            " are centred before they are summed, so rounding this number moves the mean little."
        )
    lines = [
        *describe(found.proposal.study, found.cost),
        f"  Now: {found.proposal.standing}.",
        "",
        *found.cases.lines(),
        here,
        *found.price.sentences(),
        "",
        *(
            ["No other version of this study was approved here before."]
            if found.change is None
            else found.change.lines()
        ),
    ]
    if not found.price.allowed:
        lines += ["", f"This site refuses it: {found.price.reason}", found.price.hint]
    return lines
