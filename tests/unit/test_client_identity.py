"""How a site joins, joins again, and keeps its secrets; each failure leaves what was there."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from office_samples import NODE, Office
from site_samples import NAME, joined_site, plain_study
from typer.testing import CliRunner

from consilium_client import joining
from consilium_client.home import SiteHome
from consilium_client.identity import ANSWER, JOINING, LOGIN_FILE, SiteIdentity
from consilium_client.joining import Wishes, join, take_certificates, write_request
from consilium_client.lock import only_one
from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, describe
from consilium_common.identity.enrolment import Certificates, read_join_request, write_form
from consilium_common.identity.words import fingerprint_words


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "aggregator")


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return SiteHome.create(tmp_path / "site")


def files(home: SiteHome) -> dict[str, bytes]:
    """All that a site keeps, but for locks."""
    return {
        str(path.relative_to(home.path)): path.read_bytes()
        for path in home.path.rglob("*")
        if path.is_file() and path.parent.name != "run"
    }


def refused(home: SiteHome, invitation: Path, wishes: Wishes | None = None) -> ConsiliumError:
    before = files(home)
    with pytest.raises(ConsiliumError) as caught:
        join(home, invitation, wishes or Wishes())
    assert caught.value.hint
    assert files(home) == before
    return caught.value


# --- over the network ----------------------------------------------------------------------------


def test_a_site_that_joined_has_keys_that_it_alone_can_read(
    office: Office, home: SiteHome, tmp_path: Path
) -> None:
    invitation = office.invite(tmp_path / "invitation")
    with office.open():
        joined = join(home, invitation)
    identity = SiteIdentity.load(home)
    assert joined.config.name == identity.config.name == NAME
    assert joined.authority_words == fingerprint_words(office.authority.certificate)
    assert joined.own_words == fingerprint_words(identity.certificate)
    assert len(joined.own_words.split()) == 6
    assert office.member().serial == describe(identity.certificate).serial
    for path in home.path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert not (home.path / JOINING).exists()


def test_another_authority_than_the_operator_named_gets_nothing(
    office: Office, home: SiteHome, tmp_path: Path
) -> None:
    invitation = office.invite(tmp_path / "invitation")
    words = fingerprint_words(office.authority.certificate)
    with office.open():
        wrong = " ".join(reversed(words.split()))
        assert refused(home, invitation, Wishes(expect_words=wrong)).code == "identity.wrong-words"
        join(home, invitation, Wishes(expect_words=f"  {words.upper()} "))


def test_an_invitation_works_once(office: Office, home: SiteHome, tmp_path: Path) -> None:
    invitation = office.invite(tmp_path / "invitation")
    with office.open():
        join(home, invitation)
        with pytest.raises(ConsiliumError) as caught:
            join(SiteHome.create(tmp_path / "second"), invitation)
    assert caught.value.code == "identity.refused"
    assert "used already" in caught.value.message


def test_an_invitation_for_a_person_makes_no_site(
    office: Office, home: SiteHome, tmp_path: Path
) -> None:
    invitation = office.invite(tmp_path / "invitation", "anna", Role.OPERATOR)
    assert refused(home, invitation).code == "identity.wrong-role"


def test_an_answer_that_did_not_come_is_asked_for_again_with_the_same_keys(
    office: Office, home: SiteHome, tmp_path: Path
) -> None:
    invitation = office.invite(tmp_path / "invitation")
    with pytest.raises(ConsiliumError) as caught:
        join(home, invitation)
    assert caught.value.code == "network.refused"
    key = (home.path / JOINING / "site-key.pem").read_bytes()
    with pytest.raises(ConsiliumError) as caught:
        SiteIdentity.load(home)
    assert caught.value.code == "identity.not-joined"
    with office.open():
        join(home, invitation)
    assert (home.identity / "site-key.pem").read_bytes() == key


def test_an_offline_authority_lets_the_site_wait_and_the_same_request_is_answered_later(
    office: Office, home: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = office.invite(tmp_path / "invitation")
    monkeypatch.setattr(joining, "_POLL_SECONDS", 0.01)
    office.issuer.offline = True
    said: list[str] = []

    def back(words: str) -> None:
        said.append(words)
        office.issuer.offline = False

    with office.open():
        first = join(home, invitation)
        assert first.waiting
        assert not home.config.exists()
        second = join(home, invitation, wait=True, say=back)
    assert (second.waiting, second.own_words) == (False, first.own_words)
    assert len(said) == 1
    SiteIdentity.load(home)


@pytest.mark.parametrize("crash_after", [0, 1, 4, 7])
def test_a_crash_while_the_identity_is_put_in_place_is_mended_by_the_next_look(
    office: Office,
    home: SiteHome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_after: int,
) -> None:
    from consilium_client import identity as module

    invitation = office.invite(tmp_path / "invitation")
    written: list[Path] = []

    def crashing(path: Path, content: bytes, **options: Any) -> None:
        if len(written) == crash_after:
            raise KeyboardInterrupt
        written.append(path)
        write_atomic(path, content, **options)

    with office.open(), monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", crashing)
        with pytest.raises(KeyboardInterrupt):
            join(home, invitation)
    assert (home.path / JOINING / ANSWER).exists()
    assert SiteIdentity.load(home).config.name == NAME
    assert not (home.path / JOINING).exists()


# --- again ---------------------------------------------------------------------------------------


def test_joining_again_replaces_the_tls_identity_and_keeps_ledger_key_policy_and_settings(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    home = site.home
    home.policy.write_text("mine\n")
    config = json.loads(home.config.read_text()) | {"device": "cpu", "threads": 3}
    home.config.write_text(json.dumps(config))
    before = files(home)
    invitation = office.invite(tmp_path / "invitation")
    assert refused(home, invitation).code == "state.exists"
    with office.open():
        join(home, invitation, Wishes(again=True))
    after = files(home)
    kept = {"identity/ledger-key.pem", "identity/ledger-public.pem", "policy.yaml"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for name in ("site-key.pem", "site-key.openssh", "site.pem", "ledger-signer.pem"):
        assert after[f"identity/{name}"] != before[f"identity/{name}"]
    identity = SiteIdentity.load(home)
    assert (identity.config.device, identity.config.threads) == ("cpu", 3)
    assert office.control.unregistered == [NODE]
    assert office.member().serial == describe(identity.certificate).serial


def test_joining_again_is_for_the_same_site_of_the_same_consortium_and_not_while_it_runs(
    office: Office, tmp_path: Path
) -> None:
    site = office.site(tmp_path / "site")
    again = Wishes(again=True)
    other_name = office.invite(tmp_path / "a", "south")
    assert refused(site.home, other_name, again).code == "identity.other-name"
    elsewhere = Office(tmp_path / "elsewhere").invite(tmp_path / "b")
    assert refused(site.home, elsewhere, again).code == "identity.foreign"
    good = office.invite(tmp_path / "c")
    with only_one(site.home):
        assert refused(site.home, good, again).code == "state.running"
    assert refused(SiteHome.create(tmp_path / "new"), good, again).code == "identity.not-joined"


# --- without a network ---------------------------------------------------------------------------


def answer_of(office: Office, request_file: Path, path: Path, **changes: str) -> Path:
    """What the operator's side makes of a request."""
    request = read_join_request(request_file, office.issuer.trust)
    assert (request.name, request.version) == (NAME, __version__)
    assert request.signer_request_pem is not None
    issued = office.issuer.issue(
        request.name, Role.SITE, request.request_pem.encode(), request.signer_request_pem.encode()
    )
    assert issued is not None
    values = {
        "name": request.name,
        "role": "site",
        "certificate_pem": issued.certificate_pem,
        "signer_pem": issued.signer_pem,
        "authority_pem": office.issuer.trust.pem().decode(),
        "address": office.address,
    }
    write_form(path, Certificates(**{**values, **changes}))  # type: ignore[arg-type]
    return path


