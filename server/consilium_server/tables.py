"""The tables of the aggregator's registry, and which of them can only grow (SQLAlchemy)."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy import JSON, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from consilium_common.study import Study

#: A site whose link has been silent this long counts as offline.
ONLINE_SECONDS = 12.0


class Base(DeclarativeBase):
    """All tables of the registry."""


class Member(Base):
    """A site, operator or auditor that has a certificate."""

    __tablename__ = "members"
    name: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    status: Mapped[str]  #: active or revoked
    serial: Mapped[str]  #: of the certificate in force, hexadecimal
    certificate_pem: Mapped[str]
    #: Certificate of the Ed25519 key that signs approvals, ledger and studies; empty for auditors.
    signer_pem: Mapped[str]
    node_id: Mapped[str | None]  #: Flower's node id, decimal
    joined_at: Mapped[str]
    last_seen: Mapped[str | None] = mapped_column(default=None)
    #: When it was heard of last, by a clock that nobody sets: see :func:`heard_now`.
    heard: Mapped[str | None] = mapped_column(default=None)
    session: Mapped[str | None] = mapped_column(default=None)  #: changes when the site restarts
    version: Mapped[str | None] = mapped_column(default=None)
    address: Mapped[str | None] = mapped_column(default=None)  #: it called from, without the port
    #: SHA-256 of the trust bundle that the member says it holds.
    trust: Mapped[str | None] = mapped_column(default=None)
    #: Studies that it takes part in at a time, as it says; None: as many as there are.
    studies_at_once: Mapped[int | None] = mapped_column(default=None)
    #: A renewed certificate, until it is used for the first time; then it is the one in force.
    next_serial: Mapped[str | None] = mapped_column(default=None)
    next_certificate_pem: Mapped[str | None] = mapped_column(default=None)
    next_signer_pem: Mapped[str | None] = mapped_column(default=None)

    @property
    def online(self) -> bool:
        """Whether the member may connect and was heard of a moment ago."""
        return self.status == "active" and _seconds_since_heard(self) < ONLINE_SECONDS


class InvitationRow(Base):
    """An invitation: it may be used once, before it expires."""

    __tablename__ = "invitations"
    serial: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    role: Mapped[str]
    expires: Mapped[str]
    used_at: Mapped[str | None] = mapped_column(default=None)
    #: Fingerprint of the one key it serves, while that waits for the offline authority.
    key: Mapped[str | None] = mapped_column(default=None)


class StudyRow(Base):
    """A proposed study and where it stands."""

    __tablename__ = "studies"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    canonical: Mapped[dict[str, Any]] = mapped_column(JSON)
    proposed_by: Mapped[str]
    signature: Mapped[str]
    signer_pem: Mapped[str]
    proposed_at: Mapped[str]
    #: Names of the sites it is proposed to; None: to all.
    sites: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True), default=None)
    #: One of `consilium_server.states.State`.
    state: Mapped[str] = mapped_column(default="proposed")
    reason: Mapped[str] = mapped_column(default="")
    #: The Flower run that does its rounds; None while it runs and none was started yet.
    flower_run: Mapped[str | None] = mapped_column(default=None)
    started_at: Mapped[str | None] = mapped_column(default=None)
    ended_at: Mapped[str | None] = mapped_column(default=None)
    #: Of queued studies the highest comes first, then the one that has waited longest.
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    queued_at: Mapped[str | None] = mapped_column(default=None)
    #: Flower runs that died one after the other without a finished round, ...
    failures: Mapped[int] = mapped_column(default=0, server_default="0")
    #: ... the rounds that were done at the last of them, ...
    failed_after: Mapped[int] = mapped_column(default=0, server_default="0")
    #: ... and when the next is started.
    not_before: Mapped[str | None] = mapped_column(default=None)
    #: The operator who wants it paused after the round under way.
    pause_by: Mapped[str | None] = mapped_column(default=None)
    #: What a paused study waits for to go on by itself: ``disk``; empty: for a person.
    goes_on_with: Mapped[str] = mapped_column(default="", server_default="")

    def proposed_to(self, site: str) -> bool:
        """Whether a site is to see it."""
        return self.state != "draft" and (self.sites is None or site in self.sites)

    @property
    def study(self) -> Study:
        """The study itself."""
        return Study.model_validate(self.canonical)


class Approval(Base):
    """A site's signed decision about a study."""

    __tablename__ = "approvals"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    decision: Mapped[str]  #: approved or declined
    why: Mapped[str]
    cohort_size: Mapped[int]  #: patients trained on; public, declared by the site
    #: Patients evaluated on; public, declared by the site.
    evaluation_size: Mapped[int] = mapped_column(default=0, server_default="0")
    signature: Mapped[str]
    decided_at: Mapped[str]


