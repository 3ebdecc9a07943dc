"""The aggregator's records: found unambiguously, changed at once or not at all."""

from __future__ import annotations

import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from site_samples import plain_study, private_study
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from state_samples import put

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_server.registry import Registry
from consilium_server.tables import (
    APPEND_ONLY,
    ONLINE_SECONDS,
    ActRow,
    Alarm,
    Approval,
    InvitationRow,
    Member,
    Received,
    Round,
    StudyEvent,
    StudyRow,
    Witnessed,
    now,
    seconds_since,
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry.db")


def add_study(registry: Registry, study: Study) -> str:
    with registry.transaction() as session:
        session.add(
            StudyRow(
                digest=study.digest,
                name=study.name,
                canonical=study.to_canonical(),
                proposed_by="operator",
                signature="",
                signer_pem="",
                proposed_at=now(),
            )
        )
    return study.digest


def member(name: str = "north", **changes: object) -> Member:
    values = {
        "name": name,
        "role": "site",
        "status": "active",
        "serial": "1",
        "certificate_pem": "",
        "signer_pem": "",
        "node_id": None,
        "joined_at": now(),
        "last_seen": None,
    }
    return Member(**{**values, **changes})


def code_of(call: object, *arguments: object) -> str:
    assert callable(call)
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments)
    return caught.value.code


def test_it_is_for_its_owner_alone_and_keeps_what_it_was_told(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    digest = add_study(Registry(path), plain_study())
    assert path.stat().st_mode & 0o077 == 0
    found = Registry(path).study(digest)
    assert found.study == plain_study()
    assert found.state == "proposed"


def test_a_file_that_is_no_registry_is_an_error_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"this is a letter, and not a database\n" * 50)
    content = path.read_bytes()
    assert code_of(Registry, path) == "state.registry"
    assert path.read_bytes() == content


def test_a_study_is_found_by_digest_its_beginning_or_its_name(registry: Registry) -> None:
    first, second = add_study(registry, plain_study()), add_study(registry, private_study())
    assert first != second
    assert registry.study(first).digest == first
    assert registry.study(second[:12]).digest == second
    assert code_of(registry.study, "tiny") == "study.ambiguous"
    assert code_of(registry.study, "elsewhere") == "study.unknown"
    assert code_of(registry.study, "") == "study.unknown"
    assert [row.digest for row in registry.studies()] == [first, second]


def test_a_name_wins_over_the_beginning_of_another_study_s_digest(registry: Registry) -> None:
    first = add_study(registry, plain_study())
    named = Study.model_validate({**private_study().to_canonical(), "name": first[:8]})
    second = add_study(registry, named)
    assert registry.study(first[:8]).digest == second
    assert registry.study(first).digest == first
    assert registry.study(first[:9]).digest == first
    # What stands for anything in a query's pattern stands for nothing here.
    assert code_of(registry.study, "%") == "study.unknown"
    assert code_of(registry.study, "_" * 64) == "study.unknown"


def test_running_studies_are_named_without_the_others(registry: Registry) -> None:
    first, second = add_study(registry, plain_study()), add_study(registry, private_study())
    assert registry.running() == []
    for digest in (first, second):
        put(registry, digest, "running")
    assert registry.running() == [first, second]
    put(registry, first, "stopped")
    assert registry.running() == [second]


def received(**changes: object) -> Received:
    values = {
        "study": "s" * 64,
        "site": "north",
        "purpose": "training",
        "round": 0,
        "sha256": "a" * 64,
        "bytes": 3,
        "time": now(),
    }
    return Received(**{**values, **changes})


def test_what_was_received_is_noted_once_and_another_answer_is_told(registry: Registry) -> None:
    assert registry.note_received(received()) is False
    assert registry.note_received(received()) is False
    assert registry.note_received(received(purpose="evaluation", sha256="b" * 64)) is False
    assert registry.note_received(received(round=1, sha256="b" * 64)) is False
    assert registry.note_received(received(site="south", sha256="b" * 64)) is False
    assert registry.note_received(received(sha256="b" * 64)) is True
    found = [(r.purpose, r.round, r.sha256[0]) for r in registry.received("north")]
    assert found == [
        ("training", 0, "a"),
        ("evaluation", 0, "b"),
        ("training", 1, "b"),
        ("training", 0, "b"),
    ]


def test_an_alarm_is_kept_once_however_often_it_is_raised(registry: Registry) -> None:
    for _ in range(3):
        registry.raise_alarm("north", "privacy.witness-conflict", "history was rewritten")
    registry.raise_alarm("south", "privacy.witness-conflict", "history was rewritten")
    assert [alarm.site for alarm in registry.alarms()] == ["north", "south"]


