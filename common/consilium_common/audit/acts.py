"""The aggregator's audit log: who did what when, as a signed hash chain that anyone can verify.

An entry holds the hash of the one before it, so none can be changed, left out or put in between
without breaking every later one; its own hash is signed with the aggregator's witness key. What a
chain cannot show by itself is that its newest entries are missing: whoever noted a head earlier
(``sequence:hash``) gives it to :func:`verify_acts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilium_common.audit.documents import issued, read_json, signing_key
from consilium_common.canonical import canonical_json, digest
from consilium_common.errors import ConsiliumError, printable
from consilium_common.identity.certificates import Role
from consilium_common.identity.keys import verify_signature
from consilium_common.identity.trust import Trust
from consilium_common.ledger.entries import Head

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )
    from rich.console import Console

SCHEMA: Final = "consilium/act/v1"
LOG_SCHEMA: Final = "consilium/log/v1"
#: What stands for the hash before the first entry.
BEGINNING: Final = "0" * 64

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Act(BaseModel):
    """One entry of the log, as it stands there and in files."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sequence: Annotated[int, Field(ge=0)]
    time: Annotated[str, Field(max_length=40)]  #: ISO 8601, UTC, the aggregator's clock
    who: Annotated[str, Field(max_length=200)]  #: a member's name, or ``local:<user>``
    role: Annotated[str, Field(max_length=40)]  #: the certificate's, or ``local``
    act: Annotated[str, Field(max_length=40)]  #: init, invite, enrol, revoke, propose, run, …
    subject: Annotated[str, Field(max_length=400)]  #: whom or what it was done to
    digest: Annotated[str, Field(max_length=128)]  #: of the study, key or file; empty where none
    #: ``done``; ``waiting`` for the offline authority; ``refused: <code>``; ``cut short`` where the
    #: aggregator ended meanwhile, and cannot say whether it was done.
    outcome: Annotated[str, Field(max_length=200)]
    previous: _Hash
    hash: _Hash
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def __str__(self) -> str:
        """One line for people."""
        what = f"{self.act} {self.subject}".strip()
        named = f" [{self.digest[:12]}]" if self.digest else ""
        outcome = "" if self.outcome == "done" else f": {self.outcome}"
        when = self.time[:19].replace("T", " ")
        return printable(f"{when}  {self.who} ({self.role})  {what}{named}{outcome}")

    def content(self) -> dict[str, Any]:
        """Return what the hash covers."""
        return {"schema": SCHEMA, **self.model_dump(exclude={"hash", "signature"})}


class _LogContent(BaseModel):
    """What `consilium server log` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_: Annotated[Literal["consilium/log/v1"], Field(alias="schema")]
    consortium: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    written_at: Annotated[str, Field(max_length=40)]
    witness_pem: Annotated[str, Field(max_length=20_000)]
    authority_pem: Annotated[str, Field(max_length=100_000)]
    entries: list[Any]  #: read by :func:`read_acts`


class _SignedLog(BaseModel):
    """The log's file: its content under one more signature of the same key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    content: _LogContent
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