class Round(Base):
    """One finished round."""

    __tablename__ = "rounds"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    seconds: Mapped[float]
    sites: Mapped[list[str]] = mapped_column(JSON)  #: whose update was added
    dropped: Mapped[dict[str, str]] = mapped_column(JSON)  #: site to reason
    loss: Mapped[float | None] = mapped_column(default=None)
    #: Unused; registries of earlier releases have the column.
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    ended_at: Mapped[str] = mapped_column(default="")
    #: ``Checkpoint.history`` after it; empty: of an earlier release.
    history: Mapped[str] = mapped_column(default="", server_default="")


class EvaluationRow(Base):
    """One evaluation of the global model at the sites, by the rounds done before it."""

    __tablename__ = "evaluations"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    rounds_done: Mapped[int] = mapped_column(primary_key=True)  #: 0: the starting model
    sites: Mapped[list[str]] = mapped_column(JSON)  #: who evaluated
    dropped: Mapped[dict[str, str]] = mapped_column(JSON)  #: site to reason
    #: What sites released, by site; empty where all figures stay there.
    figures: Mapped[dict[str, dict[str, float]]] = mapped_column(JSON)
    #: Patients evaluated on, by site, as declared when it was asked.
    declared: Mapped[dict[str, int]] = mapped_column(JSON)
    #: Standard deviation of the noise on one site's sum; None for exact figures.
    noise: Mapped[float | None] = mapped_column(default=None)
    seconds: Mapped[float] = mapped_column(default=0.0)
    ended_at: Mapped[str] = mapped_column(default="")


class StatisticsRow(Base):
    """A study's federated statistics: asked for once, before the first round."""

    __tablename__ = "statistics"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    dropped: Mapped[dict[str, str]] = mapped_column(JSON)  #: site to reason
    #: Noised sums by site: ``<table>.<bin>`` to number.
    figures: Mapped[dict[str, dict[str, float]]] = mapped_column(JSON)
    #: Patients counted, by site, as declared when it was asked.
    declared: Mapped[dict[str, int]] = mapped_column(JSON)
    #: Standard deviation of the noise on each of a site's numbers.
    noise: Mapped[float]
    ended_at: Mapped[str] = mapped_column(default="")


class StudyEvent(Base):
    """One change of a study's state: from what to what, by whom, why and when."""

    __tablename__ = "study_history"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    before: Mapped[str]  #: empty for the first
    after: Mapped[str]
    who: Mapped[str]  #: an operator, or ``aggregator``
    why: Mapped[str]
    at: Mapped[str]


class Progress(Base):
    """What a site said last about the running round of a study; public facts alone."""

    __tablename__ = "study_progress"
    site: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    phase: Mapped[str]
    round: Mapped[int]
    step: Mapped[int]
    steps: Mapped[int]
    at: Mapped[str]


class Witnessed(Base):
    """One entry of a site's ledger that was countersigned here."""

    __tablename__ = "witnessed"
    __table_args__ = (UniqueConstraint("site", "ledger", "sequence"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str]
    ledger: Mapped[str]  #: fingerprint of the ledger's key: a site that joins anew has another
    sequence: Mapped[int]
    hash: Mapped[str]
    record: Mapped[dict[str, Any]] = mapped_column(JSON)  #: statement and signature


class Received(Base):
    """What a site sent and the aggregator used."""

    __tablename__ = "received"
    __table_args__ = (UniqueConstraint("study", "site", "purpose", "round", "sha256"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study: Mapped[str]
    site: Mapped[str]
    purpose: Mapped[str]  #: training, evaluation or statistics
    round: Mapped[int]  #: for an evaluation the number of rounds done, for statistics 0
    sha256: Mapped[str]
    bytes: Mapped[int]
    time: Mapped[str]


class Alarm(Base):
    """Something about a site that a person must look at; said once, kept for good."""

    __tablename__ = "alarms"
    __table_args__ = (UniqueConstraint("site", "code", "message"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str]
    code: Mapped[str]
    message: Mapped[str]
    at: Mapped[str]


class ActRow(Base):
    """One privileged act, in the aggregator's audit log."""

    __tablename__ = "audit_log"
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    record: Mapped[dict[str, Any]] = mapped_column(JSON)  #: the whole signed entry


#: Tables whose rows bear witness: the database itself refuses to change or delete one.
APPEND_ONLY: Final = (
    Witnessed.__tablename__,
    Received.__tablename__,
    Alarm.__tablename__,
    ActRow.__tablename__,
    StudyEvent.__tablename__,
)


def now() -> str:
    """Return the time as ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds_since(moment: str | None) -> float:
    """Return the seconds since an ISO time of :func:`now`; infinity for None."""
    if moment is None:
        return float("inf")
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def heard_now() -> str:
    """Return the moment by this machine's own clock, which jumps with nobody's correction."""
    return f"{_boot()} {time.clock_gettime(time.CLOCK_BOOTTIME):.3f}"


def _seconds_since_heard(member: Member) -> float:
    if member.heard is None:
        return seconds_since(member.last_seen)
    boot, _, moment = member.heard.partition(" ")
    if boot != _boot():
        return float("inf")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - float(moment)


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
