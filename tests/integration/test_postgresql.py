"""The registry on a real PostgreSQL server: the same rules, and the same guards on evidence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import Federation, add_hospitals, small_study
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError, OperationalError

from consilium_common.demo.hospitals import NAMES
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority
from consilium_common.processes import free_port
from consilium_server.acts import Acts
from consilium_server.cosigning import Cosignature
from consilium_server.database import insert_new
from consilium_server.doctor.aggregator import ServerDoctor
from consilium_server.home import ServerHome
from consilium_server.members import initialise
from consilium_server.registry import Registry
from consilium_server.states import State, change
from consilium_server.tables import APPEND_ONLY, Member, StudyRow, now
from consilium_server.witness import WitnessKey

pytest.importorskip("psycopg", reason="the extra `postgresql` is not installed")


def _program(name: str) -> str | None:
    """Find a program of the server: Debian keeps them out of the way."""
    known = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return str(known[0]) if known else shutil.which(name)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Start a server of our own; returns the URL of its database."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL's server is not installed")
    # The server refuses to run as root, and cannot enter root's folders otherwise.
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    prefix = as_user if os.geteuid() == 0 else []
    folder = Path(subprocess.check_output([*prefix, "mktemp", "-d"], text=True).strip())
    port = free_port()
    environment = {**os.environ, "HOME": str(folder)}
    running = None
    try:
        subprocess.run(
            [*prefix, initdb, "-D", folder / "data", "-U", "consilium", "-A", "trust", "-N"],
            check=True,
            capture_output=True,
            env=environment,
            timeout=120,
        )
        running = subprocess.Popen(
            [*prefix, postgres, "-D", folder / "data", "-p", str(port), "-k", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        url = f"postgresql+psycopg://consilium:s3cret@127.0.0.1:{port}/postgres"
        _wait(url)
        yield url
    finally:
        if running is not None:
            running.send_signal(signal.SIGINT)  # without waiting for clients
            running.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(url: str) -> None:
    engine = create_engine(url)
    for _ in range(600):
        try:
            with engine.connect():
                return
        except OperationalError:
            threading.Event().wait(0.1)
    pytest.fail("PostgreSQL did not come up")


def _named(folder: Path, database: object) -> Path:
    (folder / "server.json").write_text(json.dumps({"database": database}))
    return folder / "registry.db"


@pytest.fixture
def database(server: str) -> Iterator[str]:
    """Return the URL of a database in which nothing is left afterwards."""
    yield server
    with create_engine(server).begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))


@pytest.fixture
def registry(database: str, tmp_path: Path) -> Registry:
    return Registry(_named(tmp_path, database))


def _study(registry: Registry) -> str:
    with registry.transaction() as session:
        session.add(
            StudyRow(
                digest="d" * 64,
                name="liver",
                canonical={"federation": {"quorum": 1}},
                proposed_by="ada",
                signature="",
                signer_pem="",
                proposed_at=now(),
            )
        )
    return "d" * 64


def test_no_file_is_made_beside_it_and_all_is_there_for_the_next_process(
    registry: Registry, tmp_path: Path
) -> None:
    digest = _study(registry)
    registry.set_study_state(digest, "approved", "north", who="ada")
    assert not (tmp_path / "registry.db").exists()
    again = Registry(tmp_path / "registry.db")
    assert [event.after for event in again.history(digest)] == ["approved"]
    assert again.study("dddd").state == "approved"
    assert again.study("liver").digest == digest


def test_what_bears_witness_cannot_be_changed_deleted_or_emptied(registry: Registry) -> None:
    registry.raise_alarm("north", "code", "message")
    registry.raise_alarm("north", "code", "message")
    assert len(registry.alarms()) == 1
    for table in APPEND_ONLY:
        for statement in (f"DELETE FROM {table}", f"TRUNCATE {table}"):
            with (
                pytest.raises(IntegrityError, match=f"{table} is append-only"),
                registry.transaction() as session,
            ):
                session.execute(text(statement))
    with (
        pytest.raises(IntegrityError, match="append-only"),
        registry.transaction() as session,
    ):
        session.execute(text("UPDATE alarms SET message = ''"))


def test_of_many_who_change_a_state_at_once_one_does_and_acts_never_fork(
    registry: Registry, tmp_path: Path
) -> None:
    digest = _study(registry)
    for state in ("approved", "queued"):
        registry.set_study_state(digest, state)
    acts = Acts(registry, WitnessKey.ensure(tmp_path, Authority.create("tests")))
    began: list[bool] = []

    def attempt(number: int) -> None:
        with registry.transaction() as session:
            began.append(change(session, digest, State.RUNNING, "", only_from={State.QUEUED}))
        acts.note(f"operator-{number}", "operator", "run", "liver")
        with registry.transaction() as session:
            values = {
                "digest": digest,
                "operator": "ada",
                "signature": str(number),
                "signer_pem": "",
                "signed_at": now(),
            }
            session.execute(insert_new(session, Cosignature, values))

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(began) == [False] * 5 + [True]
    with registry.transaction() as session:
        assert session.execute(text("SELECT max(sequence) FROM audit_log")).scalar() == 5
        assert session.query(Cosignature).count() == 1


def test_a_database_of_an_earlier_release_gets_what_it_lacks(
    registry: Registry, tmp_path: Path
) -> None:
    with registry.transaction() as session:
        session.execute(text("ALTER TABLE members DROP COLUMN studies_at_once"))
        session.execute(text("DROP TRIGGER alarms_grows ON alarms"))
    again = Registry(tmp_path / "registry.db")
    with again.transaction() as session:
        assert session.query(Member.studies_at_once).all() == []
    again.raise_alarm("north", "code", "message")
    with pytest.raises(IntegrityError), again.transaction() as session:
        session.execute(text("DELETE FROM alarms"))


def test_a_new_aggregator_keeps_everything_there_from_its_first_day(
    registry: Registry, server: str, tmp_path: Path
) -> None:
    home = ServerHome.create(tmp_path / "aggregator")
    initialise(home, "tests", f"localhost:{free_port()}", database=server)
    assert not home.database.exists()
    assert [member.name for member in registry.members()] == ["operator"]
    assert Registry(home.database).member("operator") is not None
    doctor = ServerDoctor(home)
    for check in doctor.checks():
        if check.name in ("configuration", "rights", "clock", "registry", "audit log", "members"):
            check.look()


@pytest.mark.long
def test_a_study_goes_on_when_its_aggregator_is_killed_and_its_registry_is_here(
    database: str, tmp_path: Path
) -> None:
    file, folder, (name, *_) = tmp_path / "database", tmp_path / "federation", NAMES
    file.write_text(database)
    folder.mkdir()
    with Federation(folder, "--database-file", file) as federation:
        add_hospitals(federation, [name])
        study = small_study(
            "kept-in-postgresql",
            training={"steps_per_round": 100},
            federation={"rounds": 2, "quorum": 1},
        )
        digest = federation.propose(study)
        federation.approve(digest, name)
        federation.study("run", digest).data  # noqa: B018
        before = federation.wait_until(digest, lambda data: bool(data["rounds"]), "a round")
        federation.kill()
        assert len(before["rounds"]) == 1, "it ended before the aggregator was killed"
        federation.start()
        after = federation.study("watch", digest).data
        assert after["state"] == "finished"
        assert [row["number"] for row in after["rounds"]] == [0, 1]
        assert after["rounds"][0] == before["rounds"][0]
        said = [row["why"] for row in federation.study("log", digest).data["history"]]
        assert any("the aggregator was started anew" in why for why in said), said
        assert not list(federation.home.glob("registry.db*"))


def test_a_database_that_is_not_there_is_one_clear_error_without_its_password(
    tmp_path: Path,
) -> None:
    away = f"postgresql+psycopg://consilium:s3cret@127.0.0.1:{free_port()}/postgres"
    with pytest.raises(ConsiliumError) as caught:
        Registry(_named(tmp_path, away))
    assert caught.value.code == "state.registry"
    assert "s3cret" not in f"{caught.value} {caught.value.where} {caught.value.hint}"
    for wrong in ("mysql://x/y", "registry", 17, "postgresql+nothing://x/y"):
        with pytest.raises(ConsiliumError, match="not the URL of a PostgreSQL"):
            Registry(_named(tmp_path, wrong))
