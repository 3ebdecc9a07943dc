"""Joining without a network: a request file goes to the aggregator, a certificate file comes back.

The request is signed with the invitation's key, so it proves what a call over the network would:
that whoever asks holds the invitation, and that nobody changed it on the way.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_new
from consilium_common.identity.certificates import (
    SIGNING_ROLE_OF,
    Certified,
    Role,
    load_certificate,
)
from consilium_common.identity.invitation import Invitation, InvitedRole
from consilium_common.identity.keys import PublicKey
from consilium_common.identity.trust import Trust, load_bundle

#: No such file is larger.
_LARGEST: Final = 1024 * 1024
_Pem = Annotated[str, Field(max_length=64 * 1024)]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class InvitationSerial(_File):
    """Which invitation it is."""

    serial: Annotated[str, Field(pattern=r"^[0-9a-f]{1,40}$")]


class JoinRequest(_File):
    """What somebody who was invited asks for; nothing in it is secret."""

    schema_: Annotated[Literal["consilium/join-request/v1"], Field(alias="schema")] = (
        "consilium/join-request/v1"
    )
    invitation: InvitationSerial
    name: str
    role: InvitedRole
    request_pem: _Pem
    signer_request_pem: _Pem | None
    version: Annotated[str, Field(max_length=40)]
    invitation_pem: _Pem
    #: ECDSA with SHA-384 over the canonical JSON of all other fields, DER, hexadecimal.
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){8,200}$")]

    def signed(self) -> bytes:
        """Return the bytes that the invitation's key signs."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude={"signature"}))


class Certificates(_File):
    """What the aggregator answers; nothing in it is secret."""

    schema_: Annotated[Literal["consilium/certificates/v1"], Field(alias="schema")] = (
        "consilium/certificates/v1"
    )
    name: str
    role: InvitedRole
    certificate_pem: _Pem
    signer_pem: _Pem | None
    authority_pem: _Pem
    #: The old authority's word for a new one that the invitation did not know yet.
    cross_pem: _Pem | None = None
    address: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")]


def join_request(
    invitation: Invitation, *, request_pem: bytes, signer_request_pem: bytes | None, version: str
) -> JoinRequest:
    """Make a request for the holder of ``invitation``; write it with :func:`write_form`."""
    certificate = load_certificate(invitation.certificate_pem.encode())
    unsigned = JoinRequest(
        invitation=InvitationSerial(serial=f"{certificate.serial_number:x}"),
        name=invitation.name,
        role=invitation.role,
        request_pem=request_pem.decode(),
        signer_request_pem=None if signer_request_pem is None else signer_request_pem.decode(),
        version=version,
        invitation_pem=invitation.certificate_pem,
        signature="00" * 8,
    )
    signature = invitation.key.sign(unsigned.signed(), ec.ECDSA(hashes.SHA384()))
    return unsigned.model_copy(update={"signature": signature.hex()})


def write_form(path: Path, form: BaseModel) -> None:
    """Write a request or an answer to a new file (mode 0600), or raise ``state.exists``."""
    write_new(path, form.model_dump_json(by_alias=True, indent=2).encode() + b"\n")


def read_join_request(path: Path, trust: Trust, *, now: datetime | None = None) -> JoinRequest:
    """Read a request and check that the holder of an invitation of this consortium made it.

    Whether the invitation is still unused is the register's to say.

    Raises
    ------
    ConsiliumError
        ``identity.no-file``, ``identity.bad-file``, ``identity.bad-signature``, and what
        :meth:`Trust.check` says of the invitation.
    """
    request = read_form(JoinRequest, path)
    # With the consortium's own enrolment keys alone: those in the file prove nothing.
    certificate = load_bundle(request.invitation_pem.encode(), where=str(path))[0]
    certified = trust.check(certificate, now=now)
    key = certified.public_key
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(bytes.fromhex(request.signature), request.signed(), ec.ECDSA(hashes.SHA384()))
        genuine = certified.role is Role.INVITATION and (certified.name, certified.serial) == (
            request.name,
            request.invitation.serial,
        )
    except InvalidSignature:
        genuine = False
    if not genuine:
        raise ConsiliumError(
            "identity.bad-signature",
            "The request was not made with the invitation that it names, or it was changed since.",
            where=str(path),
            hint="Ask the site to write it again (`consilium site join INVITATION --request FILE`)",
        )
    return request


