"""Take in the next entry of a ledger, or say exactly what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from consilium_common.ledger.entries import GENESIS, Entry, MalformedEntryError, public_hex
from consilium_common.ledger.state import LedgerState, RuleBrokenError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class Problem:
    """What is wrong with the first broken entry.

    ``position`` counts entries from 0, so in a sound ledger it is the entry's sequence; for a
    witness record it is that of the entry before it. ``line`` is the line of the export, from 1;
    None where no line is to blame. ``code`` is one of ``form``, ``sequence``, ``previous``,
    ``hash``, ``signature``, ``rule``, ``witness``, ``head``, ``empty``.
    """

    position: int
    code: str
    message: str
    line: int | None = None

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self)


class BrokenChainError(ValueError):
    """The next entry does not hold; ``problem`` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def take(line: bytes, state: LedgerState, public_key: Ed25519PublicKey | None) -> Entry:
    """Check the entry that follows ``state`` and take it in.

    Parameters
    ----------
    line : bytes
        The entry as it is stored or exported, without its line break.
    state : LedgerState
        What the entries before say; changed when the entry holds, and only then.
    public_key : Ed25519PublicKey or None
        The key that must have signed it; None leaves the signature to the caller.

    Raises
    ------
    BrokenChainError
        Form, sequence, previous, hash, signature or a rule of the ledger is broken.
    """
    position = state.head.sequence + 1 if state.head else 0

    def broken(code: str, message: str) -> BrokenChainError:
        return BrokenChainError(Problem(position, code, message))

    try:
        entry = Entry.parse(line)
    except MalformedEntryError as error:
        raise broken("form", f"entry {position} is malformed: {error}") from error
    if entry.sequence != position:
        raise broken(
            "sequence",
            f"where entry {position} belongs stands entry {entry.sequence}: "
            "entries were removed, repeated or reordered",
        )
    if entry.previous != (state.head.hash if state.head else GENESIS):
        raise broken("previous", f"entry {position} does not follow the one before it")
    if entry.computed_hash() != entry.hash:
        raise broken("hash", f"the content of entry {position} is not what was hashed")
    if public_key is not None:
        if not entry.signed_by(public_key):
            raise broken("signature", f"entry {position} is not signed by the given key")
        if entry.kind == "opened" and entry.body["public_key"] != public_hex(public_key):
            raise broken("signature", f"entry {position} names another key as its own")
    try:
        state.apply(entry)
    except RuleBrokenError as error:
        raise broken("rule", f"entry {position} is not allowed: {error}") from error
    return entry
