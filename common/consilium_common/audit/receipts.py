"""Egress receipts: what left a site, one signed and chained record for each release.

A receipt says what a release holds in public terms: study, purpose, round, names and shapes of
tensors or keys of figures, size and SHA-256, and the ledger's charge that paid for it. Nothing in
it depends on data or on how long anything took.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilium_common.audit.documents import Update
from consilium_common.canonical import canonical_json, digest
from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import verify_signature
from consilium_common.ledger.entries import GENESIS, Count, Purpose, Sha256, is_time, time_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SCHEMA: Final = "consilium/receipt/v1"
#: A line holds a network's tensors by name; a thousand take about 100 kB.
_LONGEST_LINE: Final = 16 * 1024 * 1024


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SentTensor(_Value):
    """Name, shape and dtype of one tensor of a release."""

    name: str
    shape: list[Count]
    dtype: str


class Paid(_Value):
    """The ledger's charge that covers a release: sequence and hash of its entry."""

    sequence: Count
    hash: Sha256


class Release(_Value):
    """What leaves.

    ``sha256`` and ``bytes`` are of the update in safetensors form, or of the figures' canonical
    JSON; ``objects`` is the digest of the ids of everything on the wire, figures included.
    ``event`` is None in a study without privacy.
    """

    study: Sha256
    purpose: Purpose
    round: Count
    tensors: list[SentTensor]
    figures: list[str]
    bytes: Count
    sha256: Sha256
    objects: Sha256
    event: Paid | None

    @property
    def update(self) -> Update:
        """What names it, in the ledger and in the aggregator's records too."""
        return Update(self.study, self.purpose, self.round, self.sha256)


class Receipt(_Value):
    """One receipt: ``hash`` is over all the rest but the signature, which is over all of it."""

    schema_: Annotated[Literal["consilium/receipt/v1"], Field(alias="schema")]
    sequence: Count
    site: Annotated[str, Field(min_length=1)]
    release: Release
    time: str
    previous: Sha256
    hash: Sha256
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def line(self) -> bytes:
        """Return the exact bytes that are stored and exported."""
        return canonical_json(self.model_dump(by_alias=True))

    def signed(self) -> dict[str, Any]:
        """Return what is signed; its schema keeps the signature from meaning anything else."""
        return self.model_dump(by_alias=True, exclude={"signature"})

    def computed_hash(self) -> str:
        """Return the hash that the content has."""
        return digest(self.model_dump(by_alias=True, exclude={"signature", "hash"}))


def sign_receipt(
    key: Ed25519PrivateKey,
    release: Release,
    *,
    site: str,
    previous: Receipt | None,
    time: dt.datetime | None = None,
) -> Receipt:
    """Make and sign the receipt that follows ``previous``, the first one where that is None."""
    content = {
        "schema": SCHEMA,
        "sequence": 0 if previous is None else previous.sequence + 1,
        "site": site,
        "release": release.model_dump(),
        "time": time_text(time or dt.datetime.now(dt.UTC)),
        "previous": GENESIS if previous is None else previous.hash,
    }
    whole = {**content, "hash": digest(content)}
    signature = key.sign(canonical_json(whole)).hex()
    return Receipt.model_validate({**whole, "signature": signature})


def read_receipts(
    lines: Iterable[bytes], key: Ed25519PublicKey, *, site: str, where: str
) -> tuple[Receipt, ...]:
    """Check a chain of receipts from its first to its last: form, order, hashes, signatures.

    Parameters
    ----------
    lines : iterable of bytes
        As stored or exported, in order, without line breaks.
    key : Ed25519PublicKey
        The site's ledger key.

    Raises
    ------
    ConsiliumError
        ``privacy.receipts-broken`` naming the first receipt that does not hold.
    """
    found: list[Receipt] = []
    releases: set[tuple[str, str, int]] = set()
    for number, line in enumerate(lines):
        previous = found[-1].hash if found else GENESIS
        receipt = _parse(line, number, where)
        problem = ""
        if receipt.line() != line:
            problem = "is not in canonical form"
        elif receipt.sequence != number or receipt.previous != previous:
            problem = "does not follow the one before it"
        elif receipt.site != site:
            problem = "is another site's"
        elif not is_time(receipt.time):
            problem = "has no valid time"
        elif receipt.computed_hash() != receipt.hash:
            problem = "does not hold what was hashed"
        elif not verify_signature(
            key, bytes.fromhex(receipt.signature), canonical_json(receipt.signed())
        ):
            problem = "is not signed by the site's key"
        elif receipt.release.update[:3] in releases:
            problem = "is a second one for its round"
        if problem:
            raise _broken(f"receipt {number} {problem}", where)
        releases.add(receipt.release.update[:3])
        found.append(receipt)
    return tuple(found)


def read_receipts_file(path: Path, key: Ed25519PublicKey, *, site: str) -> tuple[Receipt, ...]:
    """Read and check exported receipts; raises as :func:`read_receipts`, and
    ``privacy.evidence-read``.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConsiliumError(
            "privacy.evidence-read",
            f"Cannot read the receipts: {error.strerror or error}.",
            where=str(path),
            hint="Check that the evidence was handed over whole.",
        ) from error
    return read_receipts(lines, key, site=site, where=str(path))


def _parse(line: bytes, number: int, where: str) -> Receipt:
    try:
        if len(line) > _LONGEST_LINE:
            raise ValueError("too long")
        return Receipt.model_validate(json.loads(line))
    except (ValueError, ValidationError, RecursionError) as error:
        raise _broken(f"receipt {number} is malformed", where) from error


def _broken(what: str, where: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.receipts-broken",
        f"The egress receipts do not verify: {what}.",
        where=where,
        hint="Do not rely on them; compare them with an earlier export of this site.",
    )
