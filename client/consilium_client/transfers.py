"""Models on their way in and updates on their way out: files, straight from disk to disk.

Each goes over a stream of the port of its own, a piece at a time, and goes on where a broken line
left it. What may leave is the gate's to say; here it only travels.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from consilium_client.connection import Connection
from consilium_client.home import SiteHome
from consilium_client.received import Received, model_file, note_refusal
from consilium_client.sealed import Sealed
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.wire.channel import said_in
from consilium_common.wire.messages import Reference
from consilium_common.wire.methods import CHUNK_BYTES, SITE_DELIVER, SITE_FETCH
from consilium_common.wire.tls13 import grpc

_log = logging.getLogger(__name__)

T = TypeVar("T")
#: A piece is read, or hashed and written, in one of them.
_DISK_THREADS: Final = 2
_PART: Final = ".part"
#: Pauses before a broken stream is tried again, in seconds.
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 3.0
#: A stream in which nothing moves for so long is given up, and begun anew.
_STALLED_SECONDS: Final = 60.0
#: But for its beginning: the aggregator moves so many models at a time, and the others wait there
#: in the order they came. A line that is dead is noticed by its keep-alives.
_QUEUED_SECONDS: Final = 600.0
#: It is asked so often whether the site still takes part.
_STILL_SECONDS: Final = 0.5


class Transfers:
    """The site's streams, inside the link's event loop.

    Parameters
    ----------
    home : SiteHome
        Keeps the models.
    connection : Connection
        The channel to the aggregator.
    """

    def __init__(self, home: SiteHome, connection: Connection) -> None:
        self._home = home
        self._connection = connection
        self.received = Received(home)
        self._tasks: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        # Of their own, and few: each thread that has held a piece keeps some memory of it.
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "transfers")

    def fetch(self, study: str, model: Reference, require_fitting: Callable[[], None]) -> None:
        """Begin to fetch a model, unless it is here or on its way.

        Parameters
        ----------
        require_fitting : callable
            Raises for a model that is none of the study's; called in a thread, before anything of
            it is asked for. Whoever waits for the model is told.
        """
        if not self.received.ask(study, model).exists():
            self._begin(
                ("fetch", study, model.sha256), lambda: self._fetch(study, model, require_fitting)
            )

    async def deliver(
        self,
        study: str,
        update: Reference,
        path: Path,
        still: Callable[[], None],
        seconds: float,
    ) -> bool:
        """Deliver an update; False when it is still under way after ``seconds``.

        Called again, it goes on waiting for the same delivery. ``still`` raises when the site
        withdraws meanwhile or a bound is passed: nothing more leaves then, and what has come
        there is no update.

        Raises
        ------
        ConsiliumError
            What the aggregator refuses it for; ``privacy.update-lost`` when the file has changed.
        """
        key = ("deliver", study, update.sha256)
        task = self._begin(key, lambda: self._send(study, update, path, still))
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            return False
        self._tasks.pop(key, None)
        task.result()
        return True

    async def close(self) -> None:
        """End all that is under way; what has come stays."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._disk.shutdown(wait=False)

    async def _apart(self, do: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, do, *arguments)

    def _begin(self, key: tuple[str, str, str], work: Callable[[], Any]) -> asyncio.Task[None]:
        for other, ended in list(self._tasks.items()):
            if ended.done() and other[0] == "fetch":
                del self._tasks[other]
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
        return task

    async def _send(
        self, study: str, update: Reference, path: Path, still: Callable[[], None]
    ) -> None:
        sealed = await self._apart(Sealed, path, update)
        await _until_done(lambda: self._deliver(study, update, sealed, still))

    async def _fetch(
        self, study: str, model: Reference, require_fitting: Callable[[], None]
    ) -> None:
        path = model_file(self._home, study, model)
        try:
            await asyncio.to_thread(require_fitting)
            await _until_done(lambda: self._fetch_once(study, model, path))
        except ConsiliumError as error:
            _log.error("%s", error)
            note_refusal(path, error)

    async def _fetch_once(self, study: str, model: Reference, path: Path) -> None:
        part = path.with_name(path.name + _PART)
        try:
            with part.open("a+b", buffering=0) as file:
                seen = await self._apart(_digest_so_far, file)
                held = file.tell()
                asked = {"study": study, "sha256": model.sha256, "offset": held}
                async with self._connection.stream(SITE_FETCH) as call:
                    await call.write(canonical_json(asked))
                    await call.done_writing()
                    patience = _QUEUED_SECONDS
                    while held < model.bytes:
                        piece = await _next(call, patience)
                        patience = _STALLED_SECONDS
                        if piece is grpc.aio.EOF or held + len(piece) > model.bytes:
                            break
                        await self._apart(_keep, file, seen, piece)
                        held += len(piece)
            if held != model.bytes or seen.hexdigest() != model.sha256:
                part.unlink(missing_ok=True)
                raise ConsiliumError(
                    "run.bad-message", "The model that came is not the one that the round names."
                )
            part.replace(path)
        except TimeoutError:
            raise  # of the line, though Python counts it among the errors of files
        except OSError as error:
            raise _disk(part, error) from error

    async def _deliver(
        self, study: str, update: Reference, sealed: Sealed, still: Callable[[], None]
    ) -> None:
        asked_at = 0.0
        announced = {"study": study, "sha256": update.sha256, "bytes": update.bytes}
        async with self._connection.stream(SITE_DELIVER) as call:
            await call.write(canonical_json(announced))
            held = _held(await _next(call, _QUEUED_SECONDS))
            while held < update.bytes:
                if time.monotonic() - asked_at > _STILL_SECONDS:
                    await asyncio.to_thread(still)
                    asked_at = time.monotonic()
                piece = await self._apart(sealed.piece, held)
                await _write(call, piece)
                held += len(piece)
            await call.done_writing()
            _held(await _next(call, _STALLED_SECONDS))


