"""Who is calling: the certificate behind a gRPC call, checked on every call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import unquote

from cryptography import x509

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import (
    Certified,
    Role,
    check_issued,
    describe,
    load_certificate,
)
from consilium_common.wire.methods import PRIVILEGED
from consilium_common.wire.tls13 import grpc
from consilium_server.acts import Acts
from consilium_server.registry import Registry
from consilium_server.tables import InvitationRow, Member, seconds_since

if TYPE_CHECKING:
    from consilium_common.identity.trust import Trust

T = TypeVar("T")

#: How often a call that lasts is held to its caller's standing. What gRPC has buffered by then is
#: still read: both together stay below the two seconds in which a revocation ends a stream.
_ADMIT_SECONDS: Final = 0.5
#: People call now and then: that they were here is noted at most this often.
_SEEN_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Peer:
    """An authenticated caller."""

    certified: Certified
    member: Member | None  #: None for the holder of an invitation
    address: str = ""  #: where it calls from, without the port

    @property
    def name(self) -> str:
        """Name in the certificate."""
        return self.certified.name


class Doorkeeper:
    """Decides from a certificate who calls, and whether that one may still call.

    Parameters
    ----------
    trust
        The consortium's authorities; a callable where they can change while this runs.
    acts
        The audit log, for refused attempts at privileged acts; None notes none.
    """

    def __init__(
        self,
        trust: x509.Certificate | Trust | Callable[[], Trust],
        registry: Registry,
        acts: Acts | None = None,
    ) -> None:
        self._trust = trust
        self._registry = registry
        self._acts = acts

    def admit(
        self,
        context: grpc.aio.ServicerContext,
        roles: frozenset[Role] | None = None,
        method: str = "",
    ) -> Peer:
        """Return the caller.

        Parameters
        ----------
        roles
            Who may call ``method``; None: any member, or the holder of an invitation.

        Raises
        ------
        ConsiliumError
            ``identity.*``: foreign, expired, revoked, replaced, unknown or of the wrong role. The
            reason is for the aggregator's own log; the wire carries none.
        """
        pem = context.auth_context().get("x509_pem_cert")
        if not pem:
            raise ConsiliumError("identity.no-certificate", "No client certificate was presented.")
        # Reading a certificate costs a millisecond, so it is kept; validity in time and standing
        # in the registry are looked up on every call.
        certificate = _load(pem[0])
        try:
            peer = self._judge(certificate, peer_address(context.peer()))
            if roles is not None and peer.certified.role not in roles:
                raise ConsiliumError(
                    "identity.wrong-role",
                    f"{peer.name!r}, {peer.certified.role}, may not call"
                    f" {method.rpartition('/')[2]}.",
                )
        except ConsiliumError as error:
            self._note_refusal(certificate, method, error)
            raise
        return peer

    def _judge(self, certificate: x509.Certificate, address: str) -> Peer:
        trust = self._trust() if callable(self._trust) else self._trust
        certified = check_issued(certificate, trust)
        if certified.role is Role.INVITATION:
            self._check_invitation(certified)
            return Peer(certified, None, address)
        member = self._registry.known_member(certified.name)
        if not _plainly_admitted(member, certified):
            # Looked at closely: it may have joined, or been renewed, a moment ago.
            member = self._registry.member(certified.name)
        if member is None or member.role != certified.role:
            raise ConsiliumError(
                "identity.unknown",
                f"{certified.name!r} is not a member here.",
                hint="Ask the aggregator operator for an invitation.",
            )
        if member.status == "revoked":
            raise ConsiliumError(
                "identity.revoked",
                f"The certificate of {certified.name!r} was revoked.",
                hint="Ask the aggregator operator; joining again needs a new invitation.",
            )
        if member.serial != certified.serial:
            if member.next_serial != certified.serial:
                raise ConsiliumError(
                    "identity.replaced",
                    f"The certificate of {certified.name!r} was replaced by a newer one.",
                )
            # The renewed certificate has arrived and works: from now on it alone is in force.
            member = self._registry.promote(certified.name, certified.serial)
        if member.role != Role.SITE and (
            member.address != address or seconds_since(member.last_seen) > _SEEN_SECONDS
        ):
            # A site says by itself that it is there, with its release.
            member = self._registry.note_seen(certified.name, address)
        return Peer(certified, member, address)

    def _note_refusal(
        self, certificate: x509.Certificate, method: str, error: ConsiliumError
    ) -> None:
        if self._acts is None or method not in PRIVILEGED:
            return
        try:
            claimed = describe(certificate)
        except ConsiliumError:
            return  # it names nobody; the refusal stands in the gateway's log
        self._acts.note_refused(
            claimed.name,
            claimed.role,
            method.rpartition("/")[2].lower(),
            f"certificate {claimed.serial}",
            error.code,
            digest=claimed.fingerprint,
        )

    def _check_invitation(self, certified: Certified) -> None:
        with self._registry.transaction() as session:
            row = session.get(InvitationRow, certified.serial)
        if row is None:
            raise ConsiliumError("identity.unknown", "This invitation was withdrawn.")
        if row.used_at is not None:
            raise ConsiliumError(
                "identity.invitation-used",
                f"The invitation for {certified.name!r} was used already.",
                hint="Each invitation works once. If it was not you, tell the aggregator operator"
                " at once; otherwise ask for a new one.",
            )


def _plainly_admitted(member: Member | None, certified: Certified) -> bool:
    return (
        member is not None
        and member.role == certified.role
        and member.status == "active"
        and member.serial == certified.serial
        and (member.node_id is not None or certified.role is not Role.SITE)
    )


@lru_cache(maxsize=4096)
def _load(pem: bytes) -> x509.Certificate:
    return load_certificate(pem)


def peer_address(peer: str) -> str:
    """Return the address in gRPC's name of a peer (``ipv4:192.0.2.7:4711``), without the port."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return rest.rpartition(":")[0].strip("[]")


async def while_admitted(work: Awaitable[T], admit: Callable[[], object]) -> T:
    """Wait for ``work`` as long as its caller may call, asked twice a second.

    Raises
    ------
    ConsiliumError
        What ``admit`` raises; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_ADMIT_SECONDS))[0]:
            admit()
        return task.result()
    finally:
        task.cancel()
