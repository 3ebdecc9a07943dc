"""The aggregator's records: members, invitations, studies, approvals, rounds (SQLAlchemy)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, String, create_engine, event, select, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study

#: A site whose link has been silent this long counts as offline.
ONLINE_SECONDS = 12.0


class _Base(DeclarativeBase):
    pass


class Member(_Base):
    """A site or operator that has a certificate."""

    __tablename__ = "members"
    name: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    status: Mapped[str]  #: active or revoked
    serial: Mapped[str]  #: of the certificate in force, hexadecimal
    certificate_pem: Mapped[str]
    signer_pem: Mapped[str]  #: certificate of the Ed25519 key that signs approvals and ledger
    node_id: Mapped[str | None]  #: Flower's node id, decimal
    joined_at: Mapped[str]
    last_seen: Mapped[str | None] = mapped_column(default=None)
    session: Mapped[str | None] = mapped_column(default=None)  #: changes when the site restarts
    version: Mapped[str | None] = mapped_column(default=None)

    @property
    def online(self) -> bool:
        """Whether the member may connect and was heard of a moment ago."""
        return self.status == "active" and seconds_since(self.last_seen) < ONLINE_SECONDS


class InvitationRow(_Base):
    """An invitation: it may be used once, before it expires."""

    __tablename__ = "invitations"
    serial: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    role: Mapped[str]
    expires: Mapped[str]
    used_at: Mapped[str | None] = mapped_column(default=None)


class StudyRow(_Base):
    """A proposed study and where it stands."""

    __tablename__ = "studies"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    canonical: Mapped[dict[str, Any]] = mapped_column(JSON)
    proposed_by: Mapped[str]
    signature: Mapped[str]
    signer_pem: Mapped[str]
    proposed_at: Mapped[str]
    #: proposed, running, finished, failed or stopped
    state: Mapped[str] = mapped_column(default="proposed")
    reason: Mapped[str] = mapped_column(default="")
    flower_run: Mapped[str | None] = mapped_column(default=None)
    started_at: Mapped[str | None] = mapped_column(default=None)
    ended_at: Mapped[str | None] = mapped_column(default=None)

    @property
    def study(self) -> Study:
        """The study itself."""
        return Study.model_validate(self.canonical)


class Approval(_Base):
    """A site's signed decision about a study."""

    __tablename__ = "approvals"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    decision: Mapped[str]  #: approved or declined
    why: Mapped[str]
    cohort_size: Mapped[int]  #: public, declared by the site
    signature: Mapped[str]
    decided_at: Mapped[str]


class Round(_Base):
    """One finished round."""

    __tablename__ = "rounds"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    seconds: Mapped[float]
    sites: Mapped[list[str]] = mapped_column(JSON)  #: whose update was added
    dropped: Mapped[dict[str, str]] = mapped_column(JSON)  #: site to reason
    loss: Mapped[float | None] = mapped_column(default=None)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    ended_at: Mapped[str] = mapped_column(default="")


class Progress(_Base):
    """What a site said last about the running round; public facts alone."""

    __tablename__ = "progress"
    site: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    phase: Mapped[str]
    round: Mapped[int]
    step: Mapped[int]
    steps: Mapped[int]
    at: Mapped[str]


