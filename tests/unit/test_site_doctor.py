"""`consilium site doctor` against a real port: every cause is found as the cause, and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from diagnosis_samples import Port, alarms, cause_of, connect_proxy, diagnosed, secrets_in, shifted
from site_samples import NAME, JoinedSite, joined_site, member_credentials
from typer.testing import CliRunner

from consilium_client.budget.policy import write_default_policy
from consilium_client.doctor.site import SiteDoctor, Way
from consilium_client.home import SiteHome
from consilium_client.refusals import Refusals
from consilium_common.cli import app as root
from consilium_common.diagnosis.steps import Outcome
from consilium_common.diagnosis.tls import try_tls
from consilium_common.errors import WARNINGS_ONLY, ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.identity.invitation import Invitation, write_invitation
from consilium_common.identity.words import fingerprint_words
from consilium_common.processes import free_port
from consilium_server.registry import Registry
from consilium_server.tables import Member

#: The issue's order.
ORDER = [
    *("configuration", "rights", "clock", "DNS", "TCP", "proxy", "TLS", "identity", "revocation"),
    *(
        "version",
        "clock skew",
        "speed",
        "egress",
        "disk",
        "memory",
        "GPU",
        "cache",
        "data",
        "budget",
    ),
]


class House:
    """A site that has joined, and the port of its aggregator."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.create("tests")
        server = folder / "server"
        server.mkdir()
        self.port = Port(server, self.authority, Registry(server / "registry.db"))
        self.port.certify()
        self.number = free_port()
        self.address = f"127.0.0.1:{self.number}"
        self.site: JoinedSite = joined_site(
            folder / "site", address=self.address, authority=self.authority
        )
        self.home = self.site.home
        self.configure(device="cpu")
        write_default_policy(self.home)
        self.port.admit(certificate_pem(self.site.identity.certificate))

    def configure(self, **changes: Any) -> None:
        content = json.loads(self.home.config.read_text()) | changes
        self.home.config.write_text(json.dumps(content))

    def cause(self) -> tuple[str, str]:
        return cause_of(SiteDoctor(self.home).checks())

    def cause_with_port(self) -> tuple[str, str]:
        with self.port.open(self.number):
            return self.cause()

    def replace_certificate(self, role: Role = Role.SITE, **named: Any) -> None:
        certificate = self.authority.issue(self.site.key.public_key(), role, NAME, **named)
        (self.home.identity / "site.pem").write_bytes(certificate_pem(certificate))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    return House(tmp_path)  # type: ignore[return-value]


def sha256_of(certificate: x509.Certificate) -> str:
    """Return a certificate's fingerprint as browsers and firewalls show it."""
    digest = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest().upper()
    return ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))


def call(home: SiteHome, *arguments: str, as_json: bool = False) -> tuple[int, str, str]:
    mode = ["--json"] if as_json else []
    answer = CliRunner().invoke(
        root, [*mode, "site", "doctor", *arguments, "--home", str(home.path)]
    )
    return answer.exit_code, answer.stdout, answer.stderr


# --- when all is well --------------------------------------------------------------------------


def test_a_site_in_order_passes_every_step_in_the_order_of_the_first_hour(house: House) -> None:
    with house.port.open(house.number):
        status, out, _ = call(house.home)
        machine = call(house.home, as_json=True)
    assert status in (0, WARNINGS_ONLY), out  # a busy machine may be short of memory
    assert "✗" not in out and f"site {NAME}" in out
    assert fingerprint_words(house.site.identity.certificate) in out
    data = json.loads(machine[1])["data"]
    assert [step["name"] for step in data["steps"]] == ORDER
    assert all(step["tried"] and step["happened"] for step in data["steps"])
    speed = next(step["facts"] for step in data["steps"] if step["name"] == "speed")
    assert speed["up"] > 0 and speed["down"] > 0 and speed["round_trip_seconds"] > 0


