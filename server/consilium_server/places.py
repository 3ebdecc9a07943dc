"""Places for models on their way: so many move at a time, the others wait in the order they came.

Each line that moves a model has a piece or two in memory, which gRPC reads ahead. A bound on them
makes the gateway's memory independent of the number of sites.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from consilium_common.errors import ConsiliumError

#: How long a place is kept while others wait, in seconds: a slow line goes on after them, from
#: where it is, and cannot keep them out.
_KEPT_SECONDS: Final = 60.0
#: One caller has this part of the places at most, waiting ones counted too.
_PART_OF_ONE: Final = 1 / 4


class Places:
    """Hands out places in the order in which they were asked for.

    Parameters
    ----------
    count : int
        How many there are.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._free = asyncio.Semaphore(count)
        self._most = max(1, int(count * _PART_OF_ONE))
        self._clock = clock
        self._of: Counter[str] = Counter()
        self._waiting = 0

    @asynccontextmanager
    async def one(self, who: str) -> AsyncIterator[Callable[[], None]]:
        """Wait for a place and hold it.

        Yields
        ------
        callable
            To be called between two pieces: raises ``network.busy`` when the place was kept long
            and others wait.

        Raises
        ------
        ConsiliumError
            ``network.too-many-calls`` when the caller has its part already.
        """
        if self._of[who] >= self._most:
            raise ConsiliumError(
                "network.too-many-calls",
                "Too many models of one caller are on their way.",
                hint="Wait a little and try again.",
            )
        self._of[who] += 1
        try:
            await self._wait()
            began = self._clock()

            def require() -> None:
                if self._waiting and self._clock() - began > _KEPT_SECONDS:
                    raise ConsiliumError(
                        "network.busy",
                        "Other sites wait to move their models.",
                        hint="The transfer goes on by itself from where it is.",
                    )

            try:
                yield require
            finally:
                self._free.release()
        finally:
            self._of[who] -= 1
            if not self._of[who]:
                del self._of[who]

    async def _wait(self) -> None:
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
