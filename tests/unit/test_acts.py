"""The aggregator's audit log: nothing in it can be changed, left out or put in unseen."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from aggregator_samples import Aggregator, consilium
from hypothesis import given, settings
from hypothesis import strategies as st
from issuing_samples import HOUR, SECRET, request_file
from issuing_samples import KEY as KEY_OF_NORTH
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from consilium_common.audit.acts import Act, signed_act, verify_acts
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import load_certificate, read_certificate
from consilium_common.identity.invitation import read_invitation
from consilium_common.identity.keys import load_tls_key, new_signing_key, public_fingerprint
from consilium_common.identity.trust import key_of
from consilium_common.ledger.entries import Head
from consilium_server import members
from consilium_server.acts import Acts, acts_of, local_user
from consilium_server.issuing import HomeIssuer
from consilium_server.registry import Registry

KEY = new_signing_key()


def chain(length: int, *, key: Any = KEY) -> list[Act]:
    acts: list[Act] = []
    for number in range(length):
        acts.append(
            signed_act(
                key,
                acts[-1] if acts else None,
                time=f"2026-01-01T00:00:{number:02}+00:00",
                who="ada",
                role="operator",
                act="revoke",
                subject=f"site number-{number}",
                digest="",
                outcome="done",
            )
        )
    return acts


def refused(acts: list[Act], **more: Any) -> ConsiliumError:
    with pytest.raises(ConsiliumError) as caught:
        verify_acts(acts, KEY.public_key(), **more)
    assert caught.value.code == "privacy.log-broken"
    return caught.value


ACTS = chain(6)
FIELDS = ("time", "who", "role", "act", "subject", "digest", "outcome")


def test_an_honest_log_verifies_and_an_empty_one_has_no_head() -> None:
    assert verify_acts(ACTS, KEY.public_key()) == Head(5, ACTS[-1].hash)
    assert verify_acts([], KEY.public_key()) is None


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_change_omission_insertion_or_exchange_is_found(data: st.DataObject) -> None:
    acts = list(ACTS)
    at = data.draw(st.integers(0, len(acts) - 2))
    kind = data.draw(st.sampled_from(("change", "omit", "repeat", "exchange", "resign")))
    if kind == "change":
        name = data.draw(st.sampled_from(FIELDS))
        value = data.draw(st.text(max_size=20).filter(lambda text: text != getattr(acts[at], name)))
        acts[at] = acts[at].model_copy(update={name: value})
    elif kind == "omit":
        del acts[at]
    elif kind == "repeat":
        acts.insert(at, acts[at])
    elif kind == "exchange":
        acts[at], acts[at + 1] = acts[at + 1], acts[at]
    else:  # a whole history of somebody else's, from there on
        acts[at:] = chain(6, key=new_signing_key())[at:]
    assert refused(acts)


def test_entries_cut_off_at_the_end_are_found_by_whoever_noted_a_head() -> None:
    noted = Head(5, ACTS[5].hash)
    assert verify_acts(ACTS[:4], KEY.public_key()) == Head(3, ACTS[3].hash)
    assert "cut off" in refused(ACTS[:4], head=noted).message
    assert "noted" in refused(ACTS, head=Head(3, "0" * 64)).message


@pytest.fixture(scope="module")
def aggregator(tmp_path_factory: pytest.TempPathFactory) -> Aggregator:
    return Aggregator(tmp_path_factory.mktemp("acts"))


def test_processes_that_write_at_once_make_one_chain(aggregator: Aggregator) -> None:
    def write(who: str) -> None:
        acts = Acts(Registry(aggregator.home.database), aggregator.key)
        for number in range(8):
            acts.note(who, "operator", "invite", f"site {number}")

    threads = [threading.Thread(target=write, args=(f"operator-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = acts_of(aggregator.home).document(aggregator.issuer.trust)["content"]
    acts = [Act.model_validate(entry) for entry in content["entries"]]
    assert len(acts) >= 32
    assert verify_acts(acts, aggregator.key.key.public_key()) is not None


@pytest.mark.parametrize("change", ["UPDATE audit_log SET record = '{}'", "DELETE FROM audit_log"])
def test_the_database_itself_refuses_to_change_the_log(aggregator: Aggregator, change: str) -> None:
    acts_of(aggregator.home).note("ada", "operator", "stop", "study")
    with (
        pytest.raises(IntegrityError, match="append-only"),
        aggregator.registry.transaction() as session,
    ):
        session.execute(text(change))


def test_refused_attempts_do_not_fill_the_log(aggregator: Aggregator) -> None:
    acts = acts_of(aggregator.home)
    before = len(aggregator.acts)
    for _ in range(50):
        acts.note_refused("mallory", "site", "revoke", "", "identity.wrong-role")
    acts.note_refused("mallory", "site", "invite", "", "identity.wrong-role")
    assert len(aggregator.acts) == before + 2


def test_what_a_refused_caller_says_is_kept_as_printable_text_of_bounded_length(
    aggregator: Aggregator,
) -> None:
    said = "\ud800\x1b[2J" + "x" * 10_000
    acts_of(aggregator.home).note_refused("mallory", "operator", "run", said, "study.unknown")
    subject = aggregator.acts[-1][3]
    assert subject.startswith("\\ud800\\x1b[2J")
    assert subject.isprintable()
    assert len(subject) == 400


def test_local_acts_are_noted_by_the_system_s_user(aggregator: Aggregator, tmp_path: Path) -> None:
    home = aggregator.home.path
    consilium("server", "invite", "north", "--out", tmp_path / "north", "--home", home)
    who, role, act, subject, outcome = aggregator.acts[-1]
    assert (who, role, act, subject, outcome) == (
        local_user(),
        "local",
        "invite",
        "site north",
        "done",
    )
    assert who.startswith("local:")


def test_each_local_act_is_an_entry_with_the_digest_of_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregator = Aggregator(tmp_path / "aggregator")
    identity, letter = aggregator.home.identity, members.invite(aggregator.home, "north", HOUR)
    asked, out = request_file(tmp_path, letter), tmp_path / "north"
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET + b"\n")
    secret.chmod(0o600)
    unlocking = ("--passphrase-file", secret)

    def done(*command: str | Path) -> Any:
        return consilium("server", *command, "--home", aggregator.home.path)

    def key_in(name: str) -> str:
        return key_of(read_certificate(identity / name))

    with monkeypatch.context() as offline:
        offline.setattr(HomeIssuer, "issue", lambda *_, **__: None)
        done("certify", asked, "--out", out)
        done("rotate", "server")
    waiting = load_tls_key(identity / "server-waiting-key.pem").public_key()
    done("certify", asked, "--out", out)
    before = key_in("authority.pem")
    done("rotate", "authority")
    after = key_in("authority.pem")
    done("rotate", "authority", "--finish", "--force")
    done("rotate", "server")
    done("lock-authority", "--new-passphrase-file", secret)
    done("records", "north", tmp_path / "records")
    records = hashlib.sha256((tmp_path / "records").read_bytes()).hexdigest()
    done("log", "--out", tmp_path / "log")
    log = hashlib.sha256((tmp_path / "log").read_bytes()).hexdigest()
    revoked = done("revoke", "north")
    assert revoked["fingerprint"] == public_fingerprint(KEY_OF_NORTH.public_key())
    for refused in (
        ("revoke", "nobody"),
        ("records", "nowhere", tmp_path / "none"),
        ("certify", tmp_path / "none", "--out", tmp_path / "never", *unlocking),
        ("take", tmp_path / "none"),
        ("rotate", "server"),
        ("rotate", "authority", "--finish", *unlocking),
        ("lock-authority", "--new-passphrase-file", secret),
    ):
        assert isinstance(done(*refused), str), refused

    found = aggregator.log
    assert {(act.who, act.role) for act in found} == {(local_user(), "local")}
    locked = "refused: identity.passphrase-needed"
    assert after != before
    assert [(act.act, act.subject, act.digest, act.outcome) for act in found] == [
        ("certify", "site north", revoked["fingerprint"], "waiting"),
        ("rotate", "server key", public_fingerprint(waiting), "waiting"),
        ("certify", "site north", revoked["fingerprint"], "done"),
        ("rotate", "authority", after, "done"),
        ("rotate", "authority, finished", after, "done"),
        ("rotate", "server key", key_in("server.pem"), "done"),
        ("lock", "authority", after, "done"),
        ("records", "north", records, "done"),
        ("log", "audit log", log, "done"),
        ("revoke", "site north", revoked["fingerprint"], "done"),
        ("revoke", "nobody", "", "refused: identity.unknown"),
        ("records", "nowhere", "", "refused: identity.unknown"),
        ("certify", "none", "", "refused: identity.no-file"),
        ("take", "none", "", "refused: identity.no-file"),
        ("rotate", "server key", "", locked),
        ("rotate", "authority, finished", "", "refused: identity.no-rotation"),
        ("lock", "authority", "", locked),
    ]


def test_invitations_made_here_are_entries_with_their_keys(tmp_path: Path) -> None:
    aggregator, letter = Aggregator(tmp_path / "aggregator"), tmp_path / "letter"
    invite = ("server", "invite", "north", "--out", letter, "--home", aggregator.home.path)
    assert not isinstance(consilium(*invite), str)
    certificate = read_invitation(letter).certificate_pem.encode()
    letter.unlink()
    assert consilium(*invite[:2], "North!", *invite[3:]) == "identity.bad-name"
    made, refused = aggregator.log
    assert (made.act, made.subject, made.digest, made.outcome) == (
        "invite",
        "site north",
        key_of(load_certificate(certificate)),
        "done",
    )
    assert (refused.act, refused.subject, refused.outcome) == (
        "invite",
        "site North!",
        "refused: identity.bad-name",
    )


def test_a_refusal_is_said_though_the_log_cannot_be_written(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path)
    (aggregator.home.identity / "witness.pem").unlink()
    refused = consilium("server", "revoke", "nobody", "--home", aggregator.home.path)
    assert refused == "identity.unknown"


def test_a_log_file_that_was_tampered_with_or_is_of_others_is_refused(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    acts_of(aggregator.home).note("ada", "operator", "stop", "study")
    file = tmp_path / "log.json"
    consilium("server", "log", "--out", file, "--home", aggregator.home.path)
    authority = aggregator.home.identity / "authority.pem"
    assert consilium("audit", "verify", file)["log"]["entries"] > 0
    assert consilium("audit", "verify", file, "--authority", authority)["log"]["entries"] > 0
    foreign = tmp_path / "authority.pem"
    foreign.write_bytes(certificate_pem(Authority.create("others").certificate))
    assert consilium("audit", "verify", file, "--authority", foreign) == "identity.foreign"

    whole = json.loads(file.read_bytes())
    for number, change in enumerate(
        (
            lambda d: d["content"]["entries"][-1].update(who="nobody"),
            lambda d: d["content"]["entries"].pop(),  # the file's own signature covers the end
            lambda d: d["content"].update(written_at="2020-01-01T00:00:00Z"),
        )
    ):
        document = json.loads(json.dumps(whole))
        change(document)
        changed = tmp_path / f"changed-{number}.json"
        changed.write_text(json.dumps(document))
        assert consilium("audit", "verify", changed) == "privacy.log-broken"
    del whole["content"]["entries"]
    (tmp_path / "no.json").write_text(json.dumps(whole))
    assert consilium("audit", "verify", tmp_path / "no.json") == "privacy.evidence-form"
    assert consilium("audit", "verify") == "usage.arguments"
