"""Studies in a registry, brought into a state by permitted changes alone."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime, timedelta

from site_samples import plain_study

from consilium_common.study import Study
from consilium_server.registry import Registry
from consilium_server.states import TRANSITIONS, State
from consilium_server.tables import Approval, Member, Round, StudyRow, now


def way(before: State, to: State) -> list[State]:
    """Return the shortest way of permitted changes, without the first state."""
    ways = deque([[before]])
    while ways:
        known = ways.popleft()
        if known[-1] is to:
            return known[1:]
        ways += [[*known, after] for after in TRANSITIONS[known[-1]] if after not in known]
    raise AssertionError(f"no way from {before} to {to}")


def put(registry: Registry, digest: str, state: str, reason: str = "") -> None:
    """Move a study to ``state``."""
    for step in way(State(registry.study(digest).state), State(state)):
        registry.set_study_state(digest, step, reason)


def add_study(registry: Registry, name: str, *sites: str, quorum: int = 2, **row: object) -> str:
    """Add a proposed study that these sites have approved; they are online."""
    canonical = plain_study().to_canonical()
    canonical["name"] = name
    canonical["federation"] |= {"quorum": quorum, "rounds": 3}
    study = Study.model_validate(canonical)
    with registry.transaction() as session:
        values = {"proposed_at": now(), **row}
        session.add(
            StudyRow(
                digest=study.digest,
                name=name,
                canonical=study.to_canonical(),
                proposed_by="ada",
                signature="",
                signer_pem="",
                **values,
            )
        )
        for site in sites:
            session.merge(a_site(site))
            session.add(
                Approval(
                    digest=study.digest,
                    site=site,
                    decision="approved",
                    why="",
                    cohort_size=10,
                    signature="",
                    decided_at=now(),
                )
            )
    return study.digest


def a_site(name: str, **values: object) -> Member:
    """A site that is online for the next hour."""
    online = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    return Member(
        **{
            "name": name,
            "role": "site",
            "status": "active",
            "serial": name,
            "certificate_pem": "",
            "signer_pem": "",
            "node_id": "1",
            "joined_at": now(),
            "last_seen": online,
            **values,
        }
    )


def add_round(registry: Registry, digest: str, number: int, seconds: float = 1.0) -> None:
    """Record a finished round."""
    with registry.transaction() as session:
        session.merge(
            Round(
                digest=digest,
                number=number,
                seconds=seconds,
                sites=["north"],
                dropped={},
                ended_at=now(),
            )
        )
