"""What a site may call: its own matters, and the studies proposed to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role, load_certificate
from consilium_common.wire import methods
from consilium_common.wire.statements import approval_statement, check_signed
from consilium_server.benching import Benches
from consilium_server.cosigning import signature_rows
from consilium_server.flower_private import Control, node_key_bytes
from consilium_server.gateway import Service
from consilium_server.issuing import Issuer
from consilium_server.peers import Peer
from consilium_server.presence import Presence
from consilium_server.registry import Registry
from consilium_server.services.fields import count, number, text
from consilium_server.tables import Approval, Member, Progress, StudyRow, now
from consilium_server.witness import Witness


@dataclass
class SiteServices:
    """The handlers, over one registry."""

    registry: Registry
    issuer: Issuer
    witness: Witness
    control: Control
    _presence: Presence = field(init=False)
    _benches: Benches = field(init=False)

    def __post_init__(self) -> None:
        self._presence = Presence(self.registry)
        self._benches = Benches(self.registry)

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
        """Note that a site is there; answer with what runs now and whether it must renew."""
        assert peer.member is not None
        release = text(request, "version")[:40]
        session_id = text(request, "session")
        protocol = request.get("protocol")
        fits = protocol == methods.PROTOCOL
        # A site whose release does not fit is shown with it, and never counts as online.
        said: dict[str, Any] = {"version": release, "address": peer.address}
        if fits:
            said["session"] = session_id
            said["studies_at_once"] = number(request, "studies_at_once") or None
            if "trust" in request:
                said["trust"] = text(request, "trust")[:64]
        self._presence.heard(peer.name, said, counts=fits)
        methods.check_protocol(
            protocol, release=release, who=f"site {peer.name}", here="the aggregator"
        )
        if peer.member.node_id is None:
            # It was certified by a file: Flower does not know its key yet.
            key = node_key_bytes(peer.certified.public_key)
            node_id = await asyncio.to_thread(self.control.register_node, key, peer.name)
            self.registry.set_node(peer.name, node_id)
        trust = self.issuer.trust
        return {
            "version": __version__,
            "protocol": methods.PROTOCOL,
            "time": now(),
            "trust": trust.digest,
            "renew": self._must_renew(peer.member),
            "running": (running := self.registry.running_at(peer.name)),
            "benched": self._benches.of(peer.name, running),
        }

    async def site_studies(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return every study proposed to it with its signatures, and its own decision about it."""
        studies = []
        for row in self.registry.studies():
            if not row.proposed_to(peer.name):
                continue
            mine = [a for a in self.registry.approvals(row.digest) if a.site == peer.name]
            studies.append(
                {
                    "digest": row.digest,
                    "canonical": row.canonical,
                    "proposed_by": row.proposed_by,
                    "proposed_at": row.proposed_at,
                    "signature": row.signature,
                    "signer_pem": row.signer_pem,
                    "signatures": signature_rows(self.registry, row.digest),
                    "state": row.state,
                    "decision": mine[0].decision if mine else None,
                }
            )
        return {"studies": studies}

    async def decide(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Store a site's signed approval or refusal of a study."""
        assert peer.member is not None
        row = self._proposed(peer, text(request, "digest"))
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
            self.issuer.trust,
            name=peer.name,
            role=Role.SIGNER,
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
        return {"digest": row.digest, "name": row.name, "decision": decision}

    async def progress(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Keep what a site says about the running round of a study that it approved."""
        digest = self._proposed(peer, text(request, "digest")).digest
        with self.registry.transaction() as session:
            session.merge(
                Progress(
                    site=peer.name,
                    digest=digest,
                    phase=text(request, "phase")[:40],
                    round=number(request, "round"),
                    step=number(request, "step"),
                    steps=number(request, "steps"),
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

    def _proposed(self, peer: Peer, digest: str) -> StudyRow:
        """Return a study of that whole digest; one that is not proposed to the site is unknown."""
        with self.registry.transaction() as session:
            row = session.get(StudyRow, digest)
        if row is None or not row.proposed_to(peer.name):
            raise ConsiliumError(
                "study.unknown",
                "No such study is proposed to this site.",
                hint="List them with `consilium site studies`.",
            )
        return row

    def _must_renew(self, member: Member) -> bool:
        """Whether its certificate ends soon, or is of an authority that is no longer in force."""
        if member.next_serial is not None:
            return False  # it was renewed; the new one was not used yet
        return self.issuer.trust.wants_renewal(load_certificate(member.certificate_pem.encode()))