def test_a_site_joins_by_files_alone(office: Office, home: SiteHome, tmp_path: Path) -> None:
    invitation = office.invite(tmp_path / "invitation")
    request = tmp_path / "request.json"
    asked = write_request(home, invitation, request)
    assert asked.waiting
    for secret in ("site-key.pem", "ledger-key.pem"):
        key = (home.path / JOINING / secret).read_text()
        assert key.splitlines()[1] not in request.read_text()
    assert json.loads(invitation.read_text())["private_key_pem"] not in request.read_text()
    taken = take_certificates(home, answer_of(office, request, tmp_path / "answer.json"))
    assert taken.own_words == asked.own_words
    assert SiteIdentity.load(home).config.address == office.address
    with pytest.raises(ConsiliumError) as caught:
        take_certificates(home, tmp_path / "answer.json")
    assert caught.value.code == "identity.no-request"


def test_an_answer_for_other_keys_or_of_another_consortium_is_not_taken(
    office: Office, home: SiteHome, tmp_path: Path
) -> None:
    invitation = office.invite(tmp_path / "invitation")
    request = tmp_path / "request.json"
    write_request(home, invitation, request)
    with pytest.raises(ConsiliumError) as caught:  # nothing is overwritten
        write_request(home, invitation, request)
    assert caught.value.code == "state.exists"
    stranger = Office(tmp_path / "elsewhere")
    own = stranger.issuer.certify(office.authority.key.public_key(), Role.SITE, NAME)
    other = office.issuer.certify(Authority.create("x").key.public_key(), Role.SITE, NAME)
    signer = office.issuer.certify(office.authority.key.public_key(), Role.SITE, NAME)
    for number, changes in enumerate(
        (
            {"certificate_pem": own},
            {"certificate_pem": other},
            {"signer_pem": signer},
            {"authority_pem": certificate_pem(stranger.authority.certificate).decode()},
        )
    ):
        before = files(home)
        file = answer_of(office, request, tmp_path / f"answer-{number}.json", **changes)
        with pytest.raises(ConsiliumError) as caught:
            take_certificates(home, file)
        assert caught.value.code.startswith("identity.")
        assert files(home) == before
    take_certificates(home, answer_of(office, request, tmp_path / "answer.json"))


