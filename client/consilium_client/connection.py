"""The site's one channel to the aggregator, which follows the certificates on disk.

A renewal replaces certificates while calls are under way. New calls take a channel with the new
ones at once; the old channel ends when its last call has. A held call may be refused for its old
certificate meanwhile: a refusal at the door means that nothing was done, so it is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from consilium_client.identity import SiteIdentity
from consilium_common.errors import ConsiliumError
from consilium_common.wire.channel import aio_channel, rpc_error, said_in
from consilium_common.wire.methods import HTTP_STATUS_KEY
from consilium_common.wire.tls13 import grpc

_log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str]]


class Connection:
    """The channel in force; made inside a running event loop.

    Parameters
    ----------
    identity : SiteIdentity
        Whose certificates, address and proxy.
    """

    def __init__(self, identity: SiteIdentity) -> None:
        self.identity = identity
        self._seen = identity.stamp()
        self._line = self._open()
        self._closing: set[asyncio.Task[None]] = set()

    def unary(self, method: str) -> Unary:
        """Return what calls ``method``, always on the channel in force at the call."""
        return Unary(self, method)

    @contextlib.asynccontextmanager
    async def stream(self, method: str) -> AsyncIterator[Any]:
        """Hold a stream of ``method`` open, on the channel in force when it begins."""
        line = self.line()
        line.calls += 1
        call = line.channel.stream_stream(method)()
        try:
            yield call
        finally:
            call.cancel()
            self.release(line)

    async def explain(self, error: grpc.aio.AioRpcError) -> ConsiliumError:
        """Return the one error that says why a call failed and what to do; looks at the network."""
        identity = self.identity
        return await asyncio.to_thread(
            rpc_error, error, identity.config.address, identity.credentials(), identity.proxy()
        )

    async def close(self) -> None:
        """Close the channel; calls under way end."""
        self._retire(self._line)
        await self._line.channel.close()
        await asyncio.gather(*self._closing)

    def line(self) -> Line:
        """Return the line in force; a new one when the certificates on disk have changed."""
        try:
            stamp = self.identity.stamp()
            if stamp != self._seen:
                opened = self._open()
                retired, self._line, self._seen = self._line, opened, stamp
                self._retire(retired)
        except (OSError, ConsiliumError) as error:
            # What cannot be read now changes nothing: the line that stands is as good as it was.
            _log.warning("the certificates on disk cannot be read: %s", error)
        return self._line

    def release(self, line: Line) -> None:
        """Note that a call on ``line`` has ended."""
        line.calls -= 1
        if line.retired:
            self._retire(line)

    def _retire(self, line: Line) -> None:
        line.retired = True
        if line.calls == 0:
            task = asyncio.create_task(line.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _open(self) -> Line:
        identity = self.identity
        return Line(aio_channel(identity.config.address, identity.credentials(), identity.proxy()))


class Line:
    """One gRPC channel and the number of calls under way on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.calls = 0
        self.retired = False


class Unary:
    """One method on the channel in force; called as gRPC's own multicallables are."""

    def __init__(self, connection: Connection, method: str) -> None:
        self._connection = connection
        self._method = method

    def __call__(
        self, body: bytes, *, metadata: Metadata = (), timeout: float | None = None
    ) -> UnaryCall:
        return UnaryCall(self._connection, self._method, body, metadata, timeout)


class UnaryCall:
    """A call: it starts when it is awaited, once, and then has trailing metadata."""

    def __init__(
        self,
        connection: Connection,
        method: str,
        body: bytes,
        metadata: Metadata,
        timeout: float | None,
    ) -> None:
        self._connection = connection
        self._method = method
        self._body, self._metadata, self._timeout = body, tuple(metadata), timeout
        self._trailing: Any = ()

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._answer().__await__()

    async def trailing_metadata(self) -> Any:
        """Return the trailing metadata of the call that was answered."""
        return self._trailing

    async def _answer(self) -> bytes:
        line = self._connection.line()
        try:
            return await self._on(line)
        except grpc.aio.AioRpcError as error:
            now = self._connection.line()
            if now is line or not _refused_at_the_door(error):
                raise
        return await self._on(now)

    async def _on(self, line: Line) -> bytes:
        line.calls += 1
        try:
            call = line.channel.unary_unary(self._method)(
                self._body, metadata=self._metadata, timeout=self._timeout
            )
            content: bytes = await call
            self._trailing = await call.trailing_metadata()
            return content
        finally:
            self._connection.release(line)


def _refused_at_the_door(error: grpc.aio.AioRpcError) -> bool:
    """Whether the aggregator refused the certificate, and so did nothing of what was asked."""
    said = said_in(error)
    return said is not None and said.code.startswith("identity.")


def http_status(trailing: Mapping[str, Any]) -> int:
    """Return the SuperLink's HTTP status, which came behind the answer to a Fleet call.

    Raises
    ------
    ConsiliumError
        ``network.bad-answer``.
    """
    try:
        return HTTPStatus(int(trailing.get(HTTP_STATUS_KEY, HTTPStatus.OK))).value
    except ValueError as error:
        raise ConsiliumError(
            "network.bad-answer", "The aggregator's status is none of HTTP's."
        ) from error