def now() -> str:
    """Return the time as ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Registry:
    """Opens the database and its transactions.

    Parameters
    ----------
    database : Path
        SQLite file; created where it is missing.
    """

    def __init__(self, database: Path) -> None:
        self._engine = create_engine(f"sqlite:///{database}", connect_args={"timeout": 20})

        @event.listens_for(self._engine, "connect")
        def _pragmas(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

        try:
            _Base.metadata.create_all(self._engine)
        except DatabaseError as error:
            raise ConsiliumError(
                "state.registry",
                "The aggregator's registry cannot be opened.",
                where=str(database),
                hint="Restore it from your backup, or free space on the disk.",
            ) from error
        database.chmod(0o600)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a transaction: committed at the end, rolled back on an error."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    def member(self, name: str) -> Member | None:
        """Return the member of that name."""
        with self.transaction() as session:
            return session.get(Member, name)

    def spend_invitation(self, serial: str) -> None:
        """Mark an invitation as used, or raise: of two that try at once, one alone succeeds."""
        with self.transaction() as session:
            spent = session.scalar(
                update(InvitationRow)
                .where(InvitationRow.serial == serial, InvitationRow.used_at.is_(None))
                .values(used_at=now())
                .returning(InvitationRow.serial)
            )
            if spent is None:
                raise ConsiliumError(
                    "identity.invitation-used",
                    "The invitation was used already.",
                    hint="Each invitation works once; ask the aggregator operator for a new one.",
                )

    def restore_invitation(self, serial: str) -> None:
        """Make an invitation usable again after an enrolment that certified nobody."""
        with self.transaction() as session:
            session.get_one(InvitationRow, serial).used_at = None

    def sites(self) -> list[Member]:
        """Return all sites, by name."""
        with self.transaction() as session:
            query = select(Member).where(Member.role == "site").order_by(Member.name)
            return list(session.scalars(query))

    def set_node(self, name: str, node_id: int) -> None:
        """Note the node id under which Flower knows a member now."""
        with self.transaction() as session:
            session.get_one(Member, name).node_id = str(node_id)

    def study(self, digest: str) -> StudyRow:
        """Return a study by its digest or an unambiguous beginning of it, or by its name.

        Raises
        ------
        ConsiliumError
            ``study.unknown`` or ``study.ambiguous``.
        """
        with self.transaction() as session:
            rows = list(session.scalars(select(StudyRow)))
        found = [row for row in rows if digest and row.digest.startswith(digest)]
        found = found or [row for row in rows if row.name == digest]
        if not found:
            raise ConsiliumError(
                "study.unknown",
                f"No study {digest!r} was proposed here.",
                hint="List them with `consilium study list`.",
            )
        if len(found) > 1:
            raise ConsiliumError(
                "study.ambiguous",
                f"{digest!r} stands for {len(found)} studies.",
                hint="Give more digits of the digest.",
            )
        return found[0]

    def studies(self) -> list[StudyRow]:
        """Return all studies, oldest first."""
        with self.transaction() as session:
            return list(session.scalars(select(StudyRow).order_by(StudyRow.proposed_at)))

    def approvals(self, digest: str) -> list[Approval]:
        """Return all decisions about a study, by site."""
        with self.transaction() as session:
            query = select(Approval).where(Approval.digest == digest).order_by(Approval.site)
            return list(session.scalars(query))

    def rounds(self, digest: str) -> list[Round]:
        """Return a study's finished rounds in order."""
        with self.transaction() as session:
            query = select(Round).where(Round.digest == digest).order_by(Round.number)
            return list(session.scalars(query))

    def progress(self, digest: str) -> list[Progress]:
        """Return what sites said last about a study."""
        with self.transaction() as session:
            query = select(Progress).where(Progress.digest == digest).order_by(Progress.site)
            return list(session.scalars(query))

    def fail_running(self, digest: str, reason: str) -> None:
        """Move a study from running to failed; one that was stopped meanwhile stays stopped."""
        if self.study(digest).state == "running":
            self.set_study_state(digest, "failed", reason)

    def running_as(self, flower_run: str) -> StudyRow | None:
        """Return the study that runs as this Flower run, None when none does."""
        with self.transaction() as session:
            query = select(StudyRow).where(
                StudyRow.flower_run == flower_run, StudyRow.state == "running"
            )
            return session.scalars(query).first()

    def set_study_state(self, digest: str, state: str, reason: str = "") -> None:
        """Move a study to ``state``, with who or why in ``reason``."""
        with self.transaction() as session:
            row = session.get_one(StudyRow, digest)
            row.state = state
            row.reason = reason
            if state == "running":
                row.started_at, row.ended_at = now(), None
            elif state in ("finished", "failed", "stopped"):
                row.ended_at = now()


def seconds_since(moment: str | None) -> float:
    """Return the seconds since an ISO time of :func:`now`; infinity for None."""
    if moment is None:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
