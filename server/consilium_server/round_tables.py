"""What people are told of each site's part in each round, and of the round under way."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import JSON, String, select
from sqlalchemy.orm import Mapped, mapped_column

from consilium_server.registry import Registry
from consilium_server.tables import Base

#: How a site's part in a round ended.
ACCEPTED: Final = "accepted"
LATE: Final = "late"
FAILED: Final = "failed"
LEFT_OUT: Final = "left-out"
#: Why an accepted update is not in the model all the same.
PASSED_OVER: Final = "not chosen by the study's strategy"
#: Why a site is late that does one thing after the other: no failure of it.
BUSY: Final = "it was at work on another study"
#: It was asked and has not answered yet; of the round under way alone.
ASKED: Final = "asked"


class SiteRound(Base):
    """One site's part in one round that is over."""

    __tablename__ = "site_rounds"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    outcome: Mapped[str]  #: accepted, late, failed or left-out
    why: Mapped[str] = mapped_column(default="")  #: where it was accepted: empty, or PASSED_OVER
    #: From when it was asked to when its update was there; None where none came.
    seconds: Mapped[float | None] = mapped_column(default=None)
    norm: Mapped[float | None] = mapped_column(default=None)  #: L2, of its change, before clipping
    #: To the median of all changes; None where the study does not screen.
    cosine: Mapped[float | None] = mapped_column(default=None)
    clipped: Mapped[bool] = mapped_column(default=False)
    #: Steps that the global model had made since the site began; 0 outside buffered studies.
    staleness: Mapped[int] = mapped_column(default=0)
    #: What it ran under: another one means that the site was started anew.
    session: Mapped[str | None] = mapped_column(default=None)

    def shown(self) -> dict[str, Any]:
        """Return it as people are shown it."""
        names = ("site", "outcome", "why", "seconds", "norm", "cosine", "clipped", "staleness")
        return {name: getattr(self, name) for name in names}


class RoundNow(Base):
    """The round under way; at most half a second old."""

    __tablename__ = "round_now"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int]
    purpose: Mapped[str]  #: training, evaluation or statistics
    began_at: Mapped[str]
    deadline_seconds: Mapped[float]  #: from its beginning; grace not included
    sites: Mapped[dict[str, str]] = mapped_column(JSON)  #: asked, accepted, late or failed
    why: Mapped[dict[str, str]] = mapped_column(JSON)  #: of those that failed
    waits_for: Mapped[str] = mapped_column(default="")  #: in words; empty: for nothing special
    #: When each site was asked first.
    asked_at: Mapped[dict[str, str]] = mapped_column(JSON, default=dict, server_default="{}")

    def shown(self) -> dict[str, Any]:
        """Return it as people are shown it."""
        names = ("number", "purpose", "began_at", "deadline_seconds", "sites", "why", "waits_for")
        return {name: getattr(self, name) for name in names}


def site_rounds(registry: Registry, digest: str, *, since: int = 0) -> dict[int, list[SiteRound]]:
    """Return every site's part in the rounds that are over, by round and in order of names.

    Parameters
    ----------
    since : int
        First round that is wanted (default: 0).
    """
    found: dict[int, list[SiteRound]] = {}
    with registry.transaction() as session:
        query = select(SiteRound).where(SiteRound.digest == digest, SiteRound.number >= since)
        for row in session.scalars(query.order_by(SiteRound.number, SiteRound.site)):
            found.setdefault(row.number, []).append(row)
    return found


def round_now(registry: Registry, digest: str) -> RoundNow | None:
    """Return the round under way, or the last one that was; None before the first."""
    with registry.transaction() as session:
        return session.get(RoundNow, digest)
