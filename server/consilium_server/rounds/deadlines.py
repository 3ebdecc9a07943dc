"""How long a round waits for its sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Final

from sqlalchemy import select

from consilium_common.study.federation import Federation
from consilium_server.round_tables import LATE, site_rounds
from consilium_server.rounds.context import Run
from consilium_server.tables import Round

#: Rounds that a learned deadline looks back on, and the fewest that it is learned from.
_RECENT: Final = 5
_FEWEST: Final = 2
#: A learned deadline is so many times the usual slowest site, ...
_TIMES: Final = 3.0
#: ... and no shorter than this: a site that reads one slow disk is not late.
_LEAST_SECONDS: Final = 30.0


def deadline_seconds(federation: Federation, slowest: Sequence[float]) -> float:
    """Return the seconds after which a round goes on without the late ones.

    A fixed number, or learned: three times the median over the last five rounds of the seconds
    that the slowest accepted site took, at least half a minute and at most
    ``federation.deadline_bound_seconds``. The bound itself holds for the first two rounds.

    Parameters
    ----------
    slowest : sequence of float
        Of each round that is over, oldest first. A round in which a site was late counts with its
        whole length, so that a deadline which turns out too short grows by itself.
    """
    if federation.deadline_seconds != "learned":
        return federation.deadline_seconds
    if len(slowest) < _FEWEST:
        return federation.deadline_bound_seconds
    learned = max(_TIMES * median(slowest[-_RECENT:]), _LEAST_SECONDS)
    return min(learned, federation.deadline_bound_seconds)


class Deadline:
    """When a round ends.

    A round ends when every site that it asked has answered and the quorum is there. Else it ends
    ``grace_seconds`` after its deadline, or after the moment the quorum is there where that is
    later. Without a quorum it does not end. All times by ``time.monotonic``.
    """

    def __init__(self, federation: Federation, seconds: float, now: float) -> None:
        self._seconds = seconds
        self._grace = federation.grace_seconds
        self._quorum_at = math.inf
        self.begin(now)

    def begin(self, now: float) -> None:
        """Begin: the first sites were asked."""
        self._at = self._silent_at = now + self._seconds

    def again(self, now: float) -> None:
        """Note that silent sites were asked once more; the round is not longer for it."""
        self._silent_at = now + self._seconds

    def note_quorum(self, now: float) -> None:
        """Note that the quorum is there; the first time counts."""
        self._quorum_at = min(self._quorum_at, now)

    def silent(self, now: float) -> bool:
        """Whether those that were asked last and have not answered are late."""
        return now >= self._silent_at

    def over(self, now: float) -> bool:
        """Whether the round ends without those that are late."""
        return now >= max(self._at, self._quorum_at) + self._grace


def slowest(run: Run, rounds_done: int) -> list[float]:
    """Return how long the slowest accepted site took in each of the last rounds, oldest first."""
    if run.study.federation.deadline_seconds != "learned":
        return []
    since = max(rounds_done - _RECENT, 0)
    parts = site_rounds(run.registry, run.digest, since=since)
    found = []
    with run.registry.transaction() as session:
        query = select(Round.number, Round.seconds).where(
            Round.digest == run.digest, Round.number >= since
        )
        for number, seconds in session.execute(query.order_by(Round.number)):
            of_round = parts.get(number, [])
            known = [part.seconds for part in of_round if part.seconds is not None]
            late = any(part.outcome == LATE for part in of_round)
            found.append(seconds if late else max(known, default=seconds))
    return found
