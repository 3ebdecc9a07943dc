"""What an operator may call to propose studies and to see them; auditors may look."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import Role
from consilium_common.study.load import study_from_canonical
from consilium_common.wire import methods
from consilium_common.wire.statements import check_signed, proposal_statement
from consilium_server.gateway import Service
from consilium_server.issuing import Issuer
from consilium_server.overview import studies_overview, study_overview, study_page
from consilium_server.overview_pages import first_page
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import number, text
from consilium_server.spending import SpendMeter
from consilium_server.starts import PublicStarts
from consilium_server.states import State, change, note
from consilium_server.tables import StudyRow, now


@dataclass
class OperatorServices:
    """The handlers, over one registry."""

    registry: Registry
    issuer: Issuer
    starts: PublicStarts
    meter: SpendMeter = field(default_factory=SpendMeter)

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {
            methods.OPERATOR_PROPOSE: self.propose,
            methods.OPERATOR_STUDIES: self.operator_studies,
            methods.OPERATOR_SHOW: self.show,
        }

    async def propose(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Take a study that an operator signed; the same study again changes nothing.

        A public start comes before it, in pieces: each a request with ``start`` alone. ``sites``
        names those it is proposed to (null: all); proposed again, it is shown to more, never to
        fewer. With ``draft`` it is kept unsigned and no site sees it, until it is proposed.
        """
        assert peer.member is not None
        if "start" in request:
            return await asyncio.to_thread(self.starts.take, request["start"])
        study = study_from_canonical(request.get("canonical"))
        self.starts.require(study)
        sites = self._sites(request.get("sites"))
        draft = request.get("draft") is True
        signature = "" if draft else text(request, "signature")
        if not draft:
            check_signed(
                proposal_statement(study.digest, peer.name),
                signature,
                peer.member.signer_pem,
                self.issuer.trust,
                name=peer.name,
                role=Role.PROPOSER,
            )
        said: dict[str, Any] = {
            "proposed_by": peer.name,
            "signature": signature,
            "signer_pem": peer.member.signer_pem,
            "proposed_at": now(),
        }
        with self.registry.transaction() as session:
            row = session.get(StudyRow, study.digest)
            known = row is not None
            if row is None:
                state = State.DRAFT if draft else State.PROPOSED
                row = StudyRow(
                    digest=study.digest,
                    name=study.name,
                    canonical=study.to_canonical(),
                    sites=sites,
                    state=state,
                    **said,
                )
                session.add(row)
                note(session, row.digest, "", state, f"{state} by {peer.name}", who=peer.name)
            elif row.state == State.DRAFT and not draft:
                why = f"proposed by {peer.name}"
                change(session, row.digest, State.PROPOSED, why, who=peer.name, sites=sites, **said)
                known = False
            elif row.sites is not None and not draft:
                more = None if sites is None else sorted({*row.sites, *sites})
                if more != row.sites:
                    whom = "all sites" if more is None else ", ".join(more)
                    why = f"proposed to {whom} by {peer.name}"
                    note(session, row.digest, row.state, row.state, why, who=peer.name)
                    row.sites = more
        return {
            "digest": study.digest,
            "name": study.name,
            "known": known,
            "state": self.registry.study(study.digest).state,
        }

    async def operator_studies(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return a line for every study."""
        return {"studies": await asyncio.to_thread(studies_overview, self.registry)}

    async def show(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return all that is known of one study; of its lists a page, with ``list`` another."""
        row = self.registry.study(text(request, "digest"))
        if "list" in request:
            page = text(request, "list"), number(request, "from")
            return {"rows": await asyncio.to_thread(study_page, self.registry, row, *page)}
        return first_page(await asyncio.to_thread(study_overview, self.registry, row, self.meter))

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
