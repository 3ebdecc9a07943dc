"""The link forwards the Fleet calls, lets out what the gate permits, and answers nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from egress_samples import NODE, RUN, Question, plain_study
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from site_samples import JoinedSite, joined_site

from consilium_client import link
from consilium_client.executor import Arrivals
from consilium_client.flower_private import MessageSource
from consilium_client.flower_private_fleet import make_request, node_key, read_request
from consilium_client.link import Link
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle, bundle_hash
from consilium_common.wire.channel import rpc_error
from consilium_common.wire.methods import ERROR_KEY, FLEET_PATHS


class Aggregator:
    """Stands in for the channel: keeps what was sent and answers as it is told."""

    def __init__(self, answer: bytes | Exception = b"answer", **trailing: str) -> None:
        self.answer = answer
        self.trailing = trailing
        self.calls: list[tuple[str, bytes, list[tuple[str, str]]]] = []

    def unary(self, method: str) -> Callable[..., Any]:
        def invoke(body: bytes, *, metadata: Any = (), timeout: float) -> Call:
            self.calls.append((method, body, list(metadata)))
            return Call(self)

        return invoke

    async def explain(self, error: Any) -> ConsiliumError:
        return rpc_error(error, "aggregator:443")

    async def close(self) -> None:
        """Nothing is open."""


class Call:
    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> bytes:
        if isinstance(self._aggregator.answer, Exception):
            raise self._aggregator.answer
        return self._aggregator.answer

    async def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple((key.replace("_", "-"), v) for key, v in self._aggregator.trailing.items())


@pytest.fixture
def site(tmp_path: Path) -> JoinedSite:
    return joined_site(tmp_path / "site")


QUESTION = Question(plain_study())
OWN = {"node": {"node_id": NODE}}


def know(link: Link) -> None:
    """Let the link have activated its node and passed on a question."""
    link._calls.node_id = NODE
    link._calls.answered("PullMessages", None, QUESTION.response())


def honest(site: JoinedSite, call: str) -> bytes:
    """Return the body with which a SuperNode makes a protocol call."""
    key = {"public_key": node_key(site.key.public_key())}
    run = {**OWN, "run_id": RUN}
    values: dict[str, dict[str, Any]] = {
        "RegisterNode": key,
        "ActivateNode": {**key, "heartbeat_interval": 30},
        "DeactivateNode": {"node_id": NODE},
        "UnregisterNode": {"node_id": NODE},
        "SendNodeHeartbeat": {**OWN, "heartbeat_interval": 30},
        "PullMessages": OWN,
        "GetRun": run,
        "GetFab": run,
        "PullObject": {**run, "object_id": QUESTION.message_id},
        "ConfirmMessageReceived": {**run, "message_object_id": QUESTION.message_id},
    }
    body: bytes = make_request(call, **values[call]).SerializeToString()
    return body


def ask(
    site: JoinedSite,
    path: str,
    body: bytes = b"",
    *,
    aggregator: Aggregator | None = None,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    meanwhile: Callable[[Link], Awaitable[None]] | None = None,
) -> tuple[int, bytes, list[str]]:
    """Send the link one HTTP request; return status, body, and what it told the operator."""
    said: list[str] = []

    async def scenario() -> tuple[int, bytes]:
        link = Link(site.home, site.identity, said.append)
        await link._connection.close()
        link._connection = aggregator or Aggregator(b"")  # type: ignore[assignment]
        know(link)
        scope = {
            "type": "http",
            "path": path,
            "method": method,
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        half = len(body) // 2
        events = [
            {"type": "http.request", "body": body[:half], "more_body": True},
            {"type": "http.request", "body": body[half:]},
        ]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return events.pop(0)

        async def send(event: dict[str, Any]) -> None:
            sent.append(event)

        serving = asyncio.create_task(link.application(scope, receive, send))
        if meanwhile is not None:
            await meanwhile(link)
        await asyncio.wait_for(serving, 10)
        await link.close()
        return sent[0]["status"], sent[1]["body"]

    return (*asyncio.run(scenario()), said)


@pytest.mark.parametrize("content", [b"", b"no bundle", bundle() + b"x"])
def test_code_that_is_not_the_installed_release_never_reaches_the_supernode(
    site: JoinedSite, content: bytes
) -> None:
    answer = GetFabResponse(fab=Fab(hash_str=bundle_hash(), content=content)).SerializeToString()
    status, body, said = ask(
        site,
        f"/v1/fleet/{FLEET_PATHS['GetFab']}",
        honest(site, "GetFab"),
        aggregator=Aggregator(answer),
    )
    assert (status, body) == (403, b"")
    assert "run.foreign-bundle" in said[0]


def test_every_fleet_call_but_the_judged_ones_passes_as_flower_writes_it(site: JoinedSite) -> None:
    for call, path in FLEET_PATHS.items():
        if call in ("PushMessages", "PushObject", "ConfirmMessageReceived"):
            continue
        own = GetFabResponse(fab=Fab(content=bundle())).SerializeToString()
        aggregator = Aggregator(own if call == "GetFab" else b"")
        body = honest(site, call)
        status, _, said = ask(
            site, f"/v1/fleet/{path}", body, aggregator=aggregator, headers={"flwr-words": "Doe"}
        )
        assert (status, said) == (200, []), call
        ((method, sent, headers),) = aggregator.calls
        assert (method, sent) == (f"/flwr.proto.Fleet/{call}", body)
        assert "Doe" not in str(headers)
        assert dict(headers)["flwr-public-key"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/pull-messages/"),
        ("POST", "/v1/fleet/"),
        ("POST", "/v1/fleet/PullMessages"),
        ("POST", "/v2/fleet/pull-messages"),
        ("POST", "/v1/fleet/../fleet/pull-messages"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/"),
        ("OPTIONS", "/v1/fleet/pull-messages"),
    ],
)
def test_nothing_else_is_answered(site: JoinedSite, method: str, path: str) -> None:
    aggregator = Aggregator()
    assert ask(site, path, aggregator=aggregator, method=method)[:2] == (404, b"")
    assert aggregator.calls == []


def test_a_body_larger_than_any_honest_one_is_refused(site: JoinedSite) -> None:
    aggregator = Aggregator()
    body = bytes(256 * 1024 + 1)  # models and updates go another way: no tensor fits
    assert ask(site, "/v1/fleet/push-object", body, aggregator=aggregator)[0] == 413
    assert aggregator.calls == []


@pytest.mark.parametrize("path", ["push-messages", "push-object"])
@pytest.mark.parametrize("body", [b"", b"\xff\xff", b"patients"])
def test_what_the_gate_does_not_know_ends_here(site: JoinedSite, path: str, body: bytes) -> None:
    aggregator = Aggregator()
    status, _, said = ask(site, f"/v1/fleet/{path}", body, aggregator=aggregator)
    # 403 ends the matter for Flower; after 401 or 503 it would try for ever.
    assert status == 403
    assert aggregator.calls == []
    assert "privacy.egress" in said[0]


def grpc_error(code: str | None) -> Exception:
    """Return what gRPC raises when the aggregator refuses with one of our codes, or is away."""
    from consilium_common.wire.tls13 import grpc

    trailing = grpc.aio.Metadata()
    if code is not None:
        error = ConsiliumError(code, "no")
        trailing.add(ERROR_KEY, canonical_json(error.to_dict()))
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        trailing,
        details="",
        debug_error_string="",
    )


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("identity.revoked", 401),  # the SuperNode ends
        ("network.superlink", 503),  # the SuperNode tries again
        ("internal.unexpected", 503),
        (None, 503),
    ],
)
def test_a_refusal_becomes_the_status_that_makes_flower_do_the_right_thing(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch, code: str | None, status: int
) -> None:
    monkeypatch.setattr(link, "_REACHED_SECONDS", 0.01)  # it waits for the aggregator first
    aggregator = Aggregator(grpc_error(code))
    body = honest(site, "GetRun")
    found, _, said = ask(site, "/v1/fleet/get-run", body, aggregator=aggregator)
    assert found == status
    assert bool(said) == (status == 401)


@pytest.mark.parametrize("said", [b"", b"[]", b"3", b"[" * 5000, b"\xff"])
def test_an_error_that_is_none_leaves_the_link_as_it_was(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(link, "_REACHED_SECONDS", 0.01)
    error = grpc_error("internal.unexpected")
    error._trailing_metadata = ((ERROR_KEY, said),)  # type: ignore[attr-defined]
    body = honest(site, "GetRun")
    assert ask(site, "/v1/fleet/get-run", body, aggregator=Aggregator(error))[0] == 503
    assert rpc_error(error, "aggregator:443").code == "network.bad-answer"


@pytest.mark.parametrize("status", ["", "x", "-1", "99999999", "2\n0"])
def test_a_status_that_is_none_of_http_s_is_a_bad_answer(site: JoinedSite, status: str) -> None:
    aggregator = Aggregator(b"body", consilium_http_status=status)
    found, _, said = ask(site, "/v1/fleet/get-run", honest(site, "GetRun"), aggregator=aggregator)
    assert found == 503
    assert "network.bad-answer" in said[0]


def test_where_the_site_is_known_a_node_is_refused_that_the_aggregator_has_forgotten(
    site: JoinedSite,
) -> None:
    async def greeted(link: Link) -> None:
        link._connected = True

    aggregator = Aggregator(grpc_error("identity.refused"))
    body = honest(site, "GetRun")
    path = "/v1/fleet/get-run"
    found, _, said = ask(site, path, body, aggregator=aggregator, meanwhile=greeted)
    assert (found, said) == (401, [])


def test_flowers_own_status_passes_through(site: JoinedSite) -> None:
    aggregator = Aggregator(b"body", consilium_http_status="409")
    body = honest(site, "GetRun")
    assert ask(site, "/v1/fleet/get-run", body, aggregator=aggregator)[:2] == (409, b"body")


def test_an_answer_that_cannot_be_read_is_a_fault_of_the_aggregator_and_no_refusal(
    site: JoinedSite,
) -> None:
    aggregator = Aggregator(b"\xff\xff")
    body = honest(site, "PullMessages")
    status, _, said = ask(site, "/v1/fleet/pull-messages", body, aggregator=aggregator)
    assert status == 503
    assert "network.bad-answer" in said[0]
    assert not site.home.refused.exists()


def test_the_node_is_remembered_so_that_it_can_be_freed_after_a_crash(site: JoinedSite) -> None:
    from flwr.proto.fleet_pb2 import ActivateNodeResponse

    content = ActivateNodeResponse(node_id=77).SerializeToString()
    body = honest(site, "ActivateNode")
    ask(site, "/v1/fleet/activate-node", body, aggregator=Aggregator(content))
    assert (site.home.run / "node.json").read_text() == '{"node_id": 77}'

    aggregator = Aggregator()

    async def scenario() -> None:
        link = Link(site.home, site.identity, print)
        await link._connection.close()
        link._connection = aggregator
        await link.free_node()
        await link.free_node()  # there is none any more
        await link.close()

    asyncio.run(scenario())
    ((method, body, headers),) = aggregator.calls
    assert method == "/flwr.proto.Fleet/DeactivateNode"
    assert body
    assert "flwr-signature" in dict(headers)


def test_a_supernode_that_said_goodbye_needs_no_other(site: JoinedSite) -> None:
    from flwr.proto.fleet_pb2 import ActivateNodeResponse

    content = ActivateNodeResponse(node_id=77).SerializeToString()

    body = honest(site, "ActivateNode")
    ask(site, "/v1/fleet/activate-node", body, aggregator=Aggregator(content))
    assert (site.home.run / "node.json").exists()
    assert ask(site, "/v1/fleet/deactivate-node", honest(site, "DeactivateNode"))[0] == 200
    assert not (site.home.run / "node.json").exists()


def test_a_confirmation_is_held_until_the_task_has_replied(site: JoinedSite) -> None:
    home = site.home
    arrivals = Arrivals(home.wake_socket)
    order: list[str] = []

    async def reply(link: Link) -> None:
        await asyncio.sleep(0.2)
        order.append("replied")
        home.replied.touch()

    body = honest(site, "ConfirmMessageReceived")
    status, _, _ = ask(site, "/v1/fleet/confirm-message-received", body, meanwhile=reply)
    assert status == 200
    assert order == ["replied"]
    assert arrivals.wait(1)  # the executor heard of it meanwhile
    assert not arrivals.watch(QUESTION.message_id)()
    assert arrivals.watch("other")() is False  # the question was taken before


def test_a_reply_that_was_there_first_holds_nothing_up(site: JoinedSite) -> None:
    home = site.home
    home.replied.touch()
    os.utime(home.replied, ns=(1, 1))

    async def scenario() -> float:
        link = Link(home, site.identity, print)
        await link._connection.close()
        link._connection = Aggregator(b"")  # type: ignore[assignment]
        know(link)
        await link._protocol_call("PullMessages", make_request("PullMessages", **OWN))
        os.utime(home.replied, ns=(2, 2))  # the task was quicker than the confirmation
        clock = asyncio.get_running_loop().time
        started = clock()
        body = honest(site, "ConfirmMessageReceived")
        await link._protocol_call(
            "ConfirmMessageReceived", read_request("ConfirmMessageReceived", body)
        )
        await link.close()
        return clock() - started

    assert asyncio.run(scenario()) < 2


def test_a_call_that_is_held_when_the_site_stops_ends_without_a_traceback(
    site: JoinedSite,
) -> None:
    async def scenario() -> list[int]:
        link = Link(site.home, site.identity, print)
        await link._connection.close()
        link._connection = Aggregator(b"")  # type: ignore[assignment]
        know(link)
        sent: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": honest(site, "ConfirmMessageReceived")}

        async def send(event: dict[str, Any]) -> None:
            if "status" in event:
                sent.append(event["status"])

        scope = {
            "type": "http",
            "path": "/v1/fleet/confirm-message-received",
            "method": "POST",
            "headers": [],
        }
        serving = asyncio.create_task(link.application(scope, receive, send))
        await asyncio.sleep(0.1)
        assert not serving.done()
        serving.cancel()
        await serving
        await link.close()
        return sent

    assert asyncio.run(scenario()) == [503]


# --- the executor's side -----------------------------------------------------------------------


class Runtime:
    """Stands in for the SuperNode: a message of two parts, of which some are there."""

    def __init__(self, *available: str) -> None:
        self.available = set(available)
        self.asked = 0

    def PullMessages(self, _: object) -> Any:
        from flwr.proto.message_pb2 import ObjectTree
        from flwr.proto.runtime_pb2 import PullAppMessagesResponse

        return PullAppMessagesResponse(message_object_trees=[ObjectTree(object_id="ours")])

    def PullObject(self, request: Any) -> Any:
        from flwr.proto.message_pb2 import PullObjectResponse

        self.asked += 1
        there = request.object_id in self.available
        return PullObjectResponse(
            object_found=request.object_id != "foreign",
            object_available=there,
            object_content=b"content" if there else b"",
        )


def pull(source: MessageSource, name: str) -> bytes:
    from flwr.proto.message_pb2 import PullObjectRequest

    return bytes(source.PullObject(PullObjectRequest(object_id=name)).object_content)


@pytest.fixture
def arrivals(tmp_path: Path) -> Iterator[tuple[Arrivals, Callable[[str], None]]]:
    path = tmp_path / "wake"
    made = Arrivals(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        yield made, lambda message_id: void(link.sendto(message_id.encode(), str(path)))


def void(_: object) -> None:
    """Drop a result."""


def test_a_part_that_is_still_coming_is_taken_as_soon_as_it_is_there(
    arrivals: tuple[Arrivals, Callable[[str], None]],
) -> None:
    heard, tell = arrivals
    runtime = Runtime("first")
    source = MessageSource(runtime, heard.watch)
    source.PullMessages(None)
    assert pull(source, "first") == b"content"
    assert pull(source, "foreign") == b""  # Flower's to judge

    def arrive() -> None:
        tell("ours")
        runtime.available.add("second")

    timer = threading.Timer(0.2, arrive)
    timer.start()
    started = time.monotonic()
    assert pull(source, "second") == b"content"
    assert time.monotonic() - started < 2
    timer.join()


def test_the_rest_of_a_message_is_given_up_once_the_next_message_has_come_whole(
    arrivals: tuple[Arrivals, Callable[[str], None]],
) -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

    heard, tell = arrivals
    heard.watch("before")  # a message that was taken and done
    tell("before")  # and of which word comes late
    runtime = Runtime()
    source = MessageSource(runtime, heard.watch)
    source.PullMessages(None)
    timer = threading.Timer(0.3, lambda: tell("next"))
    timer.start()
    with pytest.raises(ObjectPullError, match="never came whole"):
        pull(source, "second")
    assert runtime.asked > 1  # the late word alone was no reason
    timer.join()
    # The next one is there to be taken, and is not given up.
    assert not heard.watch("next")()


def test_word_that_came_before_a_task_was_taken_counts_as_well(
    arrivals: tuple[Arrivals, Callable[[str], None]],
) -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

    heard, tell = arrivals
    tell("next")
    assert heard.wait(1)  # woken by it, the executor is given the older task first
    source = MessageSource(Runtime(), heard.watch)
    source.PullMessages(None)
    with pytest.raises(ObjectPullError):
        pull(source, "second")


def test_what_waits_ends_with_its_task(arrivals: tuple[Arrivals, Callable[[str], None]]) -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

    source = MessageSource(Runtime(), arrivals[0].watch)
    source.PullMessages(None)
    threading.Timer(0.1, source.end).start()
    with pytest.raises(ObjectPullError):
        pull(source, "second")
    assert not arrivals[0].wait(0.01)