def test_a_site_behind_a_proxy_goes_through_it_in_every_step(house: House) -> None:
    with house.port.open(house.number), connect_proxy() as (proxy, heads):
        house.configure(proxy=f"http://{proxy}")
        found = diagnosed(SiteDoctor(house.home).checks())
    assert found.cause is None
    assert proxy in found.step("proxy").happened
    # The proxy's own step, the handshake, and the calls of all later steps over one channel.
    assert len(heads) >= 3 and all(head.startswith(f"CONNECT {house.address}") for head in heads)


# --- causes ------------------------------------------------------------------------------------


def test_a_closed_port_is_the_cause_and_nothing_is_tried_after_it(house: House) -> None:
    status, out, err = call(house.home)
    assert status == 7 and "network.refused" in err and "✗ TCP" in out
    assert "Not tried: proxy, TLS" in err and "TLS:" not in out
    status, out, _ = call(house.home, as_json=True)
    error = json.loads(out)["error"]
    assert (status, error["code"]) == (7, "network.refused")
    assert [step["outcome"] for step in error["steps"]].count("failed") == 1


def test_a_damaged_configuration_is_the_cause(house: House) -> None:
    house.configure(address="nowhere")
    assert house.cause() == ("configuration", "state.bad-config")
    house.home.config.write_text("{")
    assert house.cause() == ("configuration", "state.bad-config")


def test_a_key_that_others_can_read_is_the_cause(house: House) -> None:
    (house.home.identity / "site-key.pem").chmod(0o644)
    assert house.cause() == ("rights", "identity.key-exposed")
    assert call(house.home)[0] == 5
    assert call(house.home, "--fix")[0] == 7  # mended; now the closed port is the cause


