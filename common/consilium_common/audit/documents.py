"""What an auditor is handed besides the ledger: a site's egress list and the aggregator's records.

Both are read strictly. The records are signed by the aggregator's witness key, whose certificate
stands in them; the caller decides whether to trust the authority that issued it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Count, Purpose, Sha256, is_time
from consilium_common.ledger.witness import MalformedRecordError, WitnessRecord

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from consilium_common.identity.certificates import Certified, Trusting
    from consilium_common.identity.trust import Trust

#: No evidence is larger; a file that is would fill the auditor's memory.
_LARGEST: Final = 512 * 1024 * 1024


class Update(NamedTuple):
    """What names one thing that left: study, purpose, round and SHA-256 of its bytes."""

    study: str
    purpose: str
    round: int
    sha256: str


def _time(text: str) -> str:
    if not is_time(text):
        raise ValueError("not a UTC time of a ledger")
    return text


class Document(BaseModel):
    """Strict: no unknown key, no conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Leaving(Document):
    study: Sha256
    purpose: Purpose
    round: Count
    sha256: Sha256
    bytes: Count

    @property
    def update(self) -> Update:
        """What names it."""
        return Update(self.study, self.purpose, self.round, self.sha256)


class Released(_Leaving):
    """One thing that the site stored to send."""

    stored_at: str


class Received(_Leaving):
    """One thing that the aggregator accepted from the site."""

    time: str


class Egress(Document):
    """What a site says it stored to send, ``egress.json`` of its evidence."""

    schema_: Annotated[Literal["consilium/egress/v1"], Field(alias="schema")]
    site: Annotated[str, Field(min_length=1)]
    #: When the site began to gather its evidence, by its clock; None before that was written.
    written_at: Annotated[str, AfterValidator(_time)] | None = None
    released: list[Released]


class _Content(Document):
    schema_: Annotated[Literal["consilium/records/v1"], Field(alias="schema")]
    site: Annotated[str, Field(min_length=1)]
    written_at: str
    signer_pem: str
    witness_pem: str
    authority_pem: str
    #: Read by the ledger's own reader of witness records.
    witnessed: list[Any]
    received: list[Received]


class _Signed(Document):
    content: _Content
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True)
class Records:
    """The aggregator's records of one site, their signatures checked."""

    path: str
    site: str
    written_at: str
    trust: Trust
    signer: Certified
    witness: Certified
    witnessed: tuple[WitnessRecord, ...]
    received: tuple[Received, ...]


def read_egress(path: Path) -> Egress:
    """Read a site's egress list.

    Raises
    ------
    ConsiliumError
        ``privacy.evidence-read``, ``privacy.evidence-form``.
    """
    return _parse(Egress, read_json(path), path)


def read_records(path: Path, *, trusted: Path | None = None) -> Records:
    """Read the aggregator's records and check every signature in them.

    Parameters
    ----------
    trusted : Path, optional
        The consortium's authority certificate, known from elsewhere: that in the records must be
        its own.

    Raises
    ------
    ConsiliumError
        ``privacy.evidence-read``, ``privacy.evidence-form``; ``privacy.records-broken`` when a
        signature does not hold; ``identity.…`` when a certificate is not of the authority named
        there, or of another role.
    """
    from consilium_common.identity.certificates import Role

    document = read_json(path)
    signed = _parse(_Signed, document, path)
    content = signed.content
    where = str(path)
    trust = judging(content.authority_pem.encode(), trusted, where=where)
    if trust is None:
        raise _broken(path, "their authority is not the one given with --authority")
    witness = issued(content.witness_pem.encode(), trust, Role.WITNESS, where=where)
    signer = issued(content.signer_pem.encode(), trust, Role.SIGNER, where=where)
    if signer.name != content.site:
        raise _broken(path, "the ledger key in it is another site's")
    key = signing_key(witness)
    from consilium_common.identity.keys import verify_signature

    # The bytes that were signed are those of the file's own content, not of our reading of it.
    if not verify_signature(
        key, bytes.fromhex(signed.signature), canonical_json(document["content"])
    ):
        raise _broken(path, "they are not signed by the aggregator's witness key")
    witnessed = []
    for index, value in enumerate(content.witnessed):
        try:
            record = WitnessRecord.from_dict(value)
        except MalformedRecordError as error:
            raise _form(path, f"`content.witnessed.{index}` is wrong: {error}") from error
        if record.site != content.site or not record.signed_by(key):
            raise _broken(path, f"the record of entry {record.head.sequence} is not signed by it")
        witnessed.append(record)
    return Records(
        path=where,
        site=content.site,
        written_at=content.written_at,
        trust=trust,
        signer=signer,
        witness=witness,
        witnessed=tuple(witnessed),
        received=tuple(content.received),
    )


