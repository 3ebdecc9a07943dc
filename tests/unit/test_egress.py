"""Nothing passes the gate that was not approved, stored, and in a private study charged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from site_samples import NAME, JoinedSite, joined_site, plain_study, private_study

from consilium_client import flower_private
from consilium_client.egress import EgressGate, error_reason
from consilium_client.flower_private import CRASHED_REASON, Push, read_push, read_push_object
from consilium_client.store import StudyStore
from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle, bundle_hash
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import parameters
from consilium_common.study import Study

CONTENT = b"an object of a reply"
OBJECT = hashlib.sha256(CONTENT).hexdigest()
PATIENTS = [hashlib.sha256(b"%d" % n).hexdigest()[:32] for n in range(4)]


@pytest.fixture
def site(tmp_path: Path) -> JoinedSite:
    return joined_site(tmp_path / "site")


@pytest.fixture
def gate(site: JoinedSite) -> EgressGate:
    return EgressGate(site.home, NAME)


def reply(*objects: str, reason: str | None = None) -> Push:
    return Push(b"", objects or (OBJECT,), reason)


def refused(call: object, *arguments: object) -> bool:
    """Whether the gate refuses; any other error is none of its own."""
    assert callable(call)
    try:
        call(*arguments)
    except ConsiliumError as error:
        assert error.code in ("privacy.egress", "privacy.no-ledger", "study.not-approved"), error
        return True
    return False


def approve(site: JoinedSite, study: Study, kind: str = "train") -> StudyStore:
    """Approve a study and register the object of its first round's reply."""
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "")
    store.permit_outgoing([OBJECT], study.digest, 0, kind)
    return store


def charge(site: JoinedSite, study: Study, update_sha256: str | None) -> None:
    plan = parameters(study)
    assert plan is not None
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        entry = ledger.charge(
            study=study.digest,
            round_index=0,
            event=plan.event_per_round,
            clip_norm=plan.clip_norm,
            delta=plan.delta,
            patients=PATIENTS,
        )
        if update_sha256 is not None:
            ledger.release(entry, update_sha256)


def test_an_object_that_nobody_registered_is_refused(gate: EgressGate) -> None:
    assert refused(gate.check_message, reply())
    assert refused(gate.check_object, OBJECT, CONTENT)


def test_a_reply_of_an_approved_study_passes_and_no_object_beside_it(
    site: JoinedSite, gate: EgressGate
) -> None:
    approve(site, plain_study())
    gate.check_message(reply())
    gate.check_object(OBJECT, CONTENT)
    other = hashlib.sha256(b"patient list").hexdigest()
    assert refused(gate.check_message, reply(OBJECT, other))
    assert refused(gate.check_object, other, b"patient list")


def test_content_under_another_objects_name_is_refused(site: JoinedSite, gate: EgressGate) -> None:
    approve(site, plain_study())
    assert refused(gate.check_object, OBJECT, b"patient list")
    assert refused(gate.check_object, OBJECT, CONTENT + b" ")


def test_a_study_that_is_declined_meanwhile_sends_no_more(
    site: JoinedSite, gate: EgressGate
) -> None:
    store = approve(site, plain_study())
    gate.check_message(reply())
    store.decide(plain_study(), "declined", 0, "no")
    assert refused(gate.check_message, reply())


