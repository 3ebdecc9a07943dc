"""Random and mutated frames for every level of the wire, and senders that count what was taken.

A frame counts only when the other side shows that it took it: it answers the PING or the call that
came with it, or ends the connection by itself.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from egress_samples import Question, Reply, plain_study, reference
from raw_wire import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    call_headers,
    frame,
    grpc_message,
    settings,
)

from consilium_client.flower_private_fleet import heartbeat_seconds, make_request
from consilium_common.wire.messages import to_server
from consilium_common.wire.methods import FLEET_PATHS, SERVICE_ROLES, STREAM_ROLES, fleet_method

#: So many frames or calls go to one connection; a last one, which may end it, follows.
BUNCH = 100
#: gRPC answers calls that it cannot read only after a while: so many connections wait at a time.
AT_ONCE = 8
_MARK = b"consiliu"
Open = Callable[[], ssl.SSLSocket]


def mutated(source: random.Random, content: bytes) -> bytes:
    """Return ``content`` with bytes changed, cut out, doubled or cut off."""
    out = bytearray(content or b"\0")
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(out))
        match source.randrange(5):
            case 0:
                out[at] = source.randrange(256)
            case 1:
                out[at] ^= 1 << source.randrange(8)
            case 2:
                out[at:at] = out[max(0, at - 8) : at]
            case 3 if len(out) > 1:
                del out[at : at + source.randint(1, 8)]
                out = out or bytearray(b"\0")
            case _:
                out[at:] = source.randbytes(source.randint(1, 64))
    return bytes(out)


# --- what is sent ---------------------------------------------------------------------------------


def ignored_frame(source: random.Random, stream: int) -> bytes:
    """Return a frame whose content is random and which a server must put up with (RFC 9113)."""
    payload = source.randbytes(source.choice((0, 4, 8, 100)))
    number = source.randrange(1, 1000)
    match source.randrange(7):
        case 0:
            return frame(WINDOW_UPDATE, 0, 0, number.to_bytes(4, "big"))
        case 1:
            identifier = source.randrange(0x100, 0xF000)
            return frame(SETTINGS, 0, 0, identifier.to_bytes(2, "big") + source.randbytes(4))
        case 2:
            return frame(PRIORITY, source.randrange(256), stream, source.randbytes(5))
        case 3:
            # Of a call that has ended.
            return frame(RST_STREAM, source.randrange(256), stream, source.randbytes(4))
        case _:
            # Unknown kinds must be ignored (section 4.1).
            return frame(source.randrange(10, 200), source.randrange(256), stream, payload)


def fatal_frame(source: random.Random) -> bytes:
    """Return a random frame, or a mutated one: it may end the connection."""
    kind = source.choice((*range(10), source.randrange(256)))
    payload = source.randbytes(source.choice((0, 4, 5, 6, 8, 16, 100)))
    stream = source.choice((0, 1, 2, source.randrange(2**32)))
    content = frame(kind, source.randrange(256), stream, payload)
    return mutated(source, content) if source.random() < 0.5 else content


def call(source: random.Random, stream: int) -> bytes:
    """Return a call whose message lies about length, compression or number."""
    methods = [*SERVICE_ROLES, *STREAM_ROLES, *map(fleet_method, FLEET_PATHS)]
    methods += ["/x", "/", "/flwr.proto.Control/Run"]
    content = source.randbytes(source.choice((0, 1, 20, 300)))
    message = grpc_message(
        content,
        flag=source.choice((0, 0, 1, 255)),
        length=source.choice((None, 0, 1, 10**6, 2**32 - 1)),
    )
    message = mutated(source, message) if source.random() < 0.3 else message
    headers = call_headers(
        source.choice(methods),
        (b"grpc-encoding", source.choice((b"identity", b"gzip", b"\xff", b"deflate"))),
        (b"grpc-timeout", source.choice((b"1S", b"99999999H", b"-1", b"x"))),
    )
    return frame(HEADERS, END_HEADERS, stream, headers) + frame(DATA, END_STREAM, stream, message)


def fatal_call(source: random.Random) -> bytes:
    """Return a call with mutated headers: it may end the connection, and gRPC's server too."""
    headers = mutated(source, call_headers(source.choice((*SERVICE_ROLES, "/x"))))
    return frame(HEADERS, END_HEADERS | END_STREAM, 1, headers)


