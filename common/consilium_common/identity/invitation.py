"""The invitation file: authority, address and a short-lived certificate for one enrolment."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_new
from consilium_common.identity.certificates import MEMBER_ROLES, Role
from consilium_common.identity.trust import Trust, load_bundle
from consilium_common.identity.words import fingerprint_words

#: What an invitation can make of its holder.
InvitedRole = Annotated[str, Field(pattern=f"^({'|'.join(MEMBER_ROLES)})$")]


class Invitation(BaseModel):
    """All that a site needs for its first, already mutual, call. Secret until used."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Annotated[Literal["consilium/invitation/v1"], Field(alias="schema")] = (
        "consilium/invitation/v1"
    )
    consortium: str
    address: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")]
    name: str
    role: InvitedRole
    expires: datetime
    authority_pem: str  #: the consortium's bundle, see :class:`Trust`
    #: The bootstrap certificate, and after it the enrolment key's where that one issued it.
    certificate_pem: str
    private_key_pem: str

    @property
    def trust(self) -> Trust:
        """Whom the holder trusts: the consortium's authorities."""
        return Trust.load(self.authority_pem.encode())

    @property
    def authority_words(self) -> str:
        """Six words of the authority's key, to compare by telephone."""
        return fingerprint_words(self.trust.authorities[0])

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """The bootstrap certificate's key."""
        key = serialization.load_pem_private_key(self.private_key_pem.encode(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an elliptic-curve key")
        return key


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Write the file with mode 0600; an existing file is not overwritten."""
    write_new(path, invitation.model_dump_json(by_alias=True, indent=2).encode() + b"\n")


def read_invitation(path: Path, *, now: datetime | None = None) -> Invitation:
    """Read and check an invitation.

    Raises
    ------
    ConsiliumError
        ``identity.no-invitation``, ``identity.bad-invitation``, ``identity.invitation-expired``.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            "identity.no-invitation",
            f"Cannot read the invitation: {getattr(error, 'strerror', None) or 'not text'}.",
            where=str(path),
            hint="Give the file that the aggregator operator sent you.",
        ) from error
    try:
        invitation = Invitation.model_validate(json.loads(content))
        trust = invitation.trust
        certificate, *chain = load_bundle(invitation.certificate_pem.encode())
        if invitation.key.public_key() != certificate.public_key():
            raise ValueError("key and certificate do not belong together")
    except (ValidationError, ValueError, ConsiliumError) as error:
        raise ConsiliumError(
            "identity.bad-invitation",
            "The invitation is damaged or not an invitation.",
            where=str(path),
            hint="Ask the aggregator operator to send it again, as a file.",
        ) from error
    if (now or datetime.now(UTC)) > invitation.expires:
        raise ConsiliumError(
            "identity.invitation-expired",
            f"The invitation for {invitation.name!r} expired on {invitation.expires:%Y-%m-%d %H:%M}"
            " UTC.",
            where=str(path),
            hint="Ask the aggregator operator for a new one (`consilium server invite`).",
        )
    certified = trust.with_enrolment(*chain).check(certificate, now=now)
    if certified.role is not Role.INVITATION or certified.name != invitation.name:
        raise ConsiliumError(
            "identity.bad-invitation",
            "The certificate in the invitation is not of this invitation.",
            where=str(path),
            hint="Ask the aggregator operator to send it again, as a file.",
        )
    return invitation
