"""What an operator may call about studies, from proposal to end; auditors may look."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_common.study.load import study_from_canonical
from consilium_common.wire import methods
from consilium_common.wire.statements import check_signed, proposal_statement
from consilium_server.cosigning import require_signatures
from consilium_server.flower_private import Control
from consilium_server.gateway import Service
from consilium_server.issuing import Issuer
from consilium_server.overview import study_overview
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text
from consilium_server.spending import SpendMeter
from consilium_server.starts import PublicStarts
from consilium_server.tables import StudyRow, now


@dataclass
class OperatorServices:
    """The handlers, over one registry and one SuperLink."""

    registry: Registry
    issuer: Issuer
    control: Control
    starts: PublicStarts
    meter: SpendMeter = field(default_factory=SpendMeter)

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {
            methods.OPERATOR_PROPOSE: self.propose,
            methods.OPERATOR_STUDIES: self.operator_studies,
            methods.OPERATOR_SHOW: self.show,
            methods.OPERATOR_RUN: self.run,
            methods.OPERATOR_STOP: self.stop,
        }

    async def propose(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Take a study that an operator signed; the same study again changes nothing.

        A public start comes before it, in pieces: each a request with ``start`` alone. ``sites``
        names those it is proposed to (null: all); proposed again, it is shown to more, never to
        fewer.
        """
        assert peer.member is not None
        if "start" in request:
            return await asyncio.to_thread(self.starts.take, request["start"])
        study = study_from_canonical(request.get("canonical"))
        self._check_start(study)
        sites = self._sites(request.get("sites"))
        signature = text(request, "signature")
        check_signed(
            proposal_statement(study.digest, peer.name),
            signature,
            peer.member.signer_pem,
            self.issuer.trust,
            name=peer.name,
        )
        with self.registry.transaction() as session:
            row = session.get(StudyRow, study.digest)
            if row is not None:
                if row.sites is not None:
                    row.sites = None if sites is None else sorted({*row.sites, *sites})
            else:
                session.add(
                    StudyRow(
                        digest=study.digest,
                        name=study.name,
                        canonical=study.to_canonical(),
                        proposed_by=peer.name,
                        signature=signature,
                        signer_pem=peer.member.signer_pem,
                        proposed_at=now(),
                        sites=sites,
                    )
                )
        return {"digest": study.digest, "name": study.name, "known": row is not None}

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
        row = self.registry.study(text(request, "digest"))
        return await asyncio.to_thread(study_overview, self.registry, row, self.meter)

    async def run(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Start a study, or go on with one that stopped, from its last finished round."""
        row = self.registry.study(text(request, "digest"))
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
        return {"digest": row.digest, "name": row.name, "run": str(run_id)}

    async def stop(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Stop a running study after what is done; it can be run on later."""
        row = self.registry.study(text(request, "digest"))
        if row.state != "running":
            raise ConsiliumError("study.not-running", "The study is not running.")
        self.registry.set_study_state(row.digest, "stopped", f"stopped by {peer.name}")
        if row.flower_run is not None:
            await asyncio.to_thread(self.control.stop_run, int(row.flower_run))
        return {"digest": row.digest, "name": row.name, "state": "stopped"}

    def _sites(self, names: object) -> list[str] | None:
        """Return the sites a study is proposed to: members all of them, or None for all."""
        if names is None:
            return None
        known = {site.name for site in self.registry.sites()}
        if not isinstance(names, list) or not names or not known.issuperset(names):
            raise ConsiliumError(
                "identity.unknown",
                "The study is proposed to a site that is not a member here.",
                hint="List them with `consilium server sites`.",
            )
        return sorted(set(names))

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
        require_signatures(self.registry, row)
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
