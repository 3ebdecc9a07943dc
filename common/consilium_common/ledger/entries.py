"""One ledger entry: its canonical bytes, its hash, its signature, and the body of each kind.

The format is written down in ``common/LEDGER.md``; what is here and what is there must agree.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from consilium_common.canonical import canonical_json, digest
from consilium_common.errors import ConsiliumError
from consilium_common.privacy.events import ADJACENCY, UNIT, PrivacyEvent

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

#: Name and version of the format; also what separates these signatures from all others.
FORMAT: Final = "consilium/ledger/v1"
#: ``previous`` of the first entry.
GENESIS: Final = "0" * 64

#: A charge is for a round's training, for the evaluation after so many rounds, or for statistics.
Purpose = Literal["training", "evaluation", "statistics"]
#: Who adds the noise, and so whom the promise protects against.
ThreatModel = Literal["silo-local"]
Kind = Literal["opened", "cohort", "charge", "released", "voided", "policy"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: A patient as the ledger knows one: a keyed hash, never an identity.
PatientKey = Annotated[str, Field(pattern=r"^[0-9a-f]{32,64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
_HEXADECIMAL: Final = frozenset("0123456789abcdef")
#: The form of every time; whether the day exists is asked of the calendar.
TIME_PATTERN: Final = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{6}Z"
)
_TIME: Final = re.compile(TIME_PATTERN)


class Body(BaseModel):
    """Strict: no unknown key, no conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Opened(Body):
    """First entry: which site's ledger, signed by which key."""

    public_key: Sha256  # 32 bytes of Ed25519, 64 hexadecimal digits
    unit: Literal["patient"] = UNIT
    adjacency: Literal["add-or-remove-one"] = ADJACENCY


class Cohort(Body):
    """The patients whose records a charge may touch; recorded once, named by digest after."""

    cohort: Sha256
    patients: Annotated[list[PatientKey], Field(min_length=1)]

    @field_validator("patients")
    @classmethod
    def _sorted(cls, patients: list[str]) -> list[str]:
        if any(a >= b for a, b in itertools.pairwise(patients)):
            raise ValueError("patients are not sorted, or one stands twice")
        return patients


class ChargeBody(Body):
    """The cost of one release (see ``purpose``), durable before the data is touched."""

    study: Sha256
    purpose: Purpose
    round: Count
    model: ThreatModel
    event: dict[str, Any]
    clip_norm: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    cohort: Sha256


class Released(Body):
    """An update computed under a charge is about to leave the site."""

    charge: Count
    charge_hash: Sha256
    update: Sha256


class Voided(Body):
    """A charge whose update provably never left; it no longer counts."""

    charge: Count
    charge_hash: Sha256
    reason: Annotated[str, Field(min_length=1, max_length=500)]


class PolicyBody(Body):
    """The site's policy from here on."""

    policy: dict[str, Any]


BODIES: Final[dict[str, type[Body]]] = {
    "opened": Opened,
    "cohort": Cohort,
    "charge": ChargeBody,
    "released": Released,
    "voided": Voided,
    "policy": PolicyBody,
}


@dataclass(frozen=True)
class Head:
    """The last entry of a ledger: whoever knows it can tell if entries after it were cut off."""

    sequence: int
    hash: str

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``SEQUENCE:HASH``.

        Raises
        ------
        ConsiliumError
            ``usage.head``.
        """
        number, _, value = text.partition(":")
        if not (number.isascii() and number.isdigit() and is_hexadecimal(value, 64)):
            raise ConsiliumError(
                "usage.head",
                f"{text!r} is not the head of a ledger.",
                hint="Give it as SEQUENCE:HASH, the way `consilium audit export` prints it.",
            )
        return cls(int(number), value)


@dataclass(frozen=True)
class Entry:
    """One signed entry. ``line()`` is the exact bytes that are stored and exported."""

    sequence: int
    previous: str
    time: str
    site: str
    kind: str
    body: Mapping[str, Any]
    hash: str
    signature: str

    @property
    def head(self) -> Head:
        """Sequence and hash of this entry."""
        return Head(self.sequence, self.hash)

    def content(self) -> dict[str, Any]:
        """Return what is hashed and signed."""
        return {
            "format": FORMAT,
            "sequence": self.sequence,
            "previous": self.previous,
            "time": self.time,
            "site": self.site,
            "kind": self.kind,
            "body": self.body,
        }

    def line(self) -> bytes:
        """Return the entry as one line of canonical JSON, without the line break."""
        return canonical_json(
            {"content": self.content(), "hash": self.hash, "signature": self.signature}
        )

    @classmethod
    def parse(cls, line: bytes) -> Entry:
        """Read one line; refuse it unless writing it again gives the same bytes.

        Raises
        ------
        MalformedEntryError
            Anything about its form is wrong. Chain and signature are not looked at here.
        """
        try:
            value = json.loads(line.decode("utf-8"))
            content = value["content"]
            if content["format"] != FORMAT:
                raise MalformedEntryError(f"its format is not {FORMAT}")
            entry = cls(
                sequence=content["sequence"],
                previous=content["previous"],
                time=content["time"],
                site=content["site"],
                kind=content["kind"],
                body=content["body"],
                hash=value["hash"],
                signature=value["signature"],
            )
            again = entry.line()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MalformedEntryError("it is not the canonical JSON of an entry") from error
        # Also catches unknown keys, double keys, other spellings of numbers and stray white space.
        if again != line:
            raise MalformedEntryError("it is not the canonical JSON of an entry")
        entry._check_form()
        return entry

    def _check_form(self) -> None:
        if type(self.sequence) is not int or self.sequence < 0:
            raise MalformedEntryError("its sequence is not a number from 0 up")
        if not (isinstance(self.site, str) and self.site):
            raise MalformedEntryError("its site has no name")
        if not is_time(self.time):
            raise MalformedEntryError("its time is not a UTC time")
        for name, text, length in (
            ("previous", self.previous, 64),
            ("hash", self.hash, 64),
            ("signature", self.signature, 128),
        ):
            if not is_hexadecimal(text, length):
                raise MalformedEntryError(f"its {name} is not {length} hexadecimal digits")
        # Signing fills in what is the same in every body; reading demands that it stands there.
        if check_body(self.kind, self.body) != self.body:
            raise MalformedEntryError(f"its body lacks something of kind {self.kind}")

    def computed_hash(self) -> str:
        """Return the SHA-256 of the canonical content, 64 hexadecimal digits."""
        return digest(self.content())

    def signed_by(self, key: Ed25519PublicKey) -> bool:
        """Return whether ``signature`` is the key's signature of ``hash``."""
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(bytes.fromhex(self.signature), _signed_message(self.hash))
        except InvalidSignature:
            return False
        return True