def test_a_private_update_leaves_only_as_the_ledger_released_it(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    store = approve(site, study)
    assert refused(gate.check_message, reply())  # neither stored nor charged
    kept = store.keep_update(study.digest, 0, b"noisy update", {})
    assert refused(gate.check_message, reply())  # no ledger yet, or nothing charged in it
    charge(site, study, None)
    assert refused(gate.check_message, reply())  # charged and not released
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        found = ledger.find_charge(study.digest, 0)
        assert found is not None
        ledger.release(found, kept.sha256)
    gate.check_message(reply())


def test_a_private_update_other_than_the_released_one_is_refused(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    store = approve(site, study)
    charge(site, study, hashlib.sha256(b"noisy update").hexdigest())
    store.keep_update(study.digest, 0, b"update without noise", {})
    assert refused(gate.check_message, reply())


def test_an_error_reply_passes_with_a_code_and_our_fixed_words_alone(gate: EgressGate) -> None:
    plain = error_reason(ConsiliumError("data.truncated", "Doe", where="Doe.dcm", hint="Doe"))
    assert "Doe" not in plain
    gate.check_message(reply(reason=plain))
    told = json.loads(plain)
    for reason in (
        "",
        "Traceback: patient Doe",
        "null",
        "[]",
        json.dumps({**told, "message": "patient Doe"}, sort_keys=True),
        json.dumps({**told, "extra": "Doe"}, sort_keys=True),
        json.dumps({**told, "code": "Doe.1970"}, sort_keys=True),
        plain + " ",
        json.dumps(told, sort_keys=True, indent=1),
    ):
        assert refused(gate.check_message, reply(reason=reason)), reason
    # And nothing beside it.
    assert refused(gate.check_message, reply(OBJECT, "f" * 64, reason=plain))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_no_words_of_a_task_pass_as_an_error(words: str) -> None:
    from consilium_client.egress import _is_plain_error
    from consilium_client.flower_private import reason_code

    code = reason_code(words)
    assert code is None or not _is_plain_error(words, code)


def test_a_crashed_task_may_be_reported_once_and_in_flowers_words(gate: EgressGate) -> None:
    content = b"metadata " + CRASHED_REASON.encode()
    name = hashlib.sha256(content).hexdigest()
    assert refused(gate.check_object, name, content)  # not announced
    gate.check_message(reply(name, reason=CRASHED_REASON))
    gate.check_object(name, content)
    assert refused(gate.check_object, name, content)  # once

    for large in (b"x" * 5000 + CRASHED_REASON.encode(), b"other words"):
        name = hashlib.sha256(large).hexdigest()
        gate.check_message(reply(name, reason=CRASHED_REASON))
        assert refused(gate.check_object, name, large)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_that_are_no_message_are_refused(body: bytes) -> None:
    for read in (read_push, read_push_object):
        try:
            read(body)
        except ConsiliumError as error:
            assert error.code == "privacy.egress"


def test_an_announcement_of_no_or_several_messages_or_with_content_is_refused() -> None:
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import Message, ObjectTree
    from flwr.proto.recorddict_pb2 import RecordDict

    tree = ObjectTree(object_id="o")
    inline = Message()
    inline.content.CopyFrom(RecordDict())
    inline.content.items.add(key="patients")
    for messages, trees in (
        ([], []),
        ([Message(), Message()], [tree, tree]),
        ([Message()], []),
        ([Message()], [tree, tree]),
        ([inline], [tree]),
    ):
        body = PushMessagesRequest(messages_list=messages, message_object_trees=trees)
        with pytest.raises(ConsiliumError) as caught:
            read_push(body.SerializeToString())
        assert caught.value.code == "privacy.egress"


# --- a task, from its message to its reply -----------------------------------------------------


class _NoHeart:
    """Nobody listens here whom a heartbeat would reach."""

    def __init__(self, _: object) -> None:
        self.start = self.stop = lambda: None


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A task whose message and bundle are given, and whose reply is kept: Flower's ends alone."""
    from flwr.app import Message
    from flwr.supercore import heartbeat
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supernode.runtime import run_clientapp

    from consilium_common.wire.messages import Instructions, to_site

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)
    message = Message(
        content=to_site(Instructions("d" * 64, 0, 5), b"w"), dst_node_id=3, message_type="train"
    )
    message.metadata.__dict__["_message_id"] = message.object_id
    kept = SimpleNamespace(
        message=message,
        fab=SimpleNamespace(hash_str=bundle_hash(), content=bundle()),
        replies=[],
        permitted=[],
        outcomes=[],
    )
    monkeypatch.setattr(heartbeat, "HeartbeatSender", _NoHeart)
    monkeypatch.setattr(
        run_clientapp, "pull_task_input", lambda _: (message, "context", "run", kept.fab)
    )
    monkeypatch.setattr(
        run_clientapp, "push_message", lambda _, reply, __: kept.replies.append(reply)
    )
    monkeypatch.setattr(
        run_clientapp, "push_task_output", lambda *arguments: kept.outcomes.append(arguments[2])
    )
    return kept


def run(task: SimpleNamespace, app: Any) -> None:
    def permit(_: object, reply: object, object_ids: list[str]) -> None:
        assert task.replies == []  # before anything is pushed
        task.permitted.append(object_ids)

    flower_private.run_client_task(
        "127.0.0.1:1",
        "token",
        app,
        permit=permit,
        public_reason=error_reason,
        watch=lambda _: lambda: False,
    )


def answer(message: Any, _: object) -> Any:
    from flwr.app import Message, RecordDict

    return Message(content=RecordDict(), reply_to=message)


def test_our_own_bundle_is_run(task: SimpleNamespace) -> None:
    run(task, answer)
    (reply,) = task.replies
    assert not reply.has_error()
    assert reply.object_id in task.permitted[0]
    assert task.outcomes == ["completed"]


@pytest.mark.parametrize("part", ["hash", "content", "both"])
def test_a_foreign_bundle_is_answered_with_an_error_and_never_run(
    task: SimpleNamespace, part: str
) -> None:
    foreign = bundle() + b"\0"
    if part in ("hash", "both"):
        task.fab.hash_str = hashlib.sha256(foreign).hexdigest()
    if part in ("content", "both"):
        task.fab.content = foreign

    def app(_: object, __: object) -> None:
        raise AssertionError("it was run")

    run(task, app)
    (reply,) = task.replies
    assert reply.has_error()
    assert json.loads(reply.error.reason)["code"] == "run.foreign-bundle"
    assert task.permitted == [[reply.object_id]]
    assert task.outcomes == ["completed"]  # the task is done: silence would stall the round


def test_whatever_goes_wrong_in_a_task_is_a_reply_and_never_silence(
    task: SimpleNamespace,
) -> None:
    for error, code in (
        (ConsiliumError("privacy.budget", "patient Doe has nothing left"), "privacy.budget"),
        (RuntimeError("patient Doe"), "internal.unexpected"),
        (OSError(28, "No space left", "/images/Doe"), "internal.unexpected"),
    ):
        task.replies.clear()

        def breaks(_: object, __: object, error: Exception = error) -> None:
            raise error

        run(task, breaks)
        (reply,) = task.replies
        assert json.loads(reply.error.reason)["code"] == code
        assert "Doe" not in reply.error.reason
        assert task.outcomes[-1] == "completed"