def read_certificates(
    path: Path,
    invitation: Invitation,
    public_key: PublicKey,
    signer_key: PublicKey | None,
    *,
    now: datetime | None = None,
) -> Certificates:
    """Read the aggregator's answer and check that it is for these keys and this invitation.

    Raises
    ------
    ConsiliumError
        ``identity.no-file``, ``identity.bad-file``, and what :func:`check_answer` raises.
    """
    answer = read_form(Certificates, path)
    check_answer(
        answer.model_dump(),
        invitation.trust,
        (invitation.name, Role(invitation.role)),
        public_key,
        signer_key,
        now=now,
    )
    return answer


def check_answer(
    answer: dict[str, Any],
    trust: Trust,
    holder: tuple[str, Role],
    public_key: PublicKey,
    signer_key: PublicKey | None,
    *,
    now: datetime | None = None,
) -> Certified:
    """Check certificates that the aggregator issued, over the network or in a file.

    Parameters
    ----------
    answer : dict
        ``certificate_pem``, ``signer_pem`` and, where the authorities changed, ``authority_pem``
        with ``cross_pem``.
    trust : Trust
        Whom the holder trusts already.
    holder : tuple
        Name and role that the certificates must carry.
    signer_key
        The Ed25519 key; None for an auditor.

    Raises
    ------
    ConsiliumError
        ``identity.bad-certificate`` for other keys, another name or role;
        ``identity.untrusted-authority``, and what :meth:`Trust.check` raises.
    """
    bundle, cross = answer.get("authority_pem"), answer.get("cross_pem")
    if bundle:
        trust = trust.follow(_text(bundle), _text(cross) if cross else None, now=now)
    certified = trust.check(load_certificate(_text(answer.get("certificate_pem"))), now=now)
    fits = (certified.name, certified.role) == holder and certified.public_key == public_key
    if signer_key is not None:
        signer = trust.check(load_certificate(_text(answer.get("signer_pem"))), now=now)
        fits &= (signer.name, signer.role) == (holder[0], SIGNING_ROLE_OF.get(holder[1]))
        fits &= signer.public_key == signer_key
    if not fits:
        raise ConsiliumError(
            "identity.bad-certificate",
            "The aggregator certified another key, name or role than was asked for.",
            hint="Ask the aggregator operator; nothing was stored.",
        )
    return certified


F = TypeVar("F", bound=BaseModel)


def read_form(kind: type[F], path: Path) -> F:
    """Read a small JSON file of a given form, strictly.

    Raises
    ------
    ConsiliumError
        ``identity.no-file``, ``identity.bad-file``.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise ConsiliumError(
            "identity.no-file",
            f"Cannot read the file: {error.strerror or error}.",
            where=str(path),
            hint="Check the path, and whether the file was carried over whole.",
        ) from error
    try:
        if len(content) > _LARGEST:
            raise ValueError("too large")
        # Validated as JSON: strict models take its strings and lists for what they are.
        return kind.model_validate_json(json.dumps(json.loads(content)))
    except (ValidationError, ValueError, RecursionError) as error:
        raise ConsiliumError(
            "identity.bad-file",
            "The file is damaged, or not the one that is wanted here.",
            where=str(path),
            hint="Ask for it again, made by the same release of consilium.",
        ) from error


def _text(value: object) -> bytes:
    if not isinstance(value, str):
        raise ConsiliumError("identity.bad-certificate", "The answer lacks a certificate.")
    return value.encode()