def fleet_requests(node: int, key: bytes) -> dict[str, bytes]:
    """Return a request of every Fleet call, as a SuperNode with this node and key writes it."""
    question = Question(plain_study())
    reply = Reply(question, to_server(reference(b"x" * 1000), {"loss": 1.0})).request
    reply.node.node_id = reply.messages_list[0].metadata.src_node_id = node
    own: dict[str, Any] = {"node": {"node_id": node}}
    run = {**own, "run_id": 1}
    interval = {"heartbeat_interval": heartbeat_seconds()}
    made = {
        "RegisterNode": {"public_key": key},
        "ActivateNode": {"public_key": key, **interval},
        "DeactivateNode": {"node_id": node},
        "UnregisterNode": {"node_id": node},
        "SendNodeHeartbeat": {**own, **interval},
        "PullMessages": own,
        "GetRun": run,
        "GetFab": {**run, "hash_str": "a" * 64},
        "PullObject": {**run, "object_id": question.message_id},
        "PushObject": {
            **run,
            "object_id": "a" * 64,
            "object_content": b"x" * 200,
            "session_id": "s",
        },
        "ConfirmMessageReceived": {**run, "message_object_id": question.message_id},
    }
    requests = {
        name: make_request(name, **values).SerializeToString() for name, values in made.items()
    }
    return {**requests, "PushMessages": reply.SerializeToString()}


# --- how it is sent, and counted ------------------------------------------------------------------


def taken(connection: socket.socket) -> bool:
    """Whether the other side has read what it was sent: it ends the connection when we are done."""
    try:
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass  # it had ended it already
    except OSError:
        return False  # it did not in time
    return True


def send_raw(port: int, contents: Iterable[bytes]) -> int:
    """Send each frame on a TCP connection of its own."""
    count = 0
    for content in contents:
        with socket.create_connection(("127.0.0.1", port), timeout=15) as raw:
            try:
                raw.sendall(content)
            except ConnectionError:
                continue
            count += taken(raw)
    return count


def send_secured(open_connection: Open, contents: Iterable[bytes]) -> int:
    """Send each frame on a TLS connection of its own."""
    count = 0
    for content in contents:
        try:
            with open_connection() as secured:
                secured.sendall(content)
                count += taken(secured)
        except OSError:
            continue
    return count


def send_frames(open_connection: Open, source: random.Random, count: int) -> int:
    """Send HTTP/2 frames in bunches; those before a PING that is answered were read."""
    done = 0
    for _ in range(count // (BUNCH + 1)):
        bunch = b"".join(ignored_frame(source, 2 * source.randrange(40) + 1) for _ in range(BUNCH))
        # A call first: what follows may name its stream, and others that were never begun.
        content = PREFACE + settings() + call(source, 79) + bunch + frame(PING, 0, 0, _MARK)
        try:
            with open_connection() as connection:
                connection.sendall(content)
                if any(seen == (PING, ACK, 0, _MARK) for seen in frames_of(connection)):
                    done += BUNCH
                    connection.sendall(fatal_frame(source))
                    done += taken(connection)
        except OSError:
            continue
    return done


def send_calls(open_connection: Open, source: random.Random, count: int) -> int:
    """Send gRPC calls in bunches; those that get an end from the other side were taken."""

    def bunch(seed: int) -> int:
        mine, done = random.Random(seed), 0
        waiting = set(range(1, 1 + 2 * BUNCH, 2))
        content = PREFACE + settings() + b"".join(call(mine, stream) for stream in sorted(waiting))
        with contextlib.suppress(OSError), open_connection() as connection:
            connection.sendall(content)
            for kind, flags, stream, _ in frames_of(connection):
                if stream in waiting and (
                    kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM)
                ):
                    waiting.remove(stream)
                    done += 1
                if not waiting:
                    break
        return done

    seeds = [source.randrange(2**32) for _ in range(count // BUNCH)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(bunch, seeds))


def frames_of(connection: ssl.SSLSocket) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield kind, flags, stream and payload of what comes, until the other side ends it."""
    came = b""
    while True:
        while len(came) >= 9 and len(came) >= 9 + int.from_bytes(came[:3], "big"):
            end = 9 + int.from_bytes(came[:3], "big")
            yield came[3], came[4], int.from_bytes(came[5:9], "big"), came[9:end]
            came = came[end:]
        try:
            more = connection.recv(65536)
        except OSError:
            return
        if not more:
            return
        came += more
