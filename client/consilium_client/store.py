"""What the site remembers of studies: its decisions, the updates it stored, what may leave."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from consilium_client.faults import fault_point
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.ledger.entries import Purpose
from consilium_common.study import Study

_UPDATES: Final = """
CREATE TABLE IF NOT EXISTS updates (
    digest TEXT NOT NULL, purpose TEXT NOT NULL, round INTEGER NOT NULL, sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL, figures TEXT NOT NULL, clip_norm REAL, stored_at TEXT NOT NULL,
    PRIMARY KEY (digest, purpose, round)
)"""
_SCHEMA: Final = (
    """
CREATE TABLE IF NOT EXISTS decisions (
    digest TEXT PRIMARY KEY, canonical TEXT NOT NULL, decision TEXT NOT NULL,
    cohort_size INTEGER NOT NULL, why TEXT NOT NULL, decided_at TEXT NOT NULL,
    evaluation_size INTEGER NOT NULL DEFAULT 0, left_out TEXT NOT NULL DEFAULT '[]'
)""",
    _UPDATES,
    """
CREATE TABLE IF NOT EXISTS outgoing (
    object_id TEXT PRIMARY KEY, digest TEXT NOT NULL, round INTEGER, kind TEXT NOT NULL,
    registered_at TEXT NOT NULL
)""",
)
_DECISIONS: Final = (
    "SELECT digest, canonical, decision, cohort_size, decided_at, evaluation_size, left_out"
    " FROM decisions"
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
        # The purpose belongs to the key, so the table is made anew; all it held was training.
        "updates",
        "purpose",
        (
            "ALTER TABLE updates RENAME TO updates_before",
            _UPDATES,
            "INSERT INTO updates SELECT digest, 'training', round, sha256, bytes, figures, NULL,"
            " stored_at FROM updates_before",
            "DROP TABLE updates_before",
        ),
    ),
)


@dataclass(frozen=True)
class Decision:
    """This site's decision about a study."""

    study: Study
    decision: str  #: approved or declined
    cohort_size: int  #: declared, public
    decided_at: str
    evaluation_size: int = 0  #: patients evaluated on, as declared in public
    #: Keyed hashes of patients whose budget the study would overrun: it never sees them.
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StoredUpdate:
    """What was computed once and is sent again whenever it is asked for again.

    A round's update (purpose training, ``blob`` in safetensors), or the released figures of an
    evaluation or of statistics (``blob`` their canonical JSON; the round is the number of rounds
    done, of statistics 0).
    """

    digest: str
    round_index: int
    sha256: str
    figures: dict[str, float]
    blob: bytes = field(repr=False)
    purpose: Purpose = "training"
    #: The clip norm that the next round begins with, where clipping adapts. Stays at the site.
    clip_norm: float | None = None


