"""Wakes the calls in which sites wait for messages: one look at the disk for all of them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from consilium_common.files import private_folder

_LOOK_SECONDS: Final = 0.03
_ANY: Final = "any"


class Kicks:
    """A folder with a file per node, touched when messages wait for it.

    Parameters
    ----------
    folder : Path
        Shared by the processes that send messages and the one that holds calls.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder)
        self._waiting: dict[asyncio.Future[None], tuple[str, int]] = {}
        self._watch: asyncio.Task[None] | None = None

    def kick(self, nodes: Iterable[int]) -> None:
        """Say that messages wait for these nodes."""
        for name in (*map(str, nodes), _ANY):
            path = self._folder / name
            path.touch()
            # The kernel's own clock ticks slowly: of two kicks in a row the second must be seen.
            moment = time.time_ns()
            os.utime(path, ns=(moment, moment))

    def seen(self, node: str) -> int:
        """Return what :meth:`wait` compares with; ask for it before looking for messages."""
        return self._at(node)

    async def wait(self, node: str, seen: int, seconds: float) -> None:
        """Wait until messages came for a node since ``seen``, at most ``seconds``."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[waiting] = (node, seen)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())
        try:
            if self._at(node) == seen:
                await asyncio.wait({waiting}, timeout=seconds)
        finally:
            self._waiting.pop(waiting, None)

    async def _look(self) -> None:
        before = self._at(_ANY)
        while self._waiting:
            await asyncio.sleep(_LOOK_SECONDS)
            now = self._at(_ANY)
            if now == before:
                continue
            before = now
            for waiting, (node, seen) in list(self._waiting.items()):
                if self._at(node) != seen and not waiting.done():
                    waiting.set_result(None)

    def _at(self, node: str) -> int:
        try:
            return (self._folder / node).stat().st_mtime_ns
        except FileNotFoundError:
            return 0
