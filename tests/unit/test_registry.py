"""The aggregator's records: found unambiguously, changed at once or not at all."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from site_samples import plain_study, private_study
from sqlalchemy.exc import IntegrityError

from consilium_common.errors import ConsiliumError
from consilium_common.study import Study
from consilium_server.registry import (
    ONLINE_SECONDS,
    InvitationRow,
    Member,
    Registry,
    Round,
    StudyRow,
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


def test_a_study_that_was_stopped_does_not_become_failed(registry: Registry) -> None:
    digest = add_study(registry, plain_study())
    registry.set_study_state(digest, "running", "started by operator")
    assert registry.study(digest).started_at is not None
    registry.set_study_state(digest, "stopped", "stopped by operator")
    registry.fail_running(digest, "its process was killed")
    found = registry.study(digest)
    assert (found.state, found.reason) == ("stopped", "stopped by operator")
    assert found.ended_at is not None
    registry.set_study_state(digest, "running")
    assert registry.study(digest).ended_at is None
    registry.fail_running(digest, "it broke")
    assert registry.study(digest).state == "failed"


def test_a_running_study_is_found_by_its_flower_run_and_an_ended_one_is_not(
    registry: Registry,
) -> None:
    digest = add_study(registry, plain_study())
    with registry.transaction() as session:
        session.get_one(StudyRow, digest).flower_run = "17"
    assert registry.running_as("17") is None
    registry.set_study_state(digest, "running")
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