class StudyStore:
    """``studies.db`` and the folder of stored updates; safe across processes.

    Parameters
    ----------
    home : SiteHome
        The site.

    Raises
    ------
    ConsiliumError
        ``state.store``, here and from every method, when the database cannot be read or written
        (damaged, disk full): what was stored before stays.
    """

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        with self._connect() as connection:
            _make_tables(connection)
        home.studies.chmod(0o600)

    def decide(
        self,
        study: Study,
        decision: str,
        cohort_size: int,
        why: str,
        *,
        evaluation_size: int = 0,
        left_out: Collection[str] = (),
    ) -> None:
        """Remember a decision; a later one about the same study replaces it."""
        with self._connect() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO decisions (digest, canonical, decision, cohort_size, why,"
                " decided_at, evaluation_size, left_out) VALUES (?,?,?,?,?,?,?,?)",
                (
                    study.digest,
                    json.dumps(study.to_canonical()),
                    decision,
                    cohort_size,
                    why,
                    _now(),
                    evaluation_size,
                    json.dumps(sorted(left_out)),
                ),
            )

    def decision(self, digest: str) -> Decision | None:
        """Return the decision about a study, None where there is none."""
        with self._connect() as connection:
            row = connection.execute(f"{_DECISIONS} WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else _decision(row)

    def decisions(self) -> list[Decision]:
        """Return this site's decisions about all studies, the earliest first.

        A record that does not belong to its digest decides nothing and is left out.
        """
        with self._connect() as connection:
            rows = connection.execute(f"{_DECISIONS} ORDER BY decided_at, digest").fetchall()
        found = [(row[0], _decision(row)) for row in rows]
        return [decision for digest, decision in found if decision.study.digest == digest]

    def approved(self, digest: str) -> Decision:
        """Return the approval of a study, or raise ``study.not-approved``."""
        found = self.decision(digest)
        if found is None or found.decision != "approved" or found.study.digest != digest:
            raise ConsiliumError(
                "study.not-approved",
                "This site has not approved the study.",
                hint="See `consilium site studies`.",
            )
        return found

    def keep_update(
        self,
        digest: str,
        round_index: int,
        blob: bytes,
        figures: dict[str, float],
        *,
        purpose: Purpose = "training",
        clip_norm: float | None = None,
    ) -> StoredUpdate:
        """Store an update durably, before it may leave. A round has one for each purpose, for ever.

        Raises
        ------
        ConsiliumError
            ``privacy.second-update`` when there is one already, which stays as it is;
            ``state.disk``.
        """
        sha256 = hashlib.sha256(blob).hexdigest()
        update = StoredUpdate(digest, round_index, sha256, figures, blob, purpose, clip_norm)
        fault_point(f"{purpose}.before-store")
        try:
            with self._connect() as connection:
                connection.execute(
                    "INSERT INTO updates (digest, purpose, round, sha256, bytes, figures,"
                    " clip_norm, stored_at) VALUES (?,?,?,?,?,?,?,?)",
                    (
                        digest,
                        purpose,
                        round_index,
                        sha256,
                        len(blob),
                        json.dumps(figures),
                        clip_norm,
                        _now(),
                    ),
                )
                # Before the row is committed and after it was accepted: a second update of a round
                # must not overwrite the first, and a row must never be without its file.
                write_atomic(self._update_file(digest, round_index, purpose), blob)
                fault_point(f"{purpose}.file-written")
        except sqlite3.IntegrityError as error:
            raise ConsiliumError(
                "privacy.second-update", "A different update was stored for this round already."
            ) from error
        fault_point(f"{purpose}.stored")
        return update

    def update(
        self, digest: str, round_index: int, purpose: Purpose = "training"
    ) -> StoredUpdate | None:
        """Return what was stored of a round.

        Raises
        ------
        ConsiliumError
            ``privacy.update-lost`` when the file is gone or altered: the round was paid for and
            cannot be computed again.
        """
        with self._connect() as connection:
            row = connection.execute(
                "SELECT sha256, figures, clip_norm FROM updates"
                " WHERE digest = ? AND round = ? AND purpose = ?",
                (digest, round_index, purpose),
            ).fetchone()
        if row is None:
            return None
        path = self._update_file(digest, round_index, purpose)
        try:
            blob = path.read_bytes()
        except OSError:
            blob = b""
        if hashlib.sha256(blob).hexdigest() != row[0]:
            raise ConsiliumError(
                "privacy.update-lost",
                "A stored update is missing or altered; its round cannot be computed again.",
                where=str(path),
                hint="Restore the releases folder from your backup.",
            )
        return StoredUpdate(digest, round_index, row[0], json.loads(row[1]), blob, purpose, row[2])

    def clip_norm_after(self, digest: str, round_index: int) -> float | None:
        """Return the clip norm that training left behind after its last round before this one."""
        with self._connect() as connection:
            row = connection.execute(
                "SELECT clip_norm FROM updates WHERE digest = ? AND purpose = 'training'"
                " AND round < ? AND clip_norm IS NOT NULL ORDER BY round DESC LIMIT 1",
                (digest, round_index),
            ).fetchone()
        return None if row is None else float(row[0])

    def updates(self, digest: str) -> list[dict[str, Any]]:
        """Return study, purpose, round, SHA-256, bytes and time of everything stored whose study's
        digest begins with ``digest``; what is stored may leave, and nothing else may.
        """
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT digest, purpose, round, sha256, bytes, stored_at FROM updates"
                " WHERE substr(digest, 1, ?) = ? ORDER BY digest, purpose DESC, round",
                (len(digest), digest),
            ).fetchall()
        names = ("study", "purpose", "round", "sha256", "bytes", "stored_at")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def permit_outgoing(
        self, object_ids: Iterable[str], digest: str, round_index: int | None, kind: str
    ) -> None:
        """Let the link pass these objects (named by the SHA-256 of their content)."""
        with self._connect() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO outgoing VALUES (?,?,?,?,?)",
                [(o, digest, round_index, kind, _now()) for o in object_ids],
            )

    def outgoing(self, object_id: str) -> tuple[str, int | None, str] | None:
        """Return study, round and kind of an object that may leave; None for any other."""
        with self._connect() as connection:
            row = connection.execute(
                "SELECT digest, round, kind FROM outgoing WHERE object_id = ?", (object_id,)
            ).fetchone()
        return None if row is None else (row[0], row[1], row[2])

    def _update_file(self, digest: str, round_index: int, purpose: Purpose) -> Path:
        name = f"{digest[:16]}-{round_index:05d}"
        if purpose == "training":
            return self._home.releases / f"{name}.safetensors"
        return self._home.releases / f"{name}-{purpose}.json"

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._home.studies, timeout=20)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            with connection:
                yield connection
        except sqlite3.IntegrityError:
            raise  # an answer, not a fault: what was to be stored once is there
        except sqlite3.Error as error:
            raise ConsiliumError(
                "state.store",
                f"The site's record of studies cannot be used: {error}.",
                where=str(self._home.studies),
                hint="Free space on the disk or restore the file from your backup.",
            ) from error
        finally:
            connection.close()


def _make_tables(connection: sqlite3.Connection) -> None:
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


def _decision(row: tuple[Any, ...]) -> Decision:
    _, canonical, decision, cohort_size, decided_at, evaluation_size, left_out = row
    return Decision(
        Study.model_validate(json.loads(canonical)),
        decision,
        cohort_size,
        decided_at,
        evaluation_size,
        frozenset(json.loads(left_out)),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def public_error(error: ConsiliumError) -> dict[str, Any]:
    """Return what the aggregator may know of an error at this site: its code, no word more.

    Messages may name files, and file names at hospitals name patients.
    """
    return {
        "code": error.code,
        "message": "The site's operator sees the cause in the site's log.",
    }
