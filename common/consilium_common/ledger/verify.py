"""Verify a ledger offline with nothing but public keys; name the first broken entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from consilium_common.errors import ConsiliumError
from consilium_common.ledger.chain import BrokenChainError, Problem, take
from consilium_common.ledger.database import connect_reader, read_export
from consilium_common.ledger.entries import Entry, Head
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.witness import is_witness_line, take_witness

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of a verification; everything but ``problem`` is of what stands before a break.

    ``witnessed`` counts the entries with a witness record: they are the first ones, without a gap.
    ``witness_checked`` says whether the records' signatures were checked, too.
    """

    entries: int
    state: LedgerState
    problem: Problem | None
    witnessed: int = 0
    witness_checked: bool = False

    @property
    def ok(self) -> bool:
        """Whether every entry holds, and the expected head where one was given."""
        return self.problem is None

    @property
    def head(self) -> Head | None:
        """The last entry that holds."""
        return self.state.head

    @property
    def last_witnessed(self) -> int | None:
        """Sequence of the entry witnessed last; None where none is."""
        return self.witnessed - 1 if self.witnessed else None

    @property
    def unwitnessed(self) -> int:
        """Entries at the end that no witness has confirmed; a sound ledger may have some."""
        return self.entries - self.witnessed


def verify_lines(
    lines: Iterable[bytes],
    public_key: Ed25519PublicKey,
    *,
    expected_head: Head | None = None,
    witness_key: Ed25519PublicKey | None = None,
) -> VerifyResult:
    """Verify form, sequence, chain, hash, signature and rules of every entry, and every witness.

    Parameters
    ----------
    lines : iterable of bytes
        The entries and witness records as they are exported, without line breaks.
    public_key : Ed25519PublicKey
        The site's ledger key, from a source other than the ledger.
    expected_head : Head, optional
        A head noted earlier. The ledger must contain exactly that entry; without it, entries cut
        off at the end cannot be noticed.
    witness_key : Ed25519PublicKey, optional
        The aggregator's witness key. Without it the records' signatures are not checked; that they
        are of this ledger's entries always is.
    """
    state = LedgerState()
    entries = witnessed = 0

    def result(problem: Problem | None) -> VerifyResult:
        return VerifyResult(entries, state, problem, witnessed, witness_key is not None)

    for number, line in enumerate(lines, start=1):
        try:
            if is_witness_line(line):
                take_witness(line, state, witnessed - 1, witness_key)
                witnessed += 1
                continue
            take(line, state, public_key)
        except BrokenChainError as error:
            return result(replace(error.problem, line=number))
        if (
            expected_head is not None
            and entries == expected_head.sequence
            and state.head != expected_head
        ):
            return result(
                Problem(entries, "head", f"entry {entries} is not the one expected", number)
            )
        entries += 1
    if entries == 0:
        return result(Problem(0, "empty", "there is no entry at all"))
    if expected_head is not None and expected_head.sequence >= entries:
        cut = (
            f"the ledger ends after entry {entries - 1}, "
            f"but entry {expected_head.sequence} is known to exist: entries were cut off"
        )
        return result(Problem(entries, "head", cut))
    return result(None)


def verify_entries(
    entries: Iterable[Entry], public_key: Ed25519PublicKey, *, expected_head: Head | None = None
) -> VerifyResult:
    """Verify entries that were read already; see :func:`verify_lines`."""
    return verify_lines((_line(e) for e in entries), public_key, expected_head=expected_head)


def verify_file(
    path: Path,
    public_key: Ed25519PublicKey,
    *,
    expected_head: Head | None = None,
    witness_key: Ed25519PublicKey | None = None,
) -> VerifyResult:
    """Verify an exported ``.jsonl`` file, or a ledger's SQLite file (any other name).

    Raises
    ------
    ConsiliumError
        ``privacy.no-ledger``, ``privacy.ledger-read``; ``privacy.ledger-corrupt`` when SQLite
        itself cannot read the file. Broken entries are no exceptions: see the result.
    """
    if path.suffix == ".jsonl":
        return verify_lines(
            jsonl_lines(path), public_key, expected_head=expected_head, witness_key=witness_key
        )
    db = connect_reader(path)
    try:
        return verify_lines(
            read_export(db, path),
            public_key,
            expected_head=expected_head,
            witness_key=witness_key,
        )
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
