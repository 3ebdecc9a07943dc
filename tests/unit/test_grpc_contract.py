"""What the gateway knows of grpcio beyond its public interface; a release may change each of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from consilium_common.wire.tls13 import grpc
from consilium_server.grpc_private import PortServer

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


async def _echo(_: Any, context: grpc.aio.ServicerContext) -> None:
    await context.write(await context.read())


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        known = handler_call_details.method == _METHOD
        return grpc.stream_stream_rpc_method_handler(_echo) if known else None


async def _plain() -> Any:
    return grpc.aio.server(handlers=(_Echo(),))._server


async def _ours() -> Any:
    async def unknown(context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "nobody knows")

    return PortServer({_METHOD: _echo}, unknown, ())


async def _answers(channel: grpc.aio.Channel) -> bool:
    call = channel.stream_stream(_METHOD)(iter([b"hello"]), timeout=10)
    return bool(await call.read() == b"hello")


async def ended_by(path: bytes, make: Callable[[], Awaitable[Any]]) -> bool:
    """Return whether one call of ``path`` ends a server; it answers until then, or for good."""
    server = await make()
    port = server.add_insecure_port(b"127.0.0.1:0")
    await server.start()
    assert server.is_running(), "a server that was started is not running by its own account"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await _answers(channel)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stream:
            stream.sendall(call_to(path))
            end = time.monotonic() + 1
            while server.is_running() and time.monotonic() < end:
                await asyncio.sleep(0.02)
            ended = not server.is_running()
            if not ended:
                stream.settimeout(5)
                assert b"grpc-status" in await asyncio.to_thread(_all_of, stream)
                assert await _answers(channel)
    with contextlib.suppress(Exception):
        await asyncio.wait_for(server.shutdown(0), 5)
    return ended


def _all_of(stream: socket.socket) -> bytes:
    """Return what comes until the call's status has."""
    heard = b""
    while b"grpc-status" not in heard and (piece := stream.recv(4096)):
        heard += piece
    return heard


def test_a_server_of_grpcio_s_own_ends_of_a_path_that_is_no_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)  # it logs how its loop ended
    assert not asyncio.run(ended_by(b"/nobody/knows", _plain)), "this reproduction proves nothing"
    assert asyncio.run(ended_by(b"/\xaa\xff", _plain)), (
        "grpcio's server goes on after a call whose path is no text: the fault is gone, and with it"
        " the reason for PortServer and for the narrow pin in pyproject.toml."
    )


@pytest.mark.parametrize("path", [b"/nobody/knows", b"/\xaa\xff", b"/", b"\xff"])
def test_ours_answers_every_unknown_call_and_goes_on(path: bytes) -> None:
    assert not asyncio.run(ended_by(path, _ours))


def test_unknown_calls_leave_nothing_behind() -> None:
    """The server frees them as its own loop would, also those whose caller is gone."""

    async def scenario() -> int:
        server = await _ours()
        port = server.add_insecure_port(b"127.0.0.1:0")
        await server.start()

        async def ask(seconds: float) -> None:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                unknown = channel.unary_unary("/no/such")
                for _ in range(200):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await unknown(b"x" * 1000, timeout=seconds)

        async def grown_by(rounds: int) -> int:
            before = _resident()
            for _ in range(rounds):
                await asyncio.gather(ask(5.0), ask(0.001))
            return _resident() - before

        await grown_by(2)  # what gRPC keeps for itself
        grown = await grown_by(8)
        await server.shutdown(0)
        return grown

    grown = asyncio.run(scenario())
    print(f"{grown / 1e6:.1f} MB after 3200 calls")
    assert grown < 20e6  # held, they are three times that


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
