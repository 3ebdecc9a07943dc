"""What the gateway knows of grpcio beyond its public interface; a release may change each of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from typing import Any

import pytest

from consilium_common.wire.tls13 import grpc
from consilium_server.gateway import serving

_METHOD = "/consilium.test/Echo"
_SETTINGS, _HEADERS, _END_HEADERS = 4, 1, 4


def call_to(path: bytes) -> bytes:
    """Return a whole HTTP/2 client that calls ``path`` once (RFC 9113), with literal headers."""
    headers = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
    block = b"".join(
        b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in headers
    )
    frames = ((_SETTINGS, 0, 0, b""), (_HEADERS, _END_HEADERS, 1, block))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"".join(
        struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content
        for kind, flags, stream, content in frames
    )


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def echo(content: bytes, _: object) -> bytes:
            return content

        if handler_call_details.method != _METHOD:
            return None
        return grpc.unary_unary_rpc_method_handler(echo)


async def ended_by(path: bytes) -> bool:
    """Return whether one call of ``path`` ends a server of grpcio's; it answers until then."""
    server = grpc.aio.server(handlers=(_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert serving(server), "a server that was started is not running by its own account"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary(_METHOD)(b"hello", timeout=10) == b"hello"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stream:
        stream.sendall(call_to(path))
        end = time.monotonic() + 1
        while serving(server) and time.monotonic() < end:
            await asyncio.sleep(0.02)
    ended = not serving(server)
    with contextlib.suppress(Exception):
        await asyncio.wait_for(server.stop(0), 5)
    return ended


def test_grpcio_says_whether_its_server_runs_and_it_ends_of_a_path_that_is_no_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)  # it logs how its loop ended
    assert not asyncio.run(ended_by(b"/nobody/knows")), "this reproduction proves nothing"
    assert asyncio.run(ended_by(b"/\xaa\xff")), (
        "grpcio's server goes on after a call whose path is no text: the fault is gone, or its"
        " is_running() says something else. Look at Gateway._keep_listening, TRUST.md and"
        " tests/faults/test_connection_flood.py."
    )
