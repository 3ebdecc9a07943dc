"""Looks between two steps whether the site still stands by the approval it works under."""

from __future__ import annotations

import contextlib
import datetime as dt
import sqlite3
from collections.abc import Callable

from consilium_client.budget.policy import Policy
from consilium_client.home import SiteHome
from consilium_client.store import Decision, StudyStore, still_stands
from consilium_client.store_tables import store_error
from consilium_common.errors import ConsiliumError


def now_here() -> dt.datetime:
    """Return the time by this machine's clock, in its own time zone."""
    return dt.datetime.now().astimezone()


class Standing:
    """One approval, looked at again and again; for one process.

    A look asks SQLite whether anybody has committed since the last one, which takes microseconds;
    the decision itself is read only then.

    Parameters
    ----------
    decision : Decision
        The approval.
    clock : callable
        Returns the time by which the hours of an automatic approval count (default: this
        machine's).
    """

    def __init__(
        self,
        home: SiteHome,
        decision: Decision,
        *,
        clock: Callable[[], dt.datetime] = now_here,
    ) -> None:
        self._home = home
        self._store = StudyStore(home)
        self.decision = decision
        self._clock = clock
        self._policy: Policy | None = None
        self._connection: sqlite3.Connection | None = None
        self._seen: int | None = None

    def begin(self, policy: Policy) -> None:
        """Begin a piece of work under today's policy; as :meth:`require`."""
        self._policy = policy
        # The file may have been put back from a backup: every piece of work opens it anew.
        self.close()
        self.require()

    def require(self) -> None:
        """Raise unless the work may go on.

        Raises
        ------
        ConsiliumError
            ``study.withdrawn``, ``study.decided-anew``; of an approval that the policy gave by
            itself ``study.automatic-ended``, ``study.automatic-bounds`` or
            ``study.outside-hours``; ``state.store``.
        """
        version = self._version()
        if version != self._seen:
            still_stands(self.decision, self._store.decision(self.decision.study.digest))
            # Noted before the look: a decision that came between is seen at the next one.
            self._seen = version
        if self._policy is not None:
            require_within_bounds(self.decision, self._policy, self._clock())

    def close(self) -> None:
        """Give the database back."""
        if self._connection is not None:
            self._connection.close()
        self._connection = self._seen = None

    def _version(self) -> int:
        """Return SQLite's number that changes whenever another connection has committed."""
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(self._home.studies, timeout=20)
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self.close()
            raise store_error(self._home.studies, error) from error
        return int(version)


def require_within_bounds(decision: Decision, policy: Policy, moment: dt.datetime) -> None:
    """Raise when an automatic approval exceeds a bound of today's policy at this moment.

    Raises
    ------
    ConsiliumError
        ``study.automatic-ended``, ``study.automatic-bounds`` or ``study.outside-hours``.
    """
    if decision.automatic is None:
        return
    rule = policy.approve_automatically
    if rule is None:
        raise ConsiliumError(
            "study.automatic-ended",
            "The study was approved automatically, and the policy approves nothing any more.",
            hint="Look at it with `consilium site review` and approve it yourself.",
        )
    exceeded = rule.study_refusal(decision.automatic)
    if exceeded:
        raise ConsiliumError(
            "study.automatic-bounds",
            f"The study was approved automatically, and exceeds today's bounds: {exceeded}.",
            hint="Look at it with `consilium site review` and approve it yourself.",
        )
    outside = rule.time_refusal(moment)
    if outside:
        raise ConsiliumError(
            "study.outside-hours",
            f"The study was approved automatically, and {outside}.",
            hint="It goes on within its hours, or at any time once you approve it yourself.",
        )
