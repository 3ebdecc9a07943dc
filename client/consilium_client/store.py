"""What the site remembers of studies: its decisions, and the updates it stored."""

from __future__ import annotations

import builtins
import hashlib
import json
import sqlite3
from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from consilium_client.budget.policy_automatic import Asked
from consilium_client.faults import fault_point
from consilium_client.home import SiteHome
from consilium_client.kept import drop_others, read_kept, write_kept
from consilium_client.store_tables import make_tables, transaction
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.ledger.entries import Purpose
from consilium_common.study import Study

_DECISIONS: Final = (
    "SELECT digest, canonical, decision, cohort_size, decided_at, evaluation_size, left_out,"
    " why, automatic, approved_at FROM decisions"
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
    why: str = ""
    #: Of an approval that the policy gave by itself: what its bounds were held against. They are
    #: held against it again before every round. None: a person decided.
    automatic: Asked | None = None
    #: When it was approved last, taken back since or not. None: it never was.
    approved_at: str | None = None


@dataclass(frozen=True)
class StoredUpdate:
    """What was computed once and is sent again whenever it is asked for again.

    A round's update (purpose training, ``file`` in safetensors), or the released figures of an
    evaluation or of statistics (``file`` their canonical JSON; the round is the number of rounds
    done, of statistics 0).
    """

    digest: str
    round_index: int
    sha256: str
    figures: dict[str, float]
    #: Of these bytes and this SHA-256.
    file: Path = field(repr=False)
    bytes: int = 0
    purpose: Purpose = "training"
    #: The clip norm that the next round begins with, where clipping adapts. Stays at the site.
    clip_norm: float | None = None

    @property
    def blob(self) -> builtins.bytes:
        """The content."""
        return self.file.read_bytes()


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
            make_tables(connection)
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
        automatic: Asked | None = None,
    ) -> Decision:
        """Remember a decision and return it; a later one about the same study replaces it.

        What takes an approval back is final for all that is stored of the study: none of it is
        sent any more, not even under a later approval.

        Raises
        ------
        ConsiliumError
            ``study.decided`` for an automatic approval where there is a decision already: what a
            person has decided no machine replaces.
        """
        now = _now()
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            before = _decision_of(connection, study.digest)
            if automatic is not None and before is not None:
                raise decided_already()
            approved_at = None if before is None else before.approved_at
            connection.execute(
                "INSERT OR REPLACE INTO decisions (digest, canonical, decision, cohort_size, why,"
                " decided_at, evaluation_size, left_out, automatic, approved_at, told)"
                " VALUES (?,?,?,?,?,?,?,?,?,?,0)",
                (
                    study.digest,
                    json.dumps(study.to_canonical()),
                    decision,
                    cohort_size,
                    why,
                    now,
                    evaluation_size,
                    json.dumps(sorted(left_out)),
                    None if automatic is None else json.dumps(asdict(automatic)),
                    now if decision == "approved" else approved_at,
                ),
            )
            if decision != "approved":
                connection.execute(
                    "UPDATE updates SET withheld = 1 WHERE digest = ?", (study.digest,)
                )
            decided = _decision_of(connection, study.digest)
        assert decided is not None
        return decided

    def untold(self) -> list[Decision]:
        """Return the decisions that the aggregator has not heard of, the earliest first."""
        with self._connect() as connection:
            rows = connection.execute(
                f"{_DECISIONS} WHERE told = 0 ORDER BY decided_at, digest"
            ).fetchall()
        return [_decision(row) for row in rows]

    def note_told(self, decision: Decision) -> None:
        """Remember that the aggregator has heard of a decision."""
        with self._connect() as connection:
            connection.execute(
                "UPDATE decisions SET told = 1 WHERE digest = ? AND decided_at = ?",
                (decision.study.digest, decision.decided_at),
            )

    def decision(self, digest: str) -> Decision | None:
        """Return the decision about a study, None where there is none."""
        with self._connect() as connection:
            return _decision_of(connection, digest)

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
        kept: builtins.bytes | None = None,
        under: Decision | None = None,
    ) -> StoredUpdate:
        """Store an update durably, before it may leave. A round has one for each purpose, for ever.

        Parameters
        ----------
        kept : bytes, optional
            What the study keeps at the site for its next round (safetensors), stored with the
            update or not at all. None: what it kept before stays.
        under : Decision, optional
            The approval under which it was computed: unless it still stands, in the same
            transaction, nothing is stored.

        Raises
        ------
        ConsiliumError
            ``privacy.second-update`` when there is one already, which stays as it is;
            ``study.withdrawn`` or ``study.decided-anew``; ``state.disk``.
        """
        sha256 = hashlib.sha256(blob).hexdigest()
        file = self._update_file(digest, round_index, purpose)
        update = StoredUpdate(
            digest, round_index, sha256, figures, file, len(blob), purpose, clip_norm
        )
        fault_point(f"{purpose}.before-store")
        try:
            with self._connect() as connection:
                if under is not None:
                    # From here to the end nobody else decides: what is withdrawn after this is
                    # withheld, and what was withdrawn before is not stored.
                    connection.execute("BEGIN IMMEDIATE")
                    still_stands(under, _decision_of(connection, digest))
                connection.execute(
                    "INSERT INTO updates (digest, purpose, round, sha256, bytes, figures,"
                    " clip_norm, stored_at, kept) VALUES (?,?,?,?,?,?,?,?,?)",
                    (
                        digest,
                        purpose,
                        round_index,
                        sha256,
                        len(blob),
                        json.dumps(figures),
                        clip_norm,
                        _now(),
                        None if kept is None else hashlib.sha256(kept).hexdigest(),
                    ),
                )
                # Before the row is committed and after it was accepted: a second update of a round
                # must not overwrite the first, and a row must never be without its file.
                write_atomic(file, blob)
                if kept is not None:
                    write_kept(self._home, digest, round_index, kept)
                fault_point(f"{purpose}.file-written")
        except sqlite3.IntegrityError as error:
            raise ConsiliumError(
                "privacy.second-update", "A different update was stored for this round already."
            ) from error
        if kept is not None:
            drop_others(self._home, digest, round_index)
        fault_point(f"{purpose}.stored")
        return update

    def kept(self, digest: str) -> builtins.bytes | None:
        """Return what the study kept here with the update stored last; None where it kept nothing.

        What was kept before the site withdrew from the study is not taken up again.

        Raises ``state.kept-lost`` when the file is gone or altered.
        """
        with self._connect() as connection:
            # By the order of storing: a round that is caught up later may have a lower number.
            row = connection.execute(
                "SELECT round, kept FROM updates WHERE digest = ? AND purpose = 'training'"
                " AND kept IS NOT NULL AND withheld = 0 ORDER BY rowid DESC LIMIT 1",
                (digest,),
            ).fetchone()
        return None if row is None else read_kept(self._home, digest, row[0], row[1])

    def update(
        self, digest: str, round_index: int, purpose: Purpose = "training"
    ) -> StoredUpdate | None:
        """Return what was stored of a round.

        Raises
        ------
        ConsiliumError
            ``study.withheld`` when the site withdrew from the study after it was stored;
            ``privacy.update-lost`` when the file is gone or altered: the round was paid for and
            cannot be computed again.
        """
        with self._connect() as connection:
            row = connection.execute(
                "SELECT sha256, figures, clip_norm, withheld FROM updates"
                " WHERE digest = ? AND round = ? AND purpose = ?",
                (digest, round_index, purpose),
            ).fetchone()
        if row is None:
            return None
        if row[3]:
            raise ConsiliumError(
                "study.withheld",
                "This was stored before the site withdrew from the study: it stays here for good.",
                hint="Approved anew, the site takes part again from the next round on.",
            )
        path = self._update_file(digest, round_index, purpose)
        found, size = "", 0
        with suppress(OSError), path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
        if found != row[0]:
            raise ConsiliumError(
                "privacy.update-lost",
                "A stored update is missing or altered; its round cannot be computed again.",
                where=str(path),
                hint="Restore the releases folder from your backup.",
            )
        return StoredUpdate(
            digest, round_index, row[0], json.loads(row[1]), path, size, purpose, row[2]
        )

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
        """Return study, purpose, round, SHA-256, bytes, time and whether it is withheld of
        everything stored whose study's digest begins with ``digest``; what is stored and not
        withheld may leave, and nothing else may.
        """
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT digest, purpose, round, sha256, bytes, stored_at, withheld FROM updates"
                " WHERE substr(digest, 1, ?) = ? ORDER BY digest, purpose DESC, round",
                (len(digest), digest),
            ).fetchall()
        names = ("study", "purpose", "round", "sha256", "bytes", "stored_at", "withheld")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _update_file(self, digest: str, round_index: int, purpose: Purpose) -> Path:
        name = f"{digest[:16]}-{round_index:05d}"
        if purpose == "training":
            return self._home.releases / f"{name}.safetensors"
        return self._home.releases / f"{name}-{purpose}.json"

    def _connect(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._home.studies)


