"""What the port touches of grpcio beyond its public interface; ``test_grpc_contract`` holds it.

grpcio decodes the path of a call that it knows no method for in the one loop that takes all calls:
a path that is no text ends the whole server (up to 1.85 at least), and any member can send one. So
every method of ours is registered by its name, which gRPC's core compares as bytes; a call of any
other is handed to a handler of ours, and nobody reads its path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from consilium_common.wire.tls13 import grpc

_cygrpc: Any = grpc._cython.cygrpc
_AioServer: Any = _cygrpc.AioServer

Handler = Callable[[Any, grpc.aio.ServicerContext], Awaitable[None]]


class PortServer(_AioServer):  # type: ignore[misc]
    """A server of the given methods alone. To be made where an event loop runs.

    Parameters
    ----------
    handlers : mapping
        Of each method by its full name: given None and the call's context, from which it reads the
        caller's messages, and to which it writes raw bytes.
    unknown : callable
        Ends a call of any other method.
    options : sequence of pairs
        gRPC's channel arguments.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        unknown: Callable[[grpc.aio.ServicerContext], Awaitable[None]],
        options: Sequence[tuple[str, int]],
    ) -> None:
        super().__init__(asyncio.get_running_loop(), None, (), (), tuple(options), None)
        # Without serialisers gRPC hands over raw bytes. As streams, though most are one message
        # either way: a handler of a single message is only called when all of it has come.
        self.add_registered_method_handlers(
            {
                method: grpc.stream_stream_rpc_method_handler(handler)
                for method, handler in handlers.items()
            }
        )
        self._unknown = unknown
        self._ending: set[asyncio.Future[None]] = set()

    def _make_request_call_future(self, method: bytes | None) -> Any:
        """Return what ends when the next call of a method has come; None stands for the unknown."""
        if method is not None:
            return super()._make_request_call_future(method)
        return asyncio.ensure_future(self._turn_away())

    async def _turn_away(self) -> None:
        """End every call of an unknown method, for as long as the server runs."""
        loop = asyncio.get_running_loop()
        while True:
            call = await self._request_call()
            context = _cygrpc._ServicerContext(call, None, None, loop)
            ending = asyncio.ensure_future(self._unknown(context))
            self._ending.add(ending)
            ending.add_done_callback(self._forget)

    def _forget(self, ending: asyncio.Future[None]) -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()  # an ended call says so by an exception
