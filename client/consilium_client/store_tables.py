"""``studies.db``: its tables, how those of earlier releases become today's, its transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from consilium_common.errors import ConsiliumError

_UPDATES: Final = """
CREATE TABLE IF NOT EXISTS updates (
    digest TEXT NOT NULL, purpose TEXT NOT NULL, round INTEGER NOT NULL, sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL, figures TEXT NOT NULL, clip_norm REAL, stored_at TEXT NOT NULL,
    withheld INTEGER NOT NULL DEFAULT 0, kept TEXT,
    PRIMARY KEY (digest, purpose, round)
)"""
_SCHEMA: Final = (
    """
CREATE TABLE IF NOT EXISTS decisions (
    digest TEXT PRIMARY KEY, canonical TEXT NOT NULL, decision TEXT NOT NULL,
    cohort_size INTEGER NOT NULL, why TEXT NOT NULL, decided_at TEXT NOT NULL,
    evaluation_size INTEGER NOT NULL DEFAULT 0, left_out TEXT NOT NULL DEFAULT '[]',
    automatic TEXT, told INTEGER NOT NULL DEFAULT 1, approved_at TEXT
)""",
    _UPDATES,
)
#: How a table of an earlier release becomes today's: by a column that it lacks.
_MIGRATIONS: Final = (
    (
        "decisions",
        "evaluation_size",
        (
            "ALTER TABLE decisions ADD COLUMN evaluation_size INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE decisions ADD COLUMN left_out TEXT NOT NULL DEFAULT '[]'",
        ),
    ),
    (
        "decisions",
        "automatic",
        (
            "ALTER TABLE decisions ADD COLUMN automatic TEXT",
            # What an earlier release decided, it has told.
            "ALTER TABLE decisions ADD COLUMN told INTEGER NOT NULL DEFAULT 1",
        ),
    ),
    (
        "decisions",
        "approved_at",
        (
            "ALTER TABLE decisions ADD COLUMN approved_at TEXT",
            # An earlier release forgot approvals that were taken back.
            "UPDATE decisions SET approved_at = decided_at WHERE decision = 'approved'",
        ),
    ),
    (
        # The purpose belongs to the key, so the table is made anew; all it held was training.
        "updates",
        "purpose",
        (
            "ALTER TABLE updates RENAME TO updates_before",
            _UPDATES,
            "INSERT INTO updates SELECT digest, 'training', round, sha256, bytes, figures, NULL,"
            " stored_at, 0, NULL FROM updates_before",
            "DROP TABLE updates_before",
        ),
    ),
    (
        "updates",
        "withheld",
        ("ALTER TABLE updates ADD COLUMN withheld INTEGER NOT NULL DEFAULT 0",),
    ),
    ("updates", "kept", ("ALTER TABLE updates ADD COLUMN kept TEXT",)),
)


@contextmanager
def transaction(database: Path) -> Iterator[sqlite3.Connection]:
    """Open the database for one transaction: durable at the end, undone on an error.

    Raises
    ------
    ConsiliumError
        ``state.store`` when it cannot be read or written. An ``sqlite3.IntegrityError`` is passed
        on: it is an answer, what was to be stored once is there.
    """
    connection = sqlite3.connect(database, timeout=20)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        with connection:
            yield connection
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise store_error(database, error) from error
    finally:
        connection.close()


def store_error(database: Path, error: sqlite3.Error) -> ConsiliumError:
    """Return what is said when the database cannot be used."""
    return ConsiliumError(
        "state.store",
        f"The site's record of studies cannot be used: {error}.",
        where=str(database),
        hint="Free space on the disk or restore the file from your backup.",
    )


def make_tables(connection: sqlite3.Connection) -> None:
    """Make what is missing and bring what an earlier release made up to date, all or nothing."""
    # SQLite's tables are changed in transactions too; the lock keeps two processes from it at once.
    connection.execute("BEGIN IMMEDIATE")
    for table, column, statements in _MIGRATIONS:
        columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        if columns and column not in columns:
            for statement in statements:
                connection.execute(statement)
    for statement in _SCHEMA:
        connection.execute(statement)