def test_a_certificate_from_the_future_means_that_the_clock_is_wrong(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        shifted(patch, timedelta(hours=3))
        house.replace_certificate()
    assert house.cause() == ("clock", "network.clock")


def test_an_aggregator_of_another_consortium_is_the_cause(house: House, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = Port(folder, Authority.create("other"), Registry(folder / "registry.db"))
    other.certify()
    with other.open(house.number):
        assert house.cause() == ("TLS", "identity.wrong-aggregator")


def test_an_expired_certificate_is_the_cause_and_joining_again_is_what_to_do(house: House) -> None:
    house.replace_certificate(lifetime=-timedelta(minutes=1))
    with house.port.open(house.number):
        found = diagnosed(SiteDoctor(house.home).checks())
    assert found.cause is not None and found.cause.error is not None
    assert (found.cause.name, found.cause.error.code) == ("identity", "identity.expired")
    assert "--again" in found.cause.todo


def test_the_certificate_of_another_role_is_the_cause(house: House) -> None:
    house.replace_certificate(Role.OPERATOR)
    assert house.cause_with_port() == ("identity", "identity.wrong-role")


def test_a_key_of_another_certificate_is_the_cause(house: House) -> None:
    other = member_credentials(house.authority, Role.SITE, NAME)
    (house.home.identity / "site.pem").write_bytes(other.certificate)
    assert house.cause_with_port() == ("identity", "identity.bad-key")


def test_a_revoked_or_replaced_certificate_is_the_cause(house: House) -> None:
    with house.port.registry.transaction() as session:
        session.get_one(Member, NAME).status = "revoked"
    with house.port.open(house.number):
        found = diagnosed(SiteDoctor(house.home).checks())
    assert found.cause is not None and found.cause.error is not None
    assert (found.cause.name, found.cause.error.code) == ("revocation", "identity.refused")
    assert "revoked or replaced" in found.cause.happened


def test_another_protocol_is_the_cause_and_another_release_a_warning(house: House) -> None:
    house.port.says = {"protocol": 99, "version": "9.9.9"}
    assert house.cause_with_port() == ("version", "network.version")
    house.port.says = {"version": "9.9.9"}
    with house.port.open(house.number):
        found = diagnosed(SiteDoctor(house.home).checks())
    assert found.cause is None and "9.9.9" in found.step("version").happened and found.warned


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_hours_from_the_aggregator_s_is_the_cause(house: House, hours: int) -> None:
    house.port.says = {"time": (datetime.now(UTC) + timedelta(hours=hours)).isoformat()}
    assert house.cause_with_port() == ("clock skew", "network.clock")


def test_a_line_that_changes_what_it_carries_is_the_cause(house: House) -> None:
    house.port.says = {"sha256": "0" * 64}
    assert house.cause_with_port() == ("speed", "network.changed")


def test_a_missing_policy_and_a_ledger_that_was_rolled_back_are_the_cause(house: House) -> None:
    house.home.ledger.with_suffix(".conflict").write_text("{}")
    assert house.cause_with_port() == ("budget", "privacy.ledger-rolled-back")
    house.home.policy.unlink()
    assert house.cause_with_port() == ("budget", "privacy.no-policy")


# --- before joining, and the ticket ------------------------------------------------------------


def invited(house: House, folder: Path) -> Path:
    credentials = member_credentials(house.authority, Role.INVITATION, "south")
    file = folder / "invitation.json"
    write_invitation(
        file,
        Invitation(
            consortium="tests",
            address=house.address,
            name="south",
            role=Role.SITE,
            expires=datetime.now(UTC) + timedelta(hours=1),
            authority_pem=credentials.authority.decode(),
            certificate_pem=credentials.certificate.decode(),
            private_key_pem=credentials.key.decode(),
        ),
    )
    return file


def test_the_way_is_looked_at_before_joining_and_the_invitation_stays_unused(
    house: House, tmp_path: Path
) -> None:
    file = invited(house, tmp_path)
    fresh = SiteHome(tmp_path / "fresh")  # joining has not made it yet
    assert call(fresh, "--invitation", str(file))[0] == 7
    with house.port.open(house.number):  # whose Enrol fails this test if it is called
        found = diagnosed(SiteDoctor(fresh, invitation=file).network_checks())
    assert found.cause is None and found.step("TLS").facts["words"]
    assert [step.name for step in found.steps] == ORDER[:7]


def test_the_way_before_joining_leads_through_the_proxy_that_joining_would_take(
    house: House, tmp_path: Path
) -> None:
    file, login = invited(house, tmp_path), tmp_path / "login"
    login.write_text("me:hush\n")
    login.chmod(0o600)
    fresh = SiteHome.create(tmp_path / "fresh")
    with house.port.open(house.number), connect_proxy() as (proxy, heads):
        url = f"http://{proxy}"
        way = Way(url, login)
        found = diagnosed(SiteDoctor(fresh, invitation=file, way=way).network_checks())
        status, out, _ = call(
            fresh,
            "--ticket",
            "--invitation",
            str(file),
            "--proxy",
            url,
            "--proxy-login",
            str(login),
        )
    assert found.cause is None and proxy in found.step("proxy").happened
    assert f"{file} --proxy {url} --proxy-login {login}" in found.step("configuration").todo
    assert len(heads) >= 4 and all(head.startswith(f"CONNECT {house.address}") for head in heads)
    assert all("Proxy-Authorization: Basic" in head for head in heads)
    assert status == 0 and proxy in out and "hush" not in out
    server = load_certificate((house.port.folder / "server.pem").read_bytes())
    for one in (house.authority.certificate, server):
        assert sha256_of(one) in out
    for options, code in (
        (("--proxy", "https://proxy.example:3128"), "usage.proxy"),
        (("--proxy", url, "--proxy-login", str(tmp_path / "none")), "identity.bad-login"),
    ):
        assert code in call(fresh, "--invitation", str(file), *options)[2]
    for arguments in ((), ("--invitation", str(file))):  # joined, it has its own setting
        status, _, err = call(house.home, *arguments, "--proxy", url)
        assert status == 2 and "usage.proxy" in err and "site.json" in err


def test_what_the_link_refused_is_counted_and_the_last_is_named(house: House) -> None:
    with house.port.open(house.number):
        calm = diagnosed(SiteDoctor(house.home).checks()).step("egress")
        refusals = Refusals(house.home.refused)
        for number in (1, 2):
            error = ConsiliumError("privacy.egress", f"reply {number} is not of its round")
            refusals.note("PushMessages", error)
        noted = diagnosed(SiteDoctor(house.home).checks()).step("egress")
        house.home.refused.write_text("{")
        damaged = diagnosed(SiteDoctor(house.home).checks()).step("egress")
    assert (calm.outcome, calm.facts["refused"]) == (Outcome.OK, 0)
    assert noted.outcome is Outcome.WARNING
    assert (noted.facts["refused"], noted.facts["code"]) == (2, "privacy.egress")
    assert "refused 2 since" in noted.happened and "reply 2 is not of its round" in noted.happened
    assert f"{datetime.now(UTC):%Y-%m-%d}" in noted.happened and "site egress" in noted.todo
    assert damaged.outcome is Outcome.WARNING and "cannot be read" in damaged.happened


def test_the_doctor_s_looks_at_the_port_alarm_nobody_there(house: House, tmp_path: Path) -> None:
    fresh = SiteHome.create(tmp_path / "fresh")
    database = house.port.folder / "registry.db"
    with alarms(house.port, house.number, database, strangers=1) as told:
        assert diagnosed(SiteDoctor(house.home).checks()).cause is None
        looked = SiteDoctor(fresh, invitation=invited(house, tmp_path))
        assert diagnosed(looked.network_checks()).cause is None and looked.target is not None
        assert "PRIVATE" not in repr(looked.target)
        try_tls(replace(looked.target, credentials=None))  # a stranger's look is seen
    assert told == ["identity.no-certificate"]


def test_a_ticket_names_addresses_and_results_and_holds_no_secret(
    house: House, tmp_path: Path
) -> None:
    login = house.home.identity / "proxy-login"
    login.write_text("someone:a-password-of-theirs\n")
    login.chmod(0o600)
    file = tmp_path / "ticket.txt"
    with connect_proxy("403 no") as (proxy, _):
        house.configure(proxy=f"http://{proxy}")
        status, out, err = call(house.home, "--ticket", str(file))
    text = file.read_text()
    assert status == 0 and str(file) in out, err
    assert text.startswith("Subject: ")
    for needed in (
        *(house.address, f"TCP {house.number}", proxy, "outgoing only", "TLS 1.3", "HTTP/2"),
        *("30 s", "with a login", fingerprint_words(house.authority.certificate), "FAILED"),
        "aggregator.consilium.internal",
    ):
        assert needed in " ".join(text.split()), needed
    assert sha256_of(house.authority.certificate) in text
    assert max(map(len, text.splitlines())) <= 115  # fingerprints are not broken
    assert secrets_in(text, house.home.path) == []
    assert secrets_in(text + "someone:a-password-of-theirs", house.home.path) == ["proxy-login"]
    assert "a-password" not in text and "PRIVATE" not in text
    assert call(house.home, "--ticket", str(file))[0] == 8  # nothing is overwritten


def test_a_ticket_can_be_written_before_joining_and_shown(house: House, tmp_path: Path) -> None:
    file = invited(house, tmp_path)
    fresh = SiteHome.create(tmp_path / "fresh")
    assert call(fresh, "--ticket")[0] == 5  # nobody is known yet
    status, out, _ = call(fresh, "--ticket", "--invitation", str(file))
    assert status == 0 and out.startswith("Subject: ") and house.address in out
    assert json.loads(file.read_text())["private_key_pem"].splitlines()[1] not in out
    status, out, _ = call(fresh, "--ticket", "--invitation", str(file), as_json=True)
    assert status == 0 and json.loads(out)["data"]["text"].startswith("Subject: ")


def test_a_file_without_ticket_is_a_usage_error(house: House) -> None:
    status, _, err = call(house.home, "ticket.txt")
    assert status == 2 and "--ticket" in err


def test_the_certificate_s_holder_is_who_the_report_says(house: House) -> None:
    with house.port.open(house.number):
        facts = diagnosed(SiteDoctor(house.home).checks()).step("identity").facts
    certified = describe(house.site.identity.certificate)
    assert (facts["role"], facts["name"], facts["serial"]) == ("site", NAME, certified.serial)
