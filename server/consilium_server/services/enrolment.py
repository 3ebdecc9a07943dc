"""Enrolment: the holder of an invitation becomes a member."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role
from consilium_common.wire import methods
from consilium_server.flower_private import Control, node_key_bytes
from consilium_server.gateway import Service
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text
from consilium_server.tables import Member, now


@dataclass
class Enrolment:
    """What the holder of an invitation may call."""

    registry: Registry
    authority: Authority
    control: Control

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {methods.ENROL: self.enrol}

    async def enrol(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Certify the keys of a site that holds an unused invitation; the invitation is spent."""
        name = peer.name
        certificate = self.authority.issue_from_request(
            text(request, "request_pem").encode(), Role.SITE, name
        )
        signer = self.authority.issue_from_request(
            text(request, "signer_request_pem").encode(), Role.SIGNER, name
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
                    version=text(request, "version"),
                )
            )
        return {
            "certificate_pem": certificate_pem(certificate).decode(),
            "signer_pem": certificate_pem(signer).decode(),
        }
