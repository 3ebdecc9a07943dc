"""People work from their own computers, with keys of their own, and the audit log says what."""

from __future__ import annotations

import json
import re
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from aggregator_samples import Aggregator, consilium
from state_samples import put
from typer.testing import CliRunner

from consilium_common.audit.acts import read_log
from consilium_common.audit.evidence import Evidence
from consilium_common.audit.fetch import records_for
from consilium_common.cli import app
from consilium_common.errors import ConsiliumError
from consilium_common.identity import personal
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.identity.personal import Personal
from consilium_common.identity.trust import Trust
from consilium_common.identity.words import fingerprint_words
from consilium_common.study.examples import example_files
from consilium_common.wire import methods
from consilium_common.wire.channel import Caller, channel_target
from consilium_common.wire.tls13 import grpc
from consilium_server.flower_private import public_key_header
from consilium_server.rotation import Custody, finish_rotation, rotate_authority
from consilium_server.tables import Member, StudyRow, now

STUDY = next(path for path in example_files() if path.stem == "hippocampus")


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path)
    with made.open():
        yield made


def refusal(call: object, *arguments: object) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


def test_an_operator_works_from_anywhere_and_signs_with_a_key_of_their_own(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    folder = tmp_path / "ada"
    joined = consilium(
        "identity", "join", aggregator.invitation("ada", Role.OPERATOR), "--out", folder
    )
    assert (joined["name"], joined["role"]) == ("ada", "operator")
    assert len(joined["words"].split()) == 6
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for key in ("member-key.pem", "signing-key.pem", "identity.json"):
        assert stat.S_IMODE((folder / key).stat().st_mode) == 0o600
    assert consilium("identity", "show", "--connect", folder) == joined

    proposed = consilium("study", "propose", STUDY, "--connect", folder)
    row = aggregator.registry.study(proposed["digest"])
    assert row.proposed_by == "ada"
    signer = describe(load_certificate(row.signer_pem.encode()))
    assert (signer.name, signer.role) == ("ada", Role.PROPOSER)
    listed = consilium("study", "list", "--connect", folder)["studies"]
    assert [one["digest"] for one in listed] == [proposed["digest"]]
    shown = consilium("study", "show", proposed["digest"][:12], "--connect", folder)
    assert shown["proposed_by"] == "ada"
    assert consilium("study", "run", row.digest, "--connect", folder) == "study.not-approved"
    assert ("ada", "operator", "propose", row.name, "done") in aggregator.acts
    assert ("ada", "operator", "run", row.name, "refused: study.not-approved") in aggregator.acts


def test_members_are_invited_listed_and_revoked_from_elsewhere(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    ada = aggregator.join("ada", Role.OPERATOR)
    file = tmp_path / "ben.invitation"
    made = consilium(
        "server", "invite", "ben", "--role", "auditor", "--out", file, "--connect", ada.folder
    )
    words = consilium("identity", "show", "--connect", ada.folder)["authority_words"]
    assert made["authority_words"] == words
    ben = tmp_path / "ben"
    wrong = consilium("identity", "join", file, "--out", ben, "--expect-words", "a b c d e f")
    assert wrong == "identity.wrong-words"
    assert not ben.exists()
    consilium("identity", "join", file, "--out", ben, "--expect-words", words)
    aggregator.site("north")

    data = consilium("server", "sites", "--connect", ada.folder)
    assert data == consilium("server", "sites", "--home", aggregator.home.path)
    assert {row["name"]: row["role"] for row in data["people"]} == {
        "ada": "operator",
        "ben": "auditor",
        "operator": "operator",
    }
    (north,) = data["sites"]
    assert (north["name"], north["address"], north["status"]) == ("north", "127.0.0.1", "active")
    assert north["expires"] > north["joined_at"]

    assert consilium("server", "revoke", "ben", "--connect", ada.folder)["status"] == "revoked"
    assert consilium("server", "sites", "--connect", ben) == "identity.refused"
    assert consilium("server", "revoke", "operator", "--connect", ada.folder) == (
        "identity.last-operator"
    )
    acts = [(who, act, subject) for who, _, act, subject, _ in aggregator.acts]
    assert acts == [
        ("ada", "enrol", "operator ada"),
        ("ada", "invite", "auditor ben"),
        ("ben", "enrol", "auditor ben"),
        ("north", "enrol", "site north"),
        ("ada", "revoke", "auditor ben"),
        ("ada", "revoke", "operator"),
    ]


def test_the_list_of_sites_shows_how_each_stands_and_the_words_of_its_key(
    aggregator: Aggregator,
) -> None:
    credentials = aggregator.site("north")
    hello = {"session": "s", "version": "0.0.7", "protocol": methods.PROTOCOL}
    before = now()
    with aggregator.caller(credentials) as caller:
        caller.call(methods.SITE_HELLO, hello)
    command = ("server", "sites", "--home", aggregator.home.path)
    (site,) = consilium(*command)["sites"]
    certificate = load_certificate(credentials.certificate)
    assert before <= site["last_seen"] <= now()
    assert (site["online"], site["version"], site["address"]) == (True, "0.0.7", "127.0.0.1")
    assert site["expires"] == certificate.not_valid_after_utc.isoformat()
    # What the site shows of its own key, for both to read to each other.
    assert site["words"] == fingerprint_words(certificate)

    printed = CliRunner().invoke(app, [str(word) for word in command], env={"COLUMNS": "100"})
    assert max(map(len, printed.stdout.splitlines())) <= 100
    shown = " ".join(re.sub("[┏┓┗┛━┃│└┘─┴┳╇┡┩]", " ", printed.stdout).split())
    seen = f"{site['last_seen'][:10]} {site['last_seen'][11:19]}"
    assert f"north active yes {seen} 127.0.0.1 0.0.7 {site['expires'][:10]} not seen" in shown
    assert f"north {site['words']}" in shown


def test_an_auditor_reads_and_changes_nothing(aggregator: Aggregator, tmp_path: Path) -> None:
    ada = aggregator.join("ada", Role.OPERATOR)
    eve = aggregator.join("eve", Role.AUDITOR)
    assert not (eve.folder / "signing-key.pem").exists()
    assert aggregator.member("eve").signer_pem == ""
    aggregator.site("north")
    study = consilium("study", "propose", STUDY, "--connect", ada.folder)["digest"]

    assert consilium("study", "show", study, "--connect", eve.folder)["digest"] == study
    there, here = tmp_path / "there.json", tmp_path / "here.json"
    consilium("server", "records", "north", there, "--connect", eve.folder)
    consilium("server", "records", "north", here, "--home", aggregator.home.path)
    one, other = (json.loads(path.read_bytes())["content"] for path in (there, here))
    assert {**one, "written_at": ""} == {**other, "written_at": ""}

    for command in (
        ("study", "propose", STUDY),
        ("study", "run", study),
        ("study", "stop", study),
        ("server", "revoke", "north"),
        ("server", "invite", "zoe", "--out", tmp_path / "zoe"),
    ):
        assert consilium(*command, "--connect", eve.folder) == "identity.wrong-role", command
    # A client that says nothing of its own is refused by the aggregator, and that is noted.
    with aggregator.caller(eve.credentials()) as caller:
        for _ in range(3):
            error = refusal(caller.call, methods.OPERATOR_REVOKE, {"name": "north"})
            assert error.code.startswith("identity.")
    attempts = [row for row in aggregator.acts if row[4] == "refused: identity.wrong-role"]
    assert [row[:3] for row in attempts] == [("eve", "auditor", "revoke")]
    assert aggregator.member("north").status == "active"


def test_the_log_is_fetched_and_verified_by_those_who_may(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    eve = aggregator.join("eve", Role.AUDITOR)
    file = tmp_path / "log.json"
    shown = consilium("server", "log", "--out", file, "--connect", eve.folder)
    assert [act["act"] for act in shown["acts"]] == ["enrol"]
    verified = consilium("audit", "verify", file, "--authority", eve.folder / "authority.pem")
    assert verified["log"]["head"] == shown["head"]
    # What was handed out is an act too, and the chain that was noted goes on.
    fresh = consilium("audit", "verify", "--connect", eve.folder, "--head", shown["head"])["log"]
    assert [act["act"] for act in fresh["acts"]] == ["enrol", "log"]
    assert consilium("server", "log", "--out", file, "--connect", eve.folder) == "state.exists"


def test_a_large_document_comes_in_pieces_of_one_signing(
    aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consilium_common.audit.fetch import fetch_log
    from consilium_server.services import of_auditors

    eve = aggregator.join("eve", Role.AUDITOR)
    monkeypatch.setattr(of_auditors, "PIECE", 700)
    with eve.caller() as caller:
        content = fetch_log(caller)
        assert len(content) > 1400
        read_log(content, where="log", trusted=eve.folder / "authority.pem")
        gone = refusal(caller.call, methods.AUDIT_LOG, {"offset": 700, "sha256": "0" * 64})
    assert gone.code == "network.piece-gone"


def test_a_certificate_renews_itself_on_use_and_the_old_one_ends_with_the_first_use(
    aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = aggregator.join("ada", Role.OPERATOR)
    before, old = ada.check(), ada.credentials()
    monkeypatch.setattr(Personal, "trust", _Due(ada.trust))
    with ada.caller() as caller:
        caller.call(methods.OPERATOR_SITES, {})
        monkeypatch.undo()
        after = ada.check()
        assert after.serial != before.serial
        assert after.public_key == before.public_key
        member = aggregator.member("ada")
        assert (member.serial, member.next_serial) == (after.serial, None)
    with aggregator.caller(old) as late:
        assert refusal(late.call, methods.OPERATOR_SITES, {}).code.startswith("identity.")
    assert ("ada", "operator", "renew", "operator ada", "done") in aggregator.acts
    assert not (ada.folder / "renewal.json").exists()


class _Due:
    """A trust that wants every certificate renewed."""

    def __init__(self, trust: object) -> None:
        self._trust = trust

    def __getattr__(self, name: str) -> object:
        return getattr(self._trust, name)

    def wants_renewal(self, _: object) -> bool:
        return True


def test_a_new_authority_is_followed_on_use_when_the_old_one_vouches_for_it(
    aggregator: Aggregator,
) -> None:
    ada = aggregator.join("ada", Role.OPERATOR)
    custody = Custody(aggregator.home)
    rotate_authority(custody)
    assert aggregator.issuer.trust.digest != ada.trust.digest
    command = ("server", "sites", "--connect", ada.folder)
    assert "ada" in {row["name"] for row in consilium(*command)["people"]}
    assert ada.trust.digest == aggregator.issuer.trust.digest
    assert ada.trust.in_force(ada.certificate)
    # One more use puts the new certificate in force; then the old authority can go.
    consilium(*command)
    assert "ada" not in finish_rotation(custody, force=True)
    assert "ada" in {row["name"] for row in consilium(*command)["people"]}
    assert len(ada.trust.authorities) == 1

    stranger = Authority.create("strangers")
    before = (ada.folder / "authority.pem").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        trust = Trust((stranger.certificate,))
        answer = {"authority_pem": trust.pem().decode(), "cross_pem": None}
        patch.setattr(Caller, "call", lambda *_, **__: answer)
        ada.caller().close()
    assert (ada.folder / "authority.pem").read_bytes() == before


def test_until_a_renewed_certificate_was_used_the_old_one_serves(aggregator: Aggregator) -> None:
    ada = aggregator.join("ada", Role.OPERATOR)
    with aggregator.caller(ada.credentials()) as caller:
        first = caller.call(methods.MEMBER_RENEW, ada.request())
        second = caller.call(methods.MEMBER_RENEW, ada.request())
        assert caller.call(methods.OPERATOR_SITES, {})["sites"] == []
    assert first["certificate_pem"] != second["certificate_pem"]
    assert aggregator.member("ada").serial == ada.check().serial


def test_a_renewal_is_for_the_keys_one_has(aggregator: Aggregator) -> None:
    ada = aggregator.join("ada", Role.OPERATOR)
    ben = aggregator.join("ben", Role.OPERATOR)
    mine, theirs = ada.request(), ben.request()
    with aggregator.caller(ada.credentials()) as caller:
        for wrong in (theirs, {**mine, "signer_request_pem": theirs["signer_request_pem"]}):
            assert refusal(caller.call, methods.MEMBER_RENEW, wrong).code == "identity.other-key"
    assert aggregator.member("ada").next_serial is None


def test_a_site_is_shown_what_was_proposed_to_it_and_nothing_else(
    aggregator: Aggregator,
) -> None:
    sites = {name: aggregator.site(name) for name in ("north", "south")}
    home = aggregator.home.path
    proposed = consilium("study", "propose", STUDY, "--site", "north", "--home", home)
    digest = proposed["digest"]

    def seen(name: str) -> list[str]:
        with aggregator.caller(sites[name]) as caller:
            return [row["digest"] for row in caller.call(methods.SITE_STUDIES, {})["studies"]]

    assert (seen("north"), seen("south")) == ([digest], [])
    said = {
        "digest": digest,
        "decision": "approved",
        "cohort_size": 3,
        "evaluation_size": 1,
        "why": "",
        "signature": "00",
    }
    put(aggregator.registry, digest, "running")
    with aggregator.caller(sites["south"]) as caller:
        assert refusal(caller.call, methods.SITE_DECIDE, said).code == "study.unknown"
        where = {"digest": digest, "phase": "training"}
        assert refusal(caller.call, methods.SITE_PROGRESS, where).code == "study.unknown"
        hello = {"session": "s", "version": "1", "protocol": methods.PROTOCOL}
        assert caller.call(methods.SITE_HELLO, hello)["running"] == []
    with aggregator.registry.transaction() as session:
        assert session.get_one(StudyRow, digest).sites == ["north"]
    consilium("study", "propose", STUDY, "--home", home)
    assert seen("south") == [digest]
    unknown = consilium("study", "propose", STUDY, "--site", "nowhere", "--home", home)
    assert unknown == "identity.unknown"


def test_a_release_that_does_not_fit_is_said_in_words_and_does_not_count_as_online(
    aggregator: Aggregator,
) -> None:
    credentials = aggregator.site("north")
    with aggregator.caller(credentials) as caller:
        hello = {"session": "s", "version": "0.0.1"}
        error = refusal(caller.call, methods.SITE_HELLO, hello)
        assert error.code == "network.version"
        assert "0.0.1" in error.message
        assert not aggregator.member("north").online
        answer = caller.call(methods.SITE_HELLO, {**hello, "protocol": methods.PROTOCOL})
    assert answer["protocol"] == methods.PROTOCOL
    assert answer["trust"] == aggregator.issuer.trust.digest
    assert answer["renew"] is False
    assert aggregator.member("north").online


def test_a_site_that_was_certified_by_a_file_becomes_a_node_when_it_first_says_hello(
    aggregator: Aggregator,
) -> None:
    credentials = aggregator.site("north")
    with aggregator.registry.transaction() as session:
        session.get_one(Member, "north").node_id = None
    hello = {"session": "s", "version": "1", "protocol": methods.PROTOCOL}
    with aggregator.caller(credentials) as caller:
        caller.call(methods.SITE_HELLO, hello)
    (node,) = aggregator.nodes.registered.values()
    assert aggregator.member("north").node_id == str(node)


def test_revocation_by_another_process_ends_a_held_poll_within_two_seconds(
    aggregator: Aggregator,
) -> None:
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.node_pb2 import Node

    credentials = aggregator.site("north")
    node = int(aggregator.member("north").node_id or 0)
    header = public_key_header(describe(load_certificate(credentials.certificate)).public_key)
    target, options = channel_target(f"127.0.0.1:{aggregator.port}", None)
    with grpc.secure_channel(target, credentials.for_grpc(), options=options) as channel:
        body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
        held = channel.unary_unary(methods.fleet_method("PullMessages")).future(
            body, timeout=20, metadata=(("flwr-public-key", header),)
        )
        deadline = time.monotonic() + 10
        while not aggregator.forwarded and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not held.done()
        # The command opens the register by itself, as another process does.
        assert consilium("server", "revoke", "north", "--home", aggregator.home.path)
        revoked = time.monotonic()
        assert held.code() is grpc.StatusCode.PERMISSION_DENIED
        assert time.monotonic() - revoked < 2.0
    with aggregator.caller(credentials) as caller:
        assert refusal(caller.call, methods.SITE_STUDIES, {}).code.startswith("identity.")
    assert aggregator.acts[-1][1:] == ("local", "revoke", "site north", "done")


def test_whoever_was_revoked_stays_refused_after_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator = Aggregator(tmp_path)
    with aggregator.open():
        site, ada = aggregator.site("north"), aggregator.join("ada", Role.OPERATOR).credentials()
        for name in ("north", "ada"):
            consilium("server", "revoke", name, "--home", aggregator.home.path)
    aggregator.start_anew()
    caplog.clear()
    with aggregator.open():
        for credentials, method in ((site, methods.SITE_STUDIES), (ada, methods.OPERATOR_REVOKE)):
            with aggregator.caller(credentials) as caller:
                assert refusal(caller.call, method, {}).code == "identity.refused"
    assert "[identity.revoked] The certificate of 'north' was revoked" in caplog.text
    assert aggregator.log[-1].who == "ada"
    assert aggregator.log[-1].outcome == "refused: identity.revoked"


def test_an_upload_that_was_begun_before_a_revocation_is_not_taken_after_it(
    aggregator: Aggregator,
) -> None:
    credentials = aggregator.site("north")
    header = public_key_header(describe(load_certificate(credentials.certificate)).public_key)
    target, options = channel_target(f"127.0.0.1:{aggregator.port}", None)
    with grpc.secure_channel(target, credentials.for_grpc(), options=options) as channel:
        go_on = threading.Event()

        def slowly() -> Iterator[bytes]:
            assert go_on.wait(20)
            yield b""

        started = channel.stream_stream(methods.fleet_method("GetRun"))(
            slowly(), timeout=20, metadata=(("flwr-public-key", header),)
        )
        channel.unary_unary(methods.MEMBER_PROBE)(b'{"content": ""}', timeout=20)
        consilium("server", "revoke", "north", "--home", aggregator.home.path)
        revoked = time.monotonic()
        # Its body has not come, and never does: the stream ends by itself all the same.
        assert started.code() is grpc.StatusCode.PERMISSION_DENIED
        assert time.monotonic() - revoked < 2.0
        go_on.set()
    assert aggregator.forwarded == []


def test_an_enrolment_waits_for_the_offline_authority_with_its_own_key_alone(
    aggregator: Aggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = aggregator.invitation("ada", Role.OPERATOR)
    folder = tmp_path / "ada"
    with monkeypatch.context() as offline:
        offline.setattr(aggregator.issuer, "issue", lambda *_, **__: None)
        assert consilium("identity", "join", invitation, "--out", folder)["waiting"] is True
        assert consilium("identity", "join", invitation, "--out", folder)["waiting"] is True
        key = (folder / "member-key.pem").read_bytes()
    stolen = consilium("identity", "join", invitation, "--out", tmp_path / "thief")
    assert stolen == "identity.invitation-used"
    assert consilium("identity", "join", invitation, "--out", folder)["name"] == "ada"
    assert (folder / "member-key.pem").read_bytes() == key
    outcomes = [outcome for *_, outcome in aggregator.acts]
    assert outcomes == ["waiting", "waiting", "refused: identity.invitation-used", "done"]


def test_evidence_is_compared_with_what_the_aggregator_says_itself(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    eve = aggregator.join("eve", Role.AUDITOR)
    aggregator.site("north")
    signer = describe(load_certificate(aggregator.member("north").signer_pem.encode()))
    evidence = Evidence(tmp_path / "ledger.jsonl", signer.public_key, signer=signer)  # type: ignore[arg-type]
    found = records_for(evidence, None, eve.folder, None)
    assert found is not None
    # Where it is from, for people to read; not a temporary file that is gone.
    address = Personal.read(eve.folder).settings.address
    assert found.path == f"records of north at {address}"
    foreign = tmp_path / "foreign.pem"
    foreign.write_bytes(certificate_pem(Authority.create("elsewhere").certificate))
    broken = refusal(records_for, evidence, None, eve.folder, foreign)
    assert (broken.code, broken.where) == ("privacy.records-broken", found.path)
    assert (found.site, found.signer.serial) == ("north", signer.serial)
    assert records_for(evidence, None, None, None) is None
    bare = replace(evidence, signer=None)
    assert refusal(records_for, bare, None, eve.folder, None).code == "usage.records"
    records = tmp_path / "records.json"
    records.write_text("{}")
    assert refusal(records_for, evidence, records, eve.folder, None).code == "usage.records"
    both = ("audit", "compare", tmp_path, records, "--connect", eve.folder)
    assert consilium(*both) == "usage.compare"
    assert consilium("audit", "compare", tmp_path) == "usage.compare"


def test_whoever_is_not_said_or_not_joined_is_told_what_to_do(
    tmp_path: Path, aggregator: Aggregator
) -> None:
    assert refusal(personal.connect, None, None).code == "identity.not-joined"
    assert consilium("identity", "show", "--connect", tmp_path / "none") == "identity.not-joined"
    assert consilium("study", "list", "--home", tmp_path / "none") == "state.no-server"
    invitation = aggregator.invitation("north", Role.SITE)
    assert consilium("identity", "join", invitation, "--out", tmp_path / "x") == (
        "identity.wrong-role"
    )
    ada = aggregator.join("ada", Role.OPERATOR)
    again = aggregator.folder / "ada.invitation"
    assert consilium("identity", "join", again, "--out", ada.folder) == "state.exists"
    (ada.folder / "member-key.pem").chmod(0o644)
    assert consilium("study", "list", "--connect", ada.folder) == "identity.key-exposed"
