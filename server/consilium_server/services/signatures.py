"""Signing a study that several operators must sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from consilium_common.wire import methods
from consilium_server.cosigning import cosign, signatures_overview
from consilium_server.gateway import Service
from consilium_server.issuing import Issuer
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text


@dataclass
class Signatures:
    """What an operator may call to sign."""

    registry: Registry
    issuer: Issuer

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {methods.OPERATOR_SIGN: self.sign}

    async def sign(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Take an operator's signature of a study; the same again changes nothing."""
        assert peer.member is not None
        row = self.registry.study(text(request, "digest"))
        known = cosign(
            self.registry, self.issuer.trust, row, peer.member, text(request, "signature")
        )
        return {
            "digest": row.digest,
            "name": row.name,
            "known": known,
            **signatures_overview(self.registry, row),
        }
