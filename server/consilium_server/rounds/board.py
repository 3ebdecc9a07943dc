"""What a round shows while it is under way, and what it leaves on record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from consilium_common.ledger.entries import Purpose
from consilium_server.asking import Participant
from consilium_server.registry import Registry
from consilium_server.round_tables import (
    ACCEPTED,
    ASKED,
    BUSY,
    FAILED,
    LATE,
    LEFT_OUT,
    PASSED_OVER,
    RoundNow,
    SiteRound,
)
from consilium_server.rounds.context import Run
from consilium_server.tables import Progress, now, seconds_since

#: A round that is over sooner is not shown while it is under way: writing would slow it down.
_SHOW_SECONDS: Final = 0.5


class Board:
    """One round's sites."""

    def __init__(
        self, registry: Registry, digest: str, number: int, purpose: Purpose, seconds: float
    ) -> None:
        self._registry = registry
        self._digest = digest
        self._number = number
        self._purpose = purpose
        self._seconds = seconds
        self._began_at = now()
        self._began = time.monotonic()
        self._parts: dict[str, SiteRound] = {}
        self._asked: dict[str, float] = {}
        self._asked_at: dict[str, str] = {}
        #: Failures of sites that were asked again since, and have not answered yet.
        self._before: dict[str, tuple[str, str]] = {}
        self._waits_for = ""
        self._shown_at = time.monotonic()
        self._changed = True

    def asked(self, sites: Iterable[Participant]) -> None:
        """Note that sites were asked."""
        for site in sites:
            self._asked.setdefault(site.name, time.monotonic())
            self._asked_at.setdefault(site.name, now())
            self._set(site.name, ASKED, "", session=site.session)

    def accepted(
        self,
        site: str,
        norm: float,
        *,
        clipped: bool = False,
        staleness: int = 0,
        seconds: float | None = None,
        session: str | None = None,
    ) -> None:
        """Note that a site's update was taken; ``seconds`` where another run had asked for it."""
        if seconds is None and site in self._asked:
            seconds = time.monotonic() - self._asked[site]
        part = self._set(site, ACCEPTED, "", session=session)
        part.seconds, part.norm, part.clipped = seconds, norm, clipped
        part.staleness = staleness

    def failed(self, site: str, why: str) -> None:
        """Note that a site's answer was refused, or that it said that it failed."""
        self._set(site, FAILED, why)

    def late(self, site: str, why: str, *, asked: float | None = None) -> None:
        """Note that a site has not answered in time.

        Parameters
        ----------
        asked : float, optional
            When it was asked, by ``time.monotonic`` (default: as noted here).
        """
        asked = self._asked.get(site, self._began) if asked is None else asked
        self._set(site, LATE, BUSY if self._was_busy(site, asked) else why)

    def left_out(self, site: str, why: str) -> None:
        """Note that a site's update was taken and yet is not in the model."""
        self._set(site, LEFT_OUT, why)

    def passed_over(self, site: str) -> None:
        """Note that a site's update was good and the strategy took others."""
        self._set(site, ACCEPTED, PASSED_OVER)

    def cosine(self, site: str, cosine: float) -> None:
        """Note how a site's change lies to the median of all."""
        self._parts[site].cosine = cosine

    def waits_for(self, what: str) -> None:
        """Say what is waited for; empty: nothing special."""
        if what != self._waits_for:
            self._waits_for = what
            self._changed = True

    def patience(self, run: Run) -> Callable[[str], None]:
        """Return what says that something is waited for, and ends the waiting where it must."""

        def patience(waits_for: str) -> None:
            self.waits_for(waits_for)
            self.show(at_once=True)
            run.stay(waits_for, (self._purpose, self._number, len(self.accepted_sites)))

        return patience

    @property
    def seconds(self) -> float:
        """How long the round has been under way."""
        return time.monotonic() - self._began

    @property
    def silent(self) -> list[str]:
        """The sites that were asked and have not answered."""
        return [site for site, part in self._parts.items() if part.outcome == ASKED]

    @property
    def dropped(self) -> dict[str, str]:
        """Why sites that were asked have no part in the round."""
        return {
            site: part.why
            for site, part in sorted(self._parts.items())
            if part.outcome not in (ACCEPTED, ASKED)
        }

    @property
    def accepted_sites(self) -> list[str]:
        """The sites whose update was taken, by name."""
        return sorted(s for s, part in self._parts.items() if part.outcome == ACCEPTED)

    def show(self, *, at_once: bool = False) -> None:
        """Let people see what has changed, not too often."""
        if not self._changed or not (at_once or time.monotonic() - self._shown_at >= _SHOW_SECONDS):
            return
        with self._registry.transaction() as session:
            session.merge(
                RoundNow(
                    digest=self._digest,
                    number=self._number,
                    purpose=self._purpose,
                    began_at=self._began_at,
                    deadline_seconds=self._seconds,
                    sites={site: part.outcome for site, part in self._parts.items()},
                    why=self.dropped,
                    waits_for=self._waits_for,
                    asked_at=self._asked_at,
                )
            )
        self._shown_at = time.monotonic()
        self._changed = False

    def keep(self, session: Session) -> None:
        """Leave every site's part on record; the round repeated after a crash replaces it."""
        session.execute(
            delete(SiteRound).where(
                SiteRound.digest == self._digest, SiteRound.number == self._number
            )
        )
        for site, part in self._parts.items():
            if part.outcome == ASKED and site in self._before:
                part.outcome, part.why = self._before[site]
            if part.outcome != ASKED:
                session.merge(part)

    def _was_busy(self, site: str, asked: float) -> bool:
        """Whether a site has said anything of another study's work since it was asked."""
        with self._registry.transaction() as session:
            others = Progress.site == site, Progress.digest != self._digest
            said = list(session.scalars(select(Progress.at).where(*others)))
        return any(seconds_since(at) < time.monotonic() - asked for at in said)

    def _set(self, site: str, outcome: str, why: str, *, session: str | None = None) -> SiteRound:
        part = self._parts.get(site)
        if part is None:
            part = SiteRound(
                digest=self._digest, number=self._number, site=site, clipped=False, staleness=0
            )
            self._parts[site] = part
        elif outcome == ASKED and part.outcome != ASKED:
            self._before[site] = part.outcome, part.why
        part.outcome, part.why = outcome, why
        if session is not None:
            part.session = session
        self._changed = True
        return part
