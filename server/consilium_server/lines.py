"""A stream's messages: each timed, counted against its caller, and a model's moved in its turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from consilium_common.errors import ConsiliumError
from consilium_common.wire.tls13 import grpc
from consilium_server.limits import Call
from consilium_server.places import Places


class MeteredLine:
    """A stream of one caller, as a transfer sees it.

    Parameters
    ----------
    call : Call
        Its place among the caller's calls.
    who : str
        The caller, by whose name places are counted.
    seconds : float
        How long a message may take.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        call: Call,
        places: Places,
        who: str,
        seconds: float,
    ) -> None:
        self._context, self._call, self._seconds = context, call, seconds
        self._places, self._who = places, who
        self._require_place: Callable[[], None] = _nothing_required

    @asynccontextmanager
    async def moving(self) -> AsyncIterator[None]:
        """Wait for a place among those that move a model, and hold it."""
        async with self._places.one(self._who) as require:
            await self._call.expect_stream()
            self._require_place = require
            try:
                yield
            finally:
                self._call.release()
                self._require_place = _nothing_required

    async def read(self) -> bytes | None:
        """Return the caller's next message; None when it has sent its last.

        Raises
        ------
        ConsiliumError
            ``network.busy``, ``network.slow``, ``network.too-large``.
        """
        self._require_place()
        await self._call.wait_for_debt()
        message = await self._timed(self._context.read())
        if message is grpc.aio.EOF:
            return None
        assert isinstance(message, bytes)
        self._call.took_piece(len(message))
        return message

    async def write(self, message: bytes) -> None:
        """Send a message; waits until the caller takes it.

        Raises
        ------
        ConsiliumError
            ``network.busy``, ``network.slow``.
        """
        self._require_place()
        await self._timed(self._context.write(message))

    async def _timed(self, work: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._seconds):
                return await work
        except TimeoutError:
            raise ConsiliumError("network.slow", "The stream has come to a stop.") from None


def _nothing_required() -> None:
    """Between a line's first message and its place, and after it, there is no turn to be over."""
