"""Enrolment: the holder of an invitation becomes a member."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import requested_key
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.identity.keys import public_fingerprint
from consilium_common.wire import methods
from consilium_server.flower_private import Control, node_key_bytes
from consilium_server.gateway import Service
from consilium_server.issuing import Issued, Issuer
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text
from consilium_server.tables import InvitationRow, Member, now


@dataclass
class Enrolment:
    """What the holder of an invitation may call."""

    registry: Registry
    issuer: Issuer
    control: Control

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {methods.ENROL: self.enrol}

    async def enrol(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Certify the keys of whoever holds an unused invitation; the invitation is spent.

        Where the authority is offline the answer is ``waiting``: the same request is sent again
        later, and the invitation serves that key alone.
        """
        name = peer.name
        request_pem = text(request, "request_pem")
        version = text(request, "version")[:40]
        role = self._role(peer)
        signer_request = None if role is Role.AUDITOR else text(request, "signer_request_pem")
        key = public_fingerprint(requested_key(request_pem.encode(), role))
        self.registry.check_invitation(peer.certified.serial, key)
        issued = self.issuer.issue(
            name,
            role,
            request_pem.encode(),
            None if signer_request is None else signer_request.encode(),
        )
        if issued is None:
            self.registry.reserve_invitation(peer.certified.serial, key)
            return {"role": role, "waiting": True}
        self.registry.spend_invitation(peer.certified.serial)
        try:
            await self._admit(peer, role, issued, version)
        except Exception:
            # Nobody was certified: the same invitation may be tried again.
            self.registry.restore_invitation(peer.certified.serial)
            raise
        return {
            "role": role,
            "certificate_pem": issued.certificate_pem,
            "signer_pem": issued.signer_pem,
            "authority_pem": self.issuer.trust.pem().decode(),
            "cross_pem": self.issuer.cross_pem,
        }

    def _role(self, peer: Peer) -> Role:
        """Return the role that the invitation was made for; a name keeps its role for good."""
        with self.registry.transaction() as session:
            role = Role(session.get_one(InvitationRow, peer.certified.serial).role)
        known = self.registry.member(peer.name)
        if known is not None and known.role != role:
            raise ConsiliumError(
                "identity.name-taken",
                f"{peer.name!r} is the name of a member with another role.",
                hint="Ask the aggregator operator for an invitation under another name.",
            )
        return role

    async def _admit(self, peer: Peer, role: Role, issued: Issued, version: str) -> None:
        """Make the holder of new certificates a member; a site becomes a node of Flower's."""
        certified = describe(load_certificate(issued.certificate_pem.encode()))
        previous = self.registry.member(peer.name)
        node_id = None
        if role is Role.SITE:
            if previous is not None and previous.node_id is not None:
                # A second invitation for the same name replaces the first identity.
                await asyncio.to_thread(self.control.unregister_node, int(previous.node_id))
            key = node_key_bytes(certified.public_key)
            node_id = str(await asyncio.to_thread(self.control.register_node, key, peer.name))
        with self.registry.transaction() as session:
            session.merge(
                Member(
                    name=peer.name,
                    role=role,
                    status="active",
                    serial=certified.serial,
                    certificate_pem=issued.certificate_pem,
                    signer_pem=issued.signer_pem or "",
                    node_id=node_id,
                    joined_at=now(),
                    last_seen=None,
                    session=None,
                    version=version,
                    address=peer.address,
                    trust=None,
                    next_serial=None,
                    next_certificate_pem=None,
                    next_signer_pem=None,
                )
            )
