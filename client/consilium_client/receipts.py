"""``receipts.db``: the site's own signed record of everything that left it, kept by the link.

Append-only. A receipt is on the disk before the first byte of its release leaves; a release that is
sent again after a lost connection or a crash keeps the receipt it has.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_common.audit.receipts import Receipt, Release, read_receipts, sign_receipt
from consilium_common.errors import ConsiliumError
from consilium_common.files import sync_folder, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

#: Marks the file as receipts in SQLite's header ("CnsR").
_APPLICATION_ID: Final = 0x436E7352
_PATIENCE: Final = 20.0
_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS receipt (sequence INTEGER PRIMARY KEY, line BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS sent (sequence INTEGER PRIMARY KEY)",
    *(
        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'receipts are append-only'); END"
        for table in ("receipt", "sent")
        for verb in ("UPDATE", "DELETE")
    ),
    # Also stops INSERT OR REPLACE, which deletes without asking the triggers above.
    "CREATE TRIGGER IF NOT EXISTS receipt_in_order BEFORE INSERT ON receipt "
    "WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence) + 1, 0) FROM receipt) "
    "BEGIN SELECT RAISE(ABORT, 'receipts are append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS sent_of_receipt BEFORE INSERT ON sent "
    "WHEN NEW.sequence NOT IN (SELECT sequence FROM receipt) "
    "OR NEW.sequence IN (SELECT sequence FROM sent) "
    "BEGIN SELECT RAISE(ABORT, 'receipts are append-only'); END",
)


class Receipts:
    """The receipts of a site, open for writing; the chain is checked once, when it is opened.

    Parameters
    ----------
    path : Path
        ``receipts.db``; made where it is missing.
    key : Ed25519PrivateKey
        The site's ledger key.
    site : str
        Its name.

    Raises
    ------
    ConsiliumError
        ``state.receipts`` when the file cannot be read or written, ``privacy.receipts-broken``
        when the chain does not hold; here and from every method.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey, site: str) -> None:
        self._path, self._key, self._site = path, key, site
        self._lock = threading.Lock()
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            sync_folder(path.parent)
        with _opened(path) as db:
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            lines = [row[0] for row in db.execute("SELECT line FROM receipt ORDER BY sequence")]
        chain = read_receipts(lines, key.public_key(), site=site, where=str(path))
        self._last = chain[-1] if chain else None
        self._by_round = {receipt.release.update[:3]: receipt for receipt in chain}

    def of(self, study: str, purpose: str, round_index: int) -> Receipt | None:
        """Return the receipt of a round's release; None before there is one."""
        return self._by_round.get((study, purpose, round_index))

    def issue(self, release: Release) -> Receipt:
        """Write the receipt of a release durably, or return the one it has.

        Raises
        ------
        ConsiliumError
            ``privacy.second-release`` when something else has left for this round already.
        """
        with self._lock:
            found = self._by_round.get(release.update[:3])
            if found is not None:
                if found.release != release:
                    raise ConsiliumError(
                        "privacy.second-release",
                        "Something else has left for this round already, by its receipt.",
                        where=f"{self._path}, receipt {found.sequence}",
                        hint="Compare the site's store with an earlier backup: it was changed.",
                    )
                return found
            receipt = sign_receipt(self._key, release, site=self._site, previous=self._last)
            with _opened(self._path) as db:
                db.execute("INSERT INTO receipt VALUES (?,?)", (receipt.sequence, receipt.line()))
            self._last = self._by_round[release.update[:3]] = receipt
            return receipt

    def sent(self, receipt: Receipt) -> None:
        """Note that the aggregator has taken the whole release; noting it again changes nothing."""
        with self._lock, _opened(self._path) as db:
            known = db.execute("SELECT 1 FROM sent WHERE sequence = ?", (receipt.sequence,))
            if known.fetchone() is None:
                db.execute("INSERT INTO sent VALUES (?)", (receipt.sequence,))


def kept_receipts(path: Path, key: Ed25519PublicKey, site: str) -> tuple[Receipt, ...]:
    """Read and check a site's receipts; none where it has none yet.

    Raises
    ------
    ConsiliumError
        ``state.receipts``, ``privacy.receipts-broken``.
    """
    return read_receipts(_lines(path), key, site=site, where=str(path))


def receipt_rows(path: Path, key: Ed25519PublicKey, site: str, study: str) -> list[dict[str, Any]]:
    """Return the receipts of studies whose digest begins with ``study``, for people and ``--json``:
    the receipt, and whether the aggregator took the whole release.
    """
    taken: set[int] = set()
    if path.exists():
        with _opened(path) as db:
            taken = {row[0] for row in db.execute("SELECT sequence FROM sent")}
    return [
        {**receipt.model_dump(by_alias=True), "sent": receipt.sequence in taken}
        for receipt in kept_receipts(path, key, site)
        if receipt.release.study.startswith(study)
    ]


def export_receipts(path: Path, key: Ed25519PublicKey, site: str, out: Path) -> int:
    """Write the checked receipts, one line of canonical JSON each; return how many there are."""
    receipts = kept_receipts(path, key, site)
    write_atomic(out, b"".join(receipt.line() + b"\n" for receipt in receipts))
    return len(receipts)


def _lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with _opened(path) as db:
        return [row[0] for row in db.execute("SELECT line FROM receipt ORDER BY sequence")]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        db = sqlite3.connect(path, timeout=_PATIENCE)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            with db:
                yield db
        finally:
            db.close()
    except sqlite3.Error as error:
        raise ConsiliumError(
            "state.receipts",
            f"The site's receipts cannot be used: {error}.",
            where=str(path),
            hint="Free space on the disk or restore the file from your backup; nothing leaves "
            "without a receipt.",
        ) from error
