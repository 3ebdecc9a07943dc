"""A hundred thousand random and mutated frames at the gateway and at the link.

At every level a peer can reach: raw TCP, TLS, HTTP/2 frames, gRPC messages, protobuf and JSON; and
the answers of an aggregator in an attacker's hands. A frame counts when the other side has taken
it. No process ends, none grows by more than 50 MB, and a healthy site's rounds go on all the while.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from egress_samples import NODE, RUN, Question, update_reply
from federation import Federation, Running, Site, add_hospitals, small_study, wait_for
from fuzzed_frames import (
    fatal_call,
    fleet_requests,
    mutated,
    send_calls,
    send_frames,
    send_raw,
    send_secured,
)
from hostile_answers import HostileAggregator
from raw_wire import PREFACE, client_context, connect, settings
from test_connection_flood import client_hello, credentials, listening

from consilium_client.flower_private_fleet import make_request, node_key
from consilium_common.demo.hospitals import NAMES
from consilium_common.identity.keys import load_tls_key
from consilium_common.study import Study
from consilium_common.wire.channel import CHANNEL_OPTIONS
from consilium_common.wire.methods import (
    ERROR_KEY,
    FLEET_PATHS,
    SERVICE_ROLES,
    STREAM_ROLES,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc

SEED = int(os.environ.get("CONSILIUM_FUZZ_SEED", "20240229"))
#: Frames at each level of the gateway, and at the link; some more than the 100 000 that must be
#: taken, for what is under way when gRPC's server ends is lost.
TCP, TLS, AFTER_TLS, HTTP2, CALLS, FATAL_CALLS, BODIES = 2000, 2000, 400, 74_000, 9500, 100, 8000
LINK_TCP, LINK_TLS, LINK = 500, 500, 5000
AT_LEAST = 100_000
#: Answers of a hostile aggregator.
ANSWERS = 1_000
MOST_GROWTH = 50 * 1024 * 1024
#: Requests per second are not what is tested here: every frame shall reach its level.
LIMITS = {"requests_per_second": 1e6, "requests_burst": 10**6}
HEALTHY, HOSTILE = NAMES[1], "hostile"
ROUNDS = 10


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation(tmp_path_factory.mktemp("fuzz"))
    federation.server("init", "--address", federation.address, "--name", "tests").data  # noqa: B018
    config = json.loads((federation.home / "server.json").read_text())
    (federation.home / "server.json").write_text(json.dumps({**config, "limits": LIMITS}))
    federation.start()
    try:
        federation.join(HOSTILE).launch()
        add_hospitals(federation, (HEALTHY,))
        federation.sites[HOSTILE].wait_until_ready()
        yield federation
    finally:
        federation.__exit__()


class Watched:
    """The main process of a command: its memory, and that it lives."""

    def __init__(self, running: Running | None) -> None:
        assert running is not None
        self._running = running
        self._before = self._resident()

    def grown(self) -> int:
        """Return by how many bytes it has grown; asserts that it is still the same process."""
        assert not self._running.ended(), self._running.output[-2000:]
        return self._resident() - self._before

    def _resident(self) -> int:
        pages = int(Path(f"/proc/{self._running.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def study(name: str) -> dict[str, Any]:
    federation = {"rounds": ROUNDS, "quorum": 1, "deadline_seconds": 60.0}
    return small_study(name, federation=federation)


class Studies:
    """A healthy site's studies, one after the other, until the end of the block."""

    def __init__(self, federation: Federation) -> None:
        self.found: list[dict[str, Any]] = []
        self.problems: list[BaseException] = []
        self._ended = threading.Event()
        self._federation = federation
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Studies:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
        assert not self.problems, self.problems

    def rounds(self) -> list[dict[str, Any]]:
        return [row for data in self.found for row in data["rounds"]]

    def _work(self) -> None:
        try:
            while not self._ended.is_set():
                digest = self._federation.propose(study(f"healthy-{len(self.found)}"))
                self._federation.approve(digest, HEALTHY)
                self._federation.study("run", digest).data  # noqa: B018
                self.found.append(self._federation.study("watch", digest).data)
        except BaseException as problem:
            self.problems.append(problem)


def bodies(source: random.Random, fleet: dict[str, bytes]) -> tuple[str, bytes]:
    """Return a method and a body: a mutated request, random bytes, or hostile JSON."""
    if source.random() < 0.5:
        call = source.choice(list(FLEET_PATHS))
        return fleet_method(call), altered(source, fleet[call])
    body = source.choice(
        (
            b"[" * 5000,
            b'{"a":' * 3000,
            b'{"session": 1e999, "version": [], "protocol": {}}',
            b'{"version": "\\ud800", "session": "x"}',
            mutated(source, b'{"version": "1", "session": "a", "protocol": 1}'),
            mutated(
                source, b'{"study": "%s", "sha256": "%s", "bytes": 99}' % (b"d" * 64, b"a" * 64)
            ),
            mutated(source, b'{"study": "%s", "sha256": "../x", "offset": -1}' % (b"d" * 64)),
            source.randbytes(60),
        )
    )
    return source.choice([*SERVICE_ROLES, *STREAM_ROLES]), body


