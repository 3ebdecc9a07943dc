"""Nothing passes the gate that was not approved, stored, and in a private study charged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from site_samples import NAME, JoinedSite, joined_site, plain_study, private_study

from consilium_client.egress import EgressGate, error_reason
from consilium_client.flower_private import (
    CRASHED_REASON,
    Push,
    object_ids,
    read_push,
    read_push_object,
)
from consilium_client.store import StudyStore
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Purpose
from consilium_common.ledger.store import Ledger
from consilium_common.privacy.accounting import parameters
from consilium_common.study import Study
from consilium_common.wire.messages import to_server

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


def evaluating_study() -> Study:
    """Return a private study that releases noised figures."""
    evaluation = {"release": "private", "epsilon": 0.5}
    return Study.model_validate({**private_study().to_canonical(), "evaluation": evaluation})


def charge(
    site: JoinedSite, study: Study, update_sha256: str | None, purpose: Purpose = "training"
) -> None:
    plan = parameters(study)
    assert plan is not None
    event = plan.event_per_round if purpose == "training" else plan.evaluation_event
    assert event is not None
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        entry = ledger.charge(
            study=study.digest,
            round_index=0,
            event=event,
            clip_norm=plan.clip_norm,
            delta=plan.delta,
            patients=PATIENTS,
            purpose=purpose,
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


def reply_of(site: JoinedSite, study: Study, kind: str, content: RecordDict) -> Push:
    """Register a reply with this content as the executor does, and announce it."""
    objects = [OBJECT, *object_ids(content)]
    StudyStore(site.home).permit_outgoing(objects, study.digest, 0, kind)
    return reply(*objects)


def release(site: JoinedSite, study: Study, sha256: str, purpose: Purpose = "training") -> None:
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        found = ledger.find_charge(study.digest, 0, purpose)
        assert found is not None
        ledger.release(found, sha256)


def test_a_private_update_leaves_only_as_the_ledger_released_it(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    store = approve(site, study)
    update = reply_of(site, study, "train", to_server(b"noisy update", None))
    assert refused(gate.check_message, update)  # neither stored nor charged
    kept = store.keep_update(study.digest, 0, b"noisy update", {})
    assert refused(gate.check_message, update)  # no ledger yet, or nothing charged in it
    charge(site, study, None)
    assert refused(gate.check_message, update)  # charged and not released
    release(site, study, kept.sha256)
    gate.check_message(update)


@pytest.mark.parametrize(
    "content",
    [
        to_server(b"update without noise", None),
        to_server(b"noisy update", {"loss": 0.25}),
        to_server(None, {"loss": 0.25}),
        to_server(None, None),
    ],
    ids=["another update", "a loss beside it", "a loss", "nothing"],
)
def test_a_private_reply_holds_the_released_update_and_nothing_else(
    site: JoinedSite, gate: EgressGate, content: RecordDict
) -> None:
    study = private_study()
    approve(site, study)
    kept = StudyStore(site.home).keep_update(study.digest, 0, b"noisy update", {})
    charge(site, study, kept.sha256)
    gate.check_message(reply_of(site, study, "train", to_server(b"noisy update", None)))
    assert refused(gate.check_message, reply_of(site, study, "train", content))
    # Called an evaluation it leaves no more than called an update; an empty one says nothing.
    if content:
        assert refused(gate.check_message, reply_of(site, study, "evaluate", content))


def test_a_private_update_other_than_the_released_one_is_refused(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = private_study()
    store = approve(site, study)
    charge(site, study, hashlib.sha256(b"noisy update").hexdigest())
    store.keep_update(study.digest, 0, b"update without noise", {})
    content = to_server(b"update without noise", None)
    assert refused(gate.check_message, reply_of(site, study, "train", content))


FIGURES = {"sum": 1.0625}


@pytest.mark.parametrize("release_kind", ["none", "private"])
def test_an_evaluation_without_figures_passes_in_a_private_study(
    site: JoinedSite, gate: EgressGate, release_kind: str
) -> None:
    study = evaluating_study() if release_kind == "private" else private_study()
    approve(site, study)
    gate.check_message(reply_of(site, study, "evaluate", to_server(None, None)))
    assert refused(gate.check_message, reply_of(site, study, "evaluate", to_server(None, FIGURES)))


def test_noised_figures_leave_only_as_the_ledger_released_them(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = evaluating_study()
    store = approve(site, study)
    figures = reply_of(site, study, "evaluate", to_server(None, FIGURES))
    assert refused(gate.check_message, figures)  # neither stored nor charged
    kept = store.keep_update(
        study.digest, 0, canonical_json(FIGURES), FIGURES, purpose="evaluation"
    )
    charge(site, study, None, "evaluation")
    assert refused(gate.check_message, figures)  # charged and not released
    release(site, study, kept.sha256, "evaluation")
    gate.check_message(figures)
    for other in (
        {"sum": 1.0625000000000002},
        {**FIGURES, "cases": 3.0},
        {"total": 1.0625},
        {"sum": 1},
    ):
        found = reply_of(site, study, "evaluate", to_server(None, other))
        assert refused(gate.check_message, found), other
    blob = reply_of(site, study, "evaluate", to_server(b"patient list", FIGURES))
    assert refused(gate.check_message, blob)


def test_figures_do_not_leave_under_the_charge_of_a_training(
    site: JoinedSite, gate: EgressGate
) -> None:
    study = evaluating_study()
    store = approve(site, study)
    kept = store.keep_update(
        study.digest, 0, canonical_json(FIGURES), FIGURES, purpose="evaluation"
    )
    charge(site, study, kept.sha256)
    assert refused(gate.check_message, reply_of(site, study, "evaluate", to_server(None, FIGURES)))


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