def decided_already() -> ConsiliumError:
    """Return why a machine does not decide."""
    return ConsiliumError(
        "study.decided",
        "This site has decided about the study already.",
        hint="See `consilium site studies`.",
    )


def still_stands(approval: Decision, found: Decision | None) -> None:
    """Raise unless what the site decided last is this very approval.

    Raises
    ------
    ConsiliumError
        ``study.withdrawn``, or ``study.decided-anew``: other patients may take part now.
    """
    if found == approval:
        return
    if found is None or found.decision != "approved":
        raise ConsiliumError(
            "study.withdrawn",
            "This site has withdrawn from the study: nothing more is computed, stored or sent.",
            where=approval.study.digest[:12],
        )
    raise ConsiliumError(
        "study.decided-anew",
        "The site has approved the study anew: the round under the approval before is given up.",
        where=approval.study.digest[:12],
    )


def _decision_of(connection: sqlite3.Connection, digest: str) -> Decision | None:
    row = connection.execute(f"{_DECISIONS} WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else _decision(row)


def _decision(row: tuple[Any, ...]) -> Decision:
    _, canonical, decision, cohort_size, decided_at, evaluation_size, left_out, why, *more = row
    automatic, approved_at = more
    return Decision(
        Study.model_validate(json.loads(canonical)),
        decision,
        cohort_size,
        decided_at,
        evaluation_size,
        frozenset(json.loads(left_out)),
        why,
        None if automatic is None else Asked(**json.loads(automatic)),
        approved_at,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def public_error(error: ConsiliumError) -> dict[str, Any]:
    """Return what the aggregator may know of an error at this site: its code, no word more.

    Messages may name files, and file names at hospitals name patients.
    """
    return {
        "code": error.code,
        "message": "The site's operator sees the cause in the site's log.",
    }
