"""What people are shown of sites and studies, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from sqlalchemy import func, select

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.identity.words import fingerprint_words
from consilium_server.cosigning import signatures_overview
from consilium_server.lifecycle import approved
from consilium_server.overview_pages import fitting
from consilium_server.registry import Registry
from consilium_server.released import noisy_score, pooled
from consilium_server.round_tables import SiteRound
from consilium_server.scheduler import queue, waits_for
from consilium_server.spending import SpendMeter
from consilium_server.standing import round_standing
from consilium_server.states import State
from consilium_server.statistics import estimates
from consilium_server.tables import Alarm, EvaluationRow, Member, Round, StudyRow, Witnessed

#: At most so many entries of a study's log are shown: an answer is one message.
_LOGGED: Final = 500
#: Rounds that are read from the database at a time, where a page may hold few of them.
_AT_ONCE: Final = 100


def sites_overview(registry: Registry) -> list[dict[str, Any]]:
    """Return how every site stands: its certificate, its ledger's witness, its alarms."""
    witnessed = registry.last_witnessed()
    alarms = registry.alarms()
    return [
        {
            **_member(site),
            **_witnessed(witnessed.get(site.name)),
            "online": site.online,
            "alarms": [_alarm(alarm) for alarm in alarms if alarm.site == site.name],
        }
        for site in registry.sites()
    ]


def people_overview(registry: Registry) -> list[dict[str, Any]]:
    """Return how every operator and auditor stands."""
    return [_member(member) for member in registry.members(Role.OPERATOR, Role.AUDITOR)]


def _member(member: Member) -> dict[str, Any]:
    certificate = load_certificate(member.certificate_pem.encode())
    certified = describe(certificate)
    return {
        "name": member.name,
        "role": member.role,
        "status": member.status,
        "last_seen": member.last_seen,
        "version": member.version,
        "address": member.address,
        "joined_at": member.joined_at,
        "expires": certified.not_after.isoformat(),
        "fingerprint": certified.fingerprint,
        "words": fingerprint_words(certificate),
    }


def _witnessed(row: Witnessed | None) -> dict[str, Any]:
    return {
        "witnessed": None if row is None else row.sequence,
        "witnessed_at": None if row is None else row.record["statement"]["time"],
    }


def studies_overview(registry: Registry) -> list[dict[str, Any]]:
    """Return a line for every study: where it stands, and its place in the queue."""
    places = {row.digest: place for place, row in enumerate(queue(registry), start=1)}
    with registry.transaction() as session:
        counted = select(Round.digest, func.count()).group_by(Round.digest)
        done = {row[0]: row[1] for row in session.execute(counted)}
    return [
        {
            "digest": row.digest,
            "name": row.name,
            "state": row.state,
            "reason": row.reason,
            "proposed_at": row.proposed_at,
            "priority": row.priority,
            "place": places.get(row.digest),
            "waits_for": waits_for(registry, row) if row.digest in places else "",
            "rounds_done": done.get(row.digest, 0),
            "rounds": int(row.canonical["federation"]["rounds"]),
            "approved": len(approved(registry, row.digest)),
        }
        for row in registry.studies()
    ]


def queue_place(registry: Registry, row: StudyRow) -> int | None:
    """Return a study's place in the queue, from 1; None where it is not in it."""
    places = [one.digest for one in queue(registry)]
    return places.index(row.digest) + 1 if row.digest in places else None


def history_overview(registry: Registry, row: StudyRow) -> dict[str, Any]:
    """Return a study's last changes of state and last rounds, with what was left out of each."""
    rounds = registry.rounds(row.digest)
    return {
        "digest": row.digest,
        "name": row.name,
        "state": row.state,
        "rounds_done": len(rounds),
        "history": [
            {
                "from": event.before,
                "to": event.after,
                "who": event.who,
                "why": event.why,
                "at": event.at,
            }
            for event in registry.history(row.digest)[-_LOGGED:]
        ],
        "rounds": fitting(
            {**_round(one), "ended_at": one.ended_at} for one in rounds[: -_LOGGED - 1 : -1]
        )[::-1],
    }


def round_overview(registry: Registry, row: StudyRow, number: int) -> dict[str, Any]:
    """Return what each site's part in one round was, ``number`` counted from 0.

    Raises
    ------
    ConsiliumError
        ``study.no-round`` for one that is not over yet.
    """
    of_it = (SiteRound.digest == row.digest, SiteRound.number == number)
    with registry.transaction() as session:
        found = session.get(Round, (row.digest, number))
        parts = session.scalars(select(SiteRound).where(*of_it).order_by(SiteRound.site)).all()
    if found is None:
        raise ConsiliumError(
            "study.no-round",
            f"The study {row.name} has not finished a round {number + 1}.",
            hint=f"See `consilium study log {row.digest[:12]}`.",
        )
    return {
        "digest": row.digest,
        "name": row.name,
        **_round(found),
        "ended_at": found.ended_at,
        "parts": [part.shown() for part in parts],
    }


