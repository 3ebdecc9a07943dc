"""The two streams of the port: a model to a site, an update from it, each straight from disk.

Nothing of a file is held beyond the piece under way. Both go on where a broken line left them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from io import FileIO
from typing import Any, Final, Protocol, TypeVar

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import is_hexadecimal
from consilium_common.wire import methods
from consilium_common.wire.messages import Reference
from consilium_common.wire.methods import CHUNK_BYTES
from consilium_server.home import ServerHome
from consilium_server.peers import Peer
from consilium_server.registry import Registry
from consilium_server.study_files import Arriving, StudyFiles

T = TypeVar("T")
#: More would only stand in each other's way: a piece is hashed and written.
_DISK_THREADS: Final = 4
#: Sites that a piece goes to or comes from at the same time, and how long one may keep its turn.
_TURNS: Final = 8
_TURN_SECONDS: Final = 0.1


class Line(Protocol):
    """One stream, metered and timed by the gateway."""

    async def read(self) -> bytes | None:
        """Return the caller's next message; None when it has sent its last."""

    async def write(self, message: bytes) -> None:
        """Send a message; waits until the caller takes it."""

    def moving(self) -> AbstractAsyncContextManager[None]:
        """Wait for one of the places of those that move a model, and hold it.

        Within, ``read`` and ``write`` raise ``network.busy`` when it is the turn of others.
        """


Stream = Callable[[Peer, Line], Awaitable[None]]


class Transfers:
    """The handlers of the streams.

    Parameters
    ----------
    home : ServerHome
        Whose study folders hold the files.
    """

    def __init__(self, home: ServerHome, registry: Registry) -> None:
        self._home = home
        self._registry = registry
        self._arriving: dict[tuple[str, str], Arriving] = {}
        # Encrypting a piece keeps everybody else waiting: hundreds in a row, for many seconds.
        self._turns = asyncio.Semaphore(_TURNS)
        # Of their own: hundreds of pieces in a row must not hold up what people ask.
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "transfers")

    def table(self) -> dict[str, Stream]:
        """Return the handler of each stream."""
        return {methods.SITE_FETCH: self.fetch, methods.SITE_DELIVER: self.deliver}

    async def fetch(self, peer: Peer, line: Line) -> None:
        """Send a file that is on offer to the study's sites, from ``offset`` on.

        The one message of the caller: ``{"study", "sha256", "offset"}``.

        Raises
        ------
        ConsiliumError
            ``run.no-model`` when it is not on offer to this site.
        """
        asked = await _first(line)
        files = self._files(peer, asked)
        sha256, offset = asked.get("sha256"), asked.get("offset")
        path = files.offered(str(sha256)) if is_hexadecimal(sha256, 64) else None
        if path is None or type(offset) is not int or not 0 <= offset <= path.stat().st_size:
            raise ConsiliumError(
                "run.no-model",
                "This model is not on offer.",
                hint="The round is over; the next one names another model.",
            )
        # Opened once: replaced or removed meanwhile, it is still the same file.
        with path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            async with line.moving():
                while await self._in_turn(self._send, stream, line):
                    pass

    async def _send(self, stream: FileIO, line: Line) -> bool:
        # Read in its turn only: whoever waits for one holds no piece in memory.
        piece = await self._apart(stream.read, CHUNK_BYTES)
        if piece:
            await line.write(piece)
        return bool(piece)

    async def deliver(self, peer: Peer, line: Line) -> None:
        """Take the update that a site was asked for.

        The caller's first message is ``{"study", "sha256", "bytes"}``; the answer ``{"held"}`` says
        from which byte it is to go on. After the last byte the answer is ``{"held"}`` again.

        Raises
        ------
        ConsiliumError
            ``run.not-expected`` when the site was not asked for a file, or for none so large;
            ``run.bad-update``, ``state.disk``.
        """
        announced = await _first(line)
        reference = Reference(announced.get("sha256", ""), announced.get("bytes", 0))
        files = self._files(peer, announced)
        if reference.bytes > files.most(peer.name):
            raise ConsiliumError(
                "run.not-expected",
                "The site was not asked for this update, or for none so large.",
                hint="The round is over; the site takes part in the next.",
            )
        if files.arrived(peer.name, reference) is None:
            await self._take(files, peer.name, reference, line)
        else:
            await line.write(canonical_json({"held": reference.bytes}))
        await line.write(canonical_json({"held": reference.bytes}))

    async def _take(self, files: StudyFiles, site: str, reference: Reference, line: Line) -> None:
        key = (site, reference.sha256)
        before = self._arriving.pop(key, None)
        if before is not None:
            before.close()  # its line is dead, or will be: the site has a new one
        # Known before it is opened: of several lines at once, the last alone goes on.
        arriving = self._arriving[key] = files.arriving(site, reference)
        try:
            async with line.moving():  # the site sends nothing before it is told from where
                await self._apart(arriving.open)
                await line.write(canonical_json({"held": arriving.held}))
                while arriving.held < reference.bytes:
                    piece = await self._in_turn(line.read)
                    if piece is None:
                        raise ConsiliumError("network.garbage", "The update ends before its end.")
                    await self._apart(arriving.write, piece)
            await self._apart(arriving.finish)
        finally:
            arriving.close()
            if self._arriving.get(key) is arriving:
                del self._arriving[key]

    async def _in_turn(self, move: Callable[..., Coroutine[Any, Any, T]], *arguments: object) -> T:
        async with self._turns:
            moving = asyncio.create_task(move(*arguments))
            try:
                # A site with a slow line is waited for outside: it takes nothing of the others'.
                await asyncio.wait({moving}, timeout=_TURN_SECONDS)
            except asyncio.CancelledError:
                moving.cancel()
                raise
        return await moving

    async def _apart(self, do: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, do, *arguments)

    def _files(self, peer: Peer, asked: dict[str, Any]) -> StudyFiles:
        study = asked.get("study")
        approved = is_hexadecimal(study, 64) and any(
            one.site == peer.name and one.decision == "approved"
            for one in self._registry.approvals(str(study))
        )
        if not approved:
            raise ConsiliumError(
                "study.not-approved", "The site has not approved this study.", where=str(study)[:12]
            )
        return StudyFiles(self._home.study_folder(str(study)))


async def _first(line: Line) -> dict[str, Any]:
    try:
        found = json.loads(await line.read() or b"")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConsiliumError("network.garbage", "The request is not a JSON object.")
    return found
