"""Our own services behind the gateway: enrolment, the sites' matters, the operator's matters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509

from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, describe
from consilium_common.study import Study
from consilium_common.study.load import study_from_canonical
from consilium_common.wire import methods
from consilium_common.wire.statements import (
    approval_statement,
    check_signed,
    proposal_statement,
)
from consilium_server.flower_private import Control, node_key_bytes
from consilium_server.gateway import Service
from consilium_server.overview import sites_overview, study_overview
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.spending import SpendMeter
from consilium_server.starts import PublicStarts
from consilium_server.tables import Approval, Member, Progress, StudyRow, now
from consilium_server.witness import Witness


@dataclass
class Services:
    """The handlers, over one registry and one SuperLink."""

    registry: Registry
    authority: Authority
    control: Control
    witness: Witness
    starts: PublicStarts
    meter: SpendMeter = field(default_factory=SpendMeter)

    def table(self) -> dict[str, Service]:
        """Return the handler of every method in the role table."""
        return {
            methods.ENROL: self.enrol,
            methods.SITE_HELLO: self.hello,
            methods.SITE_STUDIES: self.site_studies,
            methods.SITE_DECIDE: self.decide,
            methods.SITE_PROGRESS: self.progress,
            methods.SITE_WITNESS: self.countersign,
            methods.OPERATOR_PROPOSE: self.propose,
            methods.OPERATOR_STUDIES: self.operator_studies,
            methods.OPERATOR_SHOW: self.show,
            methods.OPERATOR_RUN: self.run,
            methods.OPERATOR_STOP: self.stop,
            methods.OPERATOR_SITES: self.sites,
        }

    async def enrol(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Certify the keys of a site that holds an unused invitation; the invitation is spent."""
        name = peer.name
        certificate = self.authority.issue_from_request(
            _text(request, "request_pem").encode(), Role.SITE, name
        )
        signer = self.authority.issue_from_request(
            _text(request, "signer_request_pem").encode(), Role.SIGNER, name
        )
        key = node_key_bytes(certificate.public_key())
        self.registry.spend_invitation(peer.certified.serial)
        previous = self.registry.member(name)
        try:
            if previous is not None and previous.node_id is not None:
                # A second invitation for the same name replaces the first identity.
                await asyncio.to_thread(self.control.unregister_node, int(previous.node_id))
            node_id = await asyncio.to_thread(self.control.register_node, key, name)
        except Exception:
            # Nobody was certified: the same invitation may be tried again.
            self.registry.restore_invitation(peer.certified.serial)
            raise
        with self.registry.transaction() as session:
            session.merge(
                Member(
                    name=name,
                    role=Role.SITE,
                    status="active",
                    serial=f"{certificate.serial_number:x}",
                    certificate_pem=certificate_pem(certificate).decode(),
                    signer_pem=certificate_pem(signer).decode(),
                    node_id=str(node_id),
                    joined_at=now(),
                    last_seen=None,
                    session=None,
                    version=_text(request, "version"),
                )
            )
        return {
            "certificate_pem": certificate_pem(certificate).decode(),
            "signer_pem": certificate_pem(signer).decode(),
        }

    async def hello(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Note that a site is there; answer with the studies that run now."""
        with self.registry.transaction() as session:
            member = session.get_one(Member, peer.name)
            member.last_seen = now()
            member.session = _text(request, "session")
            member.version = _text(request, "version")
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
        row = self.registry.study(_text(request, "digest"))
        decision = _text(request, "decision")
        cohort_size = _count(request, "cohort_size")
        evaluation_size = _count(request, "evaluation_size")
        why = _text(request, "why")
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
            _text(request, "signature"),
            peer.member.signer_pem,
            self._authority_certificate,
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
                    signature=_text(request, "signature"),
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
                    digest=_text(request, "digest"),
                    phase=_text(request, "phase")[:40],
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

    async def propose(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Take a study that an operator signed; the same study again changes nothing.

        A public start comes before it, in pieces: each a request with ``start`` alone.
        """
        assert peer.member is not None
        if "start" in request:
            return await asyncio.to_thread(self.starts.take, request["start"])
        study = study_from_canonical(request.get("canonical"))
        self._check_start(study)
        signature = _text(request, "signature")
        check_signed(
            proposal_statement(study.digest, peer.name),
            signature,
            peer.member.signer_pem,
            self._authority_certificate,
            name=peer.name,
        )
        with self.registry.transaction() as session:
            known = session.get(StudyRow, study.digest) is not None
            if not known:
                session.add(
                    StudyRow(
                        digest=study.digest,
                        name=study.name,
                        canonical=study.to_canonical(),
                        proposed_by=peer.name,
                        signature=signature,
                        signer_pem=peer.member.signer_pem,
                        proposed_at=now(),
                    )
                )
        return {"digest": study.digest, "name": study.name, "known": known}

    async def operator_studies(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return a line for every study."""
        return {
            "studies": [
                {
                    "digest": row.digest,
                    "name": row.name,
                    "state": row.state,
                    "reason": row.reason,
                    "proposed_at": row.proposed_at,
                    "rounds_done": len(self.registry.rounds(row.digest)),
                    "rounds": row.study.federation.rounds,
                    "approved": sum(
                        a.decision == "approved" for a in self.registry.approvals(row.digest)
                    ),
                }
                for row in self.registry.studies()
            ]
        }

    async def show(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return all that is known of one study."""
        row = self.registry.study(_text(request, "digest"))
        return await asyncio.to_thread(study_overview, self.registry, row, self.meter)

    async def run(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Start a study, or go on with one that stopped, from its last finished round."""
        row = self.registry.study(_text(request, "digest"))
        if row.state in ("running", "finished"):
            raise ConsiliumError(
                f"study.{row.state}",
                f"The study is {row.state} already.",
                hint=f"See `consilium study show {row.digest[:12]}`.",
            )
        self._check_can_run(row)
        self.registry.set_study_state(row.digest, "running", f"started by {peer.name}")
        try:
            run_id = await asyncio.to_thread(self.control.start_run, row.digest)
        except Exception:
            self.registry.set_study_state(row.digest, "failed", "Flower did not start the run")
            raise
        with self.registry.transaction() as session:
            session.get_one(StudyRow, row.digest).flower_run = str(run_id)
        return {"digest": row.digest, "run": str(run_id)}

    async def stop(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Stop a running study after what is done; it can be run on later."""
        row = self.registry.study(_text(request, "digest"))
        if row.state != "running":
            raise ConsiliumError("study.not-running", "The study is not running.")
        self.registry.set_study_state(row.digest, "stopped", f"stopped by {peer.name}")
        if row.flower_run is not None:
            await asyncio.to_thread(self.control.stop_run, int(row.flower_run))
        return {"digest": row.digest, "state": "stopped"}

    async def sites(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return every site and how it stands."""
        return {"sites": sites_overview(self.registry)}

    @property
    def _authority_certificate(self) -> x509.Certificate:
        return self.authority.certificate

    def _check_start(self, study: Study) -> None:
        start = study.model.start
        if start is not None and not self.starts.path(start.sha256).exists():
            raise ConsiliumError(
                "study.start",
                f"The starting weights {start.sha256[:12]}… that the study names are not here.",
                hint="Propose it with `consilium study propose FILE --start WEIGHTS.safetensors`.",
            )

    def _check_can_run(self, row: StudyRow) -> None:
        if row.study.digest != row.digest:
            raise ConsiliumError(
                "study.release",
                "The study was proposed under a release that reads it in another way.",
                hint="Propose its file again; sites approve it anew.",
            )
        self._check_start(row.study)
        quorum = row.study.federation.quorum
        approved = {a.site for a in self.registry.approvals(row.digest) if a.decision == "approved"}
        if len(approved) < quorum:
            raise ConsiliumError(
                "study.not-approved",
                f"{len(approved)} of the {quorum} sites it needs have approved the study.",
                hint="Sites approve with `consilium site approve`.",
            )
        online = {m.name for m in self.registry.sites() if m.online and m.name in approved}
        if len(online) < quorum:
            raise ConsiliumError(
                "run.no-site-online" if not online else "run.quorum",
                f"{len(online)} of the {quorum} sites it needs are online.",
                hint="Sites come online with `consilium site start`.",
            )


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or len(value) > 100_000:
        raise ConsiliumError("network.garbage", f"The request's {key} is missing or not text.")
    return value


def _count(request: dict[str, Any], key: str) -> int:
    value = request.get(key)
    if type(value) is not int or not 0 <= value < 2**53:
        raise ConsiliumError(
            "study.bad-decision",
            f"The decision's {key} is missing or not a number of patients.",
            hint="Site and aggregator may run releases that do not fit; update the older one.",
        )
    return value


def operator_member(name: str, certificate: x509.Certificate, signer: x509.Certificate) -> Member:
    """Return the registry's row of an operator that `server init` certified."""
    return Member(
        name=name,
        role=Role.OPERATOR,
        status="active",
        serial=describe(certificate).serial,
        certificate_pem=certificate_pem(certificate).decode(),
        signer_pem=certificate_pem(signer).decode(),
        node_id=None,
        joined_at=now(),
    )