def study_overview(registry: Registry, row: StudyRow, meter: SpendMeter) -> dict[str, Any]:
    """Return all that the aggregator knows of one study; takes a while where ε is composed.

    ``epsilon`` is that of the patients trained on (released statistics included),
    ``evaluation_epsilon`` that of those evaluated on, each by site. ``evaluations`` holds one row
    for every evaluation that was done; ``evaluation`` is the newest that released figures;
    ``statistics`` is None where none were gathered.
    """
    rounds = registry.rounds(row.digest)
    evaluations = registry.evaluations(row.digest)
    approvals = registry.approvals(row.digest)
    online = {m.name: m.online for m in registry.sites()}
    counted = registry.statistics(row.digest)
    spend = meter.spent(
        row.study,
        [r.sites for r in rounds],
        [e.figures for e in evaluations],
        counted.figures if counted is not None else (),
        exact=row.state != "running",
    )
    shown = evaluations_overview(evaluations)
    return {
        "digest": row.digest,
        "name": row.name,
        "state": row.state,
        "reason": row.reason,
        "priority": row.priority,
        "place": queue_place(registry, row),
        "waits_for": waits_for(registry, row) if row.state == State.QUEUED else "",
        "pause_asked": row.pause_by is not None,
        "proposed_by": row.proposed_by,
        "proposed_at": row.proposed_at,
        "proposed_to": row.sites,
        "signatures": signatures_overview(registry, row),
        "started_at": row.started_at,
        "ended_at": row.ended_at,
        "study": row.canonical,
        "epsilon": dict(spend.training),
        "evaluation_epsilon": dict(spend.evaluation),
        "evaluation": next((e for e in reversed(shown) if e["figures"]), {}),
        "evaluations": shown,
        "statistics": estimates(row.study, counted),
        "rounds_planned": row.study.federation.rounds,
        "approvals": [
            {
                "site": a.site,
                "decision": a.decision,
                "why": a.why,
                "cohort_size": a.cohort_size,
                "evaluation_size": a.evaluation_size,
                "online": online.get(a.site, False),
            }
            for a in approvals
        ],
        "rounds": list(rounds_overview(rounds, evaluations)),
        "progress": [
            {
                "site": p.site,
                "phase": p.phase,
                "round": p.round,
                "step": p.step,
                "steps": p.steps,
                "at": p.at,
            }
            for p in registry.progress(row.digest)
        ],
        "standing": round_standing(registry, row, rounds, approvals, online),
        "alarms": [
            {"site": alarm.site, **_alarm(alarm)}
            for alarm in registry.alarms()
            if alarm.site in {a.site for a in approvals}
        ],
    }


def study_page(registry: Registry, row: StudyRow, name: str, start: int) -> list[dict[str, Any]]:
    """Return what goes into one answer of a list of :func:`study_overview`, from ``start`` on.

    Raises
    ------
    ConsiliumError
        ``network.garbage`` for another name than ``rounds`` or ``evaluations``.
    """
    evaluations = registry.evaluations(row.digest)
    if name == "evaluations":
        return fitting(evaluations_overview(evaluations)[start:])
    if name != "rounds":
        raise ConsiliumError("network.garbage", "The request names a list that no study has.")
    query = select(Round).where(Round.digest == row.digest).order_by(Round.number).offset(start)
    with registry.transaction() as session:
        rounds = session.scalars(query.execution_options(yield_per=_AT_ONCE))
        return fitting(rounds_overview(rounds, evaluations))


def rounds_overview(
    rounds: Iterable[Round], evaluations: Sequence[EvaluationRow]
) -> Iterator[dict[str, Any]]:
    """Return a study's finished rounds, each with the exact figures released after it."""
    exact = {e.rounds_done: e.figures for e in evaluations if e.figures and e.noise is None}
    for r in rounds:
        yield {
            **_round(r),
            "loss": r.loss,
            "metrics": {"evaluation": exact[r.number + 1]} if r.number + 1 in exact else {},
        }


def evaluations_overview(evaluations: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    """Return every evaluation of a study: pooled over sites, and what each site released."""
    return [_evaluation(e) for e in evaluations]


def _round(row: Round) -> dict[str, Any]:
    return {
        "number": row.number,
        "seconds": round(row.seconds, 3),
        "sites": row.sites,
        "dropped": row.dropped,
    }


def _evaluation(row: EvaluationRow) -> dict[str, Any]:
    """Return one evaluation: pooled over sites, and what each site released."""
    found: dict[str, Any] = {
        "rounds_done": row.rounds_done,
        "sites": row.sites,
        "dropped": row.dropped,
        "figures": row.figures,
    }
    if not row.figures:
        return found
    if row.noise is None:
        return found | pooled(row.figures)
    return found | noisy_score(row.figures, row.declared, row.noise)


def _alarm(alarm: Alarm) -> dict[str, str]:
    return {"code": alarm.code, "message": alarm.message, "at": alarm.at}
