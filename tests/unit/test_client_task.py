"""A task, from its message to its reply: our own bundle alone, and never silence."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from egress_samples import run_task

from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle, bundle_hash


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

    from consilium_common.wire.messages import Instructions, Reference, to_site

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)
    message = Message(
        content=to_site(Instructions("d" * 64, 0, 5, model=Reference("a" * 64, 1))),
        dst_node_id=3,
        message_type="train",
    )
    message.metadata.__dict__["_message_id"] = message.object_id
    kept = SimpleNamespace(
        message=message,
        fab=SimpleNamespace(hash_str=bundle_hash(), content=bundle()),
        replies=[],
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


def answer(message: Any, _: object) -> Any:
    from flwr.app import Message, RecordDict

    return Message(content=RecordDict(), reply_to=message)


def test_our_own_bundle_is_run(task: SimpleNamespace) -> None:
    run_task(answer)
    (reply,) = task.replies
    assert not reply.has_error()
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

    run_task(app)
    (reply,) = task.replies
    assert reply.has_error()
    assert json.loads(reply.error.reason)["code"] == "run.foreign-bundle"
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

        run_task(breaks)
        (reply,) = task.replies
        assert json.loads(reply.error.reason)["code"] == code
        assert "Doe" not in reply.error.reason
        assert task.outcomes[-1] == "completed"
