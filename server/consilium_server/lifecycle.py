"""What moves a study from state to state: decisions, wishes of operators, and what ends a run."""

from __future__ import annotations

import errno
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError

from consilium_common.errors import ConsiliumError
from consilium_server.cosigning import Cosignature, require_signatures
from consilium_server.registry import Registry
from consilium_server.states import AGGREGATOR, State, change
from consilium_server.tables import Approval, StudyRow

#: So many runs may die one after the other without a finished round; then the study has failed.
MOST_FAILURES: Final = 5
#: Seconds before a run that died is begun again; they double with every further death.
_FIRST_BACK_OFF: Final = 0.5
_LONGEST_BACK_OFF: Final = 30.0
#: Seconds for which a study that gets nowhere stays in the queue, whatever its priority: those that
#: wait for its sites begin meanwhile.
_GIVE_WAY_SECONDS: Final = 60.0
#: In place of a Flower run's id where no SuperLink gives one: the study is simulated.
SIMULATION: Final = "simulation"


# --- approval ----------------------------------------------------------------------------------


def approved(registry: Registry, digest: str) -> list[Approval]:
    """Return the approvals of a study, without refusals."""
    return [one for one in registry.approvals(digest) if one.decision == "approved"]


def quorum_of(row: StudyRow) -> int:
    """Return the fewest sites with which a study's round counts."""
    return int(row.canonical["federation"]["quorum"])


def require_approval(registry: Registry, row: StudyRow) -> None:
    """Refuse a study that lacks signatures or sites.

    Raises
    ------
    ConsiliumError
        ``study.release``, ``study.signatures-missing``, ``study.not-approved``.
    """
    try:
        known = row.study.digest == row.digest
    except ValidationError:
        known = False
    if not known:
        raise ConsiliumError(
            "study.release",
            "The study was proposed under a release that reads it in another way.",
            hint="Propose its file again; sites approve it anew.",
        )
    require_signatures(registry, row)
    found, quorum = len(approved(registry, row.digest)), quorum_of(row)
    if found < quorum:
        raise ConsiliumError(
            "study.not-approved",
            f"{found} of the {quorum} sites it needs have approved the study.",
            hint="Sites approve with `consilium site approve`.",
        )


def decisions_so_far(registry: Registry) -> tuple[object, ...]:
    """Return what changes whenever a site decides, an operator signs, or a study is proposed."""
    with registry.transaction() as session:
        return (
            # By time and by number: a clock may be set back.
            *session.execute(select(func.count(), func.max(Approval.decided_at))).one(),
            session.scalar(select(func.count()).where(Approval.decision == "approved")),
            session.scalar(select(func.count()).select_from(Cosignature)),
            session.scalar(select(func.count()).where(StudyRow.state == State.PROPOSED)),
        )


def settle_approvals(registry: Registry) -> None:
    """Move proposed studies to approved, and back, as decisions and signatures stand now."""
    for row in registry.in_states(State.PROPOSED, State.APPROVED):
        settle_approval(registry, row)


def settle_approval(registry: Registry, row: StudyRow) -> ConsiliumError | None:
    """Do so for one study; returns what it lacks, None when it is approved."""
    try:
        require_approval(registry, row)
    except ConsiliumError as lacking:
        if row.state == State.APPROVED:
            why = "; ".join([lacking.message.removesuffix("."), *_declined(registry, row.digest)])
            with registry.transaction() as session:
                change(session, row.digest, State.PROPOSED, why, only_from={State.APPROVED})
        return lacking
    if row.state == State.PROPOSED:
        names = ", ".join(one.site for one in approved(registry, row.digest))
        with registry.transaction() as session:
            change(
                session,
                row.digest,
                State.APPROVED,
                f"approved by {names}",
                only_from={State.PROPOSED},
            )
    return None


def _declined(registry: Registry, digest: str) -> list[str]:
    """Return in words which sites take no part, and what they said why."""
    return [
        f"{one.site} declined" + (f": {one.why}" if one.why else "")
        for one in registry.approvals(digest)
        if one.decision != "approved"
    ]


# --- what operators want -----------------------------------------------------------------------


def ask_pause(registry: Registry, row: StudyRow, who: str) -> State:
    """Pause a study: at once where it waits, after the round under way where it runs.

    Returns
    -------
    State
        The state it is in now: ``running`` means that the pause comes with the round's end.
    """
    with registry.transaction() as session:
        why = f"paused by {who}"
        if change(session, row.digest, State.PAUSED, why, who=who, only_from={State.QUEUED}):
            return State.PAUSED
        why = f"{who} wants it paused after the round under way"
        change(session, row.digest, State.RUNNING, why, who=who, pause_by=who)
        return State.RUNNING