async def _until_done(work: Callable[[], Awaitable[None]]) -> None:
    """Try again as long as it is the line that fails, and not what is asked."""
    pause = _FIRST_PAUSE
    while True:
        began = time.monotonic()
        try:
            await work()
            return
        except grpc.aio.AioRpcError as error:
            refused = _refusal(error)
            if refused is not None:
                raise refused from None
            _log.warning("a stream broke off: %s", error.code().name)
        except TimeoutError:
            _log.warning("a stream came to a stop")
        if time.monotonic() - began > _LONGEST_PAUSE:
            pause = _FIRST_PAUSE
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _digest_so_far(file: Any) -> Any:
    file.seek(0)
    seen = hashlib.sha256()
    while piece := file.read(CHUNK_BYTES):
        seen.update(piece)
    return seen


def _keep(file: Any, seen: Any, piece: bytes) -> None:
    written = 0
    while written < len(piece):
        written += file.write(memoryview(piece)[written:])
    seen.update(piece)


async def _next(call: Any, patience: float) -> Any:
    async with asyncio.timeout(patience):
        return await call.read()


async def _write(call: Any, piece: bytes) -> None:
    try:
        async with asyncio.timeout(_STALLED_SECONDS):
            await call.write(piece)
    except asyncio.InvalidStateError:
        await call.read()  # the other side has ended the stream: this raises why
        raise ConsiliumError("network.bad-answer", "The stream ended too early.") from None


def _held(answer: Any) -> int:
    try:
        held = json.loads(answer)["held"]
    except (TypeError, ValueError, KeyError) as error:
        raise ConsiliumError(
            "network.bad-answer", "The aggregator's answer cannot be read."
        ) from error
    if type(held) is not int or held < 0:
        raise ConsiliumError("network.bad-answer", "The aggregator's answer cannot be read.")
    return held


def _refusal(error: Any) -> ConsiliumError | None:
    """Return what the aggregator refuses for good; None when it is worth trying again."""
    said = said_in(error)
    passing = said is None or said.code.startswith(("network.", "identity.", "state."))
    return None if passing else said


def _disk(path: Path, error: OSError) -> ConsiliumError:
    return ConsiliumError(
        "state.disk",
        f"The round's model cannot be kept: {error.strerror or error}.",
        where=str(path),
        hint="Free space on the disk; the site takes part in the next round.",
    )