@pytest.mark.parametrize("table", APPEND_ONLY)
def test_what_bears_witness_cannot_be_changed_or_deleted(registry: Registry, table: str) -> None:
    rows = {
        "witnessed": Witnessed(site="n", ledger="k", sequence=0, hash="h", record={}),
        "received": received(site="n"),
        "alarms": Alarm(site="n", code="c", message="m", at=now()),
        "audit_log": ActRow(sequence=0, record={}),
        "study_history": StudyEvent(
            digest="d", before="", after="draft", who="ada", why="", at=now()
        ),
    }
    with registry.transaction() as session:
        session.add(rows[table])
    for statement in (f"UPDATE {table} SET rowid = rowid", f"DELETE FROM {table}"):
        with (
            pytest.raises(IntegrityError, match="append-only"),
            registry.transaction() as session,
        ):
            session.execute(text(statement))
    with registry.transaction() as session:
        assert session.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 1


def test_a_registry_of_an_earlier_release_gets_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with sqlite3.connect(path) as old:
        old.execute(
            "CREATE TABLE approvals (digest VARCHAR(64) NOT NULL, site VARCHAR NOT NULL,"
            " decision VARCHAR NOT NULL, why VARCHAR NOT NULL, cohort_size INTEGER NOT NULL,"
            " signature VARCHAR NOT NULL, decided_at VARCHAR NOT NULL, PRIMARY KEY (digest, site))"
        )
        old.execute("INSERT INTO approvals VALUES ('d', 'north', 'approved', '', 20, 's', 't')")
    old.close()
    for _ in range(2):
        registry = Registry(path)
        (found,) = registry.approvals("d")
        assert (found.cohort_size, found.evaluation_size) == (20, 0)
    with registry.transaction() as session:
        session.add(
            Approval(
                digest="d",
                site="south",
                decision="approved",
                why="",
                cohort_size=5,
                evaluation_size=4,
                signature="",
                decided_at=now(),
            )
        )
    assert [a.evaluation_size for a in registry.approvals("d")] == [0, 4]
    assert registry.alarms() == []


def test_a_transaction_that_fails_changes_nothing(registry: Registry) -> None:
    digest = add_study(registry, plain_study())

    def interrupted() -> None:
        with registry.transaction() as session:
            session.get_one(StudyRow, digest).state = "finished"
            session.add(member())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        interrupted()
    assert registry.study(digest).state == "proposed"
    assert registry.member("north") is None
    with pytest.raises(IntegrityError), registry.transaction() as session:
        session.add_all([member(), Round(digest=digest, number=None)])
    assert registry.member("north") is None


def test_of_many_that_use_an_invitation_at_once_one_succeeds(registry: Registry) -> None:
    with registry.transaction() as session:
        session.add(InvitationRow(serial="s", name="north", role="site", expires=now()))
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def attempt() -> None:
        start.wait(timeout=10)
        try:
            registry.spend_invitation("s")
            outcomes.append("ok")
        except ConsiliumError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["identity.invitation-used"] * 7 + ["ok"]
    registry.restore_invitation("s")
    registry.spend_invitation("s")
    assert code_of(registry.spend_invitation, "unheard-of") == "identity.invitation-used"


def test_a_member_is_online_while_it_was_heard_of_and_is_not_revoked() -> None:
    def ago(seconds: float) -> str:
        return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()

    assert member(last_seen=ago(1)).online
    assert not member(last_seen=ago(ONLINE_SECONDS + 1)).online
    assert not member(last_seen=None).online
    assert not member(last_seen=ago(1), status="revoked").online
    assert seconds_since(None) == float("inf")


def test_a_running_study_is_found_by_its_flower_run_and_an_ended_one_is_not(
    registry: Registry,
) -> None:
    digest = add_study(registry, plain_study())
    with registry.transaction() as session:
        session.get_one(StudyRow, digest).flower_run = "17"
    assert registry.running_as("17") is None
    with registry.transaction() as session:
        session.get_one(StudyRow, digest).state = "running"
    found = registry.running_as("17")
    assert found is not None
    assert found.digest == digest


def test_rounds_come_in_order_and_one_that_is_recorded_again_replaces_itself(
    registry: Registry,
) -> None:
    digest = add_study(registry, plain_study())
    for number, seconds in ((1, 1.0), (0, 2.0), (1, 3.0)):
        with registry.transaction() as session:
            session.merge(
                Round(digest=digest, number=number, seconds=seconds, sites=["a"], dropped={})
            )
    assert [(r.number, r.seconds) for r in registry.rounds(digest)] == [(0, 2.0), (1, 3.0)]
