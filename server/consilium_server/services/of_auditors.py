"""What an auditor may call, and an operator too: signed evidence, handed over in pieces.

A document is made and signed when its first piece is asked for, and kept until its last piece was
fetched, so that all pieces are of one document, however large it is.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.wire import methods
from consilium_server.acts import Acts
from consilium_server.gateway import Service
from consilium_server.issuing import Issuer
from consilium_server.peers import Peer
from consilium_server.records import file_of, site_records
from consilium_server.registry import Registry
from consilium_server.services.fields import number, text
from consilium_server.witness import WitnessKey

#: Characters of one piece; at most four bytes each, so that an answer fits a message.
PIECE: Final = 1_500_000


@dataclass
class AuditServices:
    """The handlers, over one registry."""

    registry: Registry
    issuer: Issuer
    witness: WitnessKey
    acts: Acts
    #: The document that each caller is fetching, by name: one for each.
    handing: dict[str, str] = field(default_factory=dict)

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {methods.AUDIT_RECORDS: self.records, methods.AUDIT_LOG: self.log}

    async def records(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Hand over what the aggregator witnessed and received of a site, as it signs it."""
        site = text(request, "site")
        handed = await self._hand(
            peer,
            request,
            lambda: site_records(self.registry, self.witness, self.issuer.trust, site),
        )
        return {**handed, "site": site}

    async def log(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Hand over the aggregator's audit log, as it signs it."""
        return await self._hand(peer, request, lambda: self.acts.document(self.issuer.trust))

    async def _hand(
        self, peer: Peer, request: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        offset = number(request, "offset")
        if offset == 0:
            document = await asyncio.to_thread(lambda: file_of(make()).decode())
            self.handing[peer.name] = document
        else:
            document = self.handing.get(peer.name, "")
        fingerprint = hashlib.sha256(document.encode()).hexdigest()
        if offset and (offset >= len(document) or request.get("sha256") != fingerprint):
            raise ConsiliumError(
                "network.piece-gone",
                "The document is not being handed over any more.",
                hint="Fetch it again from its beginning.",
            )
        piece = document[offset : offset + PIECE]
        if offset + len(piece) == len(document):
            self.handing.pop(peer.name, None)
        return {"sha256": fingerprint, "characters": len(document), "piece": piece}