def pause_if_asked(registry: Registry, digest: str) -> bool:
    """Pause a running study if an operator wants it; for the round loop, between two rounds.

    Returns
    -------
    bool
        Whether the run must end here, without an error: the study is paused, or it does not run
        any more.
    """
    with registry.transaction() as session:
        row = session.get_one(StudyRow, digest, populate_existing=True)
        if row.state != State.RUNNING:
            return True
        who = row.pause_by
        if who is None:
            return False
        change(
            session,
            digest,
            State.PAUSED,
            f"paused by {who}",
            who=who,
            only_from={State.RUNNING},
            pause_by=None,
        )
        return True


# --- what ends a run ---------------------------------------------------------------------------


def end_run(registry: Registry, digest: str, run: str, error: Exception) -> None:
    """Write down what a study's run ended with, and so what becomes of the study.

    A full disk pauses it until there is room. Too few sites put it back into the queue until
    they are there, and sites that give nothing usable put it behind others. A refusal with a
    reason of its own is the study's failure. Anything else is a fault of a process: the run is
    begun again.
    """
    row = registry.running_as(run)
    if row is None or row.digest != digest:
        return  # stopped or paused meanwhile, or another run does its rounds now
    if is_disk_full(error):
        where = error.where if isinstance(error, ConsiliumError) and error.where else "its disk"
        pause_for_disk(registry, row, f"the aggregator has no room left ({where})")
    elif isinstance(error, ConsiliumError) and error.code == "run.sites-away":
        # Never a death, also where they have come back in this moment: then it goes on at once.
        why = f"{error.message.removesuffix('.')}; it goes on when they are back"
        _move(registry, row, State.QUEUED, why)
    elif isinstance(error, ConsiliumError) and error.code == "run.stuck":
        why = f"{error.message.removesuffix('.')}; others go first now, then it is tried again"
        _move(registry, row, State.QUEUED, why, not_before=_in(_GIVE_WAY_SECONDS))
    elif not isinstance(error, ConsiliumError):
        run_died(registry, run, f"internal error: {type(error).__name__}")
    elif error.code == "state.running" or error.code.startswith("internal."):
        run_died(registry, run, error.message)
    else:
        _move(registry, row, State.FAILED, str(error))


def run_died(registry: Registry, run: str, why: str) -> None:
    """Have a study's run begun again after a while; too often in a row is the study's failure."""
    row = registry.running_as(run)
    if row is None:
        return
    done = len(registry.rounds(row.digest))
    failures = 1 if done > row.failed_after else row.failures + 1
    if failures >= MOST_FAILURES:
        _move(
            registry,
            row,
            State.FAILED,
            f"{why}; {failures} runs in a row ended so without a finished round",
            failures=0,
        )
        return
    seconds = back_off(failures)
    _move(
        registry,
        row,
        State.RUNNING,
        f"{why}; begun again in {seconds:g} s ({failures} of {MOST_FAILURES})",
        flower_run=None,
        failures=failures,
        failed_after=done,
        not_before=_in(seconds),
    )


def longest_pause(row: StudyRow) -> float:
    """Return the most seconds that ``row.not_before`` may lie ahead, as it was planned."""
    return _GIVE_WAY_SECONDS if row.state == State.QUEUED else back_off(row.failures)


def back_off(failures: int) -> float:
    """Return the seconds of pause after so many runs in a row that died, from 1."""
    return min(_FIRST_BACK_OFF * 2.0 ** (failures - 1), _LONGEST_BACK_OFF)


def pause_for_disk(
    registry: Registry, row: StudyRow, why: str = "the aggregator has no room left"
) -> None:
    """Pause a running study until there is room on the aggregator's disk again."""
    why = f"{why}; it goes on by itself when there is room"
    _move(registry, row, State.PAUSED, why, goes_on_with="disk")


def lost_runs(registry: Registry, why: str) -> None:
    """Note that no Flower run does any rounds now: each running study gets a new one at once."""
    for row in registry.in_states(State.RUNNING):
        if row.flower_run not in (None, SIMULATION):
            _move(registry, row, State.RUNNING, why, flower_run=None, not_before=None)


def begin_run(registry: Registry, digest: str, run: str) -> bool:
    """Name the Flower run that does a study's rounds; returns whether the study still runs."""
    with registry.transaction() as session:
        named = session.scalar(
            update(StudyRow)
            .where(StudyRow.digest == digest, StudyRow.state == State.RUNNING)
            .where(StudyRow.flower_run.is_(None))
            .values(flower_run=run)
            .returning(StudyRow.digest)
        )
    return named is not None


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that a disk is full, in any of the ways there are."""
    if isinstance(error, ConsiliumError):
        return error.code == "state.disk"
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = str(error.orig).lower() if isinstance(error, OperationalError) else ""
    return "disk is full" in words or "no space left" in words


def _in(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def _move(registry: Registry, row: StudyRow, to: State, why: str, **values: Any) -> None:
    with registry.transaction() as session:
        change(
            session,
            row.digest,
            to,
            why,
            who=AGGREGATOR,
            only_from={State.RUNNING},
            only_run=row.flower_run,
            **values,
        )