class MalformedEntryError(ValueError):
    """An entry's form is wrong; the message says how, without quoting it."""


def sign_entry(
    signer: Ed25519PrivateKey,
    *,
    sequence: int,
    previous: str,
    site: str,
    kind: Kind,
    body: Mapping[str, Any],
    time: dt.datetime | None = None,
) -> Entry:
    """Make the entry after ``previous`` and sign it.

    Parameters
    ----------
    signer : Ed25519PrivateKey
        The site's ledger key.
    sequence : int
        Number of the entry, from 0.
    previous : str
        Hash of the entry before, :data:`GENESIS` for the first.
    site, kind, body
        Whose ledger, what it says. The body is checked against its kind.
    time : datetime, optional
        (default: now), written in UTC with microseconds.

    Raises
    ------
    MalformedEntryError
        The body is not one of this kind.
    """
    unsigned = Entry(
        sequence=sequence,
        previous=previous,
        time=time_text(time or dt.datetime.now(dt.UTC)),
        site=site,
        kind=kind,
        body=check_body(kind, body),
        hash="",
        signature="",
    )
    hash_ = unsigned.computed_hash()
    signature = signer.sign(_signed_message(hash_)).hex()
    return replace(unsigned, hash=hash_, signature=signature)


def check_body(kind: str, body: object) -> dict[str, Any]:
    """Return ``body`` as plain values after checking it against its kind.

    Raises
    ------
    MalformedEntryError
        The kind is unknown, or the body lacks, adds or mistypes something.
    """
    model = BODIES.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise MalformedEntryError("its kind is unknown")
    try:
        checked = model.model_validate(body)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"][:1])
        raise MalformedEntryError(f"its body is not one of kind {kind} ({where})") from error
    if isinstance(checked, ChargeBody):
        try:
            PrivacyEvent.from_dict(checked.event)
        except ConsiliumError as error:
            raise MalformedEntryError(error.message) from error
    if isinstance(checked, Cohort) and cohort_digest(checked.patients) != checked.cohort:
        raise MalformedEntryError("its cohort digest is not that of its patients")
    return checked.model_dump()


def cohort_digest(patients: list[str]) -> str:
    """Return the digest that names a cohort: SHA-256 of the canonical JSON of its sorted keys."""
    return digest(patients)


def is_hexadecimal(text: object, length: int) -> bool:
    """Return whether ``text`` is ``length`` lower-case hexadecimal digits."""
    return isinstance(text, str) and len(text) == length and set(text) <= _HEXADECIMAL


def is_time(text: object) -> bool:
    """Return whether ``text`` is a UTC time in the ledger's form that exists."""
    if not (isinstance(text, str) and _TIME.fullmatch(text)):
        return False
    try:
        dt.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def time_text(moment: dt.datetime) -> str:
    """Return a moment in the ledger's form: UTC with microseconds."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def public_hex(key: Ed25519PublicKey) -> str:
    """Return the raw public key, 64 hexadecimal digits."""
    return key.public_bytes_raw().hex()


def _signed_message(hash_: str) -> bytes:
    # The prefix keeps a signature made here from meaning anything anywhere else.
    return FORMAT.encode() + b"\n" + bytes.fromhex(hash_)