def altered(source: random.Random, content: bytes) -> bytes:
    """Return it mutated, and never as it was: an honest call may be held open, or be obeyed."""
    found = content
    while found == content:
        found = mutated(source, content)
    return found


def node_of(site: Site) -> int:
    """Return a site's node, and that of the samples while it has none."""
    try:
        return int(json.loads((site.home / "run" / "node.json").read_text())["node_id"])
    except FileNotFoundError:
        return NODE


def requests_of(site: Site) -> dict[str, bytes]:
    """Return a request of every Fleet call, as this site's own SuperNode writes it."""
    key = load_tls_key(site.home / "identity" / "site-key.pem")
    return fleet_requests(node_of(site), node_key(key.public_key()))


async def send_bodies(federation: Federation, source: random.Random) -> int:
    """Make calls of the gateway; those that it answers were taken."""
    from consilium_server.flower_private import public_key_header

    site = federation.sites[HOSTILE]
    public = load_tls_key(site.home / "identity" / "site-key.pem").public_key()
    metadata = [("flwr-public-key", public_key_header(public))]
    fleet = requests_of(site)
    taken = 0
    async with grpc.aio.secure_channel(
        federation.address, credentials(site).for_grpc(), options=CHANNEL_OPTIONS
    ) as channel:

        async def one() -> None:
            nonlocal taken
            method, body = bodies(source, fleet)
            try:
                # A stream takes one message as well as many.
                await channel.unary_unary(method)(body, timeout=20, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if ERROR_KEY not in dict(error.trailing_metadata() or ()):
                    return
            taken += 1

        for _ in range(BODIES // 30):
            await asyncio.gather(*(one() for _ in range(30)))
    return taken


class LinkPort:
    """A site's link as another process on its machine reaches it."""

    def __init__(self, federation: Federation, site: Site) -> None:
        assert site.running is not None
        (self.port,) = {
            found for _, found in listening({site.running.pid}) if found != federation.port
        }
        self._context = ssl._create_unverified_context()
        self._open: http.client.HTTPSConnection | None = None

    def post(self, path: str, body: bytes) -> tuple[int, bytes] | None:
        """Return status and content of the answer; None where there was none."""
        if self._open is None:
            self._open = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=30, context=self._context
            )
        try:
            self._open.request("POST", f"/v1/fleet/{path}", body)
            answer = self._open.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self._open.close()
            self._open = None
            return None

    def connect(self) -> ssl.SSLSocket:
        return connect(self.port, self._context)

    def send(self, source: random.Random, fleet: dict[str, bytes], count: int) -> int:
        """Send random and mutated requests, and what is no HTTP; return how many were taken."""
        head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
        taken = send_secured(self.connect, (altered(source, head) for _ in range(count // 10)))
        for _ in range(count - count // 10):
            if source.random() < 0.2:
                path = source.choice([*FLEET_PATHS.values(), "x", "../control/run", "%00"])
                body = source.randbytes(source.choice((0, 3, 40, 400)))
            else:
                call = source.choice(list(FLEET_PATHS))
                path, body = FLEET_PATHS[call], altered(source, fleet[call])
            taken += self.post(path, body) is not None
        return taken


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_hundred_thousand_frames_crash_nothing_and_leak_nothing(federation: Federation) -> None:
    source = random.Random(SEED)
    port, hostile = federation.port, federation.sites[HOSTILE]
    link_port = LinkPort(federation, hostile)
    fleet = requests_of(hostile)
    context, hello = client_context(hostile.home / "identity"), client_hello()

    def open_connection() -> ssl.SSLSocket:
        # gRPC's server may just be listening again.
        return wait_for(lambda: connected(port, context), "a connection", timeout=20, pause=0.05)

    def garbage(count: int) -> Iterator[bytes]:
        return (source.randbytes(source.randint(1, 500)) for _ in range(count))

    def hellos(count: int) -> Iterator[bytes]:
        return (mutated(source, hello) for _ in range(count))

    def fatal_calls(count: int) -> Iterator[bytes]:
        return (PREFACE + settings() + fatal_call(source) for _ in range(count))

    with Studies(federation) as studies:
        # What is loaded and pooled once is no leak: each level is run a little first.
        send_raw(port, garbage(50))
        send_frames(open_connection, source, 500)
        send_calls(open_connection, source, 400)
        send_raw(link_port.port, hellos(50))
        link_port.send(source, fleet, 500)
        gateway, link = Watched(federation.running), Watched(hostile.running)
        begin = time.perf_counter()
        taken = {
            "tcp": send_raw(port, garbage(TCP)),
            "tls": send_raw(port, hellos(TLS)),
            "after tls": send_secured(open_connection, garbage(AFTER_TLS)),
            "http/2": send_frames(open_connection, source, HTTP2),
            "grpc": send_calls(open_connection, source, CALLS),
            "grpc headers": send_secured(open_connection, fatal_calls(FATAL_CALLS)),
            "bodies": asyncio.run(send_bodies(federation, source)),
            "link tcp": send_raw(link_port.port, garbage(LINK_TCP)),
            "link tls": send_raw(link_port.port, hellos(LINK_TLS)),
            "link": link_port.send(source, fleet, LINK),
        }
        seconds = time.perf_counter() - begin
    rows = studies.rounds()
    assert federation.running is not None
    print(
        f"seed {SEED}: {sum(taken.values())} frames taken in {seconds:.0f} s {taken};"
        f" gateway grew {gateway.grown() / 1e6:.1f} MB, link {link.grown() / 1e6:.1f} MB;"
        f" {len(rows)} rounds of the healthy site, slowest {max(r['seconds'] for r in rows):.2f} s"
    )
    assert sum(taken.values()) >= AT_LEAST
    assert gateway.grown() < MOST_GROWTH
    assert link.grown() < MOST_GROWTH
    # Paths that are no text are among the frames: a server of grpcio's own would end of one.
    assert "server ended" not in federation.running.output
    for data in studies.found:
        assert data["state"] == "finished", data["reason"]
        assert [row["number"] for row in data["rounds"]] == list(range(ROUNDS))
        assert data["alarms"] == []
    assert all(row["sites"] == [HEALTHY] and row["dropped"] == {} for row in rows)
    # The site that was abused is still a member.
    assert hostile("studies").status == 0


def connected(port: int, context: ssl.SSLContext) -> ssl.SSLSocket | None:
    try:
        return connect(port, context)
    except OSError:
        return None


def spoken(site: Site, question: Question) -> Iterator[tuple[str, bytes]]:
    """Yield what a SuperNode says to its link around one message, as far as nothing is held."""
    yield "ActivateNode", requests_of(site)["ActivateNode"]
    requests = requests_of(site)
    for call in ("PullMessages", "SendNodeHeartbeat"):
        yield call, requests[call]
    own: dict[str, Any] = {"node": {"node_id": node_of(site)}, "run_id": RUN}
    yield "GetRun", make_request("GetRun", **own).SerializeToString()
    yield "GetFab", make_request("GetFab", **own).SerializeToString()
    for name in question.objects:
        yield "PullObject", make_request("PullObject", **own, object_id=name).SerializeToString()
    reply = update_reply(question, b"x" * 100).request
    reply.node.node_id = reply.messages_list[0].metadata.src_node_id = node_of(site)
    yield "PushMessages", reply.SerializeToString()
    yield "DeactivateNode", requests["DeactivateNode"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_aggregator_s_mutated_answers_crash_and_fill_no_link(federation: Federation) -> None:
    source, site = random.Random(SEED), federation.sites[HEALTHY]
    answered = Study.model_validate(study("answered"))
    assert federation.propose(answered.to_canonical()) == answered.digest
    federation.approve(answered.digest, HEALTHY)
    port = LinkPort(federation, site)
    federation.stop()
    aggregator = HostileAggregator(federation, answered, source)

    def ask(count: int) -> None:
        """Call as the SuperNode does until the link has taken so many mutated answers."""
        taken = 0
        while taken < count:
            for call, body in spoken(site, aggregator.question):
                before = aggregator.sent
                if port.post(FLEET_PATHS[call], body) is not None:
                    taken += aggregator.sent > before

    with aggregator.serving():
        ask(ANSWERS // 5)
        link = Watched(site.running)
        begin = time.perf_counter()
        ask(ANSWERS)
        seconds = time.perf_counter() - begin
    print(f"{ANSWERS} mutated answers in {seconds:.0f} s; link grew {link.grown() / 1e6:.1f} MB")
    assert link.grown() < MOST_GROWTH
    # It answers on, and is there for the true aggregator.
    assert port.post("x", b"") == (404, b"")
    federation.start()
    wait_for(
        lambda: next(
            row["online"]
            for row in federation.server("sites").data["sites"]
            if row["name"] == HEALTHY
        ),
        "the site to be back",
    )