def judging(bundle: bytes, trusted: Path | None, *, where: str) -> Trust | None:
    """Return the authorities that judge a document's certificates; None: they are not the known.

    Parameters
    ----------
    bundle : bytes
        The authorities that came with the document, PEM.
    trusted : Path or None
        Those known from elsewhere: they judge then, and one of theirs must be in the bundle.

    Raises
    ------
    ConsiliumError
        ``identity.bad-certificate`` and others of reading them.
    """
    from consilium_common.identity.trust import Trust, key_of

    brought = Trust.load(bundle, where=where)
    if trusted is None:
        return brought
    known = Trust.read(trusted)
    # Of a document from before a rotation: an authority that was replaced since.
    ours = {key_of(one) for one in known.authorities + known.former}
    return known if ours & {key_of(one) for one in brought.authorities} else None


def issued(
    pem: bytes, authority: x509.Certificate | Trusting, role: Any, *, where: str
) -> Certified:
    """Return the holder of a certificate that ``authority`` issued for ``role``.

    Whether it is valid today is not asked: evidence is looked at long after it was made.

    Raises
    ------
    ConsiliumError
        ``identity.bad-certificate``, ``identity.foreign``, ``identity.bad-role``.
    """
    from consilium_common.identity.certificates import check_issued, load_certificate

    certificate = load_certificate(pem, where=where)
    holder = check_issued(certificate, authority, now=certificate.not_valid_before_utc)
    if holder.role is not role:
        raise ConsiliumError(
            "identity.bad-role",
            f"The certificate of {holder.name!r} is one of {holder.role}, not of {role}.",
            where=where,
            hint="Ask the site and the aggregator for the right certificate.",
        )
    signing_key(holder)
    return holder


def signing_key(holder: Certified) -> Ed25519PublicKey:
    """Return the holder's Ed25519 key, or raise ``identity.bad-key``."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(holder.public_key, Ed25519PublicKey):
        raise ConsiliumError(
            "identity.bad-key", f"The key of {holder.name!r} signs no ledger; it is not Ed25519."
        )
    return holder.public_key


def read_json(path: Path) -> Any:
    """Read a JSON file, each key once.

    Raises
    ------
    ConsiliumError
        ``privacy.evidence-read``, ``privacy.evidence-form``.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ConsiliumError(
                "privacy.evidence-form", "The file is too large to be evidence.", where=str(path)
            )
        content = path.read_bytes()
    except OSError as error:
        raise ConsiliumError(
            "privacy.evidence-read",
            f"Cannot read the file: {error.strerror or error}.",
            where=str(path),
            hint="Check the path, and whether the evidence was handed over whole.",
        ) from error
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise _form(path, "it is not JSON") from error


D = TypeVar("D", bound=Document)


def _parse(kind: type[D], value: Any, path: Path) -> D:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise _form(
            path, f"`{place}` is missing or wrong" if place else "it is no object"
        ) from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _form(path: Path, what: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.evidence-form",
        f"The file is not what it should be: {what}.",
        where=str(path),
        hint="Ask for it again, made by the same release of consilium.",
    )


def _broken(path: Path, what: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.records-broken",
        f"The aggregator's records do not verify: {what}.",
        where=str(path),
        hint="Ask the aggregator for its records again, and do not rely on these.",
    )
