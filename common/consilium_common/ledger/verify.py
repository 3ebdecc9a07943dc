"""Verify a ledger offline with nothing but the site's public key; name the first broken entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.chain import BrokenChainError, Problem, take
from consilium_common.ledger.database import connect_reader, read_lines
from consilium_common.ledger.entries import Entry, Head
from consilium_common.ledger.state import LedgerState

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of a verification; ``state`` and ``head`` are those of the entries before a break."""

    entries: int
    state: LedgerState
    problem: Problem | None

    @property
    def ok(self) -> bool:
        """Whether every entry holds, and the expected head where one was given."""
        return self.problem is None

    @property
    def head(self) -> Head | None:
        """The last entry that holds."""
        return self.state.head


def verify_lines(
    lines: Iterable[bytes], public_key: Ed25519PublicKey, *, expected_head: Head | None = None
) -> VerifyResult:
    """Verify form, sequence, chain, hash, signature and rules of every entry.

    Parameters
    ----------
    lines : iterable of bytes
        The entries as they are stored or exported, without line breaks.
    public_key : Ed25519PublicKey
        The site's ledger key, from a source other than the ledger.
    expected_head : Head, optional
        A head noted earlier. The ledger must contain exactly that entry; without it, entries cut
        off at the end cannot be noticed.
    """
    state = LedgerState()
    count = 0
    expected_seen = expected_head is None
    for position, line in enumerate(lines):
        try:
            take(line, state, public_key)
        except BrokenChainError as error:
            return VerifyResult(count, state, error.problem)
        if expected_head is not None and position == expected_head.sequence:
            expected_seen = state.head == expected_head
            if not expected_seen:
                other = Problem(position, "head", f"entry {position} is not the one expected")
                return VerifyResult(count, state, other)
        count += 1
    if count == 0:
        return VerifyResult(0, state, Problem(0, "empty", "there is no entry at all"))
    if not expected_seen:
        assert expected_head is not None
        return VerifyResult(
            count,
            state,
            Problem(
                count,
                "head",
                f"the ledger ends after entry {count - 1}, "
                f"but entry {expected_head.sequence} is known to exist: entries were cut off",
            ),
        )
    return VerifyResult(count, state, None)


def verify_entries(
    entries: Iterable[Entry], public_key: Ed25519PublicKey, *, expected_head: Head | None = None
) -> VerifyResult:
    """Verify entries that were read already; see :func:`verify_lines`."""
    return verify_lines((_line(e) for e in entries), public_key, expected_head=expected_head)


def verify_file(
    path: Path, public_key: Ed25519PublicKey, *, expected_head: Head | None = None
) -> VerifyResult:
    """Verify an exported ``.jsonl`` file, or a ledger's SQLite file (any other name).

    Raises
    ------
    ConsiliumError
        ``privacy.no-ledger``, ``privacy.ledger-read``; ``privacy.ledger-corrupt`` when SQLite
        itself cannot read the file. Broken entries are no exceptions: see the result.
    """
    if path.suffix == ".jsonl":
        return verify_lines(jsonl_lines(path), public_key, expected_head=expected_head)
    db = connect_reader(path)
    try:
        return verify_lines(read_lines(db, path), public_key, expected_head=expected_head)
    finally:
        db.close()


def jsonl_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of an export without their line breaks.

    A last line without its line break is yielded with a byte too many, so that it cannot pass.
    """
    try:
        with path.open("rb") as stream:
            for line in stream:
                yield line[:-1] if line.endswith(b"\n") else line + b"\n"
    except FileNotFoundError as error:
        raise ConsiliumError(
            "privacy.no-ledger", "There is no ledger here.", where=str(path), hint="Check the path."
        ) from error
    except OSError as error:
        raise ConsiliumError(
            "privacy.ledger-read",
            f"Cannot read the ledger: {error.strerror or error}.",
            where=str(path),
            hint="Check the file's permissions.",
        ) from error


def _line(entry: Entry) -> bytes:
    try:
        return entry.line()
    except (ValueError, TypeError):
        return b""  # has no canonical form, so its form is what is wrong
