"""The aggregator's records: opened, searched and changed in transactions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import event, func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from consilium_common.errors import ConsiliumError
from consilium_server.database import insert_new, open_database
from consilium_server.states import AGGREGATOR, State, change
from consilium_server.tables import (
    Alarm,
    Approval,
    EvaluationRow,
    InvitationRow,
    Member,
    Progress,
    Received,
    Round,
    StatisticsRow,
    StudyEvent,
    StudyRow,
    Witnessed,
    now,
)

_log = logging.getLogger(__name__)

_KNOWN_SECONDS: Final = 0.5


def _note_members(session: Session, _: object) -> None:
    if any(isinstance(one, Member) for one in (*session.new, *session.dirty, *session.deleted)):
        session.info["members"] = True


class Registry:
    """Opens the database and its transactions.

    Parameters
    ----------
    database : Path
        As :func:`~consilium_server.database.open_database` takes it: an SQLite file, or PostgreSQL
        where ``server.json`` beside it says so.
    named : str, optional
        URL of a PostgreSQL database, while there is no ``server.json`` yet.
    """

    def __init__(self, database: Path, named: str = "") -> None:
        self._engine = open_database(database, named)
        self._known: dict[str, Member] = {}
        self._known_at = -_KNOWN_SECONDS

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a transaction: committed at the end, rolled back on an error."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            event.listen(session, "after_flush", _note_members)
            event.listen(session, "after_commit", self._forget_members)
            yield session

    # --- members ---------------------------------------------------------------------------

    def member(self, name: str) -> Member | None:
        """Return the member of that name."""
        with self.transaction() as session:
            return session.get(Member, name)

    def known_member(self, name: str) -> Member | None:
        """Return a member as it stood at most half a second ago, and after every change here.

        A thousand sites are asked after many times a second; all are read in one go.
        """
        if time.monotonic() > self._known_at + _KNOWN_SECONDS:
            self._known_at = time.monotonic()
            self._known = {member.name: member for member in self.members()}
        return self._known.get(name)

    def _forget_members(self, session: Session) -> None:
        if session.info.get("members"):
            self._known_at = -_KNOWN_SECONDS

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
        try:
            return self._note_seen(name, address)
        except OperationalError:
            # A full disk: nobody is turned away because that cannot be written.
            with self.transaction() as session:
                return session.get_one(Member, name)

    def _note_seen(self, name: str, address: str) -> Member:
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

    def in_states(self, *states: State) -> list[StudyRow]:
        """Return the studies in one of these states, oldest first."""
        with self.transaction() as session:
            query = select(StudyRow).where(StudyRow.state.in_(states))
            return list(session.scalars(query.order_by(StudyRow.proposed_at)))

    def running(self) -> list[str]:
        """Return the digests of the studies that run now; reads no study itself."""
        with self.transaction() as session:
            query = select(StudyRow.digest).where(StudyRow.state == State.RUNNING)
            return list(session.scalars(query.order_by(StudyRow.proposed_at)))

    def running_at(self, site: str) -> list[str]:
        """Return the digests of the studies that run now and were proposed to a site."""
        with self.transaction() as session:
            query = select(StudyRow.digest, StudyRow.sites).where(StudyRow.state == State.RUNNING)
            found = session.execute(query.order_by(StudyRow.proposed_at)).all()
        return [digest for digest, sites in found if sites is None or site in sites]

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

    def running_as(self, flower_run: str) -> StudyRow | None:
        """Return the study that runs as this Flower run, None when none does."""
        with self.transaction() as session:
            query = select(StudyRow).where(
                StudyRow.flower_run == flower_run, StudyRow.state == State.RUNNING
            )
            return session.scalars(query).first()

    def set_study_state(
        self, digest: str, state: str, reason: str = "", *, who: str = AGGREGATOR
    ) -> None:
        """Move a study to ``state``, with why in ``reason``; its history says so for good.

        Raises
        ------
        ConsiliumError
            ``study.<state>`` where the state it is in does not permit it.
        """
        with self.transaction() as session:
            change(session, digest, State(state), reason, who=who)

    def history(self, digest: str) -> list[StudyEvent]:
        """Return every change of a study's state, oldest first."""
        with self.transaction() as session:
            query = select(StudyEvent).where(StudyEvent.digest == digest)
            return list(session.scalars(query.order_by(StudyEvent.id)))

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
            session.execute(insert_new(session, Alarm, values))

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