# --- proxies and secrets -------------------------------------------------------------------------


def test_the_proxys_password_lies_in_one_private_file_and_in_no_settings(
    office: Office, home: SiteHome, tmp_path: Path
) -> None:
    from channel_samples import ConnectProxy

    login = tmp_path / "login"
    login.write_text("user:geheim\n")
    login.chmod(0o600)
    invitation = office.invite(tmp_path / "invitation")
    way = ConnectProxy(office.address, authorization="Basic dXNlcjpnZWhlaW0=")
    with office.open(), way.serving() as url:
        join(home, invitation, Wishes(proxy=url, login_file=login))
        proxy = SiteIdentity.load(home).proxy()
    assert way.asked
    assert proxy is not None
    assert proxy.login == "user:geheim"
    assert {name for name, content in files(home).items() if b"geheim" in content} == {
        f"identity/{LOGIN_FILE}"
    }
    (home.identity / LOGIN_FILE).chmod(0o644)
    with pytest.raises(ConsiliumError) as caught:
        SiteIdentity.load(home)
    assert caught.value.code == "identity.key-exposed"


@pytest.mark.parametrize("name", ["site-key.pem", "site-key.openssh", "ledger-key.pem"])
def test_a_key_that_others_can_read_stops_the_site(tmp_path: Path, name: str) -> None:
    site = joined_site(tmp_path / "site")
    (site.home.identity / name).chmod(0o640)
    with pytest.raises(ConsiliumError) as caught:
        SiteIdentity.load(site.home)
    assert caught.value.code == "identity.key-exposed"
    assert name in caught.value.where


def test_a_key_that_is_not_the_certificates_is_named(tmp_path: Path) -> None:
    site, other = joined_site(tmp_path / "site"), joined_site(tmp_path / "other")
    key = (other.home.identity / "site-key.pem").read_bytes()
    write_atomic(site.home.identity / "site-key.pem", key)
    with pytest.raises(ConsiliumError) as caught:
        SiteIdentity.load(site.home)
    assert caught.value.code == "identity.bad-key"


