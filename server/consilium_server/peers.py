"""Who is calling: the certificate behind a gRPC call, checked on every call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import (
    Certified,
    Role,
    check_issued,
    load_certificate,
)
from consilium_common.wire.tls13 import grpc
from consilium_server.registry import Registry
from consilium_server.tables import InvitationRow, Member


@dataclass(frozen=True)
class Peer:
    """An authenticated caller."""

    certified: Certified
    member: Member | None  #: None for the holder of an invitation

    @property
    def name(self) -> str:
        """Name in the certificate."""
        return self.certified.name


class Doorkeeper:
    """Decides from a certificate who calls, and whether that one may still call."""

    def __init__(self, authority: x509.Certificate, registry: Registry) -> None:
        self._authority = authority
        self._registry = registry

    def admit(self, context: grpc.aio.ServicerContext) -> Peer:
        """Return the caller.

        Raises
        ------
        ConsiliumError
            ``identity.*``: foreign, expired, revoked, replaced or unknown.
        """
        pem = context.auth_context().get("x509_pem_cert")
        if not pem:
            raise ConsiliumError("identity.no-certificate", "No client certificate was presented.")
        # Reading a certificate costs a millisecond, so it is kept; validity in time and standing
        # in the registry are looked up on every call.
        certified = check_issued(_load(pem[0]), self._authority)
        if certified.role is Role.INVITATION:
            self._check_invitation(certified)
            return Peer(certified, None)
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
            raise ConsiliumError(
                "identity.replaced",
                f"The certificate of {certified.name!r} was replaced by a newer one.",
            )
        return Peer(certified, member)

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


@lru_cache(maxsize=4096)
def _load(pem: bytes) -> x509.Certificate:
    return load_certificate(pem)
