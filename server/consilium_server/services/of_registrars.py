"""What an operator may call about members: who they are, inviting one, revoking one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import requested_key
from consilium_common.identity.certificates import MEMBER_ROLES, Role
from consilium_common.identity.keys import public_fingerprint
from consilium_common.wire import methods
from consilium_server.gateway import Service
from consilium_server.home import ServerHome
from consilium_server.members import certify_invitation, revocation, revoke_member
from consilium_server.overview import people_overview, sites_overview
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.services.fields import text

#: An invitation lies in a mailbox: it is not valid longer.
MAX_HOURS: Final = 24.0 * 30


@dataclass
class RegistrarServices:
    """The handlers, over one registry and the home that holds the key for invitations."""

    home: ServerHome
    registry: Registry

    def table(self) -> dict[str, Service]:
        """Return the handler of each method."""
        return {
            methods.OPERATOR_SITES: self.sites,
            methods.OPERATOR_INVITE: self.invite,
            methods.OPERATOR_REVOKE: self.revoke,
        }

    async def sites(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Return every site, operator and auditor, and how each stands."""
        return await asyncio.to_thread(
            lambda: {
                "sites": sites_overview(self.registry),
                "people": people_overview(self.registry),
            }
        )

    async def invite(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Certify a bootstrap key that the operator made: an invitation but for its secret."""
        role, hours = text(request, "role"), request.get("hours")
        if role not in MEMBER_ROLES:
            raise ConsiliumError("network.garbage", "Nobody can be invited to that role.")
        if not isinstance(hours, int | float) or not 0 < hours <= MAX_HOURS:
            raise ConsiliumError(
                "usage.hours", f"An invitation is valid for more than 0 and at most {MAX_HOURS} h."
            )
        name, request_pem = text(request, "name"), text(request, "request_pem").encode()
        answer = await asyncio.to_thread(
            certify_invitation, self.home, name, Role(role), timedelta(hours=hours), request_pem
        )
        key = requested_key(request_pem, Role.INVITATION)
        return {**answer, "name": name, "role": role, "fingerprint": public_fingerprint(key)}

    async def revoke(self, peer: Peer, request: dict[str, Any]) -> Any:
        """Revoke a member: its calls are refused from now on, open ones within two seconds."""
        member = await asyncio.to_thread(revoke_member, self.registry, text(request, "name"))
        return revocation(member)
