"""The aggregator's records: opened, searched and changed in transactions (SQLite)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateColumn

from consilium_common.errors import ConsiliumError
from consilium_server.tables import (
    Alarm,
    Approval,
    Base,
    EvaluationRow,
    InvitationRow,
    Member,
    Progress,
    Received,
    Round,
    StatisticsRow,
    StudyRow,
    Witnessed,
    append_only_triggers,
    now,
)

_log = logging.getLogger(__name__)


class Registry:
    """Opens the database and its transactions.

    Parameters
    ----------
    database : Path
        SQLite file; created where it is missing. One of an earlier release gets the tables and
        columns that it lacks; nothing in it is changed.
    """

    def __init__(self, database: Path) -> None:
        self._engine = create_engine(f"sqlite:///{database}", connect_args={"timeout": 20})

        @event.listens_for(self._engine, "connect")
        def _pragmas(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

        try:
            Base.metadata.create_all(self._engine)
            _add_missing_columns(self._engine)
            with self._engine.begin() as connection:
                for statement in append_only_triggers():
                    connection.exec_driver_sql(statement)
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

    # --- members ---------------------------------------------------------------------------

    def member(self, name: str) -> Member | None:
        """Return the member of that name."""
        with self.transaction() as session:
            return session.get(Member, name)

    def site(self, name: str) -> Member:
        """Return the site of that name, or raise ``identity.unknown``."""
        member = self.member(name)
        if member is None or member.role != "site":
            raise ConsiliumError(
                "identity.unknown",
                f"There is no site {name!r}.",
                hint="List them with `consilium server sites`.",
            )
        return member

    def promote(self, name: str, serial: str) -> Member:
        """Put a renewed certificate in force: the one before it opens nothing any more."""
        with self.transaction() as session:
            member = session.get_one(Member, name)
            # Two first calls may come at the same time: the second finds it done.
            if member.next_serial == serial:
                member.serial = serial
                member.certificate_pem = member.next_certificate_pem or member.certificate_pem
                member.signer_pem = member.next_signer_pem or member.signer_pem
                member.next_serial = member.next_certificate_pem = member.next_signer_pem = None
            return member

    def note_seen(self, name: str, address: str) -> Member:
        """Note that a member called just now, and from where."""
        with self.transaction() as session:
            member = session.get_one(Member, name)
            member.last_seen = now()
            member.address = address
            return member

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
                raise _invitation_used()

    def restore_invitation(self, serial: str) -> None:
        """Make an invitation usable again after an enrolment that certified nobody."""
        with self.transaction() as session:
            session.get_one(InvitationRow, serial).used_at = None

    def check_invitation(self, serial: str, key: str) -> None:
        """Refuse an invitation that was used, or that waits for another key's certificate."""
        with self.transaction() as session:
            row = session.get(InvitationRow, serial)
        if row is None or row.used_at is not None or row.key not in (None, key):
            raise _invitation_used()

    def reserve_invitation(self, serial: str, key: str) -> None:
        """Bind an invitation to the key whose certificate waits for the offline authority."""
        with self.transaction() as session:
            bound = update(InvitationRow).where(
                InvitationRow.serial == serial, InvitationRow.key.is_(None)
            )
            session.execute(bound.values(key=key))
        self.check_invitation(serial, key)

    def sites(self) -> list[Member]:
        """Return all sites, by name."""
        return self.members("site")

    def members(self, *roles: str) -> list[Member]:
        """Return all members of these roles (none: of every role), by name."""
        with self.transaction() as session:
            query = select(Member).order_by(Member.name)
            if roles:
                query = query.where(Member.role.in_(roles))
            return list(session.scalars(query))

    def set_node(self, name: str, node_id: int) -> None:
        """Note the node id under which Flower knows a member now."""
        with self.transaction() as session:
            session.get_one(Member, name).node_id = str(node_id)

    # --- studies ---------------------------------------------------------------------------

    def study(self, which: str) -> StudyRow:
        """Return a study by its digest, its name, or an unambiguous beginning of its digest.

        A name wins over the beginning of another study's digest.

        Raises
        ------
        ConsiliumError
            ``study.unknown`` or ``study.ambiguous``.
        """
        found: list[StudyRow] = []
        with self.transaction() as session:
            for condition in (
                StudyRow.digest == which,
                StudyRow.name == which,
                StudyRow.digest.startswith(which, autoescape=True),
            ):
                found = list(session.scalars(select(StudyRow).where(condition))) if which else []
                if found:
                    break
        if not found:
            raise ConsiliumError(
                "study.unknown",
                f"No study {which!r} was proposed here.",
                hint="List them with `consilium study list`.",
            )
        if len(found) > 1:
            raise ConsiliumError(
                "study.ambiguous",
                f"{which!r} stands for {len(found)} studies.",
                hint="Give more digits of the digest.",
            )
        return found[0]

    def studies(self) -> list[StudyRow]:
        """Return all studies, oldest first."""
        with self.transaction() as session:
            return list(session.scalars(select(StudyRow).order_by(StudyRow.proposed_at)))

    def running(self) -> list[str]:
        """Return the digests of the studies that run now; reads no study itself."""
        with self.transaction() as session:
            query = select(StudyRow.digest).where(StudyRow.state == "running")
            return list(session.scalars(query.order_by(StudyRow.proposed_at)))

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

    def evaluations(self, digest: str) -> list[EvaluationRow]:
        """Return a study's evaluations, by the rounds done before each."""
        with self.transaction() as session:
            query = select(EvaluationRow).where(EvaluationRow.digest == digest)
            return list(session.scalars(query.order_by(EvaluationRow.rounds_done)))

    def evaluation(self, digest: str, rounds_done: int) -> EvaluationRow | None:
        """Return the evaluation after so many rounds; None where it was not done yet."""
        with self.transaction() as session:
            return session.get(EvaluationRow, (digest, rounds_done))

    def statistics(self, digest: str) -> StatisticsRow | None:
        """Return a study's statistics; None where they were not gathered."""
        with self.transaction() as session:
            return session.get(StatisticsRow, digest)

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

    # --- what bears witness ----------------------------------------------------------------

    def note_received(self, received: Received) -> bool:
        """Note what a site sent, once; returns whether it had sent something else before.

        The same bytes again change nothing: a round that is asked again is answered from the
        site's store.
        """
        with self.transaction() as session:
            before = set(
                session.scalars(
                    select(Received.sha256).where(
                        Received.study == received.study,
                        Received.site == received.site,
                        Received.purpose == received.purpose,
                        Received.round == received.round,
                    )
                )
            )
            if received.sha256 not in before:
                session.add(received)
            return bool(before - {received.sha256})

    def received(self, site: str) -> list[Received]:
        """Return all that was received of a site, oldest first."""
        with self.transaction() as session:
            query = select(Received).where(Received.site == site).order_by(Received.id)
            return list(session.scalars(query))

    def witnessed(self, site: str) -> list[Witnessed]:
        """Return all that was witnessed of a site, oldest first."""
        with self.transaction() as session:
            query = select(Witnessed).where(Witnessed.site == site).order_by(Witnessed.id)
            return list(session.scalars(query))

    def last_witnessed(self) -> dict[str, Witnessed]:
        """Return the entry witnessed last, by site."""
        with self.transaction() as session:
            newest = select(func.max(Witnessed.id)).group_by(Witnessed.site)
            query = select(Witnessed).where(Witnessed.id.in_(newest))
            return {row.site: row for row in session.scalars(query)}

    def raise_alarm(self, site: str, code: str, message: str) -> None:
        """Keep what a person must look at, and say it in the log; the same again is kept once."""
        _log.critical("ALARM, site %s: [%s] %s", site, code, message)
        with self.transaction() as session:
            values = {"site": site, "code": code, "message": message, "at": now()}
            session.execute(insert(Alarm).values(values).on_conflict_do_nothing())

    def alarms(self) -> list[Alarm]:
        """Return all alarms, oldest first."""
        with self.transaction() as session:
            return list(session.scalars(select(Alarm).order_by(Alarm.id)))


def _invitation_used() -> ConsiliumError:
    return ConsiliumError(
        "identity.invitation-used",
        "The invitation was used already.",
        hint="Each invitation works once; ask the aggregator operator for a new one.",
    )


def _add_missing_columns(engine: Engine) -> None:
    """Add to the tables of an earlier release the columns that came after it."""
    for table in Base.metadata.sorted_tables:
        with engine.begin() as connection:
            known = _columns(connection, table.name)
            missing = [column for column in table.columns if column.name not in known]
            if not missing:
                continue
            # Another process may be at it: looked at again once nobody else can write.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            known = _columns(connection, table.name)
            for column in missing:
                if column.name not in known:
                    definition = CreateColumn(column).compile(engine)
                    connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {definition}")


def _columns(connection: Any, table: str) -> set[str]:
    rows = connection.exec_driver_sql(f"PRAGMA table_info({table})")
    return {row[1] for row in rows}