# --- commands ------------------------------------------------------------------------------------


def consilium(*arguments: object) -> dict[str, Any]:
    from consilium_common.cli import app

    result = CliRunner().invoke(app, ["--json", "site", *map(str, arguments)])
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def test_the_commands_join_and_renew(office: Office, tmp_path: Path) -> None:
    home = tmp_path / "home"
    invitation = office.invite(tmp_path / "invitation")
    with office.open():
        joined = consilium("join", invitation, "--home", home)
        renewed = consilium("renew", "--home", home)
        office.issuer.offline = True
        waits = consilium("renew", "--home", home)
    assert joined["data"]["waiting"] is False
    assert len(joined["data"]["authority_words"].split()) == 6
    assert renewed["data"]["renewed"] is True
    assert waits["data"]["renewed"] is False
    assert (home / "policy.yaml").exists()
    for wrong in (["join"], ["join", invitation, "--certificate", invitation]):
        assert consilium(*wrong, "--home", home)["error"]["code"] == "usage.join"


# --- what children are started with --------------------------------------------------------------


def test_no_secret_is_in_an_argument_an_environment_or_a_log_of_the_site_s_processes(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio
    import signal

    from consilium_client.supervisor import serve

    monkeypatch.setenv("HTTPS_PROXY", "http://user:geheim@127.0.0.1:1")
    site = office.site(tmp_path / "site")
    write_atomic(site.home.identity / LOGIN_FILE, b"user:verborgen\n")
    site.home.path.chmod(0o755)
    said: list[str] = []
    found: dict[str, bytes] = {}
    # Workers are forked from the last, and have its arguments and environment.
    names = (b"flower-supernode", b"consilium_client.executor", b"multiprocessing.forkserver")

    async def watch() -> None:
        serving = asyncio.create_task(serve(site.home, said.append))
        end = time.monotonic() + 40
        while len(found) < len(names):
            assert time.monotonic() < end
            assert not serving.done()
            await asyncio.sleep(0.1)
            for process in Path("/proc").iterdir():
                if process.name.isdigit() and process.name != str(os.getpid()):
                    note(process)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    def note(process: Path) -> None:
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes()
        except OSError:
            return
        mine = str(site.home.path).encode() in environment
        for name in names:
            if mine and name in command:
                found[name.decode()] = command + b"\0" + environment

    with office.open():
        asyncio.run(watch())
    assert stat.S_IMODE(site.home.path.stat().st_mode) == 0o700  # closed when the site starts
    secrets = [b"geheim", b"verborgen"]
    for path in [*site.home.identity.iterdir(), site.home.run / "secret"]:
        if path.name in ("site-key.pem", "site-key.openssh", "ledger-key.pem"):
            secrets += [line for line in path.read_bytes().splitlines() if b"-----" not in line]
        elif path.name == "secret":
            content = path.read_bytes()
            secrets += [content, content.hex().encode()]
    assert len(secrets) > 6
    logs = b"".join(path.read_bytes() for path in site.home.logs.iterdir())
    for text in (*found.values(), logs, "\n".join(said).encode()):
        for secret in secrets:
            assert secret not in text


def test_what_reads_images_or_computes_beside_the_link_gets_no_proxy_s_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import subprocess

    from consilium_client.data.ingest.readers import read_cases
    from consilium_client.declared import Apart

    monkeypatch.setenv("HTTPS_PROXY", "http://user:geheim@127.0.0.1:1")
    given: list[dict[str, str]] = []

    def no_child(*_: object, env: dict[str, str], **__: object) -> None:
        given.append(env)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", no_child)
    with pytest.raises(ConsiliumError):
        Apart()(plain_study())
    with pytest.raises(OSError, match="memory"):
        next(read_cases([("case", None)], Path, readers=1))  # type: ignore[list-item]
    assert len(given) == 2
    assert all("PATH" in one and "geheim" not in str(one) for one in given)
