"""Patience with an archive: which failures pass by themselves, and how long to wait for them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from consilium_common.errors import ConsiliumError

T = TypeVar("T")

#: A bad image or series is asked for so often before the pull goes on without it.
SERIES_RETRIES = 2


class SeriesError(ConsiliumError):
    """Something is wrong with one series; the others can still be pulled."""


class TransientError(ConsiliumError):
    """A failure that may pass by itself: a broken connection, a busy archive.

    Parameters
    ----------
    after : float
        Seconds that the archive asks to wait; 0 where it does not say.
    """

    def __init__(
        self, code: str, message: str, *, where: str = "", hint: str = "", after: float = 0.0
    ) -> None:
        super().__init__(code, message, where=where, hint=hint)
        self.after = after


class IncompleteError(TransientError, SeriesError):
    """A series did not come whole; after a few attempts the pull goes on without it."""


@dataclass(frozen=True)
class BackOff:
    """Exponential waits with jitter.

    Parameters
    ----------
    retries : int
        Attempts after the first failure without any progress in between.
    first, longest : float
        Seconds; each wait is twice the one before, less a random part of up to a half, so that
        several clients do not come back at the same moment.
    """

    retries: int = 8
    first: float = 1.0
    longest: float = 60.0

    def wait(self, failures: int, after: float = 0.0) -> float:
        """Return seconds to wait after the ``failures``-th failure in a row (from 1)."""
        full = min(self.longest, self.first * 2.0 ** min(failures - 1, 30))
        drawn = full * random.uniform(0.5, 1.0)  # noqa: S311 - no secret depends on it
        return max(drawn, min(after, self.longest))


def patiently(
    action: Callable[[], T],
    back_off: BackOff,
    *,
    progress: Callable[[], int] = lambda: 0,
    say: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Run ``action`` until it succeeds, waiting longer after each transient failure.

    Parameters
    ----------
    progress : callable
        A count that grows when an attempt got something done: then patience starts anew.

    Raises
    ------
    TransientError
        The last one, when ``back_off.retries`` attempts in a row got nowhere.
    """
    failures, reached = 0, progress()
    while True:
        try:
            return action()
        except TransientError as error:
            now = progress()
            failures = 1 if now > reached else failures + 1
            reached = now
            most = SERIES_RETRIES if isinstance(error, SeriesError) else back_off.retries
            if failures > min(most, back_off.retries):
                raise
            pause = back_off.wait(failures, error.after)
            say(f"{error.message} Trying again in {pause:.0f} s.")
            sleep(pause)
