"""`consilium server doctor`: every cause is produced for real in a home that `init` made."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from diagnosis_samples import Port, alarms, cause_of, diagnosed, secrets_in
from test_site_doctor import sha256_of
from typer.testing import CliRunner

from consilium_common.cli import app as root
from consilium_common.diagnosis.steps import Outcome, Step
from consilium_common.errors import WARNINGS_ONLY
from consilium_common.identity.authority import certificate_pem
from consilium_common.identity.certificates import Role, load_certificate
from consilium_common.identity.keys import load_tls_key, new_tls_key
from consilium_common.identity.words import fingerprint_words
from consilium_common.processes import free_port
from consilium_server.acts import acts_of
from consilium_server.doctor.aggregator import ServerDoctor
from consilium_server.home import ServerHome
from consilium_server.members import initialise
from consilium_server.registry import Registry
from consilium_server.tables import APPEND_ONLY, now

#: Each relies on those before it.
ORDER = [
    *("configuration", "rights", "clock", "registry", "identity", "operator", "authority"),
    *("audit log", "members", "open files", "disk", "memory", "processes", "port", "TLS"),
    *("services", "version", "speed", "DNS", "outside"),
]


class House:
    """An aggregator's home, and its port when a test opens it."""

    def __init__(self, folder: Path) -> None:
        self.number = free_port()
        self.home = ServerHome.create(folder)
        self.authority = initialise(self.home, "tests", f"localhost:{self.number}")
        self.registry = Registry(self.home.database)
        self.port = Port(self.home.identity, self.authority, self.registry)

    def running(self) -> None:
        status = {"pid": os.getpid(), "address": f"0.0.0.0:{self.number}"}
        (self.home.run / "status.json").write_text(json.dumps(status))

    def doctor(self) -> ServerDoctor:
        return ServerDoctor(self.home)

    def cause(self) -> tuple[str, str]:
        return cause_of(self.doctor().checks())

    def call(self, *arguments: str, as_json: bool = False) -> tuple[int, str, str]:
        words = [*(["--json"] if as_json else []), "server", "doctor", *arguments]
        answer = CliRunner().invoke(root, [*words, "--home", str(self.home.path)])
        return answer.exit_code, answer.stdout, answer.stderr

    def own(self, name: str, role: Role, **named: timedelta) -> None:
        key = load_tls_key(self.home.identity / f"{name}-key.pem").public_key()
        holder = "aggregator" if role is Role.SERVER else name
        certificate = self.authority.issue(key, role, holder, **named)
        (self.home.identity / f"{name}.pem").write_bytes(certificate_pem(certificate))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "aggregator")


def test_a_new_aggregator_is_in_order_and_does_not_run_yet(house: House) -> None:
    status, out, _ = house.call()
    assert status in (0, WARNINGS_ONLY), out
    assert "✗" not in out and "does not run" in out
    assert fingerprint_words(house.authority.certificate) in out
    assert "server lock-authority" in " ".join(out.split())


def test_a_running_aggregator_answers_here_and_at_the_address_of_the_invitations(
    house: House,
) -> None:
    house.running()
    with house.port.open(house.number):
        found = diagnosed(house.doctor().checks())
        status, out, _ = house.call(as_json=True)
    assert found.cause is None, found.cause
    assert status in (0, WARNINGS_ONLY)
    said = json.loads(out)["data"]
    assert [step["name"] for step in said["steps"]] == [one.name for one in found.steps] == ORDER
    assert all(step["tried"] and step["happened"] for step in said["steps"])
    outcomes = {step.name: step.outcome for step in found.steps}
    for name in ("port", "TLS", "services", "version", "DNS", "outside"):
        assert outcomes[name] is Outcome.OK, found.step(name)
    assert str(os.getpid()) in found.step("port").happened


def test_its_looks_at_the_port_alarm_nobody_there(house: House) -> None:
    house.running()
    with alarms(house.port, house.number, house.home.database) as told:
        found = diagnosed(house.doctor().checks())
    assert (found.cause, told) == (None, [])
    for name in ("TLS", "outside"):
        assert found.step(name).outcome is Outcome.OK


def test_a_process_that_lives_and_does_not_listen_is_the_cause(house: House) -> None:
    house.running()
    assert house.cause() == ("port", "network.refused")


def test_a_port_that_another_program_holds_is_the_cause(house: House) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", house.number))
        other.listen()
        assert house.cause() == ("port", "state.port-in-use")
    assert house.call()[0] in (0, WARNINGS_ONLY)


def test_a_key_that_others_can_read_is_the_cause(house: House) -> None:
    for name in ("authority-key.pem", "operator-signing-key.pem", "witness-key.pem"):
        key = house.home.identity / name
        key.chmod(0o640)
        assert house.cause() == ("rights", "identity.key-exposed")
        key.chmod(0o600)


def test_a_home_open_to_others_is_a_warning(house: House) -> None:
    house.home.study_folder("0" * 64)  # and what the aggregator makes there never is
    assert diagnosed(house.doctor().checks()).step("rights").outcome is Outcome.OK
    house.home.path.chmod(0o755)
    found = diagnosed(house.doctor().checks()).step("rights")
    assert found.outcome is Outcome.WARNING and "chmod" in found.todo


