"""The SQLite file under a ledger: append-only by trigger, synchronous writes, errors in words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError
from consilium_common.files import sync_folder

#: Marks the file as a Consilium ledger in SQLite's header ("CnsL").
APPLICATION_ID: Final = 0x436E734C
#: Seconds that a writer waits for another one.
PATIENCE: Final = 60.0

SCHEMA: Final = (
    "CREATE TABLE entry (sequence INTEGER PRIMARY KEY, line BLOB NOT NULL)",
    "CREATE TRIGGER entry_no_update BEFORE UPDATE ON entry "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER entry_no_delete BEFORE DELETE ON entry "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    # Also stops INSERT OR REPLACE, which deletes without asking the trigger above.
    "CREATE TRIGGER entry_in_order BEFORE INSERT ON entry "
    "WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence) + 1, 0) FROM entry) "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
#: Made when a ledger is opened for writing, also in one that is older than witnesses.
WITNESS_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS witness (sequence INTEGER PRIMARY KEY, line BLOB NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS witness_no_update BEFORE UPDATE ON witness "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS witness_no_delete BEFORE DELETE ON witness "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS witness_in_order BEFORE INSERT ON witness "
    "WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence) + 1, 0) FROM witness) "
    "OR NEW.sequence NOT IN (SELECT sequence FROM entry) "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)


def connect_writer(path: Path) -> sqlite3.Connection:
    """Open the file for appending, creating it (0600) where it is missing.

    Every commit is on the disk when it returns: write-ahead log, ``synchronous = FULL``.
    """
    with sqlite_errors(path, writing=True):
        if not path.exists():
            # SQLite gives its side files the permissions of the main one.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            sync_folder(path.parent)
        db = _connect(str(path), uri=False)
        try:
            _use_write_ahead_log(db)
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA fullfsync = ON")  # macOS: through the drive's cache as well
            db.execute("PRAGMA checkpoint_fullfsync = ON")
            _check(db, path)
            with immediate(db):
                if not _is_ledger(db) and _is_empty(db):
                    for statement in SCHEMA:
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                if _is_ledger(db):
                    for statement in WITNESS_SCHEMA:
                        db.execute(statement)
            if not _is_ledger(db):
                raise not_a_ledger(path)
        except BaseException:
            db.close()
            raise
    return db


def connect_reader(path: Path) -> sqlite3.Connection:
    """Open an existing file read-only; nothing about it is changed."""
    if not path.is_file():
        raise ConsiliumError(
            "privacy.no-ledger",
            "There is no ledger here.",
            where=str(path),
            hint="Check the path; a site's ledger is `ledger.db` in its folder.",
        )
    with sqlite_errors(path, writing=False):
        db = _connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            try:
                ledger = _is_ledger(db)
            except sqlite3.OperationalError:
                log = path.with_name(path.name + "-wal")
                if log.exists() and log.stat().st_size:
                    raise
                # A copy in a folder that is not writable, complete without a log beside it.
                db.close()
                db = _connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
                ledger = _is_ledger(db)
            if not ledger:
                raise not_a_ledger(path)
        except BaseException:
            db.close()
            raise
    return db


@contextlib.contextmanager
def immediate(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block in one write transaction that no other process shares."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors (disk full).
        if db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def sqlite_errors(path: Path, *, writing: bool) -> Iterator[None]:
    """Turn SQLite's and the system's errors into one clear error each."""
    try:
        yield
    except sqlite3.OperationalError as error:
        # "disk I/O error", "database or disk is full", "unable to open", "database is locked".
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise corrupt(path, "SQLite cannot read it") from error
        if writing:
            raise _not_written(path, str(error)) from error
        raise ConsiliumError(
            "privacy.ledger-read",
            f"Cannot read the ledger: {error}.",
            where=str(path),
            hint="Check the file's permissions, and copy it together with its -wal file.",
        ) from error
    except sqlite3.DatabaseError as error:
        raise corrupt(path, "SQLite cannot read it") from error
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error


def corrupt(path: Path, what: str) -> ConsiliumError:
    """Return the error of a ledger whose content cannot be trusted."""
    return ConsiliumError(
        "privacy.ledger-corrupt",
        f"The ledger is damaged: {what}. Nothing is trained until it is restored.",
        where=str(path),
        hint="Keep the damaged file, run `consilium audit verify` on it, and restore the newest "
        "backup that verifies.",
    )


def not_a_ledger(path: Path) -> ConsiliumError:
    """Return the error of a file that is something else."""
    return corrupt(path, "the file is not a Consilium ledger")


def _connect(target: str, *, uri: bool) -> sqlite3.Connection:
    # Autocommit: transactions are begun and ended here and nowhere else.
    return sqlite3.connect(
        target, uri=uri, timeout=PATIENCE, isolation_level=None, check_same_thread=False
    )


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise sqlite3.OperationalError("this disk does not allow a write-ahead log")
            return
        except sqlite3.OperationalError as error:
            # SQLite's own waiting does not cover this switch, made once in a ledger's life.
            busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _check(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise corrupt(path, "SQLite finds its pages inconsistent")


def _is_ledger(db: sqlite3.Connection) -> bool:
    return bool(db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID)


def _is_empty(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0)


def _not_written(path: Path, why: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.ledger-write",
        f"Cannot write the ledger: {why}. Nothing was lost, and nothing is trained uncharged.",
        where=str(path),
        hint="Free space on the disk and check the folder's permissions, then try again.",
    )


def read_lines(
    db: sqlite3.Connection, path: Path, *, first: int = 0, limit: int = -1
) -> Iterator[bytes]:
    """Yield the stored bytes of entries in order, unchecked; ``limit`` -1 means all."""
    yield from _lines(
        db,
        path,
        "SELECT line FROM entry WHERE sequence >= ? ORDER BY sequence LIMIT ?",
        (first, limit),
    )


def read_export(db: sqlite3.Connection, path: Path) -> Iterator[bytes]:
    """Yield the lines of an export, unchecked: entries, each followed by its witness record."""
    with sqlite_errors(path, writing=False):
        witnessed = has_witness(db)
    if not witnessed:
        yield from read_lines(db, path)
        return
    # One statement, so one moment; and a record without its entry comes out as well.
    yield from _lines(
        db,
        path,
        "SELECT line FROM (SELECT sequence, 0 AS part, line FROM entry UNION ALL "
        "SELECT sequence, 1 AS part, line FROM witness) ORDER BY sequence, part",
    )


def last_witness(db: sqlite3.Connection, path: Path) -> bytes | None:
    """Return the newest witness record's line, unchecked; None where there is none."""
    with sqlite_errors(path, writing=False):
        if not has_witness(db):
            return None
        row = db.execute("SELECT line FROM witness ORDER BY sequence DESC LIMIT 1").fetchone()
    return None if row is None else as_bytes(row[0])


def has_witness(db: sqlite3.Connection) -> bool:
    """Return whether the ledger has a table for witness records; an old one has not."""
    found = db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'witness'")
    return found.fetchone() is not None


def as_bytes(line: object) -> bytes:
    """Return a stored line; empty bytes for anything else."""
    # A damaged row may hold anything; what is not bytes cannot pass the checks that follow.
    return line if isinstance(line, bytes) else b""


def _lines(
    db: sqlite3.Connection, path: Path, query: str, arguments: tuple[int, ...] = ()
) -> Iterator[bytes]:
    with sqlite_errors(path, writing=False):
        cursor = db.execute(query, arguments)
        while rows := cursor.fetchmany(1000):
            for (line,) in rows:
                yield as_bytes(line)
