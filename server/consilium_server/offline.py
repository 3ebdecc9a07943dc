"""The authority's key far from any network: requests are carried to it, certificates back.

The aggregator signs the file of requests with its witness's key, which the authority certified when
it was made: what was changed on the way is not certified. A person compares each request's words.
What comes back needs no signature of its own: certificates are signed by the authority itself, and
each must fit a request that waits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography.hazmat.primitives.asymmetric import ed25519
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, requested_key
from consilium_common.identity.certificates import SIGNING_ROLE_OF, Role, load_certificate
from consilium_common.identity.enrolment import read_form
from consilium_common.identity.keys import load_signing_key, public_fingerprint, verify_signature
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_server.home import ServerHome
from consilium_server.issuing import Issuer, issue_with, renew_server_if_due
from consilium_server.registry import Registry
from consilium_server.tables import now
from consilium_server.waiting import CertificateRequest, Wanted, waiting

#: Roles that are certified on request; every other key the authority certifies when it is made.
_ROLES: Final = (Role.SITE, Role.OPERATOR, Role.AUDITOR, Role.SERVER)
_Pem = Annotated[str, Field(max_length=64 * 1024)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class OfflineRequest(_File):
    """One certificate that is asked for."""

    id: _Digest  #: of what is asked for, see :class:`~consilium_server.waiting.Wanted`
    name: str
    role: Literal["site", "operator", "auditor", "server"]
    hosts: list[str]
    authority: _Digest
    asked_at: str
    request_pem: _Pem
    signer_request_pem: _Pem | None

    @property
    def wanted(self) -> Wanted:
        """What is asked for."""
        signer = self.signer_request_pem
        return Wanted(
            self.name,
            Role(self.role),
            self.request_pem.encode(),
            None if signer is None else signer.encode(),
            tuple(self.hosts),
            self.authority,
        )

    @property
    def words(self) -> str:
        """Six words for the key, to compare by telephone with whoever made it."""
        return fingerprint_words(requested_key(self.request_pem.encode(), Role(self.role)))


class Requests(_File):
    """The file that is carried to the authority; nothing in it is secret."""

    schema_: Annotated[Literal["consilium/requests/v1"], Field(alias="schema")] = (
        "consilium/requests/v1"
    )
    consortium: str
    written_at: str
    requests: list[OfflineRequest]
    witness_pem: _Pem
    #: Ed25519 over the canonical JSON of all other fields, hexadecimal.
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def signed(self) -> bytes:
        """Return the bytes that the aggregator signs."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude={"signature"}))


class Answered(_File):
    """One request's certificates."""

    id: _Digest
    certificate_pem: _Pem
    signer_pem: _Pem | None


class Signed(_File):
    """The file that is carried back; nothing in it is secret."""

    schema_: Annotated[Literal["consilium/signed/v1"], Field(alias="schema")] = (
        "consilium/signed/v1"
    )
    consortium: str
    certificates: list[Answered]


def waiting_requests(home: ServerHome, issuer: Issuer) -> Requests:
    """Return the requests that wait, signed by the aggregator.

    Raises
    ------
    ConsiliumError
        ``identity.no-request`` when none waits.
    """
    rows = waiting(Registry(home.database))
    if not rows:
        raise ConsiliumError(
            "identity.no-request",
            "No request waits for the authority.",
            hint="Sites' requests come with `consilium site join`; nothing is to be done.",
        )
    unsigned = Requests(
        consortium=issuer.trust.consortium,
        written_at=now(),
        requests=[_request(row) for row in rows],
        witness_pem=(home.identity / "witness.pem").read_text(encoding="ascii"),
        signature="0" * 128,
    )
    key = load_signing_key(home.identity / "witness-key.pem")
    return unsigned.model_copy(update={"signature": key.sign(unsigned.signed()).hex()})


def read_requests(path: Path, trust: Trust) -> Requests:
    """Read a file of requests and check that this consortium's aggregator wrote it.

    Parameters
    ----------
    trust : Trust
        What the authority's own folder says; during a rotation the aggregator's witness is still
        certified by the authority before.

    Raises
    ------
    ConsiliumError
        ``identity.no-file``, ``identity.bad-file``, ``identity.foreign``,
        ``identity.bad-signature``.
    """
    content = read_form(Requests, path)
    if content.consortium != trust.consortium:
        raise ConsiliumError(
            "identity.foreign",
            "The requests are of another consortium than this authority's.",
            where=str(path),
            hint="Take the folder of this consortium's authority.",
        )
    witness = trust.check(load_certificate(content.witness_pem.encode()))
    key = witness.public_key
    genuine = (
        witness.role is Role.WITNESS
        and isinstance(key, ed25519.Ed25519PublicKey)
        and verify_signature(key, bytes.fromhex(content.signature), content.signed())
        and all(request.wanted.digest == request.id for request in content.requests)
    )
    if not genuine:
        raise ConsiliumError(
            "identity.bad-signature",
            "The file is not as the aggregator wrote it.",
            where=str(path),
            hint="Write it again at the aggregator (`consilium server requests`) and carry it"
            " here yourself.",
        )
    return content