def signed_act(
    key: Ed25519PrivateKey,
    before: Act | None,
    *,
    time: str,
    who: str,
    role: str,
    act: str,
    subject: str,
    digest: str,
    outcome: str,
) -> Act:
    """Return the entry that follows ``before`` (None: the first), hashed and signed.

    Some of it was said by whoever was refused: what is no printable text is escaped, and long text
    is cut.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "sequence": 0 if before is None else before.sequence + 1,
        "time": time,
        "who": printable(who)[:200],
        "role": printable(role)[:40],
        "act": printable(act)[:40],
        "subject": printable(subject)[:400],
        "digest": printable(digest)[:128],
        "outcome": printable(outcome)[:200],
        "previous": BEGINNING if before is None else before.hash,
    }
    fingerprint = _hash(content)
    signature = key.sign(_signed(fingerprint)).hex()
    fields = {name: value for name, value in content.items() if name != "schema"}
    return Act(**fields, hash=fingerprint, signature=signature)


def verify_acts(
    acts: Iterable[Act], key: Ed25519PublicKey, *, head: Head | None = None, where: str = ""
) -> Head | None:
    """Verify every hash, link and signature; return the newest entry's head, None of an empty log.

    Parameters
    ----------
    head
        A head noted earlier: the log must still hold that entry.

    Raises
    ------
    ConsiliumError
        ``privacy.log-broken`` naming the first entry that does not verify.
    """
    previous, at, seen = BEGINNING, -1, head is None
    for act in acts:
        at += 1
        if act.sequence != at:
            raise _broken(at, "entries are missing or out of order", where)
        if act.previous != previous:
            raise _broken(at, "it does not follow the entry before it", where)
        if act.hash != _hash(act.content()):
            raise _broken(at, "its content was changed", where)
        if not verify_signature(key, bytes.fromhex(act.signature), _signed(act.hash)):
            raise _broken(at, "the aggregator did not sign it", where)
        if head is not None and at == head.sequence:
            if act.hash != head.hash:
                raise _broken(at, "it is not the entry whose head you noted", where)
            seen = True
        previous = act.hash
    if not seen:
        raise _broken(at + 1, "the log ends before the head you noted: entries were cut off", where)
    return None if at < 0 else Head(at, previous)


def read_acts(rows: Sequence[Any], *, where: str = "") -> tuple[Act, ...]:
    """Return entries from plain values, or raise ``privacy.log-broken``."""
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(Act.model_validate(row))
        except ValidationError as error:
            raise _broken(number, "it is not an entry of the log", where) from error
    return tuple(found)


@dataclass(frozen=True)
class LogReport:
    """A log file that verified."""

    file: str
    consortium: str
    written_at: str
    acts: tuple[Act, ...]
    head: Head | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "file": self.file,
            "consortium": self.consortium,
            "written_at": self.written_at,
            "entries": len(self.acts),
            "head": None if self.head is None else str(self.head),
            "refused": sum(act.outcome.startswith("refused") for act in self.acts),
            "acts": [act.model_dump() for act in self.acts],
        }

    def print_to(self, console: Console) -> None:
        """Print every act as a line, and the head to note."""
        for act in self.acts:
            console.print(f"{act.sequence:>5}  {act}", markup=False)
        console.print(
            f"{self.file}: verified, {len(self.acts)} acts. Head {self.head or 'none'}: note it"
            " where the aggregator cannot change it, and give it with --head later.",
            markup=False,
        )


def is_log(path: Path) -> bool:
    """Whether a file says that it is the aggregator's audit log."""
    if path.suffix != ".json" or not path.is_file():
        return False
    document = read_json(path)
    content = document.get("content") if isinstance(document, dict) else None
    return isinstance(content, dict) and content.get("schema") == LOG_SCHEMA


def read_log(
    content: bytes, *, where: str, trusted: Path | None = None, head: Head | None = None
) -> LogReport:
    """Read what `consilium server log` writes, and verify all of it.

    Parameters
    ----------
    where
        The file's name, for errors.
    trusted
        The consortium's authority, known from elsewhere; the file's must be one of it.
    head
        A head noted earlier.

    Raises
    ------
    ConsiliumError
        ``privacy.evidence-read``, ``privacy.evidence-form``, ``privacy.log-broken``, or
        ``identity.*`` for the certificates in it.
    """
    try:
        document = json.loads(content)
        signed = _SignedLog.model_validate(document)
    except (ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        raise ConsiliumError(
            "privacy.evidence-form",
            "This is not an audit log of an aggregator.",
            where=where,
            hint="Give a file that `consilium server log --out` wrote.",
        ) from error
    log = signed.content
    within = Trust.load(log.authority_pem.encode(), where=where)
    judged_by = within if trusted is None else Trust.read(trusted)
    if judged_by.consortium != within.consortium:
        raise ConsiliumError(
            "identity.foreign",
            "The log is of another consortium than the authority given with --authority.",
            where=where,
            hint="Ask the aggregator operator which is right.",
        )
    witness = issued(log.witness_pem.encode(), judged_by, Role.WITNESS, where=where)
    if log.consortium != witness.consortium:
        raise _broken(0, "the log names another consortium than its certificates", where)
    key = signing_key(witness)
    acts = read_acts(log.entries, where=where)
    found = verify_acts(acts, key, head=head, where=where)
    if not verify_signature(
        key, bytes.fromhex(signed.signature), canonical_json(document["content"])
    ):
        raise ConsiliumError(
            "privacy.log-broken",
            "The file as a whole is not signed by the aggregator.",
            where=where,
            hint="Ask the aggregator operator for the log again.",
        )
    return LogReport(where, log.consortium, log.written_at, acts, found)


def _hash(content: dict[str, Any]) -> str:
    return digest(content)


def _signed(fingerprint: str) -> bytes:
    """Return the bytes that are signed: named, so that they are no other statement of this key."""
    return canonical_json({"schema": SCHEMA, "hash": fingerprint})


def _broken(number: int, why: str, where: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.log-broken",
        f"Entry {number} of the aggregator's audit log does not verify: {why}.",
        where=where,
        hint="Do not rely on this log; ask the aggregator operator for the original, and keep this"
        " file as evidence.",
    )
