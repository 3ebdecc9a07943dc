"""Witness records: the aggregator's signature that it saw a ledger end in an entry."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from consilium_common.canonical import canonical_json
from consilium_common.ledger.chain import BrokenChainError, Problem
from consilium_common.ledger.entries import Head, is_hexadecimal, is_time
from consilium_common.ledger.state import LedgerState
from consilium_common.wire.statements import witness_statement

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

#: How a line of an export begins that holds a witness record and no entry.
_LINE_START: Final = b'{"witness":'


class MalformedRecordError(ValueError):
    """What should be a witness record has another form; the message says how."""


@dataclass(frozen=True)
class WitnessRecord:
    """The aggregator saw ``site``'s ledger hold the entry ``head``, at ``time`` by its clock."""

    site: str
    head: Head
    time: str
    signature: str

    def statement(self) -> dict[str, Any]:
        """Return what is signed."""
        return witness_statement(self.site, self.head.sequence, self.head.hash, self.time)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as it travels and is stored."""
        return {"statement": self.statement(), "signature": self.signature}

    def line(self) -> bytes:
        """Return the record as a line of an export, without the line break."""
        return canonical_json({"witness": self.to_dict()})

    def signed_by(self, key: Ed25519PublicKey) -> bool:
        """Return whether ``signature`` is the key's signature of the statement."""
        from consilium_common.identity.keys import verify_signature

        return verify_signature(
            key, bytes.fromhex(self.signature), canonical_json(self.statement())
        )

    @classmethod
    def from_dict(cls, value: object) -> WitnessRecord:
        """Read a record strictly: these keys and no other.

        Raises
        ------
        MalformedRecordError
            Anything about its form is wrong. The signature is not looked at here.
        """
        try:
            said = value["statement"]  # type: ignore[index]
            record = cls(
                site=said["site"],
                head=Head(said["sequence"], said["hash"]),
                time=said["time"],
                signature=value["signature"],  # type: ignore[index]
            )
        except (KeyError, TypeError, IndexError) as error:
            raise MalformedRecordError("it is not a witness record") from error
        if record.to_dict() != value:
            raise MalformedRecordError("it has other keys than a witness record")
        if not (isinstance(record.site, str) and record.site):
            raise MalformedRecordError("its site has no name")
        if type(record.head.sequence) is not int or record.head.sequence < 0:
            raise MalformedRecordError("its sequence is not a number from 0 up")
        if not is_hexadecimal(record.head.hash, 64) or not is_hexadecimal(record.signature, 128):
            raise MalformedRecordError("its hash or its signature is not hexadecimal")
        if not is_time(record.time):
            raise MalformedRecordError("its time is not a UTC time")
        return record

    @classmethod
    def parse(cls, line: bytes) -> WitnessRecord:
        """Read a line of an export; refuse it unless writing it again gives the same bytes.

        Raises
        ------
        MalformedRecordError
            As :meth:`from_dict`.
        """
        try:
            value = json.loads(line.decode("utf-8"))
            record = cls.from_dict(value["witness"])
            again = record.line()
        except MalformedRecordError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MalformedRecordError("it is not canonical JSON") from error
        if again != line:
            raise MalformedRecordError("it is not canonical JSON")
        return record


def is_witness_line(line: bytes) -> bool:
    """Return whether a line of an export claims to be a witness record."""
    return line.startswith(_LINE_START)


def take_witness(
    line: bytes, state: LedgerState, before: int, key: Ed25519PublicKey | None
) -> WitnessRecord:
    """Check the witness record that follows the entry ``state`` ends in.

    Parameters
    ----------
    line : bytes
        The record's line of the export, without its line break.
    state : LedgerState
        What the entries before say; not changed.
    before : int
        Sequence of the entry witnessed last, -1 for none.
    key : Ed25519PublicKey or None
        The witness's key; None leaves the signature unchecked.

    Raises
    ------
    BrokenChainError
        Code ``witness``: the form is wrong, the signature is not the witness's, it attests another
        entry than the one it follows, or a record before it is missing.
    """
    position = state.head.sequence if state.head else 0

    def broken(message: str) -> BrokenChainError:
        return BrokenChainError(Problem(position, "witness", message))

    try:
        record = WitnessRecord.parse(line)
    except MalformedRecordError as error:
        raise broken(f"the witness record after entry {position} is malformed: {error}") from error
    if key is not None and not record.signed_by(key):
        raise broken(
            f"the witness record of entry {record.head.sequence} is not signed by the given "
            "witness key"
        )
    if record.site != state.site:
        raise broken(f"the witness record after entry {position} is of another site's ledger")
    if state.head is None or record.head.sequence != state.head.sequence:
        raise broken(
            f"a witness record of entry {record.head.sequence} stands where entry {position} was "
            "to be witnessed: the witness saw an entry that is missing here, or records were moved"
        )
    if record.head != state.head:
        raise broken(f"the witness saw another entry {position}: the ledger was rewritten")
    if record.head.sequence != before + 1:
        raise broken(
            f"entry {position} is witnessed and entry {before + 1} is not: records were removed "
            "or repeated"
        )
    return record