def test_a_damaged_configuration_is_the_cause(house: House) -> None:
    house.home.config_file.write_text("{")
    assert house.cause() == ("configuration", "state.bad-config")
    assert house.call()[0] == 8
    status, out, _ = house.call(as_json=True)
    told = json.loads(out)
    assert (status, told["status"], told["error"]["code"]) == (8, "error", "state.bad-config")


def test_a_limit_that_makes_no_sense_is_the_cause(house: House) -> None:
    config = house.home.load_config()
    house.home.save_config(replace(config, limits={"calls": 0}))
    assert house.cause() == ("configuration", "usage.limits")


def test_an_expired_certificate_of_the_server_or_the_operator_is_the_cause(house: House) -> None:
    house.own("operator", Role.OPERATOR, lifetime=-timedelta(minutes=1))
    assert house.cause() == ("operator", "identity.expired")
    house.own("server", Role.SERVER, lifetime=-timedelta(minutes=1))
    assert house.cause() == ("identity", "identity.expired")


def test_a_server_certificate_in_the_operator_s_place_is_the_cause(house: House) -> None:
    house.own("server", Role.SITE)
    assert house.cause() == ("identity", "identity.wrong-role")


def test_a_damaged_registry_is_the_cause(house: House) -> None:
    with closing(sqlite3.connect(house.home.database)) as base:
        base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(house.home.database.read_bytes())
    content[4096:8192] = os.urandom(4096)
    house.home.database.write_bytes(content)
    assert house.cause() == ("registry", "state.registry")
    house.home.database.write_bytes(b"no database")
    assert house.cause() == ("registry", "state.registry")


def test_an_audit_log_that_was_changed_is_the_cause_and_missing_guards_are_seen(
    house: House,
) -> None:
    acts = acts_of(house.home)
    acts.note("operator", "operator", "invite", "north")
    acts.note("operator", "operator", "revoke", "north")
    found = diagnosed(house.doctor().checks())
    assert found.cause is None and found.step("audit log").facts["entries"] >= 2
    with closing(sqlite3.connect(house.home.database)) as base:
        for (name,) in base.execute(
            "SELECT name FROM sqlite_master WHERE type='trigger' AND tbl_name='audit_log'"
        ).fetchall():
            base.execute(f"DROP TRIGGER {name}")
        base.execute("UPDATE audit_log SET record = replace(record, 'north', 'south')")
        base.commit()
    found = diagnosed(house.doctor().checks())
    assert "audit_log" in APPEND_ONLY and "audit_log" in found.step("registry").happened
    assert found.cause is not None and found.cause.error is not None
    assert (found.cause.name, found.cause.error.code) == ("audit log", "privacy.log-broken")
    assert house.call()[0] == 6


def test_members_whose_certificates_end_and_an_authority_elsewhere_are_named(
    house: House,
) -> None:
    key = new_tls_key().public_key()
    ending = house.authority.issue(key, Role.SITE, "north", lifetime=timedelta(minutes=3))
    house.port.admit(certificate_pem(ending))
    (house.home.identity / "authority-key.pem").unlink()
    found = diagnosed(house.doctor().checks())
    assert found.step("members").facts["due"] == ["north"]
    assert found.step("members").outcome is Outcome.WARNING
    assert found.step("authority").facts["key"] == "offline"


def test_a_ticket_names_the_address_and_the_sites_and_holds_no_secret(
    house: House, tmp_path: Path
) -> None:
    key = new_tls_key().public_key()
    site = house.authority.issue(key, Role.SITE, "north")
    house.port.admit(certificate_pem(site), address="192.0.2.44")
    file = tmp_path / "ticket.txt"
    house.running()
    with house.port.open(house.number):
        status, out, err = house.call("--ticket", str(file))
    text = file.read_text()
    server = (house.home.identity / "server.pem").read_bytes()
    for one in (house.authority.certificate, load_certificate(server)):
        assert sha256_of(one) in text
    assert status == 0 and str(file) in out, err
    for needed in (
        *(f"localhost:{house.number}", f"TCP {house.number}", "north 192.0.2.44", "incoming only"),
        *("layer 4", "30 s", "TLS 1.3", fingerprint_words(house.authority.certificate)),
    ):
        assert needed in " ".join(text.split()), needed
    assert secrets_in(text, house.home.identity) == [] and "PRIVATE" not in text
    assert house.call("--ticket")[1].startswith("Subject: ")


def test_processes_that_end_again_and_again_are_a_warning(house: House) -> None:
    def step() -> Step:
        return diagnosed(house.doctor().checks()).step("processes")

    assert step().outcome is Outcome.OK
    journal = house.home.run / "supervisor.json"
    said = {"at": now(), "what": "superlink ended with status 1; starting it again in 0.3 s"}
    left = {"at": now(), "what": "ended executor, process 7, which was left from before"}
    journal.write_text(json.dumps([left, said, said]))
    found = step()
    assert found.outcome is Outcome.OK
    assert "2 restarts in the last hour; 1 orphan" in found.happened
    journal.write_text(json.dumps([said] * 3))
    found = step()
    assert found.outcome is Outcome.WARNING and "logs" in found.todo
    journal.write_text(json.dumps([{**said, "at": "2020-01-01T00:00:00+00:00"}] * 9))
    assert step().outcome is Outcome.OK