def sign_offline(
    authority: Authority, content: Requests, agree: Callable[[OfflineRequest], bool]
) -> tuple[Signed, list[OfflineRequest]]:
    """Certify those requests to which the person agrees.

    Returns
    -------
    Signed
        What to carry back.
    list of OfflineRequest
        Those left out: refused, or meant for another authority during a rotation.
    """
    own = public_fingerprint(authority.key.public_key())
    signed, left = [], []
    for request in content.requests:
        wanted = request.wanted
        if wanted.authority != own or wanted.role not in _ROLES or not agree(request):
            left.append(request)
            continue
        issued = issue_with(
            authority,
            wanted.name,
            wanted.role,
            wanted.request_pem,
            wanted.signer_request_pem,
            hosts=wanted.hosts,
        )
        signed.append(
            Answered(
                id=request.id,
                certificate_pem=issued.certificate_pem,
                signer_pem=issued.signer_pem,
            )
        )
    return Signed(consortium=content.consortium, certificates=signed), left


def take(home: ServerHome, issuer: Issuer, path: Path) -> list[CertificateRequest]:
    """Store what the authority certified; each must fit a request that waits here.

    All are checked before one is stored.

    Returns
    -------
    list of CertificateRequest
        Those that are answered now.

    Raises
    ------
    ConsiliumError
        ``identity.no-file``, ``identity.bad-file``, ``identity.bad-certificate``;
        ``identity.no-request`` when nothing waits for one of them (the file was taken already).
    """
    content = read_form(Signed, path)
    trust = issuer.trust
    with Registry(home.database).transaction() as session:
        taken = []
        for answered in content.certificates:
            row = session.scalar(
                select(CertificateRequest).where(
                    CertificateRequest.digest == answered.id,
                    CertificateRequest.state == "waiting",
                )
            )
            if row is None:
                raise ConsiliumError(
                    "identity.no-request",
                    "The file answers a request that does not wait here.",
                    where=str(path),
                    hint="It was taken already, or the request was withdrawn. Nothing was stored;"
                    " write the requests again (`consilium server requests`).",
                )
            _check_answer(row, answered, trust, path)
            row.certificate_pem, row.signer_pem = answered.certificate_pem, answered.signer_pem
            row.state = "signed"
            taken.append(row)
    renew_server_if_due(home, issuer)
    return taken


def _check_answer(row: CertificateRequest, answered: Answered, trust: Trust, path: Path) -> None:
    """Check that certificates are for a request's own keys, name and role."""
    pairs = [(answered.certificate_pem, row.request_pem, Role(row.role))]
    if (row.signer_request_pem is None) is not (answered.signer_pem is None):
        raise _unfit(path)
    if row.signer_request_pem is not None and answered.signer_pem is not None:
        signing = SIGNING_ROLE_OF[Role(row.role)]
        pairs.append((answered.signer_pem, row.signer_request_pem, signing))
    for certificate_pem, request_pem, role in pairs:
        certified = trust.check(load_certificate(certificate_pem.encode(), where=str(path)))
        if (certified.name, certified.role) != (row.name, role) or (
            certified.public_key != requested_key(request_pem.encode(), role)
        ):
            raise _unfit(path)


def _unfit(path: Path) -> ConsiliumError:
    return ConsiliumError(
        "identity.bad-certificate",
        "A certificate in the file is for another key, name or role than was asked for.",
        where=str(path),
        hint="Nothing was stored. Certify the requests again, and find out who changed the file.",
    )


def _request(row: CertificateRequest) -> OfflineRequest:
    # Validated from the register's own row: a hint of damage is an error, not a signed request.
    return OfflineRequest.model_validate(
        {
            "id": row.digest,
            **{
                name: getattr(row, name)
                for name in (
                    "name",
                    "role",
                    "hosts",
                    "authority",
                    "asked_at",
                    "request_pem",
                    "signer_request_pem",
                )
            },
        }
    )
