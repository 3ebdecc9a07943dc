"""The states of a study, which may follow which, and the one place where a study changes state."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import update
from sqlalchemy.orm import Session

from consilium_common.errors import ConsiliumError
from consilium_server.tables import StudyEvent, StudyRow, now

#: Who changes a state when no person does.
AGGREGATOR: Final = "aggregator"


class State(StrEnum):
    """Where a study stands."""

    DRAFT = "draft"  #: kept here; no site sees it
    PROPOSED = "proposed"  #: sites and named operators decide
    APPROVED = "approved"  #: enough sites and signatures
    QUEUED = "queued"  #: runs when enough of its sites are there and free
    RUNNING = "running"
    PAUSED = "paused"  #: stands after a round until it is resumed
    FINISHED = "finished"
    STOPPED = "stopped"  #: a person ended it; it can be run on
    FAILED = "failed"  #: an error ended it; it can be run on


#: Every change there is. Running to running is a run that was begun again after a fault, or a
#: wish that was noted; nothing follows on finished.
TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.DRAFT: frozenset({State.PROPOSED}),
    State.PROPOSED: frozenset({State.APPROVED}),
    State.APPROVED: frozenset({State.PROPOSED, State.QUEUED}),
    State.QUEUED: frozenset({State.QUEUED, State.RUNNING, State.PAUSED, State.STOPPED}),
    State.RUNNING: frozenset(
        {
            State.RUNNING,
            State.QUEUED,
            State.PAUSED,
            State.FINISHED,
            State.STOPPED,
            State.FAILED,
        }
    ),
    State.PAUSED: frozenset({State.QUEUED, State.STOPPED}),
    State.FINISHED: frozenset(),
    State.STOPPED: frozenset({State.QUEUED}),
    State.FAILED: frozenset({State.QUEUED}),
}

#: A study in one of these does nothing more until a person says so.
ENDED: Final = frozenset({State.FINISHED, State.STOPPED, State.FAILED})


def change(
    session: Session,
    digest: str,
    to: State,
    why: str,
    *,
    who: str = AGGREGATOR,
    only_from: Collection[State] | None = None,
    only_run: str | None = None,
    **values: Any,
) -> bool:
    """Move a study to a state and write who did it and why into its history.

    Parameters
    ----------
    only_from : collection of State, optional
        Change nothing when the study is in another state (default: any that may come before).
    only_run : str, optional
        Change nothing when the study runs as another Flower run.
    values
        Further columns of the study's row that change with it.

    Returns
    -------
    bool
        Whether it was moved. False when ``only_from`` or ``only_run`` did not hold.

    Raises
    ------
    ConsiliumError
        ``study.<state>`` where the state it is in does not permit the change and ``only_from`` is
        not given.
    """
    while True:
        row = session.get_one(StudyRow, digest, populate_existing=True)
        before = State(row.state)
        if only_from is not None and before not in only_from:
            return False
        if only_run is not None and row.flower_run != only_run:
            return False
        if to not in TRANSITIONS[before]:
            if only_from is not None:
                return False
            raise not_permitted(digest, before, to)
        moved = session.scalar(
            # Compared and set in one statement: of two who change it at once, one looks again.
            update(StudyRow)
            .where(StudyRow.digest == digest, StudyRow.state == before)
            .where(StudyRow.flower_run.is_not_distinct_from(row.flower_run))
            .values(state=to, reason=why, **_times(before, to), **values)
            .returning(StudyRow.digest)
            .execution_options(synchronize_session=False)
        )
        if moved is not None:
            note(session, digest, before, to, why, who=who)
            session.expire(row)
            return True


def note(session: Session, digest: str, before: str, after: str, why: str, *, who: str) -> None:
    """Write a row of a study's history."""
    session.add(StudyEvent(digest=digest, before=before, after=after, who=who, why=why, at=now()))


def not_permitted(digest: str, state: State, to: State) -> ConsiliumError:
    """Return the error of a change that a study's state does not permit."""
    hints = {
        State.DRAFT: f"Propose it: `consilium study propose {digest[:12]}`.",
        State.PROPOSED: "Sites approve with `consilium site approve`.",
        State.RUNNING: f"Watch it: `consilium study watch {digest[:12]}`.",
        State.PAUSED: f"Let it go on: `consilium study resume {digest[:12]}`.",
        State.FINISHED: f"Make another of it: `consilium study clone {digest[:12]} --out FILE`.",
    }
    return ConsiliumError(
        f"study.{state}",
        f"The study is {state}; from there it cannot become {to}.",
        hint=hints.get(state, f"See `consilium study show {digest[:12]}`."),
    )


def _times(before: State, to: State) -> dict[str, Any]:
    if to is State.RUNNING and before is not State.RUNNING:
        return {"started_at": now(), "ended_at": None}
    if to is State.QUEUED and before is not State.QUEUED:
        return {"queued_at": now(), "ended_at": None, "flower_run": None}
    if to in ENDED:
        return {"ended_at": now()}
    return {}
