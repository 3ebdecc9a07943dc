"""What the site remembers of studies: its decisions, the updates it stored, what may leave."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.study import Study

_SCHEMA = """
CREATE TABLE IF NOT EXISTS decisions (
    digest TEXT PRIMARY KEY, canonical TEXT NOT NULL, decision TEXT NOT NULL,
    cohort_size INTEGER NOT NULL, why TEXT NOT NULL, decided_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS updates (
    digest TEXT NOT NULL, round INTEGER NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    figures TEXT NOT NULL, stored_at TEXT NOT NULL, PRIMARY KEY (digest, round)
);
CREATE TABLE IF NOT EXISTS outgoing (
    object_id TEXT PRIMARY KEY, digest TEXT NOT NULL, round INTEGER, kind TEXT NOT NULL,
    registered_at TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Decision:
    """This site's decision about a study."""

    study: Study
    decision: str  #: approved or declined
    cohort_size: int  #: declared, public
    decided_at: str


@dataclass(frozen=True)
class StoredUpdate:
    """An update that was computed once and is sent again whenever its round is asked again."""

    digest: str
    round_index: int
    sha256: str
    figures: dict[str, float]
    blob: bytes


class StudyStore:
    """``studies.db`` and the folder of stored updates; safe across processes.

    Parameters
    ----------
    home : SiteHome
        The site.
    """

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        try:
            with self._connect() as connection:
                connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise ConsiliumError(
                "state.store",
                f"The site's record of studies cannot be opened: {error}.",
                where=str(home.studies),
                hint="Free space on the disk or restore the file from your backup.",
            ) from error
        home.studies.chmod(0o600)

    def decide(self, study: Study, decision: str, cohort_size: int, why: str) -> None:
        """Remember a decision; a later one about the same study replaces it."""
        with self._connect() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO decisions VALUES (?,?,?,?,?,?)",
                (
                    study.digest,
                    json.dumps(study.to_canonical()),
                    decision,
                    cohort_size,
                    why,
                    _now(),
                ),
            )

    def decision(self, digest: str) -> Decision | None:
        """Return the decision about a study, None where there is none."""
        with self._connect() as connection:
            row = connection.execute(
                "SELECT canonical, decision, cohort_size, decided_at FROM decisions"
                " WHERE digest = ?",
                (digest,),
            ).fetchone()
        if row is None:
            return None
        return Decision(Study.model_validate(json.loads(row[0])), row[1], row[2], row[3])

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
        self, digest: str, round_index: int, blob: bytes, figures: dict[str, float]
    ) -> StoredUpdate:
        """Store an update durably, before it may leave. A round has one update for ever."""
        update = StoredUpdate(digest, round_index, hashlib.sha256(blob).hexdigest(), figures, blob)
        try:
            with self._connect() as connection:
                connection.execute(
                    "INSERT INTO updates VALUES (?,?,?,?,?,?)",
                    (digest, round_index, update.sha256, len(blob), json.dumps(figures), _now()),
                )
                # Before the row is committed and after it was accepted: a second update of a round
                # must not overwrite the first, and a row must never be without its file.
                write_atomic(self._update_file(digest, round_index), blob)
        except sqlite3.IntegrityError as error:
            raise ConsiliumError(
                "privacy.second-update", "A different update was stored for this round already."
            ) from error
        return update

    def update(self, digest: str, round_index: int) -> StoredUpdate | None:
        """Return the stored update of a round.

        Raises
        ------
        ConsiliumError
            ``privacy.update-lost`` when the file is gone or altered: the round was paid for and
            cannot be computed again.
        """
        with self._connect() as connection:
            row = connection.execute(
                "SELECT sha256, figures FROM updates WHERE digest = ? AND round = ?",
                (digest, round_index),
            ).fetchone()
        if row is None:
            return None
        try:
            blob = self._update_file(digest, round_index).read_bytes()
        except OSError:
            blob = b""
        if hashlib.sha256(blob).hexdigest() != row[0]:
            raise ConsiliumError(
                "privacy.update-lost",
                "A stored update is missing or altered; its round cannot be computed again.",
                where=str(self._update_file(digest, round_index)),
                hint="Restore the releases folder from your backup.",
            )
        return StoredUpdate(digest, round_index, row[0], json.loads(row[1]), blob)

    def updates(self, digest: str) -> list[dict[str, Any]]:
        """Return round, SHA-256, bytes and time of every stored update whose study's digest begins
        with ``digest``; what is stored may leave, and nothing else may.
        """
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT digest, round, sha256, bytes, stored_at FROM updates"
                " WHERE substr(digest, 1, ?) = ? ORDER BY digest, round",
                (len(digest), digest),
            ).fetchall()
        names = ("study", "round", "sha256", "bytes", "stored_at")
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

    def _update_file(self, digest: str, round_index: int) -> Path:
        return self._home.releases / f"{digest[:16]}-{round_index:05d}.safetensors"

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._home.studies, timeout=20)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            with connection:
                yield connection
        finally:
            connection.close()


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
