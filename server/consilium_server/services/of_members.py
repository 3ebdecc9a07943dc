"""What every member may call: renewing its certificate, and learning whom to trust."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import load_request
from consilium_common.identity.certificates import Role, load_certificate
from consilium_common.wire import methods
from consilium_server.gateway import Service
from consilium_server.issuing import Issuer
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text
from consilium_server.tables import Member

#: Characters of one probe.
MAX_PROBE: Final = 4 * 1024 * 1024


@dataclass
class MemberServices:
    """The handlers, over one registry and the consortium's issuer."""

    registry: Registry
    issuer: Issuer

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {
            methods.MEMBER_RENEW: self.renew,
            methods.MEMBER_TRUST: self.trust,
            methods.MEMBER_PROBE: self.probe,
        }

    async def renew(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Certify the keys that a member has already for another period.

        The certificate in force stays so until the new one is used for the first time.
        """
        assert peer.member is not None
        request_pem = text(request, "request_pem")
        if load_request(request_pem.encode()).public_key() != peer.certified.public_key:
            raise _other_key("certificate")
        signer_request = None
        if peer.certified.role is not Role.AUDITOR:
            signer_request = text(request, "signer_request_pem")
            known = load_certificate(peer.member.signer_pem.encode()).public_key()
            if load_request(signer_request.encode()).public_key() != known:
                raise _other_key("signing key's certificate")
        issued = self.issuer.issue(
            peer.name,
            peer.certified.role,
            request_pem.encode(),
            None if signer_request is None else signer_request.encode(),
        )
        if issued is None:
            return {"waiting": True}
        certificate = load_certificate(issued.certificate_pem.encode())
        with self.registry.transaction() as session:
            member = session.get_one(Member, peer.name)
            member.next_serial = f"{certificate.serial_number:x}"
            member.next_certificate_pem = issued.certificate_pem
            member.next_signer_pem = issued.signer_pem
        return {
            "certificate_pem": issued.certificate_pem,
            "signer_pem": issued.signer_pem,
            "authority_pem": self.issuer.trust.pem().decode(),
            "cross_pem": self.issuer.cross_pem,
        }

    async def trust(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return the consortium's authorities, and the old one's word for the new."""
        if "trust" in request:
            with self.registry.transaction() as session:
                session.get_one(Member, peer.name).trust = text(request, "trust")[:64]
        return {
            "authority_pem": self.issuer.trust.pem().decode(),
            "cross_pem": self.issuer.cross_pem,
        }

    async def probe(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Say what came and when, and send as much text as was asked for: measures the way.

        It touches nothing, so that a doctor's call does not look like a site that started.
        """
        content, want = request.get("content"), request.get("want", 0)
        if not isinstance(content, str) or type(want) is not int:
            raise ConsiliumError("network.garbage", "A probe has text, and a number of characters.")
        if not (len(content) <= MAX_PROBE and 0 <= want <= MAX_PROBE):
            raise ConsiliumError(
                "network.garbage", f"A probe is ASCII text of at most {MAX_PROBE} characters."
            )
        raw = content.encode()
        return {
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            # Random, so that nothing on the way makes it smaller.
            "content": base64.b64encode(os.urandom(want))[:want].decode(),
            "time": datetime.now(UTC).isoformat(),
            "version": __version__,
            "protocol": methods.PROTOCOL,
        }


def _other_key(what: str) -> ConsiliumError:
    return ConsiliumError(
        "identity.other-key",
        f"The request for a new {what} is for another key than the member's.",
        hint="A renewal keeps the keys. With a new key one joins again, with an invitation.",
    )
