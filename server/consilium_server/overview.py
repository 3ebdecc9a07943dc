"""What people are shown of sites and studies, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from consilium_common.identity.certificates import describe, load_certificate
from consilium_server.registry import Member, Registry, Round, StudyRow
from consilium_server.released import pooled
from consilium_server.spending import SpendMeter


def site_overview(member: Member) -> dict[str, Any]:
    """Return how one site stands."""
    certified = describe(load_certificate(member.certificate_pem.encode()))
    return {
        "name": member.name,
        "status": member.status,
        "online": member.online,
        "last_seen": member.last_seen,
        "version": member.version,
        "joined_at": member.joined_at,
        "expires": certified.not_after.isoformat(),
        "fingerprint": certified.fingerprint,
    }


def study_overview(registry: Registry, row: StudyRow, meter: SpendMeter) -> dict[str, Any]:
    """Return all that the aggregator knows of one study; takes a while where ε is composed."""
    rounds = registry.rounds(row.digest)
    online = {m.name: m.online for m in registry.sites()}
    return {
        "digest": row.digest,
        "name": row.name,
        "state": row.state,
        "reason": row.reason,
        "proposed_by": row.proposed_by,
        "proposed_at": row.proposed_at,
        "started_at": row.started_at,
        "ended_at": row.ended_at,
        "study": row.canonical,
        "epsilon": dict(
            meter.spent(row.study, [r.sites for r in rounds], exact=row.state != "running")
        ),
        "evaluation": _last_evaluation(rounds),
        "rounds_planned": row.study.federation.rounds,
        "approvals": [
            {
                "site": a.site,
                "decision": a.decision,
                "why": a.why,
                "cohort_size": a.cohort_size,
                "online": online.get(a.site, False),
            }
            for a in registry.approvals(row.digest)
        ],
        "rounds": [
            {
                "number": r.number,
                "seconds": round(r.seconds, 3),
                "sites": r.sites,
                "dropped": r.dropped,
                "loss": r.loss,
                "metrics": r.metrics,
            }
            for r in rounds
        ],
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
    }


def _last_evaluation(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the newest evaluation that sites released, pooled and by site; empty without one."""
    for row in reversed(rounds):
        figures = row.metrics.get("evaluation")
        if figures:
            return {"rounds_done": row.number + 1, **pooled(figures), "sites": figures}
    return {}
