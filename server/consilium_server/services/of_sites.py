"""What a site may call: its own matters, and the studies proposed to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority
from consilium_common.wire import methods
from consilium_common.wire.statements import approval_statement, check_signed
from consilium_server.gateway import Service
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import count, text
from consilium_server.tables import Approval, Member, Progress, now
from consilium_server.witness import Witness


@dataclass
class SiteServices:
    """The handlers, over one registry."""

    registry: Registry
    authority: Authority
    witness: Witness

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {
            methods.SITE_HELLO: self.hello,
            methods.SITE_STUDIES: self.site_studies,
            methods.SITE_DECIDE: self.decide,
            methods.SITE_PROGRESS: self.progress,
            methods.SITE_WITNESS: self.countersign,
        }

    async def hello(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Note that a site is there; answer with the studies that run now."""
        with self.registry.transaction() as session:
            member = session.get_one(Member, peer.name)
            member.last_seen = now()
            member.session = text(request, "session")
            member.version = text(request, "version")
        return {"version": __version__, "running": self.registry.running()}

    async def site_studies(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return every proposal with its signature, and this site's own decision about it."""
        studies = []
        for row in self.registry.studies():
            mine = [a for a in self.registry.approvals(row.digest) if a.site == peer.name]
            studies.append(
                {
                    "digest": row.digest,
                    "canonical": row.canonical,
                    "proposed_by": row.proposed_by,
                    "proposed_at": row.proposed_at,
                    "signature": row.signature,
                    "signer_pem": row.signer_pem,
                    "state": row.state,
                    "decision": mine[0].decision if mine else None,
                }
            )
        return {"studies": studies}

    async def decide(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Store a site's signed approval or refusal of a study."""
        assert peer.member is not None
        row = self.registry.study(text(request, "digest"))
        decision = text(request, "decision")
        cohort_size = count(request, "cohort_size")
        evaluation_size = count(request, "evaluation_size")
        why = text(request, "why")
        if decision not in ("approved", "declined"):
            raise ConsiliumError("study.bad-decision", "The decision is incomplete.")
        if decision == "approved" and cohort_size < 1:
            raise ConsiliumError("study.bad-decision", "The declared cohort size must be positive.")
        released = row.study.evaluation.release == "private"
        if decision == "approved" and released and evaluation_size < 1:
            raise ConsiliumError(
                "study.bad-decision",
                "The study releases scores, and no patient was declared to evaluate on.",
                hint="Approve it with the number of patients in the test part of your split.",
            )
        check_signed(
            approval_statement(
                row.digest,
                peer.name,
                decision,
                cohort_size=cohort_size,
                evaluation_size=evaluation_size,
                why=why,
            ),
            text(request, "signature"),
            peer.member.signer_pem,
            self.authority.certificate,
            name=peer.name,
        )
        with self.registry.transaction() as session:
            session.merge(
                Approval(
                    digest=row.digest,
                    site=peer.name,
                    decision=decision,
                    why=why,
                    cohort_size=cohort_size,
                    evaluation_size=evaluation_size,
                    signature=text(request, "signature"),
                    decided_at=now(),
                )
            )
        return {"digest": row.digest, "decision": decision}

    async def progress(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Keep what a site says about the running round."""
        with self.registry.transaction() as session:
            session.merge(
                Progress(
                    site=peer.name,
                    digest=text(request, "digest"),
                    phase=text(request, "phase")[:40],
                    round=int(request.get("round", 0)),
                    step=int(request.get("step", 0)),
                    steps=int(request.get("steps", 0)),
                    at=now(),
                )
            )
        return {}

    async def countersign(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Countersign the heads of a site's ledger, or say what is known of it."""
        assert peer.member is not None
        return await asyncio.to_thread(
            self.witness.countersign, peer.name, peer.member.signer_pem, request.get("heads")
        )
